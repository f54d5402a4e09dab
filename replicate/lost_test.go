package replicate

import (
	"bytes"
	"context"
	"errors"
	"testing"

	"espmirror/blockdev"
	"espmirror/fatdriver"
	"espmirror/fixtures"
)

// TestLostWrites syncs to devices that drop writes without a word. Reading back must notice before the commit, or
// at it; what is committed without reading back must still be whole through copy 0.
func TestLostWrites(t *testing.T) {
	trees := crashCases()["kernel update"]
	for _, g := range []geometry{geometries[2], geometries[4]} {
		t.Run(g.name, func(t *testing.T) {
			t.Parallel()
			o := Options{Selection: crashSelect}
			c := prepared(t, g, trees, o)
			v, err := fatdriver.Open(blockdev.NewMem(bytes.Clone(c.base), g.sector))
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
				r := fixtures.NewRecorder(c.base, g.sector)
				d := &fixtures.Losing{Recorder: r, Lose: what}
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
			tr, err := c.trees.Read(r.State, 0, false)
			if err != nil {
				t.Fatalf("FAT copy 1 lost, not read back: %v", err)
			}
			if k, ok := c.trees.Number(tr); !ok || k != c.last {
				t.Fatalf("FAT copy 1 lost, not read back: tree %d of %d", k, c.last)
			}
			if err := c.recovered(r.State, c.last); err != nil {
				t.Fatal(err)
			}
		})
	}
}
