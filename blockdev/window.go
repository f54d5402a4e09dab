package blockdev

import "fmt"

// window is a bounded part of another device.
type window struct {
	Device
	off, size int64
}

// Window returns the part [off, off+size) of d as a device of its own: nothing outside it can be read or written
// through the result. It returns ErrOutOfRange when the part is not inside d.
func Window(d Device, off, size int64) (Device, error) {
	if off < 0 || size < 0 || off > d.Size() || size > d.Size()-off {
		return nil, fmt.Errorf("cannot open window of 0x%x bytes at offset 0x%x: %w of 0x%x bytes", size, off, ErrOutOfRange, d.Size())
	}
	return &window{Device: d, off: off, size: size}, nil
}

func (w *window) Size() int64 { return w.size }

func (w *window) ReadAt(p []byte, off int64) (int, error) {
	if err := CheckRange(off, len(p), w.size); err != nil {
		return 0, err
	}
	return w.Device.ReadAt(p, w.off+off)
}

func (w *window) WriteAt(p []byte, off int64) (int, error) {
	if err := CheckRange(off, len(p), w.size); err != nil {
		return 0, err
	}
	return w.Device.WriteAt(p, w.off+off)
}
