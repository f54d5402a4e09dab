//go:build !initrd

package main

import (
	"errors"
	"fmt"
	"path/filepath"
	"strconv"
	"strings"

	"espmirror/blockdev"
	"espmirror/fatdriver"
	"espmirror/gpt"
	"espmirror/replicate"
)

// planInit works out what will be made: table, partitions, volumes. It reads, and refuses.
func (inv *invocation) planInit(o *initOptions, t *initTarget, m *members) (*initPlan, error) {
	p := &initPlan{o: o, t: t}
	var err error
	switch {
	case t.part:
		err = p.takePartition(inv, m)
	case o.like != "":
		err = p.likeDisk(inv, m)
	case t.create || o.newTable:
		err = p.newTable(m)
	case t.table != nil && !t.table.MBR:
		err = p.intoTable(inv, m)
	case t.err != nil && !errors.Is(t.err, gpt.ErrNoTable) && !o.force:
		err = withHint(refusef("cannot init %s: %w; it holds %s", t.name, t.err, listSignatures(t.found)),
			"mend the table (`sgdisk --verify %s`), or overwrite it with --new-table --force", quoted(t.name))
	default:
		err = p.newTable(m)
	}
	if err != nil {
		return nil, err
	}
	for _, v := range p.volumes {
		if !v.fill || v.existing {
			continue
		}
		if err := o.identity(v); err != nil {
			return nil, err
		}
		if !v.boot() {
			v.fat = o.fat
		}
		if serial := formatSerial(v.serial); v.from != nil && v.from.primary.serial == serial {
			return nil, withHint(refusef("cannot init %s: its serial number would be that of %s, %s", t.name, v.from.primary.name, serial), "use another --seed")
		}
	}
	return p, nil
}

func formatSerial(n uint32) string { return fmt.Sprintf("%04X-%04X", n>>16, n&0xffff) }

// listSignatures names what was found, each with its place.
func listSignatures(found []gpt.Signature) string {
	var words []string
	for _, s := range found {
		words = append(words, fmt.Sprintf("%s (at 0x%x)", s.What, s.Off))
	}
	if len(words) == 0 {
		return "nothing that is known"
	}
	if n := len(words); n > 8 {
		words = append(words[:8], fmt.Sprintf("%d more", n-8))
	}
	return strings.Join(words, ", ")
}

// wantedSize is what the ESP or the XBOOTLDR partition should have, in bytes.
type wantedSize struct {
	size  int64
	least int64 // for twice what is selected
	fixed bool  // given on the command line
}

// room is what the selection of a primary takes, with as much again.
func room(m *members) (int64, error) {
	o := m.options(replicate.Options{Selection: m.inv.selection()})
	n, err := o.Selection.Bytes(m.src, 4096)
	if errors.Is(err, replicate.ErrEmptySelection) && m.esp != nil {
		return leastVolume, nil // the partition is there for entries to come
	}
	return 2*n + leastVolume, err
}

// wanted are the partitions that the primary and the options ask for.
func (p *initPlan) wanted(m *members, esp, boot bool) ([]*newVolume, []wantedSize, error) {
	var vs []*newVolume
	var ws []wantedSize
	add := func(typ gpt.GUID, name string, from *members, like, given int64) error {
		w := wantedSize{size: like, fixed: given > 0}
		if from != nil {
			var err error
			if w.least, err = room(from); err != nil {
				return err
			}
		}
		w.size = max(w.size, w.least)
		if w.fixed {
			w.size = given
		}
		w.size = (w.size + gpt.Align - 1) / gpt.Align * gpt.Align
		vs, ws = append(vs, &newVolume{part: gpt.Partition{Type: typ, Name: name}, fill: true, from: from}), append(ws, w)
		return nil
	}
	size := func(x *members, otherwise int64) int64 {
		if x != nil && x.primary.loc != nil {
			return x.primary.loc.Size
		}
		return otherwise
	}
	if esp {
		name := espName
		if p.o.partLabel != "" {
			name = p.o.partLabel
		}
		if err := add(gpt.TypeESP, name, m, size(m, defaultESP), p.o.espSize); err != nil {
			return nil, nil, err
		}
	}
	if boot && (p.o.bootSize > 0 || p.o.bootSize == 0 && m.boot != nil) {
		if err := add(gpt.TypeXBOOTLDR, bootName, m.boot, size(m.boot, p.o.bootSize), p.o.bootSize); err != nil {
			return nil, nil, err
		}
	}
	return vs, ws, nil
}

// place puts partitions into the first free part of a disk that has room for all of them; else into the largest, where
// those that nobody gave a size share what is there.
func place(free []gpt.Extent, ws []wantedSize) ([]gpt.Extent, error) {
	var total, fixed, flexible int64
	for _, w := range ws {
		if total += w.size; w.fixed {
			fixed += w.size
		} else {
			flexible += w.size
		}
	}
	var largest gpt.Extent
	for _, e := range free {
		if e.Size >= total {
			largest = e
			break
		}
		if e.Size > largest.Size {
			largest = e
		}
	}
	out := make([]gpt.Extent, len(ws))
	at := largest.Start
	for i, w := range ws {
		n := w.size
		if largest.Size < total && !w.fixed {
			n = int64(float64(largest.Size-fixed)*(float64(w.size)/float64(flexible))) / gpt.Align * gpt.Align
		}
		if n < gpt.Align || at+n > largest.End() {
			return nil, fmt.Errorf("%w: the largest free part has %d bytes, and %d are needed", gpt.ErrNoRoom, largest.Size, total)
		}
		out[i] = gpt.Extent{Start: at, Size: n}
		at += n
	}
	return out, nil
}

// lay gives new partitions their places.
func (p *initPlan) lay(free []gpt.Extent, vs []*newVolume, ws []wantedSize) error {
	places, err := place(free, ws)
	if err != nil {
		return refusal{fmt.Errorf("cannot init %s: %w", p.t.name, err)}
	}
	for i, v := range vs {
		v.part.Start, v.part.Size = places[i].Start, places[i].Size
		role := "esp"
		if v.boot() {
			role = "xbootldr"
		}
		if v.part.GUID, err = p.o.guid(role); err != nil {
			return err
		}
		if v.part.Size < ws[i].least {
			p.notes = append(p.notes, fmt.Sprintf("the %s has less room than for twice what is selected: an update may not find room for old and new side by side", v.part.TypeName()))
		}
	}
	p.volumes = append(p.volumes, vs...)
	return nil
}

// clear refuses a disk that holds anything, unless it may be overwritten.
func (p *initPlan) clear() error {
	t := p.t
	if gpted := t.table != nil && !t.table.MBR || t.err != nil && !errors.Is(t.err, gpt.ErrNoTable); gpted && !p.o.newTable {
		return withHint(refusef("cannot init %s: it has a partition table: it holds %s", t.name, listSignatures(t.found)), "--new-table --force overwrites all of that")
	}
	if len(t.found) > 0 && !p.o.force {
		return withHint(refusef("cannot init %s: it holds %s", t.name, listSignatures(t.found)), "--force overwrites all of that; a GPT is only replaced with --new-table besides")
	}
	p.found, p.table = t.found, true
	return nil
}

// newTable lays out a disk from the beginning.
func (p *initPlan) newTable(m *members) error {
	if err := p.clear(); err != nil {
		return err
	}
	vs, ws, err := p.wanted(m, true, true)
	if err != nil {
		return err
	}
	for i, v := range vs {
		v.part.Number = i + 1
	}
	if p.diskGUID, err = p.o.guid("disk"); err != nil {
		return err
	}
	return p.lay(gpt.FreeExtents(p.t.size, p.t.sector, nil), vs, ws)
}

// likeDisk copies the layout of another disk: numbers, types, names, places; GUIDs are new.
func (p *initPlan) likeDisk(inv *invocation, m *members) error {
	fail := func(err error) error { return fmt.Errorf("cannot copy the layout of %s: %w", p.o.like, err) }
	whole, err := inv.finder().Whole(p.o.like)
	if err != nil {
		return fail(err)
	}
	d, err := blockdev.Open(p.o.like, blockdev.ReadOnly, blockdev.WithSystem(inv.system))
	if err != nil {
		return fail(err)
	}
	defer d.Close()
	table, err := gpt.Read(d)
	if err == nil && (table.MBR || len(table.Problems) > 0) {
		err = withHint(fmt.Errorf("%w: it is no sound GPT", gpt.ErrUnsound), "`sgdisk --verify %s` tells what is wrong", quoted(p.o.like))
	}
	if err != nil {
		return refusal{fail(err)}
	}
	if p.t.loc != nil {
		if same, err := gpt.SameVolume(whole, p.t.loc); err != nil {
			return fail(err)
		} else if same {
			return usagef("--like=%s is the disk that is to be made", p.o.like)
		}
	}
	if err := p.clear(); err != nil {
		return err
	}
	if p.diskGUID, err = p.o.guid("disk"); err != nil {
		return err
	}
	first, end := gpt.Usable(p.t.size, p.t.sector)
	var esp, boot bool
	for _, q := range table.Partitions {
		if sector := int64(p.t.sector); q.Start%sector != 0 || q.Size%sector != 0 {
			return refusef("cannot init %s: partition %d of %s, 0x%x bytes at 0x%x, cannot be copied: the sectors have %d bytes, and it is not made of whole ones",
				p.t.name, q.Number, p.o.like, q.Size, q.Start, sector)
		}
		if q.Start < first || q.End() > end {
			return refusef("cannot init %s: %w for partition %d of %s, 0x%x bytes at 0x%x: the disk has 0x%x bytes in sectors of %d",
				p.t.name, gpt.ErrNoRoom, q.Number, p.o.like, q.Size, q.Start, p.t.size, p.t.sector)
		}
		v := &newVolume{part: q}
		role := fmt.Sprintf("partition %d", q.Number)
		switch {
		case q.Type == gpt.TypeESP && !esp:
			v.fill, v.from, role, esp = true, m, "esp", true
			if p.o.partLabel != "" {
				v.part.Name = p.o.partLabel
			}
		case q.Type == gpt.TypeXBOOTLDR && !boot && p.o.bootSize >= 0:
			v.fill, v.from, role, boot = true, m.boot, "xbootldr", true
		default:
			w, err := blockdev.Window(d, q.Start, q.Size)
			if err == nil {
				v.holds, err = gpt.Probe(w)
			}
			if err != nil {
				inv.log.Warn("cannot see what a partition holds", "disk", p.o.like, "partition", q.Number, "err", err)
			}
		}
		if v.part.GUID, err = p.o.guid(role); err != nil {
			return err
		}
		p.volumes = append(p.volumes, v)
	}
	if !esp {
		return refusef("cannot init %s: %s has no ESP", p.t.name, p.o.like)
	}
	return nil
}

// intoTable uses a GPT that is there: its ESP when that is blank or was made by an earlier run, else free space.
func (p *initPlan) intoTable(inv *invocation, m *members) error {
	t := p.t
	if len(t.table.Problems) > 0 {
		return withHint(refusef("cannot init %s: %w: %s", t.name, gpt.ErrUnsound, t.table.Problems[0]), "mend it first, with sgdisk or gdisk")
	}
	needESP, needBoot := true, true
	for _, typ := range []gpt.GUID{gpt.TypeESP, gpt.TypeXBOOTLDR} { // the ESP says whether all of it is done
		there := t.table.OfType(typ)
		if len(there) == 0 || typ == gpt.TypeXBOOTLDR && m.boot == nil && p.o.bootSize <= 0 {
			continue
		}
		v := &newVolume{part: *there[0], fill: true, inTable: true, from: m}
		if v.boot() {
			needBoot, v.from = false, m.boot
		} else {
			needESP = false
		}
		if len(there) > 1 {
			return withHint(refusef("cannot init %s: it has %d partitions of type %s", t.name, len(there), v.part.TypeName()), "name one of them, such as %s@@p%d", quoted(t.name), there[0].Number)
		}
		size, label := p.o.espSize, p.o.partLabel
		if v.boot() {
			size, label = max(p.o.bootSize, 0), ""
		}
		if size = (size + gpt.Align - 1) / gpt.Align * gpt.Align; size != 0 && size != v.part.Size || label != "" && label != v.part.Name {
			return refusef("cannot init %s: it has a partition of type %s, %q with 0x%x bytes, which stays as it is: it was to be %s", t.name,
				v.part.TypeName(), v.part.Name, v.part.Size, asked(size, label))
		}
		if p.o.force && (typ == gpt.TypeESP || p.o.bootSize > 0) {
			// What is overwritten in a table that stays is named by its own name.
			p.notes = append(p.notes, fmt.Sprintf("--force has no effect on partition %d, which the table has: name it to overwrite it", v.part.Number))
		}
		p.volumes = append(p.volumes, v)
	}
	vs, ws, err := p.wanted(m, needESP, needBoot)
	if err != nil || len(vs) == 0 {
		return err
	}
	return p.lay(gpt.FreeExtents(t.size, t.sector, t.table), vs, ws)
}

// asked is what the command line wants of a partition.
func asked(size int64, label string) string {
	var all []string
	if label != "" {
		all = append(all, strconv.Quote(label))
	}
	if size != 0 {
		all = append(all, fmt.Sprintf("0x%x bytes", size))
	}
	return strings.Join(all, " with ")
}

// takePartition uses the partition that was named.
func (p *initPlan) takePartition(inv *invocation, m *members) error {
	v := &newVolume{part: *p.t.loc.Part, fill: true, inTable: true, from: m}
	if v.boot() {
		if m.boot == nil {
			return refusef("cannot init %s: it is an XBOOTLDR partition, and the primary's disk has none", p.t.name)
		}
		v.from = m.boot
	}
	p.volumes = append(p.volumes, v)
	return nil
}

// look judges what is in the place of each volume.
func (p *initPlan) look(inv *invocation, dev blockdev.Device, m *members) error {
	unknown := false
	for _, v := range p.volumes {
		w, err := p.window(dev, v)
		if err != nil {
			return err
		}
		found, err := gpt.Recognise(w)
		if err != nil {
			return refusal{fmt.Errorf("cannot init %s: %w", p.t.name, err)}
		}
		// Who forces a partition that is named wants it made anew, whatever there is.
		if v.inTable && v.fill && !(p.o.force && p.t.part) {
			if err := p.lookVolume(inv, w, v, m); err != nil {
				return err
			}
			if v.existing {
				continue
			}
		}
		if len(found) == 0 {
			if dirty, err := gpt.Dirty(w); err != nil {
				return refusal{fmt.Errorf("cannot init %s: %w", p.t.name, err)}
			} else if dirty && p.table && v.fill {
				unknown = true
			} else if dirty && !p.table {
				p.notes = append(p.notes, fmt.Sprintf("partition %d: there are bytes in its place that nobody knows; they are overwritten", v.part.Number))
			}
			continue
		}
		for i := range found {
			found[i].Off += v.part.Start
		}
		if !p.o.force || v.inTable && !p.t.part {
			name, hint := "the place of the new partition", "--force overwrites it"
			if v.inTable {
				name = fmt.Sprintf("partition %d, of type %s,", v.part.Number, v.part.TypeName())
				hint = fmt.Sprintf("`espmirror add %s` takes it into the set as it is; to overwrite it name the partition: `espmirror init --force %s`",
					quoted(p.volumeName(v)), quoted(p.volumeName(v)))
			}
			return withHint(refusef("cannot init %s: %s holds %s", p.t.name, name, listSignatures(found)), "%s", hint)
		}
		p.found = append(p.found, found...)
	}
	if p.table && len(p.found) == 0 {
		dirty, err := gpt.Dirty(dev, gpt.TableExtents(p.t.size, p.t.sector)...)
		switch {
		case err != nil:
			return refusal{fmt.Errorf("cannot init %s: %w", p.t.name, err)}
		case (dirty || unknown) && !p.t.id.Block && !p.o.force:
			// A disk without a signature is a disk to be used. A file may be anything that somebody wrote.
			return withHint(refusef("cannot init %s: the file is not empty, and what is in it is no disk image that is known", p.t.name), "--force overwrites it")
		case dirty || unknown:
			p.notes = append(p.notes, "there are bytes that nobody knows; they are overwritten")
		}
	}
	return nil
}

// lookVolume finds out whether an earlier run has made the volume already.
func (p *initPlan) lookVolume(inv *invocation, w blockdev.Device, v *newVolume, m *members) error {
	what, err := gpt.Probe(w)
	if err != nil || what != gpt.FSFAT {
		return nil
	}
	vol, err := fatdriver.Open(w)
	if err != nil {
		return nil
	}
	made, err := replicate.Inspect(p.t.name, vol)
	if err != nil {
		return nil
	}
	guid := v.part.GUID.String()
	switch {
	case m.set != nil && m.set.Has(guid) && (made.Member || made.Set != nil && made.Set.Has(guid)):
		p.done, v.existing = true, true
	case v.boot() && p.done:
		v.existing = true
	case made.Member || made.Set != nil:
		// It is of another set, or has been.
	case made.Journal || made.Empty:
		// It was written by a run, and has never been told of a generation: it may be what a run left that did not come to its
		// end, which keepsAll finds out. One without any file is as good as new.
		v.existing, v.unsure, v.empty, v.named = true, true, made.Empty, m.set != nil && m.set.Has(guid)
	}
	if v.existing {
		v.serial, v.label, v.form = vol.Geometry().Serial, made.Label, vol.Geometry()
	}
	return nil
}

// keepsAll refuses a volume that is there and is not what this command makes: init deletes and replaces nothing that a person may
// have put there, and gives nothing another identity.
func (p *initPlan) keepsAll() error {
	for _, v := range p.volumes {
		if !v.unsure && !(p.done && v.existing) {
			continue
		}
		why := ""
		want := newVolume{part: v.part}
		if err := p.o.identity(&want); err != nil {
			return err
		}
		for _, c := range v.changes {
			if why == "" && (c.Op != "create" || p.o.seed != "" && !v.empty) {
				why = fmt.Sprintf("its files are not those of the primary (%s %s)", c.Op, c.Path)
			}
		}
		switch {
		case why != "":
		case p.o.seed != "" && v.serial != want.serial:
			why = fmt.Sprintf("its serial number is %s, and by the seed it would be %s", formatSerial(v.serial), formatSerial(want.serial))
		case !v.boot() && p.o.label != "" && v.label != p.o.label:
			why = fmt.Sprintf("its label is %q", v.label)
		case !v.boot() && p.o.fat != 0 && v.form.Type != p.o.fat:
			why = fmt.Sprintf("it is %s", v.form.Type)
		}
		if v.empty && why != "" {
			return withHint(refusef("cannot init %s: partition %d, of type %s, holds an empty volume, which stays as it is, and not the one that this would make: %s",
				p.t.name, v.part.Number, v.part.TypeName(), why), "`espmirror init --force %s` makes it anew", quoted(p.volumeName(v)))
		}
		if why != "" {
			name := quoted(p.volumeName(v))
			hint := fmt.Sprintf("`espmirror sync --target %s` brings the files, `espmirror init --force %s` makes it anew", name, name)
			if !v.named && !p.done {
				hint = fmt.Sprintf("`espmirror add %s` takes it into the set, ", name) + hint
			}
			return withHint(refusef("cannot init %s: partition %d, of type %s, holds a whole volume, and not the one that this would make: %s",
				p.t.name, v.part.Number, v.part.TypeName(), why), "%s", hint)
		}
	}
	return nil
}

// volumeName is how commands name a volume of the plan.
func (p *initPlan) volumeName(v *newVolume) string {
	if p.t.part {
		return p.t.name
	}
	return fmt.Sprintf("%s@@p%d", p.t.name, v.part.Number)
}

// window is the place of a volume on the device that was opened: the disk, or the partition itself.
func (p *initPlan) window(dev blockdev.Device, v *newVolume) (blockdev.Device, error) {
	if p.t.part {
		return dev, nil
	}
	return blockdev.Window(dev, v.part.Start, v.part.Size)
}

// joinPlan decides whether the new ESP becomes a member, and makes the set file that it begins with, from that of those which
// were planned before.
func (p *initPlan) joinPlan(inv *invocation, m *members, before *replicate.Set) error {
	v := p.esp()
	if v == nil || p.o.noSet {
		return nil
	}
	if _, ok := partGUID(m.primary.guid()); !ok || m.primary.loc.Part.Type != gpt.TypeESP {
		inv.log.Info("the primary is no ESP with a partition GUID, so the new one joins no replica set", "primary", m.primary.name)
		return nil
	}
	if cause := m.readOnly(); cause != nil {
		return withHint(refusal{fmt.Errorf("cannot add it to the set of %s: %w", m.primary.name, cause)}, "--no-set leaves that out")
	}
	p.join = true
	guid := v.part.GUID.String()
	text := []byte(newSetFile)
	if before != nil {
		text = before.Bytes()
	} else if m.set != nil {
		text = m.set.Bytes()
	}
	set, err := replicate.ParseSet(m.primary.name+":"+replicate.SetPath, text)
	if err != nil {
		return err
	}
	if !v.inTable && (guid == m.primary.guid() || set.Has(guid) && !inv.prepared(set, guid)) {
		return withHint(refusef("cannot init %s: its partition GUID would be %s, which a member has", p.t.name, guid), "use another --seed for each disk")
	}
	comment := filepath.Base(p.t.name)
	if v.part.Name != "" {
		comment += ", " + v.part.Name
	}
	if _, err := set.Add(m.primary.guid(), describe(m.primary)); err != nil {
		return err
	}
	if _, err := set.Add(guid, safe(comment)); err != nil {
		return err
	}
	if names := set.Incomplete(guid); len(names) > 0 {
		hint := fmt.Sprintf("add the lines `member %s` and `replace %s %s TEXT` to %s of the primary", guid, names[0], guid, replicate.SetPath)
		if p.o.seed == "" && !v.inTable {
			hint = fmt.Sprintf("with --seed the GUID is known before: `espmirror init -n --no-set --seed TEXT` shows it; then add the lines `member GUID` and `replace %s GUID TEXT` to %s of the primary",
				names[0], replicate.SetPath)
		}
		return withHint(refusef("cannot init %s: %s of the primary has no text for %s of the new member", p.t.name, replicate.SetPath, strings.Join(names, ", ")), "%s", hint)
	}
	p.set = set
	return nil
}

// prepared says whether somebody has written the words of a member into the set before it is made: it is listed, with texts
// of its own, and no disk has it.
func (inv *invocation) prepared(set *replicate.Set, guid string) bool {
	if len(set.Texts(guid)) == 0 {
		return false
	}
	_, err := inv.finder().FindPartUUID(guid)
	return errors.Is(err, gpt.ErrNotFound)
}

// leftToDo says what the other partitions of a layout need, by what they hold on the disk that it was copied from.
func (p *initPlan) leftToDo(inv *invocation) []string {
	var todo []string
	for _, v := range p.volumes {
		if v.fill {
			continue
		}
		todo = append(todo, advice(v, p.nodeOf(v), p.holder(inv, v)))
	}
	return todo
}

// nodeOf is what the kernel will call a partition of the target, or how an image's is named.
func (p *initPlan) nodeOf(v *newVolume) string {
	if p.t.loc != nil && p.t.id.Block {
		sep := ""
		if last := p.t.name[len(p.t.name)-1]; last >= '0' && last <= '9' {
			sep = "p" // nvme0n1p1
		}
		return fmt.Sprintf("%s%s%d", p.t.name, sep, v.part.Number)
	}
	return p.volumeName(v)
}

// holder is the md or dm device that is on the partition of the disk that the layout comes from, "" when there is none.
func (p *initPlan) holder(inv *invocation, v *newVolume) string {
	id, err := blockdev.Identify(p.o.like)
	if err != nil || !id.Block {
		return ""
	}
	disk, err := inv.system.BlockByNum(id.Dev)
	if err != nil {
		return ""
	}
	blocks, err := inv.system.Blocks()
	if err != nil {
		return ""
	}
	for _, b := range blocks {
		if b.Disk == disk.Name && b.Partition == v.part.Number && len(b.Holders) > 0 {
			return b.Holders[0]
		}
	}
	return ""
}

// Types by which a partition is known when it does not say more itself. Discoverable Partitions Specification.
const (
	typeRAID = "a19d880f-05fc-4d3b-a006-743f0f84911e"
	typeLVM  = "e6d6d379-f507-44c2-a23c-238f2a3df928"
	typeSwap = "0657fd6d-a4ab-43c4-84e5-0933c84b4f4f"
	typeBIOS = "21686148-6449-6e6f-744e-656564454649"
	typeZFS  = "6a898cc3-1dd2-11b2-99a6-080020736631"
)

// advice is what a person may do about a partition that was copied by its place alone.
func advice(v *newVolume, node, holder string) string {
	md := "/dev/mdX"
	if strings.HasPrefix(holder, "md") {
		md = "/dev/" + holder
	}
	node = quoted(node)
	typ := v.part.Type.String()
	switch {
	case v.holds == gpt.FSMDMember, v.holds == "" && typ == typeRAID:
		return fmt.Sprintf("mdadm --manage %s --add %s", md, node)
	case v.holds == "btrfs":
		return fmt.Sprintf("btrfs replace start MISSING-DEVID %s MOUNTPOINT", node)
	case v.holds == "ZFS member", typ == typeZFS:
		return fmt.Sprintf("zpool replace POOL OLD-DEVICE %s", node)
	case v.holds == "LVM physical volume", v.holds == "" && typ == typeLVM:
		return fmt.Sprintf("pvcreate %s && vgextend VG %s && lvconvert --repair VG/LV", node, node)
	case v.holds == "LUKS":
		return fmt.Sprintf("cryptsetup luksFormat %s   # then put into it what the other one holds", node)
	case v.holds == "swap", v.holds == "" && typ == typeSwap:
		return fmt.Sprintf("mkswap %s   # then its UUID into /etc/fstab", node)
	case typ == typeBIOS:
		return "grub-install DISK   # for starting through a BIOS"
	case v.holds == "":
		return fmt.Sprintf("%s is empty, as on the disk that the layout comes from", node)
	}
	return fmt.Sprintf("%s has to be restored: on the disk that the layout comes from it holds %s", node, v.holds)
}
