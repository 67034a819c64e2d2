// Package link makes wires: network namespaces, veth pairs, bridges, addresses, routes and rate limits. Every function
// takes the whole desired state and is idempotent. An alias marks each device as ours, and a protocol number each route.
// Pods' devices are in package podlink, and routes to other nodes' pods in podroute.
package link

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// Namespace is an open network namespace.
type Namespace struct {
	path string
	file *os.File
	nl   *netlink.Handle
	here bool // the process's own namespace
	// sysctls is /proc/sys/net, or another mount of it that is writable.
	sysctls string
}

// The main goroutine keeps the main thread, so that no other goroutine enters a namespace on it: /proc/self is the main
// thread's. A thread that has left the process's namespace is ended; the main thread cannot end, and would make /proc/self
// refer to the other namespace for good.
func init() { runtime.LockOSThread() }

// Create makes a network namespace that is mounted at path and exists for as long as the mount. An existing namespace is
// kept.
func Create(path string) error {
	if IsNamespace(path) {
		return nil
	}
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return err
	}
	f, err := os.OpenFile(path, os.O_CREATE|os.O_RDONLY, 0o444)
	if err != nil {
		return err
	}
	f.Close()
	done := make(chan error)
	go func() {
		runtime.LockOSThread() // never unlocked: the thread ends with the goroutine
		err := unix.Unshare(unix.CLONE_NEWNET)
		if err == nil {
			err = unix.Mount(fmt.Sprintf("/proc/self/task/%d/ns/net", unix.Gettid()), path, "", unix.MS_BIND, "")
		}
		done <- err
	}()
	if err := <-done; err != nil {
		os.Remove(path)
		return fmt.Errorf("create network namespace %s: %w", path, err)
	}
	return nil
}

// IsNamespace reports whether a namespace is mounted at path.
func IsNamespace(path string) bool {
	var st unix.Statfs_t
	return unix.Statfs(path, &st) == nil && st.Type == unix.NSFS_MAGIC
}

// Delete deletes a namespace that Create made. One that does not exist is not an error. Devices in it go with it, unless a
// process still runs in it.
func Delete(path string) error {
	if IsNamespace(path) {
		if err := unix.Unmount(path, unix.MNT_DETACH); err != nil {
			return fmt.Errorf("delete network namespace %s: %w", path, err)
		}
	}
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("delete network namespace %s: %w", path, err)
	}
	return nil
}

// Open opens the namespace at path: one of Create's, or /proc/PID/ns/net.
func Open(path string) (*Namespace, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, fmt.Errorf("open network namespace: %w", err)
	}
	if !IsNamespace(path) {
		f.Close()
		return nil, fmt.Errorf("open network namespace %s: it is not a namespace", path)
	}
	n := &Namespace{path: path, file: f}
	// Not netlink.NewHandleAt: it reads the thread's namespace through /proc/self, the main thread's.
	if err := n.Do(func() error {
		var err error
		n.nl, err = netlink.NewHandle(unix.NETLINK_ROUTE)
		return err
	}); err != nil {
		f.Close()
		return nil, fmt.Errorf("open network namespace %s: %w", path, err)
	}
	return n, nil
}

// Path is where this process finds the namespace for as long as it is open.
func (n *Namespace) Path() string { return fmt.Sprintf("/proc/self/fd/%d", n.file.Fd()) }

// OwnNetNS is the path of the process's own namespace: that of its main thread, whichever thread opens it. A thread that
// entered another namespace does not change it.
const OwnNetNS = "/proc/self/ns/net"

// Fd is the namespace's file descriptor, valid while it is open.
func (n *Namespace) Fd() int { return int(n.file.Fd()) }

// Netlink returns the netlink library's socket in the namespace, for podlink and podroute.
func (n *Namespace) Netlink() *netlink.Handle { return n.nl }

// Here opens the process's own namespace.
func Here() (*Namespace, error) {
	const path = "/proc/thread-self/ns/net"
	f, err := os.Open(path)
	if err != nil {
		return nil, fmt.Errorf("open network namespace: %w", err)
	}
	nl, err := netlink.NewHandle(unix.NETLINK_ROUTE)
	if err != nil {
		f.Close()
		return nil, fmt.Errorf("open network namespace %s: %w", path, err)
	}
	return &Namespace{path: path, file: f, nl: nl, here: true}, nil
}

// Is reports whether both are the same namespace.
func (n *Namespace) Is(other *Namespace) (bool, error) {
	a, err := n.file.Stat()
	if err != nil {
		return false, err
	}
	b, err := other.file.Stat()
	if err != nil {
		return false, err
	}
	return os.SameFile(a, b), nil
}

// Close closes the namespace. The namespace itself exists for as long as it is mounted or a process runs in it.
func (n *Namespace) Close() {
	n.nl.Close()
	n.file.Close()
}

// Do runs f on a thread in the namespace. Sockets that f opens stay in it. f must not start goroutines or enter other
// namespaces.
func (n *Namespace) Do(f func() error) error {
	if n.here { // every thread that runs Go code is in it, except the threads that Do starts, which run only f
		return f()
	}
	done := make(chan error)
	go func() {
		runtime.LockOSThread() // never unlocked: Go ends the thread with the goroutine
		if err := unix.Setns(int(n.file.Fd()), unix.CLONE_NEWNET); err != nil {
			done <- fmt.Errorf("enter network namespace %s: %w", n.path, err)
			return
		}
		done <- f()
	}()
	return <-done
}

// SysctlsAt makes sysctls be read and written below dir, another mount of /proc/sys/net: in a container /proc/sys itself is
// read-only. The mount shows the settings of the reading thread's namespace all the same.
func (n *Namespace) SysctlsAt(dir string) { n.sysctls = dir }

// SysctlPath returns the file of a sysctl. It shows the namespace of the thread that opens it.
func (n *Namespace) SysctlPath(name string) string {
	if n.sysctls == "" {
		return filepath.Join("/proc/sys/net", name)
	}
	return filepath.Join(n.sysctls, name)
}

// SysctlValue reads a sysctl below /proc/sys/net. If the kernel does not have it, errors.Is(err, fs.ErrNotExist).
func (n *Namespace) SysctlValue(name string) (value string, err error) {
	err = n.Do(func() error {
		data, err := os.ReadFile(n.SysctlPath(name))
		if err != nil {
			return fmt.Errorf("read sysctl net/%s: %w", name, err)
		}
		value = strings.TrimSpace(string(data))
		return nil
	})
	return value, err
}

// Sysctl writes a sysctl below /proc/sys/net, such as "ipv4/ip_forward".
func (n *Namespace) Sysctl(name, value string) error {
	return n.Do(func() error {
		// /proc/sys/net shows the namespace of the thread that opens the file.
		if err := os.WriteFile(n.SysctlPath(name), []byte(value), 0o644); err != nil {
			return fmt.Errorf("set sysctl net/%s to %s: %w", name, value, err)
		}
		return nil
	})
}

// Start starts a command in the namespace. The caller waits for it.
func (n *Namespace) Start(cmd *exec.Cmd) error { return n.Do(cmd.Start) }
