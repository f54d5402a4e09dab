package blockdev

import (
	"errors"
	"fmt"
	"os"
	"sync"

	"golang.org/x/sys/unix"
)

// claims are the disks that this process holds open.
//
// Neither O_EXCL nor flock can tell two parts of one disk apart: both belong to an open file, so the second open of an
// image for its XBOOTLDR would be refused by the first one for its ESP. The process therefore takes each lock once per
// disk, keeps it until the last user is gone, and sees to it by itself that the parts it writes do not overlap.
var claims = registry{disks: map[ID]*heldDisk{}}

type registry struct {
	mu    sync.Mutex
	disks map[ID]*heldDisk
}

// heldDisk is one disk with its lock.
type heldDisk struct {
	opening   sync.Mutex // one open at a time, so that nobody relies on a lock that is still being tried
	users     int
	writers   []*claim
	lock      *os.File // duplicate of the descriptor that holds O_EXCL or flock; nil when there is none yet
	exclusive bool     // the lock excludes other processes
}

// claim is one user of a disk.
type claim struct {
	disk      *heldDisk
	id        ID
	mode      Mode
	off, size int64
}

// reserve registers a user, or returns ErrBusy when its part overlaps one that this process writes already. The lock
// itself is taken by hold.
func (r *registry) reserve(id ID, mode Mode, off, size int64) (*claim, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	h := r.disks[id]
	if h == nil {
		h = &heldDisk{}
		r.disks[id] = h
	}
	c := &claim{disk: h, id: id, mode: mode, off: off, size: size}
	if mode == ReadWrite {
		for _, w := range h.writers {
			if c.off < w.off+w.size && w.off < c.off+c.size {
				return nil, &BusyError{By: []string{fmt.Sprintf("already opened for writing by this run, at offset 0x%x", w.off)}}
			}
		}
		h.writers = append(h.writers, c)
	}
	h.users++
	return c, nil
}

// needsExclusive says that the caller's own descriptor has to be the one with O_EXCL. The caller holds disk.opening.
func (c *claim) needsExclusive() bool {
	claims.mu.Lock()
	defer claims.mu.Unlock()
	return c.id.Block && c.mode == ReadWrite && !c.disk.exclusive
}

// hold takes the lock for the claim, through the open file f. The caller holds disk.opening.
func (c *claim) hold(f *os.File) error {
	claims.mu.Lock()
	defer claims.mu.Unlock()
	h := c.disk
	if h.lock != nil && (h.exclusive || c.mode == ReadOnly) {
		return nil
	}
	if c.id.Block && c.mode == ReadOnly {
		return nil
	}
	// A duplicate shares the open file, and with it the lock; it outlives the Disk that happened to come first.
	fd, err := unix.FcntlInt(f.Fd(), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("cannot keep its lock: %w", err)
	}
	dup := os.NewFile(uintptr(fd), f.Name())
	if !c.id.Block {
		if err := lockImage(h.lock, dup, c.mode); err != nil {
			_ = dup.Close()
			return err
		}
	}
	if h.lock != nil {
		_ = h.lock.Close()
	}
	h.lock, h.exclusive = dup, c.mode == ReadWrite
	return nil
}

// lockImage locks an image through f, in place of the shared lock that this process may hold through old.
func lockImage(old, f *os.File, mode Mode) error {
	how := unix.LOCK_SH
	if mode == ReadWrite {
		how = unix.LOCK_EX
	}
	flock := func(f *os.File, how int) error {
		return retryInterrupted(func() error { return unix.Flock(int(f.Fd()), how|unix.LOCK_NB) })
	}
	if old != nil {
		if err := flock(old, unix.LOCK_UN); err != nil {
			return fmt.Errorf("cannot unlock it: %w", err)
		}
	}
	err := flock(f, how)
	if err == nil {
		return nil
	}
	if old != nil {
		// Nothing can be done if a writer slipped in: the readers here see it as any reader of an unlocked file would.
		_ = flock(old, unix.LOCK_SH)
	}
	if errors.Is(err, unix.EWOULDBLOCK) {
		return &BusyError{By: []string{"locked by another program"}}
	}
	return fmt.Errorf("cannot lock it: %w", err)
}

// release forgets the claim, and drops the lock with the last one. The lock of a former writer stays exclusive until
// then, which errs on the safe side.
func (c *claim) release() {
	claims.mu.Lock()
	defer claims.mu.Unlock()
	h := c.disk
	for i, w := range h.writers {
		if w == c {
			h.writers = append(h.writers[:i], h.writers[i+1:]...)
			break
		}
	}
	h.users--
	if h.users > 0 {
		return
	}
	delete(claims.disks, c.id)
	if h.lock != nil {
		_ = h.lock.Close()
	}
}
