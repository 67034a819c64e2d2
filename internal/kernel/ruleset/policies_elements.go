package ruleset

import (
	"cmp"
	"encoding/binary"
	"net/netip"
	"reflect"
	"slices"
	"strings"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"

	"github.com/fathom-network/fathom/internal/facts/inet"
	"github.com/fathom-network/fathom/internal/facts/policy"
	"github.com/fathom-network/fathom/internal/kernel/nft"
)

// policyKey names a part of the table of policies: an address of a pod, or a class.
type policyKey struct {
	addr  netip.Addr
	class policy.Number
}

// policyPart is what the table holds of an address or of a class, or of either as the kernel lists it.
type policyPart struct {
	addr    netip.Addr
	address policy.Address
	class   *policy.Class
	listed  []listed // sorted, of a part that was read
}

// listed is an element and the set that it is in.
type listed struct {
	set string
	nft.Element
}

func (l listed) compare(o listed) int {
	return cmp.Or(strings.Compare(l.set, o.set), strings.Compare(l.Key, o.Key))
}

// is says that the table holds something of it.
func (p policyPart) is() bool {
	if p.class != nil {
		return len(p.class.Allows)+len(p.class.Blocks) > 0
	}
	return p.address.Peer != 0 || p.address.Own || p.listed != nil
}

// Equal says that the kernel holds the same of both.
func (p policyPart) Equal(o policyPart) bool {
	if p.listed == nil && o.listed == nil {
		return p.addr == o.addr && p.address == o.address && (p.class == o.class || reflect.DeepEqual(p.class, o.class))
	}
	return slices.Equal(p.list(), o.list())
}

func (p policyPart) list() (all []listed) {
	if p.listed != nil {
		return p.listed
	}
	p.Elements(func(set string, e nft.Element) { all = append(all, listed{set, e}) })
	slices.SortFunc(all, listed.compare)
	return all
}

// Apart implements nft.Apart: of a class that changes most stays.
func (p policyPart) Apart(o policyPart) (own, others policyPart) {
	if p.class == nil || o.class == nil || p.class.Tiers || o.class.Tiers {
		return p, o
	}
	p.class, o.class = policy.Apart(p.class, o.class)
	return p, o
}

// Shares are the chains of an address's classes.
func (p policyPart) Shares(yield func(nft.Shared)) {
	if p.class != nil { // which others share
		return
	}
	p.Elements(func(_ string, e nft.Element) {
		if !e.Verdict {
			return
		}
		if c, ok := classChainOf(e.Value); ok {
			yield(c)
		}
	})
}

// Elements are all that the sets hold of an address or of a class.
func (p policyPart) Elements(yield func(set string, e nft.Element)) {
	switch {
	case p.listed != nil:
		for _, l := range p.listed {
			yield(l.set, l.Element)
		}
	case p.class != nil:
		classElements(p.class, yield)
	default:
		addressElements(p.addr, p.address, yield)
	}
}

func addressElements(addr netip.Addr, is policy.Address, yield func(set string, e nft.Element)) {
	f, key := inet.FamilyOf(addr), string(addr.AsSlice())
	if is.Peer != 0 {
		yield(named(identities, f), nft.Element{Key: key, Value: classID(0, is.Peer), Comment: commented(is.Of)})
	}
	if !is.Own {
		return
	}
	comment := commented(is.Pod.String())
	yield(named(judged, f), nft.Element{Key: key, Comment: comment})
	for _, d := range policy.Directions {
		to := func(set string, c classChain) {
			yield(named(set, f), nft.Element{Key: key, Verdict: true, Code: expr.VerdictJump, Value: c.name(), Comment: comment})
		}
		first := isolated(d)
		if n := is.Tiers[d]; n != 0 {
			to(first, classChain{Direction: d, Number: n, tiers: true})
			if first = behind(d); d == policy.Egress {
				to(egressToNode, classChain{Direction: d, Number: n, tiers: true})
			}
		}
		if n := is.Isolated[d]; n != 0 {
			to(first, classChain{Direction: d, Number: n, audit: is.Audited[d]})
		}
	}
	if !is.Free() {
		yield(named(themselves, f), nft.Element{Key: key + key})
	}
}

func classElements(c *policy.Class, yield func(set string, e nft.Element)) {
	if c.Tiers {
		tierElements(c, yield)
		return
	}
	for _, a := range c.Allows {
		key, comment := classID(c.Number, a.Peer), commented(a.By.String())
		switch from, to := protocolAndPort(a.Grant, a.From), protocolAndPort(a.Grant, a.To); {
		case a.All:
			yield(allowPeers, nft.Element{Key: key, Comment: comment})
		case a.From == a.To:
			yield(allowPorts, nft.Element{Key: key + from, Comment: comment})
		default:
			yield(allowPortRanges, nft.Element{Key: key + from, KeyEnd: key + to, Comment: comment})
		}
	}
	key := classID(c.Number, 0)
	for _, b := range c.Blocks {
		f, comment := inet.FamilyOf(b.First), commented(b.By.String())
		first, last := string(b.First.AsSlice()), string(b.Last.AsSlice())
		if b.All {
			yield(named(allowBlocks, f), nft.Element{Key: key + first, KeyEnd: key + last, Comment: comment})
		} else {
			yield(named(allowBlockPorts, f), nft.Element{Key: key + protocolAndPort(b.Grant, b.From) + first, KeyEnd: key + protocolAndPort(b.Grant, b.To) + last, Comment: comment})
		}
	}
}

// classID returns class and identity as the packet's priority has them.
func classID(class, identity policy.Number) string {
	return number(uint32(class)<<16 | uint32(identity))
}

func protocolAndPort(g policy.Grant, port uint16) string {
	return string(append([]byte{byte(g.Protocol), 0, 0, 0}, portBytes(port)...))
}

// commented cuts what is too long for nft to show: of names of 300 characters the ends are left.
func commented(s string) string {
	const most, end = 127, 60
	if len(s) <= most {
		return s
	}
	return strings.ToValidUTF8(s[:end], "") + "..." + strings.ToValidUTF8(s[len(s)-end:], "")
}

// policiesLayout is of the sets whose keys begin with an address or a class.
var policiesLayout = nft.Layout[policyKey, policyPart]{
	Owner: policyOwner,
	Decode: func(sets map[string][]nft.Element) (rest map[string][]nft.Element, parts map[policyKey]policyPart, ok bool) {
		rest, parts = map[string][]nft.Element{}, map[policyKey]policyPart{}
		for _, s := range policyTable(nil, false).Sets {
			if !s.Parts {
				rest[s.Name] = sets[s.Name]
				continue
			}
			for _, e := range sets[s.Name] {
				k, ok := policyOwner(s, e.Key)
				if _, isClass := classChainOf(e.Value); !ok || e.Verdict && !isClass && !isTierVerdict(e) {
					return nil, nil, false
				}
				p := parts[k]
				p.listed = append(p.listed, listed{s.Name, e})
				parts[k] = p
			}
		}
		for _, p := range parts {
			slices.SortFunc(p.listed, listed.compare)
		}
		return rest, parts, true
	},
}

func policyOwner(s *nft.Set, key string) (k policyKey, ok bool) {
	n := 4
	switch {
	case strings.HasPrefix(s.Key.Name, nftables.TypeClassID.Name):
		if len(key) < n {
			return k, false
		}
		k.class = policy.Number(binary.NativeEndian.Uint32([]byte(key)) >> 16)
		return k, k.class != 0
	case strings.HasPrefix(s.Key.Name, nftables.TypeIP6Addr.Name):
		n = 16
	}
	if len(key) < n {
		return k, false
	}
	k.addr, ok = netip.AddrFromSlice([]byte(key[:n]))
	return k, ok
}
