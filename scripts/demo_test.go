// Package scripts holds the test of the demonstration, which is what a newcomer runs first.
package scripts

import (
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"espmirror/fixtures"
)

func TestDemo(t *testing.T) {
	if testing.Short() {
		t.Skip("skipped: demonstration: it builds three programs")
	}
	dir := t.TempDir()
	cmd := exec.Command("scripts/demo.sh", fixtures.Build(t, dir, "cmd/espmirror"))
	cmd.Dir = ".."
	cmd.Env = append(cmd.Environ(), "DEMO_OUT="+filepath.Join(dir, "demo"))
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	for _, want := range []string{"files, old\n", "files, new\n", "needs recovery", "rolled forward", "all that 2 loader entries name is there"} {
		if !strings.Contains(string(out), want) {
			t.Errorf("%q is missing in\n%s", want, out)
		}
	}
}
