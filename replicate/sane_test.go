package replicate

import (
	"bytes"
	"context"
	"errors"
	"io"
	"log/slog"
	"maps"
	"strings"
	"testing"

	"espmirror/fatdriver"
	"espmirror/fixtures"
	"espmirror/replicate/bls"
)

// A source with an entry whose files are not all there is refused before any target is touched.
func TestHalfWrittenSource(t *testing.T) {
	good := map[string]string{
		"loader/entries/a.conf": "title a\nlinux /abc/linux\ninitrd /abc/initrd\n",
		"abc/linux":             "kernel", "abc/initrd": "initrd",
		"EFI/BOOT/BOOTX64.EFI": fixtures.Program("boot"),
	}
	for name, spoil := range map[string]func(m map[string]string){
		"missing":     func(m map[string]string) { delete(m, "abc/initrd") },
		"empty":       func(m map[string]string) { m["abc/initrd"] = "" },
		"a directory": func(m map[string]string) { delete(m, "abc/initrd"); m["abc/initrd/x"] = "x" },
	} {
		t.Run(name, func(t *testing.T) {
			m := newVolume(t, geometries[2])
			if res := syncMem(t, newMemSource(good), m, Options{}); res.Err != nil {
				t.Fatal(res.Err)
			}
			before := bytes.Clone(m.Bytes())
			bad := map[string]string{}
			for p, c := range good {
				bad[p] = c
			}
			spoil(bad)
			_, err := Sync(context.Background(), newMemSource(bad), []*Target{{Name: "t", Dev: m}}, Options{})
			if !errors.Is(err, ErrSource) || !errors.Is(err, ErrRefused) || !strings.Contains(err.Error(), "abc/initrd, which is "+name) {
				t.Fatal(err)
			}
			if !bytes.Equal(before, m.Bytes()) {
				t.Fatal("the target was written")
			}
			// The way out that the hint names.
			o := Options{Selection: Selection{Exclude: []string{"loader/entries/a.conf"}}}
			if _, err := Sync(context.Background(), newMemSource(bad), []*Target{{Name: "t", Dev: m}}, o); err != nil {
				t.Fatal(err)
			}
		})
	}
}

// A selection that takes entries without their files, or the reverse, is done and said.
func TestDanglingSelection(t *testing.T) {
	src := map[string]string{
		"loader/entries/a.conf": "linux /abc/linux\n", "abc/linux": "kernel", "EFI/BOOT/BOOTX64.EFI": fixtures.Program("boot"),
	}
	for name, c := range map[string]struct {
		sel  Selection
		want bool
	}{
		"all":             {Selection{}, false},
		"without payload": {Selection{Exclude: []string{"abc"}}, true},
		"loader alone":    {Selection{Select: []string{"loader"}}, true},
		"payload alone":   {Selection{Select: []string{"abc"}}, false},
	} {
		t.Run(name, func(t *testing.T) {
			var log bytes.Buffer
			o := Options{Selection: c.sel, Log: slog.New(slog.NewTextHandler(&log, nil))}
			if res := syncMem(t, newMemSource(src), newVolume(t, geometries[2]), o); res.Err != nil {
				t.Fatal(res.Err)
			}
			if strings.Contains(log.String(), "abc/linux") != c.want {
				t.Fatal(log.String())
			}
		})
	}
}

// kernelImage is a PE image with a section ".linux" of that content, as far as the gate looks at it.
func kernelImage(content string) string {
	return strings.Replace(fixtures.Program(content), ".text\x00", ".linux", 1)
}

// A program that firmware would not start is not replicated over one that it does.
func TestHalfWrittenPrograms(t *testing.T) {
	good := map[string]string{
		"loader/entries/a.conf": "title a\nlinux /abc/linux\n", "abc/linux": "a kernel for other firmware",
		"loader/entries/b.conf": "title b\nefi /EFI/tools/shell\n", "EFI/tools/shell": fixtures.Program("shell"),
		"loader/entries/c.conf": "title c\nuki /abc/image\n", "abc/image": kernelImage("kernel"),
		"EFI/BOOT/BOOTX64.EFI": fixtures.Program("boot"), "EFI/BOOT/._BOOTX64.EFI": "\x00\x05\x16\x07 of macOS",
		"EFI/Linux/a+3.efi": kernelImage("kernel"), "EFI/Linux/a.efi.extra.d/x.addon.efi": fixtures.Program("addon"),
		"EFI/Microsoft/Boot/other.efi": "not selected", "EFI/Linux/new.efi.tmp": "on its way",
		"loader/addons/y.addon.efi": fixtures.Program("addon"),
	}
	half := func(s string) string { return s[:len(s)-1] }
	for name, c := range map[string]struct {
		path, content, say string
	}{
		"boot loader is empty":      {"EFI/BOOT/BOOTX64.EFI", "", "EFI/BOOT/BOOTX64.EFI cannot be started"},
		"boot loader is text":       {"EFI/BOOT/BOOTX64.EFI", strings.Repeat("hello", 50), `expected "MZ" at 0x0, found "he"`},
		"boot loader is cut off":    {"EFI/BOOT/BOOTX64.EFI", half(fixtures.Program("boot")), `section ".text"`},
		"UKI is cut off":            {"EFI/Linux/a+3.efi", half(kernelImage("kernel")), `EFI/Linux/a+3.efi cannot be started`},
		"UKI has no kernel yet":     {"EFI/Linux/a+3.efi", kernelImage(""), "the kernel, is empty"},
		"zeros, as XFS leaves them": {"EFI/Linux/a+3.efi", strings.Repeat("\x00", 5000), `expected "MZ" at 0x0`},
		"add-on":                    {"EFI/Linux/a.efi.extra.d/x.addon.efi", "MZ", "the DOS header"},
		"global add-on":             {"loader/addons/y.addon.efi", "MZ", "the DOS header"},
		"named as efi":              {"EFI/tools/shell", "#!/bin/sh", "loader/entries/b.conf names EFI/tools/shell, which cannot be started"},
		"named as uki":              {"abc/image", half(kernelImage("kernel")), "loader/entries/c.conf names abc/image, which cannot be started"},
	} {
		t.Run(name, func(t *testing.T) {
			m := newVolume(t, geometries[2])
			if res := syncMem(t, newMemSource(good), m, Options{}); res.Err != nil {
				t.Fatal(res.Err)
			}
			before := bytes.Clone(m.Bytes())
			bad := maps.Clone(good)
			bad[c.path] = c.content
			_, err := Sync(context.Background(), newMemSource(bad), []*Target{{Name: "t", Dev: m}}, Options{})
			if !errors.Is(err, ErrSource) || !errors.Is(err, ErrRefused) || !errors.Is(err, bls.ErrPE) || !strings.Contains(err.Error(), c.say) {
				t.Fatal(err)
			}
			if !bytes.Equal(before, m.Bytes()) {
				t.Fatal("the target was written")
			}
			// The way out that the hint names: what the target has there stays.
			var hint *Hint
			if !errors.As(err, &hint) || !strings.HasSuffix(hint.Hint(), " --exclude "+c.path) {
				t.Fatalf("%q", hint.Hint())
			}
			res := syncMem(t, newMemSource(bad), m, Options{Selection: Selection{Exclude: []string{c.path}}})
			if res.Err != nil || res.Outcome != InSync {
				t.Fatal(res.Outcome, res.Err)
			}
		})
	}
}

// The headers are read from each kind of source: a stream is read no further than they reach.
func TestHeadersFromSources(t *testing.T) {
	files := map[string]string{"EFI/BOOT/BOOTX64.EFI": fixtures.Program(strings.Repeat("b", 1<<20))}
	dir := writeFiles(t, files)
	onDisk, err := OpenDirSource(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer onDisk.Close()
	m := newVolume(t, geometries[2])
	if res := syncMem(t, onDisk, m, Options{}); res.Err != nil {
		t.Fatal(res.Err)
	}
	v, err := fatdriver.Open(m)
	if err != nil {
		t.Fatal(err)
	}
	onVolume, err := OpenVolumeSource("volume", v)
	if err != nil {
		t.Fatal(err)
	}
	for name, src := range map[string]Source{"directory": onDisk, "volume": onVolume} {
		rc, err := src.Open(src.Root().lookup("EFI/BOOT/BOOTX64.EFI"))
		if err != nil {
			t.Fatal(err)
		}
		if _, ok := rc.(io.ReaderAt); !ok {
			t.Errorf("%s: a file cannot be read at an offset", name)
		}
		rc.Close()
		if err := (&run{src: src}).wholeProgram(src.Root().lookup("EFI/BOOT/BOOTX64.EFI")); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
	c := &countingSource{Source: newMemSource(files)}
	if err := (&run{src: c}).wholeProgram(c.Root().lookup("EFI/BOOT/BOOTX64.EFI")); err != nil || c.bytes.Load() != int64(len(fixtures.Program(""))) {
		t.Errorf("%d bytes read of a stream, %v", c.bytes.Load(), err)
	}
}

// What cannot be read is an error of the source, not a program that is not whole.
func TestProgramCannotBeRead(t *testing.T) {
	src := newMemSource(map[string]string{"EFI/BOOT/BOOTX64.EFI": fixtures.Program("boot")})
	src.files["EFI/BOOT/BOOTX64.EFI"] = "MZ" // it became shorter since it was listed
	_, err := Sync(context.Background(), src, nil, Options{})
	if !errors.Is(err, ErrSource) || errors.Is(err, ErrRefused) || !strings.Contains(err.Error(), "cannot read EFI/BOOT/BOOTX64.EFI: it became shorter") {
		t.Fatal(err)
	}
}

// Entries of GRUB name variables, and several files in a line.
func TestEntriesOfGRUB(t *testing.T) {
	src := newMemSource(map[string]string{
		"loader/entries/f.conf": "title Fedora\nlinux /vmlinuz-6.1\ninitrd /ucode.img /initramfs-6.1.img $tuned_initrd\noptions $kernelopts\n",
		"vmlinuz-6.1":           "kernel", "ucode.img": "ucode", "initramfs-6.1.img": "initramfs",
	})
	m := newVolume(t, geometries[2])
	if res := syncMem(t, src, m, Options{}); res.Err != nil {
		t.Fatal(res.Err)
	}
	judge(t, m, geometries[2].fats, src.files)
}
