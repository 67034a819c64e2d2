package topology

import (
	"fmt"
	"net/netip"
	"strconv"
	"strings"
)

// The default ranges. Two clusters may have the same ones, as they often do outside a lab.
var (
	defaultPods = map[Family]netip.Prefix{
		IPv4: netip.MustParsePrefix("10.244.0.0/16"),
		IPv6: netip.MustParsePrefix("fd00:10:244::/56"),
	}
	defaultServices = map[Family]netip.Prefix{
		IPv4: netip.MustParsePrefix("10.96.0.0/16"),
		IPv6: netip.MustParsePrefix("fd00:10:96::/112"),
	}
	defaultMasks = map[Family]int{IPv4: 24, IPv6: 64}
)

// What Kubernetes permits. kube-apiserver wants Service ranges of at most 20 bits; the shortest range
// still holds the DNS Service, which has address number 10. kube-controller-manager wants at most 16 bits
// between podCIDR and a node's block. A node's block has room for a gateway and a few pods.
var (
	serviceBits    = map[Family][2]int{IPv4: {12, 28}, IPv6: {108, 124}}
	longestMask    = map[Family]int{IPv4: 29, IPv6: 124}
	maxMaskBits    = 16
	reservedRanges = []struct {
		prefix netip.Prefix
		use    string
	}{
		{netip.MustParsePrefix("0.0.0.0/8"), "this network"},
		{netip.MustParsePrefix("127.0.0.0/8"), "loopback"},
		{netip.MustParsePrefix("169.254.0.0/16"), "link-local addresses"},
		{netip.MustParsePrefix("224.0.0.0/3"), "multicast and experiments"},
		{netip.MustParsePrefix("::/8"), "loopback and mapped addresses"},
		{netip.MustParsePrefix("fe80::/10"), "link-local addresses"},
		{netip.MustParsePrefix("ff00::/8"), "multicast"},
	}
)

func familyOf(p netip.Prefix) Family {
	if p.Addr().Is4() {
		return IPv4
	}
	return IPv6
}

// title writes a family in a sentence.
func (f Family) title() string {
	if f == IPv4 {
		return "IPv4"
	}
	return "IPv6"
}

func familiesOf(prefixes []netip.Prefix) []Family {
	var families []Family
	for _, p := range prefixes {
		families = append(families, familyOf(p))
	}
	return families
}

// prefix reads one prefix; example is one that would be right.
func (b *builder) prefix(at source, s, example string) (netip.Prefix, bool) {
	p, err := netip.ParsePrefix(s)
	switch {
	case err != nil:
		b.add(at, s, "not a prefix; want something like %s", example)
		return p, false
	case p.Addr().Is4In6():
		b.add(at, s, "IPv4 written as IPv6; want something like %s", example)
		return p, false
	case p != p.Masked():
		b.add(at, s, "host bits are set; want %s", p.Masked())
		return p, false
	}
	for _, r := range reservedRanges {
		if p.Overlaps(r.prefix) {
			b.add(at, s, "overlaps %s, which is for %s; want something like %s", r.prefix, r.use, example)
			return p, false
		}
	}
	return p, true
}

// prefixes reads one prefix, or a pair of different families separated by a comma.
func (b *builder) prefixes(v text, defaults map[Family]netip.Prefix) ([]netip.Prefix, bool) {
	if !v.set {
		return nil, true
	}
	parts := strings.Split(v.value, ",")
	if len(parts) > 2 {
		b.add(v.at, v.value, "%d prefixes; want one, or one of each family", len(parts))
		return nil, false
	}
	var list []netip.Prefix
	good := true
	for _, part := range parts {
		part = strings.TrimSpace(part)
		example := defaults[IPv4]
		if strings.Contains(part, ":") {
			example = defaults[IPv6]
		}
		p, ok := b.prefix(v.at, part, example.String())
		good = good && ok
		list = append(list, p)
	}
	if good && len(list) == 2 && familyOf(list[0]) == familyOf(list[1]) {
		b.add(v.at, v.value, "two %s prefixes; want one of each family", familyOf(list[0]).title())
		return nil, false
	}
	return list, good
}

// underlays reads the ranges of the nodes' own addresses.
func (b *builder) underlays(s *labSpec, lab *Lab) {
	one := func(v text, f Family, bits int, example string) netip.Prefix {
		if !v.set {
			return netip.Prefix{}
		}
		p, ok := b.prefix(v.at, v.value, example)
		if ok && (familyOf(p) != f || p.Bits() != bits) {
			b.add(v.at, v.value, "want an %s /%d, such as %s", f.title(), bits, example)
			ok = false
		}
		if !ok {
			return netip.Prefix{}
		}
		return p
	}
	lab.Underlay4 = one(s.underlay4, IPv4, 16, "10.201.0.0/16")
	lab.Underlay6 = one(s.underlay6, IPv6, 48, "fd00:fa:201::/48")
}

// addresses fills in families, ranges and each node's blocks.
func (b *builder) addresses(s *clusterSpec, c *Cluster, lab *Lab) {
	pods, podsGood := b.prefixes(s.podCIDR, defaultPods)
	services, servicesGood := b.prefixes(s.serviceCIDR, defaultServices)
	familyGood := true
	if v := s.ipFamily; v.set && v.value != "ipv4" && v.value != "ipv6" && v.value != "dual" {
		b.add(v.at, v.value, "unknown IP family; %s", didYouMean(v.value, []string{"ipv4", "ipv6", "dual"}))
		familyGood = false
	}
	if !podsGood || !servicesGood || !familyGood {
		return // What depends on them would only repeat the same mistake in other words.
	}
	var because string
	c.Families, because = families(s, pods, services)
	podsGood = b.matches(s.podCIDR, pods, c.Families, because)
	servicesGood = b.matches(s.serviceCIDR, services, c.Families, because)
	masksGood := b.masks(s.nodeCIDRMask, c)
	if !podsGood || !servicesGood || !masksGood {
		return
	}
	c.PodCIDRs = orDefault(pods, c.Families, defaultPods)
	c.ServiceCIDRs = orDefault(services, c.Families, defaultServices)

	good := true
	for i := range c.Families {
		good = b.blocks(s, c, i) && good
		b.serviceSize(s.serviceCIDR, c.ServiceCIDRs[i])
	}
	b.overlaps(s, c, lab)
	if !good {
		return
	}
	for i := range c.Nodes {
		for f := range c.Families {
			block := subnet(c.PodCIDRs[f], c.NodeMasks[f], i)
			c.Nodes[i].PodCIDRs = append(c.Nodes[i].PodCIDRs, block)
		}
	}
}

// families decides the cluster's families and says by what.
func families(s *clusterSpec, pods, services []netip.Prefix) ([]Family, string) {
	because := "ipFamily is " + s.ipFamily.value
	if s.ipFamily.at.isFlag() {
		because = "--ip-family is " + s.ipFamily.value
	}
	switch {
	case s.ipFamily.value == "ipv4":
		return []Family{IPv4}, because
	case s.ipFamily.value == "ipv6":
		return []Family{IPv6}, because
	case len(pods) > 0 && (!s.ipFamily.set || len(pods) == 2):
		return familiesOf(pods), "podCIDR is " + s.podCIDR.value
	case len(services) > 0 && (!s.ipFamily.set || len(services) == 2):
		return familiesOf(services), "serviceCIDR is " + s.serviceCIDR.value
	case s.ipFamily.set:
		return []Family{IPv4, IPv6}, because
	}
	return []Family{IPv4}, "IPv4 is the default"
}

// matches reports prefixes whose families are not the cluster's, or not in its order.
func (b *builder) matches(v text, prefixes []netip.Prefix, want []Family, because string) bool {
	have := familiesOf(prefixes)
	if !v.set || len(have) == len(want) && have[0] == want[0] {
		return true
	}
	words := "one " + want[0].title() + " prefix"
	if len(want) == 2 {
		words = fmt.Sprintf("an %s and then an %s prefix", want[0].title(), want[1].title())
	}
	b.add(v.at, v.value, "want %s, because %s", words, because)
	return false
}

// masks reads the lengths of the nodes' blocks, one for each family.
func (b *builder) masks(v text, c *Cluster) bool {
	c.NodeMasks = nil
	for _, f := range c.Families {
		c.NodeMasks = append(c.NodeMasks, defaultMasks[f])
	}
	if !v.set {
		return true
	}
	parts := strings.Split(v.value, ",")
	if len(parts) != len(c.Families) {
		example := strconv.Itoa(c.NodeMasks[0])
		if len(c.Families) == 2 {
			example = fmt.Sprintf("%d,%d", c.NodeMasks[0], c.NodeMasks[1])
		}
		b.add(v.at, v.value, "want one length for each IP family, such as %s", example)
		return false
	}
	for i, part := range parts {
		f := c.Families[i]
		n, err := strconv.Atoi(strings.TrimSpace(part))
		if err != nil || n < 1 || n > longestMask[f] {
			b.add(v.at, v.value, "not a length of an %s prefix; want a number from 1 to %d, such as %d", f.title(), longestMask[f], defaultMasks[f])
			return false
		}
		c.NodeMasks[i] = n
	}
	return true
}

// blocks checks that podCIDR divides into a block for each node.
func (b *builder) blocks(s *clusterSpec, c *Cluster, i int) bool {
	p, mask := c.PodCIDRs[i], c.NodeMasks[i]
	v := s.podCIDR.or(s.nodeCIDRMask)
	at := v.at
	if !v.set {
		at = s.at
	}
	switch bits := mask - p.Bits(); {
	case bits < 0:
		b.add(at, v.value, "%s is smaller than the /%d that each node takes; want a larger podCIDR or a larger nodeCIDRMask", p, mask)
	case bits > maxMaskBits:
		b.add(at, v.value, "more than %d bits between %s and the /%d that each node takes, which kube-controller-manager refuses; want a podCIDR of /%d or longer", maxMaskBits, p, mask, mask-maxMaskBits)
	case 1<<bits < len(c.Nodes):
		b.add(at, v.value, "%s has %d blocks of /%d, and cluster %s has %d nodes; want a larger podCIDR or a larger nodeCIDRMask", p, 1<<bits, mask, c.Name, len(c.Nodes))
	default:
		return true
	}
	return false
}

// serviceSize checks a Service range against what Kubernetes permits.
func (b *builder) serviceSize(v text, p netip.Prefix) {
	limits := serviceBits[familyOf(p)]
	if p.Bits() < limits[0] {
		b.add(v.at, v.value, "%s is larger than kube-apiserver permits; want /%d to /%d", p, limits[0], limits[1])
	}
	if p.Bits() > limits[1] {
		b.add(v.at, v.value, "%s has no room for the cluster's own Services; want /%d to /%d", p, limits[0], limits[1])
	}
}

// overlaps checks a cluster's ranges against each other and against the underlay. Ranges of different
// clusters may overlap.
func (b *builder) overlaps(s *clusterSpec, c *Cluster, lab *Lab) {
	place := func(v text) source {
		if v.set {
			return v.at
		}
		return s.at
	}
	for i, pods := range c.PodCIDRs {
		if services := c.ServiceCIDRs[i]; pods.Overlaps(services) {
			v := s.serviceCIDR.or(s.podCIDR)
			b.add(place(v), v.value, "pods %s and Services %s of cluster %s overlap; want them apart", pods, services, c.Name)
		}
	}
	for _, underlay := range []netip.Prefix{lab.Underlay4, lab.Underlay6} {
		if !underlay.IsValid() {
			continue
		}
		for _, p := range c.PodCIDRs {
			if p.Overlaps(underlay) {
				b.add(place(s.podCIDR), s.podCIDR.value, "pods %s of cluster %s overlap the underlay %s; want them apart", p, c.Name, underlay)
			}
		}
		for _, p := range c.ServiceCIDRs {
			if p.Overlaps(underlay) {
				b.add(place(s.serviceCIDR), s.serviceCIDR.value, "Services %s of cluster %s overlap the underlay %s; want them apart", p, c.Name, underlay)
			}
		}
	}
}

func orDefault(have []netip.Prefix, families []Family, defaults map[Family]netip.Prefix) []netip.Prefix {
	if len(have) > 0 {
		return have
	}
	for _, f := range families {
		have = append(have, defaults[f])
	}
	return have
}
