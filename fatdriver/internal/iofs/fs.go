package iofs

import (
	"fmt"
	"io"
	"io/fs"
	"slices"
	"strings"
)

// Node is a file or directory of a volume.
type Node interface {
	IsDir() bool
	Path() string
	Err() error // why the content cannot be read, nil when it can
}

// Index is the index of one directory.
type Index struct {
	List  []fs.DirEntry   // sorted by name
	Names map[string]Node // by the folded name
}

// FS is a tree as an fs.FS. It is complete before the first use, so that no lock is needed.
type FS struct {
	Root    Node
	Dirs    map[Node]*Index
	Fold    func(name string) string
	Info    func(Node) *Info
	Read    func(Node) (*io.SectionReader, error)
	Damaged error // what the error wraps of a node that cannot be read
}

func fail(op, name string, err error) error { return &fs.PathError{Op: op, Path: name, Err: err} }

func (f *FS) damaged(op, name string, n Node) error {
	return fail(op, name, fmt.Errorf("%w: /%s: %w", f.Damaged, n.Path(), n.Err()))
}

func (f *FS) find(op, name string) (n Node, err error) {
	if !fs.ValidPath(name) {
		return n, fail(op, name, fs.ErrInvalid)
	}
	n = f.Root
	if name == "." {
		return n, nil
	}
	for _, part := range strings.Split(name, "/") {
		var next Node
		if d := f.Dirs[n]; d != nil {
			next = d.Names[f.Fold(part)]
		}
		switch {
		case next == nil && n.IsDir() && n.Err() != nil:
			return n, f.damaged(op, name, n) // the entry may well be there, in the part that cannot be read
		case next == nil:
			return n, fail(op, name, fs.ErrNotExist)
		}
		n = next
	}
	return n, nil
}

// readable finds a directory that can be read or, when it need not be one, a file that can.
func (f *FS) readable(op, name string, dir bool) (Node, error) {
	n, err := f.find(op, name)
	switch {
	case err != nil:
		return n, err
	case dir && !n.IsDir():
		return n, fail(op, name, ErrNotDir)
	case n.Err() != nil:
		return n, f.damaged(op, name, n)
	}
	return n, nil
}

// Open implements fs.FS.
func (f *FS) Open(name string) (fs.File, error) {
	n, err := f.readable("open", name, false)
	if err != nil {
		return nil, err
	}
	if n.IsDir() {
		return NewDir(name, f.Info(n), f.Dirs[n].List), nil
	}
	r, err := f.Read(n)
	if err != nil {
		return nil, fail("open", name, err)
	}
	return NewFile(name, f.Info(n), r), nil
}

// ReadDir implements fs.ReadDirFS.
func (f *FS) ReadDir(name string) ([]fs.DirEntry, error) {
	n, err := f.readable("readdir", name, true)
	if err != nil {
		return nil, err
	}
	return slices.Clone(f.Dirs[n].List), nil
}

// Stat implements fs.StatFS.
func (f *FS) Stat(name string) (fs.FileInfo, error) {
	n, err := f.find("stat", name)
	if err != nil {
		return nil, err
	}
	return f.Info(n), nil
}
