// Package ruleset puts the network's nftables tables into the kernel: one table of family inet for each concern, in
// which every set and rule has a comment that says what it is for. What changes with the cluster is in sets, so that
// a change is one of elements; rules change only with Fathom's version. Package nft does the rest.
package ruleset

import (
	"net/netip"

	"github.com/fathom-network/fathom/internal/facts/diff"
	"github.com/fathom-network/fathom/internal/facts/service"
	"github.com/fathom-network/fathom/internal/kernel/nft"
)

// Ruleset is the nftables of a network namespace. It is for one goroutine at a time, and what begins with Holds for another.
type Ruleset struct {
	kernel   nft.Kernel
	plain    map[string]*nft.Plain // by table
	services *nft.Held[service.Key, frontend]
	ownPods  *[]netip.Prefix // as SetServices had them
	policies *nft.Held[policyKey, policyPart]
	// policyParts are what the kernel holds of policies, or nil if that is not certain.
	policyParts map[policyKey]policyPart
}

// Open opens the rule set of the namespace at path, such as /proc/self/ns/net.
func Open(path string) (*Ruleset, error) {
	kernel, err := nft.Open(path)
	if err != nil {
		return nil, err
	}
	return New(kernel), nil
}

// New returns the rule set of a kernel that is open, or of a fake one.
func New(kernel nft.Kernel) *Ruleset {
	return &Ruleset{kernel: kernel, plain: map[string]*nft.Plain{}, services: nft.New(kernel, servicesLayout),
		ownPods: new([]netip.Prefix), policies: nft.New(kernel, policiesLayout)}
}

// beside opens the same rule set once more, to read it while another goroutine uses this one.
func (r *Ruleset) beside() (*Ruleset, error) {
	kernel, err := r.kernel.Beside()
	if err != nil {
		return nil, err
	}
	return New(kernel), nil
}

// Close closes the rule set. The tables stay.
func (r *Ruleset) Close() { r.kernel.Close() }

// Delete takes one of our tables away. One that is not there is not an error.
func (r *Ruleset) Delete(name string) error { return r.held(name).Delete(name) }

func (r *Ruleset) held(name string) *nft.Plain {
	h := r.plain[name]
	if h == nil {
		h = nft.NewPlain(r.kernel)
		r.plain[name] = h
	}
	return h
}

// set makes the kernel hold the table, and returns what it changed.
func (r *Ruleset) set(t nft.Table) (diff.Count, error) { return r.held(t.Name).Set(t, nil) }

// read returns the elements of a table. They are not found if anything but them differs from what should be, or if there is an
// interval that is no prefix: none of ours is otherwise.
func (r *Ruleset) read(t nft.Table) (elements, bool, error) {
	have, _, found, err := r.held(t.Name).Read(t)
	for _, s := range t.Sets {
		found = found && (!s.Interval || allPrefixes(have[s.Name]))
	}
	return have, found, err
}
