package image

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	criapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/fathom-network/fathom/internal/kit"
	"github.com/fathom-network/fathom/internal/watch/cri"
)

// skip skips a test for want of something, unless the machine is said to have it.
func skip(t *testing.T, why string) {
	t.Helper()
	if os.Getenv("FATHOM_REQUIRE_ROOT") == "1" {
		t.Fatalf("FATHOM_REQUIRE_ROOT=1, but %s", why)
	}
	t.Skip(why)
}

// realKit returns a kit with the programs of the real one and images of its own.
func realKit(t *testing.T) kit.Kit {
	t.Helper()
	if os.Geteuid() != 0 {
		skip(t, "this test starts a containerd: it needs root")
	}
	dir := os.Getenv(kit.Env)
	if dir == "" {
		dir = "../../../bin/kit"
	}
	k, err := kit.Open(dir)
	if err != nil {
		skip(t, err.Error())
	}
	if err := k.Require(k.Bin("containerd"), k.Bin("ctr"), k.Bin("runc"), k.Bin("kube"), k.Program("flanneld")); err != nil {
		skip(t, err.Error())
	}
	if err := checkTools(); err != nil {
		skip(t, err.Error())
	}
	own := k
	own.Dir = t.TempDir()
	for _, name := range []string{"bin", "cni", "programs", "kit.json"} {
		if err := os.Symlink(filepath.Join(k.Dir, name), filepath.Join(own.Dir, name)); err != nil {
			t.Fatal(err)
		}
	}
	return own
}

// builtKit is realKit with its images built.
func builtKit(t *testing.T) kit.Kit {
	t.Helper()
	k := realKit(t)
	if err := Build(context.Background(), k, func(s string) { t.Log(s) }); err != nil {
		t.Fatal(err)
	}
	return k
}

// start starts a containerd that ends with the test.
func start(t *testing.T, k kit.Kit, root, registries string) *daemon {
	t.Helper()
	d, err := startDaemon(context.Background(), k, root, filepath.Join(t.TempDir(), "log"), registries)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := d.stop(); err != nil {
			t.Error(err)
		}
	})
	return d
}

func TestStore(t *testing.T) {
	ctx := context.Background()
	k := builtKit(t)
	state := t.TempDir()
	began := time.Now()
	s, err := Prepare(ctx, k, state, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	t.Logf("Prepare: %s", time.Since(began))

	began = time.Now()
	again, err := Prepare(ctx, k, state, nil)
	if err != nil {
		t.Fatal(err)
	}
	again.Close()
	if again.Root() != s.Root() {
		t.Errorf("two templates of the same images: %s and %s", s.Root(), again.Root())
	}
	t.Logf("Prepare again: %s", time.Since(began))

	clone := filepath.Join(t.TempDir(), "var", "lib", "containerd")
	began = time.Now()
	if err := s.Clone(clone); err != nil {
		t.Fatal(err)
	}
	t.Logf("Clone: %s", time.Since(began))
	if err := s.Clone(clone); err == nil || !strings.Contains(err.Error(), "it is not empty") {
		t.Errorf("a clone over a clone: error %v", err)
	}
	sameTree(t, s.Root(), clone)

	d := start(t, k, clone, "")
	client, err := cri.Connect(d.socket())
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	images, err := client.Images(ctx)
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, image := range images {
		got = append(got, image.Names...)
		if pinned := slices.Contains(image.Names, k.PauseImage); image.Pinned != pinned {
			t.Errorf("%v: pinned %t, want %t", image.Names, image.Pinned, pinned)
		}
	}
	slices.Sort(got)
	want, err := Names(k)
	if err != nil {
		t.Fatal(err)
	}
	if !slices.Equal(got, want) {
		t.Errorf("CRI shows:\n%s\nwant:\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
	}

	// Garbage collection, which --sync waits for, must take none of the layers: an image that has
	// lost one cannot be pushed. (The small blob that it takes is the index of the import.)
	blobs := func() int {
		list, err := filepath.Glob(filepath.Join(clone, contentDir, "*"))
		if err != nil {
			t.Fatal(err)
		}
		return len(slices.DeleteFunc(list, func(at string) bool {
			info, err := os.Stat(at)
			return err != nil || info.Size() < 1<<16
		}))
	}
	before := blobs()
	if err := ctr(ctx, k, d.socket(), nil, "images", "rm", "--sync", e2eBusybox); err != nil {
		t.Fatal(err)
	}
	if after := blobs(); after != before {
		t.Errorf("garbage collection took %d of %d layers", before-after, before)
	}

	// Every tool runs in the toolbox, with the libraries that were found for it.
	node := newNode(t, d)
	script := "set -e; cd /tmp\n"
	for _, call := range []string{
		"bash --version", "bridge -V", "conntrack -V", "curl --version", "dig -v", "ethtool --version", "host -V", "ip -V",
		"iperf3 -v", "ipset version", "jq --version", "modprobe --version", "nc -h", "nft --version", "nstat -V", "ping -V",
		"socat -V", "ss -V", "tc -V", "tcpdump --version", "iptables --version", "ip6tables-legacy --version", "agnhost --help",
		"iptables -p tcp -m conntrack -h", "ip6tables -j MASQUERADE -h", "getent --version", "vi --help", "less --help",
		"timeout 1 ip -V", "env ip -V", "echo -V | xargs ip", "nsenter --version", "wget -T 1 --version", "traceroute --help", "ps", "top -b -n 1",
	} {
		script += call + " >out 2>&1 || { echo 'FAILED: " + call + "'; cat out; exit 1; }\n"
	}
	script += "iperf -v || true\nwebserver 18080 & sleep 0.3; wget -qO- http://127.0.0.1:18080/ >/dev/null; kill %1; echo all well\n"
	if out := node.run(t, "docker.io/library/toolbox:1", "sh", "-c", script); !strings.Contains(out, "all well") {
		t.Errorf("in the toolbox:\n%s", out)
	}
	for _, call := range [][]string{
		{"registry.k8s.io/kube-apiserver:" + k.Kubernetes, "kube-apiserver", "--version"},
		{"registry.k8s.io/kube-proxy:" + k.Kubernetes, "sh", "-c", "/usr/local/bin/kube-proxy --version && nft --version && iptables-save --version && conntrack -V && ipset version"},
		{"registry.k8s.io/etcd:" + k.EtcdImageTag, "etcd", "--version"},
		{"registry.k8s.io/coredns/coredns:" + k.CoreDNSImageTag, "/coredns", "-version"},
		{"registry.k8s.io/e2e-test-images/agnhost:" + k.Agnhost, "/agnhost", "--help"},
		{"ghcr.io/flannel-io/flannel:" + k.Flannel, "/opt/bin/flanneld", "--version"},
		{"ghcr.io/flannel-io/flannel-cni-plugin:" + k.FlannelCNI, "cp", "-f", "/flannel", "/tmp/flannel"},
		{"docker.io/library/busybox:latest", "nslookup", "--help"},
	} {
		if code, out := node.exit(t, call[0], call[1:]...); code != 0 {
			t.Errorf("%s in %s ended with %d:\n%s", strings.Join(call[1:], " "), call[0], code, out)
		}
	}
}

// sameTree checks that a clone is like its template, and that only databases are not shared with it.
func sameTree(t *testing.T, template, clone string) {
	t.Helper()
	var cost int64
	err := filepath.WalkDir(template, func(at string, entry os.DirEntry, err error) error {
		if err != nil {
			return err
		}
		rel, err := filepath.Rel(template, at)
		if err != nil {
			return err
		}
		a, err := os.Lstat(at)
		if err != nil {
			return err
		}
		b, err := os.Lstat(filepath.Join(clone, rel))
		if err != nil {
			return err
		}
		stat := a.Sys().(*syscall.Stat_t)
		other := b.Sys().(*syscall.Stat_t)
		if a.Mode() != b.Mode() || stat.Uid != other.Uid || stat.Gid != other.Gid || !a.ModTime().Equal(b.ModTime()) {
			t.Errorf("%s: %v %d:%d %v, its copy %v %d:%d %v", rel, a.Mode(), stat.Uid, stat.Gid, a.ModTime(), b.Mode(), other.Uid, other.Gid, b.ModTime())
		}
		shared := stat.Ino == other.Ino
		if want := !entry.IsDir() && filepath.Ext(at) != ".db"; shared != want {
			t.Errorf("%s: shared %t, want %t", rel, shared, want)
		}
		if !shared {
			cost += other.Blocks * 512
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("a clone takes %d KiB of disk", cost/1024)
	if cost > 5<<20 {
		t.Errorf("a clone takes %d bytes of disk, which is too much", cost)
	}
}

// testCgroup is where the containers of these tests are.
const testCgroup = "fathom-image-test"

// node is a containerd that containers are run on.
type node struct {
	runtime criapi.RuntimeServiceClient
	dir     string // of logs
}

func newNode(t *testing.T, d *daemon) *node {
	t.Helper()
	conn, err := grpc.NewClient("unix://"+d.socket(), grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		conn.Close()
		cgroups, _ := filepath.Glob("/sys/fs/cgroup/*/" + testCgroup)
		for _, dir := range append(cgroups, "/sys/fs/cgroup/"+testCgroup) {
			os.Remove(dir) // it is empty; only rmdir works in there
		}
	})
	return &node{runtime: criapi.NewRuntimeServiceClient(conn), dir: t.TempDir()}
}

// run runs a command in a pod on the machine's own network and returns what it wrote.
func (n *node) run(t *testing.T, image string, command ...string) string {
	t.Helper()
	_, out := n.exit(t, image, command...)
	return out
}

// exit is run with the exit code.
func (n *node) exit(t *testing.T, image string, command ...string) (int32, string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	id := fmt.Sprintf("%s-%d", strings.ToLower(filepath.Base(t.Name())), time.Now().UnixNano())
	options := &criapi.NamespaceOption{Network: criapi.NamespaceMode_NODE}
	sandbox := &criapi.PodSandboxConfig{
		Metadata:     &criapi.PodSandboxMetadata{Name: id, Namespace: "default", Uid: id},
		LogDirectory: n.dir,
		Linux: &criapi.LinuxPodSandboxConfig{
			CgroupParent:    "/" + testCgroup,
			SecurityContext: &criapi.LinuxSandboxSecurityContext{NamespaceOptions: options},
		},
	}
	pod, err := n.runtime.RunPodSandbox(ctx, &criapi.RunPodSandboxRequest{Config: sandbox})
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if _, err := n.runtime.StopPodSandbox(ctx, &criapi.StopPodSandboxRequest{PodSandboxId: pod.PodSandboxId}); err != nil {
			t.Error(err)
		}
		if _, err := n.runtime.RemovePodSandbox(ctx, &criapi.RemovePodSandboxRequest{PodSandboxId: pod.PodSandboxId}); err != nil {
			t.Error(err)
		}
	}()
	container, err := n.runtime.CreateContainer(ctx, &criapi.CreateContainerRequest{
		PodSandboxId:  pod.PodSandboxId,
		SandboxConfig: sandbox,
		Config: &criapi.ContainerConfig{
			Metadata: &criapi.ContainerMetadata{Name: "main"},
			Image:    &criapi.ImageSpec{Image: image},
			Command:  command,
			LogPath:  id,
			Linux: &criapi.LinuxContainerConfig{SecurityContext: &criapi.LinuxContainerSecurityContext{
				NamespaceOptions: options,
				Capabilities:     &criapi.Capability{AddCapabilities: []string{"NET_ADMIN"}},
			}},
		},
	})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := n.runtime.StartContainer(ctx, &criapi.StartContainerRequest{ContainerId: container.ContainerId}); err != nil {
		t.Fatal(err)
	}
	for {
		status, err := n.runtime.ContainerStatus(ctx, &criapi.ContainerStatusRequest{ContainerId: container.ContainerId})
		if err != nil {
			t.Fatal(err)
		}
		if status.Status.State == criapi.ContainerState_CONTAINER_EXITED {
			out, err := os.ReadFile(filepath.Join(n.dir, id))
			if err != nil {
				t.Fatal(err)
			}
			return status.Status.ExitCode, string(out)
		}
		time.Sleep(20 * time.Millisecond)
	}
}

// A Prepare that is killed leaves no process and no mount, and the next one succeeds.
func TestPrepareKilled(t *testing.T) {
	if state := os.Getenv("FATHOM_TEST_PREPARE"); state != "" {
		k, err := kit.Open(os.Getenv(kit.Env))
		if err != nil {
			t.Fatal(err)
		}
		if _, err := Prepare(context.Background(), k, state, nil); err != nil {
			t.Fatal(err)
		}
		return
	}
	k := builtKit(t)
	state := t.TempDir()
	cmd := exec.Command(os.Args[0], "-test.run=^TestPrepareKilled$")
	cmd.Env = append(os.Environ(), "FATHOM_TEST_PREPARE="+state, kit.Env+"="+k.Dir)
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	ended := make(chan struct{})
	go func() {
		_ = cmd.Wait()
		close(ended)
	}()
	// Until the unpacking is under way.
	pattern := filepath.Join(state, "images", ".new-*", "root", "io.containerd.snapshotter.v1.overlayfs", "snapshots", "*")
	for end := time.Now().Add(20 * time.Second); ; time.Sleep(time.Millisecond) {
		if found, _ := filepath.Glob(pattern); len(found) > 0 {
			break
		}
		select {
		case <-ended:
			t.Fatalf("Prepare ended before it could be killed:\n%s", out.String())
		default:
		}
		if time.Now().After(end) {
			_ = cmd.Process.Kill()
			<-ended
			t.Fatalf("nothing was unpacked in 20 s:\n%s", out.String())
		}
	}
	if err := cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	<-ended
	for end := time.Now().Add(time.Minute); len(processesOf(k)) > 0; time.Sleep(10 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("still running: %v", processesOf(k))
		}
	}
	if left := mountsBelow(t, state); len(left) > 0 {
		t.Errorf("left mounted:\n%s", strings.Join(left, "\n"))
	}
	s, err := Prepare(context.Background(), k, state, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	if left, _ := filepath.Glob(filepath.Join(state, "images", ".new-*")); len(left) > 0 {
		t.Errorf("left behind: %v", left)
	}
	if procs := processesOf(k); len(procs) > 0 {
		t.Errorf("still running: %v", procs)
	}
}

// mountsBelow returns the lines of this mount namespace that name a directory. Others are none of this test's: what runs
// beside it mounts, too.
func mountsBelow(t *testing.T, dir string) []string {
	t.Helper()
	data, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		t.Fatal(err)
	}
	var lines []string
	for line := range strings.Lines(string(data)) {
		if strings.Contains(line, dir) {
			lines = append(lines, line)
		}
	}
	return lines
}

// processesOf returns the command lines of the processes that were started from a kit.
func processesOf(k kit.Kit) []string {
	var found []string
	files, _ := filepath.Glob("/proc/[0-9]*/cmdline")
	for _, file := range files {
		if data, err := os.ReadFile(file); err == nil && strings.HasPrefix(string(data), k.Dir+"/") {
			found = append(found, strings.ReplaceAll(string(data), "\x00", " "))
		}
	}
	return found
}

// A template of other images goes when nobody holds it.
func TestSweep(t *testing.T) {
	dir := t.TempDir()
	for _, name := range []string{"current", "unused", "held", ".new-1"} {
		if err := os.Mkdir(filepath.Join(dir, name), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(dir, name, "lock"), nil, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	held, err := hold(filepath.Join(dir, "held"), syscall.LOCK_SH)
	if err != nil {
		t.Fatal(err)
	}
	defer held.Close()
	sweep(dir, "current")
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	var left []string
	for _, entry := range entries {
		left = append(left, entry.Name())
	}
	if !slices.Equal(left, []string{"current", "held"}) {
		t.Errorf("left: %v", left)
	}
}

func TestClone(t *testing.T) {
	template := t.TempDir()
	for name, text := range map[string]string{"a/file": "text", "a/meta.db": "database", "b/c/d": ""} {
		at := filepath.Join(template, name)
		if err := os.MkdirAll(filepath.Dir(at), 0o711); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(at, []byte(text), 0o640); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Symlink("nowhere", filepath.Join(template, "link")); err != nil {
		t.Fatal(err)
	}
	clone := filepath.Join(t.TempDir(), "new", "clone")
	if err := (Store{root: template}).Clone(clone); err != nil {
		t.Fatal(err)
	}
	sameTree(t, template, clone)
	if target, err := os.Readlink(filepath.Join(clone, "link")); err != nil || target != "nowhere" {
		t.Errorf("link to %q, %v", target, err)
	}
	if err := os.WriteFile(filepath.Join(clone, "a/meta.db"), []byte("changed"), 0); err != nil {
		t.Fatal(err)
	}
	if data, err := os.ReadFile(filepath.Join(template, "a/meta.db")); err != nil || string(data) != "database" {
		t.Errorf("the template's database holds %q, %v", data, err)
	}
	if err := (Store{root: template}).Clone("/dev/shm/fathom-clone-test"); err == nil {
		os.RemoveAll("/dev/shm/fathom-clone-test") // the temporary directory is on the same file system
	} else {
		os.RemoveAll("/dev/shm/fathom-clone-test")
		if !strings.Contains(err.Error(), "file system") {
			t.Errorf("across file systems: error %v", err)
		}
	}
}
