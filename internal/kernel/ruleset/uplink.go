package ruleset

import (
	"encoding/binary"
	"fmt"
	"net/netip"
	"slices"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"

	"github.com/fathom-network/fathom/internal/facts/diff"
	"github.com/fathom-network/fathom/internal/facts/inet"
	"github.com/fathom-network/fathom/internal/kernel/nft"
)

// Uplink says which packets of a lab are masqueraded with the address of their output device.
type Uplink struct {
	Table   string
	Comment string         // of each rule
	From    []netip.Prefix // the lab's sources
	// Inside is the device behind which the sources are. With Outside false, packets of From are
	// masqueraded unless they leave by Inside; with Outside true, packets that leave by Inside are
	// masqueraded unless they come from From.
	Inside  string
	Outside bool
	// To are destinations that see the original source.
	To []netip.Prefix
	// Guard blocks traffic from Inside to this namespace itself, at all of its addresses. Forwarded packets pass, and so do
	// answers to connections that the namespace has opened.
	Guard bool
}

// SetUplink makes the kernel masquerade as u says. The count says whether it changed anything.
func (r *Ruleset) SetUplink(u Uplink) (diff.Count, error) { return r.set(uplinkTable(u)) }

func uplinkTable(u Uplink) nft.Table {
	post := nft.Hooked("postrouting", nftables.ChainTypeNAT, nftables.ChainHookPostrouting, *nftables.ChainPriorityNATSource)
	masquerade := []expr.Any{&expr.Masq{}}
	for _, p := range u.To {
		post.Add(u.Comment, isWithin(destinationOf, p), verdict(expr.VerdictAccept))
	}
	for _, p := range u.From {
		if u.Outside { // From is accepted here; the last rule masquerades the rest that leaves by Inside
			post.Add(u.Comment, isDevice(expr.MetaKeyOIFNAME, expr.CmpOpEq, u.Inside), isWithin(sourceOf, p), verdict(expr.VerdictAccept))
		} else {
			post.Add(u.Comment, isWithin(sourceOf, p), isDevice(expr.MetaKeyOIFNAME, expr.CmpOpNeq, u.Inside), masquerade)
		}
	}
	if u.Outside {
		post.Add(u.Comment, isDevice(expr.MetaKeyOIFNAME, expr.CmpOpEq, u.Inside), masquerade)
	}
	t := nft.Table{Name: u.Table, Variant: fmt.Sprint(u), Chains: []nft.Chain{post}}
	if u.Guard {
		t.Chains = append(t.Chains, uplinkGuard(u))
	}
	return t
}

// uplinkGuard returns the chain that drops packets from the device to this namespace. The chain runs before destination NAT: a
// published port of a container is a service of the host, too, and its packets are forwarded, so they never reach an input
// hook.
func uplinkGuard(u Uplink) nft.Chain {
	const afterConntrack = -150
	c := nft.Hooked("guard", nftables.ChainTypeFilter, nftables.ChainHookPrerouting, afterConntrack)
	add := func(exprs ...expr.Any) {
		c.Add(u.Comment, isDevice(expr.MetaKeyIIFNAME, expr.CmpOpEq, u.Inside), exprs)
	}
	// Answers, and errors about what was sent.
	add(append(inFlow(expr.CmpOpNeq), verdict(expr.VerdictAccept)...)...)
	// Forwarding needs neighbour discovery (RFC 4861: types 133 to 137).
	add(slices.Concat(isFamily(inet.IPv6), []expr.Any{
		&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: 1},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: []byte{unix.IPPROTO_ICMPV6}},
		&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseTransportHeader, Offset: 0, Len: 1},
		&expr.Range{Op: expr.CmpOpEq, Register: 1, FromData: []byte{133}, ToData: []byte{137}},
	}, verdict(expr.VerdictAccept))...)
	// Any other type than unicast means this namespace: local addresses, broadcast and multicast.
	add(&expr.Fib{Register: 1, FlagDADDR: true, ResultADDRTYPE: true},
		&expr.Cmp{Op: expr.CmpOpNeq, Register: 1, Data: binary.NativeEndian.AppendUint32(nil, unix.RTN_UNICAST)},
		&expr.Verdict{Kind: expr.VerdictDrop})
	return c
}

func isDevice(key expr.MetaKey, op expr.CmpOp, device string) []expr.Any {
	name := make([]byte, unix.IFNAMSIZ)
	copy(name, device)
	return []expr.Any{&expr.Meta{Key: key, Register: 1}, &expr.Cmp{Op: op, Register: 1, Data: name}}
}

// isWithin matches packets whose address is within a prefix.
func isWithin(address func(inet.Family) *expr.Payload, p netip.Prefix) []expr.Any {
	f := inet.FamilyOf(p.Addr())
	return append(isFamily(f), address(f), maskOf(f, p.Bits(), 1),
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: p.Masked().Addr().AsSlice()})
}
