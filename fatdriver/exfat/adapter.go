package exfat

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"time"

	exfat "github.com/dsoprea/go-exfat"

	_ "espmirror/fatdriver/exfat/noenv" // before the library's own initialisation
)

// This file is the only one that knows go-exfat. Measured, the library is right about the layout of the boot sector and of
// directory entries, and wrong or dangerous about most else: it reads deleted entries as live, a directory beyond one
// cluster as contiguous, splits surrogate pairs, halves seconds, takes a UTC offset of quarters for one of seconds, makes
// slices of sizes that it has not looked at, and panics. So it is given nothing but what has been validated here:
//
//   - a boot sector, of which it names the fields;
//   - sets of live directory entries with the right checksum, on a small stage that has the form of a volume. It finds
//     out by itself which entry is what and takes their fields apart.
//
// Clusters, the FAT, names, times and the data are read by this package.

// The boot sector: sections 3.1.1, 3.1.2 and 3.1.20. Part of the on-disk format.
const (
	jumpBoot       = "\xeb\x76\x90"
	fileSystemName = "EXFAT   "
	bootSignature  = 0xAA55
)

// guard calls f and turns a panic of the library into an error.
func guard(what string, f func() error) (err error) {
	defer func() {
		if p := recover(); p != nil {
			err = fmt.Errorf("cannot decode %s: %v", what, p)
		}
	}()
	if err := f(); err != nil {
		return fmt.Errorf("cannot decode %s: %w", what, err)
	}
	return nil
}

// decodeBoot names the fields of a boot sector of 512 bytes; none of them has been validated yet.
func decodeBoot(b []byte) (h exfat.BootSectorHeader, err error) {
	err = guard("the boot sector", func() error {
		_, err := binary.Decode(b, le, &h)
		return err
	})
	return h, err
}

// entry is what one set of directory entries says, as far as it depends on the kind.
type entry struct {
	kind byte // EntryType of the primary entry

	// File, 7.4, with its stream extension, 7.6, and name, 7.7.
	attr                        uint16
	created, modified, accessed stamp
	flags                       byte
	nameLength                  int // UTF-16 units
	nameHash                    uint16
	valid                       uint64 // bytes
	name                        []byte // UTF-16, with what fills up the last entry

	// Allocation bitmap, 7.1, and up-case table, 7.2; first and length are a file's too.
	bitmap   byte // BitmapFlags
	checksum uint32
	first    uint32
	length   uint64 // bytes

	// Volume label, 7.3, and volume GUID, 7.5.
	units byte
	label [30]byte
	guid  [16]byte
}

// stamp is a timestamp with what refines it (7.4.8 to 7.4.10).
type stamp struct {
	when   exfat.ExfatTimestamp
	tens   byte // 10 ms
	offset byte // UtcOffset
}

// time is the instant. Without a valid UTC offset the wall clock is taken for UTC, as it is everywhere in espmirror for
// FAT, which never has one. An impossible date gives the zero time.
func (s stamp) time() time.Time {
	// The field has two-second steps, which the library hands out as they are.
	sec := s.when.Second() * 2
	y, m, d, h, mi := s.when.Year(), time.Month(s.when.Month()), s.when.Day(), s.when.Hour(), s.when.Minute()
	if m < 1 || m > 12 || d < 1 || h > 23 || mi > 59 || sec > 59 {
		return time.Time{}
	}
	var nano int
	if s.tens < 200 {
		nano = int(s.tens) * 10_000_000
	}
	t := time.Date(y, m, d, h, mi, sec, nano, time.UTC)
	if t.Day() != d {
		return time.Time{} // the 31st of a shorter month
	}
	// 7.4.10: bit 7 says that the other bits count, quarters of an hour as a signed number of 7 bits.
	if s.offset&0x80 != 0 {
		quarters := int8(s.offset<<1) >> 1
		t = t.Add(-time.Duration(quarters) * 15 * time.Minute)
	}
	return t
}

// The stage: a volume of 512-byte sectors and clusters with a FAT of one sector, whose cluster 2 and all behind it hold
// the entries. The library follows no FAT for a directory, so they are one after the other.
const (
	stageSector  = 512
	stageFAT     = 24
	stageHeap    = 25
	stageCluster = 2
)

// decoder gives sets of entries to the library.
type decoder struct {
	stage  []byte
	reader *exfat.ExfatReader
	src    *bytes.Reader
}

// newDecoder makes the stage, which the library has to parse once.
func newDecoder() (*decoder, error) {
	b := make([]byte, stageHeap*stageSector)
	copy(b, jumpBoot+fileSystemName)
	le.PutUint32(b[80:], stageFAT)
	le.PutUint32(b[84:], 1) // sectors of the FAT
	le.PutUint32(b[88:], stageHeap)
	le.PutUint32(b[92:], 2) // clusters; the library reads one FAT entry less, and never asks again
	le.PutUint32(b[96:], stageCluster)
	b[105], b[108], b[109], b[110] = 1, minSectorShift, 0, 1 // revision 1.00, one sector a cluster, one FAT
	le.PutUint16(b[510:], bootSignature)
	for i := 1; i <= 8; i++ {
		le.PutUint32(b[i*stageSector+508:], bootSignature<<16)
	}
	copy(b[regionSectors*stageSector:], b[:regionSectors*stageSector])
	fat := b[stageFAT*stageSector:]
	le.PutUint32(fat, 0xFFFFFFF8)
	le.PutUint32(fat[4:], endOfChain)
	le.PutUint32(fat[8:], endOfChain)

	d := &decoder{stage: b, src: bytes.NewReader(b)}
	d.reader = exfat.NewExfatReader(d.src)
	if err := guard("directory entries", d.reader.Parse); err != nil {
		return nil, fmt.Errorf("internal error: %w", err)
	}
	return d, nil
}

// decode takes whole, live sets of known entries apart: a primary entry and its secondaries, as many as it says.
func (d *decoder) decode(sets []byte) ([]entry, error) {
	d.stage = append(d.stage[:stageHeap*stageSector], sets...)
	d.stage = append(d.stage, make([]byte, 2*stageSector-len(sets)%stageSector)...) // an end marker, and the whole sector
	d.src.Reset(d.stage)
	var out []entry
	err := guard("directory entries", func() error {
		_, _, err := exfat.NewExfatNavigator(d.reader, stageCluster).EnumerateDirectoryEntries(
			func(primary exfat.DirectoryEntry, secondary []exfat.DirectoryEntry) error {
				e, err := fields(primary, secondary)
				out = append(out, e)
				return err
			})
		return err
	})
	return out, err
}

// fields copies what the library found.
func fields(primary exfat.DirectoryEntry, secondary []exfat.DirectoryEntry) (e entry, err error) {
	switch p := primary.(type) {
	case *exfat.ExfatAllocationBitmapDirectoryEntry:
		return entry{kind: kindBitmap, bitmap: p.BitmapFlags, first: p.FirstCluster, length: p.DataLength}, nil
	case *exfat.ExfatUpcaseTableDirectoryEntry:
		return entry{kind: kindUpcase, checksum: p.TableChecksum, first: p.FirstCluster, length: p.DataLength}, nil
	case *exfat.ExfatVolumeLabelDirectoryEntry:
		return entry{kind: kindLabel, units: p.CharacterCount, label: p.VolumeLabel}, nil
	case *exfat.ExfatVolumeGuidDirectoryEntry:
		return entry{kind: kindGUID, guid: p.VolumeGuid}, nil
	case *exfat.ExfatFileDirectoryEntry:
		e = entry{kind: kindFile, attr: uint16(p.FileAttributes),
			created:  stamp{p.CreateTimestampRaw, p.Create10msIncrement, p.CreateUtcOffset},
			modified: stamp{p.LastModifiedTimestampRaw, p.LastModified10msIncrement, p.LastModifiedUtcOffset},
			accessed: stamp{p.LastAccessedTimestampRaw, 0, p.LastAccessedUtcOffset}}
		for i, s := range secondary {
			switch s := s.(type) {
			case *exfat.ExfatStreamExtensionDirectoryEntry:
				e.flags, e.nameLength, e.nameHash = byte(s.GeneralSecondaryFlags), int(s.NameLength), s.NameHash
				e.valid, e.first, e.length = s.ValidDataLength, s.FirstCluster, s.DataLength
			case *exfat.ExfatFileNameDirectoryEntry:
				e.name = append(e.name, s.FileName[:]...)
			default:
				return e, fmt.Errorf("secondary entry %d of a file is a %s", i+1, s.TypeName())
			}
		}
		return e, nil
	}
	return e, fmt.Errorf("a primary entry is a %s", primary.TypeName())
}
