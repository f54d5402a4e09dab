package day

import (
	"os"
	"regexp"
	"strings"
	"testing"

	"espmirror/fixtures"
	"espmirror/replicate"
)

// TestReadme runs what README.md says of the replica set, line by line, and reads its example of a set file.
func TestReadme(t *testing.T) {
	if testing.Short() {
		t.Skip("skipped: README: it builds three programs")
	}
	fixtures.Need(t, "mcopy", "mren", "fsck.fat")
	text, err := os.ReadFile("../../README.md")
	if err != nil {
		t.Fatal(err)
	}
	_, section, ok := strings.Cut(string(text), "\n## The replica set\n")
	section, _, ok2 := strings.Cut(section, "\n## ")
	if !ok || !ok2 {
		t.Fatal("README.md has no section on the replica set")
	}
	m := newMachine(t, build(t), false)
	var disks []*member
	for _, options := range []string{
		"-size 40M -fat 32 -spc 1 -serial AAAA-0001", "-size 20M -fat 16 -serial BBBB-0002", "-size 12M -fat 12 -serial CCCC-0003",
		"-size 20M -fat 16 -serial DDDD-0004",
	} {
		disks = append(disks, m.make("sd"+string(rune('a'+len(disks))), options, "", nil))
	}
	m.kernel(disks[0], "6.1.0", "+3")
	m.copyIn(disks[0], "EFI/systemd/systemd-bootx64.efi", content(fixtures.PE(9000, 1)))
	m.boot(disks[0])
	node := regexp.MustCompile(`/dev/sd([a-d])1\b`)
	ran := 0
	for i, block := range strings.Split(section, "\n```\n") {
		if i%2 == 0 {
			continue
		}
		for line := range strings.Lines(block) {
			if !strings.HasPrefix(line, "espmirror ") {
				continue
			}
			if strings.Contains(line, "remove") {
				m.unplug(disks[2])
			}
			m.sh(node.ReplaceAllString(strings.TrimSpace(line), m.root+"/dev/sd$1")).want(0)
			ran++
		}
		if strings.Contains(block, "keep-free") {
			set, err := replicate.ParseSet("README.md", []byte(block))
			if err != nil || len(set.Warnings()) > 0 || len(set.Members()) != 2 {
				t.Errorf("the example: %v %v", err, set.Warnings())
			}
		}
	}
	if ran < 10 {
		t.Errorf("%d lines were run", ran)
	}
	m.run("status").want(0).has(disks[1].guid, disks[3].guid)
}
