//go:build !initrd

package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"reflect"
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
			p.err = inv.seedOf(p, v)
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
		return nil
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

// making is a plan that is being carried out.
type making struct {
	*initPlan
	disk    *blockdev.Disk
	dev     blockdev.Device      // of the disk, or the partition itself
	held    []*blockdev.Withheld // the volumes whose first sectors are not there yet
	targets []*replicate.Target  // of the volumes that are filled, in their order
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
	turns := make(chan struct{}, cmp.Or(r.inv.jobs, len(all)))
	var wg sync.WaitGroup
	for _, x := range all {
		wg.Go(func() {
			turns <- struct{}{}
			defer func() { <-turns }()
			f(x)
		})
	}
	wg.Wait()
}

// fail keeps the first error.
func (x *making) fail(err error) {
	if err != nil && x.err == nil {
		x.err = withHint(fmt.Errorf("cannot init %s: %w", x.t.name, err), "nothing of it is in use; when the cause is gone, the same command goes on")
	}
}

// open opens the target for writing, and makes what was there forgotten.
func (x *making) open(inv *invocation) (err error) {
	t := x.t
	if t.create {
		x.wrote = true
		if err := makeFile(t.name, t.size); err != nil {
			x.fail(err)
			return x.err
		}
	}
	if t.part {
		v, err := t.loc.Open(blockdev.ReadWrite)
		if err != nil {
			return fmt.Errorf("cannot init %s: %w", t.name, err)
		}
		x.dev, x.disk = v, v.Disk()
	} else {
		x.disk, err = blockdev.Open(t.name, blockdev.ReadWrite, blockdev.WithSystem(inv.system), blockdev.WithSectorSize(t.sector))
		if err != nil {
			return fmt.Errorf("cannot init %s: %w", t.name, err)
		}
		x.dev = x.disk
		if x.disk.Size() != t.size || !t.create && x.disk.ID() != t.id {
			x.fail(gpt.ErrChanged)
			return x.err
		}
	}
	x.wrote = true
	x.dev = inv.device(x.dev)
	if err := x.dev.Invalidate(); err != nil {
		x.fail(err)
		return x.err
	}
	if err := x.unchanged(); err != nil {
		x.fail(err)
		return x.err
	}
	if !x.disk.IsBlock() {
		x.dev = blockdev.Sparse(x.dev)
		return nil
	}
	err = inv.forget(x.initPlan)
	if err == nil {
		err = inv.discard(x.initPlan)
	}
	x.fail(err)
	return x.err
}

// unchanged returns gpt.ErrChanged when a disk is not what the plan was made for: others could write to it until it was opened, and
// with many targets that is a long time.
func (x *making) unchanged() error {
	t := x.t
	if t.create || t.part {
		return nil
	}
	found, err := gpt.Recognise(x.disk)
	if err != nil {
		return err
	}
	o := blockdev.NewOverlay(x.disk)
	if t.unmade {
		if _, err := gpt.Complete(o); err != nil {
			return err
		}
	}
	if !slices.Equal(found, t.found) {
		return gpt.ErrChanged
	}
	if t.table == nil || x.table {
		return nil
	}
	if table, err := gpt.Read(o); err != nil || !reflect.DeepEqual(table, t.table) {
		return gpt.ErrChanged
	}
	return nil
}

// known returns gpt.ErrChanged when the place of a volume holds what it did not hold when it was looked at.
func (p *initPlan) known(v *newVolume, found []gpt.Signature) error {
	for _, s := range found {
		if s.Off += v.part.Start; !slices.Contains(p.found, s) {
			return fmt.Errorf("%w: partition %d holds %s", gpt.ErrChanged, v.part.Number, listSignatures([]gpt.Signature{s}))
		}
	}
	return nil
}

// makeFile makes an image file of zeros, all of it a hole.
func makeFile(name string, size int64) error {
	f, err := os.OpenFile(name, os.O_RDWR|os.O_CREATE, 0o644)
	if err != nil {
		return err
	}
	// The plan was made for a file that was not there, or empty, which may be some time ago.
	info, err := f.Stat()
	if err == nil && info.Size() != 0 {
		err = gpt.ErrChanged
	}
	if err == nil {
		err = f.Truncate(size)
	}
	if err == nil {
		err = f.Sync()
	}
	if cerr := f.Close(); err == nil {
		err = cerr
	}
	if err != nil {
		return err
	}
	d, err := os.Open(filepath.Dir(name))
	if err != nil {
		return err
	}
	defer d.Close()
	return d.Sync()
}

// forget makes the kernel forget the partitions of a table that goes.
func (inv *invocation) forget(p *initPlan) error {
	if !p.table {
		return nil
	}
	disk, err := inv.system.BlockByNum(p.t.id.Dev)
	if err != nil {
		return err
	}
	return inv.system.ForgetPartitions(disk)
}

// discard tells the device to forget what is in the places of the new volumes, or all of it.
func (inv *invocation) discard(p *initPlan) error {
	if !p.o.discard {
		return nil
	}
	var places []gpt.Extent
	for _, v := range p.filled() {
		if !v.existing {
			places = append(places, gpt.Extent{Start: v.part.Start, Size: v.part.Size})
		}
	}
	node := p.t.name
	switch {
	case p.t.part && !p.filled()[0].existing:
		node, places = p.t.loc.Path, []gpt.Extent{{Start: p.t.loc.Offset, Size: p.t.size}}
	case p.table:
		places = []gpt.Extent{{Start: 0, Size: p.t.size}}
	}
	for _, e := range places {
		err := blockdev.Discard(node, e.Start, e.Size)
		if errors.Is(err, errors.ErrUnsupported) {
			inv.log.Info("the device knows no discard", "target", p.t.name)
			return nil
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// tellKernel makes the new partitions known. Without that they are there all the same.
func (inv *invocation) tellKernel(p *initPlan) {
	disk, err := inv.system.BlockByNum(p.t.id.Dev)
	for _, v := range p.volumes {
		if err == nil && (!v.inTable || p.t.unmade) {
			_, err = inv.system.AddPartition(disk, v.part.Number, v.part.Start, v.part.Size)
		}
	}
	if err != nil {
		inv.log.Info("the kernel has not taken the new partitions; partprobe tells it", "disk", p.t.name, "err", err)
	}
}

// prepare, fill and finish are the order of the writes: what was there goes; the table, so that the place belongs to nobody
// else; then the volumes without their first sectors; and last these, that of the ESP at the very end. Until then there is a
// blank partition, which the next run takes; afterwards a whole volume.
func (x *making) prepare() error {
	if err := x.makeTable(x.dev); err != nil {
		return err
	}
	for _, v := range x.filled() {
		w, err := x.window(x.dev, v)
		if err != nil {
			return err
		}
		if !v.existing {
			hold, err := x.format(w, v)
			if err != nil {
				return err
			}
			x.held, w = append(x.held, hold), hold
		}
		x.targets = append(x.targets, &replicate.Target{Name: x.volumeName(v), Dev: w, PartGUID: v.part.GUID.String()})
	}
	return nil
}

// finish makes the volumes valid.
func (x *making) finish(ctx context.Context) error {
	for _, hold := range x.held {
		if err := ctx.Err(); err != nil {
			return err
		}
		if err := hold.Release(); err != nil {
			return err
		}
	}
	return nil
}

// makeTable makes a new table, or puts the new partitions into the one that is there.
func (p *initPlan) makeTable(dev blockdev.Device) error {
	if p.t.part {
		return nil
	}
	if p.t.unmade && !p.table {
		if _, err := gpt.Complete(dev); err != nil {
			return err
		}
	}
	var parts []gpt.Partition
	var fresh []*newVolume
	if p.table {
		if err := gpt.Wipe(dev, p.t.found); err != nil {
			return err
		}
	}
	for _, v := range p.volumes {
		if v.inTable {
			continue
		}
		// A partition must be blank when it comes into the table, or a cut would leave one that holds what it held before.
		if err := p.wipe(dev, v); err != nil {
			return err
		}
		parts, fresh = append(parts, v.part), append(fresh, v)
	}
	if p.table {
		return gpt.Create(dev, p.diskGUID, parts)
	}
	if len(parts) == 0 {
		return nil
	}
	// The XBOOTLDR partition first: a disk whose ESP is there has all that it is to have.
	slices.Reverse(parts)
	slices.Reverse(fresh)
	table, err := gpt.Read(dev)
	if err != nil {
		return err
	}
	numbers, err := gpt.Insert(dev, table, parts)
	if err != nil {
		return err
	}
	for i, v := range fresh {
		v.part.Number = numbers[i]
	}
	return nil
}

func (p *initPlan) wipe(dev blockdev.Device, v *newVolume) error {
	w, err := p.window(dev, v)
	if err != nil {
		return err
	}
	found, err := gpt.Recognise(w)
	if err == nil {
		err = p.known(v, found)
	}
	if err != nil {
		return err
	}
	return gpt.Wipe(w, found)
}

// format makes an empty volume whose first sector is not there yet.
func (p *initPlan) format(w blockdev.Device, v *newVolume) (*blockdev.Withheld, error) {
	if v.inTable {
		found, err := gpt.Recognise(w)
		if err == nil {
			err = p.known(v, found)
		}
		if err == nil {
			err = gpt.Wipe(w, found)
		}
		if err != nil {
			return nil, err
		}
	}
	hold, err := blockdev.Withhold(w)
	if err != nil {
		return nil, err
	}
	o := fatdriver.FormatOptions{Type: v.fat, Serial: v.serial, Label: v.label}
	if hidden := v.part.Start / int64(w.SectorSize()); hidden <= 0xffffffff {
		o.HiddenSectors = uint32(hidden)
	}
	o.LabelTime, _ = sourceDate()
	if err := fatdriver.Format(hold, o); err != nil {
		return nil, err
	}
	vol, err := fatdriver.Open(hold)
	if err != nil {
		return nil, fmt.Errorf("internal error: the new volume cannot be read: %w", err)
	}
	v.form = vol.Geometry()
	return hold, nil
}

// fill fills the volumes, and returns the error of each disk besides that of the source. They are no members yet, and hold no
// set file: a disk that is booted while the members do not know of it has nothing to tell them, and an ESP that lost its memory
// (it would be named there, and have no state) is another thing. The words of their loader entries are their own already.
func fill(inv *invocation, m *members, all []*making, o replicate.Options) ([]error, error) {
	errs := make([]error, len(all))
	latest, err := sourceDate()
	if err != nil {
		return errs, err
	}
	var jobs []replicate.Job
	type owner struct {
		at int
		v  *newVolume
	}
	var owners [][]owner
	for _, boot := range []bool{true, false} { // in the order in which the volumes become valid
		var job replicate.Job
		var of []owner
		var from *members
		var set *replicate.Set
		for i, x := range all {
			for k, v := range x.filled() {
				if v.boot() != boot || v.from == nil {
					continue
				}
				t := x.targets[k]
				if e := x.esp(); boot && e != nil {
					t.Member, t.Set = e.part.GUID.String(), x.set
				}
				from, job.Targets, of = v.from, append(job.Targets, t), append(of, owner{i, v})
				if x.set != nil {
					set = x.set
				}
			}
		}
		if from == nil {
			continue
		}
		opt := o
		opt.Selection = inv.selection()
		opt = from.options(opt)
		opt.Random = o.Random
		opt.Member, opt.Save, opt.Try, opt.SourceTree, opt.Set = false, nil, nil, nil, set
		if err := opt.Selection.Check(from.src); errors.Is(err, replicate.ErrEmptySelection) && boot {
			continue
		}
		opt.Selection.Exclude = append(slices.Clone(opt.Selection.Exclude), replicate.SetPath)
		job.Source, job.Options = replicate.Adapt(from.src, latest), opt
		jobs, owners = append(jobs, job), append(owners, of)
	}
	if len(jobs) == 0 {
		return errs, nil
	}
	results, err := inv.engine.sync(inv.ctx, jobs)
	for j, rs := range results {
		for k, r := range rs {
			owners[j][k].v.changes = r.Summary.Changes
			switch at := &errs[owners[j][k].at]; {
			case *at == nil:
				*at = r.Err
			case r.Err != nil:
				*at = fmt.Errorf("%w; %w", *at, r.Err) // they share a disk: one of them says what it was, the other what it saw of it
			}
		}
	}
	return errs, err
}

// seedOf makes a random seed where it was asked for.
func (inv *invocation) seedOf(p *initPlan, v *newVolume) error {
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

// initReport is the result of init.
type initReport struct {
	failure
	Command string       `json:"command"`
	DryRun  bool         `json:"dry_run"`
	Primary string       `json:"primary"`
	Targets []initResult `json:"targets"`
	Set     *setReport   `json:"set,omitempty"`

	quiet bool
}

// initResult is what becomes of one target.
type initResult struct {
	Target     string          `json:"target"`
	Size       int64           `json:"disk_size_bytes"`
	Sector     int             `json:"sector_size_bytes"`
	NewImage   bool            `json:"new_image"`
	NewTable   bool            `json:"new_table"`
	DiskGUID   string          `json:"disk_guid,omitempty"`
	Partitions []initPartition `json:"partitions"`
	Found      []initFound     `json:"overwritten"`
	Notes      []string        `json:"notes"`
	Made       bool            `json:"made"`
	Joins      bool            `json:"joins_set"`
	Left       []string        `json:"left_to_do"`
	Error      *jsonError      `json:"error,omitempty"`

	done bool // there was nothing to make
}

type initPartition struct {
	Number  int    `json:"number"`
	Name    string `json:"name"`
	Type    string `json:"partition_type"`
	GUID    string `json:"partition_guid"`
	Label   string `json:"partition_label"`
	Offset  int64  `json:"offset_bytes"`
	Size    int64  `json:"size_bytes"`
	State   string `json:"state"` // new, blank partition, resumed, table only
	FATType string `json:"fat_type,omitempty"`
	Cluster int    `json:"cluster_bytes,omitempty"`
	Count   uint32 `json:"clusters,omitempty"`
	Serial  string `json:"serial,omitempty"`
	FATName string `json:"label,omitempty"`
}

type initFound struct {
	Off  int64  `json:"offset_bytes"`
	What string `json:"what"`
}

func (r *initReport) fill(plans []*initPlan) {
	r.Targets = make([]initResult, len(plans))
	for i, p := range plans {
		r.Targets[i].fill(p)
	}
}

func (r *initResult) fill(p *initPlan) {
	r.Target, r.Size, r.Sector, r.NewImage, r.NewTable = p.t.name, p.t.size, p.t.sector, p.t.create, p.table
	r.Made, r.done, r.Error = p.made, p.done, newJSONError(p.err)
	r.Joins, r.Notes, r.Left = p.join, append([]string{}, p.notes...), append([]string{}, p.todo...)
	if p.table {
		r.DiskGUID = p.diskGUID.String()
	}
	r.Found, r.Partitions = []initFound{}, []initPartition{}
	for _, f := range p.found {
		r.Found = append(r.Found, initFound{f.Off, f.What})
	}
	for _, v := range p.volumes {
		q := initPartition{Number: v.part.Number, Name: p.volumeName(v), Type: v.part.TypeName(), GUID: v.part.GUID.String(), Label: v.part.Name,
			Offset: v.part.Start, Size: v.part.Size, State: "table only"}
		if v.fill {
			q.FATType, q.Cluster, q.Count, q.Serial, q.FATName = v.form.Type.String(), v.form.ClusterSize, v.form.Clusters, formatSerial(v.serial), v.label
			switch q.State = "new"; {
			case p.done:
				q.State = "member"
			case v.existing:
				q.State = "resumed"
			case v.inTable:
				q.State = "formatted"
			}
		}
		r.Partitions = append(r.Partitions, q)
	}
}

func (r *initReport) print(o *output) {
	if r.quiet {
		return
	}
	t := newTable("VOLUME", "TYPE", "PARTITION GUID", "PARTLABEL", "START", "SIZE", "FAT", "SERIAL", "LABEL", "STATE")
	t.spare = []string{"PARTITION GUID", "PARTLABEL"}
	var left []string
	joins, some := false, false
	for i := range r.Targets {
		x := &r.Targets[i]
		if !r.DryRun && !x.Made && !x.done {
			continue // the error says why
		}
		some = true
		of := ""
		if len(r.Targets) > 1 {
			of = safe(x.Target) + ": "
		}
		for _, f := range x.Found {
			o.printf("%soverwritten: %s at 0x%x\n", of, safe(f.What), f.Off)
		}
		for _, n := range x.Notes {
			o.printf("%snote: %s\n", of, safe(n))
		}
		if x.NewTable && r.DryRun {
			o.printf("new partition table on %s: %s in sectors of %d bytes\n", safe(x.Target), sizeText(x.Size), x.Sector)
		}
		for _, v := range x.Partitions {
			t.row(cell{text: v.Name}, cell{text: v.Type}, cell{text: v.GUID}, cell{text: v.Label}, cell{text: sizeText(v.Offset), right: true},
				cell{text: sizeText(v.Size), right: true}, cell{text: v.FATType}, cell{text: v.Serial}, cell{text: v.FATName}, cell{text: v.State})
		}
		joins = joins || x.Joins
		left = append(left, x.Left...)
	}
	if !some {
		return
	}
	t.print(o)
	if r.Set != nil {
		r.Set.print(o)
	} else if joins && r.DryRun {
		o.printf("%s the replica set of %s\n", map[bool]string{true: "it joins", false: "they join"}[len(r.Targets) == 1], safe(r.Primary))
	}
	if len(left) > 0 {
		o.printf("left to do:\n")
		for _, line := range left {
			o.printf("  %s\n", safe(line))
		}
	}
}
