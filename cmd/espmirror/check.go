package main

import (
	"errors"
	"fmt"

	"github.com/urfave/cli/v2"

	"espmirror/fatdriver"
	"espmirror/replicate"
)

// errDamage is returned by check for a volume with damage: it is neither source nor target.
var errDamage = errors.New("the volume is damaged")

func (inv *invocation) checkCommand() *cli.Command {
	return &cli.Command{
		Name:      "check",
		Usage:     "read every structure of a volume, and tell what is wrong with it",
		UsageText: "espmirror check [OPTIONS] VOLUME...",
		Description: "Nothing is written. The exit status is 0 for a sound volume, notes and warnings included (they harm no\n" +
			"reader), 1 for damage, and 5 when an interrupted run is unfinished and nothing else is wrong.",
		Action: inv.action(1, -1, "name the volumes: espmirror check VOLUME...", inv.check),
	}
}

func (inv *invocation) check() (report, error) {
	rep := &checkReport{Volumes: []checkedVolume{}, quiet: inv.quiet}
	names := inv.c.Args().Slice()
	var errs []error
	for _, name := range names {
		if err := inv.ctx.Err(); err != nil {
			return rep, err
		}
		v, err := inv.checkOne(name, names)
		if err != nil {
			v.Error = newJSONError(err)
			errs = append(errs, err)
		}
		rep.Volumes = append(rep.Volumes, *v)
	}
	return rep, worst(errs)
}

// worst joins the errors of several volumes that have nothing to do with each other. All are printed; the exit status
// is 1 unless they agree on another one.
func worst(errs []error) error {
	switch len(errs) {
	case 0:
		return nil
	case 1:
		return errs[0]
	}
	return &volumesError{errs}
}

func (inv *invocation) checkOne(name string, among []string) (*checkedVolume, error) {
	c := &checkedVolume{Name: name, Findings: []findingReport{}}
	v, err := inv.openReadable("check", name, existing(among)...)
	if err != nil {
		return c, err
	}
	defer v.Close()
	if v.exfat != nil {
		return c, c.checkExFAT(v)
	}
	r, err := v.fat.Check()
	if err != nil {
		return c, fmt.Errorf("cannot check %s: %w", name, err)
	}
	c.identity = identityOf(v.loc)
	c.addFAT(v.fat, nil)
	c.Label = r.Label
	c.Files, c.Dirs = r.Files, r.Dirs
	c.UsedBytes, c.FreeBytes = r.ClusterBytes(r.UsedClusters), r.ClusterBytes(r.FreeClusters)
	c.BadClusters, c.LostClusters = r.BadClusters, r.LostClusters
	damage := 0
	for _, f := range r.Findings {
		fr := findingReport{Severity: f.Severity.String(), Path: f.Path, Cluster: f.Cluster, Message: f.Msg, text: f.String()}
		if f.Off >= 0 {
			off := f.Off
			fr.Off = &off
		}
		c.Findings = append(c.Findings, fr)
		if f.Severity == fatdriver.Damage {
			damage++
		}
	}
	if damage > 0 {
		return c, fmt.Errorf("cannot call %s sound: %w: %s", name, errDamage, plural(int64(damage), "finding", "findings"))
	}
	pending, err := inv.engine.pending(v.target())
	if err != nil {
		return c, prefixed("check", name, err)
	}
	if c.NeedsRecovery = pending; pending {
		return c, recoverHint(fmt.Errorf("cannot call %s whole: %w", name, replicate.ErrNeedsRecovery), name)
	}
	return c, nil
}

// checkReport is the result of check.
type checkReport struct {
	failure
	Volumes []checkedVolume `json:"volumes"`

	quiet bool
}

type checkedVolume struct {
	Name string `json:"name"`
	identity
	Files         int             `json:"files"`
	Dirs          int             `json:"directories"`
	UsedBytes     int64           `json:"used_bytes"`
	FreeBytes     int64           `json:"free_bytes"`
	BadClusters   int64           `json:"bad_clusters"`
	LostClusters  int64           `json:"lost_clusters"`
	NeedsRecovery bool            `json:"needs_recovery"`
	Findings      []findingReport `json:"findings"`
	Error         *jsonError      `json:"error,omitempty"`
}

type findingReport struct {
	Severity string `json:"severity"`
	Path     string `json:"path,omitempty"`
	Cluster  uint32 `json:"cluster,omitempty"`
	Off      *int64 `json:"offset_bytes,omitempty"`
	Message  string `json:"message"`

	text string
}

func severityTint(s string) tint {
	switch s {
	case "damage":
		return red
	case "warning":
		return yellow
	}
	return dim
}

func (r *checkReport) print(o *output) {
	for _, v := range r.Volumes {
		for _, f := range v.Findings {
			o.printf("%s: %s: %s\n", safe(v.Name), o.paint(severityTint(f.Severity), f.Severity), safe(f.text))
		}
		if v.FATType == "" || r.quiet {
			continue // it could not be read: the error says why
		}
		o.printf("%s: %s, %s, %s, %s used, %s free\n", safe(v.Name), v.FATType, plural(int64(v.Files), "file", "files"),
			plural(int64(v.Dirs), "directory", "directories"), sizeText(v.UsedBytes), sizeText(v.FreeBytes))
	}
}
