package proxy

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/sys/unix"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/fathom-network/fathom/internal/facts/answer"
	"github.com/fathom-network/fathom/internal/facts/netconf"
	"github.com/fathom-network/fathom/internal/facts/service"
	"github.com/fathom-network/fathom/internal/facts/svcfacts"
	"github.com/fathom-network/fathom/internal/kernel/link"
	"github.com/fathom-network/fathom/internal/kernel/ruleset"
	"github.com/fathom-network/fathom/internal/testenv"
	"github.com/fathom-network/fathom/internal/testenv/linktest"
)

// inside runs the test once more, in a process that is a node. All of 10.0.0.0/8 and fd01::/16 is local to it, so that any
// address can be an endpoint's, and 172.16.0.0/12 and fd02::/16 are Services'. In the first process it says no, after the
// second one has ended.
func inside(t testing.TB) (Paths, bool) {
	t.Helper()
	if testing.Short() && strings.HasSuffix(t.Name(), "API") {
		t.Skip("starts an API server")
	}
	s, ok := linktest.Inside(t, func(t testing.TB, n *link.Namespace) {
		testenv.Must(t, n.SetUp("lo", true))
		testenv.Must(t, n.Sysctl("ipv6/ip_nonlocal_bind", "1"))
		for _, c := range []string{
			"address add 10.1.0.1/32 dev lo", "route add local 10.0.0.0/8 dev lo", "route add 172.16.0.0/12 dev lo src 10.1.0.1",
			"-6 address add fd01::1:1/128 dev lo nodad", "-6 route add local fd01::/16 dev lo", "-6 route add fd02::/16 dev lo src fd01::1:1",
		} {
			linktest.Run(t, n, append([]string{"ip"}, strings.Fields(c)...)...)
		}
	})
	if !ok {
		return Paths{}, false
	}
	return Paths{BPF: filepath.Join(s.BPFFS, "services"), Cgroup: s.Cgroup, NetNS: t.TempDir()}, true
}

// node is a proxy and the cluster that it follows. Its loop does not run: step is one round of it, sweep one of the
// reaper's, so that nothing has to be waited for.
type node struct {
	*Proxy
	services map[service.Name]*corev1.Service
	slices   map[service.Name]*discoveryv1.EndpointSlice
	loopback fakeLoopback
}

// fakeLoopback is Loopback, and remembers whether it was ever on while there was no table to keep others out.
type fakeLoopback struct{ on, open bool }

func (l *fakeLoopback) Routed() (bool, error) { return l.on, nil }

func (l *fakeLoopback) Route(on bool) error {
	rules, err := exec.Command("nft", "list", "tables").Output()
	l.open = l.open || (l.on || on) && !strings.Contains(string(rules), ruleset.ServicesTable)
	l.on = on
	return err
}

var self = service.Node{Name: "node-1"}

func newNode(t testing.TB, paths Paths, mode netconf.ServiceProxy) *node {
	n := &node{services: map[service.Name]*corev1.Service{}, slices: map[service.Name]*discoveryv1.EndpointSlice{}}
	n.start(t, paths, mode)
	return n
}

// start makes a proxy, the first or another of the same node, and tells it what the API server knows.
func (n *node) start(t testing.TB, paths Paths, mode netconf.ServiceProxy) {
	t.Helper()
	if n.Proxy != nil {
		n.stop()
	}
	n.Proxy = New(Options{
		Log: slog.New(slog.NewTextHandler(io.Discard, nil)), Paths: paths, Resync: time.Hour, Loopback: &n.loopback,
		Changed: func() {},
	})
	n.mode(mode)
	n.follow()
	t.Cleanup(n.stop)
}

func (n *node) stop() {
	n.stopComparing()
	n.health.close()
	n.kernel.close()
	if n.reaper.conntrack != nil {
		n.reaper.conntrack.Close()
		n.reaper.conntrack = nil
	}
}

// mode sets the configuration.
func (n *node) mode(mode netconf.ServiceProxy) {
	n.Set(answer.ProxyConfig{
		Mode: mode, Node: self, OwnPods: []netip.Prefix{netip.MustParsePrefix("10.0.0.0/8"), netip.MustParsePrefix("fd01::/16")},
		NodePortAddrs: []netip.Addr{netip.MustParseAddr("10.1.0.1"), netip.MustParseAddr("fd01::1:1")},
		ServiceCIDRs:  []netip.Prefix{netip.MustParsePrefix("172.16.0.0/12"), netip.MustParsePrefix("fd02::/16")},
	})
}

// follow has the API server tell all there is.
func (n *node) follow() {
	n.inbox = &inbox{wake: n.kick.Set, stop: func() {}, synced: func() bool { return true },
		model: service.NewModel(service.Node{}), foreign: map[service.Name][]netip.Addr{}}
	n.whole = true
	for _, s := range n.services {
		n.inbox.SetService(s)
	}
	for _, s := range n.slices {
		n.inbox.SetSlice(s)
	}
	n.inbox.wake()
}

func nameOf(o metav1.Object) service.Name {
	return service.Name{Namespace: o.GetNamespace(), Name: o.GetName()}
}

func (n *node) set(objects ...metav1.Object) {
	for _, o := range objects {
		switch o := o.(type) {
		case *corev1.Service:
			n.services[nameOf(o)] = o
			n.inbox.SetService(o)
		case *discoveryv1.EndpointSlice:
			n.slices[nameOf(o)] = o
			n.inbox.SetSlice(o)
		}
	}
}

func (n *node) delete(objects ...metav1.Object) {
	for _, o := range objects {
		switch o := o.(type) {
		case *corev1.Service:
			delete(n.services, nameOf(o))
			n.inbox.DeleteService(nameOf(o))
		case *discoveryv1.EndpointSlice:
			delete(n.slices, nameOf(o))
			n.inbox.DeleteSlice(nameOf(o))
		}
	}
}

// plan is made of the objects alone.
func (n *node) plan() service.Plan {
	m := service.NewModel(self)
	for _, s := range n.services {
		m.SetService(svcfacts.Service(s))
	}
	for _, s := range n.slices {
		m.SetSlice(svcfacts.Slice(s))
	}
	return service.Plan{Frontends: m.Frontends(), NodePortAddrs: n.config.NodePortAddrs, OwnPods: n.config.OwnPods}
}

// follows is a round of the loop after an event; the kernel then has to hold what the objects say.
func (n *node) follows(t *testing.T) answer.Services {
	t.Helper()
	n.step(t.Context(), false)
	s, differences := n.differs(t)
	if len(differences) > 0 || s.ProxyStatus != (answer.ProxyStatus{Ready: true}) {
		t.Fatalf("status %+v\n%s", s.ProxyStatus, strings.Join(differences, "\n"))
	}
	return s
}

// differs compares what the kernel holds with the objects.
func (n *node) differs(t *testing.T) (s answer.Services, differences []string) {
	t.Helper()
	s, err := n.State(t.Context())
	testenv.Must(t, err)
	plan := n.plan()
	want, err := service.ByPacketOf(plan)
	testenv.Must(t, err)
	if !slices.EqualFunc(s.NFTables.Frontends, want.Frontends, service.Frontend.Equal) {
		differences = append(differences, fmt.Sprintf("nftables: %+v\nwant %+v", s.NFTables.Frontends, want.Frontends))
	}
	if len(s.Detached) > 0 {
		differences = append(differences, fmt.Sprintf("not attached: %v", s.Detached))
	}
	if balanced := service.BalancedOf(plan); n.config.Mode == netconf.ProxyAuto && s.ConnectMissing == "" && !slices.EqualFunc(s.Connect, balanced, service.Balanced.Equal) {
		differences = append(differences, fmt.Sprintf("connect: %+v\nwant %+v", s.Connect, balanced))
	}
	return s, differences
}

// sweep is a round of the reaper.
func (n *node) sweep(t *testing.T) {
	t.Helper()
	testenv.Must(t, n.reaper.sweepEntries(t.Context()))
	testenv.Must(t, n.reaper.sweepSockets(t.Context()))
}

// counted returns the values of a counter, by its label.
func (n *node) counted(t *testing.T, name string) map[string]float64 {
	t.Helper()
	r := prometheus.NewRegistry()
	r.MustRegister(n.Proxy)
	families, err := r.Gather()
	testenv.Must(t, err)
	values := map[string]float64{}
	for _, f := range families {
		for _, m := range f.Metric {
			if f.GetName() == name {
				values[m.Label[0].GetValue()] = m.GetCounter().GetValue()
			}
		}
	}
	return values
}

// compared has a comparison be made.
func (n *node) compared(t *testing.T) {
	t.Helper()
	n.compare(t.Context())
	n.conclude(<-n.results())
}

// observed returns how often something was done.
func (n *node) observed(t *testing.T, what string) uint64 {
	t.Helper()
	r := prometheus.NewRegistry()
	r.MustRegister(n.counts.seconds)
	families, err := r.Gather()
	testenv.Must(t, err)
	for _, f := range families {
		for _, m := range f.Metric {
			if m.Label[0].GetValue() == what {
				return m.GetHistogram().GetSampleCount()
			}
		}
	}
	return 0
}

// web is a Service of port 80, TCP and UDP.
func web(name, addr string, changes ...func(*corev1.Service)) *corev1.Service {
	s := &corev1.Service{
		ObjectMeta: metav1.ObjectMeta{Namespace: "default", Name: name},
		Spec: corev1.ServiceSpec{
			Type: corev1.ServiceTypeClusterIP, IPFamilies: []corev1.IPFamily{corev1.IPv4Protocol},
			Ports: []corev1.ServicePort{{Name: "tcp", Protocol: corev1.ProtocolTCP, Port: 80}, {Name: "udp", Protocol: corev1.ProtocolUDP, Port: 80}},
		},
	}
	if addr != "" { // otherwise the API server chooses it
		s.Spec.ClusterIP, s.Spec.ClusterIPs = addr, []string{addr}
	}
	for _, c := range changes {
		c(s)
	}
	return s
}

// localOnly has a Service be met from outside where it has endpoints, and say so at a port.
func localOnly(port int32) func(*corev1.Service) {
	return func(s *corev1.Service) {
		s.Spec.Type, s.Spec.ExternalTrafficPolicy, s.Spec.HealthCheckNodePort = corev1.ServiceTypeLoadBalancer, corev1.ServiceExternalTrafficPolicyLocal, port
		s.Status.LoadBalancer.Ingress = []corev1.LoadBalancerIngress{{IP: "198.51.100.1"}}
	}
}

// endpoints are a slice of a Service, all at port 8080 and of the first one's family. An endpoint that begins with "-"
// terminates and still serves; one that begins with "!" is not ready.
func endpoints(of string, addrs ...string) *discoveryv1.EndpointSlice {
	s := &discoveryv1.EndpointSlice{
		ObjectMeta:  metav1.ObjectMeta{Namespace: "default", Name: of + "-1", Labels: map[string]string{discoveryv1.LabelServiceName: of}},
		AddressType: discoveryv1.AddressTypeIPv4,
		Ports: []discoveryv1.EndpointPort{{Name: new("tcp"), Protocol: new(corev1.ProtocolTCP), Port: new(int32(8080))},
			{Name: new("udp"), Protocol: new(corev1.ProtocolUDP), Port: new(int32(8080))}, {Name: new("dns"), Protocol: new(corev1.ProtocolUDP), Port: new(int32(8080))}},
	}
	for _, addr := range addrs {
		addr, terminates := strings.CutPrefix(addr, "-")
		addr, fails := strings.CutPrefix(addr, "!")
		s.Endpoints = append(s.Endpoints, discoveryv1.Endpoint{Addresses: []string{addr}, NodeName: &self.Name,
			Conditions: discoveryv1.EndpointConditions{Ready: new(!terminates && !fails), Serving: new(!fails), Terminating: &terminates}})
		if strings.Contains(addr, ":") {
			s.AddressType = discoveryv1.AddressTypeIPv6
		}
	}
	return s
}

// serve has all endpoints answer everything with the address at which they were asked.
func serve(t *testing.T, addrs ...string) {
	t.Helper()
	for _, addr := range addrs {
		at := net.JoinHostPort(addr, "8080")
		l, err := net.Listen("tcp", at)
		testenv.Must(t, err)
		u, err := net.ListenPacket("udp", at)
		testenv.Must(t, err)
		t.Cleanup(func() {
			l.Close()
			u.Close()
		})
		go func() {
			for {
				c, err := l.Accept()
				if err != nil {
					return
				}
				go func() {
					defer c.Close()
					b := make([]byte, 1)
					for {
						if _, err := c.Read(b); err != nil {
							return
						}
						_, _ = c.Write([]byte(addr))
					}
				}()
			}
		}()
		go func() {
			b := make([]byte, 1)
			for {
				_, from, err := u.ReadFrom(b)
				if err != nil {
					return
				}
				_, _ = u.WriteTo([]byte(addr), from)
			}
		}()
	}
}

func dial(t *testing.T, network, to string) net.Conn {
	t.Helper()
	c, err := net.Dial(network, to)
	testenv.Must(t, err)
	t.Cleanup(func() { c.Close() })
	return c
}

// ask says which endpoint answers on a connection.
func ask(t *testing.T, c net.Conn) string {
	t.Helper()
	who, err := try(c)
	testenv.Must(t, err)
	return who
}

func try(c net.Conn) (string, error) {
	_ = c.SetDeadline(time.Now().Add(time.Minute)) // only what fails needs it
	if _, err := c.Write([]byte("?")); err != nil {
		return "", err
	}
	b := make([]byte, 64)
	n, err := c.Read(b)
	return string(b[:n]), err
}

// refused says whether nobody answers at an address.
func refused(t *testing.T, to string) bool {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	c, err := (&net.Dialer{}).DialContext(ctx, "tcp", to)
	if err == nil {
		c.Close()
	}
	return errors.Is(err, unix.ECONNREFUSED)
}

func nft(t *testing.T, args ...string) string {
	t.Helper()
	out, err := exec.Command("nft", args...).CombinedOutput()
	if err != nil {
		t.Fatalf("nft %v: %v: %s", args, err, out)
	}
	return string(out)
}
