package gpt

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"espmirror/blockdev"
)

const mib = 1 << 20

func TestReadBothSectorSizes(t *testing.T) {
	for _, sector := range []int{512, 4096} {
		xbootldr := part{5, TypeXBOOTLDR.String(), guid(5), "XBOOTLDR ä𝄞", 3 * mib, mib}
		img := memImage(t, 8*mib, sector, esp(1, mib, mib), xbootldr)
		for _, reported := range []int{512, 4096} {
			table, err := Read(blockdev.NewMem(img, reported))
			if err != nil {
				t.Fatal(err)
			}
			if table.SectorSize != sector || table.FromBackup || table.MBR || table.DiskGUID.String() != testDisk || len(table.Problems) != 0 || len(table.Partitions) != 2 {
				t.Fatalf("%+v", table)
			}
			p := table.Partitions[1]
			if p.Number != 5 || p.Type != TypeXBOOTLDR || p.GUID.String() != guid(5) || p.Name != xbootldr.name || p.Start != 3*mib || p.Size != mib || p.Attributes != 1 || p.Overlaps != nil {
				t.Errorf("%+v", p)
			}
			if p.PARTUUID() != guid(5) || p.TypeName() != "XBOOTLDR" || table.Partitions[0].TypeName() != "ESP" {
				t.Error(p.PARTUUID(), p.TypeName())
			}
			if table.Find(5) == nil || table.Find(2) != nil || len(table.OfType(TypeESP)) != 1 {
				t.Error("Find or OfType")
			}
		}
	}
}

// TestReadSgdisk reads a table of another hand.
func TestReadSgdisk(t *testing.T) {
	path := filepath.Join(t.TempDir(), "disk.img")
	if err := os.WriteFile(path, make([]byte, 16*mib), 0o600); err != nil {
		t.Fatal(err)
	}
	tool(t, "sgdisk", "-U", testDisk, "-n", "3:2048:+4M", "-t", "3:EF00", "-u", "3:"+guid(3), "-c", "3:my esp", "-A", "3:set:2",
		"-n", "1:12288:+1M", "-t", "1:EA00", "-n", "2:0:0", "-t", "2:8300", path)
	img, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	table := mustRead(t, img)
	if len(table.Partitions) != 3 || len(table.Problems) != 0 || table.DiskGUID.String() != testDisk {
		t.Fatalf("%+v", table)
	}
	p := table.Find(3)
	if p.Type != TypeESP || p.GUID.String() != guid(3) || p.Name != "my esp" || p.Start != mib || p.Size != 4*mib || p.Attributes != 4 {
		t.Errorf("%+v", p)
	}
	if table.Find(1).Type != TypeXBOOTLDR {
		t.Errorf("%+v", table.Find(1))
	}

	// sgdisk agrees on what a damaged primary means.
	clear(img[512:1024])
	if table = mustRead(t, img); !table.FromBackup || len(table.Partitions) != 3 {
		t.Errorf("%+v", table)
	}
}

// TestReadLargeTable: a table with more entries than usual, made by sgdisk.
func TestReadLargeTable(t *testing.T) {
	path := filepath.Join(t.TempDir(), "disk.img")
	if err := os.WriteFile(path, make([]byte, 16*mib), 0o600); err != nil {
		t.Fatal(err)
	}
	tool(t, "sgdisk", "-S", "256", "-n", "200:4096:+1M", "-t", "200:EF00", path)
	img, _ := os.ReadFile(path)
	if p := mustRead(t, img).Find(200); p == nil || p.Start != 2*mib {
		t.Errorf("%+v", p)
	}
}

// TestDamage breaks one copy or both, and says what must come of it.
func TestDamage(t *testing.T) {
	const last = 8*mib/512 - 1
	le := binary.LittleEndian
	field32 := func(lba, off int, v uint32) func([]byte) {
		return func(img []byte) {
			le.PutUint32(img[lba*512+off:], v)
			sealHeader(img, 512, lba)
		}
	}
	field64 := func(lba, off int, v uint64) func([]byte) {
		return func(img []byte) {
			le.PutUint64(img[lba*512+off:], v)
			sealHeader(img, 512, lba)
		}
	}
	for name, damage := range map[string]func([]byte){
		"signature":               func(img []byte) { img[512] = 'X' },
		"zeroed":                  func(img []byte) { clear(img[512:1024]) },
		"CRC":                     func(img []byte) { img[512+offCRC] ^= 1 },
		"revision":                field32(1, offRevision, 0x00020000),
		"header size below":       field32(1, offSize, 91),
		"header size above":       field32(1, offSize, 513),
		"header size huge":        field32(1, offSize, 0xffffffff),
		"my LBA":                  field64(1, offMyLBA, 2),
		"no entries":              field32(1, offCount, 0),
		"too many entries":        field32(1, offCount, 1025),
		"entries without end":     field32(1, offCount, 0xffffffff),
		"entry size 0":            field32(1, offEntrySize, 0),
		"entry size 64":           field32(1, offEntrySize, 64),
		"entry size 192":          field32(1, offEntrySize, 192),
		"entry size huge":         field32(1, offEntrySize, 0x80000000),
		"array at LBA 0":          field64(1, offArray, 0),
		"array at LBA 1":          field64(1, offArray, 1),
		"array past the end":      field64(1, offArray, last+1),
		"array at the very end":   field64(1, offArray, last),
		"array at 2^63":           field64(1, offArray, 1<<63),
		"array at 2^64-1":         field64(1, offArray, 1<<64-1),
		"array in the usable":     field64(1, offArray, 4096),
		"array CRC":               func(img []byte) { img[1024+56] ^= 1 },
		"usable past the end":     field64(1, offLast, last+1),
		"usable upside down":      field64(1, offFirst, last-1),
		"usable over the header":  field64(1, offFirst, 1),
		"usable over the array":   field64(1, offFirst, 10),
		"usable to 2^64-1":        field64(1, offLast, 1<<64-1),
		"entry size 256 bad CRC":  field32(1, offEntrySize, 256),
		"usable LBA 0":            field64(1, offFirst, 0),
		"array in its own header": field64(1, offArray, 1),
	} {
		t.Run(name, func(t *testing.T) {
			img := memImage(t, 8*mib, 512, esp(1, mib, mib))
			damage(img)
			before := bytes.Clone(img)
			table := mustRead(t, img)
			if !table.FromBackup || len(table.Problems) == 0 || len(table.Partitions) != 1 || table.Partitions[0].Start != mib {
				t.Errorf("%+v", table)
			}
			if !bytes.Equal(img, before) {
				t.Error("reading wrote")
			}
			// Now the backup too: never the protective MBR as a table.
			clear(img[last*512:])
			_, err := Read(mem(img))
			wantErr(t, err, ErrDamaged)
		})
	}
}

func TestBadBackup(t *testing.T) {
	last := 8*mib/512 - 1
	good := memImage(t, 8*mib, 512, esp(1, mib, mib))
	for name, c := range map[string]struct {
		damage func([]byte) []byte
		want   string
	}{
		"header":  {func(img []byte) []byte { img[last*512+offCRC]++; return img }, "backup table is damaged"},
		"array":   {func(img []byte) []byte { img[(last-32)*512]++; return img }, "backup table is damaged"},
		"gone":    {func(img []byte) []byte { clear(img[last*512:]); return img }, "backup table is damaged"},
		"differs": {func(img []byte) []byte { img[(last-32)*512+56]++; sealArray(img, 512, last); return img }, "differs"},
		"grown":   {func(img []byte) []byte { return append(img, make([]byte, mib)...) }, "not at the end"},
		"cut":     {func(img []byte) []byte { return img[:len(img)-512] }, ""},
		"no PMBR": {func(img []byte) []byte { clear(img[:512]); return img }, "no protective MBR"},
	} {
		t.Run(name, func(t *testing.T) {
			table, err := Read(mem(c.damage(bytes.Clone(good))))
			if name == "cut" {
				// The usable area is still inside, so the table holds, and the loss is told.
				c.want = "it was cut"
			}
			if err != nil {
				t.Fatal(err)
			}
			if table.FromBackup || len(table.Partitions) != 1 || !strings.Contains(strings.Join(table.Problems, "\n"), c.want) {
				t.Errorf("%+v", table)
			}
		})
	}
}

// TestBackupElsewhere: the disk grew after the table was made, and then the primary was damaged. Only its AlternateLBA
// knows.
func TestBackupElsewhere(t *testing.T) {
	img := append(memImage(t, 8*mib, 512, esp(1, mib, mib)), make([]byte, mib)...)
	img[1024] ^= 1 // the array: the header still says where the backup is
	table := mustRead(t, img)
	if !table.FromBackup || len(table.Partitions) != 1 {
		t.Errorf("%+v", table)
	}
}

// TestStaleBackup: a backup that is all that is left of a table must not come back to life.
func TestStaleBackup(t *testing.T) {
	img := memImage(t, 8*mib, 512, esp(1, mib, mib))
	clear(img[:34*512])
	_, err := Read(mem(img))
	wantErr(t, err, ErrDamaged)
	if !strings.Contains(err.Error(), "stands alone") {
		t.Error(err)
	}
	// A volume was made over the whole disk.
	fat(img, 0x12345678, "DATA")
	_, err = Read(mem(img))
	wantErr(t, err, ErrNoTable)
	if !strings.Contains(err.Error(), "FAT") {
		t.Error(err)
	}
	// Or an MBR.
	mbr(img, 0xef, 2048, 2048)
	table := mustRead(t, img)
	if !table.MBR || len(table.Partitions) != 1 {
		t.Errorf("%+v", table)
	}
}

// mbr writes an MBR with one partition, in sectors.
func mbr(img []byte, typ byte, start, size uint32) {
	clear(img[:512])
	binary.LittleEndian.PutUint32(img[mbrDiskSignature:], 0xdeadbeef)
	e := mbrEntry(img, 0)
	e[4] = typ
	binary.LittleEndian.PutUint32(e[8:], start)
	binary.LittleEndian.PutUint32(e[12:], size)
	img[510], img[511] = 0x55, 0xaa
}

func TestMBR(t *testing.T) {
	img := make([]byte, 4*mib)
	mbr(img, mbrTypeESP, 2048, 1024)
	second := mbrEntry(img, 1)
	second[4] = 0x0c
	binary.LittleEndian.PutUint32(second[8:], 1<<31)
	binary.LittleEndian.PutUint32(second[12:], 1<<31)
	third := mbrEntry(img, 2)
	third[4] = 0x83
	binary.LittleEndian.PutUint32(third[8:], 2049)
	binary.LittleEndian.PutUint32(third[12:], 1)
	table := mustRead(t, img)
	if !table.MBR || len(table.Partitions) != 2 || len(table.Problems) != 2 {
		t.Fatalf("%+v", table)
	}
	p := table.Partitions[0]
	if p.Type != TypeESP || p.PARTUUID() != "deadbeef-01" || p.Start != mib || p.Size != mib/2 || len(p.Overlaps) != 1 {
		t.Errorf("%+v", p)
	}
	if name := table.Partitions[1].TypeName(); name != "MBR type 0x83" {
		t.Error(name)
	}

	mbr(img, mbrTypeXBOOTLDR, 2048, 1024)
	if table = mustRead(t, img); table.Partitions[0].Type != TypeXBOOTLDR {
		t.Errorf("%+v", table)
	}
	for name, spoil := range map[string]func(){
		"boot code":    func() { mbrEntry(img, 0)[0] = 0x33 },
		"no signature": func() { img[510] = 0 },
		"empty":        func() { mbrEntry(img, 0)[4] = 0 },
		"zero start":   func() { binary.LittleEndian.PutUint32(mbrEntry(img, 0)[8:], 0) },
	} {
		mbr(img, mbrTypeESP, 2048, 1024)
		spoil()
		if _, err := Read(mem(img)); !errors.Is(err, ErrNoTable) {
			t.Errorf("%s: %v", name, err)
		}
	}
	mbr(img, mbrTypeGPT, 1, 0xffffffff)
	_, err := Read(mem(img))
	wantErr(t, err, ErrDamaged)
	if !strings.Contains(err.Error(), "protective MBR") {
		t.Error(err)
	}

	// A GPT whose protective MBR was replaced by a real one.
	img = memImage(t, 8*mib, 512, esp(1, mib, mib))
	mbr(img, mbrTypeESP, 4096, 1024)
	if table = mustRead(t, img); !table.MBR || len(table.Problems) != 1 || table.Partitions[0].Start != 2*mib {
		t.Errorf("%+v", table)
	}
}

func TestNoTable(t *testing.T) {
	for _, n := range []int{0, 1, 511, 512, 1024, 4096, 8192, mib} {
		_, err := Read(mem(make([]byte, n)))
		wantErr(t, err, ErrNoTable)
	}
}

// TestBadEntries: what cannot be used is left out, what shares bytes is marked.
func TestBadEntries(t *testing.T) {
	le := binary.LittleEndian
	for name, c := range map[string]struct {
		start, end uint64
		kept       bool
	}{
		"upside down":         {5000, 4999, false},
		"start 0":             {0, 5000, false},
		"in the array":        {33, 5000, false},
		"past the usable":     {5000, 8*mib/512 - 1, false},
		"past the disk":       {5000, 1 << 40, false},
		"everything":          {0, 1<<64 - 1, false},
		"overflowing size":    {1, 0, false},
		"first usable sector": {34, 34, true},
		"overlapping":         {2048, 2048, true},
	} {
		t.Run(name, func(t *testing.T) {
			img := memImage(t, 8*mib, 512, esp(1, mib, mib), esp(2, 3*mib, mib))
			e := img[1024+entrySize:]
			le.PutUint64(e[offEntryStart:], c.start)
			le.PutUint64(e[offEntryEnd:], c.end)
			sealArray(img, 512, 1)
			table := mustRead(t, img)
			if got := table.Find(2) != nil; got != c.kept || table.Find(1) == nil || len(table.Problems) == 0 {
				t.Errorf("%+v", table)
			}
			overlaps := len(table.Find(1).Overlaps) == 1 && table.Find(1).Overlaps[0] == 2
			if overlaps != (name == "overlapping") {
				t.Errorf("%+v", table)
			}
		})
	}
}

func TestDuplicateGUIDs(t *testing.T) {
	a, b := esp(1, mib, mib), esp(2, 3*mib, mib)
	b.guid = a.guid
	table := mustRead(t, memImage(t, 8*mib, 512, a, b))
	if len(table.Problems) != 1 || !strings.Contains(table.Problems[0], "same GUID") {
		t.Error(table.Problems)
	}
}

// TestLongerHeadersAndEntries: both may be longer than today's, by the specification. go-diskfs refuses them, we do not.
func TestLongerHeadersAndEntries(t *testing.T) {
	img := memImage(t, 8*mib, 512, esp(1, mib, mib), esp(3, 3*mib, mib))
	old := bytes.Clone(img[1024 : 1024+64*entrySize])
	for i := range 64 {
		copy(img[1024+i*256:], old[i*entrySize:(i+1)*entrySize])
		for j := range entrySize {
			img[1024+i*256+entrySize+j] = 0xee
		}
	}
	h := img[512:]
	binary.LittleEndian.PutUint32(h[offSize:], 512)
	binary.LittleEndian.PutUint32(h[offCount:], 64)
	binary.LittleEndian.PutUint32(h[offEntrySize:], 256)
	binary.LittleEndian.PutUint32(h[offReserved:], 7) // go-diskfs insists on zero
	h[500] = 9
	sealArray(img, 512, 1)
	table := mustRead(t, img)
	if table.FromBackup || len(table.Partitions) != 2 || table.Find(3).Start != 3*mib || table.Find(3).Name != "ESP 3" {
		t.Errorf("%+v", table)
	}
}

// TestReadFaults makes every read fail in its turn: a table, or an error, and never a table of fewer partitions.
func TestReadFaults(t *testing.T) {
	img := memImage(t, 8*mib, 512, esp(1, mib, mib))
	for k := 0; ; k++ {
		n, hit := 0, false
		d := blockdev.NewFaulty(mem(img), func(blockdev.Op) error {
			n++
			if n-1 == k {
				hit = true
				return fmt.Errorf("read %d: %w", k, syscall.EIO)
			}
			return nil
		})
		table, err := Read(d)
		if !hit {
			if k < 5 {
				t.Error("only", k, "reads")
			}
			break
		}
		switch {
		case err != nil && !errors.Is(err, syscall.EIO):
			t.Errorf("read %d: %v", k, err)
		case err == nil && (len(table.Partitions) != 1 || len(table.Problems) == 0):
			t.Errorf("read %d: %+v", k, table)
		}
	}
	dead := blockdev.NewFaulty(mem(img), func(op blockdev.Op) error {
		if op.Off > 0 {
			return syscall.EIO
		}
		return nil
	})
	_, err := Read(dead)
	wantErr(t, err, ErrDamaged)
	wantErr(t, err, syscall.EIO)
}

// FuzzRead takes the parts of an image that count, short as they are, and lays them out: whole images would be so long
// that the fuzzer spends its time on making them shorter. CRCs can be made right, for no fuzzer guesses them.
func FuzzRead(f *testing.F) {
	const parts = 2 // entries in the seeds
	img := memImage(f, 100*512, 512, part{1, TypeESP.String(), guid(1), "a", 34 * 512, 512}, part{2, typeData, guid(2), "b", 36 * 512, 1024})
	head := func(off int, value uint32) []byte {
		h := bytes.Clone(img[512 : 512+headerSize])
		binary.LittleEndian.PutUint32(h[offCount:], parts)
		if off > 0 {
			binary.LittleEndian.PutUint32(h[off:], value)
		}
		return h
	}
	table, entries, tail := img[mbrEntries:512], img[1024:1024+parts*entrySize], img[99*512:99*512+headerSize]
	f.Add(table, head(0, 0), entries, tail, uint8(100), true)
	f.Add(table, head(offCount, 0xffffffff), entries, tail, uint8(100), true)
	f.Add(table, head(offEntrySize, 0x80000000), entries, tail, uint8(100), true)
	f.Add(table, head(offEntrySize, 256), entries, tail, uint8(100), true)
	f.Add(table, head(offArray, 0xfffffff0), entries, tail, uint8(100), true)
	f.Add(table, head(offSize, 512), entries, tail, uint8(100), true)
	f.Add(table, []byte{}, []byte{}, tail, uint8(100), false)
	f.Add(table, []byte{}, []byte{}, []byte{}, uint8(1), false)
	old := make([]byte, 512)
	mbr(old, mbrTypeESP, 4, 4)
	f.Add(old[mbrEntries:], []byte{}, []byte{}, []byte{}, uint8(9), false)
	f.Fuzz(func(t *testing.T, table, head, entries, tail []byte, sectors uint8, seal bool) {
		img := make([]byte, int(sectors)*512)
		place := func(off int, b []byte) {
			if off >= 0 && off < len(img) {
				copy(img[off:], b)
			}
		}
		place(mbrEntries, table)
		place(1024, entries)
		place(len(img)-512, tail)
		place(512, head)
		if seal && len(img) >= 1024 {
			h := img[512:]
			array := binary.LittleEndian.Uint64(h[offArray:])
			length := uint64(binary.LittleEndian.Uint32(h[offCount:])) * uint64(binary.LittleEndian.Uint32(h[offEntrySize:]))
			if array < uint64(len(img))/512 && length <= uint64(len(img))-array*512 {
				sealArray(img, 512, 1)
			} else {
				sealHeader(img, 512, 1)
			}
		}
		d := mem(img)
		before := bytes.Clone(img)
		found, err := Read(d)
		if _, perr := Probe(d); perr != nil {
			t.Error(perr)
		}
		_, _, _, _ = identity(d)
		if !bytes.Equal(img, before) {
			t.Error("the device was written")
		}
		if err != nil {
			if !errors.Is(err, ErrNoTable) && !errors.Is(err, ErrDamaged) || strings.Contains(err.Error(), "internal error") {
				t.Error(err)
			}
			return
		}
		for _, p := range found.Partitions {
			if p.Start <= 0 || p.Size <= 0 || p.Start > int64(len(img))-p.Size || p.Number < 1 {
				t.Errorf("%+v", p)
			}
		}
	})
}
