package replicate

import (
	"context"
	"errors"
	"maps"
	"testing"
	"time"

	"espmirror/blockdev"
)

// aMember is a volume of a replica set in these tests.
type aMember struct {
	name, guid string
	dev        *blockdev.Mem
}

func newMember(t *testing.T, name, guid string, g geometry) *aMember {
	return &aMember{name, guid, newVolume(t, g)}
}

func (m *aMember) target() *Target { return &Target{Name: m.name, Dev: m.dev, PartGUID: m.guid} }

// replace makes the files the only ones of a member outside of our own directory, as somebody does who mounts it.
func (m *aMember) replace(t *testing.T, files map[string]string) {
	t.Helper()
	src := newMemSource(files)
	res, err := Sync(context.Background(), src, []*Target{m.target()}, Options{Selection: testSelect, Force: true})
	if err != nil || res[0].Err != nil {
		t.Fatal(err, res[0].Err)
	}
}

// sync replicates from one member to others, as the command does.
func (m *aMember) sync(t *testing.T, o Options, to ...*aMember) ([]Result, error) {
	t.Helper()
	vol, _ := scanned(t, m.dev)
	src, err := OpenVolumeSource(m.name, vol)
	if err != nil {
		t.Fatal(err)
	}
	o.Member, o.SourceGUID, o.Now = true, m.guid, time.Unix(1_700_000_000, 0)
	if o.Selection.Select == nil {
		o.Selection = testSelect
	}
	o.Save = func(ctx context.Context, state []byte) error {
		_, err := Put(ctx, m.target(), []File{{Path: StatePath, Content: state}}, Options{})
		return err
	}
	var ts []*Target
	for _, x := range to {
		ts = append(ts, x.target())
	}
	return Sync(context.Background(), src, ts, o)
}

func (m *aMember) state(t *testing.T) *State {
	t.Helper()
	vol, _ := scanned(t, m.dev)
	src, err := OpenVolumeSource(m.name, vol)
	if err != nil {
		t.Fatal(err)
	}
	st, err := ReadState(src)
	if err != nil {
		t.Fatal(err)
	}
	return st
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
		if err != nil {
			t.Fatal(what, err)
		}
		for i, w := range want {
			switch w := w.(type) {
			case Outcome:
				if res[i].Outcome != w || res[i].Err != nil {
					t.Errorf("%s: %s is %s: %v", what, res[i].Target, res[i].Outcome, res[i].Err)
				}
			case error:
				if !errors.Is(res[i].Err, w) || !errors.Is(res[i].Err, ErrRefused) || res[i].Outcome != Refused {
					t.Errorf("%s: %s is %s: %v, want %v", what, res[i].Target, res[i].Outcome, res[i].Err, w)
				}
			}
		}
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
