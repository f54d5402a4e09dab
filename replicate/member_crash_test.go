package replicate

import (
	"bytes"
	"fmt"
	"maps"
	"testing"

	"espmirror/blockdev"
	"espmirror/fixtures"
)

// memberCrash records the run of a member over another one that was in sync with it.
func memberCrash(t *testing.T, g geometry, old, now map[string]string) (c *crashRun, a, b *aMember) {
	t.Helper()
	ms := newMembers(t, g, nil, "a", "b")
	a, b = ms[0], ms[1]
	b.guid = "" // as record1 has it
	a.write(t, old)
	res, err := a.sync(t, Options{}, b)
	expectResults(t, "first", res, err, Synced)
	a.write(t, now)
	base := bytes.Clone(b.dev.Bytes())
	o := a.options(Options{})
	c = record1(t, g, base, a.open(t, a.dev), o)
	return c, a, b
}

// TestMemberPowerCut judges the states of a run that counts a generation: every tree is old or new, and after recovery the
// state file speaks of the tree that is there.
func TestMemberPowerCut(t *testing.T) {
	old := withFiles(map[string]string{
		"EFI/Linux/u-1.efi": fixtures.Program("one"), "loader/entries/1.conf": "title 1\nlinux /" + token + "/1/linux\n", token + "/1/linux": "kernel one",
	})
	uki := maps.Clone(old)
	uki["EFI/Linux/u-2.efi"] = fixtures.Program("two")
	type1 := maps.Clone(old)
	delete(type1, "loader/entries/1.conf")
	delete(type1, token+"/1/linux")
	type1["loader/entries/2.conf"] = "title 2\nlinux /" + token + "/2/linux\n"
	type1[token+"/2/linux"] = "kernel two"
	more := maps.Clone(old)
	more["loader/entries/2.conf"] = "title 2\nlinux /" + token + "/2/linux\n"
	more[token+"/2/linux"] = "kernel two"
	for _, g := range []geometry{geometries[0], geometries[4]} {
		for name, x := range map[string]struct {
			now     map[string]string
			commits int
		}{"a UKI": {uki, 1}, "a kernel in place of another one": {type1, 2}, "one more kernel": {more, 2}} {
			t.Run(g.name+"/"+name, func(t *testing.T) {
				t.Parallel()
				c, a, _ := memberCrash(t, g, old, x.now)
				// The same run over the same volume once more, for its plan.
				again := &aMember{name: "b", dev: blockdev.NewMem(bytes.Clone(c.base), g.sector)}
				res, err := a.sync(t, Options{DryRun: true}, again)
				expectResults(t, "plan", res, err, Differs)
				if n := len(res[0].Summary.Commits); n != x.commits {
					t.Errorf("%d commits, want %d: %v", n, x.commits, res[0].Summary.Commits)
				}
				was, digestNow := again.state(t), a.state(t).Digest
				judge := func(s *fixtures.State) error {
					k, err := c.visible(s)
					if err != nil {
						return err
					}
					if err := c.recovered(s, k); err != nil {
						return err
					}
					_, tree := scanned(t, s)
					st, err := ReadState((&side{t: &Target{Name: "b"}, tree: tree}).source())
					if err != nil || st == nil {
						return fmt.Errorf("no state: %v", err)
					}
					files, err := readFiles(s, 0)
					if err != nil {
						return err
					}
					isNew := true
					for p, content := range x.now {
						isNew = isNew && files[p] == content
					}
					if isNew != (st.Generation == 2) || isNew != (st.Digest == digestNow) || !isNew && !st.same(was) {
						return fmt.Errorf("the tree is new: %v, and its state %d, %v", isNew, st.Generation, st.Digest)
					}
					return nil
				}
				if _, err := c.rec.ExploreLazy(fixtures.CrashOptions{Limit: 300}, func(s *fixtures.State) error {
					_, err := c.visible(s)
					return err
				}); err != nil {
					t.Fatal(err)
				}
				if _, err := c.rec.Explore(fixtures.CrashOptions{Limit: 32, Random: 8, Seed: 1}, judge); err != nil {
					t.Fatal(err)
				}
			})
		}
	}
}

// TestForeignWriteInBetween has a run cut between its commits, and another system write to the volume before anybody
// recovers it, so that the record no longer fits. What then is half a tree must not pass for a change that somebody made.
func TestForeignWriteInBetween(t *testing.T) {
	old := withFiles(map[string]string{
		"EFI/Linux/u-1.efi": fixtures.Program("one"), "loader/entries/1.conf": "title 1\nlinux /" + token + "/1/linux\n", token + "/1/linux": "kernel one",
	})
	now := maps.Clone(old)
	delete(now, "loader/entries/1.conf")
	now["EFI/Linux/u-2.efi"] = fixtures.Program("two")
	now["loader/entries/2.conf"] = "title 2\nlinux /" + token + "/2/linux\n"
	now[token+"/2/linux"] = "kernel two"
	g := geometries[0]
	c, a, _ := memberCrash(t, g, old, now)
	between, stale := 0, 0
	for i, op := range c.rec.Ops {
		if !op.Flush {
			continue
		}
		dev := blockdev.NewMem(bytes.Clone(c.base), g.sector)
		for _, w := range c.rec.Ops[:i] {
			if !w.Flush {
				if _, err := dev.WriteAt(w.Data, w.Off); err != nil {
					t.Fatal(err)
				}
			}
		}
		k, err := c.visible(dev)
		if err != nil {
			t.Fatal(err)
		}
		if k > 0 && k < c.last {
			between++
		}
		b := &aMember{name: "b", dev: dev}
		b.edit(t, map[string]*string{"foreign.txt": ptr("in the root"), "EFI/foreign/x": ptr("in EFI")})
		rec, err := Recover(t.Context(), b.target(), RecoverOptions{})
		if err != nil {
			t.Fatal(err)
		}
		if rec.Action == actStale {
			stale++
		}
		winner := &aMember{name: "a", guid: a.guid, dev: blockdev.NewMem(bytes.Clone(a.dev.Bytes()), g.sector)}
		res, err := b.sync(t, Options{}, winner)
		if err != nil {
			t.Fatal(err)
		}
		judge(t, winner.dev, g.fats, now)
		t.Logf("cut at operation %d, tree %d of %d, %s: %s, %v", i, k, c.last, rec.Action, res[0].Outcome, res[0].Err)
	}
	if between == 0 || stale == 0 {
		t.Errorf("%d cuts between two commits, %d stale records", between, stale)
	}
}
