package podlink

import (
	"fmt"

	"github.com/vishvananda/netlink"

	"github.com/fathom-network/fathom/internal/kernel/link"
	"github.com/fathom-network/fathom/internal/kernel/rtnl"
)

// Device is the node's end of a pod's veth pair.
type Device struct {
	Name, Alias string
	Index       int
}

func deviceOf(a *netlink.LinkAttrs) Device {
	return Device{Name: a.Name, Alias: a.Alias, Index: a.Index}
}

func (d Device) link() netlink.Link {
	return &netlink.Device{LinkAttrs: netlink.LinkAttrs{Name: d.Name, Index: d.Index}}
}

// Devices returns the node's ends of all pods' devices.
func Devices(n *link.Namespace) ([]Device, error) {
	all, err := rtnl.List(n.Netlink().LinkList)
	if err != nil {
		return nil, fmt.Errorf("list devices: %w", err)
	}
	var devices []Device
	for _, l := range all {
		if a := l.Attrs(); a.Group == Group && l.Type() == "veth" {
			devices = append(devices, deviceOf(a))
		}
	}
	return devices, nil
}

// Delete deletes a pod's device, by the name and the alias of the node's end: both ends, and their routes with them. A
// device that does not exist is not an error. If the device is not this pod's, it stays and the error is
// ForeignDeviceError.
func Delete(n *link.Namespace, hostDevice, alias string) error {
	d, found, err := Find(n, hostDevice, alias)
	if err != nil || !found {
		return err
	}
	return deleteLink(n, d.link())
}

// DeleteDevice deletes the very device that was found, not another that has its name by now.
func DeleteDevice(n *link.Namespace, d Device) error {
	is, found, err := Find(n, d.Name, d.Alias)
	if err != nil || !found || is != d {
		return err
	}
	return deleteLink(n, d.link())
}

// Find returns the node's end of a pod's device. If the device of that name is not this pod's, the error is
// ForeignDeviceError.
func Find(n *link.Namespace, hostDevice, alias string) (d Device, found bool, err error) {
	l, err := n.Netlink().LinkByName(hostDevice)
	if err != nil {
		if rtnl.IsGone(err) {
			return d, false, nil
		}
		return d, false, fmt.Errorf("look up device %s: %w", hostDevice, err)
	}
	a := l.Attrs()
	// An empty alias means that Add was killed after it made the device.
	if a.Group != Group || a.Alias != alias && a.Alias != "" {
		return d, false, &ForeignDeviceError{Name: hostDevice, Group: a.Group, Alias: a.Alias}
	}
	return deviceOf(a), true, nil
}

// ForeignDeviceError says that a device to delete is not the one that was meant.
type ForeignDeviceError struct {
	Name, Alias string
	Group       uint32
}

func (e *ForeignDeviceError) Error() string {
	return fmt.Sprintf("delete device %s: it belongs to something else (group %d, alias %q)", e.Name, e.Group, e.Alias)
}

func deleteLink(n *link.Namespace, l netlink.Link) error {
	if err := n.Netlink().LinkDel(l); err != nil && !rtnl.IsGone(err) {
		return fmt.Errorf("delete device %s: %w", l.Attrs().Name, err)
	}
	return nil
}
