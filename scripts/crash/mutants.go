package main

import (
	"context"
	"fmt"
	"io"

	"espmirror/replicate/crashtest/mutants"
)

// runMutants puts every fault of the table into the protocol, and says what noticed it.
func runMutants(ctx context.Context, w io.Writer, jobs int) ([]mutant, error) {
	fmt.Fprintf(w, "running %d mutants\n", len(mutants.Table))
	kills, err := mutants.Run(ctx, ".", mutants.Options{Jobs: jobs, Seconds: 20, Seeds: 12})
	if err != nil {
		return nil, err
	}
	var out []mutant
	for _, k := range kills {
		m := mutant{Name: k.Mutant, What: k.Breaks, By: k.By, Scenario: k.Scenario, Redundant: k.Redundant, Expected: k.OK()}
		if k.Phase != "" {
			m.By += " (" + k.Phase + ")"
		}
		if m.Name == "" {
			if !m.Expected {
				return nil, fmt.Errorf("the product itself: %s in %s: %s", m.By, k.Scenario, k.Error)
			}
			continue
		}
		out = append(out, m)
	}
	return out, nil
}
