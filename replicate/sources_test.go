package replicate

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"path"
	"path/filepath"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"espmirror/blockdev"
	"espmirror/fatdriver"
	"espmirror/fixtures"
)

// writeFiles makes a directory with files: a source, or a mounted ESP.
func writeFiles(t testing.TB, files map[string]string) string {
	t.Helper()
	dir := t.TempDir()
	if err := fixtures.WriteFiles(dir, files); err != nil {
		t.Fatal(err)
	}
	return dir
}

var bootFiles = map[string]string{
	"loader/loader.conf":     "timeout 3\n",
	"EFI/BOOT/BOOTX64.EFI":   fixtures.Program(strings.Repeat("b", 3000)),
	"EFI/Linux/linux.efi":    fixtures.Program(strings.Repeat("l", 5000)),
	"EFI/Linux/empty":        "",
	"EFI/Linux/Grüße 😀.conf": "x",
}

// TestDirSource replicates a directory: what FAT cannot hold stops the run when it is selected, and only then.
func TestDirSource(t *testing.T) {
	g := geometries[2]
	ok := func(name string, change func(dir string), sel Selection, want error) {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			dir := writeFiles(t, bootFiles)
			change(dir)
			src, err := OpenDirSource(dir)
			if err != nil {
				t.Fatal(err)
			}
			defer src.Close()
			m := newVolume(t, g)
			before := bytes.Clone(m.Bytes())
			res, err := Sync(context.Background(), src, []*Target{{Name: "t", Dev: m}}, Options{Selection: sel})
			if err == nil {
				err = res[0].Err
			}
			if !errors.Is(err, want) {
				t.Fatalf("%v, want %v", err, want)
			}
			if want != nil {
				if !bytes.Equal(before, m.Bytes()) {
					t.Error("the target was written to")
				}
				return
			}
			files := maps.Clone(bootFiles)
			judge(t, m, g.fats, files)
			fsck(t, m)
			src2, err := OpenDirSource(dir)
			if err != nil {
				t.Fatal(err)
			}
			defer src2.Close()
			if res := syncMem(t, src2, m, Options{Selection: sel}); res.Outcome != InSync {
				t.Errorf("second sync: %v, %v", res.Outcome, res.Summary.Changes)
			}
		})
	}
	in := func(p string, f func(p string) error) func(string) {
		return func(dir string) {
			if err := f(filepath.Join(dir, p)); err != nil {
				t.Error(err)
			}
		}
	}
	link := func(p string) error { return os.Symlink("/etc/passwd", p) }
	fifo := func(p string) error { return syscall.Mkfifo(p, 0o600) }
	file := func(p string) error { return os.WriteFile(p, []byte("x"), 0o600) }
	ok("plain", func(string) {}, Selection{}, nil)
	ok("symbolic link", in("EFI/Linux/link", link), Selection{}, ErrSource)
	ok("symbolic link outside", in("EFI/link", link), Selection{}, nil)
	ok("symbolic link excluded", in("EFI/Linux/link", link), Selection{Exclude: []string{"EFI/Linux/link"}}, nil)
	ok("fifo", in("loader/fifo", fifo), Selection{}, ErrSource)
	ok("fifo excluded by name", in("loader/fifo", fifo), Selection{Exclude: []string{"fifo"}}, nil)
	ok("colon", in("EFI/Linux/a:b", file), Selection{}, ErrSource)
	ok("trailing dot", in("EFI/Linux/a.", file), Selection{}, ErrSource)
	ok("not UTF-8", in("EFI/Linux/a\xff", file), Selection{}, ErrSource)
	ok("case", in("EFI/Linux/LINUX.EFI", file), Selection{}, ErrSource)
	ok("case excluded", in("EFI/Linux/LINUX.EFI.tmp", file), Selection{}, nil)
	ok("own files", in("loader/random-seed", file), Selection{}, nil)
	ok("temporary file", in("EFI/Linux/x.tmp", file), Selection{}, nil)
}

// changingSource changes its files while they are read.
type changingSource struct {
	Source
	opened func(it *Item)
}

func (s *changingSource) Open(it *Item) (io.ReadCloser, error) {
	s.opened(it)
	return s.Source.Open(it)
}

// TestChangingSource changes the size of a file between the look at the directory and the reading of it.
func TestChangingSource(t *testing.T) {
	for _, what := range []string{"grows", "shrinks", "vanishes", "becomes empty"} {
		for _, present := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s/present %v", what, present), func(t *testing.T) {
				dir := writeFiles(t, bootFiles)
				m := newVolume(t, geometries[2])
				old := maps.Clone(bootFiles)
				if present {
					// The target has it already, so it is compared and never copied.
					if res := syncMem(t, newMemSource(old), m, Options{}); res.Err != nil {
						t.Fatal(res.Err)
					}
				} else {
					old = map[string]string{"loader/loader.conf": "old"}
					if res := syncMem(t, newMemSource(old), m, Options{}); res.Err != nil {
						t.Fatal(res.Err)
					}
				}
				src, err := OpenDirSource(dir)
				if err != nil {
					t.Fatal(err)
				}
				defer src.Close()
				p := filepath.Join(dir, "EFI/Linux/linux.efi")
				ch := &changingSource{src, func(it *Item) {
					if it.Name != "linux.efi" {
						return
					}
					switch what {
					case "grows":
						os.WriteFile(p, []byte(bootFiles["EFI/Linux/linux.efi"]+"more"), 0o600)
					case "shrinks":
						os.Truncate(p, 100)
					case "vanishes":
						os.Remove(p)
					case "becomes empty":
						os.Truncate(p, 0)
					}
				}}
				_, err = Sync(context.Background(), ch, []*Target{{Name: "t", Dev: m}}, Options{})
				if !errors.Is(err, ErrSource) {
					t.Fatalf("%v, want ErrSource", err)
				}
				judge(t, m, 2, old)
			})
		}
	}
}

// countingSource counts what is read of each file.
type countingSource struct {
	Source
	bytes atomic.Int64
	opens atomic.Int64
}

type countingReader struct {
	io.ReadCloser
	n *atomic.Int64
}

func (r countingReader) Read(p []byte) (int, error) {
	n, err := r.ReadCloser.Read(p)
	r.n.Add(int64(n))
	return n, err
}

func (s *countingSource) Open(it *Item) (io.ReadCloser, error) {
	rd, err := s.Source.Open(it)
	s.opens.Add(1)
	return countingReader{rd, &s.bytes}, err
}

func TestTooManySelected(t *testing.T) {
	defer func(n int) { maxSelected = n }(maxSelected)
	maxSelected = 2
	m := newVolume(t, geometries[3])
	before := bytes.Clone(m.Bytes())
	_, err := Sync(context.Background(), newMemSource(bootFiles), []*Target{{Name: "b", Dev: m}}, Options{})
	if !errors.Is(err, ErrSource) || !errors.Is(err, ErrRefused) || !bytes.Equal(before, m.Bytes()) {
		t.Error(err)
	}
}

// TestSeveralTargets syncs to three targets of different geometry, one of them failing: the source is read once.
func TestSeveralTargets(t *testing.T) {
	files := maps.Clone(bootFiles)
	files["EFI/Linux/big.efi"] = fixtures.Program(strings.Repeat("B", 3<<20))
	var total, opens int64
	for p, c := range files {
		total, opens = total+int64(len(c)), opens+1
		if isProgram(path.Base(p)) {
			total, opens = total+int64(len(fixtures.Program(""))), opens+1 // its headers, to see whether it is whole
		}
	}
	for i := range 8 {
		failing, jobs := i%4-1, i/4
		t.Run(fmt.Sprintf("failing %d, jobs %d", failing, jobs), func(t *testing.T) {
			t.Parallel()
			gs := []geometry{{"FAT12", fatdriver.FAT12, 8 << 20, 512, 8, 2}, geometries[3], geometries[5]}
			var targets []*Target
			var mems []*blockdev.Mem
			for i, g := range gs {
				m := newVolume(t, g)
				mems = append(mems, m)
				var d blockdev.Device = m
				if i == failing {
					n := 0
					d = blockdev.NewFaulty(m, func(op blockdev.Op) error {
						if op.Kind == blockdev.OpWrite && len(op.Data) > 100_000 {
							if n++; n == 2 {
								return errInjected
							}
						}
						return nil
					})
				}
				targets = append(targets, &Target{Name: g.name, Dev: d})
			}
			src := &countingSource{Source: newMemSource(files)}
			res, err := Sync(context.Background(), src, targets, Options{Jobs: jobs})
			if err != nil {
				t.Fatal(err)
			}
			if n := src.bytes.Load(); n != total || src.opens.Load() != opens {
				t.Errorf("%d bytes of %d read, %d files of %d opened", n, total, src.opens.Load(), opens)
			}
			for i := range res {
				if i == failing {
					if res[i].Outcome != Failed || !errors.Is(res[i].Err, errInjected) {
						t.Errorf("the failing target: %v %v", res[i].Outcome, res[i].Err)
					}
					judge(t, mems[i], gs[i].fats, nil)
					continue
				}
				if res[i].Outcome != Synced {
					t.Errorf("%s: %v %v", res[i].Target, res[i].Outcome, res[i].Err)
				}
				judge(t, mems[i], gs[i].fats, files)
			}
			if failing >= 0 {
				return
			}
			src.bytes.Store(0)
			res, err = Sync(context.Background(), src, targets, Options{})
			if err != nil || res[0].Outcome != InSync || res[1].Outcome != InSync || res[2].Outcome != InSync {
				t.Error(err, res)
			}
			if n := src.bytes.Load(); n != total {
				t.Errorf("comparing three targets read %d bytes of %d", n, total)
			}
		})
	}
}

// atOnce sees how many targets are at work at a time.
type atOnce struct {
	blockdev.Device
	now, most *atomic.Int32
}

func (d atOnce) enter() {
	n := d.now.Add(1)
	for m := d.most.Load(); n > m && !d.most.CompareAndSwap(m, n); m = d.most.Load() {
	}
	time.Sleep(50 * time.Microsecond) // long enough for another one to come in
}

func (d atOnce) ReadAt(p []byte, off int64) (int, error) {
	d.enter()
	defer d.now.Add(-1)
	return d.Device.ReadAt(p, off)
}

func (d atOnce) WriteAt(p []byte, off int64) (int, error) {
	d.enter()
	defer d.now.Add(-1)
	return d.Device.WriteAt(p, off)
}

// TestJobs counts who is at a target, in a first sync, in one that compares contents, and in a verification.
func TestJobs(t *testing.T) {
	files := maps.Clone(bootFiles)
	files["EFI/Linux/big.efi"] = fixtures.Program(strings.Repeat("B", 3<<20))
	src := newMemSource(files)
	for _, jobs := range []int{1, 2, 0} {
		var now, most atomic.Int32
		var targets []*Target
		for i := range 3 {
			targets = append(targets, &Target{Name: fmt.Sprint(i), Dev: atOnce{newVolume(t, geometries[3]), &now, &most}})
		}
		sync := func() ([]Result, error) { return Sync(context.Background(), src, targets, Options{Jobs: jobs}) }
		verify := func() ([]Result, error) { return Verify(context.Background(), src, targets, Options{Jobs: jobs}) }
		for i, f := range []func() ([]Result, error){sync, sync, verify} {
			most.Store(0)
			if _, err := f(); err != nil {
				t.Fatal(err)
			}
			if n := most.Load(); jobs > 0 && n > int32(jobs) || jobs == 0 && n < 2 {
				t.Errorf("run %d, jobs %d: %d targets at a time", i, jobs, n)
			}
		}
	}
}

// TestTargetsRefused gives Sync volumes that must not be written to; they stay as they are to the byte.
func TestTargetsRefused(t *testing.T) {
	fat32, fat16 := geometries[4], geometries[2]
	le := func(b []byte, v uint32, n int) {
		for i := range n {
			b[i] = byte(v >> (8 * i))
		}
	}
	refuse := func(name string, g geometry, change func(b []byte) []byte, want ...error) {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			m := newVolume(t, g)
			if res := syncMem(t, newMemSource(bootFiles), m, Options{}); res.Err != nil {
				t.Fatal(res.Err)
			}
			b := change(bytes.Clone(m.Bytes()))
			before := bytes.Clone(b)
			d := blockdev.NewCounting(blockdev.NewMem(b, 512))
			files := maps.Clone(bootFiles)
			files["EFI/Linux/new.efi"] = fixtures.Program("new")
			other := newVolume(t, fat16)
			res, err := Sync(context.Background(), newMemSource(files), []*Target{{Name: "t", Dev: d}, {Name: "other", Dev: other}}, Options{})
			if err != nil {
				t.Fatal(err)
			}
			if res[1].Outcome != Synced {
				t.Error("the other target: ", res[1].Outcome, res[1].Err)
			}
			if res[0].Outcome != Refused || res[0].Err == nil {
				t.Fatalf("%v, %v", res[0].Outcome, res[0].Err)
			}
			found := len(want) == 0
			for _, w := range want {
				found = found || errors.Is(res[0].Err, w)
			}
			if !found {
				t.Errorf("%v, want one of %v", res[0].Err, want)
			}
			if c := d.Counts(); c.Writes != 0 || !bytes.Equal(before, b) {
				t.Errorf("%d writes to a refused target", c.Writes)
			}
			if _, err := Recover(context.Background(), &Target{Name: "t", Dev: d}, RecoverOptions{}); err == nil || d.Counts().Writes != 0 {
				t.Errorf("recovery: %v, %d writes", err, d.Counts().Writes)
			}
		})
	}
	set := func(off int, v uint32, n int) func([]byte) []byte {
		return func(b []byte) []byte { le(b[off:], v, n); return b }
	}
	entry := func(g geometry, c int, v uint32) func([]byte) []byte {
		return func(b []byte) []byte {
			vol, err := fatdriver.Open(blockdev.NewMem(b, 512))
			if err != nil {
				t.Fatal(err)
			}
			geo := vol.Geometry()
			n := int(g.typ) / 8
			for f := range geo.NumFATs {
				le(b[int(geo.FATOff)+f*int(geo.FATSize)+c*n:], v, n)
			}
			return b
		}
	}
	refuse("three FATs", fat32, set(16, 3, 1))
	refuse("mirroring off", fat32, set(40, 0x80, 2), fatdriver.ErrNotTarget)
	refuse("FAT32 with few clusters", fat32, func(b []byte) []byte { le(b[32:], 60_000, 4); return b }, fatdriver.ErrNotTarget)
	refuse("FAT[0]", fat16, entry(fat16, 0, 0xFF00), fatdriver.ErrNotTarget)
	refuse("FAT[0] of FAT32", fat32, entry(fat32, 0, 0x0FFFFF00), fatdriver.ErrNotTarget)
	refuse("NTFS", fat32, func(b []byte) []byte { copy(b[3:], "NTFS    "); return b }, fatdriver.ErrNotFAT)
	refuse("exFAT", fat16, func(b []byte) []byte { copy(b[3:], "EXFAT   "); return b }, fatdriver.ErrNotFAT)
	refuse("zeros", fat16, func(b []byte) []byte { clear(b[:512]); return b }, fatdriver.ErrNotFAT)
	refuse("truncated", fat16, func(b []byte) []byte { return b[:len(b)/2] }, fatdriver.ErrNotTarget)
	refuse("truncated by a sector", fat32, func(b []byte) []byte { return b[:len(b)-512] }, fatdriver.ErrNotTarget)
	refuse("tiny", fat16, func(b []byte) []byte { return b[:512] })
	refuse("larger than the device", fat16, func(b []byte) []byte { le(b[32:], 1<<30, 4); le(b[19:], 0, 2); return b })
	for c := 2; c < 6; c++ {
		// The first clusters are those of a directory: free, out of range, a loop.
		for _, v := range []uint32{0, 1, 0xFFF0, uint32(c)} {
			refuse(fmt.Sprintf("chain of cluster %d is %x", c, v), fat16, func(b []byte) []byte {
				vol, _ := fatdriver.Open(blockdev.NewMem(b, 512))
				tree, err := vol.Scan()
				if err != nil {
					t.Fatal(err)
				}
				n := []string{"loader", "EFI", "EFI/BOOT", "EFI/Linux/linux.efi"}[c-2]
				return entry(fat16, int(lookup(tree.Root, n).Runs[0].First), map[uint32]uint32{uint32(c): uint32(lookup(tree.Root, n).Runs[0].First)}[v]|v&^uint32(c))(b)
			}, fatdriver.ErrDamaged)
		}
	}
}

// TestOwnFilesStay keeps what belongs to one ESP alone inside selected directories, whatever the source has there, and
// whatever is selected.
func TestOwnFilesStay(t *testing.T) {
	own := map[string]string{
		"loader/random-seed":              strings.Repeat("s", 32),
		"EFI/Linux/being written.tmp":     "half",
		"EFI/Linux/sub/.#lock":            "l",
		"EFI/Linux/user.bak":              "mine",
		"EFI/Linux/kept/deep/user.bak":    "mine too",
		"EFI/BOOT/grubenv":                "env",
		"EFI/fedora/fw/update.cap":        "cap",
		"EFI/Microsoft/Boot/bootmgfw.efi": fixtures.Program("boot"),
	}
	foreign := map[string]string{
		"loader/random-seed":            "the source's",
		"EFI/Linux/being written.tmp":   "the source's",
		"EFI/Linux/user.bak":            "the source's",
		"EFI/BOOT/grubenv":              "the source's",
		"EFI/espmirror/journal":         strings.Repeat("the source's", 900),
		"EFI/espmirror/state":           "the source's",
		"EFI/Microsoft/Boot/source.efi": fixtures.Program("the source's"),
	}
	for _, selected := range [][]string{nil, {"EFI", "loader"}, {""}, {"EFI/BOOT", "EFI/Linux", "loader"}} {
		for _, g := range []geometry{geometries[2], geometries[4]} {
			t.Run(fmt.Sprint(selected, "/", g.name), func(t *testing.T) {
				t.Parallel()
				m := newVolume(t, g)
				first := maps.Clone(bootFiles)
				maps.Copy(first, own)
				// Own files are not copied, so they are put there by hand.
				if res := syncMem(t, newMemSource(first), m, Options{Selection: Selection{Select: []string{"loader", "EFI"}}}); res.Err != nil {
					t.Fatal(res.Err)
				}
				putOwn(t, m, own)
				src := map[string]string{"loader/loader.conf": "new", "EFI/BOOT/BOOTX64.EFI": fixtures.Program("new"), "EFI/Linux/other.efi": fixtures.Program("other")}
				want := maps.Clone(src)
				maps.Copy(want, own)
				maps.Copy(src, foreign)
				o := Options{Selection: Selection{Select: selected, Exclude: []string{"*.bak"}}}
				for i := range 2 {
					res := syncMem(t, newMemSource(src), m, o)
					if res.Err != nil || i == 1 && res.Outcome != InSync {
						t.Fatal(i, res.Outcome, res.Err, res.Summary.Changes)
					}
					judge(t, m, g.fats, want)
				}
				fsck(t, m)
				v, tree := scanned(t, m)
				if log, _, _, err := findJournal(v, tree); log == nil || err != nil || lookup(tree.Root, "EFI/espmirror/state") != nil {
					t.Errorf("journal %v, %v; state %v", log, err, lookup(tree.Root, "EFI/espmirror/state"))
				}
			})
		}
	}
}

// putOwn makes files on a volume, each in one transaction of the driver.
func putOwn(t testing.TB, m *blockdev.Mem, files map[string]string) {
	t.Helper()
	for p, content := range files {
		_, tree := scanned(t, m)
		parts := strings.Split(p, "/")
		top := childNode(tree.Root, parts[0])
		var old *fatdriver.Want
		if top == nil {
			old = &fatdriver.Want{Name: parts[0], Dir: true}
		} else {
			old = fatdriver.Carry(top)
		}
		w := old
		for i, name := range parts[1:] {
			var next *fatdriver.Want
			for _, c := range w.Children {
				if fatdriver.Fold(c.Name) == fatdriver.Fold(name) {
					next = c
				}
			}
			if next == nil {
				next = &fatdriver.Want{Name: name, Dir: i+2 < len(parts), Size: int64(len(content)), Meta: fatdriver.Meta{Modified: time.Unix(1e9, 0)}}
				if next.Dir {
					next.Size = 0
				}
				w.Children = append(w.Children, next)
			}
			w = next
		}
		plan, err := tree.NewPlan([]fatdriver.Step{{{Parent: tree.Root, Old: top, New: old}}}, 0)
		if err != nil {
			t.Fatal(err)
		}
		tx := plan.Begin()
		for _, f := range plan.Files {
			fw := tx.File(f)
			io.WriteString(fw, content)
			if err := fw.Close(); err != nil {
				t.Fatal(err)
			}
		}
		for _, f := range []func() error{tx.WriteDirs, tx.WriteFAT, tx.Flush, func() error { return tx.Commit(0) }, tx.Free, tx.Finish} {
			if len(plan.Blocks) == 0 {
				break
			}
			if err := f(); err != nil {
				t.Fatal(err)
			}
		}
	}
}

// TestOwnFilesBlock has a file on the source where the target has a directory with files of its own: they must not go.
func TestOwnFilesBlock(t *testing.T) {
	m := newVolume(t, geometries[2])
	if res := syncMem(t, newMemSource(bootFiles), m, Options{}); res.Err != nil {
		t.Fatal(res.Err)
	}
	putOwn(t, m, map[string]string{"EFI/Linux/thing/lock.tmp": "mine"})
	before := bytes.Clone(m.Bytes())
	files := maps.Clone(bootFiles)
	files["EFI/Linux/thing"] = "a file"
	res := syncMem(t, newMemSource(files), m, Options{})
	if res.Outcome != Refused || !errors.Is(res.Err, ErrRefused) || !bytes.Equal(before, m.Bytes()) {
		t.Fatal(res.Outcome, res.Err)
	}
	_ = fixtures.Count
}
