package proxy

import (
	"errors"
	"net"
	"net/netip"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/fathom-network/fathom/internal/facts/netconf"
	"github.com/fathom-network/fathom/internal/testenv"
)

// TestFlows has connection tracking remember flows to an endpoint that terminates, and then is gone.
func TestFlows(t *testing.T) {
	paths, ok := inside(t)
	if !ok {
		return
	}
	serve(t, "10.0.0.1", "10.0.0.2", "10.0.0.3")
	n := newNode(t, paths, netconf.ProxyNFTables)
	n.set(web("web", vip), endpoints("web", "10.0.0.1"), web("other", "172.16.0.2"), endpoints("other", "10.0.0.3"))
	n.follows(t)
	flow, other, direct := dial(t, "udp", at), dial(t, "udp", "172.16.0.2:80"), dial(t, "udp", "10.0.0.1:8080")
	expect := func(when, want string, ended float64) {
		t.Helper()
		n.follows(t)
		n.sweep(t)
		if who := ask(t, flow); who != want {
			t.Errorf("%s: %s answers, want %s", when, who, want)
		}
		if who := ask(t, other); who != "10.0.0.3" {
			t.Errorf("%s: %s answers for the other Service", when, who)
		}
		if who := ask(t, direct); who != "10.0.0.1" {
			t.Errorf("%s: %s answers who was asked directly", when, who)
		}
		if got := n.counted(t, "fathom_service_flows_ended_total")["entry"]; got != ended {
			t.Errorf("%s: %v entries were ended, want %v", when, got, ended)
		}
	}
	expect("at first", "10.0.0.1", 0)
	n.set(endpoints("web", "10.0.0.2", "-10.0.0.1"))
	expect("its endpoint terminates and serves", "10.0.0.1", 0)
	n.set(endpoints("web", "10.0.0.2"))
	expect("its endpoint is gone", "10.0.0.2", 1)
	s, err := n.State(t.Context())
	testenv.Must(t, err)
	to := netip.MustParseAddrPort("10.0.0.2:8080")
	found := false
	for _, f := range s.Flows {
		found = found || f.Answers == to && f.Translated && f.Number == 1
	}
	if !found {
		t.Errorf("the flow is not told of: %+v", s.Flows)
	}
	// An agent that was away when it happened.
	n.stop()
	n.set(endpoints("web", "10.0.0.3"))
	n.start(t, paths, netconf.ProxyNFTables)
	expect("it went while no proxy ran", "10.0.0.3", 1)
	n.delete(web("other", ""), endpoints("other"))
	n.set(endpoints("web", "10.0.0.3"))
	n.follows(t)
	n.sweep(t)
	if got := n.counted(t, "fathom_service_flows_ended_total")["entry"]; got != 2 {
		t.Errorf("its Service is gone: %v entries were ended, want 2", got)
	}
}

// TestSockets has sockets be connected to an endpoint in a Service's place, and others to the endpoint itself. A resolver's
// goes with an endpoint that serves no more. Of a socket of UDP that a former version translated, and that its program may
// want for longer, nothing is asked but that its endpoint is there.
func TestSockets(t *testing.T) {
	paths, ok := inside(t)
	if !ok {
		return
	}
	serve(t, "10.0.0.1", "10.0.0.2")
	n := newNode(t, paths, netconf.ProxyAuto)
	n.set(web("web", vip, resolves), endpoints("web", "10.0.0.1"))
	if s := n.follows(t); s.ConnectMissing != "" {
		t.Skip(s.ConnectMissing)
	}
	<-n.reaper.kick // the one that comes a second after the start, and is about no endpoint
	for _, c := range []struct {
		what, network string
		dial          func() net.Conn
		notReady      bool // it is ended when its endpoint is not ready
	}{
		{"TCP", "tcp", func() net.Conn { return dial(t, "tcp", at) }, false},
		{"a resolver", "udp", func() net.Conn { return dial(t, "udp", net.JoinHostPort(vip, "53")) }, true},
		{"UDP of a former version", "udp", func() net.Conn { return formerly(t, paths, at, "10.0.0.1:8080") }, false},
	} {
		n.set(endpoints("web", "10.0.0.1"))
		n.follows(t)
		n.sweep(t)
		before := n.counted(t, "fathom_service_flows_ended_total")["socket"]
		translated, direct := c.dial(), dial(t, c.network, "10.0.0.1:8080")
		for _, step := range []struct {
			endpoint string
			is       []string
			ended    bool
		}{
			{"is there", []string{"10.0.0.1"}, false},
			{"terminates", []string{"10.0.0.2", "-10.0.0.1"}, false},
			{"is not ready", []string{"10.0.0.2", "!10.0.0.1"}, c.notReady},
			{"is gone", []string{"10.0.0.2"}, true},
		} {
			select {
			case <-n.reaper.kick:
			default:
			}
			if step.endpoint != "is there" {
				n.set(endpoints("web", step.is...))
			}
			n.follows(t)
			if told := len(n.reaper.kick) > 0; told != (step.endpoint != "is there") { // also when no frontend changes
				t.Errorf("%s: the endpoint %s, and the reaper is told: %v", c.what, step.endpoint, told)
			}
			n.sweep(t)
			if who := ask(t, direct); who != "10.0.0.1" {
				t.Errorf("%s: the endpoint %s: %s answers on a direct connection", c.what, step.endpoint, who)
			}
			who, err := try(translated)
			if !step.ended && (err != nil || who != "10.0.0.1") {
				t.Errorf("%s: the endpoint %s: %s answers, %v", c.what, step.endpoint, who, err)
			}
			// What writes to a UDP socket that was destroyed hears that it is not connected; what reads, as with TCP.
			if step.ended && !errors.Is(err, unix.ECONNABORTED) && !errors.Is(err, unix.EDESTADDRREQ) {
				t.Errorf("%s: the endpoint %s: %s answers, %v, want %v", c.what, step.endpoint, who, err, unix.ECONNABORTED)
			}
		}
		if who := ask(t, dial(t, c.network, at)); who != "10.0.0.2" {
			t.Errorf("%s: %s answers on a new connection", c.what, who)
		}
		if ended := n.counted(t, "fathom_service_flows_ended_total")["socket"] - before; ended != 1 {
			t.Errorf("%s: %v sockets were ended, want 1", c.what, ended)
		}
	}
}

// TestConnectionsOfLivingPods has a Service be led elsewhere in each way, by each mechanism, while its endpoint's pod lives, and
// then has the pod go.
func TestConnectionsOfLivingPods(t *testing.T) {
	paths, ok := inside(t)
	if !ok {
		return
	}
	serve(t, "10.0.0.1", "10.0.0.2")
	for _, mode := range []netconf.ServiceProxy{netconf.ProxyAuto, netconf.ProxyNFTables} {
		n := newNode(t, paths, mode)
		n.set(web("web", vip), endpoints("web", "10.0.0.1", "10.0.0.2"))
		if s := n.follows(t); mode == netconf.ProxyAuto && s.ConnectMissing != "" {
			n.stop()
			continue
		}
		n.set(endpoints("web", "10.0.0.1"))
		n.follows(t)
		c := dial(t, "tcp", at)
		ask(t, c)
		moved := endpoints("web", "10.0.0.1")
		moved.Ports[0].Port = new(int32(8081))
		for _, step := range []struct {
			what string
			do   func()
		}{
			{"another port", func() { n.set(moved) }},
			{"another selector", func() { n.set(endpoints("web", "10.0.0.2")) }},
			{"no endpoints", func() { n.set(endpoints("web")) }},
			{"no Service", func() { n.delete(web("web", ""), endpoints("web")) }},
		} {
			step.do()
			n.follows(t)
			n.sweep(t)
			n.sweep(t)
			if who, err := try(c); who != "10.0.0.1" || err != nil {
				t.Errorf("%s: %s: %q answers on the connection, %v", mode, step.what, who, err)
			}
		}
		n.set(web("web", vip), endpoints("web", "10.0.0.1"))
		n.follows(t)
		c = dial(t, "tcp", at)
		ask(t, c)
		n.set(endpoints("web", "10.0.0.2", "-10.0.0.1"))
		n.follows(t)
		n.sweep(t)
		if who, err := try(c); who != "10.0.0.1" || err != nil {
			t.Errorf("%s: the pod terminates: %q answers on the connection, %v", mode, who, err)
		}
		n.set(endpoints("web", "10.0.0.2"))
		n.follows(t)
		n.sweep(t)
		want := unix.ECONNRESET // by the endpoint that the next packet meets
		if mode == netconf.ProxyAuto {
			want = unix.ECONNABORTED
		}
		if who, err := try(c); !errors.Is(err, want) {
			t.Errorf("%s: the pod is gone: %q answers on the connection, %v, want %v", mode, who, err, want)
		}
		n.delete(web("web", ""), endpoints("web"))
		n.follows(t)
		n.stop()
	}
}

func TestSweepIntervals(t *testing.T) {
	const ms = time.Millisecond
	for _, tc := range []struct{ last, took, seldom, pause time.Duration }{
		{0, ms, sweepAgain, sweepPause},
		{sweepAgain, ms, 2 * sweepAgain, sweepPause},
		{20 * time.Second, ms, sweepSeldom, sweepPause},
		{sweepSeldom, ms, sweepSeldom, sweepPause},
		{0, 13 * ms, 1300 * ms, 260 * ms},
		{0, 250 * ms, 25 * time.Second, sweepDelay},
		{sweepSeldom, 700 * ms, 70 * time.Second, 700 * ms},
	} {
		if a, b := seldom(tc.last, tc.took), pause(tc.took); a != tc.seldom || b != tc.pause {
			t.Errorf("after a sweep of %v, %v after another: the next one after %v, or %v if there is a change; want %v, %v", tc.took, tc.last, a, b, tc.seldom, tc.pause)
		}
	}
}
