package main

import (
	"fmt"
	"io"
	"os"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"espmirror/replicate"
)

// terminalWidth gives the columns of a terminal, 0 for anything else.
func terminalWidth(w io.Writer) int {
	f, ok := w.(*os.File)
	if !ok {
		return 0
	}
	ws, err := unix.IoctlGetWinsize(int(f.Fd()), unix.TIOCGWINSZ)
	if err != nil {
		return 0
	}
	if ws.Col == 0 {
		return 80 // a serial console does not know its size
	}
	return int(ws.Col)
}

// progressEvery is how often the line is drawn: on a serial console each one takes time from the run.
const progressEvery = 100 * time.Millisecond

// progress is one line at the bottom of a terminal, with a bar over all targets and the phase of each. The libraries
// that draw such bars are made for one task each, and bring in megabytes.
type progress struct {
	w     io.Writer
	width int

	mu     sync.Mutex
	last   map[string]replicate.Progress
	order  []string
	drawn  time.Time
	onLine bool
}

// startProgress returns nil where no progress is wanted: on anything but a terminal, and when somebody asked for quiet.
func (inv *invocation) startProgress() *progress {
	width := inv.terminalWidth(inv.stderr)
	if width == 0 || inv.noProgress || inv.quiet || inv.verbose || inv.json != "off" {
		return nil
	}
	inv.bar = &progress{w: inv.stderr, width: width, last: map[string]replicate.Progress{}}
	return inv.bar
}

// logWriter writes log lines to stderr, and takes the bar away first: it comes back below them.
type logWriter struct{ inv *invocation }

func (w logWriter) Write(line []byte) (int, error) {
	if p := w.inv.bar; p != nil {
		p.mu.Lock()
		defer p.mu.Unlock()
		p.clear()
	}
	return w.inv.stderr.Write(line)
}

// clear takes the line away. The caller holds the lock.
func (p *progress) clear() {
	if p.onLine {
		fmt.Fprint(p.w, "\r\x1b[K")
		p.onLine, p.drawn = false, time.Time{} // the next step draws it again
	}
}

// callback returns what package replicate calls; nil when there is no progress.
func (p *progress) callback() func(replicate.Progress) {
	if p == nil {
		return nil
	}
	return p.update
}

func (p *progress) update(step replicate.Progress) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if _, ok := p.last[step.Target]; !ok {
		p.order = append(p.order, step.Target)
	}
	p.last[step.Target] = step
	if now := time.Now(); now.Sub(p.drawn) >= progressEvery {
		p.drawn = now
		p.draw()
	}
}

func (p *progress) draw() {
	fmt.Fprintf(p.w, "\r%s\x1b[K", p.line())
	p.onLine = true
}

// line shows the bar first, so that a narrow terminal cuts off only words.
func (p *progress) line() string {
	const bar = 20
	var done, total int64
	var words []string
	for _, name := range p.order {
		s := p.last[name]
		word := s.Phase // of the source, which feeds all targets
		if name != "" {
			word = safe(name) + " " + word
		}
		if s.Total > 0 {
			done, total = done+min(s.Done, s.Total), total+s.Total
			word += fmt.Sprintf(" %s/%s", sizeText(s.Done), sizeText(s.Total))
		}
		words = append(words, word)
	}
	line := ""
	if total > 0 {
		n := int(float64(done) / float64(total) * bar)
		line = fmt.Sprintf("[%s%s] %3d%%  ", strings.Repeat("=", n), strings.Repeat(" ", bar-n), int(float64(done)/float64(total)*100))
	}
	runes := []rune(line + strings.Join(words, ", "))
	return string(runes[:min(len(runes), p.width-1)])
}

// stop takes the line away.
func (p *progress) stop() {
	if p == nil {
		return
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.clear()
}
