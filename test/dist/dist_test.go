// Package dist tests what `make dist` makes of what was built. It packs small files in the place of the real ones, whose
// build takes minutes: `make dist-check` does it with those.
package dist

import (
	"bytes"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
)

// program stands for fathom: it is asked for its manual pages and completions.
const program = `#!/bin/sh
case $1 in
man) echo '.TH FATHOM' >$2/fathom.1; echo '.TH FATHOM-UP' >$2/fathom-up.1 ;;
completion) echo "completion for $2" ;;
esac
`

// built makes what `make build` leaves in bin, with the permissions and the dates that one machine gives it.
func built(t *testing.T, umask os.FileMode, when time.Time) string {
	t.Helper()
	bin := t.TempDir()
	for path, mode := range map[string]os.FileMode{
		"fathom": 0o755, "fathom-agent": 0o755, "fathom-cni": 0o755, "fathom-controller": 0o755, "fathom-init": 0o755, "fathom-mirror": 0o755,
		"kit/bin/kube": 0o755, "kit/cni/bridge": 0o755, "kit/kit.json": 0o644, "kit/programs/pause": 0o755, "kit/test/e2e.test": 0o755,
		"kit/images/index.json": 0o644, "kit/images/inputs": 0o644, "kit/images/blobs/sha256/abc": 0o444,
		"notices/THIRD_PARTY_NOTICES.txt": 0o644, "notices/sbom.spdx.json": 0o644,
	} {
		text := "this is " + path + "\n"
		if path == "fathom" {
			text = program
		}
		if path == "kit/images/inputs" {
			text = when.String()
		}
		file := filepath.Join(bin, path)
		if err := os.MkdirAll(filepath.Dir(file), 0o777&^umask); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(file, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
		if err := os.Chmod(file, mode&^umask); err != nil {
			t.Fatal(err)
		}
		if err := os.Chtimes(file, when, when); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Symlink("kube", filepath.Join(bin, "kit/bin/etcd")); err != nil {
		t.Fatal(err)
	}
	return bin
}

// pack makes the packages of what was built, of a version, and returns the directory that has them.
func pack(t *testing.T, bin, version string, env ...string) string {
	t.Helper()
	if _, err := exec.LookPath("dpkg-deb"); err != nil {
		t.Skip(err)
	}
	out := t.TempDir()
	cmd := exec.Command("../../kit/dist", "packages", bin, version, out)
	cmd.Env = append(append(os.Environ(), "SOURCE_DATE_EPOCH=1700000000", "DIST_ZSTD=1", "DIST_XZ=0"), env...)
	if said, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, said)
	}
	return out
}

func run(t *testing.T, name string, args ...string) string {
	t.Helper()
	var stderr bytes.Buffer
	cmd := exec.Command(name, args...)
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("%s %v: %v: %s", name, args, err, stderr.Bytes())
	}
	return string(out)
}

func names(t *testing.T, dir string) (names []string) {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		names = append(names, e.Name())
	}
	return names
}

// The same files give the same packages, byte by byte, on machines that differ in all that must not matter.
func TestPackagesAreReproducible(t *testing.T) {
	now := time.Now()
	one := pack(t, built(t, 0, now), "v1.2.3")
	other := pack(t, built(t, 0o077, now.Add(-1000*time.Hour)), "v1.2.3", "TZ=Asia/Tokyo", "LC_ALL=C.UTF-8", "LANG=C.UTF-8")
	want := names(t, one)
	if got := names(t, other); len(want) != 2 || !slices.Equal(got, want) {
		t.Fatalf("packages %q and %q", want, got)
	}
	for _, name := range want {
		a, err := os.ReadFile(filepath.Join(one, name))
		if err != nil {
			t.Fatal(err)
		}
		b, err := os.ReadFile(filepath.Join(other, name))
		if err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(a, b) {
			t.Errorf("%s differs with the umask, the dates and the time zone", name)
		}
	}
}

func TestPackageContents(t *testing.T) {
	out := pack(t, built(t, 0o022, time.Now()), "v1.2.3")
	arch := strings.TrimSpace(run(t, "dpkg", "--print-architecture"))
	deb, tarball := filepath.Join(out, "fathom_1.2.3_"+arch+".deb"), filepath.Join(out, "fathom_1.2.3_linux_"+arch+".tar.xz")
	root := t.TempDir()
	run(t, "dpkg-deb", "-x", deb, root)
	run(t, "tar", "-C", root, "-xf", tarball)
	top := "fathom_1.2.3_linux_" + arch
	for _, path := range []string{
		"bin/fathom", "lib/fathom/fathom-init", "lib/fathom/fathom-mirror", "lib/fathom/fathom-agent", "lib/fathom/fathom-cni", "lib/fathom/fathom-controller",
		"lib/fathom/kit/bin/kube", "lib/fathom/kit/bin/etcd", "lib/fathom/kit/cni/bridge", "lib/fathom/kit/kit.json",
		"lib/fathom/kit/images/index.json", "lib/fathom/kit/images/blobs/sha256/abc",
		"share/man/man1/fathom.1.gz", "share/man/man1/fathom-up.1.gz", "share/bash-completion/completions/fathom",
		"share/fish/vendor_completions.d/fathom.fish", "share/doc/fathom/copyright", "share/doc/fathom/LICENSE",
		"share/doc/fathom/GPL-2.0-only.txt", "share/doc/fathom/THIRD_PARTY_NOTICES.txt", "share/doc/fathom/sbom.spdx.json",
		"share/doc/fathom/docs/install.md",
	} {
		for _, prefix := range []string{"usr", top} {
			if _, err := os.Stat(filepath.Join(root, prefix, path)); err != nil {
				t.Error(err)
			}
		}
	}
	for _, path := range []string{"usr/share/zsh/vendor-completions/_fathom", top + "/share/zsh/site-functions/_fathom"} {
		if text, err := os.ReadFile(filepath.Join(root, path)); err != nil || string(text) != "completion for zsh\n" {
			t.Errorf("%s: %q, %v", path, text, err)
		}
	}
	for _, path := range []string{"usr/lib/fathom/kit/test", "usr/lib/fathom/kit/programs", "usr/lib/fathom/kit/images/inputs", "usr/bin/fathom-init"} {
		if _, err := os.Lstat(filepath.Join(root, path)); err == nil {
			t.Errorf("%s is in the package", path)
		}
	}
	// Every file is root's, and of one of two modes.
	for line := range strings.Lines(run(t, "dpkg-deb", "-c", deb)) {
		mode, rest, _ := strings.Cut(line, " ")
		if !strings.HasPrefix(rest, "root/root ") || !slices.Contains([]string{"drwxr-xr-x", "-rwxr-xr-x", "-rw-r--r--", "lrwxrwxrwx"}, mode) {
			t.Errorf("in the package: %s", line)
		}
	}
	if got := run(t, "dpkg-deb", "-f", deb, "Package", "Architecture"); got != "Package: fathom\nArchitecture: "+arch+"\n" {
		t.Errorf("control says %q", got)
	}
}

// A version comes before those that were made after it.
func TestVersions(t *testing.T) {
	bin := built(t, 0o022, time.Now())
	var order []string
	for _, describe := range []string{"0123abc", "0123abc-dirty", "v1.2.3-rc.1", "v1.2.3", "v1.2.3-4-g0123abc", "v1.2.4"} {
		deb, err := filepath.Glob(filepath.Join(pack(t, bin, describe), "*.deb"))
		if err != nil || len(deb) != 1 {
			t.Fatal(deb, err)
		}
		order = append(order, strings.TrimSpace(run(t, "dpkg-deb", "-f", deb[0], "Version")))
	}
	for i := range order[1:] {
		if err := exec.Command("dpkg", "--compare-versions", order[i], "lt", order[i+1]).Run(); err != nil {
			t.Errorf("%s does not come before %s", order[i], order[i+1])
		}
	}
}
