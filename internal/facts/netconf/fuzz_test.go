package netconf

import (
	"errors"
	"testing"
	"time"
)

// What is accepted is within the bounds that its users rely on; what is not is told as a *Problem.
func FuzzParse(f *testing.F) {
	for _, seed := range [][2]string{{"mode", "vxlan"}, {"vni", "16777215"}, {"port", "0"}, {"mtu", " 1280 "}, {"masquerade", "true"}, {"coolDown", "30s"}, {"coolDown", "-1ns"},
		{"nonMasqueradeCIDRs", "10.0.0.0/8, fd00::/8"}, {"nodePortAddresses", "primary"}, {"dns", "node-cache"}, {"serviceProxy", "auto"}, {"fastPath", "off"}, {"x", "y"}} {
		f.Add(seed[0], seed[1], "serviceProxy", "nftables")
	}
	f.Fuzz(func(t *testing.T, key, value, otherKey, otherValue string) {
		c, err := Parse(map[string]string{key: value, otherKey: otherValue})
		if err != nil {
			var p *Problem
			if !errors.As(err, &p) {
				t.Errorf("%v is no Problem", err)
			}
			return
		}
		if c.VNI < 1 || c.VNI >= 1<<24 || c.Port < 1 || c.Port > 65535 || c.MTU != 0 && (c.MTU < 1280 || c.MTU > 65535) || c.CoolDown < 0 || c.CoolDown > time.Hour {
			t.Errorf("%+v", c)
		}
		for _, p := range append(c.NonMasqueradeCIDRs, c.NodePortAddresses...) {
			if !p.IsValid() || p != p.Masked() {
				t.Errorf("range %s", p)
			}
		}
	})
}
