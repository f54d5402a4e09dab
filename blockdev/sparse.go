package blockdev

// zeroStep is the unit, in bytes, in which zeros that are there already are left out: the block of most filesystems,
// the least that a hole can be.
const zeroStep = 4096

// sparse is a device that does not write zeros over zeros.
type sparse struct{ Device }

// Sparse returns d without the writes that would only turn the holes of an image file into blocks of zeros: a block of
// zeros is written only where something else is. What d holds afterwards is the same.
func Sparse(d Device) Device { return &sparse{d} }

// WriteAt implements Device.
func (s *sparse) WriteAt(p []byte, off int64) (int, error) {
	if err := CheckRange(off, len(p), s.Size()); err != nil {
		return 0, err
	}
	there := make([]byte, zeroStep)
	from := 0 // what is to be written and was not yet
	for at := 0; at < len(p); {
		end := min(len(p), at+int(zeroStep-(off+int64(at))%zeroStep))
		if part := p[at:end]; Zero(part) {
			old := there[:len(part)]
			if _, err := s.Device.ReadAt(old, off+int64(at)); err == nil && Zero(old) {
				if from < at {
					if n, err := s.Device.WriteAt(p[from:at], off+int64(from)); err != nil {
						return from + n, err
					}
				}
				from = end
			}
		}
		at = end
	}
	if from < len(p) {
		if n, err := s.Device.WriteAt(p[from:], off+int64(from)); err != nil {
			return from + n, err
		}
	}
	return len(p), nil
}

// Zero says whether p holds only zeros.
func Zero(p []byte) bool {
	for len(p) >= 8 {
		if p[0]|p[1]|p[2]|p[3]|p[4]|p[5]|p[6]|p[7] != 0 {
			return false
		}
		p = p[8:]
	}
	for _, b := range p {
		if b != 0 {
			return false
		}
	}
	return true
}

// blank is a device of zeros.
type blank struct {
	size   int64
	sector int
}

// Blank returns a device of size bytes that reads as zeros and cannot be written: what an image file will be that does
// not exist yet. An Overlay over it takes a rehearsal.
func Blank(size int64, sectorSize int) Device { return &blank{size, sectorSize} }

func (b *blank) Size() int64             { return b.size }
func (b *blank) SectorSize() int         { return b.sector }
func (b *blank) PhysicalSectorSize() int { return b.sector }
func (b *blank) Flush() error            { return nil }
func (b *blank) Invalidate() error       { return nil }

func (b *blank) ReadAt(p []byte, off int64) (int, error) {
	if err := CheckRange(off, len(p), b.size); err != nil {
		return 0, err
	}
	clear(p)
	return len(p), nil
}

func (b *blank) WriteAt([]byte, int64) (int, error) { return 0, ErrReadOnly }
