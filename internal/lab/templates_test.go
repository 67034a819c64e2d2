package lab

import (
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/fathom-network/fathom/internal/facts/topology"
	"github.com/fathom-network/fathom/internal/kit"
	"github.com/fathom-network/fathom/internal/lab/template"
)

// templateLab is a lab with a kit of which there is enough to tell it from others.
func templateLab(t *testing.T) *Lab {
	t.Helper()
	dir := t.TempDir()
	for _, file := range []string{"kit/images/index.json", "kit/bin/kube"} {
		if err := writeFile(filepath.Join(dir, file), []byte(file), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	lab, err := topology.Default(topology.Overrides{})
	if err != nil {
		t.Fatal(err)
	}
	lab.Underlay4, lab.Underlay6 = netip.MustParsePrefix("10.201.0.0/16"), netip.MustParsePrefix("fd00:201::/48")
	return &Lab{Lab: *lab, Paths: Paths{Cache: filepath.Join(dir, "cache")}, Kit: kit.Kit{Dir: filepath.Join(dir, "kit")}}
}

// A template serves clusters of one description and of the same programs, and no others.
func TestTemplateFile(t *testing.T) {
	l := templateLab(t)
	file := func(l *Lab) string {
		path, ok := l.templateFile(&l.Clusters[0])
		if !ok {
			return ""
		}
		return filepath.Base(path)
	}
	want := file(l)
	if want == "" {
		t.Fatal("the default lab's first cluster can have no template")
	}
	for name, change := range map[string]func(*Lab){
		"the lab's name":     func(l *Lab) { l.Name = "other" },
		"the lab's underlay": func(l *Lab) { l.Underlay4 = netip.MustParsePrefix("10.99.0.0/16") },
		"a wire":             func(l *Lab) { l.Clusters[0].Nodes[1].Wire.Delay = "20ms" },
		"a mount":            func(l *Lab) { l.Clusters[0].Nodes[1].Mounts = []topology.Mount{{HostPath: "/a", NodePath: "/b"}} },
		"manifests":          func(l *Lab) { l.Clusters[0].Manifests = []topology.Manifest{{}} },
		"another cluster":    func(l *Lab) { l.Clusters = l.Clusters[:1] },
	} {
		other := *l
		other.Clusters = append([]topology.Cluster{}, l.Clusters...)
		other.Clusters[0].Nodes = append([]topology.Node{}, l.Clusters[0].Nodes...)
		change(&other)
		if got := file(&other); got != want {
			t.Errorf("%s makes another template", name)
		}
	}
	for name, change := range map[string]func(*Lab){
		"its name":      func(l *Lab) { l.Clusters[0].Name = "north" },
		"its place":     func(l *Lab) { l.Clusters[0].Index = 1 },
		"a label":       func(l *Lab) { l.Clusters[0].Nodes[1].Labels = map[string]string{"a": "b"} },
		"a flag":        func(l *Lab) { l.Clusters[0].APIServerArgs = map[string]topology.Values{"v": {"4"}} },
		"the network":   func(l *Lab) { l.Clusters[0].Network.Kind = topology.NetworkBridge },
		"fewer nodes":   func(l *Lab) { l.Clusters[0].Nodes = l.Clusters[0].Nodes[:2] },
		"the versions":  func(l *Lab) { l.Kit.Kubernetes = "v1.0.0" },
		"host's files":  func(l *Lab) { l.Clusters[0].APIServerVolumes = []topology.Volume{{HostPath: "/a", MountPath: "/b"}} },
		"another image": func(l *Lab) { _ = os.WriteFile(filepath.Join(l.Kit.ImagesDir(), "index.json"), []byte("x"), 0o600) },
		"another kube": func(l *Lab) {
			_ = os.Chtimes(l.Kit.Bin("kube"), time.Time{}, time.Date(2001, 1, 1, 0, 0, 0, 0, time.UTC))
		},
		"no kit": func(l *Lab) { _ = os.RemoveAll(l.Kit.Dir) },
	} {
		other := templateLab(t)
		// Two directories' files differ in their times.
		for _, path := range []string{l.Kit.Bin("kube"), other.Kit.Bin("kube")} {
			if err := os.Chtimes(path, time.Time{}, time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)); err != nil {
				t.Fatal(err)
			}
		}
		if file(l) != file(other) {
			t.Fatal("two clusters of one description have no template in common")
		}
		change(other)
		if file(other) == file(l) {
			t.Errorf("with %s changed it is the same template", name)
		}
	}
}

// What cannot be read is no template.
func TestReadTemplate(t *testing.T) {
	l := templateLab(t)
	c := &l.Clusters[0]
	path, _ := l.templateFile(c)
	if l.readTemplate(c) != nil {
		t.Error("there is a template before one was made")
	}
	data, err := (&template.Template{Underlay4: l.Underlay4}).Encode()
	if err != nil {
		t.Fatal(err)
	}
	for text, want := range map[string]bool{string(data): true, "": false, string(data[:len(data)/2]): false} {
		if err := writeFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		if got := l.readTemplate(c) != nil; got != want {
			t.Errorf("of %d bytes a template is read: %v", len(text), got)
		}
	}
}

func TestSweepTemplates(t *testing.T) {
	dir := t.TempDir()
	for i := range keptTemplates + 3 {
		path := filepath.Join(dir, fmt.Sprint(i))
		if err := os.WriteFile(path, nil, 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.Chtimes(path, time.Time{}, time.Unix(int64(1000-i), 0)); err != nil {
			t.Fatal(err)
		}
	}
	if err := sweepTemplates(dir); err != nil {
		t.Fatal(err)
	}
	for i := range keptTemplates + 3 {
		if _, err := os.Stat(filepath.Join(dir, fmt.Sprint(i))); (err == nil) != (i < keptTemplates) {
			t.Errorf("template %d: %v", i, err)
		}
	}
}

// A bootstrap token is of the form that the API server asks for, and nobody has had it before.
func TestBootstrapToken(t *testing.T) {
	a, b := bootstrapToken(time.Now()), bootstrapToken(time.Now())
	if a.Name == b.Name || string(a.Data["token-secret"]) == string(b.Data["token-secret"]) {
		t.Error("two clusters have one token")
	}
	if id, secret := string(a.Data["token-id"]), string(a.Data["token-secret"]); len(id) != 6 || len(secret) != 16 || a.Name != "bootstrap-token-"+id {
		t.Errorf("token %s: %s.%s", a.Name, id, secret)
	}
}
