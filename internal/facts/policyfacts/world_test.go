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

	"github.com/fathom-network/fathom/internal/facts/policy"
	"github.com/fathom-network/fathom/internal/facts/policyfacts"
	"github.com/fathom-network/fathom/internal/facts/service"
)

// world is a cluster of namespaces, pods and policies, as objects of the API.
type world struct {
	namespaces map[string]*corev1.Namespace
	pods       map[string]*corev1.Pod // by namespace/name
	policies   map[string]*networkingv1.NetworkPolicy
}

func newWorld() *world {
	return &world{map[string]*corev1.Namespace{}, map[string]*corev1.Pod{}, map[string]*networkingv1.NetworkPolicy{}}
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

// model is what follows, made from nothing.
func (w *world) model() *policy.Model {
	m := policy.NewClusterModel()
	for _, n := range w.namespaces {
		m.SetNamespace(n.Name, n.Labels)
	}
	for _, p := range w.policies {
		m.SetPolicy(policyfacts.NetworkPolicy(p))
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
		case v.Isolated:
			reasons = append(reasons, v.By.String())
		}
	}
	return true, strings.Join(reasons, ", ")
}

func addr(s string) netip.Addr { return netip.MustParseAddr(s) }
