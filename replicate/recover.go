package replicate

import (
	"context"
	"errors"
	"fmt"
	"log/slog"

	"espmirror/blockdev"
	"espmirror/fatdriver"
	"espmirror/journal"
)

// The actions that a Recovery reports.
const (
	actNothing = "nothing to do"
	actBack    = "rolled back"
	actForward = "rolled forward"
	actFinish  = "finished"
	actStale   = "stale"
)

// RecoverOptions of a recovery.
type RecoverOptions struct {
	Options
	Reclaim bool // free all lost clusters, whoever lost them
}

// Recover finishes or rolls back what a power cut interrupted on a target: the tree that readers see becomes clean in
// its books, and where several entries were being switched, the rest of them follow. It can be interrupted anywhere
// itself, and a second one writes nothing.
func Recover(ctx context.Context, t *Target, o RecoverOptions) (*Recovery, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	dev := blockdev.Device(&latch{Device: t.Dev})
	if o.DryRun {
		dev = blockdev.NewOverlay(t.Dev)
	}
	v, err := openTarget(dev)
	if err != nil {
		return nil, fmt.Errorf("cannot recover %s: %w", t.Name, err)
	}
	rec, err := recoverVolume(v, o.Log.With("target", t.Name), thorough{reclaim: o.Reclaim, count: true})
	if err != nil {
		return rec, fmt.Errorf("cannot recover %s: %w", t.Name, err)
	}
	return rec, nil
}

// Pending says whether an interrupted run left a volume to be recovered. It writes nothing.
func Pending(t *Target) (bool, error) {
	v, err := fatdriver.Open(t.Dev)
	if err != nil {
		return false, fmt.Errorf("cannot look at %s: %w", t.Name, err)
	}
	tree, err := v.Scan()
	if err != nil {
		return false, fmt.Errorf("cannot look at %s: %w", t.Name, err)
	}
	pending, err := unfinished(v, tree)
	if err != nil {
		return false, fmt.Errorf("cannot look at %s: %w", t.Name, err)
	}
	return pending, nil
}

// unfinished says whether the journal of a scanned volume has a record that is not closed.
func unfinished(v *fatdriver.Volume, tree *fatdriver.Tree) (bool, error) {
	log, _, _, err := findJournal(v, tree)
	if errors.Is(err, journal.ErrBinding) || errors.Is(err, journal.ErrInvalid) {
		return false, nil // it holds nothing that recovery could act on
	}
	return log != nil && log.Status().State != journal.Idle, err
}

// thorough is what a recovery does besides finishing what an interrupted run of ours left.
type thorough struct {
	reclaim bool // free every lost cluster
	count   bool // correct a free count that somebody else got wrong; a sync with nothing to do writes nothing for that
}

// recoverVolume is R1 to R6. The volume was opened with its caches dropped.
func recoverVolume(v *fatdriver.Volume, log *slog.Logger, more thorough) (*Recovery, error) {
	rec := &Recovery{Action: actNothing}
	if err := v.Refresh(); err != nil {
		return rec, err
	}
	// R1: what copy 0 shows is the old tree or the new one. A sector that a cut left unreadable may be on the way to the
	// journal, or beside it.
	tree, unread, err := v.ScanAround()
	if err != nil {
		return rec, err
	}
	jl, _, _, jerr := findJournal(v, tree)
	home := jl != nil
	blind := false // the journal may be there, and cannot be seen
	lost, err := tree.Lost()
	if err != nil {
		return rec, err
	}
	if jl == nil && jerr == nil && (len(lost) > 0 || tree.Damage() != nil) {
		// The commit sector itself may be garbage, and lie on the way to the journal. Zeros there look like an empty
		// directory: no damage, but everything below it is lost.
		if jl, blind, err = searchJournal(v, tree); err != nil {
			return rec, err
		}
		if jl == nil && blind {
			log.Warn("some clusters cannot be read, and one of them may be the journal: no lost cluster is freed")
		}
	}
	switch {
	case errors.Is(jerr, journal.ErrVersion):
		return rec, fmt.Errorf("%w: %w", ErrRefused, jerr)
	case errors.Is(jerr, journal.ErrBinding):
		rec.Action, rec.Reason = actStale, jerr.Error()
		jl = nil
	case errors.Is(jerr, journal.ErrInvalid):
		rec.Action, rec.Reason = actStale, jerr.Error()
		jl = nil
	case jerr != nil:
		return rec, jerr
	}
	var pending *journal.Record
	if jl != nil {
		if pending, err = jl.Pending(); err != nil {
			pending, err = jl.Pending() // a record is given up only if it cannot be read twice
		}
		if errors.Is(err, journal.ErrPayload) {
			rec.Action, rec.Reason = actStale, err.Error()
			log.Warn("the journal's record cannot be used", "err", err)
			err = nil
		}
		if err != nil {
			return rec, err
		}
	}
	unusable := jl != nil && rec.Action == actStale
	decision := journal.Decision{Action: journal.Nothing}
	if pending != nil {
		// What a killed run left in a cache reads like what is on the medium. It must be there before anything is freed or
		// closed because of it.
		if err := v.Device().Flush(); err != nil {
			return rec, err
		}
		if decision, err = decide(v, jl, pending, unread); err != nil {
			return rec, err
		}
		log.Info("found an unfinished transaction", "id", fmt.Sprintf("%x", pending.ID[:4]), "decision", decision.Action.String(), "reason", decision.Reason)
	}
	if decision.Damaged || decision.Action == journal.RollForward {
		// What another system made of the volume may be whole by itself and not go together with the record.
		why, err := rehearseForward(v, pending, decision)
		if err != nil {
			return rec, err
		}
		if damage := tree.Damage(); why != "" && damage != nil {
			// Neither is whole, and the record may hold the only image of what is missing: not to be given up.
			return rec, &Hint{fmt.Errorf("%w; and %s", damage, why), "nothing was written, and the record of the interrupted run is kept; mend what else is damaged, and recover again"}
		}
		if why != "" {
			decision = journal.Decision{Action: journal.Stale, Reason: why}
		}
	}
	if decision.Action == journal.Stale {
		// Rule R: somebody else wrote in between. The volume is readable as it is, and the record is of no more use.
		rec.Action, rec.Reason = actStale, decision.Reason
		log.Warn("the journal's record is stale: nothing is done about it", "reason", decision.Reason)
		unusable, pending = true, nil
	}
	if err := unexplained(rec, unread, pending, decision); err != nil {
		return rec, err
	}
	if unusable && tree.Damage() != nil {
		return rec, discard(v, jl)
	}
	if decision.Damaged {
		// The commit sector itself is garbage or unreadable: only the record's image of it makes the tree whole again,
		// and nothing else is looked at before.
		if err := repair(v, pending, decision); err != nil {
			return rec, err
		}
	}
	if decision.Action == journal.RollForward {
		if err := forward(v, jl, pending, decision); err != nil {
			return rec, err
		}
	}
	if decision.Damaged || decision.Action == journal.RollForward {
		if tree, err = rescan(v); err != nil {
			return rec, err
		}
	}
	if err := tree.Damage(); err != nil {
		return rec, &Hint{err, "run `espmirror check` on it to see every finding; fsck.fat can mend it"}
	}
	// R2: nobody reads the other copies, but fsck compares them. Before anything is freed, so that a cut in between
	// leaves copies that are each consistent.
	mended, err := v.MendFATs()
	if err != nil {
		return rec, err
	}
	if rec.FATsMended = mended / int64(v.Geometry().SectorSize); mended > 0 {
		if err := v.Device().Flush(); err != nil {
			return rec, err
		}
	}
	// R3: what the record took or gave up, and nobody can reach.
	var sets [][]fatdriver.Run
	if pending != nil {
		sets = append(sets, volumeRuns(pending.Alloc), volumeRuns(pending.Free))
	}
	if lost, err = tree.Lost(); err != nil {
		return rec, err
	}
	for again := len(lost) > 0; again; {
		free := sets
		switch {
		case more.reclaim:
			free = append(free, lost)
		case jl == nil && blind:
			// What looks left over from the creation of a journal may be the journal.
		case jl == nil || !home:
			stamped, err := stampedClusters(v, lost)
			if err != nil {
				return rec, err
			}
			// Before there was a journal, a directory may have had to grow for it.
			blank, err := tree.LostBlank()
			if err != nil {
				return rec, err
			}
			free = append(free, stamped, blank)
		}
		n, err := tree.Release(free...)
		if err != nil {
			return rec, err
		}
		if n > 0 {
			if err := v.Device().Flush(); err != nil {
				return rec, err
			}
		}
		rec.FreedClusters += n
		// What was a chain before may be a blank cluster by itself now.
		if again = n > 0 && !more.reclaim && (jl == nil || !home); again {
			if lost, err = tree.Lost(); err != nil {
				return rec, err
			}
		}
	}
	// R4: our own runs leave the count right, or unknown.
	ours := pending != nil || rec.FreedClusters > 0
	if rec.FSInfoFixed, err = v.MendFSInfo(!ours && !more.count); err != nil {
		return rec, err
	}
	if rec.FSInfoFixed {
		if err := v.Device().Flush(); err != nil {
			return rec, err
		}
	}
	// R6: only now may the record go.
	if pending != nil {
		switch decision.Action {
		case journal.RollBack:
			rec.Action = actBack
		case journal.RollForward:
			rec.Action = actForward
		default:
			rec.Action = actFinish
		}
		if err := discard(v, jl); err != nil {
			return rec, err
		}
	} else if unusable {
		// What nobody reads, and what follows from copy 0 alone, is in order all the same.
		if err := discard(v, jl); err != nil {
			return rec, err
		}
	} else if rec.FreedClusters > 0 && rec.Action == actNothing {
		rec.Action = actBack
	} else if (rec.FATsMended > 0 || rec.FSInfoFixed) && rec.Action == actNothing {
		rec.Action = actFinish
	}
	return rec, v.Refresh()
}

// unexplained returns an error when a sector of a directory cannot be read and is not the one that the record was
// switching: nobody knows what it held, so what seems lost may be what it led to. The record stays: the sector may be
// readable another time.
func unexplained(rec *Recovery, unread []*fatdriver.Unreadable, pending *journal.Record, d journal.Decision) error {
	for _, u := range unread {
		if pending != nil && d.Damaged {
			if b := pending.Blocks[d.From]; u.Off >= b.Off && u.Off < b.Off+int64(len(b.New)) {
				continue
			}
		}
		var err error = u
		if rec.Action == actStale {
			err = fmt.Errorf("%w; and the journal is of no use: %s", u, rec.Reason)
		}
		return &Hint{err, "nothing was written; no interrupted run explains the sector, so the medium may be failing: save what can be read"}
	}
	return nil
}

// rescan reads the tree from the medium again.
func rescan(v *fatdriver.Volume) (*fatdriver.Tree, error) {
	if err := v.Refresh(); err != nil {
		return nil, err
	}
	return v.Scan()
}

// discard closes the record.
func discard(v *fatdriver.Volume, jl *journal.Log) error {
	if err := jl.Done(); err != nil {
		return err
	}
	return v.Device().Flush()
}

// decide applies rule R: the commit sectors tell how far the transaction came, and what rolling forward relies on is
// checked against the record.
func decide(v *fatdriver.Volume, jl *journal.Log, rec *journal.Record, unread []*fatdriver.Unreadable) (journal.Decision, error) {
	g := v.Geometry()
	inFAT := func(off int64) bool {
		return off >= g.FATOff && off < g.FATOff+int64(g.NumFATs)*g.FATSize
	}
	plausible := v.PlausibleDir
	for _, b := range rec.Blocks {
		if b.Off < g.FATOff || b.Off+int64(len(b.New)) > g.Size() {
			return journal.Decision{Action: journal.Stale, Reason: fmt.Sprintf("block at offset 0x%x is outside the FATs and directories", b.Off)}, nil
		}
		if inFAT(b.Off) {
			plausible = nil
		}
	}
	st := jl.Status()
	known := map[int64]bool{}
	for _, u := range unread {
		known[u.Off] = true
	}
	var fickle error
	read := func(off int64, n int) ([]byte, error) {
		b := make([]byte, n)
		_, err := v.Device().ReadAt(b, off)
		if walked := !inFAT(off) || off < g.FATOff+g.FATSize; err != nil && walked && !known[off] && fickle == nil {
			fickle = fmt.Errorf("cannot read commit sector at offset 0x%x: %w", off, err)
		}
		return b, err
	}
	d, err := journal.Decide(rec, st, read, plausible)
	if err == nil {
		// What the walk could read a moment ago was not torn by a cut: to write over it might undo a commit.
		err = fickle
	}
	if err == nil && d.Damaged && d.Action == journal.RollBack {
		// Once the commit was stable the old clusters may have been freed, and damage to its sector came later: then only
		// the new tree is whole.
		var taken bool
		if taken, err = v.Taken(volumeRuns(rec.Free)); err == nil && !taken {
			d.Action = journal.Finish
			return d, nil
		}
	}
	if err != nil || d.Action != journal.RollForward {
		return d, err
	}
	// Rolling forward makes the new content reachable, so it must be what the record says.
	if st.State != journal.Committing {
		return journal.Decision{Action: journal.Stale, Reason: "the new content was never confirmed, and an entry has switched"}, nil
	}
	sum, err := v.DigestOf(volumeRuns(rec.Base))
	if err != nil {
		sum, err = v.DigestOf(volumeRuns(rec.Base)) // a record is given up only if what it needs cannot be read twice
	}
	if err != nil || sum != st.Digest {
		reason := "the new files, or the directories that they replace, are no longer what the record says"
		if err != nil {
			reason += ": " + err.Error()
		}
		return journal.Decision{Action: journal.Stale, Reason: reason}, nil
	}
	return d, nil
}

// rehearseForward makes what repair and forward would make on a copy, and says what would be wrong with it: fsck.fat may
// have made files of the clusters that the new directories take, or a sector may be a directory's no more.
func rehearseForward(v *fatdriver.Volume, rec *journal.Record, d journal.Decision) (string, error) {
	ov := blockdev.NewOverlay(v.Device())
	put := func(off int64, img []byte) error { _, err := ov.WriteAt(img, off); return err }
	write := rec.Blocks[d.From:]
	if d.Action != journal.RollForward {
		write = write[:1]
	}
	for i, b := range write {
		img := b.New
		if i == 0 && d.Action == journal.RollBack {
			img = b.OldImage
		}
		if err := put(b.Off, img); err != nil {
			return "", err
		}
	}
	after, err := fatdriver.Open(ov)
	if err != nil {
		return "", err
	}
	tree, err := after.Scan()
	if err != nil {
		return "", err
	}
	if err := tree.Damage(); err != nil {
		return fmt.Sprintf("with the record's entries the volume would be damaged: %v", err), nil
	}
	g := v.Geometry()
	for _, b := range write {
		if b.Off >= g.FATOff+int64(g.NumFATs)*g.FATSize && !tree.InAnyDirectory(b.Off) {
			return fmt.Sprintf("block at offset 0x%x is not part of a directory any more", b.Off), nil
		}
	}
	return "", nil
}

// repair rewrites a commit sector that a cut turned to garbage.
func repair(v *fatdriver.Volume, rec *journal.Record, d journal.Decision) error {
	b := rec.Blocks[d.From]
	img := b.New
	if d.Action == journal.RollBack {
		if img = b.OldImage; img == nil {
			return fmt.Errorf("internal error: no old image for the sector at offset 0x%x", b.Off)
		}
	}
	if _, err := v.Device().WriteAt(img, b.Off); err != nil {
		return fmt.Errorf("cannot repair commit sector at offset 0x%x: %w", b.Off, err)
	}
	return v.Device().Flush()
}

// forward commits the blocks that are still old, in order, as the transaction would have.
func forward(v *fatdriver.Volume, jl *journal.Log, rec *journal.Record, d journal.Decision) error {
	for i := d.From; i < len(rec.Blocks); i++ {
		if err := jl.Advance(i, jl.Status().Digest); err != nil {
			return err
		}
		b := rec.Blocks[i]
		if _, err := v.Device().WriteAt(b.New, b.Off); err != nil {
			return fmt.Errorf("cannot write commit sector at offset 0x%x: %w", b.Off, err)
		}
		// The next entry may switch only when this one has.
		if err := v.Device().Flush(); err != nil {
			return err
		}
	}
	return nil
}

// stampedClusters finds lost clusters that the creation of a journal left behind: each cluster of the file begins with
// a header that says so, and that lists the directories that were made with it.
func stampedClusters(v *fatdriver.Volume, lost []fatdriver.Run) ([]fatdriver.Run, error) {
	var own []fatdriver.Run
	done := map[uint32]bool{}
	g := v.Geometry()
	stamp := func(c fatdriver.Cluster) (journal.Header, bool, error) {
		b, err := v.ReadCluster(c, journal.HeaderSize)
		if err != nil {
			return journal.Header{}, false, err
		}
		h, err := journal.DecodeHeader(b)
		return h, err == nil, nil
	}
	take := func(h journal.Header) {
		for _, r := range h.Creation {
			if !done[r.First] && uint64(r.First)+uint64(r.Count) <= uint64(g.MaxCluster())+1 && r.First >= 2 {
				own = append(own, fatdriver.Run{First: fatdriver.Cluster(r.First), Count: r.Count})
			}
			done[r.First] = true
		}
	}
	for _, r := range lost {
		for i := uint32(0); i < r.Count; i++ {
			c := r.First + fatdriver.Cluster(i)
			h, ok, err := stamp(c)
			if err != nil {
				continue // what cannot be read is not known for ours
			}
			if ok {
				take(h)
				own = append(own, fatdriver.Run{First: c, Count: 1})
				continue
			}
			// A directory that was made for the journal: follow its last entry, one or two levels down.
			next := c
			for range 2 {
				if next, err = v.OnlyChild(next); err != nil || next == 0 {
					break
				}
				if h, ok, err = stamp(next); err != nil {
					break
				}
				if ok {
					take(h)
					break
				}
			}
		}
	}
	return own, nil
}
