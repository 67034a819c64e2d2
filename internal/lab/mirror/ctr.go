package mirror

import (
	"bytes"
	"context"
	"fmt"
	"os/exec"
	"strconv"
	"strings"

	"github.com/fathom-network/fathom/internal/facts/standin"
)

// Ctr asks a containerd what images it has, with containerd's own command. CRI, which the rest of Fathom asks, does not
// tell the digest of a manifest that was not pulled; containerd's client library would make a mirror several times larger.
type Ctr struct {
	Program string
	Socket  string
}

// Images is what Options.Images wants.
func (c Ctr) Images(ctx context.Context, name string) (map[string]string, error) {
	cmd := exec.CommandContext(ctx, c.Program, "--address", c.Socket, "--namespace", "k8s.io", "images", "ls",
		"name=="+strconv.Quote(name), "name~="+strconv.Quote("^"+standin.Prefix))
	var problem bytes.Buffer
	cmd.Stderr = &problem
	out, err := cmd.Output()
	if err != nil {
		return nil, fmt.Errorf("ask containerd at %s for its images: %w: %s", c.Socket, err, bytes.TrimSpace(problem.Bytes()))
	}
	return readImages(string(out))
}

// readImages reads the table of `ctr images ls`: names, media types and digests are its first columns.
func readImages(table string) (map[string]string, error) {
	images := map[string]string{}
	for line := range strings.Lines(table) {
		f := strings.Fields(line)
		if len(f) == 0 || f[0] == "REF" {
			continue
		}
		if len(f) < 3 || !digestForm.MatchString(f[2]) {
			return nil, fmt.Errorf("read the images that ctr lists: %q does not begin with a name, a type and a digest of SHA-256", strings.TrimSpace(line))
		}
		images[f[0]] = strings.TrimPrefix(f[2], "sha256:")
	}
	return images, nil
}
