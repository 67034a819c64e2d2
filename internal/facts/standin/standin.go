// Package standin says which local image stands in for an image of a registry that cannot be reached. Courses and
// tutorials name a few dozen images of public registries; a lab has a program for each of them that does what those
// pages show, under a name of its own, and gives it to whoever asks for the other while there is no network.
package standin

import (
	"slices"
	"strings"
)

// Prefix begins the names of stand-ins on a node. An image that has such a name is a stand-in, whatever its other names.
const Prefix = "fathom.network/stand-in/"

// Label is the label of a stand-in's configuration that says what it is in truth.
const Label = "network.fathom.image.stand-in"

// Image returns the full name of a stand-in's image: "fathom.network/stand-in/nginx:local" of "nginx".
func Image(name string) string { return Prefix + name + ":local" }

// Of reports whether an image with these names is a stand-in.
func Of(names []string) bool {
	return slices.ContainsFunc(names, func(n string) bool { return strings.HasPrefix(n, Prefix) })
}

// repositories are what each stand-in stands in for. The list is what courses of Kubernetes networking ask for: the
// tasks and tutorials of kubernetes.io, and the images that books and exams' exercises take for clients and servers. An
// image is here if what those pages do with it works with the stand-in; a database that they connect an application to
// is not.
var repositories = map[string][]string{
	"agnhost": {"gcr.io/kubernetes-e2e-test-images/agnhost", "registry.k8s.io/e2e-test-images/agnhost"},
	"alpine":  {"docker.io/library/alpine"},
	"busybox": {
		"docker.io/library/busybox", "quay.io/prometheus/busybox", "registry.k8s.io/busybox", "registry.k8s.io/e2e-test-images/busybox",
	},
	"curl": {
		"docker.io/appropriate/curl", "docker.io/curlimages/curl", "docker.io/radial/busyboxplus", "docker.io/yauritux/busybox-curl", "quay.io/curl/curl",
	},
	"echoserver": {
		"docker.io/jmalloc/echo-server", "docker.io/kicbase/echo-server",
		"gcr.io/k8s-minikube/echoserver", "registry.k8s.io/echoserver",
	},
	"http-echo": {"docker.io/hashicorp/http-echo"},
	"httpd":     {"docker.io/library/httpd"},
	"multitool": {"docker.io/praqma/network-multitool", "docker.io/wbitt/network-multitool", "ghcr.io/eficode-academy/network-multitool"},
	"nginx": {
		"docker.io/library/nginx", "quay.io/nginx/nginx", "registry.k8s.io/nginx", "registry.k8s.io/nginx-slim",
	},
	"python": {"docker.io/library/python"},
	"redis":  {"docker.io/library/redis"},
	"whoami": {"docker.io/containous/whoami", "docker.io/traefik/whoami"},
	"debian": {"docker.io/library/debian", "docker.io/library/ubuntu"},
	"toolbox": {
		"docker.io/arunvelsriram/utils", "docker.io/infoblox/dnstools", "docker.io/nicolaka/netshoot", "docker.io/tutum/dnsutils",
		"gcr.io/kubernetes-e2e-test-images/dnsutils", "ghcr.io/nicolaka/netshoot", "registry.k8s.io/e2e-test-images/dnsutils", "registry.k8s.io/e2e-test-images/jessie-dnsutils",
	},
}

// byRepository is repositories the other way round.
var byRepository = func() map[string]string {
	m := map[string]string{}
	for name, all := range repositories {
		for _, r := range all {
			m[r] = name
		}
	}
	return m
}()

// Names returns the names of all stand-ins, sorted.
func Names() []string {
	var names []string
	for name := range repositories {
		names = append(names, name)
	}
	slices.Sort(names)
	return names
}

// Repositories returns what a stand-in stands in for.
func Repositories(name string) []string { return slices.Clone(repositories[name]) }

// copies are registries that hold what another one holds, and what it is called there.
var copies = []struct{ prefix, original string }{
	{"public.ecr.aws/docker/library/", "docker.io/library/"},
	{"mirror.gcr.io/", "docker.io/"},
	{"index.docker.io/", "docker.io/"},
	{"registry.hub.docker.com/", "docker.io/"},
	{"k8s.gcr.io/", "registry.k8s.io/"},
	{"gcr.io/google-containers/", "registry.k8s.io/"},
	{"gcr.io/google_containers/", "registry.k8s.io/"},
}

// For returns the name of the stand-in for a repository, such as docker.io/library/nginx, if there is one.
func For(repository string) (name string, ok bool) {
	for _, c := range copies {
		if rest, is := strings.CutPrefix(repository, c.prefix); is {
			repository = c.original + rest
			break
		}
	}
	name, ok = byRepository[repository]
	return name, ok
}

// Repository returns the repository of an image's name with a tag: docker.io/library/nginx of docker.io/library/nginx:1.
func Repository(image string) string {
	if i := strings.LastIndexByte(image, ':'); i > strings.LastIndexByte(image, '/') {
		return image[:i]
	}
	return image
}

// IsLocal reports whether no registry has the repository: the names are Fathom's own.
func IsLocal(repository string) bool {
	return strings.HasPrefix(repository, "fathom.network/") || repository == "docker.io/library/toolbox"
}
