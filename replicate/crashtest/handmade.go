package crashtest

import (
	"fmt"
	"maps"
	"strings"

	"espmirror/blockdev"
	"espmirror/fatdriver"
	"espmirror/fixtures"
)

// Handmade is a scenario with something that the generator does not come to, or only rarely.
type Handmade struct {
	*Scenario
	// patch changes the volume as another system might have; nil for none.
	patch func(dev blockdev.Device) error
}

// Base makes the target as it is before the run.
func (h *Handmade) Base() (*fixtures.Sparse, error) {
	dev, err := h.Volume()
	if err != nil {
		return nil, err
	}
	for _, patch := range []func(blockdev.Device) error{stale, h.patch} {
		if patch == nil {
			continue
		}
		if err := patch(dev); err != nil {
			return nil, fmt.Errorf("cannot make the volume of scenario %s: %w", h.Name, err)
		}
	}
	return dev, nil
}

// stale fills free clusters, in the part of the volume that is used first, with what a directory of a long gone past
// looks like: what is not written must not be read.
func stale(dev blockdev.Device) error {
	tree, err := fixtures.ReadStrict(dev, dev.Size(), 0)
	if err != nil {
		return err
	}
	b := make([]byte, tree.ClusterSize)
	for at := 0; at < len(b); at += 32 {
		copy(b[at:], fmt.Sprintf("STALE%03dTXT ", at/32))
	}
	a, err := tree.Audit()
	if err != nil {
		return err
	}
	lost := map[uint32]bool{}
	for _, c := range append(a.Lost, a.Bad...) {
		lost[c] = true
	}
	for c := uint32(2); c < min(tree.Clusters+2, 1600); c++ {
		if tree.Reachable(c) || lost[c] {
			continue
		}
		if _, err := dev.WriteAt(b, tree.ClusterOffset(c)); err != nil {
			return err
		}
	}
	return nil
}

var (
	fat12 = Geometry{fatdriver.FAT12, 1 << 20, 512, 0, 1, 2}
	fat16 = Geometry{fatdriver.FAT16, 4 << 20, 512, 0, 1, 2}
	fat32 = Geometry{fatdriver.FAT32, 34 << 20, 512, 0, 1, 2}
)

func blob(name string, n int) string {
	b := []byte("MZ")
	for i := range n {
		b = append(b, name[i%len(name)]^byte(i>>8)|1)
	}
	return string(b)
}

func entry(paths ...string) string {
	s := "title x\n"
	for _, p := range paths {
		s += "linux /" + p + "\n"
	}
	return s
}

// HandmadeScenarios are made anew by each call.
func HandmadeScenarios() []*Handmade {
	microsoft := Tree{"EFI/Microsoft/Boot/bootmgfw.efi": blob("windows", 2000), "other file.txt": blob("text", 700)}
	boot := Tree{
		"EFI/BOOT/BOOTX64.EFI": blob("boot", 900), "EFI/Linux/a.efi": blob("a", 2500), "EFI/Linux/sub/deep/b.efi": blob("b", 1200),
		"EFI/Linux/sub/deep/c.efi": blob("c", 600), "loader/loader.conf": "timeout 3\n",
	}
	with := func(t Tree, change func(t Tree)) Tree { c := maps.Clone(t); change(c); return c }
	replaced := with(boot, func(t Tree) {
		t["EFI/Linux/a.efi"] = blob("new a", 2300)
		t["EFI/Linux/a long name that needs some slots.efi"] = blob("new", 1100)
		t["EFI/Linux/sub/deep/c.efi"] = blob("new c", 1300)
		t["EFI/Linux/sub/two clusters.efi"] = blob("two", 2*512-2)
	})
	kernels := with(boot, func(t Tree) {
		t["EFI/debian/vmlinuz-1"], t["EFI/debian/initrd-1"] = blob("vmlinuz 1", 1500), blob("initrd 1", 2500)
		t["loader/entries/1.conf"] = entry("EFI/debian/vmlinuz-1", "EFI/debian/initrd-1")
	})
	// Three kernels of which one goes first, because there is no room for a fourth.
	crowded := with(boot, func(t Tree) {
		for i := 1; i <= 3; i++ {
			v := fmt.Sprintf("tok/%d/linux", i)
			t[v], t[fmt.Sprintf("loader/entries/%d.conf", i)] = blob(v, 280_000), entry(v)
		}
	})
	renewed := with(crowded, func(t Tree) {
		delete(t, "tok/1/linux")
		delete(t, "loader/entries/1.conf")
		t["tok/4/linux"], t["loader/entries/4.conf"] = blob("tok/4/linux", 280_000), entry("tok/4/linux")
	})
	// The entries are in the root and the kernels are not, so that it takes three commits.
	updated := with(kernels, func(t Tree) {
		delete(t, "EFI/debian/vmlinuz-1")
		delete(t, "EFI/debian/initrd-1")
		delete(t, "loader/entries/1.conf")
		t["EFI/debian/vmlinuz-2"], t["EFI/debian/initrd-2"] = blob("vmlinuz 2", 1700), blob("initrd 2", 2700)
		t["loader/entries/2.conf"] = entry("EFI/debian/vmlinuz-2", "EFI/debian/initrd-2")
	})
	// New payload and an entry for it, two commits.
	added := with(kernels, func(t Tree) {
		t["EFI/debian/vmlinuz-2"] = blob("vmlinuz 2", 1700)
		t["loader/entries/2.conf"] = entry("EFI/debian/vmlinuz-2")
	})
	// Entries of others, two of ours and espmirror's fill the one cluster of the directory EFI to its last slot.
	full := Tree{}
	for i := range 9 {
		full[fmt.Sprintf("EFI/V%d/X", i)] = "x"
	}
	vendors := with(boot, func(t Tree) {
		for i := range 9 {
			t[fmt.Sprintf("EFI/a vendor with a long name %d/x.efi", i)] = blob(fmt.Sprint(i), 300)
		}
	})
	var vendorSelect []string
	for i := range 9 {
		vendorSelect = append(vendorSelect, fmt.Sprintf("EFI/a vendor with a long name %d", i))
	}
	// Files in the root, with long names that lie in two sectors, and what others deleted behind the end marker.
	rootOthers := Tree{}
	for i := range 9 {
		rootOthers[fmt.Sprintf("R%d", i)] = "r"
	}
	const one, two = "Long name of a file in the root 1.img", "Long name of a file in the root 2.img"
	rootFiles := with(boot, func(t Tree) { t[one], t[two] = blob("one", 700), blob("two", 900) })
	rootOnly := with(boot, func(t Tree) { delete(t, "EFI/Linux/a.efi") })

	var all []*Handmade
	add := func(name string, g Geometry, before, after, others Tree, w Wear, patch func(blockdev.Device) error, more ...string) {
		sel := append(append([]string{}, selected...), more...)
		all = append(all, &Handmade{&Scenario{Name: g.String() + " " + name, Geometry: g, Wear: w, Before: before.programs(), After: after.programs(), Others: others.programs(), Select: sel}, patch})
	}
	add("replace", fat16, boot, replaced, microsoft, Wear{}, nil)
	add("kernel update", fat16, kernels, updated, microsoft, Wear{}, nil)
	add("kernel added", fat16, kernels, added, microsoft, Wear{}, nil)
	add("no journal", fat16, boot, replaced, microsoft, Wear{NoJournal: true, Holes: 20}, nil)
	add("replace", fat12, boot, replaced, microsoft, Wear{Holes: 30}, nil)
	add("others' straddling clusters", fat12, boot, replaced, microsoft, Wear{}, straddle)
	add("at a straddling entry", fat12, boot, replaced, microsoft, Wear{}, func(dev blockdev.Device) error { return occupy(dev, 1360) })
	add("kernel update", fat12, kernels, updated, microsoft, Wear{Holes: 30}, nil)
	member := func(known bool) {
		h := all[len(all)-1]
		h.Member, h.Known = true, known
		h.Name += ", a member"
	}
	tok := []string{"loader", "EFI/BOOT", "EFI/Linux", "tok"}
	add("makes room", fat12, crowded, renewed, microsoft, Wear{}, nil, tok...)
	add("makes room", fat12, crowded, renewed, microsoft, Wear{}, nil, tok...)
	member(true)
	add("replace", fat16, boot, replaced, microsoft, Wear{}, nil)
	member(true)
	add("kernel update", fat16, kernels, updated, microsoft, Wear{}, nil)
	member(true)
	add("no journal", fat16, boot, replaced, microsoft, Wear{NoJournal: true}, nil)
	member(false)
	add("EFI is full", fat16, boot, vendors, full, Wear{Holes: 40}, nil, vendorSelect...)
	add("EFI is full, no journal", fat16, boot, vendors, full, Wear{Holes: 40, NoJournal: true}, nil, vendorSelect...)
	add("files in the root", fat16, rootOnly, rootFiles, rootOthers, Wear{}, behindEnd, one, two)
	add("files leave the root", fat16, rootFiles, rootOnly, rootOthers, Wear{}, behindEnd, one, two)
	// A name of 19 slots lies in two sectors or more, and Linux reads on behind the end marker.
	giant := strings.Repeat("a name that is longer than a sector ", 6) + ".img"
	add("a giant name in the root", fat16, boot, with(boot, func(t Tree) { t[giant], t[one] = blob("giant", 700), blob("one", 700) }), nil, Wear{}, nil, giant, one)
	add("another volume's journal", fat16, boot, replaced, microsoft, Wear{}, serial)
	// One commit of several bytes, in both halves of a sector.
	images := with(boot, func(t Tree) { t["A.IMG"], t["Z.IMG"] = blob("a", 700), blob("z", 900) })
	changed := with(images, func(t Tree) { t["A.IMG"], t["Z.IMG"] = blob("new a", 900), blob("new z", 700) })
	add("two files in one sector", fat16, images, changed, rootOthers, Wear{}, nil, "A.IMG", "Z.IMG")
	// One that allocates nothing, and so has nothing to roll back but its sector.
	add("a file leaves the root", fat16, images, with(images, func(t Tree) { delete(t, "Z.IMG") }), rootOthers, Wear{}, nil, "A.IMG", "Z.IMG")
	add("a file joins the root", fat16, boot, with(boot, func(t Tree) { t[one] = blob("one", 700) }), rootOthers, Wear{}, behindEnd, one)
	// The new directory and the journal in it have their entries in two FAT sectors.
	add("no journal, border of a FAT sector", fat16, boot, replaced, microsoft, Wear{NoJournal: true}, func(dev blockdev.Device) error { return occupy(dev, 255) })
	// EFI is full, and so is the FAT sector that its cluster's entry is in.
	add("no journal, no slot for it", fat16, boot, rootOnly, full, Wear{NoJournal: true}, func(dev blockdev.Device) error {
		if err := plug(dev, "EFI"); err != nil {
			return err
		}
		return occupy(dev, 256)
	})
	add("kernel in the root", fat32, boot, with(boot, func(t Tree) {
		t[token+"/7.0/linux"], t["loader/loader.conf"] = blob("linux 7.0", 1500), "timeout 5\n"
		t["loader/entries/7.conf"] = entry(token + "/7.0/linux")
	}), microsoft, Wear{}, nil)
	add("replace", fat32, boot, replaced, microsoft, Wear{}, topBits)
	add("kernel update", fat32, kernels, updated, microsoft, Wear{}, topBits)
	return all
}

// occupy makes clusters of nobody of all free ones below a number.
func occupy(dev blockdev.Device, below uint32) error {
	tree, err := fixtures.ReadStrict(dev, dev.Size(), 0)
	if err != nil {
		return err
	}
	p := fixtures.Patcher{Tree: tree, RW: dev}
	for c := uint32(2); c < below; c++ {
		if tree.Reachable(c) {
			continue
		}
		if err := p.SetFAT(c, 0x0FFFFFFF); err != nil {
			return err
		}
	}
	return nil
}

// plug puts an empty file into each deleted slot of a directory.
func plug(dev blockdev.Device, path string) error {
	tree, err := fixtures.ReadStrict(dev, dev.Size(), 0)
	if err != nil {
		return err
	}
	for _, x := range tree.Extents(tree.Get(path)) {
		b := make([]byte, x.Len)
		if _, err := dev.ReadAt(b, x.Off); err != nil {
			return err
		}
		for at := 0; at < len(b); at += 32 {
			if b[at] == 0xE5 {
				clear(b[at : at+32])
				copy(b[at:], fmt.Sprintf("PLUG%03dTXT ", at/32))
			}
		}
		if _, err := dev.WriteAt(b, x.Off); err != nil {
			return err
		}
	}
	return nil
}

// straddle gives two of the files that will be replaced a last cluster whose FAT12 entry lies in two sectors, as every
// other system does; of one the entry begins with the low byte, of the other in the middle of one.
func straddle(dev blockdev.Device) error {
	for i, path := range []string{"EFI/Linux/a.efi", "EFI/Linux/sub/deep/c.efi"} {
		tree, err := fixtures.ReadStrict(dev, dev.Size(), 0)
		if err != nil {
			return err
		}
		p := fixtures.Patcher{Tree: tree, RW: dev}
		c := uint32(341 + 341*i)
		for tree.Reachable(c) {
			c += 1024 - 342 + 341 // the next of the same kind
		}
		e := tree.Get(path)
		r := e.Runs[len(e.Runs)-1]
		last := r.First + r.Count - 1
		if e.First == last {
			return fmt.Errorf("%s has one cluster", path)
		}
		before := last - 1
		if r.Count == 1 {
			prev := e.Runs[len(e.Runs)-2]
			before = prev.First + prev.Count - 1
		}
		b := make([]byte, tree.ClusterSize)
		if _, err := dev.ReadAt(b, tree.ClusterOffset(last)); err != nil {
			return err
		}
		if _, err := dev.WriteAt(b, tree.ClusterOffset(c)); err != nil {
			return err
		}
		for _, s := range [][2]uint32{{c, 0x0FFFFFFF}, {before, c}, {last, 0}} {
			if err := p.SetFAT(s[0], s[1]); err != nil {
				return err
			}
		}
	}
	return nil
}

// behindEnd puts entries of a long gone past behind the end marker of the root.
func behindEnd(dev blockdev.Device) error {
	tree, err := fixtures.ReadStrict(dev, dev.Size(), 0)
	if err != nil {
		return err
	}
	off := tree.FATEntryExtent(0, 0).Off + int64(tree.NumFATs)*tree.FATBytes()
	b := make([]byte, tree.ClusterOffset(2)-off)
	if _, err := dev.ReadAt(b, off); err != nil {
		return err
	}
	at := 0
	for b[at] != 0 {
		at += 32
	}
	for i := at + 32; i < len(b)-32; i += 32 {
		copy(b[i:], fmt.Sprintf("GHOST%03dTXT ", i/32))
	}
	_, err = dev.WriteAt(b[at:], off+int64(at))
	return err
}

// serial makes the volume another one, as a program does that copies a volume.
func serial(dev blockdev.Device) error {
	_, err := dev.WriteAt([]byte(strings.Repeat("\x5A", 4)), 39)
	return err
}

// topBits sets some of the four bits of FAT32 entries that belong to nobody.
func topBits(dev blockdev.Device) error {
	tree, err := fixtures.ReadStrict(dev, dev.Size(), 0)
	if err != nil {
		return err
	}
	for n := range tree.NumFATs {
		x := tree.FATEntryExtent(n, 2)
		b := make([]byte, 512*4)
		if _, err := dev.ReadAt(b, x.Off); err != nil {
			return err
		}
		for i := 3; i < len(b); i += 4 {
			b[i] = b[i]&0x0F | byte(1+i/4%15)<<4
		}
		if _, err := dev.WriteAt(b, x.Off); err != nil {
			return err
		}
	}
	return nil
}
