// Package bls reads what a boot loader of the Boot Loader Specification (UAPI.1) reads: the names of entries with their
// boot counters, text entries (type 1), unified kernel images (type 2, UAPI.5) and loader.conf; and it says in which
// order systemd-boot shows them, and which one it starts when nobody touches the keyboard.
//
// Where the specification leaves something open, systemd-boot decides (boot.c, pe.c and efi-string.c in src/boot of
// systemd 252 to 261). The package opens no files and knows nothing of FAT: its callers hand it names, texts and readers.
package bls

import (
	"fmt"
	"math"
	"strconv"
	"strings"
)

// State says what boot counting knows of an entry (UAPI.1, "Boot counting").
type State int

// The states of an entry.
const (
	Good          State = iota // it has no counter
	Indeterminate              // tries are left
	Bad                        // all tries were used up
)

func (s State) String() string {
	switch s {
	case Good:
		return "good"
	case Indeterminate:
		return "indeterminate"
	}
	return "bad"
}

// Counter is the boot counter in a name. A count that is not written, DONE of "+LEFT", is 0. Of one that was parsed, each
// count keeps the number of its digits when it is changed, as far as they suffice, so that the name stays as long.
type Counter struct {
	Present    bool
	Left, Done uint // boots

	left, done int // digits; 0 where the count is not written, or not from a name
}

// String returns the counter as it stands in the name: "", "+LEFT" or "+LEFT-DONE".
func (c Counter) String() string {
	switch {
	case !c.Present:
		return ""
	case c.done == 0 && c.Done == 0:
		return fmt.Sprintf("+%0*d", c.left, c.Left)
	}
	return fmt.Sprintf("+%0*d-%0*d", c.left, c.Left, c.done, c.Done)
}

// Name is the file name of an entry, taken apart.
type Name struct {
	Base    string // without counter and suffix
	Counter Counter
	Suffix  string // ".conf" or ".efi", in the case that it is written in
}

// The suffixes of entries, and of the directories beside a UKI.
const (
	suffixType1 = ".conf"
	suffixType2 = ".efi"
	suffixExtra = ".extra.d"
)

// cutSuffix cuts a suffix off, whatever the case of its letters.
func cutSuffix(s, suffix string) (before, found string, ok bool) {
	at := len(s) - len(suffix)
	if at < 0 || lower(s[at:]) != suffix {
		return s, "", false
	}
	return s[:at], s[at:], true
}

// lower makes ASCII letters small, and leaves all others alone, as systemd-boot does with names and patterns.
func lower(s string) string {
	return strings.Map(func(r rune) rune {
		if 'A' <= r && r <= 'Z' {
			return r + 'a' - 'A'
		}
		return r
	}, strings.ToValidUTF8(s, "\uFFFD"))
}

// ParseName takes the file name of an entry apart; false when a boot loader takes no file of that name for one: its suffix
// is neither .conf nor .efi, or it begins with "." or "auto-". What is behind the last "+" is a counter when it is LEFT or
// LEFT-DONE in digits, each at most 2³¹-1, and the suffix follows at once; otherwise it belongs to the name.
func ParseName(name string) (Name, bool) {
	rest, suffix, ok := cutSuffix(name, suffixType1)
	if !ok {
		if rest, suffix, ok = cutSuffix(name, suffixType2); !ok {
			return Name{}, false
		}
	}
	if strings.HasPrefix(name, ".") || strings.HasPrefix(lower(name), "auto-") {
		return Name{}, false
	}
	n := Name{Base: rest, Suffix: suffix}
	if at := strings.LastIndexByte(rest, '+'); at >= 0 {
		if c, ok := parseCounter(rest[at+1:]); ok {
			n.Base, n.Counter = rest[:at], c
		}
	}
	return n, true
}

func parseCounter(s string) (Counter, bool) {
	left, done, both := strings.Cut(s, "-")
	c := Counter{Present: true, left: len(left), done: len(done)}
	var ok bool
	if c.Left, ok = parseTries(left); !ok {
		return Counter{}, false
	}
	if both {
		if c.Done, ok = parseTries(done); !ok {
			return Counter{}, false
		}
	}
	return c, true
}

func parseTries(s string) (uint, bool) {
	if s == "" || strings.Trim(s, "0123456789") != "" {
		return 0, false
	}
	u, err := strconv.ParseUint(s, 10, 64)
	return uint(u), err == nil && u <= math.MaxInt32
}

// State says what boot counting knows of the entry.
func (n Name) State() State {
	switch {
	case !n.Counter.Present:
		return Good
	case n.Counter.Left > 0:
		return Indeterminate
	}
	return Bad
}

// String returns the file name as it was parsed.
func (n Name) String() string { return n.Base + n.Counter.String() + n.Suffix }

// Good returns the file name without the counter: what blessing the entry makes of it.
func (n Name) Good() string { return n.Base + n.Suffix }

// Key identifies the entry: two names with one key are the same entry in different states. It is the name without the
// counter, its ASCII letters small: what systemd-boot calls the entry since systemd 258 (pull request 38897). Case beyond ASCII, which the
// specification bars from names, is the file system's matter.
func (n Name) Key() string { return lower(n.Good()) }

// Initial returns the file name with the count that the entry began with: each try took one from LEFT and gave it to
// DONE, so that there were LEFT+DONE. Each count keeps the number of its digits, and DONE is written where it was: the
// name stays as long, and so does the group of directory entries that holds it. Only a sum that has no room in the digits
// of LEFT makes it longer, as where a loader that does not pad made "+10" into "+9-1". A name without a counter is
// returned as it is, and "+0" too, of which nothing says how many there were.
func (n Name) Initial() string {
	n.Counter.Left, n.Counter.Done = n.Counter.Left+n.Counter.Done, 0
	return n.String()
}

// ExtraDir returns the name of the directory beside a UKI that holds its add-ons, credentials and extensions:
// "NAME.efi.extra.d", without a counter, as the image is renamed on each boot and the directory is not:
// systemd-stub(7) since 255 (pull request 29636). It is empty for a type 1 entry, whose companions are listed by its `extra` keys.
func (n Name) ExtraDir() string {
	if lower(n.Suffix) != suffixType2 {
		return ""
	}
	return n.Good() + suffixExtra
}

// ParseExtraDir returns the name of the image that a directory beside it belongs to; false when it is not named like one
// of those. Of systems that name it after the image as it was installed, it has the counter.
func ParseExtraDir(dir string) (Name, bool) {
	rest, _, ok := cutSuffix(dir, suffixExtra)
	if !ok {
		return Name{}, false
	}
	n, ok := ParseName(rest)
	return n, ok && lower(n.Suffix) == suffixType2
}
