package agent_test

import (
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"net"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"

	"github.com/fathom-network/fathom/internal/agent"
	"github.com/fathom-network/fathom/internal/facts/answer"
	"github.com/fathom-network/fathom/internal/facts/netconf"
	"github.com/fathom-network/fathom/internal/facts/service"
	"github.com/fathom-network/fathom/internal/install"
	"github.com/fathom-network/fathom/internal/kernel/link"
	"github.com/fathom-network/fathom/internal/testenv"
	"github.com/fathom-network/fathom/internal/testenv/linktest"
	"github.com/fathom-network/fathom/internal/watch/kube"
)

const inFaultyNode = "FATHOM_TEST_IN_FAULTY_NODE"

// TestFaults runs an agent behind an API server that hangs, refuses, forgets and cuts. The kernel follows what the agent
// hears meanwhile, keeps what it has, and is as it should be when the faults have ended.
func TestFaults(t *testing.T) {
	testenv.NeedRoot(t)
	testenv.NeedFile(t, kit+"kube-apiserver", "make kit")
	if os.Getenv(inFaultyNode) != "" {
		faults(t)
		return
	}
	node, other := linktest.Namespace(t), linktest.Namespace(t)
	testenv.Must(t, node.SetPair(link.Device{Name: "eth0", Alias: "test"}, other, link.Device{Name: "eth0", Alias: "test"}))
	for _, c := range []string{"ip link set lo up", "ip addr add 10.1.1.2/16 dev eth0", "ip link set eth0 up", "ip route add default via 10.1.1.1"} {
		linktest.Run(t, node, strings.Fields(c)...)
	}
	self, err := os.Executable()
	testenv.Must(t, err)
	cmd := exec.Command(self, "-test.run=^TestFaults$", "-test.v")
	cmd.Env = append(os.Environ(), inFaultyNode+"=1")
	var out strings.Builder
	cmd.Stdout, cmd.Stderr = &out, &out
	testenv.Must(t, node.Start(cmd))
	if err := cmd.Wait(); err != nil {
		t.Fatalf("%v\n%s", err, out.String())
	}
	t.Log(out.String())
}

// faultyNode is an agent and what it has to do with.
type faultyNode struct {
	*testing.T
	admin  *kube.Client
	front  *testenv.FaultProxy
	socket string
}

// node makes, or changes, the i-th node of the cluster.
func (f *faultyNode) node(i int, annotations map[string]string) {
	f.Helper()
	cidr := fmt.Sprintf("10.244.%d.0/24", i)
	testenv.Must(f, createNode(f.Context(), f.admin, &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: fmt.Sprint("n", i), Annotations: annotations},
		Spec: corev1.NodeSpec{PodCIDR: cidr, PodCIDRs: []string{cidr}}}))
	n, err := f.admin.CoreV1().Nodes().Get(f.Context(), fmt.Sprint("n", i), metav1.GetOptions{})
	testenv.Must(f, err)
	n.Status.Addresses = []corev1.NodeAddress{{Type: corev1.NodeInternalIP, Address: fmt.Sprintf("10.1.1.%d", i+1)}}
	_, err = f.admin.CoreV1().Nodes().UpdateStatus(f.Context(), n, metav1.UpdateOptions{})
	testenv.Must(f, err)
}

func output(t testing.TB, args ...string) string {
	t.Helper()
	out, err := exec.Command(args[0], args[1:]...).CombinedOutput()
	if err != nil {
		t.Fatalf("%s: %v: %s", args, err, out)
	}
	return string(out)
}

// routes waits until the kernel routes the pods of these nodes.
func (f *faultyNode) routes(what string, nodes ...int) {
	f.Helper()
	f.await(what, func() (bool, string) {
		have := output(f, "ip", "-4", "route")
		for _, i := range nodes {
			if !strings.Contains(have, fmt.Sprintf("10.244.%d.0/24 via 10.1.1.%d", i, i+1)) {
				return false, have
			}
		}
		return true, ""
	})
}

// await is testenv.Eventually for what a client waits longer for after many failures: client-go up to half a minute.
func (f *faultyNode) await(what string, probe func() (bool, string)) {
	f.Helper()
	var how string
	for deadline := time.Now().Add(3 * time.Minute); time.Now().Before(deadline); time.Sleep(50 * time.Millisecond) {
		var ok bool
		if ok, how = probe(); ok {
			return
		}
	}
	f.Fatalf("%s: not so after three minutes: %s\nrequests %v", what, how, f.front.Requests())
}

// services asks the agent what the kernel has of Services.
func (f *faultyNode) services() (answer.Services, error) {
	c := http.Client{Transport: &http.Transport{DisableKeepAlives: true, DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "unix", f.socket)
	}}}
	var s answer.Services
	r, err := c.Get("http://agent/v1/services")
	if err != nil {
		return s, err
	}
	defer r.Body.Close()
	return s, json.NewDecoder(r.Body).Decode(&s)
}

// endpoints waits until a Service's frontend has these in the kernel.
func (f *faultyNode) endpoints(name, clusterIP string, want ...string) {
	f.Helper()
	slices.Sort(want)
	f.await("Service "+name, func() (bool, string) {
		s, err := f.services()
		if err != nil {
			return false, err.Error()
		}
		for _, front := range s.NFTables.Frontends {
			if front.Addr != netip.MustParseAddr(clusterIP) {
				continue
			}
			var have []string
			for _, e := range front.Inside.Endpoints {
				have = append(have, e.Addr().String())
			}
			slices.Sort(have)
			return slices.Equal(have, want), fmt.Sprint(have)
		}
		return false, "no frontend"
	})
}

// monitor collects what a program tells of changes, and fails the test if it tells that what must stay was lost.
func (f *faultyNode) monitor(lost func(line string) bool, args ...string) (check func()) {
	f.Helper()
	log := filepath.Join(f.TempDir(), "monitor")
	file, err := os.Create(log)
	testenv.Must(f, err)
	cmd := exec.Command(args[0], args[1:]...)
	cmd.Stdout = file
	testenv.Must(f, cmd.Start())
	file.Close()
	end := sync.OnceFunc(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	})
	f.Cleanup(end)
	return func() {
		f.Helper()
		end()
		text, err := os.ReadFile(log)
		testenv.Must(f, err)
		if len(text) == 0 {
			f.Errorf("%s saw nothing at all", args)
		}
		for line := range strings.Lines(string(text)) {
			if lost(line) {
				f.Errorf("%s: %s", args, line)
			}
		}
	}
}

// keeps looks again and again whether the kernel has a Service with an endpoint, until it is checked.
func (f *faultyNode) keeps(clusterIP string) (check func()) {
	stop, lost := make(chan struct{}), make(chan string, 1)
	go func() {
		defer close(lost)
		for looks := 0; ; looks++ {
			select {
			case <-stop:
				if looks == 0 {
					lost <- "nobody looked"
				}
				return
			case <-time.After(50 * time.Millisecond):
			}
			s, err := f.services()
			if err != nil {
				continue
			}
			i := slices.IndexFunc(s.NFTables.Frontends, func(front service.Frontend) bool { return front.Addr == netip.MustParseAddr(clusterIP) })
			if i < 0 || len(s.NFTables.Frontends[i].Inside.Endpoints) == 0 {
				lost <- fmt.Sprint(s.NFTables.Frontends)
				return
			}
		}
	}()
	return func() {
		f.Helper()
		close(stop)
		if how, failed := <-lost; failed {
			f.Errorf("Service %s was lost: %s", clusterIP, how)
		}
	}
}

const stable, odd = "10.96.0.50", "10.96.0.60"

// oddSlice has 1,000 endpoints of odd values, most of which an API server would not let in, and returns the addresses of
// those that can be of use.
func oddSlice() (es discoveryv1.EndpointSlice, good []string) {
	yes, no, port, name := true, false, int32(8080), "odd"
	es = discoveryv1.EndpointSlice{ObjectMeta: metav1.ObjectMeta{Name: name + "-1", Namespace: "default", UID: "odd", ResourceVersion: "1", Labels: map[string]string{discoveryv1.LabelServiceName: name}},
		AddressType: discoveryv1.AddressTypeIPv4, Ports: []discoveryv1.EndpointPort{{Port: &port}, {}, {Name: &name, Port: nil}}}
	for i := range 1000 {
		addr := fmt.Sprintf("10.244.2.%d", i/10+1)
		e := discoveryv1.Endpoint{Addresses: []string{addr}, Conditions: discoveryv1.EndpointConditions{Ready: &yes}}
		switch i % 10 {
		case 0:
			e.Conditions = discoveryv1.EndpointConditions{} // without a word it is ready
			good = append(good, addr)
		case 1: // the same again
		case 2:
			e.Addresses = nil
		case 3:
			e.Addresses = []string{""}
		case 4:
			e.Addresses = []string{fmt.Sprintf("::ffff:10.244.3.%d", i/10+1)} // is the IPv4 address, as kube-proxy reads it
			good = append(good, fmt.Sprintf("10.244.3.%d", i/10+1))
		case 5:
			e.Addresses, e.Conditions.Ready = []string{fmt.Sprintf("10.244.4.%d", i/10+1)}, &no
		case 6:
			e.Addresses = []string{fmt.Sprintf("fd00::%d", i)}
		case 7:
			values := []string{"10.244.5", "0.0.0.0", "224.0.0.1", "not an address", strings.Repeat("1", 7000), "010.244.5.1"}
			e.Addresses = values[i/10%len(values):] // of more than one, the first counts
		case 8:
			e.Addresses = []string{fmt.Sprintf("fe80::%d%%eth0", i)}
		case 9:
			e.Addresses, e.Conditions = []string{fmt.Sprintf("10.244.6.%d", i/10+1)}, discoveryv1.EndpointConditions{Ready: &no, Serving: &no, Terminating: &yes}
		}
		es.Endpoints = append(es.Endpoints, e)
	}
	return es, append(good, "10.244.5.1") // zeros in front are borne with, as kube-proxy does
}

func faults(t *testing.T) {
	connect, kubeconfig := server(t)
	f := &faultyNode{T: t, admin: connect(admin), front: testenv.NewFaultProxy(t, kubeconfig(ofAgent))}
	ctx := t.Context()
	objects, err := install.Objects(install.Options{Config: map[string]string{"serviceProxy": string(netconf.ProxyNFTables)}})
	testenv.Must(t, err)
	objects = slices.DeleteFunc(objects, func(o *unstructured.Unstructured) bool { return o.GetKind() == "DaemonSet" })
	testenv.Must(t, f.admin.Apply(ctx, install.Owner, objects))
	for i := 1; i <= 3; i++ {
		f.node(i, nil)
	}
	services, all := f.admin.CoreV1().Services("default"), f.admin.DiscoveryV1().EndpointSlices("default")
	endpoint := func(addrs ...string) []discoveryv1.Endpoint {
		var list []discoveryv1.Endpoint
		for _, a := range addrs {
			list = append(list, discoveryv1.Endpoint{Addresses: []string{a}})
		}
		return list
	}
	for name, ip := range map[string]string{"stable": stable, "odd": odd} {
		_, err := services.Create(ctx, &corev1.Service{ObjectMeta: metav1.ObjectMeta{Name: name}, Spec: corev1.ServiceSpec{ClusterIP: ip, Ports: []corev1.ServicePort{{Port: 80}}}}, metav1.CreateOptions{})
		testenv.Must(t, err)
	}
	port := int32(8080)
	slice, err := all.Create(ctx, &discoveryv1.EndpointSlice{ObjectMeta: metav1.ObjectMeta{Name: "stable-1", Labels: map[string]string{discoveryv1.LabelServiceName: "stable"}},
		AddressType: discoveryv1.AddressTypeIPv4, Ports: []discoveryv1.EndpointPort{{Port: &port}}, Endpoints: endpoint("10.244.2.1", "10.244.2.2")}, metav1.CreateOptions{})
	testenv.Must(t, err)

	dir := t.TempDir()
	f.socket = filepath.Join(dir, "agent.sock")
	client, err := kube.Connect(f.front.Kubeconfig)
	testenv.Must(t, err)
	agentCtx, cancel := context.WithCancel(ctx)
	ended := make(chan error, 1)
	go func() {
		ended <- agent.Run(agentCtx, agent.Options{Node: "n1", Client: client, Log: slog.New(slog.NewTextHandler(t.Output(), nil)),
			Resync: time.Second, Paths: agent.Paths{CNIBin: dir, Conflist: filepath.Join(dir, "x.conflist"),
				Leases: filepath.Join(dir, "leases"), Socket: f.socket, NetNS: dir, Sysctl: "/proc/sys/net", BPF: dir}})
	}()
	defer func() {
		cancel()
		testenv.Must(t, <-ended)
	}()
	f.routes("at first", 2, 3)
	f.endpoints("stable", stable, "10.244.2.1", "10.244.2.2")
	keptRoute := f.monitor(func(l string) bool { return strings.Contains(l, "Deleted") && strings.Contains(l, "10.244.2.0/24") }, "ip", "-4", "monitor", "route")
	keptService := f.keeps(stable)

	// No write is answered. Each of the Nodes is a problem to be told, and none of them holds what comes after it.
	f.front.Set(func(r *http.Request) testenv.Fault {
		if r.Method != http.MethodGet {
			return testenv.Hang
		}
		return testenv.Fault{}
	})
	for i := range 100 {
		testenv.Must(t, createNode(ctx, f.admin, &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: fmt.Sprint("wrong", i)},
			Spec: corev1.NodeSpec{PodCIDR: "10.244.3.0/24", PodCIDRs: []string{"10.244.3.0/24"}}}))
		n, err := f.admin.CoreV1().Nodes().Get(ctx, fmt.Sprint("wrong", i), metav1.GetOptions{})
		testenv.Must(t, err)
		n.Status.Addresses = []corev1.NodeAddress{{Type: corev1.NodeInternalIP, Address: fmt.Sprintf("10.1.9.%d", i+1)}}
		_, err = f.admin.CoreV1().Nodes().UpdateStatus(ctx, n, metav1.UpdateOptions{})
		testenv.Must(t, err)
	}
	f.node(4, nil)
	testenv.Eventually(t, "a route while nothing is answered", func() (bool, string) {
		have := output(t, "ip", "-4", "route")
		return strings.Contains(have, "10.244.4.0/24 via 10.1.1.5"), have
	})
	if n := f.front.Requests()["POST events"]; n == 0 || n > 20 {
		t.Errorf("%d requests for events of one node while none is answered", n)
	}
	for i := range 100 {
		testenv.Must(t, f.admin.CoreV1().Nodes().Delete(ctx, fmt.Sprint("wrong", i), metav1.DeleteOptions{}))
	}
	f.front.Set(nil)
	f.await("what could not be written is told", func() (bool, string) {
		events, err := f.admin.CoreV1().Events("default").List(ctx, metav1.ListOptions{FieldSelector: "involvedObject.name=n1,reason=NetworkProblem"})
		return err == nil && len(events.Items) > 0, fmt.Sprint(err)
	})

	// Everything fails in every way, at random.
	seed := rand.Uint64()
	t.Log("seed", seed)
	random := rand.New(rand.NewPCG(seed, 0))
	before, began := f.front.Requests(), time.Now()
	anything := func(r *http.Request) testenv.Fault { // one at a time
		switch n := random.IntN(8); {
		case n == 0 && testenv.IsWatch(r):
			return testenv.Expire
		case n <= 1:
			return testenv.Fail(http.StatusGone, "Expired", "")
		case n == 2:
			return testenv.Fail(http.StatusTooManyRequests, "TooManyRequests", "1")
		case n == 3:
			return testenv.Fail(http.StatusInternalServerError, "InternalError", "")
		case n == 4:
			return testenv.Fail(http.StatusServiceUnavailable, "ServiceUnavailable", "")
		case n == 5:
			return testenv.Fault{Delay: 20 * time.Millisecond, Cut: 1 + random.IntN(4000)}
		case n == 6 && !testenv.IsWatch(r):
			return testenv.Hang
		default:
			return testenv.Fault{Delay: 5 * time.Millisecond}
		}
	}
	f.front.Set(anything)
	f.node(5, nil)
	testenv.Must(t, f.admin.CoreV1().Nodes().Delete(ctx, "n3", metav1.DeleteOptions{}))
	slice.Endpoints = endpoint("10.244.2.1", "10.244.2.3")
	slice, err = all.Update(ctx, slice, metav1.UpdateOptions{})
	testenv.Must(t, err)
	sum := func(m map[string]int) (n int) {
		for _, k := range m {
			n += k
		}
		return n
	}
	for round := range 5 { // each begins with all connections cut
		f.front.Set(anything)
		f.await("requests go wrong", func() (bool, string) { return sum(f.front.Requests())-sum(before) > 15*(round+1), "" })
	}
	requests, took := sum(f.front.Requests())-sum(before), time.Since(began)
	t.Logf("%d requests in %v", requests, took)
	if rate := float64(requests) / took.Seconds(); rate > 50 {
		t.Errorf("%.0f requests in a second to a server that refuses them: %v", rate, f.front.Requests())
	}

	// It has recovered, and tells nonsense.
	strange, good := oddSlice()
	listed := false // one request at a time is asked about
	f.front.Set(func(r *http.Request) testenv.Fault {
		if !strings.HasSuffix(r.URL.Path, "/endpointslices") {
			return testenv.Fault{}
		}
		if r.URL.Query().Get("sendInitialEvents") != "" { // client-go lists instead
			return testenv.Fail(http.StatusUnprocessableEntity, "Invalid", "")
		}
		if testenv.IsWatch(r) && !listed {
			return testenv.Expire
		}
		if testenv.IsWatch(r) {
			return testenv.Hang
		}
		listed = true
		return testenv.Fault{Answer: func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Type", "application/json")
			_ = json.NewEncoder(w).Encode(discoveryv1.EndpointSliceList{TypeMeta: metav1.TypeMeta{APIVersion: "discovery.k8s.io/v1", Kind: "EndpointSliceList"},
				ListMeta: metav1.ListMeta{ResourceVersion: "1"}, Items: []discoveryv1.EndpointSlice{*slice, strange}})
		}}
	})
	f.routes("after the faults", 2, 4, 5)
	f.await("a node that is gone has no route", func() (bool, string) {
		have := output(t, "ip", "-4", "route")
		return !strings.Contains(have, "10.244.3.0/24 via"), have
	})
	f.endpoints("odd", odd, good...)
	f.endpoints("stable", stable, "10.244.2.1", "10.244.2.3")
	f.front.Set(func(r *http.Request) testenv.Fault {
		// The server knows nothing of what was listed at this version, and its watch does not tell that it has gone.
		if testenv.IsWatch(r) && strings.HasSuffix(r.URL.Path, "/endpointslices") && r.URL.Query().Get("resourceVersion") == "1" {
			return testenv.Expire
		}
		return testenv.Fault{}
	})
	f.endpoints("odd", odd)
	f.endpoints("stable", stable, "10.244.2.1", "10.244.2.3")
	f.await("the node is told to be good", func() (bool, string) {
		n, err := f.admin.CoreV1().Nodes().Get(ctx, "n1", metav1.GetOptions{})
		if err != nil {
			return false, err.Error()
		}
		return slices.ContainsFunc(n.Status.Conditions, func(c corev1.NodeCondition) bool {
			return c.Type == corev1.NodeNetworkUnavailable && c.Status == corev1.ConditionFalse
		}), fmt.Sprint(n.Status.Conditions)
	})
	keptRoute()
	keptService()
}
