package bls

import (
	"cmp"
	"strings"
)

// CompareVersions compares two versions by UAPI.10, "Version Comparison": negative when a is the older one, 0 when they
// are equal, which they may be without being the same. Where text and examples of the specification's versions differ, it
// is systemd's strverscmp_improved: "~" sorts below the end of the string, "^" above "-" and below ".", and digits above
// letters.
func CompareVersions(a, b string) int {
	for {
		a, b = strings.TrimLeftFunc(a, separator), strings.TrimLeftFunc(b, separator)
		if d := prefixed(&a, &b, '~'); d != 0 {
			return d
		}
		if a == "" || b == "" {
			return cmp.Compare(min(len(a), 1), min(len(b), 1))
		}
		for _, c := range []byte("-^.") {
			if d := prefixed(&a, &b, c); d != 0 {
				return d
			}
		}
		number := startsWith(a, digit) || startsWith(b, digit)
		kind := letter
		if number {
			kind = digit
		}
		x, y := prefix(&a, kind), prefix(&b, kind)
		if number {
			if d := cmp.Compare(min(len(x), 1), min(len(y), 1)); d != 0 {
				return d
			}
			// Without leading zeros the longer number is the larger one: it need not fit into an integer.
			x, y = strings.TrimLeft(x, "0"), strings.TrimLeft(y, "0")
			if d := cmp.Compare(len(x), len(y)); d != 0 {
				return d
			}
		}
		if d := cmp.Compare(x, y); d != 0 {
			return d
		}
	}
}

func digit(r rune) bool  { return '0' <= r && r <= '9' }
func letter(r rune) bool { return 'a' <= r && r <= 'z' || 'A' <= r && r <= 'Z' }

func separator(r rune) bool { return !digit(r) && !letter(r) && !strings.ContainsRune("-.~^", r) }

func startsWith(s string, kind func(rune) bool) bool { return s != "" && kind(rune(s[0])) }

// prefixed compares by whether one of the strings begins with c, which makes it the lower one, and cuts c off both.
func prefixed(a, b *string, c byte) int {
	x, y := strings.HasPrefix(*a, string(c)), strings.HasPrefix(*b, string(c))
	switch {
	case x && !y:
		return -1
	case y && !x:
		return 1
	case x:
		*a, *b = (*a)[1:], (*b)[1:]
	}
	return 0
}

// prefix cuts the leading characters of a kind off.
func prefix(s *string, kind func(rune) bool) string {
	rest := strings.TrimLeftFunc(*s, kind)
	p := (*s)[:len(*s)-len(rest)]
	*s = rest
	return p
}
