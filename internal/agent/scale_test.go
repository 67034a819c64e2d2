package agent_test

import (
	"bufio"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"

	"github.com/fathom-network/fathom/internal/facts/ipam"
	"github.com/fathom-network/fathom/internal/install"
	"github.com/fathom-network/fathom/internal/kernel/lease"
	"github.com/fathom-network/fathom/internal/kernel/link"
	"github.com/fathom-network/fathom/internal/kernel/podlink"
	"github.com/fathom-network/fathom/internal/kernel/podroute"
	"github.com/fathom-network/fathom/internal/testenv"
	"github.com/fathom-network/fathom/internal/testenv/linktest"
	"github.com/fathom-network/fathom/internal/watch/kube"
)

const inScaleNode = "FATHOM_TEST_IN_SCALE_NODE"

// BenchmarkThousandNodes runs the program fathom-agent as the node of a cluster of a thousand, with 110 pods, against
// a real API server, and tells how long it takes until the kernel holds all routes, how long until it follows a
// change of one node, and how much memory it has then. Build the program first: make fathom.
//
//	go test ./internal/agent -run '^$' -bench ThousandNodes -benchtime 1x
func BenchmarkThousandNodes(b *testing.B) {
	testenv.NeedRoot(b)
	testenv.NeedFile(b, kit+"kube-apiserver", "make kit")
	testenv.NeedFile(b, agentProgram, "make fathom")
	if os.Getenv(inScaleNode) != "" {
		b.ReportMetric(0, "ns/op") // of no meaning
		scale(b)
		return
	}
	node, other := linktest.Namespace(b), linktest.Namespace(b)
	testenv.Must(b, node.SetPair(link.Device{Name: "eth0", Alias: "test"}, other, link.Device{Name: "eth0", Alias: "test"}))
	for _, c := range []string{"ip link set lo up", "ip addr add 10.1.0.1/16 dev eth0", "ip addr add fd00:1::1/64 dev eth0 nodad"} {
		linktest.Run(b, node, strings.Fields(c)...)
	}
	self, err := os.Executable()
	testenv.Must(b, err)
	cmd := exec.Command(self, "-test.run=^$", "-test.bench=^BenchmarkThousandNodes$", "-test.benchtime=1x")
	cmd.Env = append(os.Environ(), inScaleNode+"=1")
	var out strings.Builder
	cmd.Stdout, cmd.Stderr = &out, &out
	testenv.Must(b, node.Start(cmd))
	if err := cmd.Wait(); err != nil {
		b.Fatalf("%v\n%s", err, out.String())
	}
	b.Log(out.String())
}

const (
	agentProgram = "../../bin/fathom-agent"
	scaleNodes   = 1000
	scalePods    = 110
)

// scaleNode is the i-th node of the cluster; the first is the one that the agent runs on.
func scaleNode(i int) *corev1.Node {
	cidrs := []string{fmt.Sprintf("10.%d.%d.0/24", 64+i/256, i%256), fmt.Sprintf("fd00:64:%x::/64", i+1)}
	return &corev1.Node{
		ObjectMeta: metav1.ObjectMeta{Name: fmt.Sprintf("n%d", i+1)},
		Spec:       corev1.NodeSpec{PodCIDR: cidrs[0], PodCIDRs: cidrs},
		Status: corev1.NodeStatus{Addresses: []corev1.NodeAddress{
			{Type: corev1.NodeInternalIP, Address: fmt.Sprintf("10.1.%d.%d", (i+1)/256, (i+1)%256)},
			{Type: corev1.NodeInternalIP, Address: fmt.Sprintf("fd00:1::%x", i+1)}}},
	}
}

func scale(b *testing.B) {
	connect, kubeconfig := server(b)
	c := connect(admin)
	ctx := b.Context()
	objects, err := install.Objects(install.Options{})
	testenv.Must(b, err)
	objects = slices.DeleteFunc(objects, func(o *unstructured.Unstructured) bool {
		return o.GetKind() == "DaemonSet" || o.GetKind() == "CustomResourceDefinition"
	})
	testenv.Must(b, c.Apply(ctx, install.Owner, objects))
	g := errgroup.Group{}
	g.SetLimit(16)
	for i := range scaleNodes {
		g.Go(func() error {
			want := scaleNode(i)
			// What a kubelet says beside it, of which an agent has to hold nothing.
			for k := range 50 {
				want.Status.Images = append(want.Status.Images, corev1.ContainerImage{Names: []string{fmt.Sprintf("registry.example/team/application-%d@sha256:%064d", k, k)}, SizeBytes: 1 << 26})
			}
			have, err := c.CoreV1().Nodes().Create(ctx, want, metav1.CreateOptions{})
			if err != nil {
				return err
			}
			have.Status = want.Status
			_, err = c.CoreV1().Nodes().UpdateStatus(ctx, have, metav1.UpdateOptions{})
			return err
		})
	}
	testenv.Must(b, g.Wait())
	dir, fs := b.TempDir(), b.TempDir()
	testenv.Must(b, unix.Mount("bpffs", fs, "bpf", 0, ""))
	b.Cleanup(func() { _ = unix.Unmount(fs, unix.MNT_DETACH) })
	addPods(b, c, filepath.Join(dir, "leases"), dir)

	node, err := link.Open(link.OwnNetNS)
	testenv.Must(b, err)
	b.Cleanup(node.Close)
	changes, err := node.WatchChanges(ctx)
	testenv.Must(b, err)
	routed := watchRoutes(b)
	cmd := exec.Command(agentProgram, "run", "--node", "n1", "--kubeconfig", kubeconfig(ofAgent), "--plugin", "", "--cni-bin", dir,
		"--conflist", filepath.Join(dir, "x.conflist"), "--leases", filepath.Join(dir, "leases"), "--socket", filepath.Join(dir, "agent.sock"),
		"--netns-dir", dir, "--sysctl-dir", "/proc/sys/net", "--bpf-dir", filepath.Join(fs, "fathom"))
	var log strings.Builder
	cmd.Stdout, cmd.Stderr = &log, &log
	began := time.Now()
	testenv.Must(b, cmd.Start())
	b.Cleanup(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
		if b.Failed() {
			b.Log(log.String()[max(0, log.Len()-3000):])
		}
	})
	const all = 2 * scaleNodes // both families, and the unreachable ones of its own
	for {
		have, err := podroute.Read(node, nil)
		testenv.Must(b, err)
		if len(have.Routes) == all {
			break
		}
		await(b, changes, 30*time.Second)
	}
	b.ReportMetric(float64(time.Since(began).Milliseconds()), "ms-cold")

	// One node moves to and fro between two addresses.
	const rounds = 50
	var took, told []time.Duration // since the change was asked for, and since another watch has told of it
	watch, err := c.CoreV1().Nodes().Watch(ctx, metav1.SingleObject(metav1.ObjectMeta{Name: "n500"}))
	testenv.Must(b, err)
	defer watch.Stop()
	heard := make(chan time.Time, 4*rounds)
	go func() {
		for range watch.ResultChan() {
			heard <- time.Now()
		}
	}()
	<-heard // as it is
	for i := range rounds {
		time.Sleep(200 * time.Millisecond) // one change, not a row of them: the agent is at rest
		n, err := c.CoreV1().Nodes().Get(ctx, "n500", metav1.GetOptions{})
		testenv.Must(b, err)
		address := fmt.Sprintf("10.1.%d.7", 200+i%2)
		n.Status.Addresses[0].Address = address
		began := time.Now()
		_, err = c.CoreV1().Nodes().UpdateStatus(ctx, n, metav1.UpdateOptions{})
		testenv.Must(b, err)
		for want := n.Spec.PodCIDR + " via " + address + " "; ; {
			select {
			case line := <-routed:
				if !strings.HasPrefix(line, want) {
					continue
				}
			case <-time.After(10 * time.Second):
				b.Fatal("there is no route", want)
			}
			break
		}
		now := time.Now()
		took, told = append(took, now.Sub(began)), append(told, now.Sub(<-heard))
	}
	slices.Sort(took)
	slices.Sort(told)
	b.ReportMetric(told[rounds/2].Seconds()*1000, "ms-told-p50")
	b.ReportMetric(told[rounds*99/100].Seconds()*1000, "ms-told-p99")
	b.ReportMetric(took[rounds/2].Seconds()*1000, "ms-change-p50")
	b.ReportMetric(took[rounds*99/100].Seconds()*1000, "ms-change-p99")
	b.ReportMetric(resident(b, cmd.Process.Pid), "MB-resident")
}

// watchRoutes returns the routes that are made from now on, as `ip` tells of them. To read all routes at each change
// would take as long as what is measured.
func watchRoutes(b *testing.B) <-chan string {
	cmd := exec.Command("ip", "-4", "monitor", "route")
	out, err := cmd.StdoutPipe()
	testenv.Must(b, err)
	testenv.Must(b, cmd.Start())
	b.Cleanup(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	})
	lines := make(chan string, 10*scaleNodes)
	go func() {
		for s := bufio.NewScanner(out); s.Scan(); {
			lines <- s.Text()
		}
	}()
	return lines
}

func await(b *testing.B, changes <-chan struct{}, patience time.Duration) {
	b.Helper()
	select {
	case <-changes:
	case <-time.After(patience):
		b.Fatal("the kernel was not changed")
	}
}

// addPods gives the node its pods: objects, leases and devices.
func addPods(b *testing.B, c *kube.Client, leases, netns string) {
	store, err := lease.Open(leases, time.Second)
	testenv.Must(b, err)
	node, err := link.Open(link.OwnNetNS)
	testenv.Must(b, err)
	defer node.Close()
	_, err = c.CoreV1().ServiceAccounts("default").Create(b.Context(), &corev1.ServiceAccount{ObjectMeta: metav1.ObjectMeta{Name: "default"}}, metav1.CreateOptions{})
	testenv.Must(b, err)
	for i := range scalePods {
		name := fmt.Sprintf("pod%d", i)
		address := netip.AddrFrom4([4]byte{10, 64, 0, byte(i + 2)})
		_, err := c.CoreV1().Pods("default").Create(b.Context(), &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Name: name},
			Spec: corev1.PodSpec{NodeName: "n1", Containers: []corev1.Container{{Name: "c", Image: "x"}}}}, metav1.CreateOptions{})
		testenv.Must(b, err)
		path := filepath.Join(netns, name)
		testenv.Must(b, link.Create(path))
		b.Cleanup(func() { _ = link.Delete(path) })
		pod, err := link.Open(path)
		testenv.Must(b, err)
		testenv.Must(b, podlink.Add(node, pod, podlink.Pod{Device: "eth0", MAC: net.HardwareAddr{2, 0, 0, 0, 0, byte(i)}, HostDevice: name, HostMAC: net.HardwareAddr{2, 0, 0, 0, 1, byte(i)}, MTU: 1500, Alias: "fathom pod default/" + name + " eth0", Addrs: []netip.Addr{address}}))
		pod.Close()
		_, err = store.Acquire(lease.Lease{Attachment: lease.Attachment{ContainerID: name, IfName: "eth0"}, Network: "fathom", PodNamespace: "default",
			PodName: name, Netns: path, HostDevice: name}, func(ipam.State) (ipam.Choice, error) {
			return ipam.Choice{Pool: "default", Addresses: []netip.Addr{address}}, nil
		})
		testenv.Must(b, err)
	}
}

// resident is VmRSS of a process, in MB.
func resident(b *testing.B, pid int) float64 {
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	testenv.Must(b, err)
	for line := range strings.Lines(string(status)) {
		if f := strings.Fields(line); len(f) == 3 && f[0] == "VmRSS:" {
			kb, err := strconv.Atoi(f[1])
			testenv.Must(b, err)
			return float64(kb) / 1000
		}
	}
	b.Fatal("no VmRSS")
	return 0
}
