package main

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"strings"
	"sync"
)

// logHandler writes log records as lines for people: "espmirror: warning: message (key=value)". Times and levels of
// their own are for the journal, which adds them.
type logHandler struct {
	mu    *sync.Mutex
	w     io.Writer
	level slog.Level
	attrs string
	group string
	// shape turns a line into what w takes; nil for a line with its end.
	shape func(level slog.Level, line string) string
}

func newLogger(w io.Writer, level slog.Level) *slog.Logger {
	return slog.New(&logHandler{mu: &sync.Mutex{}, w: w, level: level})
}

// shaped is a log of ours that goes to w instead, each line in the given shape.
func shaped(log *slog.Logger, w io.Writer, shape func(slog.Level, string) string) *slog.Logger {
	h, ok := log.Handler().(*logHandler)
	if !ok {
		return log
	}
	c := *h
	c.w, c.shape = w, shape
	return slog.New(&c)
}

// Enabled implements slog.Handler.
func (h *logHandler) Enabled(_ context.Context, l slog.Level) bool { return l >= h.level }

// Handle implements slog.Handler.
func (h *logHandler) Handle(_ context.Context, r slog.Record) error {
	word := ""
	switch {
	case r.Level >= slog.LevelError:
		word = "error: "
	case r.Level >= slog.LevelWarn:
		word = "warning: "
	}
	attrs := h.attrs
	r.Attrs(func(a slog.Attr) bool {
		attrs += h.format(a)
		return true
	})
	if attrs != "" {
		attrs = " (" + attrs[1:] + ")"
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	line := "espmirror: " + word + safe(r.Message) + attrs
	if h.shape != nil {
		line = h.shape(r.Level, line)
	} else {
		line += "\n"
	}
	_, err := io.WriteString(h.w, line)
	return err
}

func (h *logHandler) format(a slog.Attr) string {
	value := a.Value.Resolve().String()
	if value == "" {
		return "" // it says nothing
	}
	return " " + safe(h.group+a.Key+"="+value)
}

// WithAttrs implements slog.Handler.
func (h *logHandler) WithAttrs(attrs []slog.Attr) slog.Handler {
	c := *h
	for _, a := range attrs {
		c.attrs += h.format(a)
	}
	return &c
}

// WithGroup implements slog.Handler.
func (h *logHandler) WithGroup(name string) slog.Handler {
	c := *h
	c.group += name + "."
	return &c
}

// stepwise is a handler for what is only told to those who want each step: all of a dry run, in which nothing happens, and the
// parts of something that is new as a whole.
type stepwise struct {
	slog.Handler
	prefix string
}

// Enabled implements slog.Handler.
func (h stepwise) Enabled(ctx context.Context, l slog.Level) bool {
	return h.Handler.Enabled(ctx, stepLevel(l))
}

// Handle implements slog.Handler.
func (h stepwise) Handle(ctx context.Context, r slog.Record) error {
	r = r.Clone()
	r.Level, r.Message = stepLevel(r.Level), h.prefix+r.Message
	return h.Handler.Handle(ctx, r)
}

// WithAttrs implements slog.Handler.
func (h stepwise) WithAttrs(attrs []slog.Attr) slog.Handler {
	return stepwise{h.Handler.WithAttrs(attrs), h.prefix}
}

// WithGroup implements slog.Handler.
func (h stepwise) WithGroup(name string) slog.Handler {
	return stepwise{h.Handler.WithGroup(name), h.prefix}
}

func stepLevel(l slog.Level) slog.Level {
	if l >= slog.LevelInfo && l < slog.LevelWarn {
		return slog.LevelDebug
	}
	return l
}

// engineLog is the log that package replicate gets.
func (inv *invocation) engineLog(dryRun bool) *slog.Logger {
	if dryRun {
		return slog.New(stepwise{inv.log.Handler(), "dry run: "})
	}
	return inv.log
}

// systemdLevels are the values of SYSTEMD_LOG_LEVEL, by name and by number.
var systemdLevels = []struct {
	name  string
	level slog.Level
}{
	{"emerg", slog.LevelError}, {"alert", slog.LevelError}, {"crit", slog.LevelError}, {"err", slog.LevelError},
	{"warning", slog.LevelWarn}, {"notice", slog.LevelInfo}, {"info", slog.LevelInfo}, {"debug", slog.LevelDebug},
}

// systemdLevel reads SYSTEMD_LOG_LEVEL. It may hold a list such as "console:debug,info", in which the plain word counts.
func systemdLevel(v string) (slog.Level, bool) {
	for word := range strings.SplitSeq(v, ",") {
		for i, l := range systemdLevels {
			if word == l.name || word == fmt.Sprint(i) {
				return l.level, true
			}
		}
	}
	return 0, false
}
