package replicate

import (
	"errors"
	"fmt"
	"path"
	"slices"
	"strings"

	"espmirror/fatdriver"
	"espmirror/replicate/bls"
)

// A target that has no room for old and new tree side by side is brought up to date in two transactions: the first takes
// away boot entries that go anyway, with what only they refer to. It leaves a tree that boots: no entry without its
// files, and never without the entry that was booted last and the one that starts by itself.

// removable lists what may go from a target before the new tree is there, in the order in which it goes: entries first. It
// is empty when nothing may.
func (r *run) removable(s *side, points []switchPoint) (entries, files []string) {
	stays := map[*fatdriver.Node]bool{} // what the new tree has in its place
	var note func(w *fatdriver.Want)
	note = func(w *fatdriver.Want) {
		if w.Have != nil && !w.Dir {
			stays[w.Have] = true
		}
		for _, c := range w.Children {
			note(c)
		}
	}
	goes := map[string]bool{} // folded paths of files that the run removes or replaces
	var lost func(n *fatdriver.Node, at string)
	lost = func(n *fatdriver.Node, at string) {
		if r.sel.excluded(at) {
			return
		}
		if !n.IsDir() && !stays[n] {
			goes[fatdriver.Fold(n.Path())] = true
		}
		for _, c := range n.Children {
			lost(c, path.Join(at, c.Name()))
		}
	}
	for _, p := range points {
		if p.New != nil {
			note(p.New)
		}
	}
	for _, p := range points {
		if p.Old != nil && p.path != stateDir {
			lost(p.Old, p.path)
		}
	}
	menu, whole := bootMenu(s)
	if !whole {
		return nil, nil // what cannot be read may be what starts
	}
	keep := r.keptEntries(s, menu)
	needed := map[string]bool{} // files of entries that stay
	var going []*bls.Entry
	for _, e := range menu {
		if keep[e.Name.Key()] || !goes[fatdriver.Fold(e.Path)] {
			for _, f := range e.Files {
				needed[foldPath(f.Path)] = true
			}
			continue
		}
		going = append(going, e)
	}
	seen := map[string]bool{}
	add := func(list *[]string, p string) {
		if k := foldPath(p); !seen[k] {
			seen[k] = true
			*list = append(*list, strings.Join(fatdriver.SplitPath(p), "/"))
		}
	}
	for _, e := range going {
		add(&entries, e.Path)
	}
	for _, e := range going {
		for _, f := range e.Files {
			if k := foldPath(f.Path); goes[k] && !needed[k] {
				add(&files, f.Path)
			}
		}
	}
	return entries, files
}

func foldPath(p string) string {
	return fatdriver.Fold(strings.Join(fatdriver.SplitPath(p), "/"))
}

// bootMenu reads the boot entries of a target: loader/entries/*.conf and EFI/Linux/*.efi. whole is false when one of them
// cannot be read.
func bootMenu(s *side) (menu []*bls.Entry, whole bool) {
	src := s.source()
	if dir := src.Root().lookup("loader/entries"); dir != nil {
		for _, it := range dir.Children {
			if it.Dir || !strings.HasSuffix(fatdriver.Fold(it.Name), ".CONF") {
				continue
			}
			if it.Size > maxEntryFile {
				return nil, false
			}
			text, err := readItem(src, it)
			if err != nil {
				return nil, false
			}
			menu = append(menu, bls.Parse(it.Path, string(text)))
		}
	}
	if dir := src.Root().lookup("EFI/Linux"); dir != nil {
		for _, it := range dir.Children {
			name, ok := bls.ParseName(it.Name)
			if it.Dir || !ok || fatdriver.Fold(name.Suffix) != ".EFI" {
				continue
			}
			// An image that says nothing of itself is still one that may start.
			e := []*bls.Entry{{Path: it.Path, Name: name, ID: strings.ToLower(name.Good())}}
			if sr, err := s.tree.Open(it.node); err == nil {
				if pe, err := bls.ReadPE(sr, it.Size); err == nil {
					if es, err := pe.Entries(it.Path); err == nil && len(es) > 0 {
						e = es
					}
				}
			}
			menu = append(menu, e...)
		}
	}
	return menu, true
}

// keptEntries are the keys of the entries that are never removed early: the one that was booted, the one that starts by
// itself, and without the one the other is not trusted: then the newest that is not bad stays too.
func (r *run) keptEntries(s *side, menu []*bls.Entry) map[string]bool {
	keep := map[string]bool{}
	var conf bls.Conf
	src := s.source()
	if it := src.Root().lookup("loader/loader.conf"); it != nil && !it.Dir && it.Size <= maxEntryFile {
		if text, err := readItem(src, it); err == nil {
			conf = bls.ParseConf(string(text))
		}
	}
	shown := slices.DeleteFunc(slices.Clone(menu), (*bls.Entry).Hidden)
	for _, vars := range []bls.Vars{{}, {Default: r.opt.DefaultEntry, LastBooted: r.opt.BootedEntry}} {
		if e := bls.Default(shown, conf, vars); e != nil {
			keep[e.Name.Key()] = true
		}
	}
	if booted, ok := bls.ParseName(r.opt.BootedEntry); ok {
		keep[booted.Key()] = true
	}
	bls.Sort(shown)
	if len(shown) > 0 {
		keep[shown[0].Name.Key()] = true
	}
	return keep
}

// removeFirst carries out the first of two transactions: it deletes entries, and then what only they refer to. Directories
// are changed in place, which takes no room.
func (r *run) removeFirst(s *side, entries, files []string) error {
	log, err := r.journalOf(s)
	if err != nil {
		return err
	}
	if log == nil {
		if err := r.createJournal(s); err != nil {
			return err
		}
		if log, err = r.journalOf(s); err != nil {
			return err
		}
		if log == nil {
			return errors.New("internal error: the journal vanished")
		}
	}
	var steps []fatdriver.Step
	for _, list := range [][]string{entries, files} {
		var step fatdriver.Step
		for _, p := range list {
			if n := lookup(s.tree.Root, p); n != nil {
				s.early = append(s.early, Change{Op: "delete", Path: n.Path(), Size: n.Size()})
				step = append(step, fatdriver.Anchor{Parent: n.Parent, Old: n})
			}
		}
		if len(step) > 0 {
			steps = append(steps, step)
		}
	}
	plan, err := s.tree.NewPlan(r.withInterim(s, steps), 0)
	if errors.Is(err, fatdriver.ErrNoSpace) {
		// Not even the note fits. After a power cut before the second transaction the target looks changed.
		plan, err = s.tree.NewPlan(steps, 0)
	}
	if err != nil {
		return err
	}
	rec, err := record(plan)
	if err != nil {
		return err
	}
	if err := log.Prepare(rec); err != nil {
		return err
	}
	f := &feed{s: s, own: plan.Files}
	tx := plan.Begin()
	err = inOrder(
		func() error { return f.writeOwn(tx) },
		tx.WriteDirs,
		tx.WriteFAT,
		// B1: as in transact.
		tx.Flush,
		func() error { return r.readBack(s, tx) },
		func() error { return r.commitAll(s, plan, tx, log) },
		func() error { return closeTx(tx, log) },
	)
	if err != nil {
		return fmt.Errorf("cannot make room: %w", err)
	}
	r.log.Info("made room", "target", s.t.Name, "files", len(s.early))
	if err := r.scan(s); err != nil {
		return err
	}
	now, err := s.tree.Allocatable()
	s.freed = now - s.free
	return err
}

// withInterim adds a note to the target's state, so that its tree between the two transactions is not taken for one that
// somebody else made.
func (r *run) withInterim(s *side, steps []fatdriver.Step) []fatdriver.Step {
	if s.state == nil {
		return steps
	}
	sel, err := s.state.selection()
	if err != nil {
		return steps
	}
	gone := map[string]bool{}
	for _, c := range s.early {
		gone[fatdriver.Fold(c.Path)] = true
	}
	d, err := r.targetDigest(s, sel, func(it *Item) bool { return gone[fatdriver.Fold(it.Path)] })
	if err != nil {
		return steps
	}
	rec := *s.state
	rec.Interim, rec.Own = &d, noFingerprint
	text := rec.Bytes()
	own := lookup(s.tree.Root, stateDir)
	if own == nil || !own.IsDir() {
		return steps
	}
	it := &Item{Name: "state", Path: StatePath, Size: int64(len(text)), data: text, Meta: r.stateMeta()}
	return append(slices.Clone(steps), fatdriver.Step{{Parent: own.Parent, Old: own, New: ownDirWith(own, it)}})
}
