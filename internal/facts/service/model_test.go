package service_test

import (
	"fmt"
	"testing"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"

	"github.com/fathom-network/fathom/internal/facts/service"
	"github.com/fathom-network/fathom/internal/facts/svcfacts"
)

func nameOf(name string) service.Name {
	return service.Name{Namespace: "default", Name: name}
}

// told formats changes, one frontend a line.
func told(all []service.Change) []string {
	var list []string
	for _, c := range all {
		for _, f := range c.Old {
			list = append(list, fmt.Sprintf("%s: - %s", c.Service.Name, line(f)))
		}
		for _, f := range c.New {
			list = append(list, fmt.Sprintf("%s: + %s", c.Service.Name, line(f)))
		}
	}
	return list
}

// step is an event for a model, and the changes that follow.
type step struct {
	name string
	do   func(*service.Model)
	want []string
}

func walk(t *testing.T, m *service.Model, steps ...step) {
	t.Helper()
	for _, s := range steps {
		s.do(m)
		sameLines(t, s.name, told(m.Changes()), s.want)
		if again := m.Changes(); again != nil {
			t.Errorf("%s: told twice: %v", s.name, told(again))
		}
	}
}

func set(svc *corev1.Service) func(*service.Model) {
	return func(m *service.Model) { m.SetService(svcfacts.Service(svc)) }
}

func setSlice(es *discoveryv1.EndpointSlice) func(*service.Model) {
	return func(m *service.Model) { m.SetSlice(svcfacts.Slice(es)) }
}

func remove(name string) func(*service.Model) {
	return func(m *service.Model) { m.DeleteService(nameOf(name)) }
}

func removeSlice(name string) func(*service.Model) {
	return func(m *service.Model) { m.DeleteSlice(nameOf(name)) }
}

func TestChanges(t *testing.T) {
	const none, first, two = "10.96.0.1:80/TCP ClusterIP http -> reject", "10.96.0.1:80/TCP ClusterIP http -> 10.244.1.2:8080", "10.96.0.1:80/TCP ClusterIP http " + both
	walk(t, newModel(nodeA),
		step{"nothing", func(*service.Model) {}, nil},
		step{"a slice before its Service", setSlice(slice("s", "http:8080", "10.244.1.2 on=a")), nil},
		step{"the Service", set(web()), []string{"web: + " + first}},
		step{"the Service as it was", set(web(label("new"))), nil},
		step{"an endpoint more", setSlice(slice("s", "http:8080", "10.244.1.2 on=a", "10.244.2.2 on=b")), []string{"web: - " + first, "web: + " + two}},
		step{"it moves to another slice", func(m *service.Model) {
			m.SetSlice(svcfacts.Slice(slice("r", "http:8080", "10.244.2.2 on=b")))
			m.SetSlice(svcfacts.Slice(slice("s", "http:8080", "10.244.1.2 on=a")))
		}, nil},
		step{"another port", set(web(ports("http:81"))), []string{
			"web: - " + two,
			"web: + 10.96.0.1:81/TCP ClusterIP http " + both,
		}},
		step{"and back, with one more beside", set(web(ports("http:80", "admin:82"))), []string{
			"web: - 10.96.0.1:81/TCP ClusterIP http " + both,
			"web: + " + two,
			"web: + 10.96.0.1:82/TCP ClusterIP admin -> reject",
		}},
		step{"the one beside goes: of the other nothing is said", set(web()), []string{"web: - 10.96.0.1:82/TCP ClusterIP admin -> reject"}},
		step{"a slice goes to another Service", setSlice(of("other", slice("r", "http:8080", "10.244.2.2 on=b"))), []string{"web: - " + two, "web: + " + first}},
		step{"and becomes headless", setSlice(of("", slice("r", "http:8080", "10.244.2.2 on=b"))), nil},
		step{"deleted and made anew, seen at once", func(m *service.Model) {
			m.DeleteService(nameOf("web"))
			m.SetService(svcfacts.Service(web(named("web", 2000), affinity(60))))
		}, []string{"web: - " + first, "web: + " + first + " affinity 1m0s"}},
		step{"made and deleted, seen at once", func(m *service.Model) {
			m.SetService(svcfacts.Service(web(named("brief", 3000), clusterIPs("10.96.0.9"))))
			m.DeleteService(nameOf("brief"))
		}, nil},
		step{"the last slice goes", removeSlice("s"), []string{"web: - " + first + " affinity 1m0s", "web: + " + none + " affinity 1m0s"}},
		step{"what is not there goes", func(m *service.Model) {
			m.DeleteSlice(nameOf("s"))
			m.DeleteService(nameOf("nobody"))
		}, nil},
		step{"the Service goes", remove("web"), []string{"web: - " + none + " affinity 1m0s"}},
	)
}

func TestNodeChanges(t *testing.T) {
	m := newModel(service.Node{Name: "a"})
	m.SetService(svcfacts.Service(web()))
	m.SetSlice(svcfacts.Slice(slice("s", "http:8080", "10.244.1.2 zones=east", "10.244.2.2 zones=west")))
	m.SetService(svcfacts.Service(web(named("db", 1), clusterIPs("10.96.0.2"))))
	m.Changes()
	const all, near = "10.96.0.1:80/TCP ClusterIP http " + both, "10.96.0.1:80/TCP ClusterIP http -> 10.244.1.2:8080"
	walk(t, m,
		step{"its zone becomes known: the Service with hints differs", func(m *service.Model) { m.SetNode(nodeA) }, []string{"web: - " + all, "web: + " + near}},
		step{"its addresses change", func(m *service.Model) { m.SetNode(service.Node{Name: "a", Zone: "east"}) }, nil},
	)
}

func TestConflicts(t *testing.T) {
	// a is older than b; both claim a load balancer's address, b has another one besides.
	a := web(named("a", 100), clusterIPs("10.96.0.2"), externalIPs("192.0.2.7"))
	b := web(named("b", 200), clusterIPs("10.96.0.3"), externalIPs("192.0.2.7", "192.0.2.8"))
	const ofA, ofB = "10.96.0.2:80/TCP ClusterIP http -> reject", "10.96.0.3:80/TCP ClusterIP http -> reject"
	const seven, eight = "192.0.2.7:80/TCP ExternalIP http -> reject", "192.0.2.8:80/TCP ExternalIP http -> reject"
	m := newModel(nodeA)
	lost := func(want ...string) {
		t.Helper()
		var got []string
		for _, p := range m.Problems() {
			got = append(got, p.String())
		}
		sameLines(t, "problems", got, want)
	}
	walk(t, m, step{"the younger is there first", set(b), []string{"b: + " + ofB, "b: + " + seven, "b: + " + eight}})
	lost()
	walk(t, m, step{"the older comes: the address goes over, in one change", set(a), []string{"a: - " + seven, "a: + " + ofA, "a: + " + seven}})
	lost("Service default/b: 192.0.2.7:80/TCP belongs to Service default/a, which is older: give one of the two another address or port")
	if got := m.Frontends(); len(got) != 4 || got[2].Service != nameOf("a") {
		t.Errorf("the older does not have its address: %v", lines(got))
	}
	walk(t, m,
		step{"the older gets endpoints", setSlice(of("a", slice("s", "http:8080", "10.244.1.2"))), []string{
			"a: - " + ofA, "a: - " + seven,
			"a: + 10.96.0.2:80/TCP ClusterIP http -> 10.244.1.2:8080", "a: + 192.0.2.7:80/TCP ExternalIP http -> 10.244.1.2:8080",
		}},
		step{"the younger's endpoints change only what it has", setSlice(of("b", slice("t", "http:8080", "10.244.1.3"))), []string{
			"b: - " + ofB, "b: - " + eight,
			"b: + 10.96.0.3:80/TCP ClusterIP http -> 10.244.1.3:8080", "b: + 192.0.2.8:80/TCP ExternalIP http -> 10.244.1.3:8080",
		}},
		step{"the older goes, and with it the quarrel", remove("a"), []string{
			"a: - 10.96.0.2:80/TCP ClusterIP http -> 10.244.1.2:8080",
			"b: - 192.0.2.7:80/TCP ExternalIP http -> 10.244.1.2:8080",
			"b: + 192.0.2.7:80/TCP ExternalIP http -> 10.244.1.3:8080",
		}},
	)
	lost()
	walk(t, m,
		step{"it is made anew, and so is the younger", set(web(named("a", 300), clusterIPs("10.96.0.2"), externalIPs("192.0.2.7"))), []string{
			"a: + 10.96.0.2:80/TCP ClusterIP http -> 10.244.1.2:8080",
		}},
		step{"of the same second the first by name", set(web(named("a", 200), clusterIPs("10.96.0.2"), externalIPs("192.0.2.7"))), []string{
			"a: - 192.0.2.7:80/TCP ExternalIP http -> 10.244.1.3:8080", "a: + 192.0.2.7:80/TCP ExternalIP http -> 10.244.1.2:8080",
		}},
		step{"both go", func(m *service.Model) { remove("a")(m); remove("b")(m) }, []string{
			"a: - 10.96.0.2:80/TCP ClusterIP http -> 10.244.1.2:8080",
			"a: - 192.0.2.7:80/TCP ExternalIP http -> 10.244.1.2:8080",
			"b: - 10.96.0.3:80/TCP ClusterIP http -> 10.244.1.3:8080",
			"b: - 192.0.2.8:80/TCP ExternalIP http -> 10.244.1.3:8080",
		}},
	)
	lost()
}

func TestClusterIPIsNotTaken(t *testing.T) {
	m := newModel(nodeA)
	m.SetService(svcfacts.Service(web(named("old", 1), clusterIPs("10.96.0.9"), externalIPs("10.96.0.1"))))
	m.SetService(svcfacts.Service(web()))
	for _, f := range m.Frontends() {
		if f.Addr.String() == "10.96.0.1" && f.Service != nameOf("web") {
			t.Errorf("an external IP took another Service's ClusterIP: %s", line(f))
		}
	}
	want := "Service default/old: externalIPs: 10.96.0.1 is not served: it is the ClusterIP of Service default/web"
	if p := m.Problems(); len(p) != 1 || p[0].String() != want {
		t.Errorf("got %v, want %s", p, want)
	}
}

func TestNodePortsClash(t *testing.T) {
	m := newModel(nodeA)
	m.SetService(svcfacts.Service(web(nodePort, named("b", 5), clusterIPs("10.96.0.2"))))
	m.SetService(svcfacts.Service(web(nodePort, named("a", 9))))
	sameLines(t, "frontends", told(m.Changes()), []string{
		"a: + 10.96.0.1:80/TCP ClusterIP http -> reject",
		"b: + 0.0.0.0:30080/TCP NodePort http -> reject",
		"b: + 10.96.0.2:80/TCP ClusterIP http -> reject",
	})
}

func TestReplace(t *testing.T) {
	m := newModel(nodeA)
	m.SetService(svcfacts.Service(web()))
	m.SetService(svcfacts.Service(web(named("old", 1), clusterIPs("10.96.0.2"))))
	m.SetSlice(svcfacts.Slice(slice("s", "http:8080", "10.244.1.2")))
	m.SetSlice(svcfacts.Slice(slice("r", "http:8080", "10.244.2.2")))
	m.Changes()
	m.Replace(svcfacts.Services([]*corev1.Service{web(), web(named("new", 2), clusterIPs("10.96.0.3"))}), svcfacts.Slices(endpointSlices{slice("s", "http:8080", "10.244.1.2")}))
	sameLines(t, "changes", told(m.Changes()), []string{
		"new: + 10.96.0.3:80/TCP ClusterIP http -> reject",
		"old: - 10.96.0.2:80/TCP ClusterIP http -> reject",
		"web: - 10.96.0.1:80/TCP ClusterIP http " + both,
		"web: + 10.96.0.1:80/TCP ClusterIP http -> 10.244.1.2:8080",
	})
}

func TestFrontendsAreNotToldAgain(t *testing.T) {
	m := newModel(nodeA)
	m.SetService(svcfacts.Service(web()))
	if got := m.Frontends(); len(got) != 1 {
		t.Errorf("got %v, want one frontend", lines(got))
	}
	if got := m.Changes(); got != nil {
		t.Errorf("told again: %v", told(got))
	}
	m.DeleteService(nameOf("web"))
	m.Problems() // reading the problems does not consume changes
	m.HealthChecks()
	sameLines(t, "changes", told(m.Changes()), []string{"web: - 10.96.0.1:80/TCP ClusterIP http -> reject"})
}

func TestHealthChecks(t *testing.T) {
	lb := loadBalancer("203.0.113.1")
	for _, tc := range []struct {
		name   string
		svc    *corev1.Service
		slices endpointSlices
		want   string
	}{
		{"externalTrafficPolicy: Cluster", web(lb), one, "[]"},
		{"a NodePort", web(nodePort, externalLocal), one, "[]"},
		{"of the node's own endpoints", web(lb, externalLocal), one, "[{default/web 32000 1}]"},
		{"no endpoints", web(lb, externalLocal), nil, "[{default/web 32000 0}]"},
		{"a pod of both families is one", web(lb, externalLocal, dual), two, "[{default/web 32000 1}]"},
		{"a pod with two ports is one", web(lb, externalLocal, ports("a:1", "b:2")), endpointSlices{slice("s", "a:1 b:2", "10.244.1.2 on=a")}, "[{default/web 32000 1}]"},
		{"a pod in two slices is one", web(lb, externalLocal), endpointSlices{one[0], slice("t", "http:8080", "10.244.1.2 on=a")}, "[{default/web 32000 1}]"},
		{"of a family that the Service lacks", web(lb, externalLocal), endpointSlices{two[1]}, "[{default/web 32000 0}]"},
		{"those that terminate do not count", web(lb, externalLocal), endpointSlices{slice("s", "http:8080", "10.244.1.2 on=a unready terminating")}, "[{default/web 32000 0}]"},
		{"no port for it", web(lb, externalLocal, func(s *corev1.Service) { s.Spec.HealthCheckNodePort = 0 }), one, "[]"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			m := newModel(nodeA)
			m.Replace(svcfacts.Services([]*corev1.Service{tc.svc}), svcfacts.Slices(tc.slices))
			if got := fmt.Sprint(m.HealthChecks()); got != tc.want {
				t.Errorf("got %s, want %s", got, tc.want)
			}
			m.DeleteService(nameOf("web"))
			if got := m.HealthChecks(); len(got) != 0 {
				t.Errorf("after the Service is gone: %v", got)
			}
		})
	}
}

func TestProblems(t *testing.T) {
	for _, tc := range []struct {
		name string
		svc  *corev1.Service
		want []string
	}{
		{"none", web(loadBalancer("203.0.113.1"), externalLocal, sources("192.0.2.0/24")), nil},
		{"addresses", web(externalIPs("127.0.0.1", "nonsense", "2001:db8::1"), loadBalancer("ff02::1")), []string{
			`externalIPs: "127.0.0.1" is a loopback address: name another address`,
			`externalIPs: "nonsense" is no address: name another address`,
			`externalIPs: 2001:db8::1 is of a family that the Service does not have: add IPv6 to ipFamilies, or take the address away`,
			`status.loadBalancer: "ff02::1" is a multicast address: name another address`,
		}},
		{"a ClusterIP", web(clusterIPs("0.0.0.0")), []string{`clusterIPs: "0.0.0.0" is the unspecified address: make the Service anew`}},
		{"a port", web(ports("a:0")), []string{"port 0/ is left out: want 1 to 65535 of TCP, UDP or SCTP"}},
		{"sources", web(loadBalancer("203.0.113.1"), sources("192.0.2.1")), []string{
			`loadBalancerSourceRanges names no IPv4 range, so nobody may come to the load balancer's IPv4 address: add who may`,
			`loadBalancerSourceRanges: "192.0.2.1" is no range of addresses and lets nobody in: write it as in 203.0.113.0/24`,
		}},
		{"no health check", web(loadBalancer("203.0.113.1"), externalLocal, func(s *corev1.Service) { s.Spec.HealthCheckNodePort = 0 }), []string{
			"externalTrafficPolicy is Local, and there is no healthCheckNodePort at which a load balancer could ask which nodes have endpoints: set one",
		}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			m := newModel(nodeA)
			m.SetService(svcfacts.Service(tc.svc))
			var got []string
			for _, p := range m.Problems() {
				got = append(got, p.Text)
			}
			sameLines(t, "problems", got, tc.want)
		})
	}
}
