package main

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"os/exec"
	"slices"
	"strings"
)

// result is one word, or two.
func (o *outcome) result() string {
	switch {
	case errors.Is(o.err, errMissing):
		return "skipped"
	case o.err != nil:
		return "FAILED"
	}
	return "ok"
}

// seconds are some figures in a cell: all of a few, else the middle and the largest.
func seconds(v []float64, digits int) string {
	f := func(t float64) string { return fmt.Sprintf("%.*f", digits, t) }
	if len(v) == 0 {
		return "–"
	}
	if len(v) > 4 {
		return fmt.Sprintf("median %s, largest %s of %d", f(median(v)), f(slices.Max(v)), len(v))
	}
	var s []string
	for _, t := range v {
		s = append(s, f(t))
	}
	return strings.Join(s, ", ")
}

// table is the report, in Markdown.
func (l *lab) table(ctx context.Context, done []outcome) string {
	var b strings.Builder
	fmt.Fprintf(&b, "# Boots in virtual machines\n\n`make vm` wrote this, at commit %s.\n\n", output(ctx, "git", "describe", "--always", "--dirty", "--exclude=*"))
	b.WriteString("| | scenario | result | espmirror, seconds | kernel to init, seconds | what was shown |\n|---|---|---|---:|---:|---|\n")
	for i := range done {
		o := &done[i]
		shown := strings.Join(o.proved, "; ")
		if o.err != nil {
			first, _, _ := strings.Cut(o.err.Error(), "\n")
			shown = strings.ReplaceAll(first, "|", "/")
		}
		var up []float64
		for _, t := range o.boots {
			if t > 0 {
				up = append(up, t)
			}
		}
		fmt.Fprintf(&b, "| %s | %s | %s | %s | %s | %s |\n", o.name, o.what, o.result(), seconds(o.took, 2), seconds(up, 1), shown)
	}
	b.WriteString(`
Both times are by the guest's clock, one for each boot. espmirror's is what the last line of ` + "`espmirror early`" + ` in the
kernel's log says, waiting for disks included; a boot that was cut off has none. QEMU emulates the processor, which takes ten
to twenty times as long as hardware.

`)
	for i := range done {
		o := &done[i]
		if len(o.notes) == 0 {
			continue
		}
		fmt.Fprintf(&b, "**%s**\n\n", o.name)
		for _, n := range o.notes {
			fmt.Fprintf(&b, "- %s\n", n)
		}
		b.WriteString("\n")
	}
	b.WriteString("**Versions**\n\n")
	version, _, _ := strings.Cut(output(ctx, "qemu-system-x86_64", "--version"), "\n")
	fmt.Fprintf(&b, "- %s; OVMF %s\n", version, output(ctx, "dpkg-query", "-W", "-f", "${Version}", "ovmf"))
	for _, kind := range slices.Sorted(maps.Keys(l.guests)) {
		f := l.guests[kind].facts
		fmt.Fprintf(&b, "- Debian %s: Linux %s, systemd and systemd-boot %s, %s %s\n", f["debian"], f["kernel"], f["systemd"], kind, f[kind])
	}
	return b.String()
}

// output is what a program prints, "unknown" if it cannot.
func output(ctx context.Context, name string, args ...string) string {
	b, err := exec.CommandContext(ctx, name, args...).Output()
	if err != nil {
		return "unknown"
	}
	return strings.TrimSpace(string(b))
}
