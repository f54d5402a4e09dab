package replicate

import (
	"errors"
	"fmt"
	"io"
	"path"
	"slices"
	"strings"

	"espmirror/fatdriver"
	"espmirror/replicate/bls"
)

// entry is a loader entry with a file that it names.
type entry struct {
	path, file string
	key        string // of the line that names it
}

// namedBy lists what the loader entries of a source name, in order. Entries for which skip is true are left out.
func namedBy(src Source, skip func(path string) bool) ([]entry, error) {
	dir := src.Root().lookup("loader/entries")
	if dir == nil || !dir.Dir {
		return nil, nil
	}
	var out []entry
	for _, e := range dir.Children {
		if e.Dir || e.Err != nil || e.Size > maxEntryFile || !strings.HasSuffix(fatdriver.Fold(e.Name), ".CONF") || skip(e.Path) {
			continue
		}
		b, err := readEntry(src, e)
		if err != nil {
			return nil, err
		}
		for _, f := range b.Files {
			if parts := fatdriver.SplitPath(f.Path); len(parts) > 0 && !badParts(parts) {
				out = append(out, entry{e.Path, strings.Join(parts, "/"), f.Key})
			}
		}
	}
	return out, nil
}

// readEntry reads a loader entry of a source.
func readEntry(src Source, e *Item) (*bls.Entry, error) {
	text, err := readItem(src, e)
	if err != nil {
		return nil, err
	}
	return bls.Parse(e.Path, string(text)), nil
}

// takes says whether a path is replicated: it lies in an anchor, and nothing on the way to it is excluded.
func (s *selection) takes(p string) bool {
	if !s.covers(p) {
		return false
	}
	for at := p; at != "."; at = path.Dir(at) {
		if s.excluded(at) {
			return false
		}
	}
	return true
}

// saneSource refuses a source that is half-written, as what the targets have is better: one of which an entry that would be
// replicated names a file that is missing or empty, or of which a program that would be replicated is not all there.
func (r *run) saneSource() error {
	programs := map[*Item]entry{} // what entries have started
	for _, e := range r.named {
		it := r.src.Root().lookup(e.file)
		var what string
		switch {
		case it == nil:
			what = "missing"
		case it.Dir:
			what = "a directory"
		case it.Size == 0:
			what = "empty"
		default:
			if e.key == "efi" || e.key == "uki" {
				programs[it] = e
			}
			continue
		}
		return &Hint{
			refusal{fmt.Errorf("%w: %s: %s names %s, which is %s", ErrSource, r.src.Name(), e.path, e.file, what)},
			"finish what was being installed there, or leave the entry out with --exclude " + e.path,
		}
	}
	for _, f := range r.selectedFiles() {
		e, named := programs[f]
		if !named && !isProgram(f.Name) {
			continue
		}
		err := r.wholeProgram(f)
		if err == nil {
			continue
		}
		if !errors.Is(err, bls.ErrPE) {
			return fmt.Errorf("%w: cannot read %s: %w", ErrSource, f.Path, shrunk(err))
		}
		by := f.Path
		if named {
			by = fmt.Sprintf("%s names %s, which", e.path, f.Path)
		}
		return &Hint{
			refusal{fmt.Errorf("%w: %s: %s cannot be started: %w", ErrSource, r.src.Name(), by, err)},
			"finish what was being installed there, or leave the file out with --exclude " + f.Path,
		}
	}
	return nil
}

// isProgram says whether a file must be a PE image by its name. Names that begin with a dot are not looked at: no loader
// does either, and macOS puts files such as "._BOOTX64.EFI" beside those that it copies, which are no programs. `linux`
// may name anything: a kernel for firmware other than UEFI is no PE image.
func isProgram(name string) bool {
	return strings.HasSuffix(fatdriver.Fold(name), ".EFI") && !strings.HasPrefix(name, ".")
}

// wholeProgram returns bls.ErrPE when firmware would not start a file: it is no PE image, or not all of it is there. Of a
// kernel image, the kernel must be there too: what makes one, in several steps, adds it last.
func (r *run) wholeProgram(f *Item) error {
	rc, err := r.src.Open(f)
	if err != nil {
		return err
	}
	defer rc.Close()
	at, ok := rc.(io.ReaderAt)
	if !ok {
		at = &stream{r: rc}
	}
	image, err := bls.ReadPE(at, f.Size)
	if err != nil {
		return err
	}
	for _, s := range image.Sections {
		if s.Name == ".linux" && s.Size == 0 {
			return fmt.Errorf("%w: section %q, the kernel, is empty", bls.ErrPE, s.Name)
		}
	}
	return nil
}

// stream is what can only be read on: it reads at growing offsets, as bls.ReadPE does.
type stream struct {
	r   io.Reader
	pos int64
}

func (f *stream) ReadAt(b []byte, off int64) (int, error) {
	if off < f.pos {
		return 0, fmt.Errorf("internal error: reading back from 0x%x to 0x%x of a stream", f.pos, off)
	}
	n, err := io.CopyN(io.Discard, f.r, off-f.pos)
	f.pos += n
	if err != nil {
		return 0, err
	}
	m, err := io.ReadFull(f.r, b)
	f.pos += int64(m)
	return m, err
}

// dangling lists the loader entries that a target will have, and the files that they name and it will not: what a
// selection that takes entries without their files, or files without their entries, leads to.
func (r *run) dangling(s *side) ([]entry, error) {
	own, err := namedBy(&volumeSource{tree: s.tree, root: volumeItem(s.tree.Root, "")}, r.sel.takes)
	if err != nil {
		return nil, err
	}
	var out []entry
	for _, e := range slices.Concat(r.named, own) {
		var there bool
		if r.sel.takes(e.file) {
			it := r.src.Root().lookup(e.file)
			there = it != nil && !it.Dir
		} else {
			n := lookup(s.tree.Root, e.file)
			there = n != nil && !n.IsDir()
		}
		if !there {
			out = append(out, e)
		}
	}
	return out, nil
}

// warnDangling says what will not boot.
func (r *run) warnDangling(s *side) error {
	out, err := r.dangling(s)
	for _, e := range out {
		r.log.Warn("a loader entry names a file that will not be there", "target", s.t.Name, "entry", e.path, "file", e.file)
	}
	return err
}
