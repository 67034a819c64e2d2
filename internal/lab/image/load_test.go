package image

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"log"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-containerregistry/pkg/registry"
	v1 "github.com/google/go-containerregistry/pkg/v1"

	"github.com/fathom-network/fathom/internal/watch/cri"
)

// Images from files and from a registry reach a node.
func TestLoadAndPull(t *testing.T) {
	ctx := context.Background()
	k := realKit(t)
	image := testImage(t, runtime.GOARCH, "text")

	server := httptest.NewServer(registry.New(registry.Logger(log.New(io.Discard, "", 0))))
	defer server.Close()
	host := strings.TrimPrefix(server.URL, "http://")
	ref := host + "/team/app:v1"
	push(t, server.URL, image)
	registries := t.TempDir()
	if err := os.MkdirAll(filepath.Join(registries, host), 0o755); err != nil {
		t.Fatal(err)
	}
	hosts := fmt.Sprintf("server = %q\n[host.%q]\n  capabilities = ['pull', 'resolve']\n", server.URL, server.URL)
	if err := os.WriteFile(filepath.Join(registries, host, "hosts.toml"), []byte(hosts), 0o644); err != nil {
		t.Fatal(err)
	}

	var targets []Target
	for _, name := range []string{"one", "two"} {
		targets = append(targets, Target{Name: name, SocketPath: start(t, k, t.TempDir(), registries).socket()})
	}
	docker := filepath.Join(t.TempDir(), "docker.tar")
	oci := filepath.Join(t.TempDir(), "oci.tar.gz")
	if err := os.WriteFile(docker, dockerArchive(t, "nginx:1", image), 0o644); err != nil {
		t.Fatal(err)
	}
	other := testImage(t, runtime.GOARCH, "other text")
	if err := os.WriteFile(oci, compress(t, ociArchive(t, map[string]string{refNameAnnotation: "web:2"}, other)), 0o644); err != nil {
		t.Fatal(err)
	}
	broken := filepath.Join(t.TempDir(), "broken.tar")
	if err := os.WriteFile(broken, dockerArchive(t, "broken:1", image)[:1500], 0o644); err != nil {
		t.Fatal(err)
	}

	// One bad file: no node is touched.
	if _, _, err := Load(ctx, k, []string{docker, broken}, Input{Dir: t.TempDir()}, targets); err == nil || !strings.Contains(err.Error(), broken) {
		t.Errorf("error %v, want one about %s", err, broken)
	}
	for _, target := range targets {
		if images, err := List(ctx, target); err != nil || len(images) > 0 {
			t.Errorf("node %s has %v, %v; want nothing", target.Name, images, err)
		}
	}

	names, _, err := Load(ctx, k, []string{docker, oci}, Input{Dir: t.TempDir()}, targets)
	if err != nil {
		t.Fatal(err)
	}
	want := []string{"docker.io/library/nginx:1", "docker.io/library/web:2"}
	if !slices.Equal(names, want) {
		t.Errorf("loaded %v, want %v", names, want)
	}
	for _, target := range targets {
		images, err := List(ctx, target)
		if err != nil {
			t.Fatal(err)
		}
		var got []string
		for _, image := range images {
			got = append(got, image.Names...)
		}
		if !slices.Equal(got, want) {
			t.Errorf("node %s has %v, want %v", target.Name, got, want)
		}
	}

	// An image whose name is by digest: CRI shows it so.
	pinned := testImage(t, runtime.GOARCH, "pinned")
	digest, err := pinned.Digest()
	if err != nil {
		t.Fatal(err)
	}
	byDigest := filepath.Join(t.TempDir(), "pinned.tar")
	if err := os.WriteFile(byDigest, ociArchive(t, map[string]string{refNameAnnotation: "pinned@" + digest.String()}, pinned), 0o644); err != nil {
		t.Fatal(err)
	}
	if names, _, err = Load(ctx, k, []string{byDigest}, Input{Dir: t.TempDir()}, targets); err != nil || !slices.Equal(names, []string{"docker.io/library/pinned@" + digest.String()}) {
		t.Errorf("by digest: loaded %v, error %v", names, err)
	}
	if _, _, err := Load(ctx, k, []string{docker}, Input{Dir: t.TempDir()}, []Target{{Name: "gone", SocketPath: "/nowhere"}}); err == nil || !strings.Contains(err.Error(), "node gone") {
		t.Errorf("error %v, want one that names the node", err)
	}

	client, err := cri.Connect(targets[0].SocketPath)
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	if _, err := client.Pull(ctx, ref); err != nil {
		t.Fatal(err)
	}
	images, err := client.Images(ctx)
	if err != nil {
		t.Fatal(err)
	}
	if !slices.ContainsFunc(images, func(i cri.Image) bool { return slices.Contains(i.Names, ref) }) {
		t.Errorf("%s is not among %v", ref, images)
	}
}

// push puts an image into a registry as team/app:v1. The library's own way to do it depends on
// docker's command line, which this module would then have among its requirements.
func push(t *testing.T, url string, image v1.Image) {
	t.Helper()
	send := func(method, path, kind string, data []byte) {
		t.Helper()
		request, err := http.NewRequest(method, url+"/v2/team/app/"+path, bytes.NewReader(data))
		if err != nil {
			t.Fatal(err)
		}
		request.Header.Set("Content-Type", kind)
		answer, err := http.DefaultClient.Do(request)
		if err != nil {
			t.Fatal(err)
		}
		answer.Body.Close()
		if answer.StatusCode != http.StatusCreated {
			t.Fatalf("%s %s: %s", method, path, answer.Status)
		}
	}
	blob := func(data []byte, digest v1.Hash) {
		t.Helper()
		send(http.MethodPost, "blobs/uploads/?digest="+digest.String(), "application/octet-stream", data)
	}
	layers, err := image.Layers()
	if err != nil {
		t.Fatal(err)
	}
	for _, l := range layers {
		digest, err := l.Digest()
		if err != nil {
			t.Fatal(err)
		}
		in, err := l.Compressed()
		if err != nil {
			t.Fatal(err)
		}
		data, err := io.ReadAll(in)
		in.Close()
		if err != nil {
			t.Fatal(err)
		}
		blob(data, digest)
	}
	digest, err := image.ConfigName()
	if err != nil {
		t.Fatal(err)
	}
	config, err := image.RawConfigFile()
	if err != nil {
		t.Fatal(err)
	}
	blob(config, digest)
	manifest, err := image.RawManifest()
	if err != nil {
		t.Fatal(err)
	}
	kind, err := image.MediaType()
	if err != nil {
		t.Fatal(err)
	}
	send(http.MethodPut, "manifests/v1", string(kind), manifest)
}
