package gpt

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strings"
	"time"
	"unicode/utf16"

	"golang.org/x/sys/unix"

	"espmirror/blockdev"
)

var (
	// ErrNoEFI is returned when the machine was not started by EFI firmware: nothing can say what it was started from.
	ErrNoEFI = errors.New("this machine was not started through EFI")

	// ErrNoVariables is returned when the machine was started through EFI and its variables cannot be seen: efivarfs is not
	// mounted, or the kernel was told to leave the firmware alone. The error in the chain is a *NoVariablesError.
	ErrNoVariables = errors.New("the EFI variables cannot be seen")

	// ErrNotSet is returned when an EFI variable does not exist.
	ErrNotSet = errors.New("is not set")

	// ErrMalformed is returned when an EFI variable does not hold what its specification says.
	ErrMalformed = errors.New("is malformed")
)

// NoVariablesError is ErrNoVariables with what to do about it.
type NoVariablesError struct{ dir string }

// Error implements error.
func (e *NoVariablesError) Error() string { return ErrNoVariables.Error() + ": " + e.dir + " is empty" }

// Unwrap implements the errors package's convention.
func (e *NoVariablesError) Unwrap() error { return ErrNoVariables }

// Hint returns what a person can do.
func (e *NoVariablesError) Hint() string { return "mount -t efivarfs efivarfs " + e.dir }

// The vendors of the variables that are read, as efivarfs writes them into the names of files.
const (
	// vendorGlobal is EFI_GLOBAL_VARIABLE. UEFI specification, "Globally Defined Variables".
	vendorGlobal = "8be4df61-93ca-11d2-aa0d-00e098032b8c"

	// vendorLoader is systemd's. https://systemd.io/BOOT_LOADER_INTERFACE
	vendorLoader = "4a67b082-0a4c-41cf-b6c7-440b29bb8c4f"
)

const efivars = "/sys/firmware/efi/efivars"

// maxVariable bounds what is read of one variable, in bytes. Those that are read here have some hundreds.
const maxVariable = 64 << 10

// Variable is the content of an EFI variable.
type Variable struct {
	Attributes uint32 // UEFI specification, "GetVariable()", "Related Definitions"
	Data       []byte
}

// ReadVariable reads an EFI variable: name as in the specification that defines it, vendor a GUID in lower case. The
// number in a name such as Boot000A is found in either case: firmware writes it in upper case as the specification says,
// and some does not. It returns ErrNoEFI, ErrNoVariables, ErrNotSet, or ErrMalformed.
func ReadVariable(sys blockdev.System, name, vendor string) (*Variable, error) {
	v, err := readVariable(sys, name, vendor)
	if err != nil {
		return nil, fmt.Errorf("cannot read EFI variable %s: %w", name, err)
	}
	return v, nil
}

func readVariable(sys blockdev.System, name, vendor string) (*Variable, error) {
	dir := sys.Path(efivars)
	file := name + "-" + vendor
	raw, err := readRetrying(dir + "/" + file)
	if errors.Is(err, fs.ErrNotExist) {
		if file, err = otherCase(sys, file); err != nil {
			return nil, err
		}
		raw, err = readRetrying(dir + "/" + file)
	}
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil, ErrNotSet // deleted meanwhile
	case err != nil:
		return nil, err
	case len(raw) == 0:
		return nil, ErrNotSet // efivarfs shows a variable so that somebody has created and not written yet
	case len(raw) > maxVariable:
		return nil, fmt.Errorf("it %w: it has more than 0x%x bytes", ErrMalformed, maxVariable)
	case len(raw) < 4:
		return nil, fmt.Errorf("it %w: it has %d bytes, and its attributes alone have 4", ErrMalformed, len(raw))
	}
	// Linux, Documentation/filesystems/efivarfs.rst: the attributes, then the data.
	return &Variable{binary.LittleEndian.Uint32(raw), raw[4:]}, nil
}

// otherCase returns the name of a variable's file as it is, where it differs in the case of letters; or the reason why
// there is none.
func otherCase(sys blockdev.System, file string) (string, error) {
	if _, err := os.Stat(sys.Path("/sys/firmware/efi")); errors.Is(err, fs.ErrNotExist) {
		return "", ErrNoEFI
	}
	dir := sys.Path(efivars)
	entries, err := os.ReadDir(dir)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return "", err
	}
	if len(entries) == 0 {
		return "", &NoVariablesError{dir}
	}
	for _, e := range entries {
		if strings.EqualFold(e.Name(), file) {
			return e.Name(), nil
		}
	}
	return "", ErrNotSet
}

// A read of efivarfs gives EINTR when too many are made at once, and to be interrupted is what it calls having waited
// 50 ms for its turn. Linux, fs/efivarfs/file.c; the numbers are those of systemd, src/basic/efivars.c.
const (
	triesAtOnce = 20
	triesTotal  = 25
	tryAgain    = 50 * time.Millisecond
)

// readRetrying reads at most maxVariable+1 bytes of a file. The package os would repeat an interrupted read for ever.
func readRetrying(path string) ([]byte, error) {
	for try := 1; ; try++ {
		b, err := readWhole(path)
		if err == nil || !errors.Is(err, unix.EINTR) || try == triesTotal {
			return b, err
		}
		if try >= triesAtOnce {
			time.Sleep(tryAgain)
		}
	}
}

// readWhole reads a file from its beginning; tests put failures there that no file can have.
var readWhole = func(path string) ([]byte, error) {
	// Not blocking, should a tree that imitates efivarfs have a FIFO there.
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	defer unix.Close(fd)
	buf := make([]byte, maxVariable+1)
	for n := 0; n < len(buf); {
		m, err := unix.Read(fd, buf[n:])
		if err != nil {
			return nil, err
		}
		if m == 0 {
			return buf[:n], nil
		}
		n += m
	}
	return buf, nil
}

// Text returns the data as text: UTF-16, little endian, up to the first zero character or the end. It returns
// ErrMalformed for half a character.
func (v *Variable) Text() (string, error) {
	s, _, err := text16(v.Data)
	return s, err
}

// text16 reads UTF-16 up to a zero character or the end, and returns also the number of bytes that it takes with it; -1
// when there is no zero character.
func text16(b []byte) (s string, size int, err error) {
	var units []uint16
	size = -1
	for i := 0; i+1 < len(b); i += 2 {
		u := binary.LittleEndian.Uint16(b[i:])
		if u == 0 {
			size = i + 2
			break
		}
		units = append(units, u)
	}
	if size < 0 && len(b)%2 != 0 {
		return "", -1, fmt.Errorf("it %w: half a character at offset 0x%x", ErrMalformed, len(b)-1)
	}
	for i := 0; i < len(units); i++ {
		if !utf16.IsSurrogate(rune(units[i])) {
			continue
		}
		if i+1 == len(units) || utf16.DecodeRune(rune(units[i]), rune(units[i+1])) == '\ufffd' {
			return "", size, fmt.Errorf("it %w: half of a surrogate pair, 0x%04x, at offset 0x%x", ErrMalformed, units[i], 2*i)
		}
		i++
	}
	return string(utf16.Decode(units)), size, nil
}
