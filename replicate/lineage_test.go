package replicate

import (
	"context"
	"errors"
	"log/slog"
	"maps"
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

// want is a node of a tree that edit changes.
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
		return map[string]string{"loader/loader.conf": "default " + v + "\n", "EFI/BOOT/BOOTX64.EFI": "MZ boot loader", "EFI/Linux/" + v: v}
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
