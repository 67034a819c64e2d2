package kube

import (
	"context"
	"sync"
	"sync/atomic"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/util/wait"
	"k8s.io/apimachinery/pkg/watch"
	"k8s.io/client-go/tools/cache"
	"k8s.io/utils/clock"

	"github.com/fathom-network/fathom/internal/facts/service"
)

// Store is a live picture of the objects of a resource. It may lag behind the API server; it never has half of an object.
// Callers share its objects and must not change them.
//
// client-go's reflector writes into it directly. Rejected: client-go's shared informers. Their queue and their buffers
// for several readers hold objects a second time, and they send no event for an empty list.
type Store[T Object] struct {
	options        Options[T]
	asked          func(error) // if not nil, is told how each request ended
	listed, absent atomic.Bool

	mu      sync.RWMutex
	objects map[service.Name]T
}

// Options say which objects are watched and what becomes of them. All functions are called by one goroutine for each
// store, and must not block.
type Options[T Object] struct {
	Selection
	// Optional says that a cluster may lack the kind; the store is then Synced without it. The watch keeps trying, so it
	// finds a kind that is installed later.
	Optional bool
	// Shrink returns the part of an object that the store keeps: a copy, or the object itself. It must be idempotent. Nil
	// keeps the whole object.
	Shrink func(T) T
	// Changed is called after every change, after every complete list (also an empty one), and when an optional kind turns
	// out to be missing.
	Changed func()
	// Same reports whether an update makes no difference to the caller; Changed is not called for it. Nil means that every
	// update makes one.
	Same func(was, is T) bool
	// Refused is called with the error when a list or a watch fails. Nil logs the error as client-go does.
	Refused func(error)
	// Set, if not nil, receives every new or changed object, whole, and Deleted the name of every deleted one. The store
	// then keeps only names: there may be tens of thousands of objects, and the caller needs little of each.
	Set     func(T)
	Deleted func(service.Name)
	// Retry is the delay after a failure; 0 means the backoff of client-go's reflectors, from 0.8 s up to 30 s.
	Retry time.Duration
}

// Watch begins to watch a resource, until ctx ends.
func Watch[T Object](ctx context.Context, c *Client, r Resource[T], o Options[T]) *Store[T] {
	s := &Store[T]{options: o}
	go s.run(ctx, c, r)
	return s
}

// Delays after failures, as client-go's reflectors have them.
const (
	firstDelay, lastDelay = 800 * time.Millisecond, 30 * time.Second
	delayDoublings        = 38
	delayForgotten        = 2 * time.Minute
)

// run watches until ctx ends.
func (s *Store[T]) run(ctx context.Context, c *Client, r Resource[T]) {
	requests := r.in(c, s.options.Namespace)
	source := cache.ToListWatcherWithWatchListSemantics(&cache.ListWatch{
		ListWithContextFunc: func(ctx context.Context, o metav1.ListOptions) (runtime.Object, error) {
			s.options.apply(&o)
			list, err := requests.ListWithContext(ctx, o)
			s.tell(ctx, err)
			return list, err
		},
		WatchFuncWithContext: func(ctx context.Context, o metav1.ListOptions) (watch.Interface, error) {
			s.options.apply(&o)
			w, err := requests.WatchWithContext(ctx, o)
			s.tell(ctx, err)
			return w, err
		},
	}, c.Interface)
	backoff := wait.Backoff{Duration: firstDelay, Cap: lastDelay, Steps: delayDoublings, Factor: 2, Jitter: 1}
	if s.options.Retry > 0 {
		backoff = wait.Backoff{Duration: s.options.Retry}
	}
	var kind T
	reflector := cache.NewReflectorWithOptions(source, kind, sink[T]{s}, cache.ReflectorOptions{Name: r.name, Backoff: &backoff})
	// This is Reflector.RunWithContext, which only logs errors; a missing optional kind does not belong in the log.
	_ = backoff.DelayWithReset(clock.RealClock{}, delayForgotten).Until(ctx, true, true, func(ctx context.Context) (bool, error) {
		if err := reflector.ListAndWatchWithContext(ctx); err != nil && ctx.Err() == nil {
			s.refused(ctx, reflector, err)
		}
		return false, nil
	})
}

// All returns the objects, in no order.
func (s *Store[T]) All() []T {
	s.mu.RLock()
	defer s.mu.RUnlock()
	all := make([]T, 0, len(s.objects))
	for _, o := range s.objects {
		all = append(all, o)
	}
	return all
}

// Len returns how many objects there are.
func (s *Store[T]) Len() int {
	s.mu.RLock()
	defer s.mu.RUnlock()
	return len(s.objects)
}

// Get returns an object, or false if there is none of that name. The namespace of cluster-scoped objects is empty.
func (s *Store[T]) Get(namespace, name string) (T, bool) {
	s.mu.RLock()
	defer s.mu.RUnlock()
	o, found := s.objects[service.Name{Namespace: namespace, Name: name}]
	return o, found
}

// Synced reports whether the store has been complete at least once, or the cluster lacks an optional kind.
func (s *Store[T]) Synced() bool { return s.listed.Load() || s.absent.Load() }

// Listed reports whether the store has been complete at least once. It never is where the kind is not installed.
func (s *Store[T]) Listed() bool { return s.listed.Load() }

func (s *Store[T]) tell(ctx context.Context, err error) {
	if s.asked != nil && ctx.Err() == nil {
		s.asked(err)
	}
}

func (s *Store[T]) changed() {
	if s.options.Changed != nil {
		s.options.Changed()
	}
}

func (s *Store[T]) refused(ctx context.Context, r *cache.Reflector, err error) {
	switch {
	case s.options.Optional && isAbsent(err):
		if !s.absent.Swap(true) {
			s.changed()
		}
	case s.options.Refused != nil:
		s.options.Refused(err)
	default:
		cache.DefaultWatchErrorHandler(ctx, r, err)
	}
}

// kept returns what is kept of an object.
func (s *Store[T]) kept(o T) T {
	var nothing T
	switch {
	case s.options.Set != nil:
		return nothing
	case s.options.Shrink != nil:
		return s.options.Shrink(o)
	}
	return o
}

func nameOf(o metav1.Object) service.Name {
	return service.Name{Namespace: o.GetNamespace(), Name: o.GetName()}
}

// sink is the side of a Store that client-go's reflector writes to, from one goroutine.
type sink[T Object] struct{ *Store[T] }

var _ cache.TransformingStore = sink[Object]{}

// Add implements cache.ReflectorStore.
func (s sink[T]) Add(o any) error { return s.Update(o) }

// Update implements cache.ReflectorStore.
func (s sink[T]) Update(o any) error {
	whole := o.(T)
	name, is := nameOf(whole), s.kept(whole)
	s.mu.Lock()
	was, known := s.objects[name]
	if s.objects == nil { // a watch that begins without a list
		s.objects = map[service.Name]T{}
	}
	s.objects[name] = is
	s.mu.Unlock()
	if s.options.Set != nil {
		s.options.Set(whole)
	}
	if !known || s.options.Same == nil || !s.options.Same(was, is) {
		s.changed()
	}
	return nil
}

// Delete implements cache.ReflectorStore.
func (s sink[T]) Delete(o any) error {
	name := nameOf(o.(T))
	s.mu.Lock()
	delete(s.objects, name)
	s.mu.Unlock()
	if s.options.Deleted != nil {
		s.options.Deleted(name)
	}
	s.changed()
	return nil
}

// Replace implements cache.ReflectorStore: it takes the first list, and another whenever the watch cannot be resumed.
func (s sink[T]) Replace(list []any, _ string) error {
	now := make(map[service.Name]T, len(list))
	for _, o := range list {
		now[nameOf(o.(T))] = s.kept(o.(T))
	}
	s.mu.Lock()
	before := s.objects
	s.objects = now
	s.mu.Unlock()
	if s.options.Set != nil {
		for _, o := range list {
			s.options.Set(o.(T))
		}
	}
	if s.options.Deleted != nil {
		for name := range before {
			if _, stays := now[name]; !stays {
				s.options.Deleted(name)
			}
		}
	}
	s.listed.Store(true)
	s.changed()
	return nil
}

// Resync implements cache.ReflectorStore.
func (s sink[T]) Resync() error { return nil }

// Transformer implements cache.TransformingStore: objects of a streamed list are shrunk one by one as they arrive, so that the
// list is never whole in memory.
func (s sink[T]) Transformer() cache.TransformFunc {
	if s.options.Set != nil || s.options.Shrink == nil {
		return nil
	}
	return func(o any) (any, error) { return s.options.Shrink(o.(T)), nil }
}
