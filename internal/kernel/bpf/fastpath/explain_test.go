package fastpath_test

import (
	"fmt"
	"net/netip"
	"strings"
	"testing"

	"github.com/fathom-network/fathom/internal/facts/packet"
	"github.com/fathom-network/fathom/internal/facts/podnet"
	"github.com/fathom-network/fathom/internal/kernel/bpf/fastpath"
	"github.com/fathom-network/fathom/internal/kernel/link"
	"github.com/fathom-network/fathom/internal/testenv"
	"github.com/fathom-network/fathom/internal/testenv/linktest"
)

// TestExplain sends what is explained, and reads from the kernel's counters what became of it.
func TestExplain(t *testing.T) {
	for _, mode := range []podnet.Mode{podnet.Direct, podnet.VXLAN} {
		t.Run(string(mode), func(t *testing.T) {
			a, b, pods := twoNodes(t, mode, fastpath.Options{})
			shaped := a.pod(t, 1, 9)
			linktest.Run(t, a.Namespace, "tc", "qdisc", "add", "dev", shaped.host, "root", "tbf", "rate", "100mbit", "burst", "1mb", "latency", "50ms")
			a.set(t)
			for _, to := range []pod{pods[0][1], pods[1][1], shaped} {
				serve(t, to)
			}
			explained := map[*node]podnet.FastPath{}
			for n, own := range map[*node][]pod{a: {pods[0][0], pods[0][1], shaped}, b: pods[1][:]} {
				slow, judged, err := n.path.Slow()
				testenv.Must(t, err)
				f := podnet.FastPath{Pods: map[netip.Addr]string{}, Slow: slow, Judged: judged, Ways: n.plan.Ways}
				for _, p := range own {
					for _, addr := range p.addrs {
						f.Pods[addr] = p.host
					}
				}
				explained[n] = f
			}
			from := pods[0][0]
			for family := range from.addrs {
				for _, to := range []struct {
					n    *node
					p    pod
					what string // what the kernel counts of such a packet, on the sender's node
				}{{a, pods[0][1], "redirected to_pod"}, {b, pods[1][1], "redirected to_node"}, {a, shaped, "stack pod"}} {
					p := packet.Packet{Origin: packet.Pod, Protocol: 6, Src: netip.AddrPortFrom(from.addrs[family], 0), Dst: netip.AddrPortFrom(to.p.addrs[family], 8080)}
					hops := explained[a].Explain(p)
					if want := map[bool]packet.Verdict{true: packet.Redirect, false: packet.Pass}[strings.HasPrefix(to.what, "redirected")]; len(hops) != 1 || hops[0].Verdict != want {
						t.Errorf("%v is explained by %+v, want %s", p, hops, want)
						continue
					}
					var here, there map[string]uint64
					talk := func() { testenv.Must(t, echo(from.Namespace, "tcp", to.p.addrs[family], 8080, 1000)) }
					if to.n == b {
						p.Origin = packet.Elsewhere
						in := explained[b].Explain(p)
						if len(in) != 1 || in[0].Verdict != packet.Redirect {
							t.Errorf("%v is explained by %+v where it comes in", p, in)
							continue
						}
						here = a.counted(t, func() { there = b.counted(t, talk) })
						has(t, fmt.Sprint(p), there, "redirected from_node")
						isDevice(t, a.Namespace, hops[0].Device)
						isDevice(t, b.Namespace, in[0].Device)
					} else {
						here = a.counted(t, talk)
						if hops[0].Device != "" {
							isDevice(t, a.Namespace, hops[0].Device)
						}
					}
					has(t, fmt.Sprint(p), here, to.what)
					if hops[0].Verdict == packet.Pass {
						hasNot(t, fmt.Sprint(p), here, "redirected to_pod", "redirected to_node")
					}
				}
			}
		})
	}
}

func isDevice(t *testing.T, n *link.Namespace, name string) {
	t.Helper()
	if _, _, err := n.Index(name); err != nil {
		t.Errorf("the device %q that is named: %v", name, err)
	}
}
