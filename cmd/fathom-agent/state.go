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

	"github.com/fathom-network/fathom/internal/dataplane"
)

// state asks the agent that runs on this node; `fathom verify` runs it in the agent's pod.
func state() *cobra.Command {
	return &cobra.Command{
		Use:   "state",
		Short: "Tell what the agent of this node should hold in the kernel, and what it does, as JSON",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return ask(cmd.Context(), cmd.OutOrStdout(), "/v1/state")
		},
	}
}

// services is the same for Services, of which there may be tens of thousands.
func services() *cobra.Command {
	return &cobra.Command{
		Use:   "services",
		Short: "Tell what the kernel of this node does with Services, as JSON",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return ask(cmd.Context(), cmd.OutOrStdout(), "/v1/services")
		},
	}
}

// balancers is the same for load balancers' addresses.
func balancers() *cobra.Command {
	return &cobra.Command{
		Use:   "balancers",
		Short: "Tell which load balancers' addresses this node answers for and tells routers of, as JSON",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return ask(cmd.Context(), cmd.OutOrStdout(), "/v1/balancers")
		},
	}
}

// ask copies what the agent answers.
func ask(ctx context.Context, out io.Writer, path string) error {
	socket := dataplane.NodePaths().Socket
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
