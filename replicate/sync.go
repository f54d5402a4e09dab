package replicate

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"slices"
	"sync"

	"espmirror/blockdev"
	"espmirror/fatdriver"
)

// run is one source going to some targets.
type run struct {
	src     Source
	sel     *selection
	opt     Options
	log     *slog.Logger
	hashes  map[*Item][32]byte
	named   []entry // what the loader entries that are replicated name
	set     *Set    // the replica set file, nil when there is none
	sides   []*side
	results []Result // of the sides
	line    *line    // nil when the source is no member of a set
	turns   turns
}

// side is what a run knows of one target.
type side struct {
	t      *Target
	dev    blockdev.Device // the target's device, or an overlay in a dry run
	count  *blockdev.Counting
	random io.Reader // of the identities of transactions; nil: the system
	res    *Result
	vol    *fatdriver.Volume
	tree   *fatdriver.Tree
	match  matches
	placed placed
	plan   *fatdriver.Plan
	free   int64 // clusters that could be allocated when planning began
	buf    []byte

	state    *State          // what the target remembers, nil when it has never been in a set
	stateErr error           // why that cannot be read
	items    map[*Item]*Item // source files that go to this target with a content of their own
	gone     []string        // what an earlier run brought, and neither the source nor the selection has any more
	skip     bool            // the fingerprints say that nothing has changed since the last run
	same     bool            // the tree is as it should be
	counters bool            // it is, but for boot counters
	record   *State          // what the target is to remember of this run, nil when nothing new
	file     *Item           // that, as a file
	partner  *side           // the other volume of its pair, nil when it goes alone

	staged         bool // room is made first, by the removal of these
	entries, files []string
	early          []Change // what was removed so
	freed          int64    // clusters that it freed

	mu sync.Mutex
}

// fail ends the run for this target; the first error counts.
func (s *side) fail(err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.res.Err == nil && err != nil {
		s.res.Err = err
		s.res.Outcome = Failed
		if errors.Is(err, ErrRefused) || errors.Is(err, fatdriver.ErrNoSpace) || errors.Is(err, fatdriver.ErrNotFAT) ||
			errors.Is(err, fatdriver.ErrNotTarget) || errors.Is(err, fatdriver.ErrDamaged) || errors.Is(err, fatdriver.ErrName) {
			s.res.Outcome = Refused
		}
	}
}

func (r *run) progress(p Progress) {
	if r.opt.Progress != nil {
		r.opt.Progress(p)
	}
}

// Sync replicates the selected part of src to each target. One target's failure is in its Result and touches no other;
// the error is for what stops the run for all of them: a source that cannot be read, an empty selection, a cancelled
// context. A target that is as it should be is not written to at all.
func Sync(ctx context.Context, src Source, targets []*Target, o Options) ([]Result, error) {
	results, err := SyncAll(ctx, []Job{{src, targets, o}})
	if results == nil {
		return nil, err
	}
	return results[0], err
}

// Job is one source with the targets that it goes to.
type Job struct {
	Source  Source
	Targets []*Target
	Options Options
}

// SyncAll carries out several jobs that belong together: an XBOOTLDR partition and the ESP of the same disk. Nothing is
// committed anywhere before all of them are planned; then they are carried out in their order. Targets with the same
// Pair go together: one is not written to when another was refused or failed before. The results come by job and target;
// they are nil when nothing was looked at.
func SyncAll(ctx context.Context, jobs []Job) ([][]Result, error) {
	var runs []*run
	for _, j := range jobs {
		r, err := begin(j.Source, j.Targets, j.Options)
		if err == nil {
			err = r.wholeSource()
		}
		if err == nil {
			err = r.saneSource()
		}
		if err != nil {
			return nil, err
		}
		runs = append(runs, r)
	}
	results := make([][]Result, len(runs))
	for i, r := range runs {
		results[i] = r.results
	}
	defer func() {
		for _, r := range runs {
			for _, s := range r.sides {
				if s.count != nil && !r.opt.DryRun {
					s.res.Written = s.count.Counts().BytesWritten
				}
			}
		}
	}()
	stop := func(err error) ([][]Result, error) {
		for _, r := range runs {
			r.stop(err)
		}
		return results, err
	}
	for _, r := range runs {
		r.each(r.open)
		err := inOrder(
			r.adapt,
			func() error { return r.compare(ctx) },
			r.judge,
		)
		if err != nil {
			return stop(err)
		}
	}
	crossed(runs)
	partners(runs)
	together(runs)
	for _, r := range runs {
		// Before the first write to any target, which may be that of a journal in the plan.
		if err := r.note(ctx, r.opt.Try); err != nil {
			return stop(err)
		}
	}
	if len(runs) > 1 {
		// A plan may begin with a journal. Before that it must be certain that the other volume of a pair has a plan too.
		for _, r := range runs {
			r.each(r.planInMemory)
		}
		together(runs)
	}
	for _, r := range runs {
		r.each(r.plan)
	}
	together(runs)
	for _, r := range runs {
		if r.opt.DryRun {
			continue
		}
		if err := r.remember(ctx); err != nil {
			return stop(err)
		}
		r.each(r.makeRoom)
		r.each(r.foretell)
		r.each(r.prepare)
		if err := r.build(ctx, r.sides); err != nil {
			return stop(err)
		}
		together(runs)
	}
	return results, nil
}

// crossed finds the pairs of which one volume is newer on the target and the other on the source. To go the other way
// round would be refused as well: they have diverged.
func crossed(runs []*run) {
	newer := map[string]bool{} // on the source
	for _, r := range runs {
		for _, s := range r.sides {
			if l := s.res.Lineage; s.t.Pair != "" && l != nil && (l.Verdict == FastForward || l.Verdict == Diverged) {
				newer[s.t.Pair] = true
			}
		}
	}
	for _, r := range runs {
		for _, s := range r.sides {
			if errors.Is(s.res.Err, ErrStaleSource) && newer[s.t.Pair] {
				s.res.Lineage.Verdict = Diverged
				err := Diverged.refuse("it is newer on the target, and what goes with it is not", r.src.Name(), s.t.Name)
				s.res.Err = fmt.Errorf("cannot sync %s: %w", s.t.Name, err)
			}
		}
	}
}

// partners makes the volumes of a pair known to each other.
func partners(runs []*run) {
	pairs := map[string]*side{}
	for _, r := range runs {
		for _, s := range r.sides {
			if o := pairs[s.t.Pair]; o != nil && s.t.Pair != "" {
				s.partner, o.partner = o, s
			}
			pairs[s.t.Pair] = s
		}
	}
}

// together fails the targets of which a partner has failed, where they are not done yet.
func together(runs []*run) {
	failed := map[string]*side{}
	for _, r := range runs {
		for _, s := range r.sides {
			if s.t.Pair != "" && s.res.Err != nil && failed[s.t.Pair] == nil {
				failed[s.t.Pair] = s
			}
		}
	}
	for _, r := range runs {
		for _, s := range r.sides {
			if p := failed[s.t.Pair]; p != nil && s.res.Err == nil && s.res.Outcome != Synced {
				s.fail(&partnerError{s.t.Name, p.t.Name, p.res.Outcome == Refused})
			}
		}
	}
}

// partnerError is why a volume was left alone: what belongs to it could not be brought to the same state.
type partnerError struct {
	name, partner string
	refused       bool
}

func (e *partnerError) Error() string {
	return fmt.Sprintf("cannot sync %s: it goes with %s, which was not synced", e.name, e.partner)
}

func (e *partnerError) Is(target error) bool { return target == ErrRefused && e.refused }

// maxKeepFree is more than any FAT volume has, and so little that adding what a plan needs does not overflow.
const maxKeepFree = 1 << 56

// begin checks what was asked for and makes the sides.
func begin(src Source, targets []*Target, o Options) (*run, error) {
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	if len(o.Selection.Select) > 0 && o.Member && src.Root().lookup(SetPath) != nil {
		o.Selection.Select = append(slices.Clone(o.Selection.Select), SetPath) // each member describes the set
	}
	sel, err := o.Selection.resolve(src)
	if err != nil {
		return nil, err
	}
	if src.Root().lookup(SetPath) == nil {
		// A source that is in no set has nothing to say about that of the target.
		sel.excludes = append(sel.excludes, fatdriver.Fold(SetPath))
	}
	o.KeepFree = min(o.KeepFree, maxKeepFree)
	r := &run{src: src, sel: sel, opt: o, log: o.Log, hashes: map[*Item][32]byte{}, turns: newTurns(o.Jobs)}
	if err := r.begun(); err != nil {
		return nil, err
	}
	if err := r.replicable(); err != nil {
		return nil, err
	}
	if r.named, err = namedBy(src, func(p string) bool { return !sel.takes(p) }); err != nil {
		return nil, err
	}
	r.results = make([]Result, len(targets))
	for i, t := range targets {
		r.results[i] = Result{Target: t.Name}
		r.sides = append(r.sides, newSide(t, &r.results[i], o))
	}
	return r, nil
}

// maxSelected is how many files and directories may be selected: half of what a volume may have, as old and new stand side by
// side. A test makes it less.
var maxSelected = fatdriver.MaxNodes / 2

// replicable finds what is selected and cannot be replicated, so that it is the source's fault and not each target's.
func (r *run) replicable() error {
	n := 0
	var find func(it *Item) error
	find = func(it *Item) error {
		if r.sel.excluded(it.Path) {
			return nil
		}
		if n++; n > maxSelected {
			return refusal{fmt.Errorf("%w: more than %d files and directories are selected", ErrSource, maxSelected)}
		}
		if it.Err != nil {
			return refusal{fmt.Errorf("%w: %w", ErrSource, it.Err)}
		}
		for _, c := range it.Children {
			if err := find(c); err != nil {
				return err
			}
		}
		return nil
	}
	for _, a := range r.sel.anchors {
		if it := r.src.Root().lookup(a); it != nil {
			if err := find(it); err != nil {
				return err
			}
		}
	}
	return nil
}

// refusal is an error that is ErrRefused without saying so in its message.
type refusal struct{ error }

func (r refusal) Unwrap() error        { return r.error }
func (r refusal) Is(target error) bool { return target == ErrRefused }

// turns are what those wait for who work on a target, where only some may at a time; nil: all of them may.
type turns chan struct{}

func newTurns(n int) turns {
	if n <= 0 {
		return nil
	}
	return make(turns, n)
}

// take waits for a turn. Who has one must not wait for another target.
func (t turns) take() {
	if t != nil {
		t <- struct{}{}
	}
}

func (t turns) done() {
	if t != nil {
		<-t
	}
}

// newSide begins with a target.
func newSide(t *Target, res *Result, o Options) *side {
	s := &side{t: t, res: res, match: matches{}}
	if o.Random != nil {
		volume := t.PartGUID
		if volume == "" {
			volume = t.Name
		}
		s.random = o.Random(volume)
	}
	return s
}

// each calls f for every target that has not failed, as many in parallel as may be.
func (r *run) each(f func(*side)) {
	var wg sync.WaitGroup
	for _, s := range r.sides {
		if s.res.Err != nil {
			continue
		}
		wg.Add(1)
		go func() {
			defer wg.Done()
			r.turns.take()
			defer r.turns.done()
			f(s)
		}()
	}
	wg.Wait()
}

// alive lists the targets that have not failed.
func (r *run) alive() []*side {
	var out []*side
	for _, s := range r.sides {
		if s.res.Err == nil {
			out = append(out, s)
		}
	}
	return out
}

// stop ends the run for all targets that have not failed or finished.
func (r *run) stop(err error) {
	for _, s := range r.sides {
		if s.res.Outcome == "" || (s.plan != nil || s.staged) && s.res.Outcome == Differs && !r.opt.DryRun {
			s.fail(err)
		}
	}
}

// open is P0: recover first, then a strict walk.
func (r *run) open(s *side) {
	s.dev = &latch{Device: s.t.Dev}
	if r.opt.DryRun {
		s.dev = blockdev.NewOverlay(s.t.Dev)
	}
	s.count = blockdev.NewCounting(s.dev)
	s.dev = s.count
	var err error
	if s.vol, err = openTarget(s.dev); err != nil {
		s.fail(fmt.Errorf("cannot use %s as a target: %w", s.t.Name, err))
		return
	}
	rec, err := recoverVolume(s.vol, r.log.With("target", s.t.Name), thorough{})
	if rec.Changed() || rec != nil && rec.Action == actStale {
		s.res.Recovered = rec
	}
	if err == nil {
		err = r.scan(s)
	}
	if err != nil {
		s.fail(fmt.Errorf("cannot use %s as a target: %w", s.t.Name, err))
		return
	}
	s.state, s.stateErr = ReadState(s.source())
}

// source is the target seen as a source is.
func (s *side) source() Source {
	return &volumeSource{s.t.Name, s.tree, volumeItem(s.tree.Root, "")}
}

// openTarget opens a volume for writing: caches dropped, geometry that can be written safely.
func openTarget(dev blockdev.Device) (*fatdriver.Volume, error) {
	if err := dev.Invalidate(); err != nil {
		return nil, fmt.Errorf("cannot drop caches: %w", err)
	}
	v, err := fatdriver.Open(dev)
	if err != nil {
		return nil, err
	}
	return v, v.TargetError()
}

// scan walks the target's tree, and refuses a damaged one.
func (r *run) scan(s *side) error {
	tree, err := s.vol.Scan()
	if err != nil {
		return err
	}
	s.tree = tree
	if err := tree.Damage(); err != nil {
		return &Hint{err, fmt.Sprintf("run `espmirror check %s` to see every finding; fsck.fat can mend it", s.t.Name)}
	}
	return nil
}
