package fatdriver

import (
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
	"time"
	"unicode/utf16"
)

// Offsets in a directory slot: fatgen103, "FAT Directory Structure" and "FAT Long Directory Entries". Part of the
// on-disk format.
const (
	slotSize = 32

	offName      = 0
	offAttr      = 11
	offNTRes     = 12
	offCrtTenth  = 13
	offCrtTime   = 14
	offCrtDate   = 16
	offAccDate   = 18
	offClusHI    = 20
	offWrtTime   = 22
	offWrtDate   = 24
	offClusLO    = 26
	offFileSize  = 28
	offLongOrd   = 0
	offLongType  = 12
	offLongSum   = 13
	offLongClus  = 26
	slotEnd      = 0x00
	slotDeleted  = 0xE5
	slotKanjiE5  = 0x05 // stands for a first byte of E5
	longLast     = 0x40
	longUnits    = 13  // UTF-16 units a long-name slot
	maxNameUnits = 255 // fatgen103, "Long Directory Entries"
	maxSlots     = 65536
)

// Attribute bits of a directory entry.
const (
	AttrReadOnly = 0x01
	AttrHidden   = 0x02
	AttrSystem   = 0x04
	AttrLabel    = 0x08
	AttrDir      = 0x10
	AttrArchive  = 0x20
	attrLong     = 0x0F
	attrLongMask = 0x3F
)

// NT bits in offNTRes: the base or the extension of the short name is shown in lower case; or there is no short name,
// and what stands in its place is invalid on purpose, as Windows has it for encrypted files.
const (
	ntLowerBase = 0x08
	ntLowerExt  = 0x10
	ntNoShort   = 0x20
)

var longUnitOff = [longUnits]int{1, 3, 5, 7, 9, 14, 16, 18, 20, 22, 24, 28, 30}

// Entry is one file or directory as its parent lists it.
type Entry struct {
	// Name is the long name where there is one, else the short name with the NT case bits applied. It is UTF-8, with
	// unpaired surrogates kept as three bytes each (WTF-8), so that two different names never look alike.
	Name string
	// Group is a copy of the entry's slots as they are on the volume: long-name slots first, the short slot last.
	Group []byte
	// Index is the number of the group's first slot within the directory.
	Index int
}

func (e *Entry) short() []byte { return e.Group[len(e.Group)-slotSize:] }

// ShortName returns the 11 raw bytes of the short name.
func (e *Entry) ShortName() (n [11]byte) { copy(n[:], e.short()); return n }

// Attr returns the attribute byte.
func (e *Entry) Attr() byte { return e.short()[offAttr] }

// IsDir says whether the entry is a directory.
func (e *Entry) IsDir() bool { return e.Attr()&AttrDir != 0 }

// Size is the file size in bytes.
func (e *Entry) Size() int64 { return int64(binary.LittleEndian.Uint32(e.short()[offFileSize:])) }

// ModTime is the time of the last write, which FAT keeps in local time in steps of 2 s; here it is taken for UTC. A
// zero or impossible date gives the zero time.
func (e *Entry) ModTime() time.Time {
	le := binary.LittleEndian
	return decodeTime(le.Uint16(e.short()[offWrtDate:]), le.Uint16(e.short()[offWrtTime:]))
}

// Meta is what the entry says besides its name, place and size. Times are UTC, as in ModTime; hundredths of a second are
// dropped.
func (e *Entry) Meta() Meta {
	le, s := binary.LittleEndian, e.short()
	return Meta{
		Attr:     e.Attr() & (AttrReadOnly | AttrHidden | AttrSystem | AttrArchive),
		Created:  decodeTime(le.Uint16(s[offCrtDate:]), le.Uint16(s[offCrtTime:])),
		Modified: e.ModTime(),
		Accessed: decodeTime(le.Uint16(s[offAccDate:]), 0),
	}
}

// Unread is a copy of Group without the date of the last access, which changes when a file is only read.
func (e *Entry) Unread() []byte {
	group := slices.Clone(e.Group)
	clear(group[len(group)-slotSize+offAccDate:][:2])
	return group
}

// slots is the number of slots that the entry takes.
func (e *Entry) slots() int { return len(e.Group) / slotSize }

// slotCluster reads the first cluster of a short slot; the high word counts on FAT32 only (fatgen103, DIR_FstClusHI).
func slotCluster(t Type, s []byte) Cluster {
	c := Cluster(binary.LittleEndian.Uint16(s[offClusLO:]))
	if t == FAT32 {
		c |= Cluster(binary.LittleEndian.Uint16(s[offClusHI:])&0x0FFF) << 16
	}
	return c
}

// putSlotCluster sets the first cluster of a short slot. On FAT12/16 the high word is left as it is: other systems keep
// things there.
func putSlotCluster(t Type, s []byte, c Cluster) {
	binary.LittleEndian.PutUint16(s[offClusLO:], uint16(c))
	if t == FAT32 {
		binary.LittleEndian.PutUint16(s[offClusHI:], uint16(c>>16))
	}
}

func decodeTime(date, tod uint16) time.Time {
	y, m, d := 1980+int(date>>9), time.Month(date>>5&0xF), int(date&0x1F)
	if m < 1 || m > 12 || d < 1 {
		return time.Time{}
	}
	return time.Date(y, m, d, int(tod>>11), int(tod>>5&0x3F), int(tod&0x1F)*2, 0, time.UTC)
}

// encodeTime gives date, time and tenths (10 ms units) of t in UTC, clamped to what FAT can hold: 1980 to 2107.
func encodeTime(t time.Time) (date, tod uint16, tenth byte) {
	t = t.UTC()
	switch {
	case t.Year() < 1980:
		return 1<<5 | 1, 0, 0
	case t.Year() > 2107:
		return 127<<9 | 12<<5 | 31, 23<<11 | 59<<5 | 29, 199
	}
	date = uint16(t.Year()-1980)<<9 | uint16(t.Month())<<5 | uint16(t.Day())
	tod = uint16(t.Hour())<<11 | uint16(t.Minute())<<5 | uint16(t.Second()/2)
	return date, tod, byte(t.Second()%2*100 + t.Nanosecond()/10_000_000)
}

// shortSum is the checksum that ties long-name slots to their short name (fatgen103, "ChkSum").
func shortSum(name []byte) byte {
	var s byte
	for _, b := range name[:11] {
		s = s<<7 | s>>1
		s += b
	}
	return s
}

// units converts a name to UTF-16. Three-byte surrogates (WTF-8) become the lone units that they came from.
func units(name string) []uint16 {
	out := make([]uint16, 0, len(name))
	for i := 0; i < len(name); {
		if i+2 < len(name) && name[i] == 0xED && name[i+1] >= 0xA0 && name[i+1] <= 0xBF && name[i+2]&0xC0 == 0x80 {
			out = append(out, 0xD000|uint16(name[i+1]&0x3F)<<6|uint16(name[i+2]&0x3F))
			i += 3
			continue
		}
		r, n := decodeRune(name[i:])
		out = utf16.AppendRune(out, r)
		i += n
	}
	return out
}

// fromUnits is the inverse of units.
func fromUnits(u []uint16) string {
	var b []byte
	for i := 0; i < len(u); i++ {
		r := rune(u[i])
		switch {
		case utf16.IsSurrogate(r) && i+1 < len(u) && utf16.DecodeRune(r, rune(u[i+1])) != '\uFFFD':
			b = appendRune(b, utf16.DecodeRune(r, rune(u[i+1])))
			i++
		case utf16.IsSurrogate(r):
			b = append(b, 0xE0|byte(r>>12), 0x80|byte(r>>6)&0xBF, 0x80|byte(r&0x3F))
		default:
			b = appendRune(b, r)
		}
	}
	return string(b)
}

// longName joins the long-name slots of a group, which must be whole and in order. It returns an error that says what
// is wrong with them otherwise.
func longName(group []byte) (string, error) {
	n := len(group)/slotSize - 1
	sum := shortSum(group[n*slotSize:])
	u := make([]uint16, n*longUnits)
	for i := 0; i < n; i++ {
		s := group[i*slotSize : (i+1)*slotSize]
		ord := byte(n - i)
		if i == 0 {
			ord |= longLast
		}
		switch {
		case s[offLongOrd] != ord:
			return "", fmt.Errorf("long-name slot has ordinal 0x%02x, want 0x%02x", s[offLongOrd], ord)
		case s[offLongType] != 0:
			return "", fmt.Errorf("long-name slot has type 0x%02x, want 0", s[offLongType])
		case s[offLongSum] != sum:
			return "", fmt.Errorf("long-name slot has checksum 0x%02x, its short name gives 0x%02x", s[offLongSum], sum)
		case s[offLongClus] != 0 || s[offLongClus+1] != 0:
			return "", errors.New("long-name slot has a first cluster")
		}
		for j, o := range longUnitOff {
			u[(n-1-i)*longUnits+j] = binary.LittleEndian.Uint16(s[o:])
		}
	}
	end := len(u)
	for i, c := range u {
		if c == 0 {
			end = i
			break
		}
	}
	for i := end + 1; i < len(u); i++ {
		if u[i] != 0xFFFF {
			return "", errors.New("long name has text after its end")
		}
	}
	if end == 0 || end > maxNameUnits || end <= (n-1)*longUnits {
		return "", fmt.Errorf("long name of %d characters takes %d slots", end, n)
	}
	return fromUnits(u[:end]), nil
}

// putLongName writes the long-name slots of name (as UTF-16) into group, whose last slot is already the short one.
func putLongName(group []byte, u []uint16) {
	n := len(group)/slotSize - 1
	sum := shortSum(group[n*slotSize:])
	for i := 0; i < n; i++ {
		s := group[i*slotSize : (i+1)*slotSize]
		clear(s)
		s[offLongOrd] = byte(n - i)
		if i == 0 {
			s[offLongOrd] |= longLast
		}
		s[offAttr] = attrLong
		s[offLongSum] = sum
		for j, o := range longUnitOff {
			k := (n-1-i)*longUnits + j
			v := uint16(0xFFFF)
			if k < len(u) {
				v = u[k]
			} else if k == len(u) {
				v = 0
			}
			binary.LittleEndian.PutUint16(s[o:], v)
		}
	}
}

// dirIssue is something wrong inside one directory; slot is the index of the slot it was found at.
type dirIssue struct {
	slot  int
	fatal bool // a reader may see something else than we do, or a writer may do harm
	msg   string
}

// parsedDir is the content of a directory.
type parsedDir struct {
	entries []*Entry // files and directories, in order, without "." and ".."
	dots    [2][]byte
	labels  []*Entry
	issues  []dirIssue
	end     int // index of the first end marker, or the number of slots
}

// parseDir splits the raw slots of a directory. isRoot says that no "." and ".." are expected.
func parseDir(t Type, raw []byte, isRoot bool) *parsedDir {
	d := &parsedDir{}
	total := len(raw) / slotSize
	d.end = total
	longFrom := -1 // first slot of the long name being collected
	note := func(slot int, fatal bool, format string, a ...any) {
		d.issues = append(d.issues, dirIssue{slot, fatal, fmt.Sprintf(format, a...)})
	}
	orphans := func() {
		if longFrom >= 0 {
			note(longFrom, false, "orphan long-name slots")
			longFrom = -1
		}
	}
	for i := 0; i < total; i++ {
		s := raw[i*slotSize : (i+1)*slotSize]
		if s[0] == slotEnd {
			d.end = i
			break
		}
		if s[0] == slotDeleted {
			orphans()
			continue
		}
		if s[offAttr]&attrLongMask == attrLong {
			if s[0]&longLast != 0 {
				orphans()
				longFrom = i
			} else if longFrom < 0 {
				note(i, false, "orphan long-name slots")
			}
			continue
		}
		if s[offAttr]&AttrLabel != 0 {
			orphans()
			d.labels = append(d.labels, &Entry{Group: append([]byte(nil), s...), Index: i})
			continue
		}
		if string(s[:11]) == ".          " || string(s[:11]) == "..         " {
			orphans()
			switch {
			case isRoot:
				note(i, true, "%q in the root directory", s[:2])
			case s[1] == ' ' && i == 0:
				d.dots[0] = s
			case s[1] == '.' && i == 1:
				d.dots[1] = s
			default:
				note(i, true, "%q is not in its place", s[:2])
			}
			continue
		}
		e := &Entry{Index: i}
		from := i
		if longFrom >= 0 {
			if name, err := longName(raw[longFrom*slotSize : (i+1)*slotSize]); err != nil {
				// EDK2 shows such a file under its short name only.
				note(longFrom, false, "orphan long-name slots: %v", err)
			} else {
				e.Name, from = name, longFrom
			}
			longFrom = -1
		}
		e.Index = from
		e.Group = append([]byte(nil), raw[from*slotSize:(i+1)*slotSize]...)
		switch why, none := badShortName(s), s[offNTRes]&ntNoShort != 0; {
		case why != "" && none && e.Name != "": // as it should be
		case why != "":
			// With a long name every reader goes by that.
			note(i, e.Name == "", "short name %q %s", s[:11], why)
		case none:
			note(i, false, "%q is marked as having no short name, but has a valid one", s[:11])
		}
		if e.Name == "" {
			e.Name = displayShort(s)
		} else if why := badLongName(e.Name); why != "" {
			note(from, true, "long name %q %s", e.Name, why)
			e.Name = displayShort(s)
		}
		d.entries = append(d.entries, e)
	}
	orphans()
	if !isRoot {
		for i, want := range []string{".", ".."} {
			if d.dots[i] == nil {
				note(i, true, "%q is missing", want)
			}
		}
	}
	return d
}
