package gpt

import (
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"espmirror/blockdev"
)

// ErrNoOrder is returned when the firmware has no order of boot entries: a new one would come first, before what the machine
// is started from now.
var ErrNoOrder = errors.New("there is no order of boot entries that a new one could stand at the end of")

// NewEntry describes a boot entry as it should be.
type NewEntry struct {
	Description string // a number is added where another entry has it
	File        string // path of the image on the partition, with slashes: "/EFI/BOOT/BOOTX64.EFI"
	Partition   HardDrive
}

// HardDrive returns the partition as a device path has it. It is for a partition of a GPT.
func (l *Location) HardDrive() HardDrive {
	p, sector := l.Part, int64(l.DiskTable.SectorSize)
	return HardDrive{Number: uint32(p.Number), Start: uint64(p.Start / sector), Blocks: uint64(p.Size / sector), PartUUID: p.PARTUUID()}
}

// What Register did.
const (
	EntryThere   = "there"        // it was there, and nothing was written
	EntryOrdered = "put in order" // it was there, and BootOrder has it now
	EntryCreated = "created"
)

// Registered is an entry that leads to the partition and starts the image.
type Registered struct {
	BootEntry
	What string // EntryThere, EntryOrdered or EntryCreated

	data []byte // of an entry that is to be created
}

// Plan says what Register would do, and takes the number, so that the next plan gets another one. It returns the errors by
// which Register writes nothing.
func (b *BootEntries) Plan(n *NewEntry) (*Registered, error) {
	if b.orderErr != nil {
		return nil, b.orderErr // what cannot be read cannot be kept
	}
	data, err := encodeLoadOption(b.unique(n.Description), &n.Partition, n.File)
	if err != nil {
		return nil, err
	}
	var r *Registered
	for _, e := range b.Leading(n.Partition.PartUUID, int(n.Partition.Number)) {
		// FAT does not tell case apart. One that is in the order comes first here.
		if r == nil && strings.EqualFold(e.File(), n.File) {
			r = &Registered{BootEntry: e, What: EntryOrdered}
		}
	}
	if r != nil && r.InOrder {
		r.What = EntryThere
		return r, nil
	}
	if len(b.orderBefore()) == 0 {
		return nil, ErrNoOrder
	}
	if r != nil {
		return r, nil
	}
	number, ok := b.free()
	if !ok {
		return nil, errors.New("all numbers of boot entries are taken")
	}
	o, err := ParseLoadOption(data)
	if err != nil {
		return nil, fmt.Errorf("internal error: %w", err)
	}
	e := BootEntry{Number: number, LoadOption: *o}
	b.used[number], b.Entries = true, append(b.Entries, e)
	return &Registered{e, EntryCreated, data}, nil
}

// orderBefore is the order that a new entry stands at the end of: BootOrder or, where firmware has none, what was started.
func (b *BootEntries) orderBefore() []uint16 {
	if e := b.Current(); len(b.Order) == 0 && e != nil {
		return []uint16{e.Number}
	}
	return b.Order
}

// free is the lowest number that nothing has.
func (b *BootEntries) free() (uint16, bool) {
	for n := range 1 << 16 {
		if !b.used[uint16(n)] {
			return uint16(n), true
		}
	}
	return 0, false
}

// unique makes a description that no entry has. None stays none, which is refused.
func (b *BootEntries) unique(text string) string {
	taken := func(s string) bool {
		return slices.ContainsFunc(b.Entries, func(e BootEntry) bool { return e.Description == s })
	}
	s := text
	for n := 2; text != "" && taken(s); n++ {
		s = fmt.Sprintf("%s %d", text, n)
	}
	return s
}

// Register sees to it that an entry leads to a partition and starts an image there, and that BootOrder has it. One that is
// there is taken as it is; a new one stands at the end. No variable but BootOrder is changed, and that only grows.
//
//	Boot####   made, with a number that nothing has
//	BootOrder  with that number behind all others
//
// A power cut between the two leaves an entry that no order has: firmware does not try it by itself, and the next Register
// puts it in order. Where the second write fails, the first is undone.
func Register(sys blockdev.System, n *NewEntry) (*Registered, error) {
	fail := func(err error) (*Registered, error) { return nil, fmt.Errorf("cannot make a boot entry: %w", err) }
	for try := 1; ; try++ {
		b, err := ReadBootEntries(sys)
		if err != nil {
			return fail(err)
		}
		r, err := b.Plan(n)
		if err != nil {
			return fail(err)
		}
		if r.What == EntryCreated {
			err := createVariable(sys, r.Name(), vendorGlobal, r.data)
			if errors.Is(err, unix.EEXIST) && try < 5 {
				continue // somebody else has just taken the number
			}
			if err != nil {
				return fail(err)
			}
		}
		if r.What == EntryThere {
			return r, nil
		}
		if err := appendOrder(sys, r.Number); err != nil {
			if r.What != EntryCreated {
				return fail(fmt.Errorf("%s is there, and %s could not be changed: %w", r.Name(), variableBootOrder, err))
			}
			if uerr := removeVariable(sys, r.Name(), vendorGlobal); uerr != nil {
				return fail(fmt.Errorf("%w; %s was made, and could not be taken back: %w; without a place in the order it does nothing", err, r.Name(), uerr))
			}
			return fail(fmt.Errorf("%w; %s was taken back", err, r.Name()))
		}
		r.InOrder = true
		return r, nil
	}
}

// appendOrder puts a number at the end of BootOrder, as it is now.
func appendOrder(sys blockdev.System, number uint16) error {
	b, err := ReadBootEntries(sys)
	if err != nil {
		return err
	}
	if b.orderErr != nil {
		return b.orderErr
	}
	order := b.orderBefore()
	if slices.Contains(order, number) && len(b.Order) > 0 {
		return nil // somebody else was quicker
	}
	var data []byte
	for _, n := range append(slices.Clone(order), number) {
		data = binary.LittleEndian.AppendUint16(data, n)
	}
	if b.attributes == 0 {
		return createVariable(sys, variableBootOrder, vendorGlobal, data)
	}
	return replaceVariable(sys, variableBootOrder, vendorGlobal, b.attributes, data)
}
