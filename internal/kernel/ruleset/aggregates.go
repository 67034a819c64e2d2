package ruleset

import (
	"errors"
	"fmt"
	"net/netip"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"

	"github.com/fathom-network/fathom/internal/facts/diff"
	"github.com/fathom-network/fathom/internal/facts/inet"
)

// AggregatesTable is the table that refuses what routers send for addresses of aggregates that nobody has: docs/design/bgp.md.
const AggregatesTable = "fathom-aggregates"

const aggregated = "aggregates" // the set, once for each family

// SetAggregates has the kernel refuse what comes from outside for these prefixes and has not become anything else, and returns
// the number of elements that it changed.
func (r *Ruleset) SetAggregates(all []netip.Prefix) (diff.Count, error) {
	want := elements{}
	for _, f := range []inet.Family{inet.IPv4, inet.IPv6} {
		want[named(aggregated, f)] = alone(AggregatesAsHeld(all), f)
	}
	return r.set(aggregatesTable(), want)
}

// AggregatesAsHeld are prefixes as the kernel holds them: sorted, and none within another.
func AggregatesAsHeld(all []netip.Prefix) []netip.Prefix { return outermost(all) }

// Aggregates reads back what SetAggregates set, as AggregatesAsHeld has it. It is not found where the table is not there, or does
// something else.
func (r *Ruleset) Aggregates() (held []netip.Prefix, found bool, err error) {
	have, _, err := r.read(aggregatesTable())
	if errors.Is(err, errStrange) {
		return nil, false, nil
	}
	if err != nil {
		return nil, false, fmt.Errorf("read nftables table inet %s: %w", AggregatesTable, err)
	}
	for _, f := range []inet.Family{inet.IPv4, inet.IPv6} {
		held = prefixes(held, have[named(aggregated, f)])
	}
	return outermost(held), true, nil
}

func aggregatesTable() table {
	t := table{name: AggregatesTable}
	refuse := chain{name: "refuse", rules: refuseRules()}
	prerouting := chain{name: "prerouting", kind: nftables.ChainTypeFilter, hook: nftables.ChainHookPrerouting, priority: afterNAT}
	fromElsewhere := fromPod()
	fromElsewhere[len(fromElsewhere)-1].(*expr.Cmp).Op = expr.CmpOpNeq
	for _, f := range []inet.Family{inet.IPv4, inet.IPv6} {
		t.sets = append(t.sets, set{name: named(aggregated, f), comment: "what routers are told to send here", family: f, interval: true})
		prerouting.add("nobody has the address, and the default route leads back to the router", firstOfFlow(), isFamily(f),
			isIn(destinationOf(f), named(aggregated, f)), fromElsewhere, notLocal(), jump(refuse.name))
	}
	t.chains = []chain{refuse, prerouting}
	return t
}
