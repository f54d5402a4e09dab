package blockdev

import "fmt"

// readOnly refuses writes.
type readOnly struct{ Device }

// NewReadOnly returns d without the right to write: WriteAt returns ErrReadOnly, Flush does nothing.
func NewReadOnly(d Device) Device { return readOnly{d} }

func (r readOnly) WriteAt(p []byte, off int64) (int, error) {
	return 0, fmt.Errorf("cannot write %d bytes at offset 0x%x: %w", len(p), off, ErrReadOnly)
}

func (r readOnly) Flush() error { return nil }
