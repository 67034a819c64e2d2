// Package mirror is the registry that a node's containerd asks in the place of every other: it sends containerd on to the
// real one where that can be reached, and otherwise serves what the node has, which includes stand-ins for the images that
// courses use. docs/design/images.md says why it is a process of each node.
package mirror

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"os"
	"strconv"

	"github.com/fathom-network/fathom/internal/facts/standin"
)

// Address is where the mirror listens on each node, and what the node's containerd is told.
const Address = "127.0.0.1:5080"

// Options say what a mirror serves.
type Options struct {
	// Content is the directory of the blobs of containerd's content store.
	Content string
	// Images returns the digests of manifests by the names of the images that the node has: of the one with that name,
	// if there is one, and of all stand-ins. Ctr is what asks a containerd.
	Images func(ctx context.Context, name string) (map[string]string, error)
	// StandIn is told of each stand-in that is given out: the image's name as it was asked for, what the stand-in is,
	// and why the registry could not be asked. It may be nil.
	StandIn func(image, what string, why error)
	Log     *slog.Logger
}

// New returns the handler that speaks the registry protocol, of which a pull is all that it knows.
func New(o Options) http.Handler { return newMirror(o) }

type mirror struct {
	Options
	reach *reach
}

func newMirror(o Options) *mirror { return &mirror{Options: o, reach: newReach()} }

func (m *mirror) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	w.Header().Set("Docker-Distribution-Api-Version", "registry/2.0")
	if r.Method != http.MethodGet && r.Method != http.MethodHead {
		w.Header().Set("Allow", "GET, HEAD")
		refuse(w, http.StatusMethodNotAllowed, "UNSUPPORTED", "this registry is a node's mirror: images can be pulled from it and not pushed to it; use `fathom image load`")
		return
	}
	if r.URL.Path == "/v2/" || r.URL.Path == "/v2" {
		w.WriteHeader(http.StatusOK)
		return
	}
	q, err := parse(r.URL.Path, r.URL.Query().Get("ns"))
	if err != nil {
		refuse(w, http.StatusNotFound, "NAME_INVALID", r.URL.Path+" is nothing to pull: "+err.Error())
		return
	}
	if q.digest != "" {
		m.byDigest(w, r, q)
	} else {
		m.byTag(w, r, q)
	}
}

// byDigest serves what the node has whatever name it is asked for under: a digest says which bytes they are.
func (m *mirror) byDigest(w http.ResponseWriter, r *http.Request, q request) {
	if q.kind == "manifests" {
		if doc, err := m.manifest(q.digest); err == nil {
			serveManifest(w, r, doc, q.digest)
			return
		}
	} else if f, err := os.Open(m.blob(q.digest)); err == nil {
		defer f.Close()
		w.Header().Set("Content-Type", "application/octet-stream")
		w.Header().Set("Docker-Content-Digest", "sha256:"+q.digest)
		if info, err := f.Stat(); err == nil {
			http.ServeContent(w, r, "", info.ModTime(), f)
		}
		return
	}
	why := m.away(r.Context(), q)
	if why == nil {
		http.Redirect(w, r, q.location(), http.StatusTemporaryRedirect)
		return
	}
	text := "; the name says by its digest which bytes are meant, so no stand-in will do"
	if name, ok := standin.For(q.repository()); ok && q.kind == "manifests" {
		text += ": write it with a tag, and you get the lab's stand-in for " + name
	}
	m.deny(w, q, why, text)
}

// byTag sends the client on to the registry, or serves in its place what the node has by that name, or a stand-in.
func (m *mirror) byTag(w http.ResponseWriter, r *http.Request, q request) {
	why := m.away(r.Context(), q)
	if why == nil {
		http.Redirect(w, r, q.location(), http.StatusTemporaryRedirect)
		return
	}
	images, err := m.Images(r.Context(), q.image())
	if err != nil {
		m.Log.Error("what the node has is not known", "image", q.image(), "error", err)
		refuse(w, http.StatusServiceUnavailable, "UNKNOWN", err.Error())
		return
	}
	digest, is := choose(images, q)
	if digest == "" {
		m.deny(w, q, why, ", and the lab has no stand-in for it")
		return
	}
	doc, err := m.manifest(digest)
	if err != nil {
		m.Log.Error("an image of the node cannot be read", "image", q.image(), "error", err)
		refuse(w, http.StatusServiceUnavailable, "UNKNOWN", err.Error())
		return
	}
	serveManifest(w, r, doc, digest)
	if !is {
		return
	}
	what := m.description(doc)
	m.Log.Info("gave out a stand-in", "image", q.image(), "standIn", what, "why", why)
	if m.StandIn != nil {
		m.StandIn(q.image(), what, why)
	}
}

// choose returns the digest of the manifest that is served for a tag, and whether it is a stand-in's. What the node has by
// that name, as something that was loaded, wins over a stand-in; it may itself be one that was pulled before. None means
// that there is neither.
func choose(images map[string]string, q request) (digest string, is bool) {
	digest = images[q.image()]
	if digest == "" {
		if name, ok := standin.For(q.repository()); ok {
			digest = images[standin.Image(name)]
		}
	}
	if digest == "" || q.registry == "" || standin.IsLocal(q.repository()) {
		return digest, false
	}
	for name, have := range images {
		is = is || have == digest && standin.Of([]string{name})
	}
	return digest, is
}

// errLocal says why no registry is asked for a name of Fathom's own.
var errLocal = errors.New("no registry has it")

// away returns why the request's registry cannot be asked, or nil.
func (m *mirror) away(ctx context.Context, q request) error {
	_, at := server(q.registry)
	if q.registry == "" || at == Address || standin.IsLocal(q.repository()) {
		return errLocal
	}
	return m.reach.try(ctx, at)
}

// deny says that the registry cannot be asked and that there is nothing in its place. The status is 403, and not 404 as
// the protocol has it, since containerd reads what is said with that status alone: it asks by HEAD, whose answer has no
// body, and asks again by GET after a 403.
func (m *mirror) deny(w http.ResponseWriter, q request, why error, text string) {
	_, at := server(q.registry)
	text = fmt.Sprintf("%s cannot be pulled: %s cannot be reached (%v)%s", q.image(), at, why, text)
	if errors.Is(why, errLocal) {
		text = q.image() + " cannot be pulled: no registry has it, and neither has this node"
	}
	text += fmt.Sprintf("; where there is a network, `docker pull %[1]s` and `docker save -o image.tar %[1]s`, then here `fathom image load image.tar`", q.image())
	m.Log.Warn("nothing to give out", "image", q.image(), "why", why)
	refuse(w, http.StatusForbidden, "DENIED", text)
}

// refuse answers with the protocol's form of an error.
func refuse(w http.ResponseWriter, status int, code, message string) {
	type problem struct {
		Code    string `json:"code"`
		Message string `json:"message"`
	}
	body, err := json.Marshal(map[string][]problem{"errors": {{code, message}}})
	if err != nil {
		panic(err) // strings can be written as JSON
	}
	w.Header().Set("Content-Type", "application/json")
	w.Header().Set("Content-Length", strconv.Itoa(len(body)))
	w.WriteHeader(status)
	_, _ = w.Write(body)
}
