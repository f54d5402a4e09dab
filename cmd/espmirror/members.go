package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strings"
	"syscall"
	"time"

	"github.com/urfave/cli/v2"
	"golang.org/x/sys/unix"

	"espmirror/blockdev"
	"espmirror/fatdriver"
	"espmirror/gpt"
	"espmirror/replicate"
)

// lockWait is how long a run waits for the locks on whole disks, which udev and partitioners hold only for moments.
const lockWait = 10 * time.Second

// members are the primary and the targets of one run, with their guards.
//
// The guards come in an order: what the command line alone shows (the same volume twice) stops the run, then each
// target is looked at by itself, for reading, and only a target that has passed is opened for writing.
type members struct {
	inv     *invocation
	verb    string
	primary *member
	targets []*member
	locks   *blockdev.DiskLocks
	dry     bool // nothing is written: what recovery would do has not been done
}

// member is one volume of the set.
type member struct {
	name   string
	dir    string        // a primary that is a directory, or mounted there
	loc    *gpt.Location // nil for a directory and for what was not found
	vol    *volume       // open for reading; nil for a directory and once the guards have passed a target
	open   *gpt.Volume   // a target that has passed
	serial string
	err    error // why a target takes no part, or could not be closed
	place  int   // of its result among the results, from 1; 0 when it took no part
}

// once is the value of an option that must not be given twice, where the last one would win without a word.
type once struct {
	value string
	set   bool
}

var errTwice = errors.New("it is given twice")

// Set implements flag.Value.
func (o *once) Set(v string) error {
	if o.set {
		return errTwice
	}
	o.value, o.set = v, true
	return nil
}

func (o *once) String() string { return o.value }

// Get implements flag.Getter.
func (o *once) Get() any { return o.value }

func setFlags() []cli.Flag {
	return []cli.Flag{
		&cli.GenericFlag{Name: "primary", Value: &once{}, Usage: "replicate from this `VOLUME` or directory (default: $SYSTEMD_ESP_PATH)"},
		&cli.StringSliceFlag{Name: "target", Usage: "replicate to this `VOLUME`; repeat for more"},
	}
}

func selectFlags() []cli.Flag {
	return []cli.Flag{
		&cli.StringSliceFlag{Name: "select", Usage: "replicate this `PATH` in place of the default selection; repeat for more"},
		&cli.StringSliceFlag{Name: "exclude", Usage: "leave out this `PATH` or pattern; repeat for more"},
	}
}

func (inv *invocation) selection() replicate.Selection {
	return replicate.Selection{Select: inv.list("select"), Exclude: inv.list("exclude")}
}

// primaryName is --primary, or what bootctl would take for the ESP.
func (inv *invocation) primaryName() string {
	if name := inv.text("primary"); name != "" {
		return name
	}
	return os.Getenv("SYSTEMD_ESP_PATH")
}

// newMembers finds the volumes that the command line names. An error stops the whole run; nothing is open then.
func (inv *invocation) newMembers(verb string) (*members, error) {
	m := &members{inv: inv, verb: verb, primary: &member{name: inv.primaryName()}}
	if m.primary.name == "" {
		return nil, &usageError{"no primary was given", "name it with --primary, or in SYSTEMD_ESP_PATH"}
	}
	for _, name := range inv.list("target") {
		m.targets = append(m.targets, &member{name: name})
	}
	if len(m.targets) == 0 {
		return nil, &usageError{"no target was given", "name each with --target"}
	}
	if err := m.find(); err != nil {
		return nil, err
	}
	return m, nil
}

func (m *members) find() error {
	var names []string
	for _, t := range m.targets {
		if isDir(t.name) {
			return refusef("cannot %s %s: it is a directory, and a target is a device or an image", m.verb, t.name)
		}
		names = append(names, t.name)
	}
	among := existing(names)
	p := m.primary
	if isDir(p.name) {
		p.dir = p.name
	} else {
		var err error
		if p.loc, err = m.inv.findTarget(p.name, among); err != nil {
			if gone := (missing{}); errors.As(err, &gone) {
				err = gone.error // it is the run that fails, not one of several
			}
			return fmt.Errorf("cannot use primary %s: %w", p.name, err)
		}
	}
	for _, t := range m.targets {
		loc, err := m.inv.findTarget(t.name, among)
		if err != nil {
			t.err = fmt.Errorf("cannot %s %s: %w", m.verb, t.name, err)
			continue
		}
		t.loc = loc
	}
	return m.sameTwice()
}

// sameTwice refuses a volume that is named twice, by whatever names. This comes before anything else, because it shows
// that the command line does not mean what it says.
func (m *members) sameTwice() error {
	for i, t := range m.targets {
		if t.loc == nil {
			continue
		}
		if same, err := m.isPrimary(t); err != nil {
			return err
		} else if same {
			return refusef("cannot %s %s: it is the primary (%s)", m.verb, t.name, m.primary.name)
		}
		for _, u := range m.targets[:i] {
			if u.loc == nil {
				continue
			}
			if same, err := gpt.SameVolume(t.loc, u.loc); err != nil {
				return err
			} else if same {
				return refusef("cannot %s %s: it is named twice (%s)", m.verb, t.name, u.name)
			}
		}
	}
	return nil
}

// isPrimary compares a target with the primary, which may be the directory where it is mounted.
func (m *members) isPrimary(t *member) (bool, error) {
	if m.primary.loc != nil {
		return gpt.SameVolume(t.loc, m.primary.loc)
	}
	info, err := os.Stat(m.primary.dir)
	if err != nil {
		return false, fmt.Errorf("cannot use primary %s: %w", m.primary.name, err)
	}
	st, ok := info.Sys().(*syscall.Stat_t)
	if !ok {
		return false, nil
	}
	// The device number of a file is that of its filesystem, which for FAT is the device it lies on.
	on := blockdev.ID{Block: true, Dev: blockdev.DevNum{Major: unix.Major(st.Dev), Minor: unix.Minor(st.Dev)}}
	return t.loc.ID() == on, nil
}

// source opens the primary. When the device is mounted, the mount point is read: file data of a mounted FAT is not in
// the device's page cache, so the device could show the content of yesterday.
func (m *members) source() (replicate.Source, error) {
	p := m.primary
	fail := func(err error) (replicate.Source, error) {
		return nil, fmt.Errorf("cannot use primary %s: %w", p.name, err)
	}
	if p.loc != nil {
		if err := m.inv.checkType(p.loc); err != nil {
			return fail(err)
		}
		vol, err := m.inv.openLocation(p.name, p.loc)
		if err != nil {
			return fail(refuseContent(err))
		}
		p.vol, p.serial = vol, vol.fat.UUID()
		if id := p.loc.ID(); id.Block && p.loc.Offset == 0 {
			mount, ok, err := m.inv.system.MountPoint(id.Dev)
			if err != nil {
				return fail(err)
			}
			if ok {
				p.dir = mount.Point
				m.inv.log.Info("the primary is mounted, so its mount point is the source", "primary", p.name, "directory", p.dir)
			}
		}
	}
	if p.dir != "" {
		src, err := replicate.OpenDirSource(p.dir)
		if err != nil {
			return fail(err)
		}
		return src, nil
	}
	src, err := replicate.OpenVolumeSource(p.name, p.vol.fat)
	if err != nil {
		return fail(refuseContent(err))
	}
	return src, nil
}

// refuseContent turns "this is no FAT volume that can be written" into a guard's answer.
func refuseContent(err error) error {
	for _, e := range []error{fatdriver.ErrNotFAT, fatdriver.ErrDamaged, gpt.ErrDamaged, gpt.ErrChanged} {
		if errors.Is(err, e) {
			return refusal{err}
		}
	}
	return err
}

// inspect looks at each target by itself, for reading, and leaves those that do not pass with an error.
func (m *members) inspect() {
	for _, t := range m.targets {
		if t.err != nil {
			continue
		}
		if err := m.inspectOne(t); err != nil {
			t.err = fmt.Errorf("cannot %s %s: %w", m.verb, t.name, err)
		}
	}
	m.duplicates()
}

func (m *members) inspectOne(t *member) error {
	if err := m.inv.checkType(t.loc); err != nil {
		return err
	}
	// Opening for writing proves that nobody holds the device. A dry run opens for reading: it asks, so as to say the same.
	by, err := m.inv.system.Holders(t.loc.ID())
	if err != nil {
		return err
	}
	if len(by) > 0 {
		return &blockdev.BusyError{By: by, Hint: "unmount it or stop what holds it, then try again"}
	}
	vol, err := m.inv.openLocation(t.name, t.loc)
	if err != nil {
		return refuseContent(err)
	}
	t.vol, t.serial = vol, vol.fat.UUID()
	return checkMD(vol.open)
}

// duplicates refuses targets whose identity another member has too: firmware and Linux could take one for the other.
// Who only compares is warned.
func (m *members) duplicates() {
	all := append([]*member{m.primary}, m.targets...)
	for _, t := range m.targets {
		for _, other := range all {
			if t == other || t.err != nil && !errors.As(t.err, new(duplicate)) {
				continue
			}
			if what := sharedIdentity(t, other); what != "" && m.verb == "verify" {
				m.inv.log.Warn("two volumes have the same "+what, "volume", t.name, "other", other.name)
			} else if what != "" {
				t.err = duplicate{refusef("cannot %s %s: it has the same %s as %s", m.verb, t.name, what, other.name)}
				break
			}
		}
	}
}

// duplicate marks the error of a shared identity, which both sides get.
type duplicate struct{ error }

func (d duplicate) Unwrap() error { return d.error }

// Hint returns how to mend it.
func (d duplicate) Hint() string {
	return "give one of them another identity: sgdisk -u changes a partition GUID, mlabel -n or fatlabel -i a serial number"
}

func sharedIdentity(a, b *member) string {
	if a.loc != nil && b.loc != nil && a.loc.Part != nil && b.loc.Part != nil && a.loc.Part.PARTUUID() == b.loc.Part.PARTUUID() {
		return "partition GUID " + a.loc.Part.PARTUUID()
	}
	if a.serial != "" && a.serial == b.serial {
		return "FAT serial number " + a.serial
	}
	return ""
}

// lock takes the locks on the whole disks, so that udev does not look at a volume in the middle of a run. They are taken
// before the first write and dropped after the last device is closed.
func (m *members) lock() error {
	var ids []blockdev.ID
	for _, t := range m.targets {
		if t.err == nil {
			ids = append(ids, t.loc.ID())
		}
	}
	locks, err := m.inv.system.LockDisks(m.inv.ctx, lockWait, ids...)
	if err != nil {
		return err
	}
	m.locks = locks
	return nil
}

// openTargets opens what has passed the guards, and returns it for package replicate.
func (m *members) openTargets(mode blockdev.Mode) []*replicate.Target {
	var ts []*replicate.Target
	for _, t := range m.targets {
		if t.err != nil {
			continue
		}
		if mode == blockdev.ReadWrite {
			// The reading side goes first: what it has cached must not be what the writer starts from.
			_ = t.vol.Close()
			t.vol = nil
			open, err := t.loc.Open(mode)
			if err != nil {
				t.err = fmt.Errorf("cannot %s %s: %w", m.verb, t.name, err)
				continue
			}
			t.open = open
		} else {
			t.open, t.vol = t.vol.open, nil
		}
		ts = append(ts, newTarget(t.name, t.loc, t.open))
		t.place = len(ts)
	}
	return ts
}

// close closes everything. An error of closing what was written is reported: the last bytes may not have arrived.
func (m *members) close() {
	for _, t := range append([]*member{m.primary}, m.targets...) {
		if t.vol != nil {
			_ = t.vol.Close()
			t.vol = nil
		}
		if t.open != nil {
			if err := t.open.Close(); err != nil && t.err == nil {
				t.err = fmt.Errorf("cannot %s %s: %w", m.verb, t.name, err)
			}
			t.open = nil
		}
	}
	if m.locks != nil {
		m.locks.Release()
		m.locks = nil
	}
}

// outcome is what happened to one target, from the guards or from package replicate.
type outcome struct {
	member *member
	result *replicate.Result // nil when a guard stopped it
	err    error
}

// state names the outcome for tables and documents.
func (o *outcome) state() string {
	switch {
	case o.err == nil && o.result == nil:
		return "stopped"
	case o.err == nil:
		return string(o.result.Outcome)
	case errors.Is(o.err, context.Canceled):
		return "stopped"
	case errors.As(o.err, new(missing)):
		return "missing"
	case errors.Is(o.err, replicate.ErrNeedsRecovery):
		return "needs recovery"
	case errors.Is(o.err, blockdev.ErrBusy):
		return "busy"
	case isRefusal(o.err):
		return "refused"
	}
	return "failed"
}

// outcomes joins the results with the targets that never got that far, in the order of the command line. runErr is what
// stopped the run for all of them, nil when nothing did.
func (m *members) outcomes(results []replicate.Result, runErr error) []*outcome {
	var all []*outcome
	for _, t := range m.targets {
		o := &outcome{member: t, err: t.err}
		if t.place > 0 && t.place <= len(results) {
			r := &results[t.place-1]
			o.result = r
			if r.Err != nil {
				o.err = recoverHint(prefixed(m.verb, t.name, r.Err), t.name)
				switch {
				case r.Outcome == replicate.Refused:
					o.err = refusal{o.err}
				case errors.Is(runErr, context.Canceled):
					o.err = interrupted{fmt.Errorf("%w: %w", o.err, runErr)}
				}
			}
		}
		if m.dry && o.err == nil && o.result != nil && o.result.Outcome == replicate.InSync && unrecovered(o.result.Recovered) {
			o.err = recoverHint(fmt.Errorf("cannot call %s in sync: %w", t.name, replicate.ErrNeedsRecovery), t.name)
		}
		all = append(all, o)
	}
	return all
}

// unrecovered says whether a dry run found something for recovery to do that fsck would find too. A free count that is
// out of date is no reason for alarm: firmware and other systems leave it behind.
func unrecovered(r *replicate.Recovery) bool {
	countOnly := r != nil && r.Action == "finished" && r.FSInfoFixed && r.FreedClusters == 0 && r.FATsMended == 0
	return r.Changed() && !countOnly
}

// prefixed names the volume in an error that does not name it yet.
func prefixed(verb, name string, err error) error {
	if first, _, ok := strings.Cut(err.Error(), ": "); ok && strings.HasPrefix(first, "cannot ") && strings.Contains(first, name) {
		return err
	}
	if strings.HasPrefix(err.Error(), name+": ") {
		return fmt.Errorf("cannot %s %w", verb, err)
	}
	return fmt.Errorf("cannot %s %s: %w", verb, name, err)
}

// failureOf sums up the outcomes: nil when every target is done, errDiffers when there is a difference and no error.
func (m *members) failureOf(outcomes []*outcome) error {
	e := &targetsError{verb: m.verb, total: len(outcomes)}
	differs := false
	for _, o := range outcomes {
		if o.err != nil {
			e.errs = append(e.errs, o.err)
		}
		if o.result != nil {
			differs = differs || o.result.Outcome == replicate.Differs
			e.wrote = e.wrote || o.result.Outcome == replicate.Synced || o.result.Recovered.Changed()
		}
	}
	switch {
	case len(e.errs) > 0:
		return e
	case differs:
		return errDiffers
	}
	return nil
}
