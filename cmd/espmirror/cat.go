package main

import (
	"context"
	"fmt"
	"io"
	"io/fs"
	"strings"

	"github.com/urfave/cli/v2"

	"espmirror/replicate"
)

func (inv *invocation) catCommand() *cli.Command {
	return &cli.Command{
		Name:        "cat",
		Usage:       "write files of a volume to standard output, byte for byte",
		UsageText:   "espmirror cat VOLUME PATH...",
		Description: "The files are the output, so --json is refused; `ls` and `extract` have it.",
		Action:      inv.action(2, -1, "name the volume and the files: espmirror cat VOLUME PATH...", inv.cat),
	}
}

func (inv *invocation) cat() (report, error) {
	if inv.json != "off" {
		return nil, &usageError{"the output of cat is the file itself, and cannot be JSON", "use `espmirror extract --json=pretty`"}
	}
	name, paths := inv.c.Args().First(), inv.c.Args().Tail()
	v, tree, err := inv.openTree("read", name)
	if err != nil {
		return nil, err
	}
	defer v.Close()
	var errs []error
	for _, p := range paths {
		p = fsPath(p)
		if err := copyFile(inv.ctx, inv.out, tree, p); err != nil {
			err = fmt.Errorf("cannot read /%s of %s: %w", strings.TrimPrefix(p, "."), name, cause(err))
			if inv.ctx.Err() != nil {
				return nil, err
			}
			errs = append(errs, err)
		}
	}
	return nil, worst(errs)
}

// copyFile copies one file of a volume to w.
func copyFile(ctx context.Context, w io.Writer, tree fs.FS, p string) error {
	f, err := tree.Open(p)
	if err != nil {
		return err
	}
	defer f.Close()
	// The buffer is ours: with os.File's own ReadFrom nobody would look at ctx.
	_, err = io.CopyBuffer(struct{ io.Writer }{w}, replicate.ContextReader(ctx, f), make([]byte, 1<<20))
	return err
}
