//go:build !initrd

package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"

	"espmirror/blockdev"
	"espmirror/fatdriver"
	"espmirror/gpt"
	"espmirror/replicate"
)

// init makes a new member.
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
	t, err := inv.findInitTarget(o)
	if err != nil {
		return nil, err
	}
	if t.part && (o.like != "" || o.newTable || o.espSize != 0 || o.bootSize > 0 || o.partLabel != "" || o.size != 0) {
		return nil, usagef("%s is a partition: it keeps its size and its name, and the table stays as it is", t.name)
	}
	reg, err := inv.registration()
	if err == nil {
		err = reg.check(t.name, t.loc)
	}
	if err != nil {
		return nil, err
	}
	if err := inv.guardInit(t, m); err != nil {
		return nil, err
	}
	if err := m.sourcesOfInit(); err != nil {
		return nil, err
	}
	p, err := inv.planInit(o, t, m)
	if err != nil {
		return nil, err
	}
	rep := &initReport{Command: initVerb, DryRun: o.dry, Target: t.name, Primary: m.primary.name, Partitions: []initPartition{},
		Found: []initFound{}, Notes: []string{}, Left: []string{}, quiet: inv.quiet}
	// All of it on a copy first: what does not fit is known before anything is written.
	if err := inv.rehearse(p, m); err != nil {
		return nil, err
	}
	p.todo = p.leftToDo(inv)
	if err := reg.ofInit(p, m); err != nil {
		return nil, err
	}
	if line := bootEntry(p, m); line != "" && reg == nil {
		p.todo = append(p.todo, line)
	}
	rep.fill(p)
	if o.dry {
		return rep, nil
	}
	if !p.done {
		if err := inv.carryOut(p, m); err != nil {
			return rep, p.afterwards(err)
		}
		rep.Made = true
	}
	rep.fill(p)
	v := p.esp()
	m.close()
	if v == nil {
		return rep, nil
	}
	if !p.join {
		return rep, p.afterwards(inv.seedOf(p, v))
	}
	name := t.name
	if !t.part {
		loc, err := inv.finder().Part(t.name, v.part.Number)
		if err != nil {
			return rep, p.afterwards(fmt.Errorf("cannot add %s: %w", p.volumeName(v), err))
		}
		name = loc.String()
	}
	p.wrote = true // add tells by itself what it did
	inv.random = o.random("join")
	set, err := inv.changeSetOf("add", []string{name})
	if r, ok := set.(*setReport); ok {
		rep.Set = r
	}
	if err != nil {
		return rep, p.afterwards(err)
	}
	return rep, p.afterwards(inv.seedOf(p, v))
}

// afterwards sees to it that no exit status says "nothing was written" any more.
func (p *initPlan) afterwards(err error) error {
	if err == nil || !p.wrote || errors.Is(err, context.Canceled) || exitCode(err) != exitRefused {
		return err
	}
	return &targetsError{verb: initVerb, errs: []error{err}, total: 1, wrote: true}
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

// rehearse carries the plan out in memory, and keeps what comes of it: numbers of partitions, geometry of volumes.
func (inv *invocation) rehearse(p *initPlan, m *members) error {
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
	if err := p.look(inv, dev, m); err != nil || p.done {
		return err
	}
	if err := p.make(inv.ctx, dev, m, replicate.Options{DryRun: true, Log: inv.engineLog(true)}); err != nil {
		if !errors.Is(err, context.Canceled) {
			err = refusal{err} // nothing was written
		}
		return fmt.Errorf("cannot init %s: %w", p.t.name, err)
	}
	return nil
}

// carryOut does what was planned.
func (inv *invocation) carryOut(p *initPlan, m *members) (err error) {
	t := p.t
	fail := func(err error) error {
		return withHint(fmt.Errorf("cannot init %s: %w", t.name, err), "nothing of it is in use; when the cause is gone, the same command goes on")
	}
	if t.id.Block {
		locks, err := inv.system.LockDisks(inv.ctx, lockWait, t.id)
		if err != nil {
			return err
		}
		defer locks.Release()
	}
	if t.create {
		p.wrote = true
		if err := makeFile(t.name, t.size); err != nil {
			return fail(err)
		}
	}
	var dev blockdev.Device
	var disk *blockdev.Disk
	if t.part {
		v, err := t.loc.Open(blockdev.ReadWrite)
		if err != nil {
			return fmt.Errorf("cannot init %s: %w", t.name, err)
		}
		dev, disk = v, v.Disk()
	} else {
		disk, err = blockdev.Open(t.name, blockdev.ReadWrite, blockdev.WithSystem(inv.system), blockdev.WithSectorSize(t.sector))
		if err != nil {
			return fmt.Errorf("cannot init %s: %w", t.name, err)
		}
		dev = disk
		if disk.Size() != t.size || !t.create && disk.ID() != t.id {
			return errors.Join(fail(gpt.ErrChanged), disk.Close())
		}
	}
	defer func() {
		if cerr := disk.Close(); err == nil && cerr != nil {
			err = fail(cerr)
		}
		if err == nil && disk.IsBlock() && !t.part {
			inv.tellKernel(p)
		}
	}()
	p.wrote = true
	dev = inv.device(dev)
	if err := dev.Invalidate(); err != nil {
		return fail(err)
	}
	if disk.IsBlock() {
		if err := inv.forget(p); err != nil {
			return fail(err)
		}
		if err := inv.discard(p); err != nil {
			return fail(err)
		}
	} else {
		dev = blockdev.Sparse(dev)
	}
	bar := inv.startProgress()
	defer bar.stop()
	if err := p.make(inv.ctx, dev, m, replicate.Options{Log: inv.engineLog(false), Progress: bar.callback()}); err != nil {
		return fail(err)
	}
	// What this node has cached is not what the nodes of the partitions read.
	return dev.Invalidate()
}

// makeFile makes an image file of zeros, all of it a hole.
func makeFile(name string, size int64) error {
	f, err := os.OpenFile(name, os.O_RDWR|os.O_CREATE, 0o644)
	if err != nil {
		return err
	}
	err = f.Truncate(size)
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

// make is the order of the writes: what was there goes; the table, so that the place belongs to nobody else; then the
// volumes without their first sectors; and last these, that of the ESP at the very end. Until then there is a blank
// partition, which the next run takes; afterwards a whole volume.
func (p *initPlan) make(ctx context.Context, dev blockdev.Device, m *members, o replicate.Options) error {
	if err := p.makeTable(dev); err != nil {
		return err
	}
	var held []*blockdev.Withheld
	var targets []*replicate.Target
	for _, v := range p.filled() {
		w, err := p.window(dev, v)
		if err != nil {
			return err
		}
		if !v.existing {
			hold, err := p.format(w, v)
			if err != nil {
				return err
			}
			held, w = append(held, hold), hold
		}
		targets = append(targets, &replicate.Target{Name: p.volumeName(v), Dev: w, PartGUID: v.part.GUID.String()})
	}
	if err := p.replicate(ctx, m, targets, o); err != nil {
		return err
	}
	for _, hold := range held {
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
		return gpt.Create(dev, p.disk, parts)
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

// replicate fills the volumes. They are no members yet, and hold no set file: a disk that is booted while the members do
// not know of it has nothing to tell them, and an ESP that lost its memory (it would be named there, and have no state) is
// another thing. The words of its loader entries are its own already.
func (p *initPlan) replicate(ctx context.Context, m *members, targets []*replicate.Target, o replicate.Options) error {
	m.inv.random = p.o.random("fill")
	latest, _ := sourceDate()
	var jobs []replicate.Job
	for i, v := range p.filled() {
		if v.from == nil {
			continue
		}
		job := replicate.Job{Source: v.from.src, Targets: targets[i : i+1]}
		opt := o
		opt.Selection = m.inv.selection()
		opt = v.from.options(opt)
		opt.Member, opt.Save, opt.Try, opt.SourceTree, opt.Set = false, nil, nil, nil, p.set
		if err := opt.Selection.Check(v.from.src); errors.Is(err, replicate.ErrEmptySelection) && v.boot() {
			continue
		}
		if e := p.esp(); v.boot() && e != nil {
			targets[i].Member, targets[i].Set = e.part.GUID.String(), p.set
		}
		opt.Selection.Exclude = append(slices.Clone(opt.Selection.Exclude), replicate.SetPath)
		job.Source = replicate.Adapt(v.from.src, latest)
		job.Options = opt
		jobs = append(jobs, job)
	}
	if len(jobs) == 0 {
		return nil
	}
	results, err := m.inv.engine.sync(ctx, jobs)
	if err != nil {
		return err
	}
	var failed error
	for _, rs := range results {
		for _, r := range rs {
			switch {
			case failed == nil:
				failed = r.Err
			case r.Err != nil:
				failed = fmt.Errorf("%w; %w", failed, r.Err) // they share a disk: one of them says what it was, the other what it saw of it
			}
		}
	}
	return failed
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
	Command    string          `json:"command"`
	DryRun     bool            `json:"dry_run"`
	Target     string          `json:"target"`
	Primary    string          `json:"primary"`
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
	Set        *setReport      `json:"set,omitempty"`
	Left       []string        `json:"left_to_do"`

	quiet bool
	done  bool // there was nothing to make
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

func (r *initReport) fill(p *initPlan) {
	r.Size, r.Sector, r.NewImage, r.NewTable, r.done = p.t.size, p.t.sector, p.t.create, p.table, p.done
	r.Joins, r.Notes, r.Left = p.join, append([]string{}, p.notes...), append([]string{}, p.todo...)
	if p.table {
		r.DiskGUID = p.disk.String()
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
	if r.quiet || !r.DryRun && !r.Made && !r.done {
		return // the error says why
	}
	for _, f := range r.Found {
		o.printf("overwritten: %s at 0x%x\n", safe(f.What), f.Off)
	}
	for _, n := range r.Notes {
		o.printf("note: %s\n", safe(n))
	}
	if r.NewTable && r.DryRun {
		o.printf("new partition table on %s: %s in sectors of %d bytes\n", safe(r.Target), sizeText(r.Size), r.Sector)
	}
	t := newTable("VOLUME", "TYPE", "PARTITION GUID", "PARTLABEL", "START", "SIZE", "FAT", "SERIAL", "LABEL", "STATE")
	t.spare = []string{"PARTITION GUID", "PARTLABEL"}
	for _, v := range r.Partitions {
		t.row(cell{text: v.Name}, cell{text: v.Type}, cell{text: v.GUID}, cell{text: v.Label}, cell{text: sizeText(v.Offset), right: true},
			cell{text: sizeText(v.Size), right: true}, cell{text: v.FATType}, cell{text: v.Serial}, cell{text: v.FATName}, cell{text: v.State})
	}
	t.print(o)
	if r.Set != nil {
		r.Set.print(o)
	} else if r.Joins && r.DryRun {
		o.printf("it joins the replica set of %s\n", safe(r.Primary))
	}
	if len(r.Left) > 0 {
		o.printf("left to do:\n")
		for _, line := range r.Left {
			o.printf("  %s\n", safe(line))
		}
	}
}
