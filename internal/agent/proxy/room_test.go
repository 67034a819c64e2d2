package proxy

import (
	"fmt"
	"net"
	"net/netip"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	corev1 "k8s.io/api/core/v1"

	"github.com/fathom-network/fathom/internal/facts/answer"
	"github.com/fathom-network/fathom/internal/facts/netconf"
	"github.com/fathom-network/fathom/internal/facts/service"
	"github.com/fathom-network/fathom/internal/kernel/bpf/connect"
	"github.com/fathom-network/fathom/internal/kernel/ruleset"
	"github.com/fathom-network/fathom/internal/testenv"
	"github.com/fathom-network/fathom/internal/testenv/linktest"
)

// TestRoom has the node use up its share of connected sockets: nftables answers in the place of connect(), a pod's
// sockets are translated as before, and it is told. So it does for MPTCP, whose sockets are never noted.
func TestRoom(t *testing.T) {
	paths, ok := inside(t)
	if !ok {
		return
	}
	testenv.NeedFiles(t, connect.ClientShare+256)
	n := newNode(t, paths, netconf.ProxyAuto)
	n.set(web("a", "172.16.0.1", func(s *corev1.Service) { s.Spec.Ports[1].Port = service.DNSPort }), endpoints("a", "10.0.0.1", "10.0.0.2"))
	n.follows(t)
	if n.kernel.connect == nil {
		t.Skip(n.kernel.missing)
	}
	serve(t, "10.0.0.1", "10.0.0.2")
	vip := netip.MustParseAddr("172.16.0.1")
	n.step(t.Context(), true)
	if s := n.Status(); s != (answer.ProxyStatus{Ready: true}) {
		t.Errorf("with room for all: %+v", s)
	}
	before := n.counted(t, "fathom_service_connects_total")
	to := &unix.SockaddrInet4{Addr: vip.As4(), Port: service.DNSPort}
	for range connect.ClientShare {
		fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
		testenv.Must(t, err)
		testenv.Must(t, unix.Connect(fd, to))
	}
	for network, port := range map[string]uint16{"tcp": 80, "udp": service.DNSPort} {
		if who := ask(t, dial(t, network, netip.AddrPortFrom(vip, port).String())); who != "10.0.0.1" && who != "10.0.0.2" {
			t.Errorf("by %s %q answers", network, who)
		}
	}
	after := n.counted(t, "fathom_service_connects_total")
	if got := after["share"] - before["share"]; got != 2 {
		t.Errorf("%v sockets are counted that were beyond the share, want 2", got)
	}
	n.room.looked = time.Time{}
	n.step(t.Context(), true)
	if s := n.Status(); !s.Ready || !strings.Contains(s.Problem, "the node's own network namespace") {
		t.Errorf("without room: %+v", s)
	}
	// nftables has no room for a client of the Service, as TestServicesAffinityFull in package ruleset brings about.
	id := service.ID(service.Name{Namespace: "default", Name: "a"})
	nft(t, "add", "element", "inet", ruleset.ServicesTable, "affinity_full4", fmt.Sprintf("{ %d }", id))
	n.room.looked = time.Time{}
	n.step(t.Context(), true)
	if s := n.Status(); !s.Ready || !strings.Contains(s.Problem, "default/a") || !strings.Contains(s.Problem, "the node's own network namespace") {
		t.Errorf("without room for a client: %+v", s)
	}
	if late := n.room.problem(time.Now().Add(2 * tellOfRoom)); late != "" {
		t.Errorf("long after it: %q", late)
	}

	// A pod has a share of its own.
	pod := linktest.Namespace(t)
	testenv.Must(t, pod.SetUp("lo", true))
	linktest.Run(t, pod, "ip", "route", "add", "local", "10.0.0.0/8", "dev", "lo")
	testenv.Must(t, pod.Do(func() error {
		serve(t, "10.0.0.1", "10.0.0.2")
		fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			return err
		}
		defer unix.Close(fd)
		return unix.Connect(fd, &unix.SockaddrInet4{Addr: vip.As4(), Port: 80}) // by connect() alone: the pod has neither rules nor a route there
	}))
}

// TestMPTCP has a socket of MPTCP meet a Service, show it as its peer, and leave nothing.
func TestMPTCP(t *testing.T) {
	paths, ok := inside(t)
	if !ok {
		return
	}
	n := newNode(t, paths, netconf.ProxyAuto)
	n.set(web("a", "172.16.0.1", func(s *corev1.Service) { s.Spec.Ports = s.Spec.Ports[:1] }), endpoints("a", "10.0.0.1"))
	n.follows(t)
	if n.kernel.connect == nil {
		t.Skip(n.kernel.missing)
	}
	serve(t, "10.0.0.1")
	var d net.Dialer
	d.SetMultipathTCP(true)
	c, err := d.DialContext(t.Context(), "tcp", "172.16.0.1:80")
	testenv.Must(t, err)
	defer c.Close()
	if who := ask(t, c); who != "10.0.0.1" {
		t.Errorf("%q answers", who)
	}
	raw, err := c.(*net.TCPConn).SyscallConn()
	testenv.Must(t, err)
	testenv.Must(t, raw.Control(func(fd uintptr) {
		protocol, err := unix.GetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_PROTOCOL)
		if err != nil || protocol != unix.IPPROTO_MPTCP {
			t.Skip("needs MPTCP: the socket's protocol is", protocol, err)
		}
		peer, err := unix.Getpeername(int(fd))
		if four, ok := peer.(*unix.SockaddrInet4); err != nil || !ok || four.Addr != [4]byte{172, 16, 0, 1} || four.Port != 80 {
			t.Errorf("the peer is %+v, %v", peer, err)
		}
	}))
	c.Close()
	if list, err := n.kernel.connect.Translations(); err != nil || len(list) > 0 {
		t.Errorf("it is closed, and there are %v, %v", list, err)
	}
}
