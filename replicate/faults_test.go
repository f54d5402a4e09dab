package replicate

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
	"sync"
	"testing"

	"golang.org/x/sys/unix"

	"espmirror/blockdev"
	"espmirror/fatdriver"
	"espmirror/fixtures"
)

var errInjected = errors.New("injected input/output error")

// opAny is every kind of operation.
const opAny blockdev.OpKind = -1

// failing fails the k-th operation of a kind, and notes what is tried after a flush has failed. Unlike blockdev.Faulty
// it lets those writes through, so that nothing but the code under test holds them back.
type failing struct {
	*fixtures.Recorder
	mu          sync.Mutex
	fault       fault
	k           int
	n           int
	fired       bool
	flushFailed bool
	after       int // writes and flushes after a failed flush
}

func (f *failing) hit(kind blockdev.OpKind) bool {
	if kind != f.fault.kind && f.fault.kind != opAny {
		return false
	}
	f.n++
	if f.n-1 == f.k || f.fault.stays && f.n-1 > f.k {
		f.fired = true
		return true
	}
	return false
}

func (f *failing) ReadAt(p []byte, off int64) (int, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.hit(blockdev.OpRead) {
		return 0, f.fault.err
	}
	return f.Recorder.ReadAt(p, off)
}

func (f *failing) WriteAt(p []byte, off int64) (int, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.flushFailed {
		f.after++
	}
	if f.hit(blockdev.OpWrite) {
		n := min(f.fault.short, len(p)) / f.SectorSize() * f.SectorSize()
		f.Recorder.WriteAt(p[:n], off)
		return n, f.fault.err
	}
	return f.Recorder.WriteAt(p, off)
}

func (f *failing) Flush() error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.flushFailed {
		f.after++
	}
	if f.hit(blockdev.OpFlush) {
		f.flushFailed = true
		return f.fault.err
	}
	return f.Recorder.Flush()
}

// fault is one way in which operations fail.
type fault struct {
	name  string
	kind  blockdev.OpKind
	short int // bytes that get through of a failing write
	stays bool
	err   error
}

var faults = []fault{
	{"write", blockdev.OpWrite, 0, false, errInjected},
	{"short write", blockdev.OpWrite, 1024, false, errInjected},
	{"flush", blockdev.OpFlush, 0, false, errInjected},
	{"read", blockdev.OpRead, 0, false, errInjected},
	{"no space", blockdev.OpWrite, 0, true, unix.ENOSPC}, // an image file on a full file system
	{"device gone", opAny, 0, true, unix.EIO},
}

// step is from one operation that is failed to the next: every one, or a sample of those that take long.
func (f fault) step(g geometry) int {
	switch reads := f.kind == blockdev.OpRead || f.kind == opAny; {
	case long():
		return 1
	case testing.Short(), reads && g.name != "FAT12":
		return 11
	case f.kind == opAny, g.name != "FAT12" && f.kind != blockdev.OpFlush:
		return 3
	}
	return 1
}

// fullEFI is a volume whose directory EFI has no slot left.
func fullEFI(t testing.TB, g geometry, journal bool) *blockdev.Mem {
	m := newVolume(t, g)
	efi := &fatdriver.Want{Name: "EFI", Dir: true}
	used := 2
	if journal {
		if res := syncMem(t, newMemSource(map[string]string{"loader/x": "1"}), m, Options{Selection: Selection{Select: []string{"loader"}}}); res.Err != nil {
			t.Fatal(res.Err)
		}
		used = 4 // espmirror has a long name
	}
	for i := used; i < g.sector*g.spc/32; i++ {
		efi.Children = append(efi.Children, &fatdriver.Want{Name: fmt.Sprintf("F%d", i)})
	}
	put(t, m, efi)
	return m
}

// TestFaults fails every operation on a target in turn, while another target takes part in the same run.
func TestFaults(t *testing.T) {
	cases := crashCases()
	for _, name := range []string{"first run", "kernel update", "files in the root", "full directory", "first run, full directory"} {
		for _, g := range []geometry{geometries[0], geometries[3], geometries[4]} {
			full := strings.HasSuffix(name, "full directory")
			if full && g.name == "FAT16-4k" {
				continue // its directories are not full that soon
			}
			t.Run(name+"/"+g.name, func(t *testing.T) {
				t.Parallel()
				o := Options{Selection: crashSelect}
				trees := cases[name]
				var c *crashRun
				if full {
					trees = cases["first run"]
					c = record1(t, g, fullEFI(t, g, name == "full directory").Bytes(), newMemSource(trees[1]), o)
				} else {
					c = prepared(t, g, trees, o)
				}
				other := prepared(t, geometries[0], trees, o)
				for _, kind := range faults {
					runs := 0
					for k := 0; ; k += kind.step(g) {
						d := &failing{Recorder: fixtures.NewRecorder(c.rec.Base, g.sector), fault: kind, k: k}
						healthy := fixtures.NewRecorder(other.rec.Base, geometries[0].sector)
						res, err := Sync(context.Background(), newMemSource(trees[1]), []*Target{{Name: "bad", Dev: d}, {Name: "good", Dev: healthy}}, o)
						if err != nil {
							t.Fatalf("%s %d: the run ended: %v", kind.name, k, err)
						}
						if res[1].Err != nil || res[1].Outcome != Synced {
							t.Fatalf("%s %d: the other target: %v, %v", kind.name, k, res[1].Outcome, res[1].Err)
						}
						if !d.fired {
							if res[0].Outcome != Synced {
								t.Fatalf("%s %d: %v, %v", kind.name, k, res[0].Outcome, res[0].Err)
							}
							break
						}
						runs++
						if err := c.afterFault(d, &res[0]); err != nil {
							t.Fatalf("%s %d: %v", kind.name, k, err)
						}
					}
					fixtures.Count("faults", int64(runs))
				}
			})
		}
	}
}

// afterFault judges a target of which one operation failed.
func (c *crashRun) afterFault(d *failing, res *Result) error {
	kind := d.fault.kind
	switch {
	case res.Outcome == Failed && errors.Is(res.Err, d.fault.err):
	case res.Outcome == Failed && kind == blockdev.OpRead && res.Err != nil:
		// A journal slot that cannot be read is taken for one that a cut tore, and the older one says something else.
	case kind == blockdev.OpRead && res.Outcome == Synced && res.Err == nil:
		// What nobody needs may be unreadable, for instance the other FAT copy or a journal slot.
	default:
		return fmt.Errorf("outcome %q, error %v", res.Outcome, res.Err)
	}
	if d.after > 0 {
		return fmt.Errorf("%d writes or flushes after a failed flush", d.after)
	}
	k, err := c.visible(d.State)
	if err != nil {
		return err
	}
	if res.Outcome == Synced && k != c.last {
		return fmt.Errorf("synced, and the tree is %d of %d", k, c.last)
	}
	return c.recovered(d.State, k)
}

// TestRecoveryFaults fails every operation of a recovery in turn: the tree stays as it is, or goes on to the next one
// where several entries were switching, and a later recovery cleans up all the same.
func TestRecoveryFaults(t *testing.T) {
	cases := crashCases()
	for _, name := range []string{"first run", "one directory", "kernel update", "full directory"} {
		for _, g := range []geometry{geometries[0], geometries[3], geometries[4]} {
			if name == "full directory" && g.name != "FAT12" || name == "first run" && g.name == "FAT16-4k" {
				continue
			}
			t.Run(name+"/"+g.name, func(t *testing.T) {
				t.Parallel()
				o := Options{Selection: crashSelect}
				var c *crashRun
				if name == "full directory" {
					c = record1(t, g, fullEFI(t, g, true).Bytes(), newMemSource(cases["first run"][1]), o)
				} else {
					c = prepared(t, g, cases[name], o)
				}
				// The first writes of each epoch are on the medium, and then all of them.
				var states []*fixtures.Recording
				for i, op := range c.rec.Ops {
					if op.Flush || i+1 < len(c.rec.Ops) && c.rec.Ops[i+1].Flush || i > 0 && c.rec.Ops[i-1].Flush {
						states = append(states, &fixtures.Recording{Base: c.rec.Base, Sector: c.rec.Sector, Ops: c.rec.Ops[:i+1]})
					}
				}
				runs := 0
				for i, rec := range states {
					for _, kind := range faults {
						for k := 0; ; k += kind.step(g) {
							s, err := rec.After()
							if err != nil {
								t.Fatal(err)
							}
							before, err := c.visible(s)
							if err != nil {
								t.Fatal(err)
							}
							d := &failing{Recorder: fixtures.NewRecorder(s, g.sector), fault: kind, k: k}
							r, err := Recover(context.Background(), &Target{Name: "bad", Dev: d}, RecoverOptions{})
							if !d.fired {
								break
							}
							at := fmt.Sprintf("state %d, %s %d: %+v, %v", i, kind.name, k, r, err)
							if err == nil && kind.kind != blockdev.OpRead || err != nil && !errors.Is(err, kind.err) {
								t.Fatal(at)
							}
							if d.after > 0 {
								t.Fatalf("%s: %d writes or flushes after a failed flush", at, d.after)
							}
							after, err := c.visible(d.State)
							if err != nil || after < before {
								t.Fatalf("%s: tree %d became %d, %v", at, before, after, err)
							}
							if err := c.recovered(d.State, after); err != nil {
								t.Fatalf("%s: %v", at, err)
							}
							runs++
						}
					}
				}
				fixtures.Count("faults", int64(runs))
			})
		}
	}
}

// brokenSource fails the k-th read of its files with err, or calls do instead.
type brokenSource struct {
	*memSource
	k, n int
	err  error
	do   func()
}

type brokenReader struct {
	s *brokenSource
	r io.Reader
}

func (r *brokenReader) Close() error { return nil }
func (r *brokenReader) Read(p []byte) (int, error) {
	r.s.n++
	if r.s.n-1 == r.s.k {
		if r.s.do == nil {
			return 0, r.s.err
		}
		r.s.do()
	}
	return r.r.Read(p)
}

func (s *brokenSource) Open(it *Item) (io.ReadCloser, error) {
	rc, err := s.memSource.Open(it)
	return &brokenReader{s, rc}, err
}

// TestSourceFaults fails every read of the source in turn, ends it early, and cancels the run at every read: nothing is
// committed, and what was allocated is taken back at once.
func TestSourceFaults(t *testing.T) {
	big := crashCases()["kernel update"]
	big[1]["0123456789abcdef0123456789abcdef/6.2/initrd"] = strings.Repeat("initrd", 3<<20/6)
	for _, g := range []geometry{geometries[2], geometries[4]} {
		t.Run(g.name, func(t *testing.T) {
			t.Parallel()
			o := Options{Selection: crashSelect}
			c := prepared(t, g, big, o)
			for _, what := range []string{"error", "early end", "cancel"} {
				for k := 0; ; k++ {
					ctx, cancel := context.WithCancel(context.Background())
					src := &brokenSource{memSource: newMemSource(big[1]), k: k, err: errInjected}
					want := []error{ErrSource, errInjected}
					switch what {
					case "early end":
						src.err, want = io.EOF, []error{ErrSource}
					case "cancel":
						src.do, want = cancel, []error{context.Canceled}
					}
					a, b := fixtures.NewRecorder(c.rec.Base, g.sector), fixtures.NewRecorder(c.rec.Base, g.sector)
					res, err := Sync(ctx, src, []*Target{{Name: "a", Dev: a}, {Name: "b", Dev: b}}, o)
					cancel()
					if src.n <= k {
						if err != nil || res[0].Outcome != Synced || res[1].Outcome != Synced {
							t.Fatal(what, k, err, res)
						}
						break
					}
					if res == nil {
						// The loader entries are read before any target is looked at.
						if !errors.Is(err, ErrSource) || len(a.Ops) > 0 || len(b.Ops) > 0 {
							t.Fatalf("%s at read %d: %v, and %d operations", what, k, err, len(a.Ops)+len(b.Ops))
						}
						continue
					}
					if what == "early end" && res[0].Outcome == Synced {
						continue // it was the read behind the end of a file
					}
					for _, w := range want {
						// A cancelled run may have come to its end before anybody looks.
						if !errors.Is(err, w) && (what != "cancel" || !errors.Is(res[0].Err, w)) {
							t.Fatalf("%s at read %d: %v, want %v; %v", what, k, err, w, res)
						}
					}
					for i, r := range []*fixtures.Recorder{a, b} {
						if res[i].Outcome != Failed || res[i].Err == nil {
							t.Fatalf("%s at read %d: target %d: %v %v", what, k, i, res[i].Outcome, res[i].Err)
						}
						if n, err := c.visible(r.State); err != nil || n != 0 {
							t.Fatalf("%s at read %d: target %d has tree %d, %v", what, k, i, n, err)
						}
						tree, err := c.trees.Read(r.State, 0, false)
						if err != nil {
							t.Fatal(err)
						}
						if lost, err := tree.Lost(); err != nil || len(lost) > 0 {
							t.Fatalf("%s at read %d: target %d has lost clusters %v, %v", what, k, i, lost, err)
						}
						if err := c.recovered(r.State, 0); err != nil {
							t.Fatalf("%s at read %d: target %d: %v", what, k, i, err)
						}
					}
				}
			}
		})
	}
}
