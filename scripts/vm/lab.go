package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"espmirror/fixtures"
	"espmirror/fixtures/vm"
)

// errMissing is returned when something that a guest needs is not here: root, a program, a mirror.
var errMissing = errors.New("not available")

// lab is where scenarios are played: programs and guests that were made once.
type lab struct {
	dir      string // of disks and logs; its path is short, for sockets
	repo     string
	bin, deb string // the program and its package
	cuts     int    // how often the power is cut

	mu     sync.Mutex // a guest is made once
	guests map[string]*guest
}

// guest is a system to boot, as scripts/vm-tree.sh makes it.
type guest struct {
	kind  string // what makes its initial RAM disk
	dir   string
	facts map[string]string
}

// guest makes the guest of that kind, or takes the one that was made last.
func (l *lab) guest(ctx context.Context, kind string) (*guest, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if g := l.guests[kind]; g != nil {
		return g, nil
	}
	c := exec.CommandContext(ctx, "scripts/vm-tree.sh", kind, l.deb)
	c.Dir = l.repo
	var errs bytes.Buffer
	c.Stdout, c.Stderr = &errs, &errs
	if err := c.Run(); err != nil {
		said := strings.TrimSpace(errs.String())
		if c.ProcessState != nil && c.ProcessState.ExitCode() == 77 {
			return nil, fmt.Errorf("%w: %s", errMissing, said)
		}
		return nil, fmt.Errorf("cannot make guest with %s: %w: %s", kind, err, said)
	}
	g := &guest{kind: kind, dir: filepath.Join(l.repo, "out/judges/vm", kind), facts: map[string]string{}}
	b, err := os.ReadFile(filepath.Join(g.dir, "facts"))
	if err != nil {
		return nil, err
	}
	for line := range strings.Lines(string(b)) {
		name, value, _ := strings.Cut(strings.TrimSpace(line), " ")
		g.facts[name] = value
	}
	l.guests[kind] = g
	return g, nil
}

// number is a fact that is one.
func (g *guest) number(name string) float64 {
	n, err := strconv.ParseFloat(g.facts[name], 64)
	if err != nil {
		return -1
	}
	return n
}

// scene is a scenario while it is played. What goes wrong in it ends it by a panic with a failure, which play returns
// as an error: a scenario is a story, and would be unreadable with a test behind every sentence.
type scene struct {
	*lab
	ctx  context.Context
	g    *guest
	dir  string
	logf func(format string, a ...any)
	// proved are the sentences for the table, notes the figures below it.
	proved, notes []string
	// took are the seconds of espmirror inside the guest, boots those from the start of the kernel to init, by boot.
	took, boots []float64
	last        *boot
}

// note adds a figure to what the table says.
func (s *scene) note(format string, a ...any) { s.notes = append(s.notes, fmt.Sprintf(format, a...)) }

// failure is what a scene ends with.
type failure struct{ error }

func (s *scene) must(err error) {
	if err != nil {
		panic(failure{err})
	}
}

// need ends the scene unless ok.
func (s *scene) need(ok bool, format string, a ...any) {
	if !ok {
		panic(failure{fmt.Errorf(format, a...)})
	}
}

// prove is need, with a sentence for the table.
func (s *scene) prove(ok bool, sentence string) {
	s.need(ok, "not so: %s", sentence)
	if !slices.Contains(s.proved, sentence) {
		s.proved = append(s.proved, sentence)
	}
}

// disk is a disk with an ESP, its only partition.
type disk struct {
	name, path, guid string
	sector           int
	size             int64 // of the ESP
	bus              vm.Bus
}

// espOff is where each ESP begins.
const espOff = 1 << 20

// diskOptions say what is unusual about a disk.
type diskOptions struct {
	fat, sector int
	bus         vm.Bus
}

// disk makes a disk with an ESP that holds the files.
func (s *scene) disk(name string, o diskOptions, files fixtures.TreeSpec) *disk {
	n := int(name[0])
	d := &disk{name: name, path: filepath.Join(s.dir, name+".img"), guid: fmt.Sprintf("4f5a1b20-0000-4000-8000-0000000000%02x", n),
		sector: max(o.sector, 512), size: 220 << 20, bus: o.bus}
	if o.fat == 0 {
		o.fat = 32
	}
	clusters := 4096
	if d.sector == 4096 {
		d.size = 300 << 20 // FAT32 has no fewer than 65525 clusters
	} else if o.fat == 32 {
		clusters = 2048
	}
	v := fixtures.VolumeSpec{FAT: o.fat, Size: d.size, SectorSize: d.sector, SectorsPerCluster: clusters / d.sector,
		Serial: 0xE5B00000 + uint32(n), Label: strings.ToUpper(name), Tree: files}
	s.must(fixtures.DiskSpec{SectorSize: d.sector, Size: d.size + 2*espOff, GUID: fmt.Sprintf("4f5a1b20-0000-4000-8000-0000000001%02x", n),
		Parts: []fixtures.PartSpec{{Type: fixtures.TypeESP, GUID: d.guid, Name: "ESP", Off: espOff, Volume: &v}}}.Make(d.path))
	return d
}

// machineID is that of the guest, and so the directory in which its kernels are.
const machineID = "0123456789abcdef0123456789abcdef"

// payloadSize is what a version has that the other one has not: that is written when one replaces the other.
const payloadSize = 24 << 20

// version are the files of an ESP that boots the guest; versions differ in the payload. options go to the kernel. The
// initial RAM disk is the file of that name of the guest.
func (s *scene) version(v, initrd, options string) fixtures.TreeSpec {
	file := func(name string) fixtures.Content {
		b, err := os.ReadFile(filepath.Join(s.g.dir, name))
		s.must(err)
		return fixtures.Text(string(b))
	}
	loader := file("systemd-bootx64.efi")
	dir := machineID + "/" + v
	seed := uint64(0)
	for _, c := range v {
		seed = seed*256 + uint64(c)
	}
	return fixtures.TreeSpec{
		"EFI/BOOT/BOOTX64.EFI":            loader,
		"EFI/systemd/systemd-bootx64.efi": loader,
		"loader/loader.conf":              fixtures.Text("timeout 0\n"),
		"loader/entries.srel":             fixtures.Text("type1\n"),
		"loader/entries/" + machineID + "-" + v + ".conf": fixtures.Text("title Guest " + v + "\nversion " + v +
			"\nmachine-id " + machineID + "\nlinux /" + dir + "/linux\ninitrd /" + dir + "/initrd\noptions " + baseOptions + " vm.version=" + v + " " + options + "\n"),
		dir + "/linux":   file("vmlinuz"),
		dir + "/initrd":  file(initrd),
		dir + "/payload": fixtures.Random(payloadSize, seed),
	}
}

// baseOptions are for every guest. The log is not to be thinned out, nor its beginning overwritten. On a busy host the
// emulated timer can be so late that the kernel takes it for broken, and 30 s, the limit of early, are two on hardware.
const baseOptions = "root=LABEL=vmroot rw console=ttyS0 panic=-1 no_timer_check espmirror.limit=5min printk.devkmsg=on log_buf_len=4M"

// small is for a guest whose init is the harness's own; systemd for one that starts all of its services.
const (
	small   = "init=/vm/init"
	systemd = "vm.systemd"
)

// tool runs a program on the host and returns its output and exit status.
func (s *scene) tool(name string, args ...string) (string, int) {
	c := exec.CommandContext(s.ctx, name, args...)
	c.Dir = s.dir
	c.Env = append(c.Environ(), "MTOOLS_SKIP_CHECK=1")
	out, err := c.CombinedOutput()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		s.must(fmt.Errorf("cannot run %s: %w", name, err))
	}
	s.logf("$ %s %s\n%s(exit status %d)", filepath.Base(name), strings.Join(args, " "), out, c.ProcessState.ExitCode())
	return string(out), c.ProcessState.ExitCode()
}

// mustTool is tool for what has to succeed.
func (s *scene) mustTool(name string, args ...string) string {
	out, code := s.tool(name, args...)
	s.need(code == 0, "%s %s: exit status %d: %s", filepath.Base(name), strings.Join(args, " "), code, out)
	return out
}

// mtools is where the ESP is, for mtools.
func (d *disk) mtools() string { return fmt.Sprintf("%s@@%d", d.path, espOff) }

// update makes another version of what is on the disk, as the system that runs from it would: new files first, then the
// entry, then the old files.
func (s *scene) update(d *disk, from, to, options string) {
	files := s.version(to, "initrd", options)
	dir, entry := machineID+"/"+to, "loader/entries/"+machineID+"-"+to+".conf"
	s.mustTool("mmd", "-i", d.mtools(), "::"+dir)
	for _, p := range []string{dir + "/linux", dir + "/initrd", dir + "/payload", entry} {
		f, err := os.CreateTemp(s.dir, "update-")
		s.must(err)
		_, err = f.ReadFrom(files[p].Reader())
		s.must(errors.Join(err, f.Close()))
		s.mustTool("mcopy", "-o", "-i", d.mtools(), f.Name(), "::"+p)
		s.must(os.Remove(f.Name()))
	}
	s.mustTool("mdel", "-i", d.mtools(), "::loader/entries/"+machineID+"-"+from+".conf")
	s.mustTool("mdeltree", "-i", d.mtools(), "::"+machineID+"/"+from)
}

// join makes a replica set of the disks, the first being the primary.
func (s *scene) join(disks ...*disk) {
	args := []string{"add", "--no-progress", "--primary", disks[0].path}
	for _, d := range disks[1:] {
		args = append(args, d.path)
	}
	s.mustTool(s.bin, args...)
}

// sound fails unless fsck.fat has no complaint about the ESP of any disk.
func (s *scene) sound(disks ...*disk) {
	for _, d := range disks {
		f := s.fsck(d)
		s.must(f.Err(0))
	}
}

// allocated is how many bytes of a file are no holes.
func allocated(path string) (int64, error) {
	var st syscall.Stat_t
	if err := syscall.Stat(path, &st); err != nil {
		return 0, err
	}
	return st.Blocks * 512, nil
}

// fsck is what fsck.fat says.
func (s *scene) fsck(d *disk) fixtures.Findings {
	f, err := os.Open(d.path)
	s.must(err)
	defer f.Close()
	found, err := fixtures.FsckReader(sectionOf(f, d), d.size)
	s.must(err)
	return found
}

// same fails unless the replicated files on the disks are equal, says espmirror and says mtools, and all are sound.
func (s *scene) same(disks ...*disk) {
	s.sound(disks...)
	want := s.files(disks[0])
	for _, d := range disks[1:] {
		s.mustTool(s.bin, "verify", "--primary", disks[0].path, "--target", d.path)
		have := s.files(d)
		for p, f := range want {
			s.need(have[p] == f, "%s has another %s than %s", d.name, p, disks[0].name)
		}
		s.need(len(have) == len(want), "%s has %d files, %s %d", d.name, len(have), disks[0].name, len(want))
	}
}

// differ fails when the replicated files on the disks are equal.
func (s *scene) differ(a, b *disk) {
	_, code := s.tool(s.bin, "verify", "--primary", a.path, "--target", b.path)
	s.need(code == 4, "verify: exit status %d, expected 4", code)
}

// files are the replicated files of an ESP as mtools reads them.
func (s *scene) files(d *disk) map[string]fixtures.JudgedFile {
	files, err := fixtures.Mtools(d.path, espOff)
	s.must(err)
	for p := range files {
		if fixtures.Ours(p) || strings.EqualFold(p, "loader/random-seed") {
			delete(files, p)
		}
	}
	return files
}

// start says how a machine is booted.
type start struct {
	disks []*disk
	// from is the index of the disk that the firmware boots; -1 leaves that to the firmware.
	from int
	// script runs in the guest as root, with section to report.
	script string
	// unplugged are disks that are there, but not plugged in.
	unplugged []*disk
	// vars keeps the variables of the firmware in that file.
	vars string
	// counted is vm.Machine's.
	counted bool
	// slow makes all disks but the first slow to write to.
	slow bool
}

// A slow disk, for a second: the data takes four of them, and the few small writes behind it two more.
const (
	slowBytes = 6 << 20
	slowOps   = 16
)

// scriptSize tells the disk with the script from the others, in guest/run.
const scriptSize = 1 << 20

// The machine's limits.
const (
	bootTimeout = 15 * time.Minute
	bootQuiet   = 5 * time.Minute
	bootMemory  = 640
)

// boot is what is known of a machine that ran.
type boot struct {
	console string
	report  string
	parts   map[string]section
	wall    time.Duration
}

// section is a command in the guest: its output, and its exit status.
type section struct {
	text string
	code int
}

// machine is the machine that boots as said.
func (s *scene) machine(st start) vm.Machine {
	m := vm.Machine{Firmware: true, BootDrive: st.from, Vars: st.vars, Memory: bootMemory, Counted: st.counted, Report: filepath.Join(s.dir, "report.log"),
		Timeout: bootTimeout, Quiet: bootQuiet, Prompt: "Shell>", Answer: "reset -s\r"}
	for i, d := range st.disks {
		drive := vm.Drive{Path: d.path, Sector: d.sector, Bus: d.bus}
		if i > 0 && st.slow {
			drive.WriteBytes, drive.WriteOps = slowBytes, slowOps
		}
		m.Drives = append(m.Drives, drive)
	}
	script := filepath.Join(s.dir, "script")
	text := st.script + "\nreturn 0\n"
	s.must(os.WriteFile(script, append([]byte(text), bytes.Repeat([]byte("\n"), scriptSize-len(text))...), 0o600))
	m.Drives = append(m.Drives, vm.Drive{Path: script, ReadOnly: true}, vm.Drive{Path: filepath.Join(s.g.dir, "root.img"), Snapshot: true})
	for _, d := range st.unplugged {
		m.Drives = append(m.Drives, vm.Drive{Path: d.path, Sector: d.sector, Bus: d.bus, Unplugged: true})
	}
	return m
}

// boot starts a machine and waits until it has switched itself off, having done what the script says.
func (s *scene) boot(st start) *boot {
	r := s.start(st)
	return s.wait(r)
}

// running is a machine that was started.
type running struct {
	*vm.Running
	vm.Machine
	begin time.Time
}

// start starts a machine.
func (s *scene) start(st start) *running {
	m := s.machine(st)
	r, err := m.Start(s.ctx, s.dir)
	s.must(err)
	return &running{r, m, time.Now()}
}

// wait waits until the machine has switched itself off, and its report must be whole.
func (s *scene) wait(r *running) *boot {
	console, err := r.Wait()
	b := s.ended(r, console)
	s.must(err)
	_, whole := b.parts["done"]
	s.need(whole, "the guest did not come to the end of its script")
	return b
}

// cut ends the machine as a power cut does.
func (s *scene) cut(r *running) *boot {
	console, err := r.Kill()
	b := s.ended(r, console)
	s.must(err)
	return b
}

func (s *scene) ended(r *running, console []byte) *boot {
	b := &boot{console: string(console), wall: time.Since(r.begin)}
	s.last = b
	text, err := os.ReadFile(filepath.Join(s.dir, "report.log"))
	s.must(err)
	b.report = strings.ReplaceAll(string(text), "\r", "")
	b.parse()
	n := len(s.boots) + 1
	s.must(errors.Join(os.WriteFile(filepath.Join(s.dir, fmt.Sprintf("console-%d.log", n)), console, 0o600),
		os.WriteFile(filepath.Join(s.dir, fmt.Sprintf("report-%d.log", n)), text, 0o600)))
	s.logf("boot %d: %.1f s; espmirror said:\n%s", n, b.wall.Seconds(), strings.Join(b.said(), "\n"))
	s.boots = append(s.boots, b.uptime())
	if t, ok := b.early(); ok {
		s.took = append(s.took, t)
	}
	return b
}

// parse takes the report apart.
func (b *boot) parse() {
	b.parts = map[string]section{}
	name, text := "", strings.Builder{}
	for line := range strings.Lines(b.report) {
		line = strings.TrimSuffix(line, "\n")
		if n, ok := strings.CutPrefix(line, "@begin "); ok {
			name = n
			text.Reset()
		} else if rest, ok := strings.CutPrefix(line, "@end "+name+" "); ok && name != "" {
			code, err := strconv.Atoi(rest)
			if err == nil {
				b.parts[name] = section{text.String(), code}
			}
			name = ""
		} else if name != "" {
			text.WriteString(line + "\n")
		}
	}
}

// log are the lines of the kernel's log. Of a machine that was cut off it is what the console shows.
func (b *boot) log() []string {
	text := b.parts["log"].text
	if text == "" {
		text = strings.ReplaceAll(b.console, "\r", "")
	}
	return strings.Split(text, "\n")
}

// said are the lines of espmirror in the kernel's log.
func (b *boot) said() []string {
	var lines []string
	for _, line := range b.log() {
		if logLine.MatchString(line) && strings.Contains(line, "espmirror: ") {
			lines = append(lines, strings.TrimSpace(line))
		}
	}
	return lines
}

// says reports whether espmirror said something with the text in it.
func (b *boot) says(text string) bool {
	for _, line := range b.said() {
		if strings.Contains(line, text) {
			return true
		}
	}
	return false
}

var (
	logLine   = regexp.MustCompile(`^\[ *([0-9]+\.[0-9]+)\] `)
	earlyLine = regexp.MustCompile(`espmirror: (?:[a-z]+: )?early: .*; ([0-9.]+) s, ([0-9.]+) s of it waiting`)
)

// early is how many seconds the run in the initramfs took, as it says itself.
func (b *boot) early() (float64, bool) {
	for _, line := range b.said() {
		if m := earlyLine.FindStringSubmatch(line); m != nil {
			t, err := strconv.ParseFloat(m[1], 64)
			return t, err == nil
		}
	}
	return 0, false
}

// waited is how many of them it waited for disks, -1 if it says nothing.
func (b *boot) waited() float64 {
	for _, line := range b.said() {
		if m := earlyLine.FindStringSubmatch(line); m != nil {
			if t, err := strconv.ParseFloat(m[2], 64); err == nil {
				return t
			}
		}
	}
	return -1
}

// ended is the kernel's clock when that run ended, -1 if it did not.
func (b *boot) ended() float64 {
	if _, ok := b.early(); !ok {
		return -1
	}
	return b.moment(" early: ")
}

// moment is the kernel's clock at the first line of its log with the text, -1 if there is none.
func (b *boot) moment(text string) float64 {
	for _, line := range b.log() {
		if m := logLine.FindStringSubmatch(line); m != nil && strings.Contains(line, text) {
			t, err := strconv.ParseFloat(m[1], 64)
			if err == nil {
				return t
			}
		}
	}
	return -1
}

// uptime is the kernel's clock when init began. An initramfs with systemd says the same as the system, but first.
func (b *boot) uptime() float64 {
	if _, ok := b.parts["init"]; !ok {
		t := 0.0
		for _, line := range b.log() {
			if m := logLine.FindStringSubmatch(line); m != nil && strings.Contains(line, " running in system mode") {
				t, _ = strconv.ParseFloat(m[1], 64)
			}
		}
		return t
	}
	t, err := strconv.ParseFloat(strings.TrimSpace(b.parts["init"].text), 64)
	if err != nil {
		return 0
	}
	return t
}

// versionLine is in the command line of the kernel.
var versionLine = regexp.MustCompile(`vm\.version=(\S+)`)

// version is the one that was booted.
func (b *boot) version() string {
	for _, line := range b.log() {
		if m := versionLine.FindStringSubmatch(line); m != nil {
			return m[1]
		}
	}
	return ""
}

// tail are the last lines on the console.
func (b *boot) tail(n int) string {
	lines := strings.Split(strings.TrimSpace(strings.ReplaceAll(b.console, "\r", "")), "\n")
	return strings.Join(lines[max(0, len(lines)-n):], "\n")
}
