package main

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"espmirror/replicate"
)

// TestRecoverSet: without the name of a volume, what was booted and the members of its set are recovered, whatever is wrong
// with some of them.
func TestRecoverSet(t *testing.T) {
	r := newRig(t)
	r.run("recover").want(exitUsage).has("no volume was given, and no primary", "name the volumes")
	r.set(4)
	names := func(res *result) []string { return strings.Split(strings.TrimSuffix(res.stdout, "\n"), "\n") }
	nothing := func(nodes ...string) (lines []string) {
		for _, node := range nodes {
			lines = append(lines, r.node(node)+": nothing to do")
		}
		return lines
	}
	if got, want := names(r.run("recover").want(0)), nothing("sda1", "sdb1", "sdc1", "sdd1"); !slices.Equal(got, want) {
		t.Errorf("%q", got)
	}

	// One is there to recover, one is gone, and one is no filesystem any more.
	r.copyIn("sda1", "loader/loader.conf", "timeout 7\n")
	r.interrupt("--target", r.node("sdb1"))
	r.run("recover", "-n").want(exitRecover).has(r.node("sdb1") + ": would ").golden("recover-set-plan")
	r.run("recover", "-n", "--json=short").want(exitRecover).json("recover")
	r.pull("sdc")
	clearBytes(t, "machine/dev/sdd1", 0, 512)
	doc := r.do("recover", "--json=short").want(exitPartial).json("recover")
	if vs := doc["volumes"].([]any); len(vs) != 4 || vs[1].(map[string]any)["recovery"].(map[string]any)["changed"] != true {
		t.Errorf("%v", doc)
	}
	r.run("recover").want(exitPartial).has("cannot recover PARTUUID="+guidOf(3), "hint: connect its disk", "cannot recover "+r.node("sdd1"))
	r.run("recover", "-n", r.node("sdb1")).want(0)

	// What was booted was itself the target.
	r.interrupt("--target", r.node("sdb1"))
	r.run("recover", "-n", "--primary", r.node("sdb1")).want(exitPartial).has(r.node("sdb1") + ": would ")
	t.Setenv("SYSTEMD_ESP_PATH", r.node("sdb1"))
	r.do("recover").want(exitPartial)
	t.Setenv("SYSTEMD_ESP_PATH", "")
	r.run("recover", "-n", r.node("sdb1")).want(0)

	// A set file that cannot be read, or that is another one's: what was named is recovered, and the rest is refused.
	good := r.setFile("sda1")
	r.copyIn("sda1", "loader/esp-sync", good+"exlude x\n")
	r.run("recover").want(exitRefused).has(r.node("sda1")+": nothing to do", "cannot tell the other members", "line 6")
	r.copyIn("sda1", "loader/esp-sync", "member "+guidOf(2)+"\n")
	r.run("recover").want(exitRefused).has(r.node("sda1")+": nothing to do", "is not in its own replica set")
	if err := os.WriteFile("empty.img", make([]byte, 1<<20), 0o644); err != nil {
		t.Fatal(err)
	}
	r.run("recover", "--primary", "empty.img").want(exitRefused).has("cannot use primary empty.img: ")
	r.disk("sde", esp(5, bootTree))
	if got, want := names(r.run("recover", "--primary", r.node("sde1")).want(0).has("there is no loader/esp-sync")), nothing("sde1"); !slices.Equal(got, want) {
		t.Errorf("%q", got)
	}
}

// TestRecoverSetPairs: the XBOOTLDR partitions go with their ESPs.
func TestRecoverSetPairs(t *testing.T) {
	b := newBench(t)
	b.pairs()
	dev := func(name string) string { return b.app.system.Path("/dev/sd" + name) }
	b.booted(pairGUID("a", 1))
	b.write("add", "-q", dev("b"), dev("c")).want(0)
	b.change("a.img@@p2", "loader/entries.srel", "type1\n\n")
	for n := 4; ; n++ {
		left := n
		b.app.engine.sync = func(ctx context.Context, jobs []replicate.Job) ([][]replicate.Result, error) {
			target := jobs[0].Targets[1]
			target.Dev = cut{target.Dev, &left}
			return replicate.SyncAll(ctx, jobs)
		}
		b.write("sync").want(exitPartial)
		b.app.engine.sync = replicate.SyncAll
		if b.run("recover", "-n", "c.img@@p2").code == exitRecover {
			break
		}
	}
	res := b.write("recover").want(0)
	if strings.Count(res.stdout, "\n") != 6 || strings.Count(res.stdout, "nothing to do") != 5 {
		t.Error(res.stdout)
	}
	b.run("recover", "-n", "c.img@@p2").want(0)
	// One that Linux reads by other means is left alone.
	patch(t, "c.img", "c.img", func(d []byte) { clear(d[1<<20+pairESP.Size : 1<<20+pairESP.Size+4096]) })
	if res := b.run("recover").want(0); strings.Count(res.stdout, "\n") != 5 {
		t.Error(res.stdout)
	}
	// Both partitions of a disk that is as it should be, both of one that is not.
	root, err := filepath.Abs(b.app.system.Root)
	if err != nil {
		t.Fatal(err)
	}
	b.app.system.Root = root
	b.write("early").want(exitRefused).has("in sync 2, ", "refused 2 ("+dev("c")+"@@p1, "+dev("c")+"@@p2)")
}

// TestRecoverHeld: one that somebody holds, and on which there is nothing to recover, does not keep the others. It is refused
// where there is something.
func TestRecoverHeld(t *testing.T) {
	r := newRig(t)
	r.set(3)
	for _, n := range []string{"a", "b"} { // attached to a loop device, for which the kernel does not tell an open file
		loop := "loop" + n
		path, err := filepath.Abs(r.node("sd" + n + "1"))
		if err != nil {
			t.Fatal(err)
		}
		for name, text := range map[string]string{"dev": "7:" + fmt.Sprint(n[0]), "size": "4096", "uevent": "", "loop/backing_file": path, "loop/offset": "0", "loop/sizelimit": "0"} {
			r.file("sys/block/"+loop+"/"+name, text+"\n")
		}
	}
	attach := func(name string) {
		if err := os.Symlink("../../block/"+name, filepath.Join("machine/sys/class/block", name)); err != nil {
			t.Fatal(err)
		}
	}
	r.copyIn("sda1", "loader/loader.conf", "timeout 7\n")
	r.interrupt("--target", r.node("sdb1"))
	r.interrupt("--target", r.node("sdc1"))
	attach("loopa")
	attach("loopb")
	r.do("recover").want(exitPartial).has(r.node("sda1")+": nothing to do", "cannot recover "+r.node("sdb1")+": is in use: attached to loopb", "use /dev/loopb instead", r.node("sdc1")+": rolled back")
	r.run("recover", "-n", r.node("sdc1")).want(0)
	if err := os.Remove("machine/sys/class/block/loopb"); err != nil {
		t.Fatal(err)
	}
	r.do("recover").want(0).has(r.node("sdb1") + ": rolled back")
	attach("loopb")
	r.run("recover").want(0)
}
