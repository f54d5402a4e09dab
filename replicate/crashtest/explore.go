package crashtest

import (
	"errors"
	"fmt"

	"espmirror/blockdev"
	"espmirror/fatdriver"
	"espmirror/fixtures"
)

// Budget bounds what is explored of one run, in states. Zero leaves a phase out.
type Budget struct {
	// Read is the limit of an epoch for reading without replay, through one FAT copy at a time.
	Read int
	// Recover is the limit of an epoch for reading and then recovering; Random more are drawn where that is not all.
	Recover, Random int
	// Torn is the limit of an epoch for the same with up to TornSectors (1 if zero) sectors torn, by the models that the
	// claim covers.
	Torn, TornSectors int
	// Twice is the limit of an epoch of the recovery of a state of the Recover phase, of which every TwiceStep-th is cut
	// again. Thrice is that of cuts of a second recovery, of every ThriceStep-th.
	Twice, TwiceStep, Thrice, ThriceStep int
	// Samples is how many states go to the external judges.
	Samples int
}

// Tally is what was explored.
type Tally struct {
	// Scenarios are all; of these a guard Refused some, some had nothing to do, some had several commits one after the
	// other, and some had to create the journal first.
	Scenarios, Refused, Unchanged, Several, Created int64
	Epochs                                          int64
	// Read, Recovered, Torn, Twice and Thrice are the states of each phase.
	Read, Recovered, Torn, Twice, Thrice int64
	// Partial counts the epochs, of the run or of a recovery, that were larger than the limit; Whole the others.
	Whole, Partial int64
	// Samples are the states that were handed out to the external judges, Checks the checks beyond single states.
	Samples, Checks int64
}

// Add adds up.
func (t *Tally) Add(o Tally) {
	t.Scenarios += o.Scenarios
	t.Refused += o.Refused
	t.Unchanged += o.Unchanged
	t.Several += o.Several
	t.Created += o.Created
	t.Epochs += o.Epochs
	t.Read += o.Read
	t.Recovered += o.Recovered
	t.Torn += o.Torn
	t.Twice += o.Twice
	t.Thrice += o.Thrice
	t.Whole += o.Whole
	t.Partial += o.Partial
	t.Samples += o.Samples
	t.Checks += o.Checks
}

// States is the number of all states.
func (t *Tally) States() int64 { return t.Read + t.Recovered + t.Torn + t.Twice + t.Thrice }

// Violation is a state in which the claim does not hold.
type Violation struct {
	Scenario *Scenario
	Phase    string
	// Lines lead to the state: the first is the cut of the run, each further one that of the recovery before it.
	Lines []string
	Err   error
}

func (v *Violation) Error() string {
	return fmt.Sprintf("scenario %d (%s), %s, state %q: %v", v.Scenario.Seed, v.Scenario.Name, v.Phase, v.Lines, v.Err)
}

func (v *Violation) Unwrap() error { return v.Err }

// Sampler judges a state by other means: as the cut left it, with the number of the tree that is visible in it, and
// recovered, which lies on top of it.
type Sampler func(cut *fixtures.State, tree int, recovered *fixtures.State) error

// Explore cuts a run wherever the budget allows. sample may be nil. The error is a *Violation.
func (c *Run) Explore(b Budget, sample Sampler) (Tally, error) {
	t := Tally{Scenarios: 1, Epochs: int64(len(c.epochs))}
	switch {
	case c.Trees == 1:
		t.Unchanged = 1
	case c.Trees > 2:
		t.Several = 1
	}
	if n := len(c.epochs); len(c.epochs[0].journal) == 0 && len(c.epochs[n-1].journal) > 0 {
		t.Created = 1
	}
	x := &explorer{Run: c, b: b, t: &t, sample: sample}
	for _, phase := range []struct {
		name string
		do   func() error
	}{{"legal FAT entries", x.legal}, {"reading", x.reading}, {"recovering", x.recovering}, {"other judges", x.sampling}, {"tearing", x.tearing}} {
		x.phase, x.lines = phase.name, nil
		if err := phase.do(); err != nil {
			return t, &Violation{Scenario: c.Scenario, Phase: x.phase, Lines: x.lines, Err: err}
		}
	}
	return t, nil
}

type explorer struct {
	*Run
	b      Budget
	t      *Tally
	sample Sampler
	phase  string
	lines  []string
	leaf   int
	leaves []string // lines of the states of the Recover phase
}

// lazily explores rec and puts the line of a state that fails in front of those of the states on top of it.
func (x *explorer) lazily(rec *fixtures.Recording, o fixtures.CrashOptions, n *int64, f func(*fixtures.State) error) error {
	if o.Limit == 0 {
		return nil
	}
	stats, err := rec.ExploreLazy(o, func(s *fixtures.State) error {
		err := f(s)
		if err != nil {
			x.lines = append([]string{s.Line()}, x.lines...)
		}
		return err
	})
	*n += stats.States
	x.t.Partial += int64(stats.Partial)
	x.t.Whole += int64(stats.Epochs - stats.Partial)
	var state *fixtures.StateError
	if errors.As(err, &state) {
		return state.Err // the line is in x.lines
	}
	return err
}

// reading is the claim itself: without replay, through each FAT copy alone.
func (x *explorer) reading() error {
	for _, n := range x.copies() {
		if err := x.lazily(x.Recording, fixtures.CrashOptions{Limit: x.b.Read}, &x.t.Read, func(s *fixtures.State) error {
			_, err := x.Visible(s, n)
			return err
		}); err != nil {
			return err
		}
	}
	if x.stale {
		return nil
	}
	return x.lazily(x.Recording, fixtures.CrashOptions{Limit: x.b.Read}, &x.t.Read, func(s *fixtures.State) error {
		_, err := x.VisibleToLinux(s)
		return err
	})
}

// recovering reads, recovers and judges; some recoveries are cut in turn.
func (x *explorer) recovering() error {
	return x.lazily(x.Recording, fixtures.CrashOptions{Limit: x.b.Recover, Random: x.b.Random, Seed: x.Scenario.Seed}, &x.t.Recovered, func(s *fixtures.State) error {
		k, err := x.Visible(s, x.copies()...)
		if err != nil {
			return err
		}
		x.leaf++
		leaf := x.leaf
		r := fixtures.NewRecorder(s, x.g.unit())
		if err := x.recover(r); err != nil {
			return err
		}
		if err := x.clean(r.State, k, false, len(r.Ops) > 0); err != nil {
			return err
		}
		if x.sample != nil {
			x.leaves = append(x.leaves, s.Line())
		}
		if x.b.Twice == 0 || leaf%max(x.b.TwiceStep, 1) != 0 {
			return nil
		}
		s.Settle()
		return x.again(r.Recording(), k, 2)
	})
}

// sampling hands out states, evenly spread over those of the Recover phase.
func (x *explorer) sampling() error {
	if x.sample == nil {
		return nil
	}
	for i := range min(x.b.Samples, len(x.leaves)) {
		line := x.leaves[i*len(x.leaves)/min(x.b.Samples, len(x.leaves))]
		s, err := x.Recording.State(line)
		if err != nil {
			return err
		}
		x.lines = []string{line}
		k, err := x.Visible(s, x.copies()...)
		if err != nil {
			return err
		}
		r := fixtures.NewRecorder(s, x.g.unit())
		if err := x.recover(r); err != nil {
			return err
		}
		x.t.Samples++
		if err := x.sample(s, k, r.State); err != nil {
			return err
		}
	}
	return nil
}

// again explores the recording of a recovery, in whose beginning tree k was visible.
func (x *explorer) again(rec *fixtures.Recording, k, depth int) error {
	limit, count, phase := x.b.Twice, &x.t.Twice, x.phase
	x.phase = "cutting the recovery"
	if depth == 3 {
		limit, count = x.b.Thrice, &x.t.Thrice
		x.phase = "cutting the second recovery"
	}
	n := 0
	err := x.lazily(rec, fixtures.CrashOptions{Limit: limit, Random: limit / 8, Seed: x.Scenario.Seed}, count, func(s *fixtures.State) error {
		k2, err := x.Visible(s, x.copies()...)
		if err != nil {
			return err
		}
		if k2 < k {
			return fmt.Errorf("recovery went back from tree %d to %d", k, k2)
		}
		r := fixtures.NewRecorder(s, x.g.unit())
		if err := x.recover(r); err != nil {
			return err
		}
		if err := x.clean(r.State, k2, false, len(r.Ops) > 0); err != nil {
			return err
		}
		if n++; depth == 3 || x.b.Thrice == 0 || n%max(x.b.ThriceStep, 1) != 0 {
			return nil
		}
		s.Settle()
		return x.again(r.Recording(), k2, 3)
	})
	if err == nil {
		x.phase = phase
	}
	return err
}

// tearing does the same with one sector torn, in the ways that the sector is to survive.
func (x *explorer) tearing() error {
	o := fixtures.CrashOptions{Limit: x.b.Torn, Random: x.b.Torn / 8, Seed: x.Scenario.Seed, Tears: x.tears, Torn: x.b.TornSectors}
	return x.lazily(x.Recording, o, &x.t.Torn, func(s *fixtures.State) error {
		k, err := x.Visible(s, 0)
		if err != nil {
			return err
		}
		return x.recoveredTorn(s, k)
	})
}

// recoveredTorn is Recovered for a state with torn sectors. Garbage in a FAT sector that no reader needs cannot be told
// from entries that mean something: recovery may refuse such a volume, and then has written nothing, or leave clusters
// lost that never were allocated.
func (c *Run) recoveredTorn(s *fixtures.State, k int) error {
	dev := blockdev.NewCounting(s)
	err := c.recover(dev)
	// Only now has everything been read that recovery looks at.
	guess := false
	for _, sector := range s.Torn() {
		n, at := c.fat(sector)
		guess = guess || n == 0 && !c.liveFAT(s.Epoch(), at)
	}
	switch {
	case guess && err != nil && dev.Counts().Writes == 0:
		return nil
	case err != nil:
		return err
	}
	return c.clean(s, k, guess, dev.Counts().Writes > 0)
}

// fat tells in which FAT copy a sector lies, -1 for none, and the number of bytes from the copy's beginning.
func (c *Run) fat(sector int64) (copyNo int, at int64) {
	off := sector * int64(c.g.unit())
	begin := c.layout.FATEntryExtent(0, 0).Off
	if off < begin || off >= c.layout.ClusterOffset(2) {
		return -1, 0
	}
	for n := c.g.FATs - 1; n >= 0; n-- {
		if x := c.layout.FATEntryExtent(n, 0); off >= x.Off && off < x.Off+c.layout.FATBytes() {
			return n, off - x.Off
		}
	}
	return -1, 0 // the fixed root
}

// tears says which tears the claim covers for a sector (protocol.md, "Fault model").
func (c *Run) tears(epoch int, sector int64, versions [][]byte) fixtures.Tears {
	const all = fixtures.TearPrefix | fixtures.TearBytes | fixtures.TearGarbage
	switch n, at := c.fat(sector); {
	case n > 0:
		return all // nobody reads it
	case n == 0 && !c.liveFAT(epoch, at):
		return all
	case n == 0 && c.g.Type == fatdriver.FAT12:
		return 0 // entries lie across the places where a sector tears
	case n == 0:
		return fixtures.TearPrefix
	}
	off := sector * int64(c.g.unit())
	if at := off - c.layout.ClusterOffset(2); at >= 0 {
		cluster := uint32(at/int64(c.layout.ClusterSize)) + 2
		live := false
		for _, r := range c.epochs[epoch:min(epoch+2, len(c.epochs))] {
			live = live || r.live[cluster]
		}
		if !live {
			return all
		}
	}
	// A directory that stays, the fixed root, or FSInfo. A commit of one byte is atomic by nature.
	if len(versions) == 2 {
		n := 0
		for i, b := range versions[0] {
			if b != versions[1][i] {
				n++
			}
		}
		if n == 1 {
			return fixtures.TearPrefix | fixtures.TearBytes
		}
	}
	return 0
}

// liveFAT says whether the FAT sector at byte at of a copy holds an entry that a reader needs at the beginning or at the
// end of an epoch. Readers read whole sectors of the volume, which may be several of the device.
func (c *Run) liveFAT(epoch int, at int64) bool {
	base := c.layout.FATEntryExtent(0, 0).Off
	unit := int64(max(c.g.unit(), c.g.Sector))
	at -= at % unit
	if at < unit {
		return true // FAT[0] and FAT[1]
	}
	for _, r := range c.epochs[epoch:min(epoch+2, len(c.epochs))] {
		for n := range r.live {
			x := c.layout.FATEntryExtent(0, n)
			if x.Off-base < at+unit && x.Off-base+x.Len > at {
				return true
			}
		}
		for n := range r.journal {
			x := c.layout.FATEntryExtent(0, n)
			if x.Off-base < at+unit && x.Off-base+x.Len > at {
				return true
			}
		}
	}
	return false
}

// legal looks at every FAT entry that was written, in every mixture of versions of the one or two sectors that hold it:
// none may be a value that no FAT writer leaves behind, reachable or not.
func (x *explorer) legal() error {
	unit := int64(x.g.unit())
	var table []int64 // sectors of FATs that were written
	seen := map[int64]bool{}
	if err := x.Recording.Versions(func(_ int, sector int64, _ [][]byte) error {
		if n, _ := x.fat(sector); n >= 0 && !seen[sector] {
			seen[sector] = true
			table = append(table, sector)
		}
		return nil
	}); err != nil {
		return err
	}
	for _, sector := range table {
		copyNo, at := x.fat(sector)
		if err := x.lazily(x.Recording, fixtures.CrashOptions{Limit: 1 << 16}, &x.t.Read, func(s *fixtures.State) error {
			// With the sectors beside it, for entries that lie in two.
			from, to := max(at-unit, 0), min(at+2*unit, x.layout.FATBytes())
			if x.g.Type != fatdriver.FAT12 {
				from, to = at, at+unit
			}
			b := make([]byte, to-from)
			base := x.layout.FATEntryExtent(copyNo, 0).Off
			if _, err := s.ReadAt(b, base+from); err != nil {
				return err
			}
			return x.layout.LegalEntries(copyNo, from, b)
		}); err != nil {
			return err
		}
	}
	return nil
}

// Replay judges again the state that the lines of a violation lead to, and returns what is wrong with it.
func (c *Run) Replay(lines []string) error {
	rec := c.Recording
	var k int
	for i, line := range lines {
		s, err := rec.State(line)
		if err != nil {
			return err
		}
		copies := c.copies()
		if len(s.Torn()) > 0 {
			copies = copies[:1] // torn: the other copy may be garbage
		}
		if k, err = c.Visible(s, copies...); err != nil {
			return err
		}
		if len(s.Torn()) > 0 {
			return c.recoveredTorn(s, k)
		}
		r := fixtures.NewRecorder(s, c.g.unit())
		if err := c.recover(r); err != nil {
			return err
		}
		if err := c.clean(r.State, k, false, true); err != nil || i == len(lines)-1 {
			return err
		}
		rec = r.Recording()
	}
	return nil
}
