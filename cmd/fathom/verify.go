package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"strconv"

	"github.com/spf13/cobra"

	"github.com/fathom-network/fathom/internal/insight/verify"
	"github.com/fathom-network/fathom/internal/watch/kube"
)

func (a *app) verify() *cobra.Command {
	cmd := &cobra.Command{Use: "verify", Short: "Verify that nodes' kernels hold what the API implies"}
	cmd.AddCommand(a.verifyPods(), a.verifyServices(), a.verifyPolicy(), a.verifyBGP())
	return cmd
}

// errDiffers ends a verification that found differences, after they were printed.
var errDiffers = errors.New("the kernel differs from what the API implies")

func (a *app) verifyPods() *cobra.Command {
	return a.verification(&cobra.Command{
		Use:   "pods",
		Short: "Compare every node's routes, neighbours, devices, rules and addresses with Nodes and Pods",
		Long: `Reads back every node's kernel and reports where it differs from what the API implies: missing or stale routes,
neighbours and forwarding entries, devices, leases without a pod, masquerade, the rules that drop false sources, and
sysctls. This command computes what is expected from the cluster's objects; the agents only read their kernels. The exit
status is 0 if nothing differs.

` + targetHelp,
	}, verify.Run, "NODE MODE PODS ROUTES KERNEL", func(n verify.NodeReport) []string {
		return []string{n.Node, cmp.Or(n.Mode, "-"), strconv.Itoa(n.Pods), strconv.Itoa(n.Routes), verdict(n)}
	})
}

func (a *app) verifyServices() *cobra.Command {
	return a.verification(&cobra.Command{
		Use:   "services",
		Short: "Compare every node's balancing of Services with Services and EndpointSlices",
		Long: `Reads back what every node's kernel does with Services, in nftables, at connect() and in connection tracking, and
reports where it differs from what the API implies. This command computes what is expected from the cluster's objects;
the agents only read their kernels. The exit status is 0 if nothing differs.

` + targetHelp,
	}, verify.RunServices, "NODE PROXY NFTABLES CONNECT KERNEL", func(n verify.NodeReport) []string {
		return []string{n.Node, cmp.Or(n.Mode, "-"), strconv.Itoa(n.Frontends), strconv.Itoa(n.Connect), verdict(n)}
	})
}

func (a *app) verifyPolicy() *cobra.Command {
	return a.verification(&cobra.Command{
		Use:   "policy",
		Short: "Compare what every node's kernel holds of policies with the API",
		Long: `Reads back what every node's kernel holds of policies, and reports where it differs from what the API implies: pods that
are open to what policies forbid, or closed to what they allow, by which policy and rule; addresses that count as another
pod's; rules that somebody changed. This command computes what is expected from the cluster's objects; the agents only
read their kernels. The exit status is 0 if nothing differs.

` + targetHelp,
	}, verify.RunPolicies, "NODE PODS ISOLATED KERNEL", func(n verify.NodeReport) []string {
		return []string{n.Node, strconv.Itoa(n.Pods), strconv.Itoa(n.Isolated), verdict(n)}
	})
}

func (a *app) verifyBGP() *cobra.Command {
	return a.verification(&cobra.Command{
		Use:   "bgp",
		Short: "Compare every node's BGP sessions and announcements with BGPPeers",
		Long: `Asks every node's agent for its BGP sessions and announcements, and reports where these differ from what the
cluster's BGPPeers, Nodes and address pools imply: sessions that are missing, not established, or too many; prefixes that
are missing, stale, or announced with other attributes; aggregates whose unused addresses the kernel does not refuse.
This command computes what is expected from the cluster's objects. The exit status is 0 if nothing differs.

` + targetHelp,
	}, verify.RunBGP, "NODE SESSIONS PREFIXES BGP", func(n verify.NodeReport) []string {
		return []string{n.Node, strconv.Itoa(n.Sessions), strconv.Itoa(n.Prefixes), verdict(n)}
	})
}

// verification completes a command that compares every node with the API: run compares, and row returns a node's row of
// the table.
func (a *app) verification(cmd *cobra.Command, run func(context.Context, *kube.Client) (verify.Report, error), header string, row func(verify.NodeReport) []string) *cobra.Command {
	var o output
	var t target
	cmd.Args = cobra.NoArgs
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		client, _, err := a.connect(cmd, t)
		if err != nil {
			return err
		}
		report, err := run(cmd.Context(), client)
		if err != nil {
			return err
		}
		var rows [][]string
		for _, n := range report.Nodes {
			rows = append(rows, row(n))
		}
		return a.printReport(o, report, header, rows)
	}
	o.register(cmd)
	t.register(cmd)
	return cmd
}

func verdict(n verify.NodeReport) string {
	if len(n.Differences) > 0 {
		return fmt.Sprintf("%d differences", len(n.Differences))
	}
	return "as the API implies"
}

// printReport prints a report, and returns errDiffers if it has differences.
func (a *app) printReport(o output, report verify.Report, header string, rows [][]string) error {
	if err := o.print(a, report, header, rows); err != nil {
		return err
	}
	if report.OK() {
		return nil
	}
	if o.format == "" {
		fmt.Fprintln(a.out)
		for _, n := range report.Nodes {
			for _, d := range n.Differences {
				fmt.Fprintf(a.out, "%s: %s\n", cmp.Or(n.Node, "cluster"), d)
			}
		}
	}
	return errDiffers
}
