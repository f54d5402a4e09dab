package replicate

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"math/rand/v2"
	"path"
	"slices"
	"strings"
	"testing"
	"time"

	"espmirror/blockdev"
	"espmirror/fatdriver"
	"espmirror/fixtures"
)

// aMember is a volume of a replica set in these tests.
type aMember struct {
	name, guid string
	dev        *blockdev.Mem
	via        blockdev.Device // what the runs write through; nil: dev
}

func newMember(t testing.TB, name, guid string, g geometry) *aMember {
	return &aMember{name: name, guid: guid, dev: newVolume(t, g)}
}

func (m *aMember) device() blockdev.Device {
	if m.via != nil {
		return m.via
	}
	return m.dev
}

func (m *aMember) target() *Target {
	return &Target{Name: m.name, Dev: m.device(), PartGUID: m.guid}
}

// newMembers makes members of one geometry, which hold the files.
func newMembers(t testing.TB, g geometry, files map[string]string, names ...string) []*aMember {
	t.Helper()
	var out []*aMember
	for i, n := range names {
		m := newMember(t, n, []string{guidA, guidB, guidC}[i], g)
		if files != nil {
			m.replace(t, files)
		}
		out = append(out, m)
	}
	return out
}

// saveState is a Save that writes through the member's own device.
func (m *aMember) saveState(ctx context.Context, state []byte) error {
	_, err := Put(ctx, m.target(), []File{{Path: StatePath, Content: state}}, Options{})
	return err
}

// wantAt finds where a path is, or goes, in a tree that edit changes.
func wantAt(dir *fatdriver.Want, parts []string, make bool) (parent *fatdriver.Want, at int) {
	for i, name := range parts {
		at = slices.IndexFunc(dir.Children, func(w *fatdriver.Want) bool { return fatdriver.Fold(w.Name) == fatdriver.Fold(name) })
		if i+1 == len(parts) {
			return dir, at
		}
		if at < 0 {
			if !make {
				return nil, -1
			}
			dir.Children = append(dir.Children, &fatdriver.Want{Name: name, Dir: true})
			at = len(dir.Children) - 1
		}
		dir = dir.Children[at]
	}
	return nil, -1
}

// edit changes files as another system does that knows nothing of us: no recovery, no journal. The content nil deletes;
// one that begins with "→" is a new name for the file.
func (m *aMember) edit(t testing.TB, changes map[string]*string) {
	t.Helper()
	_, tree := scanned(t, m.dev)
	top := &fatdriver.Want{Dir: true}
	for _, n := range tree.Root.Children {
		top.Children = append(top.Children, fatdriver.Carry(n))
	}
	for _, p := range slices.Sorted(maps.Keys(changes)) {
		content := changes[p]
		dir, at := wantAt(top, fatdriver.SplitPath(p), content != nil)
		switch {
		case content == nil && at >= 0:
			dir.Children = slices.Delete(dir.Children, at, at+1)
		case content == nil:
		case strings.HasPrefix(*content, "→"):
			dir.Children[at].Name = strings.TrimPrefix(*content, "→")
		default:
			w := &fatdriver.Want{Name: path.Base(p), Size: int64(len(*content)), Content: *content}
			if at >= 0 {
				dir.Children[at] = w
			} else {
				dir.Children = append(dir.Children, w)
			}
		}
	}
	var prune func(w *fatdriver.Want)
	prune = func(w *fatdriver.Want) {
		for _, c := range w.Children {
			prune(c)
		}
		w.Children = slices.DeleteFunc(w.Children, func(c *fatdriver.Want) bool {
			return c.Dir && len(c.Children) == 0 && c.Have != nil && len(c.Have.Children) > 0 // what was emptied goes
		})
	}
	prune(top)
	var step fatdriver.Step
	for _, n := range tree.Root.Children {
		if !slices.ContainsFunc(top.Children, func(w *fatdriver.Want) bool { return w.Have == n }) {
			step = append(step, fatdriver.Anchor{Parent: tree.Root, Old: n})
		}
	}
	for _, w := range top.Children {
		step = append(step, fatdriver.Anchor{Parent: tree.Root, Old: w.Have, New: w})
	}
	plan, err := tree.NewPlan([]fatdriver.Step{step}, 0)
	if err != nil {
		t.Fatal(err)
	}
	tx := plan.Begin()
	for _, f := range plan.Files {
		w := tx.File(f)
		if _, err := w.Write([]byte(f.Want.Content.(string))); err != nil {
			t.Fatal(err)
		}
		if err := w.Close(); err != nil {
			t.Fatal(err)
		}
	}
	r := &run{log: slog.New(slog.DiscardHandler)}
	err = inOrder(tx.WriteDirs, tx.WriteFAT, tx.Flush,
		func() error { return r.commitAll(&side{t: m.target()}, plan, tx, nil) },
		func() error { return closeTx(tx, nil) })
	if err != nil {
		t.Fatal(err)
	}
}

func ptr(s string) *string { return &s }

// files reads what a member holds, without our own directory, by a reader that is not ours.
func (m *aMember) files(t testing.TB) map[string]string {
	t.Helper()
	have, err := readFiles(m.dev, 0)
	if err != nil {
		t.Fatal(m.name, err)
	}
	for p := range have {
		if fixtures.Ours(p) {
			delete(have, p)
		}
	}
	return have
}

// replace makes the files the only ones of a member outside of our own directory, as somebody does who mounts it.
func (m *aMember) replace(t testing.TB, files map[string]string) {
	t.Helper()
	src := newMemSource(files)
	res, err := Sync(context.Background(), src, []*Target{m.target()}, Options{Selection: testSelect, Force: true})
	if err != nil || res[0].Err != nil {
		t.Fatal(err, res[0].Err)
	}
}

// defaultSelection asks for that in place of testSelect.
var defaultSelection = Selection{Exclude: []string{"nothing"}}

func (m *aMember) open(t testing.TB, dev blockdev.Device) Source {
	t.Helper()
	vol, _ := scanned(t, dev)
	src, err := OpenVolumeSource(m.name, vol)
	if err != nil {
		t.Fatal(err)
	}
	return src
}

// options are those with which the command runs.
func (m *aMember) options(o Options) Options {
	o.Member, o.SourceGUID, o.Now = true, m.guid, time.Unix(1_700_000_000, 0)
	if o.Selection.Select == nil && o.Selection.Exclude == nil {
		o.Selection = testSelect
	}
	if o.Save == nil {
		o.Save = m.saveState
	}
	return o
}

func targets(to []*aMember) []*Target {
	var ts []*Target
	for _, x := range to {
		ts = append(ts, x.target())
	}
	return ts
}

// sync replicates from one member to others, as the command does.
func (m *aMember) sync(t testing.TB, o Options, to ...*aMember) ([]Result, error) {
	t.Helper()
	return Sync(context.Background(), m.open(t, m.device()), targets(to), m.options(o))
}

// verify compares one member with others.
func (m *aMember) verify(t testing.TB, o Options, to ...*aMember) ([]Result, error) {
	t.Helper()
	return Verify(context.Background(), m.open(t, m.device()), targets(to), m.options(o))
}

func (m *aMember) state(t testing.TB) *State {
	t.Helper()
	st, err := ReadState(m.open(t, m.dev))
	if err != nil {
		t.Fatal(err)
	}
	return st
}

// expectResults wants outcomes, or the reasons of refusals.
func expectResults(t testing.TB, what string, res []Result, err error, want ...any) {
	t.Helper()
	if err != nil {
		t.Fatal(what, err)
	}
	for i, w := range want {
		switch w := w.(type) {
		case Outcome:
			if res[i].Outcome != w || res[i].Err != nil {
				t.Errorf("%s: %s is %s: %v %v", what, res[i].Target, res[i].Outcome, res[i].Err, res[i].Summary.Changes)
			}
		case error:
			if !errors.Is(res[i].Err, w) || !errors.Is(res[i].Err, ErrRefused) || res[i].Outcome != Refused {
				t.Errorf("%s: %s is %s: %v, want %v", what, res[i].Target, res[i].Outcome, res[i].Err, w)
			}
		}
	}
}

// TestGenerations plays the case to get right: A syncs B and C; A is unplugged; B is booted, updated, syncs C; A comes
// back, with or without changes of its own.
func TestGenerations(t *testing.T) {
	g := geometries[2]
	a, b, c := newMember(t, "a", guidA, g), newMember(t, "b", guidB, g), newMember(t, "c", guidC, g)
	tree := func(v string) map[string]string {
		return map[string]string{"loader/loader.conf": "default " + v + "\n", "EFI/BOOT/BOOTX64.EFI": fixtures.Program("boot loader"), "EFI/Linux/" + v: v}
	}
	expect := func(what string, res []Result, err error, want ...any) {
		t.Helper()
		expectResults(t, what, res, err, want...)
	}
	a.replace(t, tree("v1"))
	res, err := a.sync(t, Options{}, b, c)
	expect("first", res, err, Synced, Synced)
	for _, m := range []*aMember{a, b, c} {
		if st := m.state(t); st == nil || st.Generation != 1 || st.Lineage != a.state(t).Lineage {
			t.Fatalf("%s: %+v", m.name, st)
		}
		fsck(t, m.dev)
	}
	res, err = a.sync(t, Options{}, b, c)
	expect("again", res, err, InSync, InSync)
	for _, r := range res {
		if r.Summary.BytesToWrite != 0 {
			t.Error("written to:", r.Summary.BytesToWrite)
		}
	}
	a.replace(t, tree("v2"))
	res, err = a.sync(t, Options{}, b, c)
	expect("update", res, err, Synced, Synced)
	if st := c.state(t); st.Generation != 2 || len(st.Past) != 1 {
		t.Fatalf("%+v", st)
	}
	b.replace(t, tree("v3"))
	res, err = b.sync(t, Options{}, c)
	expect("from b", res, err, Synced)
	keep := maps.Clone(tree("v2"))
	res, err = a.sync(t, Options{}, b, c)
	expect("stale", res, err, ErrStaleSource, ErrStaleSource)
	keep["EFI/Linux/own"] = "made while alone"
	a.replace(t, keep)
	res, err = a.sync(t, Options{}, b, c)
	expect("diverged", res, err, ErrDiverged, ErrDiverged)
	res, err = b.sync(t, Options{}, a, c)
	expect("back", res, err, ErrDiverged, InSync)
	res, err = b.sync(t, Options{Force: true}, a, c)
	expect("forced", res, err, Synced, InSync)
	if x, y, z := a.state(t), b.state(t), c.state(t); !x.same(y) || !y.same(z) {
		t.Errorf("%+v %+v %+v", x, y, z)
	}
	res, err = a.sync(t, Options{}, b, c)
	expect("in the end", res, err, InSync, InSync)
	judge(t, a.dev, g.fats, tree("v3"))
}

// TestCompareLines holds every cell of the table at compareLines.
func TestCompareLines(t *testing.T) {
	lineage := "6f0c5c7e-1111-4000-8000-00000000000a"
	d := func(s string) Digest { return Digest([]byte(strings.Repeat(s, 32))) }
	// at is a state with generations 1… of the given trees, the last one being its own.
	at := func(trees string) *State {
		st := &State{Version: 1, Lineage: lineage, Scope: Scope{Anchors: []string{"LOADER"}}}
		for i := range trees {
			if i > 0 {
				st.Past = append([]Past{st.past()}, st.Past...)
			}
			st.Generation, st.Digest = uint64(i+1), d(trees[i:i+1])
		}
		return st
	}
	other := at("ab")
	other.Lineage = "6f0c5c7e-2222-4000-8000-00000000000a"
	cut := at(strings.Repeat("ab", 40))
	cut.Past = cut.Past[:maxHistory]
	for _, c := range []struct {
		name     string
		src, dst *State
		want     [4]Verdict // neither, source, target, both changed
	}{
		{"same base", at("ab"), at("ab"), [4]Verdict{FastForward, FastForward, StaleSource, Diverged}},
		{"source on", at("abc"), at("ab"), [4]Verdict{FastForward, FastForward, Diverged, Diverged}},
		{"source on, from the first", at("abc"), at("a"), [4]Verdict{FastForward, FastForward, Diverged, Diverged}},
		{"target on", at("ab"), at("abc"), [4]Verdict{StaleSource, Diverged, StaleSource, Diverged}},
		{"target on, from the first", at("a"), at("abc"), [4]Verdict{StaleSource, Diverged, StaleSource, Diverged}},
		{"two branches, one number", at("abx"), at("aby"), [4]Verdict{Diverged, Diverged, Diverged, Diverged}},
		{"two branches, other numbers", at("abx"), at("aby+"), [4]Verdict{Diverged, Diverged, Diverged, Diverged}},
		{"two branches of one content", at("abx+"), at("abyx"), [4]Verdict{Diverged, Diverged, Diverged, Diverged}},
		{"a tree comes back", at("aba"), at("a"), [4]Verdict{FastForward, FastForward, Diverged, Diverged}},
		{"a tree came back on the target", at("a"), at("aba"), [4]Verdict{StaleSource, Diverged, StaleSource, Diverged}},
		{"other lineage", at("ab"), other, [4]Verdict{Diverged, Diverged, Diverged, Diverged}},
		{"new target", at("ab"), nil, [4]Verdict{FirstSync, FirstSync, FirstSync, FirstSync}},
		{"source in no set", nil, at("ab"), [4]Verdict{Diverged, Diverged, Diverged, Diverged}},
		{"both new", nil, nil, [4]Verdict{FirstSync, FirstSync, FirstSync, FirstSync}},
		{"too long away", cut, at("a"), [4]Verdict{Diverged, Diverged, Diverged, Diverged}},
		{"not too long away", cut, at(strings.Repeat("ab", 8)), [4]Verdict{FastForward, FastForward, Diverged, Diverged}},
		{"the source was too long away", at("a"), cut, [4]Verdict{Diverged, Diverged, Diverged, Diverged}},
	} {
		for i, want := range c.want {
			src, dst := lineageSide{state: c.src, changed: i&1 > 0, digest: d("S")}, lineageSide{state: c.dst, changed: i&2 > 0, digest: d("T")}
			have, why := compareLines(src, dst)
			if have != want {
				t.Errorf("%s, source changed %v, target changed %v: %s, want %s", c.name, src.changed, dst.changed, have, want)
			}
			err := have.refuse(why, "a", "b")
			if goes := have == FastForward || have == FirstSync; goes != (err == nil) || (why == "") != goes {
				t.Errorf("%s: %q, %v", have, why, err)
			}
			var hint *Hint
			if err != nil && (!errors.Is(err, ErrRefused) || errors.Is(err, ErrStaleSource) != (have == StaleSource) || !errors.As(err, &hint)) {
				t.Errorf("%s: %v", have, err)
			}
		}
	}
	// Copied by hand: what was done to the target is what the source did later, or the other way round.
	for _, c := range []struct {
		src, dst string
		like     string // the side that was changed
		want     Verdict
	}{{"abc", "a", "c", FastForward}, {"abcd", "a", "c", FastForward}, {"abcd", "abc", "a", Diverged}, {"abcd", "ab", "b", Diverged}} {
		if have, _ := compareLines(lineageSide{state: at(c.src)}, lineageSide{at(c.dst), true, d(c.like)}); have != c.want {
			t.Errorf("target at %s like %s, source %s: %s", c.dst, c.like, c.src, have)
		}
		back := map[Verdict]Verdict{FastForward: StaleSource, Diverged: Diverged}[c.want]
		if have, _ := compareLines(lineageSide{at(c.dst), true, d(c.like)}, lineageSide{state: at(c.src)}); have != back {
			t.Errorf("source at %s like %s, target %s: %s", c.dst, c.like, c.src, have)
		}
	}
	// Where branches meet, both are known.
	m := at("abx").merge(at("abyz"))
	if m.Generation != 4 || len(m.Past) != 4 || !m.knows(Past{3, d("x")}) || !m.knows(Past{3, d("y")}) || !m.knows(Past{1, d("a")}) {
		t.Errorf("%+v", m)
	}
	if m := cut.merge(at("xyz")); len(m.Past) != maxHistory || m.Past[0] != cut.Past[0] {
		t.Errorf("%d generations remembered", len(m.Past))
	}
}

// TestState reads state files that are as they should be, and others.
func TestState(t *testing.T) {
	sel, err := testSelect.resolve(newMemSource(withFiles(nil)))
	if err != nil {
		t.Fatal(err)
	}
	var st *State
	for i := range 3 * maxHistory {
		st = st.next(Digest{byte(i), byte(i >> 8)}, sel)
		st.Source, st.Own, st.Updated = noFingerprint, noFingerprint, 1<<40
	}
	if st.Generation != 3*maxHistory || len(st.Past) != maxHistory || st.Past[0].Generation != 3*maxHistory-1 {
		t.Fatalf("%+v", st)
	}
	text := st.Bytes()
	again, err := ParseState(text)
	if err != nil || string(again.Bytes()) != string(text) || !again.same(st) || len(text) > maxState/2 {
		t.Fatal(err, len(text))
	}
	// A later minor version may add fields; they are lost when this one writes.
	later := strings.Replace(string(text), `"espmirror": 1,`, `"espmirror": 1, "colour": {"of": ["hats"]},`, 1)
	if again, err := ParseState([]byte(later)); err != nil || !again.same(st) {
		t.Error(err)
	}
	newer := strings.Replace(string(text), `"espmirror": 1,`, `"espmirror": 2,`, 1)
	if _, err := ParseState([]byte(newer)); !errors.Is(err, ErrState) || !errors.Is(err, errNewerState) {
		t.Error(err)
	}
	good := string((&State{Version: 1, Lineage: st.Lineage, Generation: 1, Scope: Scope{Anchors: []string{"LOADER"}}}).Bytes())
	if _, err := ParseState([]byte(good)); err != nil {
		t.Fatal(err)
	}
	for name, bad := range map[string]string{
		"empty": "", "zeros": strings.Repeat("\x00", 700), "cut off": good[:len(good)/2], "twice": good + good, "array": "[]", "null": "null",
		"no version": strings.Replace(good, `"espmirror": 1`, `"espmirror": 0`, 1), "negative": strings.Replace(good, `"espmirror": 1`, `"espmirror": -1`, 1),
		"lineage": strings.Replace(good, st.Lineage, "one", 1), "generation 0": strings.Replace(good, `"generation": 1`, `"generation": 0`, 1),
		"generation -1": strings.Replace(good, `"generation": 1`, `"generation": -1`, 1), "digest": strings.Replace(good, strings.Repeat("0", 64), strings.Repeat("0", 62), 1),
		"longer digest": strings.Replace(good, strings.Repeat("0", 64), strings.Repeat("0", 66), 1), "letters": strings.Replace(good, strings.Repeat("0", 64), strings.Repeat("g", 64), 1),
		"no tree": strings.Replace(good, `"LOADER"`, ``, 1),
	} {
		if bad == good {
			t.Errorf("%s: nothing was changed", name)
		}
		if st, err := ParseState([]byte(bad)); !errors.Is(err, ErrState) || errors.Is(err, errNewerState) {
			t.Errorf("%s: %+v, %v", name, st, err)
		}
	}
	// The selections of the state and of its parts are what a run could have selected.
	for _, sel := range []struct {
		part Scope
		ok   bool
	}{
		{Scope{Anchors: []string{"LOADER", "EFI/LINUX", "0123", "VMLINUZ"}}, true},
		{Scope{Anchors: []string{"EFI/MICROSOFT", "$RECYCLE.BIN", "X.TMP"}}, true}, // an entry refers to it, and it is left out
		{Scope{Anchors: []string{"EFI/MICROSOFT/BOOT"}, Named: []string{"EFI/MICROSOFT/BOOT"}}, true},
		{Scope{Anchors: []string{"EFI/MICROSOFT/BOOT", "LOADER"}, Named: []string{"EFI/MICROSOFT", "LOADER"}}, true},
		{Scope{Anchors: []string{"EFI", "LOADER"}, Named: []string{""}, Exclude: []string{"*.BAK", "*.BAK", "EFI/[A-C]*"}}, true},
		{Scope{Anchors: []string{"EFI/MICROSOFT/BOOT"}}, false},
		{Scope{Anchors: []string{"EFI/ESPMIRROR/JOURNAL"}}, false},
		{Scope{Anchors: []string{"EFI/ESPMIRROR/JOURNAL"}, Named: []string{"EFI/ESPMIRROR/JOURNAL"}}, false},
		{Scope{Anchors: []string{"EFI/FOO/FW/X"}}, false},
		{Scope{Anchors: []string{"A/GRUBENV/B"}}, false},
		{Scope{Anchors: []string{"LOADER", "LOADER"}}, false},
		{Scope{Anchors: []string{"EFI", "LOADER", "EFI/LINUX"}}, false},
		{Scope{Anchors: []string{""}, Named: []string{""}}, false},
		{Scope{Anchors: []string{"/"}}, false},
		{Scope{Anchors: []string{"\\"}}, false},
		{Scope{Anchors: []string{"/EFI"}}, false},
		{Scope{Anchors: []string{"EFI/"}}, false},
		{Scope{Anchors: []string{"EFI//LINUX"}}, false},
		{Scope{Anchors: []string{"EFI\\LINUX"}}, false},
		{Scope{Anchors: []string{"EFI/../LOADER"}}, false},
		{Scope{Anchors: []string{"."}}, false},
		{Scope{Anchors: []string{"efi"}}, false},
		{Scope{Anchors: []string{"A" + strings.Repeat("/A", maxParts)}}, false},
		{Scope{Anchors: []string{"EFI"}, Named: []string{"LOADER/RANDOM-SEED"}}, false},
		{Scope{Anchors: []string{"EFI"}, Named: []string{"EFI/"}}, false},
		{Scope{Anchors: []string{"EFI"}, Exclude: []string{""}}, false},
		{Scope{Anchors: []string{"EFI"}, Exclude: []string{"["}}, false},
		{Scope{Anchors: []string{"EFI"}, Exclude: []string{"/EFI"}}, false},
		{Scope{Anchors: []string{"EFI"}, Exclude: slices.Repeat([]string{"A"}, maxPaths+1)}, false},
	} {
		p := sel.part
		s := &State{Version: 1, Lineage: st.Lineage, Generation: maxGeneration, Scope: p}
		if _, err := ParseState(s.Bytes()); (err == nil) != sel.ok || err != nil && !errors.Is(err, ErrState) {
			t.Errorf("%+v: %v", p, err)
		}
		s = &State{Version: 1, Lineage: st.Lineage, Generation: 1, Scope: Scope{Anchors: []string{"LOADER"}}, Rest: []Part{{Scope: p}}}
		if _, err := ParseState(s.Bytes()); (err == nil) != sel.ok || err != nil && !errors.Is(err, ErrState) {
			t.Errorf("a part that is %+v: %v", p, err)
		}
	}
	over := &State{Version: 1, Lineage: st.Lineage, Generation: maxGeneration + 1, Scope: Scope{Anchors: []string{"LOADER"}}}
	if _, err := ParseState(over.Bytes()); !errors.Is(err, ErrState) {
		t.Error(err)
	}
	// What a hostile file selects does not open what belongs to one ESP alone.
	hostile := &State{Version: 1, Lineage: st.Lineage, Generation: 1, Scope: Scope{Anchors: []string{"EFI/ESPMIRROR"}, Named: []string{"EFI/ESPMIRROR"}}}
	if _, err := hostile.selection(); !errors.Is(err, ErrState) {
		t.Error(err)
	}
}

// FuzzState wants what ParseState takes to survive being written and read.
func FuzzState(f *testing.F) {
	st := (*State)(nil).next(Digest{1}, &selection{anchors: []string{"loader", "EFI/Linux"}, byName: map[string]bool{"LOADER": true}, excludes: []string{"*.BAK"}})
	f.Add(st.Bytes())
	f.Add(st.next(Digest{2}, &selection{anchors: []string{"a"}}).Bytes())
	f.Add([]byte(`{"espmirror":1}`))
	f.Add([]byte("null"))
	f.Fuzz(func(t *testing.T, text []byte) {
		st, err := ParseState(text)
		if err != nil {
			if !errors.Is(err, ErrState) {
				t.Fatal(err)
			}
			return
		}
		again, err := ParseState(st.Bytes())
		if err != nil || !again.same(st) || len(st.Past) > maxHistory {
			t.Fatal(err)
		}
		if sel, err := st.selection(); err == nil {
			if _, err := treeDigest(newMemSource(withFiles(nil)), sel, nil, nil, func(*Item) ([32]byte, error) { return [32]byte{}, nil }); err != nil {
				t.Fatal(err)
			}
		}
		compareLines(lineageSide{state: st}, lineageSide{again, true, st.Digest})
	})
}

func lineageTree(v string) map[string]string {
	return withFiles(map[string]string{"EFI/Linux/" + v + ".efi": fixtures.Program(v)})
}

// TestMemberWithoutState meets members that lost their memory, were replaced, or belong to somebody else.
func TestMemberWithoutState(t *testing.T) {
	begin := func(t *testing.T) (a, b, c *aMember) {
		ms := newMembers(t, geometries[0], nil, "a", "b", "c")
		ms[0].write(t, lineageTree("v1"))
		res, err := ms[0].sync(t, Options{}, ms[1], ms[2])
		expectResults(t, "first", res, err, Synced, Synced)
		return ms[0], ms[1], ms[2]
	}
	put := func(t *testing.T, m *aMember, text string) {
		t.Helper()
		if _, err := Put(t.Context(), m.target(), []File{{Path: StatePath, Content: []byte(text)}}, Options{}); err != nil {
			t.Fatal(err)
		}
	}
	t.Run("a blank one in its place", func(t *testing.T) {
		a, _, c := begin(t)
		a.write(t, lineageTree("v2"))
		b := newMember(t, "b", guidB, geometries[2])
		res, err := a.sync(t, Options{}, b, c)
		expectResults(t, "sync", res, err, Synced, Synced)
		if res[0].Lineage.Verdict != FirstSync || !b.state(t).same(c.state(t)) || b.state(t).Generation != 2 {
			t.Errorf("%+v, %+v", res[0].Lineage, b.state(t))
		}
		// Filled by hand, it is noted all the same.
		x := newMember(t, "x", guidB, geometries[2])
		x.write(t, lineageTree("v2"))
		res, err = a.sync(t, Options{}, x)
		expectResults(t, "by hand", res, err, Synced)
		if len(res[0].Summary.Changes) > 0 || x.state(t) == nil || !x.state(t).same(a.state(t)) {
			t.Errorf("%+v, %+v", res[0].Summary.Changes, x.state(t))
		}
		x.write(t, lineageTree("own"))
		res, err = a.sync(t, Options{}, x)
		expectResults(t, "changed", res, err, ErrStaleSource)
	})
	t.Run("the source has none", func(t *testing.T) {
		a, b, c := begin(t)
		c.write(t, lineageTree("own"))
		a.edit(t, map[string]*string{StatePath: nil})
		res, err := a.sync(t, Options{}, c)
		expectResults(t, "alone", res, err, ErrDiverged)
		// b has the same tree, and knows what a was.
		a.edit(t, map[string]*string{StatePath: nil})
		res, err = a.sync(t, Options{}, b, c)
		expectResults(t, "with an equal one", res, err, InSync, ErrStaleSource)
		if !a.state(t).same(b.state(t)) {
			t.Errorf("%+v, %+v", a.state(t), b.state(t))
		}
		// Also where that one was changed by hand, as the source was.
		a.write(t, lineageTree("hand"))
		b.write(t, lineageTree("hand"))
		a.edit(t, map[string]*string{StatePath: nil})
		was := b.state(t)
		res, err = a.sync(t, Options{}, b)
		expectResults(t, "both by hand", res, err, Synced)
		if st := b.state(t); st.Lineage != was.Lineage || st.Generation != was.Generation+1 || !st.same(a.state(t)) {
			t.Errorf("%+v", st)
		}
	})
	for name, text := range map[string]string{"zeros": strings.Repeat("\x00", 300), "half": `{"espmirror": 1, "lin`} {
		t.Run("damaged on the target, "+name, func(t *testing.T) {
			a, b, c := begin(t)
			put(t, b, text)
			res, err := a.sync(t, Options{}, b, c)
			expectResults(t, "equal", res, err, Synced, InSync)
			if !b.state(t).same(a.state(t)) {
				t.Errorf("%+v", b.state(t))
			}
			put(t, b, text)
			a.write(t, lineageTree("v2"))
			res, err = a.sync(t, Options{}, b, c)
			expectResults(t, "other", res, err, ErrDiverged, Synced)
			judge(t, b.dev, 2, lineageTree("v1"))
			res, err = a.sync(t, Options{Force: true}, b)
			expectResults(t, "forced", res, err, Synced)
			if !res[0].Lineage.Forced || !b.state(t).same(a.state(t)) {
				t.Errorf("%+v", res[0].Lineage)
			}
		})
		t.Run("damaged on the source, "+name, func(t *testing.T) {
			a, b, c := begin(t)
			put(t, a, text)
			blank := newMember(t, "blank", "", geometries[0])
			res, err := a.verify(t, Options{}, b)
			expectResults(t, "verify", res, err, InSync)
			a.write(t, lineageTree("v2"))
			res, err = a.sync(t, Options{}, b, c, blank)
			expectResults(t, "other", res, err, ErrDiverged, ErrDiverged, ErrDiverged)
			a.write(t, lineageTree("v1"))
			c.write(t, lineageTree("own"))
			res, err = a.sync(t, Options{}, b, c, blank)
			expectResults(t, "equal", res, err, InSync, ErrStaleSource, Synced)
			if !a.state(t).same(b.state(t)) || a.state(t).Generation != 1 {
				t.Errorf("%+v", a.state(t))
			}
			put(t, a, text)
			a.write(t, lineageTree("v3"))
			res, err = a.sync(t, Options{Force: true}, b, c)
			expectResults(t, "forced", res, err, Synced, Synced)
			judge(t, c.dev, 2, lineageTree("v3"))
			if !a.state(t).same(c.state(t)) {
				t.Errorf("%+v", a.state(t))
			}
		})
	}
	t.Run("of a newer version", func(t *testing.T) {
		a, b, c := begin(t)
		newer := strings.Replace(string(b.state(t).Bytes()), `"espmirror": 1`, `"espmirror": 2`, 1)
		put(t, b, newer)
		res, err := a.sync(t, Options{}, b, c)
		expectResults(t, "equal", res, err, InSync, InSync)
		a.write(t, lineageTree("v2"))
		res, err = a.sync(t, Options{}, b, c)
		expectResults(t, "other", res, err, ErrDiverged, Synced)
		if have, err := readFiles(b.dev, 0); err != nil || have[StatePath] != newer {
			t.Error("it was written over", err)
		}
		if _, err := b.sync(t, Options{}, a, c); !errors.Is(err, ErrState) || !errors.Is(err, ErrRefused) {
			t.Error(err)
		}
		if have, err := readFiles(b.dev, 0); err != nil || have[StatePath] != newer {
			t.Error("it was written over", err)
		}
	})
	t.Run("another lineage", func(t *testing.T) {
		a, b, _ := begin(t)
		x, _, y := begin(t)
		x.write(t, lineageTree("x"))
		res, err := x.sync(t, Options{}, a, b)
		expectResults(t, "other", res, err, ErrDiverged, ErrDiverged)
		res, err = x.sync(t, Options{Force: true}, a)
		expectResults(t, "forced", res, err, Synced)
		if !a.state(t).same(x.state(t)) {
			t.Errorf("%+v", a.state(t))
		}
		// Equal trees of two sets: they become one.
		res, err = y.sync(t, Options{}, b)
		expectResults(t, "equal", res, err, Synced)
		if b.state(t).Lineage != y.state(t).Lineage {
			t.Errorf("%+v", b.state(t))
		}
	})
	t.Run("a foreign source", func(t *testing.T) {
		_, b, c := begin(t)
		src := newMemSource(lineageTree("foreign"))
		o := Options{Selection: testSelect}
		for _, force := range []bool{false, true} {
			o.Force = force
			res, err := Sync(t.Context(), src, []*Target{b.target(), newMember(t, "blank", "", geometries[0]).target()}, o)
			if force {
				expectResults(t, "forced", res, err, Synced, Synced)
			} else {
				expectResults(t, "foreign", res, err, ErrDiverged, Synced)
				judge(t, b.dev, 2, lineageTree("v1"))
			}
		}
		// It counted no generation: to the set, b was changed.
		res, err := c.sync(t, Options{}, b)
		expectResults(t, "the set", res, err, ErrStaleSource)
		// A template that is equal may be written to a member.
		res, err = Sync(t.Context(), src, []*Target{b.target()}, Options{Selection: testSelect})
		expectResults(t, "equal", res, err, InSync)
	})
}

// TestSaveFails stops the run before anything is committed anywhere.
func TestSaveFails(t *testing.T) {
	ms := newMembers(t, geometries[0], nil, "a", "b", "c")
	a, b := ms[0], ms[1]
	a.write(t, lineageTree("v1"))
	failing := Options{Save: func(context.Context, []byte) error { return errInjected }}
	res, err := a.sync(t, failing, b)
	if !errors.Is(err, errInjected) || res[0].Outcome != Failed || len(b.files(t)) > 0 || b.state(t) != nil {
		t.Fatal(res, err)
	}
	res, err = a.sync(t, Options{}, b)
	expectResults(t, "first", res, err, Synced)
	a.write(t, lineageTree("v2"))
	before := string(b.dev.Bytes())
	if _, err = a.sync(t, failing, b); !errors.Is(err, errInjected) || string(b.dev.Bytes()) != before {
		t.Fatal("the target was written to", err)
	}
	if _, err = a.sync(t, Options{DryRun: true, Save: failing.Save}, b); err != nil || string(b.dev.Bytes()) != before {
		t.Fatal(err)
	}
}

// TestCutAroundSave cuts the power at every operation around the moment when the source notes the generation, and then
// boots each of the two.
func TestCutAroundSave(t *testing.T) {
	ms := newMembers(t, geometries[0], nil, "a", "b")
	ms[0].write(t, lineageTree("v1"))
	res, err := ms[0].sync(t, Options{}, ms[1])
	expectResults(t, "first", res, err, Synced)
	ms[0].write(t, lineageTree("v2"))
	seen := map[string]int{}
	for k := 0; ; k++ {
		pw := &power{left: k}
		rng := rand.New(rand.NewPCG(uint64(k), 1))
		var now []*aMember
		for _, m := range ms {
			c := &aMember{name: m.name, guid: m.guid, dev: blockdev.NewMem([]byte(string(m.dev.Bytes())), geometries[0].sector)}
			c.via = newPowered(c.dev, pw)
			now = append(now, c)
		}
		a, b := now[0], now[1]
		a.sync(t, Options{}, b)
		for _, m := range now {
			m.via.(*powered).settle(rng)
			m.via = nil
			if _, err := Recover(t.Context(), m.target(), RecoverOptions{}); err != nil {
				t.Fatal(k, err)
			}
		}
		noted, synced := a.state(t).Generation == 2, b.state(t).Generation == 2
		_, is := b.files(t)["EFI/Linux/v2.efi"]
		if synced != is || synced && !noted {
			t.Fatalf("cut %d: noted %v, synced %v, new tree %v", k, noted, synced, is)
		}
		seen[fmt.Sprint(noted, synced)]++
		// Whoever is booted now, nothing is lost.
		want := []any{Synced, ErrStaleSource}
		if synced {
			want = []any{InSync, InSync}
		}
		image := []byte(string(a.dev.Bytes()))
		res, err := b.sync(t, Options{}, a)
		expectResults(t, fmt.Sprint("cut ", k, ", b"), res, err, want[1])
		copy(a.dev.Bytes(), image)
		res, err = a.sync(t, Options{}, b)
		expectResults(t, fmt.Sprint("cut ", k, ", a"), res, err, want[0])
		judge(t, b.dev, 2, lineageTree("v2"))
		if !a.state(t).same(b.state(t)) || a.state(t).Generation != 2 {
			t.Errorf("cut %d: %+v", k, a.state(t))
		}
		if !pw.cut {
			break
		}
	}
	if seen["false false"] == 0 || seen["true false"] == 0 || seen["true true"] == 0 {
		t.Error(seen)
	}
}

// TestEntryTokenGoes removes what loader entries once referred to from the targets to which it was brought.
func TestEntryTokenGoes(t *testing.T) {
	ms := newMembers(t, geometries[0], nil, "a", "b", "c")
	a, b, c := ms[0], ms[1], ms[2]
	o := Options{Selection: defaultSelection}
	with := withFiles(map[string]string{"loader/entries/1.conf": "linux /" + token + "/1/linux\n", token + "/1/linux": "kernel"})
	without := withFiles(map[string]string{"EFI/Linux/u.efi": fixtures.Program("u")})
	a.write(t, with)
	res, err := a.sync(t, o, b)
	expectResults(t, "first", res, err, Synced)
	// c is no member yet, and has a directory of that name for itself.
	c.edit(t, map[string]*string{token + "/own/linux": ptr("its own kernel"), "EFI/Linux/old.efi": ptr(fixtures.Program("old"))})
	a.write(t, without)
	res, err = a.sync(t, o, b, c)
	expectResults(t, "dropped", res, err, Synced, Synced)
	judge(t, b.dev, 2, without)
	kept := maps.Clone(without)
	kept[token+"/own/linux"] = "its own kernel"
	judge(t, c.dev, 2, kept)
	for range 2 {
		res, err = a.sync(t, o, b, c)
		expectResults(t, "again", res, err, InSync, InSync)
	}
	// The entry goes first, and the directory it named stays for a while: it stays in the selection.
	b2 := newMember(t, "b2", guidB, geometries[0])
	half := maps.Clone(with)
	delete(half, "loader/entries/1.conf")
	a.write(t, with)
	res, err = a.sync(t, o, b2)
	expectResults(t, "back", res, err, Synced)
	a.write(t, half)
	res, err = a.sync(t, o, b2)
	expectResults(t, "half", res, err, Synced)
	a.write(t, without)
	res, err = a.sync(t, o, b2)
	expectResults(t, "whole", res, err, Synced)
	judge(t, b2.dev, 2, without)
	// What was changed in it since is not thrown away.
	a.write(t, with)
	res, err = a.sync(t, o, b2)
	expectResults(t, "once more", res, err, Synced)
	b2.edit(t, map[string]*string{token + "/2/linux": ptr("made on b")})
	a.write(t, without)
	res, err = a.sync(t, o, b2)
	expectResults(t, "changed there", res, err, ErrDiverged)
}

// TestOtherSelection changes the selection from run to run. What one run does not look at is not forgotten by it.
func TestOtherSelection(t *testing.T) {
	narrow := Options{Selection: Selection{Select: []string{"loader"}}}
	begin := func(t *testing.T) (a, b *aMember) {
		ms := newMembers(t, geometries[0], nil, "a", "b")
		ms[0].write(t, lineageTree("v1"))
		res, err := ms[0].sync(t, Options{}, ms[1])
		expectResults(t, "first", res, err, Synced)
		return ms[0], ms[1]
	}
	loader := func(t *testing.T, m *aMember, text string) {
		m.edit(t, map[string]*string{"loader/loader.conf": ptr(text)})
	}
	uki := func(t *testing.T, m *aMember, text string) {
		m.edit(t, map[string]*string{"EFI/Linux/v1.efi": ptr(text)})
	}
	run := func(t *testing.T, what string, from *aMember, o Options, to *aMember, want any) {
		t.Helper()
		res, err := from.sync(t, o, to)
		if refused, ok := want.(error); ok {
			expectResults(t, what, res, err, refused)
		} else if err != nil || res[0].Err != nil {
			t.Errorf("%s: %v, %v", what, err, res[0].Err)
		}
	}
	t.Run("nothing happened in between", func(t *testing.T) {
		a, b := begin(t)
		loader(t, a, "timeout 4\n")
		run(t, "narrow", a, narrow, b, Synced)
		run(t, "wide", a, Options{}, b, InSync)
		uki(t, a, fixtures.Program("two"))
		run(t, "narrow", a, narrow, b, InSync)
		run(t, "wide", a, Options{}, b, Synced)
		for _, m := range []*aMember{a, b} {
			if st := m.state(t); len(st.Rest) > 0 || !st.same(a.state(t)) {
				t.Errorf("%+v", st)
			}
		}
		judge(t, b.dev, 2, map[string]string{"loader/loader.conf": "timeout 4\n", "EFI/BOOT/BOOTX64.EFI": fixtures.Program("boot"), "EFI/Linux/v1.efi": fixtures.Program("two")})
		run(t, "back", b, Options{}, a, InSync)
	})
	t.Run("a newer target that looks the same", func(t *testing.T) {
		a, b := begin(t)
		c := newMember(t, "c", guidC, geometries[0])
		uki(t, b, fixtures.Program("newer"))
		run(t, "b goes on", b, Options{}, c, Synced)
		run(t, "narrow", a, narrow, b, InSync)
		run(t, "wide", a, Options{}, b, ErrDiverged)
		if b.files(t)["EFI/Linux/v1.efi"] != fixtures.Program("newer") {
			t.Error("lost")
		}
	})
	t.Run("the target was changed before", func(t *testing.T) {
		a, b := begin(t)
		uki(t, b, fixtures.Program("by b"))
		run(t, "narrow", a, narrow, b, InSync)
		run(t, "wide", a, Options{}, b, ErrDiverged)
	})
	t.Run("the target was changed afterwards", func(t *testing.T) {
		a, b := begin(t)
		loader(t, a, "timeout 4\n")
		run(t, "narrow", a, narrow, b, Synced)
		uki(t, b, fixtures.Program("by b"))
		loader(t, a, "timeout 5\n")
		run(t, "narrow", a, narrow, b, Synced) // that is not its business
		run(t, "wide", a, Options{}, b, ErrDiverged)
		run(t, "something else", a, Options{Selection: Selection{Select: []string{"EFI/BOOT"}}}, b, InSync)
		run(t, "wide", a, Options{}, b, ErrDiverged)
		run(t, "forced", a, Options{Force: true}, b, Synced)
		run(t, "wide", a, Options{}, b, InSync)
	})
	t.Run("the source was changed before", func(t *testing.T) {
		a, b := begin(t)
		loader(t, a, "timeout 4\n")
		uki(t, a, fixtures.Program("by a"))
		run(t, "narrow", a, narrow, b, Synced)
		run(t, "wide, from b", b, Options{}, a, ErrDiverged)
		run(t, "wide", a, Options{}, b, Synced)
		run(t, "wide, from b", b, Options{}, a, InSync)
	})
	t.Run("the source was changed afterwards", func(t *testing.T) {
		a, b := begin(t)
		loader(t, a, "timeout 4\n")
		run(t, "narrow", a, narrow, b, Synced)
		uki(t, a, fixtures.Program("by a"))
		run(t, "wide, from b", b, Options{}, a, ErrDiverged)
		run(t, "wide", a, Options{}, b, Synced)
	})
	t.Run("an exclusion comes and goes", func(t *testing.T) {
		a, b := begin(t)
		but := Options{Selection: testSelect}
		but.Selection.Exclude = []string{"v1*"}
		loader(t, a, "timeout 4\n")
		run(t, "without", a, but, b, Synced)
		uki(t, b, fixtures.Program("by b"))
		run(t, "with", a, Options{}, b, ErrDiverged)
	})
	t.Run("everything", func(t *testing.T) {
		a, b := begin(t)
		all := Options{Selection: Selection{Select: []string{"/"}}}
		run(t, "everything", a, all, b, Synced)
		run(t, "again", a, all, b, InSync)
		b.edit(t, map[string]*string{"new in the root/x": ptr("by b")})
		for _, fp := range []bool{false, true} {
			all.Fingerprint = fp
			run(t, "a new directory in the root", a, all, b, ErrStaleSource)
		}
		run(t, "from b", b, all, a, Synced)
		if a.files(t)["new in the root/x"] != "by b" {
			t.Error("it did not come")
		}
	})
}
