package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strings"

	"github.com/urfave/cli/v2"

	"espmirror/blockdev"
	"espmirror/replicate"
)

func (inv *invocation) syncCommand() *cli.Command {
	c := &cli.Command{
		Name:  "sync",
		Usage: "make the selected files of each target those of the primary",
		UsageText: "espmirror sync [OPTIONS]\n" +
			"espmirror sync [OPTIONS] --primary VOLUME --target VOLUME [--target VOLUME]...",
		Description: "With no volume named, from the ESP that was booted to the other members of its replica set.\n" +
			"An interrupted earlier run is finished first. A power cut at any moment leaves on each target the old\n" +
			"files or the new ones. With --dry-run the whole plan is printed, and nothing is written.",
		Flags: append(append(setFlags(), selectFlags()...),
			&cli.BoolFlag{Name: "dry-run", Aliases: []string{"n"}, Usage: "print what would be done, and write nothing", DisableDefaultText: true},
			&cli.GenericFlag{Name: "keep-free", Value: &once{}, Usage: "refuse a target that would have less than `SIZE` free at the peak (64M, 1G)"},
			&cli.StringFlag{Name: "compare", Value: "content", Usage: "how to find what changed; `MODE` is content, or fingerprint, which reads no file where nothing has changed"},
			&cli.BoolFlag{Name: "force", Usage: "let the primary win where a target is newer or has gone its own way", DisableDefaultText: true},
			timeoutFlag(),
			&cli.StringFlag{Name: "random-seed", Value: "no", Usage: "also give each target a fresh random seed of its own: `yes|no`"},
			&cli.StringFlag{Name: "read-back", Value: "yes", Usage: "compare what was written with the medium before the commit: `yes|no`"},
			jobsFlag("all of them"), noProgressFlag()),
		Action: inv.action(0, 0, "name the volumes with --primary and --target", inv.sync),
	}
	if !forInitrd {
		c.Flags = append(c.Flags, manifestFlags()...)
	}
	return c
}

func (inv *invocation) sync() (report, error) {
	dryRun := inv.flag("dry-run")
	o := replicate.Options{Selection: inv.selection(), DryRun: dryRun, Log: inv.engineLog(dryRun)}
	if v := inv.text("keep-free"); v != "" {
		var err error
		if o.KeepFree, err = replicate.ParseSize(v); err != nil {
			return nil, usagef("--keep-free: %v", err)
		}
	}
	switch v := inv.text("read-back"); v {
	case "yes":
	case "no":
		o.NoReadBack = true
	default:
		return nil, usagef("--read-back=%s is not yes or no", v)
	}
	switch v := inv.text("compare"); v {
	case "content":
	case "fingerprint":
		o.Fingerprint = true
	default:
		return nil, usagef("--compare=%s is not content or fingerprint", v)
	}
	run := inv.engine.sync
	switch v := inv.text("random-seed"); v {
	case "no":
	case "yes":
		run = thenSeeds(run)
	default:
		return nil, usagef("--random-seed=%s is not yes or no", v)
	}
	o.Force = inv.flag("force")
	if _, _, err := inv.timeout(); err != nil {
		return nil, err
	}
	if err := inv.readJobs(); err != nil {
		return nil, err
	}
	m, err := inv.newMembers("sync")
	if err != nil {
		return nil, err
	}
	if !forInitrd {
		return inv.thenManifest(m, dryRun, func() (report, error) { return inv.replicate(m, o, run, !dryRun) })
	}
	return inv.replicate(m, o, run, !o.DryRun)
}

// thenSeeds gives each ESP that is in sync a fresh random seed. The ESPs are the last job.
func thenSeeds(run engineRun) engineRun {
	return func(ctx context.Context, jobs []replicate.Job) ([][]replicate.Result, error) {
		results, err := run(ctx, jobs)
		if err != nil || len(jobs) == 0 {
			return results, err
		}
		job, last := jobs[len(jobs)-1], results[len(jobs)-1]
		for i, t := range job.Targets {
			if r := &last[i]; r.Err == nil {
				o := replicate.SeedOptions{DryRun: job.Options.DryRun}
				o.Log = job.Options.Log
				seed, err := replicate.RandomSeed(ctx, t, o)
				if seed.Outcome == replicate.Refreshed || seed.Outcome == replicate.Created {
					r.Written += 32 // of a seed
				}
				if err != nil {
					r.Err, r.Outcome = fmt.Errorf("cannot renew the random seed of %s: %w", t.Name, err), replicate.Failed
				}
			}
		}
		return results, nil
	}
}

// replicate carries out what sync and verify have in common: guards, locks, the run, and the report.
func (inv *invocation) replicate(m *members, o replicate.Options, run engineRun, write bool) (report, error) {
	defer m.close()
	if err := m.sources(); err != nil {
		return nil, err
	}
	for _, x := range m.volumes() {
		x.inspect()
	}
	if m.verb == "sync" {
		m.together()
	}
	mode := blockdev.ReadOnly
	if write {
		mode = blockdev.ReadWrite
		if err := m.lock(); err != nil {
			return nil, err
		}
	}
	source := m.src.Name()
	results, err := m.run(mode, o, run)
	if err != nil && results == nil {
		return nil, err
	}
	m.close() // what fails in closing a target belongs to its outcome
	outcomes := m.outcomes(results, err)
	rep := newRunReport(m, source, o, outcomes)
	rep.quiet, rep.verbose = inv.quiet, inv.verbose
	if err != nil {
		return rep, err
	}
	return rep, m.failureOf(outcomes)
}

// runReport is the result of sync and verify.
type runReport struct {
	failure
	Command string         `json:"command"`
	DryRun  bool           `json:"dry_run"`
	Primary string         `json:"primary"`
	Source  string         `json:"source"`
	Targets []targetReport `json:"targets"`

	quiet, verbose bool
}

type targetReport struct {
	Name    string `json:"name"`
	Outcome string `json:"outcome"`
	identity
	Recovered *recoveryReport `json:"recovered,omitempty"`
	Lineage   *lineageReport  `json:"lineage,omitempty"`
	Summary   *summaryReport  `json:"summary,omitempty"`
	Error     *jsonError      `json:"error,omitempty"`
}

// lineageReport says how a target stood to the primary.
type lineageReport struct {
	Verdict    string `json:"verdict"`
	Forced     bool   `json:"forced"`
	Generation uint64 `json:"generation"`        // the target's before the run, 0 when it had none
	Source     uint64 `json:"source_generation"` // what the run brought, or would have
}

// summaryReport is what is known of a run or a comparison.
type summaryReport struct {
	Early   []changeReport `json:"early,omitempty"` // what goes first, in a transaction of its own
	Changes []changeReport `json:"changes"`
	*planReport
}

// planReport holds the numbers of a plan. A verification makes none, and a refused target may not have come to one.
type planReport struct {
	Commits       []commitReport `json:"commits"`
	DataBytes     int64          `json:"data_bytes"`
	BytesToWrite  int64          `json:"bytes_to_write"`
	Clusters      int64          `json:"clusters"`
	ClustersFreed int64          `json:"clusters_freed"`
	FreeBytes     int64          `json:"free_bytes"`
	FreeAfter     int64          `json:"free_after_bytes"`
	PeakNeeded    int64          `json:"peak_needed_bytes"`
	Flushes       int            `json:"flushes"`
}

type changeReport struct {
	Op   string `json:"op"`
	Path string `json:"path"`
	From string `json:"from,omitempty"`
	Dir  bool   `json:"dir"`
	Size int64  `json:"size_bytes"`
}

type commitReport struct {
	Paths []string `json:"paths"`
	Off   int64    `json:"offset_bytes"`
}

func newRunReport(m *members, source string, o replicate.Options, outcomes []*outcome) *runReport {
	rep := &runReport{Command: m.verb, DryRun: o.DryRun, Primary: m.primary.name, Source: source, Targets: []targetReport{}}
	for _, oc := range outcomes {
		t := targetReport{Name: oc.member.name, Outcome: oc.state(), Error: newJSONError(oc.err)}
		if oc.member.loc != nil {
			t.identity = identityOf(oc.member.loc)
			t.Serial = oc.member.serial
		}
		if oc.result != nil {
			t.Summary = newSummaryReport(m.verb, oc.result)
			t.Recovered = newRecoveryReport(oc.result.Recovered)
			if l := oc.result.Lineage; l != nil {
				t.Lineage = &lineageReport{string(l.Verdict), l.Forced, l.Generation, l.Source}
			}
		}
		rep.Targets = append(rep.Targets, t)
	}
	return rep
}

// newSummaryReport leaves out what was not found out, so that no zero stands for "unknown"; it returns nil when nothing was.
func newSummaryReport(verb string, res *replicate.Result) *summaryReport {
	s := &res.Summary
	planned := verb != "verify" && (res.Err == nil || len(s.Commits) > 0)
	compared := planned || res.Err == nil || len(s.Changes) > 0 || verb == "verify" && errors.Is(res.Err, replicate.ErrNeedsRecovery)
	if !compared {
		return nil
	}
	r := &summaryReport{Changes: []changeReport{}}
	for _, c := range s.Changes {
		r.Changes = append(r.Changes, changeReport{c.Op, c.Path, c.From, c.Dir, c.Size})
	}
	for _, c := range s.Early {
		r.Early = append(r.Early, changeReport{c.Op, c.Path, c.From, c.Dir, c.Size})
	}
	if !planned {
		return r
	}
	r.planReport = &planReport{
		Commits: []commitReport{}, DataBytes: s.DataBytes, BytesToWrite: s.BytesToWrite,
		Clusters: s.Clusters, ClustersFreed: s.ClustersFreed, FreeBytes: s.FreeBytes, FreeAfter: s.FreeAfter,
		PeakNeeded: s.PeakNeeded, Flushes: s.Flushes,
	}
	for _, c := range s.Commits {
		r.Commits = append(r.Commits, commitReport{c.Paths, c.Off})
	}
	return r
}

func outcomeTint(s string) tint {
	switch s {
	case "in sync", "synced", "ok", "finished", "rolled back", "rolled forward", "nothing to do":
		return green
	case "differs", "drifted", "busy", "stale", "new", "needs recovery", "not compared":
		return yellow
	}
	return red
}

func (r *runReport) print(o *output) {
	if r.quiet {
		return
	}
	if r.DryRun || r.verbose || r.Command == "verify" {
		for i := range r.Targets {
			if r.DryRun || r.Targets[i].Summary != nil {
				r.Targets[i].printPlan(o, r.Command == "verify")
			}
		}
	}
	if r.DryRun {
		return
	}
	if r.Command == "verify" {
		t := newTable("TARGET", "STATE", "DIFFERENCES")
		for _, x := range r.Targets {
			n := ""
			if x.Summary != nil {
				n = fmt.Sprint(len(x.Summary.Changes))
			}
			t.row(nameCell(x.Name), cell{text: x.Outcome, tint: outcomeTint(x.Outcome)}, cell{text: n, right: true})
		}
		t.print(o)
		return
	}
	if len(r.Targets) == 0 {
		return // the log has said that the set has no other member
	}
	t := newTable("TARGET", "OUTCOME", "CHANGES", "WRITTEN", "FREE", "RECOVERY")
	for _, x := range r.Targets {
		var changes, written, free, recovery string
		if s := x.Summary; s != nil && s.planReport != nil && x.Error == nil {
			changes, written, free = fmt.Sprint(len(s.Changes)), sizeText(s.BytesToWrite), sizeText(s.FreeAfter)
		}
		if x.Recovered != nil && x.Recovered.Action != "nothing to do" {
			recovery = x.Recovered.Action
		}
		t.row(nameCell(x.Name), cell{text: x.Outcome, tint: outcomeTint(x.Outcome)}, cell{text: changes, right: true},
			cell{text: written, right: true}, cell{text: free, right: true}, cell{text: recovery})
	}
	t.print(o)
}

// printPlan prints all that a run does to a target, or all that a verification found.
func (t *targetReport) printPlan(o *output, verify bool) {
	s := t.Summary
	if s == nil {
		s = &summaryReport{}
	}
	o.printf("%s: %s", safe(t.Name), o.paint(outcomeTint(t.Outcome), t.Outcome))
	if n := int64(len(s.Changes)); verify && n > 0 {
		o.printf(", %s", plural(n, "difference", "differences"))
	} else if n > 0 {
		o.printf(", %s", plural(n, "change", "changes"))
	}
	o.printf("\n")
	if r := t.Recovered; r != nil {
		o.printf("  recovery %s\n", r.Action)
	}
	if len(s.Early) > 0 {
		o.printf("  there is no room for old and new side by side; a first transaction makes some:\n")
		for _, c := range s.Early {
			c.print(o)
		}
		o.printf("  then:\n")
	}
	for _, c := range s.Changes {
		c.print(o)
	}
	if s.planReport == nil || len(s.Changes) == 0 {
		return
	}
	for _, c := range s.Commits {
		o.printf("  commit   %s (the sector at 0x%x)\n", safe(strings.Join(c.Paths, ", ")), c.Off)
	}
	o.printf("  writes   %s (%d bytes, %d of them file content) with %s\n", sizeText(s.BytesToWrite), s.BytesToWrite,
		s.DataBytes, plural(int64(s.Flushes), "flush", "flushes"))
	o.printf("  clusters %d allocated, %d freed afterwards\n", s.Clusters, s.ClustersFreed)
	o.printf("  free     %s now, %s afterwards; %s needed at the peak\n", sizeText(s.FreeBytes), sizeText(s.FreeAfter), sizeText(s.PeakNeeded))
}

func (c *changeReport) print(w io.Writer) {
	path := safe(c.Path)
	if c.From != "" {
		path = safe(c.From) + " -> " + path
	}
	if c.Dir {
		fmt.Fprintf(w, "  %-8s %s/\n", c.Op, strings.TrimSuffix(path, "/"))
		return
	}
	fmt.Fprintf(w, "  %-8s %s (%s)\n", c.Op, path, sizeText(c.Size))
}
