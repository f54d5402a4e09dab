package exfat_test

import (
	"context"
	"io"
	"strings"
	"testing"
	"time"

	"espmirror/blockdev"
	"espmirror/fatdriver"
	"espmirror/fatdriver/exfat"
	"espmirror/fixtures"
	"espmirror/replicate"
)

func TestSource(t *testing.T) {
	v, err := exfat.Open(exfat.ForSource(t))
	if err != nil {
		t.Fatal(err)
	}
	src, err := replicate.OpenExFATSource("stick", v)
	if err != nil {
		t.Fatal(err)
	}
	defer src.Close()
	items := map[string]*replicate.Item{}
	for _, it := range src.Root().Children {
		items[it.Name] = it
	}
	if src.Name() != "stick" || len(items) != 11 || src.Root().Path != "" || !src.Root().Dir {
		t.Errorf("%d items of %s", len(items), src.Name())
	}
	for name, want := range map[string]string{
		"loader": "", "EFI": "", "times": "", "largest.img": "", "lone\xed\xa0\x80": "", "𐐨": "",
		"huge.img": "has 4294967296 bytes", "ends with a dot.": "ends with a dot", "ends with a space ": "ends with a dot or a space",
		"x\x7Fy": "has the character", "𐐀": "FAT takes its name for that of 𐐨",
	} {
		it := items[name]
		if it == nil {
			t.Errorf("no %q", name)
		} else if it.Err == nil && want != "" || it.Err != nil && (want == "" || !strings.Contains(it.Err.Error(), want)) {
			t.Errorf("%q: %v, want %q", name, it.Err, want)
		}
	}
	m := items["times"].Meta
	if m.Attr != fatdriver.AttrReadOnly|fatdriver.AttrHidden|fatdriver.AttrSystem|fatdriver.AttrArchive ||
		!m.Created.Equal(time.Date(2024, 2, 29, 7, 4, 57, 500_000_000, time.UTC)) ||
		!m.Modified.Equal(time.Date(2024, 2, 29, 12, 34, 56, 990_000_000, time.UTC)) ||
		!m.Accessed.Equal(time.Date(2024, 2, 29, 0, 0, 0, 0, time.UTC)) {
		t.Errorf("got %+v", m)
	}
	rd, err := src.Open(items["largest.img"])
	if err != nil {
		t.Fatal(err)
	}
	b := make([]byte, 10)
	if n, err := rd.(io.ReaderAt).ReadAt(b, 1<<32-6); n != 5 || err != io.EOF {
		t.Errorf("%d, %v", n, err)
	}

	// A whole run onto a FAT volume. What FAT cannot hold stops it where it is selected, and only there.
	spec := fixtures.VolumeSpec{FAT: 16, Size: 16 << 20, Serial: 0x2222BBBB}
	vol, err := spec.Bytes()
	if err != nil {
		t.Fatal(err)
	}
	target := blockdev.NewMem(vol, 512)
	run := func(paths ...string) error {
		_, err := replicate.Sync(context.Background(), src, []*replicate.Target{{Name: "t", Dev: target}},
			replicate.Options{Selection: replicate.Selection{Select: paths}})
		return err
	}
	if err := run("huge.img"); err == nil || !strings.Contains(err.Error(), "has 4294967296 bytes") {
		t.Error(err)
	}
	if err := run("loader", "EFI", "times"); err != nil {
		t.Fatal(err)
	}
	fat, err := fatdriver.Open(target)
	if err != nil {
		t.Fatal(err)
	}
	tree, err := fat.Scan()
	if err != nil || tree.Damage() != nil {
		t.Fatal(err, tree.Damage())
	}
	n := tree.Lookup("times")
	if n == nil || !n.Entry.ModTime().Equal(time.Date(2024, 2, 29, 12, 34, 56, 0, time.UTC)) || n.Entry.Meta().Attr != m.Attr {
		t.Errorf("got %+v", n.Entry.Meta())
	}
	if n := tree.Lookup("EFI/😀/𝔘.efi"); n == nil || n.Size() < 100_000 {
		t.Error("the emoji are gone")
	}
}

// A damaged volume is no source, and the error says where to see more.
func TestDamagedSource(t *testing.T) {
	dev := exfat.ForSource(t)
	v, err := exfat.Open(dev)
	if err != nil {
		t.Fatal(err)
	}
	g := v.Geometry()
	if _, err := dev.WriteAt(make([]byte, 16), int64(g.HeapOffset)*int64(g.SectorSize)); err != nil {
		t.Fatal(err)
	}
	if _, err := replicate.OpenExFATSource("stick", v); err == nil || !strings.Contains(err.Error(), "free in the allocation bitmap") {
		t.Error(err)
	}
}
