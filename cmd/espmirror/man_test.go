package main

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/cpuguy83/go-md2man/v2/md2man"
	"github.com/urfave/cli/v2"

	"espmirror/fixtures"
)

// manFile is the manual page. It is made here, so that the program need not hold what makes it.
const manFile = "../../docs/espmirror.8"

// TestManPage compares the manual page with what the options say; -update writes it. man must have nothing to say of it.
func TestManPage(t *testing.T) {
	inv := &invocation{app: newApp(nil, nil, nil), ctx: context.Background()}
	got := md2man.Render([]byte(manual(inv.cli())))
	file := filepath.Join(sourceDir, manFile)
	if *update {
		if err := os.WriteFile(file, got, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if string(got) != string(want) {
		t.Errorf("%s differs (go test -update writes it)", manFile)
	}
	// troff says of a page what is wrong with it.
	fixtures.Need(t, "groff")
	out, err := exec.Command("groff", "-man", "-ww", "-z", file).CombinedOutput()
	if err != nil || len(out) > 0 {
		t.Errorf("%v\n%s", err, out)
	}
}

// placeholder is how a flag's usage names its value.
var placeholder = regexp.MustCompile("`([^`]+)`")

// manual is the manual page in Markdown.
func manual(app *cli.App) string {
	var sb strings.Builder
	p := func(format string, a ...any) { fmt.Fprintf(&sb, format, a...) }
	text := func(s string) string { return strings.NewReplacer("<", `\<`, "*", `\*`, "_", `\_`).Replace(s) }
	flags := func(all []cli.Flag) {
		for _, f := range all {
			g, ok := f.(cli.DocGenerationFlag)
			v, visible := f.(cli.VisibleFlag)
			if !ok || visible && !v.IsVisible() {
				continue
			}
			var names []string
			for _, n := range f.Names() {
				names = append(names, "**"+strings.Repeat("-", min(len(n), 2))+n+"**")
			}
			value := ""
			usage := g.GetUsage()
			if m := placeholder.FindStringSubmatch(usage); m != nil && g.TakesValue() {
				value = " *" + m[1] + "*"
			}
			if f, ok := f.(*cli.StringFlag); ok && f.Value != "" && !strings.Contains(usage, "(default: ") {
				usage += " (default: " + f.Value + ")"
			}
			p("%s%s\n:   %s\n\n", strings.Join(names, ", "), value, text(placeholder.ReplaceAllString(usage, "$1")))
		}
	}
	// Lines that are indented are as they are: lists of variables and the like.
	prose := func(s string) {
		for line := range strings.Lines(s) {
			if strings.HasPrefix(line, "   ") {
				p("\n    %s\n", strings.TrimSpace(line))
			} else {
				p("%s", text(line))
			}
		}
		p("\n\n")
	}

	p("espmirror 8 \"\" espmirror \"System administration\"\n====\n\n")
	everywhere := map[string]bool{}
	for _, f := range commonFlags() {
		everywhere[f.Names()[0]] = true
	}
	p("# NAME\n\n%s - %s\n\n# SYNOPSIS\n\n", app.Name, app.Usage)
	p("**espmirror** [*OPTIONS*] [*COMMAND*] [*OPTIONS*] [*ARGUMENTS*]\n\n")
	p("# DESCRIPTION\n\nReads the FAT volume of the EFI System Partition that is the primary, and makes the boot files on every target the same, " +
		"inside each target's own filesystem. Nothing is mounted. The power may fail at any moment: firmware finds the old files or the new ones, whole.\n\n" +
		"Without a command, **status** runs. Options stand before the arguments.\n\n# COMMANDS\n\n")
	for _, c := range app.Commands {
		if c.Hidden {
			continue
		}
		p("## %s\n\n%s.", strings.Join(c.Names(), ", "), text(strings.ToUpper(c.Usage[:1])+c.Usage[1:]))
		for line := range strings.Lines(c.UsageText) {
			p("\n\n    %s", strings.TrimSpace(line))
		}
		p("\n\n")
		prose(c.Description)
		var own []cli.Flag
		for _, f := range c.Flags {
			if n := f.Names()[0]; !everywhere[n] && n != "help" {
				own = append(own, f)
			}
		}
		flags(own)
	}
	p("# OPTIONS\n\nFor every command:\n\n")
	flags(commonFlags())
	p("# VOLUMES\n\n%s\n\n", text(volumeHelp))
	_, tail, _ := strings.Cut(appHelp, "\nENVIRONMENT")
	for _, section := range strings.Split("ENVIRONMENT"+tail, "\n\n") {
		title, body, _ := strings.Cut(strings.TrimSpace(section), ":\n")
		p("# %s\n\n", title)
		for line := range strings.Lines(body) {
			name, says, ok := strings.Cut(strings.TrimSpace(line), "  ")
			if ok {
				p("%s\n:   %s\n\n", text(name), text(strings.TrimSpace(placeholder.ReplaceAllString(says, "$1"))))
			} else {
				p("%s\n", text(name))
			}
		}
		p("\n")
	}
	p("# FILES\n\nloader/esp-sync\n:   on each member: the replica set, in the format of loader.conf\n\n" +
		"EFI/espmirror/state\n:   on each member: its generation\n\n" +
		"EFI/espmirror/journal\n:   on each target: what a run was about to do\n\n" +
		"/run/espmirror/pending\n:   made by a hook: **espmirror-sync.service** is asked for\n\n" +
		"# SEE ALSO\n\nbootctl(1), loader.conf(5), fsck.fat(8), kernel-install(8)\n")
	return sb.String()
}
