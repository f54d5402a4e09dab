package main

import (
	"bytes"
	"log/slog"
	"testing"
)

func TestSafe(t *testing.T) {
	for in, want := range map[string]string{
		"plain name":          "plain name",
		"Ünïcode 😀":           "Ünïcode 😀",
		"red\x1b[31m":         `red\x1b[31m`,
		"bell\a\r\n\t":        `bell\a\r\n\t`,
		"c1 \u009b31m":        `c1 \u009b31m`,
		"bidi \u202etxt":      `bidi \u202etxt`,
		"broken \xff\xed\xa0": `broken \xff\xed\xa0`,
		"real \ufffd":         "real \ufffd",
		"zero\x00":            `zero\x00`,
	} {
		if got := safe(in); got != want {
			t.Errorf("safe(%q) = %q, want %q", in, got, want)
		}
	}
}

func FuzzSafe(f *testing.F) {
	f.Add("x\x1b]0;title\a")
	f.Fuzz(func(t *testing.T, s string) {
		if got := safe(s); !isSafe(got) {
			t.Errorf("safe(%q) = %q", s, got)
		}
	})
}

func TestSizes(t *testing.T) {
	for in, want := range map[int64]string{0: "0B", 1: "1B", 1023: "1023B", 1024: "1K", 1536: "1.5K", 10240: "10K", 1<<20 - 1: "1M",
		96 << 20: "96M", 1 << 40: "1T", 5 << 50: "5120T"} {
		if got := sizeText(in); got != want {
			t.Errorf("sizeText(%d) = %s, want %s", in, got, want)
		}
	}
}

func TestTable(t *testing.T) {
	var out bytes.Buffer
	tab := newTable("NAME", "SIZE", "STATE")
	tab.row(cell{text: "é\x1b"}, cell{text: "1K", right: true}, cell{text: "ok", tint: green})
	tab.row(cell{text: "longer name"}, cell{text: "1023B", right: true}, cell{})
	tab.print(&output{Writer: &out, legend: true, color: true})
	want := "NAME          SIZE  STATE\n" +
		"é\\x1b           1K  \x1b[32mok\x1b[0m\n" +
		"longer name  1023B  -\n"
	if out.String() != want {
		t.Errorf("got\n%q\nwant\n%q", out.String(), want)
	}
}

func TestNarrowTable(t *testing.T) {
	for width, want := range map[int]string{
		0:  "NAME  GUID    LABEL  STATE\na     123456  b      ok\n",
		26: "NAME  GUID    LABEL  STATE\na     123456  b      ok\n",
		25: "NAME  LABEL  STATE\na     b      ok\n",
		17: "NAME  STATE\na     ok\n",
		3:  "NAME  STATE\na     ok\n",
	} {
		var out bytes.Buffer
		tab := newTable("NAME", "GUID", "LABEL", "STATE")
		tab.spare = []string{"GUID", "LABEL"}
		tab.row(cell{text: "a"}, cell{text: "123456"}, cell{text: "b"}, cell{text: "ok"})
		tab.print(&output{Writer: &out, legend: true, width: width})
		if out.String() != want {
			t.Errorf("%d columns: got\n%swant\n%s", width, out.String(), want)
		}
	}
}

func TestLog(t *testing.T) {
	var out bytes.Buffer
	log := newLogger(&out, slog.LevelInfo)
	log.Debug("unseen")
	log.Info("using a\x1bname", "dir", "/efi\n")
	log.With("target", "b.img").WithGroup("g").Warn("careful", "n", 3, "reason", "")
	log.Info("all empty", "reason", "")
	want := "espmirror: using a\\x1bname (dir=/efi\\n)\nespmirror: warning: careful (target=b.img g.n=3)\nespmirror: all empty\n"
	if out.String() != want {
		t.Errorf("got %q, want %q", out.String(), want)
	}
	for in, want := range map[string]slog.Level{"debug": slog.LevelDebug, "7": slog.LevelDebug, "warning": slog.LevelWarn, "console:err,info": slog.LevelInfo} {
		if got, ok := systemdLevel(in); !ok || got != want {
			t.Errorf("systemdLevel(%q) = %v, %v", in, got, ok)
		}
	}
	if _, ok := systemdLevel("loud"); ok {
		t.Error("loud is a level")
	}
}

func TestQuoted(t *testing.T) {
	for in, want := range map[string]string{"/dev/sda1": "/dev/sda1", "disk.img@@p1": "disk.img@@p1", "it's": `'it'\''s'`, "a b": "'a b'", "$x": "'$x'", "": "''"} {
		if got := quoted(in); got != want {
			t.Errorf("%q: %s, want %s", in, got, want)
		}
	}
}
