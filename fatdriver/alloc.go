package fatdriver

import (
	"fmt"
)

// allocator hands out clusters that are free in the FAT on the medium. It never takes back: a cluster freed by a
// transaction is not reused in it (invariant I3). When it runs dry it goes on counting, so that the shortfall can be
// told exactly before anything is written.
type allocator struct {
	geo     *Geometry
	free    []Run // ascending
	at      int   // where the search for the next file begins
	left    int64 // clusters in free
	total   int64 // clusters free at the start
	asked   int64
	longest uint32 // no run is longer than this
	taken   bitmap
}

// newAllocator reads the whole FAT.
func newAllocator(v *Volume) (*allocator, error) {
	a := &allocator{geo: &v.geo, taken: newBitmap(&v.geo)}
	next := Cluster(2)
	free := func(end Cluster) {
		for ; next < end; next++ {
			// A straddling FAT12 entry cannot be written in one piece, so it is never used.
			if !v.geo.straddles(next) {
				a.free = appendCluster(a.free, next)
				a.left++
			}
		}
		next++ // end itself is used
	}
	if err := v.fat.eachUsed(func(c Cluster, _ uint32) error {
		free(c)
		return nil
	}); err != nil {
		return nil, err
	}
	free(v.geo.MaxCluster() + 1)
	a.total = a.left
	a.setFree(a.free)
	return a, nil
}

// setFree makes the allocator hand out no other clusters than these.
func (a *allocator) setFree(runs []Run) {
	a.free, a.left, a.longest, a.at = runs, clustersIn(runs), 0, 0
	for i, r := range a.free {
		// New files begin in the longest free run: contiguous, and mostly in FAT sectors that hold no live entry.
		if r.Count > a.longest {
			a.longest, a.at = r.Count, i
		}
	}
}

// cut takes n clusters from the front of free run i.
func (a *allocator) cut(i int, n uint32) Run {
	r := Run{a.free[i].First, n}
	a.free[i].First += Cluster(n)
	a.free[i].Count -= n
	a.left -= int64(n)
	a.taken.setRuns([]Run{r})
	return r
}

// file allocates n clusters: contiguous where a free run is long enough, else in as few runs as come along. contiguous
// insists on one run.
func (a *allocator) file(n int64, contiguous bool) ([]Run, error) {
	a.asked += n
	if n == 0 || n > a.left {
		return nil, nil // the shortfall is reported for the whole plan
	}
	if n <= int64(a.longest) {
		var longest uint32
		for k := range a.free {
			i := (a.at + k) % len(a.free)
			if int64(a.free[i].Count) >= n {
				a.at = i
				return []Run{a.cut(i, uint32(n))}, nil
			}
			longest = max(longest, a.free[i].Count)
		}
		a.longest = longest
	}
	if contiguous {
		return nil, fmt.Errorf("%w: no contiguous run of %d free clusters, the longest has %d", ErrNoSpace, n, a.longest)
	}
	var runs []Run
	for n > 0 {
		i := a.at % len(a.free)
		if k := min(n, int64(a.free[i].Count)); k > 0 {
			runs = append(runs, a.cut(i, uint32(k)))
			n -= k
		}
		if n > 0 {
			a.at = i + 1
		}
	}
	return runs, nil
}

// dir allocates n clusters for a directory whose first cluster is to share all but the low byte of its number with old,
// so that the commit changes one byte of the directory entry. Where no such cluster is free, any will do.
func (a *allocator) dir(n int64, old Cluster) ([]Run, error) {
	if old == 0 || n > a.left {
		return a.file(n, false)
	}
	lo, hi := old&^0xFF, old|0xFF
	for i, r := range a.free {
		if r.Count == 0 || r.First+Cluster(r.Count) <= lo {
			continue
		}
		if r.First > hi {
			break
		}
		first := max(r.First, lo)
		if first > hi {
			break
		}
		k := min(n, int64(r.First)+int64(r.Count)-int64(first))
		got := Run{first, uint32(k)}
		// Taking from the middle leaves two runs.
		rest := Run{first + Cluster(k), r.Count - uint32(first-r.First) - uint32(k)}
		a.free[i].Count = uint32(first - r.First)
		if rest.Count > 0 {
			a.free = append(a.free[:i+1], append([]Run{rest}, a.free[i+1:]...)...)
			if a.at > i {
				a.at++
			}
			if a.at == i && a.free[i].Count == 0 {
				a.at = i + 1
			}
		}
		a.left -= k
		a.asked += k
		a.taken.setRuns([]Run{got})
		more, err := a.file(n-k, false)
		return append([]Run{got}, more...), err
	}
	return a.file(n, false)
}

// Shortfall is the ErrNoSpace of a plan that needs more clusters than are free, in bytes.
type Shortfall struct {
	Need int64 // at the peak
	Free int64
	Keep int64 // of Free, what is to stay free
}

func (e *Shortfall) Error() string {
	s := fmt.Sprintf("%v: %d bytes are needed at the peak, %d are free", ErrNoSpace, e.Need, e.Free)
	if e.Keep > 0 {
		s += fmt.Sprintf(", of which %d are to stay free", e.Keep)
	}
	return fmt.Sprintf("%s: %d bytes short", s, e.Need+e.Keep-e.Free)
}

func (e *Shortfall) Unwrap() error { return ErrNoSpace }

// shortfall returns a Shortfall when more was asked for than is free, keepFree bytes set aside.
func (a *allocator) shortfall(keepFree int64) error {
	cs := int64(a.geo.ClusterSize)
	keep := keepFree / cs
	if keepFree%cs > 0 {
		keep++
	}
	if a.asked+keep <= a.total {
		return nil
	}
	return &Shortfall{Need: a.asked * cs, Free: a.total * cs, Keep: keep * cs}
}

// Allocatable is the number of clusters that a transaction could allocate: the free ones, less those whose FAT12 entry
// lies in two sectors.
func (t *Tree) Allocatable() (int64, error) {
	a, err := newAllocator(t.vol)
	if err != nil {
		return 0, err
	}
	return a.total, nil
}
