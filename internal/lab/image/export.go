package image

import (
	"context"
	"fmt"
	"io"
	"runtime"
	"slices"
	"strings"

	"github.com/google/go-containerregistry/pkg/v1/layout"

	"github.com/fathom-network/fathom/internal/facts/standin"
	"github.com/fathom-network/fathom/internal/kit"
	"github.com/fathom-network/fathom/internal/watch/cri"
)

// Added returns the images of a node that are not of the kit: those that were loaded, or pulled from a real registry.
func Added(ctx context.Context, k kit.Kit, node Target) ([]cri.Image, error) {
	index, err := layout.ImageIndexFromPath(k.ImagesDir())
	if err != nil {
		return nil, fmt.Errorf("read the kit's images: %w", err)
	}
	manifest, err := index.IndexManifest()
	if err != nil {
		return nil, fmt.Errorf("read the kit's images: %w", err)
	}
	own := map[string]bool{}
	for _, m := range manifest.Manifests {
		own[m.Annotations[imageNameAnnotation]] = true
	}
	images, err := List(ctx, node)
	if err != nil {
		return nil, err
	}
	return slices.DeleteFunc(images, func(i cri.Image) bool {
		return len(i.Names) == 0 || standin.Of(i.Names) || slices.ContainsFunc(i.Names, func(name string) bool { return own[name] })
	}), nil
}

// Export writes images of a node to w, as an archive that Load reads. With --local, since by containerd's transfer service ctr v2.4.2 ends when
// the service has sent all, whether it has been written or not, and the end of the archive is missing without an error
// (findings/containerd-export-cut.sh).
func Export(ctx context.Context, k kit.Kit, node Target, names []string, w io.Writer) error {
	if err := k.Require(k.Bin("ctr")); err != nil {
		return fmt.Errorf("export images: %w", err)
	}
	args := append([]string{"images", "export", "--local", "--platform", "linux/" + runtime.GOARCH, "-"}, names...)
	if err := ctrTo(ctx, k, node.SocketPath, nil, w, args...); err != nil {
		return fmt.Errorf("export %s from node %s: %w", strings.Join(names, ", "), node.Name, err)
	}
	return nil
}
