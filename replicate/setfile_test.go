package replicate

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"time"
)

const (
	guidA = "6f0c5c7e-0000-4000-8000-00000000000a"
	guidB = "6f0c5c7e-0000-4000-8000-00000000000b"
	guidC = "6f0c5c7e-0000-4000-8000-00000000000c"
)

func parsed(t testing.TB, text string) *Set {
	t.Helper()
	s, err := ParseSet("esp-sync", []byte(text))
	if err != nil {
		t.Fatal(err)
	}
	if string(s.Bytes()) != text {
		t.Fatalf("the file became %q, it was %q", s.Bytes(), text)
	}
	return s
}

const fullSet = `# the disks of this machine

member ` + guidA + `   # left bay
6F0C5C7E-0000-4000-8000-00000000000B # right bay
	member	` + guidC + `
member ` + guidA + `
select loader
select "EFI/with #1 "   # quoted
exclude EFI/Linux/*.bak # old ones
exclude *#*
replace root ` + guidA + ` root=UUID=aaaa-bbbb
replace root ` + guidB + ` "root=UUID=cccc # x" # y
replace root ` + guidC + ` root=/dev/c rootflags=subvol=@
Timeout 2min 30s
keep-free 16M
colour blue # of a later version
`

func TestParseSet(t *testing.T) {
	for _, text := range []string{fullSet, "\ufeff" + fullSet, strings.ReplaceAll(fullSet, "\n", "\r\n"), strings.ReplaceAll(fullSet, "\n", "\r"), strings.TrimSuffix(fullSet, "\n")} {
		s := parsed(t, text)
		if m := s.Members(); !slices.Equal(m, []string{guidA, guidB, guidC}) {
			t.Errorf("members %v", m)
		}
		if !s.Has(strings.ToUpper(guidB)) || s.Has("x") {
			t.Error("Has")
		}
		if sel := s.Selection(); !slices.Equal(sel.Select, []string{"loader", "EFI/with #1 "}) || !slices.Equal(sel.Exclude, []string{"EFI/Linux/*.bak", "*#*"}) {
			t.Errorf("selection %q", sel)
		}
		if d, ok := s.Timeout(); !ok || d != 150*time.Second {
			t.Error("timeout", d, ok)
		}
		if n, ok := s.KeepFree(); !ok || n != 16<<20 {
			t.Error("keep-free", n, ok)
		}
		for g, want := range map[string]string{guidA: "root=UUID=aaaa-bbbb", guidB: "root=UUID=cccc # x", guidC: "root=/dev/c rootflags=subvol=@"} {
			if m := s.Texts(strings.ToUpper(g)); len(m) != 1 || m["root"] != want {
				t.Errorf("texts of %s: %q", g, m)
			}
		}
		if u := s.Unknown(); !slices.Equal(u, []string{`line 16: unknown key "colour"`}) {
			t.Errorf("unknown %q", u)
		}
		if w := s.Warnings(); len(w) != 2 || w[0] != "line 6: member "+guidA+" is there already" {
			t.Errorf("warnings %q", w)
		}
	}
}

func TestParseSetNothing(t *testing.T) {
	for _, text := range []string{"", "\n", "# only", "\ufeff", "\t \r\n#\n"} {
		s := parsed(t, text)
		_, a := s.Timeout()
		_, b := s.KeepFree()
		if len(s.Members()) > 0 || len(s.Selection().Select) > 0 || a || b || len(s.Warnings()) > 0 {
			t.Errorf("%q: %+v", text, s)
		}
	}
}

// TestParseSetMistakes has an error, with the number of the line, wherever something else than what was meant could be
// written or left out.
func TestParseSetMistakes(t *testing.T) {
	m := "member " + guidA + "\nmember " + guidB + "\n" // two good lines in front
	for line, words := range map[string]string{
		"member":                                      "line 3: member: the value is missing",
		"member # x":                                  "line 3: member: the value is missing",
		"member 6f0c5c7e-0000-4000-8000-0000":         "is not a partition GUID",
		"6f0c5c7e-0000-4000-8000-0000":                "line 3: \"6f0c5c7e-0000-4000-8000-0000\" is not a partition GUID",
		"{" + guidC + "}":                             "is not a partition GUID",
		"member " + guidC + "#x":                      "is not a partition GUID",
		"member " + guidC + " " + guidA:               "is not a partition GUID",
		guidC + " " + guidA:                           "is not a partition GUID",
		"member 6f0c5c7e-0000-4000-8000-00000000000g": "is not a partition GUID",
		"member 00000000-0000-0000-0000-000000000000": "no partition",
		"memebr " + guidC:                             `write "member" and a space`,
		"members " + guidC:                            `write "member" and a space`,
		"member=" + guidC:                             `write "member" and a space`,
		"selcet EFI":                                  `write "select"`,
		"exlude *.bak":                                `write "exclude"`,
		"exclude: *.bak":                              `write "exclude"`,
		"keepfree 1G":                                 `write "keep-free"`,
		"select":                                      "select: the value is missing",
		"select # loader":                             "select: the value is missing",
		`select ""`:                                   "select: the value is missing",
		`select "loader`:                              "quotation mark is missing",
		`select "loader"x`:                            "follows the closing",
		`select "loader" x`:                           "follows the closing",
		"select loader/../x":                          "not the name of a file",
		"select loader/random-seed":                   "belongs to one ESP alone",
		"select EFI/espmirror":                        "belongs to one ESP alone",
		"exclude":                                     "exclude: the value is missing",
		"exclude [":                                   "not a path or pattern",
		"exclude /":                                   "not a path or pattern",
		"replace root":                                "it takes a name",
		"replace root " + guidA:                       "it takes a name",
		"replace root " + guidA + " # x":              "it takes a name",
		"replace root " + guidA + ` ""`:               "it takes a name",
		"replace ro/ot " + guidA + " x":               "not a name",
		"replace root x y":                            "not a partition GUID",
		"replace root " + guidC + " root=x":           "line 3: a text for " + guidC + ", which is not a member",
		"replace r " + guidA + " x\nreplace r " + guidA + " y": "line 4: replace: the text for r of " + guidA + " is in line 3 already",
		"replace r " + guidA + " x\nreplace s " + guidA + " x": "line 4: replace: s has the text of r",
		"keep-free 16X":                        "not a size",
		"keep-free -1":                         "not a size",
		"keep-free 9000000000000T":             "too large",
		"m\x00":                                "zero byte",
		"# " + strings.Repeat("x", MaxSetSize): "at most 65536",
	} {
		_, err := ParseSet("/efi/loader/esp-sync", []byte(m+line+"\n"))
		if !errors.Is(err, ErrSet) || !strings.Contains(err.Error(), words) || !strings.HasPrefix(err.Error(), "cannot read the replica set file /efi/loader/esp-sync: ") {
			t.Errorf("%q: %v, want %q", line, err, words)
		}
	}
	for line, words := range map[string]string{
		"colour":                     `unknown key "colour"`,
		"generations 4":              `unknown key "generations"`,
		"timeout":                    "timeout: \"\" is not a time",
		"select loader EFI/Linux":    "\"loader EFI/Linux\" is taken for one path",
		"exclude a b":                "exclude: \"a b\" is taken for one path",
		"timeout soon":               "not a time",
		"timeout -3s":                "not a time",
		"timeout 900h":               "longer than a day",
		"timeout 3\ntimeout 4":       "line 4: timeout: it is given twice",
		"keep-free 1G\nkeep-free 2M": "line 4: keep-free: it is given twice",
		"replace r " + guidA + " x":  "member " + guidB + " has no text for r",
	} {
		s := parsed(t, m+line)
		if w := s.Warnings(); len(w) != 1 || !strings.Contains(w[0], words) {
			t.Errorf("%q: warnings %q, want %q", line, w, words)
		}
	}
	s := parsed(t, m+"keep-free 1G\nkeep-free 2M\ntimeout 3\ntimeout 4\ntimeout x\nreplace r "+guidA+" x")
	if n, _ := s.KeepFree(); n != 1<<30 {
		t.Error("the larger size counts:", n)
	}
	if d, _ := s.Timeout(); d != 4*time.Second {
		t.Error("the last time counts:", d)
	}
	if a, b := s.Incomplete(guidA), s.Incomplete(strings.ToUpper(guidB)); len(a) > 0 || !slices.Equal(b, []string{"r"}) {
		t.Error("incomplete:", a, b)
	}
}

func TestSetAdd(t *testing.T) {
	for _, c := range [][3]string{ // before, comment, after
		{"", "", "member " + guidC + "\n"},
		{"# x\n", "bay 3", "# x\nmember " + guidC + " # bay 3\n"},
		{"# x", "a\nselect b", "# x\nmember " + guidC + " # a select b"},
		{"\ufeff" + guidA, "", "\ufeff" + guidA + "\nmember " + guidC},
		{"member " + guidA + " # a\r\n\r\nselect x\r\n", "", "member " + guidA + " # a\r\nmember " + guidC + "\r\n\r\nselect x\r\n"},
		{"x\rmember " + guidA + "\n\n", "", "x\rmember " + guidA + "\nmember " + guidC + "\n\n"},
		{guidA + "\nselect x\nmember " + guidB + "\n# end", "", guidA + "\nselect x\nmember " + guidB + "\nmember " + guidC + "\n# end"},
	} {
		s := parsed(t, c[0])
		n := len(s.Members())
		if ok, err := s.Add(strings.ToUpper(guidC), c[1]); !ok || err != nil || string(s.Bytes()) != c[2] {
			t.Errorf("%q: %v, %v, %q, want %q", c[0], ok, err, s.Bytes(), c[2])
		}
		if m := s.Members(); len(m) != n+1 || m[n] != guidC {
			t.Errorf("%q: members %v", c[0], m)
		}
		if ok, err := s.Add(guidC, "again"); ok || err != nil || string(s.Bytes()) != c[2] {
			t.Errorf("%q: again: %v, %v, %q", c[0], ok, err, s.Bytes())
		}
		// Taking it out again leaves the file as it was, but for the newline that the last line of it had to get.
		if !s.Remove(guidC) || strings.TrimRight(string(s.Bytes()), "\r\n") != strings.TrimRight(c[0], "\r\n") {
			t.Errorf("%q: removed: %q", c[0], s.Bytes())
		}
	}
	s := parsed(t, "member "+guidA+"\n")
	if ok, err := s.Add("x", ""); ok || err == nil {
		t.Error("x is no GUID")
	}
	s = parsed(t, strings.Repeat("#", MaxSetSize))
	if ok, err := s.Add(guidA, ""); ok || !errors.Is(err, ErrSet) || len(s.Bytes()) != MaxSetSize || s.Has(guidA) {
		t.Errorf("a file of the largest size: %v, %v", ok, err)
	}
}

func TestSetRemove(t *testing.T) {
	s := parsed(t, "\ufeff"+fullSet)
	if s.Remove("x") || s.Remove("6f0c5c7e-0000-4000-8000-00000000000d") {
		t.Error("removed what is not there")
	}
	want := ""
	for line := range strings.Lines("\ufeff" + fullSet) {
		if !strings.Contains(line, guidA) {
			want += line
		}
	}
	if !s.Remove(strings.ToUpper(guidA)) || string(s.Bytes()) != want {
		t.Errorf("have %q\nwant %q", s.Bytes(), want)
	}
	if s.Has(guidA) || s.Texts(guidA) != nil || s.Remove(guidA) {
		t.Error("it is still there")
	}
	s = parsed(t, guidA)
	if !s.Remove(guidA) || len(s.Bytes()) > 0 {
		t.Errorf("%q", s.Bytes())
	}
}

func TestRewrite(t *testing.T) {
	a := map[string]string{"root": "root=UUID=aaaa", "luks": "1111-2222", "flags": "rootflags=subvol=@", "long": "root=UUID=aaaa ro", "only a": "only-a"}
	b := map[string]string{"root": "root=UUID=bbbb", "luks": "3333", "flags": "rootflags=subvol=/@b", "long": "root=PARTLABEL=b", "only b": "only-b"}
	for in, want := range map[string]string{
		"":                                   "",
		"options root=UUID=aaaa rw":          "options root=UUID=bbbb rw",
		"root=UUID=aaaa":                     "root=UUID=bbbb",
		"root=UUID=aaaa ro":                  "root=PARTLABEL=b", // the longest one
		"root=UUID=aaaa\troot=UUID=aaaa\r\n": "root=UUID=bbbb\troot=UUID=bbbb\r\n",
		"root=UUID=aaaab root=UUID=aaaa-b xroot=UUID=aaaa @root=UUID=aaaa": "root=UUID=aaaab root=UUID=aaaa-b xroot=UUID=aaaa @root=UUID=aaaa",
		"root=UUID=aaaaé": "root=UUID=aaaaé",
		"rd.luks.name=1111-2222=x cryptdevice=UUID=1111-2222:root": "rd.luks.name=3333=x cryptdevice=UUID=3333:root",
		"/dev/disk/by-uuid/1111-2222":                              "/dev/disk/by-uuid/3333",
		"rootflags=subvol=@,ro rootflags=subvol=@home":             "rootflags=subvol=/@b,ro rootflags=subvol=@home",
		"only-a only-b root=UUID=bbbb":                             "only-a only-b root=UUID=bbbb",
		`options "root=UUID=aaaa"`:                                 `options "root=UUID=bbbb"`,
	} {
		if have := Rewrite([]byte(in), a, b); string(have) != want {
			t.Errorf("%q became %q, want %q", in, have, want)
		}
		if have := Rewrite([]byte(in), a, a); string(have) != in {
			t.Errorf("%q became %q on the same member", in, have)
		}
	}
	// Two names that change places.
	x, y := map[string]string{"1": "A", "2": "B"}, map[string]string{"1": "B", "2": "A"}
	if have := Rewrite([]byte("A B A,B AB"), x, y); string(have) != "B A B,A AB" {
		t.Errorf("%q", have)
	}
	if have := Rewrite([]byte("A"), nil, y); string(have) != "A" {
		t.Errorf("%q", have)
	}
}

func TestCanonical(t *testing.T) {
	a := map[string]string{"root": "root=A"}
	for in, want := range map[string]string{
		"x root=A y": "x \x00root\x00 y", "\x00root\x00": "\x00\x00root\x00\x00", "root=AB": "root=AB", "root": "root",
	} {
		if have := Canonical([]byte(in), a); string(have) != want {
			t.Errorf("%q: %q, want %q", in, have, want)
		}
	}
	b := map[string]string{"root": "root=B"}
	for in, want := range map[string]bool{"root=A": true, "x": true, "root=B": false, "root=A root=B": false, "root=BB": true} {
		if have := Faithful([]byte(in), a, b); have != want {
			t.Errorf("%q: %v", in, have)
		}
	}
}

// plain undoes Canonical.
func plain(t testing.TB, b []byte, texts map[string]string) []byte {
	var out []byte
	for len(b) > 0 {
		if b[0] != 0 {
			out, b = append(out, b[0]), b[1:]
			continue
		}
		i := bytes.IndexByte(b[1:], 0)
		if i < 0 {
			t.Fatalf("a zero byte too few: %q", b)
		}
		if i == 0 {
			out = append(out, 0)
		} else {
			out = append(out, texts[string(b[1:1+i])]...)
		}
		b = b[i+2:]
	}
	return out
}

// TestRewriteProperty takes random entries from member to member: what is built of words that neither member's texts are
// made of goes there and back, and looks alike on both.
func TestRewriteProperty(t *testing.T) {
	rng := rand.New(rand.NewPCG(7, 7))
	pick := func(of ...string) string { return of[rng.IntN(len(of))] }
	for range 20000 {
		a, b := map[string]string{}, map[string]string{}
		var names []string
		for i := range 1 + rng.IntN(3) {
			n := fmt.Sprint("n", i)
			names = append(names, n)
			// Letters of a's texts are no letters of b's, and of neither the rest's; one text may begin as another one does.
			a[n] = strings.Repeat(pick("a", "ab", "a b", "a=b"), 1+rng.IntN(2)) + fmt.Sprint(i)
			b[n] = strings.Repeat(pick("c", "cd", "c d", "c:d"), 1+rng.IntN(2)) + fmt.Sprint(i)
		}
		var text, want strings.Builder
		for range rng.IntN(8) {
			if rng.IntN(2) == 0 {
				n := names[rng.IntN(len(names))]
				text.WriteString(a[n])
				want.WriteString(b[n])
			} else {
				w := pick("x", "xy", "x=y", "\x00", "é")
				text.WriteString(w)
				want.WriteString(w)
			}
			sep := pick(" ", "=", "\n", "  ", ",", "")
			if sep == "" {
				sep = "/"
			}
			text.WriteString(sep)
			want.WriteString(sep)
		}
		in := []byte(text.String())
		out := Rewrite(in, a, b)
		// A text that is part of a longer one makes two readings possible; then what was built is not what is read.
		if back := Rewrite(out, b, a); !bytes.Equal(back, in) && Faithful(in, a, b) {
			t.Fatalf("%q %q: %q became %q and came back as %q", a, b, in, out, back)
		}
		if distinct(a) && distinct(b) && string(out) != want.String() {
			t.Fatalf("%q %q: %q became %q, want %q", a, b, in, out, want.String())
		}
		if distinct(a) && distinct(b) && (!Faithful(in, a, b) || !bytes.Equal(Canonical(out, b), Canonical(in, a))) {
			t.Fatalf("%q %q: %q became %q: %q, %q", a, b, in, out, Canonical(in, a), Canonical(out, b))
		}
		if p := plain(t, Canonical(in, a), a); !bytes.Equal(p, in) {
			t.Fatalf("%q: %q became %q", a, in, p)
		}
	}
}

// distinct says that no text is part of another one.
func distinct(m map[string]string) bool {
	for n, s := range m {
		for o, u := range m {
			if n != o && strings.Contains(u, s) {
				return false
			}
		}
	}
	return true
}

func FuzzParseSet(f *testing.F) {
	for _, s := range []string{"", fullSet, "\ufeff" + strings.ReplaceAll(fullSet, "\n", "\r\n"), guidA, "timeout 1\rtimeout 2", "select \"a\"#"} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, text []byte) {
		s, err := ParseSet("x", text)
		if err != nil {
			if !errors.Is(err, ErrSet) {
				t.Fatal(err)
			}
			return
		}
		if !bytes.Equal(s.Bytes(), text) {
			t.Fatalf("%q became %q", text, s.Bytes())
		}
		members := s.Members()
		had := s.Has(guidC)
		ok, err := s.Add(guidC, string(text))
		if err != nil {
			if !bytes.Equal(s.Bytes(), text) {
				t.Fatal("changed by an error")
			}
			return
		}
		if ok == had || !s.Has(guidC) || had && !bytes.Equal(s.Bytes(), text) {
			t.Fatalf("added: %v, %v", ok, had)
		}
		if ok && (!slices.Equal(s.Members(), append(slices.Clone(members), guidC)) || len(s.Bytes()) <= len(text)) {
			t.Fatalf("members %v became %v", members, s.Members())
		}
		if ok && (!s.Remove(guidC) || !slices.Equal(s.Members(), members) || !bytes.HasPrefix(s.Bytes(), text)) {
			t.Fatalf("%q became %q", text, s.Bytes())
		}
		for _, g := range members {
			if !s.Remove(g) || s.Has(g) || s.Texts(g) != nil {
				t.Fatalf("%s cannot be removed", g)
			}
		}
	})
}

func FuzzRewrite(f *testing.F) {
	f.Add([]byte("options root=A ro\n"), "root=A", "root=B", "ro", "rw")
	f.Add([]byte("A B"), "A", "B", "B", "A")
	f.Fuzz(func(t *testing.T, text []byte, a1, b1, a2, b2 string) {
		a, b := map[string]string{"1": a1, "2": a2}, map[string]string{"1": b1, "2": b2}
		out := Rewrite(text, a, b)
		if !bytes.Equal(Rewrite(text, a, a), text) && a1 != a2 {
			t.Fatal("it changes on its own member")
		}
		if p := plain(t, Canonical(text, a), a); !bytes.Equal(p, text) {
			t.Fatalf("%q became %q", text, p)
		}
		if a1 != a2 && b1 != b2 && b1 != "" && b2 != "" && Faithful(text, a, b) && !bytes.Equal(Rewrite(out, b, a), text) {
			t.Fatalf("%q became %q, and came back as %q", text, out, Rewrite(out, b, a))
		}
	})
}
