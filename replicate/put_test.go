package replicate

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"espmirror/blockdev"
	"espmirror/fatdriver"
	"espmirror/fixtures"
)

func putMem(t testing.TB, dev blockdev.Device, o Options, files ...File) Result {
	t.Helper()
	res, err := Put(context.Background(), &Target{Name: "b.img", Dev: dev}, files, o)
	if err != nil {
		t.Fatal(err)
	}
	return res
}

// readFiles reads all files of a volume, our own too.
func readFiles(v fixtures.Volume, fatCopy int) (map[string]string, error) {
	var trees fixtures.Trees
	tree, err := trees.Read(v, fatCopy, true)
	if err != nil {
		return nil, err
	}
	out := map[string]string{}
	for i := range tree.Entries {
		if e := &tree.Entries[i]; !e.Dir {
			b, err := tree.Read(e)
			if err != nil {
				return nil, err
			}
			out[e.Path] = string(b)
		}
	}
	return out, nil
}

// oldOrNew says what is wrong with the files of a volume when some are being put: each is the old one or the new one, and
// no other is touched. The journal is not looked at.
func oldOrNew(have, before map[string]string, files []File) error {
	put := map[string]string{}
	for _, f := range files {
		put[f.Path] = string(f.Content)
	}
	for p, c := range have {
		old, was := before[p]
		fresh, is := put[p]
		if p != journalPath && !(was && c == old) && !(is && c == fresh) {
			return fmt.Errorf("%s is %q, it was %q and shall be %q", p, c, old, fresh)
		}
	}
	for p := range before {
		if _, ok := have[p]; !ok {
			return fmt.Errorf("%s is gone", p)
		}
	}
	return nil
}

// putCase is a volume and what is put on it.
type putCase struct {
	name   string
	before map[string]string // put there first; nil for an empty volume
	files  []File
}

func bytesOf(s string, n int) []byte { return []byte(strings.Repeat(s, n)) }

func putCases() []putCase {
	base := map[string]string{
		"EFI/BOOT/BOOTX64.EFI":     "MZ boot",
		"loader/loader.conf":       "timeout 3\n",
		"loader/esp-sync":          "member a\n",
		"loader/random-seed":       strings.Repeat("s", 32),
		"EFI/espmirror/state":      "old state",
		"EFI/espmirror/old and by": "stays",
	}
	return []putCase{
		{"nothing there", nil, []File{
			{Path: "EFI/espmirror/state", Content: []byte("new state")},
			{Path: "loader/esp-sync", Content: bytesOf("member b\n", 100)},
		}},
		{"one of our own", base, []File{{Path: "EFI/espmirror/state", Content: bytesOf("state ", 300)}}},
		{"several directories", base, []File{
			{Path: "EFI/espmirror/state", Content: []byte("new state")},
			{Path: "EFI/espmirror/a new name.log", Content: []byte("new")},
			{Path: "loader/esp-sync", Content: []byte("member a\nmember b\n")},
			{Path: "loader/random-seed", Content: bytesOf("t", 32)},
			{Path: "loader/deep/er/new.conf", Content: nil},
		}},
	}
}

// prepare makes the volume of a case, and says what is on it.
func (c putCase) prepare(t testing.TB, g geometry) (*blockdev.Mem, map[string]string) {
	t.Helper()
	m := newVolume(t, g)
	var files []File
	for p, s := range c.before {
		files = append(files, File{Path: p, Content: []byte(s)})
	}
	if len(files) > 0 {
		putMem(t, m, Options{}, files...)
	}
	before, err := readFiles(m, 0)
	if err != nil {
		t.Fatal(err)
	}
	delete(before, journalPath)
	return m, before
}

// recordPut puts the files of a case on a copy of its volume, and collects the trees at the barriers.
func (c putCase) record(t testing.TB, g geometry) (*crashRun, map[string]string) {
	t.Helper()
	m, before := c.prepare(t, g)
	r := fixtures.NewRecorder(fixtures.Image(m.Bytes()), g.sector)
	if res := putMem(t, r, Options{}, c.files...); res.Outcome != Synced {
		t.Fatal(res.Outcome, res.Err)
	}
	run := &crashRun{g: g, rec: r.Recording()}
	run.watch(t)
	return run, before
}

// watch collects the trees at the barriers of a recording.
func (c *crashRun) watch(t testing.TB) {
	t.Helper()
	base := make([]byte, c.rec.Base.Size())
	if _, err := c.rec.Base.ReadAt(base, 0); err != nil {
		t.Fatal(err)
	}
	c.barriers(t, base)
}

var putGeometries = []geometry{geometries[0], geometries[3], geometries[4]}

// TestPut writes files, reads them back by another reader, and writes nothing the second time.
func TestPut(t *testing.T) {
	for _, g := range geometries {
		for _, c := range putCases() {
			t.Run(g.name+"/"+c.name, func(t *testing.T) {
				t.Parallel()
				m, want := c.prepare(t, g)
				image := bytes.Clone(m.Bytes())
				dry, err := Put(context.Background(), &Target{Name: "b.img", Dev: blockdev.NewReadOnly(m)}, c.files, Options{DryRun: true})
				if err != nil || dry.Outcome != Differs || !bytes.Equal(image, m.Bytes()) {
					t.Fatalf("dry run: %v, %v", dry.Outcome, err)
				}
				n := blockdev.NewCounting(m)
				res := putMem(t, n, Options{}, c.files...)
				if res.Outcome != Synced {
					t.Fatal(res.Outcome)
				}
				if n := n.Counts(); n.BytesWritten != dry.Summary.BytesToWrite || int(n.Flushes) != dry.Summary.Flushes {
					t.Errorf("wrote %d bytes with %d flushes, the plan said %d and %d", n.BytesWritten, n.Flushes, dry.Summary.BytesToWrite, dry.Summary.Flushes)
				}
				for _, f := range c.files {
					want[f.Path] = string(f.Content)
				}
				for copy := range g.fats {
					have, err := readFiles(m, copy)
					if err != nil {
						t.Fatal(err)
					}
					delete(have, journalPath)
					if fmt.Sprint(have) != fmt.Sprint(want) {
						t.Fatalf("FAT copy %d has %q, want %q", copy, have, want)
					}
				}
				fsck(t, m)
				n = blockdev.NewCounting(m)
				if res := putMem(t, n, Options{}, c.files...); res.Outcome != InSync || n.Counts().Writes > 0 {
					t.Errorf("again: %v, %d writes", res.Outcome, n.Counts().Writes)
				}
				// One file that differs does not make the others be written.
				some := append([]File{{Path: "loader/loader.conf", Content: []byte("timeout 9\n")}}, c.files...)
				if res := putMem(t, m, Options{}, some...); res.Outcome != Synced || len(res.Summary.Changes) != 1 {
					t.Errorf("one more: %v, changes %v", res.Outcome, res.Summary.Changes)
				}
			})
		}
	}
}

// TestPutPowerCut judges the states of a cut at any moment: each file old or new, the rest untouched, before recovery and
// after it.
func TestPutPowerCut(t *testing.T) {
	for _, g := range putGeometries {
		for _, pc := range putCases() {
			t.Run(g.name+"/"+pc.name, func(t *testing.T) {
				t.Parallel()
				c, before := pc.record(t, g)
				judge := func(s fixtures.Volume) error {
					for n := range g.fats {
						have, err := readFiles(s, n)
						if err == nil {
							err = oldOrNew(have, before, pc.files)
						}
						if err != nil {
							return fmt.Errorf("FAT copy %d: %w", n, err)
						}
					}
					return nil
				}
				stats, err := c.rec.ExploreLazy(fixtures.CrashOptions{Limit: 300}, func(s *fixtures.State) error {
					if _, err := c.visible(s); err != nil {
						return err
					}
					return judge(s)
				})
				if err != nil {
					t.Fatal(err)
				}
				fixtures.Count("states", stats.States)
				stats, err = c.rec.Explore(fixtures.CrashOptions{Limit: 64, Random: 10, Seed: 1}, func(s *fixtures.State) error {
					k, err := c.visible(s)
					if err == nil {
						err = c.recovered(s, k)
					}
					if err != nil {
						return err
					}
					return judge(s)
				})
				if err != nil {
					t.Fatal(err)
				}
				fixtures.Count("states", stats.States)
			})
		}
	}
}

// TestPutFaults fails every operation in turn.
func TestPutFaults(t *testing.T) {
	for _, g := range putGeometries {
		for _, pc := range putCases() {
			t.Run(g.name+"/"+pc.name, func(t *testing.T) {
				t.Parallel()
				c, before := pc.record(t, g)
				for _, kind := range faults {
					for k := 0; ; k += kind.step(g) {
						d := &failing{Recorder: fixtures.NewRecorder(c.rec.Base, g.sector), fault: kind, k: k}
						res, err := Put(context.Background(), &Target{Name: "bad", Dev: d}, pc.files, Options{})
						at := fmt.Sprintf("%s %d: %v, %v", kind.name, k, res.Outcome, err)
						if (err == nil) != (res.Err == nil) {
							t.Fatal(at)
						}
						if !d.fired {
							if res.Outcome != Synced {
								t.Fatal(at)
							}
							break
						}
						if err := c.afterFault(d, &res); err != nil {
							t.Fatalf("%s: %v", at, err)
						}
						have, err := readFiles(d.State, 0)
						if err == nil {
							err = oldOrNew(have, before, pc.files)
						}
						if err != nil {
							t.Fatalf("%s: %v", at, err)
						}
					}
				}
			})
		}
	}
}

// TestPutRefuses wants a refusal, and not a byte written.
func TestPutRefuses(t *testing.T) {
	m, _ := putCases()[1].prepare(t, geometries[2])
	image := bytes.Clone(m.Bytes())
	full := context.Background()
	gone, cancel := context.WithCancel(context.Background())
	cancel()
	for _, c := range []struct {
		ctx   context.Context
		files []File
		o     Options
		want  error
	}{
		{full, []File{{Path: journalPath, Content: []byte("x")}}, Options{}, ErrRefused},
		{full, []File{{Path: `\efi\ESPMIRROR\Journal`, Content: []byte("x")}}, Options{}, ErrRefused},
		{full, []File{{Path: "EFI/espmirror/journal/x", Content: []byte("x")}}, Options{}, ErrRefused},
		{full, []File{{Path: "EFI/espmirror", Content: []byte("x")}}, Options{}, ErrRefused},
		{full, []File{{Path: "/", Content: []byte("x")}}, Options{}, ErrRefused},
		{full, []File{{Path: "loader", Content: []byte("x")}}, Options{}, ErrRefused},
		{full, []File{{Path: "EFI/BOOT", Content: []byte("x")}}, Options{}, ErrRefused},
		{full, []File{{Path: "loader/loader.conf/x", Content: []byte("x")}}, Options{}, ErrRefused},
		{full, []File{{Path: "loader/../x", Content: []byte("x")}}, Options{}, ErrSelection},
		{full, []File{{Path: "loader/a:b", Content: []byte("x")}}, Options{}, fatdriver.ErrName},
		{full, []File{{Path: "loader/big", Content: make([]byte, 8<<20)}}, Options{}, fatdriver.ErrNoSpace},
		{full, []File{{Path: "loader/x", Content: []byte("x")}}, Options{KeepFree: 1 << 62}, fatdriver.ErrNoSpace},
		{gone, []File{{Path: "loader/x", Content: []byte("x")}}, Options{}, context.Canceled},
		{full, []File{{Path: "a", Content: []byte("x")}, {Path: "A", Content: []byte("y")}}, Options{}, nil},
		{full, []File{{Path: "a", Content: []byte("x")}, {Path: "A/b", Content: []byte("y")}}, Options{}, nil},
	} {
		res, err := Put(c.ctx, &Target{Name: "b.img", Dev: m}, c.files, c.o)
		if err == nil || res.Err == nil || c.want != nil && !errors.Is(err, c.want) {
			t.Errorf("%q: %v, want %v", c.files[0].Path, err, c.want)
		}
		if c.want == nil || c.want == context.Canceled {
			continue
		}
		if c.want != ErrSelection && res.Outcome != Refused {
			t.Errorf("%q: outcome %q", c.files[0].Path, res.Outcome)
		}
	}
	if !bytes.Equal(image, m.Bytes()) {
		t.Error("a refused volume was written to")
	}
}

// TestPutSizes has a file grow and shrink, to nothing and back.
func TestPutSizes(t *testing.T) {
	m, _ := putCases()[1].prepare(t, geometries[2])
	for _, n := range []int{3000, 10, 0, 700} {
		putMem(t, m, Options{}, File{Path: "loader/esp-sync", Content: bytesOf("#", n)})
		_, tree := scanned(t, m)
		node := tree.Lookup("loader/esp-sync")
		if node.Size() != int64(n) || n == 0 && len(node.Runs) > 0 {
			t.Fatalf("%d bytes: size %d, runs %v", n, node.Size(), node.Runs)
		}
		fsck(t, m)
	}
}

// listing is every path below a directory with its content; directories end in a slash.
func listing(t *testing.T, dir string) map[string]string {
	t.Helper()
	out := map[string]string{}
	err := filepath.Walk(dir, func(p string, info os.FileInfo, err error) error {
		if err != nil {
			return err
		}
		rel, _ := filepath.Rel(dir, p)
		if info.IsDir() {
			out[rel+"/"] = ""
			return nil
		}
		b, err := os.ReadFile(p)
		out[rel] = string(b)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return out
}

func TestPutDir(t *testing.T) {
	dir := writeFiles(t, map[string]string{"EFI/BOOT/X.EFI": "x", "LOADER/Esp-Sync": "old", "EFI/ESPMIRROR/.btmp.espmirror-00ff": "left", "LOADER/.btmp.other": "not ours"})
	when := time.Date(2024, 5, 6, 7, 8, 10, 0, time.UTC)
	files := []File{
		{Path: "EFI/espmirror/state", Content: []byte("state"), Meta: fatdriver.Meta{Modified: when}},
		{Path: "loader/esp-sync", Content: []byte("new")},
		{Path: "new/dir/file", Content: nil},
	}
	if err := PutDir(dir, files); err != nil {
		t.Fatal(err)
	}
	want := map[string]string{
		"./": "", "EFI/": "", "EFI/BOOT/": "", "EFI/BOOT/X.EFI": "x", "EFI/ESPMIRROR/": "", "EFI/ESPMIRROR/state": "state",
		"LOADER/": "", "LOADER/Esp-Sync": "new", "LOADER/.btmp.other": "not ours", "new/": "", "new/dir/": "", "new/dir/file": "",
	}
	if have := listing(t, dir); fmt.Sprint(have) != fmt.Sprint(want) {
		t.Fatalf("have %q\nwant %q", have, want)
	}
	info, err := os.Stat(filepath.Join(dir, "EFI/ESPMIRROR/state"))
	if err != nil || info.Mode().Perm() != 0o600 || !info.ModTime().Equal(when) {
		t.Fatal(info.Mode(), info.ModTime(), err)
	}
	// The second time the files stay the very ones they are.
	inode := func(p string) uint64 {
		var st unix.Stat_t
		if err := unix.Stat(filepath.Join(dir, p), &st); err != nil {
			t.Fatal(err)
		}
		return st.Ino
	}
	a, b := inode("EFI/ESPMIRROR/state"), inode("LOADER")
	left := filepath.Join(dir, "LOADER", tempPrefix+"1")
	if err := os.WriteFile(left, []byte("n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := PutDir(dir, files); err != nil {
		t.Fatal(err)
	}
	if inode("EFI/ESPMIRROR/state") != a || inode("LOADER") != b {
		t.Error("what was there already was written again")
	}
	if have := listing(t, dir); fmt.Sprint(have) != fmt.Sprint(want) {
		t.Fatalf("have %q\nwant %q", have, want)
	}
}

func TestPutDirRefuses(t *testing.T) {
	outside := writeFiles(t, map[string]string{"f": "outside"})
	dir := writeFiles(t, map[string]string{"loader/f/g": "x", "file": "x", "t": "x"})
	for from, to := range map[string]string{"out": outside, "loader/link": "../t", "up": "../../../../../../../../../../etc"} {
		if err := os.Symlink(to, filepath.Join(dir, from)); err != nil {
			t.Fatal(err)
		}
	}
	if err := unix.Mkfifo(filepath.Join(dir, "loader/pipe"), 0o600); err != nil {
		t.Fatal(err)
	}
	before := len(listingNoPipe(t, dir))
	for p, words := range map[string]string{
		"loader/f": "directory", "loader/pipe": "pipe", "loader/link": "symbolic link", "file/x": "not a directory", "out/f": "escapes", "up/passwd": "escapes",
		"../x": "not the name of a file", journalPath: "refused",
	} {
		err := PutDir(dir, []File{{Path: p, Content: []byte("new")}})
		if err == nil || !strings.Contains(err.Error(), words) || !strings.Contains(err.Error(), filepath.Base(p)) {
			t.Errorf("%s: %v, want %q", p, err, words)
		}
	}
	if have := listing(t, outside); have["f"] != "outside" || len(have) != 2 {
		t.Errorf("outside: %q", have)
	}
	if after := len(listingNoPipe(t, dir)); after != before {
		t.Errorf("%d names became %d", before, after)
	}
	if err := PutDir(filepath.Join(dir, "none"), []File{{Path: "x"}}); err == nil {
		t.Error("there is no such directory")
	}
}

func listingNoPipe(t *testing.T, dir string) []string {
	t.Helper()
	var out []string
	if err := filepath.Walk(dir, func(p string, _ os.FileInfo, err error) error { out = append(out, p); return err }); err != nil {
		t.Fatal(err)
	}
	return out
}

// TestPutDirWaits has two runs in one directory: neither removes the other's file.
func TestPutDirWaits(t *testing.T) {
	dir := writeFiles(t, map[string]string{"loader/x": "0"})
	errs := make(chan error)
	for i := range 8 {
		go func() {
			var err error
			for n := 0; n < 20 && err == nil; n++ {
				err = PutDir(dir, []File{{Path: "loader/x", Content: fmt.Appendf(nil, "%d-%d", i, n)}})
			}
			errs <- err
		}()
	}
	for range 8 {
		if err := <-errs; err != nil {
			t.Error(err)
		}
	}
	if have := listing(t, dir); len(have) != 3 || !strings.HasSuffix(have["loader/x"], "-19") {
		t.Errorf("%q", have)
	}
}

// TestPutDirFaults fails each step in turn: the error comes back, each file is the old one or the new one, and a second
// run does all and leaves nothing behind.
func TestPutDirFaults(t *testing.T) {
	files := []File{{Path: "loader/esp-sync", Content: []byte("new set")}, {Path: "EFI/espmirror/state", Content: []byte("new state")}}
	old := map[string]string{"loader/esp-sync": "old set", "EFI/espmirror/state": ""} // the second one is not there
	seen := map[string]bool{}
	broken := errors.New("broken")
	for k := 0; ; k++ {
		dir := t.TempDir()
		if err := errors.Join(os.Mkdir(filepath.Join(dir, "loader"), 0o755), os.WriteFile(filepath.Join(dir, "loader/esp-sync"), []byte("old set"), 0o600)); err != nil {
			t.Fatal(err)
		}
		n, failed := 0, ""
		w := dirWriter{func(step string) error {
			if n++; n-1 == k {
				failed = step
				return broken
			}
			return nil
		}}
		err := w.put(dir, files)
		if failed == "" {
			if err != nil {
				t.Fatal(err)
			}
			break
		}
		seen[failed] = true
		if !errors.Is(err, broken) || !strings.Contains(err.Error(), dir) {
			t.Errorf("step %d, %s: %v", k, failed, err)
		}
		for _, f := range files {
			have, err := os.ReadFile(filepath.Join(dir, f.Path))
			if s := string(have); s != string(f.Content) && (s != old[f.Path] || err != nil && s == "" && !errors.Is(err, fs.ErrNotExist)) {
				t.Errorf("step %d, %s: %s is %q, %v", k, failed, f.Path, s, err)
			}
		}
		if err := PutDir(dir, files); err != nil {
			t.Errorf("step %d, %s, then again: %v", k, failed, err)
		}
		var have []string
		if err := filepath.WalkDir(dir, func(p string, e fs.DirEntry, err error) error {
			if err == nil && !e.IsDir() {
				have = append(have, e.Name())
			}
			return err
		}); err != nil || !slices.Equal(have, []string{"state", "esp-sync"}) {
			t.Errorf("step %d, %s: left are %q, %v", k, failed, have, err)
		}
	}
	for _, step := range []string{"mkdir", "write", "sync file", "rename", "sync directory", "syncfs"} {
		if !seen[step] {
			t.Errorf("%s never failed", step)
		}
	}
}
