package mirror

import (
	"errors"
	"net"
	"net/netip"
	"regexp"
	"strconv"
	"strings"
)

// A request is what a client of the registry protocol asks for (OCI distribution specification 1.1, "Pull").
type request struct {
	// registry is the one that the client would have asked, as it stands in the image's name: docker.io, localhost:5000.
	// containerd says it in the parameter ns. Empty when the client takes the mirror for the registry itself.
	registry string
	name     string // library/nginx
	kind     string // manifests or blobs
	// Exactly one of tag and digest is set; digest is of SHA-256, as 64 hexadecimal digits.
	tag    string
	digest string
}

// repository is the full name without a tag: docker.io/library/nginx.
func (r request) repository() string { return r.registry + "/" + r.name }

// image is the full name as the container runtime has it.
func (r request) image() string {
	if r.tag != "" {
		return r.repository() + ":" + r.tag
	}
	return r.repository() + "@sha256:" + r.digest
}

// errNotPull says that a path is none that a pull asks for.
var errNotPull = errors.New("it is not /v2/NAME/manifests/TAG, /v2/NAME/manifests/DIGEST or /v2/NAME/blobs/DIGEST, with a digest of SHA-256")

// The grammar of names, as the specification has it. Its names are of up to 255 characters with the registry's.
var (
	nameForm   = regexp.MustCompile(`^[a-z0-9]+((\.|_|__|-+)[a-z0-9]+)*(/[a-z0-9]+((\.|_|__|-+)[a-z0-9]+)*)*$`)
	tagForm    = regexp.MustCompile(`^[a-zA-Z0-9_][a-zA-Z0-9._-]{0,127}$`)
	digestForm = regexp.MustCompile(`^sha256:[a-f0-9]{64}$`)
	hostForm   = regexp.MustCompile(`^[a-zA-Z0-9]([a-zA-Z0-9-]*[a-zA-Z0-9])?(\.[a-zA-Z0-9]([a-zA-Z0-9-]*[a-zA-Z0-9])?)*$`)
)

const maxName = 255

// parse reads a path and the parameter ns.
func parse(path, ns string) (request, error) {
	rest, ok := strings.CutPrefix(path, "/v2/")
	if !ok || len(path) > 2*maxName+len("/v2//manifests/sha256:")+64 {
		return request{}, errNotPull
	}
	// A repository may itself be called manifests: the last two elements count.
	rest, reference, _ := cutLast(rest)
	name, kind, _ := cutLast(rest)
	r := request{registry: ns, name: name, kind: kind}
	switch {
	case kind != "manifests" && kind != "blobs", !nameForm.MatchString(name), len(ns)+1+len(name) > maxName, ns != "" && !isRegistry(ns):
		return request{}, errNotPull
	case digestForm.MatchString(reference):
		r.digest = strings.TrimPrefix(reference, "sha256:")
	case kind == "manifests" && tagForm.MatchString(reference):
		r.tag = reference
	default:
		return request{}, errNotPull
	}
	return r, nil
}

func cutLast(s string) (before, after string, found bool) {
	i := strings.LastIndexByte(s, '/')
	if i < 0 {
		return "", s, false
	}
	return s[:i], s[i+1:], true
}

// isRegistry reports whether the text is a host, or a host and a port.
func isRegistry(text string) bool {
	host, port, err := net.SplitHostPort(text)
	if err != nil {
		host, port = strings.TrimSuffix(strings.TrimPrefix(text, "["), "]"), "443"
		if v6 := strings.Contains(host, ":"); v6 && text != "["+host+"]" || !v6 && text != host {
			return false
		}
	}
	if _, err := strconv.ParseUint(port, 10, 16); err != nil {
		return false
	}
	addr, err := netip.ParseAddr(host)
	return err == nil && addr.Zone() == "" || hostForm.MatchString(host)
}

// server returns where a registry is served: the URL's scheme and the host with its port, as containerd finds them for a
// registry that has no file of its own in its certs.d.
func server(registry string) (scheme, hostPort string) {
	host, port, err := net.SplitHostPort(registry)
	if err != nil {
		host, port = strings.TrimSuffix(strings.TrimPrefix(registry, "["), "]"), ""
	}
	scheme = "https"
	if addr, err := netip.ParseAddr(host); (host == "localhost" || err == nil && addr.IsLoopback()) && port != "" && port != "443" {
		scheme = "http"
	}
	if registry == "docker.io" {
		host = "registry-1.docker.io" // what the name means since before there were others
	}
	if port == "" {
		port = "443"
	}
	return scheme, net.JoinHostPort(host, port)
}

// location is where a registry has what the request asks for.
func (r request) location() string {
	scheme, at := server(r.registry)
	reference := r.tag
	if reference == "" {
		reference = "sha256:" + r.digest
	}
	return scheme + "://" + strings.TrimSuffix(at, ":443") + "/v2/" + r.name + "/" + r.kind + "/" + reference
}
