package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"espmirror/blockdev"
	"espmirror/fixtures"
	"espmirror/fixtures/vm"
	"espmirror/gpt"
)

// imageLoop makes images as builders do it without root: the program for the table, tree, MiB of an image, sectors of a cluster,
// images. The partition is where espmirror puts it, and clusters are as large. sgdisk sleeps for a second whenever it has written
// a table, and sfdisk for a quarter unless it is told to leave the kernel alone.
const imageLoop = `set -e
table=$1 tree=$2 mib=$3 cluster=$4 n=0
shift 4
for image; do
	n=$((n + 1))
	disk=$(printf '%08x-0000-4000-8000-000000000000' $n) part=$(printf '%08x-0000-4000-8000-000000000001' $n)
	truncate -s ${mib}M "$image"
	if [ $table = sgdisk ]; then
		sgdisk -o -U $disk -n 1:2048:+$((mib - 2))M -t 1:ef00 -c 1:'EFI system partition' -u 1:$part "$image"
	else
		sfdisk -q --no-tell-kernel "$image" <<-end
			label: gpt
			label-id: $disk
			start=1MiB, size=$((mib - 2))MiB, type=C12A7328-F81F-11D2-BA4B-00A0C93EC93B, uuid=$part, name="EFI system partition"
		end
	fi
	mkfs.fat -F 32 -s $cluster -i $(printf '%08x' $n) -n ESP --offset 2048 "$image" $(((mib - 2) * 1024))
	mcopy -s -i "$image@@1M" "$tree"/* ::/
done`

// firmwareCompares is up to which size OVMF compares contents: it takes 4 s for each MiB.
const firmwareCompares = 64 * kib

// imageSettings are what the part with the images is told.
type imageSettings struct {
	n, repeat int
	mib       int    // size of an image
	jobs      string // values of --jobs to try besides the default
	judged    int    // images that OVMF reads
}

// imageRun is the part with the images.
type imageRun struct {
	*bench
	imageSettings
	tree     fixtures.TreeSpec
	content  int64 // bytes in the tree
	template string
	note     string // why there are fewer images than asked for
}

// imageTree is what a machine with systemd-boot and one kernel has, and fills a little less than a third of an image: 15 MB of
// kernel and 60 MB of initramfs in 256 MiB.
func imageTree(mib int) fixtures.TreeSpec {
	const version = "6.12.1-amd64"
	dir := fixtures.MachineID + "/" + version
	loader := fixtures.PE(125_000, 1)
	return fixtures.TreeSpec{
		"EFI/BOOT/BOOTX64.EFI":            loader,
		"EFI/systemd/systemd-bootx64.efi": loader,
		"loader/loader.conf":              fixtures.Text("timeout 3\nconsole-mode keep\n"),
		"loader/entries.srel":             fixtures.Text("type1\n"),
		"loader/entries/" + fixtures.MachineID + "-" + version + ".conf": fixtures.Text("title Linux " + version + "\nversion " + version +
			"\nmachine-id " + fixtures.MachineID + "\noptions root=UUID=1b2c7a0e-5d7e-4f0c-9a58-1f6f0c5c7e01 ro quiet\nlinux /" + dir +
			"/linux\ninitrd /" + dir + "/initrd.img-" + version + "\n"),
		dir + "/linux":                 fixtures.PE(int64(mib)*15_000_000/256, 2),
		dir + "/initrd.img-" + version: fixtures.Random(int64(mib)*60_000_000/256, 3),
	}
}

// imagesWith makes many images from one template, beside a loop of sgdisk, mkfs.fat and mcopy.
func (b *bench) imagesWith(s imageSettings) error {
	r := &imageRun{bench: b, imageSettings: s, tree: imageTree(s.mib), template: b.path("template.img")}
	for _, c := range r.tree {
		r.content += c.Size
	}
	if err := r.fit(); err != nil {
		return err
	}
	if err := writeTree(b.path("images-tree"), r.tree); err != nil {
		return err
	}
	if _, err := b.espmirror("init", "-q", "--no-set", "--select", "/", "--size", fmt.Sprintf("%dM", s.mib), "--seed", "template",
		"--primary", b.path("images-tree"), r.template); err != nil {
		return err
	}
	if err := os.Mkdir(b.path("images"), 0o755); err != nil {
		return err
	}
	if err := r.measureAll(); err != nil {
		return err
	}
	return os.RemoveAll(b.path("images"))
}

// fit makes it fewer images where there is no room for all.
func (r *imageRun) fit() error {
	var st unix.Statfs_t
	if err := unix.Statfs(r.dir, &st); err != nil {
		return err
	}
	// Template and tree, the copies that judges read, and something for others.
	const spare = 1 << 30
	each := r.content + r.content/16 + 4*mib
	room := (int64(st.Bavail)*st.Bsize - spare - 6*each) / each
	if room < 1 {
		return fmt.Errorf("there is no room for images in %s", r.dir)
	}
	if int64(r.n) > room {
		r.note = fmt.Sprintf(", not %d for want of room", r.n)
		fmt.Fprintf(os.Stderr, "images: there is room for %d of %d\n", room, r.n)
		r.n = int(room)
	}
	return nil
}

func (r *imageRun) names() []string {
	var names []string
	for i := range r.n {
		names = append(names, r.path(fmt.Sprintf("images/disk%03d.img", i)))
	}
	return names
}

// ours are the arguments that make all images in one run.
func (r *imageRun) ours(jobs string) []string {
	args := []string{"init", "-q", "--no-set", "--primary", r.template, "--select", "/", "--size", fmt.Sprintf("%dM", r.mib), "--seed", "bench"}
	switch jobs {
	case "":
	case "all":
		args = append(args, "--jobs", strconv.Itoa(r.n))
	default:
		args = append(args, "--jobs", jobs)
	}
	return append(args, r.names()...)
}

func (r *imageRun) loop(table string, cluster int) []string {
	return append([]string{"-c", imageLoop, "sh", table, r.path("images-tree"), strconv.Itoa(r.mib), strconv.Itoa(cluster / 512)}, r.names()...)
}

// clear removes the images, so that each run begins with nothing to write and nothing written.
func (r *imageRun) clear() error {
	for _, n := range r.names() {
		if err := os.Remove(n); err != nil && !errors.Is(err, os.ErrNotExist) {
			return err
		}
	}
	unix.Sync()
	return nil
}

// series are the runs of one program.
type series struct {
	took   []time.Duration
	last   usage
	maxRSS int64
	reads  int64 // bytes of the template, -1 where nobody counted
	blocks int64 // bytes allocated for an image
}

func (s *series) add(u usage) {
	s.took, s.last, s.maxRSS = append(s.took, u.wall), u, max(s.maxRSS, u.maxRSS)
}

func (s *series) time() string {
	m := median(s.took)
	return fmt.Sprintf("%.1f s (%.1f–%.1f)", m.Seconds(), s.took[0].Seconds(), s.took[len(s.took)-1].Seconds())
}

func (r *imageRun) measureAll() error {
	cluster, err := r.clusterOf(r.template)
	if err != nil {
		return err
	}
	others := true
	for _, t := range []string{"truncate", "sgdisk", "sfdisk", "mkfs.fat", "mcopy"} {
		if _, err := exec.LookPath(t); err != nil {
			fmt.Fprintf(os.Stderr, "skipped: %s is not installed, so there is nothing to compare the images with\n", t)
			others = false
		}
	}
	ours, plain, flushed, sgdisk := &series{reads: -1}, &series{reads: -1}, &series{}, &series{}
	if err := r.reads(ours, plain, cluster, others); err != nil {
		return err
	}
	if others {
		// Once: it sleeps most of the time.
		if err := r.runLoop(&series{}, sgdisk, "sgdisk", cluster); err != nil {
			return err
		}
	}
	var tried []string
	if r.jobs != "" {
		tried = strings.Split(r.jobs, ",")
	}
	jobs := map[string]*series{}
	for i := range r.repeat {
		if others {
			if err := r.runLoop(plain, flushed, "sfdisk", cluster); err != nil {
				return err
			}
		}
		// The default is last, for it makes what is judged.
		for k := range tried {
			j := tried[(i+k)%len(tried)]
			if err := r.clear(); err != nil {
				return err
			}
			u, err := measure(r.path("images.log"), r.bin, r.ours(j)...)
			if err != nil {
				return err
			}
			if jobs[j] == nil {
				jobs[j] = &series{}
			}
			jobs[j].add(u)
		}
		if err := r.clear(); err != nil {
			return err
		}
		u, err := measure(r.path("images.log"), r.bin, r.ours("")...)
		if err != nil {
			return err
		}
		ours.add(u)
	}
	if ours.blocks, err = r.allocated(); err != nil {
		return err
	}
	r.rowsOf(ours, plain, flushed, sgdisk, others)
	for _, j := range tried {
		r.row("— --jobs="+j, fmt.Sprintf("%s, %.0f MiB", jobs[j].time(), float64(jobs[j].maxRSS)/mib), "", "", "")
	}
	verdict, met, err := r.judge()
	if err != nil {
		return err
	}
	r.row("— judged", verdict, "", "", r.verdict("nothing wrong with any", met))
	return nil
}

// runLoop runs the loop once. Its time is one without an fdatasync of the images, and one with.
func (r *imageRun) runLoop(plain, flushed *series, table string, cluster int) error {
	if err := r.clear(); err != nil {
		return err
	}
	start := time.Now()
	u, err := measure(r.path("images.log"), "sh", r.loop(table, cluster)...)
	if err != nil {
		return err
	}
	plain.add(u)
	for _, n := range r.names() {
		if err := onMedium(n); err != nil {
			return err
		}
	}
	flushed.took = append(flushed.took, time.Since(start))
	plain.blocks, err = r.allocated()
	return err
}

// reads counts what is read of the template. Nobody counts the time, for tracing takes some; and the files are in the page cache
// afterwards.
func (r *imageRun) reads(ours, others *series, cluster int, compare bool) error {
	if err := tool("strace", "-o", os.DevNull, "true"); err != nil { // it may be there, and not be allowed to trace
		fmt.Fprintf(os.Stderr, "skipped: nobody counts how often the template is read: %v\n", err)
		return nil
	}
	err := r.clear()
	if err == nil {
		ours.reads, err = readFrom(r.dir, r.template, r.bin, r.ours("")...)
	}
	if err != nil || !compare {
		return err
	}
	if err := r.clear(); err != nil {
		return err
	}
	others.reads, err = readFrom(r.dir, r.path("images-tree"), "sh", r.loop("sfdisk", cluster)...)
	return err
}

func (r *imageRun) rowsOf(ours, plain, flushed, sgdisk *series, others bool) {
	gb := func(n int64) string { return fmt.Sprintf("%.2f GB", float64(n)/1e9) }
	row := func(what, goal string, f func(*series) string) {
		if others {
			r.row(what, f(ours), f(plain), "", goal)
		} else {
			r.row(what, f(ours), "", "", goal)
		}
	}
	what := fmt.Sprintf("%d images of %d MiB from one template of %d MB%s", r.n, r.mib, r.content/1_000_000, r.note)
	o := ours.time()
	if others {
		r.row(what, o, "sgdisk, mkfs.fat, mcopy "+seconds(sgdisk.took[0]), times(median(ours.took), sgdisk.took[0]), "")
		const loop = "sfdisk, mkfs.fat, mcopy "
		r.row("— beside sfdisk, which does not wait as sgdisk does", o, loop+flushed.time(), times(median(ours.took), median(flushed.took)), "")
		r.row("— and without fdatasync", o, loop+plain.time(), times(median(ours.took), median(plain.took)), "")
	} else {
		r.row(what, o, "", "", "")
	}
	if ours.last.io {
		row("— bytes read, of them from the disk", "", func(s *series) string { return gb(s.last.read) + ", " + gb(s.last.diskRead) })
		row("— bytes written, and to the disk", "", func(s *series) string { return gb(s.last.written) + ", " + gb(s.last.diskWritten) })
	} else {
		fmt.Fprintln(os.Stderr, "skipped: this kernel does not count what a process reads and writes")
	}
	if ours.reads >= 0 {
		row("— the template is read", "", func(s *series) string { return fmt.Sprintf("%.2f times", float64(s.reads)/float64(r.content)) })
	}
	row("— peak memory, of the largest process", "", func(s *series) string { return fmt.Sprintf("%.1f MiB", float64(s.maxRSS)/mib) })
	row("— disk space of an image", "", func(s *series) string { return fmt.Sprintf("%.1f MB", float64(s.blocks)/1e6) })
}

// allocated is what an image takes on the disk, on average.
func (r *imageRun) allocated() (int64, error) {
	var n int64
	for _, name := range r.names() {
		var st unix.Stat_t
		if err := unix.Stat(name, &st); err != nil {
			return 0, fmt.Errorf("cannot look at %s: %w", name, err)
		}
		n += st.Blocks * 512
	}
	return n / int64(r.n), nil
}

// clusterOf is the cluster size of an image, in bytes.
func (r *imageRun) clusterOf(name string) (int, error) {
	f, p, err := openESP(name)
	if err != nil {
		return 0, err
	}
	defer f.Close()
	t, err := fixtures.ReadStrictOptions(io.NewSectionReader(f, p.Start, p.Size), p.Size, 0, fixtures.Options{Content: fixtures.ContentNone})
	if err != nil {
		return 0, err
	}
	return t.ClusterSize, nil
}

// openESP opens an image and finds its one partition.
func openESP(name string) (*os.File, *gpt.Partition, error) {
	d, err := blockdev.Open(name, blockdev.ReadOnly)
	if err != nil {
		return nil, nil, err
	}
	defer d.Close()
	t, err := gpt.Read(d)
	if err != nil {
		return nil, nil, fmt.Errorf("%s: %w", name, err)
	}
	if len(t.Partitions) != 1 || t.Partitions[0].Type != gpt.TypeESP {
		return nil, nil, fmt.Errorf("%s does not have one partition, an ESP", name)
	}
	f, err := os.Open(name)
	return f, &t.Partitions[0], err
}

// noProblems is all that sgdisk -v says of a sound table.
var noProblems = regexp.MustCompile(`^\s*No problems found\. \d+ free sectors [^*!:]* in size\.\s*$`)

// judgement is what the judges say of an image; how many it was is counted by judge.
type judgement struct {
	mu     sync.Mutex
	judged map[string]int
	faults []string
	missed map[string]bool
}

func (j *judgement) said(judge, image string, err error) {
	j.mu.Lock()
	defer j.mu.Unlock()
	switch {
	case errors.Is(err, exec.ErrNotFound):
		j.missed[judge] = true
		return
	case err != nil:
		j.faults = append(j.faults, fmt.Sprintf("%s: %s: %v", judge, filepath.Base(image), err))
	}
	j.judged[judge]++
}

// judge has every image judged, and some of them by OVMF. The error says that a judge could not judge.
func (r *imageRun) judge() (string, bool, error) {
	j := &judgement{judged: map[string]int{}, missed: map[string]bool{}}
	want := r.expected()
	names := r.names()
	errs := make([]error, len(names))
	turns := make(chan struct{}, runtime.NumCPU())
	var group sync.WaitGroup
	for i, name := range names {
		group.Go(func() {
			turns <- struct{}{}
			defer func() { <-turns }()
			errs[i] = r.judgeImage(j, name, want)
		})
	}
	group.Wait()
	if err := errors.Join(errs...); err != nil {
		return "", false, err
	}
	if err := r.judgeByFirmware(j, names[:min(r.judged, len(names))]); err != nil {
		return "", false, err
	}
	var parts []string
	for _, judge := range []string{"fsck.fat -n", "sgdisk -v", "mtools", "OVMF"} {
		if j.missed[judge] {
			fmt.Fprintf(os.Stderr, "skipped: %s is not installed, and has not judged the images\n", judge)
		}
		if n := j.judged[judge]; n > 0 {
			parts = append(parts, fmt.Sprintf("%s %d", judge, n))
		}
	}
	slices.Sort(j.faults)
	for _, f := range j.faults {
		fmt.Fprintln(os.Stderr, f)
	}
	return fmt.Sprintf("%s: %d faults", strings.Join(parts, ", "), len(j.faults)), len(j.faults) == 0, nil
}

// expected is the tree as mtools is to see it.
func (r *imageRun) expected() map[string]fixtures.JudgedFile {
	want := map[string]fixtures.JudgedFile{}
	for _, d := range r.tree.Dirs() {
		want[d] = fixtures.JudgedFile{Dir: true}
	}
	for p, c := range r.tree {
		want[p] = fixtures.JudgedFile{Size: c.Size, Sum: c.Sum()}
	}
	return want
}

func (r *imageRun) judgeImage(j *judgement, name string, want map[string]fixtures.JudgedFile) error {
	f, p, err := openESP(name)
	if err != nil {
		return err
	}
	defer f.Close()
	found, err := fixtures.FsckReader(io.NewSectionReader(f, p.Start, p.Size), p.Size)
	if err == nil {
		err = found.Err(0)
	}
	j.said("fsck.fat -n", name, err)
	out, err := exec.Command("sgdisk", "-v", name).CombinedOutput()
	// Where a header is damaged it says so, and that there are no problems, and ends with 0.
	if err == nil && !noProblems.Match(out) {
		err = errors.New(string(out))
	}
	j.said("sgdisk -v", name, err)
	files, err := fixtures.Mtools(name, p.Start)
	if err == nil {
		maps.DeleteFunc(files, func(p string, _ fixtures.JudgedFile) bool { return fixtures.Ours(p) })
		if !maps.Equal(files, want) {
			err = errors.New("not the files of the template")
		}
	}
	j.said("mtools", name, err)
	return nil
}

// judgeByFirmware has OVMF mount the images, as disks with the table that they have, list all files, and compare the small ones.
func (r *imageRun) judgeByFirmware(j *judgement, names []string) error {
	tree := vm.Listing{}
	for _, d := range r.tree.Dirs() {
		tree[d+"/"] = nil
	}
	for p, c := range r.tree {
		b := make([]byte, c.Size)
		if c.Size <= firmwareCompares {
			if _, err := io.ReadFull(c.Reader(), b); err != nil {
				return err
			}
		}
		tree[p] = b
	}
	var samples []vm.Sample
	for _, name := range names {
		f, p, err := openESP(name)
		if err != nil {
			return err
		}
		f.Close()
		samples = append(samples, vm.Sample{Name: name, Whole: name, GUID: p.PARTUUID(), Compared: firmwareCompares, Allowed: []vm.Listing{tree}})
	}
	if len(samples) == 0 {
		return nil
	}
	readings, err := vm.Firmware(context.Background(), r.path("firmware"), samples)
	if errors.Is(err, vm.ErrMissing) {
		j.missed["OVMF"] = true
		return nil
	}
	if err != nil {
		return err
	}
	for _, x := range readings {
		j.said("OVMF", x.Name, x.Err)
	}
	return nil
}
