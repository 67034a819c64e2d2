package dataplane

import (
	"net/netip"
	"path/filepath"

	"github.com/fathom-network/fathom/internal/conflist"
	"github.com/fathom-network/fathom/internal/lease"
	"github.com/fathom-network/fathom/internal/probe"
)

// Places returns where test packets can start and end on this node: its pods, and the node itself by the addresses
// that it is given.
func Places(o Options, own []netip.Addr) ([]probe.Place, error) {
	store, err := lease.Open(o.Paths.Leases, conflist.DefaultCoolDown)
	if err != nil {
		return nil, err
	}
	leases, err := store.List()
	if err != nil {
		return nil, err
	}
	places := []probe.Place{probe.PlaceAt("node/"+o.Node, "/proc/self/ns/net", own)}
	for _, l := range leases {
		if l.Netns == "" {
			continue // a lease that was made again of a device whose namespace is mounted nowhere
		}
		places = append(places, probe.PlaceAt(l.PodNamespace+"/"+l.PodName, filepath.Join(o.Paths.NetNS, filepath.Base(l.Netns)), l.Addresses))
	}
	return places, nil
}
