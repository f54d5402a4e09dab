package blockdev

import (
	"bytes"
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// loop attaches an image to a loop device, or skips the test by name.
func loop(t *testing.T, path string, args ...string) string {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("loop devices need root")
	}
	if _, err := exec.LookPath("losetup"); err != nil {
		t.Skip("losetup is not installed")
	}
	out, err := exec.Command("losetup", append(args, "--find", "--show", path)...).CombinedOutput()
	if err != nil {
		t.Skipf("no loop devices here: %s", out)
	}
	node := strings.TrimSpace(string(out))
	t.Cleanup(func() {
		if out, err := exec.Command("losetup", "-d", node).CombinedOutput(); err != nil {
			t.Errorf("losetup -d %s: %s", node, out)
		}
	})
	return node
}

// addPart makes the kernel know a partition of a loop device, start and size in sectors of 512 bytes.
func addPart(t *testing.T, node, number, start, size string) string {
	t.Helper()
	if out, err := exec.Command("addpart", node, number, start, size).CombinedOutput(); err != nil {
		t.Skipf("no partitions on loop devices here: %s", out)
	}
	t.Cleanup(func() { _ = exec.Command("delpart", node, number).Run() })
	return node + "p" + number
}

func TestLoopGeometry(t *testing.T) {
	for _, sector := range []int{512, 4096} {
		node := loop(t, image(t, 1<<20), "--sector-size", map[int]string{512: "512", 4096: "4096"}[sector])
		d := mustOpen(t, node, ReadWrite, WithSectorSize(1024)) // the option means nothing here
		if d.Size() != 1<<20 || d.SectorSize() != sector || d.PhysicalSectorSize() < sector || !d.IsBlock() || !d.ID().Block {
			t.Errorf("%d: %d %d %d %s", sector, d.Size(), d.SectorSize(), d.PhysicalSectorSize(), d.ID())
		}
		_, err := d.WriteAt([]byte{1}, 1<<20)
		wantErr(t, err, ErrOutOfRange)
		_ = d.Close()
	}
}

func TestLoopExclusive(t *testing.T) {
	node := loop(t, image(t, 1<<20))
	other, err := os.OpenFile(node, os.O_RDWR|unix.O_EXCL, 0)
	if err != nil {
		t.Fatal(err)
	}
	_, err = Open(node, ReadWrite)
	wantErr(t, err, ErrBusy)
	mustOpen(t, node, ReadOnly)
	if err := other.Close(); err != nil {
		t.Fatal(err)
	}

	// Two parts of one disk, opened by one process; the exclusion outlives the one that was opened first.
	first := mustOpen(t, node, ReadWrite, WithClaim(0, 4096))
	second := mustOpen(t, node, ReadWrite, WithClaim(4096, 4096))
	_, err = Open(node, ReadWrite, WithClaim(0, 512))
	wantErr(t, err, ErrBusy)
	_ = first.Close()
	if f, err := os.OpenFile(node, os.O_RDWR|unix.O_EXCL, 0); err == nil {
		_ = f.Close()
		t.Error("the exclusive lock went with the first part")
	}
	_ = second.Close()
}

// TestLoopOpenedLate asks the kernel, as udev does, whether the device was open for writing when it was closed.
func TestLoopOpenedLate(t *testing.T) {
	path := image(t, 1<<20)
	node := loop(t, path)
	watch, err := unix.InotifyInit1(unix.IN_NONBLOCK | unix.IN_CLOEXEC)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(watch)
	if _, err := unix.InotifyAddWatch(watch, node, unix.IN_CLOSE_WRITE); err != nil {
		t.Fatal(err)
	}
	told := func() bool {
		_, err := unix.Read(watch, make([]byte, 4096))
		return err == nil
	}
	d := mustOpen(t, node, ReadWrite)
	if _, err := d.ReadAt(make([]byte, 512), 0); err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(d.Invalidate(), d.Flush()); err != nil {
		t.Fatal(err)
	}
	if f, err := os.OpenFile(node, os.O_RDONLY|unix.O_EXCL, 0); err == nil {
		_ = f.Close()
		t.Error("it is not held")
	}
	if err := d.Close(); err != nil || told() {
		t.Error("nothing was written, and it was open for writing", err)
	}

	d = mustOpen(t, node, ReadWrite)
	for off := range int64(3) {
		if _, err := d.WriteAt(bytes.Repeat([]byte{byte(off) + 1}, 512), 512*off); err != nil {
			t.Fatal(err)
		}
	}
	got := make([]byte, 512)
	if _, err := d.ReadAt(got, 512); err != nil || got[0] != 2 {
		t.Error(got[0], err)
	}
	if err := d.Flush(); err != nil {
		t.Fatal(err)
	}
	// What was flushed through the descriptor for reading has left the cache of the node.
	if on, err := os.ReadFile(path); err != nil || on[1024] != 3 {
		t.Error("the flush wrote nothing out", err)
	}
	if err := errors.Join(d.Invalidate(), d.Close()); err != nil || !told() {
		t.Error("it was written to, and nobody was told", err)
	}
	d = mustOpen(t, node, ReadOnly)
	if _, err := d.ReadAt(got, 1024); err != nil || got[0] != 3 {
		t.Error(got[0], err)
	}
}

// TestOpenedLateReadOnly has a device that is made read-only between the two.
func TestOpenedLateReadOnly(t *testing.T) {
	node := loop(t, image(t, 1<<20))
	d := mustOpen(t, node, ReadWrite)
	if out, err := exec.Command("blockdev", "--setro", node).CombinedOutput(); err != nil {
		t.Skipf("blockdev --setro: %s", out)
	}
	defer exec.Command("blockdev", "--setrw", node).Run() // or whoever has the node next would have it so
	_, err := d.WriteAt(make([]byte, 512), 0)
	wantErr(t, err, ErrReadOnly)
}

// TestOpenedLateReadOnlyLater has one that is made read-only when it is open for writing already.
func TestOpenedLateReadOnlyLater(t *testing.T) {
	node := loop(t, image(t, 1<<20))
	d := mustOpen(t, node, ReadWrite)
	if _, err := d.WriteAt(make([]byte, 512), 0); err != nil {
		t.Fatal(err)
	}
	if out, err := exec.Command("blockdev", "--setro", node).CombinedOutput(); err != nil {
		t.Skipf("blockdev --setro: %s", out)
	}
	defer exec.Command("blockdev", "--setrw", node).Run()
	_, err := d.WriteAt(make([]byte, 512), 512)
	wantErr(t, err, ErrReadOnly)
}

// TestOpenedLateElsewhere writes through a path that leads to something else by then.
func TestOpenedLateElsewhere(t *testing.T) {
	one, other := loop(t, image(t, 1<<20)), loop(t, image(t, 1<<20))
	path := filepath.Join(t.TempDir(), "disk")
	if err := os.Symlink(one, path); err != nil {
		t.Fatal(err)
	}
	d := mustOpen(t, path, ReadWrite)
	if err := errors.Join(os.Remove(path), os.Symlink(other, path)); err != nil {
		t.Fatal(err)
	}
	if _, err := d.WriteAt(make([]byte, 512), 0); err == nil || !strings.Contains(err.Error(), "was replaced") {
		t.Error(err)
	}
	if err := errors.Join(os.Remove(path), unix.Mkfifo(path, 0o600)); err != nil {
		t.Fatal(err)
	}
	_, err := d.WriteAt(make([]byte, 512), 0)
	wantErr(t, err, ErrNotDevice)
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	_, err = d.WriteAt(make([]byte, 512), 0)
	wantErr(t, err, os.ErrNotExist)
	// It is asked for each time: once the path leads back, it can be written.
	if err := os.Symlink(one, path); err != nil {
		t.Fatal(err)
	}
	if _, err := d.WriteAt(make([]byte, 512), 0); err != nil {
		t.Error(err)
	}
	if err := d.Close(); err != nil {
		t.Error(err)
	}
}

func TestLoopMountedIsRefused(t *testing.T) {
	path := image(t, 4<<20)
	mkfs, err := exec.LookPath("mkfs.ext4")
	if err != nil {
		t.Skip("mkfs.ext4 is not installed")
	}
	if out, err := exec.Command(mkfs, "-q", "-F", path).CombinedOutput(); err != nil {
		t.Fatalf("%s", out)
	}
	node := loop(t, path)
	point := filepath.Join(t.TempDir(), "a b")
	if err := os.Mkdir(point, 0o700); err != nil {
		t.Fatal(err)
	}
	if out, err := exec.Command("mount", "-t", "ext4", node, point).CombinedOutput(); err != nil {
		t.Skipf("ext4 cannot be mounted here: %s", out)
	}
	defer exec.Command("umount", point).Run()
	_, err = Open(node, ReadWrite)
	wantErr(t, err, ErrBusy)
	if !strings.Contains(err.Error(), "mounted on "+point) {
		t.Error(err)
	}
	id, err := Identify(node)
	if err != nil {
		t.Fatal(err)
	}
	m, ok, err := System{}.MountPoint(id.Dev)
	if err != nil || !ok || m.Point != point || m.Type != "ext4" {
		t.Errorf("%+v %v %v", m, ok, err)
	}
	if _, err := Open(path, ReadWrite); !errors.Is(err, ErrBusy) {
		t.Error("image under a loop device:", err)
	}
}

func TestLoopReadOnly(t *testing.T) {
	node := loop(t, image(t, 1<<20), "--read-only")
	_, err := Open(node, ReadWrite)
	wantErr(t, err, ErrReadOnly)
	mustOpen(t, node, ReadOnly)
	// The failed open must leave no claim behind.
	if len(claims.disks) != 1 {
		t.Error(claims.disks)
	}
}

// TestLoopPartitionCaches writes through the whole disk behind the partition's back, and reads it after Invalidate.
func TestLoopPartitionCaches(t *testing.T) {
	node := loop(t, image(t, 1<<20))
	part := addPart(t, node, "1", "64", "128")
	p := mustOpen(t, part, ReadOnly)
	if p.Size() != 65536 {
		t.Fatal(p.Size())
	}
	got := make([]byte, 4096)
	if _, err := p.ReadAt(got, 0); err != nil {
		t.Fatal(err)
	}
	w := mustOpen(t, node, ReadWrite)
	data := bytes.Repeat([]byte{0x5a}, 4096)
	if _, err := w.WriteAt(data, 64*512); err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(w.Flush(), w.Invalidate(), p.Invalidate()); err != nil {
		t.Fatal(err)
	}
	if _, err := p.ReadAt(got, 0); err != nil || !bytes.Equal(got, data) {
		t.Error("the partition still shows its old cache", err)
	}
	_ = w.Close()

	// A partition that is held keeps the whole disk from being opened for writing, and the other way round.
	hold := mustOpen(t, part, ReadWrite)
	_, err := Open(node, ReadWrite)
	wantErr(t, err, ErrBusy)
	whole, err := System{}.WholeDisk(hold.ID().Dev)
	if err != nil || whole.Node != node {
		t.Error(whole, err)
	}
	locks, err := System{}.LockDisks(context.Background(), 10*time.Second, hold.ID())
	if err != nil {
		t.Fatal(err)
	}
	if flockOutside(t, node, "-x") {
		t.Error("the whole disk is not locked")
	}
	locks.Release()
	_ = hold.Close()
	_ = p.Close()
}

func TestLoopHolders(t *testing.T) {
	path := image(t, 1<<20)
	node := loop(t, path)
	id, err := Identify(path)
	if err != nil {
		t.Fatal(err)
	}
	words, err := System{}.Holders(id)
	if err != nil || !slices.Equal(words, []string{"attached to " + filepath.Base(node)}) {
		t.Error(words, err)
	}
}

// TestInvalidateFallsBack: without CAP_SYS_ADMIN the advice is taken, and only a node on which neither works fails.
func TestInvalidateFallsBack(t *testing.T) {
	f, err := os.Open(image(t, 4096))
	if err != nil {
		t.Fatal(err)
	}
	fd := int(f.Fd())
	if err := dropRange(fd); err != nil {
		t.Error(err)
	}
	if err := dropNode(fd); !errors.Is(err, unix.ENOTTY) {
		t.Error("BLKFLSBUF on a file:", err)
	}
	_ = f.Close()
	for _, c := range []struct{ force, advise, want error }{
		{nil, unix.EIO, nil},
		{unix.EACCES, nil, nil},
		{unix.EPERM, nil, nil},
		{unix.EPERM, unix.EBADF, unix.EBADF},
		{unix.EIO, nil, unix.EIO},
	} {
		err := forceOrAdvise(func() error { return c.force }, func() error { return c.advise })
		if !errors.Is(err, c.want) {
			t.Errorf("%v, then %v: %v", c.force, c.advise, err)
		}
	}
	fd = -1
	if err := dropRange(fd); err == nil {
		t.Error("no error on a closed file")
	}
	if _, err := ioctlInt(fd, unix.BLKSSZGET); err == nil {
		t.Error("no error on a closed file")
	}
	if _, err := ioctlUint64(fd, unix.BLKGETSIZE64); err == nil {
		t.Error("no error on a closed file")
	}
	d := &Disk{}
	if err := d.readGeometry(fd); err == nil {
		t.Error("no error on a closed file")
	}
}
