package cni_test

import (
	"bytes"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/fathom-network/fathom/internal/cni"
	"github.com/fathom-network/fathom/internal/kernel/link"
	"github.com/fathom-network/fathom/internal/kernel/podlink"
	"github.com/fathom-network/fathom/internal/testenv"
	"github.com/fathom-network/fathom/internal/testenv/linktest"
)

// asPlugin has the test's program be the plugin where it is run as one, and what the plugin runs to delete a device: of
// pods with these names, that goes wrong.
func asPlugin() bool {
	args := os.Args[1:]
	if !cni.DeletesDevice(args) {
		if os.Getenv("CNI_COMMAND") == "" {
			return false
		}
		if err := cni.Main(os.Stdout, ""); err != nil {
			_ = err.Print()
			os.Exit(1)
		}
		return true
	}
	pod := strings.Fields(strings.TrimPrefix(args[len(args)-1], "fathom pod default/"))[0]
	switch pod {
	case "dies":
		_ = unix.Kill(os.Getpid(), unix.SIGKILL)
	case "fails":
		os.Exit(1)
	case "hangs":
		_ = unix.Pause()
	}
	if err := cni.DeleteDevice(args); err != nil {
		os.Exit(1)
	}
	if pod == "lingers" {
		_ = unix.Pause()
	}
	return true
}

// TestDelete: whatever becomes of the process that is to delete the device, the device has gone when DEL returns.
func TestDelete(t *testing.T) {
	n := newNode(t)
	n.write(t, "1.1.0")
	bystander := newPod(t, "bystander")
	r, e := n.call(t, "ADD", bystander, nil)
	if e != nil {
		t.Fatal(e)
	}
	self, err := os.ReadFile("/proc/self/exe")
	testenv.Must(t, err)
	// Who has lost his parent comes to this process.
	testenv.Must(t, unix.Prctl(unix.PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0))
	defer func() { testenv.Must(t, unix.Prctl(unix.PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)) }()
	for _, name := range []string{"web-0", "lingers", "dies", "fails", "hangs", "unexecutable"} {
		t.Run(name, func(t *testing.T) {
			p := newPod(t, name)
			if _, e := n.call(t, "ADD", p, nil); e != nil {
				t.Fatal(e)
			}
			cmd := n.command(t, "DEL", p, nil)
			conf := cmd.Stdin
			cmd.Path, cmd.Stdin = filepath.Join(t.TempDir(), "plugin"), nil
			testenv.Must(t, os.WriteFile(cmd.Path, self, 0o755))
			in, err := cmd.StdinPipe()
			testenv.Must(t, err)
			read, write, err := os.Pipe()
			testenv.Must(t, err)
			defer read.Close()
			testenv.Must(t, read.SetReadDeadline(time.Now().Add(time.Minute))) // or one that never ends would be for ever
			cmd.Stdout, cmd.Stderr = write, write
			testenv.Must(t, n.Start(cmd))
			write.Close()
			if name == "unexecutable" { // from now on
				testenv.Must(t, os.Chmod(cmd.Path, 0))
			}
			_, err = io.Copy(in, conf)
			testenv.Must(t, err)
			testenv.Must(t, in.Close())
			// As a runtime does: to the end of what the plugin says, and then to its own.
			if said, err := io.ReadAll(read); err != nil || len(said) > 0 {
				t.Errorf("the plugin says %q, %v", said, err)
			}
			if err := cmd.Wait(); err != nil {
				t.Errorf("DEL: %v", err)
			}
			gone(t, n, p)

			orphans := orphans(t)
			switch {
			case name == "web-0": // it may have ended
			case name == "lingers" && len(orphans) == 1 && orphans[0].state != "Z":
				testenv.Must(t, unix.Kill(orphans[0].pid, unix.SIGKILL))
			case len(orphans) > 0 || name == "lingers":
				t.Errorf("DEL leaves processes: %+v", orphans)
			}
			for _, o := range orphans {
				var status unix.WaitStatus
				if _, err := unix.Wait4(o.pid, &status, 0, nil); err != nil || name == "web-0" && status != 0 {
					t.Errorf("what deletes the device ends with %v, %v", status, err)
				}
			}
			if _, e := n.call(t, "DEL", p, nil); e != nil {
				t.Errorf("a second DEL: %v", e)
			}
		})
	}
	if devices, err := podlink.Devices(n.Namespace); err != nil || len(devices) != 1 || devices[0].Name != r.Interfaces[0].Name {
		t.Errorf("left devices %v, %v", devices, err)
	}
	if _, e := n.call(t, "DEL", bystander, nil); e != nil {
		t.Error(e)
	}
	n.clean(t)
}

// gone fails if anything of the pod's device is there, on the node or in the pod.
func gone(t *testing.T, n *node, p pod) {
	t.Helper()
	devices, err := podlink.Devices(n.Namespace)
	for _, d := range devices {
		if strings.Contains(d.Alias, "/"+p.name+" ") {
			t.Errorf("the node has device %s", d.Name)
		}
	}
	testenv.Must(t, err)
	for _, in := range []*link.Namespace{n.Namespace, p.Namespace} {
		device := "eth0"
		if in == n.Namespace {
			device = p.name[:4]
		}
		for _, args := range [][]string{{"-o", "link"}, {"-4", "route"}, {"-6", "route"}, {"-4", "neigh"}, {"-6", "neigh"}} {
			out, err := linktest.Try(in, append([]string{"ip"}, args...)...)
			if err != nil || strings.Contains(out, device) {
				t.Errorf("ip %s: %s%v", strings.Join(args, " "), out, err)
			}
		}
	}
}

// orphan is a child of this process that it has not started.
type orphan struct {
	pid   int
	state string
}

func orphans(t *testing.T) (all []orphan) {
	t.Helper()
	stats, err := filepath.Glob("/proc/[0-9]*/stat")
	testenv.Must(t, err)
	for _, path := range stats {
		stat, err := os.ReadFile(path)
		if err != nil {
			continue // it has ended
		}
		fields := strings.Fields(string(stat[bytes.LastIndexByte(stat, ')')+1:]))
		if fields[1] != strconv.Itoa(os.Getpid()) {
			continue
		}
		pid, err := strconv.Atoi(filepath.Base(filepath.Dir(path)))
		testenv.Must(t, err)
		all = append(all, orphan{pid, fields[0]})
	}
	return all
}

// TestDeleteDevice gives the program itself the argument that DEL gives it.
func TestDeleteDevice(t *testing.T) {
	n := newNode(t)
	if _, e := n.call(t, "ADD", newPod(t, "web-0"), nil); e != nil {
		t.Fatal(e)
	}
	devices, err := podlink.Devices(n.Namespace)
	testenv.Must(t, err)
	d := devices[0]
	index := fmt.Sprint(d.Index)
	plugin, err := program()
	testenv.Must(t, err)
	const usage = "delete-device is what DEL runs"
	for _, c := range []struct {
		args []string
		says string
		left int
	}{
		{nil, usage, 1},
		{[]string{index, d.Name}, usage, 1},
		{[]string{d.Name, d.Name, d.Alias}, usage, 1},
		{[]string{"0", d.Name, d.Alias}, usage, 1},
		{[]string{"1", "lo", ""}, "it belongs to something else", 1},
		{[]string{index, d.Name, "fathom pod default/web-1 eth0"}, "it belongs to something else", 1},
		{[]string{index, d.Name, ""}, "it belongs to something else", 1},
		{[]string{index, "web-1", d.Alias}, "", 1},
		{[]string{fmt.Sprint(d.Index + 1), d.Name, d.Alias}, "", 1}, // the name has another device by now
		{[]string{index, d.Name, d.Alias}, "", 0},
		{[]string{index, d.Name, d.Alias}, "", 0},
	} {
		cmd := exec.Command(plugin, append([]string{"delete-device"}, c.args...)...)
		var out bytes.Buffer
		cmd.Env, cmd.Stdout, cmd.Stderr = []string{}, &out, &out
		testenv.Must(t, n.Start(cmd))
		err := cmd.Wait()
		devices, listErr := podlink.Devices(n.Namespace)
		testenv.Must(t, listErr)
		if (err == nil) != (c.says == "") || !strings.Contains(out.String(), c.says) || len(devices) != c.left {
			t.Errorf("%q: %v, %s, and %v stay", c.args, err, out.String(), devices)
		}
	}
}
