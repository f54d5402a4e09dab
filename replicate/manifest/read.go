package manifest

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"slices"

	"espmirror/fatdriver"
	"espmirror/replicate"
)

// chunk is how much of a file is read at a time, in bytes.
const chunk = 1 << 20

// Contents is what a volume says of itself, and its tree.
type Contents struct {
	FATType string // "FAT12", "FAT16" or "FAT32"
	Serial  string // 1234-ABCD, "" when there is none
	Label   string // "" when there is none
	Tree    Tree
}

// Of reads a volume: its identity, and every byte of every file, from the medium after caches were dropped. What is the
// volume's own (replicate.OwnFile) is left out. progress is told the bytes that were read and their total, and may be nil.
//
// A volume that is damaged gives fatdriver.ErrDamaged, and one that an interrupted run left behind gives
// replicate.ErrNeedsRecovery: what either shows is not what it is going to hold.
func Of(ctx context.Context, t *replicate.Target, progress func(done, total int64)) (*Contents, error) {
	// What was written through this or another descriptor may be in memory only: the medium is what is shipped.
	if err := t.Dev.Invalidate(); err != nil {
		return nil, fmt.Errorf("cannot drop caches: %w", err)
	}
	vol, err := fatdriver.Open(t.Dev)
	if err != nil {
		return nil, err
	}
	// The tree, and what is outside of it: the boot sector and the FATs.
	report, err := vol.Check()
	if err == nil {
		err = report.Damage()
	}
	if err != nil {
		return nil, err
	}
	tree, err := vol.Scan()
	if err != nil {
		return nil, err
	}
	pending, err := replicate.Pending(t)
	if err != nil {
		return nil, err
	}
	if pending {
		return nil, replicate.ErrNeedsRecovery
	}
	r := &reader{ctx: ctx, fsys: tree.FS(), buf: make([]byte, chunk), progress: progress}
	if err := r.walk("."); err != nil {
		return nil, err
	}
	for i := range r.entries {
		if err := r.sum(&r.entries[i]); err != nil {
			return nil, err
		}
	}
	return &Contents{FATType: vol.Geometry().Type.String(), Serial: vol.UUID(), Label: tree.Label, Tree: NewTree(r.entries)}, nil
}

// reader lists the tree of a volume, then reads its files.
type reader struct {
	ctx         context.Context
	fsys        fs.FS
	entries     []Entry
	buf         []byte
	done, total int64
	progress    func(done, total int64)
}

// walk lists what is in a directory. fatdriver has bounded the depth.
func (r *reader) walk(dir string) error {
	list, err := fs.ReadDir(r.fsys, dir)
	if err != nil {
		return readError(dir, err)
	}
	for _, de := range list {
		p := de.Name()
		if dir != "." {
			p = dir + "/" + p
		}
		if replicate.OwnFile(p) {
			continue
		}
		if err := checkPath(p); err != nil {
			return fmt.Errorf("cannot state %q in a manifest: %w", p, err)
		}
		if de.IsDir() {
			r.entries = append(r.entries, Entry{Path: p, Dir: true})
			if err := r.walk(p); err != nil {
				return err
			}
			continue
		}
		info, err := de.Info()
		if err != nil {
			return readError(p, err)
		}
		size := info.Size()
		r.entries, r.total = append(r.entries, Entry{Path: p, Size: &size}), r.total+size
	}
	return nil
}

// sum reads a file to its end.
func (r *reader) sum(e *Entry) error {
	if err := r.ctx.Err(); err != nil {
		return err
	}
	if e.Dir {
		return nil
	}
	f, err := r.fsys.Open(e.Path)
	if err != nil {
		return readError(e.Path, err)
	}
	defer f.Close()
	h := sha256.New()
	for n := int64(0); ; {
		if err := r.ctx.Err(); err != nil {
			return err
		}
		k, err := f.Read(r.buf)
		h.Write(r.buf[:k])
		n, r.done = n+int64(k), r.done+int64(k)
		if r.progress != nil {
			r.progress(r.done, r.total)
		}
		if errors.Is(err, io.EOF) && n == *e.Size {
			break
		}
		if err != nil {
			return readError(e.Path, err)
		}
	}
	d := Digest(h.Sum(nil))
	e.Sum = &d
	return nil
}

func readError(p string, err error) error { return fmt.Errorf("cannot read %s: %w", p, bare(err)) }

// Compare lists what is on a volume and not in the manifest (extra), the other way round (missing), and what has other
// content (differs, also a file in the place of a directory), by path. Sizes are those of the manifest, but of what is extra.
func Compare(want, have *Tree) []replicate.Change {
	var out []replicate.Change
	change := func(op string, e *Entry) {
		out = append(out, replicate.Change{Op: op, Path: e.Path, Dir: e.Dir, Size: e.bytes()})
	}
	i, j := 0, 0
	for i < len(want.Entries) || j < len(have.Entries) {
		switch {
		case j == len(have.Entries) || i < len(want.Entries) && want.Entries[i].Path < have.Entries[j].Path:
			change("missing", &want.Entries[i])
			i++
		case i == len(want.Entries) || want.Entries[i].Path > have.Entries[j].Path:
			change("extra", &have.Entries[j])
			j++
		default:
			if !equal(&want.Entries[i], &have.Entries[j]) {
				change("differs", &want.Entries[i])
			}
			i, j = i+1, j+1
		}
	}
	return out
}

func equal(a, b *Entry) bool {
	return a.Dir == b.Dir && a.bytes() == b.bytes() && (a.Dir || *a.Sum == *b.Sum)
}

// Difference is one property of an image or volume that is not what the manifest states.
type Difference struct {
	What string // "serial number", "disk GUID", …
	Want string // what the manifest states, "" when it states none
	Have string // "" when there is none
}

func (d Difference) String() string {
	return fmt.Sprintf("%s: %s, not %s", d.What, orNone(d.Have), orNone(d.Want))
}

func orNone(s string) string {
	if s == "" {
		return "none"
	}
	return s
}

// pair is one property of both.
type pair struct{ what, want, have string }

func differences(pairs []pair) []Difference {
	var out []Difference
	for _, p := range pairs {
		if p.want != p.have {
			out = append(out, Difference{p.what, p.want, p.have})
		}
	}
	return out
}

// CompareImage lists what of an image itself is not as stated. A disk may be larger than the image that was written to
// it, and an entry that was made of one partition says nothing of the disk's size.
func CompareImage(want, have *Image, isDisk bool) []Difference {
	size := have.Size
	if want.Size == 0 || have.Size == 0 || isDisk && have.Size > want.Size {
		size = want.Size
	}
	return differences([]pair{
		{"size", fmt.Sprint(want.Size), fmt.Sprint(size)},
		{"sector size", fmt.Sprint(want.SectorSize), fmt.Sprint(have.SectorSize)},
		{"disk GUID", want.DiskGUID, have.DiskGUID},
	})
}

// CompareVolume lists what of a volume itself, its tree left out, is not as stated.
func CompareVolume(want, have *Volume) []Difference {
	return differences([]pair{
		{"partition number", fmt.Sprint(want.Partition), fmt.Sprint(have.Partition)},
		{"partition type", want.Type, have.Type},
		{"partition GUID", want.PartGUID, have.PartGUID},
		{"partition label", want.PartLabel, have.PartLabel},
		{"offset", fmt.Sprint(want.Offset), fmt.Sprint(have.Offset)},
		{"partition size", fmt.Sprint(want.Size), fmt.Sprint(have.Size)},
		{"FAT type", want.FATType, have.FATType},
		{"serial number", want.Serial, have.Serial},
		{"label", want.Label, have.Label},
	})
}

// Subject is what is known of an image on the way to its entry.
type Subject struct {
	Name      string   // without its directory
	DiskGUID  string   // "" when there is none
	PartGUIDs []string // of all its volumes, or of the one that was named
	Part      bool     // one partition was named, not the whole
}

// Find returns the entry of an image: that with its disk GUID, for a disk to which an image was written has another name;
// where no entry or more than one has it, that with its name; else that with one of its partition GUIDs. It returns nil
// when nothing fits, or too much does.
func (m *Manifest) Find(s Subject) *Image {
	has := func(im *Image) bool {
		return slices.ContainsFunc(im.Volumes, func(v Volume) bool { return v.PartGUID != "" && slices.Contains(s.PartGUIDs, v.PartGUID) })
	}
	if s.DiskGUID != "" {
		found := m.matching(func(im *Image) bool { return im.DiskGUID == s.DiskGUID })
		if len(found) > 1 && s.Part {
			// The partitions of one disk, each stated by itself.
			found = slices.DeleteFunc(found, func(im *Image) bool { return !has(im) })
		}
		if len(found) == 1 {
			return found[0]
		}
	}
	if found := m.matching(func(im *Image) bool { return im.Name == s.Name }); len(found) == 1 {
		return found[0]
	}
	if found := m.matching(has); len(found) == 1 {
		return found[0]
	}
	return nil
}

func (m *Manifest) matching(fits func(*Image) bool) []*Image {
	var out []*Image
	for i := range m.Images {
		if fits(&m.Images[i]) {
			out = append(out, &m.Images[i])
		}
	}
	return out
}
