package gpt

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"espmirror/blockdev"
	"espmirror/fixtures"
)

// later does f in the background after a while, and sees to it that it is done before the test ends.
func later(t *testing.T, after time.Duration, f func()) {
	t.Helper()
	done := make(chan struct{})
	timer := time.AfterFunc(after, func() { defer close(done); f() })
	t.Cleanup(func() {
		if !timer.Stop() {
			<-done
		}
	})
}

func TestWaitFindsAtOnce(t *testing.T) {
	for _, uevent := range []bool{true, false} {
		m := newMachine(t)
		m.uevent = uevent
		m.espDisk("sda", 1)
		m.espDisk("sdb", 2)
		m.espDisk("sdc", 2) // twice is there, too
		for _, timeout := range []time.Duration{time.Hour, 0, -1} {
			missing, err := Wait(context.Background(), m.sys, []string{guid(1), "PARTUUID=" + strings.ToUpper(guid(2)), guid(1)}, timeout)
			if err != nil || len(missing) != 0 {
				t.Error(missing, err)
			}
		}
		// To look once is not to wait.
		start := time.Now()
		missing, err := Wait(context.Background(), m.sys, []string{guid(9), guid(1), "PARTUUID=DEADBEEF-01"}, 0)
		if err != nil || !slices.Equal(missing, []string{guid(9), "deadbeef-01"}) || time.Since(start) > lookAgain {
			t.Error(missing, err, time.Since(start))
		}
	}
	if missing, err := Wait(context.Background(), nothing(t), nil, time.Hour); err != nil || missing != nil {
		t.Error(missing, err)
	}
	_, err := Wait(context.Background(), nothing(t), []string{guid(1), "sda1"}, time.Hour)
	wantErr(t, err, ErrBadName)
}

// TestWaitLater: partitions show up one after the other in the tree.
func TestWaitLater(t *testing.T) {
	for _, uevent := range []bool{true, false} {
		m := newMachine(t)
		m.uevent = uevent
		m.espDisk("sda", 1)
		var told [][]string
		w := &Waiter{System: m.sys, every: 10 * time.Millisecond, Tell: func(missing []string) { told = append(told, missing) }}
		later(t, 50*time.Millisecond, func() { m.espDisk("sdb", 2) })
		later(t, 400*time.Millisecond, func() { m.espDisk("sdc", 3) })
		missing, err := w.Wait(context.Background(), []string{guid(3), guid(1), guid(2)}, time.Minute)
		if err != nil || len(missing) != 0 {
			t.Error(missing, err)
		}
		if want := [][]string{{guid(3), guid(2)}, {guid(3)}}; !slices.EqualFunc(told, want, slices.Equal) {
			t.Errorf("told %v, want %v", told, want)
		}
	}
}

func TestWaitTimeout(t *testing.T) {
	m := newMachine(t)
	m.espDisk("sda", 1)
	start := time.Now()
	missing, err := Wait(context.Background(), m.sys, []string{guid(2), guid(1)}, 100*time.Millisecond)
	if took := time.Since(start); err != nil || !slices.Equal(missing, []string{guid(2)}) || took < 100*time.Millisecond || took > 5*time.Second {
		t.Error(missing, err, took)
	}

	for _, timeout := range []time.Duration{time.Hour, 0} {
		ctx, cancel := context.WithCancel(context.Background())
		later(t, 50*time.Millisecond, cancel)
		if timeout == 0 {
			cancel()
		}
		missing, err = Wait(ctx, m.sys, []string{guid(2), guid(1)}, timeout)
		if !errors.Is(err, context.Canceled) || !slices.Contains(missing, guid(2)) {
			t.Error(missing, err)
		}
	}
}

// TestWaitLeavesDisksAlone: a foreign disk is read once and not every half second, until it changes; and not at all when
// the system knows what is on it.
func TestWaitLeavesDisksAlone(t *testing.T) {
	m := newMachine(t)
	p := m.espDisk("sda", 1)
	m.espDisk("sdb", 2)
	m.udev("sda1", p, p.guid)
	l := &lookout{finder: Finder{System: m.sys}, missing: []string{guid(9), guid(8)}, read: map[string]diskRead{}}
	opened := m.opens()
	look := func(want ...string) {
		t.Helper()
		if found := l.look(); len(found.missing) != 2 || found.err != nil {
			t.Fatal(found)
		}
		if got := opened(); !slices.Equal(got, want) {
			t.Errorf("opened %v, want %v", got, want)
		}
	}
	look("sdb")
	look()
	look()
	// The kernel has read a new table, in which only the GUID is another: the directory of the partition is a new one.
	dir := m.sys.Path("/sys/devices/sdb/sdb1")
	if err := errors.Join(os.Rename(dir, dir+".old"), os.CopyFS(dir, os.DirFS(dir+".old"))); err != nil {
		t.Fatal(err)
	}
	look("sdb")
	look()
	// A disk that cannot be read is tried at each look, once.
	m.device("/sys/devices/sdc", "sdc", mib)
	broken := memImage(t, mib, 512)
	clear(broken[512:])
	m.write("/dev/sdc", string(broken))
	look("sdc")
	look("sdc")
}

// TestWaitCannotLook: why nothing was found is told when the time is up.
func TestWaitCannotLook(t *testing.T) {
	m := newMachine(t)
	m.espDisk("sda", 1)
	m.write("/sys/devices/sda/size", "many")
	missing, err := Wait(context.Background(), m.sys, []string{guid(1)}, 50*time.Millisecond)
	if len(missing) != 1 || err == nil || !strings.Contains(err.Error(), "cannot look at block device sda") {
		t.Error(missing, err)
	}
	if os.Geteuid() == 0 {
		t.Skip("skipped: permissions: root may read everything")
	}
	m = newMachine(t)
	m.uevent = true
	m.espDisk("sda", 1)
	if err := os.Chmod(m.sys.Path("/dev/sda"), 0); err != nil {
		t.Fatal(err)
	}
	missing, err = Wait(context.Background(), m.sys, []string{guid(1)}, 50*time.Millisecond)
	if len(missing) != 1 || !errors.Is(err, fs.ErrPermission) {
		t.Error(missing, err)
	}
}

// TestWaitUevent: a real partition comes, and the kernel's event ends the wait. Nothing but an event can: the next look
// without one would be in an hour.
func TestWaitUevent(t *testing.T) {
	fixtures.Need(t, "losetup", "addpart")
	p := esp(1, mib, mib)
	p.guid = fmt.Sprintf("6f0c5c7e-0000-4000-8000-%012x", time.Now().UnixNano()&0xffffffffffff) // another run may be under way
	node := attach(t, writeImage(t, make([]byte, 8*mib)))
	events, err := blockdev.System{}.BlockEvents()
	if err != nil {
		t.Skipf("skipped: uevents: %v", err)
	}
	if err := events.Close(); err != nil {
		t.Fatal(err)
	}
	usual := quiet
	quiet = slices.DeleteFunc(slices.Clone(usual), func(prefix string) bool { return prefix == "loop" })
	t.Cleanup(func() { quiet = usual })

	disk, err := os.OpenFile(node, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer disk.Close()
	began := make(chan struct{})
	ended := make(chan struct{})
	var once sync.Once
	w := &Waiter{every: time.Hour, Tell: func([]string) { once.Do(func() { close(began) }) }}
	var missing []string
	go func() {
		defer close(ended)
		missing, err = w.Wait(context.Background(), []string{p.guid}, 20*time.Second)
	}()
	<-began
	if _, err := disk.WriteAt(memImage(t, 8*mib, 512, p), 0); err != nil {
		t.Fatal(err)
	}
	if err := disk.Sync(); err != nil {
		t.Fatal(err)
	}
	time.Sleep(100 * time.Millisecond)
	select {
	case <-ended:
		t.Error("found before there was an event:", missing, err)
	default:
	}
	start := time.Now()
	// Not every kernel can read a GPT by itself, and the event is the same.
	if out, err := exec.Command("addpart", node, "1", "2048", "2048").CombinedOutput(); err != nil {
		t.Skipf("skipped: no partitions on loop devices here: %s", out)
	}
	defer exec.Command("delpart", node, "1").Run()
	<-ended
	t.Logf("found %s after the kernel read the table", time.Since(start))
	if err != nil || len(missing) != 0 || time.Since(start) > 10*time.Second {
		t.Error(missing, err)
	}
}
