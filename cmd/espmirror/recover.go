package main

import (
	"fmt"

	"github.com/urfave/cli/v2"

	"espmirror/blockdev"
	"espmirror/replicate"
)

func (inv *invocation) recoverCommand() *cli.Command {
	return &cli.Command{
		Name:      "recover",
		Usage:     "finish or roll back what a power cut interrupted",
		UsageText: "espmirror recover [OPTIONS] VOLUME...",
		Description: "A second run finds nothing to do, and writes nothing. With --dry-run the same is worked out without\n" +
			"a write, and the exit status is 5 when there is something to do.",
		Flags: []cli.Flag{
			&cli.BoolFlag{Name: "dry-run", Aliases: []string{"n"}, Usage: "print what would be done, and write nothing", DisableDefaultText: true},
			&cli.BoolFlag{Name: "reclaim", Usage: "free every lost cluster, also those that others lost", DisableDefaultText: true},
		},
		Action: inv.action(1, -1, "name the volumes: espmirror recover VOLUME...", inv.recover),
	}
}

func (inv *invocation) recover() (report, error) {
	rep := &recoverReport{DryRun: inv.flag("dry-run"), Volumes: []recoveredVolume{}, quiet: inv.quiet}
	names := inv.c.Args().Slice()
	e := &targetsError{verb: "recover", total: len(names)}
	for _, name := range names {
		if err := inv.ctx.Err(); err != nil {
			return rep, err
		}
		r, err := inv.recoverOne(name, rep.DryRun, names)
		v := recoveredVolume{Name: name, Recovery: newRecoveryReport(r)}
		if err == nil && rep.DryRun && r.Changed() {
			err = recoverHint(fmt.Errorf("cannot call %s whole: %w", name, replicate.ErrNeedsRecovery), name)
		}
		if err != nil {
			e.errs = append(e.errs, err)
			v.Error = newJSONError(err)
		}
		e.wrote = e.wrote || !rep.DryRun && r.Changed()
		rep.Volumes = append(rep.Volumes, v)
	}
	switch {
	case len(e.errs) == 1 && len(names) == 1:
		return rep, e.errs[0]
	case len(e.errs) > 0:
		return rep, e
	}
	return rep, nil
}

func (inv *invocation) recoverOne(name string, dryRun bool, among []string) (*replicate.Recovery, error) {
	fail := func(err error) (*replicate.Recovery, error) {
		return nil, prefixed("recover", name, err)
	}
	loc, err := inv.finder(existing(among)...).Find(name)
	if err != nil {
		return fail(err)
	}
	inv.tellTable(name, loc)
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
