package replicate

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"slices"
	"sync"
	"sync/atomic"

	"espmirror/blockdev"
	"espmirror/fatdriver"
	"espmirror/journal"
)

// run is one source going to some targets.
type run struct {
	src    Source
	sel    *selection
	opt    Options
	log    *slog.Logger
	hashes map[*Item][32]byte
}

// side is what a run knows of one target.
type side struct {
	t     *Target
	dev   blockdev.Device // the target's device, or an overlay in a dry run
	count *blockdev.Counting
	res   *Result
	vol   *fatdriver.Volume
	tree  *fatdriver.Tree
	match matches
	plan  *fatdriver.Plan
	free  int64 // clusters that could be allocated when planning began
	buf   []byte

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
	r, results, sides, err := begin(src, targets, o)
	if err != nil {
		return nil, err
	}
	each(sides, r.open)
	if err := r.compare(ctx, alive(sides)); err != nil {
		return results, r.stop(sides, err)
	}
	each(sides, r.plan)
	if o.DryRun {
		return results, nil
	}
	each(sides, r.prepare)
	if err := r.build(ctx, sides); err != nil {
		return results, r.stop(sides, err)
	}
	return results, nil
}

// maxKeepFree is more than any FAT volume has, and so little that adding what a plan needs does not overflow.
const maxKeepFree = 1 << 56

// begin checks what was asked for and makes the sides.
func begin(src Source, targets []*Target, o Options) (*run, []Result, []*side, error) {
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	sel, err := o.Selection.resolve(src)
	if err != nil {
		return nil, nil, nil, err
	}
	o.KeepFree = min(o.KeepFree, maxKeepFree)
	r := &run{src: src, sel: sel, opt: o, log: o.Log, hashes: map[*Item][32]byte{}}
	if err := r.replicable(); err != nil {
		return nil, nil, nil, err
	}
	results := make([]Result, len(targets))
	var sides []*side
	for i, t := range targets {
		results[i] = Result{Target: t.Name}
		sides = append(sides, &side{t: t, res: &results[i], match: matches{}})
	}
	return r, results, sides, nil
}

// replicable finds what is selected and cannot be replicated, so that it is the source's fault and not each target's.
func (r *run) replicable() error {
	var find func(it *Item) error
	find = func(it *Item) error {
		if r.sel.excluded(it.Path) {
			return nil
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

// each calls f for every target that has not failed, in parallel.
func each(sides []*side, f func(*side)) {
	var wg sync.WaitGroup
	for _, s := range sides {
		if s.res.Err != nil {
			continue
		}
		wg.Add(1)
		go func() {
			defer wg.Done()
			f(s)
		}()
	}
	wg.Wait()
}

// alive lists the targets that have not failed.
func alive(sides []*side) []*side {
	var out []*side
	for _, s := range sides {
		if s.res.Err == nil {
			out = append(out, s)
		}
	}
	return out
}

// stop ends the run for all targets that have not failed or finished.
func (r *run) stop(sides []*side, err error) error {
	for _, s := range sides {
		if s.res.Outcome == "" {
			s.fail(err)
		}
	}
	return err
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
	if rec.Changed() || rec != nil && rec.Action == "stale" {
		s.res.Recovered = rec
	}
	if err == nil {
		err = r.scan(s)
	}
	if err != nil {
		s.fail(fmt.Errorf("cannot use %s as a target: %w", s.t.Name, err))
	}
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

// plan is P1 and P2: what changes, and where it goes. It makes room for directory entries and for the journal first,
// where there is something to do at all, because both move what a plan relies on.
func (r *run) plan(s *side) {
	if err := r.makePlan(s); err != nil {
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
		if len(plan.Blocks) == 0 {
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
	payload, entries, bound := r.sortPoints(s, points)
	if len(bound) == 0 || len(entries) == 0 {
		return s.tree.NewPlan([]fatdriver.Step{append(anchors(payload), anchors(bound)...), anchors(entries)}, r.opt.KeepFree)
	}
	together := append(anchors(entries), anchors(bound)...)
	plan, err = r.inOneSector(s, together)
	if err != nil {
		return nil, err
	}
	if plan != nil {
		return s.tree.NewPlan([]fatdriver.Step{anchors(payload), whole(together)}, r.opt.KeepFree)
	}
	// The files of old and new entries are there side by side for a moment, so what an entry refers to cannot be moved
	// from one name to another: it would be in two places at once.
	if points, _, err = r.wants(s, true); err != nil {
		return nil, err
	}
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
	return s.tree.NewPlan([]fatdriver.Step{first, anchors(entries), anchors(bound)}, r.opt.KeepFree)
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
	dry := *r
	dry.opt.DryRun, dry.log = true, slog.New(slog.DiscardHandler)
	d := &side{t: s.t, res: &Result{}, match: s.match, count: blockdev.NewCounting(blockdev.NewOverlay(s.dev))}
	d.dev = d.count
	var err error
	if d.vol, err = fatdriver.Open(d.dev); err != nil {
		return err
	}
	if err := dry.scan(d); err != nil {
		return err
	}
	return dry.makePlan(d)
}

// summarize fills in the exact numbers of a plan.
func (r *run) summarize(s *side, log *journal.Log) error {
	cost, err := s.plan.Cost()
	if err != nil {
		return err
	}
	rec, err := record(s.plan)
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
	sum.FreeBytes, sum.FreeAfter = s.free*cs, s.plan.FreeAfter()*cs
	sum.Clusters += s.free - s.plan.FreeBefore() // the journal, and directories that grew
	sum.PeakNeeded = sum.Clusters * cs
	sum.Flushes = int(s.count.Counts().Flushes) + cost.Flushes + flushes
	s.res.Outcome = Differs
	return nil
}

// record says in a journal record what a plan will do.
func record(p *fatdriver.Plan) (*journal.Record, error) {
	rec := &journal.Record{Alloc: journalRuns(p.Alloc()), Base: journalRuns(p.Objects())}
	// A shadow that only an intermediate step uses is both taken and given up: it is released whatever happens, as what
	// the record takes and nobody reaches always is.
	rec.Free = journalRuns(fatdriver.Subtract(p.Freed(), p.Alloc()))
	for _, b := range p.Blocks {
		rec.Blocks = append(rec.Blocks, newBlock(b, len(p.Blocks) == 1))
	}
	if err := newID(&rec.ID); err != nil {
		return nil, err
	}
	return rec, nil
}

// prepare is J: the intent is on the medium before anything that it speaks of is written.
func (r *run) prepare(s *side) {
	if s.plan == nil {
		return
	}
	s.res.Outcome = ""
	log, err := r.journalOf(s)
	if err == nil && log == nil {
		err = errors.New("internal error: the journal vanished")
	}
	if err == nil {
		var rec *journal.Record
		if rec, err = record(s.plan); err == nil {
			err = log.Prepare(rec)
		}
	}
	if err != nil {
		s.fail(fmt.Errorf("cannot write the intent to %s: %w", s.t.Name, err))
	}
}

// chunk is a part of a source file on its way to several targets.
type chunk struct {
	file *Item
	data []byte
	last bool
	refs *atomic.Int32 // targets that have not taken it yet
	pool chan []byte   // where the buffer goes when nobody needs it any more
}

// done gives the chunk back.
func (c chunk) done() {
	if c.refs.Add(-1) == 0 {
		c.pool <- c.data[:cap(c.data)]
	}
}

// feed is the way into one target.
type feed struct {
	s     *side
	files map[*Item]*fatdriver.NewFile
	ch    chan chunk
}

// build is E1 and what follows it. The source is read once, file by file; each target takes the files that it needs.
// A target that fails stops taking part; an error of the source, or a cancelled context, rolls all of them back.
func (r *run) build(ctx context.Context, sides []*side) error {
	var feeds []*feed
	var total int64
	needed := map[*Item]bool{}
	for _, s := range sides {
		if s.plan == nil || s.res.Err != nil {
			continue
		}
		f := &feed{s: s, files: map[*Item]*fatdriver.NewFile{}, ch: make(chan chunk, 4)}
		for _, nf := range s.plan.Files {
			it := nf.Want.Content.(*Item)
			f.files[it] = nf
			if !needed[it] {
				needed[it] = true
				total += it.Size
			}
		}
		feeds = append(feeds, f)
	}
	if len(feeds) == 0 {
		return nil
	}
	var aborted atomic.Bool
	var wg sync.WaitGroup
	for _, f := range feeds {
		wg.Add(1)
		go func() {
			defer wg.Done()
			if err := r.transact(ctx, f, &aborted); err != nil {
				f.s.fail(&Hint{fmt.Errorf("cannot sync %s: %w", f.s.t.Name, err), "its tree is whole, old or new; run `espmirror recover " + f.s.t.Name + "` or sync again to tidy up"})
			}
		}()
	}
	err := r.broadcast(ctx, feeds, needed, total)
	if err != nil {
		aborted.Store(true)
	}
	for _, f := range feeds {
		close(f.ch)
	}
	wg.Wait()
	return err
}

// broadcast reads the source and hands its bytes to every target that needs them.
func (r *run) broadcast(ctx context.Context, feeds []*feed, needed map[*Item]bool, total int64) error {
	// A fixed number of buffers bounds the memory, and makes the source wait for the slowest target.
	pool := make(chan []byte, buffers)
	for range buffers {
		pool <- make([]byte, chunkSize)
	}
	var done int64
	for _, it := range r.selectedFiles() {
		if !needed[it] {
			continue
		}
		var to []*feed
		for _, f := range feeds {
			if f.files[it] != nil {
				to = append(to, f)
			}
		}
		rd, err := r.src.Open(it)
		if err != nil {
			return fmt.Errorf("%w: cannot read %s: %w", ErrSource, it.Path, err)
		}
		left := it.Size
		for first := true; first || left > 0; first = false {
			if err := ctx.Err(); err != nil {
				rd.Close()
				return err
			}
			buf := <-pool
			k := min(left, chunkSize)
			_, err := io.ReadFull(rd, buf[:k])
			if left -= k; err == nil && left == 0 {
				err = ended(rd)
			}
			if err != nil {
				rd.Close()
				return fmt.Errorf("%w: cannot read %s: %w", ErrSource, it.Path, shrunk(err))
			}
			refs := &atomic.Int32{}
			refs.Store(int32(len(to)))
			for _, f := range to {
				f.ch <- chunk{it, buf[:k], left == 0, refs, pool}
			}
			done += k
			r.progress(Progress{Phase: "write", Done: done, Total: total})
		}
		rd.Close()
	}
	return nil
}

// buffers is how many chunks of the source are under way at once.
const buffers = 8

// transact carries out the plan of one target: build, barrier, read back, commit, barrier, free, barrier, done. It is
// the protocol, in its order.
func (r *run) transact(ctx context.Context, f *feed, aborted *atomic.Bool) (err error) {
	s := f.s
	tx := s.plan.Begin()
	committing := false
	defer func() {
		for c := range f.ch { // let the source go on to the other targets
			c.done()
		}
		if err == nil {
			s.res.Outcome = Synced
			return
		}
		if !committing && !errors.Is(err, blockdev.ErrFlushFailed) {
			// Nothing was committed: take back what was allocated. A device that fails now too is left as it is; its tree
			// is the old one, and recovery will find the record.
			if _, rerr := recoverVolume(s.vol, r.log.With("target", s.t.Name), thorough{}); rerr != nil {
				r.log.Warn("cannot roll back", "target", s.t.Name, "err", rerr)
			}
		}
	}()

	// E1: build. Nobody can reach what is written here.
	err = inOrder(
		func() error { return receive(f, tx) },
		func() error {
			if aborted.Load() {
				return ErrStopped
			}
			return nil
		},
		tx.WriteDirs,
		tx.WriteFAT,
		// B1: the new tree must be on the medium before anything points to it.
		tx.Flush,
		func() error { return r.readBack(s, tx) },
		ctx.Err, // the last chance to stop
	)
	if err != nil {
		return err
	}
	log, err := r.journalOf(s)
	if err != nil {
		return err
	}
	committing = true
	if err := r.commitAll(s, s.plan, tx, log); err != nil {
		return err
	}
	return closeTx(tx, log)
}

// readBack compares what was built with what the medium holds, unless that was not wanted.
func (r *run) readBack(s *side, tx *fatdriver.Tx) error {
	if r.opt.NoReadBack {
		return nil
	}
	var done int64
	return tx.ReadBack(func(n int64) {
		done += n
		r.progress(Progress{Target: s.t.Name, Phase: "read back", Done: done})
	})
}

// commitAll is E2. From the first write on there is no way back, only forward. log is nil while there is no journal yet.
func (r *run) commitAll(s *side, plan *fatdriver.Plan, tx *fatdriver.Tx, log *journal.Log) error {
	for i, b := range plan.Blocks {
		if log != nil && len(plan.Blocks) > 1 {
			// Recovery rolls forward only over content that it can check, so the record must have the digest first.
			if err := log.Advance(i, tx.Digest()); err != nil {
				return err
			}
		}
		if err := tx.Commit(i); err != nil {
			return err
		}
		// B2: the old tree's clusters may be freed, and the next entry may switch, only when this one has.
		if err := tx.Flush(); err != nil {
			return err
		}
		if err := tx.Committed(i); err != nil {
			return err
		}
		r.log.Debug("committed", "target", s.t.Name, "entries", b.Paths, "offset", fmt.Sprintf("0x%x", b.Off))
	}
	return nil
}

// closeTx is E3 and E4: what only the old tree used becomes free, then the books are closed.
func closeTx(tx *fatdriver.Tx, log *journal.Log) error {
	if err := tx.Free(); err != nil {
		return err
	}
	// B3: the record may be closed only when what it names for freeing is free.
	if tx.Frees() {
		if err := tx.Flush(); err != nil {
			return err
		}
	}
	if err := tx.Finish(); err != nil {
		return err
	}
	if log != nil {
		if err := log.Done(); err != nil {
			return err
		}
	}
	// B4: the run is over when this is on the medium.
	return tx.Flush()
}

// receive writes the files of one target as the source delivers them.
func receive(f *feed, tx *fatdriver.Tx) error {
	var w *fatdriver.FileWriter
	var cur *Item
	got := 0
	for c := range f.ch {
		if c.file != cur {
			cur, w = c.file, tx.File(f.files[c.file])
		}
		_, err := w.Write(c.data)
		c.done()
		if err != nil {
			return err
		}
		if c.last {
			if err := w.Close(); err != nil {
				return err
			}
			got++
		}
	}
	if got != len(f.files) {
		return ErrStopped
	}
	return nil
}
