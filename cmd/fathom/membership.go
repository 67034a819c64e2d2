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
		Short: "The key by which agents know each other",
		Long: `Agents ask each other whether they live, for load balancers' addresses to move to another node when one loses power.
What they say is encrypted with a key that all of them have: the Secret fathom-membership in fathom-system.`,
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
		Short: "Have the agents know each other by another key",
		Long: `Makes a key, has all agents understand it, then use it, and then forget the one before. Agents read the Secret every half
minute, so that it takes about two. They hear each other all the time: no address moves. Interrupted, it goes on when it is
run again; an agent that does not answer is waited for.

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
