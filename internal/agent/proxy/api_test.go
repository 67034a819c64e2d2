package proxy

import (
	"fmt"
	"io"
	"log/slog"
	"net/netip"
	"os/exec"
	"slices"
	"strings"
	"testing"
	"time"

	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/fathom-network/fathom/internal/facts/answer"
	"github.com/fathom-network/fathom/internal/facts/netconf"
	"github.com/fathom-network/fathom/internal/facts/service"
	"github.com/fathom-network/fathom/internal/facts/svcfacts"
	"github.com/fathom-network/fathom/internal/kernel/ruleset"
	"github.com/fathom-network/fathom/internal/testenv"
	"github.com/fathom-network/fathom/internal/watch/kube"
)

// TestAPI has the proxy's loops run, and follow a real API server.
func TestAPI(t *testing.T) {
	paths, ok := inside(t)
	if !ok {
		return
	}
	// The API server wants to know by which device it is met.
	for _, c := range []string{"link add eth0 type veth peer name peer0", "link set peer0 up", "link set eth0 up", "address add 192.0.2.1/24 dev eth0", "route add default dev eth0"} {
		if out, err := exec.Command("ip", strings.Fields(c)...).CombinedOutput(); err != nil {
			t.Fatalf("ip %s: %v: %s", c, err, out)
		}
	}
	client, err := kube.Connect(testenv.APIServer(t))
	testenv.Must(t, err)
	serve(t, "10.0.0.1", "10.0.0.2")
	ctx := t.Context()
	p := New(Options{Client: client, Log: slog.New(slog.NewTextHandler(io.Discard, nil)), Paths: paths, Resync: 100 * time.Millisecond,
		Changed: func() {}})
	stop := run(t, p)
	defer func() {
		stop()
		testenv.Must(t, Remove(paths, nil))
	}()
	config := answer.ProxyConfig{Mode: netconf.ProxyAuto, Node: self, OwnPods: []netip.Prefix{netip.MustParsePrefix("10.0.0.0/8")}}
	p.Set(config)
	agrees := func(what string) {
		t.Helper()
		var how string
		for deadline := time.Now().Add(time.Minute); time.Now().Before(deadline); time.Sleep(10 * time.Millisecond) {
			services, err := client.CoreV1().Services("").List(ctx, metav1.ListOptions{})
			testenv.Must(t, err)
			all, err := client.DiscoveryV1().EndpointSlices("").List(ctx, metav1.ListOptions{})
			testenv.Must(t, err)
			m := service.NewModel(self)
			for i := range services.Items {
				m.SetService(svcfacts.Service(&services.Items[i]))
			}
			for i := range all.Items {
				m.SetSlice(svcfacts.Slice(&all.Items[i]))
			}
			plan := service.Plan{Frontends: m.Frontends()}
			want, err := service.ByPacketOf(plan)
			testenv.Must(t, err)
			s, err := p.State(ctx)
			testenv.Must(t, err)
			if s.Ready && slices.EqualFunc(s.NFTables.Frontends, want.Frontends, service.Frontend.Equal) &&
				(s.ConnectMissing != "" || slices.EqualFunc(s.Connect, service.BalancedOf(plan), service.Balanced.Equal)) {
				return
			}
			how = fmt.Sprintf("%+v\nwant %+v", s, want)
		}
		t.Fatalf("%s: not so after a minute: %s", what, how)
	}
	agrees("at first")
	services, all := client.CoreV1().Services("default"), client.DiscoveryV1().EndpointSlices("default")
	s, err := services.Create(ctx, web("web", ""), metav1.CreateOptions{})
	testenv.Must(t, err)
	es, err := all.Create(ctx, endpoints("web", "10.0.0.1"), metav1.CreateOptions{})
	testenv.Must(t, err)
	agrees("a Service")
	if who := ask(t, dial(t, "tcp", netip.AddrPortFrom(netip.MustParseAddr(s.Spec.ClusterIP), 80).String())); who != "10.0.0.1" {
		t.Errorf("%s answers", who)
	}
	kept := dial(t, "tcp", s.Spec.ClusterIP+":80")
	ask(t, kept)
	for what, addrs := range [][]string{{"10.0.0.2", "-10.0.0.1"}, {"10.0.0.2"}} {
		es.Endpoints = endpoints("web", addrs...).Endpoints
		es, err = all.Update(ctx, es, metav1.UpdateOptions{})
		testenv.Must(t, err)
		agrees([]string{"its endpoint terminates", "its endpoint is gone"}[what])
	}
	if state, err := p.State(ctx); err != nil || state.ConnectMissing == "" {
		for deadline := time.Now().Add(time.Minute); ; time.Sleep(10 * time.Millisecond) {
			if _, err := try(kept); err != nil {
				break // its endpoint is gone
			}
			if time.Now().After(deadline) {
				t.Fatal("a socket of an endpoint that is gone lives on")
			}
		}
	}
	for i := range 20 {
		name := fmt.Sprintf("web-%d", i)
		_, err := services.Create(ctx, web(name, ""), metav1.CreateOptions{})
		testenv.Must(t, err)
		_, err = all.Create(ctx, endpoints(name, "10.0.0.1", "10.0.0.2"), metav1.CreateOptions{})
		testenv.Must(t, err)
	}
	agrees("20 Services")
	nft(t, "delete", "table", "inet", ruleset.ServicesTable)
	agrees("the table was deleted")
	testenv.Must(t, all.DeleteCollection(ctx, metav1.DeleteOptions{}, metav1.ListOptions{LabelSelector: discoveryv1.LabelServiceName}))
	testenv.Must(t, services.Delete(ctx, "web", metav1.DeleteOptions{}))
	agrees("endpoints and a Service are deleted")
}
