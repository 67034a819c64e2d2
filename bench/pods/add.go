package main

import (
	"context"
	"fmt"
	"time"

	"github.com/fathom-network/fathom/bench/traffic"
	"github.com/fathom-network/fathom/internal/facts/podnet"
	"github.com/fathom-network/fathom/internal/kernel/bpf/fastpath"
)

// addKind is a plugin whose ADD and DEL are measured as a runtime sees them, from the start of the process to its end.
type addKind struct {
	name          string
	node          *node
	add, cpu, del []time.Duration
}

// measureAdds has the plugins take turns; who is first takes turns, too.
func (b *bench) measureAdds(ctx context.Context) ([]*addKind, error) {
	defer b.end()
	var all []*addKind
	for _, k := range []struct {
		name string
		set  func(context.Context, *bench, []*node) error
	}{
		{"fathom-cni", fathom(podnet.Direct, true)},
		{"bridge, host-local", bridge("1")},
		{"ptp, host-local", reference("ptp", nil)},
		{"flannel", flannel("vxlan")},
	} {
		nodes, err := b.nodes(1)
		if err != nil {
			return nil, err
		}
		if err := k.set(ctx, b, nodes); err != nil {
			return nil, fmt.Errorf("%s: %w", k.name, err)
		}
		all = append(all, &addKind{name: k.name, node: nodes[0]})
	}
	// There, the plugin attaches the fast path's program, too.
	path, err := fastpath.Open(all[0].node.Namespace, fastpath.Options{})
	if err != nil {
		return nil, err
	}
	defer path.Close()
	for i := range b.adds {
		for j := range all {
			if err := ctx.Err(); err != nil {
				return nil, err
			}
			// Namespaces stay until the end: the kernel takes them apart behind our back, and holds the lock of all
			// devices meanwhile, which the next ADD would wait for.
			ns, at, err := b.space()
			if err != nil {
				return nil, err
			}
			ns.Close()
			k := all[(i+j)%len(all)]
			_, add, err := b.plugin(k.node, "ADD", fmt.Sprintf("c%d", i), at)
			if err != nil {
				return nil, err
			}
			_, del, err := b.plugin(k.node, "DEL", fmt.Sprintf("c%d", i), at)
			if err != nil {
				return nil, err
			}
			k.add, k.cpu, k.del = append(k.add, add.wall), append(k.cpu, add.cpu), append(k.del, del.wall)
		}
	}
	return all, nil
}

// addGoals are those of Fathom's plugin on two processors.
const (
	addP50 = 15 * time.Millisecond
	addP99 = 40 * time.Millisecond
)

func addRows(all []*addKind) (rows [][]string, missed []string) {
	ms := func(d time.Duration) string { return fmt.Sprintf("%.1f ms", float64(d.Microseconds())/1000) }
	for _, k := range all {
		rows = append(rows, []string{k.name, ms(traffic.Percentile(k.add, 50)), ms(traffic.Percentile(k.add, 99)), ms(traffic.Percentile(k.del, 50)), ms(traffic.Percentile(k.del, 99)),
			ms(traffic.Percentile(k.cpu, 50))})
	}
	ours, bridge := all[0], all[1]
	for _, g := range []struct {
		what      string
		is, limit time.Duration
	}{
		{"ADD p50", traffic.Percentile(ours.add, 50), min(addP50, traffic.Percentile(bridge.add, 50))},
		{"ADD p99", traffic.Percentile(ours.add, 99), min(addP99, traffic.Percentile(bridge.add, 99))},
		{"DEL p50", traffic.Percentile(ours.del, 50), min(addP50, traffic.Percentile(bridge.del, 50))},
		{"DEL p99", traffic.Percentile(ours.del, 99), min(addP99, traffic.Percentile(bridge.del, 99))},
	} {
		if g.is > g.limit {
			missed = append(missed, fmt.Sprintf("fathom-cni: %s is %s, the goal is at most %s: faster than bridge and host-local, and p50 %v, p99 %v", g.what, ms(g.is), ms(g.limit), addP50, addP99))
		}
	}
	return rows, missed
}
