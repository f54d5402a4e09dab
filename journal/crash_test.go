package journal

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"reflect"
	"slices"
	"testing"

	"espmirror/blockdev"
)

// event is one write, or a flush if data is nil.
type event struct {
	off  int64
	data []byte
	op   int // index of the operation under way
}

// recorder is a device in memory that notes what is done to it.
type recorder struct {
	*blockdev.Mem
	events []event
	op     int

	flushes   int
	dropFlush int  // flush that is passed over; -1 for none
	oneSlot   bool // slot B is slot A
}

func (d *recorder) place(off int64) int64 {
	if d.oneSlot && off == SlotB {
		return SlotA
	}
	return off
}

func (d *recorder) ReadAt(p []byte, off int64) (int, error) { return d.Mem.ReadAt(p, d.place(off)) }

func (d *recorder) WriteAt(p []byte, off int64) (int, error) {
	d.events = append(d.events, event{d.place(off), bytes.Clone(p), d.op})
	return d.Mem.WriteAt(p, d.place(off))
}

func (d *recorder) Flush() error {
	if d.flushes++; d.flushes-1 == d.dropFlush {
		return nil
	}
	d.events = append(d.events, event{op: d.op})
	return nil
}

var errMedium = errors.New("medium error")

// badSector is a device with one sector that cannot be read.
type badSector struct {
	*blockdev.Mem
	bad int64
}

func (d *badSector) ReadAt(p []byte, off int64) (int, error) {
	if d.bad >= off && d.bad < off+int64(len(p)) {
		return 0, errMedium
	}
	return d.Mem.ReadAt(p, off)
}

// expect is what an operation leaves behind.
type expect struct {
	state  State
	index  int
	id     [16]byte
	digest [32]byte
	rec    *Record
}

// step is one operation of a scenario.
type step struct {
	do      func(l *Log, dev blockdev.Device) error
	want    expect
	durable bool // what it leaves is stable when it returns
}

func prepareStep(r *Record) step {
	return step{func(l *Log, _ blockdev.Device) error { return l.Prepare(r) }, expect{Prepared, 0, r.ID, [32]byte{}, r}, true}
}

func advanceStep(r *Record, i int) step {
	d := seq32(byte(0x80 + i))
	return step{func(l *Log, _ blockdev.Device) error { return l.Advance(i, d) }, expect{Committing, i, r.ID, d, r}, true}
}

func doneStep(r *Record, flush bool) step {
	return step{func(l *Log, dev blockdev.Device) error {
		if err := l.Done(); err != nil || !flush {
			return err
		}
		return dev.Flush()
	}, expect{Idle, 0, r.ID, [32]byte{}, nil}, flush}
}

func record1() *Record {
	return &Record{ID: seq16(1), Blocks: slices.Concat(chain(512, "a0", "a1"), chain(1024, "b0", "b1"), chain(512, "a1", "a2")), Alloc: []Run{{7, 9}}}
}

func record2() *Record {
	return &Record{ID: seq16(2), Blocks: chain(2048, "c0", "c1"), Free: []Run{{7, 9}}, Note: []byte("second")}
}

// scenario passes through every kind of operation, and ends with a record over one whose Done nobody flushed.
func scenario() []step {
	r1, r2 := record1(), record2()
	return []step{prepareStep(r1), advanceStep(r1, 0), advanceStep(r1, 1), advanceStep(r1, 2), doneStep(r1, false), prepareStep(r2), doneStep(r2, true)}
}

// explorer visits the images that a power cut can leave.
type explorer struct {
	sector  int
	binding Binding
	tears   bool
	states  int
	bad     []string
	// visit, if set, is called for each image without torn sectors that was judged good.
	visit func(image []byte)
}

// run performs steps on image and explores the cuts of all of it. before is what the image holds.
func (x *explorer) run(image []byte, before expect, steps []step, dev *recorder) error {
	dev.Mem = blockdev.NewMem(bytes.Clone(image), x.sector)
	l, err := Open(dev, x.sector, x.binding)
	if err != nil {
		return err
	}
	for i, s := range steps {
		dev.op = i
		if err := s.do(l, dev); err != nil {
			return err
		}
	}
	stable := bytes.Clone(image)
	allowed := []expect{before}
	var open []event // sectors written since the last flush
	for j, e := range dev.events {
		s := steps[e.op]
		last := j+1 == len(dev.events) || dev.events[j+1].op != e.op
		if !slices.ContainsFunc(allowed, func(a expect) bool { return reflect.DeepEqual(a, s.want) }) {
			allowed = append(allowed, s.want)
		}
		if e.data == nil {
			for _, w := range open {
				copy(stable[w.off:], w.data)
			}
			open = nil
		} else {
			if e.off != SlotA && e.off != SlotB && e.off < PayloadOffset || len(e.data)%x.sector != 0 || e.off < PayloadOffset && len(e.data) != x.sector {
				return fmt.Errorf("write of %d bytes at 0x%x", len(e.data), e.off)
			}
			for at := 0; at < len(e.data); at += x.sector {
				open = append(open, event{e.off + int64(at), e.data[at : at+x.sector], e.op})
			}
		}
		if last && s.durable {
			allowed = []expect{s.want}
		}
		x.cut(stable, open, allowed, fmt.Sprintf("step %d event %d", e.op, j))
	}
	return nil
}

// cut judges every subset of the sectors in open, and with each, every way in which one of them can be damaged.
func (x *explorer) cut(stable []byte, open []event, allowed []expect, where string) {
	for subset := range 1 << len(open) {
		image := bytes.Clone(stable)
		for i, w := range open {
			if subset>>i&1 == 1 {
				copy(image[w.off:], w.data)
			}
		}
		if x.judge(blockdev.NewMem(image, x.sector), allowed, fmt.Sprintf("%s subset %b", where, subset)) && x.visit != nil {
			x.visit(image)
		}
		if !x.tears {
			continue
		}
		for i, w := range open {
			if subset>>i&1 == 0 {
				continue
			}
			place := image[w.off : w.off+int64(x.sector)]
			old := stable[w.off : w.off+int64(x.sector)]
			whole := bytes.Clone(place)
			at := fmt.Sprintf("%s subset %b sector 0x%x", where, subset, w.off)
			// Beyond the header the images are the same: more steps add nothing.
			for step := 8; step < min(x.sector, HeaderSize+8); step += 8 {
				copy(place, w.data[:step])
				copy(place[step:], old[step:])
				x.judge(blockdev.NewMem(image, x.sector), allowed, fmt.Sprintf("%s first %d bytes new", at, step))
				copy(place, old[:step])
				copy(place[step:], w.data[step:])
				x.judge(blockdev.NewMem(image, x.sector), allowed, fmt.Sprintf("%s first %d bytes old", at, step))
			}
			rng := rand.New(rand.NewPCG(uint64(subset), uint64(i)))
			for k := range place {
				if rng.Uint32()&1 == 0 {
					place[k] = old[k]
				} else {
					place[k] = w.data[k]
				}
			}
			x.judge(blockdev.NewMem(image, x.sector), allowed, at+" mixed")
			for k := range place {
				place[k] = byte(rng.Uint32())
			}
			x.judge(blockdev.NewMem(image, x.sector), allowed, at+" random")
			clear(place)
			x.judge(blockdev.NewMem(image, x.sector), allowed, at+" zero")
			copy(place, whole)
			x.judge(&badSector{blockdev.NewMem(image, x.sector), w.off}, allowed, at+" unreadable")
		}
	}
}

// judge opens an image and demands one of the allowed states with its record.
func (x *explorer) judge(dev blockdev.Device, allowed []expect, where string) bool {
	x.states++
	fail := func(format string, args ...any) bool {
		x.bad = append(x.bad, where+": "+fmt.Sprintf(format, args...))
		return false
	}
	l, err := Open(dev, x.sector, x.binding)
	if err != nil {
		return fail("%v", err)
	}
	rec, err := l.Pending()
	if err != nil {
		return fail("%v", err)
	}
	st := l.Status()
	got := expect{st.State, st.Index, st.ID, st.Digest, rec}
	for _, a := range allowed {
		if reflect.DeepEqual(a, got) {
			return true
		}
	}
	return fail("%v of %x at %d is neither old nor new", st.State, st.ID, st.Index)
}

func newFile(t testing.TB, sector int) []byte {
	t.Helper()
	file, err := Format(MinSize, sector, Binding{1}, []Run{{2, 3}})
	if err != nil {
		t.Fatal(err)
	}
	return file
}

var fresh = expect{state: Idle}

func TestCrashStates(t *testing.T) {
	for _, sector := range []int{512, 4096} {
		x := &explorer{sector: sector, binding: Binding{1}, tears: true}
		if err := x.run(newFile(t, sector), fresh, scenario(), &recorder{dropFlush: -1}); err != nil {
			t.Fatal(err)
		}
		if len(x.bad) > 0 {
			t.Errorf("sector %d: %d of %d states are bad, the first: %s", sector, len(x.bad), x.states, x.bad[0])
		}
		if x.states < 1000 {
			t.Errorf("only %d states", x.states)
		}
		t.Logf("sector %d: %d states", sector, x.states)
	}
}

// TestCrashTwice cuts, recovers as a caller does who gives up the record, goes on with the next one, and cuts again.
func TestCrashTwice(t *testing.T) {
	first := &explorer{sector: 512, binding: Binding{1}}
	second := &explorer{sector: 512, binding: Binding{1}}
	r2 := record2()
	seen := map[string]bool{}
	first.visit = func(image []byte) {
		if seen[string(image)] {
			return
		}
		seen[string(image)] = true
		l, err := Open(blockdev.NewMem(image, 512), 512, Binding{1})
		if err != nil {
			t.Fatal(err)
		}
		st := l.Status()
		before := expect{state: st.State, index: st.Index, id: st.ID, digest: st.Digest}
		before.rec, _ = l.Pending()
		idle := step{doneStep(&Record{ID: st.ID}, false).do, expect{state: Idle, id: st.ID}, false}
		steps := []step{idle, prepareStep(r2), advanceStep(r2, 0), doneStep(r2, true)}
		if err := second.run(image, before, steps, &recorder{dropFlush: -1}); err != nil {
			t.Fatal(err)
		}
	}
	if err := first.run(newFile(t, 512), fresh, scenario(), &recorder{dropFlush: -1}); err != nil {
		t.Fatal(err)
	}
	if bad := append(first.bad, second.bad...); len(bad) > 0 {
		t.Errorf("%d bad states, the first: %s", len(bad), bad[0])
	}
	t.Logf("%d first cuts, %d states after the second", len(seen), second.states)
}

// TestCrashControl: the same exploration finds fault with each barrier that is left out, and with a single slot.
func TestCrashControl(t *testing.T) {
	whole := &recorder{dropFlush: -1}
	if err := (&explorer{sector: 512, binding: Binding{1}}).run(newFile(t, 512), fresh, scenario(), whole); err != nil {
		t.Fatal(err)
	}
	// The very first flush guards against what was written before Open; here there was nothing.
	for drop := 1; drop < whole.flushes; drop++ {
		x := &explorer{sector: 512, binding: Binding{1}}
		if err := x.run(newFile(t, 512), fresh, scenario(), &recorder{dropFlush: drop}); err != nil {
			t.Fatal(err)
		}
		if len(x.bad) == 0 {
			t.Errorf("flush %d of %d is not missed", drop, whole.flushes)
		}
	}
	x := &explorer{sector: 512, binding: Binding{1}, tears: true}
	err := x.run(newFile(t, 512), fresh, scenario(), &recorder{dropFlush: -1, oneSlot: true})
	if err == nil && len(x.bad) == 0 {
		t.Error("a single slot is as good as two")
	}
}

// TestCrashUnflushedDoneBeforeOpen: a process that was killed after Done leaves the header in a cache that the next one
// reads. Its record must not overwrite the payload before that header is stable: what the first flush is for.
func TestCrashUnflushedDoneBeforeOpen(t *testing.T) {
	r1, r2 := record1(), record2()
	for _, drop := range []int{-1, 3} {
		// One scenario with an Open in the middle.
		var reopened *Log
		steps := []step{
			prepareStep(r1), doneStep(r1, false),
			{func(_ *Log, dev blockdev.Device) (err error) {
				if reopened, err = Open(dev, 512, Binding{1}); err != nil {
					return err
				}
				return reopened.Prepare(r2)
			}, prepareStep(r2).want, true},
		}
		x := &explorer{sector: 512, binding: Binding{1}}
		if err := x.run(newFile(t, 512), fresh, steps, &recorder{dropFlush: drop}); err != nil {
			t.Fatal(err)
		}
		if (len(x.bad) > 0) != (drop >= 0) {
			t.Errorf("with flush %d left out: %d bad states", drop, len(x.bad))
		}
	}
}

// faulty fails one operation, and notes what is done to it afterwards.
type faulty struct {
	*blockdev.Mem
	n, failAt int
	part      int // bytes of the failing write that reach the medium
	failed    bool
	after     int
}

func (d *faulty) next() bool {
	if d.failed {
		d.after++
	}
	d.n++
	d.failed = d.failed || d.n-1 == d.failAt
	return d.n-1 == d.failAt
}

func (d *faulty) WriteAt(p []byte, off int64) (int, error) {
	if d.next() {
		n, _ := d.Mem.WriteAt(p[:min(d.part, len(p))], off)
		return n, errMedium
	}
	return d.Mem.WriteAt(p, off)
}

func (d *faulty) Flush() error {
	if d.next() {
		return errMedium
	}
	return nil
}

func TestFaults(t *testing.T) {
	for _, part := range []int{0, 8, 256, 1 << 20} {
		for k := 0; ; k++ {
			dev := &faulty{Mem: blockdev.NewMem(newFile(t, 512), 512), failAt: k, part: part}
			l, err := Open(dev, 512, Binding{1})
			if err != nil {
				t.Fatal(err)
			}
			steps := scenario()
			before, at := fresh, -1
			for i, s := range steps {
				if err = s.do(l, dev); err != nil {
					at = i
					break
				}
				before = s.want
			}
			if at < 0 {
				if k < 15 || dev.failed {
					t.Fatalf("operation %d was not reported", k)
				}
				break
			}
			if !errors.Is(err, errMedium) {
				t.Fatalf("operation %d: %v", k, err)
			}
			// Whoever goes on regardless writes nothing; the very last flush is the caller's own.
			if at < len(steps)-1 {
				for _, err := range []error{l.Prepare(record2()), l.Advance(0, [32]byte{}), l.Done()} {
					if !errors.Is(err, ErrFailed) || !errors.Is(err, errMedium) {
						t.Errorf("operation %d: afterwards %v", k, err)
					}
				}
			}
			if dev.after > 0 {
				t.Errorf("operation %d: %d operations after the failure", k, dev.after)
			}
			x := &explorer{sector: 512, binding: Binding{1}}
			if !x.judge(blockdev.NewMem(dev.Bytes(), 512), []expect{before, steps[at].want}, fmt.Sprintf("operation %d part %d", k, part)) {
				t.Error(x.bad[0])
			}
		}
	}
}
