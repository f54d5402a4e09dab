package blockdev

import (
	"bufio"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// DevNum is the number of a block device. It is comparable.
type DevNum struct{ Major, Minor uint32 }

// String returns the number as the kernel writes it, "8:1".
func (n DevNum) String() string { return fmt.Sprintf("%d:%d", n.Major, n.Minor) }

// devNum takes a dev_t apart.
func devNum(dev uint64) DevNum { return DevNum{unix.Major(dev), unix.Minor(dev)} }

// parseDevNum reads "8:1".
func parseDevNum(s string) (DevNum, error) {
	major, minor, ok := strings.Cut(s, ":")
	if ok {
		ma, err1 := strconv.ParseUint(major, 10, 32)
		mi, err2 := strconv.ParseUint(minor, 10, 32)
		if err1 == nil && err2 == nil {
			return DevNum{uint32(ma), uint32(mi)}, nil
		}
	}
	return DevNum{}, fmt.Errorf("%q is not a device number", s)
}

// System is the machine as the kernel and udev describe it: /sys, /proc, /dev and /run below Root. The zero value is this
// machine; tests bring trees of their own.
type System struct {
	Root string // "" is "/"
}

// Path returns the path of name, such as "/dev/sda", below the root.
func (s System) Path(name string) string {
	if s.Root == "" {
		return name
	}
	return filepath.Join(s.Root, name)
}

// Block is what the kernel tells of one block device. Fields that it does not tell are zero.
type Block struct {
	Name      string // kernel name, "sda1"
	Node      string // device node, with the root of the System
	Num       DevNum
	Disk      string // kernel name of the whole disk when this is a partition, else ""
	Partition int    // number of the partition, 0 for a whole disk
	Start     int64  // bytes from the start of the disk, for a partition
	Size      int64  // bytes
	ReadOnly  bool
	Removable bool     // the medium can be taken out; says nothing of a USB disk
	Hidden    bool     // has no node: a path of a multipath NVMe disk
	Holders   []string // kernel names of md and dm devices on top
	PartUUID  string   // lower case; since Linux 6.13
	PartName  string
	Loop      *LoopInfo // attached loop devices only
}

// LoopInfo is what a loop device stands for.
type LoopInfo struct {
	File   string // as it was named when it was attached, in the mount namespace of that moment
	Offset int64  // bytes into the file
	Limit  int64  // bytes, 0 for all of the file
}

// Blocks lists the block devices of the machine by name; a system without sysfs has none. A device that goes away
// while it is looked at is left out.
func (s System) Blocks() ([]Block, error) {
	entries, err := os.ReadDir(s.Path("/sys/class/block"))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("cannot list block devices: %w", err)
	}
	var blocks []Block
	for _, e := range entries {
		b, err := s.Block(e.Name())
		if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ENODEV) {
			continue
		}
		if err != nil {
			return nil, err
		}
		blocks = append(blocks, b)
	}
	return blocks, nil
}

// BlockByNum returns the device with the given number. It returns fs.ErrNotExist when the kernel has none.
func (s System) BlockByNum(n DevNum) (Block, error) {
	// The directory of links is the quick way; not every sysfs that a tree imitates has it.
	if target, err := os.Readlink(s.Path("/sys/dev/block/" + n.String())); err == nil {
		return s.Block(filepath.Base(target))
	}
	blocks, err := s.Blocks()
	if err != nil {
		return Block{}, err
	}
	for _, b := range blocks {
		if b.Num == n {
			return b, nil
		}
	}
	return Block{}, fmt.Errorf("cannot find block device %s: %w", n, fs.ErrNotExist)
}

// WholeDisk returns the whole disk that device n is a partition of, or the device itself when it is none.
func (s System) WholeDisk(n DevNum) (Block, error) {
	b, err := s.BlockByNum(n)
	if err != nil || b.Disk == "" {
		return b, err
	}
	return s.Block(b.Disk)
}

// Block returns the device with the given kernel name. It returns fs.ErrNotExist when the kernel has none.
func (s System) Block(name string) (Block, error) {
	dir := s.Path("/sys/class/block/" + name)
	fail := func(err error) (Block, error) {
		return Block{}, fmt.Errorf("cannot look at block device %s: %w", name, err)
	}
	b := Block{Name: name}
	text, err := readLine(dir + "/dev")
	if err != nil {
		return fail(err)
	}
	if b.Num, err = parseDevNum(text); err != nil {
		return fail(err)
	}

	// A name such as "cciss!c0d0" stands for a node in a subdirectory.
	node := strings.ReplaceAll(name, "!", "/")
	uevent, err := os.ReadFile(dir + "/uevent")
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fail(err)
	}
	for line := range strings.Lines(string(uevent)) {
		key, value, _ := strings.Cut(strings.TrimSuffix(line, "\n"), "=")
		switch key {
		case "DEVNAME":
			node = value
		case "PARTUUID":
			b.PartUUID = strings.ToLower(value)
		case "PARTNAME":
			b.PartName = value
		}
	}
	b.Node = s.Path("/dev/" + node)

	for _, field := range []struct {
		file  string
		scale int64
		to    *int64
	}{
		// sysfs counts in 512 bytes whatever the sector size is.
		{"size", 512, &b.Size},
		{"start", 512, &b.Start},
	} {
		if *field.to, err = readNumber(dir+"/"+field.file, field.scale); err != nil {
			return fail(err)
		}
	}
	for _, field := range []struct {
		file string
		to   *bool
	}{{"ro", &b.ReadOnly}, {"removable", &b.Removable}, {"hidden", &b.Hidden}} {
		v, err := readNumber(dir+"/"+field.file, 1)
		if err != nil {
			return fail(err)
		}
		*field.to = v != 0
	}
	number, err := readNumber(dir+"/partition", 1)
	if err != nil {
		return fail(err)
	}
	if number > 0 {
		b.Partition = int(number)
		// The directory of a partition lies in that of its disk, once the link in the class is followed.
		real, err := filepath.EvalSymlinks(dir)
		if err != nil {
			return fail(err)
		}
		b.Disk = filepath.Base(filepath.Dir(real))
	}
	holders, err := os.ReadDir(dir + "/holders")
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fail(err)
	}
	for _, h := range holders {
		b.Holders = append(b.Holders, h.Name())
	}
	if b.Loop, err = readLoop(dir + "/loop"); err != nil {
		return fail(err)
	}
	return b, nil
}

// readLoop reads the attributes of an attached loop device; nil when dir does not exist.
func readLoop(dir string) (*LoopInfo, error) {
	name, err := readLine(dir + "/backing_file")
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	l := &LoopInfo{File: name}
	if l.Offset, err = readNumber(dir+"/offset", 1); err != nil {
		return nil, err
	}
	if l.Limit, err = readNumber(dir+"/sizelimit", 1); err != nil {
		return nil, err
	}
	return l, nil
}

// LoopsOver lists the loop devices that are attached to the file or device id.
func (s System) LoopsOver(id ID) ([]Block, error) {
	links, err := filepath.Glob(s.Path("/sys/block") + "/loop*/loop/backing_file")
	if err != nil {
		return nil, fmt.Errorf("cannot list loop devices: %w", err)
	}
	var over []Block
	for _, link := range links {
		b, err := s.Block(filepath.Base(filepath.Dir(filepath.Dir(link))))
		if errors.Is(err, fs.ErrNotExist) {
			continue // detached meanwhile
		}
		if err != nil {
			return nil, err
		}
		if b.Loop == nil {
			continue
		}
		// A name that leads nowhere (deleted, or of another mount namespace) cannot be the file that we were given.
		if backing, err := Identify(s.backingPath(b.Loop.File)); err == nil && backing == id {
			over = append(over, b)
		}
	}
	return over, nil
}

// backingPath places the name of a backing file. Only nodes move with the root: an image is named by its real path.
func (s System) backingPath(name string) string {
	if strings.HasPrefix(name, "/dev/") {
		return s.Path(name)
	}
	return name
}

// BackingFile returns the identity and path of what the loop device b stands for. It returns fs.ErrNotExist when the
// file is gone or b is not a loop device.
func (s System) BackingFile(b Block) (ID, string, error) {
	if b.Loop == nil {
		return ID{}, "", fmt.Errorf("cannot find the file behind %s: %w", b.Name, fs.ErrNotExist)
	}
	path := s.backingPath(b.Loop.File)
	id, err := Identify(path)
	if err != nil {
		return ID{}, "", fmt.Errorf("cannot find the file behind %s: %w", b.Name, err)
	}
	return id, path, nil
}

// Mount is one line of mountinfo.
type Mount struct {
	Point    string // where it is mounted
	Root     string // directory of the filesystem that is mounted there; "/" unless it is a bind mount
	Type     string // filesystem type
	Source   string
	Dev      DevNum
	ReadOnly bool // the mount or the filesystem
	id       string
	parent   string
}

// Mounts lists the mounts that this process sees, other than those of autofs, whose lines name a mount to come and not
// a device. Nothing below a mount point is touched, so that no automount wakes up.
func (s System) Mounts() ([]Mount, error) {
	f, err := os.Open(s.Path("/proc/self/mountinfo"))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil // early boot, before /proc
	}
	if err != nil {
		return nil, fmt.Errorf("cannot list mounts: %w", err)
	}
	defer f.Close()
	var mounts []Mount
	lines := bufio.NewScanner(f)
	lines.Buffer(nil, 1<<20) // overlay mounts have long lines
	for lines.Scan() {
		m, ok := parseMount(lines.Text())
		if ok && m.Type != "autofs" {
			mounts = append(mounts, m)
		}
	}
	if err := lines.Err(); err != nil {
		return nil, fmt.Errorf("cannot list mounts: %w", err)
	}
	return mounts, nil
}

// parseMount reads one line: proc_pid_mountinfo(5), "36 35 98:0 /root /point opts tag... - type source superopts".
func parseMount(line string) (Mount, bool) {
	head, tail, ok := strings.Cut(line, " - ")
	h, t := strings.Fields(head), strings.Fields(tail)
	if !ok || len(h) < 6 || len(t) < 2 {
		return Mount{}, false
	}
	dev, err := parseDevNum(h[2])
	if err != nil {
		return Mount{}, false
	}
	options := strings.Split(h[5], ",")
	if len(t) > 2 {
		options = append(options, strings.Split(t[2], ",")...)
	}
	return Mount{id: h[0], parent: h[1], Dev: dev, Root: unescape(h[3]), Point: unescape(h[4]), Type: t[0],
		Source: unescape(t[1]), ReadOnly: slices.Contains(options, "ro")}, true
}

// MountPoint returns where the device is mounted whole and reachable, as a mounted primary has to be; ok is false when
// it is not mounted so: a bind mount of a directory in it, or a place that a later mount hides, does not count.
func (s System) MountPoint(dev DevNum) (m Mount, ok bool, err error) {
	mounts, err := s.Mounts()
	if err != nil {
		return Mount{}, false, err
	}
	for i, m := range mounts {
		if m.Dev != dev || m.Root != "/" {
			continue
		}
		hidden := slices.ContainsFunc(mounts[i+1:], func(over Mount) bool { return over.parent == m.id && over.Point == m.Point })
		if !hidden {
			return m, true, nil
		}
	}
	return Mount{}, false, nil
}

// MountedAt returns what is mounted at a directory, whole and reachable; ok is false when it is no mount point of that
// kind. The path is absolute and has no symbolic links in it.
func (s System) MountedAt(path string) (m Mount, ok bool, err error) {
	mounts, err := s.Mounts()
	if err != nil {
		return Mount{}, false, err
	}
	for _, m := range slices.Backward(mounts) { // the last one hides those before it
		if m.Point == path {
			return m, m.Root == "/", nil
		}
	}
	return Mount{}, false, nil
}

// Holders says in words what uses the device or image: "mounted on /efi", "used as swap", "held by md0",
// "held by dm-0 (cryptroot)", "attached to loop3". For a whole disk the users of its partitions are included. It sees
// the mounts of its own namespace only: the proof that a device is free is that Open succeeds.
func (s System) Holders(id ID) ([]string, error) {
	var words []string
	loops, err := s.LoopsOver(id)
	if err != nil {
		return nil, err
	}
	for _, l := range loops {
		words = append(words, "attached to "+l.Name)
	}
	if !id.Block {
		return words, nil
	}
	blocks, err := s.Blocks()
	if err != nil {
		return nil, err
	}
	mounts, err := s.Mounts()
	if err != nil {
		return nil, err
	}
	swaps, err := s.swaps()
	if err != nil {
		return nil, err
	}
	name := ""
	for _, b := range blocks {
		if b.Num == id.Dev {
			name = b.Name
		}
	}
	found := func(prefix string, n DevNum, holders []string) {
		for _, m := range mounts {
			if m.Dev == n {
				words = append(words, prefix+"mounted on "+m.Point)
			}
		}
		if slices.Contains(swaps, n) {
			words = append(words, prefix+"used as swap")
		}
		for _, h := range holders {
			if title, err := readLine(s.Path("/sys/class/block/" + h + "/dm/name")); err == nil && title != "" {
				h += " (" + title + ")"
			}
			words = append(words, prefix+"held by "+h)
		}
	}
	if name == "" {
		found("", id.Dev, nil)
	}
	for _, b := range blocks {
		switch {
		case b.Num == id.Dev:
			found("", b.Num, b.Holders)
		case b.Disk != "" && b.Disk == name:
			found(b.Name+" ", b.Num, b.Holders)
		}
	}
	return words, nil
}

// swaps lists the devices that are swapped to.
func (s System) swaps() ([]DevNum, error) {
	text, err := os.ReadFile(s.Path("/proc/swaps"))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("cannot list swap devices: %w", err)
	}
	var devs []DevNum
	for line := range strings.Lines(string(text)) {
		fields := strings.Fields(line)
		if len(fields) < 2 || fields[1] != "partition" {
			continue
		}
		node := unescape(fields[0])
		// Under another root the node may be any file, so the name has to do.
		if b, err := s.Block(strings.ReplaceAll(strings.TrimPrefix(node, "/dev/"), "/", "!")); err == nil {
			devs = append(devs, b.Num)
		} else if id, err := Identify(s.Path(node)); err == nil && id.Block {
			devs = append(devs, id.Dev)
		}
	}
	return devs, nil
}

// unescape undoes the octal escapes that the kernel writes for blanks and backslashes in mountinfo and swaps.
func unescape(s string) string {
	if !strings.Contains(s, `\`) {
		return s
	}
	var out strings.Builder
	for i := 0; i < len(s); i++ {
		if s[i] == '\\' && i+3 < len(s) {
			if v, err := strconv.ParseUint(s[i+1:i+4], 8, 8); err == nil {
				out.WriteByte(byte(v))
				i += 3
				continue
			}
		}
		out.WriteByte(s[i])
	}
	return out.String()
}

// readLine returns the content of a one-line file.
func readLine(path string) (string, error) {
	b, err := os.ReadFile(path)
	if err != nil {
		return "", err
	}
	return strings.TrimSuffix(string(b), "\n"), nil
}

// readNumber returns the number in a file times scale, 0 when there is no such file.
func readNumber(path string, scale int64) (int64, error) {
	text, err := readLine(path)
	if errors.Is(err, fs.ErrNotExist) {
		return 0, nil
	}
	if err != nil {
		return 0, err
	}
	v, err := strconv.ParseInt(strings.TrimSpace(text), 10, 64)
	if err != nil {
		return 0, fmt.Errorf("%s: %w", path, err)
	}
	if v < 0 || v > (1<<63-1)/scale {
		return 0, fmt.Errorf("%s: %d is out of range", path, v)
	}
	return v * scale, nil
}
