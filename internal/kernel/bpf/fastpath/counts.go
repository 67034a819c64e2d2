package fastpath

import (
	"fmt"

	"github.com/fathom-network/fathom/internal/kernel/bpf/pin"
)

// Count is the number of packets with one outcome.
type Count struct {
	Verdict, Reason string
	Packets         uint64
}

// Counts reads how many packets were redirected, passed to the stack or dropped, and why, since the maps were created.
func (p *Path) Counts() ([]Count, error) {
	var list []Count
	for i, r := range reasons {
		if r.name == "" {
			continue
		}
		var cpus []uint64
		if err := p.objects.FathomCounts.Lookup(uint32(i), &cpus); err != nil {
			return nil, fmt.Errorf("read the map %s: %w", pin.Counts, err)
		}
		c := Count{Verdict: r.verdict, Reason: r.name}
		for _, n := range cpus {
			c.Packets += n
		}
		list = append(list, c)
	}
	return list, nil
}

// Verdicts.
const (
	redirected = "redirected"
	passed     = "stack"
	dropped    = "dropped"
)

// reasons lists all reasons in the order of `enum reason` in fastpath.c, with the verdict of each.
var reasons = []struct{ verdict, name string }{
	{"", ""},
	{redirected, "to_pod"},
	{redirected, "to_node"},
	{redirected, "from_node"},
	{passed, "elsewhere"},
	{passed, "protocol"},
	{passed, "fragment"},
	{passed, "options"},
	{passed, "ttl"},
	{passed, "mtu"},
	{passed, "tracked"},
	{passed, "pod"},
	{passed, "self"},
	{passed, "not_ours"},
	{dropped, "mac"},
	{dropped, "source"},
	{dropped, "arp"},
	{dropped, "ethertype"},
	{passed, "policy"},
	{passed, "no_flow"},
	{dropped, "forbidden"},
}
