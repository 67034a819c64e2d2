package main

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"runtime"
	"slices"
	"strings"
	"sync"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/fathom-network/fathom/internal/kernel/affinity"
	"github.com/fathom-network/fathom/internal/kernel/link"
)

// way is one from a pod to another.
type way struct {
	where, name  string
	from, server *link.Namespace
	to           netip.Addr
	rates        map[string][]float64
}

// measures are what is measured of a way, as netperf and iperf3 do: a byte there and back on one connection, a
// connection for each, and bytes on one connection and on eight. What is counted are those in a second.
//
// Threads are bound to processors, or the table would be one of where the scheduler put them. Who asks, or sends, is on
// the first, and who answers, or swallows, on the second, as the programs of two pods would be: most of what RR and CRR
// take then is the wake-up of a processor that sleeps, which is the same for all ways. Of those whose names end in
// 1CPU both ends share the first: what counts then is the work that a way makes, and nothing else.
var measures = []struct {
	name  string
	bytes bool
	do    func(netip.Addr, time.Duration) (float64, error)
}{
	{name: "RR", do: onFirst(rr(echoPort))},
	{name: "CRR", do: onFirst(crr(echoPort))},
	{name: "RR-1CPU", do: onFirst(rr(echoFirstPort))},
	{name: "CRR-1CPU", do: onFirst(crr(echoFirstPort))},
	{name: "STREAM", bytes: true, do: onFirst(stream)},
	{name: "8-STREAMS", bytes: true, do: eightStreams},
}

// onFirst has a client run on the first processor.
func onFirst(do func(netip.Addr, time.Duration) (float64, error)) func(netip.Addr, time.Duration) (float64, error) {
	return func(to netip.Addr, slice time.Duration) (float64, error) {
		release, err := affinity.Bind(0)
		if err != nil {
			return 0, err
		}
		defer release()
		return do(to, slice)
	}
}

const (
	echoPort, echoFirstPort, sinkPort, sinksPort = 8081, 8082, 8083, 8084

	streams = 8
)

// listeners are a server's: how many threads accept at a port, and on which processor they are, counted around: where
// there is one, all are on that.
var listeners = []struct {
	port, threads, processor int
	echo                     bool
}{
	{echoPort, 1, 1, true},
	{echoFirstPort, 1, 0, true},
	{sinkPort, 1, 1, false},
	{sinksPort, streams, anywhere, false},
}

const anywhere = -1

func (b *bench) measureWays(ctx context.Context) error {
	defer b.end()
	if err := b.makeWays(ctx); err != nil {
		return err
	}
	for _, w := range b.ways {
		w.rates = map[string][]float64{}
		// Connections end faster than their ports are free again.
		for name, value := range map[string]string{"ipv4/ip_local_port_range": "1024 65535", "ipv4/tcp_tw_reuse": "1"} {
			if err := w.from.Sysctl(name, value); err != nil {
				return err
			}
		}
		if err := serve(w.server); err != nil {
			return err
		}
	}
	for round := range b.rounds {
		if round%10 == 0 {
			fmt.Fprintf(os.Stderr, "pods: round %d of %d\n", round+1, b.rounds)
		}
		for j := range b.ways {
			if err := ctx.Err(); err != nil {
				return err
			}
			w := b.ways[(round+j)%len(b.ways)]
			for _, m := range measures {
				if !slices.Contains(strings.Split(b.measures, ","), m.name) {
					continue
				}
				var rate float64
				err := w.from.Do(func() (err error) { rate, err = m.do(w.to, b.slice); return err })
				if err != nil {
					return fmt.Errorf("%s, %s, %s: %w", w.where, w.name, m.name, err)
				}
				w.rates[m.name] = append(w.rates[m.name], rate)
			}
		}
	}
	return nil
}

// end ends what was started. Namespaces and mounts go with this process.
func (b *bench) end() {
	for _, p := range b.programs {
		_ = p.Process.Kill()
		_ = p.Wait()
	}
	b.programs = nil
}

// What is called for each byte are the plain system calls: what Go's own do around those, and its scheduler, costs as
// much as what is measured, and would make all ways look the same.

func call(trap, a, b, c uintptr) (int, error) {
	for {
		n, _, errno := unix.RawSyscall(trap, a, b, c)
		if errno == 0 {
			return int(n), nil
		}
		if errno != unix.EINTR {
			return 0, errno
		}
	}
}

func read(fd int, b []byte) (int, error) {
	return call(unix.SYS_READ, uintptr(fd), uintptr(unsafe.Pointer(&b[0])), uintptr(len(b)))
}

func write(fd int, b []byte) (int, error) {
	return call(unix.SYS_WRITE, uintptr(fd), uintptr(unsafe.Pointer(&b[0])), uintptr(len(b)))
}

func closeFD(fd int) { _, _ = call(unix.SYS_CLOSE, uintptr(fd), 0, 0) }

// patience is what a connection has before it is an error.
const patience = 5

func connect(to netip.Addr, port uint16) (int, error) {
	fd, err := call(unix.SYS_SOCKET, unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return -1, err
	}
	at := unix.RawSockaddrInet4{Family: unix.AF_INET, Port: port<<8 | port>>8, Addr: to.As4()}
	if _, err := call(unix.SYS_CONNECT, uintptr(fd), uintptr(unsafe.Pointer(&at)), unsafe.Sizeof(at)); err != nil {
		closeFD(fd)
		return -1, fmt.Errorf("connect to %v port %d: %w", to, port, err)
	}
	return fd, nil
}

// setUp is for connections that live longer than one question.
func setUp(fd int) {
	_ = unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Sec: patience})
	_ = unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_SNDTIMEO, &unix.Timeval{Sec: patience})
	_ = unix.SetsockoptInt(fd, unix.IPPROTO_TCP, unix.TCP_NODELAY, 1)
}

func exchange(fd int, buf []byte) error {
	if _, err := write(fd, buf[:1]); err != nil {
		return err
	}
	n, err := read(fd, buf[:1])
	if err == nil && n == 0 {
		err = errors.New("the other end has closed the connection")
	}
	return err
}

// rate calls a function until the time is over, and returns the sum of what it returns in a second.
func rate(slice time.Duration, do func() (int, error)) (float64, error) {
	total, began := 0, time.Now()
	for {
		n, err := do()
		if err != nil {
			return 0, err
		}
		total += n
		if took := time.Since(began); took >= slice {
			return float64(total) / took.Seconds(), nil
		}
	}
}

func rr(port uint16) func(netip.Addr, time.Duration) (float64, error) {
	return func(to netip.Addr, slice time.Duration) (float64, error) {
		fd, err := connect(to, port)
		if err != nil {
			return 0, err
		}
		defer closeFD(fd)
		setUp(fd)
		buf := make([]byte, 1)
		return rate(slice, func() (int, error) { return 1, exchange(fd, buf) })
	}
}

func crr(port uint16) func(netip.Addr, time.Duration) (float64, error) {
	return func(to netip.Addr, slice time.Duration) (float64, error) {
		buf := make([]byte, 1)
		return rate(slice, func() (int, error) {
			fd, err := connect(to, port)
			if err != nil {
				return 0, err
			}
			defer closeFD(fd)
			return 1, exchange(fd, buf)
		})
	}
}

func stream(to netip.Addr, slice time.Duration) (float64, error) {
	fd, err := connect(to, sinkPort)
	if err != nil {
		return 0, err
	}
	defer closeFD(fd)
	setUp(fd)
	buf := make([]byte, 128<<10)
	return rate(slice, func() (int, error) { return write(fd, buf) })
}

func eightStreams(to netip.Addr, slice time.Duration) (sum float64, failed error) {
	var fds [streams]int
	for i := range fds {
		fd, err := connect(to, sinksPort)
		if err != nil {
			return 0, err
		}
		defer closeFD(fd)
		setUp(fd)
		fds[i] = fd
	}
	var all sync.WaitGroup
	var mu sync.Mutex
	for _, fd := range fds {
		all.Go(func() {
			runtime.LockOSThread()
			defer runtime.UnlockOSThread()
			buf := make([]byte, 128<<10)
			r, err := rate(slice, func() (int, error) { return write(fd, buf) })
			mu.Lock()
			defer mu.Unlock()
			sum += r
			failed = errors.Join(failed, err)
		})
	}
	all.Wait()
	return sum, failed
}

// serve answers each byte with a byte, and swallows what comes to the other ports.
func serve(n *link.Namespace) error {
	for _, at := range listeners {
		var l int
		err := n.Do(func() (err error) {
			if l, err = unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0); err != nil {
				return err
			}
			if err := unix.Bind(l, &unix.SockaddrInet4{Port: at.port}); err != nil {
				return err
			}
			return unix.Listen(l, 128)
		})
		if err != nil {
			return fmt.Errorf("listen at port %d: %w", at.port, err)
		}
		for range at.threads {
			go func() {
				if err := accept(l, at.processor, at.echo); err != nil {
					fmt.Fprintln(os.Stderr, "pods:", err)
				}
			}()
		}
	}
	return nil
}

// accept serves one connection after the other.
func accept(l, processor int, echo bool) error {
	runtime.LockOSThread()
	if processor != anywhere {
		if _, err := affinity.Bind(processor); err != nil {
			return err
		}
	}
	buf := make([]byte, 256<<10)
	for {
		fd, _, err := unix.Accept(l) // known to Go's scheduler: it may take long
		if errors.Is(err, unix.EINTR) || errors.Is(err, unix.ECONNABORTED) {
			continue
		}
		if err != nil {
			return fmt.Errorf("accept: %w", err)
		}
		answer(fd, echo, buf)
		closeFD(fd)
	}
}

func answer(fd int, echo bool, buf []byte) {
	for {
		n, err := read(fd, buf)
		if err != nil || n == 0 {
			return
		}
		if echo {
			if _, err := write(fd, buf[:1]); err != nil {
				return
			}
		}
	}
}

// goals are what the project holds itself to, as a ratio to the plain pair, or to another way.
var goals = []struct {
	where, way, measure, to string
	least                   float64
}{
	{sameNode, "fathom", "RR", veth, 0.95},
	{sameNode, "fathom", "CRR", veth, 0.95},
	{sameNode, "fathom", "STREAM", veth, 1},
	{sameNode, "fathom", "8-STREAMS", veth, 1},
	{twoNodes, "fathom direct", "RR", veth, 0.85},
	{twoNodes, "fathom direct", "CRR", veth, 0.85},
	{twoNodes, "fathom vxlan", "RR", "flannel vxlan", 1},
	{twoNodes, "fathom vxlan", "CRR", "flannel vxlan", 1},
	{twoNodes, "fathom vxlan", "STREAM", "flannel vxlan", 1},
	{twoNodes, "fathom vxlan", "8-STREAMS", "flannel vxlan", 1},
}

// best is what a way did in the best tenth of its turns: what others do on the machine only ever costs.
func (w *way) best(measure string) float64 { return percentile(w.rates[measure], 90) }

func (b *bench) find(where, name string) *way {
	for _, w := range b.ways {
		if w.where == where && w.name == name {
			return w
		}
	}
	return nil
}

func (b *bench) pathRows() (rows [][]string, missed []string) {
	for _, w := range b.ways {
		row := []string{w.where, w.name}
		plain := b.find(w.where, veth)
		for _, m := range measures {
			switch {
			case len(w.rates[m.name]) == 0:
				row = append(row, "-")
			case w != plain:
				row = append(row, fmt.Sprintf("%.2f", w.best(m.name)/plain.best(m.name)))
			case m.bytes:
				row = append(row, fmt.Sprintf("%.1f Gbit/s", w.best(m.name)*8/1e9))
			default:
				row = append(row, fmt.Sprintf("%.0f /s", w.best(m.name)))
			}
		}
		rows = append(rows, row)
	}
	for _, g := range goals {
		w, to := b.find(g.where, g.way), b.find(g.where, g.to)
		if w == nil || to == nil || len(w.rates[g.measure]) == 0 {
			continue
		}
		if is := w.best(g.measure) / to.best(g.measure); is < g.least {
			missed = append(missed, fmt.Sprintf("%s, %s: %s is %.2f of %s, the goal is at least %.2f", g.where, g.way, g.measure, is, g.to, g.least))
		}
	}
	return rows, missed
}
