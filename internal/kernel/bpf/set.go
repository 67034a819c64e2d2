package bpf

import (
	"cmp"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"slices"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"github.com/fathom-network/fathom/internal/facts/diff"
	"github.com/fathom-network/fathom/internal/facts/podnet"
	"github.com/fathom-network/fathom/internal/kernel/bpf/pin"
	"github.com/fathom-network/fathom/internal/kernel/link"
)

// prefixKey and remoteValue are what the map Remotes holds.
type prefixKey struct {
	Length  uint32
	Address pin.Key
}

type remoteValue struct {
	Index  uint32
	Family uint32
	Via    [16]byte // an IPv4 address is in the first four bytes
}

// state is what the kernel holds, or should.
type state struct {
	ports   map[uint32]pin.Port
	pods    map[pin.Key]pin.Pod
	remotes map[prefixKey]remoteValue
	// fromPod and fromNet are the devices that have the program, and whether it is the one of this version.
	fromPod, fromNet map[int]bool
}

// Changes counts what Set changed.
type Changes struct {
	Programs, Pods, Remotes diff.Count
}

// Total is how many changes there were.
func (c Changes) Total() int {
	n := 0
	for _, x := range []diff.Count{c.Programs, c.Pods, c.Remotes} {
		n += x.Added + x.Corrected + x.Removed
	}
	return n
}

func (c Changes) String() string {
	return fmt.Sprintf("programs %v, pods %v, remotes %v", c.Programs, c.Pods, c.Remotes)
}

// Set makes the kernel hold what the plan says, and may be repeated. What is in the way of one thing does not keep
// it from the others.
//
// At no time may a connection's packets be redirected one way and not the other: conntrack would see half of it, and
// rules of others drop what it holds to be invalid. So a pod becomes fast, both ways in one step, when everything
// else is there, and slow before anything is taken away.
func (p *Path) Set(plan Plan) (Changes, error) {
	var c Changes
	// Before the devices are listed: what is in the maps now and has no device then, has none.
	have, err := p.readMaps()
	if err != nil {
		return c, err
	}
	names, err := p.node.Names()
	if err != nil {
		return c, err
	}
	filters, err := p.node.Filters()
	if err != nil {
		return c, err
	}
	want, problems := p.wanted(plan, filters)
	errs := []error{problems}
	if err := p.readAttached(&have, names, filters); err != nil {
		return c, err
	}
	fail := func(what string, err error) {
		if err != nil {
			errs = append(errs, fmt.Errorf("%s: %w", what, err))
		}
	}

	for key, w := range want.pods { // slower
		if h, there := have.pods[key]; there && h.Stack == 0 && w.Stack != 0 {
			fail("write the map "+pin.Pods, p.objects.FathomPods.Update(key, w, ebpf.UpdateAny))
			have.pods[key] = w
			c.Pods.Corrected++
		}
	}
	for index := range want.fromNet {
		if _, there := have.fromNet[index]; !there {
			fail("device "+names[index], attach(p.node, p.Support.TCX, index, pin.FromNet, p.objects.FathomWire))
			c.Programs.Added++
		}
	}
	for key, w := range want.remotes {
		if h, there := have.remotes[key]; !there || h != w {
			fail("write the map "+pin.Remotes, p.objects.FathomRemotes.Update(key, w, ebpf.UpdateAny))
			c.Remotes.Added++
		}
	}
	for index, w := range want.ports {
		if h, there := have.ports[index]; !there || h != w {
			fail("write the map "+pin.Ports, p.objects.FathomPorts.Update(index, w, ebpf.UpdateAny))
		}
	}
	for key, w := range want.pods {
		h, there := have.pods[key]
		if there && h.Index == w.Index && h.MAC == w.MAC && h.HostMAC == w.HostMAC {
			continue
		}
		if _, has := have.fromPod[int(w.Index)]; !has {
			w.Stack |= pin.New // until its program is there
		}
		fail("write the map "+pin.Pods, p.objects.FathomPods.Update(key, w, ebpf.UpdateAny))
		have.pods[key] = w
		c.Pods.Added++
	}
	for index := range want.fromNet {
		if current, there := have.fromNet[index]; there && !current {
			fail("device "+names[index], attach(p.node, p.Support.TCX, index, pin.FromNet, p.objects.FathomWire))
			c.Programs.Corrected++
		}
	}
	for index := range want.fromPod {
		current, there := have.fromPod[index]
		if current {
			continue
		}
		if err := attach(p.node, p.Support.TCX, index, pin.FromPod, p.objects.FathomPod); err != nil {
			if !isGone(err) { // the pod was faster
				fail("device "+names[index], err)
			}
			for key, w := range want.pods { // it stays slow
				if int(w.Index) == index {
					w.Stack |= pin.New
					want.pods[key] = w
				}
			}
			continue
		}
		if there {
			c.Programs.Corrected++
		} else {
			c.Programs.Added++
		}
	}
	for key, w := range want.pods { // faster
		if have.pods[key] != w {
			fail("write the map "+pin.Pods, p.objects.FathomPods.Update(key, w, ebpf.UpdateAny))
			c.Pods.Corrected++
		}
	}

	for key := range have.remotes {
		if _, wanted := want.remotes[key]; !wanted {
			fail("delete from the map "+pin.Remotes, ignoreMissing(p.objects.FathomRemotes.Delete(key)))
			c.Remotes.Removed++
		}
	}
	for index := range have.fromNet {
		if _, wanted := want.fromNet[index]; !wanted {
			fail("device "+names[index], detach(p.node, p.Support.TCX, index, pin.FromNet))
			c.Programs.Removed++
		}
	}
	for key, h := range have.pods {
		if _, wanted := want.pods[key]; wanted {
			continue
		}
		if _, there := names[int(h.Index)]; there {
			continue // its device is being made, or has not lost all of its addresses
		}
		fail("delete from the map "+pin.Pods, p.forget(key, h))
		c.Pods.Removed++
	}
	for index := range have.ports {
		if _, there := names[int(index)]; !there {
			fail("delete from the map "+pin.Ports, ignoreMissing(p.objects.FathomPorts.Delete(index)))
		}
	}
	return c, errors.Join(errs...)
}

// forget deletes a pod's address, unless the plugin has given it to another pod meanwhile.
func (p *Path) forget(key pin.Key, h pin.Pod) error {
	var last pin.Pod
	if err := p.objects.FathomPods.LookupAndDelete(key, &last); err != nil {
		return ignoreMissing(err)
	}
	if last.Index != h.Index {
		return p.objects.FathomPods.Update(key, last, ebpf.UpdateNoExist)
	}
	return nil
}

func ignoreMissing(err error) error {
	if errors.Is(err, ebpf.ErrKeyNotExist) {
		return nil
	}
	return err
}

func isGone(err error) bool { return errors.Is(err, unix.ENODEV) || errors.Is(err, unix.ENOENT) }

// wanted works out what the plan means for the devices that there are.
func (p *Path) wanted(plan Plan, filters map[int][]link.Filter) (state, error) {
	w := state{ports: map[uint32]pin.Port{}, pods: map[pin.Key]pin.Pod{}, remotes: map[prefixKey]remoteValue{},
		fromPod: map[int]bool{}, fromNet: map[int]bool{}}
	var errs []error
	possible, _ := p.Fast()
	fast := plan.Fast && possible
	ports, err := p.node.PodPorts()
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
		if ethernet { // others have no addresses to rewrite; packets that come in by them are the stack's
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

// isShaped says whether a pod's device does more than hand packets on, as the reference plugin "bandwidth" has it:
// a packet that is redirected goes past what does that.
func isShaped(port link.PodPort, filters []link.Filter) bool {
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

// readMap reads a whole map, which the plugin may write to meanwhile. A walk that it upset is begun again.
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
			// Two of the same do what one does: plugin and agent may attach at once.
			if there := all[x.name]; len(there) > 0 {
				x.into[index] = !slices.ContainsFunc(there, func(a attachment) bool { return a.id != x.current })
			}
		}
	}
	return nil
}

// Difference is something that the kernel does not hold as the plan says.
type Difference struct {
	What       string // such as "pod 10.244.1.7"
	Want, Have string // empty for none
}

func (d Difference) String() string {
	switch {
	case d.Have == "":
		return fmt.Sprintf("%s is missing (%s)", d.What, d.Want)
	case d.Want == "":
		return fmt.Sprintf("%s is there and should not be (%s)", d.What, d.Have)
	}
	return fmt.Sprintf("%s: want %s, have %s", d.What, d.Want, d.Have)
}

// Check compares the kernel with the plan and changes nothing.
func (p *Path) Check(plan Plan) ([]Difference, error) {
	have, err := p.readMaps()
	if err != nil {
		return nil, err
	}
	names, err := p.node.Names()
	if err != nil {
		return nil, err
	}
	filters, err := p.node.Filters()
	if err != nil {
		return nil, err
	}
	want, err := p.wanted(plan, filters)
	if err != nil {
		return nil, err
	}
	if err := p.readAttached(&have, names, filters); err != nil {
		return nil, err
	}
	var d []Difference
	d = append(d, differences(want.pods, have.pods, func(k pin.Key) string { return "pod " + k.Addr().String() },
		func(v pin.Pod) string {
			return fmt.Sprintf("device %s, MAC %x, %s", names[int(v.Index)], v.MAC, v.Stack)
		})...)
	d = append(d, differences(want.ports, have.ports, func(k uint32) string { return "port " + cmp.Or(names[int(k)], fmt.Sprint(k)) },
		func(v pin.Port) string { return fmt.Sprintf("MAC %x", v.MAC) })...)
	d = append(d, differences(want.remotes, have.remotes, func(k prefixKey) string { return "remote " + k.String() },
		func(v remoteValue) string { return fmt.Sprintf("via %s dev %s", v.via(), names[int(v.Index)]) })...)
	version := func(current bool) string {
		if current {
			return "this version"
		}
		return "another version"
	}
	d = append(d, differences(want.fromPod, have.fromPod, func(k int) string { return "program " + pin.FromPod + " of " + names[k] }, version)...)
	d = append(d, differences(want.fromNet, have.fromNet, func(k int) string { return "program " + pin.FromNet + " of " + names[k] }, version)...)
	slices.SortFunc(d, func(a, b Difference) int { return cmp.Compare(a.What, b.What) })
	return d, nil
}

func differences[K, V comparable](want, have map[K]V, what func(K) string, value func(V) string) []Difference {
	var d []Difference
	for k, w := range want {
		if h, there := have[k]; !there {
			d = append(d, Difference{What: what(k), Want: value(w)})
		} else if h != w {
			d = append(d, Difference{What: what(k), Want: value(w), Have: value(h)})
		}
	}
	for k := range maps.Keys(have) {
		if _, wanted := want[k]; !wanted {
			d = append(d, Difference{What: what(k), Have: value(have[k])})
		}
	}
	return d
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
