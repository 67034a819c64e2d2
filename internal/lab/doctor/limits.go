package doctor

import (
	"context"
	"fmt"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// What a lab needs: measured, with a margin.
const (
	memoryPerCluster = 700 << 20 // a control plane
	memoryPerNode    = 100 << 20 // kubelet, containerd and a few small pods
	// inotify instances of root: 7 of a kubelet, 2 of a containerd, 1 of a kube-proxy; 6 of the API server, 4 of the
	// controller manager.
	inotifyPerNode         = 10
	inotifyPerControlPlane = 10
	watchesPerNode         = 1024
	threadsPerNode         = 512
	filesPerProcess        = 8192 // etcd and the API server with their clients
)

func (e *exam) limits(context.Context) {
	e.inotify()
	if e.Quick {
		return // The other checks never fail.
	}
	e.memory()
	for _, l := range []struct {
		key  string
		want int
		set  int
		why  string
	}{
		{"fs.inotify.max_user_watches", 8192 + watchesPerNode*e.Nodes, 524288, "kubelets and containerds watch files"},
		{"kernel.pid_max", 8192 + threadsPerNode*e.Nodes, 4194304, "the lab's processes and threads also have PIDs of the host"},
		{"kernel.threads-max", 8192 + threadsPerNode*e.Nodes, 4194304, "each node runs hundreds of threads"},
		{"kernel.keys.root_maxkeys", 1000 + 100*e.Nodes, 1000000, "each container takes a keyring"},
		{"kernel.keys.root_maxbytes", 25000 + 2500*e.Nodes, 25000000, "each container takes a keyring"},
	} {
		n, known := e.host.number("/proc/sys/" + strings.ReplaceAll(l.key, ".", "/"))
		switch {
		case !known:
		case n < l.want:
			e.warn(limits, l.key, fmt.Sprintf("%d; %d nodes need about %d: %s", n, e.Nodes, l.want, l.why), fmt.Sprintf("sysctl -w %s=%d", l.key, max(l.set, l.want)))
		default:
			e.ok(limits, l.key, fmt.Sprint(n))
		}
	}
	var files unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &files); err == nil {
		if files.Max < filesPerProcess {
			e.warn(limits, "open files", fmt.Sprintf("at most %d per process; etcd and the API server need %d", files.Max, filesPerProcess), "ulimit -Hn 65536, as root, before fathom up")
		} else {
			e.ok(limits, "open files", fmt.Sprintf("up to %d per process", files.Max))
		}
	}
	if swaps := strings.Count(e.host.read("/proc/swaps"), "\n"); swaps > 0 {
		e.warn(limits, "swap", "on: pods that run out of memory slow down instead of being killed", "swapoff -a")
	} else {
		e.ok(limits, "swap", "off")
	}
}

// inotify checks that the lab's programs can watch files. Where the kernel refuses, they do not start, or start and do not
// notice changes, and log no more than "too many open files".
func (e *exam) inotify() {
	const key = "fs.inotify.max_user_instances"
	want := inotifyPerNode*e.Nodes + inotifyPerControlPlane*e.ControlPlanes
	free := e.host.inotifyFree(want)
	if free >= want {
		e.have(true, limits, key, fmt.Sprintf("at least %d are free, which the lab needs", want))
		return
	}
	limit, _ := e.host.number("/proc/sys/fs/inotify/max_user_instances")
	e.fail(limits, key, fmt.Sprintf("%d of %d are free; %d nodes need about %d, and without them kubelets exit with \"too many open files\"", free, limit, e.Nodes, want),
		fmt.Sprintf("sysctl -w %s=%d", key, max(1024, 2*(limit-free+want))))
}

// memory compares the available memory with what the lab needs.
func (e *exam) memory() {
	var available uint64
	for line := range strings.Lines(e.host.read("/proc/meminfo")) {
		if f := strings.Fields(line); len(f) > 1 && f[0] == "MemAvailable:" {
			if kib, err := strconv.ParseUint(f[1], 10, 64); err == nil {
				available = kib << 10
			}
		}
	}
	if available == 0 {
		return
	}
	want := uint64(e.Clusters)*memoryPerCluster + uint64(e.Nodes)*memoryPerNode
	found := fmt.Sprintf("%s available; %d clusters with %d nodes need about %s", size(available), e.Clusters, e.Nodes, size(want))
	if available < want {
		e.warn(limits, "memory", found, "start fewer clusters or nodes: fathom up --clusters 1 --workers 1")
		return
	}
	e.ok(limits, "memory", found)
}
