package replicate

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"sort"

	"espmirror/fatdriver"
)

// Item is a file or directory of a source.
type Item struct {
	Name     string
	Path     string // slash-separated, relative to the root; "" for the root
	Dir      bool
	Size     int64 // bytes
	Children []*Item

	// Template holds the slots of the entry when the source is a FAT volume: names, attributes and times go over as they
	// are. Otherwise Meta says what is known.
	Template []byte
	Meta     fatdriver.Meta

	// Err says why the item cannot be replicated: it is a symbolic link, a device, or has a name that FAT cannot hold. It
	// matters only when the item is selected.
	Err error

	node *fatdriver.Node
	data []byte // the content, of an item that is made for one target; nil: the source has it
}

// Source is what is replicated: a tree that was read whole when it was opened, and whose files can be read.
type Source interface {
	Name() string
	Root() *Item
	// Open returns the content of a file. Reading a volume's file several times gives the same bytes; a directory is
	// live, and a file that changes while it is read fails the run by its size. Where it is an io.ReaderAt besides, a part
	// of the file can be had without what is in front of it.
	Open(it *Item) (io.ReadCloser, error)
	Close() error
}

// meta is what a new entry for the item says, when it cannot be the template.
func (it *Item) meta() fatdriver.Meta {
	if it.node != nil && it.node.Entry != nil {
		return it.node.Entry.Meta()
	}
	return it.Meta
}

// child finds an entry of a directory without regard to case.
func (it *Item) child(name string) *Item {
	k := fatdriver.Fold(name)
	for _, c := range it.Children {
		if fatdriver.Fold(c.Name) == k {
			return c
		}
	}
	return nil
}

// lookup finds a path below the item; nil when there is none.
func (it *Item) lookup(p string) *Item {
	for _, name := range fatdriver.SplitPath(p) {
		if it = it.child(name); it == nil {
			return nil
		}
	}
	return it
}

type volumeSource struct {
	name string
	tree *fatdriver.Tree
	root *Item
}

// OpenVolumeSource takes a FAT volume as the source. It returns ErrSource when the volume's tree is damaged: a broken
// primary is not replicated. The caller closes the device.
func OpenVolumeSource(name string, v *fatdriver.Volume) (Source, error) {
	tree, err := v.Scan()
	if err != nil {
		return nil, fmt.Errorf("%w: %s: %w", ErrSource, name, err)
	}
	if err := tree.Damage(); err != nil {
		return nil, &Hint{fmt.Errorf("%w: %s: %w", ErrSource, name, err), fmt.Sprintf("run `espmirror check %s` to see every finding", name)}
	}
	return &volumeSource{name, tree, volumeItem(tree.Root, "")}, nil
}

func volumeItem(n *fatdriver.Node, at string) *Item {
	it := &Item{Name: n.Name(), Path: at, Dir: n.IsDir(), Size: n.Size(), node: n}
	if n.Entry != nil {
		it.Template = n.Entry.Group
	}
	for _, c := range n.Children {
		it.Children = append(it.Children, volumeItem(c, path.Join(at, c.Name())))
	}
	return it
}

func (s *volumeSource) Name() string { return s.name }
func (s *volumeSource) Root() *Item  { return s.root }
func (s *volumeSource) Close() error { return nil }

func (s *volumeSource) Open(it *Item) (io.ReadCloser, error) {
	r, err := s.tree.Open(it.node)
	if err != nil {
		return nil, err
	}
	return volumeFile{r}, nil
}

// volumeFile is a file of a volume, which can be read at any offset too.
type volumeFile struct{ *io.SectionReader }

func (volumeFile) Close() error { return nil }

type dirSource struct {
	name string
	root *os.Root
	tree *Item
}

// OpenDirSource takes a directory of the running system as the source: the mounted primary, or a tree that an image
// build made. Nothing outside it is read, whatever its symbolic links say.
func OpenDirSource(dir string) (Source, error) {
	r, err := os.OpenRoot(dir)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrSource, err)
	}
	s := &dirSource{name: dir, root: r}
	if s.tree, err = s.read("", nil); err != nil {
		r.Close()
		return nil, fmt.Errorf("%w: %s: %w", ErrSource, dir, err)
	}
	return s, nil
}

// maxSourceDepth bounds how deep a directory source may nest, as fatdriver bounds it for volumes.
const maxSourceDepth = 250

func (s *dirSource) read(at string, e fs.DirEntry) (*Item, error) {
	it := &Item{Path: at, Dir: true}
	if e != nil {
		it.Name, it.Dir = e.Name(), e.IsDir()
		info, err := e.Info()
		if err != nil {
			return nil, err
		}
		it.Size = info.Size()
		it.Meta = fatdriver.Meta{Modified: info.ModTime(), Created: info.ModTime(), Accessed: info.ModTime()}
		if info.Mode()&0o200 == 0 && !it.Dir {
			it.Meta.Attr |= fatdriver.AttrReadOnly
		}
		if !it.Dir {
			it.Meta.Attr |= fatdriver.AttrArchive
		}
		switch {
		case it.Dir:
			it.Size = 0
		case !info.Mode().IsRegular():
			it.Err = fmt.Errorf("cannot replicate %s: it is %s, which FAT cannot hold", at, kindOf(info.Mode()))
			return it, nil
		}
		it.Err = fits(it)
	}
	if !it.Dir {
		return it, nil
	}
	if len(fatdriver.SplitPath(at)) > maxSourceDepth {
		it.Err = fmt.Errorf("cannot replicate %s: directories nest deeper than %d levels", at, maxSourceDepth)
		return it, nil
	}
	entries, err := s.list(at)
	if err != nil && e != nil && !errors.Is(err, fs.ErrNotExist) {
		// What is not selected need not be readable: lost+found, or what belongs to somebody else.
		it.Err = fmt.Errorf("cannot replicate %s: %w", at, err)
		return it, nil
	}
	if err != nil {
		return nil, err
	}
	sort.Slice(entries, func(i, j int) bool { return entries[i].Name() < entries[j].Name() })
	seen := map[string]string{}
	for _, e := range entries {
		c, err := s.read(path.Join(at, e.Name()), e)
		if errors.Is(err, fs.ErrNotExist) {
			continue // gone since the directory was read
		}
		if err != nil {
			return nil, err
		}
		c.Err = apart(seen, c)
		it.Children = append(it.Children, c)
	}
	return it, nil
}

func (s *dirSource) list(at string) ([]fs.DirEntry, error) {
	d, err := s.root.Open(path.Join(".", at))
	if err != nil {
		return nil, err
	}
	defer d.Close()
	return d.ReadDir(-1)
}

func kindOf(m fs.FileMode) string {
	switch {
	case m&fs.ModeSymlink != 0:
		return "a symbolic link"
	case m&fs.ModeNamedPipe != 0:
		return "a named pipe"
	case m&fs.ModeSocket != 0:
		return "a socket"
	}
	return "a device"
}

func (s *dirSource) Name() string { return s.name }
func (s *dirSource) Root() *Item  { return s.tree }
func (s *dirSource) Close() error { return s.root.Close() }

func (s *dirSource) Open(it *Item) (io.ReadCloser, error) { return s.root.Open(it.Path) }

// fits says why FAT cannot hold an item, for its size or its name.
func fits(it *Item) error {
	if !it.Dir && it.Size > 1<<32-1 {
		return fmt.Errorf("cannot replicate %s: it has %d bytes, FAT holds at most %d", it.Path, it.Size, int64(1<<32-1))
	}
	if err := fatdriver.CheckName(it.Name); err != nil {
		return fmt.Errorf("cannot replicate %s: %w", it.Path, err)
	}
	return nil
}

// apart is the item's error or, where FAT takes its name for one that was seen in its directory, that.
func apart(seen map[string]string, it *Item) error {
	k := fatdriver.Fold(it.Name)
	other, ok := seen[k]
	seen[k] = it.Path
	if ok && it.Err == nil {
		return fmt.Errorf("cannot replicate %s: FAT takes its name for that of %s", it.Path, other)
	}
	return it.Err
}
