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

// Until returns when done says so of one of the objects: it is given each as it is, and again whenever it changes. The API
// server may be starting or away for a moment: what fails is tried again, and is told when ctx ends. done is called by one
// goroutine, and not after Until has returned.
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
		// client-go's reflector tries some requests again without a word, those of a server that refuses connections.
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
