package blockdev

import "sync/atomic"

// Counts are the operations that reached a device. Bytes are those that were transferred, also by an operation that
// failed half way.
type Counts struct {
	Reads, BytesRead     int64
	Writes, BytesWritten int64
	Flushes              int64
}

// Counting counts what passes through to the device below. It costs two atomic additions an operation and copies nothing.
type Counting struct {
	Device
	reads, bytesRead, writes, bytesWritten, flushes atomic.Int64
}

// NewCounting returns a counting device over d.
func NewCounting(d Device) *Counting { return &Counting{Device: d} }

// Counts returns the numbers so far.
func (c *Counting) Counts() Counts {
	return Counts{Reads: c.reads.Load(), BytesRead: c.bytesRead.Load(), Writes: c.writes.Load(),
		BytesWritten: c.bytesWritten.Load(), Flushes: c.flushes.Load()}
}

// ReadAt implements Device.
func (c *Counting) ReadAt(p []byte, off int64) (int, error) {
	n, err := c.Device.ReadAt(p, off)
	c.reads.Add(1)
	c.bytesRead.Add(int64(n))
	return n, err
}

// WriteAt implements Device.
func (c *Counting) WriteAt(p []byte, off int64) (int, error) {
	n, err := c.Device.WriteAt(p, off)
	c.writes.Add(1)
	c.bytesWritten.Add(int64(n))
	return n, err
}

// Flush implements Device.
func (c *Counting) Flush() error {
	c.flushes.Add(1)
	return c.Device.Flush()
}
