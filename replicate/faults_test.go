package replicate

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
	"sync"
	"testing"

	"espmirror/blockdev"
	"espmirror/fixtures"
)

var errInjected = errors.New("injected input/output error")

// failing fails the k-th operation of a kind, and notes what is tried after a flush has failed. Unlike blockdev.Faulty
// it lets those writes through, so that nothing but the code under test holds them back.
type failing struct {
	*fixtures.Recorder
	mu          sync.Mutex
	kind        blockdev.OpKind
	k           int
	short       int // bytes that get through of a failing write
	n           int
	fired       bool
	flushFailed bool
	after       int // writes and flushes after a failed flush
}

func (f *failing) hit(kind blockdev.OpKind) bool {
	if kind != f.kind {
		return false
	}
	f.n++
	if f.n-1 == f.k {
		f.fired = true
		return true
	}
	return false
}

func (f *failing) ReadAt(p []byte, off int64) (int, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.hit(blockdev.OpRead) {
		return 0, errInjected
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
		n := min(f.short, len(p)) / f.SectorSize() * f.SectorSize()
		f.Recorder.WriteAt(p[:n], off)
		return n, errInjected
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
		return errInjected
	}
	return f.Recorder.Flush()
}

// TestFaults fails every operation on a target in turn, while another target takes part in the same run.
func TestFaults(t *testing.T) {
	kinds := []struct {
		name  string
		kind  blockdev.OpKind
		short int
	}{
		{"write", blockdev.OpWrite, 0},
		{"short write", blockdev.OpWrite, 1024},
		{"flush", blockdev.OpFlush, 0},
		{"read", blockdev.OpRead, 0},
	}
	cases := crashCases()
	for _, name := range []string{"first run", "kernel update", "files in the root"} {
		for _, g := range []geometry{geometries[0], geometries[3], geometries[4]} {
			t.Run(name+"/"+g.name, func(t *testing.T) {
				t.Parallel()
				o := Options{Selection: crashSelect}
				trees := cases[name]
				c := prepared(t, g, trees, o)
				other := prepared(t, geometries[2], trees, o)
				for _, kind := range kinds {
					step := 1
					if testing.Short() || !long() && kind.kind == blockdev.OpRead && g.name != "FAT12" {
						step = 5
					}
					runs := 0
					for k := 0; ; k += step {
						d := &failing{Recorder: fixtures.NewRecorder(c.rec.Base, g.sector), kind: kind.kind, short: kind.short, k: k}
						healthy := fixtures.NewRecorder(other.rec.Base, geometries[2].sector)
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
						if err := c.afterFault(d, kind.kind, &res[0]); err != nil {
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
func (c *crashRun) afterFault(d *failing, kind blockdev.OpKind, res *Result) error {
	switch {
	case res.Outcome == Failed && errors.Is(res.Err, errInjected):
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
						tree, err := c.read(r.State, 0, false)
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
