package main

import (
	"errors"
	"fmt"
	"io/fs"
	"os"

	"espmirror/blockdev"
	"espmirror/fatdriver"
	"espmirror/gpt"
	"espmirror/replicate"
)

// volume is a FAT volume that a command has open for reading.
type volume struct {
	name string // as the user called it
	loc  *gpt.Location
	open *gpt.Volume
	fat  *fatdriver.Volume
}

func (v *volume) Close() error { return v.open.Close() }

func (inv *invocation) finder(among ...string) *gpt.Finder {
	return &gpt.Finder{System: inv.system, Among: among}
}

// openVolume opens a volume for reading, for a command that does verb with it.
func (inv *invocation) openVolume(verb, name string, among ...string) (*volume, error) {
	loc, err := inv.finder(among...).Find(name)
	if err != nil {
		return nil, fmt.Errorf("cannot %s %s: %w", verb, name, err)
	}
	v, err := inv.openLocation(name, loc)
	if err != nil {
		return nil, fmt.Errorf("cannot %s %s: %w", verb, name, err)
	}
	return v, nil
}

func (inv *invocation) openLocation(name string, loc *gpt.Location) (*volume, error) {
	inv.tellTable(name, loc)
	open, err := loc.Open(blockdev.ReadOnly)
	if err != nil {
		return nil, err
	}
	fat, err := fatdriver.Open(open)
	if err != nil {
		_ = open.Close()
		return nil, err
	}
	return &volume{name, loc, open, fat}, nil
}

// tellTable logs what is wrong with the partition table around a volume. The volume itself can be used.
func (inv *invocation) tellTable(name string, loc *gpt.Location) {
	if loc.DiskTable == nil {
		return
	}
	for _, p := range loc.DiskTable.Problems {
		inv.log.Warn("the partition table is damaged: "+p, "volume", name, "disk", loc.Disk)
	}
}

// identity is what sets a volume apart from others.
type identity struct {
	Device   string `json:"device,omitempty"` // the node or image that holds it
	Offset   int64  `json:"offset_bytes"`
	Size     int64  `json:"size_bytes,omitempty"`
	PartType string `json:"partition_type,omitempty"`
	PartGUID string `json:"partition_guid,omitempty"`
	PartName string `json:"partition_label,omitempty"`
	FATType  string `json:"fat_type,omitempty"`
	Serial   string `json:"serial,omitempty"`
	Label    string `json:"label,omitempty"`
}

func identityOf(loc *gpt.Location) identity {
	id := identity{Device: loc.Path, Offset: loc.Offset, Size: loc.Size}
	if loc.Part != nil {
		id.PartType, id.PartGUID, id.PartName = loc.Part.TypeName(), loc.Part.PARTUUID(), loc.Part.Name
	}
	return id
}

// addFAT adds what the boot sector says; the label stands in the root directory, which only a scan reads.
func (id *identity) addFAT(v *fatdriver.Volume, tree *fatdriver.Tree) {
	id.FATType, id.Serial = v.Geometry().Type.String(), v.UUID()
	if tree != nil {
		id.Label = tree.Label
	}
}

// target gives the volume to package replicate, which checks the identity that a journal is bound to.
func (v *volume) target() *replicate.Target { return newTarget(v.name, v.loc, v.open) }

func newTarget(name string, loc *gpt.Location, dev blockdev.Device) *replicate.Target {
	t := &replicate.Target{Name: name, Dev: dev}
	if loc.Part != nil {
		t.PartGUID = loc.Part.PARTUUID()
	}
	return t
}

// findTarget finds a volume and tells "not there" (missing) from "not usable" (a refusal).
func (inv *invocation) findTarget(name string, among []string) (*gpt.Location, error) {
	loc, err := inv.finder(among...).Find(name)
	if err == nil {
		return loc, nil
	}
	// An image that exists and has no volume in it is "not found" as well.
	_, statErr := os.Stat(name)
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, gpt.ErrNotFound) && statErr != nil {
		return nil, missing{err}
	}
	return nil, refusal{err}
}

// isDir says whether a name is a directory, which only a primary may be.
func isDir(name string) bool {
	info, err := os.Stat(name)
	return err == nil && info.IsDir()
}

// withHint adds what to do about err.
func withHint(err error, format string, a ...any) error {
	return &replicate.Hint{Err: err, Text: fmt.Sprintf(format, a...)}
}

// recoverHint adds the command that finishes an interrupted run, unless err has a hint already.
func recoverHint(err error, name string) error {
	if !errors.Is(err, replicate.ErrNeedsRecovery) || hintOf(err) != "" {
		return err
	}
	return withHint(err, "run `espmirror recover %s`", name)
}

// existing are the names that are files or devices: where a tag such as PARTUUID=… is looked for first.
func existing(names []string) []string {
	var found []string
	for _, name := range names {
		if info, err := os.Stat(name); err == nil && !info.IsDir() {
			found = append(found, name)
		}
	}
	return found
}

// checkType refuses partitions of another type, and those that overlap others.
func (inv *invocation) checkType(loc *gpt.Location) error {
	err := loc.CheckESP()
	if err == nil {
		return nil
	}
	if !errors.Is(err, gpt.ErrNotESP) {
		return refusal{err}
	}
	if relaxed() {
		inv.log.Debug("SYSTEMD_RELAX_ESP_CHECKS is set", "volume", loc.String(), "overlooked", err.Error())
		return nil
	}
	return withHint(err, "set its type, or set SYSTEMD_RELAX_ESP_CHECKS=1 to use it as it is")
}

// checkMD refuses half of a mirror: from its beginning it cannot be told from a plain volume.
func checkMD(dev blockdev.Device) error {
	member, err := gpt.MDMember(dev)
	if err != nil || !member {
		return err
	}
	return withHint(refusef("it is a member of an md array"), "assemble the array, and let md keep its members alike")
}
