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

// floors are the folders of internal, the lowest first. A package may import those of the folders that its own one names,
// and what lies in its own folder below itself.
var floors = []struct {
	name   string
	below  []string // folders that it may import from
	within bool     // its packages may import each other
}{
	// Pure values and functions: no I/O, no clock, no lock.
	{name: "facts", within: true},
	// What needs nothing but the standard library and x/sys, and may read files; serve has Prometheus' library, too.
	{name: "durable"},
	{name: "kit"},
	{name: "serve"},
	{name: "wake"},
	// The kernel's things. They know nothing of Kubernetes.
	{name: "kernel", below: []string{"facts", "durable", "wake"}, within: true},
	// What other programs say of themselves: the API server, the container runtime. They change no kernel.
	{name: "watch", below: []string{"facts"}},
	// What the programs are made of.
	{name: "cni", below: []string{"facts", "kernel"}},
	{name: "install", below: []string{"facts", "watch"}},
	{name: "agent", below: []string{"facts", "durable", "serve", "wake", "kernel", "watch", "cni"}},
	{name: "controller", below: []string{"facts", "serve", "wake", "watch"}},
	{name: "lab", below: []string{"facts", "durable", "kit", "kernel", "watch", "install"}},
	{name: "insight", below: []string{"facts", "kit", "wake", "kernel", "watch"}},
	// What tests of several packages share. Nothing but tests imports from it.
	{name: "testenv", below: []string{"facts", "kernel"}, within: true},
}

// sideways are the imports that no floor allows, each with its reason.
var sideways = map[[2]string]string{
	{"insight/svcbench", "agent/proxy"}: "it measures the proxy",
	{"lab/template", "lab/stored"}:      "a template is made of what a cluster has stored",
	{"lab/saved", "lab/stored"}:         "a lab that is kept has what its clusters have stored",
}

// onlyBy says which packages may import what is in these modules or directories; a name that ends in / stands
// for all commands. Tests may import anything.
var onlyBy = map[string][]string{
	"github.com/vishvananda/netlink":         {"internal/kernel/rtnl", "internal/kernel/link", "internal/kernel/podlink", "internal/kernel/podroute", "internal/lab/doctor"},
	"github.com/google/nftables":             {"internal/kernel/nft", "internal/kernel/ruleset", "internal/lab/doctor"},
	"github.com/osrg/gobgp":                  {"internal/agent/announcing/bgp"},
	"github.com/hashicorp/memberlist":        {"internal/agent/announcing/membership"},
	"github.com/cilium/ebpf":                 {"internal/kernel/bpf"},
	"k8s.io/client-go/kubernetes":            {"internal/watch/kube"},
	"k8s.io/client-go/rest":                  {"internal/watch/kube"},
	"k8s.io/client-go/dynamic":               {"internal/watch/kube"},
	"k8s.io/client-go/informers":             {"internal/watch/kube"},
	"k8s.io/client-go/tools/cache":           {"internal/watch/kube"},
	"k8s.io/client-go/tools/leaderelection":  {"internal/watch/kube"},
	"k8s.io/client-go/tools/record":          {"internal/watch/kube"},
	"k8s.io/cri-api":                         {"internal/watch/cri"},
	"google.golang.org/grpc":                 {"internal/watch/cri"},
	"github.com/google/go-containerregistry": {"internal/lab/image"},
	"github.com/spf13/cobra":                 {"cmd/"},
	"github.com/containernetworking/cni":     {"internal/cni"},
	"testing":                                {"internal/testenv", "internal/testenv/linktest"},
	module + "internal/testenv":              {"internal/testenv/linktest"},
	module + "internal/testenv/linktest":     {},
	module + "internal/testenv/golden":       {},
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

// floorOf returns the floor of one of our packages, and its path there; false for what is not below internal.
func floorOf(name string) (floor int, path string, ok bool) {
	path, ok = strings.CutPrefix(name, "internal/")
	first, _, _ := strings.Cut(path, "/")
	for i, f := range floors {
		if ok && f.name == first {
			return i, path, true
		}
	}
	return -1, path, false
}

func TestLayers(t *testing.T) {
	unused := maps.Clone(sideways)
	for path, p := range list(t, "./cmd/...", "./internal/...") {
		name := strings.TrimPrefix(path, module)
		at, place, found := floorOf(name)
		switch {
		case strings.HasPrefix(name, "cmd/"):
		case name == "internal": // this test
			continue
		case !found:
			t.Errorf("%s is on no floor: move it to one, or name a new one in internal/layers_test.go", name)
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
			below, otherPlace, foundOther := floorOf(other)
			if !found || !foundOther { // commands import anything
				continue
			}
			pair := [2]string{place, otherPlace}
			delete(unused, pair)
			allowed := slices.Contains(floors[at].below, floors[below].name) || at == below && floors[at].within ||
				inside(otherPlace, place) || sideways[pair] != ""
			if !allowed {
				t.Errorf("%s imports %s, which %s may not", name, other, floors[at].name)
			}
		}
	}
	for pair := range unused {
		t.Errorf("internal/layers_test.go lets %s import %s, which it does not do", pair[0], pair[1])
	}
}

func TestForeignImports(t *testing.T) {
	for path, p := range list(t, "./cmd/...", "./internal/...") {
		name := strings.TrimPrefix(path, module)
		facts := inside(name, "internal/facts")
		for _, imported := range p.Imports {
			for what, users := range onlyBy {
				if inside(imported, what) && !anyInside(name, users) {
					t.Errorf("%s imports %s, which only %s may", name, imported, strings.Join(append(slices.Clone(users), "tests"), " and "))
				}
			}
			foreign := strings.Contains(strings.Split(imported, "/")[0], ".") && !strings.HasPrefix(imported, module)
			if facts && foreign && !anyInside(imported, factsMayUse) {
				t.Errorf("%s imports %s: facts are made of the standard library and of API types", name, imported)
			}
			if facts && slices.Contains([]string{"os", "os/exec", "net", "net/http", "syscall"}, imported) {
				t.Errorf("%s imports %s: facts do no I/O", name, imported)
			}
		}
	}
}

// TestInitIsSmall keeps out of fathom-init, of which every node runs one, whatever would make it large.
func TestInitIsSmall(t *testing.T) {
	allowed := []string{
		module + "cmd/fathom-init", module + "internal/kernel/machine", module + "internal/kernel/cgroup",
		"golang.org/x/sys/unix",
	}
	for path, p := range list(t, "-deps", "./cmd/fathom-init") {
		if !p.Standard && !anyInside(path, allowed) {
			t.Errorf("fathom-init needs %s", path)
		}
	}
}

// TestKernelIsFree keeps Kubernetes out of the kernel's packages and of all that they need: they take values, which other
// packages read out of the API's objects.
func TestKernelIsFree(t *testing.T) {
	for path := range list(t, "-deps", "./internal/kernel/...") {
		if anyInside(path, []string{"k8s.io", "sigs.k8s.io"}) {
			t.Errorf("the kernel's packages need %s", path)
		}
	}
}

// TestVerifyIsFree keeps out of verify what changes kernels or talks to them: it compares what agents answer with what
// follows from the API's objects, and both are facts.
func TestVerifyIsFree(t *testing.T) {
	banned := []string{module + "internal/kernel", module + "internal/agent", "github.com/cilium/ebpf", "github.com/google/nftables", "github.com/vishvananda/netlink"}
	for path := range list(t, "-deps", "./internal/insight/verify") {
		if anyInside(path, banned) {
			t.Errorf("insight/verify needs %s", path)
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
