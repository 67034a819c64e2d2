package cni

import (
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"math"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/containernetworking/cni/pkg/skel"
	"github.com/containernetworking/cni/pkg/types"
	types100 "github.com/containernetworking/cni/pkg/types/100"
	"github.com/containernetworking/cni/pkg/version"

	"github.com/fathom-network/fathom/internal/facts/conflist"
	"github.com/fathom-network/fathom/internal/facts/ipam"
	"github.com/fathom-network/fathom/internal/kernel/lease"
	"github.com/fathom-network/fathom/internal/kernel/link"
	"github.com/fathom-network/fathom/internal/kernel/podlink"
)

// call is what the runtime asks for: everything in it is checked.
type call struct {
	conflist.Config
	CNIVersion string
	Name       string // the network's
	DNS        types.DNS
	attachment lease.Attachment
	netns      string
	pod        podName
	addresses  []netip.Addr // asked for by the runtime
	mac        net.HardwareAddr
	prev       *types100.Result
	valid      []lease.Attachment // GC; nil if the runtime did not say
	hostPorts  []lease.HostPort   // nil if the runtime was not asked for them
	// limitsEgress says that what the pod sends is to be limited, by the plugin "bandwidth" behind this one.
	limitsEgress bool
}

// podName is who the container is to Kubernetes; empty if it is nobody there.
type podName struct{ namespace, name, uid string }

func (p podName) String() string {
	if p.name == "" {
		return "the container"
	}
	return "pod " + p.namespace + "/" + p.name
}

// parse reads what the runtime passes. DEL and GC are lenient: what the configuration says of pools is of no
// interest to them, and a mistake there must not keep pods from going.
func parse(args *skel.CmdArgs, lenient bool) (*call, error) {
	var in struct {
		types.PluginConf
		RuntimeConfig struct {
			IPs       []string `json:"ips"`
			MAC       string   `json:"mac"`
			Bandwidth struct {
				EgressRate uint64 `json:"egressRate"` // bits per second
			} `json:"bandwidth"`
			PortMappings []portMapping `json:"portMappings"`
		} `json:"runtimeConfig"`
		Args struct {
			CNI struct {
				IPs []string `json:"ips"`
			} `json:"cni"`
		} `json:"args"`
		DataDir string           `json:"dataDir"`
		Valid   *json.RawMessage `json:"cni.dev/valid-attachments"`
	}
	if err := json.Unmarshal(args.StdinData, &in); err != nil {
		return nil, types.NewError(types.ErrDecodingFailure, "the configuration is not what it should be", err.Error())
	}
	c := &call{
		CNIVersion: in.CNIVersion, Name: in.Name, DNS: in.DNS, netns: args.Netns, limitsEgress: in.RuntimeConfig.Bandwidth.EgressRate > 0,
		attachment: lease.Attachment{ContainerID: args.ContainerID, IfName: args.IfName},
	}
	var err error
	if c.Config, err = conflist.Parse(args.StdinData); err != nil {
		if !lenient || in.DataDir != "" && !strings.HasPrefix(in.DataDir, "/") {
			return nil, err
		}
		c.Config = conflist.Config{DataDir: cmp.Or(in.DataDir, conflist.DefaultDataDir), CoolDown: conflist.DefaultCoolDown}
	}
	ip, err := c.parseArgs(args.Args)
	if err != nil {
		return nil, types.NewError(types.ErrInvalidEnvironmentVariables, "CNI_ARGS is not what it should be", err.Error())
	}
	if in.Valid != nil {
		if err := c.parseValid(*in.Valid); err != nil {
			return nil, types.NewError(types.ErrDecodingFailure, "cni.dev/valid-attachments is not what it should be", err.Error())
		}
	}
	if lenient {
		return c, nil
	}
	if err := version.ParsePrevResult(&in.PluginConf); err != nil {
		return nil, types.NewError(types.ErrDecodingFailure, "prevResult is not what it should be", err.Error())
	}
	if in.PrevResult != nil {
		if c.prev, err = types100.GetResult(in.PrevResult); err != nil {
			return nil, types.NewError(types.ErrDecodingFailure, "prevResult is not what it should be", err.Error())
		}
	}
	// The conventions of CNI: what the runtime says goes before "args", and those before CNI_ARGS.
	asked := in.RuntimeConfig.IPs
	if len(asked) == 0 {
		asked = in.Args.CNI.IPs
	}
	if len(asked) == 0 && ip != "" {
		asked = []string{ip}
	}
	for _, s := range asked {
		address, _, _ := strings.Cut(s, "/") // a prefix length may come with it; a pod's is always that of one address
		a, err := netip.ParseAddr(address)
		if err != nil || a.Zone() != "" {
			return nil, types.NewError(types.ErrInvalidNetworkConfig, "an address that is asked for is none", s)
		}
		c.addresses = append(c.addresses, a.Unmap())
	}
	if in.Capabilities["portMappings"] {
		if c.hostPorts, err = readPorts(in.RuntimeConfig.PortMappings); err != nil {
			return nil, types.NewError(types.ErrInvalidNetworkConfig, "a host port is none", err.Error())
		}
	}
	if m := in.RuntimeConfig.MAC; m != "" {
		if c.mac, err = net.ParseMAC(m); err != nil || len(c.mac) != 6 || c.mac[0]&1 != 0 {
			return nil, types.NewError(types.ErrInvalidNetworkConfig, "the MAC address that is asked for is not one of a device", m)
		}
	}
	return c, nil
}

// portMapping is a host port as CNI's conventions have it.
type portMapping struct {
	HostPort, ContainerPort int
	Protocol, HostIP        string
}

// readPorts reads what portmap, behind this plugin, makes host ports of.
func readPorts(all []portMapping) ([]lease.HostPort, error) {
	ports := []lease.HostPort{}
	for _, m := range all {
		if m.HostPort <= 0 { // as portmap does
			continue
		}
		p := lease.HostPort{Protocol: strings.ToLower(cmp.Or(m.Protocol, "tcp")), Port: uint16(m.HostPort), Container: uint16(m.ContainerPort)}
		if m.HostPort > math.MaxUint16 || m.ContainerPort <= 0 || m.ContainerPort > math.MaxUint16 {
			return nil, fmt.Errorf("port %d of the node to port %d of the pod: want 1 to 65535", m.HostPort, m.ContainerPort)
		}
		if m.HostIP != "" {
			var err error
			if p.Addr, err = netip.ParseAddr(m.HostIP); err != nil {
				return nil, err
			}
			p.Addr = p.Addr.WithZone("")
		}
		ports = append(ports, p)
	}
	return ports, nil
}

// parseArgs reads CNI_ARGS, such as K8S_POD_NAMESPACE=default;K8S_POD_NAME=web. Keys of others are ignored.
func (c *call) parseArgs(s string) (ip string, err error) {
	for pair := range strings.SplitSeq(s, ";") {
		if pair == "" {
			continue
		}
		key, value, found := strings.Cut(pair, "=")
		if !found || key == "" {
			return "", fmt.Errorf("%q is not KEY=VALUE", pair)
		}
		switch key {
		case "K8S_POD_NAMESPACE":
			c.pod.namespace = value
		case "K8S_POD_NAME":
			c.pod.name = value
		case "K8S_POD_UID":
			c.pod.uid = value
		case "IP":
			ip = value
		}
	}
	return ip, nil
}

func (c *call) parseValid(data json.RawMessage) error {
	c.valid = []lease.Attachment{}
	return json.Unmarshal(data, &c.valid)
}

// request is what the pod is to have: what the runtime says, or else what the agent knows of it.
func (c *call) request() (ipam.Request, error) {
	if len(c.addresses) > 0 || c.pod.name == "" {
		return ipam.Request{Addresses: c.addresses}, nil
	}
	return c.agent().request(c.pod)
}

// network is the network that the call is of.
func (c *call) network(store *lease.Store) Network {
	n := Network{Name: c.Name, Namespaces: netnsDir, Pools: func() []ipam.Pool {
		state, err := store.Look()
		if err != nil {
			return c.Pools
		}
		return slices.Concat(c.Pools, state.Pools)
	}}
	if c.netns != "" {
		n.Namespaces = filepath.Dir(c.netns)
	}
	return n
}

// netnsDir is where runtimes mount the namespaces of pods.
const netnsDir = "/run/netns"

// find returns the lease of the attachment. One that was lost, whose device is there, is made again.
func (c *call) find(node *link.Namespace, store *lease.Store) (l lease.Lease, found bool, err error) {
	if l, found, err = c.read(store); err != nil || found {
		return l, found, err
	}
	if found, err = c.hasDevice(node); err != nil || !found {
		return l, false, err
	}
	if _, err = Rebuild(node, store, c.network(store)); err != nil {
		return l, false, err
	}
	return c.read(store)
}

// read returns the lease of the attachment, be it its own or one that was made again of its device.
func (c *call) read(store *lease.Store) (l lease.Lease, found bool, err error) {
	names := []lease.Attachment{c.attachment}
	for attempt := range attempts {
		names = append(names, lease.StandIn(hostDevice(c.pod.name, c.attachment, attempt), c.attachment.IfName))
	}
	for _, a := range names {
		if l, found, err = store.Find(a); err != nil || found {
			return l, found, err
		}
	}
	return l, false, nil
}

// hasDevice says whether the node has a device of a name that the attachment's may have.
func (c *call) hasDevice(node *link.Namespace) (bool, error) {
	want := alias(lease.Lease{Attachment: c.attachment, Network: c.Name, PodNamespace: c.pod.namespace, PodName: c.pod.name})
	for attempt := range attempts {
		_, found, err := podlink.Find(node, hostDevice(c.pod.name, c.attachment, attempt), want)
		var foreign *podlink.ForeignDeviceError
		if found || err != nil && !errors.As(err, &foreign) {
			return found, err
		}
	}
	return false, nil
}

// device is the pod's device as the lease has it.
func (c *call) device(l lease.Lease) podlink.Pod {
	d := podlink.Pod{
		Device: l.IfName, MAC: c.mac, HostDevice: l.HostDevice, HostMAC: mac(l.Attachment, "node"),
		Alias: alias(l), MTU: c.MTU, Addrs: l.Addresses, Sources: c.NodeAddresses,
	}
	if d.MAC == nil {
		d.MAC = mac(l.Attachment, "pod")
	}
	return d
}

func isFile(err error) bool {
	var path *fs.PathError
	var linked *os.LinkError
	return errors.As(err, &path) || errors.As(err, &linked)
}

func ipNet(a netip.Addr, bits int) net.IPNet {
	return net.IPNet{IP: a.AsSlice(), Mask: net.CIDRMask(bits, a.BitLen())}
}

func unspecified(like netip.Addr) netip.Addr {
	if like.Is4() {
		return netip.IPv4Unspecified()
	}
	return netip.IPv6Unspecified()
}
