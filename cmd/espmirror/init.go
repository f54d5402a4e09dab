//go:build !initrd

package main

import (
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
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

// initVerb is how messages call it.
const initVerb = "init"

// imageJobs is how many targets init writes to at a time where nobody said. Image files share a disk: what one gains while
// another waits for it is gained with 8, and 100 at a time take as long on an idle machine, and far longer on a busy one.
const imageJobs = 8

func (inv *invocation) initCommand() *cli.Command {
	return &cli.Command{
		Name:  initVerb,
		Usage: "make new members out of blank disks, free space, partitions or images",
		UsageText: "espmirror init [OPTIONS] DISK|PARTITION|IMAGE...\n" +
			"espmirror init [OPTIONS] --size SIZE IMAGE...",
		Description: "A blank disk gets a GPT; on a disk with a GPT free space is used, or its ESP when that is blank. Then an ESP, and\n" +
			"an XBOOTLDR partition where the primary has one, are formatted, filled from the primary, and added to its\n" +
			"replica set. What holds anything is refused. Cut off anywhere, it leaves no volume or a whole one, and goes on\n" +
			"when it is run again. By size the ESP is FAT32 from 33M on (259M with sectors of 4096 bytes), FAT16 from 3M (17M).\n\n" +
			"Of several targets none is written to before all are planned, and the primary is read once for all of them. With\n" +
			"--seed TEXT each of them has the seed TEXT/NAME, by the last part of its name: `--seed TEXT/b.img b.img` makes the\n" +
			"same image by itself, as long as it joins no set.",
		Flags: append(append(append([]cli.Flag{
			&cli.GenericFlag{Name: "primary", Value: &once{}, Usage: "replicate from this `VOLUME`, directory or archive, - for one from standard input (default: $SYSTEMD_ESP_PATH, else the ESP that was booted)"},
		}, selectFlags()...),
			&cli.GenericFlag{Name: "size", Value: &once{}, Usage: "make a new image file of `SIZE` (4G)"},
			&cli.GenericFlag{Name: "sector-size", Value: &once{}, Usage: "of an image without a partition table: 512 or 4096 `BYTES` (default: 512)"},
			&cli.GenericFlag{Name: "esp-size", Value: &once{}, Usage: "`SIZE` of the ESP (default: the primary's, or 512M, or twice what is selected; what is free where that is less)"},
			&cli.GenericFlag{Name: "xbootldr", Value: &once{}, Usage: "`SIZE` of an XBOOTLDR partition, or no (default: that of the primary's disk)"},
			&cli.GenericFlag{Name: "fat", Value: &once{}, Usage: "FAT `TYPE` of the ESP: 12, 16 or 32 (default: by its size)"},
			&cli.GenericFlag{Name: "label", Value: &once{}, Usage: "volume `LABEL` of the ESP (default: ESP- and four digits of its serial number)"},
			&cli.GenericFlag{Name: "partlabel", Value: &once{}, Usage: "partition `NAME` of the ESP"},
			&cli.GenericFlag{Name: "like", Value: &once{}, Usage: "copy the partition layout of this `DISK`, with fresh GUIDs, and tell what the other partitions still need"},
			&cli.BoolFlag{Name: "new-table", Usage: "make a new partition table also where there is one; needs --force then", DisableDefaultText: true},
			&cli.GenericFlag{Name: "seed", Value: &once{}, Usage: "derive GUIDs and serial numbers from `TEXT`, another one for each disk (from TEXT/NAME for several), so that images can be built again; not a random seed"},
			&cli.StringFlag{Name: "random-seed", Value: "no", Usage: "also make a loader/random-seed; never for an image that will be copied: `yes|no`"},
			&cli.BoolFlag{Name: "discard", Usage: "first tell a block device to forget what it holds there", DisableDefaultText: true},
			&cli.BoolFlag{Name: "no-set", Usage: "do not add it to the primary's replica set", DisableDefaultText: true},
			&cli.BoolFlag{Name: "force", Usage: "overwrite what was found there; never what is in use, and no partition of a GPT without --new-table", DisableDefaultText: true},
			&cli.BoolFlag{Name: "dry-run", Aliases: []string{"n"}, Usage: "print what would be made, and write nothing", DisableDefaultText: true},
			registerFlags()[0], jobsFlag(fmt.Sprintf("all of them; %d where there are image files", imageJobs)), noProgressFlag()), manifestFlags()...),
		Action: inv.action(1, -1, "name a disk, partition or image", inv.init),
	}
}

// initOptions are the options of init, read.
type initOptions struct {
	target           string
	size             int64 // of a new image, 0 when not given
	sector           int   // 0 when not given
	espSize          int64 // 0 when not given
	bootSize         int64 // 0 when not given; -1: none
	fat              fatdriver.Type
	label, partLabel string
	like             string
	newTable         bool
	seed             string
	randomSeed       bool
	discard          bool
	noSet            bool
	force, dry       bool
}

func (inv *invocation) initOptions() (*initOptions, error) {
	o := &initOptions{
		label: inv.text("label"), partLabel: inv.text("partlabel"), like: inv.text("like"),
		newTable: inv.flag("new-table"), seed: inv.text("seed"), discard: inv.flag("discard"), noSet: inv.flag("no-set"),
		force: inv.flag("force"), dry: inv.flag("dry-run"),
	}
	for _, s := range []struct {
		name string
		to   *int64
	}{{"size", &o.size}, {"esp-size", &o.espSize}, {"xbootldr", &o.bootSize}} {
		v := inv.text(s.name)
		if v == "" {
			continue
		}
		if s.name == "xbootldr" && v == "no" {
			o.bootSize = -1
			continue
		}
		n, err := replicate.ParseSize(v)
		if err != nil {
			return nil, usagef("--%s: %v", s.name, err)
		}
		if n < 1<<20 {
			return nil, usagef("--%s: %s is less than a MiB", s.name, v)
		}
		*s.to = n
	}
	switch v := inv.text("sector-size"); v {
	case "":
	case "512", "4096":
		o.sector, _ = strconv.Atoi(v)
	default:
		return nil, usagef("--sector-size=%s is not 512 or 4096", v)
	}
	switch v := inv.text("fat"); v {
	case "":
	case "12", "16", "32":
		n, _ := strconv.Atoi(v)
		o.fat = fatdriver.Type(n)
	default:
		return nil, usagef("--fat=%s is not 12, 16 or 32", v)
	}
	switch v := inv.text("random-seed"); v {
	case "no":
	case "yes":
		o.randomSeed = true
	default:
		return nil, usagef("--random-seed=%s is not yes or no", v)
	}
	if o.like != "" && (o.espSize != 0 || o.bootSize > 0) {
		return nil, usagef("--like brings the sizes: --esp-size and --xbootldr=SIZE have no meaning beside it")
	}
	if err := inv.readJobs(); err != nil {
		return nil, err
	}
	if _, err := sourceDate(); err != nil {
		return nil, err
	}
	if err := gpt.CheckName(o.partLabel); err != nil {
		return nil, usagef("--partlabel: %v", err)
	}
	return o, nil
}

// forTarget are the options for one of several targets. Each has a seed of its own, which does not depend on the others.
func (o *initOptions) forTarget(name string, several bool) *initOptions {
	p := *o
	p.target = name
	if several && p.seed != "" {
		p.seed += "/" + filepath.Base(name)
	}
	return &p
}

// derived are the random bytes that belong to a seed: those of SHA-256 over the seed and a counter.
type derived struct {
	seed string
	n    uint64
	left []byte
}

// Read implements io.Reader.
func (d *derived) Read(p []byte) (int, error) {
	for i := range p {
		if len(d.left) == 0 {
			sum := sha256.Sum256(fmt.Appendf(nil, "espmirror bytes 1\x00%d\x00%s", d.n, d.seed))
			d.left, d.n = sum[:], d.n+1
		}
		p[i], d.left = d.left[0], d.left[1:]
	}
	return len(p), nil
}

// initTarget is what is to become a member.
type initTarget struct {
	o      *initOptions
	name   string
	loc    *gpt.Location   // the whole disk or image, or the partition; nil for an image that does not exist
	part   bool            // it is a partition
	id     blockdev.ID     // when loc is not nil
	size   int64           // of the disk or image
	sector int             // bytes
	phys   int             // bytes
	table  *gpt.Table      // of the disk; nil when there is none that counts
	err    error           // why, when there is one that does not
	found  []gpt.Signature // on the whole disk
	create bool            // the image file is made, or gets its size
	unmade bool            // the table is one that an interrupted run left, and is finished first
}

// findInitTarget finds out what the argument is. Nothing is written.
func (inv *invocation) findInitTarget(o *initOptions) (*initTarget, error) {
	t := &initTarget{name: o.target}
	info, err := os.Stat(o.target)
	switch {
	case errors.Is(err, fs.ErrNotExist) && (strings.Contains(o.target, "@@") || strings.Contains(o.target, "=")):
		return t, inv.initPartition(t)
	case errors.Is(err, fs.ErrNotExist):
		if o.size == 0 {
			return nil, withHint(refusef("cannot init %s: there is no such file or device", o.target), "--size SIZE makes a new image file")
		}
		if _, err := os.Lstat(o.target); err == nil {
			return nil, refusef("cannot init %s: it is a symbolic link that leads to nothing", o.target)
		}
		if dir := filepath.Dir(o.target); !isDir(dir) {
			return nil, refusef("cannot init %s: there is no directory %s", o.target, dir)
		}
	case err != nil:
		return nil, fmt.Errorf("cannot init %s: %w", o.target, err)
	case info.IsDir():
		return nil, usagef("%s is a directory, and a disk or image is needed", o.target)
	case o.size != 0 && !info.Mode().IsRegular():
		return nil, usagef("--size is for a new image file, and %s is there", o.target)
	case o.size != 0 && info.Size() != 0 && info.Size() != o.size:
		return nil, refusef("cannot init %s: it is there with %d bytes, and --size says %d", o.target, info.Size(), o.size)
	}
	if err != nil || info.Size() == 0 && info.Mode().IsRegular() {
		// A run that was cut off may have left an empty file.
		if o.size == 0 {
			return nil, withHint(refusef("cannot init %s: the file is empty", o.target), "--size SIZE gives it one")
		}
		t.create, t.sector = true, max(512, o.sector)
		t.size, t.phys = o.size/int64(t.sector)*int64(t.sector), t.sector
		if t.size != o.size {
			return nil, usagef("--size=%d is no multiple of the sector size %d", o.size, t.sector)
		}
		return t, nil
	}
	if t.loc, err = inv.finder().Whole(o.target); errors.Is(err, gpt.ErrNotDisk) {
		return t, inv.initPartition(t)
	}
	if err != nil {
		return nil, fmt.Errorf("cannot init %s: %w", o.target, err)
	}
	t.id, t.size = t.loc.ID(), t.loc.Size
	return t, inv.lookAt(t, o)
}

// initPartition takes a partition that is named.
func (inv *invocation) initPartition(t *initTarget) error {
	loc, err := inv.finder().Find(t.name)
	if err != nil {
		return refusal{fmt.Errorf("cannot init %s: %w", t.name, err)}
	}
	if loc.Part == nil || loc.DiskTable == nil {
		return withHint(refusef("cannot init %s: it is no partition that a table knows", t.name), "name a partition by its node or as IMAGE@@p1, or the whole disk")
	}
	if err := inv.checkType(loc); err != nil {
		return refusal{fmt.Errorf("cannot init %s: %w", t.name, err)}
	}
	t.loc, t.part, t.id, t.size, t.sector, t.table = loc, true, loc.ID(), loc.Size, loc.SectorSize, loc.DiskTable
	return nil
}

// lookAt finds out what is on a whole disk or image.
func (inv *invocation) lookAt(t *initTarget, o *initOptions) error {
	d, err := blockdev.Open(t.name, blockdev.ReadOnly, blockdev.WithSystem(inv.system))
	if err != nil {
		return fmt.Errorf("cannot init %s: %w", t.name, err)
	}
	defer d.Close()
	var dev blockdev.Device = blockdev.NewOverlay(d)
	// What an interrupted run left of its own table is looked at as it will be.
	if t.unmade, err = gpt.Complete(dev); err != nil {
		return fmt.Errorf("cannot init %s: %w", t.name, err)
	}
	t.sector, t.phys = d.SectorSize(), d.PhysicalSectorSize()
	t.table, t.err = gpt.Read(dev)
	if !d.IsBlock() {
		if o.sector != 0 {
			t.sector = o.sector
		}
		if t.table != nil && !t.table.MBR {
			if o.sector != 0 && o.sector != t.table.SectorSize {
				return usagef("--sector-size=%d, but the partition table of %s has sectors of %d bytes", o.sector, t.name, t.table.SectorSize)
			}
			t.sector = t.table.SectorSize
		}
		t.phys = t.sector
	}
	if t.table != nil && !t.table.MBR && t.table.SectorSize != t.sector {
		t.table, t.err = nil, fmt.Errorf("%w: its sectors of %d bytes are not those of the disk, %d", gpt.ErrDamaged, t.table.SectorSize, t.sector)
	}
	if t.found, err = gpt.Recognise(d); err != nil {
		return refusal{fmt.Errorf("cannot init %s: %w", t.name, err)}
	}
	return nil
}

// newVolume is a partition that is made, or one that is there and gets a volume.
type newVolume struct {
	part     gpt.Partition
	serial   uint32
	label    string
	fat      fatdriver.Type     // 0: by the size
	fill     bool               // it gets a volume; other partitions of a layout are only in the table
	existing bool               // there is a volume already, which stays: an empty one, or one that an earlier run has made
	unsure   bool               // and it may be somebody's: what would be made must leave all of it
	empty    bool               // and it has no files
	named    bool               // and the set names it
	changes  []replicate.Change // what the rehearsal would change of its files
	inTable  bool               // the partition is there already
	from     *members           // the primary of what is on it
	form     fatdriver.Geometry
	holds    string // what the partition of the layout that is copied is for
}

func (v *newVolume) boot() bool { return v.part.Type == gpt.TypeXBOOTLDR }

// identity gives a volume a serial number and a label of its own.
func (o *initOptions) identity(v *newVolume) error {
	role, prefix := "esp", "ESP"
	if v.boot() {
		role, prefix = "xbootldr", "BOOT"
	}
	g := gpt.DeriveGUID(o.seed, role+" serial")
	if o.seed == "" {
		var err error
		if g, err = gpt.GUIDFrom(nil); err != nil {
			return err
		}
	}
	if v.serial = binary.BigEndian.Uint32(g[:4]); v.serial == 0 {
		v.serial = 1 // some take 0 for none
	}
	v.label = fmt.Sprintf("%s-%04X", prefix, v.serial&0xffff)
	if !v.boot() && o.label != "" {
		v.label = o.label
	}
	return nil
}

// guid makes the GUID for a role.
func (o *initOptions) guid(role string) (g gpt.GUID, err error) {
	if o.seed != "" {
		return gpt.DeriveGUID(o.seed, role), nil
	}
	return gpt.GUIDFrom(nil)
}

const (
	defaultESP = 512 << 20
	espName    = "EFI system partition"
	bootName   = "Extended Boot Loader"
	// leastVolume is what a volume takes beside twice what is selected: journal, FATs, root and directories that grow.
	leastVolume = 4 << 20
)

// initPlan is what will be made. It is worked out without a write.
type initPlan struct {
	o        *initOptions
	t        *initTarget
	table    bool         // a new table is made
	diskGUID gpt.GUID     // of a new table
	volumes  []*newVolume // in the order of the layout
	notes    []string
	found    []gpt.Signature // what is overwritten
	todo     []string
	join     bool
	wrote    bool           // something may have been written
	set      *replicate.Set // the set with the new member, by which its loader entries are written; nil when it joins none
	done     bool           // the ESP is a member already, or about to be: only the rest of joining is left
	made     bool
	err      error // why it was not made
}

// esp is the ESP of the plan.
func (p *initPlan) esp() *newVolume {
	i := slices.IndexFunc(p.volumes, func(v *newVolume) bool { return v.fill && !v.boot() })
	if i < 0 {
		return nil
	}
	return p.volumes[i]
}

// filled are the volumes in the order in which they are made valid: what entries refer to first.
func (p *initPlan) filled() []*newVolume {
	var vs []*newVolume
	for _, boot := range []bool{true, false} {
		for _, v := range p.volumes {
			if v.fill && v.boot() == boot {
				vs = append(vs, v)
			}
		}
	}
	return vs
}
