package gpt

import (
	"bytes"
	"encoding/binary"
	"fmt"

	"github.com/google/uuid"

	"espmirror/blockdev"
)

// UEFI specification, "Legacy Master Boot Record (MBR)". Part of the on-disk format.
const (
	mbrDiskSignature = 440
	mbrEntries       = 446
	mbrEntrySize     = 16
	mbrEntryCount    = 4
	mbrTypeGPT       = 0xee
	mbrTypeESP       = 0xef
	mbrTypeXBOOTLDR  = 0xea
)

// mbrEntry returns entry i of a first sector.
func mbrEntry(sector []byte, i int) []byte {
	return sector[mbrEntries+i*mbrEntrySize:][:mbrEntrySize]
}

// hasMBRSignature says whether a first sector ends in 55 AA.
func hasMBRSignature(sector []byte) bool { return sector[510] == 0x55 && sector[511] == 0xaa }

// isProtective says whether a first sector says that the disk belongs to a GPT. One EE entry among others (a hybrid
// MBR) is enough.
func isProtective(sector []byte) bool {
	if !hasMBRSignature(sector) {
		return false
	}
	for i := range mbrEntryCount {
		if mbrEntry(sector, i)[4] == mbrTypeGPT {
			return true
		}
	}
	return false
}

// protectiveMBR is the first sector of a disk with a GPT. UEFI specification, "Protective MBR": one entry from the second
// sector on, whose CHS address is 00 02 00, as long as the disk less that sector, or FFFFFFFF where this does not fit.
func protectiveMBR(size int64, sector int) []byte {
	b := make([]byte, sector)
	e := mbrEntry(b, 0)
	copy(e, []byte{0, 0x00, 0x02, 0x00, mbrTypeGPT, 0xff, 0xff, 0xff, 1, 0, 0, 0})
	binary.LittleEndian.PutUint32(e[12:], uint32(min(size/int64(sector)-1, 0xffffffff)))
	b[510], b[511] = 0x55, 0xaa
	return b
}

// sameProtection says whether two protective MBRs differ in the CHS addresses at most, which nobody reads.
func sameProtection(a, b []byte) bool {
	a, b = bytes.Clone(a), bytes.Clone(b)
	for _, s := range [][]byte{a, b} {
		clear(mbrEntry(s, 0)[1:4])
		clear(mbrEntry(s, 0)[5:8])
	}
	return bytes.Equal(a, b)
}

// readMBR returns the primary partitions of a plain MBR. Logical partitions are not looked for: firmware takes no ESP
// from an extended partition.
func readMBR(d blockdev.Device, sector []byte) (*Table, error) {
	if !hasMBRSignature(sector) {
		return nil, ErrNoTable
	}
	t := &Table{MBR: true, SectorSize: d.SectorSize()}
	disk := binary.LittleEndian.Uint32(sector[mbrDiskSignature:])
	for i := range mbrEntryCount {
		e := mbrEntry(sector, i)
		if e[0]&0x7f != 0 {
			// Not a table but a boot sector of something else, whose code stands where the table would.
			return nil, fmt.Errorf("%w: the first sector ends in 55 AA, but holds no partitions", ErrNoTable)
		}
		if e[4] == 0 {
			continue
		}
		start := int64(binary.LittleEndian.Uint32(e[8:])) * int64(t.SectorSize)
		size := int64(binary.LittleEndian.Uint32(e[12:])) * int64(t.SectorSize)
		if start == 0 || size == 0 || start > d.Size()-size {
			t.Problems = append(t.Problems, fmt.Sprintf("partition %d, 0x%x bytes at offset 0x%x, is not inside the disk, and is ignored", i+1, size, start))
			continue
		}
		p := Partition{Number: i + 1, Start: start, Size: size, MBRType: e[4], mbrDisk: disk}
		switch e[4] {
		case mbrTypeESP:
			p.Type = TypeESP
		case mbrTypeXBOOTLDR:
			p.Type = TypeXBOOTLDR
		default:
			p.Type = uuid.Nil
		}
		t.Partitions = append(t.Partitions, p)
	}
	if len(t.Partitions) == 0 {
		return nil, fmt.Errorf("%w: the MBR names no partition that could be used", ErrNoTable)
	}
	t.findConflicts()
	return t, nil
}
