package podroute_test

import (
	"context"
	"testing"
	"time"

	"github.com/fathom-network/fathom/internal/facts/podnet"
	"github.com/fathom-network/fathom/internal/testenv"
	"github.com/fathom-network/fathom/internal/testenv/linktest"
)

func TestWatchChanges(t *testing.T) {
	n := loneNode(t)
	plan := planOf(t, n, manyNodes(5), podnet.Config{})
	set(t, n, plan)
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	changes, err := n.WatchChanges(ctx)
	testenv.Must(t, err)
	quiet := func() { // until nothing comes for a while
		t.Helper()
		for {
			select {
			case <-changes:
			case <-time.After(100 * time.Millisecond):
				return
			}
		}
	}
	for name, change := range map[string]func(){
		"route":   func() { linktest.Run(t, n, "ip", "route", "del", plan.Routes[2].To.String()) },
		"route 6": func() { linktest.Run(t, n, "ip", "-6", "route", "del", plan.Routes[len(plan.Routes)-1].To.String()) },
		"device": func() {
			linktest.Run(t, n, "ip", "link", "set", "eth0", "down")
			linktest.Run(t, n, "ip", "link", "set", "eth0", "up")
		},
		"address": func() { testenv.Must(t, n.SetAddrs("eth0", prefixes("10.200.0.2/16", "fd00:200::2/64"))) },
	} {
		t.Run(name, func(t *testing.T) {
			testenv.Must(t, n.SetAddrs("eth0", prefixes("10.200.0.2/16", "fd00:200::2/64", "192.0.2.1/24")))
			set(t, n, plan)
			quiet()
			change()
			select {
			case <-changes:
			case <-time.After(time.Minute):
				t.Fatal("no word of it")
			}
			testenv.Must(t, n.SetAddrs("eth0", prefixes("10.200.0.2/16", "fd00:200::2/64"))) // IPv6 addresses go with the device
			set(t, n, plan)
			holds(t, n, plan)
		})
	}
	cancel()
	for open := true; open; { // it ends with the context
		_, open = <-changes
	}
}
