package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"espmirror/blockdev"
	"espmirror/fixtures"
)

const seedFile = "loader/random-seed"

// seed reads the seed of an image.
func (b *bench) seed(name string) string {
	b.t.Helper()
	return b.run("cat", name, seedFile).want(0).stdout
}

// TestRandomSeed goes through a life: none, created, refreshed, and what is left alone.
func TestRandomSeed(t *testing.T) {
	b := newBench(t)
	b.run("random-seed", "--help").want(0).golden("help-random-seed")
	volumes(t) // a.img has systemd-boot, b.img another system
	third := secondVolume
	third.FAT, third.Size, third.Serial, third.Label = 12, 2<<20, 0x3333CCCC, "THIRD"
	third.Tree = fixtures.Merge(bootTree, fixtures.TreeSpec{seedFile: fixtures.Random(512, 3)})
	makeFixture(t, third, "c.img")
	fourth := third
	fourth.Serial, fourth.Label = 0x4444DDDD, "FOURTH"
	makeFixture(t, fourth, "d.img")
	cmd := func(words ...string) []string {
		return append(append([]string{"random-seed"}, words...), "--primary", "a.img", "--target", "b.img", "--target", "c.img", "--target", "d.img")
	}
	b.run(cmd("--dry-run")...).want(0).golden("random-seed-plan")
	b.run(cmd("-n", "--json=pretty")...).want(0).json("random-seed")
	before := b.seed("c.img")
	b.writes = true
	b.run(cmd()...).want(0).golden("random-seed")
	b.writes = false
	a, c, d := b.seed("a.img"), b.seed("c.img"), b.seed("d.img")
	if len(a) != 32 || len(c) != 512 || strings.Trim(c[32:], "\x00") != "" || c[:32] == before[:32] || c == d || a == c[:32] || a == d[:32] {
		t.Errorf("seeds %x, %x, %x; it was %x", a, c, d, before)
	}
	b.run("ls", "b.img", "loader").want(1)
	b.run("check", "a.img", "b.img", "c.img", "d.img").want(0)
	b.writes = true
	doc := b.run(cmd("--json=short")...).want(0).json("random-seed")
	for i, want := range []string{"refreshed", "left alone", "refreshed", "refreshed"} {
		if v := doc["volumes"].([]any)[i].(map[string]any); v["outcome"] != want || v["device"] == "" || v["serial"] == "" {
			t.Errorf("volume %d: %v", i, v)
		}
	}
	b.run(cmd("-q")...).want(0).silent()
	b.writes = false
	if again := b.seed("a.img"); again == a {
		t.Error("the seed stayed")
	}
}

// TestRandomSeedAlone has each volume by itself do without the others, the directory too.
func TestRandomSeedAlone(t *testing.T) {
	b := newBench(t)
	volumes(t)
	if err := os.MkdirAll("efi/loader", 0o755); err != nil {
		t.Fatal(err)
	}
	b.writes = true
	b.run("random-seed", "--target", "a.img").want(0).has("created")
	b.run("random-seed", "--primary", "efi").want(0).has("left alone", "no systemd-boot")
	if err := os.WriteFile("efi/"+seedFile, []byte(strings.Repeat("s", 32)), 0o644); err != nil {
		t.Fatal(err)
	}
	t.Setenv("SYSTEMD_ESP_PATH", "efi")
	doc := b.run("random-seed", "--target", "a.img", "--json=pretty").want(0).json("random-seed")
	for i, name := range []string{"efi", "a.img"} {
		if v := doc["volumes"].([]any)[i].(map[string]any); v["name"] != name || v["outcome"] != "refreshed" || (v["directory"] == "efi") != (i == 0) {
			t.Errorf("%v", v)
		}
	}
	info, err := os.Stat("efi/" + seedFile)
	seed, rerr := os.ReadFile("efi/" + seedFile)
	if err != nil || rerr != nil || info.Mode().Perm() != 0o600 || len(seed) != 32 || string(seed) == strings.Repeat("s", 32) || string(seed) == b.seed("a.img") {
		t.Errorf("%v, %q, %v, %v", info.Mode(), seed, err, rerr)
	}
	if names, _ := filepath.Glob("efi/loader/*"); len(names) != 1 {
		t.Error(names)
	}
}

// TestRandomSeedErrors has what one volume is refused or lacks not touch the others.
func TestRandomSeedErrors(t *testing.T) {
	b := newBench(t)
	// Small ones: every command is run on all of them.
	first, second := primaryVolume, secondVolume
	first.FAT, first.Size, second.FAT, second.Size = 12, 2<<20, 12, 2<<20
	makeFixture(t, first, "a.img")
	makeFixture(t, second, "b.img")
	makeFixture(t, second, "twin.img")
	other := second
	other.Serial = 0x5555EEEE
	makeFixture(t, other, "bad.img")
	patch(t, "bad.img", "bad.img", func(d []byte) {
		i := strings.Index(string(d), "EFI        ")
		d[i+26], d[i+27] = 0xf0, 0xff
	})
	disk(t, "data.img", fixtures.TypeLinux, guidTwo, other)
	if err := os.Mkdir("dir", 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink("a.img", "link.img"); err != nil {
		t.Fatal(err)
	}
	for _, tc := range []struct {
		args string
		code int
		want string
	}{
		{"", exitUsage, "no volume was given"},
		{"a.img", exitUsage, "no argument is taken"},
		{"--target a.img --target link.img", exitRefused, "cannot renew the random seed of link.img: it is named twice (a.img)"},
		{"--primary a.img --target a.img", exitRefused, "it is named twice (a.img)"},
		{"--primary a.img --target dir", exitRefused, "it is a directory"},
		{"--target bad.img", exitRefused, "damaged"},
		{"--target data.img@@p1", exitRefused, "is not an EFI system partition"},
		{"--target b.img --target twin.img", exitRefused, "the same FAT serial number"},
		{"--target none.img", exitPartial, "cannot renew the random seed of none.img"},
	} {
		r := b.run(strings.Fields("random-seed " + tc.args)...).want(tc.code).has(tc.want)
		b.run(strings.Fields("random-seed --json=short " + tc.args)...).want(tc.code).json("random-seed")
		if strings.Count(r.stderr, "espmirror: ") == 0 {
			t.Errorf("%s: %q", tc.args, r.stderr)
		}
	}
	// Somebody has it open.
	held, err := blockdev.Open("b.img", blockdev.ReadWrite)
	if err != nil {
		t.Fatal(err)
	}
	defer held.Close()
	b.writes = true
	bad := hashes(t)
	doc := b.run("random-seed", "--json=short", "--primary", "a.img", "--target", "b.img", "--target", "bad.img", "--target", "none.img").want(exitPartial).json("random-seed")
	for i, want := range []string{"created", "busy", "refused", "missing"} {
		if v := doc["volumes"].([]any)[i].(map[string]any); v["outcome"] != want || (v["error"] == nil) != (i == 0) {
			t.Errorf("%v, want %s", v, want)
		}
	}
	for _, name := range []string{"b.img", "bad.img"} {
		if hashes(t)[name] != bad[name] {
			t.Errorf("%s was written to", name)
		}
	}
}

// The exit status 6 says that nothing was written: a fresh random seed was.
func TestSeedAndRefusal(t *testing.T) {
	b := newBench(t)
	volumes(t)
	third := secondVolume
	third.FAT, third.Size, third.Serial, third.Label = 32, 40<<20, 0x3333CCCC, "THIRD"
	third.Tree = fixtures.Merge(bootTree, fixtures.TreeSpec{seedFile: fixtures.Random(512, 3)})
	makeFixture(t, third, "c.img")
	b.writes = true
	b.run("sync", "-q", "--primary", "a.img", "--target", "c.img").want(0)
	patch(t, "b.img", "ntfs.img", func(d []byte) { copy(d[3:], "NTFS    "); clear(d[11:64]) })
	before := b.seed("c.img")
	res := b.run("sync", "--random-seed=yes", "--primary", "a.img", "--target", "ntfs.img", "--target", "c.img")
	if after := b.seed("c.img"); res.code != exitPartial || after == before {
		t.Errorf("exit status %d, and a new seed was written: %t\n%s", res.code, after != before, res.stderr)
	}
}
