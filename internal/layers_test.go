// Package internal_test holds the direction of imports: docs/design/layers.md says what it is good for.
package internal_test

import (
	"bytes"
	"encoding/json"
	"errors"
	"io"
	"maps"
	"os/exec"
	"slices"
	"strings"
	"testing"
)

const module = "github.com/fathom-network/fathom/"

// layers lists every package below internal, the lowest layer first. A package may import those of the layers
// that its own one names, and no others of ours.
var layers = []struct {
	name     string
	packages []string
	below    []string // layers that it may import from
	within   bool     // its packages may import each other
}{
	// Pure values and functions: no I/O, no clock, no lock.
	{name: "facts", packages: []string{"bgpconf", "conflist", "ipam", "ippool", "keyset", "manifest", "netconf", "netfacts", "nodestate", "podnet", "service", "topology", "vip"}, within: true},
	// What needs nothing but the standard library and x/sys, and may read files.
	{name: "ground", packages: []string{"durable", "kit", "testenv"}},
	// The kernel's things. They know nothing of Kubernetes.
	{name: "kernel", packages: []string{"affinity", "announce", "bootclock", "bpf", "bpf/pin", "cgroup", "flow", "lease", "link", "machine", "machine/boot", "probe", "ruleset"}, below: []string{"facts", "ground"}, within: true},
	// What other programs say of themselves: the API server, the container runtime. They change no kernel.
	{name: "watch", packages: []string{"kube", "cri"}, below: []string{"facts"}},
	// Parts of programs, each of use alone.
	{name: "parts", packages: []string{"bgp", "cni", "doctor", "image", "install", "kubeconfig", "membership", "proxy", "serve"}, below: []string{"facts", "ground", "kernel", "watch"}},
	// What the commands are for. They never import each other.
	{name: "programs", packages: []string{"dataplane", "lab", "lb", "svcbench", "verify"}, below: []string{"facts", "ground", "kernel", "watch", "parts"}},
	// What tests of several packages share. No layer imports from it.
	{name: "tests", packages: []string{"link/linktest"}, below: []string{"ground", "kernel"}},
}

// onlyBy says which packages may import what is in these modules or directories; a name that ends in / stands
// for all commands. Tests may import anything.
var onlyBy = map[string][]string{
	"github.com/vishvananda/netlink":         {"internal/link", "internal/doctor"},
	"github.com/google/nftables":             {"internal/link", "internal/ruleset", "internal/doctor"},
	"github.com/mdlayher/netlink":            {"internal/ruleset"},
	"github.com/osrg/gobgp":                  {"internal/bgp"},
	"github.com/hashicorp/memberlist":        {"internal/membership"},
	"github.com/cilium/ebpf":                 {"internal/bpf"},
	"k8s.io/client-go/kubernetes":            {"internal/kube"},
	"k8s.io/client-go/rest":                  {"internal/kube"},
	"k8s.io/client-go/dynamic":               {"internal/kube"},
	"k8s.io/client-go/informers":             {"internal/kube"},
	"k8s.io/client-go/tools/cache":           {"internal/kube"},
	"k8s.io/client-go/tools/leaderelection":  {"internal/kube"},
	"k8s.io/client-go/tools/record":          {"internal/kube"},
	"k8s.io/cri-api":                         {"internal/cri"},
	"google.golang.org/grpc":                 {"internal/cri"},
	"github.com/google/go-containerregistry": {"internal/image"},
	"github.com/spf13/cobra":                 {"cmd/"},
	"github.com/containernetworking/cni":     {"internal/cni"},
	"testing":                                {"internal/testenv", "internal/link/linktest"},
	module + "internal/testenv":              {"internal/link/linktest"},
	module + "internal/link/linktest":        {},
}

// Of modules that are not ours, facts may use those that make values out of bytes, and the API's types.
var factsMayUse = []string{"go.yaml.in/yaml/v3", "k8s.io/api", "k8s.io/apimachinery"}

// listed is a package as `go list` tells it.
type listed struct {
	ImportPath string
	Standard   bool
	Imports    []string
}

func list(t *testing.T, args ...string) map[string]listed {
	t.Helper()
	cmd := exec.Command("go", append([]string{"list", "-json=ImportPath,Standard,Imports"}, args...)...)
	cmd.Dir = ".."
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("go list: %v\n%s", err, &stderr)
	}
	all := map[string]listed{}
	for dec := json.NewDecoder(bytes.NewReader(out)); ; {
		var p listed
		err := dec.Decode(&p)
		if errors.Is(err, io.EOF) {
			return all
		}
		if err != nil {
			t.Fatal(err)
		}
		all[p.ImportPath] = p
	}
}

// inside says whether the package is the one of that path or lies below it.
func inside(pkg, path string) bool {
	return pkg == path || strings.HasPrefix(pkg, strings.TrimSuffix(path, "/")+"/")
}

func anyInside(pkg string, paths []string) bool {
	return slices.ContainsFunc(paths, func(p string) bool { return inside(pkg, p) })
}

func TestLayers(t *testing.T) {
	layerOf := map[string]int{}
	for i, l := range layers {
		for _, p := range l.packages {
			layerOf["internal/"+p] = i
		}
	}
	ours := list(t, "./cmd/...", "./internal/...")
	known := maps.Clone(layerOf)
	for path, p := range ours {
		name := strings.TrimPrefix(path, module)
		delete(known, name)
		at, found := layerOf[name]
		switch {
		case strings.HasPrefix(name, "cmd/"):
		case name == "internal": // this test
			continue
		case !found:
			t.Errorf("%s is in no layer: give it one in internal/layers_test.go", name)
			continue
		}
		for _, imported := range p.Imports {
			other, isOurs := strings.CutPrefix(imported, module)
			if !isOurs {
				continue
			}
			if strings.HasPrefix(other, "cmd/") {
				t.Errorf("%s imports the command %s", name, other)
				continue
			}
			below, foundOther := layerOf[other]
			if !found || !foundOther { // commands import anything
				continue
			}
			allowed := slices.Contains(layers[at].below, layers[below].name) || at == below && layers[at].within
			if !allowed {
				t.Errorf("%s (%s) imports %s (%s)", name, layers[at].name, other, layers[below].name)
			}
		}
	}
	for name := range known {
		t.Errorf("internal/layers_test.go has a layer for %s, which is not there", name)
	}
}

func TestForeignImports(t *testing.T) {
	kernel, facts := map[string]bool{}, map[string]bool{}
	for _, l := range layers {
		for _, p := range l.packages {
			kernel["internal/"+p] = l.name == "kernel"
			facts["internal/"+p] = l.name == "facts"
		}
	}
	for path, p := range list(t, "./cmd/...", "./internal/...") {
		name := strings.TrimPrefix(path, module)
		for _, imported := range p.Imports {
			for what, users := range onlyBy {
				if inside(imported, what) && !anyInside(name, users) {
					t.Errorf("%s imports %s, which only %s may", name, imported, strings.Join(append(slices.Clone(users), "tests"), " and "))
				}
			}
			if kernel[name] && anyInside(imported, []string{"k8s.io", "sigs.k8s.io"}) {
				t.Errorf("%s imports %s: the kernel's packages know nothing of Kubernetes", name, imported)
			}
			foreign := strings.Contains(strings.Split(imported, "/")[0], ".") && !strings.HasPrefix(imported, module)
			if facts[name] && foreign && !anyInside(imported, factsMayUse) {
				t.Errorf("%s imports %s: facts are made of the standard library and of API types", name, imported)
			}
			if facts[name] && slices.Contains([]string{"os", "os/exec", "net", "net/http", "syscall"}, imported) {
				t.Errorf("%s imports %s: facts do no I/O", name, imported)
			}
		}
	}
}

// TestInitIsSmall keeps out of fathom-init, of which every node runs one, whatever would make it large.
func TestInitIsSmall(t *testing.T) {
	allowed := []string{
		module + "cmd/fathom-init", module + "internal/machine", module + "internal/cgroup",
		"golang.org/x/sys/unix",
	}
	for path, p := range list(t, "-deps", "./cmd/fathom-init") {
		if !p.Standard && !anyInside(path, allowed) {
			t.Errorf("fathom-init needs %s", path)
		}
	}
}

// TestPluginIsSmall keeps out of fathom-cni, which starts anew for each pod that comes or goes, what takes time to
// start or to load.
func TestPluginIsSmall(t *testing.T) {
	banned := []string{"github.com/cilium/ebpf", "k8s.io", "sigs.k8s.io", "net/http", "crypto/tls", "google.golang.org/grpc", "github.com/spf13/cobra"}
	for path := range list(t, "-deps", "./cmd/fathom-cni") {
		if anyInside(path, banned) {
			t.Errorf("fathom-cni needs %s", path)
		}
	}
}

// TestNoReplace keeps `go install github.com/fathom-network/fathom/cmd/fathom@latest` possible: Go refuses to
// install from a module that replaces others.
func TestNoReplace(t *testing.T) {
	cmd := exec.Command("go", "mod", "edit", "-json")
	cmd.Dir = ".."
	out, err := cmd.Output()
	if err != nil {
		t.Fatal(err)
	}
	var mod struct{ Replace, Exclude []any }
	if err := json.Unmarshal(out, &mod); err != nil {
		t.Fatal(err)
	}
	if len(mod.Replace)+len(mod.Exclude) > 0 {
		t.Errorf("go.mod has %d replace and %d exclude directives, want none", len(mod.Replace), len(mod.Exclude))
	}
}
