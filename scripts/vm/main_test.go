package main

import (
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"testing"

	"espmirror/fixtures"
)

func TestMain(m *testing.M) {
	// Guests are made below the top of the checkout.
	if err := os.Chdir("../.."); err != nil {
		panic(err)
	}
	os.Exit(fixtures.Main(m))
}

// TestTwoDisks plays one scenario: the package is built and installed in a Debian system, whose initial RAM disk then
// has to bring a second disk up to date. `make vm` plays all.
func TestTwoDisks(t *testing.T) {
	if testing.Short() {
		t.Skip("skipped: -short")
	}
	fixtures.Need(t, "qemu-system-x86_64", "mkfs.ext4", "mkfs.fat", "fsck.fat", "mcopy", "make")
	skip := func(why any) {
		t.Helper()
		fixtures.Count("skipped boot in a virtual machine", 1)
		t.Skipf("skipped: boot in a virtual machine: %v", why)
	}
	if os.Geteuid() != 0 {
		skip("making a guest needs root")
	}
	dir := t.TempDir()
	if out, err := exec.Command("scripts/packages/build", "--version", "deb").CombinedOutput(); err != nil {
		t.Fatalf("cannot tell the package's version: %v: %s", err, out)
	}
	if out, err := exec.Command("make", "build").CombinedOutput(); err != nil {
		t.Fatalf("cannot build: %s", out)
	}
	packages := filepath.Join(dir, "packages")
	if out, err := exec.Command("scripts/packages/build", packages).CombinedOutput(); err != nil {
		skip("cannot build the package: " + string(out[max(0, len(out)-300):]))
	}
	debs, err := filepath.Glob(packages + "/*.deb")
	if err != nil || len(debs) != 1 {
		t.Fatalf("packages: %q, %v", debs, err)
	}
	l, err := newLab("out/espmirror", debs[0])
	if err != nil {
		t.Fatal(err)
	}
	defer os.Remove(l.dir)
	i := slices.IndexFunc(scenarios, func(sc scenario) bool { return sc.name == "a" })
	o := l.play(context.Background(), scenarios[i], t.Logf)
	if errors.Is(o.err, errMissing) {
		skip(o.err)
	}
	if o.err != nil {
		t.Fatal(o.err)
	}
	t.Logf("%q; %.2f s of espmirror", o.proved, o.took)
}

func TestReport(t *testing.T) {
	b := &boot{report: "firmware\n@begin init\n6.5\n@end init 0\n@begin log\n[    5.100000] espmirror: early: recovered 1, synced 2; 0.142 s, 0.000 s of it waiting\n" +
		"[    5.200000] EXT4-fs (vda): mounted\n[    6.000000] Command line: root=x vm.version=v2 quiet\n@end log 0\n@begin cut\nx\n@end cut"}
	b.parse()
	if took, ok := b.early(); !ok || took != 0.142 || b.uptime() != 6.5 || b.version() != "v2" || b.moment("EXT4-fs (") != 5.2 || !b.says("recovered 1") {
		t.Errorf("%v %v %v %q %v", took, ok, b.uptime(), b.version(), b.said())
	}
	if _, ok := b.parts["cut"]; ok || len(b.parts) != 2 {
		t.Errorf("%+v", b.parts)
	}
	if s := seconds([]float64{1, 3, 2, 5, 4}, 1); s != "median 3.0, largest 5.0 of 5" {
		t.Error(s)
	}
}
