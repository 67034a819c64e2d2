package policies

import (
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes/fake"

	"github.com/fathom-network/fathom/internal/facts/netconf"
	"github.com/fathom-network/fathom/internal/facts/policy"
	"github.com/fathom-network/fathom/internal/kernel/bpf"
	"github.com/fathom-network/fathom/internal/kernel/bpf/fastpath"
	"github.com/fathom-network/fathom/internal/kernel/conntrack"
	"github.com/fathom-network/fathom/internal/kernel/link"
	"github.com/fathom-network/fathom/internal/kernel/podlink"
	"github.com/fathom-network/fathom/internal/kernel/ruleset"
	"github.com/fathom-network/fathom/internal/testenv"
	"github.com/fathom-network/fathom/internal/testenv/linktest"
	"github.com/fathom-network/fathom/internal/wake"
	"github.com/fathom-network/fathom/internal/watch/kube"
)

// pods are two of a node, with a Keeper in between.
type pods struct {
	*Keeper
	api        *fake.Clientset
	a, b, node *link.Namespace
	path       *fastpath.Path // nil without
}

// onBothPaths runs a test without the fast path, and with it.
func onBothPaths(t *testing.T, test func(t *testing.T, fast bool)) {
	t.Run("stack", func(t *testing.T) { test(t, false) })
	t.Run("fast path", func(t *testing.T) { test(t, true) })
}

// withFastPath has the node's pods on the fast path, as an agent has.
func (p *pods) withFastPath(t *testing.T) {
	t.Helper()
	dir := t.TempDir()
	testenv.Must(t, unix.Mount("bpf", dir, "bpf", 0, ""))
	t.Cleanup(func() { testenv.Must(t, unix.Unmount(dir, unix.MNT_DETACH)) })
	var err error
	p.path, err = fastpath.Open(p.node, fastpath.Options{Dir: filepath.Join(dir, "fathom")})
	var unsupported *bpf.UnsupportedError
	if errors.As(err, &unsupported) {
		t.Skip(err)
	}
	testenv.Must(t, err)
	t.Cleanup(p.path.Close)
	p.SetFastPath(p.path.Policies())
	changed, done := wake.New(), make(chan bool)
	p.Changed = changed.Set
	go func() {
		defer close(done)
		for {
			select {
			case <-t.Context().Done():
				return
			case <-changed:
			}
			if free, known := p.Free(); known {
				if _, err := p.path.Set(fastpath.Plan{Fast: true, Free: free}); err != nil {
					t.Errorf("set the fast path: %v", err)
				}
			}
		}
	}()
	t.Cleanup(func() { <-done })
}

func (p *pods) counted(t *testing.T, reason string) uint64 {
	t.Helper()
	list, err := p.path.Counts()
	testenv.Must(t, err)
	i := slices.IndexFunc(list, func(c fastpath.Count) bool { return c.Reason == reason })
	return list[i].Packets
}

func newPods(t *testing.T, established netconf.PolicyEstablished, fast bool) *pods {
	t.Helper()
	p := &pods{api: fake.NewClientset(pod("a", "here", "10.244.1.2", map[string]string{"app": "a"}), pod("b", "here", "10.244.1.3", map[string]string{"app": "b"}))}
	var path string
	p.node, path = linktest.NamespaceAt(t)
	netns := t.TempDir() // as the runtime has it
	for name, n := range map[string]**link.Namespace{"a": &p.a, "b": &p.b} {
		*n = linktest.Namespace(t)
		testenv.Must(t, (*n).SetUp("lo", true))
		addr := netip.MustParseAddr(map[string]string{"a": "10.244.1.2", "b": "10.244.1.3"}[name])
		testenv.Must(t, podlink.Add(p.node, *n, podlink.Pod{Device: "eth0", MAC: net.HardwareAddr{2, 0, 0, 1, 0, name[0]}, HostDevice: name, HostMAC: net.HardwareAddr{2, 0, 0, 2, 0, name[0]},
			Alias: "test", MTU: 1500, Addrs: []netip.Addr{addr}}))
		testenv.Must(t, os.Symlink((*n).Path(), filepath.Join(netns, name)))
	}
	testenv.Must(t, p.node.Sysctl("ipv4/ip_forward", "1"))
	cluster := clusterPolicies(nil)
	p.Keeper = New(Options{Node: "here", Client: &kube.Client{Interface: p.api}, Cluster: &cluster, Log: slog.New(slog.DiscardHandler), Changed: func() {}, Resync: time.Minute,
		NetNS: netns, Closed: filepath.Join(t.TempDir(), "policies")})
	var err error
	p.rules, err = ruleset.Open(path)
	testenv.Must(t, err)
	p.open = func() (Flows, error) { return conntrack.OpenTable(path) }
	p.SetRanges(ranges)
	p.SetEstablished(established)
	if fast {
		p.withFastPath(t)
	} else {
		p.SetFastPath(nil)
	}
	ended := make(chan bool)
	go func() { p.Run(t.Context()); close(ended) }()
	t.Cleanup(func() { <-ended })
	testenv.Eventually(t, "the policies are known", func() (bool, string) {
		known, problem := p.Status()
		return known, problem
	})
	return p
}

// begin has a connect to a server of b, which sends all the time, also where nobody asks.
func (p *pods) begin(t *testing.T) (c net.Conn, served <-chan error) {
	t.Helper()
	errs := make(chan error, 1)
	testenv.Must(t, p.b.Do(func() error {
		l, err := net.Listen("tcp", "10.244.1.3:0")
		if err != nil {
			return err
		}
		t.Cleanup(func() { l.Close() })
		go func() {
			c, err := l.Accept()
			for tick := time.NewTicker(10 * time.Millisecond); err == nil; <-tick.C {
				_, err = c.Write([]byte("x"))
			}
			errs <- err
		}()
		return p.a.Do(func() (err error) {
			c, err = net.Dial("tcp", l.Addr().String())
			return err
		})
	}))
	t.Cleanup(func() { c.Close() })
	return c, errs
}

// hears reads from the server of begin: many times, or until there is an error.
func hears(c net.Conn) error {
	for range 20 {
		if err := c.SetReadDeadline(time.Now().Add(5 * time.Second)); err != nil {
			return err
		}
		if _, err := c.Read(make([]byte, 1)); err != nil {
			return err
		}
	}
	return nil
}

// isolate has policies isolate b for what comes, but for pods of these apps.
func (p *pods) isolate(t *testing.T, name string, apps ...string) {
	t.Helper()
	deny := denyAll(name, map[string]string{"app": "b"})
	for _, app := range apps {
		deny.Spec.Ingress = append(deny.Spec.Ingress, networkingv1.NetworkPolicyIngressRule{From: []networkingv1.NetworkPolicyPeer{{PodSelector: &metav1.LabelSelector{MatchLabels: map[string]string{"app": app}}}}})
	}
	np := p.api.NetworkingV1().NetworkPolicies("x")
	_, err := np.Update(t.Context(), deny, metav1.UpdateOptions{})
	if err != nil {
		_, err = np.Create(t.Context(), deny, metav1.CreateOptions{})
	}
	testenv.Must(t, err)
}

// ends waits until both ends of a connection know that it has ended.
func ends(t *testing.T, c net.Conn, served <-chan error) {
	t.Helper()
	testenv.Eventually(t, "the client learns that the connection has ended", func() (bool, string) {
		_, _ = c.Write([]byte("x"))
		err := hears(c)
		return err != nil && !errors.Is(err, io.EOF) && !isTimeout(err), fmt.Sprint(err)
	})
	select {
	case err := <-served:
		if err == nil {
			t.Error("the server sees a good end")
		}
	case <-time.After(10 * time.Second):
		t.Error("the server does not learn that the connection has ended")
	}
}

// TestRecheck: a connection that is there ends when it is forbidden, whether connection tracking knew it or not.
func TestRecheck(t *testing.T) { onBothPaths(t, testRecheck) }

func testRecheck(t *testing.T, fast bool) {
	p := newPods(t, netconf.PolicyRecheck, fast)
	unknown, served := p.begin(t)
	p.isolate(t, "deny")
	ends(t, unknown, served)

	p.isolate(t, "deny", "a")
	testenv.Eventually(t, "it is allowed", func() (bool, string) { return p.dials(), "no answer" })
	var before uint64
	if fast {
		p.settle(t)
		before = p.counted(t, "to_pod")
	}
	c, served := p.begin(t)
	testenv.Must(t, hears(c))
	if fast {
		if n := p.counted(t, "to_pod"); n < before+20 {
			t.Errorf("%d packets were redirected of a pod that a policy isolates, and before it was %d", n, before)
		}
		if n := p.tracked(t, c); n > 0 {
			t.Errorf("%d entries of connection tracking are of a connection of the fast path", n)
		}
	}
	p.isolate(t, "more") // what another policy allows stays allowed
	testenv.Eventually(t, "it is known", func() (bool, string) { p.mu.Lock(); defer p.mu.Unlock(); return p.model.Size().Policies == 2, "" })
	testenv.Must(t, hears(c))
	p.isolate(t, "deny")
	ends(t, c, served)

	testenv.Must(t, p.api.NetworkingV1().NetworkPolicies("x").Delete(t.Context(), "deny", metav1.DeleteOptions{}))
	testenv.Must(t, p.api.NetworkingV1().NetworkPolicies("x").Delete(t.Context(), "more", metav1.DeleteOptions{}))
	testenv.Eventually(t, "no connection is marked", func() (bool, string) {
		n := p.marked(t)
		return n == 0, fmt.Sprint(n)
	})
	c, _ = p.begin(t)
	testenv.Must(t, hears(c))
}

// settle waits until what policies first isolated has left the fast path, and is there again.
func (p *pods) settle(t *testing.T) {
	t.Helper()
	testenv.Eventually(t, "no pod leaves the fast path", func() (bool, string) {
		p.mu.Lock()
		defer p.mu.Unlock()
		return len(p.fresh()) == 0 && p.fast.holds, ""
	})
}

// tracked counts the entries of a connection.
func (p *pods) tracked(t *testing.T, c net.Conn) (n int) {
	t.Helper()
	flows, err := p.open()
	testenv.Must(t, err)
	defer flows.Close()
	testenv.Must(t, flows.(*conntrack.Table).Entries(t.Context(), conntrack.Filter{}, func(e conntrack.Entry) error {
		if at := c.LocalAddr().String(); e.Original.Source.String() == at || e.Original.Destination.String() == at {
			n++
		}
		return nil
	}))
	return n
}

// TestHandOver: a connection that the fast path has judged goes on in the stack when the fast path knows of its pods' policies no more.
func TestHandOver(t *testing.T) {
	p := newPods(t, netconf.PolicyRecheck, true)
	p.isolate(t, "deny", "a")
	testenv.Eventually(t, "there are policies", func() (bool, string) { return p.On(), "" })
	p.settle(t)
	c, _ := p.begin(t)
	testenv.Must(t, hears(c))
	if n := p.tracked(t, c); n > 0 {
		t.Fatalf("%d entries of connection tracking are of a connection of the fast path", n)
	}
	np := p.api.NetworkingV1().NetworkPolicies("x")
	audited, err := np.Get(t.Context(), "deny", metav1.GetOptions{})
	testenv.Must(t, err)
	audited.Labels, audited.Spec.Ingress = map[string]string{policy.Audit: "true"}, nil
	_, err = np.Update(t.Context(), audited, metav1.UpdateOptions{})
	testenv.Must(t, err)
	testenv.Eventually(t, "connection tracking knows it", func() (bool, string) { return p.tracked(t, c) > 0, "" })
	testenv.Must(t, hears(c))
	if n := p.marked(t); n > 0 {
		t.Errorf("%d connections are marked", n)
	}
	if list, err := p.path.Policies().Flows(); err != nil || len(list) > 0 {
		t.Errorf("the fast path knows it still: %v, %v", list, err)
	}
}

func (p *pods) dials() bool {
	var c net.Conn
	err := p.a.Do(func() (err error) {
		c, err = net.DialTimeout("tcp", "10.244.1.3:9", time.Second)
		return err
	})
	if err == nil {
		c.Close()
	}
	return err == nil || !errors.Is(err, os.ErrDeadlineExceeded) && !isTimeout(err)
}

func isTimeout(err error) bool {
	var timeout net.Error
	return errors.As(err, &timeout) && timeout.Timeout()
}

func (p *pods) marked(t *testing.T) (n int) {
	t.Helper()
	flows, err := p.open()
	testenv.Must(t, err)
	defer flows.Close()
	testenv.Must(t, flows.(*conntrack.Table).Entries(t.Context(), conntrack.Filter{AnyProtocol: true}, func(e conntrack.Entry) error {
		if e.Mark&ruleset.ForbiddenMark != 0 {
			n++
		}
		return nil
	}))
	return n
}

// TestRecheckDatagrams: what is forbidden to begin is not begun by its replies.
func TestRecheckDatagrams(t *testing.T) { onBothPaths(t, testRecheckDatagrams) }

func testRecheckDatagrams(t *testing.T, fast bool) {
	p := newPods(t, netconf.PolicyRecheck, fast)
	p.isolate(t, "deny", "a")
	testenv.Eventually(t, "there are policies", func() (bool, string) { return p.On(), "" })
	var server, client net.PacketConn
	listen := func(n *link.Namespace, addr string) (c net.PacketConn) {
		testenv.Must(t, n.Do(func() (err error) { c, err = net.ListenPacket("udp", addr); return err }))
		t.Cleanup(func() { c.Close() })
		return c
	}
	server, client = listen(p.b, "10.244.1.3:53"), listen(p.a, "10.244.1.2:5353")
	passes := func(from, to net.PacketConn) bool {
		_, err := from.WriteTo([]byte("x"), to.LocalAddr())
		testenv.Must(t, err)
		testenv.Must(t, to.SetReadDeadline(time.Now().Add(100*time.Millisecond)))
		_, _, err = to.ReadFrom(make([]byte, 10))
		return err == nil
	}
	testenv.Eventually(t, "it passes, and not by the fast path", func() (bool, string) {
		return passes(client, server) && passes(server, client) && (!fast || p.counted(t, "policy") > 1), ""
	})
	p.isolate(t, "deny")
	testenv.Eventually(t, "the connection is marked", func() (bool, string) { return p.marked(t) > 0, "" })
	for range 3 {
		if passes(server, client) || passes(client, server) {
			t.Error("it goes on")
		}
	}
	p.isolate(t, "deny", "a")
	testenv.Eventually(t, "it passes again", func() (bool, string) { return passes(client, server) && passes(server, client), "" })
}

func TestKeep(t *testing.T) { onBothPaths(t, testKeep) }

func testKeep(t *testing.T, fast bool) {
	p := newPods(t, netconf.PolicyKeep, fast)
	unknown, _ := p.begin(t)
	p.isolate(t, "other", "a")
	testenv.Eventually(t, "there are policies", func() (bool, string) { return p.On(), "" })
	known, _ := p.begin(t)
	p.isolate(t, "other")
	testenv.Eventually(t, "nothing new is allowed", func() (bool, string) { return !p.dials(), "an answer" })
	for range 5 {
		testenv.Must(t, hears(unknown))
		testenv.Must(t, hears(known))
	}
	if n := p.marked(t); n > 0 {
		t.Errorf("%d connections are marked", n)
	}
	p.SetEstablished(netconf.PolicyRecheck)
	testenv.Eventually(t, "both are marked", func() (bool, string) { n := p.marked(t); return n >= 2, fmt.Sprint(n) })
	p.SetEstablished(netconf.PolicyKeep)
	testenv.Eventually(t, "none is marked", func() (bool, string) { n := p.marked(t); return n == 0, fmt.Sprint(n) })
}

// A file that is no namespace keeps nobody from looking at the others.
func TestStrayFile(t *testing.T) {
	testenv.NeedRoot(t)
	_, path := linktest.NamespaceAt(t)
	netns := t.TempDir()
	testenv.Must(t, os.WriteFile(filepath.Join(netns, "stray"), nil, 0o600))
	testenv.Must(t, os.Symlink(path, filepath.Join(netns, "pod")))
	k := New(Options{NetNS: netns, Log: slog.New(slog.DiscardHandler)})
	if _, err := k.connectionsOf(t.Context(), nil); err != nil {
		t.Error(err)
	}
}
