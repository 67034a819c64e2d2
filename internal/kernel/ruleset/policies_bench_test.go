package ruleset_test

import (
	"fmt"
	"net"
	"net/netip"
	"testing"

	"github.com/fathom-network/fathom/internal/facts/policy"
	"github.com/fathom-network/fathom/internal/facts/service"
	"github.com/fathom-network/fathom/internal/kernel/link"
	kernel "github.com/fathom-network/fathom/internal/kernel/nft"
	"github.com/fathom-network/fathom/internal/kernel/ruleset"
	"github.com/fathom-network/fathom/internal/testenv"
)

// crowd is a Model of 200 pods in 50 namespaces, half of which are the node's, and of policies, each of which selects the pods of one of
// some apps in its namespace and has rules for pods, for another app's in all namespaces, and for as many ranges. change changes a pod's
// labels or a policy, and relabel has a pod another identity, which is new to all classes that allow its app.
func crowd(policies, ranges, apps int) (m *policy.Model, change, relabel func(i int)) {
	const namespaces, all = 50, 200
	m = policy.NewModel("here")
	set := func(i int) {
		namespace, own := fmt.Sprintf("n%d", i%namespaces), app(fmt.Sprintf("a%d", i/namespaces%apps))
		p := &policy.Policy{ID: policy.ID{Kind: "NetworkPolicy", Name: service.Name{Namespace: namespace, Name: fmt.Sprintf("p%d", i)}}, Subject: own, Isolates: [2]bool{true, i%5 == 0}}
		rule(p, policy.Ingress, policy.Rule{Peers: []policy.Peer{podsOf(namespace, own)}, Ports: []policy.Port{{Protocol: service.TCP, From: 80, To: 80}, {Protocol: service.TCP, From: uint16(1000 + i), To: uint16(1010 + i)}}})
		rule(p, policy.Ingress, policy.Rule{Peers: []policy.Peer{podsOf("", app(fmt.Sprintf("a%d", i%7)))}, Ports: ports(service.UDP, 53, 53)})
		if ranges > 0 {
			var blocks []policy.Peer
			for j := range ranges {
				n := i*ranges + j
				blocks = append(blocks, policy.Peer{Block: policy.Block{Prefix: netip.PrefixFrom(netip.AddrFrom4([4]byte{172, byte(n >> 15), byte(n >> 7), byte(n << 1)}), 32)}})
			}
			rule(p, policy.Ingress, policy.Rule{Peers: blocks, AnyPort: true})
		}
		m.SetPolicy(p)
	}
	pod := func(i, of int, more ...string) {
		node := "here"
		if i/namespaces%2 == 1 {
			node = "there"
		}
		labels := map[string]string{"app": fmt.Sprintf("a%d", of%apps)}
		for _, key := range more {
			labels[key] = ""
		}
		m.SetPod(policy.Pod{Name: service.Name{Namespace: fmt.Sprintf("n%d", i%namespaces), Name: fmt.Sprintf("p%d", i)}, Node: node,
			Labels: labels, Addrs: []netip.Addr{netip.AddrFrom4([4]byte{10, 244, byte(i >> 8), byte(i)})}})
	}
	for i := range policies {
		set(i)
	}
	for i := range all {
		pod(i, i/namespaces)
	}
	looks := &policy.Policy{ID: policy.ID{Kind: "NetworkPolicy", Name: service.Name{Namespace: "n0", Name: "looks"}}, Subject: policy.Selector{{Key: "seen", Operator: policy.Exists}}}
	m.SetPolicy(looks)
	change = func(i int) {
		if i%2 == 0 {
			pod(i%all, i)
		} else {
			set(i % policies)
		}
	}
	return m, change, func(i int) { pod(0, 0, []string{"seen", "other"}[i%2]) }
}

// size is that of a crowd: policies, and ranges of each.
type size struct{ policies, ranges int }

func (s size) String() string {
	return fmt.Sprintf("%d policies, %d ranges", s.policies, s.policies*s.ranges)
}

var sizes = []size{{10, 0}, {100, 0}, {1000, 0}, {10000, 10}}

func BenchmarkSetPolicies(b *testing.B) {
	for _, c := range sizes {
		b.Run(c.String(), func(b *testing.B) {
			_, r := space(b)
			for b.Loop() {
				m, _, _ := crowd(c.policies, c.ranges, 20)
				_, err := r.SetPolicies(m.Facts(), ownRanges)
				testenv.Must(b, err)
				b.StopTimer()
				testenv.Must(b, r.DeletePolicies())
				b.StartTimer()
			}
		})
	}
}

func BenchmarkChangePolicies(b *testing.B) {
	for _, c := range sizes {
		b.Run(c.String(), func(b *testing.B) {
			_, r := space(b)
			m, change, _ := crowd(c.policies, c.ranges, 20)
			_, err := r.SetPolicies(m.Facts(), ownRanges)
			testenv.Must(b, err)
			i := 0
			for b.Loop() {
				change(i)
				i++
				testenv.Must(b, r.ChangePolicies(m.Changes()))
			}
		})
	}
}

// BenchmarkPolicyRecords is what a packet costs that begins a connection, from one socket to the next past the table, where it is recorded
// and where the kernel cannot: one that is allowed, one that is dropped, one that is audited, and one to a pod that no policy is about.
func BenchmarkPolicyRecords(b *testing.B) {
	for _, silent := range []bool{true, false} {
		l := newLab(b)
		conn, err := kernel.Open(l.node.Path())
		testenv.Must(b, err)
		var is kernel.Kernel = conn
		if silent {
			is = mute{conn}
		}
		rules := ruleset.New(is)
		b.Cleanup(rules.Close)
		in := rule(named("in", app("a"), policy.Ingress), policy.Ingress, policy.Rule{Peers: []policy.Peer{podsOf("y", nil)}, AnyPort: true})
		watch := named("watch", app("b"), policy.Ingress)
		watch.Audit = true
		_, err = rules.SetPolicies(modelOf(in, watch).Facts(), ownRanges)
		testenv.Must(b, err)
		f := families[0]
		for _, c := range []struct {
			name, source, to string
			from             *link.Namespace
		}{{"accepted", f.far, f.a, l.far}, {"dropped", f.out, f.a, l.out}, {"audited", f.far, f.b, l.far}, {"free", f.a, f.far, l.a}} {
			b.Run(fmt.Sprintf("%s/%s", map[bool]string{true: "silent", false: "recorded"}[silent], c.name), func(b *testing.B) {
				testenv.Must(b, c.from.Do(func() error {
					s, err := net.ListenUDP("udp4", net.UDPAddrFromAddrPort(netip.AddrPortFrom(netip.MustParseAddr(c.source), 0)))
					if err != nil {
						return err
					}
					defer s.Close()
					to := netip.AddrPortFrom(netip.MustParseAddr(c.to), 9) // nobody answers, so it stays the first packet
					for b.Loop() {
						if _, err := s.WriteToUDPAddrPort([]byte("x"), to); err != nil {
							return err
						}
					}
					return nil
				}))
			})
		}
	}
}

func BenchmarkChangeLabel(b *testing.B) {
	for _, c := range []size{{10, 0}, {100, 0}, {1000, 0}, {10000, 0}} {
		b.Run(c.String(), func(b *testing.B) {
			_, r := space(b)
			m, _, relabel := crowd(c.policies, c.ranges, 4)
			_, err := r.SetPolicies(m.Facts(), ownRanges)
			testenv.Must(b, err)
			i, classes := 0, 0
			for b.Loop() {
				relabel(i)
				i++
				changes := m.Changes()
				classes += len(changes.Classes)
				testenv.Must(b, r.ChangePolicies(changes))
			}
			b.ReportMetric(float64(classes)/float64(i), "classes/op")
		})
	}
}
