//go:build !initrd

package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	"espmirror/replicate"
	"espmirror/replicate/archive"
)

// standardInput is the name of an archive that comes through a pipe, and of one that goes into one.
const standardInput = "-"

// isArchive says whether a name is an archive, which only a primary may be.
func isArchive(name string) bool { return name == standardInput || archive.Is(name) }

// openArchive opens the archive that is the primary. It comes from standard input once: a run opens its primary once.
func (inv *invocation) openArchive(name string) (replicate.Source, error) {
	if name != standardInput {
		return archive.OpenFile(inv.ctx, name, archive.Limits{})
	}
	if isTerminal(inv.stdin) {
		return nil, &usageError{"standard input is a terminal, and no archive", "give it one: `tar -c -C DIR . | espmirror … --primary -`"}
	}
	return archive.Open(inv.ctx, "standard input", inv.stdin, archive.Limits{})
}

// isTerminal says whether somebody sits at what is read.
func isTerminal(r io.Reader) bool {
	f, ok := r.(*os.File)
	return ok && terminalWidth(f) > 0
}

// notATarget refuses the names that only a primary may have.
func notATarget(verb, name string) error {
	var what string
	switch {
	case isDir(name):
		what = "a directory"
	case isArchive(name):
		what = "an archive"
	default:
		return nil
	}
	return refusef("cannot %s %s: it is %s, and a target is a device or an image", verb, name, what)
}

type archiveWriter func(context.Context, io.Writer, fs.FS, []archive.Member, time.Time) error

// archiveFormats are the values of --format that make one file.
var archiveFormats = map[string]archiveWriter{"tar": archive.WriteTar, "cpio": archive.WriteCPIO}

// extractArchive writes files of a volume as one archive, to standard output or into a file.
func (inv *invocation) extractArchive(format, to, name string, paths []string) (report, error) {
	toStdout := to == "" || to == standardInput
	if toStdout && inv.json != "off" {
		return nil, &usageError{"the output is the archive itself, and cannot be JSON", "name a file with --to"}
	}
	if toStdout && inv.terminalWidth(inv.stdout) > 0 {
		return nil, &usageError{"the archive would go to a terminal", "redirect it, or name a file with --to"}
	}
	latest, err := sourceDate()
	if err != nil {
		return nil, err
	}
	v, tree, err := inv.openTree("extract from", name)
	if err != nil {
		return nil, err
	}
	defer v.Close()
	if len(paths) == 0 {
		paths = []string{"/"}
	}
	fail := func(err error) (report, error) { return nil, fmt.Errorf("cannot extract from %s: %w", name, err) }
	x := &extractor{inv: inv, tree: tree, volume: name}
	own := inv.flag("all")
	for i, p := range paths {
		if paths[i], err = x.realPath(fsPath(p)); err != nil {
			return fail(fmt.Errorf("cannot read %s: %w", p, cause(err)))
		}
	}
	members, err := archive.Members(tree, paths, func(p string) bool {
		if own || !archive.OwnFiles(p) || named(paths, p) {
			return false
		}
		inv.log.Info("left out, as it belongs to this volume alone; --all brings it", "path", p)
		return true
	})
	if err != nil {
		return fail(err)
	}
	write := func(w io.Writer) error {
		err := archiveFormats[format](inv.ctx, w, tree, members, latest)
		if err != nil {
			return fmt.Errorf("cannot extract from %s: %w", name, err)
		}
		return nil
	}
	if toStdout {
		return nil, write(inv.out)
	}
	rep := &extractReport{Volume: name, To: to, Files: []extractedFile{}, quiet: inv.quiet, verbose: inv.verbose}
	if err := writeFile(to, inv.flag("overwrite"), write); err != nil {
		return rep, err
	}
	for _, m := range members {
		if !m.Dir {
			rep.Files = append(rep.Files, extractedFile{m.Path, m.Size})
		}
	}
	return rep, nil
}

// named says whether a path is one of the arguments, or lies in one that is itself a volume's own.
func named(paths []string, p string) bool {
	for _, q := range paths {
		if archive.OwnFiles(q) && (p == q || strings.HasPrefix(p, q+"/")) {
			return true
		}
	}
	return false
}

// writeFile writes a file whole, or leaves what was there.
func writeFile(name string, overwrite bool, write func(io.Writer) error) error {
	fail := func(err error) error { return fmt.Errorf("cannot write %s: %w", name, cause(err)) }
	if _, err := os.Lstat(name); err == nil && !overwrite {
		return withHint(fail(fs.ErrExist), "use --overwrite to replace it")
	}
	if info, err := os.Stat(name); err == nil && !info.Mode().IsRegular() {
		return refusal{fail(errors.New("it is no regular file"))}
	}
	f, err := os.CreateTemp(filepath.Dir(name), ".espmirror-extract-")
	if err != nil {
		return fail(err)
	}
	defer os.Remove(f.Name()) // gone under that name when all went well
	w := bufio.NewWriterSize(f, 1<<20)
	if err = write(w); err != nil {
		f.Close()
		return err
	}
	if err = w.Flush(); err == nil {
		err = f.Chmod(0o644)
	}
	if err == nil {
		err = f.Sync() // the name may be on the medium before the data, where another file had it
	}
	if cerr := f.Close(); err == nil {
		err = cerr
	}
	if err == nil {
		err = os.Rename(f.Name(), name)
	}
	if err != nil {
		return fail(err)
	}
	return nil
}

// archiveErrors are those for which the source is refused.
var archiveErrors = []error{archive.ErrDamaged, archive.ErrTooLarge}
