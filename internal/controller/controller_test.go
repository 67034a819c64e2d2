package controller_test

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/types"

	"github.com/fathom-network/fathom/api/v1alpha1"
	"github.com/fathom-network/fathom/deploy"
	"github.com/fathom-network/fathom/internal/controller"
	"github.com/fathom-network/fathom/internal/facts/ippool"
	"github.com/fathom-network/fathom/internal/facts/keyset"
	"github.com/fathom-network/fathom/internal/facts/netconf"
	"github.com/fathom-network/fathom/internal/facts/vip"
	"github.com/fathom-network/fathom/internal/testenv"
	"github.com/fathom-network/fathom/internal/watch/kube"
)

// cluster is an API server for a controller under test.
type cluster struct {
	*testing.T
	client *kube.Client
	own    *kube.Client // with the rights that the controller has
	// ownConfig is the kubeconfig of own.
	ownConfig string
}

func start(t *testing.T) cluster {
	path := testenv.APIServer(t)
	client, err := kube.Connect(path)
	if err != nil {
		t.Fatal(err)
	}
	config, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	as := strings.Replace(string(config), "user: {", `user: {as: "system:serviceaccount:fathom-system:fathom-controller", as-user-extra: {authentication.kubernetes.io/node-name: [n1]}, `, 1)
	path = filepath.Join(t.TempDir(), "kubeconfig")
	if err := os.WriteFile(path, []byte(as), 0o600); err != nil {
		t.Fatal(err)
	}
	own, err := kube.Connect(path)
	if err != nil {
		t.Fatal(err)
	}
	c := cluster{t, client, own, path}
	objects, err := kube.Decode(bytes.NewReader(deploy.Manifests()))
	if err != nil {
		t.Fatal(err)
	}
	objects = slices.DeleteFunc(objects, func(o *unstructured.Unstructured) bool {
		return o.GetKind() == "DaemonSet" || o.GetKind() == "Deployment"
	})
	if err := client.Apply(t.Context(), "test", objects); err != nil {
		t.Fatal(err)
	}
	return c
}

// run runs a controller until the function that it returns is called.
func (c cluster) run(identity string) (stop func()) { return c.runAt(identity, "", "") }

func (c cluster) runAt(identity, health, metrics string) (stop func()) {
	ctx, cancel := context.WithCancel(c.Context())
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		if err := controller.Run(ctx, controller.Options{Client: c.own, Log: slog.New(slog.NewTextHandler(c.Output(), nil)), Identity: identity, Resync: time.Second, Health: health, Metrics: metrics}); err != nil && ctx.Err() == nil {
			c.Error(err)
		}
	}()
	stop = func() {
		cancel()
		<-ended
	}
	c.Cleanup(stop)
	return stop
}

func (c cluster) apply(manifest string) error {
	objects, err := kube.Decode(strings.NewReader(manifest))
	if err != nil {
		c.Fatal(err)
	}
	return c.client.Apply(c.Context(), "test", objects)
}

func (c cluster) must(err error) {
	c.Helper()
	if err != nil {
		c.Fatal(err)
	}
}

func (c cluster) service(name, more string) {
	c.Helper()
	c.must(c.apply(fmt.Sprintf(`{apiVersion: v1, kind: Service, metadata: {name: %s, namespace: default}, spec: {type: LoadBalancer, ports: [{port: 80}]%s}}`, name, more)))
}

func (c cluster) pool(name, addresses string) error {
	return c.apply(fmt.Sprintf(`{apiVersion: fathom.network/v1alpha1, kind: AddressPool, metadata: {name: %s}, spec: {addresses: %s}}`, name, addresses))
}

// addresses waits until a Service has these addresses.
func (c cluster) addresses(name string, want ...string) {
	c.Helper()
	var got []string
	c.await(func() bool {
		s, err := c.client.CoreV1().Services("default").Get(c.Context(), name, metav1.GetOptions{})
		c.must(err)
		got = nil
		for _, in := range s.Status.LoadBalancer.Ingress {
			if in.IPMode == nil || *in.IPMode != corev1.LoadBalancerIPModeVIP {
				c.Fatalf("%s has mode %v", in.IP, in.IPMode)
			}
			got = append(got, in.IP)
		}
		return slices.Equal(got, want)
	}, func() string { return fmt.Sprintf("Service %s has %q, want %q", name, got, want) })
}

// event waits for an event of a Service.
func (c cluster) event(name, reason, text string) {
	c.Helper()
	c.await(func() bool {
		l, err := c.client.CoreV1().Events("default").List(c.Context(), metav1.ListOptions{FieldSelector: "involvedObject.kind=Service,involvedObject.name=" + name})
		c.must(err)
		return slices.ContainsFunc(l.Items, func(e corev1.Event) bool { return e.Reason == reason && strings.Contains(e.Message, text) })
	}, func() string { return fmt.Sprintf("there is no event %s %q of Service %s", reason, text, name) })
}

func (c cluster) await(done func() bool, what func() string) {
	c.Helper()
	for deadline := time.Now().Add(time.Minute); !done(); time.Sleep(20 * time.Millisecond) {
		if time.Now().After(deadline) {
			c.Fatal(what())
		}
	}
}

func TestController(t *testing.T) {
	c := start(t)
	stop := c.run("one")
	c.service("a", "")
	c.event("a", "NoAddressPool", "create one")
	c.await(func() bool {
		s, err := c.client.Secret(t.Context(), netconf.Namespace, keyset.Secret)
		return err == nil && len(s[keyset.Key]) == keyset.Size
	}, func() string { return "there is no key for agents" })

	c.must(c.pool("p", "[192.0.2.8/30, 'fd00:80::10-fd00:80::20']"))
	c.addresses("a", "192.0.2.8")
	c.event("a", "AddressAssigned", "192.0.2.8 of AddressPool p")
	c.service("b", ", loadBalancerClass: fathom.network/pool")
	c.addresses("b", "192.0.2.9")

	// A user edits the status.
	services := c.client.CoreV1().Services("default")
	patch := func(name, p string, sub ...string) {
		t.Helper()
		_, err := services.Patch(t.Context(), name, types.MergePatchType, []byte(p), metav1.PatchOptions{FieldManager: "somebody"}, sub...)
		c.must(err)
	}
	patch("a", `{"status": {"loadBalancer": {"ingress": [{"ip": "198.51.100.1"}]}}}`, "status")
	c.addresses("a", "192.0.2.8")

	// A finalizer keeps a Service until its address is returned. After the deletion it is gone.
	finalized := func(name string) bool {
		t.Helper()
		s, err := services.Get(t.Context(), name, metav1.GetOptions{})
		c.must(err)
		return slices.Contains(s.Finalizers, vip.Finalizer)
	}
	if !finalized("a") || !finalized("b") {
		t.Error("a Service with an address has no finalizer")
	}

	// The address of a Service that changes its type, or is deleted, goes to others.
	patch("a", `{"spec": {"type": "ClusterIP"}}`)
	c.addresses("a")
	c.await(func() bool { return !finalized("a") }, func() string { return "a Service that has no address any more has the finalizer" })
	c.must(services.Delete(t.Context(), "b", metav1.DeleteOptions{}))
	c.await(func() bool {
		_, err := services.Get(t.Context(), "b", metav1.GetOptions{})
		return apierrors.IsNotFound(err)
	}, func() string { return "a Service that was deleted is kept" })
	c.service("c", ", loadBalancerIP: 192.0.2.9")
	c.addresses("c", "192.0.2.9")

	// An address that is not available is reported, and assigned as soon as it is.
	c.service("d", ", loadBalancerIP: 192.0.2.9")
	c.event("d", "AddressInUse", "Service default/c has it")
	c.must(services.Delete(t.Context(), "c", metav1.DeleteOptions{}))
	c.addresses("d", "192.0.2.9")

	// Services of other controllers are left alone.
	c.service("e", ", loadBalancerClass: example.com/other")
	patch("e", `{"status": {"loadBalancer": {"ingress": [{"ip": "198.51.100.1", "ipMode": "VIP"}]}}}`, "status")

	// A second controller continues after the first one, and assigns the same addresses.
	stop()
	c.run("two")
	c.service("f", "")
	c.addresses("f", "192.0.2.8")
	c.addresses("d", "192.0.2.9")
	c.addresses("e", "198.51.100.1")
	c.usage("p", `"Valid" True services 2 ipv4 2/4 ipv6 0/17`)

	c.must(c.pool("q", "[192.0.2.0/24]"))
	c.usage("q", `"Overlap" False services 0 ipv4 0/256`)

	// A pool's addresses are withdrawn when it is deleted.
	_, err := c.client.CoreV1().RESTClient().Delete().AbsPath("/apis/fathom.network/v1alpha1/addresspools").DoRaw(t.Context())
	c.must(err)
	c.addresses("d")
	c.addresses("f")
	c.addresses("e", "198.51.100.1")
}

// TestServiceProblems: an external IP that is not served causes one event, whatever the number of nodes, and another one if it is
// asked for again after it was removed.
func TestServiceProblems(t *testing.T) {
	c := start(t)
	_, err := c.client.CoreV1().Nodes().Create(t.Context(), &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: "n1"}}, metav1.CreateOptions{})
	c.must(err)
	_, err = c.client.CoreV1().Nodes().Patch(t.Context(), "n1", types.MergePatchType,
		[]byte(`{"status": {"addresses": [{"type": "InternalIP", "address": "198.51.100.7"}]}}`), metav1.PatchOptions{}, "status")
	c.must(err)
	web := func(name, ips string) {
		c.must(c.apply(fmt.Sprintf(`{apiVersion: v1, kind: Service, metadata: {name: %s, namespace: default}, spec: {ports: [{port: 80}], externalIPs: [%s]}}`, name, ips)))
	}
	web("thief", "198.51.100.7")
	web("honest", "203.0.113.5")
	c.run("one")
	events := func(name string) int {
		// The API server itself creates events of Services, too, for instance about an address that its repair loop has not seen.
		l, err := c.client.CoreV1().Events("default").List(t.Context(), metav1.ListOptions{
			FieldSelector: "reason=" + controller.ServiceProblem + ",involvedObject.name=" + name})
		c.must(err)
		return len(l.Items)
	}
	set := func(config string) {
		c.must(c.apply(`{apiVersion: v1, kind: ConfigMap, metadata: {name: fathom-config, namespace: fathom-system}, data: {` + config + `}}`))
	}
	set("serviceProxy: auto") // until now another proxy carries Services
	c.event("thief", controller.ServiceProblem, "externalIPs: 198.51.100.7 is not served: it is the own address of node n1")
	if n := events("honest"); n > 0 {
		t.Errorf("%d events of a Service that is served", n)
	}
	web("thief", "")
	set("serviceProxy: auto, externalIPs: pools")
	c.event("honest", controller.ServiceProblem, "no AddressPool has it")
	c.must(c.pool("edge", `["203.0.113.0/28"]`))
	set("serviceProxy: auto, externalIPs: pools")
	web("late", "203.0.113.99")
	c.event("late", controller.ServiceProblem, "no AddressPool has it")
	if thief, honest := events("thief"), events("honest"); thief != 1 || honest != 1 {
		t.Errorf("%d and %d events, want one of each", thief, honest)
	}
}

// usage waits for a pool's status.
func (c cluster) usage(pool, want string) {
	c.Helper()
	var got string
	c.await(func() bool {
		data, err := c.client.CoreV1().RESTClient().Get().AbsPath("/apis/fathom.network/v1alpha1/addresspools/" + pool).DoRaw(c.Context())
		c.must(err)
		var o struct {
			Status struct {
				Conditions []metav1.Condition
				Services   int
				IPv4, IPv6 *struct{ Addresses, Assigned int }
			}
		}
		c.must(json.Unmarshal(data, &o))
		got = ""
		for _, x := range o.Status.Conditions {
			got = fmt.Sprintf("%q %s services %d", x.Reason, x.Status, o.Status.Services)
		}
		if u := o.Status.IPv4; u != nil {
			got += fmt.Sprintf(" ipv4 %d/%d", u.Assigned, u.Addresses)
		}
		if u := o.Status.IPv6; u != nil {
			got += fmt.Sprintf(" ipv6 %d/%d", u.Assigned, u.Addresses)
		}
		return got == want
	}, func() string { return fmt.Sprintf("pool %s: %s, want %s", pool, got, want) })
}

// TestSessions: the reports of nodes on BGP sessions are removed with the nodes.
func TestSessions(t *testing.T) {
	c := start(t)
	for _, name := range []string{"stays", "goes"} {
		_, err := c.client.CoreV1().Nodes().Create(t.Context(), &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: name}}, metav1.CreateOptions{})
		c.must(err)
	}
	c.must(c.apply(`{apiVersion: fathom.network/v1alpha1, kind: BGPPeer, metadata: {name: router}, spec: {peerAddress: 192.0.2.1, peerASN: 64500, localASN: 64512}}`))
	for _, node := range []string{"never-was", "stays", "goes"} {
		c.must(c.client.PublishBGPSession(t.Context(), "router", node, &v1alpha1.BGPSession{Node: node, State: "Active", Since: metav1.NewTime(time.Unix(1, 0))}))
	}
	tell := func(want string) {
		t.Helper()
		var got []string
		c.await(func() bool {
			data, err := c.client.CoreV1().RESTClient().Get().AbsPath("/apis/fathom.network/v1alpha1/bgppeers/router").DoRaw(c.Context())
			c.must(err)
			var peer v1alpha1.BGPPeer
			c.must(json.Unmarshal(data, &peer))
			got = nil
			for _, s := range peer.Status.Sessions {
				got = append(got, s.Node)
			}
			return strings.Join(got, " ") == want
		}, func() string { return fmt.Sprintf("sessions of %v, want %s", got, want) })
	}
	c.run("one")
	tell("stays goes")
	c.must(c.client.CoreV1().Nodes().Delete(t.Context(), "goes", metav1.DeleteOptions{}))
	tell("stays")
}

// TestCRD: the API server rejects invalid objects.
func TestCRD(t *testing.T) {
	c := start(t)
	tried := 0
	for addresses, want := range map[string]string{
		"[192.0.2.8/29, 'fd00::/64', '192.0.2.20-192.0.2.30', 'fd00:1::1 - fd00:1::9']": "",
		"[192.0.2.8]":                  "want a CIDR such as",
		"[192.0.2.9/29]":               "has bits behind the prefix",
		"['192.0.2.9-fd00::1']":        "a range begins and ends in one family",
		"['192.0.2.9-any']":            "want a CIDR such as",
		"['127.0.0.0/30']":             "holds addresses that no Service can have",
		"['224.0.0.0/30']":             "holds addresses that no Service can have",
		"[]":                           "at least 1",
		"['fe80::/120']":               "holds addresses that no Service can have",
		"[192.0.2.8/29, 192.0.2.8/29]": "uplicate",
	} {
		tried++
		err := c.pool(fmt.Sprint("p", tried), addresses)
		switch {
		case want == "" && err != nil:
			t.Errorf("%s: %v", addresses, err)
		case want != "" && (!apierrors.IsInvalid(err) && err == nil || !strings.Contains(fmt.Sprint(err), want)):
			t.Errorf("%s: %v, want %q", addresses, err, want)
		}
	}
}

// TestMonitor: the leader has metrics of addresses, and a controller that waits to become the leader is ready, too.
func TestMonitor(t *testing.T) {
	c := start(t)
	var at [4]string
	for i := range at {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		c.must(err)
		at[i] = l.Addr().String()
		l.Close()
	}
	get := func(address, path string) (int, string) {
		r, err := http.Get("http://" + address + path)
		if err != nil {
			return 0, err.Error()
		}
		defer r.Body.Close()
		body, err := io.ReadAll(r.Body)
		c.must(err)
		return r.StatusCode, string(body)
	}
	answers := func(address, path string, want int) {
		t.Helper()
		var code int
		var body string
		c.await(func() bool { code, body = get(address, path); return code == want }, func() string { return fmt.Sprint(path, ": ", code, " ", body) })
	}
	tells := func(address string, want ...string) {
		t.Helper()
		var body string
		c.await(func() bool {
			_, body = get(address, "/metrics")
			return !slices.ContainsFunc(want, func(w string) bool { return !strings.Contains(body, w+"\n") })
		}, func() string { return fmt.Sprintf("no %q in\n%s", want, body) })
	}
	stop := c.runAt("one", at[0], at[1])
	tells(at[1], "fathom_controller_leading 1")
	answers(at[0], "/healthz", 200)
	answers(at[0], "/readyz", 200)
	c.runAt("two", at[2], at[3])
	answers(at[2], "/readyz", 200)
	tells(at[3], "fathom_controller_leading 0")

	c.service("a", "")
	c.service("b", "")
	c.service("c", ", loadBalancerIP: 198.51.100.1")
	c.must(c.pool("p", "[192.0.2.9/32, 'fd00:80::10-fd00:80::1f']"))
	want := []string{`fathom_addresspool_addresses{family="IPv4",pool="p"} 1`, `fathom_addresspool_assigned{family="IPv4",pool="p"} 1`,
		`fathom_addresspool_addresses{family="IPv6",pool="p"} 16`, `fathom_addresspool_assigned{family="IPv6",pool="p"} 0`, `fathom_addresspool_valid{pool="p"} 1`,
		`fathom_loadbalancer_services 1`, `fathom_loadbalancer_services_pending{reason="AddressPoolExhausted"} 1`, `fathom_loadbalancer_services_pending{reason="InvalidAddressRequest"} 1`}
	tells(at[1], want...)
	c.must(c.pool("q", "[192.0.2.0/24]"))
	tells(at[1], `fathom_addresspool_valid{pool="q"} 0`)
	stop()
	tells(at[3], append(want, "fathom_controller_leading 1")...)
	answers(at[2], "/readyz", 200)
}

// TestKeepsPools: a deleted IPPool stays while blocks of it exist, even if it was deleted while no controller ran. Blocks that nodes
// refuse are reported.
func TestKeepsPools(t *testing.T) {
	c := start(t)
	pool := func(name, cidr string) {
		t.Helper()
		c.must(c.apply(fmt.Sprintf(`{apiVersion: fathom.network/v1alpha1, kind: IPPool, metadata: {name: %s}, spec: {ipv4: {cidr: %s, blockSize: 26}}}`, name, cidr)))
	}
	block := func(pool, cidr string) string {
		t.Helper()
		p := netip.MustParsePrefix(cidr)
		c.must(c.apply(fmt.Sprintf(`{apiVersion: fathom.network/v1alpha1, kind: IPBlock, metadata: {name: %s}, spec: {pool: %s, cidr: %s, node: a}}`, ippool.BlockName(p), pool, cidr)))
		return ippool.BlockName(p)
	}
	at := c.client.CoreV1().RESTClient()
	path := "/apis/fathom.network/v1alpha1/"
	finalizers := func(name string) ([]string, bool) {
		t.Helper()
		pools, err := kube.List(t.Context(), c.client, kube.IPPools, kube.Selection{})
		c.must(err)
		for _, p := range pools {
			if p.Name == name {
				return p.Finalizers, true
			}
		}
		return nil, false
	}
	remove := func(resource string) {
		t.Helper()
		_, err := at.Delete().AbsPath(path + resource).DoRaw(t.Context())
		c.must(err)
	}
	kept := func(name string, want bool) {
		t.Helper()
		var list []string
		c.await(func() bool { list, _ = finalizers(name); return slices.Contains(list, ippool.Finalizer) == want },
			func() string { return fmt.Sprintf("IPPool %s has finalizers %q", name, list) })
	}
	gone := func(name string) {
		t.Helper()
		c.await(func() bool { _, there := finalizers(name); return !there }, func() string { return "IPPool " + name + " is there" })
	}
	pool("p", "10.50.0.0/16")
	pool("q", "10.60.0.0/16")
	first, second := block("p", "10.50.0.0/26"), block("p", "10.50.0.64/26")
	stop := c.run("one")
	kept("p", true) // it is older than the controller
	kept("q", false)
	remove("ippools/q")
	gone("q")
	remove("ippools/p")
	remove("ipblocks/" + first)
	kept("p", true)
	stop()
	remove("ipblocks/" + second)
	if _, there := finalizers("p"); !there {
		t.Error("a pool is gone while no controller looks after it")
	}
	c.run("two")
	gone("p")

	block("p", "10.96.0.0/12")
	c.await(func() bool {
		l, err := c.client.CoreV1().Events("default").List(t.Context(), metav1.ListOptions{FieldSelector: "reason=BlockRefused,involvedObject.name=10.96.0.0-12"})
		c.must(err)
		return len(l.Items) == 1 && strings.Contains(l.Items[0].Message, `IPBlock 10.96.0.0-12 of pool "p" on node a is not used: there is no such IPPool`)
	}, func() string { return "nobody is told of a block that nodes refuse" })
}
