package link

import (
	"context"
	"encoding/binary"
	"fmt"
	"syscall"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// PodDevice is a node's end of a pod's veth pair that was found.
type PodDevice struct {
	Name, Alias string
	Index       int
}

func podDevice(a *netlink.LinkAttrs) PodDevice {
	return PodDevice{Name: a.Name, Alias: a.Alias, Index: a.Index}
}

func (d PodDevice) link() netlink.Link {
	return &netlink.Device{LinkAttrs: netlink.LinkAttrs{Name: d.Name, Index: d.Index}}
}

// PodDevices returns the node's ends of all pods' devices.
func (n *Namespace) PodDevices() ([]PodDevice, error) {
	all, err := dump(n.nl.LinkList)
	if err != nil {
		return nil, fmt.Errorf("list devices: %w", err)
	}
	var devices []PodDevice
	for _, l := range all {
		if a := l.Attrs(); a.Group == PodGroup && l.Type() == "veth" {
			devices = append(devices, podDevice(a))
		}
	}
	return devices, nil
}

// DeletePod takes a pod's device away, by the name and the alias of the node's end: both ends, and the routes with
// them. One that is not there is not an error. One that is another's stays: the error is ForeignDeviceError.
func (n *Namespace) DeletePod(hostDevice, alias string) error {
	d, found, err := n.FindPod(hostDevice, alias)
	if err != nil || !found {
		return err
	}
	return n.deleteLink(d.link())
}

// DeletePodDevice is DeletePod for the one device that was found: one that has its name by now is not meant.
func (n *Namespace) DeletePodDevice(d PodDevice) error {
	is, found, err := n.FindPod(d.Name, d.Alias)
	if err != nil || !found || is != d {
		return err
	}
	return n.deleteLink(d.link())
}

// FindPod returns the node's end of a pod's device. If the device of that name is another's, the error is
// ForeignDeviceError.
func (n *Namespace) FindPod(hostDevice, alias string) (d PodDevice, found bool, err error) {
	l, err := n.nl.LinkByName(hostDevice)
	if err != nil {
		if isGone(err) {
			return d, false, nil
		}
		return d, false, fmt.Errorf("look up device %s: %w", hostDevice, err)
	}
	a := l.Attrs()
	// AddPod was killed between the device and its alias: then there is none.
	if a.Group != PodGroup || a.Alias != alias && a.Alias != "" {
		return d, false, &ForeignDeviceError{Name: hostDevice, Group: a.Group, Alias: a.Alias}
	}
	return podDevice(a), true, nil
}

// ForeignDeviceError says that a device that was to go is not the one that was meant.
type ForeignDeviceError struct {
	Name, Alias string
	Group       uint32
}

func (e *ForeignDeviceError) Error() string {
	return fmt.Sprintf("delete device %s: it is another's (group %d, alias %q)", e.Name, e.Group, e.Alias)
}

func (n *Namespace) deleteLink(l netlink.Link) error {
	if err := n.nl.LinkDel(l); err != nil && !isGone(err) {
		return fmt.Errorf("delete device %s: %w", l.Attrs().Name, err)
	}
	return nil
}

// WatchGone tells, until the context ends, that the device of an index has gone. Who hears it looks: it is told, too,
// when so much happens that the kernel does not tell of all of it.
func (n *Namespace) WatchGone(ctx context.Context, index int) (<-chan struct{}, error) {
	socket, err := n.listen(unix.RTMGRP_LINK)
	if err != nil {
		return nil, fmt.Errorf("watch device %d of %s: %w", index, n.path, err)
	}
	gone := make(chan struct{}, 1)
	stop := context.AfterFunc(ctx, func() { socket.Close() })
	go func() {
		defer stop()
		defer socket.Close()
		b := make([]byte, 64<<10)
		for {
			size, err := socket.Read(b)
			if ctx.Err() != nil {
				return
			}
			if err != nil || tellsGone(b[:size], index) {
				gone <- struct{}{}
				return
			}
		}
	}()
	return gone, nil
}

// tellsGone says whether one of the messages is that the device is deleted.
func tellsGone(b []byte, index int) bool {
	messages, err := syscall.ParseNetlinkMessage(b)
	if err != nil {
		return true // it may have been
	}
	for _, m := range messages {
		// Of another family it is that the device has left a bridge.
		if m.Header.Type == unix.RTM_DELLINK && len(m.Data) >= unix.SizeofIfInfomsg && m.Data[0] == unix.AF_UNSPEC &&
			int(int32(binary.NativeEndian.Uint32(m.Data[4:]))) == index {
			return true
		}
	}
	return false
}
