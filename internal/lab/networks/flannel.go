package networks

import (
	"bytes"
	"context"
	_ "embed"
	"text/template"

	"github.com/fathom-network/fathom/internal/facts/topology"
	"github.com/fathom-network/fathom/internal/watch/kube"
)

// flannel is flannel, with its vxlan.
type flannel struct{ nothing }

//go:embed flannel.yaml
var flannelManifest string

// Step implements Network.
func (flannel) Step() string { return "create flannel" }

// Install implements Network: it creates the objects of flannel's own manifest, with the cluster's ranges.
func (flannel) Install(ctx context.Context, c Cluster, client *kube.Client, _ <-chan struct{}) error {
	values := map[string]any{
		"Version": c.Kit.Flannel, "CNIVersion": c.Kit.FlannelCNI, "VNI": c.Network.VNI, "Port": c.Network.Port,
		"NFTables": true,
	}
	for i, f := range c.Families {
		values[map[topology.Family]string{topology.IPv4: "IPv4", topology.IPv6: "IPv6"}[f]] = c.PodCIDRs[i].String()
	}
	tmpl, err := template.New("flannel").Option("missingkey=zero").Parse(flannelManifest)
	if err != nil {
		return err
	}
	var manifest bytes.Buffer
	if err := tmpl.Execute(&manifest, values); err != nil {
		return err
	}
	return client.Create(ctx, manifest.Bytes())
}
