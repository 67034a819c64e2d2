package topology

import (
	"path/filepath"
	"slices"
	"strings"

	"github.com/fathom-network/fathom/internal/manifest"
)

// Manifest is a file of objects that a cluster gets when it starts.
type Manifest struct {
	Path    string            // as the program finds it from where it runs
	Objects []manifest.Object // by ReadManifests
	named   text
}

// manifests finds the files: paths of a lab file begin at its directory, those of flags where the program runs. A file that
// is named again, by the cluster and by defaults, is there once.
func (b *builder) manifests(paths []text) []Manifest {
	var manifests []Manifest
	seen := map[string]bool{}
	for _, named := range paths {
		path := named.value
		if path == "" || strings.ContainsRune(path, 0) {
			b.add(named.at, path, "want the path of a file of objects, such as app.yaml")
			continue
		}
		if !named.at.isFlag() && !filepath.IsAbs(path) {
			path = filepath.Join(filepath.Dir(named.at.file), path)
		}
		path = filepath.Clean(path)
		if !seen[path] {
			seen[path] = true
			manifests = append(manifests, Manifest{Path: path, named: named})
		}
	}
	return manifests
}

// ReadManifests fills in the objects of the lab's manifests. An error that is about what the user wrote is an
// *InvalidError with every problem in it.
func (l *Lab) ReadManifests(read func(path string) ([]byte, error)) error {
	type file struct {
		objects  []manifest.Object
		problems []manifest.Problem
	}
	files := map[string]file{}
	var ps problems
	for i := range l.Clusters {
		manifests := l.Clusters[i].Manifests
		var objects []manifest.Object
		for j := range manifests {
			m := &manifests[j]
			f, known := files[m.Path]
			if !known {
				data, err := read(m.Path)
				if err != nil {
					f.problems = []manifest.Problem{{Text: err.Error()}}
				} else {
					f.objects, f.problems = manifest.Parse(data, m.Path)
				}
				files[m.Path] = f
			}
			for _, p := range f.problems {
				ps.add(m.named.at, m.named.value, "%s", p)
			}
			m.Objects = f.objects
			objects = append(objects, f.objects...)
		}
		if again, first, found := manifest.Twice(objects); found {
			named := manifests[slices.IndexFunc(manifests, func(m Manifest) bool { return m.Path == again.File })].named
			ps.add(named.at, named.value, "%s is there before: %s; want each object once", again, first)
		}
	}
	return ps.err()
}
