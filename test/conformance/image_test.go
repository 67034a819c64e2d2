package main

import (
	"bytes"
	"io"
	"os"
	"path/filepath"
	"testing"

	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
)

func TestWriteImage(t *testing.T) {
	dir := t.TempDir()
	program := filepath.Join(dir, "server")
	content := []byte("a program")
	if err := os.WriteFile(program, content, 0o755); err != nil {
		t.Fatal(err)
	}
	const ref = "registry.example/tests/server:1.4"
	file := filepath.Join(dir, "server.tar")
	if err := writeImage(file, ref, program); err != nil {
		t.Fatal(err)
	}
	tag, err := name.NewTag(ref)
	if err != nil {
		t.Fatal(err)
	}
	img, err := tarball.ImageFromPath(file, &tag)
	if err != nil {
		t.Fatal(err)
	}
	config, err := img.ConfigFile()
	if err != nil {
		t.Fatal(err)
	}
	if e := config.Config.Entrypoint; len(e) != 1 || e[0] != "/server" {
		t.Errorf("it starts %q", e)
	}
	files := mutate.Extract(img)
	defer files.Close()
	data, err := io.ReadAll(files)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Contains(data, content) {
		t.Error("the program is not in it")
	}
	if err := writeImage(file, ref, filepath.Join(dir, "missing")); err == nil {
		t.Error("an image is made of nothing")
	}
}
