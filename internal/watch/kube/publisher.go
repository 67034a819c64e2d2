package kube

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"slices"
	"sync"
	"time"

	"k8s.io/client-go/util/workqueue"
)

// Publisher makes a control loop's writes to the API in the background, so that the loop never waits for an API server
// that is slow, refuses, or does not answer. For each object only the latest write counts: one that has not been made
// when the next is asked for is not made any more, so what waits is bounded by the number of objects. Writes of one
// object are made one after the other; one that fails is made again, later each time.
type Publisher struct {
	log     *slog.Logger
	changed func()
	queue   workqueue.TypedRateLimitingInterface[string]

	mu     sync.Mutex
	writes map[string]*write // by object, until they are made
	failed map[string]error  // by object, of the last attempt
}

type write struct {
	make func(context.Context) error
}

const (
	// publishers is how many writes are under way at most.
	publishers = 4
	// publishPatience bounds an attempt, in which client-go follows Retry-After.
	publishPatience = 10 * time.Second
	// firstRetry and lastRetry are the waits after the first failure of an object's write and after many.
	firstRetry, lastRetry = 250 * time.Millisecond, 10 * time.Second
)

// NewPublisher makes a Publisher that writes nothing until it runs. changed is called when Err has changed; it must not
// block.
func NewPublisher(log *slog.Logger, changed func()) *Publisher {
	return &Publisher{
		log: log, changed: changed, writes: map[string]*write{}, failed: map[string]error{},
		queue: workqueue.NewTypedRateLimitingQueue(workqueue.NewTypedItemExponentialFailureRateLimiter[string](firstRetry, lastRetry)),
	}
}

// Run makes writes until the context ends. No write is under way when it returns.
func (p *Publisher) Run(ctx context.Context) {
	var workers sync.WaitGroup
	for range publishers {
		workers.Go(func() {
			for p.next(ctx) {
			}
		})
	}
	<-ctx.Done()
	p.queue.ShutDown()
	workers.Wait()
}

// Publish asks for a write of an object, in place of one that is not made yet. object is any name for it that is the
// loop's own. The write may run while the loop does, and must bear to be repeated. It does not wait.
func (p *Publisher) Publish(object string, do func(context.Context) error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.writes[object] = &write{do}
	if p.queue.NumRequeues(object) == 0 { // else it waits for its next attempt, which makes this write
		p.queue.Add(object)
	}
}

// Withdraw takes back a write that is not made yet: the API says by now what it should, or the object is gone.
func (p *Publisher) Withdraw(object string) {
	p.mu.Lock()
	delete(p.writes, object)
	_, had := p.failed[object]
	delete(p.failed, object)
	p.queue.Forget(object)
	p.mu.Unlock()
	if had {
		p.changed()
	}
}

// Err says which writes failed when they were tried last; nil is none.
func (p *Publisher) Err() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	const most = 3
	var errs []error
	for _, object := range slices.Sorted(maps.Keys(p.failed)) {
		if len(errs) == most {
			errs = append(errs, fmt.Errorf("and %d more", len(p.failed)-most))
			break
		}
		errs = append(errs, p.failed[object])
	}
	return errors.Join(errs...)
}

// next makes a write, and says whether there may be others.
func (p *Publisher) next(ctx context.Context) bool {
	object, down := p.queue.Get()
	if down || ctx.Err() != nil {
		return false
	}
	defer p.queue.Done(object)
	p.mu.Lock()
	w := p.writes[object]
	p.mu.Unlock()
	if w == nil { // withdrawn
		p.queue.Forget(object)
		return true
	}
	attempt, cancel := context.WithTimeout(ctx, publishPatience)
	err := w.make(attempt)
	cancel()

	if p.made(object, w, err, ctx.Err() != nil) {
		p.changed()
	}
	return true
}

// made notes how an attempt went and sees to the next, and says whether Err has changed. Queue and writes change
// together, or a write that is asked for at this moment would be neither queued nor waiting for an attempt.
func (p *Publisher) made(object string, w *write, err error, ending bool) (changed bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	_, had := p.failed[object]
	switch latest := p.writes[object]; {
	case latest == nil, ending: // withdrawn, or the last attempt of all
		p.queue.Forget(object)
		return false
	case err != nil:
		p.log.Warn("a write to the API failed; it is tried again", "error", err)
		p.failed[object] = err
		p.queue.AddRateLimited(object)
		return !had
	case latest != w:
		p.queue.Forget(object)
		p.queue.Add(object)
	default:
		p.queue.Forget(object)
		delete(p.writes, object)
	}
	delete(p.failed, object)
	return had
}
