package policy

import (
	"cmp"
	"slices"
	"strings"
)

// SetPolicy tells of a policy, which is not to be changed after.
func (m *Model) SetPolicy(p *Policy) {
	m.look(p, 1) // before the old one goes: what both look at stays
	m.removePolicy(p.ID)
	state := &policyState{Policy: p}
	for _, d := range Directions {
		for _, r := range p.Rules[d] {
			var list []*peers
			for _, peer := range r.Peers {
				var s *peers
				if peer.Pods != nil {
					s = m.acquire(*peer.Pods)
				}
				list = append(list, s)
			}
			if d == Egress && r.AnyPeer && slices.ContainsFunc(r.Ports, func(p Port) bool { return p.Name != "" }) {
				list = append(list, m.acquire(Pods{})) // whose ports have the name
			}
			state.peers[d] = append(state.peers[d], list)
		}
	}
	m.policies[p.ID] = state
	put(m.inside, p.Namespace, p.ID, state)
	m.reclassify(p.Namespace)
}

// DeletePolicy forgets a policy.
func (m *Model) DeletePolicy(id ID) {
	if m.removePolicy(id) {
		m.reclassify(id.Namespace)
	}
}

func (m *Model) removePolicy(id ID) bool {
	p := m.policies[id]
	if p == nil {
		return false
	}
	delete(m.policies, id)
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
	return true
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

// acquire returns the peers that a selector selects, which rules share.
func (m *Model) acquire(p Pods) *peers {
	key := p.String()
	s := m.selectors[key]
	if s == nil {
		s = &peers{Pods: p, key: key, members: map[*identity]bool{}, users: map[*classState]bool{}}
		m.selectors[key] = s
		if p.Namespace != "" {
			put(m.narrow, p.Namespace, s, true)
			for id := range m.within[p.Namespace] {
				m.setMember(s, id)
			}
		} else {
			m.wide[s] = true
			for _, id := range m.identities {
				m.setMember(s, id)
			}
		}
	}
	s.refs++
	return s
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
	if s.Namespace != "" {
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
		c := m.classOf(id, d)
		was := id.classes[d]
		if c == was {
			continue
		}
		if c != nil {
			c.refs++
		}
		id.classes[d] = c
		if was != nil {
			m.unref(was)
		}
		changed = true
	}
	if changed {
		for p := range id.pods {
			m.touch(p)
		}
	}
}

// classOf returns the class of an identity's pods on the node, or nil if they are not isolated or there are none.
func (m *Model) classOf(id *identity, d Direction) *classState {
	if id.own == 0 {
		return nil
	}
	policies := m.isolating(id, d)
	if len(policies) == 0 {
		return nil
	}
	key := []string{d.String()}
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
		key = append(key, identityKey("", nil, ports))
	}
	joined := strings.Join(key, "\n")
	c := m.classes[joined]
	if c == nil {
		c = &classState{key: joined, number: cmp.Or(m.classNumbers.take(joined), closed), direction: d, ports: ports}
		delete(m.gone, c.number)
		m.classes[joined] = c
	}
	if !slices.Equal(c.policies, policies) { // it is new, or one of its policies has changed
		m.use(c, policies)
	}
	return c
}

// isolating returns the policies that isolate the pods of an identity in a direction, in order.
func (m *Model) isolating(id *identity, d Direction) (policies []*policyState) {
	for _, p := range m.inside[id.namespace] {
		if p.Isolates[d] && p.Subject.Matches(id.labels) {
			policies = append(policies, p)
		}
	}
	slices.SortFunc(policies, func(a, b *policyState) int { return a.Compare(b.ID) })
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
	m.dirty[c] = true
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
