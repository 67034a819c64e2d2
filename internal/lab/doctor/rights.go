package doctor

import (
	"context"
	"fmt"
	"os"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// capability is a privilege of root that containers often lack.
type capability struct {
	bit    int
	name   string
	needed bool
	why    string // what does not work without it
}

var capabilities = []capability{
	{unix.CAP_SYS_ADMIN, "SYS_ADMIN", true, "no namespaces and mounts"},
	{unix.CAP_NET_ADMIN, "NET_ADMIN", true, "no links, addresses and packet rules"},
	{unix.CAP_SYS_CHROOT, "SYS_CHROOT", true, "nodes have no root file system of their own"},
	{unix.CAP_MKNOD, "MKNOD", true, "containers have no devices"},
	{unix.CAP_SETUID, "SETUID", true, "containers cannot run as another user"},
	{unix.CAP_SETGID, "SETGID", true, "containers cannot run as another group"},
	{unix.CAP_CHOWN, "CHOWN", true, "images cannot be unpacked"},
	{unix.CAP_DAC_OVERRIDE, "DAC_OVERRIDE", true, "containers' files are out of reach"},
	{unix.CAP_KILL, "KILL", true, "containers of other users cannot be stopped"},
	{unix.CAP_NET_RAW, "NET_RAW", false, "no ping from pods, no packet capture"},
	{unix.CAP_SYS_PTRACE, "SYS_PTRACE", false, "processes of containers with other users cannot be inspected"},
	{unix.CAP_SYS_RESOURCE, "SYS_RESOURCE", false, "the kernel's out-of-memory order of pods is not set, and limits cannot be raised"},
}

const privileged = "in a container, start it with --privileged"

func (e *exam) rights(context.Context) {
	if uid := os.Geteuid(); uid != 0 {
		e.fail(rights, "root", fmt.Sprintf("running as user %d", uid), "run it with sudo")
	} else {
		e.have(true, rights, "root", "running as root")
		e.capabilities(e.host.read("/proc/self/status"))
	}
	e.namespaces()
	e.kernelFiles()
}

// capabilities reads the effective set from the text of /proc/self/status.
func (e *exam) capabilities(status string) {
	var set uint64
	for line := range strings.Lines(status) {
		if hex, found := strings.CutPrefix(line, "CapEff:"); found {
			set, _ = strconv.ParseUint(strings.TrimSpace(hex), 16, 64)
		}
	}
	complete := true
	for _, c := range capabilities {
		if set&(1<<c.bit) != 0 || e.Quick && !c.needed {
			continue
		}
		complete = false
		e.miss(c.needed, rights, "CAP_"+c.name, "missing: "+c.why, privileged)
	}
	if complete {
		e.have(true, rights, "capabilities", "all that a lab needs")
	}
}

func (e *exam) namespaces() {
	var missing []string
	for _, ns := range []string{"net", "mnt", "pid", "uts", "ipc", "cgroup"} {
		if _, err := os.Lstat(e.host.path("/proc/self/ns/" + ns)); err != nil {
			missing = append(missing, ns)
		}
	}
	if len(missing) > 0 {
		e.fail(rights, "namespaces", "not in this kernel: "+strings.Join(missing, ", "), "use a kernel with CONFIG_NAMESPACES and all of its kinds")
		return
	}
	// Each node has one namespace of each kind; each pod has a network namespace and a few more.
	want := 64 * e.Nodes
	for _, kind := range []string{"net", "mnt", "pid", "uts", "ipc", "cgroup"} {
		key := "user.max_" + kind + "_namespaces"
		n, known := e.host.number("/proc/sys/" + strings.ReplaceAll(key, ".", "/"))
		if known && n < want {
			e.miss(n < 4*e.Nodes, rights, "namespaces", fmt.Sprintf("%s is %d; %d nodes with pods need up to %d", key, n, e.Nodes, want),
				fmt.Sprintf("sysctl -w %s=%d", key, max(want, 16384)))
			return
		}
	}
	e.have(true, rights, "namespaces", "net, mnt, pid, uts, ipc and cgroup")
}

// kernelFiles checks the files that kubelet opens at its start and needs.
func (e *exam) kernelFiles() {
	if os.Geteuid() != 0 {
		return
	}
	for _, f := range []struct {
		path, why string
		mode      int
	}{
		{"/proc/sys/vm/overcommit_memory", "kubelet sets it at its start", os.O_WRONLY},
		{"/dev/kmsg", "kubelet reads the kernel's log to see processes run out of memory", os.O_RDONLY},
	} {
		file, err := os.OpenFile(e.host.path(f.path), f.mode, 0)
		if err != nil {
			e.fail(rights, f.path, fmt.Sprintf("%v; %s", err, f.why), privileged)
			continue
		}
		file.Close()
		e.have(true, rights, f.path, "accessible")
	}
}
