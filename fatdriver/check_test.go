package fatdriver

import (
	"encoding/binary"
	"fmt"
	"strings"
	"testing"
	"time"

	"espmirror/blockdev"
)

// TestCheckFindings breaks one thing at a time on a sound volume and wants exactly the findings for it.
func TestCheckFindings(t *testing.T) {
	le := binary.LittleEndian
	u16 := func(v uint16) []byte { return le.AppendUint16(nil, v) }
	u32 := func(v uint32) []byte { return le.AppendUint32(nil, v) }
	type want struct {
		sev Severity
		msg string
	}
	// entry changes a FAT entry in both copies, or in one.
	entry := func(d *sparseDev, v *Volume, c Cluster, e uint32, copies ...int) {
		if len(copies) == 0 {
			copies = []int{0, 1}
		}
		for _, n := range copies {
			off, k := entryOffset(v.geo.Type, c)
			at := v.geo.FATOff + int64(n)*v.geo.FATSize + off
			b := make([]byte, k)
			if _, err := d.ReadAt(b, at); err != nil {
				t.Fatal(err)
			}
			encodeEntry(v.geo.Type, c, b, e)
			d.poke(at, b...)
		}
	}
	boot := func(d *sparseDev, v *Volume, off int64, b ...byte) {
		d.poke(off, b...)
		if v.geo.BackupBootOff >= 0 {
			d.poke(v.geo.BackupBootOff+off, b...)
		}
	}
	freeWrong := want{Warning, "FSInfo says"}
	for _, c := range []struct {
		name  string
		types []Type
		do    func(d *sparseDev, v *Volume)
		want  []want
	}{
		{"nothing", nil, func(*sparseDev, *Volume) {}, nil},
		{"signature", nil, func(d *sparseDev, v *Volume) { boot(d, v, 510, 0, 0) }, []want{{Note, "ends in 00 00"}}},
		{"dirty bit 16", []Type{FAT12, FAT16}, func(d *sparseDev, v *Volume) { boot(d, v, 0x25, 3) },
			[]want{{Warning, "dirty bit"}, {Note, "surface test"}}},
		{"dirty bit 32, first only", []Type{FAT32}, func(d *sparseDev, v *Volume) { d.poke(0x41, 1) },
			[]want{{Warning, "dirty bit"}, {Warning, "differs from the first in 1 bytes (offset: first/backup): 0x41: 01/00"}}},
		{"clean bit", []Type{FAT16, FAT32}, func(d *sparseDev, v *Volume) {
			entry(d, v, 1, map[Type]uint32{FAT16: 0x7FFF, FAT32: 0x07FFFFFF}[v.geo.Type])
		}, []want{{Warning, "clean bit"}}},
		{"error bit", []Type{FAT16, FAT32}, func(d *sparseDev, v *Volume) {
			entry(d, v, 1, map[Type]uint32{FAT16: 0xBFFF, FAT32: 0x0BFFFFFF}[v.geo.Type])
		}, []want{{Warning, "no-error bit"}}},
		{"media", nil, func(d *sparseDev, v *Volume) { entry(d, v, 0, 0x0FFFFFF0) }, []want{{Damage, "want the media byte 0xf8"}}},
		{"FAT[0] ones", nil, func(d *sparseDev, v *Volume) { entry(d, v, 0, 0x0F8) }, []want{{Warning, "FAT[0] is 0xf8"}}},
		{"extended signature", nil, func(d *sparseDev, v *Volume) {
			off := int64(offBootSig16)
			if v.geo.Type == FAT32 {
				off = offBootSig32
			}
			boot(d, v, off, 0x1F)
		}, []want{{Note, "its extended signature is 0x1f"}, {Note, "label"}}},
		{"copies", nil, func(d *sparseDev, v *Volume) { entry(d, v, 1000, 7, 1) },
			[]want{{Warning, "cluster 1000: FAT copy 1 differs from copy 0 in 1 sectors"}}},
		{"lost chain", nil, func(d *sparseDev, v *Volume) {
			entry(d, v, 1500, 1501)
			entry(d, v, 1501, entryLast)
			entry(d, v, 1600, entryLast)
		}, []want{{Warning, "cluster 1500: the first of 3 lost clusters (1536 bytes) in 2 chains"}, freeWrong}},
		{"lost loop", nil, func(d *sparseDev, v *Volume) {
			entry(d, v, 1500, 1501)
			entry(d, v, 1501, 1500)
		}, []want{{Warning, "the first of 2 lost clusters (1024 bytes) in 1 chains"}, freeWrong}},
		{"one", nil, func(d *sparseDev, v *Volume) { entry(d, v, 1500, 1) },
			[]want{{Warning, "cluster 1500: its FAT entry is 0x1,"}, {Warning, "lost"}, freeWrong}},
		{"out of range", nil, func(d *sparseDev, v *Volume) { entry(d, v, 1500, uint32(v.geo.MaxCluster())+1) },
			[]want{{Warning, "cluster 1500: its FAT entry is 0x"}, {Warning, "lost"}, freeWrong}},
		{"out of range in a file", nil, func(d *sparseDev, v *Volume) { entry(d, v, mustFirst(t, v, "a.txt"), 1) },
			[]want{{Damage, "/a.txt: cluster 1 is outside"}, {Damage, "its FAT entry is 0x1,"}, {Warning, "lost"}}},
		{"many out of range", nil, func(d *sparseDev, v *Volume) {
			for i := range Cluster(maxListed + 5) {
				entry(d, v, 1500+i, 1)
			}
		}, append(append(make([]want, 0), repeat(want{Warning, "its FAT entry is 0x1,"}, maxListed)...),
			want{Warning, "5 more FAT entries"}, want{Warning, "the first of 21 lost clusters"}, freeWrong)},
		{"bad clusters", nil, func(d *sparseDev, v *Volume) {
			entry(d, v, 1700, entryBad)
			entry(d, v, 1702, entryBad)
		}, []want{{Note, "cluster 1700: the first of 2 clusters that are marked bad"}, freeWrong}},
		{"FSInfo signature", []Type{FAT32}, func(d *sparseDev, v *Volume) { d.poke(v.geo.FSInfoOff+484, 0) }, []want{{Warning, "wrong signatures"}}},
		{"FSInfo unknown", []Type{FAT32}, func(d *sparseDev, v *Volume) {
			d.poke(v.geo.FSInfoOff+488, u32(fsiUnknown)...)
			d.poke(v.geo.FSInfoOff+492, u32(fsiUnknown)...)
		}, []want{{Note, "does not know"}}},
		{"FSInfo wrong", []Type{FAT32}, func(d *sparseDev, v *Volume) {
			d.poke(v.geo.FSInfoOff+488, u32(5)...)
			d.poke(v.geo.FSInfoOff+492, u32(uint32(v.geo.MaxCluster())+1)...)
		}, []want{{Warning, "FSInfo says 5 free clusters, the FAT has"}, {Note, "next free cluster"}}},
		{"no FSInfo and backup", []Type{FAT32}, func(d *sparseDev, v *Volume) { boot(d, v, offFSInfo32, 0, 0, 0xFF, 0xFF) },
			[]want{{Note, "no FSInfo"}, {Note, "no backup"}}},
		{"FSInfo and backup outside", []Type{FAT32}, func(d *sparseDev, v *Volume) { boot(d, v, offFSInfo32, 0, 1, 1, 1) },
			[]want{{Warning, "the FSInfo sector is 256, outside"}, {Warning, "the backup boot sector is 257, outside"}}},
		{"labels", nil, func(d *sparseDev, v *Volume) {
			off := int64(offVolLab16)
			if v.geo.Type == FAT32 {
				off = offVolLab32
			}
			boot(d, v, off, 'X')
		}, []want{{Note, `label is "XEST", the root directory's "TEST"`}}},
		{"too large", nil, func(d *sparseDev, v *Volume) {
			boot(d, v, 0x20, u32(uint32(v.geo.TotalSectors)+1)...)
			boot(d, v, 0x13, 0, 0)
		},
			[]want{{Damage, "the volume claims"}, freeWrong}},
		{"FAT too small", []Type{FAT16}, func(d *sparseDev, v *Volume) { boot(d, v, offFATSz16, u16(uint16(v.geo.FATSize/512-1))...) }, nil},
		{"mirroring off", []Type{FAT32}, func(d *sparseDev, v *Volume) {
			boot(d, v, offExtFlags32, 0x81)
			entry(d, v, 1000, 7, 0)
		}, []want{{Warning, "mirroring is off"}, {Note, "FAT copy 0 differs from copy 1 in 1 sectors, here first (mirroring is off)"}}},
		{"dots", nil, func(d *sparseDev, v *Volume) {
			off := v.geo.ClusterOff(mustFirst(t, v, "d"))
			d.poke(off+offNTRes, ntNoShort)
			d.poke(off+slotSize+offAttr, AttrArchive)
		}, []want{{Warning, `/d: "." is marked as having no short name`}, {Damage, `/d: ".." has the attributes 0x20`}}},
		{"end marker", nil, func(d *sparseDev, v *Volume) {
			off := v.geo.RootOff + v.geo.RootSize
			if v.geo.Type == FAT32 {
				off = v.geo.ClusterOff(2) + int64(v.geo.ClusterSize)
			}
			d.poke(off-1, 1)
		}, []want{{Note, "after the end marker"}}},
		{"entry after the end marker", nil, func(d *sparseDev, v *Volume) {
			off := v.geo.RootOff + v.geo.RootSize
			if v.geo.Type == FAT32 {
				off = v.geo.ClusterOff(2) + int64(v.geo.ClusterSize)
			}
			d.poke(off-slotSize, 'X')
		}, []want{{Warning, "after the end marker"}}},
	} {
		for _, typ := range []Type{FAT12, FAT16, FAT32} {
			if c.types != nil && !strings.Contains(fmt.Sprint(c.types), typ.String()) {
				continue
			}
			t.Run(fmt.Sprintf("%s/%v", c.name, typ), func(t *testing.T) {
				size := map[Type]int64{FAT12: 1 << 20, FAT16: 8 << 20, FAT32: 40 << 20}[typ]
				// Sectors of one cluster each, and a size that is no multiple of anything.
				d, v := mustFormat(t, size+512, FormatOptions{Type: typ, Label: "TEST", SectorsPerCluster: 1})
				populate(t, d, map[string]string{"a.txt": strings.Repeat("a", 1000), "d/b.txt": "b"}, 1)
				c.do(d, v)
				v, err := Open(d)
				if err != nil {
					t.Fatal(err)
				}
				r, err := v.Check()
				if err != nil {
					t.Fatal(err)
				}
				if c.name == "FAT too small" {
					// The FATs moved, so there is much more to find; this one must be among it.
					if !strings.Contains(fmt.Sprint(r.Findings), "a FAT has room for") {
						t.Error(r.Findings)
					}
					return
				}
				var left []want
				for _, w := range c.want {
					if w != freeWrong || typ == FAT32 {
						left = append(left, w)
					}
				}
				for _, f := range r.Findings {
					hit := false
					for i, w := range left {
						if w.sev == f.Severity && strings.Contains(f.String(), w.msg) {
							left = append(left[:i], left[i+1:]...)
							hit = true
							break
						}
					}
					if !hit {
						t.Errorf("unexpected %v: %v", f.Severity, f)
					}
				}
				for _, w := range left {
					t.Errorf("missing %v: %s", w.sev, w.msg)
				}
			})
		}
	}
}

func repeat[T any](v T, n int) []T {
	s := make([]T, n)
	for i := range s {
		s[i] = v
	}
	return s
}

func mustFirst(t *testing.T, v *Volume, path string) Cluster {
	t.Helper()
	n := mustScan(t, v).Lookup(path)
	if n == nil {
		t.Fatalf("no %s", path)
	}
	return n.Runs[0].First
}

func TestCheckFigures(t *testing.T) {
	testVolumes(t, func(t *testing.T, d *sparseDev, files map[string]string) {
		r := checkClean(t, d)
		v, err := Open(d)
		if err != nil {
			t.Fatal(err)
		}
		used := int64(0)
		tr := mustScan(t, v)
		for w := range tr.used {
			for b := tr.used[w]; b != 0; b &= b - 1 {
				used++
			}
		}
		free, err := v.FreeBytes()
		if err != nil || free != r.ClusterBytes(r.FreeClusters) {
			t.Errorf("%d bytes are free, %v; want %d", free, err, r.ClusterBytes(r.FreeClusters))
		}
		if r.UsedClusters != used || r.UsedClusters+r.FreeClusters != int64(r.Geometry.Clusters) || r.LostClusters+r.BadClusters != 0 {
			t.Errorf("used %d, want %d; free %d of %d", r.UsedClusters, used, r.FreeClusters, r.Geometry.Clusters)
		}
		n := 0
		for name := range files {
			if !strings.HasSuffix(name, "/") {
				n++
			}
		}
		if r.Files != n || r.Dirs != 15 || r.Geometry != v.Geometry() || r.UUID != "0000-0000" {
			t.Errorf("%d files, want %d; %d directories; UUID %s", r.Files, n, r.Dirs, r.UUID)
		}
	})
}

// TestCheckLarge measures a pass over four million clusters, and over the largest FAT a small device can claim.
func TestCheckLarge(t *testing.T) {
	_, v := mustFormat(t, 16<<30, FormatOptions{Type: FAT32, SectorsPerCluster: 8})
	if v.geo.Clusters < 4_000_000 {
		t.Fatal(v.geo.Clusters)
	}
	start := time.Now()
	if _, err := v.Check(); err != nil {
		t.Fatal(err)
	}
	took := time.Since(start)
	t.Logf("%d clusters: %v", v.geo.Clusters, took)
	if took > 5*time.Second { // about 0.1 s, when nothing else runs
		t.Errorf("Check of %d clusters took %v", v.geo.Clusters, took)
	}
	// A volume of 2^28 clusters on a device of 4 MiB.
	d := blockdev.NewMem(make([]byte, 4<<20), 512)
	b := append([]byte(nil), v.boot...)
	b[offSecPerClus] = 1
	binary.LittleEndian.PutUint32(b[offTotSec32:], 0x0FFFFFF0)
	binary.LittleEndian.PutUint32(b[offFATSz32:], 1<<11)
	copy(d.Bytes(), b)
	v, err := Open(d)
	if err != nil {
		t.Fatal(err)
	}
	var r *Report
	if n := testing.AllocsPerRun(1, func() {
		if r, err = v.Check(); err != nil {
			t.Fatal(err)
		}
	}); n > 1000 {
		t.Errorf("%v allocations", n)
	}
	if s, _ := r.Worst(); s != Damage {
		t.Error(r.Findings)
	}
	if _, err := v.FreeBytes(); err == nil {
		t.Error("free bytes of a volume whose FAT is not there")
	}
}
