package nodecache

import (
	"context"
	"maps"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/miekg/dns"

	"github.com/fathom-network/fathom/kit/addons/dns/upstream"
)

// TestMain has all tests run in a network namespace of their own.
func TestMain(m *testing.M) {
	if os.Getenv("FATHOM_TEST_NAMESPACE") == "" {
		if os.Getuid() != 0 {
			println("skipped: the tests make a network namespace, which needs root")
			return
		}
		cmd := exec.Command("/proc/self/exe", os.Args[1:]...)
		cmd.Env = append(os.Environ(), "FATHOM_TEST_NAMESPACE=1")
		cmd.Stdout, cmd.Stderr = os.Stdout, os.Stderr
		cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNET}
		if err := cmd.Run(); err != nil {
			os.Exit(1)
		}
		return
	}
	if out, err := exec.Command("ip", "link", "set", "lo", "up").CombinedOutput(); err != nil {
		panic(string(out))
	}
	if os.Getenv(coldServer) != "" {
		serveCold()
		return
	}
	os.Exit(m.Run())
}

// servers stand for those of a cluster.
type servers struct {
	t    *testing.T
	addr string
	stop func()

	mu      sync.Mutex
	records map[string]string // of type A, by name
	rcode   map[string]int    // other answers
	ttl     uint32
	silent  bool
	hushed  string // the domain below which nothing is answered
	passes  bool   // what does not exist somebody else has denied
	asked   []string
	open    func() int // connections
}

func newServers(t *testing.T) *servers {
	s := &servers{t: t, addr: "127.0.0.1:0", ttl: 30, records: map[string]string{}, rcode: map[string]int{}}
	s.start()
	t.Cleanup(func() { s.stop() })
	return s
}

func (s *servers) start() {
	s.t.Helper()
	l, err := net.Listen("tcp", s.addr)
	if err != nil {
		s.t.Fatal(err)
	}
	s.addr = l.Addr().String()
	var mu sync.Mutex
	open := map[net.Conn]bool{}
	server := &dns.Server{Listener: recorder{l, &mu, open}, Handler: s}
	go func() { _ = server.ActivateAndServe() }()
	s.open = func() int {
		mu.Lock()
		defer mu.Unlock()
		return len(open)
	}
	s.stop = sync.OnceFunc(func() {
		_ = l.Close()
		mu.Lock()
		all := slices.Collect(maps.Keys(open))
		mu.Unlock()
		for _, c := range all {
			_ = c.Close()
		}
	})
}

// recorder knows the connections of a listener, to end them as the end of a process does.
type recorder struct {
	net.Listener
	mu   *sync.Mutex
	open map[net.Conn]bool
}

func (r recorder) Accept() (net.Conn, error) {
	c, err := r.Listener.Accept()
	if err == nil {
		c = &recorded{c, r}
		r.mu.Lock()
		r.open[c] = true
		r.mu.Unlock()
	}
	return c, err
}

type recorded struct {
	net.Conn
	by recorder
}

func (c *recorded) Close() error {
	c.by.mu.Lock()
	delete(c.by.open, c)
	c.by.mu.Unlock()
	return c.Conn.Close()
}

func (s *servers) ServeDNS(w dns.ResponseWriter, r *dns.Msg) {
	s.mu.Lock()
	q := r.Question[0]
	s.asked = append(s.asked, q.Name)
	addr, found := s.records[q.Name]
	m := new(dns.Msg).SetReply(r)
	switch rcode, other := s.rcode[q.Name]; {
	case s.silent || s.hushed != "" && dns.IsSubDomain(s.hushed, q.Name):
		m = nil
	case other:
		m.Rcode = rcode
	case found:
		m.Answer = []dns.RR{&dns.A{Hdr: dns.RR_Header{Name: q.Name, Rrtype: dns.TypeA, Class: dns.ClassINET, Ttl: s.ttl}, A: netip.MustParseAddr(addr).AsSlice()}}
	default:
		m.Rcode = dns.RcodeNameError
		zone := "cluster.local."
		if s.passes || !dns.IsSubDomain(zone, q.Name) {
			zone = "."
		}
		m.Ns = []dns.RR{&dns.SOA{Hdr: dns.RR_Header{Name: zone, Rrtype: dns.TypeSOA, Class: dns.ClassINET, Ttl: s.ttl}, Ns: "ns.", Mbox: "m.", Minttl: s.ttl}}
	}
	s.mu.Unlock()
	if m != nil {
		_ = w.WriteMsg(m)
	}
}

func (s *servers) set(f func()) {
	s.mu.Lock()
	defer s.mu.Unlock()
	f()
}

// took returns what was asked since it was last called, sorted.
func (s *servers) took() []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	all := s.asked
	s.asked = nil
	slices.Sort(all)
	return all
}

// clock is the cache's time.
type clock struct {
	mu  sync.Mutex
	now time.Time
}

func (c *clock) Now() time.Time {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.now
}

func (c *clock) pass(d time.Duration) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.now = c.now.Add(d)
}

func newCache(t *testing.T, s *servers) (*NodeCache, *clock) {
	c := New(s.addr, []string{"svc.cluster.local.", "cluster.local.", "corp.example."})
	k := &clock{now: time.Unix(1e9, 0)}
	c.now = k.Now
	t.Cleanup(c.Close)
	return c, k
}

// writer takes an answer to a client.
type writer struct {
	dns.ResponseWriter
	client net.IP
	msg    *dns.Msg
}

func (w *writer) RemoteAddr() net.Addr { return &net.UDPAddr{IP: w.client, Port: 1024} }

func (w *writer) WriteMsg(m *dns.Msg) error { w.msg = m; return nil }

// resolve asks the cache, and writes the answer as "NOERROR 10.0.0.1 ttl 30".
func resolve(c *NodeCache, name string) string { return resolveFor(c, net.IPv4(127, 0, 0, 1), name) }

func resolveFor(c *NodeCache, client net.IP, name string) string {
	w := &writer{client: client}
	r := new(dns.Msg).SetQuestion(name, dns.TypeA)
	rcode, _ := c.ServeDNS(context.Background(), w, r)
	if w.msg == nil {
		return dns.RcodeToString[rcode]
	}
	if w.msg.Id != r.Id || w.msg.Question[0] != r.Question[0] {
		return "the answer is to another question: " + w.msg.Question[0].String()
	}
	text := dns.RcodeToString[w.msg.Rcode]
	for _, rr := range w.msg.Answer {
		text += " " + rr.(*dns.A).A.String() + " ttl " + strings.Fields(rr.String())[1]
	}
	return text
}

func expect(t *testing.T, what, got, want string) {
	t.Helper()
	if got != want {
		t.Errorf("%s: got %q, want %q", what, got, want)
	}
}

func eventually(t *testing.T, what string, f func() bool) {
	t.Helper()
	for end := time.Now().Add(time.Minute); !f(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("not so after 20 s: %s", what)
		}
	}
}

func TestKeepsAnswers(t *testing.T) {
	s := newServers(t)
	s.records["db.shop.svc.cluster.local."] = "10.96.1.1"
	s.records["www.example.com."] = "192.0.2.1"
	c, k := newCache(t, s)
	expect(t, "first", resolve(c, "db.shop.svc.cluster.local."), "NOERROR 10.96.1.1 ttl 5")
	expect(t, "other case", resolve(c, "DB.shop.svc.cluster.LOCAL."), "NOERROR 10.96.1.1 ttl 5")
	expect(t, "outside", resolve(c, "www.example.com."), "NOERROR 192.0.2.1 ttl 30")
	expect(t, "no such", resolve(c, "no.example.com."), "NXDOMAIN")
	expect(t, "no such again", resolve(c, "no.example.com."), "NXDOMAIN")
	expect(t, "asked", strings.Join(s.took(), " "), "db.shop.svc.cluster.local. no.example.com. www.example.com.")
	k.pass(3 * time.Second)
	expect(t, "after 3 s", resolve(c, "db.shop.svc.cluster.local."), "NOERROR 10.96.1.1 ttl 2")
	expect(t, "asked after 3 s", strings.Join(s.took(), " "), "")
	k.pass(1200 * time.Millisecond)
	expect(t, "before its end", resolve(c, "db.shop.svc.cluster.local."), "NOERROR 10.96.1.1 ttl 1")
	eventually(t, "it is asked for again before its end", func() bool { return len(s.took()) == 1 })
}

// The newest answer is the only one, whatever the one before was.
func TestChangedAnswers(t *testing.T) {
	s := newServers(t)
	c, k := newCache(t, s)
	const name = "new.shop.svc.cluster.local."
	for range 2 {
		expect(t, "before it is made", resolve(c, name), "NXDOMAIN")
		s.set(func() { s.records[name] = "10.96.1.2" })
		k.pass(6 * time.Second)
		expect(t, "after it was made", resolve(c, name), "NOERROR 10.96.1.2 ttl 5")
		s.took()
		expect(t, "kept", resolve(c, name), "NOERROR 10.96.1.2 ttl 5")
		expect(t, "asked", strings.Join(s.took(), " "), "")
		s.stop()
		k.pass(6 * time.Second)
		expect(t, "with no server", resolve(c, name), "NOERROR 10.96.1.2 ttl 2")
		s.start()
		eventually(t, "the servers are found again", func() bool { return !isClosed(c.upstream.Gone()) })
		s.set(func() { delete(s.records, name) })
		k.pass(6 * time.Second)
	}
}

func TestStale(t *testing.T) {
	const known, denied, unknown = "db.shop.svc.cluster.local.", "no.shop.svc.cluster.local.", "x.shop.svc.cluster.local."
	for what, end := range map[string]func(*servers){
		"gone":   func(s *servers) { s.stop() },
		"silent": func(s *servers) { s.set(func() { s.silent = true }) },
		"confused": func(s *servers) {
			s.set(func() { s.rcode[known], s.rcode[denied] = dns.RcodeServerFailure, dns.RcodeRefused })
		},
	} {
		t.Run(what, func(t *testing.T) {
			t.Parallel()
			s := newServers(t)
			s.records[known] = "10.96.1.1"
			c, k := newCache(t, s)
			expect(t, "first", resolve(c, known), "NOERROR 10.96.1.1 ttl 5")
			expect(t, "denied first", resolve(c, denied), "NXDOMAIN")
			end(s)
			expect(t, "fresh", resolve(c, known), "NOERROR 10.96.1.1 ttl 5")
			k.pass(time.Minute)
			expect(t, "stale", resolve(c, known), "NOERROR 10.96.1.1 ttl 2")
			expect(t, "denied, stale", resolve(c, denied), "NXDOMAIN")
			if what == "gone" {
				expect(t, "unknown", resolve(c, unknown), "SERVFAIL")
			}
			k.pass(time.Hour)
			if what == "gone" {
				expect(t, "too old", resolve(c, known), "SERVFAIL")
			}
		})
	}
}

// A client that asks for what is not known waits for servers that come back in time.
func TestComesBack(t *testing.T) {
	s := newServers(t)
	s.records["db.shop.svc.cluster.local."] = "10.96.1.1"
	c, _ := newCache(t, s)
	s.stop()
	expect(t, "gone", resolve(c, "x.example.com."), "SERVFAIL")
	answer := make(chan string)
	go func() { answer <- resolve(c, "db.shop.svc.cluster.local.") }()
	s.start()
	expect(t, "back", <-answer, "NOERROR 10.96.1.1 ttl 5")
}

// The first name of a search list that does not exist brings the others of the cluster's, and those are then answered on
// the node.
func TestLooksAhead(t *testing.T) {
	s := newServers(t)
	s.records["www.example.com."] = "192.0.2.1"
	c, _ := newCache(t, s)
	expect(t, "first of the list", resolve(c, "www.example.com.shop.svc.cluster.local."), "NXDOMAIN")
	eventually(t, "what follows in the cluster is known", func() bool {
		return c.answers.kept.Len() == 3
	})
	for _, name := range []string{"www.example.com.svc.cluster.local.", "www.example.com.cluster.local."} {
		expect(t, name, resolve(c, name), "NXDOMAIN")
	}
	expect(t, "asked", strings.Join(s.took(), " "), "www.example.com.cluster.local. www.example.com.shop.svc.cluster.local. www.example.com.svc.cluster.local.")
	expect(t, "beyond the cluster", resolve(c, "www.example.com.corp.example."), "NXDOMAIN")
	expect(t, "the name", resolve(c, "www.example.com."), "NOERROR 192.0.2.1 ttl 30")
	expect(t, "asked in the end", strings.Join(s.took(), " "), "www.example.com. www.example.com.corp.example.")
}

// Names that the cluster's servers pass on are asked for when a client has asked for them, and never before: who is
// outside learns no name of a Service, or what is left of one that was misspelled, that CoreDNS alone would not tell it.
func TestTellsNobodyOutside(t *testing.T) {
	s := newServers(t)
	s.records["billing.finance.svc.cluster.local."] = "10.96.1.1"
	c, k := newCache(t, s)
	for range 3 {
		expect(t, "billing.finance by a search list", resolve(c, "billing.finance.shop.svc.cluster.local."), "NXDOMAIN")
		expect(t, "and there it is", resolve(c, "billing.finance.svc.cluster.local."), "NOERROR 10.96.1.1 ttl 5")
		expect(t, "misspelled", resolve(c, "passwrds.vault.svc.cluster.local."), "NXDOMAIN")
		expect(t, "misspelled in all", resolve(c, "www.example.svc.cluster.local."), "NXDOMAIN")
		eventually(t, "nothing is under way", func() bool { return c.upstream.Flights() == 0 })
		k.pass(6 * time.Second)
	}
	// The servers have a rule that passes on what the cluster does not know, and so what follows such a name.
	s.set(func() { s.passes = true })
	expect(t, "passed on", resolve(c, "tokens.vault.svc.cluster.local."), "NXDOMAIN")
	eventually(t, "nothing is under way", func() bool { return c.upstream.Flights() == 0 })
	for _, name := range s.took() {
		if !dns.IsSubDomain("cluster.local.", name) || strings.HasPrefix(name, "tokens.") && name != "tokens.vault.svc.cluster.local." {
			t.Errorf("the servers were asked for %s, which nobody has asked for, and pass it on", name)
		}
	}
}

func TestFollowing(t *testing.T) {
	c := New("127.0.0.1:1", []string{"svc.cluster.local.", "cluster.local.", "corp.example.", "zone.cluster.local."})
	for name, want := range map[string]string{
		"www.example.com.shop.svc.cluster.local.": "www.example.com.svc.cluster.local. www.example.com.cluster.local. www.example.com.zone.cluster.local.",
		"db.shop.svc.cluster.local.":              "db.svc.cluster.local. db.cluster.local. db.zone.cluster.local.",
		`a\.b.shop.svc.cluster.local.`:            `a\.b.svc.cluster.local. a\.b.cluster.local. a\.b.zone.cluster.local.`,
		"shop.svc.cluster.local.":                 "",
		"svc.cluster.local.":                      "",
		"www.example.com.svc.cluster.local.":      "www.example.svc.cluster.local. www.example.cluster.local. www.example.zone.cluster.local.",
		"www.example.com.":                        "",
		"xsvc.cluster.local.":                     "",
		// A whole name with the search list added
		"a.b.cluster.local.shop.svc.cluster.local.": "a.b.cluster.local.svc.cluster.local. a.b.cluster.local.cluster.local. a.b.cluster.local.zone.cluster.local. a.b.cluster.local.",
	} {
		q := upstream.Question{Name: name, Type: dns.TypeA, Class: dns.ClassINET}
		expect(t, name, strings.Join(c.following(q), " "), want)
		q.Type = dns.TypeSRV
		expect(t, name+" SRV", strings.Join(c.following(q), " "), "")
	}
}

func TestLifetime(t *testing.T) {
	rr := func(s string) dns.RR {
		r, err := dns.NewRR(s)
		if err != nil {
			t.Fatal(err)
		}
		return r
	}
	soa := rr("example. 60 IN SOA ns. m. 1 2 3 4 3")
	for _, test := range []struct {
		what   string
		rcode  int
		answer []dns.RR
		ns     []dns.RR
		want   time.Duration
	}{
		{"the least counts", 0, []dns.RR{rr("a.example. 20 IN A 192.0.2.1"), rr("a.example. 10 IN A 192.0.2.2")}, nil, 10 * time.Second},
		{"no denial", 0, []dns.RR{rr("a.example. 20 IN A 192.0.2.1")}, []dns.RR{soa}, 20 * time.Second},
		{"not to be kept", 0, []dns.RR{rr("a.example. 0 IN A 192.0.2.1")}, nil, 0},
		{"no such name", dns.RcodeNameError, nil, []dns.RR{soa}, 3 * time.Second},
		{"no such type", 0, nil, []dns.RR{soa}, 3 * time.Second},
		{"no such type of an alias", 0, []dns.RR{rr("a.example. 20 IN CNAME b.example.")}, []dns.RR{soa}, 3 * time.Second},
		{"a denial that lasts long", dns.RcodeNameError, nil, []dns.RR{rr("example. 600 IN SOA ns. m. 1 2 3 4 600")}, 5 * time.Second},
		{"a denial without end", dns.RcodeNameError, nil, nil, 0},
		{"a referral", 0, nil, []dns.RR{rr("example. 60 IN NS ns.example.")}, 0},
	} {
		m := new(dns.Msg).SetQuestion("a.example.", dns.TypeA)
		m.Rcode, m.Answer, m.Ns = test.rcode, test.answer, test.ns
		if got := lifetime(m); got != test.want {
			t.Errorf("%s: %v, want %v", test.what, got, test.want)
		}
	}
}
