package replicate

import (
	"fmt"
	"sync/atomic"

	"espmirror/blockdev"
)

// latch makes the first failed flush of a device recognisable as such: its error is ErrFlushFailed too, and nothing is
// handed down after it. Devices promise the latter by themselves; the former is what tells a run that it must not even
// try to roll back, because what the page cache shows is no longer what the medium holds.
type latch struct {
	blockdev.Device
	failed atomic.Bool
}

// Flush implements blockdev.Device.
func (l *latch) Flush() error {
	if l.failed.Load() {
		return fmt.Errorf("cannot flush: %w", blockdev.ErrFlushFailed)
	}
	if err := l.Device.Flush(); err != nil {
		l.failed.Store(true)
		return &flushError{err}
	}
	return nil
}

// WriteAt implements blockdev.Device.
func (l *latch) WriteAt(p []byte, off int64) (int, error) {
	if l.failed.Load() {
		return 0, fmt.Errorf("cannot write: %w", blockdev.ErrFlushFailed)
	}
	return l.Device.WriteAt(p, off)
}

// flushError is the error of a flush, with its own words.
type flushError struct{ err error }

func (e *flushError) Error() string        { return e.err.Error() }
func (e *flushError) Unwrap() error        { return e.err }
func (e *flushError) Is(target error) bool { return target == blockdev.ErrFlushFailed }
