package image

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/fathom-network/fathom/internal/kit"
	"github.com/fathom-network/fathom/internal/watch/cri"
)

// A daemon is a containerd of our own that works on a directory of ours and is seen by nobody else:
// it has its own mount namespace with its own /run, so that it neither meets nor disturbs a
// containerd of the machine, and its mounts end with it.
type daemon struct {
	pid  int
	log  string
	done chan struct{} // closed when it has ended
	err  error         // how, valid after done
}

// daemonConfig turns off what an image store does not need, above all what would make directories
// outside /run and the root directory: the cni, opt and nri plugins.
//
// The metadata is not written through to the disk at each step (no_sync): a template that was not
// finished is thrown away, and one that was is written through as a whole. No garbage is collected:
// the layers are there before the images that refer to them.
const daemonConfig = `version = 4
root = '/run/root'
state = '/run/containerd'
disabled_plugins = [
	'io.containerd.image-verifier.v1.bindir',
	'io.containerd.internal.v1.opt',
	'io.containerd.monitor.container.v1.restart',
	'io.containerd.nri.v1.nri',
	'io.containerd.snapshotter.v1.blockfile',
	'io.containerd.snapshotter.v1.btrfs',
	'io.containerd.snapshotter.v1.devmapper',
	'io.containerd.snapshotter.v1.erofs',
	'io.containerd.snapshotter.v1.native',
	'io.containerd.snapshotter.v1.zfs',
]
[plugins.'io.containerd.server.v1.grpc']
	address = '/run/containerd/containerd.sock'
[plugins.'io.containerd.server.v1.ttrpc']
	address = '/run/containerd/containerd.sock.ttrpc'
[plugins.'io.containerd.metadata.v1.bolt']
	no_sync = true
[plugins.'io.containerd.cri.v1.images']
	snapshotter = 'overlayfs'
[plugins.'io.containerd.cri.v1.images'.pinned_images]
	sandbox = '%[1]s'
[plugins.'io.containerd.cri.v1.images'.registry]
	config_path = '%[2]s'
[plugins.'io.containerd.cri.v1.runtime']
	restrict_oom_score_adj = true
[plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.runc]
	runtime_type = 'io.containerd.runc.v2'
[plugins.'io.containerd.cri.v1.runtime'.cni]
	bin_dirs = ['/run/cni/bin']
	conf_dir = '/run/cni/net.d'
[plugins.'io.containerd.transfer.v1.local']
	max_concurrent_unpacks = 4
[plugins.'io.containerd.gc.v1.scheduler']
	startup_delay = '1h'
`

// startDaemon starts a containerd on the directory root, which it may share with nobody. Its log
// goes to the file log. registries, which may be empty, is a directory with a hosts.toml for each
// registry that it may pull from.
func startDaemon(ctx context.Context, k kit.Kit, root, log, registries string) (*daemon, error) {
	if err := k.Require(k.Bin("containerd"), k.Bin("ctr")); err != nil {
		return nil, err
	}
	if os.Geteuid() != 0 {
		return nil, errors.New("start a containerd of our own: this needs root: run with sudo")
	}
	d := &daemon{log: log, done: make(chan struct{})}
	started := make(chan error)
	onOwnThread(func() {
		cmd, err := startPrivate(k, root, log, registries)
		if err != nil {
			started <- fmt.Errorf("start a containerd of our own: %w", err)
			return
		}
		d.pid = cmd.Process.Pid
		started <- nil
		// The thread must not end before the child: the kernel takes a thread's end for its
		// parent's, and would kill it (PR_SET_PDEATHSIG).
		d.err = cmd.Wait()
		close(d.done)
	})
	if err := <-started; err != nil {
		return nil, err
	}
	if err := d.wait(ctx); err != nil {
		return nil, errors.Join(err, d.stop())
	}
	return d, nil
}

// startPrivate makes the calling thread's mount namespace a private one and starts containerd in it.
// The alternative, a hidden command of fathom that does this in a process of its own, would need
// every user of this package to have such a command.
func startPrivate(k kit.Kit, root, log, registries string) (*exec.Cmd, error) {
	if err := unix.Unshare(unix.CLONE_NEWNS); err != nil {
		return nil, fmt.Errorf("make a mount namespace: %w", err)
	}
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return nil, fmt.Errorf("make the mounts private: %w", err)
	}
	// Held by descriptor, because it may lie below /run, which disappears now.
	fd, err := unix.Open(root, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("open %s: %w", root, err)
	}
	defer unix.Close(fd)
	out, err := os.OpenFile(log, os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o644)
	if err != nil {
		return nil, err
	}
	defer out.Close()
	if err := unix.Mount("tmpfs", "/run", "tmpfs", 0, "mode=755"); err != nil {
		return nil, fmt.Errorf("mount a private /run: %w", err)
	}
	if err := os.Mkdir("/run/root", 0o700); err != nil {
		return nil, err
	}
	if err := unix.Mount(fmt.Sprintf("/proc/thread-self/fd/%d", fd), "/run/root", "", unix.MS_BIND, ""); err != nil {
		return nil, fmt.Errorf("mount %s at /run/root: %w", root, err)
	}
	config := fmt.Sprintf(daemonConfig, k.PauseImage, registries)
	if err := os.WriteFile("/run/config.toml", []byte(config), 0o644); err != nil {
		return nil, err
	}
	cmd := exec.Command(k.Bin("containerd"), "--config", "/run/config.toml")
	cmd.Env = []string{"PATH=" + k.BinDir() + ":/usr/sbin:/usr/bin:/sbin:/bin"}
	cmd.Stdout, cmd.Stderr = out, out
	cmd.Dir = "/"
	cmd.SysProcAttr = &unix.SysProcAttr{
		Pdeathsig: unix.SIGKILL, // killed with us, even by kill -9
		Setpgid:   true,         // so that the terminal's ^C is ours to handle
	}
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	return cmd, nil
}

// onOwnThread runs f on a thread that is thrown away afterwards, because f changes it for good. It is
// never the process's first thread: that one cannot be thrown away, and /proc/self is its view.
func onOwnThread(f func()) {
	running := make(chan struct{})
	go func() {
		runtime.LockOSThread() // without an unlock: the thread ends with the goroutine
		if unix.Gettid() == unix.Getpid() {
			onOwnThread(f) // on another thread, since this one is held
			close(running)
			runtime.UnlockOSThread()
			return
		}
		close(running)
		f()
	}()
	<-running
}

// socket is the path by which this process reaches the daemon, through its mount namespace.
func (d *daemon) socket() string {
	return fmt.Sprintf("/proc/%d/root/run/containerd/containerd.sock", d.pid)
}

// wait returns when the daemon serves CRI.
func (d *daemon) wait(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	go func() {
		select {
		case <-d.done:
			cancel()
		case <-ctx.Done():
		}
	}()
	client, err := cri.Connect(d.socket())
	if err != nil {
		return err
	}
	defer client.Close()
	err = client.Wait(ctx)
	select {
	case <-d.done:
		return fmt.Errorf("our containerd ended early (%v); it said:\n%s", d.err, tail(d.log))
	default:
	}
	if err != nil {
		return fmt.Errorf("%w; it said:\n%s", err, tail(d.log))
	}
	return nil
}

// stop ends the daemon in good order and returns when it has gone.
func (d *daemon) stop() error {
	// A process that was not waited for yet keeps its ID, so this can hit no other.
	for _, signal := range []unix.Signal{unix.SIGTERM, unix.SIGKILL} {
		select {
		case <-d.done:
			return nil
		default:
		}
		_ = unix.Kill(d.pid, signal)
		select {
		case <-d.done:
			if signal == unix.SIGKILL {
				return fmt.Errorf("our containerd had to be killed; it said:\n%s", tail(d.log))
			}
			return nil
		case <-time.After(10 * time.Second):
		}
	}
	return fmt.Errorf("our containerd (process %d) does not end", d.pid)
}

// tail returns what a log of containerd tells about a failure, for an error message: its errors if
// there are any, else its last lines, and what to do where that is known.
func tail(log string) string {
	data, err := os.ReadFile(log)
	if err != nil {
		return fmt.Sprintf("(%s cannot be read: %v)", filepath.Base(log), err)
	}
	all := strings.Split(strings.TrimSpace(string(data)), "\n")
	var lines []string
	for _, line := range all {
		if strings.Contains(line, "level=error") || strings.Contains(line, "level=fatal") || strings.Contains(line, "failed to load plugin") {
			lines = append(lines, line)
		}
	}
	if len(lines) == 0 {
		lines = all
	}
	text := strings.Join(lines[max(0, len(lines)-8):], "\n")
	// A kubelet or containerd takes about ten of these, and Linux's default is 128 for a user.
	if strings.Contains(text, "inotify") || strings.Contains(text, "fsnotify") || strings.Contains(text, "too many open files") {
		text += "\nThis machine's limit of file watchers is used up: raise it with `sysctl -w fs.inotify.max_user_instances=1024`."
	}
	return text
}
