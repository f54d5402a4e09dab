package replicate

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"testing"

	"espmirror/blockdev"
	"espmirror/fatdriver"
	"espmirror/fixtures"
)

// long says whether the tests may take their time.
func long() bool { return os.Getenv("ESPMIRROR_LONG") != "" }

// without is the recording of a device that ignored flush k.
func without(rec *fixtures.Recording, k int) *fixtures.Recording {
	out := &fixtures.Recording{Base: rec.Base, Sector: rec.Sector}
	n := 0
	for _, op := range rec.Ops {
		if op.Flush {
			if n++; n-1 == k {
				continue
			}
		}
		out.Ops = append(out.Ops, op)
	}
	return out
}

func flushes(rec *fixtures.Recording) int {
	n := 0
	for _, op := range rec.Ops {
		if op.Flush {
			n++
		}
	}
	return n
}

// explore runs the assertions of the power-cut test over a recording of c.
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

// TestDroppedFlush is the negative control of TestPowerCut: on a device that ignores one flush the same assertions must
// fail for each barrier that the protocol needs.
func TestDroppedFlush(t *testing.T) {
	cases := crashCases()
	for _, g := range []geometry{geometries[0], geometries[2], geometries[5]} {
		t.Run(g.name, func(t *testing.T) {
			t.Parallel()
			c := prepared(t, g, cases["replace"], Options{Selection: crashSelect})
			// Flushes of a transaction with one commit: idle journal, payload, J, B1, B2, B3, B4.
			names := []string{"idle", "payload", "J", "B1", "B2", "B3", "B4"}
			if n := flushes(c.rec); n != len(names) {
				t.Fatalf("%d flushes, want %d", n, len(names))
			}
			if err := c.explore(c.rec, 2000, 50); err != nil {
				t.Fatal("with every flush: ", err)
			}
			for k, name := range names {
				err := c.explore(without(c.rec, k), 2000, 300)
				switch name {
				case "J", "B1", "B2", "B3":
					if err == nil {
						t.Errorf("without %s: the crash test finds nothing", name)
					}
				default:
					// The base image is stable, and a header without its payload is recognised: these protect against
					// what went before.
					if err != nil {
						t.Errorf("without %s: %v", name, err)
					}
				}
			}
		})
	}
	t.Run("several commits", func(t *testing.T) {
		t.Parallel()
		c := prepared(t, geometries[2], cases["kernel update"], Options{Selection: crashSelect})
		found := 0
		n := flushes(c.rec)
		for k := range n {
			if c.explore(without(c.rec, k), 500, 200) != nil {
				found++
			}
		}
		t.Logf("%d of %d flushes are missed when they are dropped", found, n)
		if found < 4 { // J, B1, B2 and B3, of two commits at least one each
			t.Errorf("only %d of %d flushes are missed", found, n)
		}
	})
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

// TestCutDuringRecovery records the recovery of sampled crash states, and explores the epochs of that.
func TestCutDuringRecovery(t *testing.T) {
	samples, random := 6, 6
	if testing.Short() {
		samples, random = 2, 3
	}
	if long() {
		samples, random = 200, 100
	}
	for name, trees := range crashCases() {
		for _, g := range geometries {
			if !long() && g.name != "FAT12" && g.name != "FAT16" && g.name != "FAT32" {
				continue
			}
			t.Run(name+"/"+g.name, func(t *testing.T) {
				t.Parallel()
				c := prepared(t, g, trees, Options{Selection: crashSelect})
				rng := rand.New(rand.NewPCG(3, 4))
				seen := 0
				_, err := c.rec.Explore(fixtures.CrashOptions{Limit: samples, Random: samples, Seed: 5}, func(s *fixtures.State) error {
					// The prefixes of a large epoch are many and alike.
					if seen++; !long() && rng.IntN(3) > 0 {
						return nil
					}
					k, err := c.visible(s)
					if err != nil {
						return err
					}
					r := fixtures.NewRecorder(s, g.sector)
					if _, err := Recover(context.Background(), &Target{Name: "cut", Dev: r}, RecoverOptions{}); err != nil {
						return err
					}
					_, err = r.Recording().Explore(fixtures.CrashOptions{Limit: 16, Random: random, Seed: 6}, func(s *fixtures.State) error {
						k2, err := c.visible(s)
						if err != nil {
							return err
						}
						if k2 < k {
							return fmt.Errorf("recovery went back from tree %d to %d", k, k2)
						}
						return c.recovered(s, k2)
					})
					return err
				})
				if err != nil {
					t.Fatal(err)
				}
			})
		}
	}
}
