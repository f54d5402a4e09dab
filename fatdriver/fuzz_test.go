package fatdriver

import (
	"bytes"
	"errors"
	"espmirror/fatdriver/internal/iofs"
	"io/fs"
	"maps"
	"strings"
	"sync"
	"testing"
	"time"
)

func FuzzParseBPB(f *testing.F) {
	for _, o := range []FormatOptions{{Type: FAT12}, {Type: FAT16}, {Type: FAT32}, {Type: FAT32, NumFATs: 1, SectorSize: 4096}} {
		_, v := mustFormat(f, map[Type]int64{FAT12: 1 << 20, FAT16: 16 << 20, FAT32: 300 << 20}[o.Type], o)
		f.Add(v.boot)
	}
	f.Add(make([]byte, 512))
	f.Add(bytes.Repeat([]byte{0xFF}, 512))
	f.Fuzz(func(t *testing.T, b []byte) {
		g, err := parseBPB(b)
		if err != nil {
			if !errors.Is(err, ErrNotFAT) {
				t.Fatal(err)
			}
			return
		}
		end := g.ClusterOff(g.MaxCluster()) + int64(g.ClusterSize)
		switch {
		case g.Clusters == 0 || g.FATSize <= 0 || g.NumFATs < 1 || g.FATOff < int64(g.SectorSize):
			t.Fatalf("impossible: %+v", g)
		case g.DataOff < g.FATOff+int64(g.NumFATs)*g.FATSize+g.RootSize || end > g.Size() || end <= g.DataOff:
			t.Fatalf("areas overlap: %+v", g)
		case g.Size()-end >= int64(g.ClusterSize):
			t.Fatalf("a cluster is missing: %+v", g)
		case (g.Type == FAT32) != (g.RootEntries == 0) || g.Type == FAT32 && !g.valid(g.RootCluster):
			t.Fatalf("no root: %+v", g)
		case g.FSInfoOff >= g.FATOff || g.BackupBootOff >= g.FATOff:
			t.Fatalf("FSInfo or backup outside the reserved sectors: %+v", g)
		}
		g.targetProblem(g.Size(), 512)
		g.targetProblem(0, 4096)
	})
}

func FuzzParseDir(f *testing.F) {
	set := newNameSet()
	var raw []byte
	for _, name := range []string{"A long name.txt", "SHORT.TXT", "日本語 😀.conf", strings.Repeat("x", 255)} {
		if err := set.claim(name); err != nil {
			f.Fatal(err)
		}
		g, err := set.newGroup(name, nil, Meta{}, false)
		if err != nil {
			f.Fatal(err)
		}
		raw = append(raw, g...)
	}
	dots := append([]byte(".                               "), []byte("..                              ")...)
	f.Add(raw, true)
	f.Add(append(dots, raw...), false)
	f.Add(raw[slotSize:], true) // a long name without its first slot
	f.Add(raw[:2*slotSize], true)
	f.Add(append(bytes.Repeat([]byte{slotDeleted}, slotSize), raw...), true)
	f.Add(bytes.Repeat([]byte{0x41}, 5*slotSize), true)
	f.Add([]byte{0}, false)
	f.Fuzz(func(t *testing.T, raw []byte, isRoot bool) {
		d := parseDir(FAT32, raw, isRoot)
		total, next := len(raw)/slotSize, 0
		if d.end > total {
			t.Fatalf("end %d of %d", d.end, total)
		}
		for _, e := range d.entries {
			if e.Index < next || e.Index+e.slots() > d.end {
				t.Fatalf("%q: slots %d…%d, after %d, of %d", e.Name, e.Index, e.Index+e.slots(), next, d.end)
			}
			next = e.Index + e.slots()
			if !bytes.Equal(e.Group, raw[e.Index*slotSize:next*slotSize]) {
				t.Fatalf("%q: its slots are not those of the directory", e.Name)
			}
			if e.Name == "" || e.Name == "." || e.Name == ".." || strings.ContainsAny(e.Name, "/\\\x00\n\x7f") {
				t.Fatalf("name %q", e.Name)
			}
			if n := len(units(e.Name)); n > maxNameUnits {
				t.Fatalf("name of %d units", n)
			}
			e.ModTime()
		}
		for _, is := range d.issues {
			if is.slot < 0 || is.slot > total+1 || is.msg == "" {
				t.Fatalf("issue %+v", is)
			}
		}
	})
}

func FuzzLongName(f *testing.F) {
	for _, name := range []string{"a", "A long name.txt", "exactly 13 ch", "日本語", "😀", "\xed\xa0\x80", "\xff", "x.", strings.Repeat("x", 255), strings.Repeat("y", 256)} {
		set := newNameSet()
		g, err := set.newGroup(name, nil, Meta{}, false)
		if err != nil {
			g = make([]byte, 2*slotSize)
		}
		f.Add(name, g)
	}
	f.Fuzz(func(t *testing.T, name string, raw []byte) {
		set := newNameSet()
		if g, err := set.newGroup(name, nil, Meta{}, false); err == nil {
			d := parseDir(FAT16, g, true)
			if len(d.entries) != 1 || d.entries[0].Name != name || len(d.issues) > 0 {
				t.Fatalf("%q is read as %v with %v", name, d.entries, d.issues)
			}
		} else if !errors.Is(err, ErrName) {
			t.Fatal(err)
		}
		n := len(raw) / slotSize
		if n < 2 || n > 64 {
			return
		}
		raw = raw[:n*slotSize]
		got, err := longName(raw)
		if err != nil {
			return
		}
		again := append([]byte(nil), raw...)
		putLongName(again, units(got))
		if name, err := longName(again); err != nil || name != got {
			t.Fatalf("%q was written as %q, %v", got, name, err)
		}
	})
}

// fuzzBase is a small volume of each type with files, fragmented and nested, made once.
var fuzzBase = sync.OnceValue(func() (list []*sparseDev) {
	for _, o := range []FormatOptions{
		{Type: FAT12, SectorsPerCluster: 1, Align: 1}, {Type: FAT16, SectorsPerCluster: 1, NumFATs: 1, Align: 1},
		{Type: FAT32, SectorsPerCluster: 1, Label: "FUZZ"},
	} {
		d := newSparse(map[Type]int64{FAT12: 128 << 10, FAT16: 3 << 20, FAT32: 36 << 20}[o.Type], 512)
		if err := Format(d, o); err != nil {
			panic(err)
		}
		populate(panicTB{}, d, map[string]string{
			"a.txt": "a", "A longer name.conf": strings.Repeat("b", 2000), "dir/sub/deep/file": strings.Repeat("c", 600),
			"dir/日本語😀.efi": "d", "empty": "", "dir/e1/": "", "dir/e2/": "",
		}, 2)
		list = append(list, d)
	}
	return list
})

// panicTB lets populate run outside a test.
type panicTB struct{ testing.TB }

func (panicTB) Helper()               {}
func (panicTB) Fatal(a ...any)        { panic(a) }
func (panicTB) Fatalf(string, ...any) { panic("populate") }

// mutate changes a copy of a base volume as the fuzzer's bytes say: five of them choose an area, an offset in it, and
// what happens to the byte there. The areas are those that are parsed.
func mutate(which byte, edits []byte) *sparseDev {
	list := fuzzBase()
	base := list[int(which)%len(list)]
	d := newSparse(base.size, 512)
	for n, p := range maps.All(base.pages) {
		c := *p
		d.pages[n] = &c
	}
	v, err := Open(base)
	if err != nil {
		panic(err)
	}
	g := v.geo
	areas := [][2]int64{{0, 96}, {g.FATOff, 256}, {g.FATOff, g.FATSize * int64(g.NumFATs)}, {g.DataOff, 64 * int64(g.ClusterSize)}}
	if g.Type == FAT32 {
		areas = append(areas, [2]int64{g.FSInfoOff, 512}, [2]int64{g.BackupBootOff, 512})
	} else {
		areas = append(areas, [2]int64{g.RootOff, 512})
	}
	for ; len(edits) >= 5; edits = edits[5:] {
		a := areas[int(edits[0])%len(areas)]
		off := a[0] + (int64(edits[1])<<8|int64(edits[2]))%a[1]
		b := make([]byte, 1)
		if _, err := d.ReadAt(b, off); err != nil {
			panic(err)
		}
		switch edits[3] % 3 {
		case 0:
			b[0] = edits[4]
		case 1:
			b[0] ^= edits[4]
		default:
			b[0] += edits[4]
		}
		d.poke(off, b[0])
	}
	return d
}

// FuzzOpenScan: whatever a volume of a few MiB holds, there is a result or an error, soon and without much memory.
func FuzzOpenScan(f *testing.F) {
	f.Add(byte(0), []byte{})
	f.Add(byte(1), []byte{})
	f.Add(byte(2), []byte{})
	f.Add(byte(0), []byte{1, 0, 6, 0, 3})                              // a short loop
	f.Add(byte(1), []byte{0, 0, 16, 0, 255})                           // 255 FATs
	f.Add(byte(2), []byte{0, 0, 35, 0, 15, 0, 0, 39, 0, 1})            // 2^28 sectors, huge FAT
	f.Add(byte(2), []byte{0, 0, 13, 0, 128, 3, 2, 26, 0, 2})           // other cluster size
	f.Add(byte(2), []byte{0, 0, 40, 0, 0x81, 0, 0, 44, 0, 3})          // mirroring off, other root
	f.Add(byte(1), []byte{4, 0, 0, 0, 5, 4, 0, 11, 0, 16, 4, 0, 0, 1}) // root entries
	f.Fuzz(func(t *testing.T, which byte, edits []byte) {
		if len(edits) > 5*200 {
			return
		}
		start := time.Now()
		d := mutate(which, edits)
		v, err := Open(d)
		if err != nil {
			if !errors.Is(err, ErrNotFAT) {
				t.Fatal(err)
			}
			return
		}
		_ = v.TargetError()
		r, err := v.Check()
		if err == nil {
			if r.FreeClusters+r.UsedClusters+r.BadClusters > int64(v.geo.Clusters) || r.LostClusters > r.UsedClusters {
				t.Fatalf("%+v", r)
			}
		} else if v.geo.Size() <= d.size {
			t.Fatal(err) // every sector can be read
		}
		tr, err := v.Scan()
		if err != nil {
			if v.geo.Size() <= d.size {
				t.Fatal(err)
			}
			return
		}
		damaged := tr.Damage() != nil
		fsys := tr.FS()
		err = fs.WalkDir(fsys, ".", func(p string, e fs.DirEntry, err error) error {
			switch {
			case err != nil:
				if !errors.Is(err, ErrDamaged) || !damaged {
					t.Fatalf("%s: %v", p, err)
				}
				return nil
			case e.IsDir():
				return nil
			}
			b, err := fs.ReadFile(fsys, p)
			if err != nil && !damaged && v.geo.Size() <= d.size {
				t.Fatalf("%s: %v", p, err)
			}
			if n := e.(*iofs.Info).Size(); err == nil && int64(len(b)) != n {
				t.Fatalf("%s: %d bytes of %d", p, len(b), n)
			}
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
		if took := time.Since(start); took > 5*time.Second {
			t.Fatalf("took %v", took)
		}
	})
}
