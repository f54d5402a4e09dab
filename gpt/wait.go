package gpt

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"slices"
	"time"

	"golang.org/x/sys/unix"

	"espmirror/blockdev"
)

// lookAgain is how often Waiter looks without being told of anything: where the kernel's events do not come, and for a
// node that appears after its event.
const lookAgain = 500 * time.Millisecond

// Waiter waits for partitions.
type Waiter struct {
	System blockdev.System

	// Tell is called with what is missing after the first look, and whenever that becomes less, but not for nothing; it may
	// be nil. It runs in the goroutine of Wait.
	Tell func(missing []string)

	every time.Duration // in place of lookAgain
}

// Wait waits until this machine has partitions with all the PARTUUIDs, or for timeout. See Waiter.Wait.
func Wait(ctx context.Context, sys blockdev.System, guids []string, timeout time.Duration) (missing []string, err error) {
	w := Waiter{System: sys}
	return w.Wait(ctx, guids, timeout)
}

// Wait waits until this machine has partitions with all the PARTUUIDs, in any of the forms that ParsePartUUID reads, and
// returns at once when it has. A timeout that is not positive means to look once. It returns those that are missing when
// the time is up, in the form of Partition.PARTUUID and the order given.
//
// A partition is there when Finder.FindPartUUID finds it, or finds it twice: that is for its caller to judge. A disk of
// which the system does not know every partition is read once when it comes or changes, not each time.
//
// It returns ErrBadName; with the missing ones the error of the context; or, when the time is up, the error that kept the
// last look from telling: a system that cannot list its devices, or a partition that is there by the word of the system, on
// a disk that may not be read (fs.ErrPermission).
func (w *Waiter) Wait(ctx context.Context, guids []string, timeout time.Duration) (missing []string, err error) {
	l := &lookout{finder: Finder{System: w.System}, read: map[string]diskRead{}, every: w.every}
	if l.every == 0 {
		l.every = lookAgain
	}
	for _, name := range guids {
		guid, err := ParsePartUUID(name)
		if err != nil {
			return nil, fmt.Errorf("cannot wait for a partition: %w", err)
		}
		if !slices.Contains(l.missing, guid) {
			l.missing = append(l.missing, guid)
		}
	}
	missing = slices.Clone(l.missing)
	if len(missing) == 0 {
		return nil, nil
	}

	if err := ctx.Err(); err != nil {
		return missing, fmt.Errorf("cannot wait for partitions: %w", err)
	}
	var news <-chan struct{}
	var timer <-chan time.Time
	if timeout > 0 {
		// Before the first look, or what comes between the two would be missed.
		if events, err := w.System.BlockEvents(); err == nil {
			defer events.Close()
			news = events.C
		} // else looking from time to time has to do
		t := time.NewTimer(timeout)
		defer t.Stop()
		timer = t.C
	}

	// A disk that is dying can keep a read, and with it the look, for minutes. The wait is bounded all the same: the
	// goroutine is left behind then, and ends when the read does.
	looks := make(chan look)
	stop := make(chan struct{})
	defer close(stop)
	go l.run(news, looks, stop)
	told := -1
	for {
		select {
		case look := <-looks:
			missing, err = look.missing, look.err
			if len(missing) == 0 || timeout <= 0 {
				return missing, err
			}
			if w.Tell != nil && len(missing) != told {
				w.Tell(missing)
			}
			told = len(missing)
		case <-timer:
			select {
			case look := <-looks: // it was done at the same moment
				return look.missing, look.err
			default:
				return missing, err
			}
		case <-ctx.Done():
			return missing, fmt.Errorf("cannot wait for partitions: %w", ctx.Err())
		}
	}
}

// look is what one look found.
type look struct {
	missing []string
	err     error // what kept it from telling
}

// lookout looks again and again. It belongs to one goroutine.
type lookout struct {
	finder  Finder
	missing []string
	every   time.Duration

	// read are the disks of which the system does not know every partition, as they were read last, by name.
	read map[string]diskRead
}

// diskRead is the table of a disk, and what the system said of the disk when it was read.
type diskRead struct {
	state string
	table *source
}

// run looks at once, at each piece of news and from time to time, until nothing is missing or it is told to stop.
func (l *lookout) run(news <-chan struct{}, looks chan<- look, stop <-chan struct{}) {
	tick := time.NewTicker(l.every)
	defer tick.Stop()
	for {
		found := l.look()
		select {
		case looks <- found:
		case <-stop:
			return
		}
		if len(found.missing) == 0 {
			return
		}
		select {
		case <-news:
		case <-tick.C:
		case <-stop:
			return
		}
	}
}

// look looks once for what is missing.
func (l *lookout) look() look {
	blocks, err := l.finder.System.Blocks()
	if err != nil {
		return look{l.missing, err}
	}
	failed := map[string]error{} // a disk that cannot be read is tried once a look, not once for each partition
	read := func(disk blockdev.Block) (*source, error) {
		if err := failed[disk.Name]; err != nil {
			return nil, err
		}
		table, err := l.tableOf(blocks, disk)
		if err != nil {
			failed[disk.Name] = err
		}
		return table, err
	}
	var still []string
	for _, guid := range l.missing {
		search := search{Finder: &l.finder, partUUID: guid, blocks: blocks}
		search.known()
		denied := slices.IndexFunc(search.errs, func(e error) bool { return errors.Is(e, fs.ErrPermission) })
		if denied >= 0 && err == nil {
			err = search.errs[denied] // not that of a disk of somebody else
		}
		if len(search.found) == 0 {
			search.disks(read)
		}
		if _, found := search.result(nil); found == nil || errors.Is(found, ErrAmbiguous) {
			continue
		}
		still = append(still, guid)
	}
	l.missing = still
	if len(still) == 0 {
		err = nil
	}
	return look{still, err}
}

// tableOf returns the table of a disk, and reads it only when the disk is not what it was when it was read last. A disk
// that could not be read is read again.
func (l *lookout) tableOf(blocks []blockdev.Block, disk blockdev.Block) (*source, error) {
	state := l.state(blocks, disk)
	if last, ok := l.read[disk.Name]; ok && last.state == state {
		return last.table, nil
	}
	table, err := l.finder.tableOf(disk)
	if err != nil {
		return nil, err
	}
	l.read[disk.Name] = diskRead{state, table}
	return table, nil
}

// state is what the system says of a disk and its partitions. The directories of partitions are made anew whenever the
// kernel reads the table, so their inodes tell of a table that differs in GUIDs alone.
func (l *lookout) state(blocks []blockdev.Block, disk blockdev.Block) string {
	state := ""
	for _, b := range blocks {
		if b.Name != disk.Name && b.Disk != disk.Name {
			continue
		}
		var st unix.Stat_t
		_ = unix.Stat(l.finder.System.Path("/sys/class/block/"+b.Name), &st) // one that has just gone has no inode
		state += fmt.Sprintln(b.Name, b.Num, b.Start, b.Size, st.Ino)
	}
	return state
}
