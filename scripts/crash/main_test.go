package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"espmirror/fixtures"
	"espmirror/fixtures/vm"
)

func TestMain(m *testing.M) {
	// The tool finds the source that it tests below the top of the checkout.
	if err := os.Chdir("../.."); err != nil {
		panic(err)
	}
	os.Exit(fixtures.Main(m))
}

// few are the settings of a run that ends soon.
func few(dir string) settings {
	return settings{from: 1, states: 500, jobs: 2, out: filepath.Join(dir, "out"), report: filepath.Join(dir, "docs", "report.json"),
		doc: filepath.Join(dir, "docs", "report.md")}
}

func readReport(t *testing.T, s settings) (rep report) {
	t.Helper()
	b, err := os.ReadFile(s.report)
	if err != nil {
		t.Fatal(err)
	}
	if err := json.Unmarshal(b, &rep); err != nil {
		t.Fatal(err)
	}
	return rep
}

// TestResume stops a run, and goes on: what was done is not done again, a line that was cut short is, and other code
// begins anew.
func TestResume(t *testing.T) {
	s := few(t.TempDir())
	var text bytes.Buffer
	if err := run(context.Background(), &text, s); err != nil {
		t.Fatal(err, text.String())
	}
	first := readReport(t, s)
	if first.States < 500 || first.Scenarios == 0 || len(first.Violations) != 0 {
		t.Fatalf("%+v", first)
	}
	path := filepath.Join(s.out, "progress.jsonl")
	whole, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, whole[:len(whole)-10], 0o644); err != nil {
		t.Fatal(err)
	}
	s.states = first.States // the cut line must be made up for
	text.Reset()
	if err := run(context.Background(), &text, s); err != nil {
		t.Fatal(err)
	}
	second := readReport(t, s)
	if !strings.Contains(text.String(), "going on after") || second.States < first.States {
		t.Errorf("%d states, then %d: %s", first.States, second.States, text.String())
	}
	if b, err := os.ReadFile(s.doc); err != nil || !strings.Contains(string(b), commas(second.States)) {
		t.Errorf("the document does not have the number of states: %v", err)
	}
	// Of other code nothing counts.
	if err := os.WriteFile(path, bytes.Replace(whole, []byte(first.Code), []byte("0123456789abcdef"), 1), 0o644); err != nil {
		t.Fatal(err)
	}
	p, err := openProgress(path)
	if err != nil {
		t.Fatal(err)
	}
	defer p.close()
	if len(p.done) != 0 {
		t.Errorf("%d scenarios of other code count", len(p.done))
	}
	if _, err := os.Stat(path + ".old"); err != nil {
		t.Error("what was put aside is gone: ", err)
	}
}

// TestReportOfViolations has violations in the progress file, of a scenario and of a boot: the report names each, the
// readings add up, and the run fails.
func TestReportOfViolations(t *testing.T) {
	s := few(t.TempDir())
	s.states = 0
	if err := os.MkdirAll(s.out, 0o755); err != nil {
		t.Fatal(err)
	}
	p, err := openProgress(filepath.Join(s.out, "progress.jsonl"))
	if err != nil {
		t.Fatal(err)
	}
	for _, o := range []outcome{
		{Kind: "scenario", Seed: 7, Violations: []violation{{"one", "reading", []string{"epoch=1"}, "mixed"}}},
		{Kind: "kernel", Old: 3, New: 2, Between: 1, Mixed: 2, Violations: []violation{{"7 epoch=1", "kernel", nil, "a"}, {"8 epoch=2", "kernel", nil, "b"}}},
	} {
		if err := p.add(o); err != nil {
			t.Fatal(err)
		}
	}
	p.close()
	var text bytes.Buffer
	if err := run(context.Background(), &text, s); err == nil || !strings.Contains(err.Error(), "3 violations") {
		t.Error(err)
	}
	rep := readReport(t, s)
	if k := rep.Kernel; k == nil || *k != (readings{Images: 8, Boots: 1, Old: 3, New: 2, Between: 1, Mixed: 2}) || len(rep.Violations) != 3 {
		t.Errorf("%+v %+v", rep.Kernel, rep.Violations)
	}
	if n := strings.Count(text.String(), "VIOLATION: "); n != 3 {
		t.Errorf("%d violations in the text", n)
	}
}

func TestArguments(t *testing.T) {
	var w bytes.Buffer
	for _, args := range [][]string{nil, {"x", "epoch=0"}, {"1"}, {"1", "epoch=99999"}} {
		if replayState(&w, args) == nil {
			t.Errorf("-replay %q was accepted", args)
		}
	}
	if err := replayState(&w, []string{"1", "epoch=0"}); err != nil || !strings.Contains(w.String(), "as it should be") {
		t.Error(err, w.String())
	}
	if err := shrinkScenario(&w, []string{"1"}); err == nil || !strings.Contains(err.Error(), "no violation") {
		t.Error("a scenario without a violation was made smaller: ", err)
	}
}

// TestAgain: what is wrong twice stays wrong, what is wrong once is told.
func TestAgain(t *testing.T) {
	r := &runner{w: io.Discard}
	broken := errors.New("mixed")
	samples := []vm.Sample{{Name: "a"}, {Name: "b"}, {Name: "c"}}
	readings := []vm.Reading{{Name: "a", State: 1}, {Name: "b", Err: broken}, {Name: "c", Err: broken}}
	n, err := r.again(samples, readings, func(s []vm.Sample) ([]vm.Reading, error) {
		if len(s) != 2 || s[0].Name != "b" || s[1].Name != "c" {
			t.Errorf("%+v", s)
		}
		return []vm.Reading{{Name: "b", State: 1}, {Name: "c", Err: broken}}, nil
	})
	if n != 1 || err != nil || readings[1].Err != nil || readings[1].State != 1 || readings[2].Err == nil || readings[0].State != 1 {
		t.Errorf("%d %v %+v", n, err, readings)
	}
	if _, err := r.again(samples, readings, func([]vm.Sample) ([]vm.Reading, error) { return nil, broken }); !errors.Is(err, broken) {
		t.Error(err)
	}
	readings[2].Err = nil
	if n, err := r.again(samples, readings, nil); n != 0 || err != nil {
		t.Error(n, err)
	}
}
