package kube

import (
	"context"
	"sync/atomic"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/cache"

	"github.com/fathom-network/fathom/internal/facts/service"
)

// ServiceHandler is told of Services and EndpointSlices. It must not keep what it is given for long: there may be
// tens of thousands, and what a node needs of them is little. Calls may come from several goroutines.
type ServiceHandler interface {
	SetService(*corev1.Service)
	DeleteService(service.Name)
	SetSlice(*discoveryv1.EndpointSlice)
	DeleteSlice(service.Name)
	// Listed is called when all Services, or all EndpointSlices, that there are have been told.
	Listed()
}

// WatchServices tells of Services and EndpointSlices, but for those that are labelled headless, from now on until the
// context ends. Unlike a View it keeps none of them. synced says whether all that there are were told.
func (c *Client) WatchServices(ctx context.Context, h ServiceHandler) (synced func() bool) {
	services := &teller[*corev1.Service]{set: h.SetService, remove: h.DeleteService, listed: h.Listed}
	slices := &teller[*discoveryv1.EndpointSlice]{set: h.SetSlice, remove: h.DeleteSlice, listed: h.Listed}
	watchInto(ctx, c.CoreV1().RESTClient(), "services", &corev1.Service{}, services, "!"+corev1.IsHeadlessService)
	watchInto(ctx, c.DiscoveryV1().RESTClient(), "endpointslices", &discoveryv1.EndpointSlice{}, slices, "!"+corev1.IsHeadlessService)
	return func() bool { return services.synced.Load() && slices.synced.Load() }
}

func watchInto(ctx context.Context, from rest.Interface, resource string, kind runtime.Object, into cache.ReflectorStore, selector string) {
	source := cache.NewFilteredListWatchFromClient(from, resource, metav1.NamespaceAll, func(o *metav1.ListOptions) { o.LabelSelector = selector })
	go cache.NewReflectorWithOptions(source, kind, into, cache.ReflectorOptions{Name: resource}).RunWithContext(ctx)
}

// teller is a store of client-go's that passes on what it is given, and remembers names alone.
type teller[T metav1.Object] struct {
	set    func(T)
	remove func(service.Name)
	listed func()
	known  map[service.Name]struct{}
	synced atomic.Bool
}

func nameOf(o metav1.Object) service.Name {
	return service.Name{Namespace: o.GetNamespace(), Name: o.GetName()}
}

// Add implements cache.ReflectorStore.
func (t *teller[T]) Add(o any) error {
	if t.known == nil {
		t.known = map[service.Name]struct{}{}
	}
	t.known[nameOf(o.(T))] = struct{}{}
	t.set(o.(T))
	return nil
}

// Update implements cache.ReflectorStore.
func (t *teller[T]) Update(o any) error { return t.Add(o) }

// Delete implements cache.ReflectorStore.
func (t *teller[T]) Delete(o any) error {
	name := nameOf(o.(T))
	delete(t.known, name)
	t.remove(name)
	return nil
}

// Replace implements cache.ReflectorStore: at the beginning, and after the watch had to begin anew.
func (t *teller[T]) Replace(list []any, _ string) error {
	before := t.known
	t.known = make(map[service.Name]struct{}, len(list))
	for _, o := range list {
		name := nameOf(o.(T))
		t.known[name] = struct{}{}
		delete(before, name)
		t.set(o.(T))
	}
	for name := range before {
		t.remove(name)
	}
	t.synced.Store(true)
	t.listed()
	return nil
}

// Resync implements cache.ReflectorStore.
func (t *teller[T]) Resync() error { return nil }
