package main

import (
	"context"
	"errors"
	"fmt"
	"math"
	"strconv"
	"strings"
	"time"

	"github.com/urfave/cli/v2"

	"espmirror/gpt"
)

// defaultWait is how long `wait` waits. Disks behind a slow controller need some seconds; a boot must not stand still
// much longer for one that is gone.
const defaultWait = "10s"

func (inv *invocation) waitCommand() *cli.Command {
	return &cli.Command{
		Name:      "wait",
		Aliases:   []string{"wait-secondary-esps"},
		Usage:     "wait until partitions are there, for a bounded time",
		UsageText: "espmirror wait [OPTIONS] GUID...",
		Description: "A GUID is that of a partition, bare or as PARTUUID=. When all are there, it returns at once. When the time is\n" +
			"up, it tells which are missing, and the exit status is 3. Nothing is written.",
		Flags: []cli.Flag{
			&cli.StringFlag{Name: "timeout", Value: defaultWait, Usage: "wait no longer than `TIME`: 5s, 2min, 500ms; 0 looks once"},
		},
		Action: inv.action(0, -1, "", inv.wait),
	}
}

func (inv *invocation) wait() (report, error) {
	timeout, err := parseTime(inv.text("timeout"))
	if err != nil {
		return nil, usagef("--timeout: %v", err)
	}
	names := inv.c.Args().Slice()
	if len(names) == 0 {
		return nil, &usageError{"no member was given", "name the members: espmirror wait PARTUUID=…"}
	}
	for _, name := range names {
		if _, err := gpt.ParsePartUUID(name); err != nil {
			return nil, &usageError{err.Error(), "name the members by their partition GUIDs, as `espmirror list` shows them"}
		}
	}
	return inv.waitFor(names, timeout)
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

// timeUnits are the units of systemd.time(7) that a timeout can sensibly have.
var timeUnits = map[string]time.Duration{
	"": time.Second, "s": time.Second, "sec": time.Second, "second": time.Second, "seconds": time.Second,
	"ms": time.Millisecond, "msec": time.Millisecond,
	"m": time.Minute, "min": time.Minute, "minute": time.Minute, "minutes": time.Minute,
	"h": time.Hour, "hr": time.Hour, "hour": time.Hour, "hours": time.Hour,
}

// parseTime reads a span of time as systemd writes it: numbers with units, which add up, such as "5s", "2min", "1min 30s",
// "1.5s"; a number without a unit is seconds.
func parseTime(s string) (time.Duration, error) {
	bad := fmt.Errorf("%q is not a time such as 5s, 2min or 500ms", s)
	const digits = "0123456789."
	rest, sum := strings.TrimSpace(s), time.Duration(0)
	if rest == "" {
		return 0, bad
	}
	for rest != "" {
		number := rest[:len(rest)-len(strings.TrimLeft(rest, digits))]
		rest = strings.TrimLeft(rest[len(number):], " ")
		word := rest
		if i := strings.IndexAny(rest, digits+" "); i >= 0 {
			word = rest[:i]
		}
		rest = strings.TrimLeft(rest[len(word):], " ")
		unit, ok := timeUnits[word]
		n, err := strconv.ParseFloat(number, 64)
		if !ok || err != nil {
			return 0, bad
		}
		n *= float64(unit)
		if n > float64(math.MaxInt64-sum)/2 { // with room for what rounding adds
			return 0, fmt.Errorf("%s is too long", s)
		}
		sum += time.Duration(math.Round(n))
	}
	return sum, nil
}
