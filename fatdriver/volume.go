// Package fatdriver reads FAT12, FAT16 and FAT32 volumes without mounting them, and changes them so that a power cut at
// any moment leaves the old tree or the new one.
//
// Reading: Open parses the boot sector, Scan walks the whole tree and says everything that is wrong with it, FS gives
// it as an io/fs.FS. Writing: NewPlan turns the wanted content of some directories into an exact list of writes and
// asserts the invariants; Tx carries it out in ordered epochs. The journal is somebody else's: a Tx names what a record
// must hold and Restore acts on one.
package fatdriver

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"strings"

	"espmirror/blockdev"
)

var (
	// ErrNotFAT is returned by Open when the device does not hold a FAT volume.
	ErrNotFAT = errors.New("not a FAT volume")

	// ErrNotTarget is returned when a volume can be read, but writing to it is not safe.
	ErrNotTarget = errors.New("the volume cannot be written safely")

	// ErrDamaged is returned when the tree of a volume is damaged; `check` shows each finding.
	ErrDamaged = errors.New("the FAT filesystem is damaged")

	// ErrNoSpace is returned when a volume has not enough free clusters or directory slots; nothing was written.
	ErrNoSpace = errors.New("not enough room")
)

// Volume is an open FAT volume. Reading is safe from several goroutines; a transaction needs the volume to itself.
type Volume struct {
	dev  blockdev.Device
	geo  Geometry
	boot []byte
	fat  *table // copy 0, which is the one that firmware and Linux read
}

// Open reads the boot sector of the volume that begins at the start of dev. It returns ErrNotFAT, with the place and
// the value, when there is none.
func Open(dev blockdev.Device) (*Volume, error) {
	boot, err := readBoot(dev)
	if err != nil {
		return nil, err
	}
	geo, err := parseBPB(boot)
	if err != nil {
		return nil, err
	}
	if n := dev.SectorSize(); n >= 512 && n < geo.SectorSize {
		geo.blockSize = n
	}
	v := &Volume{dev: dev, geo: geo, boot: boot}
	v.fat = newTable(dev, &v.geo, v.activeFAT())
	return v, nil
}

// activeFAT is the copy to read: 0, unless mirroring is off on FAT32 (fatgen103, BPB_ExtFlags).
func (v *Volume) activeFAT() int {
	if v.geo.Type == FAT32 && v.geo.ExtFlags&extFlagsMirrorNo != 0 {
		if n := int(v.geo.ExtFlags & 0xF); n < v.geo.NumFATs {
			return n
		}
	}
	return 0
}

// Geometry returns what the boot sector says.
func (v *Volume) Geometry() Geometry { return v.geo }

// Device returns the device under the volume.
func (v *Volume) Device() blockdev.Device { return v.dev }

// Refresh drops every cache, so that what is read next comes from the medium, and checks that the boot sector is still
// the one that Open saw.
func (v *Volume) Refresh() error {
	if err := v.dev.Invalidate(); err != nil {
		return fmt.Errorf("cannot drop caches: %w", err)
	}
	v.fat.drop()
	b, err := readBoot(v.dev)
	if err != nil {
		return err
	}
	if string(b) != string(v.boot) {
		return fmt.Errorf("%w: the boot sector changed while the volume was open", ErrNotTarget)
	}
	return nil
}

// TargetError returns ErrNotTarget, with the reason, when the volume may be read but not written, else nil. It checks
// the geometry and FAT[0]; damage of the tree is Scan's to find.
func (v *Volume) TargetError() error {
	if why := v.geo.targetProblem(v.dev.Size(), v.dev.SectorSize()); why != "" {
		return fmt.Errorf("%w: %s", ErrNotTarget, why)
	}
	e, err := v.fat.get(0)
	if err != nil {
		return err
	}
	// GRUB refuses a volume whose FAT[0] does not hold the media byte (fatgen103, "FAT[0]").
	if byte(e) != v.geo.Media {
		return fmt.Errorf("%w: FAT[0] is 0x%x, want the media byte 0x%02x in its low bits", ErrNotTarget, e, v.geo.Media)
	}
	return nil
}

// UUID is the volume serial as udev and fstab write it, ABCD-1234, or "" when there is none.
func (v *Volume) UUID() string {
	if !v.geo.HasSerial {
		return ""
	}
	return fmt.Sprintf("%04X-%04X", v.geo.Serial>>16, v.geo.Serial&0xFFFF)
}

// bootLabel is the label of the boot sector, which other systems show when the root directory has none.
func (v *Volume) bootLabel() string {
	s := strings.TrimRight(string(v.geo.BootLabel[:]), " \x00")
	if s == "NO NAME" {
		return ""
	}
	return labelText([]byte(s))
}

func labelText(b []byte) string {
	var sb strings.Builder
	for i, c := range b {
		switch {
		case i == 0 && c == slotKanjiE5:
			c = slotDeleted
			fallthrough
		case c >= 0x80:
			sb.WriteRune(cp437[c-0x80])
		case c < 0x20:
			sb.WriteByte('_')
		default:
			sb.WriteByte(c)
		}
	}
	return strings.TrimRight(sb.String(), " ")
}

// Identity is a digest-ready copy of what names the volume: the boot sector without the byte that holds the dirty bit.
func (v *Volume) Identity() []byte {
	b := append([]byte(nil), v.boot...)
	if v.geo.Type == FAT32 {
		b[offFlags32] = 0
	} else {
		b[offFlags16] = 0
	}
	return b
}

// chain follows the chain that begins at first and returns its runs. limit bounds the number of clusters. Each cluster
// is entered into used; one that is there already belongs to somebody else, or closes a loop. A chain that is too long,
// or has a free, bad, impossible or used cluster, is an error, returned with the clusters before it; so following every
// chain of a volume takes no more steps than the volume has clusters, whatever its FAT says.
func (v *Volume) chain(first Cluster, limit int64, used bitmap) ([]Run, error) {
	var runs []Run
	var n int64
	for c := first; ; {
		if !v.geo.valid(c) {
			return runs, fmt.Errorf("cluster %d is outside 2…%d", c, v.geo.MaxCluster())
		}
		if n++; n > limit {
			return runs, fmt.Errorf("the chain from cluster %d is longer than %d clusters", first, limit)
		}
		e, err := v.fat.get(c)
		if err != nil {
			return runs, err
		}
		if e == entryFree || e == entryBad {
			return runs, fmt.Errorf("the chain from cluster %d runs into cluster %d, which is %s", first, c, entryWord(e))
		}
		if used.has(c) {
			return runs, fmt.Errorf("cluster %d belongs to another file or directory too, or the chain is a loop", c)
		}
		used.set(c)
		runs = appendCluster(runs, c)
		if e >= entryEOC {
			return runs, nil
		}
		c = Cluster(e)
	}
}

// firstUnreadable is the offset of the first sector of [off, off+len(p)) that cannot be read, off when it is none by now.
// p is overwritten.
func firstUnreadable(dev blockdev.Device, p []byte, off int64, unit int) int64 {
	for at := 0; at < len(p); at += unit {
		if _, err := dev.ReadAt(p[at:min(at+unit, len(p))], off+int64(at)); err != nil {
			return off + int64(at)
		}
	}
	return off
}

// readAround reads [off, off+len(p)), and where that fails as a whole, sector by sector: lost is called with each one
// that cannot be read, and ends it with an error.
func (v *Volume) readAround(p []byte, off int64, lost func(sector []byte, off int64, err error) error) error {
	_, err := v.dev.ReadAt(p, off)
	if err == nil {
		return nil
	}
	if errors.Is(err, blockdev.ErrOutOfRange) {
		return lost(p, off, err)
	}
	for unit := v.geo.block(); len(p) > 0; {
		k := min(unit, len(p))
		if _, err := v.dev.ReadAt(p[:k], off); err != nil {
			if err := lost(p[:k], off, err); err != nil {
				return err
			}
		}
		p, off = p[k:], off+int64(k)
	}
	return nil
}

func entryWord(e uint32) string {
	if e == entryFree {
		return "free"
	}
	return "marked bad"
}

// runReader reads the bytes of a chain; size bounds it.
type runReader struct {
	v    *Volume
	runs []Run
	base []int64 // byte position at which each run begins
	size int64
}

func (v *Volume) newRunReader(runs []Run, size int64) *runReader {
	r := &runReader{v: v, runs: runs, size: size, base: make([]int64, len(runs))}
	var at int64
	for i, run := range runs {
		r.base[i] = at
		at += int64(run.Count) * int64(v.geo.ClusterSize)
	}
	r.size = min(size, at)
	return r
}

// ReadAt implements io.ReaderAt.
func (r *runReader) ReadAt(p []byte, off int64) (int, error) {
	if off < 0 {
		return 0, fmt.Errorf("cannot read at offset %d", off)
	}
	n := 0
	for len(p) > 0 && off < r.size {
		lo, hi := 0, len(r.runs)
		for hi-lo > 1 {
			if m := (lo + hi) / 2; r.base[m] <= off {
				lo = m
			} else {
				hi = m
			}
		}
		run := r.runs[lo]
		in := off - r.base[lo]
		k := min(int64(len(p)), int64(run.Count)*int64(r.v.geo.ClusterSize)-in, r.size-off)
		if _, err := r.v.dev.ReadAt(p[:k], r.v.geo.ClusterOff(run.First)+in); err != nil {
			return n, err
		}
		p, off, n = p[k:], off+k, n+int(k)
	}
	if len(p) > 0 {
		return n, io.EOF
	}
	return n, nil
}

// FSInfo fields: fatgen103, "FAT32 FSInfo Sector Structure". Part of the on-disk format.
const (
	fsiLead     = 0
	fsiStruct   = 484
	fsiFree     = 488
	fsiNext     = 492
	fsiTrail    = 508
	fsiLeadSig  = 0x41615252
	fsiStrSig   = 0x61417272
	fsiTrailSig = 0xAA550000
	fsiUnknown  = 0xFFFFFFFF
)

// fsinfo reads the FSInfo sector; nil when the volume has none or its signatures are wrong, in which case it is left
// alone: it is a hint, and no reader needs it.
func (v *Volume) fsinfo() ([]byte, error) {
	if v.geo.FSInfoOff < 0 {
		return nil, nil
	}
	b := make([]byte, v.geo.SectorSize)
	if _, err := v.dev.ReadAt(b, v.geo.FSInfoOff); err != nil {
		return nil, fmt.Errorf("cannot read FSInfo at offset 0x%x: %w", v.geo.FSInfoOff, err)
	}
	if !fsinfoSigned(b) {
		return nil, nil
	}
	return b, nil
}

func fsinfoSigned(b []byte) bool {
	le := binary.LittleEndian
	return le.Uint32(b[fsiLead:]) == fsiLeadSig && le.Uint32(b[fsiStruct:]) == fsiStrSig && le.Uint32(b[fsiTrail:]) == fsiTrailSig
}
