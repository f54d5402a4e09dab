package blockdev

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// lockTree is a machine with two disks, the second of which has the lower number, and files for nodes.
func lockTree(t *testing.T) (s System, ids []ID) {
	s = tree(t, map[string]string{
		"/sys/devices/sdb/dev": "8:16\n", "/sys/devices/sdb/sdb1/dev": "8:17\n", "/sys/devices/sdb/sdb1/partition": "1\n",
		"/sys/devices/vda/dev":   "8:3\n",
		"/sys/class/block/sdb@":  "../../devices/sdb",
		"/sys/class/block/sdb1@": "../../devices/sdb/sdb1",
		"/sys/class/block/vda@":  "../../devices/vda",
		"/dev/sdb":               "", "/dev/vda": "",
	})
	return s, []ID{{Block: true, Dev: DevNum{8, 17}}, {Block: true, Dev: DevNum{8, 16}}, {Block: true, Dev: DevNum{8, 3}}, {Inode: 5}}
}

func TestLockDisks(t *testing.T) {
	s, ids := lockTree(t)
	locks, err := s.LockDisks(context.Background(), time.Second, ids...)
	if err != nil {
		t.Fatal(err)
	}
	// One lock a disk, in the order of the numbers.
	if len(locks.files) != 2 || locks.files[0].Name() != s.Path("/dev/vda") || locks.files[1].Name() != s.Path("/dev/sdb") {
		t.Fatal(locks.files)
	}
	begin := time.Now()
	_, err = s.LockDisks(context.Background(), 50*time.Millisecond, ids...)
	wantErr(t, err, ErrBusy)
	if d := time.Since(begin); d < 50*time.Millisecond || d > 5*time.Second {
		t.Error("waited", d)
	}
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	_, err = s.LockDisks(ctx, time.Minute, ids...)
	wantErr(t, err, context.Canceled)

	time.AfterFunc(30*time.Millisecond, locks.Release)
	again, err := s.LockDisks(context.Background(), 10*time.Second, ids...)
	if err != nil {
		t.Fatal(err)
	}
	again.Release()
	again.Release()
}

// TestLockDisksPartial: what was locked before the disk that failed is let go.
func TestLockDisksPartial(t *testing.T) {
	s, ids := lockTree(t)
	if err := os.Remove(s.Path("/dev/sdb")); err != nil {
		t.Fatal(err)
	}
	_, err := s.LockDisks(context.Background(), time.Second, ids...)
	wantErr(t, err, fs.ErrNotExist)
	f, err := os.Open(s.Path("/dev/vda"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		t.Error("a lock was left behind:", err)
	}
	_, err = s.LockDisks(context.Background(), time.Second, ID{Block: true, Dev: DevNum{77, 7}})
	if !errors.Is(err, fs.ErrNotExist) {
		t.Error(err)
	}
}
