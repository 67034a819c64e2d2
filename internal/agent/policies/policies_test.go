package policies

import (
	"context"
	"errors"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/watch"
	"k8s.io/client-go/kubernetes/fake"
	clienttesting "k8s.io/client-go/testing"
	"k8s.io/client-go/tools/cache"
	cachetesting "k8s.io/client-go/tools/cache/testing"

	cnp "github.com/fathom-network/fathom/api/clusternetworkpolicy/v1beta1"
	"github.com/fathom-network/fathom/internal/facts/diff"
	"github.com/fathom-network/fathom/internal/facts/policy"
	"github.com/fathom-network/fathom/internal/facts/service"
	"github.com/fathom-network/fathom/internal/kernel/nflog"
	"github.com/fathom-network/fathom/internal/kernel/nft"
	"github.com/fathom-network/fathom/internal/kernel/ruleset"
	"github.com/fathom-network/fathom/internal/watch/kube"
)

var ranges = []netip.Prefix{netip.MustParsePrefix("10.244.1.0/24")}

// world is a Keeper of "here", the API that it follows, and its kernel.
type world struct {
	*Keeper
	api     *fake.Clientset
	cluster *cachetesting.FakeControllerSource // of ClusterNetworkPolicies; nil if the kind is not installed
	kernel  *nft.Fake
	end     context.CancelFunc
}

// newWorld must be called within a bubble of synctest.
func newWorld(t *testing.T, kernel *nft.Fake, closed string, refused error, objects ...runtime.Object) *world {
	t.Helper()
	return newWorldWith(t, kernel, closed, refused, nil, objects...)
}

// clusterPolicies are those of a source; nil is a cluster that lacks the kind.
func clusterPolicies(source *cachetesting.FakeControllerSource) kube.Resource[*cnp.ClusterNetworkPolicy] {
	return kube.From[*cnp.ClusterNetworkPolicy]("ClusterNetworkPolicies", &cache.ListWatch{
		ListWithContextFunc: func(_ context.Context, o metav1.ListOptions) (runtime.Object, error) {
			if source == nil {
				return nil, apierrors.NewNotFound(schema.GroupResource{Resource: "clusternetworkpolicies"}, "")
			}
			return source.List(o)
		},
		WatchFuncWithContext: func(_ context.Context, o metav1.ListOptions) (watch.Interface, error) { return source.Watch(o) },
	})
}

func newWorldWith(t *testing.T, kernel *nft.Fake, closed string, refused error, cluster *cachetesting.FakeControllerSource, objects ...runtime.Object) *world {
	t.Helper()
	w := &world{api: fake.NewClientset(objects...), cluster: cluster, kernel: kernel}
	resource := clusterPolicies(cluster)
	if refused != nil {
		w.api.PrependReactor("list", "networkpolicies", func(clienttesting.Action) (bool, runtime.Object, error) { return true, nil, refused })
	}
	w.Keeper = New(Options{Node: "here", Client: &kube.Client{Interface: w.api}, Cluster: &resource, Log: slog.New(slog.DiscardHandler), Changed: func() {}, Resync: time.Minute, Closed: closed})
	w.rules = ruleset.New(kernel)
	w.packets = func() (Packets, error) { return silence{}, nil }
	w.SetRanges(ranges)
	ctx, cancel := context.WithCancel(t.Context())
	var ended atomic.Bool
	go func() { w.Run(ctx); ended.Store(true) }()
	w.end = func() {
		cancel()
		synctest.Wait()
		if !ended.Load() {
			t.Error("the keeper does not end")
		}
	}
	settle()
	return w
}

// silence is a kernel that logs nothing.
type silence struct{}

func (silence) Run(ctx context.Context, _ func(nflog.Packet), _ func(int)) error {
	<-ctx.Done()
	return ctx.Err()
}

func (silence) Close() {}

// settle waits until nothing goes on, but for what waits for a long time.
func settle() {
	time.Sleep(3 * retry)
	synctest.Wait()
}

// holds says whether the kernel holds what the Model says, as one finds who knows of neither.
func (w *world) holds() bool {
	count, err := ruleset.New(w.kernel).SetPolicies(w.model.Facts(), ranges)
	return err == nil && count == diff.Count{}
}

func (w *world) hasTable() bool {
	return w.kernel.Each(ruleset.PolicyTable, &nft.Set{Name: "judged4"}, func(nft.Element) {}) == nil
}

func (w *world) marked() bool {
	_, err := os.Stat(w.Closed)
	return err == nil
}

func pod(name, node, ip string, labels map[string]string) *corev1.Pod {
	p := &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Namespace: "x", Name: name, UID: "uid-1", Labels: labels}, Spec: corev1.PodSpec{NodeName: node}}
	if ip != "" {
		p.Status = corev1.PodStatus{PodIP: ip, PodIPs: []corev1.PodIP{{IP: ip}}}
	}
	return p
}

func denyAll(name string, subject map[string]string) *networkingv1.NetworkPolicy {
	return &networkingv1.NetworkPolicy{ObjectMeta: metav1.ObjectMeta{Namespace: "x", Name: name},
		Spec: networkingv1.NetworkPolicySpec{PodSelector: metav1.LabelSelector{MatchLabels: subject}, PolicyTypes: []networkingv1.PolicyType{"Ingress"}}}
}

func lease(name, ip string) Lease {
	return Lease{Pod: service.Name{Namespace: "x", Name: name}, UID: "uid-1", Addrs: []netip.Addr{netip.MustParseAddr(ip)}}
}

func (w *world) await(l Lease) error {
	ctx, cancel := context.WithTimeout(context.Background(), time.Second)
	defer cancel()
	return w.Await(ctx, l)
}

func TestWithoutPolicies(t *testing.T) {
	closed := filepath.Join(t.TempDir(), "policies")
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, nft.NewFake(), closed, nil, pod("a", "here", "10.244.1.2", nil))
		defer w.end()
		if free, known := w.Free(); free != nil || !known {
			t.Errorf("free %v, known %v: without policies all are", free, known)
		}
		if err := w.await(lease("new", "10.244.1.9")); err != nil {
			t.Errorf("a pod waits for no policies: %v", err)
		}
		for _, a := range w.api.Actions() {
			if a.GetResource().Resource != "networkpolicies" {
				t.Errorf("without policies the keeper asks for %s", a.GetResource().Resource)
			}
		}
		if len(w.given) > 0 || w.marked() {
			t.Errorf("given %v, marked %v", w.given, w.marked())
		}
	})
}

func TestPolicies(t *testing.T) {
	closed := filepath.Join(t.TempDir(), "policies")
	synctest.Test(t, func(t *testing.T) {
		kernel := nft.NewFake()
		w := newWorld(t, kernel, closed, nil, pod("a", "here", "10.244.1.2", map[string]string{"app": "a"}), pod("b", "here", "10.244.1.3", nil),
			pod("far", "there", "10.244.2.2", nil), pod("early", "here", "", map[string]string{"app": "a"}), denyAll("deny", map[string]string{"app": "a"}))
		free, known := w.Free()
		if !known || len(free) != 1 || !free[netip.MustParseAddr("10.244.1.3")] || !w.holds() || !w.marked() || !w.On() {
			t.Errorf("free %v, known %v, the kernel holds it %v, marked %v", free, known, w.holds(), w.marked())
		}
		// One that the API knows without an address, one that it tells of while ADD waits, and one that it does not know.
		if err := w.await(lease("early", "10.244.1.4")); err != nil {
			t.Error(err)
		}
		if a := w.held[netip.MustParseAddr("10.244.1.4")]; a.Isolated[0] == 0 {
			t.Errorf("an early pod is %+v", a)
		}
		late := make(chan error)
		go func() { late <- w.await(lease("late", "10.244.1.5")) }()
		synctest.Wait()
		if _, err := w.api.CoreV1().Pods("x").Create(t.Context(), pod("late", "here", "", nil), metav1.CreateOptions{}); err != nil {
			t.Fatal(err)
		}
		if err := <-late; err != nil {
			t.Error(err)
		}
		if err := w.await(lease("never", "10.244.1.6")); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("a pod that the API does not know: %v", err)
		}
		// A sandbox that was made anew has another address than the API knows.
		if err := w.await(lease("b", "10.244.1.7")); err != nil || w.held[netip.MustParseAddr("10.244.1.3")].Own {
			t.Errorf("a pod with another address: %v, %v", err, w.held)
		}
		// Another agent takes over, and cannot see the API: what is held stays, pods stay as they are, and none is told to be done.
		w.end()
		before, _ := kernel.Generation()
		next := newWorld(t, kernel, closed, errors.New("no"), denyAll("deny", nil))
		if _, known := next.Free(); known || !next.marked() {
			t.Errorf("known %v, marked %v", known, next.marked())
		}
		if err := next.await(lease("a", "10.244.1.2")); err == nil || !strings.Contains(err.Error(), "not told this node of its policies") {
			t.Errorf("a pod is told: %v", err)
		}
		if known, problem := next.Status(); known || problem == "" {
			t.Errorf("known %v, problem %q", known, problem)
		}
		if after, _ := kernel.Generation(); after != before {
			t.Error("an agent that knows nothing changes the kernel")
		}
		next.end()
	})
}

func TestPoliciesComeAndGo(t *testing.T) {
	closed := filepath.Join(t.TempDir(), "policies")
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, nft.NewFake(), closed, nil, pod("a", "here", "10.244.1.2", nil))
		defer w.end()
		np := w.api.NetworkingV1().NetworkPolicies("x")
		for range 2 {
			if _, err := np.Create(t.Context(), denyAll("deny", nil), metav1.CreateOptions{}); err != nil {
				t.Fatal(err)
			}
			settle()
			if free, _ := w.Free(); free == nil || len(free) > 0 || !w.holds() || !w.marked() {
				t.Errorf("with a policy: free %v, the kernel holds it %v, marked %v", free, w.holds(), w.marked())
			}
			if err := w.kernel.Commit(nft.Transaction{Table: ruleset.PolicyTable, Delete: true}); err != nil {
				t.Fatal(err)
			}
			time.Sleep(w.Resync)
			settle()
			if !w.holds() {
				t.Error("what somebody took away is not put back")
			}
			if err := np.Delete(t.Context(), "deny", metav1.DeleteOptions{}); err != nil {
				t.Fatal(err)
			}
			settle()
			if w.hasTable() {
				t.Error("there is a table")
			}
			if free, known := w.Free(); free != nil || !known || w.marked() || w.On() {
				t.Errorf("without policies: free %v, known %v, marked %v", free, known, w.marked())
			}
		}
	})
}

// denyNodes denies pods what they send to nodes.
func denyNodes(name string) *cnp.ClusterNetworkPolicy {
	return &cnp.ClusterNetworkPolicy{ObjectMeta: metav1.ObjectMeta{Name: name}, Spec: cnp.ClusterNetworkPolicySpec{Tier: cnp.AdminTier,
		Subject: cnp.Subject{Namespaces: &metav1.LabelSelector{}}, Egress: []cnp.EgressRule{{Action: cnp.Deny, To: []cnp.EgressPeer{{Nodes: &metav1.LabelSelector{}}}}}}}
}

// TestClusterPolicies: pods under a ClusterNetworkPolicy alone are not free, and it is not known which policies there are until those are.
func TestClusterPolicies(t *testing.T) {
	closed := filepath.Join(t.TempDir(), "policies")
	synctest.Test(t, func(t *testing.T) {
		source, kernel := cachetesting.NewFakeControllerSource(), nft.NewFake()
		defer source.Shutdown()
		node := &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: "there"}, Status: corev1.NodeStatus{Addresses: []corev1.NodeAddress{{Type: corev1.NodeInternalIP, Address: "192.0.2.7"}}}}
		w := newWorldWith(t, kernel, closed, nil, source, pod("a", "here", "10.244.1.2", nil), node)
		if free, known := w.Free(); free != nil || !known {
			t.Errorf("free %v, known %v: without policies all are", free, known)
		}
		source.Add(denyNodes("deny"))
		settle()
		if free, known := w.Free(); free == nil || len(free) > 0 || !known || !w.holds() || !w.marked() {
			t.Errorf("free %v, known %v, the kernel holds it %v, marked %v", free, known, w.holds(), w.marked())
		}
		v := w.model.Facts().Judge(policy.Egress, policy.Packet{From: netip.MustParseAddr("10.244.1.2"), To: netip.MustParseAddr("192.0.2.7"), Protocol: service.TCP, Port: 1})
		if v.Allowed {
			t.Errorf("a node is reached: %+v", v)
		}
		w.end()

		before, _ := kernel.Generation()
		next := newWorldWith(t, kernel, closed, nil, nil, pod("a", "here", "10.244.1.2", nil)) // a cluster without the kind
		if _, known := next.Free(); !known || next.marked() {
			t.Errorf("known %v, marked %v: without the kind there are no such policies", known, next.marked())
		}
		next.end()
		if after, _ := kernel.Generation(); after == before {
			t.Error("the table stays")
		}
	})
}

// TestClusterPoliciesNotSeen: while the API does not say which ClusterNetworkPolicies there are, what the kernel holds stays.
func TestClusterPoliciesNotSeen(t *testing.T) {
	closed := filepath.Join(t.TempDir(), "policies")
	synctest.Test(t, func(t *testing.T) {
		source, kernel := cachetesting.NewFakeControllerSource(), nft.NewFake()
		defer source.Shutdown()
		source.Add(denyNodes("deny"))
		source.ListError = errors.New("no")
		w := newWorldWith(t, kernel, closed, nil, source, pod("a", "here", "10.244.1.2", nil), denyAll("deny", nil))
		defer w.end()
		if _, known := w.Free(); known || w.hasTable() {
			t.Errorf("known %v, a table %v", known, w.hasTable())
		}
		if known, problem := w.Status(); known || !strings.Contains(problem, "no") {
			t.Errorf("known %v, problem %q", known, problem)
		}
	})
}
