package networks

import (
	"bytes"
	"text/template"

	"github.com/fathom-network/fathom/internal/facts/topology"
	"github.com/fathom-network/fathom/internal/kernel/link"
	"github.com/fathom-network/fathom/internal/kernel/ruleset"
)

// bridge is the network of the reference plugins: a bridge on every node, and routes between the nodes, which the lab sets.
type bridge struct{ nothing }

// bridgeDevice is the bridge of a node's pods.
const bridgeDevice = "cni0"

// The plugin's own ipMasq would hide a pod behind its node from the pods of other nodes as well: Wire has the
// masquerading that Kubernetes asks for.
var bridgeTemplate = template.Must(template.New("bridge").Parse(`{
  "cniVersion": "1.0.0",
  "name": "bridge",
  "plugins": [
    {
      "type": "bridge",
      "bridge": "cni0",
      "isGateway": true,
      "hairpinMode": true,
      "ipam": {
        "type": "host-local",
        "ranges": [{{range $i, $p := .}}{{if $i}}, {{end}}[{"subnet": "{{$p}}"}]{{end}}],
        "routes": [{{range $i, $p := .}}{{if $i}}, {{end}}{"dst": "{{if $p.Addr.Is4}}0.0.0.0/0{{else}}::/0{{end}}"}{{end}}]
      }
    },
    {
      "type": "portmap",
      "capabilities": {"portMappings": true}
    }
  ]
}
`))

// Disk implements Network.
func (bridge) Disk(n *topology.Node) (map[string][]byte, error) {
	var conflist bytes.Buffer
	if err := bridgeTemplate.Execute(&conflist, n.PodCIDRs); err != nil {
		return nil, err
	}
	return map[string][]byte{"/etc/cni/net.d/10-bridge.conflist": conflist.Bytes()}, nil
}

// Wire implements Network: routes to the other nodes' pods by way of those nodes, and the node's address for what leaves the
// cluster.
func (bridge) Wire(c Cluster, n *topology.Node) Wire {
	var routes []link.Route
	for i := range c.Nodes {
		other := &c.Nodes[i]
		if other.Index == n.Index {
			continue
		}
		for f, p := range other.PodCIDRs {
			routes = append(routes, link.Route{To: p, Via: c.Lab.NodeAddrs(c.Cluster, other)[f]})
		}
	}
	return Wire{Routes: routes, Uplink: &ruleset.Uplink{Table: "fathom", From: n.PodCIDRs, To: c.PodCIDRs, Inside: bridgeDevice,
		Comment: "pods leave the cluster with the address of their node"}}
}
