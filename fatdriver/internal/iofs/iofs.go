// Package iofs holds the open files and directories of a volume as io/fs wants them, for every kind of volume.
package iofs

import (
	"errors"
	"io"
	"io/fs"
	"slices"
)

// Errors of what is asked of the wrong kind.
var (
	ErrNotDir = errors.New("not a directory")
	ErrIsDir  = errors.New("is a directory")
)

// File is an open file, which is io.ReaderAt and io.Seeker besides.
type File struct {
	path string
	info fs.FileInfo
	r    *io.SectionReader // nil once closed
}

// NewFile opens the file that r reads.
func NewFile(path string, info fs.FileInfo, r *io.SectionReader) *File { return &File{path, info, r} }

func (f *File) fail(op string, err error) error {
	if err == nil || err == io.EOF {
		return err
	}
	return &fs.PathError{Op: op, Path: f.path, Err: err}
}

// Stat implements fs.File.
func (f *File) Stat() (fs.FileInfo, error) {
	if f.r == nil {
		return nil, f.fail("stat", fs.ErrClosed)
	}
	return f.info, nil
}

// Read implements fs.File.
func (f *File) Read(p []byte) (int, error) {
	if f.r == nil {
		return 0, f.fail("read", fs.ErrClosed)
	}
	n, err := f.r.Read(p)
	return n, f.fail("read", err)
}

// ReadAt implements io.ReaderAt.
func (f *File) ReadAt(p []byte, off int64) (int, error) {
	switch {
	case f.r == nil:
		return 0, f.fail("read", fs.ErrClosed)
	case off < 0:
		// io.SectionReader would call it the end of the file.
		return 0, f.fail("read", fs.ErrInvalid)
	}
	n, err := f.r.ReadAt(p, off)
	return n, f.fail("read", err)
}

// Seek implements io.Seeker.
func (f *File) Seek(off int64, whence int) (int64, error) {
	if f.r == nil {
		return 0, f.fail("seek", fs.ErrClosed)
	}
	n, err := f.r.Seek(off, whence)
	return n, f.fail("seek", err)
}

// Close implements fs.File.
func (f *File) Close() error {
	if f.r == nil {
		return f.fail("close", fs.ErrClosed)
	}
	f.r = nil
	return nil
}

// Dir is an open directory.
type Dir struct {
	path   string
	info   fs.FileInfo
	list   []fs.DirEntry
	next   int
	closed bool
}

// NewDir opens a directory with the given entries, which it does not change.
func NewDir(path string, info fs.FileInfo, list []fs.DirEntry) *Dir {
	return &Dir{path: path, info: info, list: list}
}

func (d *Dir) fail(op string, err error) error {
	return &fs.PathError{Op: op, Path: d.path, Err: err}
}

// Stat implements fs.File.
func (d *Dir) Stat() (fs.FileInfo, error) {
	if d.closed {
		return nil, d.fail("stat", fs.ErrClosed)
	}
	return d.info, nil
}

// Read implements fs.File: a directory has no bytes to give.
func (d *Dir) Read([]byte) (int, error) {
	if d.closed {
		return 0, d.fail("read", fs.ErrClosed)
	}
	return 0, d.fail("read", ErrIsDir)
}

// ReadDir implements fs.ReadDirFile.
func (d *Dir) ReadDir(n int) ([]fs.DirEntry, error) {
	if d.closed {
		return nil, d.fail("readdir", fs.ErrClosed)
	}
	rest := d.list[d.next:]
	if n > 0 {
		if len(rest) == 0 {
			return nil, io.EOF
		}
		rest = rest[:min(n, len(rest))]
	}
	d.next += len(rest)
	return slices.Clone(rest), nil
}

// Close implements fs.File.
func (d *Dir) Close() error {
	if d.closed {
		return d.fail("close", fs.ErrClosed)
	}
	d.closed = true
	return nil
}
