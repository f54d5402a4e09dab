package replicate

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"

	"espmirror/blockdev"
	"espmirror/fatdriver"
	"espmirror/fixtures"
	"espmirror/journal"
)

// weak is a device some of whose sectors cannot be read until they are written again.
type weak struct {
	*blockdev.Mem
	bad    map[int64]bool // by sector
	writes int
}

func newWeak(b []byte, sector int, off ...int64) *weak {
	w := &weak{Mem: blockdev.NewMem(bytes.Clone(b), sector), bad: map[int64]bool{}}
	for _, o := range off {
		w.bad[o/int64(sector)] = true
	}
	return w
}

func (w *weak) ReadAt(p []byte, off int64) (int, error) {
	ss := int64(w.SectorSize())
	for s := off / ss; len(w.bad) > 0 && s*ss < off+int64(len(p)); s++ {
		if w.bad[s] {
			return int(max(0, s*ss-off)), fixtures.ErrUnreadable
		}
	}
	return w.Mem.ReadAt(p, off)
}

func (w *weak) WriteAt(p []byte, off int64) (int, error) {
	w.writes++
	ss := int64(w.SectorSize())
	for s := (off + ss - 1) / ss; (s+1)*ss <= off+int64(len(p)); s++ {
		delete(w.bad, s)
	}
	return w.Mem.WriteAt(p, off)
}

// TestUnexplainedSector makes a sector unreadable that no interrupted run explains: in a directory, or in FAT copy 0.
// Everything refuses, names the place, and writes nothing; above all nothing is taken for lost.
func TestUnexplainedSector(t *testing.T) {
	trees := crashCases()["one directory"]
	o := Options{Selection: crashSelect}
	for _, g := range geometries {
		t.Run(g.name, func(t *testing.T) {
			t.Parallel()
			m := newVolume(t, g)
			if res := syncMem(t, newMemSource(trees[0]), m, o); res.Err != nil {
				t.Fatal(res.Err)
			}
			done := bytes.Clone(m.Bytes())
			// Two runs that are cut: between the build and the commit, and between the commit and freeing.
			c := record1(t, g, done, newMemSource(trees[1]), o)
			images := map[string][]byte{"at rest": done}
			for _, when := range []string{"built", "committed"} {
				img := blockdev.NewMem(bytes.Clone(done), g.sector)
				flushes := 0
				for _, op := range c.rec.Ops {
					if op.Flush {
						// Two flushes belong to the record, one before its payload.
						if flushes++; when == "built" && flushes == 4 || when == "committed" && flushes == 5 {
							break
						}
					} else if _, err := img.WriteAt(op.Data, op.Off); err != nil {
						t.Fatal(err)
					}
				}
				images[when] = img.Bytes()
			}
			for when, img := range images {
				tree, err := fixtures.ReadStrict(bytes.NewReader(img), int64(len(img)), 0)
				if err != nil {
					t.Fatal(when, err)
				}
				commit := int64(-1)
				for _, op := range c.rec.Ops { // the sector of EFI, which leads to EFI/Linux
					for _, e := range tree.Entries {
						if e.Path == "EFI" && len(op.Data) <= g.sector {
							for _, x := range tree.Extents(&e) {
								if op.Off >= x.Off && op.Off < x.Off+x.Len {
									commit = op.Off
								}
							}
						}
					}
				}
				places := map[string]int64{"FAT copy 0": tree.FATEntryExtent(0, 0).Off, "end of FAT copy 0": tree.FATEntryExtent(0, 0).Off + tree.FATBytes() - int64(g.sector)}
				if g.typ != fatdriver.FAT32 {
					places["root"] = tree.ClusterOffset(2) - 512*32
				}
				for _, e := range tree.Entries {
					if e.Dir && e.Path != "" {
						places[e.Path] = tree.Extents(&e)[0].Off
					}
				}
				for what, off := range places {
					off = off / int64(g.sector) * int64(g.sector)
					if off == commit && when != "at rest" {
						continue
					}
					name := fmt.Sprintf("%s, %s at 0x%x", when, what, off)
					says := func(op string, w *weak, err error) {
						t.Helper()
						var hint *Hint
						if strings.HasPrefix(op, "rec") && !strings.Contains(what, "FAT") && !errors.As(err, &hint) {
							t.Errorf("%s: %s: no hint", name, op)
						}
						if !errors.Is(err, fixtures.ErrUnreadable) || !strings.Contains(err.Error(), fmt.Sprintf("offset 0x%x", off)) {
							t.Errorf("%s: %s: %v", name, op, err)
						}
						if w.writes > 0 || len(w.bad) != 1 {
							t.Errorf("%s: %s wrote %d times", name, op, w.writes)
						}
					}
					w := newWeak(img, g.sector, off)
					target := &Target{Name: "weak", Dev: w}
					_, err := Recover(context.Background(), target, RecoverOptions{})
					says("recover", w, err)
					_, err = Recover(context.Background(), target, RecoverOptions{Reclaim: true})
					says("reclaim", w, err)
					says("sync", w, syncMem(t, newMemSource(trees[1]), w, o).Err)
					res, err := Verify(context.Background(), newMemSource(trees[1]), []*Target{target}, o)
					if err == nil {
						err = res[0].Err
					}
					if !strings.HasPrefix(what, "end") { // it does not read what no chain needs
						says("verify", w, err)
					}
					v, err := fatdriver.Open(w)
					if err == nil {
						_, err = v.Check()
					}
					says("check", w, err)
					if !strings.Contains(what, "FAT") {
						_, err = Pending(target)
						says("status", w, err)
					}
					fixtures.Count("states", 1)
				}
			}
		})
	}
}

// TestUnreadableBooks makes unreadable what recovery and sync can do without or make anew: the other FAT copy, FSInfo,
// and the journal.
func TestUnreadableBooks(t *testing.T) {
	trees := crashCases()["kernel update"]
	o := Options{Selection: crashSelect}
	for _, g := range geometries {
		t.Run(g.name, func(t *testing.T) {
			if g.name != "FAT32" && g.name != "FAT12" && !long() {
				t.Skip("FAT12 and FAT32 have all that matters here")
			}
			t.Parallel()
			c := prepared(t, g, trees, o)
			tree, err := fixtures.ReadStrict(c.base, c.base.Size(), 0)
			if err != nil {
				t.Fatal(err)
			}
			file := tree.Extents(tree.Get(journalPath))
			at := func(off int64) int64 {
				for _, x := range file {
					if off < x.Len {
						return x.Off + off
					}
					off -= x.Len
				}
				t.Fatal("the journal is too short")
				return 0
			}
			places := map[string][]int64{
				"slot A": {at(journal.SlotA)}, "slot B": {at(journal.SlotB)}, "payload": {at(journal.PayloadOffset)},
				"both slots": {at(journal.SlotA), at(journal.SlotB)},
			}
			if g.fats == 2 {
				places["FAT copy 1"] = []int64{tree.FATEntryExtent(1, 0).Off}
			}
			if g.typ == fatdriver.FAT32 {
				places["FSInfo"] = []int64{int64(g.sector)}
			}
			for what, offs := range places {
				states := 0
				if _, err := c.rec.Explore(fixtures.CrashOptions{Limit: 2, Random: 1, Seed: 5}, func(s *fixtures.State) error {
					k, err := c.visible(s)
					if err != nil {
						return err
					}
					b, err := s.Bytes()
					if err != nil {
						return err
					}
					if states++; states%3 > 0 && g.typ == fatdriver.FAT32 && !long() {
						return nil
					}
					w := newWeak(b, g.sector, offs...)
					target := &Target{Name: "weak", Dev: w}
					if _, err := Recover(context.Background(), target, RecoverOptions{Options: Options{DryRun: true}}); err != nil || w.writes > 0 {
						return fmt.Errorf("%s: dry run: %w", what, err)
					}
					if what == "FSInfo" || what == "FAT copy 1" {
						if err := c.recovered(w, k); err != nil {
							return fmt.Errorf("%s: %w", what, err)
						}
						if len(w.bad) > 0 {
							return fmt.Errorf("%s is unreadable still", what)
						}
					} else {
						rec, err := Recover(context.Background(), target, RecoverOptions{})
						if err != nil {
							return fmt.Errorf("%s: %w", what, err)
						}
						if rec.Action == actStale && rec.Reason == "" {
							return fmt.Errorf("%s: no reason", what)
						}
						n, err := c.visible(w.Mem) // which reads the journal too
						if err != nil || n != k && n != c.last {
							return fmt.Errorf("%s: tree %d became %d, %w", what, k, n, err)
						}
					}
					res := syncMem(t, c.src, w, o)
					if res.Err != nil {
						return fmt.Errorf("%s: sync: %w", what, res.Err)
					}
					if n, err := c.visible(w.Mem); err != nil || n != c.last {
						return fmt.Errorf("%s: after the sync, tree %d, %w", what, n, err)
					}
					if len(w.bad) > 0 && strings.HasSuffix(what, "slots") && res.Outcome == Synced {
						return fmt.Errorf("%s unreadable still", what)
					}
					return nil
				}); err != nil {
					t.Fatal(err)
				}
				fixtures.Count("states", int64(states))
			}
		})
	}
}
