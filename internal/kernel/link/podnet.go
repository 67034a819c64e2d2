package link

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"slices"
	"strings"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/fathom-network/fathom/internal/facts/diff"
	"github.com/fathom-network/fathom/internal/facts/podnet"
)

// SetPodNetwork makes the kernel hold what a plan of the network between nodes says, but for masquerade, which
// internal/kernel/ruleset does. What is wanted is there before what is not is taken away, and a route changes in one step,
// so that packets always have a way. It returns what it changed; an error of one thing does not keep it from
// the others.
func (n *Namespace) SetPodNetwork(plan podnet.Plan) (podnet.Changes, error) {
	s := &podSetter{n: n, index: map[string]int{}}
	if plan.Node == "" {
		// That of a machine whose Node was not found: taken as it is, it would take away every route.
		return s.changes, errors.New("set the pod network: the plan is of no node")
	}
	var err error
	if s.rtnl, err = n.rtnl(); err != nil {
		return s.changes, err
	}
	defer s.rtnl.close()
	if err := s.set(plan); err != nil {
		s.errs = append(s.errs, err)
	}
	return s.changes, errors.Join(s.errs...)
}

// FollowPodNetwork does at once what differs between the routes of two plans, of which the kernel holds the first one as
// far as is known. In a cluster of a thousand nodes one of them changes often, and to read all routes back takes as long
// as everything before it. It promises nothing: SetPodNetwork is to come after it, which compares, and tells what failed.
func (n *Namespace) FollowPodNetwork(from, to podnet.Plan) (podnet.Changes, error) {
	s := &podSetter{n: n, index: map[string]int{}}
	// What is behind a route by the tunnel has to be there before it.
	if from.Node == "" || from.Node != to.Node || !slices.Equal(from.Neighbours, to.Neighbours) || !slices.Equal(from.Forwards, to.Forwards) {
		return s.changes, nil
	}
	delta := diff.Compare(to.Routes, from.Routes, podnet.Route.Key)
	if delta.IsEmpty() {
		return s.changes, nil
	}
	var err error
	if s.rtnl, err = n.rtnl(); err != nil {
		return s.changes, err
	}
	defer s.rtnl.close()
	var b batch
	for _, r := range delta.Correct {
		s.changes.Routes.Corrected++
		s.route(&b, unix.RTM_NEWROUTE, unix.NLM_F_CREATE|unix.NLM_F_REPLACE, r.Want, &s.changes.Routes.Corrected, "correct route %s")
	}
	for _, r := range delta.Add {
		s.changes.Routes.Added++
		s.route(&b, unix.RTM_NEWROUTE, unix.NLM_F_CREATE|unix.NLM_F_EXCL, r, &s.changes.Routes.Added, "add route %s")
	}
	return s.changes, s.rtnl.execute(b.requests, func(i int, _ error) { *b.counters[i]-- })
}

// ForeignRouteError says that a route was not made because somebody else's leads to the same range: that of a network
// that is to be replaced, or an administrator's, who knows better.
type ForeignRouteError struct{ Wanted string }

func (e *ForeignRouteError) Error() string {
	return e.Wanted + ": there is one to this range that is not ours"
}

// ForeignRoutes takes the errors of type ForeignRouteError out of what SetPodNetwork returns.
func ForeignRoutes(err error) (foreign []*ForeignRouteError, rest error) {
	joined, ok := err.(interface{ Unwrap() []error }) // what errors.Join makes
	if !ok {
		return nil, err
	}
	var others []error
	for _, e := range joined.Unwrap() {
		var f *ForeignRouteError
		if errors.As(e, &f) {
			foreign = append(foreign, f)
		} else {
			others = append(others, e)
		}
	}
	return foreign, errors.Join(others...)
}

// PodNetwork reads back what SetPodNetwork sets, by our marks. Of the settings it reads those that are asked for.
func (n *Namespace) PodNetwork(sysctls []podnet.Sysctl) (podnet.State, error) {
	s := &podSetter{n: n, index: map[string]int{}}
	var err error
	if s.rtnl, err = n.rtnl(); err != nil {
		return podnet.State{}, err
	}
	defer s.rtnl.close()
	var state podnet.State
	names, err := s.tunnels()
	if err != nil {
		return state, err
	}
	device := 0
	if len(names) > 0 {
		v, err := s.vxlan(names[0])
		if err != nil {
			return state, err
		}
		device, state.Tunnel = v.Index, tunnelOf(v)
		have, err := s.addrs(v)
		if err != nil {
			return state, err
		}
		for _, a := range have {
			state.Tunnel.Addrs = append(state.Tunnel.Addrs, prefixOf(a.IPNet).Addr())
		}
		slices.SortFunc(state.Tunnel.Addrs, netip.Addr.Compare)
	}
	if err := s.read(&state, device); err != nil {
		return state, err
	}
	for _, c := range sysctls {
		if c.Value, err = n.SysctlValue(c.Name); err != nil {
			continue // the difference says that it is missing
		}
		state.Sysctls = append(state.Sysctls, c)
	}
	return state, nil
}

// PodUnderlay lists the devices by which a node may reach others: those that are up and have addresses, but for
// our tunnel. A cable that is pulled out changes nothing, or a node would change its way to others with it.
func (n *Namespace) PodUnderlay() ([]podnet.Interface, error) {
	all, err := dump(func() ([]netlink.Addr, error) { return n.nl.AddrList(nil, netlink.FAMILY_ALL) })
	if err != nil {
		return nil, fmt.Errorf("list addresses: %w", err)
	}
	addrs := map[int][]netip.Prefix{}
	for _, a := range all {
		p := prefixOf(a.IPNet)
		if a.Flags&unix.IFA_F_DEPRECATED == 0 && !p.Addr().IsLoopback() && !p.Addr().IsLinkLocalUnicast() {
			addrs[a.LinkIndex] = append(addrs[a.LinkIndex], p)
		}
	}
	var list []podnet.Interface
	for index, prefixes := range addrs {
		l, err := n.nl.LinkByIndex(index)
		if isGone(err) {
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("look up device %d: %w", index, err)
		}
		a := l.Attrs()
		if a.RawFlags&unix.IFF_UP == 0 || a.Alias == podnet.TunnelAlias {
			continue
		}
		slices.SortFunc(prefixes, func(a, b netip.Prefix) int { return a.Addr().Compare(b.Addr()) })
		list = append(list, podnet.Interface{Name: a.Name, MTU: a.MTU, Addrs: prefixes})
	}
	slices.SortFunc(list, func(a, b podnet.Interface) int { return strings.Compare(a.Name, b.Name) })
	return list, nil
}

// LocalAddrs are the addresses of all devices.
func (n *Namespace) LocalAddrs() (map[netip.Addr]bool, error) {
	all, err := dump(func() ([]netlink.Addr, error) { return n.nl.AddrList(nil, netlink.FAMILY_ALL) })
	if err != nil {
		return nil, fmt.Errorf("list addresses: %w", err)
	}
	local := make(map[netip.Addr]bool, len(all))
	for _, a := range all {
		local[prefixOf(a.IPNet).Addr()] = true
	}
	return local, nil
}

// podSetter is one run of SetPodNetwork.
type podSetter struct {
	n       *Namespace
	rtnl    *rtnl
	index   map[string]int // of devices, by name
	changes podnet.Changes
	errs    []error
}

func (s *podSetter) set(plan podnet.Plan) error {
	stale, err := s.tunnels()
	if err != nil {
		return err
	}
	var tunnel *netlink.Vxlan
	if t := plan.Tunnel; t != nil {
		// A tunnel of another name would keep the port from the new one.
		if err := s.deleteTunnels(slices.DeleteFunc(slices.Clone(stale), func(name string) bool { return name == t.Name })); err != nil {
			return err
		}
		stale = nil
		if tunnel, err = s.makeTunnel(*t); err != nil {
			s.errs = append(s.errs, err)
		}
	}
	if err := s.setSysctls(plan.Sysctls); err != nil {
		s.errs = append(s.errs, err) // such as on a kernel without IPv6
	}
	device := 0
	var staleAddrs []netlink.Addr
	if tunnel != nil {
		device = tunnel.Index
		err := s.bringUp(tunnel, *plan.Tunnel)
		if err == nil {
			staleAddrs, err = s.addAddrs(tunnel, plan.Tunnel.Addrs)
		}
		if err != nil {
			s.errs = append(s.errs, err)
			tunnel = nil
		}
	}
	if tunnel == nil && plan.Tunnel != nil { // the others are reached all the same
		plan.Routes = slices.DeleteFunc(slices.Clone(plan.Routes), func(r podnet.Route) bool { return r.Device == plan.Tunnel.Name })
		device = 0
	}
	var have podnet.State
	if err := s.read(&have, device); err != nil {
		return err
	}
	routes := diff.Compare(plan.Routes, have.Routes, podnet.Route.Key)
	neighbours := diff.Compare(plan.Neighbours, have.Neighbours, podnet.Neighbour.Key)
	forwards := diff.Compare(plan.Forwards, have.Forwards, podnet.Forward.Key)
	if tunnel == nil { // they go with the device
		neighbours, forwards = diff.Delta[podnet.Neighbour]{}, diff.Delta[podnet.Forward]{}
	}
	s.changes.Routes, s.changes.Neighbours, s.changes.Forwards = routes.Counted(), neighbours.Counted(), forwards.Counted()

	var b batch
	for _, f := range forwards.Add {
		b.add(forwardRequest(unix.RTM_NEWNEIGH, device, f), &s.changes.Forwards.Added, "add forwarding entry %s", f)
	}
	for _, f := range forwards.Correct {
		b.add(forwardRequest(unix.RTM_NEWNEIGH, device, f.Want), &s.changes.Forwards.Corrected, "correct forwarding entry %s", f.Want)
	}
	for _, x := range neighbours.Add {
		b.add(neighbourRequest(unix.RTM_NEWNEIGH, device, x), &s.changes.Neighbours.Added, "add neighbour %s", x)
	}
	for _, x := range neighbours.Correct {
		b.add(neighbourRequest(unix.RTM_NEWNEIGH, device, x.Want), &s.changes.Neighbours.Corrected, "correct neighbour %s", x.Want)
	}
	for _, r := range routes.Add {
		s.route(&b, unix.RTM_NEWROUTE, unix.NLM_F_CREATE|unix.NLM_F_EXCL, r, &s.changes.Routes.Added, "add route %s")
	}
	for _, r := range routes.Correct {
		s.route(&b, unix.RTM_NEWROUTE, unix.NLM_F_CREATE|unix.NLM_F_REPLACE, r.Want, &s.changes.Routes.Corrected, "correct route %s")
	}
	for _, r := range routes.Remove {
		s.route(&b, unix.RTM_DELROUTE, 0, r, &s.changes.Routes.Removed, "remove route %s")
	}
	for _, x := range neighbours.Remove {
		b.add(neighbourRequest(unix.RTM_DELNEIGH, device, x), &s.changes.Neighbours.Removed, "remove neighbour %s", x)
	}
	for _, f := range forwards.Remove {
		b.add(forwardRequest(unix.RTM_DELNEIGH, device, f), &s.changes.Forwards.Removed, "remove forwarding entry %s", f)
	}
	if err := s.rtnl.execute(b.requests, func(i int, err error) {
		if b.isRemoval(i) && (errors.Is(err, unix.ESRCH) || errors.Is(err, unix.ENOENT)) {
			return // somebody else was faster
		}
		*b.counters[i]--
		if errors.Is(err, unix.EEXIST) {
			s.errs = append(s.errs, &ForeignRouteError{Wanted: b.what[i]()})
			return
		}
		s.errs = append(s.errs, fmt.Errorf("%s: %w", b.what[i](), err))
	}); err != nil {
		return err
	}
	if tunnel != nil {
		if err := s.removeAddrs(tunnel, staleAddrs); err != nil {
			return err
		}
	}
	return s.deleteTunnels(stale)
}

// batch is a list of requests, with what is said of those that fail.
type batch struct {
	requests []request
	counters []*int
	what     []func() string
}

func (b *batch) add(r request, counter *int, format string, x fmt.Stringer) {
	b.requests = append(b.requests, r)
	b.counters = append(b.counters, counter)
	b.what = append(b.what, func() string { return fmt.Sprintf(format, x) })
}

func (b *batch) isRemoval(i int) bool {
	kind := b.requests[i].kind()
	return kind == unix.RTM_DELROUTE || kind == unix.RTM_DELNEIGH
}

// route adds a request about a route to the batch.
func (s *podSetter) route(b *batch, kind, flags uint16, r podnet.Route, counter *int, format string) {
	index := 0
	if r.Device != "" {
		var err error
		if index, err = s.indexOf(r.Device); err != nil {
			*counter--
			if kind == unix.RTM_NEWROUTE { // a route by a device that is gone went with it
				s.errs = append(s.errs, fmt.Errorf(format+": %w", r, err))
			}
			return
		}
	}
	b.add(routeRequest(kind, flags, index, r), counter, format, r)
}

func (s *podSetter) indexOf(device string) (int, error) {
	if index, known := s.index[device]; known {
		return index, nil
	}
	l, err := s.n.nl.LinkByName(device)
	if err != nil {
		return 0, fmt.Errorf("look up device %s: %w", device, err)
	}
	s.index[device] = l.Attrs().Index
	return l.Attrs().Index, nil
}

// setSysctls writes the settings that do not hold.
func (s *podSetter) setSysctls(want []podnet.Sysctl) error {
	return s.n.do(func() error {
		var errs []error
		for _, c := range want {
			path := s.n.sysctl(c.Name)
			value, err := os.ReadFile(path)
			if err == nil {
				if c.Holds(strings.TrimSpace(string(value))) {
					continue
				}
				err = os.WriteFile(path, []byte(c.Value), 0o644)
			}
			if err != nil {
				errs = append(errs, fmt.Errorf("set sysctl net/%s to %s: %w", c.Name, c.Value, err))
				continue
			}
			s.changes.Sysctls.Corrected++
		}
		return errors.Join(errs...)
	})
}
