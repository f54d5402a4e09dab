package fatdriver

import (
	"bytes"
	"fmt"
	"slices"
)

// assert checks a finished plan against the invariants of the protocol, from the plan's own output and the tree on the
// volume, not from how the plan came about. A violation is a bug of ours, and is found before the first write.
func (p *Plan) assert() error {
	v := p.tree.vol
	g := &v.geo
	fail := func(inv string, format string, a ...any) error {
		return fmt.Errorf("%w: %s: %s", errInvariant, inv, fmt.Sprintf(format, a...))
	}
	// I2: what is allocated is free on the medium, unreachable, and never a straddling entry.
	for _, r := range p.allocRuns {
		for i := uint32(0); i < r.Count; i++ {
			c := r.First + Cluster(i)
			e, err := v.fat.get(c)
			if err != nil {
				return err
			}
			if !g.valid(c) || e != entryFree || p.tree.used.has(c) || g.straddles(c) {
				return fail("I2", "cluster %d is to be allocated, its entry is 0x%x", c, e)
			}
		}
	}
	// I3: what is freed was reachable before, or is a shadow of an intermediate step.
	for w := range p.free {
		if extra := p.free[w] &^ (p.tree.used[w] | p.alloc[w]); extra != 0 {
			return fail("I3", "clusters 0x%x of word %d are to be freed, but nobody had them", extra, w)
		}
	}
	// I4: every allocated cluster is in exactly one chain, and chains have the length that sizes ask for.
	seen := newBitmap(g)
	for _, s := range p.chains {
		for i := uint32(0); i < s.Count; i++ {
			c := s.First + Cluster(i)
			if seen.has(c) || !p.alloc.has(c) {
				return fail("I4", "cluster %d is in two chains, or was not allocated", c)
			}
			seen.set(c)
		}
		if s.next != entryLast && !p.alloc.has(Cluster(s.next)) {
			return fail("I4", "the chain at cluster %d leads to cluster %d, which was not allocated", s.First, s.next)
		}
	}
	if !slices.Equal(seen, p.alloc) {
		return fail("I4", "a cluster was allocated and is in no chain")
	}
	cs := int64(g.ClusterSize)
	for _, f := range p.Files {
		if have, want := clustersIn(f.Runs), (f.Want.Size+cs-1)/cs; have != want {
			return fail("I4", "%q has %d bytes and %d clusters of %d", f.Want.Name, f.Want.Size, have, cs)
		}
	}
	for _, d := range p.dirs {
		if clustersIn(d.runs)*cs != int64(len(d.image)) {
			return fail("I4", "directory %s has %d bytes and %d clusters", d.path, len(d.image), clustersIn(d.runs))
		}
	}
	// I1, I7: blocks lie in directories that are reachable and stay, and change only the slots of their entries.
	for i, b := range p.Blocks {
		if len(b.Old) != g.block() || len(b.New) != g.block() || b.Off%int64(g.block()) != 0 {
			return fail("I7", "block %d at offset 0x%x is not one sector", i, b.Off)
		}
		inRoot := g.Type != FAT32 && b.Off >= g.RootOff && b.Off+int64(g.block()) <= g.RootOff+g.RootSize
		if !inRoot {
			c := Cluster((b.Off-g.DataOff)/cs) + 2
			if b.Off < g.DataOff || !g.valid(c) || !p.tree.used.has(c) || p.free.has(c) || p.alloc.has(c) {
				return fail("I1", "block %d at offset 0x%x is not in a directory that stays", i, b.Off)
			}
		}
		allowed := map[int64]bool{}
		for _, off := range p.slotEdits[b.Off] {
			allowed[off-b.Off] = true
		}
		for at := 0; at < g.block(); at += slotSize {
			if !bytes.Equal(b.Old[at:at+slotSize], b.New[at:at+slotSize]) && !allowed[int64(at)] {
				return fail("I1", "block %d at offset 0x%x changes slot %d, which belongs to nobody selected", i, b.Off, at/slotSize)
			}
		}
	}
	// The end state, read from the images: every cluster that is reachable in it has one owner, and none is freed.
	return p.assertEnd(fail)
}

// assertEnd checks the state after the last commit: what a new directory reaches is allocated or kept, and never freed.
func (p *Plan) assertEnd(fail func(string, string, ...any) error) error {
	v := p.tree.vol
	g := &v.geo
	firsts := map[Cluster]bool{}
	for _, f := range p.Files {
		firsts[firstOf(f.Runs)] = true
	}
	dirs := map[Cluster]*dirImage{}
	for _, d := range p.dirs {
		firsts[firstOf(d.runs)] = true
		dirs[firstOf(d.runs)] = d
	}
	images := map[int64][]byte{}
	for _, b := range p.Blocks {
		images[b.Off] = b.New
	}
	owner := map[Cluster]string{}
	var check func(raw []byte, where string) error
	check = func(raw []byte, where string) error {
		for at := 0; at+slotSize <= len(raw); at += slotSize {
			s := raw[at : at+slotSize]
			if s[0] == slotEnd {
				break
			}
			if s[0] == slotDeleted || s[offAttr]&attrLongMask == attrLong || s[offAttr]&AttrLabel != 0 || s[0] == '.' {
				continue
			}
			c := slotCluster(g.Type, s)
			if c == 0 {
				continue
			}
			if prev, ok := owner[c]; ok {
				return fail("I4", "cluster %d would begin both %s and an entry of %s", c, prev, where)
			}
			owner[c] = where
			if p.free.has(c) {
				return fail("I2", "an entry of %s begins with cluster %d, which is to be freed", where, c)
			}
			if !firsts[c] && !p.tree.used.has(c) {
				return fail("I1", "an entry of %s begins with cluster %d, which holds nothing", where, c)
			}
			if d := dirs[c]; d != nil {
				if slotCluster(g.Type, d.image) != c {
					return fail("I4", `"." of %s is not its own cluster %d`, d.path, c)
				}
				if err := check(d.image, d.path); err != nil {
					return err
				}
			}
		}
		return nil
	}
	for off, img := range images {
		if err := check(img, fmt.Sprintf("the directory at offset 0x%x", off)); err != nil {
			return err
		}
	}
	return nil
}
