package kube_test

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/fathom-network/fathom/internal/testenv"
	"github.com/fathom-network/fathom/internal/watch/kube"
)

// written is what writes have done.
type written struct {
	mu   sync.Mutex
	list []string
}

func (w *written) add(s string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.list = append(w.list, s)
}

func (w *written) await(t *testing.T, want ...string) {
	t.Helper()
	testenv.Eventually(t, fmt.Sprint("written: ", want), func() (bool, string) {
		w.mu.Lock()
		defer w.mu.Unlock()
		return slices.Equal(w.list, want), fmt.Sprint(w.list)
	})
}

func publisher(t *testing.T) *kube.Publisher {
	p := kube.NewPublisher(slog.New(slog.DiscardHandler), func() {})
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		p.Run(ctx)
	}()
	t.Cleanup(func() {
		cancel()
		<-ended
	})
	return p
}

// TestPublisherHangs: while the API server says nothing, nobody waits, and of what was asked for the latest is written.
func TestPublisherHangs(t *testing.T) {
	p, w := publisher(t), &written{}
	answers, begun := make(chan struct{}), make(chan struct{}, 1)
	p.Publish("node", func(ctx context.Context) error {
		begun <- struct{}{}
		select {
		case <-answers:
		case <-ctx.Done():
		}
		w.add("first")
		return nil
	})
	<-begun
	for i := range 1000 {
		p.Publish("node", func(context.Context) error {
			w.add(fmt.Sprint(i))
			return nil
		})
	}
	p.Publish("other", func(context.Context) error {
		w.add("other")
		return nil
	})
	w.await(t, "other")
	close(answers)
	w.await(t, "other", "first", "999")
}

// TestPublisherTriesAgain: what fails is tried again as it is by then, is told as long as it fails, and may be withdrawn.
func TestPublisherTriesAgain(t *testing.T) {
	p, w := publisher(t), &written{}
	var fails sync.WaitGroup
	fails.Add(1)
	once := sync.OnceFunc(fails.Done)
	p.Publish("a", func(context.Context) error {
		once()
		return errors.New("refused")
	})
	fails.Wait()
	testenv.Eventually(t, "the failure is told", func() (bool, string) {
		err := p.Err()
		return err != nil && err.Error() == "refused", fmt.Sprint(err)
	})
	p.Publish("a", func(context.Context) error {
		w.add("a")
		return nil
	})
	w.await(t, "a")
	testenv.Eventually(t, "nothing fails", func() (bool, string) { return p.Err() == nil, fmt.Sprint(p.Err()) })

	failed := make(chan struct{}, 100)
	p.Publish("b", func(context.Context) error {
		failed <- struct{}{}
		return errors.New("refused")
	})
	<-failed
	p.Withdraw("b")
	testenv.Eventually(t, "nothing fails", func() (bool, string) { return p.Err() == nil, fmt.Sprint(p.Err()) })
}

// TestPublisherLosesNothing: whatever the order of asking, failing and trying again, the last write that was asked for is
// the last that was made.
func TestPublisherLosesNothing(t *testing.T) {
	p := publisher(t)
	const objects, rounds = 20, 100
	var mu sync.Mutex
	last, n := map[string]int{}, 0
	var wg sync.WaitGroup
	for o := range objects {
		object := fmt.Sprint("object", o)
		wg.Go(func() {
			for i := range rounds {
				p.Publish(object, func(context.Context) error {
					mu.Lock()
					defer mu.Unlock()
					if n++; n%7 == 0 {
						return errors.New("now and then")
					}
					last[object] = i
					return nil
				})
				if i%10 == 0 {
					time.Sleep(time.Millisecond)
				}
			}
		})
	}
	wg.Wait()
	testenv.Eventually(t, "all are written", func() (bool, string) {
		mu.Lock()
		defer mu.Unlock()
		for o := range objects {
			if last[fmt.Sprint("object", o)] != rounds-1 {
				return false, fmt.Sprint(last)
			}
		}
		return true, ""
	})
}
