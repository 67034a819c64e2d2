package image

import (
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/types"

	"github.com/fathom-network/fathom/internal/durable"
	"github.com/fathom-network/fathom/internal/kit"
)

// Network describes the network's images that WriteNetwork has written.
type Network struct {
	// Version is the version of the fathom that made them.
	Version string `json:"version"`
	// Images maps the name of each image, without a registry, to the digest of its index, sha256:...
	Images map[string]string `json:"images"`
}

// The names of the network's images below a registry. The agent's image also has the controller and the plugin.
const (
	agentName = "fathom-agent"
	dnsName   = "fathom-dns"
)

// WriteNetwork writes the network's images into dir, which must not exist or be empty, as an OCI image layout. programs
// maps architectures (GOARCH) to directories with fathom-agent, fathom-cni, fathom-controller and fathom-dns. Each image is
// an index of all architectures under its name. Equal programs give equal digests.
func WriteNetwork(dir, version string, programs map[string]string) (Network, error) {
	n, err := writeNetwork(dir, version, programs)
	if err != nil {
		return Network{}, fmt.Errorf("write the network's images to %s: %w", dir, err)
	}
	return n, nil
}

func writeNetwork(dir, version string, programs map[string]string) (Network, error) {
	if len(programs) == 0 {
		return Network{}, errors.New("no architecture is given")
	}
	if entries, err := os.ReadDir(dir); err == nil && len(entries) > 0 {
		return Network{}, fmt.Errorf("it is not empty: it has %s", entries[0].Name())
	}
	out, err := layout.Write(dir, empty.Index)
	if err != nil {
		return Network{}, err
	}
	n := Network{Version: version, Images: map[string]string{}}
	for _, img := range []struct {
		name string
		recipe
		tree func(programs string) tree
	}{
		{agentName, agentRecipe, agentTree},
		{dnsName, dnsRecipe, func(programs string) tree { return dnsTree(filepath.Join(programs, "fathom-dns")) }},
	} {
		index := mutate.IndexMediaType(empty.Index, types.OCIImageIndex)
		for _, arch := range slices.Sorted(maps.Keys(programs)) {
			l, err := writeLayer(img.tree(programs[arch]), filepath.Join(dir, "blobs", "sha256"))
			if err != nil {
				return Network{}, err
			}
			image, err := assemble(img.config, arch, []namedLayer{{img.layers[0], l}})
			if err != nil {
				return Network{}, err
			}
			index = mutate.AppendManifests(index, mutate.IndexAddendum{Add: image,
				Descriptor: v1.Descriptor{Platform: &v1.Platform{OS: "linux", Architecture: arch}}})
		}
		if err := out.AppendIndex(index, layout.WithAnnotations(map[string]string{refNameAnnotation: img.name})); err != nil {
			return Network{}, err
		}
		digest, err := index.Digest()
		if err != nil {
			return Network{}, err
		}
		n.Images[img.name] = digest.String()
	}
	return n, nil
}

// networkFile is the kit's file with the digests of the network's images.
func networkFile(k kit.Kit) string { return filepath.Join(k.Dir, "network.json") }

// Record writes the digests to the kit, for ReadNetwork.
func (n Network) Record(k kit.Kit) error {
	data, err := json.MarshalIndent(n, "", "  ")
	if err != nil {
		return err
	}
	return durable.WriteFile(networkFile(k), append(data, '\n'), 0o644)
}

// ReadNetwork returns the network's images that this version of fathom made.
func ReadNetwork(k kit.Kit, version string) (Network, error) {
	data, err := os.ReadFile(networkFile(k))
	if errors.Is(err, os.ErrNotExist) {
		return Network{}, fmt.Errorf("the kit in %s lacks the digests of the network's images: `make dist` makes the images, and packages contain the digests", k.Dir)
	}
	if err != nil {
		return Network{}, err
	}
	var n Network
	if err := json.Unmarshal(data, &n); err != nil {
		return Network{}, fmt.Errorf("read %s: %w; `make dist` writes it again", networkFile(k), err)
	}
	if n.Version != version {
		return Network{}, fmt.Errorf("the digests of the network's images in %s are those of version %s, and this is %s; `make dist` makes its images", networkFile(k), n.Version, version)
	}
	return n, nil
}

// In returns the references by digest, in a registry HOST/PATH, of the agent's image and the DNS cache's.
func (n Network) In(registry string) (agent, dns string, err error) {
	// registry.example is a host, and so is localhost:5000; team/net would be Docker Hub's.
	if host, _, _ := strings.Cut(registry, "/"); !strings.ContainsAny(host, ".:") && host != "localhost" {
		return "", "", fmt.Errorf("registry %q: the first part is not a host: write docker.io/%[1]s for Docker Hub", registry)
	}
	names := []string{agentName, dnsName}
	for i, image := range names {
		names[i] = registry + "/" + image + "@" + n.Images[image]
		_, err := name.NewDigest(names[i], name.StrictValidation)
		if err == nil && strings.Contains(names[i], "//") { // which the library takes
			err = errors.New("it is a URL, or ends with a slash")
		}
		if err != nil {
			return "", "", fmt.Errorf("registry %q: want HOST[:PORT][/PATH]: %w", registry, err)
		}
	}
	return names[0], names[1], nil
}
