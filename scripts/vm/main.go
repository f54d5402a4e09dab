// Command vm boots virtual machines in which espmirror does its work where it is meant to be: in initial RAM disks and
// services of Debian, between firmware and kernel on disks that come and go. It prints a table of what was shown.
//
// A guest is a tree that scripts/vm-tree.sh makes, with espmirror's package installed in it. Firmware is OVMF, the boot
// loader is systemd-boot; QEMU emulates the processor, which takes ten to twenty times as long as hardware.
package main

import (
	"context"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"slices"
	"strings"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	defer stop()
	if err := run(ctx); err != nil {
		fmt.Fprintf(os.Stderr, "vm: %v\n", err)
		os.Exit(1)
	}
}

func run(ctx context.Context) error {
	verbose := flag.Bool("v", false, "tell what happens")
	only := flag.String("only", "", "play these scenarios only, separated by commas")
	bin := flag.String("bin", "out/espmirror", "the program")
	deb := flag.String("deb", "", "its package")
	flag.Parse()
	repo, err := os.Getwd()
	if err != nil {
		return err
	}
	l := &lab{dir: "/tmp/espmirror-vm", repo: repo, bin: repo + "/" + *bin, deb: *deb, guests: map[string]*guest{}}
	logf := func(string, ...any) {}
	if *verbose {
		logf = func(f string, a ...any) { fmt.Fprintf(os.Stderr, f+"\n", a...) }
	}
	for _, sc := range scenarios {
		if *only != "" && !slices.Contains(strings.Split(*only, ","), sc.name) {
			continue
		}
		o := l.play(ctx, sc, logf)
		fmt.Println(o.name, o.what, o.err, o.proved, o.took, o.boots, o.wall)
	}
	return nil
}
