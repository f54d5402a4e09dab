package journal

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"reflect"
	"testing"

	"espmirror/blockdev"
)

func open(t *testing.T, file []byte, sector int) *Log {
	t.Helper()
	l, err := Open(blockdev.NewMem(file, sector), sector, Binding{1})
	if err != nil {
		t.Fatal(err)
	}
	return l
}

func TestFormat(t *testing.T) {
	creation := []Run{{2, 1}, {9, 4}}
	file, err := Format(MinSize, 4096, Binding{7}, creation)
	if err != nil || len(file) != MinSize || !allZero(file[HeaderSize:]) {
		t.Fatalf("%d bytes, %v", len(file), err)
	}
	h, err := DecodeHeader(file)
	want := Header{Version: 1, State: Idle, Seq: 1, Binding: Binding{7}, Size: MinSize, Creation: creation}
	if err != nil || !reflect.DeepEqual(h, want) {
		t.Errorf("%+v, %v", h, err)
	}
	var many []Run
	for i := range uint32(MaxCreationRuns + 1) {
		many = append(many, Run{2 * i, 1})
	}
	if _, err := Format(MinSize, 512, Binding{}, many[1:]); err != nil {
		t.Errorf("%d runs: %v", MaxCreationRuns, err)
	}
	for name, c := range map[string]struct {
		size, sector int
		runs         []Run
		want         error
	}{
		"small":         {MinSize - 512, 512, nil, ErrGeometry},
		"negative":      {-1, 512, nil, ErrGeometry},
		"large":         {MaxSize + 512, 512, nil, ErrGeometry},
		"odd":           {MinSize + 512, 4096, nil, ErrGeometry},
		"sector 0":      {MinSize, 0, nil, ErrGeometry},
		"sector 256":    {MinSize, 256, nil, ErrGeometry},
		"sector 520":    {MinSize, 520, nil, ErrGeometry},
		"sector 8192":   {MinSize, 8192, nil, ErrGeometry},
		"too many runs": {MinSize, 512, many, ErrTooLarge},
		"bad runs":      {MinSize, 512, []Run{{5, 0}}, ErrRecord},
	} {
		if _, err := Format(c.size, c.sector, Binding{}, c.runs); !errors.Is(err, c.want) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestLifeCycle(t *testing.T) {
	file := newFile(t, 512)
	l := open(t, file, 512)
	if r, err := l.Pending(); r != nil || err != nil {
		t.Errorf("new: %v, %v", r, err)
	}
	if err := l.Done(); err != nil || l.Status().Seq != 1 {
		t.Errorf("done when idle: %v, %+v", err, l.Status())
	}
	if err := l.Advance(0, [32]byte{}); !errors.Is(err, ErrIdle) {
		t.Errorf("advance when idle: %v", err)
	}
	r := record1()
	if err := l.Prepare(r); err != nil {
		t.Fatal(err)
	}
	before := bytes.Clone(file)
	for name, err := range map[string]error{
		"second":      l.Prepare(record2()),
		"past blocks": l.Advance(3, [32]byte{}),
		"negative":    l.Advance(-1, [32]byte{}),
	} {
		want := ErrRecord
		if name == "second" {
			want = ErrPending
		}
		if !errors.Is(err, want) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if !bytes.Equal(file, before) {
		t.Error("a refused call wrote")
	}
	if err := l.Advance(1, seq32(9)); err != nil {
		t.Fatal(err)
	}
	seq := l.Status().Seq
	if err := l.Advance(1, seq32(9)); err != nil || l.Status().Seq != seq {
		t.Errorf("the same again: %v, %+v", err, l.Status())
	}
	if err := l.Advance(0, seq32(9)); !errors.Is(err, ErrRecord) {
		t.Errorf("backwards: %v", err)
	}
	again := open(t, file, 512)
	want := Status{State: Committing, Index: 1, Blocks: 3, Seq: 3, ID: r.ID, Digest: seq32(9)}
	if again.Status() != want || l.Status() != want {
		t.Errorf("reopened: %+v", again.Status())
	}
	if got, err := again.Pending(); err != nil || !reflect.DeepEqual(got, r) {
		t.Errorf("reopened: %+v, %v", got, err)
	}
	if err := again.Done(); err != nil {
		t.Fatal(err)
	}
	if st := open(t, file, 512).Status(); st != (Status{State: Idle, Seq: 4, ID: r.ID}) {
		t.Errorf("done: %+v", st)
	}
	// The creation runs outlive everything.
	for _, slot := range []int{SlotA, SlotB} {
		if h, err := DecodeHeader(file[slot:]); err != nil || !reflect.DeepEqual(h.Creation, []Run{{2, 3}}) {
			t.Errorf("slot 0x%x: %+v, %v", slot, h, err)
		}
	}
}

func TestTooLarge(t *testing.T) {
	file := newFile(t, 512)
	l := open(t, file, 512)
	r := record1()
	r.Note = make([]byte, l.Capacity()-Size(r)+1)
	before := bytes.Clone(file)
	if err := l.Prepare(r); !errors.Is(err, ErrTooLarge) {
		t.Errorf("one byte too many: %v", err)
	}
	if err := l.Prepare(&Record{}); !errors.Is(err, ErrRecord) {
		t.Errorf("empty: %v", err)
	}
	if !bytes.Equal(file, before) {
		t.Error("a refused record wrote")
	}
	r.Note = r.Note[1:]
	if err := l.Prepare(r); err != nil || Size(r) != l.Capacity() {
		t.Errorf("%d bytes of %d: %v", Size(r), l.Capacity(), err)
	}
	if got, err := open(t, file, 512).Pending(); err != nil || !reflect.DeepEqual(got, r) {
		t.Errorf("%v", err)
	}
}

// TestSectorSizes: a header is one write of the larger of the two sector sizes.
func TestSectorSizes(t *testing.T) {
	for _, c := range [][3]int{{512, 512, 512}, {512, 4096, 4096}, {4096, 512, 4096}, {2048, 1024, 2048}} {
		dev := &recorder{Mem: blockdev.NewMem(newFile(t, c[1]), c[0]), dropFlush: -1}
		l, err := Open(dev, c[1], Binding{1})
		if err != nil {
			t.Fatal(err)
		}
		if err := l.Prepare(record2()); err != nil {
			t.Fatal(err)
		}
		if e := dev.events; len(e) != 5 || e[0].data != nil || e[2].data != nil || e[4].data != nil ||
			e[1].off != PayloadOffset || len(e[1].data)%c[2] != 0 || e[3].off != SlotB || len(e[3].data) != c[2] {
			t.Errorf("%v: %d events", c, len(e))
		}
	}
}

func TestOpenRefused(t *testing.T) {
	withSlots := func(a, b func() Header) []byte {
		file := make([]byte, MinSize)
		for off, f := range map[int]func() Header{SlotA: a, SlotB: b} {
			if f != nil {
				h := f()
				h.encode(file[off:])
			}
		}
		return file
	}
	idle := func(seq uint64, b byte) func() Header {
		return func() Header { return Header{State: Idle, Seq: seq, Binding: Binding{b}, Size: MinSize} }
	}
	newer := func(file []byte, slot int) []byte {
		file[slot+hdrVersion] = 2
		reseal(file[slot : slot+512])
		return file
	}
	damage := func(file []byte, slot int) []byte { file[slot+100] ^= 1; return file }
	for name, c := range map[string]struct {
		file []byte
		want error
	}{
		"nothing":                {make([]byte, MinSize), ErrAbsent},
		"foreign":                {bytes.Repeat([]byte("data"), MinSize/4), ErrAbsent},
		"damaged, nothing":       {damage(withSlots(idle(1, 1), nil), SlotA), ErrInvalid},
		"nothing, damaged":       {damage(withSlots(nil, idle(1, 1)), SlotB), ErrInvalid},
		"both damaged":           {damage(damage(withSlots(idle(1, 1), idle(2, 1)), SlotA), SlotB), ErrInvalid},
		"same sequence":          {withSlots(idle(3, 1), idle(3, 1)), ErrInvalid},
		"newer version":          {newer(withSlots(idle(2, 1), idle(1, 1)), SlotA), ErrVersion},
		"newer version, older":   {newer(withSlots(idle(2, 1), idle(1, 1)), SlotB), ErrVersion},
		"newer version, damaged": {newer(damage(withSlots(idle(2, 1), idle(1, 1)), SlotB), SlotA), ErrVersion},
		"other volume":           {withSlots(idle(1, 2), nil), ErrBinding},
		"other volume won":       {withSlots(idle(1, 1), idle(2, 2)), ErrBinding},
		"other size":             {append(withSlots(idle(1, 1), nil), make([]byte, 512)...), ErrBinding},
		"too small":              {make([]byte, 512), ErrGeometry},
	} {
		_, err := Open(blockdev.NewMem(c.file, 512), 512, Binding{1})
		if !errors.Is(err, c.want) || (c.want == ErrInvalid && errors.Is(err, ErrAbsent)) {
			t.Errorf("%s: %v", name, err)
		}
		if c.want == ErrGeometry {
			continue
		}
		// Whatever it is, Reinit makes it a journal in which nothing of before is left to win.
		l, err := Reinit(blockdev.NewMem(c.file, 512), 512, Binding{1})
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		if st := open(t, c.file, 512).Status(); st.State != Idle || st != l.Status() || st.Damaged {
			t.Errorf("%s: reset to %+v, then %+v", name, l.Status(), st)
		}
		for _, slot := range []int{SlotA, SlotB} {
			if !open(t, damage(bytes.Clone(c.file), slot), 512).Status().Damaged {
				t.Errorf("%s: damage at 0x%x is not reported", name, slot)
			}
		}
		if err := l.Prepare(record2()); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
	// Reinit of a copy: the place is the same, so the creation runs are.
	file := newFile(t, 512)
	l, err := Reinit(blockdev.NewMem(file, 512), 512, Binding{2})
	if err != nil || l.Status().Seq != 3 {
		t.Errorf("%v, %+v", err, l.Status())
	}
	for _, slot := range []int{SlotA, SlotB} {
		if h, err := DecodeHeader(file[slot:]); err != nil || h.Binding != (Binding{2}) || len(h.Creation) != 1 {
			t.Errorf("slot 0x%x: %+v, %v", slot, h, err)
		}
	}
}

// TestReinitCut: at every cut the file opens, or is refused as before, and a second Reinit succeeds.
func TestReinitCut(t *testing.T) {
	file := newFile(t, 512)
	if err := open(t, file, 512).Prepare(record1()); err != nil {
		t.Fatal(err)
	}
	for k := range 4 {
		for _, part := range []int{0, 8, 200, 512} {
			dev := &faulty{Mem: blockdev.NewMem(bytes.Clone(file), 512), failAt: k, part: part}
			if _, err := Reinit(dev, 512, Binding{2}); !errors.Is(err, errMedium) {
				t.Fatalf("operation %d: %v", k, err)
			}
			mem := blockdev.NewMem(dev.Bytes(), 512)
			l, err := Open(mem, 512, Binding{2})
			if err == nil && l.Status().State != Idle || err != nil && !errors.Is(err, ErrBinding) {
				t.Errorf("operation %d part %d: %v", k, part, err)
			}
			if _, err := Reinit(mem, 512, Binding{2}); err != nil {
				t.Errorf("operation %d part %d: %v", k, part, err)
			}
		}
	}
}

func TestPendingDamaged(t *testing.T) {
	file := newFile(t, 512)
	r := record1()
	if err := open(t, file, 512).Prepare(r); err != nil {
		t.Fatal(err)
	}
	for i := range Size(r) {
		file[PayloadOffset+i] ^= 0x10
		if _, err := open(t, file, 512).Pending(); !errors.Is(err, ErrPayload) {
			t.Fatalf("byte %d: %v", i, err)
		}
		file[PayloadOffset+i] ^= 0x10
	}
	l, err := Open(&badSector{blockdev.NewMem(file, 512), PayloadOffset + 512}, 512, Binding{1})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := l.Pending(); !errors.Is(err, ErrPayload) || !errors.Is(err, errMedium) {
		t.Errorf("unreadable: %v", err)
	}
	if err := l.Done(); err != nil {
		t.Errorf("abandoning it: %v", err)
	}
	// A header that names another transaction's payload by the right hash.
	h := open(t, file, 512).head
	h.State, h.Blocks, h.payloadLen = Prepared, 3, uint32(Size(r))
	h.payloadSum = sha256.Sum256(file[PayloadOffset : PayloadOffset+Size(r)])
	h.ID, h.Seq = seq16(99), h.Seq+1
	h.encode(file[SlotB:])
	if _, err := open(t, file, 512).Pending(); !errors.Is(err, ErrPayload) {
		t.Errorf("other transaction: %v", err)
	}
}

// TestSequenceEnds: no write is made that could wrap the sequence.
func TestSequenceEnds(t *testing.T) {
	file := make([]byte, MinSize)
	h := Header{State: Idle, Seq: maxSequence, Binding: Binding{1}, Size: MinSize}
	h.encode(file)
	l := open(t, file, 512)
	if err := l.Prepare(record1()); !errors.Is(err, ErrTooLarge) || !allZero(file[PayloadOffset:]) {
		t.Errorf("%v, %+v", err, l.Status())
	}
	if l, err := Reinit(blockdev.NewMem(file, 512), 512, Binding{1}); err != nil || l.Status().Seq > 2 {
		t.Errorf("reset: %v", err)
	}
}
