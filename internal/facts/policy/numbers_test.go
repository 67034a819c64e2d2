package policy

import (
	"fmt"
	"net/netip"
	"testing"

	"github.com/fathom-network/fathom/internal/facts/service"
)

// TestNumbersRunOut: what there is no number left for is closed. A pod without an identity is no peer, and pods without a class
// may do nothing, until there is room.
func TestNumbersRunOut(t *testing.T) {
	m := NewClusterModel()
	m.identityNumbers.all, m.classNumbers.all = 3, 1
	addr := func(i int) netip.Addr { return netip.AddrFrom4([4]byte{10, 0, 0, byte(i)}) }
	for i := range 4 { // each in a namespace of its own, in which a policy lets all pods in
		namespace := fmt.Sprintf("n%d", i)
		m.SetPolicy(&Policy{ID: ID{"NetworkPolicy", service.Name{Namespace: namespace, Name: "in"}}, Isolates: [2]bool{Ingress: true},
			Rules: [2][]Rule{Ingress: {{AnyPort: true, Peers: []Peer{{Pods: &Pods{}}}}}}})
		m.SetPod(Pod{Name: service.Name{Namespace: namespace, Name: "p"}, Addrs: []netip.Addr{addr(i)}})
	}
	count := func() (allowed int) {
		for from := range 4 {
			for to := range 4 {
				if from != to && m.Facts().Judge(Ingress, Packet{From: addr(from), To: addr(to), Protocol: service.TCP, Port: 80}).Allowed {
					allowed++
				}
			}
		}
		return allowed
	}
	if got := count(); got != 2 { // of three pods with an identity, two are not the one with a class
		t.Errorf("%d connections are allowed, want 2", got)
	}
	m.identityNumbers.all, m.classNumbers.all = 100, 100
	for i := range 4 {
		m.DeletePod(service.Name{Namespace: fmt.Sprintf("n%d", i), Name: "p"})
	}
	for i := range 4 {
		m.SetPod(Pod{Name: service.Name{Namespace: fmt.Sprintf("n%d", i), Name: "p"}, Addrs: []netip.Addr{addr(i)}})
	}
	if got := count(); got != 12 {
		t.Errorf("%d connections are allowed when there is room, want 12", got)
	}
}

// TestOwn: classes are those of the node's own pods, identities are everyone's.
func TestOwn(t *testing.T) {
	m := NewModel("here")
	m.SetPolicy(&Policy{ID: ID{"NetworkPolicy", service.Name{Namespace: "n", Name: "deny"}}, Isolates: [2]bool{true, true}})
	set := func(name, node string, last byte) netip.Addr {
		a := netip.AddrFrom4([4]byte{10, 0, 0, last})
		m.SetPod(Pod{Name: service.Name{Namespace: "n", Name: name}, Node: node, Addrs: []netip.Addr{a}})
		return a
	}
	there := set("there", "elsewhere", 1)
	if f := m.Changes(); f.Addrs[there].Own || f.Addrs[there].Isolated != [2]Number{} || f.Addrs[there].Peer == 0 || len(f.Classes) > 0 {
		t.Errorf("of a pod elsewhere there is %+v", f)
	}
	here := set("here", "here", 2)
	f := m.Changes()
	if a := f.Addrs[here]; !a.Own || a.Isolated[Ingress] == 0 || a.Isolated[Egress] == 0 || a.Isolated[Ingress] == a.Isolated[Egress] || len(f.Classes) != 2 || len(f.Addrs) != 1 {
		t.Errorf("of a pod here there is %+v", f)
	}
	set("here", "", 2) // as one that is not scheduled
	if f := m.Changes(); f.Addrs[here].Own || len(f.Classes) != 2 || f.Classes[f.Addrs[here].Isolated[Ingress]] != nil {
		t.Errorf("of a pod that is not here any more there is %+v", f)
	}
}

// TestNumbersRunOutInTiers: under a policy of Admin, a pod without an identity is reached by nobody (of three the first has one), and one without a class does nothing.
func TestNumbersRunOutInTiers(t *testing.T) {
	addr := func(i int) netip.Addr { return netip.AddrFrom4([4]byte{10, 0, 0, byte(i)}) }
	for _, test := range []struct {
		identities, classes uint32
		allowed             int
	}{{100, 100, 4}, {1, 100, 2}, {100, 0, 0}} {
		m := NewClusterModel()
		m.identityNumbers.all, m.classNumbers.all = test.identities, test.classes
		p := &Policy{ID: ID{"ClusterNetworkPolicy", service.Name{Name: "deny"}}, Tier: Admin}
		p.Rules[Egress] = []Rule{{Action: Deny, AnyPort: true, Peers: []Peer{{Block: Block{Prefix: netip.MustParsePrefix("10.0.0.1/32")}}}}}
		m.SetPolicy(p)
		for i := range 3 {
			m.SetPod(Pod{Name: service.Name{Namespace: fmt.Sprintf("n%d", i), Name: "p"}, Addrs: []netip.Addr{addr(i)}})
		}
		allowed := 0
		for from := range 3 {
			for to := range 3 {
				v := m.Facts().Judge(Egress, Packet{From: addr(from), To: addr(to), Protocol: service.TCP, Port: 80})
				if from != to && v.Allowed {
					allowed++
				}
				if all := m.Facts().side(Egress, addr(from), addr(to)); from != to && all.allows(Packet{Protocol: service.TCP, Port: 80}) != v.Allowed {
					t.Errorf("of %d and %d it is %v that it is allowed, and of all that is allowed it is not", from, to, v.Allowed)
				}
			}
		}
		if allowed != test.allowed {
			t.Errorf("%d identities and %d classes: %d connections are allowed, want %d", test.identities, test.classes, allowed, test.allowed)
		}
	}
}
