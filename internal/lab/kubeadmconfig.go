package lab

import (
	"bytes"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"

	"sigs.k8s.io/yaml"

	"github.com/fathom-network/fathom/internal/facts/topology"
)

// kubeadmFile is the configuration that kubeadm's phases run with on a control-plane node.
func (l *Lab) kubeadmFile(c *topology.Cluster, n *topology.Node) ([]byte, error) {
	var out bytes.Buffer
	for _, doc := range []any{l.initConfiguration(c, n), l.clusterConfiguration(c, n), proxyConfiguration(c)} {
		data, err := yaml.Marshal(doc)
		if err != nil {
			return nil, err
		}
		out.WriteString("---\n")
		out.Write(data)
	}
	return out.Bytes(), nil
}

func (l *Lab) initConfiguration(c *topology.Cluster, n *topology.Node) map[string]any {
	return map[string]any{
		"apiVersion":       "kubeadm.k8s.io/v1beta4",
		"kind":             "InitConfiguration",
		"localAPIEndpoint": map[string]any{"advertiseAddress": l.NodeAddrs(c, n)[0].String(), "bindPort": apiPort},
		"nodeRegistration": map[string]any{
			"name": n.Name, "criSocket": "unix:///run/containerd/containerd.sock",
		},
	}
}

func (l *Lab) clusterConfiguration(c *topology.Cluster, n *topology.Node) map[string]any {
	sans := []string{l.APIAddr(c).String(), "localhost", "127.0.0.1"}
	for _, a := range l.NodeAddrs(c, n) {
		sans = append(sans, a.String())
	}
	slices.Sort(sans)
	args := l.planeArgs(c)
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
			"extraArgs": argList(args.server, c.APIServerArgs), "extraVolumes": apiServerVolumes(c),
		},
		"controllerManager": map[string]any{"extraArgs": argList(args.manager, c.ControllerManagerArgs)},
		"scheduler": map[string]any{"extraArgs": argList(args.scheduler, c.SchedulerArgs), "extraVolumes": []hostFile{
			fileAt("tls-cert", schedulerCert), fileAt("tls-key", schedulerKey),
		}},
		"etcd": map[string]any{"local": map[string]any{"dataDir": "/var/lib/etcd", "extraArgs": argList(args.etcd, nil)}},
	}
	if len(c.ControlPlanes()) > 1 {
		cluster["controlPlaneEndpoint"] = netip.AddrPortFrom(l.APIAddr(c), apiPort).String()
	}
	return cluster
}

func proxyConfiguration(c *topology.Cluster) map[string]any {
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
	return proxy
}

// planeArgs are the lab's own arguments of the control plane's programs.
type planeArgs struct{ server, manager, scheduler, etcd map[string]string }

func (l *Lab) planeArgs(c *topology.Cluster) planeArgs {
	planes := c.ControlPlanes()
	a := planeArgs{
		server: map[string]string{
			// exec, logs and port-forward go to the node's address: its name is known to nobody's DNS.
			"kubelet-preferred-address-types": "InternalIP", "kubelet-certificate-authority": clusterCA,
			"permit-port-sharing": "true", // with the gate before it
		},
		manager: map[string]string{
			"tls-cert-file": managerCert, "tls-private-key-file": managerKey,
			// At its start the controller manager asks for a token for each of its controllers; at the default rate
			// of 20 a second that alone takes 5 s.
			"kube-api-qps": "300", "kube-api-burst": "500",
		},
		scheduler: map[string]string{"tls-cert-file": schedulerCert, "tls-private-key-file": schedulerKey},
		// A lab's disk need not outlive the host's power, and a kill of etcd loses nothing that the kernel has.
		etcd: map[string]string{"unsafe-no-fsync": "true"},
	}
	if len(c.Families) > 1 {
		a.manager["node-cidr-mask-size-ipv4"] = fmt.Sprint(c.NodeMasks[slices.Index(c.Families, topology.IPv4)])
		a.manager["node-cidr-mask-size-ipv6"] = fmt.Sprint(c.NodeMasks[slices.Index(c.Families, topology.IPv6)])
	} else {
		a.manager["node-cidr-mask-size"] = fmt.Sprint(c.NodeMasks[0])
	}
	if len(planes) == 1 {
		// Nobody to elect against. With an election, a control plane whose node lost power would wait 15 s
		// for the lease of its own former self.
		a.manager["leader-elect"], a.scheduler["leader-elect"] = "false", "false"
		// A member that is alone elects itself, after one to ten heartbeats: at the default of 100 ms, half a
		// second that the API server waits for.
		a.etcd["heartbeat-interval"], a.etcd["election-timeout"] = "20", "200"
	} else {
		// All members start at once as one new cluster; joining one by one would take a round each.
		a.etcd["initial-cluster"], a.etcd["initial-cluster-state"] = l.etcdMembers(c), "new"
	}
	if len(c.FeatureGates) > 0 {
		var gates []string
		for _, name := range slices.Sorted(maps.Keys(c.FeatureGates)) {
			gates = append(gates, fmt.Sprintf("%s=%v", name, c.FeatureGates[name]))
		}
		for _, args := range []map[string]string{a.server, a.manager, a.scheduler} {
			args["feature-gates"] = strings.Join(gates, ",")
		}
	}
	return a
}

// etcdMembers lists the members of the cluster's etcd as its flag --initial-cluster does.
func (l *Lab) etcdMembers(c *topology.Cluster) string {
	planes := c.ControlPlanes()
	var members []string
	for i := range planes {
		members = append(members, planes[i].Name+"="+l.peerURL(c, &planes[i]))
	}
	return strings.Join(members, ",")
}

// peerURL is where the other members find a control-plane node's etcd.
func (l *Lab) peerURL(c *topology.Cluster, n *topology.Node) string {
	return "https://" + netip.AddrPortFrom(l.NodeAddrs(c, n)[0], 2380).String()
}

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
