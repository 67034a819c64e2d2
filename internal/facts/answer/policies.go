package answer

import (
	"net/netip"

	"github.com/fathom-network/fathom/internal/facts/policy"
)

// Policies is an agent's report on policies: what its kernel holds.
type Policies struct {
	// Known says that the API server has told the agent of policies, On that there are some. Problem is why the kernel may not hold them.
	Known, On bool
	Problem   string
	Ranges    []netip.Prefix // of the node's pods, as the agent was told
	// Found says that the kernel has the table, with the rules that belong into it. Kernel is what it says, without reasons, and KernelRanges
	// are the ranges in it.
	Found        bool
	Kernel       policy.Facts
	KernelRanges []netip.Prefix
	// FastPath is where the fast path's maps do not hold what Kernel says.
	FastPath []string `json:",omitempty"`
}
