package blockdev

import "sync"

// Mem is a device in memory.
type Mem struct {
	mu     sync.RWMutex
	data   []byte
	sector int
}

// NewMem returns a device over data itself, not a copy, with the given logical and physical sector size in bytes.
func NewMem(data []byte, sectorSize int) *Mem { return &Mem{data: data, sector: sectorSize} }

// Bytes returns the memory behind the device.
func (m *Mem) Bytes() []byte { return m.data }

// Size implements Device.
func (m *Mem) Size() int64 { return int64(len(m.data)) }

// SectorSize implements Device.
func (m *Mem) SectorSize() int { return m.sector }

// PhysicalSectorSize implements Device.
func (m *Mem) PhysicalSectorSize() int { return m.sector }

// Flush implements Device; memory is as stable as it gets.
func (m *Mem) Flush() error { return nil }

// Invalidate implements Device.
func (m *Mem) Invalidate() error { return nil }

// ReadAt implements Device.
func (m *Mem) ReadAt(p []byte, off int64) (int, error) {
	m.mu.RLock()
	defer m.mu.RUnlock()
	if err := CheckRange(off, len(p), int64(len(m.data))); err != nil {
		return 0, err
	}
	return copy(p, m.data[off:]), nil
}

// WriteAt implements Device.
func (m *Mem) WriteAt(p []byte, off int64) (int, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if err := CheckRange(off, len(p), int64(len(m.data))); err != nil {
		return 0, err
	}
	return copy(m.data[off:], p), nil
}
