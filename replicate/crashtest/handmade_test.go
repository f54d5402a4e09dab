package crashtest

import (
	"testing"
	"time"

	"espmirror/fixtures"
)

// TestHandmade explores the handmade scenarios, and makes the checks that are not about single states.
func TestHandmade(t *testing.T) {
	b := Budget{Read: 512, Recover: 60, Random: 20, Torn: 40, Twice: 16, TwiceStep: 4}
	for _, h := range HandmadeScenarios() {
		t.Run(h.Name, func(t *testing.T) {
			t.Parallel()
			base, err := h.Base()
			if err != nil {
				t.Fatal(err)
			}
			begin := time.Now()
			c, err := RecordOn(h.Scenario, base)
			if err != nil {
				t.Fatal(err)
			}
			tally, err := c.Explore(b, nil)
			if err != nil {
				t.Error(err)
			}
			took := time.Since(begin)
			fixtures.Count("scenarios", 1)
			t.Logf("%d trees, %v %+v", c.Trees, took.Round(time.Millisecond), tally)
			for _, k := range Checks {
				begin := time.Now()
				if err := c.Try(k); err != nil {
					t.Error(err)
				}
				if took := time.Since(begin); took > 100*time.Millisecond {
					t.Logf("%s: %v", k.Name, took.Round(time.Millisecond))
				}
			}
		})
	}
}
