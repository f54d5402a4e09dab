// Command bench measures espmirror beside mtools and dd on the same bytes, and prints a Markdown table.
//
// The runs of the compared programs alternate, and a figure is the median. Times are wall-clock times of whole
// processes with the source in the page cache; unless a line says otherwise both sides end with the data on the medium:
// espmirror by itself, the others by an fdatasync of the image that is counted in. Bytes and flushes are counted at the
// device, and are exact.
package main

import (
	"bytes"
	"debug/elf"
	"encoding/json"
	"flag"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"espmirror/blockdev"
	"espmirror/fixtures"
)

const (
	kib = 1 << 10
	mib = 1 << 20
)

func main() {
	if err := run(os.Stdout, os.Args[1:]); err != nil {
		fmt.Fprintf(os.Stderr, "bench: %v\n", err)
		os.Exit(1)
	}
}

func run(w io.Writer, args []string) error {
	f := flag.NewFlagSet("bench", flag.ContinueOnError)
	runs := f.Int("runs", 5, "runs of each program")
	dir := f.String("dir", "out/bench", "working directory; holds up to 2 GB")
	only := f.String("only", "", "some of seed, small, change, size, images, with commas between; all if empty")
	var images imageSettings
	f.IntVar(&images.n, "images", 40, "images to make from one template; fewer where there is no room")
	f.IntVar(&images.mib, "image-size", 256, "size of an image in MiB")
	f.IntVar(&images.repeat, "image-runs", 3, "runs of each program that makes the images")
	f.IntVar(&images.judged, "firmware", 8, "images that OVMF reads")
	f.StringVar(&images.jobs, "jobs", "", "values of --jobs to make the images with too, as in 1,4,all")
	count := f.Bool("count", false, "internal: sync PRIMARY to TARGET in this process and print what reached the target")
	if err := f.Parse(args); err != nil {
		return err
	}
	if *count {
		return countedSync(w, f.Arg(0), f.Arg(1))
	}
	if f.NArg() != 1 || min(*runs, images.n, images.repeat) < 1 || images.mib < 64 {
		return fmt.Errorf("usage: bench [-runs N] [-dir DIR] ESPMIRROR")
	}
	bin, err := filepath.Abs(f.Arg(0))
	if err != nil {
		return err
	}
	if err := os.RemoveAll(*dir); err != nil {
		return err
	}
	if err := os.MkdirAll(*dir, 0o755); err != nil {
		return err
	}
	// Not everybody has the directories of the administrator's tools there.
	if err := os.Setenv("PATH", os.Getenv("PATH")+":/usr/sbin:/sbin"); err != nil {
		return err
	}
	b := &bench{bin: bin, dir: *dir, runs: *runs}
	if _, err := exec.LookPath("mcopy"); err == nil {
		b.mtools = true
	} else {
		fmt.Fprintln(os.Stderr, "skipped: mtools is not installed, so there is nothing to compare with")
	}
	for _, step := range []struct {
		name string
		f    func() error
	}{{"seed", b.seed}, {"small", b.smallFiles}, {"change", b.change}, {"size", b.size},
		{"images", func() error { return b.imagesWith(images) }}} {
		if *only != "" && !slices.Contains(strings.Split(*only, ","), step.name) {
			continue
		}
		if err := step.f(); err != nil {
			return err
		}
	}
	b.table(w, images.repeat)
	return os.RemoveAll(*dir)
}

// bench is one run of the whole.
type bench struct {
	bin, dir string
	runs     int
	mtools   bool
	rows     [][5]string
	missed   int
	maxRSS   int64 // bytes, of any espmirror
}

func (b *bench) path(name string) string { return filepath.Join(b.dir, name) }

func (b *bench) row(what, ours, others, ratio, goal string) {
	b.rows = append(b.rows, [5]string{what, ours, others, ratio, goal})
}

// verdict ends a goal with whether it is met.
func (b *bench) verdict(goal string, met bool) string {
	if met {
		return goal + ": met"
	}
	b.missed++
	return goal + ": **missed**"
}

func (b *bench) table(w io.Writer, imageRuns int) {
	cpus, _ := os.ReadFile("/proc/cpuinfo")
	fmt.Fprintf(w, "%d CPUs, medians of %d alternating runs, of the images %d, source in the page cache, data on the medium at the end unless noted.\n\n",
		bytes.Count(cpus, []byte("\nprocessor"))+1, b.runs, imageRuns)
	rows := append([][5]string{{"what", "espmirror", "the other", "ratio", "goal"}}, b.rows...)
	var width [5]int
	for _, r := range rows {
		for i, c := range r {
			width[i] = max(width[i], len([]rune(c)))
		}
	}
	for n, r := range rows {
		for i, c := range r {
			fmt.Fprintf(w, "| %s%s ", c, strings.Repeat(" ", width[i]-len([]rune(c))))
		}
		fmt.Fprintln(w, "|")
		if n == 0 {
			for _, k := range width {
				fmt.Fprintf(w, "|%s", strings.Repeat("-", k+2))
			}
			fmt.Fprintln(w, "|")
		}
	}
	if b.missed > 0 {
		fmt.Fprintf(w, "\n%d goals missed\n", b.missed)
	}
}

// volume makes an empty FAT32 volume with clusters of 4 KiB.
func (b *bench) volume(name string, size int64, serial uint32) error {
	return makeVolume(b.path(name), size, serial)
}

// espmirror runs the program and returns its time.
func (b *bench) espmirror(args ...string) (time.Duration, error) {
	unix.Sync() // what was left to write is nobody's time
	cmd := exec.Command(b.bin, args...)
	cmd.Stderr = os.Stderr
	start := time.Now()
	if err := cmd.Run(); err != nil {
		return 0, fmt.Errorf("espmirror %s: %w", strings.Join(args, " "), err)
	}
	took := time.Since(start)
	if u, ok := cmd.ProcessState.SysUsage().(*syscall.Rusage); ok {
		b.maxRSS = max(b.maxRSS, u.Maxrss*kib)
	}
	return took, nil
}

// tool runs another program.
func tool(name string, args ...string) error {
	cmd := exec.Command(name, args...)
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	if err := cmd.Run(); err != nil {
		return fmt.Errorf("%s %s: %w: %s", name, strings.Join(args, " "), err, out.Bytes())
	}
	return nil
}

// onMedium waits until a file is on the medium.
func onMedium(path string) error {
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	return unix.Fdatasync(int(f.Fd()))
}

func median(d []time.Duration) time.Duration {
	slices.Sort(d)
	return d[len(d)/2]
}

func seconds(d time.Duration) string { return fmt.Sprintf("%.2f s", d.Seconds()) }

func times(a, b time.Duration) string { return fmt.Sprintf("%.2f", float64(a)/float64(b)) }

// seed fills an empty volume with 421 MB from another volume.
func (b *bench) seed() error {
	tree := fixtures.TreeSpec{}
	var total int64
	for i := range 20 {
		size := int64(20_000_000 + 100_000*(i-10) + 137*i)
		tree[fmt.Sprintf("EFI/Linux/linux-6.12.%d-amd64.efi", i)] = fixtures.PE(size, uint64(i))
		total += size
	}
	for i := range 200 {
		size := int64(108_000 + 11*i)
		tree[fmt.Sprintf("EFI/Linux/extra/module %03d.addon.conf", i)] = fixtures.Random(size, uint64(1000+i))
		total += size
	}
	src, dir := b.path("seed-source.img"), b.path("seed-tree")
	if err := writeTree(dir, tree); err != nil {
		return err
	}
	if err := b.volume("seed-source.img", 640*mib, 1); err != nil {
		return err
	}
	if _, err := b.espmirror("sync", "-q", "--primary", dir, "--target", src); err != nil {
		return err
	}
	if err := os.RemoveAll(dir); err != nil {
		return err
	}
	var ours, noRead, others, unflushed, floor []time.Duration
	for range b.runs {
		for _, readBack := range []string{"yes", "no"} {
			if err := b.volume("seed-ours.img", 640*mib, 2); err != nil {
				return err
			}
			d, err := b.espmirror("sync", "-q", "--read-back", readBack, "--primary", src, "--target", b.path("seed-ours.img"))
			if err != nil {
				return err
			}
			if readBack == "yes" {
				ours = append(ours, d)
			} else {
				noRead = append(noRead, d)
			}
		}
		if b.mtools {
			plain, flushed, err := b.mcopyThrough(src)
			if err != nil {
				return err
			}
			unflushed, others = append(unflushed, plain), append(others, flushed)
		}
		unix.Sync()
		start := time.Now()
		if err := tool("dd", "if="+src, "of="+b.path("seed-dd.img"), "bs=1M", fmt.Sprintf("count=%d", total/mib), "conv=fdatasync"); err != nil {
			return err
		}
		floor = append(floor, time.Since(start))
		if err := os.Remove(b.path("seed-dd.img")); err != nil {
			return err
		}
	}
	if _, err := b.espmirror("verify", "-q", "--primary", src, "--target", b.path("seed-ours.img")); err != nil {
		return err
	}
	what := fmt.Sprintf("seeding %d MB (20 large, 200 small files)", total/1_000_000)
	o := median(ours)
	if b.mtools {
		m := median(others)
		b.row(what, seconds(o), "mcopy out + in "+seconds(m), times(o, m), b.verdict("≤ 1", o <= m))
		u := median(unflushed)
		b.row("— beside mcopy without its fdatasync", seconds(o), "mcopy out + in "+seconds(u), times(o, u), "")
		// mcopy never looks at what it wrote, so this compares like with like.
		n := median(noRead)
		b.row("— --read-back=no", seconds(n), "mcopy out + in "+seconds(m), times(n, m), "")
	} else {
		b.row(what, seconds(o), "", "", "")
		b.row("— --read-back=no", seconds(median(noRead)), "", "", "")
	}
	d := median(floor)
	b.row("— beside a plain copy", seconds(o), "dd conv=fdatasync "+seconds(d), times(o, d), "")
	for _, name := range []string{"seed-source.img", "seed-ours.img"} {
		if err := os.Remove(b.path(name)); err != nil {
			return err
		}
	}
	return nil
}

// mcopyThrough copies the files of src out and into a new volume, and returns the time without and with the fdatasync.
func (b *bench) mcopyThrough(src string) (plain, flushed time.Duration, err error) {
	dst, tmp := b.path("seed-mcopy.img"), b.path("seed-mcopy")
	if err := b.volume("seed-mcopy.img", 640*mib, 3); err != nil {
		return 0, 0, err
	}
	if err := os.Mkdir(tmp, 0o755); err != nil {
		return 0, 0, err
	}
	unix.Sync()
	start := time.Now()
	if err := tool("mcopy", "-s", "-n", "-i", src, "::/EFI", tmp); err != nil {
		return 0, 0, err
	}
	if err := os.RemoveAll(filepath.Join(tmp, "EFI/espmirror")); err != nil {
		return 0, 0, err
	}
	if err := tool("mcopy", "-s", "-n", "-i", dst, filepath.Join(tmp, "EFI"), "::/"); err != nil {
		return 0, 0, err
	}
	plain = time.Since(start)
	if err := onMedium(dst); err != nil {
		return 0, 0, err
	}
	flushed = time.Since(start)
	if err := os.RemoveAll(tmp); err != nil {
		return 0, 0, err
	}
	return plain, flushed, os.Remove(dst)
}

// smallFiles puts 2,000 files into one directory.
func (b *bench) smallFiles() error {
	dir := b.path("small-tree")
	if err := writeTree(dir, fixtures.ManyFiles("EFI/Linux", 2000, kib, 1)); err != nil {
		return err
	}
	var ours, others []time.Duration
	for range b.runs {
		if err := b.volume("small.img", 300*mib, 2); err != nil {
			return err
		}
		d, err := b.espmirror("sync", "-q", "--primary", dir, "--target", b.path("small.img"))
		if err != nil {
			return err
		}
		ours = append(ours, d)
		if !b.mtools {
			continue
		}
		if err := b.volume("small.img", 300*mib, 2); err != nil {
			return err
		}
		unix.Sync()
		start := time.Now()
		if err := tool("mcopy", "-s", "-n", "-i", b.path("small.img"), filepath.Join(dir, "EFI"), "::/"); err != nil {
			return err
		}
		if err := onMedium(b.path("small.img")); err != nil {
			return err
		}
		others = append(others, time.Since(start))
	}
	o := median(ours)
	const what = "2,000 small files into one directory"
	if !b.mtools {
		b.row(what, seconds(o), "", "", "")
		return nil
	}
	m := median(others)
	b.row(what, seconds(o), "mcopy "+seconds(m), fmt.Sprintf("%.0f times faster", float64(m)/float64(o)), b.verdict("≥ 20", m >= 20*o))
	return nil
}

// change replaces one file of 60 MB, and then syncs again.
func (b *bench) change() error {
	const size = 60_000_000
	tree := fixtures.KernelInstall(1, mib, "6.12.1", "6.12.2")
	tree["EFI/Linux/large.efi"] = fixtures.PE(size, 1)
	dir, dst := b.path("change-tree"), b.path("change.img")
	if err := writeTree(dir, tree); err != nil {
		return err
	}
	if err := b.volume("change.img", 300*mib, 2); err != nil {
		return err
	}
	if _, err := b.espmirror("sync", "-q", "--primary", dir, "--target", dst); err != nil {
		return err
	}
	tree["EFI/Linux/large.efi"] = fixtures.PE(size, 2)
	if err := writeTree(dir, tree); err != nil {
		return err
	}
	c, err := b.counted(dir, dst)
	if err != nil {
		return err
	}
	b.row("one of 60,000,000 bytes changed: bytes written", fmt.Sprintf("%d in %d writes, %d flushes", c.BytesWritten, c.Writes, c.Flushes), "",
		fmt.Sprintf("+%d", c.BytesWritten-size), b.verdict("≤ +262144", c.BytesWritten <= size+256*kib))
	return b.nothing(dir, dst)
}

// nothing syncs what is in sync already.
func (b *bench) nothing(dir, dst string) error {
	c, err := b.counted(dir, dst)
	if err != nil {
		return err
	}
	b.row("nothing to do: writes", fmt.Sprintf("%d writes, %d flushes", c.Writes, c.Flushes), "", "", b.verdict("0", c.Writes == 0))
	var ours, others []time.Duration
	twin := b.path("twin.img")
	if err := b.volume("twin.img", 300*mib, 3); err != nil {
		return err
	}
	if _, err := b.espmirror("sync", "-q", "--primary", dst, "--target", twin); err != nil {
		return err
	}
	// cmp reads on only while both are equal, so it gets a copy of the first.
	same := b.path("same.img")
	if err := tool("cp", "--sparse=always", dst, same); err != nil {
		return err
	}
	for range b.runs {
		d, err := b.espmirror("sync", "-q", "--primary", dst, "--target", twin)
		if err != nil {
			return err
		}
		ours = append(ours, d)
		start := time.Now()
		if err := tool("cmp", dst, same); err != nil {
			return err
		}
		others = append(others, time.Since(start))
	}
	o, c2 := median(ours), median(others)
	b.row("nothing to do: time", seconds(o), "cmp of whole images "+seconds(c2), times(o, c2), "")
	return nil
}

// counted syncs in another process of this program, so that what it needs is not taken for espmirror's.
func (b *bench) counted(primary, target string) (c blockdev.Counts, err error) {
	self, err := os.Executable()
	if err != nil {
		return c, err
	}
	cmd := exec.Command(self, "-count", primary, target)
	cmd.Stderr = os.Stderr
	out, err := cmd.Output()
	if err != nil {
		return c, fmt.Errorf("counted sync: %w", err)
	}
	return c, json.Unmarshal(out, &c)
}

// size looks at the binary, and at the memory of all that ran before.
func (b *bench) size() error {
	b.row("peak resident memory of all these", fmt.Sprintf("%.1f MiB", float64(b.maxRSS)/mib), "", "", b.verdict("≤ 64 MiB", b.maxRSS <= 64*mib))
	info, err := os.Stat(b.bin)
	if err != nil {
		return err
	}
	f, err := elf.Open(b.bin)
	if err != nil {
		return err
	}
	defer f.Close()
	kind := "static"
	for _, p := range f.Progs {
		if p.Type == elf.PT_INTERP {
			kind = "dynamic"
		}
	}
	if f.Section(".symtab") == nil {
		kind += ", stripped"
	}
	b.row("binary", fmt.Sprintf("%d bytes, %s", info.Size(), kind), "", "",
		b.verdict("≤ 6 MB static stripped", info.Size() <= 6_000_000 && kind == "static, stripped"))
	return nil
}
