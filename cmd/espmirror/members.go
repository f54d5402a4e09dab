package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
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

	src     replicate.Source // the primary, once it is open
	noted   bool             // something was written on it
	set     *replicate.Set   // the primary's replica set file, nil when it has none
	bySet   bool             // the targets are those of the set, not of the command line
	booted  bool             // nobody named the primary: it is what the machine was started from
	waited  time.Duration    // for disks, so far
	limit   *time.Duration   // how long to wait for them, in place of --timeout; nil when the option counts
	scanned *fatdriver.Tree  // the volume of a primary that is read through its mount point
	boot    *members         // the XBOOTLDR partitions on the same disks, nil when the primary's disk has none
	esp     *members         // of XBOOTLDR partitions, the ESPs that they belong to
}

// member is one volume of the set.
type member struct {
	name   string
	dir    string        // a primary that is a directory, or mounted there
	packed bool          // a primary that is an archive
	loc    *gpt.Location // nil for a directory, an archive and for what was not found
	vol    *volume       // open for reading; nil for a directory and once the guards have passed a target
	open   *gpt.Volume   // a target that has passed
	serial string
	err    error // why a target takes no part, or could not be closed
	place  int   // of its result among the results, from 1; 0 when it took no part

	esp  *member        // of an XBOOTLDR partition: the ESP of its disk
	set  *replicate.Set // the set file that is on the target; nil when there is none
	diff *setDifference // how that differs from the primary's; nil when it does not
}

// guid is the partition GUID, "" when there is none.
func (t *member) guid() string {
	if t.loc == nil || t.loc.Part == nil {
		return ""
	}
	return t.loc.Part.PARTUUID()
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
		&cli.GenericFlag{Name: "primary", Value: &once{}, Usage: "replicate from this `VOLUME`, directory or archive, - for one from standard input (default: $SYSTEMD_ESP_PATH, else the ESP that was booted)"},
		&cli.StringSliceFlag{Name: "target", Usage: "replicate to this `VOLUME`; repeat for more (default: the other members of the replica set)"},
	}
}

func timeoutFlag() cli.Flag {
	return &cli.GenericFlag{Name: "timeout", Value: &once{}, Usage: "wait up to `TIME` for members of the replica set that are not there yet (5s, 2min; default: what the set says, else 0)"}
}

// maxJobs is more than anybody has disks or processors.
const maxJobs = 1 << 10

func jobsFlag(byDefault string) cli.Flag {
	return &cli.GenericFlag{Name: "jobs", Value: &once{}, Usage: "write to at most `N` targets at a time, 1 to 1024 (default: " + byDefault + ")"}
}

// readJobs reads --jobs.
func (inv *invocation) readJobs() error {
	v := inv.text("jobs")
	if v == "" {
		return nil
	}
	n, err := strconv.Atoi(v)
	if err != nil || n < 1 || n > maxJobs {
		return usagef("--jobs=%s is no number from 1 to %d", v, maxJobs)
	}
	inv.jobs = n
	return nil
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

// timeout is --timeout; given is false when it was not, or the command does not have it.
func (inv *invocation) timeout() (limit time.Duration, given bool, err error) {
	v := inv.text("timeout")
	if v == "" {
		return 0, false, nil
	}
	if limit, err = replicate.ParseTime(v); err != nil {
		return 0, true, usagef("--timeout: %v", err)
	}
	return limit, true, nil
}

// timeout is how long to wait for disks that are not there, as invocation.timeout tells it.
func (m *members) timeout() (limit time.Duration, given bool, err error) {
	if m.limit != nil {
		return *m.limit, true, nil
	}
	return m.inv.timeout()
}

// primaryName is --primary, or what bootctl would take for the ESP: SYSTEMD_ESP_PATH, or the partition that the machine
// was started from, and then booted is true. The error says why none is known.
func (inv *invocation) primaryName() (name string, booted bool, err error) {
	if name := inv.text("primary"); name != "" {
		return name, false, nil
	}
	if name := os.Getenv("SYSTEMD_ESP_PATH"); name != "" {
		return name, false, nil
	}
	boot, err := gpt.Booted(inv.system)
	if err != nil {
		return "", false, err
	}
	for _, p := range boot.Problems {
		inv.log.Warn(p)
	}
	inv.log.Debug("the primary is what was booted", "PARTUUID", boot.PartUUID, "variable", boot.Via)
	return "PARTUUID=" + boot.PartUUID, true, nil
}

// newMembers finds the volumes that the command line names. An error stops the whole run; nothing is open then.
func (inv *invocation) newMembers(verb string) (*members, error) {
	names := inv.list("target")
	return inv.newMembersOf(verb, names, len(names) == 0)
}

// newMembersOf finds the primary and the targets with the given names. bySet adds the members of the replica set that
// are not among them. With an error, nothing is open, and the members are what was found so far.
func (inv *invocation) newMembersOf(verb string, names []string, bySet bool) (*members, error) {
	name, booted, err := inv.primaryName()
	if err != nil {
		return nil, &usageError{"no primary was given: " + err.Error(), "name it with --primary, or in SYSTEMD_ESP_PATH"}
	}
	m := &members{inv: inv, verb: verb, primary: &member{name: name}, bySet: bySet, booted: booted}
	for _, name := range names {
		if err := notATarget(verb, name); err != nil {
			return nil, err
		}
		m.targets = append(m.targets, &member{name: name})
	}
	m.dry = inv.flag("dry-run") || verb == "compare" || verb == "verify"
	err = m.find(existing(names))
	if err == nil {
		m.checkKinds()
		err = m.findPairs()
	}
	if err != nil {
		m.close()
		return m, err // what was found so far
	}
	return m, nil
}

// primaryError marks what is wrong with the primary or its set, as opposed to the command line.
type primaryError struct{ error }

func (e primaryError) Unwrap() error { return e.error }

// find finds the primary and the targets. among are volumes to look in for names such as PARTUUID=….
func (m *members) find(among []string) error {
	if err := m.findPrimary(among); err != nil {
		return primaryError{fmt.Errorf("cannot use primary %s: %w", m.primary.name, err)}
	}
	m.findTargets(m.targets, among)
	named := len(m.targets)
	if m.bySet {
		if err := m.findSet(); err != nil {
			return err
		}
		m.findTargets(m.targets[named:], among)
	}
	if err := m.wait(among); err != nil {
		return err
	}
	for _, t := range m.targets[named:] {
		if t.loc != nil {
			t.name = t.loc.String()
		}
	}
	return m.sameTwice()
}

func (m *members) findTargets(targets []*member, among []string) {
	for _, t := range targets {
		loc, err := m.inv.findTarget(t.name, among)
		guid, ok := strings.CutPrefix(t.name, "PARTUUID=")
		// Who has not seen all disks does not know that it is gone.
		if ok && m.bySet && errors.As(err, new(missing)) && !strings.Contains(err.Error(), "not everything could be searched") {
			err = withHint(err, "connect its disk; if it is gone for good, take it out of the set with `espmirror remove %s`", guid)
		}
		if t.err = nil; err != nil {
			t.err = fmt.Errorf("cannot %s %s: %w", m.verb, t.name, err)
		}
		t.loc = loc
	}
}

// wait gives disks that are late the time that --timeout or the set allows, and finds them then. Who only looks does not
// wait for a disk that may be dead.
func (m *members) wait(among []string) error {
	limit, given, err := m.timeout()
	if err != nil {
		return err
	}
	if !given && m.bySet && m.verb == "sync" && !m.dry && m.set != nil {
		limit, _ = m.set.Timeout()
	}
	var late []*member
	for _, t := range m.targets {
		if strings.HasPrefix(t.name, "PARTUUID=") && errors.As(t.err, new(missing)) {
			late = append(late, t)
		}
	}
	if err := m.waitFor(limit, late...); err != nil {
		return err
	}
	if limit > 0 {
		m.findTargets(late, among)
	}
	return nil
}

// waitFor waits until members that are named by PARTUUID are there, and no longer than limit, all waits of a run together.
func (m *members) waitFor(limit time.Duration, late ...*member) error {
	left := limit - m.waited
	if left <= 0 || len(late) == 0 {
		return nil
	}
	start := time.Now()
	defer func() { m.waited += time.Since(start) }()
	guids := make([]string, len(late))
	for i, t := range late {
		guids[i] = strings.TrimPrefix(t.name, "PARTUUID=")
	}
	w := gpt.Waiter{System: m.inv.system, Tell: func(missing []string) {
		m.inv.log.Info("waiting for "+partUUIDs(missing), "timeout", limit.String())
	}}
	_, err := w.Wait(m.inv.ctx, guids, left)
	if err != nil && m.inv.ctx.Err() == nil {
		m.inv.log.Warn("cannot wait for disks", "err", err)
		return nil
	}
	return err
}

func (m *members) findPrimary(among []string) error {
	p := m.primary
	if isDir(p.name) {
		p.dir = p.name
		// A mount point stands for the volume that is mounted there, which may be a member of a set.
		path, err := filepath.EvalSymlinks(p.dir)
		if err == nil {
			path, err = filepath.Abs(path)
		}
		if err != nil {
			return err
		}
		mount, ok, err := m.inv.system.MountedAt(path)
		if err != nil || !ok {
			return err
		}
		b, err := m.inv.system.BlockByNum(mount.Dev)
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		if err != nil {
			return err
		}
		if p.loc, err = m.inv.finder().Find(b.Node); err != nil {
			m.inv.log.Debug("what is mounted there cannot be used by itself", "directory", p.dir, "err", err)
			p.loc = nil
		}
		return nil
	}
	if p.packed = isArchive(p.name); p.packed {
		return nil
	}
	if m.booted {
		among = nil // an image on the command line may be a copy of what was booted
	}
	var err error
	if p.loc, err = m.inv.findTarget(p.name, among); errors.As(err, new(missing)) && strings.HasPrefix(p.name, "PARTUUID=") {
		limit, _, terr := m.timeout()
		if terr == nil {
			terr = m.waitFor(limit, p)
		}
		if terr != nil {
			return terr
		}
		if limit > 0 {
			p.loc, err = m.inv.findTarget(p.name, among)
		}
	}
	if err != nil {
		if gone := (missing{}); errors.As(err, &gone) {
			err = gone.error // it is the run that fails, not one of several
		}
		return err
	}
	if m.booted && p.loc.Part != nil && p.loc.Part.Type == gpt.TypeXBOOTLDR {
		// A boot loader that was started from there names it; the ESP beside it is what the set is about.
		loc, problems, err := m.inv.finder().OnSameDisk(p.loc, gpt.TypeESP)
		if err != nil {
			return err
		}
		for _, text := range problems {
			m.inv.log.Warn(text)
		}
		p.loc = loc
	}
	if m.booted {
		p.name = p.loc.String()
	}
	return nil
}

// findSet takes the other members of the replica set for targets.
func (m *members) findSet() error {
	if _, err := m.source(); err != nil {
		return primaryError{err}
	}
	p := m.primary
	if m.set == nil {
		return &usageError{"no target was given, and " + p.name + " has no " + replicate.SetPath,
			"name each target with --target, or make a replica set with `espmirror add`"}
	}
	if !m.isMember() {
		hint := "add it with `espmirror add`, or name the targets with --target"
		if p.guid() == "" {
			hint = "name the targets with --target; only a partition of a GPT can be a member"
		}
		return primaryError{withHint(refusef("cannot %s: primary %s is not in its own replica set, %s", m.verb, p.name, replicate.SetPath), "%s", hint)}
	}
	for _, guid := range m.set.Members() {
		if guid != p.guid() && !slices.ContainsFunc(m.targets, func(t *member) bool { return t.guid() == guid }) {
			m.targets = append(m.targets, &member{name: "PARTUUID=" + guid})
		}
	}
	if len(m.targets) == 0 {
		m.inv.log.Info("the replica set has no other member", "primary", p.name)
	}
	return nil
}

// isMember says whether the primary is in its own replica set.
func (m *members) isMember() bool {
	if m.esp != nil {
		return m.esp.isMember()
	}
	return m.set != nil && m.primary.guid() != "" && m.set.Has(m.primary.guid())
}

// checkKinds refuses an XBOOTLDR partition as the copy of an ESP, and the other way round, as it may be named, or as a set
// file with the wrong one of two GUIDs would have it: the one on the disk of a target goes with its ESP by itself.
func (m *members) checkKinds() {
	p := m.primary
	if m.verb == seedVerb || relaxed() || p.loc == nil || p.loc.Part == nil {
		return
	}
	for _, t := range m.targets {
		known := t.err == nil && t.loc.Part != nil && bootType(t.loc.Part) && bootType(p.loc.Part)
		if known && t.loc.Part.Type != p.loc.Part.Type {
			t.err = withHint(refusef("cannot %s %s: it is an %s partition, and primary %s an %s", m.verb, t.name, t.loc.Part.TypeName(), p.name, p.loc.Part.TypeName()),
				"name the ESP on its disk: the XBOOTLDR partition goes with it")
		}
	}
}

// bootType says whether a partition type is one of those that are not to be mixed up. An exFAT primary may be of another.
func bootType(p *gpt.Partition) bool { return p.Type == gpt.TypeESP || p.Type == gpt.TypeXBOOTLDR }

// findPairs finds the XBOOTLDR partitions: a boot loader takes the one on its own disk, so that of the primary's disk goes
// to those on the targets' disks.
func (m *members) findPairs() error {
	p := m.primary
	if p.loc == nil || p.loc.Part == nil || p.loc.Part.Type != gpt.TypeESP || !slices.Contains([]string{"sync", "compare", "verify"}, m.verb) {
		return nil
	}
	loc, err := m.inv.xbootldr(p.loc)
	if err != nil || loc == nil {
		return err
	}
	b := &members{inv: m.inv, verb: m.verb, dry: m.dry, esp: m, primary: &member{name: loc.String(), loc: loc, esp: p}}
	for _, t := range m.targets {
		if t.loc == nil || t.err != nil {
			continue // its ESP says why
		}
		x := &member{name: t.loc.Disk + " (XBOOTLDR)", esp: t}
		if x.loc, err = m.inv.xbootldr(t.loc); err != nil {
			x.err = fmt.Errorf("cannot %s the XBOOTLDR partition beside %s: %w", m.verb, t.name, err)
		} else if x.loc == nil {
			x.err = withHint(missing{fmt.Errorf("cannot %s an XBOOTLDR partition beside %s: there is none on its disk, and %s has one", m.verb, t.name, p.name)},
				"make one there: when that disk is booted, the entries that are on the primary's are missing")
		} else {
			x.name = x.loc.String()
		}
		b.targets = append(b.targets, x)
	}
	if err := b.sameTwice(); err != nil {
		return err
	}
	m.boot = b
	return nil
}

// xbootldr finds the XBOOTLDR partition on the disk of an ESP, nil when there is none.
func (inv *invocation) xbootldr(esp *gpt.Location) (*gpt.Location, error) {
	boot, problems, err := inv.finder().OnSameDisk(esp, gpt.TypeXBOOTLDR)
	for _, text := range problems {
		inv.log.Warn(text)
	}
	if errors.Is(err, gpt.ErrNotFound) {
		return nil, nil
	}
	return boot, err
}

// volumes are the sets of volumes of a run in the order in which they are written: what entries refer to first.
func (m *members) volumes() []*members {
	if m.boot != nil {
		return []*members{m.boot, m}
	}
	return []*members{m}
}

// sources opens the primary, and the XBOOTLDR partition beside it if there is something on it to replicate.
func (m *members) sources() error {
	if _, err := m.source(); err != nil {
		return err
	}
	if err := m.checkSelection(); err != nil || m.boot == nil {
		return err
	}
	src, err := m.boot.source()
	if errors.Is(err, fatdriver.ErrNotFAT) {
		// Linux and GRUB read other filesystems there. The ESPs are no worse for it.
		m.inv.log.Warn("the XBOOTLDR partition is not FAT, and is not replicated", "primary", m.boot.primary.name, "err", err)
		m.boot.close()
		m.boot = nil
		return nil
	}
	if err != nil {
		return err
	}
	o := m.boot.options(replicate.Options{Selection: m.inv.selection()})
	if err := o.Selection.Check(src); errors.Is(err, replicate.ErrEmptySelection) {
		m.inv.log.Info("there is nothing to replicate on the XBOOTLDR partition", "primary", m.boot.primary.name)
		m.boot.close()
		m.boot = nil
	}
	return nil
}

// checkSelection refuses a selection of which the primary has nothing, and tells of the parts that it has not: what a target
// has there goes.
func (m *members) checkSelection() error {
	sel := m.options(replicate.Options{Selection: m.inv.selection()}).Selection
	if err := sel.Check(m.src); err != nil {
		if m.isMember() {
			return err // the set file goes along always, so that package replicate finds something
		}
		return nil
	}
	for _, p := range sel.Select {
		one := replicate.Selection{Select: []string{p}, Exclude: sel.Exclude}
		if err := one.Check(m.src); errors.Is(err, replicate.ErrEmptySelection) {
			m.inv.log.Warn("it is selected, and not on the primary: what targets have there is removed", "path", p, "primary", m.primary.name)
		}
	}
	return nil
}

// run opens the targets that have passed the guards, and hands everything to package replicate. The results are those of
// the volumes in their order; they are nil when nothing was looked at.
func (m *members) run(mode blockdev.Mode, o replicate.Options, run engineRun) ([][]replicate.Result, error) {
	bar := m.inv.startProgress()
	defer bar.stop()
	o.Progress = bar.callback()
	var jobs []replicate.Job
	var at []int
	results := make([][]replicate.Result, len(m.volumes()))
	for _, x := range m.volumes() {
		x.openTargets(mode)
	}
	if m.verb == "sync" {
		m.together() // one that could not be opened
	}
	for i, x := range m.volumes() {
		if targets := x.opened(); len(targets) > 0 {
			jobs = append(jobs, replicate.Job{Source: x.src, Targets: targets, Options: x.options(o)})
			at = append(at, i)
		}
	}
	if len(jobs) == 0 {
		return results, nil
	}
	rs, err := run(m.inv.ctx, jobs)
	if rs == nil {
		return nil, err
	}
	for i, r := range rs {
		results[at[i]] = r
	}
	return results, err
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
	if m.primary.packed {
		return false, nil // an archive is no target
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
	if m.src != nil {
		return m.src, nil
	}
	p := m.primary
	fail := func(err error) (replicate.Source, error) {
		return nil, fmt.Errorf("cannot use primary %s: %w", p.name, err)
	}
	src, err := m.exfatSource()
	if err != nil {
		return fail(err)
	}
	if p.loc != nil && src == nil {
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
			if ok && p.dir == "" {
				p.dir = mount.Point
				m.inv.log.Info("the primary is mounted, so its mount point is the source", "primary", p.name, "directory", p.dir)
			}
		}
		if p.dir == "" {
			if err := m.recoverPrimary(); err != nil {
				return fail(err)
			}
		}
	}
	if src == nil {
		if src, err = m.open(); err != nil {
			return fail(refuseContent(err))
		}
	}
	if m.src = src; m.esp == nil {
		if m.set, err = replicate.ReadSet(src); err != nil {
			return fail(refusal{err})
		}
		if m.set != nil {
			for _, text := range m.set.Warnings() {
				m.inv.log.Warn(text, "primary", p.name)
			}
		}
	}
	return src, nil
}

// open opens the source.
func (m *members) open() (replicate.Source, error) {
	p := m.primary
	if p.packed {
		return m.inv.openArchive(p.name)
	}
	if p.dir == "" {
		return replicate.OpenVolumeSource(p.name, p.vol.fat)
	}
	if p.vol != nil {
		// What the volume's directories say goes into the fingerprint: it must be no newer than what is read afterwards.
		err := syncDir(p.dir)
		if err == nil {
			m.scanned, err = p.vol.fat.Scan()
		}
		if err == nil {
			err = m.scanned.Damage()
		}
		if err != nil {
			m.inv.log.Debug("no fingerprint of the primary", "err", err)
			m.scanned = nil
		}
	}
	return replicate.OpenDirSource(p.dir)
}

// syncDir makes the filesystem of a directory write what it holds back.
func syncDir(dir string) error {
	f, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer f.Close()
	return unix.Syncfs(int(f.Fd()))
}

// recoverPrimary finishes what an interrupted run left on a primary that was a target then.
func (m *members) recoverPrimary() error {
	p := m.primary
	pending, err := m.inv.engine.pending(p.vol.target())
	if err != nil || !pending {
		return nil // a damaged volume is refused when it is opened as a source
	}
	if m.dry {
		if m.verb == "compare" || m.verb == "verify" || m.verb == "recover" || m.verb == waitVerb {
			return nil // what readers see now is what counts
		}
		return recoverHint(replicate.ErrNeedsRecovery, p.name)
	}
	if m.locks == nil {
		locks, err := m.inv.system.LockDisks(m.inv.ctx, lockWait, p.loc.ID())
		if err != nil {
			return err
		}
		defer locks.Release()
	}
	m.inv.log.Info("an earlier run on the primary was interrupted, and is finished first", "primary", p.name)
	_ = p.vol.Close()
	p.vol = nil
	err = m.withPrimary(func(t *replicate.Target) error {
		_, err := m.inv.engine.recover(m.inv.ctx, t, replicate.RecoverOptions{Options: replicate.Options{Log: m.inv.engineLog(false)}})
		return err
	})
	if err != nil {
		return err
	}
	p.vol, err = m.inv.openLocation(p.name, p.loc)
	return err
}

// withPrimary opens a primary that is not mounted for writing.
func (m *members) withPrimary(f func(*replicate.Target) error) error {
	p := m.primary
	open, err := p.loc.Open(blockdev.ReadWrite)
	if err != nil {
		return err
	}
	err = f(newTarget(p.name, p.loc, open))
	if cerr := open.Close(); err == nil {
		err = cerr
	}
	return err
}

// readOnly says why the primary cannot be written to, as far as that shows without opening it; nil when it can.
func (m *members) readOnly() error {
	p := m.primary
	path := p.dir
	if path == "" {
		if id := p.loc.ID(); id.Block {
			b, err := m.inv.system.BlockByNum(id.Dev)
			if err == nil && b.ReadOnly {
				return blockdev.ErrReadOnly
			}
			return nil
		}
		path = p.loc.Path
	}
	err := unix.Access(path, unix.W_OK)
	switch {
	case errors.Is(err, unix.EROFS) && p.dir != "":
		return withHint(blockdev.ErrReadOnly, "mount it for writing: mount -o remount,rw %s", quoted(p.dir))
	case errors.Is(err, unix.EROFS), errors.Is(err, unix.EACCES):
		return blockdev.ErrReadOnly
	}
	return nil
}

// try says whether the state can be written on the primary, before anything is written to a target.
func (m *members) try(ctx context.Context, state []byte) error {
	if cause := m.readOnly(); cause != nil {
		return refusal{cause}
	}
	if m.primary.dir != "" {
		return nil
	}
	t := newTarget(m.primary.name, m.primary.loc, m.primary.vol.open)
	_, err := replicate.Put(ctx, t, []replicate.File{{Path: replicate.StatePath, Content: state}}, replicate.Options{DryRun: true})
	if errors.Is(err, fatdriver.ErrNoSpace) {
		err = withHint(err, "make room on the primary; nothing was written to any target")
	}
	return err
}

// save writes the state of the replica set on the primary, through the mount point when it is mounted.
func (m *members) save(ctx context.Context, state []byte) error {
	m.noted = true
	return m.put(ctx, replicate.File{Path: replicate.StatePath, Content: state})
}

// put writes a file that is the primary's own.
func (m *members) put(ctx context.Context, f replicate.File) error {
	now := m.inv.clock()
	f.Meta = fatdriver.Meta{Attr: fatdriver.AttrArchive, Created: now, Modified: now, Accessed: now}
	if dir := m.primary.dir; dir != "" {
		err := replicate.PutDir(dir, []replicate.File{f})
		if errors.Is(err, unix.EROFS) {
			err = withHint(refusal{err}, "mount it for writing: mount -o remount,rw %s", quoted(dir))
		}
		return err
	}
	return m.withPrimary(func(t *replicate.Target) error {
		_, err := replicate.Put(ctx, t, []replicate.File{f}, replicate.Options{Log: m.inv.engineLog(false), Random: m.inv.random})
		return err
	})
}

// options completes what package replicate has to know of the set.
func (m *members) options(o replicate.Options) replicate.Options {
	set := m.set
	if m.esp != nil {
		set = m.esp.set
		o.Set = set
	}
	o.SourceGUID = m.primary.guid()
	if m.esp != nil {
		o.SourceGUID = m.esp.primary.guid()
	}
	if boot, err := gpt.Booted(m.inv.system); err == nil {
		o.BootedEntry, o.DefaultEntry, o.PreferredEntry, o.OneShotEntry = boot.Entry, boot.Default, boot.Preferred, boot.OneShot
	}
	o.SourceTree = m.scanned
	o.Random, o.Jobs = m.inv.random, m.inv.jobs
	if t, err := sourceDate(); err != nil {
		m.inv.log.Warn(err.Error() + "; the clock counts")
	} else {
		o.Now = t
	}
	if o.Member = m.isMember(); o.Member {
		if o.Save = m.save; m.verb == "sync" {
			o.Try = m.try
		}
	}
	if set == nil {
		return o
	}
	// What the set leaves out stays out whatever the command line adds: what is not left out is deleted where the primary
	// does not have it.
	sel := set.Selection()
	if len(o.Selection.Select) == 0 {
		o.Selection.Select = sel.Select
	}
	o.Selection.Exclude = append(sel.Exclude, o.Selection.Exclude...)
	if n, ok := set.KeepFree(); ok && o.KeepFree == 0 {
		o.KeepFree = n
	}
	return o
}

// refuseContent turns "this is no FAT volume that can be written" into a guard's answer.
func refuseContent(err error) error {
	for _, e := range slices.Concat(archiveErrors, []error{fatdriver.ErrNotFAT, fatdriver.ErrDamaged, gpt.ErrDamaged, gpt.ErrChanged}) {
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
		return targetHint(refuseContent(err), t.loc)
	}
	t.vol, t.serial = vol, vol.fat.UUID()
	if m.esp == nil && (m.set != nil || m.boot != nil) {
		// Its XBOOTLDR partition goes by the set file that is here. What is wrong with the volume shows later.
		if src, err := replicate.OpenVolumeSource(t.name, vol.fat); err == nil {
			if t.set, err = replicate.ReadSet(src); err != nil {
				m.inv.log.Warn("the target's replica set file cannot be read", "target", t.name, "err", err)
			}
			m.compareSets(t)
		}
	}
	return checkMD(vol.open)
}

// together leaves out the volumes whose partner on the same disk did not pass the guards, as package replicate does with
// those that fail later. That a disk has no XBOOTLDR partition at all is no reason to let its ESP go stale.
func (m *members) together() {
	if m.boot == nil {
		return
	}
	for _, x := range m.boot.targets {
		fail := func(t, partner *member) {
			t.err = refusef("cannot %s %s: it goes with %s, which cannot be used", m.verb, t.name, partner.name)
		}
		switch {
		case x.err == nil && x.esp.err != nil:
			fail(x, x.esp)
		case x.err != nil && x.esp.err == nil && !errors.As(x.err, new(missing)):
			fail(x.esp, x)
		}
	}
}

// setDifference says how the set file of a target differs from the primary's.
type setDifference struct {
	There []string `json:"only_there"` // members that only the target's lists
	Here  []string `json:"only_here"`  // members that only the primary's lists
}

// compareSets compares the set file of a target with the primary's, and tells of members that were taken out behind its
// back: who boots from there goes by what it says.
func (m *members) compareSets(t *member) {
	if m.verb == "add" || m.set == nil || t.set == nil || string(m.set.Bytes()) == string(t.set.Bytes()) {
		return
	}
	others := func(s, than *replicate.Set) []string {
		list := []string{}
		for _, guid := range s.Members() {
			if !than.Has(guid) && !slices.Contains(m.inv.changed, guid) {
				list = append(list, guid)
			}
		}
		return list
	}
	d := &setDifference{others(t.set, m.set), others(m.set, t.set)}
	t.diff = d
	switch text := "the target's " + replicate.SetPath; {
	case len(d.There) > 0:
		m.inv.log.Warn(text+" lists members that the primary's does not: "+strings.Join(d.There, ", "), "target", t.name)
	case len(d.Here) > 0:
		m.inv.log.Info(text+" does not list members that the primary's does: "+strings.Join(d.Here, ", "), "target", t.name)
	case len(m.inv.changed) == 0:
		m.inv.log.Info(text+" is not the primary's", "target", t.name)
	}
}

// lineageHint says what to do where the primary is not the newer one, in commands that can be given as they are: those of
// the ESPs, with which their XBOOTLDR partitions go.
func (m *members) lineageHint(err error, t *member, l *replicate.Lineage) error {
	p := m.primary
	if m.esp != nil {
		p, t = m.esp.primary, t.esp
	}
	way := func(from, to *member, force string) string {
		return fmt.Sprintf("`espmirror sync %s--primary %s --target %s`", force, quoted(from.name), quoted(to.name))
	}
	device, unmount := p, ""
	if p.packed {
		device = &member{} // nothing is replicated to an archive
	}
	if p.dir != "" {
		device, unmount = &member{}, "unmount "+quoted(p.dir)+" and " // a target must not be mounted
		if p.loc != nil {
			device.name = p.loc.String()
		}
	}
	switch {
	case errors.Is(err, replicate.ErrStaleSource) && device.name != "" && changedAlone(l):
		// It may be an update that was made there, or damage: nobody but a person can tell.
		return withHint(err, "see what differs: `espmirror verify --primary %s --target %s`; then %s puts it back as %s has it, or %s%s keeps it",
			quoted(p.name), quoted(t.name), way(p, t, "--force "), p.name, unmount, way(t, device, ""))
	case errors.Is(err, replicate.ErrStaleSource) && device.name != "":
		return withHint(err, "%sreplicate the other way: %s, or boot from %s; --force overwrites it all the same", unmount, way(t, device, ""), t.name)
	case errors.Is(err, replicate.ErrDiverged) && device.name != "":
		if unmount != "" {
			unmount = "(" + strings.TrimSuffix(unmount, " and ") + " first) "
		}
		return withHint(err, "look at both, and name the winner: %s keeps what %s has, %s %swhat %s has",
			way(p, t, "--force "), p.name, way(t, device, "--force "), unmount, t.name)
	case errors.Is(err, replicate.ErrDiverged):
		return withHint(err, "%s overwrites what %s has", way(p, t, "--force "), t.name)
	}
	return err
}

// changedAlone says whether a target that is not ahead of the primary was changed without a run: no other member has what it
// has.
func changedAlone(l *replicate.Lineage) bool { return l != nil && l.Generation <= l.Base }

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
	for m := m; m != nil; m = m.boot {
		for _, t := range m.targets {
			if t.err == nil {
				ids = append(ids, t.loc.ID())
			}
		}
		if m.isMember() {
			ids = append(ids, m.primaryDisk()...) // the generation is noted there
		}
	}
	return m.lockDisks(ids...)
}

// primaryDisk is what has to be locked to write to the primary. Where it is mounted nobody else writes to the device.
func (m *members) primaryDisk() []blockdev.ID {
	if m.primary.dir != "" || m.primary.loc == nil {
		return nil
	}
	return []blockdev.ID{m.primary.loc.ID()}
}

func (m *members) lockDisks(ids ...blockdev.ID) error {
	locks, err := m.inv.system.LockDisks(m.inv.ctx, lockWait, ids...)
	if err != nil {
		return err
	}
	m.locks = locks
	return nil
}

// openTargets opens what has passed the guards.
func (m *members) openTargets(mode blockdev.Mode) {
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
	}
}

// opened are the targets for package replicate.
func (m *members) opened() []*replicate.Target {
	var ts []*replicate.Target
	for _, t := range m.targets {
		if t.err != nil {
			continue
		}
		rt := newTarget(t.name, t.loc, t.open)
		if m.boot != nil {
			rt.Pair = t.loc.String()
		}
		if t.esp != nil {
			rt.Pair, rt.Member, rt.Set = t.esp.loc.String(), t.esp.guid(), t.esp.set
		}
		ts = append(ts, rt)
		t.place = len(ts)
	}
	return ts
}

// close closes everything. An error of closing what was written is reported: the last bytes may not have arrived.
func (m *members) close() {
	if m.boot != nil {
		m.boot.close()
	}
	m.closeSource()
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

// closeSource closes the primary; source opens it again.
func (m *members) closeSource() {
	if m.src != nil {
		_ = m.src.Close()
		m.src = nil
	}
	if p := m.primary; p.vol != nil {
		_ = p.vol.Close()
		p.vol = nil
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
func (m *members) outcomes(results [][]replicate.Result, runErr error) []*outcome {
	var all []*outcome
	volumes := m.volumes()
	for i := range volumes {
		// The ESPs come first: they are what the command line is about.
		at := len(volumes) - 1 - i
		var rs []replicate.Result
		if at < len(results) {
			rs = results[at]
		}
		all = append(all, volumes[at].outcomesOf(rs, runErr)...)
	}
	return all
}

func (m *members) outcomesOf(results []replicate.Result, runErr error) []*outcome {
	var all []*outcome
	for _, t := range m.targets {
		o := &outcome{member: t, err: t.err}
		if t.place > 0 && t.place <= len(results) {
			r := &results[t.place-1]
			o.result = r
			if r.Err != nil {
				o.err = m.lineageHint(recoverHint(prefixed(m.verb, t.name, r.Err), t.name), t, r.Lineage)
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
	e := &targetsError{verb: m.verb, total: len(outcomes), wrote: m.noted || m.boot != nil && m.boot.noted}
	differs := false
	for _, o := range outcomes {
		if o.err != nil {
			e.errs = append(e.errs, o.err)
		}
		if o.result != nil {
			differs = differs || o.result.Outcome == replicate.Differs
			e.wrote = e.wrote || o.result.Outcome == replicate.Synced || o.result.Written > 0 || !m.dry && o.result.Recovered.Changed()
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
