package routeradv

import "net/netip"

// Of ICMPv6 and Neighbour Discovery, RFC 4861.
const (
	solicitType, advertiseType = 133, 134
	solicitHeader              = 8
	advertiseHeader            = 16
	linkLayerOption            = 1 // the source's link-layer address
	// markOption is a type for experiments (RFC 4727), which others pass over.
	markOption = 253
	mark       = "fathom"
)

// advertisement is one as it was heard.
type advertisement struct {
	from netip.Addr // without a zone
	mac  [6]byte    // zero if it does not say
	node bool       // it is from a node like this one
}

// parse reads what an ICMPv6 packet says that came over a link from an address, with what was left of its hops. Only a router
// of the link sends with 255 of these: routers pass on none that has as many.
func parse(b []byte, from netip.Addr, hops int) (a advertisement, ok bool) {
	if len(b) < advertiseHeader || b[0] != advertiseType || b[1] != 0 || hops != 255 || !from.Is6() || !from.IsLinkLocalUnicast() {
		return advertisement{}, false
	}
	a.from = from.WithZone("")
	for options := b[advertiseHeader:]; len(options) > 0; {
		if len(options) < 8 || options[1] == 0 || int(options[1])*8 > len(options) {
			return advertisement{}, false
		}
		size := int(options[1]) * 8
		switch {
		case options[0] == linkLayerOption && size == 8:
			a.mac = [6]byte(options[2:8])
		case options[0] == markOption && size == 8 && string(options[2:8]) == mark:
			a.node = true
		}
		options = options[size:]
	}
	return a, true
}

// advertise is what a node says: that it is there. All else is zero: it is nobody's default router, and no address, prefix or
// parameter is to be had of it. The kernel writes the checksum.
func advertise(mac []byte) []byte {
	b := append(make([]byte, advertiseHeader), linkLayer(mac)...)
	b[0] = advertiseType
	return append(append(b, markOption, 1), mark...)
}

// solicit asks for advertisements.
func solicit(mac []byte) []byte {
	b := append(make([]byte, solicitHeader), linkLayer(mac)...)
	b[0] = solicitType
	return b
}

func linkLayer(mac []byte) []byte {
	if len(mac) != 6 {
		return nil
	}
	return append([]byte{linkLayerOption, 1}, mac...)
}
