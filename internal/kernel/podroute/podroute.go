// Package podroute makes the kernel hold the network between nodes that package podnet plans: routes to other nodes' pods,
// the tunnel that they may use, the tunnel's neighbours and forwarding entries, and sysctls.
package podroute

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
	"github.com/fathom-network/fathom/internal/kernel/link"
	"github.com/fathom-network/fathom/internal/kernel/nlmsg"
	"github.com/fathom-network/fathom/internal/kernel/rtnl"
)

// Set makes the kernel hold a plan of the network between nodes, except for masquerade, which internal/kernel/ruleset does.
// It adds before it removes, and changes a route in one step, so that packets always have a route. It returns what it
// changed; a failure of one part does not stop the others.
func Set(n *link.Namespace, plan podnet.Plan) (podnet.Changes, error) {
	s := newSetter(n)
	if plan.Node == "" {
		// An empty plan is that of a machine whose Node was not found: applied, it would remove every route.
		return s.changes, errors.New("set the pod network: the plan names no node")
	}
	if err := s.open(); err != nil {
		return s.changes, err
	}
	defer s.conn.Close()
	s.note(s.set(plan))
	return s.changes, errors.Join(s.errs...)
}

// Follow applies at once the difference between the routes of two plans, the first of which the kernel is believed to hold.
// In a cluster of a thousand nodes one of them changes often, and reading all routes back takes as long as everything
// before it. Follow guarantees nothing: a Set has to come after it, which compares and reports failures.
func Follow(n *link.Namespace, from, to podnet.Plan) (podnet.Changes, error) {
	s := newSetter(n)
	// Neighbours and forwarding entries have to exist before a route that uses them.
	if from.Node == "" || from.Node != to.Node || !slices.Equal(from.Neighbours, to.Neighbours) || !slices.Equal(from.Forwards, to.Forwards) {
		return s.changes, nil
	}
	delta := diff.Compare(to.Routes, from.Routes, podnet.Route.Key)
	if delta.IsEmpty() {
		return s.changes, nil
	}
	if err := s.open(); err != nil {
		return s.changes, err
	}
	defer s.conn.Close()
	var b batch
	for _, r := range delta.Correct {
		s.changes.Routes.Corrected++
		s.route(&b, unix.RTM_NEWROUTE, unix.NLM_F_CREATE|unix.NLM_F_REPLACE, r.Want, &s.changes.Routes.Corrected, "correct route %s")
	}
	for _, r := range delta.Add {
		s.changes.Routes.Added++
		s.route(&b, unix.RTM_NEWROUTE, unix.NLM_F_CREATE|unix.NLM_F_EXCL, r, &s.changes.Routes.Added, "add route %s")
	}
	return s.changes, s.conn.Execute(b.requests, func(i int, _ error) { *b.counters[i]-- })
}

// ForeignRouteError says that a route was not made because a route to the same prefix exists that is not ours: that of a
// network that is to be replaced, or one of the administrator's, which takes precedence.
type ForeignRouteError struct{ Wanted string }

func (e *ForeignRouteError) Error() string {
	return e.Wanted + ": there is one to this range that is not ours"
}

// ForeignRoutes separates the errors of type ForeignRouteError from the others that Set returned.
func ForeignRoutes(err error) (foreign []*ForeignRouteError, rest error) {
	joined, ok := err.(interface{ Unwrap() []error }) // the result of errors.Join
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

// Read reads back what Set writes, by our marks. It reads only the given sysctls.
func Read(n *link.Namespace, sysctls []podnet.Sysctl) (podnet.State, error) {
	s := newSetter(n)
	if err := s.open(); err != nil {
		return podnet.State{}, err
	}
	defer s.conn.Close()
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
			state.Tunnel.Addrs = append(state.Tunnel.Addrs, rtnl.Prefix(a.IPNet).Addr())
		}
		slices.SortFunc(state.Tunnel.Addrs, netip.Addr.Compare)
	}
	if err := s.read(&state, device); err != nil {
		return state, err
	}
	for _, c := range sysctls {
		if c.Value, err = n.SysctlValue(c.Name); err != nil {
			continue // the comparison reports it as missing
		}
		state.Sysctls = append(state.Sysctls, c)
	}
	return state, nil
}

// Underlay lists the devices by which a node may reach others: those that are up and have addresses, except our tunnel.
// Devices without a carrier count, so that an unplugged cable does not change the node's address.
func Underlay(n *link.Namespace) ([]podnet.Interface, error) {
	all, err := rtnl.List(func() ([]netlink.Addr, error) { return n.Netlink().AddrList(nil, netlink.FAMILY_ALL) })
	if err != nil {
		return nil, fmt.Errorf("list addresses: %w", err)
	}
	addrs := map[int][]netip.Prefix{}
	for _, a := range all {
		p := rtnl.Prefix(a.IPNet)
		if a.Flags&unix.IFA_F_DEPRECATED == 0 && !p.Addr().IsLoopback() && !p.Addr().IsLinkLocalUnicast() {
			addrs[a.LinkIndex] = append(addrs[a.LinkIndex], p)
		}
	}
	var list []podnet.Interface
	for index, prefixes := range addrs {
		l, err := n.Netlink().LinkByIndex(index)
		if rtnl.IsGone(err) {
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

// setter is one run of Set.
type setter struct {
	n       *link.Namespace
	conn    *rtnl.Conn
	index   map[string]int // of devices, by name
	changes podnet.Changes
	errs    []error
}

func newSetter(n *link.Namespace) *setter { return &setter{n: n, index: map[string]int{}} }

func (s *setter) open() error {
	return s.n.Do(func() (err error) {
		s.conn, err = rtnl.Open()
		return err
	})
}

// note records an error, if there is one. The other parts of the plan are applied all the same.
func (s *setter) note(err error) {
	if err != nil {
		s.errs = append(s.errs, err)
	}
}

func (s *setter) set(plan podnet.Plan) error {
	stale, err := s.tunnels()
	if err != nil {
		return err
	}
	var tunnel *netlink.Vxlan
	if t := plan.Tunnel; t != nil {
		// A tunnel with another name would occupy the new one's port.
		if err := s.deleteTunnels(slices.DeleteFunc(slices.Clone(stale), func(name string) bool { return name == t.Name })); err != nil {
			return err
		}
		stale = nil
		tunnel, err = s.makeTunnel(*t)
		s.note(err)
	}
	s.note(s.setSysctls(plan.Sysctls)) // fails on a kernel without IPv6
	var staleAddrs []netlink.Addr
	if tunnel != nil {
		if staleAddrs, err = s.bringUp(tunnel, *plan.Tunnel); err != nil {
			s.note(err)
			tunnel = nil
		}
	}
	if tunnel == nil && plan.Tunnel != nil { // nodes that are not behind the tunnel stay reachable
		plan.Routes = slices.DeleteFunc(slices.Clone(plan.Routes), func(r podnet.Route) bool { return r.Device == plan.Tunnel.Name })
	}
	b, err := s.difference(plan, tunnel)
	if err != nil {
		return err
	}
	if err := s.execute(b); err != nil {
		return err
	}
	if tunnel != nil {
		if err := s.removeAddrs(tunnel, staleAddrs); err != nil {
			return err
		}
	}
	return s.deleteTunnels(stale)
}

// difference reads what the kernel has, and returns and counts the requests that make it hold the plan. A route's
// dependencies are added before it, and removed after it. Without a tunnel there is nothing to ask of it: its entries went
// with the device.
func (s *setter) difference(plan podnet.Plan, tunnel *netlink.Vxlan) (*batch, error) {
	device := 0
	if tunnel != nil {
		device = tunnel.Index
	}
	var have podnet.State
	if err := s.read(&have, device); err != nil {
		return nil, err
	}
	routes := diff.Compare(plan.Routes, have.Routes, podnet.Route.Key)
	var neighbours diff.Delta[podnet.Neighbour]
	var forwards diff.Delta[podnet.Forward]
	if tunnel != nil {
		neighbours = diff.Compare(plan.Neighbours, have.Neighbours, podnet.Neighbour.Key)
		forwards = diff.Compare(plan.Forwards, have.Forwards, podnet.Forward.Key)
	}
	c := &s.changes
	c.Routes, c.Neighbours, c.Forwards = routes.Counted(), neighbours.Counted(), forwards.Counted()

	var b batch
	for _, f := range forwards.Add {
		b.add(forwardRequest(unix.RTM_NEWNEIGH, device, f), &c.Forwards.Added, "add forwarding entry %s", f)
	}
	for _, f := range forwards.Correct {
		b.add(forwardRequest(unix.RTM_NEWNEIGH, device, f.Want), &c.Forwards.Corrected, "correct forwarding entry %s", f.Want)
	}
	for _, x := range neighbours.Add {
		b.add(neighbourRequest(unix.RTM_NEWNEIGH, device, x), &c.Neighbours.Added, "add neighbour %s", x)
	}
	for _, x := range neighbours.Correct {
		b.add(neighbourRequest(unix.RTM_NEWNEIGH, device, x.Want), &c.Neighbours.Corrected, "correct neighbour %s", x.Want)
	}
	s.routes(&b, routes)
	for _, x := range neighbours.Remove {
		b.add(neighbourRequest(unix.RTM_DELNEIGH, device, x), &c.Neighbours.Removed, "remove neighbour %s", x)
	}
	for _, f := range forwards.Remove {
		b.add(forwardRequest(unix.RTM_DELNEIGH, device, f), &c.Forwards.Removed, "remove forwarding entry %s", f)
	}
	return &b, nil
}

func (s *setter) routes(b *batch, routes diff.Delta[podnet.Route]) {
	c := &s.changes.Routes
	for _, r := range routes.Add {
		s.route(b, unix.RTM_NEWROUTE, unix.NLM_F_CREATE|unix.NLM_F_EXCL, r, &c.Added, "add route %s")
	}
	for _, r := range routes.Correct {
		s.route(b, unix.RTM_NEWROUTE, unix.NLM_F_CREATE|unix.NLM_F_REPLACE, r.Want, &c.Corrected, "correct route %s")
	}
	for _, r := range routes.Remove {
		s.route(b, unix.RTM_DELROUTE, 0, r, &c.Removed, "remove route %s")
	}
}

// execute sends the requests. It subtracts those that fail from the counts.
func (s *setter) execute(b *batch) error {
	return s.conn.Execute(b.requests, func(i int, err error) {
		if b.isRemoval(i) && (errors.Is(err, unix.ESRCH) || errors.Is(err, unix.ENOENT)) {
			return // another process removed it first
		}
		*b.counters[i]--
		if errors.Is(err, unix.EEXIST) {
			s.note(&ForeignRouteError{Wanted: b.what[i]()})
			return
		}
		s.note(fmt.Errorf("%s: %w", b.what[i](), err))
	})
}

// batch is a list of requests with the texts of their errors.
type batch struct {
	requests []nlmsg.Request
	counters []*int
	what     []func() string
}

func (b *batch) add(r nlmsg.Request, counter *int, format string, x fmt.Stringer) {
	b.requests = append(b.requests, r)
	b.counters = append(b.counters, counter)
	b.what = append(b.what, func() string { return fmt.Sprintf(format, x) })
}

func (b *batch) isRemoval(i int) bool {
	kind := b.requests[i].Kind()
	return kind == unix.RTM_DELROUTE || kind == unix.RTM_DELNEIGH
}

// route adds a request about a route to the batch.
func (s *setter) route(b *batch, kind, flags uint16, r podnet.Route, counter *int, format string) {
	index := 0
	if r.Device != "" {
		var err error
		if index, err = s.indexOf(r.Device); err != nil {
			*counter--
			if kind == unix.RTM_NEWROUTE { // to remove one is needless: it went with its device
				s.note(fmt.Errorf(format+": %w", r, err))
			}
			return
		}
	}
	b.add(routeRequest(kind, flags, index, r), counter, format, r)
}

func (s *setter) indexOf(device string) (int, error) {
	if index, known := s.index[device]; known {
		return index, nil
	}
	l, err := s.n.Netlink().LinkByName(device)
	if err != nil {
		return 0, fmt.Errorf("look up device %s: %w", device, err)
	}
	s.index[device] = l.Attrs().Index
	return l.Attrs().Index, nil
}

// setSysctls writes the sysctls whose values differ.
func (s *setter) setSysctls(want []podnet.Sysctl) error {
	return s.n.Do(func() error {
		var errs []error
		for _, c := range want {
			path := s.n.SysctlPath(c.Name)
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
