package blockdev

import (
	"errors"
	"os"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// unixStat is what os.FileInfo.Sys returns.
type unixStat = syscall.Stat_t

// ioctlUint64 runs an ioctl that stores 64 bits, which x/sys has no helper for.
func ioctlUint64(fd int, req uint) (uint64, error) {
	var v uint64
	err := retryInterrupted(func() error {
		if _, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), uintptr(req), uintptr(unsafe.Pointer(&v))); errno != 0 {
			return errno
		}
		return nil
	})
	return v, err
}

// ioctlInt runs an ioctl that stores a C int.
func ioctlInt(fd int, req uint) (int, error) {
	var v int32
	err := retryInterrupted(func() error {
		if _, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), uintptr(req), uintptr(unsafe.Pointer(&v))); errno != 0 {
			return errno
		}
		return nil
	})
	return int(v), err
}

// retryInterrupted repeats f while a signal interrupts it. That is safe for a flush too: a write-back error is
// reported as itself, not as an interruption.
func retryInterrupted(f func() error) error {
	for {
		if err := f(); !errors.Is(err, unix.EINTR) {
			return err
		}
	}
}

// flushBuffers is BLKFLSBUF: it writes back and drops the page cache of one device node.
func flushBuffers(fd int) error {
	return retryInterrupted(func() error { return unix.IoctlSetInt(fd, unix.BLKFLSBUF, 0) })
}

// dropRange advises the kernel to drop the clean pages of a file or device.
func dropRange(fd int) error {
	return retryInterrupted(func() error { return unix.Fadvise(fd, 0, 0, unix.FADV_DONTNEED) })
}

// dropBlock drops the cache of the block device id, open as fd, and of the whole disk that it is a partition of.
func dropBlock(fd int, s System, id ID) error {
	if whole, err := s.WholeDisk(id.Dev); err == nil && whole.Num != id.Dev {
		// The whole disk goes first: writing back a stale page of it afterwards would be seen by the partition.
		if f, err := os.OpenFile(whole.Node, os.O_RDONLY|unix.O_NONBLOCK, 0); err == nil {
			err = dropNode(int(f.Fd()))
			_ = f.Close()
			if err != nil {
				return err
			}
		}
	}
	return dropNode(fd)
}

// dropNode drops the cache of one node, by force where that is allowed.
func dropNode(fd int) error {
	return forceOrAdvise(func() error { return flushBuffers(fd) }, func() error { return dropRange(fd) })
}

// forceOrAdvise falls back from BLKFLSBUF to advice where the right to the former is missing, and only there.
func forceOrAdvise(force, advise func() error) error {
	err := force()
	if errors.Is(err, unix.EACCES) || errors.Is(err, unix.EPERM) {
		return advise()
	}
	return err
}
