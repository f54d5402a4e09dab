package gpt

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"

	"espmirror/blockdev"
)

// UEFI specification, "GPT Header". Part of the on-disk format.
const (
	signature    = "EFI PART"
	revision     = 0x00010000
	headerSize   = 92
	entrySize    = 128
	offRevision  = 8
	offSize      = 12
	offCRC       = 16
	offReserved  = 20
	offMyLBA     = 24
	offAlternate = 32
	offFirst     = 40
	offLast      = 48
	offDiskGUID  = 56
	offArray     = 72
	offCount     = 80
	offEntrySize = 84
	offArrayCRC  = 88
)

// UEFI specification, "GPT Partition Entry". Part of the on-disk format.
const (
	offEntryType  = 0
	offEntryGUID  = 16
	offEntryStart = 32
	offEntryEnd   = 40 // inclusive
)

// Limits of what is taken for a table at all. systemd-boot reads 1024 entries at most, and no tool writes more than 128
// bytes an entry.
const (
	maxEntries   = 1024
	maxEntrySize = 4096
)

// errNoHeader is returned when a sector does not begin as a header does.
var errNoHeader = errors.New("no header")

// header is a table that has passed the checks of readHeader: all its LBAs are inside the disk.
type header struct {
	raw       []byte // the sector
	my, alt   uint64
	first     uint64 // first usable LBA
	last      uint64 // last usable LBA, inclusive
	arrayLBA  uint64
	count     int
	entrySize int
	array     []byte // count × entrySize bytes, CRC checked
}

// readHeader reads and checks the header at lba and its entry array. Nothing is allocated and nothing is read before its
// place and size are known to be inside the device.
func readHeader(d blockdev.Device, sector int, lba uint64) (*header, error) {
	sectors := uint64(d.Size()) / uint64(sector)
	if lba == 0 || lba >= sectors {
		return nil, fmt.Errorf("%w: LBA %d is outside the device", errNoHeader, lba)
	}
	raw := make([]byte, sector)
	if _, err := d.ReadAt(raw, int64(lba)*int64(sector)); err != nil {
		return nil, err
	}
	if !bytes.HasPrefix(raw, []byte(signature)) {
		return nil, fmt.Errorf("%w at LBA %d", errNoHeader, lba)
	}
	le := binary.LittleEndian
	if v := le.Uint32(raw[offRevision:]); v != revision {
		return nil, fmt.Errorf("revision 0x%08x is unknown", v)
	}
	size := le.Uint32(raw[offSize:])
	if size < headerSize || size > uint32(sector) {
		return nil, fmt.Errorf("header size %d is not within %d and %d", size, headerSize, sector)
	}
	want := le.Uint32(raw[offCRC:])
	sum := bytes.Clone(raw[:size])
	clear(sum[offCRC : offCRC+4])
	if got := crc32.ChecksumIEEE(sum); got != want {
		return nil, fmt.Errorf("header CRC is 0x%08x, expected 0x%08x", got, want)
	}
	h := &header{
		raw:      raw,
		my:       le.Uint64(raw[offMyLBA:]),
		alt:      le.Uint64(raw[offAlternate:]),
		first:    le.Uint64(raw[offFirst:]),
		last:     le.Uint64(raw[offLast:]),
		arrayLBA: le.Uint64(raw[offArray:]),
	}
	if h.my != lba {
		return nil, fmt.Errorf("header at LBA %d says that it is at LBA %d", lba, h.my)
	}
	count, each := le.Uint32(raw[offCount:]), le.Uint32(raw[offEntrySize:])
	if count < 1 || count > maxEntries {
		return nil, fmt.Errorf("%d partition entries, expected 1 to %d", count, maxEntries)
	}
	if each < entrySize || each > maxEntrySize || each&(each-1) != 0 {
		return nil, fmt.Errorf("partition entries of %d bytes, expected 128 times a power of two, at most %d", each, maxEntrySize)
	}
	h.count, h.entrySize = int(count), int(each)
	if h.first > h.last || h.last >= sectors {
		return nil, fmt.Errorf("usable LBAs %d to %d do not fit a disk of %d sectors", h.first, h.last, sectors)
	}
	length := int64(count) * int64(each)
	blocks := (uint64(length) + uint64(sector) - 1) / uint64(sector)
	switch {
	case h.arrayLBA < 1 || h.arrayLBA >= sectors || blocks > sectors-h.arrayLBA:
		return nil, fmt.Errorf("entry array of %d sectors at LBA %d is outside the disk of %d sectors", blocks, h.arrayLBA, sectors)
	case h.arrayLBA <= 1 || h.arrayLBA <= lba && lba < h.arrayLBA+blocks:
		return nil, fmt.Errorf("entry array of %d sectors at LBA %d overlaps a header", blocks, h.arrayLBA)
	case h.first <= lba && lba <= h.last:
		return nil, fmt.Errorf("usable LBAs %d to %d include the header at LBA %d", h.first, h.last, lba)
	case h.first < h.arrayLBA+blocks && h.arrayLBA <= h.last:
		return nil, fmt.Errorf("usable LBAs %d to %d include the entry array at LBA %d", h.first, h.last, h.arrayLBA)
	}
	h.array = make([]byte, length)
	if _, err := d.ReadAt(h.array, int64(h.arrayLBA)*int64(sector)); err != nil {
		return nil, err
	}
	want = le.Uint32(raw[offArrayCRC:])
	if got := crc32.ChecksumIEEE(h.array); got != want {
		return nil, fmt.Errorf("entry array CRC is 0x%08x, expected 0x%08x", got, want)
	}
	return h, nil
}

// entry returns the bytes of entry i, counted from 0.
func (h *header) entry(i int) []byte { return h.array[i*h.entrySize : (i+1)*h.entrySize] }

// sameTable says whether two headers describe the same partitions.
func (h *header) sameTable(o *header) bool {
	return bytes.Equal(h.raw[offDiskGUID:offArray], o.raw[offDiskGUID:offArray]) &&
		h.entrySize == o.entrySize && bytes.Equal(h.array, o.array)
}
