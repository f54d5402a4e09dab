package replicate

import (
	"errors"
	"fmt"
	"slices"
)

var (
	// ErrStaleSource is returned for a target that is newer than the source. It is ErrRefused too.
	ErrStaleSource = errors.New("the source is older than the target")

	// ErrDiverged is returned when source and target were changed independently of each other. It is ErrRefused too.
	ErrDiverged = errors.New("source and target have diverged")
)

// Verdict is what the generations of source and target say about copying one over the other.
type Verdict string

// The verdicts. Only the first three let a run go on without being forced.
const (
	Equal       Verdict = "equal"        // the trees are the same, whatever the generations
	FastForward Verdict = "fast-forward" // the target is as a run left it, and the source has gone on from there
	FirstSync   Verdict = "first sync"   // the target was never part of a set
	StaleSource Verdict = "stale source" // the target has gone on from where the source is
	Diverged    Verdict = "diverged"     // both have gone on, or they have nothing in common
)

// lineageSide is what the verdict needs of one side.
type lineageSide struct {
	state   *State
	changed bool   // the tree is not the one that the state describes
	digest  Digest // of the tree, where it was changed
}

// came says whether a side that was changed since the generation of its state is as the other one was at a later one: the
// same was done to both, here by hand.
func (s lineageSide) came(other *State) bool {
	return s.changed && slices.ContainsFunc(append([]Past{other.past()}, other.Past...), func(p Past) bool {
		return p.Generation > s.state.Generation && p.Digest == s.digest
	})
}

// compareLines compares the lineage of source and target whose trees differ. The bases, the generations that the two sides
// were at when a run last ended, say who has gone on from whom; the trees say who was changed since.
//
//	            neither   source    target    both changed
//	same base   (equal)   forward   stale     diverged
//	source on   forward   forward   diverged  diverged
//	target on   stale     diverged  stale     diverged
//	unrelated   diverged  diverged  diverged  diverged
func compareLines(src, dst lineageSide) (Verdict, string) {
	s, t := src.state, dst.state
	switch {
	case t == nil:
		return FirstSync, ""
	case s == nil:
		return Diverged, fmt.Sprintf("the target is at generation %d of a replica set to which the source does not belong", t.Generation)
	case s.Lineage != t.Lineage:
		return Diverged, "they belong to different replica sets"
	}
	switch {
	case s.is(t.past()):
		switch {
		case !dst.changed:
			return FastForward, ""
		case !src.changed:
			return StaleSource, fmt.Sprintf("the target was changed since both were at generation %d, the source was not", s.Generation)
		}
		return Diverged, fmt.Sprintf("both were changed since generation %d", s.Generation)
	case s.knows(t.past()):
		if !dst.changed || dst.came(s) {
			return FastForward, ""
		}
		return Diverged, fmt.Sprintf("the source went on to generation %d, and the target was changed since generation %d", s.Generation, t.Generation)
	case t.knows(s.past()):
		if !src.changed || src.came(t) {
			return StaleSource, fmt.Sprintf("the target is at generation %d, the source still at %d", t.Generation, s.Generation)
		}
		return Diverged, fmt.Sprintf("the target went on to generation %d, and the source was changed since generation %d", t.Generation, s.Generation)
	}
	return Diverged, fmt.Sprintf("the source's generation %d and the target's generation %d do not follow from each other", s.Generation, t.Generation)
}

// refuse is the error of a verdict that stops the run for a target; nil when it may go on. source and target are what a
// command line calls them, mount is where the source is mounted.
func (v Verdict) refuse(why, source, mount, target string) error {
	first := ""
	if mount != "" {
		first = "unmount " + mount + " and " // a target must not be mounted
	}
	switch v {
	case StaleSource:
		return &Hint{
			refusal{fmt.Errorf("%w: %s", ErrStaleSource, why)},
			fmt.Sprintf("%sreplicate the other way: `espmirror sync --primary %s --target %s`, or boot from %s; --force overwrites it all the same", first, target, source, target),
		}
	case Diverged:
		return &Hint{
			refusal{fmt.Errorf("%w: %s", ErrDiverged, why)},
			fmt.Sprintf("look at both, choose, and name the winner: `espmirror sync --force --primary %s --target %s` keeps what %s has, the other way round what %s has", source, target, source, target),
		}
	}
	return nil
}
