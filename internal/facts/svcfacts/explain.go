package svcfacts

import (
	"fmt"
	"net/netip"
	"strings"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"

	"github.com/fathom-network/fathom/internal/facts/service"
)

// Explain returns all endpoints of a Service, as the node sees them, sorted by port, address and slice.
func Explain(svc *corev1.Service, all []*discoveryv1.EndpointSlice, node service.Node) []service.EndpointUse {
	s := Service(svc)
	var uses []service.EndpointUse
	for _, es := range all {
		if serviceOf(es) != s.Name {
			continue
		}
		for i := range es.Ports {
			for j := range es.Endpoints {
				uses = append(uses, endpointUse(es, &es.Ports[i], &es.Endpoints[j]))
			}
		}
	}
	service.Explain(s, Slices(all), uses, node)
	return uses
}

func endpointUse(es *discoveryv1.EndpointSlice, p *discoveryv1.EndpointPort, e *discoveryv1.Endpoint) service.EndpointUse {
	u := service.EndpointUse{Slice: es.Name, Condition: conditionOf(e.Conditions)}
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
	port, err := readSlicePort(p)
	if err != nil {
		u.Why = fmt.Sprintf("the slice's port %q %v", u.PortName, err)
		return u
	}
	addr, err := endpointAddr(e, familyOf(es))
	if err != nil {
		u.Why = fmt.Sprintf("its address %q %v", strings.Join(e.Addresses, ", "), err)
		return u
	}
	u.Addr = netip.AddrPortFrom(addr, port.Number)
	return u
}
