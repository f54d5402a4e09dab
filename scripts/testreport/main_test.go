package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestReport(t *testing.T) {
	const events = `{"Action":"run","Package":"p","Test":"TestGood"}
{"Action":"output","Package":"p","Test":"TestGood","Output":"chatter\n"}
{"Action":"pass","Package":"p","Test":"TestGood"}
{"Action":"output","Package":"p","Test":"TestBad","Output":"    bad_test.go:3: it is wrong\n"}
{"Action":"fail","Package":"p","Test":"TestBad"}
{"Action":"output","Package":"p","Test":"TestSkip","Output":"    x_test.go:9: skipped: mtools: not installed\n"}
{"Action":"output","Package":"p","Test":"TestSkip","Output":"--- SKIP: TestSkip (0.00s)\n"}
{"Action":"skip","Package":"p","Test":"TestSkip"}
{"Action":"fail","Package":"p","Elapsed":1.5}
{"Action":"output","Package":"crashed","Test":"TestPanic","Output":"panic: oops\n"}
{"Action":"output","Package":"crashed","Output":"FAIL crashed\n"}
{"Action":"fail","Package":"crashed"}
{"Action":"skip","Package":"empty"}
plain text
`
	summary := filepath.Join(t.TempDir(), "summary")
	if err := os.WriteFile(summary, []byte("judge fsck.fat 2\njudge fsck.fat 3\nskipped mtools 1\nstates 100\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	var out strings.Builder
	r := newReport(&out)
	if err := r.read(strings.NewReader(events)); err != nil {
		t.Fatal(err)
	}
	if err := r.counters(summary); err != nil {
		t.Fatal(err)
	}
	r.end(0)
	got := out.String()
	for _, want := range []string{
		"bad_test.go:3: it is wrong\n", "FAIL p ", "panic: oops\n", "FAIL crashed", "plain text\n", "states: 100\n",
		"judges: fsck.fat 5\n", "skipped: mtools: not installed: p.TestSkip\n", "\n1 passed, 2 failed, 1 skipped\n",
	} {
		if !strings.Contains(got, want) {
			t.Errorf("%q is missing in\n%s", want, got)
		}
	}
	if strings.Contains(got, "chatter") || strings.Contains(got, "empty") {
		t.Errorf("too much is said:\n%s", got)
	}
}
