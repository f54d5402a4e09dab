package main

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"unicode/utf16"

	"espmirror/fixtures"
	"espmirror/replicate"
)

// pairDisk makes a disk with an ESP and XBOOTLDR partitions, and shows it to the machine of the test as sda, sdb and so on:
// its letter is that of its image.
func (b *bench) pairDisk(name string, esp fixtures.VolumeSpec, boots ...fixtures.VolumeSpec) {
	b.t.Helper()
	n := name[0]
	parts := []fixtures.PartSpec{{Type: fixtures.TypeESP, GUID: pairGUID(name, 1), Name: "EFI system", Off: 1 << 20, Volume: &esp}}
	end := int64(1<<20) + esp.Size
	for i := range boots {
		parts = append(parts, fixtures.PartSpec{Type: fixtures.TypeXBOOTLDR, GUID: pairGUID(name, 2+i), Name: "boot", Off: end, Volume: &boots[i]})
		end += boots[i].Size
	}
	makeFixture(b.t, fixtures.DiskSpec{Size: end + 1<<20, GUID: pairGUID(name, 0), Parts: parts}, name+".img")
	b.plug(name, int(n-'a'))
}

func pairGUID(name string, n int) string {
	return fmt.Sprintf("6f0c5c7e-0000-4000-8000-000000%x%04d", name[0], n)
}

// plug adds a disk to the machine of the test.
func (b *bench) plug(name string, n int) {
	b.t.Helper()
	image, err := filepath.Abs(name + ".img")
	if err != nil {
		b.t.Fatal(err)
	}
	info, err := os.Stat(image)
	if err != nil {
		b.t.Fatal(err)
	}
	s := &fakeSystem{t: b.t, root: b.app.system.Root}
	s.write("sys/devices/sd"+name+"/dev", fmt.Appendf(nil, "8:%d\n", 16*n))
	s.write("sys/devices/sd"+name+"/size", fmt.Appendf(nil, "%d\n", info.Size()/512))
	class := filepath.Join(s.root, "sys/class/block/sd"+name)
	for link, to := range map[string]string{class: "../../devices/sd" + name, filepath.Join(s.root, "dev/sd"+name): image} {
		_ = os.Remove(link)
		if err := os.Symlink(to, link); err != nil {
			b.t.Fatal(err)
		}
	}
}

func (b *bench) unplug(name string) {
	b.t.Helper()
	for _, p := range []string{"sys/class/block/sd", "dev/sd"} {
		if err := os.Remove(b.app.system.Path("/" + p + name)); err != nil {
			b.t.Fatal(err)
		}
	}
}

// booted says from which partition the machine was started.
func (b *bench) booted(guid string) {
	b.t.Helper()
	text := []byte{6, 0, 0, 0}
	for _, u := range utf16.Encode([]rune(strings.ToUpper(guid) + "\x00")) {
		text = append(text, byte(u), byte(u>>8))
	}
	(&fakeSystem{t: b.t, root: b.app.system.Root}).write(
		"sys/firmware/efi/efivars/LoaderDevicePartUUID-4a67b082-0a4c-41cf-b6c7-440b29bb8c4f", text)
}

// change writes a file through mtools, as a mounted system does.
func (b *bench) change(volume, path, text string) {
	b.t.Helper()
	if err := os.WriteFile("changed", []byte(text), 0o644); err != nil {
		b.t.Fatal(err)
	}
	image, part, _ := strings.Cut(volume, "@@p")
	off := int64(1 << 20)
	if part == "2" {
		off += pairESP.Size
	}
	tool(b.t, "mcopy", "-i", fmt.Sprintf("%s@@%d", image, off), "-o", "changed", "::"+path)
}

// cat is the content of a file on a volume, "" when it is not there.
func (b *bench) cat(volume, path string) string {
	b.t.Helper()
	r := b.run("cat", volume, path)
	if r.code != 0 {
		return ""
	}
	return r.stdout
}

// write runs a command line that may change images.
func (b *bench) write(args ...string) *result {
	b.t.Helper()
	b.writes = true
	defer func() { b.writes = false }()
	return b.run(args...)
}

var (
	pairESP  = fixtures.VolumeSpec{FAT: 16, Size: 9 << 20, Serial: 0xE5B00001, Label: "ESP"}
	pairBoot = fixtures.VolumeSpec{FAT: 12, Size: 6 << 20, Serial: 0xB0070001, Label: "BOOT"}
)

// pairTrees are what the primary has: the boot loader on the ESP, entries and kernels on the other partition.
func pairTrees(version string) (esp, boot fixtures.TreeSpec) {
	dir := fixtures.MachineID + "/" + version
	return fixtures.TreeSpec{
			"EFI/systemd/systemd-bootx64.efi": fixtures.Text(fixtures.Program("systemd-boot")),
			"EFI/BOOT/BOOTX64.EFI":            fixtures.Text(fixtures.Program("systemd-boot")),
			"loader/loader.conf":              fixtures.Text("timeout 3\n"),
		}, fixtures.TreeSpec{
			dir + "/linux":                        fixtures.PE(50_000, 7),
			"loader/entries/" + version + ".conf": fixtures.Text("title Linux\noptions root=UUID=aaaa rw\nlinux /" + dir + "/linux\n"),
			"loader/entries.srel":                 fixtures.Text("type1\n"),
			"EFI/Linux/uki-" + version + "+3.efi": fixtures.PE(40_000, 8),
		}
}

func volumeLike(v fixtures.VolumeSpec, serial uint32, tree fixtures.TreeSpec) fixtures.VolumeSpec {
	v.Serial, v.Tree = serial, tree
	return v
}

// pairs makes three disks: the first is full, the others are empty but for what is theirs.
func (b *bench) pairs() {
	esp, boot := pairTrees("6.1")
	b.pairDisk("a", volumeLike(pairESP, 0xE5B0000A, esp), volumeLike(pairBoot, 0xB007000A, boot))
	for i, name := range []string{"b", "c"} {
		n := uint32(i) + 0xB
		b.pairDisk(name, volumeLike(pairESP, 0xE5B00000+n, fixtures.TreeSpec{"EFI/Microsoft/Boot/BCD": fixtures.Random(5000, 1)}),
			volumeLike(pairBoot, 0xB0070000+n, fixtures.TreeSpec{"backup/mine.txt": fixtures.Text(name)}))
	}
}

func same(t *testing.T, b *bench, path string, volumes ...string) {
	t.Helper()
	first := b.cat(volumes[0], path)
	for _, v := range volumes {
		if got := b.cat(v, path); got != first || got == "" {
			t.Errorf("%s of %s is %q, of %s %q", path, v, got, volumes[0], first)
		}
	}
}

// TestPairs: the XBOOTLDR partition of the primary's disk goes to that of each target's disk.
func TestPairs(t *testing.T) {
	b := newBench(t)
	b.pairs()
	args := []string{"--primary", "a.img", "--target", "b.img", "--target", "c.img"}
	cmd := func(words ...string) []string { return append(words, args...) }
	r := b.run(cmd("sync", "-n")...).want(exitDiffers)
	for _, v := range []string{"b.img: differs", "b.img@@p2: differs", "c.img: differs", "c.img@@p2: differs", "create   EFI/Linux/uki-6.1+3.efi"} {
		r.has(v)
	}
	if doc := b.run(append(cmd("sync", "-n"), "--json=short")...).want(exitDiffers).json("run"); len(doc["targets"].([]any)) != 4 {
		t.Errorf("%v", doc["targets"])
	}
	b.run(cmd("verify")...).want(exitDiffers).has("b.img@@p2", "c.img@@p2")
	b.run(cmd("status")...).want(exitDiffers).has("b.img@@p2", "next: espmirror sync --primary a.img --target b.img")
	b.write(cmd("sync")...).want(0)
	same(t, b, "loader/entries/6.1.conf", "a.img@@p2", "b.img@@p2", "c.img@@p2")
	same(t, b, "EFI/Linux/uki-6.1+3.efi", "a.img@@p2", "b.img@@p2", "c.img@@p2")
	same(t, b, "EFI/systemd/systemd-bootx64.efi", "a.img", "b.img", "c.img")
	if got := b.cat("b.img@@p2", "backup/mine.txt"); got != "b" {
		t.Errorf("what is not selected became %q", got)
	}
	b.run(cmd("verify")...).want(0)
	b.run(cmd("status")...).want(0)
	b.run(cmd("sync")...).want(0).has("in sync")

	// An XBOOTLDR partition is no target of its own accord beside its ESP, and none twice.
	b.run("sync", "-n", "--primary", "a.img", "--target", "a.img@@p2").want(exitRefused)

	// One side refused leaves its partner alone; the other disk is done.
	b.change("a.img@@p2", "loader/entries.srel", "type1\n\n")
	b.change("a.img@@p1", "loader/loader.conf", "timeout 4\n")
	patch(t, "b.img", "b.img", func(d []byte) { // both FAT copies: two files on one cluster
		v := d[1<<20+pairESP.Size:]
		reserved := int(v[14]) | int(v[15])<<8
		size := int(v[22]) | int(v[23])<<8
		for n := range 2 {
			fat := v[512*(reserved+n*size):]
			fat[3], fat[4] = 0x02, 0x00 // cluster 2 follows itself
		}
	})
	b.write(cmd("sync")...).want(exitPartial).has("b.img@@p2", "goes with")
	if strings.Contains(b.cat("b.img", "loader/loader.conf"), "4") {
		t.Error("the ESP was written to beside a damaged XBOOTLDR partition")
	}
	same(t, b, "loader/loader.conf", "a.img", "c.img")
	same(t, b, "loader/entries.srel", "a.img@@p2", "c.img@@p2")
}

// TestPairsOneSided: disks on which there is no XBOOTLDR partition, or too many.
func TestPairsOneSided(t *testing.T) {
	b := newBench(t)
	b.pairs()
	esp, boot := pairTrees("6.1")
	b.pairDisk("d", volumeLike(pairESP, 0xE5B0000D, nil)) // an ESP only
	b.write("sync", "--primary", "a.img", "--target", "d.img", "--target", "b.img").want(exitPartial).
		has("d.img (XBOOTLDR)", "missing", "there is none on its disk", "make one there")
	// What can be done is: the boot loader there is up to date, and finds what is on that ESP.
	same(t, b, "EFI/systemd/systemd-bootx64.efi", "a.img", "d.img", "b.img")
	same(t, b, "loader/entries/6.1.conf", "a.img@@p2", "b.img@@p2")
	b.run("status", "--primary", "a.img", "--target", "d.img").want(exitPartial).has("d.img (XBOOTLDR)", "missing")
	b.run("verify", "--primary", "a.img", "--target", "d.img").want(exitPartial)

	// The primary has none: nothing is asked of the others'.
	b.write("sync", "--primary", "d.img", "--target", "c.img").want(0)
	if b.cat("c.img@@p2", "loader/entries.srel") != "" {
		t.Error("something came to an XBOOTLDR partition")
	}

	// The primary's is empty: the ESPs are done, and that is said.
	b.pairDisk("e", volumeLike(pairESP, 0xE5B0000E, esp), volumeLike(pairBoot, 0xB007000E, nil))
	b.write("sync", "--primary", "e.img", "--target", "b.img").want(0).has("nothing to replicate on the XBOOTLDR partition")
	b.run("status", "--primary", "e.img", "--target", "b.img").want(0)
	b.run("verify", "--primary", "e.img", "--target", "b.img").want(0)
	if b.cat("b.img@@p2", "loader/entries.srel") == "" {
		t.Error("an empty XBOOTLDR partition emptied another one")
	}

	// Several: the first counts, on both sides, and that is said.
	b.pairDisk("f", volumeLike(pairESP, 0xE5B0000F, esp), volumeLike(pairBoot, 0xB007000F, boot), volumeLike(pairBoot, 0xB00700FF, nil))
	b.write("sync", "--primary", "f.img", "--target", "c.img").want(0).has("f.img has 2 partitions of type XBOOTLDR (2, 3), and 2 is used")
	same(t, b, "loader/entries/6.1.conf", "f.img@@p2", "c.img@@p2")
	b.write("sync", "--primary", "a.img", "--target", "f.img").want(0).has("f.img has 2 partitions")

	// A volume that is no FAT: the primary's is left out with a warning, a target's is refused, its ESP with it.
	patch(t, "e.img", "e.img", func(d []byte) { clear(d[1<<20+pairESP.Size : 1<<20+pairESP.Size+4096]) })
	b.run("sync", "-n", "--primary", "e.img", "--target", "b.img").want(0).has("is not FAT, and is not replicated")
	b.run("sync", "-n", "--primary", "a.img", "--target", "e.img", "--target", "c.img").want(exitRefused).has("e.img@@p2")

	// A partition by itself is no target for an ESP: it would be one twice, for its pair too.
	b.run("sync", "-n", "--primary", "a.img", "--target", "b.img@@p2").want(exitRefused).has("it is an XBOOTLDR partition", "hint: name the ESP on its disk")
	b.run("add", "--primary", "a.img", "b.img@@p2").want(exitRefused).has("it is an XBOOTLDR partition")
	// Whoever means it goes from the one XBOOTLDR partition to the other.
	b.run("sync", "-n", "--primary", "a.img@@p2", "--target", "c.img@@p2").want(0)
}

// TestPairsGuarded: a guard that stops one of a pair stops the other, whichever it is.
func TestPairsGuarded(t *testing.T) {
	b := newBench(t)
	b.pairs()
	args := []string{"--primary", "a.img", "--target", "b.img", "--target", "c.img"}
	// The same serial number twice, on the XBOOTLDR partitions.
	patch(t, "b.img", "b.img", func(d []byte) { copy(d[1<<20+pairESP.Size+39:], "\x0a\x00\x07\xb0") })
	b.write(append([]string{"sync"}, args...)...).want(exitPartial).has("the same FAT serial number", "cannot sync b.img: it goes with b.img@@p2")
	if b.cat("b.img", "loader/loader.conf") != "" {
		t.Error("the ESP was written to without its XBOOTLDR partition")
	}
	same(t, b, "loader/loader.conf", "a.img", "c.img")
	b.run(append([]string{"sync", "-n"}, args...)...).want(exitRefused).has("b.img: refused")
	b.run(append([]string{"verify"}, args...)...).want(exitDiffers)
	// And on the ESPs.
	patch(t, "b.img", "b.img", func(d []byte) {
		copy(d[1<<20+pairESP.Size+39:], "\x0b\x00\x07\xb0")
		copy(d[1<<20+39:], "\x0a\x00\xb0\xe5")
	})
	b.write(append([]string{"sync"}, args...)...).want(exitRefused).has("cannot sync b.img@@p2: it goes with b.img, ")
	if b.cat("b.img@@p2", "loader/entries.srel") != "" {
		t.Error("the XBOOTLDR partition was written to without its ESP")
	}
}

// TestPairsFailing: a device fails in the middle of its run. The XBOOTLDR partitions come first, because entries there name
// what a boot loader needs; an ESP whose partner has failed is not touched, and one that fails itself is done by the next run.
func TestPairsFailing(t *testing.T) {
	b := newBench(t)
	b.pairs()
	args := []string{"sync", "--primary", "a.img", "--target", "b.img", "--target", "c.img"}
	failing := func(name string) *result {
		defer func() { b.app.engine.sync = replicate.SyncAll }()
		b.app.engine.sync = func(ctx context.Context, jobs []replicate.Job) ([][]replicate.Result, error) {
			for i, job := range jobs {
				for _, target := range job.Targets {
					if (i == 0) != strings.HasSuffix(target.Name, "@@p2") {
						t.Errorf("%s is in job %d", target.Name, i)
					}
					if target.Name == name {
						left := 12
						target.Dev = cut{target.Dev, &left}
					}
				}
			}
			return replicate.SyncAll(ctx, jobs)
		}
		return b.write(args...)
	}
	failing("b.img@@p2").want(exitPartial).has("the plug was pulled", "cannot sync b.img: it goes with b.img@@p2")
	if b.cat("b.img", "loader/loader.conf") != "" {
		t.Error("the ESP was written to after its XBOOTLDR partition had failed")
	}
	b.run("verify", "--primary", "a.img", "--target", "c.img").want(0)
	failing("b.img").want(exitPartial).has("the plug was pulled")
	same(t, b, "loader/entries/6.1.conf", "a.img@@p2", "b.img@@p2")
	b.write(args...).want(0)
	b.run(append([]string{"verify"}, args[1:]...)...).want(0)
}

// TestPairsOfSet: generations are counted on both partitions, and what is stale is refused as a whole.
func TestPairsOfSet(t *testing.T) {
	b := newBench(t)
	b.pairs()
	dev := func(name string) string { return b.app.system.Path("/dev/sd" + name) }
	b.booted(pairGUID("a", 1))
	b.write("add", dev("b"), dev("c")).want(0)
	b.run("status").want(0)
	b.run("verify").want(0)
	for _, v := range []string{"a.img", "a.img@@p2", "b.img", "b.img@@p2", "c.img", "c.img@@p2"} {
		if !strings.Contains(b.cat(v, "EFI/espmirror/state"), `"generation": 1,`) {
			t.Errorf("the state of %s: %s", v, b.cat(v, "EFI/espmirror/state"))
		}
	}
	// The boot loader was started from the XBOOTLDR partition, and says so.
	b.booted(pairGUID("a", 2))
	b.run("sync").want(0).has("in sync")
	b.booted(pairGUID("a", 1))

	// Words of the members: the set on the ESP knows them by its GUID.
	set := b.cat("a.img", "loader/esp-sync")
	for _, n := range []string{"a", "b", "c"} {
		set += "replace root " + pairGUID(n, 1) + " UUID=" + strings.Repeat(n, 4) + "\n"
	}
	b.change("a.img@@p1", "loader/esp-sync", set)
	b.run("status").want(exitDiffers)
	b.write("sync").want(0)
	for _, n := range []string{"a", "b", "c"} {
		if got := b.cat(n+".img@@p2", "loader/entries/6.1.conf"); !strings.Contains(got, "root=UUID="+strings.Repeat(n, 4)+" rw") {
			t.Errorf("on %s: %s", n, got)
		}
	}
	b.run("verify").want(0)
	b.run("sync").want(0).has("in sync")

	// A kernel update writes to the XBOOTLDR partition only. The disk that was away must not take it back.
	b.unplug("c")
	b.change("a.img@@p2", "loader/entries/6.2.conf", "title Linux 6.2\noptions root=UUID=aaaa\nlinux /"+fixtures.MachineID+"/6.1/linux\n")
	b.write("sync").want(exitPartial)
	b.plug("c", 2)
	b.booted(pairGUID("c", 1))
	r := b.run("sync").want(exitRefused).has("the source is older than the target")
	b.run("status").want(exitRefused).has("newer")
	_, hint, _ := strings.Cut(r.stderr, "`espmirror ")
	hint, _, _ = strings.Cut(hint, "`")
	b.write(strings.Fields(hint)...).want(0)
	b.write("sync").want(0)
	b.run("verify").want(0)
	if got := b.cat("c.img@@p2", "loader/entries/6.2.conf"); !strings.Contains(got, "root=UUID=cccc") {
		t.Errorf("%q", got)
	}

	// One partition newer here, the other there: neither side wins.
	b.unplug("a")
	b.change("c.img@@p1", "loader/loader.conf", "timeout 9\n")
	b.write("sync").want(exitPartial)
	b.plug("a", 0)
	b.booted(pairGUID("a", 1))
	b.change("a.img@@p2", "loader/entries.srel", "type1\n\n")
	r = b.run("sync").want(exitRefused).has("diverged", "sync --force --primary "+dev("a")+"@@p1 --target "+dev("b")+"@@p1`")
	if strings.Contains(r.stderr, "replicate the other way") {
		t.Errorf("the other way would be refused too: %s", r.stderr)
	}
	b.run("status").want(exitRefused).has("diverged")
	b.run("sync", "-n", "--primary", dev("b"), "--target", dev("a")).want(exitRefused).has("diverged")
	b.write("sync", "--force").want(0)
	b.run("verify").want(0)
	b.run("status").want(0)
	same(t, b, "loader/loader.conf", "a.img", "b.img", "c.img")
	same(t, b, "loader/entries.srel", "a.img@@p2", "b.img@@p2", "c.img@@p2")
}

// The XBOOTLDR partition of a pair is refused in the plan; its ESP has a new journal by then.
func TestPairRefusedWritten(t *testing.T) {
	b := newBench(t)
	esp, boot := pairTrees("6.1")
	boot[fixtures.MachineID+"/6.1/linux"] = fixtures.PE(7_000_000, 7)
	large := volumeLike(pairBoot, 0xB007000A, boot)
	large.Size, large.FAT = 9<<20, 16
	b.pairDisk("a", volumeLike(pairESP, 0xE5B0000A, esp), large)
	b.pairDisk("b", volumeLike(pairESP, 0xE5B0000B, nil), volumeLike(pairBoot, 0xB007000B, nil))
	before := hashes(t)
	b.writes = true
	res := b.run("sync", "--primary", "a.img", "--target", "b.img")
	if changed := before["b.img"] != hashes(t)["b.img"]; res.code != exitRefused || changed {
		t.Errorf("exit status %d, and b.img was written to: %t\n%s", res.code, changed, res.stderr)
	}
}
