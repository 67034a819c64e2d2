package main

import (
	"log/slog"
	"os"

	"github.com/spf13/cobra"

	"github.com/fathom-network/fathom/internal/agent"
)

// clean is what the DaemonSet runs instead of `run` while the network is uninstalled.
func clean() *cobra.Command {
	o := agent.Options{Paths: agent.NodePaths()}
	cmd := &cobra.Command{
		Use:   "clean",
		Short: "Remove what the agent and the plugin made on this node, and wait to be stopped",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			o.Log = slog.New(slog.NewJSONHandler(cmd.ErrOrStderr(), nil))
			o.Log.Info("cleaning", "version", version)
			return agent.Clean(cmd.Context(), o)
		},
	}
	f := cmd.Flags()
	f.StringVar(&o.Node, "node", os.Getenv("NODE_NAME"), "the `name` of this node's Node object")
	registerPaths(f, &o)
	return cmd
}
