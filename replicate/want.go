package replicate

import (
	"fmt"
	"maps"
	"path"
	"sort"
	"strings"

	"espmirror/fatdriver"
)

// switchPoint is an anchor with what the order of commits depends on.
type switchPoint struct {
	fatdriver.Anchor
	path   string
	loader bool // holds loader entries: committed after what they refer to
}

// wants builds what a target is to look like, one switch point for each selected directory or file. It is pure: the
// same tree and matches give the same result, so it can be repeated after a rescan. staged leaves out matches under
// another name for files that the target's loader entries refer to: those must be found under their old name until the
// entries have switched, and under the new one from then on.
func (r *run) wants(s *side, staged bool) ([]switchPoint, []Change, error) {
	b := &wantBuilder{r: r, s: s, rivals: map[*Item]string{}}
	if staged {
		b.stay = referred(s.tree)
	}
	anchors := r.sel.anchors
	if r.sel.everything() {
		anchors = append([]string(nil), anchors...)
		for _, c := range s.tree.Root.Children {
			if !r.sel.covers(c.Name()) {
				anchors = append(anchors, c.Name())
			}
		}
	}
	anchors = append(anchors[:len(anchors):len(anchors)], s.gone...)
	var out []switchPoint
	created := map[string]*fatdriver.Want{} // topmost missing directory, folded → what is wanted there
	for _, a := range anchors {
		if r.sel.barred(a) {
			continue
		}
		it := r.src.Root().lookup(a)
		parts := fatdriver.SplitPath(a)
		parent := s.tree.Root
		at := 0
		for ; at < len(parts)-1; at++ {
			c := childNode(parent, parts[at])
			if c == nil {
				break
			}
			if !c.IsDir() {
				if it == nil {
					break
				}
				return nil, nil, fmt.Errorf("%w: %s is a file on the target, and a directory on the source", ErrRefused, c.Path())
			}
			parent = c
		}
		loader := fatdriver.Fold(parts[0]) == "LOADER"
		if at == len(parts)-1 {
			old := childNode(parent, parts[at])
			if old == nil && it != nil {
				old = r.inPlace(s, it)
			}
			w, err := b.top(it, old, a)
			if err != nil {
				return nil, nil, err
			}
			if old != nil || w != nil {
				out = append(out, switchPoint{fatdriver.Anchor{Parent: parent, Old: old, New: w}, a, loader})
			}
			continue
		}
		if it == nil {
			continue // neither side has it
		}
		// A directory above the anchor is missing: it is made together with all that is selected below it.
		w, err := b.want(it, nil)
		if err != nil {
			return nil, nil, err
		}
		top := strings.Join(parts[:at+1], "/")
		dir := created[fatdriver.Fold(top)]
		if dir == nil {
			dir = b.plainDir(top)
			created[fatdriver.Fold(top)] = dir
			out = append(out, switchPoint{fatdriver.Anchor{Parent: parent, New: dir}, top, loader})
		}
		for i := at + 1; i < len(parts)-1; i++ {
			var next *fatdriver.Want
			for _, c := range dir.Children {
				if fatdriver.Fold(c.Name) == fatdriver.Fold(parts[i]) {
					next = c
				}
			}
			if next == nil {
				next = b.plainDir(strings.Join(parts[:i+1], "/"))
				dir.Children = append(dir.Children, next)
			}
			dir = next
		}
		dir.Children = append(dir.Children, w)
	}
	sort.SliceStable(b.changes, func(i, j int) bool { return b.changes[i].Path < b.changes[j].Path })
	return r.withState(s, out), b.changes, nil
}

type wantBuilder struct {
	r       *run
	s       *side
	stay    func(p string) bool // files of the target that must not be renamed; nil when all may be
	changes []Change
	from    map[string]bool // paths that were renamed away
	rivals  map[*Item]string
}

func (b *wantBuilder) change(op, p, from string, dir bool, size int64) {
	b.changes = append(b.changes, Change{Op: op, Path: p, From: from, Dir: dir, Size: size})
}

// plainDir wants a new directory with the name and times that the source has for it.
func (b *wantBuilder) plainDir(p string) *fatdriver.Want {
	it := b.r.src.Root().lookup(p)
	b.change("create", it.Path, "", true, 0)
	return &fatdriver.Want{Name: it.Name, Dir: true, Template: it.Template, Meta: it.Meta}
}

// top wants an anchor: it is the item, or what must remain of old when the source has no such item.
func (b *wantBuilder) top(it *Item, old *fatdriver.Node, at string) (*fatdriver.Want, error) {
	b.from = map[string]bool{}
	if it != nil {
		b.r.walkItems(it, func(f *Item) {
			if p, ok := b.match(f); ok && p != f.Path {
				b.from[p] = true
			}
		})
	}
	if it == nil {
		if old == nil {
			return nil, nil
		}
		return b.retain(old, at), nil
	}
	return b.wantAs(it, old, true)
}

// match is the path of the target's file that has the content of f.
func (b *wantBuilder) match(f *Item) (string, bool) {
	p, ok := b.s.match[f]
	if ok && b.stay != nil && fatdriver.Fold(p) != fatdriver.Fold(f.Path) && b.stay(p) {
		return "", false
	}
	return p, ok
}

// want turns an item into what is wanted; old is what the target has in its place.
func (b *wantBuilder) want(it *Item, old *fatdriver.Node) (*fatdriver.Want, error) {
	return b.wantAs(it, old, false)
}

// wantAs is want; an anchor keeps the case of the name that the target has for it, as its directory stays.
func (b *wantBuilder) wantAs(it *Item, old *fatdriver.Node, anchor bool) (*fatdriver.Want, error) {
	if it.Err != nil {
		return nil, fmt.Errorf("%w: %w", ErrSource, it.Err)
	}
	w := &fatdriver.Want{Name: it.Name, Dir: it.Dir, Template: it.Template, Meta: it.Meta}
	if !it.Dir {
		e := b.s.item(it)
		w.Size, w.Content = e.Size, e
		p, ok := b.match(it)
		if ok {
			w.Have, w.Content = lookup(b.s.tree.Root, p), nil
			if w.Have == nil {
				return nil, fmt.Errorf("internal error: %s vanished from the target", p)
			}
		}
		name := placeName(it, old, ok && w.Have == old, b.rivals[it])
		at := path.Join(path.Dir(it.Path), name)
		switch {
		case !ok && old == nil:
			b.change("create", at, "", false, e.Size)
		case !ok:
			b.change("replace", at, "", false, e.Size)
		case w.Have == old && (old.Name() == name || anchor && fatdriver.Fold(old.Name()) == fatdriver.Fold(name)):
			w.Name, w.Template = old.Name(), nil // nothing about it changes
		default:
			b.change("rename", at, p, false, e.Size)
		}
		if w.Name == it.Name && name != it.Name {
			// A template holds the name too.
			w.Name, w.Template, w.Meta = name, nil, it.meta()
		}
		if old != nil && old.IsDir() {
			if kept := b.stays(old, it.Path); kept != "" {
				return nil, fmt.Errorf("%w: %s is a file on the source, and on the target a directory with %s, which stays", ErrRefused, it.Path, kept)
			}
			b.gone(old, it.Path)
		}
		return w, nil
	}
	if old != nil && !old.IsDir() {
		old = nil
	}
	if old == nil {
		b.change("create", it.Path, "", true, 0)
	} else {
		w.Have = old
		if anchor || old.Name() == it.Name {
			w.Name, w.Template = old.Name(), nil
		} else {
			b.change("rename", it.Path, old.Path(), true, 0)
		}
	}
	maps.Copy(b.rivals, rivals(it))
	placed := map[*Item]bool{}
	add := func(c *Item, n *fatdriver.Node) error {
		cw, err := b.want(c, n)
		if err == nil {
			w.Children = append(w.Children, cw)
			placed[c] = true
		}
		return err
	}
	if old != nil {
		inPlace := map[*fatdriver.Node]*Item{}
		for c, n := range places(it, old, it.Path) {
			inPlace[n] = c
		}
		for _, n := range old.Children {
			p := path.Join(it.Path, n.Name())
			c := inPlace[n]
			switch {
			case b.r.sel.excluded(p):
				w.Children = append(w.Children, fatdriver.Carry(n))
			case c == nil:
				if keep := b.retain(n, p); keep != nil {
					w.Children = append(w.Children, keep)
				}
			default:
				if err := add(c, n); err != nil {
					return nil, err
				}
			}
		}
	}
	for _, c := range it.Children {
		if !placed[c] && !b.r.sel.excluded(c.Path) {
			if err := add(c, nil); err != nil {
				return nil, err
			}
		}
	}
	return w, nil
}

// retain wants what must stay of a node that the source does not have: the excluded parts, with the directories that
// hold them. nil means that all of it goes.
func (b *wantBuilder) retain(n *fatdriver.Node, at string) *fatdriver.Want {
	if !n.IsDir() {
		if !b.from[n.Path()] {
			b.change("delete", at, "", false, n.Size())
		}
		return nil
	}
	w := &fatdriver.Want{Name: n.Name(), Dir: true, Have: n}
	for _, c := range n.Children {
		p := path.Join(at, c.Name())
		if b.r.sel.excluded(p) {
			w.Children = append(w.Children, fatdriver.Carry(c))
		} else if keep := b.retain(c, p); keep != nil {
			w.Children = append(w.Children, keep)
		}
	}
	if len(w.Children) == 0 {
		b.change("delete", at, "", true, 0)
		return nil
	}
	return w
}

// stays returns the path of something below a directory that is not replicated, "" when there is nothing.
func (b *wantBuilder) stays(n *fatdriver.Node, at string) string {
	for _, c := range n.Children {
		p := path.Join(at, c.Name())
		if b.r.sel.excluded(p) {
			return p
		}
		if kept := b.stays(c, p); kept != "" {
			return kept
		}
	}
	return ""
}

// gone notes that everything below a directory goes because a file takes its place.
func (b *wantBuilder) gone(n *fatdriver.Node, at string) {
	for _, c := range n.Children {
		p := path.Join(at, c.Name())
		if c.IsDir() {
			b.gone(c, p)
		}
		if !b.from[c.Path()] {
			b.change("delete", p, "", c.IsDir(), c.Size())
		}
	}
}

// referred returns a function that says whether a loader entry of the target refers to a path. Where the entries cannot
// be read, every path is taken for one.
func referred(tree *fatdriver.Tree) func(p string) bool {
	n := lookup(tree.Root, "loader/entries")
	if n == nil || !n.IsDir() {
		return func(string) bool { return false }
	}
	src := &volumeSource{tree: tree}
	set := map[string]bool{}
	for _, e := range volumeItem(n, "loader/entries").Children {
		if e.Dir || !strings.HasSuffix(fatdriver.Fold(e.Name), ".CONF") {
			continue
		}
		if e.Size > maxEntryFile {
			return func(string) bool { return true }
		}
		paths, err := entryPaths(src, e)
		if err != nil {
			return func(string) bool { return true }
		}
		for _, p := range paths {
			parts := fatdriver.SplitPath(p)
			set[fatdriver.Fold(strings.Join(parts, "/"))] = true
			// Firmware opens a file by its 8.3 name too.
			at := tree.Root
			for i := 0; i < len(parts) && at != nil; i++ {
				at = at.Child(parts[i])
			}
			if at != nil {
				set[fatdriver.Fold(at.Path())] = true
			}
		}
	}
	return func(p string) bool { return set[fatdriver.Fold(p)] }
}

// union wants everything that final has and, besides, what old has and final has not: the state in which neither old nor
// new loader entries miss a file. A file that final has under another name is there under that name alone, as it cannot
// be in two places. It is final itself when nothing is removed.
func union(final *fatdriver.Want, old *fatdriver.Node) *fatdriver.Want {
	moved := map[*fatdriver.Node]bool{}
	var note func(w *fatdriver.Want)
	note = func(w *fatdriver.Want) {
		if !w.Dir && w.Have != nil {
			moved[w.Have] = true
		}
		for _, c := range w.Children {
			note(c)
		}
	}
	note(final)
	return unionBut(final, old, moved)
}

func unionBut(final *fatdriver.Want, old *fatdriver.Node, moved map[*fatdriver.Node]bool) *fatdriver.Want {
	if !final.Dir || !old.IsDir() || final.Have != old {
		return final
	}
	have := map[string]bool{}
	changed := false
	u := *final
	u.Children = nil
	for _, c := range final.Children {
		have[fatdriver.Fold(c.Name)] = true
		uc := c
		if c.Dir && c.Have != nil {
			uc = unionBut(c, c.Have, moved)
		}
		changed = changed || uc != c
		u.Children = append(u.Children, uc)
	}
	for _, n := range old.Children {
		if have[fatdriver.Fold(n.Name())] {
			continue
		}
		if w := carryBut(n, moved); w != nil {
			u.Children = append(u.Children, w)
			changed = true
		}
	}
	if !changed {
		return final
	}
	return &u
}

// carryBut is Carry without the files that were moved elsewhere; nil when nothing is left.
func carryBut(n *fatdriver.Node, moved map[*fatdriver.Node]bool) *fatdriver.Want {
	if !n.IsDir() {
		if moved[n] {
			return nil
		}
		return fatdriver.Carry(n)
	}
	w := &fatdriver.Want{Name: n.Name(), Dir: true, Have: n}
	for _, c := range n.Children {
		if k := carryBut(c, moved); k != nil {
			w.Children = append(w.Children, k)
		}
	}
	if len(w.Children) == 0 && len(n.Children) > 0 {
		return nil
	}
	return w
}
