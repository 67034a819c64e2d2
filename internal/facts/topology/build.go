package topology

import (
	"maps"
	"slices"
	"strings"

	"github.com/fathom-network/fathom/internal/facts/netconf"
	"github.com/fathom-network/fathom/internal/facts/podnet"
)

// The limits of a cluster. Seven is the most members that etcd's makers advise; 200 workers leave room in
// the /24 that the nodes of a cluster share.
const (
	maxControlPlanes = 7
	maxWorkers       = 200
)

// The defaults of a cluster.
const (
	defaultName          = "fathom"
	defaultControlPlanes = 1
	defaultWorkers       = 2
	defaultDNSDomain     = "cluster.local"
)

// builder turns a spec into a Lab. It goes on after a problem with the default in the place of the bad
// value, so that one run reports everything.
type builder struct {
	*problems
	// usedNodes are the entries of defaults.nodes that fit a node of some cluster.
	usedNodes map[source]bool
	dir       string     // Overrides.Dir
	hostPaths []hostPath // what the lab wants of the host
}

// build fills in defaults and flags, checks everything and makes the Lab.
func build(s *labSpec, o Overrides, ps *problems) (*Lab, error) {
	b := &builder{problems: ps, usedNodes: map[source]bool{}, dir: o.Dir}
	if len(s.clusters) == 0 {
		s.clusters = pickClusters(nil, firstClusterNames[:2], source{})
	}
	o.pick(s, ps)
	s.name = override(s.name, "--name", o.Name)
	if o.Network == "" && o.Proxy == "" && o.ProxyMode == "" {
		b.checkDefaults(&s.defaults)
	}

	lab := &Lab{Name: defaultName}
	if s.name.set {
		lab.Name = s.name.value
		if !isShortLabel(lab.Name) {
			b.add(s.name.at, lab.Name, "%s", wantShortLabel)
		}
	}
	o.underlay(s, ps)
	b.underlays(s, lab)
	lab.HostAccess = b.hostAccess(s)
	names := map[string]source{}
	for i := range s.clusters {
		c := s.clusters[i].inherit(s.defaults)
		o.apply(&c)
		b.clusterName(&c, names)
		lab.Clusters = append(lab.Clusters, b.cluster(&c, i, lab))
	}
	for _, n := range s.defaults.nodes {
		if !b.usedNodes[n.at] {
			b.add(n.name.at, n.name.value, "no cluster has such a node; want a name such as control-plane or worker1")
		}
	}
	if err := b.err(); err != nil {
		return nil, err
	}
	lab.hostPaths = b.hostPaths
	return lab, nil
}

func (b *builder) hostAccess(s *labSpec) HostAccess {
	const all = "all" // the default, which a lab's facts leave out
	ways := []string{all, string(HostAccessNone)}
	switch {
	case !s.hostAccess.set || s.hostAccess.value == all:
		return HostAccessAll
	case !slices.Contains(ways, s.hostAccess.value):
		b.add(s.hostAccess.at, s.hostAccess.value, "unknown; %s", didYouMean(s.hostAccess.value, ways))
	}
	return HostAccess(s.hostAccess.value)
}

// checkDefaults looks at the sections of defaults even when every cluster replaces them.
func (b *builder) checkDefaults(d *clusterSpec) {
	b.network(d)
	b.proxy(d, NetworkFathom)
}

func (b *builder) clusterName(c *clusterSpec, names map[string]source) {
	if !c.name.set {
		return // The reader said so.
	}
	if !isShortLabel(c.name.value) {
		b.add(c.name.at, c.name.value, "%s", wantShortLabel)
	}
	if before, dup := names[c.name.value]; dup {
		b.add(c.name.at, c.name.value, "already %s; want a name of its own for each cluster", before)
		return
	}
	names[c.name.value] = c.name.at
}

func (b *builder) cluster(s *clusterSpec, index int, lab *Lab) Cluster {
	c := Cluster{
		Name:                  s.name.value,
		Index:                 index,
		DNSDomain:             defaultDNSDomain,
		Network:               b.network(s),
		FeatureGates:          b.featureGates(s.featureGates),
		APIServerArgs:         b.args(s.apiServerArgs, APIServer),
		ControllerManagerArgs: b.args(s.controllerManagerArgs, ControllerManager),
		SchedulerArgs:         b.args(s.schedulerArgs, Scheduler),
		KubeletArgs:           b.args(s.kubeletArgs, Kubelet),
	}
	c.Proxy = b.proxy(s, c.Network.Kind)
	c.DNS = b.dns(s, c.Proxy.Kind)
	c.APIServerVolumes = b.volumes(s.apiServerVolumes, b.dir)
	b.apiServerFiles(s.apiServerArgs, c.APIServerVolumes)
	c.Manifests = b.manifests(s.manifests)
	if s.dnsDomain.set {
		c.DNSDomain = s.dnsDomain.value
		if !isDNSName(c.DNSDomain) {
			b.add(s.dnsDomain.at, c.DNSDomain, "not a DNS domain; want lower-case labels such as cluster.local, without a dot at the end")
		}
	}
	b.nodes(s, &c)
	b.addresses(s, &c, lab)
	b.maxPods(s.kubeletArgs["max-pods"], &c)
	return c
}

// nodes makes the cluster's nodes and puts the per-node settings on them.
func (b *builder) nodes(s *clusterSpec, c *Cluster) {
	controlPlanes := b.count(s.controlPlanes, defaultControlPlanes, 1, maxControlPlanes)
	if controlPlanes%2 == 0 {
		b.add(s.controlPlanes.at, s.controlPlanes.text(), "an even number loses etcd's majority as easily as one less; want 1, 3, 5 or 7")
	}
	workers := b.count(s.workers, defaultWorkers, 0, maxWorkers)
	var short []string
	for i := range controlPlanes + workers {
		n := Node{Role: ControlPlane, Index: i}
		ordinal := i + 1
		if i >= controlPlanes {
			n.Role, ordinal = Worker, i-controlPlanes+1
		}
		short = append(short, shortNodeName(n.Role, ordinal))
		n.Name = c.Name + "-" + short[i]
		c.Nodes = append(c.Nodes, n)
	}

	// A node takes each setting from the nearest of: its own entry, the entry in defaults, the cluster.
	own := make([]nodeSpec, len(c.Nodes))
	for _, entry := range s.inherited {
		if i := nodeIndex(entry.name.value, c.Name, short); i >= 0 {
			b.usedNodes[entry.at] = true
			own[i] = entry
		}
	}
	first := map[int]source{}
	for _, entry := range s.nodes {
		i := nodeIndex(entry.name.value, c.Name, short)
		if i < 0 {
			b.unknownNode(s, entry, c, short)
			continue
		}
		if before, dup := first[i]; dup {
			b.add(entry.name.at, entry.name.value, "already %s; want one entry for a node", before)
			continue
		}
		first[i] = entry.name.at
		own[i] = entry.inherit(own[i])
	}
	for i := range c.Nodes {
		n, entry := &c.Nodes[i], own[i]
		n.Labels = b.labels(entry.labels)
		n.Taints = b.taints(entry.taints)
		if entry.taints == nil && n.Role == ControlPlane && workers > 0 {
			n.Taints = []Taint{{Key: ControlPlaneTaint, Effect: "NoSchedule"}}
		}
		n.Mounts = b.mounts(mergeBy(s.mounts, entry.mounts, mountSpec.target))
		wire := entry.wire
		if !wire.set {
			wire = s.wire
		}
		n.Wire = b.wire(wire)
	}
}

// nodeIndex finds a node by its name, with the cluster's name before it or without.
func nodeIndex(name, cluster string, short []string) int {
	if i := slices.Index(short, name); i >= 0 {
		return i
	}
	return slices.Index(short, strings.TrimPrefix(name, cluster+"-"))
}

// unknownNode reports an entry for a node that the cluster lacks.
func (b *builder) unknownNode(s *clusterSpec, entry nodeSpec, c *Cluster, short []string) {
	hint := ""
	switch near := nearest(strings.TrimPrefix(entry.name.value, c.Name+"-"), short); {
	case s.workers.at.isFlag():
		hint = "; --workers decides how many there are"
	case near != "":
		hint = "; did you mean " + near + "?"
	default:
		hint = "; want one of " + short[0] + " to " + short[len(short)-1]
	}
	b.add(entry.name.at, entry.name.value, "cluster %s has no such node%s", c.Name, hint)
}

// inherit fills what a node's entry leaves open from the entry in defaults.
func (n nodeSpec) inherit(d nodeSpec) nodeSpec {
	n.labels = merge(d.labels, n.labels)
	if n.taints == nil {
		n.taints = d.taints
	}
	n.mounts = mergeBy(d.mounts, n.mounts, mountSpec.target)
	if !n.wire.set {
		n.wire = d.wire
	}
	return n
}

func (b *builder) network(s *clusterSpec) Network {
	n := Network{Kind: NetworkFathom}
	kind := s.network.name
	if kind.set {
		kinds := []string{string(NetworkFathom), string(NetworkBridge), string(NetworkFlannel), string(NetworkNone)}
		n.Kind = NetworkKind(kind.value)
		if !slices.Contains(kinds, kind.value) {
			b.add(kind.at, kind.value, "unknown network; %s", didYouMean(kind.value, kinds))
			return n
		}
	}
	own, is := settings[n.Kind]
	if mode := s.network.mode; mode.set {
		if n.Mode = mode.value; len(own.modes) == 0 {
			b.add(mode.at, mode.value, "only fathom has a mode, and the network is %s; leave it out", n.Kind)
		} else if !slices.Contains(own.modes, mode.value) {
			b.add(mode.at, mode.value, "unknown mode; %s", didYouMean(mode.value, own.modes))
		}
	} else if len(own.modes) > 0 {
		n.Mode = own.modes[0]
	}
	if is {
		n.VNI = b.count(s.network.vni, own.vni, 1, 1<<24-1)
		n.Port = b.count(s.network.port, own.port, 1, 65535)
		return n
	}
	for _, v := range []number{s.network.vni, s.network.port} {
		if v.set {
			b.add(v.at, v.text(), "only fathom and flannel have it, and the network is %s; leave it out", n.Kind)
		}
	}
	return n
}

// settings are what the networks that have settings take without being told.
var settings = map[NetworkKind]struct {
	modes     []string // the first is the default
	vni, port int
}{
	NetworkFathom:  {modes: []string{string(podnet.Auto), string(podnet.Direct), string(podnet.VXLAN)}, vni: podnet.DefaultVNI, port: podnet.DefaultPort},
	NetworkFlannel: {vni: 1, port: 8472},
}

// proxyModes are the modes of the proxies that have some, the default first.
var proxyModes = map[ProxyKind][]string{
	ProxyFathom:    {string(netconf.ProxyAuto), string(netconf.ProxyNFTables)},
	ProxyKubeProxy: {"nftables", "iptables", "ipvs"},
}

func (b *builder) proxy(s *clusterSpec, network NetworkKind) Proxy {
	p := Proxy{Kind: ProxyKubeProxy}
	kind, mode := s.proxy.name, s.proxy.mode
	// A mode that is not Fathom's says as much as the name of the proxy.
	if network == NetworkFathom && (!mode.set || slices.Contains(proxyModes[ProxyFathom], mode.value)) {
		p.Kind = ProxyFathom
	}
	if kind.set {
		kinds := []string{string(ProxyFathom), string(ProxyKubeProxy), string(ProxyNone)}
		p.Kind = ProxyKind(kind.value)
		if !slices.Contains(kinds, kind.value) {
			b.add(kind.at, kind.value, "unknown proxy; %s", didYouMean(kind.value, kinds))
			return p
		}
		if p.Kind == ProxyFathom && network != NetworkFathom {
			b.add(kind.at, kind.value, "it is a part of the network fathom, and the network is %s; want kube-proxy or none", network)
			return p
		}
	}
	modes := proxyModes[p.Kind]
	if len(modes) == 0 {
		if mode.set {
			b.add(mode.at, mode.value, "the proxy %s has no modes; leave it out", p.Kind)
		}
		return p
	}
	p.Mode = modes[0]
	if mode.set {
		p.Mode = mode.value
		if !slices.Contains(modes, mode.value) {
			b.add(mode.at, mode.value, "unknown mode; %s", didYouMean(mode.value, modes))
		}
	}
	return p
}

func (b *builder) dns(s *clusterSpec, proxy ProxyKind) DNS {
	if !s.dns.set {
		return DNSCluster
	}
	kinds := []string{string(DNSCluster), string(DNSNodeCache)}
	switch kind := DNS(s.dns.value); {
	case !slices.Contains(kinds, s.dns.value):
		b.add(s.dns.at, s.dns.value, "unknown way to answer; %s", didYouMean(s.dns.value, kinds))
	case kind == DNSNodeCache && proxy != ProxyFathom:
		b.add(s.dns.at, s.dns.value, "it is the proxy fathom that leads pods to it, and the proxy is %s; want cluster", proxy)
	default:
		return kind
	}
	return DNSCluster
}

// sortedKeys makes the order of problems, and with it every message, the same each time.
func sortedKeys[V any](m map[string]V) []string {
	return slices.Sorted(maps.Keys(m))
}
