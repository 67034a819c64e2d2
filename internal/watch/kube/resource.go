package kube

import (
	"context"
	"encoding/json"
	"fmt"
	"strings"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	networkingv1 "k8s.io/api/networking/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/watch"
	"k8s.io/client-go/tools/cache"

	cnp "github.com/fathom-network/fathom/api/clusternetworkpolicy/v1beta1"
	"github.com/fathom-network/fathom/api/v1alpha1"
)

// Object is an object of the API: a pointer to one of its types.
type Object interface {
	metav1.Object
	runtime.Object
}

// Resource is a kind of objects, and how a client lists and watches them. Watch follows it, List reads it once.
type Resource[T Object] struct {
	name string // plural, as errors have it
	// in returns the requests for a namespace; an empty one stands for all, and for kinds that are in none.
	in func(c *Client, namespace string) *cache.ListWatch
}

// The resources that Fathom reads. What a cluster may lack is told by Options.Optional and by List.
var (
	Nodes = Resource[*corev1.Node]{"nodes", func(c *Client, _ string) *cache.ListWatch {
		return requests(c.CoreV1().Nodes())
	}}
	Pods = Resource[*corev1.Pod]{"pods", func(c *Client, namespace string) *cache.ListWatch {
		return requests(c.CoreV1().Pods(namespace))
	}}
	Namespaces = Resource[*corev1.Namespace]{"namespaces", func(c *Client, _ string) *cache.ListWatch {
		return requests(c.CoreV1().Namespaces())
	}}
	Services = Resource[*corev1.Service]{"Services", func(c *Client, namespace string) *cache.ListWatch {
		return requests(c.CoreV1().Services(namespace))
	}}
	EndpointSlices = Resource[*discoveryv1.EndpointSlice]{"EndpointSlices", func(c *Client, namespace string) *cache.ListWatch {
		return requests(c.DiscoveryV1().EndpointSlices(namespace))
	}}
	ServiceCIDRs = Resource[*networkingv1.ServiceCIDR]{"ServiceCIDRs", func(c *Client, _ string) *cache.ListWatch {
		return requests(c.NetworkingV1().ServiceCIDRs())
	}}
	NetworkPolicies = Resource[*networkingv1.NetworkPolicy]{"NetworkPolicies", func(c *Client, namespace string) *cache.ListWatch {
		return requests(c.NetworkingV1().NetworkPolicies(namespace))
	}}
	ClusterNetworkPolicies = Resource[*cnp.ClusterNetworkPolicy]{"ClusterNetworkPolicies", func(c *Client, _ string) *cache.ListWatch {
		return cache.NewFilteredListWatchFromClient(c.policies, "clusternetworkpolicies", "", func(*metav1.ListOptions) {})
	}}
	DaemonSets = Resource[*appsv1.DaemonSet]{"DaemonSets", func(c *Client, namespace string) *cache.ListWatch {
		return requests(c.AppsV1().DaemonSets(namespace))
	}}
	configMaps = Resource[*corev1.ConfigMap]{"ConfigMaps", func(c *Client, namespace string) *cache.ListWatch {
		return requests(c.CoreV1().ConfigMaps(namespace))
	}}
	IPPools      = ours[*v1alpha1.IPPool]("IPPools")
	IPBlocks     = ours[*v1alpha1.IPBlock]("IPBlocks")
	AddressPools = ours[*v1alpha1.AddressPool]("AddressPools")
	BGPPeers     = ours[*v1alpha1.BGPPeer]("BGPPeers")
)

// From returns a resource of a cluster that no Client connects to, such as a test's.
func From[T Object](name string, requests *cache.ListWatch) Resource[T] {
	return Resource[T]{name, func(*Client, string) *cache.ListWatch { return requests }}
}

// requests are those of one of client-go's typed clients.
func requests[L runtime.Object](client interface {
	List(context.Context, metav1.ListOptions) (L, error)
	Watch(context.Context, metav1.ListOptions) (watch.Interface, error)
}) *cache.ListWatch {
	return &cache.ListWatch{
		ListWithContextFunc: func(ctx context.Context, o metav1.ListOptions) (runtime.Object, error) {
			return client.List(ctx, o)
		},
		WatchFuncWithContext: client.Watch,
	}
}

// ours is a resource of Fathom's own API group. None of its kinds is in a namespace.
func ours[T Object](name string) Resource[T] {
	return Resource[T]{name, func(c *Client, _ string) *cache.ListWatch {
		return cache.NewFilteredListWatchFromClient(c.fathom, strings.ToLower(name), "", func(*metav1.ListOptions) {})
	}}
}

// Selection says which objects of a resource are meant. The zero value means all of them.
type Selection struct {
	Namespace string
	// Labels and Fields are selectors as kubectl's --selector and --field-selector take them.
	Labels, Fields string
}

func (s Selection) apply(o *metav1.ListOptions) {
	o.LabelSelector, o.FieldSelector = s.Labels, s.Fields
}

// List reads the current objects of a resource: the result includes everything that was created before the call. It is empty
// where the cluster does not know the kind.
func List[T Object](ctx context.Context, c *Client, r Resource[T], s Selection) ([]T, error) {
	// Without a resource version the answer is at least as new as the request.
	// https://kubernetes.io/docs/reference/using-api/api-concepts/#semantics-for-get-and-list
	var o metav1.ListOptions
	s.apply(&o)
	list, err := r.in(c, s.Namespace).ListWithContext(ctx, o)
	if isAbsent(err) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("list %s: %w", r.name, err)
	}
	all := make([]T, 0, meta.LenList(list))
	err = meta.EachListItem(list, func(o runtime.Object) error {
		all = append(all, o.(T))
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("list %s: %w", r.name, err)
	}
	return all, nil
}

// isAbsent reports whether the API server does not serve a kind, or not in this version. A server that is starting returns
// another error.
func isAbsent(err error) bool { return apierrors.IsNotFound(err) }

// own are Fathom's own kinds.
type own interface {
	Object
	*v1alpha1.IPPool | *v1alpha1.IPBlock | *v1alpha1.AddressPool | *v1alpha1.BGPPeer
}

// SetStatus merges status into the status of an object of one of Fathom's own kinds. An object that is gone is not an error.
func SetStatus[T own](ctx context.Context, c *Client, r Resource[T], name string, status any) error {
	patch, err := json.Marshal(map[string]any{"status": status})
	if err != nil {
		return err
	}
	err = c.fathom.Patch(types.MergePatchType).Resource(strings.ToLower(r.name)).Name(name).SubResource("status").Body(patch).Do(ctx).Error()
	if err != nil && !apierrors.IsNotFound(err) {
		return fmt.Errorf("write the status of %s in %s: %w", name, r.name, err)
	}
	return nil
}

// SetPolicyCondition writes a condition of a ClusterNetworkPolicy as an owner, which leaves those of others alone. A policy that is gone is not
// an error.
func (c *Client) SetPolicyCondition(ctx context.Context, owner, name string, condition metav1.Condition) error {
	body, err := json.Marshal(map[string]any{"apiVersion": cnp.GroupVersion.String(), "kind": "ClusterNetworkPolicy", "metadata": map[string]any{"name": name},
		"status": map[string]any{"conditions": []metav1.Condition{condition}}})
	if err != nil {
		return err
	}
	err = c.policies.Patch(types.ApplyYAMLPatchType).Resource("clusternetworkpolicies").Name(name).SubResource("status").
		Param("fieldManager", owner).Param("force", "true").Body(body).Do(ctx).Error()
	if err != nil && !apierrors.IsNotFound(err) {
		return fmt.Errorf("write condition %s of ClusterNetworkPolicy %s: %w", condition.Type, name, err)
	}
	return nil
}

// DeleteAll deletes all objects of one of Fathom's own kinds. Objects with finalizers remain until the finalizers are removed. A
// cluster that does not know the kind is not an error.
func DeleteAll[T own](ctx context.Context, c *Client, r Resource[T]) error {
	err := c.fathom.Delete().Resource(strings.ToLower(r.name)).Do(ctx).Error()
	if err != nil && !isAbsent(err) {
		return fmt.Errorf("delete all %s: %w", r.name, err)
	}
	return nil
}
