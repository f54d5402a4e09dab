package replicate

import (
	"bytes"
	"fmt"
	"io"
	"maps"
	"strings"
	"testing"

	"espmirror/blockdev"
	"espmirror/fatdriver"
	"espmirror/fixtures"
)

// specSource is a recipe as a source.
type specSource struct {
	spec fixtures.TreeSpec
	root *Item
}

func newSpecSource(spec fixtures.TreeSpec) *specSource {
	paths := map[string]string{}
	for p, c := range spec {
		if !c.Dir {
			paths[p] = ""
		}
	}
	s := &specSource{spec, newMemSource(paths).root}
	for p, c := range spec {
		if c.Dir {
			at := s.root
			parts := strings.Split(p, "/")
			for i, name := range parts {
				next := at.child(name)
				if next == nil {
					next = &Item{Name: name, Path: strings.Join(parts[:i+1], "/"), Dir: true}
					at.Children = append(at.Children, next)
				}
				at = next
			}
			continue
		}
		s.root.lookup(p).Size = c.Size
	}
	return s
}

func (s *specSource) Name() string { return "recipe" }
func (s *specSource) Root() *Item  { return s.root }
func (s *specSource) Close() error { return nil }
func (s *specSource) Open(it *Item) (io.ReadCloser, error) {
	return io.NopCloser(s.spec[it.Path].Reader()), nil
}

// lifeTree is a selected tree as it is in life, scaled to small volumes.
func lifeTree(seed uint64, versions ...string) fixtures.TreeSpec {
	return fixtures.Merge(
		fixtures.KernelInstall(seed, 60_000, versions...),
		fixtures.Names(seed).Below("EFI/Linux/names"),
		fixtures.Deep(12, seed).Below("EFI/Linux"),
		fixtures.ManyFiles("loader/many", 60, 40, seed),
	)
}

// lives are the states that targets are found in.
func lives() map[string]fixtures.VolumeSpec {
	specs := map[string]fixtures.VolumeSpec{}
	for _, x := range []struct {
		fat          int
		size         int64
		sector, spc  int
		fats, hidden int
	}{
		{12, 6 << 20, 512, 4, 2, 0}, {12, 12 << 20, 4096, 1, 1, 0},
		{16, 16 << 20, 512, 2, 2, 0}, {16, 40 << 20, 4096, 1, 1, 63},
		{32, 40 << 20, 512, 1, 2, 2048}, {32, 40 << 20, 512, 1, 1, 0}, {32, 272 << 20, 4096, 1, 2, 0},
	} {
		if x.size > 100<<20 && !long() {
			continue
		}
		specs[fmt.Sprintf("FAT%d/%d/%d FATs", x.fat, x.sector, x.fats)] = fixtures.VolumeSpec{
			FAT: x.fat, FATs: x.fats, Size: x.size, SectorSize: x.sector, SectorsPerCluster: x.spc, Hidden: uint32(x.hidden),
			Serial: 0xCAFE0000 + uint32(x.fat), Label: "SECONDARY",
		}
	}
	return specs
}

// TestLife syncs to volumes made by mkfs.fat and mtools, with what befalls volumes in life, and judges the result with
// fsck.fat, mtools and a byte diff of the whole image.
func TestLife(t *testing.T) {
	fixtures.Need(t, "mkfs.fat", "mtools", "fsck.fat")
	troubles := map[string]func(s *fixtures.VolumeSpec){
		"new":        func(s *fixtures.VolumeSpec) {},
		"fragmented": func(s *fixtures.VolumeSpec) { s.Fragment = 150; s.Deleted = 9 },
		"worn": func(s *fixtures.VolumeSpec) {
			s.BadClusters, s.LostClusters, s.Dirty, s.DirtyFAT, s.WrongFSInfo, s.Deleted = 40, 30, true, s.FAT == 32, true, 5
		},
	}
	for name, base := range lives() {
		for trouble, change := range troubles {
			t.Run(name+"/"+trouble, func(t *testing.T) {
				t.Parallel()
				spec := base
				change(&spec)
				unselected := fixtures.Unselected(200, 7)
				if !long() {
					unselected = fixtures.Unselected(40, 7)
				}
				spec.Tree = fixtures.Merge(unselected, fixtures.KernelInstall(1, 20_000, "6.0"))
				image, err := spec.Bytes()
				if err != nil {
					t.Fatal(err)
				}
				m := blockdev.NewMem(bytes.Clone(image), spec.SectorSize)
				before, err := fixtures.ReadStrictOptions(bytes.NewReader(image), int64(len(image)), 0, fixtures.Options{Tail: fixtures.TailEDK2})
				if err != nil {
					t.Fatal(err)
				}
				for round, versions := range [][]string{{"6.1", "6.2"}, {"6.2", "6.3"}} {
					selected := lifeTree(uint64(round), versions...)
					res := syncMem(t, newSpecSource(selected), m, Options{})
					if res.Outcome != Synced {
						t.Fatalf("round %d: %v, %v", round, res.Outcome, res.Err)
					}
					lifeJudge(t, &spec, before, image, m, fixtures.Merge(unselected, selected))
					again := blockdev.NewCounting(m)
					if res := syncMem(t, newSpecSource(selected), again, Options{}); res.Outcome != InSync || again.Counts().Writes != 0 {
						t.Fatalf("round %d, again: %v, %v, %d writes, %v", round, res.Outcome, res.Err, again.Counts().Writes, res.Summary.Changes)
					}
				}
			})
		}
	}
}

// lifeJudge compares a target with what it should hold, and with the image that it was.
func lifeJudge(t *testing.T, spec *fixtures.VolumeSpec, before *fixtures.Tree, image []byte, m *blockdev.Mem, want fixtures.TreeSpec) {
	t.Helper()
	own := func(p string) bool {
		k := fatdriver.Fold(p)
		return spec.Extra(p) || strings.HasPrefix(k, "EFI/ESPMIRROR") || k == "EFI"
	}
	after, err := fixtures.ReadStrictOptions(bytes.NewReader(m.Bytes()), m.Size(), 0, fixtures.Options{Tail: fixtures.TailEDK2})
	if err != nil {
		t.Fatal(err)
	}
	if d := want.Compare(after, own); len(d) > 0 {
		t.Fatalf("%d differences: %s", len(d), strings.Join(d[:min(5, len(d))], "; "))
	}
	if after.Serial != before.Serial || after.BootSum != before.BootSum || after.BackupSum != before.BackupSum || after.Label != before.Label {
		t.Error("the identity of the volume changed")
	}
	files, err := fixtures.MtoolsReader(bytes.NewReader(m.Bytes()), m.Size())
	if err != nil && spec.FAT == 16 && spec.DirtyFAT {
		err = nil // mtools refuses these
	} else if err == nil {
		if d := fixtures.CompareJudged(after, files, fixtures.MtoolsName); len(d) > 0 {
			t.Errorf("mtools sees something else: %s", strings.Join(d[:min(5, len(d))], "; "))
		}
	}
	if err != nil {
		t.Error(err)
	}
	f, err := fixtures.FsckReader(bytes.NewReader(m.Bytes()), m.Size())
	if err != nil {
		t.Fatal(err)
	}
	var allow fixtures.Allow
	if spec.Dirty || spec.DirtyFAT {
		allow |= fixtures.AllowDirty | fixtures.AllowBackupDiffers
	}
	if spec.LostClusters > 0 {
		// fsck.fat compares the free count with what it would be without the lost clusters.
		allow |= fixtures.AllowLost | fixtures.AllowFreeWrong
	}
	if _, err := after.CheckFSInfo(false); err != nil {
		t.Error(err)
	}
	if err := f.Err(allow); err != nil {
		t.Error(err)
	}
	a, err := after.Audit()
	if err != nil {
		t.Fatal(err)
	}
	if len(a.Lost) != spec.LostClusters || len(a.Bad) != spec.BadClusters {
		t.Errorf("%d lost and %d bad clusters, there were %d and %d", len(a.Lost), len(a.Bad), spec.LostClusters, spec.BadClusters)
	}
	if boot, fat1, err := after.DirtyFlags(); err != nil || boot != spec.Dirty || fat1 != spec.DirtyFAT {
		t.Errorf("dirty flags %v %v %v", boot, fat1, err)
	}
	// The places that may differ: the FATs, FSInfo, the root, EFI itself, and clusters that were free or selected.
	v, err := fatdriver.Open(m)
	if err != nil {
		t.Fatal(err)
	}
	g := v.Geometry()
	allowed := []fixtures.Extent{{Off: g.FATOff, Len: int64(g.NumFATs) * g.FATSize}, {Off: g.RootOff, Len: g.RootSize}}
	if g.FSInfoOff >= 0 {
		allowed = append(allowed, fixtures.Extent{Off: g.FSInfoOff, Len: int64(g.SectorSize)})
	}
	kept := map[uint32]bool{}
	for i := range before.Entries {
		e := &before.Entries[i]
		k := fatdriver.Fold(e.Path)
		mine := k == "EFI" || strings.HasPrefix(k, "LOADER") || strings.HasPrefix(k, "EFI/LINUX") || strings.HasPrefix(k, "EFI/SYSTEMD") ||
			strings.HasPrefix(k, "EFI/BOOT") || strings.HasPrefix(k, fatdriver.Fold(fixtures.MachineID))
		for _, r := range e.Runs {
			for c := r.First; c < r.First+r.Count && !mine; c++ {
				kept[c] = true
			}
		}
		if mine {
			continue
		}
		if x := after.Get(e.Path); x == nil || x.First != e.First || x.Attr != e.Attr || x.Times != e.Times || x.Short != e.Short || x.CaseBits != e.CaseBits {
			t.Errorf("the entry of %s changed", e.Path)
		}
	}
	beforeAudit, err := before.Audit()
	if err != nil {
		t.Fatal(err)
	}
	for _, set := range [][]uint32{beforeAudit.Bad, beforeAudit.Lost} {
		for _, c := range set {
			kept[c] = true
		}
	}
	for c := uint32(2); c < before.Clusters+2; c++ {
		if !kept[c] {
			allowed = append(allowed, fixtures.Extent{Off: before.ClusterOffset(c), Len: int64(before.ClusterSize)})
		}
	}
	fixtures.DiffWithin(t, image, m.Bytes(), g.SectorSize, allowed...)
}

// TestBigDirectory has 3,000 files in one directory, and a UKI of some MiB.
func TestBigDirectory(t *testing.T) {
	n := 1500
	if testing.Short() {
		n = 600
	}
	for _, g := range []geometry{geometries[4], geometries[3]} {
		t.Run(g.name, func(t *testing.T) {
			t.Parallel()
			if g.name == "FAT16-4k" {
				g.size = 64 << 20
			}
			m := newVolume(t, g)
			tree := fixtures.Merge(fixtures.KernelInstall(3, 4000, "6.1"), fixtures.ManyFiles("EFI/Linux/many", n, 700, 5),
				fixtures.TreeSpec{"EFI/Linux/big.efi": fixtures.PE(9<<20, 4)})
			if res := syncMem(t, newSpecSource(tree), m, Options{}); res.Outcome != Synced {
				t.Fatal(res.Outcome, res.Err)
			}
			check := func() {
				t.Helper()
				got, err := fixtures.ReadStrict(bytes.NewReader(m.Bytes()), m.Size(), 0)
				if err != nil {
					t.Fatal(err)
				}
				if d := tree.Compare(got, func(p string) bool { return strings.HasPrefix(fatdriver.Fold(p), "EFI/ESPMIRROR") }); len(d) > 0 {
					t.Fatal(len(d), d[0])
				}
				fsck(t, m)
			}
			check()
			// Every other file goes, the rest change their names.
			next := fixtures.TreeSpec{}
			i := 0
			for p, c := range tree {
				if !strings.Contains(p, "/many/") {
					next[p] = c
				} else if i++; i%2 == 0 {
					next[strings.Replace(p, "file number", "renamed file number", 1)] = c
				}
			}
			tree = next
			d := blockdev.NewCounting(m)
			res := syncMem(t, newSpecSource(tree), d, Options{})
			if res.Outcome != Synced || res.Summary.DataBytes != 0 {
				t.Fatal(res.Outcome, res.Err, res.Summary.DataBytes)
			}
			check()
		})
	}
}

// TestNearlyFull syncs to a fragmented volume on which only little more than the need is free.
func TestNearlyFull(t *testing.T) {
	fixtures.Need(t, "mkfs.fat", "mtools", "fsck.fat")
	for _, fat := range []int{12, 16} {
		t.Run(fmt.Sprint("FAT", fat), func(t *testing.T) {
			t.Parallel()
			spec := fixtures.VolumeSpec{FAT: fat, Size: int64(fat-11) * 2 << 20, SectorSize: 512, SectorsPerCluster: 1, Serial: 1,
				Tree: fixtures.KernelInstall(1, 2000, "6.0"), Fragment: 120, Leave: 160}
			image, err := spec.Bytes()
			if err != nil {
				t.Fatal(err)
			}
			m := blockdev.NewMem(image, 512)
			tree := fixtures.KernelInstall(2, 3000, "6.1")
			var worked, refused int
			for size := int64(1000); size < 30_000; size += 2000 {
				tree["EFI/Linux/growing.efi"] = fixtures.PE(size, uint64(size))
				before := bytes.Clone(m.Bytes())
				res := syncMem(t, newSpecSource(tree), m, Options{})
				switch res.Outcome {
				case Synced:
					worked++
				case Refused:
					refused++
					if !bytes.Equal(before, m.Bytes()) {
						t.Fatal("a refused target was written to")
					}
				default:
					t.Fatal(res.Outcome, res.Err)
				}
				fsck(t, m)
			}
			t.Logf("%d syncs worked, %d were refused", worked, refused)
			if worked == 0 {
				t.Error("nothing ever fitted")
			}
		})
	}
}

// TestKindsChange takes trees through changes of kind and case, there and back.
func TestKindsChange(t *testing.T) {
	base := map[string]string{
		"loader/loader.conf": "x", "EFI/BOOT/BOOTX64.EFI": fixtures.Program("boot"), "EFI/Linux/file": "a file", "EFI/Linux/dir/a": "1", "EFI/Linux/dir/b/c": "2",
		"EFI/Linux/Mixed Case.conf": "m", "EFI/Linux/short.efi": fixtures.Program("s"), "EFI/Linux/swap1": strings.Repeat("1", 900), "EFI/Linux/swap2": strings.Repeat("2", 900),
		"EFI/Linux/grows": "g", "EFI/Linux/empty": "",
	}
	moved := map[string]string{
		"loader/loader.conf": "x", "EFI/BOOT/BOOTX64.EFI": fixtures.Program("boot"), "EFI/Linux/file/now/a/dir": "a file", "EFI/Linux/dir": "now a file",
		"EFI/Linux/MIXED CASE.CONF": "m", "EFI/Linux/SHORT.EFI": fixtures.Program("s"), "EFI/Linux/swap1": strings.Repeat("2", 900), "EFI/Linux/swap2": strings.Repeat("1", 900),
		"EFI/Linux/grows": strings.Repeat("g", 5000), "EFI/Linux/empty": "no more",
	}
	anchors := maps.Clone(base)
	for p := range anchors {
		if strings.HasPrefix(p, "EFI/Linux/") {
			delete(anchors, p)
		}
	}
	anchors["EFI/Linux"] = "the whole anchor is a file"
	for _, g := range geometries {
		t.Run(g.name, func(t *testing.T) {
			t.Parallel()
			m := newVolume(t, g)
			for i, files := range []map[string]string{base, moved, base, anchors, moved, anchors, base} {
				for range 2 {
					if res := syncMem(t, newMemSource(files), m, Options{}); res.Err != nil {
						t.Fatal(i, res.Err)
					}
					judge(t, m, g.fats, files)
				}
				if res := syncMem(t, newMemSource(files), m, Options{}); res.Outcome != InSync {
					t.Fatal(i, res.Outcome, res.Summary.Changes)
				}
				fsck(t, m)
			}
		})
	}
}
