package gpt

import (
	"encoding/binary"
	"os"
	"path/filepath"
	"syscall"
	"testing"

	"espmirror/blockdev"
)

func probe(t *testing.T, img []byte) string {
	t.Helper()
	name, err := Probe(mem(img))
	if err != nil {
		t.Fatal(err)
	}
	return name
}

func TestProbeSignatures(t *testing.T) {
	for _, m := range magics {
		img := make([]byte, 256<<10)
		copy(img[m.off:], m.text)
		if got := probe(t, img); got != m.name {
			t.Errorf("%s: %q", m.name, got)
		}
		// Cut before or within the signature.
		if got := probe(t, img[:m.off+int64(len(m.text))-1]); got != "" {
			t.Errorf("%s, cut: %q", m.name, got)
		}
	}
	for _, n := range []int{0, 1, 511, 512, 4096} {
		if got := probe(t, make([]byte, n)); got != "" {
			t.Error(n, got)
		}
	}
}

// TestProbeMade asks about what other tools make.
func TestProbeMade(t *testing.T) {
	for want, command := range map[string][]string{
		FSFAT:                {"mkfs.fat", "-i", "ABCD1234", "-n", "MYLABEL"},
		FSExFAT:              {"mkfs.exfat"},
		"ext2, ext3 or ext4": {"mkfs.ext4", "-q", "-F"},
		"swap":               {"mkswap"},
	} {
		t.Run(want, func(t *testing.T) {
			path := writeImage(t, make([]byte, 4*mib))
			tool(t, command[0], append(command[1:], path)...)
			img, err := os.ReadFile(path)
			if err != nil {
				t.Fatal(err)
			}
			if got := probe(t, img); got != want {
				t.Errorf("%q", got)
			}
			if want == FSFAT {
				serial, label, ok, err := identity(mem(img))
				if serial != "ABCD-1234" || label != "MYLABEL" || !ok || err != nil {
					t.Error(serial, label, ok, err)
				}
			}
		})
	}
}

func TestFATBootSector(t *testing.T) {
	good := make([]byte, 64<<10)
	fat(good, 1, "")
	if !fatBootSector(good) {
		t.Fatal("a good one is refused")
	}
	for name, spoil := range map[string]func(b []byte){
		"jump":     func(b []byte) { b[0] = 0xea },
		"jump 2":   func(b []byte) { b[2] = 0 },
		"sector":   func(b []byte) { binary.LittleEndian.PutUint16(b[11:], 8192) },
		"cluster":  func(b []byte) { b[13] = 3 },
		"cluster0": func(b []byte) { b[13] = 0 },
		"reserved": func(b []byte) { b[14] = 0 },
		"fats":     func(b []byte) { b[16] = 0 },
		"fats 5":   func(b []byte) { b[16] = 5 },
		"media":    func(b []byte) { b[21] = 0xf7 },
		"sectors":  func(b []byte) { clear(b[19:21]) },
		"fat size": func(b []byte) { clear(b[22:24]); clear(b[36:40]) },
		"grub":     func(b []byte) { clear(b[3:90]) },
	} {
		b := make([]byte, 512)
		copy(b, good)
		spoil(b)
		if fatBootSector(b) {
			t.Error(name, "accepted")
		}
	}
}

func TestMDMember(t *testing.T) {
	le, be := binary.LittleEndian, binary.BigEndian
	const size = mib + 12*1024 + 512
	for name, c := range map[string]struct {
		off     int
		version uint32
		order   binary.ByteOrder
		want    bool
	}{
		"0.90":             {mib - 65536, 0, le, true},
		"0.90 big-endian":  {mib - 65536, 0, be, true},
		"1.0":              {mib + 4096, 1, le, true},
		"1.1":              {0, 1, le, true},
		"1.2":              {4096, 1, le, true},
		"1.0 big-endian":   {mib + 4096, 1, be, false},
		"0.90 elsewhere":   {mib, 0, le, false},
		"1.0 wrong number": {mib + 4096, 2, le, false},
	} {
		img := make([]byte, size)
		if c.off != 0 {
			fat(img[:64<<10], 1, "")
		}
		c.order.PutUint32(img[c.off:], mdMagic)
		c.order.PutUint32(img[c.off+4:], c.version)
		got, err := MDMember(mem(img))
		if got != c.want || err != nil {
			t.Errorf("%s: %v %v", name, got, err)
		}
		if fs := probe(t, img); c.want != (fs == FSMDMember) {
			t.Errorf("%s: probed as %q", name, fs)
		}
	}
	for n := range 20 {
		if got, err := MDMember(mem(make([]byte, n*4096))); got || err != nil {
			t.Error(n, got, err)
		}
	}
}

// TestProbeFaults: a sector that cannot be read is no proof that the volume is free of md.
func TestProbeFaults(t *testing.T) {
	img := make([]byte, mib)
	for _, bad := range []int64{0, mib - 65536} {
		d := blockdev.NewFaulty(mem(img), func(op blockdev.Op) error {
			if op.Off <= bad && bad < op.Off+int64(len(op.Data)) {
				return syscall.EIO
			}
			return nil
		})
		_, err := Probe(d)
		wantErr(t, err, syscall.EIO)
		_, err = MDMember(d)
		wantErr(t, err, syscall.EIO)
		if bad == 0 {
			_, _, _, err = identity(d)
			wantErr(t, err, syscall.EIO)
		}
	}
}

func TestIdentity(t *testing.T) {
	img := make([]byte, 64<<10)
	for label, want := range map[string]string{"": "", "My ESP": "My ESP"} {
		clear(img)
		fat(img, 0x00ab00cd, label)
		serial, got, ok, err := identity(mem(img))
		if serial != "00AB-00CD" || got != want || !ok || err != nil {
			t.Errorf("%q: %q %q %v %v", label, serial, got, ok, err)
		}
	}
	// A label only in the boot sector, and a root directory outside the device.
	copy(img[43:54], "BOOTLABEL  ")
	binary.LittleEndian.PutUint16(img[14:], 0xffff)
	if _, got, ok, _ := identity(mem(img)); got != "BOOTLABEL" || !ok {
		t.Errorf("%q", got)
	}
	// FAT32 has its fields 28 bytes further on.
	path := filepath.Join(t.TempDir(), "fat32")
	if err := os.WriteFile(path, make([]byte, 64*mib), 0o600); err != nil {
		t.Fatal(err)
	}
	tool(t, "mkfs.fat", "-F", "32", "-i", "0000FFFF", "-n", "THIRTYTWO", path)
	big, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if serial, label, ok, err := identity(mem(big)); serial != "0000-FFFF" || label != "THIRTYTWO" || !ok || err != nil {
		t.Error(serial, label, ok, err)
	}
	binary.LittleEndian.PutUint32(big[44:], 0)
	if _, label, _, _ := identity(mem(big)); label != "THIRTYTWO" {
		t.Error("the label of the boot sector is not used:", label)
	}
	binary.LittleEndian.PutUint32(big[44:], 0xffffffff)
	if _, label, _, _ := identity(mem(big)); label != "THIRTYTWO" {
		t.Error("root cluster out of range:", label)
	}
	copy(img, "\xeb\x76\x90EXFAT   ")
	binary.LittleEndian.PutUint32(img[100:], 0xcafebabe)
	if serial, _, ok, _ := identity(mem(img)); serial != "CAFE-BABE" || !ok {
		t.Error(serial)
	}
	if _, _, ok, err := identity(mem(make([]byte, 512))); ok || err != nil {
		t.Error(ok, err)
	}
}
