package fatdriver

import (
	"espmirror/fatdriver/internal/iofs"
	"fmt"
	"io"
	"io/fs"
	"slices"
	"strings"
	"time"
	"unicode/utf8"
)

// FS returns the tree as an io/fs file system, which also implements fs.ReadDirFS, fs.StatFS and fs.ReadFileFS; its
// files are io.ReaderAt and io.Seeker. Names are found without regard to case, by long or short name. FileInfo.Sys
// gives the *Node. Times are UTC, as in Entry.ModTime.
//
// io/fs allows only UTF-8 in names, so an entry whose long name has unpaired surrogates appears under its short name.
// A file or directory whose chain is damaged is listed; to read it is an error that wraps ErrDamaged. Of two entries
// with one name, which is damage too, only the first is there, the one that readers of FAT find.
//
// The result does not see later changes of the tree, and is safe for concurrent use.
func (t *Tree) FS() fs.FS {
	f := &treeFS{tree: t, dirs: make(map[*Node]*fsDir)}
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
	claim := func(name string, n *Node) bool {
		k := Fold(name)
		if d.names[k] != nil {
			return false
		}
		d.names[k] = n
		return true
	}
	// Of two equal names the first is the one that readers of a FAT directory find. Long names go before short ones: on
	// a sound volume no short name equals another entry's long name, and on a damaged one the long name is shown.
	for _, n := range dir.Children {
		if name := fsName(n); claim(name, n) {
			d.list = append(d.list, &fileInfo{name: name, node: n})
		}
	}
	for _, n := range dir.Children {
		claim(displayPlain(n.Entry.short()), n)
		if n.IsDir() {
			f.index(n)
		}
	}
	slices.SortFunc(d.list, func(a, b fs.DirEntry) int { return strings.Compare(a.Name(), b.Name()) })
}

// fsName is the name of a node as io/fs may see it.
func fsName(n *Node) string {
	if name := n.Name(); utf8.ValidString(name) {
		return name
	}
	return displayPlain(n.Entry.short())
}

func (f *treeFS) find(op, name string) (*Node, error) {
	if !fs.ValidPath(name) {
		return nil, &fs.PathError{Op: op, Path: name, Err: fs.ErrInvalid}
	}
	n := f.tree.Root
	if name == "." {
		return n, nil
	}
	for part := range strings.SplitSeq(name, "/") {
		d := f.dirs[n]
		if d == nil {
			return nil, &fs.PathError{Op: op, Path: name, Err: fs.ErrNotExist}
		}
		next := d.names[Fold(part)]
		if next == nil {
			if n.err != nil {
				// The entry may well be there, in the part of the directory that cannot be read.
				return nil, damagedPath(op, name, n)
			}
			return nil, &fs.PathError{Op: op, Path: name, Err: fs.ErrNotExist}
		}
		n = next
	}
	return n, nil
}

func damagedPath(op, name string, n *Node) error {
	return &fs.PathError{Op: op, Path: name, Err: fmt.Errorf("%w: /%s: %w", ErrDamaged, n.Path(), n.err)}
}

func infoOf(n *Node) *fileInfo {
	if n.Parent == nil {
		return &fileInfo{name: ".", node: n}
	}
	return &fileInfo{name: fsName(n), node: n}
}

// Open implements fs.FS.
func (f *treeFS) Open(name string) (fs.File, error) {
	n, err := f.find("open", name)
	if err != nil {
		return nil, err
	}
	if n.err != nil {
		return nil, damagedPath("open", name, n)
	}
	if n.IsDir() {
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

// ReadFile implements fs.ReadFileFS.
func (f *treeFS) ReadFile(name string) ([]byte, error) {
	n, err := f.find("read", name)
	switch {
	case err != nil:
		return nil, err
	case n.IsDir():
		return nil, &fs.PathError{Op: "read", Path: name, Err: iofs.ErrIsDir}
	case n.err != nil:
		return nil, damagedPath("read", name, n)
	}
	r, err := f.tree.Open(n)
	if err != nil {
		return nil, &fs.PathError{Op: "read", Path: name, Err: err}
	}
	// The size is backed by a chain of that many clusters, so it is no larger than the volume.
	b := make([]byte, r.Size())
	if _, err := io.ReadFull(r, b); err != nil {
		return nil, &fs.PathError{Op: "read", Path: name, Err: err}
	}
	return b, nil
}

// fileInfo is both the fs.FileInfo and the fs.DirEntry of a node.
type fileInfo struct {
	name string
	node *Node
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

// Mode implements fs.FileInfo. FAT has no owners: what one may do, all may. The read-only bit of a directory protects
// nothing on any system (Windows keeps folder settings in it), so it takes no write bits away.
func (i *fileInfo) Mode() fs.FileMode {
	switch {
	case i.IsDir():
		return fs.ModeDir | 0o755
	case i.node.Entry.Attr()&AttrReadOnly != 0:
		return 0o444
	}
	return 0o644
}

// ModTime implements fs.FileInfo; zero for the root, which has no entry.
func (i *fileInfo) ModTime() time.Time {
	if i.node.Entry == nil {
		return time.Time{}
	}
	return i.node.Entry.ModTime()
}

// Sys implements fs.FileInfo; it gives the *Node.
func (i *fileInfo) Sys() any { return i.node }

// String shows the entry as a line of a listing.
func (i *fileInfo) String() string { return fs.FormatFileInfo(i) }
