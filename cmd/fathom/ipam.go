package main

import (
	"errors"
	"fmt"
	"math"
	"net/netip"
	"strconv"
	"strings"

	"github.com/spf13/cobra"

	"github.com/fathom-network/fathom/internal/insight/verify"
)

func (a *app) ipam() *cobra.Command {
	cmd := &cobra.Command{Use: "ipam", Short: "Inspect the addresses of pods, and take them back"}
	cmd.AddCommand(a.ipamShow(), a.ipamCheck(), a.ipamRelease())
	return cmd
}

func (a *app) ipamShow() *cobra.Command {
	var o output
	var t target
	var pods, pools, blocks bool
	cmd := &cobra.Command{
		Use:   "show",
		Short: "Show how full each node's ranges are, or which pod has which address",
		Long: "Shows how full the ranges of each node are; with --pods which pod has which address, with --pools how much of each\n" +
			"IPPool nodes have taken, and with --blocks which node has which part of them.\n\n" + targetHelp,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			client, _, err := a.connect(cmd, t)
			if err != nil {
				return err
			}
			all, err := verify.ReadAddresses(cmd.Context(), client)
			if err != nil {
				return err
			}
			header, rows := "NODE POOL RANGES SIZE IN-USE COOLING", [][]string{}
			for _, p := range all.Pools {
				var ranges []string
				for _, r := range p.Ranges {
					ranges = append(ranges, r.String())
				}
				rows = append(rows, []string{p.Node, p.Pool, strings.Join(ranges, ","), addressCount(p.Size), strconv.FormatUint(p.InUse, 10), strconv.FormatUint(p.Cooling, 10)})
			}
			if pods {
				header, rows = "NODE POD ADDRESSES POOL DEVICE SINCE", nil
				for _, l := range all.Leases {
					var addresses []string
					for _, x := range l.Addresses {
						addresses = append(addresses, x.String())
					}
					rows = append(rows, []string{l.Node, l.Namespace + "/" + l.Pod, strings.Join(addresses, ","), l.Pool, l.Device, l.Time.UTC().Format("2006-01-02T15:04:05Z")})
				}
			}
			if pools {
				header, rows = "POOL RANGE BLOCKS TAKEN SIZE NODES STATE", nil
				for _, p := range all.IPPools {
					for i, r := range p.Ranges {
						u := p.Status[i]
						rows = append(rows, []string{p.Pool, r.String(), fmt.Sprint(u.Blocks), addressCount(uint64(u.Taken)), addressCount(uint64(u.Addresses)), fmt.Sprint(p.Nodes), p.State})
					}
				}
			}
			if blocks {
				header, rows = "BLOCK POOL NODE IN-USE SIZE FIXED STATE", nil
				for _, b := range all.Blocks {
					state := "Used"
					if b.Refused != "" {
						state = "Refused: " + b.Refused
					}
					rows = append(rows, []string{b.Block.String(), b.Pool, b.Node, fmt.Sprint(b.InUse), addressCount(b.Size), strconv.FormatBool(b.Fixed), state})
				}
			}
			if err := o.print(a, all, header, rows); err != nil {
				return err
			}
			if len(all.Problems) > 0 {
				return errors.New(strings.Join(all.Problems, "\n"))
			}
			return nil
		},
	}
	cmd.Flags().BoolVar(&pods, "pods", false, "list every pod's addresses")
	cmd.Flags().BoolVar(&pools, "pools", false, "list the IPPools")
	cmd.Flags().BoolVar(&blocks, "blocks", false, "list the blocks of IPPools that nodes have")
	cmd.MarkFlagsMutuallyExclusive("pods", "pools", "blocks")
	o.register(cmd)
	t.register(cmd)
	return cmd
}

// addressCount formats a number of addresses.
func addressCount(n uint64) string {
	if n >= math.MaxInt64 {
		return "2^63 or more"
	}
	return strconv.FormatUint(n, 10)
}

func (a *app) ipamCheck() *cobra.Command {
	var t target
	cmd := &cobra.Command{
		Use:   "check",
		Short: "Compare the addresses that nodes hold with the pods that the API knows",
		Long: `Finds addresses that two pods have, pods whose addresses differ from their leases, leases without a pod, blocks of
IPPools that no node uses, and blocks of deleted nodes. The exit status is 0 if there are none.

` + targetHelp,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			client, _, err := a.connect(cmd, t)
			if err != nil {
				return err
			}
			found, err := verify.CheckAddresses(cmd.Context(), client)
			if err != nil {
				return err
			}
			for _, f := range found {
				fmt.Fprintln(a.out, f)
			}
			if len(found) > 0 {
				return fmt.Errorf("%d addresses differ from what the API implies", len(found))
			}
			fmt.Fprintln(a.out, "every lease belongs to exactly one pod")
			return nil
		},
	}
	t.register(cmd)
	return cmd
}

func (a *app) ipamRelease() *cobra.Command {
	var t target
	var force bool
	cmd := &cobra.Command{
		Use:   "release ADDRESS",
		Short: "Take back an address that is held for a pod that is gone",
		Long: `Takes back an address, and the one of the other family in the same lease. Agents take back addresses themselves when
a pod goes without a CNI DEL; this command is for cases that they cannot detect.

` + targetHelp,
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			address, err := netip.ParseAddr(args[0])
			if err != nil {
				return fmt.Errorf("%q is not an address; want something like 10.244.1.7", args[0])
			}
			client, _, err := a.connect(cmd, t)
			if err != nil {
				return err
			}
			l, err := verify.Release(cmd.Context(), client, address, force)
			var held *verify.HeldError
			if errors.As(err, &held) {
				return fmt.Errorf("%w; with --force it is taken back all the same, and another pod may get it", err)
			}
			if err != nil {
				return err
			}
			fmt.Fprintf(a.out, "%s, held for pod %s/%s on node %s, is released; it can be assigned again after a pause.\n", address, l.Namespace, l.Pod, l.Node)
			return nil
		},
	}
	cmd.Flags().BoolVar(&force, "force", false, "even if its pod exists, which then loses the address")
	t.register(cmd)
	return cmd
}
