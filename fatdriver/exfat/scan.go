package exfat

import (
	"errors"
	"fmt"
	"io"
	"math"
	"slices"
	"time"

	"espmirror/fatdriver/internal/tree"
)

// Finding is one thing that is wrong with a volume, and where; it never names a cluster.
type Finding = tree.Finding

// Node is a file or directory of a scanned volume.
type Node struct {
	Parent   *Node // nil for the root
	Children []*Node

	// Attr has the attribute bits. The times are instants where the entry has a UTC offset; a wall clock without one is
	// taken for UTC, as FAT's is. An impossible date is the zero time.
	Attr                        uint16
	Created, Modified, Accessed time.Time

	name   string
	tree   *Tree
	size   uint64 // DataLength, of directories too
	valid  uint64
	runs   []run
	at     place // of its set of entries
	hash   uint16
	first  uint32 // cluster
	flags  byte   // GeneralSecondaryFlags
	byName map[string]*Node
	err    error // why the content cannot be read
}

// Name is the entry's name, "" for the root. It is UTF-8, with unpaired surrogates kept as three bytes each.
func (n *Node) Name() string { return n.name }

// IsDir says whether the node is a directory.
func (n *Node) IsDir() bool { return n.Attr&attrDir != 0 }

// Size is the file's size in bytes, 0 for a directory.
func (n *Node) Size() int64 {
	if n.IsDir() {
		return 0
	}
	return int64(min(n.size, math.MaxInt64))
}

// Path is the slash-separated path from the root, "" for the root itself.
func (n *Node) Path() string {
	if n.Parent == nil {
		return ""
	}
	if p := n.Parent.Path(); p != "" {
		return p + "/" + n.name
	}
	return n.name
}

// Err says why the content of a file or directory cannot be read, nil when it can.
func (n *Node) Err() error { return n.err }

// Child finds an entry of a directory without regard to case, by the volume's up-case table; nil when there is none.
func (n *Node) Child(name string) *Node { return n.byName[n.tree.up.fold(units(name))] }

// Tree is the content of a volume at the time of Scan.
type Tree struct {
	Root     *Node
	Label    string
	GUID     []byte // 16 bytes as they are on the volume, nil when it has none
	Files    int
	Dirs     int // without the root
	Findings []Finding

	vol  *Volume
	up   *upcase
	used clusterSet
	bits *bitmap // nil when there is none that can be read
}

// Volume returns the volume that was scanned.
func (t *Tree) Volume() *Volume { return t.vol }

// Damage returns ErrDamaged with the first finding of that severity, or nil.
func (t *Tree) Damage() error { return tree.Damaged(t.Findings, ErrDamaged) }

// Lookup finds a file or directory by its slash-separated path, without regard to case; nil when there is none.
func (t *Tree) Lookup(path string) *Node {
	return tree.Lookup(t.Root, path, (*Node).Child)
}

// Open returns the content of a file of the tree. Bytes that were never written read as zeros (7.6.5).
func (t *Tree) Open(n *Node) (*io.SectionReader, error) {
	if n.IsDir() {
		return nil, fmt.Errorf("cannot read %s: it is a directory", n.Path())
	}
	if n.err != nil {
		return nil, fmt.Errorf("cannot read %s: %w", n.Path(), n.err)
	}
	return io.NewSectionReader(t.vol.newRunReader(n.runs, n.Size(), int64(n.valid)), 0, n.Size()), nil
}

// Usage says how many clusters the allocation bitmap has as used, as free, and as used by nothing that was found: those of
// a writer that was interrupted, or of what vendors add. It reads the whole bitmap.
func (t *Tree) Usage() (used, free, lost int64, err error) {
	if t.bits == nil {
		return 0, 0, 0, fmt.Errorf("cannot count clusters: there is no allocation bitmap: %w", ErrDamaged)
	}
	all := t.vol.geo.ClusterCount
	if used, err = t.bits.count(all); err != nil {
		return 0, 0, 0, err
	}
	return used, int64(all) - used, max(0, used-t.used.len()), nil
}

// maxNodes bounds how many files and directories there may be; a test makes it less.
var maxNodes = tree.MaxNodes

// maxDepth bounds how deep directories may nest, as package fatdriver bounds it.
const maxDepth = 256

// maxFindings bounds what a hostile volume can make us keep.
const maxFindings = 10_000

func (t *Tree) note(s tree.Severity, path string, off int64, format string, a ...any) {
	switch {
	case len(t.Findings) < maxFindings:
		t.Findings = append(t.Findings, Finding{Severity: s, Path: path, Off: off, Msg: fmt.Sprintf(format, a...)})
	case len(t.Findings) == maxFindings:
		t.Findings = append(t.Findings, Finding{Severity: tree.Damage, Off: -1, Msg: "there are more findings than can be listed"})
	}
}

// scanner is one scan.
type scanner struct {
	*Tree
	k       *clusters
	dec     *decoder
	bitmaps []entry
	upcases []entry
	nodes   int
	system  []run // what the bitmaps and the up-case table take, which the bitmap has as used too
	folds   bool  // the up-case table is that of the volume
}

// Scan walks the whole tree. What is wrong with it goes into Findings; the error is for a medium that cannot be read.
// Every cluster belongs to whoever is found first, so the walk ends on any input, loops included.
func (v *Volume) Scan() (*Tree, error) {
	dec, err := newDecoder()
	if err != nil {
		return nil, err
	}
	s := &scanner{Tree: &Tree{vol: v, up: newUpcase()}, k: newClusters(v), dec: dec}
	s.used = s.k.used
	s.Root = &Node{tree: s.Tree, Attr: attrDir, at: place{off: -1}}
	if v.note != "" {
		s.note(tree.Warning, "", -1, "the main boot region cannot be used, its backup can: %s", v.note)
	}
	if v.geo.Dirty {
		s.note(tree.Warning, "", -1, "the volume is marked dirty: a writer was interrupted, or is at work")
	}
	if v.geo.MediaFailure {
		s.note(tree.Warning, "", -1, "the volume is marked as one whose medium has failed")
	}
	if err := s.root(); err != nil {
		return nil, fmt.Errorf("cannot read the tree: %w", err)
	}
	return s.Tree, nil
}

// isIO tells an error of the medium, or our own, from what is wrong with the volume.
func isIO(err error) bool {
	var e *ioError
	return errors.As(err, &e)
}

// root reads the root directory, what it says about the volume, and then what is below it: names cannot be judged before
// the up-case table is there, nor clusters before the bitmap is.
func (s *scanner) root() error {
	limit := max(1, uint64(maxDir/s.vol.geo.clusterSize()))
	runs, _, err := s.k.chain(s.vol.geo.Root, limit, true)
	if isIO(err) {
		return err
	}
	if err != nil {
		s.Root.err = err
		s.note(tree.Damage, "/", -1, "%v", err)
		return nil
	}
	s.Root.runs = runs
	for _, r := range runs {
		s.Root.size += uint64(r.n) * uint64(s.vol.geo.ClusterSize)
	}
	if err := s.list(s.Root); err != nil {
		return err
	}
	if err := s.loadBitmap(); err != nil {
		return err
	}
	if err := s.loadUpcase(); err != nil {
		return err
	}
	for _, runs := range [][]run{s.Root.runs, s.system} {
		if err := s.checkBitmap(s.Root, runs); err != nil {
			return err
		}
	}
	return s.walk(s.Root, 0)
}

// list reads the entries of a directory.
func (s *scanner) list(dir *Node) error {
	d := &dirReader{r: s.vol.newRunReader(dir.runs, int64(dir.size), int64(dir.size))}
	path := "/" + dir.Path()
	return d.sets(dir == s.Root, s.dec, func(e *entry, at place) error {
		switch e.kind {
		case kindFile:
			if s.nodes++; s.nodes > maxNodes {
				return tree.TooMany(ErrDamaged, maxNodes)
			}
			dir.Children = append(dir.Children, s.file(dir, e, at))
		case kindBitmap:
			if len(s.bitmaps) == s.vol.geo.NumFATs {
				s.note(tree.Damage, "", at.off, "there are more than %d allocation bitmaps", s.vol.geo.NumFATs)
				break
			}
			s.bitmaps = append(s.bitmaps, *e)
		case kindUpcase:
			if len(s.upcases) == 1 {
				s.note(tree.Damage, "", at.off, "there is more than one up-case table")
				break
			}
			s.upcases = append(s.upcases, *e)
		case kindLabel:
			if e.units > maxLabel {
				s.note(tree.Warning, "", at.off, "the label has %d characters, at most %d are possible", e.units, maxLabel)
			} else {
				s.Label = fromUnits(toUnits(e.label[:], int(e.units)))
			}
		case kindGUID:
			s.GUID = slices.Clone(e.guid[:])
		}
		return nil
	}, func(at place, why string) {
		s.note(tree.Damage, path, at.off, "%s", why)
	})
}

// file makes the node of a file or directory, which has not been looked at yet.
func (s *scanner) file(dir *Node, e *entry, at place) *Node {
	n := &Node{Parent: dir, tree: s.Tree, at: at, Attr: e.attr, size: e.length, valid: e.valid, hash: e.nameHash, first: e.first, flags: e.flags,
		Created: e.created.time(), Modified: e.modified.time(), Accessed: e.accessed.time()}
	u := toUnits(e.name, e.nameLength)
	n.name = fromUnits(u)
	if why := badName(u); why != "" {
		s.note(tree.Damage, "/"+dir.Path(), at.off, "%s", why)
		n.err = errors.New(why)
	}
	return n
}

// loadBitmap finds the allocation bitmap that goes with the active FAT (7.1).
func (s *scanner) loadBitmap() error {
	want := (int64(s.vol.geo.ClusterCount) + 7) / 8
	for i := range s.bitmaps {
		e := &s.bitmaps[i]
		which := int(e.bitmap & 1)
		if which >= s.vol.geo.NumFATs || e.length < uint64(want) {
			s.note(tree.Damage, "", -1, "allocation bitmap %d has %d bytes, want %d, on a volume with %d FATs", which, e.length, want, s.vol.geo.NumFATs)
			continue
		}
		runs, tail, err := s.k.chain(e.first, s.k.need(e.length), false)
		if isIO(err) {
			return err
		}
		if err == nil && tail != "" {
			s.note(tree.Warning, "", -1, "allocation bitmap %d: %s", which, tail)
		}
		if err != nil {
			s.note(tree.Damage, "", -1, "allocation bitmap %d: %v", which, err)
			continue
		}
		s.system = append(s.system, runs...)
		if which == s.vol.geo.ActiveFAT {
			s.bits = newBitmap(s.vol.newRunReader(runs, want, want))
		}
	}
	if s.bits == nil {
		s.note(tree.Damage, "", -1, "there is no allocation bitmap that can be used")
	}
	return nil
}

// loadUpcase reads the up-case table (7.2).
func (s *scanner) loadUpcase() error {
	bad := func(format string, a ...any) error {
		s.note(tree.Damage, "", -1, "the up-case table: "+format, a...)
		return nil
	}
	if len(s.upcases) == 0 {
		return bad("there is none")
	}
	e := s.upcases[0]
	if e.length == 0 || e.length > maxUpcase {
		return bad("it has %d bytes, want 1…%d", e.length, maxUpcase)
	}
	runs, tail, err := s.k.chain(e.first, s.k.need(e.length), false)
	if isIO(err) {
		return err
	}
	if err != nil {
		return bad("%v", err)
	}
	if tail != "" {
		s.note(tree.Warning, "", -1, "the up-case table: %s", tail)
	}
	s.system = append(s.system, runs...)
	b := make([]byte, e.length)
	if n, err := s.vol.newRunReader(runs, int64(e.length), int64(e.length)).ReadAt(b, 0); n < len(b) {
		return &ioError{err}
	}
	if got := tableChecksum(b); got != e.checksum {
		return bad("its checksum is 0x%08x, want 0x%08x", got, e.checksum)
	}
	up := newUpcase()
	if err := up.parse(b); err != nil {
		return bad("%v", err)
	}
	s.up, s.folds = up, true
	return nil
}

// checkBitmap says which cluster of a node the bitmap has as free: the next writer may overwrite it, or has.
func (s *scanner) checkBitmap(n *Node, runs []run) error {
	if s.bits == nil {
		return nil
	}
	c, err := s.bits.free(runs)
	if c != 0 && err == nil {
		s.note(tree.Damage, "/"+n.Path(), -1, "cluster %d is in use, and free in the allocation bitmap", c)
	}
	return err
}

// walk looks at the entries of a directory that was listed, and at what is below.
func (s *scanner) walk(dir *Node, depth int) error {
	dir.byName = make(map[string]*Node, len(dir.Children))
	for _, n := range dir.Children {
		key := s.up.fold(units(n.name))
		if h := nameHash(key); s.folds && h != n.hash {
			s.note(tree.Damage, "/"+n.Path(), n.at.off, "the hash of the name is 0x%04x, want 0x%04x", n.hash, h)
		}
		if other := dir.byName[key]; other != nil {
			s.note(tree.Damage, "/"+n.Path(), n.at.off, "the name equals that of the entry at offset 0x%x", other.at.off)
		} else {
			dir.byName[key] = n
		}
		if err := s.allocation(n); err != nil {
			return err
		}
		if !n.IsDir() {
			s.Files++
			continue
		}
		s.Dirs++
		if n.err == nil && depth == maxDepth {
			n.err = fmt.Errorf("directories nest deeper than %d levels", maxDepth)
			s.note(tree.Damage, "/"+n.Path(), n.at.off, "%v", n.err)
		}
		if n.err != nil {
			continue
		}
		if err := s.list(n); err != nil {
			return err
		}
		if err := s.walk(n, depth+1); err != nil {
			return err
		}
	}
	return nil
}

// allocation finds the clusters of a file or directory (7.6.5 to 7.6.7). What is wrong with them becomes the node's error.
func (s *scanner) allocation(n *Node) error {
	if n.err != nil {
		return nil
	}
	bad := func(format string, a ...any) error {
		n.err = fmt.Errorf(format, a...)
		s.note(tree.Damage, "/"+n.Path(), n.at.off, "%v", n.err)
		return nil
	}
	switch {
	case n.valid > n.size:
		return bad("it has %d valid bytes of %d", n.valid, n.size)
	case n.IsDir() && n.valid != n.size:
		return bad("a directory has %d valid bytes of %d", n.valid, n.size)
	case n.IsDir() && (n.size > maxDir || n.size%uint64(s.vol.geo.ClusterSize) != 0):
		return bad("a directory has %d bytes, want whole clusters of %d bytes and at most %d", n.size, s.vol.geo.ClusterSize, maxDir)
	case n.size == 0 && n.first != 0:
		s.note(tree.Note, "/"+n.Path(), n.at.off, "it is empty, and has cluster %d", n.first)
		return nil
	case n.size == 0:
		return nil
	case n.flags&flagAllocation == 0:
		return bad("it has %d bytes, and no clusters", n.size)
	}
	var err error
	var tail string
	need := s.k.need(n.size)
	if n.flags&flagNoFATChain != 0 {
		n.runs, err = s.k.contiguous(n.first, need)
	} else {
		n.runs, tail, err = s.k.chain(n.first, need, false)
	}
	if isIO(err) {
		return err
	}
	if err != nil {
		return bad("%w", err)
	}
	if tail != "" {
		s.note(tree.Warning, "/"+n.Path(), -1, "%s", tail)
	}
	return s.checkBitmap(n, n.runs)
}
