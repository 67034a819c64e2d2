package service

import "net/netip"

// departures remembers addresses of endpoints whose pods have gone. An EndpointSlice does not say why an endpoint left it:
// its pod may be gone, or it may live while the selector or the port has changed or the Service was deleted. The endpoint's
// last state tells the two apart. A deleted pod terminates first, and one whose node has died is not ready; one that lives
// and served is neither. Rejected: a query of the API server for the pod, on every node for each endpoint that goes.
//
// A pod that was deleted by force while it served is mistaken for a living one: its own kernel ends its connections.
type departures struct {
	addrs map[netip.Addr]struct{}
	order []netip.Addr // a ring; addrs may lack some of them
	next  int          // the index of the oldest, once the ring is full
	count uint64
}

// departuresKept bounds the memory. Flows are compared with endpoints at the latest seconds after an endpoint has gone.
const departuresKept = 8192

// note records a change of a slice; nil means that there is none.
func (d *departures) note(before, now *Slice) {
	if now != nil {
		for i := range now.Endpoints {
			if e := &now.Endpoints[i]; !e.Terminating { // a new pod has the address of one that has gone
				delete(d.addrs, e.Addr)
			}
		}
	}
	if before == nil {
		return
	}
	var still map[netip.Addr]struct{}
	for i := range before.Endpoints {
		e := &before.Endpoints[i]
		if !e.Terminating && e.Ready {
			continue
		}
		if still == nil {
			still = now.addrs()
		}
		if _, found := still[e.Addr]; !found {
			d.add(e.Addr)
		}
	}
}

func (d *departures) add(a netip.Addr) {
	d.count++
	if _, found := d.addrs[a]; found {
		return
	}
	if d.addrs == nil {
		d.addrs = map[netip.Addr]struct{}{}
	}
	d.addrs[a] = struct{}{}
	if len(d.order) < departuresKept {
		d.order = append(d.order, a)
		return
	}
	delete(d.addrs, d.order[d.next])
	d.order[d.next] = a
	d.next = (d.next + 1) % departuresKept
}

func (d *departures) has(a netip.Addr) bool {
	_, found := d.addrs[a]
	return found
}

// addrs returns the addresses of a slice's endpoints.
func (s *Slice) addrs() map[netip.Addr]struct{} {
	all := map[netip.Addr]struct{}{}
	if s != nil {
		for i := range s.Endpoints {
			all[s.Endpoints[i].Addr] = struct{}{}
		}
	}
	return all
}
