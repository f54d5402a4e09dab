package replicate

import (
	"io"
	"time"

	"espmirror/fatdriver"
	"espmirror/gpt"
)

// adapted is a source with other times.
type adapted struct {
	Source
	root *Item
	of   map[*Item]*Item // the source's own item of each copy, by which it may know its content
}

// Adapt returns src with no time later than latest, and all in UTC: the times of a build must not be those of the machine
// that it ran on. The zero time leaves them as they are, and so do the entries of a FAT volume, whose bytes are the same
// wherever they are read.
func Adapt(src Source, latest time.Time) Source {
	if latest.IsZero() {
		return src
	}
	a := &adapted{Source: src, of: map[*Item]*Item{}}
	a.root = a.clamped(src.Root(), latest)
	return a
}

// clamped copies a tree.
func (a *adapted) clamped(it *Item, latest time.Time) *Item {
	c := *it
	a.of[&c] = it
	for _, t := range []*time.Time{&c.Meta.Created, &c.Meta.Modified, &c.Meta.Accessed} {
		if t.IsZero() {
			continue
		}
		if *t = t.UTC(); t.After(latest) {
			*t = latest.UTC()
		}
	}
	c.Children = make([]*Item, len(it.Children))
	for i, child := range it.Children {
		c.Children[i] = a.clamped(child, latest)
	}
	return &c
}

func (a *adapted) Root() *Item { return a.root }

func (a *adapted) Open(it *Item) (io.ReadCloser, error) {
	if own := a.of[it]; own != nil {
		it = own
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
	id, err := gpt.GUIDFrom(r.opt.Random(""))
	n.Lineage = id.String()
	return n, err
}

// Made says what is known of a volume that an earlier run of init may have left behind.
type Made struct {
	Label   string // of the volume
	Empty   bool   // it holds no file and no directory
	Journal bool   // it has been written by a run
	Member  bool   // it remembers a generation
	Set     *Set   // the replica set file that it holds; nil when it has none
}

// Inspect looks at a volume for what runs have left on it. The volume's tree must be sound: it returns ErrSource.
func Inspect(name string, v *fatdriver.Volume) (*Made, error) {
	src, err := OpenVolumeSource(name, v)
	if err != nil {
		return nil, err
	}
	m := &Made{Empty: len(src.Root().Children) == 0, Journal: src.Root().lookup(journalPath) != nil, Member: src.Root().lookup(StatePath) != nil}
	if v, ok := src.(*volumeSource); ok {
		m.Label = v.tree.Label
	}
	if m.Set, err = ReadSet(src); err != nil {
		return nil, err
	}
	return m, nil
}
