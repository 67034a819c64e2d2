package fastpath

import (
	"fmt"
	"net/netip"
	"strings"

	"github.com/fathom-network/fathom/internal/kernel/bpf/pin"
)

// Count is how many packets met a fate.
type Count struct {
	Verdict, Reason string
	Packets         uint64
}

// Counts reads how many packets were redirected, passed to the stack and dropped, and why, since the maps were made.
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

// Slow reads the pods whose packets take the stack though there is a fast path, and why, as a clause.
func (p *Path) Slow() (map[netip.Addr]string, error) {
	pods := map[pin.Key]pin.Pod{}
	if err := readMap(p.objects.FathomPods, pods); err != nil {
		return nil, fmt.Errorf("read the map %s: %w", pin.Pods, err)
	}
	slow := map[netip.Addr]string{}
	for key, pod := range pods {
		var why []string
		for _, r := range []struct {
			bit pin.Stack
			why string
		}{
			{pin.New, "the agent has not looked at the pod yet"},
			{pin.Shaped, "its device has a queueing discipline or filters, which the fast path would go past"},
			{pin.Policy, "rules are to see them"},
		} {
			if pod.Stack&r.bit != 0 {
				why = append(why, r.why)
			}
		}
		if len(why) > 0 {
			slow[key.Addr()] = strings.Join(why, "; ")
		}
	}
	return slow, nil
}

// Verdicts.
const (
	redirected = "redirected"
	passed     = "stack"
	dropped    = "dropped"
)

// reasons are all reasons, in the order of `enum reason` in fastpath.c, with the verdict of each.
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
}
