package replicate

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"testing"

	"espmirror/blockdev"
	"espmirror/fatdriver"
	"espmirror/fixtures"
)

// TestGarbageCommitSector is T3 of the fault model: the sector that was being committed holds garbage, or cannot be read
// any more. Recovery knows it from the record, also where the sector is on the way to the journal, and makes the tree old
// or new again. The same goes for FSInfo, which it makes anew.
func TestGarbageCommitSector(t *testing.T) {
	garbage := map[string]func(b []byte){
		"zeros": func(b []byte) { clear(b) },
		"ones":  func(b []byte) { copy(b, bytes.Repeat([]byte{0xFF}, len(b))) },
		"random": func(b []byte) {
			x := uint32(12345)
			for i := range b {
				x = x*1664525 + 1013904223
				b[i] = byte(x >> 24)
			}
		},
		"unreadable": func(b []byte) {},
	}
	cases := crashCases()
	for _, name := range []string{"replace", "one directory", "kernel update", "files in the root"} {
		for _, g := range geometries {
			t.Run(name+"/"+g.name, func(t *testing.T) {
				t.Parallel()
				o := Options{Selection: crashSelect}
				m := newVolume(t, g)
				if res := syncMem(t, newMemSource(cases[name][0]), m, o); res.Err != nil {
					t.Fatal(res.Err)
				}
				c := record1(t, g, m.Bytes(), newMemSource(cases[name][1]), o)
				v, tree := scanned(t, m)
				live := func(off int64) bool { // whether a sector belongs to a directory that stays: a commit sector
					for _, d := range []string{"", "EFI", "EFI/BOOT", "EFI/Linux", "loader"} {
						if tree.InDirectory(d, off) {
							return true
						}
					}
					return false
				}
				dev := blockdev.NewMem(bytes.Clone(m.Bytes()), g.sector)
				tried, infos := 0, 0
				var pending []fixtures.Op
				info := v.Geometry().FSInfoOff
				for _, op := range c.rec.Ops {
					if op.Flush {
						pending = nil
						continue
					}
					pending = append(pending, op)
					if op.Off == info {
						infos++
					}
					if len(op.Data) <= g.sector && (op.Off == info || len(pending) == 1 && live(op.Off)) {
						for kind, spoil := range garbage {
							cut := newWeak(dev.Bytes(), g.sector)
							spoil(cut.Bytes()[op.Off : op.Off+int64(len(op.Data))])
							if kind == "unreadable" {
								cut.bad[op.Off/int64(g.sector)] = true
								dry, err := Recover(context.Background(), &Target{Name: "cut", Dev: cut}, RecoverOptions{Options: Options{DryRun: true}})
								if err != nil || !dry.Changed() || cut.writes > 0 {
									t.Fatalf("dry run at 0x%x: %+v, %v, %d writes", op.Off, dry, err, cut.writes)
								}
							}
							rec, err := Recover(context.Background(), &Target{Name: "cut", Dev: cut}, RecoverOptions{})
							if err != nil {
								t.Fatalf("%s at 0x%x: %v", kind, op.Off, err)
							}
							if rec.Action != actBack && rec.Action != actForward && rec.Action != actFinish {
								t.Fatalf("%s at 0x%x: %+v", kind, op.Off, rec)
							}
							for n := 0; n < g.fats; n++ {
								got, err := c.trees.Read(cut, n, false)
								if err != nil {
									t.Fatalf("%s at 0x%x, FAT copy %d: %v (%+v)", kind, op.Off, n, err, rec)
								}
								if _, ok := c.trees.Number(got); !ok {
									t.Fatalf("%s at 0x%x: the tree is neither old nor new (%+v)", kind, op.Off, rec)
								}
								if lost, err := got.Lost(); err != nil || len(lost) > 0 {
									t.Fatalf("%s at 0x%x: lost clusters %v %v", kind, op.Off, lost, err)
								}
								if _, err := got.CheckFSInfo(false); err != nil {
									t.Fatalf("%s at 0x%x: %v", kind, op.Off, err)
								}
							}
							cut.writes = 0
							if rec, err := Recover(context.Background(), &Target{Name: "cut", Dev: cut}, RecoverOptions{}); err != nil || cut.writes > 0 {
								t.Fatalf("%s at 0x%x: second recovery: %+v, %v, %d writes", kind, op.Off, rec, err, cut.writes)
							}
							tried++
							fixtures.Count("states", 1)
						}
					}
					if _, err := dev.WriteAt(op.Data, op.Off); err != nil {
						t.Fatal(err)
					}
				}
				if tried == 0 || info >= 0 && infos != 2 {
					t.Fatalf("%d commit sectors were found, FSInfo was written %d times", tried, infos)
				}
			})
		}
	}
}

// TestGarbageAfterCommit spoils the commit sector when the commit was stable already and the old clusters are becoming
// free: the record has both images, and only the new tree is whole.
func TestGarbageAfterCommit(t *testing.T) {
	cases := crashCases()
	for _, g := range geometries {
		t.Run(g.name, func(t *testing.T) {
			t.Parallel()
			o := Options{Selection: crashSelect}
			c := prepared(t, g, cases["replace"], o)
			tree, err := fixtures.ReadStrict(c.base, c.base.Size(), 0)
			if err != nil {
				t.Fatal(err)
			}
			within := func(path string, off int64) bool {
				for _, x := range tree.Extents(tree.Get(path)) {
					if off >= x.Off && off < x.Off+x.Len {
						return true
					}
				}
				return false
			}
			dev := blockdev.NewMem(bytes.Clone(c.base), g.sector)
			commit, tried := int64(-1), 0
			for _, op := range c.rec.Ops {
				if op.Flush {
					continue
				}
				if commit >= 0 && within(journalPath, op.Off) {
					break // the record is closed
				}
				if _, err := dev.WriteAt(op.Data, op.Off); err != nil {
					t.Fatal(err)
				}
				if within("EFI", op.Off) {
					commit = op.Off
				} else if commit >= 0 {
					for _, kind := range []string{"zeros", "unreadable"} {
						cut := newWeak(dev.Bytes(), g.sector)
						clear(cut.Bytes()[commit : commit+int64(g.sector)])
						cut.bad[commit/int64(g.sector)] = kind == "unreadable"
						if err := c.recovered(cut, c.last); err != nil {
							t.Fatalf("%s: %v", kind, err)
						}
						tried++
					}
				}
			}
			if tried == 0 {
				t.Fatal("nothing was freed")
			}
			fixtures.Count("states", int64(tried))
		})
	}
}

// TestGarbageBesideOtherDamage has garbage in the commit sector and something else that is damaged: the record's image of
// the sector must outlast the refusal.
func TestGarbageBesideOtherDamage(t *testing.T) {
	g := geometries[2]
	c := prepared(t, g, crashCases()["replace"], Options{Selection: crashSelect})
	dev := blockdev.NewMem(bytes.Clone(c.base), g.sector)
	v, tree := scanned(t, dev)
	geo := v.Geometry()
	slot := geo.RootOff
	for c.base[slot] != 0 {
		slot += 32
	}
	tried := 0
	for _, op := range c.rec.Ops {
		if op.Flush {
			continue
		}
		if tree.InDirectory("EFI", op.Off) {
			cut := newWeak(dev.Bytes(), g.sector)
			clear(cut.Bytes()[op.Off : op.Off+int64(g.sector)])
			copy(cut.Bytes()[slot:], "OTHER   BIN")
			cut.Bytes()[slot+28] = 5 // five bytes, and no cluster
			var hint *Hint
			rec, err := Recover(context.Background(), &Target{Name: "cut", Dev: cut}, RecoverOptions{})
			if !errors.Is(err, fatdriver.ErrDamaged) || !errors.As(err, &hint) || cut.writes > 0 {
				t.Fatalf("%+v, %v, %d writes", rec, err, cut.writes)
			}
			cut.Bytes()[slot] = 0xE5
			if err := c.recovered(cut, 0); err != nil {
				t.Fatal(err)
			}
			tried++
		}
		if _, err := dev.WriteAt(op.Data, op.Off); err != nil {
			t.Fatal(err)
		}
	}
	if tried == 0 {
		t.Fatal("EFI was not written")
	}
}

// TestRepairFaults fails every operation of a recovery that has a garbage commit sector or a lost FSInfo to mend. Nothing
// may be written after a failed flush, and the next recovery, on a device that works, must end with the old tree or the
// new one.
func TestRepairFaults(t *testing.T) {
	cases := crashCases()
	for _, name := range []string{"replace", "kernel update"} {
		for _, g := range []geometry{geometries[0], geometries[2]} {
			t.Run(name+"/"+g.name, func(t *testing.T) {
				t.Parallel()
				c := prepared(t, g, cases[name], Options{Selection: crashSelect})
				m := blockdev.NewMem(bytes.Clone(c.base), g.sector)
				v, tree := scanned(t, m)
				info := v.Geometry().FSInfoOff
				spoilt, runs := 0, 0
				epoch := 0 // writes since the last flush
				for _, op := range c.rec.Ops {
					if op.Flush {
						epoch = 0
						continue
					}
					epoch++
					commit := epoch == 1 && (tree.InDirectory("", op.Off) || tree.InDirectory("EFI", op.Off))
					if len(op.Data) <= g.sector && (commit || op.Off == info) {
						spoilt++
						img := bytes.Clone(m.Bytes())
						clear(img[op.Off : op.Off+int64(len(op.Data))])
						for _, kind := range faults {
							for k := 0; ; k += kind.step(g) {
								d := &failing{Recorder: fixtures.NewRecorder(fixtures.Image(bytes.Clone(img)), g.sector), fault: kind, k: k}
								r, err := Recover(context.Background(), &Target{Name: "bad", Dev: d}, RecoverOptions{})
								if !d.fired {
									break
								}
								at := fmt.Sprintf("sector 0x%x, %s %d: %+v, %v", op.Off, kind.name, k, r, err)
								// A read that fails may hide the record: then the garbage is told of as the damage that it is.
								reads := kind.kind == blockdev.OpRead || kind.kind == opAny
								if err == nil && !reads || err != nil && !errors.Is(err, kind.err) && !(reads && errors.Is(err, fatdriver.ErrDamaged)) {
									t.Fatal(at)
								}
								if d.after > 0 {
									t.Fatalf("%s: %d writes or flushes after a failed flush", at, d.after)
								}
								if r, err := Recover(context.Background(), &Target{Name: "mended", Dev: d.State}, RecoverOptions{}); err != nil {
									t.Fatalf("%s, then: %+v, %v", at, r, err)
								}
								n, err := c.visible(d.State)
								if err == nil {
									err = c.recovered(d.State, n)
								}
								if err != nil {
									t.Fatalf("%s, then: %v", at, err)
								}
								runs++
							}
						}
					}
					if _, err := m.WriteAt(op.Data, op.Off); err != nil {
						t.Fatal(err)
					}
				}
				if spoilt == 0 || runs < 10*spoilt {
					t.Fatalf("%d sectors, %d runs", spoilt, runs)
				}
				fixtures.Count("faults", int64(runs))
			})
		}
	}
}
