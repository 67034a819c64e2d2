package agent_test

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"

	"github.com/fathom-network/fathom/api/v1alpha1"
	"github.com/fathom-network/fathom/internal/agent"
	"github.com/fathom-network/fathom/internal/facts/answer"
	"github.com/fathom-network/fathom/internal/facts/service"
	"github.com/fathom-network/fathom/internal/install"
	"github.com/fathom-network/fathom/internal/kernel/link"
	"github.com/fathom-network/fathom/internal/testenv"
	"github.com/fathom-network/fathom/internal/testenv/linktest"
	"github.com/fathom-network/fathom/internal/watch/kube"
)

// begin starts a program that ends with the test.
func begin(t testing.TB, n *link.Namespace, program string, args ...string) {
	t.Helper()
	var log strings.Builder
	cmd := exec.Command(program, args...)
	cmd.Stdout, cmd.Stderr = &log, &log
	testenv.Must(t, n.Start(cmd))
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
		if t.Failed() {
			text := log.String()
			t.Logf("%s:\n%s", filepath.Base(program), text[max(0, len(text)-3000):])
		}
	})
}

const (
	kit      = "../../bin/kit/bin/"
	routerNS = "FATHOM_TEST_ROUTER_NS"
	admin    = "admin-token"
	ofAgent  = "agent" // of node n1
)

// TestBGP runs the agent of a node, with the rights that an installation gives it, against a real API server and a
// real router.
func TestBGP(t *testing.T) {
	testenv.NeedRoot(t)
	testenv.NeedFile(t, kit+"kube-apiserver", "make kit")
	testenv.NeedFile(t, "/usr/sbin/bird", "apt-get install bird2")
	if os.Getenv(routerNS) != "" {
		inNode(t, os.Getenv(routerNS))
		return
	}
	// A process of its own in the node's namespace: an agent starts goroutines.
	node := linktest.Namespace(t)
	router, path := linktest.NamespaceAt(t)
	testenv.Must(t, node.SetPair(link.Device{Name: "eth0", Alias: "test"}, router, link.Device{Name: "node", Alias: "test"}))
	for _, c := range []string{"ip link set lo up", "ip addr add 10.1.1.2/24 dev eth0", "ip addr add fd00:1:1::2/64 dev eth0 nodad", "ip link set eth0 up"} {
		linktest.Run(t, node, strings.Fields(c)...)
	}
	for _, c := range []string{"ip link set lo up", "ip addr add 10.1.1.1/24 dev node", "ip addr add fd00:1:1::1/64 dev node nodad", "ip addr add fe80::1/64 dev node nodad", "ip link set node up"} {
		linktest.Run(t, router, strings.Fields(c)...)
	}
	self, err := os.Executable()
	testenv.Must(t, err)
	cmd := exec.Command(self, "-test.run=^TestBGP$", "-test.v")
	cmd.Env = append(os.Environ(), routerNS+"="+path)
	var out strings.Builder
	cmd.Stdout, cmd.Stderr = &out, &out
	testenv.Must(t, node.Start(cmd))
	if err := cmd.Wait(); err != nil {
		t.Fatalf("%v\n%s", err, out.String())
	}
}

// server starts etcd and an API server, and returns how to connect with a token, and the file for that.
func server(t testing.TB) (connect func(token string) *kube.Client, kubeconfig func(token string) string) {
	t.Helper()
	here, err := link.Here()
	testenv.Must(t, err)
	t.Cleanup(here.Close)
	dir := t.TempDir()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	testenv.Must(t, err)
	der, err := x509.MarshalECPrivateKey(key)
	testenv.Must(t, err)
	file := func(name, text string) string {
		path := filepath.Join(dir, name)
		testenv.Must(t, os.WriteFile(path, []byte(text), 0o600))
		return path
	}
	sa := file("sa.key", string(pem.EncodeToMemory(&pem.Block{Type: "EC PRIVATE KEY", Bytes: der})))
	tokens := file("tokens", admin+",admin,1,system:masters\n")
	begin(t, here, kit+"etcd", "--data-dir", filepath.Join(dir, "etcd"), "--listen-client-urls", "http://127.0.0.1:2379", "--advertise-client-urls", "http://127.0.0.1:2379",
		"--listen-peer-urls", "http://127.0.0.1:2380", "--unsafe-no-fsync")
	begin(t, here, kit+"kube-apiserver", "--etcd-servers=http://127.0.0.1:2379", "--cert-dir="+filepath.Join(dir, "certs"), "--secure-port=6443", "--bind-address=127.0.0.1",
		"--advertise-address=10.1.1.2", "--token-auth-file="+tokens, "--authorization-mode=RBAC", "--service-cluster-ip-range=10.96.0.0/16",
		"--service-account-issuer=https://kubernetes.default.svc", "--service-account-key-file="+sa, "--service-account-signing-key-file="+sa)
	kubeconfig = func(token string) string {
		user := `{"token": "` + token + `"}`
		if token == ofAgent { // what the API server makes of the token of an agent's pod
			user = `{"token": "` + admin + `", "as": "system:serviceaccount:fathom-system:fathom-agent", "as-groups": ["system:serviceaccounts"],
				"as-user-extra": {"authentication.kubernetes.io/node-name": ["n1"]}}`
		}
		return file("kubeconfig-"+token, `{"apiVersion": "v1", "kind": "Config", "current-context": "x",
			"clusters": [{"name": "x", "cluster": {"server": "https://127.0.0.1:6443", "insecure-skip-tls-verify": true}}],
			"users": [{"name": "x", "user": `+user+`}],
			"contexts": [{"name": "x", "context": {"cluster": "x", "user": "x"}}]}`)
	}
	connect = func(token string) *kube.Client {
		c, err := kube.Connect(kubeconfig(token))
		testenv.Must(t, err)
		return c
	}
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	testenv.Must(t, connect(admin).WaitReady(ctx))
	return connect, kubeconfig
}

func object(t testing.TB, text string) []*unstructured.Unstructured {
	t.Helper()
	o, err := kube.Decode(strings.NewReader(text))
	testenv.Must(t, err)
	return o
}

// advertised is the spec of a BGPPeer of another AS.
func advertised(more string) string {
	return `{"peerAddress": "10.0.0.1", "peerASN": 1, "localASN": 2, ` + more + `}`
}

// advertise has a router told of one Service's addresses and not of another's, and another machine on the node's segment ask
// for external IPs.
// createNode makes a Node of the API.
func createNode(ctx context.Context, c *kube.Client, n *corev1.Node) error {
	_, err := c.CoreV1().Nodes().Create(ctx, n, metav1.CreateOptions{})
	return err
}

func advertise(t *testing.T, c *kube.Client, router *link.Namespace, birdctl string, advertisements func(string)) {
	ctx := t.Context()
	testenv.Must(t, c.Apply(ctx, "test", object(t, `{"apiVersion": "fathom.network/v1alpha1", "kind": "AddressPool", "metadata": {"name": "edge", "labels": {"site": "a"}},
		"spec": {"addresses": ["10.1.1.128/28", "198.51.100.0/24"]}}`)))
	for name, addr := range map[string]string{"web": "7", "mail": "8"} {
		s := &corev1.Service{ObjectMeta: metav1.ObjectMeta{Name: name, Labels: map[string]string{"app": name}}}
		s.Spec.Type, s.Spec.ClusterIP, s.Spec.Ports = corev1.ServiceTypeLoadBalancer, "10.96.1."+addr, []corev1.ServicePort{{Port: 80}}
		s.Spec.ExternalIPs = []string{"10.1.1.13" + addr, "203.0.113." + addr, "198.51.100.1" + addr}
		made, err := c.CoreV1().Services("default").Create(ctx, s, metav1.CreateOptions{})
		testenv.Must(t, err)
		made.Status.LoadBalancer.Ingress = []corev1.LoadBalancerIngress{{IP: "198.51.100." + addr}}
		_, err = c.CoreV1().Services("default").UpdateStatus(ctx, made, metav1.UpdateOptions{})
		testenv.Must(t, err)
	}
	// told waits until the router has these routes beside pods', each with these words, and no others.
	told := func(step string, want map[string][]string) {
		t.Helper()
		testenv.Eventually(t, step, func() (bool, string) {
			out, err := linktest.Try(router, "birdc", "-s", birdctl, "show", "route", "all")
			have := map[string]string{}
			prefix := ""
			for line := range strings.Lines(out) {
				if w := strings.Fields(line); len(w) > 1 && strings.Contains(w[0], "/") {
					prefix = w[0]
				}
				have[prefix] += strings.TrimSpace(line) + "\n"
			}
			delete(have, "") // what birdc says of itself
			delete(have, "10.244.1.0/24")
			delete(have, "fd00:244:1::/64")
			good := err == nil && len(have) == len(want)
			for p, words := range want {
				for _, w := range words {
					good = good && strings.Contains(have[p], w)
				}
			}
			return good, out
		})
	}
	advertisements(`[{"addresses": ["PodCIDR"]}, {"addresses": ["LoadBalancerIP", "ExternalIP"], "pools": ["edge"], "serviceSelector": {"matchLabels": {"app": "web"}}, "communities": ["64512:7", "64512:1:7"]},
		{"addresses": ["ClusterIP"], "serviceSelector": {"matchLabels": {"app": "mail"}}}]`)
	marks := []string{"(64512,7)", "(64512,1)", "(64512, 1, 7)"}
	told("the router has one Service's outer and the other's inner addresses", map[string][]string{
		"198.51.100.7/32": marks, "198.51.100.17/32": marks, "10.1.1.137/32": marks, "10.96.1.8/32": {"(64512,1)"}})
	advertisements(`[{"addresses": ["LoadBalancerIP"], "poolSelector": {"matchLabels": {"site": "a"}}, "aggregationLength": 24}]`)
	told("the router has the aggregate", map[string][]string{"198.51.100.0/24": {"(64512,1)"}})
	refused := func(want string) {
		t.Helper()
		testenv.Eventually(t, "of aggregates is refused: "+want, func() (bool, string) {
			out, err := exec.Command("nft", "list", "set", "inet", service.AggregatesTable, "aggregates4").CombinedOutput()
			return (err == nil) == (want != "") && strings.Contains(string(out), want), string(out)
		})
	}
	refused("198.51.100.0/24")
	advertisements(`[{"addresses": ["ExternalIP"], "pools": ["other"]}]`)
	told("the router has nothing of a pool that is not there", nil)
	refused("")

	// Who asks for an external IP of the pool hears of the node, whichever way routers are told.
	mac := strings.Fields(linktest.Run(t, router, "ip", "-o", "neigh", "show", "10.1.1.2"))[4]
	testenv.Eventually(t, "a machine of the segment finds the external IP at the node", func() (bool, string) {
		_, _ = linktest.Try(router, "ping", "-c1", "-W1", "10.1.1.137")
		neigh := linktest.Run(t, router, "ip", "neigh", "show", "10.1.1.137")
		return strings.Contains(neigh, mac), neigh
	})
	testenv.Must(t, c.CoreV1().Services("default").Delete(ctx, "web", metav1.DeleteOptions{}))
	testenv.Eventually(t, "nobody has the external IP of a Service that is gone", func() (bool, string) {
		linktest.Run(t, router, "ip", "neigh", "flush", "to", "10.1.1.137")
		_, _ = linktest.Try(router, "ping", "-c1", "-W1", "10.1.1.137")
		neigh := linktest.Run(t, router, "ip", "neigh", "show", "10.1.1.137")
		return !strings.Contains(neigh, mac), neigh
	})
}

func inNode(t *testing.T, routerPath string) {
	router, err := link.Open(routerPath)
	testenv.Must(t, err)
	t.Cleanup(router.Close)
	connect, _ := server(t)
	c := connect(admin)
	ctx := t.Context()

	// Everything of an installation but the CRD, and no DaemonSet.
	objects, err := install.Objects(install.Options{})
	testenv.Must(t, err)
	var rest, crd []*unstructured.Unstructured
	for _, o := range objects {
		switch o.GetKind() {
		case "CustomResourceDefinition":
			crd = append(crd, o)
		case "DaemonSet":
		default:
			rest = append(rest, o)
		}
	}
	if len(crd) == 0 {
		t.Fatal("the CRD is not installed")
	}
	testenv.Must(t, c.Apply(ctx, install.Owner, rest))
	testenv.Must(t, createNode(ctx, c, &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: "n1", Labels: map[string]string{"rack": "a"}},
		Spec: corev1.NodeSpec{PodCIDR: "10.244.1.0/24", PodCIDRs: []string{"10.244.1.0/24", "fd00:244:1::/64"}}}))
	n, err := c.CoreV1().Nodes().Get(ctx, "n1", metav1.GetOptions{})
	testenv.Must(t, err)
	n.Status.Conditions = []corev1.NodeCondition{{Type: corev1.NodeReady, Status: corev1.ConditionTrue}}
	n.Status.Addresses = []corev1.NodeAddress{{Type: corev1.NodeInternalIP, Address: "10.1.1.2"}, {Type: corev1.NodeInternalIP, Address: "fd00:1:1::2"}}
	_, err = c.CoreV1().Nodes().UpdateStatus(ctx, n, metav1.UpdateOptions{})
	testenv.Must(t, err)

	dir := t.TempDir()
	conf := filepath.Join(dir, "bird.conf")
	testenv.Must(t, os.WriteFile(conf, []byte(`
router id 192.0.2.1;
protocol device { scan time 1; }
protocol kernel { ipv4 { export all; }; }
protocol kernel { ipv6 { export all; }; }
protocol radv { interface "node" { min ra interval 3; max ra interval 4; }; }
protocol bgp { local as 64500; neighbor range fe80::/10 as 64512; interface "node"; passive; ipv4 { import all; export none; }; ipv6 { import all; export none; }; }
protocol bgp { local as 64500; neighbor 10.1.1.2 as 64512; passive; password "tell-nobody"; ipv4 { import all; export none; }; ipv6 { import all; export none; }; }
`), 0o600))
	begin(t, router, "/usr/sbin/bird", "-f", "-c", conf, "-s", filepath.Join(dir, "bird.ctl"))

	start := func() (stop func()) {
		agentCtx, cancel := context.WithCancel(ctx)
		ended := make(chan error, 1)
		go func() {
			ended <- agent.Run(agentCtx, agent.Options{Node: "n1", Client: connect(ofAgent), Log: slog.New(slog.NewTextHandler(t.Output(), nil)),
				Metrics: "127.0.0.1:10471", Resync: 200 * time.Millisecond, Paths: agent.Paths{CNIBin: dir, Conflist: filepath.Join(dir, "x.conflist"),
					Leases: filepath.Join(dir, "leases"), Socket: filepath.Join(dir, "agent.sock"), NetNS: dir, Sysctl: "/proc/sys/net", BPF: dir}})
		}()
		return func() {
			cancel()
			testenv.Must(t, <-ended)
		}
	}
	metric := func(text string) func() (bool, string) {
		return func() (bool, string) {
			r, err := http.Get("http://127.0.0.1:10471/metrics")
			if err != nil {
				return false, err.Error()
			}
			defer r.Body.Close()
			body, err := io.ReadAll(r.Body)
			return err == nil && strings.Contains(string(body), text), string(body)
		}
	}
	named := "router"
	status := func() string {
		u := &unstructured.Unstructured{}
		raw, err := c.CoreV1().RESTClient().Get().AbsPath("/apis/fathom.network/v1alpha1/bgppeers/" + named).DoRaw(ctx)
		if err != nil || u.UnmarshalJSON(raw) != nil {
			return fmt.Sprint(err)
		}
		sessions, _, _ := unstructured.NestedSlice(u.Object, "status", "sessions")
		return fmt.Sprint(sessions)
	}
	says := func(words ...string) func() (bool, string) {
		return func() (bool, string) {
			s := status()
			for _, w := range words {
				if !strings.Contains(s, w) {
					return false, s
				}
			}
			return true, s
		}
	}
	routes := func(want bool) {
		t.Helper()
		testenv.Eventually(t, fmt.Sprint("the router has the routes: ", want), func() (bool, string) {
			have := linktest.Run(t, router, "ip", "-4", "route") + linktest.Run(t, router, "ip", "-6", "route")
			return strings.Contains(have, "10.244.1.0/24 via 10.1.1.2") == want && strings.Contains(have, "fd00:244:1::/64 via fd00:1:1::2") == want, have
		})
	}

	stop := start()
	testenv.Eventually(t, "the agent does without the CRD", metric("fathom_agent_last_good_pass_timestamp_seconds{"))
	testenv.Must(t, c.Apply(ctx, install.Owner, crd))
	peer := func(spec string) []*unstructured.Unstructured {
		return object(t, `{"apiVersion": "fathom.network/v1alpha1", "kind": "BGPPeer", "metadata": {"name": "router"}, "spec": `+spec+`}`)
	}
	testenv.Eventually(t, "the kind is served", func() (bool, string) {
		err := c.Apply(ctx, "test", peer(`{"peerAddress": "10.1.1.1", "peerASN": 64500, "localASN": 64512, "passwordSecret": {"name": "router"},
			"nodeSelector": {"matchLabels": {"rack": "a"}}, "communities": ["64512:1", "64512:1:2", "no-export"]}`))
		return err == nil, fmt.Sprint(err)
	})
	testenv.Eventually(t, "it is told that the agent may not read the password", says("Refused", "agents may not read Secret router", "kubectl -n fathom-system create role bgp-router --verb=get", "n1"))
	testenv.Must(t, c.Apply(ctx, "test", append( // what those commands do
		object(t, `{"apiVersion": "rbac.authorization.k8s.io/v1", "kind": "Role", "metadata": {"name": "bgp-router", "namespace": "fathom-system"},
			"rules": [{"apiGroups": [""], "resources": ["secrets"], "resourceNames": ["router"], "verbs": ["get"]}]}`),
		object(t, `{"apiVersion": "rbac.authorization.k8s.io/v1", "kind": "RoleBinding", "metadata": {"name": "bgp-router", "namespace": "fathom-system"},
			"roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "Role", "name": "bgp-router"}, "subjects": [{"kind": "ServiceAccount", "name": "fathom-agent", "namespace": "fathom-system"}]}`)...)))
	testenv.Eventually(t, "the missing password is told", says("Refused", `secrets "router" not found`, "n1"))
	testenv.Must(t, c.Apply(ctx, "test", object(t, `{"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "router", "namespace": "fathom-system"}, "stringData": {"password": "tell-nobody"}}`)))
	testenv.Eventually(t, "the session is told", says("Established", "prefixes:2"))
	testenv.Eventually(t, "the session is measured", metric(`fathom_bgp_session_up{node="n1",peer="router"} 1`))
	agentSays := &http.Client{Transport: &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "unix", filepath.Join(dir, "agent.sock"))
	}}}
	testenv.Eventually(t, "the agent says what it tells the router, and no password", func() (bool, string) {
		r, err := agentSays.Get("http://agent/v1/bgp")
		if err != nil {
			return false, err.Error()
		}
		defer r.Body.Close()
		var a answer.BGP
		body, err := io.ReadAll(r.Body)
		return err == nil && json.Unmarshal(body, &a) == nil && a.Decided && len(a.Sessions) == 1 && a.Sessions[0].State == "Established" && len(a.Sessions[0].Told) == 2 &&
			a.Sessions[0].Address.String() == "10.1.1.1:179" && !strings.Contains(string(body), "tell-nobody"), string(body)
	})
	testenv.Eventually(t, "the prefixes are measured", metric(`fathom_bgp_prefixes_advertised{node="n1",peer="router"} 2`))
	routes(true)
	events, err := c.CoreV1().Events("default").List(ctx, metav1.ListOptions{})
	testenv.Must(t, err)
	if text := fmt.Sprint(events.Items); !strings.Contains(text, "SessionUp") || !strings.Contains(text, "NetworkProblem") {
		t.Errorf("no event of the session and of the missing password in\n%s", text)
	}

	// What another node says stays as it is.
	testenv.Must(t, c.PublishBGPSession(ctx, "router", "n2", &v1alpha1.BGPSession{Node: "n2", State: "Active", Since: metav1.NewTime(time.Unix(1, 0))}))
	stop()
	routes(true)
	stop = start()
	testenv.Eventually(t, "the session is back", metric(`fathom_bgp_session_up{node="n1",peer="router"} 1`))
	testenv.Eventually(t, "both sessions are told", says("Established", "node:n1", "node:n2"))
	routes(true)

	for _, wrong := range []struct{ spec, want string }{
		{`{"peerAddress": "10.1.1.256", "peerASN": 1, "localASN": 2}`, "has to be an IPv4 or IPv6 address"},
		{`{"peerAddress": "fd00:0::1", "peerASN": 1, "localASN": 2}`, "shortest form"},
		{`{"peerAddress": "::1", "peerASN": 1, "localASN": 2}`, "other machines"},
		{`{"peerAddress": "169.254.0.1", "interface": "eth0", "peerASN": 1, "localASN": 2}`, "other machines"},
		{`{"peerAddress": "fe80::1", "peerASN": 1, "localASN": 2}`, "needs the interface"},
		{`{"peerASN": 1, "localASN": 2}`, "by interface the link on which it advertises itself"},
		{`{"peerAddress": "", "interface": "eth0", "peerASN": 1, "localASN": 2}`, "peerAddress"},
		{`{"peerAddress": "fd00::1", "interface": "eth0", "peerASN": 1, "localASN": 2}`, "no other has one"},
		{`{"peerAddress": "fe80::1", "interface": "eth0/1", "peerASN": 1, "localASN": 2}`, "interface"},
		{`{"peerAddress": "10.0.0.1", "peerASN": 0, "localASN": 2}`, "peerASN"},
		{`{"peerAddress": "10.0.0.1", "peerASN": 1, "localASN": 23456}`, "reserved"},
		{`{"peerAddress": "10.0.0.1", "peerASN": 1, "localASN": 2, "holdTimeSeconds": 9}`, "a third"},
		{`{"peerAddress": "10.0.0.1", "peerASN": 1, "localASN": 1, "ebgpMultihop": 2}`, "another AS"},
		{`{"peerAddress": "10.0.0.1", "peerASN": 1, "localASN": 2, "communities": ["65536:1"]}`, "two numbers"},
		{`{"peerAddress": "10.0.0.1", "peerASN": 1, "localASN": 2, "communities": ["1:2:4294967296"]}`, "two numbers"},
		{`{"peerAddress": "10.0.0.1", "peerASN": 1, "localASN": 2, "advertise": ["Everything"]}`, "Unsupported value"},
		{advertised(`"advertise": ["ServiceAddresses"], "advertisements": [{"addresses": ["ClusterIP"]}]`), "in the place of advertise"},
		{advertised(`"advertisements": []`), "at least 1 items"},
		{advertised(`"advertisements": [{"addresses": ["PodCIDRs"]}]`), "Unsupported value"},
		{advertised(`"advertisements": [{"addresses": ["PodCIDR"], "aggregationLength": 16}]`), "PodCIDR alone has none"},
		{advertised(`"advertisements": [{"addresses": ["PodCIDR", "ClusterIP"], "pools": ["edge"]}]`), "ClusterIPs are of no AddressPool"},
		{advertised(`"advertisements": [{"addresses": ["ClusterIP"], "localPref": 200}]`), "a peer of the same AS"},
		{advertised(`"advertisements": [{"addresses": ["ClusterIP"], "aggregationLength": 33}]`), "aggregationLength"},
		{advertised(`"advertisements": [{"addresses": ["ClusterIP"], "communities": ["65536:1"]}]`), "two numbers"},
		{advertised(`"advertisements": [{"addresses": ["ClusterIP"], "serviceSelector": {"matchExpressions": [{"key": "a", "operator": "In"}]}}]`), "want values"},
		{`{"peerAddress": "10.0.0.1", "peerASN": 1, "localASN": 2, "nodeSelector": {"matchExpressions": [{"key": "a", "operator": "In"}]}}`, "want values"},
	} {
		o := peer(wrong.spec)
		o[0].SetName("wrong")
		if err := c.Apply(ctx, "test", o); err == nil || !strings.Contains(err.Error(), wrong.want) {
			t.Errorf("%s: %v; want it refused with %q", wrong.spec, err, wrong.want)
		}
	}

	// What the rights do not give.
	if _, err := connect(ofAgent).CoreV1().Secrets("fathom-system").List(ctx, metav1.ListOptions{}); err == nil {
		t.Error("an agent may list Secrets")
	}
	if _, err := connect(ofAgent).CoreV1().Secrets("default").Get(ctx, "router", metav1.GetOptions{}); err == nil || !strings.Contains(err.Error(), "forbidden") {
		t.Errorf("an agent may read other namespaces' Secrets: %v", err)
	}

	advertise(t, c, router, filepath.Join(dir, "bird.ctl"), func(advertisements string) {
		testenv.Must(t, c.Apply(ctx, "test", peer(`{"peerAddress": "10.1.1.1", "peerASN": 64500, "localASN": 64512, "passwordSecret": {"name": "router"},
			"communities": ["64512:1"], "advertisements": `+advertisements+`}`)))
	})

	testenv.Must(t, c.Delete(ctx, peer(`{}`)))
	routes(false)

	// Another with the router's link-local address.
	o := peer(`{"peerAddress": "fe80::1", "interface": "eth0", "peerASN": 64500, "localASN": 64512}`)
	o[0].SetName("linked")
	testenv.Must(t, c.Apply(ctx, "test", o))
	testenv.Eventually(t, "the router has pods by way of the link-local address, and IPv4 by that of the link", func() (bool, string) {
		have := linktest.Run(t, router, "ip", "-4", "route") + linktest.Run(t, router, "ip", "-6", "route")
		return strings.Contains(have, "10.244.1.0/24 via 10.1.1.2") && strings.Contains(have, "fd00:244:1::/64 via fe80::"), have
	})
	testenv.Must(t, c.Delete(ctx, o))
	routes6 := func(want bool) {
		t.Helper()
		testenv.Eventually(t, fmt.Sprint("the router has pods by way of a link-local address: ", want), func() (bool, string) {
			have := linktest.Run(t, router, "ip", "-6", "route")
			return strings.Contains(have, "fd00:244:1::/64 via fe80::") == want, have
		})
	}
	routes6(false)

	// Another that says no more than on what link it is; on one link there is none.
	for name, device := range map[string]string{"lost": "nowhere", "leaf": "eth0"} { // those before wait for a garbage collector
		o = peer(fmt.Sprintf(`{"interface": %q, "peerASN": 64500, "localASN": 64512}`, device))
		o[0].SetName(name)
		testenv.Must(t, c.Apply(ctx, "test", o))
	}
	routes6(true)
	named = "lost"
	testenv.Eventually(t, "it is told that there is no such link", says("Refused", "interface nowhere: this node has no such device"))
	here, err := link.Here()
	testenv.Must(t, err)
	defer here.Close()
	linktest.Run(t, here, "ip", "link", "add", "nowhere", "type", "veth", "peer", "nobody")
	linktest.Run(t, here, "ip", "link", "set", "nobody", "up")
	linktest.Run(t, here, "ip", "link", "set", "nowhere", "up")
	testenv.Eventually(t, "it is told that nobody is there", says("Active", "no router advertisement was heard on nowhere"))
	stop()
}
