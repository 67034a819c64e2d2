package fastpath

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"github.com/fathom-network/fathom/internal/facts/podnet"
	"github.com/fathom-network/fathom/internal/kernel/bpf/pin"
	"github.com/fathom-network/fathom/internal/kernel/link"
	"github.com/fathom-network/fathom/internal/kernel/podlink"
)

// prefixKey and remoteValue are the key and value of the map Remotes.
type prefixKey struct {
	Length  uint32
	Address pin.Key
}

type remoteValue struct {
	Index  uint32
	Family uint32
	Via    [16]byte // an IPv4 address is in the first four bytes
}

// state is what the kernel holds or should hold.
type state struct {
	ports   map[uint32]pin.Port
	pods    map[pin.Key]pin.Pod
	remotes map[prefixKey]remoteValue
	// fromPod and fromNet map the devices that have the program to whether it is this version's.
	fromPod, fromNet map[int]bool
}

func (k prefixKey) String() string {
	a := k.Address.Addr()
	bits := int(k.Length)
	if a.Is4() {
		bits -= 96
	}
	return netip.PrefixFrom(a, bits).String()
}

func (v remoteValue) via() netip.Addr {
	if v.Family == unix.AF_INET {
		return netip.AddrFrom4([4]byte(v.Via[:4]))
	}
	return netip.AddrFrom16(v.Via)
}

// wanted computes what the plan means for the existing devices.
func (p *Path) wanted(plan Plan, filters map[int][]link.Filter) (state, error) {
	w := state{ports: map[uint32]pin.Port{}, pods: map[pin.Key]pin.Pod{}, remotes: map[prefixKey]remoteValue{},
		fromPod: map[int]bool{}, fromNet: map[int]bool{}}
	var errs []error
	possible, _ := p.Fast()
	fast := plan.Fast && possible
	ports, err := podlink.Ports(p.node)
	if err != nil {
		return w, err
	}
	for _, port := range ports {
		if len(port.Addrs) == 0 {
			continue
		}
		w.fromPod[port.Index] = true
		w.ports[uint32(port.Index)] = pin.Port{MAC: [6]byte(port.Addrs[0].MAC)}
		for _, a := range port.Addrs {
			pod := pin.Pod{Index: uint32(port.Index), Stack: plan.Slow[a.Addr], MAC: [6]byte(a.MAC), HostMAC: [6]byte(port.HostMAC)}
			if !fast {
				pod.Stack |= pin.Off
			}
			if plan.Free != nil && !plan.Free[a.Addr] {
				pod.Stack |= pin.Policy
			}
			if isShaped(port, filters[port.Index]) {
				pod.Stack |= pin.Shaped
			}
			w.pods[pin.KeyOf(a.Addr)] = pod
		}
	}
	if !fast {
		return w, nil
	}
	index := map[string]int{}
	for _, name := range plan.Devices {
		i, ethernet, err := p.node.Index(name)
		if err != nil {
			errs = append(errs, err)
			continue
		}
		if ethernet { // packets of other devices have no MAC addresses to rewrite: they take the stack
			index[name] = i
			w.fromNet[i] = true
		}
	}
	for _, r := range plan.Remotes {
		i, there := index[r.Device]
		if !there {
			continue
		}
		key, value := remote(r, i)
		w.remotes[key] = value
	}
	return w, errors.Join(errs...)
}

func remote(r podnet.Remote, index int) (prefixKey, remoteValue) {
	key := prefixKey{Length: uint32(r.To.Bits()), Address: pin.KeyOf(r.To.Addr())}
	if r.To.Addr().Is4() {
		key.Length += 96
	}
	value := remoteValue{Index: uint32(index), Family: unix.AF_INET6}
	if r.Via.Is4() {
		value.Family = unix.AF_INET
	}
	copy(value.Via[:], r.Via.AsSlice())
	return key, value
}

// isShaped reports whether a pod's device does more than pass packets on, as with the reference plugin "bandwidth": a
// redirected packet would bypass that.
func isShaped(port podlink.Port, filters []link.Filter) bool {
	return slices.ContainsFunc(port.Qdiscs, func(kind string) bool { return kind != "clsact" }) ||
		slices.ContainsFunc(filters, func(f link.Filter) bool { return f.Egress || f.Name != pin.FromPod })
}

func (p *Path) readMaps() (state, error) {
	s := state{ports: map[uint32]pin.Port{}, pods: map[pin.Key]pin.Pod{}, remotes: map[prefixKey]remoteValue{},
		fromPod: map[int]bool{}, fromNet: map[int]bool{}}
	if err := readMap(p.objects.FathomPorts, s.ports); err != nil {
		return s, fmt.Errorf("read the map %s: %w", pin.Ports, err)
	}
	if err := readMap(p.objects.FathomPods, s.pods); err != nil {
		return s, fmt.Errorf("read the map %s: %w", pin.Pods, err)
	}
	if err := readMap(p.objects.FathomRemotes, s.remotes); err != nil {
		return s, fmt.Errorf("read the map %s: %w", pin.Remotes, err)
	}
	return s, nil
}

// Slow reads the pods whose packets take the stack although there is a fast path, with the reason as a clause; and those whose policies are asked by
// maps, so that their TCP connections take the fast path where policies allow them.
func (p *Path) Slow() (slow map[netip.Addr]string, judged []netip.Addr, err error) {
	pods := map[pin.Key]pin.Pod{}
	if err := readMap(p.objects.FathomPods, pods); err != nil {
		return nil, nil, fmt.Errorf("read the map %s: %w", pin.Pods, err)
	}
	slow = map[netip.Addr]string{}
	for key, pod := range pods {
		var why []string
		for _, r := range []struct {
			bit pin.Stack
			why string
		}{
			{pin.New, "the agent has not processed the pod yet"},
			{pin.Shaped, "its device has a queueing discipline or filters, which the fast path would bypass"},
		} {
			if pod.Stack&r.bit != 0 {
				why = append(why, r.why)
			}
		}
		if pod.Stack&pin.Policy != 0 {
			judges, err := p.judge.judges(key)
			if err != nil {
				return nil, nil, err
			}
			if !judges {
				why = append(why, "policies isolate it, of which the rules alone know")
			} else if pod.Stack == pin.Policy {
				judged = append(judged, key.Addr())
			}
		}
		if len(why) > 0 {
			slow[key.Addr()] = strings.Join(why, "; ")
		}
	}
	slices.SortFunc(judged, netip.Addr.Compare)
	return slow, judged, nil
}

// readMap reads a whole map, which the plugin may write to concurrently. An iteration that a write disturbed is repeated.
func readMap[K comparable, V any](m *ebpf.Map, into map[K]V) error {
	for attempt := 0; ; attempt++ {
		clear(into)
		var key K
		var value V
		i := m.Iterate()
		for i.Next(&key, &value) {
			into[key] = value
		}
		if err := i.Err(); err == nil || !errors.Is(err, ebpf.ErrIterationAborted) || attempt == 3 {
			return err
		}
	}
}

func (p *Path) readAttached(s *state, names map[int]string, filters map[int][]link.Filter) error {
	kinds := []struct {
		name    string
		program *ebpf.Program
		into    map[int]bool
		current ebpf.ProgramID
	}{{name: pin.FromPod, program: p.objects.FathomPod, into: s.fromPod}, {name: pin.FromNet, program: p.objects.FathomWire, into: s.fromNet}}
	for i, x := range kinds {
		info, err := x.program.Info()
		if err != nil {
			return fmt.Errorf("read the program %s: %w", x.name, err)
		}
		kinds[i].current, _ = info.ID()
	}
	for index := range names {
		all, err := attached(p.node, p.Support.TCX, filters[index], index)
		if err != nil {
			return err
		}
		for _, x := range kinds {
			// Plugin and agent may have attached at the same time. Two of the same program are harmless.
			if there := all[x.name]; len(there) > 0 {
				x.into[index] = !slices.ContainsFunc(there, func(a attachment) bool { return a.id != x.current })
			}
		}
	}
	return nil
}
