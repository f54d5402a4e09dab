package archive

import (
	"archive/tar"
	"bufio"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"path"
	"slices"
	"strings"
	"time"

	"espmirror/replicate"
)

// Member is a file or directory that goes into an archive.
type Member struct {
	Path     string // slash-separated, relative
	Dir      bool
	Size     int64 // bytes
	Modified time.Time
}

// Members lists what is at the paths, with all below and the directories above, in the order of an archive. skip says
// what is left out, with all below it. Where the same name is met twice, it is listed once.
func Members(fsys fs.FS, paths []string, skip func(p string) bool) ([]Member, error) {
	l := lister{fsys: fsys, skip: skip, seen: map[string]bool{}}
	for _, p := range paths {
		if err := l.above(p); err != nil {
			return nil, err
		}
		if err := l.walk(p); err != nil {
			return nil, err
		}
	}
	// By bytes, which no locale changes: a directory comes before what is in it.
	slices.SortFunc(l.out, func(a, b Member) int { return cmp.Compare(a.Path, b.Path) })
	return l.out, nil
}

type lister struct {
	fsys fs.FS
	skip func(p string) bool
	seen map[string]bool
	out  []Member
}

func (l *lister) above(p string) error {
	if dir := path.Dir(p); dir != "." {
		if err := l.above(dir); err != nil {
			return err
		}
		info, err := fs.Stat(l.fsys, dir)
		if err != nil {
			return pathError(dir, err)
		}
		return l.add(dir, info)
	}
	return nil
}

func (l *lister) add(p string, info fs.FileInfo) error {
	if p == "." || l.seen[p] {
		return nil
	}
	if !fs.ValidPath(p) || strings.ContainsAny(p, "\\\x00") {
		return fmt.Errorf("cannot put %q into an archive: it is no path of one file", p)
	}
	l.seen[p] = true
	m := Member{Path: p, Dir: info.IsDir(), Modified: info.ModTime()}
	if !m.Dir {
		m.Size = info.Size()
	}
	l.out = append(l.out, m)
	return nil
}

func (l *lister) walk(p string) error {
	if l.skip(p) {
		return nil
	}
	info, err := fs.Stat(l.fsys, p)
	if err == nil {
		err = l.add(p, info)
	}
	if err != nil || !info.IsDir() {
		return pathError(p, err)
	}
	entries, err := fs.ReadDir(l.fsys, p)
	if err != nil {
		return pathError(p, err)
	}
	for _, e := range entries {
		// A volume may have any name; path.Join would make another one of some.
		if name := e.Name(); name == "." || name == ".." || name == "" || strings.Contains(name, "/") {
			return fmt.Errorf("cannot put %q of /%s into an archive: it is not the name of a file", name, strings.TrimPrefix(p, "."))
		}
		if err := l.walk(path.Join(p, e.Name())); err != nil {
			return err
		}
	}
	return nil
}

func pathError(p string, err error) error {
	if err == nil {
		return nil
	}
	var pe *fs.PathError
	if errors.As(err, &pe) {
		err = pe.Err
	}
	return fmt.Errorf("cannot read /%s: %w", strings.TrimPrefix(p, "."), err)
}

// date is the time that a member gets: that of the file in whole seconds, which FAT's local time is taken for UTC, and no
// later than latest, which is SOURCE_DATE_EPOCH when it is not zero. A file without a time has latest, or 1970.
func (m Member) date(latest time.Time) time.Time {
	t := m.Modified
	switch {
	case t.IsZero() && latest.IsZero():
		t = time.Unix(0, 0)
	case t.IsZero(), !latest.IsZero() && t.After(latest):
		t = latest
	}
	return time.Unix(max(0, t.Unix()), 0).UTC()
}

// WriteTar writes a tar archive of the members, which are in their order: ustar, and pax for a member that needs it.
// Owner and group are 0, modes 0755 and 0644; no date is later than latest, unless that is zero. When it fails, what was
// written has no end mark, and is no whole archive.
func WriteTar(ctx context.Context, w io.Writer, fsys fs.FS, members []Member, latest time.Time) error {
	tw := tar.NewWriter(w)
	for _, m := range members {
		h := &tar.Header{Typeflag: tar.TypeReg, Name: m.Path, Mode: 0o644, Size: m.Size, ModTime: m.date(latest)}
		if m.Dir {
			h.Typeflag, h.Name, h.Mode = tar.TypeDir, m.Path+"/", 0o755
		}
		if err := tw.WriteHeader(h); err != nil {
			return fmt.Errorf("cannot write %s: %w", m.Path, err)
		}
		if err := m.copy(ctx, tw, fsys); err != nil {
			return err
		}
	}
	return tw.Close()
}

// WriteCPIO writes a cpio archive of the format newc, as WriteTar does. Inode numbers count from 1, and there are no
// device numbers.
func WriteCPIO(ctx context.Context, w io.Writer, fsys fs.FS, members []Member, latest time.Time) error {
	c := &cpioWriter{w: bufio.NewWriter(w)}
	for i, m := range members {
		if m.Path == cpioTrailer {
			return fmt.Errorf("cannot write %s: a cpio archive ends with that name", m.Path)
		}
		if m.Size > maxFile {
			return fmt.Errorf("cannot write %s: it has %d bytes, a cpio archive holds at most %d", m.Path, m.Size, int64(maxFile))
		}
		mode, nlink := cpioFile|0o644, 1
		if m.Dir {
			mode, nlink = cpioDir|0o755, 2
		}
		// 32 bits end in February 2106, two years before FAT's dates.
		date := min(m.date(latest).Unix(), 1<<32-1)
		if err := c.header(i+1, mode, nlink, date, m.Size, m.Path); err != nil {
			return err
		}
		if err := m.copy(ctx, c, fsys); err != nil {
			return err
		}
		if err := c.fill(cpioAlign); err != nil {
			return err
		}
	}
	err := c.header(0, 0, 1, 0, 0, cpioTrailer)
	if err == nil {
		err = c.fill(512) // the block of GNU cpio and Linux's initrd tools
	}
	if err != nil {
		return err
	}
	return c.w.Flush()
}

type cpioWriter struct {
	w *bufio.Writer
	n int64
}

func (c *cpioWriter) Write(p []byte) (int, error) {
	n, err := c.w.Write(p)
	c.n += int64(n)
	return n, err
}

func (c *cpioWriter) fill(unit int64) error {
	_, err := c.Write(make([]byte, (unit-c.n%unit)%unit))
	return err
}

func (c *cpioWriter) header(ino, mode, nlink int, mtime, size int64, name string) error {
	_, err := fmt.Fprintf(c, "070701%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%s\x00",
		ino, mode, 0, 0, nlink, mtime, size, 0, 0, 0, 0, len(name)+1, 0, name)
	if err != nil {
		return err
	}
	return c.fill(cpioAlign)
}

// copy writes the data of a file: as much as the header said, or it is an error.
func (m Member) copy(ctx context.Context, w io.Writer, fsys fs.FS) error {
	if m.Dir {
		return nil
	}
	f, err := fsys.Open(m.Path)
	if err != nil {
		return pathError(m.Path, err)
	}
	defer f.Close()
	n, err := io.CopyBuffer(struct{ io.Writer }{w}, replicate.ContextReader(ctx, io.LimitReader(f, m.Size)), make([]byte, 1<<20))
	if err == nil && n != m.Size {
		err = fmt.Errorf("%d bytes of %d: %w", n, m.Size, io.ErrUnexpectedEOF)
	}
	if ctx.Err() != nil {
		return ctx.Err()
	}
	return pathError(m.Path, err)
}

// OwnFiles says which paths of a volume belong to that volume alone, and are not for an archive that others unpack: the
// random seed, of which two systems must not have the same, and espmirror's journal and state.
func OwnFiles(p string) bool { return replicate.OwnFile(p) }
