package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"os/signal"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/urfave/cli/v2"

	"espmirror/fatdriver"
	"espmirror/gpt"
	"espmirror/replicate"
)

// Disks behind a slow controller come a second or two after the first ones. What takes longer is told, and done by the next
// run: a boot is worth more than a replica.
const (
	defaultEarlyWait  = 2 * time.Second
	defaultEarlyLimit = 30 * time.Second
)

// supervisedFlag marks the process that does the work of `early` (see supervise).
const supervisedFlag = "supervised"

func (inv *invocation) earlyCommand() *cli.Command {
	return &cli.Command{
		Name:      "early",
		Usage:     "what an initramfs runs: recover and sync what was booted, in bounded time",
		UsageText: "espmirror early [OPTIONS]",
		Description: "Recovers the ESP that was booted and the members of its replica set, then replicates to them what was\n" +
			"booted, as `sync --compare=fingerprint` does. Nothing but what was booted is ever the source: where a member is\n" +
			"newer, it is refused with a hint, and left as it is. Where there is no replica set, nothing is done.\n" +
			"The whole run ends after the time of --limit, even when a disk does not answer; stopping is safe at any moment.\n" +
			"The exit status is 0 when nothing needs a person: also where there is no set, or no EFI. SYSTEMD_ESP_PATH has no\n" +
			"meaning here.\n\n" +
			"The kernel command line counts before the options, which are baked into an initramfs:\n" +
			"   espmirror=no            do nothing (also off, 0)\n" +
			"   espmirror=recover       recover only\n" +
			"   espmirror=yes           do what the options say (also sync, on, 1; the default)\n" +
			"   espmirror.timeout=TIME  that of --timeout\n" +
			"   espmirror.limit=TIME    that of --limit",
		Flags: []cli.Flag{
			&cli.GenericFlag{Name: "timeout", Value: &once{}, Usage: "wait up to `TIME`, all in all, for disks that are not there yet (5s, 500ms; default: what the set says, else 2s)"},
			&cli.GenericFlag{Name: "limit", Value: &once{}, Usage: "end the whole run after `TIME` (default: 30s)"},
			&cli.BoolFlag{Name: "recover-only", Usage: "recover, and do not sync", DisableDefaultText: true},
			&cli.BoolFlag{Name: "kmsg", Usage: "log to /dev/kmsg, so that dmesg and the journal have it", DisableDefaultText: true},
			&cli.BoolFlag{Name: supervisedFlag, Hidden: true},
		},
		Action: inv.action(0, 0, "it looks for what was booted", inv.early),
	}
}

// earlyPlan is what a run of `early` has to go by, once options and kernel command line have been weighed.
type earlyPlan struct {
	mode    earlyMode
	timeout *time.Duration // nil when nobody said anything: what the set says counts
	limit   time.Duration
}

// earlyOptions reads the options.
func (inv *invocation) earlyOptions() (earlyPlan, error) {
	p := earlyPlan{mode: earlySync, limit: defaultEarlyLimit}
	if inv.flag("recover-only") {
		p.mode = earlyRecover
	}
	timeout, given, err := inv.timeout()
	if err != nil {
		return p, err
	}
	if given {
		p.timeout = &timeout
	}
	if v := inv.text("limit"); v != "" {
		if p.limit, err = replicate.ParseTime(v); err != nil {
			return p, usagef("--limit: %v", err)
		}
		if p.limit == 0 {
			return p, usagef("--limit: nothing can be done in no time")
		}
	}
	return p, nil
}

// override lets the kernel command line win. The options come from a hook that is baked into an initramfs; the command
// line is what a person at the boot menu can change, when this boot has to get by. So it may also say how long to wait. Of
// the modes, the one that does less counts: a unit that only recovers has another one beside it that syncs.
func (p *earlyPlan) override(o bootOptions) {
	if o.timeout != nil {
		p.timeout = o.timeout
	}
	if o.limit > 0 {
		p.limit = o.limit
	}
	if o.mode == earlyOff || o.mode == earlyRecover {
		p.mode = o.mode
	}
}

// early is the command: it decides what is to be done, has it done, and tells how it went.
func (inv *invocation) early() (report, error) {
	start := time.Now()
	p, err := inv.earlyOptions()
	if err != nil {
		return nil, err
	}
	inv.noProgress = true
	if inv.flag("kmsg") {
		k, err := openKmsg(inv.system, logWriter{inv})
		if err != nil {
			inv.log.Debug("the kernel's log cannot be written", "err", err)
		} else {
			defer k.Close()
			inv.log = shaped(inv.log, k, kmsgLine)
		}
	}
	if inv.flag(supervisedFlag) {
		// The one who started this has weighed everything, tells how it went, and knows when its patience is over: a second
		// signal, as systemd sends one to each process of a unit, has nothing to add to the first.
		signal.Notify(make(chan os.Signal, 1), syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP)
		rep, err := inv.earlyWork(p)
		if err != nil {
			err = told{newJSONError(err)}
		}
		return rep, err
	}
	o, problems := readBootOptions(inv.system)
	for _, text := range problems {
		inv.log.Warn(text)
	}
	p.override(o)

	rep := &earlyReport{Mode: p.mode, Volumes: []earlyVolume{}}
	looked := false
	if _, err := gpt.Booted(inv.system); p.mode == earlyOff {
		rep.Nothing = "the kernel command line says espmirror=no"
	} else if errors.Is(err, gpt.ErrNoVariables) {
		// The machine was started through EFI, and whoever set up this initramfs has forgotten something.
		rep.Nothing, rep.notable = err.Error(), true
	} else if err != nil {
		rep.Nothing = err.Error()
	} else {
		rep, looked = inv.supervise(p), true
	}
	rep.Seconds = time.Since(start).Seconds()
	rep.tell(inv.log)
	if p.mode != earlyOff {
		// An initramfs in which nobody can tell what was booted has looked at nothing; the system may know better.
		inv.leaveWord(looked && rep.Error == nil)
	}
	if rep.Error == nil {
		return rep, nil
	}
	return rep, told{rep.Error}
}

// earlyWord is left behind by a run after which nothing needs to be recovered: from the initramfs it comes to the system with
// /run, and keeps espmirror-recover.service from looking at the same again while the boot waits for it.
const earlyWord = "/run/espmirror/early"

// leaveWord leaves it, or takes back that of a run before. Where that is not possible, the service finds nothing to do.
func (inv *invocation) leaveWord(done bool) {
	path := inv.system.Path(earlyWord)
	var err error
	if done {
		if err = os.MkdirAll(filepath.Dir(path), 0o755); err == nil {
			err = os.WriteFile(path, nil, 0o644)
		}
	} else if err = os.Remove(path); errors.Is(err, fs.ErrNotExist) {
		err = nil
	}
	if err != nil {
		inv.log.Debug("no word of this run is left", "err", err)
	}
}

// earlyWork does the work. The report is there with every error.
func (inv *invocation) earlyWork(p earlyPlan) (*earlyReport, error) {
	start := time.Now()
	rep := &earlyReport{Mode: p.mode, Volumes: []earlyVolume{}}
	defer func() { rep.Seconds = time.Since(start).Seconds() }()
	boot, err := gpt.Booted(inv.system)
	if err != nil {
		rep.Nothing = err.Error()
		return rep, nil
	}
	for _, text := range boot.Problems {
		inv.log.Warn(text)
	}
	limit := defaultEarlyWait
	if p.timeout != nil {
		limit = *p.timeout
	}
	m := &members{inv: inv, verb: "sync", primary: &member{name: "PARTUUID=" + boot.PartUUID}, bySet: true, booted: true, limit: &limit}
	defer m.close()
	defer func() { rep.Waited = m.waited.Seconds() }()
	if p.mode == earlyRecover {
		m.verb, m.dry = "recover", true // recovery is done below, and nothing else is written
	}
	if err := m.findPrimary(nil); err != nil {
		err := fmt.Errorf("cannot use what was booted, %s: %w", m.primary.name, err)
		if errors.Is(err, gpt.ErrNotFound) || errors.Is(err, fs.ErrNotExist) {
			err = missing{withHint(err, "is the driver of its disk in the initramfs? espmirror.timeout=10s on the kernel command line waits longer")}
		}
		return rep, rep.conclude(err)
	}
	rep.Primary = m.primary.name

	// The machine may have no replica set at all, and then it must not hear of what is none of our business.
	if err := inv.usable(m.primary); errors.Is(err, gpt.ErrNotESP) || errors.Is(err, fatdriver.ErrNotFAT) {
		rep.Nothing = err.Error()
		return rep, nil
	}
	inv.recoverDisk(m.primary.name, m.primary.loc, false, true, rep.noteAs("primary", m.primary))
	if rep.failures() > 0 {
		// What is damaged is no source. The others can be recovered all the same.
		m.verb, m.dry = "recover", true
	}
	if _, err := m.source(); err != nil {
		return rep, rep.conclude(err)
	}
	if m.set == nil {
		rep.Nothing = m.primary.name + " has no " + replicate.SetPath
		return rep, rep.conclude(nil)
	}
	if m.isMember() && len(m.set.Members()) == 1 {
		rep.Nothing = "the replica set has no other member"
		return rep, rep.conclude(nil)
	}
	if err := m.findSet(); err != nil {
		return rep, rep.conclude(err)
	}
	if t, ok := m.set.Timeout(); ok && p.timeout == nil {
		limit = t
	}
	if err := m.recoverAndWait(rep, limit); err != nil {
		return rep, rep.conclude(err)
	}
	if m.verb == "recover" {
		return rep, rep.conclude(nil)
	}
	return rep, m.earlySync(rep)
}

// usable says whether the primary is an ESP with a FAT on it.
func (inv *invocation) usable(p *member) error {
	if err := inv.checkType(p.loc); err != nil {
		return err
	}
	vol, err := inv.openLocation(p.name, p.loc)
	if err != nil {
		return err
	}
	return vol.Close()
}

// recoverAndWait recovers the members that are there, waits for the others, and recovers those that came. Nobody knows
// how long the machine stays up: what is there is not kept waiting.
func (m *members) recoverAndWait(rep *earlyReport, limit time.Duration) error {
	recoverAll := func(targets []*member) (late []*member, err error) {
		m.findTargets(targets, nil)
		for _, t := range targets {
			if err := m.inv.ctx.Err(); err != nil {
				return nil, err
			}
			switch {
			case errors.As(t.err, new(missing)):
				late = append(late, t)
			case t.err == nil:
				t.name = t.loc.String()
				m.inv.recoverDisk(t.name, t.loc, false, true, rep.noteAs("member", t))
			}
		}
		return late, nil
	}
	late, err := recoverAll(m.targets)
	if err != nil {
		return err
	}
	if len(late) > 0 && limit > m.waited {
		m.closeSource() // it is read again after a wait, in which somebody may have changed it
		if err := m.waitFor(limit, late...); err != nil {
			return err
		}
		if _, err := recoverAll(late); err != nil {
			return err
		}
	}
	for _, t := range m.targets {
		if t.loc == nil {
			rep.note("member", t.name, t, nil, t.err)
		}
	}
	return nil
}

// earlySync replicates from the primary to the members that are there.
func (m *members) earlySync(rep *earlyReport) error {
	if err := m.sameTwice(); err != nil {
		return rep.conclude(err)
	}
	m.checkKinds()
	if err := m.findPairs(); err != nil {
		return rep.conclude(err)
	}
	o := replicate.Options{Fingerprint: true, Log: m.inv.engineLog(false)}
	run, err := m.inv.replicate(m, o, m.inv.engine.sync, true)
	done, ok := run.(*runReport)
	if !ok {
		return rep.conclude(err)
	}
	for i := range done.Targets {
		rep.merge(&done.Targets[i])
	}
	if errors.As(err, new(*targetsError)) {
		err = nil // the volumes say it
	}
	return rep.conclude(err)
}

// earlyReport is the result of early.
type earlyReport struct {
	failure
	Mode    earlyMode     `json:"mode"`
	Nothing string        `json:"nothing,omitempty"` // why there is nothing to do, or nothing more
	Primary string        `json:"primary,omitempty"`
	Volumes []earlyVolume `json:"volumes"`
	Waited  float64       `json:"waited_seconds"`
	Seconds float64       `json:"seconds"`

	// Stopped is what ended the run before all was done, as opposed to what is wrong with one volume.
	Stopped *jsonError `json:"stopped,omitempty"`

	notable bool // Nothing is for a person to know
}

// earlyVolume is what happened to one volume.
type earlyVolume struct {
	Name      string          `json:"name"`
	Role      string          `json:"role"` // primary or member; an XBOOTLDR partition has that of its ESP
	GUID      string          `json:"partition_guid,omitempty"`
	Outcome   string          `json:"outcome"` // ok (whole, and not synced), or as sync tells it
	Recovered *recoveryReport `json:"recovered,omitempty"`
	Lineage   *lineageReport  `json:"lineage,omitempty"`
	Error     *jsonError      `json:"error,omitempty"`
}

// noteAs notes what recovery did to an ESP and the partition that goes with it.
func (r *earlyReport) noteAs(role string, t *member) func(string, *replicate.Recovery, error) {
	return func(name string, rec *replicate.Recovery, err error) {
		of := t
		if name != t.name {
			of = &member{name: name}
		}
		if err != nil && t.err == nil && role == "member" {
			t.err = err // it takes no part in the sync; neither does the other of a pair
		}
		r.note(role, name, of, rec, err)
	}
}

// note notes what happened to a volume.
func (r *earlyReport) note(role, name string, t *member, rec *replicate.Recovery, err error) {
	v := earlyVolume{Name: name, Role: role, GUID: t.guid(), Outcome: "ok", Recovered: newRecoveryReport(rec)}
	if guid, ok := strings.CutPrefix(name, "PARTUUID="); ok && v.GUID == "" {
		v.GUID = guid
	}
	if err != nil {
		v.Outcome, v.Error = (&outcome{err: err}).state(), newJSONError(err)
	}
	r.Volumes = append(r.Volumes, v)
}

// merge adds what a sync did to what recovery did before it.
func (r *earlyReport) merge(t *targetReport) {
	var v *earlyVolume
	for i := range r.Volumes {
		if r.Volumes[i].Name == t.Name {
			v = &r.Volumes[i]
		}
	}
	if v == nil {
		r.Volumes = append(r.Volumes, earlyVolume{Name: t.Name, Role: "member"})
		v = &r.Volumes[len(r.Volumes)-1]
	}
	if v.Outcome, v.Lineage, v.Error = t.Outcome, t.Lineage, t.Error; t.PartGUID != "" {
		v.GUID = t.PartGUID
	}
	if t.Recovered != nil && (v.Recovered == nil || !v.Recovered.Changed) {
		v.Recovered = t.Recovered
	}
}

func (r *earlyReport) failures() int {
	return r.count(func(v *earlyVolume) bool { return v.Error != nil })
}

func (r *earlyReport) count(f func(*earlyVolume) bool) int {
	n := 0
	for i := range r.Volumes {
		if f(&r.Volumes[i]) {
			n++
		}
	}
	return n
}

// changed says whether anything was written to a volume.
func (v *earlyVolume) changed() bool {
	return v.Outcome == "synced" || v.Recovered != nil && v.Recovered.Changed
}

// conclude sums up. err is what stopped the run, nil when nothing did.
func (r *earlyReport) conclude(err error) error {
	wrote := r.count((*earlyVolume).changed) > 0
	if err != nil {
		if exitCode(err) == exitInterrupt {
			err = interrupted{err}
		}
		r.Stopped = newJSONError(err)
		if wrote && exitCode(err) == exitRefused { // which says that nothing was written
			err = &targetsError{verb: "sync", errs: []error{err}, total: 1, wrote: true}
			r.Stopped.Exit = exitCode(err)
		}
		return err
	}
	e := &targetsError{verb: string(r.Mode), total: len(r.Volumes), wrote: wrote}
	for i := range r.Volumes {
		if v := &r.Volumes[i]; v.Error != nil {
			e.errs = append(e.errs, told{v.Error})
		}
	}
	return e.orNil()
}

// earlyWords are the outcomes of volumes by the words of the last line.
var earlyWords = []struct {
	word     string
	outcomes []string
}{
	{"synced", []string{"synced"}}, {"in sync", []string{"in sync"}}, {"missing", []string{"missing"}},
	{"refused", []string{"refused", "busy", "needs recovery"}}, {"failed", []string{"failed", "stopped"}},
}

// tell logs what went wrong, and one line about the whole run, which monitors and tests may parse: it has all words of
// earlyWords, or of those for a run that does not sync, each with its number, and behind the last three the names. Before
// them stands "stopped" when something ended the run, alone when the volumes are not known.
func (r *earlyReport) tell(log *slog.Logger) {
	warn := func(e *jsonError) {
		text := e.Message
		if e.Hint != "" {
			text += "; " + e.Hint
		}
		log.Warn(text)
	}
	for i := range r.Volumes {
		if e := r.Volumes[i].Error; e != nil {
			warn(e)
		}
	}
	if r.Stopped != nil {
		warn(r.Stopped)
	}
	log.Log(context.Background(), r.level(), r.line())
}

// level is that of the last line. A machine on which all is as it should be does not raise its voice.
func (r *earlyReport) level() slog.Level {
	switch {
	case r.Error != nil:
		return slog.LevelWarn
	case r.notable, r.count((*earlyVolume).changed) > 0:
		return levelNotice
	}
	return slog.LevelInfo
}

// line is the last line of a run.
func (r *earlyReport) line() string {
	var sb strings.Builder
	sb.WriteString("early: ")
	if r.Stopped != nil && len(r.Volumes) == 0 {
		sb.WriteString("stopped") // nothing is known of the volumes, and no number is true
	} else {
		r.outcomes(&sb)
	}
	fmt.Fprintf(&sb, "; %.3f s, %.3f s of it waiting", r.Seconds, r.Waited)
	return sb.String()
}

// outcomes writes how many volumes had which outcome.
func (r *earlyReport) outcomes(sb *strings.Builder) {
	if r.Stopped != nil {
		sb.WriteString("stopped; ")
	}
	recovered := r.count(func(v *earlyVolume) bool { return v.Recovered != nil && v.Recovered.Changed })
	if r.Nothing == "" || recovered > 0 {
		fmt.Fprintf(sb, "recovered %d", recovered)
		for _, w := range earlyWords {
			quiet := w.word == "synced" || w.word == "in sync"
			if quiet && r.Mode == earlyRecover {
				continue
			}
			var names []string
			n := r.count(func(v *earlyVolume) bool {
				if !slices.Contains(w.outcomes, v.Outcome) {
					return false
				}
				names = append(names, v.Name)
				return true
			})
			fmt.Fprintf(sb, ", %s %d", w.word, n)
			if n > 0 && !quiet {
				fmt.Fprintf(sb, " (%s)", strings.Join(names, ", "))
			}
		}
		if r.Nothing != "" {
			sb.WriteString("; ")
		}
	}
	if r.Nothing != "" {
		sb.WriteString("nothing to do: " + r.Nothing)
	}
}

// print prints nothing: what there is to say is in the log.
func (r *earlyReport) print(*output) {}
