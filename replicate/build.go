package replicate

import (
	"context"
	"errors"
	"fmt"
	"io"
	"sync"
	"sync/atomic"

	"espmirror/blockdev"
	"espmirror/fatdriver"
	"espmirror/journal"
)

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
		if rec, err = s.newRecord(s.plan); err == nil {
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
	own   []*fatdriver.NewFile // those whose content was made for this target
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
			if it.data != nil {
				f.own = append(f.own, nf)
				continue
			}
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
	committing, turn := false, false
	defer func() {
		if turn {
			r.turns.done()
		}
		for c := range f.ch { // let the source go on to the other targets
			c.done()
		}
		if err == nil {
			s.res.Outcome = Synced
			// Whoever reads through another node of this disk has a page cache of its own, with the old content.
			if ierr := s.dev.Invalidate(); ierr != nil {
				r.log.Warn("cannot drop caches", "target", s.t.Name, "err", ierr)
			}
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
		func() error { return r.receive(f, tx) },
		func() error {
			r.turns.take() // what follows waits for no other target
			turn = true
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

// receive writes the files of one target as the source delivers them. It has a turn for each part alone: the source goes on
// when all targets have one, and nobody may keep it waiting.
func (r *run) receive(f *feed, tx *fatdriver.Tx) error {
	var w *fatdriver.FileWriter
	var cur *Item
	got := 0
	for c := range f.ch {
		if c.file != cur {
			cur, w = c.file, tx.File(f.files[c.file])
		}
		r.turns.take()
		_, err := w.Write(c.data)
		r.turns.done()
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
	return f.writeOwn(tx)
}

// writeOwn writes the files whose content was made for the target.
func (f *feed) writeOwn(tx *fatdriver.Tx) error {
	for _, nf := range f.own {
		w := tx.File(nf)
		if _, err := w.Write(nf.Want.Content.(*Item).data); err != nil {
			return err
		}
		if err := w.Close(); err != nil {
			return err
		}
	}
	return nil
}
