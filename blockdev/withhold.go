package blockdev

import (
	"fmt"
	"sync"
)

// Withheld is a device whose first sector stays in memory until Release. A filesystem is known by its first sector, so
// what is made through a Withheld does not exist before its last write.
type Withheld struct {
	Device
	mu       sync.RWMutex
	first    []byte // what readers see of the first sector
	released bool
}

// Withhold returns d without its first sector, which reads as zeros until it is written, whatever d holds there: the
// caller has cleared it. The sector is the logical one, which a device writes at once; a volume with larger sectors has
// its whole boot record in the first 512 bytes.
func Withhold(d Device) (*Withheld, error) {
	n := d.SectorSize()
	if int64(n) > d.Size() {
		return nil, fmt.Errorf("cannot withhold the first sector: %w: 0x%x bytes of 0x%x", ErrOutOfRange, n, d.Size())
	}
	return &Withheld{Device: d, first: make([]byte, n)}, nil
}

// ReadAt implements Device. A read that lies inside the first sector does not go to the device.
func (w *Withheld) ReadAt(p []byte, off int64) (int, error) {
	if err := CheckRange(off, len(p), w.Size()); err != nil {
		return 0, err
	}
	w.mu.RLock()
	defer w.mu.RUnlock()
	n := 0
	if off < int64(len(w.first)) {
		n = copy(p, w.first[off:])
	}
	if n == len(p) {
		return n, nil
	}
	m, err := w.Device.ReadAt(p[n:], off+int64(n))
	return n + m, err
}

// WriteAt implements Device. After Release it writes through.
func (w *Withheld) WriteAt(p []byte, off int64) (int, error) {
	if err := CheckRange(off, len(p), w.Size()); err != nil {
		return 0, err
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.released {
		n, err := w.Device.WriteAt(p, off)
		if off < int64(len(w.first)) {
			copy(w.first[off:], p[:n])
		}
		return n, err
	}
	n := 0
	if off < int64(len(w.first)) {
		n = copy(w.first[off:], p)
	}
	if n == len(p) {
		return n, nil
	}
	m, err := w.Device.WriteAt(p[n:], off+int64(n))
	return n + m, err
}

// Release writes the first sector. A second call does nothing.
func (w *Withheld) Release() error {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.released {
		return nil
	}
	// Barrier: whoever sees the first sector must find all that it leads to.
	if err := w.Device.Flush(); err != nil {
		return fmt.Errorf("cannot flush what the first sector leads to: %w", err)
	}
	if _, err := w.Device.WriteAt(w.first, 0); err != nil {
		return fmt.Errorf("cannot write the first sector: %w", err)
	}
	// Barrier: the caller may rely on it from here on.
	if err := w.Device.Flush(); err != nil {
		return fmt.Errorf("cannot flush the first sector: %w", err)
	}
	w.released = true
	return nil
}
