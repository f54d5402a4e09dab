//go:build !initrd

package replicate

import (
	"fmt"
	"io"
	"path"

	"espmirror/fatdriver"
	"espmirror/fatdriver/exfat"
)

type exfatSource struct {
	name  string
	tree  *exfat.Tree
	root  *Item
	nodes map[*Item]*exfat.Node
}

// OpenExFATSource takes an exFAT volume as the source: a stick, or the data disk of an image build. It returns ErrSource
// when the volume's tree is damaged. What FAT cannot hold, for its size or its name, is an error of that item alone, as in a
// directory source. The caller closes the device.
//
// Times are those that a directory source has where the volume is mounted: FAT keeps a wall clock, and gets that of UTC.
// Where exFAT has no UTC offset either, its wall clock goes over as it is. Attributes go over.
func OpenExFATSource(name string, v *exfat.Volume) (Source, error) {
	tree, err := v.Scan()
	if err != nil {
		return nil, fmt.Errorf("%w: %s: %w", ErrSource, name, err)
	}
	if err := tree.Damage(); err != nil {
		return nil, &Hint{fmt.Errorf("%w: %s: %w", ErrSource, name, err), fmt.Sprintf("run `espmirror check %s` to see every finding", name)}
	}
	s := &exfatSource{name: name, tree: tree, nodes: map[*Item]*exfat.Node{}}
	s.root = s.item(tree.Root, "")
	return s, nil
}

func (s *exfatSource) item(n *exfat.Node, at string) *Item {
	it := &Item{Name: n.Name(), Path: at, Dir: n.IsDir(), Size: n.Size()}
	s.nodes[it] = n
	if n.Parent != nil {
		// The bits have the same values in both.
		it.Meta = fatdriver.Meta{Attr: byte(n.Attr) & (fatdriver.AttrReadOnly | fatdriver.AttrHidden | fatdriver.AttrSystem | fatdriver.AttrArchive),
			Created: n.Created, Modified: n.Modified, Accessed: n.Accessed}
		it.Err = fits(it)
	}
	seen := map[string]string{}
	for _, c := range n.Children {
		c := s.item(c, path.Join(at, c.Name()))
		c.Err = apart(seen, c)
		it.Children = append(it.Children, c)
	}
	return it
}

func (s *exfatSource) Name() string { return s.name }
func (s *exfatSource) Root() *Item  { return s.root }
func (s *exfatSource) Close() error { return nil }

func (s *exfatSource) Open(it *Item) (io.ReadCloser, error) {
	n := s.nodes[it]
	if n == nil {
		return nil, fmt.Errorf("internal error: %s is no item of %s", it.Path, s.name)
	}
	r, err := s.tree.Open(n)
	if err != nil {
		return nil, err
	}
	return volumeFile{r}, nil
}
