package replicate

import (
	"fmt"
	"path"
	"slices"
	"sort"
	"strings"

	"espmirror/fatdriver"
)

// defaultSelect is what is selected when nothing is said, besides what the loader entries refer to.
var defaultSelect = []string{"loader", "EFI/Linux", "EFI/systemd", "EFI/BOOT"}

// ownPatterns name what belongs to one ESP alone: it is never copied, and never deleted. They are matched against the
// folded path; one without a slash matches a name at any depth. What is selected by its own path is not protected.
var ownPatterns = []string{
	untouchable[0], untouchable[1],
	"EFI/*/FW", "EFI/UPDATECAPSULE", // firmware updates on their way
	"EFI/MICROSOFT", "EFI/APPLE", "EFI/HP", "EFI/DELL", "EFI/LENOVO", "EFI/ASUS", // other vendors
	"GRUBENV", "EFI/REFIND/VARS", // boot loaders' variables
	"SYSTEM VOLUME INFORMATION", "$RECYCLE.BIN", "FSCK*.REC",
	".#*", "*.TMP", "*.DPKG-*", ".BTMP.*", // files being written
}

// untouchable are those of them that cannot be selected by name either: two ESPs with one seed would hand out the same
// random numbers, and a journal is bound to its volume, and in use while the run lasts.
var untouchable = []string{
	"LOADER/RANDOM-SEED", // each ESP has its own, mixed by its own boots
	"EFI/ESPMIRROR",      // journal and state
}

// OwnFile says whether a path is what two volumes never share: the random seed, the journal, the state, or what lies in
// the directory of the last two. It is in no archive and in no manifest.
func OwnFile(p string) bool {
	return slices.ContainsFunc(prefixes(fatdriver.Fold(p)), func(q string) bool { return match(untouchable, q) })
}

// selection is a Selection made ready for one source.
type selection struct {
	anchors  []string // paths as the source or the user writes them, none inside another
	byName   map[string]bool
	opened   []string // folded ancestors of what was selected by name that would not be replicated themselves
	excludes []string // folded
}

// prefixes lists the path and the directories above it, topmost first; the root is not among them.
func prefixes(k string) []string {
	var out []string
	for i := range len(k) {
		if k[i] == '/' {
			out = append(out, k[:i])
		}
	}
	return append(out, k)
}

// selectPath notes a path that the user selected.
func (s *selection) selectPath(p string) error {
	k := fatdriver.Fold(p)
	for _, q := range prefixes(k) {
		if match(untouchable, q) {
			return fmt.Errorf("%w: %q belongs to one ESP alone, and is never replicated", ErrSelection, p)
		}
		if q != k && match(ownPatterns, q) && !slices.Contains(s.opened, q) {
			s.opened = append(s.opened, q)
		}
	}
	s.byName[k] = true
	return nil
}

func inside(k, dir string) bool { return strings.HasPrefix(k, dir+"/") }

// cleanPath makes a user's path relative and slash-separated; "" is the root.
func cleanPath(p string) (string, error) {
	parts := fatdriver.SplitPath(p)
	for _, part := range parts {
		if part == "." || part == ".." {
			return "", fmt.Errorf("%w: %q has the part %q, which is not the name of a file", ErrSelection, p, part)
		}
	}
	return strings.Join(parts, "/"), nil
}

// resolve works out what is selected on the source. onTarget names directories and files of the target that are
// selected although the source may lack them.
func (s Selection) resolve(src Source) (*selection, error) {
	sel := &selection{byName: map[string]bool{}}
	for _, x := range s.Exclude {
		p, err := cleanPath(x)
		if err != nil {
			return nil, err
		}
		if _, err := path.Match(fatdriver.Fold(p), ""); err != nil || p == "" {
			return nil, fmt.Errorf("%w: cannot exclude %q: it is not a path or pattern", ErrSelection, x)
		}
		sel.excludes = append(sel.excludes, fatdriver.Fold(p))
	}
	var want []string
	if len(s.Select) > 0 {
		for _, x := range s.Select {
			p, err := cleanPath(x)
			if err != nil {
				return nil, err
			}
			if err := sel.selectPath(p); err != nil {
				return nil, err
			}
			want = append(want, p)
		}
	} else {
		want = append(want, defaultSelect...)
		refs, err := entryReferences(src)
		if err != nil {
			return nil, err
		}
		want = append(want, refs...)
	}
	// "" stands for everything: each entry of the root is an anchor of its own, as the root cannot be replaced.
	var flat []string
	for _, p := range want {
		if p != "" {
			flat = append(flat, p)
			continue
		}
		for _, c := range src.Root().Children {
			flat = append(flat, c.Path)
		}
		sel.byName[""] = true
	}
	sort.Slice(flat, func(i, j int) bool { return fatdriver.Fold(flat[i]) < fatdriver.Fold(flat[j]) })
	found := false
	for _, p := range flat {
		// An exclusion holds for all below it, also for what is selected there.
		if sel.covers(p) || slices.ContainsFunc(prefixes(fatdriver.Fold(p)), func(q string) bool { return match(sel.excludes, q) }) {
			continue
		}
		sel.anchors = append(sel.anchors, p)
		if it := src.Root().lookup(p); it != nil && !sel.excluded(p) {
			found = true
		}
	}
	if !found {
		return nil, &Hint{
			fmt.Errorf("%w: %s has none of %s", ErrEmptySelection, src.Name(), strings.Join(flat, ", ")),
			"name what is to be replicated with --select",
		}
	}
	return sel, nil
}

// Check returns ErrEmptySelection when nothing is selected on the source, and ErrSelection when the selection cannot be
// meant.
func (s Selection) Check(src Source) error {
	_, err := s.resolve(src)
	return err
}

// covers says whether p is an anchor, or lies inside one.
func (s *selection) covers(p string) bool {
	k := fatdriver.Fold(p)
	for _, a := range s.anchors {
		if f := fatdriver.Fold(a); k == f || strings.HasPrefix(k, f+"/") {
			return true
		}
	}
	return false
}

// everything says whether the root itself was selected, so that what only the target has in its root goes too.
func (s *selection) everything() bool { return s.byName[""] }

// excluded says whether a path stays out: by the user's word, or because it belongs to one ESP alone.
func (s *selection) excluded(p string) bool {
	k := fatdriver.Fold(p)
	if match(s.excludes, k) {
		return true
	}
	if s.byName[k] {
		return false
	}
	for _, q := range s.opened {
		if k != q && !inside(k, q) {
			continue
		}
		below := false
		for b := range s.byName {
			if inside(b, k) {
				return false // on the way to what was selected
			}
			below = below || inside(b, q) && inside(k, b)
		}
		if !below {
			return true
		}
	}
	return match(ownPatterns, k)
}

// barred says whether an anchor stays out because of itself or of a directory above it. Who comes to a path from the root
// sees the directories one by one; an anchor is gone to at once, and what excludes a directory must hold for it too.
func (s *selection) barred(p string) bool {
	k := fatdriver.Fold(p)
	all := prefixes(k)
	if slices.ContainsFunc(all, func(q string) bool { return match(s.excludes, q) }) {
		return true
	}
	return !s.byName[k] && slices.ContainsFunc(all, s.excluded) // its own name opens the way to it
}

// match says whether a folded path matches one of the patterns.
func match(patterns []string, k string) bool {
	for _, pat := range patterns {
		name := k
		if !strings.Contains(pat, "/") {
			name = path.Base(k)
		}
		if ok, _ := path.Match(pat, name); ok {
			return true
		}
	}
	return false
}

// maxEntryFile bounds the size of a loader entry that is read for what it refers to.
const maxEntryFile = 64 << 10

// entryReferences lists what the loader entries of the source refer to (Boot Loader Specification, "Type #1"): a file
// below a directory other than EFI and loader brings that whole top-level directory, one below EFI/x brings EFI/x, and
// one in the root brings itself.
func entryReferences(src Source) ([]string, error) {
	named, err := namedBy(src, func(string) bool { return false })
	if err != nil {
		return nil, err
	}
	seen := map[string]bool{}
	var out []string
	for _, e := range named {
		parts := fatdriver.SplitPath(e.file)
		top := fatdriver.Fold(parts[0])
		var anchor string
		switch {
		case top == "EFI" && len(parts) >= 3:
			anchor = parts[0] + "/" + parts[1]
		case top == "EFI" && len(parts) < 2:
			continue // that names no file, and would bring what belongs to other systems
		case top == "EFI":
			anchor = strings.Join(parts, "/")
		case top == "LOADER":
			continue // selected as a whole
		default:
			anchor = parts[0]
		}
		if k := fatdriver.Fold(anchor); !seen[k] {
			seen[k] = true
			out = append(out, anchor)
		}
	}
	return out, nil
}

func badParts(parts []string) bool {
	for _, p := range parts {
		if p == "." || p == ".." {
			return true
		}
	}
	return false
}

// entryPaths reads the paths of files that a loader entry names.
func entryPaths(src Source, e *Item) ([]string, error) {
	b, err := readEntry(src, e)
	if err != nil {
		return nil, err
	}
	var out []string
	for _, f := range b.Files {
		out = append(out, f.Path)
	}
	return out, nil
}
