package topology

import (
	"maps"
	"slices"
)

// The spec types hold a lab file as it was written, each value with its place, before any default.

// item is a value and where it was written.
type item[T any] struct {
	value T
	at    source
	set   bool
}

type (
	text   = item[string]
	number = item[int]
)

type labSpec struct {
	name                 text
	underlay4, underlay6 text
	hostAccess           text
	defaults             clusterSpec
	clusters             []clusterSpec
}

type clusterSpec struct {
	at                     source
	name                   text
	controlPlanes, workers number
	ipFamily               text
	podCIDR, serviceCIDR   text
	nodeCIDRMask           text
	dnsDomain              text
	network                networkSpec
	proxy                  proxySpec
	dns                    text
	featureGates           map[string]item[bool]
	apiServerArgs          map[string][]text
	controllerManagerArgs  map[string][]text
	schedulerArgs          map[string][]text
	kubeletArgs            map[string][]text
	apiServerVolumes       []volumeSpec
	mounts                 []mountSpec
	manifests              []text
	wire                   wireSpec
	nodes                  []nodeSpec
	// inherited are the nodes entries of defaults; one that fits no node of this cluster is no mistake
	// as long as it fits one of another cluster.
	inherited []nodeSpec
}

type networkSpec struct {
	name, mode text
	vni, port  number
}

type proxySpec struct {
	name, mode text
}

type nodeSpec struct {
	at     source
	name   text
	labels map[string]text
	taints []taintSpec // nil if the file does not say
	mounts []mountSpec
	wire   wireSpec
}

type taintSpec struct {
	at                 source
	key, value, effect text
}

type mountSpec struct {
	at                 source
	hostPath, nodePath text
	readOnly           item[bool]
}

type volumeSpec struct {
	at                  source
	hostPath, mountPath text
	readOnly            item[bool]
}

type wireSpec struct {
	set               bool
	rate, delay, loss text
}

// or returns v if it was written, otherwise other.
func (v item[T]) or(other item[T]) item[T] {
	if v.set {
		return v
	}
	return other
}

// inherit fills what c leaves open from the defaults. Single values and the sections network, proxy and
// wire are taken whole; maps, volumes, mounts and manifests add up, and the cluster's own entry wins.
func (c clusterSpec) inherit(d clusterSpec) clusterSpec {
	c.controlPlanes = c.controlPlanes.or(d.controlPlanes)
	c.workers = c.workers.or(d.workers)
	c.ipFamily = c.ipFamily.or(d.ipFamily)
	c.podCIDR = c.podCIDR.or(d.podCIDR)
	c.serviceCIDR = c.serviceCIDR.or(d.serviceCIDR)
	c.nodeCIDRMask = c.nodeCIDRMask.or(d.nodeCIDRMask)
	c.dnsDomain = c.dnsDomain.or(d.dnsDomain)
	if c.network == (networkSpec{}) {
		c.network = d.network
	}
	if c.proxy == (proxySpec{}) {
		c.proxy = d.proxy
	}
	c.dns = c.dns.or(d.dns)
	if !c.wire.set {
		c.wire = d.wire
	}
	c.featureGates = merge(d.featureGates, c.featureGates)
	c.apiServerArgs = merge(d.apiServerArgs, c.apiServerArgs)
	c.controllerManagerArgs = merge(d.controllerManagerArgs, c.controllerManagerArgs)
	c.schedulerArgs = merge(d.schedulerArgs, c.schedulerArgs)
	c.kubeletArgs = merge(d.kubeletArgs, c.kubeletArgs)
	c.apiServerVolumes = mergeBy(d.apiServerVolumes, c.apiServerVolumes, func(v volumeSpec) string { return v.mountPath.value })
	c.mounts = mergeBy(d.mounts, c.mounts, mountSpec.target)
	c.manifests = slices.Concat(d.manifests, c.manifests)
	c.inherited = d.nodes
	return c
}

// merge returns base with the entries of top added or replaced.
func merge[V any](base, top map[string]V) map[string]V {
	if len(base) == 0 {
		return top
	}
	merged := maps.Clone(base)
	maps.Copy(merged, top)
	return merged
}

// mergeBy returns base followed by top, without those of base whose target top has, too.
func mergeBy[T any](base, top []T, target func(T) string) []T {
	var merged []T
	for _, b := range base {
		if !slices.ContainsFunc(top, func(t T) bool { return target(t) == target(b) }) {
			merged = append(merged, b)
		}
	}
	return append(merged, top...)
}

// target is where the mount appears in the node.
func (m mountSpec) target() string {
	if m.nodePath.set {
		return m.nodePath.value
	}
	return m.hostPath.value
}
