package fatdriver

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"

	"espmirror/fatdriver/internal/tree"
)

// Severity says what a finding means for somebody who wants to use the volume.
type Severity = tree.Severity

const (
	// Note is something unusual that nobody has to mend.
	Note = tree.Note
	// Warning is something that fsck.fat would mend and that harms no reader: lost clusters, a stale free count.
	Warning = tree.Warning
	// Damage is something that makes readers disagree or fail. A volume with damage is neither source nor target.
	Damage = tree.Damage
)

// Finding is one thing that is wrong with a volume, and where.
type Finding = tree.Finding

// Node is a file or directory of a scanned volume.
type Node struct {
	Entry    *Entry // nil for the root
	Parent   *Node  // nil for the root
	Children []*Node
	Runs     []Run // the cluster chain; empty for an empty file and for the fixed root of FAT12/16

	labels []*Entry // volume-label slots, carried over wherever the directory goes
	byName map[string]*Node
	err    error // why the content cannot be read
}

// Name is the entry's name, "" for the root.
func (n *Node) Name() string {
	if n.Entry == nil {
		return ""
	}
	return n.Entry.Name
}

// IsDir says whether the node is a directory.
func (n *Node) IsDir() bool { return n.Entry == nil || n.Entry.IsDir() }

// Size is the file's size in bytes, 0 for a directory.
func (n *Node) Size() int64 {
	if n.IsDir() {
		return 0
	}
	return n.Entry.Size()
}

// Path is the slash-separated path from the root, "" for the root itself.
func (n *Node) Path() string {
	if n.Parent == nil {
		return ""
	}
	if p := n.Parent.Path(); p != "" {
		return p + "/" + n.Name()
	}
	return n.Name()
}

// cluster is the node's first cluster, 0 when it has none (and for the root, as ".." wants it).
func (n *Node) cluster() Cluster {
	if n.Parent == nil || len(n.Runs) == 0 {
		return 0
	}
	return n.Runs[0].First
}

// Err says why the content of a file or directory cannot be read, nil when it can.
func (n *Node) Err() error { return n.err }

// Child finds an entry of a directory by its long or short name, without regard to case; nil when there is none.
func (n *Node) Child(name string) *Node {
	if n.byName == nil {
		n.byName = make(map[string]*Node, len(n.Children))
		for _, c := range n.Children {
			if k := Fold(c.Name()); n.byName[k] == nil { // of two equal names every reader finds the first
				n.byName[k] = c
			}
		}
	}
	if c := n.byName[Fold(name)]; c != nil {
		return c
	}
	if len(name) > 12 {
		return nil
	}
	k := Fold(name)
	for _, c := range n.Children {
		if c.Entry.slots() > 1 && Fold(displayPlain(c.Entry.short())) == k {
			return c
		}
	}
	return nil
}

// Tree is the content of a volume at the time of Scan.
type Tree struct {
	Root     *Node
	Label    string // from the root directory, else from the boot sector
	Findings []Finding

	vol   *Volume
	used  bitmap // every cluster that a file or directory holds
	nodes int

	around bool // go on where a sector of a directory cannot be read
	unread []*Unreadable
}

// Unreadable is a sector of a directory that the medium does not give.
type Unreadable struct {
	Path string // of the directory, without a leading slash
	Off  int64  // byte offset on the volume
	Err  error
}

func (u *Unreadable) Error() string {
	if u.Path == "" {
		return fmt.Sprintf("cannot read the root directory at offset 0x%x: %v", u.Off, u.Err)
	}
	return fmt.Sprintf("cannot read directory /%s at offset 0x%x: %v", u.Path, u.Off, u.Err)
}

// Unwrap returns the device's error.
func (u *Unreadable) Unwrap() error { return u.Err }

// Volume returns the volume that was scanned.
func (t *Tree) Volume() *Volume { return t.vol }

// Damage returns ErrDamaged with the first finding of that severity, or nil.
func (t *Tree) Damage() error { return tree.Damaged(t.Findings, ErrDamaged) }

// Lookup finds a path below the root, without regard to case. "" and "/" are the root; nil means that there is none.
func (t *Tree) Lookup(path string) *Node {
	return tree.Lookup(t.Root, path, (*Node).Child)
}

// SplitPath splits a path at slashes and backslashes, and leaves out empty parts.
func SplitPath(path string) []string { return tree.SplitPath(path) }

// Open returns the content of a file of the tree.
func (t *Tree) Open(n *Node) (*io.SectionReader, error) {
	if n.IsDir() {
		return nil, fmt.Errorf("cannot read %s: it is a directory", n.Path())
	}
	if n.err != nil {
		return nil, fmt.Errorf("cannot read %s: %w", n.Path(), n.err)
	}
	return io.NewSectionReader(t.vol.newRunReader(n.Runs, n.Size()), 0, n.Size()), nil
}

// maxDepth bounds how deep directories may nest: a path has at most 260 characters for most readers.
const maxDepth = 256

// MaxNodes is how many files and directories a volume may have for Scan to read it.
const MaxNodes = tree.MaxNodes

// maxNodes is that; a test makes it less.
var maxNodes = MaxNodes

// maxFindings bounds what a hostile volume can make us keep.
const maxFindings = 10_000

// Scan walks the whole tree. What is wrong with it goes into Findings; the error is for a medium that cannot be read.
// Every cluster belongs to whoever is found first, so the walk ends on any input, loops included.
func (v *Volume) Scan() (*Tree, error) { return v.scan(false) }

// maxUnreadable is after how many unreadable sectors ScanAround gives up: each may take a dying disk half a minute, and a
// cut leaves one, or those of one physical sector.
const maxUnreadable = 16

// ScanAround is Scan for recovery: it goes on where a sector of a directory cannot be read, as if its slots were deleted
// ones, and lists those sectors. Such a tree has damage. It serves to find the journal that may explain the sector, and
// nothing else: what lies below the directory seems lost.
func (v *Volume) ScanAround() (*Tree, []*Unreadable, error) {
	t, err := v.scan(true)
	if err != nil {
		return nil, nil, err
	}
	return t, t.unread, nil
}

func (v *Volume) scan(around bool) (*Tree, error) {
	t := &Tree{vol: v, used: newBitmap(&v.geo), around: around}
	t.Root = &Node{}
	if v.geo.Type == FAT32 {
		runs, err := v.chain(v.geo.RootCluster, v.maxDirClusters(), t.used)
		t.Root.Runs = runs
		if err != nil {
			if isIO(err) {
				return nil, err
			}
			t.note(Damage, t.Root, v.geo.RootCluster, "%v", err)
			t.Root.err = err
		}
	}
	if err := t.walk(t.Root, 0); err != nil {
		return nil, err
	}
	if t.Label == "" {
		t.Label = v.bootLabel()
	}
	return t, nil
}

// maxDirClusters is the longest chain that a directory of 65,536 slots can have.
func (v *Volume) maxDirClusters() int64 {
	return max(1, maxSlots*slotSize/int64(v.geo.ClusterSize))
}

// isIO tells an error of the medium from one of the data on it.
func isIO(err error) bool {
	var io *ioError
	return errors.As(err, &io)
}

// ioError marks an error that came from the device.
type ioError struct{ err error }

func (e *ioError) Error() string { return e.err.Error() }
func (e *ioError) Unwrap() error { return e.err }

func (t *Tree) note(s Severity, n *Node, c Cluster, format string, a ...any) {
	if len(t.Findings) == maxFindings {
		return
	}
	path := "/"
	if n != nil {
		path += n.Path()
	}
	t.Findings = append(t.Findings, Finding{Severity: s, Path: path, Cluster: uint32(c), Off: -1, Msg: fmt.Sprintf(format, a...)})
}

// rawDir reads all slots of a directory.
func (v *Volume) rawDir(n *Node) ([]byte, error) {
	return v.rawDirAround(n, nil)
}

// rawDirAround reads all slots of a directory, and calls lost with each sector that cannot be read, until that returns
// an error. Without lost any failed read is an error.
func (v *Volume) rawDirAround(n *Node, lost func(sector []byte, u *Unreadable) error) ([]byte, error) {
	var raw []byte
	read := func(p []byte, off int64) error {
		if lost == nil {
			if _, err := v.dev.ReadAt(p, off); err != nil {
				return &ioError{&Unreadable{n.Path(), firstUnreadable(v.dev, p, off, v.geo.block()), err}}
			}
			return nil
		}
		return v.readAround(p, off, func(sector []byte, off int64, err error) error {
			return lost(sector, &Unreadable{n.Path(), off, err})
		})
	}
	if n.Parent == nil && v.geo.Type != FAT32 {
		raw = make([]byte, v.geo.RootSize)
		return raw, read(raw, v.geo.RootOff)
	}
	cs := int64(v.geo.ClusterSize)
	raw = make([]byte, clustersIn(n.Runs)*cs)
	at := int64(0)
	for _, r := range n.Runs {
		k := int64(r.Count) * cs
		if err := read(raw[at:at+k], v.geo.ClusterOff(r.First)); err != nil {
			return nil, err
		}
		at += k
	}
	return raw, nil
}

// skip notes a sector of a directory that cannot be read. What follows in the directory is looked at all the same.
func (t *Tree) skip(sector []byte, u *Unreadable) error {
	if len(t.unread) == maxUnreadable {
		return &ioError{u}
	}
	for i := range sector {
		sector[i] = slotDeleted
	}
	t.unread = append(t.unread, u)
	t.Findings = append(t.Findings, Finding{Severity: Damage, Path: "/" + u.Path, Off: u.Off, Msg: fmt.Sprintf("the directory cannot be read: %v", u.Err)})
	return nil
}

func (t *Tree) walk(dir *Node, depth int) error {
	if dir.err != nil {
		return nil
	}
	var lost func(sector []byte, u *Unreadable) error
	if t.around {
		lost = t.skip
	}
	raw, err := t.vol.rawDirAround(dir, lost)
	if err != nil {
		return err
	}
	isRoot := dir.Parent == nil
	d := parseDir(t.vol.geo.Type, raw, isRoot)
	for _, is := range d.issues {
		sev := Warning
		if is.fatal {
			sev = Damage
		}
		t.note(sev, dir, 0, "slot %d: %s", is.slot, is.msg)
	}
	dir.labels = d.labels
	if isRoot && len(d.labels) > 0 {
		t.Label = labelText(d.labels[0].Group[:11])
	}
	if !isRoot {
		t.checkDots(dir, d)
	}
	if tail := raw[min((d.end+1)*slotSize, len(raw)):]; len(bytes.TrimLeft(tail, "\x00")) > 0 {
		// EDK2 reads on past an end marker whose attribute byte has bit 3 set; a shadow is zeroed whole. fsck.fat does
		// not stop at the marker at all, and takes what follows for entries unless it is deleted.
		sev := Note
		for i := 0; i < len(tail); i += slotSize {
			if tail[i] != slotEnd && tail[i] != slotDeleted {
				sev = Warning
			}
		}
		t.note(sev, dir, 0, "slots after the end marker are not empty")
	}
	if t.nodes += len(d.entries); t.nodes > maxNodes {
		return tree.TooMany(ErrDamaged, maxNodes)
	}
	seen := newNameSet()
	for _, e := range d.entries {
		n := &Node{Entry: e, Parent: dir}
		if seen.claim(e.Name) != nil || !seen.claimShort(e.Name, e.short()) {
			t.note(Damage, n, 0, "the directory has this name, or its short name, twice")
		}
		dir.Children = append(dir.Children, n)
	}
	for _, n := range dir.Children {
		if err := t.visit(n, depth+1); err != nil {
			return err
		}
	}
	return nil
}

func (t *Tree) checkDots(dir *Node, d *parsedDir) {
	for i, s := range d.dots {
		switch {
		case s == nil:
		case s[offAttr]&AttrDir == 0:
			t.note(Damage, dir, 0, "%q has the attributes 0x%02x, which are not a directory's", "..."[:i+1], s[offAttr])
		case s[offNTRes]&ntNoShort != 0:
			t.note(Warning, dir, 0, "%q is marked as having no short name", "..."[:i+1])
		}
	}
	if s := d.dots[0]; s != nil {
		if c := slotCluster(t.vol.geo.Type, s); c != dir.cluster() {
			t.note(Damage, dir, 0, `"." points to cluster %d, want %d`, c, dir.cluster())
		}
	}
	if s := d.dots[1]; s != nil {
		want := dir.Parent.cluster()
		c := slotCluster(t.vol.geo.Type, s)
		switch {
		case c == want:
		case dir.Parent.Parent == nil && t.vol.geo.Type == FAT32 && c == t.vol.geo.RootCluster:
			t.note(Warning, dir, 0, `".." points to the root's cluster %d, the specification wants 0`, c)
		default:
			t.note(Damage, dir, 0, `".." points to cluster %d, want %d`, c, want)
		}
	}
}

// visit follows the chain of one entry and walks into it when it is a directory.
func (t *Tree) visit(n *Node, depth int) error {
	v := t.vol
	first := slotCluster(v.geo.Type, n.Entry.short())
	bad := func(c Cluster, format string, a ...any) {
		n.err = fmt.Errorf(format, a...)
		t.note(Damage, n, c, format, a...)
	}
	if n.IsDir() {
		if depth > maxDepth {
			bad(0, "directories nest deeper than %d levels", maxDepth)
			return nil
		}
		if first == 0 {
			bad(0, "the directory has no cluster")
			return nil
		}
		if size := binary.LittleEndian.Uint32(n.Entry.short()[offFileSize:]); size != 0 {
			t.note(Damage, n, 0, "the directory has a size of %d bytes, want 0", size)
		}
		runs, err := v.chain(first, v.maxDirClusters(), t.used)
		if isIO(err) {
			return err
		}
		n.Runs = runs
		if err != nil {
			bad(0, "%v", err)
			return nil
		}
		return t.walk(n, depth)
	}
	cs := int64(v.geo.ClusterSize)
	size := n.Entry.Size()
	want := (size + cs - 1) / cs
	switch {
	case first == 0 && size == 0:
		return nil
	case first == 0:
		bad(0, "the file has %d bytes and no cluster", size)
		return nil
	case size == 0:
		bad(first, "the file is empty, but has a cluster")
		// Its clusters stay out of Runs: nobody reads them, and nobody may take them for lost ones.
		if _, err := v.chain(first, int64(v.geo.Clusters), t.used); isIO(err) {
			return err
		}
		return nil
	}
	runs, err := v.chain(first, want, t.used)
	if isIO(err) {
		return err
	}
	n.Runs = runs
	if err != nil {
		bad(0, "%v (the file has %d bytes)", err, size)
	} else if have := clustersIn(runs); have != want {
		bad(0, "the file has %d bytes, its chain holds only %d clusters of %d", size, have, cs)
	}
	return nil
}
