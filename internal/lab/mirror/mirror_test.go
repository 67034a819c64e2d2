package mirror

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/fathom-network/fathom/internal/facts/standin"
)

// node is a mirror with what its node has, and whether registries can be reached.
type node struct {
	*mirror
	t       *testing.T
	images  map[string]string
	reached bool
	dialled []string
	told    []string
}

func newNode(t *testing.T) *node {
	n := &node{t: t, images: map[string]string{}}
	n.mirror = newMirror(Options{
		Content: t.TempDir(),
		Images:  func(context.Context, string) (map[string]string, error) { return n.images, nil },
		StandIn: func(image, what string, why error) { n.told = append(n.told, image+" is "+what+", since "+why.Error()) },
		Log:     slog.New(slog.DiscardHandler),
	})
	n.reach.dial = func(_ context.Context, _, address string) (net.Conn, error) {
		n.dialled = append(n.dialled, address)
		if !n.reached {
			return nil, errors.New("no network")
		}
		a, b := net.Pipe()
		b.Close()
		return a, nil
	}
	return n
}

// put writes a blob and returns its digest.
func (n *node) put(data []byte) string {
	n.t.Helper()
	sum := sha256.Sum256(data)
	digest := hex.EncodeToString(sum[:])
	if err := os.WriteFile(filepath.Join(n.Content, digest), data, 0o644); err != nil {
		n.t.Fatal(err)
	}
	return digest
}

// have gives the node an image of one layer, and returns the digest of its manifest.
func (n *node) have(what string, names ...string) string {
	n.t.Helper()
	config, err := json.Marshal(map[string]any{"config": map[string]any{"Labels": map[string]string{standin.Label: what}}})
	if err != nil {
		n.t.Fatal(err)
	}
	layer := n.put([]byte("the layer of " + what))
	manifest := n.put([]byte(`{"schemaVersion":2,"config":{"digest":"sha256:` + n.put(config) + `"},"layers":[{"digest":"sha256:` + layer + `"}]}`))
	for _, name := range names {
		n.images[name] = manifest
	}
	return manifest
}

func (n *node) ask(method, path string) *http.Response {
	n.t.Helper()
	w := httptest.NewRecorder()
	n.ServeHTTP(w, httptest.NewRequest(method, path, nil))
	return w.Result()
}

// refusal is what an answer says in the protocol's form of an error.
func refusal(t *testing.T, r *http.Response) string {
	t.Helper()
	var body struct {
		Errors []struct{ Code, Message string }
	}
	if err := json.NewDecoder(r.Body).Decode(&body); err != nil || len(body.Errors) != 1 {
		t.Fatalf("status %s, and no error in the protocol's form: %v", r.Status, err)
	}
	return body.Errors[0].Code + " " + body.Errors[0].Message
}

func TestTag(t *testing.T) {
	n := newNode(t)
	busybox := n.have("busybox 1.35", "docker.io/library/busybox:1.35", "fathom.network/stand-in/busybox:local")
	toolbox := n.have("the toolbox", "docker.io/library/toolbox:latest", "fathom.network/stand-in/toolbox:local")
	loaded := n.have("what was loaded", "docker.io/library/alpine:3")
	alpine := n.have("the stand-in", "fathom.network/stand-in/alpine:local")
	for _, test := range []struct {
		name, path string
		digest     string // served
		told       string
		refused    string
	}{
		{"any tag is stood in for", "/v2/library/busybox/manifests/1.28?ns=docker.io", busybox, "docker.io/library/busybox:1.28 is busybox 1.35, since no network", ""},
		{"in whichever registry", "/v2/docker/library/busybox/manifests/latest?ns=public.ecr.aws", busybox, "public.ecr.aws/docker/library/busybox:latest is busybox 1.35, since no network", ""},
		{"a name of the node's own that is a stand-in", "/v2/library/busybox/manifests/1.35?ns=docker.io", busybox, "docker.io/library/busybox:1.35 is busybox 1.35, since no network", ""},
		{"what was loaded wins", "/v2/library/alpine/manifests/3?ns=docker.io", loaded, "", ""},
		{"another tag than the loaded one", "/v2/library/alpine/manifests/3.20?ns=docker.io", alpine, "docker.io/library/alpine:3.20 is the stand-in, since no network", ""},
		{"the lab's own image", "/v2/library/toolbox/manifests/latest?ns=docker.io", toolbox, "", ""},
		{"as by its other name", "/v2/nicolaka/netshoot/manifests/v0.13?ns=docker.io", toolbox, "docker.io/nicolaka/netshoot:v0.13 is the toolbox, since no network", ""},
		{"no stand-in", "/v2/library/mysql/manifests/8?ns=docker.io", "", "", "DENIED docker.io/library/mysql:8 cannot be pulled: registry-1.docker.io:443 cannot be reached (no network), and the lab has no stand-in for it; where"},
		{"a stand-in that this node lacks", "/v2/curlimages/curl/manifests/8?ns=docker.io", "", "", "DENIED docker.io/curlimages/curl:8 cannot be pulled"},
		{"a name of Fathom's that is not there", "/v2/nothing/manifests/1?ns=fathom.network", "", "", "DENIED fathom.network/nothing:1 cannot be pulled: no registry has it, and neither has this node"},
		{"a client that takes it for a registry", "/v2/library/busybox/manifests/1", "", "", "DENIED"},
		{"no tag", "/v2/library/busybox/manifests/", "", "", "NAME_INVALID"},
	} {
		n.told = nil
		r := n.ask(http.MethodGet, test.path)
		if test.refused != "" {
			if text := refusal(t, r); !strings.HasPrefix(text, test.refused) {
				t.Errorf("%s: says %q, want %q", test.name, text, test.refused)
			}
			if strings.HasPrefix(test.refused, "DENIED") != (r.StatusCode == http.StatusForbidden) {
				t.Errorf("%s: status %s", test.name, r.Status)
			}
			continue
		}
		if r.StatusCode != http.StatusOK || r.Header.Get("Docker-Content-Digest") != "sha256:"+test.digest {
			t.Errorf("%s: status %s, digest %s, want %s", test.name, r.Status, r.Header.Get("Docker-Content-Digest"), test.digest)
		}
		if got := strings.Join(n.told, "; "); got != test.told {
			t.Errorf("%s: told %q, want %q", test.name, got, test.told)
		}
		head := n.ask(http.MethodHead, test.path)
		body, _ := io.ReadAll(head.Body)
		if head.StatusCode != r.StatusCode || len(body) > 0 || head.Header.Get("Content-Length") != r.Header.Get("Content-Length") || head.Header.Get("Content-Type") != r.Header.Get("Content-Type") {
			t.Errorf("%s: HEAD and GET differ: %v, %v", test.name, head.Header, r.Header)
		}
	}
}

func TestRegistryIsThere(t *testing.T) {
	n := newNode(t)
	n.reached = true
	n.have("busybox 1.35", "docker.io/library/busybox:latest", "fathom.network/stand-in/busybox:local")
	toolbox := n.have("", "docker.io/library/toolbox:latest")
	for path, want := range map[string]string{
		"/v2/library/busybox/manifests/latest?ns=docker.io":             "https://registry-1.docker.io/v2/library/busybox/manifests/latest",
		"/v2/x/manifests/1?ns=localhost:5000":                           "http://localhost:5000/v2/x/manifests/1",
		"/v2/x/blobs/sha256:" + strings.Repeat("0", 64) + "?ns=quay.io": "https://quay.io/v2/x/blobs/sha256:" + strings.Repeat("0", 64),
	} {
		if r := n.ask(http.MethodHead, path); r.StatusCode != http.StatusTemporaryRedirect || r.Header.Get("Location") != want {
			t.Errorf("%s: %s, Location %q, want %q", path, r.Status, r.Header.Get("Location"), want)
		}
	}
	if r := n.ask(http.MethodHead, "/v2/library/toolbox/manifests/latest?ns=docker.io"); r.Header.Get("Docker-Content-Digest") != "sha256:"+toolbox {
		t.Errorf("what no registry has is asked of one: %s", r.Status)
	}
	if r := n.ask(http.MethodHead, "/v2/x/manifests/1?ns="+Address); r.StatusCode != http.StatusForbidden {
		t.Errorf("the mirror sends a client on to itself: %s", r.Status)
	}
	if len(n.told) > 0 {
		t.Errorf("told %q", n.told)
	}
}

func TestDigest(t *testing.T) {
	n := newNode(t)
	digest := n.have("busybox 1.35", "fathom.network/stand-in/busybox:local")
	layer := n.put([]byte("0123456789"))
	if r := n.ask(http.MethodGet, "/v2/library/busybox/manifests/sha256:"+digest+"?ns=docker.io"); r.StatusCode != http.StatusOK || r.Header.Get("Content-Type") != "application/vnd.oci.image.manifest.v1+json" {
		t.Errorf("a manifest by its digest: %s %v", r.Status, r.Header)
	}
	if len(n.dialled) > 0 {
		t.Errorf("what the node has needs no registry: dialled %q", n.dialled)
	}
	unknown := strings.Repeat("0", 64)
	if text := refusal(t, n.ask(http.MethodGet, "/v2/library/busybox/manifests/sha256:"+unknown+"?ns=docker.io")); !strings.Contains(text, "no stand-in will do: write it with a tag") {
		t.Errorf("an unknown digest of what has a stand-in: %s", text)
	}
	if text := refusal(t, n.ask(http.MethodGet, "/v2/library/mysql/manifests/sha256:"+unknown+"?ns=docker.io")); !strings.Contains(text, "no stand-in will do; where") {
		t.Errorf("an unknown digest: %s", text)
	}
	// A blob, whole and in parts.
	path := "/v2/library/busybox/blobs/sha256:" + layer + "?ns=docker.io"
	r := n.ask(http.MethodGet, path)
	if body, _ := io.ReadAll(r.Body); string(body) != "0123456789" || r.Header.Get("Docker-Content-Digest") != "sha256:"+layer {
		t.Errorf("a blob: %s %q %v", r.Status, body, r.Header)
	}
	for _, test := range []struct {
		ask, want string
		status    int
	}{
		{"bytes=2-4", "234", http.StatusPartialContent},
		{"bytes=7-", "789", http.StatusPartialContent},
		{"bytes=-2", "89", http.StatusPartialContent},
		{"bytes=10-", "", http.StatusRequestedRangeNotSatisfiable},
	} {
		w := httptest.NewRecorder()
		q := httptest.NewRequest(http.MethodGet, path, nil)
		q.Header.Set("Range", test.ask)
		n.ServeHTTP(w, q)
		if w.Code != test.status || test.want != "" && w.Body.String() != test.want {
			t.Errorf("%s: %d %q, want %d %q", test.ask, w.Code, w.Body, test.status, test.want)
		}
	}
	// No manifest, a damaged one, and one that is too large are none.
	n.images = nil
	for name, data := range map[string][]byte{"a layer": []byte("0123456789"), "JSON": []byte("{}"), "too large": bytes.Repeat([]byte(" "), maxManifest+1)} {
		if r := n.ask(http.MethodGet, "/v2/x/manifests/sha256:"+n.put(data)+"?ns=docker.io"); r.StatusCode != http.StatusForbidden {
			t.Errorf("%s is served as a manifest: %s", name, r.Status)
		}
	}
	if err := os.WriteFile(filepath.Join(n.Content, digest), []byte(`{"manifests":[]}`), 0o644); err != nil {
		t.Fatal(err)
	}
	if r := n.ask(http.MethodGet, "/v2/x/manifests/sha256:"+digest+"?ns=docker.io"); r.StatusCode != http.StatusForbidden {
		t.Errorf("a damaged manifest is served: %s", r.Status)
	}
}

func TestOtherMethods(t *testing.T) {
	n := newNode(t)
	if r := n.ask(http.MethodGet, "/v2/"); r.StatusCode != http.StatusOK || r.Header.Get("Docker-Distribution-Api-Version") != "registry/2.0" {
		t.Errorf("/v2/: %s %v", r.Status, r.Header)
	}
	for _, method := range []string{http.MethodPost, http.MethodPut, http.MethodPatch, http.MethodDelete} {
		if r := n.ask(method, "/v2/x/blobs/uploads/"); r.StatusCode != http.StatusMethodNotAllowed || !strings.Contains(refusal(t, r), "fathom image load") {
			t.Errorf("%s: %s", method, r.Status)
		}
	}
}

// TestImagesAreNotKnown: containerd is just being started.
func TestImagesAreNotKnown(t *testing.T) {
	n := newNode(t)
	n.Images = func(context.Context, string) (map[string]string, error) { return nil, errors.New("containerd is away") }
	if r := n.ask(http.MethodGet, "/v2/library/busybox/manifests/1?ns=docker.io"); r.StatusCode != http.StatusServiceUnavailable || !strings.Contains(refusal(t, r), "containerd is away") {
		t.Errorf("status %s", r.Status)
	}
}

func TestReadImages(t *testing.T) {
	digest := strings.Repeat("0123456789abcdef", 4)
	got, err := readImages("REF TYPE DIGEST SIZE PLATFORMS LABELS\n" +
		"docker.io/library/x:1   application/vnd.oci.image.manifest.v1+json   sha256:" + digest + "   1.2 MiB   linux/amd64   io.cri-containerd.image=managed\n")
	if err != nil || len(got) != 1 || got["docker.io/library/x:1"] != digest {
		t.Errorf("%v, %v", got, err)
	}
	if got, err := readImages("REF TYPE DIGEST SIZE PLATFORMS LABELS\n"); err != nil || len(got) != 0 {
		t.Errorf("no image: %v, %v", got, err)
	}
	for _, bad := range []string{"x", "x y", "x y z", "x y sha256:12 1 MiB", "error: no such thing"} {
		if got, err := readImages(bad); err == nil {
			t.Errorf("%q is read as %v", bad, got)
		}
	}
}
