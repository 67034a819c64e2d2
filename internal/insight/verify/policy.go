package verify

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"slices"
	"strconv"
	"strings"

	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"

	cnp "github.com/fathom-network/fathom/api/clusternetworkpolicy/v1beta1"
	"github.com/fathom-network/fathom/internal/facts/policy"
	"github.com/fathom-network/fathom/internal/facts/policyfacts"
	"github.com/fathom-network/fathom/internal/facts/service"
	"github.com/fathom-network/fathom/internal/watch/kube"
)

// ReadPolicies reads what policies are about.
func ReadPolicies(ctx context.Context, client *kube.Client) (c policyfacts.Cluster, err error) {
	if c.Policies, err = kube.List(ctx, client, kube.NetworkPolicies, kube.Selection{}); err != nil {
		return c, err
	}
	if c.ClusterPolicies, err = kube.List(ctx, client, kube.ClusterNetworkPolicies, kube.Selection{}); err != nil {
		return c, err
	}
	if c.Namespaces, err = kube.List(ctx, client, kube.Namespaces, kube.Selection{}); err != nil {
		return c, err
	}
	if c.Nodes, err = kube.List(ctx, client, kube.Nodes, kube.Selection{}); err != nil {
		return c, err
	}
	c.Pods, err = kube.List(ctx, client, kube.Pods, kube.Selection{})
	return c, err
}

// ParsePolicies reads a manifest of NetworkPolicies and ClusterNetworkPolicies, of a cluster that has nothing else. NetworkPolicies without a
// namespace are of the one given.
func ParsePolicies(r io.Reader, namespace string) (c policyfacts.Cluster, err error) {
	objects, err := kube.Decode(r)
	if err != nil {
		return c, err
	}
	for _, o := range objects {
		var read *policy.Policy
		switch (schema.GroupKind{Group: o.GroupVersionKind().Group, Kind: o.GetKind()}) {
		case schema.GroupKind{Group: networkingv1.GroupName, Kind: policyfacts.Kind}:
			p := &networkingv1.NetworkPolicy{}
			err = runtime.DefaultUnstructuredConverter.FromUnstructuredWithValidation(o.Object, p, true)
			if p.Namespace == "" {
				p.Namespace = namespace
			}
			c.Policies, read = append(c.Policies, p), policyfacts.NetworkPolicy(p)
		case schema.GroupKind{Group: cnp.GroupVersion.Group, Kind: policyfacts.ClusterKind}:
			p := &cnp.ClusterNetworkPolicy{}
			err = runtime.DefaultUnstructuredConverter.FromUnstructuredWithValidation(o.Object, p, true)
			c.ClusterPolicies, read = append(c.ClusterPolicies, p), policyfacts.ClusterNetworkPolicy(p)
		default:
			return c, fmt.Errorf("%s %s of %s is no NetworkPolicy of %s, nor a ClusterNetworkPolicy of %s", o.GetKind(), o.GetName(), o.GetAPIVersion(),
				networkingv1.GroupName, cnp.GroupVersion.Group)
		}
		if err != nil {
			return c, fmt.Errorf("%s %s: %w", o.GetKind(), o.GetName(), err)
		}
		if len(read.Problems) > 0 {
			return c, fmt.Errorf("%s: %s", read.ID, strings.Join(read.Problems, "; "))
		}
	}
	if len(objects) == 0 {
		return c, errors.New("there is no policy in it")
	}
	return c, nil
}

// PolicyQuery is a connection that is asked about.
type PolicyQuery struct {
	From, To PolicyEnd
	// Protocol is 0 for one without ports, such as a ping.
	Protocol service.Protocol
	Port     uint16
}

// PolicyEnd is a pod, an address, or, of a destination, a Service.
type PolicyEnd struct {
	Pod  service.Name
	Addr netip.Addr // if it is no pod
	// Service is the destination if its Name is not empty.
	Service service.Name
}

// ParsePolicyQuery reads FROM and TO[:PORT[/PROTOCOL]]. Pods without a namespace are of the one given.
func ParsePolicyQuery(from, to, namespace string) (q PolicyQuery, err error) {
	if q.From, err = parsePolicyEnd(from, namespace); err != nil {
		return q, err
	}
	end, port := to, ""
	if i := strings.LastIndex(to, ":"); i >= 0 && (strings.Count(to, ":") == 1 || strings.HasPrefix(to, "[") && strings.Contains(to, "]:")) {
		end, port = strings.Trim(to[:i], "[]"), to[i+1:]
	}
	if name, is := parseServiceEnd(end, namespace); is {
		q.To = PolicyEnd{Service: name}
	} else if q.To, err = parsePolicyEnd(strings.Trim(end, "[]"), namespace); err != nil {
		return q, err
	}
	if end == to {
		return q, nil
	}
	number, protocol, found := strings.Cut(port, "/")
	n, err := strconv.ParseUint(number, 10, 16)
	if err != nil || n == 0 {
		return q, fmt.Errorf("%q: port %q is not a number from 1 to 65535", to, number)
	}
	q.Port, q.Protocol = uint16(n), service.TCP
	if found {
		protocols := []service.Protocol{service.TCP, service.UDP, service.SCTP}
		i := slices.IndexFunc(protocols, func(p service.Protocol) bool { return strings.EqualFold(p.String(), protocol) })
		if i < 0 {
			return q, fmt.Errorf("%q: protocol %q is none of TCP, UDP and SCTP", to, protocol)
		}
		q.Protocol = protocols[i]
	}
	return q, nil
}

func parsePolicyEnd(s, namespace string) (PolicyEnd, error) {
	if a, err := netip.ParseAddr(s); err == nil && a.Zone() == "" {
		return PolicyEnd{Addr: a.Unmap()}, nil
	}
	if ns, name, cut := strings.Cut(s, "/"); cut {
		namespace, s = ns, name
	}
	if namespace == "" || namespace == "svc" || namespace == "service" || s == "" || strings.ContainsAny(s, "/:") {
		return PolicyEnd{}, fmt.Errorf("%q: want a Pod as NAME or NAMESPACE/NAME, or an address", s)
	}
	return PolicyEnd{Pod: service.Name{Namespace: namespace, Name: s}}, nil
}

// ExplainPolicy says whether policies allow a connection, in each family that both ends have.
func ExplainPolicy(c policyfacts.Cluster, q PolicyQuery) ([]policyfacts.Explanation, error) {
	from, err := q.From.addrs(c)
	if err != nil {
		return nil, err
	}
	to, err := q.To.addrs(c)
	if err != nil {
		return nil, err
	}
	m := c.Model()
	var all []policyfacts.Explanation
	for _, a := range from {
		for _, b := range to {
			if a.Is4() == b.Is4() {
				all = append(all, c.Explain(m, policy.Packet{From: a, To: b, Protocol: q.Protocol, Port: q.Port}))
			}
		}
	}
	if len(all) == 0 {
		return nil, fmt.Errorf("%v and %v have no address family in common", from, to)
	}
	return all, nil
}

func (e PolicyEnd) addrs(c policyfacts.Cluster) ([]netip.Addr, error) {
	if e.Addr.IsValid() {
		return []netip.Addr{e.Addr}, nil
	}
	i := slices.IndexFunc(c.Pods, func(p *corev1.Pod) bool { return p.Namespace == e.Pod.Namespace && p.Name == e.Pod.Name })
	if i < 0 {
		return nil, fmt.Errorf("there is no Pod %s; `kubectl get pods -A` lists them", e.Pod)
	}
	p := c.Pods[i]
	list := podAddrs(p)
	if len(list) == 0 || p.Status.Phase == corev1.PodSucceeded || p.Status.Phase == corev1.PodFailed {
		return nil, fmt.Errorf("the Pod %s has no address: it is %s", e.Pod, p.Status.Phase)
	}
	return list, nil
}
