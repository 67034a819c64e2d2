package ruleset

import (
	"encoding/binary"
	"net"

	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"

	"github.com/fathom-network/fathom/internal/facts/inet"
)

// Expressions that several tables use.

func nfproto(f inet.Family) byte {
	if f == inet.IPv4 {
		return unix.NFPROTO_IPV4
	}
	return unix.NFPROTO_IPV6
}

func sourceOf(f inet.Family) *expr.Payload {
	if f == inet.IPv4 {
		return &expr.Payload{DestRegister: 1, Base: expr.PayloadBaseNetworkHeader, Offset: 12, Len: 4}
	}
	return &expr.Payload{DestRegister: 1, Base: expr.PayloadBaseNetworkHeader, Offset: 8, Len: 16}
}

func destinationOf(f inet.Family) *expr.Payload {
	if f == inet.IPv4 {
		return &expr.Payload{DestRegister: 1, Base: expr.PayloadBaseNetworkHeader, Offset: 16, Len: 4}
	}
	return &expr.Payload{DestRegister: 1, Base: expr.PayloadBaseNetworkHeader, Offset: 24, Len: 16}
}

// reg returns the number of the register of a 32-bit word, 0 to 15, as the kernel lists it.
func reg(word int) uint32 {
	if word%4 == 0 {
		return uint32(unix.NFT_REG_1 + word/4)
	}
	return uint32(unix.NFT_REG32_00 + word)
}

// words returns the number of 32-bit words of an address.
func words(f inet.Family) int {
	if f == inet.IPv4 {
		return 1
	}
	return 4
}

// spare is a word beyond the longest key.
const spare = 15

func at(p *expr.Payload, word int) expr.Any {
	p.DestRegister = reg(word)
	return p
}

func isFamily(f inet.Family) []expr.Any {
	return []expr.Any{
		&expr.Meta{Key: expr.MetaKeyNFPROTO, Register: 1},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: []byte{nfproto(f)}},
	}
}

// inFlow matches packets of established flows and those related to them with expr.CmpOpNeq, and all others with expr.CmpOpEq.
func inFlow(op expr.CmpOp) []expr.Any {
	flows := expr.CtStateBitESTABLISHED | expr.CtStateBitRELATED
	return []expr.Any{
		&expr.Ct{Key: expr.CtKeySTATE, Register: 1},
		&expr.Bitwise{SourceRegister: 1, DestRegister: 1, Len: 4, Mask: binary.NativeEndian.AppendUint32(nil, uint32(flows)), Xor: make([]byte, 4)},
		&expr.Cmp{Op: op, Register: 1, Data: make([]byte, 4)},
	}
}

func isIn(p *expr.Payload, set string) []expr.Any {
	return []expr.Any{p, &expr.Lookup{SourceRegister: 1, SetName: set}}
}

func isNotIn(p *expr.Payload, set string) []expr.Any {
	return []expr.Any{p, &expr.Lookup{SourceRegister: 1, SetName: set, Invert: true}}
}

func verdict(kind expr.VerdictKind) []expr.Any { return []expr.Any{&expr.Verdict{Kind: kind}} }

func jump(chain string) []expr.Any {
	return []expr.Any{&expr.Verdict{Kind: expr.VerdictJump, Chain: chain}}
}

// dropped counts packets before it drops them. They are attempts to spoof, or a sign of a network that this one misjudges.
func dropped() []expr.Any { return []expr.Any{&expr.Counter{}, &expr.Verdict{Kind: expr.VerdictDrop}} }

// maskOf keeps the first bits of the address in a register, and clears the rest.
func maskOf(f inet.Family, bits int, register uint32) *expr.Bitwise {
	size := words(f) * 4
	return &expr.Bitwise{SourceRegister: register, DestRegister: register, Len: uint32(size),
		Mask: []byte(net.CIDRMask(bits, size*8)), Xor: make([]byte, size)}
}
