package journal

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"reflect"
	"strings"
	"testing"
)

func seq32(first byte) (b [32]byte) {
	for i := range b {
		b[i] = first + byte(i)
	}
	return b
}

func seq16(first byte) (b [16]byte) {
	for i := range b {
		b[i] = first + byte(i)
	}
	return b
}

func sampleHeader() Header {
	return Header{
		Version: 1, State: Committing, Seq: 0x0102030405060708, Index: 2, Blocks: 5,
		ID: seq16(0x10), Binding: Binding(seq32(0x20)), Digest: seq32(0x60), Size: 1 << 20,
		Creation: []Run{{0x0fffff00, 0x100}}, payloadLen: 0x1234, payloadSum: seq32(0x40),
	}
}

// reseal makes b a header with a valid checksum again.
func reseal(b []byte) []byte {
	sum := sha256.Sum256(b[:480])
	copy(b[480:], sum[:])
	return b
}

func TestHeaderGolden(t *testing.T) {
	h := sampleHeader()
	b := make([]byte, 512)
	h.encode(b)
	want := strings.Join([]string{
		"4553504d4a524e4c", "01000000", "03000000", "0807060504030201", "02000000", "05000000",
		"101112131415161718191a1b1c1d1e1f",
		"202122232425262728292a2b2c2d2e2f303132333435363738393a3b3c3d3e3f",
		"404142434445464748494a4b4c4d4e4f505152535455565758595a5b5c5d5e5f",
		"606162636465666768696a6b6c6d6e6f707172737475767778797a7b7c7d7e7f",
		"0000100000000000", "34120000", "01000000",
		"00ffff0f00010000",
		strings.Repeat("00", 480-168),
		"8ba6ddd52eac60f980e4914aa806b74ad9fd3b56e866e8a29e65f000336908ec",
	}, "")
	if got := hex.EncodeToString(b); got != want {
		t.Errorf("got  %s\nwant %s", got, want)
	}
	got, err := DecodeHeader(b)
	if err != nil || !reflect.DeepEqual(got, h) {
		t.Errorf("round trip: %+v, %v", got, err)
	}
}

func TestOffsetsPinned(t *testing.T) {
	for name, v := range map[string][2]int{
		"slot A": {SlotA, 0}, "slot B": {SlotB, 8192}, "payload": {PayloadOffset, 16384}, "header": {HeaderSize, 512},
		"min": {MinSize, 32768}, "max": {MaxSize, 67108864}, "creation runs": {MaxCreationRuns, 16},
		"reserved": {hdrZero, 288}, "header sum": {hdrSum, 480}, "payload fixed": {payloadFixed, 64},
		"block fixed": {blockFixed, 48}, "blocks": {MaxBlocks, 1024}, "block size": {MaxBlockSize, 65536}, "units": {MaxUnits, 1 << 28},
	} {
		if v[0] != v[1] {
			t.Errorf("%s is %d, expected %d", name, v[0], v[1])
		}
	}
}

func TestHeaderEveryBitFlip(t *testing.T) {
	h := sampleHeader()
	b := make([]byte, 512)
	h.encode(b)
	for bit := range 512 * 8 {
		b[bit/8] ^= 1 << (bit % 8)
		if _, err := DecodeHeader(b); !errors.Is(err, ErrInvalid) {
			t.Fatalf("bit %d: %v", bit, err)
		}
		b[bit/8] ^= 1 << (bit % 8)
	}
}

func TestHeaderRefused(t *testing.T) {
	le := binary.LittleEndian
	good := func() []byte { h := sampleHeader(); b := make([]byte, 512); h.encode(b); return b }
	for name, edit := range map[string]func(b []byte){
		"version 0":             func(b []byte) { le.PutUint32(b[8:], 0) },
		"state 0":               func(b []byte) { le.PutUint32(b[12:], 0) },
		"state 4":               func(b []byte) { le.PutUint32(b[12:], 4) },
		"idle with payload":     func(b []byte) { le.PutUint32(b[12:], 1) },
		"prepared with index":   func(b []byte) { le.PutUint32(b[12:], 2) },
		"sequence 0":            func(b []byte) { le.PutUint64(b[16:], 0) },
		"sequence at the end":   func(b []byte) { le.PutUint64(b[16:], ^uint64(0)) },
		"index past blocks":     func(b []byte) { le.PutUint32(b[24:], 5) },
		"no blocks":             func(b []byte) { le.PutUint32(b[28:], 0); le.PutUint32(b[24:], 0) },
		"too many blocks":       func(b []byte) { le.PutUint32(b[28:], MaxBlocks+1) },
		"size 0":                func(b []byte) { le.PutUint64(b[144:], 0) },
		"size huge":             func(b []byte) { le.PutUint64(b[144:], 1<<63) },
		"payload past file":     func(b []byte) { le.PutUint32(b[152:], 1<<20-16384+1) },
		"payload too short":     func(b []byte) { le.PutUint32(b[152:], 63) },
		"17 runs":               func(b []byte) { le.PutUint32(b[156:], 17) },
		"run count huge":        func(b []byte) { le.PutUint32(b[156:], 0xffffffff) },
		"run not counted":       func(b []byte) { le.PutUint32(b[156:], 0) },
		"empty run":             func(b []byte) { le.PutUint32(b[164:], 0) },
		"run past the end":      func(b []byte) { le.PutUint32(b[164:], 0x101) },
		"reserved byte, first":  func(b []byte) { b[288] = 1 },
		"reserved byte, last":   func(b []byte) { b[479] = 1 },
		"runs that are reverse": func(b []byte) { le.PutUint32(b[156:], 2); le.PutUint32(b[172:], 1) },
	} {
		b := good()
		edit(b)
		if h, err := DecodeHeader(reseal(b)); !errors.Is(err, ErrInvalid) || errors.Is(err, ErrAbsent) {
			t.Errorf("%s: %+v, %v", name, h, err)
		}
	}
	if _, err := DecodeHeader(make([]byte, 512)); !errors.Is(err, ErrAbsent) || !strings.Contains(err.Error(), "all zero") {
		t.Errorf("all zero: %v", err)
	}
	if _, err := DecodeHeader(bytes.Repeat([]byte{0xff}, 512)); !errors.Is(err, ErrAbsent) {
		t.Errorf("all ones: %v", err)
	}
	if _, err := DecodeHeader(good()[:511]); !errors.Is(err, ErrInvalid) {
		t.Errorf("short: %v", err)
	}
	b := good()
	le.PutUint32(b[8:], 2)
	if _, err := DecodeHeader(b); errors.Is(err, ErrVersion) || !errors.Is(err, ErrInvalid) {
		t.Errorf("version changed without checksum: %v", err)
	}
	if h, err := DecodeHeader(reseal(b)); !errors.Is(err, ErrVersion) || h.Version != 2 || h.Seq != 0x0102030405060708 {
		t.Errorf("newer version: %+v, %v", h, err)
	}
}

func FuzzHeader(f *testing.F) {
	h := sampleHeader()
	b := make([]byte, 512)
	h.encode(b)
	f.Add(b)
	file, _ := Format(MinSize, 512, Binding{1}, []Run{{2, 3}, {9, 1}})
	f.Add(file[:512])
	f.Add(make([]byte, 512))
	f.Add([]byte("ESPMJRNL"))
	f.Fuzz(func(t *testing.T, b []byte) {
		for _, sealed := range []bool{false, true} {
			if sealed {
				if len(b) < 512 {
					return
				}
				b = reseal(bytes.Clone(b))
			}
			h, err := DecodeHeader(b)
			if err != nil {
				continue
			}
			out := make([]byte, 512)
			h.encode(out)
			if !bytes.Equal(out, b[:512]) {
				t.Fatalf("decodes to %+v, which encodes differently", h)
			}
		}
	})
}
