package crashtest

import (
	"fmt"
	"maps"
	"math/rand/v2"
	"path"
	"slices"
	"strings"

	"espmirror/fatdriver"
	"espmirror/fixtures"
)

// token is the directory that kernel-install makes.
const token = "0123456789abcdef0123456789abcdef"

// selected is what generated scenarios select, as a machine with everything would.
var selected = []string{"loader", "EFI/Linux", "EFI/BOOT", "EFI/systemd", "EFI/debian", token, "vmlinuz-linux", "initrd.img", "Long name of a file in the root.img"}

// geometries are the layouts that the scenarios are made on, and how many of 100 scenarios have each.
var geometries = []struct {
	share int
	g     Geometry
}{
	{14, Geometry{fatdriver.FAT12, 1 << 20, 512, 0, 1, 2}},
	{6, Geometry{fatdriver.FAT12, 2 << 20, 512, 0, 2, 1}},
	{6, Geometry{fatdriver.FAT12, 7 << 20, 512, 0, 4, 2}},
	{3, Geometry{fatdriver.FAT12, 48 << 20, 512, 0, 32, 2}},
	{4, Geometry{fatdriver.FAT12, 8 << 20, 4096, 0, 1, 2}},
	{3, Geometry{fatdriver.FAT12, 8 << 20, 4096, 512, 1, 2}},
	{14, Geometry{fatdriver.FAT16, 4 << 20, 512, 0, 1, 2}},
	{6, Geometry{fatdriver.FAT16, 9 << 20, 512, 0, 2, 1}},
	{6, Geometry{fatdriver.FAT16, 20 << 20, 512, 0, 8, 2}},
	{3, Geometry{fatdriver.FAT16, 300 << 20, 512, 0, 128, 2}},
	{5, Geometry{fatdriver.FAT16, 20 << 20, 4096, 0, 1, 2}},
	{3, Geometry{fatdriver.FAT16, 20 << 20, 4096, 512, 1, 1}},
	{9, Geometry{fatdriver.FAT32, 34 << 20, 512, 0, 1, 2}},
	{5, Geometry{fatdriver.FAT32, 34 << 20, 512, 0, 1, 1}},
	{5, Geometry{fatdriver.FAT32, 270 << 20, 512, 0, 8, 2}},
	{2, Geometry{fatdriver.FAT32, 4200 << 20, 512, 0, 128, 2}},
	{4, Geometry{fatdriver.FAT32, 270 << 20, 4096, 0, 1, 2}},
	{2, Geometry{fatdriver.FAT32, 540 << 20, 4096, 512, 2, 2}},
}

// maker makes the trees of one scenario.
type maker struct {
	*rand.Rand
	cluster int
	n       int
}

// data is content of about max bytes; sizes about the border of a cluster are the interesting ones.
func (m *maker) data(max int) string {
	n := m.IntN(max + 1)
	switch m.IntN(8) {
	case 0:
		n = 0
	case 1:
		n = m.cluster * (1 + m.IntN(2))
	case 2:
		n = m.cluster + 1 - 2*m.IntN(2)
	}
	b := make([]byte, min(n, 3*m.cluster+max))
	for i := range b {
		b[i] = byte(m.Uint32())
	}
	return string(b)
}

// boot is content that is not empty, as what a loader entry names must be.
func (m *maker) boot(max int) string { return "MZ" + m.data(max) }

// names are those that directories make trouble with: one slot, many, case bits, two planes of Unicode.
var names = []string{"LINUX.EFI", "linux", "vmlinuz-6.1.0-13-amd64", "initrd.img-6.1", "a", "B.c", "Grüße aus 中国 😀.efi",
	strings.Repeat("n", 100), strings.Repeat("long ", 50) + ".efi", "UPPER.low", "x+3-0.efi", "entry with spaces.conf"}

func (m *maker) name() string {
	m.n++
	n := names[m.IntN(len(names))]
	if m.IntN(3) > 0 {
		return fmt.Sprintf("%.200s-%d", n, m.n)
	}
	return n
}

// dirs are where files come and go.
var dirs = []string{"EFI/Linux", "EFI/BOOT", "EFI/systemd", "EFI/debian", "loader/entries", "loader", token + "/6.1", token + "/6.2", "EFI/Linux/x.efi.extra.d", "EFI/Linux/a/deep/er/one"}

// kernel adds a kernel with its loader entry.
func (m *maker) kernel(t Tree, version string) {
	dir := token + "/" + version
	if m.IntN(4) == 0 {
		dir = "EFI/debian"
	}
	t[dir+"/linux-"+version] = m.boot(2500)
	t[dir+"/initrd-"+version] = m.boot(3500)
	t["loader/entries/"+version+".conf"] = fmt.Sprintf("title %s\nlinux /%s/linux-%s\ninitrd /%s/initrd-%s\n", version, dir, version, dir, version)
}

func (m *maker) base() Tree {
	t := Tree{}
	if m.IntN(8) == 0 {
		return t // an empty target
	}
	t["EFI/BOOT/BOOTX64.EFI"] = m.boot(900)
	t["EFI/systemd/systemd-bootx64.efi"] = t["EFI/BOOT/BOOTX64.EFI"]
	t["loader/loader.conf"] = "timeout 3\n"
	for i := range m.IntN(3) {
		m.kernel(t, fmt.Sprintf("6.%d", i))
	}
	for range m.IntN(4) {
		t["EFI/Linux/"+m.name()] = m.data(3000)
	}
	if m.IntN(3) == 0 {
		t["vmlinuz-linux"] = m.boot(2000)
	}
	if m.IntN(4) == 0 {
		m.many(t, 10+m.IntN(50))
	}
	if m.IntN(6) == 0 {
		t["loader/empty/"] = ""
	}
	return t
}

// many adds small files to one directory, so that it has several clusters.
func (m *maker) many(t Tree, n int) {
	dir := dirs[m.IntN(4)]
	for range n {
		m.n++
		t[fmt.Sprintf("%s/file number %d", dir, m.n)] = m.data(60)
	}
}

// pick is one of the files below dir, "" when there is none.
func (m *maker) pick(t Tree, dir string) string {
	var files []string
	for _, p := range t.paths() {
		if !strings.HasSuffix(p, "/") && (dir == "" || strings.HasPrefix(p, dir+"/")) {
			files = append(files, p)
		}
	}
	if len(files) == 0 {
		return ""
	}
	return files[m.IntN(len(files))]
}

// named says whether a loader entry refers to a path.
func (t Tree) named(p string) bool {
	for q, c := range t {
		if strings.HasPrefix(q, "loader/entries/") && strings.Contains(c, " /"+p+"\n") {
			return true
		}
	}
	return false
}

// ops are what happens to a tree between two syncs.
var ops = map[string]func(m *maker, t Tree){
	"create":  func(m *maker, t Tree) { t[path.Join(dirs[m.IntN(len(dirs))], m.name())] = m.data(3000) },
	"replace": func(m *maker, t Tree) { m.change(t, func(p string) { t[p] = m.boot(2500) }) },
	"flip": func(m *maker, t Tree) {
		m.change(t, func(p string) { // another content of the same size
			b := []byte(t[p])
			for i := range b {
				b[i] ^= byte(1 + i%7)
			}
			if !strings.HasPrefix(p, "loader/entries/") {
				t[p] = string(b)
			}
		})
	},
	"delete": func(m *maker, t Tree) {
		m.change(t, func(p string) {
			if !t.named(p) {
				delete(t, p)
			}
		})
	},
	"rename": func(m *maker, t Tree) {
		m.change(t, func(p string) {
			if !t.named(p) && strings.Contains(p, "/") {
				c := t[p]
				delete(t, p)
				t[path.Join(path.Dir(p), m.name())] = c
			}
		})
	},
	"case": func(m *maker, t Tree) {
		m.change(t, func(p string) {
			if c := t[p]; !t.named(p) && strings.Contains(p, "/") {
				delete(t, p)
				t[path.Join(path.Dir(p), strings.ToUpper(path.Base(p)))] = c
			}
		})
	},
	"move": func(m *maker, t Tree) {
		m.change(t, func(p string) {
			if c := t[p]; !t.named(p) {
				delete(t, p)
				t[path.Join(dirs[m.IntN(len(dirs))], path.Base(p))] = c
			}
		})
	},
	"counter": func(m *maker, t Tree) {
		for p, c := range maps.Clone(t) {
			if base, ok := strings.CutSuffix(p, "+3.efi"); ok {
				delete(t, p)
				t[base+".efi"] = c // it has proved good
				return
			}
		}
		t["EFI/Linux/counted+3.efi"] = m.boot(2000)
	},
	"kernel": func(m *maker, t Tree) { m.n++; m.kernel(t, fmt.Sprintf("7.%d", m.n)) },
	"old kernel": func(m *maker, t Tree) {
		if p := m.pick(t, "loader/entries"); strings.HasSuffix(p, ".conf") {
			c := t[p]
			delete(t, p)
			for q := range maps.Clone(t) {
				if strings.Contains(c, " /"+q+"\n") && !t.named(q) {
					delete(t, q)
				}
			}
		}
	},
	"grow": func(m *maker, t Tree) { m.many(t, 15+m.IntN(40)) },
	"shrink": func(m *maker, t Tree) {
		d := dirs[m.IntN(4)]
		for _, p := range t.below(d) {
			if !t.named(p) && m.IntN(4) > 0 {
				delete(t, p)
			}
		}
	},
	"root file": func(m *maker, t Tree) {
		p := selected[len(selected)-1-m.IntN(3)]
		if _, ok := t[p]; ok && m.IntN(2) == 0 && !t.named(p) {
			delete(t, p)
		} else {
			t[p] = m.boot(1500)
		}
	},
	"remove directory": func(m *maker, t Tree) {
		d := dirs[m.IntN(len(dirs))]
		for _, p := range t.below(d) {
			if !t.named(p) {
				delete(t, p)
			}
		}
	},
	"kind": func(m *maker, t Tree) { // a file becomes a directory
		m.change(t, func(p string) {
			if !t.named(p) && strings.Contains(p, "/") {
				delete(t, p)
				t[p+"/inner"] = m.data(500)
			}
		})
	},
	"empty directory": func(m *maker, t Tree) { m.n++; t[fmt.Sprintf("EFI/Linux/empty%d/", m.n)] = "" },
}

// change calls f with one of the files.
func (m *maker) change(t Tree, f func(p string)) {
	if p := m.pick(t, ""); p != "" {
		f(p)
	}
}

// fold removes what FAT cannot have beside each other: names that differ in case only, and a file where a directory is.
func (t Tree) fold() Tree {
	out := Tree{}
	seen := map[string]string{}
	isDir := map[string]bool{}
	for _, p := range t.paths() {
		k := strings.ToUpper(strings.TrimSuffix(p, "/"))
		for d := path.Dir(k); d != "."; d = path.Dir(d) {
			isDir[d] = true
		}
		if strings.HasSuffix(p, "/") {
			isDir[k] = true
		}
	}
	// Directories must be spelt alike everywhere, or a source would have two of a name.
	spelt := map[string]string{}
	for _, p := range t.paths() {
		k := strings.ToUpper(p)
		if _, dup := seen[k]; dup || isDir[k] {
			continue
		}
		seen[k] = p
		parts := strings.Split(p, "/")
		for i := range parts[:len(parts)-1] {
			d := strings.ToUpper(strings.Join(parts[:i+1], "/"))
			if s, ok := spelt[d]; ok {
				parts[i] = s
			} else {
				spelt[d] = parts[i]
			}
		}
		out[strings.Join(parts, "/")] = t[p]
	}
	return out
}

// programs makes whole programs of the files that are named like some, as no other source is replicated. It keeps the size
// of those that are large enough, and takes nothing from the generator.
func (t Tree) programs() Tree {
	out := Tree{}
	for p, c := range t {
		if strings.HasSuffix(strings.ToUpper(p), ".EFI") {
			c = fixtures.AsProgram(c)
		}
		out[p] = c
	}
	return out
}

// Generate makes the scenario of a seed. The same seed gives the same scenario.
func Generate(seed uint64) *Scenario {
	m := &maker{Rand: rng(seed)}
	s := &Scenario{Seed: seed, Select: selected, Others: Tree{}}
	for n, i := m.IntN(100), 0; ; i++ {
		if n -= geometries[i].share; n < 0 {
			s.Geometry = geometries[i].g
			break
		}
	}
	m.cluster = s.Geometry.Sector * s.Geometry.SectorsPerCluster
	s.Before = m.base().fold().programs()
	for range m.IntN(4) {
		s.Others[fmt.Sprintf("EFI/Microsoft/Boot/other%d.efi", m.IntN(9))] = m.data(2000)
	}
	if m.IntN(3) == 0 {
		s.Others["EFI/vendor/shim.efi"] = m.data(2000)
		s.Others["a file of others.txt"] = m.data(500)
	}
	s.Others = s.Others.programs()
	t := maps.Clone(s.Before)
	kinds := make([]string, 0, len(ops))
	for k := range ops {
		kinds = append(kinds, k)
	}
	slices.Sort(kinds)
	var did []string
	for range 1 + m.IntN(4) {
		k := kinds[m.IntN(len(kinds))]
		ops[k](m, t)
		did = append(did, k)
	}
	if len(t) == 0 {
		m.kernel(t, "6.0")
	}
	s.After = t.fold().programs()
	s.Member, s.Known = seed%5 < 2, seed%10 < 2
	w := &s.Wear
	if m.IntN(3) == 0 {
		w.Holes = 5 + m.IntN(60)
		did = append(did, "holes")
	}
	if m.IntN(8) == 0 && s.Geometry.Size <= 20<<20 {
		w.Leave = 60 + m.IntN(400)
		did = append(did, fmt.Sprintf("%d clusters left", w.Leave))
	}
	if m.IntN(8) == 0 {
		w.Bad, w.Lost = m.IntN(20), m.IntN(20)
		did = append(did, "bad and lost clusters")
	}
	if m.IntN(8) == 0 {
		w.Dirty, w.DirtyFAT = true, s.Geometry.Type != fatdriver.FAT12 && m.IntN(2) == 0
		did = append(did, "dirty")
	}
	if s.Geometry.Type == fatdriver.FAT32 {
		switch m.IntN(6) {
		case 0:
			w.WrongFree = true
			did = append(did, "wrong free count")
		case 1:
			w.UnknownFree = true
			did = append(did, "no free count")
		}
	}
	if m.IntN(5) == 0 {
		w.NoJournal = true
		did = append(did, "no journal")
	}
	if len(s.Before) == 0 {
		did = append(did, "empty")
	}
	s.Name = fmt.Sprintf("%s %s", s.Geometry, strings.Join(did, ", "))
	return s
}
