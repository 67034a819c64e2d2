package verify

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"

	"github.com/fathom-network/fathom/internal/facts/policy"
	"github.com/fathom-network/fathom/internal/facts/policyfacts"
	"github.com/fathom-network/fathom/internal/facts/service"
	"github.com/fathom-network/fathom/internal/facts/svcfacts"
	"github.com/fathom-network/fathom/internal/watch/kube"
)

// PoliciesEnforced says whether agents of Fathom's network run in the cluster, which enforce policies. Whether another network does is not
// known.
func PoliciesEnforced(ctx context.Context, client *kube.Client) (bool, error) {
	_, err := findAgents(ctx, client)
	if errors.Is(err, errNoAgents) {
		return false, nil
	}
	return err == nil, err
}

// parseServiceEnd reads svc/NAME, svc/NAMESPACE/NAME, and the names that DNS has for a Service, NAME.NAMESPACE.svc and what may follow.
func parseServiceEnd(s, namespace string) (name service.Name, ok bool) {
	rest, ok := strings.CutPrefix(s, "svc/")
	if !ok {
		rest, ok = strings.CutPrefix(s, "service/")
	}
	if ok {
		if ns, n, cut := strings.Cut(rest, "/"); cut {
			namespace, rest = ns, n
		}
		return service.Name{Namespace: namespace, Name: rest}, namespace != "" && rest != "" && !strings.ContainsAny(rest, "/:")
	}
	labels := strings.Split(strings.TrimSuffix(s, "."), ".")
	if len(labels) < 3 || labels[2] != "svc" || strings.Contains(s, "/") {
		return service.Name{}, false
	}
	return service.Name{Namespace: labels[1], Name: labels[0]}, labels[0] != "" && labels[1] != ""
}

// ExplainPolicyToService says of each endpoint that may answer for a Service whether policies allow the connection that is asked about. A
// headless Service has no ports of its own: its endpoints are met at the port that is asked about.
func ExplainPolicyToService(c policyfacts.Cluster, q PolicyQuery, services []*corev1.Service, all []*discoveryv1.EndpointSlice) ([]policyfacts.Explanation, error) {
	i := slices.IndexFunc(services, func(s *corev1.Service) bool {
		return s.Namespace == q.To.Service.Namespace && s.Name == q.To.Service.Name
	})
	if i < 0 {
		return nil, fmt.Errorf("there is no Service %s; `fathom service ls` lists them", q.To.Service)
	}
	s := services[i]
	if q.Port == 0 {
		return nil, fmt.Errorf("to the Service %s: name one of its ports, such as svc/%s:80", s.Name, s.Name)
	}
	from, err := q.From.addrs(c)
	if err != nil {
		return nil, err
	}
	headless := s.Spec.ClusterIP == corev1.ClusterIPNone
	at := slices.IndexFunc(s.Spec.Ports, func(p corev1.ServicePort) bool {
		protocol := p.Protocol
		if protocol == "" {
			protocol = corev1.ProtocolTCP
		}
		return p.Port == int32(q.Port) && string(protocol) == q.Protocol.String()
	})
	if at < 0 && !headless {
		return nil, fmt.Errorf("the Service %s has no port %d/%s", q.To.Service, q.Port, q.Protocol)
	}
	m := c.Model()
	var list []policyfacts.Explanation
	met := map[netip.AddrPort]bool{}
	for _, e := range svcfacts.Explain(s, all, service.Node{}) {
		to := e.Addr
		if headless {
			to = netip.AddrPortFrom(to.Addr(), q.Port)
		}
		if !to.IsValid() || !e.Ready || met[to] || !headless && (e.PortName != s.Spec.Ports[at].Name || e.Protocol != q.Protocol) {
			continue
		}
		met[to] = true
		for _, a := range from {
			if a.Is4() == to.Addr().Is4() {
				x := c.Explain(m, policy.Packet{From: a, To: to.Addr(), Protocol: q.Protocol, Port: to.Port()})
				x.Service = q.To.Service.String()
				list = append(list, x)
			}
		}
	}
	if len(list) == 0 {
		return nil, fmt.Errorf("the Service %s has no endpoint that is ready and of a family that the client has", q.To.Service)
	}
	return list, nil
}
