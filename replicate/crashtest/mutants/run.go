package mutants

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"sync"
	"time"
)

// Environment of the suite's process. The first two are also what selector asks for.
const (
	EnvMutant    = "ESPMIRROR_MUTANT"
	EnvUnchecked = "ESPMIRROR_UNCHECKED"
	EnvJob       = "ESPMIRROR_MUTANT_JOB" // a Job
)

// Job is what a process of the suite is to do.
type Job struct {
	Mutant    string
	Unchecked bool    // with the product's own checks off
	First     string  // a word in the names of the scenarios to begin with
	Seconds   float64 // when to stop looking; checked between two phases
	Seeds     int     // generated scenarios after the handmade ones
}

// Event is a line of the suite's output: where it is, and in the last one how it ended.
type Event struct {
	Scenario, Phase string
	Death           string // kind
	Error           string
	End             bool
}

// Kinds of death.
const (
	Violated  = "violation"  // a crash state, or what a check demands
	Invariant = "invariant"  // the product's assertions
	ReadBack  = "read back"  // the product's reading back
	RunFailed = "failed run" // the run itself ends with an error
	BadEnd    = "wrong tree" // without any cut
	Panicked  = "panic"      // or another death of the process
	Hung      = "hang"       // no end within a time that is far more than enough
	Survived  = ""           //
)

// Death is what killed a mutant, and where.
type Death struct {
	By       string
	Scenario string
	Phase    string
	Error    string
	Seconds  float64
}

// Kill is a row of the table.
type Kill struct {
	Mutant, Breaks string
	Death
	// Unchecked is what kills the mutant when the product's own checks are off; nil where they had no part in it.
	Unchecked *Death
	// Redundant is why it is to survive.
	Redundant string
}

// OK says whether the outcome is the expected one.
func (k *Kill) OK() bool { return (k.By == Survived) == (k.Redundant != "") }

// Options of a run over the table.
type Options struct {
	Jobs    int     // at once
	Seconds float64 // for a mutant that is not killed
	Seeds   int     // generated scenarios for each
	Only    string  // a part of the names of the mutants to run
}

// Run builds the mutants of the module in dir and runs all of them. The first row is the product itself, with the name
// "", which must survive. The error is for what kept the table from being made.
func Run(ctx context.Context, dir string, o Options) ([]Kill, error) {
	work, err := os.MkdirTemp("", "espmirror-mutants")
	if err != nil {
		return nil, err
	}
	defer os.RemoveAll(work)
	bin, err := Build(ctx, dir, work)
	if err != nil {
		return nil, err
	}
	kills := []Kill{{Breaks: "nothing: the product itself", Redundant: "it is the product"}}
	jobs := []Job{{Seconds: o.Seconds, Seeds: o.Seeds}}
	for _, m := range Table {
		if strings.Contains(m.Name, o.Only) {
			kills = append(kills, Kill{Mutant: m.Name, Breaks: m.Breaks, Redundant: m.Redundant})
			jobs = append(jobs, Job{Mutant: m.Name, First: m.First, Seconds: o.Seconds, Seeds: o.Seeds})
		}
	}
	next := make(chan int)
	var wg sync.WaitGroup
	for range max(o.Jobs, 1) {
		wg.Add(1)
		go func() {
			defer wg.Done()
			for i := range next {
				k := &kills[i]
				k.Death = jobs[i].run(ctx, bin)
				if k.By == Invariant || k.By == ReadBack {
					j := jobs[i]
					j.Unchecked = true
					d := j.run(ctx, bin)
					k.Unchecked = &d
				}
			}
		}()
	}
	for i := range kills {
		next <- i
	}
	close(next)
	wg.Wait()
	return kills, ctx.Err()
}

// run does a job in a process of its own.
func (j Job) run(ctx context.Context, bin string) Death {
	begin := time.Now()
	// A mutant that hangs is dead; the suite itself stops long before.
	limit := time.Duration(4*j.Seconds+30) * time.Second
	runCtx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	job, err := json.Marshal(j)
	if err != nil {
		return Death{By: Panicked, Error: err.Error()}
	}
	cmd := exec.CommandContext(runCtx, bin)
	// A mutant that eats memory must not take the machine with it.
	cmd.Env = append(os.Environ(), EnvMutant+"=", EnvUnchecked+"=", EnvJob+"="+string(job), "GOMAXPROCS=1", "GOMEMLIMIT=1GiB")
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	runErr := cmd.Run()
	var last Event
	for sc := bufio.NewScanner(&stdout); sc.Scan(); {
		var e Event
		if json.Unmarshal(sc.Bytes(), &e) == nil {
			last = e
		}
	}
	d := Death{By: last.Death, Scenario: last.Scenario, Phase: last.Phase, Error: last.Error, Seconds: time.Since(begin).Seconds()}
	switch {
	case last.End:
	case runCtx.Err() != nil:
		d.By, d.Error = Hung, fmt.Sprintf("no end within %v", limit)
	default:
		d.By, d.Error = Panicked, fmt.Sprintf("%v: %s", runErr, firstLine(stderr.String()))
	}
	return d
}

func firstLine(s string) string {
	line, _, _ := strings.Cut(strings.TrimSpace(s), "\n")
	return line
}

// Report is the table as text.
func Report(kills []Kill) string {
	var b strings.Builder
	for _, k := range kills {
		name, by := k.Mutant, k.By
		if name == "" {
			name = "(none)"
		}
		if by == Survived {
			by = "survived"
		}
		fmt.Fprintf(&b, "%-34s %-10s %4.1f s  %-42s %s\n", name, by, k.Seconds, k.Scenario, k.Phase)
		if u := k.Unchecked; u != nil {
			by := u.By
			if by == Survived {
				by = "survived"
			}
			fmt.Fprintf(&b, "%-34s %-10s %4.1f s  %-42s %s\n", "  … without the product's checks", by, u.Seconds, u.Scenario, u.Phase)
		}
	}
	return b.String()
}
