package main

import (
	"os"
	"testing"

	"espmirror/fixtures"
)

// Each test here demonstrates a finding of the review: it fails while the finding stands.

// The exit status 6 says that nothing was written: a fresh random seed was.
func TestAttackSeedAndRefusal(t *testing.T) {
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
	if after := b.seed("c.img"); res.code == exitRefused && after != before {
		t.Errorf("exit status 6, and a new seed was written: %s", res.stderr)
	}
}

// The state on the primary is written, and the one target that is left to do is refused: exit status 6.
func TestAttackStateAndRefusal(t *testing.T) {
	r := newRig(t)
	r.set(3)
	// The primary's state is lost; sdb has the tree still, sdc cannot be used.
	tool(t, "mdel", "-i", r.node("sda1"), "::EFI/espmirror/state")
	data, err := os.ReadFile(r.node("sdc1"))
	if err != nil {
		t.Fatal(err)
	}
	copy(data[3:], "NTFS    ")
	clear(data[11:64])
	if err := os.WriteFile(r.node("sdc1"), data, 0o644); err != nil {
		t.Fatal(err)
	}
	before := hashes(t)
	res := r.do("sync")
	after := hashes(t)
	var changed []string
	for n := range before {
		if before[n] != after[n] {
			changed = append(changed, n)
		}
	}
	t.Log(res.code, res.stderr)
	if res.code == exitRefused && len(changed) > 0 {
		t.Errorf("exit status 6, and written to: %q\n%s", changed, res.stderr)
	}
}

// The XBOOTLDR partition of a pair is refused in the plan; its ESP has a new journal by then.
func TestAttackPairRefusedWritten(t *testing.T) {
	b := newBench(t)
	esp, boot := pairTrees("6.1")
	boot[fixtures.MachineID+"/6.1/linux"] = fixtures.PE(7_000_000, 7)
	large := volumeLike(pairBoot, 0xB007000A, boot)
	large.Size, large.FAT = 9<<20, 16
	b.pairDisk("a", volumeLike(pairESP, 0xE5B0000A, esp), large)
	b.pairDisk("b", volumeLike(pairESP, 0xE5B0000B, nil), volumeLike(pairBoot, 0xB007000B, nil))
	before := hashes(t)
	b.writes = true
	res := b.run("sync", "--primary", "a.img", "--target", "b.img")
	if res.code == exitRefused && before["b.img"] != hashes(t)["b.img"] {
		t.Errorf("exit status 6, and b.img was written to: %s", res.stderr)
	}
}
