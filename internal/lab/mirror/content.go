package mirror

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/fathom-network/fathom/internal/facts/standin"
)

// maxManifest bounds a manifest, as registries do.
const maxManifest = 4 << 20

// document is a manifest or an index of manifests.
type document struct {
	bytes     []byte
	mediaType string
	config    string // digest of the image's configuration; empty for an index
}

// blob is the file of a blob in containerd's content store. The digest has the form that parse demands.
func (m *mirror) blob(digest string) string { return filepath.Join(m.Content, digest) }

// manifest reads a manifest by its digest, and checks that the bytes are those: a client that trusts the mirror takes
// the digest from its answer.
func (m *mirror) manifest(digest string) (*document, error) {
	data, err := m.read(digest)
	if err != nil {
		return nil, err
	}
	if sum := sha256.Sum256(data); hex.EncodeToString(sum[:]) != digest {
		return nil, fmt.Errorf("the blob sha256:%s of the node is damaged", digest)
	}
	var head struct {
		MediaType string `json:"mediaType"`
		Config    *struct {
			Digest string `json:"digest"`
		} `json:"config"`
		Layers    []json.RawMessage `json:"layers"`
		Manifests []json.RawMessage `json:"manifests"`
	}
	if err := json.Unmarshal(data, &head); err != nil {
		return nil, fmt.Errorf("the blob sha256:%s is no manifest: %w", digest, err)
	}
	doc := &document{bytes: data, mediaType: head.MediaType}
	switch {
	case head.Manifests != nil:
		if doc.mediaType == "" { // OCI's may leave it out
			doc.mediaType = "application/vnd.oci.image.index.v1+json"
		}
	case head.Config != nil && head.Layers != nil:
		doc.config = strings.TrimPrefix(head.Config.Digest, "sha256:")
		if doc.mediaType == "" {
			doc.mediaType = "application/vnd.oci.image.manifest.v1+json"
		}
	default:
		return nil, fmt.Errorf("the blob sha256:%s is no manifest", digest)
	}
	return doc, nil
}

func (m *mirror) read(digest string) ([]byte, error) {
	f, err := os.Open(m.blob(digest))
	if err != nil {
		return nil, err
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, maxManifest+1))
	if err == nil && len(data) > maxManifest {
		err = errors.New("it is too large for a manifest")
	}
	return data, err
}

// description returns what a stand-in says that it is.
func (m *mirror) description(doc *document) string {
	var config struct {
		Config struct{ Labels map[string]string } `json:"config"`
	}
	if digestForm.MatchString("sha256:" + doc.config) {
		if data, err := m.read(doc.config); err == nil && json.Unmarshal(data, &config) == nil {
			return config.Config.Labels[standin.Label]
		}
	}
	return ""
}

func serveManifest(w http.ResponseWriter, r *http.Request, doc *document, digest string) {
	w.Header().Set("Content-Type", doc.mediaType)
	w.Header().Set("Docker-Content-Digest", "sha256:"+digest)
	w.Header().Set("Content-Length", strconv.Itoa(len(doc.bytes)))
	w.WriteHeader(http.StatusOK)
	if r.Method == http.MethodGet {
		_, _ = w.Write(doc.bytes)
	}
}
