package fatdriver

import (
	"math/rand/v2"
	"os/exec"
	"regexp"
	"testing"
)

// fsckHarmless are lines of fsck.fat -n about things that Check only notes, and those without a finding.
var fsckHarmless = regexp.MustCompile(`(?m)^(fsck\.fat .*|.*: \d+ files, \d+/\d+ clusters|Leaving filesystem unchanged\.|.*[Ll]abel .*|.*uninitialized.*|\s*)$\n?`)

// TestCheckAgainstFsck damages volumes at random and asks fsck.fat too: what it objects to, Check must have found, be it
// under another name.
func TestCheckAgainstFsck(t *testing.T) {
	fsck := tool(t, "fsck.fat")
	rng := rand.New(rand.NewPCG(9, 9))
	agreed, silent := 0, 0
	for i := range 400 {
		edits := make([]byte, 5*(1+rng.IntN(12)))
		for j := range edits {
			edits[j] = byte(rng.Uint32())
		}
		d := mutate(byte(i), edits)
		v, err := Open(d)
		if err != nil {
			continue
		}
		r, err := v.Check()
		if err != nil {
			continue
		}
		out, err := exec.Command(fsck, "-n", d.file(t)).CombinedOutput()
		left := fsckHarmless.ReplaceAllString(string(out), "")
		worst, ok := r.Worst()
		switch {
		case err == nil:
			silent++
		case ok && worst > Note || left == "":
			agreed++
		default:
			t.Errorf("edits %x:\n%s\nbut Check found only %v", edits, left, r.Findings)
		}
	}
	if agreed < 50 || silent < 10 {
		t.Errorf("fsck.fat objected to %d volumes and took %d: the damage is not what it should be", agreed, silent)
	}
	t.Logf("fsck.fat objected to %d volumes and took %d", agreed, silent)
}
