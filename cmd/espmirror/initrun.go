//go:build !initrd

package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"path/filepath"
	"slices"
	"sync"

	"espmirror/blockdev"
	"espmirror/fatdriver"
	"espmirror/gpt"
	"espmirror/replicate"
)

// initRun is one run of init: some targets, which are planned one by one and filled together.
type initRun struct {
	inv   *invocation
	o     *initOptions    // of all targets
	m     *members        // the primary
	reg   *registration   // nil without --register
	out   *manifestOutput // nil without --manifest
	plans []*initPlan
}

// init makes new members.
func (inv *invocation) init() (report, error) {
	o, err := inv.initOptions()
	if err != nil {
		return nil, err
	}
	m, err := inv.newMembersOf(initVerb, nil, false)
	if err != nil {
		return nil, err
	}
	defer m.close()
	r := &initRun{inv: inv, o: o, m: m}
	if r.reg, err = inv.registration(); err != nil {
		return nil, err
	}
	targets, err := r.find()
	if err == nil {
		r.out, err = inv.newManifest(inv.c.Args().Slice())
	}
	if err != nil {
		return nil, err
	}
	if inv.jobs == 0 && slices.ContainsFunc(targets, func(t *initTarget) bool { return !t.id.Block }) {
		inv.jobs = imageJobs
	}
	if err := m.sourcesOfInit(); err != nil {
		return nil, err
	}
	if err := m.spareBoot(targets); err != nil {
		return nil, err
	}
	// All of it on a copy first: what does not fit is known before anything is written anywhere.
	if err := r.plan(targets); err != nil {
		return nil, err
	}
	rep := &initReport{Command: initVerb, DryRun: o.dry, Primary: m.primary.name, quiet: inv.quiet} // --manifest=- is quiet
	rep.fill(r.plans)
	if o.dry {
		return rep, nil
	}
	if err := r.carryOut(); err != nil {
		return nil, err
	}
	m.close()
	var names []string // of those that join
	for _, p := range r.plans {
		if v := p.esp(); p.err == nil && v != nil && p.join {
			var name string
			if name, p.err = p.locate(inv, v); p.err == nil {
				names = append(names, name)
			}
		}
	}
	var joined error
	if len(names) > 0 {
		inv.random = r.random("join")
		var set report
		set, joined = inv.changeSetOf("add", names)
		rep.Set, _ = set.(*setReport)
	}
	for _, p := range r.plans {
		if v := p.esp(); p.err == nil && v != nil && (joined == nil || !p.join) {
			p.err = inv.randomSeedOf(p, v)
		}
	}
	rep.fill(r.plans)
	err = r.failure(joined)
	switch {
	case err == nil:
		err = r.out.write(inv.c.Args().Slice())
	case r.out != nil:
		inv.log.Warn("no manifest was written, as not all went well", "file", r.out.file)
	}
	return rep, err
}

// find finds out what the targets are. Nothing is written.
func (r *initRun) find() ([]*initTarget, error) {
	var all []*initTarget
	names := r.inv.c.Args().Slice()
	for _, name := range names {
		o := r.o.forTarget(name, len(names) > 1)
		t, err := r.inv.findInitTarget(o)
		if err != nil {
			return nil, err
		}
		if t.part && (o.like != "" || o.newTable || o.espSize != 0 || o.bootSize > 0 || o.partLabel != "" || o.size != 0) {
			return nil, usagef("%s is a partition: it keeps its size and its name, and the table stays as it is", t.name)
		}
		if err := r.reg.check(t.name, t.loc); err != nil {
			return nil, err
		}
		if err := r.inv.guardInit(t, r.m); err != nil {
			return nil, err
		}
		for _, u := range all {
			if err := r.inv.apart(t, u); err != nil {
				return nil, err
			}
			if o.seed != "" && filepath.Base(t.name) == filepath.Base(u.name) {
				return nil, usagef("%s and %s would have the same seed, %s", u.name, t.name, o.seed)
			}
		}
		t.o = o
		all = append(all, t)
	}
	return all, nil
}

// apart refuses two targets that are one, or share a disk that one of them is.
func (inv *invocation) apart(t, u *initTarget) error {
	if t.loc == nil || u.loc == nil {
		if t.loc == nil && u.loc == nil {
			a, err := newFileID(t.name)
			b, err2 := newFileID(u.name)
			if err := errors.Join(err, err2); err != nil {
				return err
			}
			if a == b {
				return usagef("cannot init %s: it is named twice (%s)", t.name, u.name)
			}
			return nil
		}
		one, other := t, u // of which the first is an image file without any bytes
		if u.loc == nil {
			one, other = u, t
		}
		if id, err := blockdev.Identify(one.name); err == nil && id == other.id {
			return usagef("cannot init %s: it is named twice (%s)", t.name, u.name)
		}
		return nil
	}
	same, err := gpt.SameVolume(t.loc, u.loc)
	if err != nil {
		return err
	}
	if same {
		return usagef("cannot init %s: it is named twice (%s)", t.name, u.name)
	}
	if t.part && u.part {
		return nil
	}
	if t.id != u.id && t.id.Block && u.id.Block {
		a, err := inv.system.WholeDisk(t.id.Dev)
		b, err2 := inv.system.WholeDisk(u.id.Dev)
		if err := errors.Join(err, err2); err != nil {
			return err
		}
		same = a.Num == b.Num
	}
	if same || t.id == u.id {
		return usagef("cannot init %s: it has to do with %s, which is named too", t.name, u.name)
	}
	return nil
}

// newFileID tells image files apart that are yet to be made, or are empty: by what they are, else by their place.
func newFileID(name string) (any, error) {
	if id, err := blockdev.Identify(name); err == nil {
		return id, nil
	}
	dir, err := filepath.Abs(filepath.Dir(name))
	if err == nil {
		dir, err = filepath.EvalSymlinks(dir)
	}
	return filepath.Join(dir, filepath.Base(name)), err
}

// plan works out what will be made of all targets. Whatever cannot be done to one of them is done to none.
func (r *initRun) plan(targets []*initTarget) error {
	var set *replicate.Set // with the members that were planned before
	guids := map[string]string{}
	var errs []error
	for _, t := range targets {
		if err := r.inv.ctx.Err(); err != nil {
			return err
		}
		p, err := r.planOne(t, set)
		if err == nil {
			for _, v := range p.filled() {
				if at := guids[v.part.GUID.String()]; at != "" && err == nil {
					err = refusef("cannot init %s: a partition of it has the GUID %s, and so has one of %s", t.name, v.part.GUID, at)
				}
				guids[v.part.GUID.String()] = t.name
			}
		}
		if err != nil {
			errs = append(errs, err)
			continue
		}
		if p.set != nil {
			set = p.set
		}
		r.plans = append(r.plans, p)
	}
	switch len(errs) {
	case 0:
	case 1:
		return errs[0]
	default:
		return &targetsError{verb: initVerb, errs: errs, total: len(targets)}
	}
	for _, p := range r.plans {
		if p.set != nil {
			p.set = set
		}
	}
	return nil
}

// planOne works out what will be made of one target, on a copy. set has the members that were planned before.
func (r *initRun) planOne(t *initTarget, set *replicate.Set) (*initPlan, error) {
	p, err := r.inv.planInit(t.o, t, r.m)
	if err == nil {
		err = p.joinPlan(r.inv, r.m, set)
	}
	if err == nil {
		err = r.inv.rehearse(p, r.m, r.random("fill"))
	}
	if t.create && (errors.Is(err, gpt.ErrNoRoom) || errors.Is(err, fatdriver.ErrNoSpace)) {
		// There is nothing yet that could be deleted to make room.
		least, lerr := room(r.m)
		if lerr != nil {
			return nil, lerr
		}
		err = &replicate.Hint{Err: err, Text: fmt.Sprintf("with --size %dM there is room for twice what is selected, as updates need it", (least+2*gpt.Align)>>20+1)}
	}
	if err != nil {
		return nil, err
	}
	if err := r.reg.ofInit(p, r.m); err != nil {
		return nil, err
	}
	p.todo = p.leftToDo(r.inv)
	if line := bootEntry(p, r.m); line != "" && r.reg == nil {
		p.todo = append(p.todo, line)
	}
	return p, nil
}

// random is where identities of transactions come from; nil is the system. Each purpose has bytes of its own: what fills a
// volume and what joins it to its set must not be taken for one another.
func (r *initRun) random(purpose string) func(volume string) io.Reader {
	if r.o.seed == "" {
		return nil
	}
	return func(volume string) io.Reader {
		return &derived{seed: purpose + "\x00" + r.seedOf(volume) + "\x00" + volume}
	}
}

// seedOf is the seed of the target that has a volume, by its partition GUID.
func (r *initRun) seedOf(volume string) string {
	for _, p := range r.plans {
		for _, v := range p.volumes {
			if v.part.GUID.String() == volume {
				return p.o.seed
			}
		}
	}
	return r.o.seed
}

// failure is the error of the run, after the first write.
func (r *initRun) failure(joined error) error {
	e := &targetsError{verb: initVerb, total: len(r.plans)}
	for _, p := range r.plans {
		e.wrote = e.wrote || p.wrote
		if p.err != nil {
			e.errs = append(e.errs, p.err)
		}
	}
	if joined != nil {
		e.errs = append(e.errs, joined)
	}
	if err := r.inv.ctx.Err(); err != nil && len(e.errs) > 0 {
		return withHint(err, "the same command goes on")
	}
	switch {
	case len(e.errs) == 0:
		return nil
	case len(e.errs) == 1 && len(r.plans) == 1 && (!e.wrote || exitCode(e.errs[0]) != exitRefused):
		return e.errs[0]
	}
	return e // no exit status says "nothing was written" any more
}

// locate is how add knows the ESP.
func (p *initPlan) locate(inv *invocation, v *newVolume) (string, error) {
	if p.t.part {
		return p.t.name, nil
	}
	loc, err := inv.finder().Part(p.t.name, v.part.Number)
	if err != nil {
		return "", fmt.Errorf("cannot add %s: %w", p.volumeName(v), err)
	}
	return loc.String(), nil
}

// guardInit refuses what --force does not change.
func (inv *invocation) guardInit(t *initTarget, m *members) error {
	if t.loc == nil {
		return nil
	}
	by, err := inv.system.Holders(t.id)
	if err != nil {
		return err
	}
	if len(by) > 0 {
		return fmt.Errorf("cannot init %s: %w", t.name, &blockdev.BusyError{By: by, Hint: "unmount it or stop what holds it, then try again"})
	}
	same, err := m.isPrimary(&member{name: t.name, loc: t.loc})
	if err != nil {
		return err
	}
	if same && !t.part {
		return refusef("cannot init %s: the primary (%s) is on it", t.name, m.primary.name)
	}
	if same {
		return refusef("cannot init %s: it is the primary (%s)", t.name, m.primary.name)
	}
	return nil
}

// sourcesOfInit opens the primary and the XBOOTLDR partition beside it.
func (m *members) sourcesOfInit() error {
	if p := m.primary; p.loc != nil && p.loc.Part != nil && p.loc.Part.Type == gpt.TypeESP {
		loc, err := m.inv.xbootldr(p.loc)
		if err != nil {
			return err
		}
		if loc != nil {
			m.boot = &members{inv: m.inv, verb: m.verb, dry: m.dry, esp: m, primary: &member{name: loc.String(), loc: loc, esp: p}}
		}
	}
	if _, err := m.source(); err != nil {
		return err
	}
	o := m.options(replicate.Options{Selection: m.inv.selection()})
	if err := o.Selection.Check(m.src); err != nil {
		return err
	}
	if m.boot == nil {
		return nil
	}
	_, err := m.boot.source()
	if errors.Is(err, fatdriver.ErrNotFAT) {
		m.inv.log.Warn("the XBOOTLDR partition is not FAT, and is not replicated", "primary", m.boot.primary.name, "err", err)
		m.boot.close()
		m.boot = nil
		return nil
	}
	return err
}

// spareBoot refuses the XBOOTLDR partition that the new ones are filled from: with --force it would be empty by then.
func (m *members) spareBoot(targets []*initTarget) error {
	if m.boot == nil {
		return nil
	}
	for _, t := range targets {
		if t.loc == nil {
			continue
		}
		if same, err := gpt.SameVolume(t.loc, m.boot.primary.loc); err != nil {
			return err
		} else if same {
			return refusef("cannot init %s: it is the XBOOTLDR partition of the primary (%s)", t.name, m.primary.name)
		}
	}
	return nil
}

// rehearse carries the plan out in memory, and keeps what comes of it: numbers of partitions, geometry of volumes.
func (inv *invocation) rehearse(p *initPlan, m *members, random func(string) io.Reader) error {
	var below blockdev.Device
	switch {
	case p.t.create:
		below = blockdev.Blank(p.t.size, p.t.sector)
	case p.t.part:
		v, err := p.t.loc.Open(blockdev.ReadOnly)
		if err != nil {
			return err
		}
		defer v.Close()
		below = v
	default:
		d, err := blockdev.Open(p.t.name, blockdev.ReadOnly, blockdev.WithSystem(inv.system), blockdev.WithSectorSize(p.t.sector))
		if err != nil {
			return err
		}
		defer d.Close()
		below = d
	}
	dev := blockdev.NewOverlay(below)
	if p.t.unmade {
		if _, err := gpt.Complete(dev); err != nil {
			return err
		}
	}
	if err := p.look(inv, dev, m); err != nil {
		return err
	}
	if p.done {
		// All that is left is its set. What a member lacks is not made any more, and must not be reported as if it were there.
		for _, v := range p.volumes {
			if !v.existing {
				p.notes = append(p.notes, fmt.Sprintf("the ESP is a member already: no %s partition is made beside it", v.part.TypeName()))
			}
		}
		p.volumes = slices.DeleteFunc(p.volumes, func(v *newVolume) bool { return !v.existing })
		return p.keepsAll()
	}
	x := &making{initPlan: p, dev: dev}
	err := x.prepare()
	if err == nil {
		var errs []error
		errs, err = fill(inv, m, []*making{x}, replicate.Options{DryRun: true, Random: random, Log: inv.engineLog(true)})
		err = errors.Join(append(errs, err)...)
	}
	if err == nil {
		err = x.finish(inv.ctx)
	}
	if err != nil {
		if !errors.Is(err, context.Canceled) {
			err = refusal{err} // nothing was written
		}
		return fmt.Errorf("cannot init %s: %w", p.t.name, err)
	}
	return p.keepsAll()
}

// carryOut does what was planned: each disk by itself, but for the files, which come to all of them together. What goes wrong
// with one of them is its own error.
func (r *initRun) carryOut() error {
	var ids []blockdev.ID
	var all []*making
	for _, p := range r.plans {
		if p.done {
			continue
		}
		all = append(all, &making{initPlan: p})
		if p.t.id.Block {
			ids = append(ids, p.t.id)
		}
	}
	if len(all) == 0 {
		return nil
	}
	locks, err := r.inv.system.LockDisks(r.inv.ctx, lockWait, ids...)
	if err != nil {
		return err
	}
	defer locks.Release()
	r.each(all, func(x *making) {
		if x.err = x.open(r.inv); x.err == nil {
			x.fail(x.prepare())
		}
	})
	living := slices.DeleteFunc(slices.Clone(all), func(x *making) bool { return x.err != nil })
	bar := r.inv.startProgress()
	errs, err := fill(r.inv, r.m, living, replicate.Options{Random: r.random("fill"), Progress: bar.callback(),
		Log: slog.New(stepwise{r.inv.log.Handler(), ""})})
	bar.stop()
	for i, x := range living {
		if x.fail(errs[i]); x.err == nil {
			x.fail(err) // of the source
		}
	}
	r.each(all, func(x *making) {
		if x.err == nil {
			x.fail(x.finish(r.inv.ctx))
		}
		if x.err == nil {
			// What this node has cached is not what the nodes of the partitions read.
			x.fail(x.dev.Invalidate())
		}
		if x.disk != nil {
			x.fail(x.disk.Close())
		}
		if x.made = x.err == nil; x.made && x.disk.IsBlock() && !x.t.part {
			r.inv.tellKernel(x.initPlan)
		}
	})
	return nil
}

// each calls f for each, as many in parallel as may be.
func (r *initRun) each(all []*making, f func(*making)) {
	inParallel(len(all), cmp.Or(r.inv.jobs, len(all)), func(i int) { f(all[i]) })
}

// inParallel calls f with the numbers below n, which are begun in this order, so many at a time.
func inParallel(n, jobs int, f func(int)) {
	next := make(chan int)
	var wg sync.WaitGroup
	for range min(jobs, n) {
		wg.Go(func() {
			for i := range next {
				f(i)
			}
		})
	}
	for i := range n {
		next <- i
	}
	close(next)
	wg.Wait()
}

// randomSeedOf makes a random seed where it was asked for.
func (inv *invocation) randomSeedOf(p *initPlan, v *newVolume) error {
	if !p.o.randomSeed {
		return nil
	}
	loc := p.t.loc
	if !p.t.part {
		var err error
		if loc, err = inv.finder().Part(p.t.name, v.part.Number); err != nil {
			return err
		}
	}
	open, err := loc.Open(blockdev.ReadWrite)
	if err != nil {
		return err
	}
	_, err = replicate.RandomSeed(inv.ctx, newTarget(loc.String(), loc, open), replicate.SeedOptions{Create: true, Log: inv.engineLog(false)})
	if cerr := open.Close(); err == nil {
		err = cerr
	}
	if err != nil {
		return fmt.Errorf("cannot make a random seed on %s: %w", loc, err)
	}
	return nil
}

// bootEntry is the command that gives firmware an entry for the new ESP, "" for an image. Firmware finds EFI/BOOT by
// itself; an entry makes the order certain.
func bootEntry(p *initPlan, m *members) string {
	v := p.esp()
	if v == nil || p.t.loc == nil || !p.t.id.Block {
		return ""
	}
	loaders := loadersOn(m.src.Root(), firmwareArch(m.inv.system), nil)
	if len(loaders) == 0 {
		return ""
	}
	disk := p.t.name
	if p.t.part {
		disk = p.t.loc.Disk
	}
	line := efibootmgr(disk, v.part.Number, loaders[0])
	if p.join {
		line += "  # first in the order; `espmirror add --register " + quoted(p.t.name) + "` puts it last"
	}
	return line
}
