package verify

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"

	"golang.org/x/sync/errgroup"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/fathom-network/fathom/internal/facts/answer"
	"github.com/fathom-network/fathom/internal/facts/netconf"
	"github.com/fathom-network/fathom/internal/facts/service"
	"github.com/fathom-network/fathom/internal/facts/svcfacts"
	"github.com/fathom-network/fathom/internal/facts/vip"
	"github.com/fathom-network/fathom/internal/watch/kube"
)

// ServiceDetail is everything that is known of a Service.
type ServiceDetail struct {
	Service *corev1.Service `json:"-"`
	Name    string          `json:"name"`
	Type    string          `json:"type"`
	// Node is the node from whose point of view Frontends and Endpoints are.
	Node      string                `json:"node"`
	Frontends []service.Frontend    `json:"frontends"`
	Endpoints []service.EndpointUse `json:"endpoints"`
	Problems  []string              `json:"problems,omitempty"`
	// Kernels maps nodes to what their kernels hold of it.
	Kernels map[string]KernelService `json:"kernels,omitempty"`
	Unread  map[string]string        `json:"unread,omitempty"` // nodes that did not answer, and why
	// Announced are the addresses that the network outside can reach: a load balancer's, in the order of the Service's
	// status; external IPs that are in an AddressPool; ClusterIPs that are announced to routers.
	Announced []Announced `json:"announced,omitempty"`
}

// KernelService is what a kernel holds of a Service.
type KernelService struct {
	NFTables []string `json:"nftables"`
	Connect  []string `json:"connect"`
	Flows    []string `json:"flows,omitempty"`
}

// ShowService describes a Service from a node's point of view; an empty node is the first. If kernels is set it also asks
// the agents, which know nothing without Fathom's own Service proxy.
func ShowService(ctx context.Context, client *kube.Client, name service.Name, node string, kernels bool) (ServiceDetail, error) {
	svc, err := client.CoreV1().Services(name.Namespace).Get(ctx, name.Name, metav1.GetOptions{})
	if apierrors.IsNotFound(err) {
		return ServiceDetail{}, fmt.Errorf("there is no Service %s; `fathom service ls` lists them", name)
	}
	if err != nil {
		return ServiceDetail{}, fmt.Errorf("read Service %s: %w", name, err)
	}
	c, err := readServices(ctx, client)
	if err != nil {
		return ServiceDetail{}, err
	}
	slices.SortFunc(c.Nodes, func(a, b *corev1.Node) int { return cmp.Compare(a.Name, b.Name) })
	i := slices.IndexFunc(c.Nodes, func(n *corev1.Node) bool { return node == "" || n.Name == node })
	if i < 0 {
		return ServiceDetail{}, fmt.Errorf("there is no node %q; `kubectl get nodes` lists them", node)
	}
	at := svcfacts.Node(c.Nodes[i])
	d := ServiceDetail{Service: svc, Name: name.String(), Type: string(svc.Spec.Type), Node: at.Name, Endpoints: svcfacts.Explain(svc, c.Slices, at)}
	pools := vip.Read(c.balancing())
	if !kernels {
		return d, d.seen(ctx, client, c, pools, at, answer.Services{})
	}
	agents, err := findAgents(ctx, client)
	if err != nil && !errors.Is(err, errNoAgents) {
		return d, err
	}
	// Concurrently, since an agent that does not answer is waited for.
	var states map[string]answer.Services
	var failed map[string]error
	var asking errgroup.Group
	asking.Go(func() error {
		states, failed = ask[answer.Services](ctx, client, agents, servicesVerb)
		return nil
	})
	asking.Go(func() error {
		d.Announced = announcements(ctx, client, svc, c, pools, agents)
		return nil
	})
	if err := errors.Join(asking.Wait(), d.seen(ctx, client, c, pools, at, states[at.Name])); err != nil || len(agents) == 0 {
		return d, err
	}
	d.Kernels, d.Unread = map[string]KernelService{}, map[string]string{}
	for n, err := range failed {
		d.Unread[n] = answer.OneLine(err)
	}
	for n, s := range states {
		if node == "" || n == node {
			d.Kernels[n] = kernelOf(d.Frontends, s)
		}
	}
	return d, nil
}

// seen computes the frontends from the node's point of view. Without an answer of the node's agent, the cluster's
// configuration decides which external IPs are served.
func (d *ServiceDetail) seen(ctx context.Context, client *kube.Client, c Cluster, pools vip.Pools, at service.Node, s answer.Services) error {
	if s.Config.ExternalIPs == "" {
		m, err := client.CoreV1().ConfigMaps(netconf.Namespace).Get(ctx, netconf.ConfigMap, metav1.GetOptions{})
		if err != nil && !apierrors.IsNotFound(err) {
			return fmt.Errorf("read the network's configuration: %w", err)
		}
		config := netconf.Default()
		if err == nil {
			if config, err = netconf.Parse(m.Data); err != nil {
				return fmt.Errorf("ConfigMap %s/%s: %w", netconf.Namespace, netconf.ConfigMap, err)
			}
		}
		s.Config.ExternalIPs, s.Config.ExternalIPsFor = config.ExternalIPs, config.ExternalIPsFor
	}
	model := service.NewModel(at)
	model.SetExternalIPs(c.externalIPs(s.Config, pools))
	model.Replace(svcfacts.Services(c.Services), svcfacts.Slices(c.Slices))
	for _, f := range model.Frontends() {
		if f.Service.String() == d.Name {
			d.Frontends = append(d.Frontends, f)
		}
	}
	for _, p := range model.Problems() {
		if p.Service.String() == d.Name {
			d.Problems = append(d.Problems, p.Text)
		}
	}
	return nil
}

// kernelOf returns what a kernel holds of these frontends.
func kernelOf(frontends []service.Frontend, s answer.Services) KernelService {
	var k KernelService
	index := service.NewIndex(service.Plan{Frontends: frontends, NodePortAddrs: s.Config.NodePortAddrs}, nil, nil)
	of := func(key service.Key) bool {
		return slices.ContainsFunc(frontends, func(f service.Frontend) bool { return f.Key == key })
	}
	for _, f := range s.NFTables.Frontends {
		if of(f.Key) {
			key, text := describeFrontend(f)
			k.NFTables = append(k.NFTables, key.String()+" "+text)
		}
	}
	for _, b := range s.Connect {
		_, nodePort := index.Find(b.Protocol, netip.AddrPortFrom(b.Addr, b.Port))
		if of(b.Key) || nodePort {
			key, text := describeBalanced(b)
			k.Connect = append(k.Connect, key.String()+" "+text)
		}
	}
	for _, f := range s.Flows {
		if _, found := index.Find(f.Protocol, f.To); found {
			k.Flows = append(k.Flows, fmt.Sprintf("%d of %s to %s, answered by %s", f.Number, f.Protocol, f.To, f.Answers))
		}
	}
	return k
}
