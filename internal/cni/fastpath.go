package cni

import (
	"github.com/fathom-network/fathom/internal/kernel/bpf/pin"
	"github.com/fathom-network/fathom/internal/kernel/link"
	"github.com/fathom-network/fathom/internal/kernel/podlink"
)

// stopFalseSources has the kernel drop what the pod sends from addresses that are not its own, before it sends
// anything. It is no error of ADD if that cannot be: there may be no agent yet, or a kernel that lacks something. The
// agent sees every device, and says what is missing.
func (c *call) stopFalseSources(node *link.Namespace, p podlink.Pod) {
	index, _, err := node.Index(p.HostDevice)
	if err != nil {
		return
	}
	device := pin.Device{Index: index, MAC: [6]byte(p.MAC), HostMAC: [6]byte(p.HostMAC), Addrs: p.Addrs}
	_ = pin.Attach(pin.Dir, device, func(program int) error {
		// By a filter: for a program by tcx the kernel waits, with all devices locked, until no processor can be in the
		// middle of anything, which is 10 ms, and once more when the device goes. But where the plugin "bandwidth",
		// behind us, needs the place of filters for itself, it gets it.
		if !c.limitsEgress && node.SetFilter(index, program, pin.FromPod) == nil {
			return nil
		}
		return pin.AttachTCX(index, program)
	})
}
