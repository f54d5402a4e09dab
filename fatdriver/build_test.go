package fatdriver

import (
	"encoding/binary"
	"path"
	"sort"
	"strings"
	"testing"
	"time"
)

// populate writes files and directories into the empty volume on d, by its own simple means: clusters are taken in
// ascending order, every stride-th one, so that stride 2 fragments everything. A name that ends in "/" is a directory;
// parents come by themselves.
func populate(t testing.TB, d *sparseDev, files map[string]string, stride Cluster) {
	t.Helper()
	v, err := Open(d)
	if err != nil {
		t.Fatal(err)
	}
	g := v.geo
	next := Cluster(2)
	if g.Type == FAT32 {
		next = 3
	}
	setFAT := func(c Cluster, e uint32) {
		off, n := entryOffset(g.Type, c)
		for k := 0; k < g.NumFATs; k++ {
			at := g.FATOff + int64(k)*g.FATSize + off
			b := make([]byte, n)
			if _, err := d.ReadAt(b, at); err != nil {
				t.Fatal(err)
			}
			encodeEntry(g.Type, c, b, e)
			d.poke(at, b...)
		}
	}
	store := func(data []byte, first Cluster) Cluster {
		cs := g.ClusterSize
		var prev Cluster
		for at := 0; at < len(data); at += cs {
			c := first
			if at > 0 || first == 0 {
				c = next
				next += stride
			}
			if !g.valid(c) {
				t.Fatalf("the volume has no cluster %d", c)
			}
			if prev == 0 {
				first = c
			} else {
				setFAT(prev, uint32(c))
			}
			setFAT(c, entryLast)
			d.poke(g.ClusterOff(c), data[at:min(at+cs, len(data))]...)
			prev = c
		}
		return first
	}
	tree := map[string]map[string]bool{".": {}}
	var add func(name string)
	add = func(name string) {
		dir := path.Dir(name)
		if tree[dir] == nil {
			tree[dir] = map[string]bool{}
		}
		if dir != "." {
			add(dir)
		}
		tree[dir][path.Base(name)] = true
	}
	for name := range files {
		clean := strings.TrimSuffix(name, "/")
		add(clean)
		if clean != name && tree[clean] == nil {
			tree[clean] = map[string]bool{}
		}
	}
	var build func(dir string, self, parent Cluster) []byte
	build = func(dir string, self, parent Cluster) []byte {
		var raw []byte
		if dir != "." {
			for i, c := range []Cluster{self, parent} {
				s := make([]byte, slotSize)
				copy(s, []string{".          ", "..         "}[i])
				s[offAttr] = AttrDir
				putSlotCluster(g.Type, s, c)
				raw = append(raw, s...)
			}
		}
		set := newNameSet()
		var names []string
		for name := range tree[dir] {
			names = append(names, name)
			if err := set.claim(name); err != nil {
				t.Fatal(err)
			}
		}
		sort.Strings(names)
		for _, name := range names {
			full := path.Join(dir, name)
			_, isDir := tree[full]
			meta := Meta{Attr: AttrArchive, Modified: time.Date(2024, 3, 4, 5, 6, 8, 0, time.UTC)}
			if strings.HasPrefix(name, "ro") {
				meta.Attr |= AttrReadOnly
			}
			group, err := set.newGroup(name, nil, meta, isDir)
			if err != nil {
				t.Fatal(err)
			}
			s := group[len(group)-slotSize:]
			if isDir {
				c := next
				next += stride
				up := self
				if dir == "." {
					up = 0
				}
				sub := build(full, c, up)
				store(append(sub, make([]byte, g.ClusterSize-len(sub)%g.ClusterSize)...), c)
				putSlotCluster(g.Type, s, c)
			} else if data := files[full]; data != "" {
				putSlotCluster(g.Type, s, store([]byte(data), 0))
				binary.LittleEndian.PutUint32(s[offFileSize:], uint32(len(data)))
			}
			raw = append(raw, group...)
		}
		return raw
	}
	tr, err := v.Scan()
	if err != nil {
		t.Fatal(err)
	}
	var root []byte
	for _, l := range tr.Root.labels {
		root = append(root, l.Group...)
	}
	root = append(root, build(".", 0, 0)...)
	if g.Type == FAT32 {
		store(append(root, make([]byte, g.ClusterSize-len(root)%g.ClusterSize)...), g.RootCluster)
		// FSInfo is set right, so that such a volume has no findings.
		v, err := Open(d)
		if err != nil {
			t.Fatal(err)
		}
		free, err := v.FreeBytes()
		if err != nil {
			t.Fatal(err)
		}
		b := make([]byte, 4)
		binary.LittleEndian.PutUint32(b, uint32(free/int64(g.ClusterSize)))
		d.poke(g.FSInfoOff+fsiFree, b...)
	} else if len(root) > int(g.RootSize) {
		t.Fatal("the root is full")
	} else {
		d.poke(g.RootOff, root...)
	}
}

// testFiles is a tree with every kind of name and size.
func testFiles() map[string]string {
	long := strings.Repeat("n", 251) + ".efi"
	emoji := strings.Repeat("😀", 127) + "x" // 255 UTF-16 units
	files := map[string]string{
		"README.TXT":              "short",
		"lower.cfg":               "nt bits",
		"Mixed Case Name.conf":    "long",
		"empty":                   "",
		"EFI/BOOT/BOOTX64.EFI":    strings.Repeat("\x7fboot", 5000),
		"EFI/Linux/" + long:       strings.Repeat("k", 70000),
		"loader/entries/" + emoji: "title",
		"loader/entries/grüße-Ünïcødé.äöü": "unicode",
		"loader/entries/日本語.conf":          "title",
		"empty dir/":                       "",
		"ro-file.bin":                      "read-only",
		"exact":                            strings.Repeat("c", 4096),
		"a/b/c/d/e/f/g/h/deep":             "deep",
		"[brackets] & {more} 'n' #~.x~1":   "odd",
		".hidden":                          "dot",
	}
	for i := range 150 {
		files["many/file number "+strings.Repeat("x", i%30)+string(rune('a'+i%26))+string(rune('A'+i/26))+"…"+string(rune('0'+i%10))+".dat"] = strings.Repeat("d", i*7)
	}
	return files
}

// testVolumes makes one volume of each type with testFiles, fragmented.
func testVolumes(t *testing.T, f func(t *testing.T, d *sparseDev, files map[string]string)) {
	for _, c := range []struct {
		name string
		size int64
		o    FormatOptions
	}{
		{"FAT12", 2 << 20, FormatOptions{Type: FAT12, Label: "TEST"}},
		{"FAT16", 16 << 20, FormatOptions{Type: FAT16, Label: "TEST", NumFATs: 1}},
		{"FAT32", 40 << 20, FormatOptions{Type: FAT32, Label: "TEST"}},
		{"FAT32-4096", 280 << 20, FormatOptions{Type: FAT32, SectorSize: 4096}},
	} {
		t.Run(c.name, func(t *testing.T) {
			d, _ := mustFormat(t, c.size, c.o)
			files := testFiles()
			populate(t, d, files, 2)
			f(t, d, files)
		})
	}
}
