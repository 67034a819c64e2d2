// Package conflist is the file in /etc/cni/net.d that tells the container runtime of Fathom's network: the agent
// writes it, fathom-cni reads its own part of it.
package conflist

import (
	"encoding/json"
	"fmt"
	"math"
	"net/netip"
	"strings"
	"time"

	"github.com/fathom-network/fathom/internal/facts/inet"
	"github.com/fathom-network/fathom/internal/facts/ipam"
)

// Path is where the agent writes it. Runtimes take the first file by name.
const Path = "/etc/cni/net.d/10-fathom.conflist"

// Plugin is the type of our plugin, the name of its program.
const Plugin = "fathom-cni"

// What holds where the file says nothing.
const (
	DefaultDataDir  = "/var/lib/cni/fathom"
	DefaultCoolDown = 30 * time.Second
)

// Versions of CNI's specification that the plugin speaks, the newest last.
var Versions = []string{"0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0"}

// Config is the part of fathom-cni.
type Config struct {
	MTU int // 0 leaves it to the kernel
	// NodeAddresses are the node's, at most one of each family: the source address when the node talks to a pod.
	NodeAddresses []netip.Addr
	Pools         []ipam.Pool
	DataDir       string        // where the leases are; empty: DefaultDataDir
	CoolDown      time.Duration // how long a released address is given to nobody else; Marshal writes 0 as the default
	AgentSocket   string        // empty: nobody is asked
	// AgentRequired lets no pod of Kubernetes be attached while the agent does not answer: it might have asked for a
	// pool, and would get an address of another.
	AgentRequired bool
	// Isolates says that there are NetworkPolicies. While the agent does not answer, a pod is attached only if the kernel holds their
	// rules (ClosedMark), which keep it closed until the agent knows it.
	Isolates bool
}

// ClosedMark is the name of a file, in the directory of the agent's socket, that is there while the kernel holds policies: what is in that
// directory goes with the boot, as they do.
const ClosedMark = "policies"

// file is Config as it is written.
type file struct {
	MTU           int      `json:"mtu,omitempty"`
	NodeAddresses []string `json:"nodeAddresses"`
	Pools         []pool   `json:"pools"`
	DataDir       string   `json:"dataDir,omitempty"`
	CoolDown      *string  `json:"coolDown,omitempty"`
	AgentSocket   string   `json:"agentSocket,omitempty"`
	AgentRequired bool     `json:"agentRequired,omitempty"`
	Isolates      bool     `json:"isolates,omitempty"`
}

type pool struct {
	Name         string   `json:"name"`
	Ranges       []string `json:"ranges"`
	ExplicitOnly bool     `json:"explicitOnly,omitempty"`
}

// Marshal writes the conflist: fathom-cni, and behind it the reference plugins for host ports and bandwidth.
func Marshal(name string, c Config) ([]byte, error) {
	if err := c.Validate(); err != nil {
		return nil, err
	}
	f := file{MTU: c.MTU, NodeAddresses: []string{}, Pools: []pool{}, DataDir: c.DataDir, AgentSocket: c.AgentSocket, AgentRequired: c.AgentRequired, Isolates: c.Isolates}
	if c.CoolDown != 0 {
		coolDown := c.CoolDown.String()
		f.CoolDown = &coolDown
	}
	for _, a := range c.NodeAddresses {
		f.NodeAddresses = append(f.NodeAddresses, a.String())
	}
	for _, p := range c.Pools {
		ranges := []string{}
		for _, r := range p.Ranges {
			ranges = append(ranges, r.String())
		}
		f.Pools = append(f.Pools, pool{p.Name, ranges, p.ExplicitOnly})
	}
	type capable struct {
		Type         string          `json:"type"`
		Capabilities map[string]bool `json:"capabilities,omitempty"`
	}
	return json.MarshalIndent(map[string]any{
		"cniVersion": Versions[len(Versions)-1],
		// Runtimes that know only an older version choose it from here.
		"cniVersions": Versions,
		"name":        name,
		"plugins": []any{
			struct {
				capable
				file
			}{capable{Plugin, map[string]bool{"ips": true, "mac": true, "bandwidth": true, "portMappings": true}}, f},
			capable{"portmap", map[string]bool{"portMappings": true}},
			capable{"bandwidth", map[string]bool{"bandwidth": true}},
		},
	}, "", "  ")
}

// Parse reads and validates the part of fathom-cni, as the runtime passes it to the plugin. All problems are told
// at once. What the file leaves out gets its default.
func Parse(data []byte) (Config, error) {
	var f file
	if err := json.Unmarshal(data, &f); err != nil {
		return Config{}, &InvalidError{[]Problem{{Message: err.Error()}}}
	}
	var ps problems
	c := Config{MTU: f.MTU, DataDir: f.DataDir, CoolDown: DefaultCoolDown, AgentSocket: f.AgentSocket, AgentRequired: f.AgentRequired, Isolates: f.Isolates}
	if c.DataDir == "" {
		c.DataDir = DefaultDataDir
	}
	if f.CoolDown != nil {
		d, err := time.ParseDuration(*f.CoolDown)
		if err != nil {
			ps.add("coolDown", *f.CoolDown, "not a duration; want something like 30s")
		}
		c.CoolDown = d
	}
	for i, s := range f.NodeAddresses {
		a, err := netip.ParseAddr(s)
		if err != nil {
			ps.add(fmt.Sprintf("nodeAddresses[%d]", i), s, "not an address; want something like 10.201.1.3")
			continue
		}
		c.NodeAddresses = append(c.NodeAddresses, a)
	}
	for i, p := range f.Pools {
		to := ipam.Pool{Name: p.Name, ExplicitOnly: p.ExplicitOnly}
		for k, s := range p.Ranges {
			r, err := netip.ParsePrefix(s)
			if err != nil {
				ps.add(fmt.Sprintf("pools[%d].ranges[%d]", i, k), s, "not a prefix; want something like 10.244.1.0/24")
				continue
			}
			to.Ranges = append(to.Ranges, r)
		}
		c.Pools = append(c.Pools, to)
	}
	if len(ps) > 0 {
		c.validate(&ps, true)
	} else {
		c.validate(&ps, false)
	}
	if len(ps) > 0 {
		return Config{}, &InvalidError{ps}
	}
	return c, nil
}

// Ranges that no pod can have an address of.
var unusable = []struct {
	prefix netip.Prefix
	use    string
}{
	{netip.MustParsePrefix("0.0.0.0/8"), "this network"},
	{netip.MustParsePrefix("127.0.0.0/8"), "loopback"},
	{netip.MustParsePrefix("169.254.0.0/16"), "link-local addresses"},
	{netip.MustParsePrefix("224.0.0.0/3"), "multicast and experiments"},
	{netip.MustParsePrefix("::/8"), "loopback and mapped addresses"},
	{netip.MustParsePrefix("fe80::/10"), "link-local addresses"},
	{netip.MustParsePrefix("ff00::/8"), "multicast"},
}

// Validate reports all problems, each with its path. A configuration without pools or ranges is valid: the node
// is not ready to carry pods yet.
func (c Config) Validate() error {
	var ps problems
	c.validate(&ps, false)
	if len(ps) > 0 {
		return &InvalidError{ps}
	}
	return nil
}

// validate checks what could be read. Of a list with an unreadable member the indices do not fit what was
// written any more: partial leaves out what would be told by index.
func (c Config) validate(ps *problems, partial bool) {
	if c.MTU != 0 && (c.MTU < 576 || c.MTU > math.MaxUint16) {
		ps.add("mtu", fmt.Sprint(c.MTU), "want 576 to 65535, or 0 for the kernel's")
	}
	if c.DataDir != "" && !strings.HasPrefix(c.DataDir, "/") {
		ps.add("dataDir", c.DataDir, "want an absolute path")
	}
	if c.AgentSocket != "" && !strings.HasPrefix(c.AgentSocket, "/") {
		ps.add("agentSocket", c.AgentSocket, "want an absolute path")
	}
	if c.CoolDown < 0 {
		ps.add("coolDown", c.CoolDown.String(), "want a duration of 0s or more")
	}
	if partial {
		return
	}
	node := map[inet.Family]bool{}
	for i, a := range c.NodeAddresses {
		path, f := fmt.Sprintf("nodeAddresses[%d]", i), inet.FamilyOf(a)
		switch {
		case !a.IsValid() || a.Zone() != "" || a.Is4In6() || a.IsUnspecified() || a.IsLoopback() || a.IsMulticast() || a.IsLinkLocalUnicast():
			ps.add(path, a.String(), "want a unicast address that other machines reach")
		case node[f]:
			ps.add(path, a.String(), "a second %s address; want at most one of each family", f)
		}
		node[f] = true
	}
	c.validatePools(ps, node)
}

func (c Config) validatePools(ps *problems, node map[inet.Family]bool) {
	names := map[string]bool{}
	var seen []struct {
		netip.Prefix
		path string
	}
	for i, p := range c.Pools {
		path := fmt.Sprintf("pools[%d]", i)
		switch {
		case p.Name == "":
			ps.add(path+".name", "", "want a name")
		case names[p.Name]:
			ps.add(path+".name", p.Name, "another pool has this name")
		}
		names[p.Name] = true
	ranges:
		for k, r := range p.Ranges {
			path := fmt.Sprintf("%s.ranges[%d]", path, k)
			f := inet.FamilyOf(r.Addr())
			switch {
			case !r.IsValid() || r.Addr().Is4In6():
				ps.add(path, r.String(), "want a prefix such as 10.244.1.0/24 or fd00:10:244:1::/64")
				continue
			case r != r.Masked():
				ps.add(path, r.String(), "host bits are set; want %s", r.Masked())
				continue
			case f == inet.IPv6 && c.MTU != 0 && c.MTU < 1280:
				ps.add(path, r.String(), "IPv6 needs an mtu of 1280 or more (RFC 8200), not %d", c.MTU)
			case !node[f]:
				ps.add(path, r.String(), "the node has no %s address in nodeAddresses", f)
			}
			for _, u := range unusable {
				if r.Overlaps(u.prefix) {
					ps.add(path, r.String(), "overlaps %s, which is for %s", u.prefix, u.use)
					continue ranges
				}
			}
			for n, a := range c.NodeAddresses {
				if r.Contains(a) {
					ps.add(path, r.String(), "holds nodeAddresses[%d], %s", n, a)
				}
			}
			for _, other := range seen {
				if other.Overlaps(r) {
					ps.add(path, r.String(), "overlaps %s, %s", other.path, other.Prefix)
				}
			}
			seen = append(seen, struct {
				netip.Prefix
				path string
			}{r, path})
		}
	}
}
