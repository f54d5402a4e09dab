package archive

import (
	"archive/tar"
	"bytes"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"os/exec"
	"path"
	"slices"
	"strings"
	"testing"
	"testing/fstest"
	"time"

	"espmirror/replicate"
)

// bootFS is a tree as a volume may have it.
func bootFS() fstest.MapFS {
	f := func(data string, at time.Time) *fstest.MapFile {
		return &fstest.MapFile{Data: []byte(data), Mode: 0o600, ModTime: at}
	}
	d := func(at time.Time) *fstest.MapFile { return &fstest.MapFile{Mode: fs.ModeDir | 0o700, ModTime: at} }
	return fstest.MapFS{
		"EFI": d(day), "EFI/BOOT": d(day), "EFI/BOOT-x": f("sorts between a directory and what is in it", day), "EFI/BOOT/BOOTX64.EFI": f(strings.Repeat("p", 1000), day),
		"EFI/Ünïcode": f("u", day.Add(time.Hour)), "loader": d(time.Time{}), "loader/random-seed": f("seed", day), "loader/empty": f("", time.Time{}),
		"EFI/espmirror": d(day), "EFI/espmirror/state": f("state", day),
		"loader/late": f("2107", time.Date(2107, 12, 31, 23, 59, 58, 0, time.UTC)), "EFI/" + strings.Repeat("long", 60): f("long", day),
	}
}

func all(string) bool { return false }

func list(t testing.TB, fsys fs.FS, paths ...string) []Member {
	t.Helper()
	ms, err := Members(fsys, paths, all)
	if err != nil {
		t.Fatal(err)
	}
	return ms
}

var writers = map[string]func(io.Writer, fs.FS, []Member, time.Time) error{
	"tar":  func(w io.Writer, f fs.FS, ms []Member, at time.Time) error { return WriteTar(ctx, w, f, ms, at) },
	"cpio": func(w io.Writer, f fs.FS, ms []Member, at time.Time) error { return WriteCPIO(ctx, w, f, ms, at) },
}

// TestWriteRead reads back what was written, here and with other programs.
func TestWriteRead(t *testing.T) {
	fsys := bootFS()
	tree := map[string]string{}
	for p, f := range fsys {
		tree[p] = string(f.Data)
		if f.Mode.IsDir() {
			tree[p] = "dir"
		}
	}
	for format, write := range writers {
		var buf bytes.Buffer
		if err := write(&buf, fsys, list(t, fsys, "."), time.Time{}); err != nil {
			t.Fatal(err)
		}
		got, err := openBoth(t, buf.Bytes(), Limits{})
		if err != nil {
			t.Fatal(err)
		}
		want(t, got, tree)
		if buf.Len()%512 != 0 {
			t.Errorf("%s: %d bytes", format, buf.Len())
		}
		for tool, script := range map[string]string{"tar": "tar --warning=no-timestamp -xf -", "cpio": "cpio -idm --quiet", "busybox": "busybox " + map[string]string{"tar": "tar -xf -", "cpio": "cpio -idm 2>/dev/null"}[format]} {
			if tool != format && tool != "busybox" {
				continue
			}
			if _, err := exec.LookPath(tool); err != nil {
				t.Log(tool, "is not installed, and has not read it")
				continue
			}
			cmd := exec.Command("sh", "-c", script)
			cmd.Dir, cmd.Stdin = t.TempDir(), bytes.NewReader(buf.Bytes())
			if out, err := cmd.CombinedOutput(); err != nil || len(out) > 0 {
				t.Errorf("%s: %v: %s", script, err, out)
			}
			src, err := replicate.OpenDirSource(cmd.Dir)
			if err != nil {
				t.Fatal(err)
			}
			want(t, dump(t, src), tree)
			src.Close()
			info, err := os.Stat(path.Join(cmd.Dir, "EFI/BOOT/BOOTX64.EFI"))
			if err != nil || !info.ModTime().Equal(day) || info.Mode() != 0o644 {
				t.Errorf("%s: %v %v", script, info, err)
			}
		}
	}
}

// TestSameBytes is about the bytes themselves: they are those of this table on every machine and with every version.
func TestSameBytes(t *testing.T) {
	epoch := time.Date(2024, 1, 1, 0, 0, 0, 0, time.UTC)
	sums := map[string]string{
		"tar":       "e99b28188d41a9e4",
		"tar 2024":  "869a119284a003d0",
		"cpio":      "149264eaf3fd3a69",
		"cpio 2024": "54f00c0b7c7f0d95",
	}
	for name, sum := range sums {
		format, bounded, _ := strings.Cut(name, " ")
		var latest time.Time
		if bounded != "" {
			latest = epoch
		}
		for _, zone := range []*time.Location{time.UTC, time.FixedZone("x", 3600)} {
			local := time.Local
			time.Local = zone
			var buf bytes.Buffer
			// The paths overlap, and their order is another one.
			fsys := bootFS()
			ms := list(t, fsys, "loader/late", "EFI", "loader", "EFI/BOOT", "loader")
			if err := writers[format](&buf, fsys, ms, latest); err != nil {
				t.Fatal(err)
			}
			time.Local = local
			if got := fmt.Sprintf("%x", sha256.Sum256(buf.Bytes()))[:16]; got != sum {
				t.Errorf("%q: %q", name, got)
			}
		}
	}
}

// TestWrittenHeaders checks each field that the bytes come from.
func TestWrittenHeaders(t *testing.T) {
	fsys := bootFS()
	ms := list(t, fsys, ".")
	epoch := day.Add(30 * time.Minute)
	for _, latest := range []time.Time{{}, epoch} {
		date := func(at time.Time) int64 {
			switch {
			case at.IsZero() && latest.IsZero():
				return 0
			case at.IsZero(), !latest.IsZero() && at.After(latest):
				return latest.Unix()
			}
			return at.Unix()
		}
		var buf bytes.Buffer
		if err := WriteTar(ctx, &buf, fsys, ms, latest); err != nil {
			t.Fatal(err)
		}
		r := tar.NewReader(&buf)
		var names []string
		for {
			h, err := r.Next()
			if err == io.EOF {
				break
			}
			if err != nil {
				t.Fatal(err)
			}
			p := strings.TrimSuffix(h.Name, "/")
			names = append(names, p)
			f := fsys[p]
			mode, typ := int64(0o644), byte(tar.TypeReg)
			if f.Mode.IsDir() {
				mode, typ = 0o755, tar.TypeDir
			}
			if h.Uid != 0 || h.Gid != 0 || h.Uname != "" || h.Gname != "" || h.Mode != mode || h.Typeflag != typ || h.ModTime.Unix() != date(f.ModTime) {
				t.Errorf("%s: %+v", p, h)
			}
			// 2107 needs no pax: 11 octal digits reach to 2242.
			if needs := len(p) > 200 || strings.Contains(p, "Ü"); (h.Format == tar.FormatPAX) != needs {
				t.Errorf("%s: %v", p, h.Format)
			}
		}
		if !slices.IsSorted(names) || len(names) != len(fsys) {
			t.Errorf("%d of %d: %q", len(names), len(fsys), names)
		}

		buf.Reset()
		if err := WriteCPIO(ctx, &buf, fsys, ms, latest); err != nil {
			t.Fatal(err)
		}
		b := buf.Bytes()
		for i := 0; ; i++ {
			h, why := parseCPIO(b[:newcSize])
			if why != "" {
				t.Fatal(i, why)
			}
			name := string(b[newcSize : newcSize+h.nameSize-1])
			if name == cpioTrailer {
				break
			}
			f := fsys[name]
			mode, nlink := uint64(cpioFile|0o644), uint64(1)
			if f.Mode.IsDir() {
				mode, nlink = cpioDir|0o755, 2
			}
			if name != ms[i].Path || h.ino != uint64(i+1) || h.dev != 0 || h.mode != mode || h.nlink != nlink || h.mtime != min(date(f.ModTime), 1<<32-1) || string(b[22:38]) != strings.Repeat("0", 16) {
				t.Errorf("%s: %+v", name, h)
			}
			b = b[(newcSize+h.nameSize+3)&^3+(h.size+3)&^3:]
		}
	}
}

func TestMembers(t *testing.T) {
	fsys := bootFS()
	paths := func(ms []Member, err error) string {
		if err != nil {
			return "error: " + err.Error()
		}
		var ps []string
		for _, m := range ms {
			ps = append(ps, m.Path)
		}
		return strings.Join(ps, " ")
	}
	for _, c := range []struct {
		paths []string
		skip  func(string) bool
		want  string
	}{
		{[]string{"loader"}, OwnFiles, "loader loader/empty loader/late"},
		{[]string{"EFI/BOOT/BOOTX64.EFI", "loader/empty"}, OwnFiles, "EFI EFI/BOOT EFI/BOOT/BOOTX64.EFI loader loader/empty"},
		{[]string{"EFI/espmirror"}, OwnFiles, "EFI"},
		{[]string{"EFI/espmirror"}, all, "EFI EFI/espmirror EFI/espmirror/state"},
		{[]string{"nothing"}, all, "error: cannot read /nothing: file does not exist"},
		{[]string{"no/thing"}, all, "error: cannot read /no: file does not exist"},
	} {
		if got := paths(Members(fsys, c.paths, c.skip)); got != c.want {
			t.Errorf("%v: %s\nwant %s", c.paths, got, c.want)
		}
	}
	for p, own := range map[string]bool{"loader/random-seed": true, "LOADER/Random-Seed": true, "EFI/ESPMIRROR": true, "efi/espmirror/journal": true,
		"loader/random-seed2": false, "EFI/espmirror2/x": false, "random-seed": false, "loader": false, "EFI": false} {
		if OwnFiles(p) != own {
			t.Errorf("%s: %v", p, !own)
		}
	}
}

// oddFS is a tree with names that no path can have.
type oddFS struct {
	fstest.MapFS
	name string
}

type oddEntry struct {
	fs.DirEntry
	name string
}

func (e oddEntry) Name() string { return e.name }

func (f oddFS) ReadDir(p string) ([]fs.DirEntry, error) {
	es, err := f.MapFS.ReadDir(p)
	for i := range es {
		es[i] = oddEntry{es[i], f.name}
	}
	return es, err
}

func TestWriteFails(t *testing.T) {
	for _, name := range []string{"..", ".", "", "a/b", `a\b`, "a\x00"} {
		f := fstest.MapFS{"x": {Data: []byte("x")}}
		if name == `a\b` || name == "a\x00" {
			f[name] = &fstest.MapFile{}
		}
		ms, err := Members(oddFS{f, name}, []string{"."}, all)
		if err == nil {
			t.Errorf("%q: %v", name, ms)
		}
	}
	fsys := fstest.MapFS{"a": {Data: []byte("data")}, cpioTrailer: {Data: []byte("x")}}
	ms := list(t, fsys, ".")
	if err := WriteCPIO(ctx, io.Discard, fsys, ms, time.Time{}); err == nil || !strings.Contains(err.Error(), "ends with that name") {
		t.Error(err)
	}
	if err := WriteTar(ctx, io.Discard, fsys, ms, time.Time{}); err != nil {
		t.Error(err)
	}
	for format, write := range writers {
		ms := list(t, fsys, "a")
		ms[0].Size = 5 // as if it had become shorter
		var buf bytes.Buffer
		err := write(&buf, fsys, ms, time.Time{})
		if !errors.Is(err, io.ErrUnexpectedEOF) || !strings.Contains(err.Error(), "cannot read /a: 4 bytes of 5") {
			t.Errorf("%s: %v", format, err)
		}
		if src, err := Open(ctx, "x", &buf, Limits{}); err == nil {
			t.Errorf("%s: half an archive is taken for whole", format)
			src.Close()
		}
		ms[0].Size = 3 // longer: the archive has what was listed
		buf.Reset()
		if err := write(&buf, fsys, ms, time.Time{}); err != nil {
			t.Error(err)
		}
		src, err := Open(ctx, "x", &buf, Limits{})
		if err != nil {
			t.Fatal(err)
		}
		if got := dump(t, src); !maps.Equal(got, map[string]string{"a": "dat"}) {
			t.Error(got)
		}
		src.Close()
	}
	big := []Member{{Path: "a", Size: 1 << 32}}
	if err := WriteCPIO(ctx, io.Discard, fsys, big, time.Time{}); err == nil || !strings.Contains(err.Error(), "4294967296 bytes") {
		t.Error(err)
	}
}
