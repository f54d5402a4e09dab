package main

import (
	"errors"
	"fmt"

	"github.com/urfave/cli/v2"

	"espmirror/blockdev"
	"espmirror/fatdriver"
	"espmirror/gpt"
	"espmirror/replicate"
)

func (inv *invocation) recoverCommand() *cli.Command {
	return &cli.Command{
		Name:      "recover",
		Usage:     "finish or roll back what a power cut interrupted",
		UsageText: "espmirror recover [OPTIONS] [VOLUME...]",
		Description: "With no VOLUME, the ESP that was booted and all members of its replica set, with the XBOOTLDR partitions on\n" +
			"their disks. Members that are missing do not keep the others waiting; the exit status is 3 then. One that is\n" +
			"mounted is only looked at, and refused when there is something to recover.\n" +
			"A second run finds nothing to do, and writes nothing. With --dry-run the same is worked out without\n" +
			"a write, and the exit status is 5 when there is something to do.",
		Flags: []cli.Flag{
			&cli.GenericFlag{Name: "primary", Value: &once{}, Usage: "recover this `VOLUME` and the members of its replica set (default: $SYSTEMD_ESP_PATH, else the ESP that was booted)"},
			&cli.BoolFlag{Name: "dry-run", Aliases: []string{"n"}, Usage: "print what would be done, and write nothing", DisableDefaultText: true},
			&cli.BoolFlag{Name: "reclaim", Usage: "free every lost cluster, also those that others lost", DisableDefaultText: true},
		},
		Action: inv.action(0, -1, "", inv.recover),
	}
}

func (inv *invocation) recover() (report, error) {
	rep := &recoverReport{DryRun: inv.flag("dry-run"), Volumes: []recoveredVolume{}, quiet: inv.quiet}
	names := inv.c.Args().Slice()
	if len(names) == 0 {
		return inv.recoverSet(rep)
	}
	if inv.text("primary") != "" {
		return nil, usagef("--primary and the names of volumes exclude each other")
	}
	e := &targetsError{verb: "recover"}
	for _, name := range names {
		if err := inv.ctx.Err(); err != nil {
			return rep, err
		}
		r, err := inv.recoverOne(name, rep.DryRun, names)
		rep.add(e, name, r, err)
	}
	return rep, e.orNil()
}

// add notes what became of one volume.
func (r *recoverReport) add(e *targetsError, name string, rec *replicate.Recovery, err error) {
	v := recoveredVolume{Name: name, Recovery: newRecoveryReport(rec)}
	if err == nil && r.DryRun && rec.Changed() {
		err = recoverHint(fmt.Errorf("cannot call %s whole: %w", name, replicate.ErrNeedsRecovery), name)
	}
	if e.total++; err != nil {
		e.errs = append(e.errs, err)
		v.Error = newJSONError(err)
	}
	e.wrote = e.wrote || !r.DryRun && rec.Changed()
	r.Volumes = append(r.Volumes, v)
}

// orNil is the error of a run: that of the volume when there was only one.
func (e *targetsError) orNil() error {
	switch {
	case len(e.errs) == 0:
		return nil
	case e.total == 1:
		return e.errs[0]
	}
	return e
}

// recoverSet recovers the primary and the members of its replica set.
func (inv *invocation) recoverSet(rep *recoverReport) (report, error) {
	name, booted, err := inv.primaryName()
	if err != nil {
		return nil, &usageError{"no volume was given, and no primary: " + err.Error(), "name the volumes, as in `espmirror recover VOLUME...`, or the primary with --primary"}
	}
	// Its own recovery is done here, so reading its set file must do nothing of the kind.
	m := &members{inv: inv, verb: "recover", primary: &member{name: name}, bySet: true, booted: booted, dry: true}
	defer m.close()
	if err := m.findPrimary(nil); err != nil {
		return nil, primaryError{fmt.Errorf("cannot use primary %s: %w", m.primary.name, err)}
	}
	e := &targetsError{verb: "recover"}
	note := func(name string, r *replicate.Recovery, err error) { rep.add(e, name, r, err) }
	if m.primary.loc != nil {
		inv.recoverDisk(m.primary.name, m.primary.loc, rep.DryRun, false, note)
	}
	failed := len(e.errs) > 0
	if _, err := m.source(); err != nil {
		if !failed { // or it is the same thing twice
			e.errs, e.total = append(e.errs, fmt.Errorf("cannot tell the other members: %w", err)), e.total+1
		}
		return rep, e.orNil()
	}
	if m.set == nil {
		inv.log.Info("there is no "+replicate.SetPath+" that names other members", "primary", m.primary.name)
		return rep, e.orNil()
	}
	if err := m.findSet(); err != nil {
		e.errs, e.total = append(e.errs, err), e.total+1
		return rep, e.orNil()
	}
	m.closeSource()
	m.findTargets(m.targets, nil)
	for _, t := range m.targets {
		if err := inv.ctx.Err(); err != nil {
			return rep, err
		}
		if t.err != nil {
			note(t.name, nil, t.err)
			continue
		}
		inv.recoverDisk(t.loc.String(), t.loc, rep.DryRun, false, note)
	}
	return rep, e.orNil()
}

// recoverDisk recovers an ESP, and the XBOOTLDR partition on its disk when there is one with a FAT on it. quick is that of
// recoverMember.
func (inv *invocation) recoverDisk(name string, esp *gpt.Location, dryRun, quick bool, note func(string, *replicate.Recovery, error)) {
	r, err := inv.recoverMember(name, esp, dryRun, quick)
	note(name, r, err)
	if esp.Part == nil || esp.Part.Type != gpt.TypeESP {
		return
	}
	boot, err := inv.xbootldr(esp)
	if err != nil {
		note(name+" (XBOOTLDR)", nil, fmt.Errorf("cannot recover the XBOOTLDR partition beside %s: %w", name, err))
		return
	}
	if boot == nil {
		return
	}
	r, err = inv.recoverMember(boot.String(), boot, dryRun, quick)
	if errors.Is(err, fatdriver.ErrNotFAT) {
		// Linux and GRUB read other filesystems there, and those are nothing of ours.
		inv.log.Debug("the XBOOTLDR partition is not FAT, and is left alone", "volume", boot.String(), "err", err)
		return
	}
	note(boot.String(), r, err)
}

// recoverMember recovers a volume of the replica set. One that somebody holds, which mostly is a mounted one, is refused
// only when there is something to recover. quick leaves a volume alone on which no run was interrupted, as far as its
// journal says: then nothing is read but its directories.
func (inv *invocation) recoverMember(name string, loc *gpt.Location, dryRun, quick bool) (*replicate.Recovery, error) {
	fail := func(err error) (*replicate.Recovery, error) { return nil, prefixed("recover", name, err) }
	by, err := inv.system.Holders(loc.ID())
	if err != nil {
		return fail(err)
	}
	if len(by) > 0 || quick {
		pending, err := inv.pendingAt(name, loc)
		switch {
		case err == nil && !pending:
			return &replicate.Recovery{Action: "nothing to do"}, nil
		case len(by) > 0 && err == nil:
			return fail(&blockdev.BusyError{By: by, Hint: "unmount it or stop what holds it, then try again"})
		case len(by) > 0:
			return fail(err)
		}
		// What cannot be read may be what an interrupted run left: recovery knows how to go around it.
	}
	return inv.recoverLocation(name, loc, dryRun)
}

// pendingAt says whether an interrupted run left a volume to be recovered.
func (inv *invocation) pendingAt(name string, loc *gpt.Location) (bool, error) {
	if err := inv.checkType(loc); err != nil {
		return false, err
	}
	vol, err := inv.openLocation(name, loc)
	if err != nil {
		return false, err
	}
	defer vol.Close()
	return inv.engine.pending(vol.target())
}

func (inv *invocation) recoverOne(name string, dryRun bool, among []string) (*replicate.Recovery, error) {
	loc, err := inv.finder(existing(among)...).Find(name)
	if err != nil {
		return nil, prefixed("recover", name, err)
	}
	inv.tellTable(name, loc)
	return inv.recoverLocation(name, loc, dryRun)
}

func (inv *invocation) recoverLocation(name string, loc *gpt.Location, dryRun bool) (*replicate.Recovery, error) {
	fail := func(err error) (*replicate.Recovery, error) {
		return nil, prefixed("recover", name, err)
	}
	if err := inv.checkType(loc); err != nil {
		return fail(err)
	}
	mode := blockdev.ReadWrite
	if dryRun {
		mode = blockdev.ReadOnly
	} else {
		locks, err := inv.system.LockDisks(inv.ctx, lockWait, loc.ID())
		if err != nil {
			return fail(err)
		}
		defer locks.Release()
	}
	open, err := loc.Open(mode)
	if err != nil {
		return fail(err)
	}
	if err := checkMD(open); err != nil {
		_ = open.Close()
		return fail(err)
	}
	o := replicate.RecoverOptions{Options: replicate.Options{DryRun: dryRun, Log: inv.engineLog(dryRun)}, Reclaim: inv.flag("reclaim")}
	r, err := inv.engine.recover(inv.ctx, newTarget(name, loc, open), o)
	if cerr := open.Close(); err == nil {
		err = cerr
	}
	if err != nil {
		return fail(err)
	}
	return r, nil
}

// recoverReport is the result of recover.
type recoverReport struct {
	failure
	DryRun  bool              `json:"dry_run"`
	Volumes []recoveredVolume `json:"volumes"`

	quiet bool
}

type recoveredVolume struct {
	Name     string          `json:"name"`
	Recovery *recoveryReport `json:"recovery,omitempty"`
	Error    *jsonError      `json:"error,omitempty"`
}

type recoveryReport struct {
	Action        string `json:"action"`
	Reason        string `json:"reason,omitempty"`
	FreedClusters int64  `json:"freed_clusters"`
	FATsMended    int64  `json:"fat_sectors_mended"`
	FSInfoFixed   bool   `json:"fsinfo_fixed"`
	Changed       bool   `json:"changed"`
}

func newRecoveryReport(r *replicate.Recovery) *recoveryReport {
	if r == nil {
		return nil
	}
	return &recoveryReport{r.Action, r.Reason, r.FreedClusters, r.FATsMended, r.FSInfoFixed, r.Changed()}
}

// wouldDo says of an action what a dry run may: that it has not been done.
var wouldDo = map[string]string{
	"rolled back": "would roll back", "rolled forward": "would roll forward", "finished": "would finish", "nothing to do": "would mend",
}

func (r *recoverReport) print(o *output) {
	if r.quiet {
		return
	}
	for _, v := range r.Volumes {
		if v.Recovery == nil {
			continue
		}
		a := v.Recovery
		action := a.Action
		if w := wouldDo[action]; w != "" && r.DryRun && a.Changed {
			action = w
		}
		o.printf("%s: %s", safe(v.Name), o.paint(outcomeTint(a.Action), action))
		if a.Reason != "" {
			o.printf(": %s", safe(a.Reason))
		}
		word := func(done, toDo string) string {
			if r.DryRun {
				return "to " + toDo
			}
			return done
		}
		if a.FreedClusters > 0 {
			o.printf(", %s %s", plural(a.FreedClusters, "cluster", "clusters"), word("freed", "free"))
		}
		if a.FATsMended > 0 {
			o.printf(", %s of the other FAT %s", plural(a.FATsMended, "sector", "sectors"), word("mended", "mend"))
		}
		if a.FSInfoFixed {
			o.printf(", the count of free clusters %s", word("put right", "put right"))
		}
		if r.DryRun && a.Changed {
			o.printf(" (dry run)")
		}
		o.printf("\n")
	}
}
