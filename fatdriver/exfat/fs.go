package exfat

import (
	"io"
	"io/fs"
	"slices"
	"strings"

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
		Fold: func(name string) string { return t.up.fold(units(name)) }, Info: func(n iofs.Node) *iofs.Info { return infoOf(n.(*Node)) }}
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
		if k := f.Fold(i.Name()); d.Names[k] == nil && fs.ValidPath(i.Name()) && i.Name() != "." && !strings.Contains(i.Name(), "/") {
			d.Names[k] = n
			d.List = append(d.List, i)
		}
		if n.IsDir() {
			indexDir(f, n)
		}
	}
	slices.SortFunc(d.List, func(a, b fs.DirEntry) int { return strings.Compare(a.Name(), b.Name()) })
}

func infoOf(n *Node) *iofs.Info {
	name := "."
	if n.Parent != nil {
		name = strings.ToValidUTF8(n.name, "\uFFFD")
	}
	return iofs.NewInfo(name, n, n.Size(), n.Attr&AttrReadOnly != 0, n.Modified)
}
