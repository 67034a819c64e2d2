// Package image builds container images from the programs of the kit and of this machine, and puts them where the nodes of
// a lab find them. It needs no registry, no container engine and no network.
//
// Build writes all images into one OCI image layout. Prepare unpacks that layout once, into a template of containerd's root
// directory. Store.Clone gives each node its own copy of hard links. Load imports further images from tar files.
package image

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"sort"
	"strings"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/types"
	"golang.org/x/sys/unix"

	"github.com/fathom-network/fathom/internal/facts/standin"
	"github.com/fathom-network/fathom/internal/kit"
)

// buildSchema is incremented when the same inputs result in other images.
const buildSchema = 3

// keyFile is the file in a layout that records what it was made from.
const keyFile = "inputs"

// distributionFile is the file in a layout that lists, one per line, the files of this machine's packages that are in the
// images. A package of images includes those as well, and states their licences (kit/bom).
const distributionFile = "distribution"

// Annotations by which importers know an image's name. The first is the specification's. The second is containerd's, which
// containerd prefers and takes literally.
const (
	refNameAnnotation   = "org.opencontainers.image.ref.name"
	imageNameAnnotation = "io.containerd.image.name"
)

// originLabel marks our images: they have upstream's names, because manifests and tests use those, but not upstream's
// bytes.
const originLabel = "network.fathom.image.origin"

// Build writes all local images into the kit's image directory, an OCI image layout. If they were built from the same
// programs already, it does nothing. It reports its steps to progress, which may be nil.
func Build(ctx context.Context, k kit.Kit, progress func(string)) error {
	if progress == nil {
		progress = func(string) {}
	}
	if err := checkTools(); err != nil {
		return err
	}
	box, err := findBusybox()
	if err != nil {
		return err
	}
	s, err := findServers(k)
	if err != nil {
		return err
	}
	layers, err := trees(k, box, s)
	if err != nil {
		return err
	}
	list := recipes(k, box, s)
	key, err := buildKey(list, layers)
	if err != nil {
		return fmt.Errorf("build images: %w", err)
	}

	dir := k.ImagesDir()
	current := func() bool {
		have, err := os.ReadFile(filepath.Join(dir, keyFile))
		return err == nil && string(have) == key+"\n" && isWhole(dir, dir)
	}
	if current() {
		progress("local images are up to date")
		return nil
	}
	unlock, err := lock(ctx, filepath.Join(k.Dir, ".images.lock"))
	if err != nil {
		return fmt.Errorf("build images: %w", err)
	}
	defer unlock()
	if current() {
		return nil // another process built them during the wait
	}
	stale, _ := filepath.Glob(filepath.Join(k.Dir, ".images-*"))
	for _, path := range stale {
		os.RemoveAll(path) // left by a build that was killed: we hold the lock
	}

	if s == nil {
		progress("no stand-ins for nginx, httpd, redis, python and echo servers: the kit has no packages for them")
	}
	started := time.Now()
	temp, err := os.MkdirTemp(k.Dir, ".images-")
	if err != nil {
		return fmt.Errorf("build images: %w", err)
	}
	defer os.RemoveAll(temp)
	if err := os.Chmod(temp, 0o755); err != nil {
		return fmt.Errorf("build images: %w", err)
	}
	if err := writeLayout(ctx, temp, list, layers, progress); err != nil {
		return fmt.Errorf("build images: %w", err)
	}
	if err := os.WriteFile(filepath.Join(temp, keyFile), []byte(key+"\n"), 0o644); err != nil {
		return fmt.Errorf("build images: %w", err)
	}
	if err := os.WriteFile(filepath.Join(temp, distributionFile), distribution(k, layers), 0o644); err != nil {
		return fmt.Errorf("build images: %w", err)
	}
	if err := seal(temp, temp); err != nil {
		return fmt.Errorf("build images: write them to the disk: %w", err)
	}
	if err := exchange(temp, dir); err != nil {
		return fmt.Errorf("build images: put the new ones in place: %w", err)
	}
	progress(fmt.Sprintf("built %d images in %s", len(list), time.Since(started).Round(10*time.Millisecond)))
	return nil
}

// writeLayout writes the images of the recipes into an empty directory.
func writeLayout(ctx context.Context, dir string, list []recipe, trees map[string]tree, progress func(string)) error {
	out, err := layout.Write(dir, empty.Index)
	if err != nil {
		return err
	}
	blobs := filepath.Join(dir, "blobs", "sha256")
	layers := map[string]v1.Layer{}
	for _, recipe := range list {
		if err := ctx.Err(); err != nil {
			return err
		}
		var of []namedLayer
		for _, name := range recipe.layers {
			l := layers[name]
			if l == nil {
				written, err := writeLayer(trees[name], blobs)
				if err != nil {
					return fmt.Errorf("write layer %s: %w", name, err)
				}
				progress(fmt.Sprintf("layer %s: %d MB", name, (written.size+500_000)/1_000_000))
				l = written
				layers[name] = l
			}
			of = append(of, namedLayer{name, l})
		}
		config := recipe.config
		if recipe.standIn != "" {
			config.Labels = map[string]string{standin.Label: recipe.standIn}
		}
		image, err := assemble(config, runtime.GOARCH, of)
		if err != nil {
			return err
		}
		if recipe.standIn != "" {
			image = mutate.Annotations(image, config.Labels).(v1.Image)
		}
		for _, name := range recipe.names {
			annotations := map[string]string{refNameAnnotation: name, imageNameAnnotation: name}
			err := out.AppendImage(image, layout.WithAnnotations(annotations), layout.WithPlatform(v1.Platform{OS: "linux", Architecture: runtime.GOARCH}))
			if err != nil {
				return fmt.Errorf("write image %s: %w", name, err)
			}
		}
	}
	return nil
}

// namedLayer is a layer with its name in the history of an image.
type namedLayer struct {
	name string
	v1.Layer
}

// assemble makes an image from layers. Equal layers and configurations give equal images.
func assemble(config v1.Config, arch string, layers []namedLayer) (v1.Image, error) {
	epoch := v1.Time{Time: time.Unix(0, 0).UTC()}
	var history []mutate.Addendum
	for _, l := range layers {
		history = append(history, mutate.Addendum{Layer: l.Layer, History: v1.History{CreatedBy: "fathom: " + l.name, Created: epoch}})
	}
	image, err := mutate.Append(mutate.ConfigMediaType(mutate.MediaType(empty.Image, types.OCIManifestSchema1), types.OCIConfigJSON), history...)
	if err != nil {
		return nil, err
	}
	file, err := image.ConfigFile()
	if err != nil {
		return nil, err
	}
	file = file.DeepCopy()
	file.Created = epoch
	file.OS, file.Architecture = "linux", arch
	file.Config = config
	file.Config.Labels = map[string]string{originLabel: "built by Fathom; not the bytes of the project whose name it bears"}
	maps.Copy(file.Config.Labels, config.Labels)
	return mutate.ConfigFile(image, file)
}

// distribution lists the trees' files that come from this machine rather than from the kit or Fathom.
func distribution(k kit.Kit, trees map[string]tree) []byte {
	files := map[string]bool{}
	for _, t := range trees {
		for _, f := range t {
			if f.Source != "" && !within(f.Source, k.Dir) && !within(f.Source, k.OwnDir) {
				files[f.Source] = true
			}
		}
	}
	var b bytes.Buffer
	for _, file := range slices.Sorted(maps.Keys(files)) {
		fmt.Fprintln(&b, file)
	}
	return b.Bytes()
}

// within reports whether a file is below a directory.
func within(file, dir string) bool {
	rel, err := filepath.Rel(dir, file)
	return err == nil && filepath.IsLocal(rel)
}

// buildKey returns a digest of everything that the images are made from.
func buildKey(list []recipe, trees map[string]tree) (string, error) {
	digest := sha256.New()
	fmt.Fprintln(digest, buildSchema, runtime.GOARCH)
	for _, recipe := range list {
		c := recipe.config
		ports := make([]string, 0, len(c.ExposedPorts))
		for port := range c.ExposedPorts {
			ports = append(ports, port)
		}
		sort.Strings(ports)
		fmt.Fprintf(digest, "%q %q %q %q %q %q %q %q\n", recipe.names, recipe.standIn, recipe.layers, c.Env, c.Entrypoint, c.Cmd, c.User, ports)
	}
	names := make([]string, 0, len(trees))
	for name := range trees {
		names = append(names, name)
	}
	sort.Strings(names)
	for _, name := range names {
		fmt.Fprintln(digest, strings.ToUpper(name))
		if err := trees[name].fingerprint(digest); err != nil {
			return "", err
		}
	}
	return hex.EncodeToString(digest.Sum(nil)), nil
}

// exchange replaces the directory old by new in one step, so that a reader sees one or the other, and removes the old one.
func exchange(new, old string) error {
	err := unix.Renameat2(unix.AT_FDCWD, new, unix.AT_FDCWD, old, unix.RENAME_EXCHANGE)
	if errors.Is(err, unix.ENOENT) {
		return os.Rename(new, old)
	}
	if err != nil {
		return fmt.Errorf("exchange %s and %s: %w", new, old, err)
	}
	return os.RemoveAll(new)
}

// lock takes an exclusive lock on a file, which it creates if needed, and returns the function that releases it. The kernel
// releases it when the process ends, however it ends, so a lock is never stale.
func lock(ctx context.Context, path string) (unlock func(), err error) {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR, 0o644)
	if err != nil {
		return nil, err
	}
	for {
		err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if err == nil {
			return func() { f.Close() }, nil
		}
		if !errors.Is(err, unix.EWOULDBLOCK) && !errors.Is(err, unix.EINTR) {
			f.Close()
			return nil, fmt.Errorf("lock %s: %w", path, err)
		}
		// Polling, so that the wait ends with the context: flock takes none.
		select {
		case <-ctx.Done():
			f.Close()
			return nil, fmt.Errorf("wait for the lock %s, which another fathom holds: %w", path, ctx.Err())
		case <-time.After(50 * time.Millisecond):
		}
	}
}
