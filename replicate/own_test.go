package replicate

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"math"
	"os"
	"path/filepath"
	"sort"
	"strings"
	"testing"
	"time"

	"espmirror/blockdev"
	"espmirror/fatdriver"
	"espmirror/fixtures"
)

// refuses syncs and wants a refusal with the words, and no byte written.
func refuses(t *testing.T, src Source, m *blockdev.Mem, o Options, words string) {
	t.Helper()
	before := bytes.Clone(m.Bytes())
	res, err := Sync(context.Background(), src, []*Target{{Name: "b.img", Dev: m}}, o)
	if err == nil {
		err = res[0].Err
	}
	if err == nil || !strings.Contains(err.Error(), words) {
		t.Errorf("error is %v, want one with %q", err, words)
	}
	if !bytes.Equal(before, m.Bytes()) {
		t.Error("a refused target was written to")
	}
}

// A new entry of a directory that keeps its place must not have the short name of one that is there: the two would be
// the same file for half of the readers, and the next run would refuse the volume as damaged.
func TestNameEqualsAliasOfUnselected(t *testing.T) {
	for _, g := range []geometry{geometries[2], geometries[4]} {
		m := newVolume(t, g)
		files := map[string]string{"a long name of its own.efi": fixtures.Program("x"), "loader/loader.conf": "y"}
		if r := syncMem(t, newMemSource(files), m, Options{Selection: Selection{Select: []string{"/"}}}); r.Err != nil {
			t.Fatal(r.Err)
		}
		alias := map[string]string{"ALONGN~1.EFI": fixtures.Program("other")}
		refuses(t, newMemSource(alias), m, Options{Selection: Selection{Select: []string{"ALONGN~1.EFI"}}}, "short name")
		fsck(t, m)
		judge(t, m, g.fats, files)
	}
}

// A file of the source takes the place of a directory only when all of that directory is replicated.
func TestFileDoesNotReplaceWhatStays(t *testing.T) {
	for dir, keep := range map[string]string{
		"EFI":   "EFI/Microsoft/Boot/bootmgfw.efi",
		"EFI/x": "EFI/x/fw/capsule.cap",
		"a":     "a/b/c/mine.bak",
	} {
		m := newVolume(t, geometries[2])
		// The first run puts it there, selected by its own name.
		was := map[string]string{keep: fixtures.Program("stays"), dir + "/other": "goes"}
		o := Options{Selection: Selection{Select: []string{dir, keep}}}
		for _, p := range []string{"EFI/Microsoft", "EFI/x/fw"} {
			if strings.HasPrefix(keep, p+"/") {
				o.Selection.Select = []string{p, dir + "/other"}
			}
		}
		if r := syncMem(t, newMemSource(was), m, o); r.Err != nil {
			t.Fatal(r.Err)
		}
		judge(t, m, 2, was)
		now := map[string]string{dir: "a file"}
		o = Options{Selection: Selection{Select: []string{dir}, Exclude: []string{"*.bak"}}}
		refuses(t, newMemSource(now), m, o, "which stays")
		judge(t, m, 2, was)
	}
	// Nothing stays in this one.
	m := newVolume(t, geometries[2])
	o := Options{Selection: Selection{Select: []string{"a"}}}
	if r := syncMem(t, newMemSource(map[string]string{"a/b/c": "1"}), m, o); r.Err != nil {
		t.Fatal(r.Err)
	}
	if r := syncMem(t, newMemSource(map[string]string{"a": "2"}), m, o); r.Err != nil {
		t.Fatal(r.Err)
	}
	judge(t, m, 2, map[string]string{"a": "2"})
}

// What cannot be meant is refused before anything is looked at.
func TestWrongSelection(t *testing.T) {
	m := newVolume(t, geometries[2])
	src := newMemSource(map[string]string{"loader/random-seed": "0123", "EFI/espmirror/journal": "4567", "EFI/BOOT/x": "8"})
	for _, p := range []string{"..", ".", "EFI/../loader", "EFI/espmirror", "efi\\ESPMIRROR\\", "EFI/espmirror/journal", "Loader/Random-Seed"} {
		o := Options{Selection: Selection{Select: []string{p, "EFI/BOOT"}}}
		refuses(t, src, m, o, ErrSelection.Error())
		if _, err := o.Selection.resolve(src); !errors.Is(err, ErrSelection) {
			t.Errorf("%s: %v", p, err)
		}
	}
	for _, p := range []string{"", "/", "[", "a/../b"} {
		if _, err := (Selection{Exclude: []string{p}}).resolve(src); !errors.Is(err, ErrSelection) {
			t.Errorf("exclude %q: %v", p, err)
		}
	}
}

// TestExcluded holds what a selection leaves out.
func TestExcluded(t *testing.T) {
	src := newMemSource(map[string]string{
		"EFI/BOOT/x": "", "EFI/Linux/a.efi": fixtures.Program(""), "EFI/Microsoft/Boot/b": "", "EFI/Microsoft/Boot/grubenv": "", "EFI/Microsoft/Recovery/r": "",
		"loader/loader.conf": "", "loader/random-seed": "", "loader/entries/e.conf": "", "f": "",
	})
	for _, tc := range []struct {
		sel  Selection
		want string // files
	}{
		{Selection{}, "EFI/BOOT/x EFI/Linux/a.efi loader/entries/e.conf loader/loader.conf"},
		{Selection{Exclude: []string{"EFI"}}, "loader/entries/e.conf loader/loader.conf"},
		{Selection{Exclude: []string{"efi/linux/", "*.conf"}}, "EFI/BOOT/x"},
		{Selection{Select: []string{"EFI/Linux/a.efi", "f"}, Exclude: []string{"EFI/Linux"}}, "f"},
		{Selection{Select: []string{"EFI"}}, "EFI/BOOT/x EFI/Linux/a.efi"},
		{Selection{Select: []string{"EFI", "EFI/microsoft"}}, "EFI/BOOT/x EFI/Linux/a.efi EFI/Microsoft/Boot/b EFI/Microsoft/Recovery/r"},
		{Selection{Select: []string{"EFI", "EFI/microsoft/boot"}}, "EFI/BOOT/x EFI/Linux/a.efi EFI/Microsoft/Boot/b"},
		{Selection{Select: []string{"EFI/Microsoft/Boot"}}, "EFI/Microsoft/Boot/b"},
		{Selection{Select: []string{"/"}}, "EFI/BOOT/x EFI/Linux/a.efi f loader/entries/e.conf loader/loader.conf"},
		{Selection{Select: []string{"/", "EFI/Microsoft/Recovery/r"}, Exclude: []string{"loader"}}, "EFI/BOOT/x EFI/Linux/a.efi EFI/Microsoft/Recovery/r f"},
	} {
		sel, err := tc.sel.resolve(src)
		if err != nil {
			t.Fatal(err)
		}
		var have []string
		for _, it := range (&run{src: src, sel: sel}).selectedFiles() {
			have = append(have, it.Path)
		}
		sort.Strings(have)
		if got := strings.Join(have, " "); got != tc.want {
			t.Errorf("%+v selects\n%s, want\n%s", tc.sel, got, tc.want)
		}
	}
	if _, err := (Selection{Exclude: []string{"EFI", "loader"}}).resolve(src); !errors.Is(err, ErrEmptySelection) {
		t.Errorf("nothing is left: %v", err)
	}
}

// A loader entry that names a directory as its kernel does not bring all of EFI.
func TestEntryNamesEFI(t *testing.T) {
	src := newMemSource(map[string]string{"loader/entries/e.conf": "linux /EFI\nefi \\EFI\\\ninitrd /EFI/x/y /\n", "EFI/x/y": "", "EFI/other/z": ""})
	refs, err := entryReferences(src)
	if err != nil || strings.Join(refs, " ") != "EFI/x" {
		t.Errorf("%q %v", refs, err)
	}
}

// The largest --keep-free that can be written is still more than there is.
func TestKeepFreeDoesNotOverflow(t *testing.T) {
	src := newMemSource(map[string]string{"f": "x"})
	for _, keep := range []int64{math.MaxInt64, math.MaxInt64 - 511, 1 << 56, 1 << 40} {
		m := newVolume(t, geometries[2])
		refuses(t, src, m, Options{Selection: Selection{Select: []string{"f"}}, KeepFree: keep}, "not enough room")
	}
}

// Planning takes time in proportion to the number of files: the quadratic way took 12 s for these on the machine where
// it was found.
func TestManyFilesAgain(t *testing.T) {
	if testing.Short() {
		t.Skip()
	}
	src := newMemSource(map[string]string{"d/": ""})
	d := &Item{Name: "d", Path: "d", Dir: true}
	for i := range 15000 {
		name := fmt.Sprintf("F%07d", i)
		d.Children = append(d.Children, &Item{Name: name, Path: "d/" + name})
	}
	src.root.Children = []*Item{d}
	m := newVolume(t, geometries[2])
	o := Options{Selection: Selection{Select: []string{"d"}}}
	if r := syncMem(t, src, m, o); r.Err != nil {
		t.Fatal(r.Err)
	}
	begin := time.Now()
	if r := syncMem(t, src, m, o); r.Err != nil || r.Outcome != InSync {
		t.Fatal(r.Outcome, r.Err)
	}
	if took := time.Since(begin); took > 4*time.Second {
		t.Errorf("a second sync took %v", took)
	}
}

// What cannot be replicated matters when it is selected, and then it is the source's fault, before any target is looked at.
func TestUnfitSource(t *testing.T) {
	dir := t.TempDir()
	for _, d := range []string{"EFI/BOOT", "private"} {
		if err := os.MkdirAll(filepath.Join(dir, d), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Symlink("/etc", filepath.Join(dir, "EFI", "BOOT", "link")); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "EFI", "BOOT", "x"), nil, 0o644); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(filepath.Join(dir, "private"), 0); err != nil {
		t.Fatal(err)
	}
	src, err := OpenDirSource(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer src.Close()
	if os.Getuid() == 0 { // who may read everything sees no error
		src.Root().child("private").Err = fs.ErrPermission
	}
	targets := []*Target{{Name: "b.img", Dev: newVolume(t, geometries[2])}, {Name: "c.img", Dev: newVolume(t, geometries[2])}}
	for _, o := range []Selection{{}, {Select: []string{"private", "EFI"}, Exclude: []string{"link"}}, {Select: []string{"/"}}} {
		if res, err := Sync(context.Background(), src, targets, Options{Selection: o}); !errors.Is(err, ErrSource) || !errors.Is(err, ErrRefused) || res != nil {
			t.Errorf("%v: %v %v", o, res, err)
		}
	}
	res, err := Sync(context.Background(), src, targets, Options{Selection: Selection{Exclude: []string{"link"}}})
	if err != nil || res[0].Outcome != Synced || res[1].Outcome != Synced {
		t.Errorf("%v %v", res, err)
	}
}

// TestWrongFreeCount leaves a free count that another system got wrong alone until there is something to write.
func TestWrongFreeCount(t *testing.T) {
	g := geometries[4]
	m := newVolume(t, g)
	files := map[string]string{"EFI/BOOT/BOOTX64.EFI": fixtures.Program("boot")}
	o := Options{Selection: testSelect}
	if res := syncMem(t, newMemSource(files), m, o); res.Err != nil {
		t.Fatal(res.Err)
	}
	v, err := fatdriver.Open(m)
	if err != nil {
		t.Fatal(err)
	}
	geo := v.Geometry()
	m.Bytes()[geo.FSInfoOff+488] ^= 0x55
	dev := blockdev.NewCounting(m)
	if res := syncMem(t, newMemSource(files), dev, o); res.Outcome != InSync || dev.Counts().Writes != 0 {
		t.Fatalf("%v %v, %d writes", res.Outcome, res.Err, dev.Counts().Writes)
	}
	files["EFI/BOOT/BOOTX64.EFI"] = fixtures.Program("new")
	if res := syncMem(t, newMemSource(files), m, o); res.Err != nil {
		t.Fatal(res.Err)
	}
	judge(t, m, g.fats, files)
	m.Bytes()[geo.FSInfoOff+488] ^= 0x55
	if rec, err := Recover(context.Background(), &Target{Name: "t", Dev: m}, RecoverOptions{}); err != nil || !rec.FSInfoFixed {
		t.Fatal(rec, err)
	}
	judge(t, m, g.fats, files)
}

// Garbage in copy 0 of the FAT is not copied over copy 1.
func TestGarbageInFirstFAT(t *testing.T) {
	g := geometries[4]
	m := newVolume(t, g)
	o := Options{Selection: testSelect}
	src := newMemSource(map[string]string{"EFI/BOOT/BOOTX64.EFI": fixtures.Program("boot")})
	if res := syncMem(t, src, m, o); res.Err != nil {
		t.Fatal(res.Err)
	}
	v, err := fatdriver.Open(m)
	if err != nil {
		t.Fatal(err)
	}
	geo := v.Geometry()
	at := geo.FATOff + geo.FATSize/2
	for i := range int64(512) {
		m.Bytes()[at+i] = byte(0x37 * (i + 5))
	}
	before := bytes.Clone(m.Bytes())
	if res := syncMem(t, src, m, o); !errors.Is(res.Err, fatdriver.ErrDamaged) || res.Outcome != Refused {
		t.Fatal(res.Outcome, res.Err)
	}
	if _, err := Recover(context.Background(), &Target{Name: "t", Dev: m}, RecoverOptions{}); !errors.Is(err, fatdriver.ErrDamaged) {
		t.Fatal(err)
	}
	if !bytes.Equal(before, m.Bytes()) {
		t.Fatal("the volume was written")
	}
}
