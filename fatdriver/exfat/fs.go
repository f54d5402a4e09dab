package exfat

import (
	"espmirror/fatdriver/internal/iofs"
	"fmt"
	"io/fs"
	"slices"
	"strings"
	"time"
)

// FS returns the tree as an io/fs file system, which also implements fs.ReadDirFS and fs.StatFS; its files are
// io.ReaderAt and io.Seeker. Names are found without regard to case, by the volume's up-case table. FileInfo.Sys gives the
// *Node.
//
// io/fs allows only UTF-8 in names, so unpaired surrogates appear as U+FFFD there. A file or directory that is damaged
// is listed; to read it is an error that wraps ErrDamaged. Of two entries with one name only the first is there.
//
// The result is safe for concurrent use.
func (t *Tree) FS() fs.FS {
	f := &treeFS{tree: t, dirs: map[*Node]*fsDir{}}
	f.index(t.Root)
	return f
}

// treeFS is a Tree as an fs.FS. The index is complete before the first use, so that no lock is needed.
type treeFS struct {
	tree *Tree
	dirs map[*Node]*fsDir
}

// fsDir is the index of one directory.
type fsDir struct {
	list  []fs.DirEntry // sorted by name
	names map[string]*Node
}

func (f *treeFS) index(dir *Node) {
	d := &fsDir{names: make(map[string]*Node, len(dir.Children))}
	f.dirs[dir] = d
	for _, n := range dir.Children {
		i := infoOf(n)
		// What io/fs cannot name, a slash among it, is damage that Findings tell of.
		if k := f.fold(i.name); d.names[k] == nil && fs.ValidPath(i.name) && i.name != "." && !strings.Contains(i.name, "/") {
			d.names[k] = n
			d.list = append(d.list, i)
		}
		if n.IsDir() {
			f.index(n)
		}
	}
	slices.SortFunc(d.list, func(a, b fs.DirEntry) int { return strings.Compare(a.Name(), b.Name()) })
}

func (f *treeFS) fold(name string) string { return f.tree.up.fold(units(name)) }

func (f *treeFS) find(op, name string) (*Node, error) {
	if !fs.ValidPath(name) {
		return nil, &fs.PathError{Op: op, Path: name, Err: fs.ErrInvalid}
	}
	n := f.tree.Root
	if name == "." {
		return n, nil
	}
	for part := range strings.SplitSeq(name, "/") {
		var next *Node
		if d := f.dirs[n]; d != nil {
			next = d.names[f.fold(part)]
		}
		switch {
		case next == nil && n.err != nil:
			return nil, damagedPath(op, name, n) // the entry may well be there
		case next == nil:
			return nil, &fs.PathError{Op: op, Path: name, Err: fs.ErrNotExist}
		}
		n = next
	}
	return n, nil
}

func damagedPath(op, name string, n *Node) error {
	return &fs.PathError{Op: op, Path: name, Err: fmt.Errorf("%w: /%s: %w", ErrDamaged, n.Path(), n.err)}
}

// Open implements fs.FS.
func (f *treeFS) Open(name string) (fs.File, error) {
	n, err := f.find("open", name)
	switch {
	case err != nil:
		return nil, err
	case n.err != nil:
		return nil, damagedPath("open", name, n)
	case n.IsDir():
		return iofs.NewDir(name, infoOf(n), f.dirs[n].list), nil
	}
	r, err := f.tree.Open(n)
	if err != nil {
		return nil, &fs.PathError{Op: "open", Path: name, Err: err}
	}
	return iofs.NewFile(name, infoOf(n), r), nil
}

// ReadDir implements fs.ReadDirFS.
func (f *treeFS) ReadDir(name string) ([]fs.DirEntry, error) {
	n, err := f.find("readdir", name)
	switch {
	case err != nil:
		return nil, err
	case !n.IsDir():
		return nil, &fs.PathError{Op: "readdir", Path: name, Err: iofs.ErrNotDir}
	case n.err != nil:
		return nil, damagedPath("readdir", name, n)
	}
	return slices.Clone(f.dirs[n].list), nil
}

// Stat implements fs.StatFS.
func (f *treeFS) Stat(name string) (fs.FileInfo, error) {
	n, err := f.find("stat", name)
	if err != nil {
		return nil, err
	}
	return infoOf(n), nil
}

// fileInfo is both the fs.FileInfo and the fs.DirEntry of a node.
type fileInfo struct {
	name string
	node *Node
}

func infoOf(n *Node) *fileInfo {
	if n.Parent == nil {
		return &fileInfo{".", n}
	}
	return &fileInfo{strings.ToValidUTF8(n.name, "\uFFFD"), n}
}

// Name implements fs.FileInfo and fs.DirEntry.
func (i *fileInfo) Name() string { return i.name }

// IsDir implements fs.FileInfo and fs.DirEntry.
func (i *fileInfo) IsDir() bool { return i.node.IsDir() }

// Type implements fs.DirEntry.
func (i *fileInfo) Type() fs.FileMode { return i.Mode().Type() }

// Info implements fs.DirEntry.
func (i *fileInfo) Info() (fs.FileInfo, error) { return i, nil }

// Size implements fs.FileInfo, in bytes; 0 for a directory.
func (i *fileInfo) Size() int64 { return i.node.Size() }

// Mode implements fs.FileInfo, as package fatdriver has it.
func (i *fileInfo) Mode() fs.FileMode {
	switch {
	case i.IsDir():
		return fs.ModeDir | 0o755
	case i.node.Attr&AttrReadOnly != 0:
		return 0o444
	}
	return 0o644
}

// ModTime implements fs.FileInfo; zero for the root, which has no entry.
func (i *fileInfo) ModTime() time.Time { return i.node.Modified }

// Sys implements fs.FileInfo; it gives the *Node.
func (i *fileInfo) Sys() any { return i.node }

// String shows the entry as a line of a listing.
func (i *fileInfo) String() string { return fs.FormatFileInfo(i) }
