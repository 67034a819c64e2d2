package proxy

import (
	"encoding/json"
	"fmt"
	"net"
	"net/http"
	"reflect"
	"testing"
	"time"

	"github.com/fathom-network/fathom/internal/facts/netconf"
	"github.com/fathom-network/fathom/internal/testenv"
)

// TestHealth asks as load balancers do.
func TestHealth(t *testing.T) {
	paths, ok := inside(t)
	if !ok {
		return
	}
	get := func(port int) (status, local int) {
		t.Helper()
		client := &http.Client{Transport: &http.Transport{DisableKeepAlives: true}}
		resp, err := client.Get(fmt.Sprintf("http://127.0.0.1:%d/healthz", port))
		if err != nil {
			return 0, 0
		}
		defer resp.Body.Close()
		var body struct{ LocalEndpoints int }
		testenv.Must(t, json.NewDecoder(resp.Body).Decode(&body))
		return resp.StatusCode, body.LocalEndpoints
	}
	is := func(when string, port, status, local int) {
		t.Helper()
		if s, l := get(port); s != status || l != local {
			t.Errorf("%s: port %d answers %d with %d endpoints, want %d with %d", when, port, s, l, status, local)
		}
	}
	taken, err := net.Listen("tcp", ":32001") // somebody else's
	testenv.Must(t, err)
	n := newNode(t, paths, netconf.ProxyNFTables)
	is("before it begins", nodeHealthPort, 0, 0)
	proxy, err := net.Listen("tcp", fmt.Sprint(":", nodeHealthPort)) // kube-proxy's
	testenv.Must(t, err)
	n.set(web("web", vip, localOnly(32000)), endpoints("web", "10.0.0.1", "10.0.0.2"), web("late", "172.16.0.2", localOnly(32001)))
	n.follows(t)
	is("two endpoints", 32000, http.StatusOK, 2)
	proxy.Close()
	n.set(web("more", "172.16.0.3"))
	n.follows(t)
	is("the node, before it is tried again", nodeHealthPort, 0, 0)
	n.step(t.Context(), true)
	is("the node", nodeHealthPort, http.StatusOK, 0)
	elsewhere := endpoints("web", "10.0.0.1", "10.0.0.2")
	for i := range elsewhere.Endpoints {
		elsewhere.Endpoints[i].NodeName = new("node-2")
	}
	n.set(elsewhere)
	n.follows(t)
	is("none here", 32000, http.StatusServiceUnavailable, 0)
	taken.Close()
	n.set(web("web", vip, localOnly(32002)))
	n.follows(t)
	is("another port", 32000, 0, 0)
	is("somebody else's port, before it is tried again", 32001, 0, 0)
	n.step(t.Context(), true)
	is("another port", 32002, http.StatusServiceUnavailable, 0)
	is("the port is free now", 32001, http.StatusServiceUnavailable, 0)
	n.delete(web("web", ""))
	n.follows(t)
	is("no such Service", 32002, 0, 0)
	n.mode(netconf.ProxyOff)
	n.step(t.Context(), false)
	is("off", nodeHealthPort, 0, 0)
	is("off", 32001, 0, 0)
}

// TestHealthOfNode asks about the node itself, as load balancers do for Services without a port of their own: while the node
// is drained to be deleted, and while the kernel does not get what has changed.
func TestHealthOfNode(t *testing.T) {
	paths, ok := inside(t)
	if !ok {
		return
	}
	n := newNode(t, paths, netconf.ProxyNFTables)
	now := time.Now()
	n.health.now = func() time.Time { return now }
	is := func(when string, port int, path string, status int, want map[string]any) {
		t.Helper()
		client := &http.Client{Transport: &http.Transport{DisableKeepAlives: true}}
		resp, err := client.Get(fmt.Sprintf("http://127.0.0.1:%d%s", port, path))
		testenv.Must(t, err)
		defer resp.Body.Close()
		var got map[string]any
		testenv.Must(t, json.NewDecoder(resp.Body).Decode(&got))
		if resp.StatusCode != status {
			t.Errorf("%s: port %d answers %s with %d, want %d", when, port, path, resp.StatusCode, status)
		}
		for key, value := range want {
			if !reflect.DeepEqual(got[key], value) {
				t.Errorf("%s: port %d says %s: %v at %s, want %v", when, port, key, got[key], path, value)
			}
		}
	}
	at := func(t time.Time) any { return t.UTC().Format(time.RFC3339Nano) }
	began := now
	n.set(web("web", vip, localOnly(32000)), endpoints("web", "10.0.0.1"))
	n.follows(t)
	is("there", nodeHealthPort, "/healthz", http.StatusOK, map[string]any{"nodeEligible": true, "lastUpdated": at(began), "currentTime": at(began)})
	is("there", nodeHealthPort, "/livez", http.StatusOK, map[string]any{"nodeEligible": nil, "lastUpdated": at(began)})
	n.SetLeaves(true)
	is("leaves", nodeHealthPort, "/healthz", http.StatusServiceUnavailable, map[string]any{"nodeEligible": false})
	is("leaves", nodeHealthPort, "/livez", http.StatusOK, nil)
	is("leaves", 32000, "/healthz", http.StatusOK, map[string]any{"serviceProxyHealthy": true}) // as kube-proxy's
	n.SetLeaves(false)
	is("stays after all", nodeHealthPort, "/healthz", http.StatusOK, map[string]any{"nodeEligible": true})

	now = began.Add(healthPatience - time.Second)
	is("nearly too old", nodeHealthPort, "/healthz", http.StatusOK, nil)
	now = began.Add(healthPatience)
	is("too old", nodeHealthPort, "/healthz", http.StatusServiceUnavailable, map[string]any{"nodeEligible": true, "lastUpdated": at(began), "currentTime": at(now)})
	is("too old", nodeHealthPort, "/livez", http.StatusServiceUnavailable, nil)
	is("too old", 32000, "/healthz", http.StatusServiceUnavailable, map[string]any{"serviceProxyHealthy": false, "localEndpoints": 1.0})
	n.step(t.Context(), true)
	is("a pass later", nodeHealthPort, "/healthz", http.StatusOK, map[string]any{"lastUpdated": at(now)})
	is("a pass later", nodeHealthPort, "/livez", http.StatusOK, nil)
	is("a pass later", 32000, "/healthz", http.StatusOK, nil)
}
