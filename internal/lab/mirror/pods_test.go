package mirror

import (
	"encoding/json"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

func TestFullName(t *testing.T) {
	for image, want := range map[string]string{
		"nginx":                       "docker.io/library/nginx:latest",
		"nginx:1.27":                  "docker.io/library/nginx:1.27",
		"curlimages/curl":             "docker.io/curlimages/curl:latest",
		"quay.io/curl/curl:8":         "quay.io/curl/curl:8",
		"localhost/x":                 "localhost/x:latest",
		"localhost:5000/x":            "localhost:5000/x:latest",
		"host:5000/x:1":               "host:5000/x:1",
		"index.docker.io/library/x:1": "docker.io/library/x:1",
		"nginx@sha256:00":             "docker.io/library/nginx@sha256:00",
	} {
		if got := fullName(image); got != want {
			t.Errorf("fullName(%q) = %q, want %q", image, got, want)
		}
	}
}

// podList is what the API answers for the pods of a node.
const podList = `{"items":[
{"metadata":{"name":"waits","namespace":"a","uid":"1"},"spec":{"containers":[{"name":"other","image":"mysql"},{"name":"web","image":"busybox"}]},
 "status":{"containerStatuses":[{"name":"web","state":{"waiting":{"reason":"ContainerCreating"}}}]}},
{"metadata":{"name":"new","namespace":"a","uid":"2"},"spec":{"containers":[{"name":"web","image":"docker.io/library/busybox:latest"}]},"status":{}},
{"metadata":{"name":"runs","namespace":"a","uid":"3"},"spec":{"containers":[{"name":"web","image":"busybox"}]},
 "status":{"containerStatuses":[{"name":"web","state":{"running":{}}}]}},
{"metadata":{"name":"again","namespace":"a","uid":"4"},"spec":{"containers":[{"name":"web","image":"busybox"}]},
 "status":{"containerStatuses":[{"name":"web","state":{"terminated":{}}}]}},
{"metadata":{"name":"began","namespace":"a","uid":"5"},"spec":{"initContainers":[{"name":"init","image":"busybox"}],"containers":[{"name":"web","image":"mysql"}]},
 "status":{"initContainerStatuses":[{"name":"init","state":{"terminated":{}}}]}},
{"metadata":{"name":"begins","namespace":"a","uid":"6"},"spec":{"initContainers":[{"name":"init","image":"busybox"}],"containers":[{"name":"web","image":"busybox"}]},"status":{}},
{"metadata":{"name":"debugged","namespace":"b","uid":"7"},"spec":{"containers":[{"name":"web","image":"mysql"}],"ephemeralContainers":[{"name":"debugger","image":"busybox:latest"}]},
 "status":{"containerStatuses":[{"name":"web","state":{"running":{}}}]}},
{"metadata":{"name":"tagged","namespace":"b","uid":"8"},"spec":{"containers":[{"name":"web","image":"busybox:1.28"}]},"status":{}}
]}`

func TestEvents(t *testing.T) {
	var list struct{ Items []pod }
	if err := json.Unmarshal([]byte(podList), &list); err != nil {
		t.Fatal(err)
	}
	n := notice{image: "docker.io/library/busybox:latest", what: "busybox 1.35", why: "no network"}
	got := map[string]event{}
	for _, e := range events(list.Items, n, "east-worker1", time.Unix(0, 0)) {
		got[e.InvolvedObject["name"]] = e
	}
	for name, path := range map[string]string{
		"waits": "spec.containers{web}", "new": "spec.containers{web}", "again": "spec.containers{web}",
		"begins": "spec.initContainers{init}", "debugged": "spec.ephemeralContainers{debugger}",
	} {
		if e := got[name]; e.InvolvedObject["fieldPath"] != path || !strings.HasPrefix(e.Metadata.Name, name+".") {
			t.Errorf("pod %s: %+v, want an event for %s", name, e, path)
		}
		delete(got, name)
	}
	if len(got) > 0 {
		t.Errorf("events for pods that do not wait for the image: %+v", got)
	}
	// The same pod is told once: the name of its event is always the same.
	again := events(list.Items, n, "east-worker1", time.Unix(99, 0))
	if first := events(list.Items, n, "east-worker1", time.Unix(0, 0)); first[0].Metadata.Name != again[0].Metadata.Name {
		t.Errorf("events %s and %s for one pod and image", first[0].Metadata.Name, again[0].Metadata.Name)
	}
}

// TestTell has a kubectl that notes what it is called with.
func TestTell(t *testing.T) {
	dir := t.TempDir()
	kubectl := filepath.Join(dir, "kubectl")
	script := "#!/bin/sh\ncase $4 in\nget) cat " + dir + "/pods ;;\ncreate) cat >>" + dir + "/events; echo >>" + dir + "/events; echo 'AlreadyExists' >&2; exit 1 ;;\nesac\n"
	for file, text := range map[string]string{kubectl: script, filepath.Join(dir, "pods"): podList} {
		if err := os.WriteFile(file, []byte(text), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	p := NewPods(Pods{Kubectl: kubectl, Kubeconfig: "none", Node: "east-worker1", Log: slog.New(slog.DiscardHandler)})
	if err := p.tell(t.Context(), notice{image: "docker.io/library/busybox:1.28", what: "busybox 1.35", why: "no network"}); err != nil {
		t.Fatal(err)
	}
	text, err := os.ReadFile(filepath.Join(dir, "events"))
	if err != nil {
		t.Fatal(err)
	}
	var e event
	if err := json.Unmarshal(text, &e); err != nil {
		t.Fatalf("%v: %s", err, text)
	}
	want := "docker.io/library/busybox:1.28 is a stand-in of the lab (busybox 1.35), for its registry cannot be reached: no network. `fathom image load` brings the real one"
	if e.Message != want || e.InvolvedObject["name"] != "tagged" || e.Source["host"] != "east-worker1" {
		t.Errorf("%+v, want the message %q on the pod tagged", e, want)
	}
}
