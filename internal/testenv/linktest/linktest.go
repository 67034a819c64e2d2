// Package linktest has what tests need that work in network namespaces of their own, whichever package they test.
package linktest

import (
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/fathom-network/fathom/internal/kernel/link"
	"github.com/fathom-network/fathom/internal/testenv"
)

// Namespace makes a namespace that goes with the test, which is skipped unless it runs as root.
func Namespace(t testing.TB) *link.Namespace {
	t.Helper()
	n, _ := NamespaceAt(t)
	return n
}

// NamespaceAt is Namespace, and tells the path for those that open it by themselves.
func NamespaceAt(t testing.TB) (n *link.Namespace, path string) {
	t.Helper()
	testenv.NeedRoot(t)
	path = filepath.Join(t.TempDir(), "ns")
	testenv.Must(t, link.Create(path))
	t.Cleanup(func() {
		if err := link.Delete(path); err != nil {
			t.Error(err)
		}
	})
	n, err := link.Open(path)
	testenv.Must(t, err)
	t.Cleanup(n.Close)
	return n, path
}

// Run runs a program in a namespace and returns what it prints. The test fails if the program does.
func Run(t testing.TB, n *link.Namespace, args ...string) string {
	t.Helper()
	out, err := Try(n, args...)
	if err != nil {
		t.Fatalf("%q: %v\n%s", args, err, out)
	}
	return out
}

// Try is Run of a program that may fail, and says whether it did.
func Try(n *link.Namespace, args ...string) (string, error) {
	var out strings.Builder
	cmd := exec.Command(args[0], args[1:]...)
	cmd.Stdout, cmd.Stderr = &out, &out
	err := n.Start(cmd)
	if err == nil {
		err = cmd.Wait()
	}
	return out.String(), err
}
