package crashtest

import (
	"errors"
	"fmt"
	"os"
	"runtime"
	"strconv"
	"sync"
	"testing"
	"time"

	"espmirror/fixtures"
)

func TestMain(m *testing.M) { os.Exit(fixtures.Main(m)) }

// setting is a number from the environment, for runs by hand.
func setting(name string, n int) int {
	if v, err := strconv.Atoi(os.Getenv(name)); err == nil {
		return v
	}
	return n
}

// TestPowerCut cuts generated runs wherever they can be cut.
func TestPowerCut(t *testing.T) {
	from, n := setting("ESPMIRROR_SEED", 1), setting("ESPMIRROR_SEEDS", 500)
	b := Budget{Read: 4096, Recover: 60, Random: 10, Torn: 60, Twice: 12, TwiceStep: 6, Thrice: 4, ThriceStep: 8, Samples: 2}
	if testing.Short() {
		n = min(n, 50)
	}
	seeds, dir := make(chan int), t.TempDir()
	var mu sync.Mutex
	var all Tally
	var wg sync.WaitGroup
	for range runtime.GOMAXPROCS(0) {
		wg.Add(1)
		go func() {
			defer wg.Done()
			for seed := range seeds {
				s := Generate(uint64(seed))
				begin := time.Now()
				tally, err := func() (Tally, error) {
					c, err := Record(s)
					if errors.Is(err, ErrRefused) {
						return Tally{Scenarios: 1, Refused: 1}, nil
					}
					if err != nil {
						return Tally{}, err
					}
					o, err := c.NewOutside(dir)
					if err != nil {
						return Tally{}, err
					}
					defer o.Close()
					return c.Explore(b, o.Judge)
				}()
				mu.Lock()
				if err != nil {
					t.Error(err)
				}
				all.Add(tally)
				if took := time.Since(begin); took > 3*time.Second {
					t.Logf("seed %d (%s) took %v for %+v", seed, s.Name, took.Round(time.Millisecond), tally)
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
	t.Log(fmt.Sprintf("%+v", all))
}
