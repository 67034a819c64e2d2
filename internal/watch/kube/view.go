package kube

import (
	"context"
	"reflect"
	"sync/atomic"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/fathom-network/fathom/api/v1alpha1"
	"github.com/fathom-network/fathom/internal/facts/bgpconf"
	"github.com/fathom-network/fathom/internal/facts/netconf"
)

// View is what the network of one node depends on.
type View struct {
	Nodes      *Store[*corev1.Node]
	Pods       *Store[*corev1.Pod] // of the node
	Namespaces *Store[*corev1.Namespace]
	// A cluster may lack these kinds.
	Pools        *Store[*v1alpha1.IPPool]
	Blocks       *Store[*v1alpha1.IPBlock] // of all nodes
	ServiceCIDRs *Store[*networkingv1.ServiceCIDR]
	AddressPools *Store[*v1alpha1.AddressPool]
	// BGPPeers has of each status the node's own session, and the names of the other nodes. The View is Synced without it.
	BGPPeers *Store[*v1alpha1.BGPPeer]

	config  *Store[*corev1.ConfigMap]
	problem atomic.Pointer[error]
}

// View starts to watch, for a node. The view is empty until Synced. changed is called when it has changed, and must not block.
func (c *Client) View(ctx context.Context, node string, changed func()) *View {
	v := &View{}
	k := kept{changed, func(err error) {
		v.problem.Store(&err)
		changed()
	}}
	v.Nodes = Watch(ctx, c, Nodes, options(k, shrinkNode))
	pods := options(k, shrinkPod)
	pods.Fields = "spec.nodeName=" + node
	v.Pods = Watch(ctx, c, Pods, pods)
	v.Namespaces = Watch(ctx, c, Namespaces, options(k, shrinkNamespace))
	v.Pools = Watch(ctx, c, IPPools, optional(k, shrinkPool))
	v.Blocks = Watch(ctx, c, IPBlocks, optional(k, shrinkBlock))
	v.ServiceCIDRs = Watch(ctx, c, ServiceCIDRs, optional(k, shrinkServiceCIDR))
	v.AddressPools = Watch(ctx, c, AddressPools, optional(k, shrinkAddressPool))
	v.config = watchConfig(ctx, c, k)
	v.BGPPeers = Watch(ctx, c, BGPPeers, Options[*v1alpha1.BGPPeer]{
		Optional: true, Changed: changed,
		Shrink: func(p *v1alpha1.BGPPeer) *v1alpha1.BGPPeer { return shrinkPeer(p, node) },
		// Every node writes its session into the status. Other nodes' sessions do not concern this node.
		Same: func(was, is *v1alpha1.BGPPeer) bool {
			return was.Generation == is.Generation && reflect.DeepEqual(bgpconf.SessionOf(was, node), bgpconf.SessionOf(is, node))
		},
	})
	return v
}

// Synced reports whether everything was listed at least once.
func (v *View) Synced() bool {
	return v.Nodes.Synced() && v.Pods.Synced() && v.Namespaces.Synced() && v.Pools.Synced() && v.Blocks.Synced() &&
		v.ServiceCIDRs.Synced() && v.AddressPools.Synced() && v.config.Synced()
}

// Problem returns the error of the last watch that failed, or nil. It matters while the view is not Synced.
func (v *View) Problem() error {
	if p := v.problem.Load(); p != nil {
		return *p
	}
	return nil
}

// Node returns a node, or an empty one and false if there is none of that name.
func (v *View) Node(name string) (*corev1.Node, bool) {
	if n, found := v.Nodes.Get("", name); found {
		return n, true
	}
	return &corev1.Node{}, false
}

// Config returns the configuration's data, or nil if there is none.
func (v *View) Config() map[string]string { return dataOf(v.config) }

// BalancerView is what Services' addresses follow from: Services, pools, what pools must not overlap, and the network's
// configuration. It has the blocks of pods' pools, too.
type BalancerView struct {
	Services     *Store[*corev1.Service]
	Namespaces   *Store[*corev1.Namespace]
	Nodes        *Store[*corev1.Node]
	AddressPools *Store[*v1alpha1.AddressPool]
	// A cluster may lack these kinds.
	ServiceCIDRs *Store[*networkingv1.ServiceCIDR]
	PodPools     *Store[*v1alpha1.IPPool]
	Blocks       *Store[*v1alpha1.IPBlock]
	// APIServers has the EndpointSlice in which API servers write down where they are.
	APIServers *Store[*discoveryv1.EndpointSlice]
	// BGPPeers has of each status the names of the nodes. Its changes are not reported, and the view is Synced without it:
	// agents write many sessions when a router ends.
	BGPPeers *Store[*v1alpha1.BGPPeer]

	config *Store[*corev1.ConfigMap]
}

// BalancerView starts to watch. The view is empty until Synced. changed is called when it has changed, and must not block. Services keep the managed fields of owner, the field manager
// that writes their status.
func (c *Client) BalancerView(ctx context.Context, owner string, changed func()) *BalancerView {
	k := kept{changed: changed}
	apiServers := options[*discoveryv1.EndpointSlice](k, nil)
	apiServers.Selection = Selection{Namespace: metav1.NamespaceDefault, Fields: "metadata.name=kubernetes"}
	return &BalancerView{
		Services:     Watch(ctx, c, Services, options(k, func(s *corev1.Service) *corev1.Service { return shrinkService(s, owner) })),
		Namespaces:   Watch(ctx, c, Namespaces, options(k, shrinkNamespace)),
		Nodes:        Watch(ctx, c, Nodes, options(k, shrinkNode)),
		AddressPools: Watch(ctx, c, AddressPools, options(k, shrinkAddressPool)),
		ServiceCIDRs: Watch(ctx, c, ServiceCIDRs, optional(k, shrinkServiceCIDR)),
		PodPools:     Watch(ctx, c, IPPools, optional(k, shrinkPool)),
		Blocks:       Watch(ctx, c, IPBlocks, optional(k, shrinkBlock)),
		APIServers:   Watch(ctx, c, EndpointSlices, apiServers),
		BGPPeers: Watch(ctx, c, BGPPeers, Options[*v1alpha1.BGPPeer]{Optional: true,
			Shrink: func(p *v1alpha1.BGPPeer) *v1alpha1.BGPPeer { return shrinkPeer(p, "") }}),
		config: watchConfig(ctx, c, k),
	}
}

// Synced reports whether everything was listed at least once.
func (v *BalancerView) Synced() bool {
	return v.Services.Synced() && v.Namespaces.Synced() && v.Nodes.Synced() && v.AddressPools.Synced() &&
		v.ServiceCIDRs.Synced() && v.PodPools.Synced() && v.Blocks.Synced() && v.APIServers.Synced() && v.config.Synced()
}

// Config returns the configuration's data, or nil if there is none.
func (v *BalancerView) Config() map[string]string { return dataOf(v.config) }

// kept has what all stores of a view have in common.
type kept struct {
	changed func()
	refused func(error)
}

func options[T Object](k kept, shrink func(T) T) Options[T] {
	return Options[T]{Shrink: shrink, Changed: k.changed, Refused: k.refused}
}

func optional[T Object](k kept, shrink func(T) T) Options[T] {
	o := options(k, shrink)
	o.Optional = true
	return o
}

func watchConfig(ctx context.Context, c *Client, k kept) *Store[*corev1.ConfigMap] {
	o := options(k, shrinkConfigMap)
	o.Selection = Selection{Namespace: netconf.Namespace, Fields: "metadata.name=" + netconf.ConfigMap}
	return Watch(ctx, c, configMaps, o)
}

// dataOf returns the data of a store's only ConfigMap.
func dataOf(s *Store[*corev1.ConfigMap]) map[string]string {
	for _, m := range s.All() {
		return m.Data
	}
	return nil
}
