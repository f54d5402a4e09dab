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

// volume is a volume that a command has open for reading.
type volume struct {
	name  string // as the user called it
	loc   *gpt.Location
	open  *gpt.Volume
	fat   *fatdriver.Volume
	exfat *exfatVolume // in place of fat, for commands that ask for openReadable
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
	return &volume{name: name, loc: loc, open: open, fat: fat}, nil
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

	loc *gpt.Location
}

func identityOf(loc *gpt.Location) identity {
	id := identity{Device: loc.Path, Offset: loc.Offset, Size: loc.Size, loc: loc}
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
	return withHint(err, "run `espmirror recover %s`", quoted(name))
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
	const relax = "set its type, or set SYSTEMD_RELAX_ESP_CHECKS=1 to use it as it is"
	if what := knownType(loc.Part); what != "" {
		return withHint(err, "this looks like the wrong partition: by its type it is for %s; if it is the right one all the same, %s", what, relax)
	}
	return withHint(err, "%s", relax)
}

// knownType says what partitions of a type are for, "" when the type is not one of those that are met on every machine.
// GUIDs: Discoverable Partitions Specification, and the list of gdisk.
func knownType(p *gpt.Partition) string {
	if p == nil {
		return ""
	}
	if p.MBRType != 0 {
		return map[byte]string{
			0x07: "Windows data (NTFS or exFAT)", 0x82: "Linux swap", 0x83: "a Linux filesystem", 0x8e: "Linux LVM", 0xfd: "Linux RAID",
		}[p.MBRType]
	}
	return map[string]string{
		"a19d880f-05fc-4d3b-a006-743f0f84911e": "Linux RAID",
		"e6d6d379-f507-44c2-a23c-238f2a3df928": "Linux LVM",
		"0fc63daf-8483-4772-8e79-3d69d8477de4": "a Linux filesystem",
		"4f68bce3-e8cd-4db1-96e7-fbcaf984b709": "a Linux root filesystem",
		"933ac7e1-2eb4-4f13-b844-0e14e2aef915": "Linux /home",
		"ca7d7ccb-63ed-4c53-861c-1742536059cc": "Linux LUKS",
		"0657fd6d-a4ab-43c4-84e5-0933c84b4f4f": "Linux swap",
		"ebd0a0a2-b9e5-4433-87c0-68b6b72699c7": "Microsoft basic data",
		"e3c9e316-0b5c-4db8-817d-f92df00215ae": "Microsoft reserved space",
		"de94bba4-06d1-4d40-a16a-bfd50179d6ac": "Windows recovery",
		"21686148-6449-6e6f-744e-656564454649": "the BIOS boot loader",
	}[p.Type.String()]
}

// checkMD refuses half of a mirror: from its beginning it cannot be told from a plain volume.
func checkMD(dev blockdev.Device) error {
	member, err := gpt.MDMember(dev)
	if err != nil || !member {
		return err
	}
	return withHint(refusef("it is a member of an md array"), "assemble the array, and let md keep its members alike")
}

// scanned is the tree of a volume of any kind.
type scanned interface {
	Damage() error
	FS() fs.FS
}
