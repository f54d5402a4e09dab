package replicate

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"math"
	"os"
	"path"
	"path/filepath"
	"slices"
	"sort"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"espmirror/blockdev"
	"espmirror/fatdriver"
)

// File is a small file that is written as a whole.
type File struct {
	Path    string // slash-separated, relative to the root of the volume
	Content []byte
	// Meta is what a new directory entry says. A file that has the content already keeps its own.
	Meta fatdriver.Meta
}

// fileSource is a source in memory that holds some files and the directories above them.
type fileSource struct {
	name    string
	root    *Item
	content map[*Item][]byte
}

// NewFileSource returns a source that holds exactly these files. Directories above them come into being by being named,
// with the times of the first file below. Paths are taken as they are; Put checks them.
func NewFileSource(name string, files []File) Source {
	s := &fileSource{name: name, root: &Item{Dir: true}, content: map[*Item][]byte{}}
	for _, f := range files {
		at := s.root
		parts := fatdriver.SplitPath(f.Path)
		for i, part := range parts {
			c := at.child(part)
			if c == nil {
				c = &Item{Name: part, Path: path.Join(at.Path, part), Dir: i+1 < len(parts)}
				c.Meta = fatdriver.Meta{Created: f.Meta.Created, Modified: f.Meta.Modified, Accessed: f.Meta.Accessed}
				at.Children = append(at.Children, c)
			}
			at = c
		}
		at.Meta, at.Size = f.Meta, int64(len(f.Content))
		s.content[at] = f.Content
	}
	return s
}

func (s *fileSource) Name() string { return s.name }
func (s *fileSource) Root() *Item  { return s.root }
func (s *fileSource) Close() error { return nil }

func (s *fileSource) Open(it *Item) (io.ReadCloser, error) {
	b, ok := s.content[it]
	if !ok {
		return nil, fmt.Errorf("internal error: %s is not a file of %s", it.Path, s.name)
	}
	return io.NopCloser(bytes.NewReader(b)), nil
}

// cleanFiles checks the paths of files that are to be written as they are, and returns the files with clean ones, sorted.
func cleanFiles(files []File) ([]File, error) {
	out := slices.Clone(files)
	for i := range out {
		f := &out[i]
		p, err := cleanPath(f.Path)
		if err != nil {
			return nil, err
		}
		for _, part := range fatdriver.SplitPath(p) {
			if err := fatdriver.CheckName(part); err != nil {
				return nil, fmt.Errorf("cannot put %q: %w", f.Path, err)
			}
		}
		// The run that writes the file writes its record there, and what has the journal's place keeps it from being made.
		journal := fatdriver.Fold(journalPath)
		if k := fatdriver.Fold(p); k == "" || k == journal || inside(k, journal) || inside(journal, k) {
			return nil, fmt.Errorf("cannot put %q: %w: that place is not free for files", f.Path, ErrRefused)
		}
		if int64(len(f.Content)) > math.MaxUint32 {
			return nil, fmt.Errorf("cannot put %s: it has %d bytes, FAT holds at most %d", p, len(f.Content), int64(math.MaxUint32))
		}
		f.Path = p
	}
	sort.Slice(out, func(i, j int) bool { return fatdriver.Fold(out[i].Path) < fatdriver.Fold(out[j].Path) })
	seen := map[string]bool{}
	for _, f := range out {
		seen[fatdriver.Fold(f.Path)] = true
	}
	if len(seen) < len(out) {
		return nil, errors.New("internal error: one file is to be put twice")
	}
	for k := range seen {
		for _, dir := range prefixes(k) {
			if dir != k && seen[dir] {
				return nil, fmt.Errorf("internal error: %s is to be put, and a file below it", dir)
			}
		}
	}
	return out, nil
}

// Put writes some small files onto one volume and leaves everything else as it is. It is a run like that of Sync, with
// its journal, its commit points and its promise: after a power cut each file is the old one or the new one. What has the
// content already is not written again, and when that is true of all of them, nothing is written at all. Directories that
// are missing are made.
//
// Unlike Sync it may write what belongs to one ESP alone, as the caller made the content for this volume. Only the
// journal is refused. Of the options, the selection means nothing. The error is that of the result.
func Put(ctx context.Context, t *Target, files []File, o Options) (Result, error) {
	res := Result{Target: t.Name}
	s := newSide(t, &res, o)
	files, err := cleanFiles(files)
	if err != nil {
		s.fail(err)
		return res, res.Err
	}
	if len(files) == 0 {
		res.Outcome = InSync
		return res, nil
	}
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	o.KeepFree = min(o.KeepFree, maxKeepFree)
	sel := &selection{byName: map[string]bool{}}
	for _, f := range files {
		sel.anchors = append(sel.anchors, f.Path)
		sel.byName[fatdriver.Fold(f.Path)] = true // or what is each volume's own would be left out
	}
	r := &run{src: NewFileSource("memory", files), sel: sel, opt: o, log: o.Log, hashes: map[*Item][32]byte{}, sides: []*side{s}}
	if r.put(ctx, s); res.Err != nil {
		res.Err = fmt.Errorf("cannot put %s: %w", listed(sel.anchors), res.Err)
	}
	return res, res.Err
}

// put takes one side through the phases of Sync, without those that judge the source.
func (r *run) put(ctx context.Context, s *side) {
	r.open(s)
	if s.res.Err == nil {
		s.fail(r.inTheWay(s))
	}
	if s.res.Err == nil {
		s.fail(r.compare(ctx))
	}
	if s.res.Err == nil {
		if err := r.makePlan(s); err != nil {
			s.fail(fmt.Errorf("cannot plan for %s: %w", s.t.Name, err))
		}
	}
	if s.res.Err != nil || r.opt.DryRun {
		return
	}
	r.prepare(s)
	if s.res.Err == nil {
		if err := r.build(ctx, []*side{s}); s.res.Err == nil {
			s.fail(err)
		}
	}
}

// inTheWay refuses a directory in the place of a file: replacing it would delete what is in it.
func (r *run) inTheWay(s *side) error {
	for _, a := range r.sel.anchors {
		if n := lookup(s.tree.Root, a); n != nil && n.IsDir() {
			return fmt.Errorf("%w: %s is a directory on %s", ErrRefused, n.Path(), s.t.Name)
		}
	}
	return nil
}

// listed names the first of some paths, and how many more there are.
func listed(paths []string) string {
	if len(paths) == 1 {
		return paths[0]
	}
	return fmt.Sprintf("%s and %d more", paths[0], len(paths)-1)
}

// The names under which PutDir writes: ownPatterns has them, so a run that reads the directory leaves them out, and they
// go together with the programs that clean up after bootctl.
const (
	tempPrefix = ".btmp.espmirror-"
	tempRandom = 8 // bytes
)

// dirLockWait is how long PutDir waits for another one in the same directory.
const dirLockWait = 10 * time.Second

// PutDir writes some small files below a directory: that where a volume is mounted, or a tree that an image build made.
// Each is written under a temporary name with mode 0600, flushed, and renamed; then the directory and the filesystem are
// flushed. A file that has the content already is not touched, and what an earlier run left behind is removed. Names are
// found as FAT finds them, without regard to case, and no symbolic link leads out of the directory. Of Meta only the time
// of modification is used.
//
// A rename on a mounted FAT is several writes, to the new name's entry, to the old one's, and to the FAT, which the kernel
// orders as it likes until the filesystem is flushed. A power cut within these milliseconds can leave the old file, the new
// one, or one of the two names with the other's clusters, and then fsck.fat has to mend the volume. Nobody can do better
// through a mount point; bootctl writes its seed in the same way. Whoever reads such a file therefore takes a damaged one
// for a missing one.
func PutDir(dir string, files []File) error { return dirWriter{}.put(dir, files) }

// dirWriter does what PutDir does. A test lets a step fail by check, which is called before each; it is nil otherwise.
type dirWriter struct{ check func(step string) error }

// step carries out one call that makes something durable or visible.
func (w dirWriter) step(name string, do func() error) error {
	if w.check != nil {
		if err := w.check(name); err != nil {
			return err
		}
	}
	return do()
}

func (w dirWriter) put(dir string, files []File) error {
	files, err := cleanFiles(files)
	if err != nil {
		return err
	}
	root, err := os.OpenRoot(dir)
	if err != nil {
		return fmt.Errorf("cannot write below %s: %w", dir, err)
	}
	defer root.Close()
	wrote := false
	for _, f := range files {
		changed, err := w.putFile(root, f)
		if err != nil {
			return fmt.Errorf("cannot write %s: %w", filepath.Join(dir, f.Path), err)
		}
		wrote = wrote || changed
	}
	if !wrote {
		return nil
	}
	// The clusters of a file and its directory entry are only on the medium together when the FAT is, too.
	if err := w.step("syncfs", func() error { return syncRoot(root) }); err != nil {
		return fmt.Errorf("cannot flush the filesystem of %s: %w", dir, err)
	}
	return nil
}

func syncRoot(root *os.Root) error {
	d, err := root.Open(".")
	if err != nil {
		return err
	}
	defer d.Close()
	return unix.Syncfs(int(d.Fd()))
}

// putFile writes one file below root, and says whether anything was changed.
func (w dirWriter) putFile(root *os.Root, f File) (wrote bool, err error) {
	parent, base, made, err := w.ownDir(root, f.Path)
	if err != nil {
		return made, err
	}
	d, err := root.Open(parent)
	if err != nil {
		return made, err
	}
	defer d.Close() // and with it goes the lock
	if err := lockDir(d); err != nil {
		return made, err
	}
	entries, err := d.ReadDir(-1)
	if err != nil {
		return made, err
	}
	removed := false
	for _, e := range entries {
		// Nobody writes it any more: whoever does has the lock.
		if strings.HasPrefix(fatdriver.Fold(e.Name()), fatdriver.Fold(tempPrefix)) && e.Type().IsRegular() {
			if err := root.Remove(path.Join(parent, e.Name())); err != nil && !errors.Is(err, fs.ErrNotExist) {
				return made || removed, err
			}
			removed = true
		}
	}
	name := path.Join(parent, inDir(entries, base))
	same, err := hasContent(root, name, f.Content)
	if err != nil || same {
		if removed && err == nil {
			err = w.step("sync directory", d.Sync)
		}
		return made || removed, err
	}
	temp, err := w.writeTemp(root, parent, f)
	if err != nil {
		return made || removed, err
	}
	if err := w.step("rename", func() error { return root.Rename(temp, name) }); err != nil {
		return true, errors.Join(err, root.Remove(temp))
	}
	return true, w.step("sync directory", d.Sync)
}

// ownDir finds the directory of a file, without regard to case, and makes what is missing of it.
func (w dirWriter) ownDir(root *os.Root, p string) (parent, base string, made bool, err error) {
	parts := fatdriver.SplitPath(p)
	parent = "."
	for _, part := range parts[:len(parts)-1] {
		d, err := root.Open(parent)
		if err != nil {
			return "", "", made, err
		}
		entries, err := d.ReadDir(-1)
		d.Close()
		if err != nil {
			return "", "", made, err
		}
		next := path.Join(parent, inDir(entries, part))
		if err := w.step("mkdir", func() error { return root.Mkdir(next, 0o755) }); err == nil {
			made = true
			if err := w.step("sync directory", func() error { return syncDir(root, parent) }); err != nil {
				return "", "", made, err
			}
		} else if !errors.Is(err, fs.ErrExist) {
			return "", "", made, err
		}
		parent = next
	}
	return parent, parts[len(parts)-1], made, nil
}

// inDir is the name by which a directory has an entry that FAT takes for the same; the name itself when it has none.
func inDir(entries []fs.DirEntry, name string) string {
	k := fatdriver.Fold(name)
	found := name
	for _, e := range entries {
		if e.Name() == name {
			return name
		}
		if fatdriver.Fold(e.Name()) == k {
			found = e.Name()
		}
	}
	return found
}

func syncDir(root *os.Root, at string) error {
	d, err := root.Open(at)
	if err != nil {
		return err
	}
	defer d.Close()
	return d.Sync()
}

// lockDir takes the lock by which two runs do not remove each other's temporary files. It is dropped when d is closed.
func lockDir(d *os.File) error {
	for until := time.Now().Add(dirLockWait); ; time.Sleep(20 * time.Millisecond) {
		err := unix.Flock(int(d.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		switch {
		case err == nil:
			return nil
		case errors.Is(err, unix.EWOULDBLOCK) && time.Now().After(until):
			return &blockdev.BusyError{By: []string{"locked by another program"}}
		case errors.Is(err, unix.EWOULDBLOCK), errors.Is(err, unix.EINTR):
		default:
			return fmt.Errorf("cannot lock its directory: %w", err)
		}
	}
}

// hasContent says whether a file is there with that content. What is there and is no regular file is an error.
func hasContent(root *os.Root, name string, content []byte) (bool, error) {
	info, err := root.Lstat(name)
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	if !info.Mode().IsRegular() {
		kind := "a directory"
		if !info.IsDir() {
			kind = kindOf(info.Mode())
		}
		return false, fmt.Errorf("%w: it is %s", ErrRefused, kind)
	}
	if info.Size() != int64(len(content)) {
		return false, nil
	}
	have, err := root.ReadFile(name)
	if err != nil {
		return false, nil // what cannot be read is written again
	}
	return bytes.Equal(have, content), nil
}

// writeTemp writes the content under a temporary name and returns it; the file is on the medium as far as it can be while
// its directory is not.
func (w dirWriter) writeTemp(root *os.Root, parent string, f File) (name string, err error) {
	var id [tempRandom]byte
	if _, err := rand.Read(id[:]); err != nil {
		return "", err
	}
	name = path.Join(parent, tempPrefix+hex.EncodeToString(id[:]))
	out, err := root.OpenFile(name, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return "", err
	}
	err = w.step("write", func() error { _, err := out.Write(f.Content); return err })
	if err == nil && !f.Meta.Modified.IsZero() {
		err = root.Chtimes(name, f.Meta.Modified, f.Meta.Modified)
	}
	if err == nil {
		// The new name must not lead to a file whose content is still in the cache.
		err = w.step("sync file", out.Sync)
	}
	if cerr := out.Close(); err == nil {
		err = cerr
	}
	if err != nil {
		return "", errors.Join(err, root.Remove(name))
	}
	return name, nil
}
