package main

import (
	"errors"
	"fmt"
	"path/filepath"
	"strings"

	"github.com/urfave/cli/v2"

	"espmirror/gpt"
	"espmirror/replicate"
)

// newSetFile is what a replica set file begins with.
const newSetFile = "# The EFI System Partitions that espmirror keeps alike, by partition GUID. The same file is on each of them.\n"

func (inv *invocation) addCommand() *cli.Command {
	return &cli.Command{
		Name: "add", Aliases: []string{"add-secondary-esp"},
		Usage:     "add volumes to the replica set, and bring them into sync",
		UsageText: "espmirror add [OPTIONS] VOLUME...",
		Description: "The primary's " + replicate.SetPath + " gets a line for each VOLUME, and one for the primary itself when it has none;\n" +
			"a run of `sync` follows, so that the file is the same on all members. Nothing else is ever adopted.",
		Flags:  append(registerFlags(), inv.setCommandFlags()...),
		Action: inv.action(1, -1, "name the volumes", func() (report, error) { return inv.changeSet("add") }),
	}
}

func (inv *invocation) removeCommand() *cli.Command {
	return &cli.Command{
		Name: "remove", Aliases: []string{"remove-secondary-esp"},
		Usage:     "take volumes out of the replica set",
		UsageText: "espmirror remove [OPTIONS] VOLUME|GUID...",
		Description: "A volume that is gone is named by its partition GUID, as `status` shows it. Nothing is written to what is taken out;\n" +
			"a run of `sync` follows, so that the file is the same on all members that stay.",
		Flags:  inv.setCommandFlags(),
		Action: inv.action(1, -1, "name the volumes", func() (report, error) { return inv.changeSet("remove") }),
	}
}

func (inv *invocation) setCommandFlags() []cli.Flag {
	return []cli.Flag{
		&cli.GenericFlag{Name: "primary", Value: &once{}, Usage: "change the replica set of this `VOLUME` or mount point (default: $SYSTEMD_ESP_PATH, else the ESP that was booted)"},
		&cli.BoolFlag{Name: "dry-run", Aliases: []string{"n"}, Usage: "say what would be done, and write nothing", DisableDefaultText: true},
		&cli.BoolFlag{Name: "no-sync", Usage: "change the primary's file alone; the next sync brings it to the others", DisableDefaultText: true},
		noProgressFlag(),
	}
}

// changeSet adds members to the replica set, or takes some out.
func (inv *invocation) changeSet(verb string) (report, error) {
	return inv.changeSetOf(verb, inv.c.Args().Slice())
}

// changeSetOf is changeSet for these volumes.
func (inv *invocation) changeSetOf(verb string, names []string) (report, error) {
	rep := &setReport{Command: verb, DryRun: inv.flag("dry-run"), Changed: []setChange{}, quiet: inv.quiet}
	var volumes []string
	for _, name := range names {
		if verb == "add" || !isGUID(name) {
			volumes = append(volumes, name)
		}
	}
	m, err := inv.newMembersOf(verb, volumes, false)
	if err != nil {
		return nil, err
	}
	defer m.close()
	reg, err := inv.registration()
	if err == nil {
		err = reg.of(m.targets)
	}
	if err != nil {
		return nil, err
	}
	if !rep.DryRun {
		// Before the file is read, or another one who changes it at the same time would be undone.
		if err := m.lockDisks(m.primaryDisk()...); err != nil {
			return nil, err
		}
	}
	if _, err := m.source(); err != nil {
		return nil, err
	}
	set, err := m.changed(rep, names)
	if err != nil {
		return nil, err
	}
	if err := reg.choose(m); err != nil {
		return nil, err
	}
	rep.Primary, rep.Members = m.primary.name, set.Members()
	rep.Written = !rep.DryRun && (m.set == nil || string(m.set.Bytes()) != string(set.Bytes()))
	if rep.Written {
		if err := m.put(inv.ctx, replicate.File{Path: replicate.SetPath, Content: set.Bytes()}); err != nil {
			return nil, fmt.Errorf("cannot write %s on %s: %w", replicate.SetPath, m.primary.name, err)
		}
	}
	m.close()
	if verb == "remove" {
		inv.left(rep)
	}
	if rep.DryRun && verb == "add" && !inv.flag("no-sync") {
		if err := reg.planned(rep); err != nil {
			return nil, err
		}
		return rep, inv.planAdd(rep, volumes)
	}
	if rep.DryRun || inv.flag("no-sync") || len(set.Members()) < 2 {
		return rep, nil
	}
	for _, c := range rep.Changed {
		inv.changed = append(inv.changed, c.GUID)
	}
	if verb == "remove" {
		volumes = nil
	}
	if m, err = inv.newMembersOf("sync", volumes, true); err != nil {
		return rep, rep.notSynced(err)
	}
	run, err := inv.replicate(m, replicate.Options{Log: inv.engineLog(false)}, inv.engine.sync, true)
	if r, ok := run.(*runReport); ok {
		rep.Sync = r
	}
	return rep, reg.carryOut(rep, rep.notSynced(err))
}

// planAdd plans the run that would follow, as a disk that has boot files of its own is about to lose them.
func (inv *invocation) planAdd(rep *setReport, volumes []string) error {
	m, err := inv.newMembersOf("sync", volumes, false)
	if err != nil {
		return err
	}
	run, err := inv.replicate(m, replicate.Options{DryRun: true, Log: inv.engineLog(true)}, inv.engine.sync, false)
	if r, ok := run.(*runReport); ok {
		rep.Sync = r
	}
	if errors.Is(err, errDiffers) {
		return nil // that is what adding is for
	}
	return err
}

// notSynced sees to it that no exit status says "nothing was written" when the set has been changed.
func (r *setReport) notSynced(err error) error {
	var targets *targetsError
	switch {
	case err == nil || !r.Written:
		return err
	case errors.As(err, &targets):
		targets.wrote = true
		return err
	case exitCode(err) == exitRefused:
		e := &targetsError{verb: "sync", errs: []error{err}, total: 1, wrote: true}
		return e
	}
	return err
}

// isGUID says whether a name is a partition GUID rather than a volume.
func isGUID(name string) bool {
	_, ok := partGUID(name)
	return ok && len(existing([]string{name})) == 0
}

// partGUID is the GUID that a name is, bare or as PARTUUID=. What stands there for a partition of an MBR is none.
func partGUID(name string) (string, bool) {
	guid, err := gpt.ParsePartUUID(name)
	return guid, err == nil && strings.Count(guid, "-") == 4
}

// changed works out the new set file.
func (m *members) changed(rep *setReport, names []string) (*replicate.Set, error) {
	p := m.primary
	text := []byte(newSetFile)
	if m.set != nil {
		text = m.set.Bytes()
	}
	set, err := replicate.ParseSet(p.name+":"+replicate.SetPath, text)
	if err != nil {
		return nil, err
	}
	own := p.guid()
	if err := m.canBeMember(p); err != nil {
		return nil, err
	}
	if rep.Command == "remove" {
		volumes := m.targets
		for _, name := range names {
			var guid string
			if isGUID(name) {
				guid, _ = partGUID(name)
			} else {
				t := volumes[0]
				if volumes = volumes[1:]; t.err != nil {
					return nil, withHint(t.err, "a member that is gone is named by its partition GUID")
				}
				guid = t.guid()
			}
			if guid == own {
				return nil, withHint(refusef("cannot remove %s: it is the primary", name), "run it with another member as --primary")
			}
			if !set.Remove(guid) {
				err := refusef("cannot remove %s: it is not in the replica set", name)
				if guid != name {
					err = refusef("cannot remove %s: %s is not in the replica set", name, guid)
				}
				if set := set.Members(); len(set) > 0 {
					err = withHint(err, "the members are %s", strings.Join(set, ", "))
				}
				return nil, err
			}
			rep.Changed = append(rep.Changed, setChange{guid, name})
		}
		return set, nil
	}
	m.inspect()
	for _, t := range m.targets {
		if t.err == nil {
			t.err = m.canBeMember(t)
		}
	}
	m.knownTwice()
	if err := m.failureOf(m.outcomes(nil, nil)); err != nil {
		return nil, err
	}
	add := func(guid, name string) error {
		ok, err := set.Add(guid, name)
		if ok {
			rep.Changed = append(rep.Changed, setChange{guid, name})
		}
		return err
	}
	if err := add(own, describe(p)); err != nil {
		return nil, err
	}
	for _, t := range m.targets {
		if err := add(t.guid(), describe(t)); err != nil {
			return nil, err
		}
	}
	return set, nil
}

// canBeMember refuses what a set could not find again, and XBOOTLDR partitions, which go with the ESPs of their disks.
func (m *members) canBeMember(t *member) error {
	if _, ok := partGUID(t.guid()); !ok {
		return withHint(refusef("cannot %s %s: it has no partition GUID, by which a replica set knows its members", m.verb, t.name),
			"a member is a partition of a GPT")
	}
	if t.loc.Part.Type == gpt.TypeXBOOTLDR {
		return withHint(refusef("cannot %s %s: it is an XBOOTLDR partition", m.verb, t.name), "name the ESP of the same disk, and it goes along")
	}
	return nil
}

// knownTwice refuses new members whose identity a member has already that is not on the command line: the copy of a disk
// would take the place of the original in each run from then on.
func (m *members) knownTwice() {
	if m.set == nil {
		return
	}
	for _, guid := range m.set.Members() {
		if guid == m.primary.guid() {
			continue
		}
		// What cannot be found or read is no reason to refuse anything.
		loc, err := m.inv.finder().FindPartUUID(guid)
		if errors.Is(err, gpt.ErrAmbiguous) {
			for _, t := range m.targets {
				if t.err == nil && t.guid() == guid {
					t.err = duplicate{fmt.Errorf("cannot add %s: %w", t.name, err)}
				}
			}
		}
		if err != nil {
			continue
		}
		other := &member{name: loc.String(), loc: loc}
		if vol, err := m.inv.openLocation(other.name, loc); err == nil {
			other.serial = vol.fat.UUID()
			_ = vol.Close()
		}
		for _, t := range m.targets {
			if t.err != nil {
				continue
			}
			if same, err := gpt.SameVolume(t.loc, loc); err != nil || same {
				continue
			}
			if what := sharedIdentity(t, other); what != "" {
				t.err = duplicate{refusef("cannot add %s: it has the same %s as member %s", t.name, what, other.name)}
			}
		}
	}
}

// describe is the comment beside a member, for people: names of devices change.
func describe(t *member) string {
	at := ""
	if t.loc != nil {
		at = filepath.Base(t.loc.String())
		if t.loc.Part != nil && t.loc.Part.Name != "" {
			at += ", " + t.loc.Part.Name
		}
	}
	return safe(at)
}

// setReport is the result of add and remove.
type setReport struct {
	failure
	Command string      `json:"command"`
	DryRun  bool        `json:"dry_run"`
	Primary string      `json:"primary"`
	Changed []setChange `json:"changed"`
	Members []string    `json:"members"`
	Written bool        `json:"written"`
	Sync    *runReport  `json:"sync,omitempty"`
	setEntries

	quiet bool
}

type setChange struct {
	GUID string `json:"partition_guid"`
	Name string `json:"name"`
}

func (r *setReport) print(o *output) {
	if r.quiet {
		return
	}
	word := map[string]string{"add": "added", "remove": "removed"}[r.Command]
	if r.DryRun {
		word = "to be " + word
	}
	for _, c := range r.Changed {
		o.printf("%s %s (%s)\n", word, c.GUID, safe(c.Name))
	}
	if len(r.Changed) == 0 {
		o.printf("the replica set is as it should be\n")
	}
	if r.Sync != nil {
		r.Sync.print(o)
	}
	r.setEntries.print(o)
}
