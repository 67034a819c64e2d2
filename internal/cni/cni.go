// Package cni is the plugin that the container runtime runs to attach a pod to Fathom's network, and to detach it.
// It takes an address of a pool of this node, and makes the pod's device. It needs nothing but the node's kernel,
// its configuration and a directory: neither the API server nor the agent has to be there.
//
// docs/design/cni.md says why it is as it is.
package cni

import (
	"errors"
	"fmt"
	"io"
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

// Main runs the command that the environment names, as CNI's specification has it, and writes results to out.
func Main(out io.Writer, about string) *types.Error {
	p := plugin{out}
	return skel.PluginMainFuncsWithError(skel.CNIFuncs{
		Add: p.add, Del: p.del, Check: p.check, GC: p.gc, Status: p.status,
	}, version.PluginSupports(conflist.Versions...), about)
}

type plugin struct{ out io.Writer }

// attempts is how many names for the node's device are tried: two containers may share the 25 bits of their name.
const attempts = 3

// add attaches a container. Of what fails half-way nothing stays.
func (p plugin) add(args *skel.CmdArgs) error {
	c, err := parse(args, false)
	if err != nil {
		return asError("read the configuration", err)
	}
	node, pod, err := namespaces(args.Netns)
	if err != nil {
		return err
	}
	defer node.Close()
	defer pod.Close()
	request, err := c.request()
	if err != nil {
		return asError("ask the agent what "+c.pod.String()+" is to have", err)
	}
	store, err := lease.Open(c.DataDir, c.CoolDown)
	if err != nil {
		return asError("open the leases", err)
	}
	l, device, err := c.attach(node, pod, store, request)
	if err != nil {
		return asError("attach "+c.pod.String(), err)
	}
	c.stopFalseSources(node, device)
	if err := c.agent().awaitPolicies(c.pod, l.Addresses, c.Isolates); err != nil {
		return asError("wait for the policies of "+c.pod.String(), errors.Join(err, detach(node, podlink.Delete, store, l)))
	}
	result, err := c.result(l, device).GetAsVersion(c.CNIVersion)
	if err == nil {
		err = result.PrintTo(p.out)
	}
	if err != nil { // the runtime knows nothing of the attachment
		return asError("tell the result", errors.Join(err, detach(node, podlink.Delete, store, l)))
	}
	return nil
}

// attach takes a lease, then makes the device that it names. In this order, whatever is interrupted is found.
func (c *call) attach(node, pod *link.Namespace, store *lease.Store, r ipam.Request) (lease.Lease, podlink.Pod, error) {
	name, taken := 0, 0 // how many names, and addresses, turned out to be others'
	for {
		l, err := c.acquire(node, store, r, name)
		if err != nil {
			return l, podlink.Pod{}, err
		}
		d := c.device(l)
		if err = podlink.Add(node, pod, d); err == nil {
			return l, d, nil
		}
		// What is in the way is not ours to take away; what Add began it has taken away itself.
		var living *podlink.AddressTakenError
		again := false
		switch {
		case isInNode(err):
			name++
			again = name < attempts
		case errors.As(err, &living): // whose lease was lost
			taken++
			again = taken < attempts
		}
		err = errors.Join(err, store.Release(l.Attachment))
		if again && living != nil {
			_, rebuildErr := Rebuild(node, store, c.network(store))
			err = errors.Join(err, rebuildErr)
			again = rebuildErr == nil
		}
		if !again {
			return l, d, err
		}
	}
}

// errNoLeases says that no address is in use. It may be that the node has no pods.
var errNoLeases = errors.New("the store has no leases")

// acquire takes a lease. That none is there it believes the store only if there is no pod's device either.
func (c *call) acquire(node *link.Namespace, store *lease.Store, r ipam.Request, name int) (lease.Lease, error) {
	believed := false
	choose := func(s ipam.State) (ipam.Choice, error) {
		choice, err := ipam.Choose(c.Pools, r, s)
		if err == nil && len(s.InUse) == 0 && !believed {
			err = errNoLeases
		}
		return choice, err
	}
	for {
		l, err := store.Acquire(lease.Lease{
			Attachment: c.attachment, Network: c.Name, PodNamespace: c.pod.namespace, PodName: c.pod.name, PodUID: c.pod.uid,
			Netns: c.netns, HostDevice: hostDevice(c.pod.name, c.attachment, name), Addresses: r.Addresses, HostPorts: c.hostPorts,
		}, choose)
		if !errors.Is(err, errNoLeases) {
			return l, err
		}
		devices, err := podlink.Devices(node)
		if err == nil && len(devices) > 0 {
			_, err = Rebuild(node, store, c.network(store))
		}
		if err != nil {
			return lease.Lease{}, err
		}
		believed = true
	}
}

func isInNode(err error) bool {
	var exists *podlink.DeviceExistsError
	return errors.As(err, &exists) && !exists.InPod
}

// del detaches a container. It may be repeated, and does not mind what is missing.
func (p plugin) del(args *skel.CmdArgs) error {
	c, err := parse(args, true)
	if err != nil {
		return asError("read the configuration", err)
	}
	node, err := link.Here()
	if err != nil {
		return asError("open the node's namespace", err)
	}
	defer node.Close()
	store, err := lease.Open(c.DataDir, c.CoolDown)
	if err != nil {
		return asError("open the leases", err)
	}
	l, found, err := c.find(node, store)
	switch {
	case err == nil && found:
		err = detach(node, deletePod, store, l)
	case err == nil: // a second DEL, or the lease was damaged and the device has gone
		err = store.Release(c.attachment)
	}
	return asError("detach "+c.pod.String(), err)
}

// detach takes the device away, then the lease: as long as an address is on a device, nobody else gets it.
func detach(node *link.Namespace, deletePod func(node *link.Namespace, hostDevice, alias string) error, store lease.Leases, l lease.Lease) error {
	err := deletePod(node, l.HostDevice, alias(l))
	var foreign *podlink.ForeignDeviceError
	if err != nil && !errors.As(err, &foreign) { // a foreign one has the name because ours is gone, or never was
		return err
	}
	return store.Release(l.Attachment)
}

// status says whether pods can be attached.
func (p plugin) status(args *skel.CmdArgs) error {
	c, err := parse(args, false)
	if err != nil {
		return asError("read the configuration", err)
	}
	// Not whether a pool is full, though the specification suggests it: a runtime makes a Node that answers here
	// with an error NotReady, and the pods that run on it would be evicted because there is no room for more. A
	// full pool fails the ADD that finds it full, with an error that says so.
	_, err = ipam.Choose(c.Pools, ipam.Request{}, ipam.State{})
	var none *ipam.NoRangesError
	if errors.As(err, &none) {
		return types.NewError(types.ErrPluginNotAvailable, "the node cannot carry pods yet", none.Error())
	}
	if _, err := lease.Open(c.DataDir, c.CoolDown); err != nil {
		return types.NewError(types.ErrPluginNotAvailable, "the node cannot carry pods", err.Error())
	}
	if reason := c.agent().notReady(); reason != "" {
		return types.NewError(types.ErrPluginNotAvailable, "the agent is not ready", reason)
	}
	return nil
}

// result is what the runtime and the plugins behind us get to know.
func (c *call) result(l lease.Lease, d podlink.Pod) *types100.Result {
	r := &types100.Result{CNIVersion: types100.ImplementedSpecVersion}
	if c.prev != nil { // some plugin made another device before us
		*r = *c.prev
	}
	r.Interfaces = append(r.Interfaces,
		&types100.Interface{Name: d.HostDevice, Mac: d.HostMAC.String(), Mtu: d.MTU},
		&types100.Interface{Name: d.Device, Mac: d.MAC.String(), Mtu: d.MTU, Sandbox: c.netns})
	for _, a := range l.Addresses {
		gateway := podlink.Gateway(a)
		r.IPs = append(r.IPs, &types100.IPConfig{
			Interface: types100.Int(len(r.Interfaces) - 1), Address: ipNet(a, a.BitLen()), Gateway: gateway.AsSlice(),
		})
		r.Routes = append(r.Routes,
			&types.Route{Dst: ipNet(gateway, a.BitLen())},
			&types.Route{Dst: ipNet(unspecified(a), 0), GW: gateway.AsSlice()})
	}
	if !c.DNS.IsEmpty() {
		r.DNS = c.DNS
	}
	return r
}

// namespaces opens the node's namespace, which the plugin is run in, and the pod's.
func namespaces(netns string) (node, pod *link.Namespace, err error) {
	if node, err = link.Here(); err != nil {
		return nil, nil, asError("open the node's namespace", err)
	}
	if pod, err = link.Open(netns); err != nil {
		node.Close()
		return nil, nil, types.NewError(types.ErrInvalidNetNS, "CNI_NETNS is not the network namespace of a pod", err.Error())
	}
	// skel asks, too, but afterwards.
	if same, err := node.Is(pod); err != nil || same {
		node.Close()
		pod.Close()
		return nil, nil, types.NewError(types.ErrInvalidNetNS, "CNI_NETNS is the node's own network namespace", netns)
	}
	return node, pod, nil
}

// asError gives an error its code, and says what was tried. nil stays nil.
func asError(doing string, err error) error {
	if err == nil {
		return nil
	}
	var (
		done    *types.Error
		invalid *conflist.InvalidError
		leased  *lease.ExistsError
		device  *podlink.DeviceExistsError
		taken   *podlink.AddressTakenError
		agent   *agentError
	)
	code := types.ErrInternal
	switch {
	case errors.As(err, &done):
		return done
	case errors.As(err, &invalid), ipam.IsRequest(err):
		code = types.ErrInvalidNetworkConfig
	case ipam.IsTemporary(err), errors.As(err, &agent), errors.As(err, &taken):
		code = types.ErrTryAgainLater
	case errors.As(err, &leased), errors.As(err, &device):
		code = types.ErrInvalidEnvironmentVariables
	case isFile(err):
		code = types.ErrIOFailure
	}
	return types.NewError(code, fmt.Sprintf("%s: %s", doing, strings.ReplaceAll(err.Error(), "\n", "; ")), "")
}
