package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"hash/maphash"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/santhosh-tekuri/jsonschema/v6"

	"espmirror/blockdev"
	"espmirror/fixtures"
)

var update = flag.Bool("update", false, "write the golden files in place of comparing them")

// TestMain takes away what the machine could add to the tests.
func TestMain(m *testing.M) {
	if len(os.Args) > 2 && os.Args[1] == "early" {
		earlyWorker() // the test binary is what /proc/self/exe leads to
	}
	flag.Parse()
	for _, v := range []string{"SYSTEMD_ESP_PATH", "SYSTEMD_RELAX_ESP_CHECKS", "SYSTEMD_LOG_LEVEL", "NO_COLOR"} {
		os.Unsetenv(v)
	}
	os.Setenv("TZ", "UTC")
	os.Exit(fixtures.Main(m))
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
	var before map[string]uint64
	if !b.writes {
		before = hashes(b.t)
	}
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

var hashSeed = maphash.MakeSeed()

func hashes(t *testing.T) map[string]uint64 {
	t.Helper()
	sums := map[string]uint64{}
	images, err := filepath.Glob("*.img")
	nodes, err2 := filepath.Glob("machine/dev/sd*")
	if err := errors.Join(err, err2); err != nil {
		t.Fatal(err)
	}
	for _, name := range append(images, nodes...) {
		data, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		sums[name] = maphash.Bytes(hashSeed, data)
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

// tool runs a program that changes a fixture, and skips the test when it is not installed.
func tool(t *testing.T, name string, args ...string) {
	t.Helper()
	cmd := exec.Command(name, args...)
	if out, err := cmd.CombinedOutput(); errors.Is(err, exec.ErrNotFound) {
		t.Skipf("%s is not installed", name)
	} else if err != nil {
		t.Fatalf("%s %s: %v\n%s", name, strings.Join(args, " "), err, out)
	}
}

// fileTime is the time of every file in a fixture.
var fileTime = time.Date(2024, 2, 29, 12, 34, 56, 0, time.UTC)

// make writes a fixture, and skips the test when a program that makes it is not installed.
func makeFixture(t *testing.T, recipe interface{ Make(string) error }, name string) {
	t.Helper()
	if err := recipe.Make(name); errors.Is(err, exec.ErrNotFound) {
		t.Skip(err)
	} else if err != nil {
		t.Fatal(err)
	}
}

// bootTree is a small tree of boot files.
var bootTree = fixtures.TreeSpec{
	"EFI/BOOT/BOOTX64.EFI":                   fixtures.Text(fixtures.Program("fallback")),
	"EFI/systemd/systemd-bootx64.efi":        fixtures.Text(fixtures.Program("systemd-boot")),
	"loader/loader.conf":                     fixtures.Text("timeout 3\n"),
	"loader/entries/debian-6.1.0-18.conf":    fixtures.Text("title Debian\nlinux /EFI/debian/vmlinuz\n"),
	"EFI/debian/vmlinuz":                     fixtures.Text("MZ kernel"),
	"EFI/Linux/Ünïcode name of a kernel.efi": fixtures.Text(fixtures.Program("uki")),
}

// primaryVolume and secondVolume differ in everything: type, identity and content.
var (
	primaryVolume = fixtures.VolumeSpec{FAT: 32, Size: 34 << 20, SectorsPerCluster: 1, Serial: 0x1111AAAA, Label: "PRIMARY", Tree: bootTree}
	secondVolume  = fixtures.VolumeSpec{FAT: 16, Size: 16 << 20, Serial: 0x2222BBBB, Label: "SECOND",
		Tree: fixtures.TreeSpec{"EFI/Microsoft/Boot/bootmgfw.efi": fixtures.Text(fixtures.Program("not ours"))}}
)

// volumes makes a.img and b.img.
func volumes(t *testing.T) {
	t.Helper()
	makeFixture(t, primaryVolume, "a.img")
	makeFixture(t, secondVolume, "b.img")
}

// disk makes a disk image with one partition around a volume.
func disk(t *testing.T, name, typeGUID, partGUID string, v fixtures.VolumeSpec) {
	t.Helper()
	makeFixture(t, fixtures.DiskSpec{
		Size: v.Size + 4<<20, GUID: "0a0a0a0a-0000-4000-8000-0000000000" + partGUID[len(partGUID)-2:],
		Parts: []fixtures.PartSpec{{Type: typeGUID, GUID: partGUID, Name: "EFI system", Off: 1 << 20, Volume: &v}},
	}, name)
}

const (
	guidOne = "6f0c5c7e-0000-4000-8000-000000000001"
	guidTwo = "6f0c5c7e-0000-4000-8000-000000000002"
)
