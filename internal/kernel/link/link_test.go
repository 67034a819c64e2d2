package link_test

import (
	"errors"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/fathom-network/fathom/internal/kernel/link"
	"github.com/fathom-network/fathom/internal/testenv"
	"github.com/fathom-network/fathom/internal/testenv/linktest"
)

func TestNamespace(t *testing.T) {
	testenv.NeedRoot(t)
	path := filepath.Join(t.TempDir(), "ns")
	testenv.Must(t, link.Create(path))
	t.Cleanup(func() { testenv.Must(t, link.Delete(path)) }) // what is gone is gone
	n, err := link.Open(path)
	testenv.Must(t, err)
	defer n.Close()
	testenv.Must(t, link.Create(path))
	again, err := link.Open(path)
	testenv.Must(t, err)
	defer again.Close()
	if same, err := again.Is(n); err != nil || !same {
		t.Errorf("what is there is not kept: %v, %v", same, err)
	}
	testenv.Must(t, link.Delete(path))
	if mounts, err := os.ReadFile("/proc/self/mounts"); err != nil || strings.Contains(string(mounts), path) {
		t.Errorf("%s is still mounted (%v)", path, err)
	}
}

func TestWire(t *testing.T) {
	a, b := linktest.Namespace(t), linktest.Namespace(t)
	here := link.Device{Name: "a0", Alias: "test wire", Bridge: "br0", MTU: 1400}
	there := link.Device{Name: "b0", Alias: "test wire"}
	for range 2 { // whole desired state: repeating it changes nothing
		testenv.Must(t, a.SetBridge(link.Device{Name: "br0", Alias: "test bridge"}))
		testenv.Must(t, a.SetPair(here, b, there))
		testenv.Must(t, a.SetAddrs("br0", []netip.Prefix{netip.MustParsePrefix("192.0.2.1/24"), netip.MustParsePrefix("2001:db8::1/64")}))
		testenv.Must(t, b.SetAddrs("b0", []netip.Prefix{netip.MustParsePrefix("192.0.2.2/24"), netip.MustParsePrefix("2001:db8::2/64")}))
	}
	linktest.Run(t, b, "ping", "-c1", "-W5", "192.0.2.1")
	linktest.Run(t, b, "ping", "-c1", "-W5", "2001:db8::1")
	if got := linktest.Run(t, a, "ip", "-d", "link", "show", "a0"); !strings.Contains(got, "mtu 1400") || !strings.Contains(got, "master br0") || !strings.Contains(got, "alias test wire") {
		t.Errorf("a0 is not as wanted:\n%s", got)
	}

	testenv.Must(t, a.SetUp("a0", false))
	if s, err := b.Device("b0"); err != nil || s.Carrier {
		t.Errorf("with the other end down: %+v, %v; want no carrier", s, err)
	}
	testenv.Must(t, a.SetUp("a0", true))

	testenv.Must(t, b.SetAddrs("b0", []netip.Prefix{netip.MustParsePrefix("192.0.2.3/24")}))
	got := linktest.Run(t, b, "ip", "-br", "addr", "show", "b0")
	if !strings.Contains(got, "192.0.2.3/24") || strings.Contains(got, "192.0.2.2/24") || strings.Contains(got, "2001:db8") || !strings.Contains(got, "fe80::") {
		t.Errorf("addresses that are not wanted stay, or wanted ones went: %s", got)
	}

	if err := a.DeleteDevice("a0", "another alias"); err == nil {
		t.Error("a device that is not ours is deleted")
	}
	for range 2 {
		testenv.Must(t, a.DeleteDevice("a0", "test wire"))
	}
	if _, err := b.Device("b0"); err == nil {
		t.Error("the other end outlives the pair")
	}
}

// A bridge that took its address from a port would change it here, and its neighbours lose it.
func TestBridgeKeepsItsAddress(t *testing.T) {
	a, b := linktest.Namespace(t), linktest.Namespace(t)
	testenv.Must(t, a.SetBridge(link.Device{Name: "br0", Alias: "test bridge"}))
	address := func() string { return strings.Fields(linktest.Run(t, a, "ip", "-br", "link", "show", "br0"))[2] }
	before := address()
	for _, mac := range []string{"02:00:00:00:00:01", "02:00:00:00:00:00"} {
		hw, err := net.ParseMAC(mac)
		testenv.Must(t, err)
		name := "p" + mac[len(mac)-2:]
		testenv.Must(t, a.SetPair(link.Device{Name: name, Alias: "test port", Bridge: "br0", MAC: hw}, b, link.Device{Name: name, Alias: "test port"}))
	}
	if after := address(); after != before {
		t.Errorf("the bridge's address was %s and is %s", before, after)
	}
}

func TestPairReplacesOnlyOurs(t *testing.T) {
	a, b := linktest.Namespace(t), linktest.Namespace(t)
	linktest.Run(t, a, "ip", "link", "add", "a0", "type", "veth", "peer", "name", "x0")
	if err := a.SetPair(link.Device{Name: "a0", Alias: "ours"}, b, link.Device{Name: "b0", Alias: "ours"}); err == nil || !strings.Contains(err.Error(), "not ours") {
		t.Fatalf("a foreign device in the way gives %v", err)
	}
	linktest.Run(t, a, "ip", "link", "set", "a0", "alias", "ours") // a stray half of an interrupted run
	testenv.Must(t, a.SetPair(link.Device{Name: "a0", Alias: "ours"}, b, link.Device{Name: "b0", Alias: "ours"}))
	if _, err := b.Device("b0"); err != nil {
		t.Error(err)
	}
}

func TestRoutes(t *testing.T) {
	a, b := linktest.Namespace(t), linktest.Namespace(t)
	testenv.Must(t, a.SetPair(link.Device{Name: "a0", Alias: "x"}, b, link.Device{Name: "b0", Alias: "x"}))
	testenv.Must(t, a.SetAddrs("a0", []netip.Prefix{netip.MustParsePrefix("192.0.2.1/24"), netip.MustParsePrefix("2001:db8::1/64")}))
	linktest.Run(t, a, "ip", "route", "add", "203.0.113.0/24", "via", "192.0.2.9") // somebody else's
	route := func(to, via string) link.Route {
		return link.Route{To: netip.MustParsePrefix(to), Via: netip.MustParseAddr(via)}
	}
	testenv.Must(t, a.SetRoutes([]link.Route{route("0.0.0.0/0", "192.0.2.2"), route("198.51.100.0/24", "192.0.2.2"), route("::/0", "2001:db8::2")}))
	testenv.Must(t, a.SetRoutes([]link.Route{route("0.0.0.0/0", "192.0.2.3"), route("::/0", "2001:db8::2")}))
	got := linktest.Run(t, a, "ip", "route") + linktest.Run(t, a, "ip", "-6", "route")
	for _, want := range []string{"default via 192.0.2.3", "203.0.113.0/24", "default via 2001:db8::2", "proto 250"} {
		if !strings.Contains(got, want) {
			t.Errorf("no %q in\n%s", want, got)
		}
	}
	if strings.Contains(got, "198.51.100.0/24") || strings.Contains(got, "192.0.2.2 dev a0 proto 250") {
		t.Errorf("a route that is not wanted any more stays:\n%s", got)
	}
	routed, err := a.Routed()
	if err != nil || len(routed) < 4 {
		t.Errorf("Routed gives %v, %v", routed, err)
	}
}

func TestShape(t *testing.T) {
	a, b := linktest.Namespace(t), linktest.Namespace(t)
	testenv.Must(t, a.SetPair(link.Device{Name: "a0", Alias: "x"}, b, link.Device{Name: "b0", Alias: "x"}))
	want := link.Shape{Rate: 10_000_000}
	for range 2 {
		testenv.Must(t, a.SetShape("a0", want))
	}
	if got, err := a.Shape("a0"); err != nil || got != want {
		t.Errorf("Shape gives %+v, %v; want %+v", got, err, want)
	}
	if got := linktest.Run(t, a, "tc", "qdisc", "show", "dev", "a0"); !strings.Contains(got, "tbf") || !strings.Contains(got, "rate 10Mbit") {
		t.Errorf("tc shows %s", got)
	}
	// Where the kernel has netem it is used, and where it has not the error says so; the rate stays possible.
	err := a.SetShape("a0", link.Shape{Rate: 10_000_000, Delay: 20e6, Loss: 1})
	if err == nil {
		if got := linktest.Run(t, a, "tc", "qdisc", "show", "dev", "a0"); !strings.Contains(got, "delay 20ms") {
			t.Errorf("tc shows %s", got)
		}
	} else if !errors.Is(err, link.ErrNoNetem) {
		t.Errorf("got %v, want ErrNoNetem", err)
	}
	testenv.Must(t, a.SetShape("a0", link.Shape{}))
	if got, err := a.Shape("a0"); err != nil || got != (link.Shape{}) {
		t.Errorf("after the shape is taken away: %+v, %v", got, err)
	}
}

func TestOpenSaysWhatIsWrong(t *testing.T) {
	file := filepath.Join(t.TempDir(), "file")
	testenv.Must(t, os.WriteFile(file, nil, 0o600))
	for _, path := range []string{file, file + "-missing"} {
		if _, err := link.Open(path); err == nil {
			t.Errorf("%s opens as a namespace", path)
		}
	}
}
