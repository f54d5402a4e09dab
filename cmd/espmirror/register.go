//go:build !initrd

package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path"
	"path/filepath"
	"runtime"
	"slices"
	"strings"

	"github.com/urfave/cli/v2"

	"espmirror/blockdev"
	"espmirror/fatdriver"
	"espmirror/gpt"
	"espmirror/replicate"
)

// registerEntry makes a boot entry; tests put failures there.
var registerEntry = gpt.Register

func registerFlags() []cli.Flag {
	return []cli.Flag{&cli.BoolFlag{Name: "register", DisableDefaultText: true,
		Usage: "then make a boot entry in the firmware for each new member, behind all others; one that is there is left as it is"}}
}

// registration is what --register asks for. It is nil where nothing was asked for, and does nothing then.
type registration struct {
	inv     *invocation
	entries *gpt.BootEntries
	arch    string   // as the names of boot loaders have it
	loaders []string // what firmware may start, the best first: paths on a volume
	targets []*member
}

// registration sees to it that boot entries can be made, before anything is written.
func (inv *invocation) registration() (*registration, error) {
	if !inv.flag("register") {
		return nil, nil
	}
	if inv.flag("no-sync") {
		return nil, usagef("--register and --no-sync exclude each other: an entry is made for what is on the volume")
	}
	fail := func(err error) (*registration, error) {
		return nil, refusal{fmt.Errorf("cannot register a boot entry: %w", err)}
	}
	entries, err := gpt.ReadBootEntries(inv.system)
	if err == nil {
		err = gpt.CheckVariablesWritable(inv.system)
	}
	if err != nil {
		return fail(err)
	}
	for _, text := range entries.Problems {
		inv.log.Warn(text)
	}
	return &registration{inv: inv, entries: entries, arch: firmwareArch(inv.system)}, nil
}

// of takes the targets that are to have entries.
func (r *registration) of(targets []*member) error {
	if r == nil {
		return nil
	}
	for _, t := range targets {
		if t.loc != nil {
			if err := r.check(t.name, t.loc); err != nil {
				return err
			}
		}
	}
	r.targets = targets
	return nil
}

// check refuses what no firmware can be started from: images. A loc of nil is an image that does not exist yet.
func (r *registration) check(name string, loc *gpt.Location) error {
	if r == nil || loc != nil && r.inv.onDisk(loc) {
		return nil
	}
	return usagef("--register: %s is an image, and firmware starts from disks", name)
}

// onDisk says whether a volume is on a disk of this machine, other than a loop device.
func (inv *invocation) onDisk(loc *gpt.Location) bool {
	b, err := inv.system.BlockByNum(loc.ID().Dev)
	if !loc.ID().Block {
		// The nodes of another root are files.
		var all []blockdev.Block
		all, err = inv.system.Blocks()
		i := slices.IndexFunc(all, func(b blockdev.Block) bool { return b.Node == loc.Path })
		if err != nil || i < 0 {
			return false
		}
		b = all[i]
	}
	if err == nil && b.Disk != "" {
		b, err = inv.system.Block(b.Disk)
	}
	return err != nil || b.Loop == nil
}

// firmwareArch is the machine type in the names of boot loaders. UEFI specification, "Removable Media Boot Behavior". 32-bit
// firmware starts 64-bit kernels, and programs of its own size only.
func firmwareArch(sys blockdev.System) string {
	bits, _ := os.ReadFile(sys.Path("/sys/firmware/efi/fw_platform_size"))
	switch size := strings.TrimSpace(string(bits)); {
	case runtime.GOARCH == "amd64" && size != "32", runtime.GOARCH == "386" && size == "64":
		return "x64"
	case runtime.GOARCH == "amd64", runtime.GOARCH == "386":
		return "ia32"
	}
	if arch, ok := map[string]string{"arm64": "aa64", "loong64": "loongarch64"}[runtime.GOARCH]; ok {
		return arch
	}
	return runtime.GOARCH // arm, riscv64
}

// choose finds out what an entry is to start: what the primary is started by, or the boot loaders that are on it.
func (r *registration) choose(m *members) error {
	if r == nil {
		return nil
	}
	var first []string
	if p := m.primary; p.guid() != "" {
		entries := r.entries.Leading(p.guid(), p.loc.Part.Number)
		if e := r.entries.Current(); e != nil && e.Leads(p.guid(), p.loc.Part.Number) {
			entries = slices.Insert(entries, 0, *e)
		}
		for _, e := range entries {
			if e.Active() {
				first = append(first, e.File())
			}
		}
	}
	r.loaders = loadersOn(m.src.Root(), r.arch, first)
	if len(r.loaders) == 0 {
		return withHint(refusef("cannot register a boot entry: there is no boot loader for this machine on %s", m.primary.name),
			"firmware looks for EFI/BOOT/BOOT%s.EFI", strings.ToUpper(r.arch))
	}
	for _, t := range r.targets {
		if t.loc == nil || t.loc.Part == nil || t.loc.Part.MBRType != 0 {
			continue // add says what is wrong with it
		}
		if _, err := r.plan(t.name, t.serial, t.loc.HardDrive()); err != nil {
			return err
		}
	}
	return nil
}

// loadersOn finds the programs on a volume that firmware may start, the best first. first are paths that count before the
// usual ones, with a slash at their beginning.
func loadersOn(root *replicate.Item, arch string, first []string) []string {
	arch = strings.ToUpper(arch)
	var found [7][]string
	var walk func(it *replicate.Item)
	walk = func(it *replicate.Item) {
		for _, c := range it.Children {
			k := fatdriver.Fold(c.Path)
			dir, base := path.Split(k)
			switch dir = strings.TrimSuffix(dir, "/"); {
			case c.Dir && (k == "EFI" || strings.HasPrefix(k, "EFI/") && k != "EFI/MICROSOFT" && k != "EFI/APPLE"):
				walk(c)
			case c.Dir || !strings.HasSuffix(k, ".EFI"):
			case slices.ContainsFunc(first, func(f string) bool { return fatdriver.Fold(f) == "/"+k }) && dir != "EFI/LINUX" && !strings.HasPrefix(base, "FWUP"):
				// Kernels have other names after an update, and fwupd is started once.
				found[0] = append(found[0], c.Path)
			case k == "EFI/SYSTEMD/SYSTEMD-BOOT"+arch+".EFI":
				found[1] = append(found[1], c.Path)
			case strings.Count(dir, "/") == 1 && base == "SHIM"+arch+".EFI":
				found[2] = append(found[2], c.Path)
			case strings.Count(dir, "/") == 1 && base == "GRUB"+arch+".EFI":
				found[3] = append(found[3], c.Path)
			case k == "EFI/REFIND/REFIND_"+arch+".EFI":
				found[4] = append(found[4], c.Path)
			case k == "EFI/BOOT/BOOT"+arch+".EFI":
				found[5] = append(found[5], c.Path)
			}
		}
	}
	walk(root)
	place := func(p string) int {
		return slices.IndexFunc(first, func(f string) bool { return fatdriver.Fold(f) == "/"+fatdriver.Fold(p) })
	}
	slices.SortFunc(found[0], func(a, b string) int { return place(a) - place(b) })
	return slices.Concat(found[:]...)
}

// entryReport tells of a boot entry of the firmware.
type entryReport struct {
	Volume      string `json:"volume,omitempty"`
	Name        string `json:"name"` // Boot####
	Description string `json:"description"`
	Path        string `json:"path,omitempty"` // of the image on the volume; "" is the fallback
	Active      bool   `json:"active"`
	InOrder     bool   `json:"in_order"`
	Outcome     string `json:"outcome,omitempty"`
}

func newEntryReport(e *gpt.BootEntry) entryReport {
	return entryReport{Name: e.Name(), Description: e.Description, Path: strings.TrimPrefix(e.File(), "/"), Active: e.Active(), InOrder: e.InOrder}
}

// String is the line that is printed.
func (e entryReport) String() string {
	return fmt.Sprintf("%s (%s): %s on %s: %s", e.Name, e.Description, e.Path, e.Volume, e.Outcome)
}

// newEntry describes the entry for a volume with this serial number.
func newEntry(serial string, part gpt.HardDrive, loader string) *gpt.NewEntry {
	return &gpt.NewEntry{Description: "Linux (espmirror " + serial + ")", File: "/" + loader, Partition: part}
}

// plan says what would be done for a volume.
func (r *registration) plan(name, serial string, part gpt.HardDrive) (entryReport, error) {
	p, err := r.entries.Plan(newEntry(serial, part, r.loaders[0]))
	if errors.Is(err, gpt.ErrNoOrder) {
		err = withHint(err, "make one for the primary first, with efibootmgr --create")
	}
	if err != nil {
		return entryReport{}, refusal{fmt.Errorf("cannot register %s: %w", name, err)}
	}
	e := newEntryReport(&p.BootEntry)
	e.Volume, e.Path, e.Outcome = name, r.loaders[0], p.What
	if p.What != gpt.EntryThere {
		e.Outcome = "to be " + p.What
	}
	return e, nil
}

// planned adds to the report what would be done.
func (r *registration) planned(rep *setReport) error {
	if r == nil {
		return nil
	}
	// What choose has planned has taken numbers.
	entries, err := gpt.ReadBootEntries(r.inv.system)
	if err != nil {
		return err
	}
	r.entries = entries
	for _, t := range r.targets {
		e, err := r.plan(t.name, t.serial, t.loc.HardDrive())
		if err != nil {
			return err
		}
		rep.Entries = append(rep.Entries, e)
	}
	return nil
}

// ofInit sees to it that the new ESP of init can have an entry, and notes in the plan which. add makes it in the end.
func (r *registration) ofInit(p *initPlan, m *members) error {
	v := p.esp()
	if r == nil {
		return nil
	}
	if v == nil || !p.join {
		return refusef("cannot register %s: it does not become a member of a replica set", p.t.name)
	}
	if err := r.choose(m); err != nil {
		return err
	}
	sector := int64(p.t.sector)
	start := v.part.Start
	if p.t.part {
		start = p.t.loc.Part.Start
	}
	e, err := r.plan(p.volumeName(v), formatSerial(v.serial), gpt.HardDrive{Number: uint32(v.part.Number), Start: uint64(start / sector),
		Blocks: uint64(v.part.Size / sector), PartUUID: v.part.GUID.String()})
	if err == nil && p.o.dry {
		p.notes = append(p.notes, "boot entry "+e.String())
	}
	return err
}

// carryOut makes the entries for members that are in sync. err is what came of the sync: an entry that cannot be made is one
// more error beside it.
func (r *registration) carryOut(rep *setReport, err error) error {
	if r == nil || errors.Is(err, context.Canceled) {
		return err
	}
	var failed []error
	for _, t := range r.targets {
		e, err := r.register(rep, t)
		if err != nil {
			failed = append(failed, err)
			continue
		}
		rep.Entries = append(rep.Entries, *e)
		if !e.Active {
			r.inv.log.Warn("the boot entry is there, and switched off", "entry", e.Name, "volume", t.name)
		}
	}
	if len(failed) == 0 {
		return err
	}
	all := &targetsError{verb: "register", errs: failed, total: len(r.targets), wrote: true}
	var targets *targetsError
	switch {
	case errors.As(err, &targets):
		targets.errs, targets.wrote = append(targets.errs, failed...), true
		return err
	case err != nil:
		all.errs = slices.Insert(all.errs, 0, err)
	}
	return all
}

// register makes the entry for one member.
func (r *registration) register(rep *setReport, t *member) (*entryReport, error) {
	done := []string{string(replicate.Synced), string(replicate.InSync)}
	if rep.Sync == nil || !slices.ContainsFunc(rep.Sync.Targets, func(s targetReport) bool { return s.Name == t.name && slices.Contains(done, s.Outcome) }) {
		return nil, withHint(fmt.Errorf("cannot register %s: it is a member, and not in sync, so that its boot entry is missing", t.name),
			"when the cause is gone, `espmirror add --register %s` goes on", quoted(t.name))
	}
	loader, err := r.loaderOf(t)
	if err == nil {
		var done *gpt.Registered
		if done, err = registerEntry(r.inv.system, newEntry(t.serial, t.loc.HardDrive(), loader)); err == nil {
			e := newEntryReport(&done.BootEntry)
			e.Volume, e.Outcome = t.name, done.What
			return &e, nil
		}
	}
	hint := fmt.Sprintf("`espmirror add --register %s` tries again", quoted(t.name))
	if h := hintOf(err); h != "" {
		hint = h + "; then " + hint
	}
	if loader != "" {
		hint += "; by hand: " + efibootmgr(t.loc.Disk, t.loc.Part.Number, loader)
	}
	return nil, withHint(fmt.Errorf("cannot register %s: %w; it is a whole member of the set, and only its boot entry is missing", t.name, err), "%s", hint)
}

// loaderOf is what is on the member itself, now that it is in sync.
func (r *registration) loaderOf(t *member) (string, error) {
	v, err := r.inv.openLocation(t.name, t.loc)
	if err != nil {
		return "", err
	}
	defer v.Close()
	src, err := replicate.OpenVolumeSource(t.name, v.fat)
	if err != nil {
		return "", err
	}
	defer src.Close()
	var first []string
	for _, p := range r.loaders {
		first = append(first, "/"+p)
	}
	if there := loadersOn(src.Root(), r.arch, first); len(there) > 0 {
		return there[0], nil
	}
	return "", fmt.Errorf("the boot loader, %s, is not among what was replicated", r.loaders[0])
}

// efibootmgr is the command that makes an entry.
func efibootmgr(disk string, number int, loader string) string {
	return fmt.Sprintf(`efibootmgr --create --disk %s --part %d --label %s --loader '\%s'`,
		quoted(disk), number, quoted("Linux on "+filepath.Base(disk)), strings.ReplaceAll(loader, "/", `\`))
}

// left adds to the report the entries that lead to members that were taken out. They are the firmware's, and stay.
func (inv *invocation) left(rep *setReport) {
	entries, err := gpt.ReadBootEntries(inv.system)
	if err != nil {
		return
	}
	for _, c := range rep.Changed {
		for _, e := range entries.Leading(c.GUID, 0) {
			l := newEntryReport(&e)
			l.Volume, l.Outcome = c.Name, "left"
			rep.Entries = append(rep.Entries, l)
		}
	}
}

// setEntries are the boot entries in the report of add and remove.
type setEntries struct {
	Entries []entryReport `json:"boot_entries,omitempty"`
}

func (s *setEntries) print(o *output) {
	for _, e := range s.Entries {
		if e.Outcome == "left" {
			o.printf("note: %s (%s) still starts it; efibootmgr -b %s -B deletes it\n", e.Name, safe(e.Description), strings.TrimPrefix(e.Name, "Boot"))
			continue
		}
		o.printf("boot entry %s\n", safe(e.String()))
	}
}

// volumeEntries are the boot entries in the status of a volume: nil where they are not known.
type volumeEntries struct {
	Entries []entryReport `json:"boot_entries,omitzero"`
}

// addEntries finds the boot entries that lead to the volumes. Firmware starts from ESPs on disks.
func (inv *invocation) addEntries(rep *statusReport) {
	entries, err := gpt.ReadBootEntries(inv.system)
	if err != nil {
		inv.log.Debug("boot entries are not shown", "err", err)
		return
	}
	for _, text := range entries.Problems {
		inv.log.Debug(text)
	}
	for i := range rep.Volumes {
		v, number := &rep.Volumes[i], 0
		if v.loc != nil {
			if v.loc.Part == nil || v.loc.Part.Type != gpt.TypeESP || !inv.onDisk(v.loc) {
				continue
			}
			number = v.loc.Part.Number
		} else if v.State != "missing" {
			continue
		}
		if v.PartGUID == "" {
			continue
		}
		v.Entries = []entryReport{}
		for _, e := range entries.Leading(v.PartGUID, number) {
			v.Entries = append(v.Entries, newEntryReport(&e))
		}
	}
}

// entryColumn adds the boot entries to the table, where they are known. Those that firmware does not try by itself are in
// brackets.
func (r *statusReport) entryColumn(t *table) {
	if !slices.ContainsFunc(r.Volumes, func(v statusVolume) bool { return v.Entries != nil }) {
		return
	}
	at := len(t.head) - 1 // before the state, which is of any length
	t.head = slices.Insert(t.head, at, "BOOT")
	t.spare = append(t.spare, "BOOT")
	for i, v := range r.Volumes {
		var names []string
		for _, e := range v.Entries {
			name := e.Name
			if len(names) > 0 {
				name = strings.TrimPrefix(name, "Boot")
			}
			if !e.Active || !e.InOrder {
				name = "(" + name + ")"
			}
			names = append(names, name)
		}
		text := strings.Join(names, ",")
		if v.Entries != nil && text == "" {
			text = "none"
		}
		t.rows[i] = slices.Insert(t.rows[i], at, cell{text: text})
	}
}

// entryFamily are the boot entries as a metric.
func entryFamily(volumes []statusVolume, keys []string) *family {
	f := &family{name: "espmirror_member_boot_entries",
		help: "Boot entries of the firmware that lead to the member, are active and in the order. Absent where it is not known."}
	for i, v := range volumes {
		n := 0
		for _, e := range v.Entries {
			if e.Active && e.InOrder {
				n++
			}
		}
		if v.Entries != nil {
			f.add(fmt.Sprint(n), "member", keys[i])
		}
	}
	return f
}
