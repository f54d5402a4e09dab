package fatdriver

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/fnv"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"
)

// ErrName is returned when a name cannot be stored on a FAT volume.
var ErrName = errors.New("not a valid FAT name")

func decodeRune(s string) (rune, int)    { return utf8.DecodeRuneInString(s) }
func appendRune(b []byte, r rune) []byte { return utf8.AppendRune(b, r) }

// cp437High is the upper half of code page 437, the OEM code page of firmware and of Linux's default.
const cp437High = "ÇüéâäàåçêëèïîìÄÅÉæÆôöòûùÿÖÜ¢£¥₧ƒáíóúñÑªº¿⌐¬½¼¡«»░▒▓│┤╡╢╖╕╣║╗╝╜╛┐└┴┬├─┼╞╟╚╔╩╦╠═╬╧╨╤╥╙╘╒╓╫╪┘┌█▄▌▐▀αßΓπΣσµτΦΘΩδ∞φε∩≡±≥≤⌠⌡÷≈°∙·√ⁿ²■\u00a0"

var cp437 = []rune(cp437High)

// displayShort is the name that a short slot shows: BASE.EXT from code page 437 with the NT case bits applied.
func displayShort(s []byte) string {
	part := func(b []byte, lower bool) string {
		var sb strings.Builder
		for _, c := range b {
			r := rune(c)
			if c >= 0x80 {
				r = cp437[c-0x80]
			} else if c < 0x20 || c == 0x7F || c == '/' || c == '\\' {
				r = '_' // never a control character or a separator, however broken the volume
			}
			if lower {
				r = unicode.ToLower(r)
			}
			sb.WriteRune(r)
		}
		return strings.TrimRight(sb.String(), " ")
	}
	var raw [11]byte
	copy(raw[:], s)
	if raw[0] == slotKanjiE5 {
		raw[0] = slotDeleted
	}
	name := part(raw[:8], s[offNTRes]&ntLowerBase != 0)
	if ext := part(raw[8:], s[offNTRes]&ntLowerExt != 0); ext != "" {
		name += "." + ext
	}
	if name == "" || name == "." || name == ".." {
		return "_"
	}
	return name
}

const badShortChars = "\"*+,./:;<=>?[\\]|"
const badLongChars = "\"*/:<>?\\|"

// badShortName says why the 11 bytes of a short name are not allowed, or "" (fatgen103, "DIR_Name").
func badShortName(s []byte) string {
	if s[0] == ' ' {
		return "begins with a space"
	}
	for i, c := range s[:11] {
		if c < 0x20 && !(i == 0 && c == slotKanjiE5) || c == 0x7F || strings.IndexByte(badShortChars, c) >= 0 {
			return fmt.Sprintf("has the byte 0x%02x", c)
		}
	}
	return ""
}

// badLongName says why a long name is not allowed, or "" (fatgen103, "Long File Names").
func badLongName(name string) string {
	if name == "." || name == ".." || name == "" {
		return "is reserved"
	}
	for _, r := range name {
		if r < 0x20 || r == 0x7F || strings.ContainsRune(badLongChars, r) {
			return fmt.Sprintf("has the character %q", r)
		}
	}
	return ""
}

// CheckName returns ErrName, with the reason, when name cannot be the name of a file or directory on FAT.
func CheckName(name string) error {
	if why := badLongName(name); why != "" {
		return fmt.Errorf("%w: %q %s", ErrName, name, why)
	}
	if !utf8.ValidString(name) && fromUnits(units(name)) != name {
		return fmt.Errorf("%w: %q is not UTF-8", ErrName, name)
	}
	if n := len(units(name)); n > maxNameUnits {
		return fmt.Errorf("%w: %q has %d UTF-16 units, at most %d are possible", ErrName, name, n, maxNameUnits)
	}
	if last := name[len(name)-1]; last == '.' || last == ' ' {
		return fmt.Errorf("%w: %q ends with a dot or a space", ErrName, name)
	}
	return nil
}

// Fold maps a name to the key under which FAT compares it: two names with the same key cannot be in one directory.
func Fold(name string) string {
	if isASCII(name) {
		return strings.ToUpper(name)
	}
	var sb strings.Builder
	for i := 0; i < len(name); {
		r, n := utf8.DecodeRuneInString(name[i:])
		if r == utf8.RuneError && n == 1 {
			sb.WriteByte(name[i])
		} else {
			sb.WriteRune(upper(r))
		}
		i += n
	}
	return sb.String()
}

// upper is the simple upper case of r. Dotless i and long s stay: their upper cases are ASCII letters, and neither
// Windows nor EDK2 takes "ı" for "i".
func upper(r rune) rune {
	if u := unicode.ToUpper(r); u >= 0x80 || r < 0x80 {
		return u
	}
	return r
}

func isASCII(s string) bool {
	for i := 0; i < len(s); i++ {
		if s[i] >= 0x80 {
			return false
		}
	}
	return true
}

// shortForm tries to write name as a short name without loss: eight and three characters, each part in one case.
func shortForm(name string) (short [11]byte, nt byte, ok bool) {
	base, ext, dot := strings.Cut(name, ".")
	if base == "" || len(base) > 8 || len(ext) > 3 || dot && ext == "" || strings.Contains(ext, ".") {
		return short, 0, false
	}
	put := func(dst []byte, s string, bit byte) bool {
		for i := range dst {
			dst[i] = ' '
		}
		hasUpper, hasLower := false, false
		for i := 0; i < len(s); i++ {
			c := s[i]
			switch {
			case c >= 'a' && c <= 'z':
				hasLower = true
				c -= 'a' - 'A'
			case c >= 'A' && c <= 'Z':
				hasUpper = true
			case c <= ' ' || c >= 0x7F || strings.IndexByte(badShortChars, c) >= 0:
				return false
			}
			dst[i] = c
		}
		if hasLower {
			nt |= bit
		}
		return !hasUpper || !hasLower
	}
	ok = put(short[:8], base, ntLowerBase) && put(short[8:], ext, ntLowerExt)
	return short, nt, ok
}

// nameSet holds the names of one directory, long and short: an alias must differ from all of both (fatgen103, "The
// Basis-Name Generation Algorithm").
type nameSet struct{ long, short map[string]bool }

func newNameSet() *nameSet { return &nameSet{map[string]bool{}, map[string]bool{}} }

// claim enters a long name and returns ErrName when the directory has it already. Every name of a directory is claimed
// before the first alias is made.
func (n *nameSet) claim(name string) error {
	k := Fold(name)
	if n.long[k] {
		return fmt.Errorf("%w: %q equals another name of its directory", ErrName, name)
	}
	n.long[k] = true
	return nil
}

// claimShort enters the short name that goes with name, and says whether it was free.
func (n *nameSet) claimShort(name string, short []byte) bool {
	k := Fold(displayPlain(short))
	if n.short[k] || n.long[k] && k != Fold(name) {
		return false
	}
	n.short[k] = true
	return true
}

// displayPlain is a short name without the case bits.
func displayPlain(short []byte) string {
	var s [slotSize]byte
	copy(s[:11], short)
	return displayShort(s[:])
}

// alias makes a short name for a long one: BASE~1 and so on, and after a few of those a base with four hexadecimal
// digits of a hash, so that thousands of similar names do not take quadratic time.
func (n *nameSet) alias(name string) ([11]byte, error) {
	clean := func(s string, max int) string {
		var b []byte
		for i := 0; i < len(s) && len(b) < max; i++ {
			c := s[i]
			switch {
			case c == ' ' || c == '.':
				continue
			case c >= 'a' && c <= 'z':
				c -= 'a' - 'A'
			case c < 0x20 || c >= 0x7F || strings.IndexByte(badShortChars, c) >= 0:
				if c&0xC0 == 0x80 {
					continue // one underscore for each character, not for each of its bytes
				}
				c = '_'
			}
			b = append(b, c)
		}
		return string(b)
	}
	stem, ext := strings.TrimLeft(name, ". "), ""
	if i := strings.LastIndexByte(stem, '.'); i >= 0 {
		stem, ext = stem[:i], clean(stem[i+1:], 3)
	}
	base := clean(stem, 6)
	if base == "" {
		base = "_"
	}
	try := func(b string) ([11]byte, bool) {
		var s [11]byte
		copy(s[:], "           ")
		copy(s[:8], b)
		copy(s[8:], ext)
		k := Fold(displayPlain(s[:]))
		return s, !n.long[k] && !n.short[k]
	}
	for i := 1; i <= 4; i++ {
		if s, ok := try(fmt.Sprintf("%s~%d", base, i)); ok {
			return s, nil
		}
	}
	for i := 0; i < 1<<16; i++ {
		h := fnv.New32a()
		fmt.Fprintf(h, "%d/%s", i, name)
		b := fmt.Sprintf("%s%04X~1", base[:min(2, len(base))], h.Sum32()&0xFFFF)
		if s, ok := try(b); ok {
			return s, nil
		}
	}
	return [11]byte{}, fmt.Errorf("cannot make a short name for %q: every candidate is taken", name)
}

// newGroup makes the slots of an entry whose name was claimed. With template (slots from this or another volume) its
// bytes are kept, and its short name too where the directory's other names allow; without, attributes and times come
// from meta and a short name is made.
func (n *nameSet) newGroup(name string, template []byte, meta Meta, dir bool) ([]byte, error) {
	var group []byte
	if template != nil {
		group = append([]byte(nil), template...)
		short := group[len(group)-slotSize:]
		if !n.claimShort(name, short) {
			if len(group) == slotSize {
				return nil, fmt.Errorf("%w: %q equals the short name of another file of its directory", ErrName, name)
			}
			alias, err := n.alias(name)
			if err != nil {
				return nil, err
			}
			copy(short, alias[:])
			short[offNTRes] &^= ntNoShort   // now it has one
			putLongName(group, units(name)) // the new alias has another checksum
			n.claimShort(name, short)
		}
	} else {
		if err := CheckName(name); err != nil {
			return nil, err
		}
		short, nt, ok := shortForm(name)
		slots := 1
		if !ok {
			var err error
			if short, err = n.alias(name); err != nil {
				return nil, err
			}
			slots += (len(units(name)) + longUnits - 1) / longUnits
			nt = 0
		}
		if !n.claimShort(name, short[:]) {
			return nil, fmt.Errorf("%w: %q equals the short name of another file of its directory", ErrName, name)
		}
		group = make([]byte, slots*slotSize)
		s := group[len(group)-slotSize:]
		copy(s, short[:])
		s[offNTRes] = nt
		meta.put(s)
		if slots > 1 {
			putLongName(group, units(name))
		}
	}
	s := group[len(group)-slotSize:]
	if dir {
		s[offAttr] |= AttrDir
	} else {
		s[offAttr] &^= AttrDir
	}
	return group, nil
}

// Meta is what a new entry says besides its name, place and size. A zero time is stored as zero, which is legal.
type Meta struct {
	Attr                        byte // AttrReadOnly, AttrHidden, AttrSystem and AttrArchive
	Created, Modified, Accessed time.Time
}

func (m Meta) put(s []byte) {
	le := binary.LittleEndian
	s[offAttr] = m.Attr & (AttrReadOnly | AttrHidden | AttrSystem | AttrArchive)
	if !m.Created.IsZero() {
		d, t, tenth := encodeTime(m.Created)
		le.PutUint16(s[offCrtDate:], d)
		le.PutUint16(s[offCrtTime:], t)
		s[offCrtTenth] = tenth
	}
	if !m.Modified.IsZero() {
		d, t, _ := encodeTime(m.Modified)
		le.PutUint16(s[offWrtDate:], d)
		le.PutUint16(s[offWrtTime:], t)
	}
	if !m.Accessed.IsZero() {
		d, _, _ := encodeTime(m.Accessed)
		le.PutUint16(s[offAccDate:], d)
	}
}
