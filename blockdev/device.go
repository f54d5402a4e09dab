// Package blockdev is the one seam through which espmirror reads and writes disks, partitions and image files.
//
// go-diskfs's backend.Storage is the way in; it has no flush, no bounds and no sector sizes, and a crash-safe writer
// needs all three, so everything above this package sees a Device instead. Windows, memory, read-only, overlay,
// counting, recording and faulty devices are decorators beside it.
package blockdev

import (
	"errors"
	"fmt"
	"io"
)

// Device is a bounded, random-access range of bytes with an explicit write barrier. Offsets and sizes are in bytes.
//
// ReadAt and WriteAt transfer all of p or return an error; a range that is not wholly inside [0, Size()) transfers
// nothing and returns ErrOutOfRange. Implementations are safe for concurrent ReadAt.
type Device interface {
	io.ReaderAt
	io.WriterAt

	// Flush returns when every write that returned before the call is on stable storage. After it has failed once, what
	// the medium holds is unknown: the device refuses every later write and flush with ErrFlushFailed.
	Flush() error

	// Invalidate forgets cached data, so that the next ReadAt comes from the medium as far as the system allows.
	Invalidate() error

	// Size is the number of addressable bytes.
	Size() int64

	// SectorSize is the logical sector size in bytes, the unit that the device writes atomically: 512 to 4096.
	SectorSize() int

	// PhysicalSectorSize is the physical sector size in bytes, at least SectorSize.
	PhysicalSectorSize() int
}

var (
	// ErrOutOfRange is returned when a read or write is not wholly inside the device; nothing was transferred.
	ErrOutOfRange = errors.New("out of range of the device")

	// ErrReadOnly is returned by writes to a device that was opened, or wrapped, for reading only.
	ErrReadOnly = errors.New("device is read-only")

	// ErrFlushFailed is returned by every write and flush that follows a failed flush.
	ErrFlushFailed = errors.New("an earlier flush failed")
)

// CheckRange returns ErrOutOfRange, with the place, unless [off, off+n) lies inside [0, size).
func CheckRange(off int64, n int, size int64) error {
	if off < 0 || n < 0 || off > size || int64(n) > size-off {
		return fmt.Errorf("%w: %d bytes at offset 0x%x of 0x%x", ErrOutOfRange, n, off, size)
	}
	return nil
}
