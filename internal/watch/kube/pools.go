package kube

import (
	"context"
	"encoding/json"
	"fmt"
	"net/http"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/serializer"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/rest"

	"github.com/fathom-network/fathom/api/v1alpha1"
)

// fathomScheme is of our own kinds, which the API server speaks no protobuf of.
var fathomScheme = func() *runtime.Scheme {
	s := runtime.NewScheme()
	if err := v1alpha1.AddToScheme(s); err != nil {
		panic(err) // the kinds of a package clash
	}
	return s
}()

// fathomClient prepares a connection for our own kinds.
func fathomClient(config *rest.Config, connections *http.Client) (*rest.RESTClient, error) {
	config = rest.CopyConfig(config)
	config.GroupVersion, config.APIPath = &v1alpha1.GroupVersion, "/apis"
	config.ContentType, config.AcceptContentTypes = "", ""
	config.NegotiatedSerializer = serializer.NewCodecFactory(fathomScheme).WithoutConversion()
	client, err := rest.RESTClientForConfigAndClient(config, connections)
	if err != nil {
		return nil, fmt.Errorf("connect to %s: %w", config.Host, err)
	}
	return client, nil
}

// Pools lists the address pools. A cluster without the CRD has none.
func (c *Client) Pools(ctx context.Context) ([]*v1alpha1.IPPool, error) {
	var list v1alpha1.IPPoolList
	if err := c.fathom.Get().Resource("ippools").Do(ctx).Into(&list); isAbsent(err) {
		return nil, nil
	} else if err != nil {
		return nil, fmt.Errorf("list IPPools: %w", err)
	}
	return Pointers(list.Items), nil
}

// Blocks lists the blocks as they are now: what was made before the call is among them, whoever made it.
func (c *Client) Blocks(ctx context.Context) ([]*v1alpha1.IPBlock, error) {
	var list v1alpha1.IPBlockList
	// Without a resource version the answer is at least as new as the request.
	// https://kubernetes.io/docs/reference/using-api/api-concepts/#semantics-for-get-and-list
	if err := c.fathom.Get().Resource("ipblocks").Do(ctx).Into(&list); isAbsent(err) {
		return nil, nil
	} else if err != nil {
		return nil, fmt.Errorf("list IPBlocks: %w", err)
	}
	return Pointers(list.Items), nil
}

// Pointers are those to a list's items, as informers give them out, too.
func Pointers[T any](items []T) []*T {
	list := make([]*T, 0, len(items))
	for i := range items {
		list = append(list, &items[i])
	}
	return list
}

// CreateBlock makes a block, or fails with an error that apierrors.IsAlreadyExists knows.
func (c *Client) CreateBlock(ctx context.Context, b *v1alpha1.IPBlock) (*v1alpha1.IPBlock, error) {
	b = b.DeepCopy()
	b.TypeMeta = metav1.TypeMeta{APIVersion: v1alpha1.GroupVersion.String(), Kind: "IPBlock"}
	made := &v1alpha1.IPBlock{}
	if err := c.fathom.Post().Resource("ipblocks").Body(b).Do(ctx).Into(made); err != nil {
		return nil, fmt.Errorf("create IPBlock %s: %w", b.Name, err)
	}
	return made, nil
}

// DeleteBlock deletes that very block, and none that has its name by now.
func (c *Client) DeleteBlock(ctx context.Context, name string, uid types.UID) error {
	o := &metav1.DeleteOptions{Preconditions: metav1.NewUIDPreconditions(string(uid))}
	if err := c.fathom.Delete().Resource("ipblocks").Name(name).Body(o).Do(ctx).Error(); err != nil {
		return fmt.Errorf("delete IPBlock %s: %w", name, err)
	}
	return nil
}

// SetBlockOwner makes a Node the owner of a block, with which it goes.
func (c *Client) SetBlockOwner(ctx context.Context, name string, uid types.UID, owner metav1.OwnerReference) error {
	patch, err := json.Marshal(map[string]any{"metadata": map[string]any{"uid": uid, "ownerReferences": []metav1.OwnerReference{owner}}})
	if err != nil {
		return err
	}
	if err := c.fathom.Patch(types.MergePatchType).Resource("ipblocks").Name(name).Body(patch).Do(ctx).Error(); err != nil {
		return fmt.Errorf("change the owner of IPBlock %s: %w", name, err)
	}
	return nil
}

// SetPoolStatus writes the status of a pool.
func (c *Client) SetPoolStatus(ctx context.Context, name string, status v1alpha1.IPPoolStatus) error {
	patch, err := json.Marshal(map[string]any{"status": status})
	if err != nil {
		return err
	}
	if err := c.fathom.Patch(types.MergePatchType).Resource("ippools").Name(name).SubResource("status").Body(patch).Do(ctx).Error(); err != nil {
		return fmt.Errorf("write the status of IPPool %s: %w", name, err)
	}
	return nil
}

// SetPoolFinalizers replaces the finalizers of a pool as it was seen: if it has changed since, the error is one that
// apierrors.IsConflict knows. A pool that is gone is not an error.
func (c *Client) SetPoolFinalizers(ctx context.Context, p *v1alpha1.IPPool, finalizers []string) error {
	if finalizers == nil {
		finalizers = []string{}
	}
	patch, err := json.Marshal(map[string]any{"metadata": map[string]any{"uid": p.UID, "resourceVersion": p.ResourceVersion, "finalizers": finalizers}})
	if err != nil {
		return err
	}
	err = c.fathom.Patch(types.MergePatchType).Resource("ippools").Name(p.Name).Body(patch).Do(ctx).Error()
	if err != nil && !apierrors.IsNotFound(err) {
		return fmt.Errorf("change the finalizers of IPPool %s: %w", p.Name, err)
	}
	return nil
}

// DeletePools deletes all pools and their blocks. Pools with finalizers stay until these are removed. Without the kinds,
// there are none.
func (c *Client) DeletePools(ctx context.Context) error {
	for _, resource := range []string{"ippools", "ipblocks"} {
		if err := c.fathom.Delete().Resource(resource).Do(ctx).Error(); err != nil && !apierrors.IsNotFound(err) {
			return fmt.Errorf("delete the %s: %w", resource, err)
		}
	}
	return nil
}

// PoolReference names a pool in events.
func PoolReference(p *v1alpha1.IPPool) corev1.ObjectReference {
	return corev1.ObjectReference{Kind: "IPPool", APIVersion: v1alpha1.GroupVersion.String(), Name: p.Name, UID: p.UID, ResourceVersion: p.ResourceVersion}
}

// BlockReference names a block in events.
func BlockReference(name string, uid types.UID) corev1.ObjectReference {
	return corev1.ObjectReference{Kind: "IPBlock", APIVersion: v1alpha1.GroupVersion.String(), Name: name, UID: uid}
}

// NodeOwner makes what belongs to a Node go with it, by Kubernetes' garbage collector.
func NodeOwner(name string, uid types.UID) metav1.OwnerReference {
	return metav1.OwnerReference{APIVersion: "v1", Kind: "Node", Name: name, UID: uid}
}
