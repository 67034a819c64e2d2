package ruleset

import (
	"maps"
	"net/netip"
	"slices"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"

	"github.com/fathom-network/fathom/internal/facts/diff"
	"github.com/fathom-network/fathom/internal/facts/inet"
	"github.com/fathom-network/fathom/internal/kernel/nft"
)

// DNSTable is the table that keeps packets to and from the node's DNS cache out of connection tracking.
const DNSTable = "fathom-dns"

// untracked is the set of the table. It exists once for IPv4 and once for IPv6, with 4 or 6 appended.
const untracked = "untracked"

// SetUntracked exempts packets to and from these addresses from connection tracking, and returns the number of addresses that
// it added and removed. Nothing may translate these packets, since untracked answers are not translated back. Without
// addresses SetUntracked deletes the table.
func (r *Ruleset) SetUntracked(addrs []netip.Addr) (diff.Count, error) {
	if len(addrs) == 0 {
		return diff.Count{}, r.Delete(DNSTable)
	}
	return r.set(dnsTable(addrs))
}

// HoldsUntracked says whether the kernel holds what SetUntracked wrote for these addresses. It may run while another goroutine
// uses the rule set.
func (r *Ruleset) HoldsUntracked(addrs []netip.Addr) (bool, error) {
	by, err := r.beside()
	if err != nil {
		return false, err
	}
	defer by.Close()
	want := dnsTable(addrs)
	have, found, err := by.read(want)
	return found && maps.EqualFunc(have, want.Elements, slices.Equal), err
}

func dnsTable(addrs []netip.Addr) nft.Table {
	t := nft.Table{Name: DNSTable, Elements: elements{}}
	prerouting := nft.Hooked("prerouting", nftables.ChainTypeFilter, nftables.ChainHookPrerouting, *nftables.ChainPriorityRaw)
	output := nft.Hooked("output", nftables.ChainTypeFilter, nftables.ChainHookOutput, *nftables.ChainPriorityRaw)
	notrack := []expr.Any{&expr.Notrack{}}
	for _, f := range inet.Families {
		t.Sets = append(t.Sets, addrSet(untracked, f, "the node's DNS cache"))
		t.Elements[named(untracked, f)] = ofAddrs(addrs, f)
		for _, c := range []*nft.Chain{&prerouting, &output} {
			c.Add("what asks the cache is not tracked", isFamily(f), isIn(destinationOf(f), named(untracked, f)), notrack)
			c.Add("nor are its answers", isFamily(f), isIn(sourceOf(f), named(untracked, f)), notrack)
		}
	}
	t.Chains = []nft.Chain{prerouting, output}
	return t
}
