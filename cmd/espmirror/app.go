package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/urfave/cli/v2"

	"espmirror/blockdev"
	"espmirror/fatdriver"
	"espmirror/gpt"
	"espmirror/replicate"
)

// version is set by the release build (-X main.version=…).
var version = "0.1.0-dev"

// app is the program: everything that it has from outside, so that tests can run it in process.
type app struct {
	stdin          io.Reader
	stdout, stderr io.Writer
	system         blockdev.System
	engine         engine
	// terminalWidth gives the columns of a terminal, 0 for anything else.
	terminalWidth func(io.Writer) int
	worker        worker
	device        func(blockdev.Device) blockdev.Device // what init writes to, and a manifest is read from; tests record there, and fail
}

// engine is the part of package replicate that writes or compares. Tests put failures there that no image can have.
type engine struct {
	sync, verify engineRun
	recover      func(context.Context, *replicate.Target, replicate.RecoverOptions) (*replicate.Recovery, error)
	pending      func(*replicate.Target) (bool, error)
}

func newApp(stdin io.Reader, stdout, stderr io.Writer) *app {
	return &app{
		stdin: stdin, stdout: stdout, stderr: stderr, terminalWidth: terminalWidth,
		engine: engine{replicate.SyncAll, replicate.VerifyAll, replicate.Recover, replicate.Pending},
		worker: worker{program: "/proc/self/exe", grace: workerGrace, signal: (*os.Process).Signal},
		device: func(d blockdev.Device) blockdev.Device { return d },
	}
}

// report is the result of a command. It prints itself for people; encoding/json makes the document of it.
type report interface {
	print(o *output)
	fail(e *jsonError)
}

// failure is embedded in every report: the document has an "error" when the command did not succeed.
type failure struct {
	Error *jsonError `json:"error,omitempty"`
}

func (f *failure) fail(e *jsonError) { f.Error = e }
func (f *failure) print(*output)     {}

// jsonError is how every document tells an error.
type jsonError struct {
	Message string `json:"message"`
	Hint    string `json:"hint,omitempty"`
	Exit    int    `json:"exit"`
}

func newJSONError(err error) *jsonError {
	if err == nil {
		return nil
	}
	return &jsonError{Message: err.Error(), Hint: hintOf(err), Exit: exitCode(err)}
}

// hintOf finds what a person should do about err, "" when nobody knows.
func hintOf(err error) string {
	var h interface{ Hint() string }
	if errors.As(err, &h) {
		return h.Hint()
	}
	var busy *blockdev.BusyError
	if errors.As(err, &busy) {
		return busyHint(busy)
	}
	if errors.Is(err, fatdriver.ErrNoSpace) {
		return "delete there what is not needed (`espmirror ls -lR` shows it), or leave something out with --exclude: old and new have to fit side by side"
	}
	if errors.Is(err, gpt.ErrBackupOnly) {
		return "its backup table is whole: gdisk loads it (answer 1), shows it with p, and writes it back with w"
	}
	return ""
}

// busyHint says what to do about who holds a device.
func busyHint(e *blockdev.BusyError) string {
	for _, by := range e.By {
		if loop, ok := strings.CutPrefix(by, "attached to "); ok {
			return fmt.Sprintf("use /dev/%s instead, or detach it with `losetup -d /dev/%s`", loop, loop)
		}
	}
	if e.Hint == "" && len(e.By) > 0 && strings.HasPrefix(e.By[0], "locked by another program") {
		return "wait until that program is done, then try again"
	}
	return e.Hint
}

// invocation is one command line while it runs.
type invocation struct {
	*app
	ctx  context.Context
	args []string // the program's name first
	c    *cli.Context
	log  *slog.Logger

	system               blockdev.System // that of the app, or below --system-root
	json                 string          // pretty, short or off
	quiet, verbose       bool
	noLegend, noProgress bool
	color                bool
	out                  *bufio.Writer
	report               report
	err                  error
	metrics              bool                          // status --metrics
	changed              []string                      // members that this command has put into the set or taken out
	random               func(volume string) io.Reader // where identities of transactions come from; nil: the system
	jobs                 int                           // targets at a time; 0: all of them
	bar                  *progress                     // nil until there is one
}

// run runs one command line, the program's name first, and returns the exit status.
func (a *app) run(ctx context.Context, args []string) int {
	inv := &invocation{app: a, ctx: ctx, args: args, system: a.system, json: earlyJSON(args), out: bufio.NewWriter(a.stdout)}
	inv.log = newLogger(logWriter{inv}, slog.LevelInfo)
	// What the library itself returns is about the command line; the commands leave theirs in inv.err.
	if err := inv.cli().RunContext(ctx, args); err != nil && inv.err == nil {
		inv.err = err
	}
	return inv.finish()
}

// finish prints the report and the error, and returns the exit status.
func (inv *invocation) finish() int {
	code := exitCode(inv.err)
	if code == exitInterrupt {
		inv.err = interrupted{inv.err}
	}
	if inv.json != "off" {
		if inv.report == nil && inv.err != nil {
			inv.report = &failure{}
		}
		if inv.report != nil {
			if inv.err != nil && !errors.Is(inv.err, errDiffers) {
				inv.report.fail(newJSONError(inv.err))
			}
			enc := json.NewEncoder(inv.out)
			enc.SetEscapeHTML(false)
			if inv.json == "pretty" {
				enc.SetIndent("", "  ")
			}
			if err := enc.Encode(inv.report); err != nil {
				inv.err = fmt.Errorf("cannot write the result: %w", err)
			}
		}
	} else if !forInitrd && inv.metrics {
		rep, _ := inv.report.(*statusReport)
		writeMetrics(inv.out, rep, code)
	} else if inv.report != nil {
		inv.report.print(&output{Writer: inv.out, legend: !inv.noLegend, color: inv.color, width: inv.terminalWidth(inv.stdout)})
	}
	if err := inv.out.Flush(); err != nil {
		inv.err = fmt.Errorf("cannot write the result: %w", err)
		code = max(code, exitFailed)
	}
	inv.printError(inv.err)
	return code
}

// printError prints an error as one line, and what to do about it as another. The errors of several targets come one by one.
func (inv *invocation) printError(err error) {
	if err == nil || errors.Is(err, errDiffers) || errors.As(err, new(told)) {
		return
	}
	var many interface{ Unwrap() []error }
	switch err.(type) {
	case *targetsError, *volumesError:
		errors.As(err, &many)
		for _, e := range many.Unwrap() {
			inv.printError(e)
		}
		return
	}
	fmt.Fprintf(inv.stderr, "espmirror: %s\n", safe(err.Error()))
	if h := hintOf(err); h != "" {
		fmt.Fprintf(inv.stderr, "hint: %s\n", safe(h))
	}
}

// earlyJSON finds --json before the command line is parsed, for the errors of parsing it.
func earlyJSON(args []string) string {
	mode := "off"
	for i, arg := range args {
		if arg == "--" {
			break
		}
		v, ok := strings.CutPrefix(arg, "--json=")
		if !ok && arg == "--json" && i+1 < len(args) {
			v, ok = args[i+1], true
		}
		if ok && (v == "pretty" || v == "short") {
			mode = v
		}
	}
	return mode
}

// cli describes the command line. A new one is made for every run, because the library keeps what it parsed in it.
func (inv *invocation) cli() *cli.App {
	commands := []*cli.Command{inv.listCommand(), inv.statusCommand(), inv.syncCommand(), inv.verifyCommand(), inv.recoverCommand()}
	if !forInitrd {
		commands = append(commands, inv.initCommand(), inv.addCommand(), inv.removeCommand())
	}
	commands = append(commands, inv.waitCommand(), inv.earlyCommand())
	if !forInitrd {
		commands = append(commands, inv.randomSeedCommand())
	}
	commands = append(commands, inv.checkCommand(), inv.lsCommand(), inv.catCommand())
	if !forInitrd {
		commands = append(commands, inv.extractCommand())
	}
	for _, c := range commands {
		c.Flags = append(c.Flags, commonFlags()...)
		c.HideHelpCommand = true // or a volume named "help" could not be listed
		c.OnUsageError = onUsageError
		c.CustomHelpTemplate = commandHelp
	}
	status := inv.statusCommand()
	return &cli.App{
		Name:  "espmirror",
		Usage: "keep the EFI System Partitions of a machine alike, crash-safely and without mounting them",
		UsageText: "espmirror [OPTIONS] [COMMAND] [OPTIONS] [ARGUMENTS]\n\n" +
			"Without a command, `status` runs. Options stand before the arguments of a command.",
		Description: volumeHelp,
		Commands:    commands,
		Flags: append(append(status.Flags, commonFlags()...),
			&cli.BoolFlag{Name: "version", Usage: "print the version", DisableDefaultText: true}),
		HideVersion:            true, // its -v is our --verbose
		HideHelpCommand:        true,
		UseShortOptionHandling: true, // ls -lR
		// A file name may have a comma.
		DisableSliceFlagSeparator: true,
		OnUsageError:              onUsageError,
		// The library would call os.Exit from inside, past every deferred unlock.
		ExitErrHandler:        func(*cli.Context, error) {},
		CustomAppHelpTemplate: appHelp,
		Reader:                inv.stdin,
		Writer:                inv.out,
		ErrWriter:             inv.stderr,
		Action: func(c *cli.Context) error {
			if c.Args().Present() {
				return inv.unknownCommand(c)
			}
			if c.Bool("version") {
				inv.report = &versionReport{Version: version}
				return nil
			}
			return status.Action(c)
		},
	}
}

func (inv *invocation) unknownCommand(c *cli.Context) error {
	names := make([]string, len(c.App.Commands))
	for i, cmd := range c.App.Commands {
		names[i] = cmd.Name
	}
	return &usageError{fmt.Sprintf("there is no command %q", c.Args().First()), "the commands are " + strings.Join(names, ", ")}
}

// versionReport is the answer to --version.
type versionReport struct {
	failure
	Version string `json:"version"`
}

func (r *versionReport) print(o *output) { o.printf("espmirror %s\n", r.Version) }

// commonFlags are accepted before the command and after it.
func commonFlags() []cli.Flag {
	return []cli.Flag{
		&cli.BoolFlag{Name: "quiet", Aliases: []string{"q"}, Usage: "print only what was asked for, warnings and errors", DisableDefaultText: true},
		&cli.BoolFlag{Name: "verbose", Aliases: []string{"v"}, Usage: "tell each step", DisableDefaultText: true},
		&cli.StringFlag{Name: "json", Value: "off", Usage: "print the result, or the error, as JSON; `MODE` is pretty, short or off"},
		&cli.BoolFlag{Name: "no-legend", Usage: "leave out the headings of tables", DisableDefaultText: true},
		&cli.BoolFlag{Name: "no-pager", Usage: "accepted from scripts; no pager is ever started", DisableDefaultText: true},
		&cli.StringFlag{Name: "color", Value: "auto", Usage: "use colours; `WHEN` is auto, always or never, and auto heeds NO_COLOR"},
		&cli.GenericFlag{Name: "system-root", Value: &once{},
			Usage: "look at /sys, /proc, /dev and /run below `DIR`; for tests and for tools that prepare another system"},
	}
}

func noProgressFlag() cli.Flag {
	return &cli.BoolFlag{Name: "no-progress", Usage: "show no progress bar, even on a terminal", DisableDefaultText: true}
}

func onUsageError(_ *cli.Context, err error, _ bool) error {
	msg := err.Error()
	if name, ok := strings.CutPrefix(msg, "flag provided but not defined: -"); ok {
		return usagef("unknown option %s", dashed(name))
	}
	if name, ok := strings.CutPrefix(msg, "flag needs an argument: -"); ok {
		return usagef("option %s needs a value", dashed(name))
	}
	// The package flag does not wrap the errors of values.
	if _, name, ok := strings.Cut(msg, " for flag -"); ok && strings.HasSuffix(msg, ": "+errTwice.Error()) {
		name, _, _ = strings.Cut(name, ":")
		return usagef("option %s is given twice", dashed(name))
	}
	return usagef("%s", msg)
}

// dashed writes the name of an option as people do.
func dashed(name string) string {
	name = strings.TrimLeft(name, "-")
	if len(name) == 1 {
		return "-" + name
	}
	return "--" + name
}

// action wraps a command: it reads the common options, refuses what would be misread, and keeps report and error.
// minArgs and maxArgs bound the positional arguments; maxArgs < 0 means any number.
func (inv *invocation) action(minArgs, maxArgs int, argsUsage string, f func() (report, error)) cli.ActionFunc {
	return func(c *cli.Context) error {
		inv.c = c
		if inv.err = inv.configure(); inv.err != nil {
			return inv.err
		}
		args := c.Args().Slice()
		before := len(inv.args) - len(args) - 1
		ended := before > 0 && inv.args[before] == "--" // whoever writes that means arguments
		for _, arg := range args {
			if strings.HasPrefix(arg, "-") && !ended {
				// The library takes everything behind the first argument for arguments: `sync a b --dry-run` would be a real run.
				inv.err = &usageError{fmt.Sprintf("%q stands behind an argument", arg),
					"options go before the arguments; a file whose name begins with - is written ./-name, or behind --"}
				return inv.err
			}
			if arg == "" {
				inv.err = usagef("an argument is empty")
				return inv.err
			}
		}
		if len(args) < minArgs || maxArgs >= 0 && len(args) > maxArgs {
			got := plural(int64(len(args)), "argument was", "arguments were") + " given"
			if maxArgs == 0 {
				inv.err = &usageError{"no argument is taken, " + got, argsUsage}
			} else {
				inv.err = &usageError{got, argsUsage}
			}
			return inv.err
		}
		inv.report, inv.err = f()
		return nil
	}
}

// contexts are the option sets of this command line: the command's own, then those before the command.
func (inv *invocation) contexts() []*cli.Context {
	var cs []*cli.Context
	for _, c := range inv.c.Lineage() {
		if c != nil && c.Command != nil {
			cs = append(cs, c)
		}
	}
	return cs
}

// text returns the value of an option wherever it stands; the one nearest to the arguments wins.
func (inv *invocation) text(name string) string {
	cs := inv.contexts()
	for _, c := range cs {
		if slices.Contains(c.LocalFlagNames(), name) {
			return c.String(name)
		}
	}
	return cs[0].String(name)
}

func (inv *invocation) flag(name string) bool {
	for _, c := range inv.contexts() {
		if slices.Contains(c.LocalFlagNames(), name) {
			return c.Bool(name)
		}
	}
	return false
}

// list returns all values of a repeatable option.
func (inv *invocation) list(name string) []string {
	var vs []string
	for _, c := range slices.Backward(inv.contexts()) {
		if slices.Contains(c.LocalFlagNames(), name) {
			vs = append(vs, c.StringSlice(name)...)
		}
	}
	return vs
}

// flagNamed returns the option of a command that has the name, nil when there is none.
func flagNamed(c *cli.Command, name string) cli.Flag {
	for _, f := range c.Flags {
		if slices.Contains(f.Names(), name) {
			return f
		}
	}
	return nil
}

// configure reads the common options and the environment.
func (inv *invocation) configure() error {
	own := inv.c.Command
	given := map[string]bool{}
	for _, c := range inv.contexts() {
		for _, name := range c.LocalFlagNames() {
			if _, single := flagNamed(own, name).(*cli.GenericFlag); single && given[name] {
				return usagef("option %s is given twice", dashed(name))
			}
			given[name] = true
			if flagNamed(own, name) == nil {
				return usagef("option %s has no meaning for `%s`", dashed(name), own.Name)
			}
			// Every one of our options that takes a value needs one: an unset shell variable must not become a default.
			switch v := c.Value(name).(type) {
			case string:
				if v == "" {
					return usagef("option %s has an empty value", dashed(name))
				}
			case cli.StringSlice:
				if slices.Contains(v.Value(), "") {
					return usagef("option %s has an empty value", dashed(name))
				}
			}
		}
	}
	inv.quiet, inv.verbose = inv.flag("quiet"), inv.flag("verbose")
	if inv.quiet && inv.verbose {
		return usagef("--quiet and --verbose exclude each other")
	}
	inv.noLegend, inv.noProgress = inv.flag("no-legend"), inv.flag("no-progress")
	if root := inv.text("system-root"); root != "" {
		if !isDir(root) {
			return usagef("--system-root=%s is not a directory", root)
		}
		abs, err := filepath.Abs(root)
		if err != nil {
			return fmt.Errorf("cannot use --system-root=%s: %w", root, err)
		}
		if abs == "/" {
			abs = "" // this machine, whose nodes are devices and whose kernel sends events
		}
		inv.system = blockdev.System{Root: abs}
	}
	mode := inv.text("json")
	if !slices.Contains([]string{"pretty", "short", "off"}, mode) {
		return usagef("--json=%s is not pretty, short or off", mode)
	}
	inv.json = mode
	switch v := inv.text("color"); v {
	case "always":
		inv.color = true
	case "never":
	case "auto":
		// https://no-color.org: present and not empty, whatever the value.
		inv.color = os.Getenv("NO_COLOR") == "" && os.Getenv("TERM") != "dumb" && inv.terminalWidth(inv.stdout) > 0
	default:
		return usagef("--color=%s is not auto, always or never", v)
	}
	level := slog.LevelInfo
	env := os.Getenv("SYSTEMD_LOG_LEVEL")
	switch l, ok := systemdLevel(env); {
	case inv.verbose:
		level = slog.LevelDebug
	case inv.quiet:
		level = slog.LevelWarn
	case ok:
		level = l
	}
	inv.log = newLogger(logWriter{inv}, level)
	return nil
}

// relaxed says whether SYSTEMD_RELAX_ESP_CHECKS asks to take any partition for an ESP.
func relaxed() bool {
	v := strings.ToLower(os.Getenv("SYSTEMD_RELAX_ESP_CHECKS"))
	b, err := strconv.ParseBool(v)
	return err == nil && b || v == "yes" || v == "y" || v == "on"
}

const volumeHelp = `A VOLUME is a partition node (/dev/sda1), a disk or image with one ESP in it (/dev/sda, disk.img), an
image and an offset (disk.img@@1M), a bare FAT image, PARTUUID=, UUID=, LABEL= or PARTLABEL=.`

// The help texts. Those of the library cannot say the exit statuses.
const appHelp = `NAME:
   {{.Name}} - {{.Usage}}

USAGE:
   {{wrap .UsageText 3}}

COMMANDS:{{range .VisibleCommands}}
   {{printf "%-11s" .Name}} {{.Usage}}{{end}}

OPTIONS:{{range .VisibleFlags}}
   {{.}}{{end}}

VOLUMES:
   {{wrap .Description 3}}

ENVIRONMENT:
   SYSTEMD_ESP_PATH          the primary when --primary is not given
   SYSTEMD_RELAX_ESP_CHECKS  1 takes a partition of any type for an ESP
   SYSTEMD_LOG_LEVEL         how much is logged when neither -q nor -v is given
   SOURCE_DATE_EPOCH         the time that new entries and states get, and the latest one in an archive
   TMPDIR                    where a compressed archive is unpacked
   NO_COLOR                  not empty: no colours

` + exitHelp

const commandHelp = `NAME:
   {{.HelpName}} - {{.Usage}}

USAGE:
   {{wrap .UsageText 3}}
{{if .Description}}
   {{wrap .Description 3}}
{{end}}
OPTIONS:{{range .VisibleFlags}}
   {{.}}{{end}}

` + exitHelp
