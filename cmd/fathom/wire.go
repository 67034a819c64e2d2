package main

import (
	"fmt"

	"github.com/spf13/cobra"

	"github.com/fathom-network/fathom/internal/facts/topology"
)

func (a *app) wire() *cobra.Command {
	cmd := &cobra.Command{Use: "wire", Short: "Inspect, cut, slow and heal the links of nodes"}
	cmd.AddCommand(a.wireLs(), a.wireSlow(),
		a.nodeAction("cut NODE…", "Take the link of nodes down, as if the cable were pulled", func(_ *cobra.Command, node string) error {
			l, err := a.open()
			if err != nil {
				return err
			}
			return l.CutWire(node)
		}),
		a.nodeAction("heal NODE…", "Undo cut and slow", func(_ *cobra.Command, node string) error {
			l, err := a.open()
			if err != nil {
				return err
			}
			return l.HealWire(node)
		}))
	return cmd
}

func (a *app) wireLs() *cobra.Command {
	var o output
	cmd := &cobra.Command{
		Use: "ls", Short: "List the links of a lab", Args: cobra.NoArgs, PreRunE: requireRoot,
		RunE: func(*cobra.Command, []string) error {
			l, err := a.open()
			if err != nil {
				return err
			}
			all, err := l.Wires()
			if err != nil {
				return err
			}
			if _, err := l.Cluster(a.cluster); err != nil {
				return err
			}
			wires := all[:0]
			var rows [][]string
			for _, w := range all {
				if a.cluster != "" && w.Cluster != a.cluster {
					continue
				}
				wires = append(wires, w)
				rows = append(rows, []string{w.Node, "switch-" + w.Cluster, w.Port, w.State, w.Addresses, w.Rate, w.Delay, w.Loss})
			}
			return o.print(a, wires, "NODE SWITCH PORT STATE ADDRESS RATE DELAY LOSS", rows)
		},
	}
	o.register(cmd)
	return cmd
}

func (a *app) wireSlow() *cobra.Command {
	var w topology.Wire
	var loss string
	cmd := &cobra.Command{
		Use:   "slow NODE --rate RATE [--delay DELAY] [--loss PERCENT]",
		Short: "Limit the rate of a node's link, and delay and lose its packets, in both directions",
		Example: `  fathom wire slow east-worker1 --rate 10mbit
  fathom wire slow east-worker1 --rate 100mbit --delay 20ms --loss 1`,
		Args: cobra.ExactArgs(1), PreRunE: requireRoot, ValidArgsFunction: a.completeNodes,
		RunE: func(_ *cobra.Command, args []string) error {
			l, err := a.open()
			if err != nil {
				return err
			}
			if loss != "" {
				if w.Loss, err = topology.ParseLoss(loss); err != nil {
					return fmt.Errorf("--loss: %w", err)
				}
			}
			if w == (topology.Wire{}) {
				return fmt.Errorf("say how slow: --rate, --delay or --loss; `fathom wire heal %s` undoes it", args[0])
			}
			return l.SlowWire(args[0], w)
		},
	}
	cmd.Flags().StringVar(&w.Rate, "rate", "", "as tc(8) writes it, such as 10mbit")
	cmd.Flags().StringVar(&w.Delay, "delay", "", "added to each packet, such as 20ms; needs the kernel's netem")
	cmd.Flags().StringVar(&loss, "loss", "", "percent of packets lost; needs the kernel's netem")
	return cmd
}
