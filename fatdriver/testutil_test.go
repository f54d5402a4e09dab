package fatdriver

import (
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"testing"

	"espmirror/blockdev"
)

// sparseDev is a device in memory that keeps only what is not zero, so that tests can afford volumes of many GiB. It
// also refuses what a disk would: writes that are not whole sectors.
type sparseDev struct {
	mu     sync.RWMutex
	size   int64
	sector int
	pages  map[int64]*[sparsePage]byte

	ops    []string // "write OFF LEN" and "flush", when logged
	logged bool
}

const sparsePage = 4096

func newSparse(size int64, sector int) *sparseDev {
	return &sparseDev{size: size, sector: sector, pages: make(map[int64]*[sparsePage]byte)}
}

func (d *sparseDev) Size() int64             { return d.size }
func (d *sparseDev) SectorSize() int         { return d.sector }
func (d *sparseDev) PhysicalSectorSize() int { return d.sector }
func (d *sparseDev) Invalidate() error       { return nil }

func (d *sparseDev) Flush() error {
	if d.logged {
		d.ops = append(d.ops, "flush")
	}
	return nil
}

func (d *sparseDev) ReadAt(p []byte, off int64) (int, error) {
	if err := blockdev.CheckRange(off, len(p), d.size); err != nil {
		return 0, err
	}
	d.mu.RLock()
	defer d.mu.RUnlock()
	for n := 0; n < len(p); {
		page, in := (off+int64(n))/sparsePage, int((off+int64(n))%sparsePage)
		k := min(sparsePage-in, len(p)-n)
		if b := d.pages[page]; b != nil {
			copy(p[n:n+k], b[in:])
		} else {
			clear(p[n : n+k])
		}
		n += k
	}
	return len(p), nil
}

func (d *sparseDev) WriteAt(p []byte, off int64) (int, error) {
	if err := blockdev.CheckRange(off, len(p), d.size); err != nil {
		return 0, err
	}
	if off%int64(d.sector) != 0 || len(p)%d.sector != 0 {
		return 0, fmt.Errorf("write of %d bytes at 0x%x is not in whole sectors", len(p), off)
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.logged {
		d.ops = append(d.ops, fmt.Sprintf("write 0x%x 0x%x", off, len(p)))
	}
	for n := 0; n < len(p); {
		page, in := (off+int64(n))/sparsePage, int((off+int64(n))%sparsePage)
		k := min(sparsePage-in, len(p)-n)
		b := d.pages[page]
		if b == nil && len(bytes.TrimLeft(p[n:n+k], "\x00")) > 0 {
			b = new([sparsePage]byte)
			d.pages[page] = b
		}
		if b != nil {
			copy(b[in:], p[n:n+k])
		}
		n += k
	}
	return len(p), nil
}

// poke changes bytes anywhere, as no disk lets one do.
func (d *sparseDev) poke(off int64, p ...byte) {
	s := d.sector
	d.sector = 1
	if _, err := d.WriteAt(p, off); err != nil {
		panic(err)
	}
	d.sector = s
}

// file writes the device to a sparse file.
func (d *sparseDev) file(t testing.TB) string {
	t.Helper()
	name := filepath.Join(t.TempDir(), "volume.img")
	f, err := os.Create(name)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := f.Truncate(d.size); err != nil {
		t.Fatal(err)
	}
	for n, b := range d.pages {
		off := n * sparsePage
		if _, err := f.WriteAt(b[:min(sparsePage, d.size-off)], off); err != nil {
			t.Fatal(err)
		}
	}
	return name
}

// fileDev reads an image file.
type fileDev struct {
	f      *os.File
	size   int64
	sector int
}

func openFileDev(t testing.TB, name string) *fileDev {
	t.Helper()
	f, err := os.Open(name)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	st, err := f.Stat()
	if err != nil {
		t.Fatal(err)
	}
	return &fileDev{f, st.Size(), 512}
}

func (d *fileDev) Size() int64             { return d.size }
func (d *fileDev) SectorSize() int         { return d.sector }
func (d *fileDev) PhysicalSectorSize() int { return d.sector }
func (d *fileDev) Invalidate() error       { return nil }
func (d *fileDev) Flush() error            { return nil }

func (d *fileDev) ReadAt(p []byte, off int64) (int, error) {
	if err := blockdev.CheckRange(off, len(p), d.size); err != nil {
		return 0, err
	}
	return d.f.ReadAt(p, off)
}

func (d *fileDev) WriteAt([]byte, int64) (int, error) { return 0, blockdev.ErrReadOnly }

// toolPath finds a program, "" where it is not installed.
func toolPath(name string) string {
	for _, p := range []string{name, "/usr/sbin/" + name, "/sbin/" + name} {
		if path, err := exec.LookPath(p); err == nil {
			return path
		}
	}
	return ""
}

// tool skips the test, by the tool's name, where the tool is not installed.
func tool(t testing.TB, name string) string {
	t.Helper()
	path := toolPath(name)
	if path == "" {
		t.Skipf("%s is not installed", name)
	}
	return path
}

// mustFormat makes a volume in memory.
func mustFormat(t testing.TB, size int64, o FormatOptions) (*sparseDev, *Volume) {
	t.Helper()
	d := newSparse(size, 512)
	if o.SectorSize != 0 {
		d.sector = o.SectorSize
	}
	if err := Format(d, o); err != nil {
		t.Fatal(err)
	}
	v, err := Open(d)
	if err != nil {
		t.Fatal(err)
	}
	return d, v
}
