//go:build !initrd

package main

import (
	"crypto/ed25519"
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"strings"

	"github.com/urfave/cli/v2"

	"espmirror/fatdriver"
	"espmirror/gpt"
	"espmirror/replicate"
	"espmirror/replicate/manifest"
)

const (
	maxVerifyArgs = -1 // how many arguments `verify` takes: with a manifest any number
	verifyUsage   = "espmirror verify [OPTIONS] [--primary VOLUME] [--target VOLUME]...\n" +
		"espmirror verify [OPTIONS] --manifest FILE [--verify-key KEY] [IMAGE|DISK|VOLUME]..."
	verifyText = "Nothing is written.\n\n" +
		"With a manifest, which `init --manifest` and `sync --manifest` write, no primary is needed: each argument is compared with what the\n" +
		"manifest states of it, files and identity. Its entry is found by the disk GUID, else by the name, else by the GUID of\n" +
		"a partition. loader/random-seed and EFI/espmirror are each volume's own, and in no manifest."
)

func verifyFlags() []cli.Flag {
	return []cli.Flag{
		&cli.GenericFlag{Name: "manifest", Value: &once{}, Usage: "compare the arguments with this manifest, and not with a primary; without an argument, the images that lie beside `FILE`"},
		&cli.GenericFlag{Name: "verify-key", Value: &once{}, Usage: "use the manifest only if FILE.sig is its signature by this Ed25519 `KEY` (public, in PEM)"},
	}
}

// The values of manifestReport.Signature.
const (
	sigValid     = "valid"
	sigUnchecked = "not checked"
	sigNone      = "none"
)

// verifyManifest compares images with a manifest. Without --manifest it returns neither a report nor an error.
func (inv *invocation) verifyManifest() (report, error) {
	file, keyFile, args := inv.text("manifest"), inv.text("verify-key"), inv.c.Args().Slice()
	if file == "" {
		switch {
		case keyFile != "":
			return nil, usagef("--verify-key checks a manifest: --manifest says which")
		case len(args) > 0:
			return nil, &usageError{"no argument is taken, " + plural(int64(len(args)), "argument was", "arguments were") + " given",
				"name the volumes with --primary and --target, or a manifest with --manifest"}
		}
		return nil, nil
	}
	for _, name := range []string{"target", "select", "exclude"} {
		if len(inv.list(name)) > 0 {
			return nil, usagef("--%s has no meaning with --manifest", name)
		}
	}
	if inv.text("primary") != "" {
		return nil, usagef("--primary has no meaning with --manifest, which says what there should be")
	}
	if file == standardInput {
		return nil, usagef("--manifest=-: a manifest to verify with is a file")
	}
	var key ed25519.PublicKey
	if keyFile != "" {
		var err error
		if key, err = manifest.ReadPublicKey(keyFile); err != nil {
			return nil, err
		}
	}
	m, signed, err := manifest.Load(file, key)
	if errors.Is(err, manifest.ErrSignature) {
		err = refusal{err}
	}
	if err != nil {
		return nil, err
	}
	rep := &manifestReport{Command: "verify", Manifest: file, Signature: sigNone, Images: []imageReport{}, quiet: inv.quiet}
	switch {
	case key != nil:
		rep.Signature = sigValid
	case signed:
		rep.Signature = sigUnchecked
		inv.log.Info("the manifest has a signature, which is not checked without --verify-key", "file", file+manifest.SignatureSuffix)
	}
	x := &manifestVerifier{inv: inv, file: file, m: m, rep: rep}
	return rep, x.run(args)
}

// noBlockIO is the attribute of a partition that firmware makes no device of. UEFI specification, "Defined GPT Partition Entry -
// Attributes".
const noBlockIO = 1 << 1

// manifestVerifier compares images with a manifest.
type manifestVerifier struct {
	inv  *invocation
	file string
	m    *manifest.Manifest
	rep  *manifestReport
	errs []error
	bar  *progress
}

func (x *manifestVerifier) run(args []string) error {
	entries := make([]*manifest.Image, len(args)) // nil: to be looked for
	if len(args) == 0 {
		for i := range x.m.Images {
			// Not filepath.Join, which takes "./" away: a name such as LABEL=x is that of a file here, and of nothing else.
			args = append(args, filepath.Dir(x.file)+string(filepath.Separator)+x.m.Images[i].Name)
			entries = append(entries, &x.m.Images[i])
		}
	}
	x.bar = x.inv.startProgress()
	for i, name := range args {
		if x.inv.ctx.Err() != nil {
			break
		}
		x.image(name, entries[i])
	}
	x.bar.stop()
	if err := x.inv.ctx.Err(); err != nil {
		return err
	}
	if len(x.errs) > 0 {
		return &targetsError{verb: "verify", errs: x.errs, total: len(args)}
	}
	for _, im := range x.rep.Images {
		if im.Outcome != string(replicate.InSync) {
			return errDiffers
		}
	}
	return nil
}

// image compares one image with its entry, which is looked for when it is not given.
func (x *manifestVerifier) image(name string, entry *manifest.Image) {
	r := imageReport{Name: filepath.Clean(name), Differences: []differenceReport{}, Volumes: []volumeReport{}}
	err := x.compare(&r, name, entry)
	if err != nil {
		err = fmt.Errorf("cannot verify %s: %w", r.Name, err)
		x.errs = append(x.errs, err)
		r.Error = newJSONError(err)
	}
	r.Outcome = string(replicate.InSync)
	if len(r.Differences) > 0 {
		r.Outcome = string(replicate.Differs)
	}
	for _, v := range r.Volumes {
		if v.Outcome != string(replicate.InSync) && (r.Outcome == string(replicate.InSync) || v.Error != nil) {
			r.Outcome = v.Outcome
		}
	}
	if err != nil {
		r.Outcome = (&outcome{err: err}).state()
	}
	x.rep.Images = append(x.rep.Images, r)
}

func (x *manifestVerifier) compare(r *imageReport, name string, entry *manifest.Image) error {
	l, err := x.inv.locateImage(name)
	if err != nil {
		return err
	}
	for _, p := range l.problems {
		x.inv.log.Warn(p)
	}
	s := l.subject()
	if entry == nil {
		if entry = x.m.Find(s); entry == nil {
			return withHint(refusef("%s has no entry for it: none, or more than one, has its %s", x.file, sought(s)),
				"the entries are %s", entryNames(x.m))
		}
		if named := x.m.Find(manifest.Subject{Name: s.Name}); named != nil && named != entry {
			x.inv.log.Warn("by its disk GUID it is another image of the manifest than by its name", "image", r.Name, "compared with", entry.Name)
		}
	}
	r.Entry = entry.Name
	if l.part && entry.Size > 0 && l.volumes[0].Part == nil && l.volumes[0].Offset > 0 {
		return refusef("it is a part of an image without a partition table, and the manifest states the whole")
	}
	r.differ(manifest.CompareImage(entry, &l.image, l.disk))
	if t := l.volumes[0].DiskTable; t != nil && !l.part {
		for _, p := range t.Problems {
			// Whoever wrote an image to a larger disk left the backup where it was.
			if !l.disk || p != t.Grown {
				r.differ([]manifest.Difference{{What: "partition table", Want: "sound", Have: p}})
			}
		}
	}
	pairs := pairVolumes(entry, l)
	for i := range entry.Volumes {
		want := &entry.Volumes[i]
		if pairs[i] != nil {
			x.volume(r, want, pairs[i])
		} else if !l.part {
			r.differ([]manifest.Difference{{What: partitionName(want.Partition), Want: want.Type}})
		}
	}
	return x.extra(r, entry, l, pairs)
}

// sought says by what an entry was looked for.
func sought(s manifest.Subject) string {
	by := []string{"name " + s.Name}
	if s.DiskGUID != "" {
		by = append(by, "disk GUID "+s.DiskGUID)
	}
	for _, g := range s.PartGUIDs {
		by = append(by, "partition GUID "+g)
	}
	return strings.Join(by, ", ")
}

func entryNames(m *manifest.Manifest) string {
	const most = 8
	var names []string
	for i := range m.Images[:min(most, len(m.Images))] {
		names = append(names, quoted(m.Images[i].Name))
	}
	if len(m.Images) > most {
		names = append(names, fmt.Sprintf("and %d more", len(m.Images)-most))
	}
	return strings.Join(names, ", ")
}

func partitionName(n int) string {
	if n == 0 {
		return "volume"
	}
	return fmt.Sprintf("partition %d", n)
}

// pairVolumes finds for each volume of an entry the one that it states: that with the same partition GUID, else that with
// the same number; nil where there is none.
func pairVolumes(entry *manifest.Image, l *locatedImage) []*gpt.Location {
	pairs := make([]*gpt.Location, len(entry.Volumes))
	taken := map[*gpt.Location]bool{}
	for _, fits := range []func(want, have *manifest.Volume) bool{
		func(want, have *manifest.Volume) bool { return want.PartGUID != "" && want.PartGUID == have.PartGUID },
		func(want, have *manifest.Volume) bool { return want.Partition == have.Partition },
	} {
		for i := range entry.Volumes {
			for _, loc := range l.volumes {
				if have := placeOf(loc); pairs[i] == nil && !taken[loc] && fits(&entry.Volumes[i], &have) {
					pairs[i], taken[loc] = loc, true
				}
			}
		}
	}
	return pairs
}

// extra tells of volumes that the manifest does not know.
func (x *manifestVerifier) extra(r *imageReport, entry *manifest.Image, l *locatedImage, pairs []*gpt.Location) error {
	for _, loc := range l.volumes {
		if slices.Contains(pairs, loc) || entry.Size == 0 && !l.part {
			continue // an entry that was made of one partition says nothing of the others
		}
		have := placeOf(loc)
		if l.part {
			return refusef("%s has no entry for it: %s, which is its disk, has none for %s", x.file, entry.Name, partitionName(have.Partition))
		}
		if isXBOOTLDR(loc) {
			// One that is not FAT is not in a manifest either.
			open, err := x.inv.openLocation(loc.String(), loc)
			if errors.Is(err, fatdriver.ErrNotFAT) {
				continue
			}
			if err != nil {
				return err
			}
			_ = open.Close()
		}
		r.differ([]manifest.Difference{{What: partitionName(have.Partition), Have: have.Type}})
	}
	return nil
}

// volume compares one volume.
func (x *manifestVerifier) volume(r *imageReport, want *manifest.Volume, loc *gpt.Location) {
	v := volumeReport{Name: filepath.Clean(loc.String()), Outcome: string(replicate.InSync), identity: identityOf(loc), Differences: []differenceReport{}, Changes: []changeReport{}}
	have, tree, err := x.inv.stateVolume(x.inv.ctx, loc, x.bar.callback())
	if err != nil {
		if errors.Is(err, fatdriver.ErrDamaged) || errors.Is(err, fatdriver.ErrNotFAT) {
			err = withHint(refusal{err}, "run `espmirror check %s` to see every finding", quoted(v.Name))
		}
		err = recoverHint(prefixed("verify", v.Name, err), v.Name)
		v.Outcome, v.Error = (&outcome{err: err}).state(), newJSONError(err)
		x.errs = append(x.errs, err)
		r.Volumes = append(r.Volumes, v)
		return
	}
	v.FATType, v.Serial, v.Label = have.FATType, have.Serial, have.Label
	if loc.Part != nil && loc.DiskTable != nil && !loc.DiskTable.MBR && loc.Part.Attributes&noBlockIO != 0 {
		v.Differences = append(v.Differences, differenceReport{What: "partition attribute", Have: "firmware is to ignore it"})
	}
	for _, d := range manifest.CompareVolume(want, &have) {
		v.Differences = append(v.Differences, differenceReport(d))
	}
	for _, c := range manifest.Compare(x.m.Tree(want.Tree), &tree) {
		v.Changes = append(v.Changes, changeReport{c.Op, c.Path, c.From, c.Dir, c.Size})
	}
	if len(v.Differences)+len(v.Changes) > 0 {
		v.Outcome = string(replicate.Differs)
	}
	r.Volumes = append(r.Volumes, v)
}

// manifestReport is the result of verify with a manifest.
type manifestReport struct {
	failure
	Command   string        `json:"command"`
	Manifest  string        `json:"manifest"`
	Signature string        `json:"signature"` // valid, not checked, none
	Images    []imageReport `json:"images"`

	quiet bool
}

type imageReport struct {
	Name        string             `json:"name"`
	Entry       string             `json:"entry,omitempty"` // the name that the manifest has for it
	Outcome     string             `json:"outcome"`
	Differences []differenceReport `json:"differences"` // of the image itself
	Volumes     []volumeReport     `json:"volumes"`
	Error       *jsonError         `json:"error,omitempty"`
}

type volumeReport struct {
	Name    string `json:"name"`
	Outcome string `json:"outcome"`
	identity
	Differences []differenceReport `json:"differences"`
	Changes     []changeReport     `json:"changes"`
	Error       *jsonError         `json:"error,omitempty"`
}

// differenceReport is a property that is not as the manifest states it.
type differenceReport struct {
	What string `json:"what"`
	Want string `json:"want,omitempty"`
	Have string `json:"have,omitempty"`
}

func (r *imageReport) differ(ds []manifest.Difference) {
	for _, d := range ds {
		r.Differences = append(r.Differences, differenceReport(d))
	}
}

func (r *imageReport) count() int {
	n := len(r.Differences)
	for _, v := range r.Volumes {
		n += len(v.Differences) + len(v.Changes)
	}
	return n
}

func (r *manifestReport) print(o *output) {
	if r.quiet {
		return
	}
	t := newTable("IMAGE", "ENTRY", "STATE", "DIFFERENCES")
	for i := range r.Images {
		im := &r.Images[i]
		n := ""
		if im.Entry != "" {
			n = fmt.Sprint(im.count())
			if len(im.Differences) > 0 {
				printDifferences(o, im.Name, string(replicate.Differs), im.Differences, nil)
			}
			for _, v := range im.Volumes {
				if v.Error == nil {
					printDifferences(o, v.Name, v.Outcome, v.Differences, v.Changes)
				}
			}
		}
		t.row(cell{text: im.Name}, cell{text: im.Entry}, cell{text: im.Outcome, tint: outcomeTint(im.Outcome)}, cell{text: n, right: true})
	}
	t.print(o)
	if r.Signature == sigValid {
		o.printf("The signature of the manifest is valid.\n")
	}
}

func printDifferences(o *output, name, state string, ds []differenceReport, changes []changeReport) {
	o.printf("%s: %s", safe(name), o.paint(outcomeTint(state), state))
	if n := int64(len(ds) + len(changes)); n > 0 {
		o.printf(", %s", plural(n, "difference", "differences"))
	}
	o.printf("\n")
	for _, d := range ds {
		o.printf("  %-8s %s\n", "differs", safe(manifest.Difference(d).String()))
	}
	for _, c := range changes {
		c.print(o)
	}
}
