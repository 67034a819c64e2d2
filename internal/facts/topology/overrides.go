package topology

import (
	"fmt"
	"net/netip"
	"strconv"
	"strings"
)

// Overrides are the command-line flags that win over the lab file. A zero field changes nothing.
type Overrides struct {
	// Dir is the lab file's directory, as an absolute path, at which relative paths of volumes begin. It is no flag.
	Dir           string
	Name          string   // --name
	Clusters      []string // --clusters, by ParseClusters
	ControlPlanes *int     // --control-planes, of every cluster
	Workers       *int     // --workers, of every cluster
	Network       string   // --network
	Proxy         string   // --proxy
	ProxyMode     string   // --proxy-mode
	DNS           string   // --dns
	IPFamily      string   // --ip-family
	PodCIDR       string   // --pod-cidr
	ServiceCIDR   string   // --service-cidr
	Underlay      string   // --underlay
	Manifests     []string // --manifest, of every cluster, beside those of the file
}

// maxClusters bounds a lab: the core subnet has room for as many API balancers, and no machine that the
// lab is meant for carries more control planes.
const maxClusters = 16

// firstClusterNames are the names that clusters get when only their number is given.
var firstClusterNames = []string{"east", "west", "north", "south"}

// ParseClusters reads the value of --clusters: a number of clusters, or their names separated by commas.
func ParseClusters(s string) ([]string, error) {
	s = strings.TrimSpace(s)
	if n, err := strconv.Atoi(s); err == nil {
		if n < 1 || n > maxClusters {
			return nil, flagError("--clusters", s, "want a number from 1 to %d, or names separated by commas", maxClusters)
		}
		names := make([]string, n)
		for i := range names {
			if i < len(firstClusterNames) {
				names[i] = firstClusterNames[i]
			} else {
				names[i] = fmt.Sprintf("cluster%d", i+1)
			}
		}
		return names, nil
	}
	var ps problems
	var names []string
	at := source{field: "--clusters"}
	for name := range strings.SplitSeq(s, ",") {
		name = strings.TrimSpace(name)
		names = append(names, name)
	}
	checkClusterNames(&ps, at, names)
	if err := ps.err(); err != nil {
		return nil, err
	}
	return names, nil
}

// checkClusterNames checks the names that a flag gave.
func checkClusterNames(ps *problems, at source, names []string) {
	if len(names) > maxClusters {
		ps.add(at, strconv.Itoa(len(names)), "too many clusters; want at most %d", maxClusters)
	}
	seen := map[string]bool{}
	for _, name := range names {
		if !isShortLabel(name) {
			ps.add(at, name, "%s", wantShortLabel)
		} else if seen[name] {
			ps.add(at, name, "named twice; want each cluster to have a name of its own")
		}
		seen[name] = true
	}
}

// flagError is the error for one bad flag.
func flagError(flag, value, format string, args ...any) error {
	var ps problems
	ps.add(source{field: flag}, value, format, args...)
	return ps.err()
}

// override returns the flag's value if it was given, otherwise v.
func override(v text, flag, value string) text {
	if value == "" {
		return v
	}
	return text{value: value, set: true, at: source{field: flag}}
}

func overrideNumber(v number, flag string, value *int) number {
	if value == nil {
		return v
	}
	return number{value: *value, set: true, at: source{field: flag}}
}

// pick reduces the file's clusters to those that --clusters names, and adds the ones it lacks.
func (o Overrides) pick(s *labSpec, ps *problems) {
	if len(o.Clusters) == 0 {
		return
	}
	at := source{field: "--clusters"}
	before := len(ps.list)
	checkClusterNames(ps, at, o.Clusters)
	if len(ps.list) == before {
		s.clusters = pickClusters(s.clusters, o.Clusters, at)
	}
}

// underlay puts the flag over the lab's ranges: one of a family takes the place of that family's.
func (o Overrides) underlay(s *labSpec, ps *problems) {
	if o.Underlay == "" {
		return
	}
	const flag = "--underlay"
	given := map[Family]bool{}
	for value := range strings.SplitSeq(o.Underlay, ",") {
		value = strings.TrimSpace(value)
		family, to := IPv4, &s.underlay4
		if strings.Contains(value, ":") {
			family, to = IPv6, &s.underlay6
		}
		if given[family] {
			ps.add(source{field: flag}, o.Underlay, "two %s prefixes; want one of each family", family.title())
			return
		}
		given[family] = true
		*to = text{value: value, set: true, at: source{field: flag}}
	}
}

// ParseUnderlay reads the value of --underlay for a lab that exists in a file: an IPv4 /16, an IPv6 /48, or both, separated by a comma. A family
// that it does not name has the zero prefix.
func ParseUnderlay(value string) (v4, v6 netip.Prefix, err error) {
	var s labSpec
	var lab Lab
	b := &builder{problems: &problems{}}
	Overrides{Underlay: value}.underlay(&s, b.problems)
	b.underlays(&s, &lab)
	return lab.Underlay4, lab.Underlay6, b.err()
}

// apply puts the flags over a cluster's values. Flags that name a network or a proxy replace the whole
// section: the VNI of a flannel network means nothing to another one.
func (o Overrides) apply(c *clusterSpec) {
	c.controlPlanes = overrideNumber(c.controlPlanes, "--control-planes", o.ControlPlanes)
	c.workers = overrideNumber(c.workers, "--workers", o.Workers)
	c.ipFamily = override(c.ipFamily, "--ip-family", o.IPFamily)
	c.podCIDR = override(c.podCIDR, "--pod-cidr", o.PodCIDR)
	c.serviceCIDR = override(c.serviceCIDR, "--service-cidr", o.ServiceCIDR)
	if o.Network != "" && c.network.name.value != o.Network {
		c.network = networkSpec{name: override(text{}, "--network", o.Network)}
	}
	if o.Proxy != "" && c.proxy.name.value != o.Proxy {
		c.proxy = proxySpec{name: override(text{}, "--proxy", o.Proxy)}
	}
	c.dns = override(c.dns, "--dns", o.DNS)
	c.proxy.mode = override(c.proxy.mode, "--proxy-mode", o.ProxyMode)
	for _, path := range o.Manifests {
		c.manifests = append(c.manifests, text{value: path, set: true, at: source{field: "--manifest"}})
	}
}

// pickClusters returns the clusters of the file that are named, and new ones for the other names.
func pickClusters(have []clusterSpec, names []string, at source) []clusterSpec {
	var picked []clusterSpec
	for _, name := range names {
		c := clusterSpec{at: at, name: text{value: name, set: true, at: at}}
		for _, h := range have {
			if h.name.value == name {
				c = h
				break
			}
		}
		picked = append(picked, c)
	}
	return picked
}
