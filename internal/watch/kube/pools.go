package kube

import (
	"context"
	"encoding/json"
	"fmt"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/fathom-network/fathom/api/v1alpha1"
)

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

// NodeOwner makes what belongs to a Node go with it, by Kubernetes' garbage collector.
func NodeOwner(name string, uid types.UID) metav1.OwnerReference {
	return metav1.OwnerReference{APIVersion: "v1", Kind: "Node", Name: name, UID: uid}
}
