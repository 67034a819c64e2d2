// Package deploy holds the manifests that install the network on a cluster.
package deploy

import (
	"bytes"
	"embed"
	"io/fs"
)

// Fathom is fathom.yaml: the network with its default configuration.
//
//go:embed fathom.yaml
var Fathom []byte

// DNS is dns.yaml: the DNS cache on every node, which an installation may have besides.
//
//go:embed dns.yaml
var DNS []byte

// Admission is admission.yaml: which objects, and what of them, the network's service accounts may change.
//
//go:embed admission.yaml
var Admission []byte

//go:embed crds/*.yaml
var crds embed.FS

// Manifests are all that an installation is made of, as one file: the kinds of our own first, and then what limits
// the service accounts, before there are any.
func Manifests() []byte {
	var all bytes.Buffer
	files, err := fs.Glob(crds, "crds/*.yaml")
	if err != nil {
		panic(err) // the pattern is wrong
	}
	for _, name := range files {
		data, err := crds.ReadFile(name)
		if err != nil {
			panic(err) // it was listed a moment ago
		}
		all.Write(data)
		all.WriteString("---\n")
	}
	all.Write(Admission)
	all.WriteString("---\n")
	all.Write(Fathom)
	return all.Bytes()
}

// The images in Fathom and in DNS, which whoever installs replaces by those that are to be used.
const (
	Image    = "ghcr.io/fathom-network/fathom-agent:dev"
	DNSImage = "ghcr.io/fathom-network/fathom-dns:dev"
)
