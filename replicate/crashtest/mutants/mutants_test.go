package mutants

import (
	"context"
	"os"
	"strconv"
	"testing"

	"espmirror/fixtures"
)

func TestMain(m *testing.M) { os.Exit(fixtures.Main(m)) }

// TestMutants is the negative control of the crash tests. ESPMIRROR_MUTANTS names a part of them, ESPMIRROR_SEEDS adds
// generated scenarios.
func TestMutants(t *testing.T) {
	if testing.Short() {
		t.Skip("skipped: takes most of a minute")
	}
	o := Options{Jobs: 2, Seconds: 4, Only: os.Getenv("ESPMIRROR_MUTANTS")}
	if n, err := strconv.Atoi(os.Getenv("ESPMIRROR_SEEDS")); err == nil {
		o.Seeds, o.Seconds = n, 60
	}
	kills, err := Run(context.Background(), "../../..", o)
	if err != nil {
		t.Fatal(err)
	}
	t.Log("\n" + Report(kills))
	for _, k := range kills {
		if k.Mutant == "" {
			if k.By != Survived {
				t.Errorf("the product itself: %s in %s, %s: %s", k.By, k.Scenario, k.Phase, k.Error)
			}
			continue
		}
		fixtures.Count("mutants", 1)
		if k.By != Survived {
			fixtures.Count("mutants killed", 1)
		}
		switch {
		case k.OK():
			if testing.Verbose() && k.By != Survived {
				t.Logf("%s: %.300s", k.Mutant, k.Error)
			}
		case k.Redundant != "":
			t.Errorf("mutant %q (%s) is no longer redundant, %s in %s, %s: %s", k.Mutant, k.Breaks, k.By, k.Scenario, k.Phase, k.Error)
		default:
			t.Errorf("mutant %q (%s) survives", k.Mutant, k.Breaks)
		}
	}
}
