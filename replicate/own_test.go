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
