package mirror

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"sync/atomic"
	"testing"
	"time"
)

func TestReach(t *testing.T) {
	var dials atomic.Int32
	var clock atomic.Int64
	answer := make(chan error)
	r := newReach()
	r.now = func() time.Time { return time.Unix(0, clock.Load()) }
	r.dial = func(ctx context.Context, _, address string) (net.Conn, error) {
		dials.Add(1)
		select {
		case err := <-answer:
			if err != nil {
				return nil, err
			}
			a, b := net.Pipe()
			b.Close()
			return a, nil
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
	pass := func(d time.Duration) { clock.Add(int64(d)) }
	try := func() error { return r.try(t.Context(), "registry:443") }

	// Nobody answers: a pull does not wait for a resolver's time-out. The attempt goes on, and its end is what counts.
	if err := try(); !errors.Is(err, errSilent) {
		t.Fatalf("a registry that does not answer: %v, want %v", err, errSilent)
	}
	answer <- nil
	if err := try(); err != nil || dials.Load() != 1 {
		t.Errorf("the answer that came late: %v after %d dials, want nil after 1", err, dials.Load())
	}
	// It is remembered for a while, then asked for again.
	pass(reachableFor - 1)
	if err := try(); err != nil || dials.Load() != 1 {
		t.Errorf("an answer that is good yet: %v after %d dials", err, dials.Load())
	}
	pass(1)
	go func() { answer <- errors.New("refused") }()
	if err := try(); err == nil || err.Error() != "refused" || dials.Load() != 2 {
		t.Errorf("an answer that is too old: %v after %d dials", err, dials.Load())
	}
	// That it is away is remembered, too, for a shorter time.
	pass(unreachableFor - 1)
	if err := try(); err == nil || dials.Load() != 2 {
		t.Errorf("a refusal that is good yet: %v after %d dials", err, dials.Load())
	}
	pass(1)
	go func() { answer <- nil }()
	if err := try(); err != nil || dials.Load() != 3 {
		t.Errorf("a refusal that is too old: %v after %d dials", err, dials.Load())
	}
}

func TestReachIsBounded(t *testing.T) {
	r := newReach()
	r.dial = func(context.Context, string, string) (net.Conn, error) { return nil, errors.New("no") }
	for i := range 3 * maxRegistries {
		if err := r.try(t.Context(), fmt.Sprint("host", i)); err == nil {
			t.Fatal("reached")
		}
	}
	if len(r.known) > maxRegistries {
		t.Errorf("%d registries are remembered, want at most %d", len(r.known), maxRegistries)
	}
}

func TestPlain(t *testing.T) {
	op := func(err error) error { return &net.OpError{Op: "dial", Net: "tcp", Err: err} }
	for _, test := range []struct {
		err  error
		want string
	}{
		{op(&net.DNSError{Err: "i/o timeout", Name: "quay.io", Server: "192.0.2.1:53", IsTimeout: true}), "no name server answers for quay.io"},
		{op(&net.DNSError{Err: "no such host", Name: "quay.io"}), "look up quay.io: no such host"},
		{op(os.ErrDeadlineExceeded), "it does not answer"},
		{op(errors.New("connect: connection refused")), "connect: connection refused"},
		{errors.New("else"), "else"},
	} {
		if got := plain(test.err).Error(); got != test.want {
			t.Errorf("plain(%v) = %q, want %q", test.err, got, test.want)
		}
	}
}
