package cni

import (
	"github.com/fathom-network/fathom/internal/bpf/pin"
	"github.com/fathom-network/fathom/internal/link"
)

// stopFalseSources has the kernel drop what the pod sends from addresses that are not its own, before it sends
// anything. It is no error of ADD if that cannot be: there may be no agent yet, or a kernel that lacks something. The
// agent sees every device, and says what is missing.
func stopFalseSources(node *link.Namespace, p link.Pod) {
	index, _, err := node.Index(p.HostDevice)
	if err != nil {
		return
	}
	_ = pin.Attach(pin.Dir, pin.Device{Index: index, MAC: [6]byte(p.MAC), HostMAC: [6]byte(p.HostMAC), Addrs: p.Addrs})
}
