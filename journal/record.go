package journal

import (
	"bytes"
	"cmp"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"math"
	"slices"
)

// Limits and offsets. These are part of the on-disk format.
const (
	// MaxBlocks is the number of blocks in a record; each costs a flush, so nobody wants more.
	MaxBlocks = 1024

	// MaxBlockSize is the size of an image in bytes; devices with larger physical sectors are not known.
	MaxBlockSize = 64 << 10

	// blockAlign is what offsets and sizes of blocks are multiples of: the smallest sector.
	blockAlign = 512

	payloadMagic   = "ESPMPAYL"
	payloadVersion = 1

	payMagic    = 0
	payVersion  = 8
	payLength   = 12
	payID       = 16
	payBlocks   = 32
	payAllocLen = 36
	payFreeLen  = 40
	payBaseLen  = 44
	payNoteLen  = 48
	payZero     = 52
	// payloadFixed is the length of the part before the first block.
	payloadFixed = 64

	blkOff     = 0
	blkSize    = 8
	blkPhase   = 12
	blkFlags   = 13
	blkZero    = 14
	blkOldSum  = 16
	blockFixed = 48

	flagOldImage = 1
)

// Block is one commit point: a single write that turns the old image of a place into the new one. The images of a
// record are written in order, each flushed before the next.
type Block struct {
	Off int64    // byte offset inside the volume, a multiple of 512
	Old [32]byte // SHA-256 of the old image
	New []byte   // new image; a multiple of 512 bytes, at most MaxBlockSize

	// OldImage is the old image itself, or nil. It is worth its space: with it a block that a cut tore in the middle is
	// recognised as ours without guessing, because each of its bytes is an old or a new one, and a damaged block of a
	// record that is only Prepared can go back to the image whose tree is whole under all circumstances.
	OldImage []byte

	Phase uint8 // for the caller
}

// Record is what a transaction is about to do. Runs are ascending, disjoint and not empty; those that touch come back
// from the journal as one.
type Record struct {
	ID     [16]byte
	Blocks []Block // at least one; where several have the same offset, each one's Old is the New of the one before

	Alloc []Run // units that the transaction takes; to be released if it is rolled back
	Free  []Run // units that it gives up; to be released when every block is new; none of them is in Alloc
	Base  []Run // units that it takes for granted, for the caller to check
	Note  []byte
}

// Size is the length of r in the journal in bytes, to be compared with Log.Capacity. It is meaningful for records that
// Prepare accepts.
func Size(r *Record) int {
	n := payloadFixed
	for i := range r.Blocks {
		n += blockFixed + len(r.Blocks[i].New) + len(r.Blocks[i].OldImage)
	}
	return n + runsLen(r.Alloc) + runsLen(r.Free) + runsLen(r.Base) + len(r.Note)
}

// check returns ErrRecord with the reason unless r keeps the rules of the format.
func (r *Record) check() error {
	if err := r.checkBlocks(); err != nil {
		return fmt.Errorf("%w: %w", ErrRecord, err)
	}
	for _, l := range []struct {
		name string
		runs []Run
	}{{"alloc", r.Alloc}, {"free", r.Free}, {"base", r.Base}} {
		if err := checkRuns(l.runs); err != nil {
			return fmt.Errorf("%w: %s runs: %w", ErrRecord, l.name, err)
		}
	}
	// A unit in both would be released whichever way recovery goes, and one of the two trees is using it.
	if u, ok := commonUnit(r.Alloc, r.Free); ok {
		return fmt.Errorf("%w: unit 0x%x is both taken and given up", ErrRecord, u)
	}
	return nil
}

func (r *Record) checkBlocks() error {
	if len(r.Blocks) == 0 {
		return errors.New("no blocks")
	}
	if len(r.Blocks) > MaxBlocks {
		return fmt.Errorf("%d blocks, expected at most %d", len(r.Blocks), MaxBlocks)
	}
	type place struct {
		size int
		sum  [32]byte // of the image that is there after the blocks so far
	}
	places := make(map[int64]place, len(r.Blocks))
	for i := range r.Blocks {
		b := &r.Blocks[i]
		size := len(b.New)
		if size == 0 || size > MaxBlockSize || size%blockAlign != 0 {
			return fmt.Errorf("block %d at offset 0x%x has a new image of 0x%x bytes", i, b.Off, size)
		}
		if b.Off < 0 || b.Off%blockAlign != 0 || b.Off > math.MaxInt64-int64(size) {
			return fmt.Errorf("block %d has the offset 0x%x", i, b.Off)
		}
		if b.OldImage != nil && (len(b.OldImage) != size || sha256.Sum256(b.OldImage) != b.Old) {
			return fmt.Errorf("block %d at offset 0x%x has an old image of 0x%x bytes that is not the one of its hash", i, b.Off, len(b.OldImage))
		}
		sum := sha256.Sum256(b.New)
		// Nobody could tell whether it was written.
		if sum == b.Old {
			return fmt.Errorf("block %d at offset 0x%x changes nothing", i, b.Off)
		}
		if p, ok := places[b.Off]; ok && (p.size != size || p.sum != b.Old) {
			return fmt.Errorf("block %d at offset 0x%x does not follow on from the block before it there", i, b.Off)
		}
		places[b.Off] = place{size, sum}
	}
	order := make([]int64, 0, len(places))
	for off := range places {
		order = append(order, off)
	}
	slices.SortFunc(order, cmp.Compare[int64])
	for i := 1; i < len(order); i++ {
		if order[i-1]+int64(places[order[i-1]].size) > order[i] {
			return fmt.Errorf("blocks at offsets 0x%x and 0x%x overlap", order[i-1], order[i])
		}
	}
	return nil
}

// encode returns r, which must have passed check, as Size(r) bytes followed by zeros up to a multiple of pad bytes.
func (r *Record) encode(pad int) []byte {
	size := Size(r)
	b := make([]byte, payloadFixed, (size+pad-1)/pad*pad)
	copy(b[payMagic:], payloadMagic)
	binary.LittleEndian.PutUint32(b[payVersion:], payloadVersion)
	binary.LittleEndian.PutUint32(b[payLength:], uint32(size))
	copy(b[payID:], r.ID[:])
	binary.LittleEndian.PutUint32(b[payBlocks:], uint32(len(r.Blocks)))
	binary.LittleEndian.PutUint32(b[payAllocLen:], uint32(runsLen(r.Alloc)))
	binary.LittleEndian.PutUint32(b[payFreeLen:], uint32(runsLen(r.Free)))
	binary.LittleEndian.PutUint32(b[payBaseLen:], uint32(runsLen(r.Base)))
	binary.LittleEndian.PutUint32(b[payNoteLen:], uint32(len(r.Note)))
	for i := range r.Blocks {
		blk := &r.Blocks[i]
		var f [blockFixed]byte
		binary.LittleEndian.PutUint64(f[blkOff:], uint64(blk.Off))
		binary.LittleEndian.PutUint32(f[blkSize:], uint32(len(blk.New)))
		f[blkPhase] = blk.Phase
		if blk.OldImage != nil {
			f[blkFlags] = flagOldImage
		}
		copy(f[blkOldSum:], blk.Old[:])
		b = append(b, f[:]...)
		b = append(b, blk.New...)
		b = append(b, blk.OldImage...)
	}
	b = appendRuns(b, r.Alloc)
	b = appendRuns(b, r.Free)
	b = appendRuns(b, r.Base)
	b = append(b, r.Note...)
	return b[:cap(b)]
}

// decodeRecord decodes all of b. It is safe on arbitrary bytes, and what it returns has passed check. Images and the
// note are parts of b. It returns ErrVersion for a newer version and ErrRecord for anything else that is wrong.
func decodeRecord(b []byte) (*Record, error) {
	bad := func(format string, args ...any) (*Record, error) {
		return nil, fmt.Errorf("%w: %w", ErrRecord, fmt.Errorf(format, args...))
	}
	if len(b) < payloadFixed || !bytes.Equal(b[payMagic:payVersion], []byte(payloadMagic)) {
		return bad("no payload magic number")
	}
	if v := binary.LittleEndian.Uint32(b[payVersion:]); v > payloadVersion {
		return nil, fmt.Errorf("%w: payload version %d, expected at most %d", ErrVersion, v, payloadVersion)
	} else if v != payloadVersion {
		return bad("payload version %d", v)
	}
	if n := binary.LittleEndian.Uint32(b[payLength:]); uint64(n) != uint64(len(b)) {
		return bad("length is 0x%x, expected 0x%x", n, len(b))
	}
	if !allZero(b[payZero:payloadFixed]) {
		return bad("reserved bytes are not zero")
	}
	r := &Record{}
	copy(r.ID[:], b[payID:])
	count := binary.LittleEndian.Uint32(b[payBlocks:])
	if count > MaxBlocks {
		return bad("%d blocks, expected at most %d", count, MaxBlocks)
	}
	rest := b[payloadFixed:]
	if uint64(count)*blockFixed > uint64(len(rest)) {
		return bad("%d blocks in 0x%x bytes", count, len(rest))
	}
	r.Blocks = make([]Block, count)
	for i := range r.Blocks {
		blk := &r.Blocks[i]
		if len(rest) < blockFixed {
			return bad("block %d begins past the end", i)
		}
		off, size := binary.LittleEndian.Uint64(rest[blkOff:]), binary.LittleEndian.Uint32(rest[blkSize:])
		if off > math.MaxInt64 {
			return bad("block %d has the offset 0x%x", i, off)
		}
		blk.Off, blk.Phase = int64(off), rest[blkPhase]
		flags := rest[blkFlags]
		if flags&^flagOldImage != 0 || rest[blkZero] != 0 || rest[blkZero+1] != 0 {
			return bad("block %d at offset 0x%x has unknown flags", i, off)
		}
		copy(blk.Old[:], rest[blkOldSum:])
		rest = rest[blockFixed:]
		images := 1
		if flags&flagOldImage != 0 {
			images = 2
		}
		if size > MaxBlockSize || int(size)*images > len(rest) {
			return bad("block %d at offset 0x%x has images of 0x%x bytes, past the end", i, off, size)
		}
		blk.New, rest = rest[:size:size], rest[size:]
		if images == 2 {
			blk.OldImage, rest = rest[:size:size], rest[size:]
		}
	}
	take := func(at int) ([]byte, bool) {
		n := binary.LittleEndian.Uint32(b[at:])
		if uint64(n) > uint64(len(rest)) {
			return nil, false
		}
		part := rest[:n:n]
		rest = rest[n:]
		return part, true
	}
	for _, l := range []struct {
		name string
		at   int
		runs *[]Run
	}{{"alloc", payAllocLen, &r.Alloc}, {"free", payFreeLen, &r.Free}, {"base", payBaseLen, &r.Base}} {
		part, ok := take(l.at)
		if !ok {
			return bad("%s runs go past the end", l.name)
		}
		var err error
		if *l.runs, err = decodeRuns(part); err != nil {
			return bad("%s runs: %w", l.name, err)
		}
	}
	note, ok := take(payNoteLen)
	if !ok {
		return bad("note goes past the end")
	}
	if len(rest) != 0 {
		return bad("0x%x bytes after the end", len(rest))
	}
	if len(note) > 0 {
		r.Note = note
	}
	if err := r.check(); err != nil {
		return nil, err
	}
	return r, nil
}
