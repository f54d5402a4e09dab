package blockdev

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math"
	"os"
	"sync"
	"sync/atomic"

	"github.com/diskfs/go-diskfs/backend"
	"github.com/diskfs/go-diskfs/backend/file"
	"golang.org/x/sys/unix"
)

// Mode says what a disk is opened for.
type Mode int

const (
	// ReadOnly opens for reading; an image takes a shared lock, a block device none.
	ReadOnly Mode = iota
	// ReadWrite opens for reading and writing, and excludes every other holder that the kernel knows of.
	ReadWrite
)

// maxTransfer bounds one system call, in bytes. A read of a gigabyte in one call could not be interrupted, and would
// hide the offset of the sector that failed.
const maxTransfer = 1 << 20

var (
	// ErrBusy is returned when somebody else mounts, holds or locks the device or image; the error in the chain is a
	// *BusyError, which says who.
	ErrBusy = errors.New("is in use")

	// ErrNotDevice is returned when a path is neither a block device nor a regular file.
	ErrNotDevice = errors.New("is neither a block device nor an image file")

	// ErrShortWrite is returned when the system accepts a write and then makes no progress with it.
	ErrShortWrite = errors.New("write made no progress")
)

// BusyError says who holds a device. It unwraps to ErrBusy.
type BusyError struct {
	By   []string // in words: "mounted on /efi", "held by md0"; empty when nobody could be named
	Hint string   // what the user can do, on a line of its own; may be empty
}

// Error implements error.
func (e *BusyError) Error() string {
	if len(e.By) == 0 {
		return ErrBusy.Error()
	}
	s := ErrBusy.Error() + ": " + e.By[0]
	for _, by := range e.By[1:] {
		s += ", " + by
	}
	return s
}

// Unwrap implements the errors package's convention.
func (e *BusyError) Unwrap() error { return ErrBusy }

// ID identifies the storage behind a path; two equal IDs are the same device or file, whatever the paths. It is
// comparable, and means nothing across a reboot.
type ID struct {
	Block bool   // a block device; otherwise a regular file
	Dev   DevNum // the block device itself, or the device that the file is on
	Inode uint64 // of the file; 0 for block devices, of which several nodes may exist
}

// String names the identity for messages.
func (id ID) String() string {
	if id.Block {
		return "block device " + id.Dev.String()
	}
	return fmt.Sprintf("inode %d on %s", id.Inode, id.Dev)
}

// Identify returns the identity of the block device or regular file at path, symbolic links followed, without opening
// it. It returns ErrNotDevice for anything else.
func Identify(path string) (ID, error) {
	info, err := os.Stat(path)
	if err != nil {
		return ID{}, pathCause(err)
	}
	return identify(info)
}

// identify is Identify for a file that has been looked at already.
func identify(info fs.FileInfo) (ID, error) {
	st, ok := info.Sys().(*unixStat)
	if !ok {
		return ID{}, fmt.Errorf("internal error: no stat structure for %s", info.Name())
	}
	switch mode := info.Mode(); {
	case mode.IsRegular():
		return ID{Dev: devNum(st.Dev), Inode: st.Ino}, nil
	case mode&fs.ModeDevice != 0 && mode&fs.ModeCharDevice == 0:
		return ID{Block: true, Dev: devNum(st.Rdev)}, nil
	case mode.IsDir():
		return ID{}, fmt.Errorf("%w: it is a directory", ErrNotDevice)
	case mode&fs.ModeNamedPipe != 0:
		return ID{}, fmt.Errorf("%w: it is a named pipe", ErrNotDevice)
	case mode&fs.ModeSocket != 0:
		return ID{}, fmt.Errorf("%w: it is a socket", ErrNotDevice)
	case mode&fs.ModeCharDevice != 0:
		return ID{}, fmt.Errorf("%w: it is a character device", ErrNotDevice)
	}
	return ID{}, ErrNotDevice
}

// pathCause strips the verb and the path, which the caller's own prefix repeats.
func pathCause(err error) error {
	var pe *fs.PathError
	if errors.As(err, &pe) {
		return pe.Err
	}
	return err
}

// Option changes how Open opens.
type Option func(*options)

type options struct {
	sector     int
	system     System
	claimOff   int64
	claimSize  int64
	claimWhole bool
}

// WithSectorSize sets the logical and physical sector size in bytes, 512 to 4096, of an image file, which has none of
// its own (512 unless this option says otherwise). Block devices ignore it: the kernel knows theirs.
func WithSectorSize(bytes int) Option { return func(o *options) { o.sector = bytes } }

// WithSystem makes Open look for holders below another root.
func WithSystem(s System) Option { return func(o *options) { o.system = s } }

// WithClaim says that only [off, off+size) will be written, so that this process may open the same disk again for
// another part of it (the ESP and the XBOOTLDR of one image). Without it a ReadWrite open claims the whole disk. It
// does not bound the device: see Window.
func WithClaim(off, size int64) Option {
	return func(o *options) { o.claimOff, o.claimSize, o.claimWhole = off, size, false }
}

// Disk is a block device or an image file. It implements Device.
type Disk struct {
	path             string
	id               ID
	mode             Mode
	size             int64
	sector, physical int

	// The system calls behind the device, so that tests can make each of them fail.
	r     io.ReaderAt
	w     io.WriterAt // nil unless ReadWrite
	sync  func() error
	drop  func() error
	close func() error

	mu          sync.Mutex // one flush at a time: the loser of a race must see the winner's failure
	flushFailed atomic.Bool
	closed      atomic.Bool
}

// Open opens the block device or image file at path.
//
// ReadWrite means alone: a block device is opened with O_EXCL, which fails while it is mounted, swapped to, or part of
// an md or dm device in any mount namespace; an image is locked with flock, and refused while a loop device is attached
// to it, because the loop device has a page cache of its own. Both are reported as ErrBusy. The same process may hold
// several disjoint claims on one disk: see WithClaim. A write-protected device or file gives ErrReadOnly.
//
// Nothing but block devices and regular files is opened, and a FIFO is refused without waiting for its writer.
func Open(path string, mode Mode, opts ...Option) (*Disk, error) {
	o := options{sector: 512, claimSize: math.MaxInt64, claimWhole: true}
	for _, opt := range opts {
		opt(&o)
	}
	d, err := open(path, mode, o)
	if err != nil {
		return nil, fmt.Errorf("cannot open %s: %w", path, err)
	}
	return d, nil
}

func open(path string, mode Mode, o options) (*Disk, error) {
	if o.sector < 512 || o.sector > 4096 || o.sector&(o.sector-1) != 0 {
		return nil, fmt.Errorf("sector size %d is not 512, 1024, 2048 or 4096", o.sector)
	}
	if !o.claimWhole && (o.claimOff < 0 || o.claimSize < 0 || o.claimOff > math.MaxInt64-o.claimSize) {
		return nil, fmt.Errorf("%w: claim of 0x%x bytes at offset 0x%x", ErrOutOfRange, o.claimSize, o.claimOff)
	}
	id, err := Identify(path)
	if err != nil {
		return nil, err
	}
	// A loop device on the image means a second page cache over the same bytes; neither would see the other's writes.
	if mode == ReadWrite && !id.Block {
		loops, err := o.system.LoopsOver(id)
		if err != nil {
			return nil, err
		}
		if len(loops) > 0 {
			by := make([]string, len(loops))
			for i, l := range loops {
				by[i] = "attached to " + l.Name
			}
			return nil, &BusyError{By: by, Hint: "name the loop device instead, or detach it with losetup -d"}
		}
	}

	claim, err := claims.reserve(id, mode, o.claimOff, o.claimSize)
	if err != nil {
		return nil, err
	}
	opening := &claim.disk.opening
	opening.Lock()
	defer opening.Unlock()
	defer func() {
		if claim != nil {
			claim.release()
		}
	}()

	late := mode == ReadWrite && id.Block
	var storage backend.Storage
	if late {
		storage, err = openLate(path, claim.needsExclusive())
	} else {
		storage, err = file.OpenFromPathWithExclusive(path, mode == ReadOnly, false)
	}
	switch {
	case errors.Is(err, unix.EBUSY):
		by, herr := o.system.Holders(id)
		if herr != nil {
			by = nil // the refusal stands; who holds it is a courtesy
		}
		return nil, &BusyError{By: by, Hint: "unmount it or stop what holds it, then try again"}
	case errors.Is(err, unix.EROFS):
		return nil, ErrReadOnly
	case err != nil:
		return nil, pathCause(err)
	}
	keep := false
	defer func() {
		if !keep {
			_ = storage.Close()
		}
	}()

	f, err := storage.Sys()
	if err != nil {
		return nil, err
	}
	info, err := f.Stat()
	if err != nil {
		return nil, pathCause(err)
	}
	// The path was looked at before it was opened; make sure that it still led to the same thing.
	if now, err := identify(info); err != nil {
		return nil, err
	} else if now != id {
		return nil, fmt.Errorf("%s was replaced by %s meanwhile", id, now)
	}

	d := &Disk{path: path, id: id, mode: mode, size: info.Size(), sector: o.sector, physical: o.sector, r: storage}
	fd := int(f.Fd())
	if id.Block {
		if err := d.readGeometry(fd); err != nil {
			return nil, err
		}
		if mode == ReadWrite {
			ro, err := ioctlInt(fd, unix.BLKROGET)
			if err != nil {
				return nil, fmt.Errorf("cannot ask whether it is read-only: %w", err)
			}
			if ro != 0 {
				return nil, ErrReadOnly
			}
			if err := unix.Faccessat(unix.AT_FDCWD, path, unix.W_OK, unix.AT_EACCESS); err != nil {
				return nil, err
			}
		}
		d.drop = func() error { return dropBlock(fd, o.system, id) }
	} else {
		d.drop = func() error { return dropRange(fd) }
	}
	if err := claim.hold(f); err != nil {
		return nil, err
	}
	d.sync = func() error { return retryInterrupted(func() error { return unix.Fdatasync(fd) }) }
	closeWriter := func() error { return nil }
	switch {
	case late:
		w := &lateWriter{path: path, id: id}
		d.w, closeWriter = w, w.close
	case mode == ReadWrite:
		if d.w, err = storage.Writable(); err != nil {
			return nil, err
		}
	}
	held := claim
	claim, keep = nil, true
	d.close = func() error {
		err := closeWriter()
		if cerr := storage.Close(); err == nil {
			err = cerr
		}
		held.release()
		return err
	}
	return d, nil
}

// openLate opens a block device that may be written to later. go-diskfs knows O_EXCL only together with writing.
func openLate(path string, exclusive bool) (backend.Storage, error) {
	flags := os.O_RDONLY
	if exclusive {
		flags |= unix.O_EXCL
	}
	f, err := os.OpenFile(path, flags, 0)
	if err != nil {
		return nil, err
	}
	return file.New(f, true), nil
}

// lateWriter opens a block device for writing when the first bytes are to be written, and not before: udev looks anew at
// each disk that was open for writing when it is closed, and at all its partitions. A run with nothing to do must not cost a boot
// that. The device is held with O_EXCL all the time by a descriptor for reading. Both have one page cache: that one reads what
// this one wrote, and its fdatasync(2) writes it out and fails where that fails, as it was opened before.
type lateWriter struct {
	path string
	id   ID

	mu   sync.Mutex
	file *os.File
}

// WriteAt implements io.WriterAt.
func (w *lateWriter) WriteAt(p []byte, off int64) (int, error) {
	f, err := w.open()
	if err != nil {
		return 0, err
	}
	n, err := f.WriteAt(p, off)
	if errors.Is(err, unix.EPERM) {
		err = fmt.Errorf("%w by now: %w", ErrReadOnly, pathCause(err)) // what Linux gives where the device became so
	}
	return n, err
}

func (w *lateWriter) open() (*os.File, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.file != nil {
		return w.file, nil
	}
	f, err := os.OpenFile(w.path, os.O_RDWR|unix.O_NONBLOCK, 0)
	if errors.Is(err, unix.EROFS) || errors.Is(err, unix.EACCES) {
		return nil, fmt.Errorf("%w by now: %w", ErrReadOnly, pathCause(err))
	}
	if err != nil {
		return nil, err
	}
	info, err := f.Stat()
	if err == nil {
		var now ID
		if now, err = identify(info); err == nil && now != w.id {
			err = fmt.Errorf("%s was replaced by %s meanwhile", w.id, now)
		}
	}
	if err != nil {
		_ = f.Close()
		return nil, err
	}
	w.file = f
	return f, nil
}

func (w *lateWriter) close() error {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.file == nil {
		return nil
	}
	return w.file.Close()
}

// readGeometry asks the kernel for the sizes of a block device.
func (d *Disk) readGeometry(fd int) error {
	size, err := ioctlUint64(fd, unix.BLKGETSIZE64)
	if err != nil {
		return fmt.Errorf("cannot read its size: %w", err)
	}
	if size > math.MaxInt64 {
		return fmt.Errorf("size of 0x%x bytes is impossible", size)
	}
	sector, err := ioctlInt(fd, unix.BLKSSZGET)
	if err != nil {
		return fmt.Errorf("cannot read its logical sector size: %w", err)
	}
	physical, err := ioctlInt(fd, unix.BLKPBSZGET)
	if err != nil {
		return fmt.Errorf("cannot read its physical sector size: %w", err)
	}
	if sector < 512 || sector > 4096 || sector&(sector-1) != 0 {
		return fmt.Errorf("logical sector size of %d bytes is not supported", sector)
	}
	d.size, d.sector, d.physical = int64(size), sector, max(sector, physical)
	return nil
}

// Path returns the path that the disk was opened by.
func (d *Disk) Path() string { return d.path }

// IsBlock says whether the disk is a block device; otherwise it is a regular file.
func (d *Disk) IsBlock() bool { return d.id.Block }

// ID returns the identity of the storage.
func (d *Disk) ID() ID { return d.id }

// Mode returns what the disk was opened for.
func (d *Disk) Mode() Mode { return d.mode }

// Size implements Device.
func (d *Disk) Size() int64 { return d.size }

// SectorSize implements Device.
func (d *Disk) SectorSize() int { return d.sector }

// PhysicalSectorSize implements Device.
func (d *Disk) PhysicalSectorSize() int { return d.physical }

// ReadAt implements Device.
func (d *Disk) ReadAt(p []byte, off int64) (int, error) {
	if err := CheckRange(off, len(p), d.size); err != nil {
		return 0, fmt.Errorf("cannot read %s: %w", d.path, err)
	}
	done := 0
	for done < len(p) {
		part := p[done:min(len(p), done+maxTransfer)]
		n, err := d.r.ReadAt(part, off+int64(done))
		done += max(n, 0)
		switch {
		case done == len(p):
			// io.ReaderAt may report the end of the file together with the last byte.
		case errors.Is(err, unix.EINTR):
		case errors.Is(err, io.EOF), err == nil && n <= 0:
			// Inside the bounds taken at Open: the file was cut, or the disk went away.
			return done, fmt.Errorf("cannot read %s at offset 0x%x: %w", d.path, off+int64(done), io.ErrUnexpectedEOF)
		case err != nil:
			return done, fmt.Errorf("cannot read %s at offset 0x%x: %w", d.path, off+int64(done), pathCause(err))
		}
	}
	return done, nil
}

// WriteAt implements Device. After an error the bytes before the returned count are written, the rest may be.
func (d *Disk) WriteAt(p []byte, off int64) (int, error) {
	if d.w == nil {
		return 0, fmt.Errorf("cannot write %s: %w", d.path, ErrReadOnly)
	}
	if err := CheckRange(off, len(p), d.size); err != nil {
		return 0, fmt.Errorf("cannot write %s: %w", d.path, err)
	}
	if d.flushFailed.Load() {
		return 0, fmt.Errorf("cannot write %s: %w", d.path, ErrFlushFailed)
	}
	done := 0
	for done < len(p) {
		part := p[done:min(len(p), done+maxTransfer)]
		n, err := d.w.WriteAt(part, off+int64(done))
		done += max(n, 0)
		switch {
		case errors.Is(err, unix.EINTR):
		case err != nil:
			return done, fmt.Errorf("cannot write %s at offset 0x%x: %w", d.path, off+int64(done), pathCause(err))
		case n <= 0:
			return done, fmt.Errorf("cannot write %s at offset 0x%x: %w", d.path, off+int64(done), ErrShortWrite)
		}
	}
	return done, nil
}

// Flush implements Device with fdatasync, which on a block device is write-back and a flush of the drive's own cache.
// It does nothing on a disk that was opened for reading.
func (d *Disk) Flush() error {
	if d.w == nil {
		return nil
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.flushFailed.Load() {
		return fmt.Errorf("cannot flush %s: %w", d.path, ErrFlushFailed)
	}
	if err := d.sync(); err != nil {
		// The kernel marks the pages it could not write as clean: a second fdatasync would succeed and mean nothing.
		d.flushFailed.Store(true)
		return fmt.Errorf("cannot flush %s: %w", d.path, err)
	}
	return nil
}

// Invalidate implements Device. Call it after Flush: pages that are still dirty may stay cached, and are never lost.
//
// A block device drops the cache of its own node and, for a partition, that of the whole disk, which is separate and
// incoherent with it. Dropping needs CAP_SYS_ADMIN; without it the advice that every owner may give is used, and only
// when that fails too is it an error. A whole disk that cannot be found or opened is passed over: what this device
// reads does not come from there.
func (d *Disk) Invalidate() error {
	if err := d.drop(); err != nil {
		return fmt.Errorf("cannot drop the cache of %s: %w", d.path, err)
	}
	return nil
}

// Close releases the device and its locks. It does not flush. A second Close does nothing.
func (d *Disk) Close() error {
	if d.closed.Swap(true) {
		return nil
	}
	if err := d.close(); err != nil {
		return fmt.Errorf("cannot close %s: %w", d.path, pathCause(err))
	}
	return nil
}
