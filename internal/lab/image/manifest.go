package image

import (
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"path/filepath"
	"slices"
	"strings"
	"unicode"

	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/types"
)

// checkLayout checks an archive that is an OCI image layout. Newer versions of docker save write those too.
func (a *archive) checkLayout(c *contents, arch string) error {
	var index v1.IndexManifest
	if err := c.document("index.json", &index); err != nil {
		return err
	}
	if len(index.Manifests) == 0 {
		return errors.New("it is an OCI layout without an image: index.json lists none")
	}
	var kept []v1.Descriptor
	var unusable error // why the first image cannot be used here
	for _, d := range index.Manifests {
		if why := c.noImage(d); why != "" {
			a.skip(label(d), why)
			continue
		}
		full, unnamed := layoutName(d, a.name)
		if unnamed != nil && !errors.Is(unnamed, errNoName) {
			return unnamed
		}
		found, others, err := c.checkDescriptor(d, arch, 0)
		switch {
		case err != nil:
			return fmt.Errorf("image %s: %w", label(d), err)
		case !found:
			unusable = cmp.Or(unusable, notFor(label(d), others, arch))
			a.skip(label(d), "is for "+strings.Join(others, ", "))
			continue
		case unnamed != nil:
			unusable = cmp.Or(unusable, unnamed)
			a.skip(label(d), "has no name")
			continue
		}
		annotations := maps.Clone(d.Annotations)
		if annotations == nil {
			annotations = map[string]string{}
		}
		annotations[imageNameAnnotation] = full
		annotations[refNameAnnotation] = full
		d.Annotations = annotations
		kept = append(kept, d)
		a.add(full)
	}
	if len(kept) == 0 {
		return cmp.Or(unusable, fmt.Errorf("there is no image in it: %s", strings.Join(a.skipped, "; ")))
	}
	index.Manifests = kept
	return a.replaceFile("index.json", index)
}

// replaceFile replaces a document of the archive in what nodes get.
func (a *archive) replaceFile(name string, document any) error {
	text, err := json.Marshal(document)
	a.replaced, a.replacement = name, text
	return err
}

// skip records content that is not loaded.
func (a *archive) skip(what, why string) { a.skipped = append(a.skipped, what+" "+why) }

// label returns the name of an entry of an index, whether or not that is an image's name.
func label(d v1.Descriptor) string {
	for _, key := range []string{imageNameAnnotation, refNameAnnotation} {
		if name := d.Annotations[key]; name != "" && len(name) < 300 && !strings.ContainsFunc(name, func(r rune) bool { return !unicode.IsPrint(r) }) {
			return name
		}
	}
	return d.Digest.String()
}

// noImage says why an entry of an index is not an image; empty if it is one. Signatures and attestations are stored beside
// the images that they refer to, as manifests.
func (c *contents) noImage(d v1.Descriptor) string {
	switch {
	case d.Annotations["vnd.docker.reference.type"] != "":
		return fmt.Sprintf("is not an image, but of the type %q", d.Annotations["vnd.docker.reference.type"])
	case d.ArtifactType != "" && !isConfig(d.ArtifactType): // some tools put the type of an image's configuration here
		return fmt.Sprintf("is not an image, but of the type %q", d.ArtifactType)
	case d.MediaType.IsIndex():
		return ""
	case !d.MediaType.IsImage():
		return fmt.Sprintf("is not an image, but of the type %q", d.MediaType)
	}
	var manifest struct {
		ArtifactType string
		Config       v1.Descriptor
		Layers       []v1.Descriptor
	}
	if c.document(blobPath(d.Digest), &manifest) != nil {
		return "" // reported where the manifest is needed
	}
	if manifest.ArtifactType != "" && !isConfig(manifest.ArtifactType) {
		return fmt.Sprintf("is not an image, but of the type %q", manifest.ArtifactType)
	}
	if t := string(manifest.Config.MediaType); !isConfig(t) {
		return fmt.Sprintf("is not an image, but of the type %q", t)
	}
	for _, layer := range manifest.Layers { // cosign's have the configuration of an image
		if !layer.MediaType.IsLayer() && !strings.HasPrefix(string(layer.MediaType), "application/vnd.oci.image.layer.") {
			return fmt.Sprintf("is not an image, but has %q as a layer", layer.MediaType)
		}
	}
	return ""
}

// add records a name once.
func (a *archive) add(full string) {
	if !slices.Contains(a.names, full) {
		a.names = append(a.names, full)
	}
}

// notFor is the error of an image that is for other machines.
func notFor(full string, others []string, arch string) error {
	return fmt.Errorf("image %s is for %s, and this machine is linux/%s; pull it with `--platform linux/%s` before saving it",
		full, strings.Join(others, ", "), arch, arch)
}

// checkDescriptor checks an image, or an index of images for several platforms: the one for this machine has to be
// complete. Others may be incomplete, since most tools save only the platform that they run.
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

// checkBlob checks that the blob of a descriptor is present and intact.
func (c *contents) checkBlob(d v1.Descriptor) error {
	b, ok := c.blobs[c.resolve(blobPath(d.Digest))]
	switch {
	case !ok:
		return fmt.Errorf("%s is missing: the archive was cut short, or not saved whole", blobPath(d.Digest))
	case b.size != d.Size:
		return fmt.Errorf("%s has %d bytes instead of %d: the archive is damaged", blobPath(d.Digest), b.size, d.Size)
	case d.Digest.Algorithm == "sha256" && b.digest != d.Digest.String():
		return fmt.Errorf("the digest of %s differs from its name: the archive is damaged", blobPath(d.Digest))
	}
	return nil
}

func blobPath(digest v1.Hash) string { return "blobs/" + digest.Algorithm + "/" + digest.Hex }

// isConfig reports whether a media type is that of an image's configuration.
func isConfig(t string) bool {
	return t == string(types.OCIConfigJSON) || t == string(types.DockerConfigJSON)
}

// errNoName says that an image has no name.
var errNoName = errors.New("it does not name its image; save it with a name: `docker save NAME:TAG`, or `skopeo copy ... oci-archive:FILE:NAME:TAG`")

// layoutName returns the full name of an image of an OCI layout. file is the name of the layout's file, or empty.
func layoutName(d v1.Descriptor, file string) (string, error) {
	text := d.Annotations[imageNameAnnotation]
	if text == "" {
		text = d.Annotations[refNameAnnotation]
		// The specification does not say whether this is a name or only a tag. A single word is taken as a tag; then the
		// file's name serves as the image's.
		if text != "" && !strings.ContainsAny(text, "/:") {
			if file == "" {
				return "", fmt.Errorf("it gives its image only the tag %q, and there is no file name to use as the image's name; save it with a name: `skopeo copy ... oci-archive:FILE:NAME:%s`", text, text)
			}
			base := filepath.Base(file)
			for _, suffix := range []string{".gz", ".zst", ".xz", ".bz2", ".tgz", ".tzst", ".txz", ".tbz2", ".tar", ".oci"} {
				base = strings.TrimSuffix(base, suffix)
			}
			text = base + ":" + text
		}
	}
	if text == "" {
		return "", errNoName
	}
	digest, err := name.NewDigest(text)
	if err != nil {
		return fullName(text)
	}
	if digest.DigestStr() != d.Digest.String() {
		return "", fmt.Errorf("it names an image %q, and the image's digest is %s", text, d.Digest)
	}
	return ofDockerHub(digest.Name()), nil
}

// fullName returns an image's name in CRI's form: nginx:1 becomes docker.io/library/nginx:1.
func fullName(text string) (string, error) {
	tag, err := name.NewTag(text)
	if err != nil {
		return "", fmt.Errorf("it names an image %q, which is not a name with a tag: %w", text, err)
	}
	return ofDockerHub(tag.Name()), nil
}

// ofDockerHub converts a name to CRI's form: the library has the registry's host name instead of docker.io.
func ofDockerHub(full string) string {
	if rest, ok := strings.CutPrefix(full, name.DefaultRegistry+"/"); ok {
		return "docker.io/" + rest
	}
	return full
}

// checkDocker checks an archive in the format of docker save up to version 24.
func (a *archive) checkDocker(c *contents, arch string) error {
	type entry struct {
		Config   string
		RepoTags []string
		Layers   []string
	}
	var images, kept []entry
	if err := c.document("manifest.json", &images); err != nil {
		return err
	}
	if len(images) == 0 {
		return errors.New("manifest.json in it lists no image")
	}
	var unusable error // why the first image cannot be used here
	for _, image := range images {
		if len(image.RepoTags) == 0 {
			unusable = cmp.Or(unusable, errors.New("it does not name its image; save it by its name, not by its ID: `docker save NAME:TAG`"))
			a.skip(image.Config, "has no name")
			continue
		}
		var names []string
		var full string
		for _, tag := range image.RepoTags {
			var err error
			if full, err = fullName(tag); err != nil {
				return err
			}
			names = append(names, full)
		}
		if _, ok := c.blobs[c.resolve(image.Config)]; !ok {
			return fmt.Errorf("image %s: %s is missing: the archive was cut short, or not saved whole", full, image.Config)
		}
		var config v1.ConfigFile
		if err := c.document(image.Config, &config); err != nil {
			return fmt.Errorf("image %s: %w", full, err)
		}
		if config.OS != "linux" || config.Architecture != arch {
			platform := config.OS + "/" + config.Architecture
			unusable = cmp.Or(unusable, notFor(full, []string{platform}, arch))
			a.skip(full, "is for "+platform)
			continue
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
				return fmt.Errorf("image %s: the digest of layer %s differs from %s: the archive is damaged", full, path, image.Config)
			}
		}
		kept = append(kept, image)
		for _, full := range names {
			a.add(full)
		}
	}
	switch {
	case len(kept) == 0:
		return unusable
	case len(kept) < len(images):
		return a.replaceFile("manifest.json", kept)
	}
	return nil
}
