package fastpath_test

import (
	"encoding/binary"
	"errors"
	"io/fs"
	"net"
	"net/netip"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/fathom-network/fathom/internal/kernel/bpf/fastpath"
	"github.com/fathom-network/fathom/internal/kernel/bpf/pin"
	"github.com/fathom-network/fathom/internal/kernel/podlink"
	"github.com/fathom-network/fathom/internal/testenv"
)

// frame is an Ethernet frame; the payload is UDP's, to port 8080.
func frame(from, to net.HardwareAddr, src, dst netip.Addr, ttl byte) []byte {
	f := append(append([]byte{}, to...), from...)
	udp := []byte{0x30, 0x39, 0x1f, 0x90, 0, 12, 0, 0, 'f', 'a', 'k', 'e'} // without a checksum, which IPv4 allows
	if src.Is4() {
		ip := append([]byte{0x45, 0, 0, byte(20 + len(udp)), 0, 1, 0, 0, ttl, unix.IPPROTO_UDP, 0, 0}, append(src.AsSlice(), dst.AsSlice()...)...)
		sum := uint32(0)
		for i := 0; i < len(ip); i += 2 {
			sum += uint32(binary.BigEndian.Uint16(ip[i:]))
		}
		for sum > 0xffff {
			sum = sum>>16 + sum&0xffff
		}
		binary.BigEndian.PutUint16(ip[10:], ^uint16(sum))
		return append(append(append(f, 0x08, 0x00), ip...), udp...)
	}
	ip := append([]byte{0x60, 0, 0, 0, 0, byte(len(udp)), unix.IPPROTO_UDP, ttl}, append(src.AsSlice(), dst.AsSlice()...)...)
	return append(append(append(f, 0x86, 0xdd), ip...), udp...)
}

func arp(from, sender net.HardwareAddr, spa, tpa netip.Addr) []byte {
	f := append([]byte{0xff, 0xff, 0xff, 0xff, 0xff, 0xff}, from...)
	f = append(f, 0x08, 0x06, 0, 1, 8, 0, 6, 4, 0, 1)
	f = append(append(f, sender...), spa.AsSlice()...)
	return append(append(f, 0, 0, 0, 0, 0, 0), tpa.AsSlice()...)
}

// send puts a frame on the pod's device as it is.
func send(t testing.TB, p pod, f []byte) {
	t.Helper()
	testenv.Must(t, p.Do(func() error {
		fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW, 0)
		if err != nil {
			return err
		}
		defer unix.Close(fd)
		device, err := net.InterfaceByName("eth0")
		if err != nil {
			return err
		}
		return unix.Sendto(fd, f, 0, &unix.SockaddrLinklayer{Ifindex: device.Index, Protocol: 0x0008})
	}))
}

func TestSpoof(t *testing.T) {
	a4, other4 := netip.MustParseAddr("10.244.1.2"), netip.MustParseAddr("10.244.1.9")
	a6, other6 := netip.MustParseAddr("fd00:10:244:1::2"), netip.MustParseAddr("fd00:10:244:1::9")
	b4, b6 := netip.MustParseAddr("10.244.1.3"), netip.MustParseAddr("fd00:10:244:1::3")
	linkLocal, none, all := netip.MustParseAddr("fe80::2"), netip.IPv6Unspecified(), netip.MustParseAddr("ff02::1")
	for _, fast := range []bool{true, false} {
		n := newNode(t, "a", fastpath.Options{})
		a, b := n.pod(t, 1, 2), n.pod(t, 1, 3)
		n.plan.Fast = fast
		n.open(t)
		n.set(t)
		fake := net.HardwareAddr{2, 9, 9, 9, 9, 9}
		good := "redirected to_pod"
		if !fast {
			good = "stack pod"
		}
		for _, tc := range []struct {
			what  string
			frame []byte
			want  string
		}{
			{"own IPv4", frame(a.mac, a.hostMAC, a4, b4, 64), good},
			{"own IPv6", frame(a.mac, a.hostMAC, a6, b6, 64), good},
			{"another IPv4", frame(a.mac, a.hostMAC, other4, b4, 64), "dropped source"},
			{"another pod's IPv4", frame(a.mac, a.hostMAC, b4, b4, 64), "dropped source"},
			{"another IPv6", frame(a.mac, a.hostMAC, other6, b6, 64), "dropped source"},
			{"another pod's IPv6", frame(a.mac, a.hostMAC, b6, b6, 64), "dropped source"},
			{"the node's", frame(a.mac, a.hostMAC, netip.MustParseAddr("198.51.100.1"), b4, 64), "dropped source"},
			{"loopback", frame(a.mac, a.hostMAC, netip.MustParseAddr("127.0.0.1"), b4, 64), "dropped source"},
			{"unspecified IPv4", frame(a.mac, a.hostMAC, netip.IPv4Unspecified(), b4, 64), "dropped source"},
			{"another MAC, IPv4", frame(fake, a.hostMAC, a4, b4, 64), "dropped mac"},
			{"another MAC, IPv6", frame(fake, a.hostMAC, a6, b6, 64), "dropped mac"},
			{"link-local to the link", frame(a.mac, a.hostMAC, linkLocal, all, 255), "stack elsewhere"},
			{"link-local beyond", frame(a.mac, a.hostMAC, linkLocal, b6, 255), "dropped source"},
			{"link-local, another MAC", frame(fake, a.hostMAC, linkLocal, all, 255), "dropped mac"},
			{"is it free?", frame(a.mac, a.hostMAC, none, all, 255), "stack elsewhere"},
			{"from nobody", frame(a.mac, a.hostMAC, none, b6, 255), "dropped source"},
			{"to another MAC", frame(a.mac, fake, a4, b4, 64), "stack not_ours"},
			{"to itself", frame(a.mac, a.hostMAC, a4, a4, 64), map[bool]string{true: "stack self", false: "stack pod"}[fast]},
			{"at its end", frame(a.mac, a.hostMAC, a4, b4, 1), map[bool]string{true: "stack ttl", false: "stack pod"}[fast]},
			{"at its end, IPv6", frame(a.mac, a.hostMAC, a6, b6, 1), map[bool]string{true: "stack ttl", false: "stack pod"}[fast]},
			{"own ARP", arp(a.mac, a.mac, a4, b4), "stack elsewhere"},
			{"ARP probe", arp(a.mac, a.mac, netip.IPv4Unspecified(), a4), "stack elsewhere"},
			{"another's ARP", arp(a.mac, a.mac, b4, a4), "dropped arp"},
			{"nobody's ARP", arp(a.mac, a.mac, other4, a4), "dropped arp"},
			{"ARP for another MAC", arp(a.mac, fake, a4, b4), "dropped arp"},
			{"ARP from another MAC", arp(fake, a.mac, a4, b4), "dropped arp"},
			{"a bridge's", append(append(append([]byte{}, all.AsSlice()[:6]...), a.mac...), make([]byte, 60)...), "dropped ethertype"},
			{"half a header", frame(a.mac, a.hostMAC, a4, b4, 64)[:30], "dropped source"},
		} {
			got := n.counted(t, func() { send(t, a, tc.frame) })
			if got[tc.want] == 0 {
				t.Errorf("fast=%v, %s: %v, want %q", fast, tc.what, got, tc.want)
			}
			if !fast {
				hasNot(t, tc.what, got, "redirected to_pod")
			}
		}
		_ = b
	}
}

// TestAttach is the plugin's part: without an agent, from the first packet on.
func TestAttach(t *testing.T) {
	for name, put := range map[string]func(n *node, index, program int) error{
		"filter": func(n *node, index, program int) error { return n.SetFilter(index, program, pin.FromPod) },
		"tcx":    func(_ *node, index, program int) error { return pin.AttachTCX(index, program) },
	} {
		t.Run(name, func(t *testing.T) { testAttach(t, put) })
	}
}

func testAttach(t *testing.T, put func(n *node, index, program int) error) {
	n := newNode(t, "a", fastpath.Options{})
	if err := pin.Attach(n.opts.Dir, pin.Device{Index: 1}, nil); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("with nothing pinned: %v", err)
	}
	n.open(t)
	n.set(t)
	a, b := n.pod(t, 1, 2), n.pod(t, 1, 3)
	n.proxy(t, b)
	serve(t, b)
	attach := func(p pod) {
		t.Helper()
		testenv.Must(t, n.Do(func() error {
			return pin.Attach(n.opts.Dir, pin.Device{Index: p.index, MAC: [6]byte(p.mac), HostMAC: [6]byte(p.hostMAC), Addrs: p.addrs},
				func(program int) error { return put(n, p.index, program) })
		}))
	}
	for range 2 {
		attach(a)
		attach(b)
	}
	for _, to := range b.addrs {
		c := n.counted(t, func() { testenv.Must(t, echo(a.Namespace, "tcp", to, 8080, 10000)) })
		has(t, "without an agent", c, "stack pod")
		hasNot(t, "without an agent", c, "redirected to_pod")
	}
	if c := n.counted(t, func() { send(t, a, frame(a.mac, a.hostMAC, b.addrs[0], b.addrs[0], 64)) }); c["dropped source"] == 0 {
		t.Error(c)
	}
	n.set(t)
	attach(b) // later than the agent: it stays fast
	for _, to := range b.addrs {
		c := n.counted(t, func() { testenv.Must(t, echo(a.Namespace, "tcp", to, 8080, 10000)) })
		has(t, "with an agent", c, "redirected to_pod")
	}
	// The address goes to another pod, while no agent is there to sweep.
	testenv.Must(t, podlink.Delete(n.Namespace, b.host, "test"))
	again := n.pod(t, 1, 3)
	serve(t, again)
	for _, to := range again.addrs {
		testenv.Must(t, echo(a.Namespace, "tcp", to, 8080, 10000)) // not even the plugin has told
	}
	attach(again)
	testenv.Must(t, echo(a.Namespace, "tcp", again.addrs[0], 8080, 10000))
	testenv.Must(t, podlink.Delete(n.Namespace, a.host, "test"))
	if c := n.set(t); c.Pods.Removed != 2 {
		t.Errorf("swept %v", c)
	}
	n.noneInvalid(t)
}
