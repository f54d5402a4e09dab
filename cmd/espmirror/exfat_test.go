package main

import (
	"bytes"
	"encoding/binary"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"espmirror/fixtures"
)

// exfatImage makes an exFAT volume in a file through exfat-fuse, or skips the test by name.
func exfatImage(t *testing.T, path string, files map[string]string) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("loop devices need root")
	}
	for _, tool := range []string{"mkfs.exfat", "mount.exfat-fuse", "losetup"} {
		if _, err := exec.LookPath(tool); err != nil {
			t.Skipf("%s is not installed", tool)
		}
	}
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(path, 16<<20); err != nil {
		t.Fatal(err)
	}
	out, err := exec.Command("losetup", "--find", "--show", path).CombinedOutput()
	if err != nil {
		t.Skipf("no loop devices here: %s", out)
	}
	node := strings.TrimSpace(string(out))
	defer exec.Command("losetup", "-d", node).Run()
	if out, err := exec.Command("mkfs.exfat", "-L", "STICK", node).CombinedOutput(); err != nil {
		t.Fatalf("%s", out)
	}
	at := t.TempDir()
	if out, err := exec.Command("mount.exfat-fuse", node, at).CombinedOutput(); err != nil {
		t.Skipf("exfat-fuse does not mount here: %s", out)
	}
	if err := fixtures.WriteFiles(at, files); err != nil {
		t.Error(err)
	}
	if out, err := exec.Command("umount", at).CombinedOutput(); err != nil {
		t.Fatalf("%s", out)
	}
}

// An exFAT volume as the primary, bare and in a partition; as what one looks into; and never as a target.
func TestExFAT(t *testing.T) {
	b := newBench(t)
	files := map[string]string{
		"EFI/BOOT/BOOTX64.EFI":      fixtures.Program(strings.Repeat("b", 70_000)),
		"EFI/Linux/linux.efi":       fixtures.Program(strings.Repeat("l", 1<<20)),
		"EFI/Linux/Grüße 😀.conf":    "emoji",
		"EFI/Linux/empty":           "",
		"loader/loader.conf":        "timeout 3\n",
		"not selected/whatever.bin": "x",
		"loader/entries/one.conf":   "title one\nlinux /EFI/Linux/linux.efi\n",
	}
	exfatImage(t, "stick.img", files)
	stick, err := os.ReadFile("stick.img")
	if err != nil {
		t.Fatal(err)
	}

	b.run("ls", "-R", "stick.img").want(0).has("BOOTX64.EFI", "Grüße 😀.conf", "whatever.bin")
	b.run("ls", "-l", "stick.img", "efi/linux").want(0).has("----a 1048", "linux.efi")
	b.run("ls", "--json=short", "stick.img").want(0).json("ls")
	if r := b.run("cat", "stick.img", "/efi/linux/LINUX.EFI").want(0); r.stdout != files["EFI/Linux/linux.efi"] {
		t.Errorf("cat gave %d bytes", len(r.stdout))
	}
	b.run("cat", "stick.img", "nothing").want(exitFailed).has("cannot read /nothing of stick.img")
	b.run("extract", "--to", "out", "stick.img").want(0)
	for p, c := range files {
		if got, err := os.ReadFile(filepath.Join("out", p)); err != nil || string(got) != c {
			t.Errorf("%s was not extracted: %v", p, err)
		}
	}
	b.run("check", "stick.img").want(0).has("stick.img: exFAT, 7 files, 6 directories")
	if doc := b.run("check", "--json=short", "stick.img").want(0).json("check"); doc["volumes"].([]any)[0].(map[string]any)["label"] != "STICK" {
		t.Errorf("got %v", doc)
	}

	// The volume by itself, and in a partition that is no ESP, as a stick has it.
	target := fixtures.VolumeSpec{FAT: 16, Size: 16 << 20, Serial: 0x2222BBBB, Label: "TARGET"}
	disk(t, "data.img", fixtures.TypeLinux, guidOne, fixtures.VolumeSpec{FAT: 16, Size: 16 << 20, Serial: 7})
	patch(t, "data.img", "usb.img", func(d []byte) { copy(d[1<<20:], stick) })
	for _, primary := range []string{"stick.img", "usb.img@@p1", "usb.img@@1M"} {
		os.Remove("t.img")
		makeFixture(t, target, "t.img")
		b.run("sync", "-n", "--primary", primary, "--target", "t.img").want(exitDiffers)
		b.writes = true
		b.run("sync", "--primary", primary, "--target", "t.img").want(0)
		b.writes = false
		b.run("verify", "--primary", primary, "--target", "t.img").want(0)
		b.run("sync", "-n", "--primary", primary, "--target", "t.img").want(0)
		b.run("status", "--primary", primary, "--target", "t.img").want(0)
		for p, c := range files {
			r := b.run("cat", "t.img", p)
			if strings.HasPrefix(p, "not") != (r.code != 0) || r.code == 0 && r.stdout != c {
				t.Errorf("%s of %s: exit %d", p, primary, r.code)
			}
		}
		b.run("check", "t.img").want(0)
	}
	// An ESP as the target, which the partition type of the primary does not have to match.
	disk(t, "esp.img", fixtures.TypeESP, guidTwo, target)
	b.writes = true
	b.run("sync", "--primary", "usb.img@@p1", "--target", "esp.img").want(0)
	b.writes = false

	b.run("sync", "--primary", "t.img", "--target", "stick.img").want(exitRefused).has("exFAT is read, as a primary, and never written")
	b.run("add", "--primary", "usb.img@@p1", "esp.img").want(exitRefused).has("cannot keep a replica set")
	for _, name := range []string{"stick.img", "usb.img"} {
		got, err := os.ReadFile(name)
		if err != nil || !bytes.Contains(got, stick) {
			t.Errorf("%s was written to: %v", name, err)
		}
	}

	// Damage: refused as a source, and shown by check.
	patch(t, "stick.img", "damaged.img", func(d []byte) {
		le := binary.LittleEndian
		heap := int(le.Uint32(d[88:])) << d[108]
		clear(d[heap : heap+512]) // the allocation bitmap
	})
	b.run("sync", "--primary", "damaged.img", "--target", "t.img").want(exitRefused).has("damaged", "espmirror check damaged.img")
	b.run("check", "damaged.img").want(exitFailed).has("free in the allocation bitmap")
	b.run("ls", "damaged.img").want(0).has("loader/")
	patch(t, "stick.img", "broken.img", func(d []byte) { d[92]++; d[12*512+92]++ })
	b.run("sync", "--primary", "broken.img", "--target", "t.img").want(exitRefused).has("the checksum is")
	b.run("ls", "broken.img").want(exitFailed).has("the checksum is")
}
