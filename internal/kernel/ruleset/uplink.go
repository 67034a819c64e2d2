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

// Uplink says which packets of a lab leave with the address of the device they leave by.
type Uplink struct {
	Table   string
	Comment string         // of each rule
	From    []netip.Prefix // the sources that the rules are about
	// Inside is the device behind which the sources are. With Outside false, packets of From are
	// masqueraded unless they leave by Inside; with Outside true, packets that leave by Inside are
	// masqueraded unless they come from From.
	Inside  string
	Outside bool
	// To are destinations that see the source as it is.
	To []netip.Prefix
	// Guard lets who is behind Inside reach nothing of this namespace itself, by whichever of its addresses: only what
	// it forwards, and answers to what it asked.
	Guard bool
}

// SetUplink makes the kernel masquerade as u says, and returns 1 if it did not.
func (r *Ruleset) SetUplink(u Uplink) (diff.Count, error) { return r.set(uplinkTable(u)) }

func uplinkTable(u Uplink) nft.Table {
	post := nft.Hooked("postrouting", nftables.ChainTypeNAT, nftables.ChainHookPostrouting, *nftables.ChainPriorityNATSource)
	masquerade := []expr.Any{&expr.Masq{}}
	for _, p := range u.To {
		post.Add(u.Comment, isWithin(destinationOf, p), verdict(expr.VerdictAccept))
	}
	for _, p := range u.From {
		if u.Outside { // what keeps its address is accepted first; the rest that leaves by the device does not
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

// uplinkGuard drops what comes in by the device and is for this namespace. It is done before destinations are translated: the
// published port of a container (DNAT to another address) is as much a service of the host as a socket is, and would
// not pass an input hook.
func uplinkGuard(u Uplink) nft.Chain {
	const afterConntrack = -150
	c := nft.Hooked("guard", nftables.ChainTypeFilter, nftables.ChainHookPrerouting, afterConntrack)
	add := func(exprs ...expr.Any) {
		c.Add(u.Comment, isDevice(expr.MetaKeyIIFNAME, expr.CmpOpEq, u.Inside), exprs)
	}
	// Answers, and errors about what was sent.
	add(append(inFlow(expr.CmpOpNeq), verdict(expr.VerdictAccept)...)...)
	// Without neighbour discovery (RFC 4861: types 133 to 137) nothing would be forwarded either.
	add(slices.Concat(isFamily(inet.IPv6), []expr.Any{
		&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: 1},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: []byte{unix.IPPROTO_ICMPV6}},
		&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseTransportHeader, Offset: 0, Len: 1},
		&expr.Range{Op: expr.CmpOpEq, Register: 1, FromData: []byte{133}, ToData: []byte{137}},
	}, verdict(expr.VerdictAccept))...)
	// What is not forwarded is for this namespace: its addresses, and those that stand for all who listen.
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

// isWithin matches packets that have an address of a prefix.
func isWithin(address func(inet.Family) *expr.Payload, p netip.Prefix) []expr.Any {
	f := inet.FamilyOf(p.Addr())
	return append(isFamily(f), address(f), maskOf(f, p.Bits(), 1),
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: p.Masked().Addr().AsSlice()})
}
