package kube

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"time"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	networkingv1 "k8s.io/api/networking/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/tools/cache"
	"k8s.io/client-go/tools/leaderelection"
	"k8s.io/client-go/tools/leaderelection/resourcelock"

	"github.com/fathom-network/fathom/api/v1alpha1"
	"github.com/fathom-network/fathom/internal/facts/netconf"
	"github.com/fathom-network/fathom/internal/facts/service"
)

// BalancerView is a live picture of what Services' addresses follow from: Services, pools, what pools must not overlap, and
// the network's configuration. It has the blocks of pods' pools, too.
type BalancerView struct {
	services, namespaces, nodes, ranges, pools, podPools, blocks, peers, config, apiServers cache.Indexer

	synced []func() bool
}

// BalancerView begins to watch. The view is empty until Synced. owner is the field manager of statuses that are kept an
// eye on whatever has become of their Service.
func (c *Client) BalancerView(ctx context.Context, owner string, changed func()) (*BalancerView, error) {
	v := &BalancerView{}
	core := c.CoreV1().RESTClient()
	all := fields.Everything()
	o := informing{
		shrink:  func(o any) (any, error) { return shrinkBalancer(o, owner) },
		changed: changed,
		refused: cache.DefaultWatchErrorHandler,
	}
	for _, w := range []watched{
		{&v.services, &corev1.Service{}, cache.NewListWatchFromClient(core, "services", "", all), false},
		{&v.namespaces, &corev1.Namespace{}, cache.NewListWatchFromClient(core, "namespaces", "", all), false},
		{&v.nodes, &corev1.Node{}, cache.NewListWatchFromClient(core, "nodes", "", all), false},
		{&v.ranges, &networkingv1.ServiceCIDR{}, cache.NewListWatchFromClient(c.NetworkingV1().RESTClient(), "servicecidrs", "", all), true},
		{&v.pools, &v1alpha1.AddressPool{}, cache.NewListWatchFromClient(c.fathom, "addresspools", "", all), false},
		{&v.podPools, &v1alpha1.IPPool{}, cache.NewListWatchFromClient(c.fathom, "ippools", "", all), true},
		{&v.blocks, &v1alpha1.IPBlock{}, cache.NewListWatchFromClient(c.fathom, "ipblocks", "", all), true},
		{&v.config, &corev1.ConfigMap{}, cache.NewListWatchFromClient(core, "configmaps", netconf.Namespace, fields.OneTermEqualSelector("metadata.name", netconf.ConfigMap)), false},
		{&v.apiServers, &discoveryv1.EndpointSlice{}, cache.NewListWatchFromClient(c.DiscoveryV1().RESTClient(), "endpointslices", metav1.NamespaceDefault,
			fields.OneTermEqualSelector("metadata.name", apiServerSlice)), false},
	} {
		informer, synced, err := inform(ctx, w, o)
		if err != nil {
			return nil, err
		}
		v.synced = append(v.synced, synced)
		go func() { // a list without objects is no event
			if cache.WaitForCacheSync(ctx.Done(), informer.HasSynced) {
				changed()
			}
		}()
	}
	// What agents say of their sessions is nothing to act on: there may be many of them, and they say much when a router ends.
	o.changed = func() {}
	peers := watched{&v.peers, &v1alpha1.BGPPeer{}, cache.NewListWatchFromClient(c.fathom, bgpPeers, "", all), true}
	if _, _, err := inform(ctx, peers, o); err != nil {
		return nil, err
	}
	return v, nil
}

// apiServerSlice is the EndpointSlice in which API servers write down where they are.
const apiServerSlice = "kubernetes"

// shrinkBalancer keeps of a Service what says whose addresses it has and asks for.
func shrinkBalancer(o any, owner string) (any, error) {
	if p, ok := o.(*v1alpha1.BGPPeer); ok {
		return shrinkPeer(p, ""), nil
	}
	s, ok := o.(*corev1.Service)
	if !ok {
		return shrink(o)
	}
	small := &corev1.Service{ObjectMeta: shrinkMeta(&s.ObjectMeta)}
	small.Labels, small.Finalizers, small.Spec, small.Status.LoadBalancer = s.Labels, s.Finalizers, s.Spec, s.Status.LoadBalancer
	small.Spec.Selector = nil
	if ranges, found := s.Annotations[corev1.AnnotationLoadBalancerSourceRangesKey]; found {
		if small.Annotations == nil {
			small.Annotations = map[string]string{}
		}
		small.Annotations[corev1.AnnotationLoadBalancerSourceRangesKey] = ranges
	}
	for _, m := range s.ManagedFields {
		if m.Manager == owner {
			small.ManagedFields = append(small.ManagedFields, metav1.ManagedFieldsEntry{Manager: m.Manager, Subresource: m.Subresource, Operation: m.Operation})
		}
	}
	return small, nil
}

// Synced says whether everything was seen at least once.
func (v *BalancerView) Synced() bool { return allTrue(v.synced) }

// Services returns the cluster's Services, in no order.
func (v *BalancerView) Services() []*corev1.Service { return all[*corev1.Service](v.services) }

// Service returns a Service, or nil.
func (v *BalancerView) Service(name service.Name) *corev1.Service {
	o, found, err := v.services.GetByKey(name.String())
	if err != nil || !found {
		return nil
	}
	return o.(*corev1.Service)
}

// Namespaces returns the cluster's namespaces, in no order.
func (v *BalancerView) Namespaces() []*corev1.Namespace { return all[*corev1.Namespace](v.namespaces) }

// Nodes returns the cluster's nodes, in no order.
func (v *BalancerView) Nodes() []*corev1.Node { return all[*corev1.Node](v.nodes) }

// ServiceCIDRs returns the ranges of Services, in no order.
func (v *BalancerView) ServiceCIDRs() []*networkingv1.ServiceCIDR {
	return all[*networkingv1.ServiceCIDR](v.ranges)
}

// AddressPools returns the pools of load balancers' addresses, in no order.
func (v *BalancerView) AddressPools() []*v1alpha1.AddressPool {
	return all[*v1alpha1.AddressPool](v.pools)
}

// PodPools returns the pools of pods' addresses, in no order.
func (v *BalancerView) PodPools() []*v1alpha1.IPPool { return all[*v1alpha1.IPPool](v.podPools) }

// Blocks returns the blocks of pods' pools, in no order.
func (v *BalancerView) Blocks() []*v1alpha1.IPBlock { return all[*v1alpha1.IPBlock](v.blocks) }

// BGPPeers returns those that were seen up to now, in no order. Of the sessions in their status the nodes' names are there.
// Changes of them are not told.
func (v *BalancerView) BGPPeers() []*v1alpha1.BGPPeer { return all[*v1alpha1.BGPPeer](v.peers) }

// Config returns the configuration's data, or nil if there is none.
func (v *BalancerView) Config() map[string]string {
	for _, m := range all[*corev1.ConfigMap](v.config) {
		return m.Data
	}
	return nil
}

// APIServers returns the EndpointSlices of the API servers themselves.
func (v *BalancerView) APIServers() []*discoveryv1.EndpointSlice {
	return all[*discoveryv1.EndpointSlice](v.apiServers)
}

// SetIngress writes the load balancer's addresses into the status of a Service as it was seen, and with them its
// finalizers, which the subresource takes, too: if it has changed since,
// the error is one that apierrors.IsConflict knows. A Service that is gone is not an error.
func (c *Client) SetIngress(ctx context.Context, s *corev1.Service, owner string, ingress []corev1.LoadBalancerIngress, finalizers []string) error {
	if ingress == nil {
		ingress = []corev1.LoadBalancerIngress{}
	}
	if finalizers == nil {
		finalizers = []string{}
	}
	patch, err := json.Marshal(map[string]any{
		"metadata": map[string]any{"uid": s.UID, "resourceVersion": s.ResourceVersion, "finalizers": finalizers},
		"status":   map[string]any{"loadBalancer": map[string]any{"ingress": ingress}},
	})
	if err != nil {
		return err
	}
	_, err = c.CoreV1().Services(s.Namespace).Patch(ctx, s.Name, types.MergePatchType, patch, metav1.PatchOptions{FieldManager: owner}, "status")
	if err != nil && !apierrors.IsNotFound(err) {
		return fmt.Errorf("write the status of Service %s/%s: %w", s.Namespace, s.Name, err)
	}
	return nil
}

// SetAddressPoolStatus writes the status of a pool. One that is gone is not an error.
func (c *Client) SetAddressPoolStatus(ctx context.Context, name string, status v1alpha1.AddressPoolStatus) error {
	patch, err := json.Marshal(map[string]any{"status": status})
	if err != nil {
		return err
	}
	err = c.fathom.Patch(types.MergePatchType).Resource("addresspools").Name(name).SubResource("status").Body(patch).Do(ctx).Error()
	if err != nil && !apierrors.IsNotFound(err) {
		return fmt.Errorf("write the status of AddressPool %s: %w", name, err)
	}
	return nil
}

// BalancerObjects are what load balancers' addresses follow from beside the Services, as they are now.
type BalancerObjects struct {
	AddressPools []*v1alpha1.AddressPool
	PodPools     []*v1alpha1.IPPool
	ServiceCIDRs []*networkingv1.ServiceCIDR
	Namespaces   []*corev1.Namespace
}

// BalancerObjects reads what a BalancerView watches, once. Kinds that the cluster does not have are empty.
func (c *Client) BalancerObjects(ctx context.Context) (BalancerObjects, error) {
	var o BalancerObjects
	var list v1alpha1.AddressPoolList
	if err := c.fathom.Get().Resource("addresspools").Do(ctx).Into(&list); err != nil && !isAbsent(err) {
		return o, fmt.Errorf("list AddressPools: %w", err)
	}
	o.AddressPools = Pointers(list.Items)
	var err error
	if o.PodPools, err = c.Pools(ctx); err != nil {
		return o, err
	}
	ranges, err := c.NetworkingV1().ServiceCIDRs().List(ctx, metav1.ListOptions{})
	if err != nil && !isAbsent(err) {
		return o, fmt.Errorf("list ServiceCIDRs: %w", err)
	}
	o.ServiceCIDRs = Pointers(ranges.Items)
	namespaces, err := c.CoreV1().Namespaces().List(ctx, metav1.ListOptions{})
	if err != nil {
		return o, fmt.Errorf("list namespaces: %w", err)
	}
	o.Namespaces = Pointers(namespaces.Items)
	return o, nil
}

// DeleteAddressPools deletes all pools. Without the kind, there are none.
func (c *Client) DeleteAddressPools(ctx context.Context) error {
	err := c.fathom.Delete().Resource("addresspools").Do(ctx).Error()
	if err != nil && !apierrors.IsNotFound(err) {
		return fmt.Errorf("delete the address pools: %w", err)
	}
	return nil
}

// AddressPoolReference names a pool in events.
func AddressPoolReference(p *v1alpha1.AddressPool) corev1.ObjectReference {
	return corev1.ObjectReference{Kind: "AddressPool", APIVersion: v1alpha1.GroupVersion.String(), Name: p.Name, UID: p.UID, ResourceVersion: p.ResourceVersion}
}

// EnsureSecret makes a Secret with this data, unless there is one of the name.
func (c *Client) EnsureSecret(ctx context.Context, namespace, name string, data map[string][]byte) error {
	_, err := c.CoreV1().Secrets(namespace).Create(ctx, &corev1.Secret{
		ObjectMeta: metav1.ObjectMeta{Name: name, Namespace: namespace, Labels: map[string]string{"app.kubernetes.io/part-of": "fathom"}}, Data: data,
	}, metav1.CreateOptions{})
	if err != nil && !apierrors.IsAlreadyExists(err) {
		return fmt.Errorf("create Secret %s/%s: %w", namespace, name, err)
	}
	return nil
}

// Lead waits until the process is the one that leads, of all that ask for the Lease of the name, and runs lead, until the
// context ends. If the Lease is lost meanwhile, lead's context ends, and then so does Lead, with an error.
func (c *Client) Lead(ctx context.Context, namespace, name, identity string, lead func(context.Context) error) error {
	lock, err := resourcelock.New(resourcelock.LeasesResourceLock, namespace, name, c.CoreV1(), c.CoordinationV1(), resourcelock.ResourceLockConfig{Identity: identity})
	if err != nil {
		return fmt.Errorf("lead by Lease %s/%s: %w", namespace, name, err)
	}
	ctx, stop := context.WithCancel(ctx)
	defer stop()
	result := make(chan error, 1)
	elector, err := leaderelection.NewLeaderElector(leaderelection.LeaderElectionConfig{
		Lock: lock, Name: name, ReleaseOnCancel: true,
		// A node that lost power is not waited for long. The API server's own load is one request in two seconds.
		LeaseDuration: 10 * time.Second, RenewDeadline: 7 * time.Second, RetryPeriod: 2 * time.Second,
		Callbacks: leaderelection.LeaderCallbacks{
			OnStartedLeading: func(ctx context.Context) {
				result <- lead(ctx)
				stop()
			},
			OnStoppedLeading: func() {},
		},
	})
	if err != nil {
		return fmt.Errorf("lead by Lease %s/%s: %w", namespace, name, err)
	}
	elector.Run(ctx)
	if ctx.Err() == nil {
		return fmt.Errorf("lead by Lease %s/%s: %w", namespace, name, errLostLease)
	}
	select {
	case err := <-result:
		return err
	default:
		return nil
	}
}

var errLostLease = errors.New("another has it, or the API server did not answer in time")
