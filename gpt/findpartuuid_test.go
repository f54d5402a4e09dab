package gpt

import (
	"espmirror/fixtures"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
)

// udev writes udev's record of a partition and its link, as its rules make them.
func (m *fakeMachine) udev(node string, p part, partUUID string) {
	m.t.Helper()
	number, err := os.ReadFile(m.sys.Path("/sys/class/block/" + node + "/dev"))
	if err != nil {
		m.t.Fatal(err)
	}
	m.write("/run/udev/data/b"+strings.TrimSpace(string(number)), "S:disk/by-partuuid/"+partUUID+"\nE:ID_PART_ENTRY_SCHEME=gpt\nE:ID_PART_ENTRY_UUID="+partUUID+
		"\nE:ID_PART_ENTRY_OFFSET="+strconv.FormatInt(p.start/512, 10)+"\nE:ID_PART_ENTRY_SIZE="+strconv.FormatInt(p.size/512, 10)+"\nG:systemd\n")
}

func (m *fakeMachine) link(partUUID, target string) {
	m.t.Helper()
	path := m.sys.Path("/dev/disk/by-partuuid/" + partUUID)
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		m.t.Fatal(err)
	}
	_ = os.Remove(path)
	if err := os.Symlink(target, path); err != nil {
		m.t.Fatal(err)
	}
}

// espDisk adds a disk with one ESP, guid(n), and returns the partition.
func (m *fakeMachine) espDisk(name string, n int) part {
	m.t.Helper()
	p := esp(1, mib, mib)
	p.guid = guid(n)
	m.disk(name, memImage(m.t, 8*mib, 512, p), p)
	return p
}

// opens watches /dev of a machine, and returns a function that tells which nodes have been opened since the last call.
func (m *fakeMachine) opens() func() []string {
	m.t.Helper()
	opened := fixtures.Opens(m.t, m.sys.Path("/dev"))
	return func() []string {
		return slices.DeleteFunc(opened(), func(name string) bool { return name == "disk" })
	}
}

// TestForeignDisksAreNotOpened: what the system knows is enough to leave the disks of others alone, and where it is not,
// only their tables are read.
func TestForeignDisksAreNotOpened(t *testing.T) {
	for _, c := range []struct {
		name   string
		uevent bool
		know   func(m *fakeMachine, node string, p part)
		found  []string // nodes opened to find guid(2)
		none   []string // to find nothing
	}{
		{"kernel", true, func(*fakeMachine, string, part) {}, []string{"sdb", "sdb1"}, nil},
		{"udev database", false, func(m *fakeMachine, node string, p part) { m.udev(node, p, p.guid) }, []string{"sdb", "sdb1"}, nil},
		{"links", false, func(m *fakeMachine, node string, p part) { m.link(p.guid, "../../"+node) }, []string{"sdb", "sdb1"}, []string{"sda", "sdb", "sdc"}},
		{"absolute links", false, func(m *fakeMachine, node string, p part) { m.link(p.guid, "/dev/"+node) }, []string{"sdb", "sdb1"}, []string{"sda", "sdb", "sdc"}},
		{"nobody", false, func(*fakeMachine, string, part) {}, []string{"sda", "sdb", "sdc"}, []string{"sda", "sdb", "sdc"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			m := newMachine(t)
			m.uevent = c.uevent
			for i, name := range []string{"sda", "sdb", "sdc"} {
				c.know(m, name+"1", m.espDisk(name, i+1))
			}
			f := &Finder{System: m.sys}
			opened := m.opens()
			l := find(t, f, "PARTUUID="+strings.ToUpper(guid(2)))
			if got := opened(); l.Path != m.sys.Path("/dev/sdb1") || l.Part == nil || l.Part.GUID.String() != guid(2) || !slices.Equal(got, c.found) {
				t.Errorf("%s by opening %s", l, got)
			}
			if again, err := f.FindPartUUID(guid(2)); err != nil || again.String() != l.String() || again.Spec != l.Spec {
				t.Error(again, err)
			}
			opened()
			findErr(t, f, "PARTUUID="+guid(9), ErrNotFound)
			if got := opened(); !slices.Equal(got, c.none) {
				t.Error("opened for nothing:", got)
			}
		})
	}
}

// TestStaleUdev: links and records of a table that is gone are asked, and do not win.
func TestStaleUdev(t *testing.T) {
	m := newMachine(t)
	one, two := m.espDisk("sda", 1), m.espDisk("sdb", 2)
	m.link(guid(2), "../../sda1")
	old := one
	old.start += mib
	m.udev("sda1", old, guid(2))
	m.udev("sdb1", old, guid(7))
	f := &Finder{System: m.sys}
	if l := find(t, f, "PARTUUID="+guid(2)); l.Path != m.sys.Path("/dev/sdb1") {
		t.Error(l)
	}
	findErr(t, f, "PARTUUID="+guid(7), ErrNotFound)

	// They lead nowhere, out of the root, or to a whole disk.
	for _, target := range []string{"../../sdz1", "../../../../../../../../sda1", "/sda1", "../../sda", "."} {
		m.link(guid(2), target)
		if l := find(t, f, "PARTUUID="+guid(2)); l.Path != m.sys.Path("/dev/sdb1") {
			t.Error(target, l)
		}
	}

	// The kernel's word counts before a link, so that the disk to which it leads is not even opened.
	m = newMachine(t)
	m.uevent = true
	m.espDisk("sda", 1)
	m.espDisk("sdb", 2)
	m.link(guid(2), "../../sda1")
	m.udev("sda1", two, guid(2))
	opened := m.opens()
	if l := find(t, &Finder{System: m.sys}, "PARTUUID="+guid(2)); l.Path != m.sys.Path("/dev/sdb1") || slices.Contains(opened(), "sda") {
		t.Error(l)
	}
}

// TestDuplicatesByUdev: two partitions of one GUID, seen without opening other disks.
func TestDuplicatesByUdev(t *testing.T) {
	m := newMachine(t)
	for _, name := range []string{"sda", "sdb", "sdc"} {
		p := m.espDisk(name, 1+len(name)/4)
		if name != "sdc" {
			m.udev(name+"1", p, p.guid)
		}
	}
	m.link(guid(1), "../../sdb1")
	opened := m.opens()
	findErr(t, &Finder{System: m.sys}, "PARTUUID="+guid(1), ErrAmbiguous, "sda1", "sdb1")
	if got := opened(); slices.Contains(got, "sdc") {
		t.Error("opened", got)
	}
}

// TestTableChanges: the kernel's list and the table on the disk say different things, for a moment or for good.
func TestTableChanges(t *testing.T) {
	for _, uevent := range []bool{true, false} {
		m := newMachine(t)
		m.uevent = uevent
		p := m.espDisk("sda", 1)
		moved := p
		moved.start += 2 * mib
		m.write("/dev/sda", string(memImage(t, 8*mib, 512, moved)))
		f := &Finder{System: m.sys}
		findErr(t, f, "PARTUUID="+guid(1), ErrChanged)

		// The kernel has read the new table by the time of the second look.
		looks := 0
		f.retrying = func() {
			looks++
			m.write("/sys/devices/sda/sda1/start", strconv.FormatInt(moved.start/512, 10)+"\n")
		}
		l, err := f.FindPartUUID(guid(1))
		if err != nil || l.Part == nil || l.Part.Start != moved.start || looks != 1 {
			t.Errorf("uevent %v: %+v %v", uevent, l, err)
		}
		// There is no third look.
		looks = 0
		m.write("/sys/devices/sda/sda1/start", "0\n")
		f.retrying = func() { looks++ }
		findErr(t, f, "PARTUUID="+guid(1), ErrChanged)
		if looks != 1 {
			t.Error(looks, "looks more")
		}
	}
}

// TestGUIDChanges: the kernel knows a partition by a GUID that the table no longer has.
func TestGUIDChanges(t *testing.T) {
	m := newMachine(t)
	m.uevent = true
	p := m.espDisk("sda", 1)
	p.guid = guid(2)
	m.write("/dev/sda", string(memImage(t, 8*mib, 512, p)))
	findErr(t, &Finder{System: m.sys}, "PARTUUID="+guid(1), ErrChanged, guid(2), "partprobe")

	m.write("/dev/sda", strings.Repeat("\x00", 8*mib))
	findErr(t, &Finder{System: m.sys}, "PARTUUID="+guid(1), ErrNotFound, "sda1", "no partition table")
	if err := os.Remove(m.sys.Path("/dev/sda1")); err != nil {
		t.Fatal(err)
	}
	findErr(t, &Finder{System: m.sys}, "PARTUUID="+guid(1), ErrNotFound, "sda1", "no such file")
}

func TestParsePartUUID(t *testing.T) {
	for in, want := range map[string]string{
		guid(10):                            guid(10),
		strings.ToUpper(guid(10)):           guid(10),
		"PARTUUID=" + guid(10):              guid(10),
		`partuuid="` + guid(10) + `"`:       guid(10),
		"PARTUUID={" + guid(10) + "}":       guid(10),
		"DEADBEEF-0A":                       "deadbeef-0a",
		"PARTUUID=deadbeef-01":              "deadbeef-01",
		"":                                  "",
		"PARTUUID=":                         "",
		"LABEL=" + guid(10):                 "",
		"/dev/disk/by-partuuid/" + guid(10): "",
		"deadbeef-1":                        "",
		guid(10) + "0":                      "",
		"../../../../../../../../../dev/deadbeef": "",
	} {
		got, err := ParsePartUUID(in)
		if got != want || (err == nil) != (want != "") {
			t.Errorf("%q: %q %v", in, got, err)
		}
		if err != nil {
			wantErr(t, err, ErrBadName)
		}
	}
}

func TestOnSameDisk(t *testing.T) {
	x := part{5, TypeXBOOTLDR.String(), guid(5), "", 5 * mib, mib}
	path := writeImage(t, memImage(t, 8*mib, 512, part{1, typeData, guid(1), "", mib, mib}, esp(3, 2*mib, mib), esp(4, 3*mib, mib), x))
	f := &Finder{System: nothing(t)}
	boot := find(t, f, path+"@@p5")
	l, problems, err := f.OnSameDisk(boot, TypeESP)
	if err != nil || l.String() != path+"@@p3" || l.Spec != l.String() || len(problems) != 1 || !strings.Contains(problems[0], "2 partitions of type ESP (3, 4), and 3 is used") {
		t.Error(l, problems, err)
	}
	// What is of the type itself goes with itself.
	if l, problems, err = f.OnSameDisk(find(t, f, path+"@@p4"), TypeESP); err != nil || l.String() != path+"@@p4" || len(problems) != 1 {
		t.Error(l, problems, err)
	}
	if l, problems, err = f.OnSameDisk(boot, TypeXBOOTLDR); err != nil || l.String() != boot.String() || problems != nil {
		t.Error(l, problems, err)
	}
	if l, err := f.Sibling(find(t, f, path+"@@p4"), TypeESP); err != nil || l.String() != path+"@@p3" {
		t.Error(l, err)
	}
	plain := writeImage(t, memImage(t, 8*mib, 512, esp(1, mib, mib)))
	_, _, err = f.OnSameDisk(find(t, f, plain), TypeXBOOTLDR)
	wantErr(t, err, ErrNotFound)
}
