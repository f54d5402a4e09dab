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
}

func newLogger(w io.Writer, level slog.Level) *slog.Logger {
	return slog.New(&logHandler{mu: &sync.Mutex{}, w: w, level: level})
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
	_, err := fmt.Fprintf(h.w, "espmirror: %s%s%s\n", word, safe(r.Message), attrs)
	return err
}

func (h *logHandler) format(a slog.Attr) string {
	return " " + safe(h.group+a.Key+"="+a.Value.Resolve().String())
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
