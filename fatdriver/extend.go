package fatdriver

import (
	"fmt"
)

// NewExtension plans to make a directory some clusters of zeros longer, which changes nothing that anybody can see in it.
// It is what ErrNeedSlots asks for. The commit is the FAT entry that held the chain's end mark, in copy 0 and then in
// copy 1. The new cluster is taken from the same FAT sector where one is free there: then its own entry and the link
// change in one write, and a cut cannot even leave a lost cluster.
//
// More than one cluster becomes a chain of its own, linked before the commit; it may be that only one can be had.
func (t *Tree) NewExtension(dir *Node, clusters int64) (*Plan, error) {
	v := t.vol
	g := &v.geo
	if len(dir.Runs) == 0 {
		return nil, fmt.Errorf("%w: the root directory cannot grow", ErrNoSpace)
	}
	if clustersIn(dir.Runs)+clusters > v.maxDirClusters() {
		return nil, fmt.Errorf("%w: directory /%s would need more than %d slots, which is the most", ErrNoSpace, dir.Path(), maxSlots)
	}
	lastRun := dir.Runs[len(dir.Runs)-1]
	tail := lastRun.First + Cluster(lastRun.Count) - 1
	if g.straddles(tail) {
		return nil, fmt.Errorf("%w: directory /%s cannot grow, because the FAT12 entry of its last cluster %d lies in two sectors", ErrNoSpace, dir.Path(), tail)
	}
	a, err := newAllocator(v)
	if err != nil {
		return nil, err
	}
	sector := func(c Cluster) int64 { off, _ := entryOffset(g.Type, c); return off / int64(g.block()) }
	if clusters > 1 {
		// The commit sector must be as it was until the commit, so the chain is made of entries in others. Where there are
		// not enough, the directory grows by one.
		var apart []Run
		for _, r := range a.free {
			for i := uint32(0); i < r.Count; i++ {
				if c := r.First + Cluster(i); sector(c) != sector(tail) {
					apart = appendCluster(apart, c)
				}
			}
		}
		if clustersIn(apart) < clusters {
			clusters = 1
		} else {
			a.setFree(apart)
		}
	}
	var next Cluster
	for _, r := range a.free {
		for i := uint32(0); i < r.Count && next == 0 && clusters == 1; i++ {
			if c := r.First + Cluster(i); sector(c) == sector(tail) {
				next = c
			} else if sector(c) < sector(tail) {
				continue
			} else {
				break
			}
		}
	}
	if next == 0 {
		if a.left == 0 {
			return nil, fmt.Errorf("%w: directory /%s must grow, and no cluster is free", ErrNoSpace, dir.Path())
		}
		next = a.free[a.at].First
	}
	runs := []Run{{next, 1}}
	if clusters > 1 {
		if runs, err = a.file(clusters, false); err != nil {
			return nil, err
		}
		next = runs[0].First
	}
	p := &Plan{
		tree: t, freeTotal: a.total, alloc: newBitmap(g), free: newBitmap(g),
		dirs: []*dirImage{{runs, make([]byte, clusters*int64(g.ClusterSize)), dir.Path()}},
	}
	p.alloc.setRuns(runs)
	p.allocRuns = p.alloc.runs() // ascending, which the chain need not be
	linked := clusters > 1 || sector(next) != sector(tail)
	if linked {
		p.addChain(runs)
	}
	fatSector := make([]byte, g.block())
	for n := 0; n < g.NumFATs; n++ {
		off := g.FATOff + int64(n)*g.FATSize + sector(tail)*int64(g.block())
		if _, err := v.dev.ReadAt(fatSector, off); err != nil {
			return nil, fmt.Errorf("cannot read FAT copy %d at offset 0x%x: %w", n, off, err)
		}
		b := Block{Off: off, Old: append([]byte(nil), fatSector...), New: append([]byte(nil), fatSector...), Paths: []string{dir.Path() + " (grows)"}}
		at := func(c Cluster) int64 { o, _ := entryOffset(g.Type, c); return o % int64(g.block()) }
		encodeEntry(g.Type, tail, b.New[at(tail):], uint32(next))
		if !linked {
			encodeEntry(g.Type, next, b.New[at(next):], entryLast)
		}
		p.Blocks = append(p.Blocks, b)
	}
	for _, c := range []Cluster{tail, next} {
		e, err := v.fat.get(c)
		if err != nil {
			return nil, err
		}
		if c == tail && (e < entryEOC || !t.used.has(c)) || c == next && (e != entryFree || t.used.has(c) || g.straddles(c)) {
			return nil, fmt.Errorf("%w: I2: cluster %d has the entry 0x%x", errInvariant, c, e)
		}
	}
	return p, nil
}
