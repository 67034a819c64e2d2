package main

import (
	"os"
	"strings"

	"github.com/spf13/cobra"

	"github.com/fathom-network/fathom/internal/lab"
	"github.com/fathom-network/fathom/internal/watch/kube"
)

// target is the cluster that a network command works on, which need not be a lab's.
type target struct{ kubeconfig, context string }

func (t *target) register(cmd *cobra.Command) {
	cmd.Flags().StringVar(&t.kubeconfig, "kubeconfig", "", "the kubeconfig `file` of the cluster (default: as kubectl)")
	cmd.Flags().StringVar(&t.context, "context", "", "the `context` of the kubeconfig (default: the current one)")
}

const targetHelp = `The cluster is that of the kubeconfig's current context, as for kubectl. --kubeconfig and --context choose another,
and --name or --cluster a lab's.`

// withoutProxyToLabs exempts the API servers of this machine's labs from the environment's proxies.
func (a *app) withoutProxyToLabs() error {
	except := []string{noProxy()}
	names, _ := lab.Names(a.paths)
	for _, name := range names {
		l, err := lab.Open(a.paths, name)
		if err != nil {
			continue // another user's
		}
		for i := range l.Clusters {
			except = append(except, l.APIAddr(&l.Clusters[i]).String())
		}
	}
	return os.Setenv("NO_PROXY", strings.Trim(strings.Join(except, ","), ","))
}

// connect connects to the cluster that the flags choose, and returns its name for messages.
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
		if err := withoutProxy(); err != nil {
			return nil, "", err
		}
		client, err := kube.Connect(l.AdminKubeconfig(c))
		return client, l.Name + "-" + c.Name, err
	}
	// Labs are on this machine, which a proxy cannot reach.
	if err := a.withoutProxyToLabs(); err != nil {
		return nil, "", err
	}
	client, err := kube.ConnectContext(t.kubeconfig, t.context)
	if err != nil {
		return nil, "", err
	}
	return client, client.Host(), nil
}
