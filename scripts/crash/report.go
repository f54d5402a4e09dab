package main

import (
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"

	"espmirror/replicate/crashtest"
)

// report is crash-report.json.
type report struct {
	Code       string // hash of the source that was tested
	Go         string // version
	CPUs       int
	Hours      float64 // of one core
	States     int64
	Scenarios  int64
	Total      crashtest.Tally
	Geometries map[string]*crashtest.Tally
	Fsck       int64
	Mtools     int64
	Firmware   *readings `json:",omitempty"`
	Kernel     *readings `json:",omitempty"`
	Skipped    []string  `json:",omitempty"` // judges that could not run, and why
	Mutants    []mutant  `json:",omitempty"`
	Violations []violation
}

type readings struct {
	Images, Boots, Old, New, Between, Mixed int64
	Again                                   int64 `json:",omitempty"` // of them wrong once and right when read again
}

// mutant is a fault put into the protocol on purpose, and what noticed it.
type mutant struct {
	Name, What, By, Scenario string
	Redundant                string `json:",omitempty"` // why nothing can notice it
	Expected                 bool   // noticed, or redundant and not noticed
}

// finish writes the report. A violation, or a mutant that nothing noticed, is an error.
func (r *runner) finish(ctx context.Context) error {
	code, err := codeHash()
	if err != nil {
		return err
	}
	p := r.p
	rep := report{Code: code, Go: runtime.Version(), CPUs: runtime.NumCPU(), Hours: float64(int(p.seconds/36)) / 100, States: p.total.States(),
		Scenarios: p.total.Scenarios, Total: p.total, Geometries: p.byGeometry, Fsck: p.fsck, Mtools: p.mtools, Skipped: r.skipped,
		Violations: append([]violation{}, p.violations...)}
	read := func(kind string) *readings {
		n := p.readings(kind)
		if n == 0 {
			return nil
		}
		return &readings{n, p.boots[kind], p.old[kind], p.new[kind], p.between[kind], p.mixed[kind], p.again[kind]}
	}
	rep.Firmware, rep.Kernel = read("firmware"), read("kernel")
	survived := 0
	if r.mutants && ctx.Err() == nil {
		if rep.Mutants, err = runMutants(ctx, r.w, max(r.jobs, 1)); err != nil {
			return err
		}
		for _, m := range rep.Mutants {
			if !m.Expected {
				survived++
			}
		}
	}
	b, err := json.MarshalIndent(rep, "", "  ")
	if err != nil {
		return err
	}
	text := rep.markdown()
	fmt.Fprint(r.w, text)
	for path, content := range map[string]string{r.report: string(b) + "\n", r.doc: text} {
		if path == "" {
			continue
		}
		err := os.MkdirAll(filepath.Dir(path), 0o755)
		if err == nil {
			err = os.WriteFile(path, []byte(content), 0o644)
		}
		if err != nil {
			return fmt.Errorf("cannot write the report: %w", err)
		}
	}
	if n := len(p.violations); n > 0 || survived > 0 {
		return fmt.Errorf("%d violations, %d mutants survived", n, survived)
	}
	return nil
}

// markdown is the report for people.
func (rep *report) markdown() string {
	var b strings.Builder
	f := func(format string, a ...any) { fmt.Fprintf(&b, format+"\n", a...) }
	t := &rep.Total
	f("# Power cuts, as played through by `make crash`")
	f("")
	f("Written by `scripts/crash` for source %s with %s on %d CPUs, %.1f hours of one core. What the phases are is in", rep.Code, rep.Go, rep.CPUs, rep.Hours)
	f("[ARCHITECTURE.md](../ARCHITECTURE.md), \"Testing\".")
	f("")
	f("| what | number | violations |")
	f("|---|---:|---:|")
	f("| scenarios, generated from seeds | %s | %d |", commas(rep.Scenarios), len(rep.Violations))
	f("| — of them refused by a guard, nothing written | %s | |", commas(t.Refused))
	f("| — of them with nothing to do | %s | |", commas(t.Unchanged))
	f("| — of them with several commits, one after the other | %s | |", commas(t.Several))
	f("| — of them that create the journal first | %s | |", commas(t.Created))
	f("| epochs between two flushes, of runs and of recoveries, enumerated completely | %s | |", commas(t.Whole))
	f("| — larger than the limit: enumerated up to it, then sampled | %s | |", commas(t.Partial))
	f("| crash states | %s | |", commas(rep.States))
	f("| — read through one FAT copy, without replay | %s | |", commas(t.Read))
	f("| — read, recovered, read again | %s | |", commas(t.Recovered))
	f("| — the same with a torn, garbled or unreadable sector | %s | |", commas(t.Torn))
	f("| — the recovery cut as well | %s | |", commas(t.Twice))
	f("| — and the recovery after that | %s | |", commas(t.Thrice))
	f("| checks of order, durability, later runs, other writers, failing devices | %s | |", commas(t.Checks))
	f("| judged by fsck.fat | %s | |", commas(rep.Fsck))
	f("| judged by mtools | %s | |", commas(rep.Mtools))
	for _, x := range []struct {
		name string
		r    *readings
	}{{"EDK2's driver in OVMF", rep.Firmware}, {"Linux's vfat", rep.Kernel}} {
		if x.r != nil {
			f("| read by %s: %s old, %s new, %s between two commits | %s | %d |", x.name, commas(x.r.Old), commas(x.r.New), commas(x.r.Between), commas(x.r.Images), x.r.Mixed)
			if x.r.Again > 0 {
				f("| — of them wrong once, and right when the same image was read again | %s | |", commas(x.r.Again))
			}
		}
	}
	if len(rep.Mutants) > 0 {
		killed, redundant := int64(0), int64(0)
		for _, m := range rep.Mutants {
			switch {
			case m.Redundant != "":
				redundant++
			case m.Expected:
				killed++
			}
		}
		f("| faults put into the protocol on purpose that must be noticed: %s are | %s | |", commas(killed), commas(int64(len(rep.Mutants))-redundant))
		f("| — protections of which a second one does the same, so that a fault in them shows nothing | %s | |", commas(redundant))
	}
	for _, s := range rep.Skipped {
		f("| skipped: %s | | |", s)
	}
	f("")
	f("| layout: type/sector/sectors a cluster | scenarios | epochs | states |")
	f("|---|---:|---:|---:|")
	for _, g := range slices.Sorted(maps.Keys(rep.Geometries)) {
		x := rep.Geometries[g]
		f("| %s | %s | %s | %s |", g, commas(x.Scenarios), commas(x.Whole+x.Partial), commas(x.States()))
	}
	if len(rep.Mutants) > 0 {
		f("")
		f("| fault | what it breaks | noticed by | in |")
		f("|---|---|---|---|")
		for _, m := range rep.Mutants {
			by := m.By
			switch {
			case m.Redundant != "":
				by = "not to be noticed: " + m.Redundant
			case !m.Expected:
				by = "**nothing**"
			}
			f("| %s | %s | %s | %s |", m.Name, m.What, by, m.Scenario)
		}
	}
	for _, v := range rep.Violations {
		f("")
		f("VIOLATION: %s, %s, %q: %s", v.Scenario, v.Phase, v.Lines, v.Error)
	}
	return b.String()
}

// commas writes a number with its thousands apart.
func commas(n int64) string {
	s := fmt.Sprint(n)
	for i := len(s) - 3; i > 0; i -= 3 {
		s = s[:i] + "," + s[i:]
	}
	return s
}
