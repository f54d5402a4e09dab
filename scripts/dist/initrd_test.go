package dist

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// maxInitrd is what the program may add to an initramfs, in bytes: 6 MiB for all that is ours, less the scripts and the
// driver that go with it.
const maxInitrd = 6<<20 - 50<<10

// TestInitrdProgram builds the program as `make build` does for an initramfs.
func TestInitrdProgram(t *testing.T) {
	t.Parallel()
	if testing.Short() {
		t.Skip("skipped: -short")
	}
	dir := t.TempDir()
	program := filepath.Join(dir, "espmirror-initrd")
	if out, err := exec.Command("make", "-s", "-C", "../..", "build", "BIN="+filepath.Join(dir, "espmirror"), "INITRDBIN="+program).CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	info, err := os.Stat(program)
	if err != nil {
		t.Fatal(err)
	}
	if info.Size() > maxInitrd {
		t.Errorf("it has %d bytes, at most %d are wanted", info.Size(), maxInitrd)
	}
	archive := filepath.Join(dir, "boot.tar")
	if err := writeFile(archive, strings.Repeat("\x00", 1<<20), 0o644); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		args, want string
		status     int
	}{
		{"early --system-root=" + dir, "nothing to do", 0},
		{"extract --format=tar " + archive, "there is no command", 64},
		{"status --metrics", "metrics", 64},
		{"sync --primary " + archive + " --target " + archive, "cannot", 6},
	} {
		cmd := exec.Command(program, strings.Fields(c.args)...)
		out, _ := cmd.CombinedOutput()
		if status := cmd.ProcessState.ExitCode(); status != c.status || !strings.Contains(string(out), c.want) {
			t.Errorf("espmirror %s: exit status %d, %s", c.args, status, out)
		}
	}
}
