package gpt

import (
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/google/uuid"

	"espmirror/blockdev"
)

// ParsePartUUID returns a PARTUUID as Partition.PARTUUID and the kernel write it: a GUID in lower case, or the "%08x-%02x"
// of an MBR. A PARTUUID= in front, braces and the case of letters do not matter. It returns ErrBadName for anything else.
func ParsePartUUID(s string) (string, error) {
	value := s
	if key, rest, ok := strings.Cut(s, "="); ok && strings.EqualFold(key, "PARTUUID") {
		value = strings.Trim(rest, `"`)
	}
	if guid, err := uuid.Parse(value); err == nil {
		return guid.String(), nil
	}
	if isMBRPartUUID(value) {
		return strings.ToLower(value), nil
	}
	return "", fmt.Errorf("%w: %q is not a partition GUID", ErrBadName, value)
}

// FindPartUUID returns the partition with a PARTUUID, in any of the forms that ParsePartUUID reads. After the disks and
// images in Among it looks for it
//
//  1. in what the kernel says of its partitions (since Linux 6.13),
//  2. in udev's links and database,
//  3. in the tables of the disks of this machine, but not of those of which the system knows every partition under
//     another name.
//
// A disk is opened for reading only when it is the one by 1 or 2, or when it comes to 3. What is found counts only if the
// table on the disk says the same. Where the kernel says that it has the partition and the table says otherwise, both are
// read once more, and then the answer is ErrChanged.
//
// It also returns ErrBadName; ErrAmbiguous when there are several by the same kind of evidence; and ErrNotFound.
func (f *Finder) FindPartUUID(partUUID string) (*Location, error) {
	l, err := f.findPartUUID(partUUID)
	if err != nil {
		return nil, fmt.Errorf("cannot find partition %q: %w", partUUID, err)
	}
	return l, nil
}

func (f *Finder) findPartUUID(name string) (*Location, error) {
	partUUID, err := ParsePartUUID(name)
	if err != nil {
		return nil, err
	}
	l, problems, err := f.pickGiven(hasPartUUID(partUUID))
	if l != nil || err != nil {
		return l, err
	}
	for try := 1; ; try++ {
		l, err := f.onMachine(partUUID, problems)
		// A partitioner at work: the kernel's list and the table were read at different moments.
		if errors.Is(err, ErrChanged) && try == 1 {
			if f.retrying != nil {
				f.retrying()
			}
			continue
		}
		return l, err
	}
}

// hasPartUUID is a test for pick.
func hasPartUUID(partUUID string) func(*Location) (bool, error) {
	return func(l *Location) (bool, error) { return l.Part != nil && l.Part.PARTUUID() == partUUID, nil }
}

// onMachine looks for a PARTUUID on this machine.
func (f *Finder) onMachine(partUUID string, problems []string) (*Location, error) {
	blocks, err := f.System.Blocks()
	if err != nil {
		return nil, err
	}
	search := search{Finder: f, partUUID: partUUID, blocks: blocks}
	search.known()
	if len(search.found) == 0 {
		search.disks(f.tableOf)
	}
	return search.result(problems)
}

// accounted says whether the system knows every partition of a disk by its PARTUUID, so that one of another name cannot
// be on it. A disk on which it sees no partition may have a table that nobody has read yet.
func accounted(sys blockdev.System, blocks []blockdev.Block, disk blockdev.Block) bool {
	some := false
	for _, b := range blocks {
		if b.Disk != disk.Name {
			continue
		}
		if partUUID, sure := sys.KnownPartUUID(b); partUUID == "" || !sure {
			return false
		}
		some = true
	}
	return some
}

// search is one look for a PARTUUID on this machine, with what came of it.
type search struct {
	*Finder
	partUUID string
	blocks   []blockdev.Block

	found   []*Location
	changed error   // the kernel has the partition, and the table has not: ErrChanged
	errs    []error // why something could not be looked at
}

func (s *search) failed(err error) {
	if errors.Is(err, ErrChanged) {
		s.changed = err
		return
	}
	s.errs = append(s.errs, err)
}

// known finds the partitions that the kernel or udev know by the PARTUUID. Those that the table does not confirm are left
// out: of the kernel's that is told, udev's record is merely old.
func (s *search) known() {
	link := s.System.PartUUIDLink(s.partUUID)
	for _, b := range s.blocks {
		if b.Disk == "" || isQuiet(b.Name) {
			continue
		}
		known, _ := s.System.KnownPartUUID(b)
		// The kernel's word counts before a link that may be left over.
		if known != s.partUUID && (b.PartUUID != "" || b.Node != link) {
			continue
		}
		if i := slices.IndexFunc(s.blocks, func(d blockdev.Block) bool { return d.Name == b.Disk }); i < 0 || len(s.blocks[i].Holders) > 0 {
			continue // the disk has just gone, or is a member of something that shows the same
		}
		l, err := s.partitionOf(b)
		if err != nil {
			s.failed(err)
			continue
		}
		switch {
		case l.Part != nil && l.Part.PARTUUID() == s.partUUID:
			s.found = append(s.found, l)
		case b.PartUUID == "" && (l.Part != nil || errors.Is(l.TableErr, ErrChanged)):
			// udev's record is of an older table.
		case l.Part != nil:
			s.failed(fmt.Errorf("cannot use %s: %w: the table of its disk has it as %s: run partprobe", l, ErrChanged, l.Part.PARTUUID()))
		default:
			s.failed(fmt.Errorf("cannot use %s: %w", l, l.TableErr))
		}
	}
}

// partitionOf returns the location of a partition that the kernel has.
func (s *search) partitionOf(b blockdev.Block) (*Location, error) {
	id, err := blockdev.Identify(b.Node)
	if err != nil {
		return nil, fmt.Errorf("cannot look at %s: %w", b.Node, err)
	}
	return s.partNode("PARTUUID="+s.partUUID, b.Node, b, id)
}

// disks looks into the tables of the disks that may have the partition for all that the system knows.
func (s *search) disks(read func(blockdev.Block) (*source, error)) {
	for _, disk := range s.blocks {
		if !isSearched(disk) || accounted(s.System, s.blocks, disk) {
			continue
		}
		table, err := read(disk)
		if err != nil {
			s.failed(err)
			continue
		}
		s.in(table)
	}
}

// tableOf reads the table of a disk; that it has none is no error.
func (f *Finder) tableOf(disk blockdev.Block) (*source, error) {
	s, err := f.openSource(disk.Node, disk.Node)
	if err != nil {
		return nil, err
	}
	if s.err != nil && !errors.Is(s.err, ErrNoTable) {
		return nil, fmt.Errorf("%s: %w", disk.Node, s.err)
	}
	return s, nil
}

// in looks for the partition in a table that was read.
func (s *search) in(disk *source) {
	if disk.table == nil {
		return
	}
	matches := 0
	for i := range disk.table.Partitions {
		p := &disk.table.Partitions[i]
		if p.PARTUUID() != s.partUUID {
			continue
		}
		matches++
		l, err := s.part(disk, p)
		if err != nil {
			s.failed(err)
			continue
		}
		l.Spec = "PARTUUID=" + s.partUUID
		s.found = append(s.found, l)
	}
	if matches == 0 {
		// An entry that cannot be used may be the one.
		for _, p := range disk.table.Problems {
			s.errs = append(s.errs, errors.New(disk.path+": "+p))
		}
	}
}

// result returns the one partition that was found, or why there is none. Several nodes of the same bytes are one.
func (s *search) result(problems []string) (*Location, error) {
	l, _, err := s.pick(s.found, hasPartUUID(s.partUUID))
	switch {
	case l != nil || err != nil:
		return l, err
	case s.changed != nil:
		return nil, s.changed
	}
	for _, err := range s.errs {
		problems = append(problems, err.Error())
	}
	return nil, notFound(problems)
}
