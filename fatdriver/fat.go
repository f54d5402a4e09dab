package fatdriver

import (
	"encoding/binary"
	"fmt"
	"sync"

	"espmirror/blockdev"
)

// Values of FAT entries that are not links, widened to 28 bits (fatgen103, "FAT Data Structure").
const (
	entryFree = 0
	entryBad  = 0x0FFFFFF7
	entryEOC  = 0x0FFFFFF8 // first of the end-of-chain range
	entryLast = 0x0FFFFFFF // the end mark that is written
)

// pageSize is the unit in which the FAT is read and cached: a multiple of every sector size.
const pageSize = 64 << 10

// maxPages bounds the cached part of a FAT to 16 MiB, so that a volume that claims 2^28 clusters costs no more.
const maxPages = 256

// table is one FAT copy, read in pages. Its entries are those of the medium: a transaction keeps its edits elsewhere.
type table struct {
	dev blockdev.Device
	geo *Geometry
	off int64 // byte offset of this copy

	mu    sync.Mutex
	pages map[int64][]byte
	lastN int64
	last  []byte
}

func newTable(dev blockdev.Device, geo *Geometry, copyNo int) *table {
	return &table{dev: dev, geo: geo, off: geo.FATOff + int64(copyNo)*geo.FATSize, lastN: -1}
}

// page returns page n of the copy. The caller holds t.mu.
func (t *table) page(n int64) ([]byte, error) {
	if n == t.lastN {
		return t.last, nil
	}
	p, ok := t.pages[n]
	if !ok {
		size := min(int64(pageSize), t.geo.FATSize-n*pageSize)
		if size <= 0 {
			return nil, fmt.Errorf("cannot read FAT: offset 0x%x is beyond its end", n*pageSize)
		}
		p = make([]byte, size)
		if _, err := t.dev.ReadAt(p, t.off+n*pageSize); err != nil {
			return nil, &ioError{fmt.Errorf("cannot read FAT at offset 0x%x: %w", firstUnreadable(t.dev, p, t.off+n*pageSize, t.geo.block()), err)}
		}
		if t.pages == nil || len(t.pages) >= maxPages {
			t.pages = make(map[int64][]byte)
		}
		t.pages[n] = p
	}
	t.lastN, t.last = n, p
	return p, nil
}

// drop forgets every cached page.
func (t *table) drop() {
	t.mu.Lock()
	t.pages, t.last, t.lastN = nil, nil, -1
	t.mu.Unlock()
}

// get returns the entry of cluster c: entryFree, a link, entryBad, or at least entryEOC. Values that FAT12 and FAT16
// reserve are widened, so that all types share one range.
func (t *table) get(c Cluster) (uint32, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	off, n := entryOffset(t.geo.Type, c)
	if off+int64(n) > t.geo.FATSize {
		return 0, fmt.Errorf("cannot read FAT entry of cluster %d: beyond the end of the FAT", c)
	}
	p, err := t.page(off / pageSize)
	if err != nil {
		return 0, err
	}
	return decodeEntry(t.geo.Type, c, p[off%pageSize:]), nil
}

// zeroBlock is what most of a FAT consists of.
var zeroBlock [256]byte

// eachUsed calls f with the entry of every cluster that is not free, ascending; an error ends it. Most of a FAT is
// zeros, and these are passed over in blocks.
func (t *table) eachUsed(f func(c Cluster, e uint32) error) error {
	typ, last := t.geo.Type, t.geo.MaxCluster()
	per := Cluster(pageSize * 8 / int(typ)) // entries of a page; FAT12 has but one page
	word := Cluster(64 / int(typ))          // whole entries of 8 bytes
	if typ == FAT12 {
		word = 0
	}
	for first := Cluster(0); first <= last; first += per {
		off, _ := entryOffset(typ, first)
		t.mu.Lock()
		p, err := t.page(off / pageSize)
		t.mu.Unlock()
		if err != nil {
			return err
		}
		end := min(first+per-1, last)
		if o, n := entryOffset(typ, end); o-off+int64(n) > int64(len(p)) {
			return fmt.Errorf("cannot read FAT entry of cluster %d: beyond the end of the FAT", end)
		}
		for c := max(first, 2); c <= end; c++ {
			o, _ := entryOffset(typ, c)
			o -= off
			if word > 0 && c%word == 0 && o+8 <= int64(len(p)) && binary.LittleEndian.Uint64(p[o:]) == 0 {
				n := Cluster(1)
				for at := o + 8; at+int64(len(zeroBlock)) <= int64(len(p)) && [len(zeroBlock)]byte(p[at:]) == zeroBlock; at += int64(len(zeroBlock)) {
					n += Cluster(len(zeroBlock) / 8)
				}
				c += n*word - 1
				continue
			}
			e := decodeEntry(typ, c, p[o:])
			if e == entryFree {
				continue
			}
			if err := f(c, e); err != nil {
				return err
			}
		}
	}
	return nil
}

// entryOffset is where in a FAT copy the entry of cluster c begins, and how many bytes it touches. On FAT12 the two
// bytes may lie in two sectors (fatgen103, "FAT12 entries"); the whole table is smaller than a page.
func entryOffset(t Type, c Cluster) (off int64, n int) {
	switch t {
	case FAT12:
		return int64(c) + int64(c)/2, 2
	case FAT16:
		return int64(c) * 2, 2
	}
	return int64(c) * 4, 4
}

func decodeEntry(t Type, c Cluster, b []byte) uint32 {
	le := binary.LittleEndian
	switch t {
	case FAT12:
		v := uint32(le.Uint16(b))
		if c&1 == 1 {
			v >>= 4
		}
		if v &= 0xFFF; v >= 0xFF7 {
			v |= 0x0FFFF000
		}
		return v
	case FAT16:
		v := uint32(le.Uint16(b))
		if v >= 0xFFF7 {
			v |= 0x0FFF0000
		}
		return v
	}
	return le.Uint32(b) & 0x0FFFFFFF
}

// encodeEntry patches the entry of cluster c in b: neighbours that share a byte and FAT32's top four bits stay.
func encodeEntry(t Type, c Cluster, b []byte, v uint32) {
	le := binary.LittleEndian
	switch t {
	case FAT12:
		old := le.Uint16(b)
		if c&1 == 1 {
			le.PutUint16(b, old&0x000F|uint16(v&0xFFF)<<4)
		} else {
			le.PutUint16(b, old&0xF000|uint16(v&0xFFF))
		}
	case FAT16:
		le.PutUint16(b, uint16(v))
	default:
		le.PutUint32(b, le.Uint32(b)&0xF0000000|v&0x0FFFFFFF)
	}
}

// straddles says whether the FAT12 entry of c lies in two sectors of the device, so that no single write can change it whole.
func (g *Geometry) straddles(c Cluster) bool {
	if g.Type != FAT12 {
		return false
	}
	off, _ := entryOffset(FAT12, c)
	return int(off)%g.block() == g.block()-1
}

// Run is a contiguous range of clusters: First, First+1, … First+Count-1.
type Run struct {
	First Cluster
	Count uint32
}

// clustersIn is the number of clusters in runs.
func clustersIn(runs []Run) int64 {
	var n int64
	for _, r := range runs {
		n += int64(r.Count)
	}
	return n
}

// appendCluster adds c to the end of runs, growing the last one where it can.
func appendCluster(runs []Run, c Cluster) []Run {
	if k := len(runs); k > 0 && runs[k-1].First+Cluster(runs[k-1].Count) == c {
		runs[k-1].Count++
		return runs
	}
	return append(runs, Run{c, 1})
}

// bitmap is a set of clusters.
type bitmap []uint64

func newBitmap(g *Geometry) bitmap { return make(bitmap, (uint64(g.Clusters)+2+63)/64) }

func (b bitmap) has(c Cluster) bool { return b[c/64]&(1<<(c%64)) != 0 }
func (b bitmap) set(c Cluster)      { b[c/64] |= 1 << (c % 64) }

func (b bitmap) setRuns(runs []Run) {
	for _, r := range runs {
		for i := uint32(0); i < r.Count; i++ {
			b.set(r.First + Cluster(i))
		}
	}
}

// runs lists the set as ascending, disjoint runs.
func (b bitmap) runs() []Run {
	var out []Run
	for w, word := range b {
		if word == 0 {
			continue
		}
		for i := 0; i < 64; i++ {
			if word&(1<<i) != 0 {
				out = appendCluster(out, Cluster(w*64+i))
			}
		}
	}
	return out
}

// Subtract returns the clusters of a that are not in b. Both are ascending and disjoint, and so is the result.
func Subtract(a, b []Run) []Run {
	var out []Run
	for _, r := range a {
		lo, hi := uint64(r.First), uint64(r.First)+uint64(r.Count)
		for len(b) > 0 && uint64(b[0].First)+uint64(b[0].Count) <= lo {
			b = b[1:]
		}
		for _, x := range b {
			if uint64(x.First) >= hi {
				break
			}
			if uint64(x.First) > lo {
				out = append(out, Run{Cluster(lo), uint32(uint64(x.First) - lo)})
			}
			lo = min(hi, max(lo, uint64(x.First)+uint64(x.Count)))
		}
		if lo < hi {
			out = append(out, Run{Cluster(lo), uint32(hi - lo)})
		}
	}
	return out
}
