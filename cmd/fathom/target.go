package main

import (
	"github.com/spf13/cobra"

	"github.com/fathom-network/fathom/internal/kube"
)

// target is the cluster that a command about the network works on: any cluster, not only one of a lab.
type target struct{ kubeconfig, context string }

func (t *target) register(cmd *cobra.Command) {
	cmd.Flags().StringVar(&t.kubeconfig, "kubeconfig", "", "the kubeconfig `file` of the cluster (default: as kubectl)")
	cmd.Flags().StringVar(&t.context, "context", "", "the `context` of the kubeconfig (default: the current one)")
}

const targetHelp = `The cluster is that of the kubeconfig's current context, as for kubectl, unless --kubeconfig or --context say
otherwise. --name or --cluster choose a cluster of a lab.`

// connect connects to the cluster that the flags choose, and returns how a person would call it.
func (a *app) connect(cmd *cobra.Command, t target) (*kube.Client, string, error) {
	asked := cmd.Flags().Changed("name") || cmd.Flags().Changed("cluster")
	if asked && t.kubeconfig == "" && t.context == "" {
		l, err := a.open()
		if err != nil {
			return nil, "", err
		}
		c, err := l.Cluster(a.cluster)
		if err != nil {
			return nil, "", err
		}
		client, err := kube.Connect(l.AdminKubeconfig(c))
		return client, l.Name + "-" + c.Name, err
	}
	client, err := kube.ConnectContext(t.kubeconfig, t.context)
	if err != nil {
		return nil, "", err
	}
	return client, client.Host(), nil
}
