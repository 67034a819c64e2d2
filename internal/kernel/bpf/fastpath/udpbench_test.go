package fastpath_test

import (
	"errors"
	"fmt"
	"net/netip"
	"runtime"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/fathom-network/fathom/internal/facts/podnet"
	"github.com/fathom-network/fathom/internal/kernel/bpf/fastpath"
	"github.com/fathom-network/fathom/internal/kernel/link"
	"github.com/fathom-network/fathom/internal/testenv"
)

// BenchmarkConnectedUDP measures what it costs that sockets of UDP which connect to a Service are left to rules for
// packets: the same two pods once by the endpoint's own address, as a socket that was translated sends, and once by the
// Service's, in turns. RR is a packet there and back on one socket, CRR a socket for each, as resolvers of names do.
//
//	go test ./internal/kernel/bpf/fastpath -run '^$' -bench ConnectedUDP -benchtime 100x
func BenchmarkConnectedUDP(b *testing.B) {
	for _, across := range []bool{false, true} {
		where := "same-node"
		if across {
			where = "two-nodes"
		}
		for _, by := range []meter{clock, cpu} {
			b.Run(where+"/"+by.name, func(b *testing.B) { benchmarkUDP(b, by, across) })
		}
	}
}

func benchmarkUDP(b *testing.B, by meter, across bool) {
	var from, to pod
	var n *node
	if across {
		n1, n2, pods := twoNodes(b, podnet.Direct, fastpath.Options{})
		n, from, to = n1, pods[0][0], pods[1][0]
		n2.set(b)
	} else {
		n = newNode(b, "a", fastpath.Options{})
		from, to = n.pod(b, 1, 2), n.pod(b, 1, 3)
		n.proxy(b, to)
		n.open(b)
	}
	n.set(b)
	testenv.Must(b, from.Sysctl("ipv4/ip_local_port_range", "1024 65535"))
	// Two ports: connection tracking would have to keep flows of the two ways apart that have one source port.
	for _, port := range []uint16{8080, 8081} {
		serveUDP(b, to.Namespace, netip.AddrPortFrom(to.addrs[0], port), by)
	}
	ways := map[string]unix.Sockaddr{
		"endpoint": &unix.SockaddrInet4{Addr: to.addrs[0].As4(), Port: 8081},
		"service":  &unix.SockaddrInet4{Addr: [4]byte{10, 96, 0, 1}, Port: 80},
	}
	rates := map[string][]float64{}
	b.ResetTimer()
	testenv.Must(b, from.Do(func() error {
		by.place()
		for range b.N {
			for name, way := range ways {
				rr, err := udpRR(way, by)
				if err != nil {
					return fmt.Errorf("RR by the %s's address: %w", name, err)
				}
				crr, err := udpCRR(way, by)
				if err != nil {
					return fmt.Errorf("CRR by the %s's address: %w", name, err)
				}
				rates["RR "+name], rates["CRR "+name] = append(rates["RR "+name], rr), append(rates["CRR "+name], crr)
			}
		}
		return nil
	}))
	b.StopTimer()
	for _, name := range []string{"RR", "CRR"} {
		endpoint, service := best(rates[name+" endpoint"]), best(rates[name+" service"])
		b.Logf("%-3s by the endpoint's address %.0f a second, by the Service's %.0f", name, endpoint, service)
		b.ReportMetric(service/endpoint, name)
	}
	b.ReportMetric(0, "ns/op")
}

// serveUDP answers each packet.
func serveUDP(b *testing.B, n *link.Namespace, at netip.AddrPort, by meter) {
	b.Helper()
	var s int
	testenv.Must(b, n.Do(func() error {
		var err error
		if s, err = unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0); err != nil {
			return err
		}
		return unix.Bind(s, &unix.SockaddrInet4{Addr: at.Addr().As4(), Port: int(at.Port())})
	}))
	ended := make(chan struct{})
	b.Cleanup(func() {
		_ = unix.Shutdown(s, unix.SHUT_RDWR)
		<-ended
	})
	go func() {
		defer close(ended)
		runtime.LockOSThread()
		by.place()
		defer unix.Close(s)
		buf := make([]byte, 64)
		for {
			size, who, err := unix.Recvfrom(s, buf, 0)
			if err != nil || size == 0 {
				return
			}
			_ = unix.Sendto(s, buf[:size], 0, who)
		}
	}()
}

func connectUDP(to unix.Sockaddr) (int, error) {
	s, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return -1, err
	}
	if err := unix.SetsockoptTimeval(s, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Sec: 10}); err != nil {
		return -1, err
	}
	return s, unix.Connect(s, to)
}

func udpRR(to unix.Sockaddr, by meter) (float64, error) {
	s, err := connectUDP(to)
	if err != nil {
		return 0, err
	}
	defer unix.Close(s)
	return by.loop(func(buf []byte) (int, error) { return exchange(s, buf[:1]) })
}

func udpCRR(to unix.Sockaddr, by meter) (float64, error) {
	return by.loop(func(buf []byte) (int, error) {
		s, err := connectUDP(to)
		if err != nil {
			return 0, err
		}
		defer unix.Close(s)
		return exchange(s, buf[:1])
	})
}

func exchange(s int, buf []byte) (int, error) {
	if _, err := unix.Write(s, buf); err != nil {
		return 0, err
	}
	for {
		size, err := unix.Read(s, buf)
		if !errors.Is(err, unix.EINTR) { // it has a timeout, and so is not begun again by itself
			return size, err
		}
	}
}
