package networks

import (
	"encoding/json"
	"net/netip"
	"strings"
	"testing"

	"github.com/fathom-network/fathom/internal/facts/topology"
)

// cluster is the first of a lab file's, with one network.
func cluster(t *testing.T, settings string) Cluster {
	t.Helper()
	lab, err := topology.Parse([]byte("apiVersion: fathom.network/v1alpha1\nkind: Lab\nclusters: [{name: east, workers: 2, "+settings+"}]\n"), "lab.yaml", topology.Overrides{})
	if err != nil {
		t.Fatal(err)
	}
	lab.Underlay4, lab.Underlay6 = netip.MustParsePrefix("10.201.0.0/16"), netip.MustParsePrefix("fd00:fa:201::/48")
	c := &lab.Clusters[0]
	return Cluster{Cluster: c, Lab: lab, API: netip.AddrPortFrom(lab.APIAddr(c), 6443)}
}

// TestKinds: what the lab does for each kind, and waits for.
func TestKinds(t *testing.T) {
	for _, tc := range []struct {
		kind   topology.NetworkKind
		step   string
		ready  bool
		routes int // of a node to the other two, of one family
	}{
		{topology.NetworkFathom, "install the network", true, 0},
		{topology.NetworkBridge, "", true, 2},
		{topology.NetworkFlannel, "create flannel", true, 0},
		{topology.NetworkNone, "", false, 0},
	} {
		c := cluster(t, "network: {name: "+string(tc.kind)+"}")
		n := Of(c.Network.Kind)
		if c.Network.Kind != tc.kind || n.Step() != tc.step || n.Ready() != tc.ready {
			t.Errorf("%s: step %q, ready %v", tc.kind, n.Step(), n.Ready())
		}
		files, err := n.Disk(&c.Nodes[0])
		if err != nil || len(files) > 0 != (tc.routes > 0) {
			t.Errorf("%s: files %v, error %v", tc.kind, files, err)
		}
		wire := n.Wire(c, &c.Nodes[0])
		if len(wire.Routes) != tc.routes || (wire.Uplink != nil) != (tc.routes > 0) {
			t.Errorf("%s: %+v", tc.kind, wire)
		}
	}
}

// TestNeeds: what the machine is asked for before a lab starts is what the networks use.
func TestNeeds(t *testing.T) {
	flannel := cluster(t, "network: {name: flannel}").Network.Needs()
	if uses := strings.Contains(flannelManifest, `"Type": "vxlan"`); flannel.VXLAN != uses || !flannel.BridgeFilter {
		t.Errorf("flannel uses VXLAN: %v, and needs %+v", uses, flannel)
	}
	for settings, vxlan := range map[string]bool{
		"network: {name: fathom}": false, "network: {name: fathom, mode: vxlan}": true, "network: {name: fathom, mode: direct}": false,
		"network: {name: bridge}": false, "network: {name: none}": false,
	} {
		if got, want := cluster(t, settings).Network.Needs(), (topology.KernelNeeds{VXLAN: vxlan}); got != want {
			t.Errorf("%s needs %+v, want %+v", settings, got, want)
		}
	}
}

// TestBridge: pods of both families, the way to those of other nodes, and the address of what leaves the cluster.
func TestBridge(t *testing.T) {
	c := cluster(t, "network: {name: bridge}, ipFamily: dual")
	node := &c.Nodes[1]
	files, err := Of(topology.NetworkBridge).Disk(node)
	if err != nil {
		t.Fatal(err)
	}
	conflist := files["/etc/cni/net.d/10-bridge.conflist"]
	if !json.Valid(conflist) {
		t.Errorf("not JSON:\n%s", conflist)
	}
	for _, p := range node.PodCIDRs {
		if !strings.Contains(string(conflist), `[{"subnet": "`+p.String()+`"}]`) {
			t.Errorf("no range %s in\n%s", p, conflist)
		}
	}
	wire := Of(topology.NetworkBridge).Wire(c, node)
	to := map[netip.Prefix]netip.Addr{}
	for _, r := range wire.Routes {
		to[r.To] = r.Via
	}
	for _, i := range []int{0, 2} {
		for f, p := range c.Nodes[i].PodCIDRs {
			if want := c.Lab.NodeAddrs(c.Cluster, &c.Nodes[i])[f]; to[p] != want {
				t.Errorf("to the pods %s of node %d by %s, want %s", p, i, to[p], want)
			}
		}
	}
	if len(to) != 4 {
		t.Errorf("routes %v", wire.Routes)
	}
	if u := wire.Uplink; u.Inside != bridgeDevice || len(u.From) != 2 || len(u.To) != 2 || u.From[0] != node.PodCIDRs[0] || u.To[0] != c.PodCIDRs[0] {
		t.Errorf("%+v", wire.Uplink)
	}
}

// TestInstallOptions: what the lab installs is what its file says.
func TestInstallOptions(t *testing.T) {
	for settings, want := range map[string]string{
		"dns: node-cache, network: {name: fathom, mode: vxlan, vni: 7, port: 4790}": `{"dns":"node-cache","mode":"vxlan","port":"4790","serviceProxy":"auto","vni":"7"}`,
		"proxy: {name: kube-proxy}": `{"dns":"cluster","mode":"auto","port":"4789","serviceProxy":"off","vni":"4242"}`,
	} {
		o := installOptions(cluster(t, settings))
		got, err := json.Marshal(o.Config)
		if err != nil || string(got) != want || !strings.HasSuffix(o.APIServer, ":6443") {
			t.Errorf("%s: %s at %s, want %s", settings, got, o.APIServer, want)
		}
	}
}
