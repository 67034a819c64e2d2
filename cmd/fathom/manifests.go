package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
	"golang.org/x/term"

	"github.com/fathom-network/fathom/internal/facts/manifest"
	"github.com/fathom-network/fathom/internal/facts/topology"
	"github.com/fathom-network/fathom/internal/kit"
)

// kustomizations are the names by which kustomize knows its own files.
var kustomizations = []string{"kustomization.yaml", "kustomization.yml", "Kustomization"}

// manifestFiles reads a lab's manifest: a file, standard input, a directory, or the output of kustomize for one.
func (a *app) manifestFiles(ctx context.Context, path string) ([]manifest.File, error) {
	if path == topology.Stdin {
		data, err := a.readStdin(ctx, manifest.MaxSize, "manifest")
		return []manifest.File{{Name: "standard input", Data: data}}, err
	}
	info, err := os.Stat(path)
	switch {
	case err != nil:
		return nil, err
	case info.IsDir():
		return manifestDir(ctx, path)
	case slices.Contains(kustomizations, filepath.Base(path)):
		return nil, fmt.Errorf("%s is a kustomization: name its directory, %s", path, filepath.Dir(path))
	}
	data, err := readBounded(path, manifest.MaxSize, "manifest")
	return []manifest.File{{Name: path, Data: data}}, err
}

// manifestDir reads a directory as kubectl does: the output of its kustomization or, without one, the files of objects
// in it, not recursively.
func manifestDir(ctx context.Context, dir string) ([]manifest.File, error) {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil, err
	}
	var files []manifest.File
	var size int
	for _, e := range entries { // sorted by name
		switch {
		case slices.Contains(kustomizations, e.Name()):
			return kustomize(ctx, dir)
		case e.IsDir() || !slices.Contains([]string{".yaml", ".yml", ".json"}, filepath.Ext(e.Name())):
			continue
		}
		path := filepath.Join(dir, e.Name())
		data, err := readBounded(path, manifest.MaxSize, "manifest")
		if err != nil {
			return nil, err
		}
		if size += len(data); size > manifest.MaxSize {
			return nil, fmt.Errorf("the files in %s have more than %d bytes: name them one by one", dir, manifest.MaxSize)
		}
		files = append(files, manifest.File{Name: path, Data: data})
	}
	if len(files) == 0 {
		return nil, fmt.Errorf("%s has no file that ends in .yaml, .yml or .json, and no kustomization.yaml", dir)
	}
	return files, nil
}

// kustomize builds a kustomization's objects with the kit's kubectl.
func kustomize(ctx context.Context, dir string) ([]manifest.File, error) {
	k, err := kit.Find()
	if err == nil {
		err = k.Require(k.Bin("kubectl"))
	}
	if err != nil {
		return nil, fmt.Errorf("make the objects of the kustomization %s: %w", dir, err)
	}
	cmd := exec.CommandContext(ctx, k.Bin("kubectl"), "kustomize", dir)
	cmd.SysProcAttr = &unix.SysProcAttr{Pdeathsig: unix.SIGKILL}
	out := limited{most: manifest.MaxSize}
	var said bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &said
	if err := cmd.Run(); err != nil {
		if out.full {
			err = fmt.Errorf("it makes more than %d bytes", manifest.MaxSize)
		} else if text := strings.TrimSpace(said.String()); text != "" {
			err = errors.New(strings.TrimPrefix(text, "error: "))
		}
		return nil, fmt.Errorf("`kubectl kustomize %s`: %w", dir, err)
	}
	return []manifest.File{{Name: "`kubectl kustomize " + dir + "`", Data: out.Bytes()}}, nil
}

// limited is a buffer of limited size.
type limited struct {
	bytes.Buffer
	most int
	full bool
}

func (l *limited) Write(p []byte) (int, error) {
	if l.Len()+len(p) > l.most {
		l.full = true
		return 0, io.ErrShortWrite
	}
	return l.Buffer.Write(p)
}

// readStdin reads standard input to its end, at most limit bytes. A Ctrl-C ends the wait for more.
func (a *app) readStdin(ctx context.Context, limit int64, what string) ([]byte, error) {
	if term.IsTerminal(int(a.in.Fd())) {
		return nil, fmt.Errorf("standard input is a terminal: pipe a %s into it", what)
	}
	type result struct {
		data []byte
		err  error
	}
	done := make(chan result, 1)
	go func() {
		data, err := io.ReadAll(io.LimitReader(a.in, limit+1))
		done <- result{data, err}
	}()
	select {
	case <-ctx.Done():
		return nil, ctx.Err()
	case r := <-done:
		if r.err == nil && int64(len(r.data)) > limit {
			r.err = fmt.Errorf("standard input has more than %d bytes: it is not a %s", limit, what)
		}
		return r.data, r.err
	}
}
