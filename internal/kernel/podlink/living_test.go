package podlink_test

import (
	"errors"
	"net/netip"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/fathom-network/fathom/internal/kernel/link"
	"github.com/fathom-network/fathom/internal/kernel/podlink"
	"github.com/fathom-network/fathom/internal/testenv"
	"github.com/fathom-network/fathom/internal/testenv/linktest"
)

// TestLivingPods: the node knows who is there by its devices alone, also if it has lost the routes or the neighbours.
func TestLivingPods(t *testing.T) {
	node, dir := linktest.Namespace(t), t.TempDir()
	testenv.Must(t, node.SetUp("lo", true))
	testenv.Must(t, node.SetAddrs("lo", []netip.Prefix{netip.MustParsePrefix("192.0.2.1/32"), netip.MustParsePrefix("2001:db8::1/128")}))
	var want []podlink.LivingPod
	for i, name := range []string{"a-1", "b-1", "c-1"} {
		path := filepath.Join(dir, name)
		testenv.Must(t, link.Create(path))
		t.Cleanup(func() { testenv.Must(t, link.Delete(path)) })
		pod, err := link.Open(path)
		testenv.Must(t, err)
		t.Cleanup(pod.Close)
		p := testPod(name, byte(i), "10.1.0."+string(rune('2'+i)), "fd00::"+string(rune('2'+i)))
		p.Device = "net" + string(rune('0'+i))
		testenv.Must(t, podlink.Add(node, pod, p))
		linktest.Run(t, pod, "ip", "addr", "add", "10.1.0.99/32", "dev", p.Device) // what it calls itself does not count
		want = append(want, podlink.LivingPod{Device: podlink.Device{Name: name, Alias: p.Alias}, Addrs: p.Addrs, Netns: path, PodEnd: p.Device})
	}
	hidden := linktest.Namespace(t)
	p := testPod("d-1", 9, "10.1.0.9")
	testenv.Must(t, podlink.Add(node, hidden, p))
	want = append(want, podlink.LivingPod{Device: podlink.Device{Name: "d-1", Alias: p.Alias}, Addrs: p.Addrs})
	linktest.Run(t, node, "ip", "route", "del", "10.1.0.2")
	linktest.Run(t, node, "ip", "-6", "route", "flush", "proto", "252")
	linktest.Run(t, node, "ip", "neigh", "del", "10.1.0.3", "dev", "b-1")
	linktest.Run(t, node, "ip", "link", "add", "other", "type", "veth", "peer", "name", "x") // nobody's
	have, err := podlink.LivingPods(node, dir)
	testenv.Must(t, err)
	for i := range have {
		if have[i].Index == 0 {
			t.Errorf("%+v has no index", have[i])
		}
		have[i].Index = 0
	}
	slices.SortFunc(have, func(a, b podlink.LivingPod) int { return strings.Compare(a.Name, b.Name) })
	if !slices.EqualFunc(have, want, func(a, b podlink.LivingPod) bool {
		return a.Device == b.Device && slices.Equal(a.Addrs, b.Addrs) && a.Netns == b.Netns && a.PodEnd == b.PodEnd
	}) {
		t.Errorf("have %+v\nwant %+v", have, want)
	}
	if pods, err := podlink.LivingPods(node, "/nonexistent"); err != nil || len(pods) != 4 {
		t.Errorf("without their namespaces: %+v, %v", pods, err)
	}
}

// TestRouteOfAnotherPod: nobody takes the route to a pod that is there, and packets go on to reach it. Who has no pod
// there has to make way.
func TestRouteOfAnotherPod(t *testing.T) {
	for family, address := range map[string]string{"-4": "10.1.0.2", "-6": "fd00::2"} {
		t.Run(address, func(t *testing.T) {
			node, a, b := linktest.Namespace(t), linktest.Namespace(t), linktest.Namespace(t)
			testenv.Must(t, node.SetUp("lo", true))
			testenv.Must(t, node.SetAddrs("lo", []netip.Prefix{netip.MustParsePrefix("192.0.2.1/32"), netip.MustParsePrefix("2001:db8::1/128")}))
			podA, podB := testPod("a-1", 1, address), testPod("b-1", 2, address)
			// A stale route of somebody else's is replaced.
			linktest.Run(t, node, "ip", "route", "add", "unreachable", address)
			testenv.Must(t, podlink.Add(node, a, podA))
			reaches := func() {
				t.Helper()
				if got := linktest.Run(t, node, "ip", "route", "get", address); !strings.Contains(got, "dev a-1") {
					t.Errorf("the route is %s", got)
				}
				linktest.Run(t, node, "ping", "-c1", "-W5", address)
			}
			reaches()
			var taken *podlink.AddressTakenError
			if err := podlink.Add(node, b, podB); !errors.As(err, &taken) || taken.Addr.String() != address || taken.Device != "a-1" || taken.Alias != podA.Alias {
				t.Errorf("Add: %v", err)
			}
			if devices, err := podlink.Devices(node); err != nil || len(devices) != 1 {
				t.Errorf("%v stay, %v", devices, err)
			}
			reaches()
			// Nor does the repair of a pod that has come to the same address.
			podB.Addrs = addrs("10.1.0.3", "fd00::3")
			testenv.Must(t, podlink.Add(node, b, podB))
			podB.Addrs = addrs(address)
			if err := podlink.Repair(node, b, podB); !errors.As(err, &taken) {
				t.Errorf("Repair: %v", err)
			}
			reaches()
			// Its own route is corrected.
			podA.Sources = nil
			testenv.Must(t, podlink.Repair(node, a, podA))
			if got := linktest.Run(t, node, "ip", family, "route", "show", address, "proto", "252"); strings.Contains(got, "src") || !strings.Contains(got, "a-1") {
				t.Errorf("the corrected route is %s", got)
			}
			reaches()
		})
	}
}
