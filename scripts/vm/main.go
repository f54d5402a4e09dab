// Command vm boots virtual machines in which espmirror does its work where it is meant to be: in initial RAM disks and
// services of Debian, between firmware and kernel, on disks that come and go. It prints a table of what was shown.
//
// A guest is a tree that scripts/vm-tree.sh makes, with espmirror's package installed in it. Firmware is OVMF, the boot
// loader is systemd-boot; QEMU emulates the processor, which takes ten to twenty times as long as hardware.
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
	"slices"
	"strings"
	"sync"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	defer stop()
	if err := run(ctx, os.Stdout, os.Stderr, os.Args[1:]); err != nil {
		fmt.Fprintf(os.Stderr, "vm: %v\n", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, stdout, stderr io.Writer, args []string) error {
	f := flag.NewFlagSet("vm", flag.ContinueOnError)
	verbose := f.Bool("v", false, "tell what happens")
	only := f.String("only", "", "play these scenarios only, separated by commas")
	bin := f.String("bin", "out/espmirror", "the program")
	deb := f.String("deb", "", "the package of the same program")
	cuts := f.Int("cuts", 10, "how often the power is cut, two at least")
	jobs := f.Int("jobs", runtime.NumCPU(), "how many scenarios are played at a time")
	doc := f.String("doc", "", "also write the table to this file, when all scenarios were played")
	if err := f.Parse(args); err != nil {
		return err
	}
	l, err := newLab(*bin, *deb)
	if err != nil {
		return err
	}
	l.cuts = max(*cuts, 2)
	defer os.Remove(l.dir) // stays where a scenario failed
	logf := func(string, ...any) {}
	if *verbose {
		logf = func(format string, a ...any) { fmt.Fprintf(stderr, format+"\n", a...) }
	}
	chosen := scenarios
	if *only != "" {
		chosen = nil
		for _, name := range strings.Split(*only, ",") {
			i := slices.IndexFunc(scenarios, func(sc scenario) bool { return sc.name == name })
			if i < 0 {
				return fmt.Errorf("there is no scenario %q", name)
			}
			chosen = append(chosen, scenarios[i])
		}
	}
	// A machine uses one processor of the host.
	done := make([]outcome, len(chosen))
	turns := make(chan struct{}, max(*jobs, 1))
	var wg sync.WaitGroup
	for i, sc := range chosen {
		wg.Go(func() {
			turns <- struct{}{}
			defer func() { <-turns }()
			if ctx.Err() != nil {
				return
			}
			done[i] = l.play(ctx, sc, logf)
			why := ""
			if err := done[i].err; err != nil {
				why, _, _ = strings.Cut(": "+err.Error(), "\n")
			}
			fmt.Fprintf(stderr, "%s: %s in %.0f s%s\n", sc.name, done[i].result(), done[i].wall.Seconds(), why)
		})
	}
	wg.Wait()
	if ctx.Err() != nil {
		return ctx.Err()
	}
	var errs []error
	for i := range done {
		if o := &done[i]; o.err != nil {
			errs = append(errs, fmt.Errorf("scenario %s: %w", o.name, o.err))
		}
	}
	text := l.table(ctx, done)
	fmt.Fprint(stdout, text)
	if *doc != "" && *only == "" && len(errs) == 0 {
		if err := os.WriteFile(*doc, []byte(text), 0o644); err != nil {
			return err
		}
	}
	return errors.Join(errs...)
}

// newLab makes the place for the machines. The working directory is the top of the source.
func newLab(bin, deb string) (*lab, error) {
	repo, err := os.Getwd()
	if err != nil {
		return nil, err
	}
	// Not below t.TempDir or the like: paths of sockets must be short.
	dir, err := os.MkdirTemp("", "espmirror-vm-")
	if err != nil {
		return nil, err
	}
	l := &lab{dir: dir, repo: repo, guests: map[string]*guest{}}
	for to, from := range map[*string]string{&l.bin: bin, &l.deb: deb} {
		if *to, err = filepath.Abs(from); err != nil {
			return nil, err
		}
		if info, err := os.Stat(*to); err != nil || !info.Mode().IsRegular() {
			return nil, fmt.Errorf("cannot use %q: not a file", from)
		}
	}
	return l, nil
}
