package link

import (
	"fmt"
	"net/netip"

	"github.com/google/nftables"
	"github.com/google/nftables/binaryutil"
	"github.com/google/nftables/expr"
	"github.com/google/nftables/userdata"
	"golang.org/x/sys/unix"
)

// Masquerade says which packets leave with the address of the device they leave by.
type Masquerade struct {
	Table   string // a table of family inet that holds this rule set and nothing else
	Comment string
	From    []netip.Prefix // the sources that the rule is about
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

// SetMasquerade replaces the table by one that masquerades as m says, in one transaction.
func (n *Namespace) SetMasquerade(m Masquerade) error {
	conn, err := nftables.New(nftables.WithNetNSFd(int(n.file.Fd())))
	if err != nil {
		return fmt.Errorf("open nftables: %w", err)
	}
	table := &nftables.Table{Family: nftables.TableFamilyINet, Name: m.Table}
	conn.AddTable(table) // so that the deletion after it does not fail
	conn.DelTable(table)
	conn.AddTable(table)
	chain := conn.AddChain(&nftables.Chain{
		Name: "postrouting", Table: table, Type: nftables.ChainTypeNAT,
		Hooknum: nftables.ChainHookPostrouting, Priority: nftables.ChainPriorityNATSource,
	})
	comment := userdata.AppendString(nil, userdata.TypeComment, m.Comment)
	for _, p := range m.To {
		conn.AddRule(&nftables.Rule{Table: table, Chain: chain, UserData: comment,
			Exprs: append(destination(p), &expr.Verdict{Kind: expr.VerdictAccept})})
	}
	if m.Outside {
		// Sources that keep their address are accepted first; the rest that leaves by the device is not.
		for _, p := range m.From {
			conn.AddRule(&nftables.Rule{Table: table, Chain: chain, UserData: comment, Exprs: append(
				append(output(m.Inside, expr.CmpOpEq), source(p)...), &expr.Verdict{Kind: expr.VerdictAccept})})
		}
		conn.AddRule(&nftables.Rule{Table: table, Chain: chain, UserData: comment,
			Exprs: append(output(m.Inside, expr.CmpOpEq), &expr.Masq{})})
	} else {
		for _, p := range m.From {
			conn.AddRule(&nftables.Rule{Table: table, Chain: chain, UserData: comment, Exprs: append(
				append(source(p), output(m.Inside, expr.CmpOpNeq)...), &expr.Masq{})})
		}
	}
	if m.Guard {
		guard(conn, table, m.Inside, comment)
	}
	if err := conn.Flush(); err != nil {
		return fmt.Errorf("set nftables table inet %s: %w", m.Table, err)
	}
	return nil
}

// guard drops what comes in by the device and is for this namespace. It is done before destinations are translated: the
// published port of a container (DNAT to another address) is as much a service of the host as a socket is, and would
// not pass an input hook.
func guard(conn *nftables.Conn, table *nftables.Table, device string, comment []byte) {
	chain := conn.AddChain(&nftables.Chain{
		Name: "guard", Table: table, Type: nftables.ChainTypeFilter,
		Hooknum: nftables.ChainHookPrerouting, Priority: nftables.ChainPriorityMangle, // after conntrack, before DNAT
	})
	add := func(exprs ...expr.Any) {
		name := make([]byte, unix.IFNAMSIZ)
		copy(name, device)
		conn.AddRule(&nftables.Rule{Table: table, Chain: chain, UserData: comment, Exprs: append([]expr.Any{
			&expr.Meta{Key: expr.MetaKeyIIFNAME, Register: 1},
			&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: name},
		}, exprs...)})
	}
	accept := &expr.Verdict{Kind: expr.VerdictAccept}
	// Answers, and errors about what was sent.
	add(&expr.Ct{Key: expr.CtKeySTATE, Register: 1},
		&expr.Bitwise{SourceRegister: 1, DestRegister: 1, Len: 4,
			Mask: binaryutil.NativeEndian.PutUint32(expr.CtStateBitESTABLISHED | expr.CtStateBitRELATED), Xor: make([]byte, 4)},
		&expr.Cmp{Op: expr.CmpOpNeq, Register: 1, Data: make([]byte, 4)}, accept)
	// Without neighbour discovery (RFC 4861: types 133 to 137) nothing would be forwarded either.
	add(&expr.Meta{Key: expr.MetaKeyNFPROTO, Register: 1},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: []byte{unix.NFPROTO_IPV6}},
		&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: 1},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: []byte{unix.IPPROTO_ICMPV6}},
		&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseTransportHeader, Offset: 0, Len: 1},
		&expr.Range{Op: expr.CmpOpEq, Register: 1, FromData: []byte{133}, ToData: []byte{137}}, accept)
	// What is not forwarded is for this namespace: its addresses, and those that stand for all who listen.
	add(&expr.Fib{Register: 1, FlagDADDR: true, ResultADDRTYPE: true},
		&expr.Cmp{Op: expr.CmpOpNeq, Register: 1, Data: binaryutil.NativeEndian.PutUint32(unix.RTN_UNICAST)},
		&expr.Verdict{Kind: expr.VerdictDrop})
}

// DeleteTable takes the nftables table away. One that is not there is not an error.
func (n *Namespace) DeleteTable(name string) error {
	conn, err := nftables.New(nftables.WithNetNSFd(int(n.file.Fd())))
	if err != nil {
		return fmt.Errorf("open nftables: %w", err)
	}
	table := &nftables.Table{Family: nftables.TableFamilyINet, Name: name}
	conn.AddTable(table)
	conn.DelTable(table)
	if err := conn.Flush(); err != nil {
		return fmt.Errorf("delete nftables table inet %s: %w", name, err)
	}
	return nil
}

// output matches the device that the packet leaves by.
func output(device string, op expr.CmpOp) []expr.Any {
	name := make([]byte, unix.IFNAMSIZ)
	copy(name, device)
	return []expr.Any{
		&expr.Meta{Key: expr.MetaKeyOIFNAME, Register: 1},
		&expr.Cmp{Op: op, Register: 1, Data: name},
	}
}

// source matches packets whose source address is in p.
func source(p netip.Prefix) []expr.Any {
	if p.Addr().Is6() {
		return address(p, 8)
	}
	return address(p, 12)
}

// destination matches packets whose destination address is in p.
func destination(p netip.Prefix) []expr.Any {
	if p.Addr().Is6() {
		return address(p, 24)
	}
	return address(p, 16)
}

// address matches packets with an address in p at an offset of their IP header.
func address(p netip.Prefix, offset uint32) []expr.Any {
	family, length := byte(unix.NFPROTO_IPV4), uint32(4)
	if p.Addr().Is6() {
		family, length = unix.NFPROTO_IPV6, 16
	}
	mask := make([]byte, length)
	for i := range p.Bits() {
		mask[i/8] |= 0x80 >> (i % 8)
	}
	return []expr.Any{
		&expr.Meta{Key: expr.MetaKeyNFPROTO, Register: 1},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: []byte{family}},
		&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseNetworkHeader, Offset: offset, Len: length},
		&expr.Bitwise{SourceRegister: 1, DestRegister: 1, Len: length, Mask: mask, Xor: make([]byte, length)},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: p.Masked().Addr().AsSlice()},
	}
}
