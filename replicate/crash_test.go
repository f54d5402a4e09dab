package replicate

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"strings"
	"testing"

	"espmirror/blockdev"
	"espmirror/fatdriver"
	"espmirror/fixtures"
)

// scanned opens a volume and reads its tree.
func scanned(t testing.TB, dev blockdev.Device) (*fatdriver.Volume, *fatdriver.Tree) {
	t.Helper()
	v, err := fatdriver.Open(dev)
	if err != nil {
		t.Fatal(err)
	}
	tree, err := v.Scan()
	if err != nil {
		t.Fatal(err)
	}
	return v, tree
}

// crashRun is a recorded sync, and the trees that a reader may see at any moment of it.
type crashRun struct {
	g     geometry
	base  fixtures.Image // under rec, and not to be changed
	rec   *fixtures.Recording
	trees fixtures.Trees
	src   Source
	opt   Options
	last  int // number of the new tree
	// between is the number of the tree between the two transactions of a run that makes room first.
	between int
}

// record1 syncs src to a copy of base and collects the trees at its barriers.
func record1(t testing.TB, g geometry, base []byte, src Source, o Options) *crashRun {
	t.Helper()
	r := fixtures.NewRecorder(fixtures.Image(base), g.sector)
	if res := syncMem(t, src, r, o); res.Err != nil || res.Outcome != Synced {
		t.Fatal(res.Outcome, res.Err)
	}
	c := &crashRun{g: g, base: base, rec: r.Recording(), src: src, opt: o}
	c.barriers(t, bytes.Clone(base))
	if c.last != c.trees.Len()-1 {
		t.Fatal("a tree came back after another one")
	}
	return c
}

// barriers notes the trees at the barriers of the recording: each must be whole, and their number is bounded by that of
// the commits. The base is written to.
func (c *crashRun) barriers(t testing.TB, base []byte) {
	t.Helper()
	m := blockdev.NewMem(base, c.g.sector)
	note := func() {
		// An entry that goes and whose slots lie in two sectors leaves long-name slots behind between the two commits.
		tree, err := c.trees.Read(m, 0, true)
		if err != nil {
			t.Fatalf("at a barrier: %v", err)
		}
		c.last, _ = c.trees.Add(tree)
	}
	note()
	for _, op := range c.rec.Ops {
		if op.Flush {
			note()
		} else if _, err := m.WriteAt(op.Data, op.Off); err != nil {
			t.Fatal(err)
		}
	}
	note()
}

// visible judges what a reader without any replay sees through each FAT copy.
func (c *crashRun) visible(v fixtures.Volume) (int, error) {
	return c.trees.Visible(v, func(tree *fixtures.Tree) error {
		a, err := tree.Audit()
		if err == nil && len(a.Illegal) > 0 {
			err = errors.New(a.Illegal[0])
		}
		return err
	}, []int{0, 1}[:c.g.fats]...)
}

// recovered recovers a state and judges the result; a second recovery must write nothing.
func (c *crashRun) recovered(s blockdev.Device, before int) error {
	t := &Target{Name: "crashed", Dev: s}
	if _, err := Recover(context.Background(), t, RecoverOptions{}); err != nil {
		return err
	}
	for n := 0; n < c.g.fats; n++ {
		tree, err := c.trees.Read(s, n, false)
		if err != nil {
			return fmt.Errorf("after recovery, FAT copy %d: %w", n, err)
		}
		k, ok := c.trees.Number(tree)
		if !ok || k != before && k != c.last && (k < before || k != c.between) {
			return fmt.Errorf("after recovery, FAT copy %d shows tree %d, it was %d of %d", n, k, before, c.last)
		}
		a, err := tree.Audit()
		if err != nil {
			return err
		}
		if len(a.Lost) > 0 || len(a.Illegal) > 0 {
			return fmt.Errorf("after recovery, FAT copy %d has lost clusters %v, illegal entries %v", n, a.Lost, a.Illegal)
		}
		if _, err := tree.CheckFSInfo(false); err != nil {
			return fmt.Errorf("after recovery: %w", err)
		}
		if d, err := tree.DifferentFATs(); err != nil || len(d) > 0 {
			return fmt.Errorf("after recovery, FAT copies differ in sectors %v (%v)", d, err)
		}
	}
	again := blockdev.NewCounting(s)
	if _, err := Recover(context.Background(), &Target{Name: "crashed", Dev: again}, RecoverOptions{}); err != nil {
		return fmt.Errorf("second recovery: %w", err)
	}
	if n := again.Counts().Writes; n != 0 {
		return fmt.Errorf("second recovery wrote %d times", n)
	}
	return nil
}

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

// crashCases are pairs of trees: what is on the target, and what it is to become.
func crashCases() map[string][2]map[string]string {
	base := map[string]string{
		"EFI/BOOT/BOOTX64.EFI":                       fixtures.Program(strings.Repeat("boot", 300)),
		"EFI/Linux/linux-6.1+3-0.efi":                fixtures.Program(strings.Repeat("uki", 900)),
		"EFI/Linux/old and long.efi":                 fixtures.Program(strings.Repeat("old", 500)),
		"loader/loader.conf":                         "timeout 3\n",
		"loader/entries/a.conf":                      "title a\nlinux /0123456789abcdef0123456789abcdef/6.1/linux\n",
		"0123456789abcdef0123456789abcdef/6.1/linux": strings.Repeat("kernel", 400),
	}
	with := func(f func(m map[string]string)) map[string]string {
		m := maps.Clone(base)
		f(m)
		return m
	}
	return map[string][2]map[string]string{
		"first run": {nil, base},
		"replace": {base, with(func(m map[string]string) {
			m["EFI/BOOT/BOOTX64.EFI"] = fixtures.Program("new" + strings.Repeat("x", 2000))
		})},
		"one directory": {base, with(func(m map[string]string) {
			m["EFI/Linux/new.efi"] = fixtures.Program("new")
			delete(m, "EFI/Linux/old and long.efi")
			m["EFI/Linux/linux-6.1b+3-0.efi"] = m["EFI/Linux/linux-6.1+3-0.efi"]
			delete(m, "EFI/Linux/linux-6.1+3-0.efi")
		})},
		"kernel update": {base, with(func(m map[string]string) {
			m["0123456789abcdef0123456789abcdef/6.2/linux"] = strings.Repeat("kernel2", 400)
			delete(m, "0123456789abcdef0123456789abcdef/6.1/linux")
			m["loader/entries/b.conf"] = "title b\nlinux /0123456789abcdef0123456789abcdef/6.2/linux\n"
			delete(m, "loader/entries/a.conf")
			m["EFI/Linux/linux-6.2.efi"] = fixtures.Program(strings.Repeat("uki2", 900))
			delete(m, "EFI/Linux/old and long.efi")
		})},
		"files in the root": {base, with(func(m map[string]string) {
			m["vmlinuz-linux"] = strings.Repeat("k", 3000)
			m["Long name in the root.img"] = strings.Repeat("i", 1500)
		})},
		// The entries' sector and that of what they refer to are two, so both sides' files are there for a while.
		"entries refer into EFI": {
			with(func(m map[string]string) {
				m["EFI/debian/vmlinuz-1"] = strings.Repeat("one", 500)
				m["loader/entries/d.conf"] = "title d\nlinux /EFI/debian/vmlinuz-1\n"
			}),
			with(func(m map[string]string) {
				m["EFI/debian/vmlinuz-2"] = strings.Repeat("two", 500)
				m["loader/entries/d.conf"] = "title d\nlinux /EFI/debian/vmlinuz-2\n"
				delete(m, "EFI/Linux/old and long.efi")
			}),
		},
		"removed directories": {base, with(func(m map[string]string) {
			delete(m, "0123456789abcdef0123456789abcdef/6.1/linux")
			delete(m, "loader/entries/a.conf")
		})},
	}
}

var crashSelect = Selection{Select: []string{"loader", "EFI/Linux", "EFI/BOOT", "EFI/debian", "0123456789abcdef0123456789abcdef", "vmlinuz-linux", "Long name in the root.img"}}
