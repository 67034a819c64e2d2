// Package boot is what runs as a machine's first process: it builds the machine's root file system inside
// the namespaces that machine.Start made, then starts and keeps its services until the machine ends.
package boot

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/fathom-network/fathom/internal/kernel/cgroup"
	"github.com/fathom-network/fathom/internal/kernel/machine"
)

// Setup makes the calling process, alone in new mount, PID, UTS, IPC and network namespaces, the root of a
// machine: cgroup namespace, root file system, /proc, /sys, /dev, host name. The caller must have locked
// its goroutine to its thread and must exec right after: the cgroup namespace is the thread's alone.
func Setup(spec machine.Spec) error {
	for _, step := range []struct {
		what string
		do   func(machine.Spec) error
	}{
		{"join the machine's cgroup", joinCgroup},
		{"make the root file system", mountRoot},
		{"mount /proc, /sys and /dev", mountKernel},
		{"mount cgroups", mountCgroups},
		{"mount the extra directories", mountBinds},
		{"change to the new root", changeRoot},
		{"set the host name", func(s machine.Spec) error { return unix.Sethostname([]byte(s.Hostname)) }},
		{"bring up the loopback device", loopbackUp},
	} {
		if err := step.do(spec); err != nil {
			return fmt.Errorf("machine %s: %s: %w", spec.Hostname, step.what, err)
		}
	}
	return nil
}

// initGroup is where init and the services live below the machine's group: in cgroup v2 a group with
// processes of its own cannot hand controllers to the groups below it, which containers need.
const initGroup = "init"

func joinCgroup(spec machine.Spec) error {
	runtime.LockOSThread()
	if err := cgroup.Enter(spec.Cgroup); err != nil {
		return err
	}
	if err := unix.Unshare(unix.CLONE_NEWCGROUP); err != nil {
		return fmt.Errorf("unshare the cgroup namespace: %w", err)
	}
	_, mode, err := cgroup.Hierarchies()
	if err != nil || mode != cgroup.V2 {
		return err
	}
	return cgroup.Nest(spec.Cgroup, initGroup)
}

// Become makes the calling process, which is inside a machine but for the cgroup namespace and the groups of cgroup v1,
// another program all inside. It returns only if that fails.
func Become(path string, argv []string) error {
	runtime.LockOSThread() // exec carries the namespace of this thread to the whole process
	if err := cgroup.Add("/", 0); err != nil {
		return err
	}
	fd, err := unix.Open("/proc/1/ns/cgroup", unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err == nil {
		err = unix.Setns(fd, unix.CLONE_NEWCGROUP)
	}
	if err != nil {
		return fmt.Errorf("enter the cgroup namespace: %w", err)
	}
	return fmt.Errorf("execute %s: %w", path, unix.Exec(path, argv, os.Environ()))
}

// rootDir returns where path of the machine is while the root is not changed yet.
func rootDir(spec machine.Spec, path ...string) string {
	return filepath.Join(append([]string{spec.Dir, "root"}, path...)...)
}

func mountRoot(spec machine.Spec) error {
	// Nothing that the machine mounts may show on the host.
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return fmt.Errorf("make mounts private: %w", err)
	}
	if err := overlay([]string{"/"}, filepath.Join(spec.Dir, "upper"), filepath.Join(spec.Dir, "work"), rootDir(spec)); err != nil {
		return err
	}
	// A lower layer does not include what is mounted on it: a /usr on its own file system is bound in.
	var host unix.Stat_t
	if err := unix.Stat("/", &host); err != nil {
		return err
	}
	for _, dir := range []string{"/usr", "/bin", "/sbin", "/lib", "/lib64", "/opt"} {
		var st unix.Stat_t
		if unix.Lstat(dir, &st) == nil && st.Mode&unix.S_IFMT == unix.S_IFDIR && st.Dev != host.Dev {
			if err := bind(dir, rootDir(spec, dir), false); err != nil {
				return err
			}
		}
	}
	for i, o := range spec.Overlays {
		upper := spec.Upper(i)
		work := filepath.Join(filepath.Dir(upper), "work")
		for _, dir := range []string{upper, work, rootDir(spec, o.Target)} {
			if err := os.MkdirAll(dir, 0o755); err != nil {
				return err
			}
		}
		if err := overlay(o.Lower, upper, work, rootDir(spec, o.Target)); err != nil {
			return err
		}
	}
	// An overlay cannot sit on an overlay, and containers' roots are overlays: /var is a real directory.
	if err := bind(filepath.Join(spec.Dir, "var"), rootDir(spec, "var"), false); err != nil {
		return err
	}
	for _, m := range []struct{ target, options string }{{"run", "mode=755"}, {"tmp", "mode=1777"}} {
		if err := mkMount("tmpfs", "tmpfs", rootDir(spec, m.target), unix.MS_NOSUID|unix.MS_NODEV, m.options); err != nil {
			return err
		}
	}
	return nil
}

func overlay(lower []string, upper, work, target string) error {
	options := fmt.Sprintf("lowerdir=%s,upperdir=%s,workdir=%s", strings.Join(lower, ":"), upper, work)
	if err := unix.Mount("fathom", target, "overlay", 0, options); err != nil {
		return fmt.Errorf("mount overlay on %s (%s): %w", target, options, err)
	}
	return nil
}

func bind(source, target string, readOnly bool) error {
	st, err := os.Stat(source)
	if err != nil {
		return fmt.Errorf("bind %s: %w", source, err)
	}
	if st.IsDir() {
		err = os.MkdirAll(target, 0o755)
	} else if err = os.MkdirAll(filepath.Dir(target), 0o755); err == nil {
		var f *os.File
		if f, err = os.OpenFile(target, os.O_CREATE|os.O_RDONLY, 0o644); err == nil {
			err = f.Close()
		}
	}
	if err != nil {
		return fmt.Errorf("bind %s: make the mount point: %w", source, err)
	}
	if err := unix.Mount(source, target, "", unix.MS_BIND|unix.MS_REC, ""); err != nil {
		return fmt.Errorf("bind %s on %s: %w", source, target, err)
	}
	if readOnly {
		if err := unix.Mount("", target, "", unix.MS_BIND|unix.MS_REMOUNT|unix.MS_RDONLY, ""); err != nil {
			return fmt.Errorf("make %s read-only: %w", target, err)
		}
	}
	return nil
}

func mkMount(source, kind, target string, flags uintptr, options string) error {
	if err := os.MkdirAll(target, 0o755); err != nil {
		return err
	}
	if err := unix.Mount(source, target, kind, flags, options); err != nil {
		return fmt.Errorf("mount %s on %s: %w", kind, target, err)
	}
	return nil
}

// hostSysctls are settings of the whole host that kubelet sets when they differ from what it wants. The
// machine sees files of its own in their place, so that the host's stay as they are.
var hostSysctls = map[string]string{
	"vm/overcommit_memory":      "1",
	"vm/panic_on_oom":           "0",
	"kernel/panic":              "10",
	"kernel/panic_on_oops":      "1",
	"kernel/keys/root_maxkeys":  "1000000",
	"kernel/keys/root_maxbytes": "25000000",
}

func mountKernel(spec machine.Spec) error {
	const flags = unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC
	proc := rootDir(spec, "proc")
	if err := mkMount("proc", "proc", proc, flags, ""); err != nil {
		return err
	}
	// Of /proc/sys only net belongs to the machine; the rest is the host's and read-only here.
	sys := filepath.Join(proc, "sys")
	dir := rootDir(spec, "run", "sysctl")
	for name, value := range hostSysctls {
		file := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
			return err
		}
		if err := os.WriteFile(file, []byte(value+"\n"), 0o644); err != nil {
			return err
		}
		if _, err := os.Stat(filepath.Join(sys, name)); errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err := bind(file, filepath.Join(sys, name), false); err != nil {
			return err
		}
	}
	for _, dir := range []string{"fs", "kernel", "vm"} {
		path := filepath.Join(sys, dir)
		if err := unix.Mount(path, path, "", unix.MS_BIND|unix.MS_REC, ""); err != nil {
			return fmt.Errorf("bind %s: %w", path, err)
		}
		if err := unix.Mount("", path, "", unix.MS_BIND|unix.MS_REMOUNT|unix.MS_RDONLY|flags, ""); err != nil {
			return fmt.Errorf("make %s read-only: %w", path, err)
		}
	}

	// A new sysfs shows the devices of the machine's own network namespace.
	if err := mkMount("sysfs", "sysfs", rootDir(spec, "sys"), flags, ""); err != nil {
		return err
	}
	if err := unix.Mount("bpf", rootDir(spec, "sys/fs/bpf"), "bpf", flags, "mode=0700"); err != nil && !errors.Is(err, unix.ENODEV) && !errors.Is(err, unix.ENOENT) {
		return fmt.Errorf("mount bpf: %w", err)
	}
	return mountDev(rootDir(spec, "dev"))
}

func mountDev(dev string) error {
	if err := mkMount("tmpfs", "tmpfs", dev, unix.MS_NOSUID, "mode=755,size=64k"); err != nil {
		return err
	}
	for _, name := range []string{"null", "zero", "full", "random", "urandom", "tty", "kmsg", "fuse", "net/tun"} {
		if _, err := os.Stat(filepath.Join("/dev", name)); err != nil {
			continue // this host has no such device, and so the machine has none
		}
		if err := bind(filepath.Join("/dev", name), filepath.Join(dev, name), false); err != nil {
			return err
		}
	}
	for _, m := range []struct {
		kind, target, options string
		flags                 uintptr
	}{
		{"devpts", "pts", "newinstance,ptmxmode=0666,mode=0620,gid=5", unix.MS_NOSUID | unix.MS_NOEXEC},
		{"tmpfs", "shm", "mode=1777", unix.MS_NOSUID | unix.MS_NODEV},
		{"mqueue", "mqueue", "", unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC},
	} {
		if err := mkMount(m.kind, m.kind, filepath.Join(dev, m.target), m.flags, m.options); err != nil {
			if m.kind == "mqueue" && errors.Is(err, unix.ENODEV) {
				continue
			}
			return err
		}
	}
	for link, target := range map[string]string{
		"ptmx": "pts/ptmx", "fd": "/proc/self/fd", "stdin": "/proc/self/fd/0",
		"stdout": "/proc/self/fd/1", "stderr": "/proc/self/fd/2", "core": "/proc/kcore",
	} {
		if err := os.Symlink(target, filepath.Join(dev, link)); err != nil {
			return err
		}
	}
	return nil
}

// mountCgroups mounts the hierarchies anew, so that the machine sees its own group as their root.
func mountCgroups(spec machine.Spec) error {
	all, mode, err := cgroup.Hierarchies()
	if err != nil {
		return err
	}
	const flags = unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC
	base := rootDir(spec, "sys/fs/cgroup")
	if mode == cgroup.V2 {
		return mkMount("cgroup2", "cgroup2", base, flags, "")
	}
	if err := mkMount("tmpfs", "tmpfs", base, flags, "mode=755"); err != nil {
		return err
	}
	for _, h := range all {
		kind := "cgroup"
		if h.V2 {
			kind = "cgroup2"
		}
		if err := mkMount(kind, kind, filepath.Join(base, filepath.Base(h.Path)), flags, h.Options); err != nil {
			return err
		}
	}
	return nil
}

func mountBinds(spec machine.Spec) error {
	for _, b := range spec.Binds {
		if err := bind(b.Source, rootDir(spec, b.Target), b.ReadOnly); err != nil {
			return err
		}
	}
	return nil
}

func changeRoot(spec machine.Spec) error {
	if err := unix.Chdir(rootDir(spec)); err != nil {
		return err
	}
	// pivot_root(".", ".") puts the old root on top of the new one, from where it is taken off: pivot_root(2).
	if err := unix.PivotRoot(".", "."); err != nil {
		return fmt.Errorf("pivot_root: %w", err)
	}
	if err := unix.Unmount(".", unix.MNT_DETACH); err != nil {
		return fmt.Errorf("unmount the host's root: %w", err)
	}
	if err := unix.Chdir("/"); err != nil {
		return err
	}
	// Volumes that kubelet mounts must reach containers that run already.
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_SHARED, ""); err != nil {
		return fmt.Errorf("make mounts shared: %w", err)
	}
	for _, dir := range []string{"/run/lock", "/run/netns", "/run/containerd", "/var/tmp", "/var/lib", "/var/log/pods", "/var/log/containers", "/var/cache"} {
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return err
		}
	}
	for link, target := range map[string]string{"/var/run": "/run", "/var/lock": "/run/lock"} {
		if err := os.Symlink(target, link); err != nil && !errors.Is(err, fs.ErrExist) {
			return err
		}
	}
	return nil
}

// loopbackUp brings lo up by ioctl: netlink would be a dependency that init can do without.
func loopbackUp(machine.Spec) error {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	ifr, err := unix.NewIfreq("lo")
	if err != nil {
		return err
	}
	ifr.SetUint16(unix.IFF_UP | unix.IFF_LOOPBACK | unix.IFF_RUNNING)
	return unix.IoctlIfreq(fd, unix.SIOCSIFFLAGS, ifr)
}
