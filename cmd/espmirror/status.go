package main

import (
	"errors"
	"fmt"
	"os"
	"strings"

	"github.com/urfave/cli/v2"

	"espmirror/blockdev"
	"espmirror/fatdriver"
	"espmirror/gpt"
	"espmirror/replicate"
)

func (inv *invocation) statusCommand() *cli.Command {
	return &cli.Command{
		Name:      "status",
		Usage:     "show primary and targets, and whether they are in sync (the default command)",
		UsageText: "espmirror status [OPTIONS] [--primary VOLUME] [--target VOLUME]...",
		Description: "With no volume named, the ESPs of this machine and their health. Nothing is written. States: ok, in sync,\n" +
			"drifted, needs recovery, damaged, busy, missing, refused, failed.",
		Flags:  append(append(setFlags(), selectFlags()...), noProgressFlag()),
		Action: inv.action(0, 0, "name the volumes with --primary and --target", inv.status),
	}
}

func (inv *invocation) status() (report, error) {
	rep := &statusReport{Volumes: []statusVolume{}}
	primary, targets := inv.text("primary"), inv.list("target")
	if primary == "" {
		primary = os.Getenv("SYSTEMD_ESP_PATH")
	}
	if primary != "" && len(targets) > 0 {
		return inv.statusOfSet(rep)
	}
	if sel := inv.selection(); len(sel.Select)+len(sel.Exclude) > 0 {
		return nil, &usageError{"a selection was given, and nothing to compare", "name the volumes with --primary and --target"}
	}
	var errs []error
	add := func(v *statusVolume, err error) {
		rep.Volumes = append(rep.Volumes, *v)
		if err != nil {
			errs = append(errs, err)
		}
	}
	switch {
	case primary != "":
		add(inv.health("primary", primary))
	case len(targets) > 0:
		for _, name := range targets {
			add(inv.health("target", name))
		}
	default:
		listing, err := inv.finder().List()
		if err != nil {
			return nil, err
		}
		for _, p := range listing.Problems {
			inv.log.Warn(p)
		}
		for _, u := range listing.Unread {
			errs = append(errs, unreadError(u))
			rep.unread = true
		}
		for _, loc := range listing.Volumes {
			add(inv.healthAt("", loc.String(), loc))
		}
	}
	return rep, worst(errs)
}

// health tells what is known of one volume by itself.
func (inv *invocation) health(role, name string) (*statusVolume, error) {
	if role == "primary" && isDir(name) {
		return &statusVolume{Role: role, Name: name, Directory: name, State: "ok"}, nil
	}
	loc, err := inv.findTarget(name, existing(inv.list("target")))
	if err != nil {
		return broken(role, name, identity{}, fmt.Errorf("cannot show %s: %w", name, err))
	}
	return inv.healthAt(role, name, loc)
}

func (inv *invocation) healthAt(role, name string, loc *gpt.Location) (*statusVolume, error) {
	v, err := inv.openLocation(name, loc)
	if err != nil {
		return broken(role, name, identityOf(loc), fmt.Errorf("cannot show %s: %w", name, err))
	}
	defer v.Close()
	s, err := inv.examine(role, v)
	if err != nil {
		s.fail(err)
	}
	return s, err
}

func broken(role, name string, id identity, err error) (*statusVolume, error) {
	s := &statusVolume{Role: role, Name: name, identity: id}
	s.fail(err)
	return s, err
}

// examine reads a volume. What is wrong with it is the error.
func (inv *invocation) examine(role string, v *volume) (*statusVolume, error) {
	s := &statusVolume{Role: role, Name: v.name, identity: identityOf(v.loc), State: "ok"}
	wrap := func(err error) error { return prefixed("show", v.name, err) }
	if id := v.loc.ID(); id.Block && v.loc.Offset == 0 {
		if mount, ok, err := inv.system.MountPoint(id.Dev); err == nil && ok {
			s.Directory = mount.Point
		}
	}
	tree, err := v.fat.Scan()
	s.addFAT(v.fat, tree)
	if err != nil {
		return s, wrap(err)
	}
	free, err := v.fat.FreeBytes()
	if err != nil {
		return s, wrap(err)
	}
	s.Free = &free
	if err := tree.Damage(); err != nil {
		return s, withHint(wrap(err), "run `espmirror check %s` to see all of it", v.name)
	}
	if role == "target" {
		if err := v.fat.TargetError(); err != nil {
			return s, wrap(err)
		}
	}
	pending, err := inv.engine.pending(v.target())
	if err != nil {
		return s, wrap(err)
	}
	if pending {
		return s, recoverHint(fmt.Errorf("cannot call %s whole: %w", v.name, replicate.ErrNeedsRecovery), v.name)
	}
	return s, nil
}

// statusOfSet compares the targets with the primary.
func (inv *invocation) statusOfSet(rep *statusReport) (report, error) {
	m, err := inv.newMembers("compare")
	if err != nil {
		return nil, err
	}
	defer m.close()
	srcErr := m.sources()
	p := &statusVolume{Role: "primary", Name: m.primary.name, Directory: m.primary.dir, State: "ok"}
	if m.primary.vol != nil {
		s, err := inv.examine("primary", m.primary.vol)
		s.Directory = m.primary.dir
		// A mounted volume is read by its mount point; what the device shows may lag behind.
		if p = s; err != nil && m.primary.dir == "" && srcErr == nil {
			srcErr = err
		}
	} else if m.primary.loc != nil {
		p.identity = identityOf(m.primary.loc)
	}
	if srcErr != nil {
		p.fail(srcErr)
	}
	rep.Volumes = append(rep.Volumes, *p)

	states := map[*member]*statusVolume{}
	for _, x := range m.volumes() {
		x.inspect()
		for _, t := range x.targets {
			s := &statusVolume{Role: "target", Name: t.name}
			if t.loc != nil {
				s.identity = identityOf(t.loc)
			}
			if t.vol != nil {
				var err error
				if s, err = inv.examine("target", t.vol); err != nil && t.err == nil {
					t.err = err
				}
			}
			states[t] = s
		}
	}
	var results [][]replicate.Result
	if srcErr == nil {
		o := replicate.Options{Selection: inv.selection(), DryRun: true, Log: inv.engineLog(true)}
		results, srcErr = m.run(blockdev.ReadOnly, o, inv.engine.sync)
	}
	outcomes := m.outcomes(results, srcErr)
	for _, o := range outcomes {
		s := states[o.member]
		switch {
		case o.err != nil:
			s.fail(o.err)
			s.State = o.statusState()
		case o.result == nil:
			// The primary failed: what is known is the health.
		case o.result.Outcome == replicate.Differs:
			s.State, s.Changes = "drifted", len(o.result.Summary.Changes)
		default:
			s.State = string(o.result.Outcome)
		}
		rep.Volumes = append(rep.Volumes, *s)
	}
	if srcErr != nil {
		return rep, srcErr
	}
	return rep, m.failureOf(outcomes)
}

// statusState is the state of a target that could not be compared. Damage is a state of its own here.
func (o *outcome) statusState() string {
	if errors.Is(o.err, fatdriver.ErrDamaged) || errors.Is(o.err, gpt.ErrDamaged) {
		return "damaged"
	}
	return o.state()
}

// statusReport is the result of status.
type statusReport struct {
	failure
	Volumes []statusVolume `json:"volumes"`

	unread bool // some disk, so that there may be more volumes
}

type statusVolume struct {
	Role      string `json:"role,omitempty"`
	Name      string `json:"name"`
	Directory string `json:"directory,omitempty"` // the primary's, or where the volume is mounted
	identity
	Free    *int64     `json:"free_bytes,omitempty"`
	State   string     `json:"state"`
	Changes int        `json:"changes,omitempty"`
	Error   *jsonError `json:"error,omitempty"`
}

func (s *statusVolume) fail(err error) {
	s.State = (&outcome{err: err}).statusState()
	s.Error = newJSONError(err)
}

func (r *statusReport) print(o *output) {
	t := newTable("ROLE", "VOLUME", "PARTITION GUID", "SERIAL", "LABEL", "FAT", "FREE", "STATE")
	t.spare = []string{"PARTITION GUID"}
	for _, v := range r.Volumes {
		free, state := "", v.State
		if v.Free != nil {
			free = sizeText(*v.Free)
		}
		if v.Changes > 0 {
			state += ", " + plural(int64(v.Changes), "change", "changes")
		}
		if v.Directory != "" && v.Directory != v.Name {
			state += ", mounted on " + v.Directory
		}
		word, _, _ := strings.Cut(state, ",")
		t.row(cell{text: v.Role}, cell{text: v.Name}, cell{text: v.PartGUID}, cell{text: v.Serial}, cell{text: v.Label},
			cell{text: v.FATType}, cell{text: free, right: true}, cell{text: state, tint: outcomeTint(word)})
	}
	if len(r.Volumes) > 0 {
		t.print(o)
	} else {
		o.noVolume(r.unread)
	}
}
