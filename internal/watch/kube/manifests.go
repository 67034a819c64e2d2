package kube

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/rest"

	"github.com/fathom-network/fathom/internal/facts/manifest"
)

const (
	applyAgain  = 100 * time.Millisecond // the time between two rounds over what could not be applied
	applyAtOnce = 8                      // requests: a webhook that does not answer holds one for ten seconds
	sayAfter    = 10 * time.Second       // from when on it is told what is waited for
	// restWithin is how long objects that wait are tried after another was refused: it may be what they wait for.
	restWithin = 3 * time.Second
	// rangeWithin is how long a Service's address may be refused because the server does not know its own range yet.
	rangeWithin = 20 * time.Second
)

// ApplyManifests makes users' objects as they are described, as Apply does with ours, but of any kind and in any order. An
// object is tried again until ctx ends when what it needs may still come: its namespace, its kind, the ServiceAccount of a
// bare pod, a webhook's pods. Other refusals are final for their object, and the error names each of them; what else waits
// is tried for restWithin more, from when nodes are there. Namespaced objects that name no namespace go to default. What
// has pods waits until nodes is closed; nil is no wait. say is told what is waited for.
func (c *Client) ApplyManifests(ctx context.Context, owner string, objects []manifest.Object, nodes <-chan struct{}, say func(string)) error {
	all := make([]application, len(objects))
	for i, o := range objects {
		all[i].Object = o
	}
	k := kinds{client: c.CoreV1().RESTClient(), known: map[schema.GroupVersion][]metav1.APIResource{}}
	began := time.Now()
	var last <-chan time.Time // after it nothing more is waited for: something was refused
	for {
		for rank := range ranks {
			var g errgroup.Group
			g.SetLimit(applyAtOnce)
			for i := range all {
				a := &all[i]
				if a.state != stillWaits || rankOf(a.Unstructured) != rank {
					continue
				}
				if rank == rankOfPods && nodes != nil {
					a.why = errNoNodes
					continue
				}
				g.Go(func() error {
					err := k.apply(ctx, owner, a.Object)
					if err == nil {
						a.state = isApplied
						return nil
					}
					if ctx.Err() == nil || a.why == nil { // the end of ctx is no reason
						a.why = err
					}
					if !mayCome(err, time.Since(began)) {
						a.state = isRefused
					}
					return nil
				})
			}
			_ = g.Wait()
		}
		first, more := pending(all)
		refusals := refusalsOf(all)
		if first == nil {
			return refusals
		}
		if refusals != nil && nodes == nil && last == nil {
			last = time.After(restWithin)
		}
		if time.Since(began) > sayAfter {
			say(fmt.Sprintf("waiting for what %s needs%s: %v", first.Object, more, first.why))
		}
		select {
		case <-ctx.Done():
			return errors.Join(refusals, fmt.Errorf("apply %s%s: %w (last: %w)", first.Object, more, context.Cause(ctx), first.why))
		case <-last:
			return errors.Join(refusals, fmt.Errorf("apply %s%s: not waited for any longer (last: %w)", first.Object, more, first.why))
		case <-nodes:
			nodes = nil
		case <-time.After(applyAgain):
		}
	}
}

// errNoNodes is why what has pods waits.
var errNoNodes = errors.New("no nodes are ready for pods yet")

// application is the state of one object.
type application struct {
	manifest.Object
	state applicationState
	why   error // it is not applied
}

type applicationState int

const (
	stillWaits applicationState = iota
	isApplied
	isRefused
)

// refusalsOf returns why objects will never be applied, in their order; nil if all may be.
func refusalsOf(all []application) error {
	var errs []error
	for i := range all {
		if a := &all[i]; a.state == isRefused {
			errs = append(errs, fmt.Errorf("apply %s: %w", a.Object, a.why))
		}
	}
	return errors.Join(errs...)
}

// pending returns the first object that waits, and how many others do.
func pending(all []application) (first *application, more string) {
	n := 0
	for i := range all {
		if all[i].state == stillWaits {
			first = cmp.Or(first, &all[i])
			n++
		}
	}
	if n > 1 {
		more = fmt.Sprintf(" and %d more", n-1)
	}
	return first, more
}

// mayCome says whether an object may be taken later as it is. Forbidden is a bare pod without a ServiceAccount, an object
// in a namespace that ends, and one that is never taken: the server does not tell them apart.
func mayCome(err error, after time.Duration) bool {
	var status apierrors.APIStatus
	switch {
	case errors.As(err, new(*noKindError)):
		return false
	case !errors.As(err, &status):
		return true // no answer, or no kind yet
	case apierrors.ReasonForError(err) == metav1.StatusReasonUnknown: // a field that its kind has not
		return false
	case apierrors.IsInvalid(err) && after > rangeWithin:
		return false
	}
	return startsYet(err) || apierrors.IsForbidden(err) || apierrors.IsConflict(err)
}

// kinds knows which resource a kind is, from the server: users' kinds have names and scopes that follow no rule.
type kinds struct {
	client rest.Interface
	mu     sync.Mutex
	known  map[schema.GroupVersion][]metav1.APIResource
}

// noKindError says that there is no such kind and will not be: groups without a dot in their names are Kubernetes' own.
type noKindError struct{ schema.GroupVersionKind }

func (e *noKindError) Error() string {
	return fmt.Sprintf("the API server has no kind %s of %s", e.Kind, e.GroupVersion())
}

func (k *kinds) apply(ctx context.Context, owner string, o manifest.Object) error {
	kind := o.GroupVersionKind()
	resource, err := k.resource(ctx, kind)
	if err != nil {
		return err
	}
	segments := []string{apiPath(kind.GroupVersion())}
	if resource.Namespaced {
		namespace := cmp.Or(o.GetNamespace(), metav1.NamespaceDefault)
		segments = append(segments, "namespaces", namespace)
	}
	data, err := o.MarshalJSON()
	if err != nil {
		return err
	}
	// A misspelt field is an error, as it is for kubectl. The client's own retries wait for whole seconds.
	return k.client.Patch(types.ApplyYAMLPatchType).AbsPath(append(segments, resource.Name, o.GetName())...).
		Param("fieldManager", owner).Param("force", "true").Param("fieldValidation", metav1.FieldValidationStrict).
		MaxRetries(0).WarningHandler(rest.NoWarnings{}).Body(data).Do(ctx).Error()
}

// resource asks the server for the resource of a kind, once for each group and version.
func (k *kinds) resource(ctx context.Context, kind schema.GroupVersionKind) (metav1.APIResource, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	version := kind.GroupVersion()
	find := func() (metav1.APIResource, bool) {
		for _, r := range k.known[version] {
			if r.Kind == kind.Kind && !strings.Contains(r.Name, "/") { // no subresource
				return r, true
			}
		}
		return metav1.APIResource{}, false
	}
	if r, found := find(); found {
		return r, nil
	}
	var list metav1.APIResourceList
	err := k.client.Get().AbsPath(apiPath(version)).MaxRetries(0).Do(ctx).Into(&list)
	if err != nil && !apierrors.IsNotFound(err) {
		return metav1.APIResource{}, err
	}
	k.known[version] = list.APIResources
	r, found := find()
	switch {
	case found:
		return r, nil
	case strings.Contains(kind.Group, "."):
		return r, fmt.Errorf("the API server has no kind %s of %s yet", kind.Kind, version)
	}
	return r, &noKindError{kind}
}

func apiPath(version schema.GroupVersion) string {
	if version.Group == "" {
		return "/api/" + version.Version
	}
	return "/apis/" + version.Group + "/" + version.Version
}
