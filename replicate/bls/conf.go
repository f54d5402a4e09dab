package bls

// Conf is what loader/loader.conf says about the entry to start (loader.conf(5)). Both are patterns for Entry.ID, in small
// letters; "@saved" is the entry that was started last.
type Conf struct {
	Default   string
	Preferred string // since systemd 260: tried before Default, and never an entry that is bad
}

// ParseConf reads a loader.conf. Nothing is an error; of a key that stands twice, the last counts.
func ParseConf(text string) Conf {
	var c Conf
	for _, f := range fields(text, " \t") {
		v := lower(f.value)
		if v != "" && v[0] == '@' && v != saved {
			continue // no special entry of that name, and it is ignored
		}
		switch f.key {
		case "default":
			c.Default = v
		case "preferred":
			c.Preferred = v
		}
	}
	return c
}

// saved stands for the entry that was started last.
const saved = "@saved"

// match says whether a pattern matches an ID: systemd-boot's efi_fnmatch, where "*", "?", sets with ranges and "\" before
// any character are what fnmatch(3) has them be, and there are no sets with "!". A pattern with a set that does not end, or
// with "\" at the end, matches nothing.
func match(pattern, id string) bool {
	p, s := []rune(pattern), []rune(id)
	star, back := -1, 0 // where the pattern goes on behind the last "*", and what that has matched up to
	for pi, si := 0, 0; ; {
		if pi < len(p) && p[pi] == '*' {
			pi++
			star, back = pi, si
			continue
		}
		if pi == len(p) && si == len(s) {
			return true
		}
		if si < len(s) {
			if n, ok := matchOne(p[pi:], s[si]); ok {
				pi, si = pi+n, si+1
				continue
			}
		}
		if star < 0 || back >= len(s) {
			return false
		}
		back++
		pi, si = star, back
	}
}

// matchOne says whether the first element of a pattern, which is not "*", matches a character, and how long it is.
func matchOne(p []rune, c rune) (n int, ok bool) {
	if len(p) == 0 {
		return 0, false
	}
	switch p[0] {
	case '?':
		return 1, true
	case '\\':
		return 2, len(p) > 1 && p[1] == c
	case '[':
		return matchSet(p, c)
	}
	return 1, p[0] == c
}

func matchSet(p []rune, c rune) (n int, ok bool) {
	ranges := true // whether "-" may make a range with what is in front of it
	for i := 1; i < len(p); i++ {
		switch {
		case p[i] == ']' && i > 1:
			return i + 1, ok
		case p[i] == '-' && ranges && i > 1 && i+1 < len(p) && p[i+1] != ']':
			low := p[i-1]
			if i++; p[i] == '\\' {
				i++
			}
			if i == len(p) {
				return 0, false
			}
			ok = ok || low <= c && c <= p[i]
			ranges = false
			continue
		case p[i] == '\\':
			if i++; i == len(p) {
				return 0, false
			}
		}
		ok = ok || p[i] == c
		ranges = true
	}
	return 0, false
}
