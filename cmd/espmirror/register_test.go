package main

import (
	"context"
	"encoding/binary"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"espmirror/blockdev"
	"espmirror/fixtures"
	"espmirror/gpt"
	"espmirror/replicate"
)

const globalVendor = "8be4df61-93ca-11d2-aa0d-00e098032b8c"

// firmware gives the machine boot entries: Boot0001 started it from partition guidOf(1), Boot0000 is the network.
func (r *rig) firmware(loader string) {
	r.t.Helper()
	r.bootCurrent(guidOf(1))
	r.entry("Boot0001", "Linux", guidOf(1), loader)
	r.variable("BootCurrent", globalVendor, []byte{1, 0})
	r.variable("Boot0000", globalVendor, append([]byte{1, 0, 0, 0, 4, 0}, append(utf16le("PXE"), 0x7f, 0xff, 4, 0)...))
	r.order(1, 0)
	r.file("sys/firmware/efi/fw_platform_size", "64\n")
	if err := os.Remove("machine/sys/firmware/efi/efivars/Boot0007-" + globalVendor); err != nil {
		r.t.Fatal(err)
	}
	arch(r.t)
}

// arch skips a test on machines whose boot loaders have other names than those of bootTree.
func arch(t *testing.T) {
	t.Helper()
	if firmwareArch(blockdev.System{Root: t.TempDir()}) != "x64" {
		t.Skip("skipped: the boot loaders of the tests are those of another machine")
	}
}

func (r *rig) order(numbers ...uint16) {
	r.t.Helper()
	b := []byte{7, 0, 0, 0}
	for _, n := range numbers {
		b = binary.LittleEndian.AppendUint16(b, n)
	}
	r.file("sys/firmware/efi/efivars/BootOrder-"+globalVendor, string(b))
}

// entry makes a boot entry for partition 1 of a disk.
func (r *rig) entry(name, description, guid, loader string) {
	r.t.Helper()
	g := gptGUID(r.t, guid)
	hd := binary.LittleEndian.AppendUint32([]byte{4, 1, 42, 0}, 1)
	hd = binary.LittleEndian.AppendUint64(hd, 2048)
	hd = binary.LittleEndian.AppendUint64(hd, 4096)
	hd = append(append(hd, g...), 2, 2)
	file := utf16le(loader)
	path := append(hd, 4, 4, byte(4+len(file)), 0)
	path = append(append(path, file...), 0x7f, 0xff, 4, 0)
	b := binary.LittleEndian.AppendUint16([]byte{7, 0, 0, 0, 1, 0, 0, 0}, uint16(len(path)))
	r.file("sys/firmware/efi/efivars/"+name+"-"+globalVendor, string(append(append(b, utf16le(description)...), path...)))
}

func gptGUID(t *testing.T, guid string) []byte {
	t.Helper()
	hex := strings.ReplaceAll(guid, "-", "")
	var sig [16]byte
	for i, at := range []int{3, 2, 1, 0, 5, 4, 7, 6, 8, 9, 10, 11, 12, 13, 14, 15} {
		if _, err := fmt.Sscanf(hex[2*i:2*i+2], "%02x", &sig[at]); err != nil {
			t.Fatal(err)
		}
	}
	return sig[:]
}

// variables are the names of the EFI variables, with what they hold.
func (r *rig) variables() string {
	r.t.Helper()
	files, err := filepath.Glob("machine/sys/firmware/efi/efivars/*")
	if err != nil {
		r.t.Fatal(err)
	}
	var sb strings.Builder
	for _, f := range files {
		b, err := os.ReadFile(f)
		if err != nil {
			r.t.Fatal(err)
		}
		fmt.Fprintf(&sb, "%s %x\n", filepath.Base(f), b)
	}
	return sb.String()
}

const (
	systemdLoader = `\EFI\systemd\systemd-bootx64.efi`
	orderNow      = "BootOrder-" + globalVendor + " 07000000"
)

func TestAddRegister(t *testing.T) {
	r := newRig(t)
	r.disk("sda", esp(1, bootTree))
	r.disk("sdb", esp(2, emptyTree))
	r.disk("sdc", esp(3, emptyTree))
	r.firmware(systemdLoader)
	before := r.variables()
	r.run("add", "-n", "--register", r.node("sdb1"), r.node("sdc1")).want(0).
		has("boot entry Boot0002 (Linux (espmirror 1000-0002)): EFI/systemd/systemd-bootx64.efi on machine/dev/sdb1: to be created\n",
			"boot entry Boot0003 (Linux (espmirror 1000-0003))")
	r.run("add", "-n", "--register", "--json=short", r.node("sdb1")).want(0).json("set")
	if r.variables() != before {
		t.Error("a dry run wrote")
	}
	r.do("add", "--register", r.node("sdb1")).want(0).golden("add-register")
	if v := r.variables(); !strings.Contains(v, orderNow+"010000000200\n") {
		t.Error(v)
	}
	r.run("status").want(0).golden("status-boot")
	after := r.variables()
	doc := r.do("add", "--register", "--json=short", r.node("sdb1"), r.node("sdc1")).want(0).json("set")
	if e := doc["boot_entries"].([]any); len(e) != 2 || e[0].(map[string]any)["outcome"] != "there" || e[1].(map[string]any)["outcome"] != "created" {
		t.Error(e)
	}
	if v := r.variables(); v == after || !strings.Contains(v, orderNow+"0100000002000300\n") {
		t.Error(v)
	}
	// As a power cut between the two writes leaves it.
	r.order(1, 0, 2)
	r.run("status").want(0).has("  (Boot0003)  in sync")
	r.do("add", "--register", r.node("sdc1")).want(0).has("boot entry Boot0003", ": put in order\n")
	if v := r.variables(); !strings.Contains(v, orderNow+"0100000002000300\n") {
		t.Error(v)
	}
	// Another entry for the same partition, and one that somebody has switched off.
	r.entry("Boot0008", "fallback", guidOf(2), `\EFI\BOOT\BOOTX64.EFI`)
	r.run("status").want(0).has("  Boot0002,(0008)  in sync", "  Boot0001 ")
	doc = r.run("status", "--json=pretty").want(0).json("status")
	e := doc["volumes"].([]any)[1].(map[string]any)["boot_entries"].([]any)
	if len(e) != 2 || e[0].(map[string]any)["path"] != "EFI/systemd/systemd-bootx64.efi" || e[1].(map[string]any)["in_order"] != false {
		t.Error(e)
	}
	r.run("status", "--metrics").want(0).has(`espmirror_member_boot_entries{member="`+guidOf(2)+`"} 1`, `{member="`+guidOf(1)+`"} 1`)
	// What is taken out leaves its entry, and that is told.
	r.pull("sdc")
	r.run("status").want(exitPartial).has("  Boot0003         missing")
	r.do("remove", guidOf(3)).want(0).has("note: Boot0003 (Linux (espmirror 1000-0003)) still starts it; efibootmgr -b 0003 -B deletes it\n")
	r.run("remove", "-n", "--json=short", r.node("sdb1")).want(0).json("set")
	r.app.terminalWidth = func(io.Writer) int { return 80 }
	r.run("status", "--no-progress", "--color=never").want(0).golden("status-boot-80-columns")
}

// TestAddRegisterRefuses: what cannot be registered is known before anything is written; the bench sees to it.
func TestAddRegisterRefuses(t *testing.T) {
	r := newRig(t)
	r.disk("sda", esp(1, bootTree))
	r.disk("sdb", esp(2, emptyTree))
	r.boot(guidOf(1))
	t.Setenv("SYSTEMD_ESP_PATH", r.node("sda1"))
	disk(t, "image.img", fixtures.TypeESP, guidTwo, secondVolume)
	add := func(args ...string) *result {
		t.Helper()
		before := r.variables()
		res := r.run(append([]string{"add", "--register"}, args...)...)
		if r.variables() != before {
			t.Errorf("%v wrote variables", args)
		}
		return res
	}
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	must(os.RemoveAll("machine/sys/firmware"))
	add(r.node("sdb1")).want(exitRefused).has("not started through EFI")
	must(os.MkdirAll("machine/sys/firmware/efi/efivars", 0o755))
	add(r.node("sdb1")).want(exitRefused).has("the EFI variables cannot be seen", "hint: mount -t efivarfs")
	if res := r.run("status").want(0); strings.Contains(res.stdout, "BOOT") {
		t.Error(res.stdout)
	}
	r.firmware(systemdLoader)
	add("image.img").want(exitUsage).has("image.img is an image")
	add("--no-sync", r.node("sdb1")).want(exitUsage).has("exclude each other")
	r.file("proc/self/mountinfo", "30 25 0:24 / /sys/firmware/efi/efivars ro - efivarfs efivarfs rw\n")
	for _, dry := range []string{"--dry-run=true", "--dry-run=false"} {
		add(dry, r.node("sdb1")).want(exitRefused).has("read-only", "hint: mount -o remount,rw")
	}
	r.file("proc/self/mountinfo", "")
	must(os.Remove("machine/sys/firmware/efi/efivars/BootOrder-" + globalVendor))
	must(os.Remove("machine/sys/firmware/efi/efivars/BootCurrent-" + globalVendor))
	add(r.node("sdb1")).want(exitRefused).has("there is no order of boot entries", "for the primary first")
	r.file("sys/firmware/efi/efivars/BootOrder-"+globalVendor, "\x07\x00\x00\x00odd")
	add(r.node("sdb1")).want(exitRefused).has("an odd number")
	r.order(1)
	// A boot loader for another machine.
	r.entry("Boot0001", "Linux", guidOf(1), `\gone.efi`)
	r.file("sys/firmware/efi/fw_platform_size", "32\n")
	add(r.node("sdb1")).want(exitRefused).has("no boot loader for this machine on", "EFI/BOOT/BOOTIA32.EFI")
}

// TestAddRegisterFails: an entry that cannot be made takes nothing from the member.
func TestAddRegisterFails(t *testing.T) {
	defer func() { registerEntry = gpt.Register }()
	r := newRig(t)
	r.disk("sda", esp(1, bootTree))
	r.disk("sdb", esp(2, emptyTree))
	r.disk("sdc", esp(3, emptyTree))
	r.firmware(systemdLoader)
	fails := map[string]error{}
	registerEntry = func(sys blockdev.System, n *gpt.NewEntry) (*gpt.Registered, error) {
		if err := fails[n.Partition.PartUUID]; err != nil {
			return nil, err
		}
		return gpt.Register(sys, n)
	}
	r.do("add", "-q", r.node("sdb1"), r.node("sdc1")).want(0) // journals are made in any order
	fails[guidOf(2)] = withHint(fmt.Errorf("the firmware has no room for it: %w", unix.ENOSPC), "delete something")
	r.do("add", "--register", r.node("sdb1"), r.node("sdc1")).want(exitPartial).golden("add-register-fails")
	r.run("verify").want(0)
	doc := r.do("add", "--register", "--json=short", r.node("sdb1")).want(exitPartial).json("set")
	if e := doc["error"].(map[string]any); !strings.Contains(e["hint"].(string), "delete something; then `espmirror add --register machine/dev/sdb1`") {
		t.Error(e)
	}
	fails[guidOf(2)] = refusef("no")
	r.do("add", "--register", r.node("sdb1")).want(exitPartial)
	delete(fails, guidOf(2))
	// A target that is not in sync gets none, and says so; others do.
	sync := r.app.engine.sync
	r.disk("sdd", esp(4, fixtures.TreeSpec{"full": {Size: 1950 << 10}}))
	before := r.variables()
	r.do("add", "--register", r.node("sdd1"), r.node("sdb1")).want(exitPartial).has("not enough room", "it is a member, and not in sync", "boot entry Boot0003 (Linux (espmirror 1000-0002))")
	if v := r.variables(); v == before || strings.Contains(v, fmt.Sprintf("%x", gptGUID(t, guidOf(4)))) {
		t.Error(v)
	}
	r.app.engine.sync = func(context.Context, []replicate.Job) ([][]replicate.Result, error) { return nil, unix.EIO }
	r.do("add", "--register", r.node("sdb1")).want(exitPartial).has("input/output error", "cannot register machine/dev/sdb1: it is a member, and not in sync")
	r.app.engine.sync = sync
}

// TestLoaders: what is started, the best first.
func TestLoaders(t *testing.T) {
	arch(t)
	file := fixtures.Text("x")
	for _, tc := range []struct {
		tree  fixtures.TreeSpec
		first []string
		arch  string
		want  string
	}{
		{bootTree, nil, "x64", "EFI/systemd/systemd-bootx64.efi EFI/BOOT/BOOTX64.EFI"},
		{bootTree, nil, "aa64", ""},
		{bootTree, []string{"/efi/boot/bootx64.efi"}, "x64", "EFI/BOOT/BOOTX64.EFI EFI/systemd/systemd-bootx64.efi"},
		{fixtures.TreeSpec{"EFI/debian/shimx64.efi": file, "EFI/debian/grubx64.efi": file, "EFI/Microsoft/shimx64.efi": file, "EFI/BOOT/BOOTAA64.EFI": file}, nil, "x64",
			"EFI/debian/shimx64.efi EFI/debian/grubx64.efi"},
		{fixtures.TreeSpec{"EFI/debian/shimx64.efi": file, "EFI/debian/grubx64.efi": file, "EFI/debian/fwupdx64.efi": file, "EFI/Linux/a.efi": file, "EFI/a/b/c.efi": file},
			[]string{"/EFI/Linux/a.efi", "/EFI/a/b/c.efi", "/EFI/debian/fwupdx64.efi", "/EFI/debian/grubx64.efi"}, "x64",
			"EFI/a/b/c.efi EFI/debian/grubx64.efi EFI/debian/shimx64.efi"},
		{fixtures.TreeSpec{"EFI/refind/refind_x64.efi": file, "EFI/BOOT/bootx64.efi": file, "shimx64.efi": file}, nil, "x64", "EFI/refind/refind_x64.efi EFI/BOOT/bootx64.efi"},
	} {
		dir := t.TempDir()
		if err := tc.tree.Write(dir); err != nil {
			t.Fatal(err)
		}
		src, err := replicate.OpenDirSource(dir)
		if err != nil {
			t.Fatal(err)
		}
		if got := loadersOn(src.Root(), tc.arch, tc.first); !slices.Equal(got, strings.Fields(tc.want)) {
			t.Errorf("%v: %q, want %q", tc.first, got, tc.want)
		}
	}
}

// TestInitRegister makes a member of a blank disk, with an entry.
func TestInitRegister(t *testing.T) {
	r := newRig(t)
	r.disk("sda", esp(1, bootTree))
	r.firmware(`\EFI\BOOT\BOOTX64.EFI`)
	blank := func(name string) {
		r.disk(name, esp(9, emptyTree))
		r.file("dev/"+name, strings.Repeat("\x00", 8<<20))
		for _, link := range []string{"1"} {
			if err := os.Remove("machine/sys/class/block/" + name + link); err != nil {
				t.Fatal(err)
			}
		}
	}
	blank("sdb")
	before := r.variables()
	r.run("init", "-n", "--register", "--seed=x", r.node("sdb")).want(0).has("note: boot entry Boot0002 (Linux (espmirror ", "EFI/BOOT/BOOTX64.EFI on machine/dev/sdb@@p1: to be created\n")
	r.run("init", "-n", "--register", "--no-set", r.node("sdb")).want(exitRefused).has("it does not become a member")
	r.run("init", "--register", "--size=8M", "new.img").want(exitUsage).has("new.img is an image")
	if _, err := os.Stat("new.img"); err == nil || r.variables() != before {
		t.Error("something was written", err)
	}
	doc := r.do("init", "--register", "--seed=x", "--json=short", r.node("sdb")).want(0).json("init")
	if e := doc["set"].(map[string]any)["boot_entries"].([]any); len(e) != 1 || e[0].(map[string]any)["outcome"] != "created" || len(doc["targets"].([]any)[0].(map[string]any)["left_to_do"].([]any)) != 0 {
		t.Error(doc)
	}
	r.do("init", "--register", "--seed=x", r.node("sdb")).want(0).has(": there\n")
	if v := r.variables(); !strings.Contains(v, orderNow+"010000000200\n") {
		t.Error(v)
	}
	// An entry that cannot be made.
	blank("sdc")
	defer func() { registerEntry = gpt.Register }()
	registerEntry = func(blockdev.System, *gpt.NewEntry) (*gpt.Registered, error) { return nil, unix.ENOSPC }
	r.do("init", "--register", "--seed=y", r.node("sdc")).want(exitPartial).has("it is a whole member of the set, and only its boot entry is missing")
	registerEntry = gpt.Register
	r.do("init", "--register", "--seed=y", r.node("sdc")).want(0).has(": created\n")
}
