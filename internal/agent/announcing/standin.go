package announcing

import (
	"errors"
	"net"
	"slices"

	"github.com/fathom-network/fathom/internal/facts/vip"
	"github.com/fathom-network/fathom/internal/kernel/announce"
)

// standIns are what the node answers in place of others, whose agents are away. Of a node that is on several segments
// with the address it is not known which of its Ethernet addresses is asked for.
func (b *Balancer) standIns(f vip.Facts) (answers []announce.Answer, err error) {
	type place struct{ node, device string }
	macs := map[place]net.HardwareAddr{} // a look is at all neighbours of the device, and addresses are many
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

// neighbourOf is the Ethernet address by which a device reaches a node, or nil. What fails is of interest without one.
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
