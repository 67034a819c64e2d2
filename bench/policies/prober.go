package main

import (
	"encoding/binary"
	"fmt"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// prober sends datagrams from one pod to another, each to another port, so that each begins a connection of its own, and sees which of them come.
type prober struct {
	mu   sync.Mutex
	sent []time.Time
	came []bool
	last int // the last that came

	send, receive int // sockets
	stop          chan struct{}
	all           sync.WaitGroup
}

// pause is between two datagrams, and so the error of what is measured; quiet is how long none may come for the way to be closed.
const (
	pause    = 200 * time.Microsecond
	quiet    = 30 * time.Millisecond
	patience = 20 * time.Second
)

func beginProber(from, to *pod) (*prober, error) {
	p := &prober{last: -1, stop: make(chan struct{})}
	open := func(at *pod, kind, protocol int, fd *int) error {
		return at.Do(func() (err error) {
			*fd, err = unix.Socket(unix.AF_INET, kind|unix.SOCK_CLOEXEC, protocol)
			return err
		})
	}
	if err := open(from, unix.SOCK_DGRAM, 0, &p.send); err != nil {
		return nil, err
	}
	if err := open(to, unix.SOCK_RAW, unix.IPPROTO_UDP, &p.receive); err != nil {
		_ = unix.Close(p.send)
		return nil, err
	}
	_ = unix.SetsockoptTimeval(p.receive, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Usec: 100_000})
	p.all.Go(func() { p.sendAll(to) })
	p.all.Go(p.receiveAll)
	return p, nil
}

func (p *prober) end() {
	close(p.stop)
	p.all.Wait()
	_, _ = unix.Close(p.send), unix.Close(p.receive)
}

func (p *prober) sendAll(to *pod) {
	for n := 0; ; n++ {
		select {
		case <-p.stop:
			return
		case <-time.After(pause):
		}
		p.mu.Lock()
		p.sent, p.came = append(p.sent, time.Now()), append(p.came, false)
		p.mu.Unlock()
		_ = unix.Sendto(p.send, binary.BigEndian.AppendUint32(nil, uint32(n)), 0, &unix.SockaddrInet4{Port: 10_000 + n%50_000, Addr: to.addr.As4()})
	}
}

func (p *prober) receiveAll() {
	const headers = 20 + 8
	for buf := make([]byte, 100); ; {
		n, _, err := unix.Recvfrom(p.receive, buf, 0)
		select {
		case <-p.stop:
			return
		default:
		}
		if err != nil || n < headers+4 {
			continue
		}
		i := int(binary.BigEndian.Uint32(buf[headers:]))
		p.mu.Lock()
		if i < len(p.came) {
			p.came[i], p.last = true, max(p.last, i)
		}
		p.mu.Unlock()
	}
}

// opens waits for a datagram that was sent after a time and came, and returns when it was sent.
func (p *prober) opens(after time.Time) (time.Time, error) {
	for began := time.Now(); time.Since(began) < patience; time.Sleep(time.Millisecond) {
		p.mu.Lock()
		for i := len(p.sent) - 1; i >= 0 && p.sent[i].After(after); i-- {
			if !p.came[i] {
				continue
			}
			for ; i > 0 && p.came[i-1] && p.sent[i-1].After(after); i-- {
			}
			at := p.sent[i]
			p.mu.Unlock()
			return at, nil
		}
		p.mu.Unlock()
	}
	return time.Time{}, fmt.Errorf("no datagram came within %v", patience)
}

// closes waits until no datagram comes any more, and returns when the first was sent that did not.
func (p *prober) closes() (time.Time, error) {
	for began := time.Now(); time.Since(began) < patience; time.Sleep(time.Millisecond) {
		p.mu.Lock()
		if next := p.last + 1; next < len(p.sent) && time.Since(p.sent[next]) > quiet {
			at := p.sent[next]
			p.mu.Unlock()
			return at, nil
		}
		p.mu.Unlock()
	}
	return time.Time{}, fmt.Errorf("datagrams still came after %v", patience)
}
