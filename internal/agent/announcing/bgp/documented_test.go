package bgp_test

import (
	"os"
	"strings"
	"testing"

	"github.com/fathom-network/fathom/internal/testenv"
)

// TestDocumentedRouters runs the routers as docs/bgp.md configures them, with this test's addresses.
func TestDocumentedRouters(t *testing.T) {
	doc, err := os.ReadFile("../../../../docs/bgp.md")
	testenv.Must(t, err)
	for title, name := range map[string]string{"BIRD 2:": "BIRD", "FRR:": "FRR", "and one at swp2:": "FRR"} {
		t.Run(title, func(t *testing.T) {
			t.Parallel()
			_, after, found := strings.Cut(string(doc), "\n"+title+"\n\n```\n")
			config, _, closed := strings.Cut(after, "```")
			if !found || !closed {
				t.Fatalf("no configuration below %q", title)
			}
			config = strings.NewReplacer("192.0.2.0/24", "10.1.1.0/24", "fd00:10:244::/56", "fd00:244::/32").Replace(config)
			if name == "BIRD" {
				config = "router id 192.0.2.1; protocol device {}\n" + config
			}
			ns := newNamespace(t)
			r := routers[name](t, ns)
			n := newNode(t, ns, 1)
			unnumbered := strings.Contains(config, "swp1")
			p, hop4, hop6 := peer("10.1.1.1", route("10.244.1.0/24"), via("fd00:244:1::/64", "fd00:1:1::2"), route("203.0.113.0/24")), "10.1.1.2", "fd00:1:1::2"
			if unnumbered {
				wire(t, ns, "swp1", []string{"fe80::a1/64"}, n.namespace, "eth1", []string{"fe80::a2/64"})
				n.run("ip -6 addr flush dev eth1")
				n.run("ip addr add fe80::a2/64 dev eth1 nodad")
				p = peer("::%eth1", route("10.244.1.0/24"), route("fd00:244:1::/64"), route("203.0.113.0/24"))
				p.Unnumbered, hop4, hop6 = true, "fe80::a2", "fe80::a2"
			}
			r.load(config)
			n.begin()
			n.set(p)
			n.up("router")
			ns.routes("10.244.1.0/24", hop4)
			ns.routes("fd00:244:1::/64", hop6)
			ns.routes("203.0.113.0/24") // not the pods'
		})
	}
}
