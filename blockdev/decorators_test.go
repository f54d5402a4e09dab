package blockdev

import (
	"bytes"
	"errors"
	"math/rand/v2"
	"slices"
	"syscall"
	"testing"
)

func filled(n int) *Mem {
	b := make([]byte, n)
	for i := range b {
		b[i] = byte(i*7 + i>>8)
	}
	return NewMem(b, 512)
}

func TestWindow(t *testing.T) {
	m := filled(4096)
	before := bytes.Clone(m.Bytes())
	w, err := Window(m, 1024, 2048)
	if err != nil {
		t.Fatal(err)
	}
	got := make([]byte, 2048)
	if n, err := w.ReadAt(got, 0); n != 2048 || err != nil || !bytes.Equal(got, before[1024:3072]) || w.Size() != 2048 || w.SectorSize() != 512 {
		t.Fatal(n, err)
	}
	for _, off := range []int64{-1, 1, 2048, 1 << 62} {
		_, err := w.WriteAt(make([]byte, 2048), off)
		wantErr(t, err, ErrOutOfRange)
		_, err = w.ReadAt(make([]byte, 2048), off)
		wantErr(t, err, ErrOutOfRange)
	}
	if !bytes.Equal(m.Bytes(), before) {
		t.Error("something was written")
	}
	if _, err := w.WriteAt([]byte{1, 2}, 2046); err != nil {
		t.Fatal(err)
	}
	before[3070], before[3071] = 1, 2
	if !bytes.Equal(m.Bytes(), before) {
		t.Error("the write went elsewhere")
	}
	for _, c := range [][2]int64{{-1, 5}, {0, -1}, {0, 4097}, {4096, 1}, {4097, 0}, {1, 1<<63 - 1}} {
		_, err := Window(m, c[0], c[1])
		wantErr(t, err, ErrOutOfRange)
	}
}

func TestNewReadOnly(t *testing.T) {
	m := filled(1024)
	before := bytes.Clone(m.Bytes())
	d := NewReadOnly(m)
	_, err := d.WriteAt([]byte{1}, 0)
	wantErr(t, err, ErrReadOnly)
	if err := d.Flush(); err != nil {
		t.Error(err)
	}
	got := make([]byte, 1024)
	if _, err := d.ReadAt(got, 0); err != nil || !bytes.Equal(got, before) || !bytes.Equal(m.Bytes(), before) {
		t.Error(err)
	}
}

// TestOverlayAgainstMemory compares the overlay with plain memory over random operations, on a size that ends within a
// page.
func TestOverlayAgainstMemory(t *testing.T) {
	below := filled(5*overlayPage + 1536)
	before := bytes.Clone(below.Bytes())
	model := bytes.Clone(before)
	counted := NewCounting(below)
	o := NewOverlay(counted)
	r := rand.New(rand.NewPCG(1, 2))
	var written int64
	for range 2000 {
		off := r.IntN(len(model))
		n := r.IntN(min(len(model)-off, 3*overlayPage) + 1)
		if r.IntN(3) == 0 {
			p := make([]byte, n)
			for i := range p {
				p[i] = byte(r.Uint32())
			}
			if n2, err := o.WriteAt(p, int64(off)); n2 != n || err != nil {
				t.Fatal(n2, err)
			}
			copy(model[off:], p)
			written += int64(n)
			continue
		}
		p := make([]byte, n)
		if n2, err := o.ReadAt(p, int64(off)); n2 != n || err != nil || !bytes.Equal(p, model[off:off+n]) {
			t.Fatalf("read of %d at %d differs: %d %v", n, off, n2, err)
		}
	}
	if err := errors.Join(o.Flush(), o.Invalidate()); err != nil {
		t.Error(err)
	}
	if c := counted.Counts(); !bytes.Equal(below.Bytes(), before) || c.Writes != 0 || c.Flushes != 0 {
		t.Error("the device below was touched")
	}
	if o.Written() != written || o.Size() != below.Size() || o.SectorSize() != 512 || o.PhysicalSectorSize() != 512 {
		t.Error(o.Written(), written)
	}
	_, err := o.WriteAt(make([]byte, 2), o.Size()-1)
	wantErr(t, err, ErrOutOfRange)
	_, err = o.ReadAt(make([]byte, 2), o.Size()-1)
	wantErr(t, err, ErrOutOfRange)
}

func TestOverlayFaults(t *testing.T) {
	below := filled(4 * overlayPage)
	o := NewOverlay(NewFaulty(below, func(op Op) error {
		if op.Kind == OpRead && op.Off <= overlayPage && op.Off+int64(len(op.Data)) > overlayPage {
			return syscall.EIO
		}
		return nil
	}))
	// Whole pages need nothing from below; a part of a page does, and then nothing of the write may be seen.
	n, err := o.WriteAt(make([]byte, overlayPage+1), 0)
	if n != 0 {
		t.Error(n)
	}
	wantErr(t, err, syscall.EIO)
	got := make([]byte, 16)
	if _, err := o.ReadAt(got, 0); err != nil || !bytes.Equal(got, below.Bytes()[:16]) {
		t.Error("a failed write shows:", err)
	}
	_, err = o.ReadAt(make([]byte, overlayPage+1), 0)
	wantErr(t, err, syscall.EIO)
	if _, err := o.WriteAt(make([]byte, overlayPage), overlayPage); err != nil {
		t.Error(err)
	}
	if _, err := o.ReadAt(make([]byte, 3*overlayPage), 0); err != nil {
		t.Error("a page that was written is read from below:", err)
	}

	// One sector cannot be read: the write that would mend it succeeds, one of a part of it does not.
	o = NewOverlay(NewFaulty(below, func(op Op) error {
		if op.Kind == OpRead && op.Off < 1024 && op.Off+int64(len(op.Data)) > 512 {
			return syscall.EIO
		}
		return nil
	}))
	_, err = o.WriteAt(make([]byte, 100), 1000)
	wantErr(t, err, syscall.EIO)
	if _, err = o.WriteAt(below.Bytes()[1024:1536], 1024); err != nil {
		t.Error(err)
	}
	_, err = o.ReadAt(make([]byte, 10), 1020)
	wantErr(t, err, syscall.EIO)
	if _, err := o.WriteAt(make([]byte, 10), 1020); err == nil {
		t.Error("a part of a sector that cannot be read was written")
	}
	if _, err := o.WriteAt(make([]byte, 512), 512); err != nil {
		t.Error(err)
	}
	got = make([]byte, overlayPage)
	want := bytes.Clone(below.Bytes()[:overlayPage])
	clear(want[512:1024])
	if _, err := o.ReadAt(got, 0); err != nil || !bytes.Equal(got, want) {
		t.Error("the rest of the page is not what is below:", err)
	}
}

func TestCounting(t *testing.T) {
	c := NewCounting(filled(4096))
	_, _ = c.ReadAt(make([]byte, 100), 0)
	_, _ = c.ReadAt(make([]byte, 50), 4000)
	_, _ = c.ReadAt(make([]byte, 500), 4000) // out of range: counted, with no bytes
	_, _ = c.WriteAt(make([]byte, 512), 0)
	_ = c.Flush()
	if got, want := c.Counts(), (Counts{3, 150, 1, 512, 1}); got != want {
		t.Errorf("%+v, want %+v", got, want)
	}
	if n := testing.AllocsPerRun(10, func() { _ = c.Flush() }); n != 0 {
		t.Error(n, "allocations")
	}
}

func TestRecorderEpochs(t *testing.T) {
	fail := errors.New("no")
	var failing bool
	m := filled(4096)
	r := NewRecorder(NewFaulty(m, func(op Op) error {
		if failing && op.Kind == OpWrite {
			return &ShortWriteError{N: 1, Err: fail}
		}
		return nil
	}))
	p := []byte{1, 2, 3}
	write := func(off int64) {
		_, _ = r.WriteAt(p, off)
	}
	write(0)
	p[0] = 9 // the recorder must have a copy
	write(8)
	_, _ = r.ReadAt(make([]byte, 3), 0)
	if err := errors.Join(r.Flush(), r.Flush()); err != nil {
		t.Fatal(err)
	}
	failing = true
	write(16)
	_, err := r.WriteAt(p, 4095)
	wantErr(t, err, ErrOutOfRange)

	epochs := r.Epochs()
	if len(epochs) != 3 || len(epochs[0]) != 2 || len(epochs[1]) != 0 || len(epochs[2]) != 1 {
		t.Fatal(epochs)
	}
	if op := epochs[0][0]; op.Kind != OpWrite || op.Off != 0 || !bytes.Equal(op.Data, []byte{1, 2, 3}) {
		t.Error(op)
	}
	if len(r.Ops()) != 5 {
		t.Error(r.Ops())
	}
	r.Reset()
	if e := r.Epochs(); len(r.Ops()) != 0 || len(e) != 1 {
		t.Error(e)
	}
}

func TestRecorderFailedFlush(t *testing.T) {
	r := NewRecorder(NewFaulty(filled(512), func(op Op) error {
		if op.Kind == OpFlush {
			return syscall.EIO
		}
		return nil
	}))
	_, _ = r.WriteAt([]byte{1}, 0)
	wantErr(t, r.Flush(), syscall.EIO)
	if e := r.Epochs(); len(e) != 1 || len(e[0]) != 1 {
		t.Error("a failed flush closed an epoch:", e)
	}
}

func TestFaulty(t *testing.T) {
	m := filled(4096)
	before := bytes.Clone(m.Bytes())
	var seen []OpKind
	var next error
	f := NewFaulty(m, func(op Op) error {
		seen = append(seen, op.Kind)
		err := next
		next = nil
		return err
	})
	for _, kind := range []OpKind{OpRead, OpWrite, OpInvalidate} {
		next = syscall.EIO
		var err error
		switch kind {
		case OpRead:
			_, err = f.ReadAt(make([]byte, 4), 0)
		case OpWrite:
			_, err = f.WriteAt(make([]byte, 4), 0)
		case OpInvalidate:
			err = f.Invalidate()
		}
		wantErr(t, err, syscall.EIO)
	}
	if !bytes.Equal(m.Bytes(), before) {
		t.Error("a failed write wrote")
	}
	next = &ShortWriteError{N: 2, Err: syscall.ENOSPC}
	n, err := f.WriteAt([]byte{0xaa, 0xbb, 0xcc}, 10)
	wantErr(t, err, syscall.ENOSPC)
	if n != 2 || m.Bytes()[10] != 0xaa || m.Bytes()[11] != 0xbb || m.Bytes()[12] != before[12] {
		t.Error("short write:", n)
	}
	for _, n := range []int{-1, 99} {
		next = &ShortWriteError{N: n, Err: syscall.ENOSPC}
		if _, err := f.WriteAt([]byte{1}, 0); !errors.Is(err, syscall.ENOSPC) {
			t.Error(err)
		}
	}
	if err := errors.Join(f.Flush(), f.Invalidate()); err != nil {
		t.Error(err)
	}
	if _, err := f.WriteAt([]byte{1}, 0); err != nil {
		t.Error(err)
	}
	if _, err := f.ReadAt(make([]byte, 1), 5000); !errors.Is(err, ErrOutOfRange) {
		t.Error(err)
	}
	next = syscall.EIO
	wantErr(t, f.Flush(), syscall.EIO)
	wantErr(t, f.Flush(), ErrFlushFailed)
	_, err = f.WriteAt([]byte{1}, 0)
	wantErr(t, err, ErrFlushFailed)
	if want := []OpKind{OpRead, OpWrite, OpInvalidate, OpWrite, OpWrite, OpWrite, OpFlush, OpInvalidate, OpWrite, OpFlush}; !slices.Equal(seen, want) {
		t.Error(seen)
	}
}

// TestFaultyRealFlush: a flush that fails below is as final as an injected one.
func TestFaultyRealFlush(t *testing.T) {
	once := true
	below := NewFaulty(filled(512), func(op Op) error {
		if op.Kind == OpFlush && once {
			once = false
			return syscall.EIO
		}
		return nil
	})
	f := NewFaulty(below, func(Op) error { return nil })
	wantErr(t, f.Flush(), syscall.EIO)
	wantErr(t, f.Flush(), ErrFlushFailed)
}

func TestOpKindString(t *testing.T) {
	for k, want := range map[OpKind]string{OpRead: "read", OpWrite: "write", OpFlush: "flush", OpInvalidate: "invalidate", 9: "OpKind(9)"} {
		if k.String() != want {
			t.Error(k.String(), want)
		}
	}
}
