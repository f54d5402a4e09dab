package journal

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"math"
	"math/rand/v2"
	"reflect"
	"slices"
	"testing"
)

// img returns a 512-byte image that name alone determines.
func img(name string) []byte {
	var seed [32]byte
	copy(seed[:], name)
	b := make([]byte, 512)
	rand.NewChaCha8(seed).Read(b)
	return b
}

func sum(name string) [32]byte { return sha256.Sum256(img(name)) }

// chain returns blocks at off that lead through the named images.
func chain(off int64, names ...string) (blocks []Block) {
	for i := 1; i < len(names); i++ {
		blocks = append(blocks, Block{Off: off, Old: sum(names[i-1]), New: img(names[i])})
	}
	return blocks
}

func sampleRecord() *Record {
	r := &Record{
		ID:     seq16(0xa0),
		Blocks: slices.Concat(chain(0x4000, "a0", "a1"), chain(0x200, "b0", "b1", "b2")),
		Alloc:  []Run{{2, 8}, {100, 1}}, Free: []Run{{10, 90}}, Base: []Run{{2, 300}}, Note: []byte("kernel 6.12"),
	}
	r.Blocks[0].Phase = 3
	r.Blocks[1].OldImage = img("b0")
	return r
}

func TestRecordRoundTrip(t *testing.T) {
	r := sampleRecord()
	if err := r.check(); err != nil {
		t.Fatal(err)
	}
	b := r.encode(4096)
	if len(b)%4096 != 0 || !allZero(b[Size(r):]) {
		t.Errorf("%d bytes, not padded with zeros", len(b))
	}
	got, err := decodeRecord(b[:Size(r)])
	if err != nil || !reflect.DeepEqual(got, r) {
		t.Errorf("got %+v, %v", got, err)
	}
	if _, err := decodeRecord(b[:Size(r)+1]); !errors.Is(err, ErrRecord) {
		t.Errorf("with a trailing byte: %v", err)
	}
	for n := range Size(r) {
		if _, err := decodeRecord(b[:n]); !errors.Is(err, ErrRecord) {
			t.Fatalf("first %d bytes: %v", n, err)
		}
		// The length agrees now, the content still ends too early.
		short := bytes.Clone(b[:n])
		if n >= payloadFixed {
			binary.LittleEndian.PutUint32(short[payLength:], uint32(n))
			if _, err := decodeRecord(short); !errors.Is(err, ErrRecord) {
				t.Fatalf("first %d bytes with that length: %v", n, err)
			}
		}
	}
	binary.LittleEndian.PutUint32(b[payVersion:], 2)
	if _, err := decodeRecord(b[:Size(r)]); !errors.Is(err, ErrVersion) {
		t.Errorf("newer version: %v", err)
	}
}

// TestPayloadGolden pins the bytes around the images.
func TestPayloadGolden(t *testing.T) {
	r := &Record{ID: seq16(0), Blocks: chain(0x12345600, "x", "y"), Alloc: []Run{{5, 2}}, Note: []byte("n")}
	r.Blocks[0].Phase = 7
	r.Blocks[0].OldImage = img("x")
	b := r.encode(1)
	x := sum("x")
	want := slices.Concat(
		[]byte("ESPMPAYL\x01\x00\x00\x00\x75\x04\x00\x00"), r.ID[:],
		[]byte{1, 0, 0, 0, 4, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0}, make([]byte, 12),
		[]byte{0x00, 0x56, 0x34, 0x12, 0, 0, 0, 0, 0, 2, 0, 0, 7, 1, 0, 0}, x[:], img("y"), img("x"),
		[]byte{1, 1, 5, 1}, []byte("n"))
	if !bytes.Equal(b, want) {
		t.Errorf("got  %x\nwant %x", b, want)
	}
}

func TestRecordRefused(t *testing.T) {
	for name, edit := range map[string]func(r *Record){
		"no blocks":            func(r *Record) { r.Blocks = nil },
		"too many blocks":      func(r *Record) { r.Blocks = make([]Block, MaxBlocks+1) },
		"empty image":          func(r *Record) { r.Blocks[0].New = nil },
		"odd image":            func(r *Record) { r.Blocks[0].New = make([]byte, 513) },
		"huge image":           func(r *Record) { r.Blocks[0].New = make([]byte, MaxBlockSize+512) },
		"negative offset":      func(r *Record) { r.Blocks[0].Off = -512 },
		"odd offset":           func(r *Record) { r.Blocks[0].Off = 1 },
		"offset wraps":         func(r *Record) { r.Blocks[0].Off = math.MaxInt64 - 511 },
		"changes nothing":      func(r *Record) { r.Blocks[0].Old = sum("a1") },
		"not its old image":    func(r *Record) { r.Blocks[1].OldImage = img("a0") },
		"short old image":      func(r *Record) { r.Blocks[1].OldImage = img("b0")[:511] },
		"broken chain":         func(r *Record) { r.Blocks[2].Old = sum("b0") },
		"chain of two sizes":   func(r *Record) { r.Blocks[2].New = make([]byte, 1024) },
		"overlapping":          func(r *Record) { r.Blocks[0].New = make([]byte, 1024); r.Blocks[0].Off = 0 },
		"alloc runs":           func(r *Record) { r.Alloc = []Run{{5, 0}} },
		"free runs":            func(r *Record) { r.Free = []Run{{5, 1}, {5, 1}} },
		"base runs":            func(r *Record) { r.Base = []Run{{MaxUnits, 1}} },
		"taken and given up":   func(r *Record) { r.Free = []Run{{9, 90}} },
		"taken and given up 2": func(r *Record) { r.Free = []Run{{10, 91}} },
	} {
		r := sampleRecord()
		edit(r)
		if err := r.check(); !errors.Is(err, ErrRecord) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// TestRecordEveryByte sets every byte of the payload to every value near its own and to the extremes: never a panic, and
// what is accepted encodes to a record that is accepted.
func TestRecordEveryByte(t *testing.T) {
	r := sampleRecord()
	b := r.encode(1)
	for i := range b {
		was := b[i]
		for _, v := range []byte{0, 1, was + 1, was - 1, was ^ 0x80, 0xff} {
			b[i] = v
			got, err := decodeRecord(b)
			if err == nil && Size(got) > len(b) {
				t.Errorf("byte %d = %02x: decodes to a larger record", i, v)
			}
			if err != nil && !errors.Is(err, ErrRecord) && !errors.Is(err, ErrVersion) {
				t.Errorf("byte %d = %02x: %v", i, v, err)
			}
		}
		b[i] = was
	}
}

func FuzzPayload(f *testing.F) {
	f.Add(sampleRecord().encode(1))
	f.Add((&Record{Blocks: chain(0, "x", "y"), Alloc: []Run{{1, 1}, {3, 1}, {5, 1}, {7, 1}}}).encode(1))
	f.Add([]byte("ESPMPAYL"))
	f.Fuzz(func(t *testing.T, b []byte) {
		r, err := decodeRecord(b)
		if err != nil {
			return
		}
		again, err := decodeRecord(r.encode(1))
		if err != nil || !reflect.DeepEqual(again, r) {
			t.Fatalf("does not come back: %v", err)
		}
	})
}
