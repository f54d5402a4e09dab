// Package dist tests what espmirror gives to distributions: hooks, units, rules, packages. The scripts run as they are
// installed, under dash and busybox, in a fake root, with a program that is told how to misbehave.
package dist

import (
	"bytes"
	"context"
	"errors"
	"flag"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

// shells are those that run the POSIX scripts: Debian's and the initramfs's.
var shells = [][]string{{"dash"}, {"busybox", "sh"}}

// forShells runs a test under each shell that is there.
func forShells(t *testing.T, test func(t *testing.T, shell []string)) {
	for _, shell := range shells {
		t.Run(shell[0], func(t *testing.T) {
			t.Parallel()
			need(t, shell[0])
			test(t, shell)
		})
	}
}

// need skips a test by the name of the program that is missing.
func need(t *testing.T, program string) string {
	t.Helper()
	path, err := exec.LookPath(program)
	if err != nil {
		t.Skipf("skipped: %s: not installed", program)
	}
	return path
}

// fakeProgram notes how it was called, and then does as FAKE_DO says: an exit status, "hang", or "crash".
const fakeProgram = `#!/bin/sh
echo "${0##*/} $*" >>"$FAKE_LOG"
do=${FAKE_DO:-0}
case ${0##*/} in espmirror) ;; *) eval "do=\${FAKE_$(echo "${0##*/}" | tr a-z- A-Z_):-0}" ;; esac
case $do in
hang) exec sleep 1000 ;;
crash) kill -SEGV $$ ;;
text=*) echo "${do#text=}" ;;
*) exit "$do" ;;
esac
`

// machine is a fake root with everything installed, and a log of what was called.
type machine struct {
	t    *testing.T
	root string
	log  string
	env  []string
}

// token stands in the installed files where the fake root has to be.
const token = "/espmirror-fake-root"

// newMachine copies what is installed to a fake root, where its parts look for each other. The machine was booted through
// EFI, and neither systemd nor dpkg is there; a test changes that.
func newMachine(t *testing.T) *machine {
	t.Helper()
	m := &machine{t: t, root: t.TempDir()}
	m.log = m.path("log")
	from := installed(t)
	err := filepath.WalkDir(from, func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		name := strings.TrimPrefix(path, from)
		if d.Type() == fs.ModeSymlink {
			return nil
		}
		info, err := d.Info()
		if err != nil {
			return err
		}
		m.write(name, strings.ReplaceAll(m.read(path), token, m.path(token)), info.Mode())
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	for _, dir := range []string{"run", "sys/firmware/efi", "proc/1"} {
		m.mkdir(dir)
	}
	if err := os.Symlink(m.root, m.path("proc/1/root")); err != nil {
		t.Fatal(err)
	}
	m.env = []string{"ESPMIRROR_ROOT=" + m.root, "FAKE_LOG=" + m.log, "PATH=" + m.path("bin") + ":" + os.Getenv("PATH"),
		"ESPMIRROR_SETTLE_SECONDS=2", "ESPMIRROR_SYNC_SECONDS=2", "ESPMIRROR_EARLY_SECONDS=1"}
	// Nothing of the machine that the test runs on must answer.
	m.fake("systemd-detect-virt", "1")
	return m
}

// installed is what `make install` installs, all formats at once, with the fake program as the program. Our own files
// are below token/usr.
var installedOnce sync.Once
var installedDir string

func installed(t *testing.T) string {
	t.Helper()
	installedOnce.Do(func() {
		binary := filepath.Join(installedDir, "fake")
		if err := writeFile(binary, fakeProgram, 0o755); err != nil {
			t.Fatal(err)
		}
		cmd := exec.Command("scripts/packages/install", "install")
		cmd.Dir = "../.."
		cmd.Env = append(os.Environ(), "BINARY="+binary, "INITRDBINARY="+binary, "DESTDIR="+installedDir+"/root", "PREFIX="+token+"/usr")
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("cannot install: %v\n%s", err, out)
		}
	})
	return installedDir + "/root"
}

func TestMain(m *testing.M) {
	dir, err := os.MkdirTemp("", "espmirror-dist-")
	if err != nil {
		panic(err)
	}
	installedDir = dir
	// They wait more than they work.
	flag.Parse()
	flag.Set("test.parallel", "16")
	code := m.Run()
	os.RemoveAll(dir)
	os.Exit(code)
}

func (m *machine) path(name string) string { return filepath.Join(m.root, name) }
func (m *machine) lib(name string) string  { return m.path(token + "/usr/lib/espmirror/" + name) }

func (m *machine) write(name, text string, mode fs.FileMode) {
	m.t.Helper()
	if err := os.MkdirAll(filepath.Dir(m.path(name)), 0o755); err != nil {
		m.t.Fatal(err)
	}
	if err := writeFile(m.path(name), text, mode); err != nil {
		m.t.Fatal(err)
	}
}

// writeFile keeps other tests from starting a program meanwhile: it would inherit the open file, and who runs that file
// then is told that it is busy.
func writeFile(path, text string, mode fs.FileMode) error {
	syscall.ForkLock.RLock()
	defer syscall.ForkLock.RUnlock()
	return os.WriteFile(path, []byte(text), mode)
}

func (m *machine) mkdir(name string) {
	m.t.Helper()
	if err := os.MkdirAll(m.path(name), 0o755); err != nil {
		m.t.Fatal(err)
	}
}

func (m *machine) remove(name string) {
	m.t.Helper()
	if err := os.RemoveAll(m.path(name)); err != nil {
		m.t.Fatal(err)
	}
}

// fake puts a program of that name on PATH; what it does is a status, "hang", or "text=…".
func (m *machine) fake(name, do string) {
	m.write("bin/"+name, fakeProgram, 0o755)
	m.env = append(m.env, "FAKE_"+strings.ToUpper(strings.ReplaceAll(name, "-", "_"))+"="+do)
}

func (m *machine) read(path string) string {
	m.t.Helper()
	data, err := os.ReadFile(path)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		m.t.Fatal(err)
	}
	return string(data)
}

func (m *machine) exists(name string) bool {
	_, err := os.Lstat(m.path(name))
	return err == nil
}

// calls returns how program was called, without the calls of others.
func (m *machine) calls(program string) (calls []string) {
	for line := range strings.Lines(m.read(m.log)) {
		if rest, found := strings.CutPrefix(line, program+" "); found {
			calls = append(calls, strings.TrimSpace(rest))
		}
	}
	return calls
}

// run runs a command in the fake root and wants exit status 0 within the limit; it returns what was printed.
func (m *machine) run(limit time.Duration, env []string, command ...string) string {
	m.t.Helper()
	out, status, took := m.try(env, command...)
	if status != 0 {
		m.t.Errorf("%s: exit status %d\n%s", command[len(command)-1], status, out)
	}
	if took > limit {
		m.t.Errorf("%s took %v, more than %v", command, took, limit)
	}
	return out
}

func (m *machine) try(env []string, command ...string) (string, int, time.Duration) {
	m.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	cmd := exec.CommandContext(ctx, command[0], command[1:]...)
	for _, v := range os.Environ() {
		if !strings.HasPrefix(v, "DPKG_") && !strings.HasPrefix(v, "DEB_") {
			cmd.Env = append(cmd.Env, v)
		}
	}
	cmd.Env = append(cmd.Env, slices.Concat(m.env, env)...)
	// A file, not a pipe: nobody waits for what a background job of the script still holds.
	out, err := os.CreateTemp(m.root, "out")
	if err != nil {
		m.t.Fatal(err)
	}
	defer out.Close()
	cmd.Stdout, cmd.Stderr = out, out
	start := time.Now()
	err = cmd.Run()
	took := time.Since(start)
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		m.t.Fatal(err)
	}
	return m.read(out.Name()), cmd.ProcessState.ExitCode(), took
}

// eventually waits for something that a background job does.
func eventually(t *testing.T, what string, done func() bool) {
	t.Helper()
	for deadline := time.Now().Add(15 * time.Second); !done(); time.Sleep(20 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("%s: not within 15 s", what)
		}
	}
}

// soon is at once, on a machine that is busy. What would be waited for in vain takes longer than this.
const soon = 8 * time.Second

const syncCall = "sync --quiet --no-progress --compare=fingerprint --timeout=2s"

// waits is the content of the wait files, in order.
func (m *machine) waits() string {
	files, _ := filepath.Glob(m.path("run/espmirror/wait.*"))
	var all bytes.Buffer
	for _, f := range files {
		all.WriteString(m.read(f))
	}
	return all.String()
}

func TestQueueWithSystemd(t *testing.T) {
	t.Parallel()
	forShells(t, func(t *testing.T, shell []string) {
		m := newMachine(t)
		m.mkdir("run/systemd/system")
		out := m.run(soon, nil, append(shell, m.lib("queue-sync"))...)
		if !m.exists("run/espmirror/pending") || m.waits() != "" || out != "" {
			t.Errorf("pending: %v, waits for %q, says %q", m.exists("run/espmirror/pending"), m.waits(), out)
		}
		m.remove("run/espmirror")
		m.run(soon, nil, append(shell, m.lib("queue-sync"), "--after", "4711", "--gone", "/efi/machine id/6.1")...)
		if got, want := m.waits(), "pid 4711\ndir /efi/machine id/6.1\n"; got != want || !m.exists("run/espmirror/pending") {
			t.Errorf("waits for %q, not %q", got, want)
		}
		// Process 1 never ends, and what is no number is no process.
		m.remove("run/espmirror")
		m.run(soon, nil, append(shell, m.lib("queue-sync"), "--after", "1")...)
		m.run(soon, nil, append(shell, m.lib("queue-sync"), "--after", "x/y")...)
		if m.waits() != "" || !m.exists("run/espmirror/pending") {
			t.Errorf("waits for %q", m.waits())
		}
		if calls := m.calls("espmirror"); calls != nil {
			t.Errorf("ran the program: %q", calls)
		}
	})
}

func TestQueueRunNotWritable(t *testing.T) {
	t.Parallel()
	forShells(t, func(t *testing.T, shell []string) {
		m := newMachine(t)
		m.mkdir("run/systemd/system")
		m.write("run/espmirror", "in the way", 0o644)
		m.fake("systemctl", "0")
		if out := m.run(soon, nil, append(shell, m.lib("queue-sync"))...); out != "" {
			t.Errorf("says %q", out)
		}
		if got := m.calls("systemctl"); len(got) != 1 || got[0] != "--no-block --quiet start espmirror-sync.service" {
			t.Errorf("called systemctl %q", got)
		}
		out := m.run(soon, []string{"FAKE_SYSTEMCTL=1"}, append(shell, m.lib("queue-sync"))...)
		if !strings.Contains(out, "at the next boot") || strings.Count(out, "\n") != 1 {
			t.Errorf("says %q", out)
		}
		m.remove("run/systemd")
		if out := m.run(soon, nil, append(shell, m.lib("queue-sync"), "--after", "5")...); out != "" {
			t.Errorf("says %q", out)
		}
	})
}

// TestQueueNotHere: nothing is done, and nothing is said, where there is nothing to replicate, or where what could be
// replicated belongs to another machine.
func TestQueueNotHere(t *testing.T) {
	t.Parallel()
	cases := map[string]func(m *machine) []string{
		"no EFI": func(m *machine) []string { m.remove("sys/firmware/efi"); m.mkdir("run/systemd/system"); return nil },
		"no program": func(m *machine) []string {
			m.remove(token + "/usr/sbin/espmirror")
			m.mkdir("run/systemd/system")
			return nil
		},
		"dpkg --root": func(m *machine) []string { m.mkdir("run/systemd/system"); return []string{"DPKG_ROOT=/target"} },
		"chroot": func(m *machine) []string {
			m.remove("proc/1/root")
			m.mkdir("proc/1/root")
			return nil
		},
		"no /proc":  func(m *machine) []string { m.remove("proc"); return nil },
		"container": func(m *machine) []string { return []string{"FAKE_SYSTEMD_DETECT_VIRT=0"} },
		"nspawn":    func(m *machine) []string { m.write("run/systemd/container", "systemd-nspawn", 0o644); return nil },
		"podman":    func(m *machine) []string { m.write("run/.containerenv", "", 0o644); return nil },
		"docker":    func(m *machine) []string { m.write(".dockerenv", "", 0o644); return nil },
		"a machine": func(m *machine) []string { return nil },
	}
	for name, prepare := range cases {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			forShells(t, func(t *testing.T, shell []string) {
				m := newMachine(t)
				env := prepare(m)
				for _, mode := range []string{"--last", "--triggered"} {
					if out := m.run(soon, env, append(shell, m.lib("queue-sync"), mode)...); out != "" {
						t.Errorf("%s: says %q", mode, out)
					}
				}
				// The last case is there to show that the others can fail.
				if acted := m.calls("espmirror") != nil || m.exists("run/espmirror/pending"); acted != (name == "a machine") {
					t.Errorf("acted: %v", acted)
				}
			})
		})
	}
}

func TestQueueInDpkg(t *testing.T) {
	t.Parallel()
	forShells(t, func(t *testing.T, shell []string) {
		for _, c := range []struct {
			name, query, trigger, mode string
			triggered                  bool
		}{
			{"installed", "text=installed", "0", "--after", true},
			{"triggers pending", "text=triggers-pending", "0", "--after", true},
			{"dpkg-trigger fails", "text=installed", "2", "--after", false},
			{"removed", "text=config-files", "0", "--after", false},
			{"not a package", "1", "0", "--after", false},
			{"our own trigger", "text=installed", "0", "--triggered", false},
		} {
			m := newMachine(t)
			m.mkdir("run/systemd/system")
			m.fake("dpkg-query", c.query)
			m.fake("dpkg-trigger", c.trigger)
			out := m.run(soon, []string{"DPKG_MAINTSCRIPT_PACKAGE=linux-image"}, append(shell, m.lib("queue-sync"), c.mode, "77")...)
			if out != "" {
				t.Errorf("%s: says %q", c.name, out)
			}
			if c.triggered == m.exists("run/espmirror/pending") {
				t.Errorf("%s: pending: %v", c.name, m.exists("run/espmirror/pending"))
			}
			if calls := m.calls("dpkg-trigger"); c.triggered && (len(calls) != 1 || calls[0] != "--no-await espmirror-sync") {
				t.Errorf("%s: called dpkg-trigger %q", c.name, calls)
			}
		}
	})
}

// TestQueueForeground: without systemd, after the last hook, the sync runs at once; its failure is one line.
func TestQueueForeground(t *testing.T) {
	t.Parallel()
	forShells(t, func(t *testing.T, shell []string) {
		for do, says := range map[string]string{"0": "", "64": "", "1": "failed (1)", "3": "missing or failed", "6": "failed (6)",
			"crash": "failed (139)", "hang": "longer than 2 s"} {
			t.Run(do, func(t *testing.T) {
				t.Parallel()
				m := newMachine(t)
				out := m.run(20*time.Second, []string{"FAKE_DO=" + do}, append(shell, m.lib("queue-sync"), "--last")...)
				if calls := m.calls("espmirror"); len(calls) != 1 || calls[0] != syncCall {
					t.Errorf("ran %q", calls)
				}
				lines := slices.DeleteFunc(strings.Split(strings.TrimSpace(out), "\n"), func(s string) bool { return !strings.HasPrefix(s, "espmirror: ") })
				if says == "" && out != "" || says != "" && (len(lines) != 1 || !strings.Contains(lines[0], says)) {
					t.Errorf("says %q, not %q", out, says)
				}
			})
		}
	})
}

// TestQueueBackground: without systemd, a hook returns at once, and the sync begins when the caller is done.
func TestQueueBackground(t *testing.T) {
	t.Parallel()
	forShells(t, func(t *testing.T, shell []string) {
		m := newMachine(t)
		m.env = append(m.env, "ESPMIRROR_SETTLE_SECONDS=20")
		m.fake("logger", "0")
		m.mkdir("efi/token/6.1")
		m.mkdir("proc/4242")
		for range 3 {
			m.run(soon, nil, append(shell, m.lib("queue-sync"), "--after", "4242", "--gone", m.path("efi/token/6.1"))...)
		}
		time.Sleep(2500 * time.Millisecond)
		m.remove("proc/4242")
		time.Sleep(1200 * time.Millisecond)
		if calls := m.calls("espmirror"); calls != nil {
			t.Fatalf("ran while the directory was still there: %q", calls)
		}
		m.remove("efi/token/6.1")
		eventually(t, "a sync in the background", func() bool {
			return m.calls("espmirror") != nil && !m.exists("run/espmirror/job") && !m.exists("run/espmirror/pending")
		})
		if calls := m.calls("espmirror"); len(calls) != 1 || calls[0] != syncCall {
			t.Errorf("three requests at once ran %q", calls)
		}
		if m.waits() != "" {
			t.Errorf("left behind: %q", m.waits())
		}
	})
}

// TestQueueHoldsNothing: a package manager that reads what a hook prints, as pacman does, or debconf's descriptor 3, waits
// until the last process has closed it. What hangs, or runs in the background, must not be one.
func TestQueueHoldsNothing(t *testing.T) {
	t.Parallel()
	forShells(t, func(t *testing.T, shell []string) {
		for _, args := range []string{"--last", ""} {
			m := newMachine(t)
			m.write("reader", "#!/bin/sh\nx=$(\"$@\" 3>&1 2>&1)\necho \"$x\"\n", 0o755)
			m.env = append(m.env, "ESPMIRROR_SYNC_SECONDS=1")
			m.write(token+"/usr/sbin/espmirror", "#!/bin/sh\ntrap '' TERM\necho something\nsleep 12\n", 0o755) // in the kernel
			if out := m.run(soon, nil, slices.Concat([]string{m.path("reader")}, shell, []string{m.lib("queue-sync"), args})...); args != "" && !strings.Contains(out, "something") {
				t.Errorf("says %q", out)
			}
		}
	})
}

// TestQueueJobDied: a job that was killed does not keep later ones from running.
func TestQueueJobDied(t *testing.T) {
	t.Parallel()
	forShells(t, func(t *testing.T, shell []string) {
		m := newMachine(t)
		m.mkdir("run/espmirror")
		if err := os.Symlink("99999", m.path("run/espmirror/job")); err != nil {
			t.Fatal(err)
		}
		m.run(soon, nil, append(shell, m.lib("queue-sync"))...)
		eventually(t, "a sync in the background", func() bool { return m.calls("espmirror") != nil })
		eventually(t, "the end of the job", func() bool { return !m.exists("run/espmirror/job") })
	})
}

func TestSettle(t *testing.T) {
	t.Parallel()
	forShells(t, func(t *testing.T, shell []string) {
		m := newMachine(t)
		// Nothing was asked for: at boot, no time is lost.
		m.mkdir("run/espmirror")
		m.write("run/espmirror/wait.1", "dir "+m.root+"\n", 0o644)
		m.run(soon, []string{"ESPMIRROR_SETTLE_SECONDS=20"}, append(shell, m.lib("queue-sync"), "--settle")...)

		m.write("run/espmirror/pending", "", 0o644)
		m.write("run/espmirror/wait.1", "pid 4242\ndir "+m.path("efi/gone")+"\n", 0o644)
		_, _, took := m.try([]string{"ESPMIRROR_SETTLE_SECONDS=20"}, append(shell, m.lib("queue-sync"), "--settle")...)
		if m.exists("run/espmirror/pending") || m.waits() != "" || took > soon {
			t.Errorf("after %v pending: %v, waits for %q", took, m.exists("run/espmirror/pending"), m.waits())
		}

		// What does not end is waited for no longer than the limit (2 s here).
		m.mkdir("efi/stays")
		m.mkdir("proc/4242")
		for _, what := range []string{"dir " + m.path("efi/stays"), "pid 4242"} {
			m.write("run/espmirror/pending", "", 0o644)
			m.write("run/espmirror/wait.1", what+"\n", 0o644)
			_, status, took := m.try(nil, append(shell, m.lib("queue-sync"), "--settle")...)
			if status != 0 || took < 1900*time.Millisecond || took > soon || m.waits() != "" {
				t.Errorf("%s: status %d after %v, waits for %q", what, status, took, m.waits())
			}
		}
	})
}

// scriptDirs are those with scripts that go elsewhere; `make lint` looks at the others.
var scriptDirs = []string{"lib", "dracut", "initramfs-tools", "mkinitcpio", "kernel-install", "debian", "packages", "vm/guest"}

// TestShellcheck covers every script of these, in the dialect of who runs it.
func TestShellcheck(t *testing.T) {
	t.Parallel()
	need(t, "shellcheck")
	dialects := map[string]string{"#!/bin/sh": "sh", "#!/bin/bash": "bash", "#!/usr/bin/ash": "dash"}
	byDialect := map[string][]string{}
	for _, dir := range scriptDirs {
		err := filepath.WalkDir("../"+dir, func(path string, d fs.DirEntry, err error) error {
			if err != nil || d.IsDir() {
				return err
			}
			switch d.Name() {
			case "files", "nfpm.yaml", "vm.service":
				return nil
			case "run": // sourced by init
				byDialect["sh"] = append(byDialect["sh"], path)
				return nil
			case "espmirror.conf": // sourced by mkinitcpio
				byDialect["bash"] = append(byDialect["bash"], path)
				return nil
			}
			data, err := os.ReadFile(path)
			first, _, _ := strings.Cut(string(data), "\n")
			dialect, known := dialects[first]
			if !known {
				t.Errorf("%s begins with %q", path, first)
			}
			byDialect[dialect] = append(byDialect[dialect], path)
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	if len(byDialect["sh"]) < 16 || len(byDialect["bash"]) < 3 || len(byDialect["dash"]) < 1 {
		t.Errorf("found only %v", byDialect)
	}
	for dialect, files := range byDialect {
		if out, err := exec.Command("shellcheck", append([]string{"-s", dialect}, files...)...).CombinedOutput(); err != nil {
			t.Errorf("%v\n%s", err, out)
		}
	}
}

// TestInstall: `make install` and `make uninstall` do and undo the same, whatever the umask.
func TestInstall(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	binary := filepath.Join(dir, "binary")
	if err := os.WriteFile(binary, []byte("\x7fELF @SBINDIR@"), 0o755); err != nil {
		t.Fatal(err)
	}
	call := func(what string, vars ...string) {
		t.Helper()
		cmd := exec.Command("sh", "-c", "umask 077; exec scripts/packages/install "+what)
		cmd.Dir = "../.."
		cmd.Env = append(os.Environ(), append(vars, "DESTDIR="+dir+"/root", "BINARY="+binary, "INITRDBINARY="+binary)...)
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("%v\n%s", err, out)
		}
	}
	list := func() (files []string) {
		filepath.WalkDir(dir+"/root", func(path string, d fs.DirEntry, err error) error {
			if err == nil && !d.IsDir() {
				files = append(files, strings.TrimPrefix(path, dir+"/root"))
			}
			return err
		})
		return files
	}
	call("install", "PREFIX=/usr", "FORMATS=deb")
	files := list()
	placeholder := regexp.MustCompile(`@[A-Z]+@`)
	for _, f := range files {
		info, err := os.Lstat(dir + "/root" + f)
		if err != nil {
			t.Fatal(err)
		}
		data, _ := os.ReadFile(dir + "/root" + f)
		switch mode := info.Mode(); {
		case mode&fs.ModeSymlink != 0:
			if _, err := os.Stat(dir + "/root" + f); err != nil {
				t.Errorf("%s leads nowhere: %v", f, err)
			}
			continue
		case strings.HasPrefix(string(data), "#!") && mode.Perm() != 0o755 && !strings.Contains(f, "/initcpio/"):
			t.Errorf("%s has mode %v", f, mode)
		case mode.Perm() != 0o755 && mode.Perm() != 0o644:
			t.Errorf("%s has mode %v", f, mode)
		}
		if f == "/usr/sbin/espmirror" || f == "/usr/lib/espmirror/espmirror-initrd" {
			if string(data) != "\x7fELF @SBINDIR@" {
				t.Errorf("the binary was changed: %q", data)
			}
			continue
		}
		if found := placeholder.Find(data); found != nil && !strings.HasSuffix(f, "README.md") {
			t.Errorf("%s: %s is left", f, found)
		}
		if strings.Contains(string(data), "/usr/local") && !strings.HasSuffix(f, "README.md") {
			t.Errorf("%s names /usr/local", f)
		}
	}
	for _, want := range []string{"/usr/sbin/espmirror", "/etc/kernel/postinst.d/zzz-espmirror", "/etc/kernel/postrm.d/zzz-espmirror",
		"/etc/initramfs/post-update.d/zzz-espmirror", "/usr/lib/kernel/install.d/95-espmirror.install",
		"/usr/share/initramfs-tools/hooks/espmirror", "/usr/share/initramfs-tools/scripts/local-premount/espmirror", "/usr/share/initramfs-tools/scripts/local-bottom/espmirror",
		"/usr/lib/systemd/system/espmirror-sync.service", "/usr/lib/udev/rules.d/90-espmirror.rules"} {
		if !slices.Contains(files, want) {
			t.Errorf("%s is missing in %q", want, files)
		}
	}
	for _, f := range files {
		if strings.Contains(f, "initcpio") || strings.Contains(f, "libalpm") {
			t.Errorf("%s is in a Debian package", f)
		}
	}
	filepath.WalkDir(dir+"/root", func(path string, d fs.DirEntry, err error) error {
		if info, err := d.Info(); err == nil && d.IsDir() && path != dir+"/root" && info.Mode().Perm() != 0o755 {
			t.Errorf("%s has mode %v", path, info.Mode())
		}
		return err
	})
	call("uninstall", "PREFIX=/usr")
	if left := list(); left != nil {
		t.Errorf("left behind: %q", left)
	}
	if _, err := os.Stat(dir + "/root/usr/lib/espmirror"); err == nil {
		t.Error("/usr/lib/espmirror is left")
	}

	// Another prefix: all that name a file of ours name it there, and what others look for is where they look.
	call("install", "PREFIX=/opt/e", "SBINDIR=/opt/e/x")
	text, _ := os.ReadFile(dir + "/root/usr/lib/kernel/install.d/95-espmirror.install")
	if !strings.Contains(string(text), "/opt/e/lib/espmirror/queue-sync") {
		t.Errorf("the plugin does not know the prefix: %s", text)
	}
	text, _ = os.ReadFile(dir + "/root/opt/e/lib/espmirror/queue-sync")
	if !strings.Contains(string(text), "espmirror=/opt/e/x/espmirror\n") {
		t.Error("queue-sync does not know SBINDIR")
	}
}
