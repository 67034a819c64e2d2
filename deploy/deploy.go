// Package deploy holds the manifests that install the network on a cluster.
package deploy

import _ "embed"

// Fathom is fathom.yaml: the network with its default configuration.
//
//go:embed fathom.yaml
var Fathom []byte

// BGPPeers is the CRD of BGPPeer. Without it the network works, and no agent speaks BGP.
//
//go:embed crds/fathom.network_bgppeers.yaml
var BGPPeers []byte

// Image is the agent's image in Fathom, which whoever installs replaces by the one that is to be used.
const Image = "ghcr.io/fathom-network/fathom-agent:dev"
