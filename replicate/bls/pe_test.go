package bls

import (
	"bytes"
	"debug/pe"
	"encoding/binary"
	"errors"
	"io"
	"os"
	"slices"
	"strings"
	"testing"

	"espmirror/fixtures"
)

// sec is a section of an image made by makePE.
type sec struct {
	name string
	data string
}

// makePE puts an EFI application for x86-64 together as the linker does: headers, and the sections padded to 512 bytes
// each, with certificate bytes of signatures at the end.
func makePE(certificate int, sections ...sec) []byte {
	const lfanew, opt, align = 0x80, 0x70 + 16*8, 512
	le := binary.LittleEndian
	pad := func(n int) int { return (n + align - 1) / align * align }
	headers := pad(lfanew + 0x18 + opt + 40*len(sections))
	b := make([]byte, headers)
	copy(b, "MZ")
	le.PutUint32(b[0x3C:], lfanew)
	copy(b[lfanew:], "PE\x00\x00")
	le.PutUint16(b[lfanew+4:], 0x8664)
	le.PutUint16(b[lfanew+6:], uint16(len(sections)))
	le.PutUint16(b[lfanew+0x14:], opt)
	o := b[lfanew+0x18:]
	le.PutUint16(o, 0x20B)
	le.PutUint32(o[0x20:], 0x1000) // SectionAlignment
	le.PutUint32(o[0x24:], align)  // FileAlignment
	le.PutUint32(o[0x3C:], uint32(headers))
	le.PutUint16(o[0x44:], SubsystemEFIApplication)
	le.PutUint32(o[0x6C:], 16)
	for i, s := range sections {
		h := b[lfanew+0x18+opt+40*i:]
		copy(h[:8], s.name)
		le.PutUint32(h[8:], uint32(len(s.data)))
		le.PutUint32(h[12:], uint32(0x1000*(i+1)))
		le.PutUint32(h[16:], uint32(pad(len(s.data))))
		if s.data != "" {
			le.PutUint32(h[20:], uint32(len(b)))
		}
		b = append(b, s.data...)
		b = append(b, make([]byte, pad(len(s.data))-len(s.data))...)
	}
	if certificate > 0 {
		o = b[lfanew+0x18:] // append has moved it
		le.PutUint32(o[0x70+8*4:], uint32(len(b)))
		le.PutUint32(o[0x70+8*4+4:], uint32(certificate))
		b = append(b, make([]byte, certificate)...)
	}
	return b
}

func read(b []byte) (*PE, error) { return ReadPE(bytes.NewReader(b), int64(len(b))) }

const osRelease = "NAME=Debian\nID=debian\nPRETTY_NAME=\"Debian GNU/Linux 12\"\nVERSION_ID='12'\nIMAGE_VERSION=7\n"

func uki() []byte {
	return makePE(1000, sec{".text", strings.Repeat("stub", 300)}, sec{".osrel", osRelease}, sec{".cmdline", "root=LABEL=root ro\x00"},
		sec{".uname", "6.1.0-13-amd64"}, sec{".initrd", strings.Repeat("cpio", 700)}, sec{".bss", ""}, sec{".linux", strings.Repeat("kernel", 999)})
}

// Where the fields are: debug/pe of the standard library reads the same from what makePE made.
func TestReadPE(t *testing.T) {
	b := uki()
	p, err := read(b)
	if err != nil {
		t.Fatal(err)
	}
	ref, err := pe.NewFile(bytes.NewReader(b))
	if err != nil {
		t.Fatal(err)
	}
	compare(t, p, ref)
	if !p.IsUKI() || p.IsAddon() {
		t.Error("it is not taken for a UKI")
	}
	for _, s := range p.Sections {
		if s.Name != ".osrel" {
			continue
		}
		if data, err := p.Data(s); err != nil || string(data) != osRelease {
			t.Errorf("%q, %v", data, err)
		}
	}
	if v, err := p.Uname(); v != "6.1.0-13-amd64" || err != nil {
		t.Errorf("%q, %v", v, err)
	}
}

func compare(t *testing.T, p *PE, ref *pe.File) {
	t.Helper()
	opt, plus := ref.OptionalHeader.(*pe.OptionalHeader64)
	if p.Machine != ref.Machine || p.Plus != plus || plus && p.Subsystem != opt.Subsystem || len(p.Sections) != len(ref.Sections) {
		t.Fatalf("%+v, expected %+v", p, ref)
	}
	for i, s := range p.Sections {
		r := ref.Sections[i]
		want := Section{Name: r.Name, Off: int64(r.Offset), Size: int64(min(r.Size, r.VirtualSize)), Raw: int64(r.Size)}
		if s != want {
			t.Errorf("section %d: %+v, expected %+v", i, s, want)
		}
	}
}

// Images that other tools made: those of systemd-boot, and a kernel.
func TestRealImages(t *testing.T) {
	found := 0
	for _, path := range []string{"/usr/lib/systemd/boot/efi/systemd-bootx64.efi", "/usr/lib/systemd/boot/efi/linuxx64.efi.stub", "../../out/judges/linux/vmlinuz"} {
		f, err := os.Open(path)
		if errors.Is(err, os.ErrNotExist) {
			t.Logf("%s is missing", path)
			continue
		}
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		info, err := f.Stat()
		if err != nil {
			t.Fatal(err)
		}
		found++
		p, err := ReadPE(f, info.Size())
		if err != nil {
			t.Errorf("%s: %v", path, err)
			continue
		}
		ref, err := pe.NewFile(f)
		if err != nil {
			t.Fatal(err)
		}
		compare(t, p, ref)
		if p.Subsystem != SubsystemEFIApplication || p.IsUKI() {
			t.Errorf("%s: subsystem %d, UKI %v", path, p.Subsystem, p.IsUKI())
		}
		// systemd-boot carries an os-release, so that it can be tried from EFI/Linux.
		if o, ok, err := p.OSRelease(); strings.Contains(path, "systemd-boot") && (err != nil || !ok || o.ID != "systemd-boot") {
			t.Errorf("%s: %+v, %v, %v", path, o, ok, err)
		}
		// Each prefix of it that lacks a byte of a section is found to be one.
		end := int64(0)
		for _, s := range p.Sections {
			end = max(end, s.Off+s.Raw)
		}
		for _, size := range []int64{0, 1, 63, 64, 200, 1000, end / 2, end - 1} {
			if _, err := ReadPE(f, size); !errors.Is(err, ErrPE) {
				t.Errorf("%s cut off at %d: %v", path, size, err)
			}
		}
	}
	if found == 0 {
		t.Skip("systemd-boot-efi is not installed, and there is no kernel in out/judges/linux")
	}
}

// The programs of the fixtures are images of their size, for debug/pe too.
func TestFixtures(t *testing.T) {
	for _, size := range []int64{0, 240, 241, 510, 5000, 1 << 20} {
		content := fixtures.PE(size, 1)
		b, err := io.ReadAll(content.Reader())
		if err != nil || int64(len(b)) != max(size, 240) || content.Size != int64(len(b)) {
			t.Fatal(len(b), err)
		}
		for what, b := range map[string]string{"PE": string(b), "Program": fixtures.Program(string(b)), "AsProgram": fixtures.AsProgram(string(b[:size/2]))} {
			p, err := read([]byte(b))
			if err != nil {
				t.Fatalf("%s of %d bytes: %v", what, size, err)
			}
			ref, err := pe.NewFile(strings.NewReader(b))
			if err != nil {
				t.Fatal(err)
			}
			compare(t, p, ref)
			if size > 240 {
				if _, err := read([]byte(b[:len(b)-1])); !errors.Is(err, ErrPE) {
					t.Errorf("%s of %d bytes without the last: %v", what, size, err)
				}
			}
			if again := fixtures.AsProgram(b); again != b {
				t.Errorf("%s of %d bytes is not itself as a program", what, size)
			}
		}
	}
}

// Each way in which an image is not whole is found, and the error says where.
func TestBrokenPE(t *testing.T) {
	const lfanew, opt, table = 0x80, 0x98, 0x98 + 0x70 + 16*8
	put16 := func(off int, v uint16) func(b []byte) []byte {
		return func(b []byte) []byte { binary.LittleEndian.PutUint16(b[off:], v); return b }
	}
	put32 := func(off int, v uint32) func(b []byte) []byte {
		return func(b []byte) []byte { binary.LittleEndian.PutUint32(b[off:], v); return b }
	}
	cut := func(n int) func(b []byte) []byte { return func(b []byte) []byte { return b[:n] } }
	for what, c := range map[string]struct {
		spoil func(b []byte) []byte
		say   string
	}{
		"empty":                       {cut(0), "the DOS header would be at 0x0 to 0x40, and the file has 0x0 bytes"},
		"half a DOS header":           {cut(63), "the file has 0x3f bytes"},
		"text":                        {func(b []byte) []byte { return []byte(strings.Repeat("hello", 100)) }, `expected "MZ" at 0x0, found "he"`},
		"zeros":                       {func(b []byte) []byte { clear(b); return b }, `expected "MZ" at 0x0, found "\x00\x00"`},
		"PE header in the DOS header": {put32(0x3C, 0x3F), "found 0x3f, in the DOS header"},
		"PE header behind the end":    {put32(0x3C, 0xFFFFFFF0), "the PE header would be at 0xfffffff0"},
		"no PE header":                {put16(lfanew, 0), `expected "PE\x00\x00" at 0x80, found "\x00\x00\x00\x00"`},
		"no sections":                 {put16(lfanew+6, 0), "at 0x86, found 0"},
		"too many sections":           {put16(lfanew+6, 0xFFFF), "the section table would be at 0x188"},
		"no optional header":          {put16(lfanew+0x14, 0), "the optional header at 0x98 has 0 bytes"},
		"short optional header":       {put16(lfanew+0x14, 0x6F), "has 111 bytes, expected at least 112"},
		"long optional header":        {put16(lfanew+0x14, 0xFFFF), "the optional header would be"},
		"other magic":                 {put16(opt, 0x107), "at 0x98, found 0x107"},
		"headers behind the end":      {put32(opt+0x3C, 0x7FFFFFFF), "the headers would be at 0x0 to 0x7fffffff"},
		"section behind the end":      {put32(table+20, 0xFFFFFE00), `section ".text", listed at 0x188, would be at 0xfffffe00`},
		"large section":               {put32(table+40+16, 0xFFFFFFFF), `section ".osrel", listed at 0x1b0, would be`},
		"cut in the signatures":       {func(b []byte) []byte { return b[:len(b)-1] }, "the signatures would be"},
		"cut in the last section":     {func(b []byte) []byte { return b[:len(b)-1001] }, "would be"},
		"cut in the headers":          {cut(0x190), "the headers would be"},
	} {
		_, err := read(c.spoil(uki()))
		if !errors.Is(err, ErrPE) || !strings.Contains(err.Error(), c.say) {
			t.Errorf("%s: %v, expected %q", what, err, c.say)
		}
	}
	// Nothing of a section that has no bytes in the file need be there, and no signature of no bytes.
	for what, spoil := range map[string]func(b []byte) []byte{
		".bss somewhere":           put32(table+5*40+20, 0xFFFFFE00),
		"signatures of no size":    func(b []byte) []byte { put32(opt+0x70+36, 0)(b); return put32(opt+0x70+32, 0xFFFFFFFF)(b) },
		"no directories":           func(b []byte) []byte { put32(opt+0x6C, 0)(b); return put32(opt+0x70+36, 0xFFFFFFFF)(b) },
		"32 bits, shorter header":  func(b []byte) []byte { put32(opt+0x5C, 0)(b); return put16(opt, 0x10B)(b) },
		"another subsystem":        put16(opt+0x44, 3),
		"bytes behind the end":     func(b []byte) []byte { return append(b, "more"...) },
		"a machine of another one": put16(lfanew+4, 0x5064),
	} {
		if _, err := read(spoil(uki())); err != nil {
			t.Errorf("%s: %v", what, err)
		}
	}
	// An application's library is not a UKI.
	if p, err := read(put16(opt+0x44, 3)(uki())); err != nil || p.IsUKI() {
		t.Errorf("%v, %v", p, err)
	}
}

// counting counts the bytes that are read, and fails from an offset on.
type counting struct {
	io.ReaderAt
	bytes, fail int64
}

var errMedium = errors.New("medium error")

func (c *counting) ReadAt(b []byte, off int64) (int, error) {
	if c.fail > 0 && off+int64(len(b)) > c.fail {
		return 0, errMedium
	}
	c.bytes += int64(len(b))
	return c.ReaderAt.ReadAt(b, off)
}

// Little is read of a large image, and an error of the reader is not one of the image.
func TestReadsLittle(t *testing.T) {
	b := makePE(0, sec{".osrel", osRelease}, sec{".linux", strings.Repeat("kernel!!", 1<<20)})
	c := &counting{ReaderAt: bytes.NewReader(b)}
	p, err := ReadPE(c, int64(len(b)))
	if err != nil || c.bytes > 1024 {
		t.Errorf("%d bytes, %v", c.bytes, err)
	}
	if _, err := p.Data(p.Sections[1]); err == nil || !strings.Contains(err.Error(), "expected at most 65536") {
		t.Error(err)
	}
	for fail := int64(1); fail < c.bytes; fail += 60 {
		if _, err := ReadPE(&counting{bytes.NewReader(b), 0, fail}, int64(len(b))); !errors.Is(err, errMedium) || errors.Is(err, ErrPE) {
			t.Errorf("failing from %d on: %v", fail, err)
		}
	}
	if _, err := ReadPE(bytes.NewReader(b[:70]), int64(len(b))); !errors.Is(err, io.ErrUnexpectedEOF) || errors.Is(err, ErrPE) {
		t.Errorf("a file that became shorter: %v", err)
	}
}

func TestType2(t *testing.T) {
	p, err := read(uki())
	if err != nil {
		t.Fatal(err)
	}
	es, err := p.Entries("EFI/Linux/Debian-6.1+2-1.efi")
	if err != nil || len(es) != 1 {
		t.Fatal(es, err)
	}
	if e := es[0]; e.ID != "debian-6.1.efi" || e.Title != "Debian GNU/Linux 12" || e.Version != "7" || e.SortKey != "debian" || e.Hidden() ||
		!slices.Equal(e.Options, []string{"root=LABEL=root ro"}) || e.Name.Counter.Left != 2 || e.Loader != "image" {
		t.Errorf("%+v", e)
	}
	// Without an os-release, or with one that names nothing, it is in no menu.
	for _, s := range []sec{{".other", "x"}, {".osrel", "VERSION=1\n"}, {".osrel", ""}} {
		p, err := read(makePE(0, s, sec{".linux", "kernel"}))
		if err != nil {
			t.Fatal(err)
		}
		if es, err := p.Entries("EFI/Linux/a.efi"); err != nil || len(es) != 0 || !p.IsUKI() {
			t.Errorf("%+v: %v, %v", s, es, err)
		}
	}
	addon, err := read(makePE(0, sec{".cmdline", "quiet"}))
	if err != nil || !addon.IsAddon() || addon.IsUKI() {
		t.Error(addon, err)
	}
}

// The example of UAPI.5, "Multi-Profile UKIs".
func TestProfiles(t *testing.T) {
	p, err := read(makePE(0, sec{".linux", "kernel"}, sec{".osrel", "ID=x\nNAME=X"}, sec{".cmdline", "quiet"},
		sec{".profile", "ID=regular\nTITLE=Regular boot"},
		sec{".profile", "ID=Factory-Reset\nTITLE=Reset"}, sec{".cmdline", "quiet reset"},
		sec{".profile", ""}, sec{".cmdline", "quiet tm"}, sec{".osrel", "ID=y"},
		sec{".profile", "ID=hidden"}, sec{".osrel", ""}))
	if err != nil {
		t.Fatal(err)
	}
	es, err := p.Entries("EFI/Linux/x+3.efi")
	if err != nil || len(es) != 3 {
		t.Fatal(es, err)
	}
	for i, want := range []struct{ id, title, options string }{
		{"x.efi", "X (Regular boot)", "quiet"}, {"x.efi@factory-reset", "X (Reset)", "quiet reset"}, {"x.efi@2", "y (Profile #3)", "quiet tm"},
	} {
		if e := es[i]; e.ID != want.id || e.Title != want.title || strings.Join(e.Options, " ") != want.options || e.Profile != uint(i) {
			t.Errorf("%d: %+v", i, e)
		}
	}
	for i := range es[:2] {
		if Compare(es[i], es[i+1]) >= 0 {
			t.Errorf("profile %d is not in front of the next", i)
		}
	}
	if e := Default(es, Conf{Default: "x.efi@f*"}, Vars{}); e != es[1] {
		t.Errorf("%+v", e)
	}
}

// FuzzReadPE holds that no image makes it panic, take more memory than it has bytes, or give sections outside it.
func FuzzReadPE(f *testing.F) {
	f.Add(uki())
	f.Add(makePE(8, sec{".linux", "k"}, sec{".profile", "ID=a"}, sec{".osrel", "ID=b"}, sec{".profile", ""})[:0x420])
	f.Add([]byte("MZ"))
	f.Fuzz(func(t *testing.T, b []byte) {
		p, err := read(b)
		if err != nil {
			if !errors.Is(err, ErrPE) {
				t.Fatal(err)
			}
			return
		}
		for _, s := range p.Sections {
			if s.Raw > 0 && s.Off+s.Raw > int64(len(b)) || s.Size > s.Raw || s.Size < 0 {
				t.Fatalf("%+v in 0x%x bytes", s, len(b))
			}
			if _, err := p.Data(s); err != nil && s.Size <= maxSection {
				t.Fatal(err)
			}
		}
		p.IsUKI()
		p.IsAddon()
		p.OSRelease()
		p.Uname()
		if es, err := p.Entries("EFI/Linux/a.efi"); err == nil {
			Sort(es)
		}
	})
}
