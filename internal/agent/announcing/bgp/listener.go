package bgp

import (
	"context"
	"log/slog"
	"strings"

	"github.com/osrg/gobgp/v4/api"
	"github.com/osrg/gobgp/v4/pkg/apiutil"
)

// listener passes on GoBGP's log. It also learns from it why a connection fails, which GoBGP reports nowhere else.
type listener struct {
	next slog.Handler
	note func(reason string)
}

// Enabled returns true for debug messages too: a refused connection is logged as one.
func (l *listener) Enabled(context.Context, slog.Level) bool { return true }

// Handle passes a record on at a lower level, since it is of use only for debugging the protocol. A session itself logs
// what an administrator should know.
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

// WithAttrs keeps the attributes for the records that are passed on.
func (l *listener) WithAttrs(attrs []slog.Attr) slog.Handler {
	return &listener{next: l.next.WithAttrs(attrs), note: l.note}
}

// WithGroup is required by the interface; GoBGP makes no groups.
func (l *listener) WithGroup(name string) slog.Handler {
	return &listener{next: l.next.WithGroup(name), note: l.note}
}

// Reasons that a router which rejects the session seldom gives itself.
const (
	refused = "the peer refuses the session: its log says why; often one side expects another ASN of the other"
	excess  = "the peer announces too many routes: this node uses none, so configure the peer to announce none"
	closed  = "the peer accepts the connection and closes it: is this node's address a neighbour there, with the right ASN?"
)

// reasonOf returns the reason for a failed connection that a log record gives; empty if it gives none.
func reasonOf(r slog.Record) string {
	attrs := map[string]string{}
	r.Attrs(func(a slog.Attr) bool {
		attrs[a.Key] = a.Value.String()
		return true
	})
	switch r.Message {
	case "failed to connect":
		_, why, found := strings.Cut(attrs["Error"], ": ") // without the known part: "dial tcp 0.0.0.0:0->192.0.2.1:179: "
		if !found {
			why = attrs["Error"]
		}
		return why
	case "prefix limit reached":
		return excess
	case "outgoing connection IO error":
		return closed
	case "sent notification":
		switch attrs["Code"] + "/" + attrs["Subcode"] {
		case "5/1": // the peer answered with another message than OPEN: a NOTIFICATION
			return refused
		case "2/2":
			return "the peer has another ASN than configured"
		case "2/3":
			return "the peer has this node's router ID"
		}
	}
	return ""
}

// disconnected returns why a session ended, or its setup failed.
func disconnected(p apiutil.PeerState) string {
	switch p.DisconnectReason {
	case api.PeerState_DISCONNECT_REASON_NOTIFICATION_RECEIVED, api.PeerState_DISCONNECT_REASON_NOTIFICATION_SENT:
		return p.DisconnectMessage
	case api.PeerState_DISCONNECT_REASON_HOLD_TIMER_EXPIRED:
		return "the peer sent nothing for the hold time"
	case api.PeerState_DISCONNECT_REASON_READ_FAILED, api.PeerState_DISCONNECT_REASON_WRITE_FAILED, api.PeerState_DISCONNECT_REASON_GRACEFUL_RESTART:
		return "the connection broke"
	case api.PeerState_DISCONNECT_REASON_INVALID_MSG, api.PeerState_DISCONNECT_REASON_BAD_PEER_AS:
		return refused
	case api.PeerState_DISCONNECT_REASON_ADMIN_DOWN:
		return excess
	}
	return ""
}
