package archive

import (
	"bytes"
	"fmt"
	"io"
	"io/fs"
	"strings"
	"time"
)

// A cpio archive is a row of members: a header of ASCII digits, the name with a NUL, the data. The last one has the name
// TRAILER!!!. In newc (070701) and crc (070702), name and data are filled up to a multiple of 4 bytes, counted from the
// beginning of the archive (Linux, Documentation/driver-api/early-userspace/buffer-format.rst; cpio(5) of libarchive):
//
//	        0      6        14    22   30   38     46     54        62        70        78         86         94        102    110
//	newc    magic  ino      mode  uid  gid  nlink  mtime  filesize  devmajor  devminor  rdevmajor  rdevminor  namesize  check  name
//	        0      6    12   18    24   30   36     42    48     59        65        76
//	odc     magic  dev  ino  mode  uid  gid  nlink  rdev  mtime  namesize  filesize  name
//
// The fields of newc have 8 hexadecimal digits, those of odc (070707) 6 octal ones, mtime and filesize 11.
//
// This is read and written here because the library at hand, cavaliergopher/cpio v1.0.1 of 2021, takes a digit that is none
// for zero, a file that ends between two members for a whole archive, keeps the device numbers that tell hard links apart
// to itself, and does not look at the checksums.
const (
	cpioTrailer = "TRAILER!!!"
	newcSize    = 110
	odcSize     = 76
	cpioAlign   = 4

	cpioTypeMask = 0o170000
	cpioFile     = 0o100000
	cpioDir      = 0o040000
	cpioSymlink  = 0o120000
	cpioFIFO     = 0o010000
	cpioSocket   = 0o140000
	cpioChar     = 0o020000
	cpioBlock    = 0o060000
)

// cpioHeader is what a header says.
type cpioHeader struct {
	crc, align  bool // of the formats 070702; of newc
	ino, dev    uint64
	mode, nlink uint64
	mtime, size int64
	nameSize    int64
	check       uint32
	length      int64 // of the header itself
}

// inode names a file with several names. Each archive of a row has numbers of its own.
type inode struct {
	archive  int
	dev, ino uint64
}

func (b *builder) readCPIO(data *io.SectionReader) error {
	r := &cpioReader{b: b, data: data, end: data.Size(), links: map[inode]*content{}}
	for {
		ok, err := r.next()
		if err != nil || !ok {
			return err
		}
	}
}

type cpioReader struct {
	b       *builder
	data    *io.SectionReader
	end     int64
	at      int64 // of the next header
	start   int64 // of this archive of the row
	archive int
	links   map[inode]*content
	last    string
}

func (r *cpioReader) read(off int64, n int64) ([]byte, error) {
	buf := make([]byte, n)
	if _, err := r.data.ReadAt(buf, off); err != nil {
		return nil, fmt.Errorf("cannot read the archive at offset 0x%x: %w", off, err)
	}
	return buf, nil
}

// cut is the error of an archive that ends inside of something.
func (r *cpioReader) cut(where string) error {
	return fmt.Errorf("%w: it was cut short: it ends at offset 0x%x, %s%s", ErrDamaged, r.end, where, r.behind())
}

// behind says in a message where something is, by the member before it.
func (r *cpioReader) behind() string {
	if r.last == "" {
		return ""
	}
	return fmt.Sprintf(", behind the member %q", r.last)
}

// next reads one member; false is the end.
func (r *cpioReader) next() (bool, error) {
	off := r.at
	if off >= r.end {
		return false, r.cut("without the end mark of a cpio archive")
	}
	head, err := r.read(off, min(newcSize, r.end-off))
	if err != nil {
		return false, err
	}
	h, why := parseCPIO(head)
	if why != "" {
		if len(head) < odcSize || len(head) < newcSize && !bytes.HasPrefix(head, []byte("070707")) {
			return false, r.cut("in a header")
		}
		return false, fmt.Errorf("%w: the header at offset 0x%x is damaged%s: %s", ErrDamaged, off, r.behind(), why)
	}
	if h.nameSize < 1 || h.nameSize > maxName+1 {
		return false, fmt.Errorf("%w: the name of the member at offset 0x%x has %d bytes, at least 1 and at most %d are read", ErrTooLarge, off, h.nameSize, maxName+1)
	}
	at := off + h.length
	if h.nameSize > r.end-at {
		return false, r.cut("in a name")
	}
	raw, err := r.read(at, h.nameSize)
	if err != nil {
		return false, err
	}
	// Some writers fill up the name with NULs, so that the data begins where it can be shared with the file on the disk.
	name := strings.TrimRight(string(raw), "\x00")
	if len(name) == len(raw) || strings.Contains(name, "\x00") || name == "" {
		return false, fmt.Errorf("%w: the name %q of the member at offset 0x%x is not one string with a NUL behind it", ErrDamaged, raw, off)
	}
	at = r.aligned(at+h.nameSize, h.align)
	if name == cpioTrailer {
		return r.trailer(min(at, r.end))
	}
	r.last = name
	if at > r.end || h.size > r.end-at {
		return false, fmt.Errorf("%w: it was cut short: the member %q at offset 0x%x has %d bytes, and %d are left", ErrDamaged, name, off, h.size, max(0, r.end-at))
	}
	if err := r.member(h, name, off, at); err != nil {
		return false, err
	}
	r.at = r.aligned(at+h.size, h.align)
	return true, nil
}

func (r *cpioReader) aligned(off int64, align bool) int64 {
	if !align {
		return off
	}
	return r.start + (off-r.start+cpioAlign-1)/cpioAlign*cpioAlign
}

func (r *cpioReader) member(h *cpioHeader, name string, off, at int64) error {
	n := &node{mode: fs.FileMode(h.mode & 0o777), mtime: time.Unix(h.mtime, 0)}
	switch kind := h.mode & cpioTypeMask; kind {
	case cpioFile:
		if h.crc && h.size > 0 {
			if err := r.verify(h, name, off, at); err != nil {
				return err
			}
		}
		n.data = r.content(h, at)
	case cpioDir:
		n.dir = true
	default:
		n = special(name, cpioKind(kind))
	}
	return r.b.add(name, off, n)
}

// content finds the data of a file. Of a file with several names, newc and crc keep the data with one of them, mostly the
// last one; odc, and some writers of newc, keep it with each.
func (r *cpioReader) content(h *cpioHeader, at int64) *content {
	if h.nlink < 2 {
		return &content{off: at, size: h.size}
	}
	id := inode{r.archive, h.dev, h.ino}
	c := r.links[id]
	switch {
	case c == nil:
		c = &content{off: at, size: h.size}
		r.links[id] = c
	case h.size == 0:
	case c.size == 0:
		c.off, c.size = at, h.size // for the names before it too
	default:
		return &content{off: at, size: h.size}
	}
	return c
}

// verify compares the data with the checksum of the crc format, which is the sum of all bytes.
func (r *cpioReader) verify(h *cpioHeader, name string, off, at int64) error {
	data := io.NewSectionReader(r.data, at, h.size)
	buf := make([]byte, 1<<16)
	var sum uint32
	for {
		n, err := data.Read(buf)
		for _, c := range buf[:n] {
			sum += uint32(c)
		}
		if err == io.EOF {
			break
		}
		if err == nil {
			err = r.b.ctx.Err()
		}
		if err != nil {
			return err
		}
	}
	if sum != h.check {
		return fmt.Errorf("%w: the data of the member %q at offset 0x%x has the checksum 0x%x, and its header says 0x%x", ErrDamaged, name, off, sum, h.check)
	}
	return nil
}

// trailer looks at what is behind the end of an archive: zeros, and another archive or the end.
func (r *cpioReader) trailer(at int64) (bool, error) {
	buf := make([]byte, 1<<16)
	for at < r.end {
		n, err := r.data.ReadAt(buf[:min(int64(len(buf)), r.end-at)], at)
		if err != nil && err != io.EOF || n == 0 {
			return false, fmt.Errorf("cannot read the archive at offset 0x%x: %w", at, err)
		}
		zeros := n - len(bytes.TrimLeft(buf[:n], "\x00"))
		if at += int64(zeros); zeros == n {
			continue
		}
		head, err := r.read(at, min(headSize, r.end-at))
		if err != nil {
			return false, err
		}
		switch detect(head) {
		case cpioArchive:
			r.start, r.at = at, at
			r.archive++
			return true, r.b.count(at)
		case gzipStream, zstdStream, other:
			return false, fmt.Errorf("%w: a compressed archive begins at offset 0x%x, behind the end of a cpio archive, and is not read", ErrDamaged, at)
		}
		return false, fmt.Errorf("%w: what begins at offset 0x%x, behind the end of a cpio archive, is no cpio archive", ErrDamaged, at)
	}
	return false, nil
}

func cpioKind(mode uint64) string {
	switch mode {
	case cpioSymlink:
		return "a symbolic link"
	case cpioFIFO:
		return "a named pipe"
	case cpioSocket:
		return "a socket"
	case cpioChar, cpioBlock:
		return "a device"
	}
	return fmt.Sprintf("of the file type %#o", mode)
}

// parseCPIO decodes a header. The string says what is wrong with it.
func parseCPIO(b []byte) (*cpioHeader, string) {
	if len(b) < 6 {
		return nil, "it is too short"
	}
	var why string
	field := func(off, n int, base uint64) uint64 {
		var v uint64
		for _, c := range b[off : off+n] {
			d := uint64(99)
			switch {
			case c >= '0' && c <= '9':
				d = uint64(c - '0')
			case c >= 'a' && c <= 'f':
				d = uint64(c-'a') + 10
			case c >= 'A' && c <= 'F':
				d = uint64(c-'A') + 10
			}
			if d >= base && why == "" {
				why = fmt.Sprintf("%q at 0x%x is no digit", c, off)
			}
			v = v*base + d
		}
		return v
	}
	switch magic := string(b[:6]); {
	case (magic == "070701" || magic == "070702") && len(b) >= newcSize:
		f := func(i int) uint64 { return field(6+8*i, 8, 16) }
		h := &cpioHeader{
			crc: magic == "070702", align: true, length: newcSize,
			ino: f(0), mode: f(1), nlink: f(4), mtime: int64(f(5)), size: int64(f(6)),
			dev: f(7)<<32 | f(8), nameSize: int64(f(11)), check: uint32(f(12)),
		}
		return h, why
	case magic == "070707" && len(b) >= odcSize:
		h := &cpioHeader{
			length: odcSize, dev: field(6, 6, 8), ino: field(12, 6, 8), mode: field(18, 6, 8), nlink: field(36, 6, 8),
			mtime: int64(field(48, 11, 8)), nameSize: int64(field(59, 6, 8)), size: int64(field(65, 11, 8)),
		}
		return h, why
	case magic == "070701", magic == "070702", magic == "070707":
		return nil, "it is too short"
	}
	return nil, fmt.Sprintf("it begins with %q", b[:6])
}
