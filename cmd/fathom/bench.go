package main

import (
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/fathom-network/fathom/internal/insight/svcbench"
	"github.com/fathom-network/fathom/internal/kit"
)

func (a *app) bench() *cobra.Command {
	cmd := &cobra.Command{Use: "bench", Short: "Measure on this machine, without a cluster"}
	cmd.AddCommand(a.benchServices())
	return cmd
}

func (a *app) benchServices() *cobra.Command {
	var o output
	var sizes []string
	b := svcbench.Options{Part: []string{"/proc/self/exe", benchPart}}
	cmd := &cobra.Command{
		Use:   "services",
		Short: "Measure how fast Services are, by Fathom and by kube-proxy, in one run",
		Long: `Creates namespaces with nodes, pods and a real API server, runs each proxy there with the same Services, and measures:

  CRR, RR      connections with a request and a response, and requests on one connection, to a Service, as a ratio to
               the endpoint itself on the same node; measured in short turns, medians
  BARE         connections to the endpoint itself, as a ratio to a node without any proxy
  START        from the start of the proxy until a sample of the Services answers
  PROGRAM      the part of it that the proxy itself reports as work on the kernel
  CHANGE       from another watch's event about new endpoints until a connection reaches them
  CPU          of one processor, at 100 changes per second
  MEMORY       anonymous memory of the proxy's process, without what the kernel holds

Fathom's proxy runs twice: connect translates sockets of the node when they connect, nftables translates packets.
Nothing is left behind, and nothing outside these namespaces is touched. Run nothing else on the machine meanwhile.`,
		Example: "sudo fathom bench services\nsudo fathom bench services --sizes 10000x10,50000x5 --proxies connect,nftables",
		Args:    cobra.NoArgs,
		PreRunE: requireRoot,
		RunE: func(cmd *cobra.Command, _ []string) error {
			var err error
			if b.Sizes, err = svcbench.ParseSizes(sizes); err != nil {
				return err
			}
			for _, p := range b.Proxies {
				if !slices.Contains(svcbench.Proxies, p) {
					return fmt.Errorf("--proxies: %q: want some of %s", p, strings.Join(svcbench.Proxies, ", "))
				}
			}
			// Without a kit, only Fathom is measured.
			if k, err := kit.Find(); err != nil {
				fmt.Fprintln(a.err, "without kube-proxy and a real API server:", err)
			} else if err := k.Require(k.Bin("etcd"), k.Bin("kube-apiserver"), k.Bin("kube-proxy")); err != nil {
				fmt.Fprintln(a.err, "without kube-proxy and a real API server:", err)
			} else {
				b.KitDir = k.Dir
			}
			report, err := svcbench.Run(cmd.Context(), b, a.err)
			if err != nil {
				return err
			}
			if err := o.print(a, report, svcbench.Header, report.Rows()); err != nil || o.format != "" {
				return err
			}
			fmt.Fprintln(a.out)
			for _, note := range report.Notes() {
				fmt.Fprintln(a.out, note)
			}
			for _, missed := range report.Missed() {
				fmt.Fprintln(a.out, "missed:", missed)
			}
			return nil
		},
	}
	f := cmd.Flags()
	f.StringSliceVar(&sizes, "sizes", []string{"10x10", "1000x10", "10000x10"}, "`SERVICESxENDPOINTS` of each round")
	f.StringSliceVar(&b.Proxies, "proxies", svcbench.Proxies, "which `proxies` take part")
	f.IntVar(&b.PeersUpTo, "peers-up-to", 10_000, "the largest `number` of Services to measure kube-proxy with")
	f.IntVar(&b.Rounds, "rounds", 20, "how many `rounds` of connections")
	f.IntVar(&b.Changes, "changes", 100, "how many `changes` of endpoints are measured, at most")
	f.DurationVar(&b.Patience, "patience", 2*time.Minute, "what `duration` a proxy may take to serve all Services after its start")
	f.DurationVar(&b.Load, "load", 5*time.Second, "for what `duration` to make 100 changes per second")
	_ = cmd.RegisterFlagCompletionFunc("proxies", cobra.FixedCompletions(svcbench.Proxies, cobra.ShellCompDirectiveNoFileComp))
	o.register(cmd)
	return cmd
}

// benchPart is the command by which a measurement starts its processes.
const benchPart = "bench-part"

func (a *app) benchPart() *cobra.Command {
	return &cobra.Command{
		Use:    benchPart + " PART ARGUMENT",
		Short:  "Be a part of a measurement",
		Hidden: true,
		Args:   cobra.ExactArgs(2),
		RunE: func(cmd *cobra.Command, args []string) error {
			return svcbench.Part(cmd.Context(), args[0], args[1])
		},
	}
}
