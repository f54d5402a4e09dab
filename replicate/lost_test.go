package replicate

import (
	"bytes"
	"context"
	"errors"
	"os"
	"testing"

	"espmirror/blockdev"
	"espmirror/fatdriver"
	"espmirror/fixtures"
)

// long says whether the tests may take their time.
func long() bool { return os.Getenv("ESPMIRROR_LONG") != "" }

// explore judges the states of a recording: what is visible, and what recovery makes of it.
func (c *crashRun) explore(rec *fixtures.Recording, limit, random int) error {
	if _, err := rec.ExploreLazy(fixtures.CrashOptions{Limit: limit}, func(s *fixtures.State) error {
		_, err := c.visible(s)
		return err
	}); err != nil {
		return err
	}
	_, err := rec.Explore(fixtures.CrashOptions{Limit: 64, Random: random, Seed: 1}, func(s *fixtures.State) error {
		k, err := c.visible(s)
		if err != nil {
			return err
		}
		return c.recovered(s, k)
	})
	return err
}

// prepared makes a target that holds the first tree, and records its sync to the second.
func prepared(t testing.TB, g geometry, trees [2]map[string]string, o Options) *crashRun {
	t.Helper()
	m := newVolume(t, g)
	if trees[0] != nil {
		if res := syncMem(t, newMemSource(trees[0]), m, o); res.Err != nil {
			t.Fatal(res.Err)
		}
	}
	return record1(t, g, m.Bytes(), newMemSource(trees[1]), o)
}

// TestLostWrites syncs to devices that drop writes without a word. Reading back must notice before the commit, or
// at it; what is committed without reading back must still be whole through copy 0.
func TestLostWrites(t *testing.T) {
	trees := crashCases()["kernel update"]
	for _, g := range []geometry{geometries[2], geometries[4]} {
		t.Run(g.name, func(t *testing.T) {
			t.Parallel()
			o := Options{Selection: crashSelect}
			c := prepared(t, g, trees, o)
			base, _ := c.rec.Base.(fixtures.Image)
			v, err := fatdriver.Open(blockdev.NewMem(bytes.Clone(base), g.sector))
			if err != nil {
				t.Fatal(err)
			}
			geo := v.Geometry()
			journalAt := map[int64]bool{}
			tree, err := v.Scan()
			if err != nil {
				t.Fatal(err)
			}
			for _, r := range lookup(tree.Root, journalPath).Runs {
				for i := range r.Count {
					journalAt[geo.ClusterOff(r.First+fatdriver.Cluster(i))/int64(geo.ClusterSize)] = true
				}
			}
			lose := func(what func(off int64) bool, o Options) (Result, *fixtures.Recorder) {
				r := fixtures.NewRecorder(base, g.sector)
				d := &losing{Recorder: r, lose: what}
				res, err := Sync(context.Background(), newMemSource(trees[1]), []*Target{{Name: "t", Dev: d}}, o)
				if err != nil {
					t.Fatal(err)
				}
				return res[0], r
			}
			inCopy := func(n int64) func(int64) bool {
				return func(off int64) bool {
					return off >= geo.FATOff+n*geo.FATSize && off < geo.FATOff+(n+1)*geo.FATSize
				}
			}
			data := func(off int64) bool {
				return off >= geo.DataOff && !journalAt[off/int64(geo.ClusterSize)]
			}
			for name, what := range map[string]func(int64) bool{"FAT copy 0": inCopy(0), "FAT copy 1": inCopy(1), "data and directories": data} {
				res, r := lose(what, o)
				if res.Outcome != Failed || !errors.Is(res.Err, fatdriver.ErrChanged) {
					t.Errorf("%s lost: %v, %v", name, res.Outcome, res.Err)
				}
				if k, err := c.visible(r.State); err != nil || k != 0 {
					t.Errorf("%s lost: tree %d, %v", name, k, err)
				} else if err := c.recovered(r.State, k); err != nil {
					t.Errorf("%s lost: %v", name, err)
				}
			}
			// Nobody reads copy 1, so a tree without it is whole, and recovery makes it anew.
			o.NoReadBack = true
			res, r := lose(inCopy(1), o)
			if res.Err != nil {
				t.Fatal(res.Err)
			}
			tr, err := c.read(r.State, 0, false)
			if err != nil || c.allowed[treeDigest(tr)] != c.last {
				t.Fatalf("FAT copy 1 lost, not read back: %v", err)
			}
			if err := c.recovered(r.State, c.last); err != nil {
				t.Fatal(err)
			}
		})
	}
}

// losing drops the writes of whole sectors for which lose says so.
type losing struct {
	*fixtures.Recorder
	lose func(off int64) bool
}

func (d *losing) WriteAt(p []byte, off int64) (int, error) {
	ss := d.SectorSize()
	for at := 0; at < len(p); at += ss {
		if d.lose(off + int64(at)) {
			continue
		}
		if n, err := d.Recorder.WriteAt(p[at:min(at+ss, len(p))], off+int64(at)); err != nil {
			return at + n, err
		}
	}
	return len(p), nil
}
