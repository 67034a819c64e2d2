package agent_test

import (
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"

	"github.com/fathom-network/fathom/internal/agent"
	"github.com/fathom-network/fathom/internal/cni"
	"github.com/fathom-network/fathom/internal/install"
	"github.com/fathom-network/fathom/internal/kernel/link"
	"github.com/fathom-network/fathom/internal/testenv"
	"github.com/fathom-network/fathom/internal/testenv/linktest"
	"github.com/fathom-network/fathom/internal/watch/kube"
)

// asAgent is in the environment of a process that runs an agent, and says which.
const asAgent = "FATHOM_TEST_AS_AGENT"

// TestMain has the test's program be the CNI plugin, or an agent, where it is run as one: both are processes of their own, which may be killed.
func TestMain(m *testing.M) {
	switch args := os.Args[1:]; {
	case cni.DeletesDevice(args):
		if cni.DeleteDevice(args) != nil {
			os.Exit(1)
		}
	case os.Getenv("CNI_COMMAND") != "":
		if err := cni.Main(os.Stdout, ""); err != nil {
			_ = err.Print()
			os.Exit(1)
		}
	case os.Getenv(asAgent) != "":
		if err := runAgent(os.Getenv(asAgent)); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
	default:
		os.Exit(m.Run())
	}
}

// ownAgent is what an agent in a process of its own is told.
type ownAgent struct{ Kubeconfig, Dir, BPF, FastPath string }

func (o ownAgent) paths() agent.Paths {
	at := func(name string) string { return filepath.Join(o.Dir, name) }
	return agent.Paths{CNIBin: o.Dir, Conflist: at("x.conflist"), Leases: at("leases"), Socket: at("agent.sock"), NetNS: at("netns"), Sysctl: "/proc/sys/net", BPF: o.BPF}
}

func runAgent(text string) error {
	var o ownAgent
	if err := json.Unmarshal([]byte(text), &o); err != nil {
		return err
	}
	client, err := kube.Connect(o.Kubeconfig)
	if err != nil {
		return err
	}
	// What is taken out of the table by a test stays out of it for as long as that lasts.
	return agent.Run(context.Background(), agent.Options{Node: "n1", Client: client, Log: slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: slog.LevelWarn})),
		Resync: time.Hour, FastPath: o.FastPath, Paths: o.paths()})
}

// policyNode is a node with a real API server, an agent in a process of its own, and pods that the real plugin attaches. The test runs in the
// node's namespace.
type policyNode struct {
	testing.TB
	api   *kube.Client
	own   ownAgent
	log   *testenv.Output
	agent *exec.Cmd
}

// pod is one that is attached.
type pod struct {
	*link.Namespace
	namespace, name, path string
	addrs                 []netip.Addr // IPv4, IPv6
	free                  func()       // takes the sandbox away
}

// onPolicyNode runs f in the namespace of a new node, which has a segment with another namespace: that one's addresses are 10.1.1.3 and
// fd00:1::3, and those of a pod of another node, 10.244.2.5 and fd00:64:2::5.
func onPolicyNode(t *testing.T, fastPath string, f func(*policyNode)) {
	t.Helper()
	testenv.NeedRoot(t)
	testenv.NeedFile(t, kit+"kube-apiserver", "make kit")
	const within = "FATHOM_TEST_ON_POLICY_NODE"
	if os.Getenv(within) == t.Name() {
		f(newPolicyNode(t, fastPath))
		return
	}
	node := linktest.Namespace(t)
	other, path := linktest.NamespaceAt(t)
	testenv.Must(t, node.SetPair(link.Device{Name: "eth0", Alias: "test"}, other, link.Device{Name: "eth0", Alias: "test"}))
	for n, commands := range map[*link.Namespace][]string{
		node: {"ip link set lo up", "ip addr add 10.1.1.2/16 dev eth0", "ip addr add fd00:1::2/64 dev eth0 nodad", "ip link set eth0 up", "ip route add default via 10.1.1.1", "ip -6 route add default via fd00:1::1"},
		other: {"ip link set lo up", "ip addr add 10.1.1.3/16 dev eth0", "ip addr add fd00:1::3/64 dev eth0 nodad", "ip addr add 10.244.2.5/32 dev lo", "ip addr add fd00:64:2::5/128 dev lo nodad", "ip link set eth0 up",
			"ip route add 10.244.1.0/24 via 10.1.1.2 src 10.244.2.5", "ip -6 route add fd00:64:1::/64 via fd00:1::2 src fd00:64:2::5"},
	} {
		for _, c := range commands {
			linktest.Run(t, n, strings.Fields(c)...)
		}
	}
	self, err := os.Executable()
	testenv.Must(t, err)
	cmd := exec.Command(self, "-test.run=^"+strings.ReplaceAll(t.Name(), "/", "$/^")+"$", "-test.v", "-test.timeout=20m")
	cmd.Env = append(os.Environ(), within+"="+t.Name(), otherNS+"="+path)
	var out strings.Builder
	cmd.Stdout, cmd.Stderr = &out, &out
	testenv.Must(t, node.Start(cmd))
	if err := cmd.Wait(); err != nil {
		t.Fatalf("%v\n%s", err, out.String())
	}
	t.Log(out.String())
}

// otherNS is in the environment of the process on the node: the path of the other namespace.
const otherNS = "FATHOM_TEST_OTHER_NS"

// other opens the other namespace.
func (n *policyNode) other() *link.Namespace {
	n.Helper()
	o, err := link.Open(os.Getenv(otherNS))
	testenv.Must(n, err)
	n.Cleanup(o.Close)
	return o
}

func newPolicyNode(t *testing.T, fastPath string) *policyNode {
	connect, kubeconfig := server(t)
	fs := t.TempDir()
	testenv.Must(t, unix.Mount("bpffs", fs, "bpf", 0, ""))
	t.Cleanup(func() { _ = unix.Unmount(fs, unix.MNT_DETACH) })
	n := &policyNode{TB: t, api: connect(admin), log: &testenv.Output{}, own: ownAgent{kubeconfig(ofAgent), t.TempDir(), filepath.Join(fs, "fathom"), fastPath}}
	testenv.Must(t, os.Mkdir(n.own.paths().NetNS, 0o700))
	objects, err := install.Objects(install.Options{Config: map[string]string{"mode": "direct"}})
	testenv.Must(t, err)
	objects = slices.DeleteFunc(objects, func(o *unstructured.Unstructured) bool {
		return o.GetKind() == "DaemonSet" || o.GetKind() == "Deployment"
	})
	testenv.Must(t, n.api.Apply(t.Context(), install.Owner, objects))
	for i := 1; i <= 2; i++ {
		cidrs := []string{fmt.Sprintf("10.244.%d.0/24", i), fmt.Sprintf("fd00:64:%d::/64", i)}
		made, err := n.api.CoreV1().Nodes().Create(t.Context(), &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: fmt.Sprint("n", i)}, Spec: corev1.NodeSpec{PodCIDR: cidrs[0], PodCIDRs: cidrs}}, metav1.CreateOptions{})
		testenv.Must(t, err)
		made.Status.Addresses = []corev1.NodeAddress{{Type: corev1.NodeInternalIP, Address: fmt.Sprintf("10.1.1.%d", i+1)}, {Type: corev1.NodeInternalIP, Address: fmt.Sprintf("fd00:1::%d", i+1)}}
		_, err = n.api.CoreV1().Nodes().UpdateStatus(t.Context(), made, metav1.UpdateOptions{})
		testenv.Must(t, err)
	}
	n.startAgent()
	t.Cleanup(func() {
		n.kill()
		if t.Failed() {
			text := n.log.String()
			t.Logf("agent:\n%s", text[max(0, len(text)-5000):])
		}
	})
	testenv.Eventually(t, "the agent writes its list of plugins", func() (bool, string) {
		_, err := os.Stat(n.own.paths().Conflist)
		return err == nil, n.log.String()
	})
	return n
}

func (n *policyNode) startAgent() {
	n.Helper()
	text, err := json.Marshal(n.own)
	testenv.Must(n, err)
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), asAgent+"="+string(text))
	cmd.Stdout, cmd.Stderr = n.log, n.log
	testenv.Must(n, cmd.Start())
	n.agent = cmd
}

// kill ends the agent as the kernel does when memory runs out.
func (n *policyNode) kill() {
	_ = n.agent.Process.Kill()
	_ = n.agent.Wait()
}

// namespace makes one of the cluster's.
func (n *policyNode) namespace(name string) {
	n.Helper()
	_, err := n.api.CoreV1().Namespaces().Create(n.Context(), &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: name}}, metav1.CreateOptions{})
	testenv.Must(n, err)
	_, err = n.api.CoreV1().ServiceAccounts(name).Create(n.Context(), &corev1.ServiceAccount{ObjectMeta: metav1.ObjectMeta{Name: "default"}}, metav1.CreateOptions{})
	testenv.Must(n, err)
}

// object makes a pod's object.
func (n *policyNode) object(node, namespace, name string, labels map[string]string) *corev1.Pod {
	n.Helper()
	p, err := n.api.CoreV1().Pods(namespace).Create(n.Context(), &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Name: name, Labels: labels},
		Spec: corev1.PodSpec{NodeName: node, Containers: []corev1.Container{{Name: "c", Image: "x"}}}}, metav1.CreateOptions{})
	testenv.Must(n, err)
	return p
}

// setAddrs says of a pod what a kubelet does when it runs.
func (n *policyNode) setAddrs(p *corev1.Pod, addrs ...netip.Addr) {
	n.Helper()
	p.Status.Phase, p.Status.PodIP, p.Status.PodIPs = corev1.PodRunning, addrs[0].String(), nil
	for _, a := range addrs {
		p.Status.PodIPs = append(p.Status.PodIPs, corev1.PodIP{IP: a.String()})
	}
	_, err := n.api.CoreV1().Pods(p.Namespace).UpdateStatus(n.Context(), p, metav1.UpdateOptions{})
	testenv.Must(n, err)
}

// space makes the namespace of a pod's sandbox.
func (n *policyNode) space(namespace, name string) *pod {
	n.Helper()
	p := &pod{namespace: namespace, name: name, path: filepath.Join(n.own.paths().NetNS, namespace+"-"+name)}
	testenv.Must(n, link.Create(p.path))
	var err error
	p.Namespace, err = link.Open(p.path)
	testenv.Must(n, err)
	testenv.Must(n, p.SetUp("lo", true))
	p.free = sync.OnceFunc(func() {
		p.Close()
		if err := link.Delete(p.path); err != nil {
			n.Error(err)
		}
	})
	n.Cleanup(p.free)
	return p
}

// plugin calls the plugin, as a runtime does. It may be called beside others.
func (n *policyNode) plugin(verb string, p *pod, uid string) error {
	text, err := os.ReadFile(n.own.paths().Conflist)
	if err != nil {
		return err
	}
	var list struct {
		CNIVersion, Name string
		Plugins          []map[string]any
	}
	if err := json.Unmarshal(text, &list); err != nil {
		return err
	}
	conf := list.Plugins[0]
	conf["cniVersion"], conf["name"], conf["dataDir"], conf["agentSocket"] = list.CNIVersion, list.Name, n.own.paths().Leases, n.own.paths().Socket
	input, err := json.Marshal(conf)
	if err != nil {
		return err
	}
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), "CNI_COMMAND="+verb, "CNI_CONTAINERID="+p.namespace+"-"+p.name, "CNI_IFNAME=eth0", "CNI_NETNS="+p.path, "CNI_PATH=/",
		"CNI_ARGS=IgnoreUnknown=1;K8S_POD_NAMESPACE="+p.namespace+";K8S_POD_NAME="+p.name+";K8S_POD_UID="+uid)
	cmd.Stdin = strings.NewReader(string(input))
	var problems strings.Builder
	cmd.Stderr = &problems
	out, err := cmd.Output()
	if err != nil {
		return fmt.Errorf("%s of pod %s/%s: %w: %s%s", verb, p.namespace, p.name, err, out, problems.String())
	}
	if verb != "ADD" {
		return nil
	}
	var result struct {
		IPs []struct{ Address netip.Prefix }
	}
	if err := json.Unmarshal(out, &result); err != nil || len(result.IPs) != 2 {
		return fmt.Errorf("the plugin's answer %q has not two addresses: %w", out, err)
	}
	p.addrs = []netip.Addr{result.IPs[0].Address.Addr(), result.IPs[1].Address.Addr()}
	return nil
}

// add makes a pod that runs.
func (n *policyNode) add(namespace, name string, labels map[string]string) *pod {
	n.Helper()
	object, p := n.object("n1", namespace, name, labels), n.space(namespace, name)
	testenv.Must(n, n.plugin("ADD", p, string(object.UID)))
	n.setAddrs(object, p.addrs...)
	return p
}
