package fastpath_test

import (
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"testing"

	"github.com/fathom-network/fathom/internal/facts/podnet"
	"github.com/fathom-network/fathom/internal/kernel/bpf/fastpath"
	"github.com/fathom-network/fathom/internal/kernel/link"
	"github.com/fathom-network/fathom/internal/testenv"
	"github.com/fathom-network/fathom/internal/testenv/linktest"
)

// What kube-proxy makes of a NodePort: 30080 keeps the client's address (externalTrafficPolicy: Local), 30081 does not.
const nodePorts = `table ip ports {
	chain prerouting { type nat hook prerouting priority -100;
		ip daddr { 192.0.2.1, 203.0.113.1 } tcp dport 30080 dnat to %s:8080
		ip daddr { 192.0.2.1, 203.0.113.1 } tcp dport 30081 meta mark set 0x4000 dnat to %s:8080
	}
	chain postrouting { type nat hook postrouting priority 100;
		meta mark 0x4000 masquerade
		ip saddr 10.244.0.0/16 ip daddr != { 10.244.0.0/16, 192.0.2.0/24 } masquerade
	}
}`

// TestWorld has packets that are translated on their way cross those that are not.
func TestWorld(t *testing.T) {
	for _, mode := range []podnet.Mode{podnet.Direct, podnet.VXLAN} {
		a, b, pods := twoNodes(t, mode, fastpath.Options{})
		world := linktest.Namespace(t)
		testenv.Must(t, a.SetPair(link.Device{Name: "up0", Alias: "x"}, world, link.Device{Name: "eth0", Alias: "x"}))
		testenv.Must(t, a.SetAddrs("up0", []netip.Prefix{netip.MustParsePrefix("203.0.113.1/24")}))
		testenv.Must(t, world.SetAddrs("eth0", []netip.Prefix{netip.MustParsePrefix("203.0.113.9/24")}))
		a.plan.Devices = append(a.plan.Devices, "up0")
		a.set(t)
		file := filepath.Join(t.TempDir(), "rules")
		local, remote := pods[0][0], pods[1][0]
		testenv.Must(t, os.WriteFile(file, fmt.Appendf(nil, nodePorts, local.addrs[0], remote.addrs[0]), 0o600))
		linktest.Run(t, a.Namespace, "nft", "-f", file)
		serve(t, local)
		serve(t, remote)
		serve(t, pod{Namespace: world, addrs: []netip.Addr{netip.MustParseAddr("203.0.113.9")}})
		for what, try := range map[string]func() error{
			"a pod to the world":               func() error { return echo(local.Namespace, "tcp", netip.MustParseAddr("203.0.113.9"), 8080, 100_000) },
			"the world to a node port, local":  func() error { return echo(world, "tcp", netip.MustParseAddr("203.0.113.1"), 30080, 100_000) },
			"the world to a node port, remote": func() error { return echo(world, "tcp", netip.MustParseAddr("203.0.113.1"), 30081, 100_000) },
			"a pod to its node's port, remote": func() error { return echo(local.Namespace, "tcp", netip.MustParseAddr("192.0.2.1"), 30081, 100_000) },
			"a pod to its node's port, another pod": func() error {
				return echo(pods[0][1].Namespace, "tcp", netip.MustParseAddr("192.0.2.1"), 30080, 100_000)
			},
			"a pod to another node's port": func() error {
				return echo(pods[1][1].Namespace, "tcp", netip.MustParseAddr("192.0.2.1"), 30080, 100_000)
			},
			"a pod to another node's port, and back": func() error {
				return echo(pods[1][1].Namespace, "tcp", netip.MustParseAddr("192.0.2.1"), 30081, 100_000)
			},
			"a pod to a pod": func() error { return echo(pods[1][1].Namespace, "tcp", local.addrs[0], 8080, 100_000) },
		} {
			if err := try(); err != nil {
				t.Errorf("%s, %s: %v", mode, what, err)
			}
		}
		a.noneInvalid(t)
		b.noneInvalid(t)
	}
}
