package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"espmirror/blockdev"
	"espmirror/fatdriver"
	"espmirror/fixtures"
	"espmirror/replicate"
)

// TestSync goes through a life: plan, run, nothing to do, a change, verify, status.
func TestSync(t *testing.T) {
	b := newBench(t)
	volumes(t)
	third := secondVolume
	third.FAT, third.Size, third.Serial, third.Label = 32, 40<<20, 0x3333CCCC, "THIRD"
	makeFixture(t, third, "c.img")
	set := []string{"--primary", "a.img", "--target", "b.img", "--target", "c.img"}
	cmd := func(words ...string) []string { return append(words, set...) }

	b.run(cmd("verify")...).want(exitDiffers).golden("verify-differs")
	b.run(cmd("verify", "--json=pretty")...).want(exitDiffers).json("run")
	b.run(cmd("status")...).want(exitDiffers).golden("status-drifted")
	b.run(cmd("sync", "--dry-run")...).want(exitDiffers).golden("sync-plan")
	doc := b.run(cmd("sync", "-n", "--json=pretty")...).want(exitDiffers).json("run")
	plan := doc["targets"].([]any)[0].(map[string]any)["summary"].(map[string]any)

	b.writes = true
	doc = b.run(cmd("sync", "--json=short")...).want(0).json("run")
	done := doc["targets"].([]any)[0].(map[string]any)["summary"].(map[string]any)
	for k := range plan {
		if fmt.Sprint(plan[k]) != fmt.Sprint(done[k]) {
			t.Errorf("%s: planned %v, done %v", k, plan[k], done[k])
		}
	}
	b.writes = false
	b.run(cmd("sync")...).want(0).golden("sync-in-sync")
	b.run(cmd("sync", "-n")...).want(0).golden("sync-plan-in-sync")
	b.run(cmd("sync", "--json=short")...).want(0).json("run")
	b.run(cmd("verify")...).want(0).golden("verify")
	b.run(cmd("status")...).want(0).golden("status")
	b.run(cmd("status", "--json=pretty")...).want(0).json("status")
	b.run(cmd("verify", "-q")...).want(0).silent()
	b.run(cmd("sync", "-q")...).want(0).silent()
	b.run("recover", "b.img", "c.img").want(0).golden("recover-nothing")
	b.run("check", "b.img", "c.img").want(0)
	for name, content := range bootTree {
		if r := b.run("cat", "c.img", name).want(0); r.stdout != string(content.Head) {
			t.Errorf("%s is %q", name, r.stdout)
		}
	}
	b.run("cat", "b.img", "EFI/Microsoft/Boot/bootmgfw.efi").want(0)

	tool(t, "mdel", "-i", "a.img", "::EFI/systemd/systemd-bootx64.efi")
	tool(t, "mren", "-i", "a.img", "::EFI/Linux/Ünïcode name of a kernel.efi", "::EFI/Linux/new name.efi")
	b.run(cmd("sync", "--dry-run")...).want(exitDiffers).has("delete", "systemd-bootx64.efi", "new name.efi")
	b.writes = true
	b.run(cmd("sync", "-v")...).want(0).has("commit")
	b.writes = false
	b.run(cmd("verify")...).want(0)

	// A directory is a primary too, and the environment can name it.
	b.run("extract", "-q", "--to", "tree", "a.img").want(0).silent()
	t.Setenv("SYSTEMD_ESP_PATH", "tree")
	b.run("verify", "--target", "b.img").want(0)
	b.run("status", "--target", "b.img").want(0).has("primary  tree", "in sync")
	b.run("status").want(0).has("tree")
}

// silent checks that nothing was printed.
func (r *result) silent() *result {
	r.t.Helper()
	if r.stdout != "" || r.stderr != "" {
		r.t.Errorf("espmirror %s printed\n%s%s", strings.Join(r.args, " "), r.stdout, r.stderr)
	}
	return r
}

// TestSyncRefuses holds everything that sync must not do. The bench sees to it that no image changes.
func TestSyncRefuses(t *testing.T) {
	b := newBench(t)
	// Small ones: every command is run on all of them.
	primary, second := primaryVolume, secondVolume
	primary.FAT, primary.Size, second.FAT, second.Size = 12, 2<<20, 12, 2<<20
	makeFixture(t, primary, "a.img")
	makeFixture(t, second, "b.img")
	disk(t, "esp1.img", fixtures.TypeESP, guidOne, second)
	other := second
	other.Serial = 0x5555EEEE
	disk(t, "twin.img", fixtures.TypeESP, guidOne, other)
	disk(t, "data.img", fixtures.TypeLinux, guidTwo, other)
	makeFixture(t, fixtures.VolumeSpec{FAT: 12, Size: 1 << 20, Serial: 0x1111AAAA}, "serial.img")
	patch(t, "b.img", "bad.img", func(d []byte) {
		i := strings.Index(string(d), "EFI        ")
		d[i+26], d[i+27] = 0xf0, 0xff
	})
	patch(t, "b.img", "ntfs.img", func(d []byte) { copy(d[3:], "NTFS    ") })
	patch(t, "b.img", "exfat.img", func(d []byte) { copy(d[3:], "EXFAT   "); clear(d[11:64]) })
	// An md superblock of version 1.0, 8 KiB from the end of the partition, which begins at 1 MiB.
	disk(t, "whole.img", fixtures.TypeESP, guidTwo, other)
	patch(t, "whole.img", "md.img", func(d []byte) {
		copy(d[1<<20+int(other.Size)-8192:], "\xfc\x4e\x2b\xa9\x01\x00\x00\x00")
	})
	if err := os.Symlink("b.img", "link.img"); err != nil {
		t.Fatal(err)
	}
	if err := os.Mkdir("dir", 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile("text.img", []byte(strings.Repeat("text", 100000)), 0o644); err != nil {
		t.Fatal(err)
	}
	for _, tc := range []struct {
		args string
		code int
		want string
	}{
		{"--primary a.img --target a.img", exitRefused, "it is the primary"},
		{"--primary b.img --target link.img", exitRefused, "it is the primary"},
		{"--primary a.img --target b.img --target ./b.img", exitRefused, "it is named twice (b.img)"},
		{"--primary a.img --target b.img --target link.img", exitRefused, "it is named twice (b.img)"},
		{"--primary a.img --target dir", exitRefused, "it is a directory"},
		{"--primary a.img --target text.img", exitRefused, "neither FAT nor a partition table"},
		{"--primary a.img --target ntfs.img", exitRefused, "NTFS"},
		{"--primary a.img --target exfat.img", exitRefused, "exFAT"},
		{"--primary ntfs.img --target b.img", exitRefused, "cannot use primary ntfs.img"},
		{"--primary a.img --target bad.img", exitRefused, "damaged"},
		{"--primary a.img --target serial.img", exitRefused, "the same FAT serial number 1111-AAAA as a.img"},
		{"--primary a.img --target esp1.img --target twin.img", exitRefused, "the same partition GUID " + guidOne},
		{"--primary a.img --target data.img@@p1", exitRefused, "is not an EFI system partition"},
		{"--primary data.img@@p1 --target b.img", exitRefused, "is not an EFI system partition"},
		{"--primary a.img --target md.img@@p1", exitRefused, "member of an md array"},
		{"--primary a.img --target b.img --keep-free 1G", exitRefused, "not enough room"},
		{"--primary a.img --target b.img --select nothing", exitRefused, "the selection is empty"},
		{"--primary nothing.img --target b.img", exitFailed, "cannot use primary nothing.img"},
		{"--primary bad.img --target a.img", exitRefused, "damaged"},
		{"--primary a.img --target nothing.img", exitPartial, "nothing.img"},
		{"--primary a.img --target PARTUUID=" + guidTwo, exitPartial, "PARTUUID"},
	} {
		for _, cmd := range []string{"sync", "sync -n", "sync --json=short"} {
			r := b.run(append(strings.Fields(cmd), strings.Fields(tc.args)...)...).want(tc.code).has(tc.want)
			if !strings.HasPrefix(r.stderr, "espmirror: ") {
				t.Errorf("%s: stderr is %q", tc.args, r.stderr)
			}
			if cmd == "sync --json=short" {
				if doc := r.json("run"); doc["error"].(map[string]any)["exit"] != float64(tc.code) {
					t.Errorf("%s: %v", tc.args, doc)
				}
			}
		}
	}
	// The type tells that it is somebody else's.
	types := map[string]string{
		"A19D880F-05FC-4D3B-A006-743F0F84911E": "hint: this looks like the wrong partition: by its type it is for Linux RAID; ",
		"EBD0A0A2-B9E5-4433-87C0-68B6B72699C7": "it is for Microsoft basic data; ",
		"11111111-2222-4333-8444-555555555555": "hint: set its type, or",
	}
	for typ, want := range types {
		name := "typed-" + typ[:8] + ".img"
		disk(t, name, typ, guidTwo, other)
		b.run("sync", "-n", "--primary", "a.img", "--target", name+"@@p1").want(exitRefused).has("is not an EFI system partition", want)
	}
	// Who only compares is told, and not refused.
	b.run("verify", "--primary", "a.img", "--target", "serial.img").want(exitDiffers).has("warning: two volumes have the same FAT serial number")
	b.run("recover", "data.img@@p1", "md.img@@p1").want(exitRefused).has("is not an EFI system partition", "member of an md array")
	b.run("recover", "ntfs.img").want(exitFailed).has("NTFS")
	t.Setenv("SYSTEMD_RELAX_ESP_CHECKS", "1")
	b.run("sync", "-n", "--primary", "a.img", "--target", "data.img@@p1").want(exitDiffers)
}

// TestNoPlan has targets that no plan could be made for: no number is printed for them.
func TestNoPlan(t *testing.T) {
	b := newBench(t)
	volumes(t)
	full := fixtures.VolumeSpec{FAT: 12, Size: 64 << 10, Serial: 7, Label: "FULL", Tree: fixtures.TreeSpec{"big": {Size: 40 << 10}}}
	makeFixture(t, full, "full.img")
	args := []string{"--primary", "a.img", "--target", "full.img"}
	r := b.run(append([]string{"sync", "-n"}, args...)...).want(exitRefused).has("full.img: refused, 13 changes", "not enough room")
	for _, no := range []string{" now", "writes ", "clusters 0", "peak"} {
		if strings.Contains(r.stdout, no) {
			t.Errorf("%q in a plan that was not made:\n%s", no, r.stdout)
		}
	}
	summary := func(r *result) map[string]any {
		s, _ := r.json("run")["targets"].([]any)[0].(map[string]any)["summary"].(map[string]any)
		return s
	}
	if s := summary(b.run(append([]string{"sync", "-n", "--json=short"}, args...)...)); s == nil || len(s) != 1 {
		t.Errorf("got %v, want nothing but the changes", s)
	}
	if s := summary(b.run(append([]string{"verify", "--json=short"}, args...)...)); s == nil || len(s) != 1 {
		t.Errorf("got %v, want nothing but the differences", s)
	}
	b.app.engine.verify = func(context.Context, []replicate.Job) ([][]replicate.Result, error) {
		return [][]replicate.Result{{{Outcome: replicate.Failed, Err: errCut}}}, nil
	}
	if r := b.run(append([]string{"verify"}, args...)...).want(exitPartial); !strings.Contains(r.stdout, "failed            -\n") {
		t.Errorf("got\n%s", r.stdout)
	}
	if s := summary(b.run(append([]string{"verify", "--json=short"}, args...)...)); s != nil {
		t.Errorf("got %v", s)
	}
}

// TestSyncPartly has targets of all kinds at once: the good one is done, whatever becomes of the others.
func TestSyncPartly(t *testing.T) {
	b := newBench(t)
	volumes(t)
	patch(t, "b.img", "bad.img", func(d []byte) {
		i := strings.Index(string(d), "EFI        ")
		d[i+26], d[i+27] = 0xf0, 0xff
		d[39]++ // a serial number of its own
	})
	args := []string{"--primary", "a.img", "--target", "bad.img", "--target", "b.img", "--target", "gone.img"}
	b.run(append([]string{"status"}, args...)...).want(exitPartial).golden("status-partly")
	b.run(append([]string{"status", "--json=short"}, args...)...).want(exitPartial).json("status")
	b.writes = true
	b.run(append([]string{"sync", "-q"}, args...)...).want(exitPartial).has("cannot sync gone.img", "bad.img")
	b.writes = false
	b.run("verify", "--primary", "a.img", "--target", "b.img").want(0)
	b.run(append([]string{"sync", "--json=short"}, args...)...).want(exitPartial).json("run")
}

// cut is a device that stops working after some writes, as a power cut does.
type cut struct {
	blockdev.Device
	left *int
}

var errCut = errors.New("the plug was pulled")

func (c cut) WriteAt(p []byte, off int64) (int, error) {
	if *c.left--; *c.left < 0 {
		return 0, errCut
	}
	return c.Device.WriteAt(p, off)
}

// TestInterruptedRun pulls the plug at each write of a sync in turn: the exit statuses tell what to do, and recover does it.
func TestInterruptedRun(t *testing.T) {
	b := newBench(t)
	volumes(t)
	b.writes = true
	b.run("sync", "-q", "--primary", "a.img", "--target", "b.img").want(0)
	tool(t, "mcopy", "-Q", "-o", "-i", "a.img", filepath.Join(sourceDir, "main.go"), "::loader/loader.conf")
	old, err := os.ReadFile("b.img")
	if err != nil {
		t.Fatal(err)
	}
	pending := 0
	for n := 0; ; n++ {
		if err := os.WriteFile("b.img", old, 0o644); err != nil {
			t.Fatal(err)
		}
		left := n
		b.app.engine.sync = func(ctx context.Context, jobs []replicate.Job) ([][]replicate.Result, error) {
			for _, target := range jobs[0].Targets {
				target.Dev = cut{target.Dev, &left}
			}
			return replicate.SyncAll(ctx, jobs)
		}
		b.writes = true
		r := b.run("sync", "--primary", "a.img", "--target", "b.img")
		b.app.engine.sync = replicate.SyncAll
		if left >= 0 {
			r.want(0)
			break
		}
		r.want(exitPartial).has("the plug was pulled")
		b.writes = false
		status := b.run("status", "--json=short", "--primary", "a.img", "--target", "b.img")
		check := b.run("check", "b.img")
		dry := b.run("recover", "--dry-run", "b.img")
		switch check.code {
		case 0:
			// The run had not come to its intent, or had closed its books.
		case exitRecover:
			pending++
			check.has("hint: run `espmirror recover b.img`")
			status.want(exitRecover).json("status")
			dry.want(exitRecover).has(": would ", "(dry run)")
			// What is selected here is as it should be, and still there is something to do.
			if !strings.Contains(dry.stdout, "count of free clusters") || strings.Contains(dry.stdout, "would roll back") {
				b.run("sync", "-n", "--select", "EFI/BOOT", "--primary", "a.img", "--target", "b.img").want(exitRecover).has("recover b.img")
			}
		default:
			t.Fatalf("cut at write %d: check exits with %d\n%s%s", n, check.code, check.stdout, check.stderr)
		}
		b.writes = true
		b.run("recover", "--json=short", "b.img").want(0).json("recover")
		b.writes = false
		b.run("recover", "b.img").want(0).has("nothing to do")
		b.run("check", "b.img").want(0)
	}
	if pending == 0 {
		t.Error("no cut left anything to recover")
	}
}

// TestUnsoundTarget has targets whose selected content is right, and which are not: no command calls them in sync or ok.
func TestUnsoundTarget(t *testing.T) {
	b := newBench(t)
	volumes(t)
	set := []string{"--primary", "a.img", "--target", "b.img"}
	b.writes = true
	b.run(append([]string{"sync", "-q"}, set...)...).want(0)
	sound, err := os.ReadFile("b.img")
	if err != nil {
		t.Fatal(err)
	}
	b.writes = false
	patch(t, "b.img", "b.img", func(d []byte) { d[fat2(d)+300] ^= 0x55 })
	b.run(append([]string{"sync", "-n"}, set...)...).want(exitRecover).has("needs recovery", "recover b.img")
	b.run(append([]string{"status", "--json=short"}, set...)...).want(exitRecover).has("needs recovery").json("status")
	b.run("recover", "-n", "b.img").want(exitRecover)
	b.writes = true
	doc := b.run(append([]string{"sync", "--json=short"}, set...)...).want(0).json("run")
	if n := doc["targets"].([]any)[0].(map[string]any)["summary"].(map[string]any)["bytes_to_write"]; n == float64(0) {
		t.Error("what recovery wrote is not told")
	}
	if err := os.WriteFile("b.img", sound[:len(sound)-4096], 0o644); err != nil {
		t.Fatal(err)
	}
	b.writes = false
	b.run("status", "--target", "b.img").want(exitRefused).has("the volume claims")
	b.run(append([]string{"status"}, set...)...).want(exitRefused).has("the volume claims")
}

// TestResults gives the command results that no image can have.
func TestResults(t *testing.T) {
	b := newBench(t)
	volumes(t)
	makeFixture(t, fixtures.VolumeSpec{FAT: 12, Size: 1 << 20, Serial: 7}, "c.img")
	args := []string{"--primary", "a.img", "--target", "b.img", "--target", "c.img"}
	for name, tc := range map[string]struct {
		results []replicate.Result
		err     error
		code    int
		want    string
	}{
		"failed":      {results: []replicate.Result{{Outcome: replicate.Synced}, {Outcome: replicate.Failed, Err: errCut}}, code: exitPartial, want: "cannot sync c.img: the plug was pulled"},
		"no room":     {results: []replicate.Result{{Outcome: replicate.InSync}, {Outcome: replicate.Refused, Err: fatdriver.ErrNoSpace}}, code: exitRefused, want: "not enough room"},
		"written":     {results: []replicate.Result{{Outcome: replicate.Synced}, {Outcome: replicate.Refused, Err: fatdriver.ErrNoSpace}}, code: exitPartial, want: "not enough room"},
		"recovered":   {results: []replicate.Result{{Outcome: replicate.InSync, Recovered: &replicate.Recovery{Action: "rolled back", FreedClusters: 3}}, {Outcome: replicate.InSync}}, code: 0, want: "rolled back"},
		"pending":     {results: []replicate.Result{{Outcome: replicate.InSync}, {Outcome: replicate.Failed, Err: replicate.ErrNeedsRecovery}}, code: exitRecover, want: "hint: run `espmirror recover c.img`"},
		"named":       {results: []replicate.Result{{Outcome: replicate.InSync}, {Outcome: replicate.Failed, Err: fmt.Errorf("c.img: %w", errCut)}}, code: exitPartial, want: "espmirror: cannot sync c.img: the plug"},
		"source":      {err: fmt.Errorf("%w: cannot read x", replicate.ErrSource), code: exitFailed, want: "the source cannot be replicated: cannot read x"},
		"interrupted": {results: []replicate.Result{{Outcome: replicate.Failed, Err: context.Canceled}, {Outcome: replicate.Failed, Err: context.Canceled}}, err: context.Canceled, code: exitInterrupt, want: "espmirror: interrupted\n"},
	} {
		b.app.engine.sync = func(context.Context, []replicate.Job) ([][]replicate.Result, error) {
			if tc.results == nil {
				return nil, tc.err
			}
			return [][]replicate.Result{tc.results}, tc.err
		}
		r := b.run(append([]string{"sync"}, args...)...)
		if r.code != tc.code {
			t.Errorf("%s: exit status %d, want %d\n%s%s", name, r.code, tc.code, r.stdout, r.stderr)
		}
		r.has(tc.want)
		b.run(append([]string{"sync", "--json=pretty"}, args...)...).want(tc.code).json("run")
	}
	// A crash is not made into an error: the runtime's exit status 2 and its trace say more.
	b.app.engine.sync = func(context.Context, []replicate.Job) ([][]replicate.Result, error) {
		panic("a bug")
	}
	defer func() {
		if recover() == nil {
			t.Error("a panic was swallowed")
		}
	}()
	b.run(append([]string{"sync"}, args...)...)
}

func TestProgress(t *testing.T) {
	b := newBench(t)
	volumes(t)
	b.app.terminalWidth = fakeTerminal
	b.app.engine.sync = func(_ context.Context, jobs []replicate.Job) ([][]replicate.Result, error) {
		o := jobs[0].Options
		if o.Progress != nil {
			o.Progress(replicate.Progress{Phase: "compare", Done: 1 << 20, Total: 2 << 20})
			o.Log.Info("something happened")
			o.Progress(replicate.Progress{Target: "b\x1b.img", Phase: "write", Done: 5, Total: 0})
		}
		return [][]replicate.Result{{{Outcome: replicate.InSync}}}, nil
	}
	args := []string{"sync", "--primary", "a.img", "--target", "b.img"}
	r := b.run(args...).want(0).has("\r[==========          ]  50%  compare 1M/2M\x1b[K\r\x1b[Kespmirror: something happened\n")
	if strings.Contains(r.stderr, "b\x1b.img") || !strings.HasSuffix(r.stderr, "\r\x1b[K") {
		t.Errorf("the line is left behind: %q", r.stderr)
	}
	for _, off := range []string{"--no-progress", "-q", "--json=short"} {
		if r := b.run(append([]string{"sync", off}, args[1:]...)...).want(0); strings.Contains(r.stderr, "\r") {
			t.Errorf("%s: %q", off, r.stderr)
		}
	}
	b.app.terminalWidth = terminalWidth
	if r := b.run(args...).want(0); strings.Contains(r.stderr, "\r") {
		t.Errorf("without a terminal: %q", r.stderr)
	}
}

// loop attaches an image to a loop device, on the real machine.
func loop(t *testing.T, b *bench, image string, options ...string) string {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("loop devices are for root")
	}
	out, err := exec.Command("losetup", append(options, "--find", "--show", image)...).Output()
	if err != nil {
		t.Skipf("losetup: %v", err)
	}
	node := strings.TrimSpace(string(out))
	// The kernel keeps the partitions of a loop device when it is detached, and has those of whoever had this one before.
	forget := func() {
		id, err := blockdev.Identify(node)
		if err != nil {
			t.Error(err)
			return
		}
		disk, err := blockdev.System{}.BlockByNum(id.Dev)
		if err == nil {
			err = blockdev.System{}.ForgetPartitions(disk)
		}
		if err != nil {
			t.Error(err)
		}
	}
	forget()
	t.Cleanup(func() {
		forget()
		if err := exec.Command("losetup", "-d", node).Run(); err != nil {
			t.Errorf("losetup -d %s: %v", node, err)
		}
	})
	b.app.system = blockdev.System{}
	return node
}

// TestLoopDevice does to a block device what the other tests do to images.
func TestLoopDevice(t *testing.T) {
	b := newBench(t)
	volumes(t)
	node := loop(t, b, "b.img")
	args := []string{"--primary", "a.img", "--target"}
	cmd := func(words ...string) []string { return append(append(words, args...), node) }

	// Two page caches over the same bytes: the image is not written while a loop device stands for it.
	b.run(append([]string{"sync"}, append(args, "b.img")...)...).want(exitRefused).has("attached to", "hint: use "+node+" instead, or detach it with `losetup -d "+node+"`")
	b.run(append([]string{"sync", "-n"}, append(args, "b.img")...)...).want(exitRefused).has("attached to", "hint: use "+node)
	// The same volume by two names.
	b.run("sync", "--primary", "b.img", "--target", node).want(exitRefused).has("it is the primary")

	// Somebody holds the device, as a mount does.
	held, err := os.OpenFile(node, os.O_RDONLY|unix.O_EXCL, 0)
	if err != nil {
		t.Fatal(err)
	}
	b.run(cmd("sync")...).want(exitRefused).has("is in use")
	b.run(append([]string{"recover"}, node)...).want(exitRefused).has("is in use")
	if err := held.Close(); err != nil {
		t.Fatal(err)
	}

	b.run(cmd("sync", "-n")...).want(exitDiffers)
	b.writes = true
	b.run(cmd("sync", "-q")...).want(0).silent()
	b.writes = false
	b.run(cmd("verify")...).want(0)
	b.run(cmd("status")...).want(0).has("in sync")
	b.run(cmd("sync", "-q")...).want(0).silent()

	ro := loop(t, b, "a.img", "--read-only")
	b.run("sync", "--primary", node, "--target", ro).want(exitRefused).has("read-only")
}

// TestMountedPrimary has a machine on which the primary is mounted: the mount point is the source, not the device.
func TestMountedPrimary(t *testing.T) {
	b := newBench(t)
	volumes(t)
	node := loop(t, b, "a.img", "--read-only")
	b.run("extract", "-q", "--to", "mnt", "a.img").want(0)
	// What was written through the mount has not come to the device.
	if err := os.WriteFile("mnt/loader/loader.conf", []byte("timeout 99\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	mnt, err := filepath.Abs("mnt")
	if err != nil {
		t.Fatal(err)
	}
	id, err := blockdev.Identify(node)
	if err != nil {
		t.Fatal(err)
	}
	// The machine is the real one, but for its list of mounts.
	root := t.TempDir()
	for _, dir := range []string{"sys", "dev"} {
		if err := os.Symlink("/"+dir, filepath.Join(root, dir)); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.MkdirAll(filepath.Join(root, "proc/self"), 0o755); err != nil {
		t.Fatal(err)
	}
	line := fmt.Sprintf("36 35 %s / %s rw - vfat %s rw\n", id.Dev, mnt, node)
	if err := os.WriteFile(filepath.Join(root, "proc/self/mountinfo"), []byte(line), 0o644); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(root, "proc/swaps"), nil, 0o644); err != nil {
		t.Fatal(err)
	}
	b.app.system = blockdev.System{Root: root}
	b.run("sync", "-n", "--primary", "b.img", "--target", node).want(exitRefused).has("mounted on " + mnt)
	b.run("status", "--primary", "b.img", "--target", node).want(exitRefused).has("busy")
	b.writes = true
	b.run("sync", "--primary", node, "--target", "b.img").want(0).has("its mount point is the source", mnt)
	b.writes = false
	if r := b.run("cat", "b.img", "loader/loader.conf").want(0); r.stdout != "timeout 99\n" {
		t.Errorf("the target has %q", r.stdout)
	}
	b.run("status", "--primary", node, "--target", "b.img").want(0).has("mounted on " + mnt)
}
