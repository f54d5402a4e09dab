package replicate

import (
	"io"
	"os"
	"path/filepath"
	"testing"
	"time"
)

func TestAdapt(t *testing.T) {
	dir := t.TempDir()
	for name, text := range map[string]string{"loader/Esp-Sync": "old", "loader/loader.conf": "timeout 1\n", "EFI/Linux/a.efi": "MZ"} {
		name = filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(name), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(name, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	src, err := OpenDirSource(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer src.Close()
	latest := time.Date(2001, 2, 3, 4, 5, 6, 0, time.UTC)
	got, err := Adapt(src, latest, File{Path: "loader/esp-sync", Content: []byte("new text")}, File{Path: "a/b", Content: []byte("x")})
	if err != nil {
		t.Fatal(err)
	}
	read := func(s Source, p string) string {
		t.Helper()
		it := s.Root().lookup(p)
		if it == nil {
			t.Fatal("no", p)
		}
		r, err := s.Open(it)
		if err != nil {
			t.Fatal(err)
		}
		defer r.Close()
		b, err := io.ReadAll(r)
		if err != nil || int64(len(b)) != it.Size {
			t.Fatal(err, len(b), it.Size)
		}
		return string(b)
	}
	if s := read(got, "loader/esp-sync"); s != "new text" || got.Root().lookup("loader/esp-sync").Path != "loader/Esp-Sync" {
		t.Error(s)
	}
	if read(got, "a/b") != "x" || read(got, "loader/loader.conf") != "timeout 1\n" || read(src, "loader/esp-sync") != "old" || src.Root().lookup("a") != nil {
		t.Error("wrong content, or the source itself was changed")
	}
	if m := got.Root().lookup("EFI/Linux/a.efi").Meta; !m.Modified.Equal(latest) || !m.Created.Equal(latest) {
		t.Error(m)
	}
	if src.Root().lookup("EFI/Linux/a.efi").Meta.Modified.Equal(latest) {
		t.Error("the source itself was changed")
	}
	if _, err := Adapt(src, latest, File{Path: "a/../b"}); err == nil {
		t.Error("a bad path")
	}
	// 3 directories of 4 KiB, two files of 4 KiB each.
	if n, err := (Selection{Select: []string{"loader", "EFI/Linux"}}).Bytes(src, 4096); err != nil || n != 5*4096 {
		t.Error(n, err)
	}
	if _, err := (Selection{Select: []string{"nothing"}}).Bytes(src, 4096); err == nil {
		t.Error("an empty selection has a size")
	}
}
