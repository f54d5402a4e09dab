package replicate

import (
	"bytes"
	"context"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"espmirror/blockdev"
	"espmirror/fatdriver"
	"espmirror/fixtures"
)

// meddlers are what other systems may do to a volume between a power cut and the recovery. Each gets the image's path.
var meddlers = map[string]func(t *testing.T, img string){
	"adds in the root":     func(t *testing.T, img string) { mcopy(t, img, "foreign.txt", "::/a foreign file.txt") },
	"adds in EFI/Linux":    func(t *testing.T, img string) { mcopy(t, img, "foreign", "::/EFI/Linux/foreign.efi") },
	"adds in EFI":          func(t *testing.T, img string) { mcopy(t, img, "foreign", "::/EFI/foreign.efi") },
	"adds in loader":       func(t *testing.T, img string) { mcopy(t, img, "foreign", "::/loader/entries/foreign.conf") },
	"fills the volume":     func(t *testing.T, img string) { mcopy(t, img, strings.Repeat("f", 200_000), "::/BIG.BIN") },
	"deletes in EFI/Linux": func(t *testing.T, img string) { mtool(t, img, "mdel", "::/EFI/Linux/*") },
	"deletes EFI/BOOT":     func(t *testing.T, img string) { mtool(t, img, "mdeltree", "::/EFI/BOOT") },
	"deletes loader":       func(t *testing.T, img string) { mtool(t, img, "mdeltree", "::/loader") },
	"renames in EFI/Linux": func(t *testing.T, img string) {
		mtool(t, img, "mren", "::/EFI/Linux/linux-6.1+3-0.efi", "linux-6.1b+3-0.efi")
	},
	"renames EFI/Linux":    func(t *testing.T, img string) { mtool(t, img, "mren", "::/EFI/Linux", "Elsewhere") },
	"renames loader":       func(t *testing.T, img string) { mtool(t, img, "mren", "::/loader", "loader.old") },
	"changes an attribute": func(t *testing.T, img string) { mtool(t, img, "mattrib", "+h", "::/loader") },
	"deletes the journal":  func(t *testing.T, img string) { unprotect(t, img); mtool(t, img, "mdel", "::/EFI/espmirror/journal") },
	"deletes the state":    func(t *testing.T, img string) { unprotect(t, img); mtool(t, img, "mdeltree", "::/EFI/espmirror") },
	"moves the journal": func(t *testing.T, img string) {
		unprotect(t, img)
		mtool(t, img, "mmove", "::/EFI/espmirror/journal", "::/journal")
	},
	"copies the journal":    func(t *testing.T, img string) { copyJournal(t, img, 1<<30) },
	"truncates the journal": func(t *testing.T, img string) { copyJournal(t, img, 700) },
	"cuts the journal":      func(t *testing.T, img string) { copyJournal(t, img, 9000) },
	"journal in the root": func(t *testing.T, img string) {
		unprotect(t, img)
		mtool(t, img, "mcopy", "-n", "::/EFI/espmirror/journal", filepath.Join(filepath.Dir(img), "j"))
		mtool(t, img, "mcopy", filepath.Join(filepath.Dir(img), "j"), "::/journal")
	},
	"another label":  func(t *testing.T, img string) { mtool(t, img, "mlabel", "::OTHER") },
	"another serial": func(t *testing.T, img string) { mtool(t, img, "mlabel", "-n", "::") },
}

func mtool(t *testing.T, img, name string, args ...string) {
	t.Helper()
	c := exec.Command(name, append([]string{"-i", img}, args...)...)
	c.Env = append(os.Environ(), "MTOOLS_SKIP_CHECK=1", "MTOOLSRC=/dev/null", "LC_ALL=C.UTF-8")
	if out, err := c.CombinedOutput(); err != nil {
		// What is not there cannot be changed; the state is one more all the same.
		t.Logf("%s %v: %v: %s", name, args, err, out)
	}
}

func mcopy(t *testing.T, img, content, to string) {
	t.Helper()
	p := filepath.Join(filepath.Dir(img), "foreign")
	if err := os.WriteFile(p, []byte(content), 0o600); err != nil {
		t.Fatal(err)
	}
	mtool(t, img, "mcopy", "-o", p, to)
}

func unprotect(t *testing.T, img string) {
	t.Helper()
	mtool(t, img, "mattrib", "-r", "-h", "-s", "::/EFI/espmirror/journal")
}

// copyJournal writes the journal file anew, of at most n bytes.
func copyJournal(t *testing.T, img string, n int) {
	t.Helper()
	unprotect(t, img)
	p := filepath.Join(filepath.Dir(img), "j")
	mtool(t, img, "mcopy", "-n", "::/EFI/espmirror/journal", p)
	b, err := os.ReadFile(p)
	if os.IsNotExist(err) {
		return // there is no journal yet
	}
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(p, b[:min(n, len(b))], 0o600); err != nil {
		t.Fatal(err)
	}
	// Something that stays takes the first free clusters, so that the copy lies elsewhere.
	mcopy(t, img, strings.Repeat("x", 1500), "::/PAD.BIN")
	mtool(t, img, "mdel", "::/EFI/espmirror/journal")
	mtool(t, img, "mcopy", "-o", p, "::/EFI/espmirror/journal")
}

// readAll reads a volume with mtools' eyes: what counts is what other systems see.
func readTree(t *testing.T, b []byte) (*fixtures.Tree, error) {
	return fixtures.ReadStrictOptions(bytes.NewReader(b), int64(len(b)), 0, fixtures.Options{OrphanLongNames: true, Tail: fixtures.TailEDK2})
}

// TestStaleJournal lets other systems change a volume between a power cut and recovery. Recovery must leave the tree as
// they left it, or roll forward to trees that the interrupted run would have shown; a second one writes nothing; and
// then a sync does its work.
func TestStaleJournal(t *testing.T) {
	fixtures.Need(t, "mcopy", "mdel", "mren", "mattrib", "mlabel")
	samples := 3
	if testing.Short() {
		samples = 2
	}
	if long() {
		samples = 100
	}
	cases := crashCases()
	for _, name := range []string{"one directory", "kernel update", "first run"} {
		for _, g := range []geometry{geometries[1], geometries[2]} {
			if testing.Short() && g.name != "FAT16" {
				continue
			}
			for what, meddle := range meddlers {
				t.Run(name+"/"+g.name+"/"+what, func(t *testing.T) {
					t.Parallel()
					trees := cases[name]
					o := Options{Selection: crashSelect}
					c := prepared(t, g, trees, o)
					var lines []string // the images would be gigabytes
					if _, err := c.rec.Explore(fixtures.CrashOptions{Limit: 2, Random: 1, Seed: 9}, func(s *fixtures.State) error {
						if len(lines) < 400 {
							lines = append(lines, s.Line())
						}
						return nil
					}); err != nil {
						t.Fatal(err)
					}
					step := max(1, len(lines)/samples)
					for i := step / 2; i < len(lines); i += step {
						s, err := c.rec.State(lines[i])
						if err != nil {
							t.Fatal(err)
						}
						state, err := s.Bytes()
						if err != nil {
							t.Fatal(err)
						}
						img := filepath.Join(t.TempDir(), "v.img")
						if err := os.WriteFile(img, state, 0o600); err != nil {
							t.Fatal(err)
						}
						meddle(t, img)
						b, err := os.ReadFile(img)
						if err != nil {
							t.Fatal(err)
						}
						c.afterMeddling(t, b, bytes.Equal(b, state))
					}
				})
			}
		}
	}
}

// touched lists what recovery wrote outside of what nobody reads: our own journal, FSInfo and the other FAT copies.
func touched(before *fixtures.Tree, a, b []byte, sector int) []fixtures.Extent {
	allowed := []fixtures.Extent{{Off: int64(sector), Len: int64(sector)}}
	if before.Type != 32 {
		allowed = nil
	}
	if e := before.Get(journalPath); e != nil {
		allowed = append(allowed, before.Extents(e)...)
	}
	for n := 1; n < before.NumFATs; n++ {
		allowed = append(allowed, fixtures.Extent{Off: before.FATEntryExtent(n, 0).Off, Len: before.FATBytes()})
	}
	return fixtures.Outside(fixtures.Diff(a, b, sector), allowed)
}

func (c *crashRun) afterMeddling(t *testing.T, b []byte, untouched bool) {
	t.Helper()
	before, err := readTree(t, b)
	if err != nil {
		t.Skipf("the other system broke the volume: %v", err)
	}
	m := blockdev.NewMem(bytes.Clone(b), c.g.sector)
	target := &Target{Name: "stale", Dev: m}
	rec, err := Recover(context.Background(), target, RecoverOptions{})
	if err != nil {
		t.Fatalf("recovery: %v", err)
	}
	after, err := readTree(t, m.Bytes())
	if err != nil {
		t.Fatalf("after recovery (%s, %s): %v", rec.Action, rec.Reason, err)
	}
	if rec.Action == actStale {
		if rec.Reason == "" {
			t.Fatal("a stale record without a reason")
		}
		// Lost clusters that bear the stamp of a journal's creation are ours without any record.
		if x := touched(before, b, m.Bytes(), c.g.sector); len(x) > 0 && rec.FreedClusters == 0 {
			t.Fatalf("the record is stale (%s), and recovery wrote to %v", rec.Reason, x)
		}
	}
	if rec.Action != actForward {
		d := slices.DeleteFunc(before.Diff(after), func(line string) bool {
			return strings.Contains(line, "/journal: content ") // it is ours, wherever it went
		})
		if len(d) > 0 {
			t.Fatalf("recovery (%s, %s) changed the tree: %s", rec.Action, rec.Reason, d)
		}
	} else if !untouched {
		// Rolling forward over a foreign change is right only where it lies elsewhere: nothing foreign may go.
		for i := range before.Entries {
			e := &before.Entries[i]
			if k := fatdriver.Fold(e.Path); strings.Contains(k, "FOREIGN") || strings.HasSuffix(k, ".BIN") {
				if a := after.Get(e.Path); a == nil || a.Sum != e.Sum {
					t.Fatalf("recovery rolled forward, and %s went", e.Path)
				}
			}
		}
	}
	again := blockdev.NewCounting(m)
	if rec2, err := Recover(context.Background(), &Target{Name: "stale", Dev: again}, RecoverOptions{}); err != nil || again.Counts().Writes != 0 {
		t.Fatalf("after %q (%s) a second recovery: %+v, %v, %d writes", rec.Action, rec.Reason, rec2, err, again.Counts().Writes)
	}
	res := syncMem(t, c.src, m, c.opt)
	if res.Err != nil {
		t.Fatalf("sync after %q (%s): %v", rec.Action, rec.Reason, res.Err)
	}
	want := maps.Clone(c.src.(*memSource).files)
	tree, err := readTree(t, m.Bytes())
	if err != nil {
		t.Fatal(err)
	}
	for p, content := range want {
		e := tree.Get(p)
		if e == nil || int(e.Size) != len(content) {
			t.Fatalf("after the sync, %s is not there", p)
		}
		if got, err := tree.Read(e); err != nil || string(got) != content {
			t.Fatalf("after the sync, %s has other content", p)
		}
	}
	f, err := fixtures.FsckReader(bytes.NewReader(m.Bytes()), m.Size())
	if err == nil {
		// The clusters that a record spoke of are nobody's to free once the record does not fit any more.
		allow := fixtures.AllowLost
		if f.Found&allow != 0 {
			allow |= fixtures.AllowFreeWrong // fsck.fat compares with what it would be without the lost ones
		}
		err = f.Err(allow)
	}
	if err == nil {
		_, err = tree.CheckFSInfo(true)
	}
	if err != nil {
		t.Fatal(err)
	}
	if res := syncMem(t, c.src, m, c.opt); res.Outcome != InSync {
		t.Fatal("a second sync: ", res.Outcome, res.Err, res.Summary.Changes)
	}
}

// TestOverwrittenVolume makes a new file system over a target with an unfinished transaction.
func TestOverwrittenVolume(t *testing.T) {
	g := geometries[2]
	c := prepared(t, g, crashCases()["kernel update"], Options{Selection: crashSelect})
	if _, err := c.rec.Explore(fixtures.CrashOptions{Limit: 2, Random: 1, Seed: 2}, func(s *fixtures.State) error {
		for _, size := range []int{1, 2} {
			b, err := s.Bytes()
			if err != nil {
				return err
			}
			m := blockdev.NewMem(b, g.sector)
			if err := fatdriver.Format(m, fatdriver.FormatOptions{Type: g.typ, SectorSize: 512, SectorsPerCluster: size, NumFATs: 2, Serial: 7}); err != nil {
				return err
			}
			c.afterMeddling(t, m.Bytes(), false)
		}
		return nil
	}); err != nil {
		t.Fatal(err)
	}
}

// What one target has by hand lets a stale source overwrite another target, which is refused when it is alone.
func TestStaleByDetour(t *testing.T) {
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
