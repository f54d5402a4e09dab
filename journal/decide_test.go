package journal

import (
	"bytes"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
)

// volume is what the places of a record hold; an image of nil cannot be read.
type volume map[int64][]byte

func (v volume) read(off int64, n int) ([]byte, error) {
	b, ok := v[off]
	if !ok || len(b) != n {
		return nil, fmt.Errorf("unexpected read of %d bytes at 0x%x: %w", n, off, errMedium)
	}
	return b, nil
}

// vol returns the volume that holds the named images side by side, from offset 0 on.
func vol(names ...string) volume {
	v := volume{}
	for i, n := range names {
		if n != "unreadable" {
			v[int64(i)*512] = img(n)
		}
	}
	return v
}

func prepared(r *Record) Status { return Status{State: Prepared, Blocks: len(r.Blocks), ID: r.ID} }

func committing(r *Record, i int) Status {
	return Status{State: Committing, Index: i, Blocks: len(r.Blocks), ID: r.ID}
}

func TestDecide(t *testing.T) {
	one := &Record{ID: seq16(1), Blocks: chain(0, "a0", "a1")}
	oneOld := &Record{ID: seq16(1), Blocks: chain(0, "a0", "a1")}
	oneOld.Blocks[0].OldImage = img("a0")
	three := &Record{ID: seq16(3), Blocks: slices.Concat(chain(0, "a0", "a1"), chain(512, "b0", "b1"), chain(1024, "c0", "c1"))}
	union := &Record{ID: seq16(4), Blocks: slices.Concat(chain(0, "a0", "a1"), chain(512, "b0", "b1"), chain(0, "a1", "a2"))}
	back := &Record{ID: seq16(5), Blocks: slices.Concat(chain(0, "a0", "a1"), chain(512, "b0", "b1"), chain(0, "a1", "a0"), chain(512, "b1", "b0"))}

	torn := slices.Concat(img("a1")[:200], img("a0")[200:])
	tornUnion := slices.Concat(img("a1")[:64], img("a2")[64:])
	garbage := bytes.Repeat([]byte{0xa5}, 512)
	nothing := func(b []byte) bool { return false } // is plausible
	noGarbage := func(b []byte) bool { return !bytes.Equal(b, garbage) }
	with := func(v volume, off int64, b []byte) volume { v[off] = b; return v }

	for _, c := range []struct {
		name      string
		r         *Record
		st        Status
		v         volume
		plausible func([]byte) bool
		want      Action
		from      int
		damaged   bool
		reason    string
	}{
		{"idle", one, Status{State: Idle}, nil, nil, Nothing, 0, false, ""},
		{"idle without record", nil, Status{State: Idle}, nil, nil, Nothing, 0, false, ""},
		{"lost record", nil, prepared(one), nil, nil, Stale, 0, false, "lost"},

		{"one, old", one, prepared(one), vol("a0"), nil, RollBack, 0, false, ""},
		{"one, new", one, prepared(one), vol("a1"), nil, Finish, 1, false, ""},
		{"one, foreign", one, prepared(one), vol("x"), nil, Stale, 0, false, "0x0 holds neither"},
		{"one, foreign but plausible", one, prepared(one), vol("x"), noGarbage, Stale, 0, false, "0x0 holds neither"},
		{"one, committing, old", one, committing(one, 0), vol("a0"), nil, RollBack, 0, false, ""},
		{"one, garbage, nobody to tell", one, prepared(one), with(vol(), 0, garbage), nil, Stale, 0, false, "0x0"},
		{"one, garbage", one, prepared(one), with(vol(), 0, garbage), noGarbage, RollForward, 0, true, "garbage"},
		{"one, unreadable", one, prepared(one), vol("unreadable"), nil, RollForward, 0, true, "cannot read block at offset 0x0"},
		{"one, short read", one, prepared(one), with(vol(), 0, garbage[:100]), nil, RollForward, 0, true, "cannot read"},
		{"one, torn, old unknown", one, prepared(one), with(vol(), 0, torn), nil, Stale, 0, false, "0x0"},
		{"one, torn", oneOld, prepared(oneOld), with(vol(), 0, torn), nil, RollBack, 0, true, "torn"},
		{"one, torn, committing", oneOld, committing(oneOld, 0), with(vol(), 0, torn), nil, RollForward, 0, true, "torn"},
		{"one, unreadable, old known", oneOld, prepared(oneOld), vol("unreadable"), nil, RollBack, 0, true, "cannot read"},
		{"one, foreign, old known", oneOld, prepared(oneOld), vol("x"), nil, Stale, 0, false, "0x0"},

		{"three, none", three, prepared(three), vol("a0", "b0", "c0"), nil, RollBack, 0, false, ""},
		{"three, one", three, committing(three, 1), vol("a1", "b0", "c0"), nil, RollForward, 1, false, ""},
		{"three, two", three, committing(three, 1), vol("a1", "b1", "c0"), nil, RollForward, 2, false, ""},
		{"three, all", three, committing(three, 2), vol("a1", "b1", "c1"), nil, Finish, 3, false, ""},
		{"three, state a step behind", three, committing(three, 0), vol("a1", "b1", "c0"), nil, RollForward, 2, false, ""},
		{"three, prepared is a step behind", three, prepared(three), vol("a1", "b0", "c0"), nil, RollForward, 1, false, ""},
		{"three, gap", three, committing(three, 1), vol("a0", "b1", "c0"), nil, Stale, 0, false, "0x200"},
		{"three, last only", three, committing(three, 1), vol("a0", "b0", "c1"), nil, Stale, 0, false, "0x400"},
		{"three, foreign in flight", three, committing(three, 1), vol("a1", "x", "c0"), nil, Stale, 0, false, "0x200 holds neither"},
		{"three, in flight unreadable", three, committing(three, 1), vol("a1", "unreadable", "c0"), nil, RollForward, 1, true, "0x200"},
		{"three, first unreadable when prepared", three, prepared(three), vol("unreadable", "b0", "c0"), nil, Stale, 0, false, "no block was being written"},
		{"three, other unreadable", three, committing(three, 1), vol("a1", "b0", "unreadable"), nil, Stale, 0, false, "0x400"},
		{"three, earlier unreadable", three, committing(three, 1), vol("unreadable", "b0", "c0"), nil, Stale, 0, false, "0x0"},
		{"three, two unreadable", three, committing(three, 1), vol("a1", "unreadable", "unreadable"), nil, Stale, 0, false, "0x400"},
		{"three, unreadable and foreign", three, committing(three, 1), vol("x", "unreadable", "c0"), nil, Stale, 0, false, "0x0"},
		{"three, unreadable and too far", three, committing(three, 1), vol("a1", "unreadable", "c1"), nil, Stale, 0, false, "0x400"},
		{"three, unreadable and too old", three, committing(three, 1), vol("a0", "unreadable", "c0"), nil, Stale, 0, false, "0x0"},
		{"three, garbage in flight", three, committing(three, 2), with(vol("a1", "b1"), 1024, garbage), noGarbage, RollForward, 2, true, "0x400"},

		{"union, none", union, prepared(union), vol("a0", "b0"), nil, RollBack, 0, false, ""},
		{"union, one", union, committing(union, 0), vol("a1", "b0"), nil, RollForward, 1, false, ""},
		{"union, two", union, committing(union, 1), vol("a1", "b1"), nil, RollForward, 2, false, ""},
		{"union, all", union, committing(union, 2), vol("a2", "b1"), nil, Finish, 3, false, ""},
		{"union, skipped", union, committing(union, 2), vol("a2", "b0"), nil, Stale, 0, false, "0x200"},
		{"union, not begun", union, committing(union, 2), vol("a0", "b1"), nil, Stale, 0, false, "0x200"},
		{"union, garbage like the first image", union, committing(union, 2), vol("a0", "b1"), nothing, RollForward, 2, true, "older image"},
		{"union, garbage like the first image, begun", union, committing(union, 1), vol("a0", "b1"), nothing, Stale, 0, false, "0x200"},
		{"union, last torn", union, committing(union, 2), with(vol("", "b1"), 0, tornUnion), nil, RollForward, 2, true, "torn"},
		{"union, last torn too early", union, committing(union, 0), with(vol("", "b1"), 0, tornUnion), nil, Stale, 0, false, "0x200"},
		{"union, last torn, other old", union, committing(union, 2), with(vol("", "b0"), 0, tornUnion), nil, Stale, 0, false, "0x200"},

		{"back, begun or done, prepared", back, prepared(back), vol("a0", "b0"), nil, RollBack, 0, false, ""},
		{"back, begun or done, first", back, committing(back, 0), vol("a0", "b0"), nil, RollBack, 0, false, ""},
		{"back, begun or done, last", back, committing(back, 3), vol("a0", "b0"), nil, Finish, 4, false, ""},
		{"back, begun or done, in between", back, committing(back, 1), vol("a0", "b0"), nil, Stale, 0, false, "0x0"},
		{"back, one", back, committing(back, 0), vol("a1", "b0"), nil, RollForward, 1, false, ""},
		{"back, two", back, committing(back, 2), vol("a1", "b1"), nil, RollForward, 2, false, ""},
		{"back, three", back, committing(back, 2), vol("a0", "b1"), nil, RollForward, 3, false, ""},
	} {
		d, err := Decide(c.r, c.st, c.v.read, c.plausible)
		if err != nil {
			t.Errorf("%s: %v", c.name, err)
			continue
		}
		if d.Action != c.want || d.From != c.from || d.Damaged != c.damaged || !strings.Contains(d.Reason, c.reason) || (d.Reason == "") != (c.reason == "") {
			t.Errorf("%s: %v from %d, damaged %v, %q; expected %v from %d, damaged %v, %q",
				c.name, d.Action, d.From, d.Damaged, d.Reason, c.want, c.from, c.damaged, c.reason)
		}
	}
}

// TestDecideEveryState compares Decide with a simulation that writes block after block, for every assignment of images
// to places and every status.
func TestDecideEveryState(t *testing.T) {
	names := [][]string{{"a0", "a1", "a2", "x"}, {"b0", "b1", "b2", "x"}, {"c0", "c1", "x"}}
	steps := map[string]*Record{
		"distinct": {Blocks: slices.Concat(chain(0, "a0", "a1"), chain(512, "b0", "b1"), chain(1024, "c0", "c1"))},
		"twice":    {Blocks: slices.Concat(chain(0, "a0", "a1"), chain(512, "b0", "b1"), chain(1024, "c0", "c1"), chain(512, "b1", "b2"), chain(0, "a1", "a2"))},
		"in a row": {Blocks: slices.Concat(chain(0, "a0", "a1", "a2"), chain(512, "b0", "b1"), chain(1024, "c0", "c1"))},
		"back":     {Blocks: slices.Concat(chain(0, "a0", "a1"), chain(512, "b0", "b1"), chain(0, "a1", "a0"), chain(1024, "c0", "c1"), chain(0, "a0", "a2"))},
		"all back": {Blocks: slices.Concat(chain(0, "a0", "a1"), chain(512, "b0", "b1", "b0"), chain(0, "a1", "a0"), chain(1024, "c0", "c1", "c0"))},
	}
	count := map[Action]int{}
	for name, r := range steps {
		n := len(r.Blocks)
		for i := range 4 * 4 * 3 {
			v := vol(names[0][i%4], names[1][i/4%4], names[2][i/16])
			sim := vol("a0", "b0", "c0")
			var fits []int
			for p := 0; ; p++ {
				if bytes.Equal(sim[0], v[0]) && bytes.Equal(sim[512], v[512]) && bytes.Equal(sim[1024], v[1024]) {
					fits = append(fits, p)
				}
				if p == n {
					break
				}
				sim[r.Blocks[p].Off] = r.Blocks[p].New
			}
			for index := -1; index < n; index++ {
				st, lo, hi := prepared(r), 0, 0
				if index >= 0 {
					st, lo, hi = committing(r, index), index, index+1
				}
				want := Decision{Action: Stale}
				for _, p := range fits {
					if len(fits) > 1 && (p < lo || p > hi) {
						continue
					}
					want = Decision{Action: RollForward, From: p}
					if p == 0 {
						want.Action = RollBack
					} else if p == n {
						want.Action = Finish
					}
				}
				d, err := Decide(r, st, v.read, nil)
				if err != nil || d.Action != want.Action || d.From != want.From || d.Damaged {
					t.Fatalf("%s, %v at %d, images %d: %+v, %v, expected %+v", name, st.State, index, i, d, err, want)
				}
				count[d.Action]++
			}
		}
	}
	for _, a := range []Action{RollBack, RollForward, Finish, Stale} {
		if count[a] == 0 {
			t.Errorf("%v was never tried", a)
		}
	}
}

// TestDecideTorn: every tear of the block in flight, at 8-byte steps and in either direction, is made good.
func TestDecideTorn(t *testing.T) {
	r := &Record{Blocks: slices.Concat(chain(0, "a0", "a1"), chain(512, "b0", "b1"))}
	r.Blocks[0].OldImage, r.Blocks[1].OldImage = img("a0"), img("b0")
	for k := range r.Blocks {
		b := r.Blocks[k]
		for at := 8; at < 512; at += 8 {
			for _, torn := range [][]byte{slices.Concat(b.New[:at], b.OldImage[at:]), slices.Concat(b.OldImage[:at], b.New[at:])} {
				v := vol("a1", "b0")
				v[b.Off] = torn
				if d, err := Decide(r, committing(r, k), v.read, nil); err != nil || d.Action != RollForward || d.From != k || !d.Damaged {
					t.Fatalf("block %d torn at %d: %+v, %v", k, at, d, err)
				}
				if d, err := Decide(r, committing(r, 1-k), v.read, nil); err != nil || d.Action != Stale {
					t.Fatalf("block %d torn at %d, not in flight: %+v, %v", k, at, d, err)
				}
			}
		}
	}
}

func TestDecideRefused(t *testing.T) {
	r := record1()
	for name, st := range map[string]Status{
		"other transaction": {State: Prepared, Blocks: 3, ID: seq16(9)},
		"other length":      {State: Prepared, Blocks: 2, ID: r.ID},
		"index past end":    committing(r, 3),
		"negative index":    committing(r, -1),
		"no state":          {Blocks: 3, ID: r.ID},
	} {
		if d, err := Decide(r, st, volume{}.read, nil); !errors.Is(err, ErrRecord) {
			t.Errorf("%s: %+v, %v", name, d, err)
		}
	}
	if _, err := Decide(&Record{ID: r.ID}, Status{State: Prepared, ID: r.ID}, volume{}.read, nil); !errors.Is(err, ErrRecord) {
		t.Errorf("no blocks: %v", err)
	}
}
