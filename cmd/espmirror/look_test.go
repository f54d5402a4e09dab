package main

import (
	"crypto/sha256"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"espmirror/fixtures"
)

// fakeTerminal makes every stream a terminal.
func fakeTerminal(io.Writer) int { return 80 }

func TestList(t *testing.T) {
	b := newBench(t)
	volumes(t)
	disk(t, "disk.img", fixtures.TypeESP, guidOne, fixtures.VolumeSpec{FAT: 16, Size: 16 << 20, Serial: 0x3333CCCC, Label: "ONDISK"})
	b.run("list", "a.img", "b.img", "disk.img").want(0).golden("list")
	b.app.terminalWidth = fakeTerminal
	if r := b.run("list", "disk.img").want(0).has("3333-CCCC", "EFI system"); strings.Contains(r.stdout, guidOne) {
		t.Errorf("too wide for the terminal:\n%s", r.stdout)
	}
	b.app.terminalWidth = terminalWidth
	doc := b.run("list", "--json=pretty", "a.img", "disk.img").want(0).json("list")
	vs := doc["volumes"].([]any)
	if v := vs[1].(map[string]any); v["partition_guid"] != guidOne || v["serial"] != "3333-CCCC" || v["name"] != "disk.img@@p1" {
		t.Errorf("got %v", v)
	}
	if err := os.WriteFile("empty.img", make([]byte, 1<<20), 0o644); err != nil {
		t.Fatal(err)
	}
	b.run("list", "empty.img").want(0).has("No ESP or XBOOTLDR partition was found.")
	b.run("list", "nothing.img").want(1).has("nothing.img")
	// Without arguments: the machine, which has no disk here.
	b.run("list").want(0).has("No ESP or XBOOTLDR partition was found.")
	b.run("list", "--json=short").want(0).json("list")
}

// TestListUnread lists what can be read beside what cannot.
func TestListUnread(t *testing.T) {
	b := newBench(t)
	disk(t, "d1.img", fixtures.TypeESP, guidOne, fixtures.VolumeSpec{FAT: 16, Size: 16 << 20, Serial: 0x3333CCCC, Label: "ONDISK"})
	patch(t, "d1.img", "broken.img", func(d []byte) { clear(d[:34*512]) })
	patch(t, "d1.img", "gone.img", func(d []byte) { clear(d[512 : 34*512]); clear(d[len(d)-512:]) })
	b.run("list", "broken.img", "d1.img", "gone.img", "nothing.img").want(exitFailed).golden("list-unread")
	doc := b.run("list", "--json=short", "broken.img", "d1.img").want(exitFailed).json("list")
	if len(doc["volumes"].([]any)) != 1 || len(doc["unread"].([]any)) != 1 || doc["error"] == nil {
		t.Errorf("got %v", doc)
	}

	// A disk of the machine that cannot be opened: it has no node.
	device := filepath.Join(b.app.system.Root, "sys/devices/sda")
	if err := os.MkdirAll(device, 0o755); err != nil {
		t.Fatal(err)
	}
	for name, content := range map[string]string{"dev": "8:0\n", "size": "2048\n", "uevent": "MAJOR=8\nMINOR=0\nDEVNAME=sda\nDEVTYPE=disk\n"} {
		if err := os.WriteFile(filepath.Join(device, name), []byte(content), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Symlink("../../devices/sda", filepath.Join(b.app.system.Root, "sys/class/block/sda")); err != nil {
		t.Fatal(err)
	}
	b.run("list").want(exitFailed).has("not everything could be read", "cannot open", "/dev/sda")
	b.run("status").want(exitFailed).has("not everything could be read", "cannot open", "/dev/sda")
	b.run("status", "--json=short").want(exitFailed).json("status")
}

func TestLs(t *testing.T) {
	b := newBench(t)
	volumes(t)
	tool(t, "mattrib", "-i", "a.img", "+r", "+h", "+s", "::loader/loader.conf")
	b.run("ls", "a.img").want(0).golden("ls")
	b.run("ls", "-R", "a.img").want(0).golden("ls-recursive")
	b.run("ls", "-l", "a.img", "loader", `EFI\boot\bootx64.efi`).want(0).golden("ls-long")
	b.run("ls", "a.img", "/loader", "nothing", "EFI/BOOT/").want(1).golden("ls-missing")
	b.run("ls", "a.img", "../a.img").want(1)
	b.run("ls", "missing.img").want(1)
	doc := b.run("ls", "--json=short", "a.img", "loader/loader.conf").want(0).json("ls")
	e := doc["entries"].([]any)[0].(map[string]any)
	if e["modified"] != "2024-02-29T12:34:56" || e["size_bytes"] != 10.0 || len(e["attributes"].([]any)) < 3 {
		t.Errorf("got %v", e)
	}
	if doc := b.run("ls", "-R", "--json=short", "a.img", "nothing").want(1).json("ls"); doc["error"] == nil {
		t.Error("no error in the document")
	}
	b.run("ls", "--json=short", "missing.img").want(1).json("ls")
}

func TestCat(t *testing.T) {
	b := newBench(t)
	volumes(t)
	if r := b.run("cat", "a.img", "loader/loader.conf", "/EFI//debian/VMLINUZ").want(0); r.stdout != "timeout 3\nMZ kernel" {
		t.Errorf("got %q", r.stdout)
	}
	// What can be read is written, whatever stands beside it.
	if r := b.run("cat", "a.img", "nothing", "loader", "loader/loader.conf").want(1); r.stdout != "timeout 3\n" {
		t.Errorf("got %q", r.stdout)
	} else {
		r.has("cannot read /nothing of a.img: file does not exist", "cannot read /loader of a.img")
	}
}

func TestExtract(t *testing.T) {
	b := newBench(t)
	volumes(t)
	b.run("extract", "--to", "out", "a.img").want(0).golden("extract")
	for p, content := range bootTree {
		got, err := os.ReadFile(filepath.Join("out", p))
		if err != nil || sha256.Sum256(got) != content.Sum() {
			t.Errorf("%s: %q, %v", p, got, err)
		}
		info, err := os.Stat(filepath.Join("out", p))
		if err == nil && !info.ModTime().Equal(fileTime) {
			t.Errorf("%s: time is %v, want %v", p, info.ModTime(), fileTime)
		}
	}
	// Nothing is replaced without being asked, and nothing that is there suffers.
	if err := os.WriteFile("out/loader/loader.conf", []byte("mine"), 0o644); err != nil {
		t.Fatal(err)
	}
	b.run("extract", "--to", "out", "a.img", "loader/loader.conf", "EFI/debian/vmlinuz").want(1).golden("extract-exists")
	if got, _ := os.ReadFile("out/loader/loader.conf"); string(got) != "mine" {
		t.Errorf("got %q", got)
	}
	b.run("extract", "--overwrite", "--to", "out", "a.img", "LOADER/loader.conf").want(0)
	if got, _ := os.ReadFile("out/loader/loader.conf"); string(got) != "timeout 3\n" {
		t.Errorf("got %q", got)
	}
	if left, _ := filepath.Glob("out/loader/.*"); len(left) > 0 {
		t.Errorf("left behind: %v", left)
	}
	b.run("extract", "--json=pretty", "--to", "out2", "a.img", "loader").want(0).json("extract")
	b.run("extract", "--json=pretty", "--to", "out2", "a.img", "loader", "nothing").want(1).json("extract")
	b.run("extract", "--to", "a.img", "b.img").want(1).has("cannot")
}

// TestExtractStaysInside lays links where files are to go: nothing is written through any of them.
func TestExtractStaysInside(t *testing.T) {
	b := newBench(t)
	volumes(t)
	for _, dir := range []string{"out", "outside"} {
		if err := os.Mkdir(dir, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.WriteFile("outside/file", []byte("precious"), 0o644); err != nil {
		t.Fatal(err)
	}
	abs, err := filepath.Abs("outside")
	if err != nil {
		t.Fatal(err)
	}
	for link, to := range map[string]string{"out/EFI": "../outside", "out/loader": abs} {
		if err := os.Symlink(to, link); err != nil {
			t.Fatal(err)
		}
	}
	for _, args := range []string{"extract --to out a.img", "extract --overwrite --to out a.img EFI/BOOT/BOOTX64.EFI", "extract --overwrite --to out a.img loader"} {
		b.run(strings.Fields(args)...).want(1)
	}
	if err := os.Remove("out/loader"); err != nil {
		t.Fatal(err)
	}
	if err := os.Mkdir("out/loader", 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink("../../outside/file", "out/loader/loader.conf"); err != nil {
		t.Fatal(err)
	}
	b.run("extract", "--to", "out", "a.img", "loader/loader.conf").want(1)
	// The link is replaced, and not what it leads to.
	b.run("extract", "--overwrite", "--to", "out", "a.img", "loader/loader.conf").want(0)
	if got, _ := os.ReadFile("outside/file"); string(got) != "precious" {
		t.Errorf("the file outside is %q", got)
	}
	if names, _ := os.ReadDir("outside"); len(names) != 1 {
		t.Errorf("outside has %v", names)
	}
}

// TestHostileNames lists names that would talk to the terminal, and extracts names that would leave the directory.
func TestHostileNames(t *testing.T) {
	b := newBench(t)
	makeFixture(t, fixtures.VolumeSpec{FAT: 16, Size: 16 << 20, Serial: 0x4444DDDD, Label: "NORMAL", Tree: fixtures.TreeSpec{
		"loader/AAAAAAAA.TXT": fixtures.Text("x"), "loader/BBBBBBBB.TXT": fixtures.Text("y"),
		"loader/a long name with zz.conf": fixtures.Text("z"), "EVILDIR/EVILFILE": fixtures.Text("w"),
	}}, "e.img")
	data, err := os.ReadFile("e.img")
	if err != nil {
		t.Fatal(err)
	}
	// Raw names on the volume, as no honest program writes them.
	s := string(data)
	s = strings.ReplaceAll(s, "AAAAAAAATXT", "AA\x1b[31mATXT")
	s = strings.ReplaceAll(s, "BBBBBBBBTXT", "../../X TXT")
	s = strings.ReplaceAll(s, "EVILFILE   ", "..\\..\\AB   ")
	s = strings.ReplaceAll(s, "NORMAL     ", "N\x1b[2J\x07    ")
	s = strings.ReplaceAll(s, "z\x00z\x00", "\x1b\x00c\x00")
	if err := os.WriteFile("e.img", []byte(s), 0o644); err != nil {
		t.Fatal(err)
	}
	for _, args := range []string{"ls -lR e.img", "ls e.img loader", "check e.img", "list e.img", "status --target e.img",
		"extract -v --to out e.img", "ls e.img ../../X.TXT", "cat e.img no\x1b[31m"} {
		r := b.run(strings.Fields(args)...)
		for _, out := range []string{r.stdout, r.stderr} {
			if strings.ContainsAny(out, "\x1b\x07") {
				t.Errorf("%s: raw control characters: %q", args, out)
			}
		}
	}
	var files []string
	err = filepath.WalkDir(".", func(p string, d os.DirEntry, err error) error {
		files = append(files, p)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range files {
		if f != "." && f != "e.img" && f != "out" && !strings.HasPrefix(f, "out/") {
			t.Errorf("written outside: %q", f)
		}
	}
	if _, err := os.Stat("../X.TXT"); err == nil {
		t.Error("written above the directory")
	}
}

func TestCheck(t *testing.T) {
	b := newBench(t)
	volumes(t)
	b.run("check", "a.img", "b.img").want(0).golden("check")
	b.run("check", "--json=pretty", "a.img", "b.img").want(0).json("check")

	// A warning harms no reader: the FAT copies differ.
	patch(t, "b.img", "warn.img", func(d []byte) { d[fat2(d)+100] = 0x55 })
	b.run("check", "warn.img").want(0).has("warning")
	// Damage: a directory's first cluster is out of range.
	patch(t, "b.img", "bad.img", func(d []byte) {
		i := strings.Index(string(d), "EFI        ")
		d[i+26], d[i+27] = 0xf0, 0xff
	})
	b.run("check", "bad.img").want(1).has("damage", "cannot call bad.img sound")
	doc := b.run("check", "--json=short", "bad.img", "a.img").want(1).json("check")
	if n := len(doc["volumes"].([]any)); n != 2 {
		t.Errorf("%d volumes", n)
	}
	if err := os.WriteFile("text.img", []byte(strings.Repeat("no volume ", 1000)), 0o644); err != nil {
		t.Fatal(err)
	}
	b.run("check", "text.img").want(1).has("cannot check text.img")
	b.run("check", "--json=short", "text.img", "a.img").want(1).json("check")
}

// patch copies an image with a change.
func patch(t *testing.T, from, to string, change func([]byte)) {
	t.Helper()
	d, err := os.ReadFile(from)
	if err != nil {
		t.Fatal(err)
	}
	change(d)
	if err := os.WriteFile(to, d, 0o644); err != nil {
		t.Fatal(err)
	}
}

// fat2 is the offset of the second FAT of a FAT16 volume with 512-byte sectors.
func fat2(d []byte) int {
	reserved, size := int(d[14])|int(d[15])<<8, int(d[22])|int(d[23])<<8
	return (reserved + size) * 512
}

// TestExtractTemporaryName: a file of the volume that has the name of extract's own temporary file is one like any other.
func TestExtractTemporaryName(t *testing.T) {
	b := newBench(t)
	files := fixtures.TreeSpec{}
	for _, name := range []string{".espmirror-extract.tmp", ".Espmirror-Extract.tmp~", "a", "z"} {
		files["EFI/"+name] = fixtures.Text("content of " + name)
	}
	v := smallVolume
	v.Tree = files
	makeFixture(t, v, "v.img")
	for range 2 {
		b.run("extract", "--overwrite", "--to", "out", "v.img").want(0)
		for p := range files {
			if got, err := os.ReadFile(filepath.Join("out", p)); err != nil || string(got) != "content of "+filepath.Base(p) {
				t.Errorf("%s: %q, %v", p, got, err)
			}
		}
		if all, err := os.ReadDir("out/EFI"); err != nil || len(all) != len(files) {
			t.Errorf("%v, %v", all, err)
		}
	}
}
