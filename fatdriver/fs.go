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
		Info: func(n iofs.Node) *iofs.Info { return infoOf(n.(*Node)) }}
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
			d.List = append(d.List, infoNamed(name, n))
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

func infoOf(n *Node) *iofs.Info {
	if n.Parent == nil {
		return iofs.NewInfo(".", n, 0, false, time.Time{})
	}
	return infoNamed(fsName(n), n)
}

// infoNamed describes what has an entry, by the name that io/fs sees.
func infoNamed(name string, n *Node) *iofs.Info {
	return iofs.NewInfo(name, n, n.Size(), n.Entry.Attr()&AttrReadOnly != 0, n.Entry.ModTime())
}
