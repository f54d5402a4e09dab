package replicate

import (
	"bytes"
	"errors"
	"fmt"
	"maps"
	"strings"
	"testing"

	"espmirror/blockdev"
	"espmirror/fatdriver"
	"espmirror/fixtures"
)

// put makes files and directories in the root of a volume, without a journal and without a sync.
func put(t testing.TB, m blockdev.Device, wants ...*fatdriver.Want) {
	t.Helper()
	_, tree := scanned(t, m)
	var step fatdriver.Step
	for _, w := range wants {
		an := fatdriver.Anchor{Parent: tree.Root, New: w, Old: childNode(tree.Root, w.Name)}
		if an.Old != nil {
			keep := fatdriver.Carry(an.Old)
			keep.Children = append(keep.Children, w.Children...)
			an.New = keep
		}
		step = append(step, an)
	}
	plan, err := tree.NewPlan([]fatdriver.Step{step}, 0)
	if err != nil {
		t.Fatal(err)
	}
	tx := plan.Begin()
	for _, f := range plan.Files {
		w := tx.File(f)
		if _, err := w.Write(make([]byte, f.Want.Size)); err != nil {
			t.Fatal(err)
		}
		if err := w.Close(); err != nil {
			t.Fatal(err)
		}
	}
	steps := []func() error{tx.WriteDirs, tx.WriteFAT, tx.Flush}
	for i := range plan.Blocks {
		steps = append(steps, func() error { return tx.Commit(i) })
	}
	for _, f := range append(steps, tx.Free, tx.Finish, tx.Flush) {
		if err := f(); err != nil {
			t.Fatal(err)
		}
	}
}

// fill leaves exactly that many clusters that can be allocated, by a file in a directory of its own.
func fill(t testing.TB, m blockdev.Device, leave int64) {
	t.Helper()
	v, tree := scanned(t, m)
	plan, err := tree.NewPlan(nil, 0)
	if err != nil {
		t.Fatal(err)
	}
	n := plan.FreeBefore() - leave - 1 // the directory
	if n < 0 {
		t.Fatalf("%d free clusters, %d are to be left", plan.FreeBefore(), leave)
	}
	put(t, m, &fatdriver.Want{Name: "FILL", Dir: true, Children: []*fatdriver.Want{{Name: "FULL.BIN", Size: n * int64(v.Geometry().ClusterSize)}}})
}

// TestExactRoom finds the least number of free clusters with which a sync works, by the shortfall that a refusal tells,
// and checks that one cluster less is refused with nothing written.
func TestExactRoom(t *testing.T) {
	cases := crashCases()
	many := map[string]string{}
	for i := range 40 {
		many[fmt.Sprintf("EFI/%s/a", strings.Repeat(string(rune('a'+i%26)), 60+i))] = "x"
	}
	for p := range cases["first run"][1] {
		many[p] = cases["first run"][1][p]
	}
	cases["directories that grow"] = [2]map[string]string{cases["replace"][0], many}
	cases["first run, directories that grow"] = [2]map[string]string{{"EFI/x": "x"}, many}
	for name, trees := range cases {
		for _, g := range []geometry{geometries[0], geometries[1], geometries[3], geometries[5]} {
			if g.typ == fatdriver.FAT32 && !long() && name != "first run" && name != "directories that grow" {
				continue
			}
			for _, keep := range []int64{0, 10_000} {
				t.Run(fmt.Sprintf("%s/%s/keep %d", name, g.name, keep), func(t *testing.T) {
					t.Parallel()
					sel := Selection{Select: append([]string{}, crashSelect.Select...)}
					for p := range trees[1] {
						if parts := strings.Split(p, "/"); parts[0] == "EFI" && parts[1] != "Linux" && parts[1] != "BOOT" {
							sel.Select = append(sel.Select, "EFI/"+parts[1])
						}
					}
					o := Options{Selection: sel}
					m := newVolume(t, g)
					if trees[0] != nil && name != "first run, directories that grow" {
						if res := syncMem(t, newMemSource(trees[0]), m, o); res.Err != nil {
							t.Fatal(res.Err)
						}
					}
					o.KeepFree = keep
					image := bytes.Clone(m.Bytes())
					try := func(leave int64) (Result, *fixtures.Recorder) {
						full := blockdev.NewMem(bytes.Clone(image), g.sector)
						fill(t, full, leave)
						r := fixtures.NewRecorder(fixtures.Image(full.Bytes()), g.sector)
						return syncMem(t, newMemSource(trees[1]), r, o), r
					}
					cs := int64(g.sector * g.spc)
					enough := int64(0)
					for tries := 0; ; tries++ {
						if tries == 4 {
							t.Fatal("the shortfall that a refusal tells leads nowhere")
						}
						res, r := try(enough)
						if res.Err == nil {
							break
						}
						if !errors.Is(res.Err, fatdriver.ErrNoSpace) || res.Outcome != Refused || len(r.Ops) != 0 {
							t.Fatalf("%d clusters free: %v, %v, %d operations", enough, res.Outcome, res.Err, len(r.Ops))
						}
						var short int64
						msg := res.Err.Error()
						if _, err := fmt.Sscanf(msg[strings.LastIndex(msg, ": ")+2:], "%d bytes short", &short); err != nil || short <= 0 {
							t.Fatalf("no shortfall in %q", msg)
						}
						enough += (short + cs - 1) / cs
					}
					if enough == 0 {
						return // the old entries make room, and less than nothing cannot be left
					}
					res, r := try(enough - 1)
					if !errors.Is(res.Err, fatdriver.ErrNoSpace) || res.Outcome != Refused || len(r.Ops) != 0 {
						t.Fatalf("one cluster less than %d: %v, %v, %d operations", enough, res.Outcome, res.Err, len(r.Ops))
					}
					res, r = try(enough)
					if res.Outcome != Synced {
						t.Fatal(res.Outcome, res.Err)
					}
					b, err := r.Bytes()
					if err != nil {
						t.Fatal(err)
					}
					want := maps.Clone(trees[1])
					v, _ := fatdriver.Open(blockdev.NewMem(b, g.sector))
					want["FILL/FULL.BIN"] = strings.Repeat("\x00", int(fileSize(t, v, "FILL/FULL.BIN")))
					judge(t, blockdev.NewMem(b, g.sector), g.fats, want)
				})
			}
		}
	}
}

func fileSize(t testing.TB, v *fatdriver.Volume, p string) int64 {
	t.Helper()
	tree, err := v.Scan()
	if err != nil {
		t.Fatal(err)
	}
	return lookup(tree.Root, p).Size()
}

// TestRootFull has no slot left in the fixed root.
func TestRootFull(t *testing.T) {
	g := geometries[0]
	m := newVolume(t, g)
	v, err := fatdriver.Open(m)
	if err != nil {
		t.Fatal(err)
	}
	geo := v.Geometry()
	root := m.Bytes()[geo.RootOff:][:geo.RootSize]
	used := bytes.IndexByte(root, 0) / 32
	if root[0] == 0 {
		used = 0
	}
	for i := used; i < len(root)/32-1; i++ {
		copy(root[i*32:], fmt.Sprintf("F%07dBIN", i))
		root[i*32+11] = 0x20
	}
	before := bytes.Clone(m.Bytes())
	for _, files := range []map[string]string{{"loader/a": "1", "EFI/BOOT/b": "2"}, {"loader/a": "1"}} {
		res := syncMem(t, newMemSource(files), m, Options{Selection: testSelect})
		if res.Outcome != Refused || !errors.Is(res.Err, fatdriver.ErrNoSpace) || !bytes.Equal(before, m.Bytes()) {
			t.Fatal(res.Outcome, res.Err, bytes.Equal(before, m.Bytes()))
		}
	}
	// With the slots of two entries, there is room for one selected directory and for EFI.
	for i := len(root)/32 - 2; i < len(root)/32-1; i++ {
		clear(root[i*32 : i*32+32])
	}
	res := syncMem(t, newMemSource(map[string]string{"loader/a": "1"}), m, Options{Selection: testSelect})
	if res.Outcome != Synced {
		t.Fatal(res.Outcome, res.Err)
	}
}

// TestGrow makes directories grow that keep their place: the root of a FAT32 volume, and EFI, with and without a
// journal, with the new cluster in the FAT sector of the old one and elsewhere; and cuts the power in it.
func TestGrow(t *testing.T) {
	limit, random, gs := 25, 2, []geometry{geometries[0], geometries[4]}
	if long() {
		limit, random, gs = 20_000, 1000, []geometry{geometries[0], geometries[2], geometries[4], geometries[5]}
	}
	for _, g := range gs {
		for _, dir := range []string{"root", "EFI"} {
			if dir == "root" && g.typ != fatdriver.FAT32 {
				continue
			}
			for _, journal := range []bool{false, true} {
				for _, far := range []bool{false, true} {
					for slack := range 2 {
						t.Run(fmt.Sprintf("%s/%s/journal %v/far %v/%d", g.name, dir, journal, far, slack), func(t *testing.T) {
							t.Parallel()
							m := newVolume(t, g)
							wide := map[string]string{}
							sel := []string{"loader", "EFI/new directory with a long name", "EFI/Linux", "file with a long name in the root"}
							if g.typ != fatdriver.FAT32 {
								sel = sel[:3]
							}
							o := Options{Selection: Selection{Select: sel}}
							if journal {
								if res := syncMem(t, newMemSource(map[string]string{"loader/x": "1"}), m, o); res.Err != nil {
									t.Fatal(res.Err)
								}
							}
							// Full but for slack slots; the names are short ones.
							efi := &fatdriver.Want{Name: "EFI", Dir: true}
							per := g.sector * g.spc / 32
							used := 2
							if journal {
								used = 4 // espmirror has a long name
							}
							wants := []*fatdriver.Want{efi}
							if dir == "EFI" {
								for i := used; i < per-slack; i++ {
									efi.Children = append(efi.Children, &fatdriver.Want{Name: fmt.Sprintf("F%d", i)})
								}
							} else {
								used = 2 // label and EFI
								if journal {
									used++ // loader
								}
								for i := used; i < per-slack; i++ {
									wants = append(wants, &fatdriver.Want{Name: fmt.Sprintf("F%d", i)})
								}
							}
							put(t, m, wants...)
							if far {
								fillFATSector(t, m)
							}
							if slack == 1 {
								// More than one cluster at once.
								for i := range 3 {
									p := fmt.Sprintf("EFI/%d%s", i, strings.Repeat("n", 150))
									o.Selection.Select = append(o.Selection.Select, p)
									wide[p+"/w"] = "w"
								}
							}
							files := map[string]string{"loader/x": "2", "EFI/new directory with a long name/y": "3", "EFI/Linux/z": strings.Repeat("z", 900)}
							maps.Copy(files, wide)
							if g.typ == fatdriver.FAT32 {
								files["file with a long name in the root"] = "4"
							}
							c := record1(t, g, m.Bytes(), newMemSource(files), o)
							if err := c.explore(c.rec, limit, random); err != nil {
								t.Fatal(err)
							}
						})
					}
				}
			}
		}
	}
}

// fillFATSector marks what is free in the first two sectors of the FAT as bad.
func fillFATSector(t testing.TB, m *blockdev.Mem) {
	t.Helper()
	tree, err := fixtures.ReadStrict(bytes.NewReader(m.Bytes()), m.Size(), 0)
	if err != nil {
		t.Fatal(err)
	}
	p := &fixtures.Patcher{Tree: tree, RW: m}
	v, err := fatdriver.Open(m)
	if err != nil {
		t.Fatal(err)
	}
	g := v.Geometry()
	n := uint32(0)
	for c := uint32(2); c < uint32(2*g.SectorSize*8/int(g.Type)); c++ {
		x := tree.FATEntryExtent(0, c)
		b := m.Bytes()[x.Off:][:x.Len]
		e := uint32(b[0]) | uint32(b[1])<<8
		if x.Len == 4 {
			e |= uint32(b[2])<<16 | uint32(b[3])<<24
		} else if g.Type == fatdriver.FAT12 {
			if e &= 0xFFF; c&1 == 1 {
				e = (uint32(b[0]) | uint32(b[1])<<8) >> 4
			}
		}
		if e == 0 {
			n++
			if err := p.SetFAT(c, 0x0FFFFFF7); err != nil {
				t.Fatal(err)
			}
		}
	}
	if g.Type == fatdriver.FAT32 {
		if _, err := v.MendFSInfo(false); err != nil {
			t.Fatal(err)
		}
	}
}

// TestManyAnchors selects a root full of files: each entry is a switch of its own, and they lie in many sectors.
func TestManyAnchors(t *testing.T) {
	for _, g := range []geometry{geometries[2], geometries[4]} {
		for _, n := range []int{50, 120, 400} {
			if g.typ != fatdriver.FAT32 && n > 120 {
				continue
			}
			t.Run(fmt.Sprintf("%s/%d", g.name, n), func(t *testing.T) {
				t.Parallel()
				m := newVolume(t, g)
				o := Options{Selection: Selection{Select: []string{""}}}
				for round := range 3 {
					files := map[string]string{"EFI/BOOT/BOOTX64.EFI": fixtures.Program("boot")}
					for i := range n {
						files[fmt.Sprintf("file number %d.txt", i+round*n/4)] = fmt.Sprint(round, i)
					}
					before := bytes.Clone(m.Bytes())
					res := syncMem(t, newMemSource(files), m, o)
					if res.Outcome == Refused && errors.Is(res.Err, ErrRefused) && bytes.Equal(before, m.Bytes()) {
						t.Logf("refused: %v", res.Err)
						return
					}
					if res.Outcome != Synced {
						t.Fatal(res.Outcome, res.Err, bytes.Equal(before, m.Bytes()))
					}
					judge(t, m, g.fats, files)
					fsck(t, m)
				}
			})
		}
	}
}
