package gpt

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"slices"

	"espmirror/blockdev"
)

// Signature is something that a device holds by the word of a few bytes at their place.
type Signature struct {
	Off  int64  // bytes from the start of the device
	What string // "LVM physical volume", "GPT (backup)", …
}

// more are signatures beyond those of Probe, which looks for what may stand in the place of a FAT volume; here it is about
// what must not be overwritten. The places are those that each format's own documentation or source gives.
var more = []magic{
	{4096 + 24, "\xc6\x85\x73\xf6\x4e\x1a\x45\xca\x82\x65\xf5\x7f\x48\xba\x6d\x81", "bcache"},
	{4096 + 24, "\xc6\x85\x73\xf6\x66\xce\x90\xa9\xd9\x6a\x60\xcf\x80\x3d\xf7\xef", "bcachefs"},
	{1024, "H+\x00\x04", "HFS+"}, {1024, "HX\x00\x05", "HFS+"}, {1024, "BD", "HFS"},
	{32, "NXSB", "APFS"},
	{512, "PM\x00\x00", "Apple partition map"},
	{0x200000, "\x0d\xd0\x01\xc0", "VMFS"},
	{0x100000, "\x0d\xd0\x01\xc0", "VMFS physical volume"},
	{65536 + 52, "ReIsEr", "ReiserFS"}, {8192 + 52, "ReIsEr", "ReiserFS"}, {65536, "ReIsEr4", "Reiser4"},
	{32768, "JFS1", "JFS"}, {1030, "\x34\x34", "NILFS2"},
	{8192 + 1372, "\x19\x01\x54\x19", "UFS"}, {65536 + 1372, "\x19\x01\x54\x19", "UFS"},
	{0, "sqsh", "squashfs"},
	{65536, "\x01\x16\x19\x70", "GFS2"},
	{0, "SKUL\xba\xbe", "LUKS (backup header)"},
	{516, "!Stra0tis\x86\xff\x02\x5e\x41rh", "Stratis"},
	{0, "-rom1fs-", "romfs"},
	{0, "\x45\x3d\xcd\x28", "cramfs"}, {512, "\x45\x3d\xcd\x28", "cramfs"},
	{1024 + 16, "\x7f\x13", "Minix"}, {1024 + 16, "\x8f\x13", "Minix"}, {1024 + 16, "\x68\x24", "Minix"}, {1024 + 16, "\x78\x24", "Minix"},
	{32769, "NSR02", "UDF"}, {34817, "NSR02", "UDF"}, {34817, "NSR03", "UDF"}, {32769, "BEA01", "UDF"},
	{0, "QFI\xfb", "qcow2 disk image"}, {0, "KDMV", "VMDK disk image"}, {0, "conectix", "VHD disk image"}, {0, "vhdxfile", "VHDX disk image"},
	{0x40, "\x7f\x10\xda\xbe", "VDI disk image"},
}

// swapMagics stand ten bytes before the end of a page, of any size that a machine has. Linux, include/linux/swap.h.
var swapMagics = map[string]string{"SWAPSPACE2": "swap", "SWAP-SPACE": "swap", "S1SUSPEND\x00": "hibernation image", "S2SUSPEND\x00": "hibernation image",
	"ULSUSPEND\x00": "hibernation image", "LINHIB0001": "hibernation image"}

// Recognise returns everything on a device that some program would know for its own: partition tables, filesystems, and
// what holds them (LVM, md, LUKS, ZFS …), each at its place, sorted. Nothing in the list is no proof that the device is
// empty: see Dirty. An error is one of reading; nobody can say what is there then.
func Recognise(d blockdev.Device) ([]Signature, error) {
	r := &recogniser{d: d}
	r.tables()
	r.filesystems()
	r.containers()
	if r.err != nil {
		return nil, fmt.Errorf("cannot find out what is there: %w", r.err)
	}
	slices.SortStableFunc(r.found, func(a, b Signature) int { return int(max(-1, min(1, a.Off-b.Off))) })
	return slices.Compact(r.found), nil
}

type recogniser struct {
	d     blockdev.Device
	found []Signature
	err   error
}

func (r *recogniser) add(off int64, what string) { r.found = append(r.found, Signature{off, what}) }

// at reads n bytes; nil when they are not all on the device.
func (r *recogniser) at(off int64, n int) []byte {
	if r.err != nil || off < 0 || off > r.d.Size()-int64(n) {
		return nil
	}
	b := make([]byte, n)
	if _, err := r.d.ReadAt(b, off); err != nil {
		r.err = err
		return nil
	}
	return b
}

// tables finds partition tables, whole or not: a header by its first eight bytes.
func (r *recogniser) tables() {
	first := r.at(0, 512)
	if first != nil && hasMBRSignature(first) && !fatBootSector(first) {
		types := 0
		for i := range mbrEntryCount {
			if mbrEntry(first, i)[4] != 0 {
				types++
			}
		}
		switch {
		case isProtective(first):
			r.add(0, "protective MBR")
		case types > 0:
			r.add(0, "MBR with "+count(types, "partition"))
		default:
			r.add(0, "boot sector or MBR without partitions")
		}
	}
	for _, sector := range []int64{512, 4096} {
		last := r.d.Size()/sector*sector - sector
		if b := r.at(sector, 8); string(b) == signature {
			r.add(sector, "GPT")
		}
		if b := r.at(last, 8); last > sector && string(b) == signature {
			r.add(last, "GPT (backup)")
		}
	}
}

func count(n int, what string) string {
	if n != 1 {
		what += "s"
	}
	return fmt.Sprintf("%d %s", n, what)
}

func (r *recogniser) filesystems() {
	if first := r.at(0, 512); first != nil && fatBootSector(first) {
		r.add(0, FSFAT)
	}
	for _, m := range slices.Concat(magics, more) {
		if b := r.at(m.off, len(m.text)); b != nil && string(b) == m.text {
			r.add(m.off, m.name)
		}
	}
	for page := int64(4096); page <= 65536; page *= 2 {
		if what := swapMagics[string(r.at(page-10, 10))]; what != "" {
			r.add(page-10, what)
		}
	}
	// btrfs has copies of its superblock at these places. Linux, include/uapi/linux/btrfs_tree.h.
	for _, at := range []int64{64 << 20, 256 << 30} {
		if string(r.at(at+64, 8)) == "_BHRfS_M" {
			r.add(at+64, "btrfs (copy)")
		}
	}
}

func (r *recogniser) containers() {
	// LVM2, lib/format_text/layout.h: the label is in one of the first four sectors of 512 bytes.
	for i := range int64(4) {
		if b := r.at(i*512, 32); b != nil && (string(b[:8]) == "LABELONE" || string(b[24:]) == "LVM2 001") && i != 1 {
			r.add(i*512, "LVM physical volume")
		}
	}
	size := r.d.Size()
	for _, m := range mdPlaces(size) {
		if b := r.at(m.off, 512); b != nil && isMDSuperblock(b, m.version) {
			r.add(m.off, FSMDMember)
		}
	}
	// LUKS2 keeps a second header at one of these places. cryptsetup, lib/luks2/luks2.h.
	for at := int64(0x4000); at <= 0x400000; at *= 2 {
		if string(r.at(at, 6)) == "SKUL\xba\xbe" {
			r.add(at, "LUKS (backup header)")
		}
	}
	// ZFS, include/sys/vdev_impl.h: two labels of 256 KiB at either end; the uberblocks are in the second half of each, and
	// of both byte orders.
	end := size &^ (256<<10 - 1)
	for _, label := range []int64{0, 256 << 10, end - 512<<10, end - 256<<10} {
		ring := r.at(label+128<<10, 128<<10)
		for i := 0; i+8 <= len(ring); i += 1024 {
			v := binary.LittleEndian.Uint64(ring[i:])
			if v == 0x00bab10c || v == 0x0cb1ba0000000000 {
				r.add(label+128<<10+int64(i), "ZFS member")
				break
			}
		}
	}
	// Firmware RAID at the end: Intel, mdadm super-intel.c; SNIA DDF, "Anchor Header".
	if b := r.at(size&^511-1024, 24); bytes.HasPrefix(b, []byte("Intel Raid ISM Cfg Sig. ")) {
		r.add(size&^511-1024, "Intel RAID member")
	}
	if b := r.at(size&^511-512, 4); b != nil && (string(b) == "\xde\x11\xde\x11" || string(b) == "\x11\xde\x11\xde") {
		r.add(size&^511-512, "DDF RAID member")
	}
	// DRBD, drbd_int.h: internal metadata at the end, at a multiple of 4 KiB.
	if b := r.at(size&^4095-4096+60, 4); b != nil && (string(b) == "\x83\x74\x02\x6b" || string(b) == "\x83\x74\x02\x6d") {
		r.add(size&^4095-4096+60, "DRBD member")
	}
}

// Ends is how much, in bytes, of either end of a device holds nearly everything by which programs know what is on it.
const Ends = 1 << 20

// Dirty says whether there are bytes other than zero in the first or the last MiB, outside the given places.
func Dirty(d blockdev.Device, except ...Extent) (bool, error) {
	dirty := false
	err := eachEnd(d, func(b []byte, off int64) error {
		for _, e := range except {
			if from, to := max(off, e.Start), min(off+int64(len(b)), e.End()); from < to {
				clear(b[from-off : to-off])
			}
		}
		dirty = dirty || !blockdev.Zero(b)
		return nil
	})
	return dirty, err
}

// TableExtents are the places of the entry arrays and of the primary header of a new table: a Create that was cut off may
// have left them, and nothing else, where there is no table yet.
func TableExtents(size int64, sector int) []Extent {
	first, end := Usable(size, sector)
	return []Extent{{int64(sector), first - int64(sector)}, {end, tableSize}}
}

// Wipe clears the first and the last MiB and what Recognise finds between them, and flushes. What is zero already is not
// written.
func Wipe(d blockdev.Device, found []Signature) error {
	zero := func(b []byte, off int64) error {
		if blockdev.Zero(b) {
			return nil
		}
		clear(b)
		if _, err := d.WriteAt(b, off); err != nil {
			return fmt.Errorf("cannot clear what was there: %w", err)
		}
		return nil
	}
	err := eachEnd(d, zero)
	for _, s := range found {
		if err != nil {
			break
		}
		at := s.Off / 4096 * 4096
		b := make([]byte, min(8192, d.Size()-at))
		if _, err = d.ReadAt(b, at); err == nil {
			err = zero(b, at)
		}
	}
	if err != nil {
		return err
	}
	// Barrier: nothing new may be there while something old still says what it is.
	if err := d.Flush(); err != nil {
		return fmt.Errorf("cannot flush the removal of what was there: %w", err)
	}
	return nil
}

func eachEnd(d blockdev.Device, f func(b []byte, off int64) error) error {
	const step = 64 << 10
	for _, e := range [][2]int64{{0, min(Ends, d.Size())}, {max(Ends, d.Size()-Ends), d.Size()}} {
		for off := e[0]; off < e[1]; off += step {
			b := make([]byte, min(step, e[1]-off))
			if _, err := d.ReadAt(b, off); err != nil {
				return fmt.Errorf("cannot look at what is there: %w", err)
			}
			if err := f(b, off); err != nil {
				return err
			}
		}
	}
	return nil
}
