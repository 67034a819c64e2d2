package kube

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/util/yaml"
	"k8s.io/client-go/kubernetes/scheme"
	"k8s.io/client-go/rest"
)

// Create makes the objects of a manifest, in its order. One that is there is left as it is. The kinds are
// Kubernetes' own: their resources have regular names, and are found without asking the server.
//
// A server that has only begun to serve refuses what it is not ready for, such as a Service, whose address comes
// from a range that it has not read yet. It is asked again until ctx ends.
func (c *Client) Create(ctx context.Context, manifest []byte) error {
	for _, doc := range documents(manifest) {
		object, _, err := scheme.Codecs.UniversalDeserializer().Decode(doc, nil, nil)
		if err != nil {
			return fmt.Errorf("read a manifest: %w", err)
		}
		if err := c.create(ctx, object); err != nil && !apierrors.IsAlreadyExists(err) {
			return err
		}
	}
	return nil
}

func (c *Client) create(ctx context.Context, object runtime.Object) error {
	kinds, _, err := scheme.Scheme.ObjectKinds(object)
	if err != nil {
		return err
	}
	named, err := meta.Accessor(object)
	if err != nil {
		return err
	}
	kind, namespace := kinds[0], named.GetNamespace()
	resource, _ := meta.UnsafeGuessKindToResource(kind)
	config := rest.CopyConfig(c.config)
	config.NegotiatedSerializer = scheme.Codecs.WithoutConversion()
	version := kind.GroupVersion()
	config.GroupVersion = &version
	if config.APIPath = "/apis"; kind.Group == "" {
		config.APIPath = "/api"
	}
	client, err := rest.RESTClientFor(config)
	if err != nil {
		return fmt.Errorf("connect to %s: %w", config.Host, err)
	}
	err = WhenStarted(ctx, func() error {
		// The client's own retries wait for whole seconds.
		return client.Post().MaxRetries(0).NamespaceIfScoped(namespace, namespace != "").Resource(resource.Resource).
			Body(object).Do(ctx).Error()
	})
	if err != nil {
		return fmt.Errorf("create %s %s: %w", kind.Kind, named.GetName(), err)
	}
	return nil
}

// WhenStarted does something with a server that has only begun to serve, again until it is not refused for that,
// or ctx ends.
func WhenStarted(ctx context.Context, do func() error) error { return again(ctx, do, startsYet) }

// again calls do until it succeeds, it fails with an error that is not worth waiting for, or ctx ends.
func again(ctx context.Context, do func() error, wait func(error) bool) error {
	for {
		err := do()
		if err == nil || !wait(err) {
			return err
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("%w (last: %w)", context.Cause(ctx), err)
		case <-time.After(askAgain):
		}
	}
}

// startsYet says whether a server may answer so because its own controllers have not made yet what it needs: the
// namespaces of the system, the ranges of the Services' addresses.
func startsYet(err error) bool {
	return apierrors.IsNotFound(err) || apierrors.IsInternalError(err) || apierrors.IsServiceUnavailable(err) ||
		apierrors.IsServerTimeout(err) || apierrors.IsTimeout(err) || apierrors.IsTooManyRequests(err) || hasNoRangeYet(err)
}

// hasNoRangeYet says whether a Service's address was refused. The API server's allocator takes an address for one of no
// range until it has heard of the ServiceCIDR that the server itself makes, in the first moments of a cluster.
func hasNoRangeYet(err error) bool {
	var status apierrors.APIStatus
	if !apierrors.IsInvalid(err) || !errors.As(err, &status) || status.Status().Details == nil {
		return false
	}
	return slices.ContainsFunc(status.Status().Details.Causes, func(c metav1.StatusCause) bool { return c.Field == "spec.clusterIPs" })
}

// documents are the parts of a YAML stream that hold more than comments.
func documents(manifest []byte) [][]byte {
	var docs [][]byte
	for r := yaml.NewYAMLReader(bufio.NewReader(bytes.NewReader(manifest))); ; {
		doc, err := r.Read()
		if err != nil {
			return docs // reading memory, the one error is its end
		}
		for line := range bytes.Lines(doc) {
			line = bytes.TrimSpace(line)
			if len(line) > 0 && line[0] != '#' && !bytes.Equal(line, []byte("---")) {
				docs = append(docs, doc)
				break
			}
		}
	}
}
