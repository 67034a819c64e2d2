package link

import (
	"errors"
	"fmt"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// filterPriority is that of our filters among those of others; the name of the program tells whose they are.
const filterPriority = 252

// SetFilter has a program see what comes in by a device: the way of kernels before tcx. It replaces one of that name.
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

// Filters returns the programs of that name which see what comes in by a device, by their ids.
func (n *Namespace) Filters(index int, name string) ([]uint32, error) {
	all, err := n.filters(index, netlink.HANDLE_MIN_INGRESS)
	if err != nil {
		return nil, err
	}
	var ids []uint32
	for _, f := range all {
		if b, is := f.(*netlink.BpfFilter); is && b.Name == name {
			ids = append(ids, uint32(b.Id))
		}
	}
	return ids, nil
}

func (n *Namespace) filters(index int, parent uint32) ([]netlink.Filter, error) {
	device := &netlink.Device{LinkAttrs: netlink.LinkAttrs{Index: index}}
	all, err := dump(func() ([]netlink.Filter, error) { return n.nl.FilterList(device, parent) })
	if err != nil && !isGone(err) && !errors.Is(err, unix.EINVAL) && !errors.Is(err, unix.ENOENT) {
		return nil, fmt.Errorf("list the filters of device %d: %w", index, err)
	}
	return all, nil
}

// DeleteFilter takes a filter of that name away, and clsact with the last one.
func (n *Namespace) DeleteFilter(index int, name string) error {
	in, err := n.filters(index, netlink.HANDLE_MIN_INGRESS)
	if err != nil {
		return err
	}
	left := 0
	for _, f := range in {
		if b, is := f.(*netlink.BpfFilter); !is || b.Name != name {
			left++
		} else if err := n.nl.FilterDel(f); err != nil && !errors.Is(err, unix.ENOENT) && !isGone(err) {
			return fmt.Errorf("delete the filter of device %d: %w", index, err)
		}
	}
	out, err := n.filters(index, netlink.HANDLE_MIN_EGRESS)
	if err != nil || len(in) == 0 || left+len(out) > 0 {
		return err
	}
	if err := n.nl.QdiscDel(&netlink.GenericQdisc{QdiscAttrs: netlink.QdiscAttrs{LinkIndex: index, Parent: netlink.HANDLE_CLSACT}, QdiscType: "clsact"}); err != nil &&
		!errors.Is(err, unix.ENOENT) && !errors.Is(err, unix.EINVAL) && !isGone(err) {
		return fmt.Errorf("delete clsact of device %d: %w", index, err)
	}
	return nil
}
