package image

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"path"
	"runtime"
	"slices"
	"sort"
	"strings"
	"sync"
	"time"

	"github.com/fathom-network/fathom/internal/kit"
	"github.com/fathom-network/fathom/internal/watch/cri"
)

// A Target is a node to load images into.
type Target struct {
	Name string
	// SocketPath is the path by which this process reaches the node's containerd.
	SocketPath string
}

// Load imports the images in tar files into each node. A file is the output of `docker save` or an OCI layout as a tar
// file, compressed or not. All files are read and checked before any node is touched. Load returns the full names of the
// images, sorted, and the other contents of the files with the reasons why they are not loaded.
func Load(ctx context.Context, k kit.Kit, files []string, in Input, nodes []Target) (names, skipped []string, err error) {
	if err := k.Require(k.Bin("ctr")); err != nil {
		return nil, nil, fmt.Errorf("load images: %w", err)
	}
	if i := slices.Index(files, Stdin); i >= 0 && slices.Contains(files[i+1:], Stdin) {
		return nil, nil, errors.New("load images: standard input can be read only once; name it once")
	}
	var archives []*archive
	var problems []error
	for _, file := range files {
		from, err := in.openSource(ctx, file)
		if err != nil {
			problems = append(problems, fmt.Errorf("load images from %w", err))
			continue
		}
		defer from.close()
		a, err := openArchive(from, runtime.GOARCH)
		if err != nil {
			problems = append(problems, fmt.Errorf("load images from %w", err))
			continue
		}
		archives = append(archives, a)
		names = append(names, a.names...)
		for _, s := range a.skipped {
			skipped = append(skipped, a.label+": "+s)
		}
	}
	if err := errors.Join(problems...); err != nil {
		return nil, nil, err
	}
	sort.Strings(names)
	names = slices.Compact(names)

	problems = make([]error, len(nodes))
	for _, a := range archives {
		if err := a.sendTo(ctx, k, nodes, problems); err != nil {
			return names, skipped, fmt.Errorf("load images from %s: %w", a.label, err)
		}
	}
	var wait sync.WaitGroup
	for i, node := range nodes {
		if problems[i] != nil {
			continue
		}
		wait.Go(func() { problems[i] = waitFor(ctx, node.SocketPath, names) })
	}
	wait.Wait()
	for i, node := range nodes {
		if problems[i] != nil {
			problems[i] = fmt.Errorf("load images into node %s: %w", node.Name, problems[i])
		}
	}
	return names, skipped, errors.Join(problems...)
}

// sendTo imports the archive into all nodes without a problem so far, and records new problems. It decompresses the archive
// once for all nodes.
func (a *archive) sendTo(ctx context.Context, k kit.Kit, nodes []Target, problems []error) error {
	in, err := a.open()
	if err != nil {
		return err
	}
	defer in.Close()
	var wait sync.WaitGroup
	var to spread
	for i, node := range nodes {
		if problems[i] != nil {
			continue
		}
		reader, writer := io.Pipe()
		to = append(to, writer)
		wait.Go(func() {
			if err := importArchive(ctx, k, node.SocketPath, reader); err != nil {
				problems[i] = fmt.Errorf("%s: %w", a.label, err)
			}
			reader.Close()
		})
	}
	if a.replacement == nil {
		_, err = io.Copy(to, in)
	} else {
		err = a.rename(to, in)
	}
	to.close(err)
	wait.Wait()
	if errors.Is(err, io.ErrClosedPipe) {
		return nil // each node's problem is recorded
	}
	return err
}

// spread writes to several readers. A reader that stops reading reports its own error. When all have stopped, spread
// returns io.ErrClosedPipe.
type spread []*io.PipeWriter

func (s spread) Write(p []byte) (int, error) {
	err := io.ErrClosedPipe
	for _, w := range s {
		if _, left := w.Write(p); left == nil {
			err = nil
		}
	}
	if err != nil {
		return 0, err
	}
	return len(p), nil
}

func (s spread) close(err error) {
	for _, w := range s {
		w.CloseWithError(err)
	}
}

// rename copies the archive, with full names in its index and without what is not loaded.
func (a *archive) rename(w io.Writer, r io.Reader) error {
	tr, tw := tar.NewReader(r), tar.NewWriter(w)
	for {
		header, err := tr.Next()
		if err == io.EOF {
			return tw.Close()
		}
		if err != nil {
			return err
		}
		var content io.Reader = tr
		if path.Clean(header.Name) == a.replaced {
			header.Size = int64(len(a.replacement))
			content = bytes.NewReader(a.replacement)
		}
		header.Format = tar.FormatUnknown // so that the writer chooses one that fits the size
		if err := tw.WriteHeader(header); err != nil {
			return err
		}
		if _, err := io.Copy(tw, content); err != nil {
			return err
		}
	}
}

// waitFor returns when CRI lists the images, so that the next pod finds them. CRI notices an import with a short delay.
func waitFor(ctx context.Context, socket string, names []string) error {
	client, err := cri.Connect(socket)
	if err != nil {
		return err
	}
	defer client.Close()
	var missing []string
	for end := time.Now().Add(10 * time.Second); time.Now().Before(end); {
		images, err := client.Images(ctx)
		if err != nil {
			return err
		}
		missing = slices.DeleteFunc(slices.Clone(names), func(name string) bool {
			return slices.ContainsFunc(images, func(i cri.Image) bool { return slices.Contains(i.Names, name) || slices.Contains(i.Digests, name) })
		})
		if len(missing) == 0 {
			return nil
		}
		time.Sleep(10 * time.Millisecond)
	}
	return fmt.Errorf("containerd imported them, but its CRI plugin does not show %s", strings.Join(missing, ", "))
}

// List returns the images that a node has.
func List(ctx context.Context, node Target) ([]cri.Image, error) {
	client, err := cri.Connect(node.SocketPath)
	if err != nil {
		return nil, fmt.Errorf("list the images of node %s: %w", node.Name, err)
	}
	defer client.Close()
	images, err := client.Images(ctx)
	if err != nil {
		return nil, fmt.Errorf("list the images of node %s: %w", node.Name, err)
	}
	return images, nil
}
