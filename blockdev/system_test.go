package blockdev

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// tree writes files below a new root and returns the System there. A name that ends in "@" is a symbolic link to the
// content.
func tree(t *testing.T, files map[string]string) System {
	t.Helper()
	root := t.TempDir()
	for name, content := range files {
		path := filepath.Join(root, strings.TrimSuffix(name, "@"))
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		var err error
		switch {
		case strings.HasSuffix(name, "@"):
			err = os.Symlink(content, path)
		case strings.HasSuffix(name, "/"):
			err = os.MkdirAll(path, 0o755)
		default:
			err = os.WriteFile(path, []byte(content), 0o644)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	return System{Root: root}
}

// machine is a disk with two partitions, an md array on the second, an encrypted device on that, and a loop device.
func machine(t *testing.T) System {
	d := "/sys/devices/pci/block/sda"
	v := "/sys/devices/virtual/block/"
	return tree(t, map[string]string{
		d + "/dev": "8:0\n", d + "/size": "2048\n", d + "/removable": "1\n", d + "/ro": "0\n",
		d + "/uevent":   "MAJOR=8\nMINOR=0\nDEVNAME=sda\nDEVTYPE=disk\n",
		d + "/holders/": "",
		d + "/sda1/dev": "8:1\n", d + "/sda1/partition": "1\n", d + "/sda1/start": "34\n", d + "/sda1/size": "100\n", d + "/sda1/ro": "1\n",
		d + "/sda1/uevent": "DEVNAME=sda1\nPARTN=1\nPARTNAME=EFI system\nPARTUUID=ABCDEF00-0000-4000-8000-000000000001\n",
		d + "/sda2/dev":    "8:2\n", d + "/sda2/partition": "2\n", d + "/sda2/start": "200\n", d + "/sda2/size": "100\n",
		d + "/sda2/holders/md0": "",
		v + "md0/dev":           "9:0\n", v + "md0/size": "96\n", v + "md0/holders/dm-0": "",
		v + "dm-0/dev": "253:0\n", v + "dm-0/dm/name": "cryptroot\n",
		v + "loop0/dev": "7:0\n", v + "loop0/size": "0\n",
		v + "cciss!c0d0/dev":           "104:0\n",
		"/sys/block/sda@":              "../devices/pci/block/sda",
		"/sys/class/block/sda@":        "../../devices/pci/block/sda",
		"/sys/class/block/sda1@":       "../../devices/pci/block/sda/sda1",
		"/sys/class/block/sda2@":       "../../devices/pci/block/sda/sda2",
		"/sys/class/block/md0@":        "../../devices/virtual/block/md0",
		"/sys/class/block/dm-0@":       "../../devices/virtual/block/dm-0",
		"/sys/class/block/loop0@":      "../../devices/virtual/block/loop0",
		"/sys/class/block/cciss!c0d0@": "../../devices/virtual/block/cciss!c0d0",
		"/sys/class/block/gone@":       "../../devices/virtual/block/gone",
		"/sys/dev/block/8:1@":          "../../devices/pci/block/sda/sda1",
		"/proc/swaps":                  "Filename Type Size Used Priority\n/dev/dm-0 partition 96 0 -2\n/swap\\040file file 5 0 -3\n",
		"/proc/self/mountinfo": `22 1 0:21 / /proc rw,relatime - proc proc rw
30 1 0:40 / /efi rw,relatime - autofs systemd-1 rw,fd=40
31 30 8:1 / /efi rw,relatime shared:5 master:1 - vfat /dev/sda1 ro,umask=0077
32 1 8:1 /EFI /srv/a\040b\134c ro,relatime - vfat /dev/sda1 rw
33 1 254:9 / /hidden rw - vfat /dev/x rw
34 33 0:50 / /hidden rw - tmpfs tmpfs rw
35 1 254:8 / /auto rw - autofs x rw
not a line
`,
	})
}

func TestBlock(t *testing.T) {
	s := machine(t)
	b, err := s.BlockByNum(DevNum{8, 1})
	if err != nil {
		t.Fatal(err)
	}
	if b.Name != "sda1" || b.Node != s.Root+"/dev/sda1" || b.Disk != "sda" || b.Partition != 1 || b.Start != 34*512 || b.Size != 51200 ||
		!b.ReadOnly || b.PartUUID != "abcdef00-0000-4000-8000-000000000001" || b.PartName != "EFI system" || b.Loop != nil {
		t.Errorf("%+v", b)
	}
	// Without the directory of links the class is searched.
	if b, err = s.BlockByNum(DevNum{8, 2}); err != nil || b.Name != "sda2" || !slices.Equal(b.Holders, []string{"md0"}) {
		t.Errorf("%+v %v", b, err)
	}
	if b, err = s.WholeDisk(DevNum{8, 2}); err != nil || b.Name != "sda" || b.Disk != "" || !b.Removable || b.Size != 1<<20 {
		t.Errorf("%+v %v", b, err)
	}
	if b, err = s.WholeDisk(DevNum{9, 0}); err != nil || b.Name != "md0" {
		t.Errorf("%+v %v", b, err)
	}
	if b, err = s.Block("cciss!c0d0"); err != nil || b.Node != s.Root+"/dev/cciss/c0d0" {
		t.Errorf("%+v %v", b, err)
	}
	_, err = s.BlockByNum(DevNum{99, 99})
	wantErr(t, err, fs.ErrNotExist)
	all, err := s.Blocks()
	if err != nil || len(all) != 7 {
		t.Errorf("%d blocks, %v", len(all), err)
	}
	if all, err := (System{Root: t.TempDir()}).Blocks(); err != nil || len(all) != 0 {
		t.Error(all, err)
	}
}

func TestBlockDamagedSysfs(t *testing.T) {
	for name, files := range map[string]map[string]string{
		"number":   {"dev": "8x1"},
		"size":     {"dev": "8:1", "size": "many"},
		"overflow": {"dev": "8:1", "size": "9223372036854775807"},
		"negative": {"dev": "8:1", "start": "-1"},
	} {
		t.Run(name, func(t *testing.T) {
			all := map[string]string{}
			for k, v := range files {
				all["/sys/class/block/sda/"+k] = v
			}
			s := tree(t, all)
			if _, err := s.Block("sda"); err == nil || !strings.HasPrefix(err.Error(), "cannot look at block device sda: ") {
				t.Error(err)
			}
			if _, err := s.Blocks(); err == nil {
				t.Error("no error")
			}
		})
	}
}

func TestMounts(t *testing.T) {
	s := machine(t)
	m, ok, err := s.MountPoint(DevNum{8, 1})
	if err != nil || !ok || m.Point != "/efi" || m.Type != "vfat" || !m.ReadOnly || m.Source != "/dev/sda1" {
		t.Errorf("%+v %v %v", m, ok, err)
	}
	for _, n := range []DevNum{{254, 9}, {254, 8}, {8, 2}} {
		if m, ok, err := s.MountPoint(n); ok || err != nil {
			t.Errorf("%+v %v", m, err)
		}
	}
	mounts, err := s.Mounts()
	if err != nil || len(mounts) != 5 || mounts[2].Point != `/srv/a b\c` || mounts[2].Root != "/EFI" {
		t.Errorf("%+v %v", mounts, err)
	}
	if m, err := (System{Root: t.TempDir()}).Mounts(); m != nil || err != nil {
		t.Error(m, err)
	}
	bad := tree(t, map[string]string{"/proc/self/mountinfo/": "", "/proc/swaps/": ""})
	if _, _, err := bad.MountPoint(DevNum{}); err == nil {
		t.Error("no error for a mountinfo that cannot be read")
	}
	if _, err := bad.swaps(); err == nil {
		t.Error("no error for a swaps that cannot be read")
	}
	if _, err := bad.Holders(ID{Block: true}); err == nil {
		t.Error("no error from Holders")
	}
}

func TestHolders(t *testing.T) {
	s := machine(t)
	for n, want := range map[DevNum][]string{
		{8, 1}:   {"mounted on /efi", `mounted on /srv/a b\c`},
		{8, 2}:   {"held by md0"},
		{9, 0}:   {"held by dm-0 (cryptroot)"},
		{253, 0}: {"used as swap"},
		{8, 0}:   {"sda1 mounted on /efi", `sda1 mounted on /srv/a b\c`, "sda2 held by md0"},
		{7, 0}:   nil,
		{254, 9}: {"mounted on /hidden"}, // unknown to sysfs
	} {
		got, err := s.Holders(ID{Block: true, Dev: n})
		if err != nil || !slices.Equal(got, want) {
			t.Errorf("%s: %q %v, want %q", n, got, err, want)
		}
	}
}

func TestImageBehindLoopIsBusy(t *testing.T) {
	path := image(t, 4096)
	l := "/sys/devices/virtual/block/loop3"
	s := tree(t, map[string]string{
		l + "/dev": "7:3\n", l + "/size": "6\n", l + "/loop/backing_file": path + "\n", l + "/loop/offset": "1024\n", l + "/loop/sizelimit": "512\n",
		"/sys/devices/virtual/block/loop4/dev":               "7:4\n",
		"/sys/devices/virtual/block/loop4/loop/backing_file": path + " (deleted)\n",
		"/sys/block/loop3@":                                  "../devices/virtual/block/loop3",
		"/sys/block/loop4@":                                  "../devices/virtual/block/loop4",
		"/sys/class/block/loop3@":                            "../../devices/virtual/block/loop3",
		"/sys/class/block/loop4@":                            "../../devices/virtual/block/loop4",
	})
	_, err := Open(path, ReadWrite, WithSystem(s))
	wantErr(t, err, ErrBusy)
	if !strings.Contains(err.Error(), "attached to loop3") || strings.Contains(err.Error(), "loop4") {
		t.Error(err)
	}
	var busy *BusyError
	if !errors.As(err, &busy) || busy.Hint == "" {
		t.Errorf("%#v", busy)
	}
	mustOpen(t, path, ReadOnly, WithSystem(s))
	mustOpen(t, image(t, 512), ReadWrite, WithSystem(s))

	id, _ := Identify(path)
	if words, err := s.Holders(id); err != nil || !slices.Equal(words, []string{"attached to loop3"}) {
		t.Error(words, err)
	}
	b, err := s.Block("loop3")
	if err != nil || b.Loop == nil || b.Loop.Offset != 1024 || b.Loop.Limit != 512 {
		t.Fatalf("%+v %v", b, err)
	}
	if got, name, err := s.BackingFile(b); err != nil || got != id || name != path {
		t.Error(got, name, err)
	}
	gone, _ := s.Block("loop4")
	_, _, err = s.BackingFile(gone)
	wantErr(t, err, fs.ErrNotExist)
	_, _, err = s.BackingFile(Block{Name: "sda"})
	wantErr(t, err, fs.ErrNotExist)
}

func TestBusyErrorText(t *testing.T) {
	for want, e := range map[string]*BusyError{
		"is in use":                            {},
		"is in use: mounted on /efi":           {By: []string{"mounted on /efi"}},
		"is in use: held by md0, used as swap": {By: []string{"held by md0", "used as swap"}},
	} {
		if e.Error() != want || !errors.Is(e, ErrBusy) {
			t.Error(e)
		}
	}
}
