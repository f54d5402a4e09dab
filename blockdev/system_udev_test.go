package blockdev

import (
	"os/exec"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

func TestKnownPartUUID(t *testing.T) {
	const kernel, udev = "abcdef00-0000-4000-8000-000000000001", "abcdef00-0000-4000-8000-000000000002"
	record := func(lines ...string) string { return "S:disk/x\nI:1\n" + strings.Join(lines, "\n") + "\nG:systemd\n" }
	uuid, start, size := "E:ID_PART_ENTRY_UUID="+strings.ToUpper(udev), "E:ID_PART_ENTRY_OFFSET=34", "E:ID_PART_ENTRY_SIZE=100"
	for name, c := range map[string]struct {
		kernel, record string
		want           string
		sure           bool
	}{
		"the kernel comes first": {kernel, record(uuid, start, size), kernel, true},
		"udev":                   {"", record(uuid, start, size), udev, true},
		"an older table":         {"", record(uuid, start, "E:ID_PART_ENTRY_SIZE=99"), udev, false},
		"an older place":         {"", record(uuid, "E:ID_PART_ENTRY_OFFSET=35", size), udev, false},
		"no place":               {"", record(uuid), udev, false},
		"no GUID":                {"", record(start, size), "", false},
		"no record":              {"", "", "", false},
	} {
		files := map[string]string{}
		if c.record != "" {
			files["/run/udev/data/b8:1"] = c.record
		}
		got, sure := tree(t, files).KnownPartUUID(Block{Num: DevNum{8, 1}, Start: 34 * 512, Size: 100 * 512, PartUUID: c.kernel})
		if got != c.want || sure != c.sure {
			t.Errorf("%s: %q %v", name, got, sure)
		}
	}
}

func TestPartUUIDLink(t *testing.T) {
	const dir = "/dev/disk/by-partuuid/"
	s := tree(t, map[string]string{
		dir + "1@": "../../sda1", dir + "2@": "/dev/sdb1", dir + "3@": "../../../../../../../etc/passwd", dir + "4": "no link",
	})
	for name, want := range map[string]string{"1": "/dev/sda1", "2": "/dev/sdb1", "3": "/etc/passwd", "4": "", "5": "", "": "", "../by-partuuid/1": ""} {
		if want != "" {
			want = s.Root + want
		}
		if got := s.PartUUIDLink(name); got != want {
			t.Errorf("%q: %q, want %q", name, got, want)
		}
	}
}

func TestNewsOfBlock(t *testing.T) {
	msg := func(fields ...string) []byte { return []byte(strings.Join(fields, "\x00") + "\x00") }
	for want, msgs := range map[bool][][]byte{
		true: {
			msg("add@/devices/x/sda1", "ACTION=add", "DEVPATH=/devices/x/sda1", "SUBSYSTEM=block", "DEVNAME=sda1", "SEQNUM=7"),
			msg("change@/x", "ACTION=change", "SUBSYSTEM=block"),
		},
		false: {
			msg("remove@/x", "ACTION=remove", "SUBSYSTEM=block"),
			msg("remove@/x", "SUBSYSTEM=block", "ACTION=remove"),
			msg("add@/x", "ACTION=add", "SUBSYSTEM=usb"),
			msg("add@/x", "ACTION=add", "SUBSYSTEM=blocks"),
			msg("add@/x", "ACTION=add", "X=SUBSYSTEM=block"),
			nil,
		},
	} {
		for _, m := range msgs {
			if newsOfBlock(m) != want {
				t.Errorf("%q: not %v", m, want)
			}
		}
	}
}

// TestBlockEvents hears of a real device, and nothing after the end.
func TestBlockEvents(t *testing.T) {
	_, err := System{Root: t.TempDir()}.BlockEvents()
	wantErr(t, err, ErrNoEvents)
	node := loop(t, image(t, 1<<20))
	e, err := System{}.BlockEvents()
	if err != nil {
		t.Skipf("skipped: uevents: %v", err)
	}
	for { // what came of attaching the device
		select {
		case <-e.C:
			continue
		case <-time.After(50 * time.Millisecond):
		}
		break
	}
	addPart(t, node, "1", "64", "128")
	select {
	case <-e.C:
	case <-time.After(10 * time.Second):
		t.Error("no event of a new partition")
	}
	if err := e.Close(); err != nil {
		t.Error(err)
	}
	if out, err := exec.Command("delpart", node, "1").CombinedOutput(); err != nil {
		t.Errorf("delpart: %s", out)
	}
	select {
	case <-e.done:
	default:
		t.Error("still listening after Close")
	}
}

// TestBlockEventsOfOthers: what a program sends to the socket is not news.
func TestBlockEventsOfOthers(t *testing.T) {
	e, err := System{}.BlockEvents()
	if err != nil {
		t.Skipf("skipped: uevents: %v", err)
	}
	defer e.Close()
	conn, err := e.socket.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	var to unix.Sockaddr
	if cerr := conn.Control(func(fd uintptr) { to, err = unix.Getsockname(int(fd)) }); cerr != nil || err != nil {
		t.Fatal(cerr, err)
	}
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.NETLINK_KOBJECT_UEVENT)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	peer := &unix.SockaddrNetlink{Family: unix.AF_NETLINK, Pid: to.(*unix.SockaddrNetlink).Pid}
	if err := unix.Sendto(fd, []byte("add@/x\x00ACTION=add\x00SUBSYSTEM=block\x00"), 0, peer); err != nil {
		t.Skipf("skipped: one program may not send to another here: %v", err)
	}
	select {
	case <-e.C:
		t.Error("it was believed")
	case <-time.After(100 * time.Millisecond):
	}
}
