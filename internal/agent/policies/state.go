package policies

import (
	"slices"

	"github.com/fathom-network/fathom/internal/facts/answer"
	"github.com/fathom-network/fathom/internal/kernel/link"
	"github.com/fathom-network/fathom/internal/kernel/ruleset"
)

// State reads the kernel. It may be called while the Keeper runs.
func (k *Keeper) State() (answer.Policies, error) {
	k.mu.Lock()
	s := answer.Policies{Known: k.known, On: k.on, Problem: k.problem, Ranges: slices.Clone(k.ranges)}
	fast := k.fast
	k.mu.Unlock()
	rules, err := ruleset.Open(link.OwnNetNS) // only Run may use the Keeper's
	if err != nil {
		return s, err
	}
	defer rules.Close()
	if s.Kernel, s.KernelRanges, s.Found, err = rules.Policies(); err != nil || !s.Found || fast.path == nil {
		return s, err
	}
	if !fast.holds {
		s.FastPath = []string{"it holds nothing: isolated pods take the stack"}
		return s, nil
	}
	differences, err := fast.path.Check(s.Kernel)
	for _, d := range differences {
		s.FastPath = append(s.FastPath, d.String())
	}
	return s, err
}
