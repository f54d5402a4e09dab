package journal

import (
	"crypto/sha256"
	"fmt"
)

// Action is what recovery has to do about a record.
type Action int

const (
	// Nothing is to be done: no record is pending.
	Nothing Action = iota

	// RollBack means that no block is new: the old tree stands. Release what is in Alloc and not in use, then Done.
	RollBack

	// RollForward means that the blocks before From are new and those from From on are old: write those, in order, each
	// with Advance before it, once the content that they lead to has been checked against Status.Digest.
	RollForward

	// Finish means that every block is new: release what is in Free and not in use, then Done.
	Finish

	// Stale means that somebody else has written since, or that more is damaged than one cut can explain: the volume is
	// to be left as it is, and planned for afresh.
	Stale
)

// String returns the action in lower case, for reports.
func (a Action) String() string {
	switch a {
	case Nothing:
		return "nothing to do"
	case RollBack:
		return "roll back"
	case RollForward:
		return "roll forward"
	case Finish:
		return "finish"
	case Stale:
		return "stale"
	}
	return fmt.Sprintf("action %d", int(a))
}

// Decision is the outcome of Decide.
type Decision struct {
	Action Action
	From   int // number of blocks that are new; the first one to write when rolling forward

	// Damaged says that the place of block From holds neither image, but what a cut in the middle of writing it leaves.
	// When rolling forward it is written like any other. When rolling back its OldImage is written, and flushed, first.
	Damaged bool

	// Reason says what is wrong, with the offset, when the action is Stale or Damaged is set.
	Reason string
}

// spot is one place that blocks of the record write, with its images in order: the old one of the first block there,
// then the new one of each.
type spot struct {
	off    int64
	sums   [][32]byte
	got    []byte
	err    error  // of reading it
	match  []bool // which of the images it holds; several when an image comes back
	known  bool   // it holds one at least
	blocks []int
}

// Decide says what is to be done about the pending record r, whose status is st, from what the places of its blocks
// hold now. It decides and does no more: read returns n bytes at a byte offset inside the volume, from the medium.
//
// The blocks are written in order with a flush after each, so there is a number p such that the blocks before p are new
// and all others old; p = 0 rolls back, p = all finishes, in between it rolls forward. If the places fit no p, it is Stale.
// The state does not override what the volume says: it may be a step behind when a header was damaged. It is asked in two
// cases only. If the places fit several p, because an image comes back (A, B, A again), p is the one that the state
// allows: the index or one more when Committing, none or a single block when Prepared; Stale if that is not among them.
// And it tells which block was in flight, if one place holds what is not an image of it.
//
// That one place is taken for damaged by the cut, rather than overwritten by somebody else, if it is the one in flight,
// every other place fits, and it cannot be read, or consists of bytes of the image before and the image after, or
// plausible, which may be nil, says that it is not what anybody would write. In flight is the block at the index when
// Committing. A record of several blocks that is Prepared has none in flight, because Advance comes, flushed, before the
// first. One of a single block has: it needs no Advance. When Committing, the build was flushed and its digest is known,
// so it rolls forward from that block. When Prepared with a single block, damage suggests that the commit was under way,
// and so the build flushed, but does not prove it: the build may have written into the same physical sector. So it rolls
// back if OldImage is there to write, as the old tree is whole until the commit is stable. Otherwise the new image is the
// only one there is, and it rolls forward; there is no digest, so the caller should walk the new tree first.
//
// So is that place when it holds an image of its own, but an older one than all others allow, and not plausible: zeros may
// be both what was there before the record and what the cut left.
//
// It returns ErrRecord when r is malformed or not the record of st. read's errors are part of the decision.
func Decide(r *Record, st Status, read func(off int64, n int) ([]byte, error), plausible func(img []byte) bool) (Decision, error) {
	if st.State == Idle {
		return Decision{Action: Nothing}, nil
	}
	if r == nil {
		return Decision{Action: Stale, Reason: "the record is lost"}, nil
	}
	if err := r.check(); err != nil {
		return Decision{}, fmt.Errorf("cannot decide on recovery: %w", err)
	}
	n := len(r.Blocks)
	if r.ID != st.ID || n != st.Blocks || (st.State != Prepared && st.State != Committing) || st.Index < 0 || st.Index >= n {
		return Decision{}, fmt.Errorf("cannot decide on recovery: %w: transaction %x with %d blocks, status %v at %d of %d of %x",
			ErrRecord, r.ID, n, st.State, st.Index, st.Blocks, st.ID)
	}

	spots, spotOf := spotsOf(r)
	var odd []*spot
	for _, s := range spots {
		size := len(r.Blocks[s.blocks[0]].New)
		s.got, s.err = read(s.off, size)
		if s.err == nil && len(s.got) != size {
			s.err = fmt.Errorf("0x%x bytes, expected 0x%x", len(s.got), size)
		}
		s.match = make([]bool, len(s.sums))
		if s.err == nil {
			sum := sha256.Sum256(s.got)
			for i := range s.sums {
				s.match[i] = s.sums[i] == sum
				s.known = s.known || s.match[i]
			}
		}
		if !s.known {
			odd = append(odd, s)
		}
	}
	switch len(odd) {
	case 0:
		return decidePrefix(spots, spotOf, st, plausible), nil
	case 1:
		return decideDamage(r, st, spots, spotOf, odd[0], plausible), nil
	}
	return Decision{Action: Stale, Reason: odd[0].complaint() + "; " + odd[1].complaint()}, nil
}

// spotsOf returns the places of r, and for each block the one it writes.
func spotsOf(r *Record) (spots, spotOf []*spot) {
	at := make(map[int64]*spot, len(r.Blocks))
	for i := range r.Blocks {
		b := &r.Blocks[i]
		s := at[b.Off]
		if s == nil {
			s = &spot{off: b.Off, sums: [][32]byte{b.Old}}
			at[b.Off] = s
			spots = append(spots, s)
		}
		s.sums = append(s.sums, sha256.Sum256(b.New))
		s.blocks = append(s.blocks, i)
		spotOf = append(spotOf, s)
	}
	return spots, spotOf
}

// fits reports whether s holds the image that it has when the first p blocks are new.
func (s *spot) fits(p int) bool {
	i := 0
	for i < len(s.blocks) && s.blocks[i] < p {
		i++
	}
	return s.match[i]
}

func (s *spot) complaint() string {
	if s.err != nil {
		return fmt.Sprintf("cannot read block at offset 0x%x: %v", s.off, s.err)
	}
	return fmt.Sprintf("block at offset 0x%x holds neither its old nor its new image", s.off)
}

// decidePrefix decides when every place holds an image of its own.
func decidePrefix(spots, spotOf []*spot, st Status, plausible func([]byte) bool) Decision {
	n := len(spotOf)
	possible := make([]bool, n+1)
	for p := range possible {
		possible[p] = true
	}
	left := n + 1
	for _, s := range spots {
		i := 0
		for p := range possible {
			if i < len(s.blocks) && s.blocks[i] < p {
				i++
			}
			if possible[p] && !s.match[i] {
				possible[p] = false
				left--
			}
		}
		if left == 0 {
			if d, ok := decideOlder(spots, spotOf, st, plausible); ok {
				return d
			}
			return Decision{Action: Stale, Reason: fmt.Sprintf("block at offset 0x%x holds an image that does not go with those of the blocks before it", s.off)}
		}
	}
	if left > 1 {
		lo, hi := 0, 0
		if st.State == Committing {
			lo, hi = st.Index, st.Index+1
		} else if n == 1 {
			hi = 1
		}
		// Of two neighbours only one is possible, as no block has the same image before and after.
		for p := range possible {
			if possible[p] && (p < lo || p > hi) {
				possible[p] = false
				left--
			}
		}
		if left == 0 {
			return Decision{Action: Stale, Reason: fmt.Sprintf("blocks at offset 0x%x and on fit several states, none of which is %v at block %d", spots[0].off, st.State, st.Index)}
		}
	}
	p := 0
	for !possible[p] {
		p++
	}
	switch p {
	case 0:
		return Decision{Action: RollBack}
	case n:
		return Decision{Action: Finish, From: n}
	}
	return Decision{Action: RollForward, From: p}
}

// decideOlder decides when the images fit no state, but would if the place that was being written held what it did before
// that block: an older image of a place that is written several times may be zeros, and so may be what a cut leaves.
// An older one that anybody would write is somebody's backup.
func decideOlder(spots, spotOf []*spot, st Status, plausible func([]byte) bool) (Decision, bool) {
	if st.State != Committing {
		return Decision{}, false
	}
	flight := spotOf[st.Index]
	older := false
	for i, k := range flight.blocks {
		older = older || k < st.Index && flight.match[i]
	}
	if !older || plausible == nil || plausible(flight.got) {
		return Decision{}, false
	}
	for _, s := range spots {
		if s != flight && !s.fits(st.Index) {
			return Decision{}, false
		}
	}
	return Decision{Action: RollForward, From: st.Index, Damaged: true,
		Reason: fmt.Sprintf("block at offset 0x%x holds an older image than the one before it was written", flight.off)}, true
}

// decideDamage decides when exactly one place, s, holds no image of its own.
func decideDamage(r *Record, st Status, spots, spotOf []*spot, s *spot, plausible func([]byte) bool) Decision {
	k := st.Index
	if st.State == Prepared && len(r.Blocks) > 1 {
		return Decision{Action: Stale, Reason: s.complaint() + ", and no block was being written"}
	}
	if spotOf[k] != s {
		return Decision{Action: Stale, Reason: fmt.Sprintf("%s, and it is not the one that was being written, at 0x%x", s.complaint(), spotOf[k].off)}
	}
	for _, o := range spots {
		if o != s && !o.fits(k) {
			return Decision{Action: Stale, Reason: fmt.Sprintf("%s, and the block at offset 0x%x does not fit block %d being written", s.complaint(), o.off, k)}
		}
	}
	d := Decision{Action: RollForward, From: k, Damaged: true}
	old := oldImage(r, k)
	switch {
	case s.err != nil:
		d.Reason = s.complaint()
	case old != nil && mixture(s.got, old, r.Blocks[k].New):
		d.Reason = fmt.Sprintf("block at offset 0x%x is torn between its old and its new image", s.off)
	case plausible != nil && !plausible(s.got):
		d.Reason = fmt.Sprintf("block at offset 0x%x holds garbage", s.off)
	default:
		return Decision{Action: Stale, Reason: s.complaint()}
	}
	if st.State == Prepared && old != nil {
		d.Action = RollBack
	}
	return d
}

// oldImage returns the image that block k replaces, or nil if the record does not have it.
func oldImage(r *Record, k int) []byte {
	for i := k - 1; i >= 0; i-- {
		if r.Blocks[i].Off == r.Blocks[k].Off {
			return r.Blocks[i].New
		}
	}
	return r.Blocks[k].OldImage
}

// mixture reports whether every byte of got is that of a or of b.
func mixture(got, a, b []byte) bool {
	for i := range got {
		if got[i] != a[i] && got[i] != b[i] {
			return false
		}
	}
	return true
}
