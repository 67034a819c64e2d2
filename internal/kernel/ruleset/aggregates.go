package ruleset

import (
	"net/netip"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"

	"github.com/fathom-network/fathom/internal/facts/diff"
	"github.com/fathom-network/fathom/internal/facts/inet"
	"github.com/fathom-network/fathom/internal/facts/service"
	"github.com/fathom-network/fathom/internal/kernel/nft"
)

const aggregated = "aggregates" // the set, once for each family

// SetAggregates makes the kernel reject packets from outside to these prefixes that no pod and no Service has taken, and returns
// the number of elements that it changed.
func (r *Ruleset) SetAggregates(all []netip.Prefix) (diff.Count, error) {
	return r.set(aggregatesTable(all))
}

// Aggregates reads back what SetAggregates set: sorted prefixes, none of which contains another. found is false if the table is
// missing, or if its rules are not ours.
func (r *Ruleset) Aggregates() (held []netip.Prefix, found bool, err error) {
	have, found, err := r.read(aggregatesTable(nil))
	if !found || err != nil {
		return nil, false, err
	}
	return inet.Disjoint(have.prefixes(aggregated)), true, nil
}

func aggregatesTable(all []netip.Prefix) nft.Table {
	t := nft.Table{Name: service.AggregatesTable, Elements: elements{}}
	refuse := nft.Chain{Name: "refuse", Rules: refuseRules()}
	prerouting := nft.Hooked("prerouting", nftables.ChainTypeFilter, nftables.ChainHookPrerouting, afterNAT)
	for _, f := range inet.Families {
		t.Sets = append(t.Sets, prefixSet(aggregated, f, "what routers are told to send here"))
		t.Elements[named(aggregated, f)] = ofPrefixes(inet.Disjoint(all), f)
		prerouting.Add("nobody has the address, and the default route leads back to the router", firstOfFlow(), isFamily(f),
			isIn(destinationOf(f), named(aggregated, f)), isPods(expr.CmpOpNeq), notLocal(), jump(refuse.Name))
	}
	t.Chains = []nft.Chain{refuse, prerouting}
	return t
}
