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

// A daemon is a private containerd that works on a directory of ours. It has its own mount namespace with its own /run, so
// that it cannot conflict with a containerd of the machine, and its mounts end with it.
type daemon struct {
	pid  int
	log  string
	done chan struct{} // closed when it has ended
	err  error         // how it ended, valid after done
}

// daemonConfig disables what an image store does not need, above all the cni, opt and nri plugins, which make directories
// outside of /run and the root directory.
//
// The metadata is not synced at each step (no_sync): an unfinished template is discarded, and a finished one is synced as a
// whole. Garbage collection is off, since the layers are there before the images that refer to them.
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

// startDaemon starts a containerd on the directory root, which nothing else may use. Its log goes to the file log.
// registries, which may be empty, is a directory with a hosts.toml for each registry that it may pull from.
func startDaemon(ctx context.Context, k kit.Kit, root, log, registries string) (*daemon, error) {
	if err := k.Require(k.Bin("containerd"), k.Bin("ctr")); err != nil {
		return nil, err
	}
	if os.Geteuid() != 0 {
		return nil, errors.New("start a private containerd: this needs root: run with sudo")
	}
	d := &daemon{log: log, done: make(chan struct{})}
	started := make(chan error)
	onOwnThread(func() {
		cmd, err := startPrivate(k, root, log, registries)
		if err != nil {
			started <- fmt.Errorf("start a private containerd: %w", err)
			return
		}
		d.pid = cmd.Process.Pid
		started <- nil
		// The thread must not end before the child: to the kernel the thread is its parent, and with PR_SET_PDEATHSIG the
		// thread's end would kill the child.
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

// startPrivate gives the calling thread a private mount namespace and starts containerd in it. Rejected: a hidden command
// of fathom that does this in its own process, since each user of this package would need such a command.
func startPrivate(k kit.Kit, root, log, registries string) (*exec.Cmd, error) {
	if err := unix.Unshare(unix.CLONE_NEWNS); err != nil {
		return nil, fmt.Errorf("make a mount namespace: %w", err)
	}
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return nil, fmt.Errorf("make the mounts private: %w", err)
	}
	// Held by descriptor, because it may be below /run, which is about to be covered.
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
		Pdeathsig: unix.SIGKILL, // it ends with this process, even on kill -9
		Setpgid:   true,         // so that only this process gets the terminal's ^C
	}
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	return cmd, nil
}

// onOwnThread runs f on a thread that ends afterwards, because f changes it for good. It is never the process's first
// thread, which cannot end, and whose view /proc/self shows.
func onOwnThread(f func()) {
	running := make(chan struct{})
	go func() {
		runtime.LockOSThread() // without an unlock: the thread ends with the goroutine
		if unix.Gettid() == unix.Getpid() {
			onOwnThread(f) // on another thread, since this one is locked
			close(running)
			runtime.UnlockOSThread()
			return
		}
		close(running)
		f()
	}()
	<-running
}

// socket is the path by which this process reaches the daemon's socket, through the daemon's mount namespace.
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
		return fmt.Errorf("the private containerd ended early (%v); it said:\n%s", d.err, tail(d.log))
	default:
	}
	if err != nil {
		return fmt.Errorf("%w; it said:\n%s", err, tail(d.log))
	}
	return nil
}

// stop ends the daemon gracefully and returns when it has ended.
func (d *daemon) stop() error {
	// A process that was not waited for keeps its ID, so this cannot hit another process.
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
				return fmt.Errorf("the private containerd had to be killed; it said:\n%s", tail(d.log))
			}
			return nil
		case <-time.After(10 * time.Second):
		}
	}
	return fmt.Errorf("the private containerd (process %d) does not end", d.pid)
}

// tail returns the part of containerd's log that explains a failure, for an error message: the errors if there are any,
// otherwise the last lines. It adds what to do, where that is known.
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
	// A kubelet or containerd takes about ten of these; Linux's default limit is 128 per user.
	if strings.Contains(text, "inotify") || strings.Contains(text, "fsnotify") || strings.Contains(text, "too many open files") {
		text += "\nThis machine's limit of file watchers is used up: raise it with `sysctl -w fs.inotify.max_user_instances=1024`."
	}
	return text
}
