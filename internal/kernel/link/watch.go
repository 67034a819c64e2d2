package link

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"syscall"

	"golang.org/x/sys/unix"
)

// WatchChanges signals, until the context ends, that devices, queueing disciplines, addresses or routes of the namespace
// may have changed. (When a device goes down, for instance, the kernel deletes its routes and does not restore them.) It
// sends no details, and one signal for several changes: the receiver reads the kernel.
func (n *Namespace) WatchChanges(ctx context.Context) (<-chan struct{}, error) {
	socket, err := n.listen(unix.RTMGRP_LINK | unix.RTMGRP_TC |
		unix.RTMGRP_IPV4_IFADDR | unix.RTMGRP_IPV6_IFADDR | unix.RTMGRP_IPV4_ROUTE | unix.RTMGRP_IPV6_ROUTE)
	if err != nil {
		return nil, fmt.Errorf("watch the changes of %s: %w", n.path, err)
	}
	changes := make(chan struct{}, 1)
	stop := context.AfterFunc(ctx, func() { socket.Close() })
	go func() {
		defer close(changes)
		defer stop()
		defer socket.Close()
		b := make([]byte, 64<<10)
		for {
			// Changes that overflowed the socket count as well.
			if _, err := socket.Read(b); err != nil && !errors.Is(err, unix.ENOBUFS) {
				return
			}
			select {
			case changes <- struct{}{}:
			default: // a signal is pending already
			}
		}
	}()
	return changes, nil
}

// listen opens a route netlink socket that is subscribed to these groups.
func (n *Namespace) listen(groups uint32) (*os.File, error) {
	var fd int
	err := n.Do(func() error {
		var err error
		fd, err = unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, unix.NETLINK_ROUTE)
		return err
	})
	if err != nil {
		return nil, err
	}
	socket := os.NewFile(uintptr(fd), "netlink")
	if err := unix.Bind(fd, &unix.SockaddrNetlink{Family: unix.AF_NETLINK, Groups: groups}); err != nil {
		socket.Close()
		return nil, err
	}
	return socket, nil
}

// WatchGone signals, until the context ends, that the device with an index may be gone. The receiver has to check: the
// signal also comes when so many events happen that the kernel drops some.
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

// tellsGone reports whether one of the messages says that the device is deleted.
func tellsGone(b []byte, index int) bool {
	messages, err := syscall.ParseNetlinkMessage(b)
	if err != nil {
		return true // it may be deleted
	}
	for _, m := range messages {
		// A message of another family says that the device has left a bridge.
		if m.Header.Type == unix.RTM_DELLINK && len(m.Data) >= unix.SizeofIfInfomsg && m.Data[0] == unix.AF_UNSPEC &&
			int(int32(binary.NativeEndian.Uint32(m.Data[4:]))) == index {
			return true
		}
	}
	return false
}
