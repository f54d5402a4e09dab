// Package day lives a day in the life of a replica set: three disks, kernel updates, disks that go away and come back, one
// that is replaced, a power cut. The binary is run as an administrator runs it; what it leaves is read by mtools and
// fsck.fat.
package day

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"unicode/utf16"
	"unicode/utf8"

	"espmirror/fixtures"
)

func TestMain(m *testing.M) { os.Exit(fixtures.Main(m)) }

// partOff is where mkdisk has the ESP.
const partOff = 1 << 20

// member is a disk with an ESP.
type member struct {
	disk   string // its name on the machine
	guid   string // of the partition
	root   string // what stands for root= on it
	espLen int64
	own    map[string]string // files that belong to it alone
	count  map[string]string // boot counters of its entries, by the path without them
	image  string            // where it lies, plugged in or not
	node   string            // the device or image; "" when it is not plugged in
	vol    string            // what mtools opens for the ESP
	part   string            // the device of the ESP, on loop devices
	mnt    string            // where it is mounted, "" when it is not
	sector []byte            // the boot sector, as it must stay
	table  [32]byte          // hash of all that is not the ESP
}

// machine is a computer in a directory: its disks are images, or loop devices over them.
type machine struct {
	t     *testing.T
	dir   string // of images and trees
	root  string // of /sys, /proc and /dev
	path  string // of programs
	loops bool
	disks map[string]*member
	next  int
	// files are the replicated ones, by the path without boot counters; @ROOT@ stands for what differs.
	files map[string]string
	set   string // loader/esp-sync, which espmirror writes
}

func (m *machine) must(err error) {
	m.t.Helper()
	if err != nil {
		m.t.Fatal(err)
	}
}

// story is what -v shows.
func (m *machine) story(format string, a ...any) {
	m.t.Helper()
	m.t.Logf("== "+format, a...)
}

// build makes the programs, once for all machines.
func build(t *testing.T) string {
	dir := t.TempDir()
	for _, p := range []string{"cmd/espmirror", "fixtures/mkdisk", "fixtures/powercut"} {
		fixtures.Build(t, dir, p)
	}
	return dir
}

func newMachine(t *testing.T, bin string, loops bool) *machine {
	dir := t.TempDir()
	m := &machine{t: t, dir: dir, root: filepath.Join(dir, "machine"), path: filepath.Join(dir, "bin"), loops: loops,
		disks: map[string]*member{}, files: map[string]string{}}
	for _, d := range []string{"sys/class/block", "sys/block", "sys/dev/block", "sys/firmware/efi/efivars", "proc/self", "dev"} {
		m.must(os.MkdirAll(filepath.Join(m.root, d), 0o755))
	}
	m.must(os.MkdirAll(m.path, 0o755))
	m.write(filepath.Join(m.root, "proc/self/mountinfo"), "")
	m.write(filepath.Join(m.root, "proc/swaps"), "")
	// So that a command can be run as a message prints it.
	for _, p := range []string{"espmirror", "powercut"} {
		script := fmt.Sprintf("#!/bin/sh\nexec %s/%s --system-root=%s \"$@\"\n", bin, p, m.root)
		m.must(os.WriteFile(filepath.Join(m.path, p), []byte(script), 0o755))
	}
	m.must(os.Symlink(filepath.Join(bin, "mkdisk"), filepath.Join(m.path, "mkdisk")))
	return m
}

func (m *machine) write(path, text string) {
	m.t.Helper()
	m.must(os.MkdirAll(filepath.Dir(path), 0o755))
	m.must(os.WriteFile(path, []byte(text), 0o644))
}

// result is what a command line left behind.
type result struct {
	m              *machine
	line           string
	stdout, stderr string
	code           int
}

// sh runs a line as a shell does.
func (m *machine) sh(line string) *result {
	m.t.Helper()
	c := exec.Command("/bin/sh", "-c", line)
	c.Dir = m.dir
	c.Env = []string{"PATH=" + m.path + ":/usr/bin:/bin:/usr/sbin:/sbin", "MTOOLS_SKIP_CHECK=1", "TZ=UTC"}
	var out, errOut bytes.Buffer
	c.Stdout, c.Stderr = &out, &errOut
	err := c.Run()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		m.t.Fatalf("%s: %v", line, err)
	}
	r := &result{m, line, out.String(), errOut.String(), c.ProcessState.ExitCode()}
	if r.code < 0 || strings.Contains(r.stderr, "internal error") || strings.Contains(r.stderr, "panic") {
		m.t.Fatalf("%s: %d\n%s", line, r.code, r.stderr)
	}
	text := strings.ReplaceAll(r.stdout+r.stderr, m.dir, "")
	if !utf8.ValidString(text) {
		text = fmt.Sprintf("%d bytes\n", len(text))
	}
	m.t.Logf("$ %s\n%s(exit status %d)", strings.ReplaceAll(line, m.dir, ""), text, r.code)
	return r
}

// run runs espmirror.
func (m *machine) run(args string) *result { m.t.Helper(); return m.sh("espmirror " + args) }

func (r *result) want(code int) *result {
	r.m.t.Helper()
	if r.code != code {
		r.m.t.Fatalf("%s: exit status %d, want %d\n%s%s", r.line, r.code, code, r.stdout, r.stderr)
	}
	return r
}

func (r *result) has(texts ...string) *result {
	r.m.t.Helper()
	for _, s := range texts {
		if !strings.Contains(r.stdout+r.stderr, s) {
			r.m.t.Errorf("%s: no %q in\n%s%s", r.line, s, r.stdout, r.stderr)
		}
	}
	return r
}

// hints are the commands that a message tells to run, as printed.
func (r *result) hints() []string {
	var cmds []string
	for line := range strings.Lines(r.stderr) {
		if _, hint, ok := strings.Cut(line, "hint: "); ok {
			for i, word := range strings.Split(hint, "`") {
				if i%2 == 1 && !slices.Contains(cmds, word) {
					cmds = append(cmds, word)
				}
			}
		}
	}
	return cmds
}

// state is what status says of a volume: the last column.
func (r *result) state(of *member) string {
	for line := range strings.Lines(r.stdout) {
		if strings.Contains(line, of.guid) {
			f := strings.Split(strings.TrimRight(line, "\n"), "  ")
			return strings.TrimSpace(f[len(f)-1])
		}
	}
	return ""
}

// make makes a disk and plugs it in.
func (m *machine) make(name, options, root string, own map[string]string) *member {
	m.t.Helper()
	n := len(m.disks) + 1
	d := &member{disk: name, root: root, own: own, count: map[string]string{}, image: filepath.Join(m.dir, name+".img"),
		guid: fmt.Sprintf("4f5a1b20-0000-4000-8000-00000000000%d", n)}
	m.sh(fmt.Sprintf("mkdisk disk -guid 4f5a1b20-0000-4000-8000-0000000000d%d -part-guid %s %s %s", n, d.guid, options, d.image)).want(0)
	d.espLen = m.size(d.image) - 2*partOff
	m.disks[name] = d
	m.plug(d)
	for p, text := range own {
		m.copyIn(d, p, text)
	}
	d.sector, d.table = m.identity(d)
	return d
}

func (m *machine) size(path string) int64 {
	m.t.Helper()
	info, err := os.Stat(path)
	m.must(err)
	return info.Size()
}

// identity is what no sync may change: the boot sector, and everything around the ESP.
func (m *machine) identity(d *member) ([]byte, [32]byte) {
	m.t.Helper()
	m.flush(d)
	f, err := os.Open(d.image)
	m.must(err)
	defer f.Close()
	sector := make([]byte, 512)
	_, err = f.ReadAt(sector, partOff)
	m.must(err)
	h := sha256.New()
	_, err = io.Copy(h, io.NewSectionReader(f, 0, partOff))
	m.must(err)
	_, err = io.Copy(h, io.NewSectionReader(f, partOff+d.espLen, m.size(d.image)))
	m.must(err)
	return sector, [32]byte(h.Sum(nil))
}

// plug makes the machine see a disk.
func (m *machine) plug(d *member) {
	m.t.Helper()
	if !m.loops {
		m.next++
		d.node, d.vol = d.image, fmt.Sprintf("%s@@%d", d.image, partOff)
		m.device(d.disk, d.disk, d.image, fmt.Sprintf("8:%d", 16*m.next), m.size(d.image), nil)
		return
	}
	var nums []string
	attach := func(options ...string) string {
		out, err := exec.Command("losetup", append(options, "--find", "--show", d.image)...).CombinedOutput()
		if err != nil {
			m.t.Skipf("skipped: day on loop devices: losetup: %s", out)
		}
		node := strings.TrimSpace(string(out))
		text, err := os.ReadFile("/sys/class/block/" + filepath.Base(node) + "/dev")
		m.must(err)
		nums = append(nums, strings.TrimSpace(string(text)))
		return node
	}
	d.node = attach()
	m.t.Cleanup(func() {
		if d.node != "" {
			m.unplug(d)
		}
	})
	// The partition has a node of its own, as it has on a machine.
	d.part = attach("--offset", fmt.Sprint(partOff), "--sizelimit", fmt.Sprint(d.espLen))
	d.vol = d.part
	m.device(d.disk, d.disk, d.node, nums[0], m.size(d.image), nil)
	m.device(d.disk+"1", d.disk+"/"+d.disk+"1", d.part, nums[1], d.espLen,
		map[string]string{"partition": "1", "start": fmt.Sprint(partOff / 512)})
}

// device adds a device to the machine's /sys and /dev.
func (m *machine) device(name, path, node, num string, size int64, more map[string]string) {
	m.t.Helper()
	dir := filepath.Join(m.root, "sys/devices", path)
	m.write(filepath.Join(dir, "dev"), num+"\n")
	m.write(filepath.Join(dir, "uevent"), "DEVNAME="+name+"\n")
	m.write(filepath.Join(dir, "size"), fmt.Sprintf("%d\n", size/512))
	for file, text := range more {
		m.write(filepath.Join(dir, file), text+"\n")
	}
	m.must(os.Symlink(node, filepath.Join(m.root, "dev", name)))
	m.must(os.Symlink("../../devices/"+path, filepath.Join(m.root, "sys/class/block", name)))
}

// dev is how the machine calls the ESP of a disk.
func (m *machine) dev(d *member) string {
	if m.loops {
		return filepath.Join(m.root, "dev", d.disk+"1")
	}
	return filepath.Join(m.root, "dev", d.disk)
}

// name is how messages call it.
func (m *machine) name(d *member) string {
	if m.loops {
		return m.dev(d)
	}
	return m.dev(d) + "@@p1"
}

// unplug takes a disk away.
func (m *machine) unplug(d *member) {
	m.t.Helper()
	nodes := map[string]string{d.disk: d.node}
	if m.loops {
		nodes[d.disk+"1"] = d.part
	}
	for name, node := range nodes {
		for _, p := range []string{"sys/class/block/" + name, "dev/" + name} {
			m.must(os.Remove(filepath.Join(m.root, p)))
		}
		if m.loops {
			if out, err := exec.Command("losetup", "-d", node).CombinedOutput(); err != nil {
				m.t.Errorf("losetup -d %s: %s", node, out)
			}
		}
	}
	d.node, d.part, d.vol = "", "", ""
}

// mount makes the machine believe that an ESP is mounted. What is there is a copy, which umount writes back.
func (m *machine) mount(d *member) string {
	m.t.Helper()
	d.mnt = filepath.Join(m.dir, "efi")
	m.run("extract -q --to " + d.mnt + " " + m.dev(d)).want(0)
	text, err := os.ReadFile("/sys/class/block/" + filepath.Base(d.part) + "/dev")
	m.must(err)
	m.write(filepath.Join(m.root, "proc/self/mountinfo"), fmt.Sprintf("36 35 %s / %s rw - vfat %s rw\n", strings.TrimSpace(string(text)), d.mnt, m.dev(d)))
	return d.mnt
}

func (m *machine) umount(d *member) {
	m.t.Helper()
	m.write(filepath.Join(m.root, "proc/self/mountinfo"), "")
	m.must(os.Remove(filepath.Join(d.mnt, "EFI/espmirror/journal"))) // it is bound to its place on the volume
	names, err := filepath.Glob(filepath.Join(d.mnt, "*"))
	m.must(err)
	m.mtools(d, append(append([]string{"mcopy", "-s", "-o", "-Q"}, names...), "::")...)
	m.must(os.RemoveAll(d.mnt))
	d.mnt = ""
}

// boot starts the machine from a disk: that is then the primary.
func (m *machine) boot(d *member) {
	m.t.Helper()
	var b []byte
	for _, u := range utf16.Encode([]rune(strings.ToUpper(d.guid) + "\x00")) {
		b = append(b, byte(u), byte(u>>8))
	}
	m.variable("LoaderDevicePartUUID-4a67b082-0a4c-41cf-b6c7-440b29bb8c4f", b)
}

// variable sets an EFI variable, by the name that efivarfs has for it.
func (m *machine) variable(name string, data []byte) {
	m.t.Helper()
	m.write(filepath.Join(m.root, "sys/firmware/efi/efivars", name), "\x07\x00\x00\x00"+string(data))
}

func (m *machine) mtools(d *member, args ...string) {
	m.t.Helper()
	c := exec.Command(args[0], append([]string{"-i", d.vol}, args[1:]...)...)
	c.Env = append(c.Environ(), "MTOOLS_SKIP_CHECK=1")
	if out, err := c.CombinedOutput(); err != nil {
		m.t.Fatalf("%s on %s: %v\n%s", strings.Join(args, " "), d.disk, err, out)
	}
}

// copyIn writes a file as a mounted system would.
func (m *machine) copyIn(d *member, path, text string) {
	m.t.Helper()
	parts := strings.Split(path, "/")
	for i := 1; i < len(parts); i++ {
		c := exec.Command("mmd", "-i", d.vol, "-D", "s", "::"+strings.Join(parts[:i], "/"))
		_ = c.Run() // it may be there
	}
	tmp := filepath.Join(m.dir, "copied")
	m.write(tmp, text)
	m.mtools(d, "mcopy", "-o", tmp, "::"+path)
}

// text is the content of a file on a member.
func (m *machine) text(d *member, path string) string {
	return strings.ReplaceAll(m.files[path], "@ROOT@", d.root)
}

// put changes a replicated file on one member.
func (m *machine) put(d *member, path, text string) {
	m.t.Helper()
	m.files[path] = text
	m.copyIn(d, m.counted(d, path), m.text(d, path))
}

func (m *machine) del(d *member, path string) {
	m.t.Helper()
	m.mtools(d, "mdel", "::"+m.counted(d, path))
	delete(m.files, path)
	for _, x := range m.disks {
		delete(x.count, path)
	}
}

// counted is the name of a file with the boot counter that it has on a member.
func (m *machine) counted(d *member, path string) string {
	if c := d.count[path]; c != "" {
		ext := filepath.Ext(path)
		return strings.TrimSuffix(path, ext) + c + ext
	}
	return path
}

// tried renames an entry on one member, as a boot loader or systemd-bless-boot does.
func (m *machine) tried(d *member, path, counter string) {
	m.t.Helper()
	before := m.counted(d, path)
	d.count[path] = counter
	m.mtools(d, "mren", "::"+before, "::"+m.counted(d, path))
}

// kernel installs one with its entry, which has tries, on one member. The others will begin with the same.
func (m *machine) kernel(d *member, version, tries string) {
	m.t.Helper()
	dir := fixtures.MachineID + "/" + version
	entry := "loader/entries/" + fixtures.MachineID + "-" + version + ".conf"
	uki := "EFI/Linux/uki-" + version + ".efi"
	for _, x := range m.disks {
		x.count[entry], x.count[uki] = tries, tries
	}
	seed := 100 * uint64(version[2])
	m.put(d, dir+"/linux", content(fixtures.PE(300_000, seed)))
	m.put(d, dir+"/initrd", content(fixtures.Random(700_000, seed+1)))
	m.put(d, uki, content(fixtures.PE(900_000, seed+2)))
	m.put(d, entry, "title Linux "+version+"\noptions root=@ROOT@ rw quiet\nlinux /"+dir+"/linux\ninitrd /"+dir+"/initrd\n")
	m.put(d, "loader/loader.conf", "timeout 3\ndefault "+fixtures.MachineID+"-"+version+"*\n")
}

func (m *machine) removeKernel(d *member, version string) {
	m.t.Helper()
	dir := fixtures.MachineID + "/" + version
	m.del(d, "loader/entries/"+fixtures.MachineID+"-"+version+".conf")
	m.del(d, dir+"/linux")
	m.del(d, dir+"/initrd")
	m.mtools(d, "mrd", "::"+dir)
	m.del(d, "EFI/Linux/uki-"+version+".efi")
}

func content(c fixtures.Content) string {
	b, err := io.ReadAll(c.Reader())
	if err != nil {
		panic(err)
	}
	return string(b)
}

// flush writes what the cache of a loop device holds to the image behind it, where the judges read.
func (m *machine) flush(d *member) {
	m.t.Helper()
	for _, node := range []string{d.node, d.part} {
		if node != "" {
			f, err := os.OpenFile(node, os.O_RDWR, 0)
			m.must(err)
			m.must(errors.Join(f.Sync(), f.Close()))
		}
	}
}

// check reads members with fsck.fat and mtools: the files of the set, each with its own words and counters, and all that
// is the member's own.
func (m *machine) check(ds ...*member) {
	m.t.Helper()
	for _, d := range ds {
		m.flush(d)
		f, err := os.Open(d.image)
		m.must(err)
		findings, err := fixtures.FsckReader(io.NewSectionReader(f, partOff, d.espLen), d.espLen)
		m.must(f.Close())
		m.must(err)
		if err := findings.Err(0); err != nil {
			m.t.Errorf("%s: %v", d.disk, err)
		}
		got, err := fixtures.Mtools(d.image, partOff)
		m.must(err)
		want := map[string]string{}
		for p := range m.files {
			want[m.counted(d, p)] = m.text(d, p)
		}
		maps.Copy(want, d.own)
		for p, file := range got {
			text, ok := want[p]
			switch {
			case file.Dir || strings.HasPrefix(p, "EFI/espmirror/"):
			case p == "loader/esp-sync" && m.files[p] == "":
				if m.set == "" {
					m.set = string(file.Sum[:])
				}
				if m.set != string(file.Sum[:]) {
					m.t.Errorf("%s: its %s is another one", d.disk, p)
				}
			case !ok:
				m.t.Errorf("%s: /%s should not be there", d.disk, p)
			case file.Sum != sha256.Sum256([]byte(text)):
				m.t.Errorf("%s: /%s has other content", d.disk, p)
			}
			delete(want, p)
		}
		for _, p := range slices.Sorted(maps.Keys(want)) {
			m.t.Errorf("%s: /%s is missing", d.disk, p)
		}
		sector, table := m.identity(d)
		if !bytes.Equal(sector, d.sector) || table != d.table {
			m.t.Errorf("%s: its boot sector or partition table has changed", d.disk)
		}
	}
	m.set = ""
}
