package main

import (
	"context"
	"fmt"
	"os"
	"slices"
	"strings"

	"github.com/fathom-network/fathom/bench/traffic"
)

// places are where the servers are.
var places = []struct {
	name   string
	server int
}{{"same node", nearServer}, {"two nodes", farServer}}

// wanted are the measures that are taken.
func (b *bench) wanted() []traffic.Measure {
	return slices.DeleteFunc(slices.Clone(traffic.Measures), func(m traffic.Measure) bool { return !slices.Contains(strings.Split(b.measures, ","), m.Name) })
}

func (b *bench) measureTraffic(ctx context.Context) error {
	defer b.measured()
	for round := range b.rounds {
		if round%10 == 0 {
			fmt.Fprintf(os.Stderr, "policies: round %d of %d\n", round+1, b.rounds)
		}
		for j := range b.ways {
			w := b.ways[(round+j)%len(b.ways)]
			for _, p := range places {
				for _, m := range b.wanted() {
					if err := ctx.Err(); err != nil {
						return err
					}
					rate, err := m.Take(w.pods[client].Namespace, w.pods[p.server].addr, b.slice)
					if err != nil {
						return fmt.Errorf("%s, %s with %d policies, %s: %w", p.name, w.name, w.policies, m.Name, err)
					}
					key := p.name + " " + m.Name
					w.rates[key] = append(w.rates[key], rate)
				}
			}
		}
	}
	return nil
}

// goals are what the project holds itself to, as a ratio to the same pods without any policy.
var goals = []struct {
	way      string
	policies int
	measures []string
	least    float64
}{
	{fathom, 1000, []string{"RR", "CRR", "STREAM"}, 0.97},
	{fathomOff, 1000, []string{"RR", "CRR", "STREAM"}, 0.93},
	{fathom, 10_000, []string{"CRR"}, 0.97},
}

func (b *bench) trafficRows() (rows [][]string, missed []string) {
	for _, p := range places {
		for _, w := range b.ways {
			row := []string{p.name, w.name, fmt.Sprint(w.policies)}
			for _, m := range b.wanted() {
				switch base, best := b.base(w), traffic.Best(w.rates[p.name+" "+m.Name]); {
				case base != w:
					row = append(row, fmt.Sprintf("%.2f", best/traffic.Best(base.rates[p.name+" "+m.Name])))
				case m.Bytes:
					row = append(row, fmt.Sprintf("%.1f Gbit/s", best*8/1e9))
				default:
					row = append(row, fmt.Sprintf("%.0f /s", best))
				}
			}
			rows = append(rows, row)
		}
		for _, g := range goals {
			w := b.find(g.way, g.policies)
			if w == nil {
				continue
			}
			for _, m := range b.wanted() {
				key := p.name + " " + m.Name
				if is := traffic.Best(w.rates[key]) / traffic.Best(b.base(w).rates[key]); slices.Contains(g.measures, m.Name) && is < g.least {
					missed = append(missed, fmt.Sprintf("%s, %s: %s with %d policies is %.2f of without, the goal is at least %.2f", p.name, w.name, m.Name, w.policies, is, g.least))
				}
			}
		}
	}
	return rows, missed
}
