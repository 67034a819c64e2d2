package kube

import (
	"context"
	"errors"
	"sync/atomic"
	"time"

	"k8s.io/klog/v2"
)

// untilRetry is the time between two attempts of Until: what is waited for may come with an API server that is starting.
const untilRetry = 100 * time.Millisecond

// Until watches a resource until done returns true. It calls done with every object, and again whenever one changes, from one
// goroutine and never after it has returned. The API server may be starting or unreachable for a moment: failed requests are
// retried, and the last error is returned if ctx ends first.
func Until[T Object](ctx context.Context, c *Client, r Resource[T], selected Selection, done func(T) bool) error {
	watching, stop := context.WithCancel(klog.NewContext(ctx, klog.Logger{})) // the error says what failed last
	defer stop()
	found := false
	var last atomic.Pointer[error]
	s := &Store[T]{
		options: Options[T]{
			Selection: selected, Retry: untilRetry,
			Set: func(o T) {
				if found = found || done(o); found {
					stop()
				}
			},
			Refused: func(error) {},
		},
		// client-go's reflector retries some requests silently, such as those that meet a refused connection.
		asked: func(err error) { last.Store(&err) },
	}
	if s.run(watching, c, r); found {
		return nil
	}
	if err := last.Load(); err != nil {
		return errors.Join(context.Cause(ctx), *err)
	}
	return context.Cause(ctx)
}
