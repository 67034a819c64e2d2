package announcing

import (
	"errors"
	"net"
	"slices"

	"github.com/fathom-network/fathom/internal/facts/vip"
	"github.com/fathom-network/fathom/internal/kernel/announce"
)

// standIns returns what the node answers in place of nodes whose agents are away. If such a node has several segments with the
// address, it is not known which of its Ethernet addresses is meant, and nothing is answered.
func (b *Balancer) standIns(f vip.Facts) (answers []announce.Answer, err error) {
	type place struct{ node, device string }
	macs := map[place]net.HardwareAddr{} // each lookup reads all neighbours of the device
	for _, v := range b.verdicts {
		if v.StandIn != b.node || len(v.Devices) != 1 {
			continue
		}
		at := place{v.Announcer, v.Devices[0]}
		mac, looked := macs[at]
		if !looked {
			var failed error
			mac, failed = b.neighbourOf(f, at.node, at.device)
			macs[at], err = mac, errors.Join(err, failed)
		}
		if mac != nil {
			answers = append(answers, announce.Answer{Addr: v.Address, MAC: mac})
		}
	}
	return answers, err
}

// neighbourOf returns the Ethernet address by which a device reaches a node, or nil. The error is set only if there is none.
func (b *Balancer) neighbourOf(f vip.Facts, node, device string) (mac net.HardwareAddr, err error) {
	i := slices.IndexFunc(f.Nodes, func(n vip.Node) bool { return n.Name == node })
	for _, addr := range f.Nodes[i].Addrs {
		mac, failed := b.neighbour(device, addr)
		if mac != nil {
			return mac, nil
		}
		err = errors.Join(err, failed)
	}
	return nil, err
}
