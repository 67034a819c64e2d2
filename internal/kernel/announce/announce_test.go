package announce_test

import (
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/fathom-network/fathom/internal/facts/podnet"
	"github.com/fathom-network/fathom/internal/kernel/announce"
	"github.com/fathom-network/fathom/internal/kernel/link"
	"github.com/fathom-network/fathom/internal/testenv"
	"github.com/fathom-network/fathom/internal/testenv/linktest"
)

var (
	vip4, vip6 = netip.MustParseAddr("192.0.2.80"), netip.MustParseAddr("2001:db8::80")
	far        = netip.MustParseAddr("198.51.100.80")
	both       = []netip.Addr{vip4, vip6, far}
)

// node is a machine on a segment that has the addresses, as a balancer would, and not on its device.
type node struct {
	*link.Namespace
	mac      string
	speaker  *announce.Speaker
	segments []podnet.Segment
}

// segment makes a switch with a client and nodes.
func segment(t *testing.T, count int) (client *link.Namespace, nodes []node) {
	t.Helper()
	wire := linktest.Namespace(t)
	testenv.Must(t, wire.SetBridge(link.Device{Name: "br0", Alias: "test"}))
	attach := func(i int) *link.Namespace {
		n := linktest.Namespace(t)
		testenv.Must(t, n.Sysctl("ipv6/conf/default/accept_dad", "0"))
		testenv.Must(t, wire.SetPair(link.Device{Name: fmt.Sprint("p", i), Alias: "test", Bridge: "br0"}, n, link.Device{Name: "eth0", Alias: "test"}))
		testenv.Must(t, n.SetAddrs("eth0", []netip.Prefix{netip.MustParsePrefix(fmt.Sprintf("192.0.2.%d/24", i)), netip.MustParsePrefix(fmt.Sprintf("2001:db8::%d/64", i))}))
		testenv.Must(t, n.SetUp("lo", true))
		return n
	}
	client = attach(9)
	for i := 1; i <= count; i++ {
		n := node{Namespace: attach(i)}
		testenv.Must(t, n.Sysctl("ipv4/conf/all/arp_ignore", "1"))
		linktest.Run(t, n.Namespace, "ip", "addr", "add", vip4.String()+"/32", "dev", "lo")
		linktest.Run(t, n.Namespace, "ip", "addr", "add", vip6.String()+"/128", "dev", "lo")
		words := strings.Fields(linktest.Run(t, n.Namespace, "ip", "-br", "link", "show", "eth0"))
		n.mac = words[2]
		n.speaker = announce.New(n.Namespace, slog.New(slog.NewTextHandler(t.Output(), nil)))
		t.Cleanup(n.speaker.Close)
		n.segments = []podnet.Segment{{Device: "eth0", Prefix: netip.MustParsePrefix(fmt.Sprintf("192.0.2.%d/24", i))}, {Device: "eth0", Prefix: netip.MustParsePrefix(fmt.Sprintf("2001:db8::%d/64", i))}}
		nodes = append(nodes, n)
	}
	return client, nodes
}

// knows waits until the client's neighbour entry of an address says this.
func knows(t *testing.T, client *link.Namespace, addr netip.Addr, mac string) {
	t.Helper()
	var got string
	for deadline := time.Now().Add(time.Minute); !strings.Contains(got, mac); time.Sleep(5 * time.Millisecond) {
		if got = linktest.Run(t, client, "ip", "neigh", "show", addr.String()); time.Now().After(deadline) {
			t.Fatalf("the client knows %q of %s, want %s", got, addr, mac)
		}
	}
}

func TestTakeover(t *testing.T) {
	client, nodes := segment(t, 2)
	for _, a := range []netip.Addr{vip4, vip6} {
		if out, err := linktest.Try(client, "ping", "-c1", "-W1", a.String()); err == nil {
			t.Fatalf("nobody announces %s, and somebody answers:\n%s", a, out)
		}
	}
	linktest.Run(t, client, "ip", "neigh", "flush", "dev", "eth0")

	for i, want := range []announce.Changes{{Taken: 2, Devices: 1}, {Devices: 1}} {
		if got, err := nodes[0].speaker.Set(announce.Own(both), nodes[0].segments); err != nil || got != want {
			t.Errorf("set the %d. time: %+v, %v, want %+v", i+1, got, err, want)
		}
	}
	for _, a := range []netip.Addr{vip4, vip6} {
		linktest.Run(t, client, "ping", "-c1", "-W5", a.String())
		knows(t, client, a, nodes[0].mac)
	}

	// The second takes over from one that said nothing.
	nodes[0].speaker.Close()
	began := time.Now()
	_, err := nodes[1].speaker.Set(announce.Own(both), nodes[1].segments)
	testenv.Must(t, err)
	for _, a := range []netip.Addr{vip4, vip6} {
		knows(t, client, a, nodes[1].mac)
		linktest.Run(t, client, "ping", "-c1", "-W5", a.String())
	}
	t.Logf("the client's entries moved, and it was answered, within %v", time.Since(began).Round(time.Millisecond))

	// And back, while both live.
	_, err = nodes[1].speaker.Set(nil, nodes[1].segments)
	testenv.Must(t, err)
	_, err = nodes[0].speaker.Set(announce.Own(both), nodes[0].segments)
	testenv.Must(t, err)
	for _, a := range []netip.Addr{vip4, vip6} {
		knows(t, client, a, nodes[0].mac)
	}

	// Nobody says anything of an address that was left, though there is more to say at the beginning.
	must2(t)(nodes[0].speaker.Set(announce.Own([]netip.Addr{vip6}), nodes[0].segments))
	linktest.Run(t, client, "ip", "neigh", "flush", "dev", "eth0")
	if out, err := linktest.Try(client, "ping", "-c1", "-W1", vip4.String()); err == nil {
		t.Errorf("an address that was left is answered:\n%s", out)
	}
	linktest.Run(t, client, "ping", "-c1", "-W5", vip6.String())
}

// TestStandIn: a node answers for another, which goes on getting the packets.
func TestStandIn(t *testing.T) {
	client, nodes := segment(t, 2)
	mac, err := net.ParseMAC(nodes[0].mac)
	testenv.Must(t, err)
	var others []announce.Answer
	for _, a := range both {
		others = append(others, announce.Answer{Addr: a, MAC: mac})
	}
	must2(t)(nodes[1].speaker.Set(others, nodes[1].segments))
	for _, a := range []netip.Addr{vip4, vip6} {
		linktest.Run(t, client, "ping", "-c3", "-i0.1", "-W5", a.String())
		knows(t, client, a, nodes[0].mac)
	}
	// The node itself is still where it was for the switch.
	linktest.Run(t, client, "ping", "-c3", "-i0.1", "-W5", "192.0.2.1")
	linktest.Run(t, client, "ping", "-c3", "-i0.1", "-W5", "192.0.2.2")
	// It takes over for good, and everybody hears of that.
	if got, err := nodes[1].speaker.Set(announce.Own(both), nodes[1].segments); err != nil || got != (announce.Changes{Taken: 2, Devices: 1}) {
		t.Errorf("%+v, %v", got, err)
	}
	for _, a := range []netip.Addr{vip4, vip6} {
		knows(t, client, a, nodes[1].mac)
	}
	if _, err := nodes[1].speaker.Set([]announce.Answer{{Addr: vip4, MAC: mac[:3]}}, nodes[1].segments); err == nil {
		t.Error("half an Ethernet address is taken")
	}
}

func must2(t *testing.T) func(announce.Changes, error) {
	return func(_ announce.Changes, err error) {
		t.Helper()
		testenv.Must(t, err)
	}
}

// TestDeviceMadeAnew: the device gets another Ethernet address, goes down and up again.
func TestDeviceMadeAnew(t *testing.T) {
	client, nodes := segment(t, 1)
	n := nodes[0]
	must2(t)(n.speaker.Set(announce.Own(both), n.segments))
	linktest.Run(t, client, "ping", "-c1", "-W5", vip4.String())
	linktest.Run(t, n.Namespace, "ip", "link", "set", "eth0", "address", "02:00:00:00:00:99")
	must2(t)(n.speaker.Set(announce.Own(both), n.segments))
	knows(t, client, vip4, "02:00:00:00:00:99")
	testenv.Must(t, n.SetUp("eth0", false))
	testenv.Must(t, n.SetUp("eth0", true))
	must2(t)(n.speaker.Set(announce.Own(both), n.segments))
	linktest.Run(t, client, "ip", "neigh", "flush", "dev", "eth0")
	linktest.Run(t, client, "ping", "-c1", "-W5", vip4.String())
	if _, err := n.speaker.Set(announce.Own(both), []podnet.Segment{{Device: "eth9", Prefix: n.segments[0].Prefix}}); err == nil {
		t.Error("a device that is not there is no error")
	}
}

// TestManyGroups: more addresses than a socket holds groups.
func TestManyGroups(t *testing.T) {
	client, nodes := segment(t, 1)
	n := nodes[0]
	addrs, a := []netip.Addr{vip6}, netip.MustParseAddr("2001:db8::1000")
	for range 1000 {
		addrs, a = append(addrs, a), a.Next()
	}
	must2(t)(n.speaker.Set(announce.Own(addrs), n.segments))
	if got := strings.Count(linktest.Run(t, n.Namespace, "ip", "-6", "maddr", "show", "dev", "eth0"), "ff02::1:ff00:"); got < 1000 {
		t.Errorf("%d groups are joined, want 1001", got)
	}
	linktest.Run(t, client, "ping", "-c1", "-W5", vip6.String())
	must2(t)(n.speaker.Set(nil, n.segments))
	if got := strings.Count(linktest.Run(t, n.Namespace, "ip", "-6", "maddr", "show", "dev", "eth0"), "ff02::1:ff00:1"); got > 2 {
		t.Errorf("%d groups stay joined", got)
	}
}
