package main

import (
	"bytes"
	"context"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"espmirror/fixtures"
	"espmirror/replicate"
	"espmirror/replicate/archive"
)

// tree writes files below a directory, with the time of fixtures.
func tree(t *testing.T, dir string, files map[string]string) {
	t.Helper()
	for p, data := range files {
		p = filepath.Join(dir, p)
		if err := os.MkdirAll(filepath.Dir(p), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(p, []byte(data), 0o640); err != nil {
			t.Fatal(err)
		}
	}
	err := filepath.WalkDir(dir, func(p string, _ os.DirEntry, err error) error {
		if err == nil {
			err = os.Chtimes(p, fileTime, fileTime)
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
}

// pack makes an archive of a directory, and returns its bytes.
func pack(t *testing.T, dir, format string) []byte {
	t.Helper()
	ms, err := archive.Members(os.DirFS(dir), []string{"."}, func(string) bool { return false })
	if err != nil {
		t.Fatal(err)
	}
	var buf bytes.Buffer
	if err := archiveFormats[format](context.Background(), &buf, os.DirFS(dir), ms, time.Time{}); err != nil {
		t.Fatal(err)
	}
	return buf.Bytes()
}

func put(t *testing.T, name string, data []byte) {
	t.Helper()
	if err := os.WriteFile(name, data, 0o644); err != nil {
		t.Fatal(err)
	}
}

var smallVolume = fixtures.VolumeSpec{FAT: 12, Size: 2 << 20, Serial: 0x3333CCCC}

// TestArchivePrimary goes from a directory to an archive, an image and an archive again, whose bytes are the same.
func TestArchivePrimary(t *testing.T) {
	b := newBench(t)
	tmp := t.TempDir()
	t.Setenv("TMPDIR", tmp)
	files := map[string]string{
		"loader/loader.conf": "timeout 3\n", "loader/entries/a.conf": "title A\nlinux /a/vmlinuz\n", "loader/entries/empty.txt": "",
		"a/vmlinuz": strings.Repeat("kernel", 20_000), "a/" + strings.Repeat("long ", 45) + "Ünïcode": "x",
	}
	tree(t, "tree", files)
	for _, format := range []string{"tar", "cpio"} {
		data := pack(t, "tree", format)
		for _, how := range []string{"plain", "gz", "stdin", "stdin gz"} {
			name, in := "x."+format, data
			if strings.HasSuffix(how, "gz") {
				in = fixtures.Gzip(t, data)
			}
			if strings.HasPrefix(how, "stdin") {
				name = "-"
			} else {
				put(t, name, in)
			}
			cmd := func(args ...string) *result {
				b.t.Helper()
				b.app.stdin = struct{ io.Reader }{bytes.NewReader(in)}
				return b.run(append(args, "--primary", name, "--target", "b.img")...)
			}
			os.Remove("b.img")
			makeFixture(t, smallVolume, "b.img")
			cmd("status").want(exitDiffers).has("drifted", "primary  "+name)
			cmd("sync", "-n", "--json=pretty").want(exitDiffers).json("run")
			cmd("verify").want(exitDiffers)
			b.writes = true
			cmd("sync").want(0).has("synced")
			b.writes = false
			cmd("verify").want(0)
			cmd("status").want(0).has("in sync")
			if r := b.run("extract", "--format="+format, "b.img", "loader", "a").want(0); r.stdout != string(data) {
				t.Errorf("%s, %s: %d bytes came back, %d went in", format, how, len(r.stdout), len(data))
			}
			// The directory says the same.
			b.run("verify", "--primary", "tree", "--target", "b.img").want(0)
		}
	}
	if left, _ := os.ReadDir(tmp); len(left) > 0 {
		t.Errorf("left in TMPDIR: %v", left)
	}
	b.run("status", "--primary", "x.tar").want(0).has("x.tar", "ok")
}

// TestArchiveRefused has what is refused before the first write: the bench sees to it that no image changes.
// TestInitFromArchive: an image that is made of an archive has the bytes of one that is made of the directory, also where the
// dates are bounded.
func TestInitFromArchive(t *testing.T) {
	b := newBench(t)
	b.writes = true
	t.Setenv("TMPDIR", t.TempDir())
	t.Setenv("TZ", "UTC")
	tree(t, "tree", map[string]string{"loader/loader.conf": "timeout 3\n", "loader/entries/a.conf": "title A\nlinux /a/vmlinuz\n", "a/vmlinuz": strings.Repeat("kernel", 20_000)})
	for _, epoch := range []string{"", "500000000"} {
		t.Setenv("SOURCE_DATE_EPOCH", epoch)
		images := map[string][]byte{}
		for name, data := range map[string][]byte{"tree": nil, "x.tar": pack(t, "tree", "tar"), "x.cpio.gz": fixtures.Gzip(t, pack(t, "tree", "cpio"))} {
			if data != nil {
				put(t, name, data)
			}
			b.run("init", "-q", "--no-set", "--primary", name, "--seed", "one", "--size", "8M", name+".img").want(0)
			var err error
			if images[name], err = os.ReadFile(name + ".img"); err != nil {
				t.Fatal(err)
			}
			os.Remove(name + ".img")
		}
		// Without a bound the state says when it was made.
		for name, image := range images {
			if epoch != "" && !bytes.Equal(image, images["tree"]) {
				t.Errorf("the image that was made of %s is another one than that of the directory", name)
			}
		}
	}
}

func TestArchiveRefused(t *testing.T) {
	b := newBench(t)
	makeFixture(t, smallVolume, "b.img")
	files := map[string]string{"loader/loader.conf": "x", "EFI/BOOT/BOOTX64.EFI": fixtures.Program("x")}
	tree(t, "tree", files)
	whole := pack(t, "tree", "tar")
	put(t, "x.tar", whole)
	put(t, "cut.tar", whole[:len(whole)-1024])
	put(t, "cut.tar.gz", fixtures.Gzip(t, whole)[:200])
	put(t, "x.tar.xz", []byte("\xFD7zXZ\x00 and so on"))
	other := func(files map[string]string) []byte {
		dir := t.TempDir()
		tree(t, dir, files)
		return pack(t, dir, "tar")
	}
	put(t, "case.tar", other(map[string]string{"loader/a": "1", "efi/readme": "2", "EFI/Linux/b.efi": fixtures.Program("3")}))
	put(t, "second.tar", other(map[string]string{"EFI/readme": "1", "efi/Linux/b.efi": fixtures.Program("3")}))
	put(t, "colon.tar", other(map[string]string{"loader/a:b": "1", "EFI/Linux/b.efi": fixtures.Program("3")}))
	put(t, "nothing.tar", other(map[string]string{"home/me": "1"}))
	for _, c := range []struct {
		args string
		code int
		text []string
	}{
		{"sync --primary b.img --target x.tar", exitRefused, []string{"cannot sync x.tar: it is an archive, and a target is a device or an image"}},
		{"sync --primary x.tar --target -", exitRefused, []string{"cannot sync -: it is an archive"}},
		{"sync --primary x.tar --target x.tar", exitRefused, []string{"it is an archive"}},
		{"random-seed --primary x.tar", exitRefused, []string{"x.tar: it is an archive, which is never written to"}},
		{"random-seed --target x.tar", exitRefused, []string{"it is an archive"}},
		{"add --primary x.tar b.img", exitRefused, []string{"cannot add x.tar: it has no partition GUID"}},
		{"sync --primary x.tar", exitUsage, []string{"no target was given, and x.tar has no loader/esp-sync"}},
		{"sync --primary cut.tar --target b.img", exitRefused, []string{"cannot use primary cut.tar", "it was cut short", "without the end mark"}},
		{"verify --primary cut.tar.gz --target b.img", exitRefused, []string{"the compressed data ends too early"}},
		{"sync --primary x.tar.xz --target b.img", exitRefused, []string{"compressed with xz", "hint: unpack it on the way: `xz -dc"}},
		{"sync --primary - --target b.img", exitRefused, []string{"cannot use primary -", "standard input", "it is empty"}},
		{"sync --primary case.tar --target b.img", exitRefused, []string{"cannot replicate EFI: FAT takes its name for that of"}},
		{"sync --primary case.tar --select EFI/Linux/b.efi --target b.img", exitRefused, []string{"FAT takes its name for that of"}},
		{"sync --primary second.tar --select EFI/Linux --target b.img", exitRefused, []string{"FAT takes its name for that of"}},
		{"sync --primary colon.tar --target b.img", exitRefused, []string{"cannot replicate loader/a:b", `the character ':'`}},
		{"sync --primary nothing.tar --target b.img", exitRefused, []string{"nothing.tar has none of"}},
		{"sync -n --primary colon.tar --select EFI --target b.img", exitDiffers, nil},
		{"sync -n --primary case.tar --select loader --target b.img", exitDiffers, nil},
		{"sync -n --primary x.tar --target b.img", exitDiffers, nil},
	} {
		b.run(strings.Fields(c.args)...).want(c.code).has(c.text...)
	}
}

// TestExtractArchive checks what goes into an archive and what stays out.
func TestExtractArchive(t *testing.T) {
	b := newBench(t)
	own := fixtures.TreeSpec{"loader/random-seed": fixtures.Text(strings.Repeat("s", 32)), "EFI/espmirror/state": fixtures.Text("state")}
	makeFixture(t, fixtures.VolumeSpec{FAT: 16, Size: 16 << 20, Serial: 1, Tree: fixtures.Merge(bootTree, own)}, "a.img")
	names := func(data string) []string {
		t.Helper()
		src, err := archive.Open(context.Background(), "x", strings.NewReader(data), archive.Limits{})
		if err != nil {
			t.Fatal(err)
		}
		defer src.Close()
		var out []string
		var walk func(it *replicate.Item)
		walk = func(it *replicate.Item) {
			if !it.Dir {
				out = append(out, it.Path)
			}
			for _, c := range it.Children {
				walk(c)
			}
		}
		walk(src.Root())
		return out
	}
	var boot []string
	for p := range bootTree {
		boot = append(boot, p)
	}
	everything := slices.Concat(boot, []string{"EFI/espmirror/state", "loader/random-seed"})
	same := func(got, want []string) bool {
		slices.Sort(got)
		return slices.Equal(got, slices.Sorted(slices.Values(want)))
	}
	for _, format := range []string{"tar", "cpio"} {
		for _, c := range []struct {
			args string
			want []string
			left []string
		}{
			{"a.img", boot, []string{"path=loader/random-seed", "path=EFI/espmirror)"}},
			{"--to - a.img", boot, []string{"path=loader/random-seed"}},
			{"a.img LOADER", []string{"loader/loader.conf", "loader/entries/debian-6.1.0-18.conf"}, []string{"path=loader/random-seed"}},
			{"--all a.img", everything, nil},
			{"a.img loader/random-seed", []string{"loader/random-seed"}, nil},
			{"a.img efi/espmirror", []string{"EFI/espmirror/state"}, nil},
			{"a.img EFI/espmirror/state /loader/loader.conf", []string{"EFI/espmirror/state", "loader/loader.conf"}, nil},
		} {
			r := b.run(append([]string{"extract", "--format=" + format}, strings.Fields(c.args)...)...).want(0)
			if got := names(r.stdout); !same(got, c.want) {
				t.Errorf("%s: %q, want %q", c.args, got, c.want)
			}
			for _, text := range c.left {
				if !strings.Contains(r.stderr, text) {
					t.Errorf("%s: no %q in %q", c.args, text, r.stderr)
				}
			}
			if c.left == nil && r.stderr != "" {
				t.Errorf("%s: %q", c.args, r.stderr)
			}
		}
	}
	plain := b.run("extract", "-q", "--format=tar", "a.img").want(0).stdout

	// Into a file: whole, or not at all, and nothing is replaced without being asked.
	b.run("extract", "-q", "--format=tar", "--to", "x.tar", "a.img").want(0).silent()
	if got, err := os.ReadFile("x.tar"); err != nil || string(got) != plain {
		t.Errorf("the file has %d bytes, standard output had %d: %v", len(got), len(plain), err)
	}
	put(t, "x.tar", []byte("mine"))
	b.run("extract", "--format=tar", "--to", "x.tar", "a.img").want(exitFailed).has("cannot write x.tar: file already exists", "hint: use --overwrite")
	b.run("extract", "--format=tar", "--to", "x.tar", "--overwrite", "a.img", "nothing").want(exitFailed).has("cannot read nothing")
	if got, _ := os.ReadFile("x.tar"); string(got) != "mine" {
		t.Errorf("%q is left", got)
	}
	b.run("extract", "--format=cpio", "--json=pretty", "--to", "x.tar", "--overwrite", "a.img", "loader").want(0).json("extract")
	if got, _ := os.ReadFile("x.tar"); !bytes.HasPrefix(got, []byte("070701")) {
		t.Errorf("%.10q is there", got)
	}
	b.run("extract", "--format=tar", "--to", "y.tar", "a.img", "loader").want(0).golden("extract-tar")
	if err := os.Mkdir("dir", 0o755); err != nil {
		t.Fatal(err)
	}
	b.run("extract", "--format=tar", "--overwrite", "--to", "dir", "a.img").want(exitRefused).has("it is no regular file")
	b.run("extract", "--format=tar", "--to", "no/x.tar", "a.img").want(exitFailed).has("cannot write no/x.tar")
	// A program that cannot be read to its end: no file, and no end mark on standard output.
	patch(t, "a.img", "bad.img", func(d []byte) {
		i := bytes.Index(d, []byte("VMLINUZ    "))
		d[i+26], d[i+27] = 0xf0, 0xff
	})
	b.run("extract", "--format=tar", "--to", "bad.tar", "bad.img").want(exitFailed).has("cannot extract from bad.img: cannot read /EFI/debian/vmlinuz")
	r := b.run("extract", "--format=tar", "bad.img").want(exitFailed)
	if _, err := archive.Open(context.Background(), "x", strings.NewReader(r.stdout), archive.Limits{}); err == nil {
		t.Error("half an archive is taken for whole")
	}
	for _, pattern := range []string{"bad.tar", ".espmirror-*"} {
		if left, _ := filepath.Glob(pattern); len(left) > 0 {
			t.Errorf("left: %v", left)
		}
	}

	// SOURCE_DATE_EPOCH bounds the dates.
	t.Setenv("SOURCE_DATE_EPOCH", "1000000000")
	r = b.run("extract", "-q", "--format=cpio", "a.img").want(0)
	if n := strings.Count(r.stdout, "3B9ACA00"); n < len(boot) || strings.Contains(r.stdout, "65E07B10") {
		t.Errorf("%d members of that date", n)
	}
	t.Setenv("SOURCE_DATE_EPOCH", "soon")
	b.run("extract", "--format=cpio", "a.img").want(exitUsage).has("SOURCE_DATE_EPOCH=soon is not a number")
	t.Setenv("SOURCE_DATE_EPOCH", "")

	for args, text := range map[string]string{
		"--format=zip a.img":               "--format=zip is not files, tar or cpio",
		"--all --to out a.img":             "--all goes with --format=tar",
		"--format=tar --json=pretty a.img": "cannot be JSON",
	} {
		b.run(append([]string{"extract"}, strings.Fields(args)...)...).want(exitUsage).has(text)
	}
	b.app.terminalWidth = func(io.Writer) int { return 80 }
	b.run("extract", "--format=tar", "a.img").want(exitUsage).has("the archive would go to a terminal")
}
