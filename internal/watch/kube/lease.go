package kube

import (
	"context"
	"errors"
	"fmt"
	"time"

	"k8s.io/client-go/tools/leaderelection"
	"k8s.io/client-go/tools/leaderelection/resourcelock"
)

// Lead waits until this process holds the Lease of that name, and then runs lead until the context ends. If the Lease is lost,
// lead's context is cancelled and Lead returns an error.
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
