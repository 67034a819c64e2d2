package ruleset

import (
	"encoding/binary"

	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"

	"github.com/fathom-network/fathom/internal/kernel/nft"
)

// ForbiddenMark is the bit of a connection's mark by which the agent says that policies do not allow the connection any more. No other
// program that marks connections on nodes is known to use it: those of kube-proxy, Calico, Cilium, Istio and cloud providers are lower.
const ForbiddenMark uint32 = 1 << 28

const forbiddenChain = "forbidden"

// isForbidden matches packets of a connection with the mark, in both directions.
func isForbidden() []expr.Any {
	bit := binary.NativeEndian.AppendUint32(nil, ForbiddenMark)
	return []expr.Any{
		&expr.Ct{Key: expr.CtKeyMARK, Register: 1},
		&expr.Bitwise{SourceRegister: 1, DestRegister: 1, Len: 4, Mask: bit, Xor: make([]byte, 4)},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: bit},
	}
}

// policyForbidden is the chain that ends connections: who sends by TCP is told, from either side, and does not wait until it gives up.
func policyForbidden(silent bool) nft.Chain {
	c := nft.Chain{Name: forbiddenChain}
	addRecord(&c, Record{Kind: Ended}, silent)
	c.Add("ends a connection that policies do not allow any more", []expr.Any{
		&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: 1}, &expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: []byte{unix.IPPROTO_TCP}},
		&expr.Counter{}, &expr.Reject{Type: unix.NFT_REJECT_TCP_RST}})
	c.Add("of other protocols, there is nobody to be told", dropped())
	return c
}

func goTo(chain string) []expr.Any {
	return []expr.Any{&expr.Verdict{Kind: expr.VerdictGoto, Chain: chain}}
}
