package gpt

import (
	"encoding/binary"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"espmirror/blockdev"
	"espmirror/fixtures"
)

func names(found []Signature) string {
	var s []string
	for _, f := range found {
		if !slices.Contains(s, f.What) {
			s = append(s, f.What)
		}
	}
	return strings.Join(s, ", ")
}

// TestRecogniseMagic puts each signature where its format has it, on an otherwise empty device.
func TestRecogniseMagic(t *testing.T) {
	const size = 66 << 20
	le := func(v uint32) string { return string(binary.LittleEndian.AppendUint32(nil, v)) }
	type place struct {
		off  int64
		text string
		want string
	}
	places := []place{
		{512, "EFI PART", "GPT"}, {4096, "EFI PART", "GPT"}, {size - 512, "EFI PART", "GPT (backup)"}, {size - 4096, "EFI PART", "GPT (backup)"},
		{510, "\x55\xaa", "boot sector or MBR without partitions"},
		{0, "LABELONE", "LVM physical volume"}, {512, "LABELONE", "LVM physical volume"}, {1024 + 24, "LVM2 001", "LVM physical volume"}, {1536, "LABELONE", "LVM physical volume"},
		{size - 65536, le(mdMagic) + le(0), FSMDMember}, {size - 8192, le(mdMagic) + le(1), FSMDMember},
		{0, le(mdMagic) + le(1), FSMDMember}, {4096, le(mdMagic) + le(1), FSMDMember},
		{0x4000, "SKUL\xba\xbe", "LUKS (backup header)"}, {0x400000, "SKUL\xba\xbe", "LUKS (backup header)"},
		{128 << 10, "\x0c\xb1\xba\x00\x00\x00\x00\x00", "ZFS member"}, {128<<10 + 5*1024, "\x00\x00\x00\x00\x00\xba\xb1\x0c", "ZFS member"},
		{256<<10 + 128<<10, "\x0c\xb1\xba\x00\x00\x00\x00\x00", "ZFS member"},
		{size - 256<<10 + 128<<10, "\x0c\xb1\xba\x00\x00\x00\x00\x00", "ZFS member"}, {size - 128<<10 - 256<<10, "\x0c\xb1\xba\x00\x00\x00\x00\x00", "ZFS member"},
		{8192 - 10, "SWAPSPACE2", "swap"}, {65536 - 10, "SWAPSPACE2", "swap"}, {4086, "S1SUSPEND\x00", "hibernation image"},
		{64<<20 + 64, "_BHRfS_M", "btrfs (copy)"},
		{size - 1024, "Intel Raid ISM Cfg Sig. ", "Intel RAID member"}, {size - 512, "\xde\x11\xde\x11", "DDF RAID member"},
		{size - 4096 + 60, "\x83\x74\x02\x6d", "DRBD member"},
	}
	for _, m := range slices.Concat(magics, more) {
		places = append(places, place{m.off, m.text, m.name})
	}
	for _, p := range places {
		mem := fixtures.NewSparse(size, 512)
		if _, err := mem.WriteAt([]byte(p.text), p.off); err != nil {
			t.Fatal(err)
		}
		found, err := Recognise(mem)
		if err != nil || names(found) != p.want {
			t.Errorf("%q at 0x%x: %v %v, want %s", p.text, p.off, found, err, p.want)
			continue
		}
		if err := Wipe(mem, found); err != nil {
			t.Fatal(err)
		}
		got := make([]byte, len(p.text))
		if _, err := mem.ReadAt(got, p.off); err != nil || !blockdev.Zero(got) {
			t.Errorf("%s is not gone: %v", p.want, err)
		}
	}
}

func TestRecogniseTables(t *testing.T) {
	mem := blockdev.NewMem(make([]byte, 8<<20), 512)
	if found, err := Recognise(mem); len(found) > 0 || err != nil {
		t.Error(found, err)
	}
	if dirty, err := Dirty(mem); dirty || err != nil {
		t.Error(dirty, err)
	}
	mem.Bytes()[8<<20-1] = 1
	if dirty, err := Dirty(mem); !dirty || err != nil {
		t.Error(dirty, err)
	}
	mem.Bytes()[8<<20-1] = 0
	if err := Create(mem, TypeESP, layoutOf(0)); err != nil {
		t.Fatal(err)
	}
	found, err := Recognise(mem)
	if err != nil || names(found) != "protective MBR, GPT, GPT (backup)" {
		t.Error(found, err)
	}
	clear(mem.Bytes()[446:462])
	mem.Bytes()[450], mem.Bytes()[466] = 0x83, 0x82
	if found, _ = Recognise(mem); !strings.HasPrefix(names(found), "MBR with 2 partitions") {
		t.Error(found)
	}
	// Every size, also those that hold less than a signature.
	for _, size := range []int{0, 1, 511, 512, 4095, 4096, 8192, 65536, 1 << 20} {
		if found, err := Recognise(blockdev.NewMem(make([]byte, size), 512)); err != nil || len(found) > 0 {
			t.Error(size, found, err)
		}
	}
	boom := errors.New("boom")
	bad := blockdev.NewFaulty(mem, func(op blockdev.Op) error { return boom })
	if _, err := Recognise(bad); !errors.Is(err, boom) {
		t.Error(err)
	}
	if _, err := Dirty(bad); !errors.Is(err, boom) {
		t.Error(err)
	}
	if err := Wipe(bad, found); !errors.Is(err, boom) {
		t.Error(err)
	}
}

// TestRecogniseReal asks the programs that make the formats.
func TestRecogniseReal(t *testing.T) {
	for _, tc := range []struct {
		want string
		cmd  []string
	}{
		{"ext2, ext3 or ext4", []string{"mkfs.ext4", "-q", "-F"}},
		{"XFS", []string{"mkfs.xfs", "-q", "-f"}},
		{"btrfs", []string{"mkfs.btrfs", "-q", "-f"}},
		{"F2FS", []string{"mkfs.f2fs", "-q", "-f"}},
		{"swap", []string{"mkswap", "-q"}},
		{"FAT", []string{"mkfs.fat"}},
		{FSExFAT, []string{"mkfs.exfat"}},
		{"NTFS", []string{"mkntfs", "-q", "-F", "-f"}},
		{"LUKS", []string{"cryptsetup", "luksFormat", "-q", "--type", "luks1", "--iter-time", "1", "--key-file", "/etc/passwd"}},
		{"LUKS, LUKS (backup header)", []string{"cryptsetup", "luksFormat", "-q", "--type", "luks2", "--pbkdf", "pbkdf2", "--pbkdf-force-iterations", "1000", "--key-file", "/etc/passwd"}},
		{"Minix", []string{"mkfs.minix"}},
		{"MBR with 1 partition", []string{"sh", "-c", `echo 2048,,83 | sfdisk -q "$0"`}},
		{"protective MBR, GPT, GPT (backup)", []string{"sgdisk", "-n", "1:2048:0"}},
	} {
		t.Run(tc.cmd[0]+" "+tc.want, func(t *testing.T) {
			program := tc.cmd[0]
			if program == "sh" {
				program = "sfdisk"
			}
			if _, err := exec.LookPath(program); err != nil {
				t.Skipf("%s is not installed", program)
			}
			file := filepath.Join(t.TempDir(), "disk")
			if err := os.WriteFile(file, nil, 0o600); err != nil {
				t.Fatal(err)
			}
			if err := os.Truncate(file, 320<<20); err != nil {
				t.Fatal(err)
			}
			if out, err := exec.Command(tc.cmd[0], append(tc.cmd[1:], file)...).CombinedOutput(); err != nil {
				t.Skipf("%s does not work here: %v\n%s", program, err, out)
			}
			d, err := blockdev.Open(file, blockdev.ReadWrite)
			if err != nil {
				t.Fatal(err)
			}
			defer d.Close()
			found, err := Recognise(d)
			if err != nil || !strings.Contains(names(found), tc.want) {
				t.Error(found, err)
			}
			if err := Wipe(d, found); err != nil {
				t.Fatal(err)
			}
			if found, err := Recognise(d); err != nil || len(found) > 0 {
				t.Error("still there:", found, err)
			}
		})
	}
}
