package policyfacts_test

import (
	"fmt"
	"net/netip"
	"runtime"
	"testing"

	"github.com/fathom-network/fathom/internal/facts/policy"
	"github.com/fathom-network/fathom/internal/facts/service"
)

// crowd tells a Model of pods in 50 namespaces on two nodes, and of policies, each of which selects the pods of one app in its
// namespace, and has a rule for pods, one for another namespace's, and one for as many blocks.
func crowd(m *policy.Model, policies, pods, blocks int) (change func(i int)) {
	const namespaces, apps = 50, 20
	for i := range namespaces {
		m.SetNamespace(fmt.Sprintf("n%d", i), map[string]string{"team": fmt.Sprintf("t%d", i%10)})
	}
	for i := range policies {
		set(m, i, blocks)
	}
	pod := func(i, app int) policy.Pod {
		return policy.Pod{Name: service.Name{Namespace: fmt.Sprintf("n%d", i%namespaces), Name: fmt.Sprintf("p%d", i)}, Node: fmt.Sprintf("node%d", i/namespaces%2),
			Labels: map[string]string{"app": fmt.Sprintf("a%d", app%apps), "pod": fmt.Sprint(i)}, Addrs: []netip.Addr{netip.AddrFrom4([4]byte{10, byte(i >> 16), byte(i >> 8), byte(i)})}}
	}
	for i := range pods {
		m.SetPod(pod(i, i/namespaces))
	}
	return func(i int) {
		if i%2 == 0 {
			m.SetPod(pod(i%pods, i)) // other labels
		} else {
			set(m, i%policies, blocks)
		}
	}
}

func set(m *policy.Model, i, blocks int) {
	namespace := fmt.Sprintf("n%d", i%50)
	p := &policy.Policy{ID: policy.ID{Kind: "NetworkPolicy", Name: service.Name{Namespace: namespace, Name: fmt.Sprintf("p%d", i)}},
		Subject: app(i / 50 % 20), Isolates: [2]bool{true, i%5 == 0}}
	p.Rules[policy.Ingress] = []policy.Rule{
		{Position: "spec.ingress[0]", Peers: []policy.Peer{{Position: "spec.ingress[0].from[0]", Pods: &policy.Pods{Namespace: namespace, Pods: app(i / 50 % 20)}}},
			Ports: []policy.Port{{Protocol: service.TCP, From: 80, To: 80}, {Protocol: service.TCP, From: uint16(1000 + i), To: uint16(1010 + i)}}},
		{Position: "spec.ingress[1]", AnyPort: true, Peers: []policy.Peer{{Position: "spec.ingress[1].from[0]",
			Pods: &policy.Pods{Namespaces: policy.Selector{{Key: "team", Operator: policy.In, Values: []string{fmt.Sprintf("t%d", i%10)}}}, Pods: app(i % 7)}}}},
	}
	var list []policy.Peer
	for j := range blocks {
		n := i*blocks + j
		list = append(list, policy.Peer{Position: fmt.Sprintf("spec.ingress[2].from[%d]", j),
			Block: policy.Block{Prefix: netip.PrefixFrom(netip.AddrFrom4([4]byte{172, byte(n >> 15), byte(n >> 7), byte(n << 1)}), 32)}})
	}
	if list != nil {
		p.Rules[policy.Ingress] = append(p.Rules[policy.Ingress], policy.Rule{Position: "spec.ingress[2]", Peers: list, AnyPort: true})
	}
	m.SetPolicy(p)
}

func app(i int) policy.Selector {
	return policy.Selector{{Key: "app", Operator: policy.In, Values: []string{fmt.Sprintf("a%d", i)}}}
}

var sizes = []struct{ policies, pods, blocks int }{{1000, 200, 0}, {10000, 200, 10}, {10000, 10000, 10}}

func BenchmarkFromNothing(b *testing.B) {
	for _, s := range sizes {
		b.Run(fmt.Sprintf("%d policies, %d pods, %d blocks", s.policies, s.pods, s.blocks*s.policies), func(b *testing.B) {
			before := heap()
			var m *policy.Model
			for b.Loop() {
				m = policy.NewModel("node0")
				crowd(m, s.policies, s.pods, s.blocks)
				m.Changes()
			}
			b.ReportMetric(heap()-before, "MB-kept")
			runtime.KeepAlive(m)
		})
	}
}

// heap returns how many megabytes are in use.
func heap() float64 {
	runtime.GC()
	var mem runtime.MemStats
	runtime.ReadMemStats(&mem)
	return float64(mem.HeapAlloc) / 1e6
}

func BenchmarkChange(b *testing.B) {
	for _, s := range sizes {
		b.Run(fmt.Sprintf("%d policies, %d pods, %d blocks", s.policies, s.pods, s.blocks*s.policies), func(b *testing.B) {
			m := policy.NewModel("node0")
			change := crowd(m, s.policies, s.pods, s.blocks)
			m.Changes()
			i := 0
			for b.Loop() {
				change(i)
				m.Changes()
				i++
			}
		})
	}
}
