package replicate

import (
	"fmt"
	"math"
	"strconv"
	"strings"
	"time"
)

// ParseSize reads a number of bytes with an optional K, M, G or T, which are powers of 1024.
func ParseSize(s string) (int64, error) {
	digits, shift := s, 0
	if n := len(s); n > 0 {
		if i := strings.IndexByte("KMGT", s[n-1]&^0x20); i >= 0 {
			digits, shift = s[:n-1], 10*(i+1)
		}
	}
	n, err := strconv.ParseUint(digits, 10, 63)
	if err != nil {
		return 0, fmt.Errorf("%q is not a size such as 4096, 64M or 1G", s)
	}
	if n > math.MaxInt64>>shift {
		return 0, fmt.Errorf("%s is too large", s)
	}
	return int64(n) << shift, nil
}

// timeUnits are the units of systemd.time(7) that a timeout can sensibly have.
var timeUnits = map[string]time.Duration{
	"": time.Second, "s": time.Second, "sec": time.Second, "second": time.Second, "seconds": time.Second,
	"ms": time.Millisecond, "msec": time.Millisecond,
	"m": time.Minute, "min": time.Minute, "minute": time.Minute, "minutes": time.Minute,
	"h": time.Hour, "hr": time.Hour, "hour": time.Hour, "hours": time.Hour,
}

// ParseTime reads a span of time as systemd writes it: numbers with units, which add up, such as "5s", "2min", "1min 30s",
// "1.5s"; a number without a unit is seconds.
func ParseTime(s string) (time.Duration, error) {
	bad := fmt.Errorf("%q is not a time such as 5s, 2min or 500ms", s)
	const digits, space = "0123456789.", " \t"
	rest, sum := strings.TrimSpace(s), time.Duration(0)
	if rest == "" {
		return 0, bad
	}
	for rest != "" {
		number := rest[:len(rest)-len(strings.TrimLeft(rest, digits))]
		rest = strings.TrimLeft(rest[len(number):], space)
		word := rest
		if i := strings.IndexAny(rest, digits+space); i >= 0 {
			word = rest[:i]
		}
		rest = strings.TrimLeft(rest[len(word):], space)
		unit, ok := timeUnits[word]
		n, err := strconv.ParseFloat(number, 64)
		if !ok || err != nil {
			return 0, bad
		}
		n *= float64(unit)
		if n > float64(math.MaxInt64-sum)/2 { // with room for what rounding adds
			return 0, fmt.Errorf("%s is too long", s)
		}
		sum += time.Duration(math.Round(n))
	}
	return sum, nil
}
