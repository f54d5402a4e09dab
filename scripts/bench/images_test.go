package main

import (
	"bytes"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"espmirror/fixtures"
)

func TestMain(m *testing.M) { os.Exit(fixtures.Main(m)) }

// TestImages makes two small images by each way, and has them judged.
func TestImages(t *testing.T) {
	fixtures.Need(t, "sgdisk", "sfdisk", "mkfs.fat", "fsck.fat", "mcopy")
	bin := fixtures.Build(t, t.TempDir(), "cmd/espmirror")
	dir := filepath.Join(t.TempDir(), "bench")
	var out bytes.Buffer
	if err := run(&out, []string{"-only", "images", "-images", "2", "-image-size", "64", "-image-runs", "1", "-firmware", "0", "-jobs", "1", "-dir", dir, bin}); err != nil {
		t.Fatal(err)
	}
	want := []string{"2 images of 64 MiB from one template of 19 MB", "fsck.fat -n 2, sgdisk -v 2, mtools 2: 0 faults", "--jobs=1"}
	if exec.Command("strace", "-o", os.DevNull, "true").Run() == nil {
		want = append(want, "2.00 times") // by the loop
	}
	for _, w := range want {
		if !strings.Contains(out.String(), w) {
			t.Errorf("no %q in\n%s", w, out.String())
		}
	}
	if _, err := os.Stat(dir); !os.IsNotExist(err) {
		t.Errorf("the images are left: %v", err)
	}

	// Judges that never find anything say nothing.
	b := &bench{bin: bin, dir: t.TempDir(), runs: 1}
	r := &imageRun{bench: b, imageSettings: imageSettings{n: 2, mib: 64}, tree: imageTree(64), template: b.path("template.img")}
	if err := os.Mkdir(b.path("images"), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := writeTree(b.path("tree"), r.tree); err != nil {
		t.Fatal(err)
	}
	for _, name := range r.names() {
		if _, err := b.espmirror("init", "-q", "--no-set", "--select", "/", "--size", "64M", "--primary", b.path("tree"), name); err != nil {
			t.Fatal(err)
		}
	}
	flip(t, r.names()[0], 0x200+8)                      // the GPT's header
	flip(t, r.names()[1], contentOf(t, r.names()[1])+1) // a byte of a file
	said, met, err := r.judge()
	if err != nil {
		t.Fatal(err)
	}
	if met || said != "fsck.fat -n 2, sgdisk -v 2, mtools 2: 2 faults" {
		t.Errorf("the judges say %q of images with two faults", said)
	}
}

// contentOf is where the initramfs begins.
func contentOf(t *testing.T, name string) int64 {
	t.Helper()
	f, p, err := openESP(name)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	tree, err := fixtures.ReadStrict(io.NewSectionReader(f, p.Start, p.Size), p.Size, 0)
	if err != nil {
		t.Fatal(err)
	}
	for i := range tree.Entries {
		if e := &tree.Entries[i]; strings.Contains(e.Path, "/initrd") {
			return p.Start + tree.Extents(e)[0].Off
		}
	}
	t.Fatal("no initramfs")
	return 0
}

// flip changes a byte.
func flip(t *testing.T, name string, off int64) {
	t.Helper()
	f, err := os.OpenFile(name, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	var b [1]byte
	if _, err := f.ReadAt(b[:], off); err != nil {
		t.Fatal(err)
	}
	b[0] ^= 1
	if _, err := f.WriteAt(b[:], off); err != nil {
		t.Fatal(err)
	}
}
