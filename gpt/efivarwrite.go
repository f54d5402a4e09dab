package gpt

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"time"

	"golang.org/x/sys/unix"

	"espmirror/blockdev"
)

// ErrVariablesReadOnly is returned when EFI variables can be read and not written.
var ErrVariablesReadOnly = errors.New("the EFI variables cannot be written")

// variableError is a write that failed, with what to do about it.
type variableError struct {
	err  error
	hint string
}

// Error implements error.
func (e *variableError) Error() string { return e.err.Error() }

// Unwrap implements the errors package's convention.
func (e *variableError) Unwrap() error { return e.err }

// Hint returns what a person can do.
func (e *variableError) Hint() string { return e.hint }

// Attributes of a variable. UEFI specification, "GetVariable()", "Related Definitions": NON_VOLATILE, BOOTSERVICE_ACCESS and
// RUNTIME_ACCESS, as "Globally Defined Variables" wants them for Boot#### and BootOrder.
const bootAttributes = 1 | 2 | 4

// fsImmutable is FS_IMMUTABLE_FL. Linux, include/uapi/linux/fs.h.
const fsImmutable = 0x10

// efivarOps are what efivarfs is asked for in a write; tests put failures there that no file can have.
var efivarOps = struct {
	open     func(path string, flags int) (fd int, err error)
	write    func(fd int, b []byte) (int, error)
	flags    func(fd int) (uint32, error)
	setFlags func(fd int, flags uint32) error
	unlink   func(path string) error
}{
	open: func(path string, flags int) (int, error) {
		return unix.Open(path, flags|unix.O_CLOEXEC|unix.O_NONBLOCK, 0o644)
	},
	write:    unix.Write,
	flags:    func(fd int) (uint32, error) { return unix.IoctlGetUint32(fd, unix.FS_IOC_GETFLAGS) },
	setFlags: func(fd int, flags uint32) error { return unix.IoctlSetPointerInt(fd, unix.FS_IOC_SETFLAGS, int(flags)) },
	unlink:   unix.Unlink,
}

// CheckVariablesWritable returns ErrVariablesReadOnly, with a hint, when it shows without a write that EFI variables cannot be
// written; and ErrNoEFI or ErrNoVariables.
func CheckVariablesWritable(sys blockdev.System) error {
	mount, ok, err := sys.MountedAt(efivars)
	if err != nil {
		return err
	}
	if _, err := otherCase(sys, ""); !errors.Is(err, ErrNotSet) && err != nil {
		return err
	}
	if ok && mount.ReadOnly {
		return writeError(unix.EROFS)
	}
	if err := unix.Access(sys.Path(efivars), unix.W_OK); err != nil {
		return writeError(err)
	}
	return nil
}

// writeError says what a failed write means.
func writeError(err error) error {
	hint := ""
	switch {
	case errors.Is(err, unix.EROFS):
		err, hint = fmt.Errorf("%w: efivarfs is mounted read-only (%w)", ErrVariablesReadOnly, err), "mount -o remount,rw "+efivars
	case errors.Is(err, unix.EPERM), errors.Is(err, unix.EACCES):
		err, hint = fmt.Errorf("%w: %w", ErrVariablesReadOnly, err), "run it as root, outside of a container; some kernels and firmware allow nobody to"
	case errors.Is(err, unix.ENOSPC):
		err = fmt.Errorf("the firmware has no room for it: %w", err)
		hint = "delete boot entries that nobody needs (efibootmgr, efibootmgr -b NUMBER -B) and crash dumps in /sys/fs/pstore, then start the machine again"
	case errors.Is(err, unix.EINVAL), errors.Is(err, unix.EIO):
		err = fmt.Errorf("the firmware refuses it: %w", err)
	}
	if hint == "" {
		return err
	}
	return &variableError{err, hint}
}

// createVariable makes a variable. It returns unix.EEXIST when there is one.
func createVariable(sys blockdev.System, name, vendor string, data []byte) error {
	path := sys.Path(efivars + "/" + name + "-" + vendor)
	fail := func(err error) error { return fmt.Errorf("cannot create EFI variable %s: %w", name, writeError(err)) }
	fd, err := efivarOps.open(path, unix.O_WRONLY|unix.O_CREAT|unix.O_EXCL)
	if err != nil {
		return fail(err)
	}
	err = writeAtOnce(fd, bootAttributes, data)
	if cerr := unix.Close(fd); err == nil {
		err = cerr
	}
	if err == nil {
		err = verifyVariable(sys, name, vendor, bootAttributes, data)
	}
	if err != nil {
		// The file is ours: it was not there, and efivarfs keeps an empty one until somebody removes it.
		if uerr := removeVariable(sys, name, vendor); uerr != nil && !errors.Is(uerr, unix.ENOENT) {
			err = fmt.Errorf("%w (and it could not be taken back: %w)", err, uerr)
		}
		return fail(err)
	}
	return nil
}

// replaceVariable writes a variable that is there. data is no shorter than what it holds.
func replaceVariable(sys blockdev.System, name, vendor string, attributes uint32, data []byte) error {
	path := sys.Path(efivars + "/" + name + "-" + vendor)
	fail := func(err error) error { return fmt.Errorf("cannot write EFI variable %s: %w", name, writeError(err)) }
	restore, err := mutable(path)
	if err != nil {
		return fail(err)
	}
	defer restore()
	fd, err := efivarOps.open(path, unix.O_WRONLY)
	if err != nil {
		return fail(err)
	}
	err = writeAtOnce(fd, attributes, data)
	if cerr := unix.Close(fd); err == nil {
		err = cerr
	}
	if err == nil {
		err = verifyVariable(sys, name, vendor, attributes, data)
	}
	if err != nil {
		return fail(err)
	}
	return nil
}

// removeVariable deletes a variable that this run has made.
func removeVariable(sys blockdev.System, name, vendor string) error {
	path := sys.Path(efivars + "/" + name + "-" + vendor)
	restore, err := mutable(path)
	if err != nil {
		return err
	}
	defer restore()
	return efivarOps.unlink(path)
}

// mutable takes the immutable flag from a variable's file, which the kernel puts on those whose loss stops some firmware.
// Linux, Documentation/filesystems/efivarfs.rst. restore puts it back: it is a matter of the file alone, and set anew at the next
// mount, so that a failure there is none of the write.
func mutable(path string) (restore func(), err error) {
	restore = func() {}
	fd, err := efivarOps.open(path, unix.O_RDONLY)
	if err != nil {
		return restore, err
	}
	flags, err := efivarOps.flags(fd)
	if err != nil || flags&fsImmutable == 0 {
		// A tree that imitates efivarfs knows no flags.
		return restore, unix.Close(fd)
	}
	if err := efivarOps.setFlags(fd, flags&^fsImmutable); err != nil {
		_ = unix.Close(fd)
		return restore, err
	}
	return func() {
		_ = efivarOps.setFlags(fd, flags)
		_ = unix.Close(fd)
	}, nil
}

// writeAtOnce writes attributes and data, in one call: efivarfs takes each for a whole variable. It interrupts as it does in
// a read.
func writeAtOnce(fd int, attributes uint32, data []byte) error {
	b := append(binary.LittleEndian.AppendUint32(nil, attributes), data...)
	for try := 1; ; try++ {
		n, err := efivarOps.write(fd, b)
		switch {
		case err == nil && n != len(b):
			return fmt.Errorf("%d of %d bytes were written", n, len(b))
		case err == nil || !errors.Is(err, unix.EINTR) || try == triesTotal:
			return err
		}
		if try >= triesAtOnce {
			time.Sleep(tryAgain)
		}
	}
}

// verifyVariable reads back what was written.
func verifyVariable(sys blockdev.System, name, vendor string, attributes uint32, data []byte) error {
	v, err := readVariable(sys, name, vendor)
	if err != nil {
		return fmt.Errorf("cannot read it back: %w", err)
	}
	if v.Attributes != attributes || !bytes.Equal(v.Data, data) {
		return fmt.Errorf("the firmware has kept something else than what was written: %x, attributes 0x%x", v.Data, v.Attributes)
	}
	return nil
}
