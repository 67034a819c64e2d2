package lab

import (
	"os"
	"path/filepath"
	"slices"
	"testing"

	"github.com/fathom-network/fathom/internal/facts/topology"
)

func TestHiddenFromNodes(t *testing.T) {
	host := t.TempDir()
	for path, text := range map[string]string{
		"etc/passwd":       "root:x:0:0:root:/root:/bin/bash\n# comment\n+nis\n\nme:x:1000:1000::/home/me:/bin/sh\n",
		"etc/group":        "root:x:0:\nshadow:x:42:\n",
		"etc/shadow":       "root:$y$secret:19000:0:99999:7:::\n",
		"etc/shadow-":      "root:$y$older:19000:0:99999:7:::\n",
		"etc/ssh/key":      "secret",
		"etc/wireguard/wg": "secret",
	} {
		if err := writeFile(filepath.Join(host, path), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	l := &Lab{Lab: topology.Lab{Name: "a"}, Paths: Paths{State: filepath.Join(t.TempDir(), "state")}}
	dirs := hiddenDirs(host, Paths{State: "/data/fathom/"})
	for _, dir := range []string{"root", "home", "var", "etc/ssh", "etc/wireguard", "data/fathom"} {
		if !slices.Contains(dirs, dir) {
			t.Errorf("/%s is not hidden: %v", dir, dirs)
		}
	}
	// It would be made within what is hidden already.
	if usual := hiddenDirs(host, Paths{State: "/var/lib/fathom"}); slices.Contains(usual, "var/lib/fathom") {
		t.Errorf("/var is not empty: %v", usual)
	}
	if slices.Contains(dirs, "etc/letsencrypt") {
		t.Error("a directory is made that the host does not have")
	}
	if err := l.hideFiles(host, "n"); err != nil {
		t.Fatal(err)
	}
	for path, want := range map[string]string{
		"/etc/shadow":  "root:*:19000:0:99999:7:::\nme:*:19000:0:99999:7:::\n",
		"/etc/gshadow": "root:*::\nshadow:*::\n",
		"/etc/shadow-": "",
	} {
		data, err := os.ReadFile(l.diskFile("n", path))
		if err != nil || string(data) != want {
			t.Errorf("%s is %q (%v), want %q", path, data, err, want)
		}
	}
	if _, err := os.Stat(l.diskFile("n", "/etc/krb5.keytab")); err == nil {
		t.Error("a file is made that the host does not have")
	}
}

// TestStateIsRootsAlone also mends the mode of one that an older version has made.
func TestStateIsRootsAlone(t *testing.T) {
	l := &Lab{Lab: topology.Lab{Name: "a"}, Paths: Paths{State: filepath.Join(t.TempDir(), "state")}}
	if err := os.MkdirAll(filepath.Join(l.Paths.State, "labs"), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := l.save(); err != nil {
		t.Fatal(err)
	}
	for path, want := range map[string]os.FileMode{"labs": 0o700, ".": 0o755} {
		if st, err := os.Stat(filepath.Join(l.Paths.State, path)); err != nil || st.Mode().Perm() != want {
			t.Errorf("%s: mode is %v (%v), want %v", path, st.Mode(), err, want)
		}
	}
}
