package crashtest

import (
	"errors"
	"os"
	"reflect"
	"runtime"
	"runtime/debug"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"espmirror/fixtures"
)

func TestMain(m *testing.M) {
	debug.SetGCPercent(400) // states are short-lived, and there are many
	os.Exit(fixtures.Main(m))
}

// setting is a number from the environment, for runs by hand.
func setting(name string, n int) int {
	if v, err := strconv.Atoi(os.Getenv(name)); err == nil {
		return v
	}
	return n
}

// outside is a directory for the external judges, "" where one of them is missing: then a subtest is skipped for it.
func outside(t *testing.T) string {
	t.Helper()
	there := false
	t.Run("external judges", func(t *testing.T) {
		fixtures.Need(t, "fsck.fat", "mdir", "mcopy")
		there = true
	})
	if !there {
		return ""
	}
	return t.TempDir()
}

// explore records the scenario of a seed and explores it.
func explore(dir string, seed uint64, b Budget) (Tally, error) {
	c, err := Record(Generate(seed))
	if errors.Is(err, ErrRefused) {
		return Tally{Scenarios: 1, Refused: 1}, nil
	}
	if err != nil {
		return Tally{}, err
	}
	var sample Sampler
	if dir != "" {
		o, err := c.NewOutside(dir)
		if err != nil {
			return Tally{}, err
		}
		defer o.Close()
		sample = o.Judge
	}
	tally, err := c.Explore(b, sample)
	if seed%checked == 0 {
		for _, k := range Checks {
			if err == nil {
				err = c.Try(k)
				tally.Checks++
			}
		}
	}
	return tally, err
}

// checked is of how many scenarios one goes through the checks that take longer than the exploration.
const checked = 20

// TestPowerCut cuts generated runs wherever they can be cut. `make crash` does the same for longer.
func TestPowerCut(t *testing.T) {
	from, n := setting("ESPMIRROR_SEED", 1), setting("ESPMIRROR_SEEDS", 500)
	b := Budget{Read: 4096, Recover: 32, Random: 4, Torn: 14, Twice: 8, TwiceStep: 8, Thrice: 3, ThriceStep: 8, Samples: 2}
	if testing.Short() {
		n = min(n, 60)
	}
	dir := outside(t)
	var mu sync.Mutex
	var all Tally
	var wg sync.WaitGroup
	seeds := make(chan int)
	for range runtime.GOMAXPROCS(0) {
		wg.Add(1)
		go func() {
			defer wg.Done()
			for seed := range seeds {
				begin := time.Now()
				tally, err := explore(dir, uint64(seed), b)
				mu.Lock()
				if err != nil {
					t.Error(err)
				}
				all.Add(tally)
				if took := time.Since(begin); took > 10*time.Second {
					t.Logf("seed %d took %v", seed, took.Round(time.Millisecond))
				}
				mu.Unlock()
			}
		}()
	}
	for i := range n {
		seeds <- from + i
	}
	close(seeds)
	wg.Wait()
	fixtures.Count("scenarios", all.Scenarios)
	t.Logf("%+v", all)
	if n < 50 {
		return
	}
	// What the generator is there for must be in it.
	for what, count := range map[string]int64{"several commits": all.Several, "a journal to create": all.Created, "nothing to do": all.Unchanged} {
		if count*200 < int64(n) {
			t.Errorf("%d of %d scenarios have %s", count, n, what)
		}
	}
}

// TestSeedsThatFailed explores scenarios in which the long run once found something, as thoroughly as it does: garbage in
// a device's sector of a volume's (173), a foreign chain over what is left of a journal (1294), and a volume that mtools
// refuses because of its last cluster (648).
func TestSeedsThatFailed(t *testing.T) {
	b := Budget{Read: 4096, Recover: 400, Random: 20, Torn: 300, TornSectors: 2, Twice: 40, TwiceStep: 3, Samples: 8}
	dir := outside(t)
	for _, seed := range []uint64{57, 173, 648, 1294} {
		if _, err := explore(dir, seed, b); err != nil {
			t.Error(err)
		}
	}
}

// TestEveryDoubleCut cuts small runs at every state, and the recovery of each at every state: nothing is sampled.
func TestEveryDoubleCut(t *testing.T) {
	if testing.Short() {
		t.Skip("skipped: long")
	}
	const unlimited = 1 << 20
	b := Budget{Read: unlimited, Recover: unlimited, Twice: unlimited, TwiceStep: 1}
	for _, g := range []Geometry{geometries[0].g, geometries[1].g, geometries[6].g, geometries[7].g} {
		for name, trees := range map[string][2]Tree{
			"replace":   {{"EFI/BOOT/BOOTX64.EFI": fixtures.Program("old")}, {"EFI/BOOT/BOOTX64.EFI": fixtures.Program("new, and longer")}},
			"first run": {nil, {"EFI/BOOT/BOOTX64.EFI": fixtures.Program("boot")}},
			"two commits": {
				{"EFI/Linux/a.efi": fixtures.Program("boot"), "loader/entries/a.conf": "linux /EFI/Linux/a.efi\n", "vmlinuz-linux": "old"},
				{"EFI/Linux/b.efi": fixtures.Program("boot"), "loader/entries/b.conf": "linux /EFI/Linux/b.efi\n", "vmlinuz-linux": "new"},
			},
		} {
			t.Run(name+"/"+g.String(), func(t *testing.T) {
				t.Parallel()
				c, err := Record(&Scenario{Name: name, Geometry: g, Before: trees[0], After: trees[1], Select: selected})
				if err != nil {
					t.Fatal(err)
				}
				tally, err := c.Explore(b, nil)
				if err != nil {
					t.Fatal(err)
				}
				if tally.Partial != 0 || tally.Twice < 20 {
					t.Errorf("not every state was cut: %+v", tally)
				}
				t.Logf("%+v", tally)
			})
		}
	}
}

// The same seed must give the same scenario, or a line reproduces nothing.
func TestGenerateIsStable(t *testing.T) {
	for seed := range uint64(50) {
		if a, b := Generate(seed), Generate(seed); !reflect.DeepEqual(a, b) {
			t.Fatalf("seed %d: %s, %s", seed, a.Name, b.Name)
		}
	}
}

// TestReplay rebuilds states of a run, of its recovery, and of the recovery after that from their lines.
func TestReplay(t *testing.T) {
	c, err := Record(Generate(21))
	if err != nil {
		t.Fatal(err)
	}
	if err := c.Replay([]string{"epoch=2"}); err != nil {
		t.Error(err)
	}
	if err := c.Replay([]string{"epoch=999"}); err == nil {
		t.Error("an epoch that is not there was accepted")
	}
	if err := c.Replay([]string{"epoch=2", "epoch=0", "epoch=0"}); err != nil {
		t.Error(err)
	}
}

// TestShrink makes a scenario smaller that fails for the sake of one file and of one kind of wear.
func TestShrink(t *testing.T) {
	s := Generate(26)
	s.After["EFI/Linux/culprit.efi"] = fixtures.Program("culprit")
	s.Wear.Holes, s.Wear.Dirty = 10, true
	n := 0
	small, v := shrink(s, func(s *Scenario) *Violation {
		n++
		if s.After.has("EFI/Linux/culprit.efi") && s.Wear.Holes > 0 {
			return &Violation{Scenario: s, Err: errors.New("it fails")}
		}
		return nil
	})
	if v == nil || len(small.After) != 1 || len(small.Before) != 0 || len(small.Others) != 0 || small.Wear != (Wear{Holes: 10}) {
		t.Errorf("after %d steps: %+v, %v", n, small, v)
	}
	if len(s.Others) == 0 {
		t.Error("the scenario itself was changed")
	}
	if _, v := shrink(s, func(*Scenario) *Violation { return nil }); v != nil {
		t.Error("a scenario that does not fail has a violation")
	}
	var text strings.Builder
	if err := small.Print(&text, v); err != nil || !strings.Contains(text.String(), "culprit") {
		t.Error(err, text.String())
	}
}

// TestViolationIsFound is the negative control: the recording of a device that ignores flushes must be refused.
func TestViolationIsFound(t *testing.T) {
	c, err := Record(Generate(21))
	if err != nil {
		t.Fatal(err)
	}
	var ops []fixtures.Op
	for _, op := range c.Recording.Ops {
		if !op.Flush {
			ops = append(ops, op)
		}
	}
	c.Recording = &fixtures.Recording{Base: c.Recording.Base, Sector: c.Recording.Sector, Ops: ops}
	_, err = c.Explore(Budget{Read: 4096, Recover: 100}, nil)
	var v *Violation
	if !errors.As(err, &v) || len(v.Lines) != 1 {
		t.Fatal("without any flush: ", err)
	}
	if err := c.Replay(v.Lines); err == nil {
		t.Errorf("the state %q is refused once and accepted when rebuilt", v.Lines)
	}
}
