package ruleset

import (
	"net/netip"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"

	"github.com/fathom-network/fathom/internal/facts/diff"
	"github.com/fathom-network/fathom/internal/facts/inet"
)

// DNSTable is the table that keeps packets to and from the node's DNS cache out of connection tracking.
const DNSTable = "fathom-dns"

// untracked is the set of the table, once for IPv4 and once for IPv6: the number is appended.
const untracked = "untracked"

// SetUntracked has the kernel not track packets to and from these addresses, and returns the number of addresses that
// it added and removed. They must not be translated: what is untracked is not translated back. Without addresses there
// is no table.
func (r *Ruleset) SetUntracked(addrs []netip.Addr) (diff.Count, error) {
	if len(addrs) == 0 {
		return diff.Count{}, r.Delete(DNSTable)
	}
	return r.set(dnsTable(), untrackedElements(addrs))
}

func untrackedElements(addrs []netip.Addr) elements {
	want := elements{}
	for _, f := range inet.Families {
		want[named(untracked, f)] = single(addrs, f)
	}
	return want
}

// HoldsUntracked says whether the kernel has what SetUntracked made of these addresses. Another goroutine may use the rule
// set meanwhile.
func (r *Ruleset) HoldsUntracked(addrs []netip.Addr) (bool, error) {
	by, err := r.beside()
	if err != nil {
		return false, err
	}
	defer by.Close()
	have, _, err := by.read(dnsTable())
	if err != nil {
		return false, ignoreStrange(err)
	}
	want := untrackedElements(addrs)
	for _, s := range dnsTable().sets {
		d := diff.Compare(want[s.name], have[s.name], member.key)
		if len(d.Add)+len(d.Remove) > 0 {
			return false, nil
		}
	}
	return true, nil
}

func dnsTable() table {
	t := table{name: DNSTable}
	prerouting := chain{name: "prerouting", kind: nftables.ChainTypeFilter, hook: nftables.ChainHookPrerouting, priority: nftables.ChainPriorityRaw}
	output := chain{name: "output", kind: nftables.ChainTypeFilter, hook: nftables.ChainHookOutput, priority: nftables.ChainPriorityRaw}
	for _, f := range inet.Families {
		set := set{name: named(untracked, f), comment: "the node's DNS cache", family: f}
		t.sets = append(t.sets, set)
		matching := func(comment string, addr *expr.Payload) rule {
			return rule{comment: comment, exprs: []expr.Any{
				&expr.Meta{Key: expr.MetaKeyNFPROTO, Register: 1},
				&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: []byte{nfproto(f)}},
				addr, &expr.Lookup{SourceRegister: 1, SetName: set.name}, &expr.Notrack{},
			}}
		}
		both := []rule{matching("what asks the cache is not tracked", destinationOf(f)), matching("nor are its answers", sourceOf(f))}
		prerouting.rules, output.rules = append(prerouting.rules, both...), append(output.rules, both...)
	}
	t.chains = []chain{prerouting, output}
	return t
}
