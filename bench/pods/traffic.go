package main

import (
	"context"
	"fmt"
	"net/netip"
	"os"
	"slices"
	"strings"

	"github.com/fathom-network/fathom/bench/traffic"
	"github.com/fathom-network/fathom/internal/kernel/link"
)

// way is one from a pod to another.
type way struct {
	where, name  string
	from, server *link.Namespace
	to           netip.Addr
	rates        map[string][]float64
}

func (b *bench) measureWays(ctx context.Context) error {
	defer b.end()
	if err := b.makeWays(ctx); err != nil {
		return err
	}
	for _, w := range b.ways {
		w.rates = map[string][]float64{}
		if err := traffic.SetClient(w.from); err != nil {
			return err
		}
		if err := traffic.Serve(w.server); err != nil {
			return err
		}
	}
	for round := range b.rounds {
		if round%10 == 0 {
			fmt.Fprintf(os.Stderr, "pods: round %d of %d\n", round+1, b.rounds)
		}
		for j := range b.ways {
			if err := ctx.Err(); err != nil {
				return err
			}
			w := b.ways[(round+j)%len(b.ways)]
			for _, m := range traffic.Measures {
				if !slices.Contains(strings.Split(b.measures, ","), m.Name) {
					continue
				}
				rate, err := m.Take(w.from, w.to, b.slice)
				if err != nil {
					return fmt.Errorf("%s, %s, %s: %w", w.where, w.name, m.Name, err)
				}
				w.rates[m.Name] = append(w.rates[m.Name], rate)
			}
		}
	}
	return nil
}

// end ends what was started. Namespaces and mounts go with this process.
func (b *bench) end() {
	for _, p := range b.programs {
		_ = p.Process.Kill()
		_ = p.Wait()
	}
	b.programs = nil
}

// goals are what the project holds itself to, as a ratio to the plain pair, or to another way.
var goals = []struct {
	where, way, measure, to string
	least                   float64
}{
	{sameNode, "fathom", "RR", veth, 0.95},
	{sameNode, "fathom", "CRR", veth, 0.95},
	{sameNode, "fathom", "STREAM", veth, 1},
	{sameNode, "fathom", "8-STREAMS", veth, 1},
	{twoNodes, "fathom direct", "RR", veth, 0.85},
	{twoNodes, "fathom direct", "CRR", veth, 0.85},
	{twoNodes, "fathom vxlan", "RR", "flannel vxlan", 1},
	{twoNodes, "fathom vxlan", "CRR", "flannel vxlan", 1},
	{twoNodes, "fathom vxlan", "STREAM", "flannel vxlan", 1},
	{twoNodes, "fathom vxlan", "8-STREAMS", "flannel vxlan", 1},
}

func (w *way) best(measure string) float64 { return traffic.Best(w.rates[measure]) }

func (b *bench) find(where, name string) *way {
	for _, w := range b.ways {
		if w.where == where && w.name == name {
			return w
		}
	}
	return nil
}

func (b *bench) pathRows() (rows [][]string, missed []string) {
	for _, w := range b.ways {
		row := []string{w.where, w.name}
		plain := b.find(w.where, veth)
		for _, m := range traffic.Measures {
			switch {
			case len(w.rates[m.Name]) == 0:
				row = append(row, "-")
			case w != plain:
				row = append(row, fmt.Sprintf("%.2f", w.best(m.Name)/plain.best(m.Name)))
			case m.Bytes:
				row = append(row, fmt.Sprintf("%.1f Gbit/s", w.best(m.Name)*8/1e9))
			default:
				row = append(row, fmt.Sprintf("%.0f /s", w.best(m.Name)))
			}
		}
		rows = append(rows, row)
	}
	for _, g := range goals {
		w, to := b.find(g.where, g.way), b.find(g.where, g.to)
		if w == nil || to == nil || len(w.rates[g.measure]) == 0 {
			continue
		}
		if is := w.best(g.measure) / to.best(g.measure); is < g.least {
			missed = append(missed, fmt.Sprintf("%s, %s: %s is %.2f of %s, the goal is at least %.2f", g.where, g.way, g.measure, is, g.to, g.least))
		}
	}
	return rows, missed
}
