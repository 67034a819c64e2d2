package main

import (
	"fmt"
	"net/netip"
	"slices"

	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/intstr"
)

// The crowd that policies are about: 200 pods in 50 namespaces, each of which has a pod of each of four apps. So a pod is selected by five of
// 1,000 policies, and by fifty of 10,000.
const (
	namespaces, apps, allPods = 50, 4, 200
	blocksFrom                = 1000    // policies from this one on have ranges of addresses
	allBlocks                 = 100_000 // of all 10,000 policies
)

// sizes are how many policies there may be. Each policy has the smallest that it belongs to as a label.
var sizes = []int{10, 100, 1000, 10_000}

const sizeLabel, wayLabel, latencyLabel = "size", "way", "latency"

// What the pods that really run are, by their number.
const (
	client, nearServer, farServer = 0, 100, 50 // in one namespace: those that are measured
	asker, answerer               = 1, 101     // in another one: those that wait for changes
)

func isReal(i int) bool {
	return slices.Contains([]int{client, nearServer, farServer, asker, answerer}, i)
}

// nodeOf is the node of a pod, 1 or 2.
func nodeOf(i int) int { return 1 + i/namespaces%2 }

func namespace(i int) string { return fmt.Sprintf("n%d", i%namespaces) }
func app(i int) string       { return fmt.Sprintf("a%d", i/namespaces%apps) }
func podName(way, i int) string {
	return fmt.Sprintf("w%d-p%d", way, i)
}

// fakeAddr is the address of a pod that does not run, beyond those that the plugin gives first.
func fakeAddr(i int) netip.Addr {
	a := podRange(nodeOf(i)).Addr().As4()
	a[3] = byte(20 + i)
	return netip.AddrFrom4(a)
}

func crowdPod(way, i int) *corev1.Pod {
	p := &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Namespace: namespace(i), Name: podName(way, i), Labels: map[string]string{"app": app(i), wayLabel: fmt.Sprint("w", way)}},
		Spec: corev1.PodSpec{NodeName: nodeName(way, nodeOf(i)), Containers: []corev1.Container{{Name: "c", Image: "x"}}}}
	switch i {
	case asker:
		p.Labels[latencyLabel] = yes
	case answerer:
		p.Labels[latencyLabel] = "server"
	}
	return p
}

func selector(key, value string) *metav1.LabelSelector {
	return &metav1.LabelSelector{MatchLabels: map[string]string{key: value}}
}

// crowdPolicies are all policies. The first allows whatever the pods that are measured do.
func crowdPolicies() []*networkingv1.NetworkPolicy {
	var all []*networkingv1.NetworkPolicy
	block := 0
	for i := range sizes[len(sizes)-1] {
		size := sizes[slices.IndexFunc(sizes, func(n int) bool { return i < n })]
		p := &networkingv1.NetworkPolicy{ObjectMeta: metav1.ObjectMeta{Namespace: namespace(i), Name: fmt.Sprintf("p%d", i), Labels: map[string]string{sizeLabel: fmt.Sprint(size)}}}
		all = append(all, p)
		own := []networkingv1.NetworkPolicyPeer{{PodSelector: &metav1.LabelSelector{}}}
		if i == 0 {
			p.Spec = networkingv1.NetworkPolicySpec{PolicyTypes: []networkingv1.PolicyType{"Ingress", "Egress"},
				Ingress: []networkingv1.NetworkPolicyIngressRule{{From: own}}, Egress: []networkingv1.NetworkPolicyEgressRule{{To: own}}}
			continue
		}
		p.Spec.PodSelector = *selector("app", app(i))
		p.Spec.PolicyTypes = []networkingv1.PolicyType{"Ingress"}
		if i%5 == 0 {
			p.Spec.PolicyTypes = append(p.Spec.PolicyTypes, "Egress")
		}
		p.Spec.Ingress = []networkingv1.NetworkPolicyIngressRule{
			{From: []networkingv1.NetworkPolicyPeer{{PodSelector: selector("app", app(i))}}, Ports: []networkingv1.NetworkPolicyPort{port("TCP", 80, 0), port("TCP", 1000+i, 1010+i)}},
			{From: []networkingv1.NetworkPolicyPeer{{NamespaceSelector: &metav1.LabelSelector{}, PodSelector: selector("app", fmt.Sprintf("a%d", i%7))}}, Ports: []networkingv1.NetworkPolicyPort{port("UDP", 53, 0)}},
		}
		if i < blocksFrom {
			continue
		}
		var from []networkingv1.NetworkPolicyPeer
		for last := (i + 1 - blocksFrom) * allBlocks / (sizes[len(sizes)-1] - blocksFrom); block < last; block++ {
			a := netip.AddrFrom4([4]byte{172, byte(16 + block>>15), byte(block >> 7), byte(block << 1)})
			from = append(from, networkingv1.NetworkPolicyPeer{IPBlock: &networkingv1.IPBlock{CIDR: netip.PrefixFrom(a, 32).String()}})
		}
		p.Spec.Ingress = append(p.Spec.Ingress, networkingv1.NetworkPolicyIngressRule{From: from})
	}
	return all
}

// Values of the label by which a pod may reach the one that answers, and of one by which nothing may.
const yes, no = "yes", "no"

// latencyPolicy allows pods with a label to reach a way's pod that answers.
func latencyPolicy(way int, value string) *networkingv1.NetworkPolicy {
	return &networkingv1.NetworkPolicy{ObjectMeta: metav1.ObjectMeta{Namespace: namespace(answerer), Name: fmt.Sprintf("latency-w%d", way), Labels: map[string]string{sizeLabel: fmt.Sprint("w", way)}},
		Spec: networkingv1.NetworkPolicySpec{PodSelector: *selector(latencyLabel, "server"), PolicyTypes: []networkingv1.PolicyType{"Ingress"},
			Ingress: []networkingv1.NetworkPolicyIngressRule{{From: []networkingv1.NetworkPolicyPeer{{PodSelector: selector(latencyLabel, value)}}}}}}
}

func port(protocol corev1.Protocol, from, to int) networkingv1.NetworkPolicyPort {
	first, end := intstr.FromInt32(int32(from)), int32(to)
	p := networkingv1.NetworkPolicyPort{Protocol: &protocol, Port: &first}
	if to != 0 {
		p.EndPort = &end
	}
	return p
}
