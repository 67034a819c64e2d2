package main

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/fathom-network/fathom/internal/agent"
)

// questions returns the commands that query this node's agent; `fathom verify` and `fathom service show` run them in the
// agent's pod. Services have a command of their own, since there may be tens of thousands.
func questions() []*cobra.Command {
	question := func(use, short, path string) *cobra.Command {
		return &cobra.Command{
			Use:   use,
			Short: short,
			Args:  cobra.NoArgs,
			RunE:  func(cmd *cobra.Command, _ []string) error { return ask(cmd.Context(), cmd.OutOrStdout(), path) },
		}
	}
	return []*cobra.Command{
		drops(),
		question("state", "Print what the kernel of this node should hold, and what it holds, as JSON", "/v1/state"),
		question("services", "Print what the kernel of this node does with Services, as JSON", "/v1/services"),
		question("balancers", "Print which load balancers' addresses this node answers for and announces to routers, as JSON", "/v1/balancers"),
		question("policies", "Print what the kernel of this node holds of policies, as JSON", "/v1/policies"),
		question("flows", "Print which connections of pods this node sees, as JSON", "/v1/flows"),
		question("bgp", "Print what this node announces to which routers, as JSON", "/v1/bgp"),
	}
}

func drops() *cobra.Command {
	var after uint64
	cmd := &cobra.Command{
		Use:   "drops",
		Short: "Print what policies have dropped on this node, as JSON",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return ask(cmd.Context(), cmd.OutOrStdout(), fmt.Sprintf("/v1/drops?after=%d", after))
		},
	}
	cmd.Flags().Uint64Var(&after, "after", 0, "only what came after the packet of this number")
	return cmd
}

// ask prints the agent's answer.
func ask(ctx context.Context, out io.Writer, path string) error {
	socket := agent.NodePaths().Socket
	client := &http.Client{Timeout: 5 * time.Second, Transport: &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "unix", socket)
	}}}
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://agent"+path, nil)
	if err != nil {
		return err
	}
	response, err := client.Do(request)
	if err != nil {
		return fmt.Errorf("ask the agent: %w; does it run on this node?", err)
	}
	defer response.Body.Close()
	if response.StatusCode != http.StatusOK {
		why, _ := io.ReadAll(io.LimitReader(response.Body, 4096))
		return fmt.Errorf("the agent says %s: %s", response.Status, strings.TrimSpace(string(why)))
	}
	_, err = io.Copy(out, response.Body)
	return err
}
