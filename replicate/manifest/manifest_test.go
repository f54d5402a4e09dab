package manifest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"espmirror/blockdev"
	"espmirror/fatdriver"
	"espmirror/fixtures"
	"espmirror/replicate"
)

func TestMain(m *testing.M) { os.Exit(fixtures.Main(m)) }

var testTree = fixtures.TreeSpec{
	"EFI/BOOT/BOOTX64.EFI":     fixtures.Random(300_000, 7),
	"EFI/espmirror/state":      fixtures.Text("own"),
	"EFI/Linux/Ünïcode & more": fixtures.Text("uki"),
	"loader/esp-sync":          fixtures.Text("member 6f0c5c7e-0000-4000-8000-000000000001\n"),
	"loader/random-seed":       fixtures.Text("own"),
	"loader/entries/a.conf":    fixtures.Text("title a\n"),
	"loader/entries.srel":      fixtures.Text(""),
	"System Volume Info/file":  fixtures.Text("stated, as nobody else says what it is"),
}

// makeVolume makes a volume in memory.
func makeVolume(t testing.TB, spec fixtures.VolumeSpec) *blockdev.Mem {
	t.Helper()
	file := filepath.Join(t.TempDir(), "volume")
	fixtures.Need(t, "mkfs.fat", "mcopy")
	if err := spec.Make(file); err != nil {
		t.Fatal(err)
	}
	data, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	return blockdev.NewMem(data, 512)
}

func testVolume(t testing.TB) *blockdev.Mem {
	return makeVolume(t, fixtures.VolumeSpec{FAT: 12, Size: 2 << 20, Serial: 0x1234ABCD, Label: "ESP-1", Tree: testTree})
}

func of(t testing.TB, dev blockdev.Device) *Contents {
	t.Helper()
	c, err := Of(context.Background(), &replicate.Target{Name: "volume", Dev: dev}, nil)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// listing shows a tree as the package comment says that its digest is taken.
func listing(tree *Tree) string {
	var sb strings.Builder
	for _, e := range tree.Entries {
		if e.Dir {
			fmt.Fprintf(&sb, "d %s\n", e.Path)
		} else {
			fmt.Fprintf(&sb, "f %s %d %s\n", e.Sum, *e.Size, e.Path)
		}
	}
	return sb.String()
}

func TestOf(t *testing.T) {
	var steps []int64
	var total int64
	c, err := Of(context.Background(), &replicate.Target{Name: "volume", Dev: testVolume(t)}, func(done, all int64) {
		steps, total = append(steps, done), all
	})
	if err != nil {
		t.Fatal(err)
	}
	if c.FATType != "FAT12" || c.Serial != "1234-ABCD" || c.Label != "ESP-1" {
		t.Errorf("got %s %s %s", c.FATType, c.Serial, c.Label)
	}
	if len(steps) == 0 || steps[len(steps)-1] != total || !slices.IsSorted(steps) {
		t.Errorf("progress %v of %d", steps, total)
	}
	want := ""
	add := func(path string) {
		f, ok := testTree[path]
		if !ok {
			want += "d " + path + "\n"
			return
		}
		want += fmt.Sprintf("f %x %d %s\n", f.Sum(), f.Size, path)
	}
	for _, p := range []string{"EFI", "EFI/BOOT", "EFI/BOOT/BOOTX64.EFI", "EFI/Linux", "EFI/Linux/Ünïcode & more", "System Volume Info",
		"System Volume Info/file", "loader", "loader/entries", "loader/entries.srel", "loader/entries/a.conf", "loader/esp-sync"} {
		add(p)
	}
	if got := listing(&c.Tree); got != want {
		t.Errorf("got\n%swant\n%s", got, want)
	}
}

// TestOfDropsCaches: what is read is read from the medium.
func TestOfDropsCaches(t *testing.T) {
	var first *blockdev.OpKind
	dev := blockdev.NewFaulty(testVolume(t), func(op blockdev.Op) error {
		if first == nil {
			first = &op.Kind
		}
		return nil
	})
	if of(t, dev); first == nil || *first != blockdev.OpInvalidate {
		t.Errorf("the first operation is %v", first)
	}
}

// TestOfFaults lets each read of a volume fail, and the dropping of caches.
func TestOfFaults(t *testing.T) {
	mem := testVolume(t)
	tree := scan(t, mem)
	for path, spec := range testTree {
		n := tree.Lookup(path)
		if replicate.OwnFile(path) || spec.Size == 0 {
			continue
		}
		at := clusterOff(tree, n.Runs[len(n.Runs)-1].First)
		dev := blockdev.NewFaulty(mem, func(op blockdev.Op) error {
			if op.Kind == blockdev.OpRead && op.Off <= at && at < op.Off+int64(len(op.Data)) {
				return syscall.EIO
			}
			return nil
		})
		_, err := Of(context.Background(), &replicate.Target{Name: "volume", Dev: dev}, nil)
		if !errors.Is(err, syscall.EIO) || !strings.Contains(err.Error(), "cannot read "+path) {
			t.Errorf("%s: %v", path, err)
		}
		fixtures.Count("faults", 1)
	}
	reads := 0
	count := blockdev.NewFaulty(mem, func(op blockdev.Op) error { reads++; return nil })
	of(t, count)
	for i := range reads {
		n := 0
		dev := blockdev.NewFaulty(mem, func(op blockdev.Op) error {
			if n++; n == i+1 {
				return syscall.EIO
			}
			return nil
		})
		if _, err := Of(context.Background(), &replicate.Target{Name: "volume", Dev: dev}, nil); !errors.Is(err, syscall.EIO) {
			t.Errorf("operation %d of %d fails: %v", i+1, reads, err)
		}
		fixtures.Count("faults", 1)
	}
	ctx, cancel := context.WithCancel(context.Background())
	_, err := Of(ctx, &replicate.Target{Name: "volume", Dev: mem}, func(int64, int64) { cancel() })
	if !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
}

func scan(t testing.TB, dev blockdev.Device) *fatdriver.Tree {
	t.Helper()
	vol, err := fatdriver.Open(dev)
	if err != nil {
		t.Fatal(err)
	}
	tree, err := vol.Scan()
	if err != nil {
		t.Fatal(err)
	}
	return tree
}

func clusterOff(tree *fatdriver.Tree, c fatdriver.Cluster) int64 {
	g := tree.Volume().Geometry()
	return g.ClusterOff(c)
}

// TestOfRefuses has volumes that must not be stated.
func TestOfRefuses(t *testing.T) {
	mem := testVolume(t)
	n := scan(t, mem).Lookup("EFI/BOOT/BOOTX64.EFI")
	vol, err := fatdriver.Open(mem)
	if err != nil {
		t.Fatal(err)
	}
	// A chain that ends too early.
	damaged := blockdev.NewMem(bytes.Clone(mem.Bytes()), 512)
	first := int64(n.Runs[0].First)
	clear(damaged.Bytes()[vol.Geometry().FATOff+first*3/2:][:4])
	if _, err := Of(context.Background(), &replicate.Target{Dev: damaged}, nil); !errors.Is(err, fatdriver.ErrDamaged) {
		t.Error(err)
	}
	// A wrong media byte in the FAT, by which GRUB takes the volume for something else: the tree is as it was.
	damaged = blockdev.NewMem(bytes.Clone(mem.Bytes()), 512)
	damaged.Bytes()[vol.Geometry().FATOff] ^= 1
	if _, err := Of(context.Background(), &replicate.Target{Dev: damaged}, nil); !errors.Is(err, fatdriver.ErrDamaged) || scan(t, damaged).Damage() != nil {
		t.Error(err)
	}
	if _, err := Of(context.Background(), &replicate.Target{Dev: blockdev.NewMem(make([]byte, 1<<20), 512)}, nil); !errors.Is(err, fatdriver.ErrNotFAT) {
		t.Error(err)
	}
	// A run that was cut between two commits.
	target := blockdev.NewMem(bytes.Clone(mem.Bytes()), 512)
	rec := blockdev.NewRecorder(target)
	var whole *blockdev.Mem
	files := []replicate.File{{Path: "loader/new.conf", Content: []byte("1")}, {Path: "EFI/BOOT/new", Content: []byte("2")}}
	for range 2 { // the first run makes the journal
		rec.Reset()
		whole = blockdev.NewMem(bytes.Clone(target.Bytes()), 512)
		files[0].Content = append(files[0].Content, '1')
		if _, err := replicate.Put(context.Background(), &replicate.Target{Name: "volume", Dev: rec}, files, replicate.Options{}); err != nil {
			t.Fatal(err)
		}
	}
	refused := 0
	for _, op := range rec.Ops() {
		if op.Kind == blockdev.OpWrite {
			if _, err := whole.WriteAt(op.Data, op.Off); err != nil {
				t.Fatal(err)
			}
			_, err := Of(context.Background(), &replicate.Target{Dev: whole}, nil)
			if errors.Is(err, replicate.ErrNeedsRecovery) {
				refused++
			}
		}
	}
	if refused == 0 {
		t.Error("no cut run was refused")
	}
}

// example is a manifest of two images that hold the same, and one that is a bare volume.
func example(t testing.TB) *Manifest {
	t.Helper()
	sum := Digest{1, 2, 3}
	size, none := int64(9), int64(0)
	same := NewTree([]Entry{
		{Path: "loader", Dir: true}, {Path: "EFI/a.efi", Size: &size, Sum: &sum}, {Path: "EFI", Dir: true}, {Path: "loader/Ü <x>", Size: &none, Sum: &Digest{}},
	})
	empty := NewTree(nil)
	esp := Volume{Partition: 1, Type: "ESP", PartGUID: "6f0c5c7e-0000-4000-8000-000000000001", PartLabel: "EFI system", Offset: 1 << 20, Size: 6 << 20,
		FATType: "FAT16", Serial: "1234-ABCD", Label: "ESP-1", Tree: same.Digest}
	boot := Volume{Partition: 2, Type: "XBOOTLDR", PartGUID: "6f0c5c7e-0000-4000-8000-000000000002", Offset: 7 << 20, Size: 1 << 20, FATType: "FAT12", Tree: empty.Digest}
	two := esp
	two.PartGUID, two.Serial = "6f0c5c7e-0000-4000-8000-000000000003", "1234-0000"
	m, err := New([]Image{
		{Name: "two.img", Size: 9 << 20, SectorSize: 512, DiskGUID: "0a0a0a0a-0000-4000-8000-000000000002", Volumes: []Volume{two}},
		{Name: "one.img", Size: 9 << 20, SectorSize: 512, DiskGUID: "0a0a0a0a-0000-4000-8000-000000000001", Volumes: []Volume{boot, esp}},
		{Name: "three.img", Size: 1 << 20, SectorSize: 512, Volumes: []Volume{{Size: 1 << 20, FATType: "FAT12", Tree: same.Digest}}},
	}, []Tree{same, empty, same})
	if err != nil {
		t.Fatal(err)
	}
	return m
}

func encode(t testing.TB, m *Manifest) []byte {
	t.Helper()
	data, err := m.Encode()
	if err != nil {
		t.Fatal(err)
	}
	return data
}

func TestRoundTrip(t *testing.T) {
	data := encode(t, example(t))
	if again := encode(t, example(t)); !bytes.Equal(again, data) {
		t.Error("two runs give two texts")
	}
	if !bytes.HasSuffix(data, []byte("\n}\n")) || strings.Count(string(data), `"EFI/a.efi"`) != 1 || !strings.Contains(string(data), `"loader/Ü <x>"`) {
		t.Errorf("got\n%s", data)
	}
	m, err := Decode(data)
	if err != nil {
		t.Fatal(err)
	}
	if again := encode(t, m); !bytes.Equal(again, data) {
		t.Error("decoded and encoded it is another text")
	}
	if m.Images[0].Name != "one.img" || m.Images[1].Name != "three.img" || m.Images[0].Volumes[0].Partition != 1 || len(m.Trees) != 2 {
		t.Errorf("got %+v", m.Images)
	}
	if m.Tree(Digest{}) != nil || m.Tree(m.Images[0].Volumes[0].Tree) == nil {
		t.Error("trees are not found by their digest")
	}
}

// TestDecodeRefuses has texts that Encode does not write. Each error names the place.
func TestDecodeRefuses(t *testing.T) {
	good := string(encode(t, example(t)))
	edit := func(old, new string) string {
		if !strings.Contains(good, old) {
			t.Fatalf("the example has no %q", old)
		}
		return strings.Replace(good, old, new, 1)
	}
	last := strings.LastIndex(good, "    {\n      \"sha256\"")
	for _, c := range []struct{ name, text, want string }{
		{"empty", "", "not a manifest"},
		{"other JSON", "{}\n", "not a manifest"},
		{"newer", edit("manifest 1", "manifest 2"), "line 2: the format is not"},
		{"format twice", edit(`manifest 1",`, `manifest 1", "format": "espmirror manifest 9",`), "line 2"},
		{"unknown field", edit(`"name": "one.img",`, `"name": "one.img", "extra": 1,`), `line 5: unknown field "extra"`},
		{"field twice", edit(`"name": "one.img",`, "\"name\": \"one.img\",\n      \"name\": \"one.img\","), "line 6 is not as"},
		{"case of a field", edit(`"name": "one.img"`, `"Name": "one.img"`), "line 5 is not as"},
		{"wrong type", edit(`"size_bytes": 9437184`, `"size_bytes": "9437184"`), "line 6: string has no place"},
		{"not whole", edit(`"size_bytes": 9437184`, `"size_bytes": 9437184.5`), "line 6: number 9437184.5"},
		{"too large a number", edit(`"size_bytes": 9437184`, `"size_bytes": 99999999999999999999`), "line 6: number"},
		{"negative", edit(`"size_bytes": 9437184`, `"size_bytes": -1`), `image "one.img": it has -1 bytes`},
		{"sector size", edit(`"sector_size_bytes": 512`, `"sector_size_bytes": 513`), `image "one.img": sectors have 513`},
		{"no image", "{\n  \"format\": \"" + Format + "\",\n  \"images\": [],\n  \"trees\": []\n}\n", "images: there is none"},
		{"two of a name", edit(`"name": "two.img"`, `"name": "three.img"`), `image "three.img": there are two`},
		{"order of names", edit(`"name": "one.img"`, `"name": "zero.img"`), "not in the order of their names"},
		{"name with a directory", edit(`"name": "one.img"`, `"name": "../one.img"`), "not the name of an image"},
		{"name of nothing", edit(`"name": "one.img"`, `"name": ""`), "not the name of an image"},
		{"name with a line break", edit(`"name": "one.img"`, `"name": "one\nimg"`), "not the name of an image"},
		{"disk GUID", edit(`"disk_guid": "0a`, `"disk_guid": "0A`), "disk_guid"},
		{"partition GUID", edit(`"partition_guid": "6f`, `"partition_guid": "zz`), "partition_guid"},
		{"serial", edit(`"1234-ABCD"`, `"1234-abcd"`), `image "one.img", partition 1: serial`},
		{"FAT type", edit(`"FAT16"`, `"exFAT"`), "fat_type"},
		{"partition number", edit(`"partition": 2`, `"partition": 1`), "order of their numbers"},
		{"negative number", edit(`"partition": 1,`, `"partition": -1,`), "not the number of a partition"},
		{"beyond the image", edit(`"offset_bytes": 7340032`, `"offset_bytes": 9223372036854775807`), "partition 2: it has"},
		{"after the end", edit(`"offset_bytes": 7340032`, `"offset_bytes": 9437184`), "partition 2: it ends at"},
		{"no type", edit("\"type\": \"ESP\",\n          ", ""), "it has no type"},
		{"digest in capitals", edit(`"tree": "`+example(t).Images[0].Volumes[0].Tree.String(), `"tree": "`+strings.ToUpper(example(t).Images[0].Volumes[0].Tree.String())), "line 20 is not as"},
		{"digest too short", edit(`"sha256": "`, `"sha256": "00`), "is not a SHA-256"},
		{"no hexadecimal", edit(`"sha256": "0102`, `"sha256": "zz02`), "is not a SHA-256"},
		{"another tree", edit(`"tree": "`+example(t).Images[0].Volumes[0].Tree.String(), `"tree": "`+strings.Repeat("0", 64)), "there is no tree"},
		{"a file changed", edit(`"sha256": "0102`, `"sha256": "0103`), "the digest of its entries is"},
		{"a size changed", edit(`"size_bytes": 9,`, `"size_bytes": 8,`), "the digest of its entries is"},
		{"size of a file", edit(`"size_bytes": 9,`, `"size_bytes": 4294967296,`), "FAT holds at most"},
		{"no size", edit("\"size_bytes\": 9,\n", "\n"), "no size or no sum"},
		{"a directory with a size", edit(`"directory": true`, `"directory": true, "size_bytes": 0`), "a directory has no size"},
		{"path upwards", edit(`"path": "EFI/a.efi"`, `"path": "EFI/.."`), `".." is not the name`},
		{"path of the root", edit(`"path": "EFI/a.efi"`, `"path": "/EFI/a.efi"`), `"" is not the name`},
		{"path with a backslash", edit(`"path": "EFI/a.efi"`, `"path": "EFI\\a.efi"`), "is not the name"},
		{"path with a control character", edit(`"path": "EFI/a.efi"`, `"path": "EFI/a\u0007"`), "is not the name"},
		{"path without its directory", edit(`"path": "EFI/a.efi"`, `"path": "EFI/b/a.efi"`), "the directory that it is in"},
		{"path twice for FAT", edit(`"path": "EFI/a.efi"`, `"path": "EfI"`), "twice, as FAT compares"},
		{"own file", edit(`"path": "loader/Ü <x>"`, `"path": "loader/random-seed"`), "belongs to one volume alone"},
		{"order of paths", edit(`"path": "EFI/a.efi"`, `"path": "zEFI"`), "not in the order of their paths"},
		{"tree twice", good[:last] + good[last:len(good)-len("\n  ]\n}\n")] + ",\n" + good[last:], "one is there twice"},
		{"not UTF-8", edit(`"EFI system"`, "\"EFI \xff system\""), "it is not UTF-8"},
		{"half a surrogate", edit(`"EFI system"`, `"EFI \ud800 system"`), "is not as espmirror writes it"},
		{"something behind", good + " ", "is not as"},
		{"something more behind", good + "{}\n", "is not as"},
		{"no line break at the end", good[:len(good)-1], "is not as"},
		{"cut", good[:len(good)/2], "it ends in the middle"},
		{"other spaces", edit("      \"size", "\t\"size"), "line 6 is not as"},
		{"deep", "{\n  \"format\": \"" + Format + "\",\n  \"images\": " + strings.Repeat("[", 200_000), "line 3"},
	} {
		m, err := Decode([]byte(c.text))
		if m != nil || err == nil || !strings.Contains(err.Error(), c.want) || !errors.Is(err, ErrInvalid) && !errors.Is(err, ErrNotManifest) {
			t.Errorf("%s: %v, want %q", c.name, err, c.want)
		}
	}
	if _, err := Decode(make([]byte, MaxSize+1)); !errors.Is(err, ErrInvalid) {
		t.Error(err)
	}
}

func TestNewRefuses(t *testing.T) {
	tree := NewTree(nil)
	v := Volume{Size: 512, FATType: "FAT12", Tree: tree.Digest}
	for _, c := range []struct {
		images []Image
		trees  []Tree
		want   string
	}{
		{nil, nil, "there is none"},
		{[]Image{{Name: "a", Size: 512, SectorSize: 512, Volumes: []Volume{v}}, {Name: "a", Size: 512, SectorSize: 512, Volumes: []Volume{v}}}, []Tree{tree}, "two of that name"},
		{[]Image{{Name: "a", Size: 512, SectorSize: 512, Volumes: []Volume{v}}}, nil, "there is no tree"},
		{[]Image{{Name: "a", Size: 512, SectorSize: 512}}, nil, "it has no volume"},
		{[]Image{{Name: "a", Size: 512, SectorSize: 512, Volumes: []Volume{v}}}, []Tree{tree, NewTree([]Entry{{Path: "x", Dir: true}})}, "no volume has it"},
		{[]Image{{Name: "a", Size: 512, SectorSize: 512, Volumes: []Volume{v, {Partition: 1, Type: "ESP", Size: 1, FATType: "FAT12", Tree: tree.Digest}}}}, []Tree{tree}, "has no neighbour"},
		{[]Image{{Name: "a", SectorSize: 512, Volumes: []Volume{{Partition: 1, Type: "ESP", Size: 1, FATType: "FAT12", Label: strings.Repeat("x", 2000), Tree: tree.Digest}}}}, []Tree{tree}, "too long"},
	} {
		if _, err := New(c.images, c.trees); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%v, want %q", err, c.want)
		}
	}
}

func FuzzDecode(f *testing.F) {
	good := encode(f, example(f))
	f.Add(good)
	f.Add(good[:len(good)-20])
	f.Add(bytes.Replace(good, []byte("one.img"), []byte("../img"), 1))
	f.Add(bytes.Replace(good, []byte(`"partition": 1`), []byte(`"partition": 0`), 1))
	f.Fuzz(func(t *testing.T, data []byte) {
		m, err := Decode(data)
		if err != nil {
			if !errors.Is(err, ErrInvalid) && !errors.Is(err, ErrNotManifest) {
				t.Errorf("an error of no kind: %v", err)
			}
			return
		}
		if again, err := m.Encode(); err != nil || !bytes.Equal(again, data) {
			t.Errorf("it was accepted, and is not what is written: %v", err)
		}
		for _, im := range m.Images {
			if im.Name != filepath.Base(im.Name) || m.Tree(im.Volumes[0].Tree) == nil {
				t.Errorf("image %q", im.Name)
			}
		}
	})
}

func TestCompare(t *testing.T) {
	mem := testVolume(t)
	want := of(t, mem)
	if d := Compare(&want.Tree, &of(t, mem).Tree); len(d) > 0 {
		t.Errorf("got %v", d)
	}
	// One bit of every file, wherever it lies.
	tree := scan(t, mem)
	for _, e := range want.Tree.Entries {
		if e.Dir || *e.Size == 0 {
			continue
		}
		n := tree.Lookup(e.Path)
		for _, at := range []int64{0, *e.Size - 1} {
			off := clusterOff(tree, n.Runs[0].First) + at // the fixture's files are in one run
			mem.Bytes()[off] ^= 0x40
			got := Compare(&want.Tree, &of(t, mem).Tree)
			if len(got) != 1 || got[0] != (replicate.Change{Op: "differs", Path: e.Path, Size: *e.Size}) {
				t.Errorf("byte %d of %s: %v", at, e.Path, got)
			}
			mem.Bytes()[off] ^= 0x40
		}
	}
	sum, size := Digest{9}, int64(4)
	a := NewTree([]Entry{{Path: "a", Dir: true}, {Path: "a/x", Size: &size, Sum: &sum}, {Path: "b", Size: &size, Sum: &sum}, {Path: "c", Dir: true}})
	b := NewTree([]Entry{{Path: "a", Size: &size, Sum: &sum}, {Path: "b", Dir: true}, {Path: "b/y", Size: &size, Sum: &sum}, {Path: "d", Dir: true}})
	var got []string
	for _, c := range Compare(&a, &b) {
		got = append(got, fmt.Sprint(c.Op, " ", c.Path, " ", c.Dir, " ", c.Size))
	}
	if s := strings.Join(got, ", "); s != "differs a true 0, missing a/x false 4, differs b false 4, extra b/y false 4, missing c true 0, extra d true 0" {
		t.Errorf("got %s", s)
	}
}

func TestCompareIdentity(t *testing.T) {
	im := example(t).Images[0]
	v := im.Volumes[0]
	if d := append(CompareImage(&im, &im, false), CompareVolume(&v, &v)...); len(d) > 0 {
		t.Errorf("got %v", d)
	}
	for what, change := range map[string]func(*Volume){
		"partition number": func(v *Volume) { v.Partition++ }, "partition type": func(v *Volume) { v.Type = "XBOOTLDR" },
		"partition GUID": func(v *Volume) { v.PartGUID = "" }, "partition label": func(v *Volume) { v.PartLabel += " " },
		"offset": func(v *Volume) { v.Offset++ }, "partition size": func(v *Volume) { v.Size++ }, "FAT type": func(v *Volume) { v.FATType = "FAT32" },
		"serial number": func(v *Volume) { v.Serial = "0000-0000" }, "label": func(v *Volume) { v.Label = "" },
	} {
		other := v
		change(&other)
		if d := CompareVolume(&v, &other); len(d) != 1 || d[0].What != what {
			t.Errorf("%s: %v", what, d)
		}
	}
	larger, smaller, other := im, im, im
	larger.Size++
	smaller.Size--
	other.DiskGUID, other.SectorSize = "", 4096
	if d := CompareImage(&im, &larger, true); len(d) > 0 {
		t.Errorf("a larger disk: %v", d)
	}
	for _, d := range [][]Difference{CompareImage(&im, &larger, false), CompareImage(&im, &smaller, true)} {
		if len(d) != 1 || d[0].What != "size" {
			t.Errorf("got %v", d)
		}
	}
	if d := CompareImage(&im, &other, true); len(d) != 2 || d[1].String() != "disk GUID: none, not 0a0a0a0a-0000-4000-8000-000000000001" {
		t.Errorf("got %v", d)
	}
}

func TestFind(t *testing.T) {
	m := example(t)
	one, two := m.Images[0], m.Images[2]
	for _, c := range []struct {
		s    Subject
		want string
	}{
		{Subject{Name: "one.img"}, "one.img"},
		{Subject{Name: "sdb", DiskGUID: two.DiskGUID}, "two.img"},
		{Subject{Name: "one.img", DiskGUID: two.DiskGUID}, "two.img"},
		{Subject{Name: "one.img", DiskGUID: "0a0a0a0a-0000-4000-8000-0000000000ff"}, "one.img"},
		{Subject{Name: "x", PartGUIDs: []string{one.Volumes[1].PartGUID}}, "one.img"},
		{Subject{Name: "x", PartGUIDs: []string{one.Volumes[1].PartGUID, two.Volumes[0].PartGUID}}, ""},
		{Subject{Name: "x", PartGUIDs: []string{""}}, ""},
		{Subject{Name: "x"}, ""},
	} {
		got := ""
		if im := m.Find(c.s); im != nil {
			got = im.Name
		}
		if got != c.want {
			t.Errorf("%+v: %q, want %q", c.s, got, c.want)
		}
	}
	// Copies of one disk: the name decides, and of partitions the GUID.
	m.Images[2].DiskGUID = one.DiskGUID
	if im := m.Find(Subject{Name: "two.img", DiskGUID: one.DiskGUID}); im == nil || im.Name != "two.img" {
		t.Errorf("got %v", im)
	}
	if im := m.Find(Subject{Name: "sdb1", Part: true, DiskGUID: one.DiskGUID, PartGUIDs: []string{two.Volumes[0].PartGUID}}); im == nil || im.Name != "two.img" {
		t.Errorf("got %v", im)
	}
	if im := m.Find(Subject{Name: "sdb", DiskGUID: one.DiskGUID}); im != nil {
		t.Errorf("got %v", im)
	}
}
