package gpt

import (
	"encoding/binary"
	"errors"
	"fmt"
	"strings"

	"github.com/google/uuid"

	"espmirror/blockdev"
)

// ErrBootUnknown is returned by Booted when the EFI variables are there and do not say from which partition the machine
// was started: the network, a CD, or a loader that leaves no trace and a boot option that is gone.
var ErrBootUnknown = errors.New("no EFI variable names the partition that the machine was started from")

// The EFI variables by which Booted knows a partition.
const (
	ViaLoader      = "LoaderDevicePartUUID" // the boot loader's word
	ViaBootCurrent = "BootCurrent"          // the firmware's
)

// Boot is what EFI variables say about the start of this machine.
type Boot struct {
	// PartUUID is the PARTUUID of the partition that the boot loader was started from, in lower case. It may be an
	// XBOOTLDR partition: Finder.OnSameDisk finds the ESP that goes with it.
	PartUUID string
	Via      string // the variable that said so: ViaLoader or ViaBootCurrent
	Entry    string // the selected boot loader entry, such as "debian-6.1.0-18.conf"; "" when the loader does not say
	Default  string // the default entry; "" likewise
	// Preferred comes before Default (systemd 260), OneShot is for the next start alone; "" likewise.
	Preferred, OneShot string
	Image              string // path of the boot loader on the partition, with slashes; "" likewise

	Problems []string // variables that could not be read, in words; ones that are not set are none
}

// Booted tells from which partition this machine was started. The word of the boot loader counts before that of the
// firmware: a loader may have been started by another one on another disk.
//
// It returns ErrNoEFI, ErrNoVariables, or ErrBootUnknown.
func Booted(sys blockdev.System) (*Boot, error) {
	b := &Boot{}
	var why []error
	for _, source := range []struct {
		via  string
		read func(blockdev.System) (string, error)
	}{{ViaLoader, LoaderPartUUID}, {ViaBootCurrent, BootCurrentPartUUID}} {
		partUUID, err := source.read(sys)
		if err == nil {
			b.PartUUID, b.Via = partUUID, source.via
			break
		}
		if errors.Is(err, ErrNoEFI) || errors.Is(err, ErrNoVariables) {
			return nil, fmt.Errorf("cannot tell what this machine was started from: %w", err)
		}
		why = append(why, err)
		if !errors.Is(err, ErrNotSet) {
			b.Problems = append(b.Problems, err.Error())
		}
	}
	if b.Via == "" {
		return nil, fmt.Errorf("cannot tell what this machine was started from: %w: %w; %w", ErrBootUnknown, why[0], why[1])
	}
	for _, text := range []struct {
		variable string
		to       *string
	}{{"LoaderEntrySelected", &b.Entry}, {"LoaderEntryDefault", &b.Default}, {"LoaderEntryPreferred", &b.Preferred}, {"LoaderEntryOneShot", &b.OneShot}, {"LoaderImageIdentifier", &b.Image}} {
		v, err := loaderText(sys, text.variable)
		if err != nil {
			if !errors.Is(err, ErrNotSet) {
				b.Problems = append(b.Problems, err.Error())
			}
			continue
		}
		*text.to = v
	}
	b.Image = strings.ReplaceAll(b.Image, `\`, "/")
	return b, nil
}

// loaderText reads a variable of the Boot Loader Interface that holds text.
func loaderText(sys blockdev.System, name string) (string, error) {
	v, err := ReadVariable(sys, name, vendorLoader)
	if err != nil {
		return "", err
	}
	s, err := v.Text()
	if err != nil {
		return "", fmt.Errorf("cannot read EFI variable %s: %w", name, err)
	}
	return s, nil
}

// LoaderPartUUID returns the GUID, in lower case, of the partition from which the boot loader says that it was started:
// LoaderDevicePartUUID. https://systemd.io/BOOT_LOADER_INTERFACE. systemd-boot writes it in upper case. It returns the
// errors of ReadVariable.
func LoaderPartUUID(sys blockdev.System) (string, error) {
	s, err := loaderText(sys, ViaLoader)
	if err != nil {
		return "", err
	}
	guid, err := uuid.Parse(s)
	if err != nil || guid == uuid.Nil {
		return "", fmt.Errorf("cannot read EFI variable %s: it %w: %q is not a partition GUID", ViaLoader, ErrMalformed, s)
	}
	return guid.String(), nil
}

// BootCurrentPartUUID returns the PARTUUID of the partition in the boot option by which the firmware started this
// machine. UEFI specification, "Globally Defined Variables": BootCurrent, Boot####. It returns the errors of
// ReadVariable, and ErrNotSet also for a boot option that leads through no partition that has a PARTUUID.
func BootCurrentPartUUID(sys blockdev.System) (string, error) {
	v, err := ReadVariable(sys, ViaBootCurrent, vendorGlobal)
	if err != nil {
		return "", err
	}
	if len(v.Data) != 2 {
		return "", fmt.Errorf("cannot read EFI variable %s: it %w: it has %d bytes, expected 2", ViaBootCurrent, ErrMalformed, len(v.Data))
	}
	name := fmt.Sprintf("Boot%04X", binary.LittleEndian.Uint16(v.Data))
	if v, err = ReadVariable(sys, name, vendorGlobal); err != nil {
		return "", err
	}
	option, err := ParseLoadOption(v.Data)
	if err != nil {
		return "", fmt.Errorf("cannot read EFI variable %s: %w", name, err)
	}
	if option.Partition == nil || option.Partition.PartUUID == "" {
		return "", fmt.Errorf("cannot use EFI variable %s (%q): a partition %w in it", name, option.Description, ErrNotSet)
	}
	return option.Partition.PartUUID, nil
}
