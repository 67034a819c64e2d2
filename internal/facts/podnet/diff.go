package podnet

import (
	"cmp"
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"github.com/fathom-network/fathom/internal/facts/diff"
)

// RouteKey tells routes apart that can be in one table at the same time.
type RouteKey struct {
	To     netip.Prefix
	Metric uint32
}

// Key is what diff.Compare knows a route by.
func (r Route) Key() RouteKey { return RouteKey{r.To, r.Metric} }

// Key is what diff.Compare knows a neighbour by.
func (n Neighbour) Key() netip.Addr { return n.Addr }

// Key is what diff.Compare knows a forwarding entry by.
func (f Forward) Key() MAC { return f.MAC }

// Changes counts what was changed in the kernel.
type Changes struct {
	Tunnel, Addrs, Routes, Neighbours, Forwards, Sysctls diff.Count
	Masquerade, Guard                                    diff.Count // elements of sets, and 1 added for a table made anew
}

// Total is the number of changes of any kind.
func (c Changes) Total() int {
	total := 0
	for _, n := range []diff.Count{c.Tunnel, c.Addrs, c.Routes, c.Neighbours, c.Forwards, c.Sysctls, c.Masquerade, c.Guard} {
		total += n.Added + n.Corrected + n.Removed
	}
	return total
}

// String writes the changes that there are, such as "routes +2 -1, neighbours ~1".
func (c Changes) String() string {
	var words []string
	for _, k := range []struct {
		what string
		n    diff.Count
	}{{"device", c.Tunnel}, {"addresses", c.Addrs}, {"routes", c.Routes}, {"neighbours", c.Neighbours}, {"forwards", c.Forwards},
		{"settings", c.Sysctls}, {"masquerade", c.Masquerade}, {"guard", c.Guard}} {
		if k.n == (diff.Count{}) {
			continue
		}
		word := k.what
		for _, x := range []struct {
			sign string
			n    int
		}{{"+", k.n.Added}, {"~", k.n.Corrected}, {"-", k.n.Removed}} {
			if x.n > 0 {
				word += fmt.Sprintf(" %s%d", x.sign, x.n)
			}
		}
		words = append(words, word)
	}
	return strings.Join(words, ", ")
}

// Difference is one thing that a kernel does not hold as planned.
type Difference struct {
	Node string
	Text string
}

func (d Difference) String() string { return fmt.Sprintf("node %s: %s", d.Node, d.Text) }

// Diff tells what of a plan the kernel does not hold, and what it holds beside it with our mark.
func Diff(plan Plan, have State) []Difference {
	d := differ{node: plan.Node}
	d.tunnel(plan.Tunnel, have.Tunnel)
	device := ""
	if t := cmp.Or(plan.Tunnel, have.Tunnel); t != nil {
		device = " dev " + t.Name
	}
	report(&d, "route", diff.Compare(plan.Routes, have.Routes, Route.Key), func(r Route) string { return r.String() })
	report(&d, "neighbour", diff.Compare(plan.Neighbours, have.Neighbours, Neighbour.Key),
		func(n Neighbour) string { return fmt.Sprintf("%s lladdr %s%s", n.Addr, n.MAC, device) })
	report(&d, "forwarding entry", diff.Compare(plan.Forwards, have.Forwards, Forward.Key),
		func(f Forward) string { return fmt.Sprintf("%s dst %s%s", f.MAC, f.To, device) })
	d.sysctls(plan.Sysctls, have.Sysctls)
	set(&d, "masquerade: source", plan.Masquerade.Sources, have.Masquerade.Sources)
	set(&d, "masquerade: pod range", plan.Masquerade.Pods, have.Masquerade.Pods)
	set(&d, "masquerade: node", plan.Masquerade.Nodes, have.Masquerade.Nodes)
	set(&d, "masquerade: exempt range", plan.Masquerade.Others, have.Masquerade.Others)
	d.guard(plan.Guard, have.Guard)
	return d.found
}

type differ struct {
	node  string
	found []Difference
}

func (d *differ) add(format string, args ...any) {
	d.found = append(d.found, Difference{d.node, fmt.Sprintf(format, args...)})
}

func report[T comparable](d *differ, what string, delta diff.Delta[T], text func(T) string) {
	for _, x := range delta.Add {
		d.add("%s %s is missing", what, text(x))
	}
	for _, c := range delta.Correct {
		d.add("%s %s should be %s", what, text(c.Have), text(c.Want))
	}
	for _, x := range delta.Remove {
		d.add("%s %s should not be there", what, text(x))
	}
}

func set[T interface {
	comparable
	fmt.Stringer
}](d *differ, what string, want, have []T) {
	report(d, what, diff.Compare(want, have, func(x T) T { return x }), func(x T) string { return x.String() })
}

func (d *differ) tunnel(want, have *Tunnel) {
	switch {
	case want == nil && have == nil:
		return
	case have == nil:
		d.add("device %s is missing", want.Name)
		return
	case want == nil:
		d.add("device %s should not be there", have.Name)
		return
	}
	if w, h := want.String(), have.String(); w != h {
		d.add("device %s should be %s", h, w)
	}
	set(d, "address on "+want.Name, want.Addrs, have.Addrs)
}

func (d *differ) sysctls(want, have []Sysctl) {
	values := map[string]string{}
	for _, c := range have {
		values[c.Name] = c.Value
	}
	for _, c := range want {
		switch value, known := values[c.Name]; {
		case !known:
			d.add("sysctl net/%s is missing", c.Name)
		case !c.Holds(value):
			d.add("sysctl net/%s is %s, should be %s: %s", c.Name, value, c.Value, c.Why)
		}
	}
}

// Holds says whether the value that a setting has is good.
func (c Sysctl) Holds(value string) bool {
	if c.Instead != "" {
		return value != c.Instead
	}
	return value == c.Value
}

// rank orders settings: what keeps a default route comes before what would remove it.
func (c Sysctl) rank() int {
	switch {
	case strings.HasSuffix(c.Name, "/accept_ra"):
		return 0
	case slices.Contains([]string{"ipv4/ip_forward", "ipv6/conf/all/forwarding"}, c.Name):
		return 2
	}
	return 1
}
