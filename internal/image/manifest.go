package image

import (
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"path/filepath"
	"slices"
	"strings"

	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
)

// checkLayout checks an archive that is an OCI image layout, which newer versions of docker save
// write too.
func (a *archive) checkLayout(c *contents, arch string) error {
	var index v1.IndexManifest
	if err := c.document("index.json", &index); err != nil {
		return err
	}
	if len(index.Manifests) == 0 {
		return errors.New("it is an OCI layout without an image: index.json lists none")
	}
	for i, d := range index.Manifests {
		full, err := layoutName(d.Annotations, a.path)
		if err != nil {
			return err
		}
		found, others, err := c.checkDescriptor(d, arch, 0)
		if err != nil {
			return fmt.Errorf("image %s: %w", full, err)
		}
		if !found {
			return notFor(full, others, arch)
		}
		annotations := maps.Clone(d.Annotations)
		if annotations == nil {
			annotations = map[string]string{}
		}
		annotations[imageNameAnnotation] = full
		annotations[refNameAnnotation] = full
		index.Manifests[i].Annotations = annotations
		a.add(full)
	}
	var err error
	a.index, err = json.Marshal(index)
	return err
}

// add notes a name, once.
func (a *archive) add(full string) {
	if !slices.Contains(a.names, full) {
		a.names = append(a.names, full)
	}
}

// notFor says that an image is for other machines.
func notFor(full string, others []string, arch string) error {
	return fmt.Errorf("image %s is for %s, and this machine is linux/%s; pull it with `--platform linux/%s` before saving it",
		full, strings.Join(others, ", "), arch, arch)
}

// checkDescriptor checks an image or an index of images for several platforms: that the one for this
// machine is whole. Others may lack their parts, as most tools save only what they run.
func (c *contents) checkDescriptor(d v1.Descriptor, arch string, depth int) (found bool, others []string, err error) {
	if depth > 3 {
		return false, nil, errors.New("its index is nested too deep")
	}
	if d.Platform != nil && (d.Platform.OS != "linux" || d.Platform.Architecture != arch) {
		return false, []string{d.Platform.OS + "/" + d.Platform.Architecture}, nil
	}
	if err := c.checkBlob(d); err != nil {
		return false, nil, err
	}
	if d.MediaType.IsIndex() {
		var index v1.IndexManifest
		if err := c.document(blobPath(d.Digest), &index); err != nil {
			return false, nil, err
		}
		for _, d := range index.Manifests {
			ok, more, err := c.checkDescriptor(d, arch, depth+1)
			if err != nil {
				return false, nil, err
			}
			found = found || ok
			others = append(others, more...)
		}
		return found, others, nil
	}
	if !d.MediaType.IsImage() {
		return false, []string{fmt.Sprintf("no machine (%s)", d.MediaType)}, nil
	}
	var manifest v1.Manifest
	if err := c.document(blobPath(d.Digest), &manifest); err != nil {
		return false, nil, err
	}
	if err := c.checkBlob(manifest.Config); err != nil {
		return false, nil, err
	}
	var config v1.ConfigFile
	if err := c.document(blobPath(manifest.Config.Digest), &config); err != nil {
		return false, nil, err
	}
	if config.OS != "linux" || config.Architecture != arch {
		return false, []string{config.OS + "/" + config.Architecture}, nil
	}
	for _, layer := range manifest.Layers {
		if err := c.checkBlob(layer); err != nil {
			return false, nil, err
		}
	}
	return true, nil, nil
}

// checkBlob checks that what a descriptor refers to is there and unharmed.
func (c *contents) checkBlob(d v1.Descriptor) error {
	b, ok := c.blobs[c.resolve(blobPath(d.Digest))]
	switch {
	case !ok:
		return fmt.Errorf("%s is missing: the archive was cut short, or not saved whole", blobPath(d.Digest))
	case b.size != d.Size:
		return fmt.Errorf("%s has %d bytes and should have %d: the archive is damaged", blobPath(d.Digest), b.size, d.Size)
	case d.Digest.Algorithm == "sha256" && b.digest != d.Digest.String():
		return fmt.Errorf("%s has another digest than its name says: the archive is damaged", blobPath(d.Digest))
	}
	return nil
}

func blobPath(digest v1.Hash) string { return "blobs/" + digest.Algorithm + "/" + digest.Hex }

// layoutName returns the full name that an image of an OCI layout has.
func layoutName(annotations map[string]string, file string) (string, error) {
	text := annotations[imageNameAnnotation]
	if text == "" {
		text = annotations[refNameAnnotation]
		// The specification leaves open whether this is a name or only a tag. A bare word is the tag:
		// then the file's name stands for the image's.
		if text != "" && !strings.ContainsAny(text, "/:") {
			base := filepath.Base(file)
			for _, suffix := range []string{".gz", ".tgz", ".tar", ".oci"} {
				base = strings.TrimSuffix(base, suffix)
			}
			text = base + ":" + text
		}
	}
	if text == "" {
		return "", errors.New("it does not name its image; save it with a name: `docker save NAME:TAG`, or `skopeo copy ... oci-archive:FILE:NAME:TAG`")
	}
	return fullName(text)
}

// fullName returns an image's name as CRI knows it: nginx:1 is docker.io/library/nginx:1.
func fullName(text string) (string, error) {
	tag, err := name.NewTag(text)
	if err != nil {
		return "", fmt.Errorf("it names an image %q, which is not a name with a tag: %w", text, err)
	}
	full := tag.Name()
	if rest, ok := strings.CutPrefix(full, name.DefaultRegistry+"/"); ok {
		full = "docker.io/" + rest // the library uses the name of the registry's machine
	}
	return full, nil
}

// checkDocker checks an archive in the format that docker save wrote up to version 24.
func (a *archive) checkDocker(c *contents, arch string) error {
	var images []struct {
		Config   string
		RepoTags []string
		Layers   []string
	}
	if err := c.document("manifest.json", &images); err != nil {
		return err
	}
	if len(images) == 0 {
		return errors.New("manifest.json in it lists no image")
	}
	for _, image := range images {
		if len(image.RepoTags) == 0 {
			return errors.New("it does not name its image; save it by its name, not by its ID: `docker save NAME:TAG`")
		}
		var full string
		for _, tag := range image.RepoTags {
			var err error
			if full, err = fullName(tag); err != nil {
				return err
			}
			a.add(full)
		}
		if _, ok := c.blobs[c.resolve(image.Config)]; !ok {
			return fmt.Errorf("image %s: %s is missing: the archive was cut short, or not saved whole", full, image.Config)
		}
		var config v1.ConfigFile
		if err := c.document(image.Config, &config); err != nil {
			return fmt.Errorf("image %s: %w", full, err)
		}
		if config.OS != "linux" || config.Architecture != arch {
			return notFor(full, []string{config.OS + "/" + config.Architecture}, arch)
		}
		if len(config.RootFS.DiffIDs) != len(image.Layers) {
			return fmt.Errorf("image %s: %d layers are listed in manifest.json and %d in %s: the archive is damaged", full, len(image.Layers), len(config.RootFS.DiffIDs), image.Config)
		}
		for i, path := range image.Layers {
			layer, ok := c.blobs[c.resolve(path)]
			if !ok {
				return fmt.Errorf("image %s: layer %s is missing: the archive was cut short, or not saved whole", full, path)
			}
			if !layer.gzip && layer.digest != config.RootFS.DiffIDs[i].String() {
				return fmt.Errorf("image %s: layer %s has another digest than %s says: the archive is damaged", full, path, image.Config)
			}
		}
	}
	return nil
}
