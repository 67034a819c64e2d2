package topology

import (
	"path/filepath"
	"slices"
	"strings"

	"github.com/fathom-network/fathom/internal/facts/manifest"
)

// Stdin names standard input in the place of a file.
const Stdin = "-"

// Manifest is a file of objects that a cluster gets when it starts, a directory of such, or standard input.
type Manifest struct {
	Path    string            // as the program finds it from where it runs, or Stdin
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
		if path == Stdin && !named.at.isFlag() {
			b.add(named.at, path, "standard input is for --manifest; want the path of a file of objects, such as app.yaml")
			continue
		}
		if !named.at.isFlag() && !filepath.IsAbs(path) {
			path = filepath.Join(filepath.Dir(named.at.file), path)
		}
		if path = filepath.Clean(path); path == Stdin && named.value != Stdin {
			path = "./" + path // a file of that name
		}
		if !seen[path] {
			seen[path] = true
			manifests = append(manifests, Manifest{Path: path, named: named})
		}
	}
	return manifests
}

// ReadManifests fills in the objects of the lab's manifests, each of which read reads as one file or several. An error that is about what the user wrote is an
// *InvalidError with every problem in it.
func (l *Lab) ReadManifests(read func(path string) ([]manifest.File, error)) error {
	type file struct {
		objects  []manifest.Object
		problems []string
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
				parts, err := read(m.Path)
				if err != nil {
					parts, f.problems = nil, []string{err.Error()}
				}
				for _, part := range parts {
					objects, problems := manifest.Parse(part.Data, part.Name)
					f.objects = append(f.objects, objects...)
					for _, p := range problems {
						text := p.String()
						if len(parts) > 1 {
							text = part.Name + ": " + text
						}
						f.problems = append(f.problems, text)
					}
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
			named := manifests[slices.IndexFunc(manifests, func(m Manifest) bool {
				return slices.ContainsFunc(m.Objects, func(o manifest.Object) bool { return o.Unstructured == again.Unstructured })
			})].named
			ps.add(named.at, named.value, "%s is there before: %s; want each object once", again, first)
		}
	}
	return ps.err()
}
