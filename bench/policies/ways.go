package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/fathom-network/fathom/bench/traffic"
	"github.com/fathom-network/fathom/internal/facts/conflist"
	"github.com/fathom-network/fathom/internal/kernel/link"
)

// bench is a run.
type bench struct {
	options
	dir      string
	made     int // namespaces
	here     *link.Namespace
	cluster  *cluster
	ways     []*way
	programs []*exec.Cmd
	notes    []string
	measured func() // is called when the traffic has been measured
}

// way is a pair of nodes.
type way struct {
	name     string
	policies int
	fast     bool
	// enforce has somebody else than Fathom's agent enforce the policies, of which that one then does not hear.
	enforce func(context.Context, *bench, *way) error

	number int
	nodes  [2]*node
	pods   map[int]*pod
	rates  map[string][]float64 // by where, and measure
	work   work
}

type node struct {
	*link.Namespace
	way        *way
	i          int // 1 or 2
	dir        string
	kubeconfig string
	agent      *exec.Cmd
	// other is the program of somebody else who enforces policies.
	other    *exec.Cmd
	otherEnv []string
}

type pod struct {
	*link.Namespace
	addr netip.Addr
}

const (
	fathom    = "fathom"
	fathomOff = "fathom without fastPath"
	chains    = "chains like kube-router"
	queue     = "kube-network-policies"
)

// base is what a way is compared with.
func (b *bench) base(w *way) *way {
	if w.fast {
		return b.find(fathom, 0)
	}
	return b.find(fathomOff, 0)
}

func (b *bench) find(name string, policies int) *way {
	for _, w := range b.ways {
		if w.name == name && w.policies == policies {
			return w
		}
	}
	return nil
}

func nodeAddr(i int) netip.Addr { return netip.AddrFrom4([4]byte{192, 0, 2, byte(i)}) }
func podRange(i int) netip.Prefix {
	return netip.PrefixFrom(netip.AddrFrom4([4]byte{10, 244, byte(i), 0}), 24)
}

// begin makes everything that is measured.
func (b *bench) begin(ctx context.Context) error {
	ways := []*way{
		{name: fathom, fast: true}, {name: fathom, policies: 10, fast: true}, {name: fathom, policies: 100, fast: true},
		{name: fathom, policies: 1000, fast: true}, {name: fathom, policies: 10_000, fast: true},
		{name: fathomOff}, {name: fathomOff, policies: 1000}, {name: fathomOff, policies: 10_000},
		// Of 10,000 policies, nft alone reads for minutes what these rules are.
		{name: chains, policies: 1000, enforce: setChains},
	}
	if _, err := os.Stat(b.other); err == nil {
		ways = append(ways, &way{name: queue, policies: 1000, enforce: setQueue})
	} else {
		b.notes = append(b.notes, "kube-network-policies was not built, and is left out")
	}
	for _, w := range ways {
		if b.only != "" && w.policies > 0 && !slices.Contains(strings.Split(b.only, ","), fmt.Sprintf("%s/%d", w.name, w.policies)) {
			continue
		}
		w.number, w.pods, w.rates = len(b.ways), map[int]*pod{}, map[string][]float64{}
		b.ways = append(b.ways, w)
	}
	if err := os.Mkdir(filepath.Join(b.dir, "netns"), 0o700); err != nil {
		return err
	}
	if err := b.beginCluster(ctx); err != nil {
		return fmt.Errorf("begin the cluster: %w", err)
	}
	began := time.Now()
	most := 0
	for _, w := range b.ways {
		most = max(most, w.policies)
	}
	if err := b.cluster.fill(ctx, len(b.ways), most); err != nil {
		return fmt.Errorf("make the objects: %w", err)
	}
	fmt.Fprintf(os.Stderr, "policies: %d policies and %d pods made in %v\n", most, allPods*len(b.ways), time.Since(began).Round(time.Second))
	// From here on threads wait in system calls for each other, which a collector of garbage would wait for.
	b.measured = traffic.Prepare()
	for _, w := range b.ways {
		fmt.Fprintf(os.Stderr, "policies: %s with %d policies begins\n", w.name, w.policies)
		if err := b.make(ctx, w); err != nil {
			return fmt.Errorf("%s with %d policies: %w", w.name, w.policies, err)
		}
	}
	return nil
}

// make makes a way's nodes, and their pods.
func (b *bench) make(ctx context.Context, w *way) error {
	if _, err := b.cluster.NetworkingV1().NetworkPolicies(namespace(answerer)).Create(ctx, latencyPolicy(w.number, yes), metav1.CreateOptions{}); err != nil {
		return err
	}
	heard := w.policies
	if w.enforce != nil {
		heard = 0
	}
	port, err := b.cluster.front(w.number, heard)
	if err != nil {
		return err
	}
	kubeconfig, err := b.cluster.kubeconfig(port)
	if err != nil {
		return err
	}
	for i := range w.nodes {
		if w.nodes[i], err = b.node(w, i+1); err != nil {
			return err
		}
		w.nodes[i].kubeconfig = kubeconfig
	}
	const eth0, alias = "eth0", "policybench"
	if err := w.nodes[0].SetPair(link.Device{Name: eth0, Alias: alias}, w.nodes[1].Namespace, link.Device{Name: eth0, Alias: alias}); err != nil {
		return err
	}
	for _, n := range w.nodes {
		if err := n.SetAddrs(eth0, []netip.Prefix{netip.PrefixFrom(nodeAddr(n.i), 24)}); err != nil {
			return err
		}
		if _, err := command(n.Namespace, "", nil, "ip", "route", "add", "default", "via", "192.0.2.254"); err != nil {
			return err
		}
		if err := b.startAgent(n); err != nil {
			return err
		}
	}
	for i := range allPods {
		if isReal(i) {
			if err := b.addPod(ctx, w, i); err != nil {
				return err
			}
		}
	}
	if w.enforce != nil {
		if err := w.enforce(ctx, b, w); err != nil {
			return err
		}
	}
	if err := errors.Join(traffic.SetClient(w.pods[client].Namespace), traffic.Serve(w.pods[nearServer].Namespace), traffic.Serve(w.pods[farServer].Namespace)); err != nil {
		return err
	}
	for _, p := range places {
		if err := eventually(ctx, func() error { return traffic.Reach(w.pods[client].Namespace, w.pods[p.server].addr) }); err != nil {
			return fmt.Errorf("%s: %w", p.name, err)
		}
	}
	return nil
}

// node makes a node's namespace, from which the API server can be reached.
func (b *bench) node(w *way, i int) (*node, error) {
	n := &node{way: w, i: i}
	var err error
	if n.Namespace, _, err = b.space(); err != nil {
		return nil, err
	}
	if n.dir, err = os.MkdirTemp(b.dir, "node-"); err != nil {
		return nil, err
	}
	bpffs := filepath.Join(n.dir, "bpf")
	if err := os.Mkdir(bpffs, 0o700); err != nil {
		return nil, err
	}
	if err := unix.Mount("bpf", bpffs, "bpf", 0, ""); err != nil {
		return nil, fmt.Errorf("mount a bpffs at %s: %w", bpffs, err)
	}
	// What is measured makes more connections, and packets of none, than their entries have time to go.
	for name, value := range map[string]string{"ipv4/ip_forward": "1", "netfilter/nf_conntrack_tcp_timeout_time_wait": "1", "netfilter/nf_conntrack_udp_timeout": "1"} {
		if err := n.Sysctl(name, value); err != nil && !strings.HasPrefix(name, "netfilter") { // nf_conntrack may not be loaded yet
			return nil, err
		}
	}
	device, subnet := fmt.Sprintf("api-%d-%d", w.number, i), func(last int) netip.Prefix {
		return netip.PrefixFrom(netip.AddrFrom4([4]byte{198, 18, byte(2*w.number + i), byte(last)}), 24)
	}
	if err := b.here.SetPair(link.Device{Name: device, Alias: "policybench"}, n.Namespace, link.Device{Name: "api", Alias: "policybench"}); err != nil {
		return nil, err
	}
	if err := errors.Join(b.here.SetAddrs(device, []netip.Prefix{subnet(1)}), n.SetAddrs("api", []netip.Prefix{subnet(2)})); err != nil {
		return nil, err
	}
	_, err = command(n.Namespace, "", nil, "ip", "route", "add", apiAddr+"/32", "via", subnet(1).Addr().String())
	return n, err
}

// space makes a namespace.
func (b *bench) space() (*link.Namespace, string, error) {
	b.made++
	path := filepath.Join(b.dir, "netns", fmt.Sprint(b.made))
	if err := link.Create(path); err != nil {
		return nil, "", err
	}
	n, err := link.Open(path)
	if err != nil {
		return nil, "", err
	}
	return n, path, n.SetUp("lo", true)
}

func (n *node) at(name string) string { return filepath.Join(n.dir, name) }

// startAgent starts Fathom's agent, as its DaemonSet does.
func (b *bench) startAgent(n *node) (err error) {
	path := "auto"
	if !n.way.fast {
		path = "off"
	}
	n.agent, err = b.startProgram(n.Namespace, fmt.Sprintf("agent-%s", nodeName(n.way.number, n.i)), nil, filepath.Join(b.bin, "fathom-agent"), "run", "--node", nodeName(n.way.number, n.i),
		"--kubeconfig", n.kubeconfig, "--plugin", "", "--cni-bin", n.dir, "--conflist", n.at("x.conflist"), "--leases", n.at("leases"), "--socket", n.at("agent.sock"),
		"--netns-dir", filepath.Join(b.dir, "netns"), "--sysctl-dir", "/proc/sys/net", "--bpf-dir", n.at("bpf/fathom"), "--fast-path", path, "--log-level", "warn")
	return err
}

// addPod has the plugin attach a pod that runs, as a runtime would, and says where it is, as a kubelet would.
func (b *bench) addPod(ctx context.Context, w *way, i int) error {
	n := w.nodes[nodeOf(i)-1]
	p, err := b.cluster.CoreV1().Pods(namespace(i)).Get(ctx, podName(w.number, i), metav1.GetOptions{})
	if err != nil {
		return err
	}
	var list struct {
		CNIVersion, Name string
		Plugins          []map[string]any
	}
	if err := eventually(ctx, func() error {
		text, err := os.ReadFile(n.at("x.conflist"))
		if err == nil {
			err = json.Unmarshal(text, &list)
		}
		return err
	}); err != nil {
		return fmt.Errorf("the agent writes no list of plugins: %w; %s", err, b.log("agent-"+nodeName(w.number, n.i)))
	}
	conf := list.Plugins[0]
	conf["cniVersion"], conf["name"], conf["dataDir"], conf["agentSocket"] = list.CNIVersion, list.Name, n.at("leases"), n.at("agent.sock")
	input, err := json.Marshal(conf)
	if err != nil {
		return err
	}
	space, path, err := b.space()
	if err != nil {
		return err
	}
	id := fmt.Sprintf("c%d-%d", w.number, i)
	plugin := func(verb string) (string, error) {
		return command(n.Namespace, string(input), []string{"CNI_COMMAND=" + verb, "CNI_CONTAINERID=" + id, "CNI_IFNAME=eth0", "CNI_NETNS=" + path, "CNI_PATH=" + b.bin,
			"CNI_ARGS=IgnoreUnknown=1;K8S_POD_NAMESPACE=" + p.Namespace + ";K8S_POD_NAME=" + p.Name + ";K8S_POD_UID=" + string(p.UID)}, filepath.Join(b.bin, conflist.Plugin))
	}
	var out string
	// As a runtime does, where the agent has too much to do at first.
	if err := eventually(ctx, func() (err error) {
		if out, err = plugin("ADD"); err != nil {
			_, other := plugin("DEL")
			return errors.Join(err, other)
		}
		return nil
	}); err != nil {
		return err
	}
	var result struct {
		IPs []struct{ Address netip.Prefix }
	}
	if err := json.Unmarshal([]byte(out), &result); err != nil || len(result.IPs) == 0 {
		return errors.Join(fmt.Errorf("the plugin's answer %q has no address", out), err)
	}
	w.pods[i] = &pod{space, result.IPs[0].Address.Addr()}
	return b.cluster.setAddr(ctx, p, w.pods[i].addr)
}

// log is the end of what a program has said.
func (b *bench) log(name string) string {
	text, _ := os.ReadFile(filepath.Join(b.dir, name+".log"))
	return string(text[max(0, len(text)-2000):])
}
