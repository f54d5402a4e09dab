package fatdriver

import (
	"bytes"
	"encoding/binary"
	"fmt"
)

// MendFATs makes the other FAT copies equal to copy 0, which is the one that firmware and Linux read. It returns the
// number of bytes written, and does not flush. The volume must have at most two copies and mirroring on (TargetError).
func (v *Volume) MendFATs() (int64, error) {
	g := &v.geo
	var wrote int64
	want, have := make([]byte, pageSize), make([]byte, pageSize)
	ss := int64(g.SectorSize)
	for n := 1; n < g.NumFATs; n++ {
		for at := int64(0); at < g.FATSize; at += pageSize {
			k := min(int64(pageSize), g.FATSize-at)
			off := g.FATOff + int64(n)*g.FATSize + at
			if _, err := v.dev.ReadAt(want[:k], g.FATOff+at); err != nil {
				return wrote, fmt.Errorf("cannot read FAT at offset 0x%x: %w", g.FATOff+at, err)
			}
			_, err := v.dev.ReadAt(have[:k], off)
			if err != nil {
				clear(have[:k]) // unreadable: rewriting it may mend it, and nobody reads it
			}
			if err == nil && bytes.Equal(want[:k], have[:k]) {
				continue
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

// lost calls f for each cluster that is allocated in the FAT and that no file or directory has.
func (t *Tree) lost(f func(c Cluster, entry uint32) error) error {
	for c := Cluster(2); c <= t.vol.geo.MaxCluster(); c++ {
		if t.used.has(c) {
			continue
		}
		e, err := t.vol.fat.get(c)
		if err != nil {
			return err
		}
		if e == entryFree || e == entryBad {
			continue
		}
		if err := f(c, e); err != nil {
			return err
		}
	}
	return nil
}

// Lost lists the clusters that are allocated and that nobody can reach.
func (t *Tree) Lost() ([]Run, error) {
	var runs []Run
	err := t.lost(func(c Cluster, _ uint32) error {
		runs = appendCluster(runs, c)
		return nil
	})
	return runs, err
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
	var n int64
	for c := Cluster(2); c <= v.geo.MaxCluster(); c++ {
		e, err := v.fat.get(c)
		if err != nil {
			return 0, err
		}
		if e == entryFree {
			n++
		}
	}
	return n, nil
}

// MendFSInfo writes the true free count where FSInfo says something else, and says whether it did. It does not flush.
func (v *Volume) MendFSInfo() (bool, error) {
	b, err := v.fsinfo()
	if err != nil || b == nil {
		return false, err
	}
	n, err := v.FreeClusters()
	if err != nil {
		return false, err
	}
	if binary.LittleEndian.Uint32(b[fsiFree:]) == uint32(n) {
		return false, nil
	}
	return true, v.setFree(uint32(n))
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

// Extent is where the content of a contiguous file lies, in bytes on the volume. It returns false when the file is in
// several runs or empty.
func (t *Tree) Extent(n *Node) (off, size int64, ok bool) {
	if n.IsDir() || n.err != nil || len(n.Runs) != 1 {
		return 0, 0, false
	}
	return t.vol.geo.ClusterOff(n.Runs[0].First), n.Size(), true
}
