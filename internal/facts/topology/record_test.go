package topology

import (
	"encoding/json"
	"net/netip"
	"testing"

	"github.com/fathom-network/fathom/internal/testenv"
)

func recorded(t testing.TB) (*Lab, []byte) {
	t.Helper()
	lab, err := Default(Overrides{Name: "fathom"})
	testenv.Must(t, err)
	lab.Underlay4, lab.Underlay6 = netip.MustParsePrefix("10.201.0.0/16"), netip.MustParsePrefix("fd00:fa:201::/48")
	data, err := Record(lab)
	testenv.Must(t, err)
	return lab, data
}

func TestDecodeRefuses(t *testing.T) {
	_, whole := recorded(t)
	if _, err := Decode(whole, "fathom"); err != nil {
		t.Fatal(err)
	}
	if _, err := Decode(whole, "other"); err == nil {
		t.Error("the record of one lab was taken for another's")
	}
	for class, data := range testenv.Damages(whole) {
		if l, err := Decode(data, "fathom"); err == nil {
			t.Errorf("%s: %+v", class, l)
		}
	}
	for name, spoil := range map[string]func(l *Lab){
		"no underlay":             func(l *Lab) { l.Underlay6 = netip.Prefix{} },
		"an underlay of a node":   func(l *Lab) { l.Underlay4 = netip.MustParsePrefix("10.201.0.0/32") },
		"no clusters":             func(l *Lab) { l.Clusters = nil },
		"a name that leads out":   func(l *Lab) { l.Clusters[0].Name = "../x" },
		"a node that leads out":   func(l *Lab) { l.Clusters[0].Nodes[1].Name = "../x" },
		"two of one name":         func(l *Lab) { l.Clusters[1].Name = l.Clusters[0].Name },
		"two nodes of one name":   func(l *Lab) { l.Clusters[0].Nodes[1].Name = l.Clusters[0].Nodes[0].Name },
		"another place":           func(l *Lab) { l.Clusters[1].Index = 0 },
		"another place of a node": func(l *Lab) { l.Clusters[0].Nodes[1].Index = 7 },
		"no nodes":                func(l *Lab) { l.Clusters[0].Nodes = nil },
		"no control plane":        func(l *Lab) { l.Clusters[0].Nodes[0].Role = Worker },
		"no families":             func(l *Lab) { l.Clusters[0].Families = nil },
		"a range too few":         func(l *Lab) { l.Clusters[0].PodCIDRs = nil },
		"a range of nothing":      func(l *Lab) { l.Clusters[0].ServiceCIDRs[0] = netip.Prefix{} },
	} {
		l, _ := recorded(t)
		spoil(l)
		data, err := Record(l)
		testenv.Must(t, err)
		if l, err := Decode(data, "fathom"); err == nil {
			t.Errorf("%s: %+v", name, l)
		}
	}
}

// Of what is read everything can be asked.
func FuzzDecode(f *testing.F) {
	_, whole := recorded(f)
	f.Add(whole)
	small := Lab{Name: "fathom", Underlay4: netip.MustParsePrefix("10.201.0.0/16"), Underlay6: netip.MustParsePrefix("fd00:fa:201::/48"), Clusters: []Cluster{{Name: "a",
		Families: []Family{IPv4}, PodCIDRs: []netip.Prefix{netip.MustParsePrefix("10.0.0.0/8")}, ServiceCIDRs: []netip.Prefix{netip.MustParsePrefix("11.0.0.0/8")}, NodeMasks: []int{24},
		Nodes: []Node{{Name: "a-control-plane", Role: ControlPlane, PodCIDRs: []netip.Prefix{netip.MustParsePrefix("10.0.0.0/24")}}}}}}
	data, err := json.Marshal(small)
	testenv.Must(f, err)
	f.Add(data)
	f.Fuzz(func(t *testing.T, data []byte) {
		l, err := Decode(data, "fathom")
		if err != nil {
			return
		}
		if !IsName(l.Name) || len(l.UplinkHost()) != 2 || len(l.UplinkCore()) != 2 {
			t.Fatalf("%+v", l)
		}
		l.Prefixes()
		for i := range l.Clusters {
			c := &l.Clusters[i]
			if !l.APIAddr(c).IsValid() || len(c.Gateways(&l)) != len(c.Families) || len(c.ControlPlanes())+len(c.Workers()) != len(c.Nodes) {
				t.Fatalf("%+v", c)
			}
			for j := range c.Nodes {
				if len(l.NodeAddrs(c, &c.Nodes[j])) != len(c.Families) {
					t.Fatalf("%+v", c.Nodes[j])
				}
			}
		}
	})
}
