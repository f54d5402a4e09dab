package exfat

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"testing/fstest"
	"time"
	"unicode/utf16"
	"unicode/utf8"

	"espmirror/blockdev"
	volumetree "espmirror/fatdriver/internal/tree"
	"espmirror/fixtures"
)

// fenced fails the test when a volume is written to, or read behind its end.
type fenced struct {
	blockdev.Device
	t   testing.TB
	end int64
}

func (f *fenced) ReadAt(p []byte, off int64) (int, error) {
	if off < 0 || off+int64(len(p)) > f.end {
		f.t.Errorf("read of %d bytes at 0x%x, the volume ends at 0x%x", len(p), off, f.end)
	}
	return f.Device.ReadAt(p, off)
}

func (f *fenced) WriteAt(p []byte, off int64) (int, error) {
	f.t.Errorf("write of %d bytes at 0x%x", len(p), off)
	return 0, blockdev.ErrReadOnly
}

func scanOf(t testing.TB, dev blockdev.Device) *Tree {
	t.Helper()
	v, err := Open(&fenced{dev, t, dev.Size()})
	if err != nil {
		t.Fatal(err)
	}
	tree, err := v.Scan()
	if err != nil {
		t.Fatal(err)
	}
	return tree
}

func sound(t testing.TB, dev blockdev.Device) *Tree {
	t.Helper()
	tree := scanOf(t, dev)
	for _, f := range tree.Findings {
		t.Errorf("%s: %s", f.Severity, f)
	}
	return tree
}

func random(n int) []byte {
	b := make([]byte, n)
	r := rand.New(rand.NewPCG(uint64(n), 1))
	for i := range b {
		b[i] = byte(r.Uint32())
	}
	return b
}

var sizes = []int{0, 1, 511, 512, 513, 4095, 4096, 4097, 1<<20 - 1, 1 << 20, 1<<20 + 1}

// everyCase are files of each size, contiguous, chained and fragmented, with deleted ones between them, names of all kinds,
// and directories that are long, fragmented or nested.
func everyCase(names int) []*want {
	var list []*want
	for i, n := range sizes {
		a, b, c := file(fmt.Sprintf("contiguous-%d.bin", n), random(n)), file(fmt.Sprintf("chained-%d.bin", n), random(n)), file(fmt.Sprintf("fragmented-%d.bin", n), random(n))
		b.fat, c.fragment = true, 1+i%3
		d := file(fmt.Sprintf("deleted-%d.bin", n), nil)
		d.deleted = true
		list = append(list, a, d, b, c)
	}
	half := file("half valid.bin", append(random(700), make([]byte, 5000)...))
	half.size, half.valid, half.data = 5700, 700, half.data[:700]
	never := file("never written.bin", nil)
	never.size, never.valid = 1<<20, 0
	ghost := func(i int) *want { g := file(fmt.Sprintf("ghost %d", i), nil); g.deleted = true; return g }
	many := dir("five thousand", ghost(0))
	for i := range names {
		f := file(fmt.Sprintf("name %04d of a directory with many of them.conf", i), nil)
		if i%500 == 0 {
			f.data = random(i + 1)
			many.dir = append(many.dir, ghost(i))
		}
		many.dir = append(many.dir, f)
	}
	many.fragment, many.extra = 2, 1
	all := file("attributes", random(100))
	all.attr = 0x27
	vendor := file("vendor", random(1000))
	vendor.benign = [][32]byte{{0xE0, 0, 1, 2, 3}, {0xE1, 0}, {0xE7, 1}}
	deep := file("at the bottom", random(3000))
	for i := 5; i >= 0; i-- {
		deep = dir(fmt.Sprintf("level %d", i), ghost(i), deep)
		deep.fat = i%2 == 0
	}
	return append(list, half, never, many, all, vendor, deep, dir("empty"),
		dir("🐧 penguin", file("😀.txt", random(99)), file("𝔘𝔫𝔦𝔠𝔬𝔡𝔢 𐐀.efi", random(1234)), file("日本語", random(5))),
		file(strings.Repeat("😀", 127)+"x", random(255)), file("e", random(1)), file("ÄÖÜ ß ÿ.txt", random(15)),
		file("exactly fifteen", random(15)), file("exactly sixteen.", random(16)))
}

// content is what a file reads as.
func (f *want) content() []byte {
	n := max(f.size, int64(len(f.data)))
	b := append(slices.Clone(f.data), make([]byte, n-int64(len(f.data)))...)
	return b
}

func live(list []*want) (out []*want) {
	for _, f := range list {
		if !f.deleted {
			out = append(out, f)
		}
	}
	return out
}

// compare checks that a directory has what is wanted and nothing else, byte for byte.
func compare(t testing.TB, tree *Tree, n *Node, list []*want) {
	t.Helper()
	list = live(list)
	if len(n.Children) != len(list) {
		t.Errorf("/%s has %d entries, want %d", n.Path(), len(n.Children), len(list))
	}
	for _, f := range list {
		c := n.Child(f.name)
		if c == nil {
			t.Errorf("/%s: no %q", n.Path(), f.name)
			continue
		}
		if up := n.Child(strings.ToUpper(f.name)); up != c && utf8.ValidString(f.name) && !strings.Contains(f.name, "ß") && !strings.Contains(f.name, "ÿ") {
			t.Errorf("%q is not found in upper case", f.name)
		}
		if c.Name() != f.name || c.IsDir() != f.isDir {
			t.Errorf("%q is %q, directory %v", f.name, c.Name(), c.IsDir())
		}
		if f.isDir {
			compare(t, tree, c, f.dir)
			continue
		}
		if want := f.attr; c.Attr != want {
			t.Errorf("%s has the attributes 0x%x, want 0x%x", c.Path(), c.Attr, want)
		}
		data := f.content()
		if c.Size() != int64(len(data)) {
			t.Errorf("%s has %d bytes, want %d", c.Path(), c.Size(), len(data))
		}
		r, err := tree.Open(c)
		if err != nil {
			t.Errorf("%s: %v", c.Path(), err)
			continue
		}
		if got, err := io.ReadAll(r); err != nil || !bytes.Equal(got, data) {
			t.Errorf("%s: %d bytes, %v, and they differ", c.Path(), len(got), err)
		}
		// Pieces that begin and end anywhere.
		rng := rand.New(rand.NewPCG(1, uint64(len(data))))
		for range min(len(data), 20) {
			at := rng.IntN(len(data))
			p := make([]byte, rng.IntN(9000))
			k, err := r.ReadAt(p, int64(at))
			if want := min(len(p), len(data)-at); k != want || !bytes.Equal(p[:k], data[at:at+k]) || k < len(p) && err != io.EOF || k == len(p) && err != nil && err != io.EOF {
				t.Errorf("%s: %d bytes of %d at %d, %v", c.Path(), k, len(p), at, err)
			}
		}
	}
}

var layouts = map[string]layout{
	"sector 512, cluster 512":    {size: 24 << 20, sectorShift: 9, clusShift: 0, label: "SMALL", seed: 1, rootFrag: 1},
	"sector 512, cluster 4096":   {size: 32 << 20, sectorShift: 9, clusShift: 3, label: "Ünï😀", guid: true, seed: 2, rootFrag: 1},
	"sector 4096, cluster 4096":  {size: 32 << 20, sectorShift: 12, clusShift: 0, seed: 3},
	"sector 4096, cluster 32768": {size: 64 << 20, sectorShift: 12, clusShift: 3, guid: true, seed: 4, rootFrag: 1},
	"sector 1024, cluster 2048":  {size: 32 << 20, sectorShift: 10, clusShift: 1, seed: 5},
}

const manyNames = 5000

func TestEveryCase(t *testing.T) {
	for name, l := range layouts {
		t.Run(name, func(t *testing.T) {
			list := everyCase(manyNames)
			dev := writeVolume(t, l, list...)
			tree := sound(t, dev)
			compare(t, tree, tree.Root, list)
			if tree.Label != l.label || (tree.GUID != nil) != l.guid || l.guid && string(tree.GUID) != "espmirror's GUID" {
				t.Errorf("label %q, GUID %q", tree.Label, tree.GUID)
			}
			if _, _, lost, err := tree.Usage(); err != nil || lost != 0 {
				t.Errorf("%d lost clusters, %v", lost, err)
			}
		})
	}
}

// fsck runs fsck.exfat, which has to find the volume clean.
func fsck(t testing.TB, path string, tree *Tree) {
	t.Helper()
	tool := judge(t, "fsck.exfat")
	out, err := exec.Command(tool, "-n", path).CombinedOutput()
	want := fmt.Sprintf("clean. directories %d, files %d\n", tree.Dirs+1, tree.Files)
	if err != nil || !strings.HasSuffix(string(out), want) || strings.Contains(string(out), "ERROR") {
		t.Errorf("%v: %s\nwant %s", err, out, want)
	}
}

// judge finds a tool, or skips the test by its name.
func judge(t testing.TB, name string) string {
	t.Helper()
	for _, at := range []string{name, "/usr/sbin/" + name, "/sbin/" + name} {
		if p, err := exec.LookPath(at); err == nil {
			return p
		}
	}
	t.Skipf("%s is not installed", name)
	return ""
}

// plainCases are those without a volume GUID and what vendors add, which the specification has and fsck.exfat 1.2 and
// exfat-fuse 1.3 call unknown.
func plainCases(names int) []*want {
	return slices.DeleteFunc(everyCase(names), func(f *want) bool { return f.benign != nil })
}

// The writer of the tests makes volumes that fsck.exfat finds clean, so that it and the reader do not share a mistake.
func TestWriterIsSound(t *testing.T) {
	for name, l := range layouts {
		t.Run(name, func(t *testing.T) {
			l.guid = false
			list := plainCases(manyNames)
			if l.sectorShift+l.clusShift == 9 {
				// fsck.exfat 1.2 keeps two clusters of a directory, and the longest sets take three of this size.
				list = slices.DeleteFunc(list, func(f *want) bool { return len(f.name) > 400 })
			}
			dev := writeVolume(t, l, list...)
			path := saved(t, dev)
			fsck(t, path, sound(t, dev))
			sameAsDump(t, path, dev)
		})
	}
}

// sameAsDump compares the geometry, the label and the free clusters with what dump.exfat says.
func sameAsDump(t testing.TB, path string, dev blockdev.Device) {
	t.Helper()
	out, err := exec.Command(judge(t, "dump.exfat"), path).CombinedOutput()
	if err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	field := func(name string) string {
		m := regexp.MustCompile(`(?m)^` + regexp.QuoteMeta(name) + `:[ \t]*(.*)$`).FindSubmatch(out)
		if m == nil {
			t.Fatalf("no %q in %s", name, out)
		}
		return strings.TrimSpace(string(m[1]))
	}
	tree := scanOf(t, dev)
	g := tree.vol.geo
	_, free, _, err := tree.Usage()
	if err != nil {
		t.Fatal(err)
	}
	for name, got := range map[string]string{
		"Volume Length(sectors)":              fmt.Sprint(g.Sectors),
		"FAT Offset(sector offset)":           fmt.Sprint(g.FATOffset),
		"FAT Length(sectors)":                 fmt.Sprint(g.FATLength),
		"Cluster Heap Offset (sector offset)": fmt.Sprint(g.HeapOffset),
		"Cluster Count":                       fmt.Sprint(g.ClusterCount),
		"Root Cluster (cluster offset)":       fmt.Sprint(g.Root),
		"Volume Serial":                       fmt.Sprintf("0x%x", g.Serial),
		"Cluster size":                        fmt.Sprint(g.ClusterSize),
		"Free Clusters":                       fmt.Sprint(free),
	} {
		if want := field(name); got != want {
			t.Errorf("%s is %s, dump.exfat says %s", name, got, want)
		}
	}
	if want := field("Volume label character count"); want != fmt.Sprint(len(utf16.Encode([]rune(tree.Label)))) {
		t.Errorf("the label is %q, dump.exfat says %s characters", tree.Label, want)
	}
}

func openDevice(t testing.TB, path string) blockdev.Device {
	t.Helper()
	d, err := blockdev.Open(path, blockdev.ReadOnly)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { d.Close() })
	return d
}

// Volumes of mkfs.exfat, with each size of cluster that it makes.
func TestMkfs(t *testing.T) {
	mkfs := judge(t, "mkfs.exfat")
	for shift := 9; shift <= 25; shift++ {
		for _, opt := range [][]string{{"-L", "Ünï 😀🐧"}, {"--pack-bitmap"}} {
			path := filepath.Join(t.TempDir(), "mkfs.img")
			size := max(int64(8<<20), 40<<shift)
			if err := errors.Join(os.WriteFile(path, nil, 0o600), os.Truncate(path, size)); err != nil {
				t.Fatal(err)
			}
			if out, err := exec.Command(mkfs, append(opt, "-c", strconv.Itoa(1<<shift), path)...).CombinedOutput(); err != nil {
				t.Fatalf("%v: %s", err, out)
			}
			dev := openDevice(t, path)
			tree := sound(t, dev)
			if opt[0] == "-L" && tree.Label != opt[1] {
				t.Errorf("label %q", tree.Label)
			}
			if len(tree.Root.Children) != 0 || tree.vol.geo.ClusterSize != 1<<shift {
				t.Errorf("%d entries, clusters of %d bytes", len(tree.Root.Children), tree.vol.geo.ClusterSize)
			}
			sameAsDump(t, path, dev)
			os.Remove(path)
		}
	}
}

// loop makes a loop device with a sector size, for root.
func loop(t testing.TB, path string, sector int) string {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("loop devices need root")
	}
	out, err := exec.Command(judge(t, "losetup"), "--sector-size", strconv.Itoa(sector), "--find", "--show", path).CombinedOutput()
	if err != nil {
		t.Skipf("no loop devices here: %s", out)
	}
	node := strings.TrimSpace(string(out))
	t.Cleanup(func() { exec.Command("losetup", "-d", node).Run() })
	return node
}

// mount mounts a volume through exfat-fuse and returns the mount point, and what unmounts it.
func mount(t testing.TB, node, opt string) (string, func()) {
	t.Helper()
	tool := judge(t, "mount.exfat-fuse")
	at := t.TempDir()
	if out, err := exec.Command(tool, "-o", opt, node, at).CombinedOutput(); err != nil {
		t.Skipf("exfat-fuse does not mount here: %v: %s", err, out)
	}
	done := false
	umount := func() {
		if !done {
			if out, err := exec.Command("umount", at).CombinedOutput(); err != nil {
				t.Errorf("umount: %s", out)
			}
			done = true
			// The mount helper ends a moment later.
			for range 100 {
				if f, err := os.OpenFile(node, os.O_RDWR|os.O_EXCL, 0); err == nil {
					f.Close()
					break
				}
				time.Sleep(20 * time.Millisecond)
			}
		}
	}
	t.Cleanup(umount)
	return at, umount
}

// fill writes what is wanted into a mounted volume.
func fill(t testing.TB, at string, list []*want) {
	t.Helper()
	for _, f := range list {
		p := filepath.Join(at, f.name)
		var err error
		switch {
		case f.isDir:
			if err = os.Mkdir(p, 0o755); err == nil {
				fill(t, p, f.dir)
			}
		case f.deleted:
			err = errors.Join(os.WriteFile(p, random(10_000), 0o644), os.Remove(p))
		default:
			err = os.WriteFile(p, f.content(), 0o644)
			f.attr = 0x20 // what exfat-fuse makes
		}
		if err != nil {
			t.Fatal(err)
		}
	}
}

// Volumes that mkfs.exfat made and exfat-fuse filled: deleted entries, holes and fragments are those of a real driver.
func TestFilledByFuse(t *testing.T) {
	mkfs := judge(t, "mkfs.exfat")
	for _, c := range []struct{ sector, cluster int }{{512, 512}, {512, 4096}, {4096, 4096}, {4096, 65536}} {
		t.Run(fmt.Sprintf("%d-%d", c.sector, c.cluster), func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "fuse.img")
			if err := errors.Join(os.WriteFile(path, nil, 0o600), os.Truncate(path, 64<<20)); err != nil {
				t.Fatal(err)
			}
			node := loop(t, path, c.sector)
			if out, err := exec.Command(mkfs, "-c", strconv.Itoa(c.cluster), "-L", "FÜLLE 😀", node).CombinedOutput(); err != nil {
				t.Fatalf("%v: %s", err, out)
			}
			at, umount := mount(t, node, "noatime")
			names := manyNames
			if testing.Short() {
				names = 500
			}
			list := everyCase(names)
			fill(t, at, list)
			// Two files that grow in turns, and a third into the holes of a deleted one.
			a, b := file("turn a", random(300_000)), file("turn b", random(300_001))
			for i := 0; i < 300_000; i += 30_000 {
				for _, f := range []*want{a, b} {
					h, err := os.OpenFile(filepath.Join(at, f.name), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
					if err != nil {
						t.Fatal(err)
					}
					end := min(len(f.data), i+30_000)
					if i == 270_000 {
						end = len(f.data)
					}
					if _, err := h.Write(f.data[i:end]); err != nil {
						t.Fatal(err)
					}
					h.Close()
				}
			}
			a.attr, b.attr = 0x20, 0x20
			list = append(list, a, b)
			umount()
			dev := openDevice(t, node)
			tree := sound(t, dev)
			compare(t, tree, tree.Root, list)
			if dev.SectorSize() != c.sector || tree.vol.geo.SectorSize != c.sector || tree.Label != "FÜLLE 😀" {
				t.Errorf("sectors of %d and %d bytes, label %q", dev.SectorSize(), tree.vol.geo.SectorSize, tree.Label)
			}
			turn := tree.Lookup("turn a")
			if len(turn.runs) < 2 && c.cluster < 65536 {
				t.Errorf("turn a has %d fragments", len(turn.runs))
			}
			if now := time.Since(turn.Modified); now < -2*time.Second || now > time.Hour {
				t.Errorf("turn a was modified at %v, now is %v", turn.Modified, time.Now())
			}
			fsck(t, node, tree)
		})
	}
}

// exfat-fuse reads what the tests' writer made as it was meant.
func TestFuseReadsTheWriter(t *testing.T) {
	for _, name := range []string{"sector 512, cluster 4096", "sector 4096, cluster 32768"} {
		l := layouts[name]
		l.guid = false
		list := plainCases(300)
		path := saved(t, writeVolume(t, l, list...))
		at, _ := mount(t, loop(t, path, 1<<l.sectorShift), "ro")
		var same func(at string, list []*want)
		same = func(at string, list []*want) {
			entries, err := os.ReadDir(at)
			if err != nil || len(entries) != len(live(list)) {
				t.Errorf("%s: %d entries, %v", at, len(entries), err)
			}
			for _, f := range live(list) {
				p := filepath.Join(at, f.name)
				if f.isDir {
					same(p, f.dir)
				} else if f.valid >= 0 {
					continue // this version reads what was never written
				} else if b, err := os.ReadFile(p); err != nil || !bytes.Equal(b, f.content()) {
					t.Errorf("%s: %v, or it differs", p, err)
				}
			}
		}
		same(at, list)
	}
}

// A file of more than 4 GiB, in a sparse image: contiguous, and in fragments.
func TestHuge(t *testing.T) {
	const size = 9<<29 + 12345 // 4.5 GiB
	pieces := map[int64][]byte{0: []byte("begin"), 1<<32 - 3: []byte("across 4 GiB"), 1 << 32: nil, 1<<31 - 2: []byte("across 2 GiB"), size - 3: []byte("end")}
	for _, fragment := range []int{0, 1000} {
		f := file("huge.img", nil)
		f.size, f.pieces, f.fragment, f.valid = size, pieces, fragment, size
		dev := writeVolume(t, layout{size: 5 << 30, sectorShift: 9, clusShift: 6}, f, file("small", random(5)))
		tree := sound(t, dev)
		n := tree.Lookup("HUGE.IMG")
		if n.Size() != size {
			t.Errorf("%d bytes", n.Size())
		}
		r, err := tree.Open(n)
		if err != nil {
			t.Fatal(err)
		}
		for off, want := range pieces {
			b := make([]byte, len(want)+20)
			lo := max(0, off-10)
			k, _ := r.ReadAt(b, lo)
			expect := make([]byte, k)
			for o, p := range pieces {
				for i, c := range p {
					if at := o + int64(i) - lo; at >= 0 && at < int64(k) {
						expect[at] = c
					}
				}
			}
			if !bytes.Equal(b[:k], expect) || k == 0 {
				t.Errorf("fragments of %d: at %d: %q, want %q", fragment, lo, b[:k], expect)
			}
		}
		if k, err := r.ReadAt(make([]byte, 10), size); k != 0 || err != io.EOF {
			t.Errorf("%d, %v", k, err)
		}
		if !testing.Short() {
			fsck(t, saved(t, dev), tree)
		}
	}
}

func TestTexFAT(t *testing.T) {
	for active := range 2 {
		list := everyCase(50)
		l := layout{size: 32 << 20, sectorShift: 9, clusShift: 3, fats: 2, active: active}
		dev := writeVolume(t, l, list...)
		tree := sound(t, dev)
		compare(t, tree, tree.Root, list)
		// With the main boot region gone, nobody knows which FAT counts.
		dev.WriteAt(make([]byte, 512), 0)
		if _, err := Open(dev); !errors.Is(err, ErrNotExFAT) || !strings.Contains(err.Error(), "which of the 2 FATs") {
			t.Error(err)
		}
	}
}

// Each part of the main boot region is destroyed in turn; the backup serves, and a finding says so.
func TestBackupBootRegion(t *testing.T) {
	for name, l := range layouts {
		list := everyCase(20)
		good := writeVolume(t, l, list...)
		region := int64(12) << l.sectorShift
		for _, c := range []struct{ off, n int64 }{{0, 512}, {0, region}, {3, 1}, {108, 1}, {510, 2}, {72, 8}, {region - 4, 4}, {region / 2, 1}} {
			dev := good.Clone()
			b := make([]byte, c.n)
			dev.ReadAt(b, c.off)
			for i := range b {
				b[i] ^= 0x55
			}
			dev.WriteAt(b, c.off)
			tree := scanOf(t, dev)
			if !tree.vol.geo.Backup || len(tree.Findings) != 1 || tree.Findings[0].Severity != volumetree.Warning || tree.Damage() != nil {
				t.Errorf("%s: %v: %v", name, c, tree.Findings)
			}
			compare(t, tree, tree.Root, list)
			dev.WriteAt(make([]byte, region), region)
			if _, err := Open(dev); !errors.Is(err, ErrNotExFAT) {
				t.Errorf("%s: %v without a backup: %v", name, c, err)
			}
		}
	}
}

// Every field of the boot sector with a value that cannot be, under a right checksum.
func TestBootFields(t *testing.T) {
	le := binary.LittleEndian
	good := image(t, writeVolume(t, layout{size: 4 << 20, sectorShift: 9, clusShift: 3}, file("a", random(5000))))
	size := uint64(len(good))
	count := le.Uint32(good[92:])
	for _, c := range []struct {
		what string
		f    func(b []byte)
		want string // "" is fine
	}{
		{"nothing", func(b []byte) {}, ""},
		{"partition offset", func(b []byte) { le.PutUint64(b[64:], 1<<63) }, ""},
		{"jump", func(b []byte) { b[0] = 0xE9 }, "JumpBoot"},
		{"name", func(b []byte) { copy(b[3:], "NTFS    ") }, "filesystem name"},
		{"FAT parameters", func(b []byte) { b[63] = 1 }, "not zero"},
		{"signature", func(b []byte) { b[510] = 0 }, "BootSignature"},
		{"length 0", func(b []byte) { le.PutUint64(b[72:], 0) }, "VolumeLength"},
		{"length 1", func(b []byte) { le.PutUint64(b[72:], size/512+1) }, "VolumeLength"},
		{"length max", func(b []byte) { le.PutUint64(b[72:], 1<<64-1) }, "VolumeLength"},
		{"shorter than the heap", func(b []byte) { le.PutUint64(b[72:], size/512-16) }, "do not fit"},
		{"FAT offset 0", func(b []byte) { le.PutUint32(b[80:], 0) }, "FatOffset"},
		{"FAT offset 23", func(b []byte) { le.PutUint32(b[80:], 23) }, "FatOffset"},
		{"FAT offset max", func(b []byte) { le.PutUint32(b[80:], 1<<32-1) }, "ClusterHeapOffset"},
		{"FAT length 0", func(b []byte) { le.PutUint32(b[84:], 0) }, "FatLength"},
		{"FAT length short", func(b []byte) { le.PutUint32(b[84:], (count+2)*4/512-1) }, "FatLength"},
		{"FAT length max", func(b []byte) { le.PutUint32(b[84:], 1<<32-1) }, "ClusterHeapOffset"},
		{"heap 0", func(b []byte) { le.PutUint32(b[88:], 0) }, "ClusterHeapOffset"},
		{"heap max", func(b []byte) { le.PutUint32(b[88:], 1<<32-1) }, "do not fit"},
		{"no cluster", func(b []byte) { le.PutUint32(b[92:], 0) }, "ClusterCount"},
		{"clusters", func(b []byte) { le.PutUint32(b[92:], count+8) }, ""},
		{"clusters max", func(b []byte) { le.PutUint32(b[92:], 1<<32-1) }, "ClusterCount"},
		{"clusters many", func(b []byte) { le.PutUint32(b[92:], 1<<32-12) }, "FatLength"},
		{"root 0", func(b []byte) { le.PutUint32(b[96:], 0) }, "root directory"},
		{"root 1", func(b []byte) { le.PutUint32(b[96:], 1) }, "root directory"},
		{"root behind", func(b []byte) { le.PutUint32(b[96:], count+2) }, "root directory"},
		{"root max", func(b []byte) { le.PutUint32(b[96:], 1<<32-1) }, "root directory"},
		{"revision 0", func(b []byte) { le.PutUint16(b[104:], 0) }, "revision"},
		{"revision 1.99", func(b []byte) { le.PutUint16(b[104:], 0x163) }, ""},
		{"revision 1.100", func(b []byte) { le.PutUint16(b[104:], 0x164) }, "revision"},
		{"revision 2", func(b []byte) { le.PutUint16(b[104:], 0x200) }, "revision"},
		{"second FAT", func(b []byte) { b[106] = 1 }, "second FAT"},
		{"sector 256", func(b []byte) { b[108] = 8 }, "BytesPerSectorShift"},
		{"sector 8192", func(b []byte) { b[108] = 13 }, "BytesPerSectorShift"},
		{"sector 1<<255", func(b []byte) { b[108] = 255 }, "BytesPerSectorShift"},
		{"cluster 64 MiB", func(b []byte) { b[109] = 17 }, "clusters have"},
		{"cluster 1<<255", func(b []byte) { b[109] = 255 }, "clusters have"},
		{"cluster 32 MiB", func(b []byte) { b[109] = 16 }, "do not fit"},
		{"no FAT", func(b []byte) { b[110] = 0 }, "NumberOfFats"},
		{"three FATs", func(b []byte) { b[110] = 3 }, "NumberOfFats"},
		{"percent", func(b []byte) { b[112] = 200 }, ""},
	} {
		b := slices.Clone(good)
		c.f(b)
		sealRegion(b[:12*512])
		copy(b[12*512:24*512], b[:12*512])
		v, err := Open(&fenced{blockdev.NewMem(b, 512), t, int64(len(b))})
		switch {
		case c.what == "clusters":
			if err == nil || !errors.Is(err, ErrNotExFAT) {
				t.Errorf("%s: %v", c.what, err)
			}
		case c.want == "":
			if err != nil {
				t.Errorf("%s: %v", c.what, err)
			} else if tree, err := v.Scan(); err != nil || tree.Damage() != nil {
				t.Errorf("%s: %v, %v", c.what, err, tree.Findings)
			}
		case !errors.Is(err, ErrNotExFAT) || !strings.Contains(err.Error(), c.want):
			t.Errorf("%s: %v, want %s", c.what, err, c.want)
		}
	}
	for n := range []int{0, 1, 511, 512, 1<<20 - 1} {
		if _, err := Open(blockdev.NewMem(good[:n], 512)); !errors.Is(err, ErrNotExFAT) {
			t.Errorf("%d bytes: %v", n, err)
		}
	}
	if v, err := Open(blockdev.NewMem(append(slices.Clone(good), make([]byte, 99999)...), 512)); err != nil || v.UUID() != "1234-ABCD" {
		t.Error(err)
	}
}

// What is wrong with files is found, named, and spares the others.
func TestFindings(t *testing.T) {
	le := binary.LittleEndian
	stream := func(f func(s []byte)) func([]byte) { return func(set []byte) { f(set[32:]) } }
	for name, c := range map[string]struct {
		f    func(f *want)
		late func(t *testing.T, b []byte, cluster uint32) // on the finished image; cluster is the file's first
		want string
	}{
		"valid more than all":   {f: func(f *want) { f.patch = stream(func(s []byte) { le.PutUint64(s[8:], 99999) }) }, want: "valid bytes"},
		"first cluster 1":       {f: func(f *want) { f.patch = stream(func(s []byte) { le.PutUint32(s[20:], 1) }) }, want: "is outside"},
		"first cluster max":     {f: func(f *want) { f.patch = stream(func(s []byte) { le.PutUint32(s[20:], 1<<32-1) }) }, want: "is outside"},
		"chain at max":          {f: func(f *want) { f.fat = true; f.patch = stream(func(s []byte) { le.PutUint32(s[20:], 1<<32-1) }) }, want: "is outside"},
		"size max":              {f: func(f *want) { f.patch = stream(func(s []byte) { le.PutUint64(s[24:], 1<<64-1) }) }, want: "beyond the last"},
		"size max, chain":       {f: func(f *want) { f.fat = true; f.patch = stream(func(s []byte) { le.PutUint64(s[24:], 1<<63) }) }, want: "ends after"},
		"longer than its chain": {f: func(f *want) { f.fat = true; f.patch = stream(func(s []byte) { le.PutUint64(s[24:], 40000) }) }, want: "ends after 3 clusters, want 10"},
		"shared":                {f: func(f *want) { f.patch = stream(func(s []byte) { le.PutUint32(s[20:], 2) }) }, want: "belongs to another"},
		"no allocation":         {f: func(f *want) { f.patch = stream(func(s []byte) { s[1] = 0 }) }, want: "no clusters"},
		"no clusters":           {f: func(f *want) { f.patch = stream(func(s []byte) { le.PutUint32(s[20:], 0) }) }, want: "is outside"},
		"hash":                  {f: func(f *want) { f.patch = stream(func(s []byte) { s[4]++ }) }, want: "hash"},
		"slash":                 {f: func(f *want) { f.name = "a/b" }, want: "character"},
		"control":               {f: func(f *want) { f.name = "a\nb" }, want: "character"},
		"zero":                  {f: func(f *want) { f.name = "a\x00b" }, want: "character"},
		"dot dot":               {f: func(f *want) { f.name = ".." }, want: "reserved"},
		"twice":                 {f: func(f *want) { f.name = "OTHER" }, want: "equals that"},
		"no name":               {f: func(f *want) { f.patch = stream(func(s []byte) { s[3] = 0 }) }, want: "no characters"},
		"longer name":           {f: func(f *want) { f.patch = stream(func(s []byte) { s[3] = 16 }) }, want: "has 1 entries, want 2"},
		"shorter name":          {f: func(f *want) { f.name = strings.Repeat("n", 40); f.patch = stream(func(s []byte) { s[3] = 16 }) }, want: "more than 2"},
		"two streams":           {f: func(f *want) { f.benign = [][32]byte{{0xC0}} }, want: "two stream"},
		"critical secondary":    {f: func(f *want) { f.benign = [][32]byte{{0xC5}} }, want: "not known"},
		"critical primary":      {f: func(f *want) { f.patch = func(s []byte) { s[0] = 0x86 } }, want: "not known"},
		"bitmap in the wrong place": {f: func(f *want) {
			f.name, f.isDir, f.data = "d", true, nil
			f.dir = []*want{{name: "x", valid: -1, patch: func(s []byte) { s[0] = 0x81 }}}
		}, want: "only allowed in the root"},
		"no stream":       {f: func(f *want) { f.patch = func(s []byte) { s[32] = 0xC1 } }, want: "no stream"},
		"too few":         {f: func(f *want) { f.patch = func(s []byte) { s[1] = 7 } }, want: "secondary entries, want 7"},
		"secondary alone": {f: func(f *want) { f.patch = func(s []byte) { s[0] = 0x05 } }, want: "belongs to no set"},
		"directory size":  {f: func(f *want) { f.attr = 0x10 }, want: "whole clusters"},
		"directory valid": {f: func(f *want) {
			f.attr, f.data = 0x10, make([]byte, 4096)
			f.patch = stream(func(s []byte) { s[8]-- })
		}, want: "valid bytes"},
		"directory too long": {f: func(f *want) {
			f.attr = 0x10
			f.patch = stream(func(s []byte) { le.PutUint64(s[8:], 1<<29); le.PutUint64(s[24:], 1<<29) })
		}, want: "whole clusters"},
		"checksum": {late: func(t *testing.T, b []byte, c uint32) {
			i := bytes.Index(b, append([]byte{0xC1, 0}, utf16le("victim")...))
			b[i+31]++
		}, want: "the checksum of a set"},
		"free in the bitmap": {late: func(t *testing.T, b []byte, c uint32) {
			b[bitmapAt(b)+int(c-2+1)/8] &^= 1 << ((c - 2 + 1) % 8)
		}, want: "free in the allocation bitmap"},
		"loop":        {f: fatFile, late: fatEntry(1, 0), want: "is a loop"},
		"into itself": {f: fatFile, late: fatEntry(0, 0), want: "is a loop"},
		"bad cluster": {f: fatFile, late: fatEntry(0, badCluster), want: "marked bad"},
		"free":        {f: fatFile, late: fatEntry(0, -2), want: "free in the FAT"},
		"out":         {f: fatFile, late: fatEntry(0, 0x7FFFFFFF), want: "is outside"},
	} {
		t.Run(name, func(t *testing.T) {
			victim := file("victim", random(10_000))
			if c.f != nil {
				c.f(victim)
			}
			before, other := file("other", random(4000)), file("last", random(4097))
			dev := writeVolume(t, layout{size: 2 << 20, sectorShift: 9, clusShift: 3}, before, victim, other)
			b := image(t, dev)
			if c.late != nil {
				i := bytes.Index(b, append([]byte{0xC1, 0}, utf16le("victim")...))
				c.late(t, b, le.Uint32(b[i-32+20:]))
			}
			tree := scanOf(t, blockdev.NewMem(b, 512))
			err := tree.Damage()
			if !errors.Is(err, ErrDamaged) || !strings.Contains(err.Error(), c.want) {
				t.Errorf("%v, want %s", tree.Findings, c.want)
			}
			for _, f := range []*want{before, other} {
				n := tree.Lookup(f.name)
				if n == nil {
					t.Fatalf("%s is gone: %v", f.name, tree.Findings)
				}
				if r, err := tree.Open(n); err != nil {
					t.Error(err)
				} else if got, err := io.ReadAll(r); err != nil || !bytes.Equal(got, f.data) {
					t.Errorf("%s differs: %v", f.name, err)
				}
			}
			walkFS(tree)
		})
	}
}

func fatFile(f *want) { f.fat = true }

// fatEntry changes the entry of the file's cluster number i: to one of its own, to a value, or to 0 (-2).
func fatEntry(i int, to int64) func(*testing.T, []byte, uint32) {
	return func(t *testing.T, b []byte, c uint32) {
		le := binary.LittleEndian
		v := uint32(to)
		switch to {
		case 0:
			v = c
		case -2:
			v = 0
		}
		le.PutUint32(b[int(le.Uint32(b[80:]))*512+4*(int(c)+i):], v)
	}
}

func utf16le(s string) (b []byte) {
	for _, u := range utf16.Encode([]rune(s)) {
		b = binary.LittleEndian.AppendUint16(b, u)
	}
	return b
}

// bitmapAt is where the bitmap of a volume of the tests' writer is: in its first cluster.
func bitmapAt(b []byte) int { return int(binary.LittleEndian.Uint32(b[88:])) * 512 }

// The structures of the volume itself.
func TestVolumeFindings(t *testing.T) {
	le := binary.LittleEndian
	root := func(b []byte) []byte {
		c := le.Uint32(b[96:])
		return b[bitmapAt(b)+int(c-2)*4096:][:4096]
	}
	for name, c := range map[string]struct {
		f    func(b []byte)
		sev  volumetree.Severity
		want string
	}{
		"dirty":            {func(b []byte) { b[106] |= 2 }, volumetree.Warning, "dirty"},
		"medium":           {func(b []byte) { b[106] |= 4 }, volumetree.Warning, "medium"},
		"label":            {func(b []byte) { root(b)[1] = 12 }, volumetree.Warning, "label"},
		"label max":        {func(b []byte) { root(b)[1] = 255 }, volumetree.Warning, "label"},
		"no bitmap":        {func(b []byte) { root(b)[32] = 0x01 }, volumetree.Damage, "no allocation bitmap"},
		"second bitmap":    {func(b []byte) { root(b)[33] = 1 }, volumetree.Damage, "allocation bitmap 1"},
		"short bitmap":     {func(b []byte) { le.PutUint64(root(b)[32+24:], 1) }, volumetree.Damage, "has 1 bytes"},
		"huge bitmap":      {func(b []byte) { le.PutUint64(root(b)[32+24:], 1<<64-1) }, volumetree.Damage, "ends after"},
		"bitmap at 0":      {func(b []byte) { le.PutUint32(root(b)[32+20:], 0) }, volumetree.Damage, "is outside"},
		"empty bitmap":     {func(b []byte) { clear(b[bitmapAt(b):][:64]) }, volumetree.Damage, "free in the allocation bitmap"},
		"no table":         {func(b []byte) { root(b)[64] = 0x02 }, volumetree.Damage, "there is none"},
		"table checksum":   {func(b []byte) { root(b)[64+4]++ }, volumetree.Damage, "checksum"},
		"table changed":    {func(b []byte) { b[bitmapAt(b)+4096+100]++ }, volumetree.Damage, "checksum"},
		"table of nothing": {func(b []byte) { le.PutUint64(root(b)[64+24:], 0) }, volumetree.Damage, "has 0 bytes"},
		"table huge":       {func(b []byte) { le.PutUint64(root(b)[64+24:], 1<<17+2) }, volumetree.Damage, "bytes, want"},
		"table at max":     {func(b []byte) { le.PutUint32(root(b)[64+20:], 1<<32-1) }, volumetree.Damage, "is outside"},
		"table maps a": {func(b []byte) {
			n := le.Uint64(root(b)[64+24:])
			table := b[bitmapAt(b)+4096:][:n]
			i := bytes.Index(table, []byte{'A', 0, 'B', 0})
			table[i] = 'Z'
			le.PutUint32(root(b)[64+4:], sum32(table, false))
		}, volumetree.Damage, "maps 0x0061"},
		"root loop": {func(b []byte) {
			c := le.Uint32(b[96:])
			le.PutUint32(b[int(le.Uint32(b[80:]))*512+4*int(c):], c)
		}, volumetree.Damage, "is a loop"},
	} {
		b := image(t, writeVolume(t, layout{size: 2 << 20, sectorShift: 9, clusShift: 3, label: "x"}, everySmall()...))
		c.f(b)
		tree := scanOf(t, blockdev.NewMem(b, 512))
		found := slices.ContainsFunc(tree.Findings, func(f Finding) bool { return f.Severity == c.sev && strings.Contains(f.Msg, c.want) })
		if !found || (tree.Damage() != nil) != (c.sev == volumetree.Damage) {
			t.Errorf("%s: %v", name, tree.Findings)
		}
		walkFS(tree)
		tree.Usage()
	}
}

// everySmall is a small tree.
func everySmall() []*want {
	chained, frag, half := file("chained", random(9000)), file("fragmented", random(20_000)), file("half", random(3000))
	chained.fat, frag.fragment, half.size, half.valid = true, 1, 9000, 3000
	gone := file("gone", nil)
	gone.deleted = true
	d := dir("directory", file("Ä😀", random(513)), gone, dir("below", file("deep", random(2))), dir("empty"))
	d.fragment, d.extra = 1, 1
	return []*want{file("contiguous", random(9000)), gone, chained, d, frag, half, file("nothing", nil)}
}

// A directory that is its own descendant ends, as does one that nests too deep.
func TestDirectoryLoops(t *testing.T) {
	w := dir("top", dir("below", file("x", nil)))
	dev := writeVolume(t, layout{size: 2 << 20, sectorShift: 9, clusShift: 0}, w)
	b := image(t, dev)
	le := binary.LittleEndian
	at := func(name string) int { return bytes.Index(b, append([]byte{0xC1, 0}, utf16le(name)...)) - 64 }
	top := le.Uint32(b[at("top")+32+20:])
	set := b[at("below"):][:96]
	le.PutUint32(set[32+20:], top)
	seal(set)
	tree := scanOf(t, blockdev.NewMem(b, 512))
	if err := tree.Damage(); err == nil || !strings.Contains(err.Error(), "is a loop") {
		t.Error(tree.Findings)
	}
	walkFS(tree)

	deep := dir("d")
	for range 300 {
		deep = dir("d", deep)
	}
	tree = scanOf(t, writeVolume(t, layout{size: 2 << 20, sectorShift: 9, clusShift: 0}, deep))
	if err := tree.Damage(); err == nil || !strings.Contains(err.Error(), "nest deeper than 256") {
		t.Error(tree.Findings)
	}
}

// Names that are no UTF-8: they stay apart, and io/fs can have them.
func TestLoneSurrogates(t *testing.T) {
	var list []*want
	for _, u := range [][]uint16{{0xD83D}, {0xDE00}, {0xDE00, 0xD83D}, {'a', 0xD800, 'b'}, {0xD83D, 0xDE00}} {
		list = append(list, &want{name: fromUnits(u), units: u, data: random(len(u)), valid: -1})
	}
	tree := sound(t, writeVolume(t, layout{size: 2 << 20, sectorShift: 9}, list...))
	compare(t, tree, tree.Root, list)
	if err := walkFS(tree); err != nil {
		t.Error(err)
	}
}

func TestTimes(t *testing.T) {
	at := func(y, mo, d, h, mi, s int) uint32 {
		return uint32(y-1980)<<25 | uint32(mo)<<21 | uint32(d)<<16 | uint32(h)<<11 | uint32(mi)<<5 | uint32(s/2)
	}
	for _, c := range []struct {
		raw  uint32
		tens byte
		zone byte
		want string
	}{
		{at(2024, 2, 29, 12, 34, 58), 199, 0, "2024-02-29T12:34:59.99Z"}, // no offset: taken for UTC
		{at(2024, 2, 29, 12, 34, 58), 0, 0x80, "2024-02-29T12:34:58Z"},
		{at(2024, 1, 1, 0, 30, 0), 5, 0x80 | 4, "2023-12-31T23:30:00.05Z"},     // UTC+1
		{at(2024, 1, 1, 0, 30, 0), 0, 0x80 | 0x6C, "2024-01-01T05:30:00Z"},     // UTC-5
		{at(2024, 1, 1, 0, 30, 0), 200, 0x80 | 22, "2023-12-31T19:00:00Z"},     // UTC+5:30; a tenth too many
		{at(2107, 12, 31, 23, 59, 58), 0, 0x80 | 0x40, "2108-01-01T15:59:58Z"}, // UTC-16
		{at(1980, 1, 1, 0, 0, 0), 0, 0, "1980-01-01T00:00:00Z"},
		{at(2023, 2, 29, 0, 0, 0), 0, 0, ""},
		{at(2023, 0, 1, 0, 0, 0), 0, 0, ""},
		{at(2023, 1, 0, 0, 0, 0), 0, 0, ""},
		{at(2023, 1, 1, 24, 0, 0), 0, 0, ""},
		{at(2023, 1, 1, 0, 60, 0), 0, 0, ""},
		{at(2023, 1, 1, 0, 0, 60), 0, 0, ""},
		{0, 0, 0, ""},
	} {
		f := file("x", nil)
		f.times, f.tens, f.zones = [3]uint32{c.raw, c.raw, c.raw}, [2]byte{c.tens, c.tens}, [3]byte{c.zone, c.zone, c.zone}
		if c.raw == 0 {
			f.patch = func(set []byte) { clear(set[8:20]) }
		}
		n := sound(t, writeVolume(t, layout{size: 1 << 20, sectorShift: 9}, f)).Lookup("x")
		want := time.Time{}
		if c.want != "" {
			want, _ = time.Parse(time.RFC3339Nano, c.want)
		}
		if !n.Created.Equal(want) || !n.Modified.Equal(want) || !n.Accessed.Equal(want.Truncate(2*time.Second)) && !want.IsZero() || want.IsZero() && !n.Accessed.IsZero() {
			t.Errorf("0x%08x: %v, %v, %v, want %v", c.raw, n.Created, n.Modified, n.Accessed, want)
		}
	}
}

// walkFS reads everything through io/fs, and returns the first error.
func walkFS(tree *Tree) error {
	var first error
	fs.WalkDir(tree.FS(), ".", func(p string, e fs.DirEntry, err error) error {
		if err == nil && !e.IsDir() {
			var f fs.File
			if f, err = tree.FS().Open(p); err == nil {
				_, err = io.Copy(io.Discard, io.LimitReader(f, 1<<22))
			}
		}
		if err != nil && first == nil {
			first = err
		}
		return nil
	})
	return first
}

func TestFS(t *testing.T) {
	tree := sound(t, writeVolume(t, layouts["sector 512, cluster 4096"], everySmall()...))
	if err := fstest.TestFS(tree.FS(), "contiguous", "directory/Ä😀", "directory/below/deep", "nothing"); err != nil {
		t.Error(err)
	}
	for p, ok := range map[string]bool{"DIRECTORY/ä😀": true, "directory/gone": false, "gone": false, "contiguous/x": false, "Contiguous": true, ".": true} {
		if _, err := fs.Stat(tree.FS(), p); (err == nil) != ok {
			t.Errorf("%s: %v", p, err)
		}
	}
}

// A read that fails is an error, whichever it is, and never another tree.
func TestReadFaults(t *testing.T) {
	for _, l := range []layout{{size: 2 << 20, sectorShift: 9, clusShift: 0}, {size: 2 << 20, sectorShift: 12, clusShift: 0, fats: 2, active: 1}} {
		list := everySmall()
		dev := writeVolume(t, l, list...)
		broken := errors.New("the medium is broken")
		read := func(k int) (n int, all bool) {
			faulty := blockdev.NewFaulty(dev, func(op blockdev.Op) error {
				if n++; n == k {
					return broken
				}
				return nil
			})
			v, err := Open(faulty)
			if err == nil {
				var tree *Tree
				if tree, err = v.Scan(); err == nil {
					if f := tree.Findings; len(f) > 0 && (!v.geo.Backup || len(f) > 1) {
						t.Errorf("read %d: %v", k, f)
					}
					err = compareOrError(t, tree, list)
					if err == nil {
						_, _, _, err = tree.Usage()
					}
				}
			}
			if n >= k && err == nil && !v.geo.Backup {
				t.Errorf("read %d failed, and nobody noticed", k)
			}
			if err != nil && !errors.Is(err, broken) {
				t.Errorf("read %d: %v", k, err)
			}
			return n, n < k
		}
		for k := 1; ; k++ {
			if n, all := read(k); all {
				if n < 20 {
					t.Errorf("only %d reads", n)
				}
				break
			}
		}
	}
}

// compareOrError is compare, where a read may fail.
func compareOrError(t *testing.T, tree *Tree, list []*want) error {
	var first error
	var walk func(at string, list []*want)
	walk = func(at string, list []*want) {
		for _, f := range live(list) {
			n := tree.Lookup(at + "/" + f.name)
			if n == nil {
				t.Errorf("%s is not there", f.name)
				continue
			}
			if f.isDir {
				walk(at+"/"+f.name, f.dir)
				continue
			}
			r, err := tree.Open(n)
			if err != nil {
				t.Error(err)
				continue
			}
			got, err := io.ReadAll(r)
			if err != nil && first == nil {
				first = err
			}
			if data := f.content(); !bytes.Equal(got, data[:min(len(got), len(data))]) || err == nil && len(got) != len(data) {
				t.Errorf("%s differs", f.name)
			}
		}
	}
	walk("", list)
	return first
}

// The library is kept from what it cannot do, and what it does all the same becomes an error.
func TestGuard(t *testing.T) {
	for what, f := range map[string]func() error{
		"panics with an error":  func() error { panic(io.ErrUnexpectedEOF) },
		"panics with a string":  func() error { panic("so what") },
		"panics with a runtime": func() error { var p *layout; _ = p.size; return nil },
		"returns an error":      func() error { return io.EOF },
	} {
		if err := guard("it", f); err == nil || !strings.HasPrefix(err.Error(), "cannot decode it: ") {
			t.Errorf("%s: %v", what, err)
		}
	}
	d, err := newDecoder()
	if err != nil {
		t.Fatal(err)
	}
	for _, first := range []byte{0x84, 0xA5, 0xC7, 0xE9, 0x9F} {
		set := make([]byte, 96)
		set[0], set[1], set[32], set[64] = first, 2, 0xC0, 0xC1
		if _, err := d.decode(set); err == nil {
			t.Errorf("0x%02x was decoded", first)
		}
	}
	// And it goes on afterwards.
	f := (&writer{}).set(file("good", nil), nil, 0, 0)
	if e, err := d.decode(append(slices.Clone(f), f...)); err != nil || len(e) != 2 || e[1].nameLength != 4 {
		t.Errorf("%v, %v", e, err)
	}
}

// A variable in the environment does not keep the program from starting.
func TestEnvironment(t *testing.T) {
	cmd := exec.Command(os.Args[0], "-test.run", "^$")
	cmd.Env = append(os.Environ(), "LogExcludeBypassLevelName=x")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Errorf("%v: %s", err, out)
	}
}

// Reads of a contiguous file are as large as the caller asks for, and metadata comes in large pieces.
func TestReadSizes(t *testing.T) {
	big := file("big", random(8<<20))
	dev := blockdev.NewCounting(writeVolume(t, layout{size: 16 << 20, sectorShift: 9, clusShift: 0}, big, file("x", nil)))
	tree := scanOf(t, dev)
	if c := dev.Counts(); c.Reads > 12 {
		t.Errorf("%d reads of %d bytes for the scan", c.Reads, c.BytesRead)
	}
	before := dev.Counts()
	r, err := tree.Open(tree.Lookup("big"))
	if err != nil {
		t.Fatal(err)
	}
	buf := make([]byte, 1<<20)
	for {
		if _, err := r.Read(buf); err != nil {
			break
		}
	}
	if c := dev.Counts(); c.Reads-before.Reads != 8 || c.BytesRead-before.BytesRead != 8<<20 {
		t.Errorf("%d reads of %d bytes for 8 MiB", c.Reads-before.Reads, c.BytesRead-before.BytesRead)
	}
}

func BenchmarkRead(b *testing.B) {
	const n = 64 << 20
	frag := file("fragmented", random(n))
	frag.fragment = 16
	s := writeVolume(b, layout{size: 192 << 20, sectorShift: 9, clusShift: 3}, file("contiguous", random(n)), frag)
	dev := openDevice(b, saved(b, s))
	v, err := Open(dev)
	if err != nil {
		b.Fatal(err)
	}
	tree, err := v.Scan()
	if err != nil {
		b.Fatal(err)
	}
	for _, name := range []string{"contiguous", "fragmented"} {
		b.Run(name, func(b *testing.B) {
			b.SetBytes(n)
			buf := make([]byte, 1<<20)
			for range b.N {
				r, _ := tree.Open(tree.Lookup(name))
				if k, err := io.CopyBuffer(struct{ io.Writer }{io.Discard}, struct{ io.Reader }{r}, buf); err != nil || k != n {
					b.Fatal(k, err)
				}
			}
		})
	}
	b.Run("scan of 5000 names", func(b *testing.B) {
		v, err := Open(writeVolume(b, layouts["sector 512, cluster 4096"], everyCase(manyNames)...))
		if err != nil {
			b.Fatal(err)
		}
		for range b.N {
			if _, err := v.Scan(); err != nil {
				b.Fatal(err)
			}
		}
	})
}

var _ blockdev.Device = (*fixtures.Sparse)(nil)

func TestTooManyNodes(t *testing.T) {
	dev := writeVolume(t, layout{size: 2 << 20, sectorShift: 9, clusShift: 0}, dir("a", file("b", nil), dir("c")), file("d", nil))
	defer func(n int) { maxNodes = n }(maxNodes)
	maxNodes = 4
	scanOf(t, dev)
	v, err := Open(dev)
	if err != nil {
		t.Fatal(err)
	}
	maxNodes = 3
	if tree, err := v.Scan(); tree != nil || !errors.Is(err, ErrDamaged) {
		t.Error(err)
	}
}
