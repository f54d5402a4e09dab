package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"espmirror/blockdev"
	"espmirror/fatdriver"
	"espmirror/fixtures"
	"espmirror/gpt"
	"espmirror/replicate"
)

// initBench has primary.img, a disk with an ESP, and with boot also an XBOOTLDR partition; and the folder tree.
func initBench(t *testing.T, boot bool) *bench {
	t.Helper()
	b := newBench(t)
	spec := fixtures.DiskSpec{Size: 16 << 20, GUID: "0a0a0a0a-0000-4000-8000-000000000001", Parts: []fixtures.PartSpec{
		{Type: fixtures.TypeESP, GUID: guidOne, Name: "EFI system", Off: 1 << 20,
			Volume: &fixtures.VolumeSpec{FAT: 12, Size: 6 << 20, Serial: 0x1111AAAA, Label: "PRIMARY", Tree: bootTree}},
	}}
	if boot {
		spec.Parts = append(spec.Parts, fixtures.PartSpec{Type: fixtures.TypeXBOOTLDR, GUID: "6f0c5c7e-0000-4000-8000-000000000009", Name: "boot", Off: 8 << 20,
			Volume: &fixtures.VolumeSpec{FAT: 12, Size: 4 << 20, Serial: 0x1111BBBB, Label: "BOOT", Tree: fixtures.TreeSpec{
				"loader/entries/x.conf": fixtures.Text("title x\nlinux /x/vmlinuz\n"), "x/vmlinuz": fixtures.Text("MZ kernel x"),
			}}})
	}
	makeFixture(t, spec, "primary.img")
	b.writes = true
	return b
}

// sourceTree writes the tree of boot files to a folder, in this order.
func sourceTree(t *testing.T, dir string, backwards bool) {
	t.Helper()
	var names []string
	for name := range bootTree {
		names = append(names, name)
	}
	slices.Sort(names)
	if backwards {
		slices.Reverse(names)
	}
	for i, name := range names {
		path := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, bootTree[name].Head, 0o644); err != nil {
			t.Fatal(err)
		}
		when := fileTime.Add(time.Duration(i) * time.Hour)
		if backwards {
			when = when.Add(24 * time.Hour * 365 * 5)
		}
		if err := os.Chtimes(path, when, when); err != nil {
			t.Fatal(err)
		}
	}
}

// partition copies a partition of an image to a file of its own.
func partition(t *testing.T, image string, number int) (file string, part *gpt.Partition) {
	t.Helper()
	d, err := blockdev.Open(image, blockdev.ReadOnly)
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	table, err := gpt.Read(d)
	if err != nil || len(table.Problems) > 0 {
		t.Fatal(err, table)
	}
	part = table.Find(number)
	if part == nil {
		t.Fatalf("%s has no partition %d", image, number)
	}
	data := make([]byte, part.Size)
	if _, err := d.ReadAt(data, part.Start); err != nil {
		t.Fatal(err)
	}
	file = filepath.Join(t.TempDir(), "part")
	if err := os.WriteFile(file, data, 0o600); err != nil {
		t.Fatal(err)
	}
	return file, part
}

// sound has the judges look at an image and the volumes in it.
func soundImage(t *testing.T, image string, numbers ...int) {
	t.Helper()
	d, err := blockdev.Open(image, blockdev.ReadOnly)
	if err != nil {
		t.Fatal(err)
	}
	table, err := gpt.Read(d)
	d.Close()
	if err != nil || len(table.Problems) > 0 {
		t.Fatal(err, table)
	}
	if table.SectorSize == 512 {
		out, err := exec.Command("sgdisk", "-v", image).CombinedOutput()
		if !errors.Is(err, exec.ErrNotFound) && (err != nil || !strings.Contains(string(out), "No problems found")) {
			t.Errorf("sgdisk: %v\n%s", err, out)
		}
	}
	for _, n := range numbers {
		file, part := partition(t, image, n)
		found, err := fixtures.Fsck(file)
		if errors.Is(err, exec.ErrNotFound) {
			continue
		}
		if err != nil {
			t.Fatal(err)
		}
		if err := found.Err(0); err != nil {
			t.Errorf("partition %d: %v", n, err)
		}
		if part.Start%gpt.Align != 0 || part.Size%gpt.Align != 0 {
			t.Errorf("partition %d is not aligned: 0x%x 0x%x", n, part.Start, part.Size)
		}
	}
}

// TestInitImage makes images of all kinds, and has them judged.
func TestInitImage(t *testing.T) {
	for _, tc := range []struct {
		args []string
		fat  string
		boot bool
	}{
		{[]string{"--size", "6M"}, "FAT16", false},
		{[]string{"--size", "6M", "--fat", "12"}, "FAT12", false},
		{[]string{"--size", "24M", "--esp-size", "20M"}, "FAT16", false},
		{[]string{"--size", "64M", "--esp-size", "60M"}, "FAT32", false},
		{[]string{"--size", "64M", "--esp-size", "60M", "--fat", "16"}, "FAT16", false},
		{[]string{"--size", "64M", "--sector-size", "4096", "--esp-size", "40M"}, "FAT16", false},
		{[]string{"--size", "320M", "--sector-size", "4096", "--esp-size", "300M"}, "FAT32", false},
		{[]string{"--size", "24M"}, "FAT16", true},
		{[]string{"--size", "24M", "--sector-size", "4096"}, "FAT12", true},
		{[]string{"--size", "64M", "--xbootldr", "40M"}, "FAT16", true},
		{[]string{"--size", "24M", "--xbootldr", "no"}, "FAT16", false},
		{[]string{"--size", "9M"}, "FAT16", true}, // both are made smaller
	} {
		t.Run(strings.Join(tc.args, " "), func(t *testing.T) {
			b := initBench(t, tc.boot)
			args := append([]string{"--primary", "primary.img"}, tc.args...)
			dry := b.run(append(append([]string{"init", "-n"}, args...), "new.img")...).want(0).has("it joins the replica set of primary.img", tc.fat)
			if _, err := os.Stat("new.img"); err == nil {
				t.Fatalf("a dry run made a file: %s", dry.stdout)
			}
			doc := b.run(append(append([]string{"init", "--json=short"}, args...), "new.img")...).want(0).json("init")
			parts := doc["targets"].([]any)[0].(map[string]any)["partitions"].([]any)
			if n := len(parts); n != 1 && !tc.boot || n != 2 && tc.boot {
				t.Fatal(parts)
			}
			if fat := parts[0].(map[string]any)["fat_type"]; fat != tc.fat {
				t.Error(fat)
			}
			for i := range parts {
				soundImage(t, "new.img", i+1)
				if n := parts[i].(map[string]any)["clusters"].(float64); parts[i].(map[string]any)["fat_type"] == "FAT32" && n < 65525 {
					t.Error("FAT32 with", n, "clusters")
				}
			}
			b.run("verify", "--primary", "primary.img", "--target", "new.img@@p1").want(0)
			b.run("status", "--primary", "primary.img", "--target", "new.img@@p1").want(0).has("in sync")
			b.run("ls", "new.img@@p1", "loader").want(0)
			if r := b.run("cat", "new.img@@p1", "loader/random-seed"); r.code == 0 {
				t.Error("a random seed was made")
			}
			b.run("cat", "new.img@@p1", "loader/esp-sync").want(0).has(guidOne, parts[0].(map[string]any)["partition_guid"].(string))
			// Once more: there is nothing to do.
			b.run(append(append([]string{"init"}, args...), "new.img")...).want(0).has("member")
		})
	}
}

func TestInitSparse(t *testing.T) {
	b := initBench(t, false)
	b.run("init", "-q", "--primary", "primary.img", "--no-set", "--size", "300M", "--esp-size", "120M", "new.img").want(0)
	var blocks int64
	out, err := exec.Command("du", "-k", "new.img").Output()
	if err != nil {
		t.Skip(err)
	}
	if _, err := fmt.Sscan(string(out), &blocks); err != nil || blocks > 1024 {
		t.Errorf("the image takes %d KiB: %v", blocks, err)
	}
	soundImage(t, "new.img", 1)
}

// TestInitReproducible: the same bytes, whatever the machine, the order of the files in a folder and their times.
func TestInitReproducible(t *testing.T) {
	b := initBench(t, false)
	sourceTree(t, "one", false)
	sourceTree(t, "two", true)
	t.Setenv("SOURCE_DATE_EPOCH", "500000000") // before all of the files
	t.Setenv("TZ", "UTC")
	for i, dir := range []string{"one", "two"} {
		if i == 1 {
			old := time.Local
			time.Local = time.FixedZone("elsewhere", 5*3600)
			defer func() { time.Local = old }()
		}
		b.run("init", "-q", "--primary", dir, "--seed", "disk 1", "--size", "48M", dir+".img").want(0)
	}
	one, err := os.ReadFile("one.img")
	if err != nil {
		t.Fatal(err)
	}
	two, err := os.ReadFile("two.img")
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(one, two) {
		for i := range one {
			if one[i] != two[i] {
				t.Fatalf("the images differ at 0x%x: %x %x", i, one[i:i+32], two[i:i+32])
			}
		}
	}
	b.run("init", "-q", "--primary", "one", "--seed", "disk 2", "--size", "48M", "three.img").want(0)
	_, p1 := partition(t, "one.img", 1)
	_, p3 := partition(t, "three.img", 1)
	if p1.GUID == p3.GUID || p1.GUID != gpt.DeriveGUID("disk 1", "esp") {
		t.Error(p1.GUID, p3.GUID)
	}
	// Joining a set, too, from the same primary.
	primary, err := os.ReadFile("primary.img")
	if err != nil {
		t.Fatal(err)
	}
	var images, primaries [2][]byte
	for i := range images {
		if err := errors.Join(os.WriteFile("primary.img", primary, 0o644), os.RemoveAll("joined.img")); err != nil {
			t.Fatal(err)
		}
		b.run("init", "-q", "--primary", "primary.img", "--seed", "disk 3", "--size", "24M", "joined.img").want(0)
		images[i], _ = os.ReadFile("joined.img")
		primaries[i], _ = os.ReadFile("primary.img")
	}
	if !bytes.Equal(images[0], images[1]) {
		t.Error("two members made with one seed differ")
	}
	if !bytes.Equal(primaries[0], primaries[1]) {
		t.Error("two primaries differ")
	}
	b.run("init", "--primary", "primary.img", "--seed", "disk 3", "--size", "24M", "copy.img").want(exitRefused).has("which a member has", "another --seed")
}

// TestInitFreeSpace uses what a table leaves free, and the ESP that is blank.
func TestInitFreeSpace(t *testing.T) {
	for _, sector := range []int{512, 4096} {
		b := initBench(t, true)
		makeFixture(t, fixtures.DiskSpec{SectorSize: sector, Size: 32 << 20, GUID: pairGUID("d", 0), Parts: []fixtures.PartSpec{
			{Type: fixtures.TypeLinux, GUID: pairGUID("d", 1), Name: "root", Off: 1 << 20, Size: 4 << 20},
			{Type: fixtures.TypeLinux, GUID: pairGUID("d", 2), Name: "home", Off: 20 << 20, Size: 4 << 20},
		}}, "disk.img")
		before, err := os.ReadFile("disk.img")
		if err != nil {
			t.Fatal(err)
		}
		b.writes = false
		b.run("init", "-n", "--primary", "primary.img", "disk.img").want(0).has("disk.img@@p4", "disk.img@@p3")
		b.writes = true
		b.run("init", "--primary", "primary.img", "disk.img").want(0).has("disk.img@@p4")
		soundImage(t, "disk.img", 3, 4)
		after, err := os.ReadFile("disk.img")
		if err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(before[1<<20:5<<20], after[1<<20:5<<20]) || !bytes.Equal(before[20<<20:24<<20], after[20<<20:24<<20]) || !bytes.Equal(before[:512], after[:512]) {
			t.Error("other partitions or the MBR were changed")
		}
		b.run("verify", "--primary", "primary.img", "--target", "disk.img@@p4").want(0)
	}
}

func TestInitBlankESP(t *testing.T) {
	for _, named := range []string{"disk.img", "disk.img@@p1"} {
		b := initBench(t, false)
		makeFixture(t, fixtures.DiskSpec{Size: 12 << 20, GUID: pairGUID("d", 0), Parts: []fixtures.PartSpec{
			{Type: fixtures.TypeESP, GUID: pairGUID("d", 1), Name: "mine", Off: 1 << 20, Size: 8 << 20},
		}}, "disk.img")
		b.run("init", "--primary", "primary.img", named).want(0).has(strings.ToLower(pairGUID("d", 1)), "formatted")
		soundImage(t, "disk.img", 1)
		if _, p := partition(t, "disk.img", 1); p.Name != "mine" || !strings.EqualFold(p.GUID.String(), pairGUID("d", 1)) {
			t.Error(p)
		}
		b.writes = false
		b.run("verify", "--primary", "primary.img", "--target", "disk.img@@p1").want(0)
	}
}

// contents reads the files among some arguments.
func contents(args []string) [][]byte {
	var all [][]byte
	for _, a := range args {
		name, _, _ := strings.Cut(a, "@@")
		data, _ := os.ReadFile(name)
		all = append(all, data)
	}
	return all
}

// TestInitRefuses holds what must not be touched. Nothing is changed, not even the table.
func TestInitRefuses(t *testing.T) {
	b := initBench(t, false)
	put := func(name string, size int64, at int64, text string) string {
		t.Helper()
		f, err := os.Create(name)
		if err == nil {
			err = f.Truncate(size)
		}
		if err == nil {
			_, err = f.WriteAt([]byte(text), at)
		}
		if err := errors.Join(err, f.Close()); err != nil {
			t.Fatal(err)
		}
		return name
	}
	makeFixture(t, fixtures.DiskSpec{Size: 12 << 20, GUID: pairGUID("d", 0), Parts: []fixtures.PartSpec{
		{Type: fixtures.TypeESP, GUID: pairGUID("d", 1), Name: "mine", Off: 1 << 20, Volume: &fixtures.VolumeSpec{FAT: 12, Size: 4 << 20, Serial: 1, Tree: bootTree}},
		{Type: fixtures.TypeLinux, GUID: pairGUID("d", 2), Name: "root", Off: 6 << 20, Size: 1 << 20},
	}}, "esp.img")
	makeFixture(t, fixtures.DiskSpec{Size: 12 << 20, GUID: pairGUID("d", 0), Parts: []fixtures.PartSpec{
		{Type: fixtures.TypeLinux, GUID: pairGUID("d", 1), Name: "all", Off: 1 << 20, Size: 10 << 20},
	}}, "full.img")
	damaged, err := os.ReadFile("full.img")
	if err != nil {
		t.Fatal(err)
	}
	damaged[len(damaged)-100] ^= 1
	damaged[len(damaged)-512+60] ^= 1
	both := bytes.Clone(damaged)
	both[512+60] ^= 1
	mbr := make([]byte, 8<<20)
	copy(mbr[446:], []byte{0, 0, 2, 0, 0x83, 0, 0, 0, 0, 8, 0, 0, 0, 8, 0, 0})
	mbr[510], mbr[511] = 0x55, 0xaa
	if err := errors.Join(os.WriteFile("halfbad.img", damaged, 0o644), os.WriteFile("bad.img", both, 0o644), os.WriteFile("mbr.img", mbr, 0o644),
		os.WriteFile("empty.img", nil, 0o644)); err != nil {
		t.Fatal(err)
	}
	for _, tc := range []struct {
		args []string
		want []string
	}{
		{[]string{put("ext4.img", 8<<20, 1080, "\x53\xef")}, []string{"it holds ext2, ext3 or ext4 (at 0x438)", "--force overwrites"}},
		{[]string{put("lvm.img", 8<<20, 512, "LABELONE")}, []string{"LVM physical volume (at 0x200)"}},
		{[]string{put("luks.img", 8<<20, 0, "LUKS\xba\xbe")}, []string{"LUKS (at 0x0)"}},
		{[]string{put("md.img", 8<<20, 8<<20-8192, "\xfc\x4e\x2b\xa9\x01\x00\x00\x00")}, []string{"md RAID member"}},
		{[]string{put("backup.img", 8<<20, 8<<20-512, "EFI PART")}, []string{"GPT (backup)"}},
		{[]string{put("inside.img", 8<<20, 1<<20+65536+64, "_BHRfS_M")}, []string{"the place of the new partition holds btrfs"}},
		{[]string{"mbr.img"}, []string{"MBR with 1 partition"}},
		{[]string{put("notes.txt", 4<<20, 0, "a long text")}, []string{"the file is not empty", "--force overwrites it"}},
		{[]string{put("tail.bin", 4<<20, 4<<20-5, "text")}, []string{"the file is not empty"}},
		{[]string{put("middle.bin", 4<<20, 1<<20+77, "text")}, []string{"the file is not empty"}},
		{[]string{"bad.img"}, []string{"partition table is damaged", "--new-table --force"}},
		{[]string{"halfbad.img"}, []string{"not sound", "sgdisk"}},
		{[]string{"--force", "halfbad.img"}, []string{"not sound", "sgdisk"}},
		{[]string{"full.img"}, []string{"there is no room"}},
		{[]string{"--force", "full.img"}, []string{"there is no room"}},
		{[]string{"--new-table", "full.img"}, []string{"it holds protective MBR", "--force"}},
		{[]string{"esp.img"}, []string{"partition 1, of type ESP, holds FAT", "espmirror add esp.img@@p1", "init --force esp.img@@p1"}},
		{[]string{"--force", "esp.img"}, []string{"partition 1, of type ESP, holds FAT"}},
		{[]string{"esp.img@@p1"}, []string{"holds FAT"}},
		{[]string{"esp.img@@p2"}, []string{"is not an EFI system partition"}},
		{[]string{"--force", "esp.img@@p2"}, []string{"is not an EFI system partition"}},
		{[]string{"esp.img@@p7"}, []string{"no partition 7"}},
		{[]string{"ext4.img@@1M"}, []string{"is no partition that a table knows"}},
		{[]string{"--force", "primary.img"}, []string{"the primary (primary.img) is on it"}},
		{[]string{"--force", "--new-table", "primary.img"}, []string{"the primary (primary.img) is on it"}},
		{[]string{"--force", "primary.img@@p1"}, []string{"it is the primary"}},
		{[]string{"missing.img"}, []string{"no such file", "--size SIZE makes"}},
		{[]string{"empty.img"}, []string{"the file is empty", "--size"}},
		{[]string{"--size", "8M", "missing/x.img"}, []string{"there is no directory missing"}},
		{[]string{"--size", "9M", "mbr.img"}, []string{"and --size says"}},
		{[]string{"--size", "2M", "small.img"}, []string{"there is no room"}},
		{[]string{"--size", "3M", "--fat", "32", "small.img"}, []string{"too few clusters", "FAT32"}},
		{[]string{"--size", "40M", "--esp-size", "32M", "--fat", "32", "small.img"}, []string{"too few clusters"}},
		{[]string{"--size", "40M", "--esp-size", "60M", "small.img"}, []string{"there is no room"}},
		{[]string{"--like", "missing.img", "--size", "8M", "small.img"}, []string{"cannot copy the layout"}},
		{[]string{"--like", "mbr.img", "--size", "8M", "small.img"}, []string{"it is no sound GPT"}},
		{[]string{"--like", "full.img", "--size", "16M", "small.img"}, []string{"has no ESP"}},
		{[]string{"--like", "primary.img", "--size", "6M", "small.img"}, []string{"there is no room", "partition 1 of primary.img"}},
	} {
		for _, dry := range []bool{true, false} {
			args := []string{"init", "--primary", "primary.img"}
			if dry {
				args = append(args, "-n")
			}
			files := append([]string{"primary.img"}, tc.args...)
			before := contents(files)
			r := b.run(append(args, tc.args...)...).has(tc.want...)
			if !slices.EqualFunc(before, contents(files), bytes.Equal) {
				t.Errorf("%v changed something", tc.args)
			}
			if r.code != exitRefused && !(r.code == exitFailed && strings.Contains(r.stderr, "cannot copy the layout of missing")) {
				t.Errorf("%v: exit status %d\n%s", tc.args, r.code, r.stderr)
			}
			if _, err := os.Stat("small.img"); err == nil {
				t.Fatalf("%v made a file", tc.args)
			}
		}
	}
	// A primary whose entries name what is not there is not replicated, nor an empty one.
	b.run("init", "--primary", ".", "--size", "8M", "small.img").want(exitRefused)
	// The device is held.
	held, err := blockdev.Open("lvm.img", blockdev.ReadWrite)
	if err != nil {
		t.Fatal(err)
	}
	defer held.Close()
	b.run("init", "--force", "--primary", "primary.img", "lvm.img").want(exitRefused).has("is in use")
}

// TestInitMany makes several images in one run, and each of them by itself: the bytes are the same, in any order and with any
// number of jobs.
func TestInitMany(t *testing.T) {
	b := initBench(t, false)
	names := []string{"a.img", "sub/b.img", "c.img", "d.img"}
	if err := os.Mkdir("sub", 0o755); err != nil {
		t.Fatal(err)
	}
	args := []string{"init", "--primary", "primary.img", "--no-set", "--seed", "fleet", "--size", "24M"}
	read := func() (all [][]byte) {
		t.Helper()
		for _, name := range names {
			data, err := os.ReadFile(name)
			if err != nil {
				t.Fatal(err)
			}
			all = append(all, data)
			if err := os.Remove(name); err != nil {
				t.Fatal(err)
			}
		}
		return all
	}
	same := func(what string, want [][]byte) {
		t.Helper()
		for i, data := range read() {
			if !bytes.Equal(data, want[i]) {
				t.Errorf("%s: %s has other bytes", what, names[i])
			}
		}
	}
	b.run(append(append(slices.Clone(args), "-n"), names...)...).want(0).has("new partition table on sub/b.img", "d.img@@p1")
	doc := b.run(append(append(slices.Clone(args), "--json=short"), names...)...).want(0).json("init")
	targets, guids, serials := doc["targets"].([]any), map[any]bool{}, map[any]bool{}
	for i, x := range targets {
		target := x.(map[string]any)
		part := target["partitions"].([]any)[0].(map[string]any)
		guids[part["partition_guid"]], serials[part["serial"]], guids[target["disk_guid"]] = true, true, true
		if target["target"] != names[i] || target["made"] != true {
			t.Error(target)
		}
		soundImage(t, names[i], 1)
	}
	if len(guids) != 2*len(names) || len(serials) != len(names) {
		t.Error(guids, serials)
	}
	b.run("verify", "--primary", "primary.img", "--target", "a.img", "--target", "sub/b.img", "--target", "c.img", "--target", "d.img").want(0)
	want := read()
	b.run(append(append(slices.Clone(args), "-q", "--manifest", "fleet.json"), names...)...).want(0)
	b.run(append([]string{"verify", "--manifest", "fleet.json"}, names...)...).want(0).has("in sync")
	if r := b.run("sync", "-q", "--primary", "primary.img", "--target", "a.img", "--target", "c.img", "--target", "d.img", "--target", "sub/b.img", "--manifest", "-").want(0); r.stdout != string(readFile(t, "fleet.json")) {
		t.Errorf("two manifests of the same images differ: %s", r.stdout)
	}
	b.run("init", "-q", "--primary", "primary.img", "--no-set", "--size", "24M", "--manifest", "fleet.json", "primary.img").want(exitRefused)
	b.run("init", "--primary", "primary.img", "--no-set", "--size", "24M", "--sign", "key.pem", "e.img").want(exitUsage)
	b.run("init", "--primary", "primary.img", "--no-set", "--size", "24M", "--manifest", "fleet.json", "--sign", "key.pem", "e.img").want(exitFailed)
	b.run("init", "--primary", "primary.img", "--no-set", "--size", "24M", "--manifest", "primary.img", "e.img").want(exitRefused)
	b.run("init", "--primary", "primary.img", "--no-set", "--size", "24M", "--manifest", "e.img", "./e.img").want(exitUsage).has("is a target")
	b.run("init", "--primary", "primary.img", "--no-set", "--size", "24M", "--manifest", "e", "--sign", "key.pem", "e.sig").want(exitFailed)
	b.run("init", "-n", "--primary", "primary.img", "--no-set", "--size", "24M", "--manifest", "new.json", "e.img").want(0)
	for _, name := range []string{"e.img", "new.json"} {
		if _, err := os.Stat(name); err == nil {
			t.Errorf("there is %s", name)
		}
	}
	same("with a manifest", want)
	b.run(append(append(slices.Clone(args), "-q", "--jobs", "1"), names...)...).want(0)
	same("one at a time", want)
	b.run(append(slices.Clone(args), "--jobs", "2", "d.img", "c.img", "sub/b.img", "a.img")...).want(0).has("d.img@@p1", "a.img@@p1")
	same("the other way round", want)
	for _, name := range names {
		b.run("init", "-q", "--primary", "primary.img", "--no-set", "--seed", "fleet/"+filepath.Base(name), "--size", "24M", name).want(0)
	}
	same("by themselves", want)

	// An image that is there stays, and the others are made.
	b.run("init", "-q", "--primary", "primary.img", "--no-set", "--seed", "fleet/c.img", "--size", "24M", "c.img").want(0)
	b.run(append(append(slices.Clone(args), "-q"), names...)...).want(0)
	same("one of them there", want)
	b.run("init", "-q", "--primary", "primary.img", "--no-set", "--size", "24M", "c.img").want(0)
	b.run(append(append(slices.Clone(args), "-q"), names...)...).want(exitRefused).has("cannot init c.img", "by the seed it would be")
	if _, err := os.Stat("d.img"); err == nil {
		t.Error("d.img was made")
	}
	if err := os.Remove("c.img"); err != nil {
		t.Fatal(err)
	}

	// They join the set in one go, and know of each other.
	r := b.run("init", "--primary", "primary.img", "--seed", "set", "--size", "24M", "a.img", "c.img").want(0).has("added", "a.img@@p1", "c.img@@p1")
	set := b.run("cat", "primary.img", "loader/esp-sync").want(0).stdout
	for _, name := range []string{"a.img", "c.img"} {
		if own := b.run("cat", name, "loader/esp-sync").want(0).stdout; own != set {
			t.Errorf("%s: %s\n%s", name, own, r.stdout)
		}
		if guid := gpt.DeriveGUID("set/"+name, "esp").String(); !strings.Contains(set, "member "+guid) {
			t.Error(guid, set)
		}
	}
	b.run("status", "--primary", "primary.img", "--target", "a.img", "--target", "c.img").want(0).has("in sync")
}

// TestInitKeeps: a volume with files of its own is never taken for what an earlier run left.
func TestInitKeeps(t *testing.T) {
	b := initBench(t, false)
	makeFixture(t, fixtures.DiskSpec{Size: 24 << 20, GUID: pairGUID("d", 0), Parts: []fixtures.PartSpec{
		{Type: fixtures.TypeESP, GUID: pairGUID("d", 1), Name: "EFI", Off: 1 << 20, Volume: &fixtures.VolumeSpec{FAT: 16, Size: 16 << 20, Serial: 7, Label: "MINE",
			Tree: fixtures.TreeSpec{"EFI/mine/grub.cfg": fixtures.Text("x")}}},
	}}, "disk.img")
	init := func(args ...string) *result {
		t.Helper()
		return b.run(append([]string{"init", "--primary", "primary.img"}, args...)...)
	}
	init("disk.img").want(exitRefused).has("holds FAT")
	// A sync without a set leaves a journal too.
	b.run("sync", "-q", "--primary", "primary.img", "--select", "loader", "--target", "disk.img").want(0)
	before, err := os.ReadFile("disk.img")
	if err != nil {
		t.Fatal(err)
	}
	more := t.TempDir()
	if err := errors.Join(os.MkdirAll(filepath.Join(more, "loader"), 0o755), os.WriteFile(filepath.Join(more, "loader", "mine.conf"), []byte("mine"), 0o644)); err != nil {
		t.Fatal(err)
	}
	b.run("sync", "-q", "--primary", more, "--select", "loader/mine.conf", "--target", "disk.img").want(0)
	for _, args := range [][]string{{"disk.img"}, {"--no-set", "disk.img"}, {"-n", "disk.img"}} {
		init(args...).want(exitRefused).has("not the one that this would make", "loader/mine.conf", "espmirror add disk.img@@p1", "init --force disk.img@@p1")
	}
	b.run("cat", "disk.img", "loader/mine.conf").want(0)
	// With nothing but what the primary has, nothing can be lost.
	if err := os.WriteFile("disk.img", before, 0o644); err != nil {
		t.Fatal(err)
	}
	init("--label", "OTHER", "disk.img").want(exitRefused).has(`its label is "MINE"`)
	init("--fat", "12", "disk.img").want(exitRefused).has("it is FAT16")
	init("--seed", "x", "disk.img").want(exitRefused).has("its files are not those of the primary")
	init("--esp-size", "8M", "disk.img").want(exitRefused).has("it was to be 0x800000 bytes")
	init("--partlabel", "other", "disk.img").want(exitRefused).has(`it was to be "other"`)
	init("--partlabel", "EFI", "--esp-size", "16M", "--label", "MINE", "disk.img").want(0).has("resumed", "added")
	b.run("cat", "disk.img", "EFI/mine/grub.cfg").want(0)
	init("disk.img").want(0).has("member")
	init("--label", "OTHER", "disk.img").want(exitRefused).has(`its label is "MINE"`, "init --force disk.img@@p1")
	// The same command again changes nothing, another seed is refused.
	init("--no-set", "--seed", "one", "--size", "24M", "new.img").want(0)
	made, _ := os.ReadFile("new.img")
	init("--no-set", "--seed", "one", "--size", "24M", "new.img").want(0).has("resumed")
	if again, _ := os.ReadFile("new.img"); !bytes.Equal(made, again) {
		t.Error("the second run changed something")
	}
	init("--no-set", "--seed", "two", "--size", "24M", "new.img").want(exitRefused).has("by the seed it would be")
	// All that is refused is told.
	if err := os.WriteFile("foreign", bytes.Repeat([]byte("x"), 12<<20), 0o644); err != nil {
		t.Fatal(err)
	}
	init("--no-set", "--seed", "two", "new.img", "foreign").want(exitRefused).has("cannot init new.img", "cannot init foreign")
	init("--no-set", "--size", "1M", "small.img").want(exitRefused).has("with --size", "there is room for twice what is selected")
}

// TestInitManyRefuses: what cannot be done to one target is done to none.
func TestInitManyRefuses(t *testing.T) {
	b := initBench(t, false)
	if err := os.WriteFile("foreign", bytes.Repeat([]byte("x"), 12<<20), 0o644); err != nil {
		t.Fatal(err)
	}
	for _, tc := range []struct {
		args []string
		want int
		text string
	}{
		{[]string{"--size", "12M", "new.img", "foreign"}, exitRefused, "cannot init foreign"},
		{[]string{"--size", "12M", "new.img", "primary.img"}, exitRefused, "cannot init primary.img"},
		{[]string{"--size", "12M", "new.img", "none/b.img"}, exitRefused, "there is no directory none"},
		{[]string{"--size", "12M", "--seed", "s", "new.img", "x/../new.img"}, exitUsage, "named twice"},
		{[]string{"--force", "primary.img@@p1", "foreign"}, exitRefused, "it is the primary"},
	} {
		b.run(append([]string{"init", "--primary", "primary.img"}, tc.args...)...).want(tc.want).has(tc.text)
		if _, err := os.Stat("new.img"); err == nil {
			t.Fatalf("%q: something was made", tc.args)
		}
	}
	makeFixture(t, fixtures.DiskSpec{Size: 24 << 20, GUID: pairGUID("d", 0), Parts: []fixtures.PartSpec{
		{Type: fixtures.TypeESP, GUID: pairGUID("d", 1), Name: "EFI", Off: 1 << 20, Size: 10 << 20},
		{Type: fixtures.TypeESP, GUID: pairGUID("d", 2), Name: "EFI 2", Off: 12 << 20, Size: 10 << 20},
	}}, "two.img")
	if err := os.Link("two.img", "same.img"); err != nil {
		t.Fatal(err)
	}
	for _, other := range []string{"two.img@@p1", "two.img", "same.img", "same.img@@p1"} {
		b.run("init", "--primary", "primary.img", "two.img@@p1", other).want(exitUsage)
	}
	tool(t, "cp", "two.img", "clone.img")
	b.run("init", "--primary", "primary.img", "--no-set", "two.img@@p1", "clone.img@@p1").want(exitRefused).has("and so has one of two.img@@p1")
	b.run("init", "--primary", "primary.img", "--no-set", "two.img@@p1", "two.img@@p2").want(0).has("two.img@@p1", "two.img@@p2")
	b.run("verify", "--primary", "primary.img", "--target", "two.img@@p1", "--target", "two.img@@p2").want(0)
}

// failAt lets a device fail once, in its write or flush number k, from 0.
func failAt(d blockdev.Device, k int, err error, hit *bool) blockdev.Device {
	count := 0
	return blockdev.NewFaulty(d, func(op blockdev.Op) error {
		if op.Kind != blockdev.OpWrite && op.Kind != blockdev.OpFlush {
			return nil
		}
		if count++; count == k+1 {
			*hit = true
			return err
		}
		return nil
	})
}

// TestInitManyFaults: a disk that fails costs the others nothing.
func TestInitManyFaults(t *testing.T) {
	b := initBench(t, true)
	boom := errors.New("boom")
	want := map[string]string{}
	for name, f := range bootTree {
		want[name] = string(f.Head)
	}
	failed := 0
	for k := 0; ; k++ {
		if k > 10 && k%5 != 0 && os.Getenv("ESPMIRROR_LONG") == "" {
			continue
		}
		hit := false
		b.app.device = func(d blockdev.Device) blockdev.Device {
			if disk, ok := d.(*blockdev.Disk); !ok || disk.Path() != "bad.img" {
				return d
			}
			return failAt(d, k, boom, &hit)
		}
		for _, name := range []string{"one.img", "bad.img", "two.img"} {
			if err := os.RemoveAll(name); err != nil {
				t.Fatal(err)
			}
		}
		r := b.run("init", "--no-set", "--primary", "primary.img", "--json=short", "--jobs", fmt.Sprint(1+k%3), "--size", "9M", "one.img", "bad.img", "two.img")
		if !hit {
			r.want(0)
			break
		}
		failed++
		r.want(exitPartial).has("cannot init bad.img", "boom")
		doc := r.json("init")
		for i, made := range []bool{true, false, true} {
			target := doc["targets"].([]any)[i].(map[string]any)
			if target["made"] != made || (target["error"] == nil) != made {
				t.Errorf("fault %d: %v", k, target)
			}
		}
		for _, name := range []string{"one.img", "bad.img", "two.img"} {
			d, err := blockdev.Open(name, blockdev.ReadOnly)
			if err != nil {
				t.Fatal(err)
			}
			whole, err := wholeOrNothing(d, false, want)
			if err != nil || !whole && name != "bad.img" {
				t.Errorf("fault %d: %s: whole: %t, %v", k, name, whole, err)
			}
			d.Close()
		}
	}
	if failed < 15 {
		t.Error("only", failed, "faults")
	}
}

func TestInitUsage(t *testing.T) {
	b := initBench(t, false)
	b.writes = false
	if err := os.Mkdir("sub", 0o755); err != nil {
		t.Fatal(err)
	}
	for _, args := range [][]string{
		{}, {"--size", "4M", "a.img", "./a.img"}, {"--size", "4M", "--seed", "x", "a.img", "sub/a.img"}, {"--jobs", "0", "--size", "4M", "a.img"},
		{"--jobs", "x", "--size", "4M", "a.img"}, {"--size", "4M", "a.img", "--jobs"}, {"--size", "x", "a.img"}, {"--size", "100", "a.img"}, {"--sector-size", "1024", "a.img"}, {"--fat", "8", "a.img"},
		{"--random-seed", "maybe", "a.img"}, {"--like", "primary.img", "--esp-size", "4M", "a.img"}, {"."}, {"--partlabel", strings.Repeat("x", 37), "a.img"},
		{"--size", "4M", "--size", "5M", "a.img"}, {"--esp-size", "2M", "primary.img@@p1"}, {"--like", "a.img", "primary.img@@p1"},
	} {
		b.run(append([]string{"init", "--primary", "primary.img"}, args...)...).want(exitUsage)
	}
}

// TestInitForce overwrites what is there and may be.
func TestInitForce(t *testing.T) {
	b := initBench(t, false)
	makeFixture(t, fixtures.DiskSpec{Size: 12 << 20, GUID: pairGUID("d", 0), Parts: []fixtures.PartSpec{
		{Type: fixtures.TypeESP, GUID: pairGUID("d", 1), Name: "mine", Off: 1 << 20, Volume: &fixtures.VolumeSpec{FAT: 12, Size: 4 << 20, Serial: 1, Tree: bootTree}},
		{Type: fixtures.TypeLinux, GUID: pairGUID("d", 2), Name: "root", Off: 6 << 20, Size: 1 << 20},
	}}, "disk.img")
	b.run("init", "--force", "--primary", "primary.img", "--label", "FRESH", "disk.img@@p1").want(0).has("overwritten: FAT at 0x100000", "FRESH")
	soundImage(t, "disk.img", 1)
	b.run("verify", "--primary", "primary.img", "--target", "disk.img@@p1").want(0)
	// A member, too, is made anew in its partition.
	b.run("init", "--force", "--primary", "primary.img", "--label", "AGAIN", "disk.img@@p1").want(0).has("formatted", "AGAIN")
	b.run("status", "--primary", "primary.img", "--target", "disk.img@@p1").want(0).has("in sync", "AGAIN")
	b.run("init", "--force", "--new-table", "--no-set", "--primary", "primary.img", "--partlabel", "named", "disk.img").want(0).has("overwritten: protective MBR", "named")
	soundImage(t, "disk.img", 1)
	b.run("init", "-q", "--force", "--new-table", "--no-set", "--random-seed=yes", "--primary", "primary.img", "disk.img").want(0)
	if r := b.run("cat", "disk.img", "loader/random-seed").want(0); len(r.stdout) != 32 {
		t.Error(len(r.stdout))
	}
	if r := b.run("cat", "disk.img", "loader/esp-sync"); r.code == 0 {
		t.Error("--no-set left a set file")
	}
}

func TestInitLike(t *testing.T) {
	b := initBench(t, false)
	image := func(text string, at int64) fixtures.Base {
		d := make([]byte, 1<<20)
		copy(d[at:], text)
		return fixtures.Image(d)
	}
	raid := "A19D880F-05FC-4D3B-A006-743F0F84911E"
	makeFixture(t, fixtures.DiskSpec{Size: 16 << 20, GUID: pairGUID("d", 0), Parts: []fixtures.PartSpec{
		{Type: fixtures.TypeESP, GUID: pairGUID("d", 1), Name: "EFI", Off: 1 << 20, Size: 6 << 20},
		{Type: raid, GUID: pairGUID("d", 2), Name: "md", Off: 7 << 20, Size: 1 << 20},
		{Type: fixtures.TypeLinux, GUID: pairGUID("d", 3), Name: "pool", Off: 8 << 20, Image: image("_BHRfS_M", 65600)},
		{Type: fixtures.TypeLinux, GUID: pairGUID("d", 4), Name: "vg", Off: 9 << 20, Image: image("LABELONE", 512)},
		{Type: fixtures.TypeLinux, GUID: pairGUID("d", 5), Name: "crypt", Off: 10 << 20, Image: image("LUKS\xba\xbe", 0)},
		{Type: fixtures.TypeLinux, GUID: pairGUID("d", 6), Name: "swap", Off: 11 << 20, Image: image("SWAPSPACE2", 4086)},
		{Type: "6A898CC3-1DD2-11B2-99A6-080020736631", GUID: pairGUID("d", 7), Name: "zfs", Off: 12 << 20, Size: 1 << 20},
		{Type: fixtures.TypeLinux, GUID: pairGUID("d", 8), Name: "data", Off: 13 << 20, Image: image("XFSB", 0)},
		{Type: "21686148-6449-6E6F-744E-656564454649", GUID: pairGUID("d", 9), Name: "bios", Off: 14 << 20, Size: 1<<20 - 34*512},
	}}, "old.img")
	b.run("init", "--primary", "primary.img", "--like", "old.img", "--size", "16M", "new.img").want(0).has(
		"mdadm --manage /dev/mdX --add new.img@@p2", "btrfs replace start MISSING-DEVID new.img@@p3", "pvcreate new.img@@p4", "cryptsetup luksFormat new.img@@p5",
		"mkswap new.img@@p6", "zpool replace POOL OLD-DEVICE new.img@@p7", "new.img@@p8 has to be restored", "it holds XFS", "grub-install")
	soundImage(t, "new.img", 1)
	read := func(name string) *gpt.Table {
		d, err := blockdev.Open(name, blockdev.ReadOnly)
		if err != nil {
			t.Fatal(err)
		}
		defer d.Close()
		table, err := gpt.Read(d)
		if err != nil {
			t.Fatal(err)
		}
		return table
	}
	old, made := read("old.img"), read("new.img")
	for i := range old.Partitions {
		p, q := &old.Partitions[i], &made.Partitions[i]
		if p.Number != q.Number || p.Type != q.Type || p.Name != q.Name || p.Start != q.Start || p.Size != q.Size || p.GUID == q.GUID {
			t.Errorf("%+v\n%+v", p, q)
		}
	}
	if old.DiskGUID == made.DiskGUID {
		t.Error("the disk GUID was copied")
	}
	b.run("init", "--primary", "primary.img", "--like", "old.img", "--force", "old.img").want(exitUsage).has("is the disk that is to be made")
}

// TestInitWords: a set whose entries have words of their own for each member needs those of the new one first.
func TestInitWords(t *testing.T) {
	b := initBench(t, false)
	b.run("init", "-q", "--primary", "primary.img", "--size", "12M", "second.img").want(0)
	set := b.run("cat", "primary.img", "loader/esp-sync").want(0).stdout
	_, two := partition(t, "second.img", 1)
	if err := os.MkdirAll("edit/loader", 0o755); err != nil {
		t.Fatal(err)
	}
	set += "replace root " + guidOne + " UUID=one\nreplace root " + two.GUID.String() + " UUID=two\n"
	edit := func(text string) {
		t.Helper()
		if err := os.WriteFile("edit/loader/esp-sync", []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
		b.run("sync", "-q", "--force", "--primary", "edit", "--select", "loader/esp-sync", "--target", "primary.img").want(0)
	}
	edit(set)
	b.run("init", "--primary", "primary.img", "--size", "12M", "third.img").want(exitRefused).has("has no text for root of the new member", "with --seed the GUID is known before")
	third := gpt.DeriveGUID("third", "esp").String()
	edit(set + "member " + third + "\nreplace root " + third + " UUID=three\n")
	// The second member is an image, and found by nobody who is not told of it.
	b.run("init", "-q", "--primary", "primary.img", "--seed", "third", "--size", "12M", "third.img").want(exitPartial).has("PARTUUID=" + two.GUID.String())
	b.run("verify", "--primary", "primary.img", "--target", "third.img").want(0)
}

// madeTree reads what is selected of a volume as a map.
func madeTree(dev blockdev.Device) (map[string]string, error) {
	v, err := fatdriver.Open(dev)
	if err != nil {
		return nil, err
	}
	src, err := replicate.OpenVolumeSource("state", v)
	if err != nil {
		return nil, err
	}
	files := map[string]string{}
	var walk func(it *replicate.Item) error
	walk = func(it *replicate.Item) error {
		for _, c := range it.Children {
			if c.Dir {
				if err := walk(c); err != nil {
					return err
				}
				continue
			}
			r, err := src.Open(c)
			if err != nil {
				return err
			}
			text, err := io.ReadAll(r)
			r.Close()
			if err != nil {
				return err
			}
			if !strings.HasPrefix(c.Path, "EFI/espmirror/") {
				files[c.Path] = string(text)
			}
		}
		return nil
	}
	return files, walk(src.Root())
}

// recorded runs init once and returns what it wrote before it joined the set.
func recorded(t *testing.T, b *bench, before []byte, sector int, args ...string) *fixtures.Recording {
	t.Helper()
	var rec *blockdev.Recorder
	b.app.device = func(d blockdev.Device) blockdev.Device {
		rec = blockdev.NewRecorder(d)
		return rec
	}
	b.run(append([]string{"init", "-q", "--primary", "primary.img"}, args...)...).want(0)
	b.app.device = func(d blockdev.Device) blockdev.Device { return d }
	out := &fixtures.Recording{Base: fixtures.Image(before), Sector: sector}
	for _, op := range rec.Ops() {
		switch op.Kind {
		case blockdev.OpFlush:
			out.Ops = append(out.Ops, fixtures.Op{Flush: true})
		case blockdev.OpWrite:
			out.Ops = append(out.Ops, fixtures.Op{Off: op.Off, Data: op.Data})
		}
	}
	return out
}

// TestInitCut: after a power cut at any moment, with any of the unflushed writes lost, there is no volume or a whole one;
// and init, run again, comes to the end.
func TestInitCut(t *testing.T) {
	rerun := 61
	if os.Getenv("ESPMIRROR_LONG") != "" {
		rerun = 5
	}
	for _, tc := range []struct {
		name   string
		boot   bool
		sector int
		parts  []fixtures.PartSpec // of the table that is there before; nil: a blank image
		at     string
		args   []string
	}{
		{name: "blank", sector: 512, args: []string{"--size", "8M"}},
		{name: "blank with XBOOTLDR", boot: true, sector: 512, args: []string{"--size", "9M"}},
		{name: "blank 4096", sector: 4096, args: []string{"--size", "8M", "--sector-size", "4096"}},
		{name: "free space", boot: true, sector: 512, parts: []fixtures.PartSpec{{Type: fixtures.TypeLinux, GUID: pairGUID("d", 1), Name: "root", Off: 1 << 20, Size: 1 << 20}}},
		{name: "partition", sector: 512, at: "@@p1", parts: []fixtures.PartSpec{{Type: fixtures.TypeESP, GUID: pairGUID("d", 1), Name: "esp", Off: 1 << 20, Size: 6 << 20}}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			b := initBench(t, tc.boot)
			size := int64(9 << 20)
			if len(tc.args) > 0 && tc.args[1] == "8M" {
				size = 8 << 20
			}
			before := make([]byte, size)
			base := int64(0)
			if tc.parts != nil {
				makeFixture(t, fixtures.DiskSpec{SectorSize: tc.sector, Size: size, GUID: pairGUID("d", 0), Parts: tc.parts}, "disk.img")
				var err error
				if before, err = os.ReadFile("disk.img"); err != nil {
					t.Fatal(err)
				}
			}
			primary, err := os.ReadFile("primary.img")
			if err != nil {
				t.Fatal(err)
			}
			disk := before
			if tc.at != "" {
				base, disk = tc.parts[0].Off, before[tc.parts[0].Off:][:tc.parts[0].Size]
			}
			recording := recorded(t, b, disk, tc.sector, append(slices.Clone(tc.args), "disk.img"+tc.at)...)
			want := map[string]string{}
			for name, f := range bootTree {
				want[name] = string(f.Head)
			}
			whole, none, reruns, n := 0, 0, 0, 0
			_, err = recording.Explore(fixtures.CrashOptions{Limit: 16, Random: 6}, func(s *fixtures.State) error {
				n++
				valid, err := wholeOrNothing(s, tc.at != "", want)
				if err != nil {
					return err
				}
				if valid {
					whole++
				} else {
					none++
				}
				// A sample of the states, and all of the last ones, are gone on from.
				if n%rerun != 1 && !valid {
					return nil
				}
				reruns++
				image := bytes.Clone(before)
				data, err := s.Bytes()
				if err != nil {
					return err
				}
				copy(image[base:], data)
				if err := errors.Join(os.WriteFile("cut.img", image, 0o644), os.WriteFile("primary.img", primary, 0o644)); err != nil {
					return err
				}
				r := b.run(append(append([]string{"init", "-q", "--primary", "primary.img"}, tc.args...), "cut.img"+tc.at)...)
				if r.code != 0 {
					return fmt.Errorf("run again: exit status %d: %s", r.code, r.stderr)
				}
				target := "cut.img"
				if r := b.run("verify", "--primary", "primary.img", "--target", target); r.code != 0 {
					return fmt.Errorf("verify: exit status %d: %s%s", r.code, r.stdout, r.stderr)
				}
				if r := b.run("status", "--primary", "primary.img", "--target", target); r.code != 0 {
					return fmt.Errorf("status: exit status %d: %s%s", r.code, r.stdout, r.stderr)
				}
				d, err := blockdev.Open("cut.img", blockdev.ReadOnly)
				if err != nil {
					return err
				}
				defer d.Close()
				table, err := gpt.Read(d)
				if err != nil || len(table.Problems) > 0 || len(table.OfType(gpt.TypeESP)) != 1 {
					return fmt.Errorf("after the second run: %+v: %w", table, err)
				}
				return nil
			})
			if err != nil || whole == 0 || none < 20 {
				t.Error(err, whole, none)
			}
			t.Logf("%d states: %d without a volume, %d with a whole one; %d gone on from", n, none, whole, reruns)
		})
	}
}

// TestInitCutControl: the test above must notice a barrier that is missing.
func TestInitCutControl(t *testing.T) {
	b := initBench(t, false)
	recording := recorded(t, b, make([]byte, 8<<20), 512, "--size", "8M", "disk.img")
	want := map[string]string{}
	for name, f := range bootTree {
		want[name] = string(f.Head)
	}
	var flushes []int
	for i, op := range recording.Ops {
		if op.Flush {
			flushes = append(flushes, i)
		}
	}
	without := func(drop ...int) error {
		r := &fixtures.Recording{Base: recording.Base, Sector: recording.Sector}
		for i, op := range recording.Ops {
			if !slices.Contains(drop, i) {
				r.Ops = append(r.Ops, op)
			}
		}
		_, err := r.Explore(fixtures.CrashOptions{Limit: 16, Random: 60}, func(s *fixtures.State) error {
			_, err := wholeOrNothing(s, false, want)
			return err
		})
		return err
	}
	if err := without(); err != nil {
		t.Fatal(err)
	}
	if without(flushes...) == nil {
		t.Error("no flush at all, and nothing was noticed")
	}
	// In front of the first sector is a flush of its own, and before that those that end the transaction: all of them, as one
	// that only closes the journal makes no difference to the tree.
	if last := flushes[len(flushes)-1]; recording.Ops[last-1].Off != 1<<20 {
		t.Errorf("the last write is at 0x%x, not the first sector of the ESP", recording.Ops[last-1].Off)
	}
	if n := len(flushes); without(flushes[n-8:n-1]...) == nil {
		t.Error("the first sector may come before the rest, and nothing was noticed")
	}
}

// wholeOrNothing reads a state as anybody would: by the table, and the ESP that it names.
func wholeOrNothing(s blockdev.Device, part bool, want map[string]string) (bool, error) {
	volume := s
	if !part {
		table, err := gpt.Read(s)
		if errors.Is(err, gpt.ErrNoTable) {
			found, err := gpt.Recognise(s)
			if err == nil && len(found) > 0 {
				err = fmt.Errorf("there is no table, but %v", found)
			}
			return false, err
		}
		if err != nil {
			return false, err
		}
		esps := table.OfType(gpt.TypeESP)
		if len(esps) == 0 {
			return false, nil
		}
		if len(esps) > 1 {
			return false, fmt.Errorf("%d ESPs", len(esps))
		}
		if volume, err = blockdev.Window(s, esps[0].Start, esps[0].Size); err != nil {
			return false, err
		}
	}
	what, err := gpt.Probe(volume)
	if err != nil || what == "" {
		return false, err
	}
	got, err := madeTree(volume)
	if err != nil {
		return false, fmt.Errorf("half a volume: %w", err)
	}
	if len(got) != len(want) {
		return false, fmt.Errorf("half a tree: %d files of %d", len(got), len(want))
	}
	for name, text := range want {
		if got[name] != text {
			return false, fmt.Errorf("half a tree: %s is %q", name, got[name])
		}
	}
	return true, nil
}

// TestInitFaults: an error of the device at any operation ends the run, and init comes to the end when it is run again.
func TestInitFaults(t *testing.T) {
	b := initBench(t, true)
	primary, err := os.ReadFile("primary.img")
	if err != nil {
		t.Fatal(err)
	}
	boom := errors.New("boom")
	failed := 0
	// The first operations are those of the table; of the rest every fourth is enough for each run of the tests.
	step := 4
	if os.Getenv("ESPMIRROR_LONG") != "" {
		step = 1
	}
	for k := 0; ; k++ {
		if k > 20 && k%step != 0 {
			continue
		}
		hit := false
		b.app.device = func(d blockdev.Device) blockdev.Device {
			return failAt(d, k, boom, &hit)
		}
		if err := errors.Join(os.RemoveAll("new.img"), os.WriteFile("primary.img", primary, 0o644)); err != nil {
			t.Fatal(err)
		}
		r := b.run("init", "-q", "--primary", "primary.img", "--size", "9M", "new.img")
		if !hit {
			r.want(0)
			break
		}
		failed++
		if r.code != exitFailed && r.code != exitPartial || !strings.Contains(r.stderr, "boom") {
			t.Fatalf("fault %d: exit status %d: %s", k, r.code, r.stderr)
		}
		d, err := blockdev.Open("new.img", blockdev.ReadOnly)
		if err != nil {
			t.Fatal(err)
		}
		want := map[string]string{}
		for name, f := range bootTree {
			want[name] = string(f.Head)
		}
		if _, err := wholeOrNothing(d, false, want); err != nil {
			t.Errorf("fault %d: %v", k, err)
		}
		d.Close()
		b.app.device = func(d blockdev.Device) blockdev.Device { return d }
		if k%5 == 0 || k < 8 {
			b.run("init", "-q", "--primary", "primary.img", "--size", "9M", "new.img").want(0)
			b.run("verify", "--primary", "primary.img", "--target", "new.img").want(0)
		}
	}
	if failed < 30 {
		t.Error("only", failed, "faults")
	}
	t.Log(failed, "faults")
}

// TestInitJoinFails: what fails between the new volume and the set leaves a whole volume, and is gone on from.
func TestInitJoinFails(t *testing.T) {
	b := initBench(t, true)
	primary, err := os.ReadFile("primary.img")
	if err != nil {
		t.Fatal(err)
	}
	real := b.app.engine.sync
	calls := 0
	b.app.engine.sync = func(ctx context.Context, jobs []replicate.Job) ([][]replicate.Result, error) {
		if calls++; calls == 3 { // the rehearsal, the filling, and the joining
			return nil, replicate.ErrRefused
		}
		return real(ctx, jobs)
	}
	b.run("init", "--primary", "primary.img", "--size", "16M", "new.img").want(exitPartial)
	b.app.engine.sync = real
	b.run("init", "--primary", "primary.img", "new.img").want(0)
	b.run("status", "--primary", "primary.img", "--target", "new.img").want(0).has("in sync")

	// The primary has changed meanwhile.
	if err := os.WriteFile("primary.img", primary, 0o644); err != nil {
		t.Fatal(err)
	}
	calls = 0
	b.app.engine.sync = func(ctx context.Context, jobs []replicate.Job) ([][]replicate.Result, error) {
		if calls++; calls == 3 {
			return nil, context.Canceled
		}
		return real(ctx, jobs)
	}
	b.run("init", "--primary", "primary.img", "--size", "16M", "third.img").want(exitInterrupt)
	b.app.engine.sync = real
	sourceTree(t, "tree", false)
	if err := os.WriteFile("tree/loader/loader.conf", []byte("timeout 7\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	b.run("sync", "-q", "--force", "--primary", "tree", "--select", "loader/loader.conf", "--target", "primary.img").want(0)
	// By then its files could be anybody's: that is what sync is for.
	b.run("init", "-q", "--primary", "primary.img", "third.img").want(exitRefused).has("replace loader/loader.conf", "hint: `espmirror sync --target third.img@@p1` brings the files")
	b.run("sync", "-q", "--primary", "primary.img", "--target", "third.img").want(0)
	b.run("init", "-q", "--primary", "primary.img", "third.img").want(0)
	b.run("verify", "--primary", "primary.img", "--target", "third.img").want(0)
}

// TestInitLoop does it to block devices, of both sector sizes.
func TestInitLoop(t *testing.T) {
	for _, sector := range []string{"512", "4096"} {
		b := initBench(t, true)
		if err := os.WriteFile("disk", nil, 0o644); err != nil {
			t.Fatal(err)
		}
		if err := os.Truncate("disk", 24<<20); err != nil {
			t.Fatal(err)
		}
		node := loop(t, b, "disk", "--sector-size", sector)
		b.run("init", "--primary", "primary.img", "--discard", node).want(0).has("left to do", "efibootmgr --create --disk "+node+" --part 1", `EFI\systemd\systemd-bootx64.efi`)
		b.run("init", "--primary", "primary.img", "--discard", node).want(0).has("member")
		if out, err := exec.Command("sgdisk", "-v", node).CombinedOutput(); !errors.Is(err, exec.ErrNotFound) && (err != nil || !strings.Contains(string(out), "No problems found")) {
			t.Errorf("sgdisk: %v\n%s", err, out)
		}
		b.run("verify", "--primary", "primary.img", "--target", node).want(0)
		b.run("init", "--primary", "primary.img", "--force", "--new-table", "--no-set", node).want(0)
		// What comes after the plan is seen before it is discarded.
		const place = 1<<20 + 1080 // of the magic number of ext4, in the first partition
		b.app.device = func(d blockdev.Device) blockdev.Device {
			f, err := os.OpenFile(node, os.O_RDWR, 0)
			if err != nil {
				t.Fatal(err)
			}
			_, err = f.WriteAt([]byte{0x53, 0xef}, place)
			if err := errors.Join(err, f.Sync(), f.Close()); err != nil {
				t.Fatal(err)
			}
			return d
		}
		if r := b.run("init", "--primary", "primary.img", "--force", "--new-table", "--no-set", "--discard", node); r.code == 0 {
			t.Error("it was overwritten")
		} else {
			r.has(gpt.ErrChanged.Error())
		}
		b.app.device = func(d blockdev.Device) blockdev.Device { return d }
		if image, err := os.ReadFile("disk"); err != nil || image[place] != 0x53 || image[place+1] != 0xef {
			t.Errorf("it was discarded (%v)", err)
		}
		held, err := os.OpenFile(node, os.O_RDWR|os.O_EXCL, 0)
		if err != nil {
			t.Fatal(err)
		}
		b.run("init", "--primary", "primary.img", "--force", "--new-table", node).want(exitRefused).has("is in use")
		held.Close()
	}
}

// TestFATBySize: by size alone every volume is one that every firmware takes, and never FAT32 below 65525 clusters.
func TestFATBySize(t *testing.T) {
	for _, sector := range []int{512, 4096} {
		last := fatdriver.Type(0)
		for size := int64(1 << 20); size <= 4<<30; size += max(1<<20, size/37/gpt.Align*gpt.Align) {
			dev := fixtures.NewSparse(size, sector)
			if err := fatdriver.Format(dev, fatdriver.FormatOptions{}); err != nil {
				t.Fatal(size, err)
			}
			v, err := fatdriver.Open(dev)
			if err != nil {
				t.Fatal(size, err)
			}
			g := v.Geometry()
			if g.Type == fatdriver.FAT32 && g.Clusters < 65525 || g.Type != fatdriver.FAT32 && g.Clusters >= 65525 || g.Type == fatdriver.FAT12 && g.Clusters >= 4085 {
				t.Errorf("%d bytes: %v with %d clusters", size, g.Type, g.Clusters)
			}
			if err := v.TargetError(); err != nil || g.Type < last || g.DataOff%4096 != 0 {
				t.Errorf("%d bytes: %v %+v", size, err, g)
			}
			if g.Type != last {
				t.Logf("%v from %d MiB on, sectors of %d", g.Type, size>>20, sector)
			}
			last = g.Type
		}
	}
}

func TestPlace(t *testing.T) {
	free := []gpt.Extent{{Start: 1 << 20, Size: 4 << 20}, {Start: 8 << 20, Size: 20 << 20}}
	got, err := place(free, []wantedSize{{size: 6 << 20}, {size: 4 << 20}})
	if err != nil || got[0] != (gpt.Extent{Start: 8 << 20, Size: 6 << 20}) || got[1] != (gpt.Extent{Start: 14 << 20, Size: 4 << 20}) {
		t.Error(got, err)
	}
	if got, err = place(free, []wantedSize{{size: 60 << 20}, {size: 5 << 20, fixed: true}}); err != nil || got[0].Size != 15<<20 || got[1].Size != 5<<20 {
		t.Error(got, err)
	}
	for _, ws := range [][]wantedSize{{{size: 60 << 20, fixed: true}}, {{size: 1 << 20}, {size: 20 << 20, fixed: true}}} {
		if got, err := place(free, ws); !errors.Is(err, gpt.ErrNoRoom) {
			t.Error(got, err)
		}
	}
	if _, err := place(nil, []wantedSize{{size: 1 << 20}}); !errors.Is(err, gpt.ErrNoRoom) {
		t.Error(err)
	}
}

// TestEndOfOptions: behind -- everything is an argument, and nowhere else is a dash taken for part of a name.
func TestEndOfOptions(t *testing.T) {
	b := initBench(t, false)
	if err := os.Rename("primary.img", "-x.img"); err != nil {
		t.Fatal(err)
	}
	b.run("ls", "--", "-x.img").want(0).has("EFI")
	b.run("ls", "--json=short", "--", "-x.img").want(0)
	b.run("ls", "./-x.img", "--json").want(exitUsage).has("stands behind an argument", "or behind --")
	b.run("ls", "--", "./-x.img", "--json").want(exitFailed).has("cannot list /--json")
	b.run("ls", "-x.img").want(exitUsage)
}
