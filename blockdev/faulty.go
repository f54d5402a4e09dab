package blockdev

import (
	"errors"
	"fmt"
	"sync"
)

// Faulty fails where it is told to, and otherwise passes on.
type Faulty struct {
	Device
	fail        func(Op) error
	mu          sync.Mutex
	flushFailed bool
}

// ShortWriteError, returned by the predicate of a Faulty for a write, lets the first N bytes through before the write
// fails with Err.
type ShortWriteError struct {
	N   int
	Err error
}

// Error implements error.
func (e *ShortWriteError) Error() string { return fmt.Sprintf("only %d bytes written: %v", e.N, e.Err) }

// Unwrap implements the errors package's convention.
func (e *ShortWriteError) Unwrap() error { return e.Err }

// NewFaulty returns d with faults: fail is asked before every operation, one at a time, and the error that it returns
// is the outcome instead. A failed flush, injected or real, is as final as that of a Disk.
func NewFaulty(d Device, fail func(Op) error) *Faulty { return &Faulty{Device: d, fail: fail} }

// ask runs the predicate.
func (f *Faulty) ask(op Op) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.flushFailed && (op.Kind == OpWrite || op.Kind == OpFlush) {
		return fmt.Errorf("cannot %s: %w", op.Kind, ErrFlushFailed)
	}
	err := f.fail(op)
	if err != nil && op.Kind == OpFlush {
		f.flushFailed = true
	}
	return err
}

// ReadAt implements Device.
func (f *Faulty) ReadAt(p []byte, off int64) (int, error) {
	if err := CheckRange(off, len(p), f.Size()); err != nil {
		return 0, err
	}
	if err := f.ask(Op{Kind: OpRead, Off: off, Data: p}); err != nil {
		return 0, err
	}
	return f.Device.ReadAt(p, off)
}

// WriteAt implements Device.
func (f *Faulty) WriteAt(p []byte, off int64) (int, error) {
	if err := CheckRange(off, len(p), f.Size()); err != nil {
		return 0, err
	}
	err := f.ask(Op{Kind: OpWrite, Off: off, Data: p})
	if err == nil {
		return f.Device.WriteAt(p, off)
	}
	var short *ShortWriteError
	if !errors.As(err, &short) {
		return 0, err
	}
	n, below := f.Device.WriteAt(p[:min(max(short.N, 0), len(p))], off)
	if below != nil {
		return n, below
	}
	return n, err
}

// Flush implements Device.
func (f *Faulty) Flush() error {
	if err := f.ask(Op{Kind: OpFlush}); err != nil {
		return err
	}
	err := f.Device.Flush()
	if err != nil {
		f.mu.Lock()
		f.flushFailed = true
		f.mu.Unlock()
	}
	return err
}

// Invalidate implements Device.
func (f *Faulty) Invalidate() error {
	if err := f.ask(Op{Kind: OpInvalidate}); err != nil {
		return err
	}
	return f.Device.Invalidate()
}
