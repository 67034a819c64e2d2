package doctor

import (
	"context"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/fathom-network/fathom/internal/testenv"
)

// TestOrdinaryUser runs the checks in a child without privileges: it has to report, not to crash.
func TestOrdinaryUser(t *testing.T) {
	if os.Getenv("FATHOM_TEST_CHILD") != "" {
		checks := Run(context.Background(), Options{StateDir: "/var/lib/fathom/lab"})
		for _, c := range checks {
			t.Logf("%s %s: %s", c.Status, c.Name, c.Found)
		}
		if checks[0].Name != "root" || checks[0].Status != Fail {
			t.Errorf("the first check is %+v, want a failure of root", checks[0])
		}
		if len(checks) < 15 {
			t.Errorf("only %d checks", len(checks))
		}
		return
	}
	testenv.NeedRoot(t)
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, "/proc/self/exe", "-test.run=^TestOrdinaryUser$", "-test.v")
	cmd.Dir = "/"
	cmd.Env = append(os.Environ(), "FATHOM_TEST_CHILD=1")
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}
	out, err := cmd.CombinedOutput()
	if err != nil || !strings.Contains(string(out), "fail root") {
		t.Errorf("%v\n%s", err, out)
	}
	t.Logf("%s", out)
}
