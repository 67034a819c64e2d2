package fastpath

import (
	"fmt"
	"math/rand/v2"
	"net/netip"
	"testing"

	"github.com/fathom-network/fathom/internal/facts/policy"
	"github.com/fathom-network/fathom/internal/facts/service"
	"github.com/fathom-network/fathom/internal/kernel/bpf/pin"
)

// allows is what policies.h does, with the same look-ups.
func (e elements) allows(from, to netip.Addr, port uint16, ownFrom, ownTo bool) bool {
	a, b := e.identities[pin.KeyOf(from)], e.identities[pin.KeyOf(to)]
	if ownFrom && (a.Judged == 0 || a.Egress != 0 && !e.classAllows(a.Egress, b.Number, to, port)) {
		return false
	}
	return !ownTo || b.Judged != 0 && (b.Ingress == 0 || e.classAllows(b.Ingress, a.Number, from, port))
}

func (e elements) classAllows(class, number uint16, peer netip.Addr, port uint16) bool {
	allowed := func(peer uint32) bool {
		for bits := 16; bits >= 0; bits-- {
			masked := port &^ uint16(1<<(16-bits)-1)
			if e.allowed[allowedKey{Length: 48 + uint32(bits), Peer: peer, Class: class, Port: [2]byte{byte(masked >> 8), byte(masked)}}] != 0 {
				return true
			}
		}
		return false
	}
	if allowed(uint32(number)) || number != 0 && allowed(0) {
		return true
	}
	for bits := peer.BitLen(); bits >= 0; bits-- {
		p, _ := peer.Prefix(bits)
		key := blockKey{Length: 32 + uint32(bits), Class: uint32(class), Address: pin.KeyOf(p.Addr())}
		if peer.Is4() {
			key.Length += 96
		}
		if as := e.blocks[key]; as != 0 {
			return allowed(as)
		}
	}
	return false
}

// Town is a Model of random policies and pods, of which those of the node "here" are own.
type Town struct {
	*policy.Model
	*rand.Rand
	Addrs []netip.Addr
}

func NewTown(r *rand.Rand, tiers bool) *Town {
	t := &Town{Model: policy.NewModel("here"), Rand: r}
	for i := range 3 {
		t.SetNamespace(fmt.Sprintf("n%d", i), map[string]string{"team": fmt.Sprintf("t%d", i%2)})
	}
	for i := range 12 {
		t.pod(i)
	}
	for i := range 6 {
		t.policy(i, false)
	}
	if tiers {
		t.policy(6, true)
	}
	for _, s := range []string{"10.244.9.9", "203.0.113.7", "203.0.113.130", "fd00::9", "2001:db8::1"} {
		t.Addrs = append(t.Addrs, netip.MustParseAddr(s))
	}
	return t
}

func (t *Town) pod(i int) {
	addrs := []netip.Addr{netip.AddrFrom4([4]byte{10, 244, byte(i % 2), byte(i + 2)}), netip.MustParseAddr(fmt.Sprintf("fd00:10:244:%d::%d", i%2, i+2))}
	t.SetPod(policy.Pod{Name: service.Name{Namespace: fmt.Sprintf("n%d", i%3), Name: fmt.Sprintf("p%d", i)}, Node: []string{"here", "there"}[i%2],
		Labels: map[string]string{"app": fmt.Sprintf("a%d", t.IntN(4))}, Addrs: addrs, Ports: []policy.PodPort{{Name: "http", Protocol: service.TCP, Number: uint16(8080 + i%2)}}})
	if len(t.Addrs) < 24 {
		t.Addrs = append(t.Addrs, addrs...)
	}
}

func (t *Town) selector() policy.Selector {
	if t.IntN(3) == 0 {
		return nil
	}
	return policy.Selector{{Key: "app", Operator: policy.In, Values: []string{fmt.Sprintf("a%d", t.IntN(4))}}}
}

func (t *Town) policy(i int, tier bool) {
	p := &policy.Policy{ID: policy.ID{Kind: "NetworkPolicy", Name: service.Name{Namespace: fmt.Sprintf("n%d", i%3), Name: fmt.Sprintf("q%d", i)}}, Subject: t.selector(),
		Isolates: [2]bool{t.IntN(2) == 0, t.IntN(2) == 0}, Audit: t.IntN(4) == 0}
	if tier {
		p.Audit = false
		p.ID, p.Tier, p.Isolates = policy.ID{Kind: "ClusterNetworkPolicy", Name: service.Name{Name: "c"}}, policy.Admin, [2]bool{}
	}
	for _, d := range policy.Directions {
		for n := range t.IntN(4) {
			r := policy.Rule{Position: fmt.Sprintf("spec.%s[%d]", d, n), AnyPort: t.IntN(4) == 0, AnyPeer: !tier && t.IntN(5) == 0}
			for !r.AnyPort && len(r.Ports) < 2 {
				from := uint16(t.IntN(1 << 16))
				switch t.IntN(5) {
				case 0:
					r.Ports = append(r.Ports, policy.Port{Protocol: service.TCP, Name: "http"})
				case 1:
					r.Ports = append(r.Ports, policy.Port{Protocol: service.UDP, From: 1, To: 65535})
				case 2:
					r.Ports = append(r.Ports, policy.Port{Protocol: service.TCP, From: 0, To: 65535})
				case 3:
					r.Ports = append(r.Ports, policy.Port{Protocol: service.TCP, From: from, To: from + uint16(t.IntN(1<<16-int(from)))})
				default:
					r.Ports = append(r.Ports, policy.Port{Protocol: service.TCP, From: 8080, To: 8080})
				}
			}
			for !r.AnyPeer && len(r.Peers) < 2 {
				switch t.IntN(3) {
				case 0:
					r.Peers = append(r.Peers, policy.Peer{Pods: &policy.Pods{Namespace: p.Namespace, Pods: t.selector()}})
					if tier {
						r.Peers[len(r.Peers)-1].Pods = &policy.Pods{Pods: t.selector()}
					}
				case 1:
					r.Peers = append(r.Peers, policy.Peer{Pods: &policy.Pods{Namespaces: policy.Selector{{Key: "team", Operator: policy.In, Values: []string{fmt.Sprintf("t%d", t.IntN(2))}}}, Pods: t.selector()}})
				default:
					b := policy.Block{Prefix: netip.MustParsePrefix([]string{"0.0.0.0/0", "10.244.0.0/23", "203.0.113.0/24", "::/0", "fd00::/16"}[t.IntN(5)])}
					if !tier && t.IntN(2) == 0 {
						b.Except = []netip.Prefix{netip.MustParsePrefix("203.0.113.128/25"), netip.MustParsePrefix("10.244.0.4/32"), netip.MustParsePrefix("fd00:10:244:1::/64")}
					}
					r.Peers = append(r.Peers, policy.Peer{Block: b})
				}
			}
			p.Rules[d] = append(p.Rules[d], r)
		}
	}
	t.SetPolicy(p)
}

// Change changes something.
func (t *Town) Change() {
	switch n := t.IntN(12); t.IntN(4) {
	case 0:
		t.pod(n)
	case 1:
		t.policy(n%6, false)
	case 2:
		t.DeletePolicy(policy.ID{Kind: "NetworkPolicy", Name: service.Name{Namespace: fmt.Sprintf("n%d", n%3), Name: fmt.Sprintf("q%d", n)}})
	default:
		t.DeletePod(service.Name{Namespace: fmt.Sprintf("n%d", n%3), Name: fmt.Sprintf("p%d", n)})
	}
}

var somePorts = []uint16{0, 1, 80, 1023, 8080, 8081, 30000, 65534, 65535}

// TestElements: what the maps allow is what the facts do, but for pods under policies of tiers and audited ones, to whom they allow nothing.
func TestElements(t *testing.T) {
	allowed, denied := 0, 0
	for seed := range uint64(300) {
		w := NewTown(rand.New(rand.NewPCG(seed, 1)), seed%3 == 0)
		f := w.Facts()
		e := elementsOf(f)
		for _, from := range w.Addrs {
			for _, to := range w.Addrs {
				if from == to || from.Is4() != to.Is4() {
					continue
				}
				a, b := f.Addrs[from], f.Addrs[to]
				for _, port := range append(somePorts, uint16(w.IntN(1<<16))) {
					p := policy.Packet{From: from, To: to, Protocol: service.TCP, Port: port}
					want := f.Judge(policy.Egress, p).Allowed && f.Judge(policy.Ingress, p).Allowed
					if a.Tiers != [2]policy.Number{} || b.Tiers != [2]policy.Number{} || a.Audited != [2]bool{} || b.Audited != [2]bool{} {
						want = false
					}
					if got := e.allows(from, to, port, a.Own, b.Own); got != want {
						t.Fatalf("seed %d: %s to %s port %d is allowed by the maps: %v, by the facts: %v", seed, from, to, port, got, want)
					}
					if want {
						allowed++
					} else {
						denied++
					}
				}
			}
		}
	}
	if allowed < 1000 || denied < 1000 {
		t.Errorf("%d allowed, %d denied: that says little", allowed, denied)
	}
}

func TestPortPrefixes(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 2))
	for range 2000 {
		from := uint16(r.IntN(1 << 16))
		x := portRange{from, from + uint16(r.IntN(1<<16-int(from)))}
		next, list := int(x.from), x.prefixes()
		for _, p := range list {
			if at := int(p.port[0])<<8 | int(p.port[1]); at != next {
				t.Fatalf("%v: %d follows, want %d", x, at, next)
			}
			next += 1 << (16 - p.bits)
		}
		if next != int(x.to)+1 || len(list) > 30 {
			t.Errorf("%v ends before %d, of %d prefixes", x, next, len(list))
		}
	}
}
