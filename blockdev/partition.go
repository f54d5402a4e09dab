package blockdev

import (
	"errors"
	"fmt"
	"os"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Linux, include/uapi/linux/blkpg.h.
const (
	blkpgAdd = 1
	blkpgDel = 2
)

// blkpgPartition is struct blkpg_partition.
type blkpgPartition struct {
	start, length int64 // bytes
	number        int32
	_             [128]byte // names, which the kernel does not look at
	_             [4]byte
}

// blkpgArg is struct blkpg_ioctl_arg.
type blkpgArg struct {
	op, flags, size int32
	data            unsafe.Pointer
}

// withNode calls f with a descriptor of a device node that was opened beside whoever holds it.
func withNode(node string, flags int, f func(fd int) error) error {
	file, err := os.OpenFile(node, flags|unix.O_NONBLOCK, 0)
	if err != nil {
		return pathCause(err)
	}
	defer file.Close()
	return retryInterrupted(func() error { return f(int(file.Fd())) })
}

func blkpg(node string, op int32, p *blkpgPartition) error {
	return withNode(node, os.O_RDONLY, func(fd int) error {
		arg := blkpgArg{op: op, size: int32(unsafe.Sizeof(*p)), data: unsafe.Pointer(p)}
		if _, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), unix.BLKPG, uintptr(unsafe.Pointer(&arg))); errno != 0 {
			return errno
		}
		return nil
	})
}

// nodeWait is how long a device node may take to appear once the kernel has the partition.
const nodeWait = 2 * time.Second

// AddPartition makes the kernel know a partition of a whole disk, start and size in bytes, whether it understands the
// table of the disk or not, and returns the name of its node. A kernel whose new partition gets no node, as in a
// container with a /dev of its own, is made to forget it again: the node is what everybody else goes by.
func (s System) AddPartition(disk Block, number int, start, size int64) (node string, err error) {
	defer func() {
		if err != nil {
			err = fmt.Errorf("cannot make the kernel know partition %d of %s: %w", number, disk.Node, err)
		}
	}()
	p := &blkpgPartition{start: start, length: size, number: int32(number)}
	if err := blkpg(disk.Node, blkpgAdd, p); err != nil && !errors.Is(err, unix.EBUSY) {
		return "", err
	}
	for until := time.Now().Add(nodeWait); ; time.Sleep(20 * time.Millisecond) {
		blocks, err := s.Blocks()
		if err != nil {
			return "", err
		}
		for _, b := range blocks {
			if b.Disk != disk.Name || b.Partition != number {
				continue
			}
			if b.Start != start || b.Size != size {
				return "", fmt.Errorf("%w: it has another partition of that number", ErrBusy)
			}
			if _, err := Identify(b.Node); err == nil {
				return b.Node, nil
			}
		}
		if time.Now().After(until) {
			return "", errors.Join(errors.New("no device node appears for it"), blkpg(disk.Node, blkpgDel, p))
		}
	}
}

// ForgetPartitions makes the kernel forget all partitions of a whole disk. It returns ErrBusy when one is in use.
func (s System) ForgetPartitions(disk Block) error {
	blocks, err := s.Blocks()
	if err != nil {
		return err
	}
	for _, b := range blocks {
		if b.Disk != disk.Name {
			continue
		}
		err := blkpg(disk.Node, blkpgDel, &blkpgPartition{number: int32(b.Partition)})
		if errors.Is(err, unix.EBUSY) {
			err = ErrBusy
		}
		if err != nil && !errors.Is(err, unix.ENXIO) {
			return fmt.Errorf("cannot make the kernel forget %s: %w", b.Node, err)
		}
	}
	return nil
}

// Discard tells the device that it need not keep what it holds in [off, off+size). What is read there afterwards is up to
// the device. It returns errors.ErrUnsupported for a device that knows no such thing.
func Discard(node string, off, size int64) error {
	err := withNode(node, os.O_WRONLY, func(fd int) error {
		arg := [2]uint64{uint64(off), uint64(size)}
		if _, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), unix.BLKDISCARD, uintptr(unsafe.Pointer(&arg))); errno != 0 {
			return errno
		}
		return nil
	})
	if errors.Is(err, unix.EOPNOTSUPP) {
		err = errors.ErrUnsupported
	}
	if err != nil {
		return fmt.Errorf("cannot discard 0x%x bytes at offset 0x%x of %s: %w", size, off, node, err)
	}
	return nil
}
