package dist

import (
	"crypto/sha256"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
)

// TestPackageVersions: each format sorts our versions as they were made.
func TestPackageVersions(t *testing.T) {
	t.Parallel()
	version := func(format, described string) string {
		t.Helper()
		cmd := exec.Command("scripts/packages/build", "--version", format)
		cmd.Dir = "../.."
		cmd.Env = append(os.Environ(), "VERSION="+described)
		out, err := cmd.CombinedOutput()
		if err != nil {
			t.Fatalf("%v\n%s", err, out)
		}
		return strings.TrimSpace(string(out))
	}
	inOrder := []string{"v1.2.3-rc1-0-gabcdef0", "v1.2.3-rc1-4-gabcdef0", "v1.2.3-rc2-0-gabcdef0", "v1.2.3", "v1.2.3-4-gabcdef0", "v1.2.3-11-g0123456", "v1.2.4-0-gabcdef0"}
	for format, want := range map[string]string{
		"deb":       "1.2.3~rc1 1.2.3~rc1+4.gabcdef0 1.2.3~rc2 1.2.3 1.2.3+4.gabcdef0 1.2.3+11.g0123456 1.2.4",
		"rpm":       "1.2.3~rc1 1.2.3~rc1^4.gabcdef0 1.2.3~rc2 1.2.3 1.2.3^4.gabcdef0 1.2.3^11.g0123456 1.2.4",
		"archlinux": "1.2.3rc1 1.2.3rc1.r4.gabcdef0 1.2.3rc2 1.2.3 1.2.3.r4.gabcdef0 1.2.3.r11.g0123456 1.2.4",
	} {
		var got []string
		for _, described := range inOrder {
			got = append(got, version(format, described))
		}
		if strings.Join(got, " ") != want {
			t.Errorf("%s: %q, not %q", format, got, want)
		}
		for i := 1; i < len(got); i++ {
			var older *exec.Cmd
			switch format {
			case "deb":
				older = exec.Command("dpkg", "--compare-versions", got[i-1], "lt", got[i])
			case "rpm":
				older = exec.Command("rpm", "--eval", fmt.Sprintf(`%%{lua:if rpm.vercmp("%s","%s") >= 0 then error("not older") end}`, got[i-1], got[i]))
			case "archlinux":
				older = exec.Command("sh", "-c", `test "$(vercmp "$1" "$2")" = -1`, "sh", got[i-1], got[i])
				if _, err := exec.LookPath("vercmp"); err != nil {
					continue
				}
			}
			if _, err := exec.LookPath(older.Args[0]); err != nil {
				continue
			}
			if out, err := older.CombinedOutput(); err != nil || strings.Contains(string(out), "not older") {
				t.Errorf("%s: %s is not older than %s: %s", format, got[i-1], got[i], out)
			}
		}
	}
	if got := version("deb", "v1.2.3-0-gabcdef0-dirty"); got != "1.2.3+0.gabcdef0.dirty" {
		t.Errorf("a changed tree is %s", got)
	}
}

var builtDir string

// packages builds the packages, once.
func packages(t *testing.T) string {
	t.Helper()
	if os.Getenv("ESPMIRROR_PACKAGES") == "" {
		t.Skip("skipped: packages: ESPMIRROR_PACKAGES is not set (make packages-test)")
	}
	if builtDir == "" {
		builtDir = buildPackages(t, filepath.Join(installedDir, "packages"), "022")
	}
	return builtDir
}

func buildPackages(t *testing.T, dir, umask string) string {
	t.Helper()
	cmd := exec.Command("sh", "-c", "umask "+umask+"; make -s build && exec scripts/packages/build "+dir)
	cmd.Dir = "../.."
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("cannot build the packages: %v\n%s", err, out)
	}
	return dir
}

func one(t *testing.T, dir, pattern string) string {
	t.Helper()
	found, _ := filepath.Glob(filepath.Join(dir, pattern))
	if len(found) != 1 {
		t.Fatalf("%s: found %q", pattern, found)
	}
	return found[0]
}

func TestPackagesReproducible(t *testing.T) {
	first := packages(t)
	time.Sleep(1100 * time.Millisecond)
	second := buildPackages(t, t.TempDir(), "077")
	for _, pattern := range []string{"*.deb", "*.rpm", "*.pkg.tar.zst"} {
		a, err := os.ReadFile(one(t, first, pattern))
		if err != nil {
			t.Fatal(err)
		}
		b, err := os.ReadFile(one(t, second, pattern))
		if err != nil {
			t.Fatal(err)
		}
		if len(a) < 1<<20 || sha256.Sum256(a) != sha256.Sum256(b) {
			t.Errorf("%s differ: %d and %d bytes", pattern, len(a), len(b))
		}
	}
}

// TestPackageArch: the install script is shell, with a function for each occasion.
func TestPackageArch(t *testing.T) {
	dir := packages(t)
	pkg := one(t, dir, "*.pkg.tar.zst")
	script, err := exec.Command("tar", "--zstd", "-xOf", pkg, ".INSTALL").Output()
	if err != nil {
		t.Fatal(err)
	}
	out, err := exec.Command("bash", "-c", string(script)+"\ndeclare -F").CombinedOutput()
	if err != nil || string(out) != "declare -f post_install\ndeclare -f pre_remove\n" {
		t.Errorf("%v: %s", err, out)
	}
	list, err := exec.Command("tar", "--zstd", "-tf", pkg).Output()
	if err != nil {
		t.Fatal(err)
	}
	files := strings.Split(string(list), "\n")
	if !slices.Contains(files, "usr/bin/espmirror") || slices.Contains(files, "usr/sbin/") {
		t.Errorf("/usr/sbin is a link on Arch: %q", files)
	}
}

func TestPackageRPM(t *testing.T) {
	dir := packages(t)
	need(t, "rpm")
	out, err := exec.Command("rpm", "-qp", "--qf", "%{NAME} %{BUILDHOST} %{LICENSE}\n[%{FILENAMES}\n]", one(t, dir, "*.rpm")).Output()
	if err != nil || !strings.HasPrefix(string(out), "espmirror reproducible MIT\n") || !strings.Contains(string(out), "\n/usr/sbin/espmirror\n") || strings.Contains(string(out), "initramfs") {
		t.Errorf("%v: %s", err, out)
	}
}

// debianRoot is a root with a shell, dpkg and the tools that its maintainer scripts call; systemd seems to run there.
func debianRoot(t *testing.T) string {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("skipped: dpkg --root: it needs root")
	}
	root := t.TempDir()
	for _, dir := range []string{"bin", "usr/bin", "sys/firmware/efi", "run/systemd/system", "tmp", "var/lib/dpkg/info", "var/lib/dpkg/updates", "etc", "usr/lib/systemd/system"} {
		if err := os.MkdirAll(filepath.Join(root, dir), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	os.WriteFile(root+"/var/lib/dpkg/status", nil, 0o644)
	os.MkdirAll(root+"/dev", 0o755)
	if out, err := exec.Command("mknod", "-m", "666", root+"/dev/null", "c", "1", "3").CombinedOutput(); err != nil {
		t.Skipf("skipped: dpkg --root: cannot make /dev/null: %s", out)
	}
	libraries := map[string]bool{}
	for _, program := range []string{"dash", "dpkg", "dpkg-trigger", "dpkg-query", "dpkg-deb", "grep", "mkdir", "touch", "rm", "cat", "mv", "ls", "run-parts", "perl", "deb-systemd-helper", "systemctl"} {
		path := need(t, program)
		for _, to := range []string{path, "/usr/bin/" + program} {
			copyFile(t, path, root+to)
		}
		out, _ := exec.Command("ldd", path).Output()
		for _, word := range strings.Fields(string(out)) {
			if strings.HasPrefix(word, "/") {
				libraries[word] = true
			}
		}
	}
	for lib := range libraries {
		copyFile(t, lib, root+lib)
	}
	copyFile(t, need(t, "dash"), root+"/bin/sh")
	copyFile(t, need(t, "dash"), root+"/usr/bin/sh")
	// What systemd is asked for is written down. What systemctl does to files (deb-systemd-helper has it follow the presets)
	// it does itself.
	os.Rename(root+"/usr/bin/systemctl", root+"/usr/bin/real-systemctl")
	for _, name := range []string{"systemctl", "deb-systemd-invoke"} {
		text := "#!/bin/sh\ncase $1 in --root=*) exec real-systemctl \"$@\" ;; esac\necho \"${0##*/} $*\" >>/log\n"
		if err := writeFile(root+"/usr/bin/"+name, text, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	// perl's library: deb-systemd-helper is a perl script.
	inc, err := exec.Command("perl", "-e", `print join "\n", grep -d, @INC`).Output()
	if err != nil {
		t.Fatal(err)
	}
	for _, dir := range strings.Split(string(inc), "\n") {
		if strings.HasPrefix(dir, "/usr/lib") || strings.HasPrefix(dir, "/usr/share/perl") {
			if err := os.MkdirAll(root+filepath.Dir(dir), 0o755); err == nil && !isThere(root+dir) {
				exec.Command("cp", "-a", dir, root+filepath.Dir(dir)+"/").Run()
			}
		}
	}
	return root
}

func isThere(path string) bool {
	_, err := os.Lstat(path)
	return err == nil
}

func copyFile(t *testing.T, from, to string) {
	t.Helper()
	os.MkdirAll(filepath.Dir(to), 0o755)
	if out, err := exec.Command("cp", "-L", from, to).CombinedOutput(); err != nil {
		t.Fatalf("%s", out)
	}
}

// TestPackageDebian has dpkg install, trigger, upgrade, remove and purge the package in a root of its own.
func TestPackageDebian(t *testing.T) {
	dir := packages(t)
	deb := one(t, dir, "*.deb")
	need(t, "dpkg")
	root := debianRoot(t)
	read := func(name string) string {
		data, _ := os.ReadFile(root + name)
		return string(data)
	}
	pid := 0 // of the last dpkg
	dpkg := func(args ...string) string {
		t.Helper()
		cmd := exec.Command("dpkg", append([]string{"--root=" + root, "--force-depends", "--force-unsafe-io"}, args...)...)
		cmd.Env = append(os.Environ(), "PATH=/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL=C")
		out, err := cmd.CombinedOutput()
		if err != nil {
			t.Fatalf("dpkg %q: %v\n%s", args, err, out)
		}
		pid = cmd.Process.Pid
		return string(out)
	}
	enabled := func() (links []string) {
		found, _ := filepath.Glob(root + "/etc/systemd/system/*/*")
		for _, f := range found {
			links = append(links, filepath.Base(f))
		}
		slices.Sort(links)
		return links
	}
	want := []string{"espmirror-pending.path", "espmirror-recover.service", "espmirror-sync.service", "espmirror-verify.timer"}

	dpkg("-i", deb)
	if got := enabled(); !slices.Equal(got, want) {
		t.Errorf("enabled after the installation: %q", got)
	}
	if log := read("/log"); !strings.Contains(log, "start espmirror-pending.path espmirror-verify.timer") || strings.Contains(log, "sync.service") {
		t.Errorf("asked systemd for %q", log)
	}
	if isThere(root + "/run/espmirror/pending") {
		t.Error("the installation asked for a sync")
	}

	// A kernel: its hook activates our trigger, which dpkg processes at the end.
	kernel := t.TempDir()
	os.MkdirAll(kernel+"/DEBIAN", 0o755)
	os.WriteFile(kernel+"/DEBIAN/control", []byte("Package: linux-image-fake\nVersion: 1\nArchitecture: all\nMaintainer: nobody <nobody@espmirror.invalid>\nDescription: none\n"), 0o644)
	script := "#!/bin/sh\nset -e\nexport DEB_MAINT_PARAMS=\"'$1'\"\nrun-parts --exit-on-error --arg=6.1 /etc/kernel/%s\ntest ! -e /run/espmirror/pending || echo early >>/log\n"
	writeFile(kernel+"/DEBIAN/postinst", fmt.Sprintf(script, "postinst.d"), 0o755)
	writeFile(kernel+"/DEBIAN/postrm", fmt.Sprintf(script, "postrm.d"), 0o755)
	if out, err := exec.Command("dpkg-deb", "-b", kernel, kernel+".deb").CombinedOutput(); err != nil {
		t.Fatalf("%s", out)
	}
	for _, args := range [][]string{{"-i", kernel + ".deb"}, {"-r", "linux-image-fake"}} {
		os.RemoveAll(root + "/run/espmirror")
		out := dpkg(args...)
		if !isThere(root+"/run/espmirror/pending") || !strings.Contains(out, "Processing triggers for espmirror") || strings.Contains(read("/log"), "early") {
			t.Errorf("dpkg %q: asked for a sync: %v, log %q\n%s", args, isThere(root+"/run/espmirror/pending"), read("/log"), out)
		}
		if waits, _ := filepath.Glob(root + "/run/espmirror/wait.*"); len(waits) != 1 || read(strings.TrimPrefix(waits[0], root)) != fmt.Sprintf("pid %d\n", pid) {
			t.Errorf("dpkg %q was process %d, and the sync waits for %q", args, pid, waits)
		}
	}

	// The administrator's choices survive an upgrade.
	os.Remove(root + "/etc/systemd/system/timers.target.wants/espmirror-verify.timer")
	hook := root + "/etc/kernel/postinst.d/zzz-espmirror"
	os.WriteFile(hook, []byte("#!/bin/sh\n# mine\n"), 0o755)
	dpkg("-i", deb)
	if got := enabled(); slices.Contains(got, "espmirror-verify.timer") || len(got) != 3 {
		t.Errorf("enabled after the upgrade: %q", got)
	}
	if !strings.Contains(read("/etc/kernel/postinst.d/zzz-espmirror"), "# mine") {
		t.Error("the upgrade overwrote a changed hook")
	}

	// Removed, the hooks are still there, as configuration files, and do no harm.
	dpkg("-r", "espmirror")
	os.RemoveAll(root + "/run/espmirror")
	if isThere(root + "/usr/sbin/espmirror") {
		t.Error("the program is still there")
	}
	dpkg("-i", kernel+".deb")
	if isThere(root + "/run/espmirror/pending") {
		t.Error("asked for a sync after the package was removed")
	}
	dpkg("-P", "espmirror")
	var left []string
	filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if err == nil && strings.Contains(d.Name(), "espmirror") && !strings.HasPrefix(path, root+"/var/lib/dpkg/triggers") {
			left = append(left, strings.TrimPrefix(path, root))
		}
		return nil
	})
	if left != nil {
		t.Errorf("left after the purge: %q", left)
	}
}
