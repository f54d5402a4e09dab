package crashtest

import (
	"espmirror/fixtures"
	"espmirror/fixtures/vm"
)

// Listings are the trees of the run, the old one first, for judges that see no more than names and contents.
func (c *Run) Listings() ([]vm.Listing, error) {
	var all []vm.Listing
	for _, n := range c.first {
		s, err := c.Recording.State(epochLine(n))
		if err != nil {
			return nil, err
		}
		tree, err := c.trees.Read(s, 0, true)
		if err != nil {
			return nil, err
		}
		l := vm.Listing{}
		for i := range tree.Entries {
			e := &tree.Entries[i]
			switch {
			case fixtures.Ours(e.Path):
			case e.Dir:
				l[e.Path+"/"] = nil
			default:
				b, err := tree.Read(e)
				if err != nil {
					return nil, err
				}
				l[e.Path] = b
			}
		}
		all = append(all, l)
	}
	return all, nil
}

// Frozen is a copy of a state that outlives the exploration.
func (c *Run) Frozen(s *fixtures.State) (*fixtures.Sparse, error) {
	img := c.Recording.Base.(*fixtures.Sparse).Clone()
	err := s.Changed(func(off int64, b []byte) error {
		_, err := img.WriteAt(b, off)
		return err
	})
	return img, err
}
