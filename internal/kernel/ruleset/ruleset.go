// Package ruleset puts the network's nftables tables into the kernel: one table of family inet for each concern, in
// which every set and rule has a comment with its purpose. Sets hold what changes with the cluster, so an update changes
// elements only; rules change only with Fathom's version. Package nft writes, reads and compares the tables.
package ruleset

import (
	"net/netip"

	"github.com/fathom-network/fathom/internal/facts/diff"
	"github.com/fathom-network/fathom/internal/facts/service"
	"github.com/fathom-network/fathom/internal/kernel/nft"
)

// Ruleset is the nftables rule set of a network namespace. One goroutine may use it at a time. A second one may call the
// methods whose names begin with Holds.
type Ruleset struct {
	kernel   nft.Kernel
	plain    map[string]*nft.Plain // by table
	services *nft.Held[service.Key, frontend]
	ownPods  *[]netip.Prefix // the node's own pods in the last call of SetServices
	policies *nft.Held[policyKey, policyPart]
	// policyParts are what the kernel holds of policies, or nil if that is not certain.
	policyParts map[policyKey]policyPart
	// recordsNothing says that the kernel has no way to log packets.
	recordsNothing bool
}

// Open opens the rule set of the namespace at path, such as /proc/self/ns/net.
func Open(path string) (*Ruleset, error) {
	kernel, err := nft.Open(path)
	if err != nil {
		return nil, err
	}
	return New(kernel), nil
}

// New returns the rule set of an open kernel, which may be a fake.
func New(kernel nft.Kernel) *Ruleset {
	return &Ruleset{kernel: kernel, plain: map[string]*nft.Plain{}, services: nft.New(kernel, servicesLayout),
		ownPods: new([]netip.Prefix), policies: nft.New(kernel, policiesLayout)}
}

// beside opens the same rule set a second time, so that one goroutine can read it while another uses r.
func (r *Ruleset) beside() (*Ruleset, error) {
	kernel, err := r.kernel.Beside()
	if err != nil {
		return nil, err
	}
	return New(kernel), nil
}

// Close closes the connection to the kernel. The tables stay.
func (r *Ruleset) Close() { r.kernel.Close() }

// Delete deletes one of our tables. A table that does not exist is not an error.
func (r *Ruleset) Delete(name string) error { return r.held(name).Delete(name) }

func (r *Ruleset) held(name string) *nft.Plain {
	h := r.plain[name]
	if h == nil {
		h = nft.NewPlain(r.kernel)
		r.plain[name] = h
	}
	return h
}

// set makes the kernel hold the table, and returns the number of elements that it changed.
func (r *Ruleset) set(t nft.Table) (diff.Count, error) { return r.held(t.Name).Set(t, nil) }

// read returns the elements of a table. found is false if the table's sets or rules are not the ones that we write, or if an
// interval is not a prefix, since every interval of ours is one.
func (r *Ruleset) read(t nft.Table) (elements, bool, error) {
	have, _, found, err := r.held(t.Name).Read(t)
	for _, s := range t.Sets {
		found = found && (!s.Interval || allPrefixes(have[s.Name]))
	}
	return have, found, err
}
