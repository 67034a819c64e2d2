package main

import (
	"fmt"
	"net/netip"
	"os"
	"strings"

	"github.com/spf13/cobra"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/fathom-network/fathom/internal/facts/policyfacts"
	"github.com/fathom-network/fathom/internal/insight/verify"
)

func (a *app) policy() *cobra.Command {
	cmd := &cobra.Command{Use: "policy", Short: "Explain what NetworkPolicies and ClusterNetworkPolicies allow, and what others would"}
	cmd.AddCommand(a.policyExplain(), a.policyMatrix(), a.policyTry(), a.policySuggest())
	return cmd
}

// readPolicies reads what the policies of the target's cluster are about.
func (a *app) readPolicies(cmd *cobra.Command, t target) (policyfacts.Cluster, error) {
	client, _, err := a.connect(cmd, t)
	if err != nil {
		return policyfacts.Cluster{}, err
	}
	return verify.ReadPolicies(cmd.Context(), client)
}

func (a *app) policyExplain() *cobra.Command {
	var o output
	var t target
	var namespace string
	cmd := &cobra.Command{
		Use:   "explain FROM TO[:PORT[/PROTOCOL]]",
		Short: "Say whether policies allow a connection, and which rule does or why none does",
		Long: `Says whether NetworkPolicies and ClusterNetworkPolicies allow a connection from FROM to TO, each a Pod (NAME or
NAMESPACE/NAME) or an address, in or outside of the cluster. PROTOCOL is TCP, UDP or SCTP; the default is TCP. Without PORT the question is about what has no
ports, such as a ping. An IPv6 address with a port is written in brackets.

Of each of the two pods it says which policies isolate it, and which rule allows or denies the connection, by its place
in the policy's YAML; or, if none allows it, why not each of them. It is worked out from the API's objects in the same way as nodes'
agents work out what kernels hold; whether a kernel holds it, ` + "`fathom verify policy`" + ` says.

TO may be a Service, as svc/NAME, svc/NAMESPACE/NAME or its DNS name (NAME.NAMESPACE.svc), with one of its ports. What counts
is the pod that answers: each that may is told, with the port that it is met at.

` + targetHelp,
		Example: "fathom policy explain client web:80\nfathom policy explain ops/probe shop/db:5432/TCP\nfathom policy explain shop/db 192.0.2.7:53/UDP\n" +
			"fathom policy explain ops/probe svc/shop/db:80\nfathom policy explain ops/probe db.shop.svc:80\n" +
			"fathom policy explain 192.0.2.7 '[fd00:10:244:1::7]:443' -o json",
		Args: cobra.ExactArgs(2),
		RunE: func(cmd *cobra.Command, args []string) error {
			q, err := verify.ParsePolicyQuery(args[0], args[1], namespace)
			if err != nil {
				return err
			}
			client, _, err := a.connect(cmd, t)
			if err != nil {
				return err
			}
			c, err := verify.ReadPolicies(cmd.Context(), client)
			if err != nil {
				return err
			}
			enforced, err := verify.PoliciesEnforced(cmd.Context(), client)
			if err != nil {
				return err
			}
			if !enforced {
				fmt.Fprintln(a.err, "No agent of Fathom's network runs in this cluster: this is what policies say, and its network may enforce nothing of it.")
			}
			explain := func() ([]policyfacts.Explanation, error) { return verify.ExplainPolicy(c, q) }
			if s := q.To.Service; s.Name != "" {
				services, slices, err := verify.ReadServices(cmd.Context(), client, s.Namespace)
				if err != nil {
					return err
				}
				explain = func() ([]policyfacts.Explanation, error) {
					return verify.ExplainPolicyToService(c, q, services, slices)
				}
			}
			all, err := explain()
			if err != nil {
				return err
			}
			if o.format != "" {
				return o.print(a, all, "", nil)
			}
			for _, e := range all {
				a.printPolicy(e)
			}
			return nil
		},
	}
	cmd.Flags().StringVarP(&namespace, "namespace", "n", metav1.NamespaceDefault, "the namespace of Pods that are named without one")
	o.register(cmd)
	t.register(cmd)
	return cmd
}

func (a *app) policyMatrix() *cobra.Command {
	var o output
	var t target
	var namespace string
	cmd := &cobra.Command{
		Use:   "matrix",
		Short: "List what policies allow between each two Pods",
		Long: `Lists what NetworkPolicies and ClusterNetworkPolicies allow from each Pod to each other: all, none, or which ports. Pods of the node's network are
left out: to policies they are their node. It is worked out from the API's objects, as explain does.

` + targetHelp,
		Example: "fathom policy matrix\nfathom policy matrix --namespace shop -o json",
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			c, err := a.readPolicies(cmd, t)
			if err != nil {
				return err
			}
			all, rows := c.Matrix(namespace), [][]string{}
			for _, p := range all {
				rows = append(rows, []string{p.From, p.To, p.AllowedText()})
			}
			return o.print(a, all, "FROM TO ALLOWED", rows)
		},
	}
	cmd.Flags().StringVarP(&namespace, "namespace", "n", "", "only pairs with a Pod of this namespace (default: all)")
	o.register(cmd)
	t.register(cmd)
	return cmd
}

func (a *app) policyTry() *cobra.Command {
	var o output
	var t target
	var namespace, file string
	cmd := &cobra.Command{
		Use:   "try -f FILE",
		Short: "List the pairs of Pods for which policies in a file would make a difference",
		Long: `Lists the pairs of Pods between which something else would be allowed if the NetworkPolicies and ClusterNetworkPolicies
in a file were applied: new ones beside those that there are, and others in the place of those of the same names. It changes nothing in the cluster.

` + targetHelp,
		Example: "fathom policy try -f deny.yaml\nfathom policy try --namespace shop -f - < deny.yaml",
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			in := cmd.InOrStdin()
			if file != "-" {
				f, err := os.Open(file)
				if err != nil {
					return err
				}
				defer f.Close()
				in = f
			}
			policies, err := verify.ParsePolicies(in, namespace)
			if err != nil {
				return fmt.Errorf("%s: %w", file, err)
			}
			c, err := a.readPolicies(cmd, t)
			if err != nil {
				return err
			}
			all, rows := c.Compare(c.With(policies)), [][]string{}
			for _, d := range all {
				rows = append(rows, []string{d.From, d.To, d.Now, d.Then})
			}
			return o.print(a, all, "FROM TO NOW THEN", rows)
		},
	}
	cmd.Flags().StringVarP(&file, "filename", "f", "", "the `file` with policies, - for stdin")
	_ = cmd.MarkFlagRequired("filename")
	cmd.Flags().StringVarP(&namespace, "namespace", "n", metav1.NamespaceDefault, "the namespace of NetworkPolicies that name none")
	o.register(cmd)
	t.register(cmd)
	return cmd
}

// printPolicy prints an explanation for people.
func (a *app) printPolicy(e policyfacts.Explanation) {
	what := "what has no ports"
	if e.Port != 0 {
		what = fmt.Sprintf("port %d/%s", e.Port, e.Protocol)
	}
	if e.Service != "" {
		what += " for Service " + e.Service
	}
	fmt.Fprintf(a.out, "From %s to %s, %s: %s\n", who(e.From, e.FromAddr), who(e.To, e.ToAddr), what, verdictOf(e.Allowed))
	if e.Always != "" {
		fmt.Fprintf(a.out, "  %s, whatever policies say\n", e.Always)
		return
	}
	if len(e.Sides) == 0 {
		fmt.Fprintln(a.out, "  neither is a pod with a network of its own: policies are not about it")
	}
	for _, s := range e.Sides {
		fmt.Fprintf(a.out, "  %s of %s: ", s.Direction, s.Pod)
		switch {
		case len(s.Audit) > 0:
			fmt.Fprintf(a.out, "allowed; audit: %s would drop it\n", strings.Join(s.Audit, ", "))
		case !s.Isolated:
			fmt.Fprintln(a.out, "allowed, no policy isolates it")
		case s.By != "":
			fmt.Fprintf(a.out, "%s by %s\n", verdictOf(s.Allowed), s.By)
		default:
			fmt.Fprintln(a.out, "denied, no rule allows it")
		}
		if s.Passed != "" {
			fmt.Fprintf(a.out, "    passed on by %s\n", s.Passed)
		}
		if s.Isolated && !strings.HasPrefix(s.By, policyfacts.ClusterKind+" ") {
			fmt.Fprintf(a.out, "    isolated by %s\n", strings.Join(s.Policies, ", "))
		}
		for _, r := range s.Not {
			fmt.Fprintf(a.out, "    %s %s\n", r.Rule, r.Why)
		}
	}
}

func who(name string, addr netip.Addr) string {
	if name == "" {
		return addr.String()
	}
	return fmt.Sprintf("%s (%s)", name, addr)
}

func verdictOf(allowed bool) string {
	if allowed {
		return "allowed"
	}
	return "denied"
}
