package replicate

import (
	"path"
	"slices"
	"strings"

	"espmirror/fatdriver"
	"espmirror/replicate/bls"
)

// Boot counters stand in the names of boot entries, and each volume counts the boots from itself. So in the directories
// where they have a meaning a name is compared without its counter.

// counts says whether the names in a directory may bear boot counters (Boot Loader Specification, "Boot counting").
func counts(dir string) bool {
	switch fatdriver.Fold(dir) {
	case "LOADER/ENTRIES", "EFI/LINUX":
		return true
	}
	return false
}

// counted takes the name of an entry of a directory apart; ok is false when a counter would have no meaning there.
func counted(dir, name string) (bls.Name, bool) {
	if !counts(dir) {
		return bls.Name{}, false
	}
	return bls.ParseName(name)
}

// entryKey is the name of an entry of a directory as members compare it.
func entryKey(dir, name string) string {
	if n, ok := counted(dir, name); ok {
		return fatdriver.Fold(n.Key())
	}
	return fatdriver.Fold(name)
}

// keys gives each name of a directory its key. Names that differ by their counters alone are no counts of one entry but
// two files: they keep their counters.
func keys(dir string, names []string) []string {
	out := make([]string, len(names))
	seen := map[string]int{}
	for i, n := range names {
		out[i] = entryKey(dir, n)
		seen[out[i]]++
	}
	for i, n := range names {
		if seen[out[i]] > 1 {
			out[i] = fatdriver.Fold(n)
		}
	}
	return out
}

// places pairs the entries of a directory of the source with those that a directory of the target has in their place:
// of the same name, or else of the same name but for the boot counter. at is the directory's path on the source.
func places(it *Item, old *fatdriver.Node, at string) map[*Item]*fatdriver.Node {
	out := map[*Item]*fatdriver.Node{}
	taken := map[*fatdriver.Node]bool{}
	pair := func(c *Item, n *fatdriver.Node) {
		if out[c] == nil && n != nil && !taken[n] {
			out[c], taken[n] = n, true
		}
	}
	byName := make(map[string]*fatdriver.Node, len(old.Children))
	for _, n := range slices.Backward(old.Children) { // of two equal names the first, as lookup has it
		byName[fatdriver.Fold(n.Name())] = n
	}
	for _, c := range it.Children {
		pair(c, byName[fatdriver.Fold(c.Name)])
	}
	if !counts(at) {
		return out
	}
	byKey := map[string][]*fatdriver.Node{}
	for _, n := range old.Children {
		if !n.IsDir() {
			k := entryKey(at, n.Name())
			byKey[k] = append(byKey[k], n)
		}
	}
	names := make([]string, len(it.Children))
	for i, c := range it.Children {
		names[i] = c.Name
	}
	for i, key := range keys(at, names) {
		c := it.Children[i]
		if out[c] != nil || c.Dir {
			continue
		}
		free := byKey[key]
		for len(free) > 0 && taken[free[0]] {
			free = free[1:]
		}
		if byKey[key] = free; len(free) > 0 {
			pair(c, free[0])
		}
	}
	return out
}

// inPlace finds what a target has in the place of an item that lies in the selection. What is worked out for a directory
// is kept until the target is scanned again.
func (r *run) inPlace(s *side, it *Item) *fatdriver.Node {
	at := path.Dir(it.Path)
	if n := lookup(s.tree.Root, it.Path); n != nil || it.Dir || !counts(at) {
		return n
	}
	if s.placed.tree != s.tree {
		s.placed = placed{s.tree, map[string]map[string]*fatdriver.Node{}}
	}
	k := fatdriver.Fold(at)
	in, ok := s.placed.dirs[k]
	if !ok {
		dir, old := r.src.Root().lookup(at), lookup(s.tree.Root, at)
		in = map[string]*fatdriver.Node{}
		if dir != nil && old != nil && old.IsDir() {
			for c, n := range places(dir, old, dir.Path) {
				in[c.Path] = n
			}
		}
		s.placed.dirs[k] = in
	}
	return in[it.Path]
}

// placed is what inPlace knows of a tree: by the source's directory, folded, and path.
type placed struct {
	tree *fatdriver.Tree
	dirs map[string]map[string]*fatdriver.Node
}

// placeName is the name under which a file of the source goes to the target. A boot that was counted on the source says
// nothing of the target: what is the same file there keeps its own count, what is new begins with the first one. What
// has proved good is good everywhere. A rival is one of two files whose names differ by their counters alone.
func placeName(it *Item, old *fatdriver.Node, same, rival bool) string {
	n, ok := counted(path.Dir(it.Path), it.Name)
	switch {
	case !ok || n.State() == bls.Good:
		return it.Name
	case same && old != nil && entryKey(path.Dir(it.Path), old.Name()) == entryKey(path.Dir(it.Path), it.Name):
		return old.Name()
	case rival:
		return it.Name // with the first count both might have one name
	}
	name := n.Initial()
	if first, ok := bls.ParseName(name); ok && first.State() == bls.Bad {
		// "+0" does not say how many tries there were. What was never tried here gets one.
		c := first.Counter.String()
		left, done, both := strings.Cut(c, "-")
		c = left[:len(left)-1] + "1"
		if both {
			c += "-" + done
		}
		name = first.Base + c + first.Suffix
	}
	return name
}

// rivals says which files of a directory have names that differ from another one's by their counters alone.
func rivals(it *Item) map[*Item]bool {
	out := map[*Item]bool{}
	if !counts(it.Path) {
		return out
	}
	first := map[string]*Item{}
	for _, c := range it.Children {
		k := entryKey(it.Path, c.Name)
		if o := first[k]; o != nil {
			out[o], out[c] = true, true
		} else {
			first[k] = c
		}
	}
	return out
}
