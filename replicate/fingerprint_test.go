package replicate

import (
	"context"
	"fmt"
	"maps"
	"strings"
	"testing"

	"espmirror/blockdev"
	"espmirror/fixtures"
)

// bigTree has files that one sees being read.
func bigTree() map[string]string {
	files := withFiles(nil)
	for i := range 4 {
		files[fmt.Sprintf("EFI/Linux/u%d+3-0.efi", i)] = fixtures.Program(strings.Repeat(fmt.Sprint(i), 300_000))
	}
	return files
}

// fingerprinted runs with fingerprints, and says how many bytes were read from both sides.
func fingerprinted(t *testing.T, o Options, from, to *aMember) (Result, int64, int64) {
	t.Helper()
	src, dst := blockdev.NewCounting(from.dev), blockdev.NewCounting(to.dev)
	from.via, to.via = src, dst
	defer func() { from.via, to.via = nil, nil }()
	o.Fingerprint = true
	res, err := from.sync(t, o, to)
	if err != nil {
		t.Fatal(err)
	}
	return res[0], src.Counts().BytesRead, dst.Counts().BytesRead
}

// TestFingerprint wants nothing to be read where nothing was changed, and everything where anything may have been.
func TestFingerprint(t *testing.T) {
	const content, few = 1_200_000, 400_000 // bytes: of all files; what directories, FATs and the journal take at most
	fresh := func(t *testing.T) (a, b *aMember) {
		ms := newMembers(t, geometries[2], nil, "a", "b")
		ms[0].write(t, bigTree())
		res, err := ms[0].sync(t, Options{}, ms[1])
		expectResults(t, "first", res, err, Synced)
		return ms[0], ms[1]
	}
	for _, c := range []struct {
		name    string
		change  func(t *testing.T, a, b *aMember) Options
		read    bool
		outcome Outcome
	}{
		{"nothing", func(*testing.T, *aMember, *aMember) Options { return Options{} }, false, InSync},
		{"what is not selected", func(t *testing.T, a, b *aMember) Options {
			a.edit(t, map[string]*string{"note.txt": ptr("a")})
			b.edit(t, map[string]*string{"own/y": ptr("b")})
			return Options{}
		}, false, InSync},
		{"the same again in other clusters on the source", func(t *testing.T, a, b *aMember) Options {
			a.edit(t, map[string]*string{"EFI/Linux/u1+3-0.efi": ptr(bigTree()["EFI/Linux/u1+3-0.efi"])})
			return Options{}
		}, true, InSync},
		{"another content of the same size and time on the source", func(t *testing.T, a, b *aMember) Options {
			a.edit(t, map[string]*string{"EFI/Linux/u1+3-0.efi": ptr(fixtures.Program(strings.Repeat("x", 300_000)))})
			return Options{}
		}, true, Synced},
		{"the same on the target", func(t *testing.T, a, b *aMember) Options {
			b.edit(t, map[string]*string{"EFI/Linux/u1+3-0.efi": ptr(fixtures.Program(strings.Repeat("x", 300_000)))})
			return Options{}
		}, true, Refused},
		{"another selection", func(t *testing.T, a, b *aMember) Options {
			return Options{Selection: Selection{Select: []string{"EFI/Linux"}}}
		}, true, InSync},
		{"an exclusion", func(t *testing.T, a, b *aMember) Options {
			o := Options{Selection: testSelect}
			o.Selection.Exclude = []string{"u2*"}
			return o
		}, true, InSync},
		{"a boot was counted on the source", func(t *testing.T, a, b *aMember) Options {
			a.edit(t, map[string]*string{"EFI/Linux/u1+3-0.efi": ptr("→u1+2-1.efi")})
			return Options{}
		}, true, InSync},
		{"a boot was counted on the target", func(t *testing.T, a, b *aMember) Options {
			b.edit(t, map[string]*string{"EFI/Linux/u1+3-0.efi": ptr("→u1+2-1.efi")})
			return Options{}
		}, true, InSync},
		{"nobody knows the target's", func(t *testing.T, a, b *aMember) Options {
			st := b.state(t)
			st.Own = noFingerprint
			putMem(t, b.dev, Options{}, File{Path: StatePath, Content: st.Bytes()})
			return Options{}
		}, true, InSync},
		{"another generation", func(t *testing.T, a, b *aMember) Options {
			st := a.state(t)
			st.Generation++
			if err := a.saveState(t.Context(), st.Bytes()); err != nil {
				t.Fatal(err)
			}
			return Options{}
		}, true, Synced},
		{"the source lost its state", func(t *testing.T, a, b *aMember) Options {
			a.edit(t, map[string]*string{StatePath: nil})
			return Options{}
		}, true, InSync},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			a, b := fresh(t)
			o := c.change(t, a, b)
			res, src, dst := fingerprinted(t, o, a, b)
			if res.Outcome != c.outcome && !(c.outcome == InSync && res.Outcome == Synced && len(res.Summary.Changes) == 0) {
				t.Errorf("%s, %v", res.Outcome, res.Err)
			}
			if read := src > content; read != c.read || !c.read && src > few {
				t.Errorf("%d bytes of the source were read", src)
			}
			if read := dst > content/2; read != c.read || !c.read && dst > few {
				t.Errorf("%d bytes of the target were read", dst)
			}
		})
	}
	t.Run("another source", func(t *testing.T) {
		a, b := fresh(t)
		res, src, _ := fingerprinted(t, Options{}, b, a)
		if res.Outcome != InSync || src < content {
			t.Errorf("%s, %v, %d bytes", res.Outcome, res.Err, src)
		}
	})
	t.Run("in place", func(t *testing.T) {
		// What is written into the clusters of a file leaves no trace in any directory. Whoever relies on fingerprints
		// does not see that; a comparison of the content does.
		for _, on := range []int{0, 1} {
			a, b := fresh(t)
			m := []*aMember{a, b}[on]
			_, tree := scanned(t, m.dev)
			vol, n := tree.Volume(), lookup(tree.Root, "EFI/Linux/u1+3-0.efi")
			off := vol.Geometry().DataOff + int64(n.Runs[0].First-2)*int64(vol.Geometry().ClusterSize)
			m.dev.Bytes()[off+5]++
			if res, _, _ := fingerprinted(t, Options{}, a, b); res.Outcome != InSync {
				t.Errorf("by fingerprint: %s, %v", res.Outcome, res.Err)
			}
			res, err := a.verify(t, Options{Fingerprint: true}, b)
			expectResults(t, "verify", res, err, Differs)
			res, err = a.sync(t, Options{}, b)
			if on == 0 {
				expectResults(t, "by content", res, err, Synced)
			} else {
				expectResults(t, "by content", res, err, ErrStaleSource)
			}
		}
	})
}

// TestForetold wants the fingerprint that a run writes, before there is such a tree, to be that of the tree which comes
// of it.
func TestForetold(t *testing.T) {
	for _, g := range geometries[:4] {
		t.Run(g.name, func(t *testing.T) {
			t.Parallel()
			ms := newMembers(t, g, nil, "a", "b")
			a, b := ms[0], ms[1]
			files := withFiles(map[string]string{"EFI/Linux/u.efi": fixtures.Program("u")})
			for i := range 8 {
				files[fmt.Sprintf("EFI/Linux/a long name, for slots %d.efi", i)] = fixtures.Program(strings.Repeat("n", 700*i))
				if i%3 == 2 {
					delete(files, fmt.Sprintf("EFI/Linux/a long name, for slots %d.efi", i-1))
					files[token+fmt.Sprintf("/%d/linux", i)] = "kernel"
				}
				a.write(t, maps.Clone(files))
				res, err := a.sync(t, Options{}, b)
				expectResults(t, "run", res, err, Synced)
				_, tree := scanned(t, b.dev)
				sel, err := testSelect.resolve(a.open(t, a.dev))
				if err != nil {
					t.Fatal(err)
				}
				st := b.state(t)
				if have := fingerprint(tree, sel); st.Own != have {
					t.Errorf("run %d: foretold %s, and it is %s", i, st.Own, have)
				}
				_, tree = scanned(t, a.dev)
				if have := fingerprint(tree, sel); st.Source != have {
					t.Errorf("run %d: the source was %s, and it is %s", i, st.Source, have)
				}
				if i == 0 {
					continue
				}
				if res, err := Sync(context.Background(), a.open(t, a.dev), targets(ms[1:]), a.options(Options{Fingerprint: true})); err != nil || res[0].Outcome != InSync {
					t.Error(res, err)
				}
			}
		})
	}
}

// The words of an XBOOTLDR partition come from the ESP's set file, which its fingerprint does not cover.
func TestFingerprintAndWords(t *testing.T) {
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
