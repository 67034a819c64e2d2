// Command fathom-dns is a node's cache of the cluster's DNS: CoreDNS with a plugin of our own, nodecache. Everything that
// an administrator has to say about names is in the configuration of the cluster's servers; this has none.
package main

import (
	"context"
	"flag"
	"fmt"
	"io"
	"net/netip"
	"os"
	"os/signal"
	"runtime/debug"
	"strings"
	"syscall"

	"github.com/coredns/coredns/coremain"
	_ "github.com/coredns/coredns/plugin/bind"
	_ "github.com/coredns/coredns/plugin/chaos"
	_ "github.com/coredns/coredns/plugin/errors"
	_ "github.com/coredns/coredns/plugin/loadbalance"
	_ "github.com/coredns/coredns/plugin/metrics"
)

func main() {
	if err := run(); err != nil {
		fmt.Fprintln(os.Stderr, "fathom-dns:", err)
		os.Exit(1)
	}
}

// maxResolvConf is more than any resolv.conf that kubelet writes.
const maxResolvConf = 64 << 10

func run() error {
	// CoreDNS has flags of its own, -version among them, in the same set.
	listen := flag.String("listen", "169.254.20.10,fd66:6174:686f:6d::a", "addresses to answer at; those that the node has not when the first has come are left out")
	port := flag.Int("port", 53, "the port to answer at")
	up := flag.String("upstream", "", "HOST:PORT of the cluster's servers (default: from the environment, of Service kube-dns-upstream)")
	resolv := flag.String("resolv-conf", "/etc/resolv.conf", "file with the search list of a pod")
	health := flag.String("health", "127.0.0.1:10474", "HOST:PORT of the health check")
	metrics := flag.String("metrics", ":10473", "HOST:PORT of metrics for Prometheus")
	corefile := flag.String("corefile", "/etc/coredns/Corefile", "file with the configuration of the cluster's servers: if what they answer depends on who asks, or it cannot be read, the cache does not answer; empty if that is known not to be so")
	show := flag.Bool("show", false, "print the Corefile and end")
	flag.Parse()
	if flag.Lookup("version").Value.String() == "true" {
		coremain.Run()
	}
	if *port < 0 || *port > 65535 {
		return fmt.Errorf("-port: %d is none", *port)
	}
	o := options{Port: *port, Upstream: *up, Health: *health, Metrics: *metrics, Corefile: *corefile}
	var err error
	if o.Upstream == "" {
		if o.Upstream, err = upstreamOf(os.Getenv); err != nil {
			return err
		}
	}
	file, err := os.Open(*resolv)
	if err != nil {
		return fmt.Errorf("read the search list: %w", err)
	}
	text, err := io.ReadAll(io.LimitReader(file, maxResolvConf))
	_ = file.Close()
	if err != nil {
		return fmt.Errorf("read the search list in %s: %w", *resolv, err)
	}
	o.Search = searchList(string(text))
	var wanted []netip.Addr
	for word := range strings.SplitSeq(*listen, ",") {
		addr, err := netip.ParseAddr(word)
		if err != nil {
			return fmt.Errorf("-listen: %w", err)
		}
		wanted = append(wanted, addr)
	}
	if *show {
		o.Listen = wanted
		fmt.Print(o.corefile())
		return nil
	}
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, os.Interrupt)
	defer stop()
	if o.Listen, err = waitForAddresses(ctx, wanted); err != nil {
		return err
	}
	// Answers are many and short-lived, what stays is small: a few megabytes more, half the collections. GOMEMLIMIT, where
	// it is set, has them come sooner.
	debug.SetGCPercent(400)
	return o.serve(ctx)
}
