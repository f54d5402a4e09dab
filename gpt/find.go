package gpt

import (
	"errors"
	"fmt"
	"io/fs"
	"math"
	"os"
	"slices"
	"strconv"
	"strings"

	"github.com/google/uuid"

	"espmirror/blockdev"
)

var (
	// ErrAmbiguous is returned when a name fits several volumes; the message lists them.
	ErrAmbiguous = errors.New("is ambiguous")

	// ErrNotFound is returned when a name fits no volume.
	ErrNotFound = errors.New("no such volume")

	// ErrBadName is returned when a name cannot be the name of a volume.
	ErrBadName = errors.New("not the name of a volume")
)

// Finder finds volumes by name.
type Finder struct {
	System blockdev.System
	Among  []string // disks and images in which names such as PARTUUID=… are looked for before the machine's own disks

	retrying func() // tests change the machine there
}

// Find returns the volume that spec names:
//
//	/dev/sda1                 a partition
//	/dev/sda, disk.img        the one ESP of a disk or image, or a volume without a table
//	disk.img@@1M              the volume at an offset: bytes, or with a suffix S (512), K, M, G or T (1024 and its powers)
//	disk.img@@p2              a partition by its number
//	PARTUUID=… PARTLABEL=… UUID=ABCD-1234 LABEL=…
//
// A path that exists is taken as it is, even with "@@" or "=" in it. The tags are looked for in Among, and only when
// nothing there fits, on this machine: see List for the disks that are left out. GUIDs, serial numbers and FAT labels
// are compared without regard to case. A name that fits several volumes gives ErrAmbiguous, one that fits none
// ErrNotFound or fs.ErrNotExist. For PARTUUID= see FindPartUUID, which opens as few disks as it can.
func (f *Finder) Find(spec string) (*Location, error) {
	l, err := f.find(spec)
	if err != nil {
		return nil, fmt.Errorf("cannot find volume %q: %w", spec, err)
	}
	return l, nil
}

func (f *Finder) find(spec string) (*Location, error) {
	if spec == "" {
		return nil, ErrBadName
	}
	if _, err := os.Stat(spec); errors.Is(err, fs.ErrNotExist) {
		if key, value, ok := strings.Cut(spec, "="); ok && !strings.Contains(key, "/") {
			return f.findTag(strings.ToUpper(key), strings.Trim(value, `"`))
		}
		if i := strings.LastIndex(spec, "@@"); i > 0 {
			return f.findIn(spec, spec[:i], spec[i+2:])
		}
	}
	id, err := blockdev.Identify(spec)
	if err != nil {
		return nil, err
	}
	b, err := f.block(spec, id)
	if err != nil {
		return nil, err
	}
	if b.Disk != "" {
		return f.partNode(spec, spec, b, id)
	}
	s, err := f.openSource(spec, spec)
	if err != nil {
		return nil, err
	}
	if s.table == nil {
		return f.bare(s)
	}
	return f.onlyESP(s)
}

// bare returns the volume that a device without a table is.
func (f *Finder) bare(s *source) (*Location, error) {
	switch {
	case !errors.Is(s.err, ErrNoTable):
		return nil, s.err
	case s.fs == FSFAT || s.fs == FSExFAT:
		return f.whole(s), nil
	case s.fs != "":
		return nil, fmt.Errorf("%w: %s holds %s, neither FAT nor a partition table", ErrNotFound, s.path, s.fs)
	}
	return nil, fmt.Errorf("%w: %s holds neither FAT nor a partition table", ErrNotFound, s.path)
}

// onlyESP returns the ESP of a disk, if it has one only.
func (f *Finder) onlyESP(s *source) (*Location, error) {
	esps := s.table.OfType(TypeESP)
	if len(esps) == 1 {
		return f.part(s, esps[0])
	}
	what, list := "has several ESPs", esps
	verdict := ErrAmbiguous
	if len(esps) == 0 {
		what, verdict, list = "has no ESP", ErrNotFound, nil
		for i := range s.table.Partitions {
			list = append(list, &s.table.Partitions[i])
		}
	}
	var names []string
	for _, p := range list {
		name := fmt.Sprintf("%s@@p%d", s.path, p.Number)
		if l, err := f.part(s, p); err == nil {
			name = l.String()
		}
		if verdict == ErrNotFound {
			name += " (" + p.TypeName() + ")"
		}
		names = append(names, name)
	}
	if len(names) == 0 {
		return nil, fmt.Errorf("%w: %s %s, nor any other partition", verdict, s.path, what)
	}
	if verdict == ErrAmbiguous {
		return nil, fmt.Errorf("%s %w: it %s, name one of %s", s.path, verdict, what, strings.Join(names, ", "))
	}
	return nil, fmt.Errorf("%w: %s %s, only %s", verdict, s.path, what, strings.Join(names, ", "))
}

// findIn returns the volume at a place in a disk or image.
func (f *Finder) findIn(spec, path, place string) (*Location, error) {
	s, err := f.openSource(spec, path)
	if err != nil {
		return nil, err
	}
	if digits, ok := strings.CutPrefix(strings.ToLower(place), "p"); ok {
		n, err := strconv.Atoi(digits)
		if err != nil || n < 1 {
			return nil, fmt.Errorf("%w: %q is not a partition number", ErrBadName, digits)
		}
		if s.table == nil {
			return nil, s.err
		}
		p := s.table.Find(n)
		if p == nil {
			return nil, fmt.Errorf("%w: %s has no partition %d", ErrNotFound, path, n)
		}
		return f.part(s, p)
	}
	off, err := parseOffset(place)
	if err != nil {
		return nil, err
	}
	if off >= s.size {
		return nil, fmt.Errorf("%w: offset 0x%x is outside %s, which has 0x%x bytes", ErrNotFound, off, path, s.size)
	}
	if off%512 != 0 {
		return nil, fmt.Errorf("%w: offset 0x%x is not a multiple of 512", ErrBadName, off)
	}
	end := s.size
	if s.table != nil {
		for i := range s.table.Partitions {
			p := &s.table.Partitions[i]
			switch {
			case p.Start == off:
				return f.part(s, p)
			case p.Start < off && off < p.End():
				return nil, fmt.Errorf("%w: offset 0x%x is inside partition %d, which begins at 0x%x", ErrNotFound, off, p.Number, p.Start)
			case p.Start > off:
				end = min(end, p.Start)
			}
		}
	}
	// Nothing says how long the volume is; it ends where something else begins.
	l := f.whole(s)
	l.Offset, l.Size = off, end-off
	return l, nil
}

// parseOffset reads an offset as mtools writes it: a number and an optional unit.
func parseOffset(s string) (int64, error) {
	digits, unit := s, int64(1)
	if s != "" {
		if shift, ok := map[byte]uint{'s': 9, 'k': 10, 'm': 20, 'g': 30, 't': 40}[s[len(s)-1]|0x20]; ok {
			digits, unit = s[:len(s)-1], 1<<shift
		}
	}
	v, err := strconv.ParseUint(digits, 10, 63)
	if err != nil || int64(v) > math.MaxInt64/unit {
		return 0, fmt.Errorf("%w: %q is not an offset (a number of bytes, or with S, K, M, G or T), nor a partition (p2)", ErrBadName, s)
	}
	return int64(v) * unit, nil
}

// findTag returns the volume with the given PARTUUID, PARTLABEL, UUID or LABEL.
func (f *Finder) findTag(key, value string) (*Location, error) {
	var fits func(*Location) (bool, error)
	switch key {
	case "PARTUUID":
		return f.findPartUUID(value)
	case "PARTLABEL":
		fits = func(l *Location) (bool, error) { return l.Part != nil && l.Part.Name == value, nil }
	case "UUID", "LABEL":
		fits = func(l *Location) (bool, error) { return fitsIdentity(l, key, value) }
	default:
		return nil, fmt.Errorf("%w: %q is not PARTUUID, PARTLABEL, UUID or LABEL", ErrBadName, key)
	}
	if value == "" {
		return nil, fmt.Errorf("%w: %s is empty", ErrBadName, key)
	}
	l, problems, err := f.pickGiven(fits)
	if l != nil || err != nil {
		return l, err
	}
	machine, more, closed, err := f.machine()
	if err != nil {
		return nil, err
	}
	problems = append(problems, more...)
	for _, u := range closed {
		problems = append(problems, u.Err.Error())
	}
	l, unread, err := f.pick(machine, fits)
	if l != nil || err != nil {
		return l, err
	}
	return nil, notFound(append(problems, unread...))
}

// pickGiven looks in Among, where everything has to be readable because it was named.
func (f *Finder) pickGiven(fits func(*Location) (bool, error)) (*Location, []string, error) {
	given, problems, closed, err := f.given()
	if err != nil {
		return nil, nil, err
	}
	if len(closed) > 0 {
		return nil, nil, closed[0].Err
	}
	l, unread, err := f.pick(given, fits)
	return l, append(problems, unread...), err
}

// notFound is ErrNotFound with what may be the reason for it.
func notFound(problems []string) error {
	if len(problems) == 0 {
		return ErrNotFound
	}
	return fmt.Errorf("%w; not everything could be searched: %s", ErrNotFound, strings.Join(problems, "; "))
}

// isMBRPartUUID says whether s is "12345678-01".
func isMBRPartUUID(s string) bool {
	disk, number, ok := strings.Cut(s, "-")
	if !ok || len(disk) != 8 || len(number) != 2 {
		return false
	}
	_, err1 := strconv.ParseUint(disk, 16, 32)
	_, err2 := strconv.ParseUint(number, 16, 8)
	return err1 == nil && err2 == nil
}

// pick returns the one location that fits, nil when there is none. A volume that cannot be read does not fit, and is
// told of.
func (f *Finder) pick(all []*Location, fits func(*Location) (bool, error)) (*Location, []string, error) {
	var found []*Location
	var problems []string
	for _, l := range all {
		ok, err := fits(l)
		if err != nil {
			problems = append(problems, err.Error())
			continue
		}
		if !ok {
			continue
		}
		known := false
		for _, other := range found {
			same, err := SameVolume(l, other)
			if err != nil {
				return nil, nil, err
			}
			known = known || same
		}
		if !known {
			found = append(found, l)
		}
	}
	switch len(found) {
	case 0:
		return nil, problems, nil
	case 1:
		return found[0], problems, nil
	}
	names := make([]string, len(found))
	for i, l := range found {
		names[i] = l.String()
	}
	return nil, problems, fmt.Errorf("it %w: it fits %s", ErrAmbiguous, strings.Join(names, ", "))
}

// fitsIdentity compares the serial number or label that the volume itself holds. Members of an md array are passed
// over, the array has the same.
func fitsIdentity(l *Location, key, value string) (bool, error) {
	v, err := l.Open(blockdev.ReadOnly)
	if err != nil {
		return false, err
	}
	defer v.Close()
	serial, label, ok, err := identity(v)
	if err != nil || !ok {
		return false, err
	}
	have := label
	if key == "UUID" {
		have = strings.ReplaceAll(serial, "-", "")
		value = strings.ReplaceAll(value, "-", "")
	}
	if have == "" || !strings.EqualFold(have, value) {
		return false, nil
	}
	member, err := MDMember(v)
	return !member, err
}

// volumesOf returns all the volumes of one disk or image, and what is wrong with it.
func (f *Finder) volumesOf(path string) ([]*Location, []string, error) {
	s, err := f.openSource(path, path)
	if err != nil {
		return nil, nil, err
	}
	if s.table == nil {
		if errors.Is(s.err, ErrNoTable) {
			if s.fs == FSFAT || s.fs == FSExFAT {
				return []*Location{f.whole(s)}, nil, nil
			}
			return nil, nil, nil
		}
		return nil, nil, fmt.Errorf("%s: %w", path, s.err)
	}
	var all []*Location
	var problems []string
	for _, p := range s.table.Problems {
		problems = append(problems, path+": "+p)
	}
	for i := range s.table.Partitions {
		l, err := f.part(s, &s.table.Partitions[i])
		if err != nil {
			problems = append(problems, err.Error())
			continue
		}
		l.Spec = l.String()
		all = append(all, l)
	}
	return all, problems, nil
}

// Unread is a disk or image that could not be looked at.
type Unread struct {
	Path string
	Err  error
}

// given returns the volumes in Among.
func (f *Finder) given() (all []*Location, problems []string, unread []Unread, err error) {
	for _, path := range f.Among {
		ls, more, err := f.givenIn(path)
		if err != nil {
			unread = append(unread, Unread{path, err})
			continue
		}
		all, problems = append(all, ls...), append(problems, more...)
	}
	return all, problems, unread, nil
}

func (f *Finder) givenIn(path string) ([]*Location, []string, error) {
	id, err := blockdev.Identify(path)
	if err != nil {
		return nil, nil, fmt.Errorf("cannot look at %s: %w", path, err)
	}
	b, err := f.block(path, id)
	if err != nil {
		return nil, nil, err
	}
	if b.Disk == "" {
		return f.volumesOf(path)
	}
	l, err := f.partNode(path, path, b, id)
	if err != nil {
		return nil, nil, err
	}
	return []*Location{l}, nil, nil
}

// isQuiet says whether a device is one of those that are not opened unless they are named.
func isQuiet(name string) bool {
	return slices.ContainsFunc(quiet, func(prefix string) bool { return strings.HasPrefix(name, prefix) })
}

// isSearched says whether a device is a whole disk that is looked into without being named.
func isSearched(b blockdev.Block) bool {
	// A disk with holders is a member of an array or a path of a multipath device, and shows what those show.
	return b.Disk == "" && b.Size != 0 && !b.Hidden && len(b.Holders) == 0 && !isQuiet(b.Name)
}

// quiet are the first letters of the names of devices that are never opened unless they are named: their content is
// known under another name (loop, dm), or opening them does things (a tape-like floppy or CD drive spins up).
var quiet = []string{"loop", "ram", "zram", "sr", "fd", "dm-", "mtdblock"}

// machine returns the volumes on the disks of this machine. A disk that cannot be read is no error: another one may hold
// what is wanted.
func (f *Finder) machine() (all []*Location, problems []string, unread []Unread, err error) {
	blocks, err := f.System.Blocks()
	if err != nil {
		return nil, nil, nil, err
	}
	for _, b := range blocks {
		if !isSearched(b) {
			continue
		}
		ls, more, err := f.volumesOf(b.Node)
		if err != nil {
			unread = append(unread, Unread{b.Node, err})
			continue
		}
		all, problems = append(all, ls...), append(problems, more...)
	}
	return all, problems, unread, nil
}

// Listing is what List finds.
type Listing struct {
	Volumes  []*Location // ESPs and XBOOTLDR partitions, and FAT volumes without a table that were named
	Problems []string    // tables that are damaged, GUIDs that occur twice
	Unread   []Unread    // disks and images that could not be looked at: what is on them is not known
}

// List returns every ESP and XBOOTLDR partition in Among or, when that is empty, on this machine. Of the machine's
// disks those without a medium, loop devices, RAM disks, CD and floppy drives, dm devices, and members of arrays are
// left out.
func (f *Finder) List() (*Listing, error) {
	search := f.machine
	if len(f.Among) > 0 {
		search = f.given
	}
	all, problems, unread, err := search()
	if err != nil {
		return nil, fmt.Errorf("cannot list volumes: %w", err)
	}
	list := &Listing{Problems: problems, Unread: unread}
	for _, l := range all {
		named := len(f.Among) > 0 && l.Part == nil
		if !named && (l.Part == nil || l.Part.Type != TypeESP && l.Part.Type != TypeXBOOTLDR) {
			continue
		}
		same := false
		for _, other := range list.Volumes {
			if same, err = SameVolume(l, other); err != nil {
				return nil, fmt.Errorf("cannot list volumes: %w", err)
			}
			if same {
				break
			}
			// Within one disk the table reports it already.
			if l.Part != nil && other.Part != nil && l.Disk != other.Disk && l.Part.PARTUUID() == other.Part.PARTUUID() {
				list.Problems = append(list.Problems, fmt.Sprintf("%s and %s have the same partition GUID %s", other, l, l.Part.PARTUUID()))
			}
		}
		if !same {
			list.Volumes = append(list.Volumes, l)
		}
	}
	return list, nil
}

// Sibling returns another partition of the given type on the same disk as l, the first one in the table as systemd-boot
// takes it: the XBOOTLDR that goes with an ESP, or the other way round. It returns ErrNotFound when there is none.
func (f *Finder) Sibling(l *Location, typ uuid.UUID) (*Location, error) {
	sibling, _, err := f.sameDisk(l, typ, func(n int) bool { return n != l.Part.Number })
	return sibling, err
}

// OnSameDisk returns the partition of the given type on the disk of l: l itself if it is one, else the first one in the
// table, as systemd-boot and the firmware take it. problems tells in words of others of that type, of which there should
// be none (Boot Loader Specification, "The Partitions"). It returns ErrNotFound when there is none of the type.
func (f *Finder) OnSameDisk(l *Location, typ uuid.UUID) (found *Location, problems []string, err error) {
	return f.sameDisk(l, typ, func(n int) bool { return l.Part.Type != typ || n == l.Part.Number })
}

// sameDisk returns the first partition of a type on the disk of l whose number may be taken, and what is odd about others
// of that type.
func (f *Finder) sameDisk(l *Location, typ uuid.UUID, may func(number int) bool) (*Location, []string, error) {
	fail := func(err error) (*Location, []string, error) {
		return nil, nil, fmt.Errorf("cannot find the other partition on the disk of %s: %w", l, err)
	}
	if l.Part == nil {
		return fail(ErrNotFound)
	}
	s, err := f.openSource(l.Spec, l.Disk)
	if err != nil {
		return fail(err)
	}
	if s.table == nil {
		return fail(s.err)
	}
	all := s.table.OfType(typ)
	i := slices.IndexFunc(all, func(p *Partition) bool { return may(p.Number) })
	if i < 0 {
		return fail(ErrNotFound)
	}
	found, err := f.part(s, all[i])
	if err != nil {
		return fail(err)
	}
	found.Spec = found.String()
	if len(all) == 1 {
		return found, nil, nil
	}
	numbers := make([]string, len(all))
	for j, p := range all {
		numbers[j] = strconv.Itoa(p.Number)
	}
	return found, []string{fmt.Sprintf("%s has %d partitions of type %s (%s), and %d is used",
		l.Disk, len(all), all[i].TypeName(), strings.Join(numbers, ", "), all[i].Number)}, nil
}
