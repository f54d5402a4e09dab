package blockdev

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"time"

	"golang.org/x/sys/unix"
)

// lockPoll is how often a held lock is tried again.
const lockPoll = 20 * time.Millisecond

// DiskLocks are locks on whole disks. See System.LockDisks.
type DiskLocks struct{ files []*os.File }

// LockDisks takes the lock by which udev and partitioners leave a disk alone (an exclusive flock on the whole-disk
// node) for every disk that the given devices are or lie on; images are passed over, they have locks of their own. It
// waits at most until timeout has passed or ctx ends, for all of them together, and then returns ErrBusy, or what ended
// ctx.
//
// Every program that takes several of these locks takes them in the order of the device numbers, or two of them could
// wait for each other. Release them last: udev looks at a disk again when its lock goes.
func (s System) LockDisks(ctx context.Context, timeout time.Duration, ids ...ID) (*DiskLocks, error) {
	ctx, cancel := context.WithTimeoutCause(ctx, timeout, errLockTimeout)
	defer cancel()
	disks := map[DevNum]Block{}
	for _, id := range ids {
		if !id.Block {
			continue
		}
		disk, err := s.WholeDisk(id.Dev)
		if err != nil {
			return nil, fmt.Errorf("cannot lock the disk of %s: %w", id, err)
		}
		disks[disk.Num] = disk
	}
	ordered := make([]Block, 0, len(disks))
	for _, d := range disks {
		ordered = append(ordered, d)
	}
	slices.SortFunc(ordered, func(a, b Block) int {
		return cmp.Or(cmp.Compare(a.Num.Major, b.Num.Major), cmp.Compare(a.Num.Minor, b.Num.Minor))
	})

	locks := &DiskLocks{}
	for _, d := range ordered {
		f, err := lockNode(ctx, d.Node)
		if err != nil {
			locks.Release()
			return nil, fmt.Errorf("cannot lock disk %s: %w", d.Node, err)
		}
		locks.files = append(locks.files, f)
	}
	return locks, nil
}

// errLockTimeout tells our own deadline from the caller's.
var errLockTimeout = errors.New("timeout")

// lockNode opens and locks one node.
func lockNode(ctx context.Context, node string) (*os.File, error) {
	f, err := os.OpenFile(node, os.O_RDONLY|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, pathCause(err)
	}
	for {
		err := retryInterrupted(func() error { return unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB) })
		if err == nil {
			return f, nil
		}
		if !errors.Is(err, unix.EWOULDBLOCK) {
			_ = f.Close()
			return nil, err
		}
		select {
		case <-time.After(lockPoll):
		case <-ctx.Done():
			_ = f.Close()
			if cause := context.Cause(ctx); !errors.Is(cause, errLockTimeout) {
				return nil, cause
			}
			return nil, &BusyError{By: []string{"locked by another program, udev or a partitioner"}}
		}
	}
}

// Release drops the locks, the last one taken first. A second call does nothing.
func (l *DiskLocks) Release() {
	for _, f := range slices.Backward(l.files) {
		_ = f.Close()
	}
	l.files = nil
}
