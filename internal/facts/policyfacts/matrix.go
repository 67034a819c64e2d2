package policyfacts

import (
	"net/netip"
	"slices"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/fathom-network/fathom/internal/facts/policy"
)

// Pair is two pods, and what policies allow from the one to the other.
type Pair struct {
	From    string         `json:"from"` // "shop/web"
	To      string         `json:"to"`
	Allowed []policy.Grant `json:"-"`
	Text    string         `json:"allowed"` // "all", "none", "80/TCP, 8000-9000/UDP"
}

// Matrix returns what is allowed between each two pods that have addresses of one family, in order of their names: of pods of a namespace
// with any, if it is not empty. Where pods have addresses of both families, it is that of the first one which both have.
func (c Cluster) Matrix(namespace string) (all []Pair) {
	f := c.Model().Facts()
	var pods []policy.Pod
	for _, o := range c.Pods {
		if p, ok := Pod(o); ok && len(p.Addrs) > 0 {
			pods = append(pods, p)
		}
	}
	slices.SortFunc(pods, func(a, b policy.Pod) int { return a.Compare(b.Name) })
	for _, from := range pods {
		for _, to := range pods {
			if from.Name == to.Name || namespace != "" && from.Namespace != namespace && to.Namespace != namespace {
				continue
			}
			if a, b, found := common(from.Addrs, to.Addrs); found {
				allowed := f.Allowed(a, b)
				all = append(all, Pair{from.String(), to.String(), allowed, policy.GrantsText(allowed)})
			}
		}
	}
	return all
}

func common(from, to []netip.Addr) (a, b netip.Addr, found bool) {
	for _, a := range from {
		if i := slices.IndexFunc(to, func(b netip.Addr) bool { return a.Is4() == b.Is4() }); i >= 0 {
			return a, to[i], true
		}
	}
	return a, b, false
}

// With returns the cluster as it is with the policies of another, each in the place of one of its name.
func (c Cluster) With(o Cluster) Cluster {
	c.Policies, c.ClusterPolicies = replaced(c.Policies, o.Policies), replaced(c.ClusterPolicies, o.ClusterPolicies)
	return c
}

func replaced[T metav1.Object](list, by []T) []T {
	list = slices.DeleteFunc(slices.Clone(list), func(p T) bool {
		return slices.ContainsFunc(by, func(q T) bool { return p.GetNamespace() == q.GetNamespace() && p.GetName() == q.GetName() })
	})
	return append(list, by...)
}

// Differs is a pair of pods for which policies make a difference.
type Differs struct {
	From string `json:"from"`
	To   string `json:"to"`
	Now  string `json:"now"`
	Then string `json:"then"`
}

// Compare returns the pairs of pods between which something else is allowed in another state of the same pods.
func (c Cluster) Compare(then Cluster) (all []Differs) {
	now, later := c.Matrix(""), then.Matrix("")
	for i, p := range now { // the same pods, in the same order
		if q := later[i]; !slices.Equal(p.Allowed, q.Allowed) {
			all = append(all, Differs{p.From, p.To, p.Text, q.Text})
		}
	}
	return all
}
