package svcbench

import (
	"bufio"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"runtime"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/fathom-network/fathom/internal/kernel/affinity"
)

// serverPort is the endpoints' port, servicePort the Services'.
const (
	serverPort  = 8080
	servicePort = 80
)

// processor is the one that a client and its server share during a measurement, so that it measures the work that a proxy
// adds. On two processors more than half of the time would go to waking the other one up, or not, as the scheduler decides.
const processor = 0

// runServer answers each byte with the address that it was sent to. It serves one connection after the other with plain
// system calls: Go's network poller would cost several times what is measured.
func runServer() error {
	release, err := affinity.Bind(processor)
	if err != nil {
		return err
	}
	defer release()
	l, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err == nil {
		err = unix.SetsockoptInt(l, unix.SOL_SOCKET, unix.SO_REUSEADDR, 1)
	}
	if err == nil {
		err = unix.Bind(l, &unix.SockaddrInet4{Port: serverPort})
	}
	if err == nil {
		err = unix.Listen(l, 1024)
	}
	if err != nil {
		return fmt.Errorf("listen at port %d: %w", serverPort, err)
	}
	fmt.Println("ready")
	for {
		fd, _, err := unix.Accept4(l, unix.SOCK_CLOEXEC)
		if errors.Is(err, unix.EINTR) || errors.Is(err, unix.ECONNABORTED) {
			continue
		}
		if err != nil {
			return fmt.Errorf("accept: %w", err)
		}
		reply(fd)
		unix.Close(fd)
	}
}

func reply(fd int) {
	_ = unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Sec: 2}) // in case that a client was killed
	_ = unix.SetsockoptInt(fd, unix.IPPROTO_TCP, unix.TCP_NODELAY, 1)
	sa, err := unix.Getsockname(fd)
	if err != nil {
		return
	}
	addr := sa.(*unix.SockaddrInet4).Addr
	b := make([]byte, 1)
	for {
		n := 0
		err := uninterrupted(func() (err error) {
			n, err = unix.Read(fd, b)
			return err
		})
		if n != 1 || err != nil {
			return
		}
		if _, err := unix.Write(fd, addr[:]); err != nil {
			return
		}
	}
}

const (
	// patience is for connections that should succeed, impatience for those that may fail: the kernel silently drops
	// packets to nowhere once there are many, and retransmits a SYN only after a second.
	patience   = time.Second
	impatience = 20 * time.Millisecond
)

// dial connects, and gives up after limit. Impatient callers try again and again, so dial closes their connections without
// TIME_WAIT. Otherwise a proxy that is slow to change would be left with an address with hardly a free port, and the kernel
// would search for one at each connection that is measured afterwards.
func dial(to netip.AddrPort, limit time.Duration) (int, error) {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return -1, err
	}
	read, write := unix.NsecToTimeval(patience.Nanoseconds()), unix.NsecToTimeval(limit.Nanoseconds())
	_ = unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &read)
	_ = unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_SNDTIMEO, &write) // applies to connect(), too
	_ = unix.SetsockoptInt(fd, unix.IPPROTO_TCP, unix.TCP_NODELAY, 1)
	if limit == impatience {
		_ = unix.SetsockoptLinger(fd, unix.SOL_SOCKET, unix.SO_LINGER, &unix.Linger{Onoff: 1})
	}
	at := &unix.SockaddrInet4{Addr: to.Addr().As4(), Port: int(to.Port())}
	if err := uninterrupted(func() error { return unix.Connect(fd, at) }); err != nil {
		unix.Close(fd)
		return -1, err
	}
	return fd, nil
}

// uninterrupted repeats a call that a signal interrupted. Go's runtime sends signals, and with a timeout the kernel does
// not restart the call itself.
func uninterrupted(call func() error) error {
	for {
		if err := call(); !errors.Is(err, unix.EINTR) {
			return err
		}
	}
}

// exchange sends a request, and returns the address that answers.
func exchange(fd int) (netip.Addr, error) {
	if _, err := unix.Write(fd, []byte{0}); err != nil { // never blocks
		return netip.Addr{}, err
	}
	var b [4]byte
	n := 0
	err := uninterrupted(func() (err error) {
		n, err = unix.Read(fd, b[:])
		return err
	})
	if err != nil || n != len(b) {
		return netip.Addr{}, errors.Join(io.ErrUnexpectedEOF, err)
	}
	return netip.AddrFrom4(b), nil
}

// crr makes a connection with a request and a response.
func crr(to netip.AddrPort, limit time.Duration) (netip.Addr, error) {
	fd, err := dial(to, limit)
	if err != nil {
		return netip.Addr{}, err
	}
	defer unix.Close(fd)
	return exchange(fd)
}

// runClient executes commands, one per line, and answers each with a line:
//
//	crr DURATION ADDRPORT…   connects to them in turn; answers with the rate per second
//	rr DURATION ADDRPORT…    sends requests on one connection to each; answers with the rate per second
//	await DURATION ADDRPORT… answers with the time, in nanoseconds since 1970, at which all have answered
//	until DURATION PREFIX ADDRPORT  answers with the time at which an endpoint in the prefix has answered
func runClient(in io.Reader, out io.Writer) error {
	runtime.LockOSThread()
	fmt.Fprintln(out, "ready")
	for s := bufio.NewScanner(in); s.Scan(); {
		words := strings.Fields(s.Text())
		answer, err := do(words[0], words[1:])
		if err != nil {
			answer = "error " + err.Error()
		}
		fmt.Fprintln(out, answer)
	}
	return nil
}

// pollInterval leaves the processor to the proxy that is waited for.
const pollInterval = 200 * time.Microsecond

func do(what string, args []string) (string, error) {
	limit, err := time.ParseDuration(args[0])
	if err != nil {
		return "", err
	}
	var prefix netip.Prefix
	if what == "until" {
		if prefix, err = netip.ParsePrefix(args[1]); err != nil {
			return "", err
		}
		args = args[1:]
	}
	var to []netip.AddrPort
	for _, a := range args[1:] {
		at, err := netip.ParseAddrPort(a)
		if err != nil {
			return "", err
		}
		to = append(to, at)
	}
	switch what {
	case "crr", "rr":
		release, err := affinity.Bind(processor)
		if err != nil {
			return "", err
		}
		defer release()
		count := countCRR
		if what == "rr" {
			count = countRR
		}
		rate, err := count(to, limit)
		return strconv.FormatFloat(rate, 'f', 1, 64), err
	case "await", "until":
		for began := time.Now(); ; {
			who, err := crr(to[0], impatience)
			if err == nil && (what == "await" || prefix.Contains(who)) {
				if to = to[1:]; len(to) == 0 {
					return strconv.FormatInt(time.Now().UnixNano(), 10), nil
				}
				continue
			}
			if time.Since(began) > limit {
				return "", fmt.Errorf("not within %v", limit)
			}
			time.Sleep(pollInterval)
		}
	}
	return "", errors.New("there is no such command")
}

// countCRR connects to them in turn, and returns the rate per second.
func countCRR(to []netip.AddrPort, limit time.Duration) (float64, error) {
	n, began := 0, time.Now()
	for ; time.Since(began) < limit; n++ {
		if _, err := crr(to[n%len(to)], patience); err != nil {
			return 0, fmt.Errorf("ask %s: %w", to[n%len(to)], err)
		}
	}
	return float64(n) / time.Since(began).Seconds(), nil
}

// countRR sends requests on one connection to each, for the same time, and returns the rate per second.
func countRR(to []netip.AddrPort, limit time.Duration) (float64, error) {
	n, spent := 0, time.Duration(0)
	for _, at := range to {
		fd, err := dial(at, patience)
		if err != nil {
			return 0, fmt.Errorf("ask %s: %w", at, err)
		}
		began := time.Now()
		for ; time.Since(began) < limit/time.Duration(len(to)) && err == nil; n++ {
			_, err = exchange(fd)
		}
		spent += time.Since(began)
		unix.Close(fd)
		if err != nil {
			return 0, fmt.Errorf("ask %s: %w", at, err)
		}
	}
	return float64(n) / spent.Seconds(), nil
}

// nth returns the i-th address after a base.
func nth(base string, i int) netip.Addr {
	b := netip.MustParseAddr(base).As4()
	binary.BigEndian.PutUint32(b[:], binary.BigEndian.Uint32(b[:])+uint32(i))
	return netip.AddrFrom4(b)
}
