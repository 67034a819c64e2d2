package mirror

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"hash/fnv"
	"log/slog"
	"net/url"
	"os/exec"
	"strings"
	"time"
)

// Pods tells pods that they run a stand-in, by an event on each. The mirror is told an image's name and not for which pod
// it is pulled; so those are told that are on this node and wait for a container with that image.
//
// kubectl asks and writes, as the node: the rights of a kubelet are to see the pods of its node and to write events. It
// takes 0.1 s for each pull of a stand-in. client-go in the mirror would take 12 MB of memory on each node for ever.
type Pods struct {
	Kubectl    string // the program
	Kubeconfig string // the node's
	Node       string
	Log        *slog.Logger

	queue chan notice
}

type notice struct{ image, what, why string }

// maxNotices bounds what waits for an API server that is slow or away.
const maxNotices = 64

// NewPods returns Pods whose Run is yet to be called.
func NewPods(p Pods) *Pods {
	p.queue = make(chan notice, maxNotices)
	return &p
}

// StandIn has pods be told of a stand-in that was given out. It does not wait.
func (p *Pods) StandIn(image, what string, why error) {
	select {
	case p.queue <- notice{image, what, why.Error()}:
	default:
		p.Log.Warn("too many stand-ins at once: no event tells of this one", "image", image)
	}
}

// Run tells pods until ctx ends.
func (p *Pods) Run(ctx context.Context) {
	for {
		select {
		case <-ctx.Done():
			return
		case n := <-p.queue:
			if err := p.tell(ctx, n); err != nil && ctx.Err() == nil {
				p.Log.Warn("no event tells the pods of a stand-in", "image", n.image, "error", err)
			}
		}
	}
}

// The fields of Kubernetes' API objects that are read and written here. With the API's own types a mirror would be a
// third larger.
type (
	objectMeta struct {
		Name      string `json:"name"`
		Namespace string `json:"namespace"`
		UID       string `json:"uid,omitempty"`
	}
	container struct {
		Name  string `json:"name"`
		Image string `json:"image"`
	}
	containerStatus struct {
		Name  string `json:"name"`
		State struct {
			Running    *struct{} `json:"running"`
			Terminated *struct{} `json:"terminated"`
		} `json:"state"`
	}
	pod struct {
		Metadata objectMeta `json:"metadata"`
		Spec     struct {
			Init      []container `json:"initContainers"`
			Main      []container `json:"containers"`
			Ephemeral []container `json:"ephemeralContainers"`
		} `json:"spec"`
		Status struct {
			Init      []containerStatus `json:"initContainerStatuses"`
			Main      []containerStatus `json:"containerStatuses"`
			Ephemeral []containerStatus `json:"ephemeralContainerStatuses"`
		} `json:"status"`
	}
	event struct {
		APIVersion         string            `json:"apiVersion"`
		Kind               string            `json:"kind"`
		Metadata           objectMeta        `json:"metadata"`
		InvolvedObject     map[string]string `json:"involvedObject"`
		Reason             string            `json:"reason"`
		Message            string            `json:"message"`
		Type               string            `json:"type"`
		Source             map[string]string `json:"source"`
		FirstTimestamp     time.Time         `json:"firstTimestamp"`
		LastTimestamp      time.Time         `json:"lastTimestamp"`
		Count              int               `json:"count"`
		ReportingComponent string            `json:"reportingComponent"`
		ReportingInstance  string            `json:"reportingInstance"`
	}
)

func (p *Pods) tell(ctx context.Context, n notice) error {
	out, err := p.kubectl(ctx, nil, "get", "--raw", "/api/v1/pods?fieldSelector="+url.QueryEscape("spec.nodeName="+p.Node))
	if err != nil {
		return err
	}
	var list struct{ Items []pod }
	if err := json.Unmarshal(out, &list); err != nil {
		return fmt.Errorf("read the pods of node %s: %w", p.Node, err)
	}
	now := time.Now().UTC().Truncate(time.Second)
	for _, e := range events(list.Items, n, p.Node, now) {
		body, err := json.Marshal(e)
		if err != nil {
			return err
		}
		_, err = p.kubectl(ctx, body, "create", "--raw", "/api/v1/namespaces/"+url.PathEscape(e.Metadata.Namespace)+"/events", "-f", "-")
		// The pod was told before: it is pulled for each start.
		if err != nil && !strings.Contains(err.Error(), "AlreadyExists") {
			return err
		}
	}
	return nil
}

// events returns one event for each pod that waits for the image.
func events(pods []pod, n notice, node string, now time.Time) []event {
	var all []event
	for _, p := range pods {
		path := p.waitsFor(n.image)
		if path == "" {
			continue
		}
		hash := fnv.New64a()
		fmt.Fprint(hash, p.Metadata.UID, " ", n.image)
		message := fmt.Sprintf("%s is a stand-in of the lab", n.image)
		if n.what != "" {
			message += " (" + n.what + ")"
		}
		message += fmt.Sprintf(", for its registry cannot be reached: %s. `fathom image load` brings the real one", n.why)
		all = append(all, event{
			APIVersion: "v1", Kind: "Event",
			Metadata: objectMeta{Name: fmt.Sprintf("%s.%016x", p.Metadata.Name, hash.Sum64()), Namespace: p.Metadata.Namespace},
			InvolvedObject: map[string]string{
				"apiVersion": "v1", "kind": "Pod", "name": p.Metadata.Name, "namespace": p.Metadata.Namespace, "uid": p.Metadata.UID, "fieldPath": path,
			},
			Reason: "StandIn", Message: message, Type: "Normal",
			Source:         map[string]string{"component": "fathom-mirror", "host": node},
			FirstTimestamp: now, LastTimestamp: now, Count: 1,
			ReportingComponent: "fathom-mirror", ReportingInstance: node,
		})
	}
	return all
}

// waitsFor returns the field of the pod's first container that has the image and does not run, or nothing.
func (p *pod) waitsFor(image string) string {
	for _, kind := range []struct {
		field string
		specs []container
		have  []containerStatus
	}{
		{"initContainers", p.Spec.Init, p.Status.Init},
		{"containers", p.Spec.Main, p.Status.Main},
		{"ephemeralContainers", p.Spec.Ephemeral, p.Status.Ephemeral},
	} {
		started := map[string]bool{}
		for _, s := range kind.have {
			started[s.Name] = s.State.Running != nil || s.State.Terminated != nil && kind.field != "containers"
		}
		for _, c := range kind.specs {
			if !started[c.Name] && fullName(c.Image) == image {
				return fmt.Sprintf("spec.%s{%s}", kind.field, c.Name)
			}
		}
	}
	return ""
}

// fullName returns an image's name as the container runtime has it: nginx is docker.io/library/nginx:latest.
func fullName(image string) string {
	first, _, more := strings.Cut(image, "/")
	switch {
	case !more:
		image = "docker.io/library/" + image
	case !strings.ContainsAny(first, ".:") && first != "localhost":
		image = "docker.io/" + image
	case first == "index.docker.io":
		image = "docker.io" + strings.TrimPrefix(image, first)
	}
	if last := image[strings.LastIndexByte(image, '/')+1:]; !strings.ContainsAny(last, ":@") {
		image += ":latest"
	}
	return image
}

func (p *Pods) kubectl(ctx context.Context, in []byte, args ...string) ([]byte, error) {
	ctx, cancel := context.WithTimeout(ctx, 20*time.Second)
	defer cancel()
	cmd := exec.CommandContext(ctx, p.Kubectl, append([]string{"--kubeconfig", p.Kubeconfig, "--request-timeout=10s"}, args...)...)
	cmd.Stdin = bytes.NewReader(in)
	var problem bytes.Buffer
	cmd.Stderr = &problem
	out, err := cmd.Output()
	if err != nil {
		return nil, fmt.Errorf("kubectl %s: %w: %s", strings.Join(args[:3], " "), err, bytes.TrimSpace(problem.Bytes()))
	}
	return out, nil
}
