package archive

import (
	"archive/tar"
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"strings"

	"espmirror/replicate"
)

// blockSize is the unit of a tar archive (POSIX.1, pax, "ustar Interchange Format").
const blockSize = 512

// isTar says whether a block is the header of a tar member: by its checksum, as the v7 format has no magic number.
func isTar(block []byte) bool {
	// A boot sector that happens to be a header as well is still one: headers end with zeros.
	if len(block) < blockSize || block[510] == 0x55 && block[511] == 0xAA {
		return false
	}
	// The field is octal digits between spaces and NULs, in six to eight bytes.
	field := strings.Trim(string(block[148:156]), " \x00")
	var want int64
	for _, c := range field {
		if c < '0' || c > '7' {
			return false
		}
		want = want<<3 | int64(c-'0')
	}
	if field == "" {
		return false
	}
	// The sum takes its own field for spaces. Old programs summed signed bytes.
	var unsigned, signed int64
	for i, c := range block[:blockSize] {
		if i >= 148 && i < 156 {
			c = ' '
		}
		unsigned += int64(c)
		signed += int64(int8(c))
	}
	return want == unsigned || want == signed
}

// tarFile is an archive as archive/tar reads it. It notes where the header of a member begins: the reader skips what is
// left of the member before in pieces of less than a block, and reads headers by the block.
type tarFile struct {
	*io.SectionReader
	header int64 // -1 until a block was read
}

func (f *tarFile) pos() int64 {
	at, _ := f.Seek(0, io.SeekCurrent) // a SectionReader knows
	return at
}

func (f *tarFile) Read(p []byte) (int, error) {
	if f.header < 0 && len(p) >= blockSize {
		f.header = f.pos()
	}
	return f.SectionReader.Read(p)
}

func (b *builder) readTar(data *io.SectionReader) error {
	f := &tarFile{SectionReader: io.NewSectionReader(data, 0, data.Size())}
	tr := tar.NewReader(f)
	last := "" // ", behind the member …" once there is one
	for {
		f.header = -1
		h, err := tr.Next()
		if errors.Is(err, tar.ErrInsecurePath) {
			err = nil // names are checked here
		}
		if err == io.EOF {
			return f.endMark(last)
		}
		if err != nil {
			return f.failed(last, err)
		}
		off := f.header
		if off < 0 {
			return fmt.Errorf("internal error: no header before offset 0x%x", f.pos())
		}
		last = fmt.Sprintf(", behind the member %q", h.Name)
		at := f.pos()
		if isSparse(h) && h.Size <= maxFile {
			if err := b.checkSparse(tr, h, off); err != nil {
				return err
			}
		}
		if err := b.addTar(h, off, at, data.Size()); err != nil {
			return err
		}
	}
}

// endMark wants the block of zeros that ends an archive. Without it nobody knows whether there was more.
func (f *tarFile) endMark(last string) error {
	if f.header >= 0 {
		// archive/tar calls the end of the file the end of the archive, also behind a pax header, which belongs to a member.
		block := make([]byte, blockSize)
		if n, err := f.ReadAt(block, f.header); n == blockSize && bytes.Count(block, []byte{0}) == n {
			return nil
		} else if err != nil && err != io.EOF {
			return fmt.Errorf("cannot read the archive at offset 0x%x: %w", f.header, err)
		}
	}
	return fmt.Errorf("%w: it was cut short: it ends at offset 0x%x%s, without the end mark of a tar archive", ErrDamaged, f.Size(), last)
}

func (f *tarFile) failed(last string, err error) error {
	at := f.header
	if at < 0 {
		at = f.pos()
	}
	switch {
	case errors.Is(err, io.ErrUnexpectedEOF):
		return fmt.Errorf("%w: it was cut short, in a member or its header: it ends at offset 0x%x%s", ErrDamaged, f.Size(), last)
	case errors.Is(err, tar.ErrHeader), errors.Is(err, tar.ErrFieldTooLong):
		return fmt.Errorf("%w: the header at offset 0x%x is damaged%s: %w", ErrDamaged, at, last, err)
	}
	return fmt.Errorf("cannot read the archive at offset 0x%x%s: %w", at, last, err)
}

// typeGNUDir is a directory with a list of its files, in incremental archives of GNU tar; typeVolume names a tape, and
// typeContinued is the rest of a member that began on another one.
const (
	typeGNUDir    = 'D'
	typeVolume    = 'V'
	typeContinued = 'M'
)

// addTar puts a member into the tree. Its header is at off, its data at data.
func (b *builder) addTar(h *tar.Header, off, data, end int64) error {
	n := &node{mode: fs.FileMode(h.Mode) & 0o777, mtime: h.ModTime}
	switch h.Typeflag {
	case tar.TypeXGlobalHeader, typeVolume:
		for k := range h.PAXRecords {
			// archive/tar does not apply them. Other records say nothing about the bytes of files.
			if k == "path" || k == "linkpath" || k == "size" || strings.HasPrefix(k, "GNU.sparse.") {
				return fmt.Errorf("%w: the global header at offset 0x%x has %q for all members behind it, which is not read", ErrDamaged, off, k)
			}
		}
		return b.count(off) // no member, but an archive of nothing else must end as well
	case tar.TypeReg, tar.TypeCont, tar.TypeGNUSparse:
		if v := sparseVersion(h); v != "" {
			return b.add(h.Name, off, &node{err: fmt.Errorf("cannot replicate %s: it is a sparse file of the unknown version %s", shown(h.Name), v)})
		}
		c := &content{off: data, size: h.Size}
		if isSparse(h) {
			c.off, c.sparse = off, true
		} else if h.Size > end-data {
			return fmt.Errorf("%w: it was cut short: the member %q at offset 0x%x has %d bytes, and %d are left", ErrDamaged, h.Name, off, h.Size, end-data)
		}
		// A name that ends with a slash was a directory before there were types.
		if n.dir = strings.HasSuffix(h.Name, "/") && h.Size == 0; !n.dir {
			n.data = c
		}
	case tar.TypeDir, typeGNUDir:
		n.dir = true
	case tar.TypeLink:
		if len(h.Linkname) > maxName {
			return fmt.Errorf("%w: the member %q at offset 0x%x links to a name of %d bytes, at most %d are read", ErrTooLarge, shown(h.Name), off, len(h.Linkname), maxName)
		}
		if b.link(n, h.Name, h.Linkname); n.err != nil {
			if err := b.keep(n.err.Error()); err != nil {
				return err
			}
			break
		}
		if t := b.find(h.Linkname); t != nil {
			n.mode, n.mtime = t.mode, t.mtime // there is one file, with one time
		}
	case typeContinued:
		return fmt.Errorf("%w: the member %q at offset 0x%x began in another archive, of which this is the continuation", ErrDamaged, h.Name, off)
	default:
		if len(h.Name) <= maxName { // add refuses longer ones, and they need not be in a message
			n = special(h.Name, tarKind(h.Typeflag))
		}
	}
	return b.add(h.Name, off, n)
}

func tarKind(t byte) string {
	switch t {
	case tar.TypeSymlink:
		return "a symbolic link"
	case tar.TypeFifo:
		return "a named pipe"
	case tar.TypeChar, tar.TypeBlock:
		return "a device"
	}
	return fmt.Sprintf("of the tar type %q", t)
}

// isSparse says whether archive/tar puts a file together: its data is not one piece of the archive.
func isSparse(h *tar.Header) bool {
	if h.Typeflag == tar.TypeGNUSparse {
		return true
	}
	for k := range h.PAXRecords {
		if strings.HasPrefix(k, "GNU.sparse.") {
			return true
		}
	}
	return false
}

// sparseVersion is the version of a pax sparse file that archive/tar takes for any other file, whose map would be among its
// data; "" when there is none.
func sparseVersion(h *tar.Header) string {
	major, minor := h.PAXRecords["GNU.sparse.major"], h.PAXRecords["GNU.sparse.minor"]
	switch v := major + "." + minor; v {
	case ".", "0.0", "0.1", "1.0":
		return ""
	default:
		return fmt.Sprintf("%.20q", v)
	}
}

// checkSparse reads a sparse member to its end: whether the map of its pieces fits what is in the archive shows only then,
// and must show before anything is written. As holes take no room in an archive, what they make of it is bounded like
// what is unpacked.
func (b *builder) checkSparse(tr *tar.Reader, h *tar.Header, off int64) error {
	if b.sparse += h.Size; b.sparse > b.limits.Unpacked {
		return fmt.Errorf("%w: with the holes of the member %q at offset 0x%x its sparse files have more than %d bytes", ErrTooLarge, shown(h.Name), off, b.limits.Unpacked)
	}
	_, err := io.Copy(io.Discard, replicate.ContextReader(b.ctx, tr))
	if err == nil || b.ctx.Err() != nil {
		return b.ctx.Err()
	}
	var pe *fs.PathError
	if errors.As(err, &pe) {
		return err
	}
	return fmt.Errorf("%w: the sparse member %q at offset 0x%x is damaged: %w", ErrDamaged, shown(h.Name), off, err)
}

// openSparse reads a sparse member from its header on.
func openSparse(data *io.SectionReader, c *content, it *replicate.Item) (io.ReadCloser, error) {
	tr := tar.NewReader(io.NewSectionReader(data, c.off, data.Size()-c.off))
	h, err := tr.Next()
	if err != nil && !errors.Is(err, tar.ErrInsecurePath) {
		return nil, err
	}
	if h.Size != c.size {
		return nil, fmt.Errorf("internal error: the header at offset 0x%x is not that of %s", c.off, it.Path)
	}
	return io.NopCloser(tr), nil
}
