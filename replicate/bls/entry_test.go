package bls

import (
	"fmt"
	"slices"
	"strings"
	"testing"
)

// The example of UAPI.1, "Type #1 Boot Loader Entry Keys", with all other keys added.
func TestParse(t *testing.T) {
	const dir = "6a9857a393724b7a981ebb5b8495b9ea/3.8.0-2.fc19.x86_64"
	e := Parse(`loader\entries\6a9857a393724b7a981ebb5b8495b9ea-3.8.0-2.fc19.x86_64+3-0.conf`, `# /boot/loader/entries/…conf
title        Fedora 19 (Rawhide)
sort-key     fedora
machine-id   6a9857a393724b7a981ebb5b8495b9ea
version      3.8.0-2.fc19.x86_64
options      root=UUID=6d3376e4-fc93-4509-95ec-a21d68011da2 quiet
options      rw
architecture x64
linux        /`+dir+`/linux
initrd       /`+dir+`/initrd
devicetree   `+dir+`/a.dtb
devicetree-overlay /`+dir+`/overlay_A.dtbo /`+dir+`/overlay_B.dtbo
extra        /`+dir+`/somedata.cred
extra        /`+dir+`/x.addon.efi
profile      2
`)
	want := []Ref{
		{"linux", dir + "/linux", 9}, {"initrd", dir + "/initrd", 10}, {"devicetree", dir + "/a.dtb", 11},
		{"devicetree-overlay", dir + "/overlay_A.dtbo", 12}, {"devicetree-overlay", dir + "/overlay_B.dtbo", 12},
		{"extra", dir + "/somedata.cred", 13}, {"extra", dir + "/x.addon.efi", 14},
	}
	if !slices.Equal(e.Files, want) {
		t.Errorf("files %v\nexpected %v", e.Files, want)
	}
	if e.ID != "6a9857a393724b7a981ebb5b8495b9ea-3.8.0-2.fc19.x86_64.conf" || e.Name.State() != Indeterminate || e.Title != "Fedora 19 (Rawhide)" ||
		e.SortKey != "fedora" || e.MachineID != "6a9857a393724b7a981ebb5b8495b9ea" || e.Version != "3.8.0-2.fc19.x86_64" || e.Architecture != "x64" ||
		strings.Join(e.Options, " ") != "root=UUID=6d3376e4-fc93-4509-95ec-a21d68011da2 quiet rw" || e.Loader != "linux" || e.Profile != 2 || e.Hidden() {
		t.Errorf("%+v", e)
	}
}

// Each line as systemd-boot's line_get_key_value reads it.
func TestParseLines(t *testing.T) {
	for text, files := range map[string]string{
		"linux /a":                                "linux=a",
		"  linux\t \t/a \t":                       "linux=a",
		"linux /a\r\ninitrd /b\r\n":               "linux=a initrd=b",
		"linux /a\rinitrd /b":                     "linux=a initrd=b",
		"\uFEFFlinux /a":                          "linux=a",
		"#linux /a\n # linux /a\nlinux":           "",
		"linux \"/a b\"":                          "linux=a b",
		"linux '/a'":                              "linux=a",
		"linux \"":                                "",
		"linux \"/a'":                             "linux=\"/a'",
		"linux /a b/c":                            "linux=a b/c",
		"linux a#b":                               "linux=a#b",
		"Linux /a\nLINUX /b":                      "",
		"linux=/a":                                "",
		"linux /a\x00\ninitrd /b":                 "linux=a",
		"linux \\\\EFI\\x//y/":                    "linux=EFI/x/y",
		"linux /":                                 "",
		"linux /a\nlinux /b":                      "linux=a linux=b",
		"efi /EFI/shell.efi":                      "efi=EFI/shell.efi",
		"uki /EFI/Linux/x.efi":                    "uki=EFI/Linux/x.efi",
		"uki-url http://a/b.efi":                  "",
		"initrd /ucode.img /initrd.img":           "initrd=ucode.img initrd=initrd.img",
		"initrd /initramfs-6.1.img $tuned_initrd": "initrd=initramfs-6.1.img",
		"linux $kernel\ndevicetree-overlay $a /b": "devicetree-overlay=b",
		"initrd $tuned_initrd":                    "",
		"initrd $x \t/a":                          "initrd=a",
		"initrd $x a.img":                         "initrd=a.img",
		"initrd /my  dir/a b.img \\c":             "initrd=my  dir/a b.img initrd=c",
		"initrd a/b c/d":                          "initrd=a/b c/d",
		"addons /a\nfoo /b":                       "",
		"":                                        "",
	} {
		e := Parse("x.conf", text)
		var got []string
		for _, f := range e.Files {
			got = append(got, strings.Replace(fmt.Sprint(f.Key, "=", f.Path), "= ", "=", 1))
		}
		if s := strings.Join(got, " "); s != files {
			t.Errorf("%q: %q, expected %q", text, s, files)
		}
	}
}

// What does not say what to start, or says it twice differently, is not in the menu.
func TestHidden(t *testing.T) {
	for text, hidden := range map[string]bool{
		"linux /a": false, "efi /a": false, "uki /a": false, "uki-url http://x/a.efi": false,
		"title a": true, "initrd /a": true, "": true, "linux /a\nefi /b": true, "uki /a\nlinux /b\nuki /a": true, "linux /a\nlinux /b": false,
	} {
		if got := Parse("a.conf", text).Hidden(); got != hidden {
			t.Errorf("%q: %v", text, got)
		}
	}
	for path, hidden := range map[string]bool{"a.conf": false, ".a.conf": true, "auto-a.conf": true, "a.conf~": true} {
		if got := Parse(path, "linux /a").Hidden(); got != hidden {
			t.Errorf("%q: %v", path, got)
		}
	}
}

// FuzzParse holds that what an entry refers to are clean relative paths.
func FuzzParse(f *testing.F) {
	for _, s := range []string{"linux /a\ninitrd /b /c $d", "devicetree-overlay a b", "\uFEFFefi \"x\"", "linux '", "default @saved\npreferred a*", "ID=x\nVERSION='1'"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		e := Parse("loader/entries/x+1.conf", s)
		for _, r := range e.Files {
			if r.Path == "" || strings.HasPrefix(r.Path, "/") || strings.ContainsAny(r.Path, "\\\n\r\x00") || strings.Contains(r.Path, "//") {
				t.Fatalf("%q refers to %q", s, r.Path)
			}
			if r.Line < 1 || r.Line > strings.Count(s, "\n")+strings.Count(s, "\r")+1 {
				t.Fatalf("%q: line %d", s, r.Line)
			}
		}
		ParseConf(s)
		ParseOSRelease(s)
	})
}
