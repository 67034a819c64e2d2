package policies

import (
	"context"
	"fmt"
	"log/slog"
	"net/netip"
	"strings"
	"testing"
	"time"

	dto "github.com/prometheus/client_model/go"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes/fake"

	cnp "github.com/fathom-network/fathom/api/clusternetworkpolicy/v1beta1"
	"github.com/fathom-network/fathom/internal/facts/policy"
	"github.com/fathom-network/fathom/internal/facts/policyfacts"
	"github.com/fathom-network/fathom/internal/kernel/nflog"
	"github.com/fathom-network/fathom/internal/kernel/ruleset"
	"github.com/fathom-network/fathom/internal/watch/kube"
)

// recorder is a Keeper that knows pods and policies, and follows nothing.
func recorder(t *testing.T) (*Keeper, *fake.Clientset) {
	t.Helper()
	api := fake.NewClientset()
	client := &kube.Client{Interface: api}
	k := New(Options{Node: "here", Client: client, Log: slog.New(slog.DiscardHandler), Changed: func() {}, Events: client.NewRecorder(t.Context(), kube.Reporter{Component: "fathom-agent", Instance: "here"})})
	k.setPod(pod("web", "here", "10.244.1.2", map[string]string{"app": "web"}))
	k.setPod(pod("db", "here", "10.244.1.3", map[string]string{"app": "db"}))
	k.setPod(pod("far", "there", "10.244.2.2", nil))
	k.model.SetNamespace("x", nil)
	in := denyAll("db", map[string]string{"app": "db"})
	k.model.SetPolicy(policyfacts.NetworkPolicy(in))
	watched := denyAll("watch", map[string]string{"app": "web"})
	watched.Labels = map[string]string{policy.Audit: "true"}
	k.model.SetPolicy(policyfacts.NetworkPolicy(watched))
	k.facts = k.model.Facts()
	k.nodeAddrs, k.nodeLooked = map[netip.Addr]bool{netip.MustParseAddr("192.0.2.10"): true}, time.Now().Add(time.Hour)
	return k, api
}

func logged(kind, from, to string, protocol uint8, source, port uint16) nflog.Packet {
	return nflog.Packet{Prefix: "fathom-policy " + kind, From: netip.MustParseAddr(from), To: netip.MustParseAddr(to), Protocol: protocol, SourcePort: source, Port: port}
}

func TestRecords(t *testing.T) {
	const web, db, far = "10.244.1.2", "10.244.1.3", "10.244.2.2"
	for name, c := range map[string]struct {
		packet nflog.Packet
		want   string // empty if it is not kept
	}{
		"denied":                   {logged("denied ingress", web, db, 6, 4711, 80), "dropped ingress Pod x/web (10.244.1.2) > Pod x/db (10.244.1.3) TCP 4711 80: no rule of NetworkPolicy x/db allows it"},
		"from outside, no port":    {logged("denied ingress", "203.0.113.9", db, 1, 0, 0), "dropped ingress 203.0.113.9 > Pod x/db (10.244.1.3) ICMP 0 0: no rule of NetworkPolicy x/db allows it"},
		"from the node":            {logged("denied ingress", "192.0.2.10", db, 17, 9, 53), "dropped ingress Node here (192.0.2.10) > Pod x/db (10.244.1.3) UDP 9 53: no rule of NetworkPolicy x/db allows it"},
		"audited":                  {logged("audited ingress", far, web, 6, 4711, 80), "audited ingress Pod x/far (10.244.2.2) > Pod x/web (10.244.1.2) TCP 4711 80: no rule of NetworkPolicy x/watch allows it"},
		"audited, and no more":     {logged("audited ingress", web, db, 6, 4711, 80), ""},
		"closed":                   {logged("closed egress", "10.244.1.99", db, 6, 1, 80), "dropped egress 10.244.1.99 > Pod x/db (10.244.1.3) TCP 1 80: the policies of its pod are not known yet"},
		"ended, from the client":   {logged("ended", web, db, 6, 4711, 80), "dropped ingress Pod x/web (10.244.1.2) > Pod x/db (10.244.1.3) TCP 4711 80: of a connection that was there before: no rule of NetworkPolicy x/db allows it"},
		"ended, from the server":   {logged("ended", db, web, 6, 80, 4711), "dropped ingress Pod x/web (10.244.1.2) > Pod x/db (10.244.1.3) TCP 4711 80: of a connection that was there before: no rule of NetworkPolicy x/db allows it"},
		"ended, and allowed again": {logged("ended", web, far, 6, 80, 4711), ""},
		"denied, and allowed now":  {logged("denied ingress", web, far, 6, 4711, 80), "dropped ingress Pod x/web (10.244.1.2) > Pod x/far (10.244.2.2) TCP 4711 80: policies that have changed since"},
		"accepted by nobody":       {logged("accepted ingress", db, web, 6, 4711, 80), ""},
		"of another's rule":        {nflog.Packet{Prefix: "denied", From: netip.MustParseAddr(web), To: netip.MustParseAddr(db)}, ""},
	} {
		k, _ := recorder(t)
		k.record(c.packet)
		got := ""
		for _, r := range k.Records(0).Records {
			got = fmt.Sprintf("%s %s %s > %s %s %d %d: %s", r.Verdict, r.Direction, r.From, r.To, r.Protocol, r.SourcePort, r.Port, r.Why)
		}
		if got != c.want {
			t.Errorf("%s:\n%s, want\n%s", name, got, c.want)
		}
	}
}

// TestRecordsOfTiers: what a rule of a ClusterNetworkPolicy denies or accepts has its name, and is counted once where it passes two chains.
func TestRecordsOfTiers(t *testing.T) {
	k, _ := recorder(t)
	o := &cnp.ClusterNetworkPolicy{ObjectMeta: metav1.ObjectMeta{Name: "tenants"}}
	o.Spec.Tier, o.Spec.Subject.Namespaces = cnp.AdminTier, &metav1.LabelSelector{}
	o.Spec.Egress = []cnp.EgressRule{
		{Name: "dns", Action: cnp.Accept, To: []cnp.EgressPeer{{Networks: []string{"192.0.2.10/32"}}}, Protocols: []cnp.Protocol{{UDP: &cnp.PortMatch{}}}},
		{Name: "rest", Action: cnp.Deny, To: []cnp.EgressPeer{{Networks: []string{"192.0.2.0/24"}}}},
	}
	k.model.SetPolicy(policyfacts.ClusterNetworkPolicy(o))
	k.facts = k.model.Facts()
	k.record(logged("denied egress", "10.244.1.2", "192.0.2.10", 6, 1, 22)) // its own node
	for range 2 {
		k.record(logged("accepted egress", "10.244.1.2", "192.0.2.10", 17, 2, 53))
	}
	all := k.Records(0).Records
	if len(all) != 2 || all[0].Rule != "ClusterNetworkPolicy tenants spec.egress[1].to[0].networks[0] (rest)" || all[1].Why != "ClusterNetworkPolicy tenants spec.egress[0].to[0].networks[0] (dns) allows it" || all[1].Count != 1 {
		t.Errorf("%+v", all)
	}
}

// TestRecordsAreCounted: what repeats is one record, one event and its count; a flood keeps nobody else from being told.
func TestRecordsAreCounted(t *testing.T) {
	k, api := recorder(t)
	for i := range 5 {
		k.record(logged("denied ingress", "10.244.1.2", "10.244.1.3", 6, uint16(5000+i), 80))
	}
	first := k.Records(0)
	if len(first.Records) != 1 || first.Records[0].Count != 5 || first.Records[0].SourcePort != 5004 || first.Last != 5 {
		t.Errorf("%+v", first)
	}
	var counted dto.Metric
	if err := k.metrics.recorded.WithLabelValues("x/db", "ingress", "dropped").Write(&counted); err != nil || counted.GetCounter().GetValue() != 5 {
		t.Errorf("the metric of the policy has %v, %v", &counted, err)
	}
	k.record(logged("denied ingress", "203.0.113.9", "10.244.1.3", 6, 1, 81))
	if news := k.Records(first.Last).Records; len(news) != 1 || news[0].Port != 81 {
		t.Errorf("after the first: %+v", news)
	}
	if all := k.Records(1 << 40).Records; len(all) != 2 {
		t.Errorf("who asked another agent before gets %+v", all)
	}
	for i := range 3 * recordsKept {
		k.record(logged("denied ingress", "203.0.113.9", "10.244.1.3", 17, 1, uint16(1000+i)))
	}
	k.record(logged("audited ingress", "10.244.2.2", "10.244.1.2", 6, 1, 8080))
	if n := len(k.Records(0).Records); n > recordsKept || n < recordsKept/2 {
		t.Errorf("%d records are kept", n)
	}
	told := map[string]int{}
	deadline := time.Now().Add(20 * time.Second)
	for told["web"] == 0 && time.Now().Before(deadline) {
		clear(told)
		list, err := api.CoreV1().Events("x").List(context.Background(), metav1.ListOptions{})
		if err != nil {
			t.Fatal(err)
		}
		for _, e := range list.Items {
			told[e.InvolvedObject.Name]++
			if e.InvolvedObject.Name == "web" && (e.Reason != "PolicyAudit" || e.Type != "Normal" || e.InvolvedObject.UID != "uid-1" ||
				e.Message != "ingress from Pod x/far (10.244.2.2), port 8080/TCP, would be dropped: no rule of NetworkPolicy x/watch allows it") {
				t.Errorf("%+v", e)
			}
			if e.InvolvedObject.Name == "db" && (e.Reason != "PolicyDropped" || !strings.Contains(e.Message, "is dropped: no rule of NetworkPolicy x/db allows it")) {
				t.Errorf("%+v", e)
			}
		}
		time.Sleep(10 * time.Millisecond)
	}
	if told["db"] == 0 || told["db"] > eventsOfPod || told["web"] != 1 {
		t.Errorf("events: %v", told)
	}
}

// TestRecordsEvents: there is another event of the same after a while, which is the same event again.
func TestRecordsEvents(t *testing.T) {
	k, _ := recorder(t)
	p := logged("denied ingress", "10.244.1.2", "10.244.1.3", 6, 1, 80)
	denied, _ := ruleset.ParseRecord(p.Prefix)
	is, ok := k.account(denied, p)
	if !ok {
		t.Fatal("it is not accounted for")
	}
	now := time.Now()
	kept, _ := k.records.keep(is, now)
	for i, c := range []struct {
		after time.Duration
		want  bool
	}{{0, true}, {time.Second, false}, {eventsEach - time.Second, false}, {eventsEach, true}, {eventsEach + time.Second, false}} {
		if got := k.records.tells(kept, is, now.Add(c.after)); got != c.want {
			t.Errorf("%d: after %s there is an event: %v", i, c.after, got)
		}
	}
	if a, b := eventOf(is), eventOf(is); a != b {
		t.Errorf("%v and %v", a, b)
	}
}
