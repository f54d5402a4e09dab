package main

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/urfave/cli/v2"

	"espmirror/gpt"
	"espmirror/replicate"
)

// waitVerb completes "cannot …".
const waitVerb = "wait for"

// defaultWait is how long `wait` waits. Disks behind a slow controller need some seconds; a boot must not stand still
// much longer for one that is gone.
const defaultWait = "10s"

func (inv *invocation) waitCommand() *cli.Command {
	return &cli.Command{
		Name:      "wait",
		Aliases:   []string{"wait-secondary-esps"},
		Usage:     "wait until partitions are there, for a bounded time",
		UsageText: "espmirror wait [OPTIONS] [GUID...]",
		Description: "A GUID is that of a partition, bare or as PARTUUID=. With none, the members of the primary's replica set are\n" +
			"waited for, and before them the primary itself, if it is what was booted. When all are there, it returns at\n" +
			"once. When the time is up, it tells which are missing, and the exit status is 3. Nothing is written.",
		Flags: []cli.Flag{
			&cli.GenericFlag{Name: "primary", Value: &once{}, Usage: "wait for the members of the replica set of this `VOLUME` or directory (default: $SYSTEMD_ESP_PATH, else the ESP that was booted)"},
			&cli.GenericFlag{Name: "timeout", Value: &once{}, Usage: "wait no longer than `TIME`: 5s, 2min, 500ms; 0 looks once (default: what the set says, else " + defaultWait + ")"},
		},
		Action: inv.action(0, -1, "", inv.wait),
	}
}

func (inv *invocation) wait() (report, error) {
	timeout, given, err := inv.timeout()
	if err != nil {
		return nil, err
	}
	if !given {
		if timeout, err = replicate.ParseTime(defaultWait); err != nil {
			return nil, fmt.Errorf("internal error: %w", err)
		}
	}
	names := inv.c.Args().Slice()
	if len(names) == 0 {
		return inv.waitForSet(timeout, given)
	}
	if inv.text("primary") != "" {
		return nil, usagef("--primary and the GUIDs of members exclude each other")
	}
	for _, name := range names {
		if _, err := gpt.ParsePartUUID(name); err != nil {
			return nil, &usageError{err.Error(), "name the members by their partition GUIDs, as `espmirror list` shows them"}
		}
	}
	return inv.waitFor(names, timeout)
}

// lookedOnce is more time than it takes to find a primary that is there.
const lookedOnce = 500 * time.Millisecond

// waitForSet waits for the members of the primary's replica set. The primary has its share of the time when it is not
// there itself.
func (inv *invocation) waitForSet(timeout time.Duration, given bool) (report, error) {
	start := time.Now()
	name, booted, err := inv.primaryName()
	if err != nil {
		return nil, &usageError{"no member was given, and no primary: " + err.Error(), "name the members, as in `espmirror wait PARTUUID=…`, or the primary with --primary"}
	}
	guid, isGUID := strings.CutPrefix(name, "PARTUUID=")
	if isGUID {
		if rep, err := inv.waitFor([]string{guid}, timeout); err != nil {
			return rep, err
		}
	}
	m := &members{inv: inv, verb: waitVerb, primary: &member{name: name}, booted: booted, dry: true}
	defer m.close()
	if err := m.findPrimary(nil); err != nil {
		return nil, fmt.Errorf("cannot use primary %s: %w", m.primary.name, err)
	}
	if _, err := m.source(); err != nil {
		return nil, err
	}
	if m.set == nil || len(m.set.Members()) == 0 {
		return nil, &usageError{"no member was given, and " + m.primary.name + " has no " + replicate.SetPath + " that names one",
			"name the members, as in `espmirror wait PARTUUID=…`, or make a replica set with `espmirror add`"}
	}
	if limit, ok := m.set.Timeout(); ok && !given {
		timeout = limit
	}
	members := m.set.Members()
	m.close()
	left := timeout
	if took := time.Since(start); took > lookedOnce {
		left = max((timeout - took).Round(100*time.Millisecond), 0)
	}
	return inv.waitFor(members, left)
}

// waitFor waits for the partitions with the given PARTUUIDs. The report is there with every error.
func (inv *invocation) waitFor(guids []string, timeout time.Duration) (report, error) {
	w := gpt.Waiter{System: inv.system, Tell: func(missing []string) {
		inv.log.Info("waiting for "+partUUIDs(missing), "timeout", timeout.String())
	}}
	start := time.Now()
	absent, err := w.Wait(inv.ctx, guids, timeout)
	took := time.Since(start)
	rep := &waitReport{Members: []waitedMember{}, Waited: took.Seconds(), quiet: inv.quiet}
	seen := map[string]bool{}
	for _, name := range guids {
		guid, perr := gpt.ParsePartUUID(name)
		if perr != nil {
			return nil, perr
		}
		if !seen[guid] {
			rep.Members = append(rep.Members, waitedMember{guid, true})
		}
		seen[guid] = true
	}
	for _, guid := range absent {
		for i := range rep.Members {
			if rep.Members[i].GUID == guid {
				rep.Members[i].Present = false
			}
		}
	}
	if len(absent) == 0 || err != nil && errors.Is(err, context.Canceled) {
		return rep, err
	}
	text := fmt.Sprintf("cannot find %s", partUUIDs(absent))
	if timeout > 0 {
		text += fmt.Sprintf(" within %s", timeout)
	}
	if err != nil {
		return rep, missing{fmt.Errorf("%s: %w", text, err)}
	}
	return rep, missing{errors.New(text)}
}

// partUUIDs names partitions as other commands take them.
func partUUIDs(guids []string) string {
	names := make([]string, len(guids))
	for i, guid := range guids {
		names[i] = "PARTUUID=" + guid
	}
	return strings.Join(names, ", ")
}

// waitReport is the result of wait.
type waitReport struct {
	failure
	Members []waitedMember `json:"members"`
	Waited  float64        `json:"waited_seconds"`

	quiet bool
}

type waitedMember struct {
	GUID    string `json:"partition_guid"`
	Present bool   `json:"present"`
}

func (r *waitReport) print(o *output) {
	if r.quiet {
		return
	}
	for _, m := range r.Members {
		state, t := "there", green
		if !m.Present {
			state, t = "missing", red
		}
		o.printf("PARTUUID=%s: %s\n", safe(m.GUID), o.paint(t, state))
	}
}
