package replicate

import (
	"errors"
	"fmt"
	"log/slog"
	"slices"

	"espmirror/blockdev"
	"espmirror/fatdriver"
	"espmirror/journal"
)

// plan is P1 and P2: what changes, and where it goes. It makes room for directory entries and for the journal first,
// where there is something to do at all, because both move what a plan relies on.
func (r *run) plan(s *side) {
	err := r.makePlan(s)
	if err == nil {
		err = r.warnDangling(s)
	}
	if err != nil {
		s.fail(fmt.Errorf("cannot plan for %s: %w", s.t.Name, err))
	}
}

// planInMemory is plan, on a copy.
func (r *run) planInMemory(s *side) {
	if err := r.rehearse(s); err != nil {
		s.fail(fmt.Errorf("cannot plan for %s: %w", s.t.Name, err))
	}
}

// maxReplans bounds how often a directory may have to grow before a plan fits.
const maxReplans = 64

func (r *run) makePlan(s *side) error {
	var err error
	if s.free, err = s.tree.Allocatable(); err != nil {
		return err
	}
	err = r.planOnce(s)
	var short *fatdriver.Shortfall
	if !errors.As(err, &short) || s.staged {
		return err
	}
	points, _, werr := r.wants(s, false)
	if werr != nil {
		return err
	}
	going, menu := r.removable(s, points)
	for n := range going {
		// As few as will do. All of it is tried on a copy: what would not lead to the new tree does not begin.
		entries, files := early(going, menu, n+1)
		if len(entries) == 0 {
			continue
		}
		d, terr := r.tryRoom(s, entries, files)
		if terr != nil {
			if errors.As(terr, &short) && n+1 < len(going) {
				continue
			}
			return fmt.Errorf("%w (and removing what goes anyway does not make enough room: %w)", err, terr)
		}
		s.staged, s.entries, s.files = true, entries, files
		if !r.opt.DryRun {
			s.res.Summary, s.res.Outcome = d.res.Summary, Differs
			return nil
		}
		return r.roomAndPlan(s, entries, files)
	}
	return err
}

// tryRoom makes room and the plan on a copy.
func (r *run) tryRoom(s *side, entries, files []string) (*side, error) {
	dry, d, err := r.onCopy(s)
	if err != nil {
		return nil, err
	}
	d.staged = true
	return d, dry.roomAndPlan(d, entries, files)
}

// makeRoom carries out the first transaction of a target that needs two, and plans the second.
func (r *run) makeRoom(s *side) {
	if !s.staged || s.plan != nil {
		return
	}
	s.res.Summary = Summary{} // it was that of the copy
	if err := r.roomAndPlan(s, s.entries, s.files); err != nil {
		s.fail(fmt.Errorf("cannot make room on %s: %w", s.t.Name, err))
	}
}

// roomAndPlan removes what goes first, and plans the rest.
func (r *run) roomAndPlan(s *side, entries, files []string) error {
	var err error
	if s.free, err = s.tree.Allocatable(); err != nil {
		return err
	}
	if err := r.removeFirst(s, entries, files); err != nil {
		return err
	}
	return r.planOnce(s)
}

// planOnce makes the plan of a target as it is.
func (r *run) planOnce(s *side) error {
	if s.skip {
		s.res.Outcome = InSync
		s.res.Summary = Summary{FreeBytes: s.free * s.cluster(), FreeAfter: s.free * s.cluster()}
		return nil
	}
	prepared := r.opt.DryRun
	prepare := func() error { // before the first write
		if prepared {
			return nil
		}
		prepared = true
		return r.rehearse(s)
	}
	for range maxReplans {
		points, changes, err := r.wants(s, false)
		if err != nil {
			return err
		}
		s.res.Summary.Changes = changes
		plan, err := r.steps(s, points)
		var need *fatdriver.ErrNeedSlots
		var short *fatdriver.Shortfall
		switch {
		case errors.As(err, &short):
			if log, _, _, jerr := findJournal(s.vol, s.tree); log == nil && jerr == nil {
				return r.roomFor(s, short.Need/s.cluster(), short.Free/s.cluster(), points)
			}
			return err
		case errors.As(err, &need):
			log, err := r.journalOf(s)
			if err != nil {
				return err
			}
			if log == nil {
				if err := r.roomFor(s, need.Need, need.Free, points); err != nil {
					return err
				}
			}
			if err := prepare(); err != nil {
				return err
			}
			if log == nil {
				if err := r.createJournal(s); err != nil {
					return err
				}
				continue
			}
			if err := r.extend(s, log, lookupNode(s.tree, need.Dir), need.More); err != nil {
				return err
			}
			if err := r.scan(s); err != nil {
				return err
			}
			continue
		case err != nil:
			return err
		}
		// A target that is to remember the run needs the journal's directory for that, even when nothing else changes.
		if len(plan.Blocks) == 0 && (s.record == nil || lookup(s.tree.Root, stateDir) != nil) {
			s.res.Outcome = InSync
			n := s.count.Counts() // of recovery, if there was any
			s.res.Summary = Summary{BytesToWrite: n.BytesWritten, Flushes: int(n.Flushes), FreeBytes: plan.FreeBefore() * s.cluster(), FreeAfter: plan.FreeBefore() * s.cluster()}
			return nil
		}
		log, err := r.journalOf(s)
		if err != nil {
			return err
		}
		if log == nil {
			if err := r.roomFor(s, clusters(plan.Alloc()), plan.FreeBefore(), points); err != nil {
				return err
			}
			if err := prepare(); err != nil {
				return err
			}
			if err := r.createJournal(s); err != nil {
				return err
			}
			continue
		}
		s.plan = plan
		return r.summarize(s, log)
	}
	return fmt.Errorf("internal error: no plan after %d attempts", maxReplans)
}

func (s *side) cluster() int64 { return int64(s.vol.Geometry().ClusterSize) }

// lookupNode finds a directory again by its path after a rescan.
func lookupNode(t *fatdriver.Tree, n *fatdriver.Node) *fatdriver.Node {
	return lookup(t.Root, n.Path())
}

// steps orders the commits so that no loader entry ever names a missing file: payload first, then the entries, then
// removals of what the old entries refer to. Where everything switches in one sector there is nothing to order.
//
// A directory that loses files that the old entries refer to would have to change twice: with both sides' files, and
// without the old ones. That is avoided where its entry and that of the loader's directory lie in one sector: then both
// are switched in one write.
func (r *run) steps(s *side, points []switchPoint) (*fatdriver.Plan, error) {
	plan, err := s.tree.NewPlan([]fatdriver.Step{anchors(points)}, r.opt.KeepFree)
	if err != nil || len(plan.Blocks) <= 1 {
		return plan, err
	}
	// Entries that lie in one sector, as those of the root mostly do, switch together in one write when they switch whole.
	if plan, err := r.inOneSector(s, anchors(points)); plan != nil || err != nil {
		return plan, err
	}
	// What the target remembers of the run comes last: if the rest is never finished, it must not say that it was.
	points, note := cutState(points)
	newPlan := func(steps ...fatdriver.Step) (*fatdriver.Plan, error) {
		return s.tree.NewPlan(append(steps, anchors(note)), r.opt.KeepFree)
	}
	if len(note) > 0 {
		plan, err := s.tree.NewPlan([]fatdriver.Step{anchors(points)}, r.opt.KeepFree)
		if err != nil {
			return nil, err
		}
		if len(plan.Blocks) <= 1 {
			return newPlan(anchors(points))
		}
		if plan, err = r.inOneSector(s, anchors(points)); err != nil {
			return nil, err
		}
		if plan != nil {
			return newPlan(whole(anchors(points)))
		}
	}
	payload, entries, bound := r.sortPoints(s, points)
	if len(bound) == 0 || len(entries) == 0 {
		return newPlan(append(anchors(payload), anchors(bound)...), anchors(entries))
	}
	together := append(anchors(entries), anchors(bound)...)
	plan, err = r.inOneSector(s, together)
	if err != nil {
		return nil, err
	}
	if plan != nil {
		return newPlan(anchors(payload), whole(together))
	}
	// The files of old and new entries are there side by side for a moment, so what an entry refers to cannot be moved
	// from one name to another: it would be in two places at once.
	if points, _, err = r.wants(s, true); err != nil {
		return nil, err
	}
	points, note = cutState(points)
	payload, entries, bound = r.sortPoints(s, points)
	first := anchors(payload)
	for _, p := range bound {
		if p.New == nil {
			continue
		}
		u := p.Anchor
		u.New = union(p.New, p.Old)
		first = append(first, u)
	}
	return newPlan(first, anchors(entries), anchors(bound))
}

// cutState parts the state file's directory from what is replicated.
func cutState(points []switchPoint) (rest, state []switchPoint) {
	for _, p := range points {
		if p.path == stateDir {
			state = append(state, p)
		} else {
			rest = append(rest, p)
		}
	}
	return rest, state
}

// inOneSector plans a step so that each of its entries switches whole. It returns nil when that takes more than one
// sector, or room that is not there.
func (r *run) inOneSector(s *side, step fatdriver.Step) (*fatdriver.Plan, error) {
	plan, err := s.tree.NewPlan([]fatdriver.Step{whole(step)}, r.opt.KeepFree)
	var need *fatdriver.ErrNeedSlots
	if errors.Is(err, fatdriver.ErrNoSpace) || errors.As(err, &need) || err == nil && len(plan.Blocks) > 1 {
		return nil, nil
	}
	return plan, err
}

// whole is the step with every anchor switched at its own entry.
func whole(step fatdriver.Step) fatdriver.Step {
	out := slices.Clone(step)
	for i := range out {
		out[i].Whole = true
	}
	return out
}

func anchors(points []switchPoint) fatdriver.Step {
	var out fatdriver.Step
	for _, p := range points {
		out = append(out, p.Anchor)
	}
	return out
}

// sortPoints tells the points that change apart: those that hold loader entries, those that are bound to come after them
// because they lose a file that an entry of the target refers to, and the rest.
func (r *run) sortPoints(s *side, points []switchPoint) (payload, entries, bound []switchPoint) {
	refers := referred(s.tree)
	for _, p := range points {
		switch {
		case !p.Changes():
		case p.loader:
			entries = append(entries, p)
		case p.Old != nil && loses(p, refers):
			bound = append(bound, p)
		default:
			payload = append(payload, p)
		}
	}
	return payload, entries, bound
}

// loses says whether a file of the old tree, for which refers is true, is not in its place in the new one.
func loses(p switchPoint, refers func(path string) bool) bool {
	stays := map[string]bool{}
	var note func(w *fatdriver.Want, at string)
	note = func(w *fatdriver.Want, at string) {
		if !w.Dir {
			stays[fatdriver.Fold(at)] = true
		}
		for _, c := range w.Children {
			note(c, at+"/"+c.Name)
		}
	}
	if p.New != nil {
		note(p.New, p.Old.Path())
	}
	var lost func(n *fatdriver.Node) bool
	lost = func(n *fatdriver.Node) bool {
		if !n.IsDir() {
			return refers(n.Path()) && !stays[fatdriver.Fold(n.Path())]
		}
		return slices.ContainsFunc(n.Children, lost)
	}
	return lost(p.Old)
}

// rehearse makes the plan of a target with everything that must be written before it, in memory: whoever has not enough
// room in the end is refused before the first write.
func (r *run) rehearse(s *side) error {
	dry, d, err := r.onCopy(s)
	if err != nil {
		return err
	}
	return dry.makePlan(d)
}

// onCopy is the run and the target as they are, on a copy of the target in memory and without a word.
func (r *run) onCopy(s *side) (*run, *side, error) {
	dry := *r
	dry.opt.DryRun, dry.log = true, slog.New(slog.DiscardHandler)
	d := &side{t: s.t, random: s.random, res: &Result{}, match: s.match, items: s.items, gone: s.gone, partner: s.partner,
		state: s.state, record: s.record, file: s.file, count: blockdev.NewCounting(blockdev.NewOverlay(s.dev))}
	d.dev = d.count
	var err error
	if d.vol, err = fatdriver.Open(d.dev); err != nil {
		return nil, nil, err
	}
	return &dry, d, dry.scan(d)
}

// summarize fills in the exact numbers of a plan.
func (r *run) summarize(s *side, log *journal.Log) error {
	cost, err := s.plan.Cost()
	if err != nil {
		return err
	}
	rec, err := s.newRecord(s.plan)
	if err != nil {
		return err
	}
	if size := journal.Size(rec); size > log.Capacity() {
		return &Hint{
			fmt.Errorf("%w: the intent record has %d bytes, the journal holds %d", ErrRefused, size, log.Capacity()),
			fmt.Sprintf("%d directory entries would have to switch one by one; select the directories above them, or fewer at a time", len(s.plan.Blocks)),
		}
	}
	sum := &s.res.Summary
	for _, b := range s.plan.Blocks {
		sum.Commits = append(sum.Commits, Commit{b.Paths, b.Off})
	}
	for _, f := range s.plan.Files {
		sum.DataBytes += f.Want.Size
	}
	cs := s.cluster()
	header := int64(max(s.dev.SectorSize(), s.vol.Geometry().SectorSize))
	headers, flushes := int64(2), 3
	if n := len(s.plan.Blocks); n > 1 {
		headers, flushes = headers+int64(n), flushes+n
	}
	payload := (int64(journal.Size(rec)) + header - 1) / header * header
	sum.BytesToWrite = s.count.Counts().BytesWritten + cost.Total() + headers*header + payload
	for _, run := range s.plan.Alloc() {
		sum.Clusters += int64(run.Count)
	}
	for _, run := range s.plan.Freed() {
		sum.ClustersFreed += int64(run.Count)
	}
	sum.Early = s.early
	sum.FreeBytes, sum.FreeAfter = s.free*cs, s.plan.FreeAfter()*cs
	sum.ClustersFreed += max(s.freed, 0)
	sum.Clusters += s.free + s.freed - s.plan.FreeBefore() // the journal, and directories that grew
	sum.PeakNeeded = sum.Clusters * cs
	sum.Flushes = int(s.count.Counts().Flushes) + cost.Flushes + flushes
	s.res.Outcome = Differs
	if r.opt.DryRun && len(sum.Changes) == 0 {
		s.res.Outcome = InSync // there is only something to note
	}
	return nil
}

// newRecord says in a journal record what a plan will do.
func (s *side) newRecord(p *fatdriver.Plan) (*journal.Record, error) {
	rec := &journal.Record{Alloc: journalRuns(p.Alloc()), Base: journalRuns(p.Objects())}
	// A shadow that only an intermediate step uses is both taken and given up: it is released whatever happens, as what
	// the record takes and nobody reaches always is.
	rec.Free = journalRuns(fatdriver.Subtract(p.Freed(), p.Alloc()))
	for _, b := range p.Blocks {
		rec.Blocks = append(rec.Blocks, newBlock(b, len(p.Blocks) == 1))
	}
	if err := newID(&rec.ID, s.random); err != nil {
		return nil, err
	}
	return rec, nil
}
