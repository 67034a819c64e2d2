package main

import (
	"context"
	"fmt"
	"time"

	"github.com/spf13/cobra"

	"github.com/fathom-network/fathom/internal/insight/verify"
)

func (a *app) membership() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "membership",
		Short: "The key of the agents' membership",
		Long: `Agents probe each other, so that a load balancer's address moves to another node when its node loses power. Their
messages are encrypted with a key that all of them share: the Secret fathom-membership in fathom-system.`,
		Args: cobra.NoArgs,
	}
	cmd.AddCommand(a.membershipRotate())
	return cmd
}

func (a *app) membershipRotate() *cobra.Command {
	var t target
	var timeout time.Duration
	cmd := &cobra.Command{
		Use:   "rotate",
		Short: "Replace the key of the agents' membership",
		Long: `Creates a key, waits until all agents accept it and then until all use it, and drops the previous key. Agents read the
Secret every half minute, so this takes about two minutes. They understand each other all the time: no address moves.
Run it again to continue an interrupted rotation. It waits for agents that do not answer.

` + targetHelp,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			client, _, err := a.connect(cmd, t)
			if err != nil {
				return err
			}
			ctx, cancel := context.WithTimeoutCause(cmd.Context(), timeout, fmt.Errorf("it took more than %v", timeout))
			defer cancel()
			return verify.RotateKey(ctx, client, func(what string) { fmt.Fprintln(a.out, what) })
		},
	}
	cmd.Flags().DurationVar(&timeout, "timeout", 5*time.Minute, "how long to wait for all agents")
	t.register(cmd)
	return cmd
}
