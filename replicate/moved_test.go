package replicate

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"espmirror/blockdev"
	"espmirror/fatdriver"
	"espmirror/fixtures"
)

// steps are the states of a run before, at and behind each of its barriers.
func (c *crashRun) steps() []*fixtures.Recording {
	var states []*fixtures.Recording
	ops := c.rec.Ops
	for i, op := range ops {
		if op.Flush || i+1 < len(ops) && ops[i+1].Flush || i > 0 && ops[i-1].Flush {
			states = append(states, &fixtures.Recording{Base: c.rec.Base, Sector: c.rec.Sector, Ops: ops[:i+1]})
		}
	}
	return states
}

// images are the bytes of every n-th of them, each different.
func (c *crashRun) images(t *testing.T, n int) [][]byte {
	t.Helper()
	var out [][]byte
	for i, rec := range c.steps() {
		s, err := rec.After()
		if err != nil {
			t.Fatal(err)
		}
		if i%n != 0 {
			continue
		}
		b, err := s.Bytes()
		if err != nil {
			t.Fatal(err)
		}
		if len(out) == 0 || !bytes.Equal(b, out[len(out)-1]) {
			out = append(out, b)
		}
	}
	return out
}

// relocate moves the clusters of one file or directory to the end of the volume, as a defragmenter does, and says whether
// there was anything to move.
func relocate(t *testing.T, img []byte, path string) bool {
	t.Helper()
	dev := blockdev.NewMem(img, 512)
	tree, err := fixtures.ReadStrictOptions(dev, dev.Size(), 0, fixtures.Options{OrphanLongNames: true, Tail: fixtures.TailEDK2})
	if err != nil {
		t.Fatal(err)
	}
	e := tree.Get(path)
	if e == nil || e.First == 0 {
		return false
	}
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	lost, err := tree.Lost()
	must(err)
	taken := map[uint32]bool{}
	for _, c := range lost {
		taken[c] = true
	}
	p := &fixtures.Patcher{Tree: tree, RW: dev}
	var from, to []uint32
	for _, r := range e.Runs {
		for i := range r.Count {
			from = append(from, r.First+i)
		}
	}
	for c := tree.Clusters + 1; len(to) < len(from); c-- {
		if c < 2 {
			return false
		}
		if !taken[c] && !tree.Reachable(c) {
			to = append(to, c)
		}
	}
	cs := int64(tree.ClusterSize)
	at := func(c uint32) []byte { off := tree.ClusterOffset(c); return img[off : off+cs] }
	for i, c := range to {
		copy(at(c), at(from[i]))
		next := uint32(0x0fffffff)
		if i+1 < len(to) {
			next = to[i+1]
		}
		must(p.SetFAT(c, next))
	}
	for _, c := range from {
		must(p.SetFAT(c, 0))
	}
	point := func(slot []byte) {
		binary.LittleEndian.PutUint16(slot[26:], uint16(to[0]))
		if tree.Type == 32 {
			binary.LittleEndian.PutUint16(slot[20:], uint16(to[0]>>16))
		}
	}
	// The entry itself, and those that point back to a directory.
	extents := func(dir string) []fixtures.Extent {
		if dir != "." {
			return tree.Extents(tree.Get(dir))
		}
		if tree.Type != 32 {
			off := tree.FATEntryExtent(tree.NumFATs-1, 0).Off + tree.FATBytes()
			return []fixtures.Extent{{Off: off, Len: tree.ClusterOffset(2) - off}}
		}
		var x []fixtures.Extent
		for _, r := range tree.RootRuns {
			x = append(x, fixtures.Extent{Off: tree.ClusterOffset(r.First), Len: int64(r.Count) * cs})
		}
		return x
	}
	found := false
	for _, x := range extents(filepath.Dir(path)) {
		for off := x.Off; off < x.Off+x.Len; off += 32 {
			if s := img[off : off+32]; s[11]&0x3f != 0x0f && [11]byte(s[:11]) == e.Short && !found {
				point(s)
				found = true
			}
		}
	}
	if !found {
		t.Fatalf("no slot of %s", path)
	}
	if e.Dir {
		point(at(to[0]))
		for i := range tree.Entries {
			if k := &tree.Entries[i]; k.Dir && filepath.Dir(k.Path) == path {
				point(img[tree.ClusterOffset(k.First)+32:])
			}
		}
	}
	return true
}

// TestMovedInPlace moves one file or directory elsewhere between a power cut and recovery: of those that were being
// replaced, of those that stay, and of the journal's own.
func TestMovedInPlace(t *testing.T) {
	fixtures.Need(t, "fsck.fat")
	paths := []string{"EFI", "EFI/Linux", "EFI/Linux/linux-6.1+3-0.efi", "EFI/espmirror", journalPath, "loader", "loader/entries", "loader/loader.conf"}
	cases := crashCases()
	for _, name := range []string{"one directory", "kernel update"} {
		for _, g := range []geometry{geometries[1], geometries[2], geometries[4]} {
			for i, path := range paths {
				if !long() && (g.typ == fatdriver.FAT32 && i%2 > 0 || testing.Short() && g.typ != fatdriver.FAT12) {
					continue
				}
				t.Run(name+"/"+g.name+"/"+strings.ReplaceAll(path, "/", "-"), func(t *testing.T) {
					t.Parallel()
					c := prepared(t, g, cases[name], Options{Selection: crashSelect})
					step := 4
					if long() {
						step = 1
					}
					moved := 0
					for _, b := range c.images(t, step) {
						if relocate(t, b, path) {
							moved++
							c.afterMeddling(t, b, false)
						}
					}
					if moved == 0 {
						t.Fatal("nothing was moved")
					}
					fixtures.Count("states", int64(moved))
				})
			}
		}
	}
}

// fsckMends runs the checker of another system as people do, which mends what it finds.
func fsckMends(t *testing.T, img string, args ...string) {
	t.Helper()
	out, err := exec.Command("fsck.fat", append(args, img)...).CombinedOutput()
	var exit *exec.ExitError
	if err != nil && (!errors.As(err, &exit) || exit.ExitCode() != 1) {
		t.Fatalf("fsck.fat: %v: %s", err, out)
	}
}

// TestRewritten is what systems do to a whole volume between a power cut and recovery.
func TestRewritten(t *testing.T) {
	fixtures.Need(t, "fsck.fat", "mkfs.fat", "mcopy", "mattrib")
	mkfs := func(t *testing.T, img string, g geometry) {
		typ := fmt.Sprint(int(g.typ))
		args := []string{"--invariant", "-F", typ, "-s", fmt.Sprint(g.spc), "-S", fmt.Sprint(g.sector), "-f", fmt.Sprint(g.fats), "-i", "1234abcd", "-n", "ESP", "-a", img}
		if out, err := exec.Command("mkfs.fat", args...).CombinedOutput(); err != nil {
			t.Fatalf("mkfs.fat: %v: %s", err, out)
		}
	}
	format := func(t *testing.T, img string, g geometry) { // the same boot sector, byte for byte
		b, err := os.ReadFile(img)
		if err != nil {
			t.Fatal(err)
		}
		fresh := newVolume(t, g).Bytes()
		v, err := fatdriver.Open(blockdev.NewMem(fresh, g.sector))
		if err != nil {
			t.Fatal(err)
		}
		geo := v.Geometry()
		n := geo.DataOff
		if g.typ == fatdriver.FAT32 {
			n += int64(geo.ClusterSize) // the root
		}
		copy(b, fresh[:n])
		if err := os.WriteFile(img, b, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	restore := func(again func(*testing.T, string, geometry), wipe bool) func(t *testing.T, img string, g geometry) {
		return func(t *testing.T, img string, g geometry) {
			dir := t.TempDir()
			mtool(t, img, "mcopy", "-s", "-n", "-m", "::/*", dir)
			if wipe {
				if err := os.WriteFile(img, make([]byte, g.size), 0o600); err != nil {
					t.Fatal(err)
				}
			}
			again(t, img, g)
			names, err := filepath.Glob(dir + "/*")
			if err != nil || len(names) == 0 {
				t.Skip("nothing to defragment yet")
			}
			mtool(t, img, "mcopy", append(append([]string{"-s", "-m", "-o"}, names...), "::/")...)
		}
	}
	ways := map[string]func(t *testing.T, img string, g geometry){
		"defragmented by mkfs.fat": restore(mkfs, true),
		"defragmented in place":    restore(format, false),
		"mkfs.fat over it":         mkfs,
		"the same format over it":  format,
		"format, and files again": func(t *testing.T, img string, g geometry) {
			format(t, img, g)
			mcopy(t, img, strings.Repeat("f", 150_000), "::/BIG.BIN")
		},
		"fsck frees":    func(t *testing.T, img string, g geometry) { fsckMends(t, img, "-a") },
		"fsck salvages": func(t *testing.T, img string, g geometry) { fsckMends(t, img, "-a", "-f") },
		"fsck frees, and new files": func(t *testing.T, img string, g geometry) {
			fsckMends(t, img, "-a")
			mcopy(t, img, strings.Repeat("f", 150_000), "::/BIG.BIN")
		},
		"fsck frees, new loader": func(t *testing.T, img string, g geometry) {
			fsckMends(t, img, "-a")
			mcopy(t, img, strings.Repeat("f", 20_000), "::/loader/foreign.bin")
		},
		"journal's clusters, a file": func(t *testing.T, img string, g geometry) { renamedJournal(t, img) },
	}
	cases := crashCases()
	for _, name := range []string{"one directory", "kernel update", "first run"} {
		for _, g := range []geometry{geometries[1], geometries[2], geometries[4]} {
			if testing.Short() && g.name != "FAT12x1" || !long() && g.name != "FAT12x1" && name != "kernel update" {
				continue
			}
			for what, rewrite := range ways {
				t.Run(name+"/"+g.name+"/"+what, func(t *testing.T) {
					t.Parallel()
					c := prepared(t, g, cases[name], Options{Selection: crashSelect})
					step := 5
					if long() {
						step = 1
					} else if strings.HasPrefix(what, "fsck") && g.typ != fatdriver.FAT32 {
						step = 3
					}
					img := filepath.Join(t.TempDir(), "v.img")
					n := 0
					for _, b := range c.images(t, step) {
						if err := os.WriteFile(img, b, 0o600); err != nil {
							t.Fatal(err)
						}
						rewrite(t, img, g)
						after, err := os.ReadFile(img)
						if err != nil {
							t.Fatal(err)
						}
						c.afterMeddling(t, after, bytes.Equal(after, b))
						n++
					}
					fixtures.Count("states", int64(n))
				})
			}
		}
	}
}

// renamedJournal makes a foreign file of the journal, in its place, and loses a cluster, so that recovery searches.
func renamedJournal(t *testing.T, img string) {
	t.Helper()
	unprotect(t, img)
	mtool(t, img, "mmove", "::/EFI/espmirror/journal", "::/SWAP.BIN")
	mcopy(t, img, "lost", "::/LOST.BIN")
	b, err := os.ReadFile(img)
	if err != nil {
		t.Fatal(err)
	}
	tree, err := readTree(t, b)
	if err != nil {
		t.Fatal(err)
	}
	p := &fixtures.Patcher{Tree: tree, RW: blockdev.NewMem(b, 512)}
	if err := p.Delete("LOST.BIN"); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(img, b, 0o600); err != nil {
		t.Fatal(err)
	}
}

// TestCopiedVolume copies a volume that a cut left behind to a larger device: recovery does there what it does here,
// touches nothing behind the volume, and one copy does not know of the other.
func TestCopiedVolume(t *testing.T) {
	for _, g := range []geometry{geometries[0], geometries[3], geometries[4]} {
		t.Run(g.name, func(t *testing.T) {
			t.Parallel()
			c := prepared(t, g, crashCases()["kernel update"], Options{Selection: crashSelect})
			for i, b := range c.images(t, 3) {
				tail := bytes.Repeat([]byte{0xA5}, 1<<20)
				here := blockdev.NewMem(bytes.Clone(b), g.sector)
				there := blockdev.NewMem(append(bytes.Clone(b), tail...), g.sector)
				a, err := Recover(context.Background(), &Target{Name: "here", Dev: here}, RecoverOptions{})
				if err != nil {
					t.Fatal(i, err)
				}
				z, err := Recover(context.Background(), &Target{Name: "there", Dev: there}, RecoverOptions{})
				if err != nil || *a != *z {
					t.Fatalf("state %d: %+v here, %+v there, %v", i, a, z, err)
				}
				if !bytes.Equal(here.Bytes(), there.Bytes()[:len(b)]) || !bytes.Equal(there.Bytes()[len(b):], tail) {
					t.Fatalf("state %d: the copies differ after recovery", i)
				}
				if res := syncMem(t, c.src, there, c.opt); res.Err != nil {
					t.Fatal(i, res.Err)
				}
				if n, err := c.visible(there); err != nil || n != c.last {
					t.Fatalf("state %d: tree %d, %v", i, n, err)
				}
				fixtures.Count("states", 1)
			}
		})
	}
}

// TestOldMetadata puts back FATs and directories from before the run, or from before everything, and leaves the data
// with the newer journal as it is. What can be read stays so.
func TestOldMetadata(t *testing.T) {
	cases := crashCases()
	for _, name := range []string{"one directory", "kernel update"} {
		for _, g := range []geometry{geometries[0], geometries[2], geometries[4]} {
			t.Run(name+"/"+g.name, func(t *testing.T) {
				t.Parallel()
				c := prepared(t, g, cases[name], Options{Selection: crashSelect})
				old := make([]byte, c.rec.Base.Size())
				if _, err := c.rec.Base.ReadAt(old, 0); err != nil {
					t.Fatal(err)
				}
				tree, err := readTree(t, old)
				if err != nil {
					t.Fatal(err)
				}
				empty := newVolume(t, g).Bytes()
				data := tree.ClusterOffset(2)
				root := data
				if g.typ == fatdriver.FAT32 {
					root += int64(tree.ClusterSize)
				}
				for i, b := range c.images(t, 2) {
					for _, what := range []string{"FATs", "FATs and root", "FATs and directories", "of an empty volume"} {
						img := bytes.Clone(b)
						switch what {
						case "FATs":
							copy(img, old[:data-map[bool]int64{true: 512 * 32, false: 0}[g.typ != fatdriver.FAT32]])
						case "of an empty volume":
							copy(img, empty[:root])
						default:
							copy(img, old[:root])
							for k := range tree.Entries {
								if e := &tree.Entries[k]; e.Dir && strings.HasSuffix(what, "directories") {
									for _, x := range tree.Extents(e) {
										copy(img[x.Off:x.Off+x.Len], old[x.Off:])
									}
								}
							}
						}
						at := fmt.Sprintf("state %d, %s", i, what)
						if _, err := readTree(t, img); err == nil {
							c.afterMeddling(t, img, false)
							continue
						}
						m := blockdev.NewMem(bytes.Clone(img), g.sector)
						rec, err := Recover(context.Background(), &Target{Name: "old", Dev: m}, RecoverOptions{})
						if err == nil && rec.Action != actStale {
							t.Fatalf("%s: %+v on a damaged volume", at, rec)
						}
						if x := touched(tree, img, m.Bytes(), g.sector); len(x) > 0 {
							t.Fatalf("%s: %+v, %v: it wrote to %v", at, rec, err, x)
						}
						fixtures.Count("states", 1)
					}
				}
			})
		}
	}
}

// TestSalvaged has fsck.fat make files of lost clusters between two commits, in a sector of the root that no commit is
// in: rolling forward would give these clusters a second owner.
func TestSalvaged(t *testing.T) {
	fixtures.Need(t, "fsck.fat")
	trees := crashCases()["kernel update"]
	for _, g := range []geometry{geometries[1], geometries[2]} {
		t.Run(g.name, func(t *testing.T) {
			t.Parallel()
			o := Options{Selection: crashSelect}
			m := newVolume(t, g)
			if res := syncMem(t, newMemSource(trees[0]), m, o); res.Err != nil {
				t.Fatal(res.Err)
			}
			var full []*fatdriver.Want
			for i := range 20 {
				full = append(full, &fatdriver.Want{Name: fmt.Sprintf("F%d", i)})
			}
			put(t, m, full...)
			c := record1(t, g, m.Bytes(), newMemSource(trees[1]), o)
			img := filepath.Join(t.TempDir(), "v.img")
			refused := 0
			for _, b := range c.images(t, 1) {
				if err := os.WriteFile(img, b, 0o600); err != nil {
					t.Fatal(err)
				}
				fsckMends(t, img, "-a", "-f")
				after, err := os.ReadFile(img)
				if err != nil {
					t.Fatal(err)
				}
				dry, err := Recover(context.Background(), &Target{Name: "salvaged", Dev: blockdev.NewMem(bytes.Clone(after), g.sector)}, RecoverOptions{})
				if err != nil {
					t.Fatal(err)
				}
				if strings.Contains(dry.Reason, "would be damaged") {
					refused++
				}
				c.afterMeddling(t, after, bytes.Equal(after, b))
			}
			if refused == 0 {
				t.Error("no state between two commits was found")
			}
		})
	}
}
