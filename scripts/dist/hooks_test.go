package dist

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// misbehaviours is what a program of ours may do without a hook failing, and for how long the hook may then take.
var misbehaviours = map[string]time.Duration{"0": soon, "1": soon, "3": soon, "6": soon, "139": soon, "crash": soon, "hang": 20 * time.Second}

// forMisbehaviours runs a test on a machine of its own for each; run is m.run with the program told so, and the limit kept.
func forMisbehaviours(t *testing.T, test func(t *testing.T, m *machine, do string, run func(command ...string) string)) {
	for do, limit := range misbehaviours {
		t.Run(do, func(t *testing.T) {
			t.Parallel()
			m := newMachine(t)
			test(t, m, do, func(command ...string) string { return m.run(limit, []string{"FAKE_DO=" + do}, command...) })
		})
	}
}

// TestKernelInstall runs the real kernel-install with a plugin that writes a kernel, ours, and one that comes later.
func TestKernelInstall(t *testing.T) {
	t.Parallel()
	need(t, "kernel-install")
	m := newMachine(t)
	m.mkdir("run/systemd/system")
	entry := m.path("efi/token/6.1.0")
	m.write("plugins/90-fake.install", "#!/bin/sh\nif [ \"$1\" = add ]; then cp \"$4\" \"$3/linux\"; fi\nexit 0\n", 0o755)
	m.write("plugins/99-later.install", "#!/bin/sh\necho \"later $1 $(ls \""+m.path("run/espmirror")+"\" | tr '\\n' ' ') $(test -d \"$3\" && echo there)\" >>\"$FAKE_LOG\"\n", 0o755)
	m.write("conf/install.conf", "layout=bls\nBOOT_ROOT="+m.path("efi")+"\nMACHINE_ID=0123456789abcdef0123456789abcdef\n", 0o644)
	m.write("conf/entry-token", "token\n", 0o644)
	m.mkdir("efi/token")
	m.write("vmlinuz", "kernel", 0o644)
	env := []string{"KERNEL_INSTALL_CONF_ROOT=" + m.path("conf"), "BOOT_ROOT=" + m.path("efi"),
		"KERNEL_INSTALL_PLUGINS=" + m.path("plugins/90-fake.install") + " " + m.path("usr/lib/kernel/install.d/95-espmirror.install") + " " + m.path("plugins/99-later.install")}

	m.run(soon, env, "kernel-install", "add", "6.1.0", m.path("vmlinuz"))
	if m.read(entry+"/linux") != "kernel" {
		t.Fatal("kernel-install did not install the kernel")
	}
	pid := strings.TrimSpace(strings.TrimPrefix(m.waits(), "pid "))
	if !m.exists("run/espmirror/pending") || pid == "" || strings.ContainsAny(pid, " \n") {
		t.Errorf("after add: pending: %v, waits for %q", m.exists("run/espmirror/pending"), m.waits())
	}
	m.remove("run/espmirror")

	m.run(soon, env, "kernel-install", "remove", "6.1.0")
	later := m.calls("later")
	if len(later) != 2 || !strings.Contains(later[1], "pending") || !strings.HasSuffix(later[1], "there") {
		t.Errorf("later plugins ran %q: the trap is not what we think", later)
	}
	if m.exists("efi/token/6.1.0") {
		t.Error("kernel-install left the directory")
	}
	if got := m.waits(); !strings.Contains(got, "\ndir "+entry+"\n") {
		t.Errorf("after remove: waits for %q, not for %s to go", got, entry)
	}
	// kernel-install is gone, and so is the directory: the service does not wait.
	if _, _, took := m.try([]string{"ESPMIRROR_SETTLE_SECONDS=20"}, "dash", m.lib("queue-sync"), "--settle"); took > soon || m.waits() != "" {
		t.Errorf("settled in %v, left %q", took, m.waits())
	}
}

// TestPluginNeverFails: kernel-install takes 77 for an order to stop, and any other status for a failed kernel.
func TestPluginNeverFails(t *testing.T) {
	t.Parallel()
	forShells(t, func(t *testing.T, shell []string) {
		m := newMachine(t)
		plugin := append(shell, m.path("usr/lib/kernel/install.d/95-espmirror.install"))
		m.write(token+"/usr/lib/espmirror/queue-sync", "#!/bin/sh\necho \"queue $*\" >>\"$FAKE_LOG\"\nexit ${FAKE_QUEUE:-77}\n", 0o755)
		m.run(soon, nil, append(plugin, "add", "6.1", "/efi/t/6.1", "/vmlinuz")...)
		m.run(soon, []string{"FAKE_QUEUE=1"}, append(plugin, "remove", "6.1", "/efi/t/6.1")...)
		calls := m.calls("queue")
		if len(calls) != 2 || !strings.HasPrefix(calls[0], "--after ") || strings.Contains(calls[0], "--gone") || !strings.HasSuffix(calls[1], "--gone /efi/t/6.1") {
			t.Errorf("called %q", calls)
		}
		for _, args := range [][]string{{"inspect", "6.1"}, {"add-all"}, {}, {""}} {
			m.run(soon, nil, append(plugin, args...)...)
		}
		if len(m.calls("queue")) != 2 {
			t.Errorf("other verbs led to %q", m.calls("queue"))
		}
		m.remove(token + "/usr/lib/espmirror/queue-sync")
		if out := m.run(soon, nil, append(plugin, "add", "6.1", "/efi/t/6.1", "/vmlinuz")...); out != "" {
			t.Errorf("after the package was removed: says %q", out)
		}
	})
}

// TestDebianHooks runs the hooks as the kernel's maintainer scripts and update-initramfs do.
func TestDebianHooks(t *testing.T) {
	t.Parallel()
	need(t, "run-parts")
	m := newMachine(t)
	m.mkdir("run/systemd/system")
	for _, c := range []struct {
		dir, env string
		asked    bool
	}{
		{"etc/kernel/postinst.d", "DEB_MAINT_PARAMS=", true},
		{"etc/kernel/postinst.d", "DEB_MAINT_PARAMS='configure' '6.1'", true},
		{"etc/kernel/postinst.d", "DEB_MAINT_PARAMS=configure", true},
		{"etc/kernel/postinst.d", "DEB_MAINT_PARAMS='abort-upgrade' '6.1'", false},
		{"etc/kernel/postinst.d", "DEB_MAINT_PARAMS='triggered' 'x'", false},
		{"etc/kernel/postrm.d", "DEB_MAINT_PARAMS='remove'", true},
		{"etc/kernel/postrm.d", "DEB_MAINT_PARAMS='upgrade' '6.1'", false},
		{"etc/kernel/postrm.d", "DEB_MAINT_PARAMS='purge'", false},
		{"etc/initramfs/post-update.d", "X=", true},
		{"etc/initramfs/post-update.d", "INITRAMFS_TOOLS_KERNEL_HOOK=1", false},
	} {
		m.remove("run/espmirror")
		out := m.run(soon, []string{c.env}, "run-parts", "--report", "--exit-on-error", "--arg=6.1.0", "--arg=/boot/x-6.1.0", m.path(c.dir))
		if m.exists("run/espmirror/pending") != c.asked || out != "" {
			t.Errorf("%s with %s: asked for a sync: %v, says %q", c.dir, c.env, !c.asked, out)
		}
		if c.asked && !strings.HasPrefix(m.waits(), "pid ") {
			t.Errorf("%s with %s: does not wait for run-parts: %q", c.dir, c.env, m.waits())
		}
	}
	for _, broken := range []string{"#!/bin/sh\nexit 1\n", ""} {
		m.remove(token + "/usr/lib/espmirror/queue-sync")
		if broken != "" {
			m.write(token+"/usr/lib/espmirror/queue-sync", broken, 0o755)
		}
		for _, dir := range []string{"etc/kernel/postinst.d", "etc/kernel/postrm.d", "etc/initramfs/post-update.d"} {
			m.run(soon, nil, "run-parts", "--exit-on-error", "--arg=6.1.0", m.path(dir))
		}
	}
}

// TestPacmanHook reads the hook as pacman does: it must run last, ask for no sync of ours before, and not abort anything.
func TestPacmanHook(t *testing.T) {
	t.Parallel()
	m := newMachine(t)
	fields := readUnit(t, m.path("usr/share/libalpm/hooks/zzz-espmirror.hook"))
	want := map[string]string{"Trigger.Type": "[Path]", "Trigger.Operation": "[Install Upgrade Remove]", "Action.When": "[PostTransaction]",
		"Action.Exec": "[" + m.lib("queue-sync") + " --last]"}
	for name, value := range want {
		if got := fmt.Sprint(fields[name]); got != value {
			t.Errorf("%s is %s, not %s", name, got, value)
		}
	}
	matches := func(path string) bool {
		for _, target := range fields["Trigger.Target"] {
			if ok, _ := filepath.Match(target, path); ok {
				return true
			}
		}
		return false
	}
	for path, want := range map[string]bool{"usr/lib/modules/6.1-arch/vmlinuz": true, "usr/lib/systemd/boot/efi/systemd-bootx64.efi": true,
		"boot/amd-ucode.img": true, "usr/lib/initcpio/init": true, "usr/bin/ls": false, "/boot/x": false} {
		if matches(path) != want {
			t.Errorf("%s matches: %v", path, !want)
		}
	}
}

// TestInitrdRun: the boot goes on, whatever the program does, and at once if it ends at once.
func TestInitrdRun(t *testing.T) {
	t.Parallel()
	forShells(t, func(t *testing.T, shell []string) {
		forMisbehaviours(t, func(t *testing.T, m *machine, do string, run func(command ...string) string) {
			start := time.Now()
			out := run(append(shell, m.lib("initrd-run"))...)
			if calls := m.calls("espmirror"); len(calls) != 1 || calls[0] != "early --kmsg" || out != "" {
				t.Errorf("ran %q, says %q", calls, out)
			}
			if took := time.Since(start); do == "hang" && took < 900*time.Millisecond {
				t.Errorf("was given up after %v", took)
			}
		})
		// What found nothing wrong, or nothing new, is not done again.
		m := newMachine(t)
		again := func(want int, what string) {
			t.Helper()
			before := len(m.calls("espmirror"))
			if out := m.run(soon, []string{"FAKE_DO=3"}, append(shell, m.lib("initrd-run"), "--again")...); out != "" {
				t.Errorf("%s: says %q", what, out)
			}
			if n := len(m.calls("espmirror")) - before; n != want {
				t.Errorf("%s: ran %d times", what, n)
			}
		}
		m.mkdir("sys/class/block/sda")
		again(0, "nothing was done before")
		m.run(soon, []string{"FAKE_DO=0"}, append(shell, m.lib("initrd-run"))...)
		m.mkdir("sys/class/block/sdb")
		again(0, "all was well")
		m.run(soon, []string{"FAKE_DO=3"}, append(shell, m.lib("initrd-run"))...)
		again(0, "no disk has come")
		m.run(soon, []string{"FAKE_DO=3"}, append(shell, m.lib("initrd-run"))...)
		m.mkdir("sys/class/block/sdc")
		again(1, "a disk has come")
		m.mkdir("sys/class/block/sdd")
		again(0, "a third time")
		// There is no second waiting: a boot waits for what is missing once.
		if calls := m.calls("espmirror"); calls[len(calls)-1] != "early --kmsg --timeout 0s --limit 10s" {
			t.Errorf("the second run: %q", calls[len(calls)-1])
		}
		m = newMachine(t)
		m.write("proc/vmcore", "", 0o400)
		m.run(soon, nil, append(shell, m.lib("initrd-run"))...)
		if calls := m.calls("espmirror"); calls != nil {
			t.Errorf("in a crash kernel: ran %q", calls)
		}
		m = newMachine(t)
		m.remove(token + "/usr/sbin/espmirror")
		if out := m.run(soon, nil, append(shell, m.lib("initrd-run"))...); out != "" {
			t.Errorf("without the program: says %q", out)
		}
	})
}

// TestInitrdRunKlibc: an initramfs without busybox has few commands, and nobody has mounted the EFI variables. Busybox has
// its own mount, which is not tried here.
func TestInitrdRunKlibc(t *testing.T) {
	t.Parallel()
	dash := need(t, "dash")
	m := newMachine(t)
	for _, name := range []string{"mount", "umount", "modprobe"} {
		m.fake(name, "0")
	}
	for _, name := range []string{"sleep", "mkdir", "sh", "tr"} { // tr is for the fake programs
		link(t, need(t, name), m.path("bin/"+name))
	}
	m.env = append(m.env, "PATH="+m.path("bin"))
	m.mkdir("sys/firmware/efi/efivars")
	m.mkdir("sys/class/block/sda")
	for i, args := range [][]string{{}, {"--again"}, {"--again"}} {
		if out := m.run(soon, []string{"FAKE_DO=3"}, append([]string{dash, m.lib("initrd-run")}, args...)...); out != "" {
			t.Errorf("%q says %q", args, out)
		}
		if n := len(m.calls("espmirror")); n != min(i+1, 2) || len(m.calls("mount")) != n || len(m.calls("umount")) != n {
			t.Errorf("%q: ran %q, mounted %q, unmounted %q", args, m.calls("espmirror"), m.calls("mount"), m.calls("umount"))
		}
		m.mkdir(fmt.Sprint("sys/class/block/sd", i))
	}
}

func TestInitramfsTools(t *testing.T) {
	t.Parallel()
	forShells(t, func(t *testing.T, shell []string) {
		m := newMachine(t)
		hook := m.path("usr/share/initramfs-tools/hooks/espmirror")
		boot, late := m.path("usr/share/initramfs-tools/scripts/local-premount/espmirror"), m.path("usr/share/initramfs-tools/scripts/local-bottom/espmirror")
		for script, want := range map[string]string{hook: "\n", boot: "resume\n", late: "\n"} {
			if out := m.run(soon, nil, append(shell, script, "prereqs")...); out != want {
				t.Errorf("%s prereqs: %q", script, out)
			}
		}
		if calls := m.calls("espmirror"); calls != nil {
			t.Errorf("asked for prerequisites, ran %q", calls)
		}

		m.run(soon, []string{"FAKE_DO=1"}, append(shell, boot)...)
		if calls := m.calls("espmirror"); len(calls) != 1 || calls[0] != "early --kmsg" {
			t.Errorf("at boot: ran %q", calls)
		}
		m.mkdir("sys/class/block/late")
		m.run(soon, []string{"FAKE_DO=1"}, append(shell, late)...)
		if calls := m.calls("espmirror"); len(calls) != 2 || calls[1] != "early --kmsg --timeout 0s --limit 10s" {
			t.Errorf("when a disk has come: ran %q", calls)
		}
		m.remove("sys/class/block/late")
		m.write(token+"/usr/lib/espmirror/initrd-run", "#!/bin/sh\nexit 3\n", 0o755)
		m.run(soon, nil, append(shell, boot)...)

		// The hook, with functions that note what they are called for.
		m.write("functions", "copy_exec() { echo \"copy $1 $2\" >>\"$FAKE_LOG\"; return ${FAKE_COPY:-0}; }\nmanual_add_modules() { echo \"module $*\" >>\"$FAKE_LOG\"; return 1; }\nsys_walk_mod_add() { echo \"walk $1\" >>\"$FAKE_LOG\"; return 1; }\n", 0o644)
		m.write("hook", strings.ReplaceAll(strings.ReplaceAll(m.read(hook), "/usr/share/initramfs-tools/hook-functions", m.path("functions")), "/sys/class", m.path("sys/class")), 0o755)
		for _, p := range []string{"sda/sda1", "sda/sda2", "virtual/block/dm-0/dm-0p1"} {
			m.mkdir("sys/devices/" + p)
			m.write("sys/devices/"+p+"/partition", "1\n", 0o644)
			m.mkdir("sys/class/block")
			link(t, m.path("sys/devices/"+p), m.path("sys/class/block/"+filepath.Base(p)))
		}
		withErrexit := func(env ...string) string {
			return m.run(soon, env, append(shell, "-e", m.path("hook"))...)
		}
		withErrexit("MODULES=most")
		if got := m.calls("module"); len(got) != 1 || got[0] != "efivarfs" {
			t.Errorf("modules %q: nobody knows what was booted", got)
		}
		if got := m.calls("copy"); len(got) != 2 || got[0] != m.lib("espmirror-initrd")+" "+m.path(token+"/usr/sbin/espmirror") || got[1] != m.lib("initrd-run")+" "+m.lib("initrd-run") || m.calls("walk") != nil {
			t.Errorf("copies %q, walks %q", got, m.calls("walk"))
		}
		withErrexit("MODULES=dep")
		if got := m.calls("walk"); len(got) != 2 || got[0] != m.path("sys/devices/sda/sda1") {
			t.Errorf("MODULES=dep walks %q", got)
		}
		// A failure here would be one of the kernel's package.
		if out := withErrexit("FAKE_COPY=2"); !strings.HasPrefix(out, "W: espmirror: ") {
			t.Errorf("cannot copy: says %q", out)
		}
		m.remove(token + "/usr/lib/espmirror/espmirror-initrd")
		if out := withErrexit("FAKE_COPY=2"); out != "" {
			t.Errorf("without the program: says %q", out)
		}
	})
}

func link(t *testing.T, target, name string) {
	t.Helper()
	if out, err := exec.Command("ln", "-s", target, name).CombinedOutput(); err != nil {
		t.Fatalf("%s", out)
	}
}

// TestDracutHook sources the hook as dracut does, in an init that must survive it.
func TestDracutHook(t *testing.T) {
	t.Parallel()
	forShells(t, func(t *testing.T, shell []string) {
		forMisbehaviours(t, func(t *testing.T, m *machine, _ string, run func(command ...string) string) {
			m.write("init", "set >\"$1.before\"\n. \"$2\"\nset >\"$1.after\"\necho alive\n", 0o755)
			out := run(append(shell, m.path("init"), m.path("vars"), m.path("usr/lib/dracut/modules.d/91espmirror/espmirror.sh"))...)
			if out != "alive\n" || len(m.calls("espmirror")) != 1 {
				t.Errorf("says %q, ran %q", out, m.calls("espmirror"))
			}
			vars := func(name string) (kept []string) {
				for line := range strings.Lines(m.read(m.path(name))) {
					if !strings.HasPrefix(line, "_=") && !strings.HasPrefix(line, "PPID=") && !strings.HasPrefix(line, "LINENO=") {
						kept = append(kept, line)
					}
				}
				return kept
			}
			if before, after := vars("vars.before"), vars("vars.after"); fmt.Sprint(before) != fmt.Sprint(after) {
				t.Errorf("it changes variables:\n%s\n%s", before, after)
			}
		})
	})
}

func TestDracutModule(t *testing.T) {
	t.Parallel()
	need(t, "bash")
	m := newMachine(t)
	module := m.path("usr/lib/dracut/modules.d/91espmirror")
	m.write("dracut", `
set -e
require_binaries() { test -x "$1"; }
dracut_module_included() { test "$1" = "$with"; }
inst_simple() { echo "simple $*" >>"$FAKE_LOG"; }
inst_script() { echo "script $*" >>"$FAKE_LOG"; }
inst_hook() { echo "hook $*" >>"$FAKE_LOG"; test -f "$3"; }
moddir=$1 initdir=$2 with=$3 systemdsystemunitdir=/usr/lib/systemd/system
. "$moddir/module-setup.sh"
instmods() { echo "module $*" >>"$FAKE_LOG"; }
check && depends && installkernel && install && echo included
`, 0o755)
	for _, with := range []string{"base", "systemd"} {
		m.remove("log")
		if out := m.run(soon, nil, "bash", m.path("dracut"), module, m.path("initrd"), with); out != "included\n" {
			t.Errorf("says %q", out)
		}
		simple, hook := m.calls("simple"), m.calls("hook")
		if got := m.calls("module"); len(got) != 1 || got[0] != "efivarfs" {
			t.Errorf("modules %q: nobody knows what was booted", got)
		}
		if len(simple) == 0 || simple[0] != m.lib("espmirror-initrd")+" "+m.path(token+"/usr/sbin/espmirror") {
			t.Errorf("with %s: does not install the program: %q", with, simple)
		}
		wants := m.path("initrd/usr/lib/systemd/system/initrd.target.wants/espmirror-initrd.service")
		switch with {
		case "base":
			if len(hook) != 1 || hook[0] != "pre-mount 20 "+module+"/espmirror.sh" || len(m.calls("script")) != 1 || m.exists("initrd") {
				t.Errorf("without systemd: hooks %q, scripts %q", hook, m.calls("script"))
			}
		case "systemd":
			unit := m.path(token+"/usr/lib/systemd/system/espmirror-initrd.service") + " /usr/lib/systemd/system/espmirror-initrd.service"
			if hook != nil || len(simple) != 2 || simple[1] != unit {
				t.Errorf("with systemd: hooks %q, installs %q", hook, simple)
			}
			// The stub of inst_simple installs nothing, so that the link leads to where the unit would be.
			if target, err := os.Readlink(wants); err != nil || target != "../espmirror-initrd.service" {
				t.Errorf("initrd.target does not want the unit: %q, %v", target, err)
			}
		}
	}
	m.remove(token + "/usr/lib/espmirror/espmirror-initrd")
	if out, status, _ := m.try(nil, "bash", m.path("dracut"), module, m.path("initrd"), "base"); status == 0 || out != "" {
		t.Errorf("without the program: status %d, says %q", status, out)
	}
}

// TestMkinitcpio has to do with stubs: mkinitcpio is not in Debian.
func TestMkinitcpio(t *testing.T) {
	t.Parallel()
	need(t, "bash")
	m := newMachine(t)
	m.write("mkinitcpio", `
set -e
add_binary() { test -x "$1"; echo "binary $*" >>"$FAKE_LOG"; }
add_file() { test -f "$1"; echo "file $*" >>"$FAKE_LOG"; }
add_symlink() { echo "symlink $*" >>"$FAKE_LOG"; }
add_runscript() { echo "runscript" >>"$FAKE_LOG"; }
. "$1"
build
help | grep -q espmirror=no
for HOOKS in "base udev" "espmirror base"; do
	HOOKS=($HOOKS)
	. "$2"
	. "$2"
	echo "hooks ${HOOKS[*]}" >>"$FAKE_LOG"
done
`, 0o755)
	m.run(soon, nil, "bash", m.path("mkinitcpio"), m.path("usr/lib/initcpio/install/espmirror"), m.path("etc/mkinitcpio.conf.d/espmirror.conf"))
	units := "/usr/lib/systemd/system/"
	want := "binary " + m.lib("espmirror-initrd") + " " + m.path(token+"/usr/sbin/espmirror") + "\nfile " + m.lib("initrd-run") + " " + m.lib("initrd-run") + " 755\nrunscript\n" +
		"file " + m.path(token+units) + "/espmirror-initrd.service " + units + "espmirror-initrd.service\n" +
		"symlink " + units + "initrd.target.wants/espmirror-initrd.service " + units + "espmirror-initrd.service\n" +
		"hooks base udev espmirror\nhooks espmirror base\n"
	if got := m.read(m.log); got != want {
		t.Errorf("got\n%swant\n%s", got, want)
	}

	forShells(t, func(t *testing.T, shell []string) {
		m := newMachine(t)
		m.write("init", ". \"$1\"\nrun_latehook || echo failed\necho alive\n", 0o755)
		for do, limit := range misbehaviours {
			if out := m.run(limit, []string{"FAKE_DO=" + do}, append(shell, m.path("init"), m.path("usr/lib/initcpio/hooks/espmirror"))...); out != "alive\n" {
				t.Errorf("%s: says %q", do, out)
			}
		}
		if got := len(m.calls("espmirror")); got != len(misbehaviours) {
			t.Errorf("ran the program %d times", got)
		}
	})
}
