package service

import (
	"cmp"
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"github.com/fathom-network/fathom/internal/facts/inet"
)

// EndpointUse is an endpoint of a Service's port, and whether a node sends anything there.
type EndpointUse struct {
	Slice    string
	PortName string
	Protocol Protocol
	Addr     netip.AddrPort // invalid if the slice's address is
	Node     string         // the endpoint's node; empty if it has none
	Zone     string
	Pod      string // empty if the endpoint is not a pod

	Condition

	// Inside says that traffic from the node and its pods may go there. Outside says that traffic from outside the cluster, to an
	// address other than a ClusterIP, may.
	Inside, Outside bool
	// Why says why the endpoint is not used, or used only for now, or only from inside. It is empty for an ordinary one.
	Why string
}

// Explain fills in whether a node uses the endpoints of a Service, and why not, and sorts them by port, address and slice. uses
// are all endpoints of the Service's slices as svcfacts reads them. Those with an invalid address have their Why already.
func Explain(s *Service, all []*Slice, uses []EndpointUse, node Node) {
	x := explainer{service: s, own: s.own(all), at: placeOf(node)}
	x.frontends = s.frontends(x.own, x.at)
	for i := range uses {
		if uses[i].Addr.IsValid() {
			x.explain(&uses[i])
		}
	}
	slices.SortStableFunc(uses, func(a, b EndpointUse) int {
		return cmp.Or(strings.Compare(a.PortName, b.PortName), a.Addr.Compare(b.Addr), strings.Compare(a.Slice, b.Slice))
	})
}

type explainer struct {
	service   *Service
	own       []*Slice
	at        place
	frontends []Frontend
}

func (x *explainer) explain(u *EndpointUse) {
	family := inet.FamilyOf(u.Addr.Addr())
	i := slices.IndexFunc(x.service.Ports, func(p Port) bool { return p.Name == u.PortName && p.Protocol == u.Protocol })
	switch {
	case !*x.service.Serves.Of(family):
		u.Why = fmt.Sprintf("the Service has no %s address that is balanced here", family)
	case i < 0:
		u.Why = fmt.Sprintf("the Service has no port named %q of %s", u.PortName, u.Protocol)
	default:
		x.judge(u, x.service.Ports[i], family)
	}
}

// judge fills in the use of an endpoint of a port that the Service has.
func (x *explainer) judge(u *EndpointUse, p Port, family inet.Family) {
	c := u.Condition
	all := candidates(x.own, p, family)
	external := false
	for _, f := range x.frontends {
		if f.PortName != p.Name || f.Protocol != p.Protocol || inet.FamilyOf(f.Addr) != family {
			continue
		}
		u.Inside = u.Inside || slices.Contains(f.Inside.Endpoints, u.Addr)
		if f.Kind != ClusterIP {
			external = true
			u.Outside = u.Outside || slices.Contains(f.Outside.Endpoints, u.Addr)
		}
	}
	i := slices.IndexFunc(all, func(o candidate) bool { return o.at == u.Addr })
	switch {
	case i >= 0 && all[i].Condition != c:
		u.Inside, u.Outside, u.Why = false, false, "it is listed twice, and the other counts"
	case u.Inside || u.Outside:
		switch {
		case !c.Ready:
			u.Why = "it terminates, but serves, and none is ready"
		case external && !u.Outside:
			u.Why = "it is on another node: only from inside, for externalTrafficPolicy is Local"
		}
	case !c.Ready && c.Terminating && c.Serving:
		u.Why = "it terminates, and others are ready"
	case !c.Ready && c.Terminating:
		u.Why = "it terminates and serves no longer"
	case !c.Ready:
		u.Why = "it is not ready"
	case !hinted(all, x.at).near(all[i], x.at):
		u.Why = map[reach]string{
			withinZone: fmt.Sprintf("it is for clients in zone %s, and zone %s has others", all[i].hinted().Zones, x.at.zone),
			withinNode: fmt.Sprintf("it is for clients on node %s, and node %s has others", all[i].hinted().Nodes, x.at.name),
		}[hinted(all, x.at)]
	default:
		u.Why = "it is on another node, and internalTrafficPolicy is Local"
	}
}
