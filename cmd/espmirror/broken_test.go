package main

import (
	"fmt"
	"os"
	"os/exec"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"espmirror/blockdev"
	"espmirror/fixtures"
)

// tiny mounts a file system of a few KiB at dir, or skips the test.
func tiny(t *testing.T, dir string, kib int) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("a full file system needs root, for mount")
	}
	if err := os.Mkdir(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount("espmirror-test", dir, "tmpfs", 0, fmt.Sprintf("size=%dk", kib)); err != nil {
		t.Skipf("no tmpfs can be mounted here: %v", err)
	}
	wd, err := os.Getwd()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(wd+"/"+dir, unix.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
}

// TestBrokenTargets has a target whose storage gives way in the middle of a sync: an image file on a file system that
// becomes full, where a write fails, and a loop device over one, where the flush does. The other target is done all the
// same; the broken one shows the old tree, and once there is room a recovery and a sync put it right.
func TestBrokenTargets(t *testing.T) {
	for _, kind := range []string{"image", "loop device"} {
		t.Run(kind, func(t *testing.T) {
			b := newBench(t)
			primary := primaryVolume
			primary.FAT, primary.Size = 16, 8<<20
			primary.Tree = fixtures.Merge(bootTree, fixtures.TreeSpec{"EFI/Linux/big.efi": fixtures.PE(1<<20, 5)})
			makeFixture(t, primary, "a.img")
			makeFixture(t, secondVolume, "c.img")
			tiny(t, "tiny", 600)
			second := secondVolume
			second.Serial = 0x4444DDDD
			makeFixture(t, second, "made")
			// Sparse, so that it fits.
			tool(t, "cp", "--sparse=always", "made", "tiny/b")
			name, want := "tiny/b", "no space left on device"
			if kind == "loop device" {
				if _, err := exec.LookPath("losetup"); err != nil {
					t.Skip("losetup is not installed")
				}
				out, err := exec.Command("losetup", "--find", "--show", "tiny/b").CombinedOutput()
				if err != nil {
					t.Skipf("no loop devices here: %s", out)
				}
				name, want = strings.TrimSpace(string(out)), "input/output error"
				t.Cleanup(func() { _ = exec.Command("losetup", "-d", name).Run() })
				b.app.system = blockdev.System{}
			}
			b.writes = true
			args := []string{"--primary", "a.img", "--target", name}
			b.run(append([]string{"sync", "--target", "c.img"}, args...)...).want(exitPartial).has(want, name)
			b.run("verify", "--primary", "a.img", "--target", "c.img").want(0)
			b.run("ls", "-R", name).want(0).has("bootmgfw.efi")
			if r := b.run("ls", "-R", name); strings.Contains(r.stdout, "big.efi") {
				t.Error("the new tree shows:", r.stdout)
			}
			b.run(append([]string{"sync"}, args...)...).want(exitPartial).has(want)
			if err := unix.Mount("", "tiny", "", unix.MS_REMOUNT, "size=20m"); err != nil {
				t.Fatal(err)
			}
			b.run("recover", name).want(0)
			b.run("check", name).want(0)
			b.run(append([]string{"sync"}, args...)...).want(0)
			b.run(append([]string{"verify"}, args...)...).want(0)
			fixtures.Count("faults", 2)
		})
	}
}
