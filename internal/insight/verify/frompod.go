package verify

import (
	"context"
	"fmt"
	"net/netip"
	"slices"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/fathom-network/fathom/internal/facts/answer"
	"github.com/fathom-network/fathom/internal/facts/packet"
	"github.com/fathom-network/fathom/internal/facts/podnet"
	"github.com/fathom-network/fathom/internal/facts/service"
	"github.com/fathom-network/fathom/internal/watch/kube"
)

// FromPod explains what happens to packets from a pod to a Service, according to the kernel of the pod's node.
type FromPod struct {
	Pod       string       `json:"pod"`
	Node      string       `json:"node"`
	Addresses []netip.Addr `json:"addresses"`
	// HostNetwork is true if the pod uses the node's network.
	HostNetwork bool   `json:"hostNetwork,omitempty"`
	Sent        []Sent `json:"sent"`
}

// Sent is one way to send to a Service.
type Sent struct {
	Protocol string        `json:"protocol"`
	To       string        `json:"to"`
	Sender   packet.Sender `json:"sender"`
	// Paths are the possible outcomes, one for each endpoint. Hops before the first choice are the same in all.
	Paths []packet.Path `json:"paths"`
}

// ServiceFrom asks the agent of a pod's node what its kernel does with packets from the pod to a Service.
func ServiceFrom(ctx context.Context, client *kube.Client, name, pod service.Name) (FromPod, error) {
	p, err := client.CoreV1().Pods(pod.Namespace).Get(ctx, pod.Name, metav1.GetOptions{})
	if apierrors.IsNotFound(err) {
		return FromPod{}, fmt.Errorf("there is no Pod %s; `kubectl get pods -A` lists them", pod)
	}
	if err != nil {
		return FromPod{}, fmt.Errorf("read Pod %s: %w", pod, err)
	}
	f := FromPod{Pod: pod.String(), Node: p.Spec.NodeName, Addresses: podAddrs(p), HostNetwork: p.Spec.HostNetwork}
	if f.Node == "" || len(f.Addresses) == 0 {
		return f, fmt.Errorf("the Pod %s has no address yet: it is %s; `kubectl describe pod` says what it waits for", pod, p.Status.Phase)
	}
	agents, err := findAgents(ctx, client)
	if err != nil {
		return f, err
	}
	agent, found := agents[f.Node]
	if !found {
		return f, fmt.Errorf("node %s of the Pod %s has no running agent of Fathom, so its kernel's state is unknown", f.Node, pod)
	}
	of := map[string]*corev1.Pod{f.Node: agent}
	services, failed := ask[answer.Services](ctx, client, of, servicesVerb)
	if err := failed[f.Node]; err != nil {
		return f, err
	}
	nodes, failed := ask[answer.Node](ctx, client, of, stateVerb)
	if err := failed[f.Node]; err != nil {
		return f, err
	}
	f.explain(name, services[f.Node], nodes[f.Node])
	return f, nil
}

// explain follows packets of the pod to each address of a Service through the parts of its node.
func (f *FromPod) explain(name service.Name, s answer.Services, n answer.Node) {
	parts := partsOf(s, n)
	origin := packet.Pod
	if f.HostNetwork {
		origin = packet.Node
	}
	for _, x := range s.NFTables.Frontends {
		if x.Service != name {
			continue
		}
		from := slices.IndexFunc(f.Addresses, func(a netip.Addr) bool { return a.Is4() == x.Addr.Is4() })
		if from < 0 {
			continue // the pod has no address of this family
		}
		senders := []packet.Sender{packet.Connected}
		if x.Protocol == service.UDP {
			senders = append(senders, packet.Unconnected)
		}
		for _, key := range service.KeysOf(x, s.NFTables.NodePortAddrs) {
			if key.Addr.IsLoopback() && !f.HostNetwork {
				continue // the pod's loopback addresses are its own, not the node's
			}
			to := netip.AddrPortFrom(key.Addr, key.Port)
			for _, sender := range senders {
				first := packet.Packet{Origin: origin, Sender: sender, Protocol: uint8(x.Protocol), Src: netip.AddrPortFrom(f.Addresses[from], 0), Dst: to}
				f.Sent = append(f.Sent, Sent{Protocol: x.Protocol.String(), To: to.String(), Sender: sender, Paths: packet.Follow(first, parts...)})
			}
		}
	}
}

// partsOf returns the parts of a node's network that a packet from a pod or a process of the node traverses, in order, each
// in the state that was read from the kernel.
func partsOf(s answer.Services, n answer.Node) []packet.Part {
	names := map[uint32]service.Name{}
	for _, x := range s.NFTables.Frontends {
		names[service.ID(x.Service)] = x.Service
	}
	off := n.FastPath.Reason
	if !n.FastPath.On && off == "" {
		off = "the agent has not loaded it"
	}
	fast := podnet.FastPath{Off: off, Pods: map[netip.Addr]string{}, Slow: n.FastPath.Slow, Judged: n.FastPath.Judged, Ways: n.Plan.Ways(n.Interfaces)}
	for _, p := range n.Pods {
		for _, a := range p.Routes {
			fast.Pods[a] = p.Device
		}
	}
	if len(s.Detached) > 0 {
		s.Connect = nil // some may still be attached: `fathom verify services` reports what is wrong
	}
	held := slices.SortedFunc(slices.Values(s.Connect), func(a, b service.Balanced) int { return a.Compare(b.Key) })
	return []packet.Part{
		service.AtConnect{Held: held, Names: names}, fast, service.ByRules{Plan: s.NFTables},
		service.ByRulesAfter{Plan: s.NFTables, Local: n.Addresses}, n.Kernel.Masquerade,
	}
}
