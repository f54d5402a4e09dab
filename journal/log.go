package journal

import (
	"crypto/sha256"
	"errors"
	"fmt"
	"slices"

	"espmirror/blockdev"
)

// Log is an open journal. It is not safe for concurrent use, and the volume's lock keeps other processes out.
type Log struct {
	dev  blockdev.Device
	unit int // bytes of a header write, and what payload writes are multiples of

	head    Header // the one that counts
	slot    int64  // where it is
	damaged error  // why the other slot does not count, when it held neither a header nor zeros
	failed  error  // first failed write or flush
}

// Status is the header that counts.
type Status struct {
	State  State
	Index  int // block that may be in flight, when Committing
	Blocks int // number of blocks of the pending record
	Seq    uint64
	ID     [16]byte // pending transaction; when Idle the last one, zero when there was none
	Digest [32]byte // of the new content, when Committing

	// Damaged says that the other slot was unreadable or damaged when the journal was opened: a header write was cut, or
	// the state is one step older than it was. Decide does not rely on the state where the volume itself can tell.
	Damaged bool
}

// unitOf returns the bytes of a header write: the larger of the two sector sizes, so that it is one sector to the device
// and to the file system. It returns ErrGeometry when one is not a power of two from 512 to 4096, or size is not a
// multiple of it from MinSize to MaxSize.
func unitOf(size int64, sectors ...int) (int, error) {
	unit := slices.Max(sectors)
	for _, s := range sectors {
		if s < HeaderSize || s > 4096 || s&(s-1) != 0 {
			return 0, fmt.Errorf("%w: sectors of %d bytes", ErrGeometry, s)
		}
	}
	if size < MinSize || size > MaxSize || size%int64(unit) != 0 {
		return 0, fmt.Errorf("%w: 0x%x bytes with sectors of %d", ErrGeometry, size, unit)
	}
	return unit, nil
}

// Format returns the content of a new journal file of size bytes on a volume with the given sector size in bytes. It is
// idle, and bound to b.
//
// creation names the units that creating the file allocates: its own and those of new directories. The file is on the
// medium before the directory entry that makes it reachable; if a cut comes in between, DecodeHeader on lost space finds
// the list, and all of it can be released.
//
// It returns ErrGeometry for an unsuitable size or sector size, ErrTooLarge for more than MaxCreationRuns runs, and
// ErrRecord for malformed ones.
func Format(size, sector int, b Binding, creation []Run) ([]byte, error) {
	if _, err := unitOf(int64(size), sector); err != nil {
		return nil, fmt.Errorf("cannot format journal: %w", err)
	}
	if err := checkRuns(creation); err != nil {
		return nil, fmt.Errorf("cannot format journal: %w: creation runs: %w", ErrRecord, err)
	}
	runs := slices.Collect(merged(creation))
	if len(runs) > MaxCreationRuns {
		return nil, fmt.Errorf("cannot format journal: %w: %d creation runs, at most %d", ErrTooLarge, len(runs), MaxCreationRuns)
	}
	h := Header{State: Idle, Seq: 1, Binding: b, Size: int64(size), Creation: runs}
	file := make([]byte, size)
	h.encode(file[SlotA:])
	return file, nil
}

// slotState is what was found in one slot.
type slotState struct {
	off int64
	h   Header
	err error
}

// readSlots reads and decodes both slots. A slot that cannot be read is like one that is damaged: a cut in the middle of
// a header write leaves either.
func readSlots(dev blockdev.Device, unit int) [2]slotState {
	slots := [2]slotState{{off: SlotA}, {off: SlotB}}
	for i := range slots {
		s := &slots[i]
		b := make([]byte, unit)
		_, err := dev.ReadAt(b, s.off)
		if err != nil {
			// Once more: by the older header alone the newer record would be given up, and what it took stays lost.
			_, err = dev.ReadAt(b, s.off)
		}
		if err != nil {
			s.err = fmt.Errorf("%w: %w", ErrInvalid, err)
			continue
		}
		s.h, s.err = decodeHeader(b[:HeaderSize])
	}
	return slots
}

// Open opens the journal in dev, which covers exactly its file, on a volume with the given sector size in bytes. It
// reads the headers and writes nothing.
//
// It returns ErrGeometry when dev cannot hold a journal, ErrVersion when any header is of a newer version, ErrInvalid
// when none can be relied on (ErrAbsent when there never was one), and ErrBinding when the journal was made for another
// volume or size.
func Open(dev blockdev.Device, sector int, b Binding) (*Log, error) {
	unit, err := unitOf(dev.Size(), dev.SectorSize(), sector)
	if err != nil {
		return nil, fmt.Errorf("cannot open journal: %w", err)
	}
	slots := readSlots(dev, unit)
	for _, s := range slots {
		// Even with the lower sequence: its record may be one that this version cannot see.
		if errors.Is(s.err, ErrVersion) {
			return nil, fmt.Errorf("cannot open journal: slot at 0x%x: %w", s.off, s.err)
		}
	}
	win, other := slots[0], slots[1]
	switch {
	case win.err != nil && other.err != nil:
		err := other.err
		if errors.Is(other.err, ErrAbsent) {
			err = win.err
		}
		return nil, fmt.Errorf("cannot open journal: both slots: %w", err)
	case win.err == nil && other.err == nil && win.h.Seq == other.h.Seq:
		// Every write takes the next sequence and the slot that does not count, so these were not written by us.
		return nil, fmt.Errorf("cannot open journal: %w: both slots have the sequence 0x%x", ErrInvalid, win.h.Seq)
	case win.err != nil, other.err == nil && other.h.Seq > win.h.Seq:
		win, other = other, win
	}
	if win.h.Binding != b {
		return nil, fmt.Errorf("cannot open journal: %w: binding is %x, expected %x", ErrBinding, win.h.Binding[:8], b[:8])
	}
	if win.h.Size != dev.Size() {
		return nil, fmt.Errorf("cannot open journal: %w: file size is 0x%x, expected 0x%x", ErrBinding, win.h.Size, dev.Size())
	}
	l := &Log{dev: dev, unit: unit, head: win.h, slot: win.off}
	if other.err != nil && !errors.Is(other.err, ErrAbsent) {
		l.damaged = fmt.Errorf("slot at 0x%x: %w", other.off, other.err)
	}
	return l, nil
}

// Reinit makes the file in dev an idle journal bound to b, whatever it held, and returns it open. It is for a journal
// that Open refuses, once the caller has decided that its record, if any, is of no use: a copied volume (ErrBinding) or
// damage (ErrInvalid). The creation runs are kept if they can be read. A cut in between leaves what was there, or the
// new journal.
func Reinit(dev blockdev.Device, sector int, b Binding) (*Log, error) {
	unit, err := unitOf(dev.Size(), dev.SectorSize(), sector)
	if err != nil {
		return nil, fmt.Errorf("cannot reset journal: %w", err)
	}
	l := &Log{dev: dev, unit: unit, slot: SlotB}
	var seq uint64
	for _, s := range readSlots(dev, unit) {
		usable := s.err == nil || errors.Is(s.err, ErrVersion)
		if usable && s.h.Seq > seq && s.h.Seq <= maxSequence-2 {
			seq, l.slot, l.head.Creation = s.h.Seq, s.off, s.h.Creation
		}
	}
	// Both slots, one after the other: a foreign header that stayed behind would count again as soon as a cut tore the
	// only one of ours, and one that could not be read this time may be readable the next.
	for i := range uint64(2) {
		h := Header{State: Idle, Seq: seq + 1 + i, Binding: b, Size: dev.Size(), Creation: l.head.Creation}
		if err := l.put(h, true); err != nil {
			return nil, fmt.Errorf("cannot reset journal: %w", err)
		}
	}
	return l, nil
}

// Capacity is the largest Size in bytes of a record that fits.
func (l *Log) Capacity() int { return int(l.dev.Size() - PayloadOffset) }

// Status returns the header that counts. After a failed write it is the one from before.
func (l *Log) Status() Status {
	return Status{
		State: l.head.State, Index: int(l.head.Index), Blocks: int(l.head.Blocks),
		Seq: l.head.Seq, ID: l.head.ID, Digest: l.head.Digest, Damaged: l.damaged != nil,
	}
}

// Pending returns the record that is not finished, or nil when there is none. It returns ErrPayload when the record
// cannot be read or is not the one that the header names, and ErrVersion when it has a newer version.
func (l *Log) Pending() (*Record, error) {
	if l.head.State == Idle {
		return nil, nil
	}
	n := int(l.head.payloadLen)
	// Whole sectors, as they were written. Open has checked that the file is as long as the header says, and decoding
	// the header that the payload lies inside it.
	b := make([]byte, (n+l.unit-1)/l.unit*l.unit)
	if _, err := l.dev.ReadAt(b, PayloadOffset); err != nil {
		return nil, fmt.Errorf("cannot read journal record: %w: %w", ErrPayload, err)
	}
	b = b[:n:n]
	if sum := sha256.Sum256(b); sum != l.head.payloadSum {
		return nil, fmt.Errorf("cannot read journal record: %w: hash is %x, expected %x", ErrPayload, sum[:8], l.head.payloadSum[:8])
	}
	r, err := decodeRecord(b)
	switch {
	case errors.Is(err, ErrVersion):
		return nil, fmt.Errorf("cannot read journal record: %w", err)
	case err != nil:
		return nil, fmt.Errorf("cannot read journal record: %w: %w", ErrPayload, err)
	case r.ID != l.head.ID || len(r.Blocks) != int(l.head.Blocks):
		return nil, fmt.Errorf("cannot read journal record: %w: transaction %x with %d blocks, expected %x with %d",
			ErrPayload, r.ID, len(r.Blocks), l.head.ID, l.head.Blocks)
	}
	return r, nil
}

// Prepare makes r the pending record and returns when it is on stable storage. It returns ErrRecord for a malformed
// record, ErrTooLarge for one that exceeds Capacity, ErrPending when the last one is not finished and ErrFailed after an
// earlier failure; none of these writes anything.
func (l *Log) Prepare(r *Record) error {
	if err := l.prepare(r); err != nil {
		return fmt.Errorf("cannot write journal record: %w", err)
	}
	return nil
}

func (l *Log) prepare(r *Record) error {
	if l.failed != nil {
		return fmt.Errorf("%w: %w", ErrFailed, l.failed)
	}
	if l.head.State != Idle {
		return l.outdated(fmt.Errorf("%w: transaction %x is %v", ErrPending, l.head.ID, l.head.State))
	}
	if err := r.check(); err != nil {
		return err
	}
	if l.head.Seq >= maxSequence {
		return fmt.Errorf("%w: sequence 0x%x is the last", ErrTooLarge, l.head.Seq)
	}
	size := Size(r)
	if size > l.Capacity() {
		return fmt.Errorf("%w: 0x%x bytes, capacity 0x%x", ErrTooLarge, size, l.Capacity())
	}
	b := r.encode(l.unit)
	h := l.head
	h.State, h.Index, h.Digest = Prepared, 0, [32]byte{}
	h.ID, h.Blocks = r.ID, uint32(len(r.Blocks))
	h.payloadLen, h.payloadSum = uint32(size), sha256.Sum256(b[:size])

	// The header that says Idle must be stable before the payload of the one before it is overwritten. Done leaves its
	// flush to the caller, and what Open read may have come from a cache that a killed process left behind.
	if err := l.flush(); err != nil {
		return err
	}
	if _, err := l.dev.WriteAt(b, PayloadOffset); err != nil {
		return l.fail(err)
	}
	// The payload must be stable before a header names it: otherwise a cut could leave a record that is not there.
	if err := l.flush(); err != nil {
		return err
	}
	// The record must be stable before the caller writes what it speaks of.
	return l.put(h, true)
}

// Advance records that block i is about to be written and that those before it are on stable storage, with the digest of
// the new content, and returns when that is stable. A record of one block needs no Advance. The state never goes back:
// i is at least the index so far and below the number of blocks, or ErrRecord is returned and nothing is written.
// It returns ErrIdle when nothing is pending and ErrFailed after an earlier failure.
func (l *Log) Advance(i int, digest [32]byte) error {
	if err := l.advance(i, digest); err != nil {
		return fmt.Errorf("cannot advance journal to block %d: %w", i, err)
	}
	return nil
}

func (l *Log) advance(i int, digest [32]byte) error {
	if l.failed != nil {
		return fmt.Errorf("%w: %w", ErrFailed, l.failed)
	}
	if l.head.State == Idle {
		return l.outdated(ErrIdle)
	}
	if i < int(l.head.Index) || i >= int(l.head.Blocks) {
		return fmt.Errorf("%w: expected %d to %d", ErrRecord, l.head.Index, l.head.Blocks-1)
	}
	if l.head.State == Committing && l.head.Index == uint32(i) && l.head.Digest == digest {
		// Already so, but perhaps only in a cache: recovery comes here with what Open read.
		return l.flush()
	}
	h := l.head
	h.State, h.Index, h.Digest = Committing, uint32(i), digest
	return l.put(h, true)
}

// outdated adds to the refusal of a call that the state does not allow why the state may be older than the caller's.
func (l *Log) outdated(err error) error {
	if l.damaged == nil {
		return err
	}
	return fmt.Errorf("%w (%w)", err, l.damaged)
}

// Done records that nothing is pending any more: the record is finished, rolled back or abandoned. It does not flush;
// the caller does, together with what else belongs to that epoch. Everything that recovery would still do for the record
// must be stable before Done, or be repeatable without it. When nothing is pending it writes nothing.
func (l *Log) Done() error {
	if l.failed != nil {
		return fmt.Errorf("cannot finish journal record: %w: %w", ErrFailed, l.failed)
	}
	if l.head.State == Idle {
		return nil
	}
	h := Header{State: Idle, ID: l.head.ID, Seq: l.head.Seq, Binding: l.head.Binding, Size: l.head.Size, Creation: l.head.Creation}
	if err := l.put(h, false); err != nil {
		return fmt.Errorf("cannot finish journal record: %w", err)
	}
	return nil
}

// put writes h with the next sequence over the slot that does not count, so that the one that counts survives whatever
// happens to this write, and flushes if told to. h counts from then on.
func (l *Log) put(h Header, flush bool) error {
	if h.Seq = max(h.Seq, l.head.Seq+1); h.Seq > maxSequence {
		return fmt.Errorf("%w: sequence 0x%x is the last", ErrTooLarge, l.head.Seq)
	}
	slot := int64(SlotA)
	if l.slot == SlotA {
		slot = SlotB
	}
	b := make([]byte, l.unit)
	h.encode(b)
	if _, err := l.dev.WriteAt(b, slot); err != nil {
		return l.fail(err)
	}
	if flush {
		if err := l.flush(); err != nil {
			return err
		}
	}
	l.head, l.slot, l.damaged = h, slot, nil
	return nil
}

func (l *Log) flush() error {
	if err := l.dev.Flush(); err != nil {
		return l.fail(err)
	}
	return nil
}

func (l *Log) fail(err error) error {
	l.failed = err
	return err
}
