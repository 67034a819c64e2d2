// Package testenv says what a test needs of the machine it runs on, and has what tests of any package share. A
// test that needs more than there is is skipped and says so; where FATHOM_REQUIRE_ROOT is set, as in CI, it fails
// instead, so that a test cannot be skipped everywhere.
package testenv

import (
	"os"
	"strings"
	"sync"
	"testing"

	"golang.org/x/sys/unix"
	"time"
)

// NeedRoot skips the test unless it runs as root.
func NeedRoot(t testing.TB) {
	t.Helper()
	if os.Geteuid() != 0 {
		skip(t, "needs root: namespaces and mounts are made")
	}
}

// NeedFiles has the process open so many files, or skips the test.
func NeedFiles(t testing.TB, files uint64) {
	t.Helper()
	var limit unix.Rlimit
	Must(t, unix.Getrlimit(unix.RLIMIT_NOFILE, &limit))
	limit.Cur, limit.Max = files, max(files, limit.Max)
	if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &limit); err != nil {
		t.Skipf("needs %d open files: %v", files, err)
	}
}

// NeedFile skips the test unless path exists; remedy says how to make it.
func NeedFile(t testing.TB, path, remedy string) {
	t.Helper()
	if _, err := os.Stat(path); err != nil {
		skip(t, "needs "+path+": "+remedy)
	}
}

// Must ends the test if there is an error.
func Must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// Eventually ends the test unless what it asks for comes true within a minute. want names that; probe says whether it
// is so, and how things are, which is told where they stay wrong.
func Eventually(t testing.TB, want string, probe func() (ok bool, how string)) {
	t.Helper()
	var how string
	for deadline := time.Now().Add(time.Minute); time.Now().Before(deadline); time.Sleep(20 * time.Millisecond) {
		var ok bool
		if ok, how = probe(); ok {
			return
		}
	}
	t.Fatalf("not so after a minute: %s\n%s", want, how)
}

func skip(t testing.TB, why string) {
	t.Helper()
	if os.Getenv("FATHOM_REQUIRE_ROOT") != "" {
		t.Fatal(why)
	}
	t.Skip(why)
}

// Output is what a program has written, which may be read while the program runs.
type Output struct {
	mu   sync.Mutex
	text strings.Builder
}

// Write implements io.Writer.
func (o *Output) Write(b []byte) (int, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.text.Write(b)
}

// String returns what was written so far.
func (o *Output) String() string {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.text.String()
}
