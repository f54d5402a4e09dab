package replicate

import (
	"bytes"
	"context"
	"strings"
	"testing"

	"espmirror/blockdev"
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
		files := map[string]string{"a long name of its own.efi": "x", "loader/loader.conf": "y"}
		if r := syncMem(t, newMemSource(files), m, Options{Selection: Selection{Select: []string{"/"}}}); r.Err != nil {
			t.Fatal(r.Err)
		}
		alias := map[string]string{"ALONGN~1.EFI": "other"}
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
		was := map[string]string{keep: "stays", dir + "/other": "goes"}
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
