package link

import (
	"errors"
	"fmt"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/fathom-network/fathom/internal/kernel/rtnl"
)

// Shape is how a wire is impaired. The zero value is an unimpaired wire.
type Shape struct {
	Rate  uint64 // bits per second, 0 for no limit
	Delay time.Duration
	Loss  float64 // percent
}

// ErrNoNetem says that the kernel cannot delay or lose packets.
var ErrNoNetem = errors.New("this kernel has no netem queueing discipline (CONFIG_NET_SCH_NETEM), which delay and loss need; a rate works without it")

// SetShape sets what the device does to the packets that it sends.
func (n *Namespace) SetShape(device string, s Shape) error {
	l, err := n.nl.LinkByName(device)
	if err != nil {
		return fmt.Errorf("shape device %s: %w", device, err)
	}
	if err := n.setShape(l, s); err != nil {
		return fmt.Errorf("shape device %s: %w", device, err)
	}
	return nil
}

func (n *Namespace) setShape(l netlink.Link, s Shape) error {
	root := netlink.QdiscAttrs{LinkIndex: l.Attrs().Index, Handle: netlink.MakeHandle(1, 0), Parent: netlink.HANDLE_ROOT}
	if err := n.nl.QdiscDel(&netlink.GenericQdisc{QdiscAttrs: netlink.QdiscAttrs{LinkIndex: root.LinkIndex, Parent: netlink.HANDLE_ROOT}}); err != nil &&
		!errors.Is(err, unix.ENOENT) && !errors.Is(err, unix.EINVAL) {
		return fmt.Errorf("remove the queueing discipline: %w", err)
	}
	if s.Delay != 0 || s.Loss != 0 {
		err := n.nl.QdiscAdd(netlink.NewNetem(root, netlink.NetemQdiscAttrs{
			Latency: uint32(s.Delay.Microseconds()), Loss: float32(s.Loss), Limit: 10000,
		}))
		if errors.Is(err, unix.ENOENT) || errors.Is(err, unix.EOPNOTSUPP) {
			return ErrNoNetem
		}
		if err != nil {
			return fmt.Errorf("add netem: %w", err)
		}
		root.Parent, root.Handle = netlink.MakeHandle(1, 1), netlink.MakeHandle(2, 0)
	}
	if s.Rate == 0 {
		return nil
	}
	// The bucket holds 10 ms, but at least one large segment, since veth carries packets of up to 64 KiB. The queue holds
	// 50 ms at that rate.
	bytesPerSecond := s.Rate / 8
	burst := max(bytesPerSecond/100, 70_000)
	tbf := &netlink.Tbf{QdiscAttrs: root, Rate: bytesPerSecond, Buffer: xmitTime(bytesPerSecond, burst),
		Limit: uint32(min(bytesPerSecond/20+burst, 1<<31))}
	if err := n.nl.QdiscAdd(tbf); err != nil {
		return fmt.Errorf("add tbf: %w", err)
	}
	return nil
}

// xmitTime returns how long size bytes take at rate bytes per second, in tc's ticks.
func xmitTime(rate, size uint64) uint32 {
	return uint32(float64(size) / float64(rate) * 1e6 * netlink.TickInUsec())
}

// Shape returns what SetShape set on the device.
func (n *Namespace) Shape(device string) (Shape, error) {
	var s Shape
	l, err := n.nl.LinkByName(device)
	if err != nil {
		return s, fmt.Errorf("read the shape of %s: %w", device, err)
	}
	all, err := rtnl.List(func() ([]netlink.Qdisc, error) { return n.nl.QdiscList(l) })
	if err != nil {
		return s, fmt.Errorf("read the shape of %s: %w", device, err)
	}
	for _, q := range all {
		switch q := q.(type) {
		case *netlink.Tbf:
			s.Rate = q.Rate * 8
		case *netlink.Netem:
			s.Delay = time.Duration(float64(q.Latency)/netlink.TickInUsec()) * time.Microsecond
			s.Loss = float64(q.Loss) / (1<<32 - 1) * 100
		}
	}
	return s, nil
}

// Strings writes the parts that are set, as a person would.
func (s Shape) Strings() (rate, delay, loss string) {
	switch {
	case s.Rate == 0:
	case s.Rate%1e9 == 0:
		rate = fmt.Sprintf("%dgbit", s.Rate/1e9)
	case s.Rate%1e6 == 0:
		rate = fmt.Sprintf("%dmbit", s.Rate/1e6)
	default:
		rate = fmt.Sprintf("%dkbit", s.Rate/1e3)
	}
	if s.Delay != 0 {
		delay = s.Delay.String()
	}
	if s.Loss != 0 {
		loss = fmt.Sprintf("%.4g%%", s.Loss)
	}
	return rate, delay, loss
}
