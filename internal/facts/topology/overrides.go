package topology

import (
	"fmt"
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
