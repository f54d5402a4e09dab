package main

import (
	"errors"
	"fmt"
	"os"

	"github.com/urfave/cli/v2"

	"espmirror/blockdev"
	"espmirror/gpt"
	"espmirror/replicate"
)

func (inv *invocation) randomSeedCommand() *cli.Command {
	return &cli.Command{
		Name:  "random-seed",
		Usage: "give each volume a fresh random seed of its own",
		UsageText: "espmirror random-seed [OPTIONS] [--primary VOLUME] [--target VOLUME]...\n" +
			"espmirror random-seed --dry-run [--primary VOLUME] [--target VOLUME]...",
		Description: "The seed in loader/random-seed, with which systemd-boot starts the kernel's random numbers, is mixed with\n" +
			"32 fresh bytes on each volume by itself: no two volumes ever have the same. Where it is missing it is made\n" +
			"if systemd-boot is installed. A primary that is mounted is written through its mount point.",
		Flags: []cli.Flag{
			&cli.GenericFlag{Name: "primary", Value: &once{}, Usage: "renew the seed of this `VOLUME` or directory (default: $SYSTEMD_ESP_PATH, else the ESP that was booted)"},
			&cli.StringSliceFlag{Name: "target", Usage: "renew the seed of this `VOLUME`; repeat for more (default: the other members of the replica set)"},
			&cli.BoolFlag{Name: "dry-run", Aliases: []string{"n"}, Usage: "print what would be done, and write nothing", DisableDefaultText: true},
		},
		Action: inv.action(0, 0, "name the volumes with --primary and --target", inv.randomSeed),
	}
}

// seedVerb completes "cannot … b.img".
const seedVerb = "renew the random seed of"

// seedMembers finds the volumes that the command line names, each with its own error: none of them needs another one. A
// primary that is a directory or mounted stays the primary of the members; any other one is a target as the rest are.
func (inv *invocation) seedMembers() (*members, []*member, error) {
	m := &members{inv: inv, verb: seedVerb, primary: &member{}}
	var all []*member
	first := inv.text("primary")
	if first == "" {
		first = os.Getenv("SYSTEMD_ESP_PATH")
	}
	names := inv.list("target")
	if len(names) == 0 {
		// Without a word, every member of the replica set gets one.
		set, err := inv.newMembersOf(seedVerb, nil, true)
		noSet := (*usageError)(nil)
		switch {
		case err == nil:
			first = set.primary.name
			for _, t := range set.targets {
				names = append(names, t.name)
			}
			set.close()
		case !errors.As(err, &noSet):
			return nil, nil, err
		case first == "":
			// In no set, but booted from: it is the one volume that the machine has.
			if name, booted, err := inv.primaryName(); err == nil {
				alone := &members{inv: inv, verb: seedVerb, primary: &member{name: name}, booted: booted}
				if err := alone.findPrimary(nil); err == nil {
					first = alone.primary.name
				}
			}
		}
	}
	if first != "" {
		if isArchive(first) {
			return nil, nil, refusef("cannot %s %s: it is an archive, which is never written to", m.verb, first)
		}
		all = append(all, &member{name: first})
		if isDir(first) {
			all[0].dir, m.primary = first, all[0]
		}
	}
	for _, name := range names {
		if err := notATarget(m.verb, name); err != nil {
			return nil, nil, err
		}
		all = append(all, &member{name: name})
	}
	if len(all) == 0 {
		return nil, nil, &usageError{"no volume was given", "name it with --primary or --target, or in SYSTEMD_ESP_PATH"}
	}
	names = nil
	for _, t := range all {
		names = append(names, t.name)
	}
	among := existing(names)
	for i, t := range all {
		if t == m.primary {
			continue
		}
		m.targets = append(m.targets, t)
		loc, err := inv.findTarget(t.name, among)
		if err != nil {
			t.err = fmt.Errorf("cannot %s %s: %w", m.verb, t.name, err)
			continue
		}
		t.loc = loc
		for _, u := range all[:i] {
			same := false
			switch {
			case u.loc != nil:
				same, err = gpt.SameVolume(loc, u.loc)
			case u.dir != "":
				same, err = m.isPrimary(t)
			}
			if err != nil {
				return nil, nil, err
			}
			if same {
				return nil, nil, refusef("cannot %s %s: it is named twice (%s)", m.verb, t.name, u.name)
			}
		}
	}
	if p := all[0]; m.primary.dir == "" && first != "" && p.loc != nil {
		if err := m.throughMount(p); err != nil {
			p.err = fmt.Errorf("cannot %s %s: %w", m.verb, p.name, err)
		}
	}
	return m, all, nil
}

// throughMount makes a primary that is mounted be written there: the kernel has the filesystem, and a device below it that
// changes by itself is damage.
func (m *members) throughMount(p *member) error {
	id := p.loc.ID()
	if !id.Block || p.loc.Offset != 0 {
		return nil
	}
	mount, ok, err := m.inv.system.MountPoint(id.Dev)
	if err != nil || !ok {
		return err
	}
	if err := m.inv.checkType(p.loc); err != nil {
		return err
	}
	vol, err := m.inv.openLocation(p.name, p.loc)
	if err != nil {
		return refuseContent(err)
	}
	p.vol, p.serial, p.dir = vol, vol.fat.UUID(), mount.Point
	m.primary, m.targets = p, m.targets[1:]
	m.inv.log.Info("the primary is mounted, so it is written through its mount point", "primary", p.name, "directory", p.dir)
	return nil
}

func (inv *invocation) randomSeed() (report, error) {
	o := replicate.SeedOptions{DryRun: inv.flag("dry-run")}
	o.Log = inv.engineLog(o.DryRun)
	m, all, err := inv.seedMembers()
	if err != nil {
		return nil, err
	}
	m.dry = o.DryRun
	defer m.close()
	m.inspect()
	mode := blockdev.ReadOnly
	if !o.DryRun {
		mode = blockdev.ReadWrite
		if err := m.lock(); err != nil {
			return nil, err
		}
	}
	byMember, reasons := map[*member]*outcome{}, map[*member]string{}
	renewed := func(t *member, r replicate.SeedResult) {
		oc := &outcome{member: t, result: &replicate.Result{Target: t.name, Outcome: r.Outcome, Recovered: r.Recovered, Err: r.Err}}
		if r.Err != nil {
			oc.err = recoverHint(prefixed(m.verb, t.name, r.Err), t.name)
		}
		if r.Outcome == replicate.Refused {
			oc.err = refusal{oc.err}
		}
		byMember[t], reasons[t] = oc, r.Reason
	}
	if p := m.primary; p.dir != "" && p.err == nil {
		seed, _ := replicate.RandomSeedDir(inv.ctx, p.dir, o) // the error is in the result
		renewed(p, seed)
	}
	m.openTargets(mode)
	targets := m.opened()
	for _, t := range m.targets {
		if t.place > 0 {
			seed, _ := replicate.RandomSeed(inv.ctx, targets[t.place-1], o)
			renewed(t, seed)
		}
	}
	m.close()
	for _, t := range all {
		switch oc := byMember[t]; {
		case oc == nil:
			byMember[t] = &outcome{member: t, err: t.err}
		case oc.err == nil:
			oc.err = t.err // what failed in closing it
		}
	}
	rep := &seedReport{DryRun: o.DryRun, Volumes: []seedVolume{}, quiet: inv.quiet}
	e := &targetsError{verb: m.verb, total: len(all)}
	for _, t := range all {
		oc := byMember[t]
		rep.add(oc, reasons[t])
		if oc.err != nil {
			e.errs = append(e.errs, oc.err)
		}
		if r := oc.result; r != nil && !o.DryRun {
			e.wrote = e.wrote || r.Outcome == replicate.Refreshed || r.Outcome == replicate.Created || r.Recovered.Changed()
		}
	}
	switch {
	case len(e.errs) == 1 && len(all) == 1 && !errors.As(e.errs[0], new(missing)):
		return rep, e.errs[0]
	case len(e.errs) > 0:
		return rep, e
	}
	return rep, nil
}

// seedReport is the result of random-seed.
type seedReport struct {
	failure
	DryRun  bool         `json:"dry_run"`
	Volumes []seedVolume `json:"volumes"`

	quiet bool
}

type seedVolume struct {
	Name      string `json:"name"`
	Outcome   string `json:"outcome"`
	Reason    string `json:"reason,omitempty"`
	Directory string `json:"directory,omitempty"` // where it was written through a mount
	identity
	Recovered *recoveryReport `json:"recovered,omitempty"`
	Error     *jsonError      `json:"error,omitempty"`
}

func (r *seedReport) add(oc *outcome, reason string) {
	v := seedVolume{Name: oc.member.name, Outcome: oc.state(), Reason: reason, Directory: oc.member.dir, Error: newJSONError(oc.err)}
	if oc.member.loc != nil {
		v.identity = identityOf(oc.member.loc)
		v.Serial = oc.member.serial
	}
	if oc.result != nil {
		v.Recovered = newRecoveryReport(oc.result.Recovered)
	}
	r.Volumes = append(r.Volumes, v)
}

func (r *seedReport) print(o *output) {
	if r.quiet {
		return
	}
	t := newTable("VOLUME", "OUTCOME", "REASON", "RECOVERY")
	for _, v := range r.Volumes {
		outcome, tint := v.Outcome, red
		switch replicate.Outcome(v.Outcome) {
		case replicate.Refreshed, replicate.Created:
			tint = green
			if r.DryRun {
				outcome = "would be " + outcome
			}
		case replicate.LeftAlone:
			tint = yellow
		}
		var recovery string
		if v.Recovered != nil && v.Recovered.Action != "nothing to do" {
			recovery = v.Recovered.Action
			if w := wouldDo[recovery]; w != "" && r.DryRun {
				recovery = w
			}
		}
		t.row(cell{text: v.Name}, cell{text: outcome, tint: tint}, cell{text: v.Reason}, cell{text: recovery})
	}
	t.print(o)
}
