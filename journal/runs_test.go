package journal

import (
	"bytes"
	"encoding/binary"
	"math/rand/v2"
	"slices"
	"testing"
)

// naiveMerge is runs as the set of their units, and back.
func naiveMerge(runs []Run) []Run {
	set := map[uint32]bool{}
	for _, r := range runs {
		for u := range r.Count {
			set[r.First+u] = true
		}
	}
	var out []Run
	for u := range set {
		if u > 0 && set[u-1] {
			continue
		}
		n := uint32(1)
		for set[u+n] {
			n++
		}
		out = append(out, Run{u, n})
	}
	slices.SortFunc(out, func(a, b Run) int { return int(a.First) - int(b.First) })
	return out
}

func randomRuns(rng *rand.Rand) []Run {
	var runs []Run
	gap, length := 1+rng.Uint32N(40), 1+rng.Uint32N(12)
	at := rng.Uint32N(1 << rng.UintN(20))
	for range rng.UintN(60) {
		at += rng.Uint32N(gap) // 0: touches the one before
		n := 1 + rng.Uint32N(length)
		runs = append(runs, Run{at, n})
		at += n
	}
	return runs
}

func TestRunsRoundTrip(t *testing.T) {
	rng := rand.New(rand.NewPCG(1, 2))
	forms := map[byte]int{}
	for i := range 4000 {
		runs := randomRuns(rng)
		if err := checkRuns(runs); err != nil {
			t.Fatal(err)
		}
		b := appendRuns(nil, runs)
		if len(b) != runsLen(runs) {
			t.Fatalf("%d: %d bytes, announced %d", i, len(b), runsLen(runs))
		}
		got, err := decodeRuns(b)
		if err != nil {
			t.Fatalf("%d: %v: %v", i, runs, err)
		}
		if want := naiveMerge(runs); !slices.Equal(got, want) {
			t.Fatalf("%d: got %v\nwant %v", i, got, want)
		}
		if len(b) > 0 {
			forms[b[0]]++
		}
		// Cut short or followed by something, it is not accepted.
		if len(b) > 0 {
			if _, err := decodeRuns(b[:len(b)-1]); err == nil && len(b) > 1 {
				t.Fatalf("%d: accepted without its last byte", i)
			}
			if _, err := decodeRuns(append(slices.Clone(b), 0)); err == nil {
				t.Fatalf("%d: accepted with a trailing byte", i)
			}
		}
	}
	if forms[runsDeltas] < 100 || forms[runsBitmap] < 100 {
		t.Errorf("one form was hardly tried: %v", forms)
	}
}

// TestRunsForms pins the bytes of both forms.
func TestRunsForms(t *testing.T) {
	for _, tt := range []struct {
		runs []Run
		want []byte
	}{
		{nil, nil},
		{[]Run{{0, 1}}, []byte{1, 1, 0, 0}},
		{[]Run{{300, 1000}}, []byte{1, 1, 0xac, 0x02, 0xe7, 0x07}},
		{[]Run{{5, 2}, {7, 1}, {100, 1}}, []byte{1, 2, 5, 2, 91, 0}},
		{[]Run{{5, 1}, {7, 1}, {9, 1}, {11, 1}}, []byte{2, 5, 7, 0x55}},
		{[]Run{{MaxUnits - 1, 1}}, []byte{1, 1, 0xff, 0xff, 0xff, 0x7f, 0}},
	} {
		if got := appendRuns(nil, tt.runs); !bytes.Equal(got, tt.want) {
			t.Errorf("%v: got %x, want %x", tt.runs, got, tt.want)
		}
	}
}

// TestRunsBound: the worst fragmentation of a million units costs a bit each, and little more.
func TestRunsBound(t *testing.T) {
	const units = 1 << 20
	runs := make([]Run, 0, units/2)
	for u := uint32(0); u < units; u += 2 {
		runs = append(runs, Run{u, 1})
	}
	b := appendRuns(nil, runs)
	if len(b) > units/8+10 {
		t.Errorf("%d bytes for %d units", len(b), units)
	}
	got, err := decodeRuns(b)
	if err != nil || !slices.Equal(got, runs) {
		t.Errorf("round trip of %d runs: %d, %v", len(runs), len(got), err)
	}
}

func TestRunsRefused(t *testing.T) {
	for name, runs := range map[string][]Run{
		"empty run":   {{5, 0}},
		"overlapping": {{5, 3}, {7, 1}},
		"descending":  {{9, 1}, {5, 1}},
		"past end":    {{MaxUnits - 1, 2}},
		"wraps":       {{0xffffffff, 0xffffffff}},
	} {
		if checkRuns(runs) == nil {
			t.Errorf("%s: accepted", name)
		}
	}
	huge := binary.AppendUvarint([]byte{runsDeltas}, 1<<62)
	for name, b := range map[string][]byte{
		"no such form":        {3, 1},
		"zero form":           {0},
		"no count":            {1},
		"zero count":          {1, 0},
		"count beyond bytes":  {1, 2, 5, 0, 5},
		"huge count":          append(huge, 0, 0),
		"long uvarint":        {1, 0x81, 0x00, 5, 0},
		"gap past end":        append(binary.AppendUvarint([]byte{1, 1}, MaxUnits), 0),
		"gap wraps":           append(binary.AppendUvarint([]byte{1, 1}, 1<<63), 0),
		"length past end":     binary.AppendUvarint([]byte{1, 1, 0}, MaxUnits),
		"empty bitmap":        {2, 5, 0},
		"bitmap short":        {2, 5, 9, 1},
		"bitmap long":         {2, 5, 8, 0x81, 0},
		"bitmap first clear":  {2, 5, 8, 0x80},
		"bitmap last clear":   {2, 5, 8, 0x01},
		"bitmap beyond last":  {2, 5, 7, 0xc1},
		"bitmap past end":     append(binary.AppendUvarint([]byte{2}, MaxUnits), 1, 1),
		"bitmap span too big": append(binary.AppendUvarint([]byte{2, 0}, 1<<40), 1),
	} {
		if runs, err := decodeRuns(b); err == nil {
			t.Errorf("%s: accepted as %v", name, runs)
		}
	}
}

func TestCommonUnit(t *testing.T) {
	rng := rand.New(rand.NewPCG(3, 4))
	for range 2000 {
		a, b := randomRuns(rng), randomRuns(rng)
		in := map[uint32]bool{}
		for _, r := range a {
			for u := range r.Count {
				in[r.First+u] = true
			}
		}
		want, shared := uint32(0), false
		for _, r := range b {
			for u := range r.Count {
				if in[r.First+u] && !shared {
					want, shared = r.First+u, true
				}
			}
		}
		if got, ok := commonUnit(a, b); ok != shared || got != want {
			t.Fatalf("%v and %v: got %d %v, want %d %v", a, b, got, ok, want, shared)
		}
	}
}
