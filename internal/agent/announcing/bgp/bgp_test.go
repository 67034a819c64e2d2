package bgp_test

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"net/netip"
	"os"
	"os/signal"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/fathom-network/fathom/internal/agent/announcing/bgp"
	"github.com/fathom-network/fathom/internal/facts/bgpconf"
	"github.com/fathom-network/fathom/internal/kernel/link"
	"github.com/fathom-network/fathom/internal/kernel/routeradv"
	"github.com/fathom-network/fathom/internal/testenv"
	"github.com/fathom-network/fathom/internal/testenv/linktest"
)

// asSpeaker is set in the environment of this test's program where it runs as the speaker of a node. It is a process
// of its own, as it can only then be in a namespace and be killed.
const asSpeaker = "FATHOM_TEST_BGP_SPEAKER"

func TestMain(m *testing.M) {
	if os.Getenv(asSpeaker) != "" {
		speak(os.Stdin, os.Stdout)
		return
	}
	os.Exit(m.Run())
}

// told is what a speaker's process says of itself.
type told struct {
	Changes  *bgp.Changes // of a Set
	Sessions []bgp.Session
}

// speak sets what it reads, and says how the sessions are. SIGTERM is an agent's stop. Unnumbered peers have the address :: in
// their zone, in the place of which comes what was heard there.
func speak(in io.Reader, out io.Writer) {
	var mu, setting sync.Mutex
	var want bgpconf.Speaker
	enc := json.NewEncoder(out)
	var s *bgp.Speaker
	tell := func(c *bgp.Changes) {
		mu.Lock()
		defer mu.Unlock()
		_ = enc.Encode(told{c, s.Sessions()})
	}
	changed := make(chan struct{}, 1)
	s = bgp.New(bgp.Options{Log: slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: slog.LevelDebug})), Changed: func() {
		select {
		case changed <- struct{}{}:
		default:
		}
	}})
	log := slog.New(slog.NewTextHandler(os.Stderr, nil))
	heard := make(chan struct{}, 1)
	var routers *routeradv.Listener
	if here, err := link.Here(); err != nil {
		log.Error(err.Error())
		os.Exit(1)
	} else {
		routers = routeradv.New(here, log, func() {
			select {
			case heard <- struct{}{}:
			default:
			}
		})
	}
	set := func(w *bgpconf.Speaker) bgp.Changes {
		setting.Lock()
		defer setting.Unlock()
		if w != nil {
			want = *w
		}
		return s.Set(context.Background(), found(want, routers))
	}
	go func() {
		for range changed {
			tell(nil)
		}
	}()
	go func() {
		for range heard {
			set(nil)
			tell(nil)
		}
	}()
	stop := make(chan os.Signal, 1)
	signal.Notify(stop, unix.SIGTERM)
	go func() {
		<-stop
		s.Leave()
		os.Exit(0)
	}()
	for dec := json.NewDecoder(in); ; {
		var want bgpconf.Speaker // a new one
		if dec.Decode(&want) != nil {
			return
		}
		c := set(&want)
		tell(&c)
	}
}

// found is what is wanted with the routers that were heard, without peers of which none was.
func found(want bgpconf.Speaker, routers *routeradv.Listener) bgpconf.Speaker {
	var devices []string
	for _, p := range want.Peers {
		if p.Unnumbered {
			devices = append(devices, p.Address.Addr().Zone())
		}
	}
	routers.Set(devices)
	heard := routers.Heard()
	all := want.Peers
	want.Peers = nil
	for _, p := range all {
		if p.Unnumbered {
			zone := p.Address.Addr().Zone()
			if !heard[zone].Router.IsValid() {
				continue
			}
			p.Address = netip.AddrPortFrom(heard[zone].Router.WithZone(zone), p.Address.Port())
		}
		want.Peers = append(want.Peers, p)
	}
	return want
}

func TestRoutes(t *testing.T) {
	for name, newRouter := range routers {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			ns := newNamespace(t)
			r := newRouter(t, ns)
			n := newNode(t, ns, 1)
			r.begin(routed{address: "10.1.1.2"}, routed{address: "fd00:1:1::2"})
			n.begin()

			four := peer("10.1.1.1", route("10.244.1.0/24"), via("fd00:244:1::/64", "fd00:1:1::2"))
			n.set(four)
			n.up("router")
			ns.routes("10.244.1.0/24", "10.1.1.2")
			ns.routes("fd00:244:1::/64", "fd00:1:1::2") // told over IPv4
			ns.run("ping -c1 -W5 10.244.1.2")
			ns.run("ping -c1 -W5 fd00:244:1::2")
			if again := n.set(four); again.Total() != 0 {
				t.Errorf("saying it again changes %+v", again)
			}

			four.Routes = []bgpconf.Route{route("10.244.1.0/24"), route("192.0.2.128/25")}
			if done := n.set(four); done != (bgp.Changes{RoutesAdded: 1, RoutesRemoved: 1}) {
				t.Errorf("one route for another is %+v", done)
			}
			ns.routes("192.0.2.128/25", "10.1.1.2")
			ns.routes("fd00:244:1::/64")

			// The session over IPv6 is there before the one over IPv4 goes.
			// A next hop of another family is none that a router can use: such a route is not announced, and the others are.
			six := peer("fd00:1:1::1", route("fd00:244:1::/64"), via("10.244.1.0/24", "10.1.1.2"), via("fd00:244:2::/64", "10.1.1.2"), via("fd00:244:3::/64", "::ffff:10.1.1.2"),
				via("198.51.100.0/24", "fd00:1:1::2"), route("198.51.101.0/24"))
			six.Name = "six"
			if done := n.set(six); done != (bgp.Changes{PeersAdded: 1, PeersRemoved: 1}) {
				t.Errorf("one peer for another is %+v", done)
			}
			n.up("six")
			ns.routes("fd00:244:1::/64", "fd00:1:1::2")
			ns.routes("10.244.1.0/24", "10.1.1.2")
			ns.routes("192.0.2.128/25")
			n.set(six)
			for _, wrong := range []string{"fd00:244:2::/64", "fd00:244:3::/64", "198.51.100.0/24", "198.51.101.0/24"} {
				ns.routes(wrong)
			}

			n.set()
			ns.routes("10.244.1.0/24")
			ns.routes("fd00:244:1::/64")
		})
	}
}

// TestRestart ends the speaker in several ways and starts it again: the router keeps the routes, and loses nothing.
func TestRestart(t *testing.T) {
	for name, newRouter := range routers {
		for over, addrs := range map[string][2]string{"IPv4": {"10.1.1.1", "10.1.1.2"}, "IPv6": {"fd00:1:1::1", "fd00:1:1::2"}} {
			t.Run(name+" over "+over, func(t *testing.T) {
				t.Parallel()
				restart(t, newRouter, addrs[0], addrs[1])
			})
		}
	}
}

// restart is TestRestart with one router, over a session of these addresses.
func restart(t *testing.T, newRouter func(testing.TB, namespace) router, there, here string) {
	ns := newNamespace(t)
	r := newRouter(t, ns)
	n := newNode(t, ns, 1)
	o := outside(t, ns)
	r.begin(routed{address: here})
	// Each family has its own next hop, whatever the session runs over.
	pods := []bgpconf.Route{via("10.244.1.0/24", "10.1.1.2"), via("fd00:244:1::/64", "fd00:1:1::2")}
	with := func(prefix string) bgpconf.Peer {
		return peer(there, append(slices.Clone(pods), via(prefix, "10.1.1.2"))...)
	}
	n.begin()
	n.set(with("192.0.2.0/32"))
	n.up("router")
	for _, p := range []string{"10.244.1.0/24", "fd00:244:1::/64", "192.0.2.0/32"} {
		testenv.Eventually(t, "the router has "+p, func() (bool, string) { return len(ns.hops(p)) == 1, "" })
	}
	stop4, stop6 := pings(o, "10.244.1.2"), pings(o, "fd00:244:1::2")

	again := func(i int) {
		// One route is another than before: the old one goes when the router has heard all the new ones.
		n.set(with(fmt.Sprintf("192.0.2.%d/32", i)))
		n.up("router")
		ns.routes(fmt.Sprintf("192.0.2.%d/32", i), "10.1.1.2")
		ns.routes(fmt.Sprintf("192.0.2.%d/32", i-1))
		ns.routes("10.244.1.0/24", "10.1.1.2")
		ns.routes("fd00:244:1::/64", "fd00:1:1::2")
	}
	for i, signal := range []unix.Signal{unix.SIGTERM, unix.SIGKILL, unix.SIGKILL} {
		n.end(signal)
		n.begin()
		again(i + 1)
	}

	// Cut from outside, the session comes back by itself.
	was, _ := n.told()
	if _, err := linktest.Try(n.Namespace, "ss", "-K", "dst", there, "dport", "=", "179"); err != nil {
		t.Logf("this kernel cannot cut a connection: %v", err)
	} else {
		testenv.Eventually(t, "the session went and came", func() (bool, string) {
			now, _ := n.told()
			return now.Sessions[0].State == bgp.Established && now.Sessions[0].Since.After(was.Sessions[0].Since), fmt.Sprint(now.Sessions)
		})
		again(4)
	}
	// Other parameters need another session.
	p := with("192.0.2.100/32")
	p.HoldTime = 12 * time.Second
	if done := n.set(p); done.PeersReplaced != 1 {
		t.Errorf("another hold time changes %+v", done)
	}
	n.up("router")
	ns.routes("192.0.2.100/32", "10.1.1.2")
	stop4()
	stop6()

	// Without graceful restart the routes go with the speaker.
	p.RestartTime = 0
	n.set(p)
	n.up("router")
	ns.routes("10.244.1.0/24", "10.1.1.2")
	n.end(unix.SIGTERM)
	ns.routes("10.244.1.0/24")
	ns.routes("fd00:244:1::/64")
}

// TestRouterRestarts has the router die and come back.
func TestRouterRestarts(t *testing.T) {
	for name, newRouter := range routers {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			ns := newNamespace(t)
			r := newRouter(t, ns)
			n := newNode(t, ns, 1)
			n.begin()
			n.set(peer("10.1.1.1", route("10.244.1.0/24")))
			state := func(want, reason string) {
				t.Helper()
				testenv.Eventually(t, "the session is down for "+reason, func() (bool, string) {
					testenv.Must(t, n.in.Encode(bgpconf.Speaker{RouterID: netip.MustParseAddr("10.1.1.2"), Peers: []bgpconf.Peer{peer("10.1.1.1", route("10.244.1.0/24"))}}))
					now, _ := n.told()
					return len(now.Sessions) == 1 && string(now.Sessions[0].State) == want && strings.Contains(now.Sessions[0].Reason, reason), fmt.Sprint(now.Sessions)
				})
			}
			state("Active", "connection refused")
			for _, signal := range []unix.Signal{unix.SIGTERM, unix.SIGKILL} {
				r.begin(routed{address: "10.1.1.2"})
				n.up("router")
				ns.routes("10.244.1.0/24", "10.1.1.2")
				r.end(signal)
				state("Active", "connection refused")
			}
			r.begin(routed{address: "10.1.1.2"})
			n.up("router")
			ns.routes("10.244.1.0/24", "10.1.1.2")

			wrong := peer("10.1.1.1")
			wrong.LocalASN++
			n.set(wrong)
			testenv.Eventually(t, "the reason is told", func() (bool, string) {
				n.set(wrong)
				now, _ := n.told()
				return now.Sessions[0].State != bgp.Established && strings.Contains(now.Sessions[0].Reason, "ASN"), fmt.Sprint(now.Sessions)
			})
		})
	}
}

// TestPassword signs the connection, RFC 2385.
func TestPassword(t *testing.T) {
	for name, newRouter := range routers {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			ns := newNamespace(t)
			r := newRouter(t, ns)
			n := newNode(t, ns, 1)
			r.begin(routed{address: "10.1.1.2", password: "tell-nobody"}, routed{address: "fd00:1:1::2", password: "v6-as-well"})
			n.begin()
			four, six := peer("10.1.1.1", route("10.244.1.0/24")), peer("fd00:1:1::1", route("fd00:244:1::/64"))
			six.Name = "six"
			four.Password, six.Password = "wrong", "v6-as-well"
			n.set(four, six)
			n.up("six")
			ns.routes("fd00:244:1::/64", "fd00:1:1::2")
			testenv.Eventually(t, "the reason is told", func() (bool, string) {
				n.set(four, six)
				now, _ := n.told()
				return strings.Contains(now.Sessions[0].Reason, "timeout"), fmt.Sprint(now.Sessions)
			})
			ns.routes("10.244.1.0/24")
			four.Password = "tell-nobody"
			if done := n.set(four, six); done != (bgp.Changes{PeersReplaced: 1}) {
				t.Errorf("another password changes %+v", done)
			}
			n.up("router")
			ns.routes("10.244.1.0/24", "10.1.1.2")
			if log := n.log.String(); strings.Contains(log, "tell-nobody") || strings.Contains(log, "v6-as-well") {
				t.Errorf("a password is in the log:\n%s", log)
			}
		})
	}
}

// TestTTLSecurity has both sides send with a TTL of 255, and drop what a router says that does not.
func TestTTLSecurity(t *testing.T) {
	for name, newRouter := range routers {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			ns := newNamespace(t)
			r := newRouter(t, ns)
			n := newNode(t, ns, 1)
			r.begin(routed{address: "10.1.1.2", ttlSecurity: true}, routed{address: "fd00:1:1::2", ttlSecurity: true})
			n.begin()
			four, six := peer("10.1.1.1", route("10.244.1.0/24")), peer("fd00:1:1::1", route("fd00:244:1::/64"))
			six.Name = "six"
			four.TTLSecurity, six.TTLSecurity = true, true
			n.set(four, six)
			n.up("router")
			n.up("six")
			ns.routes("10.244.1.0/24", "10.1.1.2")
			ns.routes("fd00:244:1::/64", "fd00:1:1::2")
			four.TTLSecurity = false
			if done := n.set(four, six); done != (bgp.Changes{PeersReplaced: 1}) {
				t.Errorf("a session without it is %+v", done)
			}
			n.set()
			r.end(unix.SIGTERM)

			r.begin(routed{address: "10.1.1.2"})
			four.TTLSecurity = true
			n.set(four)
			testenv.Eventually(t, "packets with a lower TTL are dropped", func() (bool, string) {
				counted := n.run("nstat -asz TcpExtTCPMinTTLDrop")
				for line := range strings.Lines(counted) {
					if w := strings.Fields(line); len(w) > 1 && w[0] == "TcpExtTCPMinTTLDrop" {
						return w[1] != "0", counted
					}
				}
				return false, counted
			})
			if now, _ := n.told(); now.Sessions[0].State == bgp.Established {
				t.Error("a session is up with a router that sends with a TTL of 1")
			}
			four.TTLSecurity = false
			n.set(four)
			n.up("router")
		})
	}
}

// TestLinkLocal speaks over a link without any addresses but link-local ones. IPv4 goes over it, too, to a router that takes
// IPv6 next hops for it, and only to such a one. A restart loses nothing.
func TestLinkLocal(t *testing.T) {
	for name, newRouter := range routers {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			ns := newNamespace(t)
			r := newRouter(t, ns)
			n := newNode(t, ns, 1)
			for _, end := range []namespace{ns, n.namespace} {
				end.run("sysctl -qw net.ipv6.conf.default.addr_gen_mode=1") // no other link-local addresses than these
			}
			wire(t, ns, "bare1", []string{"fe80::1/64"}, n.namespace, "bare", []string{"fe80::2/64"})
			o := outside(t, ns)
			p := peer("fe80::1%bare", route("10.244.1.0/24"), route("fd00:244:1::/64"))
			n.begin()

			plain := routed{address: "fe80::2", device: "bare1"}
			r.begin(plain)
			n.set(p)
			n.up("router")
			ns.routes("fd00:244:1::/64", "fe80::2")
			testenv.Eventually(t, "it is told why there is no IPv4", func() (bool, string) {
				n.set(p)
				now, _ := n.told()
				s := now.Sessions[0]
				return s.Routes == 1 && strings.Contains(s.Reason, "RFC 8950"), fmt.Sprint(now.Sessions)
			})
			ns.routes("10.244.1.0/24")
			r.end(unix.SIGTERM)

			plain.extended = true
			r.begin(plain)
			ns.routes("fd00:244:1::/64", "fe80::2")
			ns.routes("10.244.1.0/24", "fe80::2")
			n.set(p)
			if now, _ := n.told(); now.Sessions[0].Routes != 2 || now.Sessions[0].Reason != "" {
				t.Errorf("with IPv4 the session is %+v", now.Sessions[0])
			}
			losesNothing(ns, o, n, p)
			ns.routes("10.244.1.0/24", "fe80::2")
			n.set()
			ns.routes("10.244.1.0/24")
		})
	}
}

// losesNothing ends and begins a node's speaker under pings from outside. Each new one has an address more for the router to hear of,
// and not that of the one before.
func losesNothing(router, outside namespace, n *node, p bgpconf.Peer) {
	n.t.Helper()
	stop4, stop6 := pings(outside, "10.244.1.2"), pings(outside, "fd00:244:1::2")
	for i, signal := range []unix.Signal{unix.SIGTERM, unix.SIGKILL} {
		n.end(signal)
		n.begin()
		fresh := p
		fresh.Routes = append(slices.Clone(p.Routes), route(fmt.Sprintf("192.0.2.%d/32", i+1)))
		n.set(fresh)
		n.up("router")
		router.routes(fmt.Sprintf("192.0.2.%d/32", i+1), "fe80::2")
		router.routes(fmt.Sprintf("192.0.2.%d/32", i))
	}
	stop4()
	stop6()
}

// TestChangeWhileComingUp changes what is announced all the time that sessions come up: what was said last is what the router
// has, although GoBGP forgets what it hears in the moment in which a session is established.
func TestChangeWhileComingUp(t *testing.T) {
	for name, newRouter := range routers {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			ns := newNamespace(t)
			r, n := newRouter(t, ns), newNode(t, ns, 1)
			r.begin(routed{address: "10.1.1.2"})
			p := peer("10.1.1.1", route("192.0.2.0/32"))
			n.begin()
			for round := range 6 {
				for i := 0; ; i++ {
					p.Routes = []bgpconf.Route{route(fmt.Sprintf("192.0.2.%d/32", i%8))}
					n.set(p)
					if told, _ := n.told(); told.Sessions[0].State == bgp.Established {
						break
					}
				}
				last := p.Routes[0].Prefix.String()
				for i := range 8 {
					if other := fmt.Sprintf("192.0.2.%d/32", i); other != last {
						ns.routes(other)
					}
				}
				ns.routes(last, "10.1.1.2")
				// The next is a session with other parameters: what is told first is deferred for routers that keep routes alone.
				if p.RestartTime = 0; round%2 == 1 {
					p.RestartTime = 120 * time.Second
				}
			}
		})
	}
}

// TestTwoNodes has two nodes announce one address: the router spreads over both.
func TestTwoNodes(t *testing.T) {
	for name, newRouter := range routers {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			ns := newNamespace(t)
			r := newRouter(t, ns)
			one, two := newNode(t, ns, 1), newNode(t, ns, 2)
			r.begin(routed{address: "10.1.1.2"}, routed{address: "10.1.2.2"})
			for i, n := range []*node{one, two} {
				n.begin()
				n.set(peer(fmt.Sprintf("10.1.%d.1", i+1), route("192.0.2.80/32"), via("2001:db8::80/128", fmt.Sprintf("fd00:1:%d::2", i+1))))
			}
			ns.routes("192.0.2.80/32", "10.1.1.2", "10.1.2.2")
			ns.routes("2001:db8::80/128", "fd00:1:1::2", "fd00:1:2::2")
			one.set(peer("10.1.1.1"))
			ns.routes("192.0.2.80/32", "10.1.2.2")
			ns.routes("2001:db8::80/128", "fd00:1:2::2")
		})
	}
}

// TestAttributes: routes have their own communities and preference, and another one is told to the router at once, in the
// session that there is.
func TestAttributes(t *testing.T) {
	ns := newNamespace(t)
	r := newBird(t, ns).(*bird)
	n := newNode(t, ns, 1)
	r.load(fmt.Sprintf("router id 192.0.2.1; protocol device {}\nprotocol bgp { local as %[1]d; neighbor 10.1.1.2 as %[1]d; passive; ipv4 { import all; export none; }; ipv6 { import all; export none; }; }\n", nodeASN))
	has := func(prefix string, words ...string) {
		t.Helper()
		testenv.Eventually(t, fmt.Sprintf("%s has %q", prefix, words), func() (bool, string) {
			out, err := linktest.Try(ns.Namespace, "birdc", "-s", filepath.Join(r.dir, "bird.ctl"), "show", "route", "all", prefix)
			for _, w := range words {
				if !strings.Contains(out, w) {
					return false, out
				}
			}
			return err == nil, out
		})
	}
	pref := uint32(200)
	p := peer("10.1.1.1", route("192.0.2.1/32"), route("192.0.2.2/32"), via("2001:db8::2/128", "fd00:1:1::2"))
	p.ASN = nodeASN
	p.Routes[1].LocalPref, p.Routes[1].Communities = &pref, []bgpconf.Community{{Values: [3]uint32{64512, 7}}}
	p.Routes[2].LocalPref, p.Routes[2].Communities = new(uint32), []bgpconf.Community{{Large: true, Values: [3]uint32{64512, 1, 7}}}
	n.begin()
	n.set(p)
	n.up("router")
	has("192.0.2.1/32", "BGP.local_pref: 100")
	has("192.0.2.2/32", "BGP.local_pref: 200", "BGP.community: (64512,7)")
	has("2001:db8::2/128", "BGP.local_pref: 0", "BGP.large_community: (64512, 1, 7)", "BGP.next_hop: fd00:1:1::2")
	p.Routes[0].LocalPref, p.Routes[0].Communities = &pref, []bgpconf.Community{{Values: [3]uint32{64512, 9}}}
	p.Routes[1].Addrs = []netip.Addr{p.Routes[1].Prefix.Addr()} // nothing that the router is told
	if done := n.set(p); done != (bgp.Changes{RoutesReplaced: 1}) {
		t.Errorf("another preference and community are %+v", done)
	}
	has("192.0.2.1/32", "BGP.local_pref: 200", "BGP.community: (64512,9)")
}

// TestReceived: what a router announces is not used, and too much of it ends the session, so that it does not fill the memory.
func TestReceived(t *testing.T) {
	ns := newNamespace(t)
	r := newBird(t, ns).(*bird)
	n := newNode(t, ns, 1)
	announces := func(routes int) {
		t.Helper()
		var c strings.Builder
		fmt.Fprintf(&c, "router id 192.0.2.1; protocol device {}\nprotocol kernel { ipv4 { import none; export where source = RTS_BGP; }; }\nprotocol static { ipv4;\n")
		for i := range routes {
			fmt.Fprintf(&c, "route 172.%d.%d.%d/32 blackhole;\n", 16+i>>16, i>>8&255, i&255)
		}
		fmt.Fprintf(&c, "}\nprotocol bgp { local as %d; neighbor 10.1.1.2 as %d; passive; ipv4 { import all; export where source = RTS_STATIC; }; }\n", routerASN, nodeASN)
		r.load(c.String())
	}
	announces(1000)
	n.begin()
	p := peer("10.1.1.1", route("10.244.1.0/24"))
	n.set(p)
	n.up("router")
	ns.routes("10.244.1.0/24", "10.1.1.2")
	if table := n.run("ip -4 route"); strings.Contains(table, "172.16.") {
		t.Errorf("what the router announces is in the node's table:\n%s", table)
	}
	r.end(unix.SIGTERM)
	announces(50_001)
	testenv.Eventually(t, "the session is ended, and it is told why", func() (bool, string) {
		n.set(p)
		now, _ := n.told()
		return now.Sessions[0].State != bgp.Established && strings.Contains(now.Sessions[0].Reason, "announces too many routes"), fmt.Sprint(now.Sessions)
	})
}
