package archive

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/klauspost/compress/zstd"

	"espmirror/fatdriver"
	"espmirror/fixtures"
	"espmirror/replicate"
)

func TestMain(m *testing.M) { os.Exit(fixtures.Main(m)) }

var ctx = context.Background()

// day is the date of what the tests make.
var day = time.Date(2024, 2, 29, 12, 34, 56, 0, time.UTC)

// tarOf makes a tar archive. The Uname of a header is the content of the file.
func tarOf(t testing.TB, hs ...tar.Header) []byte {
	t.Helper()
	var buf bytes.Buffer
	w := tar.NewWriter(&buf)
	for _, h := range hs {
		// The content of a file comes in Uname, which no test needs for itself.
		data := h.Uname
		h.Uname = ""
		if h.Size == 0 {
			h.Size = int64(len(data))
		}
		if h.ModTime.IsZero() {
			h.ModTime = day
		}
		if h.Mode == 0 {
			h.Mode = 0o644
		}
		if err := w.WriteHeader(&h); err != nil {
			t.Fatal(h.Name, err)
		}
		if _, err := io.WriteString(w, data); err != nil {
			t.Fatal(h.Name, err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return buf.Bytes()
}

func file(name, data string) tar.Header {
	return tar.Header{Typeflag: tar.TypeReg, Name: name, Uname: data}
}

func dir(name string) tar.Header { return tar.Header{Typeflag: tar.TypeDir, Name: name, Mode: 0o755} }

func hardLink(name, target string) tar.Header {
	return tar.Header{Typeflag: tar.TypeLink, Name: name, Linkname: target}
}

// newc is a cpio member as the tests make it.
type newc struct {
	magic            string // 070701 when empty
	ino, mode, nlink int
	name, data       string
	check            int
}

func cpioOf(ms ...newc) []byte {
	var buf bytes.Buffer
	for _, m := range append(ms, newc{name: cpioTrailer, nlink: 1}) {
		if m.magic == "" {
			m.magic = "070701"
		}
		if m.nlink == 0 {
			m.nlink = 1
		}
		fmt.Fprintf(&buf, "%s%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%s\x00",
			m.magic, m.ino, m.mode, 0, 0, m.nlink, day.Unix(), len(m.data), 8, 1, 0, 0, len(m.name)+1, m.check, m.name)
		buf.Write(make([]byte, -buf.Len()&3))
		buf.WriteString(m.data)
		buf.Write(make([]byte, -buf.Len()&3))
	}
	buf.Write(make([]byte, -buf.Len()&511))
	return buf.Bytes()
}

func cpioFileOf(ino, nlink int, name, data string) newc {
	return newc{ino: ino, nlink: nlink, mode: cpioFile | 0o644, name: name, data: data}
}

func zst(t testing.TB, data []byte) []byte {
	t.Helper()
	w, err := zstd.NewWriter(nil, zstd.WithEncoderCRC(true))
	if err != nil {
		t.Fatal(err)
	}
	return w.EncodeAll(data, nil)
}

// dump writes down a tree: "dir", the content of a file, or "error: …".
func dump(t testing.TB, src replicate.Source) map[string]string {
	t.Helper()
	out := map[string]string{}
	var walk func(it *replicate.Item)
	walk = func(it *replicate.Item) {
		switch {
		case it.Err != nil:
			out[it.Path] = "error: " + it.Err.Error()
		case it.Dir:
			out[it.Path] = "dir"
		default:
			data, err := readAll(src, it)
			if err != nil {
				t.Fatalf("%s: %v", it.Path, err)
			}
			if int64(len(data)) != it.Size {
				t.Fatalf("%s: %d bytes, and the size is %d", it.Path, len(data), it.Size)
			}
			out[it.Path] = string(data)
		}
		for _, c := range it.Children {
			walk(c)
		}
	}
	walk(src.Root())
	delete(out, "")
	return out
}

func readAll(src replicate.Source, it *replicate.Item) ([]byte, error) {
	r, err := src.Open(it)
	if err != nil {
		return nil, err
	}
	defer r.Close()
	return io.ReadAll(r)
}

// openBoth opens an archive as a file and through a pipe, sees that both give the same tree and that nothing is left
// behind, and returns it. The error is that of the file.
func openBoth(t testing.TB, data []byte, l Limits) (map[string]string, error) {
	t.Helper()
	tmp := t.TempDir()
	t.Setenv("TMPDIR", tmp)
	name := filepath.Join(t.TempDir(), "x")
	if err := os.WriteFile(name, data, 0o644); err != nil {
		t.Fatal(err)
	}
	open := openFiles(t)
	var trees [2]map[string]string
	var errs [2]error
	for i := range 2 {
		var src replicate.Source
		if i == 0 {
			src, errs[i] = OpenFile(ctx, name, l)
		} else {
			src, errs[i] = Open(ctx, name, struct{ io.Reader }{bytes.NewReader(data)}, l)
		}
		if errs[i] == nil {
			trees[i] = dump(t, src)
			src.Close()
		} else if !errors.Is(errs[i], replicate.ErrSource) {
			t.Errorf("%v is no ErrSource", errs[i])
		}
		if left, _ := os.ReadDir(tmp); len(left) > 0 {
			t.Errorf("left in TMPDIR: %v", left)
		}
	}
	if n := openFiles(t); n != open {
		t.Errorf("%d files are open, before it were %d", n, open)
	}
	if fmt.Sprint(errs[0]) != fmt.Sprint(errs[1]) || !maps.Equal(trees[0], trees[1]) {
		t.Errorf("as a file: %v %q, through a pipe: %v %q", errs[0], trees[0], errs[1], trees[1])
	}
	return trees[0], errs[0]
}

func openFiles(t testing.TB) int {
	t.Helper()
	fds, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	return len(fds)
}

// want compares trees; an "error: " that is wanted may be a part of the one that is there.
func want(t testing.TB, got, want map[string]string) {
	t.Helper()
	for p, w := range want {
		g, ok := got[p]
		part, isErr := strings.CutPrefix(w, "error: ")
		switch {
		case !ok:
			t.Errorf("%q is missing", p)
		case isErr && !(strings.HasPrefix(g, "error: cannot replicate "+p) && strings.Contains(g, part)):
			t.Errorf("%q is %q, want an error with %q", p, g, part)
		case !isErr && g != w:
			t.Errorf("%q is %.60q, want %.60q", p, g, w)
		}
	}
	for p := range got {
		if _, ok := want[p]; !ok {
			t.Errorf("%q is there: %.60q", p, got[p])
		}
	}
}

// TestRules has a case for each rule of the package comment. The same members are put into a tar and a cpio archive
// wherever cpio can have them.
func TestRules(t *testing.T) {
	long := strings.Repeat("long name ", 25) + "12345"
	deep := strings.Repeat("d/", 251) + "f"
	deepest := strings.TrimSuffix(strings.Repeat("d/", 251), "/")
	deepTree := map[string]string{}
	for i := range 250 {
		deepTree[strings.TrimSuffix(strings.Repeat("d/", i+1), "/")] = "dir"
	}
	deepTree[deepest] = "error: nest deeper than 250 levels"
	for _, c := range []struct {
		name    string
		members []tar.Header
		want    map[string]string
	}{
		{"leading parts", []tar.Header{dir("./"), file("./a", "1"), file("/b/c", "2"), file(".//d/./e", "3")},
			map[string]string{"a": "1", "b": "dir", "b/c": "2", "d": "dir", "d/e": "3"}},
		{"missing parents", []tar.Header{file("EFI/BOOT/x.efi", "x")},
			map[string]string{"EFI": "dir", "EFI/BOOT": "dir", "EFI/BOOT/x.efi": "x"}},
		{"later replaces earlier", []tar.Header{file("a", "old and long"), file("b", "b"), file("./a", "new")},
			map[string]string{"a": "new", "b": "b"}},
		{"directory twice", []tar.Header{dir("d/"), file("d/f", "f"), dir("d"), file("d/g", "g")},
			map[string]string{"d": "dir", "d/f": "f", "d/g": "g"}},
		{"file, then directory", []tar.Header{file("d", "f"), dir("d/"), file("d/f", "f"), file("e", "e")},
			map[string]string{"d": "error: makes it a directory", "d/f": "error: ", "e": "e"}},
		{"directory, then file", []tar.Header{dir("d"), file("d/f", "f"), file("d", "f")},
			map[string]string{"d": "error: makes it a directory", "d/f": "error: "}},
		{"directory, file, directory", []tar.Header{dir("d"), file("d", "f"), dir("d/")},
			map[string]string{"d": "error: makes it a directory"}},
		{"file as a parent", []tar.Header{file("d", "f"), file("d/f", "f")},
			map[string]string{"d": "error: makes it a directory", "d/f": "error: "}},
		{"special files", []tar.Header{
			{Typeflag: tar.TypeSymlink, Name: "l", Linkname: "/etc/passwd"}, {Typeflag: tar.TypeFifo, Name: "p"},
			{Typeflag: tar.TypeChar, Name: "c"}, {Typeflag: tar.TypeBlock, Name: "b"}, file("f", "f")},
			map[string]string{"l": "error: it is a symbolic link", "p": "error: it is a named pipe", "c": "error: it is a device",
				"b": "error: it is a device", "f": "f"}},
		{"symbolic link that is replaced", []tar.Header{{Typeflag: tar.TypeSymlink, Name: "l", Linkname: "x"}, file("l", "f")},
			map[string]string{"l": "f"}},
		{"below a symbolic link", []tar.Header{{Typeflag: tar.TypeSymlink, Name: "l", Linkname: "x"}, file("l/f", "f")},
			map[string]string{"l": "error: makes it a directory", "l/f": "error: "}},
		{"names", []tar.Header{file("a:b", "1"), file("a.", "2"), file("a ", "3"), file("a\xff", "4"), file(`a\b`, "5"), file("a\x01", "6"),
			file("Ünïcode 😀", "7"), file(long, "8"), file(long+"6", "9")},
			map[string]string{"a:b": "error: ':'", "a.": "error: ends with a dot", "a ": "error: ends with a dot or a space", "a\xff": "error: is not UTF-8",
				`a\b`: `error: '\\'`, "a\x01": `error: '\x01'`, "Ünïcode 😀": "7", long: "8", long + "6": "error: 256 UTF-16 units"}},
		{"below a directory with an error", []tar.Header{file("a:b/c/d", "1"), file("e", "e")},
			map[string]string{"a:b": "error: ':'", "a:b/c": "dir", "a:b/c/d": "1", "e": "e"}},
		{"case", []tar.Header{file("EFI/Linux.efi", "1"), file("EFI/LINUX.EFI", "2"), file("EFI/other", "3")},
			map[string]string{"EFI": "dir", "EFI/Linux.efi": "error: for that of EFI/LINUX.EFI", "EFI/LINUX.EFI": "error: for that of EFI/Linux.efi", "EFI/other": "3"}},
		{"case of directories", []tar.Header{file("EFI/BOOT/a", "1"), file("Efi/Linux/b", "2"), file("efi", "3")},
			map[string]string{"EFI": "error: for that of Efi", "Efi": "error: for that of efi", "efi": "error: for that of EFI",
				"EFI/BOOT": "error: ", "EFI/BOOT/a": "error: ", "Efi/Linux": "error: ", "Efi/Linux/b": "error: "}},
		{"deep", []tar.Header{file(deep, "f")}, deepTree},
		{"empty", nil, map[string]string{}},
		{"empty file", []tar.Header{file("f", ""), dir("d")}, map[string]string{"f": "", "d": "dir"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			// The error of a directory is that of what is below, whose message names the directory.
			inherit := func(got map[string]string) map[string]string {
				for p, g := range got {
					for at := filepath.Dir(p); at != "."; at = filepath.Dir(at) {
						if e := got[at]; strings.HasPrefix(e, "error: ") {
							if !strings.HasPrefix(g, "error: ") {
								t.Errorf("%q is %q, below a directory with an error", p, g)
							}
							if w, ok := c.want[p]; ok && !strings.HasPrefix(w, "error: ") {
								got[p] = w
							} else {
								got[p] = "error: cannot replicate " + p
							}
							break
						}
					}
				}
				return got
			}
			if c.name != "empty" {
				got, err := openBoth(t, tarOf(t, c.members...), Limits{})
				if err != nil {
					t.Fatal(err)
				}
				want(t, inherit(got), c.want)
			}
			var ms []newc
			for i, h := range c.members {
				m := newc{ino: i, name: h.Name, data: h.Uname, mode: map[byte]int{tar.TypeReg: cpioFile | 0o644, tar.TypeDir: cpioDir | 0o755,
					tar.TypeSymlink: cpioSymlink, tar.TypeFifo: cpioFIFO, tar.TypeChar: cpioChar, tar.TypeBlock: cpioBlock}[h.Typeflag]}
				if h.Typeflag == tar.TypeSymlink {
					m.data = h.Linkname
				}
				ms = append(ms, m)
			}
			got, err := openBoth(t, cpioOf(ms...), Limits{})
			if err != nil {
				t.Fatal(err)
			}
			want(t, inherit(got), c.want)
		})
	}
}

// TestCaseIsFound selects below the second of two directories whose names FAT takes for one: it must be refused, and
// not be taken for missing, which would delete it on the targets.
func TestCaseIsFound(t *testing.T) {
	for _, ms := range [][]tar.Header{
		{file("EFI/readme", "1"), file("efi/Linux/b.efi", "2")},
		{file("efi/readme", "1"), file("EFI/Linux/b.efi", "2")},
		{file("EFI", "a file"), file("efi/Linux/b.efi", "2")},
		{file("EFI/LINUX/c", "1"), file("efi/linux/d/e", "3"), file("Efi/Linux/b.efi", "2")},
	} {
		src, err := Open(ctx, "x", bytes.NewReader(tarOf(t, ms...)), Limits{})
		if err != nil {
			t.Fatal(err)
		}
		at := src.Root()
		for _, part := range []string{"EFI", "LINUX", "B.EFI"} {
			i := slices.IndexFunc(at.Children, func(c *replicate.Item) bool { return fatdriver.Fold(c.Name) == part })
			if i < 0 {
				t.Fatalf("%v: no %s in %q", ms, part, at.Path)
			}
			if at = at.Children[i]; at.Err == nil {
				t.Errorf("%v: %q has no error", ms, at.Path)
			}
		}
		src.Close()
	}
}

func TestHardLinks(t *testing.T) {
	got, err := openBoth(t, tarOf(t, file("a", "one"), hardLink("d/b", "./a"), hardLink("c", "d/b"), file("a", "two"), hardLink("e", "a"),
		hardLink("f", "later"), file("later", "x"), hardLink("g", "d"), tar.Header{Typeflag: tar.TypeSymlink, Name: "s", Linkname: "a"}, hardLink("h", "s")), Limits{})
	if err != nil {
		t.Fatal(err)
	}
	want(t, got, map[string]string{"a": "two", "d": "dir", "d/b": "one", "c": "one", "e": "two", "later": "x",
		"f": "error: hard link to later, which does not stand before it", "g": "error: which is a directory",
		"s": "error: a symbolic link", "h": "error: it is a hard link: cannot replicate s: it is a symbolic link"})

	got, err = openBoth(t, cpioOf(
		cpioFileOf(5, 3, "a", ""), cpioFileOf(6, 1, "x", "own"), cpioFileOf(5, 3, "b", ""), cpioFileOf(5, 3, "c", "data"),
		cpioFileOf(7, 2, "d", "first"), cpioFileOf(7, 2, "e", ""),
		cpioFileOf(8, 2, "f", "each"), cpioFileOf(8, 2, "g", "its own"),
		cpioFileOf(9, 2, "h", ""), cpioFileOf(9, 2, "i", ""),
		cpioFileOf(0, 1, "j", "1"), cpioFileOf(0, 1, "k", ""),
	), Limits{})
	if err != nil {
		t.Fatal(err)
	}
	want(t, got, map[string]string{"a": "data", "b": "data", "c": "data", "x": "own", "d": "first", "e": "first", "f": "each", "g": "its own",
		"h": "", "i": "", "j": "1", "k": ""})
}

// TestRow reads several cpio archives one behind the other, each with inode numbers of its own.
func TestRow(t *testing.T) {
	first := cpioOf(cpioFileOf(1, 2, "a", "old"), cpioFileOf(2, 1, "b", "b"))
	second := cpioOf(cpioFileOf(1, 2, "a", ""), cpioFileOf(1, 2, "c", "new"))
	tree := map[string]string{"a": "new", "b": "b", "c": "new"}
	zeros := make([]byte, 100_000)
	for name, data := range map[string][]byte{
		"close":      slices.Concat(first, second),
		"zeros":      slices.Concat(first, zeros, second, zeros),
		"odd zeros":  slices.Concat(first, make([]byte, 3), second),
		"two gzips":  slices.Concat(fixtures.Gzip(t, first), fixtures.Gzip(t, second)),
		"gzip zeros": slices.Concat(fixtures.Gzip(t, first), make([]byte, 5), fixtures.Gzip(t, second), zeros),
		"two zstds":  slices.Concat(zst(t, first), zst(t, second)),
		"skippable":  slices.Concat([]byte("\x50\x2A\x4D\x18\x04\x00\x00\x00abcd"), zst(t, slices.Concat(first, second))),
	} {
		got, err := openBoth(t, data, Limits{})
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		want(t, got, tree)
	}
	for text, data := range map[string][]byte{
		fmt.Sprintf("a compressed archive begins at offset 0x%x", len(first)):       slices.Concat(first, fixtures.Gzip(t, second)),
		fmt.Sprintf("what begins at offset 0x%x", len(first)+4):                     slices.Concat(first, make([]byte, 4), []byte("garbage")),
		"without the end mark of a cpio archive, behind the member \"c\"":           slices.Concat(first, second[:bytes.Index(second, []byte("new"))+4]),
		"something that is not gzip follows":                                        slices.Concat(fixtures.Gzip(t, first), []byte("garbage")),
		"it ends at offset 0x" + fmt.Sprintf("%x", len(first)+50) + ", in a header": slices.Concat(first, second[:50]),
	} {
		_, err := openBoth(t, data, Limits{})
		if !errors.Is(err, ErrDamaged) || !strings.Contains(fmt.Sprint(err), text) {
			t.Errorf("%v, want %q", err, text)
		}
	}
}

// TestMeta checks times and attributes.
func TestMeta(t *testing.T) {
	later := day.Add(time.Hour)
	hs := []tar.Header{file("d/e/ro", "1"), file("d/e/rw", "2"), dir("own"), file("own/f", "3"), hardLink("link", "d/e/ro"), file("none", "4")}
	hs[0].Mode, hs[1].ModTime, hs[3].ModTime, hs[5].ModTime = 0o444, later, later, time.Unix(0, 0)
	src, err := Open(ctx, "x", bytes.NewReader(tarOf(t, hs...)), Limits{})
	if err != nil {
		t.Fatal(err)
	}
	defer src.Close()
	got := map[string]string{}
	var walk func(it *replicate.Item)
	walk = func(it *replicate.Item) {
		m := it.Meta
		if !m.Created.Equal(m.Modified) || !m.Accessed.Equal(m.Modified) {
			t.Errorf("%s: %v", it.Path, m)
		}
		got[it.Path] = fmt.Sprintf("%02x %d", m.Attr, m.Modified.Unix())
		for _, c := range it.Children {
			walk(c)
		}
	}
	walk(src.Root())
	delete(got, "")
	at := func(attr byte, at time.Time) string { return fmt.Sprintf("%02x %d", attr, at.Unix()) }
	const ro, arch = fatdriver.AttrReadOnly, fatdriver.AttrArchive
	if w := map[string]string{
		"d": at(0, later), "d/e": at(0, later), "d/e/ro": at(ro|arch, day), "d/e/rw": at(arch, later), "own": at(0, day), "own/f": at(arch, later),
		"link": at(ro|arch, day), "none": at(arch, time.Unix(0, 0)),
	}; !maps.Equal(got, w) {
		t.Errorf("got %v\nwant %v", got, w)
	}
}

// TestRefused has archives that are refused as a whole, and what is said.
func TestRefused(t *testing.T) {
	small := tarOf(t, file("a", "1"))
	badSum := tarOf(t, file("first", "1"), file("second", "2"))
	badSum[1024+7] ^= 1
	gzBad := fixtures.Gzip(t, small)
	gzBad[len(gzBad)-6] ^= 1
	zstBad := zst(t, small)
	zstBad[len(zstBad)-2] ^= 1
	crc := func(sum int) []byte {
		return cpioOf(newc{magic: "070702", mode: cpioFile, name: "a", data: "\x01\x02"}, newc{magic: "070702", mode: cpioFile, name: "b", data: "\x01\xff", check: sum})
	}
	digit := cpioOf(cpioFileOf(1, 1, "a", "1"), cpioFileOf(2, 1, "b", "2"))
	digit[bytes.LastIndex(digit, []byte("b\x00"))-110+60] = 'g'
	badMap := oldSparse() // the map has more than the data
	copy(badMap[386+12:], "00000000003\x00")
	sumTar(badMap)
	holes := oldSparse()
	copy(holes[483:], "00000010001\x00")
	sumTar(holes)
	huge := slices.Clone(small)
	setSize(huge, "77777777777 ")
	hugeCPIO := cpioOf(cpioFileOf(1, 1, "a", "1"))
	copy(hugeCPIO[54:], "ffffffff")
	multi := tarOf(t, file("a", "1"))
	multi[156] = 'M'
	sumTar(multi)
	globalSize := tarOf(t, file("g", "9 size=1\n"))[:2*blockSize]
	globalSize[156] = 'g'
	sumTar(globalSize)
	for _, c := range []struct {
		name string
		data []byte
		l    Limits
		is   error
		text string
	}{
		{"nothing", nil, Limits{}, ErrDamaged, "it is empty"},
		{"text", []byte("hello"), Limits{}, ErrDamaged, "it is neither tar nor cpio"},
		{"zeros", make([]byte, 10240), Limits{}, ErrDamaged, "it is neither tar nor cpio"},
		{"text in gzip", fixtures.Gzip(t, []byte("hello")), Limits{}, ErrDamaged, "what is compressed with gzip in it is neither tar nor cpio"},
		{"nothing in zstd", zst(t, nil), Limits{}, ErrDamaged, "what is compressed with zstd in it is empty"},
		{"gzip in gzip", fixtures.Gzip(t, fixtures.Gzip(t, small)), Limits{}, ErrDamaged, "is neither tar nor cpio"},
		{"xz", []byte("\xFD7zXZ\x00 and so on"), Limits{}, ErrDamaged, "it is compressed with xz"},
		{"zip", []byte("PK\x03\x04 and so on"), Limits{}, ErrDamaged, "it is a zip archive"},
		{"leads out", tarOf(t, file("a", "1"), file("b/../../c", "2")), Limits{}, ErrDamaged, `the member "b/../../c" at offset 0x400 leads out of it`},
		{"leads out of a cpio", cpioOf(cpioFileOf(1, 1, "..", "1")), Limits{}, ErrDamaged, `the member ".." at offset 0x0 leads out of it`},
		{"file for the root", tarOf(t, file("./.", "1")), Limits{}, ErrDamaged, "which no file can have"},
		{"header sum", badSum, Limits{}, ErrDamaged, `the header at offset 0x400 is damaged, behind the member "first": `},
		{"gzip sum", gzBad, Limits{}, ErrDamaged, "the compressed data is damaged, 2048 bytes came out: gzip: invalid checksum"},
		{"zstd sum", zstBad, Limits{}, ErrDamaged, "the compressed data is damaged"},
		{"cpio sum of the first", crc(0x100), Limits{}, ErrDamaged, `the data of the member "a" at offset 0x0 has the checksum 0x3, and its header says 0x0`},
		{"cpio digit", digit, Limits{}, ErrDamaged, `is damaged, behind the member "a": 'g' at 0x36 is no digit`},
		{"size beyond the end", huge, Limits{}, ErrDamaged, `the member "a" at offset 0x0 has 8589934591 bytes, and 1536 are left`},
		{"size beyond the end of a cpio", hugeCPIO, Limits{}, ErrDamaged, `the member "a" at offset 0x0 has 4294967295 bytes, and 400 are left`},
		{"continued", multi, Limits{}, ErrDamaged, `the member "a" at offset 0x0 began in another archive`},
		{"no NUL", bytes.Replace(cpioOf(cpioFileOf(1, 1, "abc", "")), []byte("abc\x00"), []byte("abcd"), 1), Limits{}, ErrDamaged, "not one string with a NUL"},
		{"NUL inside", bytes.Replace(cpioOf(cpioFileOf(1, 1, "abc", "")), []byte("abc\x00"), []byte("a\x00c\x00"), 1), Limits{}, ErrDamaged, "not one string with a NUL"},
		{"long name", tarOf(t, file(strings.Repeat("n/", 2048)+"f", "1")), Limits{}, ErrTooLarge, "has 4097 bytes, at most 4096"},
		{"long name in a cpio", cpioOf(cpioFileOf(1, 1, strings.Repeat("n/", 2049), "1")), Limits{}, ErrTooLarge, "has 4099 bytes, at least 1 and at most 4097"},
		{"long link", tarOf(t, hardLink("l", strings.Repeat("n/", 2049))), Limits{}, ErrTooLarge, "links to a name of 4098 bytes"},
		{"members", tarOf(t, file("a", "1"), file("b/c", "2"), file("d", "3")), Limits{Members: 3}, ErrTooLarge, "at offset 0x800 is more than its 3th"},
		{"directories of one member", tarOf(t, file(strings.Repeat("d/", 100)+"f", "")), Limits{Members: 99}, ErrTooLarge, "more than its 99th"},
		{"one member again and again", tarOf(t, file("a", "1"), file("a", "2"), file("a", "3"), file("a", "4")), Limits{Members: 3}, ErrTooLarge, "at offset 0xc00 is more than its 3th"},
		{"the root again and again", cpioOf(newc{mode: cpioDir, name: "."}, newc{mode: cpioDir, name: "."}), Limits{Members: 1}, ErrTooLarge, "more than its 1th"},
		{"links to nothing", tarOf(t, hardLink("l", strings.Repeat("n", 4000)), hardLink("m", strings.Repeat("n", 4000))), Limits{Names: 6000}, ErrTooLarge, "its names have more than 6000 bytes"},
		{"links to links", tarOf(t, hardLink("a", "x"), hardLink("b", "a"), hardLink("c", "b"), hardLink("d", "c")), Limits{Names: 300}, ErrTooLarge, "its names have more than 300 bytes"},
		{"global size", append(globalSize, tarOf(t, file("a", "12"))...), Limits{}, ErrDamaged, `the global header at offset 0x0 has "size"`},
		{"sparse map", badMap, Limits{}, ErrDamaged, `the sparse member "sparse" at offset 0x0 is damaged: `},
		{"holes", holes, Limits{Unpacked: 4096}, ErrTooLarge, `with the holes of the member "sparse" at offset 0x0`},
		{"names", tarOf(t, file("abc", "1"), file("def", "2")), Limits{Names: 5}, ErrTooLarge, "its names have more than 5 bytes"},
		{"bomb", fixtures.Gzip(t, tarOf(t, file("a", strings.Repeat("0", 1<<20)))), Limits{Unpacked: 1 << 19}, ErrTooLarge, "unpacked it has more than 524288 bytes"},
	} {
		t.Run(c.name, func(t *testing.T) {
			_, err := openBoth(t, c.data, c.l)
			if !errors.Is(err, c.is) || !strings.Contains(fmt.Sprint(err), c.text) {
				t.Errorf("got  %v\nwant %v: … %s", err, c.is, c.text)
			}
		})
	}
	// The controls: one step inside the limit, and the right checksum.
	for name, c := range map[string]struct {
		data []byte
		l    Limits
	}{
		"members":  {tarOf(t, file("a", "1"), file("b/c", "2")), Limits{Members: 3}},
		"holes":    {holes, Limits{Unpacked: 4097}},
		"names":    {tarOf(t, file("abc", "1"), file("de", "2")), Limits{Names: 5}},
		"bomb":     {fixtures.Gzip(t, tarOf(t, file("a", strings.Repeat("0", 1<<19-2048)))), Limits{Unpacked: 1<<19 + 512}},
		"checksum": {cpioOf(newc{magic: "070702", mode: cpioFile, name: "b", data: "\x01\xff", check: 0x100}), Limits{}},
		"NULs":     {bytes.Replace(cpioOf(cpioFileOf(1, 1, "abc", "")), []byte("abc\x00"), []byte("a\x00\x00\x00"), 1), Limits{}},
	} {
		if _, err := openBoth(t, c.data, c.l); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// setSize writes the size field of the first header of a tar archive.
func setSize(b []byte, size string) {
	copy(b[124:136], size)
	sumTar(b)
}

func sumTar(b []byte) {
	copy(b[148:156], "        ")
	sum := 0
	for _, c := range b[:blockSize] {
		sum += int(c)
	}
	copy(b[148:156], fmt.Sprintf("%06o\x00 ", sum))
}

// TestTruncated cuts archives at every block, and small ones at every byte: a cut that takes anything but what fills
// up the end is noticed.
func TestTruncated(t *testing.T) {
	var hs []tar.Header
	var ms []newc
	for i := range 12 {
		name, data := fmt.Sprintf("EFI/%d %s", i, strings.Repeat("n", i*20)), strings.Repeat("x", i*200)
		hs = append(hs, file(name, data))
		ms = append(ms, cpioFileOf(i, 1, name, data))
	}
	tarData, cpioData := tarOf(t, hs...), cpioOf(ms...)
	tarEnd := len(bytes.TrimRight(tarData, "\x00"))
	tarEnd = (tarEnd+blockSize-1)/blockSize*blockSize + blockSize // one block of zeros
	cpioEnd := bytes.Index(cpioData, []byte(cpioTrailer)) + len(cpioTrailer) + 1
	for _, c := range []struct {
		name  string
		data  []byte
		whole int // bytes with which it is whole
		step  int
	}{
		{"tar", tarData, tarEnd, 512}, {"tar, odd", tarData, tarEnd, 509}, {"cpio", cpioData, cpioEnd, 512}, {"cpio, odd", cpioData, cpioEnd, 43},
		{"gzip", fixtures.Gzip(t, tarData), len(fixtures.Gzip(t, tarData)), 3}, {"zstd", zst(t, tarData), len(zst(t, tarData)), 3},
	} {
		t.Setenv("TMPDIR", t.TempDir())
		refused, taken := 0, 0
		for n := 0; n <= len(c.data); n += c.step {
			src, err := Open(ctx, "x", bytes.NewReader(c.data[:n]), Limits{})
			switch {
			case err == nil && n < c.whole:
				t.Errorf("%s: %d bytes of %d are taken for whole", c.name, n, len(c.data))
			case err != nil && n >= c.whole && n%512 == 0:
				t.Errorf("%s: %d bytes of %d: %v", c.name, n, len(c.data), err)
			case err != nil && n > 0 && !errors.Is(err, ErrDamaged):
				t.Errorf("%s: %d bytes: %v", c.name, n, err)
			}
			if err != nil {
				refused++
				continue
			}
			taken++
			src.Close()
		}
		if refused == 0 || taken == 0 && c.step == 512 {
			t.Errorf("%s: %d refused, %d taken", c.name, refused, taken)
		}
		if left, _ := os.ReadDir(os.TempDir()); len(left) > 0 {
			t.Errorf("left: %v", left)
		}
	}
}

// TestHeaderNumbers has headers with numbers that nothing must be allocated by.
func TestHeaderNumbers(t *testing.T) {
	base256 := func(b ...byte) string {
		return string(append(append([]byte{b[0]}, make([]byte, 11-len(b[1:]))...), b[1:]...))
	}
	for name, size := range map[string]string{
		"2^62":     base256(0x80, 0x40, 0, 0, 0, 0, 0, 0, 0),
		"2^63-1":   base256(0x80, 0x7F, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF),
		"8 GiB":    "77777777777 ",
		"negative": strings.Repeat("\xFF", 12),
	} {
		for _, typ := range []byte{'0', 'x', 'g', 'L', 'K', 'S', 'V', 'D', '7'} {
			b := tarOf(t, file("a", "1"))
			b[156] = typ
			setSize(b, size)
			checkAlloc(t, name+" "+string(typ), b)
		}
	}
	for at := 6; at < newcSize; at += 8 {
		b := cpioOf(cpioFileOf(1, 2, "a", "1"))
		copy(b[at:], "FFFFFFFF")
		checkAlloc(t, fmt.Sprint("cpio field at ", at), b)
	}
}

func checkAlloc(t *testing.T, name string, b []byte) {
	t.Helper()
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	src, err := Open(ctx, "x", bytes.NewReader(b), Limits{})
	runtime.ReadMemStats(&after)
	if err == nil {
		src.Close()
	}
	if n := after.TotalAlloc - before.TotalAlloc; n > 8<<20 {
		t.Errorf("%s: %d bytes allocated", name, n)
	}
}

// TestNamesInMemory: what of a name is in memory is what counts for the limit, and not what the archive wrote around it.
func TestNamesInMemory(t *testing.T) {
	var hs []tar.Header
	for i := range 4000 {
		hs = append(hs, tar.Header{Typeflag: tar.TypeReg, Name: strings.Repeat("./", 2000) + fmt.Sprint(i)})
	}
	name := filepath.Join(t.TempDir(), "x")
	if err := os.WriteFile(name, tarOf(t, hs...), 0o644); err != nil {
		t.Fatal(err)
	}
	var before, after runtime.MemStats
	runtime.GC()
	runtime.ReadMemStats(&before)
	src, err := OpenFile(ctx, name, Limits{})
	if err != nil {
		t.Fatal(err)
	}
	defer src.Close()
	runtime.GC()
	runtime.ReadMemStats(&after)
	if n := int64(after.HeapAlloc) - int64(before.HeapAlloc); n > 8<<20 {
		t.Errorf("%d bytes for %d names", n, len(hs))
	}
	runtime.KeepAlive(src)
}

// TestManyCases: a name can be written in as many ways as there are members, and directories among them can have as many
// members each.
func TestManyCases(t *testing.T) {
	b := newBuilder(ctx, Limits{}.orDefault())
	n := 1 << 14
	cased := func(i int) string {
		name := []byte("abcdefghijklmn")
		for bit := range name {
			name[bit] -= byte(i>>bit&1) * 32
		}
		return string(name)
	}
	for i := range n {
		if err := b.add(cased(i), 0, &node{}); err != nil {
			t.Fatal(err)
		}
	}
	for i := range n {
		if err := b.add(fmt.Sprintf("dir/%s/%d", cased(i), i), 0, &node{}); err != nil {
			t.Fatal(err)
		}
	}
	start := time.Now()
	root, _ := b.items()
	if took := time.Since(start); took > 3*time.Second { // a tenth of a second, where it is not quadratic
		t.Error(took)
	}
	if len(root.Children) != n+1 || root.Children[0].Err == nil || !strings.Contains(root.Children[0].Err.Error(), "FAT takes its name for that of") {
		t.Error(len(root.Children), root.Children[0].Err)
	}
	if dir := root.Children[n]; len(dir.Children[0].Children) != n || dir.Children[n-1].Err == nil {
		t.Error(len(dir.Children[0].Children))
	}
}

// TestLargeFiles indexes a file of 9 GiB in an archive with holes, and reads what is behind it.
func TestLargeFiles(t *testing.T) {
	var head bytes.Buffer
	w := tar.NewWriter(&head)
	const size = 9 << 30
	if err := w.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: "large", Size: size, Mode: 0o644, ModTime: day, Format: tar.FormatPAX}); err != nil {
		t.Fatal(err)
	}
	name := filepath.Join(t.TempDir(), "x.tar")
	f, err := os.Create(name)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	f.Write(head.Bytes())
	if _, err := f.WriteAt(tarOf(t, file("small", "s")), int64(head.Len())+size); err != nil {
		t.Skip("the filesystem cannot hold a file of 9 GiB: ", err)
	}
	src, err := OpenFile(ctx, name, Limits{Unpacked: 1})
	if err != nil {
		t.Fatal(err)
	}
	defer src.Close()
	want(t, dump(t, src), map[string]string{"large": "error: it has 9663676416 bytes, FAT holds at most 4294967295", "small": "s"})
}

func TestConcurrent(t *testing.T) {
	var hs []tar.Header
	for i := range 20 {
		hs = append(hs, file(fmt.Sprintf("f%d", i), strings.Repeat(fmt.Sprint(i), 40_000)))
	}
	for name, data := range map[string][]byte{"plain": tarOf(t, hs...), "zstd": zst(t, tarOf(t, hs...))} {
		path := filepath.Join(t.TempDir(), "x")
		if err := os.WriteFile(path, data, 0o644); err != nil {
			t.Fatal(err)
		}
		src, err := OpenFile(ctx, path, Limits{})
		if err != nil {
			t.Fatal(err)
		}
		var wg sync.WaitGroup
		for range 4 {
			for _, it := range src.Root().Children {
				wg.Go(func() {
					for range 2 {
						data, err := readAll(src, it)
						if err != nil || string(data) != strings.Repeat(it.Name[1:], 40_000) {
							t.Errorf("%s: %s: %v", name, it.Path, err)
						}
					}
					r, err := src.Open(it)
					if err != nil {
						t.Error(err)
						return
					}
					defer r.Close()
					b := make([]byte, 3)
					if _, err := r.(io.ReaderAt).ReadAt(b, 10); err != nil || string(b) != strings.Repeat(it.Name[1:], 40)[10:13] {
						t.Errorf("%s: ReadAt %q, %v", it.Path, b, err)
					}
				})
			}
		}
		wg.Wait()
		src.Close()
	}
}

// TestChanged writes to an archive that is being read where it lies: in place, and by another size under the old date.
func TestChanged(t *testing.T) {
	for what, change := range map[string]func(name string) error{
		"content": func(name string) error {
			f, err := os.OpenFile(name, os.O_WRONLY, 0)
			if err == nil {
				_, err = f.WriteString("b")
				f.Close()
			}
			return errors.Join(err, os.Chtimes(name, day, day.Add(time.Second)))
		},
		"size": func(name string) error { return errors.Join(os.Truncate(name, 1200), os.Chtimes(name, day, day)) },
		"date": func(name string) error { return os.Chtimes(name, day, day.Add(time.Nanosecond)) },
	} {
		name := filepath.Join(t.TempDir(), "x.tar")
		if err := errors.Join(os.WriteFile(name, tarOf(t, file("a", "1")), 0o644), os.Chtimes(name, day, day)); err != nil {
			t.Fatal(err)
		}
		src, err := OpenFile(ctx, name, Limits{})
		if err != nil {
			t.Fatal(err)
		}
		it := src.Root().Children[0]
		if _, err := readAll(src, it); err != nil {
			t.Fatal(err)
		}
		if err := change(name); err != nil {
			t.Fatal(err)
		}
		if _, err := readAll(src, it); !errors.Is(err, ErrDamaged) || !strings.Contains(err.Error(), "was changed while it was read") {
			t.Errorf("%s: %v", what, err)
		}
		src.Close()
	}
}

// TestOffset reads an archive from where standard input stands.
func TestOffset(t *testing.T) {
	name := filepath.Join(t.TempDir(), "x")
	if err := os.WriteFile(name, append([]byte("before"), tarOf(t, file("a", "1"))...), 0o644); err != nil {
		t.Fatal(err)
	}
	f, err := os.Open(name)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	f.Seek(6, io.SeekStart)
	src, err := Open(ctx, "x", f, Limits{Unpacked: 1}) // and without a copy of it
	if err != nil {
		t.Fatal(err)
	}
	want(t, dump(t, src), map[string]string{"a": "1"})
	src.Close()
	if _, err := f.Stat(); err != nil {
		t.Errorf("Close has closed what it was given: %v", err)
	}
}

// TestInterrupted cancels while a pipe gives nothing.
func TestInterrupted(t *testing.T) {
	t.Setenv("TMPDIR", t.TempDir())
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	defer w.Close()
	w.Write(tarOf(t, file("a", "1"))[:600])
	c, cancel := context.WithCancel(ctx)
	time.AfterFunc(50*time.Millisecond, cancel)
	if _, err := Open(c, "x", r, Limits{}); !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
	fifo := filepath.Join(t.TempDir(), "fifo")
	if err := syscall.Mkfifo(fifo, 0o600); err != nil {
		t.Fatal(err)
	}
	c, cancel = context.WithCancel(ctx)
	time.AfterFunc(50*time.Millisecond, cancel)
	if _, err := OpenFile(c, fifo, Limits{}); !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
}

// TestTemporary makes the temporary file in both ways.
func TestTemporary(t *testing.T) {
	d := t.TempDir()
	t.Setenv("TMPDIR", d)
	for i, make := range []func() (*os.File, error){temporary, func() (*os.File, error) { return removed(d) }} {
		f, err := make()
		if err != nil {
			t.Fatal(i, err)
		}
		b := []byte{0}
		if _, err := f.WriteString("x"); err != nil {
			t.Error(i, err)
		}
		if _, err := f.ReadAt(b, 0); err != nil || b[0] != 'x' {
			t.Error(i, b, err)
		}
		if left, _ := os.ReadDir(d); len(left) > 0 {
			t.Error(i, left)
		}
		info, err := f.Stat()
		if err != nil || info.Mode().Perm() != 0o600 {
			t.Error(i, info, err)
		}
		f.Close()
	}
	t.Setenv("TMPDIR", filepath.Join(d, "nothing"))
	if _, err := Open(ctx, "x", strings.NewReader("07070100"), Limits{}); err == nil || !strings.Contains(err.Error(), "cannot make a temporary file") {
		t.Error(err)
	}
}

type fullDisk struct{ left int }

func (f *fullDisk) Write(p []byte) (int, error) {
	n := min(f.left, len(p))
	if f.left -= n; n < len(p) {
		return n, &os.PathError{Op: "write", Path: "/tmp/x", Err: syscall.ENOSPC}
	}
	return n, nil
}

// TestFullDisk has no room for the temporary file: the error says how much it takes.
func TestFullDisk(t *testing.T) {
	t.Setenv("TMPDIR", "/some/where")
	r := func() io.Reader { return io.LimitReader(zeros{}, 3<<20) }
	_, err := fill(&fullDisk{1 << 20}, r(), 1<<30)
	if want := "cannot unpack it into /some/where: it needs 3145728 bytes, and 1048576 were taken: no space left on device"; fmt.Sprint(err) != want {
		t.Errorf("%v", err)
	}
	if !errors.Is(err, syscall.ENOSPC) {
		t.Error("no ENOSPC")
	}
	if _, err = fill(&fullDisk{1 << 20}, r(), 2<<20); !errors.Is(err, ErrTooLarge) || !strings.Contains(err.Error(), "took 1048576") {
		t.Error(err)
	}
	if n, err := fill(&fullDisk{3 << 20}, r(), 3<<20); n != 3<<20 || err != nil {
		t.Error(n, err)
	}
}

type zeros struct{}

func (zeros) Read(p []byte) (int, error) { clear(p); return len(p), nil }

func TestIs(t *testing.T) {
	d := t.TempDir()
	boot := tarOf(t, file("a", "1"))
	boot[510], boot[511] = 0x55, 0xAA
	sumTar(boot)
	v7 := tarOf(t, file("a", "1"))
	copy(v7[257:265], make([]byte, 8))
	sumTar(v7)
	for name, c := range map[string]struct {
		data []byte
		is   bool
	}{
		"tar": {tarOf(t, file("a", "1")), true}, "v7": {v7, true}, "cpio": {cpioOf(), true}, "gz": {fixtures.Gzip(t, nil), true}, "zst": {zst(t, nil), true},
		"xz": {[]byte("\xFD7zXZ\x00"), true}, "empty": {nil, false}, "zeros": {make([]byte, 4096), false}, "boot sector": {boot, false},
		"text": {[]byte("0707 is how it begins"), false},
	} {
		p := filepath.Join(d, name)
		if err := os.WriteFile(p, c.data, 0o644); err != nil {
			t.Fatal(err)
		}
		if Is(p) != c.is {
			t.Errorf("%s: %v", name, !c.is)
		}
	}
	fifo := filepath.Join(d, "fifo")
	if err := syscall.Mkfifo(fifo, 0o600); err != nil {
		t.Fatal(err)
	}
	if !Is(fifo) || Is(d) || Is(filepath.Join(d, "nothing")) || Is("/dev/null") {
		t.Error("FIFO, directory, nothing or device")
	}
}

// TestTools reads what other programs write.
func TestTools(t *testing.T) {
	d := t.TempDir()
	tree := filepath.Join(d, "tree")
	files := map[string]string{
		"EFI/BOOT/BOOTX64.EFI": strings.Repeat("program", 10_000),
		"loader/loader.conf":   "timeout 3\n",
		"loader/empty":         "",
		"odd":                  "12345",
	}
	more := map[string]string{ // what v7 and odc cannot hold everywhere
		"EFI/Linux/" + strings.Repeat("long", 30) + "/" + strings.Repeat("name", 40) + ".efi": "long",
		"EFI/Ünïcode 😀": "unicode",
		"loader/linked": "timeout 3\n",
		"loader/sparse": strings.Repeat("\x00", 3<<20) + "data" + strings.Repeat("\x00", 1<<20) + "more" + strings.Repeat("\x00", 5000),
	}
	write := func(files map[string]string) {
		for p, data := range files {
			p = filepath.Join(tree, p)
			if err := os.MkdirAll(filepath.Dir(p), 0o755); err != nil {
				t.Fatal(err)
			}
			f, err := os.Create(p)
			if err != nil {
				t.Fatal(err)
			}
			for i := 0; i < len(data); i += 4096 {
				if b := data[i:min(i+4096, len(data))]; strings.Trim(b, "\x00") != "" {
					f.WriteAt([]byte(b), int64(i))
				}
			}
			f.Truncate(int64(len(data)))
			if err := f.Close(); err != nil {
				t.Fatal(err)
			}
		}
	}
	write(files)
	run := func(name, script string, files ...map[string]string) {
		t.Run(name, func(t *testing.T) {
			for _, tool := range strings.Fields(script) {
				if slices.Contains([]string{"tar", "cpio", "busybox", "zstd", "gzip", "bsdtar", "python3"}, tool) {
					if _, err := exec.LookPath(tool); err != nil {
						t.Skip(tool, " is not installed")
					}
				}
			}
			out := filepath.Join(t.TempDir(), "archive")
			cmd := exec.Command("sh", "-ec", script)
			cmd.Dir, cmd.Env = tree, append(os.Environ(), "OUT="+out, "LC_ALL=C.UTF-8")
			if text, err := cmd.CombinedOutput(); err != nil {
				t.Fatalf("%v: %s", err, text)
			}
			data, err := os.ReadFile(out)
			if err != nil {
				t.Fatal(err)
			}
			if !Is(out) {
				t.Error("it is not known for an archive")
			}
			got, err := openBoth(t, data, Limits{})
			if err != nil {
				t.Fatal(err)
			}
			w := map[string]string{}
			for _, m := range files {
				for p, c := range m {
					w[p] = c
					for at := filepath.Dir(p); at != "."; at = filepath.Dir(at) {
						w[at] = "dir"
					}
				}
			}
			want(t, got, w)
		})
	}
	run("GNU tar v7", "tar --format=v7 -cf $OUT .", files)
	run("GNU tar ustar", "tar --format=ustar -cf $OUT .", files)
	run("cpio as ustar", "find . | cpio -o -H ustar > $OUT", files)
	run("busybox cpio, old", "find . | busybox cpio -o -H newc > $OUT", files)
	write(more)
	if err := os.Remove(filepath.Join(tree, "loader/linked")); err != nil {
		t.Fatal(err)
	}
	if err := os.Link(filepath.Join(tree, "loader/loader.conf"), filepath.Join(tree, "loader/linked")); err != nil {
		t.Fatal(err)
	}
	for _, format := range []string{"gnu", "oldgnu", "pax"} {
		run("GNU tar "+format, "tar --format="+format+" -cf $OUT *", files, more)
	}
	run("GNU tar sparse", "tar --format=gnu -S -cf $OUT .", files, more)
	for _, v := range []string{"0.0", "0.1", "1.0"} {
		run("GNU tar sparse "+v, "tar --format=pax --sparse-version="+v+" -S -cf $OUT .", files, more)
	}
	run("GNU tar, a label", "tar -V label -cf $OUT .", files, more)
	run("GNU tar, appended", "tar -cf $OUT EFI; tar -rf $OUT loader odd", files, more)
	run("GNU tar, incremental", "tar -g $OUT.list -cf $OUT .", files, more)
	run("GNU tar gzip", "tar -czf $OUT .", files, more)
	run("GNU tar zstd", "tar -cf - . | zstd -q > $OUT", files, more)
	run("zstd --long", "tar -cf - . | zstd -q --long=27 > $OUT", files, more)
	run("busybox tar", "busybox tar -cf $OUT .", files, more)
	run("bsdtar pax", "bsdtar --format=pax -cf $OUT .", files, more)
	run("bsdtar newc", "bsdtar --format=newc -cf $OUT .", files, more)
	run("python", `python3 -c 'import tarfile,sys; t = tarfile.open(sys.argv[1],"w"); t.add("."); t.close()' $OUT`, files, more)
	run("cpio newc", "find . | cpio -o -H newc > $OUT", files, more)
	run("cpio crc", "find . | cpio -o -H crc > $OUT", files, more)
	run("cpio odc", "find . | cpio -o -H odc > $OUT", files, more)
	run("cpio gzip", "find . | cpio -o -H newc | gzip > $OUT", files, more)
	run("busybox cpio", "find . | busybox cpio -o -H newc > $OUT", files, more)
	run("two cpios", "find EFI | cpio -o -H newc > $OUT; find loader odd | cpio -o -H newc >> $OUT", files, more)
}
