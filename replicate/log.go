package replicate

import (
	"crypto/rand"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"time"

	"espmirror/blockdev"
	"espmirror/fatdriver"
	"espmirror/journal"
)

// Where espmirror keeps what is its own on a secondary.
const (
	stateDir    = "EFI/espmirror"
	journalPath = stateDir + "/journal"
)

// newID makes the identity of a transaction from random bytes; nil is the system's.
func newID(id *[16]byte, random io.Reader) error {
	if random == nil {
		random = rand.Reader
	}
	_, err := io.ReadFull(random, id[:])
	return err
}

func journalRuns(runs []fatdriver.Run) []journal.Run {
	out := make([]journal.Run, len(runs))
	for i, r := range runs {
		out[i] = journal.Run{First: uint32(r.First), Count: r.Count}
	}
	return out
}

func volumeRuns(runs []journal.Run) []fatdriver.Run {
	out := make([]fatdriver.Run, len(runs))
	for i, r := range runs {
		out[i] = fatdriver.Run{First: fatdriver.Cluster(r.First), Count: r.Count}
	}
	return out
}

func newBlock(b fatdriver.Block, single bool) journal.Block {
	nb := journal.Block{Off: b.Off, Old: sha256.Sum256(b.Old), New: b.New}
	if single {
		// With the old image a torn commit sector is recognised for what it is and can be put back.
		nb.OldImage = b.Old
	}
	return nb
}

// binding ties a journal to its volume and to its place on it. The partition's GUID is not in it: the same volume must
// be recoverable as a partition of a disk whose table is broken, and as a copy of itself, and rule R checks all that a
// record relies on anyway.
func binding(v *fatdriver.Volume, runs []fatdriver.Run) journal.Binding {
	h := sha256.New()
	fmt.Fprintf(h, "espmirror journal binding 1\n")
	h.Write(v.Identity())
	g := v.Geometry()
	var b [8]byte
	put := func(n uint64) {
		binary.LittleEndian.PutUint64(b[:], n)
		h.Write(b[:])
	}
	put(uint64(g.TotalSectors))
	for _, r := range runs {
		put(uint64(r.First))
		put(uint64(r.Count))
	}
	var out journal.Binding
	h.Sum(out[:0])
	return out
}

// findJournal opens the journal of a scanned volume. It returns nil without an error when there is none, or when what
// is there is too small to be one.
func findJournal(v *fatdriver.Volume, tree *fatdriver.Tree) (*journal.Log, blockdev.Device, journal.Binding, error) {
	n := lookup(tree.Root, journalPath)
	if n == nil || n.IsDir() || n.Size() < journal.MinSize {
		return nil, nil, journal.Binding{}, nil
	}
	dev, err := tree.FileDevice(n)
	if err != nil {
		return nil, nil, journal.Binding{}, nil
	}
	bind := binding(v, n.Runs)
	log, err := journal.Open(dev, v.Geometry().SectorSize, bind)
	return log, dev, bind, err
}

// searchJournal looks for a journal with an unfinished record when no directory leads to one: a cut can turn the sector
// that was being committed into garbage, and that may be the one that names our own directory. Each allocated cluster
// may be the beginning of it; the header says so, and its binding that it is this volume's, in this place. In a sound tree
// a file of another name is somebody else's, whatever it holds. nil without an error means that none was found; blind
// says that not every cluster could be read, so that there may be one all the same.
func searchJournal(v *fatdriver.Volume, tree *fatdriver.Tree) (found *journal.Log, blind bool, err error) {
	sound := tree.Damage() == nil
	err = v.EachChain(func(first fatdriver.Cluster) (bool, error) {
		if sound && tree.Uses(first) {
			return true, nil
		}
		b, err := v.ReadCluster(first, journal.HeaderSize)
		if err != nil {
			b, err = v.ReadCluster(first, journal.HeaderSize) // one failure is no evidence
		}
		if err != nil {
			blind = true
			return true, nil
		}
		h, err := journal.DecodeHeader(b)
		if err != nil {
			return true, nil
		}
		dev, runs, err := v.ChainDevice(first, h.Size)
		if err != nil {
			return true, nil
		}
		log, err := journal.Open(dev, v.Geometry().SectorSize, binding(v, runs))
		if err != nil && !errors.Is(err, journal.ErrBinding) {
			log, err = journal.Open(dev, v.Geometry().SectorSize, binding(v, runs))
		}
		if err != nil {
			blind = blind || !errors.Is(err, journal.ErrBinding)
			return true, nil
		}
		if log.Status().State == journal.Idle {
			return true, nil
		}
		found = log
		return false, nil
	})
	return found, blind, err
}

// journalOf opens the journal of a target for a new transaction. One that belongs to another volume, or is damaged,
// holds nothing that can be acted on, and is made anew; one of a newer version is left alone. nil without an error
// means that there is none yet.
func (r *run) journalOf(s *side) (*journal.Log, error) {
	log, dev, bind, err := findJournal(s.vol, s.tree)
	if errors.Is(err, journal.ErrVersion) {
		return nil, fmt.Errorf("%w: %w", ErrRefused, err)
	}
	if errors.Is(err, journal.ErrBinding) || errors.Is(err, journal.ErrInvalid) {
		return journal.Reinit(dev, s.vol.Geometry().SectorSize, bind)
	}
	return log, err
}

// journalSize is the size in bytes of the journal of a volume: headers, some commit sectors, and three sets of clusters
// (taken, given up, new objects), of which the worst kind, every other cluster, costs a bit for each cluster.
func journalSize(g fatdriver.Geometry) int64 {
	set := int64(g.Clusters)/8 + 64
	size := journal.PayloadOffset + 16<<10 + 16*2*int64(g.SectorSize) + 3*set
	size = min(max(size, journal.MinSize), 1<<20)
	cs := int64(g.ClusterSize)
	return (size + cs - 1) / cs * cs
}

// firstDay is the time of what belongs to the journal: the first one that FAT has. The clock would make each image different, and a
// time of zero is no date.
var firstDay = time.Date(1980, time.January, 1, 0, 0, 0, 0, time.UTC)

// journalAnchor wants the journal file, with the directories that are missing above it.
func journalAnchor(tree *fatdriver.Tree, size int64, contiguous bool) fatdriver.Anchor {
	file := &fatdriver.Want{
		Name: "journal", Size: size, Contiguous: contiguous,
		Meta: fatdriver.Meta{Attr: fatdriver.AttrReadOnly | fatdriver.AttrHidden | fatdriver.AttrSystem, Modified: firstDay},
	}
	own := &fatdriver.Want{Name: "espmirror", Dir: true, Meta: fatdriver.Meta{Modified: firstDay}, Children: []*fatdriver.Want{file}}
	parent := tree.Root
	if efi := childNode(parent, "EFI"); efi != nil && efi.IsDir() {
		parent = efi
		if dir := childNode(efi, "espmirror"); dir != nil && dir.IsDir() {
			return fatdriver.Anchor{Parent: dir, Old: childNode(dir, "journal"), New: file}
		}
	} else {
		return fatdriver.Anchor{Parent: parent, Old: efi, New: &fatdriver.Want{Name: "EFI", Dir: true, Meta: fatdriver.Meta{Modified: firstDay}, Children: []*fatdriver.Want{own}}}
	}
	return fatdriver.Anchor{Parent: parent, Old: childNode(parent, "espmirror"), New: own}
}

// planJournal plans the creation of the journal, in one run of clusters where there is one long enough.
func planJournal(s *side) (*fatdriver.Plan, error) {
	size := journalSize(s.vol.Geometry())
	var plan *fatdriver.Plan
	var err error
	for _, contiguous := range []bool{true, false} {
		an := journalAnchor(s.tree, size, contiguous)
		if an.Old != nil && an.New.Dir {
			return nil, fmt.Errorf("%w: %s is a file, and the journal needs a directory there", ErrRefused, an.Old.Path())
		}
		if plan, err = s.tree.NewPlan([]fatdriver.Step{{an}}, 0); err == nil || !errors.Is(err, fatdriver.ErrNoSpace) {
			break
		}
	}
	return plan, err
}

// journalNeed is the number of clusters that the creation of the journal takes, beside those of a plan for points.
func journalNeed(s *side, points []switchPoint) int64 {
	size := journalSize(s.vol.Geometry())
	an := journalAnchor(s.tree, size, false)
	n := size / s.cluster()
	for w := an.New; w.Dir; w = w.Children[0] {
		n++
	}
	for _, p := range points {
		if an.Parent == s.tree.Root && p.Old == nil && fatdriver.Fold(p.path) == "EFI" {
			n-- // the journal brings the directory that the plan would make
		}
	}
	_, err := planJournal(s)
	if need := (*fatdriver.ErrNeedSlots)(nil); errors.As(err, &need) {
		n = need.Need
	}
	return n
}

// roomFor refuses when a plan that needs that many clusters and the journal do not fit together, before the journal is
// created.
func (r *run) roomFor(s *side, need, free int64, points []switchPoint) error {
	cs := s.cluster()
	sf := &fatdriver.Shortfall{Need: (need + journalNeed(s, points) + s.stateNeed()) * cs, Free: free * cs, Keep: (r.opt.KeepFree + cs - 1) / cs * cs}
	if sf.Need+sf.Keep > sf.Free {
		return fmt.Errorf("%w (the journal included)", sf)
	}
	return nil
}

func clusters(runs []fatdriver.Run) int64 {
	var n int64
	for _, r := range runs {
		n += int64(r.Count)
	}
	return n
}

// createJournal makes the journal file on first use. There is no journal yet to say so, hence the order: the content
// goes first, and every cluster of it bears a stamp; only then are the clusters allocated; then comes the directory
// entry. After a cut in between, recovery knows the lost clusters as ours by the stamp.
func (r *run) createJournal(s *side) error {
	plan, err := planJournal(s)
	var need *fatdriver.ErrNeedSlots
	if errors.As(err, &need) {
		if err := r.extend(s, nil, need.Dir, need.More); err != nil {
			return err
		}
		return r.scan(s)
	}
	if err != nil {
		return fmt.Errorf("cannot create the journal: %w", err)
	}
	file := plan.Files[0]
	content, err := journalContent(s.vol, file, plan.Alloc())
	if err != nil {
		return fmt.Errorf("cannot create the journal: %w", err)
	}
	tx := plan.Begin()
	err = inOrder(
		func() error {
			w := tx.File(file)
			if _, err := w.Write(content); err != nil {
				return err
			}
			return w.Close()
		},
		tx.WriteDirs,
		// The stamps must be on the medium before the clusters are taken: without them nobody could tell whose they are.
		tx.Flush,
		tx.WriteFAT,
		// The file must be whole before its directory entry is.
		tx.Flush,
		func() error { return r.readBack(s, tx) },
		func() error { return r.commitAll(s, plan, tx, nil) },
		func() error { return closeTx(tx, nil) },
	)
	if err != nil {
		return fmt.Errorf("cannot create the journal: %w", err)
	}
	r.log.Info("created the journal", "target", s.t.Name, "bytes", file.Want.Size)
	return r.scan(s)
}

// journalContent is a new journal file. What a header does not need is filled with copies of the first one, so that
// each cluster says what it belongs to and which clusters the creation took (slot B stays empty).
func journalContent(v *fatdriver.Volume, f *fatdriver.NewFile, alloc []fatdriver.Run) ([]byte, error) {
	g := v.Geometry()
	creation := journalRuns(alloc)
	if len(creation) > journal.MaxCreationRuns {
		creation = creation[:journal.MaxCreationRuns]
	}
	content, err := journal.Format(int(f.Want.Size), g.SectorSize, binding(v, f.Runs), creation)
	if err != nil {
		return nil, err
	}
	stamp := content[:journal.HeaderSize]
	for at := g.ClusterSize; at < len(content); at += g.ClusterSize {
		if at/max(g.SectorSize, journal.HeaderSize) != journal.SlotB/max(g.SectorSize, journal.HeaderSize) {
			copy(content[at:], stamp)
		}
	}
	return content, nil
}

// extend makes a directory longer by some clusters, under the journal's protection where there is one.
func (r *run) extend(s *side, log *journal.Log, dir *fatdriver.Node, clusters int64) error {
	plan, err := s.tree.NewExtension(dir, clusters)
	if err != nil {
		return err
	}
	if err := r.carryOut(s, plan, log); err != nil {
		return fmt.Errorf("cannot make directory /%s longer: %w", dir.Path(), err)
	}
	return nil
}

// carryOut is a transaction of its own before that of the run, whose new files, if any, were made for this target. log is
// nil while there is no journal yet.
func (r *run) carryOut(s *side, plan *fatdriver.Plan, log *journal.Log) error {
	if log != nil {
		rec, err := s.newRecord(plan)
		if err != nil {
			return err
		}
		if err := log.Prepare(rec); err != nil {
			return err
		}
	}
	f := &feed{s: s, own: plan.Files}
	tx := plan.Begin()
	return inOrder(
		func() error { return f.writeOwn(tx) },
		tx.WriteDirs,
		func() error {
			if log != nil {
				return nil
			}
			// Where no record names the cluster, recovery knows it by its zeros: they must be there before it is taken.
			return tx.Flush()
		},
		tx.WriteFAT,
		// B1: what is new must be on the medium, the zeros of a directory that grows too, before anything leads to it.
		tx.Flush,
		func() error { return r.readBack(s, tx) },
		func() error { return r.commitAll(s, plan, tx, log) },
		func() error { return closeTx(tx, log) },
	)
}

// inOrder calls the steps one after the other, and stops at the first error.
func inOrder(steps ...func() error) error {
	for _, step := range steps {
		if err := step(); err != nil {
			return err
		}
	}
	return nil
}
