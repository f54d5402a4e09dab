package fatdriver

import (
	"fmt"
)

// fatEditor changes FAT entries on the medium: it reads a part of copy 0, patches it, and writes the sectors that
// changed to every copy. Entries come in ascending order, so each part is read and written once.
type fatEditor struct {
	v     *Volume
	base  int64 // byte offset of buf within a copy, -1 when nothing is loaded
	buf   []byte
	dirty []bool // by sector of buf
	wrote int64  // bytes written
	dry   bool   // count only
}

func (v *Volume) newFATEditor() *fatEditor { return &fatEditor{v: v, base: -1} }

// load makes the part that holds byte off of a copy the current one.
func (e *fatEditor) load(off int64) error {
	base := off / pageSize * pageSize
	if base == e.base {
		return nil
	}
	if err := e.flush(); err != nil {
		return err
	}
	size := min(int64(pageSize), e.v.geo.FATSize-base)
	if size <= 0 {
		return fmt.Errorf("internal error: FAT offset 0x%x is beyond its end", off)
	}
	e.buf = make([]byte, size)
	e.dirty = make([]bool, size/int64(e.v.geo.SectorSize))
	if !e.dry {
		if _, err := e.v.dev.ReadAt(e.buf, e.v.geo.FATOff+base); err != nil {
			return fmt.Errorf("cannot read FAT at offset 0x%x: %w", e.v.geo.FATOff+base, err)
		}
	}
	e.base = base
	return nil
}

// set changes the entry of c. Entries 0 and 1 are not links and are never touched (I5).
func (e *fatEditor) set(c Cluster, value uint32) error {
	g := &e.v.geo
	if !g.valid(c) {
		return fmt.Errorf("internal error: FAT entry %d is not a cluster's", c)
	}
	off, n := entryOffset(g.Type, c)
	if err := e.load(off); err != nil {
		return err
	}
	at := off - e.base
	encodeEntry(g.Type, c, e.buf[at:], value)
	e.dirty[at/int64(g.SectorSize)] = true
	e.dirty[(at+int64(n)-1)/int64(g.SectorSize)] = true
	return nil
}

// setHalf changes one of the two bytes of a straddling FAT12 entry: the one in the first sector or the one in the second.
func (e *fatEditor) setHalf(c Cluster, value uint32, second bool) error {
	off, _ := entryOffset(FAT12, c)
	if err := e.load(off); err != nil {
		return err
	}
	at := off - e.base
	both := [2]byte{e.buf[at], e.buf[at+1]}
	encodeEntry(FAT12, c, both[:], value)
	if second {
		at++
		both[0] = both[1]
	}
	e.buf[at] = both[0]
	e.dirty[at/int64(e.v.geo.SectorSize)] = true
	return nil
}

// flush writes what changed in the current part to every copy. It is no barrier.
func (e *fatEditor) flush() error {
	if e.base < 0 {
		return nil
	}
	ss := e.v.geo.SectorSize
	for i := 0; i < len(e.dirty); {
		if !e.dirty[i] {
			i++
			continue
		}
		k := i
		for k < len(e.dirty) && e.dirty[k] {
			k++
		}
		for n := 0; n < e.v.geo.NumFATs; n++ {
			e.wrote += int64((k - i) * ss)
			if e.dry {
				continue
			}
			off := e.v.geo.FATOff + int64(n)*e.v.geo.FATSize + e.base + int64(i*ss)
			if _, err := e.v.dev.WriteAt(e.buf[i*ss:k*ss], off); err != nil {
				return fmt.Errorf("cannot write FAT copy %d at offset 0x%x: %w", n, off, err)
			}
		}
		i = k
	}
	e.base = -1
	if !e.dry {
		e.v.fat.drop()
	}
	return nil
}

// linkChains enters chains into the FAT; they are sorted by first cluster. It returns the bytes written.
func (v *Volume) linkChains(chains []segment, dry bool) (int64, error) {
	e := v.newFATEditor()
	e.dry = dry
	for _, s := range chains {
		for i := uint32(0); i < s.Count; i++ {
			c := s.First + Cluster(i)
			next := uint32(c) + 1
			if i+1 == s.Count {
				next = s.next
			}
			if err := e.set(c, next); err != nil {
				return e.wrote, err
			}
		}
	}
	err := e.flush()
	return e.wrote, err
}

// freeRuns marks clusters free. A FAT12 entry that lies in two sectors cannot change in one write: half of it goes
// first, the half that leaves a legal value, and after a flush the other. It returns the bytes written and the flushes.
func (v *Volume) freeRuns(runs []Run, dry bool) (wrote int64, flushes int, err error) {
	type half struct {
		c      Cluster
		second bool
	}
	var later []half
	e := v.newFATEditor()
	e.dry = dry
	for _, r := range runs {
		for i := uint32(0); i < r.Count; i++ {
			c := r.First + Cluster(i)
			if !v.geo.straddles(c) {
				if err := e.set(c, entryFree); err != nil {
					return e.wrote, 0, err
				}
				continue
			}
			old, err := v.fat.get(c)
			if err != nil {
				return e.wrote, 0, err
			}
			second, ok := v.geo.halfFirst(c, old)
			if !ok {
				continue // stays lost rather than illegal for a moment
			}
			if err := e.setHalf(c, entryFree, second); err != nil {
				return e.wrote, 0, err
			}
			later = append(later, half{c, !second})
		}
	}
	if err := e.flush(); err != nil || len(later) == 0 {
		return e.wrote, 0, err
	}
	if !dry {
		// The other halves must not reach the medium before the first ones: the pair would pass through another value.
		if err := v.dev.Flush(); err != nil {
			return e.wrote, 1, fmt.Errorf("cannot flush between the halves of FAT12 entries: %w", err)
		}
	}
	for _, h := range later {
		if err := e.setHalf(h.c, entryFree, h.second); err != nil {
			return e.wrote, 1, err
		}
	}
	err = e.flush()
	return e.wrote, 1, err
}

// halfFirst says which half of a straddling entry with value old may become zero first: the second byte or the first,
// whichever leaves a value that every reader takes for legal (0, a cluster, or an end mark).
func (g *Geometry) halfFirst(c Cluster, old uint32) (second, ok bool) {
	old &= 0xFFF
	low, high := old&0xFF, old&0xF00
	if c&1 == 1 {
		low, high = old&0xF, old&0xFF0
	}
	legal := func(v uint32) bool { return v == 0 || g.valid(Cluster(v)) || v >= 0xFF8 }
	switch {
	case legal(low):
		return true, true
	case legal(high):
		return false, true
	}
	return false, false
}
