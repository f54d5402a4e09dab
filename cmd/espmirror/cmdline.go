package main

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"time"

	"espmirror/blockdev"
	"espmirror/replicate"
)

// maxCommandLine is more than any kernel takes (COMMAND_LINE_SIZE is 4096 bytes at most on common machines).
const maxCommandLine = 64 << 10

// earlyMode is what `early` does.
type earlyMode string

const (
	earlyOff     earlyMode = "off"
	earlyRecover earlyMode = "recover"
	earlySync    earlyMode = "sync"
)

// bootOptions are what the kernel command line says to espmirror. Fields that it does not set are zero.
type bootOptions struct {
	mode    earlyMode
	timeout *time.Duration
	limit   time.Duration
}

// readBootOptions reads the kernel command line. What is wrong with it comes back in words, and is as if it was not there:
// a typing error at the boot menu must not keep a machine from starting.
func readBootOptions(sys blockdev.System) (bootOptions, []string) {
	f, err := os.Open(sys.Path("/proc/cmdline"))
	if err != nil {
		return bootOptions{}, []string{fmt.Sprintf("cannot read the kernel command line: %v", errors.Unwrap(err))}
	}
	defer f.Close()
	text, err := io.ReadAll(io.LimitReader(f, maxCommandLine+1))
	if err != nil {
		return bootOptions{}, []string{fmt.Sprintf("cannot read the kernel command line: %v", err)}
	}
	var problems []string
	if len(text) > maxCommandLine {
		text = text[:max(0, bytes.LastIndexByte(text[:maxCommandLine], ' '))] // the last one may be cut in two
		problems = append(problems, fmt.Sprintf("only the first %d bytes of the kernel command line are read", maxCommandLine))
	}
	o, more := parseBootOptions(string(text))
	return o, append(problems, more...)
}

// parseBootOptions picks out our own parameters. As in the kernel, the last of several with one name counts.
func parseBootOptions(text string) (bootOptions, []string) {
	var o bootOptions
	var problems []string
	bad := func(p bootParam, format string, a ...any) {
		problems = append(problems, fmt.Sprintf("%q on the kernel command line counts for nothing: ", clip(p.String(), 80))+fmt.Sprintf(format, a...))
	}
	for _, p := range bootParams(text) {
		switch p.name {
		case "espmirror":
			switch p.value {
			case "no", "off", "0":
				o.mode = earlyOff
			case "recover":
				o.mode = earlyRecover
			case "yes", "sync", "on", "1":
				o.mode = earlySync
			default:
				if p.hasValue {
					bad(p, "it is not yes, no or recover")
				} else {
					o.mode = earlySync
				}
			}
		case "espmirror.timeout", "espmirror.limit":
			d, err := replicate.ParseTime(p.value)
			switch {
			case err != nil:
				bad(p, "it is not a time such as 5s, 2min or 500ms")
			case p.name == "espmirror.timeout":
				o.timeout = &d
			case d == 0:
				bad(p, "nothing can be done in no time; espmirror=no turns it off")
			default:
				o.limit = d
			}
		default:
			if strings.HasPrefix(p.name, "espmirror.") {
				bad(p, "there is no such parameter")
			}
		}
	}
	return o, problems
}

// bootParam is one parameter of the kernel command line.
type bootParam struct {
	name, value string
	hasValue    bool
}

func (p bootParam) String() string {
	if !p.hasValue {
		return p.name
	}
	return p.name + "=" + p.value
}

// bootParams splits a kernel command line as next_arg in the kernel's lib/cmdline.c does: white space separates, except
// between double quotes, which may stand around a value or around the whole parameter. What follows "--" is for init.
func bootParams(text string) []bootParam {
	isSpace := func(c byte) bool { return c == 0 || strings.IndexByte(" \t\n\v\f\r", c) >= 0 }
	var params []bootParam
	for {
		for text != "" && isSpace(text[0]) {
			text = text[1:]
		}
		if text == "" {
			return params
		}
		quoted := text[0] == '"'
		if quoted {
			text = text[1:]
		}
		inQuote, end := quoted, 0
		for ; end < len(text) && (inQuote || !isSpace(text[end])); end++ {
			if text[end] == '"' {
				inQuote = !inQuote
			}
		}
		word := text[:end]
		text = text[end:]
		var p bootParam
		p.name, p.value, p.hasValue = strings.Cut(word, "=")
		if p.hasValue && p.name == "" {
			p = bootParam{name: word} // the kernel does not look for the sign at the first place
		}
		last := &p.name
		if p.hasValue {
			last = &p.value
		}
		if v, ok := strings.CutPrefix(p.value, `"`); ok {
			p.value = strings.TrimSuffix(v, `"`)
		} else if quoted {
			*last = strings.TrimSuffix(*last, `"`)
		}
		if p.name == "--" && !p.hasValue {
			return params
		}
		params = append(params, p)
	}
}
