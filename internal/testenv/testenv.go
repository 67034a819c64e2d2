// Package testenv says what a test needs of the machine it runs on. A test that needs more than there is
// is skipped and says so; where FATHOM_REQUIRE_ROOT is set, as in CI, it fails instead, so that a test
// cannot be skipped everywhere.
package testenv

import (
	"os"
	"testing"
)

// NeedRoot skips the test unless it runs as root.
func NeedRoot(t testing.TB) {
	t.Helper()
	if os.Geteuid() != 0 {
		skip(t, "needs root: namespaces and mounts are made")
	}
}

// NeedFile skips the test unless path exists; remedy says how to make it.
func NeedFile(t testing.TB, path, remedy string) {
	t.Helper()
	if _, err := os.Stat(path); err != nil {
		skip(t, "needs "+path+": "+remedy)
	}
}

func skip(t testing.TB, why string) {
	t.Helper()
	if os.Getenv("FATHOM_REQUIRE_ROOT") != "" {
		t.Fatal(why)
	}
	t.Skip(why)
}
