package exfat

import (
	"fmt"
	"io"
	"math/bits"
)

// FAT entries: section 4.1.3. Part of the on-disk format.
const (
	badCluster = 0xFFFFFFF7
	endOfChain = 0xFFFFFFFF
)

const (
	pageSize = 1 << 20 // a chain mostly goes on near by, so the FAT comes in large reads
	maxPages = 8
)

// pages keeps some pages of a large structure in memory, read when they are needed.
type pages struct {
	read func(p []byte, off int64) error
	size int64 // bytes

	cache map[int64][]byte // by offset
	order []int64          // oldest first
	last  int64            // offset of the page that was used last
	page  []byte
}

// at returns the page with the byte at off, which is less than size, and the offset at which it begins.
func (p *pages) at(off int64) ([]byte, int64, error) {
	base := off &^ (pageSize - 1)
	if p.page != nil && base == p.last {
		return p.page, base, nil
	}
	page := p.cache[base]
	if page == nil {
		page = make([]byte, min(pageSize, p.size-base))
		if err := p.read(page, base); err != nil {
			return nil, 0, &ioError{err}
		}
		if p.cache == nil {
			p.cache = map[int64][]byte{}
		}
		if len(p.order) == maxPages {
			delete(p.cache, p.order[0])
			p.order = p.order[1:]
		}
		p.cache[base] = page
		p.order = append(p.order, base)
	}
	p.last, p.page = base, page
	return page, base, nil
}

// ioError marks an error of the medium, as opposed to what is wrong with the volume.
type ioError struct{ err error }

func (e *ioError) Error() string { return e.err.Error() }
func (e *ioError) Unwrap() error { return e.err }

// clusterSet is a set of clusters, in pages, so that the few files of a huge volume take little memory.
type clusterSet map[uint32]*[setPage / 64]uint64

const setPage = 1 << 15 // clusters

// take enters the clusters [first, first+n), up to one that is there already, and returns how many were entered.
func (s clusterSet) take(first, n uint32) uint32 {
	for i := uint32(0); i < n; {
		c := first + i
		page := s[c/setPage]
		if page == nil {
			page = new([setPage / 64]uint64)
			s[c/setPage] = page
		}
		word, bit := &page[c%setPage/64], c%64
		k := min(n-i, 64-bit)
		mask := (^uint64(0) >> (64 - k)) << bit
		if busy := *word & mask; busy != 0 {
			free := uint32(bits.TrailingZeros64(busy)) - bit
			if free > 0 {
				*word |= (^uint64(0) >> (64 - free)) << bit
			}
			return i + free
		}
		*word |= mask
		i += k
	}
	return n
}

// len is the number of clusters in the set.
func (s clusterSet) len() int64 {
	var n int64
	for _, page := range s {
		for _, w := range page {
			n += int64(bits.OnesCount64(w))
		}
	}
	return n
}

// clusters knows which clusters belong together, and to whom.
type clusters struct {
	v    *Volume
	fat  pages
	used clusterSet
}

func newClusters(v *Volume) *clusters {
	k := &clusters{v: v, used: clusterSet{}}
	k.fat = pages{size: (int64(v.geo.ClusterCount) + 2) * 4, read: func(p []byte, off int64) error {
		return v.read(p, v.geo.fatOffset()+off)
	}}
	return k
}

// next is the FAT entry of a valid cluster.
func (k *clusters) next(c uint32) (uint32, error) {
	page, base, err := k.fat.at(int64(c) * 4)
	if err != nil {
		return 0, fmt.Errorf("cannot read the FAT: %w", err)
	}
	return le.Uint32(page[int64(c)*4-base:]), nil
}

// need is the number of clusters that size bytes take.
func (k *clusters) need(size uint64) uint64 {
	cs := uint64(k.v.geo.ClusterSize)
	n := size / cs
	if size%cs != 0 {
		n++
	}
	return n
}

// contiguous are need clusters from first on, which the FAT does not describe (6.4.2.2, "NoFatChain"). Each cluster is
// entered into used; one that is there already belongs to somebody else.
func (k *clusters) contiguous(first uint32, need uint64) ([]run, error) {
	if !k.v.geo.valid(first) {
		return nil, k.outside(first)
	}
	if left := uint64(k.v.geo.ClusterCount) + 2 - uint64(first); need > left {
		return nil, fmt.Errorf("%d clusters from cluster %d on go beyond the last one, %d", need, first, k.last())
	}
	n := uint32(need)
	if got := k.used.take(first, n); got < n {
		return nil, shared(first + got)
	}
	return []run{{first, n}}, nil
}

// chain follows the chain from first for exactly need clusters, or to its end when whole, which is then an error after
// more than need. tail says what is odd behind them, "" for an end mark. Each cluster is entered into used, and one that
// is there already belongs to somebody else, or closes a loop: so all the chains of a volume together take no more
// steps than it has clusters, whatever its FAT says.
func (k *clusters) chain(first uint32, need uint64, whole bool) (runs []run, tail string, err error) {
	var n uint64
	for c := first; ; {
		if !k.v.geo.valid(c) {
			return nil, "", k.outside(c)
		}
		if n == need {
			return nil, "", fmt.Errorf("the chain from cluster %d is longer than %d clusters", first, need)
		}
		if k.used.take(c, 1) == 0 {
			return nil, "", shared(c)
		}
		n++
		if last := len(runs) - 1; last >= 0 && runs[last].first+runs[last].n == c {
			runs[last].n++
		} else {
			runs = append(runs, run{c, 1})
		}
		e, err := k.next(c)
		if err != nil {
			return nil, "", err
		}
		switch {
		case e == endOfChain && (whole || n == need):
			return runs, "", nil
		case e == endOfChain:
			return nil, "", fmt.Errorf("the chain from cluster %d ends after %d clusters, want %d", first, n, need)
		case n == need && !whole:
			// Nobody reads on. What an allocation is larger than its data is no reader's loss.
			return runs, fmt.Sprintf("the FAT goes on to 0x%x behind its last cluster, %d", e, c), nil
		case e == badCluster:
			return nil, "", fmt.Errorf("the chain from cluster %d goes on from cluster %d to one that is marked bad", first, c)
		case e == 0:
			return nil, "", fmt.Errorf("the chain from cluster %d runs into cluster %d, which is free in the FAT", first, c)
		}
		c = e
	}
}

func (k *clusters) last() uint32 { return k.v.geo.ClusterCount + 1 }

func (k *clusters) outside(c uint32) error {
	return fmt.Errorf("cluster %d is outside 2…%d", c, k.last())
}

func shared(c uint32) error {
	return fmt.Errorf("cluster %d belongs to another file or directory too, or the chain is a loop", c)
}

// bitmap is the allocation bitmap: section 7.1.5, one bit for each cluster, the lowest of the first byte for cluster 2.
type bitmap struct{ pages }

func newBitmap(r *runReader) *bitmap {
	return &bitmap{pages{size: r.size, read: func(p []byte, off int64) error {
		_, err := r.ReadAt(p, off)
		if err == io.EOF {
			err = nil // read to the end
		}
		return err
	}}}
}

// free finds the first of some valid clusters that the bitmap has as free, 0 when there is none.
func (b *bitmap) free(runs []run) (uint32, error) {
	for _, r := range runs {
		for i := uint32(0); i < r.n; {
			bit := int64(r.first-2) + int64(i)
			page, base, err := b.at(bit / 8)
			if err != nil {
				return 0, fmt.Errorf("cannot read the allocation bitmap: %w", err)
			}
			at := bit/8 - base
			if bit%8 == 0 && r.n-i >= 64 && at+8 <= int64(len(page)) && le.Uint64(page[at:]) == ^uint64(0) {
				i += 64
				continue
			}
			if page[at]>>(bit%8)&1 == 0 {
				return r.first + i, nil
			}
			i++
		}
	}
	return 0, nil
}

// count is the number of clusters of n that are in use.
func (b *bitmap) count(n uint32) (used int64, err error) {
	for off := int64(0); off < (int64(n)+7)/8; {
		page, base, err := b.at(off)
		if err != nil {
			return 0, fmt.Errorf("cannot read the allocation bitmap: %w", err)
		}
		for _, c := range page {
			if left := int64(n) - off*8; left <= 0 {
				break
			} else if left < 8 {
				c &= 1<<left - 1
			}
			used += int64(bits.OnesCount8(c))
			off++
		}
		if off < base+int64(len(page)) {
			break
		}
	}
	return used, nil
}
