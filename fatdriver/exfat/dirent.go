package exfat

import (
	"fmt"
	"strings"
	"unicode/utf16"
	"unicode/utf8"
)

// Directory entries: sections 6.2, 6.3, 6.4 and 7. Part of the on-disk format.
const (
	entrySize = 32
	maxDir    = 256 << 20 // 7.6.7: bytes of a directory

	bitInUse     = 0x80 // 6.2.1.4
	bitSecondary = 0x40 // 6.2.1.3
	bitBenign    = 0x20 // 6.2.1.2

	kindEnd    = 0x00
	kindBitmap = 0x81
	kindUpcase = 0x82
	kindLabel  = 0x83
	kindFile   = 0x85
	kindGUID   = 0xA0
	kindStream = 0xC0
	kindName   = 0xC1

	offSecondaryCount = 1
	offSetChecksum    = 2

	flagAllocation = 0x01 // 6.4.2.1
	flagNoFATChain = 0x02 // 6.4.2.2

	nameUnits    = 15  // UTF-16 units an entry, 7.7.3
	maxNameUnits = 255 // 7.6.3
	maxLabel     = 11  // UTF-16 units, 7.3.2

	attrDir = 0x10 // 7.4.4
)

// Attribute bits that FAT has too, with the same values (7.4.4).
const (
	AttrReadOnly = 0x01
	AttrHidden   = 0x02
	AttrSystem   = 0x04
	AttrArchive  = 0x20
)

// batch is how many bytes of entry sets go through the library at once.
const batch = 64 << 10

// place says where in a directory a set begins: the byte in it, and on the volume.
type place struct{ in, off int64 }

// dirReader reads the entries of a directory in large pieces.
type dirReader struct {
	r    *runReader
	buf  []byte
	at   int64 // of buf in the directory
	next int   // in buf
}

// entry returns the next 32 bytes, which are good until the call after the next one, and nil at the end.
func (d *dirReader) entry() ([]byte, place, error) {
	if d.next == len(d.buf) {
		d.at += int64(len(d.buf))
		n := min(pageSize, d.r.size-d.at)
		if n <= 0 {
			return nil, place{}, nil
		}
		d.buf, d.next = make([]byte, n), 0
		if k, err := d.r.ReadAt(d.buf, d.at); k < len(d.buf) {
			d.buf = nil
			return nil, place{}, &ioError{err}
		}
	}
	in := d.at + int64(d.next)
	i := d.r.runAt(in)
	e := d.buf[d.next : d.next+entrySize]
	d.next += entrySize
	return e, place{in, d.r.v.geo.offset(d.r.runs[i].first) + in - d.r.base[i]}, nil
}

// back makes the next call of entry return the last one again.
func (d *dirReader) back() { d.next -= entrySize }

// sets reads a directory and calls found with each set of live entries that is whole and has the right checksum, decoded.
// bad is called with what is wrong with the others. Deleted entries are skipped (6.2.1.4), and so are benign ones that are
// not known (8.2). The error is of the medium, or our own.
func (d *dirReader) sets(root bool, dec *decoder, found func(*entry, place) error, bad func(place, string)) error {
	var pending []byte
	var places []place
	flush := func() error {
		if len(places) == 0 {
			return nil
		}
		entries, err := dec.decode(pending)
		if err == nil && len(entries) != len(places) {
			err = fmt.Errorf("internal error: %d sets of directory entries were decoded, want %d", len(entries), len(places))
		}
		if err != nil {
			return err
		}
		for i := range entries {
			if err := found(&entries[i], places[i]); err != nil {
				return err
			}
		}
		pending, places = pending[:0], places[:0]
		return nil
	}
	for {
		e, at, err := d.entry()
		if err != nil {
			return err
		}
		if e == nil || e[0] == kindEnd {
			return flush()
		}
		set, why, err := d.set(e, root)
		if err != nil {
			return err
		}
		if why != "" {
			bad(at, why)
		}
		if set != nil {
			pending, places = append(pending, set...), append(places, at)
		}
		if len(pending) >= batch {
			if err := flush(); err != nil {
				return err
			}
		}
	}
}

// set reads the rest of the set that begins with e, and returns what of it the library is to decode, nil when it is to
// be skipped; why is what is wrong with it.
func (d *dirReader) set(e []byte, root bool) (set []byte, why string, err error) {
	kind := e[0]
	switch {
	case kind&bitInUse == 0:
		return nil, "", nil
	case kind&bitSecondary != 0:
		return nil, fmt.Sprintf("a secondary entry 0x%02x belongs to no set", kind), d.skipSecondary()
	case kind == kindBitmap || kind == kindUpcase || kind == kindLabel:
		if !root {
			return nil, fmt.Sprintf("an entry 0x%02x is only allowed in the root directory", kind), nil
		}
		return append([]byte(nil), e...), "", nil
	case kind == kindFile:
	case kind == kindGUID && root:
	case kind&bitBenign != 0:
		return nil, "", d.skipSecondary()
	default:
		// 8.2: the directory means something that this revision does not know.
		return nil, fmt.Sprintf("the critical entry 0x%02x is not known", kind), d.skipSecondary()
	}
	count := int(e[offSecondaryCount])
	set = append(make([]byte, 0, (1+count)*entrySize), e...)
	for i := 1; i <= count; i++ {
		s, _, err := d.entry()
		if err != nil {
			return nil, "", err
		}
		if s == nil || s[0]&(bitInUse|bitSecondary) != bitInUse|bitSecondary {
			if s != nil {
				d.back()
			}
			return nil, fmt.Sprintf("a set has %d secondary entries, want %d", i-1, count), nil
		}
		set = append(set, s...)
	}
	if got, want := le.Uint16(e[offSetChecksum:]), setChecksum(set); got != want {
		return nil, fmt.Sprintf("the checksum of a set of entries is 0x%04x, want 0x%04x", got, want), nil
	}
	if kind == kindGUID {
		if count != 0 { // 7.5.2
			return nil, "", nil
		}
		return set, "", nil
	}
	if why := fileSet(set); why != "" {
		return nil, why, nil
	}
	// The stream extension and the name come first; behind them are benign ones alone, which change nothing about the
	// file. The library knows two of them, and panics at others.
	names := (int(set[entrySize+3]) + nameUnits - 1) / nameUnits
	set = set[:(2+names)*entrySize]
	set[offSecondaryCount] = byte(1 + names)
	return set, "", nil
}

// skipSecondary goes on to the next entry that is no live secondary one.
func (d *dirReader) skipSecondary() error {
	for {
		e, _, err := d.entry()
		if err != nil || e == nil {
			return err
		}
		if e[0]&(bitInUse|bitSecondary) != bitInUse|bitSecondary {
			d.back()
			return nil
		}
	}
}

// fileSet says what is wrong with the order of the entries of a file, "" when nothing is (7.4, 7.6, 7.7).
func fileSet(set []byte) string {
	n := len(set) / entrySize
	if n < 3 || set[entrySize] != kindStream {
		return "a file has no stream extension and name"
	}
	length := int(set[entrySize+3])
	names := (length + nameUnits - 1) / nameUnits
	if length == 0 {
		return "a file has a name of no characters"
	}
	for i := 2; i < n; i++ {
		kind := set[i*entrySize]
		switch {
		case i < 2+names && kind != kindName:
			return fmt.Sprintf("a name of %d characters has %d entries, want %d", length, i-2, names)
		case i >= 2+names && kind == kindName:
			return fmt.Sprintf("a name of %d characters has more than %d entries", length, names)
		case kind == kindStream:
			return "a file has two stream extensions"
		case i >= 2+names && kind&bitBenign == 0:
			return fmt.Sprintf("the critical secondary entry 0x%02x of a file is not known", kind) // 8.2
		}
	}
	if n < 2+names {
		return fmt.Sprintf("a name of %d characters has %d entries, want %d", length, n-2, names)
	}
	return ""
}

// setChecksum is the sum over all entries of a set without the field itself (6.3.3, figure 2).
func setChecksum(set []byte) uint16 {
	var sum uint16
	for i, c := range set {
		if i != offSetChecksum && i != offSetChecksum+1 {
			sum = sum<<15 | sum>>1
			sum += uint16(c)
		}
	}
	return sum
}

// badNameChars may not be in a name (7.7.3, table 35), besides the control characters.
const badNameChars = "\"*/:<>?\\|"

// badName says why a name is not allowed, "" when it is.
func badName(u []uint16) string {
	for _, c := range u {
		if c < 0x20 || c < 0x80 && strings.IndexByte(badNameChars, byte(c)) >= 0 {
			return fmt.Sprintf("its name has the character %q", rune(c))
		}
	}
	if s := fromUnits(u); s == "." || s == ".." {
		return fmt.Sprintf("its name is %q, which is reserved", s)
	}
	return ""
}

// toUnits reads little-endian UTF-16.
func toUnits(b []byte, n int) []uint16 {
	u := make([]uint16, n)
	for i := range u {
		u[i] = le.Uint16(b[2*i:])
	}
	return u
}

// fromUnits writes UTF-16 as UTF-8. Unpaired surrogates become three bytes each (WTF-8), as in package fatdriver, so that
// two different names never look alike.
func fromUnits(u []uint16) string {
	b := make([]byte, 0, len(u))
	for i := 0; i < len(u); i++ {
		r := rune(u[i])
		switch {
		case !utf16.IsSurrogate(r):
			b = utf8.AppendRune(b, r)
		case i+1 < len(u) && utf16.DecodeRune(r, rune(u[i+1])) != utf8.RuneError:
			b = utf8.AppendRune(b, utf16.DecodeRune(r, rune(u[i+1])))
			i++
		default:
			b = append(b, 0xE0|byte(r>>12), 0x80|byte(r>>6)&0xBF, 0x80|byte(r&0x3F))
		}
	}
	return string(b)
}

// units is the inverse of fromUnits.
func units(name string) []uint16 {
	u := make([]uint16, 0, len(name))
	for i := 0; i < len(name); {
		if i+2 < len(name) && name[i] == 0xED && name[i+1] >= 0xA0 && name[i+1] <= 0xBF && name[i+2]&0xC0 == 0x80 {
			u = append(u, 0xD000|uint16(name[i+1]&0x3F)<<6|uint16(name[i+2]&0x3F))
			i += 3
			continue
		}
		r, n := utf8.DecodeRuneInString(name[i:])
		u = utf16.AppendRune(u, r)
		i += n
	}
	return u
}
