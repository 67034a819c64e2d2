package image

import (
	"context"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-containerregistry/pkg/v1/layout"

	"github.com/fathom-network/fathom/internal/kit"
)

// standIn returns a kit whose programs are busybox under their names: enough to build images, not to
// run them.
func standIn(t *testing.T) kit.Kit {
	t.Helper()
	if err := checkTools(); err != nil {
		t.Skip(err)
	}
	box, err := findBusybox()
	if err != nil {
		t.Skip(err)
	}
	dir := t.TempDir()
	k := kit.Kit{Dir: filepath.Join(dir, "kit"), OwnDir: dir, Versions: kit.Versions{
		Kubernetes: "v1.2.3", EtcdImageTag: "3.0-0", CoreDNSImageTag: "v1.0", PauseImage: "registry.k8s.io/pause:3",
		Agnhost: "2.0", Flannel: "v0.1", FlannelCNI: "v1.0",
	}}
	for _, path := range []string{k.Bin("kube"), k.Program("agnhost"), k.Program("coredns"), k.Program("fathom-dns"), k.Program("flannel"), k.Program("flanneld"), k.Program("http-echo"), k.Program("pause"), k.Program("localhost.crt"), k.Program("localhost.key"), k.Own("fathom-agent"), k.Own("fathom-cni"), k.Own("fathom-controller")} {
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		data, err := os.ReadFile(box.source)
		if err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, append(data, path[len(dir):]...), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	return k
}

func TestBuild(t *testing.T) {
	ctx := context.Background()
	k := standIn(t)
	if err := Build(ctx, k, nil); err != nil {
		t.Fatal(err)
	}
	index, err := layout.ImageIndexFromPath(k.ImagesDir())
	if err != nil {
		t.Fatal(err)
	}
	digest, err := index.Digest()
	if err != nil {
		t.Fatal(err)
	}
	manifest, err := index.IndexManifest()
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	layersOf := map[string][]string{}
	for _, m := range manifest.Manifests {
		name := m.Annotations[imageNameAnnotation]
		if ref := m.Annotations[refNameAnnotation]; ref != name {
			t.Errorf("%s is named %s to other importers", name, ref)
		}
		got = append(got, name)
		image, err := index.Image(m.Digest)
		if err != nil {
			t.Fatal(err)
		}
		layers, err := image.Layers()
		if err != nil {
			t.Fatal(err)
		}
		for _, l := range layers {
			d, err := l.Digest()
			if err != nil {
				t.Fatal(err)
			}
			layersOf[name] = append(layersOf[name], d.Hex)
		}
	}
	slices.Sort(got)
	want, err := Names(k)
	if err != nil {
		t.Fatal(err)
	}
	if !slices.Equal(got, want) {
		t.Errorf("images:\n%s\nwant:\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
	}
	if a, b := layersOf["registry.k8s.io/etcd:3.0-0"], layersOf["registry.k8s.io/kube-proxy:v1.2.3"]; !slices.Equal(a, b) || len(a) == 0 {
		t.Errorf("etcd and kube-proxy do not share their layers: %v and %v", a, b)
	}

	// What of them is the distribution's is listed, and nothing else is.
	listed, err := os.ReadFile(filepath.Join(k.ImagesDir(), distributionFile))
	if err != nil {
		t.Fatal(err)
	}
	files := strings.Fields(string(listed))
	if ip, _ := locate("ip"); !slices.Contains(files, ip) {
		t.Errorf("%s is in the images and not among %q", ip, files)
	}
	for _, file := range files {
		if strings.HasPrefix(file, filepath.Dir(k.Dir)) {
			t.Errorf("%s is not the distribution's", file)
		}
	}

	// Again: nothing to do.
	var said []string
	if err := Build(ctx, k, func(s string) { said = append(said, s) }); err != nil {
		t.Fatal(err)
	}
	if len(said) != 1 || !strings.Contains(said[0], "up to date") {
		t.Errorf("a second build said %q", said)
	}
	// From scratch: the same digest.
	if err := os.RemoveAll(k.ImagesDir()); err != nil {
		t.Fatal(err)
	}
	// What a killed build left is swept.
	stale := filepath.Join(k.Dir, ".images-123")
	if err := os.Mkdir(stale, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := Build(ctx, k, nil); err != nil {
		t.Fatal(err)
	}
	if index, err = layout.ImageIndexFromPath(k.ImagesDir()); err != nil {
		t.Fatal(err)
	}
	if again, err := index.Digest(); err != nil || again != digest {
		t.Errorf("two builds gave %s and %s (%v)", digest, again, err)
	}
	if _, err := os.Stat(stale); err == nil {
		t.Errorf("%s is still there", stale)
	}
	// A program changes: so do the images.
	if err := os.WriteFile(k.Program("pause"), []byte("#!/bin/sh\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := Build(ctx, k, nil); err != nil {
		t.Fatal(err)
	}
	if index, err = layout.ImageIndexFromPath(k.ImagesDir()); err != nil {
		t.Fatal(err)
	}
	if again, err := index.Digest(); err != nil || again == digest {
		t.Errorf("the pause program changed, the images did not (%v)", err)
	}
	if left, _ := filepath.Glob(filepath.Join(k.Dir, ".images-*")); len(left) > 0 {
		t.Errorf("left behind: %v", left)
	}
}

func TestBuildNamesWhatIsMissing(t *testing.T) {
	k := standIn(t)
	if err := os.Remove(k.Program("coredns")); err != nil {
		t.Fatal(err)
	}
	if err := Build(context.Background(), k, nil); err == nil || !strings.Contains(err.Error(), "programs/coredns") {
		t.Errorf("error %v, want one that names programs/coredns", err)
	}
}
