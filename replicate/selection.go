package replicate

import (
	"bufio"
	"fmt"
	"io"
	"path"
	"sort"
	"strings"

	"espmirror/fatdriver"
)

// defaultSelect is what is selected when nothing is said, besides what the loader entries refer to.
var defaultSelect = []string{"loader", "EFI/Linux", "EFI/systemd", "EFI/BOOT"}

// alwaysOwn is never replicated, even when it is selected by its own path: the seed must differ on each ESP, and the
// journal is what protects the very run that would replace it. What lies below is meant as well.
var alwaysOwn = []string{"LOADER/RANDOM-SEED", "EFI/ESPMIRROR"}

// ownPatterns name what belongs to one ESP alone: it is never copied, and never deleted. They are matched against the
// folded path; one without a slash matches a name at any depth. What is selected by its own path is not protected.
var ownPatterns = []string{
	"EFI/*/FW", "EFI/UPDATECAPSULE", // firmware updates on their way
	"EFI/MICROSOFT", "EFI/APPLE", "EFI/HP", "EFI/DELL", "EFI/LENOVO", "EFI/ASUS", // other vendors
	"GRUBENV", "EFI/REFIND/VARS", // boot loaders' variables
	"SYSTEM VOLUME INFORMATION", "$RECYCLE.BIN", "FSCK*.REC",
	".#*", "*.TMP", "*.DPKG-*", ".BTMP.*", // files being written
}

// selection is a Selection made ready for one source.
type selection struct {
	anchors  []string // paths as the source or the user writes them, none inside another
	byName   map[string]bool
	excludes []string // folded
}

// cleanPath makes a user's path relative and slash-separated; "" is the root.
func cleanPath(p string) (string, error) {
	parts := fatdriver.SplitPath(p)
	for _, part := range parts {
		if part == "." || part == ".." {
			return "", fmt.Errorf("cannot select %q: %q is not the name of a file", p, part)
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
			return nil, fmt.Errorf("cannot exclude %q: not a path or pattern", x)
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
			want = append(want, p)
			sel.byName[fatdriver.Fold(p)] = true
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
		if sel.covers(p) {
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
	for _, own := range alwaysOwn {
		if k == own || strings.HasPrefix(k, own+"/") {
			return true
		}
	}
	return !s.byName[k] && match(ownPatterns, k)
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
	dir := src.Root().lookup("loader/entries")
	if dir == nil || !dir.Dir {
		return nil, nil
	}
	seen := map[string]bool{}
	var out []string
	for _, e := range dir.Children {
		if e.Dir || e.Err != nil || e.Size > maxEntryFile || !strings.HasSuffix(fatdriver.Fold(e.Name), ".CONF") {
			continue
		}
		paths, err := entryPaths(src, e)
		if err != nil {
			return nil, err
		}
		for _, p := range paths {
			parts := fatdriver.SplitPath(p)
			if len(parts) == 0 || badParts(parts) {
				continue
			}
			top := fatdriver.Fold(parts[0])
			var anchor string
			switch {
			case top == "EFI" && len(parts) >= 3:
				anchor = parts[0] + "/" + parts[1]
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
	r, err := src.Open(e)
	if err != nil {
		return nil, fmt.Errorf("%w: cannot read %s: %w", ErrSource, e.Path, err)
	}
	defer r.Close()
	var out []string
	sc := bufio.NewScanner(io.LimitReader(r, maxEntryFile))
	sc.Buffer(make([]byte, 4096), maxEntryFile+1)
	for sc.Scan() {
		f := strings.Fields(sc.Text())
		if len(f) < 2 {
			continue
		}
		switch strings.ToLower(f[0]) {
		case "linux", "efi", "uki", "initrd", "devicetree", "devicetree-overlay":
			out = append(out, f[1:]...)
		}
	}
	if err := sc.Err(); err != nil {
		return nil, fmt.Errorf("%w: cannot read %s: %w", ErrSource, e.Path, err)
	}
	return out, nil
}
