package blockdev

import (
	"fmt"
	"maps"
	"sync"
)

// overlayPage is the unit of copying, in bytes: a page of the system's own cache.
const overlayPage = 4096

// Overlay is a device whose writes stay in memory: reads see them, the device below does not. A dry run is the real run
// on an Overlay.
type Overlay struct {
	below   Device
	mu      sync.RWMutex
	pages   map[int64][]byte // by offset / overlayPage
	holes   map[int64]bool   // offsets of sectors of these pages that could not be copied and are not written
	written int64
}

// NewOverlay returns an overlay over d.
func NewOverlay(d Device) *Overlay {
	return &Overlay{below: d, pages: map[int64][]byte{}, holes: map[int64]bool{}}
}

// Written returns the number of bytes passed to WriteAt so far; a byte written twice counts twice.
func (o *Overlay) Written() int64 {
	o.mu.RLock()
	defer o.mu.RUnlock()
	return o.written
}

// Size implements Device.
func (o *Overlay) Size() int64 { return o.below.Size() }

// SectorSize implements Device.
func (o *Overlay) SectorSize() int { return o.below.SectorSize() }

// PhysicalSectorSize implements Device.
func (o *Overlay) PhysicalSectorSize() int { return o.below.PhysicalSectorSize() }

// Flush implements Device; there is nothing to make stable.
func (o *Overlay) Flush() error { return nil }

// Invalidate implements Device. The writes are not a cache, and stay.
func (o *Overlay) Invalidate() error { return o.below.Invalidate() }

// ReadAt implements Device. A failed read reports no bytes: what it left in p is a mixture.
func (o *Overlay) ReadAt(p []byte, off int64) (int, error) {
	if err := CheckRange(off, len(p), o.Size()); err != nil {
		return 0, err
	}
	o.mu.RLock()
	defer o.mu.RUnlock()
	// Runs of pages that were never written are read in one go. A page that was written is not read from below, where
	// it may be unreadable.
	for at := 0; at < len(p); {
		page := (off + int64(at)) / overlayPage
		in := int((off + int64(at)) % overlayPage)
		if own, ok := o.pages[page]; ok {
			n := copy(p[at:], own[in:])
			if err := o.readHoles(p[at:at+n], off+int64(at)); err != nil {
				return 0, err
			}
			at += n
			continue
		}
		end := at + overlayPage - in
		for next := page + 1; end < len(p); next++ {
			if _, ok := o.pages[next]; ok {
				break
			}
			end += overlayPage
		}
		end = min(end, len(p))
		if _, err := o.below.ReadAt(p[at:end], off+int64(at)); err != nil {
			return 0, err
		}
		at = end
	}
	return len(p), nil
}

// WriteAt implements Device. It fails only when it is out of range, or when a sector that p covers in part cannot be read
// from below; then nothing of p is visible.
func (o *Overlay) WriteAt(p []byte, off int64) (int, error) {
	if err := CheckRange(off, len(p), o.Size()); err != nil {
		return 0, err
	}
	if len(p) == 0 {
		return 0, nil
	}
	o.mu.Lock()
	defer o.mu.Unlock()
	first, last := off/overlayPage, (off+int64(len(p))-1)/overlayPage
	end := off + int64(len(p))
	fresh, holes := map[int64][]byte{}, []int64{}
	for page := first; page <= last; page++ {
		if _, ok := o.pages[page]; ok {
			continue
		}
		start := page * overlayPage
		own := make([]byte, min(overlayPage, o.Size()-start))
		if start < off || start+int64(len(own)) > off+int64(len(p)) {
			bad, err := o.copyUp(own, start, off, end)
			if err != nil {
				return 0, fmt.Errorf("cannot copy page at offset 0x%x: %w", start, err)
			}
			holes = append(holes, bad...)
		}
		fresh[page] = own
	}
	unit := int64(o.SectorSize())
	whole := func(hole int64) bool { return hole >= off && hole+unit <= end }
	for hole := range o.holes {
		if hole+unit > off && hole < end && !whole(hole) {
			return 0, fmt.Errorf("cannot write a part of the sector at offset 0x%x: it cannot be read", hole)
		}
	}
	maps.DeleteFunc(o.holes, func(hole int64, _ bool) bool { return whole(hole) })
	for page, own := range fresh {
		o.pages[page] = own
	}
	for _, hole := range holes {
		o.holes[hole] = true
	}
	for done := 0; done < len(p); {
		at := off + int64(done)
		done += copy(o.pages[at/overlayPage][at%overlayPage:], p[done:])
	}
	o.written += int64(len(p))
	return len(p), nil
}

// copyUp reads the page at start, of which [from, to) is about to be written. Where it cannot be read as a whole, the
// sectors that will be written over need not be read: a dry run of a repair is to succeed as the repair would. It returns
// the offsets of those beside them that cannot be read.
func (o *Overlay) copyUp(own []byte, start, from, to int64) (holes []int64, err error) {
	unit := o.SectorSize()
	if _, err = o.below.ReadAt(own, start); err == nil || unit <= 0 {
		return nil, err
	}
	for at := 0; at < len(own); at += unit {
		part, off := own[at:min(at+unit, len(own))], start+int64(at)
		if off >= from && off+int64(len(part)) <= to {
			continue
		}
		if _, err := o.below.ReadAt(part, off); err != nil {
			if off < to && off+int64(len(part)) > from {
				return nil, err
			}
			holes = append(holes, off)
		}
	}
	return holes, nil
}

// readHoles reads from below what of [off, off+len(p)) could not be copied, to fail as that does.
func (o *Overlay) readHoles(p []byte, off int64) error {
	unit := int64(o.SectorSize())
	for hole := range o.holes {
		if from, to := max(hole, off), min(hole+unit, off+int64(len(p))); from < to {
			if _, err := o.below.ReadAt(p[from-off:to-off], from); err != nil {
				return err
			}
		}
	}
	return nil
}
