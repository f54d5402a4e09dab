package replicate

import (
	"fmt"
	"path"
	"slices"
	"strings"

	"espmirror/fatdriver"
)

// entry is a loader entry with a file that it names.
type entry struct{ path, file string }

// namedBy lists what the loader entries of a source name, in order. Entries for which skip is true are left out.
func namedBy(src Source, skip func(path string) bool) ([]entry, error) {
	dir := src.Root().lookup("loader/entries")
	if dir == nil || !dir.Dir {
		return nil, nil
	}
	var out []entry
	for _, e := range dir.Children {
		if e.Dir || e.Err != nil || e.Size > maxEntryFile || !strings.HasSuffix(fatdriver.Fold(e.Name), ".CONF") || skip(e.Path) {
			continue
		}
		files, err := entryPaths(src, e)
		if err != nil {
			return nil, err
		}
		for _, f := range files {
			if parts := fatdriver.SplitPath(f); len(parts) > 0 && !badParts(parts) {
				out = append(out, entry{e.Path, strings.Join(parts, "/")})
			}
		}
	}
	return out, nil
}

// takes says whether a path is replicated: it lies in an anchor, and nothing on the way to it is excluded.
func (s *selection) takes(p string) bool {
	if !s.covers(p) {
		return false
	}
	for at := p; at != "."; at = path.Dir(at) {
		if s.excluded(at) {
			return false
		}
	}
	return true
}

// saneSource refuses a source of which an entry that would be replicated names a file that is missing or empty: it is
// half-written, and what the targets have is better.
func (r *run) saneSource() error {
	for _, e := range r.named {
		it := r.src.Root().lookup(e.file)
		what := ""
		switch {
		case it == nil:
			what = "missing"
		case it.Dir:
			what = "a directory"
		case it.Size == 0:
			what = "empty"
		default:
			continue
		}
		return &Hint{
			refusal{fmt.Errorf("%w: %s: %s names %s, which is %s", ErrSource, r.src.Name(), e.path, e.file, what)},
			"finish what was being installed there, or leave the entry out with --exclude " + e.path,
		}
	}
	return nil
}

// dangling lists the loader entries that a target will have, and the files that they name and it will not: what a
// selection that takes entries without their files, or files without their entries, leads to.
func (r *run) dangling(s *side) ([]entry, error) {
	own, err := namedBy(&volumeSource{tree: s.tree, root: volumeItem(s.tree.Root, "")}, r.sel.takes)
	if err != nil {
		return nil, err
	}
	var out []entry
	for _, e := range slices.Concat(r.named, own) {
		there := false
		if r.sel.takes(e.file) {
			it := r.src.Root().lookup(e.file)
			there = it != nil && !it.Dir
		} else {
			n := lookup(s.tree.Root, e.file)
			there = n != nil && !n.IsDir()
		}
		if !there {
			out = append(out, e)
		}
	}
	return out, nil
}

// warnDangling says what will not boot.
func (r *run) warnDangling(s *side) error {
	out, err := r.dangling(s)
	for _, e := range out {
		r.log.Warn("a loader entry names a file that will not be there", "target", s.t.Name, "entry", e.path, "file", e.file)
	}
	return err
}
