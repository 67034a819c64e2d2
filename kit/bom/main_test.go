package main

import (
	"bytes"
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	spdxjson "github.com/spdx/tools-golang/json"
	"github.com/spdx/tools-golang/spdx"
)

// TestRun looks at a program that is there for certain, this test.
func TestRun(t *testing.T) {
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	kit, out := t.TempDir(), t.TempDir()
	if err := os.MkdirAll(filepath.Join(kit, "images"), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.Mkdir(filepath.Join(kit, "bin"), 0o755); err != nil {
		t.Fatal(err)
	}
	program, err := os.ReadFile(self)
	if err != nil {
		t.Fatal(err)
	}
	for name, data := range map[string][]byte{"bin/tool": program, "bin/script": []byte("#!/bin/sh\n"), "kit.json": []byte(`{"etcd": "v1"}`),
		"images/index.json": []byte(`{"manifests": [{"digest": "sha256:abc", "annotations": {"io.containerd.image.name": "example/app:1"}}]}`)} {
		if err := os.WriteFile(filepath.Join(kit, name), data, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Symlink("tool", filepath.Join(kit, "bin/link")); err != nil {
		t.Fatal(err)
	}
	if err := run(kit, out, []string{self}, false); err != nil {
		t.Fatal(err)
	}
	read := func(path string) []byte {
		data, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		return data
	}
	first := read(filepath.Join(out, "sbom.spdx.json"))
	d, err := spdxjson.Read(bytes.NewReader(first))
	if err != nil {
		t.Fatal(err)
	}
	licence := func(name string) string {
		i := slices.IndexFunc(d.Packages, func(p *spdx.Package) bool { return p.PackageName == name })
		if i < 0 {
			t.Errorf("the SBOM does not have %s", name)
			return ""
		}
		return d.Packages[i].PackageLicenseConcluded
	}
	for name, want := range map[string]string{"golang.org/x/mod": "BSD-3-Clause", "github.com/google/licenseclassifier/v2": "Apache-2.0", "std": "BSD-3-Clause",
		"kit/bin/tool": "NOASSERTION", "example/app:1": "NOASSERTION"} {
		if got := licence(name); got != want {
			t.Errorf("%s: %q, want %q", name, got, want)
		}
	}
	if n := strings.Count(string(read(filepath.Join(out, "THIRD_PARTY_NOTICES.txt"))), "golang.org/x/mod v"); n == 0 {
		t.Error("the notices do not name golang.org/x/mod")
	}
	if text := string(read(filepath.Join(out, "images.txt"))); text != "example/app:1@sha256:abc\n" {
		t.Error(text)
	}
	var k struct {
		Etcd  string
		Built map[string]struct{ Go, SHA256 string }
	}
	if err := json.Unmarshal(read(filepath.Join(kit, "kit.json")), &k); err != nil || k.Etcd != "v1" || len(k.Built) != 1 || k.Built["bin/tool"].Go == "" {
		t.Errorf("%+v %v", k, err)
	}
	if err := run(kit, out, []string{self}, false); err != nil || !bytes.Equal(first, read(filepath.Join(out, "sbom.spdx.json"))) {
		t.Error("the same programs have another SBOM", err)
	}

	if err := verify(kit); err != nil {
		t.Error(err)
	}
	if err := os.WriteFile(filepath.Join(kit, "bin/tool"), append(program, 0), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := verify(kit); err == nil || !strings.Contains(err.Error(), "bin/tool is not what kit.json says") {
		t.Error(err)
	}

	// What has no licence is not passed on in silence.
	l, err := newLicences()
	if err != nil {
		t.Fatal(err)
	}
	l.modCache = t.TempDir()
	if err := os.MkdirAll(filepath.Join(l.modCache, "example.com/x@v1"), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := l.add(component{"example.com/x", "v1"}); err == nil || !strings.Contains(err.Error(), "example.com/x v1 has no licence file") {
		t.Error(err)
	}
}

// TestOwners asks whose the files of this machine are that are there for certain.
func TestOwners(t *testing.T) {
	if _, err := exec.LookPath("dpkg-query"); err != nil {
		t.Skip(err)
	}
	program, err := filepath.EvalSymlinks("/usr/bin/env")
	if err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(file, nil, 0o644); err != nil {
		t.Fatal(err)
	}
	found, stray, err := owners([]string{program, "/etc/ssl/certs/ca-certificates.crt", file})
	if err != nil {
		t.Fatal(err)
	}
	i := slices.IndexFunc(found, func(d debian) bool { return strings.Contains(d.name, "coreutils") })
	if i < 0 {
		t.Fatalf("%s is of %v, want coreutils", program, found)
	}
	if c := found[i]; c.version == "" || c.source == "" || c.sourceVersion == "" {
		t.Errorf("coreutils is %+v", c)
	}
	if !slices.ContainsFunc(found, func(d debian) bool { return d.name == "ca-certificates" }) {
		t.Errorf("the certificates' bundle is of %v", found)
	}
	if !slices.Equal(stray, []string{file}) {
		t.Errorf("%q are of no package, want %s", stray, file)
	}
}

func TestCommonLicences(t *testing.T) {
	if _, err := os.Stat("/usr/share/common-licenses/GPL-2"); err != nil {
		t.Skip(err)
	}
	texts, err := commonLicences([]string{"in `/usr/share/common-licenses/GPL-2'. Or in /usr/share/common-licenses/GPL-2.\n", "in /usr/share/common-licenses/NONE"})
	if err != nil {
		t.Fatal(err)
	}
	if len(texts) != 1 || !strings.Contains(texts[0], "GNU GENERAL PUBLIC LICENSE") {
		t.Errorf("%d texts, want that of the GPL", len(texts))
	}
}
