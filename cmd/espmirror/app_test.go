package main

import (
	"context"
	"errors"
	"strings"
	"testing"

	"espmirror/fixtures"
)

func TestHelp(t *testing.T) {
	b := newBench(t)
	b.run("--help").want(0).golden("help")
	for _, cmd := range []string{"list", "status", "sync", "verify", "recover", "init", "add", "remove", "wait", "early", "check", "ls", "cat", "extract"} {
		b.run(cmd, "--help").want(0).golden("help-" + cmd)
	}
}

func TestVersion(t *testing.T) {
	b := newBench(t)
	if r := b.run("--version").want(0); r.stdout != "espmirror "+version+"\n" {
		t.Errorf("got %q", r.stdout)
	}
	b.run("--json=short", "--version").want(0).json("version")
}

// TestUsage holds every command line that must be refused for what it says, before anything is opened.
func TestUsage(t *testing.T) {
	b := newBench(t)
	small := fixtures.VolumeSpec{FAT: 12, Size: 1 << 20, Serial: 1, Tree: bootTree}
	makeFixture(t, small, "a.img")
	makeFixture(t, small, "b.img")
	for _, tc := range []struct {
		args string
		want string
	}{
		{"bogus", `there is no command "bogus"`},
		{"--bogus", "unknown option --bogus"},
		{"-x", "unknown option -x"},
		{"sync --bogus", "unknown option --bogus"},
		{"sync a.img b.img --dry-run", `"--dry-run" stands behind an argument`},
		{"sync a.img b.img", "no argument is taken"},
		{"sync --target b.img a.img", "no argument is taken"},
		{"sync --target", "option --target needs a value"},
		{"sync --target= --primary a.img", "option --target has an empty value"},
		{"sync --target b.img --target= --primary a.img", "option --target has an empty value"},
		{"sync --primary a.img --primary b.img --target b.img", "option --primary is given twice"},
		{"--primary a.img --primary=a.img", "option --primary is given twice"},
		{"--primary a.img sync --primary b.img --target b.img", "option --primary is given twice"},
		{"--primary a.img status --primary a.img", "option --primary is given twice"},
		{"sync --keep-free 1 --keep-free 2 --primary a.img --target b.img", "option --keep-free is given twice"},
		{"extract --to x --to y a.img", "option --to is given twice"},
		{"sync --primary= --target b.img", "option --primary has an empty value"},
		{"sync --primary a.img", "no target was given"},
		{"sync --target b.img", "no primary was given"},
		{"sync --primary a.img --target b.img --keep-free=", "option --keep-free has an empty value"},
		{"sync --primary a.img --target b.img --keep-free=lots", `"lots" is not a size`},
		{"sync --primary a.img --target b.img --keep-free=-1", `"-1" is not a size`},
		{"sync --primary a.img --target b.img --keep-free=9999999999G", "too large"},
		{"sync --primary a.img --target b.img --read-back=maybe", "--read-back=maybe is not yes or no"},
		{"sync --primary a.img --target b.img --select=", "option --select has an empty value"},
		{"verify --dry-run --primary a.img --target b.img", "unknown option --dry-run"},
		{"--json=bogus ls a.img", "--json=bogus is not pretty, short or off"},
		{"ls --json=bogus a.img", "--json=bogus is not pretty, short or off"},
		{"ls --json= a.img", "option --json has an empty value"},
		{"ls --color=green a.img", "--color=green is not auto, always or never"},
		{"ls -q -v a.img", "--quiet and --verbose exclude each other"},
		{"--primary a.img ls a.img", "option --primary has no meaning for `ls`"},
		{"ls", "0 arguments were given"},
		{"ls a.img -R", `"-R" stands behind an argument`},
		{"cat a.img", "1 argument was given"},
		{"cat --json=short a.img loader/loader.conf", "cannot be JSON"},
		{"extract a.img", "no directory was given"},
		{"extract a.img --to out", `"--to" stands behind an argument`},
		{"recover", "no volume was given, and no primary"},
		{"recover --primary a.img b.img", "--primary and the names of volumes exclude each other"},
		{"check", "0 arguments were given"},
		{"wait", "name the members"},
		{"wait sda1", `"sda1" is not a partition GUID`},
		{"wait --timeout soon " + guidOne, `"soon" is not a time`},
		{"wait --timeout= " + guidOne, "option --timeout has an empty value"},
		{"wait " + guidOne + " --timeout 5s", `"--timeout" stands behind an argument`},
		{"ls --timeout 5s a.img", "unknown option --timeout"},
		{"--system-root missing list", "--system-root=missing is not a directory"},
		{"--system-root a.img list", "--system-root=a.img is not a directory"},
		{"list --system-root=", "option --system-root has an empty value"},
		{"--system-root . list --system-root .", "option --system-root is given twice"},
		{"status --select loader", "nothing to compare"},
		{"status a.img", "no argument is taken"},
	} {
		args := strings.Fields(tc.args)
		r := b.run(args...).want(exitUsage).has(tc.want)
		if !strings.HasPrefix(tc.args, "cat --json") && r.stdout != "" {
			t.Errorf("%s: stdout is %q", tc.args, r.stdout)
		}
		if !strings.HasPrefix(r.stderr, "espmirror: cannot read the command line: ") {
			t.Errorf("%s: stderr is %q", tc.args, r.stderr)
		}
	}
	b.run("ls", "").want(exitUsage).has("an argument is empty")
	b.run("--json=pretty", "sync", "a.img", "b.img", "--dry-run").want(exitUsage).json("error")
	b.run("--json=pretty", "sync", "--bogus").want(exitUsage).json("error")
	b.run("sync", "--json", "short", "--bogus").want(exitUsage).json("error")
}

// TestGlobalOptions finds the options that all commands have on either side of the command's name.
func TestGlobalOptions(t *testing.T) {
	b := newBench(t)
	volumes(t)
	for _, args := range []string{"--json=short ls a.img", "ls --json=short a.img", "--json=pretty ls --json=short a.img"} {
		if r := b.run(strings.Fields(args)...).want(0); strings.Count(r.stdout, "\n") != 1 {
			t.Errorf("%s: not short: %s", args, r.stdout)
		}
	}
	plain := b.run("list", "a.img").want(0)
	for _, args := range []string{"--no-legend list a.img", "list --no-legend --no-pager a.img"} {
		r := b.run(strings.Fields(args)...).want(0)
		if strings.Contains(r.stdout, "SERIAL") || !strings.Contains(plain.stdout, "SERIAL") {
			t.Errorf("%s: %s", args, r.stdout)
		}
	}
	b.run("--primary", "a.img").want(0).has("primary")
	// A comma belongs to the name.
	b.run("status", "--target", "x,y.img", "--primary", "a.img").want(exitPartial).has(`"x,y.img"`)
}

func TestColor(t *testing.T) {
	b := newBench(t)
	volumes(t)
	args := []string{"--primary", "a.img"}
	if r := b.run(args...).want(0); strings.Contains(r.stdout, "\x1b") {
		t.Errorf("colours without a terminal: %q", r.stdout)
	}
	b.app.terminalWidth = fakeTerminal
	if r := b.run(args...).want(0); !strings.Contains(r.stdout, "\x1b[32mok") {
		t.Errorf("no colours on a terminal: %q", r.stdout)
	}
	t.Setenv("NO_COLOR", "1")
	if r := b.run(args...).want(0); strings.Contains(r.stdout, "\x1b") {
		t.Errorf("colours in spite of NO_COLOR: %q", r.stdout)
	}
	b.run(append(args, "--color=always")...).want(0).has("\x1b[32mok")
	if r := b.run(append(args, "--color=never")...).want(0); strings.Contains(r.stdout, "\x1b") {
		t.Errorf("colours with --color=never: %q", r.stdout)
	}
}

// brokenWriter is a standard output that goes away, as a closed pipe or a full disk does.
type brokenWriter struct{}

func (brokenWriter) Write([]byte) (int, error) { return 0, errors.New("broken pipe") }

func TestBrokenOutput(t *testing.T) {
	b := newBench(t)
	volumes(t)
	b.app.stdout = brokenWriter{}
	b.run("ls", "a.img").want(exitFailed).has("cannot write the result: broken pipe")
	b.run("cat", "a.img", "loader/loader.conf").want(exitFailed).has("broken pipe")
	b.run("--json=short", "list", "a.img").want(exitFailed).has("broken pipe")
}

func TestInterrupted(t *testing.T) {
	b := newBench(t)
	volumes(t)
	ctx, cancel := context.WithCancel(b.ctx)
	cancel()
	b.ctx = ctx
	for _, args := range []string{"ls -R a.img", "cat a.img loader/loader.conf", "extract --to out a.img", "check a.img", "recover a.img"} {
		b.run(strings.Fields(args)...).want(exitInterrupt)
	}
}
