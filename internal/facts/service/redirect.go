package service

import (
	"net/netip"
	"slices"
)

// ClusterDNS is the Service at whose address pods expect DNS, by the convention of kubeadm and other installers.
var ClusterDNS = Name{Namespace: "kube-system", Name: "kube-dns"}

// Redirect sends traffic from inside, to one port of a Service's cluster IP, to addresses that are not endpoints of the Service:
// traffic to the cluster's DNS goes to the cache on the node. It stands between a Model and the consumers of the Model's
// frontends and changes, and rewrites both. A zero value with a Service and a Port redirects nothing until Set.
type Redirect struct {
	Service Name
	Port    uint16
	to      []netip.Addr
	// own are the Service's frontends of the port, without the redirection.
	own map[Key]Frontend
}

// Addrs returns the addresses to which r redirects. The first of each family counts.
func (r *Redirect) Addrs() []netip.Addr { return r.to }

// Includes says whether the Service has an endpoint only by redirection.
func (r *Redirect) Includes(of Name, endpoint netip.AddrPort) bool {
	return of == r.Service && endpoint.Port() == r.Port && slices.Contains(r.to, endpoint.Addr())
}

// Frontends returns all frontends with the redirection applied. It does not modify its argument.
func (r *Redirect) Frontends(all []Frontend) []Frontend {
	r.own = map[Key]Frontend{}
	copied := false
	for i, f := range all {
		if !r.about(f) {
			continue
		}
		r.own[f.Key] = f
		if !copied {
			all, copied = slices.Clone(all), true
		}
		all[i] = r.apply(f)
	}
	return all
}

// Changes returns changes with the redirection applied. It does not modify its argument.
func (r *Redirect) Changes(all []Change) []Change {
	var changed []Change
	for i, c := range all {
		if !slices.ContainsFunc(c.Old, r.about) && !slices.ContainsFunc(c.New, r.about) {
			if changed != nil {
				changed = append(changed, c)
			}
			continue
		}
		if changed == nil {
			changed = append([]Change{}, all[:i]...)
		}
		for _, f := range c.Old {
			if r.about(f) {
				delete(r.own, f.Key)
			}
		}
		for _, f := range c.New {
			if r.about(f) {
				if r.own == nil {
					r.own = map[Key]Frontend{}
				}
				r.own[f.Key] = f
			}
		}
		c.Old, c.New = r.applyAll(c.Old), r.applyAll(c.New)
		if c = withoutSame(c); len(c.Old)+len(c.New) > 0 {
			changed = append(changed, c)
		}
	}
	if changed == nil {
		return all
	}
	return changed
}

// Set redirects to these addresses, and returns the changes that follow. A frontend takes the address of its family. Without
// one it is not redirected.
func (r *Redirect) Set(to []netip.Addr) []Change {
	c := Change{Service: r.Service}
	keys := make([]Key, 0, len(r.own))
	for key := range r.own {
		keys = append(keys, key)
	}
	slices.SortFunc(keys, Key.Compare)
	for _, key := range keys {
		c.Old = append(c.Old, r.apply(r.own[key]))
	}
	r.to = slices.Clone(to)
	for _, key := range keys {
		c.New = append(c.New, r.apply(r.own[key]))
	}
	if c = withoutSame(c); len(c.Old) == 0 {
		return nil
	}
	return []Change{c}
}

func (r *Redirect) about(f Frontend) bool {
	return f.Service == r.Service && f.Kind == ClusterIP && f.Port == r.Port && (f.Protocol == UDP || f.Protocol == TCP)
}

func (r *Redirect) apply(f Frontend) Frontend {
	for _, addr := range r.to {
		if addr.Is4() == f.Addr.Is4() {
			f.Inside = Backends{Endpoints: []netip.AddrPort{netip.AddrPortFrom(addr, r.Port)}}
			break
		}
	}
	return f
}

func (r *Redirect) applyAll(all []Frontend) []Frontend {
	all = slices.Clone(all)
	for i, f := range all {
		if r.about(f) {
			all[i] = r.apply(f)
		}
	}
	return all
}

// withoutSame removes frontends that are equal before and after.
func withoutSame(c Change) Change {
	same := func(f Frontend, in []Frontend) bool {
		return slices.ContainsFunc(in, func(o Frontend) bool { return o.Equal(f) })
	}
	old := slices.DeleteFunc(slices.Clone(c.Old), func(f Frontend) bool { return same(f, c.New) })
	c.New = slices.DeleteFunc(slices.Clone(c.New), func(f Frontend) bool { return same(f, c.Old) })
	c.Old = old
	return c
}
