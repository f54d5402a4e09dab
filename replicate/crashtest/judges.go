package crashtest

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"espmirror/fatdriver"
	"espmirror/fixtures"
)

// Outside lets the programs that other people wrote judge states of a run: fsck.fat by a list of the lines that it may
// say, and mtools, which reads every file. A state costs them a few milliseconds, as only the sectors in which it
// differs from the one before are written.
type Outside struct {
	// Mtools is that mtools, which takes several times as long, gets every so many states; 1 if zero.
	Mtools int
	// Judged and Read count the calls of fsck.fat and of mtools.
	Judged, Read int64

	n    int
	run  *Run
	file *os.File
	base *fixtures.Sparse
	now  []int64 // offsets in file that are not those of the base
}

// NewOutside writes the volume as it was before the run to a file in dir, which must be there until Close.
func (c *Run) NewOutside(dir string) (*Outside, error) {
	base, ok := c.Recording.Base.(*fixtures.Sparse)
	if !ok {
		return nil, fmt.Errorf("internal error: the base of the recording is a %T", c.Recording.Base)
	}
	f, err := os.Create(filepath.Join(dir, fmt.Sprintf("scenario-%d.img", c.Scenario.Seed)))
	if err != nil {
		return nil, err
	}
	o := &Outside{run: c, file: f, base: base}
	if err := base.WriteFile(f); err != nil {
		o.Close()
		return nil, err
	}
	return o, nil
}

// Close removes the file.
func (o *Outside) Close() error {
	o.file.Close()
	return os.Remove(o.file.Name())
}

// put makes the file the state that the last of the given ones is, each lying on top of the one before.
func (o *Outside) put(states ...*fixtures.State) error {
	b := make([]byte, o.run.g.unit())
	for _, off := range o.now {
		if _, err := o.base.ReadAt(b, off); err != nil {
			return err
		}
		if _, err := o.file.WriteAt(b, off); err != nil {
			return err
		}
	}
	o.now = o.now[:0]
	for _, s := range states {
		if err := s.Changed(func(off int64, b []byte) error {
			o.now = append(o.now, off)
			_, err := o.file.WriteAt(b, off)
			return err
		}); err != nil {
			return err
		}
	}
	return nil
}

// Judge is a Sampler: fsck.fat finds nothing beyond what a cut may leave, and nothing at all after recovery; mtools
// reads what the strict reader sees, both times.
func (o *Outside) Judge(cut *fixtures.State, _ int, recovered *fixtures.State) error {
	for _, x := range []struct {
		when   string
		states []*fixtures.State
		allow  fixtures.Allow
	}{{"cut", []*fixtures.State{cut}, fixtures.AllowCrash}, {"recovered", []*fixtures.State{cut, recovered}, 0}} {
		if err := o.put(x.states...); err != nil {
			return err
		}
		if err := o.fsck(x.allow); err != nil {
			return fmt.Errorf("%s: %w", x.when, err)
		}
		o.Judged++
		if o.n%max(o.Mtools, 1) != 0 || o.run.Scenario.Wear.DirtyFAT { // mtools refuses a dirty FAT
			continue
		}
		o.Read++
		if err := o.mtools(x.states[len(x.states)-1]); err != nil {
			return fmt.Errorf("%s: %w", x.when, err)
		}
	}
	o.n++
	return nil
}

// fsck runs fsck.fat -n on the file. What was wrong with the volume before the run stays so.
func (o *Outside) fsck(allow fixtures.Allow) error {
	w := o.run.Scenario.Wear
	if w.Lost > 0 {
		allow |= fixtures.AllowLost | fixtures.AllowFreeWrong // fsck.fat counts what it would reclaim
	}
	if w.Dirty {
		allow |= fixtures.AllowDirty
		if o.run.g.Type == fatdriver.FAT32 {
			allow |= fixtures.AllowBackupDiffers // Linux sets the bit in the first boot sector only, and so do we here
		}
	}
	if w.WrongFree && allow&fixtures.AllowFreeUnknown != 0 {
		allow |= fixtures.AllowFreeWrong // recovery puts it right
	}
	f, err := fixtures.Fsck(o.file.Name())
	if err != nil {
		return err
	}
	return f.Err(allow)
}

// mtools reads every file through mtools and compares with what the strict reader sees in s.
func (o *Outside) mtools(s *fixtures.State) error {
	files, err := fixtures.Mtools(o.file.Name(), 0)
	if err != nil && strings.Contains(err.Error(), fmt.Sprintf("too big(%#x)", o.run.layout.Clusters+1)) {
		o.Read--
		return nil // mtools takes the last cluster for one too many, and such a volume for no FAT at all
	}
	if err != nil {
		return err
	}
	tree, err := fixtures.ReadStrictOptions(s, s.Size(), 0, fixtures.Options{OrphanLongNames: true, Tail: fixtures.TailEDK2})
	if err != nil {
		return err
	}
	if d := fixtures.CompareJudged(tree, files, fixtures.MtoolsName); len(d) > 0 {
		return fmt.Errorf("mtools sees another tree: %s", d[0])
	}
	return nil
}
