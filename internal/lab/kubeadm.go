package lab

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"

	appsv1 "k8s.io/api/apps/v1"
	"sigs.k8s.io/yaml"

	"github.com/fathom-network/fathom/internal/facts/topology"
	"github.com/fathom-network/fathom/internal/kernel/machine"
)

const (
	apiPort       = 6443
	kubeadmConfig = "/etc/kubernetes/kubeadm.yaml"
)

// arg is a command-line argument as kubeadm's v1beta4 configuration writes it.
type arg struct {
	Name  string `json:"name"`
	Value string `json:"value"`
}

// argList makes one list of the lab's own arguments and the user's, which stand in the place of the lab's.
func argList(own map[string]string, users map[string]topology.Values) []arg {
	all := map[string]topology.Values{}
	for name, value := range own {
		all[name] = topology.Values{value}
	}
	maps.Copy(all, users)
	list := make([]arg, 0, len(all))
	for _, name := range slices.Sorted(maps.Keys(all)) {
		for _, value := range all[name] {
			list = append(list, arg{name, value})
		}
	}
	return list
}

// hostFile is kubeadm's HostPathMount.
type hostFile struct {
	Name      string `json:"name"`
	HostPath  string `json:"hostPath"`
	MountPath string `json:"mountPath"`
	ReadOnly  bool   `json:"readOnly"`
	PathType  string `json:"pathType"`
}

// fileAt is a file of the node that a static pod has at the same path.
func fileAt(name, path string) hostFile {
	return hostFile{Name: name, HostPath: path, MountPath: path, ReadOnly: true, PathType: "File"}
}

// volumeDir is where a control-plane node has what kube-apiserver sees of the host. A path of the host need not be one of the
// node, which has a /root, /home and /var of its own.
func volumeDir(i int) string { return fmt.Sprintf("/etc/kubernetes/volumes/%d", i) }

func apiServerVolumes(c *topology.Cluster) []hostFile {
	list := []hostFile{}
	for i, v := range c.APIServerVolumes {
		list = append(list, hostFile{Name: fmt.Sprintf("volume-%d", i), HostPath: volumeDir(i), MountPath: v.MountPath, ReadOnly: v.ReadOnly})
	}
	return list
}

func join[T fmt.Stringer](list []T) string {
	var s []string
	for _, v := range list {
		s = append(s, v.String())
	}
	return strings.Join(s, ",")
}

// kubeadmFile is the configuration that kubeadm's phases run with on a control-plane node.
func (l *Lab) kubeadmFile(c *topology.Cluster, n *topology.Node) ([]byte, error) {
	addr := l.NodeAddrs(c, n)[0]
	planes := c.ControlPlanes()
	managers := map[string]string{"node-cidr-mask-size": fmt.Sprint(c.NodeMasks[0])}
	if len(c.Families) > 1 {
		managers = map[string]string{
			"node-cidr-mask-size-ipv4": fmt.Sprint(c.NodeMasks[slices.Index(c.Families, topology.IPv4)]),
			"node-cidr-mask-size-ipv6": fmt.Sprint(c.NodeMasks[slices.Index(c.Families, topology.IPv6)]),
		}
	}
	managers["tls-cert-file"], managers["tls-private-key-file"] = managerCert, managerKey
	schedulers := map[string]string{"tls-cert-file": schedulerCert, "tls-private-key-file": schedulerKey}
	// At its start the controller manager asks for a token for each of its controllers; at the default rate
	// of 20 a second that alone takes 5 s.
	managers["kube-api-qps"], managers["kube-api-burst"] = "300", "500"
	if len(planes) == 1 {
		// Nobody to elect against. With an election, a control plane whose node lost power would wait 15 s
		// for the lease of its own former self.
		managers["leader-elect"], schedulers["leader-elect"] = "false", "false"
	}
	// exec, logs and port-forward go to the node's address: its name is known to nobody's DNS.
	servers := map[string]string{"kubelet-preferred-address-types": "InternalIP", "kubelet-certificate-authority": clusterCA}
	if len(c.FeatureGates) > 0 {
		var list []string
		for _, name := range slices.Sorted(maps.Keys(c.FeatureGates)) {
			list = append(list, fmt.Sprintf("%s=%v", name, c.FeatureGates[name]))
		}
		for _, args := range []map[string]string{servers, managers, schedulers} {
			args["feature-gates"] = strings.Join(list, ",")
		}
	}
	// A lab's disk need not outlive the host's power, and a kill of etcd loses nothing that the kernel has.
	etcd := map[string]string{"unsafe-no-fsync": "true"}
	if len(planes) == 1 {
		// A member that is alone elects itself, after one to ten heartbeats: at the default of 100 ms, half a
		// second that the API server waits for.
		etcd["heartbeat-interval"], etcd["election-timeout"] = "20", "200"
	} else {
		// All members start at once as one new cluster; joining one by one would take a round each.
		var members []string
		for i := range planes {
			members = append(members, fmt.Sprintf("%s=https://%s", planes[i].Name, netip.AddrPortFrom(l.NodeAddrs(c, &planes[i])[0], 2380)))
		}
		etcd["initial-cluster"], etcd["initial-cluster-state"] = strings.Join(members, ","), "new"
	}
	init := map[string]any{
		"apiVersion":       "kubeadm.k8s.io/v1beta4",
		"kind":             "InitConfiguration",
		"localAPIEndpoint": map[string]any{"advertiseAddress": addr.String(), "bindPort": apiPort},
		"nodeRegistration": map[string]any{
			"name": n.Name, "criSocket": "unix:///run/containerd/containerd.sock",
		},
	}
	sans := []string{l.APIAddr(c).String(), "localhost", "127.0.0.1"}
	for _, a := range l.NodeAddrs(c, n) {
		sans = append(sans, a.String())
	}
	slices.Sort(sans)
	cluster := map[string]any{
		"apiVersion":          "kubeadm.k8s.io/v1beta4",
		"kind":                "ClusterConfiguration",
		"clusterName":         c.Name,
		"kubernetesVersion":   l.Kit.Kubernetes,
		"encryptionAlgorithm": "ECDSA-P256",
		"networking": map[string]any{
			"podSubnet": join(c.PodCIDRs), "serviceSubnet": join(c.ServiceCIDRs), "dnsDomain": c.DNSDomain,
		},
		"apiServer": map[string]any{
			"certSANs":  slices.Compact(sans),
			"extraArgs": argList(servers, c.APIServerArgs), "extraVolumes": apiServerVolumes(c),
		},
		"controllerManager": map[string]any{"extraArgs": argList(managers, c.ControllerManagerArgs)},
		"scheduler": map[string]any{"extraArgs": argList(schedulers, c.SchedulerArgs), "extraVolumes": []hostFile{
			fileAt("tls-cert", schedulerCert), fileAt("tls-key", schedulerKey),
		}},
		"etcd": map[string]any{"local": map[string]any{"dataDir": "/var/lib/etcd", "extraArgs": argList(etcd, nil)}},
	}
	if len(planes) > 1 {
		cluster["controlPlaneEndpoint"] = netip.AddrPortFrom(l.APIAddr(c), apiPort).String()
	}
	proxy := map[string]any{
		"apiVersion":  "kubeproxy.config.k8s.io/v1alpha1",
		"kind":        "KubeProxyConfiguration",
		"mode":        c.Proxy.Mode,
		"oomScoreAdj": oomScore(),
		// The conntrack table's size belongs to the host; in a namespace it can only be read.
		"conntrack": map[string]any{"maxPerCore": 0, "min": 0},
	}
	// By default kube-proxy lets a second pass between two updates of its rules, for clusters with thousands of
	// Services. Here it is a second in which a new Service does not answer yet.
	for _, mode := range []string{"iptables", "nftables", "ipvs"} {
		proxy[mode] = map[string]any{"minSyncPeriod": "100ms"}
	}
	if len(c.FeatureGates) > 0 {
		proxy["featureGates"] = c.FeatureGates
	}
	var out bytes.Buffer
	for _, doc := range []any{init, cluster, proxy} {
		data, err := yaml.Marshal(doc)
		if err != nil {
			return nil, err
		}
		out.WriteString("---\n")
		out.Write(data)
	}
	return out.Bytes(), nil
}

// Of the phases of `kubeadm init` these run before there is an API server, and those of join after. The rest
// is done otherwise: preflight is doctor's, kubelet is started by the node's init, and nodes are made with
// their labels and taints (see nodeObject).
var (
	phasesBefore = []string{"certs", "kubeconfig", "etcd", "control-plane"}
	allPhases    = []string{"preflight", "certs", "kubeconfig", "etcd", "control-plane", "kubelet-start", "wait-control-plane",
		"upload-config", "upload-certs", "mark-control-plane", "bootstrap-token", "kubelet-finalize", "addon", "show-join-command"}
)

// heldManifests are of two static pods that need an API server to start with, and are held until there is one. Without it
// they wait in ever longer steps, or end and are started again 10 s later, and take processor time from the API server that
// they wait for. They wait by themselves until the server is healthy (kit/kubernetes/await), and so can start as soon as it
// serves at all: for a second it waits before it begins with the roles that they need, and then processors are free.
var heldManifests = []string{"kube-controller-manager.yaml", "kube-scheduler.yaml"}

// hold keeps static pods' manifests from kubelet until release.
func hold(m *machine.Machine) error {
	for _, name := range heldManifests {
		if err := moveManifest(m, name, "/etc/kubernetes/manifests", "/etc/kubernetes"); err != nil {
			return err
		}
	}
	return nil
}

// release lets kubelet have them on each of the machines.
func release(machines []*machine.Machine) error {
	for _, m := range machines {
		for _, name := range heldManifests {
			if err := moveManifest(m, name, "/etc/kubernetes", "/etc/kubernetes/manifests"); err != nil {
				return err
			}
		}
	}
	return nil
}

func moveManifest(m *machine.Machine, name, from, to string) error {
	if err := os.Rename(m.File(filepath.Join(from, name)), m.File(filepath.Join(to, name))); err != nil {
		return fmt.Errorf("move a static pod manifest: %w", err)
	}
	return nil
}

// kubeadm runs these phases of `kubeadm init` on the node.
func kubeadm(ctx context.Context, m *machine.Machine, phases []string, skip ...string) error {
	for _, p := range allPhases {
		if !slices.Contains(phases, p) {
			skip = append(skip, p)
		}
	}
	out, err := m.Output(ctx, "kubeadm", "init", "--config="+kubeadmConfig, "--skip-phases="+strings.Join(skip, ","))
	if err != nil {
		return fmt.Errorf("%w\n%s", err, out)
	}
	return nil
}

// sharedPKI is what all control-plane nodes of a cluster have in common: kubeadm's "upload-certs".
var sharedPKI = []string{"ca.crt", "ca.key", "sa.key", "sa.pub", "front-proxy-ca.crt", "front-proxy-ca.key", "etcd/ca.crt", "etcd/ca.key"}

// sharePKI copies the authorities of the first control-plane node to another.
func (l *Lab) sharePKI(first, other string, to *machine.Machine) error {
	for _, name := range sharedPKI {
		path := filepath.Join("/etc/kubernetes/pki", name)
		data, err := os.ReadFile(l.diskFile(first, path))
		if err != nil {
			return fmt.Errorf("share the certificate authorities of %s with %s: %w", first, other, err)
		}
		if err := writeFile(to.File(path), data, 0o600); err != nil {
			return err
		}
	}
	return nil
}

// addOns are manifests that kubeadm wrote, for the cluster's API server to have as soon as it takes them: the
// phases of kubeadm that create the same objects wait for each answer, and are programs to start while there is
// most to do.
type addOns struct {
	proxy []byte // all of kube-proxy
	base  []byte // what CoreDNS's pods need: its service account, roles, configuration and Service
	dns   []byte // CoreDNS's Deployment
}

// printAddOns has kubeadm write the manifests on a control-plane node.
func (l *Lab) printAddOns(ctx context.Context, c *topology.Cluster, m *machine.Machine) (addOns, error) {
	var a addOns
	out, err := printAddOn(ctx, m, "coredns")
	if err != nil {
		return a, err
	}
	if a.base, a.dns, err = adaptCoreDNS(out); err != nil {
		return a, err
	}
	if c.Proxy.Kind == topology.ProxyKubeProxy {
		out, err = printAddOn(ctx, m, "kube-proxy")
		a.proxy = []byte(out)
	}
	return a, err
}

func printAddOn(ctx context.Context, m *machine.Machine, name string) (string, error) {
	return m.Output(ctx, "kubeadm", "init", "phase", "addon", name, "--config="+kubeadmConfig, "--print-manifest")
}

// adaptCoreDNS takes kubeadm's manifest of CoreDNS apart, and changes one thing: kubelet asks every second
// whether it is ready. With kubeadm's ten, a kubelet that has just started waits up to ten seconds before it asks
// for the first time. Letting kubeadm create it and patching it then would roll it out twice.
func adaptCoreDNS(manifest string) (base, deployment []byte, err error) {
	var others bytes.Buffer
	for doc := range strings.SplitSeq(manifest, "\n---\n") {
		doc = strings.TrimPrefix(doc, "---\n")
		if strings.TrimSpace(doc) == "" {
			continue
		}
		var object struct {
			Kind string `json:"kind"`
		}
		if err := yaml.Unmarshal([]byte(doc), &object); err != nil {
			return nil, nil, fmt.Errorf("read kubeadm's manifest of CoreDNS: %w", err)
		}
		if object.Kind != "Deployment" {
			others.WriteString("---\n" + doc + "\n")
			continue
		}
		var d appsv1.Deployment
		if err := yaml.UnmarshalStrict([]byte(doc), &d); err != nil {
			return nil, nil, fmt.Errorf("read kubeadm's Deployment of CoreDNS: %w", err)
		}
		containers := d.Spec.Template.Spec.Containers
		if len(containers) != 1 || containers[0].ReadinessProbe == nil {
			return nil, nil, errors.New("kubeadm's Deployment of CoreDNS has not the one container with a readiness probe that is expected")
		}
		containers[0].ReadinessProbe.PeriodSeconds = 1
		if deployment, err = yaml.Marshal(d); err != nil {
			return nil, nil, err
		}
	}
	if deployment == nil {
		return nil, nil, errors.New("kubeadm's manifest of CoreDNS has no Deployment")
	}
	return others.Bytes(), deployment, nil
}

// errNoBuild says why a cluster that an interrupted `up` left cannot be started as it is.
var errNoBuild = errors.New("the cluster was not brought up to its end")
