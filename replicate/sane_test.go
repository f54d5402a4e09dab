package replicate

import (
	"bytes"
	"context"
	"errors"
	"log/slog"
	"strings"
	"testing"
)

// A source with an entry whose files are not all there is refused before any target is touched.
func TestHalfWrittenSource(t *testing.T) {
	good := map[string]string{
		"loader/entries/a.conf": "title a\nlinux /abc/linux\ninitrd /abc/initrd\n",
		"abc/linux":             "kernel", "abc/initrd": "initrd",
		"EFI/BOOT/BOOTX64.EFI": "MZ",
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
		"loader/entries/a.conf": "linux /abc/linux\n", "abc/linux": "kernel", "EFI/BOOT/BOOTX64.EFI": "MZ",
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
