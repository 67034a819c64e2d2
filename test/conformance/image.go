package main

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"strings"

	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
)

// extraImages are images that no lab needs but one spec does: each is one program of the kit. Which other images
// upstream's specs of networking want is with the images that every node has.
var extraImages = []struct{ program, wantedBy string }{
	{"regression-issue-74839", "invalid conntrack state bug"},
}

// load loads the extra images that the specs want into the nodes.
func (l *lab) load(ctx context.Context, s suite, specs []string) error {
	for _, extra := range extraImages {
		wanted := false
		for _, spec := range specs {
			wanted = wanted || strings.Contains(spec, extra.wantedBy)
		}
		if !wanted {
			continue
		}
		ref, err := s.image(ctx, extra.program)
		if err != nil {
			return err
		}
		file := filepath.Join(l.dir, extra.program+".tar")
		if err := writeImage(file, ref, filepath.Join(l.kit, "test", extra.program)); err != nil {
			return fmt.Errorf("make image %s: %w", ref, err)
		}
		if err := errors.Join(l.run(ctx, "image", "load", "--name", l.name, file), os.Remove(file)); err != nil {
			return err
		}
	}
	return nil
}

// writeImage writes an archive, as `docker save` does, of an image that consists of one static program.
func writeImage(file, ref, program string) error {
	tag, err := name.NewTag(ref)
	if err != nil {
		return err
	}
	data, err := os.ReadFile(program)
	if err != nil {
		return fmt.Errorf("%w: build it with `make kit-e2e`", err)
	}
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	base := filepath.Base(program)
	if err := w.WriteHeader(&tar.Header{Name: base, Mode: 0o755, Size: int64(len(data))}); err != nil {
		return err
	}
	if _, err := w.Write(data); err != nil {
		return err
	}
	if err := w.Close(); err != nil {
		return err
	}
	layer, err := tarball.LayerFromOpener(func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(b.Bytes())), nil })
	if err != nil {
		return err
	}
	img, err := mutate.AppendLayers(empty.Image, layer)
	if err != nil {
		return err
	}
	config, err := img.ConfigFile()
	if err != nil {
		return err
	}
	config = config.DeepCopy()
	config.OS, config.Architecture = "linux", runtime.GOARCH
	config.Config.Entrypoint = []string{"/" + base}
	if img, err = mutate.ConfigFile(img, config); err != nil {
		return err
	}
	return tarball.WriteToFile(file, tag, img)
}
