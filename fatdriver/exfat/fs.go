package exfat

import (
	"io"
	"io/fs"
	"slices"
	"strings"
	"time"

	"espmirror/fatdriver/internal/iofs"
)

// FS returns the tree as an io/fs file system, which also implements fs.ReadDirFS and fs.StatFS; its files
// are io.ReaderAt and io.Seeker. Names are found without regard to case, by the volume's up-case table. FileInfo.Sys gives
// the *Node.
//
// io/fs allows only UTF-8 in names, so unpaired surrogates appear as U+FFFD there. A file or directory that is damaged
// is listed; to read it is an error that wraps ErrDamaged. Of two entries with one name only the first is there.
//
// The result is safe for concurrent use.
func (t *Tree) FS() fs.FS {
	f := &treeFS{Root: t.Root, Dirs: map[iofs.Node]*iofs.Index{}, Read: func(n iofs.Node) (*io.SectionReader, error) { return t.Open(n.(*Node)) }, Damaged: ErrDamaged,
		Fold: func(name string) string { return t.up.fold(units(name)) }, Info: func(n iofs.Node) iofs.Info { return infoOf(n.(*Node)) }}
	indexDir(f, t.Root)
	return f
}

type treeFS = iofs.FS

func indexDir(f *treeFS, dir *Node) {
	d := &iofs.Index{Names: make(map[string]iofs.Node, len(dir.Children))}
	f.Dirs[dir] = d
	for _, n := range dir.Children {
		i := infoOf(n)
		// What io/fs cannot name, a slash among it, is damage that Findings tell of.
		if k := f.Fold(i.name); d.Names[k] == nil && fs.ValidPath(i.name) && i.name != "." && !strings.Contains(i.name, "/") {
			d.Names[k] = n
			d.List = append(d.List, i)
		}
		if n.IsDir() {
			indexDir(f, n)
		}
	}
	slices.SortFunc(d.List, func(a, b fs.DirEntry) int { return strings.Compare(a.Name(), b.Name()) })
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
