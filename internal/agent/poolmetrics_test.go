package agent

import (
	"errors"
	"net/netip"
	"strings"
	"testing"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/fathom-network/fathom/internal/facts/inet"
	"github.com/fathom-network/fathom/internal/facts/ipam"
)

// TestPoolMetrics asks for all that Prometheus is told of pools, as it is told.
func TestPoolMetrics(t *testing.T) {
	prefix := netip.MustParsePrefix
	c := poolCollector{func() ([]ipam.Pool, []ipam.Usage, error) {
		return []ipam.Pool{{Name: "default", Ranges: []netip.Prefix{prefix("10.244.1.0/24")}},
				{Name: "public", Ranges: []netip.Prefix{prefix("192.0.2.0/28"), prefix("192.0.2.16/28")}, Fixed: []netip.Prefix{prefix("192.0.2.200/32")}}},
			[]ipam.Usage{{Pool: "public", Family: inet.IPv4, Size: 32, InUse: 5, Cooling: 1}}, nil
	}}
	registry := prometheus.NewPedanticRegistry()
	registry.MustRegister(c)
	families, err := registry.Gather()
	if err != nil {
		t.Fatal(err)
	}
	got := map[string]float64{}
	for _, f := range families {
		for _, m := range f.Metric {
			name := f.GetName()
			for _, l := range m.Label {
				name += " " + l.GetName() + "=" + l.GetValue()
			}
			got[name] = m.GetGauge().GetValue()
		}
	}
	want := map[string]float64{
		"fathom_agent_pool_addresses family=ipv4 pool=public state=size":    32,
		"fathom_agent_pool_addresses family=ipv4 pool=public state=in_use":  5,
		"fathom_agent_pool_addresses family=ipv4 pool=public state=cooling": 1,
		"fathom_agent_pool_blocks fixed=false pool=public":                  2,
		"fathom_agent_pool_blocks fixed=true pool=public":                   1,
	}
	if len(got) != len(want) {
		t.Errorf("%v", got)
	}
	for name, n := range want {
		if v, found := got[name]; !found || v != n {
			t.Errorf("%s is %v, want %v of %v", name, v, n, got)
		}
	}

	c.read = func() ([]ipam.Pool, []ipam.Usage, error) { return nil, nil, errors.New("no such directory") }
	registry = prometheus.NewRegistry()
	registry.MustRegister(c)
	if _, err := registry.Gather(); err == nil || !strings.Contains(err.Error(), "no such directory") {
		t.Errorf("of leases that cannot be read: %v", err)
	}
}
