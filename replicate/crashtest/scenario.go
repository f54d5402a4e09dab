// Package crashtest plays through power cuts of whole runs: scenarios generated from a seed, a recorder under the run,
// every state that a cut can leave, and judges that share no code with what wrote the volume.
//
// A Scenario says what is on a volume, how worn it is, and what it is to become. Record runs the sync; the Run that
// comes out of it is explored in phases (Explore), each of which adds to the tally.
package crashtest

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"time"

	"espmirror/blockdev"
	"espmirror/fatdriver"
	"espmirror/fixtures"
	"espmirror/replicate"
)

// Geometry is the layout of a volume.
type Geometry struct {
	Type              fatdriver.Type
	Size              int64 // bytes
	Sector            int   // of the volume and of the device, bytes
	Device            int   // sector of the device in bytes where it is not that of the volume, else 0
	SectorsPerCluster int
	FATs              int
}

func (g Geometry) String() string {
	s := fmt.Sprintf("FAT%d/%d/%d", g.Type, g.Sector, g.SectorsPerCluster)
	if g.Device != 0 {
		s += fmt.Sprintf("on%d", g.Device)
	}
	if g.FATs == 1 {
		s += "/1FAT"
	}
	return s
}

// unit is the number of bytes that the device writes at once.
func (g Geometry) unit() int {
	if g.Device != 0 {
		return g.Device
	}
	return g.Sector
}

// Wear is what befalls a volume in life.
type Wear struct {
	Holes       int  // free clusters between files of others
	Leave       int  // if not 0, all clusters but that many are filled
	Bad, Lost   int  // clusters with a bad-cluster mark; allocated to nothing
	Dirty       bool // the dirty bit of the boot sector, as Linux sets it
	DirtyFAT    bool // FAT[1] without its clean bit
	WrongFree   bool // FSInfo has a wrong free count
	UnknownFree bool // FSInfo has none
	NoJournal   bool // somebody deleted EFI/espmirror
}

// Scenario is a run to be cut short. It is data, so that a failing one can be made smaller and written down.
type Scenario struct {
	Name     string
	Seed     uint64 // 0 for one made by hand
	Geometry Geometry
	Wear     Wear
	Before   Tree // selected files that the target has
	After    Tree // what it is to have
	Others   Tree // files that are not selected
	Select   []string
	Member   bool // the run counts generations
	Known    bool // the target is at one already
}

// Options are those of the recorded run.
func (s *Scenario) Options() replicate.Options {
	o := replicate.Options{Selection: replicate.Selection{Select: s.Select}}
	if s.Member {
		o.Member, o.Force, o.Now = true, true, time.Unix(1_700_000_000, 0) // forced, because the trees come from nowhere
		o.Save = func(context.Context, []byte) error { return nil }
	}
	return o
}

// syncTo replicates a tree to a device.
func syncTo(dev blockdev.Device, t Tree, o replicate.Options) (replicate.Result, error) {
	res, err := replicate.Sync(context.Background(), t.Source(), []*replicate.Target{{Name: "target", Dev: dev}}, o)
	if err != nil {
		return replicate.Result{}, err
	}
	return res[0], nil
}

// Volume makes the target as it is before the run.
func (s *Scenario) Volume() (*fixtures.Sparse, error) {
	g := s.Geometry
	dev := fixtures.NewSparse(g.Size, g.unit())
	err := fatdriver.Format(dev, fatdriver.FormatOptions{Type: g.Type, SectorSize: g.Sector, SectorsPerCluster: g.SectorsPerCluster,
		NumFATs: g.FATs, Serial: 0x1234ABCD, Label: "ESP", Align: 1})
	if err != nil {
		return nil, fmt.Errorf("cannot make the volume of scenario %s: %w", s.Name, err)
	}
	fill := func(more Tree) error {
		all := Tree{}
		for _, t := range []Tree{s.Before, s.Others, more} {
			for p, c := range t {
				all[p] = c
			}
		}
		if len(all) == 0 {
			return nil
		}
		res, err := syncTo(dev, all, replicate.Options{Selection: replicate.Selection{Select: []string{"/"}}, NoReadBack: true})
		if err == nil {
			err = res.Err
		}
		return err
	}
	holes := func(n, step int) Tree {
		t := Tree{}
		for i := 0; i < n; i += step {
			t[fmt.Sprintf("HOLES/%06d", i)] = "x"
		}
		return t
	}
	steps := []func() error{func() error { return fill(nil) }}
	if n := 2 * s.Wear.Holes; n > 0 {
		// What others wrote and deleted: small files, of which every other one goes again.
		steps = []func() error{
			func() error { return fill(holes(n, 1)) },
			func() error { return fill(holes(n, 2)) },
		}
	}
	if s.Wear.Leave > 0 {
		steps = append(steps, func() error {
			tree, err := fixtures.ReadStrict(dev, dev.Size(), 0)
			if err != nil {
				return err
			}
			a, err := tree.Audit()
			if err != nil {
				return err
			}
			full := holes(2*s.Wear.Holes, 2)
			if n := int(a.Free) - s.Wear.Leave; n > 0 {
				full["FULL.BIN"] = string(make([]byte, n*tree.ClusterSize))
			}
			return fill(full)
		})
	}
	if s.Known {
		steps = append(steps, func() error {
			all := Tree{}
			for p, c := range s.Before {
				all[p] = c
			}
			if len(all) == 0 {
				return nil
			}
			res, err := syncTo(dev, all, s.Options())
			if err == nil && res.Err != nil && !errors.Is(res.Err, replicate.ErrRefused) && !errors.Is(res.Err, fatdriver.ErrNoSpace) && !errors.Is(res.Err, replicate.ErrEmptySelection) {
				err = res.Err
			}
			if errors.Is(err, replicate.ErrEmptySelection) {
				err = nil
			}
			return err
		})
	}
	if s.Wear.NoJournal {
		steps = append(steps, func() error { return forget(dev) })
	}
	steps = append(steps, func() error {
		w := s.Wear
		return fixtures.VolumeSpec{FAT: int(g.Type), Size: g.Size, Serial: 7, BadClusters: w.Bad, LostClusters: w.Lost, Dirty: w.Dirty,
			DirtyFAT: w.DirtyFAT, WrongFSInfo: w.WrongFree, UnknownFSInfo: w.UnknownFree}.Wear(dev)
	})
	for _, step := range steps {
		if err := step(); err != nil {
			return nil, fmt.Errorf("cannot make the volume of scenario %s: %w", s.Name, err)
		}
	}
	return dev, nil
}

// forget deletes EFI/espmirror as another system does: its slot is marked, its clusters become free.
func forget(dev blockdev.Device) error {
	tree, err := fixtures.ReadStrict(dev, dev.Size(), 0)
	if err != nil {
		return err
	}
	dir := tree.Get("EFI/espmirror")
	if dir == nil {
		return nil
	}
	p := &fixtures.Patcher{Tree: tree, RW: dev}
	for i := range tree.Entries {
		e := &tree.Entries[i]
		if !fixtures.Ours(e.Path) {
			continue
		}
		for _, r := range e.Runs {
			for i := range r.Count {
				if err := p.SetFAT(r.First+i, 0); err != nil {
					return err
				}
			}
		}
	}
	if err := p.Delete("EFI/espmirror"); err != nil || tree.Type != 32 {
		return err
	}
	if tree, err = fixtures.ReadStrict(dev, dev.Size(), 0); err != nil {
		return err
	}
	a, err := tree.Audit()
	if err != nil {
		return err
	}
	return p.SetFSInfo(a.Free)
}

// rng is the stream of random numbers of a seed.
func rng(seed uint64) *rand.Rand { return rand.New(rand.NewPCG(seed, 0x65737)) }
