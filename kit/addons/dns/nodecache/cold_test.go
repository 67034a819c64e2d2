package nodecache

import (
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/miekg/dns"
)

const coldServer = "FATHOM_TEST_COLD_SERVER"

// serveCold is a server in a process of its own, whose work is not counted with the cache's.
func serveCold() {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		panic(err)
	}
	fmt.Println(l.Addr())
	server := &dns.Server{Listener: l, Handler: dns.HandlerFunc(func(w dns.ResponseWriter, r *dns.Msg) {
		m := new(dns.Msg).SetReply(r)
		m.Answer = []dns.RR{&dns.A{Hdr: dns.RR_Header{Name: r.Question[0].Name, Rrtype: dns.TypeA, Class: dns.ClassINET, Ttl: 30}, A: net.IPv4(192, 0, 2, 1)}}
		_ = w.WriteMsg(m)
	})}
	go func() { _ = server.ActivateAndServe() }()
	_, _ = io.Copy(io.Discard, os.Stdin) // until the test ends
}

// BenchmarkCold asks for names that the cache does not know, as 100 clients at once. cpu-ns is the time of all processors
// that the cache alone takes for one.
func BenchmarkCold(b *testing.B) {
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), coldServer+"=1")
	stdin, err := cmd.StdinPipe()
	if err != nil {
		b.Fatal(err)
	}
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		b.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		b.Fatal(err)
	}
	defer func() {
		stdin.Close()
		_ = cmd.Wait()
	}()
	var addr string
	if _, err := fmt.Fscanln(stdout, &addr); err != nil {
		b.Fatal(err)
	}
	c := New(addr, []string{"svc.cluster.local.", "cluster.local."})
	defer c.Close()
	var n atomic.Int64
	b.ReportAllocs()
	b.SetParallelism(100)
	before := processors(b)
	b.ResetTimer()
	b.RunParallel(func(pb *testing.PB) {
		for pb.Next() {
			name := fmt.Sprintf("web%d.example.com.", n.Add(1))
			if got := resolve(c, name); !strings.Contains(got, "192.0.2.1") {
				b.Errorf("%s: %s", name, got)
				return
			}
		}
	})
	b.StopTimer()
	b.ReportMetric(float64(processors(b)-before)/float64(b.N), "cpu-ns/op")
}

func processors(b *testing.B) time.Duration {
	var u syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &u); err != nil {
		b.Fatal(err)
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}
