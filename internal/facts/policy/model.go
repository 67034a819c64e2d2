package policy

import (
	"cmp"
	"fmt"
	"hash/fnv"
	"maps"
	"net/netip"
	"reflect"
	"slices"
	"strings"

	"github.com/fathom-network/fathom/internal/facts/service"
)

// Model follows policies, namespaces and pods one by one, and tells what that changes in the Facts of a node. A change costs
// what it is about: a pod that comes is looked at by the selectors that can see it, and only classes that its identity is
// new to are compiled again. It is for one goroutine at a time.
type Model struct {
	node       string // whose pods are its own; everywhere says that all are
	everywhere bool

	namespaces map[string]map[string]string // labels
	pods       map[service.Name]*podState
	addrs      map[netip.Addr][]*podState // who says that it is his
	nodes      map[string]Node
	policies   map[ID]*policyState
	inside     map[string]map[ID]*policyState // NetworkPolicies by namespace
	tiers      map[ID]*policyState            // those of Admin and Baseline

	// What policies look at: keys of pods' labels, and names of ports. Each with how many do.
	labels, ports map[string]int

	identities map[string]*identity
	numbered   map[Number]*identity
	within     map[string]map[*identity]bool // identities by namespace
	selectors  map[string]*peers
	narrow     map[string]map[*peers]bool // selectors of one namespace, by its name
	wide       map[*peers]bool            // those of several
	networks   map[netip.Prefix]*peers    // those of addresses
	ofNodes    map[*peers]bool            // those of nodes
	classes    map[string]*classState

	identityNumbers, classNumbers numbers

	facts   Facts // as last told
	touched map[netip.Addr]bool
	// dirty are the classes that are to be compiled: with these identities, or, where that is nil, whole.
	dirty map[*classState]map[Number]bool
	gone  map[Number]bool // classes that are not there any more
	// narrowed is what Narrowed says.
	narrowed bool
}

// podState is a pod with what follows from it.
type podState struct {
	Pod
	own bool
	at  map[netip.Addr]*identity
}

// identity is what addresses of pods have in common that no policy tells apart: the namespace, of labels and named ports those that policies
// look at, and of the networks that rules of Admin and Baseline name those that the address is in.
type identity struct {
	key       string
	number    Number // 0 if there is none left
	namespace string
	labels    map[string]string
	ports     []PodPort
	networks  []netip.Prefix
	holders   map[holder]bool
	own       int             // how many holders are the node's
	classes   [2]*classState  // by direction; nil is not isolated, or without pods of the node
	tiers     [2]*classState  // the same, of policies of Admin and Baseline
	audited   [2]bool         // as Address.Audited
	of        map[*peers]bool // selectors that select it
}

// holder is an address of a pod.
type holder struct {
	*podState
	addr netip.Addr
}

// peers are the identities that a selector of peers selects, which many rules may share. If network is valid, it selects the addresses in it,
// and if nodes is not nil, those of nodes; else pods.
type peers struct {
	Pods
	network netip.Prefix
	nodes   *Selector
	key     string
	refs    int // of rules
	members map[*identity]bool
	users   map[*classState]bool // that are made of it
}

// policyState is a policy with the selectors of its rules' peers.
type policyState struct {
	*Policy
	peers [2][][]*peers // by direction, rule and peer; nil for a NetworkPolicy's block
}

// classState is a Class that is being made.
type classState struct {
	key       string
	number    Number
	direction Direction
	tiers     bool // made of policies of Admin and Baseline
	audit     bool // of tiers, whose pods audited NetworkPolicies are asked about last
	policies  []*policyState
	ports     []PodPort // of the destination, if a rule names one
	refs      int       // of identities
}

// NewModel returns a Model of the facts of a node.
func NewModel(node string) *Model {
	return &Model{
		node:       node,
		namespaces: map[string]map[string]string{}, pods: map[service.Name]*podState{}, addrs: map[netip.Addr][]*podState{},
		nodes: map[string]Node{}, policies: map[ID]*policyState{}, inside: map[string]map[ID]*policyState{}, tiers: map[ID]*policyState{}, labels: map[string]int{}, ports: map[string]int{},
		identities: map[string]*identity{}, numbered: map[Number]*identity{}, within: map[string]map[*identity]bool{},
		selectors: map[string]*peers{}, narrow: map[string]map[*peers]bool{}, wide: map[*peers]bool{},
		networks: map[netip.Prefix]*peers{}, ofNodes: map[*peers]bool{}, classes: map[string]*classState{},
		identityNumbers: newNumbers(), classNumbers: newNumbers(),
		facts:   Facts{Addrs: map[netip.Addr]Address{}, Classes: map[Number]*Class{}},
		touched: map[netip.Addr]bool{}, dirty: map[*classState]map[Number]bool{}, gone: map[Number]bool{},
	}
}

// NewClusterModel returns a Model of facts in which the pods of all nodes are own ones.
func NewClusterModel() *Model {
	m := NewModel("")
	m.everywhere = true
	return m
}

// numbers are those that are taken, of as many as there are.
type numbers struct {
	taken map[Number]bool
	all   uint32
}

// closed is the class of pods for whose class there is no number left: it allows nothing.
const closed Number = 1<<16 - 1

// Unnumbered is the identity of pods for whose identity there is no number left: no selector selects it, and who is under a policy of Admin or
// Baseline neither sends to it nor hears it, whatever the policy says.
const Unnumbered Number = 1<<16 - 1

func newNumbers() numbers { return numbers{map[Number]bool{}, uint32(closed) - 1} }

// take returns a number that is free, or 0. It is nearly always the same for the same key, so that an agent that starts finds in the
// kernel the numbers that it would give.
func (n numbers) take(key string) Number {
	if len(n.taken) >= int(n.all) {
		return 0
	}
	h := fnv.New32a()
	h.Write([]byte(key))
	for i := h.Sum32() % n.all; ; i = (i + 1) % n.all {
		if x := Number(i + 1); !n.taken[x] {
			n.taken[x] = true
			return x
		}
	}
}

func (n numbers) give(x Number) { delete(n.taken, x) }

// SetNamespace tells the labels of a namespace.
func (m *Model) SetNamespace(name string, labels map[string]string) {
	if was, known := m.namespaces[name]; known && maps.Equal(was, labels) {
		return
	}
	audit, isAudit := AuditLabel(m.namespaces[name]), AuditLabel(labels)
	m.namespaces[name] = labels
	m.renewMembers(name, audit != isAudit)
}

// DeleteNamespace forgets a namespace.
func (m *Model) DeleteNamespace(name string) {
	audit := AuditLabel(m.namespaces[name])
	delete(m.namespaces, name)
	m.renewMembers(name, audit)
}

// renewMembers looks again which selectors select the identities of a namespace, and which policies, or what these do.
func (m *Model) renewMembers(namespace string, audit bool) {
	for id := range m.within[namespace] {
		for s := range m.wide {
			m.setMember(s, id)
		}
	}
	if audit || len(m.tiers) > 0 {
		m.reclassify(namespace)
	}
}

// SetNode tells of a node.
func (m *Model) SetNode(n Node) {
	was := m.nodes[n.Name]
	if reflect.DeepEqual(was, n) {
		return
	}
	m.nodes[n.Name] = n
	m.renewNode(was, n)
}

// DeleteNode forgets a node.
func (m *Model) DeleteNode(name string) {
	was := m.nodes[name]
	delete(m.nodes, name)
	m.renewNode(was, Node{})
}

func (m *Model) renewNode(was, is Node) {
	for s := range m.ofNodes {
		if s.nodes.Matches(was.Labels) || s.nodes.Matches(is.Labels) {
			for c := range s.users {
				m.dirty[c] = nil
			}
		}
	}
}

// LooksAtNodes says whether a policy is about nodes: otherwise they need not be told.
func (m *Model) LooksAtNodes() bool { return len(m.ofNodes) > 0 }

// SetPod tells of a pod, which the Model then has.
func (m *Model) SetPod(p Pod) {
	state, own := m.pods[p.Name], m.everywhere || p.Node == m.node
	switch {
	case state != nil && reflect.DeepEqual(state.Pod, p):
		return
	case state != nil && state.own != own:
		m.DeletePod(p.Name)
		state = nil
	case state != nil:
		m.unclaim(state)
	}
	if state == nil {
		state = &podState{own: own, at: map[netip.Addr]*identity{}}
		m.pods[p.Name] = state
	}
	state.Pod = p
	for _, a := range p.Addrs {
		m.addrs[a] = append(m.addrs[a], state)
	}
	m.touch(state)
	m.identify(state)
	for a := range state.at {
		if !slices.Contains(p.Addrs, a) {
			m.leave(state, a)
		}
	}
}

// DeletePod forgets a pod: one that is gone, or whose containers do not run any more, so that another may have its address.
func (m *Model) DeletePod(name service.Name) {
	p := m.pods[name]
	if p == nil {
		return
	}
	delete(m.pods, name)
	m.unclaim(p)
	for a := range p.at {
		m.leave(p, a)
	}
}

// unclaim takes its addresses from a pod.
func (m *Model) unclaim(p *podState) {
	m.touch(p)
	for _, a := range p.Addrs {
		m.addrs[a] = slices.DeleteFunc(m.addrs[a], func(o *podState) bool { return o == p })
		if len(m.addrs[a]) == 0 {
			delete(m.addrs, a)
		}
	}
}

// identify gives the addresses of a pod the identities that they should have.
func (m *Model) identify(p *podState) {
	labels, ports := m.seen(p.Pod)
	for _, a := range p.Addrs {
		m.identifyAt(p, a, labels, ports)
	}
}

func (m *Model) identifyAt(p *podState, a netip.Addr, labels map[string]string, ports []PodPort) {
	networks := m.networksOf(a)
	key := identityKey(p.Namespace, labels, ports, networks)
	if p.at[a] != nil && p.at[a].key == key {
		return
	}
	id := m.identities[key]
	if id == nil {
		id = &identity{key: key, number: m.identityNumbers.take(key), namespace: p.Namespace, labels: labels, ports: ports, networks: networks,
			holders: map[holder]bool{}, of: map[*peers]bool{}}
		m.identities[key] = id
		if id.number != 0 {
			m.numbered[id.number] = id
		}
		put(m.within, p.Namespace, id, true)
		for s := range m.wide {
			m.setMember(s, id)
		}
		for s := range m.narrow[p.Namespace] {
			m.setMember(s, id)
		}
		for _, n := range networks {
			m.setMember(m.networks[n], id)
		}
	}
	m.leave(p, a)
	p.at[a] = id
	id.holders[holder{p, a}] = true
	if p.own {
		if id.own++; id.own == 1 {
			m.classify(id)
		}
	}
	m.touched[a] = true
}

// networksOf returns the networks that rules name and an address is in.
func (m *Model) networksOf(a netip.Addr) (list []netip.Prefix) {
	for bits := 0; len(m.networks) > 0 && bits <= a.BitLen(); bits++ {
		if p, err := a.Prefix(bits); err == nil && m.networks[p] != nil {
			list = append(list, p)
		}
	}
	return list
}

// leave takes an address of a pod out of its identity, which goes with its last one.
func (m *Model) leave(p *podState, a netip.Addr) {
	id := p.at[a]
	if id == nil {
		return
	}
	delete(p.at, a)
	delete(id.holders, holder{p, a})
	if p.own {
		if id.own--; id.own == 0 {
			m.classify(id)
		}
	}
	if len(id.holders) > 0 {
		return
	}
	for s := range id.of {
		m.removeMember(s, id)
	}
	delete(m.identities, id.key)
	drop(m.within, id.namespace, id)
	delete(m.numbered, id.number)
	m.identityNumbers.give(id.number)
}

func (m *Model) touch(p *podState) {
	for _, a := range p.Addrs {
		m.touched[a] = true
	}
}

// seen returns what policies look at of a pod.
func (m *Model) seen(p Pod) (labels map[string]string, ports []PodPort) {
	labels = map[string]string{}
	for k, v := range p.Labels {
		if m.labels[k] > 0 {
			labels[k] = v
		}
	}
	for _, q := range p.Ports {
		if m.ports[q.Name] > 0 {
			ports = append(ports, q)
		}
	}
	slices.SortFunc(ports, comparePodPorts)
	return labels, slices.Compact(ports)
}

func comparePodPorts(a, b PodPort) int {
	if c := strings.Compare(a.Name, b.Name); c != 0 {
		return c
	}
	return Grant{Protocol: a.Protocol, From: a.Number}.compare(Grant{Protocol: b.Protocol, From: b.Number})
}

func identityKey(namespace string, labels map[string]string, ports []PodPort, networks []netip.Prefix) string {
	var b strings.Builder
	b.WriteString(namespace)
	for _, k := range slices.Sorted(maps.Keys(labels)) {
		fmt.Fprintf(&b, " %s=%s", k, labels[k]) // none of them has spaces
	}
	for _, p := range ports {
		fmt.Fprintf(&b, " %s:%d/%d", p.Name, p.Number, p.Protocol)
	}
	for _, n := range networks {
		fmt.Fprintf(&b, " in:%s", n)
	}
	return b.String()
}

// setMember makes an identity one of a selector's, if it is, or none of them.
func (m *Model) setMember(s *peers, id *identity) {
	is := s.network.IsValid() && slices.Contains(id.networks, s.network) ||
		!s.network.IsValid() && (s.Namespace == id.namespace || s.Namespace == "" && s.Namespaces.Matches(m.namespaces[id.namespace])) && s.Pods.Pods.Matches(id.labels)
	if is == s.members[id] {
		return
	}
	if !is {
		m.removeMember(s, id)
		return
	}
	s.members[id], id.of[s] = true, true
	m.dirtyWith(s, id)
}

func (m *Model) removeMember(s *peers, id *identity) {
	delete(s.members, id)
	delete(id.of, s)
	m.dirtyWith(s, id)
}

// dirtyWith has the classes that are made of a selector compiled again with an identity.
func (m *Model) dirtyWith(s *peers, id *identity) {
	for c := range s.users {
		with, is := m.dirty[c]
		if !is {
			with = map[Number]bool{}
			m.dirty[c] = with
		}
		if with != nil {
			with[id.number] = true
		}
	}
}

// Changes returns what has changed in the Facts since it was called last: addresses that nobody has any more have the zero value,
// and classes that are gone are nil.
func (m *Model) Changes() Facts {
	m.narrowed = false
	f := Facts{Addrs: map[netip.Addr]Address{}, Classes: map[Number]*Class{}}
	for n := range m.gone {
		f.Classes[n] = nil
		delete(m.facts.Classes, n)
	}
	for c, with := range m.dirty { // a number may be another's by now
		was := m.facts.Classes[c.number]
		var is *Class
		if with == nil || was == nil || c.tiers || c.number == closed {
			is = m.compile(c)
		} else {
			is = m.compileWith(c, was, with)
		}
		if was == nil || !was.equal(is) {
			f.Classes[c.number], m.facts.Classes[c.number] = is, is
			m.narrowed = m.narrowed || was != nil
		}
	}
	for a := range m.touched {
		is := m.address(a)
		was := m.facts.Addrs[a]
		if was == is {
			continue
		}
		m.narrowed = m.narrowed || was != Address{} && is != Address{}
		f.Addrs[a], m.facts.Addrs[a] = is, is
		if is == (Address{}) {
			delete(m.facts.Addrs, a)
		}
	}
	clear(m.gone)
	clear(m.dirty)
	clear(m.touched)
	return f
}

// Narrowed says that what Changes returned last may forbid, or allow again, connections that are there. It does not where pods only came
// and went.
func (m *Model) Narrowed() bool { return m.narrowed }

// claimant returns whose an address is, nil if it is no pod's. Where two pods say that it is theirs, it is that of the one that was made
// last: the API hears late of one that has ended.
func (m *Model) claimant(a netip.Addr) *podState {
	claims := m.addrs[a]
	if len(claims) == 0 {
		return nil
	}
	return slices.MaxFunc(claims, func(a, b *podState) int {
		return cmp.Or(cmp.Compare(a.Created, b.Created), a.Compare(b.Name))
	})
}

// address returns what follows for an address.
func (m *Model) address(a netip.Addr) (is Address) {
	p := m.claimant(a)
	if p == nil {
		return is
	}
	id := p.at[a]
	is.Peer, is.Of, is.Own = cmp.Or(id.number, Unnumbered), id.key, p.own
	if !p.own {
		return is
	}
	is.Pod = p.Name
	for _, d := range Directions {
		if c := id.classes[d]; c != nil {
			is.Isolated[d], is.Audited[d] = c.number, id.audited[d]
		}
		if c := id.tiers[d]; c != nil && c.number == closed {
			is.Isolated[d], is.Audited[d] = closed, false
		} else if c != nil {
			is.Tiers[d] = c.number
		}
	}
	return is
}

// Facts returns all facts, with those that Changes has not told yet, which it then will not. They are the Model's, and change with
// the next call of either.
func (m *Model) Facts() Facts {
	m.Changes()
	return m.facts
}

// Identities returns what each number of an identity stands for, "shop app=web http:8080/6".
func (m *Model) Identities() map[Number]string {
	all := map[Number]string{}
	for key, id := range m.identities {
		all[id.number] = key
	}
	return all
}

// Problems returns what is wrong with policies, by policy.
func (m *Model) Problems() map[ID][]string {
	all := map[ID][]string{}
	for id, p := range m.policies {
		if len(p.Problems) > 0 {
			all[id] = p.Problems
		}
	}
	return all
}

func put[K, L comparable, V any](in map[K]map[L]V, k K, l L, v V) {
	if in[k] == nil {
		in[k] = map[L]V{}
	}
	in[k][l] = v
}

func drop[K, L comparable, V any](in map[K]map[L]V, k K, l L) {
	delete(in[k], l)
	if len(in[k]) == 0 {
		delete(in, k)
	}
}

// Size is how much there is of what a Model keeps.
type Size struct {
	Policies, Namespaces, Pods     int
	Nodes                          int // if policies look at them
	Identities, Selectors, Classes int
	Keys                           int // of labels, and names of ports, that policies look at
}

// Size returns how much there is.
func (m *Model) Size() Size {
	return Size{len(m.policies), len(m.namespaces), len(m.pods), len(m.nodes), len(m.identities), len(m.selectors), len(m.classes), len(m.labels) + len(m.ports)}
}
