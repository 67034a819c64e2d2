package image

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"os/exec"
	"runtime"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/fathom-network/fathom/internal/kit"
)

// namespace is the containerd namespace whose images CRI uses.
const namespace = "k8s.io"

// importArchive sends a tar archive of images to the containerd at socket, which may run in another mount namespace: the
// archive goes through the socket, and containerd's transfer service unpacks it.
func importArchive(ctx context.Context, k kit.Kit, socket string, archive io.Reader) error {
	return ctr(ctx, k, socket, archive, "images", "import", "--platform", "linux/"+runtime.GOARCH, "--snapshotter", "overlayfs", "-")
}

// ctr runs a command of the kit's ctr on the containerd at socket. Rejected: containerd's client library, which would add
// all of containerd's dependencies to each program of Fathom.
func ctr(ctx context.Context, k kit.Kit, socket string, in io.Reader, args ...string) error {
	return ctrTo(ctx, k, socket, in, nil, args...)
}

// ctrTo is ctr, with what the command writes to its standard output in to, if that is not nil.
func ctrTo(ctx context.Context, k kit.Kit, socket string, in io.Reader, to io.Writer, args ...string) error {
	cmd := exec.CommandContext(ctx, k.Bin("ctr"), append([]string{"--address", socket, "--namespace", namespace}, args...)...)
	var out bytes.Buffer
	cmd.Stdin, cmd.Stdout, cmd.Stderr = in, &out, &out
	if to != nil {
		cmd.Stdout = to
	}
	cmd.SysProcAttr = &unix.SysProcAttr{Pdeathsig: unix.SIGKILL}
	// The death signal is tied to the thread that starts the child.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	if err := cmd.Run(); err != nil {
		if ctx.Err() != nil {
			err = ctx.Err()
		}
		return fmt.Errorf("ctr %s %s at the containerd %s: %w: %s", args[0], args[1], socket, err, lines(out.Bytes()))
	}
	return nil
}

// lines shortens a command's output for an error message, and drops progress bars.
func lines(out []byte) string {
	text := strings.TrimSpace(string(out[bytes.LastIndexByte(bytes.TrimSpace(out), '\r')+1:]))
	all := strings.Split(text, "\n")
	return strings.Join(all[max(0, len(all)-5):], "\n")
}
