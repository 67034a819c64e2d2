package main

import (
	"errors"
	"fmt"
	"strconv"
	"strings"

	"github.com/spf13/cobra"

	"github.com/fathom-network/fathom/internal/insight/verify"
)

func (a *app) ping() *cobra.Command {
	var o output
	var t target
	var all bool
	cmd := &cobra.Command{
		Use:   "ping --all | FROM TO",
		Short: "Prove the network model with real packets between pods and nodes",
		Long: `Sends test packets between pods and nodes, there and back, in both families: a small one, one of the full MTU that
must not be fragmented, and one that must be. The receiver reports the source address that it saw: it must be the
sender's own. The agents send and answer in the pods' network namespaces, so pods need no program for it.

FROM and TO are names of pods, NAMESPACE/POD or POD in the namespace default, or node/NAME. The table has a row for
each sender: "." is good, "X" is not. The exit status is 0 if all is good.

` + targetHelp,
		Example: `  fathom ping --all
  fathom ping web-1 node/east-worker2`,
		Args: func(_ *cobra.Command, args []string) error {
			if all && len(args) > 0 || !all && len(args) != 2 {
				return errors.New("want --all, or two names: FROM TO")
			}
			return nil
		},
		RunE: func(cmd *cobra.Command, args []string) error {
			client, _, err := a.connect(cmd, t)
			if err != nil {
				return err
			}
			any := func(string) bool { return true }
			from, to := any, any
			if !all {
				from, to = named(args[0]), named(args[1])
			}
			m, err := verify.Ping(cmd.Context(), client, from, to)
			if err != nil {
				return err
			}
			if !all && len(m.Ways) == 0 && len(m.Problems) == 0 {
				return fmt.Errorf("cannot send from %s to %s: each must be a node, or a pod on the network", args[0], args[1])
			}
			if err := a.printMatrix(&o, m, all); err != nil {
				return err
			}
			if !m.OK() {
				return errors.New("the network is not what Kubernetes demands")
			}
			return nil
		},
	}
	cmd.Flags().BoolVar(&all, "all", false, "from every pod and node to every pod and node")
	o.register(cmd)
	t.register(cmd)
	return cmd
}

// named matches a place by its name as a user writes it.
func named(name string) func(string) bool {
	if !strings.Contains(name, "/") {
		name = "default/" + name
	}
	return func(place string) bool { return place == name }
}

func (a *app) printMatrix(o *output, m verify.Matrix, all bool) error {
	if o.format != "" {
		return o.print(a, m, "", nil)
	}
	if all {
		number := map[string]int{}
		header := []string{"FROM"}
		for i, p := range m.Places {
			number[p.Name] = i
			header = append(header, strconv.Itoa(i+1))
		}
		rows := make([][]string, len(m.Places))
		for i, p := range m.Places {
			rows[i] = append([]string{fmt.Sprintf("%d %s (%s)", i+1, p.Name, p.Node)}, make([]string, len(m.Places))...)
		}
		for _, w := range m.Ways {
			mark := "."
			if len(w.Problems) > 0 {
				mark = "X"
			}
			rows[number[w.From]][number[w.To]+1] = mark
		}
		if err := o.print(a, nil, strings.Join(header, " "), rows); err != nil {
			return err
		}
		fmt.Fprintln(a.out)
	} else {
		for _, w := range m.Ways {
			for _, r := range w.Probes {
				if r.Error == "" {
					fmt.Fprintf(a.out, "%d bytes to %s and back: %.3f ms, seen as %s\n", r.Size, r.To.Addr(), r.Seconds*1000, r.Source)
				}
			}
		}
	}
	packets, bad := 0, 0
	for _, w := range m.Ways {
		packets += len(w.Probes)
		if len(w.Problems) > 0 {
			bad++
		}
		for _, p := range w.Problems {
			fmt.Fprintf(a.out, "%s -> %s: %s\n", w.From, w.To, p)
		}
	}
	for _, p := range m.Problems {
		fmt.Fprintln(a.out, p)
	}
	fmt.Fprintf(a.out, "%d ways, %d packets there and back, %d ways are not as they should be\n", len(m.Ways), packets, bad)
	return nil
}
