package main

import (
	"fmt"
	"time"

	"github.com/spf13/cobra"
)

func (a *app) status() *cobra.Command {
	var o output
	cmd := &cobra.Command{
		Use:     "status",
		Short:   "Show the state of a lab's clusters and nodes",
		Args:    cobra.NoArgs,
		PreRunE: requireRoot,
		RunE: func(cmd *cobra.Command, _ []string) error {
			l, err := a.open()
			if err != nil {
				return err
			}
			all, err := l.Status(cmd.Context(), a.cluster, 5*time.Second)
			if err != nil {
				return err
			}
			if o.format != "" {
				return o.print(a, all, "", nil)
			}
			for i, s := range all {
				if i > 0 {
					fmt.Fprintln(a.out)
				}
				fmt.Fprintf(a.out, "cluster %s: %s\n  API %s, network %s, proxy %s\n  pods %s, Services %s, %d of %d pods Ready\n\n",
					s.Name, s.State, s.API, s.Network, s.Proxy, s.PodCIDR, s.Service, s.PodsReady, s.Pods)
				var rows [][]string
				for _, n := range s.Nodes {
					ready := "no"
					if n.Ready {
						ready = "yes"
					}
					rows = append(rows, []string{n.Name, n.State, ready, n.Role, n.Addresses[0], n.PodCIDRs[0]})
				}
				if err := o.print(a, nil, "NODE STATE READY ROLE ADDRESS POD-CIDR", rows); err != nil {
					return err
				}
			}
			return nil
		},
	}
	o.register(cmd)
	return cmd
}
