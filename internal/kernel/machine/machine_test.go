package machine_test

import (
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/fathom-network/fathom/internal/kernel/cgroup"
	"github.com/fathom-network/fathom/internal/kernel/machine"
	"github.com/fathom-network/fathom/internal/testenv"
)

// start boots a machine that the test ends, and fails the test if anything of it stays.
func start(t *testing.T, services ...machine.Service) (*machine.Machine, machine.Spec) {
	t.Helper()
	testenv.NeedRoot(t)
	init := os.Getenv("FATHOM_INIT") // where there is no Go, such as in test/vm
	if init == "" {
		init = filepath.Join(t.TempDir(), "fathom-init")
		build := exec.Command("go", "build", "-o", init, "../../../cmd/fathom-init")
		build.Env = append(os.Environ(), "CGO_ENABLED=0")
		if out, err := build.CombinedOutput(); err != nil {
			t.Fatalf("build fathom-init: %v\n%s", err, out)
		}
	}
	// Not t.TempDir: /tmp may be a tmpfs, and the machine hides it.
	dir, err := os.MkdirTemp("/var/lib", "fathom-machine-test-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	parent := "fathom-test-" + filepath.Base(dir)
	spec := machine.Spec{Hostname: "m1", Dir: dir, Cgroup: parent + "/m1", Services: services}
	t.Cleanup(func() {
		if err := machine.Kill(context.Background(), parent); err != nil {
			t.Error(err)
		}
		if err := cgroup.Remove(parent); err != nil {
			t.Error(err)
		}
		mounts, _ := os.ReadFile("/proc/self/mounts")
		if strings.Contains(string(mounts), dir) {
			t.Errorf("the host has a mount of the machine:\n%s", mounts)
		}
	})
	m, err := machine.Start(t.Context(), init, spec)
	if err != nil {
		t.Fatal(err)
	}
	return m, spec
}

func TestMachineIsAlone(t *testing.T) {
	m, spec := start(t, machine.Service{Name: "sleeper", Args: []string{"/bin/sleep", "1000000"}, Log: "/var/log/sleeper.log"})

	found, err := machine.Open(spec.Cgroup)
	if err != nil || found.Pid != m.Pid {
		t.Fatalf("Open gives %+v, %v; want pid %d", found, err, m.Pid)
	}
	for _, tc := range []struct {
		name, want string
		args       []string
	}{
		{"host name", "m1\n", []string{"uname", "-n"}},
		{"cgroups of its own", "", []string{"grep", "-v", "-e", ":/$", "-e", ":/init$", "/proc/self/cgroup"}},
		{"init", "fathom-init\n", []string{"cat", "/proc/1/comm"}},
		{"devices", "lo\n", []string{"ls", "/sys/class/net"}},
		{"no foreign mounts", "", []string{"sh", "-c", "grep " + spec.Dir + " /proc/self/mounts | grep -v -e ' / ' -e ' /var '"}},
		{"sysctls of its own", "1\n", []string{"cat", "/proc/sys/vm/overcommit_memory"}},
		{"the host's sysctls are read-only", "no\n", []string{"sh", "-c", "(echo 5 > /proc/sys/kernel/pid_max) 2>/dev/null || echo no"}},
		{"network sysctls are writable", "1\n", []string{"sh", "-c", "echo 1 > /proc/sys/net/ipv4/ip_forward && cat /proc/sys/net/ipv4/ip_forward"}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			out, err := m.Output(t.Context(), tc.args...)
			if out != tc.want {
				t.Errorf("%q printed %q (%v), want %q", tc.args, out, err, tc.want)
			}
		})
	}
	out, err := m.Output(t.Context(), "ps", "-eo", "comm")
	if err != nil || !strings.Contains(out, "sleep") || strings.Count(out, "\n") != 4 {
		t.Errorf("ps shows other processes than init, sleep and itself: %v\n%s", err, out)
	}
	if _, err := m.Output(t.Context(), "no-such-program"); !errors.Is(err, exec.ErrNotFound) {
		t.Errorf("a program that is not there gives %v, want exec.ErrNotFound", err)
	}
	if host, _ := os.ReadFile("/proc/sys/net/ipv4/ip_forward"); string(host) == "" {
		t.Error("the host's sysctl cannot be read")
	}
}

func TestServiceIsRestarted(t *testing.T) {
	m, _ := start(t, machine.Service{Name: "sleeper", Args: []string{"/bin/sleep", "1000000"}, Log: "/var/log/sleeper.log"})
	status := func() machine.ServiceStatus {
		resp, err := m.Control(t.Context(), machine.Request{Op: machine.OpStatus})
		if err != nil {
			t.Fatal(err)
		}
		return resp.Services[0]
	}
	first := status()
	if first.Pid == 0 {
		t.Fatalf("the service is not running: %+v", first)
	}
	if _, err := m.Output(t.Context(), "sh", "-c", "kill -9 $(pidof sleep)"); err != nil {
		t.Fatal(err)
	}
	deadline := time.Now().Add(30 * time.Second)
	for {
		now := status()
		if now.Pid != 0 && now.Pid != first.Pid && now.Restarts == 1 {
			break
		}
		if time.Now().After(deadline) {
			t.Fatalf("the service was not restarted: %+v", now)
		}
		time.Sleep(10 * time.Millisecond)
	}
	if _, err := m.Control(t.Context(), machine.Request{Op: machine.OpStart, Service: "nothing"}); err == nil {
		t.Error("starting a service that is not there gives no error")
	}
}

func TestPowerOff(t *testing.T) {
	m, spec := start(t, machine.Service{Name: "sleeper", Args: []string{"/bin/sleep", "1000000"}, Log: "/var/log/sleeper.log"})
	if err := m.PowerOff(t.Context()); err != nil {
		t.Fatal(err)
	}
	if _, err := machine.Open(spec.Cgroup); !errors.Is(err, machine.ErrNotRunning) {
		t.Errorf("after power-off Open gives %v, want ErrNotRunning", err)
	}
}

func TestStartSaysWhatIsWrong(t *testing.T) {
	_, spec := start(t)
	if _, err := machine.Start(t.Context(), "/bin/true", spec); err == nil || !strings.Contains(err.Error(), "it is running") {
		t.Errorf("a second start gives %v", err)
	}
	spec.Cgroup += "-2"
	if _, err := machine.Start(t.Context(), "/bin/true", spec); err == nil || !strings.Contains(err.Error(), "init.log") {
		t.Errorf("an init that ends at once gives %v", err)
	}
}
