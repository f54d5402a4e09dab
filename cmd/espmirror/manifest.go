//go:build !initrd

package main

import (
	"cmp"
	"context"
	"crypto/ed25519"
	"errors"
	"fmt"
	"path/filepath"
	"runtime"

	"github.com/urfave/cli/v2"

	"espmirror/blockdev"
	"espmirror/fatdriver"
	"espmirror/gpt"
	"espmirror/replicate"
	"espmirror/replicate/manifest"
)

// manifestFlags are those of the commands that write a manifest.
func manifestFlags() []cli.Flag {
	return []cli.Flag{
		&cli.GenericFlag{Name: "manifest", Value: &once{}, Usage: "afterwards write to `FILE` what each target holds, as read from it: sizes, SHA-256, serial numbers, GUIDs; - is standard output, in place of the result"},
		&cli.GenericFlag{Name: "sign", Value: &once{}, Usage: "sign the manifest with the Ed25519 `KEY` (PKCS #8 in PEM), into FILE.sig"},
	}
}

// manifestOutput is where a command writes its manifest. nil writes none.
type manifestOutput struct {
	inv  *invocation
	file string
	key  ed25519.PrivateKey // nil: no signature
}

// newManifest reads --manifest and --sign, and finds out before anything else is written whether the manifest can be: the
// key is read, the place is free, and the targets, by the names under which they will be opened, have different base names.
// It returns nil when no manifest was asked for.
func (inv *invocation) newManifest(targets []string) (*manifestOutput, error) {
	o := &manifestOutput{inv: inv, file: inv.text("manifest")}
	keyFile := inv.text("sign")
	switch {
	case o.file == "" && keyFile != "":
		return nil, usagef("--sign signs a manifest: --manifest says where that goes")
	case o.file == "":
		return nil, nil
	case o.file == standardInput && keyFile != "":
		return nil, usagef("--sign writes FILE%s, and standard output has no name", manifest.SignatureSuffix)
	case o.file == standardInput && inv.json != "off":
		return nil, usagef("--manifest=- and --json=%s both go to standard output", inv.json)
	}
	if keyFile != "" {
		var err error
		if o.key, err = manifest.ReadPrivateKey(keyFile); err != nil {
			return nil, err
		}
	}
	place, err := filepath.Abs(o.file)
	if err != nil {
		return nil, err
	}
	seen := map[string]string{}
	for _, name := range targets {
		for _, suffix := range []string{"", manifest.SignatureSuffix} {
			if at, err := filepath.Abs(name); err != nil || at == place+suffix {
				return nil, errors.Join(err, usagef("--manifest=%s: %s is a target", o.file, name))
			}
		}
		base := filepath.Base(name)
		if err := manifest.CheckName(base); err != nil {
			return nil, refusef("cannot state %s in a manifest: %w", name, err)
		}
		if other, ok := seen[base]; ok {
			return nil, refusef("cannot state %s in a manifest: %s has the same name there, %s", name, other, base)
		}
		seen[base] = name
	}
	if o.file == standardInput {
		inv.quiet = inv.quiet || !inv.flag("dry-run") // the manifest is all that goes to standard output
		return o, nil
	}
	return o, manifest.CheckStore(o.file, o.key != nil)
}

// write reads the targets again, and writes what they hold; nothing when one cannot be read. As many are read at a time as were
// written to, or as there are processors where that has no limit. The error has no exit status of its own: that of a refusal would
// say that nothing at all was written.
func (o *manifestOutput) write(targets []string) error {
	if o == nil {
		return nil
	}
	err := o.writeAll(targets, cmp.Or(o.inv.jobs, runtime.NumCPU()))
	if err != nil && o.inv.ctx.Err() == nil {
		err = &manifestError{err}
	}
	return err
}

// manifestError is why the manifest of targets that are done could not be written.
type manifestError struct{ err error }

func (e *manifestError) Error() string { return e.err.Error() }

// Hint returns what to do about it.
func (e *manifestError) Hint() string { return hintOf(e.err) }

// statedImage is what one image holds.
type statedImage struct {
	image manifest.Image
	trees []manifest.Tree
	warn  []string
	err   error
}

func (o *manifestOutput) writeAll(targets []string, jobs int) error {
	inv := o.inv
	bar := inv.startProgress()
	all := inv.stateImages(targets, jobs, bar.callback())
	bar.stop()
	var images []manifest.Image
	var trees []manifest.Tree
	for i, s := range all {
		for _, w := range s.warn {
			inv.log.Warn(w, "target", targets[i])
		}
		images, trees = append(images, s.image), append(trees, s.trees...)
	}
	for i, s := range all {
		// Those after the first that failed were told to stop, and say only that.
		if s.err != nil && (inv.ctx.Err() != nil || !errors.Is(s.err, context.Canceled)) {
			return fmt.Errorf("cannot write manifest %s: cannot state %s: %w", o.file, targets[i], s.err)
		}
	}
	m, err := manifest.New(images, trees)
	if err != nil {
		return fmt.Errorf("cannot write manifest %s: %w", o.file, err)
	}
	data, err := m.Encode()
	if err != nil {
		return fmt.Errorf("cannot write manifest %s: %w", o.file, err)
	}
	if o.file == standardInput {
		_, err := inv.out.Write(data)
		return err
	}
	if err := manifest.Store(o.file, data, o.key); err != nil {
		return err
	}
	inv.log.Info("the manifest is written", "file", o.file, "images", len(m.Images), "signed", o.key != nil)
	return nil
}

// stateImages reads images, so many at a time; the results are in their order. The first failure ends all.
func (inv *invocation) stateImages(names []string, jobs int, progress func(replicate.Progress)) []statedImage {
	ctx, cancel := context.WithCancel(inv.ctx)
	defer cancel()
	out := make([]statedImage, len(names))
	inParallel(len(names), jobs, func(i int) {
		if out[i] = inv.stateImage(ctx, names[i], progress); out[i].err != nil {
			cancel()
		}
	})
	return out
}

func (inv *invocation) stateImage(ctx context.Context, name string, progress func(replicate.Progress)) (s statedImage) {
	if s.err = ctx.Err(); s.err != nil {
		return s
	}
	l, err := inv.locateImage(name)
	if err != nil {
		s.err = err
		return s
	}
	s.image, s.warn = l.image, l.problems
	for _, loc := range l.volumes {
		v, tree, err := inv.stateVolume(ctx, loc, progress)
		if errors.Is(err, fatdriver.ErrNotFAT) && isXBOOTLDR(loc) {
			s.warn = append(s.warn, fmt.Sprintf("the XBOOTLDR partition %s is not FAT, and is not in the manifest", loc))
			continue
		}
		if err != nil {
			s.err = fmt.Errorf("cannot read %s: %w", loc, recoverHint(err, loc.String()))
			return s
		}
		s.image.Volumes, s.trees = append(s.image.Volumes, v), append(s.trees, tree)
	}
	return s
}

// isXBOOTLDR says whether a volume may be of another filesystem than FAT, and then takes no part in anything.
func isXBOOTLDR(loc *gpt.Location) bool { return loc.Part != nil && loc.Part.Type == gpt.TypeXBOOTLDR }

// locatedImage is where the volumes of an image are.
type locatedImage struct {
	image    manifest.Image // without volumes
	part     bool           // one volume was named, and not all of a disk or image
	disk     bool           // it is a block device
	volumes  []*gpt.Location
	problems []string
}

// locateImage finds the ESP and XBOOTLDR partitions of a disk or image, or the one volume that has the name.
func (inv *invocation) locateImage(name string) (*locatedImage, error) {
	f := inv.finder(name)
	l := &locatedImage{image: manifest.Image{Name: filepath.Base(name)}}
	if whole, err := f.Whole(name); err == nil {
		listing, err := f.List()
		if err != nil {
			return nil, err
		}
		if len(listing.Unread) > 0 {
			return nil, listing.Unread[0].Err
		}
		l.image.Size, l.disk, l.problems, l.volumes = whole.Size, whole.ID().Block, listing.Problems, listing.Volumes
	} else {
		loc, err := inv.findTarget(name, nil)
		if err != nil {
			return nil, err
		}
		l.part, l.disk, l.volumes = true, loc.ID().Block, []*gpt.Location{loc}
	}
	if len(l.volumes) == 0 {
		return nil, refusef("it holds no ESP, no XBOOTLDR partition and no FAT volume")
	}
	first := l.volumes[0]
	l.image.SectorSize = first.SectorSize
	if t := first.DiskTable; t != nil && !t.MBR {
		l.image.DiskGUID = t.DiskGUID.String()
	}
	return l, nil
}

// subject is what the entry of the image is found by.
func (l *locatedImage) subject() manifest.Subject {
	s := manifest.Subject{Name: l.image.Name, DiskGUID: l.image.DiskGUID, Part: l.part}
	for _, loc := range l.volumes {
		if loc.Part != nil {
			s.PartGUIDs = append(s.PartGUIDs, loc.Part.PARTUUID())
		}
	}
	return s
}

// placeOf is what the partition table says of a volume.
func placeOf(loc *gpt.Location) manifest.Volume {
	v := manifest.Volume{Offset: loc.Offset, Size: loc.Size}
	if p := loc.Part; p != nil {
		v.Partition, v.Type, v.PartGUID, v.PartLabel, v.Offset, v.Size = p.Number, p.TypeName(), p.PARTUUID(), p.Name, p.Start, p.Size
	}
	return v
}

// stateVolume reads one volume, all of it, from the medium. One that is mounted is refused: its files may be in memory.
func (inv *invocation) stateVolume(ctx context.Context, loc *gpt.Location, progress func(replicate.Progress)) (v manifest.Volume, tree manifest.Tree, err error) {
	v = placeOf(loc)
	if id := loc.ID(); id.Block {
		by, err := inv.system.Holders(id)
		if err != nil {
			return v, tree, err
		}
		if len(by) > 0 {
			return v, tree, &blockdev.BusyError{By: by, Hint: "unmount it or stop what holds it, then try again"}
		}
	}
	open, err := loc.Open(blockdev.ReadOnly)
	if err != nil {
		return v, tree, err
	}
	defer open.Close()
	var step func(done, total int64)
	if progress != nil {
		step = func(done, total int64) {
			progress(replicate.Progress{Target: loc.String(), Phase: "read", Done: done, Total: total})
		}
	}
	c, err := manifest.Of(ctx, newTarget(loc.String(), loc, inv.device(open)), step)
	if err != nil {
		return v, tree, err
	}
	v.FATType, v.Serial, v.Label, v.Tree = c.FATType, c.Serial, c.Label, c.Tree.Digest
	return v, c.Tree, nil
}

// thenManifest runs a sync, and writes the manifest of its targets where one was asked for; unless something went wrong, as
// a manifest of some of the targets would be taken for one of all. The error of the sync stays what it was.
func (inv *invocation) thenManifest(m *members, dryRun bool, run func() (report, error)) (report, error) {
	out, err := inv.newManifest(m.imageNames())
	if err != nil {
		m.close()
		return nil, err
	}
	rep, err := run()
	names := m.imageNames() // a partition that came late has its name by now
	switch {
	case out == nil || dryRun:
	case err != nil:
		inv.log.Warn("no manifest was written, as not all went well", "file", out.file)
	case len(names) == 0:
		inv.log.Warn("no manifest was written, as there is no target", "file", out.file)
	default:
		err = out.write(names)
	}
	return rep, err
}

// imageNames are the targets by the names of what holds them: a disk or image that was named as such stands for both of
// its volumes.
func (m *members) imageNames() []string {
	var names []string
	whole := map[string]bool{}
	all := append([]*member{}, m.targets...)
	if m.boot != nil {
		all = append(all, m.boot.targets...)
	}
	for _, t := range all {
		switch {
		case t.loc == nil || whole[t.loc.Disk]:
			continue
		case t.name == t.loc.Disk:
			whole[t.name] = true
		}
		names = append(names, t.name)
	}
	return names
}
