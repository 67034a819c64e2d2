package fastpath

import (
	"cmp"
	"errors"
	"fmt"
	"slices"

	"github.com/fathom-network/fathom/internal/kernel/bpf"
	"github.com/fathom-network/fathom/internal/kernel/bpf/pin"
)

// Check compares the kernel with the plan and changes nothing.
func (p *Path) Check(plan Plan) ([]bpf.Difference, error) {
	s, err := p.compare(plan)
	if err != nil {
		return nil, err
	}
	if err := errors.Join(s.errs...); err != nil {
		return nil, err
	}
	want, have, names := s.want, s.have, s.names
	var d []bpf.Difference
	d = append(d, bpf.Compare(want.pods, have.pods, func(k pin.Key) string { return "pod " + k.Addr().String() },
		func(v pin.Pod) string {
			return fmt.Sprintf("device %s, MAC %x, %s", names[int(v.Index)], v.MAC, v.Stack)
		})...)
	d = append(d, bpf.Compare(want.ports, have.ports, func(k uint32) string { return "port " + cmp.Or(names[int(k)], fmt.Sprint(k)) },
		func(v pin.Port) string { return fmt.Sprintf("MAC %x", v.MAC) })...)
	d = append(d, bpf.Compare(want.remotes, have.remotes, func(k prefixKey) string { return "remote " + k.String() },
		func(v remoteValue) string { return fmt.Sprintf("via %s dev %s", v.via(), names[int(v.Index)]) })...)
	version := func(current bool) string {
		if current {
			return "this version"
		}
		return "another version"
	}
	d = append(d, bpf.Compare(want.fromPod, have.fromPod, func(k int) string { return "program " + pin.FromPod + " of " + names[k] }, version)...)
	d = append(d, bpf.Compare(want.fromNet, have.fromNet, func(k int) string { return "program " + pin.FromNet + " of " + names[k] }, version)...)
	slices.SortFunc(d, func(a, b bpf.Difference) int { return cmp.Compare(a.What, b.What) })
	return d, nil
}
