package exfat

import (
	"strings"
	"testing"

	"espmirror/blockdev"
	"espmirror/fixtures"
)

// ForSource is a volume with what FAT can hold and what it cannot, for the test of the source in package replicate.
func ForSource(t testing.TB) blockdev.Device {
	huge := file("huge.img", nil)
	huge.size, huge.valid = 1<<32, 0
	largest := file("largest.img", nil)
	largest.size, largest.valid = 1<<32-1, 0
	long := file("times", random(100))
	long.attr = 0x27 | 0x1000
	// 2024-02-29 12:34:56 at UTC+5:30, and without an offset.
	long.times = [3]uint32{44<<25 | 2<<21 | 29<<16 | 12<<11 | 34<<5 | 28, 44<<25 | 2<<21 | 29<<16 | 12<<11 | 34<<5 | 28, 44<<25 | 2<<21 | 29<<16}
	long.tens, long.zones = [2]byte{150, 99}, [3]byte{0x80 | 22, 0, 0}
	u := []uint16{'l', 'o', 'n', 'e', 0xD800}
	return writeVolume(t, layout{size: 9 << 30, sectorShift: 9, clusShift: 9, label: "SOURCE"},
		dir("loader", file("loader.conf", []byte("timeout 3\n"))),
		dir("EFI", dir("😀", file("𝔘.efi", []byte(fixtures.Program(strings.Repeat("u", 100_000)))))),
		huge, largest, long,
		&want{name: fromUnits(u), units: u, valid: -1},
		file("ends with a dot.", nil), file("ends with a space ", nil), file("x\x7Fy", nil),
		// One name for FAT, which folds beyond the BMP, and two for exFAT, which does not.
		file("𐐨", nil), file("𐐀", nil),
	)
}
