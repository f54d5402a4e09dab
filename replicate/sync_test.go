package replicate

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path"
	"path/filepath"
	"runtime/debug"
	"sort"
	"strings"
	"testing"

	"espmirror/blockdev"
	"espmirror/fatdriver"
	"espmirror/fixtures"
)

func TestMain(m *testing.M) {
	debug.SetGCPercent(400) // volumes in memory come and go
	os.Exit(fixtures.Main(m))
}

// memSource is a source in memory: path → content.
type memSource struct {
	files map[string]string
	root  *Item
	reads map[string]int
}

func newMemSource(files map[string]string) *memSource {
	s := &memSource{files: files, root: &Item{Dir: true}, reads: map[string]int{}}
	var paths []string
	for p := range files {
		paths = append(paths, p)
	}
	sort.Strings(paths)
	for _, p := range paths {
		at := s.root
		parts := strings.Split(p, "/")
		for i, name := range parts {
			full := strings.Join(parts[:i+1], "/")
			c := at.child(name)
			if c == nil {
				c = &Item{Name: name, Path: full, Dir: i+1 < len(parts)}
				at.Children = append(at.Children, c)
			}
			at = c
		}
		if strings.HasSuffix(p, "/") {
			continue
		}
		at.Size = int64(len(files[p]))
	}
	return s
}

func (s *memSource) Name() string { return "memory" }
func (s *memSource) Root() *Item  { return s.root }
func (s *memSource) Close() error { return nil }
func (s *memSource) Open(it *Item) (io.ReadCloser, error) {
	s.reads[it.Path]++
	return io.NopCloser(strings.NewReader(s.files[it.Path])), nil
}

// geometry is one kind of target.
type geometry struct {
	name   string
	typ    fatdriver.Type
	size   int64
	sector int
	spc    int
	fats   int
}

var geometries = []geometry{
	{"FAT12", fatdriver.FAT12, 1 << 20, 512, 1, 2},
	{"FAT12x1", fatdriver.FAT12, 2 << 20, 512, 2, 1},
	{"FAT16", fatdriver.FAT16, 8 << 20, 512, 1, 2},
	{"FAT16-4k", fatdriver.FAT16, 32 << 20, 4096, 1, 2},
	{"FAT32", fatdriver.FAT32, 36 << 20, 512, 1, 2},
	{"FAT32x1", fatdriver.FAT32, 36 << 20, 512, 1, 1},
}

func newVolume(t testing.TB, g geometry) *blockdev.Mem {
	t.Helper()
	m := blockdev.NewMem(make([]byte, g.size), g.sector)
	err := fatdriver.Format(m, fatdriver.FormatOptions{Type: g.typ, SectorSize: g.sector, SectorsPerCluster: g.spc, NumFATs: g.fats, Serial: 0x1234ABCD, Label: "ESP", Align: 1})
	if err != nil {
		t.Fatal(err)
	}
	return m
}

func syncMem(t testing.TB, src Source, dev blockdev.Device, o Options) Result {
	t.Helper()
	res, err := Sync(context.Background(), src, []*Target{{Name: "b.img", Dev: dev}}, o)
	if err != nil {
		t.Fatal(err)
	}
	return res[0]
}

// judge reads the volume strictly through each FAT copy and compares it with what is wanted.
func judge(t testing.TB, m *blockdev.Mem, fats int, want map[string]string) {
	t.Helper()
	for n := 0; n < fats; n++ {
		tree, err := fixtures.ReadStrict(bytes.NewReader(m.Bytes()), m.Size(), n)
		if err != nil {
			t.Fatalf("FAT copy %d: %v", n, err)
		}
		have := map[string]string{}
		for i := range tree.Entries {
			e := &tree.Entries[i]
			if e.Dir || strings.HasPrefix(fatdriver.Fold(e.Path), "EFI/ESPMIRROR") {
				continue
			}
			b, err := tree.Read(e)
			if err != nil {
				t.Fatal(err)
			}
			have[e.Path] = string(b)
		}
		for p, c := range want {
			if have[p] != c {
				t.Fatalf("FAT copy %d: %s has %d bytes, want %d, present %v", n, p, len(have[p]), len(c), have[p] != "" || c == "")
			}
		}
		for p := range have {
			if _, ok := want[p]; !ok {
				t.Fatalf("FAT copy %d: %s should not be there", n, p)
			}
		}
		if lost, err := tree.Lost(); err != nil || len(lost) > 0 {
			t.Fatalf("FAT copy %d: lost clusters %v %v", n, lost, err)
		}
		if _, err := tree.CheckFSInfo(false); err != nil {
			t.Fatal(err)
		}
	}
}

func fsck(t testing.TB, m *blockdev.Mem) {
	t.Helper()
	p := filepath.Join(t.TempDir(), "v.img")
	if err := os.WriteFile(p, m.Bytes(), 0o600); err != nil {
		t.Fatal(err)
	}
	f, err := fixtures.Fsck(p)
	if err == nil {
		err = f.Err(0)
	}
	if err != nil {
		t.Fatal(err)
	}
}

func content(rng *rand.Rand, max int) string {
	b := make([]byte, rng.IntN(max))
	for i := range b {
		b[i] = byte(rng.Uint32())
	}
	return string(b)
}

// mutate changes a tree as life does.
func mutate(rng *rand.Rand, files map[string]string, big int) {
	var paths []string
	for p := range files {
		paths = append(paths, p)
	}
	sort.Strings(paths)
	pick := func() string { return paths[rng.IntN(len(paths))] }
	names := []string{"vmlinuz-6.1.0-13-amd64", "INITRD.IMG", "initrd.img", "Grüße aus 中国 😀.efi", "a", "B.c", "linux", strings.Repeat("n", 200)}
	dirs := []string{"EFI/Linux", "EFI/BOOT", "loader/entries", "0123456789abcdef0123456789abcdef/6.1", "EFI/Linux/deep/er/and/deeper", "loader", "0123456789abcdef0123456789abcdef/6.2"}
	for range 1 + rng.IntN(6) {
		switch rng.IntN(8) {
		case 0, 1, 2:
			p := path.Join(dirs[rng.IntN(len(dirs))], fmt.Sprintf("%s-%d", names[rng.IntN(len(names))], rng.IntN(9)))
			if rng.IntN(3) == 0 {
				p = path.Join(dirs[rng.IntN(len(dirs))], names[rng.IntN(len(names))])
			}
			files[p] = content(rng, big)
		case 3:
			files[pick()] = content(rng, big)
		case 4:
			if len(files) > 3 {
				delete(files, pick())
			}
		case 5: // rename
			p := pick()
			if c, ok := files[p]; ok {
				delete(files, p)
				files[p+"x"] = c
			}
		case 6: // swap
			a, b := pick(), pick()
			if _, ok := files[a]; ok {
				if _, ok := files[b]; ok {
					files[a], files[b] = files[b], files[a]
				}
			}
		case 7: // case
			p := pick()
			if c, ok := files[p]; ok {
				delete(files, p)
				files[path.Join(path.Dir(p), strings.ToUpper(path.Base(p)))] = c
			}
		}
	}
	// A file and a directory of one name cannot both be, nor two names that FAT takes for one.
	seen := map[string]string{}
	paths = paths[:0]
	for p := range files {
		paths = append(paths, p)
	}
	sort.Strings(paths)
	for _, p := range paths {
		k := fatdriver.Fold(p)
		if _, dup := seen[k]; dup {
			delete(files, p)
			continue
		}
		seen[k] = p
	}
	for p := range files {
		for d := path.Dir(p); d != "."; d = path.Dir(d) {
			if q, ok := seen[fatdriver.Fold(d)]; ok {
				delete(files, q)
			}
		}
	}
	for p, c := range files {
		if isProgram(path.Base(p)) {
			files[p] = fixtures.AsProgram(c)
		}
	}
}

var testSelect = Selection{Select: []string{"loader", "EFI/Linux", "EFI/BOOT", "0123456789abcdef0123456789abcdef"}}

func TestSyncRandomTrees(t *testing.T) {
	for _, g := range geometries {
		t.Run(g.name, func(t *testing.T) {
			t.Parallel()
			rng := rand.New(rand.NewPCG(1, 2))
			m := newVolume(t, g)
			files := map[string]string{"EFI/BOOT/BOOTX64.EFI": fixtures.Program("boot"), "loader/loader.conf": "timeout 3\n", "loader/entries/a.conf": "title a\n"}
			for i := range 40 {
				mutate(rng, files, 9000)
				res := syncMem(t, newMemSource(files), m, Options{Selection: testSelect})
				if res.Err != nil {
					t.Fatalf("step %d: %v", i, res.Err)
				}
				judge(t, m, g.fats, files)
				if i%10 == 0 {
					fsck(t, m)
				}
				again := blockdev.NewCounting(m)
				if res := syncMem(t, newMemSource(files), again, Options{Selection: testSelect}); res.Err != nil || res.Outcome != InSync || again.Counts().Writes != 0 {
					t.Fatalf("step %d: second sync: %v %v, %d writes, changes %v", i, res.Outcome, res.Err, again.Counts().Writes, res.Summary.Changes)
				}
			}
		})
	}
}
