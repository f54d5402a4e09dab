package crashtest

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"strings"
)

// fails returns the violation of a scenario, nil when it has none or cannot be recorded.
func fails(s *Scenario, b Budget) *Violation {
	c, err := Record(s)
	if err != nil {
		return nil
	}
	_, err = c.Explore(b, nil)
	var v *Violation
	if errors.As(err, &v) {
		return v
	}
	return nil
}

// Shrink makes a failing scenario smaller: wear, files and content go one after the other while it still fails. Then the
// sectors of the state go that do not matter. It returns the scenario and its violation, or nil when s does not fail.
func Shrink(s *Scenario, b Budget) (*Scenario, *Violation) {
	return shrink(s, func(s *Scenario) *Violation { return fails(s, b) })
}

func shrink(s *Scenario, fails func(*Scenario) *Violation) (*Scenario, *Violation) {
	v := fails(s)
	if v == nil {
		return s, nil
	}
	try := func(change func(*Scenario)) bool {
		c := s.clone()
		change(c)
		w := fails(c)
		if w != nil {
			s, v = c, w
		}
		return w != nil
	}
	for again := true; again; {
		again = false
		for _, change := range []func(w *Wear){
			func(w *Wear) { *w = Wear{NoJournal: w.NoJournal} }, func(w *Wear) { w.Holes = 0 }, func(w *Wear) { w.Leave = 0 },
			func(w *Wear) { w.Bad, w.Lost = 0, 0 }, func(w *Wear) { w.Dirty, w.DirtyFAT = false, false },
			func(w *Wear) { w.WrongFree, w.UnknownFree = false, false }, func(w *Wear) { w.NoJournal = false },
		} {
			if w := s.Wear; func() bool { change(&w); return w != s.Wear }() {
				again = try(func(s *Scenario) { change(&s.Wear) }) || again
			}
		}
		for _, which := range []func(*Scenario) Tree{
			func(s *Scenario) Tree { return s.Others }, func(s *Scenario) Tree { return s.Before }, func(s *Scenario) Tree { return s.After },
		} {
			for _, p := range which(s).paths() {
				if try(func(s *Scenario) { delete(which(s), p) }) {
					again = true
					continue
				}
				content := which(s)[p]
				small := Tree{p: content[:min(1, len(content))]}.programs()[p]
				if len(small) < len(content) && !strings.HasPrefix(p, "loader/entries/") {
					again = try(func(s *Scenario) { which(s)[p] = small }) || again
				}
			}
		}
	}
	if c, err := Record(s); err == nil {
		v.Lines = c.shrinkLines(v.Lines)
	}
	return s, v
}

// shrinkLines leaves out the sectors of the last state that do not matter for the violation.
func (c *Run) shrinkLines(lines []string) []string {
	if len(lines) == 0 || c.Replay(lines) == nil {
		return lines // another phase found it, or it does not depend on the state alone
	}
	last := len(lines) - 1
	for i := 1; i < len(strings.Fields(lines[last])); {
		f := strings.Fields(lines[last])
		without := append([]string(nil), lines...)
		without[last] = strings.Join(append(f[:i:i], f[i+1:]...), " ")
		if c.Replay(without) != nil {
			lines = without
		} else {
			i++
		}
	}
	return lines
}

func (s *Scenario) clone() *Scenario {
	c := *s
	c.Before, c.After, c.Others = maps.Clone(s.Before), maps.Clone(s.After), maps.Clone(s.Others)
	return &c
}

// Print writes a scenario and its violation as JSON.
func (s *Scenario) Print(w io.Writer, v *Violation) error {
	b, err := json.MarshalIndent(struct {
		Scenario *Scenario
		Phase    string
		Lines    []string
		Error    string
	}{s, v.Phase, v.Lines, v.Err.Error()}, "", "  ")
	if err != nil {
		return err
	}
	_, err = fmt.Fprintf(w, "%s\n", b)
	return err
}
