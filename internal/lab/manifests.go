package lab

import (
	"context"
	"fmt"

	"golang.org/x/sync/errgroup"

	"github.com/fathom-network/fathom/internal/facts/manifest"
	"github.com/fathom-network/fathom/internal/facts/topology"
	"github.com/fathom-network/fathom/internal/watch/kube"
)

// manifestOwner is the field manager of users' manifests.
const manifestOwner = "fathom-up"

// manifests applies the users' manifests of a lab's clusters at the same time as the other steps, none of which needs them. What has pods
// waits for nodes: the scheduler would put all of them on the first that is Ready. One that cannot be applied ends no other
// step: the clusters would have to be made anew, where they only lack the object.
type manifests struct {
	apply func(c *topology.Cluster, client *kube.Client, nodes <-chan struct{})
	wait  func() error // for all that apply has begun
}

// beginManifests returns what applies manifests, and a function that ends it.
func (l *Lab) beginManifests(ctx context.Context, t *timeline) (*manifests, func()) {
	ctx, cancel := context.WithCancel(ctx)
	var g errgroup.Group // without a context: what can be applied to other clusters is
	apply := func(c *topology.Cluster, client *kube.Client, nodes <-chan struct{}) {
		if len(c.Manifests) > 0 {
			g.Go(func() error { return applyManifests(ctx, c, client, nodes, t) })
		}
	}
	stop := func() {
		cancel()
		_ = g.Wait()
	}
	return &manifests{apply: apply, wait: g.Wait}, stop
}

func applyManifests(ctx context.Context, c *topology.Cluster, client *kube.Client, nodes <-chan struct{}, t *timeline) error {
	var objects []manifest.Object
	for _, m := range c.Manifests {
		objects = append(objects, m.Objects...)
	}
	err := t.detailed(c.Name, fmt.Sprintf("apply %d manifest%s", len(c.Manifests), plural(len(c.Manifests))), func(say func(string)) error {
		return withTimeout(ctx, apiTimeout, func(ctx context.Context) error {
			return client.ApplyManifests(ctx, manifestOwner, objects, nodes, say)
		})
	})
	if err != nil {
		return fmt.Errorf("cluster %s: %w\nthe cluster is up but for that: mend the file, and the same `fathom up` goes on", c.Name, err)
	}
	return nil
}
