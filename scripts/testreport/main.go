// Command testreport runs "go test" and says in few lines what happened: a line for each package, the whole output of
// what failed, what was skipped and why, and what the tests counted. Its arguments go to "go test".
package main

import (
	"bufio"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"
)

// summaryEnv is fixtures.SummaryEnv; the report does not depend on what it reports on.
const summaryEnv = "ESPMIRROR_TEST_SUMMARY"

func main() {
	code, err := run(os.Stdout, os.Args[1:])
	if err != nil {
		fmt.Fprintf(os.Stderr, "testreport: %v\n", err)
		code = max(code, 1)
	}
	os.Exit(code)
}

func run(w io.Writer, args []string) (int, error) {
	dir, err := os.MkdirTemp("", "testreport-")
	if err != nil {
		return 1, err
	}
	defer os.RemoveAll(dir)
	summary := filepath.Join(dir, "summary")
	// A cached result would count nothing.
	cmd := exec.Command("go", append([]string{"test", "-json", "-count=1"}, args...)...)
	cmd.Env = append(os.Environ(), summaryEnv+"="+summary)
	cmd.Stderr = os.Stderr
	pipe, err := cmd.StdoutPipe()
	if err != nil {
		return 1, err
	}
	start := time.Now()
	if err := cmd.Start(); err != nil {
		return 1, err
	}
	r := newReport(w)
	readErr := r.read(pipe)
	runErr := cmd.Wait()
	if err := r.counters(summary); err != nil {
		return 1, err
	}
	r.end(time.Since(start))
	switch {
	case readErr != nil:
		return 1, readErr
	case runErr != nil && r.failed == 0:
		return 1, fmt.Errorf("cannot finish go test: %w", runErr)
	case r.failed > 0:
		return 1, nil
	}
	return 0, nil
}

// event is a line of "go test -json"; see "go doc test2json".
type event struct {
	Action, Package, ImportPath, Test, Output string
	Elapsed                                   float64
}

// test is one test that has begun.
type test struct {
	output strings.Builder
	ended  bool
}

type report struct {
	w                       io.Writer
	passed, failed, skipped int
	tests                   map[string]*test           // by package and name; the name of a package's own output is empty
	failures                map[string]int             // failed tests of a package
	skips                   map[string]map[string]bool // reason → tests
	counts                  map[string]int64
}

func newReport(w io.Writer) *report {
	return &report{w: w, tests: map[string]*test{}, failures: map[string]int{}, skips: map[string]map[string]bool{}, counts: map[string]int64{}}
}

func (r *report) read(in io.Reader) error {
	lines := bufio.NewReader(in)
	for {
		line, err := lines.ReadBytes('\n')
		if len(line) > 0 {
			var e event
			if json.Unmarshal(line, &e) != nil {
				fmt.Fprintf(r.w, "%s", line) // not an event: something that go says in plain text
			} else {
				r.event(e)
			}
		}
		if err == io.EOF {
			return nil
		}
		if err != nil {
			return err
		}
	}
}

func (r *report) event(e event) {
	key := e.Package + " " + e.Test
	t := r.tests[key]
	if t == nil {
		t = &test{}
		r.tests[key] = t
	}
	switch e.Action {
	case "build-output":
		fmt.Fprint(r.w, e.Output)
	case "output":
		t.output.WriteString(e.Output)
	case "pass", "fail", "skip":
		if e.Test == "" {
			r.packageEnd(e)
			return
		}
		t.ended = true
		switch e.Action {
		case "pass":
			r.passed++
		case "fail":
			r.failed++
			r.failures[e.Package]++
			fmt.Fprintf(r.w, "%s", t.output.String())
		case "skip":
			r.skipped++
			reason := skipReason(t.output.String())
			if r.skips[reason] == nil {
				r.skips[reason] = map[string]bool{}
			}
			r.skips[reason][filepath.Base(e.Package)+"."+e.Test] = true
		}
		t.output.Reset()
	}
}

// packageEnd prints the line of a package. One that fails without a failed test crashed, ran out of time, or was not built.
func (r *report) packageEnd(e event) {
	word := map[string]string{"pass": "ok", "fail": "FAIL", "skip": "-"}[e.Action]
	if e.Action == "fail" && r.failures[e.Package] == 0 {
		r.failed++
		for _, key := range slices.Sorted(maps.Keys(r.tests)) {
			if t := r.tests[key]; strings.HasPrefix(key, e.Package+" ") && !t.ended {
				fmt.Fprintf(r.w, "%s", t.output.String())
			}
		}
	}
	if e.Action != "skip" { // a package without tests
		fmt.Fprintf(r.w, "%-4s %-28s %6.1f s\n", word, e.Package, e.Elapsed)
	}
	for key := range r.tests {
		if strings.HasPrefix(key, e.Package+" ") {
			delete(r.tests, key)
		}
	}
}

// skipReason finds what a test said when it was skipped.
func skipReason(output string) string {
	reason := "no reason given"
	for line := range strings.Lines(output) {
		line = strings.TrimSpace(line)
		if line == "" || strings.HasPrefix(line, "=== ") || strings.HasPrefix(line, "--- ") {
			continue
		}
		// "file_test.go:12: skipped: fsck.fat: not installed"
		if _, text, ok := strings.Cut(line, ".go:"); ok {
			if _, text, ok = strings.Cut(text, ": "); ok {
				line = text
			}
		}
		reason = strings.TrimPrefix(line, "skipped: ")
	}
	return reason
}

// counters adds up the summary file.
func (r *report) counters(path string) error {
	text, err := os.ReadFile(path)
	if os.IsNotExist(err) {
		return nil
	}
	if err != nil {
		return err
	}
	for line := range strings.Lines(string(text)) {
		i := strings.LastIndexByte(strings.TrimSpace(line), ' ')
		if i < 0 {
			continue
		}
		n, err := strconv.ParseInt(strings.TrimSpace(line[i:]), 10, 64)
		if err != nil {
			return fmt.Errorf("cannot read the summary: %w", err)
		}
		r.counts[line[:i]] += n
	}
	return nil
}

func (r *report) end(took time.Duration) {
	fmt.Fprintln(r.w)
	var judges []string
	for _, name := range slices.Sorted(maps.Keys(r.counts)) {
		n := r.counts[name]
		switch {
		case strings.HasPrefix(name, "judge "):
			judges = append(judges, fmt.Sprintf("%s %d", strings.TrimPrefix(name, "judge "), n))
		case strings.HasPrefix(name, "skipped "): // the reasons below say so too
		default:
			fmt.Fprintf(r.w, "%s: %d\n", name, n)
		}
	}
	if len(judges) > 0 {
		fmt.Fprintf(r.w, "judges: %s\n", strings.Join(judges, ", "))
	}
	for _, reason := range slices.Sorted(maps.Keys(r.skips)) {
		names := slices.Sorted(maps.Keys(r.skips[reason]))
		more := ""
		if n := len(names) - 8; n > 0 {
			names, more = names[:8], fmt.Sprintf(" and %d more", n)
		}
		fmt.Fprintf(r.w, "skipped: %s: %s%s\n", reason, strings.Join(names, " "), more)
	}
	fmt.Fprintf(r.w, "time: %.0f s\n", took.Seconds())
	fmt.Fprintf(r.w, "%d passed, %d failed, %d skipped\n", r.passed, r.failed, r.skipped)
}
