package dataplane

import (
	"slices"
	"testing"

	"github.com/fathom-network/fathom/internal/podnet"
)

// What is restored when the network goes is what was there before it came: not the settings of its own tunnel, whose
// files are gone by then.
func TestUnknownSettings(t *testing.T) {
	want := []podnet.Sysctl{{Name: "ipv4/ip_forward", Value: "1"}, {Name: "ipv4/conf/eth0/rp_filter", Value: "2"}, {Name: "ipv4/conf/fathom.vxlan/rp_filter", Value: "2"}}
	got := unknown(want, []podnet.Sysctl{{Name: "ipv4/ip_forward", Value: "0"}})
	if !slices.Equal(got, want[1:2]) {
		t.Errorf("to be remembered: %v, want %v", got, want[1:2])
	}
}
