package bls

import (
	"math/rand/v2"
	"strings"
	"testing"
	"time"
)

func TestMatch(t *testing.T) {
	for _, c := range []struct {
		pattern, id string
		want        bool
	}{
		// Those of systemd's test-efi-string.c have the same answers in fnmatch(3).
		{"", "", true}, {"abc", "abc", true}, {"aBc", "abc", false}, {"b", "a", false}, {"b", "", false}, {"abc", "a", false}, {"a?c", "azc", true},
		{"???", "?.9", true}, {"1?", "1", false}, {"abc*", "abc", true}, {"abc*", "abcdef", true}, {"*", "", true}, {"*", "abc", true},
		{"**********", "", true}, {"a*b*c", "a_b_b_c", true}, {"a*b*c", "a_b_b_d", false}, {"*abc*", "abcxabc", true}, {"*.conf", "arch-linux-hardened.conf", true},
		{"debian-*", "debian-jessie", true}, {"[abc]", "a", true}, {"[abc]", "d", false}, {"[a-c]x", "bx", true}, {"[]a]", "]", true}, {"[a-]", "-", true},
		{"[-a]", "-", true}, {"[a-c-f]", "-", true}, {"[a-c-f]", "e", false}, {"[\\a-c]", "b", true}, {"[a-\\c]", "b", true}, {"[\\]]", "]", true},
		{"[a", "a", false}, {"[", "[", false}, {"[a-", "a", false}, {"\\*", "*", true}, {"\\*", "a", false}, {"a\\", "a", false}, {"a\\", "a\\", false},
		{"[!a]", "!", true}, {"[!a]", "b", false}, {"日*", "日本", true},
		{"a*", "b", false}, {"*a", "ab", false}, {"*a?", "aab", true},
	} {
		if got := match(c.pattern, c.id); got != c.want {
			t.Errorf("%q, %q: %v", c.pattern, c.id, got)
		}
	}
}

// A pattern cannot make the match take long.
func TestMatchIsFast(t *testing.T) {
	start := time.Now()
	if match(strings.Repeat("*a", 200)+"b", strings.Repeat("a", 5000)) {
		t.Error("it matched")
	}
	if d := time.Since(start); d > 5*time.Second {
		t.Errorf("it took %v", d)
	}
}

func TestParseConf(t *testing.T) {
	for text, want := range map[string]Conf{
		"timeout 3\ndefault Foo-*.conf\n":     {Default: "foo-*.conf"},
		"default a\ndefault b":                {Default: "b"},
		"default @SAVED\npreferred x":         {Default: "@saved", Preferred: "x"},
		"default a\ndefault @other":           {Default: "a"},
		"#default a\nDefault b\n\npreferred ": {},
	} {
		if got := ParseConf(text); got != want {
			t.Errorf("%q: %+v", text, got)
		}
	}
}

// menu makes entries of lines "NAME sort-key machine-id version", "-" for none.
func menu(lines ...string) []*Entry {
	var out []*Entry
	for _, l := range lines {
		f := strings.Fields(l + " - - -")
		text := "linux /x\n"
		for i, key := range []string{"sort-key", "machine-id", "version"} {
			if f[i+1] != "-" {
				text += key + " " + f[i+1] + "\n"
			}
		}
		out = append(out, Parse("loader/entries/"+f[0], text))
	}
	return out
}

func ids(entries []*Entry) string {
	var s []string
	for _, e := range entries {
		s = append(s, e.Name.String())
	}
	return strings.Join(s, " ")
}

func TestSort(t *testing.T) {
	order := menu(
		"z-8.conf arch - 8", // "-" of the machine ID is below any
		"b.conf arch m1 6.10", "a.conf arch m1 6.9", "c.conf arch m1 6.9~rc1", "d.conf arch m1",
		"a2.conf arch m2 9",
		"n.conf fedora m0 1",
		"x-10.conf", "x-9.conf", "w+3-0.conf", "w+2-1.conf", "w+2-2.conf", "v.conf", // no sort key: by name
		"bad-2+0-1.conf arch m1 9", "bad-1+0-1.conf arch m1 8", "y+0-3.conf",
	)
	want := ids(order)
	for range 50 {
		rand.Shuffle(len(order), func(i, j int) { order[i], order[j] = order[j], order[i] })
		Sort(order)
		if got := ids(order); got != want {
			t.Fatalf("\ngot      %s\nexpected %s", got, want)
		}
	}
}

func TestDefault(t *testing.T) {
	all := menu("a-1.conf s m 1", "a-2+3.conf s m 2", "a-3+0-3.conf s m 3", "b-1.conf")
	hidden := Parse("loader/entries/a-9.conf", "title nothing to start\nsort-key s\nmachine-id m\nversion 9\n")
	all = append(all, hidden)
	for _, c := range []struct {
		what string
		conf Conf
		efi  Vars
		want string
	}{
		{"top of the menu", Conf{}, Vars{}, "a-2+3.conf"},
		{"configured", Conf{Default: "b-*"}, Vars{}, "b-1.conf"},
		{"configured, not there", Conf{Default: "c-*"}, Vars{}, "a-2+3.conf"},
		{"by the ID without a counter", Conf{Default: "a-2.conf"}, Vars{}, "a-2+3.conf"},
		{"by the name with it, as of old", Conf{Default: "a-2+3*.conf"}, Vars{}, "a-2+3.conf"},
		{"the suffix is a part of the ID", Conf{Default: "b-1"}, Vars{}, "a-2+3.conf"},
		{"a bad one may be the default", Conf{Default: "a-3.conf"}, Vars{}, "a-3+0-3.conf"},
		{"and not be preferred", Conf{Preferred: "a-3.conf", Default: "b-1.conf"}, Vars{}, "b-1.conf"},
		{"the best match", Conf{Default: "a-*"}, Vars{}, "a-2+3.conf"},
		{"what is not in the menu", Conf{Default: "a-9.conf"}, Vars{}, "a-2+3.conf"},
		{"variable", Conf{Default: "b-*"}, Vars{Default: "A-1.conf"}, "a-1.conf"},
		{"variable, not there", Conf{Default: "b-*"}, Vars{Default: "c.conf"}, "b-1.conf"},
		{"preferred before the variable", Conf{Preferred: "b-*"}, Vars{Default: "a-1.conf"}, "b-1.conf"},
		{"preferred variable", Conf{Preferred: "b-*"}, Vars{Preferred: "a-1.conf"}, "a-1.conf"},
		{"one shot", Conf{Preferred: "b-*"}, Vars{Preferred: "a-2.conf", OneShot: "a-1.conf"}, "a-1.conf"},
		{"saved", Conf{Default: "@saved"}, Vars{LastBooted: "b-1.conf"}, "b-1.conf"},
		{"saved by the variable", Conf{Default: "a-1.conf"}, Vars{Default: "@saved", LastBooted: "b-1.conf"}, "b-1.conf"},
		{"nothing saved", Conf{Default: "@saved"}, Vars{}, "a-2+3.conf"},
	} {
		rand.Shuffle(len(all), func(i, j int) { all[i], all[j] = all[j], all[i] })
		if e := Default(all, c.conf, c.efi); e == nil || e.Name.String() != c.want {
			t.Errorf("%s: %+v, expected %s", c.what, e, c.want)
		}
	}
	if e := Default([]*Entry{hidden}, Conf{Default: "*"}, Vars{}); e != nil {
		t.Errorf("%+v of an empty menu", e)
	}
}
