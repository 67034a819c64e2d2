// Package announce has a node answer for addresses on the segments that it is on, as if they were its own: it answers
// ARP (RFC 826) and Neighbour Discovery (RFC 4861), and tells everybody of an address that it has taken over. No device
// has these addresses: what comes for them is balanced before the kernel would ask whose they are.
package announce

import (
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net"
	"net/netip"
	"os"
	"slices"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/fathom-network/fathom/internal/facts/podnet"
	"github.com/fathom-network/fathom/internal/kernel/link"
	"github.com/fathom-network/fathom/internal/wake"
)

// Answer is an address that the node answers for.
type Answer struct {
	Addr netip.Addr
	// MAC is another node's, which is to go on getting the address's packets while it cannot answer itself; nil is the
	// device's own.
	MAC net.HardwareAddr
}

// Own are answers with the node's own Ethernet addresses.
func Own(addrs []netip.Addr) []Answer {
	var answers []Answer
	for _, a := range addrs {
		answers = append(answers, Answer{Addr: a})
	}
	return answers
}

// Changes counts what Set did.
type Changes struct {
	Taken, Left, Devices int
}

// Speaker answers for addresses. Its sockets go with its process, and nothing of it stays in the kernel.
type Speaker struct {
	node *link.Namespace
	log  *slog.Logger

	mu      sync.Mutex
	devices map[string]*device
	done    sync.WaitGroup
}

// New makes a speaker that answers for nothing yet.
func New(node *link.Namespace, log *slog.Logger) *Speaker {
	return &Speaker{node: node, log: log, devices: map[string]*device{}}
}

// Set has the node answer for these addresses, each on the devices whose segments it is on, and for no others. Those
// that are new and its own are told to everybody. What goes wrong with one device leaves the others as they are.
func (s *Speaker) Set(answers []Answer, segments []podnet.Segment) (Changes, error) {
	want := map[string]map[netip.Addr]net.HardwareAddr{}
	for _, a := range answers {
		if a.MAC != nil && len(a.MAC) != 6 {
			return Changes{}, fmt.Errorf("answer for %s with %v: it is no Ethernet address", a.Addr, a.MAC)
		}
		for _, name := range podnet.On(a.Addr, segments) {
			if want[name] == nil {
				want[name] = map[netip.Addr]net.HardwareAddr{}
			}
			want[name][a.Addr] = a.MAC
		}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	var done Changes
	var errs []error
	for name, owned := range want {
		d, err := s.open(name)
		if err != nil {
			errs = append(errs, fmt.Errorf("answer for addresses on %s: %w", name, err))
			continue
		}
		taken, left, err := d.set(owned)
		if err != nil {
			errs = append(errs, fmt.Errorf("answer for addresses on %s: %w", name, err))
		}
		done.Taken, done.Left = done.Taken+taken, done.Left+left
	}
	for name, d := range s.devices {
		if want[name] == nil {
			done.Left += len(d.owned)
			d.close()
			delete(s.devices, name)
		}
	}
	done.Devices = len(s.devices)
	return done, errors.Join(errs...)
}

// open returns the device as it is now: one that was made anew, or has another address, is opened anew.
func (s *Speaker) open(name string) (*device, error) {
	var index int
	var mac net.HardwareAddr
	if err := s.node.Do(func() error {
		found, err := net.InterfaceByName(name)
		if err == nil {
			index, mac = found.Index, found.HardwareAddr
		}
		return err
	}); err != nil {
		return nil, err
	}
	if len(mac) != 6 {
		return nil, errors.New("it has no Ethernet address: addresses on it have to be routed to the node")
	}
	if d := s.devices[name]; d != nil {
		if d.index == index && d.mac == [6]byte(mac) && !d.failed() {
			return d, nil
		}
		d.close()
		delete(s.devices, name)
	}
	d := &device{name: name, index: index, mac: [6]byte(mac), log: s.log, node: s.node, owned: map[netip.Addr][6]byte{}, quit: make(chan struct{}), told: wake.New()}
	if err := d.listen(); err != nil {
		return nil, err
	}
	s.devices[name] = d
	s.done.Go(func() { d.answer(d.arp) })
	s.done.Go(func() { d.answer(d.ndp) })
	s.done.Go(d.tell)
	return d, nil
}

// Close has the node answer for nothing.
func (s *Speaker) Close() {
	s.mu.Lock()
	for name, d := range s.devices {
		d.close()
		delete(s.devices, name)
	}
	s.mu.Unlock()
	s.done.Wait()
}

// device is a device on which the node answers.
type device struct {
	name  string
	index int
	mac   [6]byte
	log   *slog.Logger
	node  *link.Namespace

	arp, ndp *os.File // raw sockets
	groups   groups
	quit     chan struct{}
	told     wake.Signal // that there may be something to tell

	mu     sync.Mutex
	owned  map[netip.Addr][6]byte // where packets for an address are to go: to d.mac, or another node
	due    []announcement         // in the order of time
	broken bool
	closed bool
}

// announcement is one that is to be sent.
type announcement struct {
	at   time.Time
	addr netip.Addr
}

// spacing is when after it was taken over an address is told to everybody: at once, and again, for any of these may be
// lost, and a switch may be about to learn where the node is.
var spacing = []time.Duration{0, 100 * time.Millisecond, 400 * time.Millisecond, 1500 * time.Millisecond, 5 * time.Second}

// set changes what the node answers for.
func (d *device) set(want map[netip.Addr]net.HardwareAddr) (taken, left int, err error) {
	now := time.Now()
	d.mu.Lock()
	for a := range d.owned {
		if _, wanted := want[a]; !wanted {
			delete(d.owned, a)
			left++
		}
	}
	for a, other := range want {
		mac := d.mac
		if other != nil {
			mac = [6]byte(other)
		}
		if had, have := d.owned[a]; have && had == mac {
			continue
		}
		d.owned[a] = mac
		taken++
		if mac != d.mac {
			continue // it says nothing unasked of others
		}
		for _, after := range spacing {
			d.due = append(d.due, announcement{now.Add(after), a})
		}
	}
	slices.SortStableFunc(d.due, func(a, b announcement) int { return a.at.Compare(b.at) })
	d.mu.Unlock()
	// Questions about IPv6 addresses go to groups.
	err = d.groups.set(d.node, d.index, maps.Keys(want))
	d.told.Set()
	return taken, left, err
}

// where says where packets for an address are to go, if the device answers for it.
func (d *device) where(a netip.Addr) (mac [6]byte, owned bool) {
	d.mu.Lock()
	defer d.mu.Unlock()
	mac, owned = d.owned[a]
	return mac, owned && !d.closed
}

func (d *device) failed() bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.broken
}

// fail has the next Set open the device anew.
func (d *device) fail(what string, err error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if !d.closed && !d.broken {
		d.broken = true
		d.log.Warn("a device is opened anew to answer for addresses on it", "device", d.name, "because", what, "error", err)
	}
}

func (d *device) close() {
	d.mu.Lock()
	if d.closed {
		d.mu.Unlock()
		return
	}
	d.closed = true
	d.mu.Unlock()
	close(d.quit)
	_ = d.arp.Close()
	_ = d.ndp.Close()
	d.groups.close()
}

// answer answers what a socket hears, until it is closed.
func (d *device) answer(socket *os.File) {
	buffer := make([]byte, 256) // of longer ones the beginning is enough
	for {
		n, err := socket.Read(buffer)
		switch {
		case errors.Is(err, os.ErrClosed):
			return
		case errors.Is(err, unix.ENETDOWN): // said once; it may come up again
			continue
		case err != nil:
			d.fail("it cannot be read", err)
			return
		}
		question, ok := parse(buffer[:n])
		if !ok || question.asker == d.mac {
			continue
		}
		mac, owned := d.where(question.target)
		if !owned || question.asker == mac {
			continue
		}
		frame := question.answer(mac)
		copy(frame[6:], d.mac[:]) // the frame is from here, whatever it says, or switches would look for the other node here
		d.send(frame)
	}
}

func (d *device) send(frame []byte) {
	socket := d.arp
	if frame[12] != 0x08 {
		socket = d.ndp
	}
	if _, err := socket.Write(frame); err != nil && !errors.Is(err, os.ErrClosed) && !errors.Is(err, unix.ENETDOWN) && !errors.Is(err, unix.ENOBUFS) {
		d.fail("it cannot be written", err)
	}
}

// tell sends announcements when they are due. One of an address that was left meanwhile is not sent.
func (d *device) tell() {
	for {
		d.mu.Lock()
		var addr netip.Addr
		wait := time.Hour
		if len(d.due) > 0 {
			if wait = time.Until(d.due[0].at); wait <= 0 {
				addr, d.due = d.due[0].addr, d.due[1:]
			}
		}
		d.mu.Unlock()
		if addr.IsValid() {
			if mac, owned := d.where(addr); owned && mac == d.mac {
				for _, frame := range gratuitous(addr, d.mac) {
					d.send(frame)
				}
			}
			continue
		}
		timer := time.NewTimer(wait)
		select {
		case <-d.quit:
			timer.Stop()
			return
		case <-d.told:
		case <-timer.C:
		}
		timer.Stop()
	}
}
