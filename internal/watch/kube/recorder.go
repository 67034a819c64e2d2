package kube

import (
	"context"
	"fmt"
	"net/http"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/client-go/kubernetes/scheme"
	typedcorev1 "k8s.io/client-go/kubernetes/typed/core/v1"
	"k8s.io/client-go/tools/record"
)

// Event is something that happened to an object and that a person should see with `kubectl describe`.
type Event struct {
	Object  corev1.ObjectReference
	Warning bool
	Reason  string // CamelCase
	Message string // cut at 1,024 bytes, the API's limit
}

// Reporter is the program that reports an event.
type Reporter struct {
	Component string // fathom-agent
	// Instance is which of them: the Node of an agent, the pod of the controller. Admission policies compare an agent's
	// with the node that its token names.
	Instance string
}

// Recorder sends a component's events to the API server in the background, by client-go's event broadcaster: a queue of
// 1,000 of which what is too much is dropped, one that repeats is counted in the event that is there already, and for one
// object there are no more than 25 at once and one in five minutes after that.
type Recorder struct{ recorder record.EventRecorder }

// NewRecorder starts a Recorder. It ends with the context, and forgets what it has not sent by then.
func (c *Client) NewRecorder(ctx context.Context, by Reporter) *Recorder {
	b := record.NewBroadcaster(record.WithContext(ctx), record.WithSleepDuration(eventRetry))
	b.StartRecordingToSink(eventSink{ctx, c})
	return &Recorder{b.NewRecorder(scheme.Scheme, corev1.EventSource{Component: by.Component, Host: by.Instance})}
}

// Record makes an event. It never waits for the API server.
func (r *Recorder) Record(e Event) {
	kind := corev1.EventTypeNormal
	if e.Warning {
		kind = corev1.EventTypeWarning
	}
	r.recorder.Event(&e.Object, kind, e.Reason, Clip(e.Message))
}

// Clip cuts a message to what the API takes in an event and in the status of a BGPPeer.
func Clip(message string) string {
	const longest, more = 1024, " ..."
	if len(message) <= longest {
		return message
	}
	return strings.ToValidUTF8(message[:longest-len(more)], "") + more
}

const (
	// eventRetry is the time between two of the twelve attempts to send an event.
	eventRetry = 10 * time.Second
	// eventPatience bounds one attempt. The broadcaster itself sets no deadline.
	eventPatience = 10 * time.Second
)

// eventSink is where a broadcaster's events go.
type eventSink struct {
	ctx    context.Context
	client *Client
}

var _ record.EventSink = eventSink{}

func (s eventSink) send(e *corev1.Event, how func(context.Context, typedcorev1.EventExpansion) (*corev1.Event, error)) (*corev1.Event, error) {
	ctx, cancel := context.WithTimeout(s.ctx, eventPatience)
	defer cancel()
	sent, err := how(ctx, s.client.CoreV1().Events(e.Namespace))
	// client-go drops an event for good if the server answered at all, even 500 or 429, and tells by the error's type.
	if status, ok := err.(apierrors.APIStatus); ok { //nolint:errorlint // the broadcaster does not look behind a wrapped one either
		if code := status.Status().Code; code >= http.StatusInternalServerError || code == http.StatusTooManyRequests {
			return nil, fmt.Errorf("record event %s of %s: %w", e.Reason, e.InvolvedObject.Name, err)
		}
	}
	return sent, err
}

// Create implements record.EventSink.
func (s eventSink) Create(e *corev1.Event) (*corev1.Event, error) {
	return s.send(e, func(ctx context.Context, c typedcorev1.EventExpansion) (*corev1.Event, error) {
		return c.CreateWithEventNamespaceWithContext(ctx, e)
	})
}

// Update implements record.EventSink.
func (s eventSink) Update(e *corev1.Event) (*corev1.Event, error) {
	return s.send(e, func(ctx context.Context, c typedcorev1.EventExpansion) (*corev1.Event, error) {
		return c.UpdateWithEventNamespaceWithContext(ctx, e)
	})
}

// Patch implements record.EventSink.
func (s eventSink) Patch(e *corev1.Event, data []byte) (*corev1.Event, error) {
	return s.send(e, func(ctx context.Context, c typedcorev1.EventExpansion) (*corev1.Event, error) {
		return c.PatchWithEventNamespaceWithContext(ctx, e, data)
	})
}
