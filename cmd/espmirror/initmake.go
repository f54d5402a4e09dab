//go:build !initrd

package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"reflect"
	"slices"

	"espmirror/blockdev"
	"espmirror/fatdriver"
	"espmirror/gpt"
	"espmirror/replicate"
)

// making is a plan that is being carried out.
type making struct {
	*initPlan
	disk    *blockdev.Disk
	dev     blockdev.Device      // of the disk, or the partition itself
	held    []*blockdev.Withheld // the volumes whose first sectors are not there yet
	targets []*replicate.Target  // of the volumes that are filled, in their order
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
// with many targets that is a long time. All of it is looked at before anything is written, or discarded.
func (x *making) unchanged() error {
	if x.t.create {
		return nil
	}
	if err := x.sameDisk(); err != nil {
		return err
	}
	for _, v := range x.volumes {
		if v.existing {
			continue
		}
		w, err := x.window(x.dev, v)
		if err != nil {
			return err
		}
		if _, err := x.recognise(w, v); err != nil {
			return err
		}
	}
	return nil
}

// sameDisk returns gpt.ErrChanged when the table of a disk, or what is on the disk as a whole, is not that of the plan.
func (x *making) sameDisk() error {
	t := x.t
	if t.part {
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

// recognise finds out what is in the place of a volume, and returns gpt.ErrChanged when that is not what was there for the plan.
func (p *initPlan) recognise(w blockdev.Device, v *newVolume) ([]gpt.Signature, error) {
	found, err := gpt.Recognise(w)
	if err != nil {
		return nil, err
	}
	return found, p.known(v, found)
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
		w, err := p.window(dev, v)
		if err != nil {
			return err
		}
		if err := p.wipe(w, v); err != nil {
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

// wipe makes the place of a volume blank.
func (p *initPlan) wipe(w blockdev.Device, v *newVolume) error {
	found, err := p.recognise(w, v)
	if err != nil {
		return err
	}
	return gpt.Wipe(w, found)
}

// format makes an empty volume whose first sector is not there yet.
func (p *initPlan) format(w blockdev.Device, v *newVolume) (*blockdev.Withheld, error) {
	if v.inTable {
		if err := p.wipe(w, v); err != nil {
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
