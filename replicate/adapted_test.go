package replicate

import (
	"errors"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

func TestAdapt(t *testing.T) {
	dir := writeFiles(t, map[string]string{"loader/Esp-Sync": "old", "loader/loader.conf": "timeout 1\n", "EFI/Linux/a.efi": "MZ"})
	src, err := OpenDirSource(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer src.Close()
	latest := time.Date(2001, 2, 3, 4, 5, 6, 0, time.UTC)
	got := Adapt(src, latest)
	if m := got.Root().lookup("EFI/Linux/a.efi").Meta; !m.Modified.Equal(latest) || !m.Created.Equal(latest) {
		t.Error(m)
	}
	if src.Root().lookup("EFI/Linux/a.efi").Meta.Modified.Equal(latest) {
		t.Error("the source itself was changed")
	}
	if Adapt(src, time.Time{}) != src {
		t.Error("without a time there is nothing to adapt")
	}
	r, err := got.Open(got.Root().lookup("loader/loader.conf"))
	if err != nil {
		t.Fatal(err)
	}
	if b, err := io.ReadAll(r); err != nil || string(b) != "timeout 1\n" {
		t.Errorf("%q %v", b, err)
	}
	r.Close()
	// Two directories and three files of a cluster each.
	if n, err := (Selection{Select: []string{"loader", "EFI/Linux"}}).Bytes(src, 4096); err != nil || n != 5*4096 {
		t.Error(n, err)
	}
	if _, err := (Selection{Select: []string{"nothing"}}).Bytes(src, 4096); err == nil {
		t.Error("an empty selection has a size")
	}
}

// byItem is a source that knows its content by its own items, as archives and exFAT volumes do.
type byItem struct {
	Source
	text map[*Item]string
}

func (s byItem) Open(it *Item) (io.ReadCloser, error) {
	if text, ok := s.text[it]; ok {
		return io.NopCloser(strings.NewReader(text)), nil
	}
	return nil, errors.New("no item of the source")
}

func TestAdaptOpensTheSourcesItems(t *testing.T) {
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "a"), nil, 0o644); err != nil {
		t.Fatal(err)
	}
	src, err := OpenDirSource(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer src.Close()
	own := src.Root().lookup("a")
	got := Adapt(byItem{src, map[*Item]string{own: "content"}}, time.Unix(1, 0))
	for _, it := range []*Item{own, got.Root().lookup("a")} {
		r, err := got.Open(it)
		if err != nil {
			t.Fatal(err)
		}
		if b, err := io.ReadAll(r); err != nil || string(b) != "content" {
			t.Errorf("%q %v", b, err)
		}
	}
}
