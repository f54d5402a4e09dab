package gpt

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"slices"
	"strconv"
	"strings"

	"espmirror/blockdev"
)

// UEFI specification, "Globally Defined Variables".
const (
	variableBootOrder = "BootOrder"
	variableBootNext  = "BootNext"
)

// BootEntry is a boot option of the firmware, a variable Boot####.
type BootEntry struct {
	Number  uint16
	InOrder bool // BootOrder has it
	LoadOption
}

// Name returns the name of the variable, such as "Boot000A".
func (e *BootEntry) Name() string { return bootName(e.Number) }

func bootName(number uint16) string { return fmt.Sprintf("Boot%04X", number) }

// Leads says whether firmware finds a partition by the entry: its GUID and its number have to be the partition's. number 0
// stands for one that is not known. EDK2, BmMatchPartitionDevicePathNode, compares just these two.
func (e *BootEntry) Leads(partUUID string, number int) bool {
	p := e.Partition
	return p != nil && p.PartUUID != "" && p.PartUUID == partUUID && (number == 0 || int64(p.Number) == int64(number))
}

// Usable says whether firmware tries the entry by itself.
func (e *BootEntry) Usable() bool { return e.InOrder && e.Active() }

// BootEntries are the boot options of the firmware.
type BootEntries struct {
	Entries  []BootEntry // those in BootOrder first and in its order, then the others by their numbers
	Order    []uint16    // BootOrder
	Problems []string    // variables that could not be read, in words

	used       map[uint16]bool // numbers that are taken: by a variable, whatever it holds, or by a mention in another
	current    int             // BootCurrent, -1 when it is not known
	attributes uint32          // those of BootOrder, 0 when it is not set
	orderErr   error           // why BootOrder could not be read
}

// ReadBootEntries reads the boot options. A variable that cannot be read is a problem and hides no other. It returns ErrNoEFI
// or ErrNoVariables.
func ReadBootEntries(sys blockdev.System) (*BootEntries, error) {
	fail := func(err error) (*BootEntries, error) { return nil, fmt.Errorf("cannot list the boot entries: %w", err) }
	files, err := os.ReadDir(sys.Path(efivars))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fail(err)
	}
	if len(files) == 0 {
		_, err := otherCase(sys, "")
		return fail(err)
	}
	b := &BootEntries{used: map[uint16]bool{}, current: -1}
	problem := func(err error) {
		if err != nil && !errors.Is(err, ErrNotSet) {
			b.Problems = append(b.Problems, err.Error())
		}
	}
	v, err := ReadVariable(sys, variableBootOrder, vendorGlobal)
	if err == nil {
		b.attributes = v.Attributes
		if len(v.Data)%2 != 0 {
			err = fmt.Errorf("cannot read EFI variable %s: it %w: it has %d bytes, an odd number", variableBootOrder, ErrMalformed, len(v.Data))
		} else {
			for i := 0; i < len(v.Data); i += 2 {
				b.Order = append(b.Order, binary.LittleEndian.Uint16(v.Data[i:]))
			}
		}
	}
	if !errors.Is(err, ErrNotSet) {
		b.orderErr = err
	}
	problem(err)
	// A number that an order mentions and no variable has is not free: a new entry would have the place of the old one.
	for _, n := range b.Order {
		b.used[n] = true
	}
	for _, name := range []string{variableBootNext, ViaBootCurrent} {
		v, err := ReadVariable(sys, name, vendorGlobal)
		if err == nil && len(v.Data) == 2 {
			n := binary.LittleEndian.Uint16(v.Data)
			if b.used[n] = true; name == ViaBootCurrent {
				b.current = int(n)
			}
		}
		problem(err)
	}
	for _, f := range files {
		n, ok := bootNumber(f.Name())
		if !ok {
			continue
		}
		b.used[n] = true
		name, _, _ := strings.Cut(f.Name(), "-")
		v, err := ReadVariable(sys, name, vendorGlobal)
		if err != nil {
			problem(err)
			continue
		}
		o, err := ParseLoadOption(v.Data)
		if err != nil {
			problem(fmt.Errorf("cannot read EFI variable %s: %w", name, err))
			continue
		}
		b.Entries = append(b.Entries, BootEntry{Number: n, InOrder: slices.Contains(b.Order, n), LoadOption: *o})
	}
	place := func(e BootEntry) int {
		if i := slices.Index(b.Order, e.Number); i >= 0 {
			return i
		}
		return len(b.Order) + int(e.Number)
	}
	slices.SortStableFunc(b.Entries, func(x, y BootEntry) int { return place(x) - place(y) })
	return b, nil
}

// bootNumber reads the name of the file of a variable Boot####.
func bootNumber(file string) (uint16, bool) {
	name, vendor, ok := strings.Cut(file, "-")
	digits, ok2 := strings.CutPrefix(name, "Boot")
	if !ok || !ok2 || len(digits) != 4 || !strings.EqualFold(vendor, vendorGlobal) {
		return 0, false
	}
	n, err := strconv.ParseUint(digits, 16, 16)
	return uint16(n), err == nil
}

// Leading returns the entries that lead to a partition, as BootEntry.Leads has it.
func (b *BootEntries) Leading(partUUID string, number int) []BootEntry {
	var found []BootEntry
	for _, e := range b.Entries {
		if e.Leads(partUUID, number) {
			found = append(found, e)
		}
	}
	return found
}

// Current returns the entry by which the firmware started this machine, nil when that is not known or the entry is gone.
func (b *BootEntries) Current() *BootEntry {
	for i := range b.Entries {
		if int(b.Entries[i].Number) == b.current {
			return &b.Entries[i]
		}
	}
	return nil
}
