package blockdev

import (
	"bytes"
	"errors"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

// image makes a file of the given size with recognisable content.
func image(t *testing.T, size int) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "disk.img")
	data := make([]byte, size)
	for i := range data {
		data[i] = byte(i * 7)
	}
	if err := os.WriteFile(path, data, 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

func mustOpen(t *testing.T, path string, mode Mode, opts ...Option) *Disk {
	t.Helper()
	d, err := Open(path, mode, opts...)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = d.Close() })
	return d
}

func wantErr(t *testing.T, err, want error) {
	t.Helper()
	if !errors.Is(err, want) {
		t.Fatalf("error is %v, want %v", err, want)
	}
}

func TestImageReadWrite(t *testing.T) {
	path := image(t, 3<<20+512)
	d := mustOpen(t, path, ReadWrite)
	if d.Size() != 3<<20+512 || d.SectorSize() != 512 || d.PhysicalSectorSize() != 512 || d.IsBlock() || d.Path() != path || d.Mode() != ReadWrite {
		t.Fatalf("geometry %d %d %d %v %s", d.Size(), d.SectorSize(), d.PhysicalSectorSize(), d.IsBlock(), d.Path())
	}
	// More than one transfer, across their border, and up to the very end.
	data := bytes.Repeat([]byte("espmirror"), 3<<20/9)
	off := d.Size() - int64(len(data))
	if n, err := d.WriteAt(data, off); n != len(data) || err != nil {
		t.Fatal(n, err)
	}
	if err := d.Flush(); err != nil {
		t.Fatal(err)
	}
	if err := d.Invalidate(); err != nil {
		t.Fatal(err)
	}
	got := make([]byte, len(data))
	if n, err := d.ReadAt(got, off); n != len(got) || err != nil || !bytes.Equal(got, data) {
		t.Fatal(n, err)
	}
	if n, err := d.ReadAt(nil, d.Size()); n != 0 || err != nil {
		t.Fatal(n, err)
	}
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
	if err := d.Close(); err != nil {
		t.Fatal("second close:", err)
	}
	if _, err := d.ReadAt(got[:1], 0); err == nil {
		t.Fatal("read after close")
	}
}

func TestBounds(t *testing.T) {
	path := image(t, 8192)
	d := mustOpen(t, path, ReadWrite)
	before, _ := os.ReadFile(path)
	for _, c := range []struct {
		off int64
		n   int
	}{{-1, 1}, {8192, 1}, {8191, 2}, {0, 8193}, {1 << 62, 1}, {-1 << 63, 512}} {
		if n, err := d.ReadAt(make([]byte, c.n), c.off); n != 0 || !errors.Is(err, ErrOutOfRange) {
			t.Errorf("read %v: %d %v", c, n, err)
		}
		if n, err := d.WriteAt(make([]byte, c.n), c.off); n != 0 || !errors.Is(err, ErrOutOfRange) {
			t.Errorf("write %v: %d %v", c, n, err)
		}
	}
	if after, _ := os.ReadFile(path); !bytes.Equal(before, after) {
		t.Error("a write out of range changed the file")
	}
}

func TestReadOnlyDisk(t *testing.T) {
	d := mustOpen(t, image(t, 4096), ReadOnly)
	_, err := d.WriteAt(make([]byte, 512), 0)
	wantErr(t, err, ErrReadOnly)
	if err := d.Flush(); err != nil {
		t.Error(err)
	}
}

func TestOpenRefuses(t *testing.T) {
	dir := t.TempDir()
	fifo := filepath.Join(dir, "fifo")
	if err := unix.Mkfifo(fifo, 0o600); err != nil {
		t.Fatal(err)
	}
	for path, want := range map[string]error{
		dir:                           ErrNotDevice,
		fifo:                          ErrNotDevice,
		"/dev/null":                   ErrNotDevice,
		filepath.Join(dir, "missing"): fs.ErrNotExist,
	} {
		for _, mode := range []Mode{ReadOnly, ReadWrite} {
			_, err := Open(path, mode)
			wantErr(t, err, want)
			if !strings.HasPrefix(err.Error(), "cannot open "+path+": ") {
				t.Error(err)
			}
		}
	}
	for _, size := range []int{0, 256, 513, 8192} {
		if _, err := Open(image(t, 512), ReadOnly, WithSectorSize(size)); err == nil {
			t.Errorf("sector size %d accepted", size)
		}
	}
	_, err := Open(image(t, 512), ReadWrite, WithClaim(-1, 5))
	wantErr(t, err, ErrOutOfRange)
}

func TestSectorSizeOption(t *testing.T) {
	d := mustOpen(t, image(t, 8192), ReadOnly, WithSectorSize(4096))
	if d.SectorSize() != 4096 || d.PhysicalSectorSize() != 4096 {
		t.Error(d.SectorSize(), d.PhysicalSectorSize())
	}
}

func TestIDIsTheStorageNotThePath(t *testing.T) {
	path := image(t, 512)
	link, hard := path+".link", path+".hard"
	if err := errors.Join(os.Symlink(path, link), os.Link(path, hard)); err != nil {
		t.Fatal(err)
	}
	a, err1 := Identify(path)
	b, err2 := Identify(link)
	c, err3 := Identify(hard)
	other, err4 := Identify(image(t, 512))
	if err := errors.Join(err1, err2, err3, err4); err != nil {
		t.Fatal(err)
	}
	if a != b || a != c || a == other {
		t.Error(a, b, c, other)
	}
	if got := mustOpen(t, link, ReadOnly).ID(); got != a {
		t.Error(got, a)
	}
}

// TestClaims: within one process the parts of one image exclude each other only where they overlap.
func TestClaims(t *testing.T) {
	path := image(t, 8192)
	probe := mustOpen(t, path, ReadOnly)
	esp := mustOpen(t, path, ReadWrite, WithClaim(0, 4096))
	xbootldr := mustOpen(t, path, ReadWrite, WithClaim(4096, 4096))
	_, err := Open(path, ReadWrite, WithClaim(4095, 1))
	wantErr(t, err, ErrBusy)
	_, err = Open(path, ReadWrite)
	wantErr(t, err, ErrBusy)
	for _, d := range []*Disk{esp, probe} {
		if err := d.Close(); err != nil {
			t.Fatal(err)
		}
	}
	mustOpen(t, path, ReadWrite, WithClaim(0, 4096))
	// The lock is the process's, and is still held against others.
	if out := flockOutside(t, path, "-x"); out {
		t.Error("another process got the lock although a writer is left")
	}
	_ = xbootldr
}

// flockOutside says whether another process can lock the file.
func flockOutside(t *testing.T, path, how string) bool {
	t.Helper()
	tool, err := exec.LookPath("flock")
	if err != nil {
		t.Skip("flock is not installed")
	}
	return exec.Command(tool, "-n", how, path, "true").Run() == nil
}

func TestImageLocks(t *testing.T) {
	path := image(t, 4096)
	r := mustOpen(t, path, ReadOnly)
	if !flockOutside(t, path, "-s") || flockOutside(t, path, "-x") {
		t.Error("a reader must take the shared lock")
	}
	w := mustOpen(t, path, ReadWrite)
	if flockOutside(t, path, "-s") {
		t.Error("a writer must take the exclusive lock, also after a reader")
	}
	_ = w.Close()
	_ = r.Close()
	if !flockOutside(t, path, "-x") {
		t.Error("the lock stays after the last close")
	}
}

// TestImageLockedByOther stands for another process with a descriptor of its own, which flock takes for one.
func TestImageLockedByOther(t *testing.T) {
	path := image(t, 4096)
	other, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer other.Close()
	lock := func(how int) {
		t.Helper()
		if err := unix.Flock(int(other.Fd()), how); err != nil {
			t.Fatal(err)
		}
	}
	lock(unix.LOCK_EX)
	for _, mode := range []Mode{ReadOnly, ReadWrite} {
		_, err := Open(path, mode)
		wantErr(t, err, ErrBusy)
		var busy *BusyError
		if !errors.As(err, &busy) || len(busy.By) == 0 {
			t.Errorf("nobody is named in %v", err)
		}
	}
	lock(unix.LOCK_SH)
	r := mustOpen(t, path, ReadOnly)
	_, err = Open(path, ReadWrite)
	wantErr(t, err, ErrBusy)
	// The failed upgrade must leave our shared lock in place.
	if err := unix.Flock(int(other.Fd()), unix.LOCK_EX|unix.LOCK_NB); !errors.Is(err, unix.EWOULDBLOCK) {
		t.Error("the reader's lock was lost:", err)
	}
	// A failed upgrade by the other side loses its own lock, so that a writer may come now.
	lock(unix.LOCK_UN)
	mustOpen(t, path, ReadWrite)
	_ = r
}

// fakeIO is the far side of a Disk: it answers call by call.
type fakeIO struct {
	steps []step
	calls []call
}

type step struct {
	n   int // -1: all
	err error
}

type call struct {
	off int64
	n   int
}

func (f *fakeIO) do(p []byte, off int64) (int, error) {
	f.calls = append(f.calls, call{off, len(p)})
	if len(f.steps) == 0 {
		return len(p), nil
	}
	s := f.steps[0]
	f.steps = f.steps[1:]
	if s.n < 0 {
		s.n = len(p)
	}
	return s.n, s.err
}
func (f *fakeIO) ReadAt(p []byte, off int64) (int, error)  { return f.do(p, off) }
func (f *fakeIO) WriteAt(p []byte, off int64) (int, error) { return f.do(p, off) }

func TestTransferFaults(t *testing.T) {
	eio := &fs.PathError{Op: "x", Path: "y", Err: syscall.EIO}
	for name, c := range map[string]struct {
		steps       []step
		n           int
		read, write error
	}{
		"whole":              {nil, 1000, nil, nil},
		"short, goes on":     {[]step{{n: 300}, {n: 200}}, 1000, nil, nil},
		"interrupted":        {[]step{{0, syscall.EINTR}, {100, syscall.EINTR}}, 1000, nil, nil},
		"fails":              {[]step{{0, eio}}, 0, syscall.EIO, syscall.EIO},
		"fails in the midst": {[]step{{n: 300}, {20, eio}}, 320, syscall.EIO, syscall.EIO},
		"no progress":        {[]step{{n: 300}, {n: 0}}, 300, io.ErrUnexpectedEOF, ErrShortWrite},
		"cut":                {[]step{{300, io.EOF}}, 300, io.ErrUnexpectedEOF, io.EOF},
		"negative count":     {[]step{{0, nil}}, 0, io.ErrUnexpectedEOF, ErrShortWrite},
		"full disk":          {[]step{{0, syscall.ENOSPC}}, 0, syscall.ENOSPC, syscall.ENOSPC},
	} {
		t.Run(name, func(t *testing.T) {
			r := &fakeIO{steps: slices.Clone(c.steps)}
			w := &fakeIO{steps: slices.Clone(c.steps)}
			d := &Disk{path: "d", size: 4096, r: r, w: w}
			p := make([]byte, 1000)
			if n, err := d.ReadAt(p, 64); n != c.n || !errors.Is(err, c.read) {
				t.Errorf("read: %d %v", n, err)
			}
			if n, err := d.WriteAt(p, 64); n != c.n || !errors.Is(err, c.write) {
				t.Errorf("write: %d %v", n, err)
			}
			for i, at := 0, int64(64); i < len(w.calls); i++ {
				if w.calls[i].off != at || r.calls[i].off != at {
					t.Errorf("call %d at %d, want %d", i, w.calls[i].off, at)
				}
				if i < len(c.steps) {
					at += int64(c.steps[i].n)
				}
			}
		})
	}
	// The end of the file reported with the last byte is no error.
	d := &Disk{path: "d", size: 4096, r: &fakeIO{steps: []step{{-1, io.EOF}}}}
	if n, err := d.ReadAt(make([]byte, 512), 0); n != 512 || err != nil {
		t.Error(n, err)
	}
}

func TestBigTransfersAreCut(t *testing.T) {
	w := &fakeIO{}
	d := &Disk{path: "d", size: 1 << 30, r: w, w: w}
	if _, err := d.WriteAt(make([]byte, 2*maxTransfer+5), 3); err != nil {
		t.Fatal(err)
	}
	want := []call{{3, maxTransfer}, {3 + maxTransfer, maxTransfer}, {3 + 2*maxTransfer, 5}}
	if !slices.Equal(w.calls, want) {
		t.Error(w.calls)
	}
}

func TestFailedFlushIsFinal(t *testing.T) {
	calls := 0
	w := &fakeIO{}
	d := &Disk{path: "d", size: 4096, r: w, w: w, sync: func() error {
		calls++
		if calls == 2 {
			return syscall.EIO
		}
		return nil
	}}
	if err := d.Flush(); err != nil {
		t.Fatal(err)
	}
	wantErr(t, d.Flush(), syscall.EIO)
	for range 2 {
		wantErr(t, d.Flush(), ErrFlushFailed)
		_, err := d.WriteAt(make([]byte, 512), 0)
		wantErr(t, err, ErrFlushFailed)
	}
	if calls != 2 || len(w.calls) != 0 {
		t.Error("the device was touched after a failed flush:", calls, w.calls)
	}
	if _, err := d.ReadAt(make([]byte, 512), 0); err != nil {
		t.Error("reading must still work:", err)
	}
}

func TestFailedWriteIsNotFinal(t *testing.T) {
	w := &fakeIO{steps: []step{{0, syscall.EIO}}}
	d := &Disk{path: "d", size: 4096, w: w, sync: func() error { return nil }}
	_, err := d.WriteAt(make([]byte, 512), 0)
	wantErr(t, err, syscall.EIO)
	if _, err := d.WriteAt(make([]byte, 512), 0); err != nil {
		t.Error(err)
	}
	if err := d.Flush(); err != nil {
		t.Error(err)
	}
}

func TestInvalidateAndCloseFaults(t *testing.T) {
	d := &Disk{path: "d", drop: func() error { return syscall.EIO }, close: func() error { return syscall.ENOSPC }}
	wantErr(t, d.Invalidate(), syscall.EIO)
	wantErr(t, d.Close(), syscall.ENOSPC)
}

func TestRetryInterrupted(t *testing.T) {
	n := 0
	err := retryInterrupted(func() error {
		if n++; n < 3 {
			return syscall.EINTR
		}
		return syscall.EIO
	})
	if n != 3 || !errors.Is(err, syscall.EIO) {
		t.Error(n, err)
	}
}

func TestTruncatedUnderneath(t *testing.T) {
	path := image(t, 8192)
	d := mustOpen(t, path, ReadOnly)
	if err := os.Truncate(path, 5000); err != nil {
		t.Fatal(err)
	}
	n, err := d.ReadAt(make([]byte, 4096), 4096)
	if n != 5000-4096 {
		t.Error(n)
	}
	wantErr(t, err, io.ErrUnexpectedEOF)
}

func TestReadOnlyFile(t *testing.T) {
	path := image(t, 4096)
	if err := os.Chmod(path, 0o400); err != nil {
		t.Fatal(err)
	}
	if os.Geteuid() == 0 {
		t.Skip("root may write to a file of mode 0400")
	}
	_, err := Open(path, ReadWrite)
	wantErr(t, err, fs.ErrPermission)
}

// TestClaimsInParallel: nobody may rely on a lock that another open is still trying, and one range has one writer.
func TestClaimsInParallel(t *testing.T) {
	path := image(t, 64<<10)
	var wg sync.WaitGroup
	var open [16]atomic.Int32
	for g := range 8 {
		wg.Go(func() {
			for i := range 200 {
				k := (g + i) % len(open)
				d, err := Open(path, ReadWrite, WithClaim(int64(k)*4096, 4096))
				if errors.Is(err, ErrBusy) {
					continue
				}
				if err != nil {
					t.Error(err)
					return
				}
				if open[k].Add(1) != 1 {
					t.Error("two writers of one range")
				}
				open[k].Add(-1)
				_ = d.Close()
			}
		})
	}
	wg.Wait()
	claims.mu.Lock()
	defer claims.mu.Unlock()
	id, _ := Identify(path)
	if claims.disks[id] != nil {
		t.Error("a claim was left behind")
	}
}

func TestErrorTexts(t *testing.T) {
	if s := (ID{Block: true, Dev: DevNum{8, 1}}).String(); s != "block device 8:1" {
		t.Error(s)
	}
	if s := (ID{Dev: DevNum{8, 1}, Inode: 7}).String(); s != "inode 7 on 8:1" {
		t.Error(s)
	}
	short := &ShortWriteError{N: 3, Err: syscall.EIO}
	if short.Error() != "only 3 bytes written: input/output error" {
		t.Error(short)
	}
}
