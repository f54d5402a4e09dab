package exfat

import "fmt"

// Up-case table: section 7.2.5. Part of the on-disk format.
const (
	upcaseUnits = 1 << 16
	upcaseSkip  = 0xFFFF // the next unit says how many map to themselves
	maxUpcase   = upcaseUnits * 2
)

// upcase maps each UTF-16 unit to its upper case.
type upcase [upcaseUnits]uint16

// newUpcase is the table that maps nothing but a…z, which every table has to (7.2.5, table 24).
func newUpcase() *upcase {
	t := new(upcase)
	for i := range t {
		t[i] = uint16(i)
	}
	for c := 'a'; c <= 'z'; c++ {
		t[c] = uint16(c) - 'a' + 'A'
	}
	return t
}

// parse reads a table, compressed or not.
func (t *upcase) parse(b []byte) error {
	if len(b)%2 != 0 {
		return fmt.Errorf("the up-case table has %d bytes", len(b))
	}
	at := 0
	for i := 0; i < len(b); i += 2 {
		c := le.Uint16(b[i:])
		if c == upcaseSkip && i+2 < len(b) {
			i += 2
			n := int(le.Uint16(b[i:]))
			if at+n > upcaseUnits {
				return fmt.Errorf("the up-case table has more than %d units", upcaseUnits)
			}
			for ; n > 0; n-- {
				t[at] = uint16(at)
				at++
			}
			continue
		}
		if at == upcaseUnits {
			return fmt.Errorf("the up-case table has more than %d units", upcaseUnits)
		}
		t[at] = c
		at++
	}
	for c := range uint16(128) {
		want := c
		if c >= 'a' && c <= 'z' {
			want -= 'a' - 'A'
		}
		if t[c] != want {
			return fmt.Errorf("the up-case table maps 0x%04x to 0x%04x, want 0x%04x", c, t[c], want)
		}
	}
	return nil
}

// fold is the key under which a name is compared: two names with one key cannot be in one directory.
func (t *upcase) fold(u []uint16) string {
	b := make([]byte, 0, 2*len(u))
	for _, c := range u {
		b = le.AppendUint16(b, t[c])
	}
	return string(b)
}

// nameHash is the hash over the upper case of a name (7.6.4, figure 4), from its fold.
func nameHash(folded string) uint16 {
	var h uint16
	for i := 0; i < len(folded); i++ {
		h = h<<15 | h>>1
		h += uint16(folded[i])
	}
	return h
}

// tableChecksum is the sum over the bytes of the table (7.2.2, figure 3).
func tableChecksum(b []byte) uint32 {
	var sum uint32
	for _, c := range b {
		sum = sum<<31 | sum>>1
		sum += uint32(c)
	}
	return sum
}
