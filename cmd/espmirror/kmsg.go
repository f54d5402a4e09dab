package main

import (
	"fmt"
	"io"
	"log/slog"
	"os"
	"strings"
	"unicode/utf8"

	"golang.org/x/sys/unix"

	"espmirror/blockdev"
)

// maxKmsg bounds a line for /dev/kmsg, the priority included. The kernel refuses records of about 1000 bytes and more
// (PRINTKRB_RECORD_MAX and what it puts in front).
const maxKmsg = 900

// levelNotice is for what somebody who looks should see without asking for it, and nobody has to act on.
const levelNotice = slog.LevelInfo + 2

// openKmsg opens the kernel's log for writing. What it cannot take goes to other.
func openKmsg(sys blockdev.System, other io.Writer) (*kmsg, error) {
	// Without O_NONBLOCK, a FIFO that somebody has put there would keep us.
	f, err := os.OpenFile(sys.Path("/dev/kmsg"), os.O_WRONLY|os.O_APPEND|unix.O_NONBLOCK|unix.O_NOCTTY, 0)
	if err != nil {
		return nil, err
	}
	return &kmsg{f, other}, nil
}

// kmsg is the kernel's log: what is written there is in dmesg and in the journal, also when no console, no journal and no
// filesystem is there yet. Each write is one record.
type kmsg struct {
	f     io.WriteCloser
	other io.Writer
}

// Close implements io.Closer.
func (k *kmsg) Close() error { return k.f.Close() }

func (k *kmsg) Write(line []byte) (int, error) {
	if _, err := k.f.Write(line); err != nil {
		_, text, _ := strings.Cut(string(line), ">")
		return io.WriteString(k.other, text)
	}
	return len(line), nil
}

// kmsgLine puts the priority in front of a line that is safe already, and cuts one that is too long. The end of the line
// keeps the kernel from joining it with another one.
// Documentation/ABI/testing/dev-kmsg: "<N>" with the level of syslog; the facility is the kernel's choice.
func kmsgLine(level slog.Level, line string) string {
	n := 7
	switch {
	case level >= slog.LevelError:
		n = 3
	case level >= slog.LevelWarn:
		n = 4
	case level >= levelNotice:
		n = 5
	case level >= slog.LevelInfo:
		n = 6
	}
	return clip(fmt.Sprintf("<%d>%s", n, line), maxKmsg-1) + "\n"
}

// clip cuts a text to at most n bytes, and shows that it did.
func clip(s string, n int) string {
	const mark = "…"
	if len(s) <= n {
		return s
	}
	cut := n - len(mark)
	for cut > 0 && !utf8.RuneStart(s[cut]) {
		cut--
	}
	return s[:cut] + mark
}
