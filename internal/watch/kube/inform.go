package kube

import (
	"context"
	"sync/atomic"

	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/client-go/tools/cache"
)

// watched is a kind that is watched, and where what is seen of it goes.
type watched struct {
	into     *cache.Indexer
	object   runtime.Object
	source   *cache.ListWatch
	optional bool // a cluster without this kind has none
}

// informing is what is done with what is seen.
type informing struct {
	shrink  cache.TransformFunc
	changed func()
	// refused is told why a watch failed, unless it is of an optional kind that the API server does not know.
	refused func(context.Context, *cache.Reflector, error)
}

// inform begins to watch a kind, until ctx ends. synced says whether all objects were told, or that there is no such kind.
func inform(ctx context.Context, w watched, o informing) (informer cache.SharedIndexInformer, synced func() bool, err error) {
	informer = cache.NewSharedIndexInformer(w.source, w.object, 0, cache.Indexers{})
	if err := informer.SetTransform(o.shrink); err != nil {
		return nil, nil, err
	}
	var absent atomic.Bool
	if err := informer.SetWatchErrorHandlerWithContext(func(ctx context.Context, r *cache.Reflector, err error) {
		if !w.optional || !isAbsent(err) {
			o.refused(ctx, r, err)
			return
		}
		// It is looked for again and again, so that what is installed later is found.
		if !absent.Swap(true) {
			o.changed()
		}
	}); err != nil {
		return nil, nil, err
	}
	if _, err := informer.AddEventHandler(cache.ResourceEventHandlerFuncs{
		AddFunc:    func(any) { o.changed() },
		UpdateFunc: func(any, any) { o.changed() },
		DeleteFunc: func(any) { o.changed() },
	}); err != nil {
		return nil, nil, err
	}
	*w.into = informer.GetIndexer()
	go informer.RunWithContext(ctx)
	return informer, func() bool { return informer.HasSynced() || absent.Load() }, nil
}

// allTrue says whether all of them say yes.
func allTrue(list []func() bool) bool {
	for _, is := range list {
		if !is() {
			return false
		}
	}
	return true
}
