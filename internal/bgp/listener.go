package bgp

import (
	"context"
	"fmt"
	"log/slog"
)

// listener passes on what GoBGP logs, and hears in it why a connection does not come about, which GoBGP tells in no
// other way.
type listener struct {
	next slog.Handler
	note func(reason string)
}

// Enabled says yes to debug messages too: the refusal of a connection is one.
func (l *listener) Enabled(context.Context, slog.Level) bool { return true }

// Handle passes a record on with less weight: it is for who looks into the protocol. What an administrator should
// know a session logs by itself.
func (l *listener) Handle(ctx context.Context, r slog.Record) error {
	if reason := reasonOf(r); reason != "" {
		l.note(reason)
	}
	level := r.Level - slog.LevelWarn // info and below is less than debug
	if r.Level >= slog.LevelWarn {
		level = slog.LevelDebug
	}
	if !l.next.Enabled(ctx, level) {
		return nil
	}
	r.Level = level
	return l.next.Handle(ctx, r)
}

// WithAttrs keeps them for what is passed on.
func (l *listener) WithAttrs(attrs []slog.Attr) slog.Handler {
	return &listener{next: l.next.WithAttrs(attrs), note: l.note}
}

// WithGroup is part of the interface; GoBGP makes no groups.
func (l *listener) WithGroup(name string) slog.Handler {
	return &listener{next: l.next.WithGroup(name), note: l.note}
}

func reasonOf(r slog.Record) string {
	attrs := map[string]string{}
	r.Attrs(func(a slog.Attr) bool {
		attrs[a.Key] = a.Value.String()
		return true
	})
	switch r.Message {
	case "failed to connect":
		return attrs["Error"]
	case "received notification":
		return fmt.Sprintf("the peer refused: code %s, subcode %s", attrs["Code"], attrs["Subcode"])
	}
	return ""
}
