package link

import (
	"errors"
	"fmt"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/fathom-network/fathom/internal/kernel/rtnl"
)

// filterPriority is the priority of our filters; the program's name marks them as ours.
const filterPriority = 252

// SetFilter attaches a program to a device's ingress by the tc filter of that name, and replaces an existing one.
func (n *Namespace) SetFilter(index, program int, name string) error {
	qdisc := &netlink.GenericQdisc{QdiscAttrs: netlink.QdiscAttrs{
		LinkIndex: index, Handle: netlink.MakeHandle(0xffff, 0), Parent: netlink.HANDLE_CLSACT}, QdiscType: "clsact"}
	if err := n.nl.QdiscAdd(qdisc); err != nil && !errors.Is(err, unix.EEXIST) {
		return fmt.Errorf("add clsact to device %d: %w", index, err)
	}
	if err := n.nl.FilterReplace(&netlink.BpfFilter{
		FilterAttrs: netlink.FilterAttrs{LinkIndex: index, Parent: netlink.HANDLE_MIN_INGRESS, Handle: 1,
			Protocol: unix.ETH_P_ALL, Priority: filterPriority},
		Fd: program, Name: name, DirectAction: true,
	}); err != nil {
		return fmt.Errorf("add a filter to device %d: %w", index, err)
	}
	return nil
}

// Filter is a tc filter of a device. A filter that is not a BPF program has no name.
type Filter struct {
	Name    string
	Program uint32 // the program's ID
	Egress  bool   // on the egress side
}

// Filters returns the tc filters of all devices with clsact, by the devices' indexes.
func (n *Namespace) Filters() (map[int][]Filter, error) {
	qdiscs, err := rtnl.List(func() ([]netlink.Qdisc, error) { return n.nl.QdiscList(nil) })
	if err != nil {
		return nil, fmt.Errorf("list queueing disciplines: %w", err)
	}
	all := map[int][]Filter{}
	for _, q := range qdiscs {
		index := q.Attrs().LinkIndex
		if kind := q.Type(); kind != "clsact" && kind != "ingress" {
			continue
		}
		if all[index], err = n.FiltersOf(index); err != nil {
			return nil, err
		}
	}
	return all, nil
}

// FiltersOf returns a device's tc filters.
func (n *Namespace) FiltersOf(index int) ([]Filter, error) {
	var all []Filter
	for _, parent := range []uint32{netlink.HANDLE_MIN_INGRESS, netlink.HANDLE_MIN_EGRESS} {
		there, err := n.filters(index, parent)
		if err != nil {
			return nil, err
		}
		for _, f := range there {
			filter := Filter{Egress: parent == netlink.HANDLE_MIN_EGRESS}
			if b, is := f.(*netlink.BpfFilter); is {
				filter.Name, filter.Program = b.Name, uint32(b.Id)
			}
			all = append(all, filter)
		}
	}
	return all, nil
}

func (n *Namespace) filters(index int, parent uint32) ([]netlink.Filter, error) {
	device := &netlink.Device{LinkAttrs: netlink.LinkAttrs{Index: index}}
	all, err := rtnl.List(func() ([]netlink.Filter, error) { return n.nl.FilterList(device, parent) })
	if err != nil && !rtnl.IsGone(err) && !errors.Is(err, unix.EINVAL) && !errors.Is(err, unix.ENOENT) {
		return nil, fmt.Errorf("list the filters of device %d: %w", index, err)
	}
	return all, nil
}

// DeleteFilter deletes the filter of that name, and clsact with the last filter.
func (n *Namespace) DeleteFilter(index int, name string) error {
	in, err := n.filters(index, netlink.HANDLE_MIN_INGRESS)
	if err != nil {
		return err
	}
	left := 0
	for _, f := range in {
		if b, is := f.(*netlink.BpfFilter); !is || b.Name != name {
			left++
		} else if err := n.nl.FilterDel(f); err != nil && !errors.Is(err, unix.ENOENT) && !rtnl.IsGone(err) {
			return fmt.Errorf("delete the filter of device %d: %w", index, err)
		}
	}
	out, err := n.filters(index, netlink.HANDLE_MIN_EGRESS)
	if err != nil || len(in) == 0 || left+len(out) > 0 {
		return err
	}
	if err := n.nl.QdiscDel(&netlink.GenericQdisc{QdiscAttrs: netlink.QdiscAttrs{LinkIndex: index, Parent: netlink.HANDLE_CLSACT}, QdiscType: "clsact"}); err != nil &&
		!errors.Is(err, unix.ENOENT) && !errors.Is(err, unix.EINVAL) && !rtnl.IsGone(err) {
		return fmt.Errorf("delete clsact of device %d: %w", index, err)
	}
	return nil
}
