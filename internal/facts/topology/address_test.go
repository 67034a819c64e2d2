package topology

import (
	"bytes"
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"reflect"
	"slices"
	"testing"
	"time"
)

// checkLab fails when the lab could not be built: addresses or blocks that overlap or lie outside.
func checkLab(t testing.TB, lab *Lab) {
	t.Helper()
	if !lab.Underlay4.IsValid() || !lab.Underlay6.IsValid() {
		v4, v6, err := ChooseUnderlay(lab.Prefixes())
		if err != nil {
			return // Pods and Services use all of 10/8 or of fd00::/16: the user has to name an underlay.
		}
		if !lab.Underlay4.IsValid() {
			lab.Underlay4 = v4
		}
		if !lab.Underlay6.IsValid() {
			lab.Underlay6 = v6
		}
	}
	data, err := Record(lab)
	if err != nil {
		t.Fatal(err)
	}
	if read, err := Decode(data, lab.Name); err != nil {
		t.Errorf("what is recorded is not read: %v\n%s", err, data)
	} else if again, err := Record(&read); err != nil || !bytes.Equal(data, again) {
		t.Errorf("recorded is %s\nand read %s, %v", data, again, err)
	}
	owner := map[netip.Addr]string{}
	claim := func(a netip.Addr, who string) {
		if before, taken := owner[a]; taken {
			t.Errorf("%s belongs to %s and to %s", a, before, who)
		}
		owner[a] = who
	}
	for _, p := range lab.UplinkHost() {
		claim(p.Addr(), "host")
	}
	for _, p := range lab.UplinkCore() {
		claim(p.Addr(), "core")
	}
	names := map[string]bool{}
	for i := range lab.Clusters {
		c := &lab.Clusters[i]
		if !lab.APIAddr(c).IsValid() {
			t.Errorf("%s has no API address", c.Name)
		}
		if len(c.ControlPlanes()) > 1 {
			claim(lab.APIAddr(c), c.Name+"'s balancer")
		}
		for _, gw := range c.Gateways(lab) {
			claim(gw, c.Name+"'s gateway")
		}
		var blocks []netip.Prefix
		for j := range c.Nodes {
			n := &c.Nodes[j]
			if names[n.Name] {
				t.Errorf("two nodes are named %s", n.Name)
			}
			names[n.Name] = true
			addrs := lab.NodeAddrs(c, n)
			if len(addrs) != len(c.Families) || len(n.PodCIDRs) != len(c.Families) {
				t.Errorf("%s has addresses %v and blocks %v for families %v", n.Name, addrs, n.PodCIDRs, c.Families)
			}
			for k, a := range addrs {
				claim(a, n.Name)
				if !c.Subnets(lab)[k].Contains(a) {
					t.Errorf("%s has %s, which is not in %s", n.Name, a, c.Subnets(lab)[k])
				}
			}
			for k, p := range n.PodCIDRs {
				if p != p.Masked() || p.Bits() != c.NodeMasks[k] || !c.PodCIDRs[k].Contains(p.Addr()) {
					t.Errorf("%s has block %s of %s", n.Name, p, c.PodCIDRs[k])
				}
			}
			blocks = append(blocks, n.PodCIDRs...)
		}
		blocks = append(blocks, c.ServiceCIDRs...)
		slices.SortFunc(blocks, func(a, b netip.Prefix) int { return a.Addr().Compare(b.Addr()) })
		for j := 1; j < len(blocks); j++ {
			if blocks[j].Overlaps(blocks[j-1]) {
				t.Errorf("in %s, %s and %s overlap", c.Name, blocks[j-1], blocks[j])
			}
		}
	}
}

func TestRandomLabs(t *testing.T) {
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	rnd := rand.New(rand.NewPCG(seed, 0))
	pick := func(s ...string) string { return s[rnd.IntN(len(s))] }
	valid := 0
	for range 300 {
		text := "apiVersion: fathom.network/v1alpha1\nkind: Lab\nclusters:\n"
		for i := range 1 + rnd.IntN(4) {
			text += fmt.Sprintf("- name: c%d\n  controlPlanes: %s\n  workers: %d\n", i, pick("1", "3", "5", "7"), rnd.IntN(201))
			switch rnd.IntN(4) {
			case 0:
				bits := 8 + rnd.IntN(17)
				text += fmt.Sprintf("  podCIDR: 172.16.0.0/%d\n  nodeCIDRMask: %d\n", max(bits, 12), bits+rnd.IntN(9))
			case 1:
				bits := 44 + rnd.IntN(70)
				text += fmt.Sprintf("  podCIDR: fd12::/%d\n  nodeCIDRMask: %d\n", bits, bits+rnd.IntN(17))
			case 2:
				text += "  ipFamily: " + pick("ipv4", "ipv6", "dual") + "\n"
			case 3:
				text += "  podCIDR: " + pick("fd01::/56,10.8.0.0/14", "10.0.0.0/11,fd00::/50") + "\n"
			}
		}
		lab, err := Parse([]byte(text), "lab.yaml", Overrides{})
		if err != nil {
			if !IsInvalid(err) {
				t.Errorf("%v\nfor\n%s", err, text)
			}
			continue
		}
		valid++
		checkLab(t, lab)
		if t.Failed() {
			t.Fatalf("the lab was\n%s", text)
		}
	}
	if valid < 50 {
		t.Errorf("only %d of 300 labs were valid, want more to say something", valid)
	}
}

func TestAddresses(t *testing.T) {
	lab, err := Default(Overrides{IPFamily: "dual"})
	if err != nil {
		t.Fatal(err)
	}
	if a := lab.APIAddr(&lab.Clusters[0]); a.IsValid() || lab.UplinkHost() != nil {
		t.Errorf("a lab without underlay has API address %s", a)
	}
	lab.Underlay4, lab.Underlay6, err = ChooseUnderlay([]netip.Prefix{
		netip.MustParsePrefix("0.0.0.0/0"), // a default route uses nothing
		netip.MustParsePrefix("10.201.3.0/24"),
		netip.MustParsePrefix("fd00:fa:202:5::/64"),
	})
	if err != nil {
		t.Fatal(err)
	}
	east, west := &lab.Clusters[0], &lab.Clusters[1]
	got := fmt.Sprint(lab.Underlay4, lab.Underlay6, east.Subnets(lab), west.Gateways(lab),
		lab.NodeAddrs(west, &west.Nodes[2]), west.Nodes[2].PodCIDRs, lab.APIAddr(west), lab.UplinkHost(), lab.UplinkCore())
	want := "10.203.0.0/16 fd00:fa:203::/48 [10.203.1.0/24 fd00:fa:203:1::/64] [10.203.2.1 fd00:fa:203:2::1] " +
		"[10.203.2.4 fd00:fa:203:2::4] [10.244.2.0/24 fd00:10:244:2::/64] 10.203.2.2 " +
		"[10.203.0.1/24 fd00:fa:203::1/64] [10.203.0.2/24 fd00:fa:203::2/64]"
	if got != want {
		t.Errorf("got  %s\nwant %s", got, want)
	}
	checkLab(t, lab)

	lab, err = Default(Overrides{ControlPlanes: ptr(3), IPFamily: "ipv6"})
	if err != nil {
		t.Fatal(err)
	}
	lab.Underlay6 = netip.MustParsePrefix("fd00:fa:201::/48")
	if got := lab.APIAddr(&lab.Clusters[1]).String(); got != "fd00:fa:201::b" {
		t.Errorf("the balancer of the second cluster is %s, want fd00:fa:201::b", got)
	}

	if _, _, err := ChooseUnderlay([]netip.Prefix{netip.MustParsePrefix("10.0.0.0/8")}); err == nil {
		t.Error("chose an underlay where there is none")
	}
}

func TestDefault(t *testing.T) {
	lab, err := Default(Overrides{})
	if err != nil {
		t.Fatal(err)
	}
	if lab.Name != "fathom" || len(lab.Clusters) != 2 || lab.Clusters[0].Name != "east" || lab.Clusters[1].Name != "west" {
		t.Fatalf("got %+v", lab)
	}
	var names []string
	for _, n := range lab.Clusters[0].Nodes {
		names = append(names, fmt.Sprint(n.Name, " ", n.Role, " ", n.PodCIDRs))
	}
	want := []string{
		"east-control-plane control-plane [10.244.0.0/24]",
		"east-worker1 worker [10.244.1.0/24]",
		"east-worker2 worker [10.244.2.0/24]",
	}
	if !slices.Equal(names, want) {
		t.Errorf("got nodes %q, want %q", names, want)
	}
	if c := lab.Clusters[1]; c.Network != (Network{NetworkFathom, "auto", 4242, 4789}) || c.Proxy != (Proxy{ProxyFathom, "auto"}) ||
		c.ServiceCIDRs[0].String() != "10.96.0.0/16" || c.DNSDomain != "cluster.local" {
		t.Errorf("got %+v", c)
	}
}

func TestJSON(t *testing.T) {
	for _, family := range []string{"ipv4", "ipv6", "dual"} {
		lab, err := Default(Overrides{IPFamily: family, Network: "flannel"})
		if err != nil {
			t.Fatal(err)
		}
		lab.Underlay4 = netip.MustParsePrefix("10.201.0.0/16") // and no Underlay6
		lab.Clusters[0].Nodes[0].Wire.Loss = 0.5
		lab.Clusters[0].FeatureGates = map[string]bool{"AllAlpha": true}
		data, err := json.Marshal(lab)
		if err != nil {
			t.Fatal(err)
		}
		var back Lab
		if err := json.Unmarshal(data, &back); err != nil {
			t.Fatal(err)
		}
		if !reflect.DeepEqual(*lab, back) {
			t.Errorf("got  %+v\nwant %+v", back, *lab)
		}
	}
}

func TestWireValues(t *testing.T) {
	rates := map[string]uint64{"10mbit": 10e6, "1.5gbit": 1.5e9, "1kbps": 8000, "1000bit": 1000, "10": 0, "1bit": 0, "-1mbit": 0, "9999gbit": 0}
	for in, want := range rates {
		if got, err := ParseRate(in); got != want || (err == nil) != (want > 0) {
			t.Errorf("ParseRate(%q) = %d, %v, want %d", in, got, err, want)
		}
	}
	if d, err := ParseDelay("20ms"); d != 20*time.Millisecond || err != nil {
		t.Errorf("ParseDelay: %s, %v", d, err)
	}
	for _, in := range []string{"20", "-1s", "2m", ""} {
		if _, err := ParseDelay(in); err == nil {
			t.Errorf("ParseDelay(%q) passes", in)
		}
	}
	if f, err := ParseLoss("1.5%"); f != 1.5 || err != nil {
		t.Errorf("ParseLoss: %v, %v", f, err)
	}
	for _, in := range []string{"101", "-1", "NaN", ""} {
		if _, err := ParseLoss(in); err == nil {
			t.Errorf("ParseLoss(%q) passes", in)
		}
	}
}
