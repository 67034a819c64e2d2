package topology

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
)

// Record is what Decode reads: a lab with an underlay, as files keep it.
func Record(l *Lab) ([]byte, error) { return json.MarshalIndent(l, "", "  ") }

// Decode reads the record of the lab of that name. What is damaged or of another lab is an error: names of a lab become
// parts of paths, and its nodes' places their addresses.
func Decode(data []byte, name string) (Lab, error) {
	var l Lab
	if err := json.Unmarshal(data, &l); err != nil {
		return Lab{}, err
	}
	if err := l.whole(name); err != nil {
		return Lab{}, err
	}
	return l, nil
}

// whole says what is wrong with a lab that was read. What a user wrote is Parse's to judge; here it is whether this is
// what `up` once recorded.
func (l *Lab) whole(name string) error {
	switch {
	case !IsName(l.Name) || l.Name != name:
		return fmt.Errorf("it is of lab %q", l.Name)
	case !isUnderlay(l.Underlay4, 32, 16) || !isUnderlay(l.Underlay6, 128, 48):
		return fmt.Errorf("%s and %s are no underlays", l.Underlay4, l.Underlay6)
	case len(l.Clusters) == 0:
		return errors.New("it has no clusters")
	}
	clusters, nodes := map[string]bool{}, map[string]bool{}
	for i := range l.Clusters {
		c := &l.Clusters[i]
		if !isShortLabel(c.Name) || clusters[c.Name] || c.Index != i {
			return fmt.Errorf("cluster %d has the name %q and the place %d", i, c.Name, c.Index)
		}
		clusters[c.Name] = true
		if len(c.Families) == 0 || len(c.Families) > 2 || len(c.PodCIDRs) != len(c.Families) || len(c.ServiceCIDRs) != len(c.Families) || len(c.NodeMasks) != len(c.Families) {
			return fmt.Errorf("cluster %s has the families %v, the ranges %v and %v and the masks %v", c.Name, c.Families, c.PodCIDRs, c.ServiceCIDRs, c.NodeMasks)
		}
		for k, f := range c.Families {
			if f != IPv4 && f != IPv6 || !isOf(c.PodCIDRs[k], f) || !isOf(c.ServiceCIDRs[k], f) {
				return fmt.Errorf("cluster %s has the ranges %s and %s of family %q", c.Name, c.PodCIDRs[k], c.ServiceCIDRs[k], f)
			}
		}
		if len(c.Nodes) == 0 || c.Nodes[0].Role != ControlPlane {
			return fmt.Errorf("cluster %s has no control-plane node", c.Name)
		}
		for j, n := range c.Nodes {
			if !dnsLabel.MatchString(n.Name) || nodes[n.Name] || n.Index != j {
				return fmt.Errorf("node %d of cluster %s has the name %q and the place %d", j, c.Name, n.Name, n.Index)
			}
			nodes[n.Name] = true
			if n.Role != ControlPlane && n.Role != Worker || len(n.PodCIDRs) != len(c.Families) {
				return fmt.Errorf("node %s has the role %q and the ranges %v", n.Name, n.Role, n.PodCIDRs)
			}
		}
	}
	return nil
}

func isUnderlay(p netip.Prefix, length, bits int) bool {
	return p.IsValid() && p.Addr().BitLen() == length && p.Bits() == bits
}

func isOf(p netip.Prefix, f Family) bool { return p.IsValid() && p.Addr().Is4() == (f == IPv4) }
