package agent

import (
	"net/netip"
	"path/filepath"

	"github.com/fathom-network/fathom/internal/facts/conflist"
	"github.com/fathom-network/fathom/internal/facts/ping"
	"github.com/fathom-network/fathom/internal/kernel/lease"
	"github.com/fathom-network/fathom/internal/kernel/link"
)

// Places returns where test packets can start and end on this node: its pods, and the node itself by the addresses
// that it is given.
func Places(o Options, own []netip.Addr) ([]ping.Place, error) {
	store, err := lease.Open(o.Paths.Leases, conflist.DefaultCoolDown)
	if err != nil {
		return nil, err
	}
	leases, err := store.List()
	if err != nil {
		return nil, err
	}
	places := []ping.Place{{Name: "node/" + o.Node, NetNS: link.OwnNetNS, Addresses: own}}
	for _, l := range leases {
		if l.Netns == "" {
			continue // a lease that was made again of a device whose namespace is mounted nowhere
		}
		places = append(places, ping.Place{Name: l.PodNamespace + "/" + l.PodName, NetNS: filepath.Join(o.Paths.NetNS, filepath.Base(l.Netns)), Addresses: l.Addresses})
	}
	return places, nil
}
