// Package link makes wires: network namespaces, veth pairs, bridges, addresses, routes and rate limits. Every function
// takes the whole desired state and may be repeated. Each device carries an alias, and each route a protocol number, that
// says that it is ours. Pods' devices are package podlink's, and what leads to other nodes' pods is podroute's.
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
	here bool // it is the process's own
	// sysctls is /proc/sys/net or where it can be written.
	sysctls string
}

// The main goroutine keeps the main thread, so that no other one enters a namespace on it: /proc/self is the main
// thread's, and a thread that has left the process's namespace and cannot end, as the main one cannot, would make
// it another's for good.
func init() { runtime.LockOSThread() }

// Create makes a network namespace that lives as long as the file at path, which it is mounted on. A
// namespace that is there already is kept.
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

// IsNamespace says whether a namespace is mounted at path.
func IsNamespace(path string) bool {
	var st unix.Statfs_t
	return unix.Statfs(path, &st) == nil && st.Type == unix.NSFS_MAGIC
}

// Delete takes a namespace of Create away. One that is not there is not an error. Devices in it go with
// it, unless a process lives in it.
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
		return nil, fmt.Errorf("open network namespace %s: it is no namespace", path)
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

// Path is where the namespace is found for as long as it is open, by this process.
func (n *Namespace) Path() string { return fmt.Sprintf("/proc/self/fd/%d", n.file.Fd()) }

// OwnNetNS is the path of the namespace that the process is in. It is that of its main thread, whichever thread asks: one that
// entered another namespace does not change it.
const OwnNetNS = "/proc/self/ns/net"

// Fd is the file descriptor of the namespace, for as long as it is open.
func (n *Namespace) Fd() int { return int(n.file.Fd()) }

// Netlink is the netlink library's socket in the namespace, for the packages beside this one that make devices and routes.
func (n *Namespace) Netlink() *netlink.Handle { return n.nl }

// Here opens the namespace that the process is in.
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

// Is says whether both are the same namespace.
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

// Close closes the namespace. It goes on existing while it is mounted or lived in.
func (n *Namespace) Close() {
	n.nl.Close()
	n.file.Close()
}

// Do runs f on a thread in the namespace. Sockets that f opens stay there. f must start no goroutine, and enter no
// other namespace.
func (n *Namespace) Do(f func() error) error {
	if n.here { // every thread that runs Go code is in it, but those that do starts, which run nothing else
		return f()
	}
	done := make(chan error)
	go func() {
		runtime.LockOSThread() // never unlocked: a thread that changed its namespace is not used again
		if err := unix.Setns(int(n.file.Fd()), unix.CLONE_NEWNET); err != nil {
			done <- fmt.Errorf("enter network namespace %s: %w", n.path, err)
			return
		}
		done <- f()
	}()
	return <-done
}

// SysctlsAt has settings read and written below dir, a mount of /proc/sys/net: in a container /proc/sys itself is
// read-only, and what a mount of it shows is all the same that of the namespace that asks.
func (n *Namespace) SysctlsAt(dir string) { n.sysctls = dir }

// SysctlPath is the file of a setting, in the namespace of the thread that opens it.
func (n *Namespace) SysctlPath(name string) string {
	if n.sysctls == "" {
		return filepath.Join("/proc/sys/net", name)
	}
	return filepath.Join(n.sysctls, name)
}

// SysctlValue reads a setting below /proc/sys/net. One that the kernel does not have is an error that errors.Is says is
// fs.ErrNotExist.
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

// Sysctl sets a setting below /proc/sys/net, such as "ipv4/ip_forward".
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
