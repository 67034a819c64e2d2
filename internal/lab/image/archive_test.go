package image

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/static"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
	"github.com/google/go-containerregistry/pkg/v1/types"
)

// testImage returns a small image of one layer for linux on the given architecture.
func testImage(t testing.TB, arch, text string) v1.Image {
	t.Helper()
	content := tree{}
	content.write("/text", text, 0o644)
	var layer bytes.Buffer
	if err := content.writeTo(&layer); err != nil {
		t.Fatal(err)
	}
	image, err := mutate.AppendLayers(empty.Image, static.NewLayer(layer.Bytes(), types.OCIUncompressedLayer))
	if err != nil {
		t.Fatal(err)
	}
	config, err := image.ConfigFile()
	if err != nil {
		t.Fatal(err)
	}
	config = config.DeepCopy()
	config.OS, config.Architecture = "linux", arch
	if image, err = mutate.ConfigFile(image, config); err != nil {
		t.Fatal(err)
	}
	return image
}

// dockerArchive returns what docker save wrote up to version 24.
func dockerArchive(t testing.TB, tag string, image v1.Image) []byte {
	t.Helper()
	ref, err := name.NewTag(tag)
	if err != nil {
		t.Fatal(err)
	}
	var buffer bytes.Buffer
	if err := tarball.Write(ref, image, &buffer); err != nil {
		t.Fatal(err)
	}
	return buffer.Bytes()
}

// ociArchive returns an OCI layout in a tar.
func ociArchive(t testing.TB, annotations map[string]string, images ...v1.Image) []byte {
	t.Helper()
	dir := t.TempDir()
	out, err := layout.Write(dir, empty.Index)
	if err != nil {
		t.Fatal(err)
	}
	for _, image := range images {
		if err := out.AppendImage(image, layout.WithAnnotations(annotations)); err != nil {
			t.Fatal(err)
		}
	}
	var buffer bytes.Buffer
	if err := writeArchive(&buffer, dir, nil); err != nil {
		t.Fatal(err)
	}
	return buffer.Bytes()
}

func compress(t testing.TB, data []byte) []byte {
	t.Helper()
	var buffer bytes.Buffer
	w := gzip.NewWriter(&buffer)
	if _, err := w.Write(data); err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return buffer.Bytes()
}

// edit copies a tar with one entry changed: to nil, it is left out.
func edit(t testing.TB, archive []byte, match string, change func([]byte) []byte) []byte {
	t.Helper()
	var buffer bytes.Buffer
	tr, tw := tar.NewReader(bytes.NewReader(archive)), tar.NewWriter(&buffer)
	matched := false
	for {
		header, err := tr.Next()
		if err == io.EOF {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		data, err := io.ReadAll(tr)
		if err != nil {
			t.Fatal(err)
		}
		if !matched && strings.Contains(header.Name, match) {
			matched = true
			if data = change(data); data == nil {
				continue
			}
		}
		header.Size = int64(len(data))
		if err := tw.WriteHeader(header); err != nil {
			t.Fatal(err)
		}
		if _, err := tw.Write(data); err != nil {
			t.Fatal(err)
		}
	}
	if !matched {
		t.Fatalf("no entry like %s", match)
	}
	if err := tw.Close(); err != nil {
		t.Fatal(err)
	}
	return buffer.Bytes()
}

// openFile opens an archive as Load does.
func openFile(t testing.TB, file, arch string) (*archive, error) {
	t.Helper()
	from, err := Input{Dir: t.TempDir()}.openSource(t.Context(), file)
	if err != nil {
		return nil, err
	}
	t.Cleanup(from.close)
	return openArchive(from, arch)
}

func TestOpenArchive(t *testing.T) {
	image := testImage(t, "amd64", strings.Repeat("a text that takes more than one block. ", 100))
	docker := dockerArchive(t, "nginx:1", image)
	oci := ociArchive(t, map[string]string{refNameAnnotation: "example.org/team/app:v2"}, image)
	digest, err := image.Digest()
	if err != nil {
		t.Fatal(err)
	}
	layers, err := image.Layers()
	if err != nil {
		t.Fatal(err)
	}
	layerDigest, err := layers[0].Digest()
	if err != nil {
		t.Fatal(err)
	}
	damage := func(data []byte) []byte {
		data = bytes.Clone(data)
		data[len(data)/2] ^= 1
		return data
	}
	remove := func([]byte) []byte { return nil }
	random := bytes.Repeat([]byte{0x90, 0x03, 0xfe}, 400)
	rootfs := func() []byte {
		content := tree{}
		content.write("/etc/passwd", "root\n", 0o644)
		var buffer bytes.Buffer
		if err := content.writeTo(&buffer); err != nil {
			t.Fatal(err)
		}
		return buffer.Bytes()
	}()

	for _, tt := range []struct {
		name  string
		file  string
		data  []byte
		names string // joined by a space
		want  string // part of the error
	}{
		{name: "docker", data: docker, names: "docker.io/library/nginx:1"},
		{name: "docker, gzip", data: compress(t, docker), names: "docker.io/library/nginx:1"},
		{name: "docker, a registry with a port", data: dockerArchive(t, "localhost:5000/x:1", image), names: "localhost:5000/x:1"},
		{name: "oci", data: oci, names: "example.org/team/app:v2"},
		{name: "oci, gzip", data: compress(t, oci), names: "example.org/team/app:v2"},
		{name: "oci, a short name", data: ociArchive(t, map[string]string{refNameAnnotation: "nginx:1"}, image), names: "docker.io/library/nginx:1"},
		{name: "oci, only a tag", file: "app.tar.gz", data: ociArchive(t, map[string]string{refNameAnnotation: "v3"}, image), names: "docker.io/library/app:v3"},
		{name: "oci, containerd's name first", data: ociArchive(t, map[string]string{refNameAnnotation: "v3", imageNameAnnotation: "quay.io/a/b:v3"}, image), names: "quay.io/a/b:v3"},

		{name: "empty", data: nil, want: "it is empty"},
		{name: "text", data: []byte("FROM scratch\n"), want: "it is text, not an image; save one with `docker save"},
		{name: "json", data: []byte(`{"a": 1}`), want: "it is a JSON document"},
		{name: "web page", data: []byte("<!DOCTYPE html><html>not found"), want: "it is a web page"},
		{name: "program", data: append([]byte("\x7fELF"), random...), want: "it is a program"},
		{name: "zip", data: append([]byte("PK\x03\x04"), random...), want: "it is a zip archive"},
		{name: "zstd, damaged", data: append([]byte("\x28\xb5\x2f\xfd"), random...), want: "cannot decompress it: it was compressed with a window of more than 128 MiB"},
		{name: "garbage", data: random, want: "of an unknown format"},
		{name: "gzip of text", data: compress(t, []byte("hello")), want: "what is inside is text"},
		{name: "gzip header only", data: []byte("\x1f\x8b\x08"), want: "cut short"},
		{name: "nothing in it", data: append(bytes.Clone(docker[:0]), make([]byte, 1024)...), want: "unknown format"},
		{name: "root file system", data: rootfs, want: "neither oci-layout nor manifest.json, but etc/, etc/passwd; `docker save` makes"},
		{name: "docker, cut in a file", data: docker[:len(docker)/2], want: "cut short"},
		{name: "oci, cut in a file", data: oci[:len(oci)/2+200], want: "cut short"},
		{name: "gzip, cut", data: compress(t, docker)[:300], want: "cut short"},
		{name: "gzip, checksum", data: func() []byte { d := compress(t, docker); d[len(d)-6] ^= 1; return d }(), want: "damaged"},
		{name: "oci, no index", data: edit(t, oci, "index.json", remove), want: "index.json is missing"},
		{name: "oci, no image", data: edit(t, oci, "index.json", func([]byte) []byte { return []byte(`{"manifests":[]}`) }), want: "lists none"},
		{name: "oci, no name", data: ociArchive(t, nil, image), want: "does not name its image"},
		{name: "oci, a bad name", data: ociArchive(t, map[string]string{refNameAnnotation: "A B:c"}, image), want: `"A B:c"`},
		{name: "oci, no manifest", data: edit(t, oci, digest.Hex, remove), want: digest.Hex + " is missing"},
		{name: "oci, no layer", data: edit(t, oci, layerDigest.Hex, remove), want: layerDigest.Hex + " is missing"},
		{name: "oci, a damaged layer", data: edit(t, oci, layerDigest.Hex, damage), want: "the digest of"},
		{name: "oci, a short layer", data: edit(t, oci, layerDigest.Hex, func(d []byte) []byte { return d[1:] }), want: "instead of"},
		{name: "docker, no layer", data: edit(t, docker, layerDigest.Hex, remove), want: "is missing"},
		{name: "docker, no configuration", data: edit(t, docker, "sha256:", remove), want: "is missing"},
		{name: "docker, not JSON", data: edit(t, docker, "manifest.json", func([]byte) []byte { return []byte("[{]") }), want: "manifest.json in it is malformed"},
		{name: "docker, no name", data: edit(t, docker, "manifest.json", func(d []byte) []byte {
			return bytes.Replace(d, []byte(`["nginx:1"]`), []byte("null"), 1)
		}), want: "not by its ID"},
		{name: "docker, another machine", data: dockerArchive(t, "a:1", testImage(t, "arm64", "x")), want: "is for linux/arm64, and this machine is linux/amd64"},
		{name: "oci, another machine", data: ociArchive(t, map[string]string{refNameAnnotation: "a:1"}, testImage(t, "arm64", "x")), want: "--platform linux/amd64"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			file := tt.file
			if file == "" {
				file = "image.tar"
			}
			file = filepath.Join(t.TempDir(), file)
			if err := os.WriteFile(file, tt.data, 0o644); err != nil {
				t.Fatal(err)
			}
			a, err := openFile(t, file, "amd64")
			if tt.want != "" {
				if err == nil {
					t.Fatalf("no error; names %v", a.names)
				}
				if !strings.Contains(err.Error(), tt.want) || !strings.HasPrefix(err.Error(), file+": ") {
					t.Fatalf("error %q, want one that begins with the file and has %q", err, tt.want)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			if got := strings.Join(a.names, " "); got != tt.names {
				t.Errorf("names %s, want %s", got, tt.names)
			}
		})
	}

	dir := t.TempDir()
	if _, err := openFile(t, dir, "amd64"); err == nil || !strings.Contains(err.Error(), "it is a directory") {
		t.Errorf("a directory: error %v", err)
	}
	if _, err := openFile(t, filepath.Join(dir, "none"), "amd64"); err == nil || !strings.Contains(err.Error(), "no such file") {
		t.Errorf("a missing file: error %v", err)
	}
}

// What is sent to a node has the full name in its index and is otherwise the same.
func TestRename(t *testing.T) {
	data := ociArchive(t, map[string]string{refNameAnnotation: "nginx:1", "other": "stays"}, testImage(t, "amd64", "x"))
	file := filepath.Join(t.TempDir(), "image.tar")
	if err := os.WriteFile(file, compress(t, data), 0o644); err != nil {
		t.Fatal(err)
	}
	a, err := openFile(t, file, "amd64")
	if err != nil {
		t.Fatal(err)
	}
	in, err := a.open()
	if err != nil {
		t.Fatal(err)
	}
	defer in.Close()
	var out bytes.Buffer
	if err := a.rename(&out, in); err != nil {
		t.Fatal(err)
	}
	c, err := readContents(&out)
	if err != nil {
		t.Fatal(err)
	}
	var index v1.IndexManifest
	if err := c.document("index.json", &index); err != nil {
		t.Fatal(err)
	}
	got := index.Manifests[0].Annotations
	if got[imageNameAnnotation] != "docker.io/library/nginx:1" || got["other"] != "stays" {
		t.Errorf("annotations %v", got)
	}
	if err := (&archive{source: source{name: file}}).check(c, "amd64"); err != nil {
		t.Error(err)
	}
}

// An archive that lists several machines' images needs to hold only this machine's.
func TestArchiveOfSeveralPlatforms(t *testing.T) {
	mine, other := testImage(t, "amd64", "mine"), testImage(t, "arm64", "other")
	index := mutate.AppendManifests(empty.Index,
		mutate.IndexAddendum{Add: mine, Descriptor: v1.Descriptor{Platform: &v1.Platform{OS: "linux", Architecture: "amd64"}}},
		mutate.IndexAddendum{Add: other, Descriptor: v1.Descriptor{Platform: &v1.Platform{OS: "linux", Architecture: "arm64"}}},
	)
	dir := t.TempDir()
	out, err := layout.Write(dir, empty.Index)
	if err != nil {
		t.Fatal(err)
	}
	if err := out.AppendIndex(index, layout.WithAnnotations(map[string]string{refNameAnnotation: "a:1"})); err != nil {
		t.Fatal(err)
	}
	var buffer bytes.Buffer
	if err := writeArchive(&buffer, dir, nil); err != nil {
		t.Fatal(err)
	}
	digest, err := other.Digest()
	if err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(t.TempDir(), "image.tar")
	if err := os.WriteFile(file, edit(t, buffer.Bytes(), digest.Hex, func([]byte) []byte { return nil }), 0o644); err != nil {
		t.Fatal(err)
	}
	a, err := openFile(t, file, "amd64")
	if err != nil || !slices.Equal(a.names, []string{"docker.io/library/a:1"}) {
		t.Errorf("for amd64: %+v, %v", a, err)
	}
	if _, err := openFile(t, file, "arm64"); err == nil || !strings.Contains(err.Error(), "is missing") {
		t.Errorf("for arm64: error %v, want that it is missing", err)
	}
	if _, err := openFile(t, file, "s390x"); err == nil || !strings.Contains(err.Error(), "linux/amd64, linux/arm64") {
		t.Errorf("for s390x: error %v, want the platforms there are", err)
	}
}

// Names compress to nothing and are kept in memory: they are bounded singly and together.
func TestNamesAreBounded(t *testing.T) {
	read := func(entries int, header tar.Header) (*contents, error) {
		t.Helper()
		r, w := io.Pipe()
		defer r.Close()
		go func() {
			tw := tar.NewWriter(w)
			for range entries {
				if tw.WriteHeader(&header) != nil {
					return // the reader has seen enough
				}
			}
			w.CloseWithError(tw.Close())
		}()
		return readContents(r)
	}
	long := func(n int) string { return strings.Repeat("x", n) }
	fits := tar.Header{Typeflag: tar.TypeSymlink, Name: long(maxName), Linkname: long(maxName)}
	c, err := read(3, fits)
	if err != nil || c.names != 3*2*maxName {
		t.Fatalf("names that fit: %v, and %d bytes are counted", err, c.names)
	}
	for name, header := range map[string]tar.Header{
		"a symlink's target":   {Typeflag: tar.TypeSymlink, Name: "x", Linkname: long(maxName + 1)},
		"a hard link's target": {Typeflag: tar.TypeLink, Name: "x", Linkname: long(maxName + 1)},
		"a file's name":        {Typeflag: tar.TypeReg, Name: long(maxName + 1)},
		"a directory's name":   {Typeflag: tar.TypeDir, Name: long(maxName + 1)},
	} {
		if c, err := read(1, header); err == nil || !strings.Contains(err.Error(), "4097 bytes") || len(err.Error()) > 200 {
			t.Errorf("%s: %v, %v", name, c, err)
		}
	}
	if c, err := read(maxNames/(2*maxName)+1, fits); err == nil || !strings.Contains(err.Error(), "16777216 bytes") {
		t.Errorf("too much in all: %v, %v", c, err)
	}
}

func FuzzOpenArchive(f *testing.F) {
	image := testImage(f, "amd64", "text")
	docker := dockerArchive(f, "nginx:1", image)
	oci := ociArchive(f, map[string]string{refNameAnnotation: "nginx:1"}, image)
	for _, seed := range [][]byte{docker, oci, compress(f, docker), compress(f, oci), squeeze(f, formatZstd, oci), squeeze(f, formatXz, oci), docker[:700], []byte("PK\x03\x04"), []byte("text"), nil} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		detect(data)
		file := filepath.Join(t.TempDir(), "image.tar")
		if err := os.WriteFile(file, data, 0o644); err != nil {
			t.Fatal(err)
		}
		a, err := openFile(t, file, "amd64")
		if (a == nil) == (err == nil) {
			t.Fatalf("archive %+v and error %v: want exactly one", a, err)
		}
		if err == nil && len(a.names) == 0 {
			t.Fatal("accepted, but without a name")
		}
	})
}

// TestSkips has archives with more in them than images for this machine: the rest is skipped, and said, and nodes do not
// get it.
func TestSkips(t *testing.T) {
	mine, other := testImage(t, "amd64", "mine"), testImage(t, "arm64", "other")
	digest, err := mine.Digest()
	if err != nil {
		t.Fatal(err)
	}
	// As cosign makes them: an image's configuration, and a layer that is none.
	signature, err := mutate.Append(empty.Image, mutate.Addendum{Layer: static.NewLayer([]byte("{}"), "application/vnd.dev.cosign.simplesigning.v1+json")})
	if err != nil {
		t.Fatal(err)
	}
	named := func(name string) layout.Option {
		return layout.WithAnnotations(map[string]string{refNameAnnotation: name})
	}
	type part struct {
		image   v1.Image
		options []layout.Option
	}
	oci := func(parts ...part) []byte {
		dir := t.TempDir()
		out, err := layout.Write(dir, empty.Index)
		if err != nil {
			t.Fatal(err)
		}
		for _, p := range parts {
			if err := out.AppendImage(p.image, p.options...); err != nil {
				t.Fatal(err)
			}
		}
		var buffer bytes.Buffer
		if err := writeArchive(&buffer, dir, nil); err != nil {
			t.Fatal(err)
		}
		return buffer.Bytes()
	}
	docker := func(images map[string]v1.Image) []byte {
		refs := map[name.Tag]v1.Image{}
		for tag, image := range images {
			ref, err := name.NewTag(tag)
			if err != nil {
				t.Fatal(err)
			}
			refs[ref] = image
		}
		var buffer bytes.Buffer
		if err := tarball.MultiWrite(refs, &buffer); err != nil {
			t.Fatal(err)
		}
		return buffer.Bytes()
	}
	attestation := layout.WithAnnotations(map[string]string{"vnd.docker.reference.type": "attestation-manifest"})
	for what, tt := range map[string]struct {
		data           []byte
		names, skipped string
		err            string
	}{
		"two machines' side by side": {data: oci(part{other, []layout.Option{named("a:1")}}, part{mine, []layout.Option{named("a:1")}}),
			names: "docker.io/library/a:1", skipped: "a:1 is for linux/arm64"},
		"a signature": {data: oci(part{mine, []layout.Option{named("a:1")}}, part{signature, []layout.Option{named("a:sha256-1.sig")}}),
			names: "docker.io/library/a:1", skipped: `a:sha256-1.sig is not an image, but has "application/vnd.dev.cosign.simplesigning.v1+json" as a layer`},
		"an attestation": {data: oci(part{mine, []layout.Option{named("a:1")}}, part{other, []layout.Option{attestation}}),
			names: "docker.io/library/a:1", skipped: `is not an image, but of the type "attestation-manifest"`},
		"one without a name": {data: oci(part{testImage(t, "amd64", "x"), nil}, part{mine, []layout.Option{named("a:1")}}),
			names: "docker.io/library/a:1", skipped: "has no name"},
		"a name by digest":         {data: oci(part{mine, []layout.Option{named("a@" + digest.String())}}), names: "docker.io/library/a@" + digest.String()},
		"a name by another digest": {data: oci(part{mine, []layout.Option{named("a@sha256:" + strings.Repeat("0", 64))}}), err: "and the image's digest is " + digest.String()},
		"a signature alone":        {data: oci(part{signature, []layout.Option{named("a:sig")}}), err: "there is no image in it: a:sig is not an image"},
		"docker, two machines'": {data: docker(map[string]v1.Image{"a:1": mine, "b:1": other}),
			names: "docker.io/library/a:1", skipped: "docker.io/library/b:1 is for linux/arm64"},
	} {
		file := filepath.Join(t.TempDir(), "image.tar")
		if err := os.WriteFile(file, tt.data, 0o644); err != nil {
			t.Fatal(err)
		}
		a, err := openFile(t, file, "amd64")
		if tt.err != "" || err != nil {
			if err == nil || tt.err == "" || !strings.Contains(err.Error(), tt.err) {
				t.Errorf("%s: error %v, want %q", what, err, tt.err)
			}
			continue
		}
		if got := strings.Join(a.names, " "); got != tt.names {
			t.Errorf("%s: names %s, want %s", what, got, tt.names)
		}
		if got := strings.Join(a.skipped, "; "); !strings.HasSuffix(got, tt.skipped) || (got == "") != (tt.skipped == "") {
			t.Errorf("%s: skipped %q, want %q", what, got, tt.skipped)
		}
		// What a node gets is an archive of which nothing is skipped.
		var sent bytes.Buffer
		if err := a.rename(&sent, bytes.NewReader(tt.data)); err != nil {
			t.Fatal(err)
		}
		c, err := readContents(&sent)
		if err != nil {
			t.Fatal(err)
		}
		node := &archive{source: source{name: file}}
		if err := node.check(c, "amd64"); err != nil || len(node.skipped) > 0 || !slices.Equal(node.names, a.names) {
			t.Errorf("%s: a node gets %v, skips %v, error %v", what, node.names, node.skipped, err)
		}
	}
}
