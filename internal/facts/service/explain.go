package service

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
)

// EndpointUse is an endpoint of a Service's port, and whether a node sends anything there.
type EndpointUse struct {
	Slice    string
	PortName string
	Protocol Protocol
	Addr     netip.AddrPort // not valid if the slice's is not
	Node     string         // on which the endpoint is; empty if it is on none
	Zone     string
	Pod      string // empty if it is no pod

	Ready, Serving, Terminating bool

	// Inside says that what starts on the node or in its pods may go there, Outside that what comes to an address which
	// is not a ClusterIP from outside the cluster may.
	Inside, Outside bool
	// Why says why it is not used, or only now, or only from inside; empty if there is nothing to say.
	Why string
}

// Explain returns all endpoints of a Service, as the node sees them, sorted by port, address and slice.
func Explain(svc *corev1.Service, all []*discoveryv1.EndpointSlice, node Node) []EndpointUse {
	x := explainer{service: readService(svc), at: placeOf(node)}
	x.own = readSlices(x.service.name, all)
	x.frontends = x.service.frontends(x.own, x.at)
	var uses []EndpointUse
	for _, es := range all {
		of, ok := serviceOf(es)
		if !ok || of != x.service.name {
			continue
		}
		family := v4
		if es.AddressType == discoveryv1.AddressTypeIPv6 {
			family = v6
		}
		for i := range es.Ports {
			for j := range es.Endpoints {
				uses = append(uses, x.use(es.Name, &es.Ports[i], &es.Endpoints[j], family))
			}
		}
	}
	slices.SortStableFunc(uses, func(a, b EndpointUse) int {
		if c := strings.Compare(a.PortName, b.PortName); c != 0 {
			return c
		}
		if c := a.Addr.Compare(b.Addr); c != 0 {
			return c
		}
		return strings.Compare(a.Slice, b.Slice)
	})
	return uses
}

type explainer struct {
	service   *service
	own       []*slice
	at        place
	frontends []Frontend
}

func (x *explainer) use(slice string, p *discoveryv1.EndpointPort, e *discoveryv1.Endpoint, family int) EndpointUse {
	c := conditionOf(e.Conditions)
	u := EndpointUse{Slice: slice, Ready: c.ready, Serving: c.serving, Terminating: c.terminating}
	if p.Name != nil {
		u.PortName = *p.Name
	}
	if e.NodeName != nil {
		u.Node = *e.NodeName
	}
	if e.Zone != nil {
		u.Zone = *e.Zone
	}
	if e.TargetRef != nil && e.TargetRef.Kind == "Pod" {
		u.Pod = e.TargetRef.Name
	}
	u.Protocol, _ = protocolOf(p.Protocol)
	sp, err := readSlicePort(p)
	if err != nil {
		u.Why = fmt.Sprintf("the slice's port %q %v", u.PortName, err)
		return u
	}
	addr, err := endpointAddr(e, family)
	if err != nil {
		u.Why = fmt.Sprintf("its address %q %v", strings.Join(e.Addresses, ", "), err)
		return u
	}
	u.Addr = netip.AddrPortFrom(addr, sp.number)
	i := slices.IndexFunc(x.service.ports, func(p port) bool { return p.id == sp.name && p.protocol == sp.protocol })
	switch {
	case !x.service.serves[family]:
		u.Why = fmt.Sprintf("the Service has no %s address that is balanced here", familyName[family])
	case i < 0:
		u.Why = fmt.Sprintf("the Service has no port named %q of %s", u.PortName, u.Protocol)
	default:
		x.judge(&u, c, x.service.ports[i], family)
	}
	return u
}

// judge says what becomes of an endpoint that a frontend could use.
func (x *explainer) judge(u *EndpointUse, c condition, p port, family int) {
	all := candidates(x.own, p, family)
	external := false
	for _, f := range x.frontends {
		if f.PortName != p.name || f.Protocol != p.protocol || familyOf(f.Addr) != family {
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
	case i >= 0 && all[i].condition != c:
		u.Inside, u.Outside, u.Why = false, false, "it is listed twice, and the other counts"
	case u.Inside || u.Outside:
		switch {
		case !c.ready:
			u.Why = "it terminates, but serves, and none is ready"
		case external && !u.Outside:
			u.Why = "it is on another node: only from inside, for externalTrafficPolicy is Local"
		}
	case !c.ready && c.terminating && c.serving:
		u.Why = "it terminates, and others are ready"
	case !c.ready && c.terminating:
		u.Why = "it terminates and serves no longer"
	case !c.ready:
		u.Why = "it is not ready"
	case !hinted(all, x.at).near(all[i], x.at):
		u.Why = map[reach]string{
			withinZone: fmt.Sprintf("it is for clients in zone %s, and zone %s has others", all[i].hinted().zones, x.at.zone),
			withinNode: fmt.Sprintf("it is for clients on node %s, and node %s has others", all[i].hinted().nodes, x.at.name),
		}[hinted(all, x.at)]
	default:
		u.Why = "it is on another node, and internalTrafficPolicy is Local"
	}
}
