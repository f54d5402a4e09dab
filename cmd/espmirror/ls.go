package main

import (
	"fmt"
	"io/fs"
	"path"
	"strings"
	"time"

	"github.com/urfave/cli/v2"

	"espmirror/fatdriver"
)

func (inv *invocation) lsCommand() *cli.Command {
	return &cli.Command{
		Name:      "ls",
		Usage:     "list files of a volume, without mounting it",
		UsageText: "espmirror ls [-l] [-R] VOLUME [PATH]...",
		Description: "Hidden files are listed too. Times are shown as the volume keeps them, which FAT does in local time;\n" +
			"those of an exFAT volume in UTC.",
		Flags: []cli.Flag{
			&cli.BoolFlag{Name: "long", Aliases: []string{"l"}, Usage: "attributes (d directory, r read-only, h hidden, s system, a archive), bytes, time and name", DisableDefaultText: true},
			&cli.BoolFlag{Name: "recursive", Aliases: []string{"R"}, Usage: "all that lies below, too", DisableDefaultText: true},
		},
		Action: inv.action(1, -1, "name the volume: espmirror ls VOLUME [PATH]...", inv.ls),
	}
}

// openTree opens a volume and reads its tree. Damage does not stop those who only look: it is logged, and shows again
// where a file cannot be read.
func (inv *invocation) openTree(verb, name string) (*volume, fs.FS, error) {
	v, err := inv.openReadable(verb, name)
	if err != nil {
		return nil, nil, err
	}
	tree, err := v.tree()
	if err != nil {
		_ = v.Close()
		return nil, nil, fmt.Errorf("cannot %s %s: %w", verb, name, err)
	}
	if err := tree.Damage(); err != nil {
		inv.log.Warn(err.Error(), "volume", name)
	}
	return v, tree.FS(), nil
}

// fsPath writes a path as io/fs wants it: "/EFI//BOOT" and `EFI\BOOT` are "EFI/BOOT".
func fsPath(p string) string {
	if parts := fatdriver.SplitPath(p); len(parts) > 0 {
		return strings.Join(parts, "/")
	}
	return "."
}

// cause strips the verb and the path that io/fs adds, which our own message has.
func cause(err error) error {
	if pe, ok := err.(*fs.PathError); ok {
		return pe.Err
	}
	return err
}

func (inv *invocation) ls() (report, error) {
	name, paths := inv.c.Args().First(), inv.c.Args().Tail()
	v, tree, err := inv.openTree("list", name)
	if err != nil {
		return nil, err
	}
	defer v.Close()
	if len(paths) == 0 {
		paths = []string{"/"}
	}
	l := &lister{inv: inv, tree: tree, volume: name, recursive: inv.flag("recursive")}
	l.rep = &lsReport{Volume: name, Entries: []lsEntry{}, long: inv.flag("long")}
	for _, p := range paths {
		if err := l.path(fsPath(p)); err != nil {
			if inv.ctx.Err() != nil {
				return l.rep, err
			}
			l.errs = append(l.errs, err)
		}
	}
	l.rep.headings = l.rep.dirs > 1 || len(paths) > 1
	return l.rep, worst(l.errs)
}

// lister collects what ls shows.
type lister struct {
	inv       *invocation
	tree      fs.FS
	volume    string
	recursive bool
	rep       *lsReport
	errs      []error
}

func (l *lister) error(p string, err error) error {
	return fmt.Errorf("cannot list /%s of %s: %w", strings.TrimPrefix(p, "."), l.volume, cause(err))
}

func (l *lister) path(p string) error {
	info, err := fs.Stat(l.tree, p)
	if err != nil {
		return l.error(p, err)
	}
	if info.IsDir() {
		return l.dir(p)
	}
	l.rep.add(p, "", info)
	return nil
}

func (l *lister) dir(p string) error {
	if err := l.inv.ctx.Err(); err != nil {
		return err
	}
	l.rep.dirs++
	entries, err := fs.ReadDir(l.tree, p)
	if err != nil {
		return l.error(p, err)
	}
	var below []string
	for _, e := range entries {
		info, err := e.Info()
		if err != nil {
			return l.error(path.Join(p, e.Name()), err)
		}
		l.rep.add(path.Join(p, e.Name()), p, info)
		if e.IsDir() {
			below = append(below, path.Join(p, e.Name()))
		}
	}
	if len(entries) == 0 {
		l.rep.shown = append(l.rep.shown, lsLine{dir: p})
	}
	if !l.recursive {
		return nil
	}
	for _, d := range below {
		if err := l.dir(d); err != nil {
			if l.inv.ctx.Err() != nil {
				return err
			}
			l.errs = append(l.errs, err)
		}
	}
	return nil
}

// lsReport is the result of ls.
type lsReport struct {
	failure
	Volume  string    `json:"volume"`
	Entries []lsEntry `json:"entries"`

	shown          []lsLine
	dirs           int
	long, headings bool
}

// lsLine places an entry for people: below the heading of its directory, "" for a file that was named by itself.
type lsLine struct {
	dir   string
	entry int // index of the entry + 1; 0 for an empty directory
}

type lsEntry struct {
	Path     string   `json:"path"`
	Type     string   `json:"type"` // file or directory
	Size     int64    `json:"size_bytes"`
	Modified string   `json:"modified,omitempty"` // local time of whoever wrote it, no zone is recorded
	Attrs    []string `json:"attributes"`

	bits byte
}

var attrNames = []struct {
	bit    byte
	letter byte
	name   string
}{
	{fatdriver.AttrReadOnly, 'r', "read-only"}, {fatdriver.AttrHidden, 'h', "hidden"},
	{fatdriver.AttrSystem, 's', "system"}, {fatdriver.AttrArchive, 'a', "archive"},
}

func (r *lsReport) add(p, dir string, info fs.FileInfo) {
	e := lsEntry{Path: p, Type: "file", Size: info.Size(), Attrs: []string{}}
	if info.IsDir() {
		e.Type = "directory"
	}
	if t := info.ModTime(); !t.IsZero() {
		e.Modified = t.Format("2006-01-02T15:04:05")
	}
	if n, ok := info.Sys().(*fatdriver.Node); !ok {
		e.bits = exfatAttr(info.Sys())
	} else if n.Entry != nil {
		e.bits = n.Entry.Attr()
	}
	for _, a := range attrNames {
		if e.bits&a.bit != 0 {
			e.Attrs = append(e.Attrs, a.name)
		}
	}
	r.Entries = append(r.Entries, e)
	r.shown = append(r.shown, lsLine{dir, len(r.Entries)})
}

func (r *lsReport) print(o *output) {
	width := 0
	for _, e := range r.Entries {
		width = max(width, len(fmt.Sprint(e.Size)))
	}
	heading := ""
	for i, l := range r.shown {
		if r.headings && l.dir != heading {
			if i > 0 {
				o.printf("\n")
			}
			if heading = l.dir; heading != "" {
				o.printf("/%s:\n", safe(strings.TrimPrefix(heading, ".")))
			}
		}
		if l.entry == 0 {
			continue
		}
		e := &r.Entries[l.entry-1]
		name := e.Path
		if l.dir != "" {
			name = path.Base(e.Path)
		}
		name = safe(name)
		if e.Type == "directory" {
			name += "/"
		}
		if r.long {
			o.printf("%s %*d %s %s\n", e.mode(), width, e.Size, e.when(), name)
		} else {
			o.printf("%s\n", name)
		}
	}
}

func (e *lsEntry) mode() string {
	m := []byte("-----")
	if e.Type == "directory" {
		m[0] = 'd'
	}
	for i, a := range attrNames {
		if e.bits&a.bit != 0 {
			m[i+1] = a.letter
		}
	}
	return string(m)
}

func (e *lsEntry) when() string {
	t, err := time.Parse("2006-01-02T15:04:05", e.Modified)
	if err != nil {
		return "               -"
	}
	return t.Format("2006-01-02 15:04")
}
