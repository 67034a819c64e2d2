package cri

import (
	"context"
	"net"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// fake is a runtime with two pods; "gone" vanishes between the list and the question about it.
type fake struct {
	runtime.UnimplementedRuntimeServiceServer
	runtime.UnimplementedImageServiceServer
	notReady int    // how many answers say so
	asked    func() // with each question whether it is ready
}

func (f *fake) Status(context.Context, *runtime.StatusRequest) (*runtime.StatusResponse, error) {
	f.notReady--
	if f.asked != nil {
		f.asked()
	}
	return &runtime.StatusResponse{Status: &runtime.RuntimeStatus{Conditions: []*runtime.RuntimeCondition{
		{Type: runtime.NetworkReady, Status: false},
		{Type: runtime.RuntimeReady, Status: f.notReady < 0, Reason: "Starting"},
	}}}, nil
}

func (f *fake) ListImages(context.Context, *runtime.ListImagesRequest) (*runtime.ListImagesResponse, error) {
	return &runtime.ListImagesResponse{Images: []*runtime.Image{
		{Id: "sha256:2", RepoTags: []string{"b:2", "b:1"}, Size: 7},
		{Id: "sha256:1", RepoTags: []string{"a:1"}, Pinned: true},
	}}, nil
}

func (f *fake) ListPodSandbox(context.Context, *runtime.ListPodSandboxRequest) (*runtime.ListPodSandboxResponse, error) {
	return &runtime.ListPodSandboxResponse{Items: []*runtime.PodSandbox{{Id: "p2"}, {Id: "gone"}, {Id: "p1"}}}, nil
}

func (f *fake) PodSandboxStatus(_ context.Context, r *runtime.PodSandboxStatusRequest) (*runtime.PodSandboxStatusResponse, error) {
	switch r.PodSandboxId {
	case "p1":
		return &runtime.PodSandboxStatusResponse{
			Status: &runtime.PodSandboxStatus{
				Metadata:  &runtime.PodSandboxMetadata{Namespace: "default", Name: "web", Uid: "u", Attempt: 1},
				State:     runtime.PodSandboxState_SANDBOX_READY,
				CreatedAt: 5,
				Network:   &runtime.PodSandboxNetworkStatus{Ip: "10.0.0.1", AdditionalIps: []*runtime.PodIP{{Ip: "fd00::1"}}},
			},
			Info: map[string]string{"info": `{"pid": 42}`},
		}, nil
	case "p2":
		return &runtime.PodSandboxStatusResponse{Status: &runtime.PodSandboxStatus{
			Metadata: &runtime.PodSandboxMetadata{Namespace: "kube-system", Name: "proxy"},
			State:    runtime.PodSandboxState_SANDBOX_NOTREADY,
			Linux: &runtime.LinuxPodSandboxStatus{Namespaces: &runtime.Namespace{
				Options: &runtime.NamespaceOption{Network: runtime.NamespaceMode_NODE},
			}},
		}}, nil
	}
	return nil, status.Error(codes.NotFound, "gone")
}

func (f *fake) ListContainers(context.Context, *runtime.ListContainersRequest) (*runtime.ListContainersResponse, error) {
	spec := &runtime.ImageSpec{Image: "sha256:1", UserSpecifiedImage: "a:1"}
	return &runtime.ListContainersResponse{Containers: []*runtime.Container{
		{Id: "c2", PodSandboxId: "p1", Image: spec}, {Id: "c1", PodSandboxId: "p1", Image: spec}, {Id: "gone", PodSandboxId: "p1"},
	}}, nil
}

func (f *fake) ContainerStatus(_ context.Context, r *runtime.ContainerStatusRequest) (*runtime.ContainerStatusResponse, error) {
	switch r.ContainerId {
	case "c1":
		return &runtime.ContainerStatusResponse{Status: &runtime.ContainerStatus{
			Metadata: &runtime.ContainerMetadata{Name: "init"}, State: runtime.ContainerState_CONTAINER_EXITED,
			CreatedAt: 1, ExitCode: 3, Reason: "Error", Image: &runtime.ImageSpec{Image: "sha256:1"},
		}, Info: map[string]string{"info": `{"pid": 41}`}}, nil
	case "c2":
		return &runtime.ContainerStatusResponse{Status: &runtime.ContainerStatus{
			Metadata: &runtime.ContainerMetadata{Name: "main", Attempt: 2}, State: runtime.ContainerState_CONTAINER_RUNNING, CreatedAt: 2,
		}, Info: map[string]string{"info": `{"pid": 43}`}}, nil
	}
	return nil, status.Error(codes.NotFound, "gone")
}

func serve(t *testing.T, f *fake) *Client {
	t.Helper()
	return listen(t, func(server *grpc.Server) {
		runtime.RegisterRuntimeServiceServer(server, f)
		runtime.RegisterImageServiceServer(server, f)
	})
}

// serveNothing is a containerd whose cri plugin failed to load.
func serveNothing(t *testing.T) *Client {
	t.Helper()
	return listen(t, func(*grpc.Server) {})
}

func listen(t *testing.T, register func(*grpc.Server)) *Client {
	t.Helper()
	socket := filepath.Join(t.TempDir(), "s")
	listener, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	server := grpc.NewServer()
	register(server)
	go func() { _ = server.Serve(listener) }()
	t.Cleanup(server.Stop)
	c, err := Connect(socket)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

func TestPods(t *testing.T) {
	pods, err := serve(t, &fake{}).Pods(context.Background())
	if err != nil {
		t.Fatal(err)
	}
	if len(pods) != 2 || pods[0].Name != "web" || pods[1].Name != "proxy" {
		t.Fatalf("got %+v", pods)
	}
	web := pods[0]
	if !web.Ready || web.PID != 42 || web.Attempt != 1 || web.Network != "pod" || len(web.IPs) != 2 || web.IPs[1].String() != "fd00::1" {
		t.Errorf("web: %+v", web)
	}
	want := []Container{
		{ID: "c1", Name: "init", Image: "a:1", State: Exited, Created: time.Unix(0, 1), ExitCode: 3, Reason: "Error"},
		{ID: "c2", Name: "main", Image: "a:1", State: Running, Created: time.Unix(0, 2), Attempt: 2, PID: 43},
	}
	if !reflect.DeepEqual(web.Containers, want) {
		t.Errorf("containers %+v\nwant %+v", web.Containers, want)
	}
	if proxy := pods[1]; proxy.Ready || proxy.Network != "node" || proxy.PID != 0 || len(proxy.IPs) != 0 {
		t.Errorf("proxy: %+v", proxy)
	}
}

func TestImages(t *testing.T) {
	got, err := serve(t, &fake{}).Images(context.Background())
	if err != nil {
		t.Fatal(err)
	}
	want := []Image{
		{ID: "sha256:1", Names: []string{"a:1"}, Pinned: true},
		{ID: "sha256:2", Names: []string{"b:1", "b:2"}, Size: 7},
	}
	if len(got) != 2 || !reflect.DeepEqual(got[0].Names, want[0].Names) || !reflect.DeepEqual(got[1].Names, want[1].Names) || !got[0].Pinned || got[1].Size != 7 {
		t.Errorf("got %+v, want %+v", got, want)
	}
}

func TestWait(t *testing.T) {
	if err := serve(t, &fake{notReady: 3}).Wait(context.Background()); err != nil {
		t.Error(err)
	}
	// It ends while the runtime is being asked again: that question fails with the end alone.
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	questions := 0
	err := serve(t, &fake{notReady: 1 << 20, asked: func() {
		if questions++; questions == 2 {
			cancel()
		}
	}}).Wait(ctx)
	if err == nil || !strings.Contains(err.Error(), "Starting") {
		t.Errorf("error %v, want one with the runtime's reason", err)
	}
}

func TestErrors(t *testing.T) {
	c, err := Connect(filepath.Join(t.TempDir(), "nobody"))
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if _, err := c.Images(context.Background()); err == nil || !strings.Contains(err.Error(), "is the node running") {
		t.Errorf("error %v, want advice", err)
	}
	none := serveNothing(t)
	if err := none.Wait(context.Background()); err == nil || !strings.Contains(err.Error(), "CRI v1") {
		t.Errorf("error %v, want one about CRI v1, at once", err)
	}
	if _, err := serve(t, &fake{}).Version(context.Background()); err == nil || !strings.Contains(err.Error(), "CRI v1") {
		t.Errorf("error %v, want one about CRI v1", err)
	}
}
