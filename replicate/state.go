package replicate

import (
	"bytes"
	"cmp"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"path"
	"slices"
	"strings"
	"time"

	"espmirror/fatdriver"
	"espmirror/gpt"
)

// StatePath is where a member of a replica set keeps its State.
const StatePath = stateDir + "/state"

// ErrState is returned for a state file that cannot be read: it is damaged, or of a newer version.
var ErrState = errors.New("cannot read the state of the replica set")

// errNewerState is ErrState of a later version of the format.
var errNewerState = fmt.Errorf("%w: it is of a newer version", ErrState)

// stateVersion is part of the on-disk format. A reader refuses what is newer than it knows.
const stateVersion = 1

// maxState bounds the size of a state file in bytes, and maxHistory the generations that it remembers: a member that
// was away for more of them cannot be told from one that went its own way.
const (
	maxState   = 64 << 10
	maxHistory = 64
)

// maxPaths bounds the anchors, names and exclusions of a state each, and maxParts the names in one of its paths, of which FAT
// allows 260 characters: what is asked about each path of a tree must not take long. maxGeneration bounds the number of the
// generation, so that there is always a next one.
const (
	maxPaths      = 4096
	maxParts      = 32
	maxGeneration = 1 << 62
)

// Digest is the SHA-256 of a selected tree: names, kinds and contents, in a form that is the same on all members (see
// treeDigest).
type Digest [32]byte

// String returns the digest in hexadecimal.
func (d Digest) String() string { return hex.EncodeToString(d[:]) }

// MarshalText implements encoding.TextMarshaler.
func (d Digest) MarshalText() ([]byte, error) { return []byte(d.String()), nil }

// UnmarshalText implements encoding.TextUnmarshaler.
func (d *Digest) UnmarshalText(text []byte) error {
	if n, err := hex.Decode(d[:], text[:min(len(text), 2*len(d))]); err != nil || n != len(d) || len(text) != 2*len(d) {
		return fmt.Errorf("%q is not a digest", text)
	}
	return nil
}

// State is what a member of a replica set remembers of its last completed run. Clocks have no say in it: generations
// are counted, and a generation is known by its number and its digest.
type State struct {
	Version    int    `json:"espmirror"`
	Lineage    string `json:"lineage"`    // UUID of the line of generations; sets that never met have different ones
	Generation uint64 `json:"generation"` // grows by one with each new tree
	Digest     Digest `json:"digest"`     // of the selected tree at that generation
	Scope             // what the digest is about
	// Rest is what earlier runs selected and the last one did not, as this volume had it then: whether it was changed since
	// matters when it is selected again.
	Rest []Part `json:"rest,omitempty"`
	// Past are the generations before, the newest first.
	Past []Past `json:"past,omitempty"`
	// Interim is the digest of the tree between the two transactions of a run that had to make room first; nil when the
	// last run was not one of those, or is complete.
	Interim *Digest `json:"interim,omitempty"`
	// Source and Own are the fingerprints of the primary and of this volume at the end of the run; empty when not known.
	Source string `json:"source_fingerprint,omitempty"`
	Own    string `json:"own_fingerprint,omitempty"`
	// Updated is when the run ended by the clock of that moment, in seconds since 1970. It is for people and monitoring.
	Updated int64 `json:"updated"`
}

// Scope is a selection as a state file holds it, folded and sorted: what was replicated, which of it by its own name, and
// what was left out.
type Scope struct {
	Anchors []string `json:"anchors"`
	Named   []string `json:"named,omitempty"`
	Exclude []string `json:"exclude,omitempty"`
}

// Part is a part of a tree: a selection, less that of the state in which it stands.
type Part struct {
	Scope
	Digest Digest `json:"digest"` // zero: nobody knows
	// Lost is for what was forgotten, as there were too many parts: nothing is known of the anchors, and all paths are meant
	// when there are none. What is selected of it again counts as changed.
	Lost bool `json:"lost,omitempty"`
}

// scope is what a digest of the selection is about.
func (s *selection) scope() Scope {
	c := Scope{Named: slices.Collect(maps.Keys(s.byName)), Exclude: slices.Clone(s.excludes)}
	for _, a := range s.anchors {
		c.Anchors = append(c.Anchors, fatdriver.Fold(a))
	}
	slices.Sort(c.Anchors)
	slices.Sort(c.Named)
	slices.Sort(c.Exclude)
	return c
}

// selection is the part of a tree that the scope speaks of. It returns ErrState.
func (c Scope) selection() (*selection, error) {
	sel := &selection{anchors: c.Anchors, byName: map[string]bool{}, excludes: c.Exclude}
	for _, p := range c.Named {
		if err := sel.selectPath(p); err != nil {
			return nil, fmt.Errorf("%w: %w", ErrState, err)
		}
	}
	return sel, nil
}

// equal says whether two scopes speak of the same part of a tree.
func (c Scope) equal(d Scope) bool {
	return slices.Equal(c.Anchors, d.Anchors) && slices.Equal(c.Named, d.Named) && slices.Equal(c.Exclude, d.Exclude)
}

// check says what is wrong with the selection of a part. A state file lies on a FAT, where anything may have become of it,
// and its anchors are gone to without a look at the directories above: they must be what a run could have selected.
func (p *Part) check() error {
	if len(p.Anchors) == 0 && !p.Lost {
		return errors.New("it names no tree")
	}
	if n := max(len(p.Anchors), len(p.Named), len(p.Exclude)); n > maxPaths {
		return fmt.Errorf("it lists %d paths, at most %d are read", n, maxPaths)
	}
	sel := &selection{byName: map[string]bool{}}
	for _, n := range p.Named {
		if err := checkPath(n); err != nil {
			return err
		}
		if err := sel.selectPath(n); err != nil {
			return err
		}
	}
	if len(sel.opened) > maxPaths/16 {
		return fmt.Errorf("it names files in %d directories that belong to one ESP alone", len(sel.opened))
	}
	for _, x := range p.Exclude {
		if err := checkPath(x); err != nil {
			return err
		}
		if _, err := path.Match(x, ""); err != nil || x == "" {
			return fmt.Errorf("%q is not a pattern", x)
		}
	}
	anchors := map[string]bool{}
	for _, a := range p.Anchors {
		if err := checkPath(a); err != nil {
			return err
		}
		if a == "" || anchors[a] {
			return fmt.Errorf("%q is the root, or there twice", a)
		}
		anchors[a] = true
	}
	for _, a := range p.Anchors {
		above := prefixes(a)
		for _, q := range above[:len(above)-1] {
			if anchors[q] {
				return fmt.Errorf("%q lies in %q, which is listed too", a, q)
			}
			// An anchor that is itself of this kind is one that an entry refers to, and is left out like any other path.
			if sel.excluded(q) {
				return fmt.Errorf("%q lies in what belongs to one ESP alone", a)
			}
		}
	}
	return nil
}

// checkPath wants a path as scope writes it.
func checkPath(p string) error {
	if clean, err := cleanPath(p); err != nil || clean != p || fatdriver.Fold(p) != p || strings.Count(p, "/") >= maxParts {
		return fmt.Errorf("%q is not a path of a selection", p)
	}
	return nil
}

// maxRest bounds the number of parts that a state remembers, and maxLost the anchors of those that it has forgotten.
const (
	maxRest = 8
	maxLost = 64
)

// parts are all that the state speaks of.
func (s *State) parts() []Part { return append([]Part{{Scope: s.Scope}}, s.Rest...) }

// left are the parts of the state and of its rest that a selection does not have. Those in gone are no more.
func (s *State) left(sel *selection, gone []string) []Part {
	now := sel.scope()
	var out []Part
	var lost *Part
	for _, p := range s.parts() {
		same := slices.Equal(p.Exclude, now.Exclude)
		if p.Lost {
			// Its exclusions are those of all that came together in it: one that leaves out no more has it all.
			same = !slices.ContainsFunc(now.Exclude, func(x string) bool { return !slices.Contains(p.Exclude, x) })
		}
		unnamed := func(n string) bool { return !sel.byName[n] && !sel.everything() }
		all := len(p.Anchors) == 0
		p.Anchors = slices.DeleteFunc(slices.Clone(p.Anchors), func(a string) bool {
			open := slices.ContainsFunc(p.Named, func(n string) bool { return unnamed(n) && (!p.Lost || n == a || inside(n, a)) })
			return same && !open && (sel.everything() || sel.covers(a)) || slices.Contains(gone, a)
		})
		twice := slices.ContainsFunc(out, func(q Part) bool { return p.equal(q.Scope) })
		switch {
		case all && !(same && sel.everything()): // all is lost
			lost = lost.with(p)
		case len(p.Anchors) == 0 || twice && !p.Lost:
		case p.Lost || len(out) == maxRest:
			lost = lost.with(p)
		default:
			out = append(out, p)
		}
	}
	if lost != nil {
		out = append(out, *lost)
	}
	return out
}

// with is the part that stands for two that are forgotten: all that either of them may have selected. p may be nil.
func (p *Part) with(q Part) *Part {
	out := &Part{Scope: Scope{slices.Clone(q.Anchors), slices.Clone(q.Named), q.Exclude}, Lost: true}
	if p != nil {
		out.Anchors, out.Named = append(out.Anchors, p.Anchors...), append(out.Named, p.Named...)
		out.Exclude = slices.DeleteFunc(slices.Clone(q.Exclude), func(x string) bool { return !slices.Contains(p.Exclude, x) })
	}
	slices.Sort(out.Anchors)
	out.Anchors = slices.Compact(out.Anchors)
	have := &selection{}
	for _, a := range out.Anchors {
		if !have.covers(a) { // what is above it comes before it
			have.anchors = append(have.anchors, a)
		}
	}
	out.Anchors = have.anchors
	// Of the names count those without which something there would not be selected.
	slices.Sort(out.Named)
	out.Named = slices.DeleteFunc(slices.Compact(out.Named), func(n string) bool {
		return !have.covers(n) || !slices.ContainsFunc(prefixes(n), func(q string) bool { return match(ownPatterns, q) })
	})
	if len(q.Anchors) == 0 || p != nil && len(p.Anchors) == 0 || len(out.Anchors) > maxLost {
		out.Anchors, out.Named = nil, nil
	}
	return out
}

// concerns says whether a selection has something of what was forgotten.
func (p *Part) concerns(sel *selection) bool {
	return len(p.Anchors) == 0 || sel.everything() || slices.ContainsFunc(p.Anchors, func(a string) bool { return sel.touches(a) && !sel.barred(a) })
}

// Past is an earlier generation.
type Past struct {
	Generation uint64 `json:"generation"`
	Digest     Digest `json:"digest"`
}

// ParseState reads a state file. It returns ErrState.
func ParseState(text []byte) (*State, error) {
	s := &State{}
	dec := json.NewDecoder(bytes.NewReader(text))
	if err := dec.Decode(s); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrState, err)
	}
	if _, err := dec.Token(); !errors.Is(err, io.EOF) {
		return nil, fmt.Errorf("%w: there is something behind its end", ErrState)
	}
	if s.Version < 1 {
		return nil, fmt.Errorf("%w: it has no version", ErrState)
	}
	if s.Version > stateVersion {
		return nil, fmt.Errorf("%w: it has version %d, known are versions up to %d", errNewerState, s.Version, stateVersion)
	}
	if !gpt.IsGUID(s.Lineage) {
		return nil, fmt.Errorf("%w: %q is not a lineage", ErrState, s.Lineage)
	}
	if s.Generation == 0 || len(s.Anchors) == 0 {
		return nil, fmt.Errorf("%w: it names no generation or no tree", ErrState)
	}
	if s.Generation > maxGeneration {
		return nil, fmt.Errorf("%w: generation %d is more than can be counted", ErrState, s.Generation)
	}
	if len(s.Rest) > maxRest+1 { // one for all that is forgotten
		return nil, fmt.Errorf("%w: it has %d parts besides the last selection, at most %d are kept", ErrState, len(s.Rest), maxRest+1)
	}
	for _, p := range s.parts() {
		if err := p.check(); err != nil {
			return nil, fmt.Errorf("%w: %w", ErrState, err)
		}
	}
	if len(s.Past) > maxHistory {
		s.Past = s.Past[:maxHistory]
	}
	return s, nil
}

// Bytes is the state file.
func (s *State) Bytes() []byte {
	text, err := json.MarshalIndent(s, "", " ")
	if err != nil {
		panic("internal error: " + err.Error()) // strings and numbers only
	}
	return append(text, '\n')
}

// readable says why the state could not be read back, before it is written. A state that its own program refuses would
// make the member a stranger to its set.
func (s *State) readable() error {
	long := *s
	if long.Interim == nil {
		long.Interim = &Digest{} // a run that makes room adds it
	}
	if n := len(long.Bytes()); n > maxState {
		return &Hint{
			refusal{fmt.Errorf("%s would have %d bytes, at most %d are read", StatePath, n, maxState)},
			"select or exclude fewer paths: the directories that hold them, or a pattern",
		}
	}
	if _, err := ParseState(s.Bytes()); err != nil {
		return refusal{fmt.Errorf("%s could not be read again: %w", StatePath, err)}
	}
	return nil
}

// UpdatedAt is when the last run ended.
func (s *State) UpdatedAt() time.Time { return time.Unix(s.Updated, 0) }

// is says whether the state's generation is the given one.
func (s *State) is(p Past) bool { return s.Generation == p.Generation && s.Digest == p.Digest }

// knows says whether the state's generation, or one before it, is the given one.
func (s *State) knows(p Past) bool { return s.is(p) || slices.Contains(s.Past, p) }

// past is the state's generation as a later one remembers it.
func (s *State) past() Past { return Past{s.Generation, s.Digest} }

// same says whether two states are of one generation, and speak of the same part of the tree.
func (s *State) same(t *State) bool {
	return s.Lineage == t.Lineage && s.is(t.past()) && s.equal(t.Scope)
}

// next is the state of the generation after s. s may be nil: then a new lineage begins.
func (s *State) next(d Digest, sel *selection) *State {
	n := &State{Version: stateVersion, Generation: 1, Digest: d, Scope: sel.scope()}
	if s == nil {
		n.Lineage = gpt.NewGUID()
	} else {
		n.Lineage, n.Generation = s.Lineage, s.Generation+1
		n.Past = append([]Past{s.past()}, s.Past...)
		n.Past = n.Past[:min(len(n.Past), maxHistory)]
	}
	return n
}

// merge is the later one of two states with the history of both.
func (s *State) merge(t *State) *State {
	if t.Generation > s.Generation {
		s, t = t, s
	}
	m := *s
	m.Past = slices.Clone(s.Past)
	for _, p := range append([]Past{t.past()}, t.Past...) {
		if !s.knows(p) {
			m.Past = append(m.Past, p)
		}
	}
	slices.SortStableFunc(m.Past, func(a, b Past) int { return cmp.Compare(b.Generation, a.Generation) })
	m.Past = m.Past[:min(len(m.Past), maxHistory)]
	return &m
}

// ReadState reads the state of a volume or directory; src may be nil. nil without an error means that it has none. It
// returns ErrState.
func ReadState(src Source) (*State, error) {
	if src == nil {
		return nil, nil
	}
	it := src.Root().lookup(StatePath)
	if it == nil {
		return nil, nil
	}
	if it.Dir || it.Size > maxState {
		return nil, fmt.Errorf("%w: %s of %s is no state file", ErrState, StatePath, src.Name())
	}
	text, err := readItem(src, it)
	if err != nil {
		return nil, err
	}
	s, err := ParseState(text)
	if err != nil {
		return nil, fmt.Errorf("%s of %s: %w", StatePath, src.Name(), err)
	}
	return s, nil
}

// readItem reads a small file whole.
func readItem(src Source, it *Item) ([]byte, error) {
	if it.data != nil {
		return it.data, nil
	}
	r, err := src.Open(it)
	if err != nil {
		return nil, fmt.Errorf("%w: cannot read %s: %w", ErrSource, it.Path, err)
	}
	defer r.Close()
	text := make([]byte, it.Size)
	if _, err := io.ReadFull(r, text); err != nil {
		return nil, fmt.Errorf("%w: cannot read %s: %w", ErrSource, it.Path, shrunk(err))
	}
	return text, nil
}
