package replicate

import (
	"bytes"
	"cmp"
	"errors"
	"fmt"
	"io"
	"maps"
	"path"
	"slices"
	"strings"
	"time"
	"unicode"

	"espmirror/fatdriver"
)

// SetPath is where every member of a replica set has the file that describes the set.
const SetPath = "loader/esp-sync"

// MaxSetSize bounds the replica set file, in bytes.
const MaxSetSize = 64 << 10

// maxName and maxText bound NAME and TEXT of a replace line, in bytes. A kernel's whole command line has 4 KiB at most; and
// as both stand in the place of one another as often as a loader entry has room for, what comes of one must stay small.
const (
	maxName = 64
	maxText = 4 << 10
)

// ErrSet is returned when a replica set file cannot be meant as it is. Who cannot read the set must not write.
var ErrSet = errors.New("cannot read the replica set file")

// Set is a replica set file: which ESPs belong together, and what goes between them.
//
// The format is that of loader.conf (man 5 loader.conf): a line is a key, white space, and a value to the end of the line.
//
//	member GUID               an ESP of the set, by its partition GUID; a GUID alone on a line means the same
//	select PATH               in place of the default selection; may be repeated, as may the next one
//	exclude PATH-OR-PATTERN
//	replace NAME GUID TEXT    what stands for NAME in the loader entries of that member; 64 bytes and 4 KiB at most
//	timeout TIME              how long to wait for members: 10s, 2min, a number of seconds
//	keep-free SIZE            what must stay free on each member: 16M, 1G
//
// A line that begins with # is a comment, and so is all that follows a # behind white space, in every value: nobody who
// writes a note behind a pattern means it to be part of it, and a pattern that matches nothing would let through what was
// to stay out. A value that has such a # in it, or white space at an end, stands in double quotes as in loader.conf.
//
// What a mistake could do decides what it is. Where something could be written that was not meant, or would go without
// notice, it is an error: a GUID that is none, a text for a partition that is no member, a selection without a path, a key
// that is a slip of the pen for a known one (`exlude`). An unknown key is a warning, since a later version may know it; and
// so is a timeout that cannot be read, because nothing on a disk depends on it.
type Set struct {
	name     string
	bom      string
	lines    []setLine
	members  []string
	sel      Selection
	timeout  *time.Duration
	keepFree *int64
	texts    map[string]map[string]string // GUID, NAME
	unknown  []string
	warnings []string
}

// setLine is a line of the file, byte for byte, and what Add and Remove must know of it.
type setLine struct {
	text, end string // end is "\n", "\r\n", "\r", or "" at the end of the file
	key       string // "member" also for a GUID alone; "" for a comment and for an empty line
	guid      string // of member and replace
}

// setKeys are the keys of the format. A new one must differ from the others by three letters or more, or versions that do not
// know it yet take it for a slip of the pen.
var setKeys = []string{"member", "select", "exclude", "replace", "timeout", "keep-free"}

// ParseSet reads a replica set file; name is what errors call it. It returns ErrSet with the number of the line.
func ParseSet(name string, text []byte) (*Set, error) {
	s := &Set{name: name, texts: map[string]map[string]string{}}
	fail := func(err error) (*Set, error) { return nil, fmt.Errorf("%w %s: %w", ErrSet, name, err) }
	if len(text) > MaxSetSize {
		return fail(fmt.Errorf("it has %d bytes, at most %d are read", len(text), MaxSetSize))
	}
	// UTF-16 has zero bytes, and so has what a power cut made of a file on a mounted FAT.
	if i := bytes.IndexByte(text, 0); i >= 0 {
		return fail(fmt.Errorf("there is a zero byte at offset 0x%x: it is no text", i))
	}
	rest := string(text)
	if r, ok := strings.CutPrefix(rest, "\ufeff"); ok {
		s.bom, rest = "\ufeff", r
	}
	firsts := map[string]int{} // NAME and GUID of replace → line
	for n := 1; rest != ""; n++ {
		l := setLine{text: rest}
		if i := strings.IndexAny(rest, "\r\n"); i >= 0 {
			l.text, l.end = rest[:i], rest[i:i+1]
			if strings.HasPrefix(rest[i:], "\r\n") {
				l.end = "\r\n"
			}
		}
		rest = rest[len(l.text)+len(l.end):]
		if err := s.readLine(&l, n, firsts); err != nil {
			return fail(fmt.Errorf("line %d: %w", n, err))
		}
		s.lines = append(s.lines, l)
	}
	for i, l := range s.lines {
		if l.key == "replace" && !s.Has(l.guid) {
			return fail(fmt.Errorf("line %d: a text for %s, which is not a member", i+1, l.guid))
		}
	}
	for _, g := range s.members {
		if names := s.Incomplete(g); len(names) > 0 {
			s.warnings = append(s.warnings, fmt.Sprintf("member %s has no text for %s", g, strings.Join(names, ", ")))
		}
	}
	return s, nil
}

const setSpace = " \t\v\f"

// cutWord takes the first word off a line.
func cutWord(s string) (word, rest string) {
	s = strings.TrimLeft(s, setSpace)
	i := strings.IndexAny(s, setSpace)
	if i < 0 {
		return s, ""
	}
	return s[:i], strings.TrimLeft(s[i:], setSpace)
}

// setValue takes the comment and the quotes off a value.
func setValue(s string) (string, error) {
	s = strings.Trim(s, setSpace)
	if rest, quoted := strings.CutPrefix(s, `"`); quoted {
		v, rest, ok := strings.Cut(rest, `"`)
		if !ok {
			return "", errors.New("the closing quotation mark is missing")
		}
		if rest != "" && !strings.ContainsRune(setSpace, rune(rest[0])) {
			return "", errors.New("something follows the closing quotation mark")
		}
		if rest = strings.TrimLeft(rest, setSpace); rest != "" && rest[0] != '#' {
			return "", errors.New("something follows the closing quotation mark")
		}
		return v, nil
	}
	for i := range len(s) {
		if s[i] == '#' && (i == 0 || strings.IndexByte(setSpace, s[i-1]) >= 0) {
			s = s[:i]
			break
		}
	}
	return strings.TrimRight(s, setSpace), nil
}

// parseGUID returns a GUID in lower case.
func parseGUID(s string) (string, error) {
	s = strings.ToLower(s)
	ok := len(s) == 36
	zero := true
	for i := 0; ok && i < len(s); i++ {
		switch i {
		case 8, 13, 18, 23:
			ok = s[i] == '-'
		default:
			ok = strings.IndexByte("0123456789abcdef", s[i]) >= 0
			zero = zero && s[i] == '0'
		}
	}
	if !ok {
		return "", fmt.Errorf("%q is not a partition GUID", s)
	}
	if zero {
		return "", fmt.Errorf("%s is the GUID of no partition", s)
	}
	return s, nil
}

// looksLikeGUID says whether somebody who wrote this word meant a GUID.
func looksLikeGUID(word string) bool {
	w := strings.Trim(word, "{}")
	return len(w) > 8 && strings.Contains(w, "-") && strings.Trim(strings.ToLower(w), "0123456789abcdef-") == ""
}

func (s *Set) warn(line int, format string, a ...any) {
	s.warnings = append(s.warnings, fmt.Sprintf("line %d: %s", line, fmt.Sprintf(format, a...)))
}

func (s *Set) readLine(l *setLine, n int, firsts map[string]int) error {
	word, rest := cutWord(l.text)
	if word == "" || word[0] == '#' {
		return nil
	}
	key := strings.ToLower(word)
	known := slices.Contains(setKeys, key)
	if !known {
		if _, err := parseGUID(word); err == nil || looksLikeGUID(word) {
			key, known, rest = "member", true, word+" "+rest
		}
	}
	if !known {
		if meant := meantKey(key); meant != "" {
			return fmt.Errorf("there is no key %q; write %q and a space, or make the line a comment", word, meant)
		}
		l.key = key
		u := fmt.Sprintf("line %d: unknown key %q", n, word)
		s.unknown, s.warnings = append(s.unknown, u), append(s.warnings, u)
		return nil
	}
	l.key = key
	if key == "replace" {
		return s.readReplace(l, rest, n, firsts)
	}
	v, err := setValue(rest)
	if err == nil && v == "" && key != "timeout" {
		err = errors.New("the value is missing")
	}
	if err != nil {
		return fmt.Errorf("%s: %w", key, err)
	}
	if (key == "select" || key == "exclude") && strings.ContainsAny(v, setSpace) && !strings.HasPrefix(rest, `"`) {
		s.warn(n, "%s: %q is taken for one path; write it in quotes, or one path to a line", key, v)
	}
	switch key {
	case "member":
		if l.guid, err = parseGUID(v); err != nil {
			return err
		}
		if s.Has(l.guid) {
			s.warn(n, "member %s is there already", l.guid)
			return nil
		}
		s.members = append(s.members, l.guid)
	case "select":
		p, err := cleanPath(v)
		if err == nil {
			err = (&selection{byName: map[string]bool{}}).selectPath(p)
		}
		if err != nil {
			return err
		}
		s.sel.Select = append(s.sel.Select, v)
	case "exclude":
		p, err := cleanPath(v)
		if err != nil {
			return err
		}
		if _, err := path.Match(fatdriver.Fold(p), ""); err != nil || p == "" {
			return fmt.Errorf("%q is not a path or pattern", v)
		}
		s.sel.Exclude = append(s.sel.Exclude, v)
	case "timeout":
		d, err := ParseTime(v)
		if err == nil && d > maxTimeout {
			err = fmt.Errorf("%s is longer than a day", v)
		}
		switch {
		case err != nil:
			s.warn(n, "timeout: %v; the line is passed over", err)
		case s.timeout != nil && *s.timeout != d:
			s.warn(n, "timeout: it is given twice, and the last one counts")
			fallthrough
		default:
			s.timeout = &d
		}
	case "keep-free":
		b, err := ParseSize(v)
		if err != nil {
			return fmt.Errorf("keep-free: %w", err)
		}
		if s.keepFree != nil && *s.keepFree != b {
			s.warn(n, "keep-free: it is given twice, and the larger one counts")
			b = max(b, *s.keepFree)
		}
		s.keepFree = &b
	}
	return nil
}

func (s *Set) readReplace(l *setLine, rest string, n int, firsts map[string]int) error {
	name, rest := cutWord(rest)
	guid, rest := cutWord(rest)
	text, err := setValue(rest)
	if err != nil {
		return fmt.Errorf("replace: %w", err)
	}
	if name == "" || name[0] == '#' || guid == "" || text == "" {
		return errors.New("replace: it takes a name, the GUID of a member, and a text")
	}
	if len(name) > maxName {
		return fmt.Errorf("replace: the name has %d bytes, at most %d are read", len(name), maxName)
	}
	if len(text) > maxText {
		return fmt.Errorf("replace: the text for %s has %d bytes, at most %d are read", name, len(text), maxText)
	}
	if strings.ContainsFunc(name, func(r rune) bool {
		return r >= 0x80 || !unicode.IsLetter(r) && !unicode.IsDigit(r) && !strings.ContainsRune("._-", r)
	}) {
		return fmt.Errorf("replace: %q is not a name of letters, digits, and . _ -", name)
	}
	if l.guid, err = parseGUID(guid); err != nil {
		return fmt.Errorf("replace: %w", err)
	}
	if first, ok := firsts[name+" "+l.guid]; ok {
		return fmt.Errorf("replace: the text for %s of %s is in line %d already", name, l.guid, first)
	}
	firsts[name+" "+l.guid] = n
	m := s.texts[l.guid]
	if m == nil {
		m = map[string]string{}
		s.texts[l.guid] = m
	}
	for other, t := range m {
		if t == text {
			return fmt.Errorf("replace: %s has the text of %s, and nobody could tell the two apart", name, other)
		}
	}
	m[name] = text
	return nil
}

// meantKey is the known key that somebody meant who wrote another one, "" when none is near.
func meantKey(key string) string {
	word := key
	if i := strings.IndexAny(key, "=:"); i > 0 {
		word = key[:i]
	}
	for _, k := range setKeys {
		if distance(word, k) <= 2 {
			return k
		}
	}
	return ""
}

// distance is the number of letters to change, add, leave out or swap with their neighbour between two words.
func distance(a, b string) int {
	if max(len(a), len(b))-min(len(a), len(b)) > 2 {
		return 3 // far enough for who asks
	}
	d := make([][]int, len(a)+1)
	for i := range d {
		d[i] = make([]int, len(b)+1)
		d[i][0] = i
	}
	for j := range d[0] {
		d[0][j] = j
	}
	for i := 1; i <= len(a); i++ {
		for j := 1; j <= len(b); j++ {
			change := 1
			if a[i-1] == b[j-1] {
				change = 0
			}
			d[i][j] = min(d[i-1][j]+1, d[i][j-1]+1, d[i-1][j-1]+change)
			if i > 1 && j > 1 && a[i-1] == b[j-2] && a[i-2] == b[j-1] {
				d[i][j] = min(d[i][j], d[i-2][j-2]+1)
			}
		}
	}
	return d[len(a)][len(b)]
}

// maxTimeout is longer than any boot waits for a disk.
const maxTimeout = 24 * time.Hour

// Bytes returns the file. That of a set that was not changed is what ParseSet read.
func (s *Set) Bytes() []byte {
	b := []byte(s.bom)
	for _, l := range s.lines {
		b = append(append(b, l.text...), l.end...)
	}
	return b
}

// Members lists the partition GUIDs of the members in lower case, in the order of the file.
func (s *Set) Members() []string { return slices.Clone(s.members) }

// Has says whether a partition is a member.
func (s *Set) Has(guid string) bool { return slices.Contains(s.members, strings.ToLower(guid)) }

// Selection is what is replicated. It is the default selection when the file selects nothing.
func (s *Set) Selection() Selection {
	return Selection{Select: slices.Clone(s.sel.Select), Exclude: slices.Clone(s.sel.Exclude)}
}

// Timeout is how long to wait for members, and whether the file says so.
func (s *Set) Timeout() (time.Duration, bool) {
	if s.timeout == nil {
		return 0, false
	}
	return *s.timeout, true
}

// KeepFree is the number of bytes that must stay free on a member, and whether the file says so.
func (s *Set) KeepFree() (int64, bool) {
	if s.keepFree == nil {
		return 0, false
	}
	return *s.keepFree, true
}

// Texts are the texts that stand for each NAME in the loader entries of a member.
func (s *Set) Texts(guid string) map[string]string { return maps.Clone(s.texts[strings.ToLower(guid)]) }

// Incomplete lists the NAMEs for which another member has a text and this one has none. What is copied to it would have
// the other's text in it, so it is better neither source nor target; the others are not affected.
func (s *Set) Incomplete(guid string) []string {
	own := s.texts[strings.ToLower(guid)]
	missing := map[string]bool{}
	for _, m := range s.texts {
		for name := range m {
			if _, ok := own[name]; !ok {
				missing[name] = true
			}
		}
	}
	return slices.Sorted(maps.Keys(missing))
}

// Unknown lists the keys that this version does not know, with the numbers of their lines. The lines stay in the file.
func (s *Set) Unknown() []string { return slices.Clone(s.unknown) }

// Warnings lists everything in the file that is probably not as it was meant and can do no harm, unknown keys included.
func (s *Set) Warnings() []string { return slices.Clone(s.warnings) }

// Add puts a member behind the last one, with a comment in its line. Everything else in the file stays byte for byte. It
// says whether the partition was not a member before. Texts for it have to be added by hand: see Incomplete.
func (s *Set) Add(guid, comment string) (bool, error) {
	guid, err := parseGUID(guid)
	if err != nil {
		return false, fmt.Errorf("cannot add a member to %s: %w", s.name, err)
	}
	if s.Has(guid) {
		return false, nil
	}
	text := "member " + guid
	comment = strings.Map(func(r rune) rune {
		if unicode.IsControl(r) {
			return ' ' // a comment must not become a line
		}
		return r
	}, comment)
	if comment = strings.TrimSpace(comment); comment != "" {
		text += " # " + comment
	}
	at := len(s.lines)
	for i, l := range s.lines {
		if l.key == "member" {
			at = i + 1
		}
	}
	// The ending of the line before is the one that cannot join with what follows into another ending.
	end := "\n"
	for _, l := range s.lines[:at] {
		if l.end != "" {
			end = l.end
		}
	}
	added := setLine{text: text, end: end}
	lines := slices.Clone(s.lines)
	if at > 0 && lines[at-1].end == "" {
		lines[at-1].end, added.end = end, "" // a file without a final newline stays one
	}
	if err := s.replaceLines(slices.Insert(lines, at, added)); err != nil {
		return false, fmt.Errorf("cannot add a member to %s: %w", s.name, err)
	}
	return true, nil
}

// Remove takes a member out, with the texts for it. Everything else in the file stays byte for byte. It says whether the
// partition was a member.
func (s *Set) Remove(guid string) bool {
	guid = strings.ToLower(guid)
	if !s.Has(guid) {
		return false
	}
	lines := slices.DeleteFunc(slices.Clone(s.lines), func(l setLine) bool { return l.guid == guid })
	return s.replaceLines(lines) == nil // less of what could be read can be read
}

// replaceLines makes the set what the lines say.
func (s *Set) replaceLines(lines []setLine) error {
	changed, err := ParseSet(s.name, (&Set{bom: s.bom, lines: lines}).Bytes())
	if err == nil {
		*s = *changed
	}
	return err
}

// wordByte says whether a byte belongs to a word: a text is not replaced where a word goes on beside it. Among others
// = : , / " and white space end a word, so the text for root=UUID=aaaa is found in "root=UUID=aaaa rw", aaaa in
// "/dev/disk/by-uuid/aaaa", and neither in "root=UUID=aaaab" or "root=UUID=aaaa-bbbb".
func wordByte(b byte) bool {
	return b >= 0x80 || b >= '0' && b <= '9' || b|0x20 >= 'a' && b|0x20 <= 'z' || strings.IndexByte("_-.+~@", b) >= 0
}

// namedText is a text with what it stands for.
type namedText struct{ name, text string }

// word is the length of the word that a text begins with, 0 where it begins with another byte.
func word[T string | []byte](s T) int {
	n := 0
	for n < len(s) && wordByte(s[n]) {
		n++
	}
	return n
}

// eachText calls found for every text in its place, from the left and the longest one first, and other for every byte
// between them, until one of them returns false.
func eachText(text []byte, texts map[string]string, found func(namedText) bool, other func(byte) bool) {
	// A text stands only where a word of the entry begins that is its own first word, or else a byte that is its first
	// one. So few are to be compared, however many a member has.
	first := map[string][]namedText{}
	for name, t := range texts {
		if t != "" {
			k := t[:max(1, word(t))]
			first[k] = append(first[k], namedText{name, t})
		}
	}
	for _, of := range first {
		slices.SortFunc(of, func(a, b namedText) int {
			return cmp.Or(cmp.Compare(len(b.text), len(a.text)), cmp.Compare(a.name, b.name))
		})
	}
next:
	for i := 0; i < len(text); {
		if len(first) > 0 && (i == 0 || !wordByte(text[i-1])) {
			for _, t := range first[string(text[i:i+max(1, word(text[i:]))])] {
				end := i + len(t.text)
				if end <= len(text) && string(text[i:end]) == t.text && (end == len(text) || !wordByte(text[end])) {
					if !found(t) {
						return
					}
					i = end
					continue next
				}
			}
		}
		if !other(text[i]) {
			return
		}
		i++
	}
}

// Rewrite turns the text of one member's loader entry into that of another: for every NAME that both have, from[NAME]
// becomes to[NAME] where it is a whole word or several. All of them are replaced at once, so what has been put in is not
// replaced again. What becomes longer than an entry may be is not worked out to its end; Faithful does not say so of it.
func Rewrite(text []byte, from, to map[string]string) []byte {
	both := map[string]string{}
	for name, t := range from {
		if _, ok := to[name]; ok {
			both[name] = t
		}
	}
	out := make([]byte, 0, len(text))
	room := func() bool { return len(out) <= max(maxEntryFile, len(text)) }
	eachText(text, both, func(t namedText) bool {
		out = append(out, to[t.name]...)
		return room()
	}, func(b byte) bool {
		out = append(out, b)
		return room()
	})
	return out
}

// Canonical puts the NAME in the place of each text of a member, so that the loader entries of all members look alike: a
// zero byte, the name, a zero byte. A zero byte of the text itself is doubled, and names are not empty, so two different
// texts never look alike for one member. Where Faithful says so,
//
//	Canonical(Rewrite(text, a, b), b) = Canonical(text, a)
func Canonical(text []byte, texts map[string]string) []byte {
	var out bytes.Buffer
	canonicalTo(&out, text, texts)
	return out.Bytes()
}

// canonicalTo writes Canonical. The writer keeps its errors, as a hash or a buffer does.
func canonicalTo(w interface {
	io.ByteWriter
	io.StringWriter
}, text []byte, texts map[string]string) {
	eachText(text, texts, func(t namedText) bool {
		_ = w.WriteByte(0)
		_, _ = w.WriteString(t.name)
		_ = w.WriteByte(0)
		return true
	}, func(b byte) bool {
		if b == 0 {
			_ = w.WriteByte(0)
		}
		_ = w.WriteByte(b)
		return true
	})
}

// Faithful says whether a loader entry can go from one member to another and back without loss. It cannot where it names
// the other member's text by itself, as an entry on the first disk that boots the second one does: on the second disk both
// would say the same, and nobody could tell any more which of the two was meant. Nor can it where it would be too long.
func Faithful(text []byte, from, to map[string]string) bool {
	out := Rewrite(text, from, to)
	return max(len(text), len(out)) <= maxEntryFile && bytes.Equal(Canonical(out, to), Canonical(text, from))
}
