// Package archive takes a tar or cpio archive for the source of a replication, and writes the files of a volume as one.
//
// # Reading
//
// Open tells by content what it has: tar (v7, ustar, GNU, pax), cpio (070701 "newc", 070702 "crc", 070707 "odc"), or one of
// these compressed with gzip or zstd. An archive in a regular file is indexed once, and its members are read where they
// lie. A compressed one, and one from a pipe, is unpacked once into a temporary file without a name, because a run reads a
// file more than once: it is compared, copied, and again for every target that was slower.
//
// What a name means:
//
//   - A leading "/" or "./" is dropped, and so are empty parts and "." between them. A name with the part ".." is refused,
//     with the archive.
//   - Directories that the archive does not have are made; their time is the newest of what is in them.
//   - A later member replaces an earlier one of the same name, as it does when an archive is unpacked. Two directories of
//     one name are one, with the time of the later. One name for a directory and for something else is an error.
//   - A hard link has the content that its target has at that place in the archive.
//   - Global pax headers do not apply; one that is about names or sizes is refused, with the archive.
//   - Several cpio archives one behind the other, as in an initrd, are read as if unpacked one after the other.
//
// What FAT cannot hold is in the tree with an error, which counts when it is selected: symbolic links, devices, names with
// characters that FAT reserves, files of 4 GiB and more. Names that differ in case alone are all in error. The error of a
// directory is that of everything below it.
//
// Owners, extended attributes and modes are dropped; a file that its owner may not write is read-only. Times are taken as
// those of a directory are.
//
// An archive is read to its end when it is opened: one that was cut short, of which a checksum is wrong, or that lacks its
// end mark is refused before anything is written. What stands behind the end mark of a tar is not looked at, as tar does.
//
// # Writing
//
// WriteTar and WriteCPIO give the same bytes for the same files on any machine.
package archive

import (
	"bufio"
	"bytes"
	"compress/gzip"
	"context"
	"errors"
	"fmt"
	"io"
	"os"

	"github.com/klauspost/compress/zstd"
	"golang.org/x/sys/unix"

	"espmirror/replicate"
)

var (
	// ErrDamaged is returned when something is no archive, or is one that was cut short, is damaged, or has a name that leads
	// out of it.
	ErrDamaged = errors.New("the archive cannot be used")
	// ErrTooLarge is returned when an archive has more than the Limits allow.
	ErrTooLarge = errors.New("the archive is too large")
)

// Limits bound what an archive may take, whatever it says of itself. A field that is zero means the default.
type Limits struct {
	Unpacked int64 // bytes in the temporary file, and of sparse files with their holes; 16 GiB
	Members  int   // members, and directories that are made for them; 1,000,000
	Names    int64 // bytes of all paths, each of which is in memory; 256 MiB
}

func (l Limits) orDefault() Limits {
	if l.Unpacked == 0 {
		l.Unpacked = 16 << 30
	}
	if l.Members == 0 {
		l.Members = 1_000_000
	}
	if l.Names == 0 {
		l.Names = 256 << 20
	}
	return l
}

// maxName is the longest name of a member, in bytes: PATH_MAX of Linux, where no file could be unpacked under a longer one.
const maxName = 4096

// maxWindow is how much memory a zstd stream may ask for; the zstd program has the same limit.
const maxWindow = 128 << 20

// headSize is what has to be seen of a file to know what it is.
const headSize = 512

// kind is what a file is by its first bytes.
type kind int

const (
	unknown kind = iota
	tarArchive
	cpioArchive
	gzipStream
	zstdStream
	other // a compressed file or an archive that is not read here
)

// otherKinds are files that somebody may take for something that is read here.
var otherKinds = []struct{ magic, name, unpack string }{
	{"\xFD7zXZ\x00", "compressed with xz", "xz -dc"},
	{"BZh", "compressed with bzip2", "bzip2 -dc"},
	{"\x04\x22\x4D\x18", "compressed with lz4", "lz4 -dc"},
	{"PK\x03\x04", "a zip archive", ""},
	{"\xC7\x71", "an old binary cpio archive", ""}, // 070707 as a 16-bit word, which odc writes in digits
	{"\x71\xC7", "an old binary cpio archive of another byte order", ""},
}

func detect(head []byte) kind {
	switch {
	case bytes.HasPrefix(head, []byte("07070")) && len(head) > 5 && (head[5] == '1' || head[5] == '2' || head[5] == '7'):
		return cpioArchive
	case bytes.HasPrefix(head, []byte{0x1F, 0x8B}): // RFC 1952
		return gzipStream
	case bytes.HasPrefix(head, []byte{0x28, 0xB5, 0x2F, 0xFD}), // RFC 8878
		len(head) > 3 && head[0]&0xF0 == 0x50 && bytes.Equal(head[1:4], []byte{0x2A, 0x4D, 0x18}): // a skippable frame: pzstd begins with one
		return zstdStream
	case isTar(head):
		return tarArchive
	}
	for _, o := range otherKinds {
		if bytes.HasPrefix(head, []byte(o.magic)) {
			return other
		}
	}
	return unknown
}

// notAnArchive says what a file is that is not read here.
func notAnArchive(head []byte, inside string) error {
	if len(head) == 0 {
		return fmt.Errorf("%w: %s is empty", ErrDamaged, inside)
	}
	for _, o := range otherKinds {
		if bytes.HasPrefix(head, []byte(o.magic)) {
			err := fmt.Errorf("%w: %s is %s, and only gzip and zstd, tar and cpio are read here", ErrDamaged, inside, o.name)
			if o.unpack == "" {
				return err
			}
			return &replicate.Hint{Err: err, Text: fmt.Sprintf("unpack it on the way: `%s FILE | espmirror … --primary -`", o.unpack)}
		}
	}
	return fmt.Errorf("%w: %s is neither tar nor cpio", ErrDamaged, inside)
}

// Is says whether a file is an archive by its name, type and first bytes, without looking further: a FIFO is, as nothing
// else can come through one, and a device is not. Compressed files count whatever is in them, and so do archives that Open
// refuses: nothing else can be meant by them. What cannot be opened is none.
func Is(path string) bool {
	info, err := os.Stat(path)
	switch {
	case err != nil:
		return false
	case info.Mode()&os.ModeNamedPipe != 0:
		return true
	case !info.Mode().IsRegular():
		return false
	}
	f, err := os.Open(path)
	if err != nil {
		return false
	}
	defer f.Close()
	head := make([]byte, headSize)
	n, err := io.ReadFull(f, head)
	if err != nil && !errors.Is(err, io.ErrUnexpectedEOF) {
		return false
	}
	return detect(head[:n]) != unknown
}

// source is an open archive.
type source struct {
	name    string
	root    *replicate.Item
	content map[*replicate.Item]*content
	data    *io.SectionReader // the archive itself, unpacked
	file    *os.File          // what data reads
	own     bool              // file is closed with the source
	info    os.FileInfo       // of an archive that lies in a file that others may write to; nil for our own
}

// OpenFile opens the archive in a file.
func OpenFile(ctx context.Context, path string, l Limits) (replicate.Source, error) {
	f, err := openFile(ctx, path)
	if err != nil {
		return nil, err
	}
	src, err := open(ctx, path, f, l)
	if err != nil {
		f.Close()
		return nil, err
	}
	if src.file == f {
		src.own = true
	} else {
		f.Close()
	}
	return src, nil
}

// openFile opens a file for reading. That of a FIFO waits for who writes to it, and the run may end before.
func openFile(ctx context.Context, path string) (*os.File, error) {
	type result struct {
		f   *os.File
		err error
	}
	done := make(chan result, 1)
	go func() {
		f, err := os.Open(path)
		done <- result{f, err}
	}()
	select {
	case res := <-done:
		if res.err != nil {
			return nil, fmt.Errorf("%w: %w", replicate.ErrSource, res.err)
		}
		return res.f, nil
	case <-ctx.Done():
		go func() {
			if res := <-done; res.err == nil {
				res.f.Close()
			}
		}()
		return nil, ctx.Err()
	}
}

// Open takes what r gives for an archive with that name. When r is a regular file it must stay open as long as the source
// is, and is read from where it stands; from anything else all is read before Open returns.
func Open(ctx context.Context, name string, r io.Reader, l Limits) (replicate.Source, error) {
	src, err := open(ctx, name, r, l)
	if err != nil {
		return nil, err
	}
	return src, nil
}

func open(ctx context.Context, name string, r io.Reader, l Limits) (*source, error) {
	s := &source{name: name}
	err := s.open(ctx, r, l.orDefault())
	if err == nil {
		return s, nil
	}
	s.Close()
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	return nil, fmt.Errorf("%w: %s: %w", replicate.ErrSource, name, err)
}

func (s *source) open(ctx context.Context, r io.Reader, l Limits) error {
	k, err := s.locate(ctx, r, l)
	if err != nil {
		return err
	}
	b := newBuilder(ctx, l)
	if k == tarArchive {
		err = b.readTar(s.data)
	} else {
		err = b.readCPIO(s.data)
	}
	if err != nil {
		return err
	}
	s.root, s.content = b.items()
	return nil
}

// locate finds the archive in a regular file, or unpacks it.
func (s *source) locate(ctx context.Context, r io.Reader, l Limits) (kind, error) {
	if f, ok := r.(*os.File); ok {
		info, err := f.Stat()
		if err != nil {
			return unknown, err
		}
		if at, err := f.Seek(0, io.SeekCurrent); err == nil && info.Mode().IsRegular() {
			data := io.NewSectionReader(f, at, max(0, info.Size()-at))
			head, err := headOf(data)
			if err != nil {
				return unknown, err
			}
			if k := detect(head); k == tarArchive || k == cpioArchive {
				s.data, s.file, s.info = data, f, info
				return k, nil
			}
			r = data
		}
	}
	return s.unpack(ctx, r, l)
}

func headOf(r io.ReaderAt) ([]byte, error) {
	head := make([]byte, headSize)
	n, err := r.ReadAt(head, 0)
	if err != nil && err != io.EOF {
		return nil, err
	}
	return head[:n], nil
}

// unpack copies an archive into a temporary file, decompressing it.
func (s *source) unpack(ctx context.Context, r io.Reader, l Limits) (kind, error) {
	type result struct {
		k    kind
		file *os.File
		size int64
		err  error
	}
	done := make(chan result, 1)
	go func() {
		k, f, n, err := spool(ctx, r, l)
		done <- result{k, f, n, err}
	}()
	select {
	case res := <-done:
		if res.err != nil {
			return unknown, res.err
		}
		s.file, s.own, s.data = res.file, true, io.NewSectionReader(res.file, 0, res.size)
		return res.k, nil
	case <-ctx.Done():
		// A pipe that nobody writes to blocks for good. The temporary file goes when something comes, or with the process.
		go func() {
			if res := <-done; res.file != nil {
				res.file.Close()
			}
		}()
		return unknown, ctx.Err()
	}
}

func spool(ctx context.Context, r io.Reader, l Limits) (_ kind, _ *os.File, size int64, err error) {
	in := bufio.NewReaderSize(replicate.ContextReader(ctx, r), 1<<16)
	head, err := in.Peek(headSize)
	if err != nil && err != io.EOF {
		return unknown, nil, 0, err
	}
	k, inside := detect(head), "it"
	out := in
	switch k {
	case gzipStream:
		z, err := newGunzip(in)
		if err != nil {
			return unknown, nil, 0, unpackError(err, 0)
		}
		inside, out = "what is compressed with gzip in it", bufio.NewReaderSize(z, 1<<16)
	case zstdStream:
		// One goroutine: several would hold several windows.
		z, err := zstd.NewReader(in, zstd.WithDecoderConcurrency(1), zstd.WithDecoderLowmem(true), zstd.WithDecoderMaxWindow(maxWindow))
		if err != nil {
			return unknown, nil, 0, unpackError(err, 0)
		}
		defer z.Close()
		inside, out = "what is compressed with zstd in it", bufio.NewReaderSize(z, 1<<16)
	}
	if out != in {
		if head, err = out.Peek(headSize); err != nil && err != io.EOF {
			return unknown, nil, 0, unpackError(err, 0)
		}
		k = detect(head)
	}
	if k != tarArchive && k != cpioArchive {
		return unknown, nil, 0, notAnArchive(head, inside)
	}
	f, err := temporary()
	if err != nil {
		return unknown, nil, 0, fmt.Errorf("cannot make a temporary file: %w", err)
	}
	if size, err = fill(f, out, l.Unpacked); err != nil {
		f.Close()
		return unknown, nil, 0, err
	}
	return k, f, size, nil
}

// temporary makes a file that has no name, or none any more: it goes with the last process that has it open.
func temporary() (*os.File, error) {
	dir := os.TempDir()
	if fd, err := unix.Open(dir, unix.O_TMPFILE|unix.O_RDWR|unix.O_CLOEXEC, 0o600); err == nil {
		return os.NewFile(uintptr(fd), dir+"/(unnamed)"), nil
	}
	return removed(dir) // not every filesystem can do that
}

// removed makes a file and takes its name away.
func removed(dir string) (*os.File, error) {
	f, err := os.CreateTemp(dir, ".espmirror-archive-")
	if err != nil {
		return nil, err
	}
	if err := os.Remove(f.Name()); err != nil {
		f.Close()
		return nil, err
	}
	return f, nil
}

// fill copies r into f. Where the filesystem is full, the rest is counted, so that the error says what would do.
func fill(f io.Writer, r io.Reader, limit int64) (int64, error) {
	buf := make([]byte, 1<<18)
	var size, stored int64
	var full error
	for {
		n, err := r.Read(buf)
		if size += int64(n); size > limit {
			err := fmt.Errorf("%w: unpacked it has more than %d bytes", ErrTooLarge, limit)
			if full != nil {
				err = fmt.Errorf("%w, and %s took %d: %w", err, os.TempDir(), stored, full)
			}
			return 0, &replicate.Hint{Err: err, Text: "unpack it into a directory, and name that as the primary"}
		}
		if full == nil {
			var m int
			if m, full = f.Write(buf[:n]); full != nil && !errors.Is(full, unix.ENOSPC) && !errors.Is(full, unix.EDQUOT) && !errors.Is(full, unix.EFBIG) {
				return 0, fmt.Errorf("cannot write a temporary file: %w", full)
			}
			stored += int64(m)
		}
		if err == io.EOF {
			break
		}
		if err != nil {
			return 0, unpackError(err, size)
		}
	}
	if full != nil {
		err := fmt.Errorf("cannot unpack it into %s: it needs %d bytes, and %d were taken: %w", os.TempDir(), size, stored, cause(full))
		return 0, &replicate.Hint{Err: err, Text: "set TMPDIR to a directory with more room, or unpack it and name the directory as the primary"}
	}
	return size, nil
}

// cause strips what a PathError adds about a file that has no name.
func cause(err error) error {
	var pe *os.PathError
	if errors.As(err, &pe) {
		return pe.Err
	}
	return err
}

// unpackError tells a stream that is broken from one that cannot be read.
func unpackError(err error, at int64) error {
	var pe *os.PathError
	if errors.As(err, &pe) || errors.Is(err, context.Canceled) || errors.Is(err, context.DeadlineExceeded) {
		return err
	}
	switch {
	case errors.Is(err, io.ErrUnexpectedEOF):
		return fmt.Errorf("%w: the compressed data ends too early, %d bytes came out", ErrDamaged, at)
	case errors.Is(err, zstd.ErrWindowSizeExceeded):
		return fmt.Errorf("%w: its zstd window is larger than %d MiB", ErrTooLarge, maxWindow>>20)
	}
	return fmt.Errorf("%w: the compressed data is damaged, %d bytes came out: %w", ErrDamaged, at, err)
}

// gunzip reads one or more gzip streams one behind the other, and the zeros with which tapes and initrds are filled up
// behind them; compress/gzip takes zeros for a broken header.
type gunzip struct {
	in *bufio.Reader
	z  *gzip.Reader
}

func newGunzip(in *bufio.Reader) (*gunzip, error) {
	z, err := gzip.NewReader(in)
	if err != nil {
		return nil, eofInside(err)
	}
	z.Multistream(false)
	return &gunzip{in, z}, nil
}

func (g *gunzip) Read(p []byte) (int, error) {
	for {
		n, err := g.z.Read(p)
		if n > 0 || err != io.EOF {
			if err == io.EOF {
				err = nil // the next call finds out whether it is the end
			}
			return n, err
		}
		for {
			b, err := g.in.ReadByte()
			if err != nil {
				return 0, err // io.EOF is the end
			}
			if b == 0 {
				continue
			}
			if err := g.in.UnreadByte(); err != nil {
				return 0, err
			}
			break
		}
		if magic, err := g.in.Peek(2); err != nil && err != io.EOF {
			return 0, err
		} else if detect(magic) != gzipStream {
			return 0, errors.New("something that is not gzip follows it")
		}
		if err := g.z.Reset(g.in); err != nil {
			return 0, eofInside(err)
		}
		g.z.Multistream(false)
	}
}

// eofInside makes an error of the end of a file where more had to come.
func eofInside(err error) error {
	if err == io.EOF {
		return io.ErrUnexpectedEOF
	}
	return err
}

func (s *source) Name() string          { return s.name }
func (s *source) Root() *replicate.Item { return s.root }

func (s *source) Close() error {
	if s.file == nil || !s.own {
		return nil
	}
	err := s.file.Close()
	s.file = nil
	return err
}

// Open implements replicate.Source. Files can be read at the same time, and any number of times.
func (s *source) Open(it *replicate.Item) (io.ReadCloser, error) {
	c := s.content[it]
	if c == nil {
		if it.Err != nil {
			return nil, it.Err
		}
		return nil, fmt.Errorf("internal error: %s is no file of the archive", it.Path)
	}
	if err := s.unchanged(); err != nil {
		return nil, err
	}
	if c.sparse {
		return openSparse(s.data, c, it)
	}
	return member{io.NewSectionReader(s.data, c.off, c.size)}, nil
}

// unchanged refuses a file that somebody wrote to since it was indexed: what lies at the offsets is not the members then.
func (s *source) unchanged() error {
	if s.info == nil {
		return nil
	}
	info, err := s.file.Stat()
	if err != nil {
		return err
	}
	if info.Size() != s.info.Size() || !info.ModTime().Equal(s.info.ModTime()) {
		return fmt.Errorf("%w: %s was changed while it was read", ErrDamaged, s.name)
	}
	return nil
}

// member is a file of an archive, which can be read at any offset too.
type member struct{ *io.SectionReader }

func (member) Close() error { return nil }
