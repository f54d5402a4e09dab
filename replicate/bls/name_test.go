package bls

import "testing"

func TestParseName(t *testing.T) {
	for _, c := range []struct {
		name, base  string
		left, done  uint
		state       State
		key         string
		good        string
		initial     string
		extra       string
		notAnEntry  bool
		withCounter bool
	}{
		// The series of systemd-boot's boot_entry_parse_tries.
		{name: "foobar+3.efi", base: "foobar", left: 3, state: Indeterminate, key: "foobar.efi", good: "foobar.efi", initial: "foobar+3.efi", extra: "foobar.efi.extra.d", withCounter: true},
		{name: "foobar+2-1.efi", base: "foobar", left: 2, done: 1, state: Indeterminate, key: "foobar.efi", good: "foobar.efi", initial: "foobar+3-0.efi", extra: "foobar.efi.extra.d", withCounter: true},
		{name: "foobar+0-4.efi", base: "foobar", done: 4, state: Bad, key: "foobar.efi", good: "foobar.efi", initial: "foobar+4-0.efi", extra: "foobar.efi.extra.d", withCounter: true},
		{name: "foobar.efi", base: "foobar", key: "foobar.efi", good: "foobar.efi", initial: "foobar.efi", extra: "foobar.efi.extra.d"},
		// Digits are kept, unless the sum has more.
		{name: "a+09-01.conf", base: "a", left: 9, done: 1, state: Indeterminate, key: "a.conf", good: "a.conf", initial: "a+10-00.conf", withCounter: true},
		{name: "a+9-1.conf", base: "a", left: 9, done: 1, state: Indeterminate, key: "a.conf", good: "a.conf", initial: "a+10-0.conf", withCounter: true},
		{name: "a+003-000.conf", base: "a", left: 3, state: Indeterminate, key: "a.conf", good: "a.conf", initial: "a+003-000.conf", withCounter: true},
		{name: "a+00.conf", base: "a", state: Bad, key: "a.conf", good: "a.conf", initial: "a+00.conf", withCounter: true},
		{name: "Fedora-6.1+3-0.CONF", base: "Fedora-6.1", left: 3, state: Indeterminate, key: "fedora-6.1.conf", good: "Fedora-6.1.CONF", initial: "Fedora-6.1+3-0.CONF", withCounter: true},
		// The last "+" counts, and the counter must touch the suffix.
		{name: "a+b+2.conf", base: "a+b", left: 2, state: Indeterminate, key: "a+b.conf", good: "a+b.conf", initial: "a+b+2.conf", withCounter: true},
		{name: "a+2+b.conf", base: "a+2+b", key: "a+2+b.conf", good: "a+2+b.conf", initial: "a+2+b.conf"},
		{name: "6.1.0+deb12.conf", base: "6.1.0+deb12", key: "6.1.0+deb12.conf", good: "6.1.0+deb12.conf", initial: "6.1.0+deb12.conf"},
		{name: "a+2-.conf", base: "a+2-", key: "a+2-.conf", good: "a+2-.conf", initial: "a+2-.conf"},
		{name: "a+-1.conf", base: "a+-1", key: "a+-1.conf", good: "a+-1.conf", initial: "a+-1.conf"},
		{name: "a+2-1-0.conf", base: "a+2-1-0", key: "a+2-1-0.conf", good: "a+2-1-0.conf", initial: "a+2-1-0.conf"},
		{name: "a+2147483648.conf", base: "a+2147483648", key: "a+2147483648.conf", good: "a+2147483648.conf", initial: "a+2147483648.conf"},
		{name: "a+2147483647.conf", base: "a", left: 2147483647, state: Indeterminate, key: "a.conf", good: "a.conf", initial: "a+2147483647.conf", withCounter: true},
		{name: "a+99999999999999999999.conf", base: "a+99999999999999999999", key: "a+99999999999999999999.conf", good: "a+99999999999999999999.conf", initial: "a+99999999999999999999.conf"},
		{name: "+3.conf", left: 3, state: Indeterminate, key: ".conf", good: ".conf", initial: "+3.conf", withCounter: true},
		{name: "Größe.conf", base: "Größe", key: "größe.conf", good: "Größe.conf", initial: "Größe.conf"},
		{name: "a.conf.bak", notAnEntry: true},
		{name: "conf", notAnEntry: true},
		{name: ".hidden.conf", notAnEntry: true},
		{name: "AUTO-windows.conf", notAnEntry: true},
		{name: "", notAnEntry: true},
	} {
		n, ok := ParseName(c.name)
		if ok == c.notAnEntry {
			t.Errorf("%q: taken for an entry: %v", c.name, ok)
		}
		if !ok {
			continue
		}
		if n.Base != c.base || n.Counter.Left != c.left || n.Counter.Done != c.done || n.Counter.Present != c.withCounter || n.State() != c.state {
			t.Errorf("%q: %+v, %s", c.name, n, n.State())
		}
		if n.String() != c.name || n.Key() != c.key || n.Good() != c.good || n.Initial() != c.initial || n.ExtraDir() != c.extra {
			t.Errorf("%q: name %q, key %q, good %q, initial %q, directory %q", c.name, n, n.Key(), n.Good(), n.Initial(), n.ExtraDir())
		}
	}
}

// A counter goes from one name to another, and can be changed or made.
func TestCounter(t *testing.T) {
	from, _ := ParseName("old+09-01.conf")
	to, _ := ParseName("New+3.conf")
	to.Counter = from.Counter
	if to.String() != "New+09-01.conf" {
		t.Error(to)
	}
	to.Counter.Left, to.Counter.Done = 8, 2
	if to.String() != "New+08-02.conf" {
		t.Error(to)
	}
	for want, c := range map[string]Counter{
		"": {}, "+3": {Present: true, Left: 3}, "+0": {Present: true}, "+2-1": {Present: true, Left: 2, Done: 1}, "+0-12": {Present: true, Done: 12},
	} {
		if c.String() != want {
			t.Errorf("%+v is %q, expected %q", c, c, want)
		}
	}
}

func TestParseExtraDir(t *testing.T) {
	for dir, key := range map[string]string{
		"foo.efi.extra.d": "foo.efi", "foo+3-0.EFI.Extra.D": "foo.efi", "foo.conf.extra.d": "", "foo.efi": "", "extra.d": "", ".efi.extra.d": "",
	} {
		if n, ok := ParseExtraDir(dir); ok != (key != "") || ok && n.Key() != key {
			t.Errorf("%q: %v, %v", dir, n, ok)
		}
	}
}

// FuzzParseName holds what callers rely on: a name is put together again, and each form of it has the same key.
func FuzzParseName(f *testing.F) {
	for _, s := range []string{"a+3.conf", "a+2-1.efi", "a+09-01.CONF", "+.conf", "a+b+0.efi", "x.efi.extra.d", "\xff+1.efi"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		ParseExtraDir(s)
		n, ok := ParseName(s)
		if !ok {
			return
		}
		if n.String() != s {
			t.Fatalf("%q became %q", s, n)
		}
		again, ok := ParseName(n.Initial())
		if !ok || again.Key() != n.Key() || again.Counter.Present != n.Counter.Present {
			t.Fatalf("%q: its initial name %q has the key %q, not %q", s, n.Initial(), again.Key(), n.Key())
		}
		if again.Counter.Done != 0 || len(n.Initial()) < len(s) {
			t.Fatalf("%q: its initial name is %q", s, n.Initial())
		}
	})
}
