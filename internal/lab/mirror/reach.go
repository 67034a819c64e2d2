package mirror

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"sync"
	"time"
)

const (
	// patience is how long a pull waits to hear whether its registry is there. On a machine without a network, a name
	// server that nobody answers for would take a resolver's ten seconds and more.
	patience = 700 * time.Millisecond
	// tryFor is how long the registry itself may take. A slow one is known by the second pull.
	tryFor = 5 * time.Second
	// For so long an answer is good.
	reachableFor, unreachableFor = time.Minute, 10 * time.Second
	// maxRegistries bounds what is remembered: pods choose the names.
	maxRegistries = 256
)

// reach tells which registries can be reached: those that accept a TCP connection.
type reach struct {
	dial func(ctx context.Context, network, address string) (net.Conn, error)
	now  func() time.Time

	mu    sync.Mutex
	known map[string]*attempt
}

// attempt is one try to reach a registry. err and until are written before done is closed.
type attempt struct {
	done  chan struct{}
	err   error
	until time.Time
}

func newReach() *reach {
	return &reach{dial: (&net.Dialer{}).DialContext, now: time.Now, known: map[string]*attempt{}}
}

// errSilent says that a registry, or the name server that should know it, has not answered in time.
var errSilent = errors.New("no answer within " + patience.String())

// try returns nil if the registry that is served at an address can be reached, and otherwise why not, within patience.
func (r *reach) try(ctx context.Context, address string) error {
	a := r.attempt(address)
	timer := time.NewTimer(patience)
	defer timer.Stop()
	select {
	case <-a.done:
		return a.err
	case <-timer.C:
		return errSilent
	case <-ctx.Done():
		return ctx.Err()
	}
}

// attempt returns the one that is under way or still good, or begins one.
func (r *reach) attempt(address string) *attempt {
	r.mu.Lock()
	defer r.mu.Unlock()
	if a := r.known[address]; a != nil {
		select {
		case <-a.done:
			if r.now().Before(a.until) {
				return a
			}
		default:
			return a
		}
	}
	if len(r.known) >= maxRegistries {
		clear(r.known) // who waits for one of them still hears of it
	}
	a := &attempt{done: make(chan struct{})}
	r.known[address] = a
	go func() {
		// Not the request's context: what it did not wait for is of use to the next one.
		ctx, cancel := context.WithTimeout(context.Background(), tryFor)
		defer cancel()
		conn, err := r.dial(ctx, "tcp", address)
		a.until = r.now().Add(reachableFor)
		if err != nil {
			a.err, a.until = plain(err), r.now().Add(unreachableFor)
		} else {
			conn.Close()
		}
		close(a.done)
	}()
	return a
}

// plain leaves out of an error of dialling what the reader knows: the address, the resolver's server.
func plain(err error) error {
	var dns *net.DNSError
	if errors.As(err, &dns) {
		if dns.IsTimeout {
			return fmt.Errorf("no name server answers for %s", dns.Name)
		}
		return fmt.Errorf("look up %s: %s", dns.Name, dns.Err)
	}
	if os.IsTimeout(err) {
		return errors.New("it does not answer")
	}
	var op *net.OpError
	if errors.As(err, &op) {
		return op.Err
	}
	return err
}
