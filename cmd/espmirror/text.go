package main

import (
	"fmt"
	"io"
	"math"
	"os"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"
)

// safe makes text from a volume harmless for a terminal. Whatever does not print (control characters, bytes that are no
// UTF-8, marks that turn the direction of writing) is shown as an escape.
func safe(s string) string {
	if isSafe(s) {
		return s
	}
	var sb strings.Builder
	for len(s) > 0 {
		r, w := utf8.DecodeRuneInString(s)
		if r == utf8.RuneError && w == 1 {
			fmt.Fprintf(&sb, `\x%02x`, s[0])
		} else if unicode.IsPrint(r) {
			sb.WriteRune(r)
		} else {
			q := strconv.QuoteRuneToASCII(r)
			sb.WriteString(q[1 : len(q)-1])
		}
		s = s[w:]
	}
	return sb.String()
}

func isSafe(s string) bool {
	for i, r := range s {
		if !unicode.IsPrint(r) {
			return false
		}
		if r == utf8.RuneError {
			if _, w := utf8.DecodeRuneInString(s[i:]); w == 1 {
				return false
			}
		}
	}
	return true
}

var sizeUnits = []string{"B", "K", "M", "G", "T"}

// sizeText shows a number of bytes in at most five characters. JSON has the exact number.
func sizeText(n int64) string {
	f, u := float64(n), 0
	for math.Abs(f) >= 1023.5 && u < len(sizeUnits)-1 {
		f, u = f/1024, u+1
	}
	if u == 0 || math.Abs(f) >= 9.95 {
		return fmt.Sprintf("%.0f%s", f, sizeUnits[u])
	}
	return strings.TrimSuffix(fmt.Sprintf("%.1f", f), ".0") + sizeUnits[u]
}

// quoted is a name as a shell takes it.
func quoted(name string) string {
	plain := func(r rune) bool {
		return r >= 'a' && r <= 'z' || r >= 'A' && r <= 'Z' || r >= '0' && r <= '9' || strings.ContainsRune("_@%+=:,./-", r)
	}
	if name != "" && !strings.ContainsFunc(name, func(r rune) bool { return !plain(r) }) {
		return name
	}
	return "'" + strings.ReplaceAll(name, "'", `'\''`) + "'"
}

// plural counts things.
func plural(n int64, one, many string) string {
	if n == 1 {
		return "1 " + one
	}
	return fmt.Sprintf("%d %s", n, many)
}

// output is where a report prints itself.
type output struct {
	io.Writer
	legend bool
	color  bool
	width  int // columns of the terminal; 0 when it is none
}

func (o *output) printf(format string, a ...any) { fmt.Fprintf(o, format, a...) }

// tint is a colour of the terminal's palette, "" for none.
type tint string

const (
	green  tint = "32"
	yellow tint = "33"
	red    tint = "31"
	dim    tint = "2"
)

func (o *output) paint(t tint, s string) string {
	if !o.color || t == "" {
		return s
	}
	return "\x1b[" + string(t) + "m" + s + "\x1b[0m"
}

// cell is one field of a table.
type cell struct {
	text  string
	short string // in place of text where the terminal is too narrow
	tint  tint
	right bool // numbers stand at the right
}

// nameCell is the name of a volume. Of a partition that is not there the errors below the table have all of the GUID.
func nameCell(name string) cell {
	c := cell{text: name}
	if guid, ok := strings.CutPrefix(name, "PARTUUID="); ok && len(guid) > 8 {
		c.short = "PARTUUID=" + guid[:8] + "…"
	}
	return c
}

// table is a list with a legend line. Text is made safe and widths are counted in characters, colours left out, which
// is what text/tabwriter cannot do.
type table struct {
	head []string
	rows [][]cell
	// spare are columns that are left out, in this order, while the table is wider than the terminal.
	spare []string
}

func newTable(head ...string) *table { return &table{head: head} }

func (t *table) row(cells ...cell) { t.rows = append(t.rows, cells) }

func (t *table) print(o *output) {
	width := make([]int, len(t.head))
	if o.legend {
		for i, h := range t.head {
			width[i] = len(h)
		}
	}
	for _, r := range t.rows {
		for i := range r {
			if r[i].text = safe(r[i].text); r[i].text == "" {
				r[i].text = "-"
			}
			width[i] = max(width[i], utf8.RuneCountInString(r[i].text))
		}
	}
	if o.width > 0 && tableWidth(width) > o.width {
		t.shorten(o, width)
	}
	for _, name := range t.spare {
		i := slices.Index(t.head, name)
		if o.width == 0 || tableWidth(width) <= o.width || i < 0 {
			continue
		}
		t.head, width = slices.Delete(slices.Clone(t.head), i, i+1), slices.Delete(width, i, i+1)
		for j := range t.rows {
			t.rows[j] = slices.Delete(slices.Clone(t.rows[j]), i, i+1)
		}
	}
	if o.legend {
		head := make([]cell, len(t.head))
		for i, h := range t.head {
			head[i] = cell{text: h, right: len(t.rows) > 0 && t.rows[0][i].right}
		}
		t.line(o, width, head)
	}
	for _, r := range t.rows {
		t.line(o, width, r)
	}
}

// shorten puts the short texts into their places.
func (t *table) shorten(o *output, width []int) {
	for i := range width {
		width[i] = 0
		if o.legend {
			width[i] = len(t.head[i])
		}
		for _, r := range t.rows {
			if r[i].short != "" {
				r[i].text = safe(r[i].short)
			}
			width[i] = max(width[i], utf8.RuneCountInString(r[i].text))
		}
	}
}

// tableWidth is the width of a line, with two spaces between columns.
func tableWidth(width []int) int {
	n := 2 * (len(width) - 1)
	for _, w := range width {
		n += w
	}
	return n
}

func (t *table) line(o *output, width []int, cells []cell) {
	var sb strings.Builder
	for i, c := range cells {
		if i > 0 {
			sb.WriteString("  ")
		}
		pad := strings.Repeat(" ", width[i]-utf8.RuneCountInString(c.text))
		switch {
		case c.right:
			sb.WriteString(pad + o.paint(c.tint, c.text))
		case i == len(cells)-1:
			sb.WriteString(o.paint(c.tint, c.text))
		default:
			sb.WriteString(o.paint(c.tint, c.text) + pad)
		}
	}
	o.printf("%s\n", sb.String())
}

// sourceDate is SOURCE_DATE_EPOCH, the latest date that what is made to be reproducible may have; zero when it is not set
// (reproducible-builds.org/specs/source-date-epoch).
func sourceDate() (time.Time, error) {
	v := os.Getenv("SOURCE_DATE_EPOCH")
	if v == "" {
		return time.Time{}, nil
	}
	n, err := strconv.ParseInt(v, 10, 64)
	if err != nil || n < 0 || n > maxSourceDate {
		return time.Time{}, usagef("SOURCE_DATE_EPOCH=%s is not a number of seconds since 1970", v)
	}
	return time.Unix(n, 0).UTC(), nil
}

// maxSourceDate is the last second of the year 9999, in seconds since 1970.
const maxSourceDate = 253402300799

// clock is what new files and states say that the time is: SOURCE_DATE_EPOCH, or the time of day.
func (inv *invocation) clock() time.Time {
	if t, err := sourceDate(); err == nil && !t.IsZero() {
		return t
	}
	return time.Now()
}
