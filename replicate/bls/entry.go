package bls

import (
	"iter"
	"strconv"
	"strings"
)

// Ref is a file that an entry names.
type Ref struct {
	Key  string // of the line: linux, initrd, efi, uki, devicetree, devicetree-overlay or extra
	Path string // relative to the root of the entry's partition, with "/" between the parts and none in front
	Line int    // counted from 1
}

// Entry is a line of the boot menu: a type 1 entry, or one profile of a type 2 entry (UAPI.1, "Boot Loader Entries").
type Entry struct {
	// Path is that of the file, as Parse or PE.Entries was given it, and Name its last part, taken apart.
	Path string
	Name Name
	// ID is what loader.conf and the EFI variables call the entry: the file name with the suffix, without the counter and
	// in small letters; "@" and the profile follow for the second and later profiles of a UKI.
	ID string

	Title, Version, MachineID, SortKey string
	Architecture                       string   // as UEFI spells it, in any case: "x64", "AA64"; "" for any
	Options                            []string // of all lines, in order
	Files                              []Ref    // of all lines, in order

	// Loader is the key that says what is started: linux, efi, uki or uki-url; image for type 2; "" when there is none.
	Loader  string
	Profile uint // of a UKI, from 0

	hidden  bool   // systemd-boot leaves the entry out
	ownID   string // ID with the counter, which was the ID before systemd 258
	imageID string // ID without profile
}

// Hidden says whether systemd-boot shows no such entry on any machine: it has no key, or several different ones, that say
// what to start, or a file name that is not that of an entry.
func (e *Entry) Hidden() bool { return e.hidden }

// image is Entry.Loader of a type 2 entry.
const image = "image"

// Parse reads a type 1 entry (UAPI.1, "Type #1 Boot Loader Entry Keys"). path is that of the file, whose last part gives
// the ID; "\" separates as "/" does. Nothing is an error: a loader passes over what it does not understand, and of a key
// that may stand once it takes the last. Keys are in small letters. Files, however, has those of every line: what an entry
// names is of use to some loader, or was to an earlier one.
//
// `initrd` may name several files in one line, as entries for GRUB do: a word that begins with "/" begins another one, so
// that a blank in a name does not. What begins with "$" is a variable of GRUB, and no file.
func Parse(path, text string) *Entry {
	e := &Entry{Path: path}
	e.setID(path)
	for n, f := range fields(text, " \t") {
		switch f.key {
		case "title":
			e.Title = f.value
		case "version":
			e.Version = f.value
		case "machine-id":
			e.MachineID = f.value
		case "sort-key":
			e.SortKey = f.value
		case "architecture":
			e.Architecture = f.value
		case "options":
			e.Options = append(e.Options, f.value)
		case "profile":
			if u, err := strconv.ParseUint(f.value, 10, 32); err == nil {
				e.Profile = uint(u)
			}
		case "linux", "efi", "uki", "uki-url":
			e.hidden = e.hidden || e.Loader != "" && e.Loader != f.key
			e.Loader = f.key
			if f.key != "uki-url" {
				e.refer(n, f.key, f.value)
			}
		case "initrd":
			e.refer(n, f.key, rooted(f.value)...)
		case "devicetree-overlay":
			e.refer(n, f.key, strings.Fields(f.value)...)
		case "devicetree", "extra":
			e.refer(n, f.key, f.value)
		}
	}
	e.hidden = e.hidden || e.Loader == ""
	return e
}

func (e *Entry) refer(line int, key string, paths ...string) {
	for _, p := range paths {
		if strings.HasPrefix(p, "$") {
			continue
		}
		if p = clean(p); p != "" {
			e.Files = append(e.Files, Ref{key, p, line})
		}
	}
}

// setID names the entry after its file.
func (e *Entry) setID(path string) {
	file := path[strings.LastIndexAny(path, `/\`)+1:]
	n, ok := ParseName(file)
	e.ID, e.ownID = lower(file), lower(file)
	if ok {
		e.Name, e.ID = n, n.Key()
	}
	e.imageID, e.hidden = e.ID, !ok
}

// clean makes a path of an entry relative, with single slashes.
func clean(p string) string {
	return strings.Join(strings.FieldsFunc(p, func(r rune) bool { return r == '/' || r == '\\' }), "/")
}

// rooted splits a value in front of each word that begins with a slash, and drops the variables of GRUB.
func rooted(value string) []string {
	var out []string
	for start, i := 0, 1; i <= len(value); i++ {
		if i < len(value) && (!strings.ContainsRune(`/\$`, rune(value[i])) || !strings.ContainsRune(" \t", rune(value[i-1]))) {
			continue
		}
		part := strings.Trim(value[start:i], " \t")
		if strings.HasPrefix(part, "$") {
			_, part, _ = strings.Cut(strings.ReplaceAll(part, "\t", " "), " ")
			part = strings.Trim(part, " ")
		}
		if part != "" {
			out = append(out, part)
		}
		start = i
	}
	return out
}

type field struct{ key, value string }

// fields yields the lines that are a key and a value with one of the characters of sep between them, numbered from 1, as
// systemd-boot's line_get_key_value sees them: CR and LF end a line each, blanks around it do not count, "#" begins a
// comment, a pair of quotes around the value is taken off, and NUL ends the text. A byte order mark in front, which
// systemd-boot takes for a part of the first key, is passed over: what an editor put there changes nothing about what the
// line refers to.
func fields(text, sep string) iter.Seq2[int, field] {
	return func(yield func(int, field) bool) {
		text, _, _ := strings.Cut(strings.TrimPrefix(text, "\uFEFF"), "\x00")
		text = strings.ReplaceAll(text, "\r\n", "\n")
		text = strings.ReplaceAll(text, "\r", "\n")
		n := 0
		for line := range strings.SplitSeq(text, "\n") {
			n++
			line = strings.Trim(line, " \t")
			at := strings.IndexAny(line, sep)
			if at < 0 || line[0] == '#' {
				continue
			}
			f := field{line[:at], strings.TrimLeft(line[at:], sep)}
			if v := f.value; v != "" && (v[0] == '"' || v[0] == '\'') && v[len(v)-1] == v[0] {
				f.value = strings.TrimPrefix(v[:len(v)-1], v[:1]) // a single quote is both of the pair
			}
			if !yield(n, f) {
				return
			}
		}
	}
}
