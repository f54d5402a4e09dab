// The suite that a mutant is to be killed by. It is built by package mutants, with the mutants in it; built without, it
// judges the product.
package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"strings"
	"time"

	"espmirror/fatdriver"
	"espmirror/fixtures"
	"espmirror/replicate/crashtest"
	"espmirror/replicate/crashtest/mutants"
)

// budget is for scenarios of which there are many, so that none takes long.
var budget = crashtest.Budget{Read: 300, Recover: 60, Random: 20, Torn: 40, Twice: 16, TwiceStep: 4}

type suite struct {
	job   mutants.Job
	begin time.Time
	at    mutants.Event
}

func main() {
	s := &suite{begin: time.Now()}
	if err := json.Unmarshal([]byte(os.Getenv(mutants.EnvJob)), &s.job); err != nil {
		fmt.Fprintln(os.Stderr, "cannot read the job:", err)
		os.Exit(2)
	}
	if err := s.all(); err != nil {
		s.at.Error = err.Error()
		s.at.Death = kind(err)
	}
	s.at.End = true
	s.say()
}

func (s *suite) say() { _ = json.NewEncoder(os.Stdout).Encode(s.at) }

// kind says what killed the mutant.
func kind(err error) string {
	var v *crashtest.Violation
	switch {
	case strings.Contains(err.Error(), "internal error"):
		return mutants.Invariant
	case errors.As(err, &v):
		return mutants.Violated
	case errors.Is(err, fatdriver.ErrChanged):
		return mutants.ReadBack
	case strings.Contains(err.Error(), "cannot run scenario"):
		return mutants.RunFailed
	}
	return mutants.BadEnd
}

// on turns the mutant on; setting up a scenario is none of its business.
func (s *suite) on(yes bool) {
	os.Setenv(mutants.EnvMutant, "")
	os.Setenv(mutants.EnvUnchecked, "")
	if yes {
		os.Setenv(mutants.EnvMutant, s.job.Mutant)
		if s.job.Unchecked {
			os.Setenv(mutants.EnvUnchecked, "1")
		}
	}
}

func (s *suite) late() bool {
	return s.job.Seconds > 0 && time.Since(s.begin).Seconds() > s.job.Seconds
}

func (s *suite) all() error {
	made := crashtest.HandmadeScenarios()
	for _, first := range []bool{true, false} {
		for _, h := range made {
			if (s.job.First == "" || strings.Contains(h.Name, s.job.First)) != first || s.late() {
				continue
			}
			if err := s.one(h.Scenario, h.Base); err != nil {
				return err
			}
		}
	}
	for seed := range s.job.Seeds {
		if s.late() {
			return nil
		}
		sc := crashtest.Generate(uint64(seed + 1))
		if err := s.one(sc, sc.Volume); err != nil {
			return err
		}
	}
	return nil
}

func (s *suite) one(sc *crashtest.Scenario, volume func() (*fixtures.Sparse, error)) error {
	phase := func(name string) { s.at.Phase = name; s.say() }
	s.at.Scenario = sc.Name
	if sc.Seed != 0 {
		s.at.Scenario = fmt.Sprintf("seed %d", sc.Seed)
	}
	s.on(false)
	phase("making the volume")
	base, err := volume()
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(2)
	}
	s.on(true)
	phase("the run")
	c, err := crashtest.RecordOn(sc, base)
	if errors.Is(err, crashtest.ErrRefused) && sc.Seed != 0 {
		return nil
	}
	if err != nil {
		return err
	}
	phase("exploring")
	if _, err := c.Explore(budget, nil); err != nil {
		var v *crashtest.Violation
		if errors.As(err, &v) {
			s.at.Phase = v.Phase
		}
		return err
	}
	if sc.Seed != 0 {
		return nil // the checks know what the handmade ones contain
	}
	for _, k := range crashtest.Checks {
		if s.late() {
			return nil
		}
		if s.job.Unchecked && (k.Name == "lost writes" || k.Name == "somebody else writes during the run") {
			continue // they ask for just these checks
		}
		phase(k.Name)
		if err := c.Try(k); err != nil {
			return err
		}
	}
	return nil
}
