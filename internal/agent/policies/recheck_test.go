package policies

import (
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"testing"
	"time"

	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes/fake"

	"github.com/fathom-network/fathom/internal/facts/netconf"
	"github.com/fathom-network/fathom/internal/kernel/conntrack"
	"github.com/fathom-network/fathom/internal/kernel/link"
	"github.com/fathom-network/fathom/internal/kernel/ruleset"
	"github.com/fathom-network/fathom/internal/testenv"
	"github.com/fathom-network/fathom/internal/testenv/linktest"
	"github.com/fathom-network/fathom/internal/watch/kube"
)

// pods are two of a node, with a Keeper in between.
type pods struct {
	*Keeper
	api        *fake.Clientset
	a, b, node *link.Namespace
}

func newPods(t *testing.T, established netconf.PolicyEstablished) *pods {
	t.Helper()
	p := &pods{api: fake.NewClientset(pod("a", "here", "10.244.1.2", map[string]string{"app": "a"}), pod("b", "here", "10.244.1.3", map[string]string{"app": "b"}))}
	var path string
	p.node, path = linktest.NamespaceAt(t)
	netns := t.TempDir() // as the runtime has it
	for name, n := range map[string]**link.Namespace{"a": &p.a, "b": &p.b} {
		*n = linktest.Namespace(t)
		testenv.Must(t, (*n).SetUp("lo", true))
		testenv.Must(t, p.node.SetPair(link.Device{Name: name, Alias: "test"}, *n, link.Device{Name: "eth0", Alias: "test"}))
		testenv.Must(t, os.Symlink((*n).Path(), filepath.Join(netns, name)))
		addr := map[string]string{"a": "10.244.1.2", "b": "10.244.1.3"}[name]
		linktest.Run(t, p.node, "ip", "addr", "add", "169.254.1.1/32", "dev", name)
		linktest.Run(t, p.node, "ip", "route", "add", addr, "dev", name)
		linktest.Run(t, *n, "ip", "addr", "add", addr+"/32", "dev", "eth0")
		linktest.Run(t, *n, "ip", "route", "add", "169.254.1.1", "dev", "eth0")
		linktest.Run(t, *n, "ip", "route", "add", "default", "via", "169.254.1.1")
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
func TestRecheck(t *testing.T) {
	p := newPods(t, netconf.PolicyRecheck)
	unknown, served := p.begin(t)
	p.isolate(t, "deny")
	ends(t, unknown, served)

	p.isolate(t, "deny", "a")
	testenv.Eventually(t, "it is allowed", func() (bool, string) { return p.dials(), "no answer" })
	c, served := p.begin(t)
	testenv.Must(t, hears(c))
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
func TestRecheckDatagrams(t *testing.T) {
	p := newPods(t, netconf.PolicyRecheck)
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
	testenv.Eventually(t, "it passes", func() (bool, string) { return passes(client, server) && passes(server, client), "" })
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

func TestKeep(t *testing.T) {
	p := newPods(t, netconf.PolicyKeep)
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
