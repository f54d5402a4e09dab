package day

import (
	"os"
	"path/filepath"
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
	// The firmware starts the machine by some entry, behind which others may come.
	const global = "-8be4df61-93ca-11d2-aa0d-00e098032b8c"
	m.variable("BootOrder"+global, []byte{1, 0})
	m.variable("Boot0001"+global, []byte("\x01\x00\x00\x00\x04\x00P\x00X\x00E\x00\x00\x00\x7f\xff\x04\x00"))
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

// TestRescue runs what docs/rescue.md says, line by line, on a set whose second disk is changed, cut and lost.
func TestRescue(t *testing.T) {
	if testing.Short() {
		t.Skip("skipped: rescue: it builds three programs")
	}
	fixtures.Need(t, "mcopy", "mren", "mdel", "fsck.fat")
	text, err := os.ReadFile("../../docs/rescue.md")
	if err != nil {
		t.Fatal(err)
	}
	m := newMachine(t, build(t), false)
	var disks []*member
	for i, serial := range []string{"AAAA-0001", "BBBB-0002", "CCCC-0003"} {
		disks = append(disks, m.make("sd"+string(rune('a'+i)), "-size 40M -fat 32 -spc 1 -serial "+serial, "", map[string]string{}))
	}
	a, b := disks[0], disks[1]
	m.kernel(a, "6.1.0", "")
	m.put(a, "EFI/systemd/systemd-bootx64.efi", content(fixtures.PE(9000, 1)))
	m.boot(a)
	m.sh("espmirror add " + m.dev(b)).want(0)
	// Nobody has booted from these disks: the page names all volumes.
	m.must(os.RemoveAll(filepath.Join(m.root, "sys/firmware")))
	m.kernel(a, "6.1.1", "")
	node := regexp.MustCompile(`/dev/sd([a-c])1?\b`)
	// What each command is to exit with, where it is not 0.
	status := map[string]int{"status --primary": 4, "verify --primary /dev/sda1 --target /dev/sdb1": 4, "sync -n": 4}
	ran := 0
	for i, block := range strings.Split(string(text), "\n```") {
		if i%2 == 0 || strings.HasPrefix(block, "sh\n") {
			continue
		}
		for line := range strings.Lines(block) {
			line = strings.TrimSpace(line)
			if !strings.HasPrefix(line, "espmirror ") {
				continue
			}
			want := 0
			for k, n := range status {
				if strings.HasPrefix(line, "espmirror "+k) {
					want = n
				}
			}
			switch {
			case strings.Contains(line, "recover -n"):
				m.sh("powercut -at commit -commit 1 -seed 2 " + m.dev(a) + " " + m.dev(b)).want(0)
				want = 5
			case strings.Contains(line, "sync -n"):
				m.kernel(a, "6.1.2", "")
			case strings.Contains(line, "--force"):
				m.mtools(b, "mdel", "::EFI/systemd/systemd-bootx64.efi")
				m.sh("espmirror sync --primary " + m.dev(a) + " --target " + m.dev(b)).want(6)
			case strings.Contains(line, " remove "):
				m.unplug(b)
				// The disk that is put in its place is blank.
				m.must(os.Truncate(disks[2].image, 0))
				m.must(os.Truncate(disks[2].image, 40<<20))
				line = strings.ReplaceAll(line, "4f5a1b20-0000-4000-8000-000000000002", b.guid)
			}
			m.sh(node.ReplaceAllString(line, m.root+"/dev/sd$1")).want(want)
			ran++
		}
	}
	if ran < 18 {
		t.Errorf("%d lines were run", ran)
	}
	for _, p := range []string{"rescued/EFI/systemd/systemd-bootx64.efi", "some/loader/esp-sync", "loader.conf"} {
		if _, err := os.Stat(filepath.Join(m.dir, p)); err != nil {
			t.Error(err)
		}
	}
	disks[2].sector, disks[2].table = m.identity(disks[2])
	m.freshSeeds(a, disks[2])
	m.check(a, disks[2])
}
