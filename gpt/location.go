package gpt

import (
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"
	"slices"

	"espmirror/blockdev"
)

var (
	// ErrNotESP is returned by CheckESP when a partition is not of type ESP or XBOOTLDR, or its type cannot be found out.
	ErrNotESP = errors.New("is not an EFI system partition")

	// ErrChanged is returned when a volume is no longer what was found under its name.
	ErrChanged = errors.New("has changed since it was found")
)

// Location is where a volume is. It stays valid while nobody changes the partition table, and Open notices when its
// path leads to something else.
type Location struct {
	Spec       string     // what the user called it
	Path       string     // device node or image to open
	Offset     int64      // bytes into Path
	Size       int64      // bytes; never 0
	SectorSize int        // bytes; of an image: that of its partition table, or 512
	Part       *Partition // nil when the volume has no partition table around it, or none that can be read
	Disk       string     // path of the whole disk or image; equal to Path unless that is a partition node
	DiskTable  *Table     // nil when Part is nil because there is no table
	TableErr   error      // why the table around a partition node could not be used
	PartNode   bool       // Path is a partition node

	id     blockdev.ID
	system blockdev.System
}

// String returns the canonical name of the volume, which Find understands: the path, followed by "@@p2" or "@@OFFSET"
// when the volume is only a part of it.
func (l *Location) String() string {
	switch {
	case l.Part != nil && !l.PartNode:
		return fmt.Sprintf("%s@@p%d", l.Path, l.Part.Number)
	case l.Offset != 0:
		return fmt.Sprintf("%s@@%d", l.Path, l.Offset)
	}
	return l.Path
}

// ID returns the identity of the node or image in which the volume lies.
func (l *Location) ID() blockdev.ID { return l.id }

// Volume is an open volume: a Device over exactly its bytes.
type Volume struct {
	blockdev.Device
	disk *blockdev.Disk
}

// Disk returns the open node or image in which the volume lies.
func (v *Volume) Disk() *blockdev.Disk { return v.disk }

// Close closes the volume. It does not flush.
func (v *Volume) Close() error { return v.disk.Close() }

// Open opens the volume. It returns the errors of blockdev.Open, and ErrChanged when the path leads elsewhere by now or
// has another size.
func (l *Location) Open(mode blockdev.Mode) (*Volume, error) {
	d, err := blockdev.Open(l.Path, mode, blockdev.WithSystem(l.system), blockdev.WithSectorSize(l.SectorSize),
		blockdev.WithClaim(l.Offset, l.Size))
	if err != nil {
		return nil, err
	}
	fail := func(err error) (*Volume, error) {
		_ = d.Close()
		return nil, fmt.Errorf("cannot open volume %s: %w", l, err)
	}
	if d.ID() != l.id {
		return fail(fmt.Errorf("%w: it is %s, and was %s", ErrChanged, d.ID(), l.id))
	}
	if l.PartNode && d.Size() != l.Size {
		return fail(fmt.Errorf("%w: it has 0x%x bytes, and had 0x%x", ErrChanged, d.Size(), l.Size))
	}
	w, err := blockdev.Window(d, l.Offset, l.Size)
	if err != nil {
		return fail(fmt.Errorf("%w: %w", ErrChanged, err))
	}
	return &Volume{Device: w, disk: d}, nil
}

// CheckESP returns ErrNotESP unless the volume is an ESP or XBOOTLDR partition. A volume without any table around it, a
// bare image, passes: nothing says what it is. A partition that shares bytes with another one does not pass, for it
// cannot be written without harm.
func (l *Location) CheckESP() error {
	fail := func(err error) error { return fmt.Errorf("cannot use %s: %w", l, err) }
	if l.Part == nil {
		if l.PartNode {
			return fail(fmt.Errorf("its type is unknown, so it %w: %w", ErrNotESP, l.TableErr))
		}
		return nil
	}
	if l.Part.Type != TypeESP && l.Part.Type != TypeXBOOTLDR {
		return fail(fmt.Errorf("it %w, its type is %s", ErrNotESP, l.Part.TypeName()))
	}
	if len(l.Part.Overlaps) > 0 {
		return fail(fmt.Errorf("%w: it overlaps partition %d", ErrDamaged, l.Part.Overlaps[0]))
	}
	return nil
}

// extent is a range of bytes on the storage at the bottom: a loop device and the image behind it have the same one.
type extent struct {
	id        blockdev.ID
	off, size int64
}

// extent finds the storage of the volume. A layer that cannot be looked through is taken for the bottom.
func (l *Location) extent() (extent, error) {
	e := extent{l.id, l.Offset, l.Size}
	// Loop devices over loop devices: the kernel has a limit of its own for the depth.
	for range 16 {
		if !e.id.Block {
			return e, nil
		}
		b, err := l.system.BlockByNum(e.id.Dev)
		if errors.Is(err, fs.ErrNotExist) {
			return e, nil
		}
		if err != nil {
			return e, err
		}
		switch {
		case b.Disk != "":
			disk, err := l.system.Block(b.Disk)
			if err != nil {
				return e, err
			}
			e.id.Dev = disk.Num
			e.off += b.Start
		case b.Loop != nil:
			id, _, err := l.system.BackingFile(b)
			if err != nil {
				return e, nil // the file was deleted: nobody can name it any more
			}
			e.id = id
			e.off += b.Loop.Offset
		default:
			return e, nil
		}
	}
	return e, nil
}

// SameVolume says whether two locations share storage: the same bytes, or overlapping ones, whatever the paths.
// Symbolic links, partitions and the whole disk, and loop devices over images are seen through; md and dm devices are
// not (their members are in use, and cannot be opened for writing).
func SameVolume(a, b *Location) (bool, error) {
	x, err := a.extent()
	if err != nil {
		return false, fmt.Errorf("cannot compare %s with %s: %w", a, b, err)
	}
	y, err := b.extent()
	if err != nil {
		return false, fmt.Errorf("cannot compare %s with %s: %w", a, b, err)
	}
	return x.id == y.id && x.off < y.off+y.size && y.off < x.off+x.size, nil
}

// source is an opened disk or image on the way to a Location.
type source struct {
	path   string
	spec   string
	id     blockdev.ID
	block  blockdev.Block // of a block device that sysfs knows
	size   int64
	sector int
	table  *Table
	err    error  // why there is no table: ErrNoTable, ErrDamaged or an I/O error
	fs     string // what the whole device holds, when there is no table
}

// block returns what sysfs knows of the device at path; the zero Block when it is an image, or sysfs does not know it.
func (f *Finder) block(path string, id blockdev.ID) (blockdev.Block, error) {
	if !id.Block && f.System.Root == "" {
		return blockdev.Block{}, nil
	}
	if !id.Block {
		// The nodes of another root are files, and only their names tell what they stand for.
		blocks, err := f.System.Blocks()
		if err != nil {
			return blockdev.Block{}, err
		}
		for _, b := range blocks {
			if b.Node == path {
				return b, nil
			}
		}
		return blockdev.Block{}, nil
	}
	b, err := f.System.BlockByNum(id.Dev)
	if errors.Is(err, fs.ErrNotExist) {
		return blockdev.Block{}, nil
	}
	return b, err
}

// openSource looks at a disk or image and closes it again.
func (f *Finder) openSource(spec, path string) (*source, error) {
	d, err := blockdev.Open(path, blockdev.ReadOnly, blockdev.WithSystem(f.System))
	if err != nil {
		return nil, err
	}
	defer d.Close()
	s := &source{path: path, spec: spec, id: d.ID(), size: d.Size(), sector: d.SectorSize()}
	if s.block, err = f.block(path, s.id); err != nil {
		return nil, err
	}
	s.table, s.err = Read(d)
	if s.err == nil {
		if !s.id.Block {
			s.sector = s.table.SectorSize
		}
		return s, nil
	}
	if s.fs, err = Probe(d); err != nil {
		return nil, fmt.Errorf("cannot look at %s: %w", path, err)
	}
	return s, nil
}

// whole returns the location of a device without a table around it.
func (f *Finder) whole(s *source) *Location {
	return &Location{Spec: s.spec, Path: s.path, Size: s.size, SectorSize: s.sector, Disk: s.path, id: s.id, system: f.System}
}

// part returns the location of a partition: its node when the kernel has one, since the page caches of disk and
// partition do not agree, else a window on the disk. It returns ErrChanged when the kernel's idea of the partition is
// another one than the table's.
func (f *Finder) part(s *source, p *Partition) (*Location, error) {
	l := &Location{Spec: s.spec, Path: s.path, Offset: p.Start, Size: p.Size, SectorSize: s.sector, Part: p,
		Disk: s.path, DiskTable: s.table, id: s.id, system: f.System}
	if s.block.Name == "" {
		return l, nil
	}
	blocks, err := f.System.Blocks()
	if err != nil {
		return nil, err
	}
	i := slices.IndexFunc(blocks, func(b blockdev.Block) bool { return b.Disk == s.block.Name && b.Partition == p.Number })
	if i < 0 {
		return l, nil
	}
	b := blocks[i]
	if b.Start != p.Start || b.Size != p.Size {
		return nil, fmt.Errorf("cannot use partition %d of %s: %w: the kernel has it at offset 0x%x with 0x%x bytes, the table at 0x%x with 0x%x: run partprobe",
			p.Number, s.path, ErrChanged, b.Start, b.Size, p.Start, p.Size)
	}
	id, err := blockdev.Identify(b.Node)
	if err != nil {
		return nil, fmt.Errorf("cannot find %s: %w", b.Node, err)
	}
	l.Path, l.Offset, l.PartNode, l.id = b.Node, 0, true, id
	return l, nil
}

// partNode returns the location of a partition node. What its disk says about it is found by number and place; without
// that Part is nil, and TableErr says why.
func (f *Finder) partNode(spec, path string, b blockdev.Block, id blockdev.ID) (*Location, error) {
	l := &Location{Spec: spec, Path: path, Size: b.Size, PartNode: true, id: id, system: f.System}
	disk, err := f.System.Block(b.Disk)
	if err != nil {
		return nil, err
	}
	l.Disk = disk.Node
	d, err := blockdev.Open(path, blockdev.ReadOnly, blockdev.WithSystem(f.System))
	if err != nil {
		return nil, err
	}
	l.Size, l.SectorSize = d.Size(), d.SectorSize()
	if err := d.Close(); err != nil {
		return nil, err
	}
	s, err := f.openSource(spec, disk.Node)
	if err != nil {
		l.TableErr = err
		return l, nil
	}
	if s.err != nil {
		l.TableErr = s.err
		return l, nil
	}
	l.DiskTable = s.table
	p := s.table.Find(b.Partition)
	if p == nil || p.Start != b.Start || p.Size != l.Size {
		l.TableErr = fmt.Errorf("%w: the table of %s has no such partition", ErrChanged, filepath.Base(disk.Node))
		return l, nil
	}
	l.Part = p
	return l, nil
}

// ErrNotDisk is returned by Whole for a partition.
var ErrNotDisk = errors.New("is a partition, not a whole disk")

// Whole returns the location of a whole disk or image, whatever it holds.
func (f *Finder) Whole(path string) (*Location, error) {
	id, err := blockdev.Identify(path)
	if err != nil {
		return nil, err
	}
	b, err := f.block(path, id)
	if err != nil {
		return nil, err
	}
	if b.Disk != "" {
		return nil, ErrNotDisk
	}
	d, err := blockdev.Open(path, blockdev.ReadOnly, blockdev.WithSystem(f.System))
	if err != nil {
		return nil, err
	}
	l := &Location{Spec: path, Path: path, Size: d.Size(), SectorSize: d.SectorSize(), Disk: path, id: id, system: f.System}
	return l, d.Close()
}

// Part returns the location of a partition of a disk or image, by its number.
func (f *Finder) Part(path string, number int) (*Location, error) {
	return f.findIn(fmt.Sprintf("%s@@p%d", path, number), path, fmt.Sprintf("p%d", number))
}
