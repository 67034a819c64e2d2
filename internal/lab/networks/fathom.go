package networks

import (
	"context"
	"os"
	"strconv"

	"github.com/fathom-network/fathom/internal/facts/netconf"
	"github.com/fathom-network/fathom/internal/facts/topology"
	"github.com/fathom-network/fathom/internal/install"
	"github.com/fathom-network/fathom/internal/watch/kube"
)

// fathom is Fathom's own network, installed as `fathom install` does it.
type fathom struct{ nothing }

// Step implements Network.
func (fathom) Step() string { return "install the network" }

// Install implements Network. It makes the agents' pods, too, until the controllers begin, which make those that are not
// there.
func (fathom) Install(ctx context.Context, c Cluster, client *kube.Client, controllers <-chan struct{}) error {
	err := kube.WhenStarted(ctx, func() error { return install.Apply(ctx, client, installOptions(c)) })
	if err != nil {
		return err
	}
	ca, err := os.ReadFile(c.CA)
	if err != nil {
		return err
	}
	idle, stop := context.WithCancel(ctx)
	defer stop()
	go func() {
		select {
		case <-controllers:
			stop()
		case <-idle.Done():
		}
	}()
	var names []string
	for i := range c.Nodes {
		names = append(names, c.Nodes[i].Name)
	}
	if err := install.CreatePods(idle, client, names, string(ca)); idle.Err() == nil {
		return err
	}
	return nil
}

// installOptions are what `fathom install` would be told for the cluster.
func installOptions(c Cluster) install.Options {
	return install.Options{
		APIServer: c.API.String(),
		Config: map[string]string{"mode": c.Network.Mode, "vni": strconv.Itoa(c.Network.VNI), "port": strconv.Itoa(c.Network.Port),
			"serviceProxy": serviceProxy(c.Proxy), "dns": dnsSetting(c.DNS)},
	}
}

func serviceProxy(p topology.Proxy) string {
	if p.Kind != topology.ProxyFathom {
		return string(netconf.ProxyOff)
	}
	return p.Mode
}

// dnsSetting is the setting of a cluster, or of one that was described before there was a choice.
func dnsSetting(d topology.DNS) string {
	if d == "" {
		d = topology.DNSCluster
	}
	return string(d)
}
