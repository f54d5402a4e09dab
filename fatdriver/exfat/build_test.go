package exfat

import (
	"encoding/binary"
	"math/bits"
	"math/rand/v2"
	"os"
	"testing"
	"unicode"
	"unicode/utf16"

	"espmirror/blockdev"
	"espmirror/fixtures"
)

// This file is a writer of exFAT volumes for the tests. It shares nothing with the reader, not even constants, and
// fsck.exfat judges what it makes (TestWriterIsSound).

// want is a file or directory that a volume is to have.
type want struct {
	name     string
	units    []uint16 // in place of name: what is no UTF-8
	dir      []*want
	isDir    bool
	data     []byte
	size     int64            // in place of len(data): a sparse file, with
	pieces   map[int64][]byte // what is in it
	valid    int64            // ValidDataLength, -1: all
	fat      bool             // the FAT describes it, even if it is contiguous
	fragment int              // clusters a fragment; 0 is one piece
	attr     uint16
	times    [3]uint32 // created, modified, accessed
	tens     [2]byte
	zones    [3]byte
	deleted  bool       // only its entries are there, as deleted ones
	benign   [][32]byte // secondary entries behind the name
	patch    func(set []byte)
	extra    int // clusters that a directory has more than it needs
}

func file(name string, data []byte) *want { return &want{name: name, data: data, valid: -1} }
func dir(name string, children ...*want) *want {
	return &want{name: name, dir: children, isDir: true, valid: -1}
}

// layout is how a volume is made.
type layout struct {
	size        int64
	sectorShift int
	clusShift   int // sectors a cluster
	fats        int // 0 is 1
	active      int
	label       string
	guid        bool
	seed        uint64
	rootFrag    int
}

type writer struct {
	t      testing.TB
	dev    blockdev.Device
	l      layout
	ss, cs int64
	fatOff int64 // sectors
	fatLen int64
	heap   int64 // sectors
	count  uint32
	fat    []uint32
	bitmap []byte
	free   uint32
	rng    *rand.Rand
}

func writeVolume(t testing.TB, l layout, root ...*want) *fixtures.Sparse {
	t.Helper()
	dev := fixtures.NewSparse(l.size, 1<<l.sectorShift)
	newWriter(t, dev, l).write(root)
	return dev
}

func image(t testing.TB, dev blockdev.Device) []byte {
	b := make([]byte, dev.Size())
	if _, err := dev.ReadAt(b, 0); err != nil {
		t.Fatal(err)
	}
	return b
}

func newWriter(t testing.TB, dev blockdev.Device, l layout) *writer {
	if l.fats == 0 {
		l.fats = 1
	}
	w := &writer{t: t, dev: dev, l: l, ss: 1 << l.sectorShift, rng: rand.New(rand.NewPCG(l.seed, 7))}
	w.cs = w.ss << l.clusShift
	sectors := l.size / w.ss
	w.fatOff = 32
	// The FAT is made for as many clusters as there would be without it, which is some too many.
	w.fatLen = ((sectors>>l.clusShift+2)*4 + w.ss - 1) / w.ss
	w.heap = w.fatOff + w.fatLen*int64(l.fats) + 3
	w.count = uint32((sectors - w.heap) >> l.clusShift)
	w.fat = make([]uint32, w.count+2)
	w.fat[0], w.fat[1] = 0xFFFFFFF8, 0xFFFFFFFF
	w.bitmap = make([]byte, (w.count+7)/8)
	w.free = 2
	return w
}

func (w *writer) put(b []byte, off int64) {
	w.t.Helper()
	if _, err := w.dev.WriteAt(b, off); err != nil {
		w.t.Fatal(err)
	}
}

func (w *writer) clusterOff(c uint32) int64 { return w.heap*w.ss + int64(c-2)*w.cs }

// alloc takes n clusters: in one piece, or in fragments with gaps, the later ones first on the volume.
func (w *writer) alloc(n int64, fragment int) []uint32 {
	w.t.Helper()
	var cl []uint32
	take := func(k int64) []uint32 {
		if int64(w.free)+k > int64(w.count)+2 {
			w.t.Fatalf("the volume of %d clusters is too small", w.count)
		}
		out := make([]uint32, k)
		for i := range out {
			out[i] = w.free
			w.bitmap[(w.free-2)/8] |= 1 << ((w.free - 2) % 8)
			w.free++
		}
		return out
	}
	if fragment == 0 {
		return take(n)
	}
	for n > 0 {
		k := min(n, int64(fragment))
		cl = append(take(k), cl...)
		w.free++ // a gap
		n -= k
	}
	return cl
}

func (w *writer) chain(cl []uint32) {
	for i, c := range cl {
		if w.fat[c] = 0xFFFFFFFF; i+1 < len(cl) {
			w.fat[c] = cl[i+1]
		}
	}
}

// store writes data to clusters.
func (w *writer) store(cl []uint32, data []byte) {
	for _, c := range cl {
		k := min(int64(len(data)), w.cs)
		w.put(data[:k], w.clusterOff(c))
		data = data[k:]
	}
}

func upcaseTable() (table [65536]uint16, packed []byte) {
	for i := range table {
		table[i] = uint16(i)
		if u := unicode.ToUpper(rune(i)); u < 0x10000 && !utf16.IsSurrogate(rune(i)) && u >= 0x80 == (i >= 0x80) {
			table[i] = uint16(u)
		}
	}
	le := binary.LittleEndian
	for i := 0; i < 65536; {
		n := 0
		for i+n < 65536 && n < 65535 && table[i+n] == uint16(i+n) {
			n++
		}
		if n >= 3 || n > 0 && i == 0xFFFF {
			packed = le.AppendUint16(le.AppendUint16(packed, 0xFFFF), uint16(n))
			i += n
			continue
		}
		packed = le.AppendUint16(packed, table[i])
		i++
	}
	return table, packed
}

var upTable, upPacked = upcaseTable()

func sum16(b []byte, skip ...int) (s uint16) {
	for i, c := range b {
		if len(skip) == 0 || i != skip[0] && i != skip[0]+1 {
			s = bits.RotateLeft16(s, -1) + uint16(c)
		}
	}
	return s
}

func sum32(b []byte, boot bool) (s uint32) {
	for i, c := range b {
		if boot && (i == 106 || i == 107 || i == 112) {
			continue
		}
		s = bits.RotateLeft32(s, -1) + uint32(c)
	}
	return s
}

// seal puts the right checksum into a set.
func seal(set []byte) { binary.LittleEndian.PutUint16(set[2:], sum16(set, 2)) }

func (w *writer) set(f *want, cl []uint32, size, valid int64) []byte {
	le := binary.LittleEndian
	u := f.units
	if u == nil {
		u = utf16.Encode([]rune(f.name))
	}
	names := (len(u) + 14) / 15
	set := make([]byte, 32*(2+names))
	set[0], set[1] = 0x85, byte(1+names+len(f.benign))
	attr := f.attr
	if f.isDir {
		attr |= 0x10
	}
	le.PutUint16(set[4:], attr)
	times := f.times
	if times == [3]uint32{} {
		times = [3]uint32{0x50210000, 0x50210000, 0x50210000}
	}
	for i, t := range times {
		le.PutUint32(set[8+4*i:], t)
	}
	set[20], set[21] = f.tens[0], f.tens[1]
	copy(set[22:], f.zones[:])
	s := set[32:]
	s[0], s[1], s[3] = 0xC0, 1, byte(len(u))
	up := make([]byte, 0, 2*len(u))
	for i, c := range u {
		up = le.AppendUint16(up, upTable[c])
		e := set[64+32*(i/15):]
		e[0] = 0xC1
		le.PutUint16(e[2+2*(i%15):], c)
	}
	le.PutUint16(s[4:], sum16(up))
	le.PutUint64(s[8:], uint64(valid))
	le.PutUint64(s[24:], uint64(size))
	if len(cl) > 0 {
		le.PutUint32(s[20:], cl[0])
		if !f.fat && f.fragment == 0 {
			s[1] = 3
		}
	}
	for _, b := range f.benign {
		set = append(set, b[:]...)
	}
	if f.patch != nil {
		f.patch(set)
	}
	seal(set)
	if f.deleted {
		for i := 0; i < len(set); i += 32 {
			set[i] &^= 0x80
		}
	}
	return set
}

// entries writes what is below and returns the entries of a directory.
func (w *writer) entries(list []*want) (out []byte) {
	for _, f := range list {
		var cl []uint32
		size, valid := int64(len(f.data)), f.valid
		switch {
		case f.deleted:
			size = 4 * w.cs
			cl = []uint32{2} // what lies there now belongs to somebody else
		case f.isDir:
			b := w.entries(f.dir)
			n := max(1, (int64(len(b))+w.cs-1)/w.cs) + int64(f.extra)
			cl = w.alloc(n, f.fragment)
			w.store(cl, append(b, make([]byte, n*w.cs-int64(len(b)))...))
			size = n * w.cs
		default:
			if f.size > 0 {
				size = f.size
			}
			cl = w.alloc((size+w.cs-1)/w.cs, f.fragment)
			// What was never written is garbage on the medium.
			if size > int64(len(f.data)) || valid >= 0 {
				for off, b := range f.pieces {
					for i, c := range b { // a byte at a time finds each cluster by itself
						at := off + int64(i)
						w.put([]byte{c}, w.clusterOff(cl[at/w.cs])+at%w.cs)
					}
				}
			}
			if f.data != nil {
				junk := make([]byte, int64(len(cl))*w.cs-int64(len(f.data)))
				for i := range junk {
					junk[i] = byte(w.rng.Uint32() | 1)
				}
				w.store(cl, append(append([]byte(nil), f.data...), junk...))
			}
		}
		if valid < 0 {
			valid = size
		}
		if !f.deleted && len(cl) > 0 && (f.fat || f.fragment > 0) {
			w.chain(cl)
		}
		out = append(out, w.set(f, cl, size, valid)...)
	}
	return out
}

func (w *writer) write(root []*want) {
	le := binary.LittleEndian
	need := func(n int) int64 { return (int64(n) + w.cs - 1) / w.cs }
	maps := make([][]uint32, w.l.fats)
	for i := range maps {
		maps[i] = w.alloc(need(len(w.bitmap)), 0)
		w.chain(maps[i])
	}
	up := w.alloc(need(len(upPacked)), 0)
	w.chain(up)
	w.store(up, append(upPacked, make([]byte, int64(len(up))*w.cs-int64(len(upPacked)))...))

	var head []byte
	add := func(f func(e []byte)) {
		e := make([]byte, 32)
		f(e)
		head = append(head, e...)
	}
	add(func(e []byte) {
		e[0] = 0x83
		u := utf16.Encode([]rune(w.l.label))
		e[1] = byte(len(u))
		for i, c := range u {
			le.PutUint16(e[2+2*i:], c)
		}
	})
	for i, cl := range maps {
		add(func(e []byte) {
			e[0], e[1] = 0x81, byte(i)
			le.PutUint32(e[20:], cl[0])
			le.PutUint64(e[24:], uint64(len(w.bitmap)))
		})
	}
	add(func(e []byte) {
		e[0] = 0x82
		le.PutUint32(e[4:], sum32(upPacked, false))
		le.PutUint32(e[20:], up[0])
		le.PutUint64(e[24:], uint64(len(upPacked)))
	})
	if w.l.guid {
		add(func(e []byte) {
			e[0] = 0xA0
			copy(e[6:], "espmirror's GUID")
			seal(e)
		})
	}
	b := append(head, w.entries(root)...)
	n := max(1, need(len(b)))
	cl := w.alloc(n, w.l.rootFrag)
	w.chain(cl)
	w.store(cl, append(b, make([]byte, n*w.cs-int64(len(b)))...))

	for i, m := range maps {
		bm := append([]byte(nil), w.bitmap...)
		if i != w.l.active {
			bm = make([]byte, len(bm)) // stale
		}
		w.store(m, append(bm, make([]byte, int64(len(m))*w.cs-int64(len(bm)))...))
	}
	fat := make([]byte, 4*len(w.fat))
	for i, e := range w.fat {
		le.PutUint32(fat[4*i:], e)
	}
	for i := range w.l.fats {
		at := (w.fatOff + int64(i)*w.fatLen) * w.ss
		if w.put(fat, at); i != w.l.active {
			w.put(make([]byte, len(fat)), at)
		}
	}

	region := make([]byte, 12*w.ss)
	copy(region, "\xeb\x76\x90EXFAT   ")
	le.PutUint64(region[72:], uint64(w.l.size/w.ss))
	le.PutUint32(region[80:], uint32(w.fatOff))
	le.PutUint32(region[84:], uint32(w.fatLen))
	le.PutUint32(region[88:], uint32(w.heap))
	le.PutUint32(region[92:], w.count)
	le.PutUint32(region[96:], cl[0])
	le.PutUint32(region[100:], 0x1234ABCD)
	le.PutUint16(region[104:], 0x100)
	le.PutUint16(region[106:], uint16(w.l.active))
	region[108], region[109], region[110], region[111] = byte(w.l.sectorShift), byte(w.l.clusShift), byte(w.l.fats), 0x80
	region[112] = 0xFF
	le.PutUint16(region[510:], 0xAA55)
	for i := int64(1); i <= 8; i++ {
		le.PutUint32(region[(i+1)*w.ss-4:], 0xAA550000)
	}
	sealRegion(region)
	w.put(region, 0)
	w.put(region, 12*w.ss)
}

// sealRegion puts the right checksum into a boot region.
func sealRegion(region []byte) {
	ss := len(region) / 12
	s := sum32(region[:11*ss], true)
	for i := 11 * ss; i < len(region); i += 4 {
		binary.LittleEndian.PutUint32(region[i:], s)
	}
}

// saved writes a volume to a file and returns its path.
func saved(t testing.TB, s *fixtures.Sparse) string {
	t.Helper()
	f, err := os.CreateTemp(t.TempDir(), "*.img")
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := s.WriteFile(f); err != nil {
		t.Fatal(err)
	}
	return f.Name()
}
