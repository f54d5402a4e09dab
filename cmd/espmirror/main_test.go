package main

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/json"
	"flag"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/santhosh-tekuri/jsonschema/v6"

	"espmirror/blockdev"
)

var update = flag.Bool("update", false, "write the golden files in place of comparing them")

// TestMain takes away what the machine could add to the tests.
func TestMain(m *testing.M) {
	flag.Parse()
	for _, v := range []string{"SYSTEMD_ESP_PATH", "SYSTEMD_RELAX_ESP_CHECKS", "SYSTEMD_LOG_LEVEL", "NO_COLOR"} {
		os.Unsetenv(v)
	}
	os.Setenv("TZ", "UTC")
	os.Exit(m.Run())
}

// result is what a command line left behind.
type result struct {
	t              *testing.T
	args           []string
	stdout, stderr string
	code           int
}

// bench is one app in a directory of its own.
type bench struct {
	t   *testing.T
	app *app
	out bytes.Buffer
	err bytes.Buffer
	ctx context.Context
	// writes says that the next command may change images.
	writes bool
}

func newBench(t *testing.T) *bench {
	t.Helper()
	t.Chdir(t.TempDir())
	b := &bench{t: t, ctx: context.Background()}
	b.app = newApp(strings.NewReader(""), &b.out, &b.err)
	// A machine without disks and mounts: what the tests see does not depend on the one they run on.
	root := filepath.Join(t.TempDir(), "machine")
	for _, dir := range []string{"sys/class/block", "sys/block", "sys/dev/block", "proc/self", "dev"} {
		if err := os.MkdirAll(filepath.Join(root, dir), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	for _, name := range []string{"proc/self/mountinfo", "proc/swaps"} {
		if err := os.WriteFile(filepath.Join(root, name), nil, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	b.app.system = blockdev.System{Root: root}
	return b
}

// run runs one command line, and sees to it that no image changes unless the test allows it.
func (b *bench) run(args ...string) *result {
	b.t.Helper()
	before := hashes(b.t)
	b.out.Reset()
	b.err.Reset()
	code := b.app.run(b.ctx, append([]string{"espmirror"}, args...))
	if !b.writes {
		after := hashes(b.t)
		for name, sum := range before {
			if after[name] != sum {
				b.t.Errorf("espmirror %s changed %s", strings.Join(args, " "), name)
			}
		}
	}
	return &result{b.t, args, b.out.String(), b.err.String(), code}
}

func hashes(t *testing.T) map[string][32]byte {
	t.Helper()
	sums := map[string][32]byte{}
	names, err := filepath.Glob("*.img")
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range names {
		data, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		sums[name] = sha256.Sum256(data)
	}
	return sums
}

// want checks the exit status.
func (r *result) want(code int) *result {
	r.t.Helper()
	if r.code != code {
		r.t.Fatalf("espmirror %s: exit status %d, want %d\nstdout:\n%s\nstderr:\n%s", strings.Join(r.args, " "), r.code, code, r.stdout, r.stderr)
	}
	return r
}

// has checks that stdout and stderr together contain some text.
func (r *result) has(texts ...string) *result {
	r.t.Helper()
	for _, text := range texts {
		if !strings.Contains(r.stdout+r.stderr, text) {
			r.t.Errorf("espmirror %s: no %q in\nstdout:\n%s\nstderr:\n%s", strings.Join(r.args, " "), text, r.stdout, r.stderr)
		}
	}
	return r
}

// golden compares stdout and stderr with a checked-in file.
func (r *result) golden(name string) *result {
	r.t.Helper()
	got := "$ espmirror " + strings.Join(r.args, " ") + "\n" + r.stdout
	if r.stderr != "" {
		got += "--- stderr\n" + r.stderr
	}
	compareGolden(r.t, name, got)
	return r
}

// sourceDir is the package's directory: tests change into others.
var sourceDir = func() string {
	dir, err := os.Getwd()
	if err != nil {
		panic(err)
	}
	return dir
}()

func compareGolden(t *testing.T, name, got string) {
	t.Helper()
	file := filepath.Join(sourceDir, "testdata", "golden", name+".txt")
	if *update {
		if err := os.WriteFile(file, []byte(got), 0o644); err != nil {
			t.Fatal(err)
		}
		return
	}
	want, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if got != string(want) {
		t.Errorf("%s differs (go test -update writes it)\ngot:\n%s\nwant:\n%s", name, got, want)
	}
}

// json checks that stdout holds exactly one document, that it follows the schema of the command, and returns it.
func (r *result) json(schema string) map[string]any {
	r.t.Helper()
	doc, err := jsonschema.UnmarshalJSON(strings.NewReader(r.stdout))
	if err != nil {
		r.t.Fatalf("espmirror %s: stdout is not one JSON document: %v\n%s\n%s", strings.Join(r.args, " "), err, r.stdout, r.stderr)
	}
	if err := loadSchema(r.t, schema).Validate(doc); err != nil {
		r.t.Fatalf("espmirror %s: %v\n%s", strings.Join(r.args, " "), err, r.stdout)
	}
	m := map[string]any{}
	if err := json.Unmarshal([]byte(r.stdout), &m); err != nil {
		r.t.Fatal(err)
	}
	return m
}

func loadSchema(t *testing.T, name string) *jsonschema.Schema {
	t.Helper()
	c := jsonschema.NewCompiler()
	s, err := c.Compile(filepath.Join(sourceDir, "testdata", "schema", name+".json"))
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// tool runs a program that makes a fixture, and skips the test when it is not installed.
func tool(t *testing.T, name string, args ...string) {
	t.Helper()
	path, err := exec.LookPath(name)
	if err != nil {
		if path, err = exec.LookPath("/usr/sbin/" + name); err != nil {
			t.Skipf("%s is not installed", name)
		}
	}
	cmd := exec.Command(path, args...)
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%s %s: %v\n%s", name, strings.Join(args, " "), err, out)
	}
}

// fileTime is the time of every file in a fixture.
var fileTime = time.Date(2024, 5, 17, 12, 34, 56, 0, time.UTC)

// fat is a recipe for a FAT image.
type fat struct {
	bits, serial, label string
	size                int64
	files               map[string]string
}

// make writes the image, its files in the order of their paths.
func (f fat) make(t *testing.T, name string) {
	t.Helper()
	if f.size == 0 {
		f.size = 4 << 20
	}
	if err := os.WriteFile(name, nil, 0o644); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(name, f.size); err != nil {
		t.Fatal(err)
	}
	args := []string{"--invariant", "-F", f.bits, "-i", strings.ReplaceAll(f.serial, "-", "")}
	if f.label != "" {
		args = append(args, "-n", f.label)
	}
	tool(t, "mkfs.fat", append(args, name)...)
	tree := t.TempDir()
	tops := map[string]bool{}
	for p, content := range f.files {
		full := filepath.Join(tree, p)
		if err := os.MkdirAll(filepath.Dir(full), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(full, []byte(content), 0o644); err != nil {
			t.Fatal(err)
		}
		top, _, _ := strings.Cut(p, "/")
		tops[top] = true
	}
	err := filepath.WalkDir(tree, func(p string, _ os.DirEntry, err error) error {
		if err != nil {
			return err
		}
		return os.Chtimes(p, fileTime, fileTime)
	})
	if err != nil {
		t.Fatal(err)
	}
	for top := range tops {
		tool(t, "mcopy", "-s", "-m", "-Q", "-i", name, filepath.Join(tree, top), "::")
	}
}

// bootTree is a small tree of boot files.
var bootTree = map[string]string{
	"EFI/BOOT/BOOTX64.EFI":                   "MZ fallback",
	"EFI/systemd/systemd-bootx64.efi":        "MZ systemd-boot",
	"loader/loader.conf":                     "timeout 3\n",
	"loader/entries/debian-6.1.0-18.conf":    "title Debian\nlinux /EFI/debian/vmlinuz\n",
	"EFI/debian/vmlinuz":                     "MZ kernel",
	"EFI/Linux/Ünïcode name of a kernel.efi": "MZ uki",
}

// volumes makes two images with different content: a.img (FAT32) and b.img (FAT16).
func volumes(t *testing.T) {
	t.Helper()
	fat{bits: "32", serial: "1111-AAAA", label: "PRIMARY", size: 34 << 20, files: bootTree}.make(t, "a.img")
	fat{bits: "16", serial: "2222-BBBB", label: "SECOND", size: 16 << 20, files: map[string]string{
		"EFI/Microsoft/Boot/bootmgfw.efi": "MZ not ours",
	}}.make(t, "b.img")
}

// disk makes a disk image with one partition of the given type around a FAT image.
func disk(t *testing.T, name, typeGUID, partGUID string, f fat) {
	t.Helper()
	f.make(t, "part.tmp")
	data, err := os.ReadFile("part.tmp")
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Remove("part.tmp"); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(name, append(make([]byte, 1<<20), data...), 0o644); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(name, int64(len(data))+2<<20); err != nil {
		t.Fatal(err)
	}
	last := (1<<20+len(data))/512 - 1
	tool(t, "sgdisk", "-a", "1", "-n", "1:2048:"+itoa(last), "-t", "1:"+typeGUID, "-u", "1:"+partGUID, "-c", "1:EFI system",
		"-U", "0a0a0a0a-0000-4000-8000-00000000000"+partGUID[len(partGUID)-1:], name)
}

func itoa(n int) string {
	b, _ := json.Marshal(n)
	return string(b)
}

const (
	typeESP  = "c12a7328-f81f-11d2-ba4b-00a0c93ec93b"
	typeData = "0fc63daf-8483-4772-8e79-3d69d8477de4"
	guidOne  = "6f0c5c7e-0000-4000-8000-000000000001"
	guidTwo  = "6f0c5c7e-0000-4000-8000-000000000002"
)
