package main

import (
	"context"
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"github.com/fathom-network/fathom/internal/facts/packet"
	"github.com/fathom-network/fathom/internal/facts/service"
	"github.com/fathom-network/fathom/internal/insight/verify"
	"github.com/fathom-network/fathom/internal/watch/kube"
)

// showFrom prints what happens to packets from a pod to a Service.
func (a *app) showFrom(ctx context.Context, client *kube.Client, name service.Name, pod string, o output) error {
	from := service.Name{Namespace: name.Namespace, Name: pod}
	if namespace, rest, cut := strings.Cut(pod, "/"); cut {
		from = service.Name{Namespace: namespace, Name: rest}
	}
	if from.Namespace == "" || from.Name == "" || strings.Contains(from.Name, "/") {
		return fmt.Errorf("--from %q: want POD or NAMESPACE/POD", pod)
	}
	d, err := verify.ShowService(ctx, client, name, "", false)
	if err != nil {
		return err
	}
	f, err := verify.ServiceFrom(ctx, client, name, from)
	if err != nil {
		return err
	}
	if o.format != "" {
		return o.print(a, f, "", nil)
	}
	a.printFrom(d, f)
	return nil
}

func (a *app) printFrom(d verify.ServiceDetail, f verify.FromPod) {
	fmt.Fprintf(a.out, "From Pod %s (%s) on node %s to Service %s", f.Pod, join(f.Addresses), f.Node, d.Name)
	if f.HostNetwork {
		fmt.Fprint(a.out, "; the Pod has the node's network")
	}
	fmt.Fprintln(a.out)
	for _, p := range d.Problems {
		fmt.Fprintf(a.out, "problem: %s\n", p)
	}
	if len(f.Sent) == 0 {
		fmt.Fprintln(a.out, "\nThe node's kernel has no entry for it in a family in which the Pod has an address.")
	}
	endpoints := map[netip.AddrPort]string{}
	for _, e := range d.Endpoints {
		if e.Pod != "" {
			endpoints[e.Addr] = e.Pod
		}
		if e.Node != "" {
			endpoints[e.Addr] += " on " + e.Node
		}
	}
	for _, s := range f.Sent {
		fmt.Fprintf(a.out, "\n%s/%s", s.To, s.Protocol)
		switch {
		case s.Protocol != service.UDP.String():
		case s.Sender == packet.Connected:
			fmt.Fprint(a.out, ", by a socket that connects")
		default:
			fmt.Fprint(a.out, ", by a socket that does not connect")
		}
		fmt.Fprintln(a.out)
		a.printPaths(s.Paths, endpoints)
	}
}

// mostPaths is how many endpoints are listed one by one.
const mostPaths = 8

// printPaths prints the common start of paths once, and below it where they differ.
func (a *app) printPaths(paths []packet.Path, endpoints map[netip.AddrPort]string) {
	const indent = "  "
	common := 0
	for hops := paths[0].Hops; common < len(hops); {
		common++
		a.printHop(hops[common-1], indent)
		if len(hops[common-1].Out) > 1 {
			break
		}
	}
	for i, p := range paths {
		if i == mostPaths {
			fmt.Fprintf(a.out, "%sto one of %d more\n", indent, len(paths)-i)
			break
		}
		if v := p.Verdict(); len(paths) == 1 && (v == packet.Drop || v == packet.Reject) {
			break // it goes nowhere
		}
		fmt.Fprintf(a.out, "%sto %s  %s\n", indent, p.End.Dst, strings.TrimSpace(endpoints[p.End.Dst]))
		for _, h := range p.Hops[common:] {
			a.printHop(h, indent+indent)
		}
	}
}

func (a *app) printHop(h packet.Hop, indent string) {
	fmt.Fprintf(a.out, "%s%-11s  %-10s  %-9s  %s", indent, h.Hook, h.Part, h.Verdict, h.Why)
	if h.Device != "" {
		fmt.Fprintf(a.out, ", device %s", h.Device)
	}
	if h.Object != "" {
		fmt.Fprintf(a.out, " (%s)", h.Object)
	}
	fmt.Fprintln(a.out)
	if h.Rule != "" {
		fmt.Fprintf(a.out, "%s%-11s  %s\n", indent, "", h.Rule)
	}
}

func join(addrs []netip.Addr) string {
	var all []string
	for _, a := range slices.SortedFunc(slices.Values(addrs), netip.Addr.Compare) {
		all = append(all, a.String())
	}
	return strings.Join(all, ", ")
}
