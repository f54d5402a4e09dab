package iofs

import (
	"io/fs"
	"time"
)

// Info is both the fs.FileInfo and the fs.DirEntry of a node.
type Info struct {
	name     string
	dir, ro  bool
	size     int64
	modified time.Time
	node     Node
}

// NewInfo describes a node: size in bytes, 0 for a directory; modified is zero for the root, which has no entry.
func NewInfo(name string, n Node, size int64, readOnly bool, modified time.Time) *Info {
	return &Info{name, n.IsDir(), readOnly, size, modified, n}
}

// Name implements fs.FileInfo and fs.DirEntry.
func (i *Info) Name() string { return i.name }

// IsDir implements fs.FileInfo and fs.DirEntry.
func (i *Info) IsDir() bool { return i.dir }

// Type implements fs.DirEntry.
func (i *Info) Type() fs.FileMode { return i.Mode().Type() }

// Info implements fs.DirEntry.
func (i *Info) Info() (fs.FileInfo, error) { return i, nil }

// Size implements fs.FileInfo.
func (i *Info) Size() int64 { return i.size }

// Mode implements fs.FileInfo. FAT and exFAT have no owners: what one may do, all may. The read-only bit of a directory
// protects nothing on any system (Windows keeps folder settings in it), so it takes no write bits away.
func (i *Info) Mode() fs.FileMode {
	switch {
	case i.dir:
		return fs.ModeDir | 0o755
	case i.ro:
		return 0o444
	}
	return 0o644
}

// ModTime implements fs.FileInfo.
func (i *Info) ModTime() time.Time { return i.modified }

// Sys implements fs.FileInfo; it gives the *Node of the volume's own package.
func (i *Info) Sys() any { return i.node }

// String shows the entry as a line of a listing.
func (i *Info) String() string { return fs.FormatFileInfo(i) }
