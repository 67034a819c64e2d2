package svcbench

import (
	"encoding/json"
	"errors"
	"fmt"
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
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/runtime/serializer/protobuf"
)

// standIn is as much of an API server as Fathom's proxy asks of one, for machines without the kit. It keeps what it is told
// in memory, and speaks JSON but for lists, which it has in protobuf as an API server would: else the size of a text would
// be measured.
type standIn struct {
	server  *http.Server
	encoder runtime.Encoder

	mu      sync.Mutex
	version int
	lists   map[string]*list // by resource
	more    chan struct{}    // closed when there is another event
}

type list struct {
	kind, group string
	one         runtime.Object // an empty one
	many        runtime.Object // an empty list
	items       map[string]object
	typed       map[string]runtime.Object
	events      []event
}

type event struct {
	version    int
	name, kind string
	item       object
}

func newStandIn() (*standIn, error) {
	kinds := runtime.NewScheme()
	if err := errors.Join(corev1.AddToScheme(kinds), discoveryv1.AddToScheme(kinds)); err != nil {
		return nil, err
	}
	s := &standIn{encoder: protobuf.NewSerializer(kinds, kinds), more: make(chan struct{}), lists: map[string]*list{
		"services":       {kind: "Service", group: "v1", one: &corev1.Service{}, many: &corev1.ServiceList{}},
		"endpointslices": {kind: "EndpointSlice", group: "discovery.k8s.io/v1", one: &discoveryv1.EndpointSlice{}, many: &discoveryv1.EndpointSliceList{}},
	}}
	for _, l := range s.lists {
		l.items, l.typed = map[string]object{}, map[string]runtime.Object{}
	}
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
			s.list(w, req, l)
		}
		return
	}
	if req.URL.Path != "/readyz" {
		http.NotFound(w, req)
	}
}

// write takes a new object, or a merge patch of one.
func (s *standIn) write(w http.ResponseWriter, req *http.Request, l *list, name string) {
	var body object
	if err := json.NewDecoder(req.Body).Decode(&body); err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	if err := s.put(l, name, body); err != nil {
		http.Error(w, err.Error(), http.StatusUnprocessableEntity)
	}
}

// put takes a new object, or what changes of the one that has a name.
func (s *standIn) put(l *list, name string, body object) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	kind, item := "ADDED", body
	meta := object{"namespace": "default", "creationTimestamp": "2026-01-01T00:00:00Z"}
	if name != "" {
		kind, item = "MODIFIED", object{}
		for key, value := range l.items[name] {
			item[key] = value
		}
		for key, value := range body {
			item[key] = value
		}
	}
	if old, ok := item["metadata"].(object); ok { // one of ours
		for key, value := range old {
			meta[key] = value
		}
	} else if sent, ok := item["metadata"].(map[string]any); ok {
		for key, value := range sent {
			meta[key] = value
		}
	}
	s.version++
	meta["resourceVersion"] = strconv.Itoa(s.version)
	item["metadata"] = meta
	if spec, ok := item["spec"].(map[string]any); ok {
		spec["clusterIPs"], spec["type"] = []any{spec["clusterIP"]}, "ClusterIP"
	}
	name = meta["name"].(string)
	text, err := json.Marshal(item)
	if err != nil {
		return err
	}
	typed := l.one.DeepCopyObject()
	if err := json.Unmarshal(text, typed); err != nil {
		return err
	}
	l.items[name], l.typed[name] = item, typed
	l.events = append(l.events, event{s.version, name, kind, item})
	close(s.more)
	s.more = make(chan struct{})
	return nil
}

func (s *standIn) list(w http.ResponseWriter, req *http.Request, l *list) {
	s.mu.Lock()
	items, typed := slices.Collect(maps.Values(l.items)), slices.Collect(maps.Values(l.typed))
	version := strconv.Itoa(s.version)
	l.events = slices.DeleteFunc(l.events, func(e event) bool { return e.kind == "ADDED" })
	s.mu.Unlock()
	if !strings.Contains(req.Header.Get("Accept"), runtime.ContentTypeProtobuf) {
		w.Header().Set("Content-Type", ofJSON)
		_ = json.NewEncoder(w).Encode(object{"kind": l.kind + "List", "apiVersion": l.group, "metadata": object{"resourceVersion": version}, "items": items})
		return
	}
	all := l.many.DeepCopyObject()
	all.GetObjectKind().SetGroupVersionKind(schema.FromAPIVersionAndKind(l.group, l.kind+"List"))
	err := meta.SetList(all, typed)
	if list, ok := all.(metav1.ListInterface); ok && err == nil {
		list.SetResourceVersion(version)
	}
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
