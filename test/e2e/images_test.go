package e2e

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"errors"
	"io"
	"io/fs"
	"log"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"runtime"
	"strings"

	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/registry"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
	"github.com/klauspost/compress/zstd"
	"github.com/rogpeppe/go-internal/testscript"
	"github.com/ulikunitz/xz"
)

func init() {
	commands["save-image"] = cmdSaveImage
	commands["registry"] = cmdRegistry
}

// makeImage makes an image that tells its name when it runs, from the host's static busybox.
func makeImage(ref string) (v1.Image, error) {
	busybox, err := os.ReadFile("/bin/busybox")
	if err != nil {
		return nil, err
	}
	layer, err := tarball.LayerFromOpener(func() (io.ReadCloser, error) {
		var b bytes.Buffer
		w := tar.NewWriter(&b)
		for _, file := range []struct {
			path string
			data []byte
		}{{"bin/busybox", busybox}, {"name", []byte("this is " + ref + "\n")}} {
			if err := w.WriteHeader(&tar.Header{Name: file.path, Mode: 0o755, Size: int64(len(file.data))}); err != nil {
				return nil, err
			}
			if _, err := w.Write(file.data); err != nil {
				return nil, err
			}
		}
		if err := w.Close(); err != nil {
			return nil, err
		}
		return io.NopCloser(&b), nil
	})
	if err != nil {
		return nil, err
	}
	img, err := mutate.AppendLayers(empty.Image, layer)
	if err != nil {
		return nil, err
	}
	conf, err := img.ConfigFile()
	if err != nil {
		return nil, err
	}
	conf = conf.DeepCopy()
	conf.OS, conf.Architecture = "linux", runtime.GOARCH
	conf.Config.Cmd = []string{"/bin/busybox", "sh", "-c", "busybox cat /name; exec busybox sleep 1000000"}
	conf.Config.Env = []string{"PATH=/bin"}
	return mutate.ConfigFile(img, conf)
}

// cmdSaveImage writes an image into a tar file, as other programs do.
func cmdSaveImage(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) != 3 {
		ts.Fatalf("usage: save-image docker|oci[.gz|.zst|.xz] IMAGE FILE")
	}
	ref, err := name.NewTag(args[1])
	ts.Check(err)
	img, err := makeImage(args[1])
	ts.Check(err)
	var b bytes.Buffer
	kind, packing, _ := strings.Cut(args[0], ".")
	switch kind {
	case "docker":
		err = tarball.Write(ref, img, &b)
	case "oci":
		err = writeLayout(&b, img, args[1])
	default:
		err = errors.New("unknown format " + kind)
	}
	ts.Check(err)
	data := b.Bytes()
	if packing != "" {
		var z bytes.Buffer
		var w io.WriteCloser
		switch packing {
		case "gz":
			w = gzip.NewWriter(&z)
		case "zst":
			w, err = zstd.NewWriter(&z)
		case "xz":
			w, err = xz.NewWriter(&z)
		default:
			err = errors.New("unknown compression " + packing)
		}
		ts.Check(err)
		_, err = w.Write(data)
		ts.Check(err)
		ts.Check(w.Close())
		data = z.Bytes()
	}
	ts.Check(os.WriteFile(ts.MkAbs(args[2]), data, 0o644))
}

func writeLayout(w io.Writer, img v1.Image, ref string) error {
	dir, err := os.MkdirTemp("", "layout")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	l, err := layout.Write(dir, empty.Index)
	if err != nil {
		return err
	}
	err = l.AppendImage(img, layout.WithAnnotations(map[string]string{"org.opencontainers.image.ref.name": ref}))
	if err != nil {
		return err
	}
	tw := tar.NewWriter(w)
	err = filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		data, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		name, err := filepath.Rel(dir, path)
		if err != nil {
			return err
		}
		if err := tw.WriteHeader(&tar.Header{Name: name, Mode: 0o644, Size: int64(len(data))}); err != nil {
			return err
		}
		_, err = tw.Write(data)
		return err
	})
	if err != nil {
		return err
	}
	return tw.Close()
}

// cmdRegistry serves a registry with one image, or with those of an OCI image layout below a path, on an address of the host until
// the scenario ends. It sets $REGISTRY to where.
func cmdRegistry(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) < 2 || len(args) > 3 {
		ts.Fatalf("usage: registry ADDRESS IMAGE | registry ADDRESS PATH LAYOUT")
	}
	l, err := net.Listen("tcp", net.JoinHostPort(args[0], "0"))
	ts.Check(err)
	server := &http.Server{Handler: registry.New(registry.Logger(log.New(io.Discard, "", 0)))}
	go func() { _ = server.Serve(l) }()
	s := sessionOf(ts)
	s.closer = append(s.closer, func() { _ = server.Close() })
	at := l.Addr().String() + "/" + args[1]
	if len(args) == 3 {
		ts.Check(pushLayout(at, ts.MkAbs(args[2])))
	} else {
		ref, err := name.ParseReference(at, name.Insecure)
		ts.Check(err)
		img, err := makeImage(args[1])
		ts.Check(err)
		ts.Check(remote.Write(ref, img))
	}
	ts.Setenv("REGISTRY", l.Addr().String())
}

// pushLayout pushes each image of a layout, an index of architectures, to a registry as PATH/NAME:pushed.
func pushLayout(path, dir string) error {
	root, err := layout.ImageIndexFromPath(dir)
	if err != nil {
		return err
	}
	manifest, err := root.IndexManifest()
	if err != nil {
		return err
	}
	for _, m := range manifest.Manifests {
		index, err := root.ImageIndex(m.Digest)
		if err != nil {
			return err
		}
		ref, err := name.NewTag(path+"/"+m.Annotations["org.opencontainers.image.ref.name"]+":pushed", name.Insecure)
		if err != nil {
			return err
		}
		if err := remote.WriteIndex(ref, index); err != nil {
			return err
		}
	}
	return nil
}
