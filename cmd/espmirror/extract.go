package main

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"strings"

	"github.com/urfave/cli/v2"
)

func (inv *invocation) extractCommand() *cli.Command {
	return &cli.Command{
		Name:      "extract",
		Usage:     "copy files and directories of a volume into a directory or an archive",
		UsageText: "espmirror extract [--overwrite] --to DIR VOLUME [PATH]...\nespmirror extract --format=tar|cpio [--overwrite] [--all] [--to FILE] VOLUME [PATH]...",
		Description: "Files keep their path below DIR, and their time (FAT's local time is taken for UTC). Without a PATH the\n" +
			"whole volume is taken. Nothing is written outside DIR, whatever the names on the volume.\n\n" +
			"An archive goes to standard output, or into FILE. The same files give the same bytes on any machine: sorted by\n" +
			"path, owner 0, no date later than SOURCE_DATE_EPOCH when that is set. As others will unpack it, loader/random-seed\n" +
			"and EFI/espmirror are left out, unless they are named or --all is given.",
		Flags: []cli.Flag{
			&cli.GenericFlag{Name: "to", Value: &once{}, Usage: "write below this `DIR`, which is made when it is missing; an archive into this file (default: -, standard output)"},
			&cli.StringFlag{Name: "format", Value: "files", Usage: "write `FORMAT`: files, or one archive: tar (ustar and pax) or cpio (newc)"},
			&cli.BoolFlag{Name: "all", Usage: "take the random seed and espmirror's own files into an archive", DisableDefaultText: true},
			&cli.BoolFlag{Name: "overwrite", Usage: "replace files that are there already", DisableDefaultText: true},
		},
		Action: inv.action(1, -1, "espmirror extract --to DIR VOLUME [PATH]...", inv.extract),
	}
}

func (inv *invocation) extract() (report, error) {
	name, paths := inv.c.Args().First(), inv.c.Args().Tail()
	to := inv.text("to")
	if format := inv.text("format"); archiveFormats[format] != nil {
		return inv.extractArchive(format, to, name, paths)
	} else if format != "files" {
		return nil, usagef("--format=%s is not files, tar or cpio", format)
	}
	if inv.flag("all") {
		return nil, usagef("--all goes with --format=tar and --format=cpio; as files, everything is taken")
	}
	if to == "" {
		return nil, &usageError{"no directory was given", "name it with --to, before the volume"}
	}
	v, tree, err := inv.openTree("extract from", name)
	if err != nil {
		return nil, err
	}
	defer v.Close()
	if err := os.MkdirAll(to, 0o755); err != nil {
		return nil, fmt.Errorf("cannot create %s: %w", to, cause(err))
	}
	root, err := os.OpenRoot(to)
	if err != nil {
		return nil, fmt.Errorf("cannot open %s: %w", to, cause(err))
	}
	defer root.Close()
	x := &extractor{inv: inv, tree: tree, root: root, overwrite: inv.flag("overwrite"), volume: name}
	x.rep = &extractReport{Volume: name, To: to, Files: []extractedFile{}, quiet: inv.quiet, verbose: inv.verbose}
	if len(paths) == 0 {
		paths = []string{"/"}
	}
	for _, p := range paths {
		if err := x.path(fsPath(p)); err != nil {
			return x.rep, err
		}
	}
	return x.rep, worst(x.errs)
}

// extractor copies out of a volume. Whatever the volume says, os.Root keeps every write below the directory; the names
// are checked besides, so that none becomes another one.
type extractor struct {
	inv       *invocation
	tree      fs.FS
	root      *os.Root
	overwrite bool
	volume    string
	rep       *extractReport
	errs      []error
}

func (x *extractor) failed(p string, err error) {
	x.errs = append(x.errs, fmt.Errorf("cannot extract /%s of %s: %w", strings.TrimPrefix(p, "."), x.volume, cause(err)))
}

// path copies one file, or a directory with all below. What fails is left out and remembered; the error is for what
// ends the run.
func (x *extractor) path(p string) error {
	info, err := fs.Stat(x.tree, p)
	if err != nil {
		x.failed(p, err)
		return nil
	}
	// The case is that of the volume, not that of the command line.
	if p, err = x.realPath(p); err != nil {
		x.failed(p, err)
		return nil
	}
	if err := x.parents(path.Dir(p)); err != nil {
		x.failed(p, err)
		return nil
	}
	return x.walk(p, info)
}

// realPath writes a path as the directories of the volume do.
func (x *extractor) realPath(p string) (string, error) {
	real := "."
	if p == "." {
		return p, nil
	}
	at := "."
	for part := range strings.SplitSeq(p, "/") {
		at = path.Join(at, part)
		info, err := fs.Stat(x.tree, at)
		if err != nil {
			return p, err
		}
		if err := checkName(info.Name()); err != nil {
			return p, err
		}
		real = path.Join(real, info.Name())
	}
	return real, nil
}

// checkName refuses what is no name of one file on this system.
func checkName(name string) error {
	if name == "" || name == "." || name == ".." || strings.ContainsAny(name, "/\\\x00") || !filepath.IsLocal(name) {
		return fmt.Errorf("%q is not the name of a file", name)
	}
	return nil
}

func (x *extractor) parents(dir string) error {
	if dir == "." {
		return nil
	}
	return x.root.MkdirAll(dir, 0o755)
}

func (x *extractor) walk(p string, info fs.FileInfo) error {
	if err := x.inv.ctx.Err(); err != nil {
		return fmt.Errorf("cannot extract /%s of %s: %w", strings.TrimPrefix(p, "."), x.volume, err)
	}
	if !info.IsDir() {
		return x.file(p, info)
	}
	if p != "." {
		if err := x.root.Mkdir(p, 0o755); err != nil && !errors.Is(err, fs.ErrExist) {
			x.failed(p, err)
			return nil
		}
		if at, err := x.root.Lstat(p); err != nil || !at.IsDir() {
			x.failed(p, errors.New("something else than a directory is there"))
			return nil
		}
		x.rep.dirs++
	}
	entries, err := fs.ReadDir(x.tree, p)
	if err != nil {
		x.failed(p, err)
		return nil
	}
	for _, e := range entries {
		sub := p + "/" + e.Name()
		if p == "." {
			sub = e.Name()
		}
		if err := checkName(e.Name()); err != nil {
			x.failed(sub, err)
			continue
		}
		info, err := e.Info()
		if err != nil {
			x.failed(sub, err)
			continue
		}
		if err := x.walk(sub, info); err != nil {
			return err
		}
	}
	// Last, because each file in it has changed the time.
	if t := info.ModTime(); p != "." && !t.IsZero() {
		if err := x.root.Chtimes(p, t, t); err != nil {
			x.failed(p, err)
		}
	}
	return nil
}

func (x *extractor) file(p string, info fs.FileInfo) error {
	err := x.create(p, info)
	switch {
	case err == nil:
		x.rep.Files = append(x.rep.Files, extractedFile{p, info.Size()})
	case x.inv.ctx.Err() != nil:
		return fmt.Errorf("cannot extract /%s of %s: %w", p, x.volume, err)
	case errors.Is(err, fs.ErrExist):
		x.failed(p, withHint(errors.New("it is there already"), "use --overwrite to replace it"))
	default:
		x.failed(p, err)
	}
	return nil
}

// create writes one file whole, or leaves what was there. A new file is made with O_EXCL, which follows no link;
// replacing goes through a second name, because the old content is worth more than half of the new.
func (x *extractor) create(p string, info fs.FileInfo) error {
	at := p
	if x.overwrite {
		at = path.Join(path.Dir(p), ".espmirror-extract.tmp")
		// The volume may have a file of that name, which has been extracted or will be.
		for _, err := fs.Stat(x.tree, at); err == nil; _, err = fs.Stat(x.tree, at) {
			at += "~"
		}
		if err := x.root.Remove(at); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	f, err := x.root.OpenFile(at, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o644)
	if err != nil {
		return err
	}
	err = copyFile(x.inv.ctx, f, x.tree, p)
	if cerr := f.Close(); err == nil {
		err = cerr
	}
	if t := info.ModTime(); err == nil && !t.IsZero() {
		err = x.root.Chtimes(at, t, t)
	}
	if err == nil && x.overwrite {
		err = x.root.Rename(at, p)
	}
	if err != nil {
		_ = x.root.Remove(at)
	}
	return err
}

// extractReport is the result of extract.
type extractReport struct {
	failure
	Volume string          `json:"volume"`
	To     string          `json:"to"`
	Files  []extractedFile `json:"files"`

	dirs           int
	quiet, verbose bool
}

type extractedFile struct {
	Path string `json:"path"`
	Size int64  `json:"size_bytes"`
}

func (r *extractReport) print(o *output) {
	if r.quiet {
		return
	}
	var bytes int64
	for _, f := range r.Files {
		if bytes += f.Size; r.verbose {
			o.printf("%s\n", safe(f.Path))
		}
	}
	o.printf("%s, %s extracted to %s\n", plural(int64(len(r.Files)), "file", "files"), sizeText(bytes), safe(r.To))
}
