package routeradv

import (
	"net/netip"
	"time"
)

// patience is how long a router that is doubted has to answer. It is asked several times meanwhile, and need not answer more
// often than each 3 s (RFC 4861, 6.2.6).
const patience = 10 * time.Second

// heard is what is made of the advertisements on a link. One router is chosen and kept, since a session ends with the choice:
// though it falls silent, for its session tells better whether it lives. Another takes its place when it is the same one with
// another address, or is heard while the one before does not answer any more.
type heard struct {
	router netip.Addr
	mac    [6]byte
	before netip.Addr // the address that the router had before
	// doubter is another router that was heard after the router was, and doubted since when.
	doubter netip.Addr
	doubted time.Time
	other   netip.Addr // another router, which was heard beside this one
}

// hear takes in an advertisement. Changed says that another address is the router's now.
func (h *heard) hear(a advertisement, at time.Time) (changed bool) {
	switch {
	case a.node:
	case a.from == h.router:
		h.mac = a.mac
		if h.doubter.IsValid() {
			h.other, h.doubter, h.doubted = h.doubter, netip.Addr{}, time.Time{}
		}
	case !h.router.IsValid():
		*h = heard{router: a.from, mac: a.mac}
		return true
	case a.mac != [6]byte{} && a.mac == h.mac && a.from != h.before:
		*h = heard{router: a.from, mac: a.mac, before: h.router}
		return true
	case !h.doubter.IsValid():
		h.doubter, h.doubted = a.from, at
	case at.Sub(h.doubted) >= patience:
		*h = heard{router: a.from, mac: a.mac}
		return true
	}
	return false
}

// asks says whether routers are to be asked for an advertisement.
func (h *heard) asks() bool { return !h.router.IsValid() || h.doubter.IsValid() }
