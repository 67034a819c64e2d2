package policyfacts

import (
	"net/netip"
	"slices"

	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/fathom-network/fathom/internal/facts/policy"
)

// Pair is two pods, and what policies allow from the one to the other.
type Pair struct {
	From    string         `json:"from"` // "shop/web"
	To      string         `json:"to"`
	Allowed []policy.Grant `json:"-"`
	Text    string         `json:"allowed"` // "all", "none", "80/TCP, 8000-9000/UDP"
	// Audit is what would be allowed if no policy were audited, if that is something else.
	Audit string `json:"audit,omitempty"`
}

// AllowedText is what is allowed, and what would be if no policy were audited: "all; audit: none".
func (p Pair) AllowedText() string {
	if p.Audit == "" {
		return p.Text
	}
	return p.Text + "; audit: " + p.Audit
}

// enforced is the cluster without the labels by which policies are audited, and whether there were any.
func (c Cluster) enforced() (_ Cluster, audits bool) {
	c.Namespaces, audits = withoutLabel(c.Namespaces, (*corev1.Namespace).DeepCopy, audits)
	c.Policies, audits = withoutLabel(c.Policies, (*networkingv1.NetworkPolicy).DeepCopy, audits)
	return c, audits
}

func withoutLabel[T metav1.Object](list []T, copied func(T) T, found bool) ([]T, bool) {
	list = slices.Clone(list)
	for i, o := range list {
		if policy.AuditLabel(o.GetLabels()) {
			list[i], found = copied(o), true
			delete(list[i].GetLabels(), policy.Audit)
		}
	}
	return list, found
}

// Matrix returns what is allowed between each two pods that have addresses of one family, in order of their names: of pods of a namespace
// with any, if it is not empty. Where pods have addresses of both families, it is that of the first one which both have.
func (c Cluster) Matrix(namespace string) (all []Pair) {
	f := c.Model().Facts()
	enforced, audits := c.enforced()
	var g policy.Facts
	if audits {
		g = enforced.Model().Facts()
	}
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
				pair := Pair{From: from.String(), To: to.String(), Allowed: allowed, Text: policy.GrantsText(allowed)}
				if audits {
					if text := policy.GrantsText(g.Allowed(a, b)); text != pair.Text {
						pair.Audit = text
					}
				}
				all = append(all, pair)
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
		if q := later[i]; !slices.Equal(p.Allowed, q.Allowed) || p.Audit != q.Audit {
			all = append(all, Differs{p.From, p.To, p.AllowedText(), q.AllowedText()})
		}
	}
	return all
}
