package policyfacts_test

import (
	"fmt"
	"net/netip"
	"strings"
	"testing"

	networkingv1 "k8s.io/api/networking/v1"

	"github.com/fathom-network/fathom/internal/facts/policy"
	"github.com/fathom-network/fathom/internal/facts/policyfacts"
	"github.com/fathom-network/fathom/internal/facts/service"
)

// TestAudit is docs/policy.md's: what an audited policy does, alone and beside others.
func TestAudit(t *testing.T) {
	const (
		audit   = "audit"
		deny    = `{podSelector: {}, policyTypes: [Ingress]}`
		fromA   = `{podSelector: {}, policyTypes: [Ingress], ingress: [{from: [{podSelector: {matchLabels: {app: a}}}]}]}`
		fromB   = `{podSelector: {}, policyTypes: [Ingress], ingress: [{from: [{podSelector: {matchLabels: {app: b}}}]}]}`
		acceptB = `{tier: %s, priority: 1, subject: {namespaces: {}}, ingress: [{action: %s, from: [{pods: {podSelector: {matchLabels: {app: b}}}}]}]}`
	)
	type is struct{ name, label, spec string }
	for name, c := range map[string]struct {
		namespace string // its label
		policies  []is
		tier      string
		a, b      string // what becomes of packets to web from these
	}{
		"alone, it isolates nobody":                    {policies: []is{{"deny", audit, deny}}, a: "audit x/deny", b: "audit x/deny"},
		"what it allows is not told":                   {policies: []is{{"from-a", audit, fromA}}, a: "allowed", b: "audit x/from-a"},
		"of two, each allows":                          {policies: []is{{"from-a", audit, fromA}, {"from-b", audit, fromB}}, a: "allowed", b: "allowed"},
		"of two, both are named":                       {policies: []is{{"deny", audit, deny}, {"from-b", audit, fromB}}, a: "audit x/deny x/from-b", b: "allowed"},
		"beside one that is enforced, what both allow": {policies: []is{{"from-a", "", fromA}, {"from-b", audit, fromB}}, a: "allowed", b: "allowed"},
		"and the other drops":                          {policies: []is{{"deny", "", deny}, {"from-b", audit, fromB}}, a: "denied", b: "allowed"},
		"one that allows nothing adds nothing":         {policies: []is{{"from-a", "", fromA}, {"deny", audit, deny}}, a: "allowed", b: "denied"},
		"a namespace audits all":                       {namespace: "true", policies: []is{{"deny", "", deny}, {"from-b", "", fromB}}, a: "audit x/deny x/from-b", b: "allowed"},
		"a namespace that says false audits none":      {namespace: "false", policies: []is{{"deny", "", deny}}, a: "denied", b: "denied"},
		"what Admin accepts is not asked about":        {policies: []is{{"deny", audit, deny}}, tier: fmt.Sprintf(acceptB, "Admin", "Accept"), a: "audit x/deny", b: "allowed"},
		"what Admin denies is denied":                  {policies: []is{{"deny", audit, deny}}, tier: fmt.Sprintf(acceptB, "Admin", "Deny"), a: "audit x/deny", b: "denied"},
		"what Admin passes is":                         {policies: []is{{"deny", audit, deny}}, tier: fmt.Sprintf(acceptB, "Admin", "Pass"), a: "audit x/deny", b: "audit x/deny"},
		"Baseline is asked where none isolates":        {policies: []is{{"from-b", audit, fromB}}, tier: fmt.Sprintf(acceptB, "Baseline", "Deny"), a: "audit x/from-b", b: "denied"},
		"and accepts what would be dropped":            {policies: []is{{"deny", audit, deny}}, tier: fmt.Sprintf(acceptB, "Baseline", "Accept"), a: "audit x/deny", b: "audit x/deny"},
	} {
		w := newWorld()
		w.namespace("x", map[string]string{policy.Audit: c.namespace})
		w.pod("x/web", "10.0.0.1", map[string]string{"app": "web"})
		w.pod("x/a", "10.0.0.2", map[string]string{"app": "a"})
		w.pod("x/b", "10.0.0.3", map[string]string{"app": "b"})
		for _, p := range c.policies {
			w.policy(t, "x/"+p.name, p.spec)
			if p.label == audit {
				w.policies["x/"+p.name].Labels = map[string]string{policy.Audit: "true"}
			}
		}
		if c.tier != "" {
			w.clusterPolicy(t, "tier", c.tier)
		}
		f := w.model().Facts()
		for from, want := range map[string]string{"10.0.0.2": c.a, "10.0.0.3": c.b} {
			p := policy.Packet{From: addr(from), To: addr("10.0.0.1"), Protocol: service.TCP, Port: 80}
			v := f.Judge(policy.Ingress, p)
			got := map[bool]string{true: "allowed", false: "denied"}[v.Allowed]
			if len(v.Audit) > 0 {
				got = "audit"
				for _, id := range v.Audit {
					got += " " + id.Name.String()
				}
			}
			if got != want {
				t.Errorf("%s: from %s: %s, want %s", name, from, got, want)
			}
			if w.allows(p) != v.Allowed || w.audits(policy.Ingress, p) != (len(v.Audit) > 0) {
				t.Errorf("%s: from %s: the evaluator disagrees", name, from)
			}
		}
	}
}

// TestAuditMistaken says that what only looks like the label is told, and enforced.
func TestAuditMistaken(t *testing.T) {
	for name, c := range map[string]struct {
		labels, annotations map[string]string
		audit               bool
		problem             string
	}{
		"the label":         {labels: map[string]string{policy.Audit: "true"}, audit: true},
		"another value":     {labels: map[string]string{policy.Audit: "yes"}, problem: `"yes", which is neither`},
		"the label, off":    {labels: map[string]string{policy.Audit: "false"}},
		"an annotation":     {annotations: map[string]string{policy.Audit: "true"}, problem: "is a label"},
		"both":              {labels: map[string]string{policy.Audit: "true"}, annotations: map[string]string{policy.Audit: "true"}, audit: true},
		"something of ours": {labels: map[string]string{"fathom.network/other": "true"}},
	} {
		w := newWorld()
		w.policy(t, "x/p", `{podSelector: {}}`)
		o := w.policies["x/p"]
		o.Labels, o.Annotations = c.labels, c.annotations
		p := policyfacts.NetworkPolicy(o)
		if told := strings.Join(p.Problems, " "); p.Audit != c.audit || !strings.Contains(told, c.problem) || (told == "") != (c.problem == "") {
			t.Errorf("%s: audited is %v, and told is %q", name, p.Audit, told)
		}
	}
	w := newWorld()
	w.clusterPolicy(t, "k", `{tier: Admin, priority: 1, subject: {namespaces: {}}}`)
	w.clusterwide["k"].Labels = map[string]string{policy.Audit: "true"}
	if p := policyfacts.ClusterNetworkPolicy(w.clusterwide["k"]); p.Audit || len(p.Problems) != 1 {
		t.Errorf("a ClusterNetworkPolicy: audited is %v, and told is %q", p.Audit, p.Problems)
	}
}

// TestAuditIsTurned follows a policy and a namespace that are audited and are not.
func TestAuditIsTurned(t *testing.T) {
	w, m := newWorld(), policy.NewClusterModel()
	setPod(m, w.pod("x/a", "10.0.0.1", nil))
	setPod(m, w.pod("x/b", "10.0.0.2", nil))
	w.policy(t, "x/deny", `{podSelector: {}, policyTypes: [Egress]}`)
	o := w.policies["x/deny"]
	p := policy.Packet{From: addr("10.0.0.1"), To: addr("10.0.0.2"), Protocol: service.TCP, Port: 80}
	told := policy.Facts{Addrs: map[netip.Addr]policy.Address{}, Classes: map[policy.Number]*policy.Class{}}
	was := false
	for i, c := range []struct{ policy, namespace string }{{"", ""}, {"true", ""}, {"", ""}, {"", "true"}, {"true", "true"}, {"true", ""}, {"", ""}} {
		o = o.DeepCopy()
		o.Labels = map[string]string{policy.Audit: c.policy}
		if c.policy == "" {
			o.Labels = nil
		}
		m.SetPolicy(policyfacts.NetworkPolicy(o))
		m.SetNamespace("x", map[string]string{policy.Audit: c.namespace})
		follow(told, m.Changes())
		audited := c.policy+c.namespace != ""
		if v := told.Judge(policy.Egress, p); v.Allowed != audited || (len(v.Audit) == 1) != audited {
			t.Errorf("step %d: %+v", i, v)
		}
		if i > 0 && audited != was && !m.Narrowed() {
			t.Errorf("step %d: connections that are there are not looked at", i)
		}
		was = audited
	}
	m.DeleteNamespace("x")
}

// TestAuditIsTold: explain, matrix and try say what would be dropped.
func TestAuditIsTold(t *testing.T) {
	w := shop()
	w.policy(t, "shop/in", "podSelector: {matchLabels: {app: db}}\ningress: [{from: [{podSelector: {matchLabels: {app: web}}}], ports: [{port: 80}]}]")
	enforced := w.cluster()
	o := w.policies["shop/in"].DeepCopy()
	o.Labels = map[string]string{policy.Audit: "true"}
	w.policies["shop/in"] = o
	c := w.cluster()
	e := c.Explain(c.Model(), w.packet(t, "shop/job > shop/db:80"))
	if s := e.Sides[1]; !e.Allowed || strings.Join(s.Audit, " ") != "NetworkPolicy shop/in" || len(s.Not) != 1 || s.Not[0].Why != "is not for this client" {
		t.Errorf("explained is %+v", e)
	}
	if e := c.Explain(c.Model(), w.packet(t, "shop/web > shop/db:80")); !e.Allowed || len(e.Sides[1].Audit)+len(e.Sides[1].Not) > 0 {
		t.Errorf("what is allowed is explained as %+v", e)
	}
	got := map[string]string{}
	for _, p := range c.Matrix("shop") {
		got[p.From+" "+p.To] = p.AllowedText()
	}
	for pair, want := range map[string]string{"shop/web shop/db": "all; audit: 80/TCP", "shop/job shop/db": "all; audit: none", "shop/db shop/web": "all"} {
		if got[pair] != want {
			t.Errorf("%s: %q, want %q", pair, got[pair], want)
		}
	}
	now := shop().cluster()
	for _, d := range now.Compare(now.With(policyfacts.Cluster{Policies: []*networkingv1.NetworkPolicy{o}})) {
		if d.From == "shop/job" && (d.To != "shop/db" || d.Now != "all" || d.Then != "all; audit: none") {
			t.Errorf("trying it out: %+v", d)
		}
	}
	if len(enforced.Policies[0].Labels) > 0 || !policy.AuditLabel(o.Labels) {
		t.Error("the objects are changed")
	}
}
