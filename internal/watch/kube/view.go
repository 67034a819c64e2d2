package kube

import (
	"context"
	"fmt"
	"strings"
	"sync/atomic"
	"time"

	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/cache"

	"github.com/fathom-network/fathom/api/v1alpha1"
	"github.com/fathom-network/fathom/internal/facts/netconf"
)

// View is a live picture of what the network of one node depends on. It is made of watches: what it says may
// be late, and is never half of an object.
type View struct {
	nodes, pods, config, namespaces cache.Indexer
	// What a cluster may not know at all.
	pools, blocks, services, addresses cache.Indexer
	synced                             []func() bool
	bgp                                peerView
	problem                            atomic.Pointer[error]
}

// ViewOptions says what a View shows.
type ViewOptions struct {
	Node                 string // whose pods
	Namespace, ConfigMap string // of the network's configuration
	// Changed is called when the picture has changed. It must not block.
	Changed func()
}

// View begins to watch. The view is empty until Synced.
func (c *Client) View(ctx context.Context, o ViewOptions) (*View, error) {
	v := &View{}
	kinds := informing{
		shrink:  shrink,
		changed: o.Changed,
		refused: func(_ context.Context, _ *cache.Reflector, err error) {
			v.problem.Store(&err)
			o.Changed()
		},
	}
	for _, w := range []watched{
		{&v.nodes, &corev1.Node{}, cache.NewListWatchFromClient(c.CoreV1().RESTClient(), "nodes", "", fields.Everything()), false},
		{&v.pods, &corev1.Pod{}, cache.NewListWatchFromClient(c.CoreV1().RESTClient(), "pods", "", fields.OneTermEqualSelector("spec.nodeName", o.Node)), false},
		{&v.config, &corev1.ConfigMap{}, cache.NewListWatchFromClient(c.CoreV1().RESTClient(), "configmaps", o.Namespace, fields.OneTermEqualSelector("metadata.name", o.ConfigMap)), false},
		{&v.namespaces, &corev1.Namespace{}, cache.NewListWatchFromClient(c.CoreV1().RESTClient(), "namespaces", "", fields.Everything()), false},
		{&v.pools, &v1alpha1.IPPool{}, cache.NewListWatchFromClient(c.fathom, "ippools", "", fields.Everything()), true},
		{&v.blocks, &v1alpha1.IPBlock{}, cache.NewListWatchFromClient(c.fathom, "ipblocks", "", fields.Everything()), true},
		{&v.services, &networkingv1.ServiceCIDR{}, cache.NewListWatchFromClient(c.NetworkingV1().RESTClient(), "servicecidrs", "", fields.Everything()), true},
		{&v.addresses, &v1alpha1.AddressPool{}, cache.NewListWatchFromClient(c.fathom, "addresspools", "", fields.Everything()), true},
	} {
		_, synced, err := inform(ctx, w, kinds)
		if err != nil {
			return nil, err
		}
		v.synced = append(v.synced, synced)
	}
	if err := v.watchPeers(ctx, c, o); err != nil {
		return nil, err
	}
	go func() { // an API server without objects sends no event
		tick := time.NewTicker(20 * time.Millisecond)
		defer tick.Stop()
		for !v.Synced() {
			select {
			case <-ctx.Done():
				return
			case <-tick.C:
			}
		}
		o.Changed()
	}()
	return v, nil
}

// Synced says whether everything was seen at least once.
func (v *View) Synced() bool { return allTrue(v.synced) }

// Problem returns what the last watch that failed said, or nil. It is of interest while the view is not Synced.
func (v *View) Problem() error {
	if p := v.problem.Load(); p != nil {
		return *p
	}
	return nil
}

// Nodes returns the cluster's nodes, in no order.
func (v *View) Nodes() []*corev1.Node { return all[*corev1.Node](v.nodes) }

// Node returns a node, or an empty one and false if there is none of the name.
func (v *View) Node(name string) (*corev1.Node, bool) {
	o, found, err := v.nodes.GetByKey(name)
	if err != nil || !found {
		return &corev1.Node{}, false
	}
	return o.(*corev1.Node), true
}

// Pods returns the node's pods, in no order.
func (v *View) Pods() []*corev1.Pod { return all[*corev1.Pod](v.pods) }

// Pod returns a pod of the node.
func (v *View) Pod(namespace, name string) (*corev1.Pod, bool) {
	o, found, err := v.pods.GetByKey(namespace + "/" + name)
	if err != nil || !found {
		return nil, false
	}
	return o.(*corev1.Pod), true
}

// Pools returns the cluster's address pools, in no order.
func (v *View) Pools() []*v1alpha1.IPPool { return all[*v1alpha1.IPPool](v.pools) }

// Blocks returns the blocks of all nodes, in no order.
func (v *View) Blocks() []*v1alpha1.IPBlock { return all[*v1alpha1.IPBlock](v.blocks) }

// ServiceCIDRs returns the ranges of Services, in no order.
func (v *View) ServiceCIDRs() []*networkingv1.ServiceCIDR {
	return all[*networkingv1.ServiceCIDR](v.services)
}

// AddressPools returns the pools of load balancers' addresses, in no order.
func (v *View) AddressPools() []*v1alpha1.AddressPool {
	return all[*v1alpha1.AddressPool](v.addresses)
}

// Namespace returns a namespace.
func (v *View) Namespace(name string) (*corev1.Namespace, bool) {
	o, found, err := v.namespaces.GetByKey(name)
	if err != nil || !found {
		return nil, false
	}
	return o.(*corev1.Namespace), true
}

// Namespaces returns the cluster's namespaces, in no order.
func (v *View) Namespaces() []*corev1.Namespace { return all[*corev1.Namespace](v.namespaces) }

// isAbsent says that the API server does not know a kind, or not in this version. One that is starting says
// something else.
func isAbsent(err error) bool { return apierrors.IsNotFound(err) }

// Config returns the configuration's data, or nil if there is none.
func (v *View) Config() map[string]string {
	for _, m := range all[*corev1.ConfigMap](v.config) {
		return m.Data
	}
	return nil
}

func all[T any](i cache.Indexer) []T {
	objects := i.List()
	typed := make([]T, 0, len(objects))
	for _, o := range objects {
		typed = append(typed, o.(T))
	}
	return typed
}

// TaintToBeDeleted is on a node that the cluster autoscaler drains to take it away (KEP-3836).
const TaintToBeDeleted = "ToBeDeletedByClusterAutoscaler"

// shrink keeps of an object what the network looks at: a Node alone is 10 KiB and more, most of it the list of
// its images, and an agent holds all nodes.
func shrink(o any) (any, error) {
	switch o := o.(type) {
	case *corev1.Node:
		small := &corev1.Node{ObjectMeta: shrinkMeta(&o.ObjectMeta)}
		small.Labels = o.Labels
		small.Spec.PodCIDR, small.Spec.PodCIDRs = o.Spec.PodCIDR, o.Spec.PodCIDRs
		small.Status.Addresses = o.Status.Addresses
		for _, t := range o.Spec.Taints {
			if t.Key == TaintToBeDeleted {
				small.Spec.Taints = append(small.Spec.Taints, corev1.Taint{Key: t.Key, Effect: t.Effect})
			}
		}
		for _, c := range o.Status.Conditions {
			if c.Type == corev1.NodeNetworkUnavailable || c.Type == corev1.NodeReady { // the one is ours to set; times change every few minutes
				small.Status.Conditions = append(small.Status.Conditions, corev1.NodeCondition{Type: c.Type, Status: c.Status})
			}
		}
		return small, nil
	case *corev1.Pod:
		small := &corev1.Pod{ObjectMeta: shrinkMeta(&o.ObjectMeta)}
		small.Spec.NodeName, small.Spec.HostNetwork = o.Spec.NodeName, o.Spec.HostNetwork
		if hash, found := o.Annotations[corev1.MirrorPodAnnotationKey]; found {
			if small.Annotations == nil {
				small.Annotations = map[string]string{}
			}
			small.Annotations[corev1.MirrorPodAnnotationKey] = hash
		}
		small.Status.Phase, small.Status.PodIP, small.Status.PodIPs = o.Status.Phase, o.Status.PodIP, o.Status.PodIPs
		return small, nil
	case *corev1.Namespace:
		small := &corev1.Namespace{ObjectMeta: shrinkMeta(&o.ObjectMeta)}
		small.Labels = o.Labels
		return small, nil
	case *v1alpha1.IPPool:
		small := *o
		small.ManagedFields, small.Annotations = nil, nil
		return &small, nil
	case *v1alpha1.AddressPool:
		small := *o
		small.ManagedFields, small.Annotations = nil, nil
		return &small, nil
	case *v1alpha1.IPBlock:
		small := &v1alpha1.IPBlock{ObjectMeta: shrinkMeta(&o.ObjectMeta), Spec: o.Spec}
		small.OwnerReferences = o.OwnerReferences
		return small, nil
	case *networkingv1.ServiceCIDR:
		small := &networkingv1.ServiceCIDR{ObjectMeta: shrinkMeta(&o.ObjectMeta)}
		small.Spec.CIDRs = o.Spec.CIDRs
		return small, nil
	case *corev1.ConfigMap:
		return &corev1.ConfigMap{ObjectMeta: shrinkMeta(&o.ObjectMeta), Data: o.Data}, nil
	}
	return o, nil
}

func shrinkMeta(m *metav1.ObjectMeta) metav1.ObjectMeta {
	small := metav1.ObjectMeta{Name: m.Name, Namespace: m.Namespace, UID: m.UID, ResourceVersion: m.ResourceVersion,
		CreationTimestamp: m.CreationTimestamp, DeletionTimestamp: m.DeletionTimestamp}
	for k, a := range m.Annotations {
		if strings.HasPrefix(k, netconf.AnnotationPrefix) {
			if small.Annotations == nil {
				small.Annotations = map[string]string{}
			}
			small.Annotations[k] = a
		}
	}
	return small
}

func connect(config *rest.Config) (*Client, error) {
	config.QPS, config.Burst = 200, 400
	// Protobuf costs a fraction of JSON on both sides, and a lab's control plane has little to spare.
	config.ContentType = "application/vnd.kubernetes.protobuf"
	config.AcceptContentTypes = "application/vnd.kubernetes.protobuf,application/json"
	// Both share connections. client-go would not see that two dialers are the same, and would keep apart what each dials.
	dialer := newDialer()
	dialing := rest.CopyConfig(config)
	dialing.Dial = dialer.DialContext
	client, err := rest.HTTPClientFor(dialing)
	if err != nil {
		return nil, fmt.Errorf("connect to %s: %w", config.Host, err)
	}
	set, err := kubernetes.NewForConfigAndClient(dialing, client)
	if err != nil {
		return nil, fmt.Errorf("connect to %s: %w", config.Host, err)
	}
	own, err := fathomClient(config, client)
	if err != nil {
		return nil, err
	}
	return &Client{Interface: set, config: config, dialer: dialer, fathom: own}, nil
}
