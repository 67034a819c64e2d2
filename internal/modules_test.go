package internal_test

import (
	"encoding/json"
	"maps"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// TestOneVersion holds the modules that `make build` compiles most of to one version of each module that two of them
// need. Go's build cache then has a package compiled once for all of them; a package over one of another version is
// another package. With the versions that each release asks for, client-go alone was compiled four times
// (docs/benchmarks.md, "The first build").
func TestOneVersion(t *testing.T) {
	compiled := []string{".", "kit/kubernetes", "kit/containerd", "kit/addons/coredns", "kit/addons/dns", "kit/addons/flannel"}
	// apart is what a directory has in versions of its own, by the modules' prefixes: Kubernetes' libraries of its next
	// release, of which containerd takes little, and what shares too little to be worth a `replace`.
	const newer = "kit/containerd"
	apart := []string{"k8s.io/", "go.opentelemetry.io/", "github.com/grpc-ecosystem/grpc-gateway/v2"}
	isApart := func(module string) string {
		i := slices.IndexFunc(apart, func(prefix string) bool { return strings.HasPrefix(module, prefix) })
		if i < 0 {
			return ""
		}
		return apart[i]
	}

	versions := map[string]map[string][]string{} // by module and version, the directories that need it
	for _, dir := range compiled {
		for module, version := range required(t, dir) {
			if dir == newer && isApart(module) != "" {
				continue
			}
			if versions[module] == nil {
				versions[module] = map[string][]string{}
			}
			versions[module][version] = append(versions[module][version], dir)
		}
	}
	for _, module := range slices.Sorted(maps.Keys(versions)) {
		if len(versions[module]) > 1 {
			t.Errorf("%s is compiled in %d versions: %v; `go get` one of them in the other directories, and `go mod tidy`", module, len(versions[module]), versions[module])
		}
	}

	differs := map[string]bool{}
	for module, version := range required(t, newer) {
		if prefix := isApart(module); prefix != "" && len(versions[module]) > 0 && versions[module][version] == nil {
			differs[prefix] = true
		}
	}
	for _, prefix := range apart {
		if !differs[prefix] {
			t.Errorf("%s has %s in the version that all others have: take it from the exceptions", newer, prefix)
		}
	}
}

// required returns the modules that a directory's go.mod lists, which are those that its packages come from, with
// their versions. A `replace` by another version of the same module counts as that version.
func required(t *testing.T, dir string) map[string]string {
	t.Helper()
	cmd := exec.Command("go", "mod", "edit", "-json")
	cmd.Dir = filepath.Join("..", filepath.FromSlash(dir))
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("read %s/go.mod: %v", dir, err)
	}
	type version struct{ Path, Version string }
	var mod struct {
		Require []version
		Replace []struct{ Old, New version }
	}
	if err := json.Unmarshal(out, &mod); err != nil {
		t.Fatalf("read %s/go.mod: %v", dir, err)
	}
	versions := map[string]string{}
	for _, v := range mod.Require {
		versions[v.Path] = v.Version
	}
	for _, r := range mod.Replace {
		if _, found := versions[r.Old.Path]; found && r.New.Path == r.Old.Path {
			versions[r.Old.Path] = r.New.Version
		}
	}
	return versions
}
