// Package routeradv finds the router at the other end of a link by the Router Advertisements that it sends (RFC 4861), and has
// it find this node by the same: what BGP needs on links without addresses. Of the node nothing is advertised but that it is
// there.
package routeradv

import (
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"slices"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/fathom-network/fathom/internal/kernel/link"
	"github.com/fathom-network/fathom/internal/wake"
)

// Listener listens and advertises on devices. Without any it holds nothing, and runs nothing.
type Listener struct {
	node    *link.Namespace
	log     *slog.Logger
	changed func()

	mu      sync.Mutex
	devices map[string]*device
	failed  map[string]string // why a device is not listened on
	done    sync.WaitGroup
}

// Heard is what was heard on a device.
type Heard struct {
	Router netip.Addr // link-local, without a zone; invalid if there was none
	// Other is another router that was heard beside it, which should not be on such a link.
	Other netip.Addr
	Since time.Time // when the device began to be listened on
	// Problem says why nothing can be heard, or nothing said.
	Problem string
}

// New makes a listener that listens on nothing yet. Changed is called when the router of a device is another; it must not block.
func New(node *link.Namespace, log *slog.Logger, changed func()) *Listener {
	return &Listener{node: node, log: log, changed: changed, devices: map[string]*device{}}
}

// Set has these devices listened and advertised on, and no others. What goes wrong with one is told by Heard, and tried again by
// the next Set.
func (l *Listener) Set(devices []string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.failed = map[string]string{}
	for _, name := range devices {
		if err := l.open(name); err != nil {
			l.failed[name] = err.Error()
		}
	}
	for name := range l.devices {
		if !slices.Contains(devices, name) {
			l.close(name)
		}
	}
}

// open has a device listened on as it is now. Of one that was made anew nothing was heard. l.mu is held.
func (l *Listener) open(name string) error {
	var found *net.Interface
	if err := l.node.Do(func() (err error) {
		found, err = net.InterfaceByName(name)
		return err
	}); err != nil {
		l.close(name)
		return errors.New("this node has no such device")
	}
	if d := l.devices[name]; d != nil {
		if d.index == found.Index && slices.Equal(d.mac, found.HardwareAddr) && !d.hasFailed() {
			return nil
		}
		l.close(name)
	}
	d := &device{name: name, index: found.Index, mac: found.HardwareAddr, log: l.log, changed: l.changed, since: time.Now(),
		quit: make(chan struct{}), poked: wake.New()}
	if err := l.node.Do(d.listen); err != nil {
		return fmt.Errorf("listen for Router Advertisements: %w", err)
	}
	l.devices[name] = d
	l.done.Go(d.hear)
	l.done.Go(d.tell)
	return nil
}

func (l *Listener) close(name string) {
	if d := l.devices[name]; d != nil {
		close(d.quit)
		_ = d.socket.Close()
		delete(l.devices, name)
	}
}

// Heard returns what was heard, by the devices of the last Set.
func (l *Listener) Heard() map[string]Heard {
	l.mu.Lock()
	defer l.mu.Unlock()
	all := map[string]Heard{}
	for name, why := range l.failed {
		all[name] = Heard{Problem: why}
	}
	for name, d := range l.devices {
		d.mu.Lock()
		all[name] = Heard{Router: d.heard.router, Other: d.heard.other, Since: d.since, Problem: d.problem}
		d.mu.Unlock()
	}
	return all
}

// Close ends it all.
func (l *Listener) Close() {
	l.Set(nil)
	l.done.Wait()
}

// device is one that is listened on.
type device struct {
	name    string
	index   int
	mac     net.HardwareAddr
	log     *slog.Logger
	changed func()
	since   time.Time
	socket  *os.File
	quit    chan struct{}
	poked   wake.Signal // that something is to be said at once

	mu      sync.Mutex
	heard   heard
	problem string
	failed  bool // the socket is of no use any more
}

var (
	allNodes   = netip.MustParseAddr("ff02::1")
	allRouters = netip.MustParseAddr("ff02::2")
)

// listen opens the socket, in the namespace of the thread.
func (d *device) listen() error {
	fd, err := unix.Socket(unix.AF_INET6, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, unix.IPPROTO_ICMPV6)
	if err != nil {
		return os.NewSyscallError("socket", err)
	}
	var only unix.ICMPv6Filter // of types that are not passed on
	for i := range only.Data {
		only.Data[i] = ^uint32(0)
	}
	only.Data[advertiseType/32] &^= 1 << (advertiseType % 32)
	option := func(name string, option, value int) error {
		return os.NewSyscallError(name, unix.SetsockoptInt(fd, unix.IPPROTO_IPV6, option, value))
	}
	if err := errors.Join(
		os.NewSyscallError("ICMPV6_FILTER", unix.SetsockoptICMPv6Filter(fd, unix.IPPROTO_ICMPV6, unix.ICMPV6_FILTER, &only)),
		os.NewSyscallError("SO_BINDTODEVICE", unix.BindToDevice(fd, d.name)),
		option("IPV6_RECVHOPLIMIT", unix.IPV6_RECVHOPLIMIT, 1),
		option("IPV6_MULTICAST_HOPS", unix.IPV6_MULTICAST_HOPS, 255),
		option("IPV6_MULTICAST_LOOP", unix.IPV6_MULTICAST_LOOP, 0),
	); err != nil {
		unix.Close(fd)
		return err
	}
	d.socket = os.NewFile(uintptr(fd), "icmp6 "+d.name)
	return nil
}

func (d *device) hasFailed() bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.failed
}

// hear hears what routers say, until the socket is closed.
func (d *device) hear() {
	packet, control := make([]byte, 9216), make([]byte, 128)
	for {
		n, hops, from, err := d.receive(packet, control)
		switch {
		case errors.Is(err, os.ErrClosed):
			return
		case errors.Is(err, unix.ENETDOWN): // said once; it may come up again
			continue
		case err != nil:
			d.mu.Lock()
			d.problem, d.failed = "listen for Router Advertisements: "+err.Error(), true
			d.mu.Unlock()
			return
		}
		a, ok := parse(packet[:n], from, hops)
		if !ok {
			continue
		}
		d.mu.Lock()
		changed := d.heard.hear(a, time.Now())
		d.mu.Unlock()
		if !changed {
			continue
		}
		d.log.Info("a router was heard", "device", d.name, "address", a.from)
		d.poked.Set() // it is to hear of this node, too
		d.changed()
	}
}

func (d *device) receive(packet, control []byte) (n, hops int, from netip.Addr, err error) {
	raw, err := d.socket.SyscallConn()
	if err != nil {
		return 0, 0, from, err
	}
	var controls, flags int
	var sender unix.Sockaddr
	var failed error
	if err := raw.Read(func(fd uintptr) bool {
		n, controls, flags, sender, failed = unix.Recvmsg(int(fd), packet, control, 0)
		return !errors.Is(failed, unix.EAGAIN) && !errors.Is(failed, unix.EINTR)
	}); err != nil {
		return 0, 0, from, err
	}
	if failed != nil {
		return 0, 0, from, failed
	}
	// What came before the socket was bound may be of another device.
	if six, ok := sender.(*unix.SockaddrInet6); ok && six.ZoneId == uint32(d.index) && flags&unix.MSG_TRUNC == 0 {
		from = netip.AddrFrom16(six.Addr)
	}
	messages, err := unix.ParseSocketControlMessage(control[:controls])
	if err != nil {
		return n, 0, from, nil
	}
	for _, m := range messages {
		if m.Header.Level == unix.IPPROTO_IPV6 && m.Header.Type == unix.IPV6_HOPLIMIT && len(m.Data) >= 4 {
			hops = int(binary.NativeEndian.Uint32(m.Data))
		}
	}
	return n, hops, from, nil
}

// The least that RFC 4861 allows: a router that has begun anew is to find the node soon.
const minInterval, maxInterval = 3 * time.Second, 4 * time.Second

// tell says that the node is there, again and again, and asks for routers as long as that is of use.
func (d *device) tell() {
	for {
		d.mu.Lock()
		asks := d.heard.asks()
		d.mu.Unlock()
		err := d.send(advertise(d.mac), allNodes)
		if err == nil && asks {
			err = d.send(solicit(d.mac), allRouters)
		}
		d.mu.Lock()
		if !d.failed {
			d.problem = ""
			if err != nil {
				d.problem = problemOf(err)
			}
		}
		d.mu.Unlock()
		wait := time.NewTimer(minInterval + rand.N(maxInterval-minInterval))
		select {
		case <-d.quit:
			wait.Stop()
			return
		case <-d.poked:
			wait.Stop()
		case <-wait.C:
		}
	}
}

func (d *device) send(packet []byte, to netip.Addr) error {
	raw, err := d.socket.SyscallConn()
	if err != nil {
		return err
	}
	var failed error
	if err := raw.Write(func(fd uintptr) bool {
		failed = unix.Sendto(int(fd), packet, 0, &unix.SockaddrInet6{Addr: to.As16(), ZoneId: uint32(d.index)})
		return !errors.Is(failed, unix.EINTR)
	}); err != nil {
		return err
	}
	return failed
}

// problemOf says what is to be done about a packet that could not be sent.
func problemOf(err error) string {
	switch {
	case errors.Is(err, unix.EADDRNOTAVAIL):
		return "it has no link-local address"
	case errors.Is(err, unix.ENETDOWN), errors.Is(err, unix.ENETUNREACH):
		return "it is down, or without IPv6"
	}
	return "send a Router Advertisement: " + err.Error()
}
