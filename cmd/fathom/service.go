package main

import (
	"cmp"
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/spf13/cobra"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/fathom-network/fathom/internal/facts/service"
	"github.com/fathom-network/fathom/internal/facts/svcfacts"
	"github.com/fathom-network/fathom/internal/insight/verify"
)

func (a *app) service() *cobra.Command {
	cmd := &cobra.Command{Use: "service", Aliases: []string{"svc"}, Short: "Inspect Services: their addresses, where they lead, and what nodes' kernels hold of them"}
	cmd.AddCommand(a.serviceList(), a.serviceShow())
	return cmd
}

func (a *app) serviceList() *cobra.Command {
	var o output
	var t target
	var namespace string
	cmd := &cobra.Command{
		Use:     "ls",
		Short:   "List Services with their addresses, ports and endpoints",
		Long:    "Lists Services with their addresses and ports, and how many of their endpoints are ready.\n\n" + targetHelp,
		Example: "fathom service ls\nfathom service ls --namespace kube-system",
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			client, _, err := a.connect(cmd, t)
			if err != nil {
				return err
			}
			services, endpointSlices, err := verify.ReadServices(cmd.Context(), client, namespace)
			if err != nil {
				return err
			}
			type row struct {
				Namespace string   `json:"namespace"`
				Name      string   `json:"name"`
				Type      string   `json:"type"`
				Addresses []string `json:"addresses"`
				Ports     []string `json:"ports"`
				Ready     int      `json:"ready"`
				Endpoints int      `json:"endpoints"`
			}
			all, rows := []row{}, [][]string{}
			for _, s := range services {
				r := row{Namespace: s.Namespace, Name: s.Name, Type: string(s.Spec.Type), Addresses: addressesOf(s), Ports: portsOf(s)}
				ready := map[string]bool{}
				for _, e := range svcfacts.Explain(s, endpointSlices, service.Node{}) {
					ready[e.Addr.Addr().String()] = ready[e.Addr.Addr().String()] || e.Ready
				}
				r.Endpoints = len(ready)
				for _, is := range ready {
					if is {
						r.Ready++
					}
				}
				all = append(all, r)
				rows = append(rows, []string{r.Namespace, r.Name, r.Type, dash(r.Addresses), dash(r.Ports), fmt.Sprintf("%d/%d", r.Ready, r.Endpoints)})
			}
			return o.print(a, all, "NAMESPACE NAME TYPE ADDRESSES PORTS READY", rows)
		},
	}
	cmd.Flags().StringVarP(&namespace, "namespace", "n", "", "only this namespace (default: all)")
	o.register(cmd)
	t.register(cmd)
	return cmd
}

func dash(list []string) string { return cmp.Or(strings.Join(list, ","), "-") }

// addressesOf returns all addresses of a Service, each kind as `kubectl` shows it.
func addressesOf(s *corev1.Service) []string {
	if s.Spec.Type == corev1.ServiceTypeExternalName {
		return []string{s.Spec.ExternalName}
	}
	list := slices.Clone(s.Spec.ClusterIPs)
	for _, in := range s.Status.LoadBalancer.Ingress {
		list = append(list, cmp.Or(in.IP, in.Hostname))
	}
	if s.Spec.Type == corev1.ServiceTypeLoadBalancer && len(s.Status.LoadBalancer.Ingress) == 0 {
		list = append(list, "<pending>")
	}
	return append(list, s.Spec.ExternalIPs...)
}

func portsOf(s *corev1.Service) []string {
	var list []string
	for _, p := range s.Spec.Ports {
		text := fmt.Sprintf("%d/%s", p.Port, p.Protocol)
		if p.NodePort != 0 {
			text = fmt.Sprintf("%d:%d/%s", p.Port, p.NodePort, p.Protocol)
		}
		list = append(list, text)
	}
	return list
}

func (a *app) serviceShow() *cobra.Command {
	var o output
	var t target
	var namespace, node, from string
	cmd := &cobra.Command{
		Use:   "show NAME",
		Short: "Show a Service's addresses, which nodes announce them, where they lead, and what nodes' kernels hold",
		Long: `Shows a Service:
  - its addresses and ports, and to which endpoints a node sends their traffic;
  - its endpoints with their state, node and zone, and why one is not used;
  - for load balancers' addresses, which node answers for them and which nodes announce them to routers, as the agents
    report, or why none does;
  - what the nodes' kernels hold: entries of nftables, entries for sockets that connect on the node, and flows of
    connection tracking.
Which endpoints are used depends on the node: --node chooses it.

With --from it explains instead what happens to packets from a pod, for each address and port of the Service and each
endpoint: at connect(), in the fast path, in the rules of Services and of masquerade. Each decision comes with its reason,
the object that causes it, and where to find it in the kernel of the pod's node.

` + targetHelp,
		Example: "fathom service show kubernetes\nfathom service show kube-dns --namespace kube-system --node east-worker1\n" +
			"fathom service show web --from client\nfathom service show kube-dns --namespace kube-system --from default/client",
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			client, _, err := a.connect(cmd, t)
			if err != nil {
				return err
			}
			name := service.Name{Namespace: namespace, Name: args[0]}
			if from != "" {
				return a.showFrom(cmd.Context(), client, name, from, o)
			}
			d, err := verify.ShowService(cmd.Context(), client, name, node, true)
			if err != nil {
				return err
			}
			if o.format != "" {
				return o.print(a, d, "", nil)
			}
			return a.printService(d)
		},
	}
	cmd.Flags().StringVarP(&namespace, "namespace", "n", metav1.NamespaceDefault, "the Service's namespace")
	cmd.Flags().StringVar(&node, "node", "", "from this node's point of view (default: the first by name, and the kernels of all)")
	cmd.Flags().StringVar(&from, "from", "", "explain packets from this `pod`: POD in the Service's namespace, or NAMESPACE/POD")
	cmd.MarkFlagsMutuallyExclusive("node", "from")
	o.register(cmd)
	t.register(cmd)
	return cmd
}

// printService prints a Service for people.
func (a *app) printService(d verify.ServiceDetail) error {
	s := d.Service
	fmt.Fprintf(a.out, "%s  %s  addresses %s  ports %s\n", d.Name, d.Type, dash(addressesOf(s)), dash(portsOf(s)))
	if s.Spec.SessionAffinity == corev1.ServiceAffinityClientIP {
		fmt.Fprintln(a.out, "sessionAffinity ClientIP")
	}
	if p := s.Spec.ExternalTrafficPolicy; p == corev1.ServiceExternalTrafficPolicyLocal {
		fmt.Fprintln(a.out, "externalTrafficPolicy Local: traffic from outside goes only to endpoints on the node that receives it, which see the client's address")
	}
	if p := s.Spec.InternalTrafficPolicy; p != nil && *p == corev1.ServiceInternalTrafficPolicyLocal {
		fmt.Fprintln(a.out, "internalTrafficPolicy Local: a node's pods reach only endpoints on the same node")
	}
	for _, p := range d.Problems {
		fmt.Fprintf(a.out, "problem: %s\n", p)
	}
	fmt.Fprintf(a.out, "\nAs node %s sees it:\n\n", d.Node)
	var rows [][]string
	for _, f := range d.Frontends {
		rows = append(rows, []string{f.Kind.String(), f.String(), cmp.Or(f.PortName, "-"), leads(f)})
	}
	if err := new(output).print(a, nil, "KIND FRONTEND PORT LEADS-TO", rows); err != nil {
		return err
	}
	fmt.Fprintln(a.out)
	rows = nil
	for _, e := range d.Endpoints {
		rows = append(rows, []string{e.Addr.String() + "/" + e.Protocol.String(), cmp.Or(e.PortName, "-"), cmp.Or(e.Pod, "-"), cmp.Or(e.Node, "-"), cmp.Or(e.Zone, "-"), stateOf(e), usedBy(e)})
	}
	if err := new(output).print(a, nil, "ENDPOINT PORT POD NODE ZONE STATE USED", rows); err != nil {
		return err
	}
	if len(d.Announced) > 0 {
		if err := a.printAnnounced(d.Announced); err != nil {
			return err
		}
	}
	for _, n := range slices.Sorted(maps.Keys(d.Kernels)) {
		k := d.Kernels[n]
		fmt.Fprintf(a.out, "\nKernel of %s:\n", n)
		for _, of := range []struct {
			what  string
			lines []string
		}{{"nftables", k.NFTables}, {"connect", k.Connect}, {"conntrack", k.Flows}} {
			for _, line := range of.lines {
				fmt.Fprintf(a.out, "  %-9s  %s\n", of.what, line)
			}
		}
		if len(k.NFTables)+len(k.Connect) == 0 {
			fmt.Fprintln(a.out, "  nothing of Fathom: another proxy carries Services here")
		}
	}
	for _, n := range slices.Sorted(maps.Keys(d.Unread)) {
		fmt.Fprintf(a.out, "\nKernel of %s: not known: %s\n", n, d.Unread[n])
	}
	return nil
}

// printAnnounced prints how packets from outside for a Service's addresses reach nodes.
func (a *app) printAnnounced(all []verify.Announced) error {
	fmt.Fprint(a.out, "\nHow its addresses lead to nodes:\n\n")
	var rows [][]string
	for _, x := range all {
		var routers []string
		for _, r := range x.Routers {
			routers = append(routers, r.String())
		}
		rows = append(rows, []string{cmp.Or(x.Address, "<pending>"), cmp.Or(x.Pool, "-"), dash(x.Answered), cmp.Or(strings.Join(routers, "; "), "-")})
	}
	if err := new(output).print(a, nil, "ADDRESS POOL ANSWERED-BY ROUTED-TO", rows); err != nil {
		return err
	}
	for _, x := range all {
		for _, why := range x.Why {
			fmt.Fprintf(a.out, "%s: %s\n", cmp.Or(x.Address, "<pending>"), why)
		}
	}
	return nil
}

func leads(f service.Frontend) string {
	of := func(b service.Backends) string {
		switch {
		case len(b.Endpoints) == 1:
			return b.Endpoints[0].String()
		case len(b.Endpoints) > 0:
			return fmt.Sprintf("one of %d", len(b.Endpoints))
		case b.Drop:
			return "nowhere: dropped, since the endpoints are on other nodes"
		}
		return "nowhere: rejected"
	}
	text := of(f.Inside)
	if f.Split() {
		text += "; from outside " + of(f.Outside)
	}
	if f.Sources != nil {
		text += fmt.Sprintf("; only for %v", f.Sources)
	}
	if f.PodsOnly {
		text += "; not from the node itself"
	}
	return text
}

func stateOf(e service.EndpointUse) string {
	switch {
	case e.Ready && e.Terminating:
		return "ready, terminating"
	case e.Ready:
		return "ready"
	case e.Serving && e.Terminating:
		return "serving, terminating"
	case e.Terminating:
		return "terminating"
	}
	return "not ready"
}

func usedBy(e service.EndpointUse) string {
	text := "no"
	switch {
	case e.Inside && e.Outside:
		text = "yes"
	case e.Inside:
		text = "from inside"
	case e.Outside:
		text = "from outside"
	}
	if e.Why != "" {
		text += ": " + e.Why
	}
	return text
}
