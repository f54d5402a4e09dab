package replicate

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"os"
	"path"
	"regexp"
	"slices"
	"sort"
	"strconv"
	"strings"
	"sync"
	"testing"

	"espmirror/blockdev"
	"espmirror/fixtures"
)

// A walk through the life of a replica set, judged by a model that knows nothing of generations, digests and state files.
// It says of each member which edits its tree knows of, and which trees it has gone through. The law:
//
//   - A run that is not forced never overwrites a tree that is new to the source: one with an edit that the source does
//     not know of, and that the source has never been like.
//   - It brings the source's tree to a target all of whose edits the source knows of.
//   - Trees that are alike are in sync, and know the same from then on.
//   - Otherwise it is refused: as stale where the target knows all that the source does, else as diverged.

// power is the supply of all devices of a run: after some operations it fails.
type power struct {
	mu   sync.Mutex
	left int // operations until the cut; negative: there is none
	cut  bool
}

var errPower = errors.New("the power is off")

// use takes one operation.
func (p *power) use() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.left == 0 {
		p.cut = true
	}
	if p.cut {
		return errPower
	}
	p.left--
	return nil
}

// powered is a device that loses writes which were not flushed when the power fails.
type powered struct {
	*blockdev.Mem
	p    *power
	mu   sync.Mutex
	open map[int64][][]byte // versions of the sectors written since the last flush, the first being the durable one
}

func newPowered(m *blockdev.Mem, p *power) *powered {
	return &powered{Mem: m, p: p, open: map[int64][][]byte{}}
}

func (d *powered) WriteAt(b []byte, off int64) (int, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	ss := int64(d.SectorSize())
	if off%ss != 0 || int64(len(b))%ss != 0 {
		return 0, fmt.Errorf("unaligned write of %d bytes at %d", len(b), off)
	}
	cut := d.p.use()
	for at := off; at < off+int64(len(b)); at += ss {
		if d.open[at] == nil {
			d.open[at] = [][]byte{bytes.Clone(d.Bytes()[at : at+ss])}
		}
		d.open[at] = append(d.open[at], bytes.Clone(b[at-off:][:ss])) // some of the last write may get through
	}
	if cut != nil {
		return 0, cut
	}
	return d.Mem.WriteAt(b, off)
}

func (d *powered) Flush() error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if err := d.p.use(); err != nil {
		return err
	}
	clear(d.open)
	return nil
}

func (d *powered) ReadAt(b []byte, off int64) (int, error) {
	d.p.mu.Lock()
	cut := d.p.cut
	d.p.mu.Unlock()
	if cut {
		return 0, errPower
	}
	return d.Mem.ReadAt(b, off)
}

// settle leaves of what was not flushed what the medium got.
func (d *powered) settle(rng *rand.Rand) {
	sectors := slices.Sorted(maps.Keys(d.open))
	all := rng.IntN(4) == 0
	for _, at := range sectors {
		v := d.open[at]
		k := rng.IntN(len(v))
		if all {
			k = len(v) - 1
		}
		copy(d.Bytes()[at:], v[k])
	}
	clear(d.open)
}

// modelMember is a member with what the model knows of it.
type modelMember struct {
	*aMember
	g       geometry
	present bool
	member  bool              // it has taken part in a run
	tree    map[string]string // path without boot counter → content
	own     map[string]string // what is not selected
	know    map[int]bool      // edits
	runs    map[int]bool      // of these, those that were made here or came by a run, not by hand
	seen    map[string]bool   // trees
	gen     uint64            // what its state file said
}

func hashTree(tree map[string]string) string { return fmt.Sprint(tree) }

func (m *modelMember) learn(x *modelMember) {
	maps.Copy(m.know, x.know)
	maps.Copy(m.runs, x.runs)
	maps.Copy(m.seen, x.seen)
}

func within(a, b map[int]bool) bool {
	for k := range a {
		if !b[k] {
			return false
		}
	}
	return true
}

var counterPattern = regexp.MustCompile(`(?i)\+[0-9]+(-[0-9]+)?(\.(conf|efi))$`)

// canonicalPath is a path without its boot counter.
func canonicalPath(p string) string {
	if d := strings.ToLower(path.Dir(p)); d == "efi/linux" || d == "loader/entries" {
		return counterPattern.ReplaceAllString(p, "$2")
	}
	return p
}

// walk is the world of one run of the test.
type walk struct {
	t       *testing.T
	rng     *rand.Rand
	seed    uint64
	members []*modelMember
	primary *modelMember
	edits   int
	lineage string
	trace   []string
	stats   map[string]int
}

func (w *walk) logf(format string, a ...any) {
	w.trace = append(w.trace, fmt.Sprintf(format, a...))
}

func (w *walk) fatalf(format string, a ...any) {
	w.t.Helper()
	last := w.trace[max(0, len(w.trace)-30):]
	w.t.Fatalf("ESPMIRROR_SEED=%d, step %d: %s\n%s", w.seed, len(w.trace), fmt.Sprintf(format, a...), strings.Join(last, "\n"))
}

const token = "0123456789abcdef0123456789abcdef"

func (w *walk) pe(id int) string {
	return fixtures.Program(strings.Repeat(fmt.Sprintf(" edit %d", id), 20+w.rng.IntN(150)))
}

// somebodyEdits changes the tree of a member as its system does, or the firmware, or a rescue system.
func (w *walk) somebodyEdits(m *modelMember) {
	w.edits++
	id := w.edits
	tree := maps.Clone(m.tree)
	var ukis, kernels []string
	for p := range tree {
		switch {
		case strings.HasPrefix(p, "EFI/Linux/"):
			ukis = append(ukis, p)
		case strings.HasPrefix(p, "loader/entries/"):
			kernels = append(kernels, strings.TrimSuffix(path.Base(p), ".conf"))
		}
	}
	sort.Strings(ukis)
	sort.Strings(kernels)
	var what string
	kind := w.rng.IntN(7)
	switch {
	case kind <= 1 && len(ukis) < 6 || kind == 2 && len(ukis) == 0:
		p := fmt.Sprintf("EFI/Linux/uki %d.efi", id)
		tree[p], what = w.pe(id), "adds "+p
	case kind == 2:
		p := ukis[w.rng.IntN(len(ukis))]
		tree[p], what = w.pe(id), "replaces "+p
	case kind == 3 && len(ukis) > 0:
		p := ukis[w.rng.IntN(len(ukis))]
		delete(tree, p)
		what = "deletes " + p
	case kind == 4 && len(ukis) > 0:
		p, q := ukis[w.rng.IntN(len(ukis))], fmt.Sprintf("EFI/Linux/new name %d.efi", id)
		tree[q], what = tree[p], "renames "+p
		delete(tree, p)
	case kind == 5 && len(kernels) > 1:
		v := kernels[w.rng.IntN(len(kernels))]
		delete(tree, "loader/entries/"+v+".conf")
		delete(tree, token+"/"+v+"/linux")
		what = "removes kernel " + v
	case kind == 5 || kind == 6 && len(kernels) < 4:
		v := fmt.Sprint(id)
		tree["loader/entries/"+v+".conf"] = "title " + v + "\nlinux /" + token + "/" + v + "/linux\n"
		tree[token+"/"+v+"/linux"] = w.pe(id)
		what = "adds kernel " + v
	default:
		tree["loader/loader.conf"] = fmt.Sprintf("timeout %d\n", id)
		what = "edits loader.conf"
	}
	w.logf("%s %s (edit %d)", m.name, what, id)
	w.become(m, tree)
	m.know[id], m.runs[id] = true, true
}

// become gives a member another tree, by an editor that is not ours.
func (w *walk) become(m *modelMember, tree map[string]string) {
	w.recovers(m)
	changes := map[string]*string{}
	have := m.files(w.t)
	for p, c := range tree {
		if old, ok := m.tree[p]; !ok || old != c {
			name := p
			for q := range have {
				if canonicalPath(q) == p {
					name = q
				}
			}
			if !ok && strings.HasPrefix(p, "EFI/Linux/uki") && w.rng.IntN(2) == 0 {
				name = strings.TrimSuffix(p, ".efi") + "+3-0.efi"
			}
			changes[name] = &c
		}
	}
	for p := range have {
		if _, ok := tree[canonicalPath(p)]; !ok && m.own[p] == "" {
			changes[p] = nil
		}
	}
	m.edit(w.t, changes)
	m.tree = tree
	m.seen[hashTree(tree)] = true
	w.check(m)
}

// boots has a boot loader count a boot, or a system bless an entry.
func (w *walk) boots(m *modelMember) {
	w.recovers(m)
	for _, p := range slices.Sorted(maps.Keys(m.files(w.t))) {
		at := strings.LastIndexByte(p, '+')
		if at < 0 || canonicalPath(p) == p || w.rng.IntN(2) == 0 {
			continue
		}
		left, _ := strconv.Atoi(p[at+1 : at+2])
		name := path.Base(canonicalPath(p))
		if left > 0 && w.rng.IntN(3) > 0 {
			name = fmt.Sprintf("%s+%d-%d.efi", strings.TrimSuffix(name, ".efi"), left-1, 3-left+1)
		}
		w.logf("%s: %s becomes %s", m.name, p, name)
		m.edit(w.t, map[string]*string{p: ptr("→" + name)})
	}
	w.check(m)
}

// check reads a member with a reader that is not ours.
func (w *walk) check(m *modelMember) {
	w.t.Helper()
	tree, own := map[string]string{}, map[string]string{}
	pending, err := Pending(m.target())
	if err != nil {
		w.fatalf("%s: %v", m.name, err)
	}
	for n := range m.g.fats {
		if pending && n > 0 {
			break
		}
		var have map[string]string
		st, err := (&fixtures.Trees{}).Read(m.dev, n, pending)
		if err == nil {
			have, err = readFiles(m.dev, n)
		}
		if err != nil {
			w.fatalf("%s, FAT copy %d: %v", m.name, n, err)
		}
		if !pending {
			a, err := st.Audit()
			if err != nil || len(a.Lost) > 0 || len(a.Illegal) > 0 {
				w.fatalf("%s: lost %v, illegal %v, %v", m.name, a.Lost, a.Illegal, err)
			}
			if _, err := st.CheckFSInfo(false); err != nil {
				w.fatalf("%s: %v", m.name, err)
			}
			if d, err := st.Dangling(); err != nil || len(d) > 0 {
				w.fatalf("%s: %v %v", m.name, d, err)
			}
		}
		clear(tree)
		clear(own)
		for p, c := range have {
			switch k := canonicalPath(p); {
			case fixtures.Ours(p):
			case m.own[p] != "":
				own[p] = c
			default:
				if _, twice := tree[k]; twice {
					w.fatalf("%s: %s is there twice", m.name, k)
				}
				tree[k] = c
			}
		}
		if !maps.Equal(own, m.own) {
			w.fatalf("%s: what is not selected was touched: %q", m.name, own)
		}
		if !pending && !maps.Equal(tree, m.tree) {
			w.fatalf("%s, FAT copy %d: the tree is %v, the model has %v", m.name, n, slices.Sorted(maps.Keys(tree)), slices.Sorted(maps.Keys(m.tree)))
		}
	}
}

// remembers reads the generation of a member.
func (w *walk) remembers(m *modelMember, forced bool) {
	w.t.Helper()
	st := m.state(w.t)
	if st == nil {
		if m.gen > 0 {
			w.fatalf("%s lost its state", m.name)
		}
		return
	}
	if w.lineage == "" {
		w.lineage = st.Lineage
	}
	if st.Lineage != w.lineage {
		w.fatalf("%s belongs to another lineage, %+v", m.name, st)
	}
	if st.Generation < m.gen && !forced {
		w.fatalf("%s went from generation %d back to %d", m.name, m.gen, st.Generation)
	}
	for _, p := range st.Past {
		if p.Generation >= st.Generation {
			w.fatalf("%s is at generation %d, and remembers %d as an earlier one", m.name, st.Generation, p.Generation)
		}
	}
	m.gen = st.Generation
}

// outcome is what a run must make of a target, by the model.
type modelVerdict string

const (
	mustSync  modelVerdict = "sync"    // the source knows all that the target does
	mayBoth   modelVerdict = "either"  // the source has been as the target is, by another way
	byHand    modelVerdict = "by hand" // the source knows, because somebody copied the tree: a run need not see that
	alike     modelVerdict = "in sync" // nothing can be lost
	mustStale modelVerdict = "stale"
	mustPart  modelVerdict = "diverged"
)

func (w *walk) verdict(s, t *modelMember) modelVerdict {
	switch {
	case maps.Equal(s.tree, t.tree):
		return alike
	case !t.member, within(t.know, s.runs):
		return mustSync
	case within(t.know, s.know):
		return byHand
	case s.seen[hashTree(t.tree)]:
		return mayBoth
	case within(s.know, t.know):
		return mustStale
	}
	return mustPart
}

// recovers has a member tidied up.
func (w *walk) recovers(m *modelMember) {
	if _, err := Recover(context.Background(), m.target(), RecoverOptions{}); err != nil {
		w.fatalf("cannot recover %s: %v", m.name, err)
	}
	w.check(m)
}

// sync runs from the primary to all that are there, and holds what comes of it against the model.
func (w *walk) sync() {
	w.t.Helper()
	s := w.primary
	var to []*modelMember
	for _, m := range w.members {
		if m != s && m.present {
			to = append(to, m)
		}
	}
	w.rng.Shuffle(len(to), func(i, j int) { to[i], to[j] = to[j], to[i] })
	if len(to) == 0 {
		return
	}
	o := Options{Force: w.rng.IntN(16) == 0, Fingerprint: w.rng.IntN(3) == 0}
	pw := &power{left: -1}
	if w.rng.IntN(4) == 0 {
		pw.left = w.rng.IntN(20 + 25*len(to))
	}
	var names []string
	all := append([]*modelMember{s}, to...)
	for _, m := range all {
		m.via = newPowered(m.dev, pw)
		names = append(names, m.name)
	}
	w.logf("sync %s, force %v, fingerprint %v, power for %d", strings.Join(names, " "), o.Force, o.Fingerprint, pw.left)
	noted := false
	o = s.options(o)
	o.Save = func(ctx context.Context, state []byte) error {
		err := s.saveState(ctx, state)
		noted = noted || err == nil
		return err
	}
	if pending, _ := Pending(s.target()); pending && w.rng.IntN(2) == 0 {
		// Half a tree is no source.
		_, err := s.sync(w.t, o, members(to)...)
		if !errors.Is(err, ErrNeedsRecovery) && !pw.cut {
			w.fatalf("%s needs recovery, and a sync from it says %v", s.name, err)
		}
		w.stats["source that needs recovery"]++
		for _, m := range all {
			m.via = nil
		}
		return
	} else if pending {
		s.via = nil
		w.recovers(s)
		s.via = newPowered(s.dev, pw)
	}
	// First what is alike, as that makes the source know more.
	before := map[*modelMember]string{}
	for _, m := range all {
		before[m] = hashTree(m.tree)
	}
	learned := &modelMember{know: maps.Clone(s.know), seen: maps.Clone(s.seen), tree: s.tree, member: true, runs: maps.Clone(s.runs)}
	for _, m := range to {
		if maps.Equal(m.tree, s.tree) {
			learned.learn(m)
		}
	}
	res, err := s.sync(w.t, o, members(to)...)
	cut := pw.cut
	for _, m := range all {
		m.via.(*powered).settle(w.rng)
		m.via = nil
	}
	if err != nil && !cut {
		w.fatalf("%v", err)
	}
	if cut {
		w.stats["cuts"]++
		w.afterCut(s, to, learned, noted, o.Force)
		return
	}
	for i, m := range to {
		w.judge(&res[i], s, learned, m, o.Force)
	}
	if slices.ContainsFunc(res, func(r Result) bool { return r.Lineage != nil && r.Lineage.Forced }) {
		w.decides(learned)
	}
	if noted {
		s.member = true
	}
	s.learn(learned)
	for i, m := range to {
		if res[i].Outcome == Synced || res[i].Outcome == InSync {
			m.member = true
			m.tree = maps.Clone(s.tree)
			m.know, m.seen = maps.Clone(learned.know), maps.Clone(learned.seen)
			m.runs = maps.Clone(learned.runs)
		}
		w.check(m)
		w.remembers(m, res[i].Lineage != nil && res[i].Lineage.Forced)
	}
	w.check(s)
	w.remembers(s, false)
}

// decides notes that somebody named a winner: who does not know of that must not undo it.
func (w *walk) decides(m *modelMember) {
	w.edits++
	m.know[w.edits], m.runs[w.edits] = true, true
}

func members(ms []*modelMember) []*aMember {
	var out []*aMember
	for _, m := range ms {
		out = append(out, m.aMember)
	}
	return out
}

// judge holds the result of one target against the law.
func (w *walk) judge(res *Result, s, learned, m *modelMember, force bool) {
	w.t.Helper()
	v := w.verdict(learned, m)
	refused := errors.Is(res.Err, ErrRefused)
	w.logf("  %s: %s, %v; the model says %s", m.name, res.Outcome, res.Err, v)
	w.stats[string(v)]++
	if res.Err != nil && !refused {
		w.fatalf("%s: %v", m.name, res.Err)
	}
	if refused && res.Outcome != Refused || !refused && res.Outcome != Synced && res.Outcome != InSync {
		w.fatalf("%s: outcome %s, %v", m.name, res.Outcome, res.Err)
	}
	if force {
		if refused {
			w.fatalf("%s: forced, and refused: %v", m.name, res.Err)
		}
		if !res.Lineage.Forced && (v == mustStale || v == mustPart) {
			w.fatalf("%s: was overwritten without a word", m.name)
		}
		return
	}
	switch v {
	case mustStale, mustPart:
		if !refused {
			w.fatalf("%s had edits that %s does not know of, and was overwritten", m.name, s.name)
		}
		if stale := errors.Is(res.Err, ErrStaleSource); stale != (v == mustStale) {
			w.stats["conservative: "+string(v)+" called otherwise"]++
		}
	case mustSync:
		if refused {
			w.stats["conservative: refused"]++
			w.stats["conservative: refused, "+conservative(res.Err)]++
			if os.Getenv("ESPMIRROR_STRICT") != "" {
				w.fatalf("%s: refused: %v", m.name, res.Err)
			}
		}
	case alike:
		if refused {
			w.stats["conservative: alike but for a counter, refused"]++
		}
		for _, c := range res.Summary.Changes {
			if c.Op != "rename" {
				w.fatalf("%s: the trees are alike, and the run would change %v", m.name, c)
			}
		}
	}
}

// conservative is the reason of a refusal without its numbers.
func conservative(err error) string {
	return regexp.MustCompile(`[0-9]+`).ReplaceAllString(err.Error(), "N")[len("cannot sync x: "):]
}

// afterCut finds out what a run that was cut came to. A copy of each member is recovered: what the member itself will be.
func (w *walk) afterCut(s *modelMember, to []*modelMember, learned *modelMember, noted, force bool) {
	w.t.Helper()
	source := w.wouldBe(s)
	if source.gen != s.gen {
		noted = true
	}
	if !maps.Equal(source.tree, s.tree) {
		w.fatalf("the tree of the source changed")
	}
	verdicts := map[*modelMember]modelVerdict{}
	for _, m := range to {
		verdicts[m] = w.verdict(learned, m)
	}
	if noted {
		if slices.ContainsFunc(to, func(m *modelMember) bool { v := verdicts[m]; return force && v != mustSync && v != alike }) {
			w.decides(learned)
		}
		s.member = true
		s.learn(learned)
	}
	for _, m := range to {
		now := w.wouldBe(m)
		v := verdicts[m]
		switch {
		case maps.Equal(m.tree, s.tree) && maps.Equal(now.tree, s.tree):
			if now.gen != m.gen {
				m.member = true
				m.learn(learned)
			}
		case maps.Equal(now.tree, s.tree):
			w.logf("  %s has the new tree, the model said %s", m.name, v)
			if (v == mustStale || v == mustPart) && !force {
				w.fatalf("%s had edits that %s does not know of, and was overwritten", m.name, s.name)
			}
			if now.gen != source.gen {
				w.fatalf("%s has a tree that the source has not noted", m.name)
			}
			m.member = true
			m.tree = maps.Clone(s.tree)
			m.know, m.seen = maps.Clone(learned.know), maps.Clone(learned.seen)
			m.runs = maps.Clone(learned.runs)
		case !maps.Equal(now.tree, m.tree):
			w.fatalf("%s has a tree that is neither old nor new", m.name)
		case now.gen != m.gen:
			w.fatalf("%s has the old tree, and generation %d", m.name, now.gen)
		}
		m.gen = now.gen
		if w.rng.IntN(2) == 0 {
			w.recovers(m)
		}
	}
	s.gen = source.gen
	if w.rng.IntN(2) == 0 {
		w.recovers(s)
	}
}

// wouldBe is what a member is after a recovery.
func (w *walk) wouldBe(m *modelMember) *modelMember {
	w.t.Helper()
	x := &modelMember{aMember: &aMember{name: m.name, guid: m.guid, dev: blockdev.NewMem(bytes.Clone(m.dev.Bytes()), m.g.sector)}, g: m.g, own: m.own, gen: m.gen}
	if _, err := Recover(context.Background(), x.target(), RecoverOptions{}); err != nil {
		w.fatalf("cannot recover %s: %v", m.name, err)
	}
	x.tree = map[string]string{}
	for p, c := range x.files(w.t) {
		if m.own[p] == "" {
			x.tree[canonicalPath(p)] = c
		}
	}
	w.check(x)
	if st := x.state(w.t); st != nil {
		x.gen = st.Generation
	} else {
		x.gen = 0
	}
	return x
}

// step does one thing.
func (w *walk) step() {
	w.t.Helper()
	anybody := w.members[w.rng.IntN(len(w.members))]
	switch k := w.rng.IntN(20); {
	case k < 2: // boot from another member
		if anybody.present {
			w.logf("boot from %s", anybody.name)
			w.primary = anybody
		}
	case k < 6:
		w.somebodyEdits(w.primary)
	case k < 7:
		w.somebodyEdits(anybody)
	case k < 8:
		w.boots(w.primary)
	case k < 9: // lose one
		if anybody != w.primary {
			w.logf("lose %s", anybody.name)
			anybody.present = false
		}
	case k < 11:
		w.logf("return %s", anybody.name)
		anybody.present = true
	case k < 12: // somebody copies the primary's tree by hand
		if !maps.Equal(anybody.tree, w.primary.tree) {
			w.edits++
			w.logf("copy %s to %s (edit %d)", w.primary.name, anybody.name, w.edits)
			w.become(anybody, maps.Clone(w.primary.tree))
			maps.Copy(anybody.know, w.primary.know)
			maps.Copy(anybody.seen, w.primary.seen)
			anybody.know[w.edits], anybody.runs[w.edits] = true, true
		}
	default:
		w.sync()
	}
}

// walkGeometries are small and different.
var walkGeometries = []geometry{
	geometries[0], geometries[1], geometries[2], {"FAT12-4k", 0, 4 << 20, 4096, 1, 2},
}

func newWalk(t *testing.T, seed uint64, stats map[string]int) *walk {
	w := &walk{t: t, seed: seed, rng: rand.New(rand.NewPCG(seed, 7)), stats: stats}
	tree := map[string]string{
		"loader/loader.conf": "timeout 3\n", "EFI/BOOT/BOOTX64.EFI": w.pe(0), "EFI/Linux/uki.efi": w.pe(0),
		"loader/entries/1.conf": "linux /" + token + "/1/linux\n", token + "/1/linux": w.pe(0),
	}
	for i := range 3 + w.rng.IntN(2) {
		g := walkGeometries[(int(seed)+i)%len(walkGeometries)]
		if g.name == "FAT12-4k" {
			g.typ = geometries[0].typ
		}
		m := &modelMember{aMember: newMember(t, string(rune('a'+i)), fmt.Sprintf("6f0c5c7e-0000-4000-8000-00000000000%x", 10+i), g), g: g, present: true,
			know: map[int]bool{}, runs: map[int]bool{}, seen: map[string]bool{}, tree: map[string]string{}}
		m.own = map[string]string{"EFI/Microsoft/Boot/bootmgfw.efi": "their own " + m.name, "loader/random-seed": "seed of " + m.name, "note.txt": m.name}
		changes := map[string]*string{}
		for p, c := range m.own {
			changes[p] = &c
		}
		m.edit(t, changes)
		w.members = append(w.members, m)
	}
	w.primary = w.members[0]
	w.become(w.primary, tree)
	res, err := w.primary.sync(t, Options{}, members(w.members[1:])...)
	for i, m := range w.members {
		if err != nil || i > 0 && res[i-1].Outcome != Synced {
			w.fatalf("the first run: %v, %v", res, err)
		}
		m.member, m.tree, m.seen = true, tree, map[string]bool{hashTree(tree): true}
		w.remembers(m, false)
		w.check(m)
	}
	return w
}

// TestModel walks. ESPMIRROR_SEED is the first of ESPMIRROR_SEEDS seeds.
func TestModel(t *testing.T) {
	first, seeds := uint64(1), 16
	if testing.Short() {
		seeds = 6
	}
	if long() {
		seeds = 1000
	}
	if s, err := strconv.ParseUint(os.Getenv("ESPMIRROR_SEED"), 10, 64); err == nil {
		first, seeds = s, 1
	}
	if n, err := strconv.Atoi(os.Getenv("ESPMIRROR_SEEDS")); err == nil {
		seeds = n
	}
	var mu sync.Mutex
	stats := map[string]int{}
	t.Run("walks", func(t *testing.T) {
		for part := range 2 {
			t.Run(fmt.Sprint(part), func(t *testing.T) {
				t.Parallel()
				mine := map[string]int{}
				for i := part; i < seeds; i += 2 {
					w := newWalk(t, first+uint64(i), mine)
					for range 60 {
						w.step()
					}
				}
				mu.Lock()
				defer mu.Unlock()
				for k, n := range mine {
					stats[k] += n
				}
			})
		}
	})
	for _, k := range slices.Sorted(maps.Keys(stats)) {
		t.Logf("%6d %s", stats[k], k)
	}
	if n := stats["conservative: refused"]; n*20 > stats[string(mustSync)] {
		t.Errorf("%d runs of %d were refused although nothing would have been lost", n, stats[string(mustSync)])
	}
}
