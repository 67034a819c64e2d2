package main

import (
	"fmt"
	"net/netip"

	"github.com/spf13/cobra"

	"github.com/fathom-network/fathom/internal/cni"
	"github.com/fathom-network/fathom/internal/facts/conflist"
	"github.com/fathom-network/fathom/internal/kernel/lease"
	"github.com/fathom-network/fathom/internal/kernel/link"
)

// release is the command that `fathom ipam release` runs in the pod of the agent whose node holds the address.
func release() *cobra.Command {
	return &cobra.Command{
		Use:   "release ADDRESS",
		Short: "Take back an address of this node from the pod that holds it, which loses it",
		Args:  cobra.ExactArgs(1),
		RunE: func(_ *cobra.Command, args []string) error {
			address, err := netip.ParseAddr(args[0])
			if err != nil {
				return err
			}
			store, err := lease.Open(conflist.DefaultDataDir, conflist.DefaultCoolDown)
			if err != nil {
				return err
			}
			node, err := link.Here()
			if err != nil {
				return err
			}
			defer node.Close()
			if err := cni.Release(node, store, address); err != nil {
				return fmt.Errorf("release %s: %w", address, err)
			}
			return nil
		},
	}
}
