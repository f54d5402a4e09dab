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
	pairRivals(it, byName, byKey, out, taken, pair)
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

// pairRivals pairs files whose names differ by their counters alone with what the target has under the names that they have
// there when they are new; and where one of them is left, and one of the target's, that one has been booted there since.
func pairRivals(it *Item, byName map[string]*fatdriver.Node, byKey map[string][]*fatdriver.Node, out map[*Item]*fatdriver.Node, taken map[*fatdriver.Node]bool, pair func(*Item, *fatdriver.Node)) {
	goals := rivals(it)
	reserved := map[string]bool{}
	for _, c := range it.Children {
		goal := goals[c]
		if goal == "" || c.Dir {
			continue
		}
		reserved[fatdriver.Fold(goal)] = true
		if n := byName[fatdriver.Fold(goal)]; n != nil && !n.IsDir() {
			pair(c, n)
		}
	}
	left := map[string][]*Item{}
	for _, c := range it.Children {
		if goals[c] != "" && !c.Dir && out[c] == nil {
			k := entryKey(it.Path, c.Name)
			left[k] = append(left[k], c)
		}
	}
	for k, items := range left {
		var free []*fatdriver.Node
		for _, n := range byKey[k] {
			if !taken[n] && !reserved[fatdriver.Fold(n.Name())] {
				free = append(free, n)
			}
		}
		if len(items) == 1 && len(free) == 1 {
			pair(items[0], free[0])
		}
	}
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
// has proved good is good everywhere. goal is what rivals says of the file, "" when it has none.
func placeName(it *Item, old *fatdriver.Node, same bool, goal string) string {
	n, ok := counted(path.Dir(it.Path), it.Name)
	switch {
	case !ok || n.State() == bls.Good:
		return it.Name
	case same && old != nil && entryKey(path.Dir(it.Path), old.Name()) == entryKey(path.Dir(it.Path), it.Name):
		return old.Name()
	case goal != "":
		return goal
	}
	return firstCount(n)
}

// firstCount is the name of an entry with the count that it began with.
func firstCount(n bls.Name) string {
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

// rivals finds the files of a directory whose names differ from another one's by their counters alone, and says under which
// name each of them is new on a target: with its first count, unless another one has that name.
func rivals(it *Item) map[*Item]string {
	out := map[*Item]string{}
	if !counts(it.Path) {
		return out
	}
	seen, have := map[string]int{}, map[string]bool{}
	for _, c := range it.Children {
		seen[entryKey(it.Path, c.Name)]++
		have[fatdriver.Fold(c.Name)] = true
	}
	for _, c := range it.Children {
		if seen[entryKey(it.Path, c.Name)] < 2 {
			continue
		}
		out[c] = c.Name
		n, ok := counted(it.Path, c.Name)
		if !ok || c.Dir || n.State() == bls.Good {
			continue
		}
		if first := firstCount(n); !have[fatdriver.Fold(first)] {
			out[c] = first
			have[fatdriver.Fold(first)] = true
		}
	}
	return out
}
