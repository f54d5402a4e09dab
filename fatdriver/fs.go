package fatdriver

import (
	"io"
	"io/fs"
	"slices"
	"strings"
	"time"
	"unicode/utf8"

	"espmirror/fatdriver/internal/iofs"
)

// FS returns the tree as an io/fs file system, which also implements fs.ReadDirFS and fs.StatFS; its
// files are io.ReaderAt and io.Seeker. Names are found without regard to case, by long or short name. FileInfo.Sys
// gives the *Node. Times are UTC, as in Entry.ModTime.
//
// io/fs allows only UTF-8 in names, so an entry whose long name has unpaired surrogates appears under its short name.
// A file or directory whose chain is damaged is listed; to read it is an error that wraps ErrDamaged. Of two entries
// with one name, which is damage too, only the first is there, the one that readers of FAT find.
//
// The result does not see later changes of the tree, and is safe for concurrent use.
func (t *Tree) FS() fs.FS {
	f := &treeFS{Root: t.Root, Dirs: map[iofs.Node]*iofs.Index{}, Fold: Fold, Read: func(n iofs.Node) (*io.SectionReader, error) { return t.Open(n.(*Node)) }, Damaged: ErrDamaged,
		Info: func(n iofs.Node) iofs.Info { return infoOf(n.(*Node)) }}
	indexDir(f, t.Root)
	return f
}

type treeFS = iofs.FS

func indexDir(f *treeFS, dir *Node) {
	d := &iofs.Index{Names: make(map[string]iofs.Node, len(dir.Children))}
	f.Dirs[dir] = d
	claim := func(name string, n *Node) bool {
		k := Fold(name)
		if d.Names[k] != nil {
			return false
		}
		d.Names[k] = n
		return true
	}
	// Of two equal names the first is the one that readers of a FAT directory find. Long names go before short ones: on
	// a sound volume no short name equals another entry's long name, and on a damaged one the long name is shown.
	for _, n := range dir.Children {
		if name := fsName(n); claim(name, n) {
			d.List = append(d.List, &fileInfo{name: name, node: n})
		}
	}
	for _, n := range dir.Children {
		claim(displayPlain(n.Entry.short()), n)
		if n.IsDir() {
			indexDir(f, n)
		}
	}
	slices.SortFunc(d.List, func(a, b fs.DirEntry) int { return strings.Compare(a.Name(), b.Name()) })
}

// fsName is the name of a node as io/fs may see it.
func fsName(n *Node) string {
	if name := n.Name(); utf8.ValidString(name) {
		return name
	}
	return displayPlain(n.Entry.short())
}

func infoOf(n *Node) *fileInfo {
	if n.Parent == nil {
		return &fileInfo{name: ".", node: n}
	}
	return &fileInfo{name: fsName(n), node: n}
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
