package podnet

import (
	"net/netip"
	"slices"
)

// Ways are how packets go between a node's pods and those of other nodes.
type Ways struct {
	// Remotes are the ways to other nodes' pods.
	Remotes []Remote
	// Devices are those by which packets of other nodes may come in: all that have addresses, and the tunnel. A node
	// whose packets leave fast and come in by another device would show its conntrack half of each connection.
	Devices []string
}

// Remote is the way to the pods in a range.
type Remote struct {
	To     netip.Prefix
	Via    netip.Addr
	Device string
}

// Ways follow from the plan and the node's own devices.
func (p Plan) Ways(underlay []Interface) Ways {
	var w Ways
	for _, r := range p.Routes {
		if !r.Unreachable && r.Via.IsValid() && r.Device != "" {
			w.Remotes = append(w.Remotes, Remote{r.To, r.Via, r.Device})
			w.Devices = append(w.Devices, r.Device)
		}
	}
	for _, i := range underlay {
		w.Devices = append(w.Devices, i.Name)
	}
	if p.Tunnel != nil {
		w.Devices = append(w.Devices, p.Tunnel.Name)
	}
	slices.Sort(w.Devices)
	w.Devices = slices.Compact(w.Devices)
	return w
}
