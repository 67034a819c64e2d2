package verify

import (
	"net/netip"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/fathom-network/fathom/internal/facts/answer"
)

func TestAddresses(t *testing.T) {
	pod := func(name, address string) *corev1.Pod {
		return &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Namespace: "default", Name: name, UID: "u-1"},
			Spec: corev1.PodSpec{NodeName: "a"}, Status: corev1.PodStatus{PodIPs: []corev1.PodIP{{IP: address}}}}
	}
	lease := func(container, name, address string) answer.Lease {
		return answer.Lease{ContainerID: container, Namespace: "default", Pod: name, UID: "u-1", Addresses: []netip.Addr{netip.MustParseAddr(address)}}
	}
	for _, tc := range []struct {
		name   string
		pods   []*corev1.Pod
		leases []answer.Lease
		want   []string
	}{
		{"as it should be", []*corev1.Pod{pod("web", "10.0.0.2")}, []answer.Lease{lease("1", "web", "10.0.0.2")}, nil},
		{"no lease", []*corev1.Pod{pod("web", "10.0.0.2")}, nil, []string{"has 10.0.0.2 without a lease"}},
		{"another address", []*corev1.Pod{pod("web", "10.0.0.2")}, []answer.Lease{lease("1", "web", "10.0.0.3")},
			[]string{"has 10.0.0.2 in the API, but its lease is for 10.0.0.3"}},
		{"a sandbox that is gone", []*corev1.Pod{pod("web", "10.0.0.2")}, []answer.Lease{lease("2", "web", "10.0.0.2"), lease("1", "web", "10.0.0.3")},
			[]string{"holds 10.0.0.2, and additionally 10.0.0.3"}},
		{"two of nobody", nil, []answer.Lease{lease("1", "web", "10.0.0.2"), lease("2", "web", "10.0.0.3")},
			[]string{"10.0.0.2 is held for pod default/web, which does not exist", "10.0.0.3 is held for pod default/web, which does not exist"}},
		{"one address twice", []*corev1.Pod{pod("web", "10.0.0.2"), pod("db", "10.0.0.2")},
			[]answer.Lease{lease("1", "web", "10.0.0.2"), lease("2", "db", "10.0.0.2")}, []string{"10.0.0.2 is held for default/web and for default/db"}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			d := differ{node: "a"}
			d.addresses(tc.pods, answer.Node{Leases: tc.leases})
			var got []string
			for _, f := range d.found {
				got = append(got, f.Text)
			}
			if len(got) != len(tc.want) {
				t.Fatalf("found %q, want %q", got, tc.want)
			}
			for i := range got {
				if !strings.Contains(got[i], tc.want[i]) {
					t.Errorf("found %q, want %q", got[i], tc.want[i])
				}
			}
		})
	}
}
