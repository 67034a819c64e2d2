// Package netconf is the network's configuration as an administrator writes it: the ConfigMap fathom-config in
// the namespace fathom-system, one setting a key, so that `kubectl patch` changes one without knowing the rest.
package netconf

import (
	"errors"
	"fmt"
	"maps"
	"math"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/fathom-network/fathom/internal/facts/podnet"
)

// AnnotationPrefix begins the names of the annotations that mean something to the network.
const AnnotationPrefix = "fathom.network/"

// Where the configuration is.
const (
	Namespace = "fathom-system"
	ConfigMap = "fathom-config"
)

// How the agents are found and asked, as deploy/fathom.yaml has them.
const (
	AgentSelector  = "app.kubernetes.io/name=fathom-agent"
	AgentContainer = "agent"
	AgentProgram   = "/fathom-agent"
)

// DefaultPool is the pool of a node's own podCIDRs.
const DefaultPool = "default"

// Config is a configuration that is complete and makes sense by itself.
type Config struct {
	Mode podnet.Mode
	VNI  int // of VXLAN, 1 to 16777215
	Port int // of VXLAN, UDP
	MTU  int // of pods' devices, in bytes; 0 is what the nodes' devices carry
	// Masquerade gives packets of pods that leave the cluster their node's address.
	Masquerade bool
	// NonMasqueradeCIDRs are destinations outside the cluster that see pods' own addresses.
	NonMasqueradeCIDRs []netip.Prefix
	// LinkLocal are link-local addresses and clouds' metadata that pods reach by their node. Without, it forwards to none.
	LinkLocal []netip.Prefix
	// CoolDown is how long an address rests before another pod gets it, if another address is free.
	CoolDown time.Duration
	// ServiceProxy says how the agent carries Services, if it does.
	ServiceProxy ServiceProxy
	// NodePortAddresses are the ranges of the node's addresses at which NodePorts answer; empty is the addresses that
	// its Node has (kube-proxy's `primary`).
	NodePortAddresses []netip.Prefix
	// ExternalIPs says which addresses of Services' spec.externalIPs are served, ExternalIPsFor to whom.
	ExternalIPs    ExternalIPs
	ExternalIPsFor ExternalIPsFor
	// PolicyEstablished says what becomes of connections that are there when policies forbid them.
	PolicyEstablished PolicyEstablished
	// FastPath has packets of pods skip what nothing on the node needs to see, where the kernel can.
	FastPath bool
	// DNS says who answers when something on a node asks the cluster's DNS.
	DNS DNS
	// AgentMemory, ControllerMemory and DNSMemory limit the memory of the programs' containers, in bytes; 0 is what the
	// manifests have. They are filled in when the network is installed: a running pod's limit is not the agents' to change.
	AgentMemory, ControllerMemory, DNSMemory int64
}

// PolicyEstablished says what becomes of a connection that is there when a policy forbids it.
type PolicyEstablished string

const (
	// PolicyRecheck ends it.
	PolicyRecheck PolicyEstablished = "recheck"
	// PolicyKeep lets it go on until one of its ends ends it.
	PolicyKeep PolicyEstablished = "keep"
)

// DNS is a way to answer what is asked at the cluster DNS address.
type DNS string

// The ways.
const (
	// DNSCluster has the cluster's servers answer, as for any Service.
	DNSCluster DNS = "cluster"
	// DNSNodeCache has a cache on the node answer, and the cluster's servers while it does not.
	DNSNodeCache DNS = "node-cache"
)

// NodeCacheAddrs are the addresses that a node's DNS cache has, the same on every node: they are not known outside of it.
// IPv4's is the one that Kubernetes' own documentation has for such a cache; IPv6 has no link-local addresses that go
// without a device, so there it is one of a range made for this (RFC 4193, "fathom" in ASCII).
func NodeCacheAddrs() []netip.Addr {
	return []netip.Addr{netip.AddrFrom4([4]byte{169, 254, 20, 10}), netip.MustParseAddr("fd66:6174:686f:6d::a")}
}

// ServiceProxy is a way to carry Services.
type ServiceProxy string

// The ways. Off leaves them to another, such as kube-proxy.
const (
	ProxyOff ServiceProxy = "off"
	// ProxyAuto has what starts on the node balanced when it connects, where the kernel can, and the rest by nftables.
	ProxyAuto ServiceProxy = "auto"
	// ProxyNFTables has all balanced by nftables.
	ProxyNFTables ServiceProxy = "nftables"
)

// ExternalIPs says which addresses of Services' spec.externalIPs are served. Nodes' own addresses, those of pods and of
// other Services, and the API server's never are.
type ExternalIPs string

const (
	// ExternalIPsAny serves whatever is written down, as Kubernetes documents the field.
	ExternalIPsAny ExternalIPs = "any"
	// ExternalIPsPools serves those that an AddressPool has for the Service and its namespace.
	ExternalIPsPools ExternalIPs = "pools"
	// ExternalIPsOff serves none.
	ExternalIPsOff ExternalIPs = "off"
)

// ExternalIPsFor says to whom external IPs are served.
type ExternalIPsFor string

const (
	// ExternalIPsForAll serves them to everything that starts on a node or comes to it.
	ExternalIPsForAll ExternalIPsFor = "all"
	// ExternalIPsForPods leaves out what starts in a node's own network namespace: the kubelet, the runtime, and
	// host-network pods.
	ExternalIPsForPods ExternalIPsFor = "pods"
)

// Default is the configuration of an empty ConfigMap.
func Default() Config {
	return Config{Mode: podnet.Auto, VNI: podnet.DefaultVNI, Port: podnet.DefaultPort, Masquerade: true, CoolDown: 30 * time.Second,
		ServiceProxy: ProxyOff, ExternalIPs: ExternalIPsAny, ExternalIPsFor: ExternalIPsForAll, PolicyEstablished: PolicyRecheck, FastPath: true, DNS: DNSCluster}
}

// Problem is what is wrong with one setting.
type Problem struct {
	Key, Value, Reason string
}

func (p *Problem) Error() string { return fmt.Sprintf("%s: %q: %s", p.Key, p.Value, p.Reason) }

// settings are the keys and what reads each.
var settings = map[string]func(c *Config, value string) error{
	"mode": func(c *Config, v string) error {
		c.Mode = podnet.Mode(v)
		return oneOf(v, string(podnet.Auto), string(podnet.Direct), string(podnet.VXLAN))
	},
	"vni":  func(c *Config, v string) error { return number(&c.VNI, v, 1, 1<<24-1) },
	"port": func(c *Config, v string) error { return number(&c.Port, v, 1, 65535) },
	"mtu": func(c *Config, v string) error {
		if v == "0" || v == "" {
			c.MTU = 0
			return nil
		}
		return number(&c.MTU, v, minMTU, 65535)
	},
	"masquerade": func(c *Config, v string) error { return boolean(&c.Masquerade, v) },
	"nonMasqueradeCIDRs": func(c *Config, v string) error {
		var err error
		c.NonMasqueradeCIDRs, err = prefixes(v)
		return err
	},
	"linkLocal": func(c *Config, v string) error {
		var err error
		c.LinkLocal, err = linkLocal(v)
		return err
	},
	"coolDown": func(c *Config, v string) error {
		d, err := time.ParseDuration(v)
		if err != nil || d < 0 || d > maxCoolDown {
			return fmt.Errorf("want a duration from 0s to %v, such as 30s", maxCoolDown)
		}
		c.CoolDown = d
		return nil
	},
	"serviceProxy": func(c *Config, v string) error {
		c.ServiceProxy = ServiceProxy(v)
		return oneOf(v, string(ProxyOff), string(ProxyAuto), string(ProxyNFTables))
	},
	"nodePortAddresses": func(c *Config, v string) error {
		c.NodePortAddresses = nil
		if v == "primary" {
			return nil
		}
		var err error
		c.NodePortAddresses, err = prefixes(v)
		return err
	},
	"externalIPs": func(c *Config, v string) error {
		c.ExternalIPs = ExternalIPs(v)
		return oneOf(v, string(ExternalIPsAny), string(ExternalIPsPools), string(ExternalIPsOff))
	},
	"externalIPsFor": func(c *Config, v string) error {
		c.ExternalIPsFor = ExternalIPsFor(v)
		return oneOf(v, string(ExternalIPsForAll), string(ExternalIPsForPods))
	},
	"dns": func(c *Config, v string) error {
		c.DNS = DNS(v)
		return oneOf(v, string(DNSCluster), string(DNSNodeCache))
	},
	"policyEstablished": func(c *Config, v string) error {
		c.PolicyEstablished = PolicyEstablished(v)
		return oneOf(v, string(PolicyRecheck), string(PolicyKeep))
	},
	"fastPath": func(c *Config, v string) error {
		c.FastPath = v == "auto"
		return oneOf(v, "auto", "off")
	},
	"agentMemory":      func(c *Config, v string) error { return memory(&c.AgentMemory, v) },
	"controllerMemory": func(c *Config, v string) error { return memory(&c.ControllerMemory, v) },
	"dnsMemory":        func(c *Config, v string) error { return memory(&c.DNSMemory, v) },
}

const (
	// minMTU is IPv6's least, RFC 8200; IPv4 would do with less, and nobody has it.
	minMTU = 1280
	// minMemory is what the smallest of the programs takes in an empty cluster.
	minMemory = 64 << 20
	// maxCoolDown is more than any client keeps a name's address for; above it a node runs out of addresses.
	maxCoolDown = time.Hour
)

// Keys returns the names of all settings, sorted.
func Keys() []string { return slices.Sorted(maps.Keys(settings)) }

// Parse reads the data of the ConfigMap; nil is the default. The error joins a *Problem for each setting that
// is wrong.
func Parse(data map[string]string) (Config, error) {
	c := Default()
	var problems []error
	for _, key := range slices.Sorted(maps.Keys(data)) {
		value := strings.TrimSpace(data[key])
		set, known := settings[key]
		if !known {
			problems = append(problems, &Problem{key, value, "there is no such setting; want one of " + strings.Join(Keys(), ", ")})
			continue
		}
		if err := set(&c, value); err != nil {
			problems = append(problems, &Problem{key, value, err.Error()})
		}
	}
	if len(problems) == 0 && c.DNS == DNSNodeCache && c.ServiceProxy == ProxyOff {
		problems = append(problems, &Problem{"dns", string(c.DNS), "it is Fathom's Service proxy that leads pods to it, and serviceProxy is off; want serviceProxy auto, or dns cluster"})
	}
	if len(problems) > 0 {
		return Config{}, errors.Join(problems...)
	}
	return c, nil
}

func oneOf(v string, allowed ...string) error {
	if slices.Contains(allowed, v) {
		return nil
	}
	return fmt.Errorf("want %s", strings.Join(allowed, " or "))
}

func number(into *int, v string, low, high int) error {
	n, err := strconv.Atoi(v)
	if err != nil || n < low || n > high {
		return fmt.Errorf("want a number from %d to %d", low, high)
	}
	*into = n
	return nil
}

// memoryUnits are those of Kubernetes' quantities that somebody would write memory in.
var memoryUnits = []struct {
	suffix string
	bytes  int64
}{{"Ki", 1 << 10}, {"Mi", 1 << 20}, {"Gi", 1 << 30}, {"k", 1e3}, {"M", 1e6}, {"G", 1e9}, {"", 1}}

// memory reads a quantity of whole units. Kubernetes' own package would be most of the CNI plugin, which has this one.
func memory(into *int64, v string) error {
	*into = 0
	if v == "" {
		return nil
	}
	for _, unit := range memoryUnits {
		digits, found := strings.CutSuffix(v, unit.suffix)
		if !found {
			continue
		}
		n, err := strconv.ParseInt(digits, 10, 64)
		if err != nil || n > math.MaxInt64/unit.bytes || n*unit.bytes < minMemory {
			break
		}
		*into = n * unit.bytes
		return nil
	}
	return fmt.Errorf("want a quantity of memory such as 512Mi, at least %dMi", minMemory>>20)
}

func boolean(into *bool, v string) error {
	*into = v == "true"
	return oneOf(v, "true", "false")
}

// linkLocal reads what is open of link-local addresses: "none", or a list of which "metadata" is a word.
func linkLocal(v string) ([]netip.Prefix, error) {
	if v == "none" || v == "" {
		return nil, nil
	}
	var list []netip.Prefix
	for _, word := range words(v) {
		if word == "metadata" {
			list = append(list, podnet.Metadata...)
			continue
		}
		found, err := prefixes(word)
		if err != nil || !isLinkLocal(found[0]) {
			return nil, fmt.Errorf("%q: want none, metadata, or a CIDR within 169.254.0.0/16 such as 169.254.169.253/32, several with commas between them", word)
		}
		list = append(list, found...)
	}
	return list, nil
}

func isLinkLocal(p netip.Prefix) bool {
	return p.Addr().Is4() && p.Addr().IsLinkLocalUnicast() && p.Bits() >= 16
}

func words(v string) []string {
	return strings.FieldsFunc(v, func(r rune) bool { return strings.ContainsRune(", \t\r\n", r) })
}

// prefixes reads a list in which commas, spaces and line ends separate.
func prefixes(v string) ([]netip.Prefix, error) {
	var list []netip.Prefix
	for _, word := range words(v) {
		p, err := netip.ParsePrefix(word)
		if err != nil {
			return nil, fmt.Errorf("%q is no CIDR; want something like 192.0.2.0/24, several with commas between them", word)
		}
		if p != p.Masked() {
			return nil, fmt.Errorf("%s has bits set below its mask; want %s", p, p.Masked())
		}
		list = append(list, p)
	}
	return list, nil
}
