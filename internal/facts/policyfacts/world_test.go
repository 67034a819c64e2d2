package policyfacts_test

import (
	"fmt"
	"net/netip"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/yaml"

	cnp "github.com/fathom-network/fathom/api/clusternetworkpolicy/v1beta1"
	"github.com/fathom-network/fathom/internal/facts/policy"
	"github.com/fathom-network/fathom/internal/facts/policyfacts"
	"github.com/fathom-network/fathom/internal/facts/service"
)

// world is a cluster of namespaces, pods and policies, as objects of the API.
type world struct {
	namespaces  map[string]*corev1.Namespace
	pods        map[string]*corev1.Pod // by namespace/name
	policies    map[string]*networkingv1.NetworkPolicy
	nodes       map[string]*corev1.Node
	clusterwide map[string]*cnp.ClusterNetworkPolicy
}

func newWorld() *world {
	return &world{map[string]*corev1.Namespace{}, map[string]*corev1.Pod{}, map[string]*networkingv1.NetworkPolicy{},
		map[string]*corev1.Node{}, map[string]*cnp.ClusterNetworkPolicy{}}
}

func (w *world) namespace(name string, labels map[string]string) {
	w.namespaces[name] = &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: name, Labels: labels}}
}

func (w *world) pod(name, ip string, labels map[string]string, ports ...corev1.ContainerPort) *corev1.Pod {
	namespace, short, _ := strings.Cut(name, "/")
	p := &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Namespace: namespace, Name: short, Labels: labels},
		Spec:   corev1.PodSpec{NodeName: "node1", Containers: []corev1.Container{{Name: "c", Ports: ports}}},
		Status: corev1.PodStatus{Phase: corev1.PodRunning, PodIP: ip, PodIPs: []corev1.PodIP{{IP: ip}}}}
	w.pods[name] = p
	return p
}

// policy takes the spec of a policy in YAML.
func (w *world) policy(t *testing.T, name, spec string) {
	t.Helper()
	namespace, short, _ := strings.Cut(name, "/")
	p := &networkingv1.NetworkPolicy{ObjectMeta: metav1.ObjectMeta{Namespace: namespace, Name: short}}
	if err := yaml.UnmarshalStrict([]byte(spec), &p.Spec); err != nil {
		t.Fatal(err)
	}
	w.policies[name] = p
}

// clusterPolicy takes the spec of a ClusterNetworkPolicy in YAML.
func (w *world) clusterPolicy(t *testing.T, name, spec string) {
	t.Helper()
	p := &cnp.ClusterNetworkPolicy{ObjectMeta: metav1.ObjectMeta{Name: name}}
	if err := yaml.UnmarshalStrict([]byte(spec), &p.Spec); err != nil {
		t.Fatal(err)
	}
	w.clusterwide[name] = p
}

func (w *world) node(name string, labels map[string]string, addrs ...string) {
	n := &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: name, Labels: labels}}
	for _, a := range addrs {
		n.Status.Addresses = append(n.Status.Addresses, corev1.NodeAddress{Type: corev1.NodeInternalIP, Address: a})
	}
	w.nodes[name] = n
}

// model is what follows, made from nothing.
func (w *world) model() *policy.Model {
	m := policy.NewClusterModel()
	for _, n := range w.namespaces {
		m.SetNamespace(n.Name, n.Labels)
	}
	for _, p := range w.policies {
		m.SetPolicy(policyfacts.NetworkPolicy(p))
	}
	for _, p := range w.clusterwide {
		m.SetPolicy(policyfacts.ClusterNetworkPolicy(p))
	}
	for _, n := range w.nodes {
		m.SetNode(policyfacts.Node(n))
	}
	for _, p := range w.pods {
		setPod(m, p)
	}
	return m
}

func setPod(m *policy.Model, o *corev1.Pod) {
	if p, ok := policyfacts.Pod(o); ok {
		m.SetPod(p)
	} else {
		m.DeletePod(service.Name{Namespace: o.Namespace, Name: o.Name})
	}
}

// judge says what becomes of a connection, "allowed" or the direction in which it is denied, and why.
func judge(f policy.Facts, p policy.Packet) (allowed bool, why string) {
	var reasons []string
	for _, d := range []policy.Direction{policy.Egress, policy.Ingress} {
		v := f.Judge(d, p)
		switch {
		case !v.Allowed:
			return false, fmt.Sprintf("%s: %v", d, v.Policies)
		case v.Isolated: // by a rule of it
			reasons = append(reasons, v.By.String())
		}
	}
	return true, strings.Join(reasons, ", ")
}

// answer is judge as the tables write it: "-" if no rule decides, and after "no" the direction and the rule of a tier that denies it.
func answer(f policy.Facts, p policy.Packet) string {
	for _, d := range []policy.Direction{policy.Egress, policy.Ingress} {
		if v := f.Judge(d, p); !v.Allowed {
			if v.By == (policy.Reason{}) {
				return "no " + d.String()
			}
			return fmt.Sprintf("no %s %s", d, v.By)
		}
	}
	if _, why := judge(f, p); why != "" {
		return why
	}
	return "-"
}

func addr(s string) netip.Addr { return netip.MustParseAddr(s) }
