package gpt

import (
	"bytes"
	"cmp"
	"crypto/rand"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"io/fs"
	"slices"
	"strings"
	"unicode/utf16"
	"unicode/utf8"

	diskfs "github.com/diskfs/go-diskfs/partition/gpt"
	"github.com/google/uuid"

	"espmirror/blockdev"
)

var (
	// ErrNoRoom is returned when a partition does not fit on a disk, or a table has no entry left for it, or another one with
	// its GUID.
	ErrNoRoom = errors.New("there is no room")

	// ErrUnsound is returned by what changes a table that is not as it should be in all its parts. The table was not touched.
	ErrUnsound = errors.New("the partition table is not sound")
)

// Align is the boundary, in bytes, at which partitions begin and end: a multiple of every physical sector, and of what
// nearly all RAID stripes and erase blocks are made of.
const Align = 1 << 20

// maxName is the length of a partition's name in UTF-16 units. UEFI specification, "GPT Partition Entry".
const maxName = 36

// tableSize is the number of bytes of a new table's entry array: 128 entries, the least that the UEFI specification allows
// ("GPT overview": at least 16,384 bytes).
const tableSize = 128 * entrySize

// Usable returns the range of a disk, in bytes, that a new table leaves to partitions.
func Usable(size int64, sector int) (first, end int64) {
	array := int64(tableSize)
	return 2*int64(sector) + array, size/int64(sector)*int64(sector) - int64(sector) - array
}

// Extent is a range of bytes on a disk.
type Extent struct{ Start, Size int64 }

// End returns the first byte after the extent.
func (e Extent) End() int64 { return e.Start + e.Size }

// FreeExtents returns the aligned parts of a disk that no partition of t has, in their order. The last one ends where the
// usable part ends, rounded down. t may be nil: then it is that of a new table. A table with Problems has entries that are
// not among its partitions: what it leaves free is not to be relied on, and Insert refuses it.
func FreeExtents(size int64, sector int, t *Table) []Extent {
	first, end := Usable(size, sector)
	var taken []Extent
	if t != nil {
		if t.first > 0 {
			first, end = t.first, min(t.end, end)
		}
		for i := range t.Partitions {
			taken = append(taken, Extent{t.Partitions[i].Start, t.Partitions[i].Size})
		}
	}
	slices.SortFunc(taken, func(a, b Extent) int { return cmp.Compare(a.Start, b.Start) })
	var free []Extent
	add := func(from, to int64) {
		from, to = (from+Align-1)/Align*Align, to/Align*Align
		if from < to {
			free = append(free, Extent{from, to - from})
		}
	}
	for _, e := range taken {
		add(first, min(e.Start, end))
		first = max(first, e.End())
	}
	add(first, end)
	return free
}

// Create gives a disk a new table with these partitions, of which Number, Type, GUID, Name, Start, Size and Attributes
// count. The caller has cleared what was there: in the sectors of the headers and of the protective MBR are zeros.
//
// The bytes are go-diskfs's, the order is ours: first both entry arrays, which nobody takes for anything; then the primary
// header without its first byte, and with it, from when on there is a table; then its backup; and last the protective MBR,
// without which firmware and Linux do not look at the rest. So a cut leaves no table, or one that Read takes and Complete
// finishes, also where it tears a sector.
func Create(d blockdev.Device, disk uuid.UUID, parts []Partition) error {
	w, err := planCreate(d.Size(), d.SectorSize(), disk, parts)
	if err != nil {
		return fmt.Errorf("cannot make a partition table: %w", err)
	}
	for _, step := range w {
		for _, b := range step.writes {
			if _, err := d.WriteAt(b.data, b.off); err != nil {
				return fmt.Errorf("cannot write %s: %w", step.what, err)
			}
		}
		// Barrier: each step is only of use behind the one before it.
		if err := d.Flush(); err != nil {
			return fmt.Errorf("cannot flush %s: %w", step.what, err)
		}
	}
	return nil
}

// tableWrite is one write of a table; tableStep are those between two flushes.
type tableWrite struct {
	off  int64
	data []byte
}

type tableStep struct {
	what   string
	writes []tableWrite
}

// planCreate has go-diskfs write the table into memory, checks it as any other table is checked, and puts the writes into
// our order.
func planCreate(size int64, sector int, disk uuid.UUID, parts []Partition) ([]tableStep, error) {
	first, end := Usable(size, sector)
	t := &diskfs.Table{LogicalSectorSize: sector, PhysicalSectorSize: sector, GUID: disk.String(), ProtectiveMBR: true}
	for i := range parts {
		p := &parts[i]
		switch {
		case p.Start < first || p.Size <= 0 || p.Start > end-p.Size:
			return nil, fmt.Errorf("%w: partition %d, 0x%x bytes at 0x%x, is not between 0x%x and 0x%x", ErrNoRoom, p.Number, p.Size, p.Start, first, end)
		case p.Start%int64(sector) != 0 || p.Size%int64(sector) != 0:
			return nil, fmt.Errorf("%w: partition %d, 0x%x bytes at 0x%x, is not made of sectors of %d bytes", ErrNoRoom, p.Number, p.Size, p.Start, sector)
		}
		if err := CheckName(p.Name); err != nil { // the library panics
			return nil, err
		}
		t.Partitions = append(t.Partitions, &diskfs.Partition{
			Index: p.Number, Type: diskfs.Type(p.Type.String()), GUID: p.GUID.String(), Name: p.Name, Attributes: p.Attributes,
			Start: uint64(p.Start) / uint64(sector), End: uint64(p.End())/uint64(sector) - 1,
		})
	}
	m := &memDisk{size: size}
	if err := t.Write(m, size); err != nil {
		return nil, err
	}
	if len(m.writes) != 5 {
		return nil, fmt.Errorf("internal error: go-diskfs wrote a table in %d pieces", len(m.writes))
	}
	o := blockdev.NewOverlay(blockdev.Blank(size, sector))
	for _, w := range m.writes {
		if _, err := o.WriteAt(w.data, w.off); err != nil {
			return nil, fmt.Errorf("internal error: go-diskfs: %w", err)
		}
	}
	// The library cuts off a size that does not fit into 32 bits, and leaves the CHS fields at zero.
	mbr := protectiveMBR(size, sector)
	if _, err := o.WriteAt(mbr, 0); err != nil {
		return nil, fmt.Errorf("internal error: %w", err)
	}
	got, err := read(o)
	if err == nil && len(got.Problems) > 0 {
		err = errors.New(got.Problems[0])
	}
	if err == nil && (got.DiskGUID != disk || len(got.Partitions) != len(parts)) {
		err = errors.New("it is not what was asked for")
	}
	if err != nil {
		return nil, fmt.Errorf("internal error: the new table is not valid: %w", err)
	}
	for i := range parts {
		p, q := &parts[i], got.Find(parts[i].Number)
		if q == nil || q.Type != p.Type || q.GUID != p.GUID || q.Start != p.Start || q.Size != p.Size || q.Name != p.Name || q.Attributes != p.Attributes {
			return nil, fmt.Errorf("internal error: partition %d of the new table is %+v, want %+v", p.Number, q, p)
		}
		if len(q.Overlaps) > 0 {
			return nil, fmt.Errorf("%w: partitions %d and %d overlap", ErrNoRoom, q.Number, q.Overlaps[0])
		}
	}
	header := m.writes[4]
	if header.off != int64(sector) || !bytes.HasPrefix(header.data, []byte(signature)) {
		return nil, fmt.Errorf("internal error: go-diskfs wrote the primary header at offset 0x%x", header.off)
	}
	silent := bytes.Clone(header.data)
	silent[0] = 0
	return []tableStep{
		{"the entry arrays", []tableWrite{m.writes[1], m.writes[3]}},
		// A header that is torn is a damaged table; one without the first byte is nothing, and that byte cannot be torn.
		{"the primary header without its first byte", []tableWrite{{header.off, silent}}},
		{"the primary header", []tableWrite{header}},
		{"the backup header", []tableWrite{m.writes[2]}},
		{"the protective MBR", []tableWrite{{0, mbr}}},
	}, nil
}

// CheckName says what is wrong with the name of a partition; nil when nothing is.
func CheckName(name string) error {
	if !utf8.ValidString(name) || strings.Contains(name, "\x00") {
		return fmt.Errorf("cannot name a partition %q: it is not UTF-8 without NULs", name) // a NUL ends it
	}
	if n := len(utf16.Encode([]rune(name))); n > maxName {
		return fmt.Errorf("cannot name a partition %q: it has %d UTF-16 units, at most %d fit", name, n, maxName)
	}
	return nil
}

// memDisk collects what go-diskfs writes: MBR, backup array and header, primary array and header.
type memDisk struct {
	size   int64
	writes []tableWrite
}

func (m *memDisk) WriteAt(p []byte, off int64) (int, error) {
	if err := blockdev.CheckRange(off, len(p), m.size); err != nil {
		return 0, err
	}
	m.writes = append(m.writes, tableWrite{off, bytes.Clone(p)})
	return len(p), nil
}

func (m *memDisk) Sync() error                       { return nil }
func (m *memDisk) ReadAt([]byte, int64) (int, error) { return 0, errors.ErrUnsupported }
func (m *memDisk) Read([]byte) (int, error)          { return 0, errors.ErrUnsupported }
func (m *memDisk) Seek(int64, int) (int64, error)    { return 0, errors.ErrUnsupported }
func (m *memDisk) Stat() (fs.FileInfo, error)        { return memInfo{m.size}, nil }
func (m *memDisk) Close() error                      { return nil }

// entryBytes encodes a partition as an entry of n bytes. UEFI specification, "GPT Partition Entry".
func entryBytes(p *Partition, sector, n int) []byte {
	e := make([]byte, n)
	le := binary.LittleEndian
	copy(e[offEntryType:], guidToDisk(p.Type))
	copy(e[offEntryGUID:], guidToDisk(p.GUID))
	le.PutUint64(e[offEntryStart:], uint64(p.Start)/uint64(sector))
	le.PutUint64(e[offEntryEnd:], uint64(p.End())/uint64(sector)-1)
	le.PutUint64(e[offEntryAttributes:], p.Attributes)
	for i, u := range utf16.Encode([]rune(p.Name)) {
		le.PutUint16(e[offEntryName+2*i:], u)
	}
	return e
}

// Part of the on-disk format, as those in header.go.
const (
	offEntryAttributes = 48
	offEntryName       = 56
)

// sound are both copies of a table that is as it should be.
type sound struct {
	primary, backup *header
	sector          int
}

// readSound reads both copies of the GPT. They may differ only where the caller allows it, by looking at them.
func readSound(d blockdev.Device, sector int) (s *sound, perr, berr error) {
	s = &sound{sector: sector}
	s.primary, perr = readHeader(d, sector, 1)
	last := uint64(d.Size())/uint64(sector) - 1
	alt := last
	if perr == nil {
		alt = s.primary.alt
	}
	if alt != last {
		return s, perr, fmt.Errorf("the backup table is at LBA %d and not at the end of the disk, LBA %d", alt, last)
	}
	s.backup, berr = readHeader(d, sector, last)
	return s, perr, berr
}

// Insert adds partitions to the GPT of a disk, one after the other, and returns their numbers: of each the first entry
// that is free. Of each, Type, GUID, Name, Start, Size and Attributes count. The table is not written anew: one sector of
// each entry array and both headers are patched, and all else stays as it is.
//
// The backup goes first, then the primary, each array before its header, each flushed. A cut leaves the old table or the
// new one in at least one copy, and Complete finishes or takes back the rest. It returns ErrUnsound when a copy is
// damaged or the two differ, and ErrNoRoom.
func Insert(d blockdev.Device, t *Table, parts []Partition) ([]int, error) {
	fail := func(err error) ([]int, error) {
		return nil, fmt.Errorf("cannot add a partition to the table: %w", err)
	}
	if t.MBR || t.FromBackup || len(t.Problems) > 0 {
		return fail(ErrUnsound)
	}
	var numbers []int
	for i := range parts {
		n, err := insert(d, t.SectorSize, &parts[i])
		if err != nil {
			return fail(err)
		}
		numbers = append(numbers, n)
	}
	return numbers, nil
}

func insert(d blockdev.Device, sector int, p *Partition) (int, error) {
	s, perr, berr := readSound(d, sector)
	if err := errors.Join(perr, berr); err != nil {
		return 0, fmt.Errorf("%w: %w", ErrUnsound, err)
	}
	if !s.primary.sameTable(s.backup) {
		return 0, fmt.Errorf("%w: the backup differs from the primary", ErrUnsound)
	}
	if err := CheckName(p.Name); err != nil {
		return 0, err
	}
	h := s.primary
	first, last := int64(h.first)*int64(sector), (int64(h.last)+1)*int64(sector)
	if p.Start < first || p.Size <= 0 || p.Start > last-p.Size || p.Start%int64(sector) != 0 || p.Size%int64(sector) != 0 {
		return 0, fmt.Errorf("%w: 0x%x bytes at 0x%x", ErrNoRoom, p.Size, p.Start)
	}
	// One that is all zeros is better than one that was taken once: Complete knows what was there.
	slot, blank := -1, false
	le := binary.LittleEndian
	for i := range h.count {
		e := h.entry(i)
		if allZero(e[offEntryType:offEntryGUID]) {
			if zero := allZero(e); slot < 0 || zero && !blank {
				slot, blank = i, zero
			}
			continue
		}
		if bytes.Equal(e[offEntryGUID:offEntryStart], guidToDisk(p.GUID)) {
			return 0, fmt.Errorf("%w: partition %d has the GUID %s", ErrNoRoom, i+1, p.GUID)
		}
		start, end := le.Uint64(e[offEntryStart:]), le.Uint64(e[offEntryEnd:])
		if start <= uint64(p.End())/uint64(sector)-1 && end >= uint64(p.Start)/uint64(sector) {
			return 0, fmt.Errorf("%w: it would overlap partition %d", ErrNoRoom, i+1)
		}
	}
	if slot < 0 {
		return 0, fmt.Errorf("%w: all %d entries of the table are taken", ErrNoRoom, h.count)
	}
	array := bytes.Clone(h.array)
	copy(array[slot*h.entrySize:], entryBytes(p, sector, h.entrySize))
	for _, h := range []*header{s.backup, s.primary} {
		if err := h.putEntry(d, sector, slot, array); err != nil {
			return 0, err
		}
		if err := h.putHeader(d, sector, array); err != nil {
			return 0, err
		}
	}
	return slot + 1, nil
}

// which names a copy in messages.
func (h *header) which() string {
	if h.my == 1 {
		return "primary"
	}
	return "backup"
}

// putEntry writes the sectors of the copy's entry array that hold an entry: one, or several where entries are longer.
func (h *header) putEntry(d blockdev.Device, sector, slot int, array []byte) error {
	from := slot * h.entrySize / sector * sector
	to := min(len(array), (slot*h.entrySize+h.entrySize+sector-1)/sector*sector)
	if err := writeFlush(d, array[from:to], int64(h.arrayLBA)*int64(sector)+int64(from)); err != nil {
		return fmt.Errorf("cannot write an entry of the %s table: %w", h.which(), err)
	}
	return nil
}

// putHeader writes the copy's header for an entry array.
func (h *header) putHeader(d blockdev.Device, sector int, array []byte) error {
	if err := writeFlush(d, h.over(array), int64(h.my)*int64(sector)); err != nil {
		return fmt.Errorf("cannot write the %s header: %w", h.which(), err)
	}
	return nil
}

// over is the header's sector with the checksums for another entry array.
func (h *header) over(array []byte) []byte {
	raw := bytes.Clone(h.raw)
	le := binary.LittleEndian
	le.PutUint32(raw[offArrayCRC:], crc32.ChecksumIEEE(array))
	le.PutUint32(raw[offCRC:], 0)
	le.PutUint32(raw[offCRC:], crc32.ChecksumIEEE(raw[:le.Uint32(raw[offSize:])]))
	return raw
}

func writeFlush(d blockdev.Device, b []byte, off int64) error {
	if _, err := d.WriteAt(b, off); err != nil {
		return err
	}
	// Barrier: the next write is only of use behind this one.
	return d.Flush()
}

// Complete finishes what a Create or an Insert that was cut off left behind, and nothing else: it returns false, having
// written nothing, when the table is sound, when there is none, and when it is in a state that no cut can explain.
//
// After a cut in Create the primary table is whole, the backup's array is there, and the backup header and the MBR are
// there, zeros, or torn. After one in Insert the copies differ by one entry that one of them does not have, or has a part
// of; it is finished where the backup is whole with it, and taken back where the primary is whole without. A cut in
// Complete leaves such a state too.
func Complete(d blockdev.Device) (bool, error) {
	for _, sector := range sectorSizes(d) {
		for _, f := range []func(blockdev.Device, int) (bool, error){completeCreate, completeInsert} {
			if done, err := f(d, sector); done || err != nil {
				if err != nil {
					err = fmt.Errorf("cannot finish the partition table: %w", err)
				}
				return done, err
			}
		}
	}
	return false, nil
}

// between says whether each byte of b is that of one or of the other: what a write of one over the other can leave.
func between(b, one, other []byte) bool {
	for i := range b {
		if b[i] != one[i] && b[i] != other[i] {
			return false
		}
	}
	return true
}

func completeCreate(d blockdev.Device, sector int) (bool, error) {
	s, perr, berr := readSound(d, sector)
	if perr != nil {
		return false, nil
	}
	h := s.primary
	mbr, zeros := make([]byte, sector), make([]byte, sector)
	if _, err := d.ReadAt(mbr, 0); err != nil {
		return false, nil
	}
	whole := protectiveMBR(d.Size(), sector)
	if berr == nil {
		if !h.sameTable(s.backup) || !between(mbr, zeros, whole) || sameProtection(mbr, whole) {
			return false, nil
		}
		return true, writeFlush(d, whole, 0)
	}
	// The MBR is written after the backup.
	blocks := uint64(len(h.array)+sector-1) / uint64(sector)
	if !allZero(mbr) || h.alt != uint64(d.Size())/uint64(sector)-1 || h.alt <= blocks {
		return false, nil
	}
	array, there := make([]byte, len(h.array)), make([]byte, sector)
	if _, err := d.ReadAt(array, int64(h.alt-blocks)*int64(sector)); err != nil || !bytes.Equal(array, h.array) {
		return false, nil
	}
	b := &header{raw: bytes.Clone(h.raw), my: h.alt}
	le := binary.LittleEndian
	le.PutUint64(b.raw[offMyLBA:], h.alt)
	le.PutUint64(b.raw[offAlternate:], h.my)
	le.PutUint64(b.raw[offArray:], h.alt-blocks)
	if _, err := d.ReadAt(there, int64(h.alt)*int64(sector)); err != nil || !between(there, zeros, b.over(h.array)) {
		return false, nil
	}
	if err := b.putHeader(d, sector, h.array); err != nil {
		return false, err
	}
	return true, writeFlush(d, whole, 0)
}

// other reads the copy that belongs to h, of which the checksums may be wrong; nil when something else is.
func (h *header) other(d blockdev.Device, sector int) *header {
	o := *h
	o.my, o.alt = h.alt, h.my
	o.raw, o.array = make([]byte, sector), make([]byte, len(h.array))
	if o.my == 0 || o.my > uint64(d.Size())/uint64(sector)-1 {
		return nil
	}
	if _, err := d.ReadAt(o.raw, int64(o.my)*int64(sector)); err != nil {
		return nil
	}
	le := binary.LittleEndian
	o.arrayLBA = le.Uint64(o.raw[offArray:])
	for _, same := range [][2]int{{0, offCRC}, {offReserved, offMyLBA}, {offFirst, offArray}, {offCount, offArrayCRC}} {
		if !bytes.Equal(o.raw[same[0]:same[1]], h.raw[same[0]:same[1]]) {
			return nil
		}
	}
	// The arrays are outside what partitions use, the primary's before it and the backup's behind.
	blocks := uint64(len(o.array)+sector-1) / uint64(sector)
	from, to := uint64(2), h.first
	if o.my > 1 {
		from, to = h.last+1, o.my
	}
	if le.Uint64(o.raw[offMyLBA:]) != o.my || le.Uint64(o.raw[offAlternate:]) != o.alt ||
		o.arrayLBA < from || o.arrayLBA > to || blocks > to-o.arrayLBA {
		return nil
	}
	if _, err := d.ReadAt(o.array, int64(o.arrayLBA)*int64(sector)); err != nil {
		return nil
	}
	return &o
}

// differs finds the one entry in which two arrays differ: -1 when there is none, and false when there are several.
func (h *header) differs(o *header) (slot int, ok bool) {
	slot = -1
	for i := range h.count {
		if bytes.Equal(h.entry(i), o.entry(i)) {
			continue
		}
		if slot >= 0 {
			return 0, false
		}
		slot = i
	}
	return slot, true
}

// inserted says whether the type of an entry is that of an ESP or XBOOTLDR partition, or a part of one.
func inserted(entry []byte) bool {
	for _, typ := range []uuid.UUID{TypeESP, TypeXBOOTLDR} {
		if between(entry[:offEntryGUID], guidToDisk(typ), make([]byte, offEntryGUID)) {
			return true
		}
	}
	return false
}

func completeInsert(d blockdev.Device, sector int) (bool, error) {
	sectors := uint64(d.Size()) / uint64(sector)
	if sectors < 3 {
		return false, nil
	}
	// The copies must be those of one disk: the backup at its end.
	if p, err := readHeader(d, sector, 1); err == nil {
		if b := p.other(d, sector); b != nil && b.my == sectors-1 {
			return takeBack(d, sector, p, b)
		}
		return false, nil
	}
	if b, err := readHeader(d, sector, sectors-1); err == nil && b.alt == 1 {
		if p := b.other(d, sector); p != nil {
			return finish(d, sector, p, b)
		}
	}
	return false, nil
}

// takeBack makes the backup like the primary again, which is whole and which the new entry has not reached. Insert wrote
// the entry before the header, so the header goes first.
func takeBack(d blockdev.Device, sector int, p, b *header) (bool, error) {
	slot, ok := p.differs(b)
	if !ok || slot < 0 || !allZero(p.entry(slot)) || !inserted(b.entry(slot)) {
		return false, nil
	}
	// A header that is not the old one any more is written behind an entry that is whole.
	old := b.over(p.array)
	if !between(b.raw, old, b.over(b.array)) {
		return false, nil
	}
	if !bytes.Equal(b.raw, old) {
		if err := b.putHeader(d, sector, p.array); err != nil {
			return false, err
		}
	}
	return true, b.putEntry(d, sector, slot, p.array)
}

// finish makes the primary like the backup, which is whole with the new entry.
func finish(d blockdev.Device, sector int, p, b *header) (bool, error) {
	slot, ok := p.differs(b)
	if !ok {
		return false, nil
	}
	for i := range b.count {
		if slot >= 0 && i != slot || allZero(b.entry(i)[:offEntryGUID]) || !inserted(b.entry(i)) {
			continue
		}
		before := bytes.Clone(b.array)
		clear(before[i*b.entrySize : (i+1)*b.entrySize])
		old := p.over(before)
		if slot < 0 {
			// The entry is there; the header is the old one, or torn.
			if between(p.raw, old, p.over(b.array)) {
				return true, p.putHeader(d, sector, b.array)
			}
			continue
		}
		// There is a part of the entry, behind which no header was written.
		if !bytes.Equal(p.raw, old) || !between(p.entry(i), b.entry(i), make([]byte, b.entrySize)) {
			return false, nil
		}
		if err := p.putEntry(d, sector, i, b.array); err != nil {
			return false, err
		}
		return true, p.putHeader(d, sector, b.array)
	}
	return false, nil
}

// DeriveGUID returns the GUID that belongs to a seed and a name: always the same one, and another one for another seed or
// name (RFC 9562, "UUID Version 8", with SHA-256).
func DeriveGUID(seed, name string) uuid.UUID {
	sum := sha256.Sum256(fmt.Appendf(nil, "espmirror guid 1\x00%d\x00%s\x00%s", len(seed), seed, name))
	var g uuid.UUID
	copy(g[:], sum[:])
	g[6] = g[6]&0x0f | 0x80
	g[8] = g[8]&0x3f | 0x80
	return g
}

// GUIDFrom returns a GUID made of 16 bytes of r (RFC 9562, "UUID Version 4"); nil is the system's random numbers.
func GUIDFrom(r io.Reader) (uuid.UUID, error) {
	if r == nil {
		r = rand.Reader
	}
	return uuid.NewRandomFromReader(r)
}
