package fatdriver

import (
	"encoding/binary"
	"fmt"

	"espmirror/blockdev"
)

// Type is the width of a volume's FAT entries. It follows from the cluster count alone (fatgen103, "FAT Type
// Determination"), except that a volume laid out as FAT32 stays FAT32 for reading when its count is too small.
type Type int

// The three FAT types; the value is the number of bits of an entry.
const (
	FAT12 Type = 12
	FAT16 Type = 16
	FAT32 Type = 32
)

func (t Type) String() string { return fmt.Sprintf("FAT%d", int(t)) }

// Cluster is the number of a data cluster; the first one is 2.
type Cluster uint32

// Offsets in the boot sector: fatgen103, "Boot Sector and BPB". Part of the on-disk format.
const (
	offJump          = 0
	offOEMName       = 3
	offBytsPerSec    = 11
	offSecPerClus    = 13
	offRsvdSecCnt    = 14
	offNumFATs       = 16
	offRootEntCnt    = 17
	offTotSec16      = 19
	offMedia         = 21
	offFATSz16       = 22
	offTotSec32      = 32
	offFlags16       = 0x25 // BS_Reserved1 on FAT12/16: bit 0 dirty, bit 1 surface test
	offBootSig16     = 38
	offVolID16       = 39
	offVolLab16      = 43
	offFATSz32       = 36
	offExtFlags32    = 40
	offFSVer32       = 42
	offRootClus32    = 44
	offFSInfo32      = 48
	offBkBootSec32   = 50
	offFlags32       = 0x41
	offBootSig32     = 66
	offVolID32       = 67
	offVolLab32      = 71
	offSignature     = 510
	extFlagsMirrorNo = 0x80
)

// The cluster counts at which the FAT type changes (fatgen103, "FAT Type Determination").
const (
	minClusters16 = 4085
	minClusters32 = 65525
	maxClusters32 = 0x0FFFFFF5 - 1 // highest count that keeps every cluster number below the bad-cluster mark
)

// Geometry is what the BPB says, in bytes where nothing else is said. It is a copy: changing it changes no volume.
type Geometry struct {
	Type            Type
	SectorSize      int    // BPB_BytsPerSec
	ClusterSize     int    // bytes
	ReservedSectors int    // BPB_RsvdSecCnt
	NumFATs         int    // BPB_NumFATs
	RootEntries     int    // BPB_RootEntCnt: slots of the fixed root, 0 on FAT32
	TotalSectors    int64  // BPB_TotSec16 or BPB_TotSec32
	FATSize         int64  // bytes of one FAT copy
	FATOff          int64  // byte offset of copy 0
	RootOff         int64  // byte offset of the fixed root (FAT12/16)
	RootSize        int64  // bytes of the fixed root, 0 on FAT32
	DataOff         int64  // byte offset of cluster 2
	Clusters        uint32 // number of data clusters; the highest cluster is Clusters+1
	RootCluster     Cluster
	FSInfoOff       int64 // byte offset of FSInfo #1, -1 when there is none
	BackupBootOff   int64 // byte offset of the backup boot sector, -1 when there is none
	Media           byte
	ExtFlags        uint16 // BPB_ExtFlags, FAT32 only
	Serial          uint32 // BS_VolID; 0 when the extended boot signature is absent
	HasSerial       bool
	BootLabel       [11]byte // BS_VolLab, raw
	Dirty           bool     // the boot sector's dirty bit is set

	blockSize int // bytes that the device writes at once, when that is less than a sector; else 0
}

// block is the number of bytes that change in one write or not at all: a sector, or less on a device with smaller ones,
// as where an image with 4096-byte sectors lies in a file or on an ordinary disk.
func (g *Geometry) block() int {
	if g.blockSize != 0 {
		return g.blockSize
	}
	return g.SectorSize
}

// MaxCluster is the highest valid cluster number.
func (g *Geometry) MaxCluster() Cluster { return Cluster(g.Clusters + 1) }

// Size is the number of bytes that the volume covers, from its boot sector to its last sector.
func (g *Geometry) Size() int64 { return g.TotalSectors * int64(g.SectorSize) }

// ClusterOff is the byte offset of cluster c, which must be valid.
func (g *Geometry) ClusterOff(c Cluster) int64 {
	return g.DataOff + int64(c-2)*int64(g.ClusterSize)
}

// valid says whether c numbers a data cluster of the volume.
func (g *Geometry) valid(c Cluster) bool { return c >= 2 && c <= g.MaxCluster() }

func pow2(n, lo, hi int) bool { return n >= lo && n <= hi && n&(n-1) == 0 }

// parseBPB checks the boot sector b (at least 512 bytes) and works out the geometry of the volume.
func parseBPB(b []byte) (Geometry, error) {
	le := binary.LittleEndian
	var g Geometry
	if len(b) < 512 {
		return g, fmt.Errorf("%w: boot sector has %d bytes, want 512", ErrNotFAT, len(b))
	}
	if why := foreignBootSector(b); why != "" {
		return g, fmt.Errorf("%w: it looks like %s", ErrNotFAT, why)
	}
	bad := func(off int, what string, got any) error {
		return fmt.Errorf("%w: boot sector offset 0x%x: %s is %v", ErrNotFAT, off, what, got)
	}
	g.SectorSize = int(le.Uint16(b[offBytsPerSec:]))
	if !pow2(g.SectorSize, 512, 4096) {
		return g, bad(offBytsPerSec, "sector size", g.SectorSize)
	}
	spc := int(b[offSecPerClus])
	if !pow2(spc, 1, 128) {
		return g, bad(offSecPerClus, "sectors per cluster", spc)
	}
	g.ClusterSize = spc * g.SectorSize
	if g.ReservedSectors = int(le.Uint16(b[offRsvdSecCnt:])); g.ReservedSectors == 0 {
		return g, bad(offRsvdSecCnt, "reserved sector count", 0)
	}
	if g.NumFATs = int(b[offNumFATs]); g.NumFATs == 0 {
		return g, bad(offNumFATs, "number of FATs", 0)
	}
	g.Media = b[offMedia]
	if g.Media != 0xF0 && g.Media < 0xF8 {
		return g, bad(offMedia, "media byte", fmt.Sprintf("0x%02x", g.Media))
	}
	g.RootEntries = int(le.Uint16(b[offRootEntCnt:]))
	g.TotalSectors = int64(le.Uint16(b[offTotSec16:]))
	if g.TotalSectors == 0 {
		g.TotalSectors = int64(le.Uint32(b[offTotSec32:]))
	}
	if g.TotalSectors == 0 {
		return g, bad(offTotSec16, "total sector count", 0)
	}
	ss := int64(g.SectorSize)
	fat16 := int64(le.Uint16(b[offFATSz16:]))
	is32 := fat16 == 0
	fatSectors := fat16
	if is32 {
		fatSectors = int64(le.Uint32(b[offFATSz32:]))
	}
	if fatSectors == 0 {
		return g, bad(offFATSz16, "FAT size", 0)
	}
	g.FATSize = fatSectors * ss
	g.FATOff = int64(g.ReservedSectors) * ss
	rootSectors := (int64(g.RootEntries)*slotSize + ss - 1) / ss
	rootSector := int64(g.ReservedSectors) + int64(g.NumFATs)*fatSectors
	dataSector := rootSector + rootSectors
	g.RootOff, g.RootSize = rootSector*ss, int64(g.RootEntries)*slotSize
	g.DataOff = dataSector * ss
	if dataSector >= g.TotalSectors {
		return g, fmt.Errorf("%w: boot sector: reserved area, FATs and root take %d sectors of %d", ErrNotFAT, dataSector, g.TotalSectors)
	}
	n := (g.TotalSectors - dataSector) / int64(spc)
	g.FSInfoOff, g.BackupBootOff = -1, -1
	switch {
	case is32:
		g.Type = FAT32
		if n > maxClusters32 {
			return g, bad(offTotSec32, "cluster count", n)
		}
		if v := le.Uint16(b[offFSVer32:]); v != 0 {
			return g, bad(offFSVer32, "FAT32 version", fmt.Sprintf("0x%04x", v))
		}
		g.RootEntries, g.RootSize = 0, 0
		if rootSectors != 0 {
			return g, bad(offRootEntCnt, "root entry count of a FAT32 volume", le.Uint16(b[offRootEntCnt:]))
		}
		g.RootCluster = Cluster(le.Uint32(b[offRootClus32:]) & 0x0FFFFFFF)
		g.ExtFlags = le.Uint16(b[offExtFlags32:])
		if s := int64(le.Uint16(b[offFSInfo32:])); s != 0 && s != 0xFFFF && s < int64(g.ReservedSectors) {
			g.FSInfoOff = s * ss
		}
		if s := int64(le.Uint16(b[offBkBootSec32:])); s != 0 && s != 0xFFFF && s < int64(g.ReservedSectors) {
			g.BackupBootOff = s * ss
		}
		if sig := b[offBootSig32]; sig == 0x29 || sig == 0x28 {
			g.HasSerial, g.Serial = true, le.Uint32(b[offVolID32:])
		}
		if b[offBootSig32] == 0x29 {
			copy(g.BootLabel[:], b[offVolLab32:])
		}
		g.Dirty = b[offFlags32]&1 != 0
	default:
		g.Type = FAT12
		if n >= minClusters16 {
			g.Type = FAT16
		}
		if n >= minClusters32 {
			// EDK2 refuses such a volume; Linux reads it as FAT16 and would never reach the clusters beyond.
			return g, fmt.Errorf("%w: boot sector offset 0x%x: FAT16 layout with %d clusters, at most %d are possible", ErrNotFAT, offFATSz16, n, minClusters32-1)
		}
		if g.RootEntries == 0 {
			return g, bad(offRootEntCnt, "root entry count", 0)
		}
		if sig := b[offBootSig16]; sig == 0x29 || sig == 0x28 {
			g.HasSerial, g.Serial = true, le.Uint32(b[offVolID16:])
		}
		if b[offBootSig16] == 0x29 {
			copy(g.BootLabel[:], b[offVolLab16:])
		}
		g.Dirty = b[offFlags16]&1 != 0
	}
	g.Clusters = uint32(n)
	if n == 0 {
		return g, fmt.Errorf("%w: boot sector: no data cluster", ErrNotFAT)
	}
	if g.Type == FAT32 && !g.valid(g.RootCluster) {
		return g, bad(offRootClus32, "root cluster", uint32(g.RootCluster))
	}
	return g, nil
}

// foreignBootSector names the filesystem that sector 0 belongs to when it is a well-known one other than FAT whose BPB
// could be mistaken for one, and "" otherwise.
func foreignBootSector(b []byte) string {
	switch string(b[offOEMName : offOEMName+8]) {
	case "NTFS    ":
		return "NTFS"
	case "EXFAT   ":
		return "exFAT"
	case "-FVE-FS-":
		return "a BitLocker volume"
	case "ReFS\x00\x00\x00\x00":
		return "ReFS"
	}
	return ""
}

// fatEntries is the number of entries that one FAT copy has room for.
func (g *Geometry) fatEntries() int64 {
	return g.FATSize * 8 / int64(g.Type)
}

// targetProblem says why the volume on a device of devSize bytes and devSector-byte sectors must not be written, or "".
// fat.md, "Readers", says which reader each refusal is for.
func (g *Geometry) targetProblem(devSize int64, devSector int) string {
	switch {
	case g.NumFATs > 2:
		return fmt.Sprintf("it has %d FATs; only volumes with 1 or 2 can be checked by fsck.fat", g.NumFATs)
	case g.Type == FAT32 && g.ExtFlags&extFlagsMirrorNo != 0:
		return fmt.Sprintf("FAT mirroring is off (ExtFlags 0x%04x), which firmware refuses", g.ExtFlags)
	case g.Type == FAT32 && g.Clusters < minClusters32:
		return fmt.Sprintf("it is FAT32 with %d clusters, fewer than %d, which firmware refuses", g.Clusters, minClusters32)
	case near(g.Clusters, minClusters16) || near(g.Clusters, minClusters32):
		return fmt.Sprintf("its cluster count %d is so near a type limit that readers disagree on the FAT type", g.Clusters)
	case g.fatEntries() < int64(g.Clusters)+2:
		return fmt.Sprintf("a FAT has room for %d entries, %d clusters need %d", g.fatEntries(), g.Clusters, int64(g.Clusters)+2)
	case g.Size() > devSize:
		return fmt.Sprintf("the volume claims 0x%x bytes, the device has 0x%x", g.Size(), devSize)
	case g.SectorSize < devSector:
		return fmt.Sprintf("its %d-byte sectors are smaller than the device's %d-byte ones", g.SectorSize, devSector)
	case g.Type != FAT32 && g.RootEntries*slotSize%g.SectorSize != 0:
		return fmt.Sprintf("its root of %d entries does not fill whole sectors", g.RootEntries)
	}
	return ""
}

func near(n, limit uint32) bool { return n+16 >= limit && n < limit+16 }

// readBoot reads the boot sector: 512 bytes hold everything that is parsed.
func readBoot(dev blockdev.Device) ([]byte, error) {
	if dev.Size() < 512 {
		return nil, fmt.Errorf("%w: the device has only %d bytes", ErrNotFAT, dev.Size())
	}
	b := make([]byte, 512)
	if _, err := dev.ReadAt(b, 0); err != nil {
		return nil, fmt.Errorf("cannot read boot sector: %w", err)
	}
	return b, nil
}
