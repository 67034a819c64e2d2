package topology

import (
	"strings"

	"go.yaml.in/yaml/v3"
)

// What a lab file says of itself.
const (
	APIVersion = "fathom.network/v1alpha1"
	Kind       = "Lab"
)

// Parse reads a lab file. The name of the file is for messages only. An error that is about what the user
// wrote is an *InvalidError with every problem in it.
func Parse(data []byte, filename string, o Overrides) (*Lab, error) {
	r := &reader{file: filename}
	spec := r.lab(data)
	if spec == nil {
		return nil, r.err()
	}
	return build(spec, o, &r.problems)
}

// Default returns the lab of `fathom up` without a file.
func Default(o Overrides) (*Lab, error) {
	return build(&labSpec{}, o, &problems{})
}

// lab reads the whole file; nil means that there is nothing to go on with.
func (r *reader) lab(data []byte) *labSpec {
	root := r.document(data)
	if root == nil {
		return nil
	}
	if root.Kind != yaml.MappingNode {
		r.add(r.at(root, ""), scalarText(root), "%s; want a mapping with apiVersion, kind and clusters", kindOf(root))
		return nil
	}
	var s labSpec
	var apiVersion, kind text
	clustersSeen := source{}
	at := r.at(root, "")
	r.mapping(root, at, fields{
		"apiVersion": r.textInto(&apiVersion),
		"kind":       r.textInto(&kind),
		"name":       r.textInto(&s.name),
		"underlay": func(n *yaml.Node, at source) {
			r.mapping(n, at, fields{
				"ipv4": r.textInto(&s.underlay4),
				"ipv6": r.textInto(&s.underlay6),
			})
		},
		"hostAccess": r.textInto(&s.hostAccess),
		"defaults": func(n *yaml.Node, at source) {
			r.cluster(n, at, &s.defaults, false)
		},
		"clusters": func(n *yaml.Node, at source) {
			clustersSeen = at
			r.list(n, at, maxClusters, func(n *yaml.Node, at source) {
				c := clusterSpec{at: at}
				r.cluster(n, at, &c, true)
				if n.Kind == yaml.MappingNode && c.name.missing() {
					r.add(at.child("name"), "", "missing; want a name of its own for each cluster, such as east")
				}
				s.clusters = append(s.clusters, c)
			})
			if n.Kind == yaml.SequenceNode && len(n.Content) == 0 {
				r.add(at, "", "no cluster; name at least one, or leave clusters out for east and west")
			}
		},
	})
	r.constant(apiVersion, at.child("apiVersion"), APIVersion)
	r.constant(kind, at.child("kind"), Kind)
	if clustersSeen.line > 0 && len(s.clusters) == 0 {
		// The list is bad as a whole, and that was said: do not judge the default clusters instead.
		return nil
	}
	return &s
}

// constant checks a field that has one possible value.
func (r *reader) constant(v text, missing source, want string) {
	switch {
	case v.missing():
		r.add(missing, "", "missing; want %s", want)
	case v.set && v.value != want:
		r.add(v.at, v.value, "want %s", want)
	}
}

// cluster reads the fields of a cluster, or those of defaults, which has no name.
func (r *reader) cluster(n *yaml.Node, at source, c *clusterSpec, named bool) {
	known := fields{
		"controlPlanes":         r.numberInto(&c.controlPlanes),
		"workers":               r.numberInto(&c.workers),
		"ipFamily":              r.textInto(&c.ipFamily),
		"podCIDR":               r.textInto(&c.podCIDR),
		"serviceCIDR":           r.textInto(&c.serviceCIDR),
		"nodeCIDRMask":          r.scalarInto(&c.nodeCIDRMask),
		"dnsDomain":             r.textInto(&c.dnsDomain),
		"network":               func(n *yaml.Node, at source) { r.network(n, at, &c.network) },
		"proxy":                 func(n *yaml.Node, at source) { r.proxy(n, at, &c.proxy) },
		"dns":                   r.textInto(&c.dns),
		"featureGates":          r.boolsInto(&c.featureGates),
		"apiServerArgs":         r.valuesInto(&c.apiServerArgs),
		"controllerManagerArgs": r.valuesInto(&c.controllerManagerArgs),
		"schedulerArgs":         r.valuesInto(&c.schedulerArgs),
		"kubeletArgs":           r.valuesInto(&c.kubeletArgs),
		"apiServerVolumes":      func(n *yaml.Node, at source) { c.apiServerVolumes = r.volumes(n, at) },
		"mounts":                func(n *yaml.Node, at source) { c.mounts = r.mounts(n, at) },
		"manifests":             func(n *yaml.Node, at source) { c.manifests = r.texts(n, at) },
		"wire":                  func(n *yaml.Node, at source) { r.wire(n, at, &c.wire) },
		"nodes":                 func(n *yaml.Node, at source) { c.nodes = r.nodes(n, at) },
	}
	if named {
		known["name"] = r.textInto(&c.name)
	}
	r.mapping(n, at, known)
}

// network reads `network: flannel` or `network: {name: flannel, vni: 7}`.
func (r *reader) network(n *yaml.Node, at source, v *networkSpec) {
	if n.Kind == yaml.ScalarNode {
		r.textInto(&v.name)(n, at)
		return
	}
	r.mapping(n, at, fields{
		"name": r.textInto(&v.name),
		"mode": r.textInto(&v.mode),
		"vni":  r.numberInto(&v.vni),
		"port": r.numberInto(&v.port),
	})
}

// proxy reads `proxy: none` or `proxy: {name: kube-proxy, mode: iptables}`.
func (r *reader) proxy(n *yaml.Node, at source, v *proxySpec) {
	if n.Kind == yaml.ScalarNode {
		r.textInto(&v.name)(n, at)
		return
	}
	r.mapping(n, at, fields{
		"name": r.textInto(&v.name),
		"mode": r.textInto(&v.mode),
	})
}

func (r *reader) wire(n *yaml.Node, at source, v *wireSpec) {
	v.set = true
	r.mapping(n, at, fields{
		"rate":  r.textInto(&v.rate),
		"delay": r.textInto(&v.delay),
		"loss":  r.scalarInto(&v.loss),
	})
}

func (r *reader) mounts(n *yaml.Node, at source) []mountSpec {
	var mounts []mountSpec
	first := map[string]source{}
	r.list(n, at, maxMounts, func(n *yaml.Node, at source) {
		m := mountSpec{at: at}
		r.mapping(n, at, fields{
			"hostPath": r.textInto(&m.hostPath),
			"nodePath": r.textInto(&m.nodePath),
			"readOnly": r.boolInto(&m.readOnly),
		})
		if n.Kind == yaml.MappingNode && m.hostPath.missing() {
			r.add(at.child("hostPath"), "", "missing; want an absolute path of the host")
		}
		if before, dup := first[m.target()]; dup {
			r.add(at, m.target(), "already the nodePath of %s; want one mount for a path", before)
		} else if m.hostPath.set {
			first[m.target()] = at
			mounts = append(mounts, m)
		}
	})
	return mounts
}

func (r *reader) volumes(n *yaml.Node, at source) []volumeSpec {
	var volumes []volumeSpec
	first := map[string]source{}
	r.list(n, at, maxMounts, func(n *yaml.Node, at source) {
		v := volumeSpec{at: at}
		r.mapping(n, at, fields{
			"hostPath":  r.textInto(&v.hostPath),
			"mountPath": r.textInto(&v.mountPath),
			"readOnly":  r.boolInto(&v.readOnly),
		})
		if n.Kind == yaml.MappingNode && v.hostPath.missing() {
			r.add(at.child("hostPath"), "", "missing; want a path of the host, absolute or from the lab file's directory")
		}
		if n.Kind == yaml.MappingNode && v.mountPath.missing() {
			r.add(at.child("mountPath"), "", "missing; want where kube-apiserver is to see it, such as /etc/kubernetes/extra")
		}
		if !v.hostPath.set || !v.mountPath.set {
			return
		}
		if before, dup := first[v.mountPath.value]; dup {
			r.add(at, v.mountPath.value, "already the mountPath of %s; want one volume for a path", before)
			return
		}
		first[v.mountPath.value] = at
		volumes = append(volumes, v)
	})
	return volumes
}

func (r *reader) nodes(n *yaml.Node, at source) []nodeSpec {
	var nodes []nodeSpec
	r.list(n, at, maxNodes, func(n *yaml.Node, at source) {
		v := nodeSpec{at: at}
		r.mapping(n, at, fields{
			"name":   r.textInto(&v.name),
			"labels": r.textsInto(&v.labels),
			"taints": func(n *yaml.Node, at source) { v.taints = r.taints(n, at) },
			"mounts": func(n *yaml.Node, at source) { v.mounts = r.mounts(n, at) },
			"wire":   func(n *yaml.Node, at source) { r.wire(n, at, &v.wire) },
		})
		if n.Kind == yaml.MappingNode && v.name.missing() {
			r.add(at.child("name"), "", "missing; want a node of the cluster, such as worker1")
		}
		if v.name.set {
			nodes = append(nodes, v)
		}
	})
	return nodes
}

// taints reads the API's form and kubectl's: {key: k, value: v, effect: NoSchedule} or k=v:NoSchedule.
func (r *reader) taints(n *yaml.Node, at source) []taintSpec {
	taints := []taintSpec{} // not nil: an empty list says that there are none
	r.list(n, at, maxMounts, func(n *yaml.Node, at source) {
		t := taintSpec{at: at}
		if n.Kind == yaml.ScalarNode {
			var short text
			r.textInto(&short)(n, at)
			if short.set {
				taints = append(taints, shortTaint(short))
			}
			return
		}
		r.mapping(n, at, fields{
			"key":    r.textInto(&t.key),
			"value":  r.scalarInto(&t.value),
			"effect": r.textInto(&t.effect),
		})
		taints = append(taints, t)
	})
	return taints
}

// shortTaint splits KEY[=VALUE]:EFFECT. What is missing stays empty and is reported with the rest.
func shortTaint(v text) taintSpec {
	rest, effect, _ := strings.Cut(v.value, ":")
	key, value, _ := strings.Cut(rest, "=")
	part := func(s string) text { return text{value: s, at: v.at, set: true} }
	return taintSpec{at: v.at, key: part(key), value: part(value), effect: part(effect)}
}
