package fatdriver

import (
	"bytes"
	"errors"
	"fmt"
	"os/exec"
	"regexp"
	"strings"
	"testing"
	"time"

	"espmirror/blockdev"
)

// formatMatrix is every combination of type, sector size, cluster size and number of FATs with a few sizes each: one
// near the lower and one near the upper end of the type, and one that divides by nothing.
func formatMatrix() (list []struct {
	size int64
	o    FormatOptions
}) {
	for _, ss := range []int{512, 1024, 2048, 4096} {
		for _, spc := range []int{0, 1, 2, 8, 16, 64, 128} {
			if spc*ss > maxClusterSize || (ss == 1024 || ss == 2048) && spc > 2 {
				continue
			}
			for _, fats := range []int{1, 2} {
				for _, typ := range []Type{FAT12, FAT16, FAT32} {
					cs := int64(max(spc, 1) * ss)
					counts := []int64{100, 2999, 3900}
					switch typ {
					case FAT16:
						counts = []int64{4200, 30011, 64000}
					case FAT32:
						counts = []int64{66000, 70001, 300_000}
					}
					for _, n := range counts {
						list = append(list, struct {
							size int64
							o    FormatOptions
						}{n*cs + n*8 + 64*int64(ss) + n/3*2, FormatOptions{
							Type: typ, SectorSize: ss, SectorsPerCluster: spc, NumFATs: fats,
							Serial: uint32(n), Label: "ESP", HiddenSectors: 2048,
						}})
					}
				}
			}
		}
	}
	return list
}

var fsckSummary = regexp.MustCompile(`^\S+: \d+ files, \d+/\d+ clusters$`)

// fsckClean runs fsck.fat -n, which may say no more than its version and its summary.
func fsckClean(t testing.TB, fsck, img string) {
	t.Helper()
	out, err := exec.Command(fsck, "-n", img).CombinedOutput()
	lines := strings.Split(strings.TrimSpace(string(out)), "\n")
	if err != nil || len(lines) != 2 || !strings.HasPrefix(lines[0], "fsck.fat ") || !fsckSummary.MatchString(lines[1]) {
		t.Fatalf("fsck.fat: %v\n%s", err, out)
	}
}

func TestFormatMatrix(t *testing.T) {
	fsck := tool(t, "fsck.fat")
	mdir := tool(t, "mdir")
	for i, c := range formatMatrix() {
		name := fmt.Sprintf("%v_ss%d_spc%d_fats%d_%d", c.o.Type, c.o.SectorSize, c.o.SectorsPerCluster, c.o.NumFATs, c.size)
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			d := newSparse(c.size, 512)
			if err := Format(d, c.o); err != nil {
				t.Fatal(err)
			}
			checkClean(t, d)
			img := d.file(t)
			fsckClean(t, fsck, img)
			if i%5 != 0 {
				return // mtools takes longer than all the rest, and looks at the same few fields
			}
			out, err := exec.Command(mdir, "-i", img, "::").CombinedOutput()
			if err != nil || !strings.Contains(string(out), "Volume in drive : is ESP") {
				t.Fatalf("mdir: %v\n%s", err, out)
			}
		})
	}
}

// checkClean wants a volume that Check has nothing to say about and that may be written to.
func checkClean(t testing.TB, d blockdev.Device) *Report {
	t.Helper()
	v, err := Open(d)
	if err != nil {
		t.Fatal(err)
	}
	r, err := v.Check()
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range r.Findings {
		t.Errorf("%v: %v", f.Severity, f)
	}
	if err := v.TargetError(); err != nil {
		t.Error(err)
	}
	return r
}

// TestFormatAuto wants the type that every firmware takes, for sizes on both sides of each limit.
func TestFormatAuto(t *testing.T) {
	for _, c := range []struct {
		size int64
		ss   int
		typ  Type
	}{
		{64 << 10, 512, FAT12},
		{1440 << 10, 512, FAT12},
		{4 << 20, 512, FAT16},
		{32 << 20, 512, FAT16},
		{33 << 20, 512, FAT32},
		{100 << 20, 512, FAT32},
		{100 << 20, 4096, FAT16},
		{260 << 20, 4096, FAT32},
		{512 << 20, 4096, FAT32},
		{1 << 30, 512, FAT32},
		{20 << 30, 512, FAT32},
		{2<<40 - 512, 512, FAT32},
	} {
		_, v := mustFormat(t, c.size, FormatOptions{SectorSize: c.ss})
		g := v.Geometry()
		if g.Type != c.typ {
			t.Errorf("%d bytes, sector %d: %v, want %v", c.size, c.ss, g.Type, c.typ)
		}
		if g.DataOff%int64(max(4096, g.ClusterSize)) != 0 {
			t.Errorf("%d bytes: data area at 0x%x is not aligned to a cluster of %d", c.size, g.DataOff, g.ClusterSize)
		}
		if g.Type == FAT32 && g.Clusters < 65525+16 {
			t.Errorf("%d bytes: FAT32 with %d clusters", c.size, g.Clusters)
		}
	}
	// Every size in steps that meet each limit, type and cluster size: there must be no gap between the types.
	for size := int64(32 << 10); size < 40<<20; size += 12<<10 + 512 {
		p, err := planFormat(size, 512, 512, FormatOptions{})
		if err != nil {
			t.Fatalf("%d bytes: %v", size, err)
		}
		if p.geo.fatEntries() < int64(p.geo.Clusters)+2 {
			t.Fatalf("%d bytes: FAT too small", size)
		}
	}
}

func TestFormatOptions(t *testing.T) {
	at := time.Date(2024, 2, 29, 12, 34, 56, 0, time.UTC)
	for _, typ := range []Type{FAT12, FAT16, FAT32} {
		d, v := mustFormat(t, map[Type]int64{FAT12: 2 << 20, FAT16: 20 << 20, FAT32: 80 << 20}[typ], FormatOptions{
			Type: typ, Serial: 0xCAFE0123, Label: "Esp #1", LabelTime: at, HiddenSectors: 0x11223344, Align: 1 << 20,
		})
		g := v.Geometry()
		if v.UUID() != "CAFE-0123" || g.DataOff%(1<<20) != 0 {
			t.Errorf("%v: UUID %s, data at 0x%x", typ, v.UUID(), g.DataOff)
		}
		tr, err := v.Scan()
		if err != nil {
			t.Fatal(err)
		}
		if tr.Label != "Esp #1" || v.bootLabel() != "Esp #1" || !tr.Root.labels[0].ModTime().Equal(at) {
			t.Errorf("%v: labels %q and %q", typ, tr.Label, v.bootLabel())
		}
		if !bytes.Equal(v.boot[28:32], []byte{0x44, 0x33, 0x22, 0x11}) {
			t.Errorf("%v: hidden sectors % x", typ, v.boot[28:32])
		}
		if v.boot[0] != 0xEB || v.boot[int(v.boot[1])+2] != 0xF4 {
			t.Errorf("%v: the jump % x does not lead to the halt", typ, v.boot[:3])
		}
		checkClean(t, d)
		if fsck := toolPath("fsck.fat"); fsck != "" {
			fsckClean(t, fsck, d.file(t))
		}
	}
	// Exact values, without any alignment.
	_, v := mustFormat(t, 1440<<10, FormatOptions{Type: FAT12, Align: 1, RootEntries: 224, SectorsPerCluster: 1})
	if g := v.Geometry(); g.ReservedSectors != 1 || g.FATSize != 9*512 || g.RootEntries != 224 || g.Clusters != 2847 {
		t.Errorf("floppy: %+v", g)
	}
}

func TestFormatErrors(t *testing.T) {
	for _, c := range []struct {
		size int64
		ss   int
		o    FormatOptions
		want string
	}{
		{64 << 20, 512, FormatOptions{SectorSize: 513}, "sector size 513"},
		{64 << 20, 4096, FormatOptions{SectorSize: 512}, "less than the device's 4096"},
		{64 << 20, 512, FormatOptions{NumFATs: 3}, "3 FATs"},
		{64 << 20, 512, FormatOptions{NumFATs: -1}, "-1 FATs"},
		{64 << 20, 512, FormatOptions{SectorsPerCluster: 3}, "3 sectors per cluster"},
		{64 << 20, 512, FormatOptions{SectorsPerCluster: 256}, "256 sectors per cluster"},
		{64 << 20, 4096, FormatOptions{SectorsPerCluster: 128}, "at most 65536"},
		{64 << 20, 512, FormatOptions{ReservedSectors: 65536}, "65536 reserved"},
		{64 << 20, 512, FormatOptions{Type: FAT32, ReservedSectors: 7}, "FAT32 needs 8"},
		{64 << 20, 512, FormatOptions{Type: FAT16, RootEntries: 17}, "17 root entries"},
		{64 << 20, 512, FormatOptions{Type: FAT32, RootEntries: 512}, "no fixed root"},
		{64 << 20, 512, FormatOptions{Type: 13}, "there is no FAT13"},
		{64 << 20, 512, FormatOptions{Align: 3}, "alignment 0x3"},
		{200 << 20, 512, FormatOptions{Align: 64 << 20}, "at most 65535"},
		{64 << 20, 512, FormatOptions{Label: "TWELVE CHARS"}, "at most 11"},
		{64 << 20, 512, FormatOptions{Label: "A/B"}, "not allowed"},
		{64 << 20, 512, FormatOptions{Label: "É"}, "not allowed"},
		{64 << 20, 512, FormatOptions{Label: " A"}, "begins with a space"},
		{30 << 20, 512, FormatOptions{Type: FAT32}, "at least 65541"},
		{64 << 20, 512, FormatOptions{Type: FAT32, SectorsPerCluster: 8}, "at least 65541"},
		{64 << 20, 512, FormatOptions{Type: FAT16, SectorsPerCluster: 1}, "at most 65508"},
		{1 << 20, 512, FormatOptions{Type: FAT16}, "at least 4101"},
		{64 << 20, 512, FormatOptions{Type: FAT12, SectorsPerCluster: 1}, "at most 4068"},
		{5 << 30, 512, FormatOptions{Type: FAT16}, "at most 65508"},
		{4 << 40, 512, FormatOptions{}, "at most 4294967295"},
		{1024, 512, FormatOptions{}, "no room for a cluster"},
		{0, 512, FormatOptions{}, "no room for a cluster"},
	} {
		d := newSparse(c.size, c.ss)
		d.logged = true
		err := Format(d, c.o)
		if !errors.Is(err, ErrFormat) || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%d %+v: error %v, want %q", c.size, c.o, err, c.want)
		}
		if len(d.ops) > 0 {
			t.Errorf("%d %+v: something was written", c.size, c.o)
		}
	}
}

// TestFormatOrder cuts Format after each of its writes: until the last one nothing may look like a volume, though the
// device held one before.
func TestFormatOrder(t *testing.T) {
	for _, typ := range []Type{FAT12, FAT16, FAT32} {
		size := map[Type]int64{FAT12: 2 << 20, FAT16: 20 << 20, FAT32: 80 << 20}[typ]
		for k := 0; ; k++ {
			d, _ := mustFormat(t, size, FormatOptions{Label: "OLD", Serial: 1})
			cut := &cutDev{Device: d, left: k}
			err := Format(cut, FormatOptions{Type: typ, Label: "NEW", Serial: 2})
			v, openErr := Open(d)
			if err == nil {
				if openErr != nil {
					t.Fatal(openErr)
				}
				if r := checkClean(t, d); r.Label != "NEW" || k < 4 {
					t.Fatalf("%v: label %q after %d operations", typ, r.Label, k)
				}
				break
			}
			if !errors.Is(err, errInjected) {
				t.Fatal(err)
			}
			switch {
			case openErr == nil && k == 0 && v.UUID() == "0000-0001": // nothing was written yet
			case openErr == nil && cut.flushes == 2 && v.UUID() == "0000-0002": // only the last flush failed
			case errors.Is(openErr, ErrNotFAT):
			default:
				t.Fatalf("%v: after %d operations the device opens: %v", typ, k, openErr)
			}
		}
		// The old boot sector goes, and the new one comes, in an epoch of its own.
		d := newSparse(size, 512)
		d.logged = true
		if err := Format(d, FormatOptions{Type: typ}); err != nil {
			t.Fatal(err)
		}
		n := len(d.ops)
		if d.ops[0] != "write 0x0 0x200" || d.ops[1] != "flush" ||
			d.ops[n-3] != "flush" || d.ops[n-2] != "write 0x0 0x200" || d.ops[n-1] != "flush" {
			t.Errorf("%v: order of operations: %v", typ, d.ops)
		}
	}
}

var errInjected = errors.New("injected")

// cutDev fails every write and flush after the first left ones.
type cutDev struct {
	blockdev.Device
	left, flushes int
}

func (d *cutDev) WriteAt(p []byte, off int64) (int, error) {
	if d.left == 0 {
		return 0, errInjected
	}
	d.left--
	return d.Device.WriteAt(p, off)
}

func (d *cutDev) Flush() error {
	if d.left == 0 {
		return errInjected
	}
	d.left--
	d.flushes++
	return d.Device.Flush()
}

// TestFormatOverJunk wants every structure written, whatever the device held.
func TestFormatOverJunk(t *testing.T) {
	for _, typ := range []Type{FAT12, FAT16, FAT32} {
		size := map[Type]int64{FAT12: 1 << 20, FAT16: 9 << 20, FAT32: 40 << 20}[typ]
		d := blockdev.NewMem(bytes.Repeat([]byte{0xA5}, int(size)), 512)
		if err := Format(d, FormatOptions{Type: typ, Label: "X"}); err != nil {
			t.Fatal(err)
		}
		checkClean(t, d)
	}
}
