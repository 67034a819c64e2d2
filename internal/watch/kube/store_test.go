package kube

import (
	"context"
	"errors"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/watch"
	"k8s.io/client-go/kubernetes/fake"
	clienttesting "k8s.io/client-go/testing"

	"github.com/fathom-network/fathom/internal/facts/service"
)

// signal returns a function for Options.Changed, and a channel on which its calls are heard.
func signal() (changed func(), heard chan struct{}) {
	heard = make(chan struct{}, 1)
	return func() {
		select {
		case heard <- struct{}{}:
		default:
		}
	}, heard
}

// become waits for a state that follows from events alone.
func become(t *testing.T, heard chan struct{}, what string, is func() bool) {
	t.Helper()
	for late := time.After(time.Minute); !is(); {
		select {
		case <-heard:
		case <-late:
			t.Fatalf("%s: it is not told", what)
		}
	}
}

// TestStoreOfNothing: that there are no objects is an event.
func TestStoreOfNothing(t *testing.T) {
	changed, heard := signal()
	s := Watch(t.Context(), &Client{Interface: fake.NewClientset()}, Nodes, Options[*corev1.Node]{Changed: changed})
	become(t, heard, "a list without objects", s.Synced)
	if !s.Listed() || s.Len() != 0 || len(s.All()) != 0 {
		t.Errorf("listed %v, with %v", s.Listed(), s.All())
	}
}

// TestStoreWithoutKind: an optional kind that the server does not know is not waited for, and is found when it comes.
func TestStoreWithoutKind(t *testing.T) {
	for _, optional := range []bool{true, false} {
		set := fake.NewClientset(&corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: "a"}})
		var known atomic.Bool
		set.PrependReactor("list", "nodes", func(clienttesting.Action) (bool, runtime.Object, error) {
			return !known.Load(), nil, apierrors.NewNotFound(corev1.Resource("nodes"), "")
		})
		changed, heard := signal()
		var refused atomic.Int32
		s := Watch(t.Context(), &Client{Interface: set}, Nodes, Options[*corev1.Node]{Optional: optional, Retry: time.Millisecond, Changed: changed,
			Refused: func(err error) {
				if !apierrors.IsNotFound(err) {
					t.Errorf("refused with %v", err)
				}
				refused.Add(1)
				changed()
			}})
		if optional {
			become(t, heard, "that there is no such kind", s.Synced)
		} else {
			become(t, heard, "what was refused", func() bool { return refused.Load() > 0 })
		}
		if s.Listed() || s.Synced() != optional || optional && refused.Load() > 0 {
			t.Errorf("optional %v: listed %v, synced %v, %d refused", optional, s.Listed(), s.Synced(), refused.Load())
		}
		known.Store(true)
		become(t, heard, "the kind that has come", func() bool { return s.Listed() && s.Len() == 1 })
	}
}

// TestStoreShrinks: what is kept was shrunk, whichever way it came, and what the reader cannot tell apart is not told.
func TestStoreShrinks(t *testing.T) {
	ctx := t.Context()
	object := func(name, image, label string) *corev1.Node {
		return &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: name, Labels: map[string]string{"l": label}},
			Status: corev1.NodeStatus{Images: []corev1.ContainerImage{{Names: []string{image}}}}}
	}
	set := fake.NewClientset(object("a", "x", "1"))
	changed, heard := signal()
	var changes atomic.Int32
	seen := make(chan string, 100)
	s := Watch(ctx, &Client{Interface: set}, Nodes, Options[*corev1.Node]{
		Changed: func() { changes.Add(1); changed() }, Shrink: shrinkNode,
		Same: func(was, is *corev1.Node) bool {
			seen <- is.Labels["l"]
			return was.Labels["l"] == is.Labels["l"]
		},
	})
	become(t, heard, "the first list", s.Synced)
	_, err := set.CoreV1().Nodes().Create(ctx, object("b", "y", "1"), metav1.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	become(t, heard, "another node", func() bool { return s.Len() == 2 })
	for _, n := range s.All() {
		if len(n.Status.Images) > 0 || n.Labels["l"] != "1" {
			t.Errorf("kept %+v", n)
		}
	}
	before := changes.Load()
	for _, n := range []*corev1.Node{object("b", "z", "1"), object("b", "z", "2")} {
		if _, err := set.CoreV1().Nodes().Update(ctx, n, metav1.UpdateOptions{}); err != nil {
			t.Fatal(err)
		}
	}
	become(t, heard, "another label", func() bool { n, found := s.Get("", "b"); return found && n.Labels["l"] == "2" })
	if got := changes.Load() - before; got != 1 {
		t.Errorf("two updates, one of which is no change, were told %d times", got)
	}
	if a, b := <-seen, <-seen; a != "1" || b != "2" {
		t.Errorf("compared %s and %s", a, b)
	}
	if err := set.CoreV1().Nodes().Delete(ctx, "a", metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	become(t, heard, "the end of a node", func() bool { _, found := s.Get("", "a"); return !found && s.Len() == 1 })
}

// TestStoreTells: a caller that keeps objects itself is given them whole, and hears what went while the watch was
// interrupted.
func TestStoreTells(t *testing.T) {
	ctx := t.Context()
	node := func(name string) *corev1.Node {
		return &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: name}, Status: corev1.NodeStatus{Images: []corev1.ContainerImage{{SizeBytes: 1}}}}
	}
	set := fake.NewClientset(node("a"), node("b"))
	watches := make(chan *watch.FakeWatcher, 10)
	set.PrependWatchReactor("nodes", func(clienttesting.Action) (bool, watch.Interface, error) {
		w := watch.NewFake()
		watches <- w
		return true, w, nil
	})
	var mu sync.Mutex
	told := map[string]bool{}
	var deleted []string
	changed, heard := signal()
	s := Watch(ctx, &Client{Interface: set}, Nodes, Options[*corev1.Node]{Changed: changed, Retry: time.Millisecond,
		Set: func(n *corev1.Node) {
			mu.Lock()
			defer mu.Unlock()
			told[n.Name] = len(n.Status.Images) == 1
		},
		Deleted: func(n service.Name) {
			mu.Lock()
			defer mu.Unlock()
			deleted = append(deleted, n.Name)
		}})
	heardOf := func(what string, names ...string) {
		t.Helper()
		become(t, heard, what, func() bool {
			mu.Lock()
			defer mu.Unlock()
			for _, n := range names {
				if !told[n] {
					return false
				}
			}
			return true
		})
	}
	heardOf("what there is", "a", "b")
	if !s.Synced() {
		t.Error("not synced after the first list")
	}
	first := <-watches
	first.Add(node("c"))
	heardOf("what has come", "c")
	// "b" goes and "d" comes while the watch is interrupted; "c" was never there, as far as the next list knows.
	if err := errors.Join(set.Tracker().Delete(corev1.SchemeGroupVersion.WithResource("nodes"), "", "b"), set.Tracker().Add(node("d"))); err != nil {
		t.Fatal(err)
	}
	gone := apierrors.NewResourceExpired("too old").Status()
	first.Error(&gone)
	heardOf("what the list after the interruption has", "d")
	become(t, heard, "what went during the interruption", func() bool {
		mu.Lock()
		defer mu.Unlock()
		slices.Sort(deleted)
		return slices.Equal(deleted, []string{"b", "c"})
	})
	if n, found := s.Get("", "d"); !found || n != nil {
		t.Errorf("the store knows d: %v, and keeps %v", found, n)
	}
}

// TestUntilSaysWhatFailed: the end of the context is told, with what the server said last.
func TestUntilSaysWhatFailed(t *testing.T) {
	set := fake.NewClientset()
	ctx, cancel := context.WithCancelCause(t.Context())
	late, asked := errors.New("not within its time"), 0
	set.PrependReactor("list", "nodes", func(clienttesting.Action) (bool, runtime.Object, error) {
		if asked++; asked == 2 {
			cancel(late)
		}
		return true, nil, apierrors.NewServiceUnavailable("it starts")
	})
	err := Until(ctx, &Client{Interface: set}, Nodes, Selection{}, func(*corev1.Node) bool { return true })
	if !errors.Is(err, late) || !apierrors.IsServiceUnavailable(err) {
		t.Errorf("%v, want why ctx ended and what the server said", err)
	}
}

// TestList: objects as they are, and none of a kind that the cluster does not know.
func TestList(t *testing.T) {
	set := fake.NewClientset(&corev1.Pod{ObjectMeta: metav1.ObjectMeta{Namespace: "n", Name: "a", Labels: map[string]string{"x": "1"}}},
		&corev1.Pod{ObjectMeta: metav1.ObjectMeta{Namespace: "n", Name: "b"}}, &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Namespace: "m", Name: "c"}})
	c := &Client{Interface: set}
	for _, tc := range []struct {
		s    Selection
		want []string
	}{{Selection{}, []string{"a", "b", "c"}}, {Selection{Namespace: "n"}, []string{"a", "b"}}, {Selection{Labels: "x=1"}, []string{"a"}}} {
		pods, err := List(t.Context(), c, Pods, tc.s)
		var got []string
		for _, p := range pods {
			got = append(got, p.Name)
		}
		if slices.Sort(got); err != nil || !slices.Equal(got, tc.want) {
			t.Errorf("%+v: %v, error %v", tc.s, got, err)
		}
	}
	var refusal error
	set.PrependReactor("list", "pods", func(clienttesting.Action) (bool, runtime.Object, error) { return true, nil, refusal })
	refusal = apierrors.NewNotFound(corev1.Resource("pods"), "")
	if pods, err := List(t.Context(), c, Pods, Selection{}); err != nil || len(pods) > 0 {
		t.Errorf("of a kind that there is not: %v, error %v", pods, err)
	}
	refusal = apierrors.NewServiceUnavailable("it starts")
	if _, err := List(t.Context(), c, Pods, Selection{}); !apierrors.IsServiceUnavailable(err) {
		t.Errorf("of a server that starts: %v", err)
	}
}
