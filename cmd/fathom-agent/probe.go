package main

import (
	"net/netip"
	"os"

	"github.com/spf13/cobra"

	"github.com/fathom-network/fathom/internal/agent"
	"github.com/fathom-network/fathom/internal/kernel/echo"
)

// probePackets is the command that `fathom ping` runs in each agent's pod.
func probePackets() *cobra.Command {
	var addresses []string
	o := agent.Options{Paths: agent.NodePaths()}
	cmd := &cobra.Command{
		Use:   "probe",
		Short: "Listen for test packets in every pod of this node, and send those that standard input asks for",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			var own []netip.Addr
			for _, s := range addresses {
				a, err := netip.ParseAddr(s)
				if err != nil {
					return err
				}
				own = append(own, a)
			}
			places, err := agent.Places(o, own)
			if err != nil {
				return err
			}
			return echo.Serve(places, cmd.InOrStdin(), cmd.OutOrStdout())
		},
	}
	f := cmd.Flags()
	f.StringVar(&o.Node, "node", os.Getenv("NODE_NAME"), "the `name` of this node's Node object")
	f.StringSliceVar(&addresses, "address", nil, "the node's own addresses")
	return cmd
}
