package gpt

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"io/fs"
	"time"

	diskfs "github.com/diskfs/go-diskfs/partition/gpt"
	"github.com/google/uuid"

	"espmirror/blockdev"
)

// Read returns the partition table of a whole disk or image.
//
// Both the sector size that the device reports and the other usual one are tried, for an image file does not know that
// it was made for a disk with 4096-byte sectors. The primary table counts; when it is damaged, the backup at the end of
// the disk, or where the primary header says that it is. A copy that is damaged or differs, and entries that cannot be
// used, are reported in Table.Problems.
//
// Without a protective MBR the partitions of the MBR count, if there are any. A protective MBR itself is no table: with
// both GPT headers bad, Read returns ErrDamaged. A device without any table gives ErrNoTable.
func Read(d blockdev.Device) (*Table, error) {
	t, err := read(d)
	if err != nil {
		return nil, fmt.Errorf("cannot read partition table: %w", err)
	}
	return t, nil
}

func read(d blockdev.Device) (*Table, error) {
	if d.Size() < 512 {
		return nil, ErrNoTable
	}
	mbr := make([]byte, 512)
	if _, err := d.ReadAt(mbr, 0); err != nil {
		return nil, err
	}
	protective := isProtective(mbr)

	// A boot sector of FAT with no protective entry is a volume, even when an older life of the disk left a backup
	// table at its end.
	if !protective && fatBootSector(mbr) {
		return nil, fmt.Errorf("%w: the whole device is one FAT volume", ErrNoTable)
	}

	var damage []error // what is wrong with what looks like a table
	note := func(sector int, which string, err error) {
		if !errors.Is(err, errNoHeader) {
			damage = append(damage, fmt.Errorf("%s table (%d-byte sectors): %w", which, sector, err))
		}
	}
	sizes := sectorSizes(d)

	// Without a protective entry the kernel and the firmware go by the MBR, if it has partitions; so do we.
	if !protective {
		if t, err := readMBR(d, mbr); err == nil {
			for _, sector := range sizes {
				if _, err := readHeader(d, sector, 1); !errors.Is(err, errNoHeader) {
					t.Problems = append(t.Problems, "there is a GPT as well, which counts for nothing without a protective MBR")
					break
				}
			}
			return t, nil
		}
	}
	for _, sector := range sizes {
		h, err := readHeader(d, sector, 1)
		if err == nil {
			t, err := decode(h, d, sector)
			if err != nil {
				return nil, err
			}
			checkBackup(t, h, d, sector)
			checkProtective(t, mbr)
			return t, nil
		}
		note(sector, "primary", err)
	}
	for _, sector := range sizes {
		for _, lba := range backupPlaces(d, sector) {
			h, err := readHeader(d, sector, lba)
			if err != nil {
				note(sector, "backup", err)
				continue
			}
			// The backup of a table that this disk no longer has must not bring it back to life.
			if !protective && len(damage) == 0 {
				note(sector, "backup", ErrBackupOnly)
				continue
			}
			t, err := decode(h, d, sector)
			if err != nil {
				return nil, err
			}
			t.FromBackup = true
			t.Problems = append([]string{"the primary table is damaged, the backup is used"}, t.Problems...)
			for _, e := range damage {
				t.Problems = append(t.Problems, e.Error())
			}
			checkProtective(t, mbr)
			return t, nil
		}
	}
	switch {
	case len(damage) > 0:
		return nil, fmt.Errorf("%w: %w", ErrDamaged, errors.Join(damage...))
	case protective:
		return nil, fmt.Errorf("%w: there is a protective MBR, and neither of the GPT headers it protects", ErrDamaged)
	}
	return readMBR(d, mbr)
}

// sectorSizes returns the sector sizes to try, the likely one first.
func sectorSizes(d blockdev.Device) []int {
	if d.SectorSize() == 4096 {
		return []int{4096, 512}
	}
	return []int{512, 4096}
}

// backupPlaces returns the LBAs where the backup header may be. The word of a damaged primary header is only a hint; so
// is the end of the disk, which moves when a disk is cloned to a bigger one.
func backupPlaces(d blockdev.Device, sector int) []uint64 {
	sectors := uint64(d.Size()) / uint64(sector)
	if sectors < 3 {
		return nil
	}
	places := []uint64{sectors - 1}
	raw := make([]byte, sector)
	if _, err := d.ReadAt(raw, int64(sector)); err == nil && bytes.HasPrefix(raw, []byte(signature)) {
		if alt := binary.LittleEndian.Uint64(raw[offAlternate:]); alt > 1 && alt < sectors-1 {
			places = append(places, alt)
		}
	}
	return places
}

// checkBackup reports what is wrong with the backup of a good primary table.
func checkBackup(t *Table, h *header, d blockdev.Device, sector int) {
	last := uint64(d.Size())/uint64(sector) - 1
	switch {
	case h.alt > last:
		t.Problems = append(t.Problems, fmt.Sprintf("the backup table should be at LBA %d, and the disk ends at LBA %d: it was cut, or copied to a smaller disk", h.alt, last))
		return
	case h.alt < last:
		t.Grown = fmt.Sprintf("the backup table is at LBA %d and not at the end of the disk, LBA %d", h.alt, last)
		t.Problems = append(t.Problems, t.Grown)
	}
	b, err := readHeader(d, sector, h.alt)
	switch {
	case err != nil:
		t.Problems = append(t.Problems, fmt.Sprintf("the backup table is damaged: %v", err))
	case !h.sameTable(b):
		t.Problems = append(t.Problems, "the backup table differs from the primary table")
	}
}

// checkProtective reports a missing protective MBR, without which firmware may look no further, and one that neither Linux
// (block/partitions/efi.c, pmbr_part_valid) nor firmware takes for one.
func checkProtective(t *Table, mbr []byte) {
	if !isProtective(mbr) {
		t.Problems = append(t.Problems, "there is no protective MBR: firmware may not see the table")
		return
	}
	for i := range mbrEntryCount {
		if e := mbrEntry(mbr, i); e[4] == mbrTypeGPT && binary.LittleEndian.Uint32(e[8:]) == 1 {
			return
		}
	}
	t.Problems = append(t.Problems, "the partition of the protective MBR does not begin at LBA 1: firmware may not see the table")
}

// decode turns a checked header into a table, with go-diskfs as the decoder.
func decode(h *header, d blockdev.Device, sector int) (t *Table, err error) {
	t = &Table{SectorSize: sector, first: int64(h.first) * int64(sector), end: (int64(h.last) + 1) * int64(sector)}

	// Entries that no reader may use are reported and left out, as the kernel leaves them out.
	usable := map[int]bool{}
	for i := range h.count {
		e := h.entry(i)
		if allZero(e[offEntryType:offEntryGUID]) {
			continue
		}
		start, end := binary.LittleEndian.Uint64(e[offEntryStart:]), binary.LittleEndian.Uint64(e[offEntryEnd:])
		if start > end || start < h.first || end > h.last {
			t.Problems = append(t.Problems, fmt.Sprintf("partition %d, LBA %d to %d, is not inside the usable LBAs %d to %d, and is ignored", i+1, start, end, h.first, h.last))
			continue
		}
		usable[i+1] = true
	}

	table, err := decodeByLibrary(h, sector)
	if err != nil {
		return nil, err
	}
	if t.DiskGUID, err = uuid.Parse(table.GUID); err != nil {
		return nil, fmt.Errorf("%w: disk GUID: %w", ErrDamaged, err)
	}
	for _, p := range table.Partitions {
		if !usable[p.Index] {
			continue
		}
		q := Partition{Number: p.Index, Name: p.Name, Attributes: p.Attributes,
			Start: int64(p.Start) * int64(sector), Size: int64(p.End-p.Start+1) * int64(sector)}
		if q.Type, err = uuid.Parse(string(p.Type)); err != nil {
			return nil, fmt.Errorf("%w: type of partition %d: %w", ErrDamaged, p.Index, err)
		}
		if q.GUID, err = uuid.Parse(p.GUID); err != nil {
			return nil, fmt.Errorf("%w: GUID of partition %d: %w", ErrDamaged, p.Index, err)
		}
		// The bounds come from the library; that it decodes as we do is not left to trust.
		if q.Start < 0 || q.Size <= 0 || q.Start > d.Size()-q.Size {
			return nil, fmt.Errorf("internal error: partition %d at 0x%x, 0x%x bytes, is outside the disk", q.Number, q.Start, q.Size)
		}
		t.Partitions = append(t.Partitions, q)
	}
	t.findConflicts()
	return t, nil
}

// findConflicts reports partitions that overlap and GUIDs that occur twice.
func (t *Table) findConflicts() {
	for i := range t.Partitions {
		a := &t.Partitions[i]
		for j := range t.Partitions[:i] {
			b := &t.Partitions[j]
			if a.Start < b.End() && b.Start < a.End() {
				a.Overlaps, b.Overlaps = append(a.Overlaps, b.Number), append(b.Overlaps, a.Number)
				t.Problems = append(t.Problems, fmt.Sprintf("partitions %d and %d overlap", b.Number, a.Number))
			}
			if !t.MBR && a.GUID == b.GUID {
				t.Problems = append(t.Problems, fmt.Sprintf("partitions %d and %d have the same GUID %s", b.Number, a.Number, a.GUID))
			}
		}
	}
}

// decodeByLibrary gives the library a table of its own kind: header size 92, entries of 128 bytes (a longer entry only
// adds fields that nobody has defined), as the primary table at LBA 1, in memory. It so never reads what was not
// checked, cannot be shown other bytes than we were, and takes backups from any place.
func decodeByLibrary(h *header, sector int) (t *diskfs.Table, err error) {
	defer func() {
		if r := recover(); r != nil {
			t, err = nil, fmt.Errorf("%w: go-diskfs gave up: %v", ErrDamaged, r)
		}
	}()
	le := binary.LittleEndian
	image := make([]byte, 2*sector+h.count*entrySize)
	for i := range h.count {
		copy(image[2*sector+i*entrySize:][:entrySize], h.entry(i))
	}
	raw := image[sector : sector+headerSize]
	copy(raw, h.raw)
	le.PutUint32(raw[offSize:], headerSize)
	le.PutUint32(raw[offReserved:], 0)
	le.PutUint64(raw[offMyLBA:], 1)
	le.PutUint64(raw[offArray:], 2)
	le.PutUint32(raw[offEntrySize:], entrySize)
	le.PutUint32(raw[offArrayCRC:], crc32.ChecksumIEEE(image[2*sector:]))
	le.PutUint32(raw[offCRC:], 0)
	le.PutUint32(raw[offCRC:], crc32.ChecksumIEEE(raw))
	t, err = diskfs.Read(&memFile{Reader: bytes.NewReader(image)}, sector, sector)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrDamaged, err)
	}
	if t.RecoveredFromBackup {
		return nil, fmt.Errorf("internal error: go-diskfs refused the table that was made for it")
	}
	return t, nil
}

// allZero says whether b holds only zeros.
func allZero(b []byte) bool {
	for _, v := range b {
		if v != 0 {
			return false
		}
	}
	return true
}

// memFile is a file in memory as go-diskfs wants it.
type memFile struct{ *bytes.Reader }

func (f *memFile) Stat() (fs.FileInfo, error) { return memInfo{f.Reader.Size()}, nil }
func (f *memFile) Close() error               { return nil }

type memInfo struct{ size int64 }

func (i memInfo) Name() string       { return "table" }
func (i memInfo) Size() int64        { return i.size }
func (i memInfo) Mode() fs.FileMode  { return 0o444 }
func (i memInfo) ModTime() time.Time { return time.Time{} }
func (i memInfo) IsDir() bool        { return false }
func (i memInfo) Sys() any           { return nil }

var _ io.ReaderAt = (*memFile)(nil)
