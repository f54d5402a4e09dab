// Package mutants is the negative control of the crash tests: the product with one barrier, one order or one check taken
// out, which the crash tests must notice.
//
// The product's source stays as it is. The mutants are a table of patches, which go build's -overlay applies all at
// once; which of them is on is decided when the program runs. Each runs in a process of its own, as it may hang or panic.
package mutants

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"go/format"
	"os"
	"os/exec"
	"path/filepath"
	"sort"
	"strings"
)

// reach is how far behind the beginning of its anchor a patch may change something.
const reach = 1500

type edit struct {
	from, to int
	text     string
	of       string
}

// find returns what a patch changes in a source.
func (p *Patch) find(src []byte, of string) (edit, error) {
	if n := bytes.Count(src, []byte(p.At)); n != 1 || p.At == "" {
		return edit{}, fmt.Errorf("mutant %q: %s has the anchor %q %d times, not once", of, p.File, p.At, n)
	}
	at := bytes.Index(src, []byte(p.At))
	if p.Old == "" {
		at += len(p.At)
		return edit{at, at, p.New, of}, nil
	}
	k := bytes.Index(src[at:min(at+reach, len(src))], []byte(p.Old))
	if k < 0 {
		return edit{}, fmt.Errorf("mutant %q: %s has no %q at the anchor %q", of, p.File, p.Old, p.At)
	}
	return edit{at + k, at + k + len(p.Old), p.New, of}, nil
}

// overlay applies all patches to the sources below dir and returns the patched files.
func overlay(dir string) (map[string][]byte, error) {
	edits := map[string][]edit{}
	sources := map[string][]byte{}
	add := func(p Patch, of string) error {
		src, ok := sources[p.File]
		if !ok {
			var err error
			if src, err = os.ReadFile(filepath.Join(dir, p.File)); err != nil {
				return err
			}
			sources[p.File] = src
		}
		e, err := p.find(src, of)
		edits[p.File] = append(edits[p.File], e)
		return err
	}
	all := ""
	for _, p := range common {
		if err := add(p, "common"); err != nil {
			return nil, err
		}
		all += p.New
	}
	seen := map[string]bool{}
	for _, m := range Table {
		if seen[m.Name] {
			return nil, fmt.Errorf("there are two mutants %q", m.Name)
		}
		seen[m.Name] = true
		for _, p := range m.Patches {
			if err := add(p, m.Name); err != nil {
				return nil, err
			}
			all += p.New
		}
	}
	for _, m := range Table {
		if !strings.Contains(all, `("`+m.Name+`"`) {
			return nil, fmt.Errorf("no patch asks for mutant %q", m.Name)
		}
	}
	out := map[string][]byte{}
	for file, list := range edits {
		sort.SliceStable(list, func(i, j int) bool { return list[i].from < list[j].from })
		src := sources[file]
		var b bytes.Buffer
		at := 0
		for i, e := range list {
			if e.from < at {
				return nil, fmt.Errorf("mutants %q and %q change the same place of %s", list[i-1].of, e.of, file)
			}
			b.Write(src[at:e.from])
			b.WriteString(e.text)
			at = e.to
		}
		b.Write(src[at:])
		text, err := format.Source(b.Bytes())
		if err != nil {
			return nil, fmt.Errorf("%s does not parse with the mutants in it: %w", file, err)
		}
		out[file] = text
		pkg := filepath.Dir(file)
		out[filepath.Join(pkg, "mutant_selector.go")] = fmt.Appendf(nil, selector, filepath.Base(pkg))
	}
	return out, nil
}

// Build makes the suite with all mutants in it. dir is the module's root, work an empty directory for what it takes; the
// path of the program is returned.
func Build(ctx context.Context, dir, work string) (string, error) {
	files, err := overlay(dir)
	if err != nil {
		return "", fmt.Errorf("cannot build the mutants: %w", err)
	}
	root, err := filepath.Abs(dir)
	if err != nil {
		return "", err
	}
	replace := map[string]string{}
	for file, text := range files {
		to := filepath.Join(work, strings.ReplaceAll(file, "/", "_"))
		if err := os.WriteFile(to, text, 0o644); err != nil {
			return "", err
		}
		replace[filepath.Join(root, file)] = to
	}
	list, err := json.Marshal(map[string]any{"Replace": replace})
	if err != nil {
		return "", err
	}
	if err := os.WriteFile(filepath.Join(work, "overlay.json"), list, 0o644); err != nil {
		return "", err
	}
	bin := filepath.Join(work, "suite")
	cmd := exec.CommandContext(ctx, "go", "build", "-overlay", filepath.Join(work, "overlay.json"), "-o", bin, "./replicate/crashtest/mutants/suite")
	cmd.Dir = root
	if out, err := cmd.CombinedOutput(); err != nil {
		return "", fmt.Errorf("cannot build the mutants: %w\n%s", err, out)
	}
	return bin, nil
}
