// Package traffic is how measurements send packets from one pod to another, and answer them, in namespaces.
package traffic

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"runtime"
	"runtime/debug"
	"slices"
	"sync"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/fathom-network/fathom/internal/kernel/affinity"
	"github.com/fathom-network/fathom/internal/kernel/link"
)

// Prepare readies the process for measuring, until the function that it returns is called: no garbage is collected, which would stop the threads
// that measure.
func Prepare() (done func()) {
	percent := debug.SetGCPercent(-1)
	return func() { debug.SetGCPercent(percent) }
}

// Reach says whether one question is answered.
func Reach(from *link.Namespace, to netip.Addr) error {
	return from.Do(func() error {
		fd, err := dial(to, echoPort, time.Second)
		if err != nil {
			return err
		}
		defer closeFD(fd)
		return exchange(fd, make([]byte, 1))
	})
}

// Measure is one thing that is measured of a path: bytes, or events, in a second.
type Measure struct {
	Name  string
	Bytes bool
	do    func(netip.Addr, time.Duration) (float64, error)
}

// Take measures for a while, from a namespace to an address at which Serve serves.
func (m Measure) Take(from *link.Namespace, to netip.Addr, slice time.Duration) (rate float64, err error) {
	err = from.Do(func() (err error) { rate, err = m.do(to, slice); return err })
	return rate, err
}

// SetClient readies a namespace to measure from: connections end faster than their ports are free again.
func SetClient(n *link.Namespace) error {
	for name, value := range map[string]string{"ipv4/ip_local_port_range": "1024 65535", "ipv4/tcp_tw_reuse": "1"} {
		if err := n.Sysctl(name, value); err != nil {
			return err
		}
	}
	return nil
}

// Percentile is that of what was measured, the nearest that was.
func Percentile[T float64 | time.Duration](all []T, p int) T {
	all = slices.Sorted(slices.Values(all))
	return all[(len(all)-1)*p/100]
}

// Best is what was measured in the best tenth of the turns: what others do on the machine only ever costs.
func Best(rates []float64) float64 { return Percentile(rates, 90) }

// Measures are what is measured of a way, as netperf and iperf3 do: a byte there and back on one connection, a
// connection for each, and bytes on one connection and on eight. What is counted are those in a second.
//
// Threads are bound to processors, or the table would be one of where the scheduler put them. Who asks, or sends, is on
// the first, and who answers, or swallows, on the second, as the programs of two pods would be: most of what RR and CRR
// take then is the wake-up of a processor that sleeps, which is the same for all ways. Of those whose names end in
// 1CPU both ends share the first: what counts then is the work that a way makes, and nothing else.
var Measures = []Measure{
	{Name: "RR", do: onFirst(rr(echoPort))},
	{Name: "CRR", do: onFirst(crr(echoPort))},
	{Name: "RR-1CPU", do: onFirst(rr(echoFirstPort))},
	{Name: "CRR-1CPU", do: onFirst(crr(echoFirstPort))},
	{Name: "STREAM", Bytes: true, do: onFirst(stream)},
	{Name: "8-STREAMS", Bytes: true, do: eightStreams},
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

func connect(to netip.Addr, port uint16) (int, error) { return dial(to, port, 0) }

// dial is connect that gives up after a while, unless that is 0.
func dial(to netip.Addr, port uint16, patience time.Duration) (int, error) {
	fd, err := call(unix.SYS_SOCKET, unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return -1, err
	}
	if patience > 0 {
		limit := unix.NsecToTimeval(patience.Nanoseconds())
		_ = unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &limit)
		_ = unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_SNDTIMEO, &limit)
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

// Serve answers each byte with a byte, and swallows what comes to the other ports.
func Serve(n *link.Namespace) error {
	// Threads that wait in system calls of which Go's scheduler knows nothing are processors that it believes to be busy.
	runtime.GOMAXPROCS(max(64, runtime.GOMAXPROCS(0)))
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
					fmt.Fprintln(os.Stderr, "traffic:", err)
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
