package replicate

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"espmirror/blockdev"
	"espmirror/fixtures"
)

// Each test here demonstrates a finding of the review: it fails while the finding stands.

func earlyPaths(res Result) []string {
	var out []string
	for _, c := range res.Summary.Early {
		out = append(out, c.Path)
	}
	return out
}

func attackLoad(t *testing.T, m *blockdev.Mem, tree map[string]string) {
	t.Helper()
	if res := syncMem(t, newMemSource(tree), m, Options{Selection: stageSelect, Force: true}); res.Err != nil {
		t.Fatal(res.Err)
	}
}

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
	if res, err = a.sync(t, Options{Force: true}, b, c); err != nil {
		t.Errorf("what is on b stops the run for c: %v", err)
	}
}

// A state file on the primary whose anchor is the root.
func TestStateRootAnchorPanics(t *testing.T) {
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
	st := &State{Version: 1, Lineage: guidA, Generation: 1, Anchors: []string{"A0000"}}
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
	named := (&Part{Anchors: []string{"EFI/HP/X"}, Named: []string{"EFI/HP/X"}}).with(Part{Anchors: []string{"Y"}, Named: []string{"Y"}})
	if err := named.check(); err != nil || len(named.Named) != 1 {
		t.Errorf("%+v %v", named, err)
	}
	p := (&Part{Anchors: []string{"EFI/B", "X"}, Exclude: []string{"1", "2"}}).with(Part{Anchors: []string{"EFI", "EFI.X"}, Exclude: []string{"2", "3"}})
	if !slices.Equal(p.Anchors, []string{"EFI", "EFI.X", "X"}) || !slices.Equal(p.Exclude, []string{"2"}) {
		t.Errorf("%+v", p)
	}
}

// The words of an XBOOTLDR partition come from the ESP's set file, which its fingerprint does not cover.
func TestAttackFingerprintWords(t *testing.T) {
	ms := newMembers(t, geometries[2], nil, "a", "b")
	a, b := ms[0], ms[1]
	a.write(t, withFiles(map[string]string{"loader/entries/x.conf": "title x\nlinux /EFI/BOOT/BOOTX64.EFI\noptions root=aaaa\n"}))
	members := "member " + guidA + "\nmember " + guidB + "\n"
	o := Options{Set: parsed(t, members)}
	res, err := a.sync(t, o, b)
	expectResults(t, "first", res, err, Synced)
	o.Set = parsed(t, members+"replace root "+guidA+" aaaa\nreplace root "+guidB+" bbbb\n")
	o.Fingerprint = true
	res, err = a.sync(t, o, b)
	if err != nil {
		t.Fatal(err)
	}
	if got := b.files(t)["loader/entries/x.conf"]; !strings.Contains(got, "bbbb") {
		t.Errorf("%s, and the entry still says %q", res[0].Outcome, got)
	}
}

// A word that stands often in an entry, and a long text for it.
func TestAttackWordsExplode(t *testing.T) {
	set := func(n int) string {
		return "member " + guidA + "\nmember " + guidB + "\nreplace n " + guidA + " a\nreplace n " + guidB + " " + strings.Repeat("b", n) + "\n"
	}
	if _, err := ParseSet("s", []byte(set(maxText+1))); !errors.Is(err, ErrSet) || !strings.Contains(err.Error(), "line 4: ") {
		t.Errorf("a text of more than %d bytes: %v", maxText, err)
	}
	ms := newMembers(t, geometries[2], nil, "a", "b")
	a, b := ms[0], ms[1]
	a.write(t, withFiles(map[string]string{
		"loader/entries/x.conf": "title x\nlinux /EFI/BOOT/BOOTX64.EFI\noptions " + strings.Repeat("a ", 32_000),
		"loader/esp-sync":       set(maxText),
	}))
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	res, err := a.sync(t, Options{}, b)
	runtime.ReadMemStats(&after)
	expectResults(t, "too long", res, err, ErrRefused)
	if !strings.Contains(res[0].Err.Error(), "more than 65536 bytes") {
		t.Error(res[0].Err)
	}
	if used := after.TotalAlloc - before.TotalAlloc; used > 20<<20 {
		t.Errorf("an entry of 64 KB and a text of 4 KB took %d MB: %v", used>>20, res)
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

// Many entries that only the source has.
func TestAttackManyEntries(t *testing.T) {
	m := newVolume(t, geometries[4])
	tree := func(v string, n int) map[string]string {
		out := withFiles(nil)
		for i := range n {
			out[fmt.Sprintf("loader/entries/%s-%d.conf", v, i)] = "linux /EFI/BOOT/BOOTX64.EFI\n"
		}
		return out
	}
	took := map[int]time.Duration{}
	for _, n := range []int{50, 100, 200} {
		syncMem(t, newMemSource(tree("old", n)), m, Options{Selection: testSelect})
		start := time.Now()
		if res := syncMem(t, newMemSource(tree("new", n)), m, Options{Selection: testSelect, DryRun: true}); res.Err != nil {
			t.Fatal(res.Err)
		}
		took[n] = time.Since(start)
	}
	if took[200] > 20*took[50] {
		t.Errorf("the time grows with the third power: %v", took)
	}
}

// The first transaction must not take a boot loader away, which an entry names besides, and which is to be replaced.
func TestAttackStagedTakesBootLoader(t *testing.T) {
	old := kernels("5.1", "5.2", "5.3")
	old["loader/entries/again.conf"] = "title chain\nversion 0\nefi /EFI/BOOT/BOOTX64.EFI\n"
	m := stageVolume(t, old)
	now := kernels("5.2", "5.3", "5.4")
	now["EFI/BOOT/BOOTX64.EFI"] = fixtures.AsProgram("another boot loader")
	res := syncMem(t, newMemSource(now), m, Options{Selection: stageSelect, DryRun: true})
	if res.Err != nil {
		t.Fatal(res.Err)
	}
	if early := earlyPaths(res); slices.Contains(early, "EFI/BOOT/BOOTX64.EFI") {
		t.Error("between the transactions there is no boot loader:", early)
	}
}

// attackUKI is an image that systemd-boot lists, with as many bytes as its text.
func attackUKI(version string, size int) string {
	le := binary.LittleEndian
	const lfanew, opt = 0x80, 0x70
	b := make([]byte, 0x400)
	copy(b, "MZ")
	le.PutUint32(b[0x3C:], lfanew)
	copy(b[lfanew:], "PE\x00\x00")
	le.PutUint16(b[lfanew+4:], 0x8664)
	le.PutUint16(b[lfanew+6:], 4)
	le.PutUint16(b[lfanew+0x14:], opt)
	o := b[lfanew+0x18:]
	le.PutUint16(o, 0x20B)
	le.PutUint32(o[0x3C:], 0x400)
	le.PutUint16(o[0x44:], 10)
	for i, s := range [][2]string{
		{".osrel", "ID=tok\nPRETTY_NAME=\"Linux " + version + "\"\nVERSION_ID=" + version + "\n"},
		{".linux", strings.Repeat(version, size/len(version))},
		{".profile", "ID=main\n"}, {".profile", "ID=rescue\n"},
	} {
		h := o[opt+40*i:]
		copy(h[:8], s[0])
		for _, at := range []int{8, 16} {
			le.PutUint32(h[at:], uint32(len(s[1])))
		}
		le.PutUint32(h[20:], uint32(len(b)))
		b = append(b, s[1]...)
		o = b[lfanew+0x18:]
	}
	return string(b)
}

// A UKI of several profiles was booted by one of them: LoaderEntrySelected is "5.1.efi@rescue".
func TestAttackStagedBootedProfile(t *testing.T) {
	tree := func(versions ...string) map[string]string {
		t := map[string]string{"loader/loader.conf": "timeout 3\n", "EFI/BOOT/BOOTX64.EFI": fixtures.AsProgram("boot loader")}
		for _, v := range versions {
			t["EFI/Linux/"+v+".efi"] = attackUKI(v, 438_000)
		}
		return t
	}
	for booted, goes := range map[string]bool{"": true, "5.1.efi": false, "5.1.efi@rescue": false} {
		m := stageVolume(t, tree("5.1", "5.2", "5.3"))
		res := syncMem(t, newMemSource(tree("5.2", "5.3", "5.4")), m, Options{Selection: stageSelect, DryRun: true, BootedEntry: booted})
		if early := earlyPaths(res); slices.Contains(early, "EFI/Linux/5.1.efi") != goes {
			t.Errorf("booted %q: first goes %q (%v)", booted, early, res.Err)
		}
	}
}

// A kept type 1 entry names a UKI, which is in the menu by itself too.
func TestAttackStagedUKIOfEntry(t *testing.T) {
	tree := func(versions ...string) map[string]string {
		t := map[string]string{"loader/loader.conf": "timeout 3\n", "EFI/BOOT/BOOTX64.EFI": fixtures.AsProgram("boot loader")}
		for _, v := range versions {
			t["EFI/Linux/"+v+".efi"] = fixtures.AsProgram(strings.Repeat(v, 440_000/len(v)))
		}
		return t
	}
	old := tree("5.1", "5.2", "5.3")
	old["loader/entries/mine.conf"] = "title mine\nsort-key a\nuki /EFI/Linux/5.1.efi\n"
	m := stageVolume(t, old)
	res := syncMem(t, newMemSource(tree("5.2", "5.3", "5.4")), m, Options{Selection: stageSelect, DryRun: true, BootedEntry: "mine.conf"})
	if early := earlyPaths(res); slices.Contains(early, "EFI/Linux/5.1.efi") && !slices.Contains(early, "loader/entries/mine.conf") {
		t.Error("the booted entry stays, and what it starts goes first:", early)
	}
}

// What is kept does not start: its kernel is missing, or it is for another machine.
func TestAttackStagedKeepsDeadEntry(t *testing.T) {
	for name, dead := range map[string]map[string]string{
		"kernel missing":       {"loader/entries/tok-9.conf": "title dead\nversion 9\nlinux /tok/9/linux\n"},
		"another architecture": {"loader/entries/tok-9.conf": "title arm\narchitecture aa64\nversion 9\nlinux /tok/9/arm\n", "tok/9/arm": "arm"},
	} {
		t.Run(name, func(t *testing.T) {
			m := stageVolume(t, kernels("5.1", "5.2", "5.3"))
			changes := map[string]*string{}
			for p, c := range dead {
				changes[p] = &c
			}
			(&aMember{name: "m", guid: guidB, dev: m}).edit(t, changes)
			res := syncMem(t, newMemSource(kernels("6.1")), m, Options{Selection: stageSelect, DryRun: true})
			left := 3
			for _, p := range earlyPaths(res) {
				if strings.HasPrefix(p, "loader/entries/tok-5") {
					left--
				}
			}
			t.Log(earlyPaths(res), res.Err)
			if left == 0 {
				t.Errorf("after the first transaction nothing starts: %q goes first (%v)", earlyPaths(res), res.Err)
			}
		})
	}
}

// loader.conf lies on the ESP, and its default is an entry on the XBOOTLDR partition.
func TestAttackStagedDefaultOnXBOOTLDR(t *testing.T) {
	boot := stageVolume(t, kernels("5.1", "5.2", "5.3"))
	esp := newVolume(t, geometries[2])
	conf := map[string]string{"loader/loader.conf": "default tok-5.1.conf\n", "EFI/BOOT/BOOTX64.EFI": fixtures.AsProgram("boot loader")}
	attackLoad(t, esp, conf)
	o := Options{Selection: stageSelect, DryRun: true}
	res, err := SyncAll(context.Background(), []Job{
		{newMemSource(kernels("5.2", "5.3", "5.4")), []*Target{{Name: "x", Dev: boot, PartGUID: guidA, Pair: "p"}}, o},
		{newMemSource(conf), []*Target{{Name: "e", Dev: esp, PartGUID: guidB, Pair: "p"}}, o},
	})
	if err != nil {
		t.Fatal(err)
	}
	if early := earlyPaths(res[0][0]); slices.Contains(early, "loader/entries/tok-5.1.conf") {
		t.Error("the default entry goes first:", early)
	}
}

// A partner is refused in the plan, when the other one has its journal already.
func TestAttackRefusedPartnerWritten(t *testing.T) {
	boot := stageVolume(t, kernels("5.1", "5.2", "5.3"))
	esp := newVolume(t, geometries[2]) // no journal yet
	conf := map[string]string{"loader/loader.conf": "timeout 3\n", "EFI/BOOT/BOOTX64.EFI": fixtures.AsProgram("boot loader")}
	before := bytes.Clone(esp.Bytes())
	o := Options{Selection: stageSelect}
	res, err := SyncAll(context.Background(), []Job{
		{newMemSource(kernels("6.1", "6.2", "6.3", "6.4")), []*Target{{Name: "x", Dev: boot, PartGUID: guidA, Pair: "p"}}, o},
		{newMemSource(conf), []*Target{{Name: "e", Dev: esp, PartGUID: guidB, Pair: "p"}}, o},
	})
	if err != nil {
		t.Fatal(err)
	}
	if res[1][0].Outcome == Refused && !bytes.Equal(before, esp.Bytes()) {
		t.Errorf("refused, and written to: %v", res[1][0].Err)
	}
}

// A member is booted between the two transactions of a staged run, and replicates what it has.
func TestAttackInterimAsSource(t *testing.T) {
	a, b, c := newMember(t, "a", guidA, geometries[2]), &aMember{name: "b", guid: guidB, dev: stageVolume(t, kernels("5.1", "5.2", "5.3"))}, newMember(t, "c", guidC, geometries[2])
	attackLoad(t, a.dev, kernels("5.1", "5.2", "5.3"))
	o := Options{Selection: stageSelect}
	res, err := a.sync(t, o, b, c)
	expectResults(t, "first", res, err, Synced, Synced)
	attackLoad(t, a.dev, kernels("5.2", "5.3", "5.4"))
	whole := bytes.Clone(b.dev.Bytes())
	for n := 0; n < 400; n++ {
		copy(b.dev.Bytes(), whole)
		left := n
		b.via = &stopping{b.dev, &left}
		if res, err = a.sync(t, o, b); err == nil && res[0].Err == nil {
			t.Fatal("never between")
		}
		b.via = nil
		if _, err := Recover(context.Background(), b.target(), RecoverOptions{}); err != nil {
			t.Fatal(err)
		}
		if st := b.state(t); st != nil && st.Interim != nil && b.files(t)["loader/entries/tok-5.1.conf"] == "" {
			break
		}
	}
	before := [3][]byte{bytes.Clone(a.dev.Bytes()), bytes.Clone(b.dev.Bytes()), bytes.Clone(c.dev.Bytes())}
	res, err = b.sync(t, o, c)
	var hint *Hint
	if !errors.Is(err, ErrSource) || !errors.Is(err, ErrRefused) || !errors.As(err, &hint) || !strings.Contains(hint.Text, "better primary") {
		t.Errorf("a source that was left between two transactions: %v", err)
	}
	if len(res) != 1 || res[0].Outcome != Refused || c.files(t)["loader/entries/tok-5.1.conf"] == "" || !bytes.Equal(b.dev.Bytes(), before[1]) || !bytes.Equal(c.dev.Bytes(), before[2]) {
		t.Errorf("refused, and something was written: %+v", res)
	}
	res, err = a.sync(t, o, b, c)
	expectResults(t, "from the whole one", res, err, Synced, Synced)
	if st := b.state(t); st.Interim != nil || !st.same(a.state(t)) {
		t.Errorf("b is at %+v, and a at %+v", st, a.state(t))
	}

	for i, m := range []*aMember{a, b, c} {
		copy(m.dev.Bytes(), before[i])
	}
	o.Force = true
	res, err = b.sync(t, o, c)
	expectResults(t, "forced", res, err, Synced)
	if c.files(t)["loader/entries/tok-5.1.conf"] != "" || b.state(t).Interim != nil {
		t.Error("forced, and the tree did not go to c as a generation")
	}
}

// A target's own esp-sync with long names: what is hashed of its entries explodes.
func TestAttackCanonicalExplodes(t *testing.T) {
	text := []byte("options " + strings.Repeat("a ", maxEntryFile/2))
	set := func(n int) (*Set, error) {
		return ParseSet("s", []byte("member "+guidA+"\nreplace "+strings.Repeat("n", n)+" "+guidA+" a\n"))
	}
	if _, err := set(maxName + 1); !errors.Is(err, ErrSet) || !strings.Contains(err.Error(), "line 2: ") {
		t.Errorf("a name of more than %d bytes: %v", maxName, err)
	}
	s, err := set(maxName)
	if err != nil {
		t.Fatal(err)
	}
	if n := len(Canonical(text, s.Texts(guidA))); n > 4<<20 {
		t.Errorf("%d bytes become %d MB", len(text), n>>20)
	}
}

// What one target has by hand lets a stale source overwrite another target, which is refused when it is alone.
func TestAttackStaleByDetour(t *testing.T) {
	ms := newMembers(t, geometries[2], nil, "a", "b", "c")
	a, b, c := ms[0], ms[1], ms[2]
	tree := func(v string) map[string]string { return withFiles(map[string]string{"EFI/Linux/" + v: v}) }
	a.write(t, tree("v1"))
	res, err := a.sync(t, Options{}, b, c)
	expectResults(t, "first", res, err, Synced, Synced)
	b.replace(t, tree("v2"))
	res, err = b.sync(t, Options{}, c) // a is away
	expectResults(t, "second", res, err, Synced)
	b.replace(t, tree("v1")) // by a run that was forced, from a directory, for b alone
	before := bytes.Clone(c.dev.Bytes())
	res, err = a.sync(t, Options{}, c)
	expectResults(t, "alone", res, err, ErrStaleSource)
	copy(c.dev.Bytes(), before)
	res, err = a.sync(t, Options{}, b, c)
	if err != nil {
		t.Fatal(err)
	}
	if c.files(t)["EFI/Linux/v2"] != "v2" {
		t.Errorf("c, at generation 2, was overwritten by a, at generation 1: %s %+v", res[1].Outcome, res[1].Lineage)
	}
	expectResults(t, "with b", res, err, InSync, ErrStaleSource)
	if ga, gb := a.state(t).Generation, b.state(t).Generation; ga != 1 || gb != 2 {
		t.Errorf("a is at generation %d now, and b at %d", ga, gb)
	}
	// Nor does what a has noted change that the next time.
	res, err = a.sync(t, Options{}, b, c)
	expectResults(t, "again", res, err, InSync, ErrStaleSource)

	// A source that has lost its state, and one that is of another branch.
	before = bytes.Clone(a.dev.Bytes())
	a.edit(t, map[string]*string{"EFI/espmirror/state": nil})
	res, err = a.sync(t, Options{}, b, c)
	expectResults(t, "without a state", res, err, InSync, ErrDiverged)
	if a.state(t) != nil {
		t.Error("a began a lineage of its own")
	}
	copy(a.dev.Bytes(), before)
	d := newMember(t, "d", "6f0c5c7e-0000-4000-8000-00000000000d", geometries[2])
	a.replace(t, tree("v3"))
	res, err = a.sync(t, Options{}, d)
	expectResults(t, "branch", res, err, Synced)
	b.replace(t, tree("v3"))
	res, err = a.sync(t, Options{}, b, c)
	expectResults(t, "from the branch", res, err, InSync, ErrDiverged)

	// It is for a person to say which one wins.
	res, err = a.sync(t, Options{Force: true}, b, c)
	expectResults(t, "forced", res, err, Synced, Synced)
	for _, m := range ms {
		if !m.state(t).same(a.state(t)) {
			t.Errorf("%s is at %+v", m.name, m.state(t))
		}
	}
}

// Many texts of one member, and entries without words: the time to look for them.
func TestAttackManyTexts(t *testing.T) {
	file := "member " + guidA + "\n"
	for i := 0; len(file) < MaxSetSize-80; i++ {
		file += fmt.Sprintf("replace n%d %s t%04d\n", i, guidA, i)
	}
	set, err := ParseSet("s", []byte(file))
	if err != nil {
		t.Fatal(err)
	}
	for _, word := range []string{" ", "a ", "t0001x ", "t"} {
		text := bytes.Repeat([]byte(word), maxEntryFile/len(word))
		start := time.Now()
		Canonical(text, set.Texts(guidA))
		if d := time.Since(start); d > 100*time.Millisecond {
			t.Errorf("one entry of %q takes %v", word, d)
		}
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
				st.Rest = []Part{{Anchors: some(), Named: some(), Exclude: some()}}
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

// Two entries whose names differ by their counters alone: the bad and the decremented count are copied.
func TestAttackRivalCounters(t *testing.T) {
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

// An entry of the target names its kernel by the 8.3 name, as firmware allows: the kernel goes before the entry.
func TestAttackAliasOrder(t *testing.T) {
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

// The first transaction takes away every entry that goes, where one would make room enough.
func TestAttackStagedTakesAll(t *testing.T) {
	m := stageVolume(t, kernels("5.1", "5.2", "5.3"))
	res := syncMem(t, newMemSource(kernels("6.1")), m, Options{Selection: stageSelect, DryRun: true})
	if early := earlyPaths(res); len(early) > 2 {
		t.Errorf("one kernel has to go for one kernel, and first goes %q (%v)", early, res.Err)
	}
}
