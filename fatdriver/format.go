package fatdriver

import (
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
	"sort"
	"strings"
	"time"

	"espmirror/blockdev"
)

// ErrFormat is returned by Format when the options cannot be met on the device; nothing was written.
var ErrFormat = errors.New("the volume cannot be laid out")

// FormatOptions says how Format lays out a volume. The zero value gives what suits an EFI System Partition of the
// device's size, without a label and with the serial 0.
type FormatOptions struct {
	Type              Type   // 0: FAT32 where the device has room for it, else FAT16, else FAT12
	SectorSize        int    // bytes, 512 to 4096; 0: the device's logical sector
	SectorsPerCluster int    // 1 to 128, at most 64 KiB a cluster; 0: by the size of the volume
	NumFATs           int    // 1 or 2; 0: 2
	Serial            uint32 // BS_VolID
	Label             string // at most 11 ASCII characters; "": none

	// LabelTime is the time of the label's entry in the root directory; the zero time is stored as zero.
	LabelTime time.Time

	// ReservedSectors is the least number of sectors before the first FAT; more are added where the alignment wants
	// them. 0: 32 on FAT32, 1 else.
	ReservedSectors int

	// RootEntries is the number of slots of the fixed root (FAT12/16), which must fill whole sectors; 0: 512.
	RootEntries int

	HiddenSectors uint32 // BPB_HiddSec: sectors before the volume on its disk

	// Align is the number of bytes of which the offset of cluster 2 is a multiple, a power of two; 1 asks for none.
	// 0: the larger of 4 KiB and a cluster, so that no cluster shares a physical sector of the medium with metadata.
	Align int64
}

// Layout constants of the volumes that we make.
const (
	fsInfoSector     = 1 // fatgen103, BPB_FSInfo: "usually 1"
	backupBootSector = 6 // fatgen103, BPB_BkBootSec: no other value is recommended
	minReserved32    = backupBootSector + fsInfoSector + 1
	mediaFixed       = 0xF8
	maxClusterSize   = 64 << 10 // what readers agree on; fatgen103, BPB_SecPerClus, wants no more than 32 KiB of writers
	typeMargin       = 16       // clusters to keep away from a type limit, since readers disagree by a few (see targetProblem)
)

// formatPlan is a volume that has been worked out.
type formatPlan struct {
	geo   Geometry
	boot  []byte // the whole boot sector
	info  []byte // FSInfo, nil on FAT12/16
	fat   []byte // first sector of each FAT copy
	root  []byte // first sector of the root directory
	wipe  int64  // bytes from the start that hold the old boot sector
	rootN int64  // bytes of the root directory: the fixed root or its first cluster
}

// Format makes an empty FAT volume on the whole of dev. Everything is worked out and checked before the first write.
// The boot sector is the last thing that is written: until then the device holds no volume, so a run that was cut
// short cannot be mistaken for a finished one. The data area is not written, but for the root's cluster.
//
// It returns ErrFormat when the options contradict each other or the device's size. An error of the device leaves no
// volume behind, except when it came from the last write or its flush.
func Format(dev blockdev.Device, o FormatOptions) error {
	p, err := planFormat(dev.Size(), dev.SectorSize(), dev.PhysicalSectorSize(), o)
	if err != nil {
		return err
	}
	return p.write(dev)
}

func (p *formatPlan) write(dev blockdev.Device) error {
	// Barrier: the old volume must be gone before anything of the new one is there, else an old boot sector would show
	// the new FAT as its own.
	if err := writeZeros(dev, 0, p.wipe); err != nil {
		return fmt.Errorf("cannot remove the old boot sector: %w", err)
	}
	if err := dev.Flush(); err != nil {
		return fmt.Errorf("cannot flush the removal of the old boot sector: %w", err)
	}
	g := &p.geo
	ss := int64(g.SectorSize)
	// Sector 0 stays zero here; the rest of the reserved area may hold what an older filesystem left behind.
	if err := writeZeros(dev, ss, g.FATOff-ss); err != nil {
		return fmt.Errorf("cannot clear the reserved sectors: %w", err)
	}
	if p.info != nil {
		for _, base := range []int64{0, backupBootSector} {
			if err := writeAt(dev, p.info, (base+fsInfoSector)*ss); err != nil {
				return fmt.Errorf("cannot write FSInfo: %w", err)
			}
		}
		if err := writeAt(dev, p.boot, g.BackupBootOff); err != nil {
			return fmt.Errorf("cannot write the backup boot sector: %w", err)
		}
	}
	for n := int64(0); n < int64(g.NumFATs); n++ {
		off := g.FATOff + n*g.FATSize
		if err := writeAt(dev, p.fat, off); err != nil {
			return fmt.Errorf("cannot write FAT copy %d: %w", n, err)
		}
		if err := writeZeros(dev, off+ss, g.FATSize-ss); err != nil {
			return fmt.Errorf("cannot write FAT copy %d: %w", n, err)
		}
	}
	rootOff := g.RootOff
	if g.Type == FAT32 {
		rootOff = g.ClusterOff(g.RootCluster)
	}
	if err := writeAt(dev, p.root, rootOff); err != nil {
		return fmt.Errorf("cannot write the root directory: %w", err)
	}
	if err := writeZeros(dev, rootOff+ss, p.rootN-ss); err != nil {
		return fmt.Errorf("cannot write the root directory: %w", err)
	}
	// Barrier: whoever sees the boot sector must find all that it points to.
	if err := dev.Flush(); err != nil {
		return fmt.Errorf("cannot flush the FATs and the root directory: %w", err)
	}
	if err := writeAt(dev, p.boot, 0); err != nil {
		return fmt.Errorf("cannot write the boot sector: %w", err)
	}
	// Barrier: the caller may rely on the volume from here on.
	if err := dev.Flush(); err != nil {
		return fmt.Errorf("cannot flush the boot sector: %w", err)
	}
	return nil
}

func writeAt(dev blockdev.Device, b []byte, off int64) error {
	if _, err := dev.WriteAt(b, off); err != nil {
		return fmt.Errorf("at offset 0x%x: %w", off, err)
	}
	return nil
}

// writeZeros clears n bytes from off on, at most a MiB in one write.
func writeZeros(dev blockdev.Device, off, n int64) error {
	if n <= 0 {
		return nil
	}
	zero := make([]byte, min(n, 1<<20))
	for n > 0 {
		k := min(n, int64(len(zero)))
		if err := writeAt(dev, zero[:k], off); err != nil {
			return err
		}
		off, n = off+k, n-k
	}
	return nil
}

func formatErr(format string, a ...any) error {
	return fmt.Errorf("%w: %s", ErrFormat, fmt.Sprintf(format, a...))
}

// planFormat works out a volume on a device of size bytes, with devSector-byte logical and physSector-byte physical
// sectors.
func planFormat(size int64, devSector, physSector int, o FormatOptions) (*formatPlan, error) {
	if o.SectorSize == 0 {
		o.SectorSize = devSector
	}
	if o.NumFATs == 0 {
		o.NumFATs = 2
	}
	switch {
	case !pow2(o.SectorSize, 512, 4096):
		return nil, formatErr("sector size %d is not 512, 1024, 2048 or 4096", o.SectorSize)
	case o.SectorSize < devSector:
		return nil, formatErr("sector size %d is less than the device's %d", o.SectorSize, devSector)
	case o.NumFATs < 1 || o.NumFATs > 2:
		return nil, formatErr("%d FATs; fsck.fat knows 1 or 2", o.NumFATs)
	case o.SectorsPerCluster != 0 && !pow2(o.SectorsPerCluster, 1, 128):
		return nil, formatErr("%d sectors per cluster is not a power of two from 1 to 128", o.SectorsPerCluster)
	case o.SectorsPerCluster*o.SectorSize > maxClusterSize:
		return nil, formatErr("a cluster of %d bytes; at most %d are possible", o.SectorsPerCluster*o.SectorSize, maxClusterSize)
	case o.ReservedSectors < 0 || o.ReservedSectors > 0xFFFF:
		return nil, formatErr("%d reserved sectors; at most 65535 are possible", o.ReservedSectors)
	case o.RootEntries < 0 || o.RootEntries > 0xFFFF || o.RootEntries*slotSize%o.SectorSize != 0:
		return nil, formatErr("%d root entries; at most 65535 that fill whole sectors of %d bytes are possible", o.RootEntries, o.SectorSize)
	case o.Align < 0 || o.Align&(o.Align-1) != 0:
		return nil, formatErr("alignment 0x%x is not a power of two", o.Align)
	}
	label, err := encodeLabel(o.Label)
	if err != nil {
		return nil, err
	}
	sectors := size / int64(o.SectorSize)
	if sectors > 0xFFFFFFFF {
		return nil, formatErr("the device has %d sectors of %d bytes; at most %d are possible", sectors, o.SectorSize, uint32(0xFFFFFFFF))
	}
	types := []Type{FAT32, FAT16, FAT12}
	switch {
	case slices.Contains(types, o.Type):
		types = []Type{o.Type}
	case o.Type != 0:
		return nil, formatErr("there is no %v", o.Type)
	case o.RootEntries != 0:
		types = []Type{FAT16, FAT12} // FAT32 has no fixed root
	}
	geo, err := firstLayout(types, size, sectors, o)
	if err != nil {
		return nil, err
	}
	p := &formatPlan{geo: geo, wipe: int64(max(o.SectorSize, min(physSector, 4096)))}
	p.wipe = min(p.wipe, geo.FATOff)
	p.build(o, label)

	// Nothing is written that we would not take ourselves.
	got, err := parseBPB(p.boot)
	if err != nil {
		return nil, fmt.Errorf("internal error: the boot sector made for %d sectors is not valid: %w", sectors, err)
	}
	if got != p.geo {
		return nil, fmt.Errorf("internal error: the boot sector made for %d sectors says %+v, want %+v", sectors, got, p.geo)
	}
	if why := geo.targetProblem(size, devSector); why != "" {
		return nil, formatErr("%s", why)
	}
	return p, nil
}

// firstLayout tries the types in order, each with its cluster sizes, and gives the first volume that is possible.
func firstLayout(types []Type, size, sectors int64, o FormatOptions) (Geometry, error) {
	var reasons []error
	for _, t := range types {
		sizes := clusterSizes(t, size, o)
		for _, spc := range sizes {
			if g, err := layout(t, sectors, spc, o); err == nil {
				return g, nil
			}
		}
		// Tell how near the type came: with its smallest clusters where there are too few, else with its largest.
		_, err := layout(t, sectors, slices.Min(sizes), o)
		if errors.Is(err, errTooMany) {
			_, err = layout(t, sectors, slices.Max(sizes), o)
		}
		reasons = append(reasons, err)
	}
	// A small device fails the last type for a reason that matters; on a large one that is only FAT12's own limit.
	if last := reasons[len(reasons)-1]; !errors.Is(last, errTooMany) {
		return Geometry{}, last
	}
	return Geometry{}, reasons[0]
}

// errTooMany marks a layout with more clusters than its type may have.
var errTooMany = errors.New("too many clusters")

// clusterSizes lists the sectors per cluster to try for a type, best first.
func clusterSizes(t Type, size int64, o FormatOptions) []int {
	if o.SectorsPerCluster != 0 {
		return []int{o.SectorsPerCluster}
	}
	// 4 KiB is a page of memory and a physical sector of most media; larger only where the FAT would become unwieldy
	// (the steps are those of fatgen103's table for FAT32). FAT12 and FAT16 volumes are small: a finer unit serves better.
	want := 4 << 10
	switch {
	case t == FAT12:
		want = 512
	case t == FAT16:
		want = 2 << 10
	case size > 32<<30:
		want = 32 << 10
	case size > 16<<30:
		want = 16 << 10
	case size > 8<<30:
		want = 8 << 10
	}
	best := max(1, want/o.SectorSize)
	var up, down []int
	for spc := 1; spc <= 128 && spc*o.SectorSize <= maxClusterSize; spc *= 2 {
		if spc >= best {
			up = append(up, spc)
		} else {
			down = append([]int{spc}, down...)
		}
	}
	// Smaller clusters help where there are too few, larger ones where there are too many. FAT32 fails the first way.
	if t == FAT32 {
		return append(append(up[:1:1], down...), up[1:]...)
	}
	return append(up, down...)
}

// layout places the parts of a volume of the given type and cluster size, or says which limit it breaks.
func layout(t Type, sectors int64, spc int, o FormatOptions) (Geometry, error) {
	ss := int64(o.SectorSize)
	g := Geometry{
		Type: t, SectorSize: o.SectorSize, ClusterSize: spc * o.SectorSize, NumFATs: o.NumFATs, TotalSectors: sectors,
		FSInfoOff: -1, BackupBootOff: -1, Media: mediaFixed, Serial: o.Serial, HasSerial: true,
	}
	reserved := int64(o.ReservedSectors)
	lo, hi := int64(1), int64(minClusters16-1)
	switch t {
	case FAT32:
		if o.RootEntries != 0 {
			return g, formatErr("FAT32 has no fixed root, so no %d root entries", o.RootEntries)
		}
		if reserved == 0 {
			reserved = 32
		}
		if reserved < minReserved32 {
			return g, formatErr("%d reserved sectors; FAT32 needs %d for the boot sector, FSInfo and their backups", reserved, minReserved32)
		}
		lo, hi = minClusters32+typeMargin, maxClusters32
		g.RootCluster = 2
		g.FSInfoOff, g.BackupBootOff = fsInfoSector*ss, backupBootSector*ss
	default:
		if g.RootEntries = o.RootEntries; g.RootEntries == 0 {
			g.RootEntries = 512
		}
		if g.RootSize = int64(g.RootEntries) * slotSize; g.RootSize%ss != 0 {
			return g, formatErr("%d root entries do not fill whole sectors of %d bytes", g.RootEntries, ss)
		}
		if t == FAT16 {
			lo, hi = minClusters16, minClusters32-1
		}
		reserved = max(1, reserved)
	}
	if t == FAT16 {
		lo += typeMargin
	}
	if t != FAT32 {
		hi -= typeMargin
	}
	align := o.Align
	if align == 0 {
		align = max(4<<10, int64(g.ClusterSize))
	}
	// place puts the data area behind FATs of n sectors each, and says how many sectors each FAT then needs.
	place := func(n int64) (need int64) {
		front := int64(g.NumFATs)*n*ss + g.RootSize
		end := (reserved*ss + front + align - 1) &^ (align - 1)
		// The data begins at a multiple of the sector size whatever the alignment: all terms but align are multiples.
		end = (end + ss - 1) / ss * ss
		g.FATSize, g.DataOff = n*ss, end
		g.RootOff = end - g.RootSize
		g.FATOff = end - front
		g.ReservedSectors = int(g.FATOff / ss)
		clusters := max(0, sectors*ss-end) / int64(g.ClusterSize)
		g.Clusters = uint32(clusters)
		return ((clusters+2)*int64(t) + 8*ss - 1) / (8 * ss)
	}
	// With larger FATs there are fewer clusters, which need no larger FATs: the smallest size that is enough is found by
	// halving. An empty FAT needs the most.
	most := max(1, place(0))
	n := 1 + sort.Search(int(most-1), func(i int) bool { return place(int64(i)+1) <= int64(i)+1 })
	place(int64(n))
	switch c := int64(g.Clusters); {
	case c == 0:
		return g, formatErr("%d sectors leave no room for a cluster of %d bytes behind the %d bytes of reserved sectors, FATs and root directory", sectors, g.ClusterSize, g.DataOff)
	case c < lo:
		return g, formatErr("too few clusters: %v would have %d of %d bytes; every reader takes at least %d for %v", t, c, g.ClusterSize, lo, t)
	case c > hi:
		return g, fmt.Errorf("%w: %w: %v would have %d of %d bytes; every reader takes at most %d for %v", ErrFormat, errTooMany, t, c, g.ClusterSize, hi, t)
	case g.ReservedSectors > 0xFFFF:
		return g, formatErr("the alignment needs %d reserved sectors; at most 65535 are possible", g.ReservedSectors)
	}
	return g, nil
}

// build makes the bytes of the plan from its geometry.
func (p *formatPlan) build(o FormatOptions, label [11]byte) {
	le := binary.LittleEndian
	g := &p.geo
	g.BootLabel = label
	b := make([]byte, g.SectorSize)
	p.boot = b
	copy(b[offOEMName:], "MSWIN4.1") // what fatgen103, BS_OEMName, recommends, because some drivers look at it
	le.PutUint16(b[offBytsPerSec:], uint16(g.SectorSize))
	b[offSecPerClus] = byte(g.ClusterSize / g.SectorSize)
	le.PutUint16(b[offRsvdSecCnt:], uint16(g.ReservedSectors))
	b[offNumFATs] = byte(g.NumFATs)
	le.PutUint16(b[offRootEntCnt:], uint16(g.RootEntries))
	b[offMedia] = g.Media
	if g.Type != FAT32 && g.TotalSectors < 0x10000 {
		le.PutUint16(b[offTotSec16:], uint16(g.TotalSectors))
	} else {
		le.PutUint32(b[offTotSec32:], uint32(g.TotalSectors))
	}
	// No disk has a cylinder geometry any more. mtools wants the track length to divide the size, so take one that does.
	for _, n := range []int64{63, 32, 16, 8, 4, 2, 1} {
		if g.TotalSectors%n == 0 {
			le.PutUint16(b[offSecPerTrk:], uint16(n))
			break
		}
	}
	le.PutUint16(b[offNumHeads:], 255)
	le.PutUint32(b[offHiddSec:], o.HiddenSectors)
	ext, code := offDrvNum16, offBootCode16
	if g.Type == FAT32 {
		ext, code = offDrvNum32, offBootCode32
		le.PutUint32(b[offFATSz32:], uint32(g.FATSize/int64(g.SectorSize)))
		le.PutUint32(b[offRootClus32:], uint32(g.RootCluster))
		le.PutUint16(b[offFSInfo32:], fsInfoSector)
		le.PutUint16(b[offBkBootSec32:], backupBootSector)
	} else {
		le.PutUint16(b[offFATSz16:], uint16(g.FATSize/int64(g.SectorSize)))
	}
	// The extended boot record is the same on all types, at different offsets.
	b[ext] = 0x80 // BS_DrvNum: first hard disk
	b[ext+2] = 0x29
	le.PutUint32(b[ext+3:], g.Serial)
	copy(b[ext+7:], label[:])
	copy(b[ext+18:], fmt.Sprintf("%-8s", g.Type))
	copy(b[offJump:], []byte{0xEB, byte(code - 2), 0x90})
	// hlt; jmp back to it: a BIOS that starts this volume stops instead of running into data.
	copy(b[code:], []byte{0xF4, 0xEB, 0xFD})
	b[offSignature], b[offSignature+1] = 0x55, 0xAA

	// FAT[0] repeats the media byte, FAT[1] is an end mark whose flags say clean and free of errors.
	p.fat = make([]byte, g.SectorSize)
	reserved := []uint32{0x0FFFFF00 | uint32(g.Media), entryLast}
	if g.Type == FAT32 {
		reserved = append(reserved, entryLast) // the root's only cluster
	}
	for c, e := range reserved {
		off, _ := entryOffset(g.Type, Cluster(c))
		encodeEntry(g.Type, Cluster(c), p.fat[off:], e)
	}

	p.rootN = g.RootSize
	if g.Type == FAT32 {
		p.rootN = int64(g.ClusterSize)
		p.info = make([]byte, g.SectorSize)
		le.PutUint32(p.info[fsiLead:], fsiLeadSig)
		le.PutUint32(p.info[fsiStruct:], fsiStrSig)
		le.PutUint32(p.info[fsiFree:], g.Clusters-1)
		le.PutUint32(p.info[fsiNext:], 2) // the cluster that was allocated last
		le.PutUint32(p.info[fsiTrail:], fsiTrailSig)
	}
	p.root = make([]byte, g.SectorSize)
	if label != noLabel {
		Meta{Modified: o.LabelTime}.put(p.root)
		copy(p.root, label[:])
		p.root[offAttr] = AttrLabel
	}
}

// Further offsets in the boot sector, needed only to make one: fatgen103, "Boot Sector and BPB". Part of the on-disk
// format.
const (
	offSecPerTrk  = 24
	offNumHeads   = 26
	offHiddSec    = 28
	offDrvNum16   = 36
	offBootCode16 = 62
	offDrvNum32   = 64
	offBootCode32 = 90
)

// noLabel is what the boot sector of a volume without a label holds (fatgen103, BS_VolLab).
var noLabel = [11]byte([]byte("NO NAME    "))

// encodeLabel makes the 11 bytes of a label.
func encodeLabel(label string) ([11]byte, error) {
	out := noLabel
	label = strings.TrimRight(label, " ")
	if label == "" || label == "NO NAME" {
		return out, nil
	}
	for _, r := range label {
		// Beyond ASCII the bytes mean something else in each code page, and fsck.fat objects to them.
		if r < 0x20 || r >= 0x7F || strings.ContainsRune(badShortChars, r) {
			return out, formatErr("label %q: %q is not allowed", label, r)
		}
	}
	switch {
	case label[0] == ' ':
		return out, formatErr("label %q begins with a space", label)
	case len(label) > len(out):
		return out, formatErr("label %q has %d characters; at most %d are possible", label, len(label), len(out))
	}
	copy(out[:], "           ")
	copy(out[:], label)
	return out, nil
}
