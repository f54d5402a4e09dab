package exfat

import (
	"encoding/binary"
	"fmt"

	"espmirror/blockdev"
)

var le = binary.LittleEndian

// The boot region: sections 3.1 to 3.4. Part of the on-disk format.
const (
	bootSectorBytes = 512 // the fields are in the first 512 bytes, whatever the sector size
	regionSectors   = 12
	checksumSector  = 11

	offMustBeZero   = 11
	offVolumeFlags  = 106
	offPercentInUse = 112

	minSectorShift  = 9
	maxSectorShift  = 12
	maxClusterShift = 25 // 3.1.15: 32 MiB
	minVolume       = 1 << 20
	maxClusters     = 1<<32 - 11
	minFATOffset    = 24
)

// Geometry is what the boot region says, validated: every place in it lies inside the device.
type Geometry struct {
	SectorSize   int    // bytes
	ClusterSize  int    // bytes
	Sectors      int64  // VolumeLength, in sectors
	FATOffset    uint32 // sectors
	FATLength    uint32 // sectors, of one FAT
	HeapOffset   uint32 // ClusterHeapOffset, in sectors
	ClusterCount uint32 // clusters are numbered from 2 on
	Root         uint32 // first cluster of the root directory
	Serial       uint32
	Revision     uint16 // major in the high byte
	NumFATs      int    // 1, or 2 on a TexFAT volume
	ActiveFAT    int    // the FAT and allocation bitmap that count, from 0
	Dirty        bool   // a writer was interrupted, or is at work
	MediaFailure bool
	Backup       bool // the main boot region cannot be used, this is the backup
}

func (g *Geometry) size() int64        { return g.Sectors * int64(g.SectorSize) }
func (g *Geometry) clusterSize() int64 { return int64(g.ClusterSize) }

// valid says whether c is a cluster of the heap.
func (g *Geometry) valid(c uint32) bool { return c >= 2 && int64(c) < int64(g.ClusterCount)+2 }

// offset is the byte offset of a valid cluster.
func (g *Geometry) offset(c uint32) int64 {
	return int64(g.HeapOffset)*int64(g.SectorSize) + int64(c-2)*g.clusterSize()
}

// fatOffset is the byte offset of the FAT that counts.
func (g *Geometry) fatOffset() int64 {
	return (int64(g.FATOffset) + int64(g.ActiveFAT)*int64(g.FATLength)) * int64(g.SectorSize)
}

// readGeometry takes the main boot region or, when that cannot be used, its backup, and says then what is wrong with the
// main one. The error is of the main region when the backup is no better: that is the one that tells what the volume was.
func readGeometry(dev blockdev.Device) (g Geometry, note string, err error) {
	shift, mainErr := peekShift(dev)
	if mainErr == nil {
		if g, mainErr = readRegion(dev, 0, shift); mainErr == nil {
			return g, "", nil
		}
	}
	// Where the backup is depends on the sector size, which the main region may not tell any more.
	for s := uint8(minSectorShift); s <= maxSectorShift; s++ {
		g, err := readRegion(dev, regionSectors<<s, s)
		if err != nil {
			continue
		}
		if g.NumFATs > 1 {
			// 3.1.13: the flags of the backup are stale, so nobody knows which FAT is the current one.
			return Geometry{}, "", fmt.Errorf("%w; the backup boot region is sound, but does not tell which of the %d FATs counts", mainErr, g.NumFATs)
		}
		g.ActiveFAT, g.Dirty, g.MediaFailure, g.Backup = 0, false, false, true
		return g, mainErr.Error(), nil
	}
	return Geometry{}, "", mainErr
}

// peekShift reads the sector size from the main boot sector.
func peekShift(dev blockdev.Device) (uint8, error) {
	if dev.Size() < minVolume {
		return 0, fmt.Errorf("%w: the device has only %d bytes, an exFAT volume at least %d", ErrNotExFAT, dev.Size(), minVolume)
	}
	b := make([]byte, bootSectorBytes)
	if _, err := dev.ReadAt(b, 0); err != nil {
		return 0, fmt.Errorf("cannot read the boot sector: %w", err)
	}
	h, err := decodeBoot(b)
	if err != nil {
		return 0, err
	}
	if string(h.FileSystemName[:]) != fileSystemName {
		return 0, fmt.Errorf("%w: boot sector offset 0x3: the filesystem name is %q", ErrNotExFAT, h.FileSystemName[:])
	}
	if s := h.BytesPerSectorShift; s < minSectorShift || s > maxSectorShift {
		return 0, fmt.Errorf("%w: boot sector offset 0x6c: BytesPerSectorShift is %d, want %d…%d", ErrNotExFAT, s, minSectorShift, maxSectorShift)
	}
	return h.BytesPerSectorShift, nil
}

// readRegion reads and validates the boot region at off, of sectors of 1<<shift bytes.
func readRegion(dev blockdev.Device, off int64, shift uint8) (Geometry, error) {
	b := make([]byte, regionSectors<<shift)
	if off > dev.Size()-int64(len(b)) {
		return Geometry{}, fmt.Errorf("%w: the device has only %d bytes", ErrNotExFAT, dev.Size())
	}
	if _, err := dev.ReadAt(b, off); err != nil {
		return Geometry{}, fmt.Errorf("cannot read the boot region at offset 0x%x: %w", off, err)
	}
	return parseRegion(b, off, shift, dev.Size())
}

// parseRegion validates a boot region that was read at off, in 64 bits and against the size of the device. What is
// compared with is in the order of the specification, 3.1.1 to 3.1.20, after the checksum that covers it all.
func parseRegion(b []byte, off int64, shift uint8, size int64) (g Geometry, err error) {
	fail := func(at int64, format string, a ...any) (Geometry, error) {
		return Geometry{}, fmt.Errorf("%w: boot region offset 0x%x: %s", ErrNotExFAT, off+at, fmt.Sprintf(format, a...))
	}
	h, err := decodeBoot(b[:bootSectorBytes])
	switch {
	case err != nil:
		return g, err
	case string(h.FileSystemName[:]) != fileSystemName:
		return fail(3, "the filesystem name is %q", h.FileSystemName[:])
	case h.BytesPerSectorShift != shift:
		return fail(108, "BytesPerSectorShift is %d, want %d", h.BytesPerSectorShift, shift)
	}
	// 3.4: the sector is full of repetitions of the sum.
	sum := bootChecksum(b[:checksumSector<<shift])
	for at := checksumSector << shift; at < len(b); at += 4 {
		if got := le.Uint32(b[at:]); got != sum {
			return fail(int64(at), "the checksum is 0x%08x, want 0x%08x", got, sum)
		}
	}
	ss := int64(1) << shift
	fatNeed := ((int64(h.ClusterCount)+2)*4 + ss - 1) / ss
	fatEnd := int64(h.FatOffset) + int64(h.FatLength)*int64(h.NumberOfFats)
	switch {
	case string(h.JumpBoot[:]) != jumpBoot:
		return fail(0, "JumpBoot is % x, want % x", h.JumpBoot, jumpBoot)
	case h.MustBeZero != [len(h.MustBeZero)]byte{}:
		return fail(offMustBeZero, "the bytes of a FAT's parameters are not zero")
	case h.BootSignature != bootSignature:
		return fail(510, "BootSignature is 0x%04x, want 0x%04x", h.BootSignature, bootSignature)
	case h.FileSystemRevision[1] != 1 || h.FileSystemRevision[0] > 99:
		return fail(104, "the revision is %d.%02d, and only 1.00 to 1.99 can be read", h.FileSystemRevision[1], h.FileSystemRevision[0])
	case int(shift)+int(h.SectorsPerClusterShift) > maxClusterShift:
		return fail(109, "clusters have 1<<%d bytes, at most 1<<%d are possible", int(shift)+int(h.SectorsPerClusterShift), maxClusterShift)
	case h.NumberOfFats != 1 && h.NumberOfFats != 2:
		return fail(110, "NumberOfFats is %d, want 1 or 2", h.NumberOfFats)
	case h.VolumeLength < minVolume>>shift || h.VolumeLength > uint64(size>>shift):
		return fail(72, "VolumeLength is %d sectors, want %d…%d: the device has %d bytes", h.VolumeLength, minVolume>>shift, size>>shift, size)
	case h.ClusterCount == 0 || h.ClusterCount > maxClusters:
		return fail(92, "ClusterCount is %d, want 1…%d", h.ClusterCount, uint32(maxClusters))
	case h.FatOffset < minFATOffset:
		return fail(80, "FatOffset is %d, want at least %d", h.FatOffset, minFATOffset)
	case int64(h.FatLength) < fatNeed:
		return fail(84, "FatLength is %d sectors, %d clusters need %d", h.FatLength, h.ClusterCount, fatNeed)
	case int64(h.ClusterHeapOffset) < fatEnd:
		return fail(88, "ClusterHeapOffset is %d, and the FATs end at %d", h.ClusterHeapOffset, fatEnd)
	case int64(h.ClusterHeapOffset)+int64(h.ClusterCount)<<h.SectorsPerClusterShift > int64(h.VolumeLength):
		return fail(92, "%d clusters of %d sectors from sector %d on do not fit in %d sectors",
			h.ClusterCount, 1<<h.SectorsPerClusterShift, h.ClusterHeapOffset, h.VolumeLength)
	case h.FirstClusterOfRootDirectory < 2 || int64(h.FirstClusterOfRootDirectory) > int64(h.ClusterCount)+1:
		return fail(96, "the root directory is at cluster %d, want 2…%d", h.FirstClusterOfRootDirectory, int64(h.ClusterCount)+1)
	case h.VolumeFlags.UseSecondFat() && h.NumberOfFats == 1:
		return fail(offVolumeFlags, "the second FAT is the active one, and there is only one")
	}
	g = Geometry{
		SectorSize: int(ss), ClusterSize: int(ss) << h.SectorsPerClusterShift, Sectors: int64(h.VolumeLength),
		FATOffset: h.FatOffset, FATLength: h.FatLength, HeapOffset: h.ClusterHeapOffset,
		ClusterCount: h.ClusterCount, Root: h.FirstClusterOfRootDirectory, Serial: h.VolumeSerialNumber,
		Revision: uint16(h.FileSystemRevision[1])<<8 | uint16(h.FileSystemRevision[0]), NumFATs: int(h.NumberOfFats),
		Dirty: h.VolumeFlags.IsDirty(), MediaFailure: h.VolumeFlags.HasHadMediaFailures(),
	}
	if h.VolumeFlags.UseSecondFat() {
		g.ActiveFAT = 1
	}
	return g, nil
}

// bootChecksum is the sum over sectors 0…10, without the fields that change while a volume is in use (3.4, figure 1).
func bootChecksum(b []byte) uint32 {
	var sum uint32
	for i, c := range b {
		if i != offVolumeFlags && i != offVolumeFlags+1 && i != offPercentInUse {
			sum = sum<<31 | sum>>1
			sum += uint32(c)
		}
	}
	return sum
}
