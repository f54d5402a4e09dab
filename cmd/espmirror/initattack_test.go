package main

import (
	"bytes"
	"encoding/binary"
	"errors"
	"hash/crc32"
	"os"
	"testing"

	"espmirror/blockdev"
	"espmirror/fixtures"
	"espmirror/gpt"
)

// TestInitForceKeepsTable: no table goes without --new-table, nor does what the new volumes are filled from.
func TestInitForceKeepsTable(t *testing.T) {
	b := initBench(t, true)
	makeFixture(t, fixtures.DiskSpec{Size: 24 << 20, GUID: pairGUID("d", 0), Parts: []fixtures.PartSpec{
		{Type: fixtures.TypeLinux, GUID: pairGUID("d", 1), Name: "data", Off: 8 << 20, Size: 12 << 20},
	}}, "disk.img")
	disk, err := os.ReadFile("disk.img")
	if err != nil {
		t.Fatal(err)
	}
	damaged := bytes.Clone(disk)
	clear(damaged[512+16:][:4]) // the checksums of both headers
	clear(damaged[len(damaged)-512+16:][:4])
	if err := os.WriteFile("damaged.img", damaged, 0o644); err != nil {
		t.Fatal(err)
	}
	for _, tc := range []struct {
		args []string
		text string
	}{
		{[]string{"--like", "primary.img", "--force", "disk.img"}, "--new-table --force"},
		{[]string{"--like", "primary.img", "--force", "damaged.img"}, "--new-table --force"},
		{[]string{"--force", "damaged.img"}, "--new-table --force"},
		{[]string{"--force", "primary.img@@p2"}, "it is the XBOOTLDR partition of the primary"},
	} {
		name := tc.args[len(tc.args)-1]
		if name == "primary.img@@p2" {
			name = "primary.img"
		}
		before, _ := os.ReadFile(name)
		b.run(append([]string{"init", "--no-set", "--primary", "primary.img"}, tc.args...)...).want(exitRefused).has(tc.text)
		if after, _ := os.ReadFile(name); !bytes.Equal(before, after) {
			t.Errorf("%q: it was written to", tc.args)
		}
	}
	b.run("init", "-q", "--no-set", "--primary", "primary.img", "--like", "primary.img", "--new-table", "--force", "damaged.img").want(0)
}

// TestInitEmptyVolume: an empty volume that is there stays as it is, and is refused when it was to be another.
func TestInitEmptyVolume(t *testing.T) {
	b := initBench(t, false)
	makeFixture(t, fixtures.DiskSpec{Size: 24 << 20, GUID: pairGUID("d", 0), Parts: []fixtures.PartSpec{
		{Type: fixtures.TypeESP, GUID: pairGUID("d", 1), Name: "EFI", Off: 1 << 20, Volume: &fixtures.VolumeSpec{FAT: 16, Size: 16 << 20, Serial: 7, Label: "MINE"}},
	}}, "disk.img")
	init := func(args ...string) *result {
		return b.run(append([]string{"init", "--no-set", "--primary", "primary.img"}, append(args, "disk.img")...)...)
	}
	init("--label", "OTHER").want(exitRefused).has("an empty volume", `its label is "MINE"`)
	init("--fat", "12").want(exitRefused).has("it is FAT16")
	init("--seed", "x").want(exitRefused).has("by the seed it would be")
	init("--label", "MINE", "--fat", "16").want(0).has("resumed")
}

// TestInitMemberLacks: what a member has not got is not told of as if it were there.
func TestInitMemberLacks(t *testing.T) {
	b := initBench(t, true)
	b.run("init", "--xbootldr", "no", "--primary", "primary.img", "--size", "24M", "new.img") // add tells that one is missing
	if r := b.run("init", "--primary", "primary.img", "new.img").has("no XBOOTLDR partition is made"); bytes.Contains([]byte(r.stdout), []byte("@@p0")) {
		t.Error(r.stdout)
	}
}

// TestInitLinks: one new file by two names is refused before it is made.
func TestInitLinks(t *testing.T) {
	b := initBench(t, false)
	init := func(names ...string) *result {
		return b.run(append([]string{"init", "--no-set", "--primary", "primary.img", "--size", "24M"}, names...)...)
	}
	if err := errors.Join(os.Symlink("new.img", "dangling"), os.WriteFile("empty", nil, 0o644), os.Link("empty", "hard"), os.Symlink("empty", "soft"), os.Symlink(".", "dir")); err != nil {
		t.Fatal(err)
	}
	init("dangling").want(exitRefused).has("leads to nothing")
	for _, two := range [][]string{{"empty", "hard"}, {"soft", "empty"}, {"a.img", "dir/a.img"}} {
		init(two...).want(exitUsage).has("named twice")
	}
	if info, err := os.Stat("empty"); err != nil || info.Size() != 0 {
		t.Error("it was written to")
	}
}

// TestInitChanged: what came to a target between the plan and the first write is not overwritten.
func TestInitChanged(t *testing.T) {
	initBench(t, false)
	if err := os.WriteFile("new.img", []byte("somebody's"), 0o644); err != nil {
		t.Fatal(err)
	}
	if err := makeFile("new.img", 1<<20); !errors.Is(err, gpt.ErrChanged) {
		t.Error(err)
	}
	if text, _ := os.ReadFile("new.img"); string(text) != "somebody's" {
		t.Error("it was written to")
	}
	p := &initPlan{found: []gpt.Signature{{Off: 1 << 20, What: "ext4"}}}
	v := &newVolume{part: gpt.Partition{Number: 1, Start: 1 << 20}}
	if err := p.known(v, []gpt.Signature{{Off: 0, What: "ext4"}}); err != nil {
		t.Error(err)
	}
	if err := p.known(v, []gpt.Signature{{Off: 1080, What: "ext4"}}); !errors.Is(err, gpt.ErrChanged) {
		t.Error(err)
	}
}

// TestInitChangedDisk: what comes to a disk after the plan is seen before the first write to any part of it.
func TestInitChangedDisk(t *testing.T) {
	b := initBench(t, true)
	const esp = 1 << 20
	disk := fixtures.DiskSpec{Size: 24 << 20, GUID: pairGUID("d", 0), Parts: []fixtures.PartSpec{
		{Type: fixtures.TypeESP, GUID: pairGUID("d", 1), Name: "EFI", Off: esp, Size: 8 << 20},
	}}
	other := disk
	other.GUID = pairGUID("e", 0)
	makeFixture(t, disk, "disk.img")
	makeFixture(t, other, "other.img")
	table, err := os.ReadFile("disk.img")
	if err != nil {
		t.Fatal(err)
	}
	otherTable, err := os.ReadFile("other.img")
	if err != nil {
		t.Fatal(err)
	}
	ext4 := func(image []byte, at int) []byte {
		image = bytes.Clone(image)
		binary.LittleEndian.PutUint16(image[at+1080:], 0xef53)
		return image
	}
	blank := make([]byte, 24<<20)
	for _, tc := range []struct {
		what          string
		args          []string
		before, after []byte
	}{
		// The XBOOTLDR partition, which would come first, is not in the table then.
		{"the blank ESP", []string{"disk.img"}, table, ext4(table, esp)},
		{"free space", []string{"disk.img"}, table, ext4(table, esp+8<<20)},
		{"the partition that is named", []string{"disk.img@@p1"}, table, ext4(table, esp)},
		{"a partition that is forced", []string{"--force", "disk.img@@p1"}, table, ext4(table, esp)},
		{"the table", []string{"disk.img"}, table, otherTable},
		{"no table", []string{"disk.img"}, table, blank},
		{"a new table", []string{"disk.img"}, blank, table},
		{"the place of the new ESP", []string{"disk.img"}, blank, ext4(blank, esp)},
	} {
		if err := os.WriteFile("disk.img", tc.before, 0o644); err != nil {
			t.Fatal(err)
		}
		b.app.device = func(d blockdev.Device) blockdev.Device { // the target is open by now
			if err := os.WriteFile("disk.img", tc.after, 0o644); err != nil {
				t.Fatal(err)
			}
			return d
		}
		r := b.run(append([]string{"init", "--no-set", "--primary", "primary.img"}, tc.args...)...)
		if r.code == 0 {
			t.Errorf("%s: it was overwritten", tc.what)
		}
		r.has("cannot init "+tc.args[len(tc.args)-1], gpt.ErrChanged.Error())
		if image, err := os.ReadFile("disk.img"); err != nil || !bytes.Equal(image, tc.after) {
			t.Errorf("%s: it was written to (%v)", tc.what, err)
		}
	}
}

// TestVerifyManifestFirmware: what firmware does not take for a partition is a difference.
func TestVerifyManifestFirmware(t *testing.T) {
	b := initBench(t, false)
	b.run("init", "-q", "--no-set", "--primary", "primary.img", "--size", "24M", "--manifest", "m.json", "m.img").want(0)
	good, err := os.ReadFile("m.img")
	if err != nil {
		t.Fatal(err)
	}
	attribute := bytes.Clone(good)
	for _, at := range [][2]int{{512, 1024}, {len(good) - 512, len(good) - 512 - 128*128}} {
		header, array := attribute[at[0]:], attribute[at[1]:]
		array[48] |= 2
		binary.LittleEndian.PutUint32(header[88:], crc32.ChecksumIEEE(array[:128*128]))
		binary.LittleEndian.PutUint32(header[16:], 0)
		binary.LittleEndian.PutUint32(header[16:], crc32.ChecksumIEEE(header[:92]))
	}
	start := bytes.Clone(good)
	start[446+8] = 2
	for text, image := range map[string][]byte{"firmware is to ignore it": attribute, "does not begin at LBA 1": start} {
		if err := os.WriteFile("m.img", image, 0o644); err != nil {
			t.Fatal(err)
		}
		b.run("verify", "--manifest", "m.json", "m.img").want(exitDiffers).has(text)
	}
}
