package verify

import (
	"cmp"
	"context"
	"fmt"
	"net/netip"
	"slices"
	"strings"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/fathom-network/fathom/internal/facts/answer"
	"github.com/fathom-network/fathom/internal/facts/netconf"
	"github.com/fathom-network/fathom/internal/facts/podnet"
	"github.com/fathom-network/fathom/internal/facts/service"
	"github.com/fathom-network/fathom/internal/facts/svcfacts"
	"github.com/fathom-network/fathom/internal/facts/vip"
	"github.com/fathom-network/fathom/internal/watch/kube"
)

// servicesVerb is the agent's command that prints what its kernel does with Services.
const servicesVerb = "services"

// RunServices reads through its agent what every node's kernel does with Services, and compares it with the API.
func RunServices(ctx context.Context, client *kube.Client) (Report, error) {
	r, err := readTwice(ctx, client, question[answer.Services]{verb: servicesVerb, objects: readServices, compare: Services})
	if err != nil {
		return Report{}, err
	}
	return r.report(func(n *NodeReport, s answer.Services) {
		n.Mode, n.Frontends, n.Connect = string(s.Config.Mode), len(s.NFTables.Frontends), len(s.Connect)
	}), nil
}

// Services compares what a node's kernel does with Services with what the cluster's objects imply. It takes the node's
// addresses and pods from the agent: Pods verifies those.
func Services(c Cluster, node string, s answer.Services) []podnet.Difference {
	d := differ{node: node}
	i := slices.IndexFunc(c.Nodes, func(n *corev1.Node) bool { return n.Name == node })
	model := service.NewModel(service.Node{})
	pools := vip.Read(c.balancing())
	if i >= 0 {
		model.SetNode(svcfacts.Node(c.Nodes[i]))
		model.SetExternalIPs(c.externalIPs(s.Config, pools))
		model.Replace(svcfacts.Services(c.Services), svcfacts.Slices(c.Slices))
	}
	balancers, _ := model.LoadBalancers()
	d.announcements(c, balancers, s.Balancers)
	switch {
	case s.Config.Mode == netconf.ProxyOff:
		if len(s.NFTables.Frontends)+len(s.Connect) > 0 {
			d.add("it should not carry Services, but its kernel balances %d frontends", len(s.NFTables.Frontends)+len(s.Connect))
		}
		if s.Unserved != nil {
			d.add("it should not carry Services, but its kernel refuses packets for unused addresses of Services: nftables table inet %s", service.UnservedTable)
		}
		return d.found
	case s.Problem != "":
		d.add("the agent says: %s", s.Problem)
	}
	if i < 0 {
		return d.found
	}
	plan := service.Plan{Frontends: model.Frontends(), NodePortAddrs: s.Config.NodePortAddrs, OwnPods: s.Config.OwnPods}
	for _, p := range model.Problems() {
		if !p.Refused {
			d.add("%s", p)
		}
	}
	plain := plan
	plan.Frontends = s.Redirect().Frontends(plan.Frontends)
	if s.Config.Mode == netconf.ProxyAuto && s.ConnectMissing == "" {
		d.nftables(plain, s)
	} else {
		d.nftables(plan, s)
		if !s.Loopback {
			d.add("nftables: NodePorts do not answer at 127.0.0.1: sysctl net.ipv4.conf.all.route_localnet is 0, want 1")
		}
	}
	d.connect(plan, s)
	d.flows(plan, model, s)
	d.sharedAddresses(c.Nodes, balancers)
	d.unserved(c, pools, balancers, s)
	slices.SortFunc(d.found, func(a, b podnet.Difference) int { return cmp.Compare(a.Text, b.Text) })
	return slices.Compact(d.found)
}

func (d *differ) nftables(plan service.Plan, s answer.Services) {
	want, err := service.ByPacketOf(plan)
	if err != nil {
		d.add("%v", err)
		return
	}
	d.frontends("nftables", describeAll(want.Frontends, describeFrontend), describeAll(s.NFTables.Frontends, describeFrontend), plan)
	for _, list := range []struct{ what, want, have string }{
		{"addresses of NodePorts", fmt.Sprint(want.NodePortAddrs), fmt.Sprint(s.NFTables.NodePortAddrs)},
		{"this node's pods", fmt.Sprint(want.OwnPods), fmt.Sprint(s.NFTables.OwnPods)},
	} {
		if list.want != list.have {
			d.add("nftables: %s are %s, want %s", list.what, list.have, list.want)
		}
	}
}

func (d *differ) connect(plan service.Plan, s answer.Services) {
	if s.Config.Mode != netconf.ProxyAuto || s.ConnectMissing != "" {
		return
	}
	for _, name := range s.Detached {
		d.add("connect: program %s is not attached to the node's cgroup", name)
	}
	d.frontends("connect", describeAll(service.BalancedOf(plan), describeBalanced), describeAll(s.Connect, describeBalanced), plan)
}

// flows reports entries of connection tracking that clients should not meet.
func (d *differ) flows(plan service.Plan, model *service.Model, s answer.Services) {
	index := service.NewIndex(plan, nil, nil)
	for _, f := range s.Flows {
		if index.Ended(f.Protocol, f.To, f.Answers, f.Translated, model.Life) {
			d.add("conntrack: %d flows of %s to %s are answered by %s, which is not an endpoint of it", f.Number, f.Protocol, f.To, f.Answers)
		}
	}
}

// sharedAddresses reports Services with externalTrafficPolicy: Local that share a load balancer's address with Services
// whose endpoints are on other nodes: a client of the address reaches a node without endpoints of the former. Fathom
// assigns no such address, but a named targetPort that only some of the pods have leads to one, and another controller may
// assign one.
func (d *differ) sharedAddresses(nodes []*corev1.Node, balancers []service.LoadBalanced) {
	targets := map[netip.Addr][]vip.Target{}
	for _, l := range balancers {
		for _, addr := range l.Addrs {
			targets[addr] = append(targets[addr], l)
		}
	}
	var all []vip.Node
	for _, n := range nodes {
		_, excluded := n.Labels[vip.Exclude]
		all = append(all, vip.Node{Name: n.Name, Alive: true, Excluded: excluded})
	}
	for addr, sharing := range targets {
		if len(sharing) < 2 || !slices.Contains(vip.Eligible(addr, sharing, all), d.node) {
			continue
		}
		for _, t := range sharing {
			if t.Local && len(t.Nodes) > 0 && !slices.Contains(t.Nodes, d.node) {
				d.add("load balancer: packets for all Services that share %s come to this node, which drops those for Service %s: its externalTrafficPolicy is Local, and its ready endpoints are on %s",
					addr, t.Service, strings.Join(t.Nodes, ", "))
			}
		}
	}
}

// frontends compares descriptions by their keys.
func (d *differ) frontends(where string, want, have map[service.Key]string, plan service.Plan) {
	owner := map[service.Key]string{}
	for _, f := range plan.Frontends {
		owner[f.Key] = " of Service " + f.Service.String()
	}
	for key, text := range want {
		switch got, found := have[key]; {
		case !found:
			d.add("%s: %s%s is missing", where, key, owner[key])
		case got != text:
			d.add("%s: %s%s: %s, want %s", where, key, owner[key], got, text)
		}
	}
	for key := range have {
		if _, found := want[key]; !found {
			d.add("%s: %s belongs to no Service", where, key)
		}
	}
}

func describeAll[T any](all []T, describe func(T) (service.Key, string)) map[service.Key]string {
	m := make(map[service.Key]string, len(all))
	for _, x := range all {
		key, text := describe(x)
		m[key] = text
	}
	return m
}

func describeFrontend(f service.Frontend) (service.Key, string) {
	var b strings.Builder
	describeBackends(&b, f.Inside)
	if f.Split() {
		b.WriteString(", from outside ")
		describeBackends(&b, f.Outside)
	}
	if f.Affinity > 0 {
		fmt.Fprintf(&b, ", affinity %v", f.Affinity)
	}
	if f.Sources != nil {
		fmt.Fprintf(&b, ", from %v", f.Sources)
	}
	if f.PodsOnly {
		b.WriteString(", not for the node itself")
	}
	return f.Key, b.String()
}

func describeBackends(b *strings.Builder, x service.Backends) {
	switch {
	case len(x.Endpoints) > 0:
		fmt.Fprintf(b, "to %v", x.Endpoints)
	case x.Drop:
		b.WriteString("dropped")
	default:
		b.WriteString("rejected")
	}
}

func describeBalanced(f service.Balanced) (service.Key, string) {
	text := "refused"
	if len(f.Endpoints) > 0 {
		text = fmt.Sprintf("to %v", f.Endpoints)
	}
	if f.Affinity > 0 {
		text += fmt.Sprintf(", affinity %v", f.Affinity)
	}
	if f.PodsOnly {
		text += ", not for the node itself"
	}
	return f.Key, text
}

func readServices(ctx context.Context, client *kube.Client) (Cluster, error) {
	c, err := readRanges(ctx, client)
	if err != nil {
		return c, err
	}
	c.Services, c.Slices, err = ReadServices(ctx, client, metav1.NamespaceAll)
	return c, err
}

// ReadServices returns the Services and EndpointSlices of a namespace, or of all if it is empty.
func ReadServices(ctx context.Context, client *kube.Client, namespace string) ([]*corev1.Service, []*discoveryv1.EndpointSlice, error) {
	services, err := kube.List(ctx, client, kube.Services, kube.Selection{Namespace: namespace})
	if err != nil {
		return nil, nil, err
	}
	slices, err := kube.List(ctx, client, kube.EndpointSlices, kube.Selection{Namespace: namespace})
	return services, slices, err
}
