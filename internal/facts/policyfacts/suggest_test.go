package policyfacts_test

import (
	"fmt"
	"math/rand/v2"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/yaml"

	answers "github.com/fathom-network/fathom/internal/facts/answer"
	"github.com/fathom-network/fathom/internal/facts/policy"
	"github.com/fathom-network/fathom/internal/facts/policyfacts"
	"github.com/fathom-network/fathom/internal/facts/service"
)

func seen(node, from, to string, protocol service.Protocol, port uint16) policyfacts.Seen {
	return policyfacts.Seen{SeenFlow: answers.SeenFlow{From: addr(from), To: addr(to), Protocol: uint8(protocol), Port: port}, Node: node}
}

// suggested reads back what is written.
func suggested(t *testing.T, list []policyfacts.Suggestion) (all []*networkingv1.NetworkPolicy, text string) {
	t.Helper()
	out, err := policyfacts.YAML(list)
	if err != nil {
		t.Fatal(err)
	}
	for _, doc := range strings.Split(string(out), "---\n")[1:] {
		p := &networkingv1.NetworkPolicy{}
		if err := yaml.UnmarshalStrict([]byte(doc), p); err != nil {
			t.Fatalf("%v\n%s", err, doc)
		}
		if problems := policyfacts.NetworkPolicy(p).Problems; len(problems) > 0 {
			t.Fatalf("%v\n%s", problems, doc)
		}
		all = append(all, p)
	}
	return all, string(out)
}

func TestSuggest(t *testing.T) {
	w := newWorld()
	w.namespace("shop", map[string]string{corev1.LabelMetadataName: "shop"})
	w.namespace("ops", map[string]string{corev1.LabelMetadataName: "ops"})
	web := w.pod("shop/web-5d-a", "10.0.0.1", map[string]string{"app": "web", "pod-template-hash": "5d"})
	yes := true
	web.OwnerReferences = []metav1.OwnerReference{{Kind: "ReplicaSet", Name: "web-5d", Controller: &yes}}
	w.pod("shop/web-5d-b", "10.0.0.2", web.Labels).OwnerReferences = web.OwnerReferences
	w.pod("shop/db", "10.0.0.3", map[string]string{"app": "db"})
	w.pod("shop/db-canary", "10.0.0.4", map[string]string{"app": "db", "canary": "yes"})
	w.pod("ops/probe", "10.0.0.5", nil)
	c := w.cluster()
	list := c.Suggest([]policyfacts.Seen{
		seen("node1", "10.0.0.1", "10.0.0.3", service.TCP, 5432),
		seen("node1", "10.0.0.5", "10.0.0.2", service.TCP, 80),
		seen("node1", "10.0.0.5", "10.0.0.2", service.UDP, 80),
		seen("node1", "10.0.0.1", "203.0.113.9", service.TCP, 443),
		seen("node1", "192.168.0.1", "10.0.0.1", service.TCP, 8080),  // the pod's own node, which always may
		seen("node2", "203.0.113.10", "10.0.0.1", service.TCP, 8080), // before its source is translated
		seen("node1", "10.0.0.1", "10.0.0.3", 1, 0),                  // a ping
	}, "")
	all, text := suggested(t, list)
	for _, want := range []string{"# For web-5d-a, web-5d-b\n", "name: suggested-web\n", "# shop/web-5d-a > 203.0.113.9 port 443/TCP\n", `cidr: "203.0.113.9/32"`, "# ops/probe > shop/web-5d-b port 80/TCP\n",
		"kubernetes.io/metadata.name: ops", "name: suggested-db\n", "operator: DoesNotExist", "name: suggested-probe\n"} {
		if !strings.Contains(text, want) {
			t.Errorf("there is no %q in\n%s", want, text)
		}
	}
	for _, not := range []string{"pod-template-hash", "192.168.0.1", "203.0.113.10", "suggested-db-canary", "creationTimestamp", "status"} {
		if strings.Contains(text, not) {
			t.Errorf("there is %q in\n%s", not, text)
		}
	}
	only := c.Suggest([]policyfacts.Seen{seen("node1", "10.0.0.5", "10.0.0.2", service.TCP, 80)}, "shop")
	if len(only) != 1 || only[0].Policy.Name != "suggested-web" || len(all) != 3 {
		t.Errorf("of one namespace: %+v, and %d of all", only, len(all))
	}
}

// TestSuggestNames: who answers names may be asked by any pod that has a policy.
func TestSuggestNames(t *testing.T) {
	w := newWorld()
	w.namespace("kube-system", map[string]string{corev1.LabelMetadataName: "kube-system"})
	w.pod("kube-system/coredns", "10.0.0.9", map[string]string{"k8s-app": "kube-dns"})
	w.pod("shop/a", "10.0.0.1", map[string]string{"app": "a"})
	w.pod("shop/b", "10.0.0.2", map[string]string{"app": "b"})
	all, _ := suggested(t, w.cluster().Suggest([]policyfacts.Seen{seen("node1", "10.0.0.1", "10.0.0.2", service.TCP, 80)}, ""))
	for _, p := range all {
		w.policies[p.Namespace+"/"+p.Name] = p
	}
	f := w.model().Facts()
	for _, from := range []string{"10.0.0.1", "10.0.0.2"} {
		for _, protocol := range []service.Protocol{service.TCP, service.UDP} {
			if allowed, why := judge(f, policy.Packet{From: addr(from), To: addr("10.0.0.9"), Protocol: protocol, Port: 53}); !allowed {
				t.Errorf("names from %s by %s: %s", from, protocol, why)
			}
		}
	}
	if allowed, _ := judge(f, policy.Packet{From: addr("10.0.0.1"), To: addr("10.0.0.9"), Protocol: service.TCP, Port: 9153}); allowed {
		t.Error("any port of who answers names is allowed")
	}
}

// TestSuggestedAllowWhatWasSeen: of random clusters and flows, what is suggested, applied to the cluster, allows the flows between the same
// workloads at the same ports, and of those that suggested policies isolate nothing else.
func TestSuggestedAllowWhatWasSeen(t *testing.T) {
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	r := random{rand.New(rand.NewPCG(seed, 2))}
	for range 60 {
		w := newWorld()
		var pods []string
		group := map[string]string{} // by address: namespace and labels
		for i, name := range []string{"x/a", "x/b", "x/c", "y/a", "y/b", "z/a"} {
			ip := fmt.Sprintf("10.0.0.%d", i+1)
			namespace, _, _ := strings.Cut(name, "/")
			w.namespace(namespace, map[string]string{corev1.LabelMetadataName: namespace})
			l := r.labels()
			w.pod(name, ip, l)
			pods, group[ip] = append(pods, ip), fmt.Sprint(namespace, l)
		}
		outside := []string{"203.0.113.1", "203.0.113.2"}
		for _, ip := range outside {
			group[ip] = ip
		}
		ends := slices.Concat(pods, outside)
		var flows []policyfacts.Seen
		allowed := map[string]bool{}
		isolated := map[string]bool{}
		what := func(from, to string, protocol service.Protocol, port uint16) string {
			return fmt.Sprint(group[from], " > ", group[to], protocol, port)
		}
		for range 1 + r.IntN(6) {
			from, to, protocol, port := pick(r, ends...), pick(r, ends...), pick(r, service.TCP, service.UDP, service.SCTP), uint16(80+r.IntN(3))
			if from == to || slices.Contains(outside, from) && slices.Contains(outside, to) {
				continue
			}
			flows = append(flows, seen("node1", from, to, protocol, port))
			allowed[what(from, to, protocol, port)] = true
			isolated[group[from]], isolated[group[to]] = true, true
		}
		all, text := suggested(t, w.cluster().Suggest(flows, ""))
		for _, p := range all {
			w.policies[p.Namespace+"/"+p.Name] = p
		}
		f := w.model().Facts()
		for _, from := range ends {
			for _, to := range ends {
				if from == to || slices.Contains(outside, from) && slices.Contains(outside, to) {
					continue
				}
				for port := uint16(79); port < 84; port++ {
					for _, protocol := range []service.Protocol{service.TCP, service.UDP, service.SCTP} {
						inside := slices.Contains(pods, from) && isolated[group[from]] || slices.Contains(pods, to) && isolated[group[to]]
						want := allowed[what(from, to, protocol, port)] || !inside
						p := policy.Packet{From: netip.MustParseAddr(from), To: netip.MustParseAddr(to), Protocol: protocol, Port: port}
						if got, why := judge(f, p); got != want {
							t.Fatalf("%v: allowed is %v (%s), want %v; seen were %v\n%s", p, got, why, want, flows, text)
						}
					}
				}
			}
		}
	}
}
