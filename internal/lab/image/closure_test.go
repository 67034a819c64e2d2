package image

import (
	"debug/elf"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// A dynamic program of this machine, run by the loader and libraries of its closure alone.
func TestClosureIsComplete(t *testing.T) {
	program, ok := locate("bash")
	if !ok {
		program, ok = locate("sh")
	}
	if !ok {
		t.Skip("neither bash nor sh on this machine")
	}
	libs, err := newLinker().closure(program)
	if err != nil {
		t.Fatal(err)
	}
	if len(libs) == 0 {
		t.Skipf("%s is static", program)
	}
	dir := t.TempDir()
	var loader string
	for _, lib := range libs {
		data, err := os.ReadFile(lib.Source)
		if err != nil {
			t.Fatal(err)
		}
		at := filepath.Join(dir, filepath.Base(lib.Path))
		if err := os.WriteFile(at, data, 0o755); err != nil {
			t.Fatal(err)
		}
		if strings.HasPrefix(filepath.Base(at), "ld-") {
			loader = at
		}
	}
	if loader == "" {
		t.Fatalf("no loader among %v", libs)
	}
	// --list prints where each library was found: all must come from the copy.
	out, err := exec.Command(loader, "--inhibit-cache", "--library-path", dir, "--list", program).CombinedOutput()
	if err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	for _, line := range strings.Split(string(out), "\n") {
		if name, path, ok := strings.Cut(line, "=>"); ok && !strings.HasPrefix(strings.TrimSpace(path), dir) && !strings.Contains(name, "ld-") {
			t.Errorf("not from the closure: %s", line)
		}
	}
}

func TestClosureOfThisTest(t *testing.T) {
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	libs, err := newLinker().closure(self)
	if err != nil {
		t.Fatal(err)
	}
	f, err := elf.Open(self)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	needed, _ := f.ImportedLibraries()
	for _, name := range needed {
		found := false
		for _, lib := range libs {
			found = found || filepath.Base(lib.Path) == name
		}
		if !found {
			t.Errorf("%s is not in the closure %v", name, libs)
		}
	}
}

func TestClosureOfOtherFiles(t *testing.T) {
	script := filepath.Join(t.TempDir(), "script")
	if err := os.WriteFile(script, []byte("#!/bin/sh\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	libs, err := newLinker().closure(script)
	if err != nil || len(libs) != 0 {
		t.Errorf("a script: %v, %v; want nothing", libs, err)
	}
	if _, err := newLinker().closure(script + "-missing"); err == nil || !strings.Contains(err.Error(), script+"-missing") {
		t.Errorf("a missing file: error %v, want one that names it", err)
	}
}

func TestLinkerConfig(t *testing.T) {
	dir := t.TempDir()
	write := func(name, text string) {
		t.Helper()
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	write("ld.so.conf", "# first\n/one\ninclude *.conf.in\n  /two # why\n")
	write("a.conf.in", "/a\n\n/b\n")
	write("loop.conf.in", "include ld.so.conf\n")
	got := readLinkerConfig(filepath.Join(dir, "ld.so.conf"), 0)
	if len(got) < 4 || got[0] != "/one" || got[1] != "/a" || got[2] != "/b" {
		t.Errorf("got %v", got)
	}
}

func TestMerged(t *testing.T) {
	for path, want := range map[string]string{
		"/lib64/ld-linux-x86-64.so.2":     "/usr/lib64/ld-linux-x86-64.so.2",
		"/lib/x86_64-linux-gnu/libc.so.6": "/usr/lib/x86_64-linux-gnu/libc.so.6",
		"/usr/lib/libc.so":                "/usr/lib/libc.so",
		"/library/libc.so":                "/library/libc.so",
		"/lib":                            "/usr/lib",
	} {
		if got := merged(path); got != want {
			t.Errorf("merged(%s) = %s, want %s", path, got, want)
		}
	}
}
