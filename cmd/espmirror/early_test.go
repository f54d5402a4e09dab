package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
	"unicode/utf8"

	"espmirror/blockdev"
	"espmirror/fixtures"
	"espmirror/replicate"
)

// workerEnv tells the process that does the work of `early` what to do wrong.
const workerEnv = "ESPMIRROR_TEST_WORKER"

// earlyWorker is that process.
func earlyWorker() {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP)
	context.AfterFunc(ctx, stop)
	a := newApp(os.Stdin, os.Stdout, os.Stderr)
	do := os.Getenv(workerEnv)
	began := func() {
		if err := os.WriteFile("began", []byte(fmt.Sprint(os.Getpid())), 0o644); err != nil {
			panic(err)
		}
	}
	a.engine.sync = func(ctx context.Context, jobs []replicate.Job) ([][]replicate.Result, error) {
		switch do {
		case "hang": // as on a disk that does not answer: no context ends it
			began()
			select {}
		case "slow": // between two steps
			began()
			<-ctx.Done()
			return nil, ctx.Err()
		case "slow, twice told":
			began()
			<-ctx.Done()
			time.Sleep(300 * time.Millisecond)
			return nil, ctx.Err()
		case "panic":
			go func() { panic("index out of range, say") }()
			select {}
		}
		return replicate.SyncAll(ctx, jobs)
	}
	switch do {
	case "mute":
		os.Exit(0)
	case "babble":
		fmt.Println("{not JSON")
		os.Exit(0)
	case "killed":
		_ = syscall.Kill(os.Getpid(), syscall.SIGKILL)
	}
	os.Exit(a.run(ctx, os.Args))
}

// lastLine is the last line of a run of `early`, less its times, which come back in seconds.
func (r *result) lastLine() (text string, took, waited float64) {
	r.t.Helper()
	lines := strings.Split(strings.TrimSuffix(r.stderr, "\n"), "\n")
	last := lines[len(lines)-1]
	m := regexp.MustCompile(`^espmirror: (?:warning: )?early: (.*); (\d+\.\d{3}) s, (\d+\.\d{3}) s of it waiting$`).FindStringSubmatch(last)
	if m == nil {
		r.t.Fatalf("the last line is %q in\n%s", last, r.stderr)
	}
	fmt.Sscan(m[2], &took)
	fmt.Sscan(m[3], &waited)
	return m[1], took, waited
}

// last checks the last line.
func (r *result) last(want string) *result {
	r.t.Helper()
	if got, _, _ := r.lastLine(); got != want {
		r.t.Errorf("espmirror %s: the last line is\n%s, want\n%s\n%s", strings.Join(r.args, " "), got, want, r.stderr)
	}
	return r
}

// lines checks how many lines there are.
func (r *result) lines(n int) *result {
	r.t.Helper()
	if got := strings.Count(r.stderr, "\n"); got != n || r.stdout != "" {
		r.t.Errorf("espmirror %s: %d lines, want %d\n%s%s", strings.Join(r.args, " "), got, n, r.stderr, r.stdout)
	}
	return r
}

func (r *rig) cmdline(text string) { r.t.Helper(); r.file("proc/cmdline", text) }

// earlyRig is a machine with a replica set of some disks, on which sda1 was booted.
func earlyRig(t *testing.T, disks int) *rig {
	r := newRig(t)
	// The worker has its system from an option.
	root, err := filepath.Abs("machine")
	if err != nil {
		t.Fatal(err)
	}
	r.cmdline("BOOT_IMAGE=/vmlinuz root=/dev/sda2 ro quiet\n")
	if disks > 0 {
		r.set(disks)
	}
	r.app.system = blockdev.System{Root: root}
	return r
}

func (r *rig) dev(name string) string { return r.app.system.Path("/dev/" + name) }

const allInSync = "recovered 0, synced 0, in sync %d, missing 0, refused 0, failed 0"

func TestEarly(t *testing.T) {
	r := earlyRig(t, 3)
	// Nothing to do: nothing is written, and one line says so, which -q leaves out.
	r.run("early").want(0).lines(1).last(fmt.Sprintf(allInSync, 2))
	if res := r.run("early", "-q").want(0); res.stdout+res.stderr != "" {
		t.Errorf("-q: %q %q", res.stdout, res.stderr)
	}
	doc := r.run("early", "--json=pretty").want(0).json("early")
	if doc["mode"] != "sync" || len(doc["volumes"].([]any)) != 3 {
		t.Errorf("%v", doc)
	}

	// It leaves word for the service that would do the same again.
	word := r.app.system.Path("/run/espmirror/early")
	if err := os.Remove(word); err != nil {
		t.Error(err)
	}

	// But not where it could not see what was booted, as in an initramfs without the driver: the service may see it.
	vars := r.app.system.Path("/sys/firmware/efi/efivars")
	if err := errors.Join(os.Rename(vars, vars+".away"), os.Mkdir(vars, 0o755)); err != nil {
		t.Fatal(err)
	}
	r.run("early").want(0).has("the EFI variables cannot be seen")
	if _, err := os.Stat(word); err == nil {
		t.Error("a run that looked at nothing leaves word that nothing is left to do")
	}
	if err := errors.Join(os.Remove(vars), os.Rename(vars+".away", vars)); err != nil {
		t.Fatal(err)
	}

	// A change on what was booted, and a run that was cut.
	r.copyIn("sda1", "loader/loader.conf", "timeout 7\n")
	r.interrupt("--target", r.node("sdb1"))
	res := r.do("early", "--json=short").want(0)
	res.last("recovered 1, synced 2, in sync 0, missing 0, refused 0, failed 0")
	doc = res.json("early")
	second := doc["volumes"].([]any)[1].(map[string]any)
	if second["outcome"] != "synced" || second["recovered"].(map[string]any)["changed"] != true || second["partition_guid"] != guidOf(2) {
		t.Errorf("%v", second)
	}
	r.run("verify").want(0)
	r.run("early").want(0).last(fmt.Sprintf(allInSync, 2))

	// Recovery alone: the change stays where it is.
	r.copyIn("sda1", "loader/loader.conf", "timeout 8\n")
	r.interrupt("--target", r.node("sdb1"))
	r.do("early", "--recover-only").want(0).last("recovered 1, missing 0, refused 0, failed 0")
	r.run("recover", "-n", r.node("sdb1")).want(0)
	r.run("cat", r.node("sdc1"), "loader/loader.conf").want(0).has("timeout 7")
	r.run("early", "--recover-only").want(0).last("recovered 0, missing 0, refused 0, failed 0")

	// What was booted was a target of the run that was cut.
	r.interrupt("--target", r.node("sdb1"))
	r.boot(guidOf(2))
	r.do("early", "--recover-only").want(0).last("recovered 1, missing 0, refused 0, failed 0")
	r.run("recover", "-n", r.node("sdb1")).want(0)

	// No file is read where directories and chains are those of the last run: what somebody changed below them is for verify.
	r.boot(guidOf(1))
	r.do("sync").want(0)
	patch(t, "machine/dev/sdb1", "machine/dev/sdb1", func(d []byte) {
		at := bytes.Index(d, []byte("title Debian\n"))
		if at < 0 {
			t.Fatal("no loader entry")
		}
		d[at] = 'T'
	})
	r.run("sync", "-n").want(exitRefused)
	r.run("early").want(0).last(fmt.Sprintf(allInSync, 2))

	r.run("early", "x").want(exitUsage)
	for _, args := range []string{"--timeout=soon", "--limit=soon", "--limit=0", "--primary=" + r.dev("sda1")} {
		r.run("early", args).want(exitUsage)
	}
}

// TestEarlyNothing: machines that are none of our business hear no warning, and do not wait.
func TestEarlyNothing(t *testing.T) {
	r := earlyRig(t, 0)
	r.disk("sda", esp(1, bootTree))
	nothing := func(want string) {
		t.Helper()
		start := time.Now()
		res := r.run("early", "--timeout=20s").want(0).lines(1)
		if text, _, waited := res.lastLine(); !strings.HasPrefix(text, "nothing to do: ") || !strings.Contains(text, want) || waited != 0 {
			t.Errorf("%q, want %q", text, want)
		}
		if strings.Contains(res.stderr, "warning") || time.Since(start) > 10*time.Second {
			t.Errorf("%s after %v", res.stderr, time.Since(start))
		}
	}
	nothing("not started through EFI")
	r.file("sys/firmware/efi/runtime", "")
	nothing("efivar")
	r.boot(guidOf(1))
	nothing("has no loader/esp-sync")
	r.copyIn("sda1", "loader/esp-sync", "member "+guidOf(1)+"\n")
	nothing("has no other member")
	data := esp(2, bootTree)
	data.Type = "0fc63daf-8483-4772-8e79-3d69d8477de4"
	r.disk("sdb", data)
	r.boot(guidOf(2))
	nothing("is not an EFI system partition")
	r.boot(guidOf(1))
	clearBytes(t, "machine/dev/sda1", 0, 512)
	nothing("FAT")
}

func clearBytes(t *testing.T, name string, off, n int64) {
	t.Helper()
	f, err := os.OpenFile(name, os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := f.WriteAt(make([]byte, n), off); err != nil {
		t.Fatal(err)
	}
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
}

// TestEarlyOff: no device is opened.
func TestEarlyOff(t *testing.T) {
	r := earlyRig(t, 2)
	opened := fixtures.Opens(t, "machine/dev")
	run := func() *result {
		r.out.Reset()
		r.err.Reset()
		code := r.app.run(r.ctx, []string{"espmirror", "early"}) // the bench would read them
		return &result{t, []string{"early"}, r.out.String(), r.err.String(), code}
	}
	opened()
	run().want(0)
	if names := opened(); !slices.Contains(names, "sda1") || !slices.Contains(names, "sdb1") {
		t.Fatalf("a run opened %q", names)
	}
	for _, no := range []string{"no", "off", "0"} {
		r.cmdline("quiet espmirror=" + no + " ro\n")
		run().want(0).lines(1).last("nothing to do: the kernel command line says espmirror=no")
		if names := opened(); len(names) > 0 {
			t.Errorf("espmirror=%s opened %q", no, names)
		}
	}
}

func TestEarlyMissing(t *testing.T) {
	r := earlyRig(t, 3)
	r.pull("sdc")
	missing := "recovered 0, synced 0, in sync 1, missing 1 (PARTUUID=" + guidOf(3) + "), refused 0, failed 0"
	waits := func(least, most float64, args ...string) *result {
		t.Helper()
		start := time.Now()
		res := r.run(append([]string{"early"}, args...)...).want(exitPartial)
		all := time.Since(start).Seconds()
		_, took, waited := res.lastLine()
		if waited < least || waited > most || took < waited || all < took {
			t.Errorf("%q: %v s, of them %v s waiting, and %v s outside", args, took, waited, all)
		}
		return res
	}
	waits(0.3, 1.8, "--timeout=300ms").last(missing).has("espmirror: waiting for PARTUUID="+guidOf(3), "warning: cannot sync PARTUUID="+guidOf(3), "; connect its disk")
	waits(0, 0, "--timeout=0").last(missing)
	waits(2, 4) // nobody says how long
	// The command line counts before the option, this before the set.
	r.cmdline(`"espmirror.timeout=0.4 s"` + "\n")
	waits(0.4, 1.9, "--timeout=5min")
	r.cmdline("\n")
	r.copyIn("sda1", "loader/esp-sync", r.setFile("sda1")+"timeout 600ms\n")
	r.do("sync", "--timeout=0").want(exitPartial)
	waits(0.6, 1.9)
	waits(0.1, 0.59, "--timeout=100ms")

	// One that comes while others are waited for. What is there has been recovered by then, and is synced in the end.
	r.copyIn("sda1", "loader/loader.conf", "timeout 9\n")
	time.AfterFunc(1500*time.Millisecond, func() { r.plug("sdc") })
	res := r.do("early", "--timeout=1min").want(0).last("recovered 0, synced 2, in sync 0, missing 0, refused 0, failed 0")
	if _, _, waited := res.lastLine(); waited < 0.05 || waited > 20 {
		t.Errorf("waited %v s", waited)
	}
	r.run("verify").want(0)

	// What was booted changes in that time: what it has at the end is what counts.
	r.pull("sdc")
	if err := os.WriteFile("changed", []byte("timeout 1111\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	changed := make(chan string, 1)
	time.AfterFunc(700*time.Millisecond, func() {
		out, err := exec.Command("mcopy", "-Q", "-o", "-i", "machine/dev/sda1", "changed", "::loader/loader.conf").CombinedOutput()
		changed <- fmt.Sprintf("%s%v", out, err)
		r.plug("sdc")
	})
	r.do("early", "--timeout=1min").want(0).last("recovered 0, synced 2, in sync 0, missing 0, refused 0, failed 0")
	if got := <-changed; got != "<nil>" {
		t.Error(got)
	}
	r.run("verify").want(0)

	// What was booted is late, and a member never comes: one budget for both.
	r.pull("sda")
	r.pull("sdb")
	time.AfterFunc(time.Second, func() { r.plug("sda") })
	res = r.run("early", "--timeout=1500ms").want(exitPartial).
		last("recovered 0, synced 0, in sync 1, missing 1 (PARTUUID=" + guidOf(2) + "), refused 0, failed 0")
	if _, _, waited := res.lastLine(); waited < 1.5 || waited > 2.4 {
		t.Errorf("waited %v s", waited)
	}
	// It never comes.
	r.pull("sda")
	start := time.Now()
	r.run("early", "--timeout=200ms").want(exitPartial).has("cannot use what was booted, PARTUUID="+guidOf(1), "is the driver of its disk in the initramfs?")
	if time.Since(start) < 200*time.Millisecond {
		t.Error("it was not waited for")
	}
	if _, err := os.Stat(r.app.system.Path("/run/espmirror/early")); err == nil {
		t.Error("a run that did not find all leaves word that nothing is left to do")
	}
}

// TestEarlyStale: a disk was booted on purpose that is not up to date. Nothing is written to any, and nothing else is taken
// for the source.
func TestEarlyStale(t *testing.T) {
	r := earlyRig(t, 3)
	r.copyIn("sdb1", "loader/loader.conf", "timeout 4\n")
	r.boot(guidOf(2))
	r.do("sync").want(0)
	r.pull("sda")
	r.copyIn("sdb1", "loader/loader.conf", "timeout 55\n") // another size: FAT has seconds in twos
	r.do("early", "--timeout=0").want(exitPartial)
	r.plug("sda")
	r.boot(guidOf(1))
	// The bench sees to it that no byte changes.
	res := r.run("early").want(exitRefused)
	res.last(fmt.Sprintf("recovered 0, synced 0, in sync 0, missing 0, refused 2 (%s, %s), failed 0", r.dev("sdb1"), r.dev("sdc1"))).
		has("the source is older than the target", "replicate the other way: `espmirror sync --primary "+r.dev("sdb1"))
	if doc := r.run("early", "--json=short").want(exitRefused).json("early"); doc["volumes"].([]any)[1].(map[string]any)["lineage"].(map[string]any)["verdict"] != "stale source" {
		t.Errorf("%v", doc)
	}
	r.follow(res, 0).want(0)
}

// TestEarlyUnusable: what keeps the run from everything or from one member is told once.
func TestEarlyUnusable(t *testing.T) {
	r := earlyRig(t, 3)
	good := r.setFile("sda1")
	r.copyIn("sda1", "loader/esp-sync", good+"exlude x\n")
	res := r.run("early").want(exitRefused).has("loader/esp-sync", "line 5")
	if strings.Count(res.stderr, "line 5") != 1 {
		t.Error(res.stderr)
	}
	r.run("early", "--json=short").want(exitRefused).json("early")
	r.copyIn("sda1", "loader/esp-sync", "member "+guidOf(2)+"\n")
	r.run("early").want(exitRefused).has("is not in its own replica set")
	r.copyIn("sda1", "loader/esp-sync", good)
	clearBytes(t, "machine/dev/sdb1", 0, 512)
	r.copyIn("sda1", "loader/loader.conf", "timeout 6\n")
	r.do("early").want(exitPartial).last("recovered 0, synced 1, in sync 0, missing 0, refused 0, failed 1 (" + r.dev("sdb1") + ")")
	r.run("cat", r.node("sdc1"), "loader/loader.conf").want(0).has("timeout 6")
}

// TestEarlyHeld: what was booted has something to recover, and somebody holds it. It is no source then; the others are
// recovered all the same.
func TestEarlyHeld(t *testing.T) {
	r := earlyRig(t, 3)
	r.copyIn("sda1", "loader/loader.conf", "timeout 66\n")
	r.interrupt("--target", r.node("sdb1"))
	r.interrupt("--target", r.node("sdc1"))
	for name, text := range map[string]string{"dev": "7:0", "size": "4096", "uevent": "", "loop/backing_file": r.dev("sdb1"), "loop/offset": "0", "loop/sizelimit": "0"} {
		r.file("sys/block/loop0/"+name, text+"\n")
	}
	if err := os.Symlink("../../block/loop0", "machine/sys/class/block/loop0"); err != nil {
		t.Fatal(err)
	}
	r.boot(guidOf(2))
	before := hashes(t)
	// One line for what is wrong, one for what was recovered, and the last one.
	r.do("early", "--timeout=0").want(exitPartial).has("attached to loop0").
		last("recovered 1, synced 0, in sync 0, missing 0, refused 1 (" + r.dev("sdb1") + "), failed 0")
	after := hashes(t)
	for _, name := range []string{"machine/dev/sda1", "machine/dev/sdb1"} {
		if before[name] != after[name] {
			t.Errorf("%s was written to", name)
		}
	}
	r.run("recover", "-n", r.node("sdc1")).want(0)
	r.run("cat", r.node("sdc1"), "loader/loader.conf").want(0).has("timeout 3")
}

func (r *rig) worker(do string) { r.t.Helper(); r.t.Setenv(workerEnv, do) }

// TestEarlyLimit: the run is over when the time is, whatever the process does that works.
func TestEarlyLimit(t *testing.T) {
	r := earlyRig(t, 2)
	r.app.worker.grace = time.Second
	r.copyIn("sda1", "loader/loader.conf", "timeout 77\n")
	const limit = 1200 * time.Millisecond
	// The worker starts on two busy processors, and is to have come to its sync.
	run := func(least, most time.Duration, args ...string) *result {
		t.Helper()
		_ = os.Remove("began")
		start := time.Now()
		res := r.run(append([]string{"early", "--limit=1200ms"}, args...)...)
		if took := time.Since(start); took < least || took > most {
			t.Errorf("%q took %v, want %v to %v\n%s", args, took, least, most, res.stderr)
		}
		if _, err := os.Stat("began"); err != nil {
			t.Fatalf("the worker had not begun when it was stopped: %s", res.stderr)
		}
		return res
	}
	pid := func() int {
		text, err := os.ReadFile("began")
		if err != nil {
			t.Fatal(err)
		}
		var n int
		fmt.Sscan(string(text), &n)
		return n
	}
	gone := func() bool { return syscall.Kill(pid(), 0) != nil }

	// One that hears is stopped between two steps, and has its report.
	r.worker("slow")
	res := run(limit, limit+4*time.Second).want(exitPartial).has("warning: the time limit of 1.2s is over: ", "espmirror.limit=1min")
	if text, _, _ := res.lastLine(); !strings.HasPrefix(text, "stopped; recovered 0, ") {
		t.Error(text)
	}
	// The command line counts before the option.
	r.cmdline("espmirror.limit=1700ms")
	run(1700*time.Millisecond, 5500*time.Millisecond, "--verbose").want(exitPartial).has("the time limit of 1.7s is over")
	r.cmdline("")

	// One that does not is killed after the time of grace.
	r.worker("hang")
	run(limit+time.Second, limit+4*time.Second).want(exitPartial).has("the time limit of 1.2s is over: ").last("stopped")
	for range 100 {
		if gone() {
			break
		}
		time.Sleep(20 * time.Millisecond)
	}
	if !gone() {
		t.Error("the worker is still there")
	}
	doc := r.run("early", "--limit=1200ms", "--json=short").want(exitPartial).json("early")
	if doc["stopped"] == nil || doc["error"].(map[string]any)["exit"] != 3.0 {
		t.Errorf("%v", doc)
	}

	// One that cannot be killed, as the kernel has it while a disk does not answer, is left behind.
	var signals []os.Signal
	r.app.worker.signal = func(p *os.Process, s os.Signal) error { signals = append(signals, s); return nil }
	run(limit+time.Second, limit+4*time.Second).want(exitPartial).has("the time limit of 1.2s is over, and a disk does not answer: ")
	if !slices.Equal(signals, []os.Signal{syscall.SIGTERM, syscall.SIGKILL}) {
		t.Errorf("the worker got %v", signals)
	}
	if gone() {
		t.Error("the worker was to be there still")
	} else if err := syscall.Kill(pid(), syscall.SIGKILL); err != nil {
		t.Error(err)
	}
}

// TestEarlyNoAnswer has a real one: the process that writes to a frozen filesystem sleeps until that is thawed, whatever
// signals it gets. Whoever reads what the run prints is not kept waiting either.
func TestEarlyNoAnswer(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("a frozen file system needs root, for mount")
	}
	for _, name := range []string{"mkfs.ext4", "mount", "umount", "fsfreeze"} {
		if _, err := exec.LookPath(name); err != nil {
			t.Skip(name, "is not installed")
		}
	}
	r := earlyRig(t, 2)
	if err := errors.Join(os.Mkdir("disk", 0o755), os.WriteFile("fs", nil, 0o644), os.Truncate("fs", 16<<20)); err != nil {
		t.Fatal(err)
	}
	tool(t, "mkfs.ext4", "-q", "fs")
	if out, err := exec.Command("mount", "-o", "loop", "fs", "disk").CombinedOutput(); err != nil {
		t.Skipf("no file system can be mounted here: %s", out)
	}
	disk, err := filepath.Abs("disk")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		for range 100 { // it is in use as long as the process that was left behind
			if exec.Command("umount", disk).Run() == nil {
				return
			}
			time.Sleep(50 * time.Millisecond)
		}
		t.Errorf("cannot unmount %s", disk)
	})
	tool(t, "cp", "machine/dev/sdb1", "disk/sdb1")
	if err := errors.Join(os.Remove("machine/dev/sdb1"), os.Symlink(disk+"/sdb1", "machine/dev/sdb1")); err != nil {
		t.Fatal(err)
	}
	r.run("early").want(0).last(fmt.Sprintf(allInSync, 1))
	r.copyIn("sda1", "loader/loader.conf", "timeout 66\n")

	tool(t, "fsfreeze", "--freeze", "disk")
	thaw := sync.OnceFunc(func() { tool(t, "fsfreeze", "--unfreeze", disk) })
	t.Cleanup(thaw)
	const limit = time.Second
	start := time.Now()
	// The app is in a process of its own as well: what the worker holds of it must not be waited for.
	cmd := exec.Command(os.Args[0], "early", "--limit=1s", "--system-root="+r.app.system.Root)
	out, err := cmd.CombinedOutput()
	took := time.Since(start)
	thaw()
	if cmd.ProcessState == nil || cmd.ProcessState.ExitCode() != exitPartial || !strings.Contains(string(out), "the time limit of 1s is over, and a disk does not answer") {
		t.Errorf("%v: %s", err, out)
	}
	if least := limit + workerGrace; took < least || took > least+2*time.Second {
		t.Errorf("it took %v", took)
	}
	r.writes = true
	for range 100 {
		if r.run("early").code == 0 {
			break
		}
		time.Sleep(50 * time.Millisecond)
	}
	r.run("verify").want(0)
}

// TestEarlySignal: a signal is passed on, and the run comes back soon.
func TestEarlySignal(t *testing.T) {
	r := earlyRig(t, 2)
	r.copyIn("sda1", "loader/loader.conf", "timeout 77\n")
	for _, do := range []string{"slow", "slow, twice told", "hang"} {
		_ = os.Remove("began")
		r.worker(do)
		r.app.worker.grace = 1500 * time.Millisecond
		ctx, cancel := context.WithCancel(context.Background())
		r.ctx = ctx
		asked := make(chan time.Time, 1)
		go func() {
			for {
				if pid, err := os.ReadFile("began"); err == nil && len(pid) > 0 {
					asked <- time.Now()
					cancel()
					if do == "slow, twice told" { // as systemd does, which tells each process of a unit
						var n int
						fmt.Sscan(string(pid), &n)
						time.Sleep(100 * time.Millisecond)
						_ = syscall.Kill(n, syscall.SIGTERM)
					}
					return
				}
				time.Sleep(5 * time.Millisecond)
			}
		}()
		res := r.run("early", "--json=short").want(exitInterrupt)
		res.json("early")
		took := time.Since(<-asked)
		if do == "hang" && took < r.app.worker.grace || took > 10*time.Second {
			t.Errorf("%s: it took %v", do, took)
		}
		// Whether the worker ended by itself shows in what it had to say of the primary.
		if got := strings.Contains(res.stdout, `"role":"primary"`); got != (do != "hang") {
			t.Errorf("%s: %s", do, res.stdout)
		}
	}
}

// TestEarlyOrphan: who kills the process on which the boot waits means the other one too.
func TestEarlyOrphan(t *testing.T) {
	r := earlyRig(t, 2)
	r.copyIn("sda1", "loader/loader.conf", "timeout 77\n")
	r.worker("slow")
	cmd := exec.Command(os.Args[0], "early", "--system-root="+r.app.system.Root)
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	pid := 0
	for range 1000 {
		if text, err := os.ReadFile("began"); err == nil && len(text) > 0 {
			fmt.Sscan(string(text), &pid)
			break
		}
		time.Sleep(10 * time.Millisecond)
	}
	if pid == 0 || syscall.Kill(pid, 0) != nil {
		t.Fatal("there is no worker", pid)
	}
	if err := cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	_ = cmd.Wait()
	for range 1000 {
		// Nobody may be there to reap it.
		if stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid)); err != nil || strings.Contains(string(stat), ") Z ") {
			return
		}
		time.Sleep(10 * time.Millisecond)
	}
	t.Error("the worker goes on")
	_ = syscall.Kill(pid, syscall.SIGKILL)
}

// TestEarlyCrash: whatever becomes of the worker is one warning, and one line about the run.
func TestEarlyCrash(t *testing.T) {
	r := earlyRig(t, 2)
	for do, want := range map[string]string{
		"panic":  "exit status 2: panic: index out of range, say",
		"mute":   "it left no report",
		"babble": "it left no report",
		"killed": "signal: killed",
	} {
		r.worker(do)
		r.run("early").want(exitFailed).lines(2).has("espmirror: warning: internal error: the process that does the work ended: " + want + "\n").
			last("stopped")
		r.run("early", "--json=short").want(exitFailed).json("early")
	}
	r.worker("panic")
	r.run("early", "-v").want(exitFailed).has("goroutine ")
}

// TestEarlyUnsupervised: without a program to start, the work is done all the same, and ends between two steps.
func TestEarlyUnsupervised(t *testing.T) {
	r := earlyRig(t, 2)
	for _, program := range []string{"", "/nowhere/proc/self/exe"} {
		r.app.worker.program = program
		r.run("early").want(0).last(fmt.Sprintf(allInSync, 1))
	}
	r.app.engine.sync = func(ctx context.Context, _ []replicate.Job) ([][]replicate.Result, error) {
		<-ctx.Done()
		return nil, ctx.Err()
	}
	r.run("early", "--limit=100ms").want(exitPartial).has("the time limit of 100ms is over")
	ctx, cancel := context.WithCancel(r.ctx)
	r.ctx = ctx
	time.AfterFunc(100*time.Millisecond, cancel)
	r.run("early").want(exitInterrupt)
}

// TestEarlyKmsg: each line is one record of the kernel's log, with its priority.
func TestEarlyKmsg(t *testing.T) {
	r := earlyRig(t, 2)
	r.run("early", "--kmsg").want(0).has("espmirror: early: recovered 0") // there is none: standard error has it
	lines := func(args ...string) []string {
		t.Helper()
		r.file("dev/kmsg", "")
		r.writes = true
		if res := r.run(append([]string{"early", "--kmsg"}, args...)...); res.stderr != "" || res.stdout != "" {
			t.Errorf("%q %q", res.stdout, res.stderr)
		}
		text, err := os.ReadFile("machine/dev/kmsg")
		if err != nil {
			t.Fatal(err)
		}
		return strings.Split(regexp.MustCompile(`; \d.*waiting`).ReplaceAllString(string(text), ""), "\n")
	}
	if got := lines(); len(got) != 2 || got[0] != "<6>espmirror: early: "+fmt.Sprintf(allInSync, 1) {
		t.Errorf("%q", got)
	}
	if got := lines("-q"); got[0] != "" {
		t.Errorf("%q", got)
	}
	r.copyIn("sda1", "loader/loader.conf", "timeout 77\n")
	if got := lines(); !slices.Contains(got, "<5>espmirror: early: recovered 0, synced 1, in sync 0, missing 0, refused 0, failed 0") {
		t.Errorf("%q", got)
	}
	r.pull("sdb")
	r.cmdline("espmirror=\x1b[2Jmaybe espmirror.timeout=" + strings.Repeat("\xff", 2000))
	got := strings.Join(lines("--timeout=0"), "\n")
	for _, want := range []string{`<4>espmirror: warning: "espmirror=\x1b[2Jmaybe" on the kernel`, "<4>espmirror: warning: cannot sync PARTUUID=" + guidOf(2),
		"<4>espmirror: warning: early: recovered 0, synced 0, in sync 0, missing 1 (PARTUUID=" + guidOf(2) + "), refused 0, failed 0"} {
		if !strings.Contains(got, want) {
			t.Errorf("no %q in %q", want, got)
		}
	}
	if strings.Contains(got, "\x1b") || !utf8.ValidString(got) {
		t.Errorf("%q", got)
	}
	for _, n := range []int{maxKmsg/2 - 5, maxKmsg / 2, 5000} {
		if line := kmsgLine(slog.LevelWarn, "espmirror: "+strings.Repeat("ü", n)); len(line) > maxKmsg || !utf8.ValidString(line) || !strings.HasSuffix(line, "…\n") || len(line) < maxKmsg-5 {
			t.Errorf("%d bytes: %q", len(line), line[len(line)-8:])
		}
	}
}

func TestBootOptions(t *testing.T) {
	long := strings.Repeat("x", maxCommandLine)
	for _, tc := range []struct {
		text    string
		mode    earlyMode
		timeout string
		limit   time.Duration
		bad     int
	}{
		{"", "", "", 0, 0},
		{"root=/dev/sda2 ro quiet\n", "", "", 0, 0},
		{"espmirror", earlySync, "", 0, 0},
		{"espmirror=yes", earlySync, "", 0, 0},
		{"espmirror=sync", earlySync, "", 0, 0},
		{"espmirror=recover", earlyRecover, "", 0, 0},
		{"espmirror=no", earlyOff, "", 0, 0},
		{"espmirror=no espmirror=yes", earlySync, "", 0, 0}, // the last one
		{"espmirror=no\x00espmirror=recover\x00", earlyRecover, "", 0, 0},
		{"espmirror=NO", "", "", 0, 1},
		{"espmirror=", "", "", 0, 1},
		{"xespmirror=no", "", "", 0, 0},
		{"espmirror.timeout=5", "", "5s", 0, 0},
		{"espmirror.timeout=0", "", "0s", 0, 0},
		{`"espmirror.timeout=3 s" espmirror.limit=1min`, "", "3s", time.Minute, 0},
		{`espmirror.timeout="3 s" espmirror=no`, earlyOff, "3s", 0, 0},
		{`espmirror.timeout="3 s espmirror=no`, "", "", 0, 1}, // not closed: all of it is the value
		{`"espmirror=no`, earlyOff, "", 0, 0},
		{`"espmirror"`, earlySync, "", 0, 0},
		{`foo="bar espmirror=no" ro`, "", "", 0, 0},
		{"espmirror.timeout", "", "", 0, 1},
		{"espmirror.timeout=", "", "", 0, 1},
		{"espmirror.timeout=-1", "", "", 0, 1},
		{"espmirror.timeout=bogus espmirror.timeout=4s", "", "4s", 0, 1},
		{"espmirror.limit=0", "", "", 0, 1},
		{"espmirror.limit=99999999999h", "", "", 0, 1},
		{"espmirror.limits=5s", "", "", 0, 1},
		{"espmirror=no -- espmirror=yes", earlyOff, "", 0, 0}, // for init
		{"=espmirror=no", "", "", 0, 0},
		{"\t espmirror=no\v", earlyOff, "", 0, 0},
		{`" " "" = "=" -- x`, "", "", 0, 0},
		{"espmirror=no " + long, earlyOff, "", 0, 1}, // cut
		{long + " espmirror=no", "", "", 0, 1},
		{long[:maxCommandLine-12] + " espmirror=noo", "", "", 0, 1}, // what is left of the last one says something else
	} {
		root := t.TempDir()
		if err := os.Mkdir(filepath.Join(root, "proc"), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(root, "proc/cmdline"), []byte(tc.text), 0o644); err != nil {
			t.Fatal(err)
		}
		o, problems := readBootOptions(blockdev.System{Root: root})
		timeout := ""
		if o.timeout != nil {
			timeout = o.timeout.String()
		}
		if o.mode != tc.mode || timeout != tc.timeout || o.limit != tc.limit || len(problems) != tc.bad {
			t.Errorf("%q: %q %q %v %q", clip(tc.text, 100), o.mode, timeout, o.limit, problems)
		}
		for _, p := range problems {
			if len(p) > 500 {
				t.Errorf("%d bytes", len(p))
			}
		}
	}
	if _, problems := readBootOptions(blockdev.System{Root: t.TempDir()}); len(problems) != 1 || !strings.Contains(problems[0], "no such file") {
		t.Errorf("%q", problems)
	}
}

// FuzzBootParams: no command line is too strange, and nothing of it gets lost.
func FuzzBootParams(f *testing.F) {
	f.Add(`a "b=c d" e="f g" -- h`)
	f.Add("\"")
	f.Fuzz(func(t *testing.T, text string) {
		_, problems := parseBootOptions(text)
		for _, p := range problems {
			if len(p) > 1000 {
				t.Errorf("%d bytes", len(p))
			}
		}
		if plain := strings.Map(func(r rune) rune {
			if r == '"' || r == '=' || r == 0 || r > 0x7e {
				return 'x'
			}
			return r
		}, text); !strings.Contains(" "+plain+" ", " -- ") && !strings.ContainsAny(plain, "\t\n\v\f\r-") {
			if got, want := len(bootParams(plain)), len(strings.Fields(plain)); got != want {
				t.Errorf("%d parameters of %q, want %d", got, plain, want)
			}
		}
	})
}
