package replicate

import (
	"testing"
	"time"
)

func TestParseTime(t *testing.T) {
	for in, want := range map[string]time.Duration{
		"0": 0, "5": 5 * time.Second, "5s": 5 * time.Second, "500ms": 500 * time.Millisecond, "2min": 2 * time.Minute, "1m": time.Minute,
		"1min 30s": 90 * time.Second, "1min30s": 90 * time.Second, " 1.5s ": 1500 * time.Millisecond, "1h": time.Hour, "2 min": 2 * time.Minute,
		"0s": 0, "7": 7 * time.Second, "10s": 10 * time.Second, "2 min 5 sec": 125 * time.Second, "1 hour 1minutes": time.Hour + time.Minute, "3m": 3 * time.Minute, "1\t2": 3 * time.Second, "1 2": 3 * time.Second, ".5s": 500 * time.Millisecond, "100000h": 100000 * time.Hour,
	} {
		if got, err := ParseTime(in); err != nil || got != want {
			t.Errorf("%q: %v %v, want %v", in, got, err, want)
		}
	}
	for _, bad := range []string{"", " ", "s", "-1s", "+1s", "5x", "infinity", "1..5s", ".", "1e3", "0x10", "5s,", "99999999999h", "1d", "5S"} {
		if got, err := ParseTime(bad); err == nil {
			t.Errorf("%q: %v", bad, got)
		}
	}
}

func TestParseSize(t *testing.T) {
	for in, want := range map[string]int64{"0": 0, "512": 512, "4K": 4096, "4k": 4096, "64M": 64 << 20, "1G": 1 << 30, "2T": 2 << 40, "9223372036854775807": 1<<63 - 1} {
		if got, err := ParseSize(in); err != nil || got != want {
			t.Errorf("ParseSize(%q) = %d, %v, want %d", in, got, err, want)
		}
	}
	for _, in := range []string{"", "K", "-1", "+1", "1.5M", "1 M", "0x10", "9223372036854775808", "8388608T", "1KB", "1_000"} {
		if got, err := ParseSize(in); err == nil {
			t.Errorf("ParseSize(%q) = %d, want an error", in, got)
		}
	}
}
