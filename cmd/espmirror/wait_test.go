package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

const guidNone = "6f0c5c7e-0000-4000-8000-00000000dead"

// fakeSystem is a machine in a directory, whose disks are image files.
type fakeSystem struct {
	t    *testing.T
	root string
	next int
}

func newFakeSystem(t *testing.T) *fakeSystem {
	t.Helper()
	return &fakeSystem{t: t, root: t.TempDir()}
}

func (s *fakeSystem) write(name string, content []byte) {
	s.t.Helper()
	path := filepath.Join(s.root, name)
	if err := errors.Join(os.MkdirAll(filepath.Dir(path), 0o755), os.WriteFile(path, content, 0o644)); err != nil {
		s.t.Fatal(err)
	}
}

// disk adds a disk with one ESP, which the kernel tells by its GUID. Its sysfs directory comes last and at once, as a
// device does.
func (s *fakeSystem) disk(name, guid string) {
	s.t.Helper()
	img := name + ".tmp"
	disk(s.t, img, "c12a7328-f81f-11d2-ba4b-00a0c93ec93b", guid, secondVolume)
	data, err := os.ReadFile(img)
	if err != nil {
		s.t.Fatal(err)
	}
	size := int(secondVolume.Size)
	s.write("dev/"+name, data)
	s.write("dev/"+name+"1", data[1<<20:1<<20+size])
	for _, d := range []struct{ dir, more string }{{name, ""}, {name + "/" + name + "1", "DEVNAME=" + name + "1\nPARTN=1\nPARTUUID=" + guid + "\n"}} {
		dir := "sys/devices/" + d.dir
		s.write(dir+"/dev", fmt.Appendf(nil, "8:%d\n", s.next))
		s.next++
		s.write(dir+"/uevent", []byte(d.more))
		bytes := len(data)
		if d.more != "" {
			bytes = size
			s.write(dir+"/partition", []byte("1\n"))
			s.write(dir+"/start", []byte("2048\n"))
		}
		s.write(dir+"/size", fmt.Appendf(nil, "%d\n", bytes/512))
	}
	class := filepath.Join(s.root, "sys/class/block")
	err = os.MkdirAll(class, 0o755)
	for _, d := range []string{name, name + "/" + name + "1"} {
		err = errors.Join(err, os.Symlink("../../devices/"+d, filepath.Join(class, filepath.Base(d))))
	}
	if err != nil {
		s.t.Fatal(err)
	}
}

func TestWait(t *testing.T) {
	b := newBench(t)
	s := newFakeSystem(t)
	s.disk("sda", guidOne)
	s.disk("sdb", guidTwo)
	root := "--system-root=" + s.root

	// All there: at once, whatever the timeout.
	start := time.Now()
	r := b.run(root, "wait", "--timeout", "1h", guidOne, "PARTUUID="+strings.ToUpper(guidTwo)).want(0)
	if r.stdout != "PARTUUID="+guidOne+": there\nPARTUUID="+guidTwo+": there\n" || r.stderr != "" || time.Since(start) > time.Minute {
		t.Errorf("%q %q", r.stdout, r.stderr)
	}
	b.run("wait-secondary-esps", root, "-q", guidOne).want(0)
	doc := b.run("wait", root, "--json=short", "--timeout=0", guidOne, guidOne).want(0).json("wait")
	if members := doc["members"].([]any); len(members) != 1 {
		t.Error(members)
	}

	r = b.run("wait", root, "--timeout", "50ms", guidOne, guidNone, "DEADBEEF-01").want(exitPartial).
		has("cannot find PARTUUID="+guidNone+", PARTUUID=deadbeef-01 within 50ms", guidOne+": there", guidNone+": missing", "waiting for PARTUUID="+guidNone)
	if strings.Contains(r.stderr, guidOne) {
		t.Error(r.stderr)
	}
	doc = b.run("wait", root, "--json=pretty", "--timeout", "50ms", guidOne, guidNone).want(exitPartial).json("wait")
	if members := doc["members"].([]any); members[0].(map[string]any)["present"] != true || members[1].(map[string]any)["present"] != false ||
		doc["waited_seconds"].(float64) < 0.05 || doc["error"].(map[string]any)["exit"] != 3.0 {
		t.Error(doc)
	}
	if r = b.run("wait", root, "-q", "--timeout", "0", guidNone).want(exitPartial); r.stdout != "" ||
		r.stderr != "espmirror: cannot find PARTUUID="+guidNone+"\n" {
		t.Errorf("%q %q", r.stdout, r.stderr)
	}

	ctx, cancel := context.WithCancel(b.ctx)
	b.ctx = ctx
	time.AfterFunc(50*time.Millisecond, cancel)
	b.run("--json=short", "wait", root, "--timeout", "1h", guidNone).want(exitInterrupt).json("wait")
}

// TestWaitLater: the partition comes while the command waits.
func TestWaitLater(t *testing.T) {
	b := newBench(t)
	s := newFakeSystem(t)
	s.disk("sda", guidOne)
	done := make(chan struct{})
	time.AfterFunc(100*time.Millisecond, func() { defer close(done); s.disk("sdb", guidTwo) })
	b.run("--system-root", s.root, "wait", "--timeout", "1min", guidTwo, guidOne).want(0).has("waiting for PARTUUID="+guidTwo, guidTwo+": there")
	<-done
}

// TestSystemRoot: the option moves the machine for every command, on either side of the command's name, and "/" is the
// running one.
func TestSystemRoot(t *testing.T) {
	b := newBench(t)
	s := newFakeSystem(t)
	s.disk("sda", guidOne)
	node := filepath.Join(s.root, "dev/sda1")
	b.run("list").want(0).has("No ESP")
	b.run("list", "--system-root", s.root).want(0).has(node, guidOne)
	b.run("--system-root", s.root, "list").want(0).has(node, guidOne)
	b.run("list").want(0).has("No ESP") // it holds for one command line
	b.run("--system-root", s.root, "ls", "-R", "PARTUUID="+guidOne).want(0).has("bootmgfw.efi")
	b.run("--system-root", s.root, "status", "--primary", "PARTUUID="+guidOne).want(0).has("2222-BBBB")
	t.Chdir(filepath.Dir(s.root))
	b.run("--system-root", filepath.Base(s.root), "list").want(0).has(node)
	b.run("--system-root", "/", "list", node).want(0)
}
