package main

import (
	"context"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"time"

	"espmirror/fixtures"
)

// scenario is a story with a machine.
type scenario struct {
	name string // a word, for the command line
	what string
	kind string // of the guest
	play func(*scene)
}

// outcome is how a scenario ended.
type outcome struct {
	scenario
	err         error
	proved      []string
	notes       []string
	took, boots []float64
	wall        time.Duration
}

// play plays a scenario. Its disks and logs go unless it fails.
func (l *lab) play(ctx context.Context, sc scenario, logf func(string, ...any)) (o outcome) {
	o.scenario = sc
	begin := time.Now()
	s := &scene{lab: l, ctx: ctx, dir: filepath.Join(l.dir, sc.name), logf: logf}
	defer func() {
		if p := recover(); p != nil {
			f, ok := p.(failure)
			if !ok {
				panic(p)
			}
			o.err = f.error
			if s.last != nil {
				o.err = fmt.Errorf("%w\nespmirror said: %q\nthe last lines of the console:\n%s\ndisks and logs are in %s", f.error, s.last.said(), s.last.tail(25), s.dir)
			}
		} else {
			os.RemoveAll(s.dir)
		}
		o.proved, o.notes, o.took, o.boots, o.wall = s.proved, s.notes, s.took, s.boots, time.Since(begin)
	}()
	var err error
	s.g, err = l.guest(ctx, sc.kind)
	s.must(err)
	s.must(os.RemoveAll(s.dir))
	s.must(os.MkdirAll(s.dir, 0o755))
	sc.play(s)
	fixtures.Count("scenarios in a virtual machine", 1)
	return o
}

func sectionOf(f io.ReaderAt, d *disk) io.ReaderAt { return io.NewSectionReader(f, espOff, d.size) }
