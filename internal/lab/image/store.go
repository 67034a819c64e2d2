package image

import (
	"archive/tar"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"golang.org/x/sys/unix"

	"github.com/fathom-network/fathom/internal/durable"
	"github.com/fathom-network/fathom/internal/kit"
)

// storeSchema is incremented when the same images result in other templates.
const storeSchema = 1

// A Store is a template for each node's /var/lib/containerd: a root directory of containerd with all local images imported
// and unpacked.
type Store struct {
	root string
	// held is the lock that keeps a fathom with other images from removing the template.
	held *os.File
}

// Root is the template's directory. It must not be modified or used by a containerd.
func (s Store) Root() string { return s.root }

// Close releases the template. Nodes that were cloned from it no longer need it.
func (s Store) Close() error { return s.held.Close() }

// Prepare returns the template for the kit's images, and makes it if it does not exist. Templates are in the directory
// images of stateDir, under a key of the images and containerd's version: a new kit gets a new template. Old templates are
// removed when no fathom holds them.
//
// Prepare may be killed at any point: the next call starts again and cleans up.
func Prepare(ctx context.Context, k kit.Kit, stateDir string, progress func(string)) (Store, error) {
	s, err := prepare(ctx, k, stateDir, progress)
	if err != nil {
		return Store{}, fmt.Errorf("prepare the nodes' images: %w", err)
	}
	return s, nil
}

func prepare(ctx context.Context, k kit.Kit, stateDir string, progress func(string)) (Store, error) {
	if progress == nil {
		progress = func(string) {}
	}
	index, err := os.ReadFile(filepath.Join(k.ImagesDir(), "index.json"))
	if errors.Is(err, os.ErrNotExist) {
		return Store{}, fmt.Errorf("the kit in %s has no images; build them with `fathom image build`", k.Dir)
	}
	if err != nil {
		return Store{}, err
	}
	var manifest v1.IndexManifest
	if err := json.Unmarshal(index, &manifest); err != nil {
		return Store{}, fmt.Errorf("read %s/index.json: %w; build the images again with `fathom image build`", k.ImagesDir(), err)
	}
	digest := sha256.Sum256(fmt.Appendf(index, "\n%s %s %d", k.Containerd, k.PauseImage, storeSchema))
	key := hex.EncodeToString(digest[:8])

	dir := filepath.Join(stateDir, "images")
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return Store{}, err
	}
	unlock, err := lock(ctx, filepath.Join(dir, "lock"))
	if err != nil {
		return Store{}, err
	}
	defer unlock()
	sweep(dir, key)

	at := filepath.Join(dir, key)
	if held, err := hold(at, unix.LOCK_SH); err == nil {
		if isWhole(filepath.Join(at, "root"), at) {
			return Store{root: filepath.Join(at, "root"), held: held}, nil
		}
		held.Close()
	}
	if _, err := os.Lstat(at); err == nil {
		progress("the nodes' images in " + at + " are damaged; making them again")
		if err := discard(at, filepath.Join(dir, ".new-damaged")); err != nil {
			return Store{}, err
		}
	}
	progress("preparing the nodes' images, once for this kit")
	started := time.Now()
	temp, err := os.MkdirTemp(dir, ".new-")
	if err != nil {
		return Store{}, err
	}
	defer os.RemoveAll(temp)
	if err := fill(ctx, k, temp, manifest); err != nil {
		return Store{}, err
	}
	if err := durable.Rename(temp, at); err != nil {
		return Store{}, err
	}
	held, err := hold(at, unix.LOCK_SH)
	if err != nil {
		return Store{}, err
	}
	progress(fmt.Sprintf("prepared the nodes' images in %s", time.Since(started).Round(10*time.Millisecond)))
	return Store{root: filepath.Join(at, "root"), held: held}, nil
}

// hold takes a lock on a template without waiting.
func hold(at string, how int) (*os.File, error) {
	f, err := os.Open(filepath.Join(at, "lock"))
	if err != nil {
		return nil, err
	}
	if err := unix.Flock(int(f.Fd()), how|unix.LOCK_NB); err != nil {
		f.Close()
		return nil, fmt.Errorf("lock %s: %w", f.Name(), err)
	}
	return f, nil
}

// sweep removes what a killed Prepare left, and templates other than key that no fathom holds. The caller holds the lock,
// so none of these is being made. What cannot be removed now is tried again the next time.
func sweep(dir, key string) {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return
	}
	for _, entry := range entries {
		at := filepath.Join(dir, entry.Name())
		switch {
		case !entry.IsDir() || entry.Name() == key:
		case strings.HasPrefix(entry.Name(), ".new-"):
			os.RemoveAll(at)
		default:
			held, err := hold(at, unix.LOCK_EX)
			if err != nil {
				continue // another fathom is about to clone it, or it is not ours
			}
			os.RemoveAll(at)
			held.Close()
		}
	}
}

// fill makes a complete template in the empty directory temp.
func fill(ctx context.Context, k kit.Kit, temp string, manifest v1.IndexManifest) error {
	root := filepath.Join(temp, "root")
	if err := os.Mkdir(root, 0o711); err != nil {
		return err
	}
	if err := os.Chmod(temp, 0o755); err != nil {
		return err
	}
	layers, err := placeLayers(root, k.ImagesDir())
	if err != nil {
		return err
	}
	log := filepath.Join(temp, "containerd.log")
	d, err := startDaemon(ctx, k, root, log, "")
	if err != nil {
		return err
	}
	defer func() { _ = d.stop() }()

	for _, l := range layers {
		if err := announce(ctx, k, d.socket(), l); err != nil {
			return err
		}
	}
	reader, writer := io.Pipe()
	go func() { writer.CloseWithError(writeArchive(writer, k.ImagesDir(), layers)) }()
	err = importArchive(ctx, k, d.socket(), reader)
	reader.Close() // otherwise the writer blocks for ever if the reader has failed
	if err != nil {
		return fmt.Errorf("%w; containerd said:\n%s", err, tail(log))
	}
	if err := checkImages(ctx, d.socket(), k.PauseImage, manifest); err != nil {
		return err
	}
	if err := d.stop(); err != nil {
		return err
	}

	// Files that must differ between nodes, or that nodes do not need.
	for _, name := range []string{"io.containerd.grpc.v1.introspection", "tmpmounts"} {
		if err := os.RemoveAll(filepath.Join(root, name)); err != nil {
			return err
		}
	}
	if err := os.Remove(log); err != nil {
		return err
	}
	f, err := os.Create(filepath.Join(temp, "lock"))
	if err != nil {
		return err
	}
	if err := f.Close(); err != nil {
		return err
	}
	return seal(root, temp)
}

// writeArchive writes an OCI image layout as a tar archive, the form that containerd imports, without the given blobs.
func writeArchive(w io.Writer, dir string, without []string) error {
	tw := tar.NewWriter(w)
	for _, name := range []string{"oci-layout", "index.json"} {
		if err := archiveFile(tw, dir, name); err != nil {
			return err
		}
	}
	blobs, err := os.ReadDir(filepath.Join(dir, "blobs", "sha256"))
	if err != nil {
		return err
	}
	for _, blob := range blobs {
		if slices.Contains(without, filepath.Join(dir, "blobs", "sha256", blob.Name())) {
			continue
		}
		if err := archiveFile(tw, dir, "blobs/sha256/"+blob.Name()); err != nil {
			return err
		}
	}
	return tw.Close()
}

func archiveFile(tw *tar.Writer, dir, name string) error {
	f, err := os.Open(filepath.Join(dir, name))
	if err != nil {
		return err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return err
	}
	if err := tw.WriteHeader(&tar.Header{Name: name, Size: info.Size(), Mode: 0o644, Typeflag: tar.TypeReg}); err != nil {
		return err
	}
	_, err = io.Copy(tw, f)
	return err
}

// checkImages returns when CRI knows all images and has pinned the pause image. By then it has also added the names by
// digest that kubelet asks for, so that a node's containerd has nothing left to do at its start.
func checkImages(ctx context.Context, socket, pause string, manifest v1.IndexManifest) error {
	var names []string
	for _, m := range manifest.Manifests {
		names = append(names, m.Annotations[imageNameAnnotation])
	}
	if err := waitFor(ctx, socket, names); err != nil {
		return err
	}
	images, err := List(ctx, Target{Name: "of the template", SocketPath: socket})
	if err != nil {
		return err
	}
	for _, image := range images {
		if slices.Contains(image.Names, pause) && image.Pinned {
			return nil
		}
	}
	return fmt.Errorf("containerd's CRI plugin did not pin %s: is that the pause image of the kit's containerd?", pause)
}

// contentDir is where containerd's root directory has the blobs.
const contentDir = "io.containerd.content.v1.content/blobs/sha256"

// placeLayers puts the layout's layers where a containerd that starts later finds them, and returns their files in the
// layout. They are hard links, which cost neither time nor space; on another file system they are copies. Rejected: sending
// them through containerd's socket, which took 9 s instead of 3 (a sync for each, and gRPC in small pieces). Rejected:
// dropping the blobs of unpacked layers, which containerd can do too: that saves the space, but then an image can be
// neither pushed nor exported from a node.
func placeLayers(root, images string) ([]string, error) {
	if err := os.MkdirAll(filepath.Join(root, contentDir), 0o755); err != nil {
		return nil, err
	}
	blobs, err := os.ReadDir(filepath.Join(images, "blobs", "sha256"))
	if err != nil {
		return nil, err
	}
	var layers []string
	for _, blob := range blobs {
		info, err := blob.Info()
		if err != nil {
			return nil, err
		}
		if info.Size() < 1<<16 {
			continue // a manifest or a configuration
		}
		from, to := filepath.Join(images, "blobs", "sha256", blob.Name()), filepath.Join(root, contentDir, blob.Name())
		err = os.Link(from, to)
		if errors.Is(err, unix.EXDEV) || errors.Is(err, unix.EMLINK) || errors.Is(err, unix.EPERM) {
			err = copyFile(from, to)
		}
		if err != nil {
			return nil, err
		}
		layers = append(layers, from)
	}
	return layers, nil
}

// announce registers a blob that is already in the content store's directory with containerd, which then takes it as
// received and does not read it.
func announce(ctx context.Context, k kit.Kit, socket, blob string) error {
	in, err := os.Open(blob)
	if err != nil {
		return err
	}
	defer in.Close()
	info, err := in.Stat()
	if err != nil {
		return err
	}
	digest := filepath.Base(blob)
	return ctr(ctx, k, socket, in, "content", "ingest",
		"--expected-size", strconv.FormatInt(info.Size(), 10), "--expected-digest", "sha256:"+digest, "layer-"+digest)
}
