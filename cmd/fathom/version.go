package main

import (
	"fmt"
	"runtime"

	"github.com/spf13/cobra"

	"github.com/fathom-network/fathom/internal/kit"
	"github.com/fathom-network/fathom/internal/lab"
)

func (a *app) version() *cobra.Command {
	var o output
	cmd := &cobra.Command{
		Use:   "version",
		Short: "Show the version of fathom and of every program that it runs",
		Args:  cobra.NoArgs,
		RunE: func(*cobra.Command, []string) error {
			v := struct {
				Fathom string        `json:"fathom"`
				Go     string        `json:"go"`
				KitDir string        `json:"kitDir,omitempty"`
				Kit    *kit.Versions `json:"kit,omitempty"`
			}{Fathom: version, Go: runtime.Version()}
			rows := [][]string{{"fathom", v.Fathom}, {"go", v.Go}}
			k, err := kit.Find()
			if err == nil {
				v.KitDir, v.Kit = k.Dir, &k.Versions
				rows = append(rows, [][]string{
					{"kubernetes", k.Kubernetes}, {"etcd", k.Etcd}, {"containerd", k.Containerd}, {"runc", k.Runc},
					{"cni-plugins", k.CNIPlugins}, {"coredns", k.CoreDNS}, {"flannel", k.Flannel}, {"agnhost", k.Agnhost},
				}...)
			} else {
				fmt.Fprintln(a.err, "fathom:", err)
			}
			return o.print(a, v, "PROGRAM VERSION", rows)
		},
	}
	o.register(cmd)
	return cmd
}

// balancer is the load balancer of a cluster with several API servers; `up` starts it.
func (a *app) balancer() *cobra.Command {
	return &cobra.Command{
		Use:    lab.BalancerCommand + " LISTEN SERVER…",
		Short:  "Carry TCP connections to the first of the servers that answers",
		Hidden: true,
		Args:   cobra.MinimumNArgs(2),
		RunE: func(cmd *cobra.Command, args []string) error {
			return lab.Balance(cmd.Context(), args[0], args[1:])
		},
	}
}
