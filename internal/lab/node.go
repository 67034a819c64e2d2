package lab

import (
	"bytes"
	"context"
	"crypto/rand"
	_ "embed"
	"encoding/hex"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"sigs.k8s.io/yaml"

	"github.com/fathom-network/fathom/internal/facts/topology"
	"github.com/fathom-network/fathom/internal/kernel/cgroup"
	"github.com/fathom-network/fathom/internal/kernel/machine"
	"github.com/fathom-network/fathom/internal/lab/image"
	"github.com/fathom-network/fathom/internal/lab/mirror"
	"github.com/fathom-network/fathom/internal/lab/networks"
)

// The services of a node's init.
const (
	containerdService = "containerd"
	kubeletService    = "kubelet"
	mirrorService     = "mirror"
)

// containerdConfig is the same on every node: what differs from containerd's defaults, and why.
//
//go:embed containerd.toml
var containerdConfig string

// allRegistries has containerd ask the node's mirror for every registry that has no directory of its own in certs.d. It is
// the server, and not a host before the server: after a host that has no image, containerd would go on to the registry,
// and wait for that one's time-outs where there is no network.
const allRegistries = "server = \"http://" + mirror.Address + "\"\n"

// mirrorProgram is where a node has the mirror's program.
const mirrorProgram = "/usr/local/bin/fathom-mirror"

// writeDisk makes the disk of a node that has none: the images, and the files that differ from node to
// node. It is done while the node is off.
func (l *Lab) writeDisk(c *topology.Cluster, n *topology.Node, store image.Store) error {
	dir := l.dir("nodes", n.Name)
	if err := (machine.Spec{Hostname: n.Name, Dir: dir}).Prepare(hiddenDirs("/", l.Paths)...); err != nil {
		return err
	}
	if err := l.hideFiles("/", n.Name); err != nil {
		return fmt.Errorf("hide the host's files from node %s: %w", n.Name, err)
	}
	if err := os.MkdirAll(l.diskFile(n.Name, "/var/lib"), 0o755); err != nil {
		return err
	}
	if err := store.Clone(l.diskFile(n.Name, "/var/lib/containerd")); err != nil {
		return fmt.Errorf("give node %s its images: %w", n.Name, err)
	}
	for _, dir := range []string{"/etc/cni/net.d", "/etc/kubernetes/manifests"} {
		if err := os.MkdirAll(l.diskFile(n.Name, dir), 0o755); err != nil {
			return err
		}
	}
	files, err := l.nodeFiles(c, n)
	if err != nil {
		return err
	}
	id := make([]byte, 16)
	if _, err := rand.Read(id); err != nil {
		return err
	}
	files[machineID] = []byte(hex.EncodeToString(id) + "\n")
	for path, data := range files {
		if err := writeFile(l.diskFile(n.Name, path), data, 0o644); err != nil {
			return err
		}
	}
	return nil
}

// machineID is the file that tells machines apart. https://www.freedesktop.org/software/systemd/man/latest/machine-id.html
const machineID = "/etc/machine-id"

// nodeFiles are the files that follow from what the node is, by their paths on it.
func (l *Lab) nodeFiles(c *topology.Cluster, n *topology.Node) (map[string][]byte, error) {
	files := map[string][]byte{
		"/etc/hostname":               []byte(n.Name + "\n"),
		"/etc/hosts":                  l.hostsFile(c),
		"/etc/resolv.conf":            l.resolvConf(c),
		"/etc/containerd/config.toml": fmt.Appendf(nil, containerdConfig, l.Kit.PauseImage),
		"/etc/containerd/certs.d/_default/hosts.toml": []byte(allRegistries),
		"/etc/profile.d/fathom.sh":                    []byte(profile(n)),
	}
	kubelet, err := yaml.Marshal(kubeletConfig(c, n))
	if err != nil {
		return nil, err
	}
	files["/var/lib/kubelet/config.yaml"] = kubelet
	network, err := networks.Of(c.Network.Kind).Disk(n)
	if err != nil {
		return nil, err
	}
	maps.Copy(files, network)
	return files, nil
}

func profile(n *topology.Node) string {
	if n.Role == topology.ControlPlane {
		return "export KUBECONFIG=/etc/kubernetes/admin.conf\n"
	}
	return "export KUBECONFIG=/etc/kubernetes/kubelet.conf\n"
}

func (l *Lab) hostsFile(c *topology.Cluster) []byte {
	var b bytes.Buffer
	b.WriteString("127.0.0.1 localhost\n::1 localhost ip6-localhost ip6-loopback\n")
	for i := range c.Nodes {
		for _, a := range l.NodeAddrs(c, &c.Nodes[i]) {
			fmt.Fprintf(&b, "%s %s\n", a, c.Nodes[i].Name)
		}
	}
	return b.Bytes()
}

// resolvConf gives nodes the host's name servers. A name server on the host's loopback is another machine's
// loopback here, so systemd-resolved's own list is read in its place; without any, the core refuses at
// once instead of letting every look-up time out.
func (l *Lab) resolvConf(c *topology.Cluster) []byte {
	for _, path := range []string{"/etc/resolv.conf", "/run/systemd/resolve/resolv.conf"} {
		data, err := os.ReadFile(path)
		if err != nil {
			continue
		}
		if conf := usableResolvConf(string(data)); conf != "" {
			return []byte(conf)
		}
	}
	return fmt.Appendf(nil, "nameserver %s\n", c.Gateways(&l.Lab)[0])
}

func usableResolvConf(conf string) string {
	var keep strings.Builder
	usable := false
	for line := range strings.Lines(conf) {
		f := strings.Fields(line)
		switch {
		case len(f) >= 2 && f[0] == "nameserver":
			if addr, err := netip.ParseAddr(f[1]); err != nil || addr.IsLoopback() {
				continue
			}
			usable = true
		case len(f) < 2 || f[0] == "sortlist" || strings.HasPrefix(f[0], "#"):
			continue
		}
		keep.WriteString(strings.Join(f, " ") + "\n")
	}
	if !usable {
		return ""
	}
	return keep.String()
}

// planeWeight is how many times a worker's processor time a control-plane node gets when all nodes want some. A
// real one has a processor to itself. Here it would get the same as each of twenty workers that start, and all of
// them wait for its API server: with the weight, such a lab is up in three quarters of the time.
const planeWeight = 10

// containersGroup is the cgroup of a node that containerd puts containers in, by its namespace for CRI.
const containersGroup = "k8s.io"

// overlaid are the directories of a node that have the kit's programs, below what is the node's own.
var overlaid = [...]string{"/usr/local", "/opt/cni"}

// spec is what the node's init is told.
func (l *Lab) spec(c *topology.Cluster, n *topology.Node, layer string) machine.Spec {
	addrs := make([]string, 0, 2)
	for _, a := range l.NodeAddrs(c, n) {
		addrs = append(addrs, a.String())
	}
	args := []string{
		"/usr/local/bin/kubelet",
		"--config=/var/lib/kubelet/config.yaml",
		"--kubeconfig=/etc/kubernetes/kubelet.conf",
		"--hostname-override=" + n.Name,
		"--node-ip=" + strings.Join(addrs, ","),
	}
	for _, name := range slices.Sorted(maps.Keys(c.KubeletArgs)) {
		for _, value := range c.KubeletArgs[name] {
			args = append(args, fmt.Sprintf("--%s=%s", name, value))
		}
	}
	s := machine.Spec{
		Hostname: n.Name, Dir: l.dir("nodes", n.Name), Cgroup: l.cgroup(n.Name),
		Overlays: []machine.Overlay{
			{Target: overlaid[0], Lower: []string{filepath.Join(layer, "usr/local"), "/usr/local"}},
			{Target: overlaid[1], Lower: []string{filepath.Join(layer, "opt/cni")}},
		},
		Services: []machine.Service{
			{Name: containerdService, Args: []string{"/usr/local/bin/containerd"}, Log: "/var/log/containerd.log"},
			// kubelet waits until it has its certificates, and an API server to talk to: one that starts
			// earlier meets refusals and then waits, twice as long each time.
			{Name: kubeletService, Args: args, Log: "/var/log/kubelet.log", Manual: true, After: containerdService},
			{Name: mirrorService, Args: []string{mirrorProgram}, Log: "/var/log/mirror.log"},
		},
	}
	if n.Role == topology.ControlPlane {
		for i, v := range c.APIServerVolumes {
			s.Binds = append(s.Binds, machine.Bind{Source: v.HostPath, Target: volumeDir(i), ReadOnly: v.ReadOnly})
		}
		s.CPUWeights = []machine.CPUWeight{{Times: planeWeight}, {Group: containersGroup, Times: planeWeight}}
	}
	for _, m := range n.Mounts {
		s.Binds = append(s.Binds, machine.Bind{Source: m.HostPath, Target: m.NodePath, ReadOnly: m.ReadOnly})
	}
	return s
}

// boot starts the machine of a node and plugs its wire. kubelet is not started yet. A node that runs is
// only plugged in again.
func (l *Lab) boot(ctx context.Context, c *topology.Cluster, n *topology.Node) (*machine.Machine, error) {
	m, err := machine.Open(l.cgroup(n.Name))
	if errors.Is(err, machine.ErrNotRunning) {
		var layer string
		if layer, err = l.kitLayer(); err != nil {
			return nil, err
		}
		init := l.Kit.Own("fathom-init")
		if err := l.Kit.Require(init, l.Kit.Own("fathom-mirror")); err != nil {
			return nil, err
		}
		// What a machine's end leaves: containers' cgroups, which the next containerd does not know.
		if err := cgroup.Kill(ctx, l.cgroup(n.Name)); err != nil {
			return nil, err
		}
		if err := cgroup.Remove(l.cgroup(n.Name)); err != nil {
			return nil, err
		}
		spec := l.spec(c, n, layer)
		spec.Binds = append(spec.Binds, machine.Bind{Source: l.Kit.Own("fathom-mirror"), Target: mirrorProgram, ReadOnly: true})
		m, err = machine.Start(ctx, init, spec)
	}
	if err != nil {
		return nil, err
	}
	if err := l.plug(c, n, m); err != nil {
		return nil, fmt.Errorf("plug in node %s: %w", n.Name, err)
	}
	return m, nil
}

func startKubelet(ctx context.Context, m *machine.Machine) error {
	return waitService(ctx, m, kubeletService)
}

// waitService returns when a service of the node, which is started if need be, has said that it is ready.
func waitService(ctx context.Context, m *machine.Machine, name string) error {
	_, err := m.Control(ctx, machine.Request{Op: machine.OpStart, Service: name})
	return err
}

// kubeletConfig is what `kubeadm init` writes, and what differs: certificates from the cluster's own
// authority for the serving side, no swap, disk or cgroup checks that a shared host would fail.
func kubeletConfig(c *topology.Cluster, n *topology.Node) map[string]any {
	var dns []string
	for _, p := range c.ServiceCIDRs {
		dns = append(dns, dnsAddr(p).String())
	}
	conf := map[string]any{
		"apiVersion": "kubelet.config.k8s.io/v1beta1",
		"kind":       "KubeletConfiguration",
		"authentication": map[string]any{
			"anonymous": map[string]any{"enabled": false},
			"webhook":   map[string]any{"enabled": true},
			"x509":      map[string]any{"clientCAFile": "/etc/kubernetes/pki/ca.crt"},
		},
		"authorization":                 map[string]any{"mode": "Webhook"},
		"tlsCertFile":                   kubeletCert,
		"tlsPrivateKeyFile":             kubeletKey,
		"clusterDomain":                 c.DNSDomain,
		"clusterDNS":                    dns[:1], // one name server a pod, as kubeadm has it
		"containerRuntimeEndpoint":      "unix:///run/containerd/containerd.sock",
		"staticPodPath":                 "/etc/kubernetes/manifests",
		"resolvConf":                    "/etc/resolv.conf",
		"cgroupDriver":                  "cgroupfs",
		"cgroupsPerQOS":                 false,
		"enforceNodeAllocatable":        []string{},
		"failCgroupV1":                  false,
		"failSwapOn":                    false,
		"serializeImagePulls":           false,
		"localStorageCapacityIsolation": true,
		// All nodes share one disk: a full one evicts pods on every node at once and helps none.
		"evictionHard":                map[string]string{"memory.available": "100Mi", "nodefs.available": "0%", "nodefs.inodesFree": "0%", "imagefs.available": "0%"},
		"imageGCHighThresholdPercent": 100,
		"oomScoreAdj":                 oomScore(),
		"maxPods":                     c.MaxPods(n),
		// By default kubelet watches each ConfigMap and Secret from the moment that it hears of a pod, and may ask
		// before the API server's node authorizer has heard of it: it is refused, and asks again a second later.
		// What a pod that runs sees of a change is as old as kubelet's next look at the pod, either way.
		"configMapAndSecretChangeDetectionStrategy": "Get",
	}
	if len(c.FeatureGates) > 0 {
		conf["featureGates"] = c.FeatureGates
	}
	return conf
}

// oomScore is this process's own oom_score_adj (proc_pid_oom_score_adj(5)), for kubelet and kube-proxy to keep.
// They would take -999, so that the kernel spares them before all else of the machine: of the user's machine, here.
// Without CAP_SYS_RESOURCE the kernel refuses that anyway, and they try for 0.2 s each.
func oomScore() int {
	data, err := os.ReadFile("/proc/self/oom_score_adj")
	if err != nil {
		return 0
	}
	score, _ := strconv.Atoi(strings.TrimSpace(string(data)))
	return score
}

// dnsAddr is the tenth address of the Service range, as kubeadm chooses.
func dnsAddr(services netip.Prefix) netip.Addr {
	a := services.Masked().Addr()
	for range 10 {
		a = a.Next()
	}
	return a
}
