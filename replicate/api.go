// Package replicate decides what is replicated and whether it is safe, and carries it out: sources, selection, diff by
// content, the plan, and the orchestrator that takes one source to any number of targets.
//
// It ties the packages below it together, each of which knows nothing of the others: fatdriver plans and writes,
// journal records, blockdev flushes.
package replicate

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"time"

	"espmirror/blockdev"
	"espmirror/fatdriver"
)

var (
	// ErrRefused is returned when a guard stopped the run for a target (or for all) before anything was written to it.
	ErrRefused = errors.New("refused")

	// ErrNeedsRecovery is returned by read-only operations on a volume that an interrupted run left behind, or whose FAT
	// copies differ.
	ErrNeedsRecovery = errors.New("it needs recovery")

	// ErrEmptySelection is returned when nothing is selected on the source: replicating it would delete everything.
	ErrEmptySelection = errors.New("the selection is empty on the source")

	// ErrSelection is returned for a selection or exclusion that cannot be meant: it names no file, or what must never be
	// replicated.
	ErrSelection = errors.New("cannot read the selection")

	// ErrStopped is the error of a target whose run was stopped because the source failed or the context was cancelled;
	// what had been written was taken back.
	ErrStopped = errors.New("the run was stopped")

	// ErrSource is returned when the source cannot be read or is damaged; nothing was committed to any target.
	ErrSource = errors.New("the source cannot be replicated")
)

// Hint attaches to an error what a person should do next. It is printed on a line of its own.
type Hint struct {
	Err  error
	Text string
}

func (h *Hint) Error() string { return h.Err.Error() }
func (h *Hint) Unwrap() error { return h.Err }

// Hint returns the text.
func (h *Hint) Hint() string { return h.Text }

// Target is one secondary, open for reading and writing over exactly its volume.
type Target struct {
	Name string // as the user knows it
	Dev  blockdev.Device
	// PartGUID is the partition's GUID in lower case, "" for a volume without a partition table. It is part of what
	// binds a journal to its volume.
	PartGUID string

	// Pair is the same for volumes that go together: the XBOOTLDR partition and the ESP of a disk. "": it goes alone.
	Pair string
	// Member is the partition GUID by which the replica set knows the volume, where that is not its own: of an XBOOTLDR
	// partition the ESP's. Set is the set file that the volume itself goes by, where it does not hold it.
	Member string
	Set    *Set
}

// guid is how the replica set knows the target.
func (t *Target) guid() string {
	if t.Member != "" {
		return t.Member
	}
	return t.PartGUID
}

// Selection says what is replicated. Paths are relative to the root of the volume, separated by slashes, matched
// without regard to case. Empty Select means the default selection.
type Selection struct {
	Select  []string
	Exclude []string // paths or patterns (path.Match); a pattern without a slash matches a name at any depth
}

// Options of a run.
type Options struct {
	Selection  Selection
	DryRun     bool  // plan only; the devices may be read-only
	KeepFree   int64 // bytes that must stay free at the peak
	NoReadBack bool  // skip comparing what was written with what the medium holds

	// Member says that the source is a member of a replica set. Then each run counts a generation, on the targets and,
	// through Save, on the source; and what is newer on a target is not overwritten.
	Member     bool
	SourceGUID string                                        // the source's partition GUID, lower case; "" when it has none
	Save       func(ctx context.Context, state []byte) error // writes StatePath on the source
	// Try says whether Save would work, before the first write to any target, and in a dry run; it may be nil.
	Try func(ctx context.Context, state []byte) error
	// Set is the replica set file to go by; nil: the one that the source holds, if it does.
	Set *Set
	// SourceTree is the volume of a source that is read through its mount point, scanned after a sync(2) of it and before
	// the source was opened: what the fingerprint of the source is taken of. It may be nil.
	SourceTree  *fatdriver.Tree
	Fingerprint bool // do not read where the fingerprints of both sides are those of the last run
	// These are the EFI variables LoaderEntrySelected, LoaderEntryDefault, LoaderEntryPreferred and LoaderEntryOneShot, "" when
	// not set: where entries have to go before there is room for new ones, what they name stays.
	BootedEntry, DefaultEntry, PreferredEntry, OneShotEntry string
	Force                                                   bool      // the source wins, whatever the lineage says
	Now                                                     time.Time // what the state file calls now; zero: the clock
	// Random gives the source of the identities of transactions on one volume, which is called by its partition GUID, or its
	// name where it has none; "" is that of a new lineage. It is asked once for each in a run, so that no volume's bytes depend
	// on what else is under way; nil is getrandom(2). With Now it makes all bytes of a run on a new volume follow from what went
	// into it.
	Random func(volume string) io.Reader

	// Jobs is how many targets are read or written at a time; 0: all of them. The source is read once either way.
	Jobs int

	Log      *slog.Logger
	Progress func(Progress) // called from several goroutines, never concurrently for one target; may be nil
}

// Progress is one step of a run.
type Progress struct {
	Target string // "" for the source
	Phase  string // "compare", "write", "read back", "commit", "free", "done"
	Done   int64  // bytes
	Total  int64  // bytes, 0 when not known
}

// Change is one difference between source and target, as a plan or a verification lists it.
type Change struct {
	Op   string // "create", "replace", "delete", "rename"; verify also "missing", "extra", "differs"
	Path string
	From string // the old path of a rename
	Dir  bool
	Size int64 // bytes of the new file, or of the one deleted
}

// Commit is one commit point of a plan: a sector that switches one or several directory entries at once.
type Commit struct {
	Paths []string // the entries
	Off   int64    // byte offset of the sector on the volume
}

// Summary is what a plan will do, or did, to a target: exact numbers, not estimates.
type Summary struct {
	Early         []Change // deleted by a transaction of its own, to make room; not among Changes
	Changes       []Change
	Commits       []Commit
	DataBytes     int64 // bytes of file content to write
	BytesToWrite  int64 // all bytes to write, the journal included
	Clusters      int64 // clusters to allocate
	ClustersFreed int64 // clusters to free after the commit
	FreeBytes     int64 // free now
	FreeAfter     int64 // free afterwards
	PeakNeeded    int64 // bytes taken at the peak, a journal that is made on the way included
	Flushes       int
}

// Outcome says how a run ended for one target.
type Outcome string

// The outcomes of a run.
const (
	InSync  Outcome = "in sync" // there was nothing to do, and nothing was written
	Synced  Outcome = "synced"
	Differs Outcome = "differs" // a dry run or verification found differences
	Failed  Outcome = "failed"
	Refused Outcome = "refused" // a guard said no; nothing was written
)

// Result is what happened to one target.
type Result struct {
	Target    string
	Outcome   Outcome
	Summary   Summary
	Lineage   *Lineage  // how the target stands to the source; nil when neither is in a set
	Written   int64     // bytes that went to the target, whatever the outcome; 0 of a dry run
	Recovered *Recovery // what was finished or rolled back first, nil when there was nothing
	Err       error
}

// Recovery is what `recover` found and did.
type Recovery struct {
	// Action is "nothing to do", "rolled back", "rolled forward", "finished", or "stale" (the record no longer fits
	// the volume, which was left alone).
	Action        string
	Reason        string // why a record is stale
	FreedClusters int64  // clusters released that nobody can reach
	FATsMended    int64  // sectors of other FAT copies made equal to copy 0
	FSInfoFixed   bool
}

// Changed says whether anything was written.
func (r *Recovery) Changed() bool {
	return r != nil && (r.FreedClusters > 0 || r.FATsMended > 0 || r.FSInfoFixed || r.Action != "nothing to do" && r.Action != "stale")
}
