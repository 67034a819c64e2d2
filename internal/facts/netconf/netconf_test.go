package netconf_test

import (
	"errors"
	"net/netip"
	"reflect"
	"slices"
	"testing"
	"time"

	"github.com/fathom-network/fathom/internal/facts/netconf"
	"github.com/fathom-network/fathom/internal/facts/podnet"
)

func TestParse(t *testing.T) {
	with := func(change func(*netconf.Config)) netconf.Config {
		c := netconf.Default()
		change(&c)
		return c
	}
	for name, tt := range map[string]struct {
		data map[string]string
		want netconf.Config
	}{
		"nothing": {nil, netconf.Default()},
		"all": {map[string]string{"mode": "vxlan", "vni": "7", "port": "8472", "mtu": "1400", "masquerade": "false",
			"nonMasqueradeCIDRs": "192.0.2.0/24, 2001:db8::/32\n198.51.100.0/24", "coolDown": "5s", "fastPath": "off", "policyEstablished": "keep"},
			netconf.Config{PolicyEstablished: netconf.PolicyKeep, DNS: netconf.DNSCluster, ExternalIPs: netconf.ExternalIPsAny, ExternalIPsFor: netconf.ExternalIPsForAll, ServiceProxy: netconf.ProxyOff, Mode: podnet.VXLAN, VNI: 7, Port: 8472, MTU: 1400, CoolDown: 5 * time.Second, NonMasqueradeCIDRs: []netip.Prefix{
				netip.MustParsePrefix("192.0.2.0/24"), netip.MustParsePrefix("2001:db8::/32"), netip.MustParsePrefix("198.51.100.0/24")}}},
		"white space": {map[string]string{"mode": " direct\n"}, with(func(c *netconf.Config) { c.Mode = podnet.Direct })},
		"DNS": {map[string]string{"dns": "node-cache", "serviceProxy": "auto"}, with(func(c *netconf.Config) {
			c.DNS, c.ServiceProxy = netconf.DNSNodeCache, netconf.ProxyAuto
		})},
		"link-local addresses": {map[string]string{"linkLocal": "metadata, 169.254.169.253/32"}, with(func(c *netconf.Config) {
			c.LinkLocal = append(slices.Clone(podnet.Metadata), netip.MustParsePrefix("169.254.169.253/32"))
		})},
		"no link-local address": {map[string]string{"linkLocal": "none"}, netconf.Default()},
		"external IPs": {map[string]string{"externalIPs": "pools", "externalIPsFor": "pods"}, with(func(c *netconf.Config) {
			c.ExternalIPs, c.ExternalIPsFor = netconf.ExternalIPsPools, netconf.ExternalIPsForPods
		})},
		"memory": {map[string]string{"agentMemory": "1Gi", "controllerMemory": "64Mi", "dnsMemory": ""}, with(func(c *netconf.Config) {
			c.AgentMemory, c.ControllerMemory = 1<<30, 64<<20
		})},
		"MTU by itself": {map[string]string{"mtu": "0"}, netconf.Default()},
	} {
		got, err := netconf.Parse(tt.data)
		if err != nil || !reflect.DeepEqual(got, tt.want) {
			t.Errorf("%s: got %+v, %v, want %+v", name, got, err, tt.want)
		}
	}
}

func TestMemory(t *testing.T) {
	for value, want := range map[string]int64{
		"64Mi": 64 << 20, "1Gi": 1 << 30, "1G": 1e9, "500M": 500e6, "70000k": 70e6, "131072Ki": 128 << 20, "134217728": 128 << 20, " 64Mi\n": 64 << 20, "": 0,
		"63Mi": -1, "-1Gi": -1, "1.5Gi": -1, "1e9": -1, "9223372036854775807Gi": -1, "Mi": -1, "512MB": -1, "0": -1,
	} {
		c, err := netconf.Parse(map[string]string{"agentMemory": value})
		if (err != nil) != (want < 0) || err == nil && c.AgentMemory != want {
			t.Errorf("%q: got %d, %v, want %d", value, c.AgentMemory, err, want)
		}
	}
}

func TestNodeCacheNeedsProxy(t *testing.T) {
	_, err := netconf.Parse(map[string]string{"dns": "node-cache"})
	var p *netconf.Problem
	if !errors.As(err, &p) || p.Key != "dns" {
		t.Errorf("got %v, want a problem of dns", err)
	}
}

func TestParseTellsAllProblems(t *testing.T) {
	_, err := netconf.Parse(map[string]string{"mode": "overlay", "vni": "0", "port": "65536", "mtu": "1279", "masquerade": "yes",
		"nonMasqueradeCIDRs": "192.0.2.1/24", "coolDown": "soon", "fastPath": "on", "linkLocal": "metadata, 10.0.0.0/8", "mod": "auto", "externalIPs": "none", "externalIPsFor": "hosts", "agentMemory": "8Mi", "dnsMemory": "much"})
	const want = `agentMemory: "8Mi": want a quantity of memory such as 512Mi, at least 64Mi
coolDown: "soon": want a duration from 0s to 1h0m0s, such as 30s
dnsMemory: "much": want a quantity of memory such as 512Mi, at least 64Mi
externalIPs: "none": want any or pools or off
externalIPsFor: "hosts": want all or pods
fastPath: "on": want auto or off
linkLocal: "metadata, 10.0.0.0/8": "10.0.0.0/8": want none, metadata, or a CIDR within 169.254.0.0/16 such as 169.254.169.253/32, several with commas between them
masquerade: "yes": want true or false
mod: "auto": there is no such setting; want one of agentMemory, controllerMemory, coolDown, dns, dnsMemory, externalIPs, externalIPsFor, fastPath, linkLocal, masquerade, mode, mtu, nodePortAddresses, nonMasqueradeCIDRs, policyEstablished, port, serviceProxy, vni
mode: "overlay": want auto or direct or vxlan
mtu: "1279": want a number from 1280 to 65535
nonMasqueradeCIDRs: "192.0.2.1/24": 192.0.2.1/24 has bits set below its mask; want 192.0.2.0/24
port: "65536": want a number from 1 to 65535
vni: "0": want a number from 1 to 16777215`
	if err == nil || err.Error() != want {
		t.Errorf("got\n%v\nwant\n%s", err, want)
	}
	var p *netconf.Problem
	if !errors.As(err, &p) || p.Key != "agentMemory" {
		t.Errorf("no *Problem in %v", err)
	}
}
