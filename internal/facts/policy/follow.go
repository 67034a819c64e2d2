package policy

import (
	"cmp"
	"net/netip"
	"slices"
	"strings"
)

// SetPolicy tells of a policy, which is not to be changed after.
func (m *Model) SetPolicy(p *Policy) {
	// Before the old one goes: what both look at stays.
	m.look(p, 1)
	state := &policyState{Policy: p}
	for _, d := range Directions {
		for _, r := range p.Rules[d] {
			var list []*peers
			for _, peer := range r.Peers {
				list = append(list, m.acquire(p.Tier, peer))
			}
			if d == Egress && r.AnyPeer && slices.ContainsFunc(r.Ports, func(p Port) bool { return p.Name != "" }) {
				list = append(list, m.acquirePods(Pods{})) // whose ports have the name
			}
			state.peers[d] = append(state.peers[d], list)
		}
	}
	old := m.removePolicy(p.ID)
	m.policies[p.ID] = state
	if p.Tier == Namespaced {
		put(m.inside, p.Namespace, p.ID, state)
	} else {
		m.tiers[p.ID] = state
	}
	m.reclassifyFor(state)
	if old != nil && old.Tier != Namespaced {
		m.reclassifyFor(old)
	}
}

// DeletePolicy forgets a policy.
func (m *Model) DeletePolicy(id ID) {
	if p := m.removePolicy(id); p != nil {
		m.reclassifyFor(p)
	}
}

// reclassifyFor looks again which policies select the identities that a policy may select.
func (m *Model) reclassifyFor(p *policyState) {
	if p.Tier == Namespaced {
		m.reclassify(p.Namespace)
		return
	}
	for namespace := range m.within {
		if p.Namespaces.Matches(m.namespaces[namespace]) {
			m.reclassify(namespace)
		}
	}
}

func (m *Model) removePolicy(id ID) *policyState {
	p := m.policies[id]
	if p == nil {
		return nil
	}
	delete(m.policies, id)
	delete(m.tiers, id)
	drop(m.inside, id.Namespace, id)
	for _, c := range m.classes { // one that is changed has other selectors, whoever else it selects
		if slices.Contains(c.policies, p) {
			m.unuse(c)
		}
	}
	m.look(p.Policy, -1)
	for _, rules := range p.peers {
		for _, list := range rules {
			for _, s := range list {
				if s != nil {
					m.release(s)
				}
			}
		}
	}
	return p
}

// look counts what a policy looks at, and gives the pods that have it the identities that follow.
func (m *Model) look(p *Policy, by int) {
	labels, ports := map[string]bool{}, map[string]bool{}
	of := func(s Selector) {
		for _, r := range s {
			labels[r.Key] = true
		}
	}
	of(p.Subject)
	for _, d := range Directions {
		for _, r := range p.Rules[d] {
			for _, peer := range r.Peers {
				if peer.Pods != nil {
					of(peer.Pods.Pods)
				}
			}
			for _, port := range r.Ports {
				if port.Name != "" {
					ports[port.Name] = true
				}
			}
		}
	}
	news := func(counts map[string]int, of map[string]bool) {
		for k := range of {
			before := counts[k]
			if counts[k] += by; counts[k] == 0 {
				delete(counts, k)
			}
			if (before == 0) == (counts[k] == 0) {
				delete(of, k)
			}
		}
	}
	news(m.labels, labels)
	news(m.ports, ports)
	if len(labels)+len(ports) == 0 {
		return
	}
	for _, pod := range m.pods {
		for k := range labels {
			if _, has := pod.Labels[k]; has {
				m.identify(pod)
				break
			}
		}
		if len(ports) > 0 && slices.ContainsFunc(pod.Ports, func(p PodPort) bool { return ports[p.Name] }) {
			m.identify(pod)
		}
	}
}

// acquire returns what a peer of a rule selects, which rules share; nil of a NetworkPolicy's block, in which order means nothing.
func (m *Model) acquire(t Tier, p Peer) *peers {
	switch {
	case p.Pods != nil:
		return m.acquirePods(*p.Pods)
	case t == Namespaced:
		return nil
	case p.Nodes != nil:
		s, made := m.selectorOf("nodes "+p.Nodes.String(), peers{nodes: p.Nodes})
		if made {
			m.ofNodes[s] = true
		}
		return s
	}
	s, made := m.selectorOf("network "+p.Block.Prefix.String(), peers{network: p.Block.Prefix})
	if made {
		m.networks[s.network] = s
		m.identifyIn(s.network)
	}
	return s
}

func (m *Model) acquirePods(p Pods) *peers {
	s, made := m.selectorOf(p.String(), peers{Pods: p})
	switch {
	case !made:
	case p.Namespace != "":
		put(m.narrow, p.Namespace, s, true)
		for id := range m.within[p.Namespace] {
			m.setMember(s, id)
		}
	default:
		m.wide[s] = true
		for _, id := range m.identities {
			m.setMember(s, id)
		}
	}
	return s
}

// selectorOf returns the selector of a key, for one more rule, and whether it was made for it.
func (m *Model) selectorOf(key string, p peers) (s *peers, made bool) {
	if s = m.selectors[key]; s == nil {
		p.key, p.members, p.users = key, map[*identity]bool{}, map[*classState]bool{}
		s, made = &p, true
		m.selectors[key] = s
	}
	s.refs++
	return s, made
}

// identifyIn gives addresses of a network the identities that they should have.
func (m *Model) identifyIn(network netip.Prefix) {
	for a, claims := range m.addrs {
		if network.Contains(a) {
			for _, p := range claims {
				labels, ports := m.seen(p.Pod)
				m.identifyAt(p, a, labels, ports)
			}
		}
	}
}

func (m *Model) release(s *peers) {
	if s.refs--; s.refs > 0 {
		return
	}
	for id := range s.members {
		delete(id.of, s)
	}
	delete(m.selectors, s.key)
	delete(m.wide, s)
	delete(m.ofNodes, s)
	switch {
	case s.network.IsValid():
		delete(m.networks, s.network)
		m.identifyIn(s.network)
	case s.Namespace != "":
		drop(m.narrow, s.Namespace, s)
	}
}

// reclassify looks again which policies select the identities of a namespace.
func (m *Model) reclassify(namespace string) {
	for id := range m.within[namespace] {
		if id.own > 0 {
			m.classify(id)
		}
	}
}

// classify gives an identity the classes that it should have.
func (m *Model) classify(id *identity) {
	changed := false
	for _, d := range Directions {
		for _, of := range []*[2]*classState{&id.classes, &id.tiers} {
			c, was := m.classOf(id, d, of == &id.tiers), of[d]
			if c == was {
				continue
			}
			if c != nil {
				c.refs++
			}
			of[d] = c
			if was != nil {
				m.unref(was)
			}
			changed = true
		}
		if audited := id.own > 0 && m.audits(m.isolating(id, d)); audited != id.audited[d] {
			id.audited[d], changed = audited, true
		}
	}
	if changed {
		for h := range id.holders {
			m.touched[h.addr] = true
		}
	}
}

// classOf returns the class of an identity's pods on the node, or nil if no policy of the kind selects them or there are none.
func (m *Model) classOf(id *identity, d Direction, tiers bool) *classState {
	if id.own == 0 {
		return nil
	}
	policies, key, audit := m.isolating(id, d), []string{d.String()}, false
	if tiers {
		audit = m.audits(policies)
		policies, key = m.inTiers(id, d, len(policies) > 0 && !audit), append(key, "tiers")
		if audit {
			key = append(key, "audit")
		}
	}
	if len(policies) == 0 {
		return nil
	}
	names := false
	for _, p := range policies {
		key = append(key, p.String())
		names = names || d == Ingress && slices.ContainsFunc(p.Rules[d], func(r Rule) bool {
			return slices.ContainsFunc(r.Ports, func(p Port) bool { return p.Name != "" })
		})
	}
	var ports []PodPort
	if names {
		ports = id.ports
		key = append(key, identityKey("", nil, ports, nil))
	}
	joined := strings.Join(key, "\n")
	c := m.classes[joined]
	if c == nil {
		c = &classState{key: joined, number: cmp.Or(m.classNumbers.take(joined), closed), direction: d, tiers: tiers, audit: audit, ports: ports}
		delete(m.gone, c.number)
		m.classes[joined] = c
	}
	if !slices.Equal(c.policies, policies) { // it is new, or one of its policies has changed
		m.use(c, policies)
	}
	return c
}

// isolating returns the NetworkPolicies that isolate the pods of an identity in a direction, in order.
func (m *Model) isolating(id *identity, d Direction) (policies []*policyState) {
	for _, p := range m.inside[id.namespace] {
		if p.Isolates[d] && p.Subject.Matches(id.labels) {
			policies = append(policies, p)
		}
	}
	slices.SortFunc(policies, func(a, b *policyState) int { return a.Compare(b.ID) })
	return policies
}

// audits says that there are policies, and that all of them are audited, or their namespace is: none isolates.
func (m *Model) audits(policies []*policyState) bool {
	return len(policies) > 0 && !slices.ContainsFunc(policies, func(p *policyState) bool {
		return !p.Audit && !AuditLabel(m.namespaces[p.Namespace])
	})
}

// inTiers returns the policies of Admin and Baseline that have something to say of an identity in a direction, in the order in which they are
// asked. Where NetworkPolicies isolate it, those of Baseline are not.
func (m *Model) inTiers(id *identity, d Direction, isolated bool) (policies []*policyState) {
	for _, p := range m.tiers {
		if len(p.Rules[d]) > 0 && (p.Tier == Admin || !isolated) && p.Namespaces.Matches(m.namespaces[id.namespace]) && p.Subject.Matches(id.labels) {
			policies = append(policies, p)
		}
	}
	slices.SortFunc(policies, func(a, b *policyState) int {
		return cmp.Or(cmp.Compare(a.Tier, b.Tier), cmp.Compare(a.Priority, b.Priority), a.Compare(b.ID))
	})
	return policies
}

// use has a class made of policies.
func (m *Model) use(c *classState, policies []*policyState) {
	m.unuse(c)
	c.policies = policies
	for _, p := range policies {
		for _, list := range p.peers[c.direction] {
			for _, s := range list {
				if s != nil {
					s.users[c] = true
				}
			}
		}
	}
	m.dirty[c] = nil
}

func (m *Model) unuse(c *classState) {
	for _, p := range c.policies {
		for _, list := range p.peers[c.direction] {
			for _, s := range list {
				if s != nil {
					delete(s.users, c)
				}
			}
		}
	}
	c.policies = nil
}

func (m *Model) unref(c *classState) {
	if c.refs--; c.refs > 0 {
		return
	}
	m.unuse(c)
	delete(m.classes, c.key)
	delete(m.dirty, c)
	if c.number != closed { // which may be others', too
		m.classNumbers.give(c.number)
		m.gone[c.number] = true
	}
}
