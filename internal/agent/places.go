package agent

import (
	"net/netip"
	"path/filepath"

	"github.com/fathom-network/fathom/internal/facts/conflist"
	"github.com/fathom-network/fathom/internal/kernel/echo"
	"github.com/fathom-network/fathom/internal/kernel/lease"
)

// Places returns where test packets can start and end on this node: its pods, and the node itself by the addresses
// that it is given.
func Places(o Options, own []netip.Addr) ([]echo.Place, error) {
	store, err := lease.Open(o.Paths.Leases, conflist.DefaultCoolDown)
	if err != nil {
		return nil, err
	}
	leases, err := store.List()
	if err != nil {
		return nil, err
	}
	places := []echo.Place{echo.PlaceAt("node/"+o.Node, "/proc/self/ns/net", own)}
	for _, l := range leases {
		if l.Netns == "" {
			continue // a lease that was made again of a device whose namespace is mounted nowhere
		}
		places = append(places, echo.PlaceAt(l.PodNamespace+"/"+l.PodName, filepath.Join(o.Paths.NetNS, filepath.Base(l.Netns)), l.Addresses))
	}
	return places, nil
}
