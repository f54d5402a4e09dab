package gpt

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"espmirror/blockdev"
	diskfs "github.com/diskfs/go-diskfs/partition/gpt"
)

const (
	testDisk = "11111111-2222-4333-8444-555555555555"
	typeData = "EBD0A0A2-B9E5-4433-87C0-68B6B72699C7"
)

// guid returns the n-th GUID of the tests, in lower case.
func guid(n int) string { return fmt.Sprintf("6f0c5c7e-0000-4000-8000-%012x", n) }

// part describes a partition of a test image, in bytes.
type part struct {
	number      int
	typ         string
	guid        string
	name        string
	start, size int64
}

func esp(number int, start, size int64) part {
	return part{number, TypeESP.String(), guid(number), fmt.Sprintf("ESP %d", number), start, size}
}

// memImage makes an image with a GPT written by go-diskfs.
func memImage(t testing.TB, size int64, sector int, parts ...part) []byte {
	t.Helper()
	table := &diskfs.Table{LogicalSectorSize: sector, PhysicalSectorSize: sector, GUID: testDisk, ProtectiveMBR: true}
	for _, p := range parts {
		table.Partitions = append(table.Partitions, &diskfs.Partition{Index: p.number, Type: diskfs.Type(p.typ), GUID: p.guid, Name: p.name,
			Start: uint64(p.start) / uint64(sector), End: uint64(p.start+p.size)/uint64(sector) - 1, Attributes: 1})
	}
	img := make([]byte, size)
	if err := table.Write(&memWriter{memFile{bytes.NewReader(img)}, img}, size); err != nil {
		t.Fatal(err)
	}
	return img
}

// memWriter lets go-diskfs write into memory; on a real file it syncs five times an image.
type memWriter struct {
	memFile
	img []byte
}

func (w *memWriter) WriteAt(p []byte, off int64) (int, error) { return copy(w.img[off:], p), nil }

// writeImage puts an image into a file.
func writeImage(t testing.TB, b []byte) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "disk.img")
	if err := os.WriteFile(path, b, 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

// tool runs a program, or skips the test by the program's name when it is missing.
func tool(t testing.TB, name string, args ...string) string {
	t.Helper()
	if _, err := exec.LookPath(name); err != nil {
		t.Skip(name + " is not installed")
	}
	out, err := exec.Command(name, args...).CombinedOutput()
	if err != nil {
		t.Fatalf("%s %q: %v\n%s", name, args, err, out)
	}
	return string(out)
}

// sealHeader makes the CRC of the header at lba right again.
func sealHeader(img []byte, sector, lba int) {
	h := img[lba*sector:]
	size := binary.LittleEndian.Uint32(h[offSize:])
	if size > uint32(sector) {
		size = headerSize
	}
	clear(h[offCRC : offCRC+4])
	binary.LittleEndian.PutUint32(h[offCRC:], crc32.ChecksumIEEE(h[:size]))
}

// sealArray makes the CRC of the 128 usual entries right, and then that of the header.
func sealArray(img []byte, sector, lba int) {
	h := img[lba*sector:]
	array := binary.LittleEndian.Uint64(h[offArray:]) * uint64(sector)
	length := uint64(binary.LittleEndian.Uint32(h[offCount:])) * uint64(binary.LittleEndian.Uint32(h[offEntrySize:]))
	binary.LittleEndian.PutUint32(h[offArrayCRC:], crc32.ChecksumIEEE(img[array:array+length]))
	sealHeader(img, sector, lba)
}

func mem(img []byte) blockdev.Device { return blockdev.NewMem(img, 512) }

func wantErr(t *testing.T, err, want error) {
	t.Helper()
	if !errors.Is(err, want) {
		t.Fatalf("error is %v, want %v", err, want)
	}
}

func mustRead(t *testing.T, img []byte) *Table {
	t.Helper()
	table, err := Read(mem(img))
	if err != nil {
		t.Fatal(err)
	}
	return table
}

// fat fills b with a boot sector and root directory that have the given serial and label, as mkfs.fat makes them for
// FAT12.
func fat(b []byte, serial uint32, label string) {
	le := binary.LittleEndian
	copy(b, "\xeb\x3c\x90mkfs.fat")
	le.PutUint16(b[11:], 512)
	b[13] = 1
	le.PutUint16(b[14:], 1)
	b[16] = 2
	le.PutUint16(b[17:], 16)
	le.PutUint16(b[19:], uint16(min(len(b)/512, 0xffff)))
	b[21] = 0xf8
	le.PutUint16(b[22:], 1)
	b[38] = 0x29
	le.PutUint32(b[39:], serial)
	copy(b[43:54], "NO NAME    ")
	b[510], b[511] = 0x55, 0xaa
	root := b[3*512:]
	copy(root, "FILE    TXT\x20")
	if label != "" {
		copy(root[32:], fmt.Sprintf("%-11s\x08", label))
	}
}
