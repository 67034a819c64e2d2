package main

import (
	"bytes"
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

	"github.com/fathom-network/fathom/internal/facts/podnet"
	"github.com/fathom-network/fathom/internal/kernel/bpf/fastpath"
	"github.com/fathom-network/fathom/internal/kernel/link"
	"github.com/fathom-network/fathom/internal/kernel/podroute"
	"github.com/fathom-network/fathom/internal/kernel/ruleset"
)

// bench is a run.
type bench struct {
	options
	dir      string
	made     int // namespaces and nodes
	ways     []*way
	programs []*exec.Cmd
}

// node is a namespace that stands for one.
type node struct {
	*link.Namespace
	path string // of the namespace
	dir  string
	i    int // 1 or 2
	conf map[string]any
	// after is done when the node has its pods.
	after func() error
}

const (
	sameNode = "same node"
	twoNodes = "two nodes"
	veth     = "veth pair"
)

// kinds are the ways in the order of the table.
var kinds = []struct {
	name  string
	where []string // it is measured in
	set   func(ctx context.Context, b *bench, nodes []*node) error
}{
	{"fathom", []string{sameNode}, fathom(podnet.Direct, true)},
	{"fathom direct", []string{twoNodes}, fathom(podnet.Direct, true)},
	{"fathom vxlan", []string{twoNodes}, fathom(podnet.VXLAN, true)},
	{"fathom without fastPath", []string{sameNode, twoNodes}, fathom(podnet.Direct, false)},
	{"bridge, nf-call 1", []string{sameNode, twoNodes}, bridge("1")},
	{"bridge, nf-call 0", []string{sameNode, twoNodes}, bridge("0")},
	{"ptp", []string{sameNode, twoNodes}, reference("ptp", nil)},
	{"flannel vxlan", []string{sameNode, twoNodes}, flannel("vxlan")},
	{"flannel host-gw", []string{twoNodes}, flannel("host-gw")},
}

// rules are what every node has of a proxy: what conntrack holds to be invalid is dropped, and a map of Services.
const rules = `table ip proxy {
	map no-endpoint-services { type ipv4_addr . inet_proto . inet_service : verdict; }
	map services { type ipv4_addr . inet_proto . inet_service : verdict; }
	chain service { meta l4proto { tcp, udp } dnat to 10.244.1.250:8080; }
	chain services { ip daddr . meta l4proto . th dport vmap @services; }
	chain forward { type filter hook forward priority -110;
		ct state invalid drop
		ct state new ip daddr . meta l4proto . th dport vmap @no-endpoint-services
	}
	chain prerouting { type nat hook prerouting priority -100; jump services; }
	chain output { type nat hook output priority -100; jump services; }
	chain postrouting { type nat hook postrouting priority 100;
		meta mark & 0x4000 != 0x4000 return
		meta mark set meta mark ^ 0x4000
		masquerade
	}
}
add element ip proxy services { 10.96.0.1 . tcp . 443 : goto service, 10.96.0.10 . udp . 53 : goto service, 10.96.0.10 . tcp . 53 : goto service }
`

func nodeAddr(i int) netip.Addr { return netip.AddrFrom4([4]byte{192, 0, 2, byte(i)}) }
func podRange(i int) netip.Prefix {
	return netip.PrefixFrom(netip.AddrFrom4([4]byte{10, 244, byte(i), 0}), 24)
}

// space makes a namespace.
func (b *bench) space() (*link.Namespace, string, error) {
	b.made++
	path := filepath.Join(b.dir, fmt.Sprintf("ns-%d", b.made))
	if err := link.Create(path); err != nil {
		return nil, "", err
	}
	n, err := link.Open(path)
	if err != nil {
		return nil, "", err
	}
	return n, path, n.SetUp("lo", true)
}

// nodes makes one node, or two on a segment.
func (b *bench) nodes(count int) (all []*node, err error) {
	for i := range count {
		n := &node{i: i + 1}
		if n.Namespace, n.path, err = b.space(); err != nil {
			return nil, err
		}
		if n.dir, err = os.MkdirTemp(b.dir, "node-"); err != nil {
			return nil, err
		}
		all = append(all, n)
		for name, value := range map[string]string{"ipv4/ip_forward": "1", "netfilter/nf_conntrack_tcp_timeout_time_wait": "1"} {
			if err := n.Sysctl(name, value); err != nil && !strings.HasPrefix(name, "netfilter") { // nf_conntrack may not be loaded yet
				return nil, err
			}
		}
		if _, err := command(n.Namespace, rules, nil, "nft", "-f", "-"); err != nil {
			return nil, err
		}
	}
	peer, underlay := all[0].Namespace, all[count-1].Namespace
	if count == 1 {
		if underlay, _, err = b.space(); err != nil {
			return nil, err
		}
	}
	if err := peer.SetPair(link.Device{Name: "eth0", Alias: "podbench"}, underlay, link.Device{Name: "eth0", Alias: "podbench"}); err != nil {
		return nil, err
	}
	for _, n := range all {
		if err := n.SetAddrs("eth0", []netip.Prefix{netip.PrefixFrom(nodeAddr(n.i), 24)}); err != nil {
			return nil, err
		}
		if _, err := command(n.Namespace, "", nil, "ip", "route", "add", "default", "via", "192.0.2.254"); err != nil {
			return nil, err
		}
	}
	return all, nil
}

func command(n *link.Namespace, input string, env []string, argv ...string) (string, error) {
	out, _, err := timed(n, input, env, argv...)
	return out, err
}

// spent is the time that a program took, from before its start to after its end, and its processor time.
type spent struct{ wall, cpu time.Duration }

func timed(n *link.Namespace, input string, env []string, argv ...string) (string, spent, error) {
	var out, problems bytes.Buffer
	cmd := exec.Command(argv[0], argv[1:]...)
	cmd.Env = append(os.Environ(), env...)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = strings.NewReader(input), &out, &problems
	began := time.Now()
	if err := n.Start(cmd); err != nil {
		return "", spent{}, err
	}
	if err := cmd.Wait(); err != nil {
		return "", spent{}, fmt.Errorf("%s: %w: %s%s", strings.Join(argv, " "), err, out.Bytes(), problems.Bytes())
	}
	return out.String(), spent{time.Since(began), cmd.ProcessState.UserTime() + cmd.ProcessState.SystemTime()}, nil
}

// plugin calls the node's CNI plugin for a pod.
func (b *bench) plugin(n *node, verb, id, path string) (string, spent, error) {
	input, err := json.Marshal(n.conf)
	if err != nil {
		return "", spent{}, err
	}
	return timed(n.Namespace, string(input), b.pluginEnv(verb, id, path), b.pluginPath(n.conf))
}

// addPod has the plugin attach a pod and returns the pod's address.
func (b *bench) addPod(n *node, id, path string) (netip.Addr, error) {
	out, _, err := b.plugin(n, "ADD", id, path)
	if err != nil {
		return netip.Addr{}, err
	}
	var result struct {
		IPs []struct{ Address netip.Prefix }
	}
	if err := json.Unmarshal([]byte(out), &result); err != nil || len(result.IPs) == 0 {
		return netip.Addr{}, errors.Join(fmt.Errorf("the plugin's answer %q has no address", out), err)
	}
	return result.IPs[0].Address.Addr(), nil
}

func (b *bench) pluginEnv(command, id, path string) []string {
	return []string{"CNI_COMMAND=" + command, "CNI_CONTAINERID=" + id, "CNI_IFNAME=eth0", "CNI_NETNS=" + path,
		"CNI_PATH=" + b.kit + "/cni:" + b.kit + "/programs", "CNI_ARGS=IgnoreUnknown=1;K8S_POD_NAMESPACE=default;K8S_POD_NAME=" + id}
}

func (b *bench) pluginPath(conf map[string]any) string {
	name := conf["type"].(string)
	switch name {
	case "fathom-cni":
		return filepath.Join(b.bin, name)
	case "flannel":
		return filepath.Join(b.kit, "programs", name)
	}
	return filepath.Join(b.kit, "cni", name)
}

// fathom is Fathom's network as its agent makes it.
func fathom(mode podnet.Mode, fast bool) func(context.Context, *bench, []*node) error {
	return func(_ context.Context, _ *bench, nodes []*node) error {
		var list []podnet.Node
		for _, n := range nodes {
			list = append(list, podnet.Node{Name: fmt.Sprint(n.i), Addrs: []netip.Addr{nodeAddr(n.i)}, PodCIDRs: []netip.Prefix{podRange(n.i)}})
		}
		for _, n := range nodes {
			underlay, err := podroute.Underlay(n.Namespace)
			if err != nil {
				return err
			}
			plan, problems := podnet.NewPlan(fmt.Sprint(n.i), underlay, list, podnet.Config{Mode: mode, Device: "fathom.vxlan", VNI: 4789, Port: 4789})
			if len(problems) > 0 {
				return fmt.Errorf("plan the network: %v", problems)
			}
			if err := guard(n.path, plan.Guard); err != nil {
				return err
			}
			if _, err := podroute.Set(n.Namespace, plan); err != nil {
				return err
			}
			n.conf = map[string]any{"cniVersion": "1.1.0", "name": "fathom", "type": "fathom-cni", "mtu": plan.PodMTU,
				// Leases are files, which a bpffs does not hold.
				"dataDir": n.dir + "-leases", "coolDown": "0s", "nodeAddresses": []string{nodeAddr(n.i).String()},
				"pools": []any{map[string]any{"name": "default", "ranges": []string{podRange(n.i).String()}}}}
			if err := unix.Mount("bpf", n.dir, "bpf", 0, ""); err != nil {
				return fmt.Errorf("mount a bpffs at %s: %w", n.dir, err)
			}
			path, err := fastpath.Open(n.Namespace, fastpath.Options{Dir: filepath.Join(n.dir, "fathom")})
			if err != nil {
				return err
			}
			fastPlan := fastpath.Plan{Fast: fast, Ways: plan.Ways(underlay)}
			n.after = func() error {
				_, err := path.Set(fastPlan)
				return err
			}
		}
		return nil
	}
}

// guard has a node refuse what the agent would have it refuse.
func guard(path string, g podnet.Guard) error {
	rules, err := ruleset.Open(path)
	if err != nil {
		return err
	}
	defer rules.Close()
	_, err = rules.SetGuard(g)
	return err
}

// reference is one of the reference plugins with host-local, and routes between the nodes.
func reference(plugin string, more map[string]any) func(context.Context, *bench, []*node) error {
	return func(_ context.Context, _ *bench, nodes []*node) error {
		for _, n := range nodes {
			n.conf = map[string]any{"cniVersion": "1.0.0", "name": "reference", "type": plugin, "mtu": 1500,
				"ipam": map[string]any{"type": "host-local", "ranges": []any{[]any{map[string]any{"subnet": podRange(n.i).String()}}},
					"dataDir": filepath.Join(n.dir, "host-local"), "routes": []any{map[string]any{"dst": "0.0.0.0/0"}}}}
			for k, v := range more {
				n.conf[k] = v
			}
			for _, other := range nodes {
				if other == n {
					continue
				}
				if _, err := command(n.Namespace, "", nil, "ip", "route", "add", podRange(other.i).String(), "via", nodeAddr(other.i).String()); err != nil {
					return err
				}
			}
		}
		return nil
	}
}

// bridge is the reference plugin bridge as most clusters have it, with packets between the bridge's ports shown to the
// rules of IP or not.
func bridge(call string) func(context.Context, *bench, []*node) error {
	set := reference("bridge", map[string]any{"bridge": "cni0", "isGateway": true, "hairpinMode": true})
	return func(ctx context.Context, b *bench, nodes []*node) error {
		for _, n := range nodes {
			if err := n.Sysctl("bridge/bridge-nf-call-iptables", call); err != nil {
				return fmt.Errorf("load br_netfilter: %w", err)
			}
		}
		return set(ctx, b, nodes)
	}
}

// flannel is the real flanneld, which has its leases in the kit's etcd on the first node.
func flannel(backend string) func(context.Context, *bench, []*node) error {
	return func(ctx context.Context, b *bench, nodes []*node) error {
		endpoint := "http://" + nodeAddr(1).String() + ":2379"
		if err := b.start(nodes[0], "etcd", filepath.Join(b.kit, "bin/etcd"), "--data-dir", filepath.Join(nodes[0].dir, "etcd"),
			"--listen-client-urls", endpoint, "--advertise-client-urls", endpoint, "--listen-peer-urls", "http://127.0.0.1:2380", "--unsafe-no-fsync", "--log-level", "error"); err != nil {
			return err
		}
		config := fmt.Sprintf(`{"Network": "10.244.0.0/16", "SubnetLen": 24, "EnableNFTables": true, "Backend": {"Type": %q, "VNI": 1, "Port": 8472}}`, backend)
		put, err := json.Marshal(map[string][]byte{"key": []byte("/coreos.com/network/config"), "value": []byte(config)})
		if err != nil {
			return err
		}
		if err := eventually(ctx, func() error {
			_, err := command(nodes[0].Namespace, string(put), nil, "curl", "-sSf", "-m", "2", "-d", "@-", endpoint+"/v3/kv/put")
			return err
		}); err != nil {
			return err
		}
		for _, n := range nodes {
			file := filepath.Join(n.dir, "subnet.env")
			if err := b.start(n, "flanneld", filepath.Join(b.kit, "programs/flanneld"), "-etcd-endpoints", endpoint, "-iface", "eth0", "-ip-masq", "-subnet-file", file); err != nil {
				return err
			}
			n.conf = map[string]any{"cniVersion": "0.3.1", "name": "cbr0", "type": "flannel", "subnetFile": file, "dataDir": filepath.Join(n.dir, "flannel"),
				"delegate": map[string]any{"hairpinMode": true, "isDefaultGateway": true},
				"ipam":     map[string]any{"dataDir": filepath.Join(n.dir, "host-local")}}
			if err := n.Sysctl("bridge/bridge-nf-call-iptables", "1"); err != nil {
				return fmt.Errorf("load br_netfilter: %w", err)
			}
			if err := eventually(ctx, func() error { _, err := os.Stat(file); return err }); err != nil {
				log, _ := os.ReadFile(filepath.Join(n.dir, "flanneld.log"))
				return fmt.Errorf("flanneld: %w: %s", err, log[max(0, len(log)-2000):])
			}
		}
		// Each follows the other's lease in its own time.
		for range len(nodes) - 1 {
			for _, n := range nodes {
				if err := eventually(ctx, func() error {
					out, err := command(n.Namespace, "", nil, "ip", "route")
					if err == nil && strings.Count(out, "10.244.") == 0 {
						err = errors.New("flanneld has made no route to the other node")
					}
					return err
				}); err != nil {
					return err
				}
			}
		}
		return nil
	}
}

// start starts a program on a node, which lives as long as this one.
func (b *bench) start(n *node, name string, argv ...string) error {
	log, err := os.Create(filepath.Join(n.dir, name+".log"))
	if err != nil {
		return err
	}
	defer log.Close()
	cmd := exec.Command(argv[0], argv[1:]...)
	cmd.Stdout, cmd.Stderr = log, log
	if err := n.Start(cmd); err != nil {
		return err
	}
	b.programs = append(b.programs, cmd)
	return nil
}

func eventually(ctx context.Context, try func() error) error {
	var err error
	for deadline := time.Now().Add(30 * time.Second); time.Now().Before(deadline); time.Sleep(50 * time.Millisecond) {
		if err = try(); err == nil || ctx.Err() != nil {
			return errors.Join(err, ctx.Err())
		}
	}
	return fmt.Errorf("not within 30 s: %w", err)
}

// add makes a way.
func (b *bench) add(ctx context.Context, where, name string, set func(context.Context, *bench, []*node) error) error {
	count := 1
	if where == twoNodes {
		count = 2
	}
	nodes, err := b.nodes(count)
	if err != nil {
		return err
	}
	if err := set(ctx, b, nodes); err != nil {
		return err
	}
	w := &way{where: where, name: name}
	for i := range 2 {
		n := nodes[min(i, count-1)]
		pod, path, err := b.space()
		if err != nil {
			return err
		}
		addr, err := b.addPod(n, fmt.Sprintf("pod-%d", i), path)
		if err != nil {
			return err
		}
		if i == 0 {
			w.from = pod
		} else {
			w.to = addr
			w.server = pod
		}
	}
	for _, n := range nodes {
		if n.after != nil {
			if err := n.after(); err != nil {
				return err
			}
		}
	}
	b.ways = append(b.ways, w)
	return nil
}

// addPlain makes the pair of devices that all is compared with.
func (b *bench) addPlain(where string) error {
	from, _, err := b.space()
	if err != nil {
		return err
	}
	to, _, err := b.space()
	if err != nil {
		return err
	}
	if err := from.SetPair(link.Device{Name: "eth0", Alias: "podbench"}, to, link.Device{Name: "eth0", Alias: "podbench"}); err != nil {
		return err
	}
	if err := errors.Join(from.SetAddrs("eth0", []netip.Prefix{netip.MustParsePrefix("192.0.2.1/24")}), to.SetAddrs("eth0", []netip.Prefix{netip.MustParsePrefix("192.0.2.2/24")})); err != nil {
		return err
	}
	b.ways = append(b.ways, &way{where: where, name: veth, from: from, server: to, to: netip.MustParseAddr("192.0.2.2")})
	return nil
}

// makeWays makes all ways that are wanted.
func (b *bench) makeWays(ctx context.Context) error {
	only := strings.Split(b.only, ",")
	for _, where := range []string{sameNode, twoNodes} {
		if err := b.addPlain(where); err != nil {
			return err
		}
		for _, k := range kinds {
			if !slices.Contains(k.where, where) || b.only != "" && !slices.Contains(only, k.name) {
				continue
			}
			if err := b.add(ctx, where, k.name, k.set); err != nil {
				return fmt.Errorf("%s, %s: %w", where, k.name, err)
			}
		}
	}
	return nil
}
