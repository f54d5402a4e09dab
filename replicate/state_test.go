package replicate

import (
	"bytes"
	"context"
	"errors"
	"espmirror/fixtures"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"time"
)

// A user excludes a directory above what an earlier run selected: the state brings the anchors back.
func TestStateAgainstExclude(t *testing.T) {
	ms := newMembers(t, geometries[2], nil, "a", "b")
	a, b := ms[0], ms[1]
	a.write(t, withFiles(map[string]string{"EFI/Linux/x": "old", "EFI/foo/k": "k", "loader/entries/k.conf": "linux /EFI/foo/k\n"}))
	o := Options{Selection: defaultSelection}
	res, err := a.sync(t, o, b)
	expectResults(t, "first", res, err, Synced)
	a.edit(t, map[string]*string{"EFI/Linux/x": ptr("new")})
	o.Selection = Selection{Exclude: []string{"nothing", "EFI"}}
	res, err = a.sync(t, o, b)
	if err != nil {
		t.Fatal(err)
	}
	if got := b.files(t)["EFI/Linux/x"]; got != "old" {
		t.Errorf("EFI is excluded, and EFI/Linux/x was overwritten: %q (%s %v)", got, res[0].Outcome, res[0].Err)
	}
}

// The same for what the source has no more: it is deleted on the target below an excluded directory.
func TestGoneAgainstExclude(t *testing.T) {
	ms := newMembers(t, geometries[2], nil, "a", "b")
	a, b := ms[0], ms[1]
	a.write(t, withFiles(map[string]string{"EFI/foo/k": "k", "loader/entries/k.conf": "linux /EFI/foo/k\n"}))
	res, err := a.sync(t, Options{Selection: defaultSelection}, b)
	expectResults(t, "first", res, err, Synced)
	a.write(t, withFiles(nil))
	res, err = a.sync(t, Options{Selection: Selection{Exclude: []string{"nothing", "EFI"}}}, b)
	if err != nil {
		t.Fatal(err)
	}
	if got := b.files(t)["EFI/foo/k"]; got != "k" {
		t.Errorf("EFI is excluded, and EFI/foo/k was deleted: %q (%s %v)", got, res[0].Outcome, res[0].Err)
	}
}

// EFI/espmirror of a member is deleted, by the user or by fsck. It takes part in a set by its own esp-sync, and what it has
// may be newer than what the source knows.
func TestStateDeletedOnNewer(t *testing.T) {
	set := "member " + guidA + "\nmember " + guidB + "\nmember " + guidC + "\n"
	tree := func(v string) map[string]string {
		return withFiles(map[string]string{"EFI/Linux/" + v: v, "loader/esp-sync": set})
	}
	forget := map[string]*string{"EFI/espmirror/state": nil, "EFI/espmirror/journal": nil}
	begin := func(t *testing.T) (a, b, c *aMember) {
		ms := newMembers(t, geometries[2], nil, "a", "b", "c")
		ms[0].write(t, tree("v1"))
		res, err := ms[0].sync(t, Options{}, ms[1], ms[2])
		expectResults(t, "first", res, err, Synced, Synced)
		return ms[0], ms[1], ms[2]
	}
	t.Run("newer", func(t *testing.T) {
		a, b, c := begin(t)
		b.replace(t, tree("v2"))
		res, err := b.sync(t, Options{}, c) // a is away
		expectResults(t, "second", res, err, Synced)
		b.edit(t, forget)
		before := bytes.Clone(b.dev.Bytes())
		res, err = a.sync(t, Options{}, b, c)
		expectResults(t, "from the older one", res, err, ErrDiverged, ErrStaleSource)
		if !strings.Contains(res[0].Err.Error(), "memory is lost") || !bytes.Equal(before, b.dev.Bytes()) {
			t.Error(res[0].Err)
		}
		res, err = a.sync(t, Options{Force: true}, b)
		expectResults(t, "forced", res, err, Synced)
		if !res[0].Lineage.Forced || b.files(t)["EFI/Linux/v1"] != "v1" {
			t.Errorf("%+v", res[0].Lineage)
		}
	})
	t.Run("as it was", func(t *testing.T) {
		a, b, _ := begin(t)
		b.edit(t, forget)
		a.replace(t, tree("v2"))
		res, err := a.sync(t, Options{}, b)
		expectResults(t, "from the newer one", res, err, Synced)
		if res[0].Lineage.Verdict != FastForward || !b.state(t).same(a.state(t)) {
			t.Errorf("%+v", res[0].Lineage)
		}
	})
	t.Run("as it was long ago", func(t *testing.T) {
		a, b, c := begin(t)
		for _, v := range []string{"v2", "v3"} {
			a.replace(t, tree(v))
			res, err := a.sync(t, Options{}, c)
			expectResults(t, v, res, err, Synced)
		}
		b.edit(t, forget)
		res, err := a.sync(t, Options{}, b)
		expectResults(t, "from the newer one", res, err, Synced)
	})
	t.Run("alike", func(t *testing.T) {
		a, b, _ := begin(t)
		b.edit(t, forget)
		res, err := a.sync(t, Options{}, b)
		expectResults(t, "again", res, err, Synced)
		if res[0].Lineage.Verdict != Equal || !b.state(t).same(a.state(t)) {
			t.Errorf("%+v", res[0].Lineage)
		}
	})
	t.Run("by hand", func(t *testing.T) {
		a, b, _ := begin(t)
		forgotten := map[string]*string{"loader/loader.conf": ptr("timeout 77\n")}
		for p := range forget {
			forgotten[p] = nil
		}
		b.edit(t, forgotten)
		res, err := a.sync(t, Options{}, b)
		expectResults(t, "edited", res, err, ErrDiverged)
	})
	t.Run("another part", func(t *testing.T) {
		a, b, _ := begin(t)
		a.edit(t, map[string]*string{"d/f": ptr("of a")})
		b.edit(t, map[string]*string{"d/f": ptr("of a")})
		o := Options{Selection: Selection{Select: []string{"d"}}}
		res, err := a.sync(t, o, b)
		expectResults(t, "d alone", res, err, Synced)
		forgotten := map[string]*string{"EFI/Linux/v1": ptr("newer")} // which is of the rest now
		for p := range forget {
			forgotten[p] = nil
		}
		b.edit(t, forgotten)
		res, err = a.sync(t, Options{}, b)
		expectResults(t, "the rest was edited", res, err, ErrDiverged)
	})
	for name, files := range map[string]map[string]string{
		"no set file":          withFiles(map[string]string{"EFI/Linux/own": "x"}),
		"a set without itself": withFiles(map[string]string{"EFI/Linux/own": "x", "loader/esp-sync": "member " + guidA + "\nmember " + guidC + "\n"}),
		"no set that is read":  withFiles(map[string]string{"EFI/Linux/own": "x", "loader/esp-sync": "exlude x\n"}),
	} {
		t.Run(name, func(t *testing.T) {
			ms := newMembers(t, geometries[2], nil, "a", "b")
			ms[0].write(t, tree("v1"))
			ms[1].write(t, files)
			res, err := ms[0].sync(t, Options{}, ms[1])
			expectResults(t, "added", res, err, Synced)
			if res[0].Lineage.Verdict != FirstSync {
				t.Errorf("%+v", res[0].Lineage)
			}
		})
	}
}

// A state that only one target holds stops the run for all of them.
func TestStateOneTargetStopsAll(t *testing.T) {
	ms := newMembers(t, geometries[2], nil, "a", "b", "c")
	a, b, c := ms[0], ms[1], ms[2]
	a.write(t, withFiles(nil))
	res, err := a.sync(t, Options{}, b, c)
	expectResults(t, "first", res, err, Synced, Synced)
	st := b.state(t)
	st.Generation, st.Named = 9, []string{"EFI/ESPMIRROR"}
	putMem(t, b.dev, Options{}, File{Path: StatePath, Content: st.Bytes()})
	a.edit(t, map[string]*string{"own.txt": ptr("x")})
	c.edit(t, map[string]*string{"loader/loader.conf": nil})
	c.write(t, withFiles(nil))
	if res, err = a.sync(t, Options{Force: true}, b, c); err != nil || res[1].Outcome != InSync {
		t.Errorf("what is on b stops the run for c: %+v, %v", res, err)
	}
}

// A state file on the primary whose anchor is the root.
func TestStateRootAnchor(t *testing.T) {
	ms := newMembers(t, geometries[2], nil, "a", "b")
	a, b := ms[0], ms[1]
	a.write(t, withFiles(nil))
	res, err := a.sync(t, Options{Selection: defaultSelection}, b)
	expectResults(t, "first", res, err, Synced)
	st := a.state(t)
	st.Anchors = append(st.Anchors, "/")
	st.Named = nil
	putMem(t, a.dev, Options{}, File{Path: StatePath, Content: st.Bytes()})
	a.edit(t, map[string]*string{"loader/loader.conf": ptr("timeout 5\n")})
	defer func() {
		if p := recover(); p != nil {
			t.Errorf("panic: %v", p)
		}
	}()
	res, err = a.sync(t, Options{Selection: defaultSelection}, b)
	t.Log(res, err)
}

// A state file on the primary whose anchors lie in what belongs to one ESP alone.
func TestStateAnchorsOfOwn(t *testing.T) {
	ms := newMembers(t, geometries[2], nil, "a", "b")
	a, b := ms[0], ms[1]
	a.write(t, withFiles(map[string]string{"EFI/Microsoft/Boot/BCD": "of a"}))
	b.write(t, map[string]string{"EFI/Microsoft/Boot/BCD": "of b"})
	o := Options{Selection: defaultSelection}
	res, err := a.sync(t, o, b)
	expectResults(t, "first", res, err, Synced)
	st := a.state(t)
	st.Anchors = append(st.Anchors, "EFI/MICROSOFT/BOOT")
	putMem(t, a.dev, Options{}, File{Path: StatePath, Content: st.Bytes()})
	o.Force = true
	res, err = a.sync(t, o, b)
	if got := b.files(t)["EFI/Microsoft/Boot/BCD"]; got != "of b" {
		t.Errorf("the other vendor's directory was overwritten: %q %v %v", got, res, err)
	}
}

// And on a target: there they name what "went".
func TestStateGoneOfOwn(t *testing.T) {
	ms := newMembers(t, geometries[2], nil, "a", "b")
	a, b := ms[0], ms[1]
	a.write(t, withFiles(nil))
	b.write(t, map[string]string{"EFI/Microsoft/Boot/BCD": "of b"})
	o := Options{Selection: defaultSelection}
	res, err := a.sync(t, o, b)
	expectResults(t, "first", res, err, Synced)
	st := b.state(t)
	st.Anchors = append(st.Anchors, "EFI/MICROSOFT/BOOT", "EFI/ESPMIRROR/JOURNAL")
	putMem(t, b.dev, Options{}, File{Path: StatePath, Content: st.Bytes()})
	o.Force = true
	res, err = a.sync(t, o, b)
	if got := b.files(t)["EFI/Microsoft/Boot/BCD"]; got != "of b" {
		t.Errorf("the other vendor's directory was deleted: %q %v %v", got, res, err)
	}
}

// The highest generation that is read, on one member, and one more than that.
func TestStateGenerationOverflow(t *testing.T) {
	for _, n := range []uint64{1<<64 - 1, maxGeneration} {
		for who := range 2 {
			ms := newMembers(t, geometries[2], nil, "a", "b")
			a, b := ms[0], ms[1]
			a.write(t, withFiles(nil))
			res, err := a.sync(t, Options{}, b)
			expectResults(t, "first", res, err, Synced)
			st := ms[who].state(t)
			st.Generation = n
			putMem(t, ms[who].dev, Options{}, File{Path: StatePath, Content: st.Bytes()})
			a.edit(t, map[string]*string{"loader/loader.conf": ptr("timeout 5\n")})
			before := [][]byte{bytes.Clone(a.dev.Bytes()), bytes.Clone(b.dev.Bytes())}
			res, err = a.sync(t, Options{Force: true}, b)
			if n > maxGeneration {
				expectResults(t, "nobody has that generation", res, err, Synced)
				for _, m := range ms {
					if m.state(t).Generation > 2 {
						t.Errorf("%s has %+v", m.name, m.state(t))
					}
				}
				continue
			}
			if err == nil {
				err = res[0].Err
			}
			if !errors.Is(err, ErrRefused) || !strings.Contains(err.Error(), "cannot note generation") {
				t.Errorf("after generation %d of %s: %+v %v", n, ms[who].name, res, err)
			}
			for i, m := range ms {
				if !bytes.Equal(before[i], m.dev.Bytes()) {
					t.Errorf("refused, and %s was written to", m.name)
				}
			}
		}
	}
}

// A selection that makes the state longer than what is read of it.
func TestStateTooLong(t *testing.T) {
	for _, dry := range []bool{true, false} {
		ms := newMembers(t, geometries[2], nil, "a", "b")
		a, b := ms[0], ms[1]
		a.write(t, withFiles(nil))
		o := Options{Selection: testSelect, DryRun: dry}
		o.Selection.Select = slices.Clone(testSelect.Select)
		for i := range 400 { // what esp-sync of 40 KB says
			o.Selection.Select = append(o.Selection.Select, fmt.Sprintf("%0100d", i))
		}
		before := [][]byte{bytes.Clone(a.dev.Bytes()), bytes.Clone(b.dev.Bytes())}
		res, err := a.sync(t, o, b)
		if err == nil {
			err = res[0].Err
		}
		if !errors.Is(err, ErrRefused) || !strings.Contains(err.Error(), "bytes, at most 65536 are read") {
			t.Errorf("%+v %v", res, err)
		}
		for i, m := range ms {
			if !bytes.Equal(before[i], m.dev.Bytes()) {
				t.Errorf("refused, and %s was written to", m.name)
			}
		}
	}
}

// A part of the tree that so many later selections left out that it is forgotten: whether it was changed nobody knows.
func TestStateForgottenPart(t *testing.T) {
	ms := newMembers(t, geometries[2], nil, "a", "b")
	a, b := ms[0], ms[1]
	files := withFiles(nil)
	only := func(i int) Options { return Options{Selection: Selection{Select: []string{fmt.Sprintf("d%d", i)}}} }
	for i := range maxRest + 4 {
		files[fmt.Sprintf("d%d/f", i)] = "old"
	}
	a.write(t, files)
	for i := range maxRest + 3 {
		res, err := a.sync(t, only(i), b)
		expectResults(t, fmt.Sprint(i), res, err, Synced)
	}
	b.edit(t, map[string]*string{"d0/f": ptr("newer, made on b")})
	before := bytes.Clone(b.dev.Bytes())
	res, err := a.sync(t, only(0), b)
	expectResults(t, "forgotten", res, err, ErrDiverged)
	if !bytes.Equal(before, b.dev.Bytes()) {
		t.Error("refused, and written to")
	}
	// What was not forgotten goes on, and the rest stays forgotten while it does.
	res, err = a.sync(t, only(maxRest+2), b)
	expectResults(t, "the last one", res, err, InSync)
	res, err = a.sync(t, only(5), b)
	expectResults(t, "remembered", res, err, Synced)
	res, err = a.sync(t, only(maxRest+3), b)
	expectResults(t, "a new one", res, err, Synced)
	if rest := b.state(t).Rest; len(rest) != maxRest+1 || !rest[maxRest].Lost || !slices.Contains(rest[maxRest].Anchors, "D0") {
		t.Errorf("%+v", rest)
	}
	res, err = a.sync(t, only(0), b)
	expectResults(t, "still forgotten", res, err, ErrDiverged)
	o := only(0)
	o.Force = true
	res, err = a.sync(t, o, b)
	expectResults(t, "forced", res, err, Synced)
	if got := b.files(t)["d0/f"]; got != "old" {
		t.Errorf("%q", got)
	}
	if rest := b.state(t).Rest; slices.ContainsFunc(rest, func(p Part) bool { return slices.Contains(p.Anchors, "D0") }) {
		t.Errorf("what was decided is forgotten still: %+v", rest)
	}
}

// What is forgotten comes together in one part, which does not grow for ever.
func TestStateLost(t *testing.T) {
	st := &State{Version: 1, Lineage: guidA, Generation: 1, Scope: Scope{Anchors: []string{"A0000"}}}
	for i := range maxRest + maxLost + 1 {
		sel := &selection{anchors: []string{fmt.Sprintf("a%04d", i+1)}, byName: map[string]bool{}}
		st.Rest = st.left(sel, nil)
		st.Anchors = []string{fmt.Sprintf("A%04d", i+1)}
		if i < maxRest {
			if len(st.Rest) != i+1 || st.Rest[i].Lost {
				t.Fatalf("%d: %+v", i, st.Rest)
			}
			continue
		}
		lost := st.Rest[maxRest]
		want := i - maxRest + 1
		if want > maxLost {
			want = 0 // all
		}
		if len(st.Rest) != maxRest+1 || !lost.Lost || len(lost.Anchors) != want || !lost.concerns(&selection{anchors: []string{"a0000/x"}}) {
			t.Fatalf("%d: %+v", i, st.Rest)
		}
		if lost.concerns(&selection{anchors: []string{fmt.Sprintf("a%04d", i)}}) != (want == 0) {
			t.Fatalf("%d: what is known counts as forgotten", i)
		}
		if again, err := ParseState(st.Bytes()); err != nil || len(again.Rest) != len(st.Rest) {
			t.Fatal(i, err)
		}
	}
	if rest := st.left(&selection{anchors: []string{"A0000"}, byName: map[string]bool{"": true}, excludes: []string{"X"}}, nil); !rest[len(rest)-1].Lost {
		t.Errorf("%+v", rest)
	}
	if rest := st.left(&selection{anchors: []string{"A0000"}, byName: map[string]bool{"": true}}, nil); len(rest) > 0 {
		t.Errorf("all is selected, and left is %+v", rest)
	}
	named := (&Part{Scope: Scope{Anchors: []string{"EFI/HP/X"}, Named: []string{"EFI/HP/X"}}}).with(Part{Scope: Scope{Anchors: []string{"Y"}, Named: []string{"Y"}}})
	if err := named.check(); err != nil || len(named.Named) != 1 {
		t.Errorf("%+v %v", named, err)
	}
	p := (&Part{Scope: Scope{Anchors: []string{"EFI/B", "X"}, Exclude: []string{"1", "2"}}}).with(Part{Scope: Scope{Anchors: []string{"EFI", "EFI.X"}, Exclude: []string{"2", "3"}}})
	if !slices.Equal(p.Anchors, []string{"EFI", "EFI.X", "X"}) || !slices.Equal(p.Exclude, []string{"2"}) {
		t.Errorf("%+v", p)
	}
}

// The same anchor thousands of times in the state of a target: each file is read as often.
func TestStateAnchorsManyTimes(t *testing.T) {
	ms := newMembers(t, geometries[2], nil, "a", "b")
	a, b := ms[0], ms[1]
	a.write(t, withFiles(map[string]string{"EFI/Linux/x": strings.Repeat("a", 300_000)}))
	res, err := a.sync(t, Options{}, b)
	expectResults(t, "first", res, err, Synced)
	st := b.state(t)
	st.Anchors = nil
	for range 1000 { // 6,000 would fit
		st.Anchors = append(st.Anchors, "EFI")
	}
	putMem(t, b.dev, Options{}, File{Path: StatePath, Content: st.Bytes()})
	b.edit(t, map[string]*string{"EFI/Linux/x": ptr(strings.Repeat("b", 300_000))})
	_, _, read := fingerprinted(t, Options{}, a, b)
	if read > 30<<20 {
		t.Errorf("%d MB were read of a volume of 8 MB", read>>20)
	}
}

// Any anchors in the states: no panic, and what is each member's own stays.
func TestStateHostile(t *testing.T) {
	words := []string{"", "/", ".", "..", "EFI", "EFI/LINUX", "EFI/..", "\\", "EFI/ESPMIRROR", "LOADER/RANDOM-SEED", "LOADER", "[", "*", "EFI/MICROSOFT", "GRUB/GRUBENV", "GRUB", "OTHER/X/Y", "LOADER/LOADER.CONF/X", strings.Repeat("A/", 3000)}
	rng := rand.New(rand.NewPCG(1, 2))
	some := func() []string {
		var out []string
		for range rng.IntN(4) {
			out = append(out, words[rng.IntN(len(words))])
		}
		return out
	}
	ms := newMembers(t, geometries[2], nil, "a", "b")
	a, b := ms[0], ms[1]
	own := map[string]string{"EFI/Microsoft/Boot/BCD": "b", "grub/grubenv": "b", "loader/random-seed": strings.Repeat("b", 32)}
	a.write(t, withFiles(map[string]string{"grub/grubenv": "a", "EFI/Microsoft/Boot/BCD": "a", "loader/random-seed": strings.Repeat("a", 32)}))
	b.write(t, own)
	res, err := a.sync(t, Options{Selection: defaultSelection}, b)
	expectResults(t, "first", res, err, Synced)
	sa, sb := bytes.Clone(a.dev.Bytes()), bytes.Clone(b.dev.Bytes())
	seen := map[string]bool{}
	end := time.Now().Add(4 * time.Second)
	n := 0
	for ; time.Now().Before(end) && len(seen) < 8; n++ {
		copy(a.dev.Bytes(), sa)
		copy(b.dev.Bytes(), sb)
		for _, m := range ms {
			if rng.IntN(3) == 0 {
				continue
			}
			st := m.state(t)
			st.Anchors, st.Named, st.Exclude = append(st.Anchors, some()...), nil, nil
			if rng.IntN(3) == 0 {
				st.Named, st.Exclude = some(), some()
			}
			if rng.IntN(2) == 0 {
				st.Rest = []Part{{Scope: Scope{Anchors: some(), Named: some(), Exclude: some()}}}
			}
			putMem(t, m.dev, Options{}, File{Path: StatePath, Content: st.Bytes()})
		}
		func() {
			defer func() {
				if p := recover(); p != nil && !seen[fmt.Sprint(p)] {
					seen[fmt.Sprint(p)] = true
					t.Errorf("panic: %v; a %q b %q", p, a.state(t).Anchors, b.state(t).Anchors)
				}
			}()
			_, _ = a.sync(t, Options{Selection: defaultSelection, Force: rng.IntN(2) == 0}, b)
		}()
		have := b.files(t)
		for p, c := range own {
			if have[p] != c && !seen[p] {
				seen[p] = true
				t.Errorf("%s is now %q; a %q, b %q", p, have[p], a.state(t).Anchors, b.state(t).Anchors)
			}
		}
	}
	t.Log(n, "runs")
}

// TestStrangerToAMember replicates from a source that is in no set: where the target says of itself that it is a member,
// only --force may, also when its state was deleted.
func TestStrangerToAMember(t *testing.T) {
	set := "member " + guidA + "\nmember " + guidB + "\n"
	ms := newMembers(t, geometries[2], nil, "a", "b")
	a, b := ms[0], ms[1]
	a.write(t, withFiles(map[string]string{SetPath: set}))
	res, err := a.sync(t, Options{Set: parsed(t, set)}, b)
	expectResults(t, "first", res, err, Synced)
	b.edit(t, map[string]*string{StatePath: nil, "EFI/espmirror/journal": nil})
	if b.files(t)[SetPath] != set {
		t.Fatal("the target does not name itself")
	}
	stranger := newMemSource(withFiles(map[string]string{"EFI/Linux/other.efi": fixtures.AsProgram("other")}))
	before := bytes.Clone(b.dev.Bytes())
	sync := func(m *aMember, force bool) Result {
		t.Helper()
		res, err := Sync(context.Background(), stranger, []*Target{m.target()}, Options{Selection: Selection{Select: []string{"EFI"}}, Force: force})
		if err != nil {
			t.Fatal(err)
		}
		return res[0]
	}
	r := sync(b, false)
	if !errors.Is(r.Err, ErrDiverged) || r.Outcome != Refused || r.Lineage == nil || r.Lineage.Verdict != Diverged || !bytes.Equal(before, b.dev.Bytes()) {
		t.Errorf("%s, %+v, %v", r.Outcome, r.Lineage, r.Err)
	}
	if r := sync(b, true); r.Outcome != Synced || r.Lineage == nil || !r.Lineage.Forced {
		t.Errorf("forced: %s, %+v, %v", r.Outcome, r.Lineage, r.Err)
	}
	c := newMember(t, "c", guidC, geometries[2])
	if r := sync(c, false); r.Outcome != Synced || r.Lineage != nil {
		t.Errorf("never in a set: %s, %+v, %v", r.Outcome, r.Lineage, r.Err)
	}
}
