package replicate

import (
	"bytes"
	"io"
	"path"
	"slices"
	"time"

	"espmirror/fatdriver"
	"espmirror/gpt"
)

// adapted is a source with some files of its own, and with times that are no later than a given one.
type adapted struct {
	Source
	root    *Item
	content map[*Item][]byte
}

// Adapt returns src as it is to be seen by a volume that is being made: with these files in the place of its own, or
// added, and with no time later than latest (the zero time leaves them as they are), all in UTC: the times of a build
// must not be those of the machine that it ran on. The entries of a FAT volume are bytes of the source, and stay.
func Adapt(src Source, latest time.Time, files ...File) (Source, error) {
	files, err := cleanFiles(files)
	if err != nil {
		return nil, err
	}
	a := &adapted{Source: src, content: map[*Item][]byte{}}
	a.root = clamped(src.Root(), latest)
	for _, f := range files {
		at := a.root
		parts := fatdriver.SplitPath(f.Path)
		for i, part := range parts {
			k := slices.IndexFunc(at.Children, func(c *Item) bool { return fatdriver.Fold(c.Name) == fatdriver.Fold(part) })
			last := i+1 == len(parts)
			if k >= 0 && !last && at.Children[k].Dir {
				at = at.Children[k]
				continue
			}
			it := &Item{Name: part, Path: path.Join(at.Path, part), Dir: !last, Meta: f.Meta}
			if !last {
				it.Meta = fatdriver.Meta{Created: f.Meta.Created, Modified: f.Meta.Modified, Accessed: f.Meta.Accessed}
			}
			if k >= 0 {
				it.Name, it.Path = at.Children[k].Name, at.Children[k].Path
				at.Children[k] = it
			} else {
				at.Children = append(at.Children, it)
			}
			at = it
		}
		at.Size = int64(len(f.Content))
		a.content[at] = f.Content
	}
	return a, nil
}

// clamped copies a tree.
func clamped(it *Item, latest time.Time) *Item {
	c := *it
	if !latest.IsZero() {
		for _, t := range []*time.Time{&c.Meta.Created, &c.Meta.Modified, &c.Meta.Accessed} {
			if t.IsZero() {
				continue
			}
			if *t = t.UTC(); t.After(latest) {
				*t = latest.UTC()
			}
		}
	}
	c.Children = make([]*Item, len(it.Children))
	for i, child := range it.Children {
		c.Children[i] = clamped(child, latest)
	}
	return &c
}

func (a *adapted) Root() *Item { return a.root }

func (a *adapted) Open(it *Item) (io.ReadCloser, error) {
	if b, ok := a.content[it]; ok {
		return io.NopCloser(bytes.NewReader(b)), nil
	}
	return a.Source.Open(it)
}

// Bytes returns how many bytes of files are selected on the source, each rounded up to clusters of the given size, and a
// cluster for each directory: what a volume has to hold, but for its journal.
func (s Selection) Bytes(src Source, cluster int64) (int64, error) {
	sel, err := s.resolve(src)
	if err != nil {
		return 0, err
	}
	var sum func(it *Item) int64
	sum = func(it *Item) int64 {
		if sel.excluded(it.Path) {
			return 0
		}
		if !it.Dir {
			return (it.Size + cluster - 1) / cluster * cluster
		}
		n := cluster
		for _, c := range it.Children {
			n += sum(c)
		}
		return n
	}
	var n int64
	for _, a := range sel.anchors {
		if it := src.Root().lookup(a); it != nil {
			n += sum(it)
		}
	}
	return n, nil
}

// nextState is State.next with a lineage that comes from the run's own source of random numbers.
func (r *run) nextState(base *State, d Digest) (*State, error) {
	n := base.next(d, r.sel)
	if base != nil || r.opt.Random == nil {
		return n, nil
	}
	id, err := gpt.GUIDFrom(r.opt.Random)
	n.Lineage = id.String()
	return n, err
}

// Made says what is known of a volume that an earlier run of init may have left behind.
type Made struct {
	Journal bool // it has been written by a run
	Member  bool // it remembers a generation
	Set     *Set // the replica set file that it holds; nil when it has none
}

// Inspect looks at a volume for what runs have left on it. The volume's tree must be sound: it returns ErrSource.
func Inspect(name string, v *fatdriver.Volume) (*Made, error) {
	src, err := OpenVolumeSource(name, v)
	if err != nil {
		return nil, err
	}
	m := &Made{Journal: src.Root().lookup(journalPath) != nil, Member: src.Root().lookup(StatePath) != nil}
	if m.Set, err = ReadSet(src); err != nil {
		return nil, err
	}
	return m, nil
}
