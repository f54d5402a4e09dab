package gpt

import (
	"bytes"
	"errors"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"

	"espmirror/blockdev"
)

func find(t *testing.T, f *Finder, spec string) *Location {
	t.Helper()
	l, err := f.Find(spec)
	if err != nil {
		t.Fatal(err)
	}
	if l.Spec != spec && !strings.Contains(spec, "=") {
		t.Errorf("spec is %q, want %q", l.Spec, spec)
	}
	return l
}

func findErr(t *testing.T, f *Finder, spec string, want error, words ...string) {
	t.Helper()
	_, err := f.Find(spec)
	wantErr(t, err, want)
	for _, w := range words {
		if !strings.Contains(err.Error(), w) {
			t.Errorf("%q does not say %q", err, w)
		}
	}
}

// nothing is a machine without disks.
func nothing(t *testing.T) blockdev.System { return blockdev.System{Root: t.TempDir()} }

func TestFindInImage(t *testing.T) {
	data := part{7, typeData, guid(7), "data", 5 * mib, mib}
	img := memImage(t, 8*mib, 512, esp(2, mib, mib), data)
	copy(img[mib:], "first byte of the ESP")
	path := writeImage(t, img)
	f := &Finder{System: nothing(t)}
	for _, spec := range []string{path, path + "@@1M", path + "@@1m", path + "@@1048576", path + "@@1024k", path + "@@2048s", path + "@@p2", path + "@@P2"} {
		l := find(t, f, spec)
		if l.Path != path || l.Offset != mib || l.Size != mib || l.SectorSize != 512 || l.Part == nil || l.Part.Number != 2 || l.Disk != path ||
			l.DiskTable == nil || l.PartNode || l.String() != path+"@@p2" || l.CheckESP() != nil {
			t.Errorf("%s: %+v", spec, l)
		}
		if again := find(t, f, l.String()); again.String() != l.String() {
			t.Error("the canonical name is not stable:", again)
		}
	}
	l := find(t, f, path+"@@p7")
	wantErr(t, l.CheckESP(), ErrNotESP)

	// An offset where no partition begins: up to the next one, or to the end.
	if l := find(t, f, path+"@@3M"); l.Offset != 3*mib || l.Size != 2*mib || l.Part != nil || l.String() != path+"@@3145728" {
		t.Errorf("%+v", l)
	}
	if l := find(t, f, path+"@@7M"); l.Size != mib {
		t.Errorf("%+v", l)
	}
	findErr(t, f, path+"@@1025K", ErrNotFound, "inside partition 2")
	findErr(t, f, path+"@@8M", ErrNotFound, "outside")
	findErr(t, f, path+"@@1000", ErrBadName, "multiple of 512")
	findErr(t, f, path+"@@p3", ErrNotFound, "no partition 3")
	for _, bad := range []string{"", "x", "-1", "p", "p0", "p-1", "1Q", "M", "99999999999999999999", "9007199254740992K", "0x10"} {
		findErr(t, f, path+"@@"+bad, ErrBadName)
	}
	findErr(t, f, "", ErrBadName)
	findErr(t, f, filepath.Join(t.TempDir(), "missing"), fs.ErrNotExist)
	findErr(t, f, filepath.Join(t.TempDir(), "missing")+"@@1M", fs.ErrNotExist)
	findErr(t, f, t.TempDir(), blockdev.ErrNotDevice, "directory")

	// A name with "@@" or "=" in it that exists is meant as it is.
	for _, name := range []string{"a@@1M", "LABEL=x"} {
		odd := filepath.Join(filepath.Dir(path), name)
		if err := os.Link(path, odd); err != nil {
			t.Fatal(err)
		}
		if l := find(t, f, odd); l.Path != odd {
			t.Error(l)
		}
	}
}

func TestOpenVolume(t *testing.T) {
	for _, sector := range []int{512, 4096} {
		img := memImage(t, 8*mib, sector, esp(1, mib, mib), part{2, TypeXBOOTLDR.String(), guid(2), "", 3 * mib, mib})
		copy(img[mib:], "first byte of the ESP")
		path := writeImage(t, img)
		f := &Finder{System: nothing(t)}
		l := find(t, f, path)
		v, err := l.Open(blockdev.ReadWrite)
		if err != nil {
			t.Fatal(err)
		}
		got := make([]byte, 5)
		if _, err := v.ReadAt(got, 0); err != nil || string(got) != "first" || v.Size() != mib || v.SectorSize() != sector {
			t.Error(string(got), err, v.Size(), v.SectorSize())
		}
		_, err = v.WriteAt(make([]byte, 512), mib)
		wantErr(t, err, blockdev.ErrOutOfRange)
		if _, err := v.WriteAt(bytes.Repeat([]byte{0xaa}, mib), 0); err != nil {
			t.Fatal(err)
		}
		if err := v.Flush(); err != nil {
			t.Fatal(err)
		}

		// The other partition of the image at the same time, and the image for a look; but not the same one twice.
		x, err := f.Sibling(l, TypeXBOOTLDR)
		if err != nil || x.String() != path+"@@p2" {
			t.Fatal(x, err)
		}
		w, err := x.Open(blockdev.ReadWrite)
		if err != nil {
			t.Fatal(err)
		}
		_, err = l.Open(blockdev.ReadWrite)
		wantErr(t, err, blockdev.ErrBusy)
		if v.Disk().Path() != path {
			t.Error(v.Disk().Path())
		}
		if err := errors.Join(v.Close(), w.Close()); err != nil {
			t.Error(err)
		}
		after, _ := os.ReadFile(path)
		if !bytes.Equal(after[:mib], img[:mib]) || !bytes.Equal(after[2*mib:], img[2*mib:]) {
			t.Error("bytes outside the volume changed")
		}
		_, err = f.Sibling(l, TypeESP)
		wantErr(t, err, ErrNotFound)

		// The path leads to another file now, or to a shorter one.
		if err := os.Truncate(path, mib+512); err != nil {
			t.Fatal(err)
		}
		_, err = l.Open(blockdev.ReadOnly)
		wantErr(t, err, ErrChanged)
		if err := errors.Join(os.Rename(path, path+".old"), os.WriteFile(path, img, 0o600)); err != nil {
			t.Fatal(err)
		}
		_, err = l.Open(blockdev.ReadOnly)
		wantErr(t, err, ErrChanged)
	}
}

func TestFindSeveralOrNone(t *testing.T) {
	f := &Finder{System: nothing(t)}
	two := writeImage(t, memImage(t, 8*mib, 512, esp(1, mib, mib), esp(4, 3*mib, mib)))
	findErr(t, f, two, ErrAmbiguous, two+"@@p1", two+"@@p4")
	none := writeImage(t, memImage(t, 8*mib, 512, part{1, TypeXBOOTLDR.String(), guid(1), "", mib, mib}))
	findErr(t, f, none, ErrNotFound, "no ESP", none+"@@p1", "XBOOTLDR")
	empty := writeImage(t, memImage(t, 8*mib, 512))
	findErr(t, f, empty, ErrNotFound, "nor any other")
	blank := writeImage(t, make([]byte, mib))
	findErr(t, f, blank, ErrNotFound, "neither FAT nor a partition table")
	findErr(t, f, blank+"@@p1", ErrNoTable)
	luks := make([]byte, mib)
	copy(luks, "LUKS\xba\xbe")
	findErr(t, f, writeImage(t, luks), ErrNotFound, "LUKS")
	broken := memImage(t, 8*mib, 512)
	clear(broken[512:])
	findErr(t, f, writeImage(t, broken), ErrDamaged)
}

func TestFindBareFAT(t *testing.T) {
	img := make([]byte, mib)
	fat(img, 0xabcd1234, "EFI")
	path := writeImage(t, img)
	f := &Finder{System: nothing(t), Among: []string{path}}
	for _, spec := range []string{path, "UUID=ABCD-1234", "uuid=abcd1234", "LABEL=EFI", `LABEL="efi"`} {
		l := find(t, f, spec)
		if l.Path != path || l.Offset != 0 || l.Size != mib || l.Part != nil || l.String() != path || l.CheckESP() != nil {
			t.Errorf("%s: %+v", spec, l)
		}
	}
	findErr(t, f, "UUID=0000-0000", ErrNotFound)
	findErr(t, f, "LABEL=", ErrBadName)
	findErr(t, f, "FOO=bar", ErrBadName)
	findErr(t, f, "PARTUUID=nonsense", ErrBadName)
	_, err := f.Sibling(find(t, f, path), TypeXBOOTLDR)
	wantErr(t, err, ErrNotFound)

	// What is named in Among must be readable, and a list has the others all the same.
	before, err := f.List()
	if err != nil {
		t.Fatal(err)
	}
	f.Among = append([]string{path + ".missing"}, f.Among...)
	findErr(t, f, "UUID=ABCD-1234", fs.ErrNotExist)
	list, err := f.List()
	if err != nil || len(list.Volumes) != len(before.Volumes) || len(list.Unread) != 1 || list.Unread[0].Path != f.Among[0] ||
		!errors.Is(list.Unread[0].Err, fs.ErrNotExist) {
		t.Errorf("%+v %v", list, err)
	}
}

// TestFindTags looks among images.
func TestFindTags(t *testing.T) {
	img := memImage(t, 8*mib, 512, esp(1, mib, mib), part{2, typeData, guid(2), "data", 3 * mib, mib})
	fat(img[mib:2*mib], 0x11112222, "ONE")
	fat(img[3*mib:4*mib], 0x33334444, "TWO")
	path := writeImage(t, img)
	old := make([]byte, 4*mib)
	mbr(old, mbrTypeESP, 2048, 2048)
	oldPath := writeImage(t, old)
	f := &Finder{System: nothing(t), Among: []string{path, oldPath, path}} // twice the same is not two
	for spec, want := range map[string]string{
		"PARTUUID=" + guid(1):                  path + "@@p1",
		"PARTUUID=" + strings.ToUpper(guid(2)): path + "@@p2",
		"PARTUUID={" + guid(2) + "}":           path + "@@p2",
		"PARTUUID=DEADBEEF-01":                 oldPath + "@@p1",
		"PARTLABEL=ESP 1":                      path + "@@p1",
		"UUID=3333-4444":                       path + "@@p2",
		"LABEL=one":                            path + "@@p1",
	} {
		if l := find(t, f, spec); l.String() != want {
			t.Errorf("%s: %s, want %s", spec, l, want)
		}
	}
	findErr(t, f, "PARTUUID="+guid(9), ErrNotFound)
	findErr(t, f, "PARTUUID=deadbeef-09", ErrNotFound)

	// A clone has everything twice.
	clone := writeImage(t, img)
	f.Among = append(f.Among, clone)
	for _, spec := range []string{"PARTUUID=" + guid(1), "UUID=1111-2222", "LABEL=ONE", "PARTLABEL=ESP 1"} {
		findErr(t, f, spec, ErrAmbiguous, path+"@@p1", clone+"@@p1")
	}
	list, err := f.List()
	if err != nil || len(list.Volumes) != 3 || !strings.Contains(strings.Join(list.Problems, "\n"), "same partition GUID") {
		t.Errorf("%v %v", list, err)
	}

	// A member of an array has the serial of the array, and is not it.
	member := make([]byte, mib)
	fat(member[:64<<10], 0x55556666, "RAID")
	copy(member[mib-8192:], "\xfc\x4e\x2b\xa9\x01")
	f.Among = []string{writeImage(t, member)}
	findErr(t, f, "UUID=5555-6666", ErrNotFound)
}

// fakeMachine makes a machine of images: disks with partition nodes in sysfs, whose nodes are files.
type fakeMachine struct {
	t      *testing.T
	sys    blockdev.System
	uevent bool // the kernel tells the PARTUUIDs
	next   int
}

func newMachine(t *testing.T) *fakeMachine { return &fakeMachine{t: t, sys: nothing(t)} }

func (m *fakeMachine) write(name, content string) {
	m.t.Helper()
	path := m.sys.Path(name)
	if err := errors.Join(os.MkdirAll(filepath.Dir(path), 0o755), os.WriteFile(path, []byte(content), 0o644)); err != nil {
		m.t.Fatal(err)
	}
}

func (m *fakeMachine) device(dir, name string, size int64) {
	m.t.Helper()
	m.write(dir+"/dev", "8:"+strconv.Itoa(m.next)+"\n")
	m.next++
	m.write(dir+"/size", strconv.FormatInt(size/512, 10)+"\n")
	class := m.sys.Path("/sys/class/block")
	if err := errors.Join(os.MkdirAll(class, 0o755), os.Symlink(m.sys.Path(dir), filepath.Join(class, name))); err != nil {
		m.t.Fatal(err)
	}
}

// disk adds a disk with an image in it, and the partitions that the kernel knows.
func (m *fakeMachine) disk(name string, img []byte, parts ...part) {
	m.t.Helper()
	dir := "/sys/devices/" + name
	m.device(dir, name, int64(len(img)))
	m.write("/dev/"+name, string(img))
	for _, p := range parts {
		node := name + strconv.Itoa(p.number)
		sub := dir + "/" + node
		m.device(sub, node, p.size)
		m.write(sub+"/partition", strconv.Itoa(p.number)+"\n")
		m.write(sub+"/start", strconv.FormatInt(p.start/512, 10)+"\n")
		if m.uevent {
			m.write(sub+"/uevent", "DEVNAME="+node+"\nPARTUUID="+p.guid+"\n")
		}
		m.write("/dev/"+node, string(img[p.start:p.start+p.size]))
	}
}

func TestFindOnMachine(t *testing.T) {
	for _, uevent := range []bool{false, true} {
		m := newMachine(t)
		m.uevent = uevent
		for i, name := range []string{"sda", "sdb"} {
			p := esp(1, mib, mib)
			p.guid, p.name = guid(i+1), name
			img := memImage(t, 8*mib, 512, p)
			fat(img[mib:2*mib], uint32(i+1), name)
			m.disk(name, img, p)
		}
		// None of these may be opened: their nodes do not exist, or hold what would be found twice.
		one := memImage(t, 8*mib, 512, esp(1, mib, mib))
		m.disk("loop0", one)
		m.disk("sr0", one)
		m.disk("zram0", one)
		m.disk("sdc", one)
		m.write("/sys/devices/sdc/holders/md0", "")
		m.disk("sdd", nil)
		m.disk("nvme0c0n1", one)
		m.write("/sys/devices/nvme0c0n1/hidden", "1\n")
		m.device("/sys/devices/sde", "sde", mib) // no node: a disk that just went away

		f := &Finder{System: m.sys}
		node := m.sys.Path("/dev/sdb1")
		for _, spec := range []string{"PARTUUID=" + guid(2), "PARTLABEL=sdb", "UUID=0000-0002", "LABEL=SDB", m.sys.Path("/dev/sdb"), node, m.sys.Path("/dev/sdb") + "@@1M"} {
			l := find(t, f, spec)
			if l.Path != node || !l.PartNode || l.Offset != 0 || l.Size != mib || l.Part == nil || l.Part.GUID.String() != guid(2) ||
				l.Disk != m.sys.Path("/dev/sdb") || l.String() != node || l.CheckESP() != nil {
				t.Errorf("%s: %+v", spec, l)
			}
		}
		findErr(t, f, "PARTUUID="+guid(9), ErrNotFound, "/dev/sde")
		list, err := f.List()
		if err != nil || len(list.Volumes) != 2 || len(list.Unread) != 1 || !strings.Contains(list.Unread[0].Path, "/dev/sde") {
			t.Errorf("%+v %v", list, err)
		}
		// An image on the command line comes before the machine.
		f.Among = []string{writeImage(t, one)}
		if l := find(t, f, "PARTUUID="+guid(1)); l.Disk != f.Among[0] {
			t.Error(l)
		}
		if l := find(t, f, "PARTUUID="+guid(2)); l.Path != node {
			t.Error(l)
		}
	}
}

func TestDuplicatesOnMachine(t *testing.T) {
	for _, uevent := range []bool{false, true} {
		m := newMachine(t)
		m.uevent = uevent
		p := esp(1, mib, mib)
		img := memImage(t, 8*mib, 512, p)
		m.disk("sda", img, p)
		m.disk("sdb", img, p)
		f := &Finder{System: m.sys}
		findErr(t, f, "PARTUUID="+guid(1), ErrAmbiguous, "sda1", "sdb1")
		list, err := f.List()
		if err != nil || len(list.Volumes) != 2 || len(list.Problems) != 1 || !strings.Contains(list.Problems[0], guid(1)) {
			t.Errorf("%+v %v", list, err)
		}
	}
}

// TestKernelDisagrees: the kernel still has the partitions of an older table.
func TestKernelDisagrees(t *testing.T) {
	m := newMachine(t)
	stale := esp(1, 2*mib, mib)
	m.disk("sda", memImage(t, 8*mib, 512, esp(1, mib, mib)), stale)
	f := &Finder{System: m.sys}
	findErr(t, f, m.sys.Path("/dev/sda"), ErrChanged, "partprobe")
	l := find(t, f, m.sys.Path("/dev/sda1"))
	if l.Part != nil || !errors.Is(l.TableErr, ErrChanged) {
		t.Errorf("%+v", l)
	}
	wantErr(t, l.CheckESP(), ErrNotESP)
	list, err := f.List()
	if err != nil || len(list.Volumes) != 0 || len(list.Problems) != 1 {
		t.Errorf("%+v %v", list, err)
	}
	// A disk without a table that can be read, and one that cannot be opened.
	m.write("/dev/sda", strings.Repeat("\x00", 8*mib))
	if l := find(t, f, m.sys.Path("/dev/sda1")); !errors.Is(l.TableErr, ErrNoTable) {
		t.Error(l.TableErr)
	}
	if err := os.Remove(m.sys.Path("/dev/sda")); err != nil {
		t.Fatal(err)
	}
	if l := find(t, f, m.sys.Path("/dev/sda1")); !errors.Is(l.TableErr, fs.ErrNotExist) || !errors.Is(l.CheckESP(), ErrNotESP) {
		t.Error(l.TableErr)
	}
}

func TestCheckESPOverlap(t *testing.T) {
	path := writeImage(t, memImage(t, 8*mib, 512, esp(1, mib, 2*mib), part{2, typeData, guid(2), "", 2 * mib, 2 * mib}))
	l := find(t, &Finder{System: nothing(t)}, path)
	wantErr(t, l.CheckESP(), ErrDamaged)
}

func same(t *testing.T, a, b *Location) bool {
	t.Helper()
	ab, err1 := SameVolume(a, b)
	ba, err2 := SameVolume(b, a)
	if err := errors.Join(err1, err2); err != nil || ab != ba {
		t.Fatal(ab, ba, err)
	}
	return ab
}

func TestSameVolumeImages(t *testing.T) {
	img := memImage(t, 8*mib, 512, esp(1, mib, mib), esp(2, 3*mib, mib))
	path := writeImage(t, img)
	link := path + ".link"
	if err := os.Symlink(path, link); err != nil {
		t.Fatal(err)
	}
	f := &Finder{System: nothing(t)}
	a, b := find(t, f, path+"@@p1"), find(t, f, path+"@@p2")
	if !same(t, a, a) || !same(t, a, find(t, f, link+"@@1M")) || same(t, a, b) || same(t, a, find(t, f, writeImage(t, img)+"@@p1")) {
		t.Error("wrong")
	}
}

// loopTool runs losetup and returns the node, or skips the test.
func attach(t *testing.T, args ...string) string {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("loop devices need root")
	}
	out, err := exec.Command("losetup", append([]string{"--find", "--show"}, args...)...).CombinedOutput()
	if err != nil {
		t.Skipf("no loop devices here: %s", out)
	}
	node := strings.TrimSpace(string(out))
	t.Cleanup(func() { _ = exec.Command("losetup", "-d", node).Run() })
	return node
}

// TestLoopDevices: the same volume by its image, by a loop device over all of it, over the partition alone, and by a
// partition node.
func TestLoopDevices(t *testing.T) {
	img := memImage(t, 8*mib, 512, esp(1, mib, mib), esp(2, 3*mib, mib))
	fat(img[mib:2*mib], 1, "")
	path := writeImage(t, img)
	whole := attach(t, path)
	alone := attach(t, "--offset", "1048576", "--sizelimit", "1048576", path)
	nested := attach(t, "--offset", "1048576", whole)
	f := &Finder{}
	byImage := find(t, f, path+"@@p1")
	byWhole := find(t, f, whole+"@@p1")
	byAlone := find(t, f, alone)
	byNested := find(t, f, nested)
	other := find(t, f, whole+"@@p2")
	// Without partition nodes it is a window on the disk.
	if byWhole.Path != whole || byWhole.PartNode || byWhole.Offset != mib || byWhole.Part == nil {
		t.Errorf("%+v", byWhole)
	}
	all := []*Location{byImage, byWhole, byAlone, byNested}
	for _, a := range all {
		for _, b := range all {
			if !same(t, a, b) {
				t.Errorf("%s and %s are the same", a, b)
			}
		}
		if a != byNested && same(t, a, other) {
			t.Errorf("%s and %s are not the same", a, other)
		}
	}
	v, err := byWhole.Open(blockdev.ReadWrite)
	if err != nil {
		t.Fatal(err)
	}
	w, err := other.Open(blockdev.ReadWrite)
	if err != nil {
		t.Error(err)
	} else {
		_ = w.Close()
	}
	_ = v.Close()
	if _, err := byImage.Open(blockdev.ReadWrite); !errors.Is(err, blockdev.ErrBusy) {
		t.Error("image under a loop device:", err)
	}

	if out, err := exec.Command("addpart", whole, "1", "2048", "2048").CombinedOutput(); err != nil {
		t.Skipf("no partitions on loop devices here: %s", out)
	}
	defer exec.Command("delpart", whole, "1").Run()
	node := whole + "p1"
	for _, spec := range []string{node, whole + "@@p1", whole + "@@1M"} {
		l := find(t, f, spec)
		if l.Path != node || !l.PartNode || l.Part == nil || l.Part.GUID.String() != guid(1) || l.Offset != 0 || l.Size != mib || l.Disk != whole {
			t.Errorf("%s: %+v", spec, l)
		}
		if !same(t, l, byImage) || same(t, l, other) {
			t.Error(l)
		}
	}
	findErr(t, f, whole, ErrAmbiguous, node, whole+"@@p2")
	// Loop devices are searched when they are named, and only then.
	if _, err := f.Find("PARTUUID=" + guid(1)); !errors.Is(err, ErrNotFound) {
		t.Error(err)
	}
	f.Among = []string{node, whole}
	if l := find(t, f, "PARTUUID="+guid(1)); l.Path != node {
		t.Error(l)
	}
	list, err := f.List()
	if err != nil || !slices.ContainsFunc(list.Volumes, func(l *Location) bool { return l.Path == node }) || len(list.Volumes) != 2 {
		t.Errorf("%+v %v", list, err)
	}
}

// Test4KnLoop: a table in 4096-byte sectors on a device that has them.
func Test4KnLoop(t *testing.T) {
	path := writeImage(t, memImage(t, 8*mib, 4096, esp(1, mib, mib)))
	node := attach(t, "--sector-size", "4096", path)
	l := find(t, &Finder{}, node)
	v, err := l.Open(blockdev.ReadWrite)
	if err != nil {
		t.Fatal(err)
	}
	defer v.Close()
	if v.SectorSize() != 4096 || v.Size() != mib || l.Offset != mib {
		t.Errorf("%+v", l)
	}
}
