package image

import (
	"encoding/json"
	"io"
	"log"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/registry"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/layout"

	"github.com/fathom-network/fathom/internal/kit"
)

// networkPrograms are files in the place of the network's programs for two architectures.
func networkPrograms(t *testing.T) map[string]string {
	t.Helper()
	of := map[string]string{"amd64": t.TempDir(), "arm64": t.TempDir()}
	for arch, dir := range of {
		for _, name := range append([]string{"fathom-dns"}, ownPrograms...) {
			if err := os.WriteFile(filepath.Join(dir, name), []byte(name+" for "+arch), 0o755); err != nil {
				t.Fatal(err)
			}
		}
	}
	return of
}

// What is written goes to a registry and is found there by the names that an installation uses, for each architecture.
func TestNetworkImagesInRegistry(t *testing.T) {
	programs := networkPrograms(t)
	dir := t.TempDir()
	n, err := WriteNetwork(dir, "v1", programs)
	if err != nil {
		t.Fatal(err)
	}
	server := httptest.NewServer(registry.New(registry.Logger(log.New(io.Discard, "", 0))))
	defer server.Close()
	at := strings.TrimPrefix(server.URL, "http://") + "/team/net"
	pushLayout(t, dir, server.URL, "team/net")

	agent, dns, err := n.In(at)
	if err != nil {
		t.Fatal(err)
	}
	for ref, want := range map[string]struct{ entrypoint, user string }{agent: {"/fathom-agent", ""}, dns: {"/fathom-dns", "65532:65532"}} {
		ref, err := name.NewDigest(ref)
		if err != nil {
			t.Fatal(err)
		}
		get := func(path string, into any) {
			t.Helper()
			answer, err := http.Get(server.URL + "/v2/" + ref.Context().RepositoryStr() + "/" + path)
			if err != nil {
				t.Fatal(err)
			}
			defer answer.Body.Close()
			if answer.StatusCode != http.StatusOK {
				t.Fatalf("%s of %s: %s", path, ref, answer.Status)
			}
			if err := json.NewDecoder(answer.Body).Decode(into); err != nil {
				t.Fatal(err)
			}
		}
		var index v1.IndexManifest
		get("manifests/"+ref.DigestStr(), &index)
		var found []string
		for _, m := range index.Manifests {
			var manifest v1.Manifest
			get("manifests/"+m.Digest.String(), &manifest)
			var config v1.ConfigFile
			get("blobs/"+manifest.Config.Digest.String(), &config)
			found = append(found, m.Platform.String())
			if got := config.Config.Entrypoint; len(got) != 1 || got[0] != want.entrypoint || config.Config.User != want.user || config.Architecture != m.Platform.Architecture {
				t.Errorf("%s for %s runs %q as %q on %s", ref, m.Platform, got, config.Config.User, config.Architecture)
			}
		}
		if !slices.Equal(found, []string{"linux/amd64", "linux/arm64"}) {
			t.Errorf("%s is for %q", ref, found)
		}
	}

	// Equal programs have equal digests, and another program others.
	again, err := WriteNetwork(t.TempDir(), "v1", programs)
	if err != nil {
		t.Fatal(err)
	}
	if again.Images["fathom-agent"] != n.Images["fathom-agent"] || again.Images["fathom-dns"] != n.Images["fathom-dns"] {
		t.Errorf("the same programs are %v and %v", n.Images, again.Images)
	}
	if err := os.WriteFile(filepath.Join(programs["arm64"], "fathom-cni"), []byte("another"), 0o755); err != nil {
		t.Fatal(err)
	}
	changed, err := WriteNetwork(t.TempDir(), "v1", programs)
	if err != nil {
		t.Fatal(err)
	}
	if changed.Images["fathom-agent"] == n.Images["fathom-agent"] || changed.Images["fathom-dns"] != n.Images["fathom-dns"] {
		t.Errorf("fathom-cni for arm64 changed: %v became %v", n.Images, changed.Images)
	}
	if _, err := WriteNetwork(dir, "v1", programs); err == nil {
		t.Error("images were written over others")
	}
}

// pushLayout sends every image of a layout, with all of its architectures, to a registry under its name. The library's own way to
// do so would have the root module require Docker's command line, for its credentials.
func pushLayout(t *testing.T, dir, url, path string) {
	t.Helper()
	send := func(method, path, mediaType string, r io.Reader) {
		t.Helper()
		request, err := http.NewRequest(method, url+"/v2/"+path, r)
		if err != nil {
			t.Fatal(err)
		}
		request.Header.Set("Content-Type", mediaType)
		answer, err := http.DefaultClient.Do(request)
		if err != nil {
			t.Fatal(err)
		}
		answer.Body.Close()
		if answer.StatusCode != http.StatusCreated {
			t.Fatalf("%s %s: %s", method, path, answer.Status)
		}
	}
	blob := func(digest v1.Hash) *os.File {
		f, err := os.Open(filepath.Join(dir, "blobs/sha256", digest.Hex))
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { f.Close() })
		return f
	}
	root, err := layout.ImageIndexFromPath(dir)
	if err != nil {
		t.Fatal(err)
	}
	images, err := root.IndexManifest()
	if err != nil {
		t.Fatal(err)
	}
	for _, image := range images.Manifests {
		repository := path + "/" + image.Annotations[refNameAnnotation]
		index, err := root.ImageIndex(image.Digest)
		if err != nil {
			t.Fatal(err)
		}
		archs, err := index.IndexManifest()
		if err != nil {
			t.Fatal(err)
		}
		for _, m := range archs.Manifests {
			var manifest v1.Manifest
			if err := json.NewDecoder(blob(m.Digest)).Decode(&manifest); err != nil {
				t.Fatal(err)
			}
			for _, d := range append(manifest.Layers, manifest.Config) {
				send("POST", repository+"/blobs/uploads/?digest="+d.Digest.String(), "application/octet-stream", blob(d.Digest))
			}
			send("PUT", repository+"/manifests/"+m.Digest.String(), string(m.MediaType), blob(m.Digest))
		}
		send("PUT", repository+"/manifests/"+image.Digest.String(), string(image.MediaType), blob(image.Digest))
	}
}

func TestNetworkRegistryNames(t *testing.T) {
	digest := "sha256:" + strings.Repeat("0a", 32)
	n := Network{Images: map[string]string{"fathom-agent": digest, "fathom-dns": digest}}
	for registry, want := range map[string]string{
		"registry.example":               "registry.example/fathom-agent@" + digest,
		"registry.example/net":           "registry.example/net/fathom-agent@" + digest,
		"localhost:5000/a/b":             "localhost:5000/a/b/fathom-agent@" + digest,
		"docker.io/team":                 "docker.io/team/fathom-agent@" + digest,
		"team/net":                       "",
		"":                               "",
		"https://registry.example":       "",
		"registry.example/Net":           "",
		"registry.example/net/":          "",
		"registry.example/net:v1":        "",
		"registry.example/net@" + digest: "",
	} {
		agent, _, err := n.In(registry)
		if want == "" && (err == nil || !strings.Contains(err.Error(), "registry "+`"`+registry+`"`)) {
			t.Errorf("%q: %q, %v; want an error that names it", registry, agent, err)
		}
		if want != "" && agent != want {
			t.Errorf("%q: %q, %v; want %q", registry, agent, err, want)
		}
	}
}

func TestReadNetwork(t *testing.T) {
	k := kit.Kit{Dir: t.TempDir()}
	if _, err := ReadNetwork(k, "v1"); err == nil || !strings.Contains(err.Error(), "make dist") {
		t.Errorf("error %v, want what makes them", err)
	}
	n := Network{Version: "v1", Images: map[string]string{"fathom-agent": "sha256:1"}}
	if err := n.Record(k); err != nil {
		t.Fatal(err)
	}
	if got, err := ReadNetwork(k, "v1"); err != nil || got.Images["fathom-agent"] != "sha256:1" {
		t.Errorf("%v, %v", got, err)
	}
	if _, err := ReadNetwork(k, "v2"); err == nil || !strings.Contains(err.Error(), "version v1") {
		t.Errorf("error %v, want one that names the version", err)
	}
}
