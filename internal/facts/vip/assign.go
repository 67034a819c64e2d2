package vip

import (
	"cmp"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"

	"github.com/fathom-network/fathom/internal/facts/inet"
	"github.com/fathom-network/fathom/internal/facts/service"
)

// Assignment is the result for a Service of type LoadBalancer.
type Assignment struct {
	Service   service.Name
	Addresses []netip.Addr // at most one of each family, in the order of the Service's families
	Pools     []string     // of the addresses
	// Reason and Text say why there is no address, or none of one family, and what to do; empty if all is well.
	Reason, Text string
}

// The reasons why a Service has no address.
const (
	NoPool         = "NoAddressPool"
	PoolExhausted  = "AddressPoolExhausted"
	InvalidRequest = "InvalidAddressRequest"
	AddressInUse   = "AddressInUse"
)

// Ours reports whether a Service gets its addresses from the pools. One that is being deleted no longer does.
func Ours(s *corev1.Service) bool {
	return s.DeletionTimestamp == nil && s.Spec.Type == corev1.ServiceTypeLoadBalancer && (s.Spec.LoadBalancerClass == nil || *s.Spec.LoadBalancerClass == Class)
}

// Finalizer keeps a Service with addresses until they are taken back. All controllers that assign load balancers' addresses
// use it: https://kubernetes.io/docs/tasks/access-application-cluster/create-external-load-balancer/
const Finalizer = "service.kubernetes.io/load-balancer-cleanup"

// Finalizers returns a Service's finalizers with or without addresses of ours.
func Finalizers(s *corev1.Service, addresses bool) []string {
	list := slices.DeleteFunc(slices.Clone(s.Finalizers), func(f string) bool { return f == Finalizer })
	if addresses {
		list = append(list, Finalizer)
	}
	return list
}

// Wrote reports whether this controller wrote a Service's status.
func Wrote(s *corev1.Service) bool {
	return (len(s.Status.LoadBalancer.Ingress) > 0 || slices.Contains(s.Finalizers, Finalizer)) && slices.ContainsFunc(s.ManagedFields, func(e metav1.ManagedFieldsEntry) bool {
		return e.Manager == Owner && e.Subresource == "status"
	})
}

// Ingress returns the status of a Service with these addresses.
func Ingress(addrs []netip.Addr) []corev1.LoadBalancerIngress {
	var list []corev1.LoadBalancerIngress
	for _, a := range addrs {
		mode := corev1.LoadBalancerIPModeVIP
		list = append(list, corev1.LoadBalancerIngress{IP: a.String(), IPMode: &mode})
	}
	return list
}

// Assign decides which addresses Services have: first those that they have, as long as they may keep them; then those that
// they request; then free ones; the oldest Service first. It leaves out Services that are not ours. namespaces maps names
// to labels; the Services of an unknown namespace keep what they have.
func (p Pools) Assign(services []*corev1.Service, namespaces map[string]labels.Set) []Assignment {
	var claims []*claim
	for _, s := range services {
		if Ours(s) {
			claims = append(claims, readClaim(s))
		}
	}
	slices.SortFunc(claims, func(x, y *claim) int {
		return cmp.Or(x.service.CreationTimestamp.Compare(y.service.CreationTimestamp.Time), strings.Compare(x.name.Namespace, y.name.Namespace),
			strings.Compare(x.name.Name, y.name.Name))
	})
	// A Service that needs both families and gets only one would block others while it waits for the second. That is found
	// out in one round, and the Service is left out of the next.
	for out := map[*claim]bool{}; ; {
		a := assigner{pools: p, namespaces: namespaces, users: map[netip.Addr][]*claim{}, groups: map[string][]netip.Addr{}, next: map[Range]netip.Addr{}}
		if !a.run(claims, out) {
			break
		}
	}
	list := make([]Assignment, 0, len(claims))
	for _, c := range claims {
		list = append(list, c.assignment(p))
	}
	return list
}

// run is a round. It reports whether there has to be another, without the Service that it added to those left out.
func (a *assigner) run(claims []*claim, out map[*claim]bool) (again bool) {
	in := slices.DeleteFunc(slices.Clone(claims), func(c *claim) bool { return out[c] })
	for _, c := range in {
		clear(c.has)
		c.reason, c.text = c.wrong, c.wrongText
		a.keep(c) // also of those who ask for nonsense
	}
	for _, step := range []func(*claim){a.request, a.choose} {
		for _, c := range in {
			if c.reason == "" {
				step(c)
			}
			if c.reason != "" && len(c.has) > 0 && c.needsAll() {
				clear(c.has)
				out[c] = true
				return true // one at a time: without this one, the next may fit
			}
		}
	}
	return false
}

// assigner is one run of Assign.
type assigner struct {
	pools      Pools
	namespaces map[string]labels.Set
	users      map[netip.Addr][]*claim
	groups     map[string][]netip.Addr // of those who share
	next       map[Range]netip.Addr    // before it nothing is free
}

// claim is what a Service requests and gets.
type claim struct {
	service  *corev1.Service
	name     service.Name
	families []corev1.IPFamily
	wants    map[corev1.IPFamily]netip.Addr
	share    string // empty shares with nobody
	has      map[corev1.IPFamily]netip.Addr
	// Why there is no address, or not all; set from the beginning for a Service that cannot be parsed.
	reason, text     string
	wrong, wrongText string
}

func readClaim(s *corev1.Service) *claim {
	c := &claim{service: s, name: service.Name{Namespace: s.Namespace, Name: s.Name}, families: s.Spec.IPFamilies,
		wants: map[corev1.IPFamily]netip.Addr{}, has: map[corev1.IPFamily]netip.Addr{}}
	if len(c.families) == 0 {
		c.families = []corev1.IPFamily{corev1.IPv4Protocol}
		if addr, err := netip.ParseAddr(s.Spec.ClusterIP); err == nil && addr.Is6() {
			c.families[0] = corev1.IPv6Protocol
		}
	}
	if key := s.Annotations[ShareAnnotation]; key != "" {
		c.share = s.Namespace + "/" + key
	}
	ask := func(field, text string) {
		for word := range strings.SplitSeq(text, ",") {
			word = strings.TrimSpace(word)
			if word == "" {
				continue
			}
			// As in the rest of the API: `010.0.0.8` is 10.0.0.8, which the API server of 1.36 only warns about in
			// loadBalancerIP.
			addr, err := inet.ParseAddr(word)
			if err != nil {
				c.deny(InvalidRequest, "%s: %q is no address: write something like 192.0.2.20, or one of each family with a comma between", field, word)
				return
			}
			if have, found := c.wants[familyOf(addr)]; found && have != addr {
				c.deny(InvalidRequest, "%s asks for %s, and %s is asked for already: a Service has one address of a family", field, addr, have)
				return
			}
			if !slices.Contains(c.families, familyOf(addr)) {
				c.deny(InvalidRequest, "%s asks for %s, and the Service has no %s: change ipFamilies and ipFamilyPolicy, or the address", field, addr, familyOf(addr))
				return
			}
			c.wants[familyOf(addr)] = addr
		}
	}
	ask("annotation "+AddressAnnotation, s.Annotations[AddressAnnotation])
	ask("spec.loadBalancerIP", s.Spec.LoadBalancerIP)
	c.wrong, c.wrongText = c.reason, c.text
	return c
}

// deny records why there is no address. The first reason stays.
func (c *claim) deny(reason, format string, args ...any) {
	if c.reason == "" {
		c.reason, c.text = reason, fmt.Sprintf(format, args...)
	}
}

// assignment returns the result of a claim.
func (c *claim) assignment(p Pools) Assignment {
	a := Assignment{Service: c.name, Reason: c.reason, Text: c.text}
	for _, f := range c.families {
		if addr, found := c.has[f]; found {
			a.Addresses = append(a.Addresses, addr)
			a.Pools = append(a.Pools, p.Of(addr).Name)
		}
	}
	return a
}

// keep lets a Service keep the addresses in its status, unless they are not allowed any more.
func (a *assigner) keep(c *claim) {
	for _, in := range c.service.Status.LoadBalancer.Ingress {
		addr, err := netip.ParseAddr(in.IP)
		if err != nil {
			continue
		}
		addr = addr.Unmap()
		f := familyOf(addr)
		pool := a.pools.Of(addr)
		want, asked := c.wants[f]
		_, has := c.has[f]
		switch {
		case has, asked && want != addr, !slices.Contains(c.families, f), pool == nil, pool.taken[addr]:
		case a.admits(pool, c) == "" && a.held(addr, c) == "":
			a.give(c, addr)
		}
	}
}

// request gives a Service the address that it names.
func (a *assigner) request(c *claim) {
	for _, f := range c.families {
		want, asked := c.wants[f]
		if _, has := c.has[f]; has || !asked {
			continue
		}
		pool := a.pools.Of(want)
		switch {
		case len(a.pools) == 0:
			c.deny(NoPool, noPoolText)
		case pool == nil:
			c.deny(InvalidRequest, "%s is of no AddressPool: ask for an address of one (kubectl get addresspools), or add it to one", want)
		case pool.Problem != nil:
			c.deny(NoPool, "%s is of AddressPool %s, which cannot be used: %s", want, pool.Name, pool.Problem)
		case pool.taken[want]:
			c.deny(AddressInUse, "%s is a node's own address: ask for another", want)
		default:
			if why := cmp.Or(a.admits(pool, c), a.held(want, c)); why != "" {
				c.deny(AddressInUse, "%s: %s", want, why)
				continue
			}
			a.give(c, want)
		}
	}
}

const noPoolText = "there is no AddressPool to take an address from: create one (docs/load-balancer.md), or reach the Service by its NodePort"

// needsAll reports whether a Service needs addresses of all its families or none.
func (c *claim) needsAll() bool {
	return c.service.Spec.IPFamilyPolicy != nil && *c.service.Spec.IPFamilyPolicy == corev1.IPFamilyPolicyRequireDualStack
}

// choose gives a Service free addresses, from one pool if possible.
func (a *assigner) choose(c *claim) {
	var missing []corev1.IPFamily
	for _, f := range c.families {
		if _, has := c.has[f]; !has {
			missing = append(missing, f)
		}
	}
	if len(missing) == 0 {
		return
	}
	pools := a.candidates(c)
	if c.reason != "" {
		return
	}
	// The pool that has all of them before one that has some.
	whole := slices.IndexFunc(pools, func(p *Pool) bool {
		return !slices.ContainsFunc(missing, func(f corev1.IPFamily) bool { _, found := a.find(p, c, f); return !found })
	})
	if whole > 0 {
		pools = append([]*Pool{pools[whole]}, slices.Delete(slices.Clone(pools), whole, whole+1)...)
	}
	for _, f := range missing {
		a.chooseOne(c, f, pools)
	}
}

func (a *assigner) chooseOne(c *claim, f corev1.IPFamily, pools []*Pool) {
	names := []string{}
	for _, p := range pools {
		if !p.hasFamily(f) {
			continue
		}
		if addr, found := a.find(p, c, f); found {
			a.give(c, addr)
			return
		}
		names = append(names, p.Name)
	}
	apart := a.notShared(c, f, names)
	prefer := c.service.Spec.IPFamilyPolicy != nil && *c.service.Spec.IPFamilyPolicy == corev1.IPFamilyPolicyPreferDualStack
	switch {
	case apart != "":
		c.deny(AddressInUse, "%s; and no other %s address is free in AddressPool %s", apart, f, strings.Join(names, ", "))
	case len(names) > 0:
		c.deny(PoolExhausted, "no %s address is free in AddressPool %s: add addresses to it, delete Services that are not needed, or let Services share (annotation %s)",
			f, strings.Join(names, ", "), ShareAnnotation)
	case prefer && (len(c.has) > 0 || f != c.families[len(c.families)-1]):
		// One of the two was requested.
	default:
		c.deny(NoPool, "no AddressPool that this Service may use has %s addresses: add some to one, or change the Service's ipFamilies", f)
	}
}

// notShared says why a Service cannot share the address of those with the same key, in one of the pools; empty if it can. A
// user who wants to share needs to know that: adding addresses would only give the Service one of its own.
func (a *assigner) notShared(c *claim, f corev1.IPFamily, pools []string) string {
	for _, addr := range a.groups[c.share] { // nobody's if there is no key
		if pool := a.pools.Of(addr); familyOf(addr) == f && pool != nil && slices.Contains(pools, pool.Name) {
			return fmt.Sprintf("it cannot share %s: %s", addr, a.held(addr, c))
		}
	}
	return ""
}

// candidates returns the pools that a Service may get an address from without naming it, those for some Services only
// first; or the one that it names.
func (a *assigner) candidates(c *claim) []*Pool {
	named := c.service.Annotations[PoolAnnotation]
	var list []*Pool
	var refusals []string
	for i := range a.pools {
		p := &a.pools[i]
		if named != "" && p.Name != named {
			continue
		}
		why := a.admits(p, c)
		switch {
		case why == "" && p.Problem != nil:
			why = fmt.Sprintf("AddressPool %s cannot be used: %s", p.Name, p.Problem)
		case why == "" && named == "" && !p.AutoAssign:
			why = fmt.Sprintf("AddressPool %s is for Services that name it (annotation %s)", p.Name, PoolAnnotation)
		}
		if why != "" {
			refusals = append(refusals, why)
			continue
		}
		list = append(list, p)
	}
	switch {
	case len(list) > 0:
	case len(a.pools) == 0:
		c.deny(NoPool, noPoolText)
	case named != "" && len(refusals) == 0:
		c.deny(InvalidRequest, "there is no AddressPool %s, which annotation %s names: create it, or change the annotation", named, PoolAnnotation)
	default:
		const most = 3
		if len(refusals) > most {
			refusals = append(refusals[:most], fmt.Sprintf("and %d more", len(refusals)-most))
		}
		c.deny(NoPool, "no AddressPool is for this Service: %s", strings.Join(refusals, "; "))
	}
	slices.SortStableFunc(list, func(x, y *Pool) int {
		switch {
		case x.selects == y.selects:
			return 0
		case x.selects:
			return -1
		}
		return 1
	})
	return list
}

// admits says why a Service may not have an address of a pool; empty if it may.
func (a *assigner) admits(p *Pool, c *claim) string {
	if named := c.service.Annotations[PoolAnnotation]; named != "" && named != p.Name {
		return fmt.Sprintf("it is of AddressPool %s, and annotation %s names %s", p.Name, PoolAnnotation, named)
	}
	// While a namespace is unknown, its Services keep their addresses, and get none from pools for some Services only.
	if set, known := a.namespaces[c.name.Namespace]; !p.namespaces.Matches(set) && (known || len(c.service.Status.LoadBalancer.Ingress) == 0) {
		return fmt.Sprintf("AddressPool %s is not for namespace %s (spec.namespaceSelector)", p.Name, c.name.Namespace)
	}
	if !p.services.Matches(labels.Set(c.service.Labels)) {
		return fmt.Sprintf("AddressPool %s is not for Services with these labels (spec.serviceSelector)", p.Name)
	}
	return ""
}

// held says which Service has an address and cannot share it; empty if there is none.
func (a *assigner) held(addr netip.Addr, c *claim) string {
	for _, other := range a.users[addr] {
		if why := c.apart(other); why != "" {
			return fmt.Sprintf("Service %s has it%s", other.name, why)
		}
	}
	return ""
}

// apart says why two Services cannot share an address, as the end of a sentence; empty if they can.
func (c *claim) apart(o *claim) string {
	switch {
	case c.share == "" || c.share != o.share:
		return fmt.Sprintf(": ask for another address, or give both the same annotation %s, in one namespace", ShareAnnotation)
	case local(c.service) != local(o.service):
		return ", and another externalTrafficPolicy: those who share an address have the same"
	case local(c.service) && !samePods(c.service, o.service):
		return ", and other pods (spec.selector): who comes to an address meets one node for all who share it, and with externalTrafficPolicy Local that node needs a pod of each"
	}
	for _, p := range c.service.Spec.Ports {
		for _, q := range o.service.Spec.Ports {
			if p.Port == q.Port && cmp.Or(p.Protocol, corev1.ProtocolTCP) == cmp.Or(q.Protocol, corev1.ProtocolTCP) {
				return fmt.Sprintf(", and port %d/%s, too: those who share an address have different ports", p.Port, cmp.Or(p.Protocol, corev1.ProtocolTCP))
			}
		}
	}
	return ""
}

// samePods says whether two Services have the same endpoints by construction, so that a node that has one of a Service's has
// one of the other's. Who writes EndpointSlices without a selector may write anything.
func samePods(s, o *corev1.Service) bool {
	return len(s.Spec.Selector) > 0 && maps.Equal(s.Spec.Selector, o.Spec.Selector) &&
		s.Spec.PublishNotReadyAddresses == o.Spec.PublishNotReadyAddresses
}

func local(s *corev1.Service) bool {
	return s.Spec.ExternalTrafficPolicy == corev1.ServiceExternalTrafficPolicyLocal
}

func (a *assigner) give(c *claim, addr netip.Addr) {
	c.has[familyOf(addr)] = addr
	a.users[addr] = append(a.users[addr], c)
	if c.share != "" && !slices.Contains(a.groups[c.share], addr) {
		a.groups[c.share] = append(a.groups[c.share], addr)
	}
}

// find looks for an address of a pool: one of others with the same key, or a free one.
func (a *assigner) find(p *Pool, c *claim, f corev1.IPFamily) (netip.Addr, bool) {
	for _, addr := range a.groups[c.share] {
		if c.share != "" && familyOf(addr) == f && a.pools.Of(addr) == p && a.held(addr, c) == "" {
			return addr, true
		}
	}
	for _, r := range p.Ranges {
		if familyOf(r.First) != f {
			continue
		}
		addr, begun := a.next[r]
		if !begun {
			addr = r.First
		}
		for ; addr.IsValid() && r.Contains(addr); addr = addr.Next() {
			if len(a.users[addr]) == 0 && !p.taken[addr] && (r.First == r.Last || !awkward(addr)) {
				break
			}
		}
		a.next[r] = addr
		if addr.IsValid() && r.Contains(addr) {
			return addr, true
		}
	}
	return netip.Addr{}, false
}

// awkward reports whether some routers or clients may treat an address as a network's own or its broadcast address.
// Services that want one have to request it.
func awkward(a netip.Addr) bool {
	b := a.AsSlice()
	if a.Is4() {
		return b[3] == 0 || b[3] == 255
	}
	return slices.Max(b[8:]) == 0
}
