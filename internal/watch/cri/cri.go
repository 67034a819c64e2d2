// Package cri asks a container runtime for its state over the Container Runtime Interface, as crictl does. It only reads,
// except for Pull.
package cri

import (
	"context"
	"encoding/json"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"sort"
	"strings"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// Client is a connection to one container runtime.
type Client struct {
	socket  string
	conn    *grpc.ClientConn
	runtime runtime.RuntimeServiceClient
	images  runtime.ImageServiceClient
}

// maxMessage bounds an answer, as in kubelet: a node's list of pods with their labels and annotations can exceed gRPC's
// default of 4 MiB.
const maxMessage = 16 << 20

// Connect prepares a connection to the runtime that listens at a Unix socket. It does not wait for the runtime: the first
// call fails if it is not there.
func Connect(socket string) (*Client, error) {
	conn, err := grpc.NewClient("passthrough:///runtime",
		grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) {
			return (&net.Dialer{}).DialContext(ctx, "unix", socket)
		}),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(maxMessage)),
		// A runtime that is just starting is tried again soon: gRPC's default is to wait a second, and longer each time.
		grpc.WithConnectParams(grpc.ConnectParams{
			Backoff:           backoff.Config{BaseDelay: 20 * time.Millisecond, Multiplier: 1.5, MaxDelay: time.Second},
			MinConnectTimeout: time.Second,
		}),
	)
	if err != nil {
		return nil, fmt.Errorf("connect to the container runtime at %s: %w", socket, err)
	}
	return &Client{socket: socket, conn: conn, runtime: runtime.NewRuntimeServiceClient(conn), images: runtime.NewImageServiceClient(conn)}, nil
}

// Close ends the connection.
func (c *Client) Close() error { return c.conn.Close() }

// Version returns the runtime's name and version: "containerd v2.4.2".
func (c *Client) Version(ctx context.Context) (string, error) {
	v, err := c.runtime.Version(ctx, &runtime.VersionRequest{})
	if err != nil {
		return "", c.failed("ask its version", err)
	}
	return v.RuntimeName + " " + v.RuntimeVersion, nil
}

// Wait returns when the runtime answers and is ready to run containers. It does not wait for the network, which becomes
// ready when a network plugin is installed. It does not wait for a runtime that answers without CRI either: containerd
// listens only after its plugins have loaded or failed to.
func (c *Client) Wait(ctx context.Context) error {
	var last error
	for {
		answer, err := c.runtime.Status(ctx, &runtime.StatusRequest{})
		if err == nil {
			for _, condition := range answer.GetStatus().GetConditions() {
				if condition.Type != runtime.RuntimeReady {
					continue
				}
				if condition.Status {
					return nil
				}
				err = fmt.Errorf("%s: %s", condition.Reason, condition.Message)
			}
		}
		if status.Code(err) == codes.Unimplemented {
			return c.failed("wait until it is ready", err)
		}
		// After the deadline, err is only the deadline's. The runtime measures the same deadline itself, and may report it
		// a moment before ctx does.
		if code := status.Code(err); last == nil || code != codes.DeadlineExceeded && code != codes.Canceled {
			last = err
		}
		select {
		case <-ctx.Done():
			return c.failed("wait until it is ready", last)
		case <-time.After(10 * time.Millisecond):
		}
	}
}

// An Image is one that the runtime can start containers from.
type Image struct {
	ID      string   // digest of its configuration, sha256:...
	Names   []string // name:tag, sorted; none for an image that is only known by digest
	Digests []string // name@digest, sorted
	Size    uint64   // bytes
	Pinned  bool     // never removed to free disk space
}

// Images returns the images, sorted by their first name.
func (c *Client) Images(ctx context.Context) ([]Image, error) {
	list, err := c.images.ListImages(ctx, &runtime.ListImagesRequest{})
	if err != nil {
		return nil, c.failed("list images", err)
	}
	images := make([]Image, 0, len(list.Images))
	for _, i := range list.Images {
		image := Image{ID: i.Id, Names: slices.Clone(i.RepoTags), Digests: slices.Clone(i.RepoDigests), Size: i.Size, Pinned: i.Pinned}
		sort.Strings(image.Names)
		sort.Strings(image.Digests)
		images = append(images, image)
	}
	sort.Slice(images, func(i, j int) bool { return images[i].key() < images[j].key() })
	return images, nil
}

func (i Image) key() string { return strings.Join(i.Names, " ") + " " + i.ID }

// Pull fetches an image and returns its ID.
func (c *Client) Pull(ctx context.Context, name string) (string, error) {
	answer, err := c.images.PullImage(ctx, &runtime.PullImageRequest{Image: &runtime.ImageSpec{Image: name}})
	if err != nil {
		return "", c.failed("pull "+name, err)
	}
	return answer.ImageRef, nil
}

// A Pod is a pod sandbox with its containers.
type Pod struct {
	ID        string
	Namespace string
	Name      string
	UID       string
	Attempt   uint32 // the number of earlier sandboxes of this pod
	Ready     bool
	Created   time.Time
	Labels    map[string]string
	// PID is the sandbox's first process, by which its network namespace can be entered; 0 if it is
	// not running.
	PID int
	// IPs are the pod's addresses; none for a pod on the node's network.
	IPs []netip.Addr
	// Network is where the pod's network is: "pod" or "node".
	Network    string
	Containers []Container // sorted by when they were created
}

// A Container is a container of a pod.
type Container struct {
	ID      string
	Name    string
	Image   string // as the pod's specification names it, if the runtime knows
	Attempt uint32 // how many times it was restarted
	State   State
	Created time.Time
	PID     int // 0 if it is not running
	// ExitCode, Reason and Message say how it ended, if it has.
	ExitCode int32
	Reason   string
	Message  string
}

// State is the state of a container.
type State string

// The states of a container.
const (
	Created State = "created"
	Running State = "running"
	Exited  State = "exited"
	Unknown State = "unknown"
)

// Pods returns all pods, ready or not, sorted by namespace, name and age.
func (c *Client) Pods(ctx context.Context) ([]Pod, error) {
	sandboxes, err := c.runtime.ListPodSandbox(ctx, &runtime.ListPodSandboxRequest{})
	if err != nil {
		return nil, c.failed("list pods", err)
	}
	containers, err := c.runtime.ListContainers(ctx, &runtime.ListContainersRequest{})
	if err != nil {
		return nil, c.failed("list containers", err)
	}
	of := map[string][]Container{}
	for _, item := range containers.Containers {
		container, ok, err := c.container(ctx, item)
		if err != nil {
			return nil, err
		}
		if ok {
			of[item.PodSandboxId] = append(of[item.PodSandboxId], container)
		}
	}
	pods := make([]Pod, 0, len(sandboxes.Items))
	for _, item := range sandboxes.Items {
		pod, ok, err := c.pod(ctx, item)
		if err != nil {
			return nil, err
		}
		if !ok {
			continue
		}
		pod.Containers = of[item.Id]
		sort.Slice(pod.Containers, func(i, j int) bool { return pod.Containers[i].Created.Before(pod.Containers[j].Created) })
		pods = append(pods, pod)
	}
	sort.Slice(pods, func(i, j int) bool {
		a, b := pods[i], pods[j]
		if a.Namespace != b.Namespace {
			return a.Namespace < b.Namespace
		}
		if a.Name != b.Name {
			return a.Name < b.Name
		}
		return a.Created.Before(b.Created)
	})
	return pods, nil
}

// pod fetches one sandbox's details; ok is false if it vanished since it was listed.
func (c *Client) pod(ctx context.Context, item *runtime.PodSandbox) (pod Pod, ok bool, err error) {
	answer, err := c.runtime.PodSandboxStatus(ctx, &runtime.PodSandboxStatusRequest{PodSandboxId: item.Id, Verbose: true})
	if isGone(err) {
		return Pod{}, false, nil
	}
	if err != nil {
		return Pod{}, false, c.failed("ask about the pod "+item.Id, err)
	}
	status := answer.GetStatus()
	meta := status.GetMetadata()
	pod = Pod{
		ID:        item.Id,
		Namespace: meta.GetNamespace(),
		Name:      meta.GetName(),
		UID:       meta.GetUid(),
		Attempt:   meta.GetAttempt(),
		Ready:     status.GetState() == runtime.PodSandboxState_SANDBOX_READY,
		Created:   time.Unix(0, status.GetCreatedAt()),
		Labels:    status.GetLabels(),
		PID:       pid(answer.GetInfo()),
		Network:   "pod",
	}
	if status.GetLinux().GetNamespaces().GetOptions().GetNetwork() == runtime.NamespaceMode_NODE {
		pod.Network = "node"
	}
	texts := []string{status.GetNetwork().GetIp()}
	for _, more := range status.GetNetwork().GetAdditionalIps() {
		texts = append(texts, more.GetIp())
	}
	for _, text := range texts {
		if addr, err := netip.ParseAddr(text); err == nil {
			pod.IPs = append(pod.IPs, addr)
		}
	}
	return pod, true, nil
}

// container fetches one container's details; ok is false if it vanished since it was listed.
func (c *Client) container(ctx context.Context, item *runtime.Container) (container Container, ok bool, err error) {
	answer, err := c.runtime.ContainerStatus(ctx, &runtime.ContainerStatusRequest{ContainerId: item.Id, Verbose: true})
	if isGone(err) {
		return Container{}, false, nil
	}
	if err != nil {
		return Container{}, false, c.failed("ask about the container "+item.Id, err)
	}
	status := answer.GetStatus()
	container = Container{
		ID:       item.Id,
		Name:     status.GetMetadata().GetName(),
		Image:    imageName(status.GetImage(), item.GetImage()),
		Attempt:  status.GetMetadata().GetAttempt(),
		Created:  time.Unix(0, status.GetCreatedAt()),
		PID:      pid(answer.GetInfo()),
		ExitCode: status.GetExitCode(),
		Reason:   status.GetReason(),
		Message:  status.GetMessage(),
	}
	switch status.GetState() {
	case runtime.ContainerState_CONTAINER_CREATED:
		container.State = Created
	case runtime.ContainerState_CONTAINER_RUNNING:
		container.State = Running
	case runtime.ContainerState_CONTAINER_EXITED:
		container.State = Exited
		container.PID = 0
	default:
		container.State = Unknown
	}
	return container, true, nil
}

// imageName returns the most descriptive name of an image.
func imageName(specs ...*runtime.ImageSpec) string {
	var names []string
	for _, spec := range specs {
		names = append(names, spec.GetUserSpecifiedImage(), spec.GetImage())
	}
	for _, name := range names {
		if name != "" && !strings.HasPrefix(name, "sha256:") {
			return name
		}
	}
	for _, name := range names {
		if name != "" {
			return name
		}
	}
	return ""
}

// pid reads the process ID from the details that a runtime adds to a verbose status. Their format is the runtime's own;
// containerd and CRI-O both have this field. CRI has no other way to ask.
func pid(info map[string]string) int {
	var details struct {
		PID int `json:"pid"`
	}
	if json.Unmarshal([]byte(info["info"]), &details) != nil {
		return 0
	}
	return details.PID
}
