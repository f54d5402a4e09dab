package main

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"slices"
	"strings"
	"time"

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
		Description: "With no volume named, the replica set of the ESP that was booted; without a set, the ESPs of this machine\n" +
			"and their health. Nothing is written. GEN is the generation: it grows with each completed change.\n" +
			"BOOT are the boot entries of the firmware that lead there; in brackets those that it does not try by itself.\n\n" +
			"States: ok, in sync, drifted (files differ), stale (behind the primary), new (never in a set), newer (ahead\n" +
			"of the primary: it is refused), diverged (both were changed: it is refused), changed (there alone: it is\n" +
			"refused), needs recovery, damaged, busy, missing, not compared, refused, failed, stopped.",
		Flags:  append(append(append(setFlags(), selectFlags()...), noProgressFlag()), metricsFlags()...),
		Action: inv.action(0, 0, "name the volumes with --primary and --target", inv.status),
	}
}

func (inv *invocation) status() (report, error) {
	done, err := inv.statusOfVolumes()
	if rep, ok := done.(*statusReport); ok {
		inv.addEntries(rep)
	}
	return done, err
}

func (inv *invocation) statusOfVolumes() (report, error) {
	rep := &statusReport{Volumes: []statusVolume{}}
	if inv.metrics = inv.flag("metrics"); inv.metrics && inv.json != "off" {
		inv.metrics = false
		return nil, usagef("--metrics and --json exclude each other")
	}
	m, err := inv.newMembers("compare")
	var noSet *usageError
	var broken primaryError
	switch {
	case err == nil:
		defer m.close()
		return inv.statusOfSet(rep, m)
	case errors.As(err, &broken):
		rep := inv.statusWithout(rep, m, err)
		if hintOf(err) == "" && m.primary.loc == nil {
			err = withHint(err, "`espmirror list` shows what is there")
		}
		return rep, err
	case !errors.As(err, &noSet):
		return nil, err
	}
	// There is nothing to compare: the volumes are shown one by one.
	primary, targets := inv.text("primary"), inv.list("target")
	if primary == "" {
		primary = os.Getenv("SYSTEMD_ESP_PATH")
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

// statusWithout shows what is known when the primary cannot be used.
func (inv *invocation) statusWithout(rep *statusReport, m *members, err error) report {
	p := &statusVolume{Role: "primary", Name: m.primary.name, Directory: m.primary.dir}
	if m.primary.loc != nil {
		p.identity = identityOf(m.primary.loc)
	}
	if p.fail(err); errors.Is(err, gpt.ErrNotFound) || errors.Is(err, fs.ErrNotExist) {
		p.State = "missing"
		p.PartGUID, _ = strings.CutPrefix(m.primary.name, "PARTUUID=")
		if p.PartGUID == m.primary.name {
			p.PartGUID = ""
		}
	}
	rep.Volumes = append(rep.Volumes, *p)
	for _, name := range inv.list("target") {
		v, err := inv.health("target", name)
		if err != nil {
			inv.log.Warn(err.Error())
		}
		rep.Volumes = append(rep.Volumes, *v)
	}
	return rep
}

// health tells what is known of one volume by itself.
func (inv *invocation) health(role, name string) (*statusVolume, error) {
	if role == "primary" && isArchive(name) {
		return &statusVolume{Role: role, Name: name, State: "ok"}, nil
	}
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
		return s, withHint(wrap(err), "run `espmirror check %s` to see all of it", quoted(v.name))
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
func (inv *invocation) statusOfSet(rep *statusReport, m *members) (report, error) {
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
	if st, err := replicate.ReadState(m.src); err == nil && st != nil {
		p.setState(st)
	}
	rep.Volumes = append(rep.Volumes, *p)

	states := map[*member]*statusVolume{}
	for _, x := range m.volumes() {
		x.inspect()
		for _, t := range x.targets {
			s := &statusVolume{Role: "target", Name: t.name}
			if t.loc != nil {
				s.identity = identityOf(t.loc)
			} else if guid, ok := strings.CutPrefix(t.name, "PARTUUID="); ok {
				s.PartGUID = guid
			}
			if t.vol != nil {
				var err error
				if s, err = inv.examine("target", t.vol); err != nil && t.err == nil {
					t.err = err
				}
			}
			s.Set = t.diff
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
		if o.result != nil && o.result.Lineage != nil {
			s.setLineage(o.result.Lineage)
		}
		if o.result != nil && o.err == nil {
			s.compared = true
		}
		switch {
		case o.err != nil:
			s.fail(o.err)
			s.State = o.statusState()
		case o.result == nil && srcErr != nil:
			s.State = "not compared" // by itself it is sound
		case o.result == nil:
		case o.result.Outcome == replicate.Differs:
			s.State, s.Changes = behind(o.result.Lineage), len(o.result.Summary.Changes)
			s.Next = m.syncCommand(o.member)
		default:
			s.State = string(o.result.Outcome)
		}
		rep.Volumes = append(rep.Volumes, *s)
	}
	if srcErr != nil {
		if len(rep.Volumes) > 0 && rep.Volumes[0].State == "ok" {
			rep.Volumes[0].fail(srcErr)
		}
		return rep, srcErr
	}
	return rep, m.failureOf(outcomes)
}

// behind words how a target that can be brought up to date stands to the primary.
func behind(l *replicate.Lineage) string {
	switch {
	case l == nil:
		return "drifted"
	case l.Verdict == replicate.FirstSync:
		return "new"
	case l.Generation < l.Base:
		return "stale"
	}
	return "drifted"
}

// syncCommand is what brings a target up to date.
func (m *members) syncCommand(t *member) string {
	if m.bySet {
		if p := m.inv.text("primary"); p != "" {
			return "espmirror sync --primary " + quoted(p)
		}
		return "espmirror sync"
	}
	if t.esp != nil {
		t = t.esp
	}
	return fmt.Sprintf("espmirror sync --primary %s --target %s", quoted(m.primary.name), quoted(t.name))
}

// setState adds what a volume remembers of the replica set.
func (s *statusVolume) setState(st *replicate.State) {
	s.Generation = st.Generation
	s.setLastRun(st.UpdatedAt())
}

// setLineage adds how a target stands to the primary.
func (s *statusVolume) setLineage(l *replicate.Lineage) {
	s.Generation, s.Lineage = l.Generation, string(l.Verdict)
	s.setLastRun(l.Last)
}

// setLastRun adds when the last run ended, by a clock that may have been wrong then.
func (s *statusVolume) setLastRun(t time.Time) {
	if t.IsZero() || t.Year() > 9999 {
		return
	}
	s.LastRun, s.lastRun = t.UTC().Format(time.RFC3339), t
}

// statusState is the state of a target that could not be compared. Damage is a state of its own here.
func (o *outcome) statusState() string {
	if errors.Is(o.err, fatdriver.ErrDamaged) || errors.Is(o.err, gpt.ErrDamaged) {
		return "damaged"
	}
	switch {
	case errors.Is(o.err, replicate.ErrStaleSource) && o.result != nil && changedAlone(o.result.Lineage):
		return "changed"
	case errors.Is(o.err, replicate.ErrStaleSource):
		return "newer"
	case errors.Is(o.err, replicate.ErrDiverged):
		return "diverged"
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
	Free       *int64     `json:"free_bytes,omitempty"`
	Generation uint64     `json:"generation,omitempty"`
	Lineage    string     `json:"lineage,omitempty"`  // the verdict
	LastRun    string     `json:"last_run,omitempty"` // RFC 3339
	State      string     `json:"state"`
	Changes    int        `json:"changes,omitempty"`
	Next       string     `json:"next,omitempty"` // the command to run
	Error      *jsonError `json:"error,omitempty"`
	// Set is how the target's set file differs from the primary's; nil when it does not, or when there is none.
	Set *setDifference `json:"set_differs,omitempty"`
	volumeEntries

	compared bool // Changes is known
	lastRun  time.Time
}

func (s *statusVolume) fail(err error) {
	s.State = (&outcome{err: err}).statusState()
	s.Error = newJSONError(err)
}

func (r *statusReport) print(o *output) {
	headings := []string{"ROLE", "VOLUME", "PARTITION GUID", "SERIAL", "LABEL", "FAT", "FREE", "GEN", "STATE"}
	inSet := slices.ContainsFunc(r.Volumes, func(v statusVolume) bool { return v.Generation > 0 })
	if !inSet {
		headings = slices.DeleteFunc(headings, func(h string) bool { return h == "GEN" })
	}
	t := newTable(headings...)
	t.spare = []string{"PARTITION GUID", "LABEL", "FAT", "SERIAL"}
	var next []string
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
		role := v.Role
		if v.PartType == "XBOOTLDR" && role != "" {
			role = "XBOOTLDR" // it goes with the ESP of its disk
		}
		row := []cell{{text: role}, nameCell(v.Name), {text: v.PartGUID}, {text: v.Serial}, {text: v.Label},
			{text: v.FATType}, {text: free, right: true}}
		if inSet {
			gen := ""
			if v.Generation > 0 {
				gen = fmt.Sprint(v.Generation)
			}
			row = append(row, cell{text: gen, right: true})
		}
		t.row(append(row, cell{text: state, tint: outcomeTint(word)})...)
		if v.Next != "" && !slices.Contains(next, v.Next) {
			next = append(next, v.Next)
		}
	}
	r.entryColumn(t)
	if len(r.Volumes) > 0 {
		t.print(o)
	} else {
		o.noVolume(r.unread)
	}
	for _, cmd := range next {
		o.printf("next: %s\n", safe(cmd))
	}
}
