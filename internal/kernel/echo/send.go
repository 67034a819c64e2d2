package echo

import (
	"errors"
	"fmt"
	"net/netip"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"github.com/fathom-network/fathom/internal/facts/ping"
	"github.com/fathom-network/fathom/internal/kernel/link"
)

// numberLen is the length of the number in a datagram.
const numberLen = 12

// Send sends probes, those of different sources at the same time, and returns a result for each, in order.
// namespaces are the sources'.
func Send(namespaces map[string]*link.Namespace, probes []ping.Probe) []ping.Result {
	results := make([]ping.Result, len(probes))
	bySource := map[string][]int{}
	for i, p := range probes {
		results[i] = ping.Result{Probe: p}
		bySource[p.From] = append(bySource[p.From], i)
	}
	g := errgroup.Group{}
	g.SetLimit(sendersAtOnce)
	for source, indexes := range bySource {
		g.Go(func() error {
			n, found := namespaces[source]
			for _, i := range indexes {
				if !found {
					results[i].Error = "there is no namespace of " + source + " here"
					continue
				}
				send(&results[i], n)
			}
			return nil
		})
	}
	_ = g.Wait()
	return results
}

func send(r *ping.Result, n *link.Namespace) {
	family := unix.AF_INET
	if r.To.Addr().Is6() {
		family = unix.AF_INET6
	}
	fd := -1
	if err := n.Do(func() (err error) {
		fd, err = unix.Socket(family, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
		return err
	}); err != nil {
		r.Error = fmt.Sprintf("open a socket: %v", err)
		return
	}
	defer unix.Close(fd)
	mode := unix.IP_PMTUDISC_DO
	if r.Size > r.MTU {
		mode = unix.IP_PMTUDISC_DONT
	}
	timeout := unix.NsecToTimeval(int64(patience))
	err := errors.Join(discover(fd, family, mode),
		unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &timeout),
		unix.Connect(fd, sockaddr(r.To)))
	if err != nil {
		r.Error = describe(err)
		return
	}
	payload := make([]byte, max(r.Size-headers(r.To.Addr()), len(magic)+numberLen+64))
	for attempt := range attempts {
		copy(payload, fmt.Sprintf("%s%*d", magic, numberLen, attempt))
		began := time.Now()
		if _, err = unix.Write(fd, payload); err != nil {
			continue // of a packet before this one: an ICMP error is told with the next call
		}
		var n int
		if n, err = receive(r, fd, payload, attempt); err != nil {
			continue
		}
		r.Seconds = time.Since(began).Seconds()
		if n != len(payload) {
			err = fmt.Errorf("the answer has %d bytes, and the question had %d", n, len(payload))
			continue
		}
		r.Error = ""
		return
	}
	r.Error = describe(err)
}

// receive waits for the answer to one attempt.
func receive(r *ping.Result, fd int, sent []byte, attempt int) (int, error) {
	buffer := make([]byte, maxDatagram)
	for {
		n, err := unix.Read(fd, buffer)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			return 0, err
		}
		if n < len(magic)+numberLen || string(buffer[:len(magic)]) != magic {
			continue
		}
		number, rest := string(buffer[len(magic):len(magic)+numberLen]), string(buffer[len(magic)+numberLen:n])
		if k, err := strconv.Atoi(strings.TrimSpace(number)); err != nil || k != attempt {
			continue // the late answer to an earlier one
		}
		seen, _, _ := strings.Cut(strings.TrimPrefix(rest, " "), " ")
		if r.Source, err = netip.ParseAddr(seen); err != nil {
			return 0, fmt.Errorf("the answer does not say whom it saw: %w", err)
		}
		return n, nil
	}
}

// describe says what an error of a socket means for the way.
func describe(err error) string {
	switch {
	case errors.Is(err, unix.EAGAIN):
		return "no answer"
	case errors.Is(err, unix.EMSGSIZE):
		return "too large for a link on the way"
	case errors.Is(err, unix.ECONNREFUSED):
		return "refused: nobody listens at the other end"
	case errors.Is(err, unix.EHOSTUNREACH), errors.Is(err, unix.ENETUNREACH):
		return "unreachable: there is no route"
	}
	return err.Error()
}
