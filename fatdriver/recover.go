package fatdriver

import (
	"bytes"
	"encoding/binary"
	"fmt"

	"espmirror/blockdev"
)

// MendFATs makes the other FAT copies equal to copy 0, which is the one that firmware and Linux read. It returns the
// number of bytes written, and does not flush. The volume must have at most two copies and mirroring on (TargetError).
// Where they differ and copy 0 holds values that nobody writes, it is copy 0 that was damaged: it returns ErrDamaged and
// leaves the other one, which may be the intact one, alone.
func (v *Volume) MendFATs() (int64, error) {
	g := &v.geo
	var wrote int64
	unit := min(int64(pageSize), g.FATSize)
	want, have := make([]byte, unit), make([]byte, unit)
	ss := int64(g.SectorSize)
	for n := 1; n < g.NumFATs; n++ {
		for at := int64(0); at < g.FATSize; at += pageSize {
			k := min(int64(pageSize), g.FATSize-at)
			off := g.FATOff + int64(n)*g.FATSize + at
			if _, err := v.dev.ReadAt(want[:k], g.FATOff+at); err != nil {
				return wrote, fmt.Errorf("cannot read FAT at offset 0x%x: %w", firstUnreadable(v.dev, want[:k], g.FATOff+at, g.block()), err)
			}
			_, err := v.dev.ReadAt(have[:k], off)
			if err != nil {
				clear(have[:k]) // unreadable: rewriting it may mend it, and nobody reads it
			}
			if err == nil && bytes.Equal(want[:k], have[:k]) {
				continue
			}
			if wrote == 0 {
				if err := v.possible(); err != nil {
					return 0, err
				}
			}
			for s := int64(0); s < k; s += ss {
				if err == nil && bytes.Equal(want[s:s+ss], have[s:s+ss]) {
					continue
				}
				if _, err := v.dev.WriteAt(want[s:s+ss], off+s); err != nil {
					return wrote, fmt.Errorf("cannot write FAT copy %d at offset 0x%x: %w", n, off+s, err)
				}
				wrote += ss
			}
		}
	}
	return wrote, nil
}

// possible returns ErrDamaged when an entry of copy 0 is one that no FAT writer leaves behind: 1, or beyond the volume.
func (v *Volume) possible() error {
	return v.fat.eachUsed(func(c Cluster, e uint32) error {
		if e == 1 || e > uint32(v.geo.MaxCluster()) && e < entryBad {
			return fmt.Errorf("%w: the FAT copies differ, and in copy 0 the entry of cluster %d is 0x%x", ErrDamaged, c, e)
		}
		return nil
	})
}

// lost calls f for each cluster that is allocated in the FAT and that no file or directory has.
func (t *Tree) lost(f func(c Cluster, entry uint32) error) error {
	return t.vol.fat.eachUsed(func(c Cluster, e uint32) error {
		if e == entryBad || t.used.has(c) {
			return nil
		}
		return f(c, e)
	})
}

// Uses says whether a cluster belongs to a file or directory of the tree.
func (t *Tree) Uses(c Cluster) bool { return t.vol.geo.valid(c) && t.used.has(c) }

// Lost lists the clusters that are allocated and that nobody can reach.
func (t *Tree) Lost() ([]Run, error) {
	var runs []Run
	err := t.lost(func(c Cluster, _ uint32) error {
		runs = appendCluster(runs, c)
		return nil
	})
	return runs, err
}

// LostBlank lists the lost clusters that are alone in their chain and hold nothing but zeros: what the extension of a
// directory leaves when it is cut before its commit, and what nobody can want back.
func (t *Tree) LostBlank() ([]Run, error) {
	var ends []Cluster
	linked := map[Cluster]bool{}
	err := t.lost(func(c Cluster, entry uint32) error {
		if entry >= entryEOC {
			ends = append(ends, c)
		} else {
			linked[Cluster(entry)] = true
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	var runs []Run
	for _, c := range ends {
		if linked[c] {
			continue
		}
		b, err := t.vol.ReadCluster(c, t.vol.geo.ClusterSize)
		if err == nil && zero(b) { // one that cannot be read is not known to be blank
			runs = appendCluster(runs, c)
		}
	}
	return runs, nil
}

// Release frees those clusters of the given runs that are allocated and that nobody can reach, in every FAT copy, and
// returns their number. It does not flush. The tree must have no damage, or what seems unreachable may not be.
func (t *Tree) Release(sets ...[]Run) (int64, error) {
	g := &t.vol.geo
	in := newBitmap(g)
	for _, runs := range sets {
		for _, r := range runs {
			if r.Count == 0 || !g.valid(r.First) || uint64(r.First)+uint64(r.Count)-1 > uint64(g.MaxCluster()) {
				return 0, fmt.Errorf("cannot free clusters %d+%d: outside 2…%d", r.First, r.Count, g.MaxCluster())
			}
		}
		in.setRuns(runs)
	}
	var free []Run
	err := t.lost(func(c Cluster, _ uint32) error {
		if in.has(c) {
			free = appendCluster(free, c)
		}
		return nil
	})
	if err != nil || len(free) == 0 {
		return 0, err
	}
	if _, _, err := t.vol.freeRuns(free, false); err != nil {
		return 0, err
	}
	return clustersIn(free), nil
}

// FreeClusters counts the free entries of the FAT.
func (v *Volume) FreeClusters() (int64, error) {
	n := int64(v.geo.Clusters)
	err := v.fat.eachUsed(func(Cluster, uint32) error {
		n--
		return nil
	})
	return n, err
}

// MendFSInfo writes the true free count where FSInfo says something else, or, with onlyUnknown, where it says nothing.
// An FSInfo that a cut turned to garbage is made anew, as far as lostFSInfo says that it is one. It says whether it
// wrote, and does not flush.
func (v *Volume) MendFSInfo(onlyUnknown bool) (bool, error) {
	b, readErr := v.fsinfo()
	made := false
	if readErr != nil || b == nil && !onlyUnknown {
		b = v.lostFSInfo()
		made = b != nil
	}
	if b == nil || !made && onlyUnknown && binary.LittleEndian.Uint32(b[fsiFree:]) != fsiUnknown {
		return false, readErr
	}
	n, err := v.FreeClusters()
	if err != nil {
		return false, err
	}
	if !made && binary.LittleEndian.Uint32(b[fsiFree:]) == uint32(n) {
		return false, nil
	}
	binary.LittleEndian.PutUint32(b[fsiFree:], uint32(n))
	return true, v.putFSInfo(b)
}

// lostFSInfo returns a new FSInfo sector for one that is unreadable, or has other content; nil where it must not be
// written. The boot sector says that the place is FSInfo's. What cannot be read is of no use to anybody,
// and Linux does not mount such a volume. Other content may be somebody's code, unless it is blank or FSInfo's backup is
// where it should be, as many sectors behind the backup boot sector as FSInfo is behind the boot sector.
func (v *Volume) lostFSInfo() []byte {
	g := &v.geo
	if g.FSInfoOff < 0 || g.FSInfoOff == g.BackupBootOff {
		return nil
	}
	b := make([]byte, g.SectorSize)
	readable := true // unless it fails once more; what was there may come back
	if err := v.readAround(b, g.FSInfoOff, func(sector []byte, off int64, _ error) error {
		clear(sector)
		readable = readable && off >= g.FSInfoOff+512
		return nil
	}); err != nil {
		return nil
	}
	if readable && !zero(b[:512]) && !bytes.Equal(b[:512], bytes.Repeat([]byte{0xFF}, 512)) {
		backup := g.BackupBootOff + g.FSInfoOff
		if g.BackupBootOff < 0 || backup+int64(g.SectorSize) > g.FATOff {
			return nil
		}
		c := make([]byte, 512)
		if _, err := v.dev.ReadAt(c, backup); err != nil || !fsinfoSigned(c) {
			return nil
		}
	}
	le := binary.LittleEndian
	clear(b[:512])
	le.PutUint32(b[fsiLead:], fsiLeadSig)
	le.PutUint32(b[fsiStruct:], fsiStrSig)
	le.PutUint32(b[fsiFree:], fsiUnknown)
	le.PutUint32(b[fsiNext:], fsiUnknown)
	le.PutUint32(b[fsiTrail:], fsiTrailSig)
	return b
}

// Taken says whether every cluster of runs is allocated.
func (v *Volume) Taken(runs []Run) (bool, error) {
	for _, r := range runs {
		for i := uint32(0); i < r.Count; i++ {
			c := r.First + Cluster(i)
			if !v.geo.valid(c) {
				return false, nil
			}
			if e, err := v.fat.get(c); err != nil || e == entryFree {
				return false, err
			}
		}
	}
	return true, nil
}

// PlausibleDir says whether a sector could be part of a directory: every slot in use has a name and attributes that
// some system could have written. A sector that became garbage, or zeros where entries were, is told from one that
// another system changed.
func (v *Volume) PlausibleDir(img []byte) bool {
	live := 0
	for at := 0; at+slotSize <= len(img); at += slotSize {
		s := img[at : at+slotSize]
		switch {
		case s[0] == slotEnd:
			if at == 0 {
				return false
			}
			return live > 0 || at > 0
		case s[0] == slotDeleted:
			continue
		case s[offAttr]&attrLongMask == attrLong:
			if n := s[offLongOrd] &^ longLast; n == 0 || n > 20 || s[offLongType] != 0 || s[offLongClus] != 0 || s[offLongClus+1] != 0 {
				return false
			}
		default:
			if s[0] != '.' && badShortName(s) != "" || s[offAttr]&0xC0 != 0 {
				return false
			}
			if c := slotCluster(v.geo.Type, s); c != 0 && !v.geo.valid(c) {
				return false
			}
		}
		live++
	}
	return true
}

// fileDevice is the content of a file as a device: its clusters in the order of its chain.
type fileDevice struct {
	blockdev.Device
	v    *Volume
	runs []Run
	size int64
}

// FileDevice returns the content of a file as a bounded device that can be written in place; nothing else of the volume
// can be reached through it. It is for files that are ours alone, as the journal is.
func (t *Tree) FileDevice(n *Node) (blockdev.Device, error) {
	if n.IsDir() || n.err != nil || len(n.Runs) == 0 {
		return nil, fmt.Errorf("cannot open %s for writing in place: it is not a whole file", n.Path())
	}
	return &fileDevice{Device: t.vol.dev, v: t.vol, runs: n.Runs, size: n.Size()}, nil
}

func (d *fileDevice) Size() int64 { return d.size }

// each calls f for each contiguous part of [off, off+len(p)).
func (d *fileDevice) each(p []byte, off int64, f func(part []byte, at int64) error) (int, error) {
	if err := blockdev.CheckRange(off, len(p), d.size); err != nil {
		return 0, err
	}
	done := 0
	cs := int64(d.v.geo.ClusterSize)
	for _, r := range d.runs {
		size := int64(r.Count) * cs
		if off >= size {
			off -= size
			continue
		}
		if len(p) == 0 {
			break
		}
		k := min(int64(len(p)), size-off)
		if err := f(p[:k], d.v.geo.ClusterOff(r.First)+off); err != nil {
			return done, err
		}
		p, off, done = p[k:], 0, done+int(k)
	}
	return done, nil
}

// ReadAt implements blockdev.Device.
func (d *fileDevice) ReadAt(p []byte, off int64) (int, error) {
	return d.each(p, off, func(part []byte, at int64) error { _, err := d.v.dev.ReadAt(part, at); return err })
}

// WriteAt implements blockdev.Device.
func (d *fileDevice) WriteAt(p []byte, off int64) (int, error) {
	return d.each(p, off, func(part []byte, at int64) error { _, err := d.v.dev.WriteAt(part, at); return err })
}

// EachChain calls f with every cluster that begins a chain, whoever it belongs to, until f says to stop.
func (v *Volume) EachChain(f func(first Cluster) (more bool, err error)) error {
	linked := newBitmap(&v.geo)
	for c := Cluster(2); c <= v.geo.MaxCluster(); c++ {
		e, err := v.fat.get(c)
		if err != nil {
			return err
		}
		if v.geo.valid(Cluster(e)) {
			linked.set(Cluster(e))
		}
	}
	for c := Cluster(2); c <= v.geo.MaxCluster(); c++ {
		e, err := v.fat.get(c)
		if err != nil {
			return err
		}
		if e == entryFree || e == entryBad || linked.has(c) {
			continue
		}
		if more, err := f(c); err != nil || !more {
			return err
		}
	}
	return nil
}

// ChainDevice returns the content of the chain that begins at first as a device of size bytes, as FileDevice does for a
// file. The chain must have exactly the clusters that size asks for.
func (v *Volume) ChainDevice(first Cluster, size int64) (blockdev.Device, []Run, error) {
	cs := int64(v.geo.ClusterSize)
	want := (size + cs - 1) / cs
	if size <= 0 || want > int64(v.geo.Clusters) {
		return nil, nil, fmt.Errorf("cannot open the chain from cluster %d: a size of %d bytes", first, size)
	}
	runs, err := v.chain(first, want, newBitmap(&v.geo))
	if err == nil && clustersIn(runs) != want {
		err = fmt.Errorf("it has %d clusters, want %d", clustersIn(runs), want)
	}
	if err != nil {
		return nil, nil, fmt.Errorf("cannot open the chain from cluster %d: %w", first, err)
	}
	return &fileDevice{Device: v.dev, v: v, runs: runs, size: size}, runs, nil
}

// ReadCluster reads the first n bytes of a cluster, whoever it belongs to.
func (v *Volume) ReadCluster(c Cluster, n int) ([]byte, error) {
	if !v.geo.valid(c) || n > v.geo.ClusterSize {
		return nil, fmt.Errorf("cannot read cluster %d: outside 2…%d", c, v.geo.MaxCluster())
	}
	b := make([]byte, n)
	if _, err := v.dev.ReadAt(b, v.geo.ClusterOff(c)); err != nil {
		return nil, fmt.Errorf("cannot read cluster %d at offset 0x%x: %w", c, v.geo.ClusterOff(c), err)
	}
	return b, nil
}

// InDirectory says whether byte off of the volume lies in the slots of the directory at path.
func (t *Tree) InDirectory(path string, off int64) bool {
	n := t.Lookup(path)
	return n != nil && t.inDirectory(n, off)
}

// InAnyDirectory says whether byte off of the volume lies in the slots of a directory that can be reached.
func (t *Tree) InAnyDirectory(off int64) bool {
	todo := []*Node{t.Root}
	for len(todo) > 0 {
		n := todo[len(todo)-1]
		todo = todo[:len(todo)-1]
		if t.inDirectory(n, off) {
			return true
		}
		todo = append(todo, n.Children...)
	}
	return false
}

func (t *Tree) inDirectory(n *Node, off int64) bool {
	if !n.IsDir() {
		return false
	}
	g := &t.vol.geo
	if n.Parent == nil && g.Type != FAT32 {
		return off >= g.RootOff && off < g.RootOff+g.RootSize
	}
	for _, r := range n.Runs {
		if from := g.ClusterOff(r.First); off >= from && off < from+int64(r.Count)*int64(g.ClusterSize) {
			return true
		}
	}
	return false
}

// OnlyChild takes a cluster, whoever it belongs to, for the beginning of a directory with one entry, and returns the first
// cluster of that entry; 0 when the cluster cannot be that.
func (v *Volume) OnlyChild(c Cluster) (Cluster, error) {
	b, err := v.ReadCluster(c, 4*slotSize)
	if err != nil {
		return 0, err
	}
	t := v.geo.Type
	if string(b[:11]) != ".          " || slotCluster(t, b) != c || string(b[slotSize:slotSize+11]) != "..         " {
		return 0, nil
	}
	s := b[2*slotSize:]
	if s[offAttr]&attrLongMask == attrLong {
		s = s[slotSize:]
	}
	if child := slotCluster(t, s); s[0] != slotEnd && v.geo.valid(child) {
		return child, nil
	}
	return 0, nil
}
