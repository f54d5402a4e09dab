package gpt

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"strings"

	"espmirror/blockdev"
)

// Names that Probe returns for the two filesystems that espmirror reads.
const (
	FSFAT   = "FAT"
	FSExFAT = "exFAT"
)

// FSMDMember is the name that Probe returns for a part of an md array.
const FSMDMember = "md RAID member"

// magic is a signature at a fixed place.
type magic struct {
	off  int64
	text string
	name string
}

// The places are those that each format's own documentation gives.
var magics = []magic{
	{3, "NTFS    ", "NTFS"},
	{3, "EXFAT   ", FSExFAT},
	{3, "-FVE-FS-", "BitLocker"},
	{3, "ReFS", "ReFS"},
	{0, "LUKS\xba\xbe", "LUKS"},
	{0, "hsqs", "squashfs"},
	{0, "XFSB", "XFS"},
	{1024, "\xe2\xe1\xf5\xe0", "EROFS"},
	{1024, "\x10\x20\xf5\xf2", "F2FS"},
	{1080, "\x53\xef", "ext2, ext3 or ext4"},
	{512, "LABELONE", "LVM physical volume"},
	{4086, "SWAPSPACE2", "swap"},
	{65600, "_BHRfS_M", "btrfs"},
	{32769, "CD001", "ISO 9660"},
}

// Probe returns the name of the filesystem or container that the device holds, as messages name it: FSFAT, FSExFAT,
// "NTFS", "LUKS", …; "" when nothing is known. A FAT volume that is also part of an md array is FSMDMember: writing to
// it behind md's back would tear the array's halves apart. What cannot be read counts as unknown; only an error on the
// first sector is returned.
func Probe(d blockdev.Device) (string, error) {
	first, err := readFirst(d)
	if err != nil {
		return "", err
	}
	member, err := MDMember(d)
	if err != nil {
		return "", err
	}
	if member {
		return FSMDMember, nil
	}
	if fatBootSector(first) {
		return FSFAT, nil
	}
	for _, m := range magics {
		b := make([]byte, len(m.text))
		if m.off+int64(len(b)) > d.Size() {
			continue
		}
		if _, err := d.ReadAt(b, m.off); err == nil && string(b) == m.text {
			return m.name, nil
		}
	}
	return "", nil
}

// readFirst reads the first 512 bytes, as many of them as there are.
func readFirst(d blockdev.Device) ([]byte, error) {
	first := make([]byte, 512)
	if _, err := d.ReadAt(first[:min(512, d.Size())], 0); err != nil {
		return nil, fmt.Errorf("cannot probe: %w", err)
	}
	return first, nil
}

// fatBootSector says whether a sector looks like the boot sector of a FAT volume: a jump and plausible parameters.
// fatgen103, "Boot Sector and BPB". A boot loader's MBR has the jump and zeros for parameters.
func fatBootSector(b []byte) bool {
	le := binary.LittleEndian
	if b[0] != 0xe9 && !(b[0] == 0xeb && b[2] == 0x90) {
		return false
	}
	switch le.Uint16(b[11:]) { // bytes per sector
	case 512, 1024, 2048, 4096:
	default:
		return false
	}
	if spc := b[13]; spc == 0 || spc&(spc-1) != 0 {
		return false
	}
	reserved, fats, media := le.Uint16(b[14:]), b[16], b[21]
	sectors := le.Uint16(b[19:]) != 0 || le.Uint32(b[32:]) != 0
	fatSize := le.Uint16(b[22:]) != 0 || le.Uint32(b[36:]) != 0
	return reserved != 0 && fats != 0 && fats <= 4 && (media == 0xf0 || media >= 0xf8) && sectors && fatSize
}

// mdMagic begins every md superblock. Linux, include/uapi/linux/raid/md_p.h.
const mdMagic = 0xa92b4efc

// MDMember says whether the device holds the superblock of an md array at its end (metadata 0.90 or 1.0), where its
// beginning looks like the plain filesystem that the array holds; or near its start (1.1, 1.2).
func MDMember(d blockdev.Device) (bool, error) {
	size := d.Size()
	for _, place := range mdPlaces(size) {
		if place.off < 0 || place.off > size-512 {
			continue
		}
		b := make([]byte, 512)
		if _, err := d.ReadAt(b, place.off); err != nil {
			return false, fmt.Errorf("cannot look for an md superblock at offset 0x%x: %w", place.off, err)
		}
		if isMDSuperblock(b, place.version) {
			return true, nil
		}
	}
	return false, nil
}

// mdPlace is a place where a superblock of a major version is looked for.
type mdPlace struct {
	off     int64
	version uint32
}

func mdPlaces(size int64) []mdPlace {
	return []mdPlace{
		// 0.90: the last whole 64 KiB. 1.0: at least 8 KiB from the end, at a multiple of 4 KiB.
		{size&^0xffff - 0x10000, 0},
		{(size&^511 - 8192) &^ 4095, 1},
		{0, 1},
		{4096, 1},
	}
}

// isMDSuperblock checks magic and major version. Metadata 0.90 is in the byte order of the machine that made it.
func isMDSuperblock(b []byte, version uint32) bool {
	le, be := binary.LittleEndian, binary.BigEndian
	if le.Uint32(b) == mdMagic && le.Uint32(b[4:]) == version {
		return true
	}
	return version == 0 && be.Uint32(b) == mdMagic && be.Uint32(b[4:]) == version
}

// identity returns the serial number ("ABCD-1234") and label of a FAT or exFAT volume; ok is false for anything else.
// The label is that of the root directory, which systems show and set, before that of the boot sector.
func identity(d blockdev.Device) (serial, label string, ok bool, err error) {
	b, err := readFirst(d)
	if err != nil {
		return "", "", false, err
	}
	le := binary.LittleEndian
	if string(b[3:11]) == "EXFAT   " {
		return formatSerial(le.Uint32(b[100:])), "", true, nil // exFAT specification, "VolumeSerialNumber Field"
	}
	if !fatBootSector(b) {
		return "", "", false, nil
	}
	// fatgen103, "Extended BPB": the fields lie 28 bytes further on in FAT32, which is known by its 16-bit FAT size
	// being 0.
	ext := b[36:]
	if le.Uint16(b[22:]) == 0 {
		ext = b[64:]
	}
	if sig := ext[2]; sig == 0x28 || sig == 0x29 {
		serial = formatSerial(le.Uint32(ext[3:]))
		if sig == 0x29 {
			label = trimLabel(ext[7:18])
		}
	}
	if root, found := rootLabel(d, b); found {
		label = root
	}
	if label == "NO NAME" {
		label = ""
	}
	return serial, label, true, nil
}

// formatSerial writes a serial number as every tool shows it.
func formatSerial(v uint32) string { return fmt.Sprintf("%04X-%04X", v>>16, v&0xffff) }

// trimLabel drops the padding of a label.
func trimLabel(b []byte) string { return strings.TrimRight(string(bytes.TrimRight(b, "\x00")), " ") }

// rootLabel looks for the label entry in the root directory: all of it on FAT12 and FAT16, its first cluster on FAT32,
// where formatting programs put it. fatgen103, "FAT Directory Structure", ATTR_VOLUME_ID.
func rootLabel(d blockdev.Device, b []byte) (string, bool) {
	le := binary.LittleEndian
	sector, cluster := int64(le.Uint16(b[11:])), int64(b[13])
	reserved, fats := int64(le.Uint16(b[14:])), int64(b[16])
	fatSize, length := int64(le.Uint16(b[22:])), int64(le.Uint16(b[17:]))*32
	off := (reserved + fats*fatSize) * sector
	if fatSize == 0 {
		fatSize = int64(le.Uint32(b[36:]))
		root := int64(le.Uint32(b[44:]))
		if root < 2 {
			return "", false
		}
		off = (reserved + fats*fatSize + (root-2)*cluster) * sector
		length = cluster * sector
	}
	if off > d.Size()-length {
		return "", false
	}
	dir := make([]byte, length) // at most 2 MiB: 65535 entries
	if _, err := d.ReadAt(dir, off); err != nil {
		return "", false
	}
	for ; len(dir) >= 32 && dir[0] != 0; dir = dir[32:] {
		// Bits 6 and 7 are reserved; all four low ones set is a part of a long name.
		if attr := dir[11] & 0x3f; dir[0] != 0xe5 && attr&0x08 != 0 && attr != 0x0f {
			return trimLabel(dir[:11]), true
		}
	}
	return "", false
}
