package main

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
	"unicode/utf16"

	"espmirror/blockdev"
	"espmirror/fixtures"
)

// guidOf is the GUID of the nth partition of a rig.
func guidOf(n int) string { return fmt.Sprintf("%08x-0000-4000-8000-%012x", 0x6f0c0000+n, n) }

// rig is a machine in the folder "machine" below that of the test, whose disks are image files: so that the names of its
// nodes are the same in every run. Disk sda has the partition guidOf(1), and so on.
type rig struct {
	*bench
	next int
}

func newRig(t *testing.T) *rig {
	t.Helper()
	r := &rig{bench: newBench(t)}
	r.app.system = blockdev.System{Root: "machine"}
	for _, dir := range []string{"sys/class/block", "sys/gone", "sys/block", "proc/self", "dev"} {
		if err := os.MkdirAll(filepath.Join("machine", dir), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	r.file("proc/self/mountinfo", "")
	r.file("proc/swaps", "")
	return r
}

func (r *rig) file(name, content string) {
	r.t.Helper()
	path := filepath.Join("machine", name)
	if err := errors.Join(os.MkdirAll(filepath.Dir(path), 0o755), os.WriteFile(path, []byte(content), 0o644)); err != nil {
		r.t.Fatal(err)
	}
}

// node is the node of a device.
func (r *rig) node(name string) string { return filepath.Join("machine/dev", name) }

// esp is a small ESP; n gives it an identity of its own.
func esp(n int, tree fixtures.TreeSpec) fixtures.PartSpec {
	return fixtures.PartSpec{Type: fixtures.TypeESP, GUID: guidOf(n), Name: "EFI system", Off: 1 << 20,
		Volume: &fixtures.VolumeSpec{FAT: 12, Size: 2 << 20, Serial: 0x10000000 + uint32(n), Label: fmt.Sprintf("ESP%d", n), Tree: tree}}
}

// xbootldr is an XBOOTLDR partition behind an esp.
func xbootldr(n int, tree fixtures.TreeSpec) fixtures.PartSpec {
	p := esp(n, tree)
	p.Type, p.Name, p.Off = fixtures.TypeXBOOTLDR, "boot", 4<<20
	return p
}

var emptyTree = fixtures.TreeSpec{"EFI/Microsoft/Boot/bootmgfw.efi": fixtures.Text(fixtures.Program("not ours"))}

// disk adds a disk. Its sysfs directories come last and at once, as a device does.
func (r *rig) disk(name string, parts ...fixtures.PartSpec) {
	r.t.Helper()
	img := filepath.Join(r.t.TempDir(), "disk")
	last := parts[len(parts)-1]
	makeFixture(r.t, fixtures.DiskSpec{Size: last.Off + last.Volume.Size + 2<<20, GUID: "0a0a0a0a-0000-4000-8000-" + last.GUID[24:], Parts: parts}, img)
	data, err := os.ReadFile(img)
	if err != nil {
		r.t.Fatal(err)
	}
	r.file("dev/"+name, string(data))
	dirs := []string{name}
	device := func(dir string, bytes int64, more string) {
		dir = "sys/devices/" + dir
		r.file(dir+"/dev", fmt.Sprintf("8:%d\n", r.next))
		r.next++
		r.file(dir+"/uevent", more)
		r.file(dir+"/size", fmt.Sprintf("%d\n", bytes/512))
	}
	device(name, int64(len(data)), "")
	for i, p := range parts {
		node := fmt.Sprintf("%s%d", name, i+1)
		r.file("dev/"+node, string(data[p.Off:p.Off+p.Volume.Size]))
		dir := name + "/" + node
		r.file("sys/devices/"+dir+"/partition", fmt.Sprintf("%d\n", i+1))
		r.file("sys/devices/"+dir+"/start", fmt.Sprintf("%d\n", p.Off/512))
		device(dir, p.Volume.Size, fmt.Sprintf("DEVNAME=%s\nPARTN=%d\nPARTUUID=%s\n", node, i+1, strings.ToLower(p.GUID)))
		dirs = append(dirs, dir)
	}
	for _, d := range dirs {
		if err := os.Symlink("../../devices/"+d, filepath.Join("machine/sys/class/block", filepath.Base(d))); err != nil {
			r.t.Fatal(err)
		}
	}
}

// pull takes a disk out of the machine; its nodes stay where they are and are found by nobody.
func (r *rig) pull(name string) {
	r.t.Helper()
	links, err := filepath.Glob("machine/sys/class/block/" + name + "*")
	if err != nil {
		r.t.Fatal(err)
	}
	for _, link := range links {
		if err := os.Rename(link, strings.Replace(link, "class/block", "gone", 1)); err != nil {
			r.t.Fatal(err)
		}
	}
}

// plug puts it back.
func (r *rig) plug(name string) {
	r.t.Helper()
	links, err := filepath.Glob("machine/sys/gone/" + name + "*")
	if err != nil || len(links) == 0 {
		r.t.Fatal(name, err)
	}
	for _, link := range links {
		if err := os.Rename(link, strings.Replace(link, "gone", "class/block", 1)); err != nil {
			r.t.Fatal(err)
		}
	}
}

func utf16le(s string) []byte {
	var b []byte
	for _, u := range utf16.Encode([]rune(s + "\x00")) {
		b = binary.LittleEndian.AppendUint16(b, u)
	}
	return b
}

func (r *rig) variable(name, vendor string, data []byte) {
	r.t.Helper()
	r.file("sys/firmware/efi/efivars/"+name+"-"+vendor, "\x06\x00\x00\x00"+string(data))
}

// boot has the boot loader say that it was started from a partition.
func (r *rig) boot(guid string) {
	r.t.Helper()
	r.variable("LoaderDevicePartUUID", "4a67b082-0a4c-41cf-b6c7-440b29bb8c4f", utf16le(strings.ToUpper(guid)))
}

// bootCurrent has the firmware say it, and the boot loader nothing.
func (r *rig) bootCurrent(guid string) {
	r.t.Helper()
	const global = "8be4df61-93ca-11d2-aa0d-00e098032b8c"
	if err := os.RemoveAll("machine/sys/firmware/efi/efivars"); err != nil {
		r.t.Fatal(err)
	}
	r.variable("BootCurrent", global, []byte{7, 0})
	var sig [16]byte
	hex := strings.ReplaceAll(guid, "-", "")
	for i, at := range []int{3, 2, 1, 0, 5, 4, 7, 6, 8, 9, 10, 11, 12, 13, 14, 15} {
		fmt.Sscanf(hex[2*i:2*i+2], "%02x", &sig[at])
	}
	// UEFI specification, "Hard Drive Media Device Path"
	hd := binary.LittleEndian.AppendUint32([]byte{4, 1, 42, 0}, 1)
	hd = binary.LittleEndian.AppendUint64(hd, 2048)
	hd = binary.LittleEndian.AppendUint64(hd, 4096)
	hd = append(append(hd, sig[:]...), 2, 2)
	path := append(hd, 0x7f, 0xff, 4, 0)
	option := binary.LittleEndian.AppendUint16([]byte{1, 0, 0, 0}, uint16(len(path)))
	r.variable("Boot0007", global, append(append(option, utf16le("Linux")...), path...))
}

// copyIn puts a file onto a volume, past espmirror.
func (r *rig) copyIn(node, path, content string) {
	r.t.Helper()
	tmp := filepath.Join(r.t.TempDir(), "file")
	if err := os.WriteFile(tmp, []byte(content), 0o644); err != nil {
		r.t.Fatal(err)
	}
	tool(r.t, "mcopy", "-Q", "-o", "-i", r.node(node), tmp, "::"+path)
}

// setFile is the replica set file of a volume, "" when it has none.
func (r *rig) setFile(node string) string {
	r.t.Helper()
	res := r.run("cat", r.node(node), "loader/esp-sync")
	if res.code != 0 {
		return ""
	}
	return res.stdout
}

// do runs a command that may write.
func (r *rig) do(args ...string) *result {
	r.t.Helper()
	r.writes = true
	defer func() { r.writes = false }()
	return r.run(args...)
}

// follow runs the nth command that stands in backquotes in a result's output, as a person would.
func (r *rig) follow(res *result, n int) *result {
	r.t.Helper()
	parts := strings.Split(res.stderr, "`")
	if len(parts) < 2*n+2 {
		r.t.Fatalf("no command %d in\n%s", n, res.stderr)
	}
	words := strings.Fields(parts[2*n+1])
	if words[0] != "espmirror" {
		r.t.Fatalf("%q is no command of ours", parts[2*n+1])
	}
	return r.do(words[1:]...)
}

// set makes disks sda, sdb, … that are in sync; the machine was booted from sda.
func (r *rig) set(disks int) {
	r.t.Helper()
	r.disk("sda", esp(1, bootTree))
	r.boot(guidOf(1))
	args := []string{"add", "-q"}
	for i := 2; i <= disks; i++ {
		name := "sd" + string(rune('a'+i-1))
		r.disk(name, esp(i, emptyTree))
		args = append(args, r.node(name+"1"))
	}
	r.do(args...).want(0).silent()
}

func TestAdd(t *testing.T) {
	r := newRig(t)
	r.disk("sda", esp(1, bootTree))
	r.disk("sdb", esp(2, emptyTree))
	r.disk("sdc", esp(3, emptyTree))
	r.run("add", r.node("sdb1")).want(exitUsage).has("no primary was given", "not started through EFI")
	r.boot(guidOf(1))
	r.run("add").want(exitUsage).has("name the volumes")
	r.run("sync").want(exitUsage).has("no target was given, and machine/dev/sda1 has no loader/esp-sync", "espmirror add")

	r.run("add", "--dry-run", r.node("sdb1")).want(0).golden("add-dry-run")
	r.run("add", "-n", "--json=pretty", r.node("sdb1")).want(0).json("set")
	before := hashes(t)
	r.do("add", "--no-sync", r.node("sdb1")).want(0).has("added " + guidOf(2))
	if after := hashes(t); after["machine/dev/sdb1"] != before["machine/dev/sdb1"] || after["machine/dev/sda1"] == before["machine/dev/sda1"] {
		t.Error("--no-sync writes the primary's file and nothing else")
	}
	if got := r.setFile("sda1"); got != newSetFile+"member "+guidOf(1)+" # sda1, EFI system\nmember "+guidOf(2)+" # sdb1, EFI system\n" {
		t.Error(got)
	}
	r.do("sync").want(0).golden("set-sync")
	r.run("check", r.node("sda1"), r.node("sdb1")).want(0)
	r.run("verify").want(0)

	doc := r.do("add", "--json=pretty", r.node("sdc1")).want(0).json("set")
	if sync := doc["sync"].(map[string]any)["targets"].([]any); len(sync) != 2 || doc["written"] != true || len(doc["members"].([]any)) != 3 {
		t.Error(doc)
	}
	for _, node := range []string{"sdb1", "sdc1"} {
		if r.setFile(node) != r.setFile("sda1") {
			t.Errorf("%s has another set file:\n%s", node, r.setFile(node))
		}
	}
	r.run("add", r.node("sdc1")).want(0).has("the replica set is as it should be")
	r.run("add", "-q", "PARTUUID="+guidOf(3)).want(0).silent()
	doc = r.run("add", "--json=short", r.node("sdc1")).want(0).json("set")
	if doc["written"] != false || len(doc["changed"].([]any)) != 0 {
		t.Error(doc)
	}
	r.run("status").want(0).golden("set-status-in-sync")
	r.run("add-secondary-esp", "-n", r.node("sdc")).want(0) // the disk with one ESP
}

// TestAddRefuses holds what must not become a member. The bench sees to it that nothing is written, to the primary neither.
func TestAddRefuses(t *testing.T) {
	r := newRig(t)
	r.set(2)
	twin, serial, data, boot := esp(2, emptyTree), esp(4, emptyTree), esp(5, emptyTree), esp(6, emptyTree)
	serial.Volume.Serial = 0x10000002
	data.Type = fixtures.TypeLinux
	r.disk("sdd", serial)
	r.disk("sde", data)
	r.disk("sdf", boot, xbootldr(7, bootTree))
	makeFixture(t, *esp(8, emptyTree).Volume, "bare.img")
	twin.Volume.Serial = 77
	disk := fixtures.DiskSpec{Size: 5 << 20, GUID: guidOf(90), Parts: []fixtures.PartSpec{twin}}
	makeFixture(t, disk, "twin.img")
	if err := os.Mkdir("dir", 0o755); err != nil {
		t.Fatal(err)
	}
	own := r.node("sda1")
	for _, tc := range []struct {
		args string
		code int
		want string
	}{
		{own, exitRefused, "it is the primary"},
		{r.node("sdd1"), exitRefused, "the same FAT serial number 1000-0002 as member machine/dev/sdb1"},
		{r.node("sde1"), exitRefused, "is not an EFI system partition"},
		{r.node("sdf2"), exitRefused, "it is an XBOOTLDR partition, and primary"},
		{"bare.img", exitRefused, "it has no partition GUID"},
		{"twin.img@@p1", exitRefused, "the same partition GUID " + guidOf(2) + " as member machine/dev/sdb1"},
		{"dir", exitRefused, "it is a directory"},
		{"gone.img", exitPartial, "gone.img"},
		{r.node("sdf1") + " " + r.node("sdd1"), exitRefused, "serial"},
		{r.node("sdf1") + " " + r.node("sdf"), exitRefused, "it is named twice"},
		{"--primary dir " + r.node("sdf1"), exitRefused, "primary dir has no partition GUID"},
		{"--primary bare.img " + r.node("sdf1"), exitRefused, "bare.img has no partition GUID"},
		{"--primary " + r.node("sdf2") + " " + r.node("sdb1"), exitRefused, "it is an XBOOTLDR partition"},
	} {
		tc.want = strings.Replace(tc.want, "primary dir has", "primary dir", 1)
		for _, more := range []string{"", "-n ", "--no-sync ", "--json=short "} {
			res := r.run(strings.Fields("add " + more + tc.args)...).want(tc.code)
			if !strings.Contains(res.stderr, strings.TrimPrefix(tc.want, "primary ")) && !strings.Contains(res.stderr, "it has no partition GUID") {
				t.Errorf("%s: no %q in %s", tc.args, tc.want, res.stderr)
			}
			if more == "--json=short " {
				res.json("set")
			}
		}
	}
	// A machine where the twin is plugged in beside the member.
	r.disk("sdg", twin)
	r.run("add", r.node("sdg1")).want(exitRefused).has("ambiguous")
	// What refuses after the set was written is no "nothing was written".
	r.disk("sdh", esp(9, fixtures.Merge(bootTree, fixtures.TreeSpec{"EFI/Linux/big": {Size: 1900 << 10}})))
	r.disk("sdi", esp(10, fixtures.TreeSpec{"full": {Size: 2000 << 10}}))
	r.boot(guidOf(9))
	doc := r.do("add", "--json=short", r.node("sdi1")).want(exitPartial).has("not enough room").json("set")
	if doc["written"] != true || doc["sync"] == nil {
		t.Error(doc)
	}
}

func TestRemove(t *testing.T) {
	r := newRig(t)
	r.set(4)
	r.run("remove").want(exitUsage)
	r.run("remove", r.node("sda1")).want(exitRefused).has("it is the primary")
	r.run("remove", guidOf(1)).want(exitRefused).has("it is the primary", "--primary")
	r.run("remove", guidOf(9)).want(exitRefused).has("is not in the replica set", "hint: the members are "+guidOf(1))
	r.disk("sdx", esp(9, emptyTree))
	r.run("remove", r.node("sdx1")).want(exitRefused).has(guidOf(9) + " is not in the replica set")
	r.run("remove", "gone.img").want(exitPartial).has("hint: a member that is gone is named by its partition GUID")
	r.run("remove", "-n", r.node("sdb1")).want(0).has("to be removed " + guidOf(2))

	before := hashes(t)["machine/dev/sdb1"]
	doc := r.do("remove", "--json=pretty", r.node("sdb1")).want(0).json("set")
	if hashes(t)["machine/dev/sdb1"] != before {
		t.Error("what was taken out was written to")
	}
	if len(doc["sync"].(map[string]any)["targets"].([]any)) != 2 {
		t.Error(doc)
	}
	for _, node := range []string{"sda1", "sdc1", "sdd1"} {
		if s := r.setFile(node); strings.Contains(s, guidOf(2)) || !strings.Contains(s, guidOf(3)) {
			t.Errorf("%s: %s", node, s)
		}
	}
	// What was taken out still lists the others, and itself.
	r.run("status", "--target", r.node("sdb1")).has("warning: the target's loader/esp-sync lists members that the primary's does not: " + guidOf(2))

	// A disk that died.
	r.pull("sdc")
	res := r.do("sync").want(exitPartial).has("cannot sync PARTUUID="+guidOf(3), "connect its disk")
	res = r.follow(res, 0).want(0).has("removed " + guidOf(3))
	if strings.Contains(res.stderr, "warning") {
		t.Error("a warning of what the command itself has done: " + res.stderr)
	}
	r.do("sync").want(0)
	r.do("remove", "--no-sync", "PARTUUID="+strings.ToUpper(guidOf(4))).want(0)
	if s := r.setFile("sda1"); s != newSetFile+"member "+guidOf(1)+" # sda1, EFI system\n" {
		t.Error(s)
	}
	// A set of one.
	res = r.run("sync").want(0).has("the replica set has no other member")
	if res.stdout != "" {
		t.Error(res.stdout)
	}
	r.run("sync", "-q").want(0).silent()
	r.run("sync", "--json=short").want(0).json("run")
	r.run("verify").want(0)
	r.run("status").want(0).has("primary")
	// The last one.
	r.boot(guidOf(4))
	r.do("remove", guidOf(1)).want(0)
	r.do("remove-secondary-esp", "--no-sync", guidOf(1)).want(exitRefused)
}

// TestSyncBySet: with no argument at all, on a machine that says what it was booted from.
func TestSyncBySet(t *testing.T) {
	r := newRig(t)
	r.set(3)
	foreign := esp(9, emptyTree)
	r.disk("sdx", foreign)
	r.copyIn("sda1", "loader/loader.conf", "timeout 1\n")
	r.run("sync", "-n").want(exitDiffers).has("machine/dev/sdb1: differs, 1 change", "machine/dev/sdc1: differs, 1 change")
	opened := fixtures.Opens(t, "machine/dev")
	if code := r.app.run(r.ctx, []string{"espmirror", "sync"}); code != 0 { // the bench would open everything
		t.Fatal(code, r.err.String())
	}
	if names := opened(); slices.Contains(names, "sdx") || slices.Contains(names, "sdx1") || !slices.Contains(names, "sdc1") {
		t.Errorf("opened %v", names)
	}
	r.run("sync").want(0).golden("set-sync-in-sync")
	r.run("verify").want(0)

	// A copy of the disk that was booted is not taken for it.
	clone := esp(1, emptyTree)
	clone.Volume.Serial = 77
	makeFixture(t, fixtures.DiskSpec{Size: 5 << 20, GUID: guidOf(90), Parts: []fixtures.PartSpec{clone}}, "clone.img")
	r.run("sync", "--target", "clone.img").want(exitRefused).has("the same partition GUID " + guidOf(1) + " as machine/dev/sda1")

	// The firmware's word.
	r.bootCurrent(guidOf(2))
	r.run("sync", "-v").want(0).has("BootCurrent", "machine/dev/sda1", "machine/dev/sdc1")
	// Neither.
	if err := os.RemoveAll("machine/sys/firmware"); err != nil {
		t.Fatal(err)
	}
	r.run("sync").want(exitUsage).has("no primary was given", "--primary")
	r.run("sync", "--primary", r.node("sda1")).want(0)
	t.Setenv("SYSTEMD_ESP_PATH", r.node("sda1"))
	r.run("sync").want(0)
	os.Unsetenv("SYSTEMD_ESP_PATH")

	// One is missing: it is named, and the others are done.
	r.boot(guidOf(1))
	r.copyIn("sda1", "loader/loader.conf", "timeout 2\n")
	r.pull("sdb")
	r.do("sync").want(exitPartial).golden("set-sync-missing")
	r.run("cat", r.node("sdc1"), "loader/loader.conf").want(0).has("timeout 2")
	doc := r.do("sync", "--json=short").want(exitPartial).json("run")
	if x := doc["targets"].([]any)[0].(map[string]any); x["outcome"] != "missing" || x["name"] != "PARTUUID="+guidOf(2) {
		t.Error(x)
	}
	// It comes while sync waits.
	start := time.Now()
	time.AfterFunc(200*time.Millisecond, func() { r.plug("sdb") })
	r.do("sync", "--timeout=1min").want(0).has("waiting for PARTUUID=" + guidOf(2))
	if time.Since(start) > 30*time.Second {
		t.Error("it waited for what was there")
	}
	r.run("cat", r.node("sdb1"), "loader/loader.conf").want(0).has("timeout 2")
	// So does the primary.
	r.pull("sda")
	r.run("sync").want(exitFailed).has("cannot use primary PARTUUID=" + guidOf(1))
	time.AfterFunc(200*time.Millisecond, func() { r.plug("sda") })
	r.do("sync", "--timeout=1min").want(0).has("waiting for PARTUUID=" + guidOf(1))
	r.run("sync", "--timeout=soon").want(exitUsage)
	// The time is that of all waits together.
	r.pull("sda")
	r.pull("sdb")
	start = time.Now()
	time.AfterFunc(4*time.Second, func() { r.plug("sda") })
	r.do("sync", "--timeout=5s").want(exitPartial).has("waiting for PARTUUID="+guidOf(1), "waiting for PARTUUID="+guidOf(2))
	if took := time.Since(start); took > 7500*time.Millisecond { // 9 s for one wait after the other
		t.Errorf("it waited for %v in all", took)
	}
	r.plug("sdb")
	r.run("sync", "--timeout=soon", "--target", r.node("sdb1")).want(exitUsage)

	// The set says how long to wait. Who only looks does not.
	r.copyIn("sda1", "loader/esp-sync", r.setFile("sda1")+"timeout 1s\nkeep-free 1K\n")
	r.do("sync").want(0)
	r.pull("sdb")
	for cmd, wait := range map[string]bool{"status": false, "verify": false, "sync": true, "sync --timeout=0": false} {
		start := time.Now()
		r.run(strings.Fields(cmd)...).want(exitPartial)
		if took := time.Since(start); (took >= time.Second) != wait {
			t.Errorf("%s took %v", cmd, took)
		}
	}
	r.plug("sdb")
	// What must stay free is the set's to say.
	r.copyIn("sda1", "loader/esp-sync", strings.Replace(r.setFile("sda1"), "1K", "1G", 1))
	r.run("sync").want(exitRefused).has("not enough room")
	r.run("sync", "-n", "--keep-free=1K").want(exitDiffers)
}

// TestSetErrors: what is wrong with the primary's set stops the run before anything is written.
func TestSetErrors(t *testing.T) {
	r := newRig(t)
	r.set(2)
	good := r.setFile("sda1")
	r.copyIn("sda1", "loader/esp-sync", good+"exlude x\n")
	for _, cmd := range []string{"sync", "sync -n", "verify", "status", "random-seed", "wait", "add " + r.node("sdb1"), "remove " + guidOf(2)} {
		r.run(strings.Fields(cmd)...).want(exitRefused).has("machine/dev/sda1:loader/esp-sync", "line 4", "exclude")
	}
	r.run("status").want(exitRefused).has("primary  machine/dev/sda1")
	r.run("status", "--json=short").want(exitRefused).json("status")
	r.copyIn("sda1", "loader/esp-sync", "member "+guidOf(2)+"\nmember "+guidOf(7)+"\n")
	r.run("sync").want(exitRefused).has("primary machine/dev/sda1 is not in its own replica set", "hint: add it")
	r.run("status").want(exitRefused)
	makeFixture(t, fixtures.VolumeSpec{FAT: 12, Size: 2 << 20, Serial: 9, Tree: fixtures.Merge(bootTree, fixtures.TreeSpec{"loader/esp-sync": fixtures.Text(good)})}, "bare.img")
	r.run("sync", "--primary", "bare.img").want(exitRefused).has("hint: name the targets with --target")
	// What the set leaves out stays out, whatever the command line adds.
	r.copyIn("sda1", "loader/esp-sync", good+"exclude EFI/Linux\n")
	r.copyIn("sdb1", "EFI/Linux/own.efi", fixtures.Program("own"))
	r.run("verify").want(exitDiffers).has("loader/esp-sync")
	for _, args := range [][]string{{"--exclude", "nothing"}, {"--select", "EFI"}} {
		if res := r.run(append([]string{"verify"}, args...)...); strings.Contains(res.stdout, "own.efi") {
			t.Error(res.stdout)
		}
	}
}

// TestNewerAndDiverged goes through the life that the lineage is for, and follows what the hints say.
func TestNewerAndDiverged(t *testing.T) {
	r := newRig(t)
	r.set(3)
	r.pull("sda")
	r.boot(guidOf(2))
	r.copyIn("sdb1", "loader/loader.conf", "timeout 1\n")
	r.do("sync").want(exitPartial).has(guidOf(1))
	r.plug("sda")
	r.boot(guidOf(1))
	res := r.run("sync").want(exitRefused).has("cannot sync machine/dev/sdb1: the source is older than the target: the target is at generation 2, the source still at 1")
	r.run("sync", "-n").want(exitRefused)
	r.run("status").want(exitRefused).golden("set-status-newer")
	r.run("status", "--json=short").want(exitRefused).json("status")
	r.follow(res, 0).want(0)
	r.run("cat", r.node("sda1"), "loader/loader.conf").want(0).has("timeout 1")
	r.run("sync").want(0)

	// The same, overruled.
	r.copyIn("sdb1", "loader/loader.conf", "timeout 2\n")
	r.boot(guidOf(2))
	r.do("sync", "--target", r.node("sdc1")).want(0)
	r.boot(guidOf(1))
	r.run("sync", "--target", r.node("sdc1")).want(exitRefused)
	r.do("sync", "--force").want(0).has("warning: forced")
	r.run("cat", r.node("sdc1"), "loader/loader.conf").want(0).has("timeout 1")
	r.run("sync").want(0)

	// Both went on.
	for i, winner := range []string{"sda1", "sdb1"} {
		r.copyIn("sda1", "loader/loader.conf", fmt.Sprintf("timeout 1%d\n", i))
		r.copyIn("sdb1", "loader/loader.conf", fmt.Sprintf("timeout 2%d\n", i))
		res = r.run("sync", "--target", r.node("sdb1")).want(exitRefused).has("have diverged")
		if i == 0 {
			r.run("status").want(exitRefused).golden("set-status-diverged")
		}
		r.follow(res, i).want(0)
		want := fmt.Sprintf("timeout %d%d\n", i+1, i)
		for _, node := range []string{"sda1", "sdb1"} {
			if got := r.run("cat", r.node(node), "loader/loader.conf").want(0).stdout; got != want {
				t.Errorf("%s won, and %s has %q", winner, node, got)
			}
		}
		r.do("sync").want(0)
	}
}

// TestTwoOnOneDisk: two targets in one image are not a pair, and one that is refused does not keep the other back.
func TestTwoOnOneDisk(t *testing.T) {
	b := newBench(t)
	makeFixture(t, *esp(1, bootTree).Volume, "a.img")
	full := esp(3, fixtures.TreeSpec{"full": {Size: 2000 << 10}})
	full.Off = 4 << 20
	makeFixture(t, fixtures.DiskSpec{Size: 8 << 20, GUID: guidOf(90), Parts: []fixtures.PartSpec{esp(2, emptyTree), full}}, "two.img")
	b.writes = true
	b.run("sync", "--primary", "a.img", "--target", "two.img@@p1", "--target", "two.img@@p2").want(exitPartial).has("two.img@@p1  synced", "not enough room")
}

// TestAddOfAnotherSet: a volume that has a history of its own is not overwritten by being added. The hint says how it is.
func TestAddOfAnotherSet(t *testing.T) {
	r := newRig(t)
	r.set(2)
	r.disk("sdc", esp(3, bootTree))
	r.disk("sdd", esp(4, emptyTree))
	r.boot(guidOf(3))
	r.do("add", "-q", r.node("sdd1")).want(0)
	r.copyIn("sdd1", "loader/loader.conf", "timeout 4\n")
	r.boot(guidOf(1))
	res := r.do("add", r.node("sdd1")).want(exitPartial).has("added "+guidOf(4), "they belong to different replica sets")
	r.run("cat", r.node("sdd1"), "loader/loader.conf").want(0).has("timeout 4")
	r.run("sync").want(exitRefused)
	r.follow(res, 0).want(0)
	r.run("sync").want(0)
	r.run("status").want(0)
}

// TestPrimaryHeld: the set is not changed while somebody else writes to the primary.
func TestPrimaryHeld(t *testing.T) {
	r := newRig(t)
	r.set(2)
	r.disk("sdc", esp(3, emptyTree))
	release := r.hold("sda1")
	r.run("add", r.node("sdc1")).want(exitFailed).has("locked by another program")
	release()
	r.do("add", r.node("sdc1")).want(0)
}

// The state on the primary is written, and the one target that is left to do is refused: exit status 6.
func TestStateAndRefusal(t *testing.T) {
	r := newRig(t)
	r.set(3)
	// The primary's state is lost; sdb has the tree still, sdc cannot be used.
	tool(t, "mdel", "-i", r.node("sda1"), "::EFI/espmirror/state")
	data, err := os.ReadFile(r.node("sdc1"))
	if err != nil {
		t.Fatal(err)
	}
	copy(data[3:], "NTFS    ")
	clear(data[11:64])
	if err := os.WriteFile(r.node("sdc1"), data, 0o644); err != nil {
		t.Fatal(err)
	}
	before := hashes(t)
	res := r.do("sync")
	after := hashes(t)
	var changed []string
	for n := range before {
		if before[n] != after[n] {
			changed = append(changed, n)
		}
	}
	if res.code != exitPartial || len(changed) == 0 {
		t.Errorf("exit status %d, and written to: %q\n%s", res.code, changed, res.stderr)
	}
}
