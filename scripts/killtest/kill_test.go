// Package killtest kills `espmirror sync` at random moments on a loop device, and looks at what it leaves with programs
// that share no code with it.
package killtest

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"espmirror/fixtures"
)

// Environment of the test; scripts/kill-test.sh sets it.
const (
	roundsEnv = "ESPMIRROR_KILL_ROUNDS" // kills, 10 if empty
	seedEnv   = "ESPMIRROR_KILL_SEED"   // random if empty
)

func TestMain(m *testing.M) { os.Exit(fixtures.Main(m)) }

// volumes are the targets, used in turn.
var volumes = []fixtures.VolumeSpec{
	{FAT: 32, Size: 72 << 20, SectorsPerCluster: 1, Serial: 0xE5D00032, Label: "KILL32"},
	{FAT: 16, Size: 64 << 20, SectorsPerCluster: 4, Serial: 0xE5D00016, Label: "KILL16"},
	{FAT: 12, Size: 30 << 20, SectorsPerCluster: 16, Serial: 0xE5D00012, Label: "KILL12"},
	{FAT: 32, FATs: 1, Size: 272 << 20, SectorSize: 4096, SectorsPerCluster: 1, Serial: 0xE5D04096, Label: "KILL4K"},
}

// generations are the trees that the primary has in turn. They share files, drop some, and change the content of others.
func generations() []fixtures.TreeSpec {
	var g []fixtures.TreeSpec
	for i := range 3 {
		n := uint64(i)
		g = append(g, fixtures.Merge(
			fixtures.KernelInstall(1+n/2, 1<<20, fmt.Sprintf("6.12.%d", 10+n), fmt.Sprintf("6.12.%d", 11+n)),
			fixtures.ManyFiles("EFI/Linux/extra", 40+10*i, 700, 1000+10*n),
			fixtures.Names(7+n%2).Below("loader/names"),
		))
	}
	return g
}

// target is one loop device and what is known of it.
type target struct {
	t       *testing.T
	bin     string
	node    string
	image   string // the file behind node
	spec    *fixtures.VolumeSpec
	sources []string                         // directories
	trees   []map[string]fixtures.JudgedFile // of the sources
	now     int                              // the generation that it has
	took    time.Duration                    // a sync that nobody killed
	lines   int                              // and what it logged
}

func TestKill(t *testing.T) {
	rounds := 10
	if s := os.Getenv(roundsEnv); s != "" {
		var err error
		if rounds, err = strconv.Atoi(s); err != nil {
			t.Fatal(err)
		}
	} else if testing.Short() {
		rounds = 4
	}
	if os.Geteuid() != 0 {
		t.Skip("skipped: kill test: loop devices need root")
	}
	fixtures.Need(t, "losetup", "mkfs.fat", "fsck.fat", "mcopy")
	seed := rand.Uint64()
	if s := os.Getenv(seedEnv); s != "" {
		var err error
		if seed, err = strconv.ParseUint(s, 10, 64); err != nil {
			t.Fatal(err)
		}
	}
	rng := rand.New(rand.NewPCG(seed, 0))
	dir := t.TempDir()
	bin := fixtures.Build(t, dir, "cmd/espmirror")
	var sources []string
	var trees []map[string]fixtures.JudgedFile
	for i, g := range generations() {
		src := filepath.Join(dir, fmt.Sprintf("generation%d", i))
		if err := g.Write(src); err != nil {
			t.Fatal(err)
		}
		sources = append(sources, src)
		trees = append(trees, judged(g))
	}
	var targets []*target
	for i := range volumes[:min(len(volumes), rounds)] {
		targets = append(targets, newTarget(t, bin, dir, &volumes[i], sources, trees))
	}
	tally := map[string]int{}
	kills := func(n int) int { return n - tally[ended] }
	n := 0
	// A sync that is faster than the kill does not count, but the test must come to an end.
	for ; kills(n) < rounds && n < 4*rounds; n++ {
		tg := targets[n%len(targets)]
		outcome := tg.round(rng, rng.IntN(2) == 0)
		tally[outcome]++
		if t.Failed() {
			t.Fatalf("round %d on FAT%d fails; the seed is %d, %s=%d repeats the sequence, though not the moments", n, tg.spec.FAT, seed, seedEnv, seed)
		}
	}
	fixtures.Count("kills", int64(kills(n)))
	t.Logf("%d syncs, %d killed", n, kills(n))
	for _, k := range slices.Sorted(maps.Keys(tally)) {
		t.Logf("%5d %s", tally[k], k)
	}
}

// The outcomes of a round.
const (
	ended     = "sync ended before the kill"
	untouched = "killed, nothing to recover"
)

func newTarget(t *testing.T, bin, dir string, spec *fixtures.VolumeSpec, sources []string, trees []map[string]fixtures.JudgedFile) *target {
	spec.Tree = fixtures.Unselected(200, 5)
	path := filepath.Join(dir, spec.Label+".img")
	if err := spec.Make(path); err != nil {
		t.Fatal(err)
	}
	out, err := exec.Command("losetup", "--sector-size", strconv.Itoa(max(spec.SectorSize, 512)), "--find", "--show", path).CombinedOutput()
	if err != nil {
		t.Skipf("skipped: kill test: no loop devices here: %s", out)
	}
	tg := &target{t: t, bin: bin, node: strings.TrimSpace(string(out)), image: path, spec: spec, sources: sources, trees: trees}
	t.Cleanup(func() {
		if out, err := exec.Command("losetup", "-d", tg.node).CombinedOutput(); err != nil {
			t.Errorf("losetup -d %s: %s", tg.node, out)
		}
	})
	tg.run("sync", "-q", "--primary", sources[0], "--target", tg.node)
	// The journal is there now; the syncs to be killed are like this one.
	start := time.Now()
	cmd := exec.Command(bin, "sync", "-v", "--no-progress", "--primary", sources[1], "--target", tg.node)
	text, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("sync: %v\n%s", err, text)
	}
	tg.took, tg.lines, tg.now = time.Since(start), bytes.Count(text, []byte("\nespmirror:")), 1
	return tg
}

// run runs a command that must succeed.
func (tg *target) run(args ...string) []byte {
	tg.t.Helper()
	var stdout, stderr bytes.Buffer
	cmd := exec.Command(tg.bin, args...)
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	if err := cmd.Run(); err != nil {
		tg.t.Fatalf("espmirror %s: %v\n%s%s", strings.Join(args, " "), err, stdout.Bytes(), stderr.Bytes())
	}
	return stdout.Bytes()
}

// round changes the primary, kills the sync to it, judges what is left, and brings it to clean: through recover, or
// through the next sync alone.
func (tg *target) round(rng *rand.Rand, recoverFirst bool) string {
	t := tg.t
	next := (tg.now + 1 + rng.IntN(len(tg.sources)-1)) % len(tg.sources)
	if tg.kill(rng, tg.sources[next]) {
		tg.judge(fixtures.Allow(0), tg.now, next, true)
		tg.now = next
		return ended
	}
	// The tree is old, new, or for staged entries both side by side; the books may be behind.
	tg.judge(fixtures.AllowCrash, tg.now, next, false)
	outcome := untouched
	if recoverFirst {
		var rep struct {
			Volumes []struct {
				Recovery struct {
					Action string `json:"action"`
				} `json:"recovery"`
				Action string `json:"action"`
			} `json:"volumes"`
		}
		out := tg.run("recover", "--json=short", tg.node)
		if err := json.Unmarshal(out, &rep); err != nil || len(rep.Volumes) != 1 {
			t.Fatalf("recover --json: %s", out)
		}
		action := rep.Volumes[0].Action + rep.Volumes[0].Recovery.Action
		if action != "nothing to do" {
			outcome = "killed, recover: " + action
		}
		tg.now = tg.judge(fixtures.Allow(0), tg.now, next, true)
	} else if tg.pending() {
		outcome = "killed, the next sync mends it"
	}
	tg.run("sync", "-q", "--primary", tg.sources[next], "--target", tg.node)
	tg.judge(fixtures.Allow(0), next, next, true)
	tg.now = next
	return outcome
}

// pending says whether the device has something to be recovered.
func (tg *target) pending() bool {
	err := exec.Command(tg.bin, "recover", "-q", "--dry-run", tg.node).Run()
	var exit *exec.ExitError
	if err != nil && !(errors.As(err, &exit) && exit.ExitCode() == 5) {
		tg.t.Fatalf("recover --dry-run: %v", err)
	}
	return err != nil
}

// kill starts a sync and kills it, and says whether it had ended by itself. Half of the kills come at any time, half
// soon after a line of the log, so that commits and what follows them are hit as often as the long copying.
func (tg *target) kill(rng *rand.Rand, source string) (done bool) {
	cmd := exec.Command(tg.bin, "sync", "-v", "--no-progress", "--primary", source, "--target", tg.node)
	stderr, err := cmd.StderrPipe()
	if err != nil {
		tg.t.Fatal(err)
	}
	lines, delay := 0, time.Duration(rng.Int64N(int64(tg.took)))
	if rng.IntN(2) == 0 && tg.lines > 0 {
		lines, delay = 1+rng.IntN(tg.lines), time.Duration(rng.Int64N(int64(tg.took/20)))
	}
	start := time.Now()
	if err := cmd.Start(); err != nil {
		tg.t.Fatal(err)
	}
	var text strings.Builder
	buf := make([]byte, 1)
	for seen := 0; seen < lines; {
		if n, err := stderr.Read(buf); n == 0 || err != nil {
			break
		}
		text.WriteByte(buf[0])
		if buf[0] == '\n' {
			seen++
		}
	}
	go io.Copy(&text, stderr)
	time.Sleep(delay)
	_ = cmd.Process.Kill() // it may have ended
	err = cmd.Wait()
	if st, ok := cmd.ProcessState.Sys().(syscall.WaitStatus); ok && st.Signaled() {
		return false
	}
	if err != nil {
		tg.t.Fatalf("sync fails by itself: %v\n%s", err, text.String())
	}
	tg.took = (tg.took + time.Since(start)) / 2
	return true
}

// judge looks at the device and returns the generation that it holds, or -1 when its units differ in that. With whole,
// they must not.
func (tg *target) judge(allow fixtures.Allow, before, after int, whole bool) int {
	t := tg.t
	t.Helper()
	f, err := fixtures.Fsck(tg.node)
	if err != nil {
		t.Fatal(err)
	}
	if err := f.Err(allow); err != nil {
		t.Errorf("fsck.fat: %v", err)
	}
	// mtools wants a geometry of devices that a loop device does not have, so it reads the file behind it.
	if err := flush(tg.node); err != nil {
		t.Fatal(err)
	}
	got, err := fixtures.Mtools(tg.image, 0)
	if err != nil {
		t.Fatal(err)
	}
	if bad := missingFrom(got, judged(tg.spec.Tree)); bad != "" {
		t.Errorf("a file outside the selection changed: %s", bad)
	}
	o, n := tg.trees[before], tg.trees[after]
	seen := map[int]bool{}
	for _, u := range units(o, n) {
		ou, nu, gu := below(o, u), below(n, u), below(got, u)
		both := maps.Clone(ou)
		maps.Copy(both, nu)
		switch {
		case maps.Equal(ou, nu) && maps.Equal(gu, ou):
		case maps.Equal(gu, ou):
			seen[before] = true
		case maps.Equal(gu, nu):
			seen[after] = true
		case !whole && maps.Equal(gu, both):
			seen[-1] = true
		default:
			t.Errorf("%s is neither old nor new", u)
		}
	}
	if len(seen) == 1 {
		for k := range seen {
			return k
		}
	}
	if whole && len(seen) > 1 {
		t.Errorf("the volume is a mixture of old and new")
	}
	if len(seen) == 0 {
		return after
	}
	return -1
}

// flush writes back what the cache of a device holds.
func flush(node string) error {
	f, err := os.OpenFile(node, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	if err := f.Sync(); err != nil {
		f.Close()
		return err
	}
	return f.Close()
}

// unit is the part of a path that switches as a whole.
func unit(path string) string {
	parts := strings.SplitN(path, "/", 3)
	if len(parts) == 3 && strings.EqualFold(parts[0], "EFI") {
		return parts[0] + "/" + parts[1]
	}
	return parts[0]
}

func units(trees ...map[string]fixtures.JudgedFile) []string {
	set := map[string]bool{}
	for _, t := range trees {
		for p := range t {
			set[unit(p)] = true
		}
	}
	return slices.Sorted(maps.Keys(set))
}

func below(tree map[string]fixtures.JudgedFile, u string) map[string]fixtures.JudgedFile {
	b := map[string]fixtures.JudgedFile{}
	for p, f := range tree {
		if unit(p) == u && !f.Dir {
			b[p] = f
		}
	}
	return b
}

// judged is the tree as mtools shows it, directories left out.
func judged(t fixtures.TreeSpec) map[string]fixtures.JudgedFile {
	m := map[string]fixtures.JudgedFile{}
	for p, c := range t {
		if !c.Dir {
			m[fixtures.MtoolsName(p)] = fixtures.JudgedFile{Size: c.Size, Sum: c.Sum()}
		}
	}
	return m
}

func missingFrom(got, want map[string]fixtures.JudgedFile) string {
	for _, p := range slices.Sorted(maps.Keys(want)) {
		if got[p] != want[p] {
			return p
		}
	}
	return ""
}
