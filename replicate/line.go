package replicate

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"path"
	"slices"
	"strings"
	"time"

	"espmirror/fatdriver"
)

// line is what a run knows of the generations of a replica set.
type line struct {
	state *State // what the source remembers, nil when it has never been in a set
	lost  error  // why that cannot be read
	fp    string // the source's fingerprint, "" when there is no volume to take one of
	now   *State // the generation that this run brings to the targets
	save  bool   // the source does not know it yet
}

// noFingerprint stands where a fingerprint is not known; it has the length of one, so that the state file has its size
// before it has its content.
var noFingerprint = strings.Repeat("0", 64)

// Lineage says how a target stands to the source.
type Lineage struct {
	Verdict    Verdict
	Forced     bool      // the verdict was overridden
	Generation uint64    // the target's before the run, 0 when it has none
	Base       uint64    // the generation that the source was at, 0 when it had none
	Source     uint64    // the generation that the source is at, or comes to by this run
	Last       time.Time // when the target's last run ended by the clock of then; zero when not known
}

// ReadSet reads the set file of a source or target; nil without an error when there is none.
func ReadSet(src Source) (*Set, error) {
	it := src.Root().lookup(SetPath)
	if it == nil {
		return nil, nil
	}
	if it.Dir || it.Size > MaxSetSize {
		return nil, fmt.Errorf("%s of %s is no replica set file: it is a directory or too long", SetPath, src.Name())
	}
	text, err := readItem(src, it)
	if err != nil {
		return nil, err
	}
	return ParseSet(src.Name()+":"+SetPath, text)
}

// texts are the words by which the entries of one member differ from those of the others.
func (r *run) texts(guid string) map[string]string {
	if r.set == nil || guid == "" {
		return nil
	}
	return r.set.Texts(guid)
}

// begun reads what the source knows of its replica set.
func (r *run) begun() error {
	var err error
	set := r.opt.Set
	if set == nil {
		set, err = ReadSet(r.src)
	}
	if err != nil {
		return &Hint{refusal{fmt.Errorf("%w: %w", ErrSource, err)}, "mend " + SetPath + " on the primary"}
	}
	if r.set = set; set != nil {
		if names := set.Incomplete(r.opt.SourceGUID); r.opt.SourceGUID != "" && len(names) > 0 {
			return &Hint{
				refusal{fmt.Errorf("%w: %s of %s has no text for %s of the primary itself", ErrSource, SetPath, r.src.Name(), strings.Join(names, ", "))},
				fmt.Sprintf("add a line `replace %s %s TEXT` there", names[0], r.opt.SourceGUID),
			}
		}
	}
	if !r.opt.Member {
		return nil
	}
	st, err := ReadState(r.src)
	var lost error
	switch {
	case errors.Is(err, ErrState) && r.opt.Force:
		r.log.Warn("the source's state is lost, and a new lineage begins", "err", err)
	case errors.Is(err, ErrState):
		lost = err // a target with the same tree knows what the source was
	case err != nil:
		return err
	}
	r.line = &line{state: st, lost: lost}
	if st != nil && len(r.opt.Selection.Select) == 0 && len(st.Named) == 0 {
		// What entries once referred to stays selected, so that it goes from the targets when it goes from the source. What is
		// excluded since then does not come back that way.
		for _, a := range st.Anchors {
			if it := r.src.Root().lookup(a); it != nil && !r.sel.touches(a) && !r.sel.barred(a) {
				r.sel.anchors = append(r.sel.anchors, it.Path)
			}
		}
	}
	r.line.fp = noFingerprint
	if tree := r.sourceTree(); tree != nil {
		r.line.fp = fingerprint(tree, r.sel)
	}
	return nil
}

// wholeSource refuses a member as the source that cannot say what it is.
func (r *run) wholeSource() error {
	if r.line == nil {
		return nil
	}
	if errors.Is(r.line.lost, errNewerState) {
		return &Hint{refusal{r.line.lost}, "a newer espmirror wrote it: use that one; --force begins a new lineage"}
	}
	if tree := r.sourceTree(); tree != nil {
		// What a tree lacks that was left half-way is no change that somebody made.
		pending, err := unfinished(tree.Volume(), tree)
		if err != nil {
			return fmt.Errorf("%w: %s: %w", ErrSource, r.src.Name(), err)
		}
		if pending {
			return &Hint{refusal{fmt.Errorf("%w: %s: %w", ErrSource, r.src.Name(), ErrNeedsRecovery)}, "run `espmirror recover " + r.src.Name() + "`"}
		}
	}
	return nil
}

// touches says whether a path is selected, or holds or lies in something that is.
func (s *selection) touches(p string) bool {
	k := fatdriver.Fold(p)
	return s.covers(p) || slices.ContainsFunc(s.anchors, func(a string) bool { return inside(fatdriver.Fold(a), k) })
}

// sourceTree is the volume that the source is, nil when it is a directory that no volume was given for.
func (r *run) sourceTree() *fatdriver.Tree {
	if v, ok := r.src.(*volumeSource); ok {
		return v.tree
	}
	return r.opt.SourceTree
}

// adapt works out what is different from target to target: words in loader entries, and directories that only an
// earlier run selected.
func (r *run) adapt() error {
	from := r.texts(r.opt.SourceGUID)
	var entries []*Item
	if r.set != nil {
		for _, f := range r.selectedFiles() {
			if hasWords(f) {
				entries = append(entries, f)
			}
		}
	}
	for _, s := range r.alive() {
		s.items, s.gone = map[*Item]*Item{}, nil
		if st := s.state; st != nil && r.line != nil && len(r.opt.Selection.Select) == 0 && len(st.Named) == 0 {
			for _, a := range st.Anchors {
				if r.src.Root().lookup(a) == nil && !r.sel.touches(a) && !r.sel.barred(a) {
					s.gone = append(s.gone, a)
				}
			}
		}
		guid := s.t.guid()
		to := r.texts(guid)
		if r.set != nil && r.set.Has(guid) {
			if names := r.set.Incomplete(guid); len(names) > 0 {
				s.fail(&Hint{
					refusal{fmt.Errorf("cannot sync %s: %s of %s has no text for %s of this member, so its loader entries would say what another member's say",
						s.t.Name, SetPath, r.src.Name(), strings.Join(names, ", "))},
					fmt.Sprintf("add a line `replace %s %s TEXT` there", names[0], guid),
				})
				continue
			}
		}
		for _, f := range entries {
			text, err := readItem(r.src, f)
			if err != nil {
				return err
			}
			out := Rewrite(text, from, to)
			if len(out) > maxEntryFile {
				s.fail(refusal{fmt.Errorf("cannot sync %s: %s with the texts of this member would have more than %d bytes, and no more are read of an entry",
					s.t.Name, f.Path, maxEntryFile)})
				break
			}
			if !Faithful(text, from, to) {
				s.fail(refusal{fmt.Errorf("cannot sync %s: %s names the text of both members, which %s tells apart: on the target they would be alike",
					s.t.Name, f.Path, SetPath)})
				break
			}
			if !bytes.Equal(out, text) {
				e := *f
				e.data, e.Size = out, int64(len(out))
				s.items[f] = &e
			}
		}
	}
	return nil
}

// item is what a target is to have in the place of a source item.
func (s *side) item(it *Item) *Item {
	if e := s.items[it]; e != nil {
		return e
	}
	return it
}

// unread says whether the fingerprints of both sides are those of the last run that compared or wrote content, so that
// nothing has to be read. Where they differ nothing is concluded but that it must.
func (r *run) unread(s *side) bool {
	l := r.line
	return l != nil && r.opt.Fingerprint && l.state != nil && s.state != nil && s.state.same(l.state) && len(s.gone) == 0 &&
		l.fp != noFingerprint && s.state.Source == l.fp && s.state.Own != noFingerprint && s.state.Own == r.ownPrint(s, s.tree)
}

// ownPrint is the fingerprint of a target's tree, with the words of both members: those of an XBOOTLDR partition stand in
// the set file of the ESP, which the fingerprint of neither volume covers.
func (r *run) ownPrint(s *side, tree *fatdriver.Tree) string {
	return fingerprint(tree, r.sel, r.texts(r.opt.SourceGUID), r.texts(s.t.guid()))
}

// judge decides for each target whether the source may replace what it has, and which generation the run brings.
func (r *run) judge() error {
	sides := r.alive()
	if r.line == nil {
		for _, s := range sides {
			if err := r.judgeStranger(s); err != nil {
				s.fail(fmt.Errorf("cannot sync %s: %w", s.t.Name, err))
			}
		}
		return nil
	}
	read := slices.DeleteFunc(slices.Clone(sides), func(s *side) bool {
		if s.skip {
			s.res.Lineage = &Lineage{Verdict: Equal, Generation: s.state.Generation, Base: s.state.Generation, Source: s.state.Generation, Last: s.state.UpdatedAt()}
		}
		return s.skip
	})
	if len(read) == 0 {
		return nil
	}
	digest, err := r.digest(r.sel)
	if err != nil {
		return err
	}
	base, changed, err := r.base(read)
	if err != nil {
		return err
	}
	now := base
	if base == nil || changed {
		if now, err = r.nextState(base, digest); err != nil {
			return err
		}
	}
	from := lineageSide{base, changed, digest}
	var over uint64 // the highest generation that is overruled
	for _, s := range read {
		in := &Lineage{Verdict: Equal}
		s.res.Lineage = in
		if s.state != nil {
			in.Generation, in.Last = s.state.Generation, s.state.UpdatedAt()
		}
		if r.alike(s) {
			if r.opt.Force && s.apart(base, now) {
				over = max(over, in.Generation)
			}
			continue
		}
		var why string
		switch {
		case s.stateErr != nil:
			in.Verdict, why = Diverged, s.stateErr.Error()
		case base == nil && r.line.lost != nil:
			in.Verdict, why = Diverged, r.line.lost.Error()
		default:
			in.Verdict, why = r.standing(s, from)
			if s.res.Err != nil {
				continue
			}
		}
		err := in.Verdict.refuse(why, r.src.Name(), s.t.Name)
		if err != nil && r.opt.Force {
			r.log.Warn("forced", "target", s.t.Name, "overruled", err.Error())
			in.Forced = true
			over = max(over, in.Generation)
			err = nil
		}
		if err != nil {
			s.fail(fmt.Errorf("cannot sync %s: %w", s.t.Name, err))
		}
	}
	if over >= now.Generation {
		// The winner's generation must come after what it replaces, and be another one.
		if now == base {
			now = base.next(digest, r.sel)
		}
		now.Generation = over + 1
	}
	r.line.now = now
	left := 0
	for _, s := range read {
		if s.res.Lineage.Source = now.Generation; base != nil {
			s.res.Lineage.Base = base.Generation
		}
		if s.res.Err != nil {
			continue
		}
		if !r.opt.Force && s.res.Lineage.Verdict == Equal && s.apart(base, now) {
			// Told of the source's generation it would forget its own, which other members may be at.
			r.log.Warn("the target has the source's tree, but is at a generation that the source does not know; it keeps that",
				"target", s.t.Name, "generation", s.state.Generation)
			continue
		}
		left++
		if s.same && !r.notes(s, from, now) {
			continue
		}
		if s.res.Err != nil {
			continue
		}
		rec := *now
		if rec.Rest, err = r.rest(r.view(s), s.state, s.gone, !s.res.Lineage.Forced); err != nil {
			s.fail(fmt.Errorf("cannot read %s: %w", s.t.Name, err))
			continue
		}
		rec.Source, rec.Own, rec.Updated = r.line.fp, noFingerprint, r.now().Unix()
		if err := rec.readable(); err != nil {
			s.fail(fmt.Errorf("cannot note generation %d on %s: %w", rec.Generation, s.t.Name, err))
			continue
		}
		s.record = &rec
	}
	r.line.save = left > 0 && (r.line.state == nil || !r.line.state.same(now))
	return nil
}

// compareTarget is compareLines for a target.
func (r *run) compareTarget(s *side, src lineageSide) (Verdict, string) {
	dst, err := r.targetSide(s, src.state)
	if err != nil {
		s.fail(fmt.Errorf("cannot read %s: %w", s.t.Name, err))
		return Diverged, ""
	}
	return compareLines(src, dst)
}

// standing is compareTarget, or where a target has lost its memory, what its tree says.
func (r *run) standing(s *side, src lineageSide) (Verdict, string) {
	if s.state != nil || !s.wasMember() {
		return r.compareTarget(s, src)
	}
	known, err := r.hadTree(s, src)
	switch {
	case err != nil:
		s.fail(fmt.Errorf("cannot read %s: %w", s.t.Name, err))
	case known:
		return FastForward, ""
	}
	return Diverged, fmt.Sprintf("the target's memory is lost: by its %s it is a member, its %s is gone, and it has a tree that the source does not know", SetPath, StatePath)
}

// wasMember says whether a target has taken part in a run, by the set file that it holds itself: that comes to a member by
// a run alone, and the state with it. One that was only added has none that names it yet.
func (s *side) wasMember() bool {
	set, err := ReadSet(s.source())
	return err == nil && set != nil && set.Has(s.t.guid())
}

// hadTree says whether a target that has lost its memory is as the source is, or as it was at a generation that it knows.
func (r *run) hadTree(s *side, src lineageSide) (bool, error) {
	base := src.state
	if base == nil {
		return false, nil
	}
	sel, err := base.selection()
	if err != nil {
		return false, err
	}
	v := r.view(s)
	d, err := v.digest(sel, nil)
	if err != nil {
		return false, err
	}
	known := d == base.Digest || slices.ContainsFunc(base.Past, func(p Past) bool { return p.Digest == d })
	if !known {
		now, err := r.digest(sel)
		if err != nil || d != now {
			return false, err
		}
	}
	if base.equal(r.sel.scope()) {
		return true, nil
	}
	// Other parts than those of the last run would be overwritten too.
	return v.keeps(base)
}

// alike says whether a target differs from the source by nothing but boot counters, in all that its state speaks of.
func (r *run) alike(s *side) bool {
	if s.same {
		return true
	}
	return s.state != nil && s.state.equal(r.sel.scope()) && s.counters
}

// countsAlone says whether a change is only one of a boot counter.
func countsAlone(c Change) bool {
	dir := path.Dir(c.Path)
	return c.Op == "rename" && !c.Dir && fatdriver.Fold(path.Dir(c.From)) == fatdriver.Fold(dir) &&
		entryKey(dir, path.Base(c.From)) == entryKey(dir, path.Base(c.Path))
}

// notes says whether a target that has the tree already is told of the generation.
func (r *run) notes(s *side, src lineageSide, now *State) bool {
	switch {
	case s.stateErr != nil:
		return !errors.Is(s.stateErr, errNewerState)
	case s.state == nil:
		return true
	case s.state.same(now):
		return false
	case s.state.equal(now.Scope):
		return true
	}
	// What it remembers is about another part of the tree too, where it may be newer.
	v, _ := r.compareTarget(s, src)
	return v == FastForward
}

func (r *run) now() time.Time {
	if r.opt.Now.IsZero() {
		return time.Now()
	}
	return r.opt.Now
}

// judgeStranger guards the members of a set against a source that is in none.
func (r *run) judgeStranger(s *side) error {
	if s.same {
		return nil
	}
	var err error
	switch {
	case s.stateErr != nil:
		err = &Hint{refusal{s.stateErr}, "--force overwrites what is there"}
	case s.state != nil:
		v, why := compareLines(lineageSide{}, lineageSide{state: s.state})
		err = v.refuse(why, r.src.Name(), s.t.Name)
		s.res.Lineage = &Lineage{Verdict: v, Generation: s.state.Generation, Last: s.state.UpdatedAt(), Forced: r.opt.Force}
	case s.wasMember():
		err = Diverged.refuse(fmt.Sprintf("by its %s the target is a member of a replica set to which the source does not belong", SetPath), r.src.Name(), s.t.Name)
		s.res.Lineage = &Lineage{Verdict: Diverged, Forced: r.opt.Force}
	default:
		return nil
	}
	if r.opt.Force {
		r.log.Warn("forced", "target", s.t.Name, "overruled", err.Error())
		return nil
	}
	return err
}

// digest is the digest of a part of the source's tree.
func (r *run) digest(sel *selection) (Digest, error) {
	return r.sourceView().digest(sel, nil)
}

// between refuses a source that was left between the two transactions of a run: nobody made that tree, it only lacks what
// made room for the rest. Taken for a change, it would go to the other members as a generation of its own.
func (r *run) between(st *State, now Digest) error {
	if st.Interim == nil || now != *st.Interim || now == st.Digest {
		return nil
	}
	err := &Hint{
		refusal{fmt.Errorf("%w: %s was left between two steps of a run, and lacks what the first one removed", ErrSource, r.src.Name())},
		"replicate from another member, which is the better primary: that completes it; --force takes what is there for the whole",
	}
	if r.opt.Force {
		r.log.Warn("forced", "source", r.src.Name(), "overruled", err.Error())
		return nil
	}
	return err
}

// apart says whether a target that has the source's tree is at a generation that the source does not follow from: its
// tree was changed by hand since. base is the source's generation, now what the run makes of it.
func (s *side) apart(base, now *State) bool {
	return s.state != nil && (base == nil || s.state.Lineage == base.Lineage && !base.knows(s.state.past())) && s.state.equal(now.Scope)
}

// base is the generation that the source started from, and whether it was changed since. A target with the same tree,
// as its last run left it, may know better than the source itself: when a run was cut before the source could note it,
// or when the source was away and came to the same by another way. Then the source has gone on from the target's
// generation too.
func (r *run) base(sides []*side) (*State, bool, error) {
	of := func(st *State) (Digest, error) {
		sel, err := st.selection()
		if err != nil {
			return Digest{}, err
		}
		return r.digest(sel)
	}
	base := r.line.state
	changed := false
	if base != nil {
		d, err := of(base)
		if err != nil {
			return nil, false, err
		}
		changed = d != base.Digest
		if err := r.between(base, d); err != nil {
			return nil, false, err
		}
	}
	edited := changed // by the source's own state
	scope := r.sel.scope()
	for _, s := range sides {
		st := s.state
		if st == nil || !r.alike(s) || base != nil && (st.Lineage != base.Lineage || base.knows(st.past())) {
			continue
		}
		d, err := of(st)
		if err != nil {
			return nil, false, err
		}
		ok := d == st.Digest
		if !ok && !st.equal(scope) {
			continue // it may know of changes where this run does not look
		}
		if !ok && (base != nil && !edited || slices.ContainsFunc(st.Past, func(p Past) bool { return p.Digest == d })) {
			// Not the same was done to both by hand: this target alone was made what the source still is, or was set back
			// to what its line has left behind. Of the generations since, at which other targets may be, the source knows
			// no more for that.
			continue
		}
		if base == nil || st.knows(base.past()) {
			base, changed = st, !ok
			continue
		}
		// Two branches meet: what comes next follows from both.
		base, changed = base.merge(st), true
	}
	if base != nil && !changed {
		// Another selection is another tree, even when what was selected before is as it was.
		changed = !base.equal(scope)
	}
	return base, changed, nil
}

// targetSide says whether a target's tree is another one than its last run left there. The answer is only worked out
// where the verdict depends on it.
func (r *run) targetSide(s *side, base *State) (lineageSide, error) {
	dst := lineageSide{state: s.state}
	if s.state == nil || base == nil || s.state.Lineage != base.Lineage {
		return dst, nil
	}
	sel, err := s.state.selection()
	if err != nil {
		return dst, err
	}
	v := r.view(s)
	if dst.digest, err = v.digest(sel, nil); err != nil {
		return dst, err
	}
	interim := s.state.Interim != nil && dst.digest == *s.state.Interim
	dst.changed = dst.digest != s.state.Digest && !interim
	if s.state.equal(r.sel.scope()) {
		return dst, nil
	}
	// What other runs selected may be selected again now.
	kept, err := v.keeps(s.state)
	if !kept {
		dst.changed, dst.digest = true, Digest{}
	}
	return dst, err
}

// view is a volume or directory as its member reads it.
type view struct {
	src   Source
	texts map[string]string
	hash  func(*Item) ([32]byte, error)
	now   *selection // what the run replicates; nil where the view is not of what it would overwrite
}

// digest is that of a part of the tree. Files for which without is true are left out; it may be nil.
func (v view) digest(sel *selection, without func(*Item) bool) (Digest, error) {
	return treeDigest(v.src, sel, v.texts, without, v.hash)
}

// files says of an item whether it is a file that the selection takes.
func (s *selection) files(it *Item) bool { return !it.Dir && s.takes(it.Path) }

// keeps says whether the rest of a state is as it was. What was forgotten of it may have been changed: that matters where
// this run would overwrite it.
func (v view) keeps(st *State) (bool, error) {
	main, err := st.selection()
	for i := range st.Rest {
		if st.Rest[i].Lost {
			if v.now != nil && st.Rest[i].concerns(v.now) {
				return false, err
			}
			continue
		}
		var sel *selection
		var d Digest
		if err == nil {
			sel, err = st.Rest[i].selection()
		}
		if err == nil {
			d, err = v.digest(sel, main.files)
		}
		if err != nil || d != st.Rest[i].Digest {
			return false, err
		}
	}
	return true, err
}

// rest is what a state says of what is not selected any more. Where it was changed since, or may have been, nothing is
// known of it from then on.
func (r *run) rest(v view, st *State, gone []string, known bool) ([]Part, error) {
	if st == nil {
		return nil, nil
	}
	if st.equal(r.sel.scope()) {
		return st.Rest, nil
	}
	parts := st.left(r.sel, gone)
	for i := range parts {
		parts[i].Digest = Digest{}
		if !known || parts[i].Lost {
			continue
		}
		sel, err := parts[i].selection()
		if err == nil {
			parts[i].Digest, err = v.digest(sel, r.sel.files)
		}
		if err != nil {
			return nil, err
		}
	}
	return parts, nil
}

// sourceView is the source as the member that it is.
func (r *run) sourceView() view {
	return view{src: r.src, texts: r.texts(r.opt.SourceGUID), hash: r.hash}
}

// view is a target as the member that it is.
func (r *run) view(s *side) view {
	src := s.source()
	set := s.t.Set
	if set == nil {
		set, _ = ReadSet(src) // one that cannot be read tells no words apart
	}
	var texts map[string]string
	if guid := s.t.guid(); set != nil && guid != "" {
		texts = set.Texts(guid)
	}
	known := map[string][32]byte{} // what was found equal to a file of the source need not be read again
	for f, p := range s.match {
		if h, ok := r.hashes[s.item(f)]; ok {
			known[fatdriver.Fold(p)] = h
		}
	}
	return view{src, texts, func(it *Item) ([32]byte, error) {
		if h, ok := known[fatdriver.Fold(it.Path)]; ok {
			return h, nil
		}
		rd, err := src.Open(it)
		if err != nil {
			return [32]byte{}, err
		}
		defer rd.Close()
		return hashReader(rd, it.Size)
	}, r.sel}
}

// remember notes the generation on the source, before any target is told of it: so whatever a target claims to have,
// the source knows too.
func (r *run) remember(ctx context.Context) error {
	if r.line != nil && r.line.save && r.opt.Save == nil {
		return errors.New("internal error: nobody can note the generation on the source")
	}
	return r.note(ctx, r.opt.Save)
}

// note gives the source's state to a function that writes it, or tries to, where there is something to note. save may be
// nil: then it is only seen to that what would be written could be read again.
func (r *run) note(ctx context.Context, save func(context.Context, []byte) error) error {
	l := r.line
	if l == nil || !l.save || len(r.alive()) == 0 {
		return nil
	}
	st := *l.now
	known := false
	var err error
	if l.state != nil && !l.state.equal(l.now.Scope) {
		// What was done there and went nowhere must not be taken for what all have.
		var sel *selection
		var d Digest
		if sel, err = l.state.selection(); err == nil {
			d, err = r.digest(sel)
		}
		if known = d == l.state.Digest; known && err == nil {
			known, err = r.sourceView().keeps(l.state)
		}
	}
	if err == nil {
		st.Rest, err = r.rest(r.sourceView(), l.state, nil, known)
	}
	if err != nil {
		return fmt.Errorf("cannot note generation %d on %s: %w", st.Generation, r.src.Name(), err)
	}
	st.Source, st.Own, st.Updated = "", "", r.now().Unix()
	if err := st.readable(); err != nil {
		return fmt.Errorf("cannot note generation %d on %s: %w", st.Generation, r.src.Name(), err)
	}
	if save == nil {
		return nil
	}
	if err := save(ctx, st.Bytes()); err != nil {
		return fmt.Errorf("cannot note generation %d on %s: %w", st.Generation, r.src.Name(), err)
	}
	return nil
}

// stateFile is the file that tells the target of this run.
func (s *side) stateFile(r *run) *Item {
	if s.file == nil {
		text := s.record.Bytes()
		s.file = &Item{Name: "state", Path: StatePath, Size: int64(len(text)), data: text, Meta: r.stateMeta()}
	}
	return s.file
}

// stateMeta is what the entry of a state file says: like the journal it is not for the eyes of other systems.
func (r *run) stateMeta() fatdriver.Meta {
	return fatdriver.Meta{Attr: fatdriver.AttrHidden | fatdriver.AttrSystem, Created: r.now(), Modified: r.now(), Accessed: r.now()}
}

// ownDirWith wants our directory as it is, with another state file.
func ownDirWith(own *fatdriver.Node, it *Item) *fatdriver.Want {
	dir := fatdriver.Carry(own)
	dir.Children = slices.DeleteFunc(dir.Children, func(w *fatdriver.Want) bool { return fatdriver.Fold(w.Name) == fatdriver.Fold(it.Name) })
	dir.Children = append(dir.Children, &fatdriver.Want{Name: it.Name, Size: it.Size, Content: it, Meta: it.Meta})
	return dir
}

// withState adds the state file to what is wanted of a target. It lies beside the journal; our directory is switched as
// a whole, so that in most runs its entry lies in a sector that is committed anyway.
func (r *run) withState(s *side, points []switchPoint) []switchPoint {
	if s.record == nil {
		return points
	}
	own := lookup(s.tree.Root, stateDir)
	if own == nil || !own.IsDir() {
		return points // the journal comes first, and brings it
	}
	dir := ownDirWith(own, s.stateFile(r))
	// Somebody may have selected EFI itself: then our directory is part of what is wanted there.
	for i := range points {
		p := &points[i]
		if fatdriver.Fold(p.path) != "EFI" || p.New == nil {
			continue
		}
		for j, c := range p.New.Children {
			if c.Dir && fatdriver.Fold(c.Name) == "ESPMIRROR" {
				p.New.Children[j] = dir
				return points
			}
		}
	}
	return append(points, switchPoint{fatdriver.Anchor{Parent: own.Parent, Old: own, New: dir}, stateDir, false})
}

// stateNeed is the number of clusters that the state file takes, where withState could not add it yet.
func (s *side) stateNeed() int64 {
	if s.record == nil {
		return 0
	}
	return (int64(len(s.record.Bytes())) + s.cluster() - 1) / s.cluster()
}

// foretell carries out the plan of a target in memory, without the content of files. What comes of it must be a sound
// tree; its fingerprint goes into the state file, which is written before there is such a tree.
func (r *run) foretell(s *side) {
	if s.plan == nil || s.record == nil {
		return
	}
	if err := r.foretold(s); err != nil {
		s.fail(fmt.Errorf("cannot plan for %s: %w", s.t.Name, err))
	}
}

func (r *run) foretold(s *side) error {
	r, d, err := r.onCopy(s)
	if err != nil {
		return err
	}
	points, _, err := r.wants(d, false)
	if err != nil {
		return err
	}
	plan, err := r.steps(d, points)
	if err != nil {
		return err
	}
	if !slices.EqualFunc(plan.Blocks, s.plan.Blocks, func(a, b fatdriver.Block) bool { return a.Off == b.Off && string(a.New) == string(b.New) }) {
		return errors.New("internal error: two plans for one tree are not the same")
	}
	tx := plan.Begin()
	err = inOrder(tx.WriteDirs, tx.WriteFAT, tx.Flush,
		func() error { return r.commitAll(d, plan, tx, nil) },
		func() error { return closeTx(tx, nil) })
	if err != nil {
		return fmt.Errorf("internal error: the plan cannot be carried out: %w", err)
	}
	if err := r.scan(d); err != nil {
		return fmt.Errorf("internal error: the plan leads to a damaged tree: %w", err)
	}
	s.record.Own = r.ownPrint(s, d.tree)
	text := s.record.Bytes()
	if len(text) != len(s.file.data) {
		return errors.New("internal error: the state file changed its size")
	}
	s.file.data = text
	return nil
}
