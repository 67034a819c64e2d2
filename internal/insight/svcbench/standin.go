package svcbench

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/serializer/protobuf"
)

// standIn implements the part of an API server that Fathom's proxy uses, for machines without the kit. It keeps objects in
// memory, and speaks JSON except for lists, which are protobuf as an API server's would be: otherwise the benchmark would
// measure JSON decoding.
type standIn struct {
	server  *http.Server
	encoder runtime.Encoder

	mu      sync.Mutex
	version int
	lists   map[string]*list // by resource
	more    chan struct{}    // closed at the next event
}

type list struct {
	one    runtime.Object // an empty one
	many   typedList      // an empty list
	items  map[string]runtime.Object
	events []event
}

type typedList interface {
	runtime.Object
	metav1.ListInterface
}

func newList(one runtime.Object, many typedList) *list {
	return &list{one: one, many: many, items: map[string]runtime.Object{}}
}

type event struct {
	version    int
	name, kind string
	item       runtime.Object
}

func newStandIn() (*standIn, error) {
	kinds := runtime.NewScheme()
	if err := errors.Join(corev1.AddToScheme(kinds), discoveryv1.AddToScheme(kinds)); err != nil {
		return nil, err
	}
	s := &standIn{encoder: protobuf.NewSerializer(kinds, kinds), more: make(chan struct{}), lists: map[string]*list{
		"services":       newList(&corev1.Service{}, &corev1.ServiceList{TypeMeta: metav1.TypeMeta{APIVersion: "v1", Kind: "ServiceList"}}),
		"endpointslices": newList(&discoveryv1.EndpointSlice{}, &discoveryv1.EndpointSliceList{TypeMeta: metav1.TypeMeta{APIVersion: "discovery.k8s.io/v1", Kind: "EndpointSliceList"}}),
	}}
	listener, err := net.Listen("tcp", standInAddr)
	if err != nil {
		return nil, fmt.Errorf("stand in for an API server: %w", err)
	}
	s.server = &http.Server{Handler: s, ReadHeaderTimeout: time.Minute}
	go func() { _ = s.server.Serve(listener) }()
	return s, nil
}

// ServeHTTP implements http.Handler.
func (s *standIn) ServeHTTP(w http.ResponseWriter, req *http.Request) {
	words := strings.Split(strings.Trim(req.URL.Path, "/"), "/")
	for i, word := range words {
		l := s.lists[word]
		if l == nil {
			continue
		}
		name := ""
		if i+1 < len(words) {
			name = words[i+1]
		}
		q := req.URL.Query()
		watch := q.Get("watch") == "1" || q.Get("watch") == "true"
		switch {
		case req.Method != http.MethodGet:
			s.write(w, req, l, name)
		case q.Get("sendInitialEvents") != "": // client-go lists instead
			w.Header().Set("Content-Type", ofJSON)
			w.WriteHeader(http.StatusUnprocessableEntity)
			_ = json.NewEncoder(w).Encode(object{"kind": "Status", "apiVersion": "v1", "status": "Failure", "reason": "Invalid", "code": http.StatusUnprocessableEntity})
		case watch:
			s.watch(w, req, l)
		default:
			s.list(w, l)
		}
		return
	}
	if req.URL.Path != "/readyz" {
		http.NotFound(w, req)
	}
}

// write accepts a new object, or a merge patch of one.
func (s *standIn) write(w http.ResponseWriter, req *http.Request, l *list, name string) {
	text, err := io.ReadAll(req.Body)
	if err == nil {
		err = s.put(l, name, text)
	}
	if err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
	}
}

// put stores a new object, or changes the given fields of the one with the name.
func (s *standIn) put(l *list, name string, text []byte) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	kind, item := "ADDED", l.one.DeepCopyObject()
	if name != "" {
		old := l.items[name]
		if old == nil {
			return fmt.Errorf("there is no %s", name)
		}
		kind, item = "MODIFIED", old.DeepCopyObject()
	}
	if err := json.Unmarshal(text, item); err != nil {
		return err
	}
	m, err := meta.Accessor(item)
	if err != nil {
		return err
	}
	s.version++
	m.SetNamespace(metav1.NamespaceDefault)
	m.SetCreationTimestamp(metav1.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC))
	m.SetResourceVersion(strconv.Itoa(s.version))
	if service, ok := item.(*corev1.Service); ok {
		service.Spec.ClusterIPs, service.Spec.Type = []string{service.Spec.ClusterIP}, corev1.ServiceTypeClusterIP
	}
	l.items[m.GetName()] = item
	l.events = append(l.events, event{s.version, m.GetName(), kind, item})
	close(s.more)
	s.more = make(chan struct{})
	return nil
}

func (s *standIn) list(w http.ResponseWriter, l *list) {
	s.mu.Lock()
	items, version := slices.Collect(maps.Values(l.items)), s.version
	l.events = slices.DeleteFunc(l.events, func(e event) bool { return e.kind == "ADDED" })
	s.mu.Unlock()
	all := l.many.DeepCopyObject().(typedList)
	all.SetResourceVersion(strconv.Itoa(version))
	err := meta.SetList(all, items)
	w.Header().Set("Content-Type", runtime.ContentTypeProtobuf)
	if err == nil {
		err = s.encoder.Encode(all, w)
	}
	if err != nil {
		http.Error(w, err.Error(), http.StatusInternalServerError)
	}
}

func (s *standIn) watch(w http.ResponseWriter, req *http.Request, l *list) {
	only, _ := strings.CutPrefix(req.URL.Query().Get("fieldSelector"), "metadata.name=")
	s.mu.Lock()
	since, err := strconv.Atoi(req.URL.Query().Get("resourceVersion"))
	if err != nil {
		since = s.version
	}
	s.mu.Unlock()
	w.Header().Set("Content-Type", ofJSON)
	w.WriteHeader(http.StatusOK)
	flush := http.NewResponseController(w)
	for enc := json.NewEncoder(w); ; {
		s.mu.Lock()
		more := s.more
		at, _ := slices.BinarySearchFunc(l.events, since+1, func(e event, v int) int { return e.version - v })
		news := slices.Clone(l.events[at:])
		s.mu.Unlock()
		for _, e := range news {
			since = e.version
			if only != "" && e.name != only {
				continue
			}
			if enc.Encode(object{"type": e.kind, "object": e.item}) != nil {
				return
			}
		}
		if flush.Flush() != nil {
			return
		}
		select {
		case <-more:
		case <-req.Context().Done():
			return
		}
	}
}
