package journal

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"fmt"
)

// Places and limits. These are part of the on-disk format.
const (
	// SlotA and SlotB are the byte offsets of the header slots in the file, PayloadOffset that of the payload.
	SlotA         = 0
	SlotB         = 8192
	PayloadOffset = 16384

	// HeaderSize is the length of a header in bytes: the smallest sector, which any device writes as a whole.
	HeaderSize = 512

	// MinSize and MaxSize bound the size of the file in bytes. The upper one bounds what Pending reads into memory.
	MinSize = 32 << 10
	MaxSize = 64 << 20

	// MaxCreationRuns is the number of creation runs that fit a header.
	MaxCreationRuns = 16

	headerMagic   = "ESPMJRNL"
	headerVersion = 1

	// maxSequence ends the life of a journal long before the sequence could wrap and an old slot win; no honest journal
	// comes near, so a header beyond it is taken for damage.
	maxSequence = 1 << 62

	hdrMagic      = 0
	hdrVersion    = 8
	hdrState      = 12
	hdrSequence   = 16
	hdrIndex      = 24
	hdrBlocks     = 28
	hdrID         = 32
	hdrBinding    = 48
	hdrPayloadSum = 80
	hdrDigest     = 112
	hdrFileSize   = 144
	hdrPayloadLen = 152
	hdrRunCount   = 156
	hdrRuns       = 160
	hdrZero       = hdrRuns + 8*MaxCreationRuns
	hdrSum        = HeaderSize - sha256.Size
)

// State is how far the record came. Its values are part of the on-disk format; 0 is not one of them.
type State uint32

const (
	// Idle means that no record is pending: none was written yet, or the last one is done.
	Idle State = 1

	// Prepared means that the record is on stable storage. A record of several blocks has had none of them written; one
	// of a single block, which needs no Advance, may have.
	Prepared State = 2

	// Committing means that the blocks before the index are on stable storage, and the one at the index may be in flight.
	Committing State = 3
)

// String returns the state in lower case, for reports.
func (s State) String() string {
	switch s {
	case Idle:
		return "idle"
	case Prepared:
		return "prepared"
	case Committing:
		return "committing"
	}
	return fmt.Sprintf("state 0x%x", uint32(s))
}

// Binding says which volume, and which place on it, a journal is for: a SHA-256 that the caller computes.
type Binding [32]byte

// Header is a decoded header. Fields that its state gives no meaning are zero.
type Header struct {
	Version  uint32
	State    State
	Seq      uint64   // of two valid headers the one with the higher sequence counts
	Index    uint32   // block that may be in flight, when Committing
	Blocks   uint32   // number of blocks of the record, unless Idle
	ID       [16]byte // transaction; the last one when Idle, zero when there was none
	Binding  Binding
	Digest   [32]byte // of the new content, when Committing
	Size     int64    // of the journal file, in bytes
	Creation []Run    // units that creating the file allocated, itself included

	payloadLen uint32 // bytes
	payloadSum [32]byte
}

// encode writes h over the first HeaderSize bytes of b.
func (h *Header) encode(b []byte) {
	b = b[:HeaderSize]
	clear(b)
	copy(b[hdrMagic:], headerMagic)
	binary.LittleEndian.PutUint32(b[hdrVersion:], headerVersion)
	binary.LittleEndian.PutUint32(b[hdrState:], uint32(h.State))
	binary.LittleEndian.PutUint64(b[hdrSequence:], h.Seq)
	binary.LittleEndian.PutUint32(b[hdrIndex:], h.Index)
	binary.LittleEndian.PutUint32(b[hdrBlocks:], h.Blocks)
	copy(b[hdrID:], h.ID[:])
	copy(b[hdrBinding:], h.Binding[:])
	copy(b[hdrPayloadSum:], h.payloadSum[:])
	copy(b[hdrDigest:], h.Digest[:])
	binary.LittleEndian.PutUint64(b[hdrFileSize:], uint64(h.Size))
	binary.LittleEndian.PutUint32(b[hdrPayloadLen:], h.payloadLen)
	binary.LittleEndian.PutUint32(b[hdrRunCount:], uint32(len(h.Creation)))
	for i, r := range h.Creation {
		binary.LittleEndian.PutUint32(b[hdrRuns+8*i:], r.First)
		binary.LittleEndian.PutUint32(b[hdrRuns+8*i+4:], r.Count)
	}
	sum := sha256.Sum256(b[:hdrSum])
	copy(b[hdrSum:], sum[:])
}

// DecodeHeader decodes the header in the first HeaderSize bytes of b, those of a slot, or of a file or a cluster in lost
// space that may be a journal. It returns ErrAbsent when it is not a header, ErrInvalid when it is a damaged one, and
// ErrVersion, with Version and Seq set, when it is an intact one of a newer version.
func DecodeHeader(b []byte) (Header, error) {
	if len(b) < HeaderSize {
		return Header{}, fmt.Errorf("cannot decode journal header: %w: %d bytes, not %d", ErrInvalid, len(b), HeaderSize)
	}
	h, err := decodeHeader(b[:HeaderSize])
	if err != nil {
		return h, fmt.Errorf("cannot decode journal header: %w", err)
	}
	return h, nil
}

func decodeHeader(b []byte) (Header, error) {
	if string(b[hdrMagic:hdrMagic+len(headerMagic)]) != headerMagic {
		if allZero(b) {
			return Header{}, fmt.Errorf("%w: all zero", ErrAbsent)
		}
		return Header{}, ErrAbsent
	}
	// The checksum comes before the version, because its place is fixed for all versions: a flipped bit in the version
	// must read as damage, which the other slot can make good, and not as a format from the future, which it cannot.
	if sum := sha256.Sum256(b[:hdrSum]); !bytes.Equal(sum[:], b[hdrSum:]) {
		return Header{}, fmt.Errorf("%w: checksum is %x, expected %x", ErrInvalid, b[hdrSum:hdrSum+8], sum[:8])
	}
	h := Header{
		Version: binary.LittleEndian.Uint32(b[hdrVersion:]),
		Seq:     binary.LittleEndian.Uint64(b[hdrSequence:]),
	}
	if h.Version > headerVersion {
		return h, fmt.Errorf("%w: %d, expected at most %d", ErrVersion, h.Version, headerVersion)
	}
	h.State = State(binary.LittleEndian.Uint32(b[hdrState:]))
	h.Index = binary.LittleEndian.Uint32(b[hdrIndex:])
	h.Blocks = binary.LittleEndian.Uint32(b[hdrBlocks:])
	copy(h.ID[:], b[hdrID:])
	copy(h.Binding[:], b[hdrBinding:])
	copy(h.payloadSum[:], b[hdrPayloadSum:])
	copy(h.Digest[:], b[hdrDigest:])
	size := binary.LittleEndian.Uint64(b[hdrFileSize:])
	h.payloadLen = binary.LittleEndian.Uint32(b[hdrPayloadLen:])
	count := binary.LittleEndian.Uint32(b[hdrRunCount:])

	// The checksum proves that nothing was lost, not that an honest writer made it; everything is bounded here, so that
	// nothing later has to ask again.
	if size < MinSize || size > MaxSize {
		return Header{}, fmt.Errorf("%w: file size is 0x%x, expected 0x%x to 0x%x", ErrInvalid, size, MinSize, MaxSize)
	}
	h.Size = int64(size)
	if count > MaxCreationRuns {
		return Header{}, fmt.Errorf("%w: %d creation runs, expected at most %d", ErrInvalid, count, MaxCreationRuns)
	}
	if !allZero(b[hdrRuns+8*count : hdrSum]) {
		return Header{}, fmt.Errorf("%w: reserved bytes are not zero", ErrInvalid)
	}
	for i := range int(count) {
		h.Creation = append(h.Creation, Run{
			First: binary.LittleEndian.Uint32(b[hdrRuns+8*i:]),
			Count: binary.LittleEndian.Uint32(b[hdrRuns+8*i+4:]),
		})
	}
	if err := checkRuns(h.Creation); err != nil {
		return Header{}, fmt.Errorf("%w: creation runs: %w", ErrInvalid, err)
	}
	if err := h.check(); err != nil {
		return Header{}, fmt.Errorf("%w: %w", ErrInvalid, err)
	}
	return h, nil
}

// check returns an error unless the fields agree with the state.
func (h *Header) check() error {
	pending := h.State == Prepared || h.State == Committing
	switch {
	case h.Version != headerVersion:
		return fmt.Errorf("version %d", h.Version)
	case h.Seq == 0 || h.Seq > maxSequence:
		return fmt.Errorf("sequence 0x%x", h.Seq)
	case h.State != Idle && !pending:
		return fmt.Errorf("unknown %v", h.State)
	case !pending && (h.Blocks != 0 || h.payloadLen != 0 || h.payloadSum != [32]byte{}):
		return fmt.Errorf("%v, yet names a payload", h.State)
	case pending && (h.Blocks == 0 || h.Blocks > MaxBlocks || h.payloadLen < payloadFixed || int64(h.payloadLen) > h.Size-PayloadOffset):
		return fmt.Errorf("%v with %d blocks in 0x%x bytes of payload", h.State, h.Blocks, h.payloadLen)
	case h.State != Committing && (h.Index != 0 || h.Digest != [32]byte{}):
		return fmt.Errorf("%v, yet at block %d", h.State, h.Index)
	case h.State == Committing && h.Index >= h.Blocks:
		return fmt.Errorf("%v block %d of %d", h.State, h.Index, h.Blocks)
	}
	return nil
}

func allZero(b []byte) bool {
	for _, x := range b {
		if x != 0 {
			return false
		}
	}
	return true
}
