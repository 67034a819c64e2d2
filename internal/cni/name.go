package cni

import (
	"crypto/sha256"
	"encoding/base32"
	"fmt"
	"net"
	"strings"

	"github.com/fathom-network/fathom/internal/kernel/lease"
	"github.com/fathom-network/fathom/internal/kernel/podlink"
)

// hostDevice names the node's end of a pod's pair: the start of the pod's name for people, and five characters of a
// hash, since a device has 15 in all. The alias has the rest.
func hostDevice(pod string, a lease.Attachment, attempt int) string {
	name := make([]byte, 0, 8)
	for i := 0; i < len(pod) && len(name) < cap(name); i++ {
		// Not the dot: sysctl's names have dots between their parts.
		if c := pod[i]; 'a' <= c && c <= 'z' || 'A' <= c && c <= 'Z' || '0' <= c && c <= '9' || c == '-' && len(name) > 0 {
			name = append(name, c)
		}
	}
	start := strings.TrimRight(string(name), "-")
	if start == "" {
		start = "pod"
	}
	sum := sha256.Sum256(fmt.Appendf(nil, "%s\x00%s\x00%d", a.ContainerID, a.IfName, attempt))
	return start + "-" + strings.ToLower(base32.StdEncoding.EncodeToString(sum[:])[:5])
}

// alias says in full whose device it is.
func alias(l lease.Lease) string {
	if l.Alias != "" {
		return l.Alias
	}
	s := fmt.Sprintf("%s pod %s/%s %s", l.Network, l.PodNamespace, l.PodName, l.IfName)
	if l.PodName == "" {
		s = fmt.Sprintf("%s container %s %s", l.Network, l.ContainerID, l.IfName)
	}
	const longest = 255 // IFALIASZ, and a zero
	return s[:min(len(s), longest)]
}

// isOf says whether the device is one of this network's.
func isOf(network string, d podlink.Device) bool {
	return strings.HasPrefix(d.Alias, network+" pod ") || strings.HasPrefix(d.Alias, network+" container ")
}

// mac is an address of our own making ("locally administered"), always the same for an end of an attachment: it is
// known before the device is, and nobody has to ask the kernel for it.
func mac(a lease.Attachment, end string) net.HardwareAddr {
	sum := sha256.Sum256(fmt.Appendf(nil, "%s\x00%s\x00%s", a.ContainerID, a.IfName, end))
	m := net.HardwareAddr(sum[:6])
	m[0] = m[0]&^1 | 2
	return m
}
