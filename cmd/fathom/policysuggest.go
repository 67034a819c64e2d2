package main

import (
	"errors"
	"fmt"
	"time"

	"github.com/spf13/cobra"

	"github.com/fathom-network/fathom/internal/facts/policy"
	"github.com/fathom-network/fathom/internal/facts/policyfacts"
	"github.com/fathom-network/fathom/internal/insight/verify"
)

func (a *app) policySuggest() *cobra.Command {
	var t target
	var namespace string
	var during time.Duration
	var audit bool
	cmd := &cobra.Command{
		Use:   "suggest",
		Short: "Print the narrowest NetworkPolicies that allow the connections seen",
		Long: `Prints, as YAML that can be applied, a NetworkPolicy for the Pods of each workload of which a connection is seen: for ingress and
egress, with the peers and ports of these connections and, if Pods answer them, DNS queries. A comment at each rule says what it is from.

Seen are connections that are open or were within the last minutes, as the nodes' kernels track them, and those recorded by fathom drops as accepted
or audited. Of what the fast path carries, only TCP that is open at the moment is seen, so give --during some minutes in which everything is
used that is to be allowed. Pods of which nothing is seen get no policy. What is not needed every minute is not seen: look before you apply,
or apply with --audit and see by fathom drops what is missing.

` + targetHelp,
		Example: "fathom policy suggest --namespace shop --during 5m --audit > policies.yaml\nkubectl apply -f policies.yaml",
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			client, _, err := a.connect(cmd, t)
			if err != nil {
				return err
			}
			seen, problems, err := verify.SeenFlows(cmd.Context(), client, during)
			if err != nil {
				return err
			}
			c, err := verify.ReadPolicies(cmd.Context(), client)
			if err != nil {
				return err
			}
			list := c.Suggest(seen, namespace)
			if len(list) == 0 {
				return errors.Join(append(problems, errors.New("no connection of a Pod is seen: give --during a time in which there are some"))...)
			}
			for _, p := range problems {
				fmt.Fprintln(a.err, p)
			}
			for _, s := range list {
				if audit {
					s.Policy.Labels = map[string]string{policy.Audit: "true"}
				}
			}
			out, err := policyfacts.YAML(list)
			if err != nil {
				return err
			}
			_, err = a.out.Write(out)
			return err
		},
	}
	f := cmd.Flags()
	f.StringVarP(&namespace, "namespace", "n", "", "only for Pods of this namespace (default: all)")
	f.DurationVar(&during, "during", 0, "watch for so long, such as 5m, and not only once")
	f.BoolVar(&audit, "audit", false, "policies that drop nothing, and say what they would: with the label "+policy.Audit)
	t.register(cmd)
	return cmd
}
