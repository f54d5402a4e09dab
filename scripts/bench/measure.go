package main

import (
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// usage is what a process took, with the children that it waited for.
type usage struct {
	wall   time.Duration
	maxRSS int64 // bytes, of the largest process
	io     bool  // the kernel counts what follows
	// read and written are the bytes of its calls, diskRead and diskWritten those that came from the disk and that are to go there.
	read, written, diskRead, diskWritten int64
}

// detach starts a program and leaves it to this process: its file of output, then the program.
const detach = `out=$1; shift; "$@" >"$out" 2>&1 & echo $!`

// measure runs a program and says what it took.
//
// The kernel takes the memory of the process that calls exec for that of the program, so that a child of ours would seem to
// need what we do. So a shell starts it, and ends; then it is our child. A process that has ended keeps its counts until it is
// waited for, and they include those of the children that it waited for itself.
func measure(log, name string, args ...string) (u usage, err error) {
	if err := unix.Prctl(unix.PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0); err != nil {
		return u, fmt.Errorf("cannot adopt processes: %w", err)
	}
	start := time.Now()
	out, err := exec.Command("sh", append([]string{"-c", detach, "sh", log, name}, args...)...).Output()
	if err != nil {
		return u, fmt.Errorf("cannot start %s: %w", name, err)
	}
	pid, err := strconv.Atoi(strings.TrimSpace(string(out)))
	if err != nil {
		return u, fmt.Errorf("cannot start %s: %w", name, err)
	}
	if err := retry(func() error { return unix.Waitid(unix.P_PID, pid, nil, unix.WEXITED|unix.WNOWAIT, nil) }); err != nil {
		return u, fmt.Errorf("cannot wait for %s: %w", name, err)
	}
	u.wall = time.Since(start)
	counts, ioErr := os.ReadFile(fmt.Sprintf("/proc/%d/io", pid))
	var status unix.WaitStatus
	var r unix.Rusage
	if err := retry(func() error { _, err := unix.Wait4(pid, &status, 0, &r); return err }); err != nil {
		return u, fmt.Errorf("cannot wait for %s: %w", name, err)
	}
	if !status.Exited() || status.ExitStatus() != 0 {
		said, _ := os.ReadFile(log)
		return u, fmt.Errorf("%s %s: exit status %d: %s", name, strings.Join(args, " "), status.ExitStatus(), bytes.TrimSpace(said))
	}
	u.maxRSS = r.Maxrss * kib
	if u.io = ioErr == nil; u.io {
		for _, f := range []struct {
			name string
			to   *int64
		}{{"rchar", &u.read}, {"wchar", &u.written}, {"read_bytes", &u.diskRead}, {"write_bytes", &u.diskWritten}} {
			m := regexp.MustCompile(`(?m)^` + f.name + `: (\d+)$`).FindSubmatch(counts)
			if m == nil {
				return u, fmt.Errorf("cannot parse /proc/PID/io: there is no %s", f.name)
			}
			if *f.to, err = strconv.ParseInt(string(m[1]), 10, 64); err != nil {
				return u, fmt.Errorf("cannot parse /proc/PID/io: %w", err)
			}
		}
	}
	return u, nil
}

func retry(f func() error) error {
	for {
		if err := f(); err != unix.EINTR {
			return err
		}
	}
}

// tracedRead is a line of strace -y: a call that read from a file, its path, and how many bytes.
var tracedRead = regexp.MustCompile(`(?m)^p?read(?:64|v|v2)?\(\d+<([^>]*)>.* = (\d+)$`)

// readFrom runs a program under strace and returns how many bytes it and its children read from a file or directory.
// Every thread gets a file of its own, as the lines of several would cut each other in two.
func readFrom(dir, path, name string, args ...string) (n int64, err error) {
	traces := filepath.Join(dir, "trace")
	if err := os.RemoveAll(traces); err != nil {
		return 0, err
	}
	if err := os.Mkdir(traces, 0o755); err != nil {
		return 0, err
	}
	defer os.RemoveAll(traces)
	args = append([]string{"-ff", "-qq", "-y", "-s", "0", "-e", "signal=none", "-e", "trace=read,pread64,readv,preadv,preadv2",
		"-o", filepath.Join(traces, "t"), name}, args...)
	if err := tool("strace", args...); err != nil {
		return 0, err
	}
	if path, err = filepath.Abs(path); err != nil {
		return 0, err
	}
	if path, err = filepath.EvalSymlinks(path); err != nil {
		return 0, err
	}
	files, err := os.ReadDir(traces)
	if err != nil {
		return 0, err
	}
	for _, f := range files {
		b, err := os.ReadFile(filepath.Join(traces, f.Name()))
		if err != nil {
			return 0, err
		}
		for _, m := range tracedRead.FindAllSubmatch(b, -1) {
			if p := string(m[1]); p == path || strings.HasPrefix(p, path+"/") {
				k, err := strconv.ParseInt(string(m[2]), 10, 64)
				if err != nil {
					return 0, err
				}
				n += k
			}
		}
	}
	return n, nil
}
