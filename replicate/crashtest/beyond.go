package crashtest

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"slices"

	"espmirror/blockdev"
	"espmirror/fatdriver"
	"espmirror/fixtures"
	"espmirror/replicate"
)

// RecordOn is Record on a volume that is ready.
func RecordOn(s *Scenario, base fixtures.Base) (*Run, error) { return record(s, base) }

// Check is a claim that is not about one crash state under recovery alone.
type Check struct {
	Name string
	Do   func(*Run) error
}

// Checks are what is claimed beyond Explore: order, durability, other ways out of a cut, other people, other faults.
var Checks = []Check{
	{"order of commits", (*Run).ordered},
	{"end of the run", (*Run).ended},
	{"sync after a cut", (*Run).resync},
	{"power cut after a kill", (*Run).killed},
	{"somebody else writes", (*Run).foreign},
	{"somebody else writes during the run", (*Run).meddled},
	{"garbage in the commit sector", (*Run).garbage},
	{"damage", (*Run).damaged},
	{"failed flush", (*Run).failedFlush},
	{"lost writes", (*Run).lostWrites},
}

// Try does one check. The error is a *Violation.
func (c *Run) Try(k Check) error {
	if err := k.Do(c); err != nil {
		return &Violation{Scenario: c.Scenario, Phase: k.Name, Err: err}
	}
	return nil
}

// barrier is the state at the beginning of epoch n; all of them begin there but the last, which ends the run.
func (c *Run) barrier(n int) (*fixtures.State, error) {
	return c.Recording.State(fmt.Sprintf("epoch=%d", n))
}

// final is the state in which everything that was flushed is there, and its tree.
func (c *Run) final() (*fixtures.State, *fixtures.Tree, error) {
	s, err := c.barrier(len(c.epochs) - 1)
	if err != nil {
		return nil, nil, err
	}
	tree, err := c.trees.Read(s, 0, false)
	return s, tree, err
}

// ordered looks at the trees between two commits: every file is the old or the new one, no loader entry refers to a
// missing file that it had, and the free count is right or unknown.
func (c *Run) ordered() error {
	_, last, err := c.final()
	if err != nil {
		return err
	}
	var first *fixtures.Tree
	var was []string // what was dangling before the run
	for n := range c.epochs {
		s, err := c.barrier(n)
		if err != nil {
			return err
		}
		tree, err := c.trees.Read(s, 0, true)
		if err != nil {
			return err
		}
		refs, err := tree.Dangling()
		if err != nil {
			return err
		}
		if n == 0 {
			first, was = tree, refs
		}
		for _, ref := range refs {
			if !slices.Contains(was, ref) {
				return fmt.Errorf("at barrier %d: %s is missing", n, ref)
			}
		}
		for i := range tree.Entries {
			e := &tree.Entries[i]
			if e.Dir || fixtures.Ours(e.Path) {
				continue
			}
			same := func(o *fixtures.Entry) bool { return o != nil && !o.Dir && o.Size == e.Size && o.Sum == e.Sum }
			if !same(first.Get(e.Path)) && !same(last.Get(e.Path)) {
				return fmt.Errorf("at barrier %d: %s is neither the old nor the new one", n, e.Path)
			}
		}
		for i := range first.Entries {
			if e := &first.Entries[i]; !e.Dir && !fixtures.Ours(e.Path) && last.Get(e.Path) != nil && tree.Get(e.Path) == nil && !slices.Contains(c.early, e.Path) {
				return fmt.Errorf("at barrier %d: %s is missing, old and new tree have it", n, e.Path)
			}
		}
		if c.Scenario.Wear.WrongFree {
			continue
		}
		if _, err := tree.CheckFSInfo(true); err != nil {
			return fmt.Errorf("at barrier %d: %w", n, err)
		}
	}
	return nil
}

// durable says whether the last thing that a run did was to flush.
func durable(rec *fixtures.Recording) error {
	if n := len(rec.Ops); n > 0 && !rec.Ops[n-1].Flush {
		return errors.New("it ended without a flush")
	}
	return nil
}

// ended looks at the end of the run: all is on the medium, nothing is left to do, and reserved bits are as they were.
func (c *Run) ended() error {
	if err := durable(c.Recording); err != nil {
		return err
	}
	if len(c.Recording.Ops) == 0 {
		return nil
	}
	s, last, err := c.final()
	if err != nil {
		return err
	}
	for i := range last.Entries {
		e := &last.Entries[i]
		if !fixtures.Ours(e.Path) && c.layout.Get(e.Path) == nil && !e.Dir && !c.Scenario.After.has(e.Path) {
			return fmt.Errorf("%s is new, and nobody wanted it", e.Path)
		}
	}
	if err := c.slack(s, last); err != nil {
		return err
	}
	if err := c.reserved(s); err != nil {
		return err
	}
	count := blockdev.NewCounting(s)
	if err := c.recover(count); err != nil {
		return err
	}
	if n := count.Counts().Writes; n > 0 {
		return fmt.Errorf("the run has left something to do: recovery wrote %d times", n)
	}
	return nil
}

// slack looks behind the ends of new files: nothing of what lay there before may stay.
func (c *Run) slack(s fixtures.Volume, tree *fixtures.Tree) error {
	for i := range tree.Entries {
		e := &tree.Entries[i]
		if e.Dir || len(e.Runs) == 0 || int(e.Size)%c.layout.ClusterSize == 0 || c.epochs[0].live[e.First] || c.epochs[0].journal[e.First] {
			continue
		}
		r := e.Runs[len(e.Runs)-1]
		rest := c.layout.ClusterSize - int(e.Size)%c.layout.ClusterSize
		b := make([]byte, rest)
		if _, err := s.ReadAt(b, c.layout.ClusterOffset(r.First+r.Count)-int64(rest)); err != nil {
			return err
		}
		if len(bytes.Trim(b, "\x00")) > 0 {
			return fmt.Errorf("behind the end of %s are bytes of somebody else", e.Path)
		}
	}
	return nil
}

// reserved compares what no transaction may change in the FATs: the entries of no cluster, and FAT32's top four bits.
func (c *Run) reserved(s fixtures.Volume) error {
	for n := range c.g.FATs {
		x, size := c.layout.FATEntryExtent(n, 0), c.layout.FATBytes()
		a, b := make([]byte, size), make([]byte, size)
		if _, err := c.Recording.Base.ReadAt(a, x.Off); err != nil {
			return err
		}
		if _, err := s.ReadAt(b, x.Off); err != nil {
			return err
		}
		if k := 2 * x.Len; c.g.Type != fatdriver.FAT12 && !bytes.Equal(a[:k], b[:k]) || c.g.Type == fatdriver.FAT12 && !bytes.Equal(a[:3], b[:3]) {
			return fmt.Errorf("the first two entries of FAT copy %d have changed", n)
		}
		if c.g.Type != fatdriver.FAT32 {
			continue
		}
		for i := 0; i < len(a); i += 4 {
			if x, y := binary.LittleEndian.Uint32(a[i:]), binary.LittleEndian.Uint32(b[i:]); (x^y)>>28 != 0 {
				return fmt.Errorf("the top bits of entry %d of FAT copy %d have changed from 0x%08x to 0x%08x", i/4, n, x, y)
			}
		}
	}
	return nil
}

// resync is the other way out of a cut: the next sync. It must bring the new tree. And recovery ends what it begins:
// with the old tree or the new one, never with one between two commits.
func (c *Run) resync() error {
	_, err := c.Recording.ExploreLazy(fixtures.CrashOptions{Limit: 12, Random: 6, Seed: c.Scenario.Seed}, func(s *fixtures.State) error {
		if _, err := c.Visible(s, c.copies()...); err != nil {
			return err
		}
		s.Settle()
		r := fixtures.NewRecorder(s, c.g.unit())
		if err := c.recover(r); err != nil {
			return err
		}
		if err := durable(r.Recording()); err != nil {
			return fmt.Errorf("recovery: %w", err)
		}
		if k, err := c.Visible(r.State, 0); err != nil || k != 0 && !c.ends(k, 0) {
			return errors.Join(fmt.Errorf("recovery ends with tree %d of %d", k, c.Trees-1), err)
		}
		r = fixtures.NewRecorder(s, c.g.unit())
		res, err := syncTo(r, c.Scenario.After, c.Scenario.Options())
		if err == nil {
			err = res.Err
		}
		if err != nil {
			return fmt.Errorf("the next sync: %w", err)
		}
		if err := durable(r.Recording()); err != nil {
			return fmt.Errorf("the next sync: %w", err)
		}
		if len(c.Recording.Ops) == 0 {
			// There was nothing to do, so nothing was cut: a sync that finds nothing to do writes nothing, and leaves what was
			// wrong with the free count before. That is for recovery, which has been asked above.
			if ops := r.Recording().Ops; len(ops) > 0 {
				return fmt.Errorf("the next sync: nothing was to be done, and it writes at 0x%x", ops[0].Off)
			}
			return nil
		}
		k, err := c.Visible(r.State, 0)
		if err == nil && k != c.Trees-1 {
			err = fmt.Errorf("tree %d of %d", k, c.Trees-1)
		}
		if err == nil {
			err = c.clean(r.State, k, false, true)
		}
		if err != nil {
			return fmt.Errorf("after the next sync: %w", err)
		}
		return nil
	})
	return err
}

// killed ends the run's process in front of each flush. What it wrote is in a cache, where recovery and the next sync
// see it like anything else; then the power goes.
func (c *Run) killed() error {
	var open []fixtures.Op
	n := 0
	for _, op := range c.Recording.Ops {
		if !op.Flush {
			open = append(open, op)
			continue
		}
		if len(open) == 0 {
			continue
		}
		for way, next := range map[string]func(blockdev.Device) error{
			"recovery": c.recover,
			"sync": func(dev blockdev.Device) error {
				res, err := syncTo(dev, c.Scenario.After, c.Scenario.Options())
				if err == nil {
					err = res.Err
				}
				return err
			},
		} {
			s, err := c.barrier(n)
			if err != nil {
				return err
			}
			r := fixtures.NewRecorder(s, c.g.unit())
			for _, op := range open {
				if _, err := r.WriteAt(op.Data, op.Off); err != nil {
					return err
				}
			}
			if err := next(r); err != nil {
				return fmt.Errorf("%s after a kill in epoch %d: %w", way, n, err)
			}
			if _, err := r.Recording().ExploreLazy(fixtures.CrashOptions{Limit: 16, Random: 4, Seed: uint64(n)}, func(s *fixtures.State) error {
				k, err := c.Visible(s, c.copies()...)
				if err == nil {
					err = c.recover(s)
				}
				if err == nil {
					err = c.clean(s, k, false, true)
				}
				return err
			}); err != nil {
				return fmt.Errorf("%s after a kill in epoch %d, cut: %w", way, n, err)
			}
		}
		open, n = nil, n+1
	}
	return nil
}

// commits calls f for each epoch that is the write of one sector of a directory that stays, once there is a journal.
func (c *Run) commits(f func(epoch int, off int64, before, after []byte) error) error {
	type write struct {
		off     int64
		b, a    []byte
		sectors int
	}
	at := map[int]*write{}
	if err := c.Recording.Versions(func(n int, sector int64, v [][]byte) error {
		if at[n] == nil {
			at[n] = &write{sector * int64(c.g.unit()), v[0], v[len(v)-1], 0}
		}
		at[n].sectors++
		return nil
	}); err != nil {
		return err
	}
	for n := range c.epochs {
		w := at[n]
		if w == nil || w.sectors != 1 || len(c.epochs[n].journal) == 0 {
			continue
		}
		// Not a FAT, not FSInfo, and not the journal.
		if copyNo, _ := c.fat(w.off / int64(c.g.unit())); copyNo >= 0 || w.off < c.layout.FATEntryExtent(0, 0).Off {
			continue
		}
		if in := w.off - c.layout.ClusterOffset(2); in >= 0 && !c.epochs[n].live[uint32(in/int64(c.layout.ClusterSize))+2] {
			continue
		}
		if err := f(n, w.off, w.b, w.a); err != nil {
			return err
		}
	}
	return nil
}

func (c *Run) countCommits() (n int) {
	_ = c.commits(func(int, int64, []byte, []byte) error { n++; return nil })
	return n
}

// touch sets the time of the first file or directory in a sector of a directory to one that nobody else sets.
func touch(b []byte) bool {
	for at := 0; at+32 <= len(b); at += 32 {
		s := b[at : at+32]
		if s[0] == 0 {
			return false
		}
		if s[0] == 0xE5 || s[0] == '.' || s[11]&0x0F == 0x0F || s[11]&8 != 0 {
			continue
		}
		s[22], s[23] = s[22]^0x41, s[23]^0x12
		return true
	}
	return false
}

// untouched recovers a state in which somebody else has written, and demands that the tree stays what it shows. A sync
// after that must work again.
func (c *Run) untouched(s *fixtures.State, what string) error {
	before, err := c.trees.Read(s, 0, true)
	if err != nil {
		return err
	}
	if err := c.recover(s); err != nil {
		return fmt.Errorf("%s: %w", what, err)
	}
	after, err := c.trees.Read(s, 0, true)
	if err != nil {
		return fmt.Errorf("%s: after recovery: %w", what, err)
	}
	if c.trees.Digest(before) != c.trees.Digest(after) {
		return fmt.Errorf("%s: recovery has changed the tree: %q", what, before.Diff(after))
	}
	res, err := syncTo(s, c.Scenario.After, c.Scenario.Options())
	if err == nil {
		err = res.Err
	}
	if errors.Is(err, fatdriver.ErrNoSpace) {
		return nil // what a stale record names stays allocated
	}
	if err == nil {
		_, err = c.trees.Read(s, 0, true)
	}
	if err != nil {
		return fmt.Errorf("%s: the next sync: %w", what, err)
	}
	return nil
}

// foreign lets another system write between the cut and the recovery: rule R.
func (c *Run) foreign() error {
	_, last, err := c.final()
	if err != nil {
		return err
	}
	return c.commits(func(n int, off int64, _, _ []byte) error {
		for _, k := range []int{n, n + 1} {
			s, err := c.barrier(k)
			if err != nil {
				return err
			}
			b := make([]byte, c.g.unit())
			if _, err := s.ReadAt(b, off); err != nil {
				return err
			}
			if !touch(b) {
				continue
			}
			if _, err := s.WriteAt(b, off); err != nil {
				return err
			}
			if err := c.untouched(s, fmt.Sprintf("an entry in the commit sector at 0x%x was changed after epoch %d", off, k)); err != nil {
				return err
			}
		}
		now := c.epochs[n+1]
		s, err := c.barrier(n + 1)
		if err != nil {
			return err
		}
		if k, err := c.Visible(s, 0); err != nil || k == 0 || k == c.Trees-1 || k <= c.between {
			return err // a transaction that makes room has no new content
		}
		// New content that no entry leads to yet is free space to whoever else mounts the volume.
		spoilt := 0
		for i := range last.Entries {
			e := &last.Entries[i]
			for _, r := range e.Runs {
				if e.Dir || now.live[r.First] || now.journal[r.First] {
					continue
				}
				if _, err := s.WriteAt([]byte("overwritten"), c.layout.ClusterOffset(r.First)); err != nil {
					return err
				}
				spoilt++
			}
		}
		if spoilt > 0 {
			if err := c.untouched(s, fmt.Sprintf("new content was overwritten after epoch %d", n)); err != nil {
				return err
			}
		}
		// A directory that a further commit would replace.
		if s, err = c.barrier(n + 1); err != nil {
			return err
		}
		tree, err := c.trees.Read(s, 0, true)
		if err != nil {
			return err
		}
		for i := range tree.Entries {
			e := &tree.Entries[i]
			if !e.Dir || c.epochs[len(c.epochs)-1].live[e.Runs[0].First] {
				continue
			}
			b := make([]byte, c.g.unit())
			at := c.layout.ClusterOffset(e.Runs[0].First)
			if _, err := s.ReadAt(b, at); err != nil {
				return err
			}
			if !touch(b) {
				continue
			}
			if _, err := s.WriteAt(b, at); err != nil {
				return err
			}
			return c.untouched(s, fmt.Sprintf("/%s was changed after epoch %d", e.Path, n))
		}
		return nil
	})
}

// meddling changes a sector when the first FAT entry of a run is written.
type meddling struct {
	*fixtures.Recorder
	fat  func(off int64) bool
	off  int64
	done []byte
	over bool // the commit came before any FAT entry
}

func (d *meddling) WriteAt(p []byte, off int64) (int, error) {
	d.over = d.over || off == d.off
	if d.done == nil && !d.over && d.fat(off) {
		b := make([]byte, d.SectorSize())
		if _, err := d.ReadAt(b, d.off); err != nil {
			return 0, err
		}
		touch(b)
		d.done = b
		if _, err := d.Recorder.WriteAt(b, d.off); err != nil {
			return 0, err
		}
	}
	return d.Recorder.WriteAt(p, off)
}

// meddled lets another system write to the commit sector while the run builds. That is not covered by any claim, but it
// is looked for, and what the other one wrote must not be overwritten.
func (c *Run) meddled() error {
	if len(c.epochs[0].journal) == 0 || c.countCommits() != 1 {
		return nil // the first write to the FAT may belong to an earlier transaction, and the plan comes after it
	}
	return c.commits(func(n int, off int64, before, _ []byte) error {
		if !touch(bytes.Clone(before)) {
			return nil
		}
		d := &meddling{Recorder: fixtures.NewRecorder(c.Recording.Base, c.g.unit()), off: off,
			fat: func(off int64) bool { k, _ := c.fat(off / int64(c.g.unit())); return k == 0 }}
		res, err := syncTo(d, c.Scenario.After, c.Scenario.Options())
		if err == nil {
			err = res.Err
		}
		b := make([]byte, c.g.unit())
		if _, rerr := d.ReadAt(b, off); rerr != nil {
			return rerr
		}
		if d.done == nil {
			return nil // nothing was built
		}
		if !errors.Is(err, fatdriver.ErrChanged) || !bytes.Equal(b, d.done) {
			return errors.Join(fmt.Errorf("the commit sector at 0x%x was changed by another, and the run did not say so", off), err)
		}
		return nil
	})
}

// garbage turns each commit sector into something that nobody would write (T3). Recovery makes the tree old or new again,
// also when it is cut.
func (c *Run) garbage() error {
	settled := func(s *fixtures.State) error {
		tree, err := c.trees.Read(s, 0, false)
		if err != nil {
			return err
		}
		k, ok := c.trees.Number(tree)
		if !ok || k != 0 && !c.ends(k, 0) {
			return fmt.Errorf("recovery ends with tree %d of %d", k, c.Trees-1)
		}
		return c.clean(s, k, false, true)
	}
	all := c.countCommits()
	return c.commits(func(n int, off int64, before, after []byte) error {
		for kind, spoil := range []func(b []byte){
			func(b []byte) { clear(b) },
			func(b []byte) { copy(b, bytes.Repeat([]byte{0xFF}, len(b))) },
			func(b []byte) { _, _ = io.ReadFull(seeded{rng(uint64(n))}, b) },
			func(b []byte) { copy(b[len(b)/2:], before[len(b)/2:]) }, // torn
		} {
			s, err := c.barrier(n)
			if err != nil {
				return err
			}
			b := bytes.Clone(after)
			if spoil(b); kind == 3 && all > 1 {
				continue // of one commit among several the record has no old image: it is atomic in one byte, or for T0 alone
			}
			if _, err := s.WriteAt(b, off); err != nil {
				return err
			}
			fail := func(err error) error {
				return fmt.Errorf("garbage %d at offset 0x%x in epoch %d: %w", kind, off, n, err)
			}
			r := fixtures.NewRecorder(s, c.g.unit())
			if err := c.recover(r); err != nil {
				return fail(err)
			}
			if err := settled(r.State); err != nil {
				return fail(err)
			}
			if _, err := r.Recording().ExploreLazy(fixtures.CrashOptions{Limit: 20, Random: 5, Seed: uint64(n)}, func(s *fixtures.State) error {
				if err := c.recover(s); err != nil {
					return err
				}
				return settled(s)
			}); err != nil {
				return fail(fmt.Errorf("cutting the recovery: %w", err))
			}
		}
		return nil
	})
}

// seeded is a reader of random bytes.
type seeded struct{ r interface{ Uint32() uint32 } }

func (s seeded) Read(p []byte) (int, error) {
	for i := range p {
		p[i] = byte(s.r.Uint32())
	}
	return len(p), nil
}

// damaged breaks the chain of a new directory, or copy 0 of the FAT, while a record is pending: recovery must leave the
// FATs of such a volume alone.
func (c *Run) damaged() error {
	refuses := func(s *fixtures.State, what string) error {
		r := fixtures.NewRecorder(s, c.g.unit())
		_, err := replicate.Recover(context.Background(), &replicate.Target{Name: "damaged", Dev: r}, replicate.RecoverOptions{})
		for _, op := range r.Ops {
			if n, _ := c.fat(op.Off / int64(c.g.unit())); !op.Flush && n >= 0 {
				return errors.Join(fmt.Errorf("%s: recovery wrote to FAT copy %d at offset 0x%x", what, n, op.Off), err)
			}
		}
		return nil
	}
	return c.commits(func(n int, _ int64, _, _ []byte) error {
		s, err := c.barrier(n + 1)
		if err != nil {
			return err
		}
		tree, err := c.trees.Read(s, 0, true)
		if err != nil {
			return err
		}
		p := fixtures.Patcher{Tree: tree, RW: s}
		for i := range tree.Entries {
			if e := &tree.Entries[i]; e.Dir && !fixtures.Ours(e.Path) && e.Path != "EFI" && !c.epochs[0].live[e.Runs[0].First] {
				if err := p.SetFAT(e.Runs[0].First, 0); err != nil {
					return err
				}
				if err := refuses(s, fmt.Sprintf("after epoch %d the chain of /%s was broken", n, e.Path)); err != nil {
					return err
				}
				break
			}
		}
		if c.g.FATs < 2 {
			return nil
		}
		if s, err = c.barrier(n + 1); err != nil {
			return err
		}
		p.RW = s
		for free := uint32(2); ; free++ {
			b := make([]byte, 4)
			if x := c.layout.FATEntryExtent(0, free); x.Off+4 > c.layout.FATEntryExtent(0, 0).Off+c.layout.FATBytes() {
				return nil
			} else if _, err := s.ReadAt(b[:x.Len], x.Off); err != nil {
				return err
			}
			// A free entry whose neighbours are free as well becomes what nobody writes.
			if !tree.Reachable(free) && binary.LittleEndian.Uint32(b) == 0 {
				if err := p.SetFAT(free, 1, 0); err != nil {
					return err
				}
				return refuses(s, fmt.Sprintf("after epoch %d copy 0 of the FAT was damaged at cluster %d", n, free))
			}
		}
	})
}

var errFlush = errors.New("the device cannot flush")

// flaky fails flush number fail, and counts what is written after that. A further flush succeeds, as the kernel's does,
// which reports a failed write-back once.
type flaky struct {
	*fixtures.Recorder
	fail, n, after int
}

func (d *flaky) Flush() error {
	if d.n++; d.n == d.fail+1 {
		return errFlush
	}
	return d.Recorder.Flush()
}

func (d *flaky) WriteAt(p []byte, off int64) (int, error) {
	if d.n > d.fail {
		d.after++
	}
	return d.Recorder.WriteAt(p, off)
}

// failedFlush makes every flush fail in turn: the run reports it and writes nothing more.
func (c *Run) failedFlush() error {
	n := 0
	for _, op := range c.Recording.Ops {
		if op.Flush {
			n++
		}
	}
	for k := range n {
		d := &flaky{Recorder: fixtures.NewRecorder(c.Recording.Base, c.g.unit()), fail: k}
		res, err := syncTo(d, c.Scenario.After, c.Scenario.Options())
		if err == nil {
			err = res.Err
		}
		if err == nil || d.after > 0 {
			return errors.Join(fmt.Errorf("flush %d failed: the run wrote %d times after that", k, d.after), err)
		}
	}
	return nil
}

// lostWrites runs on devices that drop writes without a word: reading back notices, before the commit and at it.
func (c *Run) lostWrites() error {
	if len(c.epochs) == 0 || len(c.epochs[0].journal) == 0 || c.Trees != 2 {
		return nil // one transaction with one commit
	}
	_, last, err := c.final()
	if err != nil {
		return err
	}
	fresh := map[bool]map[uint32]bool{false: {}, true: {}} // by whether it is a directory's
	for i := range last.Entries {
		e := &last.Entries[i]
		for _, r := range e.Runs {
			for j := range r.Count {
				if n := r.First + j; !c.epochs[0].live[n] && !c.epochs[0].journal[n] {
					fresh[e.Dir][n] = true
				}
			}
		}
	}
	if len(fresh[false])+len(fresh[true]) == 0 {
		return nil // nothing is built
	}
	cluster := func(off int64) uint32 {
		if off -= c.layout.ClusterOffset(2); off >= 0 {
			return uint32(off/int64(c.layout.ClusterSize)) + 2
		}
		return 0
	}
	commit := map[int64]bool{}
	if err := c.commits(func(_ int, off int64, _, _ []byte) error { commit[off] = true; return nil }); err != nil {
		return err
	}
	inFAT := func(n int) func(int64) bool {
		return func(off int64) bool { k, _ := c.fat(off / int64(c.g.unit())); return k == n }
	}
	kinds := []struct {
		name string
		lose func(int64) bool
		any  bool
	}{
		{"files", func(off int64) bool { return fresh[false][cluster(off)] }, len(fresh[false]) > 0},
		{"directories", func(off int64) bool { return fresh[true][cluster(off)] }, len(fresh[true]) > 0},
		{"FAT copy 0", inFAT(0), true},
		{"FAT copy 1", inFAT(1), c.g.FATs > 1},
		{"commits", func(off int64) bool { return commit[off] }, len(commit) > 0},
	}
	for _, k := range kinds {
		if !k.any {
			continue
		}
		d := &fixtures.Losing{Recorder: fixtures.NewRecorder(c.Recording.Base, c.g.unit()), Lose: k.lose}
		res, err := syncTo(d, c.Scenario.After, c.Scenario.Options())
		if err == nil {
			err = res.Err
		}
		if !errors.Is(err, fatdriver.ErrChanged) {
			return errors.Join(fmt.Errorf("%s lost, and the run did not say so", k.name), err)
		}
		if n, err := c.Visible(d.State, 0); err != nil || n != 0 {
			return errors.Join(fmt.Errorf("%s lost: tree %d is visible", k.name, n), err)
		}
		if err = c.recover(d.State); err == nil {
			err = c.clean(d.State, 0, false, true)
		}
		if err != nil {
			return fmt.Errorf("%s lost: %w", k.name, err)
		}
	}
	return nil
}
