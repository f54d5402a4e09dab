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

// removal is a boot entry that may go before the new tree is there.
type removal struct {
	path  string   // of the entry
	files []string // what it names and the run takes away too
}

// removable lists the boot entries that may go first, the one that the menu shows last at the front, and what other entries
// need. Only what the new tree has not at all is among them: what is replaced must not be missing in between, as a boot
// loader is replaced too. Nothing may go where it is not certain that something remains that boots.
func (r *run) removable(s *side, points []switchPoint) (going []removal, menu []*bls.Entry) {
	stays := map[*fatdriver.Node]bool{} // what the new tree has in its place
	coming := map[string]bool{}         // paths of the new tree, by the names that members compare
	var note func(w *fatdriver.Want, at string)
	note = func(w *fatdriver.Want, at string) {
		if w.Have != nil && !w.Dir {
			stays[w.Have] = true
		}
		coming[placeKey(at)] = true
		for _, c := range w.Children {
			note(c, path.Join(at, c.Name))
		}
	}
	goes := map[string]bool{} // folded paths of files that the run removes
	var lost func(n *fatdriver.Node, at string)
	lost = func(n *fatdriver.Node, at string) {
		if r.sel.excluded(at) {
			return
		}
		if !n.IsDir() && !stays[n] && !coming[placeKey(at)] {
			goes[fatdriver.Fold(n.Path())] = true
		}
		for _, c := range n.Children {
			lost(c, path.Join(at, c.Name()))
		}
	}
	for _, p := range points {
		if p.New != nil {
			note(p.New, p.path)
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
	if len(keep) == 0 {
		return nil, nil
	}
	bls.Sort(menu)
	for _, e := range slices.Backward(menu) {
		if keep[e.Name.Key()] || !goes[fatdriver.Fold(e.Path)] || slices.ContainsFunc(going, func(x removal) bool { return x.path == e.Path }) {
			continue
		}
		x := removal{path: e.Path}
		for _, f := range e.Files {
			if goes[foldPath(f.Path)] {
				x.files = append(x.files, strings.Join(fatdriver.SplitPath(f.Path), "/"))
			}
		}
		going = append(going, x)
	}
	return going, menu
}

// early lists the entries of the first n removals and the files that no other entry names, without an entry that another
// one starts.
func early(going []removal, menu []*bls.Entry, n int) (entries, files []string) {
	gone := map[string]bool{}
	for _, x := range going[:n] {
		gone[foldPath(x.path)] = true
	}
	needed := map[string]bool{}
	for again := true; again; {
		again = false
		for _, e := range menu {
			if gone[foldPath(e.Path)] {
				continue
			}
			for _, f := range e.Files {
				k := foldPath(f.Path)
				needed[k] = true
				if gone[k] {
					delete(gone, k) // a type 1 entry that starts an image
					again = true
				}
			}
		}
	}
	seen := map[string]bool{}
	for _, x := range going[:n] {
		if !gone[foldPath(x.path)] {
			continue
		}
		entries = append(entries, x.path)
		for _, f := range x.files {
			if k := foldPath(f); !needed[k] && !seen[k] && !gone[k] {
				seen[k] = true
				files = append(files, f)
			}
		}
	}
	return entries, files
}

// placeKey is a path by which members know the place of a file: folded, and without a boot counter.
func placeKey(p string) string {
	return path.Join(fatdriver.Fold(path.Dir(p)), entryKey(path.Dir(p), path.Base(p)))
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
			// An image that says nothing of itself is in no menu; by its name it may start all the same.
			e := []*bls.Entry{{Path: it.Path, Name: name, ID: strings.ToLower(name.Good()), Loader: "image"}}
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

// keptEntries are the keys of the entries that are never removed early: the one that was booted, those that an EFI variable
// or loader.conf has started by itself, and the top of the menu. They are looked for among the entries that can start: of
// an architecture for which there is a boot loader, with all their files. None means that nothing may go.
func (r *run) keptEntries(s *side, menu []*bls.Entry) map[string]bool {
	src := s.source()
	confs := []bls.Conf{bls.ParseConf(string(loaderConf(src)))}
	if s.partner != nil && s.partner.tree != nil {
		// Boot loaders take the one on the ESP, also for entries on XBOOTLDR.
		confs = append(confs, bls.ParseConf(string(loaderConf(s.partner.source()))))
	}
	fits := architectures(src)
	var able []*bls.Entry
	for _, e := range menu {
		if !e.Hidden() && fits(e.Architecture) && !slices.ContainsFunc(e.Files, func(f bls.Ref) bool {
			n := s.tree.Lookup(f.Path)
			return n == nil || n.IsDir() || n.Size() == 0
		}) {
			able = append(able, e)
		}
	}
	keep := map[string]bool{}
	if len(able) == 0 {
		return keep
	}
	all := bls.Vars{OneShot: r.opt.OneShotEntry, Preferred: r.opt.PreferredEntry, Default: r.opt.DefaultEntry, LastBooted: r.opt.BootedEntry}
	next := all
	next.OneShot = ""
	for _, vars := range []bls.Vars{{}, {LastBooted: all.LastBooted}, all, next} {
		for _, conf := range confs {
			if e := bls.Default(able, conf, vars); e != nil {
				keep[e.Name.Key()] = true
			}
		}
	}
	// Also by name: what was booted may not be able to start any more, and is what its user will look for.
	for _, id := range []string{all.LastBooted, all.OneShot, all.Preferred, all.Default} {
		id, _, _ = strings.Cut(id, "@") // the profile of an image
		if n, ok := bls.ParseName(id); ok {
			keep[n.Key()] = true
		}
	}
	bls.Sort(able)
	keep[able[0].Name.Key()] = true
	return keep
}

// loaderConf reads the loader/loader.conf of a volume; nil when there is none, or none that can be read, which says nothing
// to a boot loader either.
func loaderConf(src Source) []byte {
	it := src.Root().lookup("loader/loader.conf")
	if it == nil || it.Dir || it.Size > maxEntryFile {
		return nil
	}
	text, err := readItem(src, it)
	if err != nil {
		return nil
	}
	return text
}

// architectures says for which architectures a target has a boot loader, by the names that firmware looks for (UEFI
// specification, "Removable Media Boot Behavior") and those of systemd-boot. Where it has none of these names, what starts
// it is not known, and every architecture will do.
func architectures(src Source) func(arch string) bool {
	have := map[string]bool{}
	for dir, prefix := range map[string]string{"EFI/BOOT": "BOOT", "EFI/systemd": "SYSTEMD-BOOT"} {
		it := src.Root().lookup(dir)
		if it == nil {
			continue
		}
		for _, c := range it.Children {
			if arch, ok := strings.CutPrefix(strings.TrimSuffix(fatdriver.Fold(c.Name), ".EFI"), prefix); ok && arch != "" {
				have[arch] = true
			}
		}
	}
	return func(arch string) bool { return arch == "" || len(have) == 0 || have[fatdriver.Fold(arch)] }
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
	if err := r.carryOut(s, plan, log); err != nil {
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
	d, err := r.view(s).digest(sel, func(it *Item) bool { return gone[fatdriver.Fold(it.Path)] })
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
