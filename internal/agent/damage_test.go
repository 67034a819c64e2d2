package agent_test

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"

	"github.com/fathom-network/fathom/internal/agent"
	"github.com/fathom-network/fathom/internal/facts/conflist"
	"github.com/fathom-network/fathom/internal/facts/ipam"
	"github.com/fathom-network/fathom/internal/install"
	"github.com/fathom-network/fathom/internal/kernel/lease"
	"github.com/fathom-network/fathom/internal/kernel/link"
	"github.com/fathom-network/fathom/internal/kernel/podlink"
	"github.com/fathom-network/fathom/internal/testenv"
	"github.com/fathom-network/fathom/internal/testenv/linktest"
)

const inDamagedNode = "FATHOM_TEST_IN_DAMAGED_NODE"

// TestDamagedFiles starts the agent on every file of a node in every state that a power cut leaves. Each time the node
// becomes ready, and its files are whole.
func TestDamagedFiles(t *testing.T) {
	testenv.NeedRoot(t)
	testenv.NeedFile(t, kit+"kube-apiserver", "make kit")
	if os.Getenv(inDamagedNode) != "" {
		damaged(t)
		return
	}
	node := linktest.Namespace(t)
	for _, c := range []string{"ip link set lo up", "ip link add eth0 type veth peer name cable", "ip addr add 10.1.1.2/24 dev eth0", "ip link set eth0 up", "ip link set cable up"} {
		linktest.Run(t, node, strings.Fields(c)...)
	}
	self, err := os.Executable()
	testenv.Must(t, err)
	cmd := exec.Command(self, "-test.run=^TestDamagedFiles$", "-test.v")
	cmd.Env = append(os.Environ(), inDamagedNode+"=1")
	var out strings.Builder
	cmd.Stdout, cmd.Stderr = &out, &out
	testenv.Must(t, node.Start(cmd))
	if err := cmd.Wait(); err != nil {
		t.Fatalf("%v\n%s", err, out.String())
	}
}

func damaged(t *testing.T) {
	connect, _ := server(t)
	c, ctx := connect(admin), t.Context()
	objects, err := install.Objects(install.Options{})
	testenv.Must(t, err)
	var rest []*unstructured.Unstructured
	for _, o := range objects {
		if o.GetKind() != "DaemonSet" && o.GetKind() != "CustomResourceDefinition" {
			rest = append(rest, o)
		}
	}
	testenv.Must(t, c.Apply(ctx, install.Owner, rest))
	testenv.Must(t, createNode(ctx, c, &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: "n1", Annotations: map[string]string{"example.com/of-others": "stays"}},
		Spec: corev1.NodeSpec{PodCIDR: "10.244.1.0/24", PodCIDRs: []string{"10.244.1.0/24"}}}))
	n, err := c.CoreV1().Nodes().Get(ctx, "n1", metav1.GetOptions{})
	testenv.Must(t, err)
	n.Status.Addresses = []corev1.NodeAddress{{Type: corev1.NodeInternalIP, Address: "10.1.1.2"}}
	_, err = c.CoreV1().Nodes().UpdateStatus(ctx, n, metav1.UpdateOptions{})
	testenv.Must(t, err)

	dir := t.TempDir()
	leases := filepath.Join(dir, "leases")
	plugin := filepath.Join(dir, "plugin")
	testenv.Must(t, os.WriteFile(plugin, []byte("#!/bin/sh\nexit 0\n"), 0o755))
	options := func() agent.Options {
		return agent.Options{Node: "n1", Client: connect(ofAgent), Log: slog.New(slog.NewTextHandler(t.Output(), nil)),
			Resync: 200 * time.Millisecond, Paths: agent.Paths{Plugin: plugin, CNIBin: filepath.Join(dir, "bin"), Conflist: filepath.Join(dir, "net.d", "10-fathom.conflist"),
				Leases: leases, Socket: filepath.Join(dir, "agent.sock"), NetNS: dir, Sysctl: "/proc/sys/net", BPF: dir}}
	}
	run := func(check func()) {
		t.Helper()
		agentCtx, cancel := context.WithCancel(ctx)
		ended := make(chan error, 1)
		go func() { ended <- agent.Run(agentCtx, options()) }()
		check()
		cancel()
		testenv.Must(t, <-ended)
	}
	condition := func(want corev1.ConditionStatus, words string) {
		t.Helper()
		testenv.Eventually(t, fmt.Sprintf("NetworkUnavailable is %s: %s", want, words), func() (bool, string) {
			n, err := c.CoreV1().Nodes().Get(ctx, "n1", metav1.GetOptions{})
			if err != nil {
				return false, err.Error()
			}
			if n.Annotations["example.com/of-others"] != "stays" {
				t.Errorf("annotations of others: %v", n.Annotations)
			}
			for _, c := range n.Status.Conditions {
				if c.Type == corev1.NodeNetworkUnavailable {
					return c.Status == want && strings.Contains(c.Message, words), fmt.Sprint(c)
				}
			}
			return false, "no condition"
		})
	}
	ready := func() { t.Helper(); condition(corev1.ConditionFalse, "pods' packets are routed") }
	unready := func() { // so that what is seen of the next agent is its own
		t.Helper()
		n, err := c.CoreV1().Nodes().Get(ctx, "n1", metav1.GetOptions{})
		testenv.Must(t, err)
		for i := range n.Status.Conditions {
			n.Status.Conditions[i].Status = corev1.ConditionTrue
		}
		_, err = c.CoreV1().Nodes().UpdateStatus(ctx, n, metav1.UpdateOptions{})
		testenv.Must(t, err)
	}

	run(ready)
	store, err := lease.Open(leases, conflist.DefaultCoolDown)
	testenv.Must(t, err)
	_, err = store.SetPools([]ipam.Pool{{Name: "public", Ranges: []netip.Prefix{netip.MustParsePrefix("192.0.2.0/28")}}})
	testenv.Must(t, err)
	_, err = store.Acquire(lease.Lease{Attachment: lease.Attachment{ContainerID: "c1", IfName: "eth0"}, Network: "fathom", PodName: "web", Netns: "/none", HostDevice: "none"},
		func(ipam.State) (ipam.Choice, error) {
			return ipam.Choice{Pool: "default", Addresses: []netip.Addr{netip.MustParseAddr("10.244.1.9")}, Last: map[string]netip.Addr{"default": netip.MustParseAddr("10.244.1.9")}}, nil
		})
	testenv.Must(t, err)

	whole := map[string][]byte{}
	for _, name := range []string{"leases/settings.json", "net.d/10-fathom.conflist", "bin/" + conflist.Plugin, "leases/attachments/c1@eth0", "leases/last", "leases/pools"} {
		whole[name], err = os.ReadFile(filepath.Join(dir, name))
		testenv.Must(t, err)
	}
	// All files at once, since a power cut leaves them so, and as the classes are what matters.
	for class := range testenv.Damages(nil) {
		unready()
		for name, data := range whole {
			path := filepath.Join(dir, name)
			testenv.Must(t, os.MkdirAll(filepath.Dir(path), 0o755))
			testenv.Must(t, os.WriteFile(path, testenv.Damages(data)[class], 0o644))
		}
		t.Log(class)
		run(func() {
			ready()
			for _, name := range []string{"net.d/10-fathom.conflist", "bin/" + conflist.Plugin} {
				if have, err := os.ReadFile(filepath.Join(dir, name)); err != nil || string(have) != string(whole[name]) {
					t.Errorf("%s: %s is %q, %v; want %q", class, name, have, err, whole[name])
				}
			}
			testenv.Eventually(t, class+": the leases are whole", func() (bool, string) {
				all, err := store.List()
				state, stateErr := store.State()
				how := fmt.Sprint(all, state, err, stateErr)
				return err == nil && stateErr == nil && len(all) == 0 && len(state.InUse) == 0 && len(state.Pools) == 0, how
			})
		})
	}
	events, err := c.CoreV1().Events("default").List(ctx, metav1.ListOptions{})
	testenv.Must(t, err)
	if text := fmt.Sprint(events.Items); !strings.Contains(text, "StateDamaged") || !strings.Contains(text, "settings.json.damaged") {
		t.Errorf("no event of the damaged settings in\n%s", text)
	}

	lost(t, run, ready, dir, leases)
	events, err = c.CoreV1().Events("default").List(ctx, metav1.ListOptions{})
	testenv.Must(t, err)
	for _, want := range []string{"LeasesRebuilt", "default/web [10.244.1.7]"} {
		if text := fmt.Sprint(events.Items); !strings.Contains(text, want) {
			t.Errorf("no event says %q in\n%s", want, text)
		}
	}

	// What cannot be mended makes the node unready, and the API says so.
	testenv.Must(t, os.RemoveAll(filepath.Join(leases, "settings.json")))
	testenv.Must(t, os.Mkdir(filepath.Join(leases, "settings.json"), 0o700))
	run(func() { condition(corev1.ConditionTrue, "settings.json") })
	testenv.Must(t, os.RemoveAll(filepath.Join(leases, "settings.json")))

	// In a mount of a directory that was removed nothing can be made: the agent ends, and has the one of that time when it
	// is started anew.
	mounted := filepath.Join(dir, "mounted")
	testenv.Must(t, os.Mkdir(mounted, 0o755))
	testenv.Must(t, unix.Mount(leases, mounted, "", unix.MS_BIND, ""))
	defer func() { testenv.Must(t, unix.Unmount(mounted, unix.MNT_DETACH)) }()
	o := options()
	o.Paths.Leases = mounted
	ended := make(chan error, 1)
	go func() { ended <- agent.Run(ctx, o) }()
	unready()
	ready()
	testenv.Eventually(t, "the directory is removed, in which the agent writes meanwhile", func() (bool, string) {
		err := os.RemoveAll(leases)
		return err == nil, fmt.Sprint(err)
	})
	var removed *lease.RemovedError
	testenv.Eventually(t, "the agent whose directory was removed ends", func() (bool, string) {
		select {
		case err := <-ended:
			return errors.As(err, &removed), err.Error()
		default:
			return false, "it runs"
		}
	})
}

// lost takes the files of a pod's lease away while an agent runs and while none does: the pod keeps what it has.
func lost(t *testing.T, run func(check func()), ready func(), dir, leases string) {
	t.Helper()
	node, err := link.Here()
	testenv.Must(t, err)
	defer node.Close()
	path := filepath.Join(dir, "cni-web")
	testenv.Must(t, link.Create(path))
	defer func() { testenv.Must(t, link.Delete(path)) }()
	pod, err := link.Open(path)
	testenv.Must(t, err)
	defer pod.Close()
	address := netip.MustParseAddr("10.244.1.7")
	testenv.Must(t, podlink.Add(node, pod, podlink.Pod{Device: "eth0", MAC: net.HardwareAddr{2, 0, 0, 0, 1, 7}, HostDevice: "web-abcde", HostMAC: net.HardwareAddr{2, 0, 0, 0, 2, 7},
		Alias: "fathom pod default/web eth0", MTU: 1500, Addrs: []netip.Addr{address}}))
	held := func() {
		t.Helper()
		testenv.Eventually(t, "the pod has its lease again", func() (bool, string) {
			l, err := os.ReadFile(filepath.Join(leases, "addresses", address.String()))
			return err == nil && strings.Contains(string(l), `"podName":"web"`) && strings.Contains(string(l), `"pool":"default"`) && strings.Contains(string(l), path), fmt.Sprintf("%s %v", l, err)
		})
		linktest.Run(t, node, "ping", "-c1", "-W5", address.String())
	}
	run(func() {
		ready()
		for _, gone := range []string{"attachments/*", "*/*", "*"} {
			held()
			files, err := filepath.Glob(filepath.Join(leases, gone))
			testenv.Must(t, err)
			for _, f := range files {
				testenv.Must(t, os.RemoveAll(f))
			}
		}
		held()
		// How the node was before is not forgotten with the files.
		testenv.Eventually(t, "the settings are recorded again", func() (bool, string) {
			data, err := os.ReadFile(filepath.Join(leases, "settings.json"))
			return err == nil && strings.Contains(string(data), "ip_forward"), fmt.Sprintf("%s %v", data, err)
		})
	})
	testenv.Must(t, os.RemoveAll(leases))
	run(held)

	// The node's own address changes, and the Node object never does: the route to the pod went with its source, and is
	// there again. With the address it is the node's source again.
	source := func(want string) {
		t.Helper()
		testenv.Eventually(t, "the node talks to its pod from "+want, func() (bool, string) {
			route, _ := linktest.Try(node, "ip", "route", "get", address.String())
			_, err := linktest.Try(node, "ping", "-c1", "-W1", address.String())
			return err == nil && strings.Contains(route, "dev web-abcde src "+want), route
		})
	}
	run(func() {
		source("10.1.1.2")
		linktest.Run(t, node, "ip", "addr", "add", "10.1.1.3/16", "dev", "eth0")
		linktest.Run(t, node, "ip", "addr", "del", "10.1.1.2/24", "dev", "eth0")
		source("10.1.1.3")
		linktest.Run(t, node, "ip", "addr", "add", "10.1.1.2/24", "dev", "eth0")
		linktest.Run(t, node, "ip", "addr", "del", "10.1.1.3/16", "dev", "eth0")
		source("10.1.1.2")
	})
}
