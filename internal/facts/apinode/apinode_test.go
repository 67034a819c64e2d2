package apinode_test

import (
	"fmt"
	"testing"

	corev1 "k8s.io/api/core/v1"

	"github.com/fathom-network/fathom/internal/facts/apinode"
)

func TestAddresses(t *testing.T) {
	n := &corev1.Node{}
	n.Status.Addresses = []corev1.NodeAddress{
		{Type: corev1.NodeHostName, Address: "a"},
		{Type: corev1.NodeInternalIP, Address: "fd00::2"},
		{Type: corev1.NodeInternalIP, Address: "10.201.1.2"},
		{Type: corev1.NodeExternalIP, Address: "10.201.1.2"},
		{Type: corev1.NodeExternalIP, Address: "198.51.100.2"},
		{Type: corev1.NodeInternalIP, Address: "nonsense"},
	}
	if got, want := fmt.Sprint(apinode.Internal(n)), "[fd00::2 10.201.1.2 nonsense]"; got != want {
		t.Errorf("internal: %s, want %s", got, want)
	}
	if got, want := fmt.Sprint(apinode.InternalAddrs(n)), "[10.201.1.2 fd00::2]"; got != want {
		t.Errorf("internal, read: %s, want %s", got, want)
	}
	if got, want := fmt.Sprint(apinode.Addrs(n)), "[10.201.1.2 198.51.100.2 fd00::2]"; got != want {
		t.Errorf("own: %s, want %s", got, want)
	}
}

func TestPodCIDRs(t *testing.T) {
	for want, spec := range map[string]corev1.NodeSpec{
		"[]":                          {},
		"[10.244.1.0/24]":             {PodCIDR: "10.244.1.0/24"},
		"[10.244.1.0/24 fd00:1::/64]": {PodCIDR: "10.244.1.0/24", PodCIDRs: []string{"10.244.1.0/24", "fd00:1::/64"}},
	} {
		if got := fmt.Sprint(apinode.PodCIDRs(&corev1.Node{Spec: spec})); got != want {
			t.Errorf("%+v: %s, want %s", spec, got, want)
		}
	}
}
