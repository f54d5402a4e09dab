package replicate

import (
	"bytes"
	"context"
	"fmt"
	"maps"
	"strings"
	"testing"

	"espmirror/blockdev"
	"espmirror/fatdriver"
	"espmirror/fixtures"
)

// danglingEntry names a loader entry that refers to a file that is missing or empty.
func danglingEntry(tree *fixtures.Tree) error {
	all, err := tree.Dangling()
	if err == nil && len(all) > 0 {
		err = fmt.Errorf("a loader entry refers to a missing file: %s", all[0])
	}
	return err
}

// orderCases change loader entries together with what they refer to, in every direction.
func orderCases() map[string][2]map[string]string {
	conf := func(paths ...string) string {
		s := "title x\n"
		for _, p := range paths {
			s += "linux /" + p + "\n"
		}
		return s
	}
	id := "0123456789abcdef0123456789abcdef"
	base := map[string]string{
		"loader/loader.conf":                 "timeout 3\n",
		"loader/entries/a.conf":              conf(id+"/6.1/linux", id+"/6.1/initrd"),
		"loader/entries/root.conf":           conf("vmlinuz-linux"),
		id + "/6.1/linux":                    strings.Repeat("kernel", 300),
		id + "/6.1/initrd":                   strings.Repeat("initrd", 300),
		"vmlinuz-linux":                      strings.Repeat("root", 300),
		"EFI/Linux/uki+3.efi":                fixtures.Program(strings.Repeat("u", 2000)),
		"EFI/BOOT/BOOTX64.EFI":               fixtures.Program(strings.Repeat("b", 700)),
		"EFI/Linux/uki+3.efi.extra.d/a.cred": "credential",
	}
	with := func(f func(m map[string]string)) map[string]string {
		m := maps.Clone(base)
		f(m)
		return m
	}
	return map[string][2]map[string]string{
		"moved": {base, with(func(m map[string]string) {
			// The same content under another path: it must be in both places for a moment.
			m[id+"/6.2/linux"], m[id+"/6.2/initrd"] = m[id+"/6.1/linux"], m[id+"/6.1/initrd"]
			delete(m, id+"/6.1/linux")
			delete(m, id+"/6.1/initrd")
			m["loader/entries/b.conf"] = conf(id+"/6.2/linux", id+"/6.2/initrd")
			delete(m, "loader/entries/a.conf")
		})},
		"from the root into a directory": {base, with(func(m map[string]string) {
			m[id+"/new/linux"] = m["vmlinuz-linux"]
			delete(m, "vmlinuz-linux")
			m["loader/entries/root.conf"] = conf(id + "/new/linux")
		})},
		"from a directory into the root": {base, with(func(m map[string]string) {
			m["Long.name.of.a.kernel.in.the.root"] = m[id+"/6.1/linux"]
			delete(m, id+"/6.1/linux")
			delete(m, id+"/6.1/initrd")
			m["loader/entries/a.conf"] = conf("Long.name.of.a.kernel.in.the.root")
		})},
		"entries and files go":   {base, with(func(m map[string]string) { delete(m, "loader/entries/root.conf"); delete(m, "vmlinuz-linux") })},
		"entries and files come": {with(func(m map[string]string) { delete(m, "loader/entries/root.conf"); delete(m, "vmlinuz-linux") }), base},
		"first run":              {nil, base},
		"everything else changes": {base, with(func(m map[string]string) {
			m[id+"/6.2/linux"] = strings.Repeat("2", 900)
			m["loader/entries/b.conf"] = conf(id + "/6.2/linux")
			delete(m, id+"/6.1/linux")
			delete(m, id+"/6.1/initrd")
			delete(m, "loader/entries/a.conf")
			delete(m, "vmlinuz-linux")
			m["loader/entries/root.conf"] = conf("initrd-linux")
			m["initrd-linux"] = strings.Repeat("3", 1200)
			m["EFI/Linux/uki.efi"] = m["EFI/Linux/uki+3.efi"]
			delete(m, "EFI/Linux/uki+3.efi")
			m["EFI/BOOT/BOOTX64.EFI"] = fixtures.Program("new")
		})},
	}
}

var orderSelect = Selection{Select: []string{"loader", "EFI/Linux", "EFI/BOOT", "0123456789abcdef0123456789abcdef", "vmlinuz-linux", "initrd-linux", "Long.name.of.a.kernel.in.the.root"}}

// TestNoDanglingEntry looks at every crash state for a loader entry that refers to a missing file.
func TestNoDanglingEntry(t *testing.T) {
	limit := 200
	if long() {
		limit = 20_000
	}
	for name, trees := range orderCases() {
		for _, g := range []geometry{geometries[0], geometries[2], geometries[4]} {
			t.Run(name+"/"+g.name, func(t *testing.T) {
				t.Parallel()
				c := prepared(t, g, trees, Options{Selection: orderSelect})
				for n := range g.fats {
					_, err := c.rec.ExploreLazy(fixtures.CrashOptions{Limit: limit}, func(s *fixtures.State) error {
						tree, err := c.trees.Read(s, n, true)
						if err != nil {
							return err
						}
						return danglingEntry(tree)
					})
					if err != nil {
						t.Fatal(err)
					}
				}
				if err := c.explore(c.rec, limit, 10); err != nil {
					t.Fatal(err)
				}
			})
		}
	}
}

// TestRenameWritesNoData counts the bytes of renames: of entries that proved good, of directories, of names that are swapped.
func TestRenameWritesNoData(t *testing.T) {
	const size = 600_000
	big := func(c string) string { return fixtures.Program(strings.Repeat(c, size)) }
	base := map[string]string{
		"EFI/Linux/a+3.efi":       big("a"),
		"EFI/Linux/b.efi":         big("b"),
		"EFI/Linux/dir/deep.efi":  big("c"),
		"loader/entries/x+3.conf": "title x\n",
	}
	renames := map[string]map[string]string{
		"another":       {"EFI/Linux/a+3.efi": "EFI/Linux/c+3.efi", "loader/entries/x+3.conf": "loader/entries/y+3.conf"},
		"good":          {"EFI/Linux/a+3.efi": "EFI/Linux/a.efi"},
		"swapped":       {"EFI/Linux/a+3.efi": "EFI/Linux/b.efi", "EFI/Linux/b.efi": "EFI/Linux/a+3.efi"},
		"case":          {"EFI/Linux/b.efi": "EFI/Linux/B.EFI"},
		"other dir":     {"EFI/Linux/dir/deep.efi": "EFI/Linux/deep.efi"},
		"dir renamed":   {"EFI/Linux/dir/deep.efi": "EFI/Linux/other directory/deep.efi"},
		"case of a dir": {"EFI/Linux/dir/deep.efi": "EFI/Linux/DIR/deep.efi"},
	}
	for name, moves := range renames {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			m := newVolume(t, geometries[2])
			if res := syncMem(t, newMemSource(base), m, Options{Selection: testSelect}); res.Err != nil {
				t.Fatal(res.Err)
			}
			want := map[string]string{}
			for p, c := range base {
				if to, ok := moves[p]; ok {
					p = to
				}
				want[p] = c
			}
			d := blockdev.NewCounting(m)
			res := syncMem(t, newMemSource(want), d, Options{Selection: testSelect})
			if res.Err != nil || res.Outcome != Synced || res.Summary.DataBytes > 100 {
				t.Fatal(res.Outcome, res.Err, res.Summary.DataBytes)
			}
			if n := d.Counts().BytesWritten; n > 32<<10 {
				t.Errorf("%d bytes written for a rename", n)
			}
			judge(t, m, 2, want)
		})
	}
}

// TestLargeSectorsOnSmallBlocks cuts the power on a volume with 4096-byte sectors on a device that writes 512 bytes at
// once: what is to switch in one write must lie in one block of the device.
func TestLargeSectorsOnSmallBlocks(t *testing.T) {
	big := geometries[3]
	tiny := geometry{"FAT12-4k", fatdriver.FAT12, 9 << 20, 4096, 1, 2}
	all := orderCases()
	maps.Copy(all, map[string][2]map[string]string{"files in the root": crashCases()["files in the root"], "kernel update": crashCases()["kernel update"]})
	sel := Selection{Select: append([]string{"Long name in the root.img"}, orderSelect.Select...)}
	// Names of nine slots in the root: some of them lie across the blocks of the device, and several switch at once.
	long0, long1 := map[string]string{"loader/loader.conf": "x"}, map[string]string{"loader/loader.conf": "x"}
	for i := range 9 {
		name := fmt.Sprintf("%c%s.img", 'a'+i, strings.Repeat(fmt.Sprint(i), 100))
		sel.Select = append(sel.Select, name)
		if i%2 == 0 {
			long0[name] = strings.Repeat("0", 700)
		}
		long1[name] = strings.Repeat("1", 800)
	}
	all["long names in the root"] = [2]map[string]string{long0, long1}
	all["long names in the root go"] = [2]map[string]string{long1, long0}
	all["short names in the root"] = [2]map[string]string{{"a": "1", "loader/l": "2"}, {"a": "2", "loader/l": "3", "b": "4"}}
	sel.Select = append(sel.Select, "a", "b")
	for name, trees := range all {
		for _, g := range []geometry{big, tiny, geometries[0], geometries[4]} {
			if g.sector == 512 && !strings.Contains(name, "names in the root") {
				continue // TestNoDanglingEntry and TestPowerCut have these
			}
			t.Run(name+"/"+g.name, func(t *testing.T) {
				t.Parallel()
				o := Options{Selection: sel}
				m := newVolume(t, g)
				m = blockdev.NewMem(m.Bytes(), 512)
				if trees[0] != nil {
					if res := syncMem(t, newMemSource(trees[0]), m, o); res.Err != nil {
						t.Fatal(res.Err)
					}
				}
				small := g
				small.sector = 512
				c := record1(t, small, m.Bytes(), newMemSource(trees[1]), o)
				if err := c.explore(c.rec, 300, 40); err != nil {
					t.Fatal(err)
				}
				if _, err := c.rec.ExploreLazy(fixtures.CrashOptions{Limit: 300}, func(s *fixtures.State) error {
					tree, err := c.trees.Read(s, 0, true)
					if err != nil {
						return err
					}
					return danglingEntry(tree)
				}); err != nil {
					t.Fatal(err)
				}
			})
		}
	}
}

// An entry of the target names its kernel by the 8.3 name, as firmware allows: the kernel goes before the entry.
func TestAliasOrder(t *testing.T) {
	sel := Options{Selection: Selection{Select: []string{"loader", "EFI/tok"}}}
	old := withFiles(map[string]string{
		"EFI/tok/kernel-number-one": "one", "EFI/tok/kernel-number-two": "two",
		"loader/entries/one.conf": "title one\nlinux /EFI/tok/KERNEL~1\n", "loader/entries/two.conf": "title two\nlinux /EFI/tok/kernel-number-two\n",
	})
	m := &aMember{name: "m", guid: guidB, dev: newVolume(t, geometries[2])}
	m.write(t, old)
	now := withFiles(map[string]string{"EFI/tok/kernel-number-two": "two", "loader/entries/two.conf": old["loader/entries/two.conf"]})
	before := bytes.Clone(m.dev.Bytes())
	for n := 0; ; n++ {
		copy(m.dev.Bytes(), before)
		left := n
		res, err := Sync(context.Background(), newMemSource(now), []*Target{{Name: "m", Dev: &stopping{m.dev, &left}, PartGUID: guidB}}, sel)
		have := m.files(t)
		if have["loader/entries/one.conf"] != "" && have["EFI/tok/kernel-number-one"] == "" {
			t.Fatalf("after %d writes the entry is there, and its kernel is not", n)
		}
		if err == nil && res[0].Err == nil {
			break
		}
	}
}
