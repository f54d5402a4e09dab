package replicate

import (
	"maps"
	"slices"
	"strings"
	"testing"

	"espmirror/fixtures"
)

// withFiles is a tree that can be replicated, with some more files.
func withFiles(more map[string]string) map[string]string {
	out := map[string]string{"loader/loader.conf": "timeout 3\n", "EFI/BOOT/BOOTX64.EFI": fixtures.Program("boot")}
	maps.Copy(out, more)
	return out
}

// write makes the files the only ones of a member, under the very names.
func (m *aMember) write(t testing.TB, files map[string]string) {
	t.Helper()
	changes := map[string]*string{}
	for p := range m.files(t) {
		if _, ok := files[p]; !ok {
			changes[p] = nil
		}
	}
	for p, c := range files {
		changes[p] = &c
	}
	m.edit(t, changes)
}

// TestCounters holds what becomes of names with boot counters. In each of the two directories, for entries of both kinds.
func TestCounters(t *testing.T) {
	const x, y = "content x", "content y, which is longer"
	for _, c := range []struct {
		name           string
		src, dst, want map[string]string // name without suffix → content
		rewrites       bool
	}{
		{"good on the source", map[string]string{"a": x}, map[string]string{"a+2-1": x}, map[string]string{"a": x}, false},
		{"good on both", map[string]string{"a": x}, map[string]string{"a": x}, map[string]string{"a": x}, false},
		{"bad on the target, good on the source", map[string]string{"a": x}, map[string]string{"a+0-3": x}, map[string]string{"a": x}, false},
		{"tried on the source, and on the target", map[string]string{"a+1-2": x}, map[string]string{"a+2-1": x}, map[string]string{"a+2-1": x}, false},
		{"tried on the source, good on the target", map[string]string{"a+1-2": x}, map[string]string{"a": x}, map[string]string{"a": x}, false},
		{"tried on the source, bad on the target", map[string]string{"a+1-2": x}, map[string]string{"a+0-3": x}, map[string]string{"a+0-3": x}, false},
		{"tried on the source, new on the target", map[string]string{"a+1-2": x}, nil, map[string]string{"a+3-0": x}, true},
		{"without DONE", map[string]string{"a+3": x}, nil, map[string]string{"a+3": x}, true},
		{"other content", map[string]string{"a+1-2": x}, map[string]string{"a+2-1": y}, map[string]string{"a+3-0": x}, true},
		{"other content, good on the target", map[string]string{"a+1-2": x}, map[string]string{"a": y}, map[string]string{"a+3-0": x}, true},
		{"other content, good on the source", map[string]string{"a": x}, map[string]string{"a+2-1": y}, map[string]string{"a": x}, true},
		{"bad on the source, new on the target", map[string]string{"a+0-3": x}, nil, map[string]string{"a+3-0": x}, true},
		{"bad on the source, the same on the target", map[string]string{"a+0-3": x}, map[string]string{"a+3-0": x}, map[string]string{"a+3-0": x}, false},
		{"bad, and nobody knows the tries", map[string]string{"a+0": x}, nil, map[string]string{"a+1": x}, true},
		{"bad with two digits", map[string]string{"a+00-00": x}, nil, map[string]string{"a+01-00": x}, true},
		{"two digits", map[string]string{"a+07-03": x}, nil, map[string]string{"a+10-00": x}, true},
		{"two of one key on the target", map[string]string{"a": x}, map[string]string{"a+3-0": y, "a+2-1": x}, map[string]string{"a": x}, false},
		{"two of one key on the target, and the source is tried", map[string]string{"a+2-1": x}, map[string]string{"a+3-0": y, "a": y}, map[string]string{"a+3-0": x}, true},
		{"two of one key on the source", map[string]string{"a+3-0": x, "a+2-1": y}, nil, map[string]string{"a+3-0": x, "a+2-1": y}, true},
		{"two of one key on the source, one good", map[string]string{"a": x, "a+2-1": y}, map[string]string{"a+3-0": x}, map[string]string{"a": x, "a+3-0": y}, true},
		{"no counter after all", map[string]string{"a+b": x}, map[string]string{"a": x}, map[string]string{"a+b": x}, false},
		{"renamed and tried", map[string]string{"b+2-1": x}, map[string]string{"a+1-2": x}, map[string]string{"b+3-0": x}, false},
	} {
		for dir, suffix := range map[string]string{"loader/entries": ".conf", "EFI/Linux": ".efi"} {
			t.Run(c.name+"/"+suffix, func(t *testing.T) {
				full := func(m map[string]string) map[string]string {
					out := map[string]string{}
					for n, content := range m {
						if suffix == ".conf" {
							content = "title " + content + "\n"
						} else {
							content = fixtures.Program(content)
						}
						out[dir+"/"+n+suffix] = content
					}
					return withFiles(out)
				}
				ms := newMembers(t, geometries[0], nil, "a", "b", "c")
				a, b, dirTarget := ms[0], ms[1], ms[2]
				a.write(t, full(c.src))
				b.write(t, full(c.dst))
				res, err := a.sync(t, Options{}, b) // of a volume that was never in a set
				expectResults(t, "sync", res, err, Synced)
				judge(t, b.dev, 2, full(c.want))
				st := b.state(t)
				if state := int64(len(st.Bytes())); !c.rewrites && res[0].Summary.DataBytes != state {
					t.Errorf("%d bytes of data are written, the state file has %d", res[0].Summary.DataBytes, state)
				}
				res, err = a.sync(t, Options{}, b)
				expectResults(t, "again", res, err, InSync)
				res, err = a.verify(t, Options{}, b)
				expectResults(t, "verify", res, err, InSync)

				// A directory as the source.
				src, err := OpenDirSource(writeFiles(t, full(c.src)))
				if err != nil {
					t.Fatal(err)
				}
				defer src.Close()
				dirTarget.write(t, full(c.dst))
				if res := syncMem(t, src, dirTarget.dev, Options{}); res.Outcome != Synced && res.Outcome != InSync {
					t.Fatal(res.Outcome, res.Err)
				}
				judge(t, dirTarget.dev, 2, full(c.want))
			})
		}
	}
}

// TestCountersAreNoChange has boot loaders rename entries on both sides: that is in sync, and no generation.
func TestCountersAreNoChange(t *testing.T) {
	ms := newMembers(t, geometries[0], nil, "a", "b", "c")
	a, b, c := ms[0], ms[1], ms[2]
	a.write(t, withFiles(map[string]string{"EFI/Linux/u+3-0.efi": fixtures.Program("u"), "loader/entries/e+3-0.conf": "title e\n"}))
	res, err := a.sync(t, Options{}, b, c)
	expectResults(t, "first", res, err, Synced, Synced)
	a.edit(t, map[string]*string{"EFI/Linux/u+3-0.efi": ptr("→u+2-1.efi"), "loader/entries/e+3-0.conf": ptr("→e+2-1.conf")})
	b.edit(t, map[string]*string{"EFI/Linux/u+3-0.efi": ptr("→u+1-2.efi")})
	for _, from := range []*aMember{a, b} {
		to := []*aMember{b, c}
		if from == b {
			to = []*aMember{a, c}
		}
		res, err = from.sync(t, Options{}, to...)
		expectResults(t, "renamed", res, err, InSync, InSync)
		res, err = from.verify(t, Options{}, to...)
		expectResults(t, "verify", res, err, InSync, InSync)
	}
	if st := a.state(t); st.Generation != 1 {
		t.Errorf("generation %d", st.Generation)
	}
	// A boot proves good, and that goes round; it is a rename, of the same generation.
	a.edit(t, map[string]*string{"EFI/Linux/u+2-1.efi": ptr("→u.efi")})
	res, err = a.sync(t, Options{}, b, c)
	expectResults(t, "blessed", res, err, Synced, Synced)
	for _, r := range res {
		if want := int64(len(b.state(t).Bytes())); r.Summary.DataBytes != want || len(r.Summary.Changes) != 1 || r.Summary.Changes[0].Op != "rename" {
			t.Errorf("%d bytes of data, %v", r.Summary.DataBytes, r.Summary.Changes)
		}
	}
	if st := b.state(t); st.Generation != 1 {
		t.Errorf("generation %d", st.Generation)
	}
	if _, ok := c.files(t)["EFI/Linux/u.efi"]; !ok {
		t.Error(slices.Sorted(maps.Keys(c.files(t))))
	}
	// A real change on the target is seen all the same.
	c.edit(t, map[string]*string{"EFI/Linux/u.efi": ptr(fixtures.Program("somebody else's"))})
	res, err = a.sync(t, Options{}, b, c)
	expectResults(t, "changed", res, err, InSync, ErrStaleSource)
}

// TestCountedAnchor selects a file with a counter by its name: the count of each side is its own here too.
func TestCountedAnchor(t *testing.T) {
	ms := newMembers(t, geometries[0], nil, "a", "b")
	a, b := ms[0], ms[1]
	a.write(t, withFiles(map[string]string{"EFI/Linux/u+3-0.efi": fixtures.Program("u"), "EFI/Linux/other.efi": fixtures.Program("other")}))
	b.write(t, withFiles(map[string]string{"EFI/Linux/u+2-1.efi": fixtures.Program("u"), "EFI/Linux/mine.efi": fixtures.Program("mine")}))
	o := Options{Selection: Selection{Select: []string{"EFI/Linux/u+3-0.efi"}}}
	for range 2 {
		res, err := a.sync(t, o, b)
		if err != nil || res[0].Err != nil {
			t.Fatal(err, res[0].Err)
		}
		fsck(t, b.dev)
		var counted []string
		for p, c := range b.files(t) {
			if strings.HasPrefix(p, "EFI/Linux/u") {
				counted = append(counted, p)
				if c != fixtures.Program("u") {
					t.Errorf("%s is %q", p, c)
				}
			}
		}
		if len(counted) != 1 {
			t.Errorf("%v", counted)
		}
		if b.files(t)["EFI/Linux/mine.efi"] != fixtures.Program("mine") {
			t.Error("what is not selected was touched")
		}
	}
}

// Two entries whose names differ by their counters alone: the bad and the decremented count are copied.
func TestRivalCounters(t *testing.T) {
	for _, name := range []string{"x+1-2.conf", "x+0-3.conf"} {
		m := newVolume(t, geometries[2])
		res := syncMem(t, newMemSource(withFiles(map[string]string{
			"loader/entries/x.conf":  "title good\nlinux /EFI/BOOT/BOOTX64.EFI\n",
			"loader/entries/" + name: "title tried\nlinux /EFI/BOOT/BOOTX64.EFI\noptions b\n",
		})), m, Options{Selection: testSelect})
		if res.Err != nil {
			t.Fatal(res.Err)
		}
		if have := (&aMember{name: "m", guid: guidB, dev: m}).files(t); have["loader/entries/"+name] != "" {
			t.Errorf("the source's own count %s was copied to a target that never booted it", name)
		}
	}

	// On the target they are told apart too: each keeps its count there, and nothing is left to do.
	ms := newMembers(t, geometries[2], nil, "a", "b")
	a, b := ms[0], ms[1]
	entry := func(title string) string { return "title " + title + "\nlinux /EFI/BOOT/BOOTX64.EFI\n" }
	rivals := map[string]string{
		"loader/entries/x.conf": entry("good"), "loader/entries/x+1-2.conf": entry("tried"), "loader/entries/x+2-1.conf": entry("of the same first count"),
		"EFI/Linux/y+0.efi": fixtures.Program("bad"), "EFI/Linux/y+1.efi": fixtures.Program("last try"), "EFI/Linux/y.efi": fixtures.Program("good"),
	}
	expect := func(what string, want map[string]string) {
		t.Helper()
		have := b.files(t)
		for p, c := range want {
			if have[p] != c {
				t.Errorf("%s: %s is %q, want %q", what, p, have[p], c)
			}
		}
		if n := len(want); n != len(rivals) {
			t.Fatal(n)
		}
		for p := range have {
			if want[p] == "" && counts(p[:max(0, strings.LastIndex(p, "/"))]) {
				t.Errorf("%s: there is %s", what, p)
			}
		}
	}
	a.write(t, withFiles(rivals))
	res, err := a.sync(t, Options{}, b)
	expectResults(t, "rivals", res, err, Synced)
	want := map[string]string{
		"loader/entries/x.conf": entry("good"), "EFI/Linux/y.efi": rivals["EFI/Linux/y.efi"], "EFI/Linux/y+1.efi": rivals["EFI/Linux/y+1.efi"],
		"EFI/Linux/y+0.efi": rivals["EFI/Linux/y+0.efi"], // the name of its first count is that of the other one
	}
	first, second := "loader/entries/x+3-0.conf", "loader/entries/x+2-1.conf"
	have := b.files(t)
	if have[second] == entry("of the same first count") {
		want[first], want[second] = entry("tried"), entry("of the same first count")
	} else {
		second = "loader/entries/x+1-2.conf"
		want[first], want[second] = entry("of the same first count"), entry("tried")
	}
	expect("new", want)
	res, err = a.sync(t, Options{}, b)
	expectResults(t, "again", res, err, InSync)
	b.edit(t, map[string]*string{first: ptr("→x+0-3.conf")})
	want["loader/entries/x+0-3.conf"] = want[first]
	delete(want, first)
	res, err = a.sync(t, Options{}, b)
	expectResults(t, "booted on the target", res, err, InSync)
	expect("booted on the target", want)
}
