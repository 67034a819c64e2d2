package image

import (
	"context"
	"fmt"
	"io"
	"log"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"

	"github.com/google/go-containerregistry/pkg/registry"

	"github.com/fathom-network/fathom/internal/facts/standin"
	"github.com/fathom-network/fathom/internal/lab/mirror"
	"github.com/fathom-network/fathom/internal/watch/cri"
)

// A containerd that is told of a mirror alone gets from a registry what that one has, and a stand-in where there is none.
func TestPullThroughMirror(t *testing.T) {
	ctx := context.Background()
	k := realKit(t)
	root, registries := t.TempDir(), t.TempDir()

	var socket string
	var told []string
	node := httptest.NewServer(mirror.New(mirror.Options{
		Content: filepath.Join(root, contentDir),
		Images: func(ctx context.Context, name string) (map[string]string, error) {
			return mirror.Ctr{Program: k.Bin("ctr"), Socket: socket}.Images(ctx, name)
		},
		StandIn: func(image, _ string, _ error) { told = append(told, image) },
		Log:     slog.New(slog.DiscardHandler),
	}))
	defer node.Close()
	if err := os.Mkdir(filepath.Join(registries, "_default"), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(registries, "_default", "hosts.toml"), fmt.Appendf(nil, "server = %q\n", node.URL), 0o644); err != nil {
		t.Fatal(err)
	}

	// A registry that gives everybody a token and lets nobody in without it, as Docker's does.
	plain := registry.New(registry.Logger(log.New(io.Discard, "", 0)))
	pushed := httptest.NewServer(plain)
	defer pushed.Close()
	push(t, pushed.URL, testImage(t, runtime.GOARCH, "of the registry"))
	var server *httptest.Server
	server = httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		switch {
		case r.URL.Path == "/token":
			fmt.Fprint(w, `{"token":"open sesame"}`)
		case r.Header.Get("Authorization") != "Bearer open sesame":
			w.Header().Set("WWW-Authenticate", fmt.Sprintf(`Bearer realm="%s/token",service="registry",scope="repository:team/app:pull"`, server.URL))
			w.WriteHeader(http.StatusUnauthorized)
		default:
			plain.ServeHTTP(w, r)
		}
	}))
	defer server.Close()

	socket = start(t, k, root, registries).socket()
	target := Target{Name: "one", SocketPath: socket}
	client, err := cri.Connect(socket)
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	archive := filepath.Join(t.TempDir(), "image.tar")
	if err := os.WriteFile(archive, dockerArchive(t, standin.Image("busybox"), testImage(t, runtime.GOARCH, "busybox")), 0o644); err != nil {
		t.Fatal(err)
	}
	if _, _, err := Load(ctx, k, []string{archive}, Input{Dir: t.TempDir()}, []Target{target}); err != nil {
		t.Fatal(err)
	}

	if _, err := client.Pull(ctx, strings.TrimPrefix(server.URL, "http://")+"/team/app:v1"); err != nil {
		t.Errorf("pull from a registry that is there: %v", err)
	}
	// Nothing listens at this port of the loopback device: a refusal, as fast as on a machine without a network.
	away := "127.0.0.1:1"
	id, err := client.Pull(ctx, standin.Image("busybox"))
	if err != nil {
		t.Errorf("pull the stand-in by its own name: %v", err)
	}
	for image, want := range map[string]string{
		away + "/team/app:v1":                                away + "/team/app:v1 cannot be pulled: " + away + " cannot be reached (connect: connection refused), and the lab has no stand-in for it; where there is a network",
		"fathom.network/nothing:1":                           "fathom.network/nothing:1 cannot be pulled: no registry has it, and neither has this node",
		away + "/team/app@sha256:" + strings.Repeat("0", 64): "which bytes are meant, so no stand-in will do",
	} {
		if _, err := client.Pull(ctx, image); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("pull %s: %v, want an error with %q", image, err, want)
		}
	}
	if len(told) > 0 {
		t.Errorf("told of stand-ins: %q", told)
	}
	images, err := client.Images(ctx)
	if err != nil {
		t.Fatal(err)
	}
	for _, i := range images {
		if standin.Of(i.Names) && i.ID != id {
			t.Errorf("the stand-in has the ID %s, and pulling it gave %s", i.ID, id)
		}
	}
}
