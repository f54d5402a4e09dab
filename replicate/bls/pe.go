package bls

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
)

// ErrPE is returned when a file is not a PE image that lies whole within its bytes: firmware would not start it.
var ErrPE = errors.New("it is not a whole PE image")

// A PE image, as far as it is read here (Microsoft, "PE Format"); all numbers are little endian:
//
//	0        "MZ"; at 3C the offset of the PE header, n
//	n        "PE\0\0"
//	n+4      COFF header, 20 bytes: machine, number of sections, …, at 10h the size of the optional header, s
//	n+18h    optional header, s bytes: magic, …, SizeOfHeaders, …, subsystem, …, data directories
//	n+18h+s  section table: for each 40 bytes
const (
	dosHeaderSize  = 0x40
	coffHeaderSize = 0x18 // with the signature
	sectionSize    = 40

	magicPE32     = 0x10B
	magicPE32Plus = 0x20B

	// Offsets in the optional header, the same in both kinds.
	offSizeOfHeaders = 0x3C
	offSubsystem     = 0x44

	// The data directory of signatures: an offset in the file and a size, unlike the others, which are addresses.
	securityDirectory = 4
)

// SubsystemEFIApplication is the PE.Subsystem of boot loaders, kernels and UKIs ("Windows Subsystem").
const SubsystemEFIApplication = 10

// Section is an entry of the section table ("Section Table (Section Headers)").
type Section struct {
	Name string
	// Off and Size are where its bytes are in the file: the smaller of SizeOfRawData, which is padded, and VirtualSize.
	Off, Size int64
	// Raw is SizeOfRawData, in bytes.
	Raw int64
}

// PE is an image whose headers were read.
type PE struct {
	Machine   uint16 // 8664h for x86-64, AA64h for AArch64
	Subsystem uint16 // 10 is an EFI application
	Plus      bool   // PE32+, for 64 bits
	Sections  []Section

	r io.ReaderAt
}

// maxSection bounds the section that is read: texts are far smaller.
const maxSection = 64 << 10

// ReadPE reads the headers of a PE image of size bytes, and checks that all they speak of is within the file: the headers
// themselves, the data of each section, and the signatures at the end. That is what EDK2's PeCoffLoaderGetPeHeader
// (MdePkg/Library/BasePeCoffLib) demands before it loads one, so that a file that was cut off is found. Nothing else is read: the headers of most images
// take less than a KiB, and no more memory is taken than the file has bytes. Offsets only grow, so that r may be a stream.
//
// The error is ErrPE with the offset of what was found there and what was expected, or the reader's.
func ReadPE(r io.ReaderAt, size int64) (*PE, error) {
	f := &window{r, size}
	dos, err := f.read("the DOS header", 0, dosHeaderSize)
	if err != nil {
		return nil, err
	}
	if string(dos[:2]) != "MZ" {
		return nil, fmt.Errorf("%w: expected \"MZ\" at 0x0, found %q", ErrPE, dos[:2])
	}
	at := int64(binary.LittleEndian.Uint32(dos[0x3C:]))
	if at < dosHeaderSize {
		return nil, fmt.Errorf("%w: expected the offset of the PE header at 0x3c, found 0x%x, in the DOS header", ErrPE, at)
	}
	coff, err := f.read("the PE header", at, coffHeaderSize)
	if err != nil {
		return nil, err
	}
	if string(coff[:4]) != "PE\x00\x00" {
		return nil, fmt.Errorf("%w: expected \"PE\\x00\\x00\" at 0x%x, found %q", ErrPE, at, coff[:4])
	}
	p := &PE{Machine: binary.LittleEndian.Uint16(coff[4:]), r: r}
	sections := int64(binary.LittleEndian.Uint16(coff[6:]))
	optSize := int64(binary.LittleEndian.Uint16(coff[0x14:]))
	if sections == 0 {
		return nil, fmt.Errorf("%w: expected a number of sections at 0x%x, found 0", ErrPE, at+6)
	}
	at += coffHeaderSize
	opt, err := f.read("the optional header", at, optSize)
	if err != nil {
		return nil, err
	}
	if err := p.optional(f, opt, at); err != nil {
		return nil, err
	}
	at += optSize
	table, err := f.read("the section table", at, sections*sectionSize)
	if err != nil {
		return nil, err
	}
	for i := range sections {
		s, err := f.section(table[i*sectionSize:][:sectionSize], at+i*sectionSize)
		if err != nil {
			return nil, err
		}
		p.Sections = append(p.Sections, s)
	}
	return p, nil
}

// optional reads the optional header, which lies at off ("Optional Header (Image Only)").
func (p *PE) optional(f *window, opt []byte, off int64) error {
	if len(opt) < 2 {
		return fmt.Errorf("%w: the optional header at 0x%x has %d bytes", ErrPE, off, len(opt))
	}
	directories := 0x60 // where they begin
	switch magic := binary.LittleEndian.Uint16(opt); magic {
	case magicPE32:
	case magicPE32Plus:
		p.Plus, directories = true, 0x70
	default:
		return fmt.Errorf("%w: expected 0x%x or 0x%x at 0x%x, found 0x%x", ErrPE, magicPE32, magicPE32Plus, off, magic)
	}
	if len(opt) < directories {
		return fmt.Errorf("%w: the optional header at 0x%x has %d bytes, expected at least %d", ErrPE, off, len(opt), directories)
	}
	p.Subsystem = binary.LittleEndian.Uint16(opt[offSubsystem:])
	if err := f.within("the headers", 0, int64(binary.LittleEndian.Uint32(opt[offSizeOfHeaders:]))); err != nil {
		return err
	}
	// The last field in front of the directories is their number; there may be fewer than that in the header.
	n := binary.LittleEndian.Uint32(opt[directories-4:])
	at := directories + 8*securityDirectory
	if n <= securityDirectory || len(opt) < at+8 {
		return nil
	}
	if size := int64(binary.LittleEndian.Uint32(opt[at+4:])); size > 0 {
		return f.within("the signatures", int64(binary.LittleEndian.Uint32(opt[at:])), size)
	}
	return nil
}

// section reads an entry of the section table, which lies at off.
func (f *window) section(b []byte, off int64) (Section, error) {
	name, _, _ := bytes.Cut(b[:8], []byte{0})
	s := Section{
		Name: string(name),
		Off:  int64(binary.LittleEndian.Uint32(b[0x14:])),
		Raw:  int64(binary.LittleEndian.Uint32(b[0x10:])),
	}
	s.Size = min(s.Raw, int64(binary.LittleEndian.Uint32(b[8:])))
	if s.Raw == 0 {
		return s, nil // nothing of it is in the file, wherever that would be
	}
	return s, f.within(fmt.Sprintf("section %q, listed at 0x%x,", s.Name, off), s.Off, s.Raw)
}

// window is a file of known size.
type window struct {
	r    io.ReaderAt
	size int64
}

// within demands that a range lies in the file.
func (f *window) within(what string, off, n int64) error {
	if n > f.size || off > f.size-n {
		return fmt.Errorf("%w: %s would be at 0x%x to 0x%x, and the file has 0x%x bytes", ErrPE, what, off, off+n, f.size)
	}
	return nil
}

// read reads a range that must lie in the file.
func (f *window) read(what string, off, n int64) ([]byte, error) {
	if err := f.within(what, off, n); err != nil {
		return nil, err
	}
	b := make([]byte, n)
	if m, err := f.r.ReadAt(b, off); int64(m) < n {
		if err == io.EOF {
			err = io.ErrUnexpectedEOF // it is shorter than was said
		}
		return nil, fmt.Errorf("cannot read %s at 0x%x: %w", what, off, err)
	}
	return b, nil
}

// Data reads a section of at most 64 KiB.
func (p *PE) Data(s Section) ([]byte, error) {
	if s.Size > maxSection {
		return nil, fmt.Errorf("cannot read section %q at 0x%x: it has %d bytes, expected at most %d", s.Name, s.Off, s.Size, maxSection)
	}
	b := make([]byte, s.Size)
	if n, err := p.r.ReadAt(b, s.Off); n < len(b) {
		if err == io.EOF {
			err = io.ErrUnexpectedEOF
		}
		return nil, fmt.Errorf("cannot read section %q at 0x%x: %w", s.Name, s.Off, err)
	}
	return b, nil
}
