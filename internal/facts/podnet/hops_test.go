package podnet

import (
	"net/netip"
	"testing"

	"github.com/fathom-network/fathom/internal/facts/packet"
)

func TestExplainFastPath(t *testing.T) {
	addr := netip.MustParseAddr
	on := FastPath{
		Pods:   map[netip.Addr]string{addr("10.244.1.2"): "a", addr("10.244.1.3"): "b", addr("10.244.1.4"): "shaped", addr("10.244.1.5"): "web"},
		Slow:   map[netip.Addr]string{addr("10.244.1.4"): "its device has a queueing discipline"},
		Judged: []netip.Addr{addr("10.244.1.5")},
		Ways: Ways{Remotes: []Remote{
			{netip.MustParsePrefix("10.244.0.0/16"), addr("192.0.2.1"), "far"},
			{netip.MustParsePrefix("10.244.2.0/24"), addr("192.0.2.2"), "near"},
		}},
	}
	off := on
	off.Off = "it is switched off"
	for _, tc := range []struct {
		name     string
		path     FastPath
		origin   packet.Origin
		src, dst string
		change   func(*packet.Packet)
		want     string // verdict, device and reason
	}{
		{"to a neighbour", on, packet.Pod, "10.244.1.2", "10.244.1.3", nil, "redirect b: to a pod of this node"},
		{"to another node", on, packet.Pod, "10.244.1.2", "10.244.2.9", nil, "redirect near: to a pod of another node, by 192.0.2.2"},
		{"to any other node", on, packet.Pod, "10.244.1.2", "10.244.3.9", nil, "redirect far: to a pod of another node, by 192.0.2.1"},
		{"from another node", on, packet.Elsewhere, "10.244.2.9", "10.244.1.2", nil, "redirect a: from a pod of another node"},
		{"outside", on, packet.Pod, "10.244.1.2", "203.0.113.9", nil, "pass : it is not to a pod"},
		{"from outside", on, packet.Elsewhere, "203.0.113.9", "10.244.1.2", nil, "pass : it is not from a pod"},
		{"from outside to the node", on, packet.Elsewhere, "203.0.113.9", "192.0.2.10", nil, ""},
		{"the node's own", on, packet.Node, "192.0.2.10", "10.244.1.2", nil, ""},
		{"a false source", on, packet.Pod, "10.244.2.9", "10.244.1.3", nil, "drop : it is not from the pod's own address"},
		{"a false source without a fast path", off, packet.Pod, "10.244.2.9", "10.244.1.3", nil, "drop : it is not from the pod's own address"},
		{"itself", on, packet.Pod, "10.244.1.2", "10.244.1.2", nil, "redirect lo: it stays within the pod"},
		{"shaped", on, packet.Pod, "10.244.1.4", "10.244.1.3", nil, "pass : the sender's packets take the stack: its device has a queueing discipline"},
		{"to one that is shaped", on, packet.Pod, "10.244.1.3", "10.244.1.4", nil, "pass : the receiver's packets take the stack: its device has a queueing discipline"},
		{"to one that policies isolate", on, packet.Pod, "10.244.1.3", "10.244.1.5", nil, "redirect web: to a pod of this node, if policies allow it: else the stack's rules drop it"},
		{"UDP from one that policies isolate", on, packet.Pod, "10.244.1.5", "10.244.2.9", func(p *packet.Packet) { p.Protocol = 17 }, "pass : policies isolate one of the pods, and it is not TCP"},
		{"SCTP", on, packet.Pod, "10.244.1.2", "10.244.1.3", func(p *packet.Packet) { p.Protocol = 132 }, "pass : it is neither TCP nor UDP"},
		{"a Service's", on, packet.Elsewhere, "10.244.2.9", "10.244.1.2", func(p *packet.Packet) { p.Translated = true }, "pass : connection tracking knows it"},
		{"switched off", off, packet.Pod, "10.244.1.2", "10.244.1.3", nil, "pass : there is none: it is switched off"},
	} {
		p := packet.Packet{Origin: tc.origin, Protocol: 6, Src: netip.AddrPortFrom(addr(tc.src), 1), Dst: netip.AddrPortFrom(addr(tc.dst), 2)}
		if tc.change != nil {
			tc.change(&p)
		}
		got := ""
		for _, h := range tc.path.Explain(p) {
			got += h.Verdict.String() + " " + h.Device + ": " + h.Why
		}
		if got != tc.want {
			t.Errorf("%s: %q, want %q", tc.name, got, tc.want)
		}
	}
}
