package day

import (
	"maps"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"espmirror/fixtures"
)

// TestDay tells the story with -v.
func TestDay(t *testing.T) {
	if testing.Short() {
		t.Skip("skipped: day: it builds three programs")
	}
	fixtures.Need(t, "mcopy", "mren", "fsck.fat")
	bin := build(t)
	t.Run("images", func(t *testing.T) {
		t.Parallel()
		day(newMachine(t, bin, false))
	})
	t.Run("loop devices", func(t *testing.T) {
		t.Parallel()
		if os.Geteuid() != 0 {
			t.Skip("skipped: day on loop devices: they need root")
		}
		fixtures.Need(t, "losetup")
		day(newMachine(t, bin, true))
	})
}

func day(m *machine) {
	entry := func(v string) string { return "loader/entries/" + fixtures.MachineID + "-" + v + ".conf" }
	uki := func(v string) string { return "EFI/Linux/uki-" + v + ".efi" }

	m.story("Three disks, each with an ESP of its own; the first gets its files from a directory")
	a := m.make("sda", "-size 50M -fat 32 -spc 1 -serial AAAA-0001 -label ALPHA", "UUID=aaaaaaaa-0001", map[string]string{
		"EFI/HP/bios.bin": content(fixtures.Random(9000, 1)), "loader/random-seed": "the seed of the first disk, 32 b"})
	b := m.make("sdb", "-size 42M -fat 16 -spc 4 -serial BBBB-0002 -label BRAVO", "UUID=bbbbbbbb-0002", map[string]string{
		"EFI/Microsoft/Boot/BCD": content(fixtures.Random(30000, 2)), "loader/random-seed": "the seed of the 2nd disk, 32 byt"})
	c := m.make("sdc", "-size 30M -fat 12 -spc 16 -serial CCCC-0003 -label CHARLIE", "UUID=cccccccc-0003", map[string]string{
		"backup/letter.txt": "mine\n", "loader/random-seed": "the seed of the third disk, 32 b"})
	tree := map[string]string{
		"EFI/systemd/systemd-bootx64.efi": content(fixtures.PE(100_000, 1)), "EFI/BOOT/BOOTX64.EFI": content(fixtures.PE(100_000, 1)),
		"loader/loader.conf": "timeout 3\n", "loader/entries.srel": "type1\n",
	}
	for p, text := range tree {
		m.files[p] = text
		m.write(filepath.Join(m.dir, "tree", p), text)
	}
	dev := m.dev
	m.run("sync --primary tree --target " + dev(a)).want(0)
	m.kernel(a, "6.1.0", "")
	m.check(a)
	m.boot(a)

	m.story("The others are added, and are in sync")
	m.run("status").has("ok")
	m.run("add -n " + dev(b) + " " + dev(c)).want(0).has("to be added " + b.guid)
	// Their entries do not know yet that each disk has a root of its own.
	real := b.root
	b.root, c.root = a.root, a.root
	m.run("add "+dev(b)+" "+dev(c)).want(0).has("added "+a.guid, "added "+b.guid, "added "+c.guid, "synced")
	m.check(a, b, c)
	m.run("add "+dev(b)).want(0).has("is as it should be", "in sync")
	b.root, c.root = real, "UUID=cccccccc-0003"

	m.story("Each disk has its own root filesystem: lines in the set file")
	set := "# three disks\n"
	for _, d := range []*member{a, b, c} {
		set += "member " + d.guid + "\n"
	}
	set += "timeout 0\n"
	for _, d := range []*member{a, b, c} {
		set += "replace root " + d.guid + " " + d.root + "\n"
	}
	m.put(a, "loader/esp-sync", set)
	r := m.run("status").want(4).has("next: espmirror sync")
	if r.state(b) == "in sync" || r.state(c) == "in sync" {
		m.t.Errorf("%q, %q", r.state(b), r.state(c))
	}
	m.run("sync").want(0)
	m.check(a, b, c)
	m.run("verify").want(0)

	m.story("A kernel update, with boot counters")
	m.kernel(a, "6.2.0", "+3")
	m.run("sync -n").want(4)
	m.run("sync").want(0)
	m.check(a, b, c)
	m.tried(a, entry("6.2.0"), "+2-1")
	m.tried(a, uki("6.2.0"), "+2-1")
	m.tried(b, entry("6.2.0"), "+1-2")
	m.story("Boots that were counted here are nobody else's")
	m.run("sync").want(0).has("in sync")
	m.run("status").want(0)
	m.run("verify").want(0)
	m.check(a, b, c)
	m.story("What has proved good is good everywhere")
	m.tried(a, entry("6.2.0"), "")
	m.run("sync").want(0)
	b.count[entry("6.2.0")], c.count[entry("6.2.0")] = "", ""
	m.check(a, b, c)
	m.run("verify").want(0)

	if m.loops {
		m.story("A change on the primary while it is mounted")
		m.mount(a)
		m.files["loader/loader.conf"] = "timeout 4\n"
		m.write(filepath.Join(a.mnt, "loader/loader.conf"), "timeout 4\n")
		m.run("sync").want(0).has("its mount point is the source", "synced")
		m.check(b, c)
		m.run("verify").want(0)
		m.run("sync --primary " + a.mnt).want(0).has("in sync")
		m.sh("SYSTEMD_ESP_PATH=" + a.mnt + " espmirror status").want(0)
		m.umount(a)
		m.run("status").want(0)
		m.check(a, b, c)
	}

	m.story("The third disk is away, and life goes on")
	m.unplug(c)
	m.kernel(a, "6.3.0", "+3")
	m.removeKernel(a, "6.1.0")
	m.run("sync").want(3).has(c.guid, "missing", "synced")
	m.check(a, b)
	r = m.run("status").want(3)
	if got := r.state(c); got != "missing" {
		m.t.Errorf("the disk that is away is %q", got)
	}

	m.story("The machine is started from the second disk, and updated there")
	m.boot(b)
	m.run("sync").want(3).has(c.guid, "in sync")
	m.kernel(b, "6.4.0", "+3")
	m.run("sync").want(3).has("synced")
	m.check(a, b)

	m.story("The third comes back and is started from: it is older than the others, and must not overwrite them")
	m.plug(c)
	m.boot(c)
	r = m.run("sync").want(6).has("the source is older than the target")
	m.check(a, b)
	s := m.run("status").want(6)
	if s.state(a) != "newer" || s.state(b) != "newer" {
		m.t.Errorf("status says %q and %q", s.state(a), s.state(b))
	}
	m.run("verify").want(4)
	if m.loops {
		m.story("The same while the stale one is mounted")
		m.mount(c)
		m.run("status").want(6)
		mounted := m.run("sync").want(6).has("hint: unmount ")
		for _, cmd := range mounted.hints() {
			m.sh(cmd + " -n").want(6).has("mounted on " + c.mnt)
		}
		m.umount(c)
		for _, cmd := range mounted.hints() {
			m.sh(cmd + " -n").want(4)
		}
	}
	m.story("What the message says, letter by letter")
	hints := r.hints()
	if len(hints) == 0 {
		m.t.Fatal("there is no hint")
	}
	m.sh(hints[0]).want(0)
	m.run("sync").want(0).has("in sync")
	m.run("verify").want(0)
	m.check(a, b, c)

	m.story("A change on a disk while it is alone, and another on the others")
	m.unplug(a)
	m.boot(b)
	before := maps.Clone(m.files)
	m.put(b, "loader/loader.conf", "timeout 7\n")
	m.run("sync").want(3)
	m.check(b, c)
	m.files = before
	m.plug(a)
	m.boot(a)
	m.put(a, "loader/loader.conf", "timeout 9\n")
	m.check(a)
	r = m.run("sync").want(6).has("diverged")
	s = m.run("status").want(6)
	if s.state(b) != "diverged" || s.state(c) != "diverged" {
		m.t.Errorf("status says %q and %q", s.state(b), s.state(c))
	}
	for _, cmd := range r.hints() {
		if strings.Contains(cmd, "--primary "+m.name(a)+" ") { // the winner
			m.sh(cmd).want(0)
		}
	}
	m.run("sync").want(0).has("in sync")
	m.run("verify").want(0)
	m.check(a, b, c)

	m.story("The third disk dies, and a blank one takes its place")
	m.unplug(c)
	m.run("remove "+c.guid).want(0).has("removed "+c.guid, "synced")
	set = strings.ReplaceAll(set, "member "+c.guid+"\n", "")
	set = strings.ReplaceAll(set, "replace root "+c.guid+" "+c.root+"\n", "")
	m.files["loader/esp-sync"] = set
	m.check(a, b)
	d := m.make("sdd", "-size 44M -fat 32 -spc 1 -serial DDDD-0004 -label DELTA", "UUID=dddddddd-0004", map[string]string{})
	for p := range a.count {
		d.count[p] = initial(a.count[p])
	}
	if m.loops {
		m.mount(a)
	}
	m.run("add "+dev(d)).want(3).has("added "+d.guid, "has no text for root")
	if m.loops {
		m.umount(a)
	}
	delete(m.files, "loader/esp-sync")
	m.check(a, b)
	m.story("Its root= has to be told first, as the message says")
	got := m.run("cat " + dev(a) + " loader/esp-sync").want(0).stdout
	m.put(a, "loader/esp-sync", got+"replace root "+d.guid+" "+d.root+"\n")
	m.run("sync").want(0)
	m.check(a, b, d)
	m.run("random-seed").want(0)
	m.freshSeeds(a, b, d)
	m.check(a, b, d)
	m.run("verify").want(0)

	m.story("The power fails in the middle of a sync to the new disk")
	m.kernel(a, "6.5.0", "+3")
	m.removeKernel(a, "6.2.0")
	m.sh("powercut -at commit -commit 1 -seed 5 " + dev(a) + " " + dev(d)).want(0)
	m.boot(d)
	m.run("status").want(5).has("needs recovery")
	m.run("recover " + dev(d)).want(0)
	m.run("status")
	m.boot(a)
	m.run("sync").want(0)
	m.check(a, b, d)
	m.run("status").want(0)
	m.run("verify").want(0)

	m.story("And so it does once more, and the machine is started from what is left")
	m.kernel(a, "6.6.0", "+3")
	m.sh("powercut -at commit -commit 1 -seed 2 " + dev(a) + " " + dev(b)).want(0)
	m.boot(b)
	m.run("sync").want(0).has("unfinished transaction", "synced")
	m.check(a, b, d)
	m.run("status").want(0)
	m.run("verify").want(0)

	m.story("It fails before anything is committed: the second disk is as it was, and must not go over the first")
	m.put(a, "loader/loader.conf", "timeout 11\n")
	m.sh("powercut -at build -seed 3 " + dev(a) + " " + dev(b)).want(0)
	m.boot(b)
	r = m.run("sync").want(6).has("the source is older than the target")
	for _, cmd := range r.hints() {
		m.sh(cmd).want(0)
	}
	m.run("sync").want(0)
	m.run("verify").want(0)
	m.check(a, b, d)
	m.boot(a)

	m.story("No kernel is left but a rescue image: what entries named goes from all members")
	m.put(a, "EFI/Linux/rescue.efi", content(fixtures.PE(50_000, 77)))
	for _, v := range []string{"6.3.0", "6.4.0", "6.5.0", "6.6.0"} {
		if m.files[entry(v)] != "" {
			m.removeKernel(a, v)
		}
	}
	m.mtools(a, "mrd", "::"+fixtures.MachineID)
	m.run("sync").want(0)
	m.check(a, b, d)
	m.run("verify").want(0)

	m.story("The disk that was taken for dead comes back, and is started from")
	m.plug(c)
	m.boot(c)
	m.run("sync").want(6).has("the source is older than the target")
	m.check(a, b, d)
	m.unplug(c)

	m.story("One member alone")
	m.boot(a)
	m.run("remove "+dev(b)+" PARTUUID="+d.guid).want(0).has("removed "+b.guid, "removed "+d.guid)
	m.run("sync").want(0).has("no other member")
	m.run("status").want(0)
	for _, x := range []*member{a, b, d} {
		m.run("check " + dev(x)).want(0)
	}
}

// initial is the counter with which another member begins.
func initial(counter string) string {
	switch counter {
	case "", "+3":
		return counter
	case "+2-1":
		return "+3-0"
	}
	panic(counter)
}

// freshSeeds sees to it that each member has a random seed of its own, and another one than before.
func (m *machine) freshSeeds(ds ...*member) {
	m.t.Helper()
	seen := map[string]bool{}
	for _, d := range ds {
		seen[d.own[seedPath]] = true
	}
	for _, d := range ds {
		seed := m.run("cat " + m.dev(d) + " " + seedPath).want(0).stdout
		if len(seed) != 32 || seen[seed] {
			m.t.Errorf("the random seed of %s has %d bytes, or is not its own and new", d.disk, len(seed))
		}
		seen[seed] = true
		d.own[seedPath] = seed
	}
}

const seedPath = "loader/random-seed"
