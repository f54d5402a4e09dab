package blockdev

import (
	"fmt"
	"slices"
	"sync"
)

// OpKind is a kind of operation on a device.
type OpKind int

const (
	// OpRead is a ReadAt.
	OpRead OpKind = iota
	// OpWrite is a WriteAt.
	OpWrite
	// OpFlush is a Flush.
	OpFlush
	// OpInvalidate is an Invalidate.
	OpInvalidate
)

// String returns the name of the kind.
func (k OpKind) String() string {
	switch k {
	case OpRead:
		return "read"
	case OpWrite:
		return "write"
	case OpFlush:
		return "flush"
	case OpInvalidate:
		return "invalidate"
	}
	return fmt.Sprintf("OpKind(%d)", int(k))
}

// Op is one operation on a device.
type Op struct {
	Kind OpKind
	Off  int64  // bytes, of a read or write
	Data []byte // of a write; for a read the buffer to be filled, of which only the length means anything
}

// Recorder passes everything on and keeps the writes and flushes, in order.
type Recorder struct {
	Device
	mu  sync.Mutex
	ops []Op
}

// NewRecorder returns a recorder over d.
func NewRecorder(d Device) *Recorder { return &Recorder{Device: d} }

// WriteAt implements Device. A write that fails below is recorded too, for part of it may have reached the medium; one
// that is out of range is not.
func (r *Recorder) WriteAt(p []byte, off int64) (int, error) {
	if err := CheckRange(off, len(p), r.Size()); err != nil {
		return 0, err
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.ops = append(r.ops, Op{Kind: OpWrite, Off: off, Data: slices.Clone(p)})
	return r.Device.WriteAt(p, off)
}

// Flush implements Device. Only a flush that succeeds is recorded: a failed one separates nothing.
func (r *Recorder) Flush() error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if err := r.Device.Flush(); err != nil {
		return err
	}
	r.ops = append(r.ops, Op{Kind: OpFlush})
	return nil
}

// Ops returns the operations so far. Their data is shared with the recorder, and must not be changed.
func (r *Recorder) Ops() []Op {
	r.mu.Lock()
	defer r.mu.Unlock()
	return slices.Clone(r.ops)
}

// Epochs returns the writes so far, split at the flushes, which are left out. The last epoch is the one that no flush has
// closed; it is there even when it is empty. Two flushes in a row leave an empty epoch between them.
func (r *Recorder) Epochs() [][]Op {
	epochs := [][]Op{nil}
	for _, op := range r.Ops() {
		if op.Kind == OpFlush {
			epochs = append(epochs, nil)
			continue
		}
		last := len(epochs) - 1
		epochs[last] = append(epochs[last], op)
	}
	return epochs
}

// Reset forgets the operations so far.
func (r *Recorder) Reset() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.ops = nil
}
