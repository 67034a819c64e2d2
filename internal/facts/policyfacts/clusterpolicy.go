package policyfacts

import (
	"fmt"
	"net/netip"

	corev1 "k8s.io/api/core/v1"

	cnp "github.com/fathom-network/fathom/api/clusternetworkpolicy/v1beta1"
	"github.com/fathom-network/fathom/internal/facts/apinode"
	"github.com/fathom-network/fathom/internal/facts/policy"
	"github.com/fathom-network/fathom/internal/facts/service"
)

// ClusterKind is what policies of policy.networking.k8s.io are called.
const ClusterKind = "ClusterNetworkPolicy"

// ClusterID returns the ID of the ClusterNetworkPolicy of a name.
func ClusterID(name string) policy.ID {
	return policy.ID{Kind: ClusterKind, Name: service.Name{Name: name}}
}

// ClusterNetworkPolicy reads a ClusterNetworkPolicy. A rule of which something cannot be read is a problem and fails closed, as the API has it:
// one that accepts is for nothing, and any other denies everything.
func ClusterNetworkPolicy(o *cnp.ClusterNetworkPolicy) *policy.Policy {
	r := &reader{Policy: policy.Policy{ID: ClusterID(o.Name), Priority: o.Spec.Priority, Tier: policy.Admin}}
	switch o.Spec.Tier {
	case cnp.AdminTier:
	case cnp.BaselineTier:
		r.Tier = policy.Baseline
	default:
		r.problem("spec.tier %q is none of Admin and Baseline: the policy is asked as one of Admin", o.Spec.Tier)
	}
	r.audit(o)
	unread := false
	if err := r.subject(o.Spec.Subject); err != nil {
		r.problem("spec.subject %v: the policy denies to all pods what its rules deny or pass, and accepts nothing", err)
		r.Namespaces, r.Subject, unread = nil, nil, true
	}
	for i, rule := range o.Spec.Ingress {
		peers := make([]cnp.EgressPeer, len(rule.From)) // which may be more
		for j, p := range rule.From {
			peers[j] = cnp.EgressPeer{Namespaces: p.Namespaces, Pods: p.Pods}
		}
		r.tierRule(policy.Ingress, fmt.Sprintf("spec.ingress[%d]", i), "from", cnp.EgressRule{Name: rule.Name, Action: rule.Action, To: peers, Protocols: rule.Protocols})
	}
	for i, rule := range o.Spec.Egress {
		r.tierRule(policy.Egress, fmt.Sprintf("spec.egress[%d]", i), "to", rule)
	}
	for _, d := range policy.Directions {
		for i, rule := range r.Rules[d] {
			if unread && rule.Action == policy.Accept {
				r.Rules[d][i].Peers = nil
			} else if unread {
				r.Rules[d][i].Action = policy.Deny
			}
		}
	}
	return &r.Policy
}

func (r *reader) subject(s cnp.Subject) (err error) {
	switch {
	case s.Namespaces != nil && s.Pods == nil:
		r.Namespaces, err = selector(s.Namespaces)
		return err
	case s.Pods != nil && s.Namespaces == nil:
		if r.Namespaces, err = selector(&s.Pods.NamespaceSelector); err == nil {
			r.Subject, err = selector(&s.Pods.PodSelector)
		}
		return err
	}
	return fmt.Errorf("has not one of namespaces and pods")
}

// everyone are all addresses there are.
var everyone = []netip.Prefix{netip.MustParsePrefix("0.0.0.0/0"), netip.MustParsePrefix("::/0")}

// tierRule reads a rule. Its peers are those of egress, which are all that there are.
func (r *reader) tierRule(d policy.Direction, position, field string, o cnp.EgressRule) {
	rule := policy.Rule{Position: position, Name: o.Name, AnyPort: len(o.Protocols) == 0}
	unread := func(at string, err error) {
		if rule.Action == policy.Accept {
			r.problem("%s %v: the rule accepts nothing", at, err)
		} else {
			r.problem("%s %v: the rule denies everything", at, err)
		}
	}
	failed := false
	switch o.Action {
	case cnp.Accept:
	case cnp.Deny:
		rule.Action = policy.Deny
	case cnp.Pass:
		rule.Action = policy.Pass
	default:
		rule.Action, failed = policy.Deny, true
		unread(position, fmt.Errorf("has an action %q that is none of Accept, Deny and Pass", o.Action))
	}
	if len(o.To) == 0 {
		unread(position+"."+field, fmt.Errorf("names nobody"))
		failed = true
	}
	fits := true // names of ports and peers
	for i, p := range o.Protocols {
		port, err := tierPort(p)
		if err != nil {
			unread(fmt.Sprintf("%s.protocols[%d]", position, i), err)
			failed = true
			continue
		}
		fits = fits && port.Name == ""
		rule.Ports = append(rule.Ports, port)
	}
	for i, p := range o.To {
		at := fmt.Sprintf("%s.%s[%d]", position, field, i)
		peers, err := tierPeers(p, at)
		if err == nil && !fits && p.Namespaces == nil && p.Pods == nil {
			err = fmt.Errorf("has no ports with names, and the rule asks for one")
		}
		if err == nil && len(p.DomainNames) > 0 && rule.Action != policy.Accept {
			err = fmt.Errorf("has domainNames, which only an Accept may have")
		}
		if err != nil {
			unread(at, err)
			failed = true
			continue
		}
		if len(p.DomainNames) > 0 {
			r.problem("%s has domainNames, which Fathom does not know the addresses of: it accepts nothing", at)
		}
		rule.Peers = append(rule.Peers, peers...)
	}
	if failed {
		rule.Peers, rule.Ports, rule.AnyPort = nil, nil, true
		if rule.Action != policy.Accept {
			rule.Action = policy.Deny
			for _, all := range everyone {
				rule.Peers = append(rule.Peers, policy.Peer{Position: position, Block: policy.Block{Prefix: all}})
			}
		}
	}
	r.Rules[d] = append(r.Rules[d], rule)
}

// tierPeers reads a peer, which is several if it has several networks. One of domainNames is none.
func tierPeers(p cnp.EgressPeer, at string) (all []policy.Peer, err error) {
	set := 0
	for _, is := range []bool{p.Namespaces != nil, p.Pods != nil, p.Nodes != nil, len(p.Networks) > 0, len(p.DomainNames) > 0} {
		if is {
			set++
		}
	}
	if set != 1 {
		return nil, fmt.Errorf("has not one of the fields that say who is meant, but %d of those that Fathom knows", set)
	}
	peer := policy.Peer{Position: at}
	switch {
	case p.Namespaces != nil:
		peer.Pods = &policy.Pods{}
		peer.Pods.Namespaces, err = selector(p.Namespaces)
	case p.Pods != nil:
		peer.Pods = &policy.Pods{}
		if peer.Pods.Namespaces, err = selector(&p.Pods.NamespaceSelector); err == nil {
			peer.Pods.Pods, err = selector(&p.Pods.PodSelector)
		}
	case p.Nodes != nil:
		var nodes policy.Selector
		nodes, err = selector(p.Nodes)
		peer.Nodes = &nodes
	default:
		for i, cidr := range p.Networks {
			network, err := prefix(cidr)
			if err != nil {
				return nil, err
			}
			all = append(all, policy.Peer{Position: fmt.Sprintf("%s.networks[%d]", at, i), Block: policy.Block{Prefix: network}})
		}
		return all, nil
	}
	return []policy.Peer{peer}, err
}

func tierPort(p cnp.Protocol) (is policy.Port, err error) {
	set := 0
	var match *cnp.PortMatch
	for protocol, m := range map[service.Protocol]*cnp.PortMatch{service.TCP: p.TCP, service.UDP: p.UDP, service.SCTP: p.SCTP} {
		if m != nil {
			is.Protocol, match = protocol, m
			set++
		}
	}
	if p.DestinationNamedPort != "" {
		is.Name = p.DestinationNamedPort
		set++
	}
	if set != 1 {
		return is, fmt.Errorf("has not one of tcp, udp, sctp and destinationNamedPort, but %d of them", set)
	}
	switch {
	case match == nil:
		return is, nil
	case match.DestinationPort == nil:
		is.To = 1<<16 - 1
		return is, nil
	}
	from, to := match.DestinationPort.Number, match.DestinationPort.Number
	if r := match.DestinationPort.Range; r != nil {
		if from != 0 {
			return is, fmt.Errorf("has both a number and a range")
		}
		from, to = r.Start, r.End
	}
	if from < 1 || to < from || to > 1<<16-1 {
		return is, fmt.Errorf("has ports %d to %d, which are none", from, to)
	}
	is.From, is.To = uint16(from), uint16(to)
	return is, nil
}

// Node reads a node: the addresses of its status are what a peer that selects it means.
func Node(o *corev1.Node) policy.Node {
	return policy.Node{Name: o.Name, Labels: o.Labels, Addrs: apinode.Addrs(o)}
}
