package main

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"
	"unicode/utf8"

	"golang.org/x/sys/unix"

	"espmirror/fixtures"
	"espmirror/replicate"
)

// hold locks an image as another program that writes to it does.
func (r *rig) hold(node string) (release func()) {
	r.t.Helper()
	f, err := os.Open(r.node(node))
	if err != nil {
		r.t.Fatal(err)
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX); err != nil {
		r.t.Fatal(err)
	}
	return func() { _ = f.Close() }
}

// interrupt cuts a sync to one target in the middle, so that the target needs recovery.
func (r *rig) interrupt(args ...string) {
	r.t.Helper()
	for n := 4; n < 40; n++ {
		left := n
		r.app.engine.sync = func(ctx context.Context, jobs []replicate.Job) ([][]replicate.Result, error) {
			for _, target := range jobs[0].Targets {
				target.Dev = cut{target.Dev, &left}
			}
			return replicate.SyncAll(ctx, jobs)
		}
		r.do(append([]string{"sync"}, args...)...)
		r.app.engine.sync = replicate.SyncAll
		if r.run("recover", "-n", args[len(args)-1]).code == exitRecover {
			return
		}
	}
	r.t.Fatal("no cut left anything to recover")
}

// zoo makes a machine with a member in nearly every state.
func zoo(t *testing.T) *rig {
	r := newRig(t)
	r.set(7)
	// sdh: in the set, and never synced.
	r.disk("sdh", esp(8, emptyTree))
	r.do("add", "--no-sync", r.node("sdh1")).want(0)
	r.do("sync", "--target", r.node("sdb1"), "--target", r.node("sdd1"), "--target", r.node("sde1"), "--target", r.node("sdf1"), "--target", r.node("sdg1")).want(0)
	// sdc was left behind: stale. sdd is newer by a run from there, which was noted on nobody else.
	r.copyIn("sdd1", "loader/loader.conf", "timeout 4\n")
	r.boot(guidOf(4))
	makeFixture(t, *esp(99, emptyTree).Volume, "other.img")
	r.do("sync", "--target", "other.img").want(0)
	r.boot(guidOf(1))
	// sde drifted by itself, and so the primary did since: diverged.
	r.copyIn("sda1", "loader/loader.conf", "timeout 5\n")
	r.copyIn("sde1", "loader/loader.conf", "timeout 6\n")
	// sdf was cut, sdg is gone. sdb has the generation of the primary, and not what the primary has had since.
	r.interrupt("--target", r.node("sdf1"))
	r.pull("sdg")
	r.do("sync", "--target", r.node("sdb1")).want(0)
	r.copyIn("sda1", "loader/loader.conf", "timeout 7\n")
	return r
}

// TestStatusStates has a member in each state, as a table at several widths, as JSON, and as metrics.
func TestStatusStates(t *testing.T) {
	r := zoo(t)
	res := r.run("status").want(exitPartial).golden("status-states")
	r.run("status", "--json=pretty").want(exitPartial).json("status")
	for _, want := range []string{"drifted", "stale", "new", "diverged", "missing", "needs recovery"} {
		if !regexp.MustCompile(`(?m)  ` + want + `(,|$)`).MatchString(res.stdout) {
			t.Errorf("nothing is %s:\n%s", want, res.stdout)
		}
	}
	r.app.terminalWidth = func(io.Writer) int { return 80 }
	res = r.run("status", "--no-progress", "--color=never").want(exitPartial).golden("status-80-columns")
	for line := range strings.Lines(res.stdout) {
		if n := utf8.RuneCountInString(strings.TrimSuffix(line, "\n")); n > 80 && !strings.HasPrefix(line, "next: ") {
			t.Errorf("%d columns: %s", n, line)
		}
	}
	r.app.terminalWidth = terminalWidth

	// Somebody writes to one, and the primary was taken out of the machine.
	release := r.hold("sdb1")
	r.run("status", "--target", r.node("sdb1")).want(exitRefused).golden("status-busy")
	release()
	r.pull("sda")
	r.run("status").want(exitFailed).golden("status-no-primary")
	r.run("status", "--target", r.node("sdb1")).want(exitFailed).has("primary", "missing", "target", "1000-0002")
	r.run("status", "--json=short").want(exitFailed).json("status")
}

func TestStatusSetDiffers(t *testing.T) {
	r := newRig(t)
	r.set(3)
	set := r.setFile("sda1")
	r.copyIn("sdb1", "loader/esp-sync", set+"member "+guidOf(8)+"\nmember "+guidOf(9)+"\n")
	const shrunk = "warning: the target's loader/esp-sync lists members that the primary's does not: "
	for _, cmd := range []string{"status", "sync -n", "verify"} {
		res := r.run(strings.Fields(cmd)...).has(shrunk + guidOf(8) + ", " + guidOf(9) + " (target=machine/dev/sdb1)\n")
		if strings.Count(res.stderr, shrunk) != 1 {
			t.Error(res.stderr)
		}
	}
	doc := r.run("status", "--json=short").json("status")
	if d := doc["volumes"].([]any)[1].(map[string]any)["set_differs"].(map[string]any); len(d["only_there"].([]any)) != 2 || len(d["only_here"].([]any)) != 0 {
		t.Error(d)
	}
	if d := doc["volumes"].([]any)[2].(map[string]any)["set_differs"]; d != nil {
		t.Error(d)
	}
	r.copyIn("sdb1", "loader/esp-sync", strings.Replace(set, "member "+guidOf(3)+" # sdc1, EFI system\n", "", 1))
	r.run("status").has("the target's loader/esp-sync does not list members that the primary's does: " + guidOf(3))
	r.copyIn("sdb1", "loader/esp-sync", set+"# a note\n")
	r.run("status").has("the target's loader/esp-sync is not the primary's")
	r.copyIn("sdb1", "loader/esp-sync", "exlude x\n")
	r.run("status").has("warning: the target's replica set file cannot be read", "line 1")
	r.copyIn("sdb1", "loader/esp-sync", set)
	if res := r.run("status").want(0); res.stderr != "" {
		t.Error(res.stderr)
	}
}

// TestWaitForSet: without a GUID, the members of the primary's set are waited for.
func TestWaitForSet(t *testing.T) {
	r := newRig(t)
	r.disk("sda", esp(1, bootTree))
	r.run("wait").want(exitUsage).has("no member was given, and no primary")
	r.boot(guidOf(1))
	r.run("wait").want(exitUsage).has("machine/dev/sda1 has no loader/esp-sync", "espmirror add")
	r.disk("sdb", esp(2, emptyTree))
	r.do("add", "-q", r.node("sdb1")).want(0)
	r.run("wait").want(0).has("PARTUUID="+guidOf(1)+": there", "PARTUUID="+guidOf(2)+": there")
	r.run("wait", "--primary", r.node("sdb1")).want(0)
	r.run("wait", "--primary", r.node("sdb1"), guidOf(1)).want(exitUsage).has("exclude each other")
	r.run("wait", "--json=short").want(0).json("wait")
	r.pull("sdb")
	r.run("wait", "--timeout=0").want(exitPartial).has("cannot find PARTUUID="+guidOf(2)+"\n", guidOf(1)+": there")
	time.AfterFunc(100*time.Millisecond, func() { r.plug("sdb") })
	r.run("wait", "--timeout=1min").want(0).has("waiting for PARTUUID=" + guidOf(2))
	r.pull("sda")
	time.AfterFunc(100*time.Millisecond, func() { r.plug("sda") })
	r.run("wait").want(0).has("waiting for PARTUUID=" + guidOf(1))
	r.copyIn("sda1", "loader/esp-sync", r.setFile("sda1")+"timeout 200ms\n")
	r.pull("sdb")
	start := time.Now()
	r.run("wait", "--json=pretty").want(exitPartial).json("wait")
	if took := time.Since(start); took > 5*time.Second || took < 200*time.Millisecond {
		t.Errorf("it took %v, and the set says 200ms", took)
	}
	r.pull("sda")
	r.run("wait", "--timeout=0").want(exitPartial).has("cannot find PARTUUID=" + guidOf(1))
}

// TestBootedXBOOTLDR: a boot loader may name the XBOOTLDR partition; the set is that of the ESP beside it.
func TestBootedXBOOTLDR(t *testing.T) {
	r := newRig(t)
	kernels := fixtures.TreeSpec{"loader/entries/a.conf": fixtures.Text("linux /a/linux\n"), "a/linux": fixtures.Text("MZ kernel")}
	r.disk("sda", esp(1, bootTree), xbootldr(21, kernels))
	r.disk("sdb", esp(2, emptyTree), xbootldr(22, emptyTree))
	r.boot(guidOf(21))
	r.do("add", r.node("sdb1")).want(0).has("machine/dev/sdb1  synced", "machine/dev/sdb2  synced")
	if s := r.setFile("sda1"); strings.Contains(s, guidOf(21)) || !strings.Contains(s, guidOf(1)) {
		t.Error(s)
	}
	r.run("sync").want(0)
	r.run("status").want(0).has("XBOOTLDR  machine/dev/sdb2")
	r.run("wait").want(0)
	// One of a pair that cannot be used keeps the other back.
	r.copyIn("sda1", "loader/loader.conf", "timeout 1\n")
	release := r.hold("sdb2")
	for _, cmd := range []string{"sync", "sync -n"} {
		r.run(strings.Fields(cmd)...).want(exitRefused).has("cannot sync machine/dev/sdb1: it goes with machine/dev/sdb2, which cannot be used", "locked by another")
	}
	release()
	// A newer disk: the hint names the ESPs, with which the rest goes.
	r.do("sync").want(0)
	r.copyIn("sdb2", "a/linux", "MZ kernel 2")
	res := r.run("sync").want(exitRefused).has("--primary machine/dev/sdb1 --target machine/dev/sda1")
	r.follow(res, 0).want(exitDiffers).has("a/linux")
	r.follow(res, 2).want(0)
	r.run("cat", r.node("sda2"), "a/linux").want(0).has("kernel 2")
	r.run("sync").want(0)
	// The wrong one of two GUIDs, by a slip of the editor.
	set := r.setFile("sda1")
	r.copyIn("sda1", "loader/esp-sync", strings.Replace(set, guidOf(2), guidOf(22), 1))
	for _, cmd := range []string{"sync", "sync -n", "verify", "status"} {
		r.run(strings.Fields(cmd)...).want(exitRefused).has("machine/dev/sdb2: it is an XBOOTLDR partition, and primary")
	}
	r.copyIn("sda1", "loader/esp-sync", set)
	// A filesystem there that is not FAT is no concern of the ESPs.
	r.file("dev/sda2", strings.Repeat("ext4", 512<<10))
	r.copyIn("sda1", "loader/loader.conf", "timeout 2\n")
	r.do("sync").want(0).has("warning: the XBOOTLDR partition is not FAT, and is not replicated")
	r.run("status").want(0)
	// Another disk has none at all: its ESP is kept up to date, and the lack is told.
	r.disk("sdc", esp(3, emptyTree))
	r.disk("sdd", esp(4, bootTree), xbootldr(24, kernels))
	r.boot(guidOf(4))
	r.do("add", r.node("sdc1")).want(exitPartial).has("machine/dev/sdc1            synced", "beside machine/dev/sdc1: there is none on its disk")
}

// TestMountedMember: the primary is mounted, so its files are read and written there.
func TestMountedMember(t *testing.T) {
	r := newRig(t)
	r.disk("sda", esp(1, bootTree))
	r.disk("sdb", esp(2, emptyTree))
	r.do("extract", "-q", "--to", "efi", r.node("sda1")).want(0)
	efi, err := filepath.Abs("efi")
	if err != nil {
		t.Fatal(err)
	}
	mount := func(options string) {
		r.file("proc/self/mountinfo", fmt.Sprintf("36 35 8:1 / %s %s - vfat /dev/sda1 %s\n", efi, options, options))
	}
	mount("rw")
	t.Setenv("SYSTEMD_ESP_PATH", "efi")
	before := hashes(t)["machine/dev/sda1"]
	r.do("add", r.node("sdb1")).want(0).has("added "+guidOf(1), "added "+guidOf(2))
	set, err := os.ReadFile("efi/loader/esp-sync")
	if err != nil || !strings.Contains(string(set), guidOf(2)) || string(set) != r.setFile("sdb1") {
		t.Errorf("%s %v", set, err)
	}
	state := func() *replicate.State {
		t.Helper()
		text, err := os.ReadFile("efi/EFI/espmirror/state")
		if err != nil {
			t.Fatal(err)
		}
		s, err := replicate.ParseState(text)
		if err != nil {
			t.Fatal(err)
		}
		return s
	}
	if s := state(); s.Generation != 1 {
		t.Error(s)
	}
	if err := os.WriteFile("efi/loader/loader.conf", []byte("timeout 7\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	r.do("sync").want(0)
	if s := state(); s.Generation != 2 {
		t.Error(s)
	}
	r.run("cat", r.node("sdb1"), "loader/loader.conf").want(0).has("timeout 7")
	if hashes(t)["machine/dev/sda1"] != before {
		t.Error("the device below a mounted filesystem was written to")
	}
	r.run("status").want(0).has("primary  efi")

	// The fingerprint of the device says that nothing was changed: then no file is read.
	compared := 0
	r.app.engine.sync = func(ctx context.Context, jobs []replicate.Job) ([][]replicate.Result, error) {
		compared = 0
		jobs[0].Options.Progress = func(p replicate.Progress) {
			if p.Phase == "compare" {
				compared++
			}
		}
		return replicate.SyncAll(ctx, jobs)
	}
	r.run("sync").want(0)
	if compared == 0 {
		t.Error("nothing was compared")
	}
	r.run("sync", "--compare=fingerprint").want(0)
	if compared != 0 {
		t.Error("files were read")
	}
	r.run("sync", "--compare=time").want(exitUsage)
	r.app.engine.sync = replicate.SyncAll

	// Nobody can note anything through a mount that is read-only. Where there is nothing to note, that is no reason to fail.
	readOnly := filepath.Join(t.TempDir(), "ro")
	if err := os.Mkdir(readOnly, 0o755); err == nil && unix.Mount(efi, readOnly, "", unix.MS_BIND, "") == nil {
		t.Cleanup(func() { _ = unix.Unmount(readOnly, unix.MNT_DETACH) })
		if err := unix.Mount("", readOnly, "", unix.MS_BIND|unix.MS_REMOUNT|unix.MS_RDONLY, ""); err != nil {
			t.Fatal(err)
		}
		was := efi
		efi = readOnly
		mount("ro")
		r.run("sync", "--primary", readOnly).want(0)
		if err := os.WriteFile(filepath.Join(was, "loader/loader.conf"), []byte("timeout 77\n"), 0o644); err != nil {
			t.Fatal(err)
		}
		r.run("sync", "--primary", readOnly).want(exitRefused).has("device is read-only", "hint: mount it for writing: mount -o remount,rw "+readOnly)
		r.run("add", "--primary", readOnly, r.node("sdb1")).want(exitRefused)
		efi = was
		mount("rw")
		r.do("sync").want(0)
	}

	// The other one went on while this one was not booted. No hint names what cannot be a target.
	r.copyIn("sdb1", "loader/loader.conf", "timeout 8\n")
	res := r.run("sync").want(exitRefused).has("or unmount efi and `espmirror sync --primary machine/dev/sdb1 --target machine/dev/sda1` keeps it")
	if strings.Contains(res.stderr, "--target efi") {
		t.Error(res.stderr)
	}
	if err := os.WriteFile("efi/loader/loader.conf", []byte("timeout 9\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	res = r.run("sync").want(exitRefused).has("have diverged", "(unmount efi first)")
	r.follow(res, 0).want(0)
	r.run("cat", r.node("sdb1"), "loader/loader.conf").want(0).has("timeout 9")
}

// TestRecoverPrimary: a target that was cut becomes the primary.
func TestRecoverPrimary(t *testing.T) {
	r := newRig(t)
	r.set(3)
	r.copyIn("sda1", "loader/loader.conf", "timeout 1\n")
	r.interrupt("--target", r.node("sdb1"))
	r.boot(guidOf(2))
	r.run("sync", "-n").want(exitRecover).has("it needs recovery", "hint: run `espmirror recover machine/dev/sdb1`")
	r.run("status").want(exitRecover).has("needs recovery")
	r.run("wait").want(0)
	r.do("sync").has("an earlier run on the primary was interrupted", "primary=machine/dev/sdb1")
	if r.run("check", r.node("sdb1")).code != 0 {
		t.Error("it was not recovered")
	}
	r.run("recover", "-n", r.node("sdb1")).want(0).has("nothing to do")
}

// TestReadOnlyPrimary: a primary on which the generation cannot be noted stops the run before any target is written to.
func TestReadOnlyPrimary(t *testing.T) {
	b := newBench(t)
	d := fixtures.DiskSpec{Size: 5 << 20, GUID: guidOf(80), Parts: []fixtures.PartSpec{esp(1, fixtures.Merge(bootTree, fixtures.TreeSpec{
		"loader/esp-sync": fixtures.Text("member " + guidOf(1) + "\nmember " + guidOf(2) + "\n")}))}}
	makeFixture(t, d, "a.img")
	d = fixtures.DiskSpec{Size: 5 << 20, GUID: guidOf(81), Parts: []fixtures.PartSpec{esp(2, emptyTree)}}
	makeFixture(t, d, "b.img")
	node := loop(t, b, "a.img", "--read-only")
	res := b.run("sync", "--primary", node+"@@p1", "--target", "b.img").want(exitRefused).has("on "+node+"@@p1", "read-only")
	if strings.Count(res.stderr, "espmirror: ") != 1 {
		t.Error(res.stderr)
	}
	b.run("add", "--primary", node+"@@p1", "b.img").want(exitRefused).has("read-only")
	b.run("sync", "-n", "--primary", node+"@@p1", "--target", "b.img").want(exitRefused)
	d.Parts[0] = esp(2, fixtures.Merge(bootTree, fixtures.TreeSpec{"loader/esp-sync": fixtures.Text("member " + guidOf(1) + "\nmember " + guidOf(2) + "\n")}))
	makeFixture(t, d, "c.img")
	b.run("sync", "-n", "--primary", node+"@@p1", "--target", "c.img").want(exitRefused)
	b.run("sync", "--primary", node+"@@p1", "--target", "c.img").want(exitRefused).has("cannot note") // its first generation
}

// TestSyncWithSeeds: each target gets a seed of its own; the primary's is not touched.
func TestSyncWithSeeds(t *testing.T) {
	r := newRig(t)
	r.set(3)
	r.copyIn("sda1", "loader/loader.conf", "timeout 1\n")
	r.run("sync", "-n", "--random-seed=yes").want(exitDiffers)
	r.do("sync", "--random-seed=yes").want(0)
	b, c := r.seed(r.node("sdb1")), r.seed(r.node("sdc1"))
	if len(b) != 32 || len(c) != 32 || b == c || r.run("cat", r.node("sda1"), seedFile).code == 0 {
		t.Errorf("%x %x", b, c)
	}
	r.do("sync", "--random-seed=yes").want(0)
	if r.seed(r.node("sdb1")) == b {
		t.Error("the seed stayed")
	}
	r.run("verify").want(0)
	r.run("sync", "--random-seed=maybe").want(exitUsage)
	// Without a set, the one that was booted.
	r.disk("sdd", esp(4, bootTree))
	r.boot(guidOf(4))
	r.do("random-seed").want(0).has("machine/dev/sdd1  created")
}

// TestMetrics: what a collector of text files reads.
func TestMetrics(t *testing.T) {
	r := zoo(t)
	r.run("status", "--metrics", "--json=short").want(exitUsage).json("error")
	r.run("sync", "--metrics").want(exitUsage)
	res := r.run("status", "--metrics").want(exitPartial)
	clocks := regexp.MustCompile(`(?m)^(espmirror_member_last_run_timestamp_seconds\{.*\}) \d{10}$`)
	compareGolden(t, "status-metrics", clocks.ReplaceAllString(res.stdout, "$1 TIME"))
	m := parseMetrics(t, res.stdout)
	state := func(n int) (states []string) {
		for s, v := range m["espmirror_member_state"] {
			if v == 1 && strings.Contains(s, guidOf(n)) {
				states = append(states, regexp.MustCompile(`state="(.*?)"`).FindStringSubmatch(s)[1])
			}
		}
		return states
	}
	var doc []string
	for _, v := range r.run("status", "--json=short").json("status")["volumes"].([]any) {
		doc = append(doc, v.(map[string]any)["state"].(string))
	}
	for i, want := range doc {
		if got := state(i + 1); !slices.Equal(got, []string{want}) {
			t.Errorf("member %d is %v, want %v", i+1, got, want)
		}
	}
	if m["espmirror_status_exit_code"][""] != exitPartial || len(m["espmirror_member_info"]) != 8 || len(m["espmirror_member_state"]) != 8*len(memberStates) {
		t.Errorf("%v", m)
	}
	for s := range m["espmirror_member_info"] {
		if strings.Contains(s, guidOf(7)) && !strings.Contains(s, `role="target"`) {
			t.Error(s)
		}
	}

	// Everything fails, and still there is something to read.
	r.pull("sda")
	m = parseMetrics(t, r.run("--metrics").want(exitFailed).stdout)
	if len(m["espmirror_member_info"]) != 1 || m["espmirror_status_exit_code"][""] != 1 {
		t.Error(m)
	}
	// Labels that want to break out, and two of the same name.
	const evil = "a\"b\\c\nd\x1b\xff"
	volumes := []statusVolume{{Name: "x", State: "ok", identity: identity{Label: evil, PartGUID: guidOne}}, {Name: evil, State: "ok"},
		{Name: "x", State: "busy", identity: identity{PartGUID: guidOne}}, {Name: "x", State: "missing", identity: identity{PartGUID: guidOne}}}
	var text bytes.Buffer
	writeMetrics(&text, &statusReport{Volumes: volumes}, 0)
	m = parseMetrics(t, text.String())
	if len(m["espmirror_member_info"]) != 4 || !strings.Contains(text.String(), `label="a\"b\\c\\nd\\x1b\\xff"`) {
		t.Error(text.String())
	}
}

var (
	metricComment = regexp.MustCompile(`^# (HELP|TYPE|UNIT) ([a-z_:][a-z0-9_:]*) ([^\n]+)$`)
	metricSample  = regexp.MustCompile(`^([a-z_:][a-z0-9_:]*)(?:\{((?:[a-z_][a-z0-9_]*="(?:[^"\\\n]|\\["\\n])*",?)+)\})? (-?[0-9]+(?:\.[0-9]+)?)$`)
	metricLabel   = regexp.MustCompile(`([a-z_][a-z0-9_]*)="((?:[^"\\\n]|\\["\\n])*)"(,|$)`)
)

// parseMetrics reads metrics as strictly as any reader of either format: families together, HELP and TYPE and UNIT in front
// of the samples, gauges only, the unit at the end of the name, no series twice, # EOF at the end and nowhere else. It
// returns the values by family and labels.
func parseMetrics(t *testing.T, text string) map[string]map[string]float64 {
	t.Helper()
	body, ok := strings.CutSuffix(text, "\n# EOF\n")
	if !ok || !utf8.ValidString(text) || strings.Contains(body, "# EOF") {
		t.Fatalf("it does not end as it must, or is no UTF-8:\n%s", text)
	}
	all := map[string]map[string]float64{}
	said := map[string]map[string]bool{}
	at := ""
	for line := range strings.SplitSeq(body, "\n") {
		if c := metricComment.FindStringSubmatch(line); c != nil {
			key, name, value := c[1], c[2], c[3]
			if name != at {
				if said[name] != nil {
					t.Fatalf("%s comes twice", name)
				}
				at, said[name], all[name] = name, map[string]bool{}, map[string]float64{}
			}
			switch {
			case said[name][key], len(all[name]) > 0:
				t.Errorf("out of place: %s", line)
			case key == "TYPE" && value != "gauge", key == "UNIT" && !strings.HasSuffix(name, "_"+value), strings.ContainsAny(value, "\\\""):
				t.Errorf("not for all readers: %s", line)
			}
			said[name][key] = true
			continue
		}
		s := metricSample.FindStringSubmatch(line)
		if s == nil || s[1] != at || !said[at]["TYPE"] || !said[at]["HELP"] {
			t.Fatalf("not a sample of %s: %q", at, line)
		}
		for _, unit := range []string{"_bytes", "_seconds"} {
			if strings.HasSuffix(at, unit) != said[at]["UNIT"] && strings.HasSuffix(at, unit) {
				t.Errorf("%s has no unit", at)
			}
		}
		names := map[string]bool{}
		for _, l := range metricLabel.FindAllStringSubmatch(s[2], -1) {
			if names[l[1]] {
				t.Errorf("a label comes twice: %s", line)
			}
			names[l[1]] = true
		}
		if _, ok := all[at][s[2]]; ok {
			t.Errorf("a series comes twice: %s", line)
		}
		v, err := strconv.ParseFloat(s[3], 64)
		if err != nil {
			t.Error(err)
		}
		all[at][s[2]] = v
	}
	return all
}
