//go:build !initrd

package main

import (
	"errors"
	"fmt"
	"io"

	"espmirror/blockdev"
	"espmirror/fatdriver"
	"espmirror/fatdriver/exfat"
	"espmirror/gpt"
	"espmirror/replicate"
)

// exfatVolume is one that can be read.
type exfatVolume = exfat.Volume

// exfatAttr are the attributes of an entry, whose bits are those of FAT; 0 for anything else.
func exfatAttr(sys any) byte {
	if n, ok := sys.(*exfat.Node); ok {
		return byte(n.Attr)
	}
	return 0
}

// openReadable opens a volume for a command that only looks, which an exFAT volume serves too: fat or exfat is set.
func (inv *invocation) openReadable(verb, name string, among ...string) (*volume, error) {
	v, err := inv.openVolume(verb, name, among...)
	if !errors.Is(err, fatdriver.ErrNotFAT) {
		return v, err
	}
	loc, ferr := inv.finder(among...).Find(name)
	if ferr != nil {
		return nil, err
	}
	x, xerr := openExFAT(name, loc)
	if xerr != nil {
		return nil, fmt.Errorf("cannot %s %s: %w", verb, name, xerr)
	}
	if x == nil {
		return nil, err
	}
	return x, nil
}

// openExFAT opens an exFAT volume for reading, nil when something else is there. A volume that says it is exFAT and cannot
// be read as such is an error.
func openExFAT(name string, loc *gpt.Location) (*volume, error) {
	open, err := loc.Open(blockdev.ReadOnly)
	if err != nil {
		return nil, err
	}
	x, err := exfat.Open(open)
	if err == nil && !x.Geometry().Backup {
		return &volume{name: name, loc: loc, open: open, exfat: x}, nil
	}
	what, perr := gpt.Probe(open)
	if err == nil && perr == nil && (what == gpt.FSExFAT || what == "") {
		return &volume{name: name, loc: loc, open: open, exfat: x}, nil
	}
	// A backup boot region may be what is left of a volume that another one was made over.
	_ = open.Close()
	if perr == nil && what != gpt.FSExFAT && (err == nil || errors.Is(err, exfat.ErrNotExFAT)) {
		return nil, nil
	}
	return nil, errors.Join(err, perr)
}

func (v *volume) tree() (scanned, error) {
	if v.exfat != nil {
		return v.exfat.Scan()
	}
	return v.fat.Scan()
}

// exfatPrimary is an exFAT volume as the primary, which nothing but reading needs.
type exfatPrimary struct {
	replicate.Source
	open io.Closer
}

func (s *exfatPrimary) Close() error { return errors.Join(s.Source.Close(), s.open.Close()) }

// exfatSource opens the primary when it is an exFAT volume, and returns nil when it is not. No firmware reads it, so it need
// not lie in an ESP; and it is no member of a replica set, on each of which the state is written. Where it is mounted, the
// mount point is the source, for the same reason as with FAT.
func (m *members) exfatSource() (replicate.Source, error) {
	p := m.primary
	if p.loc == nil || m.esp != nil || m.booted {
		return nil, nil
	}
	v, err := openExFAT(p.name, p.loc)
	if errors.Is(err, exfat.ErrNotExFAT) {
		err = refusal{err}
	}
	if v == nil || err != nil {
		return nil, err
	}
	src, err := m.exfatTree(v)
	if err != nil {
		_ = v.Close()
		if errors.Is(err, exfat.ErrDamaged) {
			err = refusal{err}
		}
		return nil, err
	}
	if v.exfat.Geometry().Backup {
		m.inv.log.Warn("the main boot region of the exFAT volume cannot be used, its backup can", "primary", p.name)
	}
	return &exfatPrimary{src, v}, nil
}

func (m *members) exfatTree(v *volume) (replicate.Source, error) {
	p := m.primary
	if err := p.loc.CheckESP(); err != nil && !errors.Is(err, gpt.ErrNotESP) {
		return nil, refusal{err}
	}
	if m.verb == "add" || m.verb == "remove" {
		return nil, withHint(refusef("it is an exFAT volume, which cannot keep a replica set"), "name a FAT volume with --primary")
	}
	if id := p.loc.ID(); id.Block && p.loc.Offset == 0 && p.dir == "" {
		mount, ok, err := m.inv.system.MountPoint(id.Dev)
		if err != nil {
			return nil, err
		}
		if ok {
			p.dir = mount.Point
			m.inv.log.Info("the primary is mounted, so its mount point is the source", "primary", p.name, "directory", p.dir)
		}
	}
	var src replicate.Source
	var err error
	if p.dir != "" {
		src, err = replicate.OpenDirSource(p.dir)
	} else {
		src, err = replicate.OpenExFATSource(p.name, v.exfat)
	}
	if err != nil {
		return nil, err
	}
	set, err := replicate.ReadSet(src)
	if err == nil && set != nil && p.guid() != "" && set.Has(p.guid()) {
		_ = src.Close()
		return nil, withHint(refusef("it is in its own replica set, %s, and exFAT", replicate.SetPath), "make it a FAT volume, or take it out of the set")
	}
	return src, nil // what is wrong with the set file shows when it is read again
}

// targetHint says of an exFAT volume what it can be.
func targetHint(err error, loc *gpt.Location) error {
	if !errors.Is(err, fatdriver.ErrNotFAT) {
		return err
	}
	if x, xerr := openExFAT("", loc); x != nil && xerr == nil {
		_ = x.Close()
		return withHint(err, "exFAT is read, as a primary, and never written: no firmware has to read it; make a FAT volume of the target")
	}
	return err
}

// checkExFAT is check for an exFAT volume.
func (c *checkedVolume) checkExFAT(v *volume) error {
	tree, err := v.exfat.Scan()
	if err != nil {
		return fmt.Errorf("cannot check %s: %w", v.name, err)
	}
	c.identity = identityOf(v.loc)
	c.FATType, c.Serial, c.Label = gpt.FSExFAT, v.exfat.UUID(), tree.Label
	c.Files, c.Dirs = tree.Files, tree.Dirs
	damage := 0
	for _, f := range tree.Findings {
		fr := findingReport{Severity: f.Severity.String(), Path: f.Path, Message: f.Msg, text: f.String()}
		if f.Off >= 0 {
			fr.Off = &f.Off
		}
		c.Findings = append(c.Findings, fr)
		if f.Severity == fatdriver.Damage {
			damage++
		}
	}
	used, free, lost, err := tree.Usage()
	if err != nil && !errors.Is(err, exfat.ErrDamaged) {
		return fmt.Errorf("cannot check %s: %w", v.name, err)
	}
	cluster := int64(v.exfat.Geometry().ClusterSize)
	c.UsedBytes, c.FreeBytes, c.LostClusters = used*cluster, free*cluster, lost
	if damage > 0 {
		return fmt.Errorf("cannot call %s sound: %w: %s", v.name, errDamage, plural(int64(damage), "finding", "findings"))
	}
	return nil
}
