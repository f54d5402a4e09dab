package crashtest

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"

	"espmirror/blockdev"
	"espmirror/fatdriver"
	"espmirror/fixtures"
	"espmirror/replicate"
)

// Run is a recorded sync, and the trees that a reader may see at any moment of it.
type Run struct {
	Scenario *Scenario
	// Recording is the run on the device.
	Recording *fixtures.Recording
	// Trees is the number of different trees at the barriers, the old and the new one included.
	Trees int

	g       Geometry
	trees   fixtures.Trees
	first   []int           // of each tree, the epoch that begins with it
	epochs  []reach         // by epoch
	lost    map[uint32]bool // clusters that were lost before
	dirty   [2]bool
	layout  *fixtures.Tree
	said    []said   // what the target says of itself, by epoch
	told    string   // the state file of a member after the run, "" of no member
	early   []string // what the run deletes first, to make room
	between int      // the tree after that; 0 when the run is one transaction
	stale   bool     // there is something behind the end of a directory that Linux would see
}

// said is what a member's target remembers while a reader sees a tree.
type said struct {
	tree int
	text string
}

// reach is what a reader can reach when an epoch begins or ends.
type reach struct {
	live    map[uint32]bool // clusters of files and directories, our own journal's excepted
	journal map[uint32]bool
}

// ErrRefused is returned by Record when the run refused the target, as it should where there is no room for it, and
// wrote nothing.
var ErrRefused = errors.New("the run was refused")

// Record runs the sync of a scenario on a recording device, collects the trees at its barriers, and checks that the
// last one is what was wanted.
func Record(s *Scenario) (*Run, error) {
	base, err := s.Volume()
	if err != nil {
		return nil, err
	}
	return record(s, base)
}

func record(s *Scenario, base fixtures.Base) (*Run, error) {
	c := &Run{Scenario: s, g: s.Geometry, lost: map[uint32]bool{}}
	first, err := c.trees.Read(base, 0, false)
	if err != nil {
		return nil, fmt.Errorf("cannot read the volume of scenario %s: %w", s.Name, err)
	}
	c.layout = first
	if tree, err := c.trees.ReadAsLinux(base); err != nil || c.trees.Digest(tree) != c.trees.Digest(first) {
		c.stale = true
	}
	lost, err := first.Lost()
	if err != nil {
		return nil, err
	}
	for _, n := range lost {
		c.lost[n] = true
	}
	if c.dirty[0], c.dirty[1], err = first.DirtyFlags(); err != nil {
		return nil, err
	}
	r := fixtures.NewRecorder(base, c.g.unit())
	res, err := syncTo(r, s.After, s.Options())
	if err != nil {
		return nil, fmt.Errorf("cannot run scenario %s: %w", s.Name, err)
	}
	c.Recording = r.Recording()
	switch {
	case errors.Is(res.Err, replicate.ErrRefused) || errors.Is(res.Err, fatdriver.ErrNoSpace) || errors.Is(res.Err, fatdriver.ErrNotTarget):
		if n := len(c.Recording.Ops); n > 0 {
			// Only recovery may have written: it comes first, and frees what an earlier run seems to have left behind.
			after, err := c.trees.Read(r.State, 0, false)
			if err != nil || !res.Recovered.Changed() || c.trees.Digest(after) != c.trees.Digest(first) {
				return nil, errors.Join(fmt.Errorf("scenario %s: refused after %d operations: %w", s.Name, n, res.Err), err)
			}
		}
		return nil, fmt.Errorf("%w: %w", ErrRefused, res.Err)
	case res.Err != nil:
		return nil, fmt.Errorf("cannot run scenario %s: %w", s.Name, res.Err)
	}
	for _, ch := range res.Summary.Early {
		c.early = append(c.early, ch.Path)
	}
	if err := c.barriers(); err != nil {
		return nil, fmt.Errorf("scenario %s: %w", s.Name, err)
	}
	last, err := c.trees.Read(r.State, 0, false)
	if err != nil {
		return nil, fmt.Errorf("scenario %s: after the run: %w", s.Name, err)
	}
	if s.Member {
		if c.told = memory(last); c.told == "" {
			return nil, fmt.Errorf("scenario %s: the target remembers nothing of the run", s.Name)
		}
		if c.told == memory(first) {
			c.told = "" // only directories without files came or went
		}
		for n, m := range c.said {
			if c.told != "" && m.text == c.told && m.tree != c.Trees-1 {
				return nil, fmt.Errorf("scenario %s: at barrier %d, tree %d of %d says that it is the new one", s.Name, n, m.tree, c.Trees-1)
			}
		}
	}
	if err := c.wanted(first, last); err != nil {
		return nil, fmt.Errorf("scenario %s: after the run: %w", s.Name, err)
	}
	return c, nil
}

// barriers reads the tree at the beginning of each epoch, and at the end of the run: each must be whole, and none comes
// back after another one.
func (c *Run) barriers() error {
	last := -1
	for n := 0; ; n++ {
		s, err := c.Recording.State(epochLine(n))
		if err != nil {
			break
		}
		tree, err := c.trees.Read(s, 0, true)
		if err != nil {
			return fmt.Errorf("at barrier %d: %w", n, err)
		}
		k, fresh := c.trees.Add(tree)
		if fresh {
			c.first = append(c.first, n)
		}
		if k != last && k != last+1 {
			return fmt.Errorf("at barrier %d: tree %d came back", n, k)
		}
		last = k
		c.said = append(c.said, said{k, memory(tree)})
		if len(c.early) > 0 && c.between == 0 && !slices.ContainsFunc(c.early, func(p string) bool { return tree.Get(p) != nil }) {
			c.between = k
		}
		c.epochs = append(c.epochs, reachOf(tree))
	}
	c.Trees = c.trees.Len()
	return nil
}

// epochLine is the reproduction line of the state at the beginning of an epoch.
func epochLine(n int) string { return fmt.Sprintf("epoch=%d", n) }

func reachOf(tree *fixtures.Tree) reach {
	r := reach{live: map[uint32]bool{}, journal: map[uint32]bool{}}
	add := func(m map[uint32]bool, runs []fixtures.Run) {
		for _, x := range runs {
			for i := range x.Count {
				m[x.First+i] = true
			}
		}
	}
	add(r.live, tree.RootRuns)
	for i := range tree.Entries {
		if e := &tree.Entries[i]; strings.EqualFold(e.Path, "EFI/espmirror/journal") {
			add(r.journal, e.Runs)
		} else {
			add(r.live, e.Runs)
		}
	}
	return r
}

// wanted says whether the run did its job: what is selected is what the source has, and the rest is as it was.
func (c *Run) wanted(before, after *fixtures.Tree) error {
	selected := func(p string) bool {
		p = strings.ToUpper(p)
		for _, s := range c.Scenario.Select {
			s = strings.ToUpper(s)
			if s == "/" || p == s || strings.HasPrefix(p, s+"/") {
				return true
			}
		}
		return false
	}
	for p, content := range c.Scenario.After {
		path, dir := strings.CutSuffix(p, "/")
		if !selected(path) {
			continue
		}
		e := after.Get(path)
		if e == nil || e.Dir != dir {
			return fmt.Errorf("%s is missing", p)
		}
		if dir {
			continue
		}
		if b, err := after.Read(e); err != nil || string(b) != content {
			return errors.Join(fmt.Errorf("%s has other content", p), err)
		}
	}
	for i := range after.Entries {
		e := &after.Entries[i]
		if e.Dir || fixtures.Ours(e.Path) || !selected(e.Path) {
			continue
		}
		if !c.Scenario.After.has(e.Path) {
			return fmt.Errorf("%s should be gone", e.Path)
		}
	}
	for i := range before.Entries {
		e := &before.Entries[i]
		if e.Dir || fixtures.Ours(e.Path) || selected(e.Path) {
			continue
		}
		if a := after.Get(e.Path); a == nil || a.Size != e.Size || a.Sum != e.Sum || a.Attr != e.Attr || a.Times != e.Times || a.Short != e.Short || a.First != e.First {
			return fmt.Errorf("%s is not selected and was changed", e.Path)
		}
	}
	return nil
}

// has says whether a file of that name is in the tree, whatever its case.
func (t Tree) has(path string) bool {
	if _, ok := t[path]; ok {
		return true
	}
	for p := range t {
		if strings.EqualFold(p, path) {
			return true
		}
	}
	return false
}

// Visible judges what a reader without any replay sees through each of the given FAT copies, and returns the number of
// the tree.
func (c *Run) Visible(v fixtures.Volume, copies ...int) (int, error) {
	return c.trees.Visible(v, nil, copies...)
}

// VisibleToLinux is Visible for a reader that does not stop at the end marker of a directory. It says -1 where there was
// something behind one already.
func (c *Run) VisibleToLinux(v fixtures.Volume) (int, error) {
	if c.stale {
		return -1, nil
	}
	tree, err := c.trees.ReadAsLinux(v)
	if err != nil {
		return 0, fmt.Errorf("for Linux: %w", err)
	}
	k, ok := c.trees.Number(tree)
	if !ok {
		return 0, errors.New("for Linux the tree is neither old nor new")
	}
	return k, nil
}

// ends says whether recovery, or the next run, may bring tree k where tree before was visible: a transaction ends with it.
func (c *Run) ends(k, before int) bool {
	return k == c.Trees-1 || c.between > 0 && k == c.between && before <= k
}

// memory is what a target remembers of the runs of its replica set; "" when there is nothing.
func memory(tree *fixtures.Tree) string {
	e := tree.Get(replicate.StatePath)
	if e == nil || e.Dir {
		return ""
	}
	b, err := tree.Read(e)
	if err != nil {
		return "" // a reader of it takes it for lost
	}
	return string(b)
}

// copies numbers the FAT copies.
func (c *Run) copies() []int { return []int{0, 1}[:c.g.FATs] }

// recover runs a recovery on dev.
func (c *Run) recover(dev blockdev.Device) error {
	_, err := replicate.Recover(context.Background(), &replicate.Target{Name: "cut", Dev: dev}, replicate.RecoverOptions{})
	if err != nil {
		return fmt.Errorf("recovery: %w", err)
	}
	return nil
}

// clean judges a state after recovery, in which tree before was visible: that tree or the new one, no lost cluster that
// was not lost before the run, equal FAT copies, a true free count; with guess, entries of the FAT that nobody reaches may
// be anything. Where recovery wrote, a second one must write nothing.
func (c *Run) clean(dev blockdev.Device, before int, guess, wrote bool) error {
	for _, n := range c.copies() {
		tree, err := c.trees.Read(dev, n, false)
		if err != nil {
			return fmt.Errorf("after recovery, FAT copy %d: %w", n, err)
		}
		k, ok := c.trees.Number(tree)
		if !ok || k != before && !c.ends(k, before) {
			return fmt.Errorf("after recovery, FAT copy %d shows tree %d, it was %d of %d", n, k, before, c.Trees-1)
		}
		if n > 0 {
			continue // equal to copy 0, as is tested below
		}
		// A target that claims a generation that it has not got would be taken for newer than it is.
		if c.told != "" && k != c.Trees-1 && memory(tree) == c.told {
			return fmt.Errorf("after recovery, tree %d of %d says that it is the new one", k, c.Trees-1)
		}
		a, err := tree.Audit()
		if err != nil {
			return err
		}
		for _, l := range a.Lost {
			if !guess && !c.lost[l] {
				return fmt.Errorf("after recovery, cluster 0x%x is lost", l)
			}
		}
		if !guess && len(a.Illegal) > 0 {
			return fmt.Errorf("after recovery: %s", a.Illegal[0])
		}
		if boot, fat1, err := tree.DirtyFlags(); err != nil || [2]bool{boot, fat1} != c.dirty {
			return errors.Join(fmt.Errorf("after recovery, the dirty flags are %v and %v, they were %v", boot, fat1, c.dirty), err)
		}
		if _, err := tree.CheckFSInfo(false); err != nil {
			return fmt.Errorf("after recovery: %w", err)
		}
		if d, err := tree.DifferentFATs(); err != nil || len(d) > 0 {
			return errors.Join(fmt.Errorf("after recovery, FAT copies differ in sectors %v", d), err)
		}
	}
	if !wrote {
		return nil // the second would see what the first did
	}
	again := blockdev.NewCounting(dev)
	if err := c.recover(again); err != nil {
		return fmt.Errorf("second %w", err)
	}
	if n := again.Counts().Writes; n != 0 {
		return fmt.Errorf("the second recovery wrote %d times", n)
	}
	return nil
}
