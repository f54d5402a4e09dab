package exfat

import (
	"bytes"
	"encoding/binary"
	"errors"
	"io"
	"math/rand/v2"
	"runtime"
	"testing"
	"time"

	"espmirror/blockdev"
)

// small are whole small images, the seeds of what is hostile.
func small(t testing.TB) [][]byte {
	return [][]byte{
		image(t, writeVolume(t, layout{size: 1 << 20, sectorShift: 9, clusShift: 0, label: "a"}, everySmall()...)),
		image(t, writeVolume(t, layout{size: 1 << 20, sectorShift: 9, clusShift: 3, rootFrag: 1, guid: true}, everySmall()...)),
		image(t, writeVolume(t, layout{size: 2 << 20, sectorShift: 12, clusShift: 0, fats: 2, active: 1}, everySmall()...)),
	}
}

// survive opens, scans and reads whatever b is. There is a result or a clear error.
func survive(t testing.TB, b []byte) {
	dev := &fenced{blockdev.NewMem(b, 512), t, int64(len(b))}
	v, err := Open(dev)
	if err != nil {
		if !errors.Is(err, ErrNotExFAT) {
			t.Fatalf("open: %v", err)
		}
		return
	}
	dev.end = v.geo.size()
	tree, err := v.Scan()
	if err != nil {
		t.Fatalf("scan: %v", err)
	}
	tree.Usage()
	var total int64
	var walk func(n *Node)
	walk = func(n *Node) {
		for _, c := range n.Children {
			walk(c)
			if c.IsDir() || c.Err() != nil {
				continue
			}
			r, err := tree.Open(c)
			if err != nil {
				t.Fatal(err)
			}
			// All data lies in the volume once, and what was never written costs nothing to read.
			if total += int64(c.valid); total > v.geo.size() {
				t.Fatalf("the files have more than the %d bytes of the volume", v.geo.size())
			}
			if k, err := io.Copy(io.Discard, r); err != nil || k != c.Size() {
				t.Fatalf("%s: %d bytes of %d, %v", c.Path(), k, c.Size(), err)
			}
		}
	}
	walk(tree.Root)
	walkFS(tree)
}

// mutate changes an image in the ways that get past the checksums.
func mutate(b []byte, r *rand.Rand) {
	le := binary.LittleEndian
	ss := int(1) << min(b[108], 12)
	values := []uint32{0, 1, 2, 3, 4, 5, badCluster, endOfChain, endOfChain - 1, 0x80000000, le.Uint32(b[92:]) + 1, le.Uint32(b[92:]) + 2}
	pick := func() uint32 {
		if r.IntN(2) == 0 {
			return values[r.IntN(len(values))]
		}
		return r.Uint32N(64)
	}
	fat, heap := int(le.Uint32(b[80:]))*ss, int(le.Uint32(b[88:]))*ss
	for range 1 + r.IntN(4) {
		switch r.IntN(6) {
		case 0: // the boot region, sealed
			fields := []int{64, 72, 80, 84, 88, 92, 96, 104, 106, 108, 109, 110}
			at := fields[r.IntN(len(fields))]
			switch r.IntN(3) {
			case 0:
				le.PutUint32(b[at:], pick())
			case 1:
				b[at] += byte(r.IntN(5)) - 2
			default:
				b[at+r.IntN(4)] = byte(r.Uint32())
			}
			for _, off := range []int{0, 12 * ss} {
				copy(b[off:off+512], b[:512])
				sealRegion(b[off : off+12*ss])
			}
		case 1, 2: // the FAT: cycles, cross-links, impossible clusters
			if fat+512 < len(b) {
				le.PutUint32(b[fat+4*r.IntN(128):], pick())
			}
		case 3: // the bitmap
			if heap+4096 < len(b) {
				b[heap+r.IntN(64)] ^= 1 << r.IntN(8)
			}
		default: // a set of entries, sealed
			var sets []int
			for at := heap; at >= 0 && at+96 <= len(b); at += 32 {
				if b[at] == 0x85 && b[at+32] == 0xC0 || b[at] == 0x81 || b[at] == 0x82 || b[at] == 0x83 || b[at] == 0xA0 {
					sets = append(sets, at)
				}
			}
			if len(sets) == 0 {
				continue
			}
			at := sets[r.IntN(len(sets))]
			n := 32
			if b[at] == 0x85 || b[at] == 0xA0 {
				n = min(32*(1+int(b[at+1])), len(b)-at)
			}
			set := b[at : at+n]
			switch r.IntN(4) {
			case 0:
				le.PutUint32(set[20+32*min(1, n/32-1):], pick())
			case 1:
				le.PutUint64(set[24+32*min(1, n/32-1):], uint64(pick())<<r.IntN(33))
			case 2:
				set[r.IntN(n)&^31] ^= 1 << r.IntN(8)
			default:
				set[r.IntN(n)] = byte(r.Uint32())
			}
			if set[0] == 0x85 || set[0] == 0xA0 {
				if k := 32 * (1 + int(set[1])); at+k <= len(b) {
					seal(b[at : at+k])
				}
			}
		}
	}
}

// Mutated volumes: a result or an error within a second, and 64 MiB.
func TestHostile(t *testing.T) {
	seeds := small(t)
	rounds := 3000
	if testing.Short() {
		rounds = 600
	}
	b := make([]byte, 0, 2<<20)
	for i := range rounds {
		b = append(b[:0], seeds[i%len(seeds)]...)
		mutate(b, rand.New(rand.NewPCG(uint64(i), 3)))
		start := time.Now()
		if survive(t, b); t.Failed() {
			t.Fatalf("seed %d", i)
		}
		if d := time.Since(start); d > 5*time.Second { // a second, on a machine that has nothing else to do
			t.Errorf("seed %d took %v", i, d)
		}
	}
}

// The worst that some MiB can hold: nothing but entries of empty files, of directories, or of what is not known.
func TestHostileBudget(t *testing.T) {
	const size = 4 << 20
	nothingBut := func(entry byte) func(dir []byte) {
		return func(dir []byte) {
			for i := range dir {
				dir[i] = entry
			}
		}
	}
	for name, fill := range map[string]func(dir []byte){
		"files": func(dir []byte) {
			w := &writer{}
			for i := 0; i+96 <= len(dir); i += 96 {
				u := []uint16{uint16('a' + i%26), uint16(0x100 + i/96%50_000), uint16('a' + i/9999)}
				copy(dir[i:], w.set(&want{units: u}, nil, 0, 0))
			}
		},
		"findings": nothingBut(0xC0), "critical": nothingBut(0x9F), "deleted": nothingBut(0x05), "benign": nothingBut(0xBF),
		"labels": nothingBut(0x83), "bitmaps": nothingBut(0x81),
	} {
		dev := writeVolume(t, layout{size: size, sectorShift: 9, clusShift: 0})
		b := image(t, dev)
		le := binary.LittleEndian
		root, count := le.Uint32(b[96:]), le.Uint32(b[92:])
		fat, heap := b[le.Uint32(b[80:])*512:], b[le.Uint32(b[88:])*512:]
		for c := root; c < count+1; c++ {
			le.PutUint32(fat[4*c:], c+1)
		}
		le.PutUint32(fat[4*(count+1):], endOfChain)
		entries := bytes.Clone(heap[(root-2)*512:][:96])
		dir := heap[(root-2)*512 : (count)*512]
		fill(dir[96:])
		copy(dir, entries)
		for i := range heap[:count/8] {
			heap[i] = 0xFF
		}
		mem := blockdev.NewMem(b, 512)
		runtime.GC()
		var before, after runtime.MemStats
		runtime.ReadMemStats(&before)
		start := time.Now()
		v, err := Open(mem)
		if err != nil {
			t.Fatal(err)
		}
		tree, err := v.Scan()
		if err != nil {
			t.Fatal(err)
		}
		took := time.Since(start)
		runtime.ReadMemStats(&after)
		held := int64(after.HeapAlloc) - int64(before.HeapAlloc)
		t.Logf("%s: %v, at most %d KiB, %d files, %d findings", name, took, held>>10, tree.Files, len(tree.Findings))
		if took > 5*time.Second || held > 64<<20 {
			t.Errorf("%s: %v, %d bytes", name, took, held)
		}
		runtime.KeepAlive(tree)
	}
}

func FuzzVolume(f *testing.F) {
	// The whole image is what the target makes of a seed and some changes, so that the fuzzer need not find a checksum.
	for i := range 12 {
		f.Add(uint8(i), uint64(i), []byte{})
	}
	f.Add(uint8(0), uint64(1), []byte{0, 0x80, 1, 2})
	seeds := small(f)
	f.Fuzz(func(t *testing.T, which uint8, seed uint64, patch []byte) {
		b := bytes.Clone(seeds[int(which)%len(seeds)])
		if which&0x80 == 0 {
			mutate(b, rand.New(rand.NewPCG(seed, 5)))
		}
		for ; len(patch) >= 4; patch = patch[4:] {
			at := (int(patch[0]) | int(patch[1])<<8 | int(patch[2])<<16) % len(b)
			b[at] = patch[3]
		}
		survive(t, b)
	})
}

// FuzzDirectory reads arbitrary bytes as a directory, with checksums that are right.
func FuzzDirectory(f *testing.F) {
	w := &writer{}
	f.Add(w.set(file("a", nil), nil, 0, 0))
	f.Add(append(w.set(file("deleted", nil), nil, 0, 0), w.set(&want{name: "vendor", benign: [][32]byte{{0xE0}, {0xE7}}}, nil, 0, 0)...))
	f.Add(bytes.Repeat([]byte{0x85}, 96))
	seed := image(f, writeVolume(f, layout{size: 1 << 20, sectorShift: 9, clusShift: 3}))
	le := binary.LittleEndian
	f.Fuzz(func(t *testing.T, entries []byte) {
		b := bytes.Clone(seed)
		entries = entries[:min(len(entries), 3900)]
		dir := b[int(le.Uint32(b[88:]))*512+int(le.Uint32(b[96:])-2)*4096:][:4096]
		copy(dir[96:], entries)
		for at := 96; at+32 <= len(dir); at += 32 {
			if n := 32 * (1 + int(dir[at+1])); dir[at] == 0x85 && at+n <= len(dir) {
				seal(dir[at : at+n])
			}
		}
		survive(t, b)
	})
}

// FuzzUpcase reads arbitrary bytes as an up-case table.
func FuzzUpcase(f *testing.F) {
	f.Add(upPacked)
	f.Add([]byte{0xFF, 0xFF})
	f.Add([]byte{0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 2, 0})
	f.Fuzz(func(t *testing.T, b []byte) {
		up := newUpcase()
		if err := up.parse(b); err == nil && up.fold(units("aZ9")) != string(utf16le("AZ9")) {
			t.Errorf("%q", up.fold(units("aZ9")))
		}
	})
}
