package link

import (
	"context"
	"fmt"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"

	"github.com/fathom-network/fathom/internal/podnet"
)

// Watch tells of changes that a plan of the network between nodes depends on or that undo it: devices, their
// addresses, and routes of ours that are taken away. Several changes may come as one. What was missed, because
// too much happened at once, comes as a change too.
func (n *Namespace) Watch(ctx context.Context) (<-chan struct{}, error) {
	changed := make(chan struct{}, 1)
	if err := n.subscribe(ctx, changed); err != nil {
		return nil, err
	}
	return changed, nil
}

func tell(changed chan<- struct{}) {
	select {
	case changed <- struct{}{}:
	default:
	}
}

// subscribe begins a subscription, and another one when it breaks.
func (n *Namespace) subscribe(ctx context.Context, changed chan<- struct{}) error {
	done, broken := make(chan struct{}), make(chan error, 3)
	failed := func(err error) {
		select {
		case broken <- err:
		default:
		}
	}
	ns := netns.NsHandle(n.file.Fd())
	links, addrs, routes := make(chan netlink.LinkUpdate, 64), make(chan netlink.AddrUpdate, 64), make(chan netlink.RouteUpdate, 64)
	err := netlink.LinkSubscribeWithOptions(links, done, netlink.LinkSubscribeOptions{Namespace: &ns, ErrorCallback: failed})
	if err == nil {
		err = netlink.AddrSubscribeWithOptions(addrs, done, netlink.AddrSubscribeOptions{Namespace: &ns, ErrorCallback: failed})
	}
	if err == nil {
		err = netlink.RouteSubscribeWithOptions(routes, done, netlink.RouteSubscribeOptions{Namespace: &ns, ErrorCallback: failed})
	}
	if err != nil {
		close(done)
		return fmt.Errorf("watch the network namespace %s: %w", n.path, err)
	}
	go func() {
		defer func() {
			close(done)
			// The library sends what it has read already: somebody must take it.
			go drainAll(links)
			go drainAll(addrs)
			go drainAll(routes)
		}()
		for {
			select {
			case <-ctx.Done():
				return
			case <-broken:
				tell(changed)
				for n.subscribe(ctx, changed) != nil {
					select {
					case <-ctx.Done():
						return
					case <-time.After(time.Second):
					}
				}
				return
			case u := <-links:
				if u.Link == nil || u.Attrs().Group != PodGroup {
					tell(changed)
				}
			case u := <-addrs:
				if !u.LinkAddress.IP.IsLinkLocalUnicast() {
					tell(changed)
				}
			case u := <-routes:
				if u.Type == unix.RTM_DELROUTE && u.Protocol == podnet.RouteProtocol {
					tell(changed)
				}
			}
		}
	}()
	return nil
}

func drainAll[T any](c <-chan T) {
	for range c { //nolint:revive // until the library closes it
	}
}
