// Command crash plays through power cuts of generated runs until it has seen as many states as it was told to, and
// writes a report. It can be stopped and goes on where it was: what is done is in the progress file, as long as the code
// that it tests stays the same.
//
//	crash                                  the long run of `make crash`
//	crash -replay SEED LINE [LINE…]        one state again: the cut of the run, and of each recovery after it
//	crash -shrink SEED                     the smallest scenario with the violation of that one
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"strconv"
	"sync"
	"syscall"
	"time"

	"espmirror/fixtures"
	"espmirror/fixtures/vm"
	"espmirror/replicate/crashtest"
)

// settings are the flags.
type settings struct {
	from     int
	states   int64 // goals
	fsck     int64
	firmware int64
	kernel   int64
	jobs     int
	samples  int
	limit    time.Duration
	out      string
	report   string
	doc      string
	mutants  bool
}

// large is what a scenario of the long run is explored to, small the same for one on a small volume, where a state costs
// a tenth: two sectors at once are torn, and second recoveries are cut more often.
var (
	large = crashtest.Budget{Read: 1 << 16, Recover: 300, Random: 30, Torn: 120, TornSectors: 2, Twice: 40, TwiceStep: 3, Thrice: 16, ThriceStep: 16, Samples: 5}
	small = crashtest.Budget{Read: 1 << 16, Recover: 4000, Random: 200, Torn: 4000, TornSectors: 2, Twice: 1000, TwiceStep: 1, Thrice: 64, ThriceStep: 4, Samples: 5}
)

// checked is of how many scenarios one goes through the checks that take longer than the exploration, and mtools of how
// many states one goes to mtools.
const checked, mtools = 4, 4

// smallVolume is the size in bytes up to which a volume is small.
const smallVolume = 20 << 20

func main() {
	var s settings
	flag.IntVar(&s.from, "from", 1, "first `seed`")
	flag.Int64Var(&s.states, "states", 10_000_000, "crash `states` to judge in this process")
	flag.Int64Var(&s.fsck, "fsck", 50_000, "judgements by fsck.fat, and as many by mtools; 0: none")
	flag.Int64Var(&s.firmware, "firmware", 1024, "readings by OVMF; 0: none")
	flag.Int64Var(&s.kernel, "kernel", 1024, "readings by Linux; 0: none")
	flag.IntVar(&s.samples, "samples", 0, "`states` of each scenario for fsck.fat and mtools, when there are enough of others; 0: as the budget has it")
	flag.IntVar(&s.jobs, "jobs", runtime.NumCPU(), "scenarios at a time")
	flag.DurationVar(&s.limit, "time", 0, "stop after that `time` and report what was reached; 0: when all is done")
	flag.StringVar(&s.out, "out", "out/crash", "`directory` of the progress file and of images")
	flag.StringVar(&s.report, "report", "docs/crash-report.json", "report `file`")
	flag.StringVar(&s.doc, "doc", "", "Markdown `file` of the report's tables; \"\": none")
	flag.BoolVar(&s.mutants, "mutants", true, "also run the mutants")
	replay := flag.Bool("replay", false, "judge one state again: SEED LINE [LINE…]")
	shrink := flag.Bool("shrink", false, "make a failing scenario smaller: SEED")
	flag.Parse()
	// The states are short-lived and the machine has more memory than they need.
	debug.SetGCPercent(400)
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	var err error
	switch {
	case *replay:
		err = replayState(os.Stdout, flag.Args())
	case *shrink:
		err = shrinkScenario(os.Stdout, flag.Args())
	default:
		err = run(ctx, os.Stdout, s)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "crash:", err)
		os.Exit(1)
	}
}

func seedOf(args []string) (uint64, error) {
	if len(args) == 0 {
		return 0, errors.New("which seed?")
	}
	return strconv.ParseUint(args[0], 10, 64)
}

func replayState(w io.Writer, args []string) error {
	seed, err := seedOf(args)
	if err != nil || len(args) < 2 {
		return errors.Join(err, errors.New("want SEED LINE [LINE…]"))
	}
	c, err := crashtest.Record(crashtest.Generate(seed))
	if err != nil {
		return err
	}
	if err := c.Replay(args[1:]); err != nil {
		return err
	}
	fmt.Fprintf(w, "scenario %d (%s): the state is as it should be\n", seed, c.Scenario.Name)
	return nil
}

func shrinkScenario(w io.Writer, args []string) error {
	seed, err := seedOf(args)
	if err != nil {
		return err
	}
	small, v := crashtest.Shrink(crashtest.Generate(seed), crashtest.Budget{Read: 4096, Recover: 300, Torn: 300, Twice: 60, TwiceStep: 3})
	if v == nil {
		return fmt.Errorf("scenario %d has no violation", seed)
	}
	return small.Print(w, v)
}

// outcome is one line of the progress file.
type outcome struct {
	Kind       string // "scenario", "firmware", "kernel"
	Seed       uint64 `json:",omitempty"`
	Geometry   string `json:",omitempty"`
	Tally      crashtest.Tally
	Fsck       int64       `json:",omitempty"`
	Mtools     int64       `json:",omitempty"`
	Seconds    float64     // of one core
	Old        int64       `json:",omitempty"` // readings of other systems
	New        int64       `json:",omitempty"`
	Between    int64       `json:",omitempty"` // trees between two commits
	Mixed      int64       `json:",omitempty"`
	Again      int64       `json:",omitempty"` // wrong once, and right when the same image was read again
	Violations []violation `json:",omitempty"`
}

type violation struct {
	Scenario string
	Phase    string
	Lines    []string
	Error    string
}

// runner is a run under way.
type runner struct {
	settings
	w     io.Writer
	p     *progress
	mu    sync.Mutex
	wait  map[string][]vm.Sample // samples that wait for a boot
	taken map[string]int64       // samples taken for each system
	begin time.Time

	skipped []string
}

// batch is how many images are read at a time.
const batch = 64

func run(ctx context.Context, w io.Writer, s settings) error {
	if err := os.MkdirAll(s.out, 0o755); err != nil {
		return err
	}
	p, err := openProgress(filepath.Join(s.out, "progress.jsonl"))
	if err != nil {
		return err
	}
	defer p.close()
	r := &runner{settings: s, w: w, p: p, wait: map[string][]vm.Sample{}, taken: map[string]int64{}, begin: time.Now()}
	r.taken["firmware"], r.taken["kernel"] = p.readings("firmware"), p.readings("kernel")
	if n := len(p.done); n > 0 {
		fmt.Fprintf(w, "going on after %d scenarios and %d states\n", n, p.total.States())
	}
	// The report, with the mutants, is made when the time is up, but not when somebody stops the run.
	stopped := ctx
	if s.limit > 0 {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, s.limit)
		defer cancel()
	}
	seeds := make(chan uint64)
	fail := make(chan error, s.jobs+1)
	var wg sync.WaitGroup
	for range max(s.jobs, 1) {
		wg.Add(1)
		go func() {
			defer wg.Done()
			for seed := range seeds {
				if err := r.scenario(ctx, seed); err != nil {
					fail <- err
					return
				}
			}
		}()
	}
	err = func() error {
		tick := time.NewTicker(30 * time.Second)
		defer tick.Stop()
		for seed := uint64(s.from); !r.reached(); seed++ {
			if p.has(seed) {
				continue
			}
		again:
			select {
			case seeds <- seed:
			case <-tick.C:
				r.say()
				goto again
			case err := <-fail:
				return err
			case <-ctx.Done():
				return nil
			}
		}
		return nil
	}()
	close(seeds)
	wg.Wait()
	select {
	case e := <-fail:
		err = errors.Join(err, e)
	default:
	}
	if err != nil {
		return err
	}
	for _, kind := range []string{"firmware", "kernel"} {
		if ctx.Err() == nil {
			if err := r.boot(ctx, kind, r.wait[kind]); err != nil {
				return err
			}
		}
	}
	r.say()
	return r.finish(stopped)
}

// reached says whether every goal is.
func (r *runner) reached() bool {
	r.p.mu.Lock()
	defer r.p.mu.Unlock()
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.p.total.States() >= r.states && r.p.fsck >= r.fsck && r.taken["firmware"] >= r.firmware && r.taken["kernel"] >= r.kernel
}

func (r *runner) say() {
	r.p.mu.Lock()
	defer r.p.mu.Unlock()
	fmt.Fprintf(r.w, "%s: %d scenarios, %d states, fsck.fat %d, firmware %d, Linux %d, violations %d\n", time.Since(r.begin).Round(time.Second),
		r.p.total.Scenarios, r.p.total.States(), r.p.fsck, r.p.readings("firmware"), r.p.readings("kernel"), len(r.p.violations))
}

// scenario explores the scenario of a seed. What is wrong with a state is an outcome; the error says that the machine
// or the judges failed.
func (r *runner) scenario(ctx context.Context, seed uint64) error {
	s := crashtest.Generate(seed)
	begin := time.Now()
	o := outcome{Kind: "scenario", Seed: seed, Geometry: s.Geometry.String()}
	c, err := crashtest.Record(s)
	if err == nil {
		err = r.explore(c, &o)
	}
	var v *crashtest.Violation
	switch {
	case errors.Is(err, crashtest.ErrRefused):
		o.Tally = crashtest.Tally{Scenarios: 1, Refused: 1}
	case errors.As(err, &v):
		o.Violations = []violation{{s.Name, v.Phase, v.Lines, v.Err.Error()}}
	case err != nil:
		o.Tally.Scenarios = 1
		o.Violations = []violation{{s.Name, "recording", nil, err.Error()}}
	}
	for _, v := range o.Violations {
		fmt.Fprintf(r.w, "VIOLATION: seed %d, %+v\n", seed, v)
	}
	o.Seconds = time.Since(begin).Seconds()
	if err := r.p.add(o); err != nil {
		return err
	}
	for _, kind := range []string{"firmware", "kernel"} {
		if err := r.boots(ctx, kind); err != nil {
			return err
		}
	}
	return nil
}

func (r *runner) explore(c *crashtest.Run, o *outcome) (err error) {
	b := large
	if c.Scenario.Geometry.Size <= smallVolume {
		b = small
	}
	switch {
	case r.fsck == 0:
		b.Samples = 2 // for the systems in machines
	case r.samples > 0:
		b.Samples = r.samples
	}
	var judge crashtest.Sampler
	if r.fsck > 0 {
		outside, err := c.NewOutside(r.out)
		if err != nil {
			return err
		}
		outside.Mtools = mtools
		defer func() {
			o.Fsck, o.Mtools = outside.Judged, outside.Read
			outside.Close()
		}()
		judge = outside.Judge
	}
	n := 0
	defer func() {
		for _, k := range crashtest.Checks {
			if err == nil && c.Scenario.Seed%checked == 0 {
				err = c.Try(k)
				o.Tally.Checks++
			}
		}
	}()
	o.Tally, err = c.Explore(b, func(cut *fixtures.State, tree int, recovered *fixtures.State) error {
		if judge != nil {
			if err := judge(cut, tree, recovered); err != nil {
				return err
			}
		}
		n++
		return r.take(c, cut, n)
	})
	return err
}

// What OVMF's shell takes for each file is a tenth of a second and more, so that it gets states with few of them.
const (
	firmwareFiles = 16
	firmwareBytes = 100_000
)

// take keeps a state for the systems that read it in a machine. Volumes that are large, or whose sectors are not those
// of their device, would cost more than they tell.
func (r *runner) take(c *crashtest.Run, cut *fixtures.State, n int) error {
	g := c.Scenario.Geometry
	if n%2 == 1 || g.Size > 40<<20 || g.Device != 0 || c.Trees == 1 {
		return nil
	}
	r.mu.Lock()
	enough := r.taken["firmware"] >= r.firmware && r.taken["kernel"] >= r.kernel
	r.mu.Unlock()
	if enough {
		return nil
	}
	trees, err := c.Listings()
	if err != nil {
		return err
	}
	files := map[string]int{}
	for _, t := range trees {
		for p, content := range t {
			files[p] = max(files[p], len(content))
		}
	}
	bytes := 0
	for _, size := range files {
		bytes += size
	}
	img, err := c.Frozen(cut)
	if err != nil {
		return err
	}
	sample := vm.Sample{Name: fmt.Sprintf("%d %s", c.Scenario.Seed, cut.Line()), Image: img, Sector: g.Sector, Allowed: trees}
	r.mu.Lock()
	defer r.mu.Unlock()
	for kind, goal := range map[string]int64{"firmware": r.firmware, "kernel": r.kernel} {
		if kind == "firmware" && (len(files) > firmwareFiles || bytes > firmwareBytes) {
			continue
		}
		if r.taken[kind] < goal {
			r.taken[kind]++
			r.wait[kind] = append(r.wait[kind], sample)
		}
	}
	return nil
}

// boots reads a batch of samples when one is full.
func (r *runner) boots(ctx context.Context, kind string) error {
	r.mu.Lock()
	all := r.wait[kind]
	if len(all) < batch {
		r.mu.Unlock()
		return nil
	}
	r.wait[kind] = append([]vm.Sample(nil), all[batch:]...)
	r.mu.Unlock()
	return r.boot(ctx, kind, all[:batch])
}

// again has what was read wrongly read once more, in a machine of its own. What a system sees in an image is always the
// same; what arrives of it through the console of a busy emulator is not. So only what is wrong twice counts as wrong, and
// how often it was not is returned, for the report.
func (r *runner) again(samples []vm.Sample, readings []vm.Reading, read func([]vm.Sample) ([]vm.Reading, error)) (int64, error) {
	var at []int
	var bad []vm.Sample
	for i, x := range readings {
		if x.Err != nil {
			at, bad = append(at, i), append(bad, samples[i])
		}
	}
	if len(bad) == 0 {
		return 0, nil
	}
	second, err := read(bad)
	if err != nil {
		return 0, err
	}
	n := int64(0)
	for k, x := range second {
		fmt.Fprintf(r.w, "read again: %s: first %v, then %v\n", x.Name, readings[at[k]].Err, x.Err)
		if x.Err == nil {
			readings[at[k]] = x
			n++
		}
	}
	return n, nil
}

// boot lets a system read samples.
func (r *runner) boot(ctx context.Context, kind string, samples []vm.Sample) error {
	if len(samples) == 0 {
		return nil
	}
	dir, err := os.MkdirTemp(r.out, kind+"-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	read := map[string]func(context.Context, string, []vm.Sample) ([]vm.Reading, error){"firmware": vm.Firmware, "kernel": vm.Kernel}[kind]
	begin := time.Now()
	readings, err := read(ctx, dir, samples)
	if err != nil {
		if ctx.Err() != nil {
			return nil
		}
		if errors.Is(err, vm.ErrMissing) {
			r.mu.Lock()
			defer r.mu.Unlock()
			if r.taken[kind] < 1<<62 {
				r.taken[kind] = 1 << 62 // no more of these
				r.skipped = append(r.skipped, fmt.Sprintf("%s: %v", kind, err))
			}
			return nil
		}
		return err
	}
	o := outcome{Kind: kind}
	if o.Again, err = r.again(samples, readings, func(s []vm.Sample) ([]vm.Reading, error) { return read(ctx, dir, s) }); err != nil {
		if ctx.Err() != nil {
			return nil
		}
		return err
	}
	o.Seconds = time.Since(begin).Seconds()
	last := map[string]int{}
	for _, s := range samples {
		last[s.Name] = len(s.Allowed) - 1
	}
	for _, x := range readings {
		switch {
		case x.Err != nil:
			o.Mixed++
			o.Violations = append(o.Violations, violation{x.Name, kind, nil, x.Err.Error()})
			fmt.Fprintf(r.w, "VIOLATION: %s: %s: %v\n", kind, x.Name, x.Err)
		case x.State == last[x.Name]:
			o.New++
		case x.State == 0:
			o.Old++
		default:
			o.Between++
		}
	}
	return r.p.add(o)
}
