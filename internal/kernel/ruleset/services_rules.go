package ruleset

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"

	"github.com/fathom-network/fathom/internal/facts/inet"
	"github.com/fathom-network/fathom/internal/facts/service"
	"github.com/fathom-network/fathom/internal/kernel/nft"
)

// ServicesTable is the table that translates Services' addresses to those of their endpoints.
const ServicesTable = service.Table

// MasqueradeMark is the bit of a packet's mark by which this table's chains know that the table has chosen the packet's
// destination. Kubernetes uses the same bit for this purpose. Packets leave the node without it.
const MasqueradeMark = 0x4000

// The sets and maps of the table. Each exists once for IPv4 and once for IPv6, with 4 or 6 appended. The key of a frontend is
// `address . protocol . port`, with the address 0.0.0.0 or :: for a NodePort. Names that end in "outside" are for clients
// outside the cluster, and hold the frontends that treat those differently.
const (
	services          = "services"           // frontend: number of endpoints
	servicesOutside   = "services_outside"   //
	endpoints         = "endpoints"          // frontend . slot: endpoint
	refused           = "refused"            // frontend without endpoints: verdict
	refusedOutside    = "refused_outside"    //
	restricted        = "restricted"         // frontends with allowed sources
	sources           = "sources"            // frontend . allowed source
	sticky            = "sticky"             // frontend with affinity: chain
	stickyOutside     = "sticky_outside"     //
	affinity          = "affinity"           // client . Service's ID: an endpoint's ID
	affinitySlots     = "affinity_slots"     // frontend . slot: an endpoint's ID
	affinityEndpoints = "affinity_endpoints" // frontend . an endpoint's ID: endpoint
	affinityOutside   = "affinity_outside"   //
	affinityFull      = "affinity_full"      // Service's ID, for a minute after affinity had no room for a client
	podsOnly          = "pods_only"          // frontends that are not for the node's own processes
	nodePortAddrs     = "nodeport_addrs"
	ownEndpoints      = "own_endpoints" // address . the same address
)

// Limits of the set affinityFull.
const (
	fullFor      = time.Minute // how long an element lives
	fullServices = 1 << 12     // how many Services it holds
)

// ClientsRemembered is the number of pairs of a client and a Service with affinity that the kernel remembers, for each family.
const ClientsRemembered = 1 << 18

// outsideSlots is the first slot of the endpoints for clients outside the cluster.
const outsideSlots = service.MaxEndpoints + 1

// way is a way in which a packet reaches a frontend.
type way struct {
	family   inet.Family
	nodePort bool
	outside  bool
}

// ways returns all of them.
func ways() []way {
	var all []way
	for _, f := range inet.Families {
		for i := range 4 {
			all = append(all, way{f, i&2 != 0, i&1 != 0})
		}
	}
	return all
}

// String begins the names of the way's chains.
func (w way) String() string {
	name := "address"
	if w.nodePort {
		name = "nodeport"
	}
	if w.outside {
		name += "_outside"
	}
	return named(name, w.family)
}

// chains is the name of the map of the way's chains.
func (w way) chains() string { return w.String() + "_chains" }

// in returns which of two sets is the way's.
func (w way) in(set, outside string) string {
	if w.outside {
		return named(outside, w.family)
	}
	return named(set, w.family)
}

// target is a chain for the frontends that are met in one way and have so many endpoints. Those with affinity have chains
// of their own Service, which are few.
type target struct {
	way
	count   int
	seconds int    // of affinity; zero is none
	id      uint32 // the Service's, with affinity
}

func (t target) name() string {
	name := t.String() + "_n" + strconv.Itoa(t.count)
	if t.seconds > 0 {
		name += fmt.Sprintf("_%ds_%08x", t.seconds, t.id)
	}
	return name
}

// secondsOf is what the name of a chain with affinity says.
func secondsOf(chain string) (int, bool) {
	parts := strings.Split(chain, "_")
	seconds, err := strconv.Atoi(strings.TrimSuffix(parts[max(0, len(parts)-2)], "s"))
	return seconds, err == nil && seconds > 0 && seconds <= int(service.MaxAffinity/time.Second)
}

func serviceSets() []*nft.Set {
	join := nftables.MustConcatSetType
	var all []*nft.Set
	for _, f := range inet.Families {
		addr, proto, port, mark, verdict := addrType(f), nftables.TypeInetProto, nftables.TypeInetService, nftables.TypeMark, nftables.TypeVerdict
		frontend, endpoint := join(addr, proto, port), join(addr, port)
		for _, s := range []*nft.Set{
			{Name: services, Comment: "Services' addresses and ports, and how many endpoints there are", Key: frontend, Data: mark, Parts: true},
			{Name: servicesOutside, Comment: "the same for clients outside the cluster, where it differs for them", Key: frontend, Data: mark, Parts: true},
			{Name: endpoints, Comment: "the endpoints, numbered; from 0x10000 those for clients outside", Key: join(addr, proto, port, mark), Data: endpoint, Parts: true},
			{Name: refused, Comment: "Services without endpoints", Key: frontend, Data: verdict, Parts: true},
			{Name: refusedOutside, Comment: "the same for clients outside the cluster, where it differs for them", Key: frontend, Data: verdict, Parts: true},
			{Name: restricted, Comment: "Services' addresses that only some may come to", Key: frontend, Parts: true},
			{Name: sources, Comment: "who may come there", Key: join(addr, proto, port, addr), Interval: true, Parts: true},
			{Name: sticky, Comment: "Services whose clients stay with an endpoint", Key: frontend, Data: verdict, Parts: true},
			{Name: stickyOutside, Comment: "the same for clients outside the cluster, where it differs for them", Key: frontend, Data: verdict, Parts: true},
			{Name: affinity, Comment: "clients of these, by the Service, and which endpoint is theirs", Key: join(addr, mark), Data: mark, Timeout: true, Size: ClientsRemembered},
			{Name: affinitySlots, Comment: "the endpoints that new clients are sent to, numbered", Key: join(addr, proto, port, mark), Data: mark, Parts: true},
			{Name: affinityEndpoints, Comment: "where endpoints are, at an address and port of a Service", Key: join(addr, proto, port, mark), Data: endpoint, Parts: true},
			{Name: affinityOutside, Comment: "the same for clients outside the cluster, where it differs for them", Key: join(addr, proto, port, mark), Data: endpoint, Parts: true},
			{Name: affinityFull, Comment: "Services a client of which found no room to be remembered in the last minute", Key: mark, Timeout: true, Size: fullServices},
			{Name: podsOnly, Comment: "Services' external IPs that the node's own processes do not meet", Key: frontend, Parts: true},
			{Name: nodePortAddrs, Comment: "this node's addresses that NodePorts answer at", Key: addr},
			{Name: ownPods, Comment: "this node's pods", Key: addr, Interval: true},
			{Name: ownEndpoints, Comment: "endpoints that are this node's pods, to see who meets himself", Key: join(addr, addr)},
		} {
			s.Name = named(s.Name, f)
			all = append(all, s)
		}
	}
	for _, w := range ways() {
		all = append(all, &nft.Set{Name: w.chains(), Comment: "what to do with how many endpoints", Key: nftables.TypeMark, Data: nftables.TypeVerdict})
	}
	return all
}

// key loads a frontend's key into registers, beginning at a word.
func (w way) key(word int) []expr.Any {
	n := words(w.family)
	exprs := []expr.Any{at(destinationOf(w.family), word)}
	if w.nodePort {
		zero := make([]byte, n*4)
		exprs = append(exprs, &expr.Bitwise{SourceRegister: reg(word), DestRegister: reg(word), Len: uint32(n * 4), Mask: zero, Xor: zero})
	}
	return append(exprs, &expr.Meta{Key: expr.MetaKeyL4PROTO, Register: reg(word + n)},
		&expr.Payload{DestRegister: reg(word + n + 1), Base: expr.PayloadBaseTransportHeader, Offset: 2, Len: 2})
}

// met begins a rule for packets that may reach a frontend in this way, and loads its key.
func (w way) met(loopback bool) []expr.Any {
	exprs := isFamily(w.family)
	if w.outside {
		exprs = append(exprs, sourceOf(w.family), &expr.Lookup{SourceRegister: 1, SetName: named(ownPods, w.family), Invert: true})
	}
	switch {
	case loopback:
		exprs = append(exprs, destinationOf(w.family), inLoopback(), isLoopback(expr.CmpOpEq))
	case w.nodePort:
		exprs = append(exprs, destinationOf(w.family), &expr.Lookup{SourceRegister: 1, SetName: named(nodePortAddrs, w.family)})
	default:
		// A packet to 0.0.0.0, which no host has, must not match the keys of NodePorts.
		exprs = append(exprs, destinationOf(w.family), &expr.Cmp{Op: expr.CmpOpNeq, Register: 1, Data: make([]byte, words(w.family)*4)})
	}
	return append(exprs, w.key(0)...)
}

func inLoopback() expr.Any {
	return &expr.Bitwise{SourceRegister: 1, DestRegister: 1, Len: 4, Mask: []byte{255, 0, 0, 0}, Xor: make([]byte, 4)}
}

func isLoopback(op expr.CmpOp) expr.Any {
	return &expr.Cmp{Op: op, Register: 1, Data: []byte{127, 0, 0, 0}}
}

func find(set string, from, to int) expr.Any {
	return &expr.Lookup{SourceRegister: reg(from), DestRegister: reg(to), IsDestRegSet: true, SetName: set}
}

func judge(set string) expr.Any {
	return &expr.Lookup{SourceRegister: 1, DestRegister: unix.NFT_REG_VERDICT, IsDestRegSet: true, SetName: set}
}

func mark(mask, xor uint32) []expr.Any {
	word := func(n uint32) []byte { return binary.NativeEndian.AppendUint32(nil, n) }
	return []expr.Any{
		&expr.Meta{Key: expr.MetaKeyMARK, Register: reg(spare)},
		&expr.Bitwise{SourceRegister: reg(spare), DestRegister: reg(spare), Len: 4, Mask: word(mask), Xor: word(xor)},
		&expr.Meta{Key: expr.MetaKeyMARK, SourceRegister: true, Register: reg(spare)},
	}
}

// send translates a packet to the destination in the registers that begin at a word, and resets its priority.
func (w way) send(word int) []expr.Any {
	addr, port := reg(word), reg(word+words(w.family))
	uncarry := []expr.Any{&expr.Immediate{Register: reg(spare), Data: make([]byte, 4)}, carry(spare)}
	return append(append(uncarry, mark(^uint32(MasqueradeMark), MasqueradeMark)...), &expr.NAT{Type: expr.NATTypeDestNAT, Family: uint32(nfproto(w.family)),
		RegAddrMin: addr, RegAddrMax: addr, RegProtoMin: port, RegProtoMax: port, Specified: true})
}

// Registers do not outlive a rule, and nft 1.0.6 aborts when it lists a rule that looks up the result of its own look-up. So the
// packet's priority carries a number to the next rule. This happens to the first packet of a connection to a Service only,
// and it leaves the table with the default priority.
func carry(word int) expr.Any {
	return &expr.Meta{Key: expr.MetaKeyPRIORITY, SourceRegister: true, Register: reg(word)}
}

func carried(word int) expr.Any {
	return &expr.Meta{Key: expr.MetaKeyPRIORITY, Register: reg(word)}
}

// Chain returns the target's chain.
func (t target) Chain() *nft.Chain {
	c := &nft.Chain{Name: t.name()}
	n := words(t.family)
	slot := uint32(0)
	if t.outside {
		slot = outsideSlots
	}
	// pick looks up a random slot in a map.
	pick := func(set string) []expr.Any {
		return append(t.key(0), &expr.Numgen{Register: reg(n + 2), Modulus: uint32(t.count), Type: unix.NFT_NG_RANDOM, Offset: slot},
			find(named(set, t.family), 0, 0))
	}
	add := func(comment string, parts ...[]expr.Any) {
		c.Add(comment, append([][]expr.Any{isFamily(t.family)}, parts...)...)
	}
	if t.seconds > 0 {
		service := func(word int) expr.Any { return &expr.Immediate{Register: reg(word), Data: []byte(number(t.id))} }
		client := []expr.Any{at(sourceOf(t.family), 0)}
		if t.outside && t.family == inet.IPv6 { // a host may use any address of its /64
			network := append(bytes.Repeat([]byte{255}, 8), make([]byte, 8)...)
			client = append(client, &expr.Bitwise{SourceRegister: reg(0), DestRegister: reg(0), Len: 16, Mask: network, Xor: make([]byte, 16)})
		}
		client = append(client, service(n))
		change := func(operation uint32) []expr.Any {
			d := &expr.Dynset{SrcRegKey: reg(0), SrcRegData: reg(n + 1), SetName: named(affinity, t.family), Operation: operation}
			if operation != dynsetDelete { // a deletion has no timeout, but a map wants data for it, too
				d.Timeout = time.Duration(t.seconds) * time.Second
			}
			return []expr.Any{carried(n + 1), d}
		}
		for _, gone := range []bool{false, true} { // the second round is for a client whose endpoint is gone
			if gone {
				add("forgets an endpoint that is gone", client, change(dynsetDelete))
			}
			add("has the priority carry the ID of one of the endpoints", pick(affinitySlots), []expr.Any{carry(0)})
			// An update resets the timeout of an element, and keeps its value. If the map is full, the rule ends there.
			add("remembers it for a new client, and other clients for longer", client, change(unix.NFT_DYNSET_OP_UPDATE),
				[]expr.Any{&expr.Immediate{Register: reg(spare), Data: make([]byte, 4)}, carry(spare)})
			if !gone {
				add("notes that there was no room", []expr.Any{carried(0), &expr.Cmp{Op: expr.CmpOpNeq, Register: reg(0), Data: make([]byte, 4)}, service(0),
					&expr.Dynset{SrcRegKey: reg(0), SetName: named(affinityFull, t.family), Operation: unix.NFT_DYNSET_OP_UPDATE, Timeout: fullFor}})
			}
			add("has the priority carry the ID of the client's endpoint", client, []expr.Any{find(named(affinity, t.family), 0, 0), carry(0)})
			add("sends there", t.key(0), []expr.Any{carried(n + 2), find(t.in(affinityEndpoints, affinityOutside), 0, 0)}, t.send(0))
		}
	}
	add("sends to one of the endpoints", pick(endpoints), t.send(0))
	return c
}

// Elements yields the target's element in its way's map of chains. A Service with affinity has its chain in the map sticky
// instead.
func (t target) Elements(yield func(set string, e nft.Element)) {
	if t.seconds == 0 {
		yield(t.chains(), nft.Element{Key: number(uint32(t.count)), Verdict: true, Code: expr.VerdictJump, Value: t.name()})
	}
}

// dynsetDelete is NFT_DYNSET_OP_DELETE, which is not in x/sys.
const dynsetDelete = 2

const refuseChain = "refuse"

// refuseRules reject packets, so that the client learns at once that the connection is refused.
func refuseRules() []nft.Rule {
	return []nft.Rule{
		{Comment: "answers TCP that nobody listens", Exprs: []expr.Any{
			&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: 1}, &expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: []byte{unix.IPPROTO_TCP}},
			&expr.Reject{Type: unix.NFT_REJECT_TCP_RST}}},
		{Comment: "answers others that nobody listens", Exprs: []expr.Any{&expr.Reject{Type: unix.NFT_REJECT_ICMPX_UNREACH, Code: unix.NFT_REJECT_ICMPX_PORT_UNREACH}}},
	}
}

// serviceChains returns the chains that exist whatever the Services are.
func serviceChains() []nft.Chain {
	const (
		beforeNAT         = -110 // destination NAT has priority -100
		beforeMasquerade  = 99
		loopbackInterface = 1
	)
	is := func(kind expr.VerdictKind) expr.Any { return &expr.Verdict{Kind: kind} }
	native := func(n uint32) []byte { return binary.NativeEndian.AppendUint32(nil, n) }
	check := nft.Hooked("check_prerouting", nftables.ChainTypeFilter, nftables.ChainHookPrerouting, beforeNAT)
	checkOutput := nft.Hooked("check_output", nftables.ChainTypeFilter, nftables.ChainHookOutput, beforeNAT)
	prerouting := nft.Hooked("prerouting", nftables.ChainTypeNAT, nftables.ChainHookPrerouting, *nftables.ChainPriorityNATDest)
	output := nft.Hooked("output", nftables.ChainTypeNAT, nftables.ChainHookOutput, *nftables.ChainPriorityNATDest)
	postrouting := nft.Hooked("postrouting", nftables.ChainTypeNAT, nftables.ChainHookPostrouting, beforeMasquerade)
	refuse := nft.Chain{Name: refuseChain, Rules: refuseRules()}

	// route_localnet makes the kernel route 127.0.0.0/8, so that NodePorts answer there. No other host may reach these addresses.
	fromElsewhere := []expr.Any{&expr.Meta{Key: expr.MetaKeyIIF, Register: 1}, &expr.Cmp{Op: expr.CmpOpNeq, Register: 1, Data: native(loopbackInterface)}}
	for _, address := range []*expr.Payload{sourceOf(inet.IPv4), destinationOf(inet.IPv4)} {
		check.Add("keeps 127.0.0.0/8 to the node itself", fromElsewhere, isFamily(inet.IPv4), []expr.Any{address, inLoopback(), isLoopback(expr.CmpOpEq), is(expr.VerdictDrop)})
	}
	for _, c := range []*nft.Chain{&check, &checkOutput} {
		c.Add("leaves connections alone that are there", []expr.Any{
			&expr.Ct{Key: expr.CtKeySTATE, Register: 1},
			&expr.Bitwise{SourceRegister: 1, DestRegister: 1, Len: 4, Mask: native(expr.CtStateBitNEW), Xor: native(0)},
			&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: native(0)}, is(expr.VerdictAccept)})
		for _, f := range inet.Families {
			w := way{family: f}
			c.Add("drops what comes from a source that may not", isFamily(f), w.key(0), []expr.Any{
				&expr.Lookup{SourceRegister: 1, SetName: named(restricted, f)}, at(sourceOf(f), words(f)+2),
				&expr.Lookup{SourceRegister: 1, SetName: named(sources, f), Invert: true}, is(expr.VerdictDrop)})
		}
	}
	for _, f := range inet.Families {
		for _, c := range []*nft.Chain{&checkOutput, &output} {
			c.Add("leaves external IPs to pods", way{family: f}.met(false),
				[]expr.Any{&expr.Lookup{SourceRegister: 1, SetName: named(podsOnly, f)}, is(expr.VerdictAccept)})
		}
	}
	// Rules for clients outside come first, since their frontends are in both maps.
	all := ways()
	slices.SortStableFunc(all, func(a, b way) int {
		if a.outside == b.outside {
			return 0
		}
		if a.outside {
			return -1
		}
		return 1
	})
	for _, w := range all {
		check.Add("refuses where there are no endpoints", w.met(false), []expr.Any{judge(w.in(refused, refusedOutside))})
		balance := func(c *nft.Chain, loopback bool) {
			c.Add("goes by the client where there is affinity", w.met(loopback), []expr.Any{judge(w.in(sticky, stickyOutside))})
			c.Add("has the priority carry the number of endpoints", w.met(loopback), []expr.Any{find(w.in(services, servicesOutside), 0, 0), carry(0)})
			c.Add("goes by the number of endpoints", []expr.Any{carried(0), judge(w.chains())})
		}
		balance(&prerouting, false)
		if w.outside {
			continue // the node's own processes are inside
		}
		checkOutput.Add("refuses where there are no endpoints", w.met(false), []expr.Any{judge(w.in(refused, refusedOutside))})
		balance(&output, false)
		if w.nodePort && w.family == inet.IPv4 {
			checkOutput.Add("refuses where there are no endpoints", w.met(true), []expr.Any{judge(w.in(refused, refusedOutside))})
			balance(&output, true)
		}
	}

	bit := []expr.Any{&expr.Meta{Key: expr.MetaKeyMARK, Register: 1},
		&expr.Bitwise{SourceRegister: 1, DestRegister: 1, Len: 4, Mask: native(MasqueradeMark), Xor: native(0)}}
	postrouting.Add("leaves alone what is none of a Service's", bit, []expr.Any{&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: native(0)}, is(expr.VerdictAccept)})
	postrouting.Add("takes the mark off", mark(^uint32(MasqueradeMark), 0))
	postrouting.Add("leaves alone what stays on the node", []expr.Any{&expr.Meta{Key: expr.MetaKeyOIF, Register: 1},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: native(loopbackInterface)}, is(expr.VerdictAccept)})
	masquerade := []expr.Any{&expr.Masq{FullyRandom: true}}
	for _, f := range inet.Families {
		postrouting.Add("masquerades pods that meet themselves, or the answer would not come by here", isFamily(f), []expr.Any{
			sourceOf(f), at(destinationOf(f), words(f)), &expr.Lookup{SourceRegister: 1, SetName: named(ownEndpoints, f)}}, masquerade)
		if f == inet.IPv4 {
			postrouting.Add("masquerades the node's own 127.0.0.0/8", isFamily(f), []expr.Any{sourceOf(f), inLoopback(), isLoopback(expr.CmpOpEq)}, masquerade)
		}
		postrouting.Add("masquerades others unless it goes to a pod of this node: the answer must come by here", isFamily(f), []expr.Any{
			sourceOf(f), &expr.Lookup{SourceRegister: 1, SetName: named(ownPods, f), Invert: true},
			destinationOf(f), &expr.Lookup{SourceRegister: 1, SetName: named(ownPods, f), Invert: true}}, masquerade)
	}
	return []nft.Chain{refuse, check, checkOutput, prerouting, output, postrouting}
}
