package topology

import (
	"fmt"
	"io/fs"
	"slices"
	"strings"
	"testing"

	"github.com/fathom-network/fathom/internal/facts/manifest"
)

const labOfManifests = `apiVersion: fathom.network/v1alpha1
kind: Lab
defaults:
  manifests: [app/web.yaml]
clusters:
- name: east
  manifests: [../crd.yaml, ./app/web.yaml]
- name: west
  manifests: [/srv/job.yaml]
`

// readFrom reads what the map has.
func readFrom(files map[string]string) func(string) ([]manifest.File, error) {
	return func(path string) ([]manifest.File, error) {
		data, found := files[path]
		if !found {
			return nil, &fs.PathError{Op: "open", Path: path, Err: fs.ErrNotExist}
		}
		return []manifest.File{{Name: path, Data: []byte(data)}}, nil
	}
}

func configMap(name string) string {
	return "apiVersion: v1\nkind: ConfigMap\nmetadata: {name: " + name + "}\n---\n"
}

func TestManifests(t *testing.T) {
	lab, err := Parse([]byte(labOfManifests), "labs/shop/lab.yaml", Overrides{Manifests: []string{"mine.yaml"}})
	if err != nil {
		t.Fatal(err)
	}
	err = lab.ReadManifests(readFrom(map[string]string{
		"labs/shop/app/web.yaml": configMap("web") + configMap("more"), "labs/crd.yaml": configMap("crd"),
		"/srv/job.yaml": configMap("job"), "mine.yaml": configMap("mine"),
	}))
	if err != nil {
		t.Fatal(err)
	}
	want := [][]string{
		{"ConfigMap web (labs/shop/app/web.yaml:1)", "ConfigMap more (labs/shop/app/web.yaml:5)", "ConfigMap crd (labs/crd.yaml:1)", "ConfigMap mine (mine.yaml:1)"},
		{"ConfigMap web (labs/shop/app/web.yaml:1)", "ConfigMap more (labs/shop/app/web.yaml:5)", "ConfigMap job (/srv/job.yaml:1)", "ConfigMap mine (mine.yaml:1)"},
	}
	for i, c := range lab.Clusters {
		var got []string
		for _, m := range c.Manifests {
			for _, o := range m.Objects {
				got = append(got, o.String())
			}
		}
		if !slices.Equal(got, want[i]) {
			t.Errorf("%s has\n%s\nwant\n%s", c.Name, strings.Join(got, "\n"), strings.Join(want[i], "\n"))
		}
	}
}

// Everything that is wrong is told at once, with its place in the lab file and in the manifest, and once for all clusters.
func TestInvalidManifests(t *testing.T) {
	lab, err := Parse([]byte(labOfManifests), "lab.yaml", Overrides{Manifests: []string{"mine.yaml", "big.yaml", "last.yaml"}})
	if err != nil {
		t.Fatal(err)
	}
	files := readFrom(map[string]string{
		"app/web.yaml":  configMap("web") + "kind: Service\n",
		"/srv/job.yaml": configMap("job"), "mine.yaml": configMap("job"),
		"last.yaml": configMap("last"), // a file behind one with a mistake has none by that
	})
	err = lab.ReadManifests(func(path string) ([]manifest.File, error) {
		if path == "big.yaml" {
			return nil, fmt.Errorf("%s has more than 16 bytes", path)
		}
		return files(path)
	})
	const want = `the lab has 4 problems:
  lab.yaml:4:15: defaults.manifests[0]: "app/web.yaml": line 5 (document 2): no apiVersion; want one such as v1 or apps/v1
  lab.yaml:7:15: clusters[0].manifests[0]: "../crd.yaml": open ../crd.yaml: file does not exist
  --manifest: "big.yaml": big.yaml has more than 16 bytes
  --manifest: "mine.yaml": ConfigMap job (mine.yaml:1) is there before: ConfigMap job (/srv/job.yaml:1); want each object once`
	if !IsInvalid(err) || err.Error() != want {
		t.Errorf("got\n%v\nwant\n%s", err, want)
	}
}

// A directory has several files, whose problems are told with their names; standard input is for the flag alone.
func TestManifestsOfSeveralFiles(t *testing.T) {
	lab, err := Default(Overrides{Clusters: []string{"east"}, Manifests: []string{"app/", "-", "./-", "-"}})
	if err != nil {
		t.Fatal(err)
	}
	parts := map[string][]manifest.File{
		"app": {{Name: "app/a.yaml", Data: []byte(configMap("a"))}, {Name: "app/b.yaml", Data: []byte(configMap("b"))}},
		"-":   {{Name: "standard input", Data: []byte(configMap("c"))}},
		"./-": {{Name: "./-", Data: []byte(configMap("d"))}},
	}
	read := func(path string) ([]manifest.File, error) {
		files, found := parts[path]
		if !found {
			t.Errorf("%q is read", path)
		}
		return files, nil
	}
	if err := lab.ReadManifests(read); err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, m := range lab.Clusters[0].Manifests {
		for _, o := range m.Objects {
			got = append(got, o.String())
		}
	}
	want := []string{"ConfigMap a (app/a.yaml:1)", "ConfigMap b (app/b.yaml:1)", "ConfigMap c (standard input:1)", "ConfigMap d (./-:1)"}
	if !slices.Equal(got, want) {
		t.Errorf("got %v, want %v", got, want)
	}
	parts["app"][1].Data = []byte("kind: A\n")
	parts["-"][0].Data = []byte(configMap("d"))
	const problems = `the lab has 2 problems:
  --manifest: "app/": app/b.yaml: line 1 (document 1): no apiVersion; want one such as v1 or apps/v1
  --manifest: "./-": ConfigMap d (./-:1) is there before: ConfigMap d (standard input:1); want each object once`
	if err := lab.ReadManifests(read); err == nil || err.Error() != problems {
		t.Errorf("got\n%v\nwant\n%s", err, problems)
	}
	_, err = Parse([]byte("apiVersion: fathom.network/v1alpha1\nkind: Lab\nclusters: [{name: east, manifests: ['-']}]\n"), "lab.yaml", Overrides{})
	if err == nil || !strings.Contains(err.Error(), `manifests[0]: "-": standard input is for --manifest`) {
		t.Errorf("standard input in a lab file: %v", err)
	}
}
