package dist

import (
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"espmirror/fixtures"
)

// unit is a unit file, or a hook of pacman, which is written alike: "Section.Name" → its values, in order. Both programs
// ignore spaces around the "=".
type unit map[string][]string

func readUnit(t *testing.T, path string) unit {
	t.Helper()
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	u := unit{}
	section := ""
	for line := range strings.Lines(string(data)) {
		line = strings.TrimSpace(line)
		name, value, found := strings.Cut(line, "=")
		switch {
		case line == "" || line[0] == '#':
		case line[0] == '[':
			section = strings.Trim(line, "[]")
		case !found:
			t.Errorf("%s: not understood: %q", path, line)
		default:
			name = section + "." + strings.TrimSpace(name)
			u[name] = append(u[name], strings.TrimSpace(value))
		}
	}
	return u
}

// words are the words of all lines of that name.
func (u unit) words(name string) []string { return strings.Fields(strings.Join(u[name], " ")) }

func (u unit) conditions() (conditions []string) {
	for name, values := range u {
		if strings.HasPrefix(name, "Unit.Condition") {
			for _, v := range values {
				conditions = append(conditions, name+"="+v)
			}
		}
	}
	slices.Sort(conditions)
	return conditions
}

func units(t *testing.T) map[string]unit {
	t.Helper()
	paths, _ := filepath.Glob("../systemd/espmirror-*")
	if len(paths) < 9 {
		t.Fatalf("found only %q", paths)
	}
	all := map[string]unit{}
	for _, p := range paths {
		all[filepath.Base(p)] = readUnit(t, p)
	}
	return all
}

// TestUnitsVerify has systemd read the units. Those that they are ordered with need not be there.
func TestUnitsVerify(t *testing.T) {
	t.Parallel()
	need(t, "systemd-analyze")
	m := newMachine(t)
	dir := m.path(token + "/usr/lib/systemd/system")
	verify := func() string {
		files, _ := filepath.Glob(dir + "/espmirror-*")
		out, status, _ := m.try([]string{"SYSTEMD_UNIT_PATH=" + dir + ":/usr/lib/systemd/system"}, append([]string{"systemd-analyze", "verify", "--man=no"}, files...)...)
		if status != 0 && out == "" {
			out = "failed"
		}
		return out
	}
	if out := verify(); out != "" {
		t.Errorf("%s", out)
	}
	// It does find something.
	m.write(token+"/usr/lib/systemd/system/espmirror-late.service", "[Service]\nType=onesho\nExecStart=/nowhere\n", 0o644)
	if out := verify(); !strings.Contains(out, "espmirror-late.service") {
		t.Errorf("a broken unit is not noticed: %q", out)
	}
}

// TestPathConditions: a path unit whose service is kept from starting by a condition starts it again and again.
func TestPathConditions(t *testing.T) {
	t.Parallel()
	all := units(t)
	for _, name := range []string{"espmirror-pending.path", "espmirror-watch.path"} {
		path := all[name]
		service := path.words("Path.Unit")[0]
		for _, c := range all[service].conditions() {
			if !slices.Contains(path.conditions(), c) {
				t.Errorf("%s lacks %s of %s", name, c, service)
			}
		}
	}
	// Of what changes while the service of PathChanged= runs nothing is seen, so that must be over at once, and never too often.
	watch := all[all["espmirror-watch.path"].words("Path.Unit")[0]]
	if fmt.Sprint(watch["Service.ExecStart"]) != "[-@LIBDIR@/queue-sync --last]" || fmt.Sprint(watch["Unit.StartLimitIntervalSec"]) != "[0]" {
		t.Errorf("espmirror-watch.path starts %q, limit %q", watch["Service.ExecStart"], watch["Unit.StartLimitIntervalSec"])
	}
	sync := all["espmirror-sync.service"]
	if len(sync.conditions()) < 3 {
		t.Errorf("espmirror-sync.service has only %q", sync.conditions())
	}
	// The request is taken away whatever happens before the sync, and too many requests end at last.
	if pre := sync["Service.ExecStartPre"]; len(pre) != 1 || pre[0] != "-@LIBDIR@/queue-sync --settle" {
		t.Errorf("espmirror-sync.service begins with %q", pre)
	}
	if sync["Unit.StartLimitBurst"] == nil || sync["Unit.StartLimitIntervalSec"] == nil {
		t.Error("espmirror-sync.service has the usual start limit: five kernels in ten seconds, and no more syncs")
	}
}

// TestUnitsOff: what turns `early` off turns off every unit that writes.
func TestUnitsOff(t *testing.T) {
	t.Parallel()
	off := []string{"!espmirror=no", "!espmirror=off", "!espmirror=0"} // cmd/espmirror/cmdline.go
	for name, u := range units(t) {
		if got := u["Unit.ConditionKernelCommandLine"]; !slices.Equal(got, off) && !strings.HasPrefix(name, "espmirror-verify.") {
			t.Errorf("%s has %q, not %q", name, got, off)
		}
		if strings.Contains(strings.Join(u["Service.ExecStart"], ""), "espmirror early") && !slices.Contains(u["Unit.ConditionPathExists"], "!/proc/vmcore") {
			t.Errorf("%s writes to disks from a crash kernel", name)
		}
	}
}

// TestSecondLine: the program ends by itself before systemd or initrd-run end it, also with the limit that it recommends.
// A unit that systemd ends has failed, and spoils the assessment of the boot.
func TestSecondLine(t *testing.T) {
	t.Parallel()
	source, err := os.ReadFile("../../cmd/espmirror/supervise.go")
	if err != nil {
		t.Fatal(err)
	}
	m := regexp.MustCompile(`"espmirror\.limit=(\d+)(s|min) on`).FindSubmatch(source)
	if m == nil {
		t.Fatal("no limit is recommended any more")
	}
	recommended, err := time.ParseDuration(strings.Replace(string(m[1])+string(m[2]), "min", "m", 1))
	if err != nil {
		t.Fatal(err)
	}
	script, _ := os.ReadFile("../lib/initrd-run")
	seconds := regexp.MustCompile(`ESPMIRROR_EARLY_SECONDS:-(\d+)`).FindSubmatch(script)
	limits := map[string]string{"initrd-run": string(seconds[1]) + "s"}
	for name, u := range units(t) {
		if strings.Contains(strings.Join(u["Service.ExecStart"], ""), "espmirror early") {
			limits[name] = u.words("Service.TimeoutStartSec")[0]
		}
	}
	if len(limits) != 3 {
		t.Errorf("found only %v", limits)
	}
	for name, text := range limits {
		if limit, err := time.ParseDuration(text); err != nil || limit < recommended+10*time.Second {
			t.Errorf("%s ends after %s, and %v is recommended", name, text, recommended)
		}
	}
}

// TestBootIsNotDelayed: nothing of the boot waits for a sync, nothing waits for a disk, and everything ends.
func TestBootIsNotDelayed(t *testing.T) {
	t.Parallel()
	for name, u := range units(t) {
		if slices.ContainsFunc(slices.Concat(u.words("Unit.Requires"), u.words("Unit.BindsTo"), u.words("Unit.Wants"), u.words("Unit.After")), func(s string) bool {
			return strings.HasSuffix(s, ".device") || s == "systemd-udev-settle.service"
		}) {
			t.Errorf("%s waits for a device", name)
		}
		for _, target := range u.words("Install.WantedBy") {
			// A target comes after what it wants, unless that is told to come after it, or has no default dependencies.
			early := slices.Equal(u["Unit.DefaultDependencies"], []string{"no"})
			if strings.HasSuffix(name, ".service") && !early && !slices.Contains(u.words("Unit.After"), target) {
				t.Errorf("%s holds up %s", name, target)
			}
		}
		if strings.HasSuffix(name, ".service") && u["Service.TimeoutStartSec"] == nil && u["Service.ExecStop"] == nil {
			t.Errorf("%s may take for ever", name)
		}
		if slices.Contains(u["Unit.DefaultDependencies"], "no") {
			if !slices.Contains(u.words("Unit.Before"), "shutdown.target") || !slices.Contains(u.words("Unit.Conflicts"), "shutdown.target") {
				t.Errorf("%s would run on at shutdown", name)
			}
			// A unit of the early boot that fails would be held against the boot.
			for _, name := range []string{"Service.ExecStart", "Service.ExecStop"} {
				for _, command := range u[name] {
					if !strings.HasPrefix(command, "-") {
						t.Errorf("%s: %s can fail", name, command)
					}
				}
			}
		}
		// A mount namespace would keep an automounted /efi busy, and hide what the host mounts.
		for _, directive := range []string{"ProtectHome", "ProtectSystem", "PrivateTmp", "PrivateDevices", "PrivateMounts", "PrivateNetwork",
			"ProtectKernelTunables", "ProtectControlGroups", "ProtectKernelLogs", "ReadOnlyPaths", "InaccessiblePaths", "RootDirectory", "DynamicUser"} {
			if u["Service."+directive] != nil {
				t.Errorf("%s: %s= makes a mount namespace", name, directive)
			}
		}
	}
}

func TestOrder(t *testing.T) {
	t.Parallel()
	all := units(t)
	for _, c := range []struct {
		unit, name string
		want       []string
	}{
		{"espmirror-initrd.service", "Unit.After", []string{"initrd-root-device.target", "local-fs-pre.target", "systemd-hibernate-resume.service"}},
		{"espmirror-initrd.service", "Unit.Before", []string{"initrd.target"}},
		{"espmirror-recover.service", "Unit.Before", []string{"local-fs-pre.target", "efi.mount", "efi.automount", "boot.mount", "boot.automount", "boot-efi.mount"}},
		{"espmirror-recover.service", "Unit.Wants", []string{"local-fs-pre.target"}},
		{"espmirror-sync.service", "Unit.After", []string{"boot-complete.target", "systemd-bless-boot.service", "systemd-boot-random-seed.service", "systemd-boot-update.service", "local-fs.target"}},
		{"espmirror-shutdown.service", "Unit.Before", []string{"efi.mount", "boot.mount", "boot-efi.mount", "efi.automount", "boot.automount"}},
	} {
		for _, want := range c.want {
			if !slices.Contains(all[c.unit].words(c.name), want) {
				t.Errorf("%s: %s= lacks %s", c.unit, c.name, want)
			}
		}
	}
	if sync := all["espmirror-sync.service"]; sync["Unit.Wants"] != nil || sync["Unit.Requires"] != nil {
		t.Error("espmirror-sync.service pulls something in")
	}
}

// TestPreset: what the preset says, systemctl does, and the maintainer scripts say the same.
func TestPreset(t *testing.T) {
	t.Parallel()
	m := newMachine(t)
	says := map[string][]string{}
	var named []string
	for line := range strings.Lines(m.read("../systemd/85-espmirror.preset")) {
		if verb, name, found := strings.Cut(strings.TrimSpace(line), " "); found && verb != "#" {
			says[verb] = append(says[verb], name)
			named = append(named, name)
		}
	}
	all := units(t)
	for name, u := range all {
		if (u["Install.WantedBy"] != nil) != slices.Contains(named, name) {
			t.Errorf("%s can be enabled, or is in the preset, but not both", name)
		}
	}
	unitName := regexp.MustCompile(`espmirror-[a-z]+\.(service|path|timer)`)
	listed := func(path, begin, end string) []string {
		_, text, _ := strings.Cut(m.read(path), begin)
		text, _, _ = strings.Cut(text, end)
		names := unitName.FindAllString(text, -1)
		slices.Sort(names)
		return names
	}
	sorted := func(names ...string) []string { return slices.Sorted(slices.Values(names)) }
	for _, c := range []struct {
		path, begin, end string
		want             []string
	}{
		{"../debian/postinst", "enabled=", "\n", sorted(says["enable"]...)},
		{"../debian/postinst", "optional=", "\n", sorted(says["disable"]...)},
		{"../debian/postrm", "units=", "\n\n", sorted(named...)},
		{"../packages/rpm/post", "--no-reload preset", ">/dev/null", sorted(named...)},
		{"../packages/rpm/preun", "for unit in", "; do", sorted(named...)},
		{"../packages/arch/post_install", "--no-reload preset", ">/dev/null", sorted(named...)},
		{"../packages/arch/pre_remove", "for unit in", "; do", sorted(named...)},
	} {
		if got := listed(c.path, c.begin, c.end); !slices.Equal(got, c.want) {
			t.Errorf("%s, %s %q, not %q", c.path, c.begin, got, c.want)
		}
	}

	need(t, "systemctl")
	for name := range all {
		m.write("usr/lib/systemd/system/"+name, m.read(m.path(token+"/usr/lib/systemd/system/"+name)), 0o644)
	}
	m.write("usr/lib/systemd/system-preset/99-default.preset", "disable *\n", 0o644)
	m.run(soon, nil, append([]string{"systemctl", "--root=" + m.root, "preset"}, named...)...)
	wants, _ := filepath.Glob(m.path("etc/systemd/system/*/*"))
	var enabled []string
	for _, w := range wants {
		enabled = append(enabled, filepath.Base(w))
	}
	if got := sorted(enabled...); !slices.Equal(got, sorted(says["enable"]...)) {
		t.Errorf("systemctl preset enabled %q", got)
	}
}

// TestCommandLines gives the command lines of units and scripts to the program itself, in a root where there is nothing.
func TestCommandLines(t *testing.T) {
	t.Parallel()
	lines := map[string]bool{syncCall: true, "early --kmsg": true, "early --kmsg --timeout 0s --limit 10s": true}
	for name, u := range units(t) {
		for key, values := range u {
			for _, v := range values {
				if _, args, found := strings.Cut(v, "@SBINDIR@/espmirror "); found && strings.HasPrefix(key, "Service.Exec") {
					lines[args] = true
				} else if found {
					t.Errorf("%s: %s=%s", name, key, v)
				}
			}
		}
	}
	if len(lines) < 5 {
		t.Errorf("found only %q", slices.Collect(maps.Keys(lines)))
	}
	dir := t.TempDir()
	bin := fixtures.Build(t, dir, "cmd/espmirror")
	help, _ := exec.Command(bin, "--help").CombinedOutput()
	for line := range lines {
		t.Run(line, func(t *testing.T) {
			command, _, _ := strings.Cut(line, " ")
			if !strings.Contains(string(help), "\n   "+command+" ") {
				t.Fatalf("the program does not know %s", command)
			}
			out, _ := exec.Command(bin, append(strings.Fields(line), "--system-root", dir)...).CombinedOutput()
			for _, bad := range []string{"unknown option", "arguments were given", "invalid", "cannot read the command line: --"} {
				if strings.Contains(string(out), bad) {
					t.Errorf("%s", out)
				}
			}
		})
	}
	out, _ := exec.Command(bin, "sync", "--bogus").CombinedOutput()
	if !strings.Contains(string(out), "unknown option") {
		t.Errorf("an option that does not exist is not noticed any more: %s", out)
	}
}

// rule is a udev rule: what has to match, and what is assigned.
type rule struct {
	match, assign [][3]string
}

var ruleToken = regexp.MustCompile(`^([A-Z_]+(?:\{[A-Z_]+\})?)(==|!=|\+=|=)"([^"]*)"$`)

// TestUdevRules reads the rules with a small reader of the few words that they use, and asks what they make of devices.
func TestUdevRules(t *testing.T) {
	t.Parallel()
	data, err := os.ReadFile("../udev/90-espmirror.rules")
	if err != nil {
		t.Fatal(err)
	}
	var rules []rule
	for line := range strings.Lines(string(data)) {
		line = strings.TrimSpace(line)
		if line == "" || line[0] == '#' {
			continue
		}
		var r rule
		for _, word := range strings.Split(line, ", ") {
			m := ruleToken.FindStringSubmatch(word)
			if m == nil {
				t.Fatalf("not understood: %q", word)
			}
			if m[2] == "==" || m[2] == "!=" {
				r.match = append(r.match, [3]string(m[1:]))
			} else {
				r.assign = append(r.assign, [3]string(m[1:]))
			}
		}
		rules = append(rules, r)
	}
	apply := func(device map[string]string) (wants string) {
		skip := ""
	next:
		for _, r := range rules {
			if skip != "" {
				if len(r.assign) == 1 && r.assign[0] == [3]string{"LABEL", "=", skip} {
					skip = ""
				}
				continue
			}
			for _, m := range r.match {
				if slices.Contains(strings.Split(m[2], "|"), device[m[0]]) != (m[1] == "==") {
					continue next
				}
			}
			for _, a := range r.assign {
				switch a[0] {
				case "GOTO":
					skip = a[2]
				case "ENV{SYSTEMD_WANTS}":
					wants += a[2]
				}
			}
		}
		if skip != "" {
			t.Errorf("there is no label %s", skip)
		}
		return wants
	}
	device := func(changes ...string) map[string]string {
		d := map[string]string{"ACTION": "add", "SUBSYSTEM": "block", "ENV{DEVTYPE}": "partition", "ENV{ID_PART_ENTRY_TYPE}": "c12a7328-f81f-11d2-ba4b-00a0c93ec93b"}
		for i := 0; i < len(changes); i += 2 {
			d[changes[i]] = changes[i+1]
		}
		return d
	}
	late := "espmirror-late.service"
	for _, c := range []struct {
		name   string
		device map[string]string
		wants  string
	}{
		{"ESP", device(), late},
		{"XBOOTLDR", device("ENV{ID_PART_ENTRY_TYPE}", "bc13c2ff-59e6-4262-a352-b275fd6f7172"), late},
		{"ESP of an MBR disk", device("ENV{ID_PART_ENTRY_TYPE}", "0xef"), late},
		{"our own writing", device("ACTION", "change"), ""},
		{"going", device("ACTION", "remove"), ""},
		{"Linux", device("ENV{ID_PART_ENTRY_TYPE}", "0fc63daf-8483-4772-8e79-3d69d8477de4"), ""},
		{"no partition table", device("ENV{ID_PART_ENTRY_TYPE}", ""), ""},
		{"whole disk", device("ENV{DEVTYPE}", "disk"), ""},
		{"no disk", device("SUBSYSTEM", "net"), ""},
	} {
		if got := apply(c.device); got != c.wants {
			t.Errorf("%s wants %q, not %q", c.name, got, c.wants)
		}
	}
	if _, err := os.Stat("../systemd/" + late); err != nil {
		t.Error(err)
	}

	t.Run("udevadm", func(t *testing.T) {
		if out, err := exec.Command("udevadm", "verify", "--help").CombinedOutput(); err != nil {
			t.Skipf("skipped: udevadm verify: not in this udev: %v: %s", err, strings.TrimSpace(string(out)))
		}
		if out, err := exec.Command("udevadm", "verify", "--no-style", "../udev/90-espmirror.rules").CombinedOutput(); err != nil {
			t.Errorf("%s", out)
		}
	})
}
