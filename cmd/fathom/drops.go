package main

import (
	"encoding/json"
	"fmt"
	"time"

	"github.com/spf13/cobra"

	"github.com/fathom-network/fathom/internal/facts/answer"
	"github.com/fathom-network/fathom/internal/insight/verify"
)

// dropsInterval is how often nodes are asked while what they drop is followed.
const dropsInterval = time.Second

func (a *app) drops() *cobra.Command {
	var o output
	var t target
	var pod, node string
	var since time.Duration
	var follow, accepted bool
	cmd := &cobra.Command{
		Use:   "drops",
		Short: "List what NetworkPolicies and ClusterNetworkPolicies dropped, from whom to whom, and which rule or policy did",
		Long: `Lists the connections that policies did not let begin, as the agents of the nodes have recorded them: how often, from which
Pod, node or address to which, and the rule that denies it or the policies none of whose rules allows it. What policies that are audited
would drop is listed as audited.

An agent remembers the last 2,000 different connections. Each source has 10 packets a second recorded, so of one that sends very many
not all are counted. With --accepted a sample of what policies allow is listed, too, with the rule that does: of connections on the fast path none.

Agents are asked by running a command in their Pods, as ` + "`fathom verify`" + ` does: whoever may do that sees the drops of all namespaces.

` + targetHelp,
		Example: "fathom drops\nfathom drops -f --pod shop/web\nfathom drops --node worker-1 --since 5m -o json",
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if follow && o.format != "" && o.format != "json" {
				return fmt.Errorf("-o %s: with --follow, want json", o.format)
			}
			if pod != "" {
				if err := verify.CheckPodName(pod); err != nil {
					return err
				}
			}
			client, _, err := a.connect(cmd, t)
			if err != nil {
				return err
			}
			ctx := cmd.Context()
			d, err := verify.OpenDrops(ctx, client, node)
			if err != nil {
				return err
			}
			first := true
			for {
				records, problems, err := d.Next(ctx)
				if err != nil && ctx.Err() != nil && !first {
					return nil // it was told to end
				}
				if err != nil {
					return err
				}
				for _, p := range problems {
					fmt.Fprintln(a.err, p)
				}
				list := []answer.PolicyRecord{}
				for _, r := range records {
					if verify.DropsOf(pod, r) && (accepted || r.Verdict != answer.Accepted) && (!first || since == 0 || time.Since(r.Last) <= since) {
						list = append(list, r)
					}
				}
				if !follow {
					return a.printDrops(o, list)
				}
				if err := a.followDrops(o, list); err != nil {
					return err
				}
				first = false
				select {
				case <-ctx.Done():
					return nil
				case <-time.After(dropsInterval):
				}
			}
		},
	}
	f := cmd.Flags()
	f.BoolVarP(&follow, "follow", "f", false, "go on, with what is dropped from now on")
	f.StringVar(&pod, "pod", "", "only what this `namespace/name` sent or was sent")
	f.StringVar(&node, "node", "", "only what this `node` dropped (default: all)")
	f.DurationVar(&since, "since", 0, "only what was last seen within this time, such as 5m")
	f.BoolVar(&accepted, "accepted", false, "also a sample of what policies allow")
	o.register(cmd)
	t.register(cmd)
	return cmd
}

func dropRow(r answer.PolicyRecord) []string {
	port := r.Protocol
	if r.Port != 0 {
		port = fmt.Sprintf("%d/%s", r.Port, r.Protocol)
	}
	return []string{r.Last.Local().Format(time.TimeOnly), fmt.Sprint(r.Count), r.Node, r.Verdict, r.Direction, endText(r.From), endText(r.To), port, r.Why}
}

// endText is an end in a table, where a pod needs no address.
func endText(e answer.End) string {
	switch {
	case e.Pod != "":
		return e.Pod
	case e.Node != "":
		return "node " + e.Node
	}
	return e.Addr.String()
}

func (a *app) printDrops(o output, list []answer.PolicyRecord) error {
	rows := [][]string{}
	for _, r := range list {
		rows = append(rows, dropRow(r))
	}
	return o.print(a, list, "LAST COUNT NODE VERDICT DIRECTION FROM TO PORT WHY", rows)
}

// followDrops prints what came since, a line for each connection.
func (a *app) followDrops(o output, list []answer.PolicyRecord) error {
	for _, r := range list {
		if o.format == "json" {
			if err := json.NewEncoder(a.out).Encode(r); err != nil {
				return err
			}
			continue
		}
		row := dropRow(r)
		if _, err := fmt.Fprintf(a.out, "%s %s %s %s: %s > %s %s: %s (%s times)\n", row[0], row[2], row[3], row[4], row[5], row[6], row[7], row[8], row[1]); err != nil {
			return err
		}
	}
	return nil
}
