package kube

import (
	"context"
	"fmt"
	"io"
	"time"

	"golang.org/x/sync/errgroup"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/util/yaml"
	"k8s.io/client-go/dynamic"
	"k8s.io/client-go/rest"
)

// Decode reads the objects of a YAML file with documents in it.
func Decode(r io.Reader) ([]*unstructured.Unstructured, error) {
	var objects []*unstructured.Unstructured
	for dec := yaml.NewYAMLOrJSONDecoder(r, 4096); ; {
		o := &unstructured.Unstructured{}
		err := dec.Decode(&o.Object)
		if err == io.EOF {
			return objects, nil
		}
		if err != nil {
			return nil, fmt.Errorf("read object %d of a manifest: %w", len(objects)+1, err)
		}
		if len(o.Object) == 0 {
			continue // only comments
		}
		objects = append(objects, o)
	}
}

// Apply makes objects as they are described, by server-side apply under the name of an owner: fields that
// others set stay as they are, and where two set the same field, the owner wins.
// https://kubernetes.io/docs/reference/using-api/server-side-apply/
//
// What others live in is made before them, and what runs pods last, when everything that pods need is there:
// whatever the order.
func (c *Client) Apply(ctx context.Context, owner string, objects []*unstructured.Unstructured) error {
	client, err := c.dynamic()
	if err != nil {
		return err
	}
	apply := func(o *unstructured.Unstructured) error {
		_, err := resource(client, o).Apply(ctx, o.GetName(), o, metav1.ApplyOptions{FieldManager: owner, Force: true})
		if err != nil {
			return fmt.Errorf("apply %s: %w", describe(o), err)
		}
		return nil
	}
	for rank := range ranks {
		g := errgroup.Group{}
		for _, o := range objects {
			if rankOf(o) == rank {
				g.Go(func() error { return apply(o) })
			}
		}
		if err := g.Wait(); err != nil {
			return err
		}
	}
	for _, o := range objects { // by now most are
		if o.GetKind() == "CustomResourceDefinition" {
			if err := waitEstablished(ctx, resource(client, o), o.GetName()); err != nil {
				return err
			}
		}
	}
	return nil
}

// waitEstablished returns when objects of a new kind can be made.
func waitEstablished(ctx context.Context, crds dynamic.ResourceInterface, name string) error {
	for {
		crd, err := crds.Get(ctx, name, metav1.GetOptions{})
		if err != nil {
			return fmt.Errorf("wait for CustomResourceDefinition %s: %w", name, err)
		}
		found, _, err := unstructured.NestedFieldNoCopy(crd.Object, "status", "conditions")
		if err != nil {
			return err
		}
		conditions, _ := found.([]any) // null, before anyone has looked
		why := "nobody has looked at it yet"
		for _, c := range conditions {
			if c, ok := c.(map[string]any); ok && c["type"] == "Established" {
				if c["status"] == "True" {
					return nil
				}
				why = fmt.Sprint(c["message"])
			}
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("wait for CustomResourceDefinition %s: %w: %s", name, context.Cause(ctx), why)
		case <-time.After(50 * time.Millisecond):
		}
	}
}

// ranks is the number of groups that objects are applied in, each at once. The last is what has pods.
const (
	ranks      = 3
	rankOfPods = ranks - 1
)

func rankOf(o *unstructured.Unstructured) int {
	switch o.GetKind() {
	case "Namespace", "CustomResourceDefinition":
		return 0
	case "DaemonSet", "Deployment", "StatefulSet", "ReplicaSet", "ReplicationController", "Job", "CronJob", "Pod":
		return rankOfPods
	}
	return 1
}

// Delete deletes objects, with what belongs to them, in the reverse of their order. What is not there is not an
// error.
func (c *Client) Delete(ctx context.Context, objects []*unstructured.Unstructured) error {
	client, err := c.dynamic()
	if err != nil {
		return err
	}
	foreground := metav1.DeletePropagationForeground
	for i := len(objects) - 1; i >= 0; i-- {
		o := objects[i]
		err := resource(client, o).Delete(ctx, o.GetName(), metav1.DeleteOptions{PropagationPolicy: &foreground})
		if err != nil && !apierrors.IsNotFound(err) {
			return fmt.Errorf("delete %s: %w", describe(o), err)
		}
	}
	return nil
}

func (c *Client) dynamic() (dynamic.Interface, error) {
	config := rest.CopyConfig(c.config)
	config.ContentType, config.AcceptContentTypes = "", "" // unstructured objects are JSON
	client, err := dynamic.NewForConfig(config)
	if err != nil {
		return nil, fmt.Errorf("connect to %s: %w", config.Host, err)
	}
	return client, nil
}

// resource finds where an object lives. Its kind's plural is guessed by the rule that all kinds in Kubernetes
// and all of ours follow, and its scope is told by its namespace, which saves asking the server for all that
// it has.
func resource(client dynamic.Interface, o *unstructured.Unstructured) dynamic.ResourceInterface {
	plural, _ := meta.UnsafeGuessKindToResource(o.GroupVersionKind())
	if o.GetNamespace() != "" {
		return client.Resource(plural).Namespace(o.GetNamespace())
	}
	return client.Resource(plural)
}

func describe(o *unstructured.Unstructured) string {
	name := o.GetName()
	if o.GetNamespace() != "" {
		name = o.GetNamespace() + "/" + name
	}
	return o.GetKind() + " " + name
}
