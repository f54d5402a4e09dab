package bls

import (
	"strings"
	"testing"
)

func sign(n int) string { return string("<=>"[max(-1, min(n, 1))+1]) }

// The examples of UAPI.10, "Examples", as they stand since its pull requests 62 and 64.
func TestCompareVersionsExamples(t *testing.T) {
	for _, line := range []string{
		"11 = 11", "systemd-123 = systemd-123", "bar-123 < foo-123", "123a > 123", "123.a > 123", "123.a < 123.b",
		"123a > 123.a", "11α = 11β", "A < a", "'' < 0", "0. > 0", "0.0 > 0", "0 > ~", "'' > ~",
		"1_ = 1", "_1 = 1", "1_ < 1.2", "1_2_3 > 1.3.3", "1+ = 1", "+1 = 1", "1+ < 1.2", "1+2+3 > 1.3.3",
		// Numbers without bounds, and leading zeros.
		"00123 = 123", "99999999999999999999999 > 99999999999999999999998", "0 = 000", "1.0 < 1.00a",
		"6.1.0-13-amd64 > 6.1.0-9-amd64", "linux-6.12.10 > linux-6.12.9",
	} {
		f := strings.Fields(strings.ReplaceAll(line, "''", "\x00"))
		a, b := strings.Trim(f[0], "\x00"), strings.Trim(f[2], "\x00")
		if got := sign(CompareVersions(a, b)); got != f[1] {
			t.Errorf("%s: got %s", line, got)
		}
		if got := sign(-CompareVersions(b, a)); got != f[1] {
			t.Errorf("%s, the other way round: got %s", line, got)
		}
	}
}

// The order that systemd documents at strverscmp_improved, oldest first.
func TestCompareVersionsOrder(t *testing.T) {
	order := []string{"~1", "", "ab", "abb", "abc", "0001", "002", "12", "122", "122.9", "123~rc1-1", "123", "123-a", "123-a.1", "123-a1", "123-a1.1",
		"123-3", "123-3.1", "123^patch1", "123^1", "123.a-1", "123.1-1", "123a-1", "124"}
	for i, a := range order {
		for j, b := range order {
			if got, want := sign(CompareVersions(a, b)), sign(i-j); got != want {
				t.Errorf("%q %s %q, expected %s", a, got, b, want)
			}
		}
	}
}

// FuzzCompareVersions holds that it is an order: a sort by something else may not end, or lose entries.
func FuzzCompareVersions(f *testing.F) {
	f.Add("1.2~rc1", "1.2", "1.2^x")
	f.Add("a-1", "a.1", "a^1")
	f.Add("\xff1", "é2", "")
	f.Fuzz(func(t *testing.T, a, b, c string) {
		ab, bc, ac := sign(CompareVersions(a, b)), sign(CompareVersions(b, c)), sign(CompareVersions(a, c))
		if sign(-CompareVersions(b, a)) != ab || CompareVersions(a, a) != 0 {
			t.Fatalf("%q %q: not the same both ways", a, b)
		}
		if ab == bc && ac != ab || ab == "=" && ac != bc || bc == "=" && ac != ab {
			t.Fatalf("%q %s %q %s %q, but the first %s the last", a, ab, b, bc, c, ac)
		}
	})
}
