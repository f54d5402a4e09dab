package journal

import (
	"encoding/binary"
	"errors"
	"fmt"
	"iter"
	"math/bits"
)

// Run is the units [First, First+Count). What a unit is, is the caller's business; for FAT volumes it is a cluster.
type Run struct{ First, Count uint32 }

// MaxUnits bounds unit numbers: every run ends at or below it. FAT32 has 28-bit entries. It is part of the on-disk
// format, as decoders refuse more.
const MaxUnits = 1 << 28

// Tags of the two forms of a list of runs. These are part of the on-disk format.
const (
	runsDeltas byte = 1
	runsBitmap byte = 2
)

// end returns the first unit after r.
func (r Run) end() uint64 { return uint64(r.First) + uint64(r.Count) }

// checkRuns returns an error that names the run unless runs are ascending, disjoint, not empty and within MaxUnits.
func checkRuns(runs []Run) error {
	var end uint64
	for i, r := range runs {
		switch {
		case r.Count == 0:
			return fmt.Errorf("run %d at unit 0x%x is empty", i, r.First)
		case uint64(r.First) < end:
			return fmt.Errorf("run %d at unit 0x%x begins before 0x%x, the end of the run before it", i, r.First, end)
		case r.end() > MaxUnits:
			return fmt.Errorf("run %d ends at unit 0x%x, past 0x%x", i, r.end(), MaxUnits)
		}
		end = r.end()
	}
	return nil
}

// merged yields runs with those that touch joined into one: the one form in which both encodings agree.
func merged(runs []Run) iter.Seq[Run] {
	return func(yield func(Run) bool) {
		if len(runs) == 0 {
			return
		}
		cur := runs[0]
		for _, r := range runs[1:] {
			if uint64(r.First) == cur.end() {
				cur.Count += r.Count
				continue
			}
			if !yield(cur) {
				return
			}
			cur = r
		}
		yield(cur)
	}
}

// commonUnit returns a unit that is in both a and b.
func commonUnit(a, b []Run) (uint32, bool) {
	for len(a) > 0 && len(b) > 0 {
		switch {
		case a[0].end() <= uint64(b[0].First):
			a = a[1:]
		case b[0].end() <= uint64(a[0].First):
			b = b[1:]
		default:
			return max(a[0].First, b[0].First), true
		}
	}
	return 0, false
}

// uvarintLen is the number of bytes of v as a uvarint.
func uvarintLen(v uint64) int { return (bits.Len64(v|1) + 6) / 7 }

// runsForms returns the length in bytes of both forms of runs, which must have passed checkRuns and not be empty, and
// the number of runs after merging.
func runsForms(runs []Run) (deltas, bitmap, count int) {
	var prev uint64
	for r := range merged(runs) {
		gap := uint64(r.First) - prev
		if count > 0 {
			gap--
		}
		deltas += uvarintLen(gap) + uvarintLen(uint64(r.Count)-1)
		prev = r.end()
		count++
	}
	deltas += 1 + uvarintLen(uint64(count))
	span := prev - uint64(runs[0].First)
	bitmap = 1 + uvarintLen(uint64(runs[0].First)) + uvarintLen(span) + int((span+7)/8)
	return deltas, bitmap, count
}

// runsLen is the length in bytes of runs as appendRuns writes them.
func runsLen(runs []Run) int {
	if len(runs) == 0 {
		return 0
	}
	deltas, bitmap, _ := runsForms(runs)
	return min(deltas, bitmap)
}

// appendRuns appends the shorter form of runs, which must have passed checkRuns, to b.
func appendRuns(b []byte, runs []Run) []byte {
	if len(runs) == 0 {
		return b
	}
	deltas, bitmap, count := runsForms(runs)
	if deltas <= bitmap {
		b = append(b, runsDeltas)
		b = binary.AppendUvarint(b, uint64(count))
		first, prev := true, uint64(0)
		for r := range merged(runs) {
			gap := uint64(r.First) - prev
			if !first {
				gap--
			}
			b = binary.AppendUvarint(b, gap)
			b = binary.AppendUvarint(b, uint64(r.Count)-1)
			first, prev = false, r.end()
		}
		return b
	}
	base := uint64(runs[0].First)
	span := runs[len(runs)-1].end() - base
	b = append(b, runsBitmap)
	b = binary.AppendUvarint(b, base)
	b = binary.AppendUvarint(b, span)
	at := len(b)
	b = append(b, make([]byte, (span+7)/8)...)
	for _, r := range runs {
		for u := uint64(r.First) - base; u < r.end()-base; u++ {
			b[at+int(u/8)] |= 1 << (u % 8)
		}
	}
	return b
}

var errUvarint = errors.New("bad uvarint")

// takeUvarint returns the uvarint at the start of b and what follows it. A longer form than necessary is refused, so
// that every value has one encoding.
func takeUvarint(b []byte) (v uint64, rest []byte, err error) {
	v, n := binary.Uvarint(b)
	if n <= 0 || n != uvarintLen(v) {
		return 0, nil, errUvarint
	}
	return v, b[n:], nil
}

// decodeRuns decodes all of b. It is safe on arbitrary bytes: what it allocates is at most 32 times len(b), after
// everything that decides the size has been checked.
func decodeRuns(b []byte) ([]Run, error) {
	if len(b) == 0 {
		return nil, nil
	}
	switch tag := b[0]; tag {
	case runsDeltas:
		return decodeDeltas(b[1:])
	case runsBitmap:
		return decodeBitmap(b[1:])
	default:
		return nil, fmt.Errorf("unknown form 0x%02x of runs", tag)
	}
}

func decodeDeltas(b []byte) ([]Run, error) {
	count, b, err := takeUvarint(b)
	if err != nil {
		return nil, err
	}
	// Two bytes a run at the least: the bytes that are there bound the allocation, not the number that they claim.
	if count == 0 || count > uint64(len(b)/2) {
		return nil, fmt.Errorf("%d runs in %d bytes", count, len(b))
	}
	runs := make([]Run, 0, count)
	var end uint64
	for i := range count {
		var gap, length uint64
		if gap, b, err = takeUvarint(b); err != nil {
			return nil, err
		}
		if length, b, err = takeUvarint(b); err != nil {
			return nil, err
		}
		// Each is bounded alone first, so that the sums cannot wrap.
		if gap > MaxUnits || length > MaxUnits {
			return nil, fmt.Errorf("run %d goes past unit 0x%x", i, MaxUnits)
		}
		first := end + gap
		if i > 0 {
			first++
		}
		if end = first + length + 1; end > MaxUnits {
			return nil, fmt.Errorf("run %d ends at unit 0x%x, past 0x%x", i, end, MaxUnits)
		}
		runs = append(runs, Run{uint32(first), uint32(length + 1)})
	}
	if len(b) != 0 {
		return nil, fmt.Errorf("%d bytes after the last run", len(b))
	}
	return runs, nil
}

func decodeBitmap(b []byte) ([]Run, error) {
	base, b, err := takeUvarint(b)
	if err != nil {
		return nil, err
	}
	span, b, err := takeUvarint(b)
	if err != nil {
		return nil, err
	}
	if span == 0 || base > MaxUnits || span > MaxUnits-base {
		return nil, fmt.Errorf("bitmap of 0x%x units at unit 0x%x goes past 0x%x", span, base, MaxUnits)
	}
	if uint64(len(b)) != (span+7)/8 {
		return nil, fmt.Errorf("bitmap of 0x%x units in 0x%x bytes", span, len(b))
	}
	last := (span - 1) % 8
	if b[0]&1 == 0 || b[len(b)-1]>>last != 1 {
		return nil, errors.New("bitmap is not trimmed to its first and last unit")
	}
	// Runs are counted first: growing a slice to hundreds of thousands of them would take twice the memory.
	count, carry := 0, byte(0)
	for _, x := range b {
		count += bits.OnesCount8(x &^ (x<<1 | carry))
		carry = x >> 7
	}
	runs := make([]Run, 0, count)
	open, start := false, uint64(0)
	for i, x := range b {
		if (x == 0 && !open) || (x == 0xff && open) {
			continue
		}
		for j := range 8 {
			set, u := x>>j&1 == 1, uint64(i)*8+uint64(j)
			switch {
			case set && !open:
				open, start = true, u
			case !set && open:
				open = false
				runs = append(runs, Run{uint32(base + start), uint32(u - start)})
			}
		}
	}
	if open {
		runs = append(runs, Run{uint32(base + start), uint32(span - start)})
	}
	return runs, nil
}
