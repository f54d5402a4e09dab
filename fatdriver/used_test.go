package fatdriver

import (
	"bytes"
	"encoding/binary"
	"errors"
	"math/rand/v2"
	"testing"

	"espmirror/blockdev"
)

// TestEachUsed compares eachUsed with get at the borders of types, pages, words and sectors.
func TestEachUsed(t *testing.T) {
	rng := rand.New(rand.NewPCG(1, 2))
	counts := map[Type][]uint32{
		FAT12: {1, 2, 3, 339, 340, 341, 4083, 4084},
		FAT16: {4085, 32764, 32765, 32766, 32767, 32768, 32769, 65523, 65524},
		FAT32: {1, 2, 3, 16381, 16382, 16383, 16384, 16385, 32765, 32766, 32767, 65525},
	}
	for typ, sizes := range counts {
		for _, n := range sizes {
			for i := range 20 {
				g := Geometry{Type: typ, SectorSize: 512, Clusters: n, NumFATs: 1, ClusterSize: 512}
				o, k := entryOffset(typ, g.MaxCluster())
				g.FATSize = (o + int64(k) + 511) / 512 * 512
				if i%2 == 1 {
					g.FATSize += 512 * int64(rng.Uint32N(400))
				}
				b := make([]byte, g.FATSize)
				for range 50 {
					b[rng.IntN(len(b))] = byte(rng.Uint32())
				}
				b[o] |= byte(i)
				fat := newTable(blockdev.NewMem(b, 512), &g, 0)
				c := Cluster(2)
				free := func(end Cluster) {
					for ; c < end; c++ {
						if e, err := fat.get(c); err != nil || e != entryFree {
							t.Fatalf("FAT%d, %d clusters: %d was passed over: 0x%x, %v", typ, n, c, e, err)
						}
					}
				}
				if err := fat.eachUsed(func(used Cluster, e uint32) error {
					free(used)
					if have, err := fat.get(used); err != nil || have != e || e == entryFree {
						t.Fatalf("FAT%d, %d clusters: %d has 0x%x, not 0x%x, %v", typ, n, used, have, e, err)
					}
					c++
					return nil
				}); err != nil {
					t.Fatal(err)
				}
				free(g.MaxCluster() + 1)
			}
		}
	}
}

type onceBad struct {
	*blockdev.Mem
	off  int64
	left int
}

func (d *onceBad) ReadAt(p []byte, off int64) (int, error) {
	if d.left > 0 && off <= d.off && d.off < off+int64(len(p)) {
		d.left--
		return 0, errInjected
	}
	return d.Mem.ReadAt(p, off)
}

// TestFSInfoFickle has somebody's code where FSInfo should be, in a sector that once cannot be read.
func TestFSInfoFickle(t *testing.T) {
	m := blockdev.NewMem(make([]byte, 36<<20), 512)
	if err := Format(m, FormatOptions{Type: FAT32, SectorSize: 512, SectorsPerCluster: 1, NumFATs: 2, Align: 1}); err != nil {
		t.Fatal(err)
	}
	code := bytes.Repeat([]byte{0xEB, 0x90}, 256)
	copy(m.Bytes()[512:], code)
	copy(m.Bytes()[7*512:], code)
	if n := binary.LittleEndian.Uint16(m.Bytes()[offFSInfo32:]); n != 1 {
		t.Fatal(n)
	}
	v, err := Open(&onceBad{m, 512, 1})
	if err != nil {
		t.Fatal(err)
	}
	if wrote, err := v.MendFSInfo(true); wrote || !errors.Is(err, errInjected) {
		t.Fatal(wrote, err)
	}
	if !bytes.Equal(m.Bytes()[512:1024], code) {
		t.Fatal("the code is gone")
	}
}
