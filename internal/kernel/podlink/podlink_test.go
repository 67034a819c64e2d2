package podlink_test

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/fathom-network/fathom/internal/kernel/link"
	"github.com/fathom-network/fathom/internal/kernel/podlink"
	"github.com/fathom-network/fathom/internal/testenv"
	"github.com/fathom-network/fathom/internal/testenv/linktest"
)

func addrs(list ...string) []netip.Addr {
	var all []netip.Addr
	for _, s := range list {
		all = append(all, netip.MustParseAddr(s))
	}
	return all
}

func testPod(host string, last byte, list ...string) podlink.Pod {
	return podlink.Pod{
		Device: "eth0", MAC: net.HardwareAddr{2, 0, 0, 0, 1, last}, HostDevice: host, HostMAC: net.HardwareAddr{2, 0, 0, 0, 2, last},
		Alias: "fathom pod default/" + host + " eth0", MTU: 1400, Addrs: addrs(list...), Sources: addrs("192.0.2.1", "2001:db8::1"),
	}
}

func TestPod(t *testing.T) {
	node, a, b := linktest.Namespace(t), linktest.Namespace(t), linktest.Namespace(t)
	testenv.Must(t, node.SetUp("lo", true))
	testenv.Must(t, node.SetAddrs("lo", []netip.Prefix{netip.MustParsePrefix("192.0.2.1/32"), netip.MustParsePrefix("2001:db8::1/128")}))
	podA := testPod("a-1", 1, "10.1.0.2", "fd00::2")
	podB := testPod("b-1", 2, "10.1.0.3", "fd00::3")
	testenv.Must(t, podlink.Add(node, a, podA))
	testenv.Must(t, podlink.Add(node, b, podB))
	for _, to := range []string{"10.1.0.3", "fd00::3", "192.0.2.1", "2001:db8::1", "fe80::1%eth0"} {
		linktest.Run(t, a, "ping", "-c1", "-W5", to)
	}
	linktest.Run(t, node, "ping", "-c1", "-W5", "fd00::2")
	if got := linktest.Run(t, b, "ip", "-4", "route"); got != "default via 169.254.1.1 dev eth0 \n169.254.1.1 dev eth0 scope link \n" {
		t.Errorf("the pod's routes:\n%s", got)
	}
	if got := linktest.Run(t, node, "ip", "route"); got != "10.1.0.2 dev a-1 proto 252 scope link src 192.0.2.1 \n10.1.0.3 dev b-1 proto 252 scope link src 192.0.2.1 \n" {
		t.Errorf("the node's routes:\n%s", got)
	}
	// A pod that sends from another's address is not heard.
	linktest.Run(t, a, "ip", "addr", "add", "10.1.0.99/32", "dev", "eth0")
	linktest.Run(t, a, "sh", "-c", "! ping -c1 -W1 -I 10.1.0.99 10.1.0.3")

	if wrong, err := podlink.Check(node, a, podA, nil); err != nil || len(wrong) > 0 {
		t.Errorf("Check finds %q, %v", wrong, err)
	}
	if wrong, err := podlink.Check(node, b, podA, nil); err != nil || len(wrong) < 3 {
		t.Errorf("of another pod Check finds only %q, %v", wrong, err)
	}
	devices, err := podlink.Devices(node)
	if err != nil || len(devices) != 2 || devices[0].Alias != podA.Alias {
		t.Errorf("%v, %v", devices, err)
	}
	for range 2 {
		testenv.Must(t, podlink.Delete(node, "a-1", podA.Alias))
	}
	if got := linktest.Run(t, node, "ip", "route") + linktest.Run(t, node, "ip", "-6", "route"); strings.Contains(got, "a-1") {
		t.Errorf("routes stay:\n%s", got)
	}
	linktest.Run(t, node, "ip", "link", "add", "a-1", "type", "veth", "peer", "name", "x")
	var foreign *podlink.ForeignDeviceError
	if err := podlink.Delete(node, "a-1", podA.Alias); !errors.As(err, &foreign) {
		t.Errorf("a foreign device: %v", err)
	}
	if err := podlink.Delete(node, "b-1", podA.Alias); !errors.As(err, &foreign) || foreign.Alias != podB.Alias {
		t.Errorf("the device of another pod: %v", err)
	}
}

// A device that has another's name or index by now stays, and who waits for the end of one hears of it.
func TestDeletePodDevice(t *testing.T) {
	node, pod := linktest.Namespace(t), linktest.Namespace(t)
	testenv.Must(t, node.SetUp("lo", true))
	p := testPod("a-1", 1, "10.1.0.2")
	p.Sources = nil
	testenv.Must(t, podlink.Add(node, pod, p))
	d, found, err := podlink.Find(node, p.HostDevice, p.Alias)
	if err != nil || !found || d.Name != p.HostDevice || d.Alias != p.Alias {
		t.Fatalf("%+v, %v, %v", d, found, err)
	}
	var foreign *podlink.ForeignDeviceError
	if _, found, err := podlink.Find(node, p.HostDevice, "another"); found || !errors.As(err, &foreign) {
		t.Errorf("a foreign device: %v, %v", found, err)
	}
	if _, found, err := podlink.Find(node, "a-2", p.Alias); found || err != nil {
		t.Errorf("no device: %v, %v", found, err)
	}
	for _, other := range []podlink.Device{{d.Name, d.Alias, d.Index + 1}, {"a-2", d.Alias, d.Index}} {
		testenv.Must(t, podlink.DeleteDevice(node, other))
	}
	for _, other := range []podlink.Device{{d.Name, "another", d.Index}, {d.Name, "", d.Index}} {
		if err := podlink.DeleteDevice(node, other); !errors.As(err, &foreign) {
			t.Errorf("%+v: %v", other, err)
		}
	}
	gone, err := node.WatchGone(t.Context(), d.Index)
	testenv.Must(t, err)
	// Word of what is not meant comes first: of another device, and of the device itself.
	linktest.Run(t, node, "ip", "link", "add", "x", "type", "veth", "peer", "name", "y")
	linktest.Run(t, node, "ip", "link", "del", "x")
	linktest.Run(t, node, "ip", "link", "add", "br0", "type", "bridge")
	linktest.Run(t, node, "ip", "link", "set", d.Name, "master", "br0")
	linktest.Run(t, node, "ip", "link", "set", d.Name, "nomaster")
	select {
	case <-gone:
		t.Error("a device that is there is told to have gone")
	case <-time.After(100 * time.Millisecond):
	}
	for range 2 {
		testenv.Must(t, podlink.DeleteDevice(node, d))
	}
	select {
	case <-gone:
	case <-time.After(time.Minute):
		t.Error("no word of it")
	}
}

// The first packet from a pod goes through, and the first to it, also where the kernel is busy with other devices.
func TestPodFirstPacket(t *testing.T) {
	node, elsewhere := linktest.Namespace(t), linktest.Namespace(t)
	testenv.Must(t, node.SetUp("lo", true))
	testenv.Must(t, node.SetAddrs("lo", []netip.Prefix{netip.MustParsePrefix("192.0.2.1/32"), netip.MustParsePrefix("2001:db8::1/128")}))
	linktest.Run(t, node, "ping", "-c1", "-W5", "2001:db8::1")
	listen := func(in *link.Namespace, addr string) net.PacketConn {
		t.Helper()
		var c net.PacketConn
		testenv.Must(t, in.Do(func() (err error) {
			c, err = net.ListenPacket("udp", netip.AddrPortFrom(netip.MustParseAddr(addr), 9).String())
			return err
		}))
		t.Cleanup(func() { c.Close() })
		return c
	}
	type way struct {
		from *link.Namespace
		to   net.PacketConn
	}
	servers := []net.PacketConn{listen(node, "192.0.2.1"), listen(node, "2001:db8::1")}
	ctx, cancel := context.WithCancel(t.Context())
	var busy sync.WaitGroup
	defer busy.Wait()
	defer cancel()
	for range 2 {
		busy.Go(func() {
			for ctx.Err() == nil {
				_, _ = linktest.Try(elsewhere, "sh", "-c", "ip link add x type veth peer name y; ip link del x")
			}
		})
	}
	for i := range 40 {
		pod := linktest.Namespace(t)
		p := testPod(fmt.Sprintf("a-%d", i), byte(i), fmt.Sprintf("10.1.0.%d", i+2), fmt.Sprintf("fd00::%x", i+2))
		testenv.Must(t, podlink.Add(node, pod, p))
		ways := []way{{node, listen(pod, p.Addrs[0].String())}, {node, listen(pod, p.Addrs[1].String())}, {pod, servers[0]}, {pod, servers[1]}}
		for _, w := range ways {
			testenv.Must(t, w.from.Do(func() error {
				c, err := net.Dial("udp", w.to.LocalAddr().String())
				if err != nil {
					return err
				}
				defer c.Close()
				_, err = c.Write([]byte("first"))
				return err
			}))
		}
		for _, w := range ways {
			testenv.Must(t, w.to.SetReadDeadline(time.Now().Add(5*time.Second)))
			if _, _, err := w.to.ReadFrom(make([]byte, 16)); err != nil {
				t.Fatalf("pod %d, the first packet to %s: %v", i, w.to.LocalAddr(), err)
			}
		}
	}
}

func TestPodInTheWay(t *testing.T) {
	node, pod := linktest.Namespace(t), linktest.Namespace(t)
	p := testPod("a-1", 1, "10.1.0.2")
	var exists *podlink.DeviceExistsError
	linktest.Run(t, node, "ip", "link", "add", "a-1", "type", "veth", "peer", "name", "x")
	if err := podlink.Add(node, pod, p); !errors.As(err, &exists) || exists.InPod || exists.Name != "a-1" {
		t.Errorf("a device on the node: %v", err)
	}
	linktest.Run(t, node, "ip", "link", "del", "a-1")
	linktest.Run(t, pod, "ip", "link", "add", "eth0", "type", "veth", "peer", "name", "x")
	if err := podlink.Add(node, pod, p); !errors.As(err, &exists) || !exists.InPod || exists.Name != "eth0" {
		t.Errorf("a device in the pod: %v", err)
	}
	linktest.Run(t, pod, "ip", "link", "del", "eth0")
	// 192.0.2.1 is not the node's: what was made before the route is taken away again.
	if err := podlink.Add(node, pod, p); err == nil || !strings.Contains(err.Error(), "is 192.0.2.1 an address of this node?") {
		t.Errorf("a source that is not the node's: %v", err)
	}
	if devices, err := podlink.Devices(node); err != nil || len(devices) > 0 {
		t.Errorf("%v stay, %v", devices, err)
	}
	p.Sources = nil
	testenv.Must(t, podlink.Add(node, pod, p))
	if got := linktest.Run(t, node, "ip", "-6", "addr", "show", "a-1"); got != "" {
		t.Errorf("for a pod without IPv6 the node's end has some: %s", got)
	}
}

func TestForwarding(t *testing.T) {
	node, pod, uplink := linktest.Namespace(t), linktest.Namespace(t), linktest.Namespace(t)
	testenv.Must(t, node.SetPair(link.Device{Name: "up0", Alias: "x"}, uplink, link.Device{Name: "up0", Alias: "x"}))
	for name, value := range map[string]string{"ipv4/ip_forward": "0", "ipv6/conf/all/forwarding": "0", "ipv6/conf/up0/accept_ra": "1"} {
		testenv.Must(t, node.Sysctl(name, value))
	}
	p := testPod("a-1", 1, "10.1.0.2", "fd00::2")
	p.Sources = nil
	testenv.Must(t, podlink.Add(node, pod, p))
	got := linktest.Run(t, node, "cat", "/proc/sys/net/ipv4/ip_forward", "/proc/sys/net/ipv6/conf/all/forwarding", "/proc/sys/net/ipv6/conf/up0/accept_ra", "/proc/sys/net/ipv6/conf/a-1/accept_ra")
	if got != "1\n1\n2\n0\n" {
		t.Errorf("IPv4 and IPv6 forwarding, accept_ra of the uplink and of the pod's device: %q", got)
	}
}
