package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/fathom-network/fathom/internal/kit"
)

func TestManifestFiles(t *testing.T) {
	dir := t.TempDir()
	for name, text := range map[string]string{
		"plain/b.yml": "b", "plain/a.yaml": "a", "plain/c.json": "c", "plain/README.md": "no", "plain/inner/d.yaml": "no", "plain/e.yaml.bak": "no",
		"none/README.md":             "no",
		"overlay/kustomization.yaml": "namePrefix: my-\nresources: [map.yaml]\n",
		"overlay/map.yaml":           "apiVersion: v1\nkind: ConfigMap\nmetadata: {name: map}\n",
		"broken/kustomization.yml":   "resources: [nowhere.yaml]\n",
		"broken/a.yaml":              "a",
	} {
		path := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	read := func(stdin, path string) (string, error) {
		t.Helper()
		r, w, err := os.Pipe()
		if err != nil {
			t.Fatal(err)
		}
		defer r.Close()
		if _, err := w.WriteString(stdin); err != nil {
			t.Fatal(err)
		}
		w.Close()
		if path != "-" {
			path = filepath.Join(dir, path)
		}
		files, err := (&app{in: r}).manifestFiles(t.Context(), path)
		var b strings.Builder
		for _, f := range files {
			b.WriteString(strings.TrimPrefix(f.Name, dir+"/") + "=" + string(f.Data) + " ")
		}
		return b.String(), err
	}
	for path, want := range map[string]string{
		"-": "standard input=of a pipe ", "plain/a.yaml": "plain/a.yaml=a ", "plain": "plain/a.yaml=a plain/b.yml=b plain/c.json=c ",
	} {
		if got, err := read("of a pipe", path); got != want || err != nil {
			t.Errorf("%s: %q, %v; want %q", path, got, err, want)
		}
	}
	for path, want := range map[string]string{
		"none": "has no file that ends in .yaml, .yml or .json", "nowhere": "no such file", "overlay/kustomization.yaml": "name its directory",
	} {
		if _, err := read("", path); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: error %v, want %q", path, err, want)
		}
	}

	dirOfKit := os.Getenv(kit.Env)
	if dirOfKit == "" {
		dirOfKit = "../../bin/kit"
	}
	k, err := kit.Open(dirOfKit)
	if err == nil {
		err = k.Require(k.Bin("kubectl"))
	}
	if err != nil {
		t.Skipf("kustomizations are not tested: %v", err)
	}
	t.Setenv(kit.Env, k.Dir)
	if got, err := read("", "overlay"); err != nil || !strings.Contains(got, "kind: ConfigMap\nmetadata:\n  name: my-map\n") || !strings.HasPrefix(got, "`kubectl kustomize ") {
		t.Errorf("a kustomization: %q, %v", got, err)
	}
	if _, err := read("", "broken"); err == nil || !strings.Contains(err.Error(), "nowhere.yaml") || !strings.Contains(err.Error(), "kubectl kustomize") {
		t.Errorf("a broken kustomization: %v", err)
	}
}
